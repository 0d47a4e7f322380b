//! Seeded numbers, tensors, and inputs and sizes for graphs. The same seed gives the same bits on
//! every machine.

use tilewright_base::DType;
use tilewright_data::{Tensor, from_f64, from_i64};
use tilewright_graph::Graph;
use tilewright_layout::Env;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in `low..=high`.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low) as usize + 1) as i64
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * 0.5f64.powi(53)
    }

    /// Close to normal with mean 0 and deviation 1: twelve uniforms less six, so only additions,
    /// which every machine does alike. Never beyond 6.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    /// One of `items`, which are not empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// A tensor of normal floats times `scale`, of integers 0 to 3, or of both truth values.
///
/// # Panics
/// When the tensor cannot be allocated.
pub fn tensor(dtype: DType, shape: &[usize], scale: f64, rng: &mut Rng) -> Tensor {
    let mut tensor = Tensor::zeros(dtype, shape).expect("test tensors are small");
    let n = tensor.len();
    let bytes = tensor.bytes_mut();
    for i in 0..n {
        if dtype.is_float() {
            from_f64(dtype, bytes, i, rng.normal() * scale);
        } else {
            let most = if dtype == DType::Bool { 1 } else { 3 };
            from_i64(dtype, bytes, i, rng.between(0, most));
        }
    }
    tensor
}

/// A value for every symbol: its ends and 1 more often than others, never far above its minimum.
pub fn random_env(graph: &Graph, rng: &mut Rng) -> Env {
    let value = |min: i64, max: i64, rng: &mut Rng| {
        let high = max.min(min.saturating_add(6));
        match rng.below(4) {
            0 => min,
            1 => high,
            2 if min <= 1 && 1 <= max => 1,
            _ => rng.between(min, high),
        }
    };
    graph.symbols.iter().map(|s| (s.name.clone(), value(s.range.min, s.range.max, rng))).collect()
}

/// Inputs for a graph at these sizes, as [`tensor`] makes them.
///
/// # Panics
/// When `env` does not give a size, or a size is negative.
pub fn random_inputs(graph: &Graph, env: &Env, rng: &mut Rng) -> Vec<Tensor> {
    let input = |v: &tilewright_graph::ValueId| {
        let ty = graph.ty(*v);
        let size = |d: &tilewright_layout::Dim| {
            let value = d.eval(env).and_then(|v| usize::try_from(v).ok());
            value.unwrap_or_else(|| panic!("the size {d} has no value in {env:?}"))
        };
        let shape: Vec<usize> = ty.shape.iter().map(size).collect();
        tensor(ty.dtype, &shape, 1.0, rng)
    };
    graph.inputs.iter().map(input).collect()
}
