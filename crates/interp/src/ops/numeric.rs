//! Accumulator types of contractions and convolutions.

use crate::graph::Mode;
use crate::value::{Buf, Val, float_to_int, int_to_float, round_to, wrap_to};
use tilewright_base::DType;

/// A number in which products are summed, one rounding per product and per sum.
pub(crate) trait Acc: Copy + Send + Sync {
    /// Nothing summed yet.
    const ZERO: Self;
    /// `self + a * b`.
    fn fma(self, a: Self, b: Self) -> Self;
    /// From an operand held as a float.
    fn from_float(x: f64) -> Self;
    /// From an operand held as an integer of this type.
    fn from_int(dtype: DType, x: i64) -> Self;
    /// The sums as a result of type `dtype`.
    fn result(sums: &[Self], acc: DType, dtype: DType, mode: Mode) -> Buf;

    /// All elements of an operand.
    fn load(val: &Val) -> Vec<Self> {
        match &*val.buf {
            Buf::F(v) => v.iter().map(|&x| Self::from_float(x)).collect(),
            Buf::I(v) => v.iter().map(|&x| Self::from_int(val.dtype, x)).collect(),
        }
    }
}

fn floats(sums: impl Iterator<Item = f64>, dtype: DType, mode: Mode) -> Buf {
    if !dtype.is_float() {
        return Buf::I(sums.map(|x| float_to_int(dtype, x)).collect());
    }
    match mode {
        Mode::Exact => Buf::F(sums.map(|x| round_to(dtype, x)).collect()),
        Mode::F64 => Buf::F(sums.collect()),
    }
}

macro_rules! float_acc {
    ($name:ty, $zero:expr, $into:expr, $from:expr, $fma:expr) => {
        impl Acc for $name {
            const ZERO: Self = $zero;
            #[inline(always)]
            fn fma(self, a: Self, b: Self) -> Self {
                let f: fn(Self, Self, Self) -> Self = $fma;
                f(self, a, b)
            }
            fn from_float(x: f64) -> Self {
                let f: fn(f64) -> Self = $into;
                f(x)
            }
            fn from_int(dtype: DType, x: i64) -> Self {
                Self::from_float(int_to_float(dtype, x))
            }
            fn result(sums: &[Self], _: DType, dtype: DType, mode: Mode) -> Buf {
                let f: fn(Self) -> f64 = $from;
                floats(sums.iter().map(|&x| f(x)), dtype, mode)
            }
        }
    };
}
float_acc!(f64, 0.0, |x| x, |x| x, |s, a, b| s + a * b);
float_acc!(f32, 0.0, |x| x as f32, f64::from, |s, a, b| s + a * b);

/// A 16-bit float accumulator, rounded after every operation.
#[derive(Clone, Copy)]
pub(crate) struct Half<const BF: bool>(f64);

impl<const BF: bool> Half<BF> {
    fn round(x: f64) -> f64 {
        round_to(if BF { DType::BF16 } else { DType::F16 }, x)
    }
}
float_acc!(Half<true>, Half(0.0), |x| Half(Self::round(x)), |x| x.0, |s, a, b| Half(Self::round(
    s.0 + Self::round(a.0 * b.0)
)));
float_acc!(Half<false>, Half(0.0), |x| Half(Self::round(x)), |x| x.0, |s, a, b| Half(Self::round(
    s.0 + Self::round(a.0 * b.0)
)));

impl Acc for i64 {
    const ZERO: i64 = 0;
    #[inline(always)]
    fn fma(self, a: i64, b: i64) -> i64 {
        self.wrapping_add(a.wrapping_mul(b))
    }
    fn from_float(x: f64) -> i64 {
        x as i64
    }
    fn from_int(_: DType, x: i64) -> i64 {
        x
    }
    fn result(sums: &[i64], acc: DType, dtype: DType, _: Mode) -> Buf {
        let wrapped = sums.iter().map(|&x| wrap_to(acc, x));
        if dtype.is_float() {
            Buf::F(wrapped.map(|x| round_to(dtype, int_to_float(acc, x))).collect())
        } else {
            Buf::I(wrapped.map(|x| wrap_to(dtype, x)).collect())
        }
    }
}

/// Calls a function that is generic over [`Acc`] with the accumulator for `acc` in `mode`.
macro_rules! with_acc {
    ($acc:expr, $mode:expr, $f:ident($($arg:expr),*)) => {{
        use tilewright_base::DType;
        use $crate::ops::numeric::Half;
        match ($acc, $mode) {
            (acc, _) if !acc.is_float() => $f::<i64>($($arg),*),
            (_, $crate::graph::Mode::F64) | (DType::F64, _) => $f::<f64>($($arg),*),
            (DType::F16, _) => $f::<Half<false>>($($arg),*),
            (DType::BF16, _) => $f::<Half<true>>($($arg),*),
            _ => $f::<f32>($($arg),*),
        }
    }};
}
pub(crate) use with_acc;

/// Rows of the result that share one pass over the second operand, and so one task's rows.
pub(crate) const GEMM_ROWS: usize = 16;

/// `out[m,n] += a[m,k] * b[k,n]` for the rows of `out`, which start as [`Acc::ZERO`]; each sum runs
/// over `k` in ascending order. Blocked so that a piece of `b` serves [`GEMM_ROWS`] rows, and four
/// products are added to a sum each time it is loaded.
pub(crate) fn gemm_rows<T: Acc>(out: &mut [T], a: &[T], b: &[T], n: usize, k: usize) {
    const COLUMNS: usize = 128;
    if n == 0 || k == 0 {
        return;
    }
    for (out, a) in out.chunks_mut(GEMM_ROWS * n).zip(a.chunks(GEMM_ROWS * k)) {
        for start in (0..n).step_by(COLUMNS) {
            let end = (start + COLUMNS).min(n);
            let row_of_b = |step: usize| &b[step * n + start..step * n + end];
            let mut step = 0;
            while step + 4 <= k {
                let [b0, b1, b2, b3] = [0, 1, 2, 3].map(|i| row_of_b(step + i));
                for (row, a) in out.chunks_mut(n).zip(a.chunks(k)) {
                    let (a, sums) = (&a[step..step + 4], &mut row[start..end]);
                    let columns = sums.iter_mut().zip(b0).zip(b1).zip(b2).zip(b3);
                    for ((((sum, &x0), &x1), &x2), &x3) in columns {
                        *sum = sum.fma(a[0], x0).fma(a[1], x1).fma(a[2], x2).fma(a[3], x3);
                    }
                }
                step += 4;
            }
            for step in step..k {
                for (row, a) in out.chunks_mut(n).zip(a.chunks(k)) {
                    for (sum, &x) in row[start..end].iter_mut().zip(row_of_b(step)) {
                        *sum = sum.fma(a[step], x);
                    }
                }
            }
        }
    }
}
