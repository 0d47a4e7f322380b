//! Attention after scheduling: the rules, the checker under all orders, and values against the tile
//! program's own interpreter.

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::DType;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, orders, run};
use tilewright_kernels::attention::{AttentionSpec, Causal, MaskKind};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, StoreKind, lower};
use tilewright_tile::Schedule;

/// A small attention and its schedule.
struct Case {
    name: &'static str,
    spec: AttentionSpec,
    schedule: GpuSchedule,
    /// Heads of keys and values, heads of queries for each, queries, keys.
    sizes: [i64; 4],
}

fn spec(dtype: DType, depth: i64) -> AttentionSpec {
    AttentionSpec {
        dtype,
        result: dtype,
        tf32: false,
        depth,
        width: depth,
        causal: Causal::No,
        mask: None,
        scale: 0.25,
        lse: false,
    }
}

fn tiles(consumers: i64, bt: i64) -> GpuSchedule {
    let mut s = GpuSchedule::hopper(&[("BQ", 64 * consumers), ("BT", bt)]);
    s.consumers = consumers as u32;
    s.stages = 2;
    s.raster = 1;
    s
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |name, spec, schedule, sizes| out.push(Case { name, spec, schedule, sizes });
    let bf16 = spec(DType::BF16, 32);
    add("plain", bf16.clone(), tiles(1, 32), [1, 2, 70, 100]);
    let turns = GpuSchedule { turns: true, dependent: true, ..tiles(2, 32) };
    add("two in turns", bf16.clone(), turns.clone(), [1, 1, 200, 96]);
    add("one block of keys", bf16.clone(), turns.clone(), [1, 1, 130, 1]);
    let causal = AttentionSpec { causal: Causal::EndTogether, lse: true, ..bf16.clone() };
    add("causal", causal.clone(), turns.clone(), [1, 1, 150, 150]);
    add("causal after a cache", causal.clone(), turns.clone(), [1, 2, 130, 197]);
    add("causal, rows that see nothing", causal, turns.clone(), [1, 1, 150, 90]);
    let ahead = AttentionSpec { causal: Causal::Ahead, ..bf16.clone() };
    add("causal from the start", ahead, turns.clone(), [1, 1, 70, 100]);
    let three = GpuSchedule { turns: true, store_slots: 1, ..tiles(3, 32) };
    add("three in turns", spec(DType::F16, 24), three, [2, 2, 100, 70]);
    let add_mask = Some((MaskKind::Add, DType::F32, true));
    add("mask", AttentionSpec { mask: add_mask, ..bf16.clone() }, turns.clone(), [1, 2, 70, 50]);
    let keep = Some((MaskKind::Keep, DType::Bool, false));
    add("padding", AttentionSpec { mask: keep, lse: true, ..bf16.clone() }, turns, [1, 2, 70, 50]);
    let direct = GpuSchedule { store: StoreKind::Direct, persistent: false, ..tiles(1, 32) };
    let wide = AttentionSpec { width: 64, scale: -0.5, ..bf16 };
    add("direct stores, wide values", wide, direct, [1, 1, 65, 33]);
    out
}

fn sizes(case: &Case) -> Env {
    let [groups, each, rows, keys] = case.sizes;
    let heads = groups * each;
    let mut env = Env::new();
    let mut put = |name: &str, v: i64| {
        env.insert(Arc::from(name), v);
    };
    let (depth, width) = ((case.spec.depth + 7) / 8 * 8, (case.spec.width + 7) / 8 * 8);
    for (name, v) in [("B", 2), ("H", heads), ("G", groups), ("R", each), ("S", rows), ("T", keys)]
    {
        put(name, v);
    }
    if case.spec.causal == Causal::Ahead {
        put("ahead", 3);
    }
    // Queries and results by rows, keys and values by heads.
    for (name, n, heads, rows, line) in [
        ("q", true, heads, rows, depth),
        ("k", false, groups, keys, depth),
        ("v", false, groups, keys, width),
        ("o", true, heads, rows, width),
    ] {
        let (head, row) = if n { (line, heads * line) } else { (rows * line, line) };
        put(&format!("{name}b"), heads * rows * line);
        put(&format!("{name}h"), head);
        put(&format!("{name}s"), row);
    }
    if let Some((_, _, by_row)) = case.spec.mask {
        let line = (keys + 1) / 2 * 2;
        let rows = if by_row { rows } else { 1 };
        put("mb", rows * line);
        put("mh", 0);
        put("ms", if by_row { line } else { 0 });
    }
    env
}

/// Bytes for each parameter: small numbers of a fixed pattern.
fn buffers(kernel: &tilewright_tile::Kernel, env: &Env) -> Vec<Vec<u8>> {
    kernel
        .params
        .iter()
        .enumerate()
        .map(|(p, (_, param))| {
            let elements = param.layout.alloc_elements().eval(env).unwrap() as usize;
            let mut bytes = vec![0u8; elements * param.dtype.bits() as usize / 8];
            for i in 0..elements {
                let value = ((i * 7 + p * 5 + i / 11) % 13) as i64 - 6;
                if param.dtype == DType::Bool {
                    tilewright_data::from_i64(param.dtype, &mut bytes, i, i64::from(value > -4));
                } else {
                    tilewright_data::from_f64(param.dtype, &mut bytes, i, value as f64 / 4.0);
                }
            }
            bytes
        })
        .collect()
}

#[test]
fn scheduled_attention_keeps_the_rules() {
    for case in cases() {
        let kernel = case.spec.program("attention");
        tilewright_tile::verify(&kernel).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let program =
            lower(&kernel, &case.schedule).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        if let Err(e) = tilewright_device::verify(&program) {
            panic!("{}: {e}\n{:#?}\n{program}", case.name, e.notes());
        }
        let env = sizes(&case);
        if let Err(e) = check(&program, &[env], &[1, 3]) {
            panic!("{}: {e}\n{:#?}", case.name, e.notes());
        }
    }
}

#[test]
fn scheduled_attention_computes_what_the_tile_program_says() {
    for case in cases() {
        let kernel = case.spec.program("attention");
        let program = lower(&kernel, &case.schedule).unwrap();
        let env = sizes(&case);
        let mut expected = buffers(&kernel, &env);
        let schedule = Schedule {
            tiles: case.schedule.tiles.clone().into_iter().collect::<BTreeMap<_, _>>(),
            ..Schedule::default()
        };
        tilewright_interp::tile::run(&kernel, &schedule, &env, &mut expected, Mode::Exact).unwrap();
        for order in orders().into_iter().step_by(9) {
            let mut got = buffers(&kernel, &env);
            let options = Options { clusters: 2, order, mode: Mode::Exact, ..Options::default() };
            run(&program, &env, &mut got, &options)
                .unwrap_or_else(|e| panic!("{}: {e}\n{:#?}", case.name, e.notes()));
            for (i, (_, param)) in kernel.params.iter().enumerate() {
                assert!(got[i] == expected[i], "{}: other {} ({order})", case.name, param.name);
            }
        }
    }
}
