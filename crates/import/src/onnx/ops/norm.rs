//! Softmax and normalisations.

use super::super::cx::Cx;
use super::super::node::{N, Val, axes, one};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Op, ReduceKind, ValueId, WindowAttrs, WindowKind};
use tilewright_layout::{Dim, numel};

fn epsilon(n: &N<'_>) -> Result<f64> {
    let eps = n.float("epsilon", f64::from(1e-5f32))?;
    if eps.is_finite() && eps >= 0.0 {
        return Ok(eps);
    }
    Err(Error::user(format!("an epsilon of {eps}")))
}

pub(crate) fn softmax(cx: &mut Cx, n: &N<'_>, log: bool) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    cx.float(x)?;
    let dims = cx.shape(x);
    if n.opset >= 13 {
        let axis = n.axis("axis", -1, dims.len())?;
        return one(cx.op(Op::Softmax { axis, log }, &[x])?);
    }
    // Up to opset 12 the tensor is seen as a matrix, cut at `axis`.
    let axis = n.axis("axis", 1, dims.len())?;
    if axis + 1 == dims.len() {
        return one(cx.op(Op::Softmax { axis, log }, &[x])?);
    }
    let v = cx.reshape(x, &[numel(&dims[..axis]), numel(&dims[axis..])])?;
    let v = cx.op(Op::Softmax { axis: 1, log }, &[v])?;
    one(cx.reshape(v, &dims)?)
}

pub(crate) fn hardmax(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let (v, axis) = if n.opset >= 13 {
        (x, n.axis("axis", -1, dims.len())?)
    } else {
        let axis = n.axis("axis", 1, dims.len())?;
        (cx.reshape(x, &[numel(&dims[..axis]), numel(&dims[axis..])])?, 1)
    };
    let arg = Op::ArgReduce { kind: ReduceKind::Max, axis, keep: true, last: false };
    let best = cx.op(arg, &[v])?;
    let seen = cx.shape(v);
    let counter = cx.iota(DType::I64, seen.len(), axis, &seen[axis])?;
    let dtype = cx.dtype(x);
    let hot = cx.map(&[best, counter], |p| p[0].eq(p[1]).cast(dtype))?;
    one(cx.reshape(hot, &dims)?)
}

pub(crate) fn layer_norm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, scale, bias) = (n.x(0)?, n.x(1)?, n.opt(2)?);
    cx.float(x)?;
    let rank = cx.rank(x);
    let axis = n.axis("axis", -1, rank)?;
    let eps = epsilon(n)?;
    let mut operands = vec![x, scale];
    operands.extend(bias);
    let y = cx.op(Op::LayerNorm { axis, eps: eps.to_bits() }, &operands)?;
    let mut out = vec![Val::T(y)];
    if n.wants(1) || n.wants(2) {
        let stash = n.dtype("stash_type")?.unwrap_or(DType::F32);
        let over: Vec<usize> = (axis..rank).collect();
        let wide = cx.cast(x, stash)?;
        let mean = cx.mean(wide, &over, true)?;
        let off = cx.sub(wide, mean)?;
        let square = cx.mul(off, off)?;
        let var = cx.mean(square, &over, true)?;
        let inv = cx.fmap(&[var], |p| p[0].number(1.0) / (p[0] + eps).sqrt())?;
        out.extend([Val::T(mean), Val::T(inv)]);
    }
    Ok(out)
}

pub(crate) fn rms_norm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, scale) = (n.x(0)?, n.x(1)?);
    cx.float(x)?;
    let axis = n.axis("axis", -1, cx.rank(x))?;
    let eps = epsilon(n)?;
    one(cx.op(Op::RmsNorm { axis, eps: eps.to_bits() }, &[x, scale])?)
}

pub(crate) fn batch_norm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let eps = epsilon(n)?;
    let dtype = cx.dtype(x);
    let mut params = Vec::new();
    for i in 1..5 {
        params.push(cx.cast(n.x(i)?, dtype)?);
    }
    let &[scale, bias, mean, var] = params.as_slice() else {
        return Err(Error::bug("four parameters"));
    };
    if !n.flag("training_mode", false)? {
        let op = Op::BatchNorm { eps: eps.to_bits() };
        return one(cx.op(op, &[x, scale, bias, mean, var])?);
    }
    let momentum = n.float("momentum", f64::from(0.9f32))?;
    let over: Vec<usize> = (0..cx.rank(x)).filter(|&a| a != 1).collect();
    let now_mean = cx.mean(x, &over, true)?;
    let off = cx.sub(x, now_mean)?;
    let square = cx.mul(off, off)?;
    let now_var = cx.mean(square, &over, true)?;
    let Some(channels) = cx.shape(x).get(1).cloned() else {
        return Err(Error::user(format!("batch normalisation of {}", cx.ty(x))));
    };
    let now_mean = cx.reshape(now_mean, std::slice::from_ref(&channels))?;
    let now_var = cx.reshape(now_var, &[channels])?;
    let op = Op::BatchNorm { eps: eps.to_bits() };
    let y = cx.op(op, &[x, scale, bias, now_mean, now_var])?;
    let (old_mean, old_var) = (n.x(3)?, n.x(4)?);
    let mut out = vec![Val::T(y)];
    for (old, now) in [(old_mean, now_mean), (old_var, now_var)] {
        let now = cx.cast(now, cx.dtype(old))?;
        let mixed = cx.fmap(&[old, now], |p| p[0] * momentum + p[1] * (1.0 - momentum))?;
        out.push(Val::T(mixed));
    }
    Ok(out)
}

pub(crate) fn instance_norm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, scale, bias) = (n.x(0)?, n.x(1)?, n.x(2)?);
    let eps = epsilon(n)?;
    let channels = cx.shape(scale).first().cloned().unwrap_or_default();
    let groups = cx.static_dim(&channels, "InstanceNormalization")?;
    one(cx.op(Op::GroupNorm { groups, eps: eps.to_bits() }, &[x, scale, bias])?)
}

pub(crate) fn group_norm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, mut scale, mut bias) = (n.x(0)?, n.x(1)?, n.x(2)?);
    let eps = epsilon(n)?;
    let groups = n.int("num_groups", 1)?;
    let channels = cx.shape(x).get(1).cloned().unwrap_or_default();
    // Up to opset 20 scale and bias are per group.
    if n.opset < 21 && cx.shape(scale) != [channels.clone()] {
        let each = channels.floor_div(&Dim::new(groups.max(1)));
        for v in [&mut scale, &mut bias] {
            *v = cx.unsqueeze(*v, &[1])?;
            *v = cx.expand(*v, &[Dim::new(groups), each.clone()])?;
            *v = cx.reshape(*v, std::slice::from_ref(&channels))?;
        }
    }
    one(cx.op(Op::GroupNorm { groups, eps: eps.to_bits() }, &[x, scale, bias])?)
}

pub(crate) fn lp_norm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let axis = n.axis("axis", -1, cx.rank(x))?;
    let p_norm = n.int("p", 2)?;
    let v = cx.fmap(&[x], |p| if p_norm == 1 { p[0].abs() } else { p[0] * p[0] })?;
    let v = cx.reduce(ReduceKind::Sum, v, &[axis], true)?;
    // A zero vector stays zero.
    one(cx.fmap(&[x, v], |p| {
        let norm = if p_norm == 1 { p[1] } else { p[1].sqrt() };
        norm.eq(0.0).select(p[0].number(0.0), p[0] / norm)
    })?)
}

pub(crate) fn lrn(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    if dims.len() < 3 {
        return Err(Error::user(format!("LRN of {}", cx.ty(x))));
    }
    let size = n.int("size", 1)?;
    let (alpha, beta) = (n.float("alpha", 1e-4)?, n.float("beta", 0.75)?);
    let bias = n.float("bias", 1.0)?;
    let square = cx.mul(x, x)?;
    // The window slides over channels: [N, C, rest] is seen as [N, 1, C, rest].
    let rest = numel(&dims[2..]);
    let v = cx.reshape(square, &[dims[0].clone(), Dim::new(1), dims[1].clone(), rest])?;
    let lo = (size - 1) / 2;
    let attrs = WindowAttrs {
        kind: WindowKind::Sum,
        kernel: vec![size, 1],
        strides: vec![1, 1],
        pads_lo: vec![lo, 0],
        pads_hi: vec![size - 1 - lo, 0],
        dilations: vec![1, 1],
    };
    let v = cx.op(Op::Window(attrs), &[v])?;
    let v = cx.reshape(v, &dims)?;
    one(cx.fmap(&[x, v], |p| p[0] / (p[1] * (alpha / size as f64) + bias).pow(beta))?)
}

pub(crate) fn mvn(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let over = axes(&n.ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]), cx.rank(x))?;
    let mean = cx.mean(x, &over, true)?;
    let off = cx.sub(x, mean)?;
    let square = cx.mul(off, off)?;
    let var = cx.mean(square, &over, true)?;
    one(cx.fmap(&[off, var], |p| p[0] / (p[1].sqrt() + 1e-9))?)
}

/// `x` itself, and a mask of `true`, when not training.
pub(crate) fn dropout(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    if let Some(v) = n.opt(2)?
        && cx.const_int(v, "training_mode")? != 0
    {
        let ratio = match n.opt(1)? {
            Some(v) => cx.const_float(v, "ratio")?,
            None => 0.5,
        };
        if ratio != 0.0 {
            return Err(Error::unsupported("dropout in training"));
        }
    }
    let mut out = vec![Val::T(x)];
    if n.wants(1) {
        let dims = cx.shape(x);
        let mask: ValueId = cx.full(DType::Bool, 1.0, &dims)?;
        out.push(Val::T(mask));
    }
    Ok(out)
}
