//! `simplify`, `fold-constants`, `cse`, `dead-code`: rule by rule.

mod common;
use common::*;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{Func, Op as ExprOp, Value};
use tilewright_graph::{
    ConvAttrs, GraphBuilder, Op, PadMode, ReduceKind, TensorType, WindowAttrs, WindowKind,
};
use tilewright_layout::{Dim, Env, Range};

fn dims(d: &[i64]) -> Vec<Dim> {
    d.iter().map(|&d| Dim::new(d)).collect()
}

/// Builds with one input `[2,3,4]`, applies `simplify`, returns the histogram.
fn simplified(
    build: impl Fn(&mut GraphBuilder, tilewright_graph::ValueId) -> tilewright_graph::ValueId,
) -> String {
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[2, 3, 4]);
    let y = build(&mut b, x);
    b.output("y", y);
    histogram(&apply(&b.finish(), &["simplify", "dead-code"]))
}

#[test]
fn views() {
    let op = |b: &mut GraphBuilder, op: Op, v| b.op(op, &[v]).unwrap();
    assert_eq!(simplified(|b, x| op(b, Op::Reshape(dims(&[2, 3, 4])), x)), "");
    assert_eq!(
        simplified(|b, x| {
            let y = op(b, Op::Reshape(dims(&[6, 4])), x);
            op(b, Op::Reshape(dims(&[24])), y)
        }),
        "reshape 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let y = op(b, Op::Permute(vec![1, 2, 0]), x);
            op(b, Op::Permute(vec![2, 0, 1]), y)
        }),
        ""
    );
    assert_eq!(
        simplified(|b, x| {
            let y = op(b, Op::Permute(vec![1, 2, 0]), x);
            op(b, Op::Permute(vec![1, 2, 0]), y)
        }),
        "permute 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let y = op(b, Op::Expand(dims(&[5, 2, 3, 4])), x);
            op(b, Op::Expand(dims(&[6, 5, 2, 3, 4])), y)
        }),
        "expand 1"
    );
    let slice = |starts: &[i64], lens: &[i64], steps: &[i64]| Op::Slice {
        starts: dims(starts),
        lens: dims(lens),
        steps: steps.to_vec(),
    };
    assert_eq!(simplified(|b, x| op(b, slice(&[0, 0, 0], &[2, 3, 4], &[1, 1, 1]), x)), "");
    assert_eq!(
        simplified(|b, x| {
            let y = op(b, slice(&[1, 0, 3], &[1, 3, 4], &[1, 1, -1]), x);
            op(b, slice(&[0, 1, 1], &[1, 1, 2], &[1, 1, 2]), y)
        }),
        "slice 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let e = text(b, "{ x -> exp(x) }", &[x]);
            let y = b.op(Op::Concat(1), &[x, e]).unwrap();
            op(b, slice(&[0, 3, 0], &[2, 3, 4], &[1, 1, 1]), y)
        }),
        "map 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let mode = PadMode::Constant(Value::Float(0.0));
            op(b, Op::Pad { lo: dims(&[0, 0, 0]), hi: dims(&[0, 0, 0]), mode }, x)
        }),
        ""
    );
    assert_eq!(simplified(|b, x| op(b, Op::Concat(1), x)), "");
    assert_eq!(
        simplified(|b, x| {
            let y = b.op(Op::Concat(1), &[x, x]).unwrap();
            b.op(Op::Concat(1), &[y, x]).unwrap()
        }),
        "concat 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let i = b.constant("i", Tensor::scalar(DType::I64, -1.0));
            b.op(Op::Gather(1), &[x, i]).unwrap()
        }),
        "reshape 1, slice 1"
    );
}

#[test]
fn reductions_and_windows() {
    assert_eq!(
        simplified(|b, x| {
            let y = b.reduce(ReduceKind::Sum, x, &[1], true).unwrap();
            b.reshape(y, &dims(&[2, 4])).unwrap()
        }),
        "reduce 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let y = b.reduce(ReduceKind::Max, x, &[1], false).unwrap();
            b.reshape(y, &dims(&[2, 1, 4])).unwrap()
        }),
        "reduce 1"
    );
    assert_eq!(
        simplified(|b, x| {
            let y = b.reshape(x, &dims(&[2, 1, 12])).unwrap();
            b.reduce(ReduceKind::Sum, y, &[1], false).unwrap()
        }),
        "reshape 1"
    );
    let window = |kind| {
        Op::Window(WindowAttrs {
            kind,
            kernel: vec![4],
            strides: vec![4],
            pads_lo: vec![0],
            pads_hi: vec![0],
            dilations: vec![1],
        })
    };
    for (kind, expected) in [
        (WindowKind::Max, "reduce 1"),
        (WindowKind::Sum, "reduce 1"),
        (WindowKind::Mean, "map 1, reduce 1"),
    ] {
        assert_eq!(simplified(|b, x| b.op(window(kind), &[x]).unwrap()), expected);
    }
}

#[test]
fn maps() {
    // Literals and splats move into the function.
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[2, 3]);
    let two = b.scalar(DType::F32, 2.0);
    let splat = b.constant("s", Tensor::from_f64s(DType::F32, &[2, 3], &[0.5; 6]).unwrap());
    let y = b.binary(ExprOp::Mul, x, two).unwrap();
    let z = b.binary(ExprOp::Add, y, splat).unwrap();
    b.output("z", z);
    let g = apply(&b.finish(), &["simplify"]);
    assert!(g.live().all(|(_, n)| n.inputs.len() == 1));

    // A splat that gives the shape: computed small, expanded after.
    assert_eq!(
        simplified(|b, x| {
            let big =
                b.constant("s", Tensor::from_f64s(DType::F32, &[5, 1, 1, 1], &[0.5; 5]).unwrap());
            b.binary(ExprOp::Add, x, big).unwrap()
        }),
        "expand 1, map 1"
    );
    // Expanded operands are read at their source, or expanded after.
    assert_eq!(
        simplified(|b, x| {
            let row = b.reduce(ReduceKind::Sum, x, &[1, 2], true).unwrap();
            let wide = b.expand(row, &dims(&[2, 3, 4])).unwrap();
            b.binary(ExprOp::Add, x, wide).unwrap()
        }),
        "map 1, reduce 1"
    );
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[3, 1]);
    let wide = b.expand(x, &dims(&[3, 64])).unwrap();
    let y = b.unary(ExprOp::Exp, wide).unwrap();
    b.output("y", y);
    let g = apply(&b.finish(), &["simplify"]);
    assert_eq!(histogram(&g), "expand 1, map 1");
    assert_eq!(g.shape(g.nodes[g.order[0]].outputs[0]), dims(&[3, 1]));

    // One operand twice is one parameter.
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[3]);
    let y = b.binary(ExprOp::Mul, x, x).unwrap();
    b.output("y", y);
    let g = apply(&b.finish(), &["simplify"]);
    assert_eq!(g.nodes[g.order[0]].inputs.len(), 1);

    // Casts: through a wider type and back is nothing, through a narrower one stays.
    let cast_twice = |mid| {
        simplified(|b, x| {
            let y = b.map(Func::cast(DType::F32, mid), &[x]).unwrap();
            b.map(Func::cast(mid, DType::F32), &[y]).unwrap()
        })
    };
    assert_eq!(cast_twice(DType::F64), "");
    assert_eq!(cast_twice(DType::I64), "map 2");
}

/// `bf16` through `f16` and back loses values: the casts must stay. Run in exact types.
#[test]
fn lossy_casts_stay() {
    let mut b = GraphBuilder::new("t");
    let x = b.input("x", TensorType::new(DType::BF16, dims(&[2])));
    let y = b.cast(x, DType::F16).unwrap();
    let z = b.cast(y, DType::BF16).unwrap();
    b.output("z", z);
    let g = apply(&b.finish(), &["simplify"]);
    assert_eq!(histogram(&g), "map 2");
}

#[test]
fn padding_joins_the_convolution() {
    for (fill, expected) in [(0.0, "conv 1"), (1.0, "conv 1, pad 1")] {
        let mut b = GraphBuilder::new("t");
        let x = input(&mut b, "x", &[1, 2, 5, 5]);
        let mode = PadMode::Constant(Value::Float(fill));
        let p =
            b.op(Op::Pad { lo: dims(&[0, 0, 1, 0]), hi: dims(&[0, 0, 2, 1]), mode }, &[x]).unwrap();
        let w = weight(&mut b, &mut Rng(1), &[3, 2, 3, 3]);
        let attrs = ConvAttrs {
            strides: vec![2, 1],
            pads_lo: vec![0, 1],
            pads_hi: vec![0, 0],
            dilations: vec![1, 1],
            groups: 1,
        };
        let y = b.op(Op::Conv(attrs), &[p, w]).unwrap();
        b.output("y", y);
        assert_eq!(histogram(&apply(&b.finish(), &["simplify"])), expected);
    }
}

#[test]
fn constants_fold_to_the_same_bits() {
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[4]);
    let c = b.scalar(DType::F32, 64.0);
    let s = b.unary(ExprOp::Sqrt, c).unwrap();
    let w = weight(&mut b, &mut Rng(3), &[4]);
    let w = b.unary(ExprOp::Exp, w).unwrap();
    let y = b.binary(ExprOp::Div, x, s).unwrap();
    let y = b.binary(ExprOp::Mul, y, w).unwrap();
    let n = b.op(Op::Dims(dims(&[4, 7])), &[]).unwrap();
    b.output("y", y);
    b.output("n", n);
    let before = b.finish();
    let after = rewritten(&before, &["fold-constants", "simplify"]);
    assert_eq!(histogram(&after), "map 2");
    let given = inputs(&before, &mut Rng(9), &Env::new());
    let exact = |g| tilewright_interp::run(g, &given, tilewright_interp::Mode::Exact).unwrap();
    assert_eq!(exact(&before), exact(&after));
}

#[test]
fn folding_makes_no_giants() {
    let mut b = GraphBuilder::new("t");
    let c = b.scalar(DType::F32, 1.5);
    let big = b.expand(c, &dims(&[1 << 20, 1 << 13])).unwrap();
    b.output("big", big);
    let before = b.finish();
    let mut after = before.clone();
    let fold = tilewright_passes::find_pass("fold-constants").unwrap();
    assert!(!(fold.run)(&mut after, &tilewright_passes::PassContext::default()).unwrap());
}

#[test]
fn permuted_weights_fold_with_all_element_sizes() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::I8, DType::I4, DType::Bool] {
        let mut b = GraphBuilder::new("t");
        let w = Rng(5).tensor(dtype, &[2, 3, 5]);
        let w = b.constant("w", w);
        let y = b.permute(w, &[2, 0, 1]).unwrap();
        b.output("y", y);
        let before = b.finish();
        let after = apply(&before, &["fold-constants"]);
        assert_eq!(histogram(&after), "");
        let exact = |g| tilewright_interp::run(g, &[], tilewright_interp::Mode::Exact).unwrap();
        assert_eq!(exact(&before), exact(&after), "{dtype}");
    }
}

#[test]
fn equal_things_become_one() {
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", &[4]);
    let one = |b: &mut GraphBuilder| {
        b.constant("", Tensor::from_f64s(DType::F32, &[4], &[1., 2., 3., 4.]).unwrap())
    };
    let (c, d) = (one(&mut b), one(&mut b));
    let p = b.binary(ExprOp::Add, x, c).unwrap();
    let q = b.binary(ExprOp::Add, x, d).unwrap();
    let r = b.binary(ExprOp::Sub, x, d).unwrap();
    let y = b.binary(ExprOp::Mul, p, q).unwrap();
    let y = b.binary(ExprOp::Mul, y, r).unwrap();
    b.output("y", y);
    assert_eq!(histogram(&apply(&b.finish(), &["cse"])), "map 4");
}

#[test]
fn sizes_that_must_agree_get_one_name() {
    let mut b = GraphBuilder::new("t");
    let n = b.symbol("N", Range { min: 1, max: 64 });
    let m = b.symbol("M", Range { min: 2, max: 128 });
    let x = b.input("x", TensorType::new(DType::F32, [n.clone(), Dim::new(4)]));
    let y = b.input("y", TensorType::new(DType::F32, [m, Dim::new(3)]));
    let z = b.op(Op::Concat(1), &[x, y]).unwrap();
    b.output("z", z);
    let env: Env = [("N".into(), 5), ("M".into(), 5)].into();
    let g = apply_with(&b.finish(), &["infer-shapes"], &env);
    assert_eq!(g.shape(g.inputs[1])[0], n);
    assert_eq!(g.symbols.len(), 1);
    assert_eq!(g.symbols[0].range, Range { min: 2, max: 64 });
}
