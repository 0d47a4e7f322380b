//! Row and elementwise kernels compile for every architecture and keep their tiles in registers.

use crate::ratchet::{self, Entry, schedule_of};
use std::collections::BTreeSet;
use std::sync::Arc;
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_kernels::gemm::{GemmSpec, Order};
use tilewright_kernels::map::{AdamWSpec, AdamWTableSpec, DropoutSpec, MapSpec};
use tilewright_kernels::reduce::ClipSpec;
use tilewright_kernels::rows::{
    CrossEntropyForm, CrossEntropySpec, CrossEntropyTerms, GemvForm, GemvSizes, GemvSpec,
    NormBackwardSpec, RowOp, RowSpec, TopKSpec,
};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_tile::Kernel;

/// Row lengths: short ones, odd ones, the longest that registers hold, and longer ones.
const LENGTHS: [i64; 11] = [1, 33, 128, 777, 1000, 1024, 4096, 8192, 32767, 32768, 262_144];

type Sizes<'a> = &'a dyn Fn(&str) -> Option<i64>;
type Built = (Kernel, GpuSchedule);

fn kernels(arch: Arch) -> Vec<(String, Kernel, GpuSchedule)> {
    let mut out = Vec::new();
    for n in LENGTHS {
        for m in [1, 16384] {
            let mut env = Env::new();
            for (name, v) in [("M", m), ("N", n), ("ldx", n), ("ldy", n), ("ld0", n), ("ld1", n)] {
                env.insert(Arc::from(name), v);
            }
            let mut add = |name: String, built: Result<(Kernel, GpuSchedule)>| {
                let (kernel, schedule) = built.unwrap_or_else(|e| panic!("{name}: {e}"));
                out.push((format!("{name} of {m} x {n}"), kernel, schedule));
            };
            let size = |name: &str| env.get(name).copied();
            let norm = RowOp::LayerNorm { eps: 1e-5 };
            let rms = RowOp::RmsNorm { eps: 1e-6 };
            for (op, dtype, residual) in [
                (RowOp::Softmax, DType::F32, false),
                (RowOp::Softmax, DType::BF16, false),
                (RowOp::LogSoftmax, DType::F16, false),
                (norm, DType::BF16, false),
                (norm, DType::F32, true),
                (rms, DType::BF16, true),
            ] {
                let spec = RowSpec { op, dtype, residual };
                add(format!("{spec:?}"), spec.kernel("rows", arch, &size));
            }
            for spec in [
                MapSpec::bias_gelu(DType::BF16),
                MapSpec::swiglu(DType::F16),
                MapSpec::scale_shift_relu_add(DType::F32),
                MapSpec::copy(DType::F32, DType::BF16),
            ] {
                add(format!("map {}", spec.func), spec.kernel("map", arch, &size));
            }
            // The first choices for few and for many vectors, in both orders.
            let gpu = tilewright_target::Gpu::h200();
            for (operand, result) in [
                (DType::BF16, DType::BF16),
                (DType::F32, DType::F32),
                (DType::I8, DType::I32),
                (DType::F8E4M3, DType::BF16),
            ] {
                let sum = if operand == DType::I8 { DType::I32 } else { DType::F32 };
                if operand == DType::F8E4M3 && arch < Arch::Sm89 {
                    continue;
                }
                for (b, vectors) in
                    [Order::Col, Order::Row].into_iter().flat_map(|b| [(b, 1), (b, 3), (b, 8)])
                {
                    let gemm = GemmSpec { b, ..GemmSpec::plain(operand, sum, result) };
                    let spec = GemvSpec { gemm, vectors };
                    let widest = 128 / i64::from(operand.bits());
                    let vector = if n % widest == 0 { widest } else { 1 };
                    let sizes = GemvSizes { n, k: n, batch: 1, vector };
                    let time = |f: &GemvForm| spec.estimate_us(&gpu, &sizes, f);
                    let mut forms = spec.space(&gpu, &sizes);
                    forms.sort_by(|a, b| time(a).total_cmp(&time(b)));
                    for form in &forms[..2] {
                        let kernel = spec.program("gemv", form.splits > 1);
                        let name = format!("{operand} {vectors} {b:?} {form:?}");
                        add(name, Ok((kernel, spec.schedule(arch, form))));
                    }
                }
            }
        }
    }
    training(arch, &mut out);
    out
}

/// What a training step has besides, and a choice of tokens.
fn training(arch: Arch, out: &mut Vec<(String, Kernel, GpuSchedule)>) {
    let mut add = |name: &str,
                   sizes: &[(&str, i64)],
                   build: &dyn Fn(Sizes<'_>) -> Result<Built>| {
        let size =
            |name: &str| sizes.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
        let built = build(&size).unwrap_or_else(|e| panic!("{name}: {e}"));
        out.push((format!("{name} of {sizes:?}"), built.0, built.1));
    };
    let one = AdamWSpec { gradient: DType::BF16, copy: Some(DType::BF16) };
    add("AdamW", &[("N", 1 << 20)], &|size| one.kernel("adamw", arch, size));
    let table = AdamWTableSpec { one };
    let chunks = [("R", 1600), ("B", 65536), ("K", 3)];
    add("AdamW of a table", &chunks, &|size| table.kernel("adamw", arch, size));
    let clip = ClipSpec { dtype: DType::BF16, most: 1.0 };
    add("parts of a norm", &[("N", 1 << 20)], &|size| Ok(clip.plan(arch, size)?.parts));
    let dropout = DropoutSpec { dtype: DType::BF16, residual: true, drop: 0.1, seed: 7 };
    add("dropout", &[("N", 1 << 20), ("O", 0)], &|size| dropout.kernel("dropout", arch, size));
    let top = TopKSpec { dtype: DType::BF16, count: 8, largest: true };
    add("top 8", &[("M", 64), ("N", 8192), ("ldx", 8192)], &|size| top.kernel("top", arch, size));
    for n in [1000, 8192, 32000, 128_256] {
        let sizes = [("M", 4096), ("N", n), ("ldx", n)];
        for (name, form) in [
            ("cross-entropy", CrossEntropyForm::InPlace),
            ("cross-entropy beside", CrossEntropyForm::Beside),
            ("losses", CrossEntropyForm::Losses),
        ] {
            let spec = CrossEntropySpec::plain(DType::BF16, form);
            add(name, &sizes, &|size| spec.kernel("entropy", arch, size));
        }
        let (dtype, form) = (DType::BF16, CrossEntropyForm::Beside);
        let terms = CrossEntropyTerms { smoothing: 0.1, z: 1e-4, cap: 30.0 };
        let spec = CrossEntropySpec { dtype, form, terms };
        add("cross-entropy with everything", &sizes, &|size| spec.kernel("entropy", arch, size));
    }
    for n in [768, 1023, 4096, 8192] {
        let sizes = [("M", 16384), ("N", n), ("ld", n)];
        for op in [RowOp::LayerNorm { eps: 1e-5 }, RowOp::RmsNorm { eps: 1e-6 }] {
            let spec = NormBackwardSpec { op, dtype: DType::BF16, added: false };
            add(&format!("gradient of {op:?}"), &sizes, &|size| Ok(spec.plan(arch, size)?.parts));
        }
    }
}

#[test]
fn rows_keep_to_their_resources() {
    let mut all = Vec::new();
    for arch in [Arch::Sm80, Arch::Sm90a] {
        let mut seen = BTreeSet::new();
        let before = all.len();
        for (name, kernel, schedule) in kernels(arch) {
            let program = lower(&kernel, &schedule).unwrap_or_else(|e| panic!("{name}: {e}"));
            let name = format!("{name}: {}", schedule_of(&program, &schedule));
            let entry = Entry::new(name, &program);
            if seen.insert(entry.source.text.clone()) {
                all.push(entry);
            }
        }
        let count = all.len() - before;
        assert!(count > 100, "{count} different kernels");
    }
    ratchet::keep_to("rows", &all);
}
