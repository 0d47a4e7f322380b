//! Graphs that several tests share.

mod numbers;

pub(crate) use numbers::numbers;

use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{FuncBuilder, Op as ExprOp};
use tilewright_graph::{
    ConvAttrs, Graph, GraphBuilder, Op, TensorType, ValueId, WindowAttrs, WindowKind,
};
use tilewright_layout::{Dim, Range};

/// A convolution over two spatial axes.
pub(crate) fn conv(stride: i64, pad: i64, groups: i64) -> Op {
    Op::Conv(ConvAttrs {
        strides: vec![stride; 2],
        pads_lo: vec![pad; 2],
        pads_hi: vec![pad; 2],
        dilations: vec![1; 2],
        groups,
    })
}

/// Two residual blocks as in ResNet and MobileNet: 3x3 and strided 1x1 convolutions with bias, residual and activation,
/// dilated ones, a depthwise one, pooling, a classifier. Input `x: [N, 3, 13, 10]`.
pub(crate) fn residual_network() -> Graph {
    let mut b = GraphBuilder::new("residual");
    let n = b.symbol("N", Range { min: 1, max: 8 });
    let shape = [n, Dim::new(3), Dim::new(13), Dim::new(10)];
    let x = b.input("x", TensorType::new(DType::F32, shape.to_vec()));
    let mut seed = 0;
    let mut layer = |b: &mut GraphBuilder, x: ValueId, shape: [usize; 4], op: Op| {
        seed += 1;
        let scale = 1.0 / (shape[1] * shape[2] * shape[3]) as f64;
        let values: Vec<f64> =
            numbers(&shape, seed).to_f64s().iter().map(|v| v * 4.0 * scale.sqrt()).collect();
        let w =
            b.constant(format!("w{seed}"), Tensor::from_f64s(DType::F32, &shape, &values).unwrap());
        let bias = b.constant(format!("b{seed}"), numbers(&[1, shape[0], 1, 1], seed + 50));
        let y = b.op(op, &[x, w]).unwrap();
        b.binary(ExprOp::Add, y, bias).unwrap()
    };
    let relu = |b: &mut GraphBuilder, x: ValueId| {
        let mut f = FuncBuilder::new();
        let v = f.param("x", DType::F32);
        let zero = f.constant(0.0, DType::F32);
        let y = f.op(ExprOp::Max, &[v, zero]);
        b.op(Op::Map(f.finish(y)), &[x]).unwrap()
    };
    let y = layer(&mut b, x, [16, 3, 3, 3], conv(1, 1, 1));
    let x = relu(&mut b, y);
    let pool = WindowAttrs {
        kind: WindowKind::Max,
        kernel: vec![3; 2],
        strides: vec![1; 2],
        pads_lo: vec![1; 2],
        pads_hi: vec![1; 2],
        dilations: vec![1; 2],
    };
    let x = b.op(Op::Window(pool), &[x]).unwrap();
    // 3x3, then 3x3 and the residual.
    let y = layer(&mut b, x, [24, 16, 3, 3], conv(1, 1, 1));
    let y = relu(&mut b, y);
    let y = layer(&mut b, y, [16, 24, 3, 3], conv(1, 1, 1));
    let y = b.binary(ExprOp::Add, y, x).unwrap();
    let x = relu(&mut b, y);
    // Depthwise, a dilated one, and a strided one with a strided skip.
    let y = layer(&mut b, x, [16, 1, 5, 5], conv(1, 2, 16));
    let y = relu(&mut b, y);
    let dilated = Op::Conv(ConvAttrs {
        strides: vec![1, 1],
        pads_lo: vec![2, 1],
        pads_hi: vec![2, 2],
        dilations: vec![2, 1],
        groups: 1,
    });
    let y = layer(&mut b, y, [24, 16, 3, 4], dilated);
    let y = layer(&mut b, y, [32, 24, 3, 3], conv(2, 1, 1));
    let skip = layer(&mut b, x, [32, 16, 1, 1], conv(2, 0, 1));
    let y = b.binary(ExprOp::Add, y, skip).unwrap();
    let x = relu(&mut b, y);
    let sum = Op::Reduce { kind: tilewright_graph::ReduceKind::Sum, axes: vec![2, 3], keep: false };
    let x = b.op(sum, &[x]).unwrap();
    let w = b.constant("classes", numbers(&[32, 5], 99));
    let y = b.contract("nc,ck->nk", x, w).unwrap();
    b.output("y", y);
    b.finish()
}

/// Squeeze and excitation: channels are scaled by what their means make, in front of a 1x1 convolution with a residual. Input
/// `x: [N, 16, 6, 5]`, `channels` in between.
pub(crate) fn squeeze_network(channels: usize) -> Graph {
    let mut b = GraphBuilder::new("squeeze");
    let n = b.symbol("N", Range { min: 1, max: 8 });
    let shape = [n, Dim::new(16), Dim::new(6), Dim::new(5)];
    let x = b.input("x", TensorType::new(DType::F32, shape.to_vec()));
    let mut seed = 0;
    let mut layer = |b: &mut GraphBuilder, x: ValueId, to: usize, from: usize| {
        seed += 1;
        let shape = [to, from, 1, 1];
        let scale = 4.0 / (from as f64).sqrt();
        let values: Vec<f64> = numbers(&shape, seed).to_f64s().iter().map(|v| v * scale).collect();
        let w =
            b.constant(format!("w{seed}"), Tensor::from_f64s(DType::F32, &shape, &values).unwrap());
        b.op(conv(1, 0, 1), &[x, w]).unwrap()
    };
    let x = layer(&mut b, x, 16, 16);
    let wide = layer(&mut b, x, channels, 16);
    let wide = b.unary(ExprOp::Tanh, wide).unwrap();
    let sum = Op::Reduce { kind: tilewright_graph::ReduceKind::Sum, axes: vec![2, 3], keep: true };
    let mean = b.op(sum.clone(), &[wide]).unwrap();
    let few = layer(&mut b, mean, 8, channels);
    let few = b.unary(ExprOp::Tanh, few).unwrap();
    let scale = layer(&mut b, few, channels, 8);
    let scale = b.unary(ExprOp::Sigmoid, scale).unwrap();
    let scaled = b.binary(ExprOp::Mul, wide, scale).unwrap();
    let y = layer(&mut b, scaled, 16, channels);
    let y = b.binary(ExprOp::Add, y, x).unwrap();
    let y = b.op(sum, &[y]).unwrap();
    b.output("y", y);
    b.finish()
}
