//! Attention compiles under what the planner picks, keeps its tiles in registers, and its products run
//! asynchronously. Without NVRTC the tests are skipped, unless it is required (`common`).

mod common;

use tilewright_base::DType;
use tilewright_emit_cuda::Source;
use tilewright_kernels::attention::{Mask, MaskKind, Problem, Strides, plan};
use tilewright_kernels::gemm::Precision;
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
    // One query, many keys, in parts.
    for (heads, groups) in [(8, 8), (32, 8)] {
        let strides = Strides::heads_first(groups, 8192, 128);
        let p = Problem::dense(1, heads, 1, 128, DType::BF16);
        let p = Problem { kv_heads: groups, kv_len: 8192, k: strides, v: strides, lse: true, ..p };
        out.push((format!("one query of {heads} heads over {groups}"), p));
    }
    out
}

/// What the planner picks first for a device of this capability.
fn sources(problems: &[(String, Problem)], capability: u32, most: usize) -> Vec<(String, Source)> {
    let gpu = Gpu { capability, ..Gpu::h200() };
    let mut out = Vec::new();
    for (name, problem) in problems {
        let candidates = plan(problem, &gpu, most).unwrap_or_else(|e| panic!("{name}: {e}"));
        for step in candidates.iter().flat_map(|c| &c.steps) {
            let name = format!("{name}, {} under {}", step.kernel.name, step.schedule);
            let program = lower(&step.kernel, &step.schedule).unwrap();
            tilewright_device::verify(&program)
                .unwrap_or_else(|e| panic!("{name}: {e}\n{:#?}", e.notes()));
            let source =
                tilewright_emit_cuda::emit(&program).unwrap_or_else(|e| panic!("{name}: {e}"));
            // Problems of different sizes share kernels.
            if !out.iter().any(|(_, s): &(String, Source)| s.text == source.text) {
                out.push((name, source));
            }
        }
    }
    out
}

#[test]
fn planned_attention_compiles_without_spills_and_without_waiting() {
    let Some(nvrtc) = common::nvrtc() else { return };
    let target = tilewright_cuda::Arch::of_device(9, 0);
    common::compile_without_spills(&nvrtc, target, &sources(&problems(), 90, 2));
}

/// Without the copy engine: other architectures, f32, depths whose lines are not whole units of 16 bytes.
#[test]
fn portable_attention_compiles_without_spills() {
    let Some(nvrtc) = common::nvrtc() else { return };
    let mut portable = Vec::new();
    for depth in [32, 64, 128] {
        for causal in [None, Some(0)] {
            let p = Problem::dense(2, 4, 1024, depth, DType::F32);
            portable.push((format!("f32 depth {depth}"), Problem { causal, ..p.clone() }));
            let p = Problem { precision: Precision::Tf32, causal, ..p };
            portable.push((format!("tf32 depth {depth}"), p));
        }
    }
    portable.push(("odd depth".into(), Problem::dense(2, 4, 100, 21, DType::BF16)));
    let hopper = sources(&portable, 90, 1);
    common::compile_without_spills(&nvrtc, tilewright_cuda::Arch::of_device(9, 0), &hopper);
    portable.extend(problems().into_iter().filter(|(_, p)| p.dtype == DType::BF16));
    let ampere = sources(&portable, 80, 1);
    common::compile_without_spills(&nvrtc, tilewright_cuda::Arch::of_device(8, 0), &ampere);
}
