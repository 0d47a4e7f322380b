//! Activation functions: one map each.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use tilewright_base::{Error, Result};

const SQRT_HALF: f64 = std::f64::consts::FRAC_1_SQRT_2;

pub(crate) fn relu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    one(cx.map(&[n.x(0)?], |p| p[0].max(0.0))?)
}

pub(crate) fn leaky_relu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 0.01)?;
    one(cx.fmap(&[n.x(0)?], |p| p[0].lt(0.0).select(p[0] * alpha, p[0]))?)
}

pub(crate) fn prelu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, slope) = (n.x(0)?, n.x(1)?);
    cx.same_dtype(&[x, slope])?;
    one(cx.map(&[x, slope], |p| p[0].lt(0.0).select(p[0] * p[1], p[0]))?)
}

pub(crate) fn thresholded_relu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 1.0)?;
    one(cx.fmap(&[n.x(0)?], |p| p[0].gt(alpha).select(p[0], 0.0))?)
}

pub(crate) fn elu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 1.0)?;
    one(cx.fmap(&[n.x(0)?], |p| p[0].lt(0.0).select(p[0].expm1() * alpha, p[0]))?)
}

pub(crate) fn celu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 1.0)?;
    one(cx.fmap(&[n.x(0)?], |p| p[0].max(0.0) + ((p[0] / alpha).expm1() * alpha).min(0.0))?)
}

pub(crate) fn selu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 1.673_263_192_176_818_8)?;
    let gamma = n.float("gamma", 1.050_701_022_148_132_3)?;
    one(cx.fmap(&[n.x(0)?], |p| p[0].gt(0.0).select(p[0] * gamma, p[0].expm1() * (alpha * gamma)))?)
}

pub(crate) fn hard_sigmoid(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (alpha, beta) = (n.float("alpha", 0.2)?, n.float("beta", 0.5)?);
    one(cx.fmap(&[n.x(0)?], |p| (p[0] * alpha + beta).clamp(0.0, 1.0))?)
}

pub(crate) fn hard_swish(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    one(cx.fmap(&[n.x(0)?], |p| p[0] * (p[0] * (1.0 / 6.0) + 0.5).clamp(0.0, 1.0))?)
}

pub(crate) fn softplus(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    // log(1 + e^x) without overflow.
    one(cx.fmap(&[n.x(0)?], |p| p[0].max(0.0) + (-p[0].abs()).exp().log1p())?)
}

pub(crate) fn softsign(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    one(cx.fmap(&[n.x(0)?], |p| p[0] / (p[0].abs() + 1.0))?)
}

pub(crate) fn mish(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    one(cx.fmap(&[n.x(0)?], |p| {
        let softplus = p[0].max(0.0) + (-p[0].abs()).exp().log1p();
        p[0] * softplus.tanh()
    })?)
}

pub(crate) fn gelu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    match n.str("approximate", "none")?.as_str() {
        "none" => one(cx.fmap(&[x], |p| p[0] * 0.5 * ((p[0] * SQRT_HALF).erf() + 1.0))?),
        "tanh" => one(cx.fmap(&[x], |p| {
            let inner =
                (p[0] + p[0] * p[0] * p[0] * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
            p[0] * 0.5 * (inner.tanh() + 1.0)
        })?),
        other => Err(Error::user(format!("Gelu approximation `{other}`"))),
    }
}

pub(crate) fn swish(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 1.0)?;
    one(cx.fmap(&[n.x(0)?], |p| p[0] * (p[0] * alpha).sigmoid())?)
}

pub(crate) fn swiglu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let alpha = n.float("alpha", 1.0)?;
    let (a, b) = (n.x(0)?, n.x(1)?);
    cx.same_dtype(&[a, b])?;
    one(cx.fmap(&[a, b], |p| p[0] * (p[0] * alpha).sigmoid() * p[1])?)
}

pub(crate) fn shrink(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (bias, lambd) = (n.float("bias", 0.0)?, n.float("lambd", 0.5)?);
    let x = n.x(0)?;
    let dtype = cx.dtype(x);
    let compute = if dtype.is_float() { dtype.compute() } else { tilewright_base::DType::F32 };
    one(cx.map_as(&[x], compute, dtype, |p| {
        let low = p[0].lt(-lambd).select(p[0] + bias, 0.0);
        p[0].gt(lambd).select(p[0] - bias, low)
    })?)
}
