//! How long the oracle takes on a sentence encoder of MiniLM's size (6 layers, 384 wide, batch 8
//! of 32 tokens) and on one ResNet-50 stage: `cargo run --release -p tilewright-interp --example
//! oracle_speed`.

use std::time::Instant;
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::Func;
use tilewright_graph::{AttentionAttrs, ConvAttrs, Graph, GraphBuilder, Op, TensorType, ValueId};
use tilewright_interp::{Mode, run};
use tilewright_layout::Dim;

const F: DType = DType::F32;

fn weights(b: &mut GraphBuilder, shape: &[usize]) -> Result<ValueId> {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 16) as f32 / 1e6 - 0.03)
        .collect();
    Ok(b.constant("", Tensor::from_slice(shape, &values)?))
}

fn linear(b: &mut GraphBuilder, x: ValueId, from: usize, to: usize) -> Result<ValueId> {
    let (w, bias) = (weights(b, &[from, to])?, weights(b, &[to])?);
    let y = b.contract("bsk,kn->bsn", x, w)?;
    b.map_text("{ x, b -> x + b }", &[y, bias])
}

fn encoder() -> Result<Graph> {
    let mut b = GraphBuilder::new("encoder");
    let dims = |d: &[i64]| d.iter().map(|&d| Dim::new(d)).collect::<Vec<_>>();
    let ids = b.input("ids", TensorType::new(DType::I64, dims(&[8, 32])));
    let table = weights(&mut b, &[30522, 384])?;
    let mut x = b.op(Op::Gather(0), &[table, ids])?;
    for _ in 0..6 {
        let mut heads = Vec::new();
        for _ in 0..3 {
            let y = linear(&mut b, x, 384, 384)?;
            let y = b.reshape(y, &dims(&[8, 32, 12, 32]))?;
            heads.push(b.permute(y, &[0, 2, 1, 3])?);
        }
        let score = Func::parse("{ s -> s * 0.176776695 }", &[F])?;
        let a =
            b.op(Op::Attention(AttentionAttrs { score, causal: false, zeros: false }), &heads)?;
        let a = b.permute(a, &[0, 2, 1, 3])?;
        let a = b.reshape(a, &dims(&[8, 32, 384]))?;
        let a = linear(&mut b, a, 384, 384)?;
        x = b.map_text("{ x, a -> x + a }", &[x, a])?;
        let (s, t) = (weights(&mut b, &[384])?, weights(&mut b, &[384])?);
        x = b.op(Op::LayerNorm { axis: 2, eps: 1e-12f64.to_bits() }, &[x, s, t])?;
        let h = linear(&mut b, x, 384, 1536)?;
        let h = b.map_text("{ x -> gelu(x) }", &[h])?;
        let h = linear(&mut b, h, 1536, 384)?;
        x = b.map_text("{ x, a -> x + a }", &[x, h])?;
        x = b.op(Op::LayerNorm { axis: 2, eps: 1e-12f64.to_bits() }, &[x, s, t])?;
    }
    b.output("y", x);
    Ok(b.finish())
}

/// Four 3x3 convolutions over 128 channels of 28x28.
fn convolutions() -> Result<Graph> {
    let mut b = GraphBuilder::new("convolutions");
    let mut x = b.input("x", TensorType::new(F, [1, 128, 28, 28].map(Dim::new)));
    for _ in 0..4 {
        let w = weights(&mut b, &[128, 128, 3, 3])?;
        let two = |v: i64| vec![v; 2];
        let attrs = ConvAttrs {
            strides: two(1),
            pads_lo: two(1),
            pads_hi: two(1),
            dilations: two(1),
            groups: 1,
        };
        x = b.op(Op::Conv(attrs), &[x, w])?;
    }
    b.output("y", x);
    Ok(b.finish())
}

fn main() -> Result<()> {
    let ids: Vec<i64> = (0..256).map(|i| i * 97 % 30522).collect();
    let cases = [
        ("encoder", encoder()?, Tensor::from_slice(&[8, 32], &ids)?),
        ("convolutions", convolutions()?, Tensor::zeros(F, [1, 128, 28, 28])?),
    ];
    for (name, graph, input) in cases {
        for mode in [Mode::F64, Mode::Exact] {
            let start = Instant::now();
            run(&graph, std::slice::from_ref(&input), mode)?;
            println!("{name} {mode:?}: {:.2} s", start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}
