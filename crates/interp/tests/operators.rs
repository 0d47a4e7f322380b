//! Every operator on a case small enough to compute by hand.

#![allow(
    clippy::cloned_ref_to_slice_refs,
    reason = "operand lists read alike whatever their length"
)]
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{Func, FuncBuilder, Op as ExprOp, Value};
use tilewright_graph::{
    AttentionAttrs, ConvAttrs, GraphBuilder, HostOp, Op, PadMode, ReduceKind, ScatterKind,
    TensorType, WindowAttrs, WindowKind,
};
use tilewright_interp::{Mode, run};
use tilewright_layout::{Dim, Range};

fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(shape, values).unwrap()
}

fn i64s(shape: &[usize], values: &[i64]) -> Tensor {
    Tensor::from_slice(shape, values).unwrap()
}

fn dims(sizes: &[i64]) -> Vec<Dim> {
    sizes.iter().map(|&d| Dim::new(d)).collect()
}

/// Runs one operator; operands become inputs of their own type.
fn one(op: Op, inputs: &[Tensor], mode: Mode) -> Vec<Tensor> {
    try_one(op, inputs, mode).unwrap()
}

fn try_one(op: Op, inputs: &[Tensor], mode: Mode) -> tilewright_base::Result<Vec<Tensor>> {
    let mut b = GraphBuilder::new("one");
    let ids: Vec<_> = inputs
        .iter()
        .enumerate()
        .map(|(i, t)| {
            let shape: Vec<Dim> = t.shape().iter().map(|&d| Dim::from(d)).collect();
            b.input(format!("x{i}"), TensorType::new(t.dtype(), shape))
        })
        .collect();
    for (i, v) in b.node(op, &ids)?.into_iter().enumerate() {
        b.output(format!("y{i}"), v);
    }
    run(&b.finish(), inputs, mode)
}

/// Runs one operator in both modes, which must agree here; checks shape and values.
fn check(op: Op, inputs: &[Tensor], shape: &[usize], expected: &[f64]) {
    for mode in [Mode::Exact, Mode::F64] {
        let y = &one(op.clone(), inputs, mode)[0];
        assert_eq!(y.shape(), shape, "{op:?}");
        assert_eq!(y.to_f64s(), expected, "{op:?} {mode:?}");
    }
}

/// As [`check`], up to `1e-6` relative to the largest value.
fn check_near(op: Op, inputs: &[Tensor], shape: &[usize], expected: &[f64]) {
    for mode in [Mode::Exact, Mode::F64] {
        let y = &one(op.clone(), inputs, mode)[0];
        assert_eq!(y.shape(), shape, "{op:?}");
        for (a, b) in y.to_f64s().iter().zip(expected) {
            assert!((a - b).abs() < 1e-6 * (1.0 + b.abs()), "{op:?} {mode:?}: {a} for {b}");
        }
    }
}

#[test]
fn map_broadcasts_and_rounds_in_exact_mode_only() {
    let add = Op::Map(Func::binary(ExprOp::Add, DType::F32));
    check(
        add.clone(),
        &[f32s(&[2, 1], &[1., 2.]), f32s(&[3], &[10., 20., 30.])],
        &[2, 3],
        &[11., 21., 31., 12., 22., 32.],
    );
    let tiny = [f32s(&[], &[1.0]), f32s(&[], &[1e-10])];
    assert_eq!(one(add.clone(), &tiny, Mode::Exact)[0].to_f64s(), [1.0]);
    let oracle = &one(add, &tiny, Mode::F64)[0];
    assert_eq!(oracle.dtype(), DType::F64);
    assert_eq!(oracle.to_f64s(), [1.0 + f64::from(1e-10f32)]);
}

#[test]
fn integers_wrap_and_divide_as_documented() {
    let bytes = |v: &[i64]| Tensor::from_i64s(DType::I8, &[v.len()], v).unwrap();
    let binary = |op| Op::Map(Func::binary(op, DType::I8));
    check(binary(ExprOp::Add), &[bytes(&[127, -128]), bytes(&[1, -1])], &[2], &[-128., 127.]);
    let (a, b) = (bytes(&[7, -7, 7, 5, -128]), bytes(&[2, 2, -2, 0, -1]));
    check(binary(ExprOp::Div), &[a.clone(), b.clone()], &[5], &[3., -3., -3., 0., -128.]);
    check(binary(ExprOp::Rem), &[a.clone(), b.clone()], &[5], &[1., -1., 1., 0., 0.]);
    check(binary(ExprOp::Mod), &[a, b], &[5], &[1., 1., -1., 0., 0.]);
    check(binary(ExprOp::Shl), &[bytes(&[1, 1, -1]), bytes(&[7, 8, 1])], &[3], &[-128., 0., -2.]);
    check(
        Op::Map(Func::cast(DType::F32, DType::I8)),
        &[f32s(&[4], &[-1.9, 300., f32::NAN, -300.])],
        &[4],
        &[-1., 127., 0., -128.],
    );
    check(Op::Map(Func::cast(DType::I64, DType::U8)), &[i64s(&[2], &[257, -1])], &[2], &[1., 255.]);
}

#[test]
fn unsigned_64_bit_values_compare_as_unsigned() {
    let big = Tensor::from_slice(&[2], &[u64::MAX, 1]).unwrap();
    let one_each = Tensor::from_slice(&[2], &[1u64, 2]).unwrap();
    let op = Op::Map(Func::binary(ExprOp::Gt, DType::U64));
    check(op, &[big.clone(), one_each], &[2], &[1., 0.]);
    let max = Op::Reduce { kind: ReduceKind::Max, axes: vec![0], keep: false };
    assert_eq!(one(max, &[big], Mode::Exact)[0].to_i64s(), [-1]);
}

#[test]
fn views() {
    let x = f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    check(Op::Reshape(dims(&[3, 2])), &[x.clone()], &[3, 2], &[1., 2., 3., 4., 5., 6.]);
    check(Op::Permute(vec![1, 0]), &[x.clone()], &[3, 2], &[1., 4., 2., 5., 3., 6.]);
    check(Op::Expand(dims(&[2, 2])), &[f32s(&[2, 1], &[7., 8.])], &[2, 2], &[7., 7., 8., 8.]);
    let slice = Op::Slice { starts: dims(&[1, 2]), lens: dims(&[2, 2]), steps: vec![-1, -2] };
    check(slice, &[x.clone()], &[2, 2], &[6., 4., 3., 1.]);
    check(
        Op::Concat(1),
        &[x.clone(), f32s(&[2, 1], &[9., 8.])],
        &[2, 4],
        &[1., 2., 3., 9., 4., 5., 6., 8.],
    );
    check(
        Op::Iota { ty: TensorType::new(DType::F32, dims(&[2, 3])), axis: 1 },
        &[],
        &[2, 3],
        &[0., 1., 2., 0., 1., 2.],
    );
    check(Op::Dims(dims(&[4, 5])), &[], &[2], &[4., 5.]);
}

#[test]
fn pads_of_every_mode() {
    let x = f32s(&[4], &[1., 2., 3., 4.]);
    let pad = |lo, hi, mode| Op::Pad { lo: dims(&[lo]), hi: dims(&[hi]), mode };
    let nine = PadMode::Constant(Value::Float(9.0));
    check(pad(1, 2, nine.clone()), &[x.clone()], &[7], &[9., 1., 2., 3., 4., 9., 9.]);
    check(pad(-1, 1, nine), &[x.clone()], &[4], &[2., 3., 4., 9.]);
    check(pad(2, 1, PadMode::Edge), &[x.clone()], &[7], &[1., 1., 1., 2., 3., 4., 4.]);
    check(pad(2, 2, PadMode::Reflect), &[x.clone()], &[8], &[3., 2., 1., 2., 3., 4., 3., 2.]);
    check(pad(2, 1, PadMode::Wrap), &[x], &[7], &[3., 4., 1., 2., 3., 4., 1.]);
}

#[test]
fn reductions() {
    let x = f32s(&[2, 3], &[1., 5., 3., -4., 2., 0.5]);
    let reduce = |kind, axes: &[usize], keep| Op::Reduce { kind, axes: axes.to_vec(), keep };
    check(reduce(ReduceKind::Sum, &[1], false), &[x.clone()], &[2], &[9., -1.5]);
    check(reduce(ReduceKind::Max, &[0], true), &[x.clone()], &[1, 3], &[1., 5., 3.]);
    check(reduce(ReduceKind::Prod, &[0, 1], false), &[x.clone()], &[], &[-60.]);
    check(reduce(ReduceKind::Min, &[], false), &[x.clone()], &[2, 3], &x.to_f64s());
    let empty = Tensor::zeros(DType::I8, [2, 0]).unwrap();
    check(reduce(ReduceKind::Max, &[1], false), &[empty.clone()], &[2], &[-128., -128.]);
    check(reduce(ReduceKind::Sum, &[0], false), &[empty], &[0], &[]);
    let nan = f32s(&[3], &[1., f32::NAN, 3.]);
    let y = one(reduce(ReduceKind::Max, &[0], false), &[nan], Mode::Exact);
    assert!(y[0].get_f64(0).is_nan());
}

#[test]
fn arg_reductions_and_scans() {
    let x = f32s(&[2, 4], &[1., 7., 7., 0., f32::NAN, 2., f32::NAN, 9.]);
    let arg = |kind, last| Op::ArgReduce { kind, axis: 1, keep: false, last };
    check(arg(ReduceKind::Max, false), &[x.clone()], &[2], &[1., 0.]);
    check(arg(ReduceKind::Max, true), &[x.clone()], &[2], &[2., 2.]);
    check(arg(ReduceKind::Min, false), &[x], &[2], &[3., 0.]);
    let x = f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    let scan =
        |axis, exclusive, reverse| Op::Scan { kind: ReduceKind::Sum, axis, exclusive, reverse };
    check(scan(1, false, false), &[x.clone()], &[2, 3], &[1., 3., 6., 4., 9., 15.]);
    check(scan(1, true, true), &[x.clone()], &[2, 3], &[5., 3., 0., 11., 6., 0.]);
    check(scan(0, false, false), &[x], &[2, 3], &[1., 2., 3., 5., 7., 9.]);
}

fn contraction(spec: [&str; 3], acc: DType, dtype: DType) -> Op {
    let [lhs, rhs, out] = spec.map(str::to_string);
    Op::Contract { lhs, rhs, out, acc, dtype }
}

#[test]
fn contractions() {
    let f = DType::F32;
    let a = f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    let b = f32s(&[3, 2], &[1., 0., 0., 1., 1., 1.]);
    check(
        contraction(["mk", "kn", "mn"], f, f),
        &[a.clone(), b.clone()],
        &[2, 2],
        &[4., 5., 10., 11.],
    );
    check(
        contraction(["mk", "kn", "nm"], f, f),
        &[a.clone(), b.clone()],
        &[2, 2],
        &[4., 10., 5., 11.],
    );
    // Outer product, a letter of one operand only that is summed, and a stretched batch.
    check(
        contraction(["a", "b", "ba"], f, f),
        &[f32s(&[2], &[1., 2.]), f32s(&[2], &[3., 5.])],
        &[2, 2],
        &[3., 6., 5., 10.],
    );
    check(contraction(["mk", "n", "n"], f, f), &[a.clone(), f32s(&[1], &[2.])], &[1], &[42.]);
    check(
        contraction(["bk", "bk", "b"], f, f),
        &[a, f32s(&[1, 3], &[1., 1., 2.])],
        &[2],
        &[9., 21.],
    );
    // Batches: each its own product.
    check(
        contraction(["bm", "bn", "bmn"], f, f),
        &[f32s(&[2, 1], &[2., 3.]), f32s(&[2, 2], &[1., 2., 3., 4.])],
        &[2, 1, 2],
        &[2., 4., 9., 12.],
    );
    let empty = Tensor::zeros(DType::F32, [2, 0]).unwrap();
    let other = Tensor::zeros(DType::F32, [0, 2]).unwrap();
    check(contraction(["mk", "kn", "mn"], f, f), &[empty, other], &[2, 2], &[0.; 4]);
}

#[test]
fn contractions_accumulate_in_their_type() {
    let bytes = |v: &[i64]| Tensor::from_i64s(DType::I8, &[v.len()], v).unwrap();
    let (a, b) = (bytes(&[100, 100]), bytes(&[100, 100]));
    let dot = |acc, dtype| contraction(["k", "k", ""], acc, dtype);
    check(dot(DType::I32, DType::I32), &[a.clone(), b.clone()], &[], &[20000.]);
    check(dot(DType::I8, DType::I8), &[a, b], &[], &[32.]);
    // 2048 + 1 is not a half-precision number: the sum sticks at 2048.
    let ones = Tensor::from_f64s(DType::F16, &[2], &[2048., 1.]).unwrap();
    let unit = Tensor::from_f64s(DType::F16, &[2], &[1., 1.]).unwrap();
    let half = |acc| one(dot(acc, DType::F32), &[ones.clone(), unit.clone()], Mode::Exact);
    assert_eq!(half(DType::F16)[0].to_f64s(), [2048.]);
    assert_eq!(half(DType::F32)[0].to_f64s(), [2049.]);
    // In float32 the same happens at 2^24; the oracle does not round.
    let big = [f32s(&[2], &[16777216., 1.]), f32s(&[2], &[1., 1.])];
    assert_eq!(one(dot(DType::F32, DType::F32), &big, Mode::Exact)[0].to_f64s(), [16777216.]);
    assert_eq!(one(dot(DType::F32, DType::F32), &big, Mode::F64)[0].to_f64s(), [16777217.]);
}

fn conv_attrs(stride: i64, lo: i64, hi: i64, dilation: i64, groups: i64) -> ConvAttrs {
    ConvAttrs {
        strides: vec![stride],
        pads_lo: vec![lo],
        pads_hi: vec![hi],
        dilations: vec![dilation],
        groups,
    }
}

#[test]
fn convolutions_of_one_axis() {
    let x = f32s(&[1, 1, 5], &[1., 2., 3., 4., 5.]);
    let w = f32s(&[1, 1, 3], &[1., 0., -1.]);
    let conv = |attrs| Op::Conv(attrs);
    check(conv(conv_attrs(1, 0, 0, 1, 1)), &[x.clone(), w.clone()], &[1, 1, 3], &[-2.; 3]);
    check(conv(conv_attrs(2, 1, 1, 1, 1)), &[x.clone(), w.clone()], &[1, 1, 3], &[-2., -2., 4.]);
    check(conv(conv_attrs(1, 0, 0, 2, 1)), &[x.clone(), w], &[1, 1, 1], &[-4.]);
    // Two groups: each output channel sees its own input channel. Padding wider than the data.
    let x = f32s(&[1, 2, 2], &[1., 2., 10., 20.]);
    let w = f32s(&[2, 1, 2], &[1., 1., 1., -1.]);
    check(conv(conv_attrs(1, 0, 0, 1, 2)), &[x.clone(), w.clone()], &[1, 2, 1], &[3., -10.]);
    check(
        conv(conv_attrs(1, 3, 0, 1, 2)),
        &[x.clone(), w],
        &[1, 2, 4],
        &[0., 0., 1., 3., 0., 0., -10., -10.],
    );
    // Pointwise, two samples.
    let x = f32s(&[2, 2, 1], &[1., 2., 3., 4.]);
    let w = f32s(&[3, 2, 1], &[1., 0., 0., 1., 1., 1.]);
    check(conv(conv_attrs(1, 0, 0, 1, 1)), &[x, w], &[2, 3, 1], &[1., 2., 3., 3., 4., 7.]);
}

#[test]
fn convolution_of_two_axes() {
    let x = f32s(&[1, 1, 3, 3], &[1., 2., 3., 4., 5., 6., 7., 8., 9.]);
    let w = f32s(&[1, 1, 2, 2], &[1., 2., 3., 4.]);
    let attrs = ConvAttrs {
        strides: vec![1, 2],
        pads_lo: vec![0, 1],
        pads_hi: vec![0, 0],
        dilations: vec![1, 1],
        groups: 1,
    };
    // Columns (-1, 0) and (1, 2) of rows (0, 1) and (1, 2).
    check(
        Op::Conv(attrs),
        &[x, w],
        &[1, 1, 2, 2],
        &[18., 2. + 6. + 15. + 24., 36., 5. + 12. + 24. + 36.],
    );
}

#[test]
fn pooling() {
    let x = f32s(&[1, 1, 4], &[1., 4., 2., 3.]);
    let window = |kind| {
        Op::Window(WindowAttrs {
            kind,
            kernel: vec![3],
            strides: vec![2],
            pads_lo: vec![1],
            pads_hi: vec![1],
            dilations: vec![1],
        })
    };
    check(window(WindowKind::Max), &[x.clone()], &[1, 1, 2], &[4., 4.]);
    check(window(WindowKind::Sum), &[x.clone()], &[1, 1, 2], &[5., 9.]);
    check(window(WindowKind::Mean), &[x.clone()], &[1, 1, 2], &[2.5, 3.]);
    check_near(window(WindowKind::MeanWithPad), &[x], &[1, 1, 2], &[5. / 3., 3.]);
    let bytes = Tensor::from_i64s(DType::U8, &[1, 1, 4], &[1, 200, 2, 3]).unwrap();
    check(window(WindowKind::Max), &[bytes], &[1, 1, 2], &[200., 200.]);
}

/// `score = dot * scale`.
fn scaled(scale: f64) -> Func {
    let mut f = FuncBuilder::new();
    let s = f.param("s", DType::F32);
    let c = f.constant(scale, DType::F32);
    let y = f.op(ExprOp::Mul, &[s, c]);
    f.finish(y)
}

#[test]
fn attention_with_groups_mask_and_causality() {
    // Two heads share one key/value head; keys select by large scores.
    let q = f32s(&[1, 2, 1, 2], &[100., 0., 0., 100.]);
    let k = f32s(&[1, 1, 2, 2], &[1., 0., 0., 1.]);
    let v = f32s(&[1, 1, 2, 3], &[1., 2., 3., 4., 5., 6.]);
    let op = Op::Attention(AttentionAttrs { score: scaled(1.0), causal: false, zeros: false });
    check_near(op, &[q.clone(), k.clone(), v.clone()], &[1, 2, 1, 3], &[1., 2., 3., 4., 5., 6.]);
    let op = Op::Attention(AttentionAttrs { score: scaled(0.0), causal: false, zeros: false });
    let mean = [2.5, 3.5, 4.5];
    check_near(op, &[q, k.clone(), v.clone()], &[1, 2, 1, 3], &[mean, mean].concat());
    // Causal, S = T = 2: the first position sees only itself.
    let q = f32s(&[1, 1, 2, 2], &[0.; 4]);
    let op = Op::Attention(AttentionAttrs { score: scaled(1.0), causal: true, zeros: false });
    check_near(op, &[q.clone(), k.clone(), v.clone()], &[1, 1, 2, 3], &[1., 2., 3., 2.5, 3.5, 4.5]);
    // An additive mask of -inf on the first key, broadcast.
    let op = Op::Attention(AttentionAttrs {
        score: Func::binary(ExprOp::Add, DType::F32),
        causal: false,
        zeros: false,
    });
    let mask = f32s(&[1, 1, 1, 2], &[f32::NEG_INFINITY, 0.]);
    let inputs = [q.clone(), k.clone(), v.clone(), mask];
    check_near(op, &inputs, &[1, 1, 2, 3], &[4., 5., 6., 4., 5., 6.]);
    // A row that sees nothing: 0 where the node says so.
    let op = Op::Attention(AttentionAttrs {
        score: Func::binary(ExprOp::Add, DType::F32),
        causal: false,
        zeros: true,
    });
    let low = f32::NEG_INFINITY;
    let mask = f32s(&[1, 1, 2, 2], &[low, low, low, 0.]);
    check_near(op, &[q, k, v, mask], &[1, 1, 2, 3], &[0., 0., 0., 4., 5., 6.]);
}

#[test]
fn gathers() {
    let data = f32s(&[3, 2], &[1., 2., 3., 4., 5., 6.]);
    check(Op::Gather(0), &[data.clone(), i64s(&[2], &[2, -3])], &[2, 2], &[5., 6., 1., 2.]);
    check(Op::Gather(1), &[data.clone(), i64s(&[1, 1], &[1])], &[3, 1, 1], &[2., 4., 6.]);
    check(Op::GatherElements(0), &[data.clone(), i64s(&[1, 2], &[2, 0])], &[1, 2], &[5., 2.]);
    check(
        Op::GatherNd { batch: 0 },
        &[data.clone(), i64s(&[2, 2], &[0, 1, -1, 0])],
        &[2],
        &[2., 5.],
    );
    check(Op::GatherNd { batch: 0 }, &[data.clone(), i64s(&[1, 1], &[1])], &[1, 2], &[3., 4.]);
    check(
        Op::GatherNd { batch: 1 },
        &[data.clone(), i64s(&[3, 1], &[1, 0, 1])],
        &[3],
        &[2., 3., 6.],
    );
    let error = try_one(Op::Gather(0), &[data, i64s(&[1], &[3])], Mode::Exact).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("index 3 is outside an axis of 3"), "{error}");
}

#[test]
fn scatters() {
    let data = f32s(&[3], &[1., 2., 3.]);
    let at = i64s(&[3], &[0, 0, -1]);
    let updates = f32s(&[3], &[5., 0.5, 2.]);
    let elements = |kind| Op::ScatterElements { axis: 0, kind };
    let inputs = [data, at, updates];
    check(elements(ScatterKind::Set), &inputs, &[3], &[0.5, 2., 2.]);
    check(elements(ScatterKind::Add), &inputs, &[3], &[6.5, 2., 5.]);
    check(elements(ScatterKind::Mul), &inputs, &[3], &[2.5, 2., 6.]);
    check(elements(ScatterKind::Max), &inputs, &[3], &[5., 2., 3.]);
    check(elements(ScatterKind::Min), &inputs, &[3], &[0.5, 2., 2.]);
    let nd = Op::ScatterNd { kind: ScatterKind::Set };
    check(
        nd,
        &[f32s(&[2, 2], &[1., 2., 3., 4.]), i64s(&[1, 1], &[1]), f32s(&[1, 2], &[8., 9.])],
        &[2, 2],
        &[1., 2., 8., 9.],
    );
}

#[test]
fn top_k_and_nonzero() {
    let x = f32s(&[2, 3], &[3., 1., 3., f32::NAN, -1., 5.]);
    let top = |largest| Op::TopK { axis: 1, k: Dim::new(2), largest };
    let y = one(top(true), &[x.clone()], Mode::Exact);
    assert_eq!(y[0].to_f64s()[..2], [3., 3.]);
    assert!(y[0].get_f64(2).is_nan());
    assert_eq!(y[1].to_i64s(), [0, 2, 0, 2]);
    let y = one(top(false), &[x.clone()], Mode::Exact);
    assert_eq!((y[0].to_f64s(), y[1].to_i64s()), (vec![1., 3., -1., 5.], vec![1, 0, 1, 2]));
}

#[test]
fn normalisations() {
    let bits = |x: f64| x.to_bits();
    let x = f32s(&[2, 2], &[1., 3., 0., 0.]);
    let (e1, e3) = (1f64.exp(), 3f64.exp());
    let (a, b) = (e1 / (e1 + e3), e3 / (e1 + e3));
    check_near(Op::Softmax { axis: 1, log: false }, &[x.clone()], &[2, 2], &[a, b, 0.5, 0.5]);
    let half = 0.5f64.ln();
    check_near(
        Op::Softmax { axis: 1, log: true },
        &[x.clone()],
        &[2, 2],
        &[a.ln(), b.ln(), half, half],
    );
    let column = e1 / (e1 + 1.0);
    check_near(
        Op::Softmax { axis: 0, log: false },
        &[x.clone()],
        &[2, 2],
        &[column, e3 / (e3 + 1.0), 1.0 - column, 1.0 / (e3 + 1.0)],
    );
    let (scale, bias) = (f32s(&[2], &[2., 3.]), f32s(&[2], &[10., 20.]));
    let one_std = 1.0 / (1.0f64 + 3.0).sqrt();
    check_near(
        Op::LayerNorm { axis: 1, eps: bits(3.0) },
        &[x.clone(), scale.clone(), bias.clone()],
        &[2, 2],
        &[10. - 2. * one_std, 20. + 3. * one_std, 10., 20.],
    );
    let rms = 1.0 / (5.0f64 + 4.0).sqrt();
    check_near(
        Op::RmsNorm { axis: 1, eps: bits(4.0) },
        &[x.clone(), scale.clone()],
        &[2, 2],
        &[2. * rms, 9. * rms, 0., 0.],
    );
    let (mean, variance) = (f32s(&[2], &[1., 1.]), f32s(&[2], &[4., 1.]));
    check_near(
        Op::BatchNorm { eps: bits(0.0) },
        &[x, scale.clone(), bias.clone(), mean, variance],
        &[2, 2],
        &[10., 26., 9., 17.],
    );
    let x = f32s(&[1, 2, 2], &[1., 3., 10., 10.]);
    check_near(
        Op::GroupNorm { groups: 2, eps: bits(0.0001) },
        &[x, scale, bias],
        &[1, 2, 2],
        &[10. - 2. / 1.0001f64.sqrt(), 10. + 2. / 1.0001f64.sqrt(), 20., 20.],
    );
}

#[test]
fn random_numbers_are_in_range_and_reproducible() {
    let op = |dtype| Op::Random { ty: TensorType::new(dtype, dims(&[10_000])), seed: 7 };
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let a = &one(op(dtype), &[], Mode::Exact)[0];
        assert_eq!(a, &one(op(dtype), &[], Mode::Exact)[0]);
        assert_eq!(a.to_f64s(), one(op(dtype), &[], Mode::F64)[0].to_f64s());
        let mean = a.to_f64s().iter().sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{dtype}: {mean}");
        assert!(a.to_f64s().iter().all(|x| (0.0..1.0).contains(x)));
    }
}

#[test]
fn sizes_found_while_running_bind_symbols() {
    let mut b = GraphBuilder::new("find");
    let found = b.symbol("found", Range { min: 0, max: 3 });
    let x = b.input("x", TensorType::new(DType::F32, dims(&[4])));
    let host = HostOp {
        name: "nonzero".into(),
        attrs: vec![],
        types: vec![TensorType::new(DType::I64, [Dim::new(1), found.clone()])],
    };
    let at = b.op(Op::Host(host), &[x]).unwrap();
    let at = b.reshape(at, &[found.clone()]).unwrap();
    b.output("at", at);
    let size = b.op(Op::Dims(vec![found * 2]), &[]).unwrap();
    b.output("size", size);
    let g = b.finish();
    let y = run(&g, &[f32s(&[4], &[0., 1., 0., 2.])], Mode::F64).unwrap();
    assert_eq!((y[0].to_i64s(), y[1].to_i64s()), (vec![1, 3], vec![4]));
    let error = run(&g, &[f32s(&[4], &[1.; 4])], Mode::Exact).unwrap_err();
    assert!(error.to_string().contains("found"), "{error}");
}

/// Sizes around the kernel's blocks, against the definition.
#[test]
fn contractions_of_odd_sizes() {
    for (m, n, k) in [(1, 1, 1), (17, 129, 5), (16, 128, 4), (33, 3, 7), (2, 257, 66), (5, 0, 3)] {
        let number = |i: usize| ((i * 37 + 11) % 101) as f32 - 50.0;
        let a: Vec<f32> = (0..m * k).map(number).collect();
        let b: Vec<f32> = (0..k * n).map(|i| number(i + 7)).collect();
        // Small whole numbers: every sum is exact.
        let expected: Vec<f64> = (0..m * n)
            .map(|i| (0..k).map(|s| f64::from(a[i / n * k + s] * b[s * n + i % n])).sum())
            .collect();
        let op = contraction(["mk", "kn", "mn"], DType::F32, DType::F32);
        check(op, &[f32s(&[m, k], &a), f32s(&[k, n], &b)], &[m, n], &expected);
    }
}
