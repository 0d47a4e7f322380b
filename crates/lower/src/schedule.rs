//! The analytical picker: tile sizes from shapes, caches and lanes. No tuning needed; a tuner may
//! replace its choices.
//!
//! Reasons, by kind of kernel:
//! * elementwise: tiles of a few thousand elements, so that what a chain of maps keeps stays in the
//!   first-level cache, and enough tiles for every thread to have several;
//! * rows: whole rows per tile while they fit, a few at a time;
//! * contractions: see [`gemm_tiles`].

use crate::target::CpuTarget;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
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
/// a blocked vector axis, `transposed` says that some operand is contiguous along the rows, `far` that results go past
/// the caches.
pub(crate) fn map_tiles(
    target: &CpuTarget,
    rows: i64,
    cols: i64,
    block: Option<i64>,
    [transposed, far]: [bool; 2],
) -> (i64, i64) {
    if transposed && far && block.is_none() {
        // As many rows of memory are read side by side as a vector has elements, far along: each is a stream that the
        // processor sees coming, and results go to memory in whole lines.
        return (even(rows, 1024, target.lanes), target.lanes);
    }
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

/// The depth `k` in steps of at most `most`, whole units. Where there are several, the results of a block are kept
/// between them and want their part of the cache: a little less, if that gives equal steps. (Zen 4, 197 x 768 x 3072:
/// 83% of the peak in steps of 1024, 88% of 768; 2048^3: 89% of 1024, 84% of 688 with a shorter last one.)
fn steps_of(k: i64, most: i64, unit: i64) -> i64 {
    let equal = |b: &i64| k % b == 0 && b % unit.max(16) == 0;
    let less = (most / 2 + 1..=most * 3 / 4).rev().find(equal);
    less.filter(|_| k > most).unwrap_or(even(k, most, unit))
}

/// How the operands of a product are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// The right one lies in panels, or nothing is known of it.
    Plain,
    /// The kernel computes its left operand, in each block of columns again: blocks shrink along the rows first.
    LeftComputed,
    /// The right one lies in rows: each block of rows copies its part. Steps of the depth are shorter, so that a
    /// block has more rows.
    RightLoose,
}

/// What the depth of a tile is a multiple of, so that a unit never stands inside a group.
pub(crate) fn depth_unit(unit: MatrixUnit) -> i64 {
    match unit {
        MatrixUnit::Bf16Tile => 32,
        MatrixUnit::I8Tile => 64,
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

/// Rows up to which a product is a matrix times few vectors: bound by reading the matrix.
pub(crate) const FEW_ROWS: i64 = 4;

/// Shapes of the micro-kernel in 512-bit vectors and rows that hold their results in registers beside what a step reads,
/// and what a vector of results costs in each, in hundredths of the usual shape's.
const SHAPES: [(i64, u32, i64); 3] = [(2, 14, 100), (3, 8, 100), (1, 24, 125)];

/// As [`panel_for`], for a product of many rows: the width of the shape that computes fewest columns for nothing.
pub(crate) fn panel_among(target: &CpuTarget, columns: i64) -> i64 {
    if target.lanes < 16 {
        return panel_for(target, columns);
    }
    let vectors = (columns.max(1) + target.lanes - 1) / target.lanes;
    let cost = |&(v, _, each): &(i64, u32, i64)| (vectors + v - 1) / v * v * each;
    SHAPES.iter().min_by_key(|s| cost(s)).map_or(panel(target), |(v, ..)| v * target.lanes)
}

/// The knobs with the micro-kernel for panels of this width.
pub(crate) fn with_panel(target: &CpuTarget, knobs: CpuKnobs, width: i64) -> CpuKnobs {
    let shape = SHAPES.iter().find(|(v, ..)| target.lanes >= 16 && v * target.lanes == width);
    match shape {
        Some(&(v, rows, _)) if knobs.unit == MatrixUnit::Fma => {
            CpuKnobs { mma_vectors: v as u32, mma_rows: rows, ..knobs }
        }
        _ => knobs,
    }
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
/// * Enough blocks for the threads, of equal work, as for contractions.
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
    let bw = even(ow, 4 * rows, 1);
    let most_o = (target.l2_bytes / 2 / 4 / (bc * taps).max(1)).clamp(panel, 8 * panel);
    // Several rows of the image where one does not fill the micro-kernel a few times.
    let most_h = if bw >= 2 * rows { 1 } else { (8 * rows / bw).max(1) };
    let (bhs, bos) = (equal_pieces(oh, most_h, 1), equal_pieces(o, most_o, panel));
    let across = pieces(ow, bw, 1);
    let score = |bh: i64, bo: i64| {
        // Several rows of the image are computed whole, also where the last ones are not there.
        let down = if bh == 1 { pieces(oh, bh, 1) } else { vec![bh; pieces(oh, bh, 1).len()] };
        let fast: Vec<i64> = down.iter().flat_map(|h| across.iter().map(move |w| h * w)).collect();
        Score::of(target, others, [&pieces(o, bo, panel), &fast], [bh * bw, bo])
    };
    let all = bhs.iter().flat_map(|&bh| bos.iter().map(move |&bo| (bh, bo)));
    let best = all.min_by(|a, b| score(a.0, a.1).cmp(&score(b.0, b.1)));
    let (bh, bo) = best.unwrap_or((1, panel));
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

/// `n` cut into ever more equal pieces, from the fewest of at most `most` on: their sizes, whole
/// units, falling.
fn equal_pieces(n: i64, most: i64, unit: i64) -> Vec<i64> {
    let n = n.max(1);
    let fewest = (n + most - 1) / most;
    let mut sizes: Vec<i64> =
        (fewest..fewest + 24).map(|count| round_up((n + count - 1) / count, unit)).collect();
    sizes.dedup();
    sizes
}

/// The sizes of the pieces of at most `size` of an axis of `n`, as work: in whole units.
fn pieces(n: i64, size: i64, unit: i64) -> Vec<i64> {
    let n = n.max(1);
    let (whole, rest) = (n / size, n % size);
    let mut sizes = vec![round_up(size.min(n), unit); usize::try_from(whole).unwrap_or(0)];
    if rest > 0 {
        sizes.push(round_up(rest, unit));
    }
    sizes
}

/// How good a blocking of a product is; the smallest is best.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Score {
    /// Blocks that there should be more, for threads that are late or slow.
    missing: i64,
    /// When the last thread ends, in multiply-adds of a result's element.
    end: f64,
}

impl Score {
    /// For blocks of the work `slow[i] * fast[j]`, `batch` times, whose tiles have `bm` rows and
    /// `bn` columns.
    ///
    /// A block reads its rows once per block of columns and its columns once per block of rows.
    /// On a Zen 4 core copying an element of the left operand takes as long as two multiply-adds of
    /// vectors, and a panel that comes from beyond the second level costs about four rows.
    fn of(target: &CpuTarget, batch: i64, [slow, fast]: [&[i64]; 2], [bm, bn]: [i64; 2]) -> Score {
        let batch = batch.max(1);
        let blocks = batch.saturating_mul((slow.len() * fast.len()) as i64);
        let end = makespan(target.threads, batch, slow, fast);
        let reads = 1.0 + 2.0 / bn.max(1) as f64 + 4.0 / bm.max(1) as f64;
        Score { missing: (target.threads * 3 - blocks).max(0), end: end * reads }
    }

    fn cmp(&self, other: &Score) -> std::cmp::Ordering {
        self.missing.cmp(&other.missing).then(self.end.total_cmp(&other.end))
    }
}

/// When the last of the threads ends that take blocks in order (`fast` runs fastest), each the next
/// when it is done.
fn makespan(threads: i64, batch: i64, slow: &[i64], fast: &[i64]) -> f64 {
    let threads = threads.max(1);
    let sum = |sizes: &[i64]| sizes.iter().sum::<i64>() as f64;
    let total = batch as f64 * sum(slow) * sum(fast);
    let most = |sizes: &[i64]| sizes.iter().copied().max().unwrap_or(0) as f64;
    let blocks = batch.saturating_mul((slow.len() * fast.len()) as i64);
    if blocks > (4 * threads).max(64) {
        // The last block of each thread ends anywhere in the last one's time.
        return total / threads as f64 + most(slow) * most(fast) / 2.0;
    }
    let mut ends: BinaryHeap<Reverse<i64>> = (0..threads).map(|_| Reverse(0)).collect();
    let mut last = 0;
    for work in (0..batch).flat_map(|_| slow.iter().flat_map(|s| fast.iter().map(move |f| s * f))) {
        let Reverse(first) = ends.pop().unwrap_or(Reverse(0));
        last = last.max(first + work);
        ends.push(Reverse(first + work));
    }
    last as f64
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
/// * There are at least three blocks per thread where the problem has that much, and among such
///   blockings the one whose last thread ends first: see [`Score`].
///
/// `bytes` is the size of an operand's element.
pub(crate) fn gemm_tiles(
    target: &CpuTarget,
    knobs: &CpuKnobs,
    bytes: i64,
    batch: i64,
    [m, n, k]: [i64; 3],
    how: How,
) -> GemmTiles {
    let (rows, panel) = (i64::from(knobs.mma_rows), i64::from(knobs.mma_vectors) * target.lanes);
    let (computed, loose) = (how == How::LeftComputed, how == How::RightLoose);
    let mut most = (target.l2_bytes / 8 / bytes / panel).clamp(64, 4096 / bytes);
    if loose {
        most = most.min(2048 / bytes);
    }
    let bk = steps_of(k, most, depth_unit(knobs.unit));
    if m <= FEW_ROWS {
        // A matrix times few vectors reads the matrix once: wide blocks, no blocking of rows.
        let want = (target.threads * 4).max(1);
        let share = round_up((n.max(1) + want - 1) / want, panel);
        return GemmTiles { bm: m.max(1), bn: share.clamp(panel, 16 * panel), bk };
    }
    let groups = (target.l2_bytes / 2 / bytes / bk / rows).max(1);
    let bm_most = groups.min(if loose { 18 } else { 16 }) * rows;
    // Sums in several steps keep a block of results in the second-level cache between them.
    let panels = if k > bk || computed { 12 } else { 32 };
    let (bms, bns) = (equal_pieces(m, bm_most, rows), equal_pieces(n, panels * panel, panel));
    let widest = bns.iter().copied().max();
    let bns: Vec<i64> = bns.into_iter().filter(|b| !computed || Some(*b) == widest).collect();
    let score = |bm: i64, bn: i64| {
        let (down, across) = (pieces(m, bm, 1), pieces(n, bn, panel));
        let (slow, fast) = if m <= n { (across, down) } else { (down, across) };
        // A panel that each block of rows copies costs it about as much as 28 rows of products.
        let bm = if loose { (bm / 7).max(1) } else { bm };
        Score::of(target, batch, [&slow, &fast], [bm, bn])
    };
    let all = bms.iter().flat_map(|&bm| bns.iter().map(move |&bn| (bm, bn)));
    let best = all.min_by(|a, b| score(a.0, a.1).cmp(&score(b.0, b.1)));
    let (bm, bn) = best.unwrap_or((rows, panel));
    GemmTiles { bm, bn, bk }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_end_together() {
        assert_eq!(makespan(2, 1, &[3, 3, 2], &[1]), 5.0);
        assert_eq!(makespan(2, 2, &[3], &[2, 1]), 9.0);
        let target = CpuTarget::avx512();
        let t = gemm_tiles(&target, &knobs(&target), 4, 1, [196, 1024, 256], How::Plain);
        let (down, across) = (pieces(196, t.bm, 1), pieces(1024, t.bn, 32));
        let ideal = 196.0 * 1024.0 / target.threads as f64;
        assert!(makespan(target.threads, 1, &across, &down) < 1.1 * ideal, "{t:?}");
    }

    #[test]
    fn blocks_are_whole_micro_tiles_and_enough_for_the_threads() {
        let target = CpuTarget::avx512();
        for (m, n, k) in [(128, 768, 768), (128, 3072, 768), (1024, 1024, 1024), (17, 40, 9)] {
            let t = gemm_tiles(&target, &knobs(&target), 4, 1, [m, n, k], How::Plain);
            assert_eq!((t.bm % 14, t.bn % 32), (0, 0), "{t:?}");
            let blocks = (m + t.bm - 1) / t.bm * ((n + t.bn - 1) / t.bn);
            assert!(blocks >= 6 || (t.bm == 14 && t.bn == 32), "{m} {n} {k}: {t:?}");
            assert!(t.bk * 32 * 4 <= target.l2_bytes / 8);
        }
        assert_eq!(even(100, 64, 1), 50);
        assert_eq!(even(0, 64, 8), 8);
    }
}
