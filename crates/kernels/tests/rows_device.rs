//! Row and elementwise kernels after scheduling: the rules, the checker, and values against the tile
//! program's own interpreter.

use std::sync::Arc;
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, run};
use tilewright_kernels::gemm::{GemmSpec, Order};
use tilewright_kernels::map::MapSpec;
use tilewright_kernels::rows::{GemvForm, GemvSpec, RowOp, RowSpec};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_tile::{Access, Kernel, Schedule};

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
    let rows: [(RowOp, DType, bool, Sizes); 12] = [
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
    out
}

/// Bytes for each parameter: numbers of both signs for what is read, a poison for the rest.
fn buffers(kernel: &Kernel, env: &Env) -> Vec<Vec<u8>> {
    let fill = |(p, param): (usize, &tilewright_tile::Param)| {
        let elements = param.layout.alloc_elements().eval(env).unwrap() as usize;
        let mut bytes = vec![0u8; elements * param.dtype.bits() as usize / 8];
        for i in 0..elements {
            let mixed = (i * 2_654_435_761 + p * 97 + i / 7) % 1009;
            let value = if param.access == Access::In { mixed as f64 / 250.0 - 2.0 } else { -99.0 };
            tilewright_data::from_f64(param.dtype, &mut bytes, i, value);
        }
        bytes
    };
    kernel.params.iter().map(|(_, p)| p).enumerate().map(fill).collect()
}

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
