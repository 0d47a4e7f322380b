//! Convolution, pooling, attention and gathers against the oracle, row-major and blocked.

mod support;

use support::*;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{FuncBuilder, Op as E};
use tilewright_graph::{
    AttentionAttrs, ConvAttrs, Graph, GraphBuilder, Op, TensorType, WindowAttrs, WindowKind,
};
use tilewright_layout::{Dim, Layout, Range};
use tilewright_lower::Layouts;

struct Case {
    x: &'static [i64],
    w: &'static [i64],
    stride: i64,
    pad: i64,
    dilation: i64,
    groups: i64,
}

const CASES: &[Case] = &[
    // One tap: a contraction, with stride, with one spatial axis.
    Case { x: &[2, 20, 5, 6], w: &[24, 20, 1, 1], stride: 1, pad: 0, dilation: 1, groups: 1 },
    Case { x: &[1, 16, 7, 6], w: &[9, 16, 1, 1], stride: 2, pad: 0, dilation: 1, groups: 1 },
    Case { x: &[2, 5, 12], w: &[6, 5, 1], stride: 1, pad: 0, dilation: 1, groups: 1 },
    // Few input channels.
    Case { x: &[2, 3, 11, 12], w: &[20, 3, 3, 3], stride: 2, pad: 1, dilation: 1, groups: 1 },
    Case { x: &[1, 3, 9, 9], w: &[8, 3, 7, 7], stride: 1, pad: 0, dilation: 1, groups: 1 },
    Case { x: &[1, 3, 20, 23], w: &[20, 3, 7, 7], stride: 2, pad: 3, dilation: 1, groups: 1 },
    Case { x: &[1, 4, 10, 20], w: &[8, 4, 2, 5], stride: 1, pad: 1, dilation: 2, groups: 1 },
    // By taps.
    Case { x: &[1, 16, 14, 14], w: &[40, 16, 3, 3], stride: 1, pad: 1, dilation: 1, groups: 1 },
    Case { x: &[2, 16, 7, 7], w: &[16, 16, 3, 3], stride: 1, pad: 1, dilation: 1, groups: 1 },
    Case { x: &[1, 24, 9, 10], w: &[40, 24, 3, 3], stride: 1, pad: 1, dilation: 1, groups: 1 },
    Case { x: &[2, 16, 8, 7], w: &[16, 16, 3, 3], stride: 2, pad: 2, dilation: 2, groups: 1 },
    Case { x: &[1, 17, 30], w: &[5, 17, 4], stride: 3, pad: 2, dilation: 1, groups: 1 },
    Case { x: &[1, 9, 4, 5, 6], w: &[5, 9, 2, 2, 2], stride: 1, pad: 1, dilation: 1, groups: 1 },
    // Groups and depthwise.
    Case { x: &[1, 32, 6, 6], w: &[48, 16, 3, 3], stride: 1, pad: 1, dilation: 1, groups: 2 },
    Case { x: &[2, 6, 6, 5], w: &[9, 2, 3, 3], stride: 1, pad: 1, dilation: 1, groups: 3 },
    Case { x: &[2, 24, 9, 9], w: &[24, 1, 3, 3], stride: 2, pad: 1, dilation: 1, groups: 24 },
    Case { x: &[1, 20, 9, 13], w: &[20, 1, 5, 5], stride: 1, pad: 2, dilation: 1, groups: 20 },
    Case { x: &[1, 5, 20], w: &[5, 1, 3], stride: 1, pad: 1, dilation: 1, groups: 5 },
    Case { x: &[1, 4, 6, 6], w: &[8, 1, 3, 3], stride: 1, pad: 1, dilation: 1, groups: 4 },
];

fn us(s: &[i64]) -> Vec<usize> {
    s.iter().map(|&d| d as usize).collect()
}

fn conv_graph(case: &Case, constant: bool) -> (Graph, Vec<Tensor>) {
    scaled_conv_graph(case, constant, 1.0)
}

/// With a factor for the weights, where sums are so long that they would cancel to a small part of their terms.
fn scaled_conv_graph(case: &Case, constant: bool, factor: f64) -> (Graph, Vec<Tensor>) {
    let mut b = GraphBuilder::new(format!("conv {:?} {:?} {constant}", case.x, case.w));
    let spatial = case.x.len() - 2;
    let x = b.input("x", f32s(case.x));
    // A convolution before, so that its result may be blocked.
    let y = b.unary(E::Neg, x).unwrap();
    let weights = tensor(DType::F32, &us(case.w), 7);
    let values: Vec<f64> = weights.to_f64s().iter().map(|v| v * factor).collect();
    let weights = Tensor::from_f64s(DType::F32, &us(case.w), &values).unwrap();
    let w = match constant {
        true => b.constant("w", weights.clone()),
        false => b.input("w", f32s(case.w)),
    };
    let attrs = ConvAttrs {
        strides: vec![case.stride; spatial],
        pads_lo: vec![case.pad; spatial],
        pads_hi: (0..spatial as i64).map(|i| (case.pad - i).max(0)).collect(),
        dilations: vec![case.dilation; spatial],
        groups: case.groups,
    };
    let c = b.op(Op::Conv(attrs), &[y, w]).unwrap();
    let mut bias_shape = vec![case.w[0]];
    bias_shape.extend(vec![1; spatial]);
    let bias = b.constant("bias", tensor(DType::F32, &us(&bias_shape), 9));
    let z = b.binary(E::Add, c, bias).unwrap();
    let z = b.unary(E::Tanh, z).unwrap();
    let out = b.unary(E::Abs, z).unwrap();
    b.output("out", out);
    let plain = b.unary(E::Exp, z).unwrap();
    let r = b.reduce(tilewright_graph::ReduceKind::Sum, plain, &[2], true).unwrap();
    b.output("r", r);
    let mut inputs = vec![tensor(DType::F32, &us(case.x), 1)];
    if !constant {
        inputs.push(weights);
    }
    (b.finish(), inputs)
}

#[test]
fn convolutions_row_major() {
    for case in CASES {
        for constant in [true, false] {
            let (graph, inputs) = conv_graph(case, constant);
            check(&graph, &inputs);
        }
    }
}

#[test]
fn convolutions_with_blocked_channels() {
    for case in CASES {
        let (graph, inputs) = conv_graph(case, true);
        for size in [4, 8] {
            let mut layouts = Layouts::new();
            for (id, node) in graph.live() {
                let v = node.outputs[0];
                let blocks = matches!(node.op, Op::Conv(_) | Op::Map(_)) && !graph.is_output(v);
                let first = id.0 == 0;
                if blocks
                    && graph.shape(v)[1].as_const().is_some_and(|c| c >= size)
                    && (case.groups == 1 || case.w[1] == 1 || case.w[1] % size == 0 || !first)
                {
                    layouts.insert(v, Layout::blocked(graph.shape(v), 1, size));
                }
            }
            check_layouts(&graph, &inputs, &layouts);
        }
    }
}

/// Where fewer multiplications pay, also at borders of different widths and for several images.
#[test]
fn convolutions_in_winograds_form() {
    let case = |x: &'static [i64], w: &'static [i64], pad: i64| Case {
        x,
        w,
        stride: 1,
        pad,
        dilation: 1,
        groups: 1,
    };
    for case in [
        case(&[1, 64, 18, 18], &[64, 64, 3, 3], 0),
        case(&[1, 56, 16, 17], &[72, 56, 3, 3], 1),
        case(&[2, 64, 10, 11], &[64, 64, 3, 3], 2),
    ] {
        let (graph, inputs) = scaled_conv_graph(&case, true, 1.0 / 24.0);
        let mut layouts = Layouts::new();
        for (_, node) in graph.live() {
            let v = node.outputs[0];
            if matches!(node.op, Op::Conv(_) | Op::Map(_)) && !graph.is_output(v) {
                layouts.insert(v, Layout::blocked(graph.shape(v), 1, 8));
            }
        }
        let plan = check_layouts(&graph, &inputs, &layouts);
        let products = plan.kernels.iter().filter(|(_, k)| k.kernel.name == "winograd_product");
        assert_eq!(products.count(), 1, "{:?}", case.x);
    }
}

#[test]
fn convolution_of_symbolic_images() {
    let mut b = GraphBuilder::new("symbolic conv");
    let n = b.symbol("N", Range { min: 0, max: 8 });
    let h = b.symbol("H", Range { min: 3, max: 64 });
    let x = b.input("x", TensorType::new(DType::F32, vec![n, Dim::new(10), h.clone(), h]));
    let w = b.constant("w", tensor(DType::F32, &[12, 10, 3, 3], 7));
    let attrs = ConvAttrs {
        strides: vec![2, 1],
        pads_lo: vec![1, 1],
        pads_hi: vec![1, 1],
        dilations: vec![1, 1],
        groups: 1,
    };
    let y = b.op(Op::Conv(attrs), &[x, w]).unwrap();
    b.output("y", y);
    let p = b
        .op(
            Op::Window(WindowAttrs {
                kind: WindowKind::Max,
                kernel: vec![2, 2],
                strides: vec![1, 2],
                pads_lo: vec![0, 1],
                pads_hi: vec![1, 0],
                dilations: vec![1, 1],
            }),
            &[y],
        )
        .unwrap();
    b.output("p", p);
    let graph = b.finish();
    for (n, h) in [(1, 3), (2, 17), (0, 5)] {
        check(&graph, &[tensor(DType::F32, &[n, 10, h, h], 1)]);
    }
}

#[test]
fn pooling_of_every_kind() {
    for kind in [WindowKind::Max, WindowKind::Sum, WindowKind::Mean, WindowKind::MeanWithPad] {
        for (kernel, stride, pad, dilation) in [(3, 2, 1, 1), (2, 1, 1, 2), (6, 3, 2, 1)] {
            for dtype in [DType::F32, DType::I32] {
                if dtype == DType::I32 && !matches!(kind, WindowKind::Max | WindowKind::Sum) {
                    continue;
                }
                let mut b = GraphBuilder::new(format!("{kind:?} {kernel} {dtype}"));
                let x = b.input("x", TensorType::new(dtype, dims(&[2, 10, 9, 11])));
                let m = b.unary(E::Neg, x).unwrap();
                let attrs = WindowAttrs {
                    kind,
                    kernel: vec![kernel, kernel],
                    strides: vec![stride, stride],
                    pads_lo: vec![pad, 0],
                    pads_hi: vec![pad, pad],
                    dilations: vec![dilation, 1],
                };
                let y = b.op(Op::Window(attrs), &[m]).unwrap();
                let z = b.unary(E::Abs, y).unwrap();
                let out = b.unary(E::Neg, z).unwrap();
                b.output("out", out);
                let graph = b.finish();
                let inputs = [tensor(dtype, &[2, 10, 9, 11], 1)];
                check(&graph, &inputs);
                let blocked = |v| (v, Layout::blocked(graph.shape(v), 1, 8));
                check_layouts(
                    &graph,
                    &inputs,
                    &Layouts::from([blocked(m), blocked(y), blocked(z)]),
                );
            }
        }
    }
}

/// `score * 0.3 + mask`
fn scaled(mask: bool) -> tilewright_expr::Func {
    let mut f = FuncBuilder::new();
    let s = f.param("s", DType::F32);
    let scale = f.constant(0.3, DType::F32);
    let mut y = f.op(E::Mul, &[s, scale]);
    if mask {
        let m = f.param("m", DType::F32);
        y = f.op(E::Add, &[y, m]);
    }
    f.finish(y)
}

#[test]
fn attention_matches_with_masks_groups_and_causality() {
    for (heads, groups, rows, keys, causal, mask) in [
        (3, 3, 7, 7, false, None),
        (4, 2, 33, 70, true, None),
        (2, 1, 1, 40, true, None),
        (2, 2, 5, 3, true, None),
        (2, 2, 9, 20, false, Some(vec![2, 1, 1, 20])),
        (2, 2, 9, 20, true, Some(vec![9, 20])),
    ] {
        let mut b = GraphBuilder::new(format!("attention {heads} {groups} {rows} {keys} {causal}"));
        // Heads are views of rows of all heads, as models have them.
        let head = |b: &mut GraphBuilder, name: &str, h: i64, n: i64, d: i64| {
            let x = b.input(name, f32s(&[2, n, h * d]));
            let x = b.reshape(x, &dims(&[2, n, h, d])).unwrap();
            b.permute(x, &[0, 2, 1, 3]).unwrap()
        };
        let q = head(&mut b, "q", heads, rows, 6);
        let k = head(&mut b, "k", groups, keys, 6);
        let v = head(&mut b, "v", groups, keys, 10);
        let mut operands = vec![q, k, v];
        let shape = |s: &[i64]| us(s);
        let mut inputs = vec![
            tensor(DType::F32, &shape(&[2, rows, heads * 6]), 1),
            tensor(DType::F32, &shape(&[2, keys, groups * 6]), 2),
            tensor(DType::F32, &shape(&[2, keys, groups * 10]), 3),
        ];
        if let Some(mask) = &mask {
            operands.push(b.input("mask", f32s(mask)));
            let mut t = tensor(DType::F32, &us(mask), 4).to_f64s();
            // The first row of keys is hidden altogether, and some others.
            t.iter_mut().take(20).for_each(|v| *v = f64::NEG_INFINITY);
            t.iter_mut().skip(20).step_by(3).for_each(|v| *v = f64::NEG_INFINITY);
            inputs.push(Tensor::from_f64s(DType::F32, &us(mask), &t).unwrap());
        }
        // One case of each kind has the form in which a row that sees nothing is 0.
        let attrs = AttentionAttrs { score: scaled(mask.is_some()), causal, zeros: causal };
        let y = b.op(Op::Attention(attrs), &operands).unwrap();
        let y = b.permute(y, &[0, 2, 1, 3]).unwrap();
        let y = b.reshape(y, &dims(&[2, rows, heads * 10])).unwrap();
        let w = b.constant("w", tensor(DType::F32, &shape(&[heads * 10, 8]), 5));
        let z = b.contract("bsk,kn->bsn", y, w).unwrap();
        b.output("y", y);
        b.output("z", z);
        let plan = check(&b.finish(), &inputs);
        assert_eq!(steps(&plan), ["attention", "contract"]);
    }
}

#[test]
fn attention_over_symbolic_lengths() {
    let mut b = GraphBuilder::new("symbolic attention");
    let n = b.symbol("B", Range { min: 1, max: 8 });
    let s = b.symbol("S", Range { min: 1, max: 512 });
    let x = b.input("x", TensorType::new(DType::F32, vec![n, Dim::new(2), s, Dim::new(5)]));
    let attrs = AttentionAttrs { score: scaled(false), causal: true, zeros: false };
    let y = b.op(Op::Attention(attrs), &[x, x, x]).unwrap();
    b.output("y", y);
    let graph = b.finish();
    for (n, s) in [(1, 1), (2, 65), (1, 130)] {
        check(&graph, &[tensor(DType::F32, &[n, 2, s, 5], 1)]);
    }
}

#[test]
fn gathers_along_any_axis() {
    for (axis, picks) in [(0, &[3][..]), (0, &[2, 5]), (1, &[]), (1, &[4, 2]), (2, &[7])] {
        for dtype in [DType::I64, DType::I32] {
            let mut b = GraphBuilder::new(format!("gather {axis} {picks:?}"));
            let table = b.constant("table", tensor(DType::F32, &[4, 5, 20], 3));
            let i = b.input("i", TensorType::new(dtype, dims(picks)));
            let y = b.op(Op::Gather(axis), &[table, i]).unwrap();
            let shape = b.shape(y);
            let z = b.input("z", TensorType::new(DType::F32, shape.clone()));
            let w = b.binary(E::Add, y, z).unwrap();
            b.output("w", w);
            let out: Vec<usize> = shape.iter().map(|d| d.as_const().unwrap() as usize).collect();
            let graph = b.finish();
            let plan = check(&graph, &[tensor(dtype, &us(picks), 1), tensor(DType::F32, &out, 2)]);
            assert_eq!(steps(&plan), ["gather_add"]);
        }
    }
}
