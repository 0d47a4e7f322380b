//! Reading and writing single elements of any data type.
//!
//! Floats round to nearest, ties to even; `f8e4m3` has no infinities and saturates to its largest
//! finite value ±448 (OCP FP8 v1.0, as ONNX `Cast` with `saturate`); `f8e5m2` overflows to infinity
//! only for infinite input and saturates to ±57344 otherwise. Integers wrap; a float outside the
//! integer's range saturates and NaN becomes 0 (Rust's `as`).

use half::{bf16, f16};
use tilewright_base::DType;

/// A Rust type that is one of our data types.
pub trait Number: bytemuck::Pod {
    /// Which one.
    const DTYPE: DType;
}

macro_rules! numbers {
    ($($t:ty => $d:ident),*) => { $(impl Number for $t { const DTYPE: DType = DType::$d; })* };
}
numbers!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, i16 => I16,
    i8 => I8, u64 => U64, u32 => U32, u16 => U16, u8 => U8);

fn le<const N: usize>(bytes: &[u8], i: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[i * N..i * N + N]);
    out
}

fn nibble(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 2] >> (4 * (i % 2))) & 15
}

/// Element `i` as `f64`; 64-bit integers round to nearest.
pub fn read_f64(dtype: DType, bytes: &[u8], i: usize) -> f64 {
    match dtype {
        DType::F64 => f64::from_le_bytes(le(bytes, i)),
        DType::F32 => f32::from_le_bytes(le(bytes, i)).into(),
        DType::F16 => f16::from_le_bytes(le(bytes, i)).to_f64(),
        DType::BF16 => bf16::from_le_bytes(le(bytes, i)).to_f64(),
        DType::F8E4M3 => f8_to_f64(bytes[i], 4, 3, true),
        DType::F8E5M2 => f8_to_f64(bytes[i], 5, 2, false),
        DType::U64 => u64::from_le_bytes(le(bytes, i)) as f64,
        _ => read_i64(dtype, bytes, i) as f64,
    }
}

/// Element `i` as `i64`: floats truncate, `u64` wraps.
pub fn read_i64(dtype: DType, bytes: &[u8], i: usize) -> i64 {
    match dtype {
        DType::I64 => i64::from_le_bytes(le(bytes, i)),
        DType::I32 => i32::from_le_bytes(le(bytes, i)).into(),
        DType::I16 => i16::from_le_bytes(le(bytes, i)).into(),
        DType::I8 => (bytes[i] as i8).into(),
        DType::I4 => i64::from((nibble(bytes, i) << 4) as i8 >> 4),
        DType::U64 => u64::from_le_bytes(le(bytes, i)) as i64,
        DType::U32 => u32::from_le_bytes(le(bytes, i)).into(),
        DType::U16 => u16::from_le_bytes(le(bytes, i)).into(),
        DType::U8 => bytes[i].into(),
        DType::U4 => nibble(bytes, i).into(),
        DType::Bool => (bytes[i] != 0).into(),
        _ => read_f64(dtype, bytes, i) as i64,
    }
}

fn put<const N: usize>(bytes: &mut [u8], i: usize, value: [u8; N]) {
    bytes[i * N..i * N + N].copy_from_slice(&value);
}

fn put_nibble(bytes: &mut [u8], i: usize, value: u8) {
    let shift = 4 * (i % 2);
    bytes[i / 2] = (bytes[i / 2] & !(15 << shift)) | ((value & 15) << shift);
}

/// `value` in `f32`, an inexact one as the neighbour whose last bit is set: rounding that further, to
/// a type of far fewer bits, gives what rounding `value` once gives. (The conversions of the crate
/// `half` from `f64` look at the upper 32 bits only, and take what is just above a tie for one.)
fn round_odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    if back == value || !near.is_finite() || near.to_bits() & 1 == 1 {
        return near;
    }
    // The other neighbour is odd: towards the value, away from or to zero.
    let outward = value.abs() > back.abs();
    let bits = near.to_bits();
    f32::from_bits(match (near == 0.0, outward) {
        (true, _) => (if value < 0.0 { 1 << 31 } else { 0 }) | 1,
        (false, true) => bits + 1,
        (false, false) => bits - 1,
    })
}

/// Writes element `i`, rounded to `dtype`.
pub fn from_f64(dtype: DType, bytes: &mut [u8], i: usize, value: f64) {
    match dtype {
        DType::F64 => put(bytes, i, value.to_le_bytes()),
        DType::F32 => put(bytes, i, (value as f32).to_le_bytes()),
        DType::F16 => put(bytes, i, f16::from_f32(round_odd(value)).to_le_bytes()),
        DType::BF16 => put(bytes, i, bf16::from_f32(round_odd(value)).to_le_bytes()),
        DType::F8E4M3 => bytes[i] = f64_to_f8(value, 4, 3, true),
        DType::F8E5M2 => bytes[i] = f64_to_f8(value, 5, 2, false),
        DType::I64 => put(bytes, i, (value as i64).to_le_bytes()),
        DType::I32 => put(bytes, i, (value as i32).to_le_bytes()),
        DType::I16 => put(bytes, i, (value as i16).to_le_bytes()),
        DType::I8 => bytes[i] = value as i8 as u8,
        DType::I4 => put_nibble(bytes, i, value.clamp(-8.0, 7.0) as i8 as u8),
        DType::U64 => put(bytes, i, (value as u64).to_le_bytes()),
        DType::U32 => put(bytes, i, (value as u32).to_le_bytes()),
        DType::U16 => put(bytes, i, (value as u16).to_le_bytes()),
        DType::U8 => bytes[i] = value as u8,
        DType::U4 => put_nibble(bytes, i, value.clamp(0.0, 15.0) as u8),
        DType::Bool => bytes[i] = (value != 0.0).into(),
    }
}

/// Writes element `i`: integers wrap to `dtype`, floats round, `bool` is `value != 0`.
pub fn from_i64(dtype: DType, bytes: &mut [u8], i: usize, value: i64) {
    match dtype {
        DType::I64 | DType::U64 => put(bytes, i, value.to_le_bytes()),
        DType::I32 | DType::U32 => put(bytes, i, (value as i32).to_le_bytes()),
        DType::I16 | DType::U16 => put(bytes, i, (value as i16).to_le_bytes()),
        DType::I8 | DType::U8 => bytes[i] = value as u8,
        DType::I4 | DType::U4 => put_nibble(bytes, i, value as u8),
        DType::Bool => bytes[i] = (value != 0).into(),
        _ => from_f64(dtype, bytes, i, value as f64),
    }
}

/// Decodes an 8-bit float; `fn_form`: no infinities, one NaN pattern (E4M3FN).
fn f8_to_f64(bits: u8, exp_bits: u32, man_bits: u32, fn_form: bool) -> f64 {
    let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
    let exp_max = (1u32 << exp_bits) - 1;
    let exp = u32::from(bits >> man_bits) & exp_max;
    let man = u32::from(bits) & ((1 << man_bits) - 1);
    let bias = (1i32 << (exp_bits - 1)) - 1;
    if exp == exp_max {
        if !fn_form {
            return if man == 0 { sign * f64::INFINITY } else { f64::NAN };
        }
        if man == (1 << man_bits) - 1 {
            return f64::NAN;
        }
    }
    let fraction = f64::from(man) / f64::from(1u32 << man_bits);
    if exp == 0 {
        sign * fraction * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + fraction) * 2f64.powi(exp as i32 - bias)
    }
}

/// Encodes to nearest even by trying the two neighbours: 127 positive codes are few.
fn f64_to_f8(value: f64, exp_bits: u32, man_bits: u32, fn_form: bool) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let decode = |code: u8| f8_to_f64(code, exp_bits, man_bits, fn_form);
    let largest: u8 = if fn_form { 0x7e } else { 0x7b };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs();
    if magnitude.is_infinite() && !fn_form {
        return sign | 0x7c;
    }
    if magnitude >= decode(largest) {
        return sign | largest;
    }
    // Codes are ordered by value: the largest code not above `magnitude`.
    let (mut low, mut high) = (0u8, largest);
    while high - low > 1 {
        let mid = (low + high) / 2;
        if decode(mid) <= magnitude { low = mid } else { high = mid }
    }
    let (below, above) = (magnitude - decode(low), decode(high) - magnitude);
    let up = above < below || (above == below && low % 2 == 1);
    sign | if up { high } else { low }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Just above and just below a tie, and on it; the distance is far below the upper 32 bits.
    #[test]
    fn halves_round_once() {
        let rounded = |dtype: DType, x: f64| {
            let mut bytes = [0u8; 2];
            from_f64(dtype, &mut bytes, 0, x);
            read_f64(dtype, &bytes, 0)
        };
        for (dtype, bits) in [(DType::BF16, 8), (DType::F16, 11)] {
            let step = 2f64.powi(1 - bits);
            for tiny in [2f64.powi(-23), 2f64.powi(-40), 2f64.powi(-52)] {
                let tie = 1.0 + step / 2.0;
                assert_eq!(rounded(dtype, tie), 1.0);
                assert_eq!(rounded(dtype, tie + tiny), 1.0 + step, "{dtype} {tiny}");
                assert_eq!(rounded(dtype, -(tie + tiny)), -1.0 - step, "{dtype} {tiny}");
                let upper = 1.0 + step * 1.5;
                assert_eq!(rounded(dtype, upper), 1.0 + 2.0 * step);
                assert_eq!(rounded(dtype, upper - tiny), 1.0 + step, "{dtype} {tiny}");
            }
            assert_eq!(rounded(dtype, 1e-300), 0.0);
            assert!(rounded(dtype, -1e-300).is_sign_negative());
            assert_eq!(rounded(dtype, 1e300), f64::INFINITY);
            assert!(rounded(dtype, f64::NAN).is_nan());
        }
    }

    #[test]
    fn every_f8_code_round_trips() {
        for dtype in [DType::F8E4M3, DType::F8E5M2] {
            for code in 0..=255u8 {
                let value = read_f64(dtype, &[code], 0);
                let mut back = [0];
                from_f64(dtype, &mut back, 0, value);
                assert!(back[0] == code || value.is_nan(), "{dtype} {code:#x} {value}");
            }
        }
        assert_eq!(read_f64(DType::F8E4M3, &[0x7e], 0), 448.0);
        assert_eq!(read_f64(DType::F8E5M2, &[0x7b], 0), 57344.0);
    }

    #[test]
    fn nibbles_are_signed_and_low_first() {
        let mut bytes = [0u8; 2];
        for (i, v) in [-8, 7, -1].into_iter().enumerate() {
            from_i64(DType::I4, &mut bytes, i, v);
        }
        assert_eq!(bytes, [0x78, 0x0f]);
        assert_eq!((0..3).map(|i| read_i64(DType::I4, &bytes, i)).collect::<Vec<_>>(), [-8, 7, -1]);
    }
}
