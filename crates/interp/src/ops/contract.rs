//! `Contract`: einsum of two operands, brought to `[batch, m, k] x [batch, k, n]`.

use super::numeric::{Acc, GEMM_ROWS, gemm_rows, with_acc};
use super::views::{row_major, strided};
use crate::graph::Mode;
use crate::value::{Buf, Val, checked_len, round_to};
use rayon::prelude::*;
use tilewright_base::{DType, Error, Result};

/// One letter: its extent, and its stride in each operand (0 where absent or stretched).
struct Axis {
    letter: char,
    extent: usize,
    strides: [isize; 2],
    present: [bool; 2],
}

/// `spec` holds the letters of the two operands and of the result.
pub(super) fn contract(
    lhs: &Val,
    rhs: &Val,
    spec: [&String; 3],
    acc: DType,
    dtype: DType,
    mode: Mode,
) -> Result<Buf> {
    let mut axes: Vec<Axis> = Vec::new();
    for (side, (letters, val)) in [(spec[0], lhs), (spec[1], rhs)].into_iter().enumerate() {
        let strides = row_major(&val.shape);
        for (i, letter) in letters.chars().enumerate() {
            let at = axes.iter().position(|a| a.letter == letter).unwrap_or_else(|| {
                axes.push(Axis { letter, extent: 1, strides: [0; 2], present: [false; 2] });
                axes.len() - 1
            });
            let axis = &mut axes[at];
            axis.present[side] = true;
            // An extent of 1 stretches: it keeps stride 0, and does not override the other side.
            if val.shape[i] != 1 {
                axis.extent = val.shape[i];
                axis.strides[side] = strides[i];
            }
        }
    }
    // Result axes: those of both operands first (batch), then of the first, then of the second.
    let result = spec[2];
    let class = |axis: &Axis| match (result.contains(axis.letter), axis.present) {
        (false, _) => 3,
        (true, [true, true]) => 0,
        (true, [true, false]) => 1,
        _ => 2,
    };
    let of = |wanted: usize| -> Vec<&Axis> { axes.iter().filter(|a| class(a) == wanted).collect() };
    let (batch, m, n, k) = (of(0), of(1), of(2), of(3));
    let size = |axes: &[&Axis]| axes.iter().map(|a| a.extent).product::<usize>();
    let sizes = [size(&batch), size(&m), size(&n), size(&k)];
    checked_len(&[sizes[0], sizes[1], sizes[3]])?;
    checked_len(&[sizes[0], sizes[3], sizes[2]])?;
    checked_len(&[sizes[0], sizes[1], sizes[2]])?;
    let pack = |side: usize, val: &Val, groups: [&[&Axis]; 3]| -> Val {
        let all: Vec<&&Axis> = groups.into_iter().flatten().collect();
        let shape: Vec<usize> = all.iter().map(|a| a.extent).collect();
        let strides: Vec<isize> = all.iter().map(|a| a.strides[side]).collect();
        strided(val, &shape, &strides, 0)
    };
    let a = pack(0, lhs, [&batch, &m, &k]);
    let b = pack(1, rhs, [&batch, &k, &n]);
    let buf = with_acc!(acc, mode, multiply(&a, &b, sizes, acc, dtype, mode));
    // From [batch, m, n] to the order of the result's letters.
    let made: Vec<&&Axis> = batch.iter().chain(&m).chain(&n).collect();
    let made_shape: Vec<usize> = made.iter().map(|a| a.extent).collect();
    let made_strides = row_major(&made_shape);
    let mut shape = Vec::new();
    let mut strides = Vec::new();
    for letter in result.chars() {
        let at = made
            .iter()
            .position(|a| a.letter == letter)
            .ok_or_else(|| Error::bug(format!("letter `{letter}` of the result is nowhere")))?;
        shape.push(made_shape[at]);
        strides.push(made_strides[at]);
    }
    if strides == row_major(&shape) {
        return Ok(buf);
    }
    let made = Val::new(dtype, made_shape, buf);
    Ok(strided(&made, &shape, &strides, 0).take_buf())
}

/// The product with a matrix of codes: the matrix is computed in the type in which `x` computes, then multiplied.
pub(super) fn group_product(inputs: &[Val], group: i64, mode: Mode) -> Result<Buf> {
    let (x, codes, scales) = (&inputs[0], &inputs[1], &inputs[2]);
    let [rows, depth] = codes.shape[..] else { return Err(Error::bug("codes are no matrix")) };
    let per_row = scales.shape.get(1).copied().unwrap_or(0);
    let group = usize::try_from(group).unwrap_or(1).max(1);
    checked_len(&[rows, depth])?;
    let coded = x.dtype == DType::I8;
    let (own, zeros) = match coded {
        true => (inputs.get(3), inputs.get(4)),
        false => (None, inputs.get(3)),
    };
    let acc = own.map_or(x.dtype, |own| own.dtype).compute();
    let rounded = |v: f64| if mode == Mode::Exact { round_to(acc, v) } else { v };
    let (codes, scales) = (codes.floats(), scales.floats());
    let zeros = zeros.map(Val::floats);
    let mut matrix = vec![0.0; rows * depth];
    for (i, value) in matrix.iter_mut().enumerate() {
        let at = i / depth.max(1) * per_row + i % depth.max(1) / group;
        let code = match &zeros {
            Some(zeros) => rounded(codes[i] - zeros[at]),
            None => codes[i],
        };
        *value = rounded(code * scales[at]);
    }
    let outer: usize = x.shape[..x.shape.len().saturating_sub(1)].iter().product();
    let widened = own.map(|own| {
        let scales = own.floats();
        let value = |(i, code): (usize, &f64)| {
            let at = i / depth.max(1) * per_row + i % depth.max(1) / group;
            // The sums are rounded as numbers, not each element.
            code * scales[at]
        };
        let values = x.floats().iter().enumerate().map(value).collect();
        Val::new(own.dtype, vec![outer, depth], Buf::F(values))
    });
    let x = widened.as_ref().unwrap_or(x);
    let x = strided(x, &[outer, depth], &row_major(&[outer, depth]), 0);
    let dtype = x.dtype;
    let matrix = Val::new(acc, vec![rows, depth], Buf::F(matrix));
    let spec = ["mk".to_owned(), "nk".to_owned(), "mn".to_owned()];
    contract(&x, &matrix, [&spec[0], &spec[1], &spec[2]], acc, dtype, mode)
}

fn multiply<T: Acc>(
    a: &Val,
    b: &Val,
    [batch, m, n, k]: [usize; 4],
    acc: DType,
    dtype: DType,
    mode: Mode,
) -> Buf {
    let (a, b) = (T::load(a), T::load(b));
    let mut sums = vec![T::ZERO; batch * m * n];
    if !sums.is_empty() && k > 0 {
        // One pass of the kernel per task.
        sums.par_chunks_mut(m * n).enumerate().for_each(|(plane, sums)| {
            let (a, b) = (&a[plane * m * k..][..m * k], &b[plane * k * n..][..k * n]);
            sums.par_chunks_mut(GEMM_ROWS * n)
                .zip(a.par_chunks(GEMM_ROWS * k))
                .for_each(|(sums, a)| gemm_rows(sums, a, b, n, k));
        });
    }
    T::result(&sums, acc, dtype, mode)
}
