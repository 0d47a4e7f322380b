//! `Random`: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! The key is the seed (low word first). For `f64` element `i` takes words `2*(i%2)` and
//! `2*(i%2)+1` of counter `i/2` and their top 53 bits; for every other type word `i%4` of counter
//! `i/4`, and as many of its top bits as the type has significant bits, so that no result rounds
//! up to 1. The counter fills the two low words, the others are 0.

use crate::value::Buf;
use rayon::prelude::*;
use tilewright_base::{DType, Error, Result};

/// Ten rounds of Philox on a counter of four words.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let product = |a: u32, b: u32| {
        let wide = u64::from(a) * u64::from(b);
        ((wide >> 32) as u32, wide as u32)
    };
    for _ in 0..10 {
        let (high0, low0) = product(0xD251_1F53, counter[0]);
        let (high1, low1) = product(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// `n` uniform numbers of type `dtype`.
pub(super) fn uniform(dtype: DType, n: usize, seed: u64) -> Result<Buf> {
    random_bits(dtype)?;
    let element = |i| element(dtype, seed, i);
    Ok(Buf::F((0..n as u64).into_par_iter().map(element).collect::<Result<_>>()?))
}

/// Significant bits of a number below 1.
fn random_bits(dtype: DType) -> Result<i32> {
    Ok(match dtype {
        DType::F64 => 53,
        DType::F32 => 24,
        DType::F16 => 11,
        DType::BF16 => 8,
        DType::F8E4M3 => 4,
        DType::F8E5M2 => 3,
        other => {
            return Err(Error::user(format!("random numbers in [0, 1) of type {other}")));
        }
    })
}

/// Element `i` of the sequence of this seed and type.
pub(crate) fn element(dtype: DType, seed: u64, i: u64) -> Result<f64> {
    let bits = random_bits(dtype)?;
    let key = [seed as u32, (seed >> 32) as u32];
    let words = |block: u64| philox4x32_10([block as u32, (block >> 32) as u32, 0, 0], key);
    if dtype == DType::F64 {
        let w = words(i / 2);
        let at = 2 * (i % 2) as usize;
        let wide = u64::from(w[at]) << 32 | u64::from(w[at + 1]);
        return Ok((wide >> 11) as f64 * 0.5f64.powi(53));
    }
    let word = words(i / 4)[(i % 4) as usize];
    Ok(f64::from(word >> (32 - bits)) * 0.5f64.powi(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' Random123 library.
    #[test]
    fn known_answers() {
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
