//! Convolutions of bytes as matrix products of bytes.
//!
//! `Op::Conv` has one element type, so bytes would be widened and multiplied as `i32`. Their windows are laid out
//! instead, a row for each output with the channels of all taps next to each other, and multiplied with the weights as
//! a matrix, which the instructions for bytes take:
//!
//! ```text
//! x[N,C,H,W]  ->  padded with its zero point, channels last  ->  windows[N,OH,OW,taps*C]
//! windows @ w[taps*C,O]  ->  [N,OH,OW,O]
//! ```
//!
//! What follows is computed with the channels last, too, so that the next convolution finds them there.
//!
//! Sums wrap in 32 bits in both forms, so results are equal.

use super::super::cx::Cx;
use super::super::node::N;
use super::{conv, matmul};
use tilewright_base::{DType, Result};
use tilewright_data::{Bytes, Tensor};
use tilewright_expr::Value as Number;
use tilewright_graph::{Op, PadMode, ValueId};
use tilewright_layout::Dim;

/// Fewer channels are not worth a row of windows: a step of the instructions takes four, and each tap is copied apart.
const CHANNELS_MIN: i64 = 8;

/// More taps would copy the data too often.
const TAPS_MAX: i64 = 25;

/// The convolution of a node's geometry in `i32`, less the zero points, with the channels last; `None` where this form does not fit (groups,
/// other types, few channels, many taps, padding with a zero point that is not known).
pub(crate) fn convolve(
    cx: &mut Cx,
    n: &N<'_>,
    [x, w]: [ValueId; 2],
    [zx, zw]: [Option<ValueId>; 2],
) -> Result<Option<ValueId>> {
    let (dims, weights) = (cx.shape(x), cx.shape(w));
    let rank = dims.len();
    let bytes = |v: ValueId| matches!(cx.dtype(v), DType::I8 | DType::U8);
    if rank < 3 || weights.len() != rank || !bytes(x) || !bytes(w) || n.int("group", 1)? != 1 {
        return Ok(None);
    }
    let known: Option<Vec<i64>> = weights.iter().map(Dim::as_const).collect();
    let Some(known) = known else { return Ok(None) };
    let (kernel, channels) = (known[2..].to_vec(), known[1]);
    let taps = kernel.iter().try_fold(1i64, |t, &k| t.checked_mul(k)).unwrap_or(i64::MAX);
    let declared = n.ints("kernel_shape")?;
    let fits = (CHANNELS_MIN..=1 << 20).contains(&channels)
        && dims[1].is(channels)
        && (1..=TAPS_MAX).contains(&taps)
        && declared.is_none_or(|d| d == kernel);
    if !fits {
        return Ok(None);
    }
    let g = conv::geometry(n, &dims[2..], kernel)?;
    let scalar = |cx: &Cx, z: Option<ValueId>| {
        z.is_none_or(|z| cx.shape(z).iter().all(|d| d.is(1)) && cx.rank(z) <= 1)
    };
    let pads = g.lo.iter().chain(&g.hi);
    if !scalar(cx, zx) || pads.clone().any(|&p| p < 0) {
        return Ok(None);
    }
    // Channels last, so that a window's rows are next to each other.
    let order: Vec<usize> = [0].into_iter().chain(2..rank).chain([1]).collect();
    let mut data = cx.permute(x, &order)?;
    if pads.clone().any(|&p| p != 0) {
        let fill = match zx {
            None => Some(0),
            Some(z) => cx.as_const(z).map(|t| t.get_i64(0)),
        };
        let Some(fill) = fill else { return Ok(None) };
        let widen = |list: &[i64]| -> Vec<Dim> {
            [0].iter().chain(list).chain(&[0]).map(|&p| Dim::new(p)).collect()
        };
        let mode = PadMode::Constant(Number::Int(fill));
        data = cx.op(Op::Pad { lo: widen(&g.lo), hi: widen(&g.hi), mode }, &[data])?;
    }
    let mut lens = vec![dims[0].clone()];
    for i in 0..rank - 2 {
        let reach = (g.kernel[i] - 1) * g.dilations[i] + 1;
        let room = &dims[2 + i] + (g.lo[i] + g.hi[i] - reach);
        if room.as_const().is_some_and(|r| r < 0) {
            return Ok(None);
        }
        lens.push(room.floor_div(&Dim::new(g.strides[i])) + 1);
    }
    lens.push(Dim::new(channels));
    let mut steps = vec![1];
    steps.extend(&g.strides);
    steps.push(1);
    let mut windows = Vec::new();
    for tap in 0..taps {
        // The last spatial axis runs fastest, as in the weights.
        let mut starts = vec![Dim::new(0); rank];
        let mut rest = tap;
        for i in (0..rank - 2).rev() {
            starts[1 + i] = Dim::new(rest % g.kernel[i] * g.dilations[i]);
            rest /= g.kernel[i];
        }
        let all = cx.shape(data) == lens && steps.iter().all(|&s| s == 1);
        let slice = Op::Slice { starts, lens: lens.clone(), steps: steps.clone() };
        windows.push(if all { data } else { cx.op(slice, &[data])? });
    }
    let windows = match windows.as_slice() {
        [only] => *only,
        all => cx.concat(all, rank - 1)?,
    };
    // [O, C, taps...] as [taps..., C, O].
    let matrix = match cx.as_const(w).map(matrix_of).transpose()? {
        Some(matrix) => cx.constant(matrix),
        None => {
            let order: Vec<usize> = (2..rank).chain([1, 0]).collect();
            let matrix = cx.permute(w, &order)?;
            cx.reshape(matrix, &[Dim::new(taps * channels), weights[0].clone()])?
        }
    };
    matmul::byte_product(cx, windows, zx, matrix, zw).map(Some)
}

/// Constant weights as the matrix.
fn matrix_of(w: &Tensor) -> Result<Tensor> {
    let (outputs, channels) = (w.shape()[0], w.shape()[1]);
    let taps: usize = w.shape()[2..].iter().product();
    let mut matrix = vec![0u8; w.len()];
    for (i, &byte) in w.bytes().iter().enumerate() {
        let (tap, channel, output) = (i % taps, i / taps % channels, i / taps / channels);
        matrix[(tap * channels + channel) * outputs + output] = byte;
    }
    Tensor::new(w.dtype(), [taps * channels, outputs], Bytes::copy_from(&matrix))
}

/// Channels from the last axis to where ONNX has them.
pub(crate) fn channels_second(cx: &mut Cx, v: ValueId) -> Result<ValueId> {
    let rank = cx.rank(v);
    let back: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    cx.permute(v, &back)
}
