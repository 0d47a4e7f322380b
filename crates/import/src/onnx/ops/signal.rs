//! Fourier transforms as products with constant matrices; windows and filter banks as constants.

use super::super::cx::Cx;
use super::super::node::{N, Val, axis, one};
use std::f64::consts::PI;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::{Op, PadMode, ValueId};
use tilewright_layout::{Dim, numel};

/// Longer transforms are not done by matrix products.
const LENGTH_LIMIT: i64 = 4096;

/// A window from its formula over the phase `2 pi n / N`.
pub(crate) fn window(cx: &mut Cx, n: &N<'_>, f: fn(f64) -> f64) -> Result<Vec<Val>> {
    let size = cx.const_int(n.x(0)?, "size")?;
    if !(0..1 << 24).contains(&size) {
        return Err(Error::user(format!("a window of {size}")));
    }
    let dtype = n.dtype("output_datatype")?.unwrap_or(DType::F32);
    let period = if n.flag("periodic", true)? { size } else { size - 1 } as f64;
    let values: Vec<f64> = (0..size).map(|i| f(2.0 * PI * i as f64 / period)).collect();
    one(cx.constant(Tensor::from_f64s(dtype, &[size as usize], &values)?))
}

pub(crate) fn hann(x: f64) -> f64 {
    0.5 - 0.5 * x.cos()
}

pub(crate) fn hamming(x: f64) -> f64 {
    25.0 / 46.0 - (21.0 / 46.0) * x.cos()
}

pub(crate) fn blackman(x: f64) -> f64 {
    0.42 - 0.5 * x.cos() + 0.08 * (2.0 * x).cos()
}

pub(crate) fn mel_weights(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let bins = cx.const_int(n.x(0)?, "num_mel_bins")?;
    let length = cx.const_int(n.x(1)?, "dft_length")?;
    let rate = cx.const_int(n.x(2)?, "sample_rate")? as f64;
    let lower = cx.const_float(n.x(3)?, "lower_edge_hertz")?;
    let upper = cx.const_float(n.x(4)?, "upper_edge_hertz")?;
    let dtype = n.dtype("output_datatype")?.unwrap_or(DType::F32);
    if !(0..1 << 16).contains(&bins) || !(0..1 << 20).contains(&length) {
        return Err(Error::user(format!("{bins} mel bins of {length}")));
    }
    let rows = length / 2 + 1;
    let mel = |hz: f64| 2595.0 * (hz / 700.0).ln_1p() / 10f64.ln();
    let step = (mel(upper) - mel(lower)) / (bins + 2) as f64;
    let edge = |i: i64| {
        let hz = 700.0 * ((i as f64 * step + mel(lower)) / 2595.0 * 10f64.ln()).exp_m1();
        ((length + 1) as f64 * hz / rate).floor() as i64
    };
    let mut out = vec![0.0; (rows * bins) as usize];
    for i in 0..bins {
        let (left, centre, right) = (edge(i), edge(i + 1), edge(i + 2));
        let mut set = |row: i64, v: f64| {
            if (0..rows).contains(&row) {
                out[(row * bins + i) as usize] = v;
            }
        };
        if centre == left {
            set(centre, 1.0);
        } else {
            for j in left..=centre.min(rows) {
                set(j, (j - left) as f64 / (centre - left) as f64);
            }
        }
        for j in centre..right.min(rows) {
            set(j, (right - j) as f64 / (right - centre) as f64);
        }
    }
    one(cx.constant(Tensor::from_f64s(dtype, &[rows as usize, bins as usize], &out)?))
}

/// Real and imaginary part of a transform over axis `at`, as separate values. `x` is one part or
/// two; the matrices have `rows` results of `length` frequencies, conjugated for the inverse.
fn transform(
    cx: &mut Cx,
    parts: &[ValueId],
    at: usize,
    length: i64,
    rows: i64,
    sign: f64,
) -> Result<(ValueId, ValueId)> {
    let dtype = cx.dtype(parts[0]);
    let rank = cx.rank(parts[0]);
    if rank > 20 {
        return Err(Error::user("a transform of too many axes"));
    }
    let mut tables = Vec::new();
    for f in [f64::cos as fn(f64) -> f64, f64::sin] {
        let mut values = Vec::with_capacity((rows * length) as usize);
        for k in 0..rows {
            for t in 0..length {
                values.push(f(2.0 * PI * ((k * t) % length) as f64 / length as f64));
            }
        }
        let t = Tensor::from_f64s(dtype, &[rows as usize, length as usize], &values)?;
        tables.push(cx.constant(t));
    }
    let letters: String =
        (0..rank).map(|i| if i == at { 'i' } else { char::from(b'A' + i as u8) }).collect();
    let spec = format!("{letters},oi->{}", letters.replace('i', "o"));
    let re = cx.contract(&spec, parts[0], tables[0])?;
    let im = cx.contract(&spec, parts[0], tables[1])?;
    let im = cx.map(&[im], |p| p[0] * sign)?;
    let Some(&second) = parts.get(1) else { return Ok((re, im)) };
    let re2 = cx.contract(&spec, second, tables[1])?;
    let im2 = cx.contract(&spec, second, tables[0])?;
    let re = cx.map(&[re, re2], |p| p[0] - p[1] * sign)?;
    let im = cx.add(im, im2)?;
    Ok((re, im))
}

/// Cuts or pads one axis with zeros to a length.
fn fit(cx: &mut Cx, v: ValueId, at: usize, length: i64) -> Result<ValueId> {
    let have = cx.static_dim(&cx.shape(v)[at], "a Fourier transform")?;
    if have >= length {
        return cx.slice(v, at, Dim::new(0), Dim::new(length));
    }
    let rank = cx.rank(v);
    let mut hi = vec![Dim::new(0); rank];
    hi[at] = Dim::new(length - have);
    let zero = PadMode::Constant(tilewright_expr::Value::Float(0.0));
    cx.op(Op::Pad { lo: vec![Dim::new(0); rank], hi, mode: zero }, &[v])
}

pub(crate) fn dft(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    cx.float(x)?;
    let rank = cx.rank(x);
    if rank < 2 {
        return Err(Error::user(format!("DFT of {}", cx.ty(x))));
    }
    let a = match n.opt(2)? {
        Some(v) => cx.const_int(v, "axis")?,
        None if n.opset < 20 => n.int("axis", 1)?,
        None => -2,
    };
    let at = axis(a, rank)?;
    let (inverse, onesided) = (n.flag("inverse", false)?, n.flag("onesided", false)?);
    let have = cx.static_dim(&cx.shape(x)[at], "DFT")?;
    let length = match n.opt(1)? {
        Some(v) => cx.const_int(v, "dft_length")?,
        None if inverse && onesided => 2 * (have - 1),
        None => have,
    };
    if !(1..=LENGTH_LIMIT).contains(&length) || at == rank - 1 {
        return Err(Error::unsupported(format!("DFT of length {length} over axis {a}")));
    }
    let dtype = cx.dtype(x);
    let wide = cx.cast(x, dtype.compute())?;
    let last = rank - 1;
    let count = cx.static_dim(&cx.shape(x)[last], "DFT")?;
    let mut parts = Vec::new();
    for i in 0..count.min(2) {
        let part = cx.pick(wide, last, i)?;
        let length = if inverse && onesided { length / 2 + 1 } else { length };
        parts.push(fit(cx, part, at, length)?);
    }
    if parts.is_empty() {
        return Err(Error::user("DFT of nothing"));
    }
    let out = if inverse && onesided {
        // The missing half is the conjugate of the half that is given, backwards.
        let half = length / 2 + 1;
        let mirrored = length - half;
        let mut whole = Vec::new();
        for (i, &part) in parts.iter().enumerate() {
            let tail = cx.slice(part, at, Dim::new(1), Dim::new(mirrored))?;
            let tail = cx.reverse(tail, at)?;
            let tail = if i == 1 { cx.map(&[tail], |p| -p[0])? } else { tail };
            whole.push(cx.concat(&[part, tail], at)?);
        }
        let (re, _) = transform(cx, &whole, at, length, length, 1.0)?;
        let re = cx.map(&[re], |p| p[0] / length as f64)?;
        cx.unsqueeze(re, &[last])?
    } else {
        let rows = if onesided { length / 2 + 1 } else { length };
        let sign = if inverse { 1.0 } else { -1.0 };
        let (re, im) = transform(cx, &parts, at, length, rows, sign)?;
        let scale = if inverse { 1.0 / length as f64 } else { 1.0 };
        let mut both = Vec::new();
        for v in [re, im] {
            let v = if scale == 1.0 { v } else { cx.map(&[v], |p| p[0] * scale)? };
            both.push(cx.unsqueeze(v, &[last])?);
        }
        cx.concat(&both, last)?
    };
    one(cx.cast(out, dtype)?)
}

pub(crate) fn stft(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    cx.float(x)?;
    let step = cx.const_int(n.x(1)?, "frame_step")?;
    let dims = cx.shape(x);
    // [B, T] counts as [B, T, 1].
    let x = if dims.len() == 2 { cx.unsqueeze(x, &[2])? } else { x };
    let dims = cx.shape(x);
    if dims.len() != 3 || step < 1 {
        return Err(Error::user(format!("STFT of {} by steps of {step}", cx.ty(x))));
    }
    let total = cx.static_dim(&dims[1], "STFT")?;
    let window = n.opt(2)?;
    let length = match (n.opt(3)?, window) {
        (Some(v), _) => cx.const_int(v, "frame_length")?,
        (None, Some(w)) => cx.static_dim(&numel(&cx.shape(w)), "STFT")?,
        (None, None) => total,
    };
    if !(1..=LENGTH_LIMIT).contains(&length) || length > total {
        return Err(Error::unsupported(format!("STFT with frames of {length} over {total}")));
    }
    let frames = 1 + (total - length) / step;
    let mut index = Vec::with_capacity((frames * length) as usize);
    for f in 0..frames {
        index.extend((0..length).map(|i| f * step + i));
    }
    let index = Tensor::from_i64s(DType::I64, &[frames as usize, length as usize], &index)?;
    let index = cx.constant(index);
    // [B, T, P] -> [B, F, L, P]
    let mut v = cx.op(Op::Gather(1), &[x, index])?;
    if let Some(w) = window {
        let w = cx.reshape(w, &[Dim::new(length), Dim::new(1)])?;
        v = cx.mul(v, w)?;
    }
    let count = cx.static_dim(&dims[2], "STFT")?;
    let mut parts = Vec::new();
    for i in 0..count.min(2) {
        parts.push(cx.pick(v, 3, i)?);
    }
    if parts.is_empty() {
        return Err(Error::user("STFT of nothing"));
    }
    let rows = if n.flag("onesided", true)? { length / 2 + 1 } else { length };
    let (re, im) = transform(cx, &parts, 2, length, rows, -1.0)?;
    let (re, im) = (cx.unsqueeze(re, &[3])?, cx.unsqueeze(im, &[3])?);
    one(cx.concat(&[re, im], 3)?)
}
