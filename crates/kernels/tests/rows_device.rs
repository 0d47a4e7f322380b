//! Row and elementwise kernels after scheduling: the rules, the checker, and values against the tile
//! program's own interpreter.

use std::sync::Arc;
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, run};
use tilewright_kernels::map::MapSpec;
use tilewright_kernels::rows::{GemvSpec, RowOp, RowSpec};
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
    let gemv: [(u32, Sizes); 3] = [
        (1, &[("N", 9), ("K", 520), ("ldw", 520), ("ldx", 520), ("ldy", 9)]),
        (3, &[("N", 5), ("K", 1001), ("ldw", 1001), ("ldx", 1001), ("ldy", 5)]),
        (1, &[("N", 1), ("K", 20000), ("ldw", 20000), ("ldx", 20000), ("ldy", 1)]),
    ];
    for (vectors, sizes) in gemv {
        let spec = GemvSpec { dtype: DType::F32, vectors };
        add("gemv", sizes, &|size| spec.kernel("gemv", Arch::Sm89, size));
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
