//! `Conv`: direct convolution, one output plane (sample and output channel) per task.
//!
//! Each sum runs over input channels, then over kernel taps, in ascending order.

use super::numeric::{Acc, gemm_rows, with_acc};
use super::views::{for_each_index, row_major};
use crate::graph::Mode;
use crate::value::{Buf, Val};
use rayon::prelude::*;
use tilewright_graph::ConvAttrs;

pub(super) fn conv(x: &Val, w: &Val, attrs: &ConvAttrs, shape: &[usize], mode: Mode) -> Buf {
    with_acc!(x.dtype.compute(), mode, direct(x, w, attrs, shape, mode))
}

/// Output positions `[from, to)` of one axis whose input coordinate
/// `position * stride + offset` lies inside `extent`.
pub(super) fn inside(stride: i64, offset: i64, extent: usize, outputs: usize) -> (usize, usize) {
    let ceil = |a: i64| (a + stride - 1).div_euclid(stride);
    let from = ceil(-offset).clamp(0, outputs as i64);
    let to = ceil(extent as i64 - offset).clamp(from, outputs as i64);
    (from as usize, to as usize)
}

fn direct<T: Acc>(x: &Val, w: &Val, attrs: &ConvAttrs, shape: &[usize], mode: Mode) -> Buf {
    let (data, weights) = (T::load(x), T::load(w));
    let (in_spatial, kernel, out_spatial) = (&x.shape[2..], &w.shape[2..], &shape[2..]);
    let size = |dims: &[usize]| dims.iter().product::<usize>();
    let (in_plane, taps, out_plane) = (size(in_spatial), size(kernel), size(out_spatial));
    let (outputs, per_group) = (shape[1], w.shape[1]);
    let group_outputs = (outputs / attrs.groups as usize).max(1);
    let mut sums = vec![T::ZERO; size(shape)];
    let pointwise = taps == 1
        && attrs.strides.iter().all(|&s| s == 1)
        && attrs.pads_lo.iter().chain(&attrs.pads_hi).all(|&p| p == 0);
    let channels_of = |plane: usize| {
        let (sample, output) = (plane / outputs, plane % outputs);
        sample * x.shape[1] + output / group_outputs * per_group
    };
    if sums.is_empty() || data.is_empty() || weights.is_empty() {
        // Nothing to sum: zeros.
    } else if pointwise {
        let rows = if group_outputs.is_multiple_of(8) { 8 } else { group_outputs };
        sums.par_chunks_mut(rows * out_plane).enumerate().for_each(|(chunk, sums)| {
            let plane = chunk * rows;
            let from = channels_of(plane) * in_plane;
            let b = &data[from..from + per_group * in_plane];
            let a = &weights[plane % outputs * per_group..][..rows * per_group];
            gemm_rows(sums, a, b, out_plane, per_group);
        });
    } else {
        let geometry = Geometry { attrs, in_spatial, kernel, out_spatial };
        sums.par_chunks_mut(out_plane).enumerate().for_each(|(plane, sums)| {
            let first = channels_of(plane);
            for channel in 0..per_group {
                let data = &data[(first + channel) * in_plane..][..in_plane];
                let weights = &weights[(plane % outputs * per_group + channel) * taps..][..taps];
                geometry.add_channel(sums, data, weights);
            }
        });
    }
    T::result(&sums, x.dtype.compute(), x.dtype, mode)
}

struct Geometry<'a> {
    attrs: &'a ConvAttrs,
    in_spatial: &'a [usize],
    kernel: &'a [usize],
    out_spatial: &'a [usize],
}

impl Geometry<'_> {
    /// Adds one input channel's contribution to one output plane.
    fn add_channel<T: Acc>(&self, sums: &mut [T], data: &[T], weights: &[T]) {
        let attrs = self.attrs;
        let last = self.kernel.len() - 1;
        let (in_strides, out_strides) = (row_major(self.in_spatial), row_major(self.out_spatial));
        let mut tap = 0;
        for_each_index(self.kernel, |k| {
            let weight = weights[tap];
            tap += 1;
            let offset = |axis: usize| k[axis] as i64 * attrs.dilations[axis] - attrs.pads_lo[axis];
            let stride = attrs.strides[last];
            let (from, to) =
                inside(stride, offset(last), self.in_spatial[last], self.out_spatial[last]);
            if from == to {
                return;
            }
            for_each_index(&self.out_spatial[..last], |out| {
                let (mut src, mut dst) = (0i64, 0i64);
                for (axis, &o) in out.iter().enumerate() {
                    let at = o as i64 * attrs.strides[axis] + offset(axis);
                    if at < 0 || at >= self.in_spatial[axis] as i64 {
                        return;
                    }
                    src += at * in_strides[axis] as i64;
                    dst += o as i64 * out_strides[axis] as i64;
                }
                let row = &mut sums[dst as usize + from..dst as usize + to];
                let start = (src + from as i64 * stride + offset(last)) as usize;
                if stride == 1 {
                    for (sum, &x) in row.iter_mut().zip(&data[start..]) {
                        *sum = sum.fma(weight, x);
                    }
                } else {
                    for (sum, &x) in
                        row.iter_mut().zip(data[start..].iter().step_by(stride as usize))
                    {
                        *sum = sum.fma(weight, x);
                    }
                }
            });
        });
    }
}
