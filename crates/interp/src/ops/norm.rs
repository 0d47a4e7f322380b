//! Softmax and the normalisations: computed in `f64`, rounded once.

use super::float_result;
use super::reduce::map_rows;
use super::views::expand;
use crate::graph::Mode;
use crate::value::{Buf, Val};
use rayon::prelude::*;
use tilewright_base::{Error, Result};

/// Softmax of one row, in place. A row of nothing but minus infinity gives NaN.
pub(super) fn softmax_row(row: &mut [f64], log: bool) {
    let mut max = f64::NEG_INFINITY;
    for &x in row.iter() {
        if x > max || x.is_nan() {
            max = x;
        }
        if max.is_nan() {
            break;
        }
    }
    let mut sum = 0.0;
    if log {
        for x in row.iter() {
            sum += libm::exp(x - max);
        }
        let shift = libm::log(sum);
        for x in row {
            *x = (*x - max) - shift;
        }
        return;
    }
    for x in row.iter_mut() {
        *x = libm::exp(*x - max);
        sum += *x;
    }
    for x in row {
        *x /= sum;
    }
}

pub(super) fn softmax(x: &Val, axis: usize, log: bool, mode: Mode) -> Val {
    map_rows(x, axis, mode, |row| softmax_row(row, log))
}

/// `(x - mean) / sqrt(var + eps)` of one row, in place.
fn standardise(row: &mut [f64], eps: f64) {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    let scale = 1.0 / (variance + eps).sqrt();
    for x in row {
        *x = (*x - mean) * scale;
    }
}

/// Rows are the axes from `axis` on; then `* scale + bias`, broadcast.
fn rows_then_affine(inputs: &[Val], axis: usize, mode: Mode, f: impl Fn(&mut [f64]) + Sync) -> Buf {
    let x = &inputs[0];
    let mut values = x.floats().into_owned();
    let len: usize = x.shape[axis..].iter().product();
    values.par_chunks_mut(len.max(1)).for_each(&f);
    for (i, operand) in inputs[1..].iter().enumerate() {
        let operand = expand(operand, &x.shape);
        for (v, &o) in values.iter_mut().zip(operand.floats().iter()) {
            *v = if i == 0 { *v * o } else { *v + o };
        }
    }
    float_result(x.dtype, mode, values)
}

pub(super) fn layer_norm(inputs: &[Val], axis: usize, eps: u64, mode: Mode) -> Buf {
    rows_then_affine(inputs, axis, mode, |row| standardise(row, f64::from_bits(eps)))
}

pub(super) fn rms_norm(inputs: &[Val], axis: usize, eps: u64, mode: Mode) -> Buf {
    rows_then_affine(inputs, axis, mode, |row| {
        let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean_square + f64::from_bits(eps)).sqrt();
        for x in row {
            *x *= scale;
        }
    })
}

/// Calls `f` with each channel plane of `[N, C, ...]` and its channel number.
fn for_each_channel(values: &mut [f64], shape: &[usize], f: impl Fn(&mut [f64], usize)) {
    let plane: usize = shape[2..].iter().product();
    for (i, plane) in values.chunks_mut(plane.max(1)).enumerate() {
        f(plane, i % shape[1]);
    }
}

pub(super) fn batch_norm(inputs: &[Val], eps: u64, mode: Mode) -> Buf {
    let x = &inputs[0];
    let mut values = x.floats().into_owned();
    let [scale, bias, mean, variance] = [1, 2, 3, 4].map(|i| inputs[i].floats());
    for_each_channel(&mut values, &x.shape, |plane, c| {
        let factor = scale[c] / (variance[c] + f64::from_bits(eps)).sqrt();
        for v in plane {
            *v = (*v - mean[c]) * factor + bias[c];
        }
    });
    float_result(x.dtype, mode, values)
}

pub(super) fn group_norm(inputs: &[Val], groups: i64, eps: u64, mode: Mode) -> Result<Buf> {
    let x = &inputs[0];
    let channels = x.shape[1];
    let groups = usize::try_from(groups).ok().filter(|&g| g > 0 && channels.is_multiple_of(g));
    let Some(groups) = groups else {
        return Err(Error::user(format!("{channels} channels do not fall into equal groups")));
    };
    let mut values = x.floats().into_owned();
    let plane: usize = x.shape[2..].iter().product();
    let len = channels / groups * plane;
    values.par_chunks_mut(len.max(1)).for_each(|row| standardise(row, f64::from_bits(eps)));
    let (scale, bias) = (inputs[1].floats(), inputs[2].floats());
    for_each_channel(&mut values, &x.shape, |plane, c| {
        for v in plane {
            *v = *v * scale[c] + bias[c];
        }
    });
    Ok(float_result(x.dtype, mode, values))
}
