//! Reductions, index reductions and scans, all as work on rows: the axes concerned are brought
//! innermost first.

use super::float_result;
use super::views::permute;
use crate::graph::Mode;
use crate::value::{Buf, Val, round_to, wrap_to};
use rayon::prelude::*;
use tilewright_base::{DType, Error, Result};
use tilewright_graph::ReduceKind;

/// Folds floats in order; NaN wins in `Max` and `Min`.
pub(crate) fn fold_floats(kind: ReduceKind, values: impl Iterator<Item = f64>) -> f64 {
    values.fold(float_identity(kind), |a, b| combine_floats(kind, a, b))
}

pub(crate) fn combine_floats(kind: ReduceKind, a: f64, b: f64) -> f64 {
    match kind {
        ReduceKind::Sum => a + b,
        ReduceKind::Prod => a * b,
        ReduceKind::Max if a.is_nan() || a > b => a,
        ReduceKind::Min if a.is_nan() || a < b => a,
        ReduceKind::Max | ReduceKind::Min => b,
    }
}

fn float_identity(kind: ReduceKind) -> f64 {
    match kind {
        ReduceKind::Sum => 0.0,
        ReduceKind::Prod => 1.0,
        ReduceKind::Max => f64::NEG_INFINITY,
        ReduceKind::Min => f64::INFINITY,
    }
}

/// Folds integers of type `dtype` in order, wrapping.
pub(crate) fn fold_ints(dtype: DType, kind: ReduceKind, values: impl Iterator<Item = i64>) -> i64 {
    values.fold(int_identity(dtype, kind), |a, b| combine_ints(dtype, kind, a, b))
}

pub(crate) fn combine_ints(dtype: DType, kind: ReduceKind, a: i64, b: i64) -> i64 {
    let less = if dtype == DType::U64 { (a as u64) < b as u64 } else { a < b };
    match kind {
        ReduceKind::Sum => wrap_to(dtype, a.wrapping_add(b)),
        ReduceKind::Prod => wrap_to(dtype, a.wrapping_mul(b)),
        ReduceKind::Max => {
            if less {
                b
            } else {
                a
            }
        }
        ReduceKind::Min => {
            if less {
                a
            } else {
                b
            }
        }
    }
}

fn int_identity(dtype: DType, kind: ReduceKind) -> i64 {
    let bits = dtype.bits();
    let (least, most) = match (dtype, dtype.is_signed_int()) {
        (DType::Bool, _) => (0, 1),
        (DType::I64, _) => (i64::MIN, i64::MAX),
        (DType::U64, _) => (0, -1),
        (_, true) => (-(1i64 << (bits - 1)), (1i64 << (bits - 1)) - 1),
        (_, false) => (0, (1i64 << bits) - 1),
    };
    match kind {
        ReduceKind::Sum => 0,
        ReduceKind::Prod => 1,
        ReduceKind::Max => least,
        ReduceKind::Min => most,
    }
}

/// `x` with `axes` (ascending) moved innermost, the number of rows and the row length.
fn rows(x: &Val, axes: &[usize]) -> (Val, usize, usize) {
    let kept = (0..x.shape.len()).filter(|i| !axes.contains(i));
    let perm: Vec<usize> = kept.clone().chain(axes.iter().copied()).collect();
    let count = kept.map(|i| x.shape[i]).product();
    let len = axes.iter().map(|&i| x.shape[i]).product();
    (permute(x, &perm), count, len)
}

pub(super) fn reduce(x: &Val, kind: ReduceKind, axes: &[usize], mode: Mode) -> Buf {
    let (x, count, len) = rows(x, axes);
    match &*x.buf {
        Buf::F(v) => {
            let fold = |r: usize| fold_floats(kind, v[r * len..(r + 1) * len].iter().copied());
            float_result(x.dtype, mode, (0..count).into_par_iter().map(fold).collect())
        }
        Buf::I(v) => {
            let fold =
                |r: usize| fold_ints(x.dtype, kind, v[r * len..(r + 1) * len].iter().copied());
            Buf::I((0..count).into_par_iter().map(fold).collect())
        }
    }
}

pub(super) fn arg_reduce(x: &Val, kind: ReduceKind, axis: usize, last: bool) -> Result<Buf> {
    let (x, count, len) = rows(x, &[axis]);
    if len == 0 && count > 0 {
        return Err(Error::user(format!("position of the {kind:?} along the empty axis {axis}")));
    }
    let sign = if kind == ReduceKind::Max { 1.0 } else { -1.0 };
    let best = |r: usize| -> i64 {
        let range = r * len..(r + 1) * len;
        let mut best = 0;
        for i in 1..len {
            let (better, equal) = match &*x.buf {
                Buf::F(v) => {
                    let (old, new) = (v[range.start + best] * sign, v[range.start + i] * sign);
                    (
                        (new.is_nan() && !old.is_nan()) || new > old,
                        new == old || (new.is_nan() && old.is_nan()),
                    )
                }
                Buf::I(v) => {
                    let (old, new) = (v[range.start + best], v[range.start + i]);
                    (old != new && combine_ints(x.dtype, kind, old, new) == new, old == new)
                }
            };
            if better || (equal && last) {
                best = i;
            }
        }
        best as i64
    };
    Ok(Buf::I((0..count).into_par_iter().map(best).collect()))
}

/// Applies `f` to each row along `axis`; `f` sees the row's floats and changes them in place.
pub(super) fn map_rows(x: &Val, axis: usize, mode: Mode, f: impl Fn(&mut [f64]) + Sync) -> Val {
    let (rows, _, len) = rows(x, &[axis]);
    let mut values = rows.floats().into_owned();
    if len > 0 {
        values.par_chunks_mut(len).for_each(&f);
    }
    let rows = Val::new(x.dtype, rows.shape.clone(), float_result(x.dtype, mode, values));
    permute(&rows, &back(x.shape.len(), axis))
}

/// The permutation that brings the innermost axis back to `axis`.
fn back(rank: usize, axis: usize) -> Vec<usize> {
    (0..rank)
        .map(|i| match i.cmp(&axis) {
            std::cmp::Ordering::Less => i,
            std::cmp::Ordering::Equal => rank - 1,
            std::cmp::Ordering::Greater => i - 1,
        })
        .collect()
}

pub(super) fn scan(
    x: &Val,
    kind: ReduceKind,
    axis: usize,
    exclusive: bool,
    reverse: bool,
    mode: Mode,
) -> Val {
    let (rows, _, len) = rows(x, &[axis]);
    fn run<T: Copy>(
        row: &mut [T],
        identity: T,
        exclusive: bool,
        reverse: bool,
        combine: impl Fn(T, T) -> T,
    ) {
        let mut sum = identity;
        let n = row.len();
        for step in 0..n {
            let at = if reverse { n - 1 - step } else { step };
            let before = sum;
            sum = combine(sum, row[at]);
            row[at] = if exclusive { before } else { sum };
        }
    }
    let buf = match &*rows.buf {
        Buf::F(v) => {
            let mut v = v.clone();
            // Running values are stored, so in exact mode each of them is rounded.
            let combine = |a, b| {
                let c = combine_floats(kind, a, b);
                if mode == Mode::Exact { round_to(x.dtype, c) } else { c }
            };
            for row in v.chunks_mut(len.max(1)) {
                run(row, float_identity(kind), exclusive, reverse, combine);
            }
            Buf::F(v)
        }
        Buf::I(v) => {
            let mut v = v.clone();
            for row in v.chunks_mut(len.max(1)) {
                let combine = |a, b| combine_ints(x.dtype, kind, a, b);
                run(row, int_identity(x.dtype, kind), exclusive, reverse, combine);
            }
            Buf::I(v)
        }
    };
    permute(&Val::new(x.dtype, rows.shape.clone(), buf), &back(x.shape.len(), axis))
}
