//! The analytical picker: tile sizes from shapes, caches and lanes. No tuning needed; a tuner may
//! replace its choices.
//!
//! Reasons, by kind of kernel:
//! * elementwise: tiles of a few thousand elements, so that what a chain of maps keeps stays in the
//!   first-level cache, and enough tiles for every thread to have several;
//! * rows: whole rows per tile while they fit, a few at a time;
//! * contractions: see [`gemm_tiles`].

use crate::target::CpuTarget;
use tilewright_tile::{CpuKnobs, MatrixUnit};

/// Vector knobs for the target's lanes.
pub(crate) fn knobs(target: &CpuTarget) -> CpuKnobs {
    if target.lanes >= 16 { CpuKnobs::avx512() } else { CpuKnobs::default() }
}

/// `x` rounded up to a multiple of `to`, at least `to`.
pub(crate) fn round_up(x: i64, to: i64) -> i64 {
    x.max(1).saturating_add(to - 1) / to * to
}

/// `n` cut into equal pieces of at most `most`, rounded up to a multiple of `unit`: the piece.
pub(crate) fn even(n: i64, most: i64, unit: i64) -> i64 {
    let most = most.max(unit);
    let pieces = (n.max(1) + most - 1) / most;
    round_up((n.max(1) + pieces - 1) / pieces, unit)
}

/// Elements of an elementwise tile.
const MAP_TILE: i64 = 4096;

/// Tile of an elementwise kernel: rows and columns (the vector axis). `block` is the block size of
/// a blocked vector axis, `transposed` says that some operand is contiguous along the rows.
pub(crate) fn map_tiles(
    target: &CpuTarget,
    rows: i64,
    cols: i64,
    block: Option<i64>,
    transposed: bool,
) -> (i64, i64) {
    if transposed {
        return (32.min(round_up(rows, 1)), block.unwrap_or(64.min(round_up(cols, target.lanes))));
    }
    let bn = block.unwrap_or_else(|| even(cols, MAP_TILE, target.lanes));
    // Several tiles per thread once there is enough to share out.
    let per_thread = rows.saturating_mul(cols) / (target.threads * 4).max(1);
    let elements = MAP_TILE.min(per_thread.max(1024));
    let bn = if rows <= 1 && block.is_none() { even(cols, elements, target.lanes) } else { bn };
    (even(rows, (elements / bn).max(1), 1), bn)
}

/// Rows per tile when a tile holds whole rows of `width` elements.
pub(crate) fn row_tile(target: &CpuTarget, rows: i64, width: i64) -> i64 {
    let fit = (target.l1_bytes / 2 / 4 / width.max(1)).clamp(1, 64);
    let share = (rows / (target.threads * 4).max(1)).max(1);
    even(rows, fit.min(share), 1)
}

/// Tile sizes of a contraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GemmTiles {
    pub(crate) bm: i64,
    pub(crate) bn: i64,
    pub(crate) bk: i64,
}

/// What the depth of a tile is a multiple of, so that a unit never stands inside a group.
pub(crate) fn depth_unit(unit: MatrixUnit) -> i64 {
    match unit {
        MatrixUnit::Bf16Tile => 32,
        unit => unit.depth_group(),
    }
}

/// Columns of one panel of the right operand: what the micro-kernel holds in registers.
pub(crate) fn panel(target: &CpuTarget) -> i64 {
    let knobs = knobs(target);
    i64::from(knobs.mma_vectors) * target.lanes
}

/// As [`panel`], narrower when there are not that many columns.
pub(crate) fn panel_for(target: &CpuTarget, columns: i64) -> i64 {
    round_up(columns, target.lanes).min(panel(target))
}

/// Tile sizes of a convolution: outputs along the last two spatial axes, output channels, input
/// channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConvTiles {
    pub(crate) bh: i64,
    pub(crate) bw: i64,
    pub(crate) bo: i64,
    pub(crate) bc: i64,
}

/// Sizes for `oh x ow` outputs of `o` channels from `c` channels; `others` is the number of images,
/// groups and outer planes, `taps` the taps that are summed together with the channels.
///
/// * The rows of the product are outputs: one row of the image when that fills the micro-kernel a
///   few times, several rows for small images, so that the weights are not read again for each.
/// * The weights of one step, `bc * taps * bo * 4`, take at most half of the second-level cache, a
///   panel of them an eighth; few steps, because each loads and stores all accumulators.
/// * Enough blocks for the threads, as for contractions.
#[allow(clippy::too_many_arguments, reason = "the sizes of one convolution")]
pub(crate) fn conv_tiles(
    target: &CpuTarget,
    knobs: &CpuKnobs,
    others: i64,
    oh: i64,
    ow: i64,
    o: i64,
    c: i64,
    taps: i64,
) -> ConvTiles {
    let rows = i64::from(knobs.mma_rows);
    let panel = panel_for(target, o);
    let most = (target.l2_bytes / 8 / 4 / panel / taps).clamp(16, 1024);
    let bc = even(c, most, if taps == 1 { depth_unit(knobs.unit) } else { 1 });
    let most = 4 * rows;
    let bw = even(ow, most, 1);
    let mut bh = if bw >= 2 * rows { 1 } else { even(oh, (most / bw).max(1), 1) };
    let most_o = (target.l2_bytes / 2 / 4 / (bc * taps).max(1)).clamp(panel, 8 * panel);
    let mut bo = even(o, most_o, panel);
    let want = target.threads * 3;
    let blocks = |bh: i64, bo: i64| {
        others * ((oh + bh - 1) / bh) * ((ow + bw - 1) / bw) * ((o + bo - 1) / bo)
    };
    while blocks(bh, bo) < want {
        if bo > panel {
            bo = round_up(bo / 2, panel);
        } else if bh > 1 {
            bh = (bh + 1) / 2;
        } else {
            break;
        }
    }
    ConvTiles { bh, bw, bo, bc }
}

/// Rows and keys per step of attention: a few micro-tiles of rows, and keys that are whole panels,
/// so that a block of scores stays in the first-level cache. Fewer rows when there would be too few
/// blocks for the threads.
pub(crate) fn attention_tiles(
    target: &CpuTarget,
    knobs: &CpuKnobs,
    batches: i64,
    rows: i64,
    keys: i64,
) -> (i64, i64) {
    let unit = i64::from(knobs.mma_rows);
    let mut most = 4 * unit;
    while most > unit && batches * ((rows + most - 1) / most) < target.threads * 3 {
        most -= unit;
    }
    let bq = if rows <= 4 { rows.max(1) } else { even(rows, most, 1) };
    (bq, even(keys, 4 * panel(target), panel(target)))
}

/// Sizes for `[m, k] x [k, n]`, repeated over `batch` blocks of the grid.
///
/// * `bk` is the whole sum when a panel of it takes at most an eighth of the second-level cache: each
///   further step over `k` loads and stores all accumulators again. (Measured on a Cascade Lake
///   core with 1 MiB of L2, product of 1024: 69% of peak with steps of 256, 75% with 512, 77%
///   whole. The panel streams from L2 at half of its bandwidth.)
/// * `bm` is whole micro-tiles; the left operand's block `bm * bk * 4` takes at most half of the
///   second-level cache.
/// * `bn` is whole panels.
/// * There are at least three blocks per thread where the problem has that much, so that the last
///   one to finish is not alone for long; blocks shrink along the longer side first.
///
/// `bytes` is the size of an operand's element.
pub(crate) fn gemm_tiles(
    target: &CpuTarget,
    knobs: &CpuKnobs,
    bytes: i64,
    batch: i64,
    [m, n, k]: [i64; 3],
) -> GemmTiles {
    let (rows, panel) = (i64::from(knobs.mma_rows), panel(target));
    let most = (target.l2_bytes / 8 / bytes / panel).clamp(64, 4096 / bytes);
    let bk = even(k, most, depth_unit(knobs.unit));
    if m <= 4 {
        // A matrix times few vectors reads the matrix once: wide blocks, no blocking of rows.
        let want = (target.threads * 4).max(1);
        let share = round_up((n.max(1) + want - 1) / want, panel);
        return GemmTiles { bm: m.max(1), bn: share.clamp(panel, 16 * panel), bk };
    }
    let bm_most = (target.l2_bytes / 2 / bytes / bk / rows).max(1) * rows;
    let mut bm = even(m, bm_most.min(16 * rows), rows);
    let mut bn = even(n, 12 * panel, panel);
    let want = target.threads * 3;
    let blocks = |bm: i64, bn: i64| batch * ((m + bm - 1) / bm) * ((n + bn - 1) / bn);
    while blocks(bm, bn) < want {
        let (next_m, next_n) = (round_up(bm / 2, rows), round_up(bn / 2, panel));
        if bn >= bm && next_n < bn {
            bn = next_n;
        } else if next_m < bm {
            bm = next_m;
        } else if next_n < bn {
            bn = next_n;
        } else {
            break;
        }
    }
    GemmTiles { bm, bn, bk }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_micro_tiles_and_enough_for_the_threads() {
        let target = CpuTarget::avx512();
        for (m, n, k) in [(128, 768, 768), (128, 3072, 768), (1024, 1024, 1024), (17, 40, 9)] {
            let t = gemm_tiles(&target, &knobs(&target), 4, 1, [m, n, k]);
            assert_eq!((t.bm % 14, t.bn % 32), (0, 0), "{t:?}");
            let blocks = (m + t.bm - 1) / t.bm * ((n + t.bn - 1) / t.bn);
            assert!(blocks >= 6 || (t.bm == 14 && t.bn == 32), "{m} {n} {k}: {t:?}");
            assert!(t.bk * 32 * 4 <= target.l2_bytes / 8);
        }
        assert_eq!(even(100, 64, 1), 50);
        assert_eq!(even(0, 64, 8), 8);
    }
}
