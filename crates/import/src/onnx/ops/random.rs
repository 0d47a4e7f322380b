//! Random numbers, from our own counter-based generator: reproducible, not those of other runtimes.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Op, TensorType, ValueId};
use tilewright_layout::Dim;

fn seed(cx: &Cx, n: &N<'_>) -> Result<u64> {
    // Nodes without a seed get one from their place, so that they differ from each other.
    Ok(match n.float_opt("seed")? {
        Some(s) => s.to_bits(),
        None => cx.b.graph().nodes.len() as u64 + 1,
    })
}

fn uniform(cx: &mut Cx, shape: &[Dim], seed: u64) -> Result<ValueId> {
    cx.op(Op::Random { ty: TensorType::new(DType::F32, shape), seed }, &[])
}

/// The shape attribute, or the shape of the operand for the `Like` forms.
fn target(cx: &Cx, n: &N<'_>, like: bool) -> Result<(Vec<Dim>, DType)> {
    if like {
        let x = n.x(0)?;
        return Ok((cx.shape(x), n.dtype("dtype")?.unwrap_or(cx.dtype(x))));
    }
    let shape = n.ints("shape")?.unwrap_or_default();
    if shape.iter().any(|&d| d < 0) {
        return Err(Error::user(format!("shape {shape:?}")));
    }
    let dtype = n.dtype("dtype")?.unwrap_or(DType::F32);
    Ok((shape.into_iter().map(Dim::new).collect(), dtype))
}

pub(crate) fn random_uniform(cx: &mut Cx, n: &N<'_>, like: bool) -> Result<Vec<Val>> {
    let (shape, dtype) = target(cx, n, like)?;
    let (low, high) = (n.float("low", 0.0)?, n.float("high", 1.0)?);
    let u = uniform(cx, &shape, seed(cx, n)?)?;
    one(cx.map_as(&[u], DType::F32, dtype, |p| p[0] * (high - low) + low)?)
}

pub(crate) fn random_normal(cx: &mut Cx, n: &N<'_>, like: bool) -> Result<Vec<Val>> {
    let (shape, dtype) = target(cx, n, like)?;
    let (mean, scale) = (n.float("mean", 0.0)?, n.float("scale", 1.0)?);
    let seed = seed(cx, n)?;
    let u = uniform(cx, &shape, seed)?;
    let v = uniform(cx, &shape, seed ^ 0x9e37_79b9_7f4a_7c15)?;
    // Box and Muller; 1 - u is never 0.
    one(cx.map_as(&[u, v], DType::F32, dtype, |p| {
        let r = ((p[0].number(1.0) - p[0]).log() * -2.0).sqrt();
        r * (p[1] * (2.0 * std::f64::consts::PI)).cos() * scale + mean
    })?)
}

pub(crate) fn bernoulli(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    cx.float(x)?;
    let dtype = n.dtype("dtype")?.unwrap_or(cx.dtype(x));
    let shape = cx.shape(x);
    let u = uniform(cx, &shape, seed(cx, n)?)?;
    let x = cx.cast(x, DType::F32)?;
    one(cx.map(&[u, x], |p| p[0].lt(p[1]).cast(dtype))?)
}
