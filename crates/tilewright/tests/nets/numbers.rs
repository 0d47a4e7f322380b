//! Inputs that look random, the same in every run.

use tilewright_base::DType;
use tilewright_data::Tensor;

/// Numbers around 0 that look random, a function of the seed.
pub(crate) fn numbers(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1u64 << 24) as f64 - 0.5
        })
        .collect();
    Tensor::from_f64s(DType::F32, shape, &values).unwrap()
}
