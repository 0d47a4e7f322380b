//! `Window`: pooling.

use super::float_result;
use super::reduce::{fold_floats, fold_ints};
use super::views::{for_each_index, row_major};
use crate::graph::Mode;
use crate::value::{Buf, Val, wrap_to};
use rayon::prelude::*;
use tilewright_graph::{ReduceKind, WindowAttrs, WindowKind};

pub(super) fn window(x: &Val, attrs: &WindowAttrs, shape: &[usize], mode: Mode) -> Buf {
    let whole: i64 = attrs.kernel.iter().product();
    let kind = if attrs.kind == WindowKind::Max { ReduceKind::Max } else { ReduceKind::Sum };
    match &*x.buf {
        Buf::F(v) => {
            let finish = |values: &[f64]| -> f64 {
                let folded = fold_floats(kind, values.iter().copied());
                match attrs.kind {
                    WindowKind::Max | WindowKind::Sum => folded,
                    WindowKind::Mean => folded / values.len() as f64,
                    WindowKind::MeanWithPad => folded / whole as f64,
                }
            };
            float_result(x.dtype, mode, planes(v, &x.shape, attrs, shape, finish))
        }
        Buf::I(v) => {
            // Means of integers truncate; a mean of nothing is 0, as integer division by zero is.
            let finish = |values: &[i64]| -> i64 {
                let folded = fold_ints(x.dtype, kind, values.iter().copied());
                let count = match attrs.kind {
                    WindowKind::Max | WindowKind::Sum => 1,
                    WindowKind::Mean => values.len() as i64,
                    WindowKind::MeanWithPad => whole,
                };
                wrap_to(x.dtype, if count == 0 { 0 } else { folded.wrapping_div(count) })
            };
            Buf::I(planes(v, &x.shape, attrs, shape, finish))
        }
    }
}

/// Applies `finish` to the elements under each window, padding left out.
fn planes<T: Copy + Send + Sync + Default>(
    data: &[T],
    in_shape: &[usize],
    attrs: &WindowAttrs,
    shape: &[usize],
    finish: impl Fn(&[T]) -> T + Sync,
) -> Vec<T> {
    let (in_spatial, out_spatial) = (&in_shape[2..], &shape[2..]);
    let kernel: Vec<usize> = attrs.kernel.iter().map(|&k| k.max(0) as usize).collect();
    let strides = row_major(in_spatial);
    let in_plane: usize = in_spatial.iter().product();
    let out_plane: usize = out_spatial.iter().product();
    let mut result = vec![T::default(); shape.iter().product()];
    if result.is_empty() {
        return result;
    }
    result.par_chunks_mut(out_plane).enumerate().for_each(|(plane, result)| {
        let data = &data[plane * in_plane..][..in_plane];
        let mut under: Vec<T> = Vec::new();
        let mut next = 0;
        for_each_index(out_spatial, |out| {
            under.clear();
            for_each_index(&kernel, |k| {
                let mut src = 0i64;
                for axis in 0..out.len() {
                    let at = out[axis] as i64 * attrs.strides[axis]
                        + k[axis] as i64 * attrs.dilations[axis]
                        - attrs.pads_lo[axis];
                    if at < 0 || at >= in_spatial[axis] as i64 {
                        return;
                    }
                    src += at * strides[axis] as i64;
                }
                under.push(data[src as usize]);
            });
            result[next] = finish(&under);
            next += 1;
        });
    });
    result
}
