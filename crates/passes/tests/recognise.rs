//! `cancel-views`, `recognise`, `decompose` and the whole pipeline on typical pieces of models.

mod common;
use common::*;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{
    AttentionAttrs, ConvAttrs, Graph, GraphBuilder, Op, ReduceKind, TensorType, ValueId,
};
use tilewright_layout::{Dim, Env, Range};
use tilewright_passes::{PassContext, decompose_all};

fn mean(b: &mut GraphBuilder, x: ValueId, n: f64, divide: bool) -> ValueId {
    let last = b.shape(x).len() - 1;
    let s = b.reduce(ReduceKind::Sum, x, &[last], true).unwrap();
    let n = b.scalar(DType::F32, if divide { n } else { 1.0 / n });
    b.binary(if divide { ExprOp::Div } else { ExprOp::Mul }, s, n).unwrap()
}

/// The spellings of layer norm and RMS norm that exporters use.
#[test]
fn norms() {
    for divide in [false, true] {
        for square_by_pow in [false, true] {
            for spelling in 0..4 {
                for centred in [false, true] {
                    for (scale, bias) in [(false, false), (true, false), (true, true)] {
                        let mut b = GraphBuilder::new("norm");
                        let x0 = input(&mut b, "x", &[2, 3, 8]);
                        let x = text(&mut b, "{ x -> x + 1 }", &[x0]);
                        let d = if centred {
                            let m = mean(&mut b, x, 8.0, divide);
                            b.binary(ExprOp::Sub, x, m).unwrap()
                        } else {
                            x
                        };
                        let sq = if square_by_pow {
                            let two = b.scalar(DType::F32, 2.0);
                            b.binary(ExprOp::Pow, d, two).unwrap()
                        } else {
                            b.binary(ExprOp::Mul, d, d).unwrap()
                        };
                        let v = mean(&mut b, sq, 8.0, divide);
                        let eps = b.scalar(DType::F32, 1e-5);
                        let v = b.binary(ExprOp::Add, eps, v).unwrap();
                        let mut y = match spelling {
                            0 => {
                                let s = b.unary(ExprOp::Sqrt, v).unwrap();
                                b.binary(ExprOp::Div, d, s).unwrap()
                            }
                            1 => {
                                let s = b.unary(ExprOp::Rsqrt, v).unwrap();
                                b.binary(ExprOp::Mul, s, d).unwrap()
                            }
                            2 => {
                                let s = text(&mut b, "{ v -> 1 / sqrt(v) }", &[v]);
                                b.binary(ExprOp::Mul, d, s).unwrap()
                            }
                            _ => {
                                let p = b.scalar(DType::F32, -0.5);
                                let s = b.binary(ExprOp::Pow, v, p).unwrap();
                                b.binary(ExprOp::Mul, d, s).unwrap()
                            }
                        };
                        let mut rng = Rng(4);
                        if scale {
                            let g = weight(&mut b, &mut rng, &[8]);
                            y = b.binary(ExprOp::Mul, g, y).unwrap();
                        }
                        if bias {
                            let c = weight(&mut b, &mut rng, &[8]);
                            y = b.binary(ExprOp::Add, y, c).unwrap();
                        }
                        b.output("y", y);
                        let g = pipeline(&b.finish(), &Env::new());
                        let name =
                            if centred { "layer_norm 1, map 1" } else { "map 1, rms_norm 1" };
                        let name = if bias && !centred { "map 2, rms_norm 1" } else { name };
                        assert_eq!(
                            histogram(&g),
                            name,
                            "{divide} {square_by_pow} {spelling} {scale} {bias}"
                        );
                    }
                }
            }
        }
    }
}

/// Variance over other axes than the mean, or of something else: no norm.
#[test]
fn almost_norms_stay() {
    for wrong in 0..2 {
        let mut b = GraphBuilder::new("norm");
        let x = input(&mut b, "x", &[2, 8, 8]);
        let other = input(&mut b, "o", &[2, 8, 8]);
        let m = mean(&mut b, if wrong == 0 { other } else { x }, 8.0, true);
        let d = b.binary(ExprOp::Sub, x, m).unwrap();
        let sq = b.binary(ExprOp::Mul, d, if wrong == 1 { x } else { d }).unwrap();
        let v = mean(&mut b, sq, 8.0, true);
        let s = text(&mut b, "{ v -> sqrt(v + 0.1) }", &[v]);
        let y = b.binary(ExprOp::Div, d, s).unwrap();
        b.output("y", y);
        let g = rewritten(&b.finish(), &["simplify", "recognise"]);
        // (The first is an RMS norm of x - mean(o), which is right.)
        assert_eq!(tilewright_passes::Histogram::of(&g).count("layer_norm"), 0);
    }
}

#[test]
fn softmax_spelled_out() {
    for axis in 0..3 {
        for with_max in [false, true] {
            let mut b = GraphBuilder::new("softmax");
            let x = input(&mut b, "x", &[2, 3, 4]);
            let d = if with_max {
                let m = b.reduce(ReduceKind::Max, x, &[axis], true).unwrap();
                b.binary(ExprOp::Sub, x, m).unwrap()
            } else {
                x
            };
            let e = b.unary(ExprOp::Exp, d).unwrap();
            let s = b.reduce(ReduceKind::Sum, e, &[axis], true).unwrap();
            let y = b.binary(ExprOp::Div, e, s).unwrap();
            b.output("y", y);
            assert_eq!(histogram(&apply(&b.finish(), &["recognise"])), "softmax 1");
        }
    }
}

/// How the pieces of an attention may be spelled.
#[derive(Clone, Copy, Debug)]
struct Spelling {
    /// Scale q and k (by the square root each) instead of the scores.
    scale_operands: bool,
    /// The mask: none, added, or selected.
    mask: u8,
    /// Heads flattened into the batch for the contractions.
    flat: bool,
    /// k transposed in two permutes.
    two_permutes: bool,
}

const HEADS: i64 = 4;
/// A power of 16, so that its roots are numbers of every float type.
const DIM: i64 = 16;

/// One BERT layer's attention as exporters write it, on `x: f32[B,S,32]`.
fn bert_attention(how: Spelling) -> Graph {
    let mut b = GraphBuilder::new("attention");
    let mut rng = Rng(11);
    let (n, s) =
        (b.symbol("B", Range { min: 1, max: 8 }), b.symbol("S", Range { min: 1, max: 64 }));
    let hidden = HEADS * DIM;
    let x = b.input("x", TensorType::new(DType::F32, [n.clone(), s.clone(), Dim::new(hidden)]));
    let mask = b.input("mask", TensorType::new(DType::F32, [n.clone(), s.clone()]));
    let heads = |b: &mut GraphBuilder, rng: &mut Rng, perm: &[usize]| {
        let w = weight(b, rng, &[hidden as usize, hidden as usize]);
        let y = b.contract("bsk,kn->bsn", x, w).unwrap();
        let bias = weight(b, rng, &[hidden as usize]);
        let y = b.binary(ExprOp::Add, bias, y).unwrap();
        let y = b.reshape(y, &[n.clone(), s.clone(), Dim::new(HEADS), Dim::new(DIM)]).unwrap();
        b.permute(y, perm).unwrap()
    };
    let mut q = heads(&mut b, &mut rng, &[0, 2, 1, 3]);
    let mut v = heads(&mut b, &mut rng, &[0, 2, 1, 3]);
    let mut k = if how.two_permutes {
        let k = heads(&mut b, &mut rng, &[0, 2, 1, 3]);
        b.permute(k, &[0, 1, 3, 2]).unwrap()
    } else {
        heads(&mut b, &mut rng, &[0, 2, 3, 1])
    };
    if how.scale_operands {
        let root = b.scalar(DType::F32, (DIM as f64).powf(-0.25));
        q = b.binary(ExprOp::Mul, q, root).unwrap();
        k = b.binary(ExprOp::Mul, k, root).unwrap();
    }
    let bh = &n * HEADS;
    if how.flat {
        q = b.reshape(q, &[bh.clone(), s.clone(), Dim::new(DIM)]).unwrap();
        k = b.reshape(k, &[bh.clone(), Dim::new(DIM), s.clone()]).unwrap();
        v = b.reshape(v, &[bh.clone(), s.clone(), Dim::new(DIM)]).unwrap();
    }
    let mut scores = if how.flat {
        let p = b.contract("bmk,bkn->bmn", q, k).unwrap();
        b.reshape(p, &[n.clone(), Dim::new(HEADS), s.clone(), s.clone()]).unwrap()
    } else {
        b.contract("abmk,abkn->abmn", q, k).unwrap()
    };
    if !how.scale_operands {
        let root = b.scalar(DType::F32, (DIM as f64).sqrt());
        scores = b.binary(ExprOp::Div, scores, root).unwrap();
    }
    let m = b.reshape(mask, &[n.clone(), Dim::new(1), Dim::new(1), s.clone()]).unwrap();
    if how.mask == 1 {
        let m = text(&mut b, "{ m -> (1 - m) * -10 }", &[m]);
        scores = b.binary(ExprOp::Add, scores, m).unwrap();
    } else if how.mask == 2 {
        let m = b.expand(m, &[n.clone(), Dim::new(1), s.clone(), s.clone()]).unwrap();
        scores = text(&mut b, "{ s, m -> m > 0.5 ? s : -10 }", &[scores, m]);
    }
    let p = b.op(Op::Softmax { axis: 3, log: false }, &[scores]).unwrap();
    let y = if how.flat {
        let p = b.reshape(p, &[bh.clone(), s.clone(), s.clone()]).unwrap();
        let y = b.contract("bmk,bkn->bmn", p, v).unwrap();
        b.reshape(y, &[n.clone(), Dim::new(HEADS), s.clone(), Dim::new(DIM)]).unwrap()
    } else {
        b.contract("abmk,abkn->abmn", p, v).unwrap()
    };
    let y = b.permute(y, &[0, 2, 1, 3]).unwrap();
    let y = b.reshape(y, &[n.clone(), s.clone(), Dim::new(hidden)]).unwrap();
    let w = weight(&mut b, &mut rng, &[hidden as usize, hidden as usize]);
    let y = b.contract("bsk,kn->bsn", y, w).unwrap();
    b.output("y", y);
    if how.mask == 0 {
        b.output("mask", mask);
    }
    b.finish()
}

#[test]
fn attention_in_its_spellings() {
    for scale_operands in [false, true] {
        for mask in 0..3 {
            for flat in [false, true] {
                for two_permutes in [false, true] {
                    let how = Spelling { scale_operands, mask, flat, two_permutes };
                    let graph = bert_attention(how);
                    let env: Env = [("B".into(), 2), ("S".into(), 5)].into();
                    let after = pipeline(&graph, &env);
                    let counts = tilewright_passes::Histogram::of(&after);
                    assert_eq!(counts.count("attention"), 1, "{how:?}: {counts}");
                    assert_eq!(counts.count("contract"), 4, "{how:?}: {counts}");
                    // Heads are views: a reshape and a permute each for q, k, v and the result.
                    assert!(counts.count("permute") <= 4, "{how:?}: {counts}");
                    assert_eq!(
                        counts.count("expand") + counts.count("softmax"),
                        0,
                        "{how:?}: {counts}"
                    );
                    assert_eq!(
                        counts.count("reshape"),
                        if mask == 0 { 4 } else { 5 },
                        "{how:?}: {counts}"
                    );
                    assert_eq!(
                        counts.count("map"),
                        if mask == 1 { 4 } else { 3 },
                        "{how:?}: {counts}"
                    );
                }
            }
        }
    }
}

/// Scores that something else reads too must be kept.
#[test]
fn shared_probabilities_stay() {
    let mut b = GraphBuilder::new("t");
    let q = input(&mut b, "q", &[2, 3, 5, 4]);
    let k = input(&mut b, "k", &[2, 3, 7, 4]);
    let v = input(&mut b, "v", &[2, 3, 7, 6]);
    let s = b.contract("abqd,abkd->abqk", q, k).unwrap();
    let p = b.op(Op::Softmax { axis: 3, log: false }, &[s]).unwrap();
    let y = b.contract("abqk,abke->abqe", p, v).unwrap();
    b.output("y", y);
    b.output("p", p);
    assert_eq!(histogram(&apply(&b.finish(), &["recognise"])), "contract 2, softmax 1");
}

/// A mask that hides later positions is taken away; one that hides another position is not.
#[test]
fn causal_masks() {
    let (rows, keys) = (5, 7);
    let visible = |at: usize| at % keys <= at / keys + (keys - rows);
    for (low, function) in [
        (f64::NEG_INFINITY, "{ s, m -> s * 0.3 + m }"),
        (-3e38, "{ s, m -> m + s }"),
        (0.0, "{ s, m -> select(m, s * 0.5, -inf) }"),
    ] {
        for spoiled in [None, Some(3), Some(2)] {
            let seen = |at: usize| visible(at) != (spoiled == Some(at));
            let mask = match low == 0.0 {
                true => {
                    let values: Vec<f64> = (0..35).map(|i| f64::from(seen(i))).collect();
                    Tensor::from_f64s(DType::Bool, &[rows, keys], &values).unwrap()
                }
                false => {
                    let values: Vec<f64> =
                        (0..35).map(|i| if seen(i) { 0.0 } else { low }).collect();
                    Tensor::from_f64s(DType::F32, &[rows, keys], &values).unwrap()
                }
            };
            let mut b = GraphBuilder::new("t");
            let q = input(&mut b, "q", &[1, 2, 5, 4]);
            let [k, v] = ["k", "v"].map(|name| input(&mut b, name, &[1, 2, 7, 4]));
            let mask = b.constant("mask", mask);
            let s = b.contract("bhqd,bhkd->bhqk", q, k).unwrap();
            let s = text(&mut b, function, &[s, mask]);
            let p = b.op(Op::Softmax { axis: 3, log: false }, &[s]).unwrap();
            let y = b.contract("bhqk,bhke->bhqe", p, v).unwrap();
            b.output("y", y);
            let g = apply(&b.finish(), &["recognise", "fold-recognised", "recognise"]);
            let causal = g.live().any(|(_, n)| matches!(&n.op, Op::Attention(a) if a.causal));
            assert_eq!(causal, spoiled.is_none(), "{function} {spoiled:?}");
        }
    }
}

/// Letters in unusual orders, shared keys, no batch.
#[test]
fn attention_letters() {
    /// Shapes of q, k, v; the contraction to scores; the softmax axis; the second contraction.
    type Case = (&'static [i64], &'static [i64], &'static [i64], &'static str, usize, &'static str);
    #[rustfmt::skip]
    let cases: [Case; 6] = [
        (&[5, 4], &[7, 4], &[7, 6], "qd,kd->qk", 1, "qk,ke->qe"),
        (&[5, 4], &[7, 4], &[7, 6], "qd,kd->kq", 0, "kq,ke->eq"),
        (&[2, 5, 4], &[2, 7, 4], &[2, 7, 6], "bqd,bkd->bqk", 2, "bqk,bke->bqe"),
        (&[2, 3, 5, 4], &[2, 7, 4], &[2, 7, 6], "bhqd,bkd->bhqk", 3, "bhqk,bke->bhqe"),
        (&[2, 5, 3, 4], &[2, 1, 7, 4], &[2, 1, 7, 6], "bqhd,bhkd->bhqk", 3, "bhqk,bhke->bqhe"),
        (&[5, 2, 4, 3], &[3, 7, 2, 4], &[7, 6, 3, 2], "qbdh,hkbd->hbkq", 2, "hbkq,kehb->ebqh"),
    ];
    for (q, k, v, first, axis, second) in cases {
        let mut b = GraphBuilder::new("t");
        let (q, k, v) = (input(&mut b, "q", q), input(&mut b, "k", k), input(&mut b, "v", v));
        let s = b.contract(first, q, k).unwrap();
        let s = text(&mut b, "{ s -> s * 0.3 }", &[s]);
        let p = b.op(Op::Softmax { axis, log: false }, &[s]).unwrap();
        let y = b.contract(second, p, v).unwrap();
        b.output("y", y);
        let g = apply(&b.finish(), &["recognise"]);
        assert_eq!(tilewright_passes::Histogram::of(&g).count("attention"), 1, "{first} {second}");
    }
}

fn conv_attrs(pad: i64, groups: i64) -> ConvAttrs {
    ConvAttrs {
        strides: vec![1, 1],
        pads_lo: vec![pad; 2],
        pads_hi: vec![pad; 2],
        dilations: vec![1, 1],
        groups,
    }
}

fn batch_norm(b: &mut GraphBuilder, rng: &mut Rng, x: ValueId, c: usize) -> ValueId {
    let mut operands = vec![x];
    for _ in 0..3 {
        operands.push(weight(b, rng, &[c]));
    }
    let var: Vec<f64> = (0..c).map(|_| rng.float().abs() + 0.1).collect();
    operands.push(b.constant("var", Tensor::from_f64s(DType::F32, &[c], &var).unwrap()));
    b.op(Op::BatchNorm { eps: (1.0f64 / 65536.0).to_bits() }, &operands).unwrap()
}

#[test]
fn batch_norm_goes_into_the_convolution() {
    for (bias, groups, scale) in [(false, 1, false), (true, 1, true), (true, 2, false)] {
        let mut b = GraphBuilder::new("t");
        let mut rng = Rng(2);
        let x = input(&mut b, "x", &[2, 4, 5, 5]);
        let w = weight(&mut b, &mut rng, &[6, 4 / groups as usize, 3, 3]);
        let mut y = b.op(Op::Conv(conv_attrs(1, groups)), &[x, w]).unwrap();
        if bias {
            let c = weight(&mut b, &mut rng, &[6, 1, 1]);
            y = b.binary(ExprOp::Add, y, c).unwrap();
        }
        y = batch_norm(&mut b, &mut rng, y, 6);
        if scale {
            let s = weight(&mut b, &mut rng, &[6, 1, 1]);
            y = b.binary(ExprOp::Mul, y, s).unwrap();
        }
        b.output("y", y);
        assert_eq!(histogram(&pipeline(&b.finish(), &Env::new())), "conv 1, map 1");
    }
    // Alone, and with a second reader of the convolution.
    let mut b = GraphBuilder::new("t");
    let mut rng = Rng(2);
    let x = input(&mut b, "x", &[2, 4, 5, 5]);
    let w = weight(&mut b, &mut rng, &[6, 4, 3, 3]);
    let c = b.op(Op::Conv(conv_attrs(1, 1)), &[x, w]).unwrap();
    let y = batch_norm(&mut b, &mut rng, c, 6);
    let z = batch_norm(&mut b, &mut rng, x, 4);
    b.output("c", c);
    b.output("y", y);
    b.output("z", z);
    assert_eq!(histogram(&pipeline(&b.finish(), &Env::new())), "conv 1, map 2");
}

/// Each composite means what its decomposition computes.
#[test]
fn composites_equal_their_decomposition() {
    // A power of two, so that it is the same number in f32.
    let eps = (1.0f64 / 1024.0).to_bits();
    let check = |build: &dyn Fn(&mut GraphBuilder) -> ValueId, env: &Env| {
        let mut b = GraphBuilder::new("t");
        let y = build(&mut b);
        b.output("y", y);
        let before = b.finish();
        let mut after = before.clone();
        assert!(decompose_all(&mut after).unwrap());
        tilewright_graph::verify(&after).unwrap();
        same_on(&before, &after, env);
        let counts = histogram(&after);
        for name in ["softmax", "norm", "attention"] {
            assert!(!counts.contains(name), "{counts}");
        }
    };
    let none = Env::new();
    for axis in 0..3 {
        for log in [false, true] {
            check(
                &|b| {
                    let x = input(b, "x", &[2, 3, 4]);
                    b.op(Op::Softmax { axis, log }, &[x]).unwrap()
                },
                &none,
            );
        }
    }
    for axis in [1, 2] {
        for kind in 0..3 {
            check(
                &|b| {
                    let n = b.symbol("N", Range { min: 1, max: 9 });
                    let x =
                        b.input("x", TensorType::new(DType::F32, [n, Dim::new(3), Dim::new(4)]));
                    let g = input(b, "g", if axis == 1 { &[3, 4] } else { &[4] });
                    let c = input(b, "c", &[4]);
                    match kind {
                        0 => b.op(Op::RmsNorm { axis, eps }, &[x, g]).unwrap(),
                        1 => b.op(Op::LayerNorm { axis, eps }, &[x, g]).unwrap(),
                        _ => b.op(Op::LayerNorm { axis, eps }, &[x, g, c]).unwrap(),
                    }
                },
                &[("N".into(), 3)].into(),
            );
        }
    }
    check(
        &|b| {
            let x = input(b, "x", &[2, 4, 3]);
            batch_norm(b, &mut Rng(1), x, 4)
        },
        &none,
    );
    for groups in [1, 2, 4] {
        check(
            &|b| {
                let x = input(b, "x", &[2, 4, 3, 5]);
                let (g, c) = (input(b, "g", &[4]), input(b, "c", &[4]));
                b.op(Op::GroupNorm { groups, eps }, &[x, g, c]).unwrap()
            },
            &none,
        );
    }
    for (heads, groups) in [(4, 4), (4, 2), (4, 1)] {
        for causal in [false, true] {
            check(
                &|b| {
                    let q = input(b, "q", &[2, heads, 5, 3]);
                    let k = input(b, "k", &[2, groups, 7, 3]);
                    let v = input(b, "v", &[2, groups, 7, 6]);
                    let m = input(b, "m", &[2, 1, 1, 7]);
                    let score = tilewright_expr::Func::parse(
                        "{ s, m -> s * 0.5 + m }",
                        &[DType::F32, DType::F32],
                    )
                    .unwrap();
                    b.op(
                        Op::Attention(AttentionAttrs { score, causal, zeros: false }),
                        &[q, k, v, m],
                    )
                    .unwrap()
                },
                &none,
            );
        }
    }
}

/// A residual block: layouts are blocked inside, row-major at the ends.
#[test]
fn layouts_of_a_residual_block() {
    let mut b = GraphBuilder::new("block");
    let mut rng = Rng(7);
    let x = input(&mut b, "x", &[1, 3, 8, 8]);
    let conv = |b: &mut GraphBuilder, rng: &mut Rng, x, i: usize, o: usize| {
        let w = weight(b, rng, &[o, i, 3, 3]);
        b.op(Op::Conv(conv_attrs(1, 1)), &[x, w]).unwrap()
    };
    let c0 = conv(&mut b, &mut rng, x, 3, 16);
    let r0 = text(&mut b, "{ x -> max(x, 0) }", &[c0]);
    let c1 = conv(&mut b, &mut rng, r0, 16, 16);
    let sum = b.binary(ExprOp::Add, c1, r0).unwrap();
    let pooled = b.reduce(ReduceKind::Sum, sum, &[2, 3], false).unwrap();
    let w = weight(&mut b, &mut rng, &[16, 10]);
    let y = b.contract("nc,co->no", pooled, w).unwrap();
    b.output("y", y);
    let g = b.finish();
    let ctx = PassContext { vector_lanes: 8, panel_width: 16, ..PassContext::default() };
    let layouts = tilewright_passes::choose_layouts(&g, &ctx);
    for v in [c0, r0, c1, sum] {
        assert_eq!(layouts[&v].axes[1].block.as_ref().unwrap().size, 8);
    }
    for v in [x, pooled, y] {
        assert!(!layouts.contains_key(&v));
    }
    assert_eq!(layouts[&w].to_string(), "(16,(1,16)):(16,(256,1))");
    let conv_weights = g.nodes[g.order[0]].inputs[1];
    assert_eq!(layouts[&conv_weights].axes[0].block.as_ref().unwrap().size, 8);

    // The same block whose inner value is also an output: nothing there may be blocked.
    let mut g2 = g.clone();
    g2.outputs.push(("r0".into(), r0));
    let layouts = tilewright_passes::choose_layouts(&g2, &ctx);
    assert!(
        !layouts.contains_key(&r0) && !layouts.contains_key(&c0) && !layouts.contains_key(&sum)
    );
}
