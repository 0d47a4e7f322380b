//! Lowers a graph, runs the plan through the tile interpreter and compares with the graph
//! interpreter.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::sync::Arc;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, GraphBuilder, NodeId, TensorType, ValueId};
use tilewright_interp::Mode;
use tilewright_layout::{Dim, Env};
use tilewright_lower::{Choice, CpuTarget, Layouts, Options, lower_with};
use tilewright_plan::{HostCall, Plan, Step};

/// Runs one node in the interpreter.
pub(crate) fn host(graph: &Graph, id: NodeId) -> HostCall {
    let node = graph.nodes[id].clone();
    let run = move |inputs: &[Tensor], _: &Env| {
        let mut b = GraphBuilder::new("host");
        let values: Vec<ValueId> = inputs
            .iter()
            .map(|t| {
                let shape: Vec<Dim> = t.shape().iter().map(|&d| Dim::from(d)).collect();
                b.input("", TensorType::new(t.dtype(), shape))
            })
            .collect();
        for v in b.node(node.op.clone(), &values)? {
            b.output("y", v);
        }
        tilewright_interp::run(&b.finish(), inputs, Mode::Exact)
    };
    HostCall { name: "node".to_string(), run: Arc::new(run) }
}

/// Numbers that look random and repeat: a small linear congruence.
pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f64 / (1u64 << 24) as f64) * 4.0 - 2.0
        })
        .collect()
}

/// A tensor of such numbers; integers lie in -3..=3.
pub(crate) fn tensor(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let count = shape.iter().product();
    if dtype.is_float() {
        return Tensor::from_f64s(dtype, shape, &numbers(count, seed)).unwrap();
    }
    let values: Vec<i64> = numbers(count, seed).iter().map(|v| (v * 1.7) as i64).collect();
    Tensor::from_i64s(dtype, shape, &values).unwrap()
}

pub(crate) fn dims(shape: &[i64]) -> Vec<Dim> {
    shape.iter().map(|&d| Dim::new(d)).collect()
}

pub(crate) fn f32s(shape: &[i64]) -> TensorType {
    TensorType::new(DType::F32, dims(shape))
}

fn close(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!(a.dtype(), b.dtype(), "{what}");
    assert_eq!(a.shape(), b.shape(), "{what}");
    let tolerance = match a.dtype() {
        DType::F64 => 1e-10,
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
        _ => 0.0,
    };
    for i in 0..a.len() {
        let (x, y) = (a.get_f64(i), b.get_f64(i));
        let same = (x.is_nan() && y.is_nan()) || x == y;
        assert!(
            same || (x - y).abs() <= tolerance * (1.0 + y.abs()),
            "{what}: element {i} is {x}, the oracle says {y}"
        );
    }
}

/// Checks one plan against the oracle.
pub(crate) fn check_with(
    graph: &Graph,
    inputs: &[Tensor],
    layouts: &Layouts,
    target: &CpuTarget,
    options: &Options,
) -> Plan {
    let (plan, fusion) = lower_with(graph, target, layouts, &host, options)
        .unwrap_or_else(|e| panic!("{}: {e}", graph.name));
    let want = tilewright_interp::run(graph, inputs, Mode::F64).unwrap();
    let got = tilewright_interp::plan::run(&plan, inputs, &Env::new(), Mode::Exact)
        .unwrap_or_else(|e| panic!("{} (fusion {:?}): {e}\n{fusion}", graph.name, options.fusion));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let want = match want.dtype() == DType::F64 && got.dtype() != DType::F64 {
            true => Tensor::from_f64s(got.dtype(), want.shape(), &want.to_f64s()).unwrap(),
            false => want.clone(),
        };
        close(got, &want, &format!("{} fusion {:?} output {i}", graph.name, options.fusion));
    }
    plan
}

/// With and without fusion, on both vector widths; gives the fused AVX2 plan.
pub(crate) fn check_layouts(graph: &Graph, inputs: &[Tensor], layouts: &Layouts) -> Plan {
    let apart = Options { fusion: Choice::Apart, ..Options::default() };
    check_with(graph, inputs, layouts, &CpuTarget::avx2(), &apart);
    for seed in 0..4 {
        let any = Options { fusion: Choice::Any(seed), ..Options::default() };
        check_with(graph, inputs, layouts, &CpuTarget::avx2(), &any);
    }
    check_with(graph, inputs, layouts, &CpuTarget::avx512(), &Options::default());
    check_with(graph, inputs, layouts, &CpuTarget::avx2(), &Options::default())
}

pub(crate) fn check(graph: &Graph, inputs: &[Tensor]) -> Plan {
    check_layouts(graph, inputs, &Layouts::new())
}

/// Names of the kernels launched, in order; host steps as `host`.
pub(crate) fn steps(plan: &Plan) -> Vec<String> {
    plan.steps
        .iter()
        .map(|s| match s {
            Step::Launch { kernel, .. } => plan.kernels[*kernel].kernel.name.clone(),
            Step::Library { call, .. } => call.name().to_string(),
            Step::Host { .. } => "host".to_string(),
        })
        .collect()
}
