//! The schedule space of attention: every legal schedule, declared once, the ones to prefer first.

use crate::attention::program::AttentionSpec;
use tilewright_device::Arch;
use tilewright_lower_gpu::{GpuSchedule, ProductKind, StoreKind};

/// Shared memory that a block may use on Hopper, less what barriers take.
const SMEM_BYTES: i64 = (227 << 10) - 512;

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
    for consumers in [3, 2, 1] {
        let bq = 64 * consumers;
        // Three consumers have 160 registers each: beside wide results too few for scores.
        if consumers == 3 && dv > 96 {
            continue;
        }
        // Registers of a thread: results, scores and their 16-bit copies, and 40 for the rest.
        let budget = if consumers == 3 { 160 } else { 240 };
        for bt in [192, 176, 160, 128, 112, 96, 80, 64, 48, 32] {
            let masked = if spec.mask.is_some() { bt / 4 } else { 0 };
            let registers = dv / 2 + bt / 2 + bt / 4 + masked + 40;
            if registers > budget {
                continue;
            }
            let chunk = [64, 32, 16].into_iter().find(|c| dv % c == 0 && c * result <= 128);
            let Some(chunk) = chunk else { continue };
            let stage = bt * (dk + dv) * size;
            // Tiles of queries (the lowering fetches the next one where there is room for two) and of results.
            let room = |(ahead, slots): (i64, i64)| {
                let staging = bq * chunk * result * slots;
                ((SMEM_BYTES - staging - ahead * bq * dk * size) / stage).min(4)
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
    let plain = spec.dtype.bits() == 32 && !spec.tf32;
    let product = if plain { ProductKind::Fma } else { ProductKind::MmaSync };
    let mut out = Vec::new();
    // Plain multiply-adds keep operands of several steps beside the sums: small tiles.
    let tiles: &[(i64, i64, u32)] = match plain {
        true => &[(64, 32, 4), (32, 32, 2), (32, 32, 4), (64, 32, 8)],
        false => &[(128, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 2)],
    };
    for &(bq, bt, warps) in tiles {
        for stages in [2, 3] {
            let tiles = [("BQ", bq), ("BT", bt)];
            let mut s = GpuSchedule::pipelined(arch, product, (warps, 1), &tiles);
            s.stages = stages;
            s.raster = 1;
            s.vector = vector;
            out.push(s);
        }
    }
    out
}
