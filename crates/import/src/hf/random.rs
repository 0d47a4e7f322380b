//! [`RandomWeights`]: weights for measuring and testing models whose files nobody has.
//!
//! Matrices are windows of one pool of normal numbers with deviation 0.02, as transformers initialises them: a model of
//! 16 GB then takes the memory of its largest matrix. The pool repeats after a prime number of elements, so that no two rows
//! of a matrix are the same. Vectors have numbers of their own: scales of norms around 1, biases around 0.

use std::ops::Range;
use std::sync::Arc;
use tilewright_base::DType;
use tilewright_data::{Bytes, Tensor};

/// Numbers until the pool repeats: a prime.
const PERIOD: usize = 1_048_573;
/// Windows start at one of so many places, this many elements apart.
const PLACES: usize = 4093;
const APART: usize = 64;
/// Standard deviation.
const DEVIATION: f64 = 0.02;

/// Makes weights by name and shape; the same seed makes the same ones.
#[derive(Debug)]
pub(crate) struct RandomWeights {
    seed: u64,
    dtype: DType,
    pool: Arc<Vec<u8>>,
}

/// A part of the pool.
struct Window {
    pool: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Window {
    fn as_ref(&self) -> &[u8] {
        &self.pool[self.range.clone()]
    }
}

/// SplitMix64: well mixed numbers from a counter.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Normal number `i` of a seed.
fn normal(seed: u64, i: u64) -> f64 {
    let unit = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let key = mixed(seed);
    let (a, b) = (unit(mixed(key ^ (2 * i))), unit(mixed(key ^ (2 * i + 1))));
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

/// A number for a name.
fn hash(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mixed(seed), |h, b| mixed(h ^ u64::from(b)))
}

impl RandomWeights {
    pub(crate) fn new(seed: u64, dtype: DType) -> RandomWeights {
        RandomWeights { seed, dtype, pool: Arc::default() }
    }

    /// The tensor of a name; `None` for shapes that have no memory.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[i64]) -> Option<Tensor> {
        let shape: Vec<usize> =
            shape.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<_>>()?;
        let elements = tilewright_data::element_count(&shape).ok()?;
        let key = hash(self.seed, name);
        if shape.len() < 2 {
            let middle = if name.ends_with(".bias") { 0.0 } else { 1.0 };
            let values: Vec<f64> =
                (0..elements as u64).map(|i| middle + 0.1 * normal(key, i)).collect();
            return Tensor::from_f64s(self.dtype, &shape, &values).ok();
        }
        let size = self.dtype.size();
        let start = (key as usize % PLACES) * APART * size;
        self.grow((elements + PLACES * APART) * size)?;
        let range = start..start + elements * size;
        let window = Window { pool: self.pool.clone(), range };
        Tensor::new(self.dtype, shape, Bytes::Foreign(Arc::new(window))).ok()
    }

    /// A pool of at least so many bytes, the old one in front.
    fn grow(&mut self, bytes: usize) -> Option<()> {
        if self.pool.len() >= bytes {
            return Some(());
        }
        tilewright_data::check_memory(bytes, "random weights").ok()?;
        let period = PERIOD.min(bytes / self.dtype.size());
        let values: Vec<f64> =
            (0..period as u64).map(|i| DEVIATION * normal(self.seed, i)).collect();
        let first = Tensor::from_f64s(self.dtype, &[period], &values).ok()?;
        let mut pool = Vec::with_capacity(bytes);
        while pool.len() < bytes {
            let some = (bytes - pool.len()).min(first.bytes().len());
            pool.extend_from_slice(&first.bytes()[..some]);
        }
        self.pool = Arc::new(pool);
        Some(())
    }
}
