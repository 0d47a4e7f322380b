//! The edges of what is asked of a GPU (`edges.rs`), in the device interpreter: within the contract, nothing on the host, and
//! the user's errors where they belong.

use std::sync::Arc;
use tilewright::edges::{Edge, Expect, all, large};
use tilewright::gpu::{GpuCompiler, GpuPlan};
use tilewright::{Choice, Kind, Precision};
use tilewright_data::Tensor;
use tilewright_target::Gpu;

fn plan(edge: &Edge, precision: Precision) -> GpuPlan {
    let mut compiler = GpuCompiler::new(Gpu::h200());
    compiler.precision = precision;
    let graph = (*edge.graph).clone();
    compiler
        .plan(graph)
        .unwrap_or_else(|e| panic!("{} {precision}: {e} {:?}", edge.name, e.notes()))
}

#[test]
fn edges_are_right_or_refused_in_the_device_interpreter() {
    let edges = all().expect("they can be built");
    let mut planned: Option<(Arc<_>, GpuPlan)> = None;
    let mut wrong = Vec::new();
    for edge in &edges {
        for precision in [Precision::F32, Precision::Bf16] {
            let same = |p: &(Arc<_>, GpuPlan)| Arc::ptr_eq(&p.0, &edge.graph);
            if precision != Precision::F32 || !planned.as_ref().is_some_and(same) {
                planned = Some((edge.graph.clone(), plan(edge, precision)));
            }
            let (_, this) = planned.as_ref().unwrap();
            let name = format!("{} {precision}", edge.name);
            if matches!(edge.expect, Expect::TooLarge(_)) {
                continue;
            }
            match (this.interpret(&edge.inputs), &edge.expect) {
                (Ok(run), Expect::Right) => {
                    let host = run.bound.host_steps(this.plan());
                    if !host.is_empty() {
                        wrong.push(format!("{name}: on the host: {host:?}"));
                    }
                    let report = this.verify_outputs(&edge.graph, &edge.inputs, &run.outputs);
                    for d in report.expect("it verifies").outputs {
                        if d.ratio > 1.0 {
                            wrong.push(format!("{name}: {d:?}"));
                        }
                    }
                }
                (Err(e), Expect::Refused(words)) => {
                    if e.kind() != Kind::User || !e.to_string().contains(words) {
                        wrong.push(format!("{name}: says {e}"));
                    }
                }
                (Ok(_), Expect::Refused(words)) => {
                    wrong.push(format!("{name}: not refused: {words}"))
                }
                (_, Expect::TooLarge(_)) => {}
                (Err(e), Expect::Right) => wrong.push(format!("{name}: {e} {:?}", e.notes())),
            }
            if precision != Precision::F32 {
                planned = None;
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), edges.len(), wrong.join("\n"));
}

/// The graph of more than 2^31 elements, small: nothing of it runs on the host, and unfused it is right.
#[test]
fn the_large_graph_is_right_when_it_is_small() {
    let graph = large(33, 70).expect("it can be built");
    let mut compiler = GpuCompiler::new(Gpu::h200());
    compiler.fusion = Choice::Apart;
    let planned = compiler.plan(graph.clone()).expect("it plans");
    let rows = [Tensor::from_slice(&[3], &[32i64, 0, 17]).unwrap()];
    let run = planned.interpret(&rows).expect("it runs");
    assert!(run.bound.host_steps(planned.plan()).is_empty());
    let report = planned.verify_outputs(&graph, &rows, &run.outputs).expect("it verifies");
    assert!(report.outputs.iter().all(|d| d.ratio <= 1.0), "{report:?}");
}
