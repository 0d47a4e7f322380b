//! Each kind of group against the oracle: shapes that do not divide, symbols, empty tensors, views.

mod support;

use support::*;
use tilewright_base::DType;
use tilewright_expr::{Func, Op as E};
use tilewright_graph::{Graph, GraphBuilder, Op, PadMode, ReduceKind, TensorType};
use tilewright_layout::{Dim, Range};

fn build(name: &str, f: impl FnOnce(&mut GraphBuilder)) -> Graph {
    let mut b = GraphBuilder::new(name);
    f(&mut b);
    b.finish()
}

#[test]
fn chains_and_diamonds_of_maps_are_one_kernel() {
    let g = build("diamond", |b| {
        let x = b.input("x", f32s(&[3, 5, 7]));
        let y = b.input("y", f32s(&[7]));
        let s = b.binary(E::Add, x, y).unwrap();
        let t = b.unary(E::Tanh, s).unwrap();
        let u = b.unary(E::Exp, s).unwrap();
        let z = b.binary(E::Mul, t, u).unwrap();
        b.output("z", z);
        b.output("t", t);
    });
    let plan = check(&g, &[tensor(DType::F32, &[3, 5, 7], 1), tensor(DType::F32, &[7], 2)]);
    assert_eq!(steps(&plan).len(), 1, "{:?}", steps(&plan));
}

#[test]
fn broadcasts_of_every_kind() {
    for (a, c) in [(&[4, 1, 6][..], &[5, 1][..]), (&[1], &[2, 3]), (&[], &[4]), (&[2, 1], &[1, 9])]
    {
        let g = build("broadcast", |b| {
            let x = b.input("x", f32s(a));
            let y = b.input("y", f32s(c));
            let z = b.binary(E::Sub, x, y).unwrap();
            b.output("z", z);
        });
        let us = |s: &[i64]| s.iter().map(|&d| d as usize).collect::<Vec<_>>();
        check(&g, &[tensor(DType::F32, &us(a), 1), tensor(DType::F32, &us(c), 2)]);
    }
}

#[test]
fn views_are_layouts_and_copies_only_where_needed() {
    let g = build("views", |b| {
        let x = b.input("x", f32s(&[4, 6, 8]));
        let p = b.permute(x, &[2, 0, 1]).unwrap();
        let s = b
            .op(
                Op::Slice {
                    starts: dims(&[6, 0, 1]),
                    lens: dims(&[3, 4, 4]),
                    steps: vec![-2, 1, 1],
                },
                &[p],
            )
            .unwrap();
        let y = b.unary(E::Neg, s).unwrap();
        b.output("y", y);
        let r = b.reshape(p, &dims(&[8, 24])).unwrap();
        let e = b.expand(r, &dims(&[2, 8, 24])).unwrap();
        let f = b.unary(E::Abs, e).unwrap();
        let q = b.permute(f, &[1, 0, 2]).unwrap();
        b.output("q", q);
        b.output("x again", x);
    });
    let plan = check(&g, &[tensor(DType::F32, &[4, 6, 8], 1)]);
    // The map writes the permuted output in place; the input is copied out.
    assert_eq!(steps(&plan), ["neg", "abs", "copy"]);
}

#[test]
fn reshape_of_a_permutation_copies_once() {
    let g = build("copy", |b| {
        let x = b.input("x", f32s(&[4, 6]));
        let p = b.permute(x, &[1, 0]).unwrap();
        let r = b.reshape(p, &dims(&[8, 3])).unwrap();
        let y = b.unary(E::Neg, r).unwrap();
        let z = b.unary(E::Exp, r).unwrap();
        b.output("y", y);
        b.output("z", z);
    });
    check(&g, &[tensor(DType::F32, &[4, 6], 1)]);
}

#[test]
fn an_output_that_no_layout_of_its_views_reaches_is_copied() {
    // One axis of the product becomes two that do not lie side by side in the output.
    let g = build("heads", |b| {
        let x = b.input("x", f32s(&[2, 5, 8]));
        let w = b.input("w", f32s(&[8, 12]));
        let y = b.contract("bak,kn->abn", x, w).unwrap();
        let y = b.reshape(y, &dims(&[5, 2, 3, 4])).unwrap();
        let y = b.permute(y, &[2, 0, 1, 3]).unwrap();
        b.output("y", y);
    });
    check(&g, &[tensor(DType::F32, &[2, 5, 8], 1), tensor(DType::F32, &[8, 12], 2)]);
}

#[test]
fn dead_nodes_are_not_looked_at() {
    let mut g = build("dead", |b| {
        let x = b.input("x", f32s(&[3, 4]));
        b.input("row", f32s(&[4]));
        let scan = Op::Scan { kind: ReduceKind::Sum, axis: 1, exclusive: false, reverse: false };
        b.op(scan, &[x]).unwrap();
        let y = b.unary(E::Neg, x).unwrap();
        b.output("y", y);
    });
    let scan = g.order[0];
    g.remove_dead();
    // As a pass leaves it that replaced the operand by one of another shape.
    g.nodes[scan].inputs = vec![g.inputs[1]];
    check(&g, &[tensor(DType::F32, &[3, 4], 1), tensor(DType::F32, &[4], 2)]);
}

#[test]
fn concat_is_written_in_place() {
    let g = build("concat", |b| {
        let x = b.input("x", f32s(&[3, 4]));
        let y = b.input("y", f32s(&[3, 5]));
        let a = b.unary(E::Exp, x).unwrap();
        let c = b.op(Op::Concat(1), &[a, y, a]).unwrap();
        let d = b.unary(E::Neg, c).unwrap();
        b.output("c", c);
        b.output("d", d);
        let e = b.unary(E::Neg, y).unwrap();
        let f = b.op(Op::Concat(1), &[e, x]).unwrap();
        b.output("f", f);
    });
    check(&g, &[tensor(DType::F32, &[3, 4], 1), tensor(DType::F32, &[3, 5], 2)]);
}

#[test]
fn padding_reads_shifted_and_crops() {
    let g = build("pad", |b| {
        let x = b.input("x", f32s(&[3, 4, 1]));
        let mode = PadMode::Constant(tilewright_expr::Value::Float(7.5));
        let op = Op::Pad { lo: dims(&[1, -1, 2]), hi: dims(&[0, 2, 0]), mode };
        let p = b.op(op, &[x]).unwrap();
        let y = b.unary(E::Neg, p).unwrap();
        b.output("y", y);
    });
    check(&g, &[tensor(DType::F32, &[3, 4, 1], 1)]);
}

#[test]
fn row_operators_over_any_axis() {
    for axis in 0..3 {
        for shape in [[3, 5, 70], [2, 33, 4], [1, 1, 9], [6, 1, 1]] {
            let g = build(&format!("rows {axis} {shape:?}"), |b| {
                let x = b.input("x", f32s(&shape));
                for log in [false, true] {
                    let y = b.op(Op::Softmax { axis, log }, &[x]).unwrap();
                    b.output("y", y);
                }
                let m = b.reduce(ReduceKind::Max, x, &[axis], false).unwrap();
                b.output("m", m);
                let s = b.reduce(ReduceKind::Sum, x, &[axis], true).unwrap();
                let d = b.binary(E::Sub, x, s).unwrap();
                b.output("d", d);
                for last in [false, true] {
                    let op = Op::ArgReduce { kind: ReduceKind::Min, axis, keep: false, last };
                    let a = b.op(op, &[x]).unwrap();
                    b.output("a", a);
                }
                let op =
                    Op::Scan { kind: ReduceKind::Sum, axis, exclusive: true, reverse: axis == 1 };
                let c = b.op(op, &[x]).unwrap();
                b.output("c", c);
            });
            let us = shape.map(|d| d as usize);
            check(&g, &[tensor(DType::F32, &us, 3)]);
        }
    }
}

#[test]
fn residual_and_layer_norm_are_one_pass() {
    let g = build("norm", |b| {
        let x = b.input("x", f32s(&[5, 3, 48]));
        let r = b.input("r", f32s(&[5, 3, 48]));
        let w = b.constant("w", tensor(DType::F32, &[48], 8));
        let c = b.constant("c", tensor(DType::F32, &[48], 9));
        let s = b.binary(E::Add, x, r).unwrap();
        let eps = 1e-5f64.to_bits();
        let n = b.op(Op::LayerNorm { axis: 2, eps }, &[s, w, c]).unwrap();
        let y = b.unary(E::Tanh, n).unwrap();
        b.output("y", y);
        b.output("s", s);
    });
    let shape = [5, 3, 48];
    let plan = check(&g, &[tensor(DType::F32, &shape, 1), tensor(DType::F32, &shape, 2)]);
    assert_eq!(steps(&plan), ["add_layernorm_tanh"]);
    let g = build("rms", |b| {
        let x = b.input("x", TensorType::new(DType::BF16, dims(&[4, 3, 20])));
        let w = b.constant("w", tensor(DType::BF16, &[20], 8));
        let n = b.op(Op::RmsNorm { axis: 2, eps: 1e-5f64.to_bits() }, &[x, w]).unwrap();
        b.output("n", n);
    });
    check(&g, &[tensor(DType::BF16, &[4, 3, 20], 1)]);
}

#[test]
fn long_and_symbolic_rows_walk_in_pieces() {
    let g = build("symbolic", |b| {
        let n = b.symbol("N", Range { min: 1, max: 1 << 20 });
        let m = b.symbol("M", Range { min: 0, max: 64 });
        let x = b.input("x", TensorType::new(DType::F32, vec![m, n]));
        let y = b.op(Op::Softmax { axis: 1, log: false }, &[x]).unwrap();
        b.output("y", y);
        let n = b.op(Op::LayerNorm { axis: 1, eps: 1e-5f64.to_bits() }, &[x, y, y]).unwrap();
        b.output("n", n);
        for last in [false, true] {
            let op = Op::ArgReduce { kind: ReduceKind::Max, axis: 1, keep: true, last };
            let a = b.op(op, &[x]).unwrap();
            b.output("a", a);
        }
        let s = b.op(Op::Softmax { axis: 0, log: true }, &[x]).unwrap();
        b.output("s", s);
        let all = b.reduce(ReduceKind::Sum, x, &[0, 1], false).unwrap();
        b.output("all", all);
    });
    for shape in [[1, 1], [3, 70], [4, 2500], [0, 5]] {
        check(&g, &[tensor(DType::F32, &shape, 5)]);
    }
    let mut odd = tensor(DType::F32, &[2, 300], 6).to_f64s();
    (odd[100], odd[290], odd[400]) = (f64::NAN, f64::NAN, f64::NEG_INFINITY);
    check(&g, &[tilewright_data::Tensor::from_f64s(DType::F32, &[2, 300], &odd).unwrap()]);
}

#[test]
fn reductions_over_several_axes_and_types() {
    for axes in [&[0][..], &[1], &[0, 2], &[1, 2], &[0, 1, 2], &[0, 3], &[1, 3], &[2, 3]] {
        let g = build(&format!("reduce {axes:?}"), |b| {
            let x = b.input("x", f32s(&[3, 4, 5, 6]));
            let s = b.reduce(ReduceKind::Sum, x, axes, false).unwrap();
            b.output("s", s);
            let k = b.cast(x, DType::I8).unwrap();
            let m = b.reduce(ReduceKind::Max, k, axes, true).unwrap();
            b.output("m", m);
            let zero = b.scalar(DType::F32, -1.9);
            let t = b.binary(E::Gt, x, zero).unwrap();
            let all = b.reduce(ReduceKind::Min, t, axes, true).unwrap();
            b.output("all", all);
        });
        check(&g, &[tensor(DType::F32, &[3, 4, 5, 6], 5)]);
    }
    let g = build("nothing", |b| {
        let x = b.input("x", f32s(&[3, 0]));
        let s = b.reduce(ReduceKind::Sum, x, &[1], false).unwrap();
        let m = b.reduce(ReduceKind::Max, x, &[1], false).unwrap();
        b.output("s", s);
        b.output("m", m);
    });
    check(&g, &[tensor(DType::F32, &[3, 0], 1)]);
}

#[test]
fn contractions_with_any_letters() {
    let cases: [(&str, &[i64], &[i64]); 12] = [
        ("mk,kn->mn", &[7, 33], &[33, 40]),
        ("mk,nk->mn", &[70, 20], &[19, 20]),
        ("mk,kn->nm", &[7, 33], &[33, 5]),
        ("bsk,kn->bsn", &[2, 9, 16], &[16, 48]),
        ("bhsd,bhtd->bhst", &[2, 3, 5, 8], &[2, 3, 6, 8]),
        ("bhst,bhtd->bshd", &[2, 3, 5, 6], &[2, 3, 6, 8]),
        ("k,kn->n", &[12], &[12, 30]),
        ("mk,k->m", &[12, 20], &[20]),
        ("k,k->", &[50], &[50]),
        ("m,n->mn", &[5], &[6]),
        ("bmk,bkn->bmn", &[1, 4, 5], &[3, 5, 6]),
        ("abk,kc->a", &[4, 3, 5], &[5, 2]),
    ];
    for (spec, a, c) in cases {
        let us = |s: &[i64]| s.iter().map(|&d| d as usize).collect::<Vec<_>>();
        for constant in [false, true] {
            let g = build(&format!("{spec} {constant}"), |b| {
                let x = b.input("x", f32s(a));
                let y = match constant {
                    true => b.constant("w", tensor(DType::F32, &us(c), 2)),
                    false => b.input("y", f32s(c)),
                };
                let z = b.contract(spec, x, y).unwrap();
                b.output("z", z);
                let (spec_in, out) = spec.split_once("->").unwrap();
                let (l, r) = spec_in.split_once(',').unwrap();
                let z = b.contract(&format!("{r},{l}->{out}"), y, x).unwrap();
                b.output("swapped", z);
            });
            let mut inputs = vec![tensor(DType::F32, &us(a), 1)];
            if !constant {
                inputs.push(tensor(DType::F32, &us(c), 2));
            }
            check(&g, &inputs);
        }
    }
}

#[test]
fn bias_activation_and_residual_join_the_contraction() {
    let g = build("linear", |b| {
        let s = b.symbol("S", Range { min: 1, max: 512 });
        let ty = |n: i64| TensorType::new(DType::F32, vec![Dim::new(2), s.clone(), Dim::new(n)]);
        let x = b.input("x", ty(24));
        let r = b.input("r", ty(40));
        let w = b.constant("w", tensor(DType::F32, &[24, 40], 3));
        let c = b.constant("c", tensor(DType::F32, &[40], 4));
        let y = b.contract("bsk,kn->bsn", x, w).unwrap();
        let y = b.binary(E::Add, y, c).unwrap();
        let y = b.unary(E::Erf, y).unwrap();
        let y = b.binary(E::Add, y, r).unwrap();
        b.output("y", y);
    });
    for s in [1, 7, 60] {
        let x = tensor(DType::F32, &[2, s, 24], 1);
        let plan = check(&g, &[x, tensor(DType::F32, &[2, s, 40], 2)]);
        assert_eq!(steps(&plan), ["contract_add_erf_add"]);
    }
    // Integers, and 16-bit floats that accumulate in 32 bits.
    for dtype in [DType::I8, DType::BF16] {
        let g = build("types", |b| {
            let x = b.input("x", TensorType::new(dtype, dims(&[9, 30])));
            let y = b.input("y", TensorType::new(dtype, dims(&[30, 11])));
            let z = b.contract("mk,kn->mn", x, y).unwrap();
            b.output("z", z);
        });
        check(&g, &[tensor(dtype, &[9, 30], 1), tensor(dtype, &[30, 11], 2)]);
    }
}

#[test]
fn sizes_counters_and_host_steps() {
    let g = build("odd", |b| {
        let n = b.symbol("N", Range { min: 1, max: 99 });
        let x = b.input("x", TensorType::new(DType::F32, vec![n.clone(), Dim::new(4)]));
        let d = b.op(Op::Dims(vec![n.clone(), &n * 2 + 1]), &[]).unwrap();
        b.output("d", d);
        let ty = TensorType::new(DType::F32, vec![n.clone(), Dim::new(4)]);
        let i = b.op(Op::Iota { ty: ty.clone(), axis: 0 }, &[]).unwrap();
        let y = b.binary(E::Add, x, i).unwrap();
        b.output("y", y);
        let j = b.op(Op::Iota { ty, axis: 1 }, &[]).unwrap();
        b.output("j", j);
        let t = b.permute(y, &[1, 0]).unwrap();
        let top = b.node(Op::TopK { axis: 0, k: Dim::new(2), largest: true }, &[t]).unwrap();
        let u = b.unary(E::Neg, top[0]).unwrap();
        b.output("u", u);
        b.output("at", top[1]);
        b.output("at again", top[1]);
    });
    for n in [1, 13] {
        check(&g, &[tensor(DType::F32, &[n, 4], 1)]);
    }
    let ty = TensorType::new(DType::F32, dims(&[3, 5000]));
    let g = build("random", |b| {
        let r = b.op(Op::Random { ty, seed: 42 }, &[]).unwrap();
        let two = b.scalar(DType::F32, 2.0);
        let s = b.binary(E::Mul, r, two).unwrap();
        b.output("s", s);
    });
    check(&g, &[]);
}

#[test]
fn identical_layers_share_a_kernel() {
    let g = build("layers", |b| {
        let mut x = b.input("x", f32s(&[8, 16]));
        for layer in 0..4 {
            let w = b.constant(format!("w{layer}"), tensor(DType::F32, &[16, 16], layer));
            x = b.contract("mk,kn->mn", x, w).unwrap();
            x = b.map(Func::unary(E::Tanh, DType::F32), &[x]).unwrap();
        }
        b.output("x", x);
    });
    let plan = check(&g, &[tensor(DType::F32, &[8, 16], 1)]);
    assert_eq!((plan.steps.len(), plan.kernels.len()), (4, 1));
}
