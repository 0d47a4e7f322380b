//! `nonzero`: the coordinates of all elements that are not zero.
//!
//! One operand of any type and rank `r`. One result `i64[r, n]`, coordinates in row-major order of
//! the elements; `n`, the number of non-zero elements, is only known now.

use super::{Attrs, operand};
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;

pub(super) fn nonzero(_: &Attrs<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let x = operand(inputs, 0)?;
    let hits: Vec<usize> = (0..x.len())
        .filter(|&i| if x.dtype().is_float() { x.get_f64(i) != 0.0 } else { x.get_i64(i) != 0 })
        .collect();
    let rank = x.shape().len();
    let mut coordinates = vec![0i64; rank * hits.len()];
    for (column, &flat) in hits.iter().enumerate() {
        let mut rest = flat;
        for axis in (0..rank).rev() {
            coordinates[axis * hits.len() + column] = (rest % x.shape()[axis]) as i64;
            rest /= x.shape()[axis];
        }
    }
    Ok(vec![Tensor::from_i64s(DType::I64, &[rank, hits.len()], &coordinates)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_in_row_major_order() {
        let x = Tensor::from_slice(&[2, 3], &[0f32, 1., 0., -2., 0., f32::NAN]).unwrap();
        let y = nonzero(&Attrs(&[]), &[x]).unwrap();
        assert_eq!(y[0].shape(), [2, 3]);
        assert_eq!(y[0].to_i64s(), [0, 1, 1, 1, 0, 2]);
        let empty = Tensor::zeros(DType::F32, [3, 0]).unwrap();
        assert_eq!(nonzero(&Attrs(&[]), &[empty]).unwrap()[0].shape(), [2, 0]);
    }
}
