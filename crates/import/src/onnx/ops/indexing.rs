//! Gathers, scatters, top-k.

use super::super::cx::Cx;
use super::super::node::{N, Val, axis, one};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{HostAttr, Op, PadMode, ScatterKind, TensorType, ValueId};
use tilewright_layout::{Dim, numel};

/// Indices as `i64`, negative ones counted from the end of an axis of this size.
fn wrapped(cx: &mut Cx, index: ValueId, size: &Dim) -> Result<ValueId> {
    let index = cx.cast(index, DType::I64)?;
    let size = cx.dim_scalar(size, DType::I64)?;
    cx.map(&[index, size], |p| p[0].lt(0.0).select(p[0] + p[1], p[0]))
}

pub(crate) fn gather(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index) = (n.x(0)?, n.x(1)?);
    let axis = n.axis("axis", 0, cx.rank(x))?;
    one(cx.op(Op::Gather(axis), &[x, index])?)
}

pub(crate) fn gather_elements(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index) = (n.x(0)?, n.x(1)?);
    let axis = n.axis("axis", 0, cx.rank(x))?;
    let size = cx.shape(x)[axis].clone();
    let index = wrapped(cx, index, &size)?;
    one(cx.op(Op::GatherElements(axis), &[x, index])?)
}

pub(crate) fn gather_nd(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index) = (n.x(0)?, n.x(1)?);
    let batch = usize::try_from(n.int("batch_dims", 0)?)
        .map_err(|_| Error::user("a negative number of batch axes"))?;
    one(cx.op(Op::GatherNd { batch }, &[x, index])?)
}

fn kind(n: &N<'_>) -> Result<ScatterKind> {
    Ok(match n.str("reduction", "none")?.as_str() {
        "none" => ScatterKind::Set,
        "add" => ScatterKind::Add,
        "mul" => ScatterKind::Mul,
        "max" => ScatterKind::Max,
        "min" => ScatterKind::Min,
        other => return Err(Error::user(format!("scatter reduction `{other}`"))),
    })
}

pub(crate) fn scatter_elements(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index, updates) = (n.x(0)?, n.x(1)?, n.x(2)?);
    let axis = n.axis("axis", 0, cx.rank(x))?;
    let size = cx.shape(x)[axis].clone();
    let index = wrapped(cx, index, &size)?;
    one(cx.op(Op::ScatterElements { axis, kind: kind(n)? }, &[x, index, updates])?)
}

pub(crate) fn scatter_nd(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index, updates) = (n.x(0)?, n.x(1)?, n.x(2)?);
    one(cx.op(Op::ScatterNd { kind: kind(n)? }, &[x, index, updates])?)
}

pub(crate) fn tensor_scatter(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (cache, update) = (n.x(0)?, n.x(1)?);
    let dims = cx.shape(cache);
    let rank = dims.len();
    let axis = n.axis("axis", -2, rank)?;
    let count = cx.shape(update).get(axis).cloned().unwrap_or_default();
    let mut index = cx.iota(DType::I64, rank, axis, &count)?;
    if let Some(at) = n.opt(2)? {
        let at = cx.cast(at, DType::I64)?;
        let at = cx.along(at, 0, rank)?;
        index = cx.add(index, at)?;
    }
    if n.str("mode", "linear")? == "circular" {
        let size = cx.dim_scalar(&dims[axis], DType::I64)?;
        index = cx.map(&[index, size], |p| p[0].modulo(p[1]))?;
    }
    let shape = cx.shape(update);
    let index = cx.expand(index, &shape)?;
    one(cx.op(Op::ScatterElements { axis, kind: ScatterKind::Set }, &[cache, index, update])?)
}

pub(crate) fn top_k(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let axis = n.axis("axis", -1, cx.rank(x))?;
    let k = match n.int_opt("k")? {
        Some(k) => Dim::new(k),
        None => {
            let k = cx.ints(n.x(1)?, "k")?;
            k.first().cloned().ok_or_else(|| Error::user("TopK without k"))?
        }
    };
    let largest = n.flag("largest", true)?;
    Ok(cx.node(Op::TopK { axis, k, largest }, &[x])?.into_iter().map(Val::T).collect())
}

pub(crate) fn max_unpool(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, index) = (n.x(0)?, n.x(1)?);
    let dims = cx.shape(x);
    let spatial = dims.len().saturating_sub(2);
    let kernel = n.ints("kernel_shape")?.unwrap_or_default();
    let strides = n.ints("strides")?.unwrap_or_else(|| vec![1; spatial]);
    let pads = n.ints("pads")?.unwrap_or_else(|| vec![0; 2 * spatial]);
    if kernel.len() != spatial || strides.len() != spatial || pads.len() != 2 * spatial {
        return Err(Error::user("kernel, strides or pads do not fit the number of axes"));
    }
    // The indices count positions of the tensor that pooling read.
    if dims.len() < 3 {
        return Err(Error::user(format!("MaxUnpool of {}", cx.ty(x))));
    }
    let mut pooled = dims[..2].to_vec();
    for i in 0..spatial {
        let size = (&dims[i + 2] - 1) * strides[i] + kernel[i] - pads[i] - pads[i + spatial];
        pooled.push(size);
    }
    let dtype = cx.dtype(x);
    let count = numel(&dims);
    let zeros = cx.full(dtype, 0.0, &[numel(&pooled)])?;
    let (flat, index) =
        (cx.reshape(x, std::slice::from_ref(&count))?, cx.reshape(index, &[count])?);
    let v =
        cx.op(Op::ScatterElements { axis: 0, kind: ScatterKind::Set }, &[zeros, index, flat])?;
    let v = cx.reshape(v, &pooled)?;
    let Some(out) = n.opt(2)? else { return one(v) };
    // A larger output has zeros behind.
    let out = cx.ints(out, "output_shape")?;
    if out.len() != pooled.len() {
        return Err(Error::user(format!("an output shape of {} axes", out.len())));
    }
    let hi: Vec<Dim> = out.iter().zip(&pooled).map(|(o, p)| o - p).collect();
    let zero = match dtype.is_float() {
        true => tilewright_expr::Value::Float(0.0),
        false => tilewright_expr::Value::Int(0),
    };
    let lo = vec![Dim::new(0); hi.len()];
    one(cx.op(Op::Pad { lo, hi, mode: PadMode::Constant(zero) }, &[v])?)
}

pub(crate) fn unique(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let (dims, dtype) = (cx.shape(x), cx.dtype(x));
    let sorted = n.int("sorted", 1)?;
    let mut attrs = vec![("sorted", HostAttr::Int(sorted))];
    let (mut shape, count) = match n.int_opt("axis")? {
        Some(a) => {
            let a = axis(a, dims.len())?;
            attrs.push(("axis", HostAttr::Int(a as i64)));
            (dims.clone(), (a, dims[a].clone()))
        }
        None => (vec![Dim::new(0)], (0, numel(&dims))),
    };
    let (at, count) = count;
    let found = cx.unbacked("unique", &count);
    shape[at] = found.clone();
    let list = |d: &Dim| TensorType::new(DType::I64, vec![d.clone()]);
    let types = vec![TensorType::new(dtype, shape), list(&found), list(&count), list(&found)];
    Ok(cx.host("unique", &[x], &attrs, types)?.into_iter().map(Val::T).collect())
}

pub(crate) fn non_max_suppression(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (boxes, scores) = (n.x(0)?, n.x(1)?);
    let mut ops = vec![boxes, scores];
    for (i, dtype) in [(2, DType::I64), (3, DType::F32), (4, DType::F32)] {
        // An absent score threshold lets everything pass.
        let absent = if i == 4 { f64::NEG_INFINITY } else { 0.0 };
        let v = match n.opt(i)? {
            Some(v) => v,
            None => cx.scalar(dtype, absent),
        };
        ops.push(cx.cast(v, dtype)?);
    }
    let most = numel(&cx.shape(scores));
    let found = cx.unbacked("nms", &most);
    let center = HostAttr::Int(n.int("center_point_box", 0)?);
    let ty = TensorType::new(DType::I64, vec![found, Dim::new(3)]);
    let out = cx.host("non_max_suppression", &ops, &[("center_point_box", center)], vec![ty])?;
    Ok(out.into_iter().map(Val::T).collect())
}
