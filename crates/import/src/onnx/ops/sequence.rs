//! Sequences and optionals, resolved at import: their lengths and positions must be known.

use super::super::cx::Cx;
use super::super::node::{N, Val, axis, one};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::ValueId;
use tilewright_layout::Dim;

fn position(cx: &mut Cx, v: ValueId, len: usize, most: usize) -> Result<usize> {
    let i = cx.const_int(v, "a position in a sequence")?;
    let at = if i < 0 { i.saturating_add(len as i64) } else { i };
    usize::try_from(at)
        .ok()
        .filter(|&at| at < most)
        .ok_or_else(|| Error::user(format!("position {i} in a sequence of {len}")))
}

pub(crate) fn construct(_: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    Ok(vec![Val::Seq(n.all()?)])
}

pub(crate) fn empty(_: &mut Cx, _: &N<'_>) -> Result<Vec<Val>> {
    Ok(vec![Val::Seq(Vec::new())])
}

pub(crate) fn at(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let items = n.seq(0)?;
    let i = position(cx, n.x(1)?, items.len(), items.len())?;
    one(items[i])
}

pub(crate) fn erase(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let mut items = n.seq(0)?;
    let len = items.len();
    let i = match n.opt(1)? {
        Some(v) => position(cx, v, len, len)?,
        None => len.checked_sub(1).ok_or_else(|| Error::user("erasing from an empty sequence"))?,
    };
    items.remove(i);
    Ok(vec![Val::Seq(items)])
}

pub(crate) fn insert(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let mut items = n.seq(0)?;
    let i = match n.opt(2)? {
        Some(v) => position(cx, v, items.len(), items.len() + 1)?,
        None => items.len(),
    };
    items.insert(i, n.x(1)?);
    Ok(vec![Val::Seq(items)])
}

pub(crate) fn length(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let len = n.seq(0)?.len() as i64;
    one(cx.constant(Tensor::from_i64s(DType::I64, &[], &[len])?))
}

pub(crate) fn concat(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let mut items = n.seq(0)?;
    let Some(&first) = items.first() else {
        return Err(Error::user("joining an empty sequence"));
    };
    let rank = cx.rank(first);
    let a = n.int("axis", 0)?;
    if !n.flag("new_axis", false)? {
        let at = axis(a, rank)?;
        return one(cx.concat(&items, at)?);
    }
    let at = axis(a, rank + 1)?;
    for v in &mut items {
        *v = cx.unsqueeze(*v, &[at])?;
    }
    one(cx.concat(&items, at)?)
}

pub(crate) fn split(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let at = n.axis("axis", 0, cx.rank(x))?;
    let extent = cx.static_dim(&cx.shape(x)[at], "SplitToSequence")?;
    let mut squeeze = false;
    let lens: Vec<i64> = match n.opt(1)? {
        Some(v) => {
            let list = cx.const_ints(v, "split")?;
            match (cx.rank(v), list.as_slice()) {
                (0, [each]) if *each > 0 => {
                    (0..extent).step_by(*each as usize).map(|s| (*each).min(extent - s)).collect()
                }
                (0, _) => return Err(Error::user(format!("a split by {list:?}"))),
                _ => list,
            }
        }
        None => {
            squeeze = !n.flag("keepdims", true)?;
            vec![1; extent.max(0) as usize]
        }
    };
    let mut items = Vec::new();
    let mut start = 0;
    for len in lens {
        let mut v = cx.slice(x, at, Dim::new(start), Dim::new(len))?;
        if squeeze {
            v = cx.pick(v, at, 0)?;
        }
        items.push(v);
        start += len;
    }
    Ok(vec![Val::Seq(items)])
}

pub(crate) fn optional(_: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    Ok(vec![n.ins.first().cloned().flatten().unwrap_or(Val::Absent)])
}

pub(crate) fn has_element(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let has = !matches!(n.ins.first(), None | Some(None) | Some(Some(Val::Absent)));
    one(cx.constant(Tensor::from_i64s(DType::Bool, &[], &[has.into()])?))
}

pub(crate) fn get_element(_: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    match n.ins.first().cloned().flatten() {
        None | Some(Val::Absent) => Err(Error::user("the element of an empty optional")),
        Some(val) => Ok(vec![val]),
    }
}
