//! Prints what the picker chooses: `picks M N K TYPE ORDERS [count]`, as lines that `show` reads.

use tilewright_base::DType;
use tilewright_kernels::gemm::{Order, Precision, Problem, plan_untuned};
use tilewright_lower_gpu::{Mode, ProductKind, StoreKind};
use tilewright_target::Gpu;

fn main() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| args[i].parse::<i64>().map_err(|e| format!("{}: {e}", args[i]));
    // `tf32`: f32 operands that are rounded.
    let name = args[3].strip_prefix('t').unwrap_or(&args[3]);
    let dtype: DType = name.parse().map_err(|_| format!("{} is not a type", args[3]))?;
    let result = match dtype {
        DType::I8 => DType::I32,
        DType::F8E4M3 => DType::BF16,
        other => other,
    };
    let order = |c: u8| if c == b'c' { Order::Col } else { Order::Row };
    let o = args[4].as_bytes();
    let mut p = Problem::dense(number(0)?, number(1)?, number(2)?, dtype, result).ordered(
        order(o[0]),
        order(o[1]),
        order(o[2]),
    );
    if args[3] == "tf32" {
        p.precision = Precision::Tf32;
    }
    let most = args.get(5).map_or(Ok(5), |n| n.parse::<usize>().map_err(|e| e.to_string()))?;
    for c in plan_untuned(&p, &Gpu::h200(), most).map_err(|e| e.to_string())? {
        let s = c.steps.iter().find(|s| s.kernel.tiles.iter().any(|t| &**t == "BK"));
        let Some(step) = s else { continue };
        let s = &step.schedule;
        let t = |name: &str| s.tiles.get(name).copied().unwrap_or(0);
        let swapped = step.operands[0] == tilewright_kernels::gemm::Place::B;
        let flip = |c: char| if c == 'c' { 'r' } else { 'c' };
        let given: Vec<char> = args[4].chars().collect();
        let orders: String = if swapped {
            [flip(given[1]), flip(given[0]), flip(given[2])].iter().collect()
        } else {
            args[4].clone()
        };
        let splits = step.sizes.get("S").copied().unwrap_or(1);
        if !s.tiles.contains_key("BM") || s.product == ProductKind::Fma {
            // A matrix times vectors is for `show_rows`, plain multiply-adds have knobs of their own.
            println!("# {} parts={splits} {s} # {:.2} us", step.kernel.name, c.estimate_us);
            continue;
        }
        println!(
            "{} {} {} {} stages={} slots={} consumers={} order={}{}{}{}{} # {:.2} us, {} steps, {} parts",
            args[3],
            t("BM"),
            t("BN"),
            t("BK"),
            s.stages,
            s.store_slots,
            s.consumers,
            orders,
            if s.mode == Mode::PingPong { " pingpong=1" } else { "" },
            if s.cluster > 1 {
                format!(" cluster={} axis={}", s.cluster, s.cluster_axis)
            } else {
                String::new()
            },
            if s.store == StoreKind::Direct {
                format!(" direct=1 vector={}", s.vector)
            } else {
                String::new()
            },
            if swapped { " swap=1" } else { "" },
            c.estimate_us,
            c.steps.len(),
            splits,
        );
    }
    Ok(())
}
