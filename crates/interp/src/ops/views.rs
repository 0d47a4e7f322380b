//! Operators that move elements: reshape, permute, expand, slice, pad, concat, iota.

use super::float_result;
use crate::graph::Mode;
use crate::value::{Buf, Val, each_buf, round_to, wrap_to};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Value;
use tilewright_graph::PadMode;
use tilewright_layout::Dim;

/// Row-major strides in elements.
pub(crate) fn row_major(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![0; shape.len()];
    let mut next = 1usize;
    for (stride, &extent) in strides.iter_mut().zip(shape).rev() {
        *stride = next as isize;
        next = next.saturating_mul(extent.max(1));
    }
    strides
}

/// Calls `visit` with every coordinate of `shape`, row-major.
pub(crate) fn for_each_index(shape: &[usize], mut visit: impl FnMut(&[usize])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0usize; shape.len()];
    loop {
        visit(&index);
        let mut axis = shape.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
}

/// `out[i...] = val[base + sum(i * strides)]` as a value of this shape, which must stay inside.
pub(crate) fn strided(val: &Val, shape: &[usize], strides: &[isize], base: isize) -> Val {
    if base == 0 && strides == row_major(shape) && shape.iter().product::<usize>() == val.len() {
        return val.with_shape(shape.to_vec());
    }
    let buf = each_buf!(&*val.buf, v => strided_copy(v, shape, strides, base));
    Val::new(val.dtype, shape.to_vec(), buf)
}

fn strided_copy<T: Copy>(src: &[T], shape: &[usize], strides: &[isize], base: isize) -> Vec<T> {
    let n: usize = shape.iter().product();
    let mut out = Vec::with_capacity(n);
    let Some((&inner, outer)) = shape.split_last() else {
        return vec![src[base as usize]];
    };
    let inner_stride = strides[outer.len()];
    for_each_index(if n == 0 { &[0] } else { outer }, |index| {
        let start = index.iter().zip(strides).fold(base, |at, (&i, &s)| at + i as isize * s);
        match inner_stride {
            1 => out.extend_from_slice(&src[start as usize..start as usize + inner]),
            0 => out.resize(out.len() + inner, src[start as usize]),
            step => {
                out.extend((0..inner as isize).map(|i| src[(start + i * step) as usize]));
            }
        }
    });
    out
}

pub(super) fn reshape(x: &Val, shape: &[usize]) -> Result<Val> {
    if x.len() != shape.iter().product::<usize>() {
        return Err(Error::user(format!(
            "cannot reshape {:?} ({} elements) to {shape:?}",
            x.shape,
            x.len()
        )));
    }
    Ok(x.with_shape(shape.to_vec()))
}

pub(crate) fn permute(x: &Val, perm: &[usize]) -> Val {
    let strides = row_major(&x.shape);
    let shape: Vec<usize> = perm.iter().map(|&p| x.shape[p]).collect();
    let strides: Vec<isize> = perm.iter().map(|&p| strides[p]).collect();
    strided(x, &shape, &strides, 0)
}

/// Broadcast by NumPy's rule; the shapes agree.
pub(crate) fn expand(x: &Val, shape: &[usize]) -> Val {
    if x.shape == shape {
        return x.clone();
    }
    let lead = shape.len() - x.shape.len();
    let mut strides = vec![0isize; shape.len()];
    for (i, stride) in row_major(&x.shape).into_iter().enumerate() {
        if x.shape[i] != 1 {
            strides[lead + i] = stride;
        }
    }
    strided(x, shape, &strides, 0)
}

pub(super) fn slice(x: &Val, starts: &[Dim], steps: &[i64], shape: &[usize]) -> Result<Buf> {
    let plain = row_major(&x.shape);
    let (mut base, mut strides) = (0isize, Vec::with_capacity(shape.len()));
    for (axis, (start, &step)) in starts.iter().zip(steps).enumerate() {
        let start = start.as_const().ok_or_else(|| Error::bug("a slice start is not a number"))?;
        base += start as isize * plain[axis];
        strides.push(step as isize * plain[axis]);
    }
    if shape.contains(&0) {
        return Ok(strided(x, shape, &strides, 0).take_buf());
    }
    Ok(strided(x, shape, &strides, base).take_buf())
}

pub(super) fn pad(x: &Val, lo: &[Dim], mode: &PadMode, shape: &[usize]) -> Result<Buf> {
    // Per axis: the source coordinate of each coordinate of the result, None where it is filled.
    let mut tables: Vec<Vec<Option<usize>>> = Vec::with_capacity(shape.len());
    for (axis, &extent) in shape.iter().enumerate() {
        let lo = lo[axis].as_const().ok_or_else(|| Error::bug("a padding is not a number"))?;
        let size = x.shape[axis] as i64;
        if size == 0 && extent > 0 && !matches!(mode, PadMode::Constant(_)) {
            return Err(Error::user(format!("padding an empty axis {axis} from its elements")));
        }
        let source = |out: usize| -> Option<usize> {
            let at = (out as i64).saturating_sub(lo);
            let at = match mode {
                PadMode::Constant(_) => return (0..size).contains(&at).then_some(at as usize),
                PadMode::Edge => at.clamp(0, size - 1),
                PadMode::Wrap => at.rem_euclid(size),
                PadMode::Reflect if size == 1 => 0,
                PadMode::Reflect => {
                    let period = 2 * (size - 1);
                    let at = at.rem_euclid(period);
                    at.min(period - at)
                }
            };
            Some(at as usize)
        };
        tables.push((0..extent).map(source).collect());
    }
    let strides = row_major(&x.shape);
    let offset = |index: &[usize]| -> Option<usize> {
        let mut at = 0;
        for (axis, &i) in index.iter().enumerate() {
            at += tables[axis][i]? * strides[axis] as usize;
        }
        Some(at)
    };
    let fill = match mode {
        PadMode::Constant(value) => *value,
        _ => Value::Int(0),
    };
    Ok(match &*x.buf {
        Buf::F(v) => {
            let fill = match fill {
                Value::Float(f) => f,
                Value::Int(i) => i as f64,
            };
            let fill = round_to(x.dtype, fill);
            Buf::F(pick(v, shape, fill, offset))
        }
        Buf::I(v) => {
            let fill = match fill {
                Value::Float(f) => f as i64,
                Value::Int(i) => i,
            };
            Buf::I(pick(v, shape, wrap_to(x.dtype, fill), offset))
        }
    })
}

fn pick<T: Copy>(
    src: &[T],
    shape: &[usize],
    fill: T,
    offset: impl Fn(&[usize]) -> Option<usize>,
) -> Vec<T> {
    let mut out = Vec::with_capacity(shape.iter().product());
    for_each_index(shape, |index| out.push(offset(index).map_or(fill, |at| src[at])));
    out
}

pub(super) fn concat(inputs: &[Val], axis: usize, dtype: DType) -> Buf {
    let outer: usize = inputs[0].shape[..axis].iter().product();
    fn join<'a, T: Copy + 'a>(outer: usize, parts: Vec<(&'a [T], usize)>) -> Vec<T> {
        let mut out = Vec::with_capacity(parts.iter().map(|(v, _)| v.len()).sum());
        for row in 0..outer {
            for (values, run) in &parts {
                out.extend_from_slice(&values[row * run..(row + 1) * run]);
            }
        }
        out
    }
    let run = |x: &Val| x.shape[axis..].iter().product::<usize>();
    if dtype.is_float() {
        let parts = inputs.iter().filter_map(|x| match &*x.buf {
            Buf::F(v) => Some((v.as_slice(), run(x))),
            Buf::I(_) => None,
        });
        Buf::F(join(outer, parts.collect()))
    } else {
        let parts = inputs.iter().filter_map(|x| match &*x.buf {
            Buf::I(v) => Some((v.as_slice(), run(x))),
            Buf::F(_) => None,
        });
        Buf::I(join(outer, parts.collect()))
    }
}

pub(super) fn iota(dtype: DType, shape: &[usize], axis: usize, mode: Mode) -> Buf {
    let inner: usize = shape[axis + 1..].iter().product();
    let n: usize = shape.iter().product();
    let count = (0..n).map(|i| (i / inner) % shape[axis]);
    if dtype.is_float() {
        float_result(dtype, mode, count.map(|i| i as f64).collect())
    } else {
        Buf::I(count.map(|i| wrap_to(dtype, i as i64)).collect())
    }
}
