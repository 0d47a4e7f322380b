//! Prints the CUDA text of matrix products under schedules, for reading and for experiments.
//!
//! `cargo run --release -p tilewright-kernels --example show -- bf16 BM BN BK [key=value ...]`
//! prints one. With `--json FILE`, each line of FILE is such a list, and the output is a JSON list of
//! texts with what a launch needs.

use std::fmt::Write;
use tilewright_base::DType;
use tilewright_device::{Arch, Program, Swizzle};
use tilewright_emit_cuda::{Argument, Source};
use tilewright_kernels::gemm::{GemmSpec, Math, Order};
use tilewright_lower_gpu::{GpuSchedule, Mode, ProductKind, StoreKind, lower};

fn build(args: &[String]) -> Result<(Program, Source), String> {
    let dtype: DType = args[0].parse().map_err(|_| format!("{} is not a type", args[0]))?;
    let sizes: Vec<i64> = args[1..4]
        .iter()
        .map(|a| a.parse().map_err(|e| format!("{a}: {e}")))
        .collect::<Result<_, _>>()?;
    let (sum, result) = match dtype {
        DType::I8 => (DType::I32, DType::I32),
        DType::F8E4M3 => (DType::F32, DType::BF16),
        other => (DType::F32, other),
    };
    let mut spec = GemmSpec::plain(dtype, sum, result);
    if dtype == DType::F32 {
        spec.math = Math::Tf32;
    }
    let mut s = GpuSchedule::hopper(&[("BM", sizes[0]), ("BN", sizes[1]), ("BK", sizes[2])]);
    for arg in &args[4..] {
        let (key, value) = arg.split_once('=').ok_or(format!("{arg} is not key=value"))?;
        let number = || value.parse::<u32>().map_err(|e| format!("{arg}: {e}"));
        match key {
            "consumers" => s.consumers = number()?,
            "stages" => s.stages = number()?,
            "cluster" => s.cluster = number()?,
            "axis" => s.cluster_axis = number()? as usize,
            "raster" => s.raster = number()?,
            "slots" => s.store_slots = number()?,
            "vector" => s.vector = number()?,
            "blocks" => s.blocks_per_sm = number()?,
            "persistent" => s.persistent = number()? == 1,
            "dependent" => s.dependent = number()? == 1,
            "pingpong" => s.mode = if number()? == 1 { Mode::PingPong } else { Mode::Cooperative },
            "direct" => s.store = if number()? == 1 { StoreKind::Direct } else { StoreKind::Tma },
            "order" => {
                let order = |c: u8| if c == b'c' { Order::Col } else { Order::Row };
                let v = value.as_bytes();
                (spec.a, spec.b, spec.c) = (order(v[0]), order(v[1]), order(v[2]));
            }
            "math" => {
                spec.math = match value {
                    "exact" => Math::Exact,
                    "tf32" => Math::Tf32,
                    "tf32x3" => Math::Tf32x3,
                    "promoted" => Math::Promoted,
                    _ => return Err(format!("unknown math {value}")),
                }
            }
            "swap" => {}
            "arch" => {
                s.arch = match value {
                    "80" => Arch::Sm80,
                    "89" => Arch::Sm89,
                    "90" => Arch::Sm90a,
                    _ => return Err(format!("{arg}: 80, 89 or 90")),
                }
            }
            // Warps along rows and columns, for example `fma=2x4`.
            "fma" | "mma" => {
                let (m, n) = value.split_once('x').ok_or(format!("{arg}: 2x4, for example"))?;
                let parse = |t: &str| t.parse::<u32>().map_err(|e| format!("{arg}: {e}"));
                let product = if key == "fma" { ProductKind::Fma } else { ProductKind::MmaSync };
                let tiles: Vec<(&str, i64)> =
                    ["BM", "BN", "BK"].into_iter().zip(sizes.clone()).collect();
                s = GpuSchedule::pipelined(s.arch, product, (parse(m)?, parse(n)?), &tiles);
                s.vector = 16 * 8 / dtype.bits();
            }
            "staged" if number()? == 1 => s.store = StoreKind::Staged,
            "staged" => s.store = StoreKind::Direct,
            "batched" => spec.batched = number()? == 1,
            _ => return Err(format!("unknown key {key}")),
        }
    }
    let program = lower(&spec.program("gemm"), &s).map_err(|e| e.to_string())?;
    let source = tilewright_emit_cuda::emit(&program).map_err(|e| e.to_string())?;
    Ok((program, source))
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn json(line: &str, program: &Program, source: &Source) -> String {
    let arguments: Vec<String> = source
        .arguments
        .iter()
        .map(|a| match a {
            Argument::Map(m) => {
                let map = &program.maps[*m];
                let swizzle = match map.swizzle {
                    Swizzle::None => 0,
                    Swizzle::B32 => 1,
                    Swizzle::B64 => 2,
                    Swizzle::B128 => 3,
                };
                format!(
                    "{{\"map\": {}, \"box\": {:?}, \"contiguous\": {}, \"swizzle\": {swizzle}, \"tf32\": {}}}",
                    quoted(&program.params[map.param].name),
                    map.box_shape,
                    map.contiguous,
                    map.tf32
                )
            }
            Argument::Pointer(p) => format!("{{\"pointer\": {}}}", quoted(&program.params[*p].name)),
            Argument::Size(s) | Argument::Live(s) => format!("{{\"size\": {}}}", quoted(s)),
        })
        .collect();
    format!(
        "{{\"line\": {}, \"text\": {}, \"smem\": {}, \"threads\": {}, \"cluster\": {}, \"persistent\": {}, \"items\": {}, \"arguments\": [{}]}}",
        quoted(line),
        quoted(&source.text),
        source.smem_bytes,
        source.threads,
        source.cluster,
        program.persistent,
        quoted(&program.items.to_string()),
        arguments.join(", ")
    )
}

fn main() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) != Some("--json") {
        let (_, source) = build(&args)?;
        println!("{}", source.text);
        return Ok(());
    }
    let list = std::fs::read_to_string(&args[1]).map_err(|e| format!("{}: {e}", args[1]))?;
    let mut out = String::from("[");
    for line in list.lines().filter(|l| !l.trim().is_empty()) {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match build(&words) {
            Ok((program, source)) => {
                let _ = write!(
                    out,
                    "{}{}",
                    if out.len() > 1 { ",\n" } else { "" },
                    json(line, &program, &source)
                );
            }
            Err(error) => eprintln!("{line}: {error}"),
        }
    }
    println!("{out}]");
    Ok(())
}
