//! [`GpuSchedule::lines_for`]: a schedule for a program without products, from its sizes alone.
//!
//! Memory sets the pace, so what counts is bytes in flight: each thread starts about four accesses of 16
//! bytes before it uses the first, and as many blocks share a multiprocessor as registers allow. A row
//! belongs to as few threads as that permits, since a reduction within a warp needs no barrier.

use crate::axes::{Direction, directions};
use crate::schedule::{GpuSchedule, LinesKnobs};
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_device::Arch;
use tilewright_layout::Dim;
use tilewright_tile::{Block, Kernel, Stmt, TileOp};

/// Accesses that a thread has in flight.
const IN_FLIGHT: i64 = 4;
/// Blocks that shall at least be there, so that every multiprocessor has some.
const BLOCKS: i64 = 264;
/// Elements of one row that a thread keeps.
const KEEP: i64 = 32;

/// The longest row that a tile can hold whole.
pub const WHOLE_ROW: i64 = 1024 * KEEP;

/// What the picker knows of a program.
struct Shape {
    /// Name of the tile size along rows and along columns.
    row: Option<Arc<str>>,
    col: Option<Arc<str>>,
    /// Extents of the tensors along them.
    rows: i64,
    cols: i64,
    /// Elements of 16 bytes of the widest tensor that varies along columns.
    vector: i64,
    /// Elements by which every line of every tensor starts aligned.
    aligned: i64,
    /// Reductions outside loops: the tile must hold the row.
    whole: bool,
    reduces: bool,
}

fn reduces_outside_loops(block: &Block) -> bool {
    block.stmts.iter().any(|s| match s {
        Stmt::Let(_, op) => {
            matches!(op, TileOp::Reduce { .. } | TileOp::ArgReduce { .. } | TileOp::Scan { .. })
        }
        Stmt::If(f) => reduces_outside_loops(&f.then) || reduces_outside_loops(&f.otherwise),
        _ => false,
    })
}

fn accesses<'a>(block: &'a Block, f: &mut dyn FnMut(tilewright_tile::ParamId, tilewright_tile::TileId, &'a [Dim])) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(id, TileOp::Load { param, index, .. }) => f(*param, *id, index),
            Stmt::Store { param, value, index } => f(*param, *value, index),
            Stmt::For(l) => accesses(&l.body, f),
            Stmt::If(i) => {
                accesses(&i.then, f);
                accesses(&i.otherwise, f);
            }
            _ => {}
        }
    }
}

fn shape(kernel: &Kernel, size: &dyn Fn(&str) -> Option<i64>) -> Result<Shape> {
    let directions = directions(kernel)?;
    let value = |d: &Dim| {
        d.eval_with(size).ok_or_else(|| Error::bug(format!("{d} of {} has no value", kernel.name)))
    };
    let mut out = Shape {
        row: None,
        col: None,
        rows: 1,
        cols: 1,
        vector: 16,
        aligned: 16,
        whole: reduces_outside_loops(&kernel.body),
        reduces: directions.reduces,
    };
    let mut failed = None;
    accesses(&kernel.body, &mut |param, tile, _| {
        let p = &kernel.params[param];
        let mut look = || -> Result<()> {
            for (axis, direction) in directions.of(tile).iter().enumerate() {
                let Some(direction) = direction else { continue };
                let a = &p.layout.axes[axis];
                let extent = value(&a.extent)?;
                let name = kernel.ty(tile).shape[axis].as_symbol().cloned();
                if *direction == Direction::Row {
                    out.rows = out.rows.max(extent);
                    out.row = out.row.take().or(name);
                    continue;
                }
                out.cols = out.cols.max(extent);
                out.col = out.col.take().or(name);
                out.vector = out.vector.min(i64::from((128 / p.dtype.bits()).max(1)));
                if a.stride.is(1) {
                    let others = p.layout.axes.iter().enumerate().filter(|(i, _)| *i != axis);
                    let mut lines = vec![extent, value(&p.layout.offset)?];
                    for (_, other) in others {
                        if value(&other.extent)? > 1 {
                            lines.push(value(&other.stride)?);
                        }
                    }
                    for line in lines {
                        while line % out.aligned != 0 {
                            out.aligned /= 2;
                        }
                    }
                }
            }
            Ok(())
        };
        if let Err(error) = look() {
            failed.get_or_insert(error);
        }
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(out),
    }
}

fn power_of_two_from(x: i64) -> i64 {
    (x.max(1) as u64).next_power_of_two() as i64
}

impl GpuSchedule {
    /// A schedule for a program without products; `size` gives the values of its size symbols. Base
    /// addresses are taken to be multiples of 16 bytes. `None` when a row that the tile must hold has
    /// more than [`WHOLE_ROW`] elements.
    ///
    /// # Errors
    /// A size without a value; a program that has no rows and columns.
    pub fn lines_for(
        kernel: &Kernel,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<Option<GpuSchedule>> {
        let s = shape(kernel, size)?;
        let runs = (s.cols + s.vector - 1) / s.vector;
        let (lanes, runs_each, rows_each, threads);
        if s.whole {
            if s.cols > WHOLE_ROW {
                return Ok(None);
            }
            let keep = (KEEP / s.vector).max(1);
            // Within a warp up to twice as much: it saves the barriers.
            lanes = match runs {
                r if r <= 32 => power_of_two_from(r),
                r if r <= 32 * keep => 32,
                r => power_of_two_from((r + keep - 1) / keep),
            };
            runs_each = (runs + lanes - 1) / lanes;
            threads = lanes.max(128);
            rows_each = (IN_FLIGHT / runs_each).max(1);
        } else if s.reduces {
            // In pieces: as many threads a row as keep all multiprocessors busy.
            let wanted = power_of_two_from(BLOCKS * 256 / s.rows.max(1));
            let useful = power_of_two_from(runs / IN_FLIGHT);
            lanes = wanted.clamp(32, 1024).min(useful.max(32));
            runs_each = IN_FLIGHT.min((runs + lanes - 1) / lanes);
            threads = lanes.max(128);
            rows_each = 1;
        } else {
            threads = 256;
            // Lanes that waste little of the last run of blocks along a row.
            let waste = |lanes: i64| (s.cols + lanes * s.vector - 1) / (lanes * s.vector) * lanes * s.vector;
            let most = power_of_two_from(runs).min(256);
            let mut best = most;
            let mut at = most;
            while at > 8 && waste(best) * 8 > s.cols * 9 {
                at /= 2;
                if waste(at) < waste(best) {
                    best = at;
                }
            }
            lanes = best;
            let lines = threads / lanes;
            rows_each = ((s.rows + lines - 1) / lines).clamp(1, IN_FLIGHT);
            runs_each = (IN_FLIGHT / rows_each).min((runs + lanes - 1) / lanes).max(1);
        }
        // Fewer rows a block when there are few blocks.
        let lines = threads / lanes;
        let mut rows_each = rows_each;
        let blocks = |rows_each: i64| {
            let along = if s.reduces { 1 } else { (runs + lanes * runs_each - 1) / (lanes * runs_each) };
            (s.rows + lines * rows_each - 1) / (lines * rows_each) * along
        };
        while rows_each > 1 && blocks(rows_each) < BLOCKS {
            rows_each = (rows_each / 2).max(1);
        }
        let mut schedule = GpuSchedule::hopper(&[]);
        schedule.arch = arch;
        schedule.persistent = false;
        schedule.vector = s.aligned.min(s.vector) as u32;
        schedule.lines =
            LinesKnobs { threads: threads as u32, lanes: lanes as u32, vector: s.vector as u32 };
        // Registers for two blocks of 1024 threads would not hold a row's share.
        schedule.blocks_per_sm = (1024 / threads).clamp(1, 4) as u32;
        for name in &kernel.tiles {
            let extent = if Some(name) == s.row.as_ref() {
                lines * rows_each
            } else if Some(name) == s.col.as_ref() {
                lanes * s.vector * runs_each
            } else {
                1
            };
            schedule.tiles.insert(name.clone(), extent);
        }
        Ok(Some(schedule))
    }
}
