//! [`Schedule`]: how a tile program is run, apart from what it computes.

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::DType;

/// Tile sizes and the knobs of each kind of target. Any legal schedule gives the same result up to
/// the order of floating-point sums.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Schedule {
    /// A value for each of the kernel's tile sizes.
    pub tiles: BTreeMap<Arc<str>, i64>,
    /// Knobs that the CPU reads.
    pub cpu: CpuKnobs,
}

/// The instruction that matrix products use, where their operand types fit it; all others use
/// fused multiply-adds (integers: multiply and add). Prints and parses as its short name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum MatrixUnit {
    /// Multiply-adds on vectors, one step of the depth at a time.
    #[default]
    Fma,
    /// Multiply-adds on vectors with codes of four bits on the right, which lie eight steps of the depth together and are
    /// unpacked in registers: `f32` sums.
    Codes,
    /// AVX512-BF16 `vdpbf16ps`: `bf16` operands, two steps at a time, sums in `f32`.
    Bf16Dot,
    /// AMX `tdpbf16ps`: `bf16` operands in 16x32 tiles, sums in `f32`.
    Bf16Tile,
    /// AVX512-VNNI `vpdpbusd`: 8-bit operands, four steps at a time, sums in `i32`.
    I8Dot,
    /// AMX `tdpbssd` and `tdpbusd`: 8-bit operands in 16x64 tiles, sums in `i32`.
    I8Tile,
}

impl MatrixUnit {
    /// All of them.
    pub const ALL: [MatrixUnit; 6] = [
        MatrixUnit::Fma,
        MatrixUnit::Codes,
        MatrixUnit::Bf16Dot,
        MatrixUnit::Bf16Tile,
        MatrixUnit::I8Dot,
        MatrixUnit::I8Tile,
    ];

    /// Whether its operands lie in tile registers.
    pub fn is_tile(self) -> bool {
        matches!(self, MatrixUnit::Bf16Tile | MatrixUnit::I8Tile)
    }

    /// Short name.
    pub fn name(self) -> &'static str {
        match self {
            MatrixUnit::Fma => "fma",
            MatrixUnit::Codes => "codes",
            MatrixUnit::Bf16Dot => "bf16dot",
            MatrixUnit::Bf16Tile => "bf16tile",
            MatrixUnit::I8Dot => "i8dot",
            MatrixUnit::I8Tile => "i8tile",
        }
    }

    /// Whether it multiplies operands of types `a` and `b` with sums in `acc`.
    pub fn takes(self, a: DType, b: DType, acc: DType) -> bool {
        match self {
            MatrixUnit::Fma => true,
            MatrixUnit::Codes => {
                b.is_int() && b.bits() == 4 && (a, acc) == (DType::F32, DType::F32)
            }
            MatrixUnit::Bf16Dot | MatrixUnit::Bf16Tile => {
                (a, b, acc) == (DType::BF16, DType::BF16, DType::F32)
            }
            // Codes of four bits, unpacked in registers, are the unsigned operand.
            MatrixUnit::I8Dot if b.bits() == 4 => b.is_int() && (a, acc) == (DType::I8, DType::I32),
            MatrixUnit::I8Dot | MatrixUnit::I8Tile => {
                matches!(a, DType::I8 | DType::U8) && (b, acc) == (DType::I8, DType::I32)
            }
        }
    }

    /// Steps of the depth that one instruction takes for each result, and that therefore lie next
    /// to each other in both operands.
    pub fn depth_group(self) -> i64 {
        match self {
            MatrixUnit::Fma => 1,
            MatrixUnit::Codes => 8,
            MatrixUnit::Bf16Dot | MatrixUnit::Bf16Tile => 2,
            MatrixUnit::I8Dot | MatrixUnit::I8Tile => 4,
        }
    }
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
    /// Neighbours that a store computes together, so that they share what they load; 1 for none.
    pub jam: u32,
    /// Instruction of matrix products whose operand types fit it.
    pub unit: MatrixUnit,
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
            jam: 1,
            unit: MatrixUnit::Fma,
        }
    }
}

impl CpuKnobs {
    /// AMX for `bf16`: 2x2 tiles of results, two of each operand.
    pub fn amx() -> CpuKnobs {
        CpuKnobs { mma_rows: 32, unit: MatrixUnit::Bf16Tile, ..CpuKnobs::avx512() }
    }

    /// AMX for 8 bits, in the same tiles.
    pub fn amx_bytes() -> CpuKnobs {
        CpuKnobs { unit: MatrixUnit::I8Tile, ..CpuKnobs::amx() }
    }

    /// AVX-512: a 14x2-vector micro-kernel (28 accumulators of 32 registers).
    pub fn avx512() -> CpuKnobs {
        CpuKnobs { vector_bits: 512, mma_rows: 14, ..CpuKnobs::default() }
    }
}
