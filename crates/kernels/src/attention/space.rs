//! The schedule space of attention: every legal schedule, declared once, the ones to prefer first.

use crate::attention::program::AttentionSpec;
use crate::attention::steps::SMEM_BYTES;
use tilewright_device::Arch;
use tilewright_lower_gpu::{GpuSchedule, ProductKind, StoreKind};

/// How the tensors of a problem can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The copy engine can address queries, keys, values and results.
    pub engine: bool,
    /// Elements that one plain access may take, to any tensor.
    pub vector: u32,
    /// Elements that one plain access to the mask may take.
    pub mask_vector: u32,
}

/// Every legal schedule of `spec` on an architecture.
pub fn space(spec: &AttentionSpec, arch: Arch, access: &Access) -> Vec<GpuSchedule> {
    let mut out = Vec::new();
    if arch >= Arch::Sm90a && access.engine && spec.dtype.bits() == 16 {
        out.extend(warp_specialised(spec, access.mask_vector));
    }
    out.extend(pipelined(spec, arch, access.vector));
    out
}

/// A producer and consumers with `wgmma`.
fn warp_specialised(spec: &AttentionSpec, mask_vector: u32) -> Vec<GpuSchedule> {
    let size = i64::from(spec.dtype.bits()) / 8;
    let result = i64::from(spec.result.bits()) / 8;
    let (dk, dv) = spec.depths();
    let mut out = Vec::new();
    // Blocks of one consumer share a multiprocessor: one's first and last steps run beside the other's products.
    for (consumers, rows, blocks) in [(3, 64, 1), (2, 64, 1), (1, 64, 1), (1, 128, 2), (1, 64, 2)] {
        let bq = rows * consumers;
        // Three consumers have 160 registers each: beside wide results too few for scores. So have 128 rows of one.
        if (consumers == 3 || rows > 64) && dv > 96 {
            continue;
        }
        // Registers of a thread: results, scores and their 16-bit copies, and 40 for the rest.
        let budget = match (consumers, blocks) {
            (3, _) => 160,
            (_, 1) => 240,
            _ => 232,
        };
        let smem = (SMEM_BYTES - (blocks - 1) * 1024) / blocks;
        for bt in [192, 176, 160, 128, 112, 96, 80, 64, 48, 32] {
            let masked = if spec.mask.is_some() { bt / 4 } else { 0 };
            let registers = rows / 64 * (dv / 2 + bt / 2 + bt / 4 + masked) + 40;
            if registers > budget {
                continue;
            }
            let chunk = [64, 32, 16].into_iter().find(|c| dv % c == 0 && c * result <= 128);
            let Some(chunk) = chunk else { continue };
            let stage = bt * (dk + dv) * size;
            // Tiles of queries (the lowering fetches the next one where there is room for two) and of results.
            let room = |(ahead, slots): (i64, i64)| {
                let staging = bq * chunk * result * slots;
                ((smem - staging - ahead * bq * dk * size) / stage).min(4)
            };
            let most = room((1, 1));
            let pairs = [(2, 2), (2, 1), (1, 2), (1, 1)];
            // No stage is given up for them.
            let pair = pairs.into_iter().find(|p| room(*p) >= most.min(3)).unwrap_or((1, 1));
            let stages = room(pair);
            if stages < 2 {
                continue;
            }
            for turns in [true, false] {
                if turns && consumers == 1 {
                    continue;
                }
                let mut s = GpuSchedule::hopper(&[("BQ", bq), ("BT", bt)]);
                s.consumers = consumers as u32;
                s.blocks_per_sm = blocks as u32;
                s.stages = stages as u32;
                s.raster = 1;
                s.turns = turns;
                s.dependent = true;
                s.store = StoreKind::Tma;
                s.store_slots = pair.1 as u32;
                s.vector = mask_vector;
                s.serpentine = true;
                out.push(s);
            }
        }
    }
    out
}

/// Plain copies, `mma.sync` or plain multiply-adds.
fn pipelined(spec: &AttentionSpec, arch: Arch, vector: u32) -> Vec<GpuSchedule> {
    let (_, dv) = spec.depths();
    let wide = spec.dtype.bits() == 32;
    let split = wide && !spec.tf32;
    // f32 sums of a block, of all blocks, and of two parts: beyond this no registers are left for scores.
    let product = match split {
        true if dv > 128 => ProductKind::Fma,
        true => ProductKind::MmaSplit,
        false => ProductKind::MmaSync,
    };
    let tiles: &[(i64, i64, u32)] = match wide {
        true if product == ProductKind::Fma => &[(32, 32, 2), (64, 32, 8)],
        true => WIDE,
        false => &[(128, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 2)],
    };
    let size = i64::from(spec.dtype.bits()) / 8;
    let mut out = Vec::new();
    for &(bq, bt, warps) in tiles {
        // Numbers of a thread: sums, those of a block, scores, and about so many for operands, addresses and a mask.
        let blocks = bq / i64::from(warps) / 16;
        let sums = if split { dv } else { dv / 2 };
        let masked = if spec.mask.is_some() { 16 } else { 0 };
        let numbers = blocks * (sums + bt / 2) + 84 + 4 * blocks + masked;
        // Of 16 bits, blocks of 32 keys are kept whatever they take: something has to run.
        let most = match wide {
            true if split => 255,
            true => 250,
            false => 240,
        };
        if product != ProductKind::Fma && numbers > most && (wide || bt > 32) {
            continue;
        }
        for stages in [2, 3] {
            let tiles = [("BQ", bq), ("BT", bt)];
            let mut s = GpuSchedule::pipelined(arch, product, (warps, 1), &tiles);
            s.stages = stages;
            s.raster = 1;
            s.vector = vector;
            if wide {
                // Two blocks where registers and shared memory have room, so that one's products run beside the other's
                // exponents.
                let smem =
                    size * (bq * spec.depths().0 + i64::from(stages) * bt * (dv + spec.depths().0));
                s.blocks_per_sm = (8 / warps).min((SMEM_BYTES / (smem + 1024)) as u32).max(1);
            }
            out.push(s);
        }
    }
    out
}

/// Tiles of 32-bit operands: 16 or 32 rows a warp.
const WIDE: &[(i64, i64, u32)] = &[
    (128, 64, 4),
    (128, 32, 4),
    (64, 64, 4),
    (64, 32, 4),
    (128, 64, 8),
    (128, 32, 8),
    (32, 32, 2),
];
