//! Steps of the library in plans for a GPU, run without one: attention that keeps its log-sum-exp, its gradient, and the gradient of a
//! layer normalisation, beside the same operators of the reference interpreter.

#[path = "nets/numbers.rs"]
mod numbers;

use numbers::numbers;
use tilewright::gpu::{GpuCompiler, GpuPlan};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, GraphBuilder, HostAttr, HostOp, Op, TensorType, ValueId};
use tilewright_interp::{Mode, run};
use tilewright_layout::Dim;
use tilewright_plan::Step;
use tilewright_target::Gpu;

fn ty(dtype: DType, shape: &[i64]) -> TensorType {
    TensorType::new(dtype, shape.iter().map(|&n| Dim::new(n)).collect::<Vec<Dim>>())
}

fn host(name: &str, attrs: &[(&str, HostAttr)], types: Vec<TensorType>) -> Op {
    let attrs = attrs.iter().map(|(n, v)| (n.to_string(), v.clone())).collect();
    Op::Host(HostOp { name: name.into(), attrs, types })
}

/// The distance of two tensors, relative to the second.
fn distance(found: &Tensor, wanted: &Tensor) -> f64 {
    let (found, wanted) = (found.to_f64s(), wanted.to_f64s());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(&wanted).map(|(a, b)| a - b)) / norm(&mut wanted.iter().copied())
}

/// Runs the device programs, and holds all outputs against the reference. The plan must have this many steps.
fn holds(graph: &Graph, inputs: &[Tensor], steps: usize) {
    let planned: GpuPlan = GpuCompiler::new(Gpu::h200()).plan(graph.clone()).expect("a plan");
    let found = planned.interpret(inputs).unwrap_or_else(|e| panic!("{e} {:?}", e.notes()));
    let wanted = run(graph, inputs, Mode::Exact).expect("the reference");
    for (i, (found, wanted)) in found.outputs.iter().zip(&wanted).enumerate() {
        let off = distance(found, wanted);
        assert!(off < 6e-3, "{} output {i} is off by {off}", graph.name);
    }
    let labels: Vec<&str> = planned.plan().steps.iter().map(|s| s.note().label.as_str()).collect();
    assert_eq!(labels.len(), steps, "{labels:?}");
    assert!(planned.plan().steps.iter().any(|s| matches!(s, Step::Library { .. })));
}

const SCALE: f64 = 0.125;

/// Attention and its gradient over queries `[2, 70, 4, 64]` and two heads of keys.
fn attention(b: &mut GraphBuilder, [q, k, v]: [ValueId; 3], causal: bool, mask: &[ValueId]) {
    let attrs = [("causal", HostAttr::Int(causal.into())), ("scale", HostAttr::Float(SCALE))];
    let [wide, narrow] = [[2, 70, 4, 64], [2, 70, 2, 64]].map(|s| ty(DType::BF16, &s));
    let types = vec![wide.clone(), ty(DType::F32, &[2, 4, 70])];
    let operands = [&[q, k, v], mask].concat();
    let made = b.node(host("attention_lse", &attrs, types), &operands).unwrap();
    let dy = b.input("dy", wide.clone());
    let types = vec![wide, narrow.clone(), narrow];
    let operands = [&[dy, q, k, v, made[0], made[1]], mask].concat();
    let gradients = b.node(host("attention_backward", &attrs, types), &operands).unwrap();
    for (name, value) in
        ["y", "lse", "dq", "dk", "dv"].into_iter().zip(made.into_iter().chain(gradients))
    {
        b.output(name, value);
    }
}

fn bf16(shape: &[usize], seed: u64) -> Tensor {
    numbers(shape, seed).rounded(DType::BF16).unwrap()
}

#[test]
fn attention_and_its_gradient_are_two_steps() {
    let mut b = GraphBuilder::new("causal");
    let q = b.input("q", ty(DType::BF16, &[2, 70, 4, 64]));
    let [k, v] = ["k", "v"].map(|n| b.input(n, ty(DType::BF16, &[2, 70, 2, 64])));
    attention(&mut b, [q, k, v], true, &[]);
    let shared = [2, 70, 2, 64];
    let inputs =
        [bf16(&[2, 70, 4, 64], 1), bf16(&shared, 2), bf16(&shared, 3), bf16(&[2, 70, 4, 64], 4)];
    holds(&b.finish(), &inputs, 2);
}

/// Parts of one tensor are read where they lie.
#[test]
fn attention_reads_parts_of_a_tensor_under_a_mask() {
    let mut b = GraphBuilder::new("parts");
    let all = b.input("all", ty(DType::BF16, &[2, 70, 8, 64]));
    let mask = b.input("mask", ty(DType::Bool, &[2, 1, 1, 70]));
    let part = |b: &mut GraphBuilder, start: i64, heads: i64| {
        let starts = [0, 0, start, 0].map(Dim::new).to_vec();
        let lens = [2, 70, heads, 64].map(Dim::new).to_vec();
        b.op(Op::Slice { starts, lens, steps: vec![1; 4] }, &[all]).unwrap()
    };
    let parts = [part(&mut b, 0, 4), part(&mut b, 4, 2), part(&mut b, 6, 2)];
    attention(&mut b, parts, false, &[mask]);
    let seen: Vec<i64> = (0..140).map(|i| i64::from(i % 3 != 1)).collect();
    let mask = Tensor::from_i64s(DType::Bool, &[2, 1, 1, 70], &seen).unwrap();
    holds(&b.finish(), &[bf16(&[2, 70, 8, 64], 5), mask, bf16(&[2, 70, 4, 64], 6)], 2);
}

#[test]
fn the_gradient_of_a_layer_norm_is_one_step() {
    for added in [false, true] {
        let mut b = GraphBuilder::new("norm");
        let matrix = ty(DType::BF16, &[300, 256]);
        let vector = ty(DType::BF16, &[256]);
        let [dy, x] = ["dy", "x"].map(|n| b.input(n, matrix.clone()));
        let scale = b.input("scale", vector.clone());
        let other = added.then(|| b.input("other", matrix.clone()));
        let op = host(
            "layer_norm_backward",
            &[("eps", HostAttr::Float(1e-5))],
            vec![matrix, vector.clone(), vector],
        );
        let operands: Vec<ValueId> = [dy, x, scale].into_iter().chain(other).collect();
        let made = b.node(op, &operands).unwrap();
        for (name, value) in ["dx", "dw", "db"].into_iter().zip(made) {
            b.output(name, value);
        }
        let mut inputs = vec![bf16(&[300, 256], 7), bf16(&[300, 256], 8), bf16(&[256], 9)];
        inputs.extend(added.then(|| bf16(&[300, 256], 10)));
        holds(&b.finish(), &inputs, 1);
    }
}
