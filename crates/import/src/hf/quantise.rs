//! Weights as codes of 4 or 8 bits with a scale for each group of the depth.
//!
//! ```text
//! scale = the number of largest magnitude in the group / -8 (-128 for 8 bits), rounded to bf16
//! code  = nearest integer to w / scale, at most 7 (127)
//! ```
//!
//! The number of largest magnitude gets the code -8, which has no opposite: so all sixteen codes are used. A weight
//! moves by at most half a scale, those that are cut at 7 by up to one, and a scale is an eighth of the group's largest
//! magnitude.

use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, from_f64, from_i64, read_f64};

/// A matrix `[N, K]` of floats as codes `[N, K]` and scales bf16 `[N, ceil(K/group)]`.
///
/// # Errors
/// The user's when a weight is infinite or NaN.
pub fn quantise(matrix: &Tensor, codes: DType, group: usize) -> Result<(Tensor, Tensor)> {
    let [rows, depth] = *matrix.shape() else {
        return Err(Error::bug(format!("a matrix of shape {:?}", matrix.shape())));
    };
    let group = group.max(1);
    let groups = depth.div_ceil(group);
    let bits = codes.bits();
    if !matches!(codes, DType::I4 | DType::I8) {
        return Err(Error::unsupported(format!("weights as {codes}")));
    }
    let (lowest, highest) = (-f64::from(1u32 << (bits - 1)), f64::from((1u32 << (bits - 1)) - 1));
    let mut all_codes = Tensor::zeros(codes, [rows, depth])?;
    let mut all_scales = Tensor::zeros(DType::BF16, [rows, groups])?;
    if rows == 0 || depth == 0 {
        return Ok((all_codes, all_scales));
    }
    // Rows in chunks of whole bytes of codes, shared out over threads; the result is the same for any number.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = rows.div_ceil(threads).next_multiple_of(2);
    let code_bytes = codes.bytes_for(share * depth).unwrap_or(usize::MAX);
    let parts = all_codes
        .bytes_mut()
        .chunks_mut(code_bytes.max(1))
        .zip(all_scales.bytes_mut().chunks_mut((share * groups * 2).max(1)));
    let (dtype, source) = (matrix.dtype(), matrix.bytes());
    let chunk = |first: usize, codes_out: &mut [u8], scales_out: &mut [u8]| {
        let mut values = vec![0.0f64; depth];
        for row in first..(first + share).min(rows) {
            for (k, v) in values.iter_mut().enumerate() {
                *v = read_f64(dtype, source, row * depth + k);
            }
            if !values.iter().all(|v| v.is_finite()) {
                return Err(row);
            }
            for (g, values) in values.chunks(group).enumerate() {
                let most =
                    values.iter().fold(0.0f64, |m, v| if v.abs() > m.abs() { *v } else { m });
                let at = (row - first) * groups + g;
                from_f64(DType::BF16, scales_out, at, most / lowest);
                let scale = read_f64(DType::BF16, scales_out, at);
                let start = (row - first) * depth + g * group;
                for (i, v) in values.iter().enumerate() {
                    let code = if scale == 0.0 { 0.0 } else { (v / scale).round_ties_even() };
                    from_i64(codes, codes_out, start + i, code.clamp(lowest, highest) as i64);
                }
            }
        }
        Ok(())
    };
    let bad = std::thread::scope(|scope| {
        let chunk = &chunk;
        let running: Vec<_> = parts
            .enumerate()
            .map(|(i, (codes, scales))| scope.spawn(move || chunk(i * share, codes, scales)))
            .collect();
        let results = running.into_iter().map(|t| t.join());
        results.filter_map(|r| r.map_or(Some(0), Result::err)).min()
    });
    match bad {
        None => Ok((all_codes, all_scales)),
        Some(row) => {
            let message = format!("row {row} of a weight has a number that is not finite");
            Err(Error::user(message).with_hint("such weights cannot be stored in few bits"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, depth: usize) -> Tensor {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f64 / 504.5 - 1.0;
        let values: Vec<f64> = (0..rows * depth).map(value).collect();
        Tensor::from_f64s(DType::F32, &[rows, depth], &values).unwrap()
    }

    /// Post-condition: a weight moves by at most half a scale, one that is cut by at most one, and a bf16's rounding.
    #[test]
    fn weights_move_by_less_than_a_scale() {
        for (codes, group, rows, depth) in [
            (DType::I4, 32, 5, 70),
            (DType::I8, 16, 4, 16),
            (DType::I4, 7, 3, 9),
            (DType::I4, 64, 1, 3),
        ] {
            let w = matrix(rows, depth);
            let (c, s) = quantise(&w, codes, group).unwrap();
            assert_eq!(s.shape(), [rows, depth.div_ceil(group)]);
            for i in 0..rows * depth {
                let scale = s.get_f64(i / depth * depth.div_ceil(group) + i % depth / group);
                let highest = f64::from((1 << (codes.bits() - 1)) - 1);
                let code = c.get_f64(i);
                let most = if code == highest { 1.01 } else { 0.54 };
                let moved = (w.get_f64(i) - code * scale).abs();
                assert!(moved <= most * scale.abs(), "{codes} {i}: {moved} of {scale}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_is_refused() {
        let zeros = Tensor::zeros(DType::BF16, [2, 40]).unwrap();
        let (c, s) = quantise(&zeros, DType::I4, 32).unwrap();
        assert!(c.to_f64s().iter().chain(&s.to_f64s()).all(|v| *v == 0.0));
        for bad in [f64::NAN, f64::INFINITY] {
            let mut values = vec![0.5; 6];
            values[4] = bad;
            let w = Tensor::from_f64s(DType::F32, &[3, 2], &values).unwrap();
            let error = quantise(&w, DType::I8, 2).unwrap_err();
            assert!(error.to_string().contains("row 2"), "{error}");
        }
        assert!(quantise(&zeros, DType::U8, 2).is_err());
    }
}
