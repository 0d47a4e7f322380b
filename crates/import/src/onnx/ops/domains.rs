//! The few operators of other domains: `ai.onnx.ml` and `ai.onnx.preview.training`.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Op, ValueId};
use tilewright_layout::{Dim, numel};

pub(crate) fn array_feature_extractor(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index) = (n.x(0)?, n.x(1)?);
    let rank = cx.rank(x);
    let count = numel(&cx.shape(index));
    let index = cx.reshape(index, &[count])?;
    if rank == 0 {
        return Err(Error::user("features of a scalar"));
    }
    let v = cx.op(Op::Gather(rank - 1), &[x, index])?;
    one(if rank == 1 { cx.unsqueeze(v, &[0])? } else { v })
}

pub(crate) fn binarizer(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let threshold = n.float("threshold", 0.0)?;
    let x = n.x(0)?;
    let dtype = cx.dtype(x);
    one(cx.map(&[x], |p| p[0].gt(threshold).cast(dtype))?)
}

/// Operands R, T, then as many X, G and states as there are tensors to optimise.
fn groups(n: &N<'_>, states: usize) -> Result<(ValueId, ValueId, Vec<Vec<ValueId>>)> {
    let all = n.all()?;
    let count = all.len().saturating_sub(2) / (2 + states);
    if count == 0 || all.len() != 2 + count * (2 + states) {
        return Err(Error::user(format!("{} operands", all.len())));
    }
    let list = (0..count).map(|i| (0..2 + states).map(|s| all[2 + s * count + i]).collect());
    Ok((all[0], all[1], list.collect()))
}

/// Results: all first ones, then all second ones, and so on.
fn transposed(rows: Vec<Vec<ValueId>>) -> Vec<Val> {
    let width = rows.first().map_or(0, Vec::len);
    (0..width).flat_map(|i| rows.iter().map(move |r| Val::T(r[i])).collect::<Vec<_>>()).collect()
}

/// A scalar in a type.
fn scalar(cx: &mut Cx, v: ValueId, dtype: DType) -> Result<ValueId> {
    let v = cx.cast(v, dtype)?;
    cx.reshape(v, &[] as &[Dim])
}

pub(crate) fn adagrad(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (r, t, list) = groups(n, 1)?;
    let (eps, decay) = (n.float("epsilon", 1e-6)?, n.float("decay_factor", 0.0)?);
    let norm = n.float("norm_coefficient", 0.0)?;
    let mut out = Vec::new();
    for row in list {
        let &[x, g, h] = row.as_slice() else { return Err(Error::bug("three operands")) };
        cx.same_dtype(&[x, g, h])?;
        let dtype = cx.dtype(x);
        let (r, t) = (scalar(cx, r, dtype)?, scalar(cx, t, dtype)?);
        let g = cx.fmap(&[g, x], |p| p[0] + p[1] * norm)?;
        let h = cx.fmap(&[h, g], |p| p[0] + p[1] * p[1])?;
        let x = cx.fmap(&[x, g, h, r, t], |p| {
            let rate = p[3] / (p[4] * decay + 1.0);
            p[0] - rate * p[1] / (p[2].sqrt() + eps)
        })?;
        out.push(vec![x, h]);
    }
    Ok(transposed(out))
}

pub(crate) fn adam(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (r, t, list) = groups(n, 2)?;
    let (alpha, beta) =
        (n.float("alpha", f64::from(0.9f32))?, n.float("beta", f64::from(0.999f32))?);
    let eps = n.float("epsilon", 1e-6)?;
    let norm = n.float("norm_coefficient", 0.0)?;
    let after = n.float("norm_coefficient_post", 0.0)?;
    let mut out = Vec::new();
    for row in list {
        let &[x, g, v, h] = row.as_slice() else { return Err(Error::bug("four operands")) };
        cx.same_dtype(&[x, g, v, h])?;
        let dtype = cx.dtype(x);
        let (r, t) = (scalar(cx, r, dtype)?, scalar(cx, t, dtype)?);
        let g = cx.fmap(&[g, x], |p| p[0] + p[1] * norm)?;
        let v = cx.fmap(&[v, g], |p| p[0] * alpha + p[1] * (1.0 - alpha))?;
        let h = cx.fmap(&[h, g], |p| p[0] * beta + p[1] * p[1] * (1.0 - beta))?;
        let x = cx.fmap(&[x, v, h, r, t], |p| {
            let one = p[4].number(1.0);
            let adjusted = p[3] * (one - one.number(beta).pow(p[4])).sqrt()
                / (one - one.number(alpha).pow(p[4]));
            let rate = p[4].gt(0.0).select(adjusted, p[3]);
            (p[0] - rate * p[1] / (p[2].sqrt() + eps)) * (1.0 - after)
        })?;
        out.push(vec![x, v, h]);
    }
    Ok(transposed(out))
}

pub(crate) fn momentum(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (r, t, list) = groups(n, 1)?;
    let (alpha, beta) = (n.float("alpha", 0.0)?, n.float("beta", 0.0)?);
    let norm = n.float("norm_coefficient", 0.0)?;
    let nesterov = n.str("mode", "standard")? == "nesterov";
    let mut out = Vec::new();
    for row in list {
        let &[x, g, v] = row.as_slice() else { return Err(Error::bug("three operands")) };
        cx.same_dtype(&[x, g, v])?;
        let dtype = cx.dtype(x);
        let (r, t) = (scalar(cx, r, dtype)?, scalar(cx, t, dtype)?);
        let g = cx.fmap(&[g, x], |p| p[0] + p[1] * norm)?;
        let v = cx.fmap(&[v, g, t], |p| {
            // The first step takes the whole gradient.
            let weight = p[2].gt(0.0).select(p[2].number(beta), 1.0);
            p[0] * alpha + p[1] * weight
        })?;
        let x = cx.fmap(&[x, g, v, r], |p| {
            let step = if nesterov { p[1] + p[2] * alpha } else { p[2] };
            p[0] - p[3] * step
        })?;
        out.push(vec![x, v]);
    }
    Ok(transposed(out))
}
