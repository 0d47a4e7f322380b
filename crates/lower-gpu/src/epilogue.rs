//! What follows the loop: elementwise steps on the accumulators, in chunks of columns.
//!
//! Registers do not hold a second tile, so the steps after the loop run for a few columns at a time:
//! load what the chunk needs, compute, store. What depends on rows only is loaded once, before the
//! chunks. Stores through the copy engine are staged in a small ring of tiles per consumer, and drain
//! while the next tile is multiplied.
//!
//! Sums over rows leave in parts of [`PART_COLUMNS`] columns, each by the block that holds them, and come as a vector along rows
//! that is added up before the chunks (`row_sums.rs`).

use crate::hopper::{Builder, CONSUMER, STORE_BARRIER};
use crate::row_sums;
use crate::schedule::{Mode, StoreKind};
use crate::streams::{Defs, definitions, extents};
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_device::{
    Barrier, BarrierId, BarrierRef, CLUSTERS, CachePolicy, Extent, Frag, FragId, FragRef, MapId,
    Phase, Reach, Ring, RingId, Slot, Smem, SmemId, SmemTile, Spread, Stmt, Swizzle, TensorMap,
};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{Kernel, ParamId, ReduceKind, TileId, TileOp};

/// Columns over which one part of the sums over a row goes.
pub const PART_COLUMNS: u32 = 64;

/// The steps after the loop.
pub(crate) struct Finish {
    /// Per item.
    pub(crate) stmts: Vec<Stmt>,
    /// After the last item.
    pub(crate) last: Vec<Stmt>,
}

/// A tile that the epilogue reads and the copy engine brings, from the start of the item on: a residual. Each consumer
/// has its rows in a buffer of its own, and a barrier that counts their bytes once per item.
#[derive(Clone, Debug)]
pub(crate) struct Streamed {
    tile: TileId,
    param: ParamId,
    index: Vec<Dim>,
    smem: SmemId,
    map: MapId,
    barrier: BarrierId,
    span: u32,
    cols: u32,
}

/// Elements of one panel of a residual with lines of `cols` elements that can be streamed beside a result; `None` when
/// it is loaded from registers. The schedule space counts the buffer with the same words.
pub fn residual_span(cols: u32, residual: DType, result: DType) -> Option<u32> {
    let bits = residual.bits();
    // Strides and addresses are those of the result in elements, at multiples of 16 bytes.
    if bits < 16 || bits < result.bits() {
        return None;
    }
    let bytes = cols * bits / 8;
    [128, 64, 32].into_iter().find(|span| bytes.is_multiple_of(*span)).map(|span| span * 8 / bits)
}

/// Finds the residual of a warp-specialised kernel and makes room for it.
pub(crate) fn stream_residual(
    b: &mut Builder<'_>,
    after: &[tilewright_tile::Stmt],
    tile_cols: u32,
    barriers: &mut IdVec<BarrierId, Barrier>,
) -> Result<Option<Streamed>> {
    // Two consumers with tiles of their own have not run with it on a device.
    let together = b.schedule.mode == Mode::Cooperative;
    if b.schedule.store != StoreKind::Tma
        || b.spread != Spread::Wgmma
        || !together
        || !b.first_column.is_empty()
    {
        return Ok(None);
    }
    let stored = after.iter().find_map(|s| match s {
        tilewright_tile::Stmt::Store { param, .. } => Some(b.kernel.params[*param].dtype),
        _ => None,
    });
    let summed = row_sums::summed(after);
    let loads = after.iter().find_map(|s| match s {
        tilewright_tile::Stmt::Let(id, TileOp::Load { param, index, steps, fill })
            if !summed.contains(id) =>
        {
            let shape = extents(b.kernel, *id).ok()?;
            let long = shape.iter().filter(|e| **e != 1).count() == 2 && index.len() >= 2;
            let zero = matches!(fill, Value::Float(v) if v.to_bits() == 0);
            let plain = steps.iter().all(|s| *s == 1) && zero && shape.last() == Some(&tile_cols);
            (long && plain).then(|| (*id, *param, index.clone()))
        }
        _ => None,
    });
    let (Some(result), Some((tile, param, index))) = (stored, loads) else { return Ok(None) };
    let p = &b.kernel.params[param];
    let cols = index.len() - 1;
    let axis = &p.layout.axes[cols];
    let Some(span) = residual_span(tile_cols, p.dtype, result) else { return Ok(None) };
    if !axis.stride.is(1) || axis.block.is_some() || b.rows > 256 {
        return Ok(None);
    }
    let (name, dtype, rank) = (p.name.to_string(), p.dtype, p.layout.rank());
    let swizzle = swizzle_for(span * dtype.bits() / 8)?;
    let mut box_shape = vec![1; rank];
    (box_shape[cols - 1], box_shape[cols]) = (b.rows, span);
    let map = TensorMap {
        name: name.clone(),
        param,
        box_shape,
        contiguous: cols,
        swizzle,
        tf32: false,
        windows: None,
    };
    let map = b.maps.push(map);
    let smem = b.smem.push(Smem {
        name: format!("s{name}"),
        dtype,
        rows: b.rows * b.schedule.consumers,
        cols: tile_cols,
        contiguous: 1,
        swizzle,
        slots: 1,
    });
    let barrier =
        Barrier { name: format!("full_{name}"), slots: b.schedule.consumers, arrivals: 1 };
    let barrier = barriers.push(barrier);
    Ok(Some(Streamed { tile, param, index, smem, map, barrier, span, cols: tile_cols }))
}

impl Streamed {
    fn at(&self) -> BarrierRef {
        BarrierRef { barrier: self.barrier, slot: Slot::At(Dim::sym(CONSUMER)) }
    }

    fn part(&self, b: &Builder<'_>, col: Dim, cols: u32) -> SmemTile {
        let (smem, row) = (self.smem, b.staging_row0());
        SmemTile { smem, slot: Slot::At(Dim::new(0)), row, col, rows: b.rows, cols }
    }

    /// Starts the copies of an item. What the consumer's threads read of the item before, they have met since.
    pub(crate) fn start(&self, b: &Builder<'_>) -> Stmt {
        let bits = b.kernel.params[self.param].dtype.bits();
        let bytes = b.rows * self.cols * bits / 8;
        let mut steps = vec![Stmt::ExpectBytes { barrier: self.at(), bytes }];
        let (rows, cols) = (self.index.len() - 2, self.index.len() - 1);
        for panel in 0..self.cols / self.span {
            let along = Dim::new(i64::from(panel * self.span));
            let mut at = self.index.clone();
            at[rows] = at[rows].clone() + &b.row0();
            at[cols] = at[cols].clone() + &along;
            steps.push(Stmt::TmaLoad {
                map: self.map,
                at,
                to: self.part(b, along, self.span),
                barrier: self.at(),
                reach: Reach::Own,
                cache: CachePolicy::Normal,
            });
        }
        Stmt::Once(steps)
    }

    /// Waits for them; items alternate between the barrier's parities.
    fn wait(&self, b: &Builder<'_>) -> Stmt {
        let each = match b.schedule.mode {
            Mode::Cooperative => Dim::sym(CLUSTERS),
            Mode::PingPong => Dim::sym(CLUSTERS) * &Dim::new(2),
        };
        let parity = match b.schedule.persistent {
            true => Dim::sym("item").floor_div(&each).modulo(&Dim::new(2)),
            false => Dim::new(0),
        };
        Stmt::Wait { barrier: self.at(), phase: Phase::Parity(parity) }
    }
}

struct Staging {
    smem: SmemId,
    map: MapId,
    ring: RingId,
    box_rows: u32,
}

impl Staging {
    /// The copies of one staging tile to `at`, whose rows run along `axis`.
    fn stores(
        &self,
        b: &Builder<'_>,
        at: &[Dim],
        axis: usize,
        slot: &Slot,
        cols: u32,
    ) -> Vec<Stmt> {
        let parts = 0..b.rows / self.box_rows;
        let part = |part: u32| {
            let offset = Dim::new(i64::from(part * self.box_rows));
            let mut at = at.to_vec();
            at[axis] = at[axis].clone() + &offset;
            Stmt::TmaStore {
                map: self.map,
                at,
                from: SmemTile {
                    smem: self.smem,
                    slot: slot.clone(),
                    row: b.staging_row0() + &offset,
                    col: Dim::new(0),
                    rows: self.box_rows,
                    cols,
                },
                add: false,
            }
        };
        parts.map(part).collect()
    }
}

/// Schedules the stores after the loop. `results` are the loop's tiles in registers.
pub(crate) fn store_results(
    b: &mut Builder<'_>,
    before: &[tilewright_tile::Stmt],
    after: &[tilewright_tile::Stmt],
    results: &[(TileId, FragId)],
) -> Result<Finish> {
    let mut defs = definitions(after);
    defs.extend(definitions(before));
    let mut stores = Vec::new();
    for stmt in after {
        match stmt {
            tilewright_tile::Stmt::Let(..) => {}
            tilewright_tile::Stmt::Store { param, index, value } => {
                stores.push((*param, index.clone(), *value));
            }
            _ => return Err(Error::unsupported("loops, branches or atomics after the products")),
        }
    }
    let tiles: Vec<TileId> = results
        .iter()
        .filter(|(_, f)| b.frags[*f].extent == Extent::Tile)
        .map(|(tile, _)| *tile)
        .collect();
    let Some(first) = tiles.first() else {
        return Err(Error::unsupported("a loop without results"));
    };
    let tile_cols = extents(b.kernel, *first)?[1];
    let mut chunk = tile_cols;
    // Beside many accumulators and a loaded tile, a chunk takes at most 16 registers per thread.
    let held = b.rows * tile_cols / 128 * tiles.len() as u32;
    let full = held > 96 && (loads_tile(b.kernel, after) || tiles.len() > 1);
    // What comes back from shared memory in lines has registers of its own.
    let staged = b.spread == Spread::Wgmma && b.schedule.store == StoreKind::Staged;
    let most = match full {
        true => (16 * 128 / b.rows).max(8),
        false if staged => STAGED_COLUMNS,
        false => 64,
    };
    let (sums, stores): (Vec<_>, Vec<_>) =
        stores.into_iter().partition(|(_, _, value)| row_sums::is_sum(&defs, *value));
    // What has one value per row leaves from registers.
    let (stores, vectors): (Vec<_>, Vec<_>) = stores.into_iter().partition(|(_, _, value)| {
        extents(b.kernel, *value).is_ok_and(|e| e.iter().filter(|n| **n != 1).count() == 2)
    });
    for (param, _, _) in &stores {
        chunk = chunk.min(chunk_columns(b, *param, tile_cols, most));
    }
    let by_tma = b.schedule.store == StoreKind::Tma;
    // What goes through shared memory without the copy engine, and how it comes back.
    let mut lines = Vec::new();
    for (param, _, value) in &stores {
        lines.push(match b.schedule.store {
            StoreKind::Staged => stage_lines(b, &defs, *param, *value, chunk)?,
            StoreKind::Tma | StoreKind::Direct => None,
        });
    }
    let mut staging = Vec::new();
    if by_tma {
        for (param, _, value) in &stores {
            staging.push(stage(b, &defs, *param, *value, chunk)?);
        }
    }
    let chunks = tile_cols / chunk;
    // There is room for the whole tile: it is written at one go, between two meetings.
    let at_once = by_tma && stores.len() == 1 && chunks > 2 && chunks == b.schedule.store_slots;
    let mut whole_tile = Vec::new();
    let column = Dim::sym("chunk") * &Dim::new(i64::from(chunk));
    let mut e = Evaluator::new(b, defs, results.iter().copied().collect(), chunk, column);
    for (param, index, value) in vectors {
        e.store_rows(param, index, value)?;
    }
    let barrier = Dim::sym(CONSUMER) + &Dim::new(STORE_BARRIER);
    let sync = Stmt::NamedSync { id: barrier, threads: 128 };
    for (i, (param, index, value)) in stores.iter().enumerate() {
        let (tile, axes) = e.store_view(*param, *value)?;
        let frag = e.tile(tile)?;
        let mut at = index.clone();
        at[axes.0] = at[axes.0].clone() + &e.b.row0();
        at[axes.1] = at[axes.1].clone() + &e.column;
        if by_tma {
            let s: &Staging = &staging[i];
            let rows = e.b.rows;
            if at_once {
                e.steps.push(Stmt::ToSmem {
                    to: SmemTile {
                        smem: s.smem,
                        slot: Slot::At(Dim::sym("chunk")),
                        row: e.b.staging_row0(),
                        col: Dim::new(0),
                        rows,
                        cols: chunk,
                    },
                    src: frag,
                });
                for at_chunk in 0..chunks {
                    let number = |d: &Dim| {
                        let chunk =
                            |name: &str| (name == "chunk").then(|| Dim::new(i64::from(at_chunk)));
                        d.substitute(&chunk)
                    };
                    let at: Vec<Dim> = at.iter().map(number).collect();
                    let slot = Slot::At(Dim::new(i64::from(at_chunk)));
                    whole_tile.extend(s.stores(e.b, &at, axes.0, &slot, chunk));
                }
                continue;
            }
            let slot = Slot::Ring(s.ring);
            // A slot is free when at most the younger slots' stores have not read theirs.
            let pending = e.b.schedule.store_slots.max(1) - 1;
            e.steps.push(Stmt::Once(vec![Stmt::TmaWait { pending, reads_only: true }]));
            e.steps.push(sync.clone());
            e.steps.push(Stmt::ToSmem {
                to: SmemTile {
                    smem: s.smem,
                    slot: slot.clone(),
                    row: e.b.staging_row0(),
                    col: Dim::new(0),
                    rows,
                    cols: chunk,
                },
                src: frag,
            });
            e.steps.push(Stmt::FenceAsync);
            e.steps.push(sync.clone());
            let mut store = s.stores(e.b, &at, axes.0, &slot, chunk);
            store.push(Stmt::TmaCommit);
            e.steps.push(Stmt::Once(store));
            e.steps.push(Stmt::Advance { ring: s.ring, by: Dim::new(1) });
        } else if let Some((smem, line)) = lines[i] {
            // A consumer has rows, and a meeting, of its own.
            let specialised = e.b.spread == Spread::Wgmma;
            let tile = SmemTile {
                smem,
                slot: Slot::At(Dim::new(0)),
                row: if specialised { e.b.staging_row0() } else { Dim::new(0) },
                col: Dim::new(0),
                rows: e.b.rows,
                cols: chunk,
            };
            let met = if specialised { sync.clone() } else { Stmt::SyncBlock };
            let Spread::Lines { vector, .. } = e.b.frags[line].spread else { unreachable!() };
            // The chunk before was read by everyone.
            e.steps.push(met.clone());
            e.steps.push(Stmt::ToSmem { to: tile.clone(), src: frag });
            e.steps.push(met);
            let (all, rows) = (e.b.rows, e.b.frags[line].rows);
            let down = if rows < all { Dim::sym("part") } else { Dim::new(0) };
            let from = SmemTile { row: tile.row.clone() + &down, rows, ..tile };
            at[axes.0] = at[axes.0].clone() + &down;
            let back = Stmt::FromSmem { dst: whole(line), from };
            let axes = (Some(axes.0), Some(axes.1));
            let out = Stmt::Store { param: *param, at, axes, src: whole(line), vector };
            if rows < all {
                // A loop, so that addresses of all rows are not kept from one tile to the next.
                e.steps.push(Stmt::For {
                    var: "part".into(),
                    lo: Dim::new(0),
                    hi: Dim::new(i64::from(all)),
                    step: Dim::new(i64::from(rows)),
                    body: vec![back, out],
                });
            } else {
                e.steps.extend([back, out]);
            }
        } else {
            let vector = vector_along(e.b, *param, axes.1);
            e.steps.push(Stmt::Store {
                param: *param,
                at,
                axes: (Some(axes.0), Some(axes.1)),
                src: frag,
                vector,
            });
        }
    }
    for (param, index, value) in sums {
        e.store_part_sums(param, index, value)?;
    }
    let (once, steps) = (e.once, e.steps);
    let mut stmts = once;
    stmts.extend(b.streamed.as_ref().map(|s| s.wait(b)));
    if at_once {
        stmts.push(Stmt::Once(vec![Stmt::TmaWait { pending: 0, reads_only: true }]));
        stmts.push(sync.clone());
    }
    stmts.push(Stmt::Unroll { var: "chunk".into(), count: chunks, body: steps });
    if at_once {
        whole_tile.push(Stmt::TmaCommit);
        stmts.extend([Stmt::FenceAsync, sync, Stmt::Once(whole_tile)]);
    }
    let last = if by_tma {
        vec![Stmt::Once(vec![Stmt::TmaWait { pending: 0, reads_only: true }])]
    } else {
        Vec::new()
    };
    Ok(Finish { stmts, last })
}

/// Elements per access along an axis of a tensor: the schedule's when it is the contiguous one.
pub(crate) fn vector_along(b: &Builder<'_>, param: ParamId, axis: usize) -> u32 {
    access_elements(b, param, axis)
}

/// Elements of at most 16 bytes that one plain access along an axis of a tensor may take.
pub(crate) fn access_elements(b: &Builder<'_>, param: ParamId, axis: usize) -> u32 {
    let p = &b.kernel.params[param];
    let most = (128 / p.dtype.bits()).max(1);
    if p.layout.axes[axis].stride.is(1) { b.schedule.vector.clamp(1, most) } else { 1 }
}

/// Columns of one chunk of a consumer's results that leave in lines, at most.
pub const STAGED_COLUMNS: u32 = 64;

/// Columns of one chunk: the widest swizzle span of the output that cuts the tile into equal chunks and
/// gives every warp a share, of at most `most` columns. Wider chunks would keep more values in registers at
/// once.
fn chunk_columns(b: &Builder<'_>, param: ParamId, tile_cols: u32, most: u32) -> u32 {
    let share = match b.spread {
        Spread::Wgmma => 8,
        Spread::MmaSync { warps_n, .. } => 16 * warps_n,
        Spread::Outer { threads_n, block_n, .. } => threads_n * block_n,
        Spread::Lines { lanes, vector, .. } => lanes * vector,
    };
    let size = b.kernel.params[param].dtype.bits().div_ceil(8);
    let spans = [128, 64, 32].into_iter().map(|bytes| (bytes / size).min(64));
    let widest = spans.filter(|columns| *columns <= most);
    let least = (b.spread != Spread::Wgmma).then_some(share);
    widest
        .chain(least)
        .find(|c| tile_cols.is_multiple_of(*c) && c.is_multiple_of(share))
        .or_else(|| {
            (1..=64).rev().find(|c| tile_cols.is_multiple_of(*c) && c.is_multiple_of(share))
        })
        .unwrap_or(tile_cols)
}

/// Whether the steps after the loop load a whole tile: a residual.
fn loads_tile(kernel: &Kernel, after: &[tilewright_tile::Stmt]) -> bool {
    let long = |tile: TileId| {
        extents(kernel, tile).is_ok_and(|shape| shape.iter().filter(|e| **e != 1).count() > 1)
    };
    let summed = row_sums::summed(after);
    let loads = |(id, op): (&TileId, &&TileOp)| {
        matches!(op, TileOp::Load { .. }) && long(*id) && !summed.contains(id)
    };
    definitions(after).iter().any(loads)
}

/// A buffer for one chunk and the spread in which it leaves: vectors along the contiguous axis, lines
/// round the threads. `None` when a tensor is not contiguous along columns, or the chunk does not come
/// out even: registers are stored as they are.
fn stage_lines(
    b: &mut Builder<'_>,
    defs: &Defs<'_>,
    param: ParamId,
    value: TileId,
    chunk: u32,
) -> Result<Option<(SmemId, FragId)>> {
    let axes = store_axes(b, defs, param, value)?.1;
    let p = &b.kernel.params[param];
    let vector = access_elements(b, param, axes.1);
    // Those who share the rows: all threads, or a consumer's.
    let (threads, sharers) = match b.spread {
        Spread::Wgmma => (128, b.schedule.consumers),
        _ => (b.schedule.warps.0 * b.schedule.warps.1 * 32, 1),
    };
    let lanes = chunk / vector;
    // Beside a consumer's sums there are registers for 8 elements and their addresses.
    let most = (8 * threads / chunk).max(1);
    let line_rows = if b.spread == Spread::Wgmma { b.rows.min(most) } else { b.rows };
    let even = lanes.is_power_of_two()
        && lanes <= threads
        && line_rows.is_multiple_of(threads / lanes)
        && b.rows.is_multiple_of(line_rows);
    if !p.layout.axes[axes.1].stride.is(1) || !chunk.is_multiple_of(vector) || !even {
        return Ok(None);
    }
    let (name, dtype) = (p.name.clone(), p.dtype);
    let swizzle = swizzle_for(chunk * dtype.bits() / 8)?;
    let smem = b.smem.push(Smem {
        name: format!("s{name}"),
        dtype,
        rows: b.rows * sharers,
        cols: chunk,
        contiguous: 1,
        swizzle,
        slots: 1,
    });
    let line = b.frags.push(Frag {
        name: format!("line_{name}"),
        dtype,
        rows: line_rows,
        cols: chunk,
        spread: Spread::Lines { lanes, vector, threads },
        extent: Extent::Tile,
    });
    Ok(Some((smem, line)))
}

fn swizzle_for(bytes: u32) -> Result<Swizzle> {
    [Swizzle::B128, Swizzle::B64, Swizzle::B32, Swizzle::None]
        .into_iter()
        .find(|s| bytes == s.span_bytes() || (*s == Swizzle::B128 && bytes.is_multiple_of(128)))
        .ok_or_else(|| Error::unsupported(format!("staging tiles of {bytes} bytes along a line")))
}

fn stage(
    b: &mut Builder<'_>,
    defs: &Defs<'_>,
    param: ParamId,
    value: TileId,
    chunk: u32,
) -> Result<Staging> {
    let axes = store_axes(b, defs, param, value)?.1;
    let p = &b.kernel.params[param];
    let (name, dtype, rank) = (p.name.clone(), p.dtype, p.layout.rank());
    let unit = |axis: usize| p.layout.axes[axis].stride.is(1);
    let contiguous = match (unit(axes.0), unit(axes.1)) {
        (_, true) => 1,
        (true, _) => 0,
        _ => {
            return Err(Error::unsupported(format!(
                "{name} has no contiguous axis to store along"
            )));
        }
    };
    let size = dtype.bits() / 8;
    let (swizzle, box_rows) = if contiguous == 1 {
        (swizzle_for(chunk * size)?, b.rows.min(256))
    } else {
        // The widest span that cuts a consumer's rows into whole boxes: 64 rows of one byte are half of the widest.
        let spans = [128, 64, 32, 16].map(|bytes| bytes / size);
        let Some(box_rows) = spans.into_iter().find(|rows| b.rows.is_multiple_of(*rows)) else {
            return Err(Error::unsupported(format!("boxes of {} rows of {name}", b.rows)));
        };
        (swizzle_for(box_rows * size)?, box_rows)
    };
    let mut box_shape = vec![1; rank];
    box_shape[axes.0] = box_rows;
    box_shape[axes.1] = chunk;
    let rows = b.rows * b.schedule.consumers;
    let map = b.maps.push(TensorMap {
        windows: None,
        name: name.to_string(),
        param,
        box_shape,
        contiguous: if contiguous == 1 { axes.1 } else { axes.0 },
        swizzle,
        tf32: false,
    });
    let smem = b.smem.push(Smem {
        name: format!("s{name}"),
        dtype,
        rows,
        cols: chunk,
        contiguous,
        swizzle,
        slots: b.schedule.store_slots.max(1),
    });
    let ring =
        b.rings.push(Ring { name: format!("out_{name}"), stages: b.schedule.store_slots.max(1) });
    Ok(Staging { smem, map, ring, box_rows })
}

/// The two-axis tile behind a stored value, and which axes of the tensor it runs along.
fn store_axes(
    b: &Builder<'_>,
    defs: &Defs<'_>,
    param: ParamId,
    value: TileId,
) -> Result<(TileId, (usize, usize))> {
    let shape = extents(b.kernel, value)?;
    let name = &b.kernel.params[param].name;
    let fail =
        || Error::unsupported(format!("a store to {name} that is not of a tile of two axes"));
    let kept: Vec<usize> = (0..shape.len()).filter(|i| shape[*i] != 1).collect();
    let tile = match defs.get(&value) {
        Some(TileOp::Reshape(x)) if extents(b.kernel, *x)?.len() == 2 => *x,
        _ => value,
    };
    match (kept.as_slice(), extents(b.kernel, tile)?.len()) {
        ([r, c], 2) => Ok((tile, (*r, *c))),
        _ => Err(fail()),
    }
}

/// Evaluates tiles for the current chunk.
pub(crate) struct Evaluator<'b, 'k> {
    pub(crate) b: &'b mut Builder<'k>,
    pub(crate) defs: Defs<'b>,
    results: BTreeMap<TileId, FragId>,
    pub(crate) chunk: u32,
    column: Dim,
    rows_done: BTreeMap<TileId, FragRef>,
    columns_done: BTreeMap<(TileId, bool), FragRef>,
    /// What depends on rows only.
    pub(crate) once: Vec<Stmt>,
    /// What is computed for the chunk.
    pub(crate) steps: Vec<Stmt>,
}

pub(crate) fn whole(frag: FragId) -> FragRef {
    FragRef { frag, col: Dim::new(0), cols: None }
}

impl<'b, 'k> Evaluator<'b, 'k> {
    /// For columns `column .. column + chunk` of the tiles in `results`.
    pub(crate) fn new(
        b: &'b mut Builder<'k>,
        defs: Defs<'b>,
        results: BTreeMap<TileId, FragId>,
        chunk: u32,
        column: Dim,
    ) -> Evaluator<'b, 'k> {
        Evaluator {
            b,
            defs,
            results,
            chunk,
            column,
            rows_done: BTreeMap::new(),
            columns_done: BTreeMap::new(),
            once: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// Stores a tile of one value per row.
    fn store_rows(&mut self, param: ParamId, index: Vec<Dim>, value: TileId) -> Result<()> {
        let shape = extents(self.b.kernel, value)?;
        let axis = shape.iter().position(|e| *e != 1);
        let src = self.vector(value, axis, Extent::PerRow)?;
        let mut at = index;
        if let Some(axis) = axis {
            at[axis] = at[axis].clone() + &self.b.row0();
        }
        self.once.push(Stmt::Store { param, at, axes: (axis, None), src, vector: 1 });
        Ok(())
    }

    fn store_view(&self, param: ParamId, value: TileId) -> Result<(TileId, (usize, usize))> {
        store_axes(self.b, &self.defs, param, value)
    }

    pub(crate) fn dtype(&self, tile: TileId) -> DType {
        self.b.kernel.ty(tile).dtype
    }

    fn push(&mut self, extent: Extent, stmt: Stmt) {
        if extent == Extent::PerRow { self.once.push(stmt) } else { self.steps.push(stmt) }
    }

    /// A tile of two axes.
    pub(crate) fn tile(&mut self, tile: TileId) -> Result<FragRef> {
        if let Some(frag) = self.results.get(&tile) {
            let first = i64::from(self.b.first_column.get(&tile).copied().unwrap_or(0));
            let col = self.column.clone() + &Dim::new(first);
            return Ok(FragRef { frag: *frag, col, cols: Some(self.chunk) });
        }
        if let Some(done) = self.columns_done.get(&(tile, true)) {
            return Ok(done.clone());
        }
        let op = self.definition(tile)?;
        let frag = whole(self.b.frag("t", self.dtype(tile), self.chunk, Extent::Tile));
        match op {
            TileOp::Map { func, args } => {
                let mut operands = Vec::new();
                for arg in &args {
                    operands.push(self.operand(arg)?);
                }
                self.steps.push(Stmt::Map { dst: frag.clone(), func, args: operands });
            }
            TileOp::Load { param, index, steps, fill } => {
                if steps.iter().any(|s| *s != 1) || index.len() < 2 {
                    return Err(Error::unsupported("a strided load after the products"));
                }
                let (rows, cols) = (index.len() - 2, index.len() - 1);
                if let Some(streamed) = self.b.streamed.as_ref().filter(|s| s.tile == tile) {
                    let from = streamed.part(self.b, self.column.clone(), self.chunk);
                    self.steps.push(Stmt::FromSmem { dst: frag.clone(), from });
                    self.columns_done.insert((tile, true), frag.clone());
                    return Ok(frag);
                }
                let mut at = index;
                at[rows] = at[rows].clone() + &self.b.row0();
                at[cols] = at[cols].clone() + &self.column;
                let vector = vector_along(self.b, param, cols);
                self.steps.push(Stmt::Load {
                    dst: frag.clone(),
                    param,
                    at,
                    axes: (Some(rows), Some(cols)),
                    fill,
                    vector,
                });
            }
            TileOp::Reshape(x) => {
                let inner = self.tile_of_unit_reshape(x)?;
                self.columns_done.insert((tile, true), inner.clone());
                return Ok(inner);
            }
            TileOp::Permute { x, perm } if perm == [1, 0] => {
                // Columns of the tile run along the rows of memory.
                let inner = match self.definition(x)? {
                    TileOp::Reshape(inner) => inner,
                    _ => x,
                };
                let shape = extents(self.b.kernel, inner)?;
                let plain = shape.iter().rev().skip(2).all(|e| *e == 1);
                let TileOp::Load { param, index, steps, fill } = self.definition(inner)? else {
                    return Err(Error::unsupported("a transposition after the products"));
                };
                if !plain || index.len() < 2 || steps.iter().any(|s| *s != 1) {
                    return Err(Error::unsupported("a strided load after the products"));
                }
                let (rows, cols) = (index.len() - 1, index.len() - 2);
                let mut at = index;
                at[rows] = at[rows].clone() + &self.b.row0();
                at[cols] = at[cols].clone() + &self.column;
                self.steps.push(Stmt::Load {
                    dst: frag.clone(),
                    param,
                    at,
                    axes: (Some(rows), Some(cols)),
                    fill,
                    vector: 1,
                });
            }
            TileOp::Full(value) => self.steps.push(Stmt::Fill { dst: frag.clone(), value }),
            TileOp::Iota { axis, start } => {
                let offset = if axis == 0 { self.b.row0() } else { self.column.clone() };
                self.steps.push(Stmt::Iota { dst: frag.clone(), axis, start: start + &offset });
            }
            TileOp::Broadcast(operand) => {
                let func = tilewright_expr::Func::identity(self.dtype(tile));
                let arg = self.operand(&operand)?;
                self.steps.push(Stmt::Map { dst: frag.clone(), func, args: vec![arg] });
            }
            _ => return Err(Error::unsupported("this step after the products")),
        }
        self.columns_done.insert((tile, true), frag.clone());
        Ok(frag)
    }

    /// A tile of more axes whose extra ones have extent 1 is loaded as its last two.
    fn tile_of_unit_reshape(&mut self, x: TileId) -> Result<FragRef> {
        let shape = extents(self.b.kernel, x)?;
        let n = shape.len();
        if n >= 2 && shape[..n - 2].iter().all(|e| *e == 1) {
            self.tile(x)
        } else {
            Err(Error::unsupported("a reshape after the products"))
        }
    }

    /// Where a vector lies that came with a stream's tile.
    fn rider(&self, tile: TileId) -> Option<&SmemTile> {
        self.b.riders.iter().find(|(t, _)| *t == tile).map(|(_, place)| place)
    }

    pub(crate) fn definition(&self, tile: TileId) -> Result<TileOp> {
        match self.defs.get(&tile) {
            Some(op) => Ok((*op).clone()),
            None => Err(Error::unsupported("a tile after the products that an earlier loop made")),
        }
    }

    /// An operand of an elementwise step on a tile of two axes.
    pub(crate) fn operand(&mut self, arg: &tilewright_tile::Operand) -> Result<FragRef> {
        let shape = extents(self.b.kernel, arg.tile)?;
        let along =
            |axis: usize| arg.along.iter().position(|a| *a == axis).filter(|i| shape[*i] != 1);
        match (along(0), along(1)) {
            (Some(_), Some(_)) => self.tile(arg.tile),
            (rows, None) => self.vector(arg.tile, rows, Extent::PerRow),
            (None, cols) => self.vector(arg.tile, cols, Extent::PerCol),
        }
    }

    /// A tile that varies along one axis at most: `axis` is that axis of the tile.
    pub(crate) fn vector(
        &mut self,
        tile: TileId,
        axis: Option<usize>,
        extent: Extent,
    ) -> Result<FragRef> {
        if let Some(frag) = self.results.get(&tile) {
            return match extent {
                Extent::PerRow => Ok(whole(*frag)),
                _ => Err(Error::unsupported("one value per row along columns")),
            };
        }
        let done = match extent {
            Extent::PerRow => self.rows_done.get(&tile),
            _ => self.columns_done.get(&(tile, false)),
        };
        if let Some(done) = done {
            return Ok(done.clone());
        }
        let offset = if extent == Extent::PerRow { self.b.row0() } else { self.column.clone() };
        let name = if extent == Extent::PerRow { "r" } else { "c" };
        let frag = whole(self.b.frag(name, self.dtype(tile), self.chunk, extent));
        match self.definition(tile)? {
            TileOp::Load { .. } if extent == Extent::PerCol && self.rider(tile).is_some() => {
                let place = self.rider(tile).cloned();
                let part = |p: SmemTile| SmemTile { col: offset.clone(), cols: self.chunk, ..p };
                let from = place.map(part).ok_or_else(|| Error::bug("a rider without a place"))?;
                self.push(extent, Stmt::FromSmem { dst: frag.clone(), from });
            }
            TileOp::Load { param, index, steps, fill } => {
                if steps.iter().any(|s| *s != 1) {
                    return Err(Error::unsupported("a strided load after the products"));
                }
                let mut at = index;
                if let Some(axis) = axis {
                    at[axis] = at[axis].clone() + &offset;
                }
                let axes = if extent == Extent::PerRow { (axis, None) } else { (None, axis) };
                let vector = axis.map_or(1, |a| vector_along(self.b, param, a));
                self.push(extent, Stmt::Load { dst: frag.clone(), param, at, axes, fill, vector });
            }
            TileOp::Reduce { kind: ReduceKind::Sum, x, axis: 1, limit: None }
                if extent == Extent::PerRow =>
            {
                self.sum_loaded(&frag, x)?;
            }
            TileOp::Full(value) => self.push(extent, Stmt::Fill { dst: frag.clone(), value }),
            TileOp::Iota { start, .. } => {
                // A single number is the same all along the vector.
                let along_rows = (extent == Extent::PerRow) == axis.is_some();
                let start = if axis.is_some() { start + &offset } else { start };
                let n = usize::from(!along_rows);
                self.push(extent, Stmt::Iota { dst: frag.clone(), axis: n, start });
            }
            TileOp::Map { func, args } => {
                let mut operands = Vec::new();
                for arg in &args {
                    let shape = extents(self.b.kernel, arg.tile)?;
                    let inner = axis
                        .and_then(|axis| arg.along.iter().position(|a| *a == axis))
                        .filter(|i| shape[*i] != 1);
                    operands.push(self.vector(arg.tile, inner, extent)?);
                }
                self.push(extent, Stmt::Map { dst: frag.clone(), func, args: operands });
            }
            TileOp::Reshape(x) => {
                let shape = extents(self.b.kernel, x)?;
                let inner = axis.and_then(|_| (0..shape.len()).find(|i| shape[*i] != 1));
                return self.vector(x, inner, extent);
            }
            _ => return Err(Error::unsupported("this step on a vector after the products")),
        }
        match extent {
            Extent::PerRow => self.rows_done.insert(tile, frag.clone()),
            _ => self.columns_done.insert((tile, false), frag.clone()),
        };
        Ok(frag)
    }
}
