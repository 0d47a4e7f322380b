//! Attention after scheduling: the rules, the checker under all orders, and values against the tile
//! program's own interpreter.

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, orders, run};
use tilewright_kernels::attention::{AttentionSpec, Causal, MaskKind};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, ProductKind, StoreKind, lower};
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
        zeros: false,
    }
}

fn tiles(consumers: i64, bt: i64) -> GpuSchedule {
    let mut s = GpuSchedule::hopper(&[("BQ", 64 * consumers), ("BT", bt)]);
    s.consumers = consumers as u32;
    s.stages = 2;
    s.raster = 1;
    s
}

fn turns_of_two() -> GpuSchedule {
    GpuSchedule { turns: true, serpentine: true, dependent: true, ..tiles(2, 32) }
}

/// Truth values of their own for each row.
fn keep_rows() -> Option<(MaskKind, DType, bool)> {
    Some((MaskKind::Keep, DType::Bool, true))
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |name, spec, schedule, sizes| out.push(Case { name, spec, schedule, sizes });
    let bf16 = spec(DType::BF16, 32);
    add("plain", bf16.clone(), tiles(1, 32), [1, 2, 70, 100]);
    let turns = turns_of_two();
    add("two in turns", bf16.clone(), turns.clone(), [1, 1, 200, 96]);
    add("one block of keys", bf16.clone(), turns.clone(), [1, 1, 130, 1]);
    let causal = AttentionSpec { causal: Causal::EndTogether, lse: true, ..bf16.clone() };
    add("causal", causal.clone(), turns.clone(), [1, 1, 150, 150]);
    add("causal after a cache", causal.clone(), turns.clone(), [1, 2, 130, 197]);
    let zeros = AttentionSpec { mask: keep_rows(), zeros: true, ..causal.clone() };
    add("rows that see nothing are 0", zeros, turns_of_two(), [1, 1, 150, 90]);
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
    pipelined_cases(&mut add);
    out
}

/// Without the copy engine: `mma.sync` and plain multiply-adds.
fn pipelined_cases(add: &mut dyn FnMut(&'static str, AttentionSpec, GpuSchedule, [i64; 4])) {
    let pipelined = |arch, product, (bq, bt), vector| {
        let plain = GpuSchedule::pipelined(arch, product, (2, 1), &[("BQ", bq), ("BT", bt)]);
        GpuSchedule { vector, stages: 2, raster: 1, ..plain }
    };
    let mma = pipelined(Arch::Sm80, ProductKind::MmaSync, (32, 32), 8);
    let bf16 = AttentionSpec { lse: true, ..spec(DType::BF16, 32) };
    add("mma", bf16.clone(), mma.clone(), [1, 2, 50, 70]);
    let causal = AttentionSpec { causal: Causal::EndTogether, ..bf16 };
    let three = GpuSchedule { stages: 3, vector: 1, persistent: true, ..mma.clone() };
    add("mma causal", causal, three, [1, 1, 70, 75]);
    let odd = spec(DType::F16, 21);
    add("mma odd depth", odd, GpuSchedule { vector: 1, ..mma }, [1, 1, 33, 40]);
    let f32s = spec(DType::F32, 32);
    let fma = pipelined(Arch::Sm80, ProductKind::Fma, (32, 32), 4);
    add("fma", f32s.clone(), fma.clone(), [1, 2, 40, 50]);
    let mask = Some((MaskKind::Add, DType::F32, true));
    let masked = AttentionSpec { mask, causal: Causal::EndTogether, ..f32s.clone() };
    add("fma mask", masked, GpuSchedule { vector: 1, ..fma }, [1, 2, 40, 50]);
    let fma = pipelined(Arch::Sm80, ProductKind::Fma, (32, 32), 1);
    let none = AttentionSpec { lse: true, ..f32s.clone() };
    add("no keys", none, fma, [1, 1, 40, 0]);
    let tf32 = AttentionSpec { tf32: true, ..f32s.clone() };
    let mma = pipelined(Arch::Sm80, ProductKind::MmaSync, (32, 32), 4);
    add("mma tf32", tf32, mma, [1, 1, 40, 50]);
    let split = pipelined(Arch::Sm80, ProductKind::MmaSplit, (64, 32), 4);
    let causal = AttentionSpec { causal: Causal::EndTogether, lse: true, ..f32s.clone() };
    add("three products for one, causal", causal, split.clone(), [1, 2, 70, 75]);
    let odd = AttentionSpec { mask: keep_rows(), zeros: true, ..spec(DType::F32, 21) };
    add("three products for one, mask", odd, GpuSchedule { vector: 1, ..split }, [1, 1, 40, 50]);
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
        let line = (keys + 7) / 8 * 8;
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
            let elements = param.layout.alloc_elements().eval(env).unwrap().max(0) as usize;
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
        // In exact mode the device interpreter cuts sums as tensor cores do, which the tile program does not know.
        let plain = case.schedule.product == ProductKind::Fma;
        let mode = if plain { Mode::Exact } else { Mode::F64 };
        tilewright_interp::tile::run(&kernel, &schedule, &env, &mut expected, mode).unwrap();
        for order in orders().into_iter().step_by(9) {
            let mut got = buffers(&kernel, &env);
            let options = Options { clusters: 2, order, mode, ..Options::default() };
            run(&program, &env, &mut got, &options)
                .unwrap_or_else(|e| panic!("{}: {e}\n{:#?}", case.name, e.notes()));
            for (i, (_, param)) in kernel.params.iter().enumerate() {
                assert!(got[i] == expected[i], "{}: other {} ({order})", case.name, param.name);
            }
        }
    }
}

/// Three products of TF32 parts are about as exact as f32, where rounded operands are not.
#[test]
fn two_parts_of_each_operand_are_as_exact_as_f32() {
    let error = |tf32: bool, product: ProductKind| {
        let spec = AttentionSpec { tf32, ..spec(DType::F32, 32) };
        let schedule =
            GpuSchedule::pipelined(Arch::Sm80, product, (2, 1), &[("BQ", 32), ("BT", 32)]);
        let schedule = GpuSchedule { stages: 2, raster: 1, ..schedule };
        let case = Case { name: "", spec, schedule, sizes: [1, 1, 40, 100] };
        let (kernel, env) = (case.spec.program("attention"), sizes(&case));
        let program = lower(&kernel, &case.schedule).unwrap();
        let result = |mode: Mode| {
            let mut all = buffers(&kernel, &env);
            for (p, bytes) in all.iter_mut().enumerate() {
                for i in 0..bytes.len() / 4 {
                    let x = ((i * 37 + p * 11) as f64 * 0.7311).sin() * 2.0;
                    tilewright_data::from_f64(DType::F32, bytes, i, x);
                }
            }
            run(&program, &env, &mut all, &Options { mode, ..Options::default() }).unwrap();
            let o = kernel.params.iter().position(|(_, p)| &*p.name == "O").unwrap();
            (0..40 * 32)
                .map(|i| tilewright_data::read_f64(DType::F32, &all[o], i))
                .collect::<Vec<_>>()
        };
        // In the other mode nothing is rounded but what the program rounds, which `two_parts` has none of.
        let exact = result(Mode::F64);
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let off = result(Mode::Exact);
        norm(&mut off.iter().zip(&exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied())
    };
    let split = error(false, ProductKind::MmaSplit);
    assert!(split < 2e-6, "{split}");
    // The same sums with single products of what tensor cores see.
    assert!(error(true, ProductKind::MmaSync) > 20.0 * split);
}

/// NaN and infinities reach the rows that see them, and no others: the same as in the tile program.
#[test]
fn special_values_stay_in_their_rows() {
    let specials = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    for case in
        cases().into_iter().filter(|c| ["causal", "mma causal", "fma mask"].contains(&c.name))
    {
        let kernel = case.spec.program("attention");
        let program = lower(&kernel, &case.schedule).unwrap();
        let env = sizes(&case);
        let schedule = Schedule {
            tiles: case.schedule.tiles.clone().into_iter().collect::<BTreeMap<_, _>>(),
            ..Schedule::default()
        };
        let filled = |special: f64| {
            let mut all = buffers(&kernel, &env);
            for (param, at) in [("Q", 35), ("K", 32 * 30 + 3)] {
                let id = kernel.params.iter().position(|(_, p)| &*p.name == param).unwrap();
                tilewright_data::from_f64(case.spec.dtype, &mut all[id], at, special);
            }
            all
        };
        let mut seen = [0, 0];
        for special in specials {
            let (mut want, mut got) = (filled(special), filled(special));
            tilewright_interp::tile::run(&kernel, &schedule, &env, &mut want, Mode::F64).unwrap();
            let options = Options { mode: Mode::F64, ..Options::default() };
            run(&program, &env, &mut got, &options).unwrap();
            let id = kernel.params.iter().position(|(_, p)| &*p.name == "O").unwrap();
            let dtype = case.spec.result;
            for i in 0..want[id].len() * 8 / dtype.bits() as usize {
                let read = |b: &[u8]| tilewright_data::read_f64(dtype, b, i);
                let (have, want) = (read(&got[id]), read(&want[id]));
                let same = have == want || (have.is_nan() && want.is_nan());
                assert!(same, "{} with {special}: O[{i}] is {have}, not {want}", case.name);
                seen[usize::from(want.is_nan())] += 1;
            }
        }
        // Some rows are hit, most are not.
        assert!(seen[1] > 0 && seen[0] > seen[1], "{}: {seen:?}", case.name);
    }
}

/// Keys in three parts, of which the last is short (or hidden), and what adds them up, both as device programs.
#[test]
fn parts_add_up() {
    for causal in [Causal::No, Causal::EndTogether] {
        let spec = AttentionSpec { causal, lse: true, ..spec(DType::F32, 32) };
        let case = Case {
            name: "parts",
            spec: spec.clone(),
            schedule: GpuSchedule {
                stages: 2,
                raster: 1,
                ..GpuSchedule::pipelined(
                    Arch::Sm80,
                    ProductKind::Fma,
                    (2, 1),
                    &[("BQ", 32), ("BT", 32)],
                )
            },
            sizes: [2, 2, 40, 150],
        };
        let mut env = sizes(&case);
        env.insert(Arc::from("N"), 3);
        env.insert(Arc::from("each"), 2);
        let options = Options { mode: Mode::F64, ..Options::default() };
        let by_name = |kernel: &tilewright_tile::Kernel, name: &str| {
            kernel.params.iter().position(|(_, p)| &*p.name == name).unwrap()
        };

        let whole = spec.program("attention");
        let mut expected = buffers(&whole, &env);
        let schedule = Schedule {
            tiles: case.schedule.tiles.clone().into_iter().collect::<BTreeMap<_, _>>(),
            ..Schedule::default()
        };
        tilewright_interp::tile::run(&whole, &schedule, &env, &mut expected, Mode::F64).unwrap();

        let part = spec.part_program("part");
        tilewright_tile::verify(&part).unwrap();
        let program = lower(&part, &case.schedule).unwrap();
        tilewright_device::verify(&program).unwrap();
        let mut partial = buffers(&part, &env);
        run(&program, &env, &mut partial, &options).unwrap();

        let combine = spec.combine_program("combine");
        tilewright_tile::verify(&combine).unwrap();
        let size = |name: &str| env.get(name).copied();
        let lines = GpuSchedule::lines_for(&combine, Arch::Sm80, &size).unwrap().unwrap();
        let program = lower(&combine, &lines).unwrap();
        tilewright_device::verify(&program).unwrap();
        check(&program, std::slice::from_ref(&env), &[1]).unwrap();
        let mut got = buffers(&combine, &env);
        for name in ["P", "M", "L"] {
            got[by_name(&combine, name)] = partial[by_name(&part, name)].clone();
        }
        run(&program, &env, &mut got, &options).unwrap();
        for name in ["O", "lse"] {
            let (have, want) = (&got[by_name(&combine, name)], &expected[by_name(&whole, name)]);
            for i in 0..want.len() / 4 {
                let read = |b: &[u8]| tilewright_data::read_f64(DType::F32, b, i);
                let (have, want) = (read(have), read(want));
                assert!(
                    (have - want).abs() <= 1e-6 * (1.0 + want.abs()),
                    "{name}[{i}]: {have}, not {want}"
                );
            }
        }
    }
}
