//! What tensor cores do to numbers, as far as it is known: which digits of TF32 operands they see, and how they round
//! sums. In exact mode only.
//!
//! Products are exact. An instruction adds those of its depth, 32 bytes of it, to the sum so far and drops what lies
//! below the last digit, towards zero: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor
//! cores", 2021. What it drops while it aligns the products is not modelled.

use crate::value::Buf;
use tilewright_base::DType;
use tilewright_device::Spread;

/// How an instruction takes its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operands {
    /// As they are.
    Plain,
    /// f32, of which the last 13 bits do not count: `wgmma`.
    Cut,
    /// f32, rounded to TF32 by the device library, ties away from zero: `mma.sync`.
    Rounded,
}

/// A kind of instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TensorCore {
    pub(super) operands: Operands,
    /// Elements of the depth that one instruction takes.
    pub(super) depth: usize,
}

impl TensorCore {
    /// The instruction that multiplies operands of this type into sums of this spread; none for plain multiply-adds.
    pub(super) fn of(operand: DType, spread: Spread) -> Option<TensorCore> {
        let operands = match (spread, operand) {
            (Spread::Lines { .. } | Spread::Outer { .. }, _) => return None,
            (Spread::Wgmma, DType::F32) => Operands::Cut,
            (Spread::MmaSync { .. }, DType::F32) => Operands::Rounded,
            _ => Operands::Plain,
        };
        Some(TensorCore { operands, depth: (256 / operand.bits().max(1)) as usize })
    }

    fn operand(self, x: f64) -> f64 {
        match self.operands {
            Operands::Plain => x,
            Operands::Cut => tf32_cut(x),
            Operands::Rounded => tf32_near(x),
        }
    }

    /// `acc[m,n] += a[m,k] * b[k,n]` for floats, sums in f32.
    pub(super) fn multiply(
        self,
        acc: &mut [f64],
        (m, k, n): (usize, usize, usize),
        a: &[f64],
        b: &[f64],
    ) {
        let a: Vec<f64> = a.iter().map(|x| self.operand(*x)).collect();
        let b: Vec<f64> = b.iter().map(|x| self.operand(*x)).collect();
        for i in 0..m {
            for j in 0..n {
                let sum = &mut acc[i * n + j];
                for k0 in (0..k).step_by(self.depth) {
                    let inside = k0..(k0 + self.depth).min(k);
                    let part: f64 = inside.map(|x| a[i * k + x] * b[x * n + j]).sum();
                    *sum = toward_zero(*sum + part);
                }
            }
        }
    }
}

/// The TF32 number next to `x` that is not further from zero.
pub(super) fn tf32_cut(x: f64) -> f64 {
    if x.is_finite() { f64::from(f32::from_bits((x as f32).to_bits() & !0x1FFF)) } else { x }
}

/// The TF32 number next to `x`, ties away from zero.
pub(super) fn tf32_near(x: f64) -> f64 {
    if !x.is_finite() {
        return x;
    }
    f64::from(f32::from_bits((x as f32).to_bits().wrapping_add(0x1000) & !0x1FFF))
}

/// The f32 next to `x` that is not further from zero.
fn toward_zero(x: f64) -> f64 {
    let near = x as f32;
    if f64::from(near).abs() > x.abs() && near.is_finite() {
        f64::from(f32::from_bits(near.to_bits() - 1))
    } else {
        f64::from(near)
    }
}

/// Both operands and the sums as floats, if they are.
pub(super) fn floats<'a>(
    acc: &'a mut Buf,
    a: &'a Buf,
    b: &'a Buf,
) -> Option<(&'a mut [f64], &'a [f64], &'a [f64])> {
    match (acc, a, b) {
        (Buf::F(acc), Buf::F(a), Buf::F(b)) => Some((acc, a, b)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_lose_their_last_digits() {
        let tie = f64::from(f32::from_bits(0x3f80_1000));
        let below = f64::from(f32::from_bits(0x3f80_0fff));
        let next = f64::from(f32::from_bits(0x3f80_2000));
        let cut = TensorCore::of(DType::F32, Spread::Wgmma).unwrap();
        let spread = Spread::MmaSync { warps_m: 1, warps_n: 1 };
        let rounded = TensorCore::of(DType::F32, spread).unwrap();
        assert_eq!([tie, next].map(|x| cut.operand(x)), [1.0, next]);
        assert_eq!([tie, -tie, below].map(|x| rounded.operand(x)), [next, -next, 1.0]);
        assert_eq!(cut.depth, 8);
        assert_eq!(TensorCore::of(DType::I8, spread).unwrap().depth, 32);
        let plain = Spread::Outer { threads_m: 8, threads_n: 4, block_m: 1, block_n: 1 };
        assert_eq!(TensorCore::of(DType::F32, plain), None);
    }

    #[test]
    fn sums_are_cut_once_an_instruction() {
        let core = TensorCore::of(DType::BF16, Spread::Wgmma).unwrap();
        let tiny = 2f64.powi(-25);
        // 16 products of 2^-25 are half a digit of 1: lost together, but not when they come with half a digit more.
        let mut acc = [1.0];
        core.multiply(&mut acc, (1, 16, 1), &[tiny; 16], &[0.125; 16]);
        assert_eq!(acc, [1.0]);
        core.multiply(&mut acc, (1, 16, 1), &[tiny; 16], &[0.5; 16]);
        assert_eq!(acc, [1.0 + 2f64.powi(-23) * 2.0]);
        let mut acc = [-1.0];
        core.multiply(&mut acc, (1, 1, 1), &[tiny], &[1.0]);
        assert_eq!(acc, [-1.0 + 2f64.powi(-24)]);
    }
}
