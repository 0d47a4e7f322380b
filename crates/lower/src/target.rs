//! [`CpuTarget`]: the numbers of a machine that fusion and schedules read.

use tilewright_target::Precision;
use tilewright_tile::MatrixUnit;

/// A CPU as data. The rates are measured once per machine by whoever calls lowering.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuTarget {
    /// `f32` elements in one vector register: 8 (AVX2) or 16 (AVX-512).
    pub lanes: i64,
    /// Bytes of the first-level data cache of one core.
    pub l1_bytes: i64,
    /// Bytes of the second-level cache of one core.
    pub l2_bytes: i64,
    /// Bytes of the last-level cache.
    pub l3_bytes: i64,
    /// Threads that run blocks.
    pub threads: i64,
    /// Measured fused multiply-add peak of all threads, in flops per second.
    pub flops_per_second: f64,
    /// How many times as fast matrices are multiplied: 1 where no unit of its own does that.
    pub product_speedup: f64,
    /// Measured memory bandwidth of all threads, in bytes per second.
    pub bytes_per_second: f64,
    /// Measured bandwidth of the second-level caches of all threads, in bytes per second.
    pub l2_bytes_per_second: f64,
    /// Time to start one kernel on all threads, in nanoseconds.
    pub launch_ns: f64,
    /// What multiplies `bf16` operands with sums in `f32`.
    pub bf16_unit: MatrixUnit,
    /// What multiplies 8-bit operands with sums in `i32`.
    pub int8_unit: MatrixUnit,
}

/// The units of a machine with these extensions (by LLVM's names): for `bf16` and for 8-bit operands.
pub fn matrix_units(vector_bits: u32, has: impl Fn(&str) -> bool) -> (MatrixUnit, MatrixUnit) {
    if vector_bits < 512 {
        return (MatrixUnit::Fma, MatrixUnit::Fma);
    }
    let bf16 = if has("amx-tile") && has("amx-bf16") {
        MatrixUnit::Bf16Tile
    } else if has("avx512bf16") {
        MatrixUnit::Bf16Dot
    } else {
        MatrixUnit::Fma
    };
    let int8 = if has("amx-tile") && has("amx-int8") {
        MatrixUnit::I8Tile
    } else if has("avx512vnni") {
        MatrixUnit::I8Dot
    } else {
        MatrixUnit::Fma
    };
    (bf16, int8)
}

impl CpuTarget {
    /// A plain AVX2 machine with two threads, for tests and where nothing was measured.
    pub fn avx2() -> CpuTarget {
        CpuTarget {
            lanes: 8,
            l1_bytes: 32 << 10,
            l2_bytes: 1 << 20,
            l3_bytes: 16 << 20,
            threads: 2,
            flops_per_second: 1.0e11,
            product_speedup: 1.0,
            bytes_per_second: 2.0e10,
            l2_bytes_per_second: 1.0e11,
            launch_ns: 2000.0,
            bf16_unit: MatrixUnit::Fma,
            int8_unit: MatrixUnit::Fma,
        }
    }

    /// A plain AVX-512 machine with two threads.
    pub fn avx512() -> CpuTarget {
        CpuTarget { lanes: 16, l2_bytes: 2 << 20, flops_per_second: 2.0e11, ..CpuTarget::avx2() }
    }
}

/// How much faster a GPU's second-level cache is read than its memory, about.
const CACHE_RATE: f64 = 2.0;

impl From<&tilewright_target::Gpu> for CpuTarget {
    /// The rates of a GPU, for the fusion planner. Caches and lanes are those of a plain CPU: they set
    /// the tile sizes with which the interpreter runs a GPU's plan. What is small enough for a cache comes at
    /// least as fast as the rest: a processor's rate there would make small kernels look slower than large ones.
    fn from(gpu: &tilewright_target::Gpu) -> CpuTarget {
        let clocks = f64::from(gpu.sms) * gpu.model.clock_ghz * 1e9;
        CpuTarget {
            flops_per_second: clocks * gpu.f32_flops_per_clock,
            bytes_per_second: gpu.copy_bytes_per_s,
            l2_bytes_per_second: CACHE_RATE * gpu.copy_bytes_per_s,
            launch_ns: gpu.model.launch_us * 1e3,
            ..CpuTarget::avx2()
        }
    }
}

/// First-level caches of this size belong to cores on which shorter steps were faster: it seems that they read panels out of the
/// second level too slowly for their two multiply-adds a cycle.
const LARGE_L1: i64 = 48 << 10;
/// What products in f32 count on of the second level there.
const SHORT_STEPS: i64 = 512 << 10;

impl CpuTarget {
    /// The rates of a GPU whose products are of this precision: its tensor cores multiply all but `f32`.
    pub fn of_gpu(gpu: &tilewright_target::Gpu, precision: Precision) -> CpuTarget {
        let tensor = gpu.tensor_flops_per_clock / gpu.model.tensor_factor / gpu.f32_flops_per_clock;
        let product_speedup = match precision {
            Precision::F16 | Precision::Bf16 => tensor,
            Precision::Tf32 => tensor / 2.0,
            Precision::F32 => 1.0,
        };
        CpuTarget { product_speedup, ..CpuTarget::from(gpu) }
    }

    /// Bytes of the second-level cache that the blocks of a product are made for. Where the first level is large,
    /// steps of the depth are shorter, so that a panel is there when the next rows read it.
    pub(crate) fn block_bytes(&self, unit: MatrixUnit) -> i64 {
        let short = self.l1_bytes >= LARGE_L1 && unit == MatrixUnit::Fma;
        if short { self.l2_bytes.min(SHORT_STEPS) } else { self.l2_bytes }
    }
}

impl From<&tilewright_target::Cpu> for CpuTarget {
    fn from(cpu: &tilewright_target::Cpu) -> CpuTarget {
        let bytes = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let (bf16_unit, int8_unit) = matrix_units(cpu.vector_bits, |f| cpu.has(f));
        CpuTarget {
            bf16_unit,
            int8_unit,
            lanes: i64::from(cpu.vector_bits / 32),
            l1_bytes: bytes(cpu.l1_bytes),
            l2_bytes: bytes(cpu.l2_bytes),
            l3_bytes: bytes(cpu.l3_bytes),
            threads: bytes(cpu.threads),
            flops_per_second: cpu.ceilings.f32_flops_per_s,
            product_speedup: 1.0,
            bytes_per_second: cpu.ceilings.memory_copy_bytes_per_s,
            l2_bytes_per_second: cpu.ceilings.l2_read_bytes_per_s * cpu.threads as f64,
            launch_ns: cpu.ceilings.launch_s * 1e9,
        }
    }
}
