//! Row and elementwise kernels after scheduling: the rules, the checker, and values against the tile
//! program's own interpreter.

use std::sync::Arc;
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, run};
use tilewright_kernels::gemm::{GemmSpec, Order};
use tilewright_kernels::map::{ADAMW_NUMBERS, AdamWSpec, AdamWTableSpec, DropoutSpec, MapSpec};
use tilewright_kernels::reduce::{ClipSpec, Over, ReduceSpec};
use tilewright_kernels::rows::{
    CrossEntropyForm, CrossEntropySpec, CrossEntropyTerms, GemvForm, GemvSpec, NormBackwardSpec,
    RowOp, RowSpec, TopKSpec,
};
use tilewright_layout::{Dim, Env, Layout, Range, Symbol};
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, ReduceKind, Schedule, TopK};

type Sizes = &'static [(&'static str, i64)];
type Lookup<'a> = &'a dyn Fn(&str) -> Option<i64>;
type Built = Result<(Kernel, GpuSchedule)>;

struct Case {
    name: String,
    kernel: Kernel,
    schedule: GpuSchedule,
    env: Env,
}

/// Values of the sizes; distances between rows that are not given are the lines' extents.
fn env(sizes: Sizes) -> Env {
    let mut env = Env::new();
    let n = sizes.iter().find(|(name, _)| *name == "N").map_or(1, |(_, v)| *v);
    for name in ["ldx", "ldy", "ld0", "ld1"] {
        env.insert(Arc::from(name), n);
    }
    for (name, v) in sizes {
        env.insert(Arc::from(*name), *v);
    }
    env
}

fn form(threads: i64, lanes: i64, each: i64, runs: i64, vector: i64) -> GemvForm {
    GemvForm { threads, lanes, each, runs, vector, splits: 1 }
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |name: &str, sizes: Sizes, build: &dyn Fn(Lookup<'_>) -> Built| {
        let env = env(sizes);
        let (kernel, schedule) =
            build(&|s| env.get(s).copied()).unwrap_or_else(|e| panic!("{name}: {e}"));
        out.push(Case { name: format!("{name} {sizes:?}"), kernel, schedule, env });
    };
    let norm = RowOp::LayerNorm { eps: 1e-5 };
    let rms = RowOp::RmsNorm { eps: 1e-6 };
    let rows: [(RowOp, DType, bool, Sizes); 19] = [
        (RowOp::Softmax, DType::F32, false, &[("M", 3), ("N", 1)]),
        (RowOp::Softmax, DType::BF16, false, &[("M", 9), ("N", 33)]),
        (RowOp::Softmax, DType::F16, false, &[("M", 3), ("N", 264), ("ldx", 272)]),
        (RowOp::Softmax, DType::F32, false, &[("M", 2), ("N", 5003)]),
        (RowOp::Softmax, DType::BF16, false, &[("M", 2), ("N", 33001)]),
        (RowOp::LogSoftmax, DType::F32, false, &[("M", 5), ("N", 77)]),
        (RowOp::LogSoftmax, DType::F32, false, &[("M", 1), ("N", 40000)]),
        (norm, DType::F32, false, &[("M", 5), ("N", 100)]),
        (norm, DType::BF16, true, &[("M", 3), ("N", 1032), ("ldx", 1040), ("ldy", 1034)]),
        (norm, DType::F32, true, &[("M", 2), ("N", 33000)]),
        (rms, DType::F16, true, &[("M", 3), ("N", 520)]),
        (rms, DType::F32, false, &[("M", 1), ("N", 33003)]),
        // Tiles that are no power of two, in a warp and in several.
        (norm, DType::BF16, false, &[("M", 5), ("N", 1280)]),
        (norm, DType::F16, true, &[("M", 3), ("N", 2304)]),
        // Rows of which several warps read one element at a time.
        (norm, DType::BF16, false, &[("M", 9), ("N", 1023)]),
        // Rows that begin and end within units of 16 bytes.
        (RowOp::Softmax, DType::BF16, false, &[("M", 9), ("N", 1023)]),
        (norm, DType::BF16, true, &[("M", 9), ("N", 1025)]),
        (norm, DType::F32, false, &[("M", 5), ("N", 1001), ("ldx", 1004), ("ldy", 1004)]),
        (rms, DType::F16, false, &[("M", 3), ("N", 20001), ("ldx", 20003), ("ldy", 20003)]),
    ];
    for (op, dtype, residual, sizes) in rows {
        let spec = RowSpec { op, dtype, residual };
        add(&format!("{spec:?}"), sizes, &|size| spec.kernel("rows", Arch::Sm80, size));
    }
    let maps: [(&str, MapSpec, Sizes); 7] = [
        ("copy", MapSpec::copy(DType::BF16, DType::F32), &[("M", 5), ("N", 72)]),
        (
            "transpose",
            MapSpec { transposed: true, ..MapSpec::copy(DType::F32, DType::F32) },
            &[("M", 9), ("N", 40), ("ld0", 9)],
        ),
        (
            "pad",
            MapSpec::pad(DType::F32, DType::BF16),
            &[("M", 8), ("N", 64), ("P", 7), ("Q", 61), ("ld0", 61)],
        ),
        (
            "cut",
            MapSpec::pad(DType::BF16, DType::BF16),
            &[("M", 5), ("N", 48), ("P", 7), ("Q", 64), ("ld0", 64)],
        ),
        ("bias gelu", MapSpec::bias_gelu(DType::F32), &[("M", 17), ("N", 65)]),
        ("swiglu", MapSpec::swiglu(DType::BF16), &[("M", 1), ("N", 1000)]),
        ("fused", MapSpec::scale_shift_relu_add(DType::F16), &[("M", 13), ("N", 24)]),
    ];
    for (name, spec, sizes) in maps {
        add(name, sizes, &|size| spec.kernel("map", Arch::Sm90a, size));
    }
    let column = Order::Col;
    let gemv: [(i64, Order, GemvForm, Sizes); 7] = [
        (
            1,
            column,
            form(128, 32, 2, 1, 4),
            &[("N", 9), ("K", 520), ("lda", 520), ("ldb", 520), ("ldc", 9)],
        ),
        (
            3,
            column,
            form(64, 64, 4, 2, 1),
            &[("N", 5), ("K", 1001), ("lda", 1001), ("ldb", 1001), ("ldc", 5)],
        ),
        (
            1,
            column,
            form(256, 256, 1, 2, 4),
            &[("N", 1), ("K", 20000), ("lda", 20000), ("ldb", 20000), ("ldc", 1)],
        ),
        (
            8,
            column,
            form(128, 8, 1, 1, 2),
            &[("N", 33), ("K", 70), ("lda", 70), ("ldb", 72), ("ldc", 40)],
        ),
        (
            1,
            Order::Row,
            form(128, 32, 4, 1, 4),
            &[("N", 300), ("K", 77), ("lda", 77), ("ldb", 300), ("ldc", 300)],
        ),
        (
            2,
            Order::Row,
            form(128, 8, 2, 2, 1),
            &[("N", 41), ("K", 130), ("lda", 130), ("ldb", 41), ("ldc", 41)],
        ),
        (
            5,
            Order::Row,
            form(64, 64, 1, 1, 2),
            &[("N", 258), ("K", 9), ("lda", 9), ("ldb", 258), ("ldc", 258)],
        ),
    ];
    for (vectors, b, form, sizes) in gemv {
        let gemm = GemmSpec { b, ..GemmSpec::plain(DType::F32, DType::F32, DType::F32) };
        let spec = GemvSpec { gemm, vectors };
        add("gemv", sizes, &|_| {
            Ok((spec.program("gemv", false), spec.schedule(Arch::Sm89, &form)))
        });
    }
    let entropy: [(DType, Sizes); 6] = [
        (DType::F32, &[("M", 5), ("N", 7)]),
        (DType::BF16, &[("M", 3), ("N", 1000), ("ldx", 1008)]),
        (DType::BF16, &[("M", 2), ("N", 20000)]),
        (DType::F16, &[("M", 2), ("N", 40000)]),
        (DType::BF16, &[("M", 9), ("N", 1003)]),
        (DType::F32, &[("M", 3), ("N", 9001), ("ldx", 9003)]),
    ];
    for (dtype, sizes) in entropy {
        for form in [CrossEntropyForm::InPlace, CrossEntropyForm::Beside, CrossEntropyForm::Losses]
        {
            for terms in [CrossEntropyTerms::default(), EVERYTHING] {
                let spec = CrossEntropySpec { dtype, form, terms };
                add("cross-entropy", sizes, &|size| spec.kernel("entropy", Arch::Sm90a, size));
            }
        }
    }
    let steps: [(AdamWSpec, Sizes); 2] = [
        (AdamWSpec { gradient: DType::F32, copy: None }, &[("N", 5003)]),
        (AdamWSpec { gradient: DType::BF16, copy: Some(DType::BF16) }, &[("N", 40000)]),
    ];
    for (spec, sizes) in steps {
        add("adamw", sizes, &|size| spec.kernel("adamw", Arch::Sm80, size));
    }
    let table: Sizes = &[("R", 7), ("B", 264), ("K", 3)];
    add("adamw of a table", table, &|size| {
        let one = AdamWSpec { gradient: DType::BF16, copy: Some(DType::BF16) };
        AdamWTableSpec { one }.kernel("adamw", Arch::Sm90a, size)
    });
    let clip = ClipSpec { dtype: DType::BF16, most: 1.0 };
    let many: Sizes = &[("N", 70001), ("P", 5), ("C", 2)];
    add("parts of a norm", many, &|size| Ok(clip.plan(Arch::Sm90a, size)?.parts));
    add("norm and factor", many, &|size| {
        Ok(clip.plan(Arch::Sm90a, size)?.finish.expect("two steps"))
    });
    let gradients: [(RowOp, DType, Sizes); 4] = [
        (norm, DType::F32, &[("M", 11), ("N", 100), ("ld", 104), ("P", 2), ("C", 3)]),
        (norm, DType::BF16, &[("M", 9), ("N", 1032), ("ld", 1032), ("P", 2), ("C", 5)]),
        (rms, DType::F16, &[("M", 5), ("N", 77), ("ld", 77), ("P", 1), ("C", 1)]),
        (rms, DType::BF16, &[("M", 7), ("N", 4096), ("ld", 4096), ("P", 3), ("C", 3)]),
    ];
    for (op, dtype, sizes) in gradients {
        add("sums of a gradient of a norm", sizes, &|size| {
            Ok(NormBackwardSpec { op, dtype, added: false }.plan(Arch::Sm90a, size)?.finish)
        });
        for (ahead, added) in [(0, false), (3, false), (3, true)] {
            let spec = NormBackwardSpec { op, dtype, added };
            add("gradient of a norm", sizes, &|size| {
                let (kernel, mut schedule) = spec.plan(Arch::Sm90a, size)?.parts;
                // Rows that fit the sizes of parts above.
                let lines = schedule.lines.threads / schedule.lines.lanes;
                schedule.tiles.insert("BM".into(), i64::from(lines));
                schedule.lines.fetched = ahead;
                Ok((kernel, schedule))
            });
        }
    }
    // Long rows whose pieces stay in shared memory: all of them, or as many as fit.
    for kept in [1, 2, 5] {
        for (op, residual) in [(RowOp::Softmax, false), (norm, true)] {
            add("kept pieces", &[("M", 2), ("N", 4000), ("ldx", 4008)], &|size| {
                let kernel = RowSpec { op, dtype: DType::BF16, residual }.program("rows", false);
                let mut schedule =
                    GpuSchedule::lines_for(&kernel, Arch::Sm90a, size)?.expect("fits");
                schedule.tiles.insert("BM".into(), 1);
                schedule.tiles.insert("BN".into(), 2048);
                schedule.cluster = 2;
                schedule.lines.threads = 64;
                schedule.lines.lanes = 64;
                schedule.lines.kept = kept;
                Ok((kernel, schedule))
            });
        }
    }
    add("kept logits", &[("M", 2), ("N", 20001)], &|size| {
        let kernel = CrossEntropySpec::plain(DType::F16, CrossEntropyForm::InPlace)
            .program("entropy", false);
        Ok((kernel.clone(), GpuSchedule::lines_kept(&kernel, Arch::Sm90a, size)?.expect("long")))
    });
    // By a warp, by a block.
    let rows: [Sizes; 2] = [&[("M", 5), ("N", 77)], &[("M", 2), ("N", 2500)]];
    for (dtype, largest) in [(DType::BF16, true), (DType::F32, false)] {
        for sizes in rows {
            add("top k", sizes, &|size| {
                let (kernel, schedule) =
                    TopKSpec { dtype, count: 5, largest }.kernel("top_k", Arch::Sm90a, size)?;
                // One step, not a pass for each element.
                assert!(TopK::of(&kernel).is_some(), "{kernel}");
                Ok((kernel, schedule))
            });
        }
    }
    add("dropout", &[("N", 5003), ("O", 7)], &|size| {
        let spec = DropoutSpec { dtype: DType::F16, residual: true, drop: 0.25, seed: 99 };
        spec.kernel("dropout", Arch::Sm90a, size)
    });
    let additions: [Sizes; 2] = [&[("M", 300), ("N", 77)], &[("M", 5), ("N", 264)]];
    for sizes in additions {
        add("additions", sizes, &|size| {
            let kernel = sums_by_additions();
            // Tiles of a few rows, so that blocks meet.
            let mut schedule = GpuSchedule::lines_for(&kernel, Arch::Sm90a, size)?.expect("fits");
            schedule.cluster = 1;
            let lines = i64::from(schedule.lines.threads / schedule.lines.lanes);
            schedule.tiles.insert("BM".into(), lines);
            Ok((kernel, schedule))
        });
    }
    let sums: [(Over, Sizes); 4] = [
        (Over::All, &[("N", 70001), ("P", 5), ("C", 2)]),
        (Over::All, &[("N", 9), ("P", 1), ("C", 1)]),
        (Over::Rows, &[("M", 300), ("N", 77), ("P", 3), ("C", 2)]),
        (Over::Rows, &[("M", 33), ("N", 264), ("P", 1), ("C", 1)]),
    ];
    for (over, sizes) in sums {
        let spec = ReduceSpec::sum(over, DType::BF16);
        add("parts", sizes, &|size| {
            let kernel = spec.parts("parts");
            let schedule = GpuSchedule::lines_for(&kernel, Arch::Sm90a, size)?;
            Ok((kernel, schedule.expect("pieces fit")))
        });
        add("finish", sizes, &|size| {
            let kernel = spec.finish("finish");
            let schedule = GpuSchedule::lines_for(&kernel, Arch::Sm90a, size)?;
            Ok((kernel, schedule.expect("pieces fit")))
        });
    }
    out
}

/// Adds each block's sums of columns to what is there.
fn sums_by_additions() -> Kernel {
    let mut k = KernelBuilder::new("additions");
    for name in ["M", "N"] {
        k.symbol(Symbol { name: name.into(), range: Range { min: 1, max: 1 << 30 } });
    }
    let (bm, bn) = (k.tile("BM"), k.tile("BN"));
    let (m, n) = (Dim::sym("M"), Dim::sym("N"));
    let x = k.param("X", DType::F32, Layout::row_major(&[m.clone(), n.clone()]), Access::In);
    let y = k.param("Y", DType::F32, Layout::row_major(std::slice::from_ref(&n)), Access::InOut);
    let pm = k.grid("pm", m.ceil_div(&bm));
    let pn = k.grid("pn", n.ceil_div(&bn));
    let at = vec![pm * &bm, pn * &bn];
    let tile = k.load(x, at.clone(), vec![bm, bn]);
    let sum = k.reduce(ReduceKind::Sum, tile, 0, None);
    k.atomic_add(y, vec![at[1].clone()], sum);
    k.finish()
}

/// Bytes for each parameter: numbers of both signs for what is read, a poison for the rest.
fn buffers(kernel: &Kernel, env: &Env) -> Vec<Vec<u8>> {
    let fill = |(p, param): (usize, &tilewright_tile::Param)| {
        let elements = param.layout.alloc_elements().eval(env).unwrap() as usize;
        let mut bytes = vec![0u8; elements * param.dtype.bits() as usize / 8];
        for i in 0..elements {
            let mixed = (i * 2_654_435_761 + p * 97 + i / 7) % 1009;
            let read = param.access != Access::Out;
            let value = match &*param.name {
                // Targets and squares.
                "T" if param.dtype == DType::I32 => (mixed % 3) as f64,
                "T" => (mixed % 9) as f64 - 1.0,
                "V" | "H" | "P" | "PARTS" => mixed as f64 / 1009.0,
                _ if read => mixed as f64 / 250.0 - 2.0,
                _ => -99.0,
            };
            match param.dtype.is_float() {
                true => tilewright_data::from_f64(param.dtype, &mut bytes, i, value),
                false => tilewright_data::from_i64(param.dtype, &mut bytes, i, value as i64),
            }
        }
        bytes
    };
    kernel.params.iter().map(|(_, p)| p).enumerate().map(fill).collect()
}

/// Terms of a cross-entropy that are all there.
const EVERYTHING: CrossEntropyTerms = CrossEntropyTerms { smoothing: 0.1, z: 1e-2, cap: 3.0 };

#[test]
fn scheduled_rows_keep_the_rules() {
    for case in cases() {
        let program =
            lower(&case.kernel, &case.schedule).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        if let Err(e) = tilewright_device::verify(&program) {
            panic!("{}: {e}\n{:#?}\n{program}", case.name, e.notes());
        }
        if let Err(e) = check(&program, &[case.env], &[1]) {
            panic!("{}: {e}\n{:#?}", case.name, e.notes());
        }
    }
}

#[test]
fn scheduled_rows_compute_what_the_tile_program_says() {
    for case in cases() {
        let program = lower(&case.kernel, &case.schedule).unwrap();
        let mut expected = buffers(&case.kernel, &case.env);
        let schedule = Schedule { tiles: case.schedule.tiles.clone(), ..Schedule::default() };
        tilewright_interp::tile::run(&case.kernel, &schedule, &case.env, &mut expected, Mode::F64)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let mut got = buffers(&case.kernel, &case.env);
        run(&program, &case.env, &mut got, &Options::default())
            .unwrap_or_else(|e| panic!("{}: {e}", case.name));
        for (p, (_, param)) in case.kernel.params.iter().enumerate() {
            // Sums in f64 differ by their order only, which at most turns one rounding.
            let step = match param.dtype {
                DType::F32 => 2f64.powi(-23),
                DType::F16 => 2f64.powi(-10),
                _ => 2f64.powi(-7),
            };
            for i in 0..got[p].len() * 8 / param.dtype.bits() as usize {
                let a = tilewright_data::read_f64(param.dtype, &got[p], i);
                let b = tilewright_data::read_f64(param.dtype, &expected[p], i);
                let near = (a - b).abs() <= step * b.abs() + 1e-12;
                assert!(near, "{}: {} at {i} is {a}, not {b}", case.name, param.name);
            }
        }
    }
}

/// A row that is written over after one of its elements was read by all its threads.
fn read_before_written(meets: bool) -> Kernel {
    let mut k = KernelBuilder::new("rows");
    for name in ["M", "N"] {
        k.symbol(Symbol { name: name.into(), range: Range { min: 1, max: 1 << 30 } });
    }
    let (bn, one) = (k.tile("BN"), Dim::new(1));
    let (m, n) = (Dim::sym("M"), Dim::sym("N"));
    let x = k.param("X", DType::F32, Layout::row_major(&[m.clone(), n]), Access::InOut);
    let t = k.param("T", DType::I32, Layout::row_major(std::slice::from_ref(&m)), Access::In);
    let row = k.grid("row", m);
    let target = k.load(t, vec![row.clone()], vec![one.clone()]);
    let at = vec![row, Dim::new(0)];
    let picked = k.gather(x, 1, target, at.clone(), vec![one.clone(), one.clone()]);
    let mut picked = k.reshape(picked, vec![one.clone()]);
    let tile = k.load(x, at.clone(), vec![one.clone(), bn.clone()]);
    let add = || Func::binary(Op::Add, DType::F32);
    if meets {
        let sum = k.reduce(ReduceKind::Sum, tile, 1, None);
        let args = vec![k.plain(picked), k.plain(sum)];
        picked = k.map(add(), args, vec![one.clone()]);
    }
    let args = vec![k.plain(tile), Operand { tile: picked, along: vec![0] }];
    let tile = k.map(add(), args, vec![one, bn]);
    k.store(x, at, tile);
    k.finish()
}

#[test]
fn threads_of_a_row_meet_where_warps_reduce_it() {
    let sizes = env(&[("M", 2), ("N", 256)]);
    for (meets, lanes, right) in [(true, 64, true), (true, 32, false), (false, 64, false)] {
        let kernel = read_before_written(meets);
        let mut schedule = GpuSchedule::lines_for(&kernel, Arch::Sm90a, &|s| sizes.get(s).copied())
            .unwrap()
            .expect("fits");
        schedule.tiles.insert("BN".into(), 256);
        (schedule.lines.threads, schedule.lines.lanes) = (lanes, lanes);
        let program = lower(&kernel, &schedule).unwrap();
        let ran = run(&program, &sizes, &mut buffers(&kernel, &sizes), &Options::default());
        assert_eq!(ran.is_ok(), right, "{lanes} lanes, {meets}: {ran:?}");
    }
}

#[test]
fn sums_of_products_are_multiply_adds() {
    let sizes = env(&[("M", 4096), ("N", 4096)]);
    let size = |name: &str| sizes.get(name).copied();
    let text = |op: RowOp| {
        let spec = RowSpec { op, dtype: DType::BF16, residual: false };
        let (kernel, schedule) = spec.kernel("rows", Arch::Sm90a, &size).unwrap();
        tilewright_emit_cuda::emit(&lower(&kernel, &schedule).unwrap()).unwrap().text
    };
    assert!(text(RowOp::RmsNorm { eps: 1e-6 }).contains("tw::fold_products<"));
    assert!(text(RowOp::LayerNorm { eps: 1e-6 }).contains("tw::fold_products<"));
    assert!(!text(RowOp::Softmax).contains("tw::fold_products<"));
}

/// Rows that leave the second-level cache go last there, and those of bf16 wait for other warps as they lie in memory.
#[test]
fn long_tensors_go_last_and_wait_in_pairs() {
    let printed = |dtype, m: i64, n: i64| {
        let size = |name: &str| Some(if name == "M" { m } else { n });
        let spec = RowSpec { op: RowOp::RmsNorm { eps: 1e-6 }, dtype, residual: true };
        let (kernel, schedule) = spec.kernel("rows", Arch::Sm90a, &size).unwrap();
        let text = tilewright_emit_cuda::emit(&lower(&kernel, &schedule).unwrap()).unwrap().text;
        ["tw::load_last_if<", "tw::unpack_again("].map(|name| text.contains(name))
    };
    assert_eq!(printed(DType::BF16, 16384, 4096), [true, true]);
    assert_eq!(printed(DType::BF16, 256, 4096), [false, true]);
    assert_eq!(printed(DType::F32, 16384, 4096), [true, false]);
    // A warp a row meets no other.
    assert_eq!(printed(DType::BF16, 1 << 20, 128), [true, false]);
}

/// Rows that fill no tile of a power of two have one that fits, and a length that is a number where elements come one by one.
#[test]
fn tiles_are_hardly_longer_than_rows() {
    let picked = |op, dtype, n: i64| {
        let size = |name: &str| match name {
            "M" => Some(16384),
            _ => Some(n),
        };
        let spec = RowSpec { op, dtype, residual: false };
        let (_, schedule) = spec.kernel("rows", Arch::Sm90a, &size).unwrap();
        let numbers = schedule.sizes.contains_key("N");
        (schedule.tiles["BN"], schedule.lines.lanes, schedule.blocks_per_sm, numbers)
    };
    let (norm, rms) = (RowOp::LayerNorm { eps: 1e-5 }, RowOp::RmsNorm { eps: 1e-6 });
    assert_eq!(picked(norm, DType::BF16, 1280), (1280, 32, 10, true));
    assert_eq!(picked(norm, DType::BF16, 1536), (1536, 64, 14, true));
    assert_eq!(picked(norm, DType::BF16, 2304), (2560, 64, 11, false));
    assert_eq!(picked(norm, DType::BF16, 1023), (1024, 64, 16, true));
    // Nothing lies behind the row; a single vector; wide elements.
    assert_eq!(picked(norm, DType::BF16, 2048), (2048, 128, 10, true));
    assert_eq!(picked(rms, DType::BF16, 1280), (2048, 128, 12, false));
    assert_eq!(picked(norm, DType::F32, 1023), (1024, 64, 3, false));
}

/// One element at a time, from the formulas in the specifications' documentation.
#[test]
fn cross_entropy_and_adamw_are_what_their_formulas_say() {
    let run_tile = |kernel: &Kernel, schedule: &GpuSchedule, env: &Env, bytes: &mut [Vec<u8>]| {
        let tiles = Schedule { tiles: schedule.tiles.clone(), ..Schedule::default() };
        tilewright_interp::tile::run(kernel, &tiles, env, bytes, Mode::F64).unwrap();
    };
    let doubles = |bytes: &[u8]| -> Vec<f64> {
        (0..bytes.len() / 4).map(|i| tilewright_data::read_f64(DType::F32, bytes, i)).collect()
    };
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs() + 1e-6;

    // The second kernels read the target's logit by itself.
    let (few, many) =
        ((5, 7, env(&[("M", 5), ("N", 7)])), (9, 1030, env(&[("M", 9), ("N", 1030)])));
    let forms = [CrossEntropyForm::InPlace, CrossEntropyForm::Beside, CrossEntropyForm::Losses];
    let whole = forms.map(|form| (form, CrossEntropyTerms::default(), true));
    let everything = forms.map(|form| [(form, EVERYTHING, true), (form, EVERYTHING, false)]);
    let each = whole.into_iter().chain(everything.concat());
    let each = each.map(|case| (case, &few)).chain(whole.map(|case| (case, &many)));
    for ((form, terms, whole), (m, n, env)) in each {
        let (m, n) = (*m, *n);
        let spec = CrossEntropySpec { dtype: DType::F32, form, terms };
        let (mut kernel, mut schedule) =
            spec.kernel("entropy", Arch::Sm90a, &|s| env.get(s).copied()).unwrap();
        assert_eq!(kernel.tiles.iter().any(|t| &**t == "BM"), n == 7);
        if !whole {
            // Three pieces, the last one not full.
            kernel = spec.program("entropy", false);
            schedule.tiles.insert("BN".into(), 3);
        }
        let before = buffers(&kernel, env);
        let mut after = before.clone();
        run_tile(&kernel, &schedule, env, &mut after);
        let named = |list: &[Vec<u8>], name: &str| {
            let at = kernel.params.iter().position(|(_, p)| &*p.name == name);
            at.map(|at| doubles(&list[at]))
        };
        let (x, s) = (doubles(&before[0]), named(&before, "S").unwrap_or_default());
        let loss = named(&after, "L").unwrap();
        let gradient = match form {
            CrossEntropyForm::InPlace => named(&after, "X"),
            _ => named(&after, "G"),
        };
        let logs = named(&after, "Z");
        let losses_only = form == CrossEntropyForm::Losses;
        assert_eq!((gradient.is_none(), logs.is_some()), (losses_only, losses_only));
        let mut ignored = 0;
        for i in 0..m {
            let t = tilewright_data::read_i64(DType::I64, &before[1], i);
            let CrossEntropyTerms { smoothing, z, cap } = terms;
            let bounded = |v: &f64| if cap > 0.0 { cap * (v / cap).tanh() } else { *v };
            let row: Vec<f64> = x[i * n..(i + 1) * n].iter().map(bounded).collect();
            let sum: f64 = row.iter().map(|v| v.exp()).sum();
            let (log, mean) = (sum.ln(), row.iter().sum::<f64>() / n as f64);
            let counts = (0..n as i64).contains(&t);
            ignored += usize::from(!counts);
            let picked = if counts { row[t as usize] } else { 0.0 };
            let want = log - (1.0 - smoothing) * picked - smoothing * mean + z * log * log;
            let want = if counts { want } else { 0.0 };
            assert!(near(loss[i], want), "{form:?}: loss {i} is {}, not {want}", loss[i]);
            if let Some(logs) = &logs {
                assert!(near(logs[i], sum.ln()), "{form:?}: the logarithm of row {i}");
            }
            let Some(gradient) = &gradient else { continue };
            let s = if form == CrossEntropyForm::InPlace { s[0] } else { s[i] };
            for j in 0..n {
                let hit = if j as i64 == t { 1.0 } else { 0.0 };
                let slope = if cap > 0.0 { 1.0 - (row[j] / cap).powi(2) } else { 1.0 };
                let share = row[j].exp() / sum * (1.0 + 2.0 * z * log);
                let want = share - (1.0 - smoothing) * hit - smoothing / n as f64;
                let want = if counts { want * slope * s } else { 0.0 };
                assert!(near(gradient[i * n + j], want), "{form:?}: gradient {i} {j}");
            }
        }
        assert!(ignored > 0 && ignored < m, "{ignored} rows are ignored");
    }

    let env = Env::from([(Arc::from("N"), 33)]);
    let spec = AdamWSpec { gradient: DType::F32, copy: None };
    let (kernel, schedule) = spec.kernel("adamw", Arch::Sm90a, &|s| env.get(s).copied()).unwrap();
    let before = buffers(&kernel, &env);
    let mut after = before.clone();
    run_tile(&kernel, &schedule, &env, &mut after);
    let [g, h, w, m, v] = [0, 1, 2, 3, 4].map(|p| doubles(&before[p]));
    assert_eq!(h.len(), ADAMW_NUMBERS.len());
    let [rate, beta1, beta2, eps, decay, clip, c1, c2]: [f64; 8] = h.try_into().unwrap();
    for i in 0..33 {
        let g = g[i] * clip;
        let m = beta1 * m[i] + (1.0 - beta1) * g;
        let v = beta2 * v[i] + (1.0 - beta2) * g * g;
        let w = w[i] - rate * (m * c1 / ((v * c2).sqrt() + eps) + decay * w[i]);
        for (p, want) in [(2, w), (3, m), (4, v)] {
            let got = doubles(&after[p])[i];
            assert!(near(got, want), "{p} at {i} is {got}, not {want}");
        }
    }
}
