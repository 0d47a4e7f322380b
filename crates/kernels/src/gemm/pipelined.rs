//! Tensor-core products without the copy engine (`mma.sync` fed by plain asynchronous copies): the space of schedules and
//! their estimated time, for every architecture from Ampere on.
//!
//! Nothing of the model was measured on Ampere or Ada: rates are those of the machine, and shares of them what the
//! kernels reach on Hopper.

use crate::gemm::model::{Shape, ceil};
use crate::gemm::problem::Problem;
use crate::gemm::program::{GemmSpec, Math};
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_lower_gpu::{GpuSchedule, ProductKind, StoreKind};
use tilewright_target::Gpu;

/// Tiles and their warps. Each warp has at most 64 x 64 sums.
#[rustfmt::skip] // One row per shape.
const SHAPES: [(i64, i64, (u32, u32)); 9] = [
    (128, 256, (2, 4)),
    (256, 128, (4, 2)),
    (128, 128, (2, 2)),
    (128,  64, (2, 2)),
    ( 64, 128, (2, 2)),
    ( 64,  64, (2, 2)),
    ( 32, 128, (1, 4)),
    ( 16, 256, (1, 4)),
    ( 16, 128, (1, 4)),
];

/// Sums that a thread keeps at most; the rest of its registers is for operands and addresses.
const SUMS: i64 = 128;

/// What accesses to memory allow: elements of one access to the result, and of one copy of an operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accesses {
    pub(super) result: u32,
    pub(super) operands: u32,
}

/// Every schedule of `spec` with these instructions, in a fixed order.
pub(super) fn pipelined_space(spec: &GemmSpec, gpu: &Gpu, accesses: Accesses) -> Vec<GpuSchedule> {
    let arch = Arch::of_capability(gpu.capability);
    let size = i64::from(spec.operand.bits()) / 8;
    // Windows need the copy engine.
    if spec.windows.is_some() {
        return Vec::new();
    }
    let tensors = if spec.math == Math::Tf32x3 { 2 } else { 1 };
    let apart = matches!(spec.math, Math::Promoted | Math::Tf32x3);
    let [lefts, rights] = spec.epilogue.pair.operands();
    let mut out = Vec::new();
    for (bm, bn, warps) in SHAPES {
        let threads = i64::from(warps.0 * warps.1) * 32;
        let sums = if apart { 2 } else { 1 } * lefts * rights * bm * bn / threads;
        if sums > SUMS {
            continue;
        }
        for bytes in [64, 128] {
            let bk = bytes / size;
            let stage = tensors * (lefts * bm + rights * bn) * bytes;
            for stages in [4, 3, 2] {
                // Results are staged in chunks of up to 64 columns.
                let staging = bm * 64.min(bn) * i64::from(spec.result.bits()) / 8;
                if stage * stages + staging > gpu.smem_bytes_per_block() {
                    continue;
                }
                let tiles = [("BM", bm), ("BN", bn), ("BK", bk)];
                let mut s = GpuSchedule::pipelined(arch, ProductKind::MmaSync, warps, &tiles);
                s.stages = stages as u32;
                s.raster = 8;
                s.vector = accesses.result;
                s.copies = accesses.operands;
                s.store = if accesses.result > 1 { StoreKind::Staged } else { StoreKind::Direct };
                out.push(s);
            }
        }
    }
    out
}

/// Tensor-core time over its ideal: what 4096^3 of bf16 takes on an H200 with these instructions, over half of its rate,
/// which is what they reach there at most.
const TENSOR_FACTOR: f64 = 1.15;
/// Share of the shorter times that adds to the longest: copies, shared memory and products overlap across warps.
const BESIDE: f64 = 0.2;
/// Clocks of a step that no other warp hides, and of a tile before its first product and after its last.
const STEP_CLOCKS: f64 = 120.0;
const TILE_CLOCKS: f64 = 3000.0;
/// Clocks of a copy of one element each, per warp instruction: what is not aligned to 4 bytes goes through registers.
const NARROW_COPY_CLOCKS: f64 = 4.0;

/// Microseconds of a product under a schedule of [`pipelined_space`], operands cold.
pub(super) fn estimate_pipelined(gpu: &Gpu, s: &GpuSchedule, shape: &Shape) -> f64 {
    let p = &gpu.model;
    let tile = |name: &str| s.tiles.get(name).copied().unwrap_or(1);
    let (bm, bn, bk) = (tile("BM"), tile("BN"), tile("BK"));
    let (wm, wn) = (i64::from(s.warps.0), i64::from(s.warps.1));
    let threads = wm * wn * 32;
    let [lefts, rights] = shape.operands;
    let size = shape.operand_bytes;
    let tensors = if shape.products > 1 { 2 } else { 1 };
    let stage = tensors * (lefts * bm + rights * bn) * bk * size;
    // Blocks that shared memory and registers let live on one multiprocessor.
    let room = gpu.smem_bytes_per_block() / (stage * i64::from(s.stages));
    let sums = lefts * rights * bm * bn / threads;
    let together = room.min(65536 / threads / (sums + 80).min(255)).clamp(1, 8);
    let tiles = ceil(shape.m, bm) * ceil(shape.n, bn) * shape.batch * shape.splits;
    let per_sm = ceil(tiles, i64::from(gpu.sms));
    let together = together.min(per_sm) as f64;
    let steps = ceil(ceil(shape.k, bk), shape.splits) as f64;
    let rate = gpu.tensor_flops_per_clock * 2.0 / size as f64;
    let flops = (2 * shape.products * lefts * rights * bm * bn * bk) as f64;
    let products = flops / rate * TENSOR_FACTOR;
    // Every warp reads the lines of its rows and the columns of its part.
    let read = tensors * (lefts * bm * wn + rights * bn * wm) * bk * size;
    let shared = (read + stage) as f64 / 128.0;
    let widest = i64::from(s.copies.max(1)) * size;
    let narrow = if widest < 4 { (stage / size / 32) as f64 * NARROW_COPY_CLOCKS } else { 0.0 };
    let filled = stage as f64 / p.l2_bytes_per_clock;
    let longest = products.max(shared).max(filled).max(narrow);
    let all = products + shared + filled + narrow;
    let latency = p.load_latency_clocks / f64::from(s.stages - 1);
    let alone = longest + BESIDE * (all - longest) + STEP_CLOCKS / together;
    // A step lasts as long as a load, divided among those under way.
    let step = alone.max(latency / together);
    let stored = (bm * bn * (shape.result_bytes + shape.residual_bytes)) as f64;
    let ending = (bm * bn * shape.epilogue_instructions) as f64 / 128.0;
    let end = (TILE_CLOCKS + stored / p.epilogue_bytes_per_clock + ending) / together;
    let busy = per_sm as f64 * (steps * step + end) / p.clock_ghz / 1e3;
    let operands = ((lefts * shape.m + rights * shape.n) * shape.k * size * tensors) as f64;
    let results =
        (shape.m * shape.n * (shape.result_bytes * shape.splits + shape.residual_bytes)) as f64;
    let memory = (operands + results) * shape.batch as f64 / p.stream_bytes_per_s * 1e6;
    busy.max(memory) + p.overlap_share * busy.min(memory) + p.launch_us + p.stream_start_us
}

/// A type of the problem that the machine has no instructions for: 8-bit floats came with Ada.
pub(super) fn lacking_type(p: &Problem, gpu: &Gpu) -> Option<DType> {
    let e = &p.epilogue;
    let all = [Some(p.operand), Some(p.result), e.col_vector, e.row_vector, e.residual];
    let missing = |t: &DType| t.is_float() && t.bits() == 8;
    let older = Arch::of_capability(gpu.capability) < Arch::Sm89;
    all.into_iter().flatten().find(|t| older && missing(t))
}
