//! [`Schedule`]: how a tile program is run, apart from what it computes.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Tile sizes and the knobs of each kind of target. Any legal schedule gives the same result up to
/// the order of floating-point sums.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Schedule {
    /// A value for each of the kernel's tile sizes.
    pub tiles: BTreeMap<Arc<str>, i64>,
    /// Knobs that the CPU reads.
    pub cpu: CpuKnobs,
}

/// How the CPU emitter runs a tile program.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CpuKnobs {
    /// Width of a vector register in bits: 256 (AVX2) or 512 (AVX-512).
    pub vector_bits: u32,
    /// Rows of the matrix micro-kernel held in registers.
    pub mma_rows: u32,
    /// Vectors per row of the matrix micro-kernel held in registers.
    pub mma_vectors: u32,
    /// Unrolling of the innermost sum.
    pub unroll_k: u32,
    /// Independent accumulators in vector reductions.
    pub reduce_chains: u32,
    /// Results go past the caches: for those that no cache holds until somebody reads them.
    pub stream: bool,
    /// When a block reads an operand for the second time, it asks memory for the same part of the
    /// next block's.
    pub ahead: bool,
}

impl Default for CpuKnobs {
    /// AVX2: a 6x2-vector micro-kernel (12 accumulators of 16 registers).
    fn default() -> CpuKnobs {
        CpuKnobs {
            vector_bits: 256,
            mma_rows: 6,
            mma_vectors: 2,
            unroll_k: 2,
            reduce_chains: 4,
            stream: false,
            ahead: false,
        }
    }
}

impl CpuKnobs {
    /// AVX-512: a 14x2-vector micro-kernel (28 accumulators of 32 registers).
    pub fn avx512() -> CpuKnobs {
        CpuKnobs { vector_bits: 512, mma_rows: 14, ..CpuKnobs::default() }
    }
}
