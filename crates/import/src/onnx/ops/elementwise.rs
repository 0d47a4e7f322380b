//! Arithmetic, comparisons, logic, casts: one map each.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use super::super::tensor::dtype_of;
use tilewright_base::{Class, DType, Error, Result};
use tilewright_expr::Op as E;
use tilewright_graph::ValueId;

/// One operation on one operand.
pub(crate) fn unary(cx: &mut Cx, n: &N<'_>, op: E) -> Result<Vec<Val>> {
    one(cx.apply(op, &[n.x(0)?])?)
}

/// One operation on two operands.
pub(crate) fn binary(cx: &mut Cx, n: &N<'_>, op: E) -> Result<Vec<Val>> {
    one(cx.apply(op, &[n.x(0)?, n.x(1)?])?)
}

/// One operation folded over any number of operands.
pub(crate) fn variadic(cx: &mut Cx, n: &N<'_>, op: E) -> Result<Vec<Val>> {
    one(fold(cx, &n.all()?, op)?)
}

fn fold(cx: &mut Cx, all: &[ValueId], op: E) -> Result<ValueId> {
    let Some((first, rest)) = all.split_first() else {
        return Err(Error::user("an operator without operands"));
    };
    let mut acc = *first;
    for &v in rest {
        acc = cx.apply(op, &[acc, v])?;
    }
    Ok(acc)
}

pub(crate) fn mean(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let all = n.all()?;
    let sum = fold(cx, &all, E::Add)?;
    let count = all.len() as f64;
    one(cx.fmap(&[sum], |p| p[0] / count)?)
}

pub(crate) fn reciprocal(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    one(cx.fmap(&[n.x(0)?], |p| p[0].number(1.0) / p[0])?)
}

pub(crate) fn modulo(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    binary(cx, n, if n.flag("fmod", false)? { E::Rem } else { E::Mod })
}

pub(crate) fn pow(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, y) = (n.x(0)?, n.x(1)?);
    let (base, exponent) = (cx.dtype(x), cx.dtype(y));
    // The result has the base's type; a float exponent of an integer base computes in f64.
    let compute = match (base.is_float(), exponent.is_float()) {
        (true, _) => base.compute(),
        (false, true) => DType::F64,
        (false, false) => base,
    };
    one(cx.map_as(&[x, y], compute, base, |p| p[0].pow(p[1]))?)
}

pub(crate) fn bit_shift(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let op = match n.str("direction", "")?.as_str() {
        "LEFT" => E::Shl,
        "RIGHT" => E::Shr,
        other => return Err(Error::user(format!("BitShift direction `{other}`"))),
    };
    let (x, y) = (n.x(0)?, n.x(1)?);
    cx.same_dtype(&[x, y])?;
    // Shifting an unsigned number right by its width or more leaves nothing.
    let dtype = cx.dtype(x);
    if op == E::Shr && dtype.class() == Class::Unsigned {
        let bits = i64::from(dtype.bits());
        return one(cx.map(&[x, y], |p| {
            let gone = p[1].ge(p[1].integer(bits));
            gone.select(p[0].integer(0), p[0].bin(E::Shr, p[1]))
        })?);
    }
    one(cx.apply(op, &[x, y])?)
}

fn bools(cx: &Cx, values: &[ValueId]) -> Result<()> {
    match values.iter().find(|v| cx.dtype(**v) != DType::Bool) {
        None => Ok(()),
        Some(v) => Err(Error::user(format!("needs bool operands, not {}", cx.dtype(*v)))),
    }
}

/// A logical operation: on `bool` only.
pub(crate) fn logical(cx: &mut Cx, n: &N<'_>, op: E) -> Result<Vec<Val>> {
    let all = if op == E::Not { vec![n.x(0)?] } else { vec![n.x(0)?, n.x(1)?] };
    bools(cx, &all)?;
    one(cx.apply(op, &all)?)
}

pub(crate) fn is_inf(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    cx.float(x)?;
    let (neg, pos) = (n.flag("detect_negative", true)?, n.flag("detect_positive", true)?);
    let compute = cx.dtype(x).compute();
    one(cx.map_as(&[x], compute, DType::Bool, |p| {
        let inf = p[0].is_inf();
        match (neg, pos) {
            (true, true) => inf,
            (true, false) => inf.and(p[0].lt(0.0)),
            (false, true) => inf.and(p[0].gt(0.0)),
            (false, false) => p[0].ne(p[0]).and(p[0].eq(p[0])),
        }
    })?)
}

pub(crate) fn is_nan(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    cx.float(x)?;
    let compute = cx.dtype(x).compute();
    one(cx.map_as(&[x], compute, DType::Bool, |p| p[0].is_nan())?)
}

pub(crate) fn where_(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (c, x, y) = (n.x(0)?, n.x(1)?, n.x(2)?);
    bools(cx, &[c])?;
    cx.same_dtype(&[x, y])?;
    one(cx.map(&[c, x, y], |p| p[0].select(p[1], p[2]))?)
}

pub(crate) fn clip(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dtype = cx.dtype(x);
    let mut bound = |name: &str, i: usize| -> Result<Option<ValueId>> {
        match (n.float_opt(name)?, n.opt(i)?) {
            (Some(v), _) => Ok(Some(cx.scalar(dtype, v))),
            (None, v) => Ok(v),
        }
    };
    let (lo, hi) = (bound("min", 1)?, bound("max", 2)?);
    let mut operands = vec![x];
    operands.extend(lo);
    operands.extend(hi);
    cx.same_dtype(&operands)?;
    one(cx.map(&operands, |p| match (lo.is_some(), hi.is_some()) {
        (true, true) => p[0].max(p[1]).min(p[2]),
        (true, false) => p[0].max(p[1]),
        (false, true) => p[0].min(p[1]),
        (false, false) => p[0],
    })?)
}

fn convert(cx: &mut Cx, n: &N<'_>, x: ValueId, to: DType) -> Result<Vec<Val>> {
    let from = cx.dtype(x);
    let saturate = n.flag("saturate", true)?;
    // Without saturation, what does not fit an 8-bit float becomes infinite, or NaN where the type
    // has no infinity. The bound is the middle between the largest value and the next step.
    let limit = match to {
        DType::F8E4M3 => Some((464.0, f64::NAN)),
        DType::F8E5M2 => Some((61440.0, f64::INFINITY)),
        _ => None,
    };
    if let (false, Some((limit, over)), true) = (saturate, limit, from.is_float()) {
        return one(cx.map_as(&[x], from.compute(), to, |p| {
            let over = p[0].number(over);
            let over = p[0].lt(0.0).select(-over, over);
            p[0].abs().gt(limit).select(over, p[0])
        })?);
    }
    one(match to {
        // Saturation takes infinity to the largest value, too.
        DType::F8E5M2 if from.is_float() && saturate => {
            cx.map_as(&[x], from.compute(), to, |p| p[0].clamp(-57344.0, 57344.0))?
        }
        // Only the low bits of an integer that does not fit remain.
        DType::I4 | DType::U4 if from.is_float() => cx.map_as(&[x], DType::I32, to, |p| p[0])?,
        _ => cx.cast(x, to)?,
    })
}

pub(crate) fn cast(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let Some(to) = n.dtype("to")? else {
        return Err(Error::user("Cast without its attribute `to`"));
    };
    convert(cx, n, x, to)
}

pub(crate) fn cast_like(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let to = cx.dtype(n.x(1)?);
    convert(cx, n, n.x(0)?, to)
}

/// The same bits as another type: on constants only.
pub(crate) fn bit_cast(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let to = dtype_of(n.int("to", 0)? as i32)?;
    let x = n.x(0)?;
    let from = cx.dtype(x);
    if from == to {
        return one(x);
    }
    if from.bits() != to.bits() {
        return Err(Error::unsupported(format!("reinterpreting {from} as {to}")));
    }
    let integers = |d: DType| d.is_int() && d.bits() >= 8;
    if integers(from) && integers(to) {
        // Integer conversion of one width keeps the bits.
        return one(cx.cast(x, to)?);
    }
    let tensor = cx.tensor(x, "the operand of BitCast")?;
    let shape = tensor.shape().to_vec();
    let tensor = tilewright_data::Tensor::new(to, shape, tensor.shared_bytes().clone())?;
    one(cx.constant(tensor))
}

pub(crate) fn identity(_: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    match n.ins.first() {
        Some(Some(val)) => Ok(vec![val.clone()]),
        _ => Err(Error::user("Identity without an operand")),
    }
}
