//! Gathers, scatters and top-k. Negative indices count from the end; one outside is the user's
//! error and names the index.

use super::reduce::{combine_floats, combine_ints};
use super::views::{for_each_index, row_major};
use crate::graph::Mode;
use crate::value::{Buf, Val, each_buf, round_to};
use tilewright_base::{Error, Result};
use tilewright_graph::{ReduceKind, ScatterKind};

/// Index `i` into an axis of `extent` elements.
fn resolve(i: i64, extent: usize, what: &str) -> Result<usize> {
    let wrapped = if i < 0 { i.saturating_add(extent as i64) } else { i };
    usize::try_from(wrapped).ok().filter(|&w| w < extent).ok_or_else(|| {
        Error::user(format!("index {i} is outside an axis of {extent} elements ({what})"))
    })
}

fn shapes_error(what: &str, shapes: &[&Val]) -> Error {
    let list: Vec<String> = shapes.iter().map(|v| format!("{:?}", v.shape)).collect();
    Error::user(format!("{what}: shapes {} do not fit", list.join(", ")))
}

pub(super) fn gather(data: &Val, indices: &Val, axis: usize) -> Result<Buf> {
    let extent = data.shape[axis];
    let run: usize = data.shape[axis + 1..].iter().product();
    let outer: usize = data.shape[..axis].iter().product();
    let at: Result<Vec<usize>> =
        indices.ints().iter().map(|&i| resolve(i, extent, "gather")).collect();
    let at = at?;
    Ok(each_buf!(&*data.buf, v => {
        let mut out = Vec::with_capacity(outer * at.len() * run);
        for block in 0..outer {
            for &i in &at {
                let start = (block * extent + i) * run;
                out.extend_from_slice(&v[start..start + run]);
            }
        }
        out
    }))
}

/// For each coordinate of `indices`: the offset in `data` of that coordinate with the one along
/// `axis` replaced by the index.
fn element_offsets(data: &Val, indices: &Val, axis: usize, what: &str) -> Result<Vec<usize>> {
    let fits = data.shape.len() == indices.shape.len()
        && (0..data.shape.len()).all(|i| i == axis || indices.shape[i] <= data.shape[i]);
    if !fits {
        return Err(shapes_error(what, &[data, indices]));
    }
    let strides = row_major(&data.shape);
    let values = indices.ints();
    let mut offsets = Vec::with_capacity(values.len());
    let mut failed = None;
    for_each_index(&indices.shape, |index| {
        match resolve(values[offsets.len()], data.shape[axis], what) {
            Ok(i) => offsets.push(
                index
                    .iter()
                    .enumerate()
                    .map(|(a, &c)| if a == axis { i } else { c } * strides[a] as usize)
                    .sum(),
            ),
            Err(e) => {
                failed.get_or_insert(e);
                offsets.push(0);
            }
        }
    });
    failed.map_or(Ok(offsets), Err)
}

pub(super) fn gather_elements(data: &Val, indices: &Val, axis: usize) -> Result<Buf> {
    let offsets = element_offsets(data, indices, axis, "gather elements")?;
    Ok(each_buf!(&*data.buf, v => offsets.iter().map(|&o| v[o]).collect()))
}

/// For each coordinate vector of `indices`: the offset of the run of `data` that it names, and the
/// length of all runs.
fn nd_offsets(data: &Val, indices: &Val, batch: usize, what: &str) -> Result<(Vec<usize>, usize)> {
    let rank = indices.shape.len();
    let depth = indices.shape.last().copied().unwrap_or(0);
    let fits = rank > batch
        && batch + depth <= data.shape.len()
        && data.shape[..batch] == indices.shape[..batch];
    if !fits {
        return Err(shapes_error(what, &[data, indices]));
    }
    let strides = row_major(&data.shape);
    let run: usize = data.shape[batch + depth..].iter().product();
    let values = indices.ints();
    let vectors: usize = indices.shape[..rank - 1].iter().product();
    let per_batch: usize = indices.shape[batch..rank - 1].iter().product();
    let block: usize = data.shape[batch..].iter().product();
    let mut offsets = Vec::with_capacity(vectors);
    for vector in 0..vectors {
        let mut offset = vector / per_batch * block;
        for d in 0..depth {
            let i = resolve(values[vector * depth + d], data.shape[batch + d], what)?;
            offset += i * strides[batch + d] as usize;
        }
        offsets.push(offset);
    }
    Ok((offsets, run))
}

pub(super) fn gather_nd(data: &Val, indices: &Val, batch: usize) -> Result<Buf> {
    let (offsets, run) = nd_offsets(data, indices, batch, "gather by coordinates")?;
    Ok(each_buf!(&*data.buf, v => {
        let mut out = Vec::with_capacity(offsets.len() * run);
        for &o in &offsets {
            out.extend_from_slice(&v[o..o + run]);
        }
        out
    }))
}

/// Writes update number `i` at offset `at(i)` of a copy of `data`, in order.
fn scatter(
    data: &Val,
    updates: &Val,
    kind: ScatterKind,
    mode: Mode,
    at: impl Fn(usize) -> usize,
) -> Buf {
    let combine = match kind {
        ScatterKind::Set => None,
        ScatterKind::Add => Some(ReduceKind::Sum),
        ScatterKind::Mul => Some(ReduceKind::Prod),
        ScatterKind::Max => Some(ReduceKind::Max),
        ScatterKind::Min => Some(ReduceKind::Min),
    };
    match &*data.buf {
        Buf::F(v) => {
            let mut out = v.clone();
            for (i, &u) in updates.floats().iter().enumerate() {
                let place = &mut out[at(i)];
                let new = combine.map_or(u, |c| combine_floats(c, *place, u));
                *place = if mode == Mode::Exact { round_to(data.dtype, new) } else { new };
            }
            Buf::F(out)
        }
        Buf::I(v) => {
            let mut out = v.clone();
            for (i, &u) in updates.ints().iter().enumerate() {
                let place = &mut out[at(i)];
                *place = combine.map_or(u, |c| combine_ints(data.dtype, c, *place, u));
            }
            Buf::I(out)
        }
    }
}

pub(super) fn scatter_elements(
    data: &Val,
    indices: &Val,
    updates: &Val,
    axis: usize,
    kind: ScatterKind,
    mode: Mode,
) -> Result<Buf> {
    if updates.shape != indices.shape {
        return Err(shapes_error("scatter elements", &[data, indices, updates]));
    }
    let offsets = element_offsets(data, indices, axis, "scatter elements")?;
    Ok(scatter(data, updates, kind, mode, |i| offsets[i]))
}

pub(super) fn scatter_nd(
    data: &Val,
    indices: &Val,
    updates: &Val,
    kind: ScatterKind,
    mode: Mode,
) -> Result<Buf> {
    let what = "scatter by coordinates";
    let (offsets, run) = nd_offsets(data, indices, 0, what)?;
    let depth = indices.shape.last().copied().unwrap_or(0);
    let mut expected = indices.shape[..indices.shape.len() - 1].to_vec();
    expected.extend_from_slice(&data.shape[depth..]);
    if updates.shape != expected {
        return Err(shapes_error(what, &[data, indices, updates]));
    }
    Ok(scatter(data, updates, kind, mode, |i| offsets[i / run] + i % run))
}

/// Values and positions of the first `k` along `axis` in sorted order. Equal elements keep their
/// order; NaN counts as larger than every number.
pub(super) fn top_k(x: &Val, axis: usize, k: usize, largest: bool) -> (Buf, Vec<i64>) {
    let extent = x.shape[axis];
    let inner: usize = x.shape[axis + 1..].iter().product();
    let outer: usize = x.shape[..axis].iter().product();
    // Offsets of the chosen elements, and their positions along the axis, in the result's order.
    let mut chosen = vec![0usize; outer * k * inner];
    let mut positions = vec![0i64; outer * k * inner];
    for block in 0..outer {
        for lane in 0..inner {
            let offset = |i: usize| (block * extent + i) * inner + lane;
            let mut order: Vec<usize> = (0..extent).collect();
            order.sort_by(|&a, &b| {
                let (a, b) = (offset(a), offset(b));
                let ascending = match &*x.buf {
                    Buf::F(v) => v[a].partial_cmp(&v[b]).unwrap_or_else(|| {
                        // At least one is NaN: the one that is, is larger.
                        v[a].is_nan().cmp(&v[b].is_nan())
                    }),
                    Buf::I(v) if x.dtype == tilewright_base::DType::U64 => {
                        (v[a] as u64).cmp(&(v[b] as u64))
                    }
                    Buf::I(v) => v[a].cmp(&v[b]),
                };
                if largest { ascending.reverse() } else { ascending }
            });
            for (rank, &i) in order.iter().take(k).enumerate() {
                let to = (block * k + rank) * inner + lane;
                chosen[to] = offset(i);
                positions[to] = i as i64;
            }
        }
    }
    (each_buf!(&*x.buf, v => chosen.iter().map(|&o| v[o]).collect()), positions)
}
