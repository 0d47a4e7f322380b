//! Attention compiles under what the planner picks, keeps its tiles in registers, and its products run
//! asynchronously. Without NVRTC the tests are skipped, unless it is required (`common`).

mod common;

use tilewright_base::DType;
use tilewright_emit_cuda::Source;
use tilewright_kernels::attention::{Mask, MaskKind, Problem, Strides, plan};
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

fn problems() -> Vec<(String, Problem)> {
    let mut out = Vec::new();
    for dtype in [DType::BF16, DType::F16] {
        for depth in [32, 64, 80, 96, 128, 256] {
            for causal in [None, Some(0)] {
                let mut p = Problem::dense(2, 4, 1024, depth, dtype);
                p.causal = causal;
                p.lse = causal.is_some();
                out.push((format!("{dtype} depth {depth} causal {causal:?}"), p));
            }
        }
    }
    for kind in [MaskKind::Add, MaskKind::Keep] {
        for row in [0, 1024] {
            let mut p = Problem::dense(2, 4, 1024, 128, DType::BF16);
            let dtype = if kind == MaskKind::Add { DType::BF16 } else { DType::Bool };
            let strides = Strides { batch: 1024 * row.max(1), head: 0, row };
            p.mask = Some(Mask { dtype, kind, strides, align: 256 });
            out.push((format!("mask {kind:?} rows {row}"), p));
        }
    }
    out
}

fn gpu() -> Gpu {
    Gpu::h200()
}

/// The first candidates of every problem.
fn sources() -> Vec<(String, Source)> {
    let mut out = Vec::new();
    for (name, problem) in problems() {
        let candidates = plan(&problem, &gpu(), 2).unwrap_or_else(|e| panic!("{name}: {e}"));
        for step in candidates.iter().flat_map(|c| &c.steps) {
            let name = format!("{name} under {}", step.schedule);
            let program = lower(&step.kernel, &step.schedule).unwrap();
            tilewright_device::verify(&program)
                .unwrap_or_else(|e| panic!("{name}: {e}\n{:#?}", e.notes()));
            let source =
                tilewright_emit_cuda::emit(&program).unwrap_or_else(|e| panic!("{name}: {e}"));
            out.push((name, source));
        }
    }
    out
}

#[test]
fn planned_attention_compiles_without_spills_and_without_waiting() {
    let Some(nvrtc) = common::nvrtc() else { return };
    let target = tilewright_cuda::Arch::of_device(9, 0);
    common::compile_without_spills(&nvrtc, target, &sources());
}
