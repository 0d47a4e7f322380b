//! Loss functions.

use super::super::cx::Cx;
use super::super::node::{N, Val};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Op, ReduceKind, ValueId};

/// Negative log likelihood of logarithms `[N, C, ...]` under classes `[N, ...]`.
fn nll(
    cx: &mut Cx,
    n: &N<'_>,
    x: ValueId,
    target: ValueId,
    weight: Option<ValueId>,
) -> Result<ValueId> {
    let dims = cx.shape(x);
    if dims.len() < 2 {
        return Err(Error::user(format!("a loss over {}", cx.ty(x))));
    }
    let target = cx.cast(target, DType::I64)?;
    let target = cx.unsqueeze(target, &[1])?;
    // Elements of the class to ignore read class 0 and then count nothing.
    let ignored = n.int_opt("ignore_index")?;
    let safe = match ignored {
        Some(i) => cx.map(&[target], |p| p[0].eq(p[0].integer(i)).select(p[0].integer(0), p[0]))?,
        None => target,
    };
    let picked = cx.op(Op::GatherElements(1), &[x, safe])?;
    let dtype = cx.dtype(x);
    let mut weights = match weight {
        Some(w) => {
            let w = cx.op(Op::Gather(0), &[w, safe])?;
            Some(w)
        }
        None => None,
    };
    if let Some(i) = ignored {
        let one = cx.scalar(dtype, 1.0);
        let w = weights.unwrap_or(one);
        weights = Some(
            cx.map(&[target, w], |p| p[0].eq(p[0].integer(i)).select(p[1].number(0.0), p[1]))?,
        );
    }
    let loss = match weights {
        Some(w) => cx.fmap(&[picked, w], |p| -p[0] * p[1])?,
        None => cx.fmap(&[picked], |p| -p[0])?,
    };
    let mut flat = dims;
    flat.remove(1);
    let all: Vec<usize> = (0..flat.len()).collect();
    let loss = cx.reshape(loss, &flat)?;
    match n.str("reduction", "mean")?.as_str() {
        "none" => Ok(loss),
        "sum" => cx.reduce(ReduceKind::Sum, loss, &all, false),
        "mean" => match weights {
            Some(w) => {
                let w = cx.reshape(w, &flat)?;
                let total = cx.reduce(ReduceKind::Sum, w, &all, false)?;
                let loss = cx.reduce(ReduceKind::Sum, loss, &all, false)?;
                cx.div(loss, total)
            }
            None => cx.mean(loss, &all, false),
        },
        other => Err(Error::user(format!("loss reduction `{other}`"))),
    }
}

pub(crate) fn nll_loss(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let v = nll(cx, n, n.x(0)?, n.x(1)?, n.opt(2)?)?;
    Ok(vec![Val::T(v)])
}

pub(crate) fn softmax_cross_entropy(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let logs = cx.op(Op::Softmax { axis: 1, log: true }, &[x])?;
    let v = nll(cx, n, logs, n.x(1)?, n.opt(2)?)?;
    Ok(vec![Val::T(v), Val::T(logs)])
}
