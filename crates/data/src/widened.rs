//! [`Widened`]: 16-bit floats that are read as `f32`, without a copy until somebody reads them so.
//!
//! Models whose weights are stored in 16 bits compute with their values in `f32`. Where a device multiplies in
//! 16 bits, nobody ever reads the wide ones: the stored ones go there as they lie in the file. Every 16-bit float
//! is an `f32`, so either form has the same values.

use crate::convert::read_f64;
use crate::tensor::Bytes;
use std::sync::OnceLock;
use tilewright_base::DType;

/// 16-bit floats as `f32`.
pub struct Widened {
    narrow: DType,
    stored: Bytes,
    wide: OnceLock<Bytes>,
}

impl Widened {
    /// Of floats in `f16` or `bf16`; `None` for other types.
    pub fn new(narrow: DType, stored: Bytes) -> Option<Widened> {
        let known = matches!(narrow, DType::F16 | DType::BF16);
        known.then(|| Widened { narrow, stored, wide: OnceLock::new() })
    }

    /// The type of the stored ones.
    pub fn narrow(&self) -> DType {
        self.narrow
    }

    /// The stored ones.
    pub fn stored(&self) -> &Bytes {
        &self.stored
    }

    /// Bytes of the wide ones.
    pub fn wide_len(&self) -> usize {
        self.stored.len() / 2 * 4
    }

    /// The wide ones, made when they are first asked for, and kept.
    pub fn wide(&self) -> &[u8] {
        self.wide.get_or_init(|| self.made())
    }

    /// The wide ones, made anew.
    pub fn made(&self) -> Bytes {
        let mut bytes = Bytes::zeroed(self.wide_len());
        let stored: &[u8] = &self.stored;
        for (i, to) in bytes.make_mut().chunks_exact_mut(4).enumerate() {
            // Exact: every 16-bit float is an `f32`.
            let x = match self.narrow {
                DType::BF16 => f32::from_bits(
                    u32::from(u16::from_le_bytes([stored[2 * i], stored[2 * i + 1]])) << 16,
                ),
                narrow => read_f64(narrow, stored, i) as f32,
            };
            to.copy_from_slice(&x.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;
    use tilewright_base::DType;

    #[test]
    fn widened_values_are_the_stored_ones_and_go_back_without_a_copy() {
        let values = [1.0, -0.0, 3.140625, f64::INFINITY, 9.1835496e-41, -2.5];
        for narrow in [DType::BF16, DType::F16] {
            let stored = Tensor::from_f64s(narrow, &[2, 3], &values).unwrap();
            let wide = stored.widened().unwrap();
            assert_eq!(
                (wide.dtype(), wide.shape(), wide.byte_len()),
                (DType::F32, &[2, 3][..], 24)
            );
            let back = wide.rounded(narrow).unwrap();
            assert_eq!(back.bytes().as_ptr(), stored.bytes().as_ptr());
            let made = wide.rounded(DType::F32).unwrap();
            assert!(made.narrow().is_none());
            let bits = |t: &Tensor| t.to_f64s().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!((bits(&wide), bits(&made)), (bits(&stored), bits(&stored)));
            assert_eq!(wide.bytes(), made.bytes());
            assert_eq!(wide, made);
            assert_eq!(wide.reshaped([6]).unwrap().narrow().unwrap().shape(), [6]);
        }
        assert!(Tensor::from_f64s(DType::F32, &[1], &[1.0]).unwrap().widened().is_none());
    }
}
