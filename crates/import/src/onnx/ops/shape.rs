//! Shapes and data movement: reshape, slice, pad, concat and their relatives.

use super::super::cx::Cx;
use super::super::node::{N, Val, axes, axis, one};
use super::super::tensor::Source;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_expr::Value as Number;
use tilewright_graph::{Op, PadMode, TensorType, ValueId};
use tilewright_layout::{Dim, numel};

pub(crate) fn constant(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let tensor = if let Some(t) = n.tensor("value") {
        Source::default().tensor(t)?
    } else if let Some(v) = n.float_opt("value_float")? {
        Tensor::scalar(DType::F32, v)
    } else if let Some(v) = n.floats("value_floats")? {
        Tensor::from_f64s(DType::F32, &[v.len()], &v)?
    } else if let Some(v) = n.int_opt("value_int")? {
        Tensor::from_i64s(DType::I64, &[], &[v])?
    } else if let Some(v) = n.ints("value_ints")? {
        Tensor::from_i64s(DType::I64, &[v.len()], &v)?
    } else if n.has("value_string") || n.has("value_strings") {
        return Err(Error::unsupported("string tensors"));
    } else if let Some(sparse) = n.proto.attribute.iter().find_map(|a| a.sparse_tensor.as_ref()) {
        Source::default().sparse(sparse)?
    } else {
        return Err(Error::user("Constant without a value"));
    };
    one(cx.constant(tensor))
}

pub(crate) fn shape(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let rank = dims.len() as i64;
    let at = |v: i64| (if v < 0 { v.saturating_add(rank) } else { v }).clamp(0, rank) as usize;
    let (start, end) = (at(n.int("start", 0)?), at(n.int("end", rank)?));
    let dims = dims.get(start..end.max(start)).unwrap_or_default().to_vec();
    one(cx.op(Op::Dims(dims), &[])?)
}

pub(crate) fn size(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let count = numel(&cx.shape(n.x(0)?));
    let v = cx.op(Op::Dims(vec![count]), &[])?;
    one(cx.reshape(v, &[])?)
}

pub(crate) fn reshape(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let Some(want) = n.dims_or_operand(cx, "shape", 1)? else {
        return Err(Error::user("Reshape without a shape"));
    };
    let allow_zero = n.flag("allowzero", false)?;
    let from = cx.shape(x);
    let mut to = Vec::with_capacity(want.len());
    let mut free = None;
    for (i, d) in want.iter().enumerate() {
        if d.is(0) && !allow_zero {
            let copied = from.get(i).cloned();
            to.push(copied.ok_or_else(|| Error::user(format!("shape entry {i} copies nothing")))?);
        } else if d.is(-1) {
            if free.replace(i).is_some() {
                return Err(Error::user("two entries of the shape are -1"));
            }
            to.push(Dim::new(1));
        } else if d.as_const().is_some_and(|v| v < 0) {
            return Err(Error::user(format!("shape entry {d}")));
        } else {
            to.push(d.clone());
        }
    }
    if let Some(i) = free {
        to[i] = rest_of(&from, &to);
    }
    one(cx.reshape(x, &to)?)
}

/// The size that makes both shapes hold equally many elements. Factors that both share are
/// cancelled first, so that a symbolic batch does not end up inside a division.
fn rest_of(from: &[Dim], known: &[Dim]) -> Dim {
    let mut left: Vec<Dim> = from.to_vec();
    let mut below: Vec<Dim> = Vec::new();
    for d in known {
        match left.iter().position(|l| l == d) {
            Some(i) if !d.is(0) => {
                left.remove(i);
            }
            _ => below.push(d.clone()),
        }
    }
    let (total, part) = (numel(&left), numel(&below));
    if part.is(0) {
        return Dim::new(0);
    }
    total.exact_div(&part).unwrap_or_else(|| total.floor_div(&part))
}

pub(crate) fn flatten(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let a = n.int("axis", 1)?;
    let a = if a < 0 { a.saturating_add(dims.len() as i64) } else { a };
    let at = usize::try_from(a).ok().filter(|&a| a <= dims.len());
    let at = at.ok_or_else(|| Error::user(format!("axis {a} of {} axes", dims.len())))?;
    one(cx.reshape(x, &[numel(&dims[..at]), numel(&dims[at..])])?)
}

pub(crate) fn squeeze(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let gone = match n.ints_or_operand(cx, "axes", 1)? {
        Some(list) => axes(&list, dims.len())?,
        None => (0..dims.len()).filter(|&i| dims[i].is(1)).collect(),
    };
    for &a in &gone {
        if dims[a].as_const().is_some_and(|d| d != 1) {
            return Err(Error::user(format!("squeezing axis {a} of extent {}", dims[a])));
        }
    }
    let kept: Vec<Dim> =
        dims.into_iter().enumerate().filter(|(i, _)| !gone.contains(i)).map(|(_, d)| d).collect();
    one(cx.reshape(x, &kept)?)
}

pub(crate) fn unsqueeze(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let list = n.ints_or_operand(cx, "axes", 1)?.unwrap_or_default();
    let mut at = axes(&list, cx.rank(x) + list.len())?;
    at.sort_unstable();
    one(cx.unsqueeze(x, &at)?)
}

pub(crate) fn transpose(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let rank = cx.rank(x);
    let perm = match n.ints("perm")? {
        Some(list) => axes(&list, rank)?,
        None => (0..rank).rev().collect(),
    };
    one(cx.permute(x, &perm)?)
}

pub(crate) fn concat(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let all = n.all()?;
    let Some(a) = n.int_opt("axis")? else {
        return Err(Error::user("Concat without its axis"));
    };
    let axis = axis(a, cx.rank(n.x(0)?))?;
    cx.same_dtype(&all)?;
    one(cx.concat(&all, axis)?)
}

pub(crate) fn split(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let axis = n.axis("axis", 0, cx.rank(x))?;
    let extent = cx.shape(x)[axis].clone();
    let lens: Vec<Dim> = match n.dims_or_operand(cx, "split", 1)? {
        Some(lens) => lens,
        None => {
            let parts = n.int("num_outputs", n.proto.output.len() as i64)?;
            if parts < 1 || parts > n.proto.output.len().max(1) as i64 {
                return Err(Error::user(format!("a split into {parts} parts")));
            }
            let each = extent.ceil_div(&Dim::new(parts));
            let last = &extent - &each * (parts - 1);
            let mut lens = vec![each; parts as usize - 1];
            lens.push(last);
            lens
        }
    };
    let mut start = Dim::new(0);
    let mut out = Vec::new();
    for len in lens {
        out.push(Val::T(cx.slice(x, axis, start.clone(), len.clone())?));
        start = start + len;
    }
    if start.as_const().is_some() && extent.as_const().is_some() && start != extent {
        return Err(Error::user(format!("split lengths sum to {start}, the axis has {extent}")));
    }
    Ok(out)
}

pub(crate) fn slice(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let rank = dims.len();
    let starts = n.dims_or_operand(cx, "starts", 1)?.unwrap_or_default();
    let ends = n.dims_or_operand(cx, "ends", 2)?.unwrap_or_default();
    let on = match n.ints_or_operand(cx, "axes", 3)? {
        Some(list) => axes(&list, rank)?,
        None => (0..starts.len()).collect(),
    };
    let by = match n.opt(4)? {
        Some(v) => cx.const_ints(v, "steps")?,
        None => vec![1; starts.len()],
    };
    if starts.len() != ends.len() || on.len() != starts.len() || by.len() != starts.len() {
        return Err(Error::user("starts, ends, axes and steps have different lengths"));
    }
    let mut lens = dims.clone();
    let mut from = vec![Dim::new(0); rank];
    let mut steps = vec![1; rank];
    for (((&a, start), end), &step) in on.iter().zip(&starts).zip(&ends).zip(&by) {
        let Some(d) = dims.get(a) else {
            return Err(Error::user(format!("axis {a} of a tensor with {rank} axes")));
        };
        if step == 0 {
            return Err(Error::user("a slice with step 0"));
        }
        // Most shapes divide symbolically only with plain full ranges: keep these exact.
        let zero = Dim::new(0);
        let (lo, hi) = if step > 0 { (zero, d.clone()) } else { (Dim::new(-1), d - 1) };
        let place = |cx: &Cx, v: &Dim| -> Dim {
            let huge =
                v.as_const().is_some_and(|c| c >= i64::from(i32::MAX) || c <= -i64::from(i32::MAX));
            if huge {
                return if v.as_const().is_some_and(|c| c > 0) { hi.clone() } else { lo.clone() };
            }
            let v = if cx.bounds(v).max < 0 { d + v } else { v.clone() };
            let v = cx.min(&v, &hi);
            cx.max(&v, &lo)
        };
        // A negative step starts inside the tensor: the lowest start is 0.
        let mut first = place(cx, start);
        if step < 0 && first.is(-1) {
            first = Dim::new(0);
        }
        let last = place(cx, end);
        let len = if step > 0 {
            (&last - &first).ceil_div(&Dim::new(step))
        } else {
            (&first - &last).ceil_div(&Dim::new(step.checked_neg().unwrap_or(i64::MAX)))
        };
        let len = cx.max(&len, &Dim::new(0));
        (from[a], lens[a], steps[a]) = (first, len, step);
    }
    if lens == dims && steps.iter().all(|&s| s == 1) {
        return one(x);
    }
    one(cx.op(Op::Slice { starts: from, lens, steps }, &[x])?)
}

pub(crate) fn expand(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let want = cx.ints(n.x(1)?, "shape")?;
    let have = cx.shape(x);
    let shape = tilewright_layout::broadcast_shapes(&have, &want).ok_or_else(|| {
        Error::user(format!("{} does not broadcast to the shape given", cx.ty(x)))
    })?;
    one(cx.expand(x, &shape)?)
}

pub(crate) fn tile(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let repeats = cx.ints(n.x(1)?, "repeats")?;
    let dims = cx.shape(x);
    if repeats.len() != dims.len() {
        return Err(Error::user(format!("{} repeats for {} axes", repeats.len(), dims.len())));
    }
    // [a, b] -> [1, a, 1, b] -> [r, a, s, b] -> [r*a, s*b]
    let (mut thin, mut wide, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for (d, r) in dims.iter().zip(&repeats) {
        thin.extend([Dim::new(1), d.clone()]);
        wide.extend([r.clone(), d.clone()]);
        out.push(d * r);
    }
    let v = cx.reshape(x, &thin)?;
    let v = cx.expand(v, &wide)?;
    one(cx.reshape(v, &out)?)
}

/// A padding value of a type, from a one-element tensor.
fn pad_value(cx: &mut Cx, v: Option<ValueId>, dtype: DType) -> Result<Number> {
    let Some(v) = v else {
        return Ok(if dtype.is_float() { Number::Float(0.0) } else { Number::Int(0) });
    };
    let tensor = cx.tensor(v, "the padding value")?;
    if tensor.len() != 1 {
        return Err(Error::user("the padding value is not one number"));
    }
    Ok(match dtype.is_float() {
        true => Number::Float(tensor.get_f64(0)),
        false => Number::Int(tensor.get_i64(0)),
    })
}

pub(crate) fn pad(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let rank = cx.rank(x);
    let pads = n.dims_or_operand(cx, "pads", 1)?.unwrap_or_default();
    let on = match n.opt(3)? {
        Some(v) => {
            let list = cx.const_ints(v, "axes")?;
            axes(&list, rank)?
        }
        None => (0..rank).collect(),
    };
    if pads.len() != 2 * on.len() {
        return Err(Error::user(format!("{} pads for {} axes", pads.len(), on.len())));
    }
    let dtype = cx.dtype(x);
    let mode = match n.str("mode", "constant")?.as_str() {
        "constant" => PadMode::Constant(match n.float_opt("value")? {
            Some(v) if dtype.is_float() => Number::Float(v),
            Some(v) => Number::Int(v as i64),
            None => pad_value(cx, n.opt(2)?, dtype)?,
        }),
        "edge" => PadMode::Edge,
        "reflect" => PadMode::Reflect,
        "wrap" => PadMode::Wrap,
        other => return Err(Error::user(format!("Pad mode `{other}`"))),
    };
    let (mut lo, mut hi) = (vec![Dim::new(0); rank], vec![Dim::new(0); rank]);
    for (i, &a) in on.iter().enumerate() {
        (lo[a], hi[a]) = (pads[i].clone(), pads[i + on.len()].clone());
    }
    one(cx.op(Op::Pad { lo, hi, mode }, &[x])?)
}

pub(crate) fn constant_of_shape(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let shape = cx.ints(n.x(0)?, "shape")?;
    let tensor = match n.tensor("value") {
        Some(t) => Source::default().tensor(t)?.reshaped([])?,
        None => Tensor::scalar(DType::F32, 0.0),
    };
    let v = cx.constant(tensor);
    one(cx.expand(v, &shape)?)
}

pub(crate) fn range(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (start, limit, delta) = (n.x(0)?, n.x(1)?, n.x(2)?);
    cx.same_dtype(&[start, limit, delta])?;
    let dtype = cx.dtype(start);
    let len = if dtype.is_float() {
        let (a, b) = (cx.const_float(start, "start")?, cx.const_float(limit, "limit")?);
        let d = cx.const_float(delta, "delta")?;
        Dim::new(((b - a) / d).ceil().max(0.0) as i64)
    } else {
        let (a, b) = (cx.ints(start, "start")?, cx.ints(limit, "limit")?);
        let d = cx.const_int(delta, "delta")?;
        let (Some(a), Some(b)) = (a.first(), b.first()) else {
            return Err(Error::user("Range of nothing"));
        };
        let len = match d {
            0 => return Err(Error::user("Range with delta 0")),
            d if d > 0 => (b - a).ceil_div(&Dim::new(d)),
            d => (a - b).ceil_div(&Dim::new(d.checked_neg().unwrap_or(i64::MAX))),
        };
        cx.max(&len, &Dim::new(0))
    };
    let counter = cx.iota(dtype, 1, 0, &len)?;
    let (start, delta) = (cx.reshape(start, &[])?, cx.reshape(delta, &[])?);
    one(cx.map(&[counter, start, delta], |p| p[0] * p[2] + p[1])?)
}

pub(crate) fn trilu(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let [.., rows, columns] = dims.as_slice() else {
        return Err(Error::user("Trilu of a tensor with less than two axes"));
    };
    let k = match n.opt(1)? {
        Some(v) => cx.reshape(v, &[])?,
        None => cx.scalar(DType::I64, 0.0),
    };
    let upper = n.flag("upper", true)?;
    let row = cx.iota(DType::I64, 2, 0, rows)?;
    let column = cx.iota(DType::I64, 2, 1, columns)?;
    one(cx.map(&[x, row, column, k], |p| {
        let edge = p[1] + p[3];
        let kept = if upper { p[2].ge(edge) } else { p[2].le(edge) };
        kept.select(p[0], 0.0)
    })?)
}

pub(crate) fn eye_like(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let [rows, columns] = dims.as_slice() else {
        return Err(Error::user("EyeLike of a tensor that is not a matrix"));
    };
    let dtype = n.dtype("dtype")?.unwrap_or(cx.dtype(x));
    let k = n.int("k", 0)?;
    let row = cx.iota(DType::I64, 2, 0, rows)?;
    let column = cx.iota(DType::I64, 2, 1, columns)?;
    one(cx.map(&[row, column], |p| (p[0] + p[0].integer(k)).eq(p[1]).cast(dtype))?)
}

pub(crate) fn depth_to_space(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let b = n.int("blocksize", 0)?;
    let [batch, c, h, w] = four(cx, x)?;
    if b < 1 {
        return Err(Error::user(format!("a block of {b}")));
    }
    let depth = c.floor_div(&Dim::new(b * b));
    let block = Dim::new(b);
    let out = [batch.clone(), depth.clone(), &h * b, &w * b];
    let (split, perm): (Vec<Dim>, [usize; 6]) = match n.str("mode", "DCR")?.as_str() {
        "DCR" => (vec![batch, block.clone(), block, depth, h, w], [0, 3, 4, 1, 5, 2]),
        "CRD" => (vec![batch, depth, block.clone(), block, h, w], [0, 1, 4, 2, 5, 3]),
        other => return Err(Error::user(format!("DepthToSpace mode `{other}`"))),
    };
    let v = cx.reshape(x, &split)?;
    let v = cx.permute(v, &perm)?;
    one(cx.reshape(v, &out)?)
}

pub(crate) fn space_to_depth(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let b = n.int("blocksize", 0)?;
    let [batch, c, h, w] = four(cx, x)?;
    if b < 1 {
        return Err(Error::user(format!("a block of {b}")));
    }
    let block = Dim::new(b);
    let (oh, ow) = (h.floor_div(&block), w.floor_div(&block));
    let out = [batch.clone(), &c * (b * b), oh.clone(), ow.clone()];
    let v = cx.reshape(x, &[batch, c, oh, block.clone(), ow, block])?;
    let perm = match n.str("mode", "DCR")?.as_str() {
        "CRD" => [0, 1, 3, 5, 2, 4],
        _ => [0, 3, 5, 1, 2, 4],
    };
    let v = cx.permute(v, &perm)?;
    one(cx.reshape(v, &out)?)
}

fn four(cx: &Cx, x: ValueId) -> Result<[Dim; 4]> {
    <[Dim; 4]>::try_from(cx.shape(x))
        .map_err(|_| Error::user(format!("{} where four axes are needed", cx.ty(x))))
}

pub(crate) fn center_crop_pad(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let rank = cx.rank(x);
    let want = cx.ints(n.x(1)?, "shape")?;
    let on = match n.ints("axes")? {
        Some(list) => axes(&list, rank)?,
        None => (0..rank).collect(),
    };
    if on.len() != want.len() {
        return Err(Error::user(format!("{} sizes for {} axes", want.len(), on.len())));
    }
    let dtype = cx.dtype(x);
    let (mut lo, mut hi) = (vec![Dim::new(0); rank], vec![Dim::new(0); rank]);
    let two = Dim::new(2);
    for (&a, size) in on.iter().zip(&want) {
        let diff = size - &cx.shape(x)[a];
        // Cropping takes the smaller half in front, padding puts the smaller half in front.
        lo[a] = if cx.bounds(&diff).max < 0 {
            -&(-&diff).floor_div(&two)
        } else {
            diff.floor_div(&two)
        };
        hi[a] = &diff - &lo[a];
    }
    let zero = if dtype.is_float() { Number::Float(0.0) } else { Number::Int(0) };
    one(cx.op(Op::Pad { lo, hi, mode: PadMode::Constant(zero) }, &[x])?)
}

pub(crate) fn one_hot(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (indices, depth, values) = (n.x(0)?, n.x(1)?, n.x(2)?);
    let depth = match cx.as_const(depth).map(Tensor::to_f64s).as_deref() {
        Some([d]) => Dim::new(*d as i64),
        Some(_) => return Err(Error::user("the depth of OneHot is not one number")),
        None => cx.ints(depth, "depth")?.first().cloned().unwrap_or_default(),
    };
    let rank = cx.rank(indices) + 1;
    let axis = n.axis("axis", -1, rank)?;
    let indices = cx.cast(indices, DType::I64)?;
    let indices = cx.unsqueeze(indices, &[axis])?;
    let counter = cx.iota(DType::I64, rank, axis, &depth)?;
    let off = cx.pick(values, 0, 0)?;
    let on = cx.pick(values, 0, 1)?;
    let depth = cx.dim_scalar(&depth, DType::I64)?;
    one(cx.map(&[indices, counter, off, on, depth], |p| {
        let index = p[0].lt(0.0).select(p[0] + p[4], p[0]);
        index.eq(p[1]).select(p[3], p[2])
    })?)
}

pub(crate) fn reverse_sequence(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, lens) = (n.x(0)?, n.x(1)?);
    let (time, batch) = (n.int("time_axis", 0)?, n.int("batch_axis", 1)?);
    if cx.rank(x) < 2 || (time, batch) != (0, 1) && (time, batch) != (1, 0) {
        return Err(Error::user("ReverseSequence reverses axis 0 or 1, per sample of the other"));
    }
    let (time, batch) = (time as usize, batch as usize);
    let dims = cx.shape(x);
    let t = cx.iota(DType::I64, 2, time, &dims[time])?;
    let lens = cx.cast(lens, DType::I64)?;
    let lens = cx.along(lens, batch, 2)?;
    let index =
        cx.map(&[t, lens], |p| p[0].lt(p[1]).select(p[1] - p[0] - p[0].integer(1), p[0]))?;
    let rank = dims.len();
    let mut thin = dims[..2].to_vec();
    thin.resize(rank, Dim::new(1));
    let index = cx.reshape(index, &thin)?;
    let index = cx.expand(index, &dims)?;
    one(cx.op(Op::GatherElements(time), &[x, index])?)
}

pub(crate) fn non_zero(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    // A scalar counts as a vector of one.
    let x = if cx.rank(x) == 0 { cx.reshape(x, &[Dim::new(1)])? } else { x };
    let dims = cx.shape(x);
    let found = cx.unbacked("nonzero", &numel(&dims));
    let ty = TensorType::new(DType::I64, vec![Dim::from(dims.len()), found]);
    Ok(cx.host("nonzero", &[x], &[], vec![ty])?.into_iter().map(Val::T).collect())
}

pub(crate) fn compress(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (mut x, keep) = (n.x(0)?, n.x(1)?);
    let axis = match n.int_opt("axis")? {
        Some(a) => axis(a, cx.rank(x))?,
        None => {
            let count = numel(&cx.shape(x));
            x = cx.reshape(x, &[count])?;
            0
        }
    };
    let count = cx.shape(keep).first().cloned().unwrap_or_default();
    let found = cx.unbacked("compress", &count);
    let ty = TensorType::new(DType::I64, vec![Dim::new(1), found.clone()]);
    let index = cx.host("nonzero", &[keep], &[], vec![ty])?;
    let Some(&index) = index.first() else { return Err(Error::bug("nonzero without a result")) };
    let len = cx.shape(index).last().cloned().unwrap_or(found);
    let index = cx.reshape(index, &[len])?;
    one(cx.op(Op::Gather(axis), &[x, index])?)
}
