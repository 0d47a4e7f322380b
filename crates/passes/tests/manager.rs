//! The manager: every stage has a name and a reason, stages are shown, failures are blamed.

mod common;
use common::*;
use tilewright_base::{DType, Error, Kind, Result};
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, GraphBuilder};
use tilewright_passes::{Group, PIPELINE, Pass, PassContext, run_observed};

fn small() -> Graph {
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[2, 3]);
    let two = b.scalar(DType::F32, 2.0);
    let y = b.binary(ExprOp::Mul, x, two).unwrap();
    b.output("y", y);
    b.finish()
}

#[test]
fn names_are_unique_and_reasons_are_given() {
    let passes: Vec<&Pass> = PIPELINE.iter().flat_map(|g| g.passes).collect();
    for (i, p) in passes.iter().enumerate() {
        assert!(!p.why.is_empty());
        assert!(passes[..i].iter().all(|q| q.name != p.name), "{} twice", p.name);
        assert_eq!(tilewright_passes::find_pass(p.name).unwrap().name, p.name);
    }
}

#[test]
fn every_stage_is_shown_in_order() {
    let mut seen: Vec<&str> = Vec::new();
    let mut graph = small();
    let report = run_observed(&mut graph, &PassContext::default(), PIPELINE, &mut |name, g| {
        assert_eq!(g.outputs.len(), 1);
        if !seen.contains(&name) {
            seen.push(name);
        }
    })
    .unwrap();
    let stages: Vec<&str> = report.stages.iter().map(|s| s.name).collect();
    assert_eq!(seen, stages);
    assert!(report.stages.iter().all(|s| s.rounds >= 1 && s.changes <= s.rounds));
    assert!(report.stages.iter().any(|s| s.changes > 0));
}

fn breaks_types(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    let v = graph.outputs[0].1;
    graph.values[v].ty.dtype = DType::F64;
    Ok(true)
}

fn fails(_: &mut Graph, _: &PassContext) -> Result<bool> {
    Err(Error::user("axis 7 is outside shape [2]"))
}

#[test]
fn a_broken_pass_is_named_and_is_our_bug() {
    for (name, run) in [
        ("breaks-types", breaks_types as fn(&mut Graph, &PassContext) -> Result<bool>),
        ("fails", fails),
    ] {
        let passes: &'static [Pass] = Box::leak(Box::new([Pass { name, why: "a test", run }]));
        let pipeline = [Group { name: "test", until_stable: false, passes }];
        let error = run_observed(&mut small(), &PassContext::default(), &pipeline, &mut |_, _| {})
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Bug);
        assert!(error.to_string().contains(name), "{error}");
    }
}
