//! Reductions, index reductions and running sums.

use super::super::cx::Cx;
use super::super::node::{N, Val, axes, axis, one};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Op, ReduceKind, ValueId};

/// The reductions of ONNX.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sum,
    Mean,
    Max,
    Min,
    Prod,
    L1,
    L2,
    SumSquare,
    LogSum,
    LogSumExp,
}

pub(crate) fn reduce(cx: &mut Cx, n: &N<'_>, kind: Kind) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let (dtype, rank) = (cx.dtype(x), cx.rank(x));
    let keep = n.flag("keepdims", true)?;
    let list = n.ints_or_operand(cx, "axes", 1)?.filter(|l| !l.is_empty());
    let over = match list {
        Some(list) => axes(&list, rank)?,
        None if n.flag("noop_with_empty_axes", false)? => Vec::new(),
        None => (0..rank).collect(),
    };
    if dtype == DType::Bool {
        if !matches!(kind, Kind::Max | Kind::Min) {
            return Err(Error::user("a sum over bool"));
        }
        let v = cx.cast(x, DType::U8)?;
        let v = if kind == Kind::Max {
            cx.reduce(ReduceKind::Max, v, &over, keep)?
        } else {
            cx.reduce(ReduceKind::Min, v, &over, keep)?
        };
        return one(cx.cast(v, DType::Bool)?);
    }
    // Sums run in the computing type; logarithms and roots of integers in f64.
    let transcendental = matches!(kind, Kind::L2 | Kind::LogSum | Kind::LogSumExp | Kind::Mean);
    let compute = match dtype.is_float() {
        true => dtype.compute(),
        false if transcendental && kind != Kind::Mean => DType::F64,
        false => dtype,
    };
    let v = cx.cast(x, compute)?;
    let v = run(cx, v, &over, keep, kind)?;
    one(cx.cast(v, dtype)?)
}

fn run(cx: &mut Cx, v: ValueId, over: &[usize], keep: bool, kind: Kind) -> Result<ValueId> {
    match kind {
        Kind::Sum => cx.reduce(ReduceKind::Sum, v, over, keep),
        Kind::Max => cx.reduce(ReduceKind::Max, v, over, keep),
        Kind::Min => cx.reduce(ReduceKind::Min, v, over, keep),
        Kind::Prod => cx.reduce(ReduceKind::Prod, v, over, keep),
        Kind::Mean => cx.mean(v, over, keep),
        Kind::L1 => {
            let v = cx.map(&[v], |p| p[0].abs())?;
            cx.reduce(ReduceKind::Sum, v, over, keep)
        }
        Kind::L2 => {
            let v = run(cx, v, over, keep, Kind::SumSquare)?;
            cx.map(&[v], |p| p[0].sqrt())
        }
        Kind::SumSquare => {
            let v = cx.map(&[v], |p| p[0] * p[0])?;
            cx.reduce(ReduceKind::Sum, v, over, keep)
        }
        Kind::LogSum => {
            let v = cx.reduce(ReduceKind::Sum, v, over, keep)?;
            cx.map(&[v], |p| p[0].log())
        }
        Kind::LogSumExp => {
            if over.is_empty() {
                return Ok(v);
            }
            // Shifted by the maximum, so that nothing overflows; an infinite maximum shifts by 0.
            let max = cx.reduce(ReduceKind::Max, v, over, true)?;
            let max = cx.map(&[max], |p| p[0].is_inf().select(p[0].number(0.0), p[0]))?;
            let e = cx.map(&[v, max], |p| (p[0] - p[1]).exp())?;
            let sum = cx.reduce(ReduceKind::Sum, e, over, true)?;
            let out = cx.map(&[sum, max], |p| p[0].log() + p[1])?;
            if keep {
                return Ok(out);
            }
            let mut shape = cx.shape(out);
            let mut i = 0;
            shape.retain(|_| {
                i += 1;
                !over.contains(&(i - 1))
            });
            cx.reshape(out, &shape)
        }
    }
}

pub(crate) fn arg(cx: &mut Cx, n: &N<'_>, kind: ReduceKind) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let axis = n.axis("axis", 0, cx.rank(x))?;
    let (keep, last) = (n.flag("keepdims", true)?, n.flag("select_last_index", false)?);
    one(cx.op(Op::ArgReduce { kind, axis, keep, last }, &[x])?)
}

pub(crate) fn scan(cx: &mut Cx, n: &N<'_>, kind: ReduceKind) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let a = cx.const_int(n.x(1)?, "axis")?;
    let axis = axis(a, cx.rank(x))?;
    let (exclusive, reverse) = (n.flag("exclusive", false)?, n.flag("reverse", false)?);
    one(cx.op(Op::Scan { kind, axis, exclusive, reverse }, &[x])?)
}
