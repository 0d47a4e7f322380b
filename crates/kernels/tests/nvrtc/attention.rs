//! Attention under what the planner picks: tiles stay in registers, and products run asynchronously.

use crate::ratchet::{self, Entry};
use tilewright_base::DType;
use tilewright_kernels::attention::{
    BackwardProblem, Mask, MaskKind, Problem, Strides, backward_plan, plan,
};
use tilewright_kernels::gemm::Precision;
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

fn problems() -> Vec<(String, Problem)> {
    let mut out = Vec::new();
    for depth in [64, 80, 128, 256] {
        for causal in [None, Some(0)] {
            let lse = causal.is_some();
            let p = Problem::dense(8, 16, 1024, depth, DType::BF16);
            out.push((
                format!("bf16 depth {depth} causal {causal:?}"),
                Problem { causal, lse, ..p },
            ));
        }
    }
    out.push(("f16 depth 64".into(), Problem::dense(8, 16, 1024, 64, DType::F16)));
    for kind in [MaskKind::Add, MaskKind::Keep] {
        for row in [0, 1024] {
            let dtype = if kind == MaskKind::Add { DType::BF16 } else { DType::Bool };
            let strides = Strides { batch: 1024 * row.max(1), head: 0, row };
            let mask = Some(Mask { dtype, kind, strides, align: 256 });
            let p = Problem::dense(8, 16, 1024, 128, DType::BF16);
            out.push((format!("mask {kind:?}, {row} between rows"), Problem { mask, ..p }));
        }
    }
    // One query, many keys, in parts.
    let strides = Strides::heads_first(8, 8192, 128);
    let p = Problem::dense(1, 32, 1, 128, DType::BF16);
    let p = Problem { kv_heads: 8, kv_len: 8192, k: strides, v: strides, lse: true, ..p };
    out.push(("one query".into(), p));
    out
}

/// Without the copy engine: TF32, and depths whose lines are not whole units of 16 bytes.
fn portable() -> Vec<(String, Problem)> {
    let mut out = Vec::new();
    for depth in [64, 128] {
        for causal in [None, Some(0)] {
            let p = Problem { causal, ..Problem::dense(8, 16, 1024, depth, DType::F32) };
            // Plain multiply-adds need a stack (open points).
            let tf32 = Problem { precision: Precision::Tf32, ..p };
            out.push((format!("tf32 depth {depth} causal {causal:?}"), tf32));
        }
    }
    out.push(("bf16 depth 21".into(), Problem::dense(2, 4, 100, 21, DType::BF16)));
    out
}

/// What the planner picks first for a device of this capability.
fn entries(problems: &[(String, Problem)], capability: u32) -> Vec<Entry> {
    let gpu = Gpu { capability, ..Gpu::h200() };
    let mut out = Vec::new();
    for (name, problem) in problems {
        let mut picked = plan(problem, &gpu, 1).unwrap_or_else(|e| panic!("{name}: {e}"));
        for step in picked.remove(0).steps {
            let program = lower(&step.kernel, &step.schedule).unwrap();
            let schedule = ratchet::schedule_of(&program, &step.schedule);
            out.push(Entry::new(format!("{name}, {}: {schedule}", step.kernel.name), &program));
        }
    }
    out
}

#[test]
fn attention_keeps_to_its_resources() {
    let mut all = entries(&problems(), 90);
    all.extend(entries(&portable(), 90));
    all.extend(entries(&portable(), 80));
    let sixteen: Vec<_> = problems().into_iter().filter(|(n, _)| n.contains("depth")).collect();
    all.extend(entries(&sixteen, 80));
    ratchet::keep_to("attention", &all);
}

/// The gradient: sums of two products, scores and left operands of both in registers at once.
#[test]
fn gradients_keep_to_their_resources() {
    let mut out = Vec::new();
    for (depth, dtype) in [
        (64, DType::BF16),
        (96, DType::BF16),
        (128, DType::BF16),
        (128, DType::F16),
        (256, DType::BF16),
    ] {
        for (causal, kv_heads) in [(None, 16), (Some(0), 16), (Some(0), 4)] {
            let p = Problem::dense(4, 16, 4096, depth, dtype);
            let k = Strides::heads_first(kv_heads, 4096, depth);
            let p = Problem { causal, kv_heads, k, v: k, ..p };
            let name = format!("{dtype} depth {depth} causal {causal:?} heads 16/{kv_heads}");
            let plan = backward_plan(&BackwardProblem::alike(p), &Gpu::h200()).unwrap();
            for step in plan.steps {
                let program = lower(&step.kernel, &step.schedule).unwrap();
                let schedule = ratchet::schedule_of(&program, &step.schedule);
                out.push(Entry::new(format!("{name}, {}: {schedule}", step.kernel.name), &program));
            }
        }
    }
    ratchet::keep_to("attention_backward", &out);
}
