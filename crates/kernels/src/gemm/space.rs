//! The schedule space of tensor-core products on Hopper: every legal schedule, declared once. The
//! picker, the tuner and the tests enumerate this.

use crate::gemm::program::{GemmSpec, Math, Order};
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_lower_gpu::{
    GpuSchedule, Mode, ProductKind, STAGED_COLUMNS, StoreKind, residual_span,
};
use tilewright_target::Gpu;

/// Shared memory that a block may use on Hopper, less what barriers take.
const SMEM_BYTES: i64 = (227 << 10) - 256;

/// Columns of one chunk of the epilogue, as `lower-gpu` cuts them. Along lines of a row-major result a chunk is a
/// swizzle span, or the whole of a narrow tile; `None` when there would be many small ones.
fn chunk_columns(bm: i64, bn: i64, result: DType, order: Order) -> Option<i64> {
    let size = i64::from(result.bits()) / 8;
    // Small tiles have many sizes without the narrow spans.
    let spans = if bm < 128 { &[128, 64][..] } else { &[128, 64, 32][..] };
    let spans = spans.iter().map(|bytes| (bytes / size).min(64)).find(|c| bn % c == 0);
    if spans.is_some() {
        return spans;
    }
    match order {
        Order::Row => [16, 32, 64, 128].contains(&(bn * size)).then_some(bn),
        Order::Col => {
            (8..=64).rev().step_by(8).find(|c| bn % c == 0).filter(|c| *c >= 32 || *c == bn)
        }
    }
}

/// Columns of one chunk of results that consumers store in lines, as `lower-gpu` cuts them.
pub(super) fn staged_columns(bn: i64, result_bytes: i64) -> i64 {
    let most = i64::from(STAGED_COLUMNS).min(128 / result_bytes);
    [most, most / 2, most / 4].into_iter().find(|c| bn % c == 0).unwrap_or(8)
}

/// Bytes of staging tiles for results.
fn staging_bytes(
    (bm, rows): (i64, i64),
    bn: i64,
    result: DType,
    order: Order,
    slots: i64,
) -> Option<i64> {
    let size = i64::from(result.bits()) / 8;
    chunk_columns(bm, bn, result, order).map(|chunk| {
        let bytes = rows * chunk * size;
        (bytes + 1023) / 1024 * 1024 * slots
    })
}

/// Bytes of the buffer for a residual that the copy engine brings; 0 when registers load it.
pub(super) fn streamed_bytes(spec: &GemmSpec, store: StoreKind, rows: i64, bn: i64) -> i64 {
    let Some(residual) = spec.epilogue.residual else { return 0 };
    let streamed = store == StoreKind::Tma
        && spec.epilogue.pair == crate::gemm::program::Pair::None
        && spec.c == Order::Row
        && residual_span(bn as u32, residual, spec.result).is_some();
    if streamed { (rows * bn * i64::from(residual.bits()) / 8 + 1023) / 1024 * 1024 } else { 0 }
}

/// Every legal schedule of `spec` on Hopper, in a fixed order. `store` and `vector` follow from the
/// alignment of the result.
pub fn space(spec: &GemmSpec, store: StoreKind, vector: u32) -> Vec<GpuSchedule> {
    let mut out = Vec::new();
    each_schedule(spec, store, vector, 1, &RASTERS, &mut |s| out.push(s.clone()));
    out
}

/// Blocks of a cluster and the axis along which they lie; 2: along both.
const CLUSTERS: [(i64, usize); 7] = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 2)];

/// Rows of tiles that are walked together.
pub(super) const RASTERS: [u32; 3] = [8, 16, 4];

/// Shows every schedule of [`space`] with one of these rasters, in its order: there are thousands, and most callers keep few.
/// `results` tensors are stored: sums in parts of a pair are two.
pub(super) fn each_schedule(
    spec: &GemmSpec,
    store: StoreKind,
    vector: u32,
    results: i64,
    rasters: &[u32],
    visit: &mut dyn FnMut(&GpuSchedule),
) {
    let size = i64::from(spec.operand.bits()) / 8;
    let tensors = if spec.math == Math::Tf32x3 { 2 } else { 1 };
    let two_sums = matches!(spec.math, Math::Promoted | Math::Tf32x3);
    let [lefts, rights] = spec.epilogue.pair.operands();
    let scratch = if two_sums { 2 } else { 1 } * lefts * rights;
    // (rows, consumers, mode)
    let shapes = [
        (64, 1, Mode::Cooperative),
        (128, 1, Mode::Cooperative),
        (128, 2, Mode::Cooperative),
        (256, 2, Mode::Cooperative),
        (192, 3, Mode::Cooperative),
        (64, 2, Mode::PingPong),
        (128, 2, Mode::PingPong),
    ];
    for (bm, consumers, mode) in shapes {
        let rows = if mode == Mode::PingPong { bm } else { bm / consumers };
        let all_rows = rows * consumers;
        for bn in (8..=256).step_by(8) {
            if spec.operand == DType::I8 && bn > 32 && bn % 16 != 0 {
                continue;
            }
            // Wide tiles are cut into chunks of whole 16 columns, but for 16-bit results whose columns are contiguous.
            let eights =
                store == StoreKind::Tma && spec.result.bits() == 16 && spec.c == Order::Col;
            if bn > 64 && bn % 16 != 0 && !eights {
                continue;
            }
            // Registers of accumulators per thread; the rest is for addresses and the epilogue. A residual takes
            // addresses, too: for each element of a column-major tile, for twice the rows in tall ones.
            let streamed = match mode {
                Mode::Cooperative => streamed_bytes(spec, store, all_rows, bn),
                Mode::PingPong => 0,
            };
            let residual = spec.epilogue.residual.is_some();
            let addresses = residual && (spec.c == Order::Col || rows > 64);
            let most = match consumers {
                3 => 96,
                _ if streamed > 0 => 128,
                _ if addresses => 96,
                // So do stores of columns from registers; what is staged comes back through some.
                _ if store == StoreKind::Staged => 160,
                _ if store == StoreKind::Direct && spec.c == Order::Col => 160,
                _ => 200,
            };
            if scratch * rows * bn / 128 > most {
                continue;
            }
            // Windows over few channels: a step takes one tap, and what lies behind the channels is for nothing.
            let depths: &[i64] =
                if spec.windows.is_some() { &[32, 64, 128, 256] } else { &[128, 256] };
            for &depth_bytes in depths {
                let bk = depth_bytes / size;
                let mut s = GpuSchedule::hopper(&[("BM", bm), ("BN", bn), ("BK", bk)]);
                s.mode = mode;
                s.consumers = consumers as u32;
                s.dependent = true;
                s.store = store;
                s.vector = vector;
                for (cluster, axis) in CLUSTERS {
                    // A shared tile is loaded in equal parts of whole groups of 8 lines.
                    s.cluster = cluster as u32;
                    s.cluster_axis = axis;
                    let (high, wide) = s.cluster_tiles();
                    let left_lines = if spec.a == Order::Row { bm } else { bk };
                    let right_lines = if spec.b == Order::Row { bk } else { bn };
                    let parts = |lines: i64, blocks: u32| lines % (8 * i64::from(blocks)) == 0;
                    if wide > 1 && !parts(left_lines, wide) || high > 1 && !parts(right_lines, high)
                    {
                        continue;
                    }
                    // N-contiguous operands lie in panels of a swizzle span; spans of 32 bytes are slow to read.
                    if spec.b == Order::Row && bn * size % 64 != 0 {
                        continue;
                    }
                    let mut before = 0;
                    // Room for the whole tile lets all of it leave at one go: where the consumers wait for their stores.
                    let plain = !residual && lefts * rights == 1;
                    let chunks = chunk_columns(bm, bn, spec.result, spec.c).map_or(0, |c| bn / c);
                    let alone = mode == Mode::Cooperative && store == StoreKind::Tma && plain;
                    let whole = (alone && chunks > 2).then_some(chunks);
                    for slots in [Some(2), Some(1), whole].into_iter().flatten() {
                        let staging = match store {
                            StoreKind::Direct | StoreKind::Staged if slots == 1 => continue,
                            StoreKind::Direct => 0,
                            StoreKind::Staged => {
                                // Odd numbers of eights make chunks that no power of two of threads shares.
                                if bn % 16 != 0 && bn != 8 {
                                    continue;
                                }
                                let bytes = i64::from(spec.result.bits()) / 8;
                                all_rows * staged_columns(bn, bytes) * bytes * results
                            }
                            StoreKind::Tma => {
                                match staging_bytes((bm, all_rows), bn, spec.result, spec.c, slots)
                                {
                                    Some(bytes) => bytes * results,
                                    None => continue,
                                }
                            }
                        };
                        let stage = tensors * (lefts * bm + rights * bn) * bk * size;
                        let most = if depth_bytes < 128 { 16 } else { 8 };
                        let stages = ((SMEM_BYTES - staging - streamed) / stage).min(most);
                        // One staging tile only where it makes room for a stage.
                        if stages < 2 || stages == before || slots > 2 && stages < 3 {
                            continue;
                        }
                        before = if slots > 2 { before } else { stages };
                        s.stages = stages as u32;
                        s.store_slots = slots as u32;
                        for &raster in rasters {
                            s.raster = raster;
                            visit(&s);
                        }
                    }
                }
            }
        }
    }
}

/// Tiles of plain f32 multiply-adds, their warps, and the blocks that share a multiprocessor. Each thread holds
/// 8 x 16, 8 x 8 or 4 x 4 sums.
#[rustfmt::skip] // One row per shape.
const MULTIPLY_ADD_SHAPES: [(i64, i64, (u32, u32), i64); 11] = [
    (128, 256, (2, 4), 1),
    (256, 128, (4, 2), 1),
    (128, 128, (2, 2), 2),
    ( 64, 256, (1, 4), 2),
    ( 64, 128, (1, 2), 4),
    (128, 128, (2, 4), 1),
    (128, 128, (4, 2), 1),
    ( 64, 128, (2, 4), 1),
    ( 64,  64, (2, 4), 1),
    ( 64,  64, (2, 2), 1),
    ( 32,  64, (1, 4), 1),
];

/// Schedules of plain f32 multiply-adds, for operands in any layout. `vector` is how many elements one access
/// may take; of a pair there are two sums for each result, which the largest tiles have no registers for.
pub(super) fn multiply_add_space(gpu: &Gpu, vector: u32, pair: bool) -> Vec<GpuSchedule> {
    let (arch, room) = (Arch::of_capability(gpu.capability), gpu.smem_bytes_per_block());
    let mut out = Vec::new();
    for (bm, bn, warps, blocks) in MULTIPLY_ADD_SHAPES {
        let sums = bm * bn / i64::from(warps.0 * warps.1 * 32);
        if pair && sums > 32 {
            continue;
        }
        for bk in [16, 32] {
            for stages in [3, 2] {
                let columns = if pair { 2 * bn } else { bn };
                if i64::from(stages) * (bm + columns) * bk * 4 * blocks > room {
                    continue;
                }
                let tiles = [("BM", bm), ("BN", bn), ("BK", bk)];
                let mut s = GpuSchedule::pipelined(arch, ProductKind::Fma, warps, &tiles);
                s.stages = stages;
                s.vector = vector;
                s.raster = 8;
                s.blocks_per_sm = blocks as u32;
                out.push(s);
            }
        }
    }
    out
}
