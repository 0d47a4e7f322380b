//! Quantisation: affine maps between floats and small integers.

use super::super::cx::Cx;
use super::super::node::{N, Val, axis, one};
use super::{byte_conv, conv, matmul};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{ReduceKind, ValueId};
use tilewright_layout::Dim;

/// Smallest and largest value of an integer type of up to 32 bits, or of an 8-bit float.
fn limits(dtype: DType) -> Result<(f64, f64)> {
    let bits = dtype.bits().min(53) as i32;
    Ok(match dtype {
        DType::F8E4M3 => (-448.0, 448.0),
        DType::F8E5M2 => (-57344.0, 57344.0),
        d if d.is_signed_int() => (-(2f64.powi(bits - 1)), 2f64.powi(bits - 1) - 1.0),
        d if d.is_int() => (0.0, 2f64.powi(bits) - 1.0),
        d => return Err(Error::unsupported(format!("quantisation to {d}"))),
    })
}

/// A scale or zero point brought to the rank of the data: whole tensor, per axis, or per block.
fn spread(cx: &mut Cx, v: ValueId, x: ValueId, n: &N<'_>) -> Result<ValueId> {
    let dims = cx.shape(x);
    let rank = dims.len();
    match cx.rank(v) {
        0 => Ok(v),
        1 if cx.shape(v)[0].is(1) && n.int("block_size", 0)? == 0 => cx.reshape(v, &[]),
        1 if rank != 1 || n.int("block_size", 0)? == 0 => {
            let a = axis(n.int("axis", 1)?, rank)?;
            cx.along(v, a, rank)
        }
        r if r == rank => {
            let a = axis(n.int("axis", 1)?, rank)?;
            let block = n.int("block_size", 0)?;
            let have = cx.shape(v);
            if have[a] == dims[a] || have[a].is(1) {
                return Ok(v);
            }
            let block = if block > 0 { Dim::new(block) } else { dims[a].ceil_div(&have[a]) };
            // Each entry repeated `block` times along the axis, then cut to length.
            let mut wide = have.clone();
            wide.insert(a + 1, block.clone());
            let v = cx.unsqueeze(v, &[a + 1])?;
            let v = cx.expand(v, &wide)?;
            let mut long = have.clone();
            long[a] = &have[a] * &block;
            let v = cx.reshape(v, &long)?;
            cx.slice(v, a, Dim::new(0), dims[a].clone())
        }
        _ => Err(Error::user(format!("scale {} for data {}", cx.ty(v), cx.ty(x)))),
    }
}

pub(crate) fn quantize(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, scale) = (n.x(0)?, n.x(1)?);
    let zero = n.opt(2)?;
    let out = match (zero, n.dtype("output_dtype")?) {
        (Some(z), _) => cx.dtype(z),
        (None, Some(d)) => d,
        (None, None) => DType::U8,
    };
    let (lo, hi) = limits(out)?;
    let scale = spread(cx, scale, x, n)?;
    let compute = match n.dtype("precision")? {
        Some(d) => d.compute(),
        None => cx.dtype(x).compute(),
    };
    let compute = if compute.is_float() { compute } else { DType::F32 };
    let mut operands = vec![x, scale];
    if let Some(z) = zero {
        operands.push(spread(cx, z, x, n)?);
    }
    let small_float = out.is_float();
    let saturate = n.flag("saturate", true)?;
    let limit = if out == DType::F8E4M3 { 464.0 } else { 61440.0 };
    let over = if out == DType::F8E4M3 { f64::NAN } else { f64::INFINITY };
    one(cx.map_as(&operands, compute, out, |p| {
        let v = p[0] / p[1];
        if small_float {
            let v = p.get(2).map_or(v, |z| v + *z);
            if saturate {
                return v;
            }
            let over = v.number(over);
            let over = v.lt(0.0).select(-over, over);
            return v.abs().gt(limit).select(over, v);
        }
        let v = v.round();
        let v = p.get(2).map_or(v, |z| v + *z);
        v.clamp(lo, hi)
    })?)
}

pub(crate) fn dequantize(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, scale) = (n.x(0)?, n.x(1)?);
    let out = n.dtype("output_dtype")?.unwrap_or(cx.dtype(scale));
    let scale = spread(cx, scale, x, n)?;
    let mut operands = vec![x, scale];
    if let Some(z) = n.opt(2)? {
        operands.push(spread(cx, z, x, n)?);
    }
    // Differences of 32-bit integers do not fit f32.
    let wide = cx.dtype(x).bits() >= 32 && cx.dtype(x).is_int();
    let compute = if wide { DType::F64 } else { out.compute() };
    one(cx.map_as(&operands, compute, out, |p| {
        let v = p.get(2).map_or(p[0], |z| p[0] - *z);
        v * p[1]
    })?)
}

pub(crate) fn dynamic_quantize(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let all: Vec<usize> = (0..cx.rank(x)).collect();
    let lo = cx.reduce(ReduceKind::Min, x, &all, false)?;
    let hi = cx.reduce(ReduceKind::Max, x, &all, false)?;
    let scale = cx.fmap(&[lo, hi], |p| (p[1].max(0.0) - p[0].min(0.0)) / 255.0)?;
    let zero = cx.map_as(&[lo, scale], DType::F32, DType::U8, |p| {
        (-p[0].min(0.0) / p[1]).clamp(0.0, 255.0).round()
    })?;
    let y = cx.map_as(&[x, scale, zero], DType::F32, DType::U8, |p| {
        ((p[0] / p[1]).round() + p[2]).clamp(0.0, 255.0)
    })?;
    Ok(vec![Val::T(y), Val::T(scale), Val::T(zero)])
}

/// `saturate(round(acc * sa * sb / sy) + zero)` in the type of the zero point.
pub(crate) fn requantise(
    cx: &mut Cx,
    acc: ValueId,
    sa: ValueId,
    sb: ValueId,
    sy: ValueId,
    zero: ValueId,
) -> Result<ValueId> {
    let out = cx.dtype(zero);
    let (lo, hi) = limits(out)?;
    let zero = if cx.rank(zero) == 1 && cx.shape(zero)[0].is(1) {
        cx.reshape(zero, &[])?
    } else {
        let rank = cx.rank(acc);
        matmul::per_axis(cx, zero, rank.saturating_sub(2), rank)?
    };
    cx.map_as(&[acc, sa, sb, sy, zero], DType::F64, out, |p| {
        let v = p[0] * (p[1] * p[2] / p[3]);
        (v.round() + p[4]).clamp(lo, hi)
    })
}

/// Operand minus its zero point as `i32`; per channel at `axis`.
fn centred(cx: &mut Cx, x: ValueId, zero: Option<ValueId>, at: usize) -> Result<ValueId> {
    let wide = cx.cast(x, DType::I32)?;
    let Some(zero) = zero else { return Ok(wide) };
    let zero = cx.cast(zero, DType::I32)?;
    let zero = matmul::per_axis(cx, zero, at, cx.rank(x))?;
    cx.sub(wide, zero)
}

pub(crate) fn conv_integer(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (v, axis) = integer_conv(cx, n, [n.x(0)?, n.x(1)?], [n.opt(2)?, n.opt(3)?])?;
    one(if axis == 1 { v } else { byte_conv::channels_second(cx, v)? })
}

/// The convolution of small integers less their zero points, in `i32`, and the axis of its channels: the second or the
/// last.
fn integer_conv(
    cx: &mut Cx,
    n: &N<'_>,
    [x, w]: [ValueId; 2],
    [zx, zw]: [Option<ValueId>; 2],
) -> Result<(ValueId, usize)> {
    if let Some(v) = byte_conv::convolve(cx, n, [x, w], [zx, zw])? {
        return Ok((v, cx.rank(v) - 1));
    }
    let x = centred(cx, x, zx, 1)?;
    let w = centred(cx, w, zw, 0)?;
    conv::convolve(cx, n, x, w).map(|v| (v, 1))
}

pub(crate) fn qlinear_conv(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (mut v, axis) = integer_conv(cx, n, [n.x(0)?, n.x(3)?], [Some(n.x(2)?), Some(n.x(5)?)])?;
    let rank = cx.rank(v);
    if let Some(bias) = n.opt(8)? {
        let bias = cx.along(bias, axis, rank)?;
        v = cx.add(v, bias)?;
    }
    let sa = matmul::per_axis(cx, n.x(1)?, axis, rank)?;
    let sb = matmul::per_axis(cx, n.x(4)?, axis, rank)?;
    let sy = matmul::per_axis(cx, n.x(6)?, axis, rank)?;
    let v = requantise(cx, v, sa, sb, sy, n.x(7)?)?;
    one(if axis == 1 { v } else { byte_conv::channels_second(cx, v)? })
}
