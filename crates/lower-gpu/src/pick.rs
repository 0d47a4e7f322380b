//! [`GpuSchedule::lines_for`]: a schedule for a program without products, from its sizes alone.
//!
//! Memory sets the pace, so what counts is bytes in flight: each thread starts about four accesses of 16
//! bytes before it uses the first, and as many blocks share a multiprocessor as registers allow. A row
//! belongs to as few threads as that permits, since a reduction within a warp needs no barrier.

use crate::axes::{Direction, Directions, directions};
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

/// The longest row that a tile can hold whole, when nothing else takes registers.
const WHOLE_ROW: i64 = 1024 * KEEP;

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
    /// Loads of tiles that vary along columns: of the plane, and of columns alone.
    planes: i64,
    vectors: i64,
    /// The most reductions in one loop: each keeps its own sums in registers.
    folds: i64,
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

/// The most reductions that one loop's body has.
fn reductions_in_loops(block: &Block) -> i64 {
    let inside = |s: &Stmt| match s {
        Stmt::For(f) => {
            let here =
                f.body.stmts.iter().filter(|s| matches!(s, Stmt::Let(_, TileOp::Reduce { .. })));
            (here.count() as i64).max(reductions_in_loops(&f.body))
        }
        Stmt::If(f) => reductions_in_loops(&f.then).max(reductions_in_loops(&f.otherwise)),
        _ => 0,
    };
    block.stmts.iter().map(inside).max().unwrap_or(0)
}

/// The most loads of tiles that one block of steps starts, over the plane and over columns alone.
fn loads(directions: &Directions, block: &Block) -> (i64, i64) {
    let (mut planes, mut vectors) = (0, 0);
    let mut inner = (0, 0);
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(id, TileOp::Load { .. }) => {
                let row = directions.axis(*id, Direction::Row).is_some();
                match (row, directions.axis(*id, Direction::Col).is_some()) {
                    (true, true) => planes += 1,
                    (_, true) => vectors += 1,
                    _ => {}
                }
            }
            Stmt::For(f) => inner = inner.max(loads(directions, &f.body)),
            Stmt::If(f) => {
                inner = inner.max(loads(directions, &f.then));
                inner = inner.max(loads(directions, &f.otherwise));
            }
            _ => {}
        }
    }
    (planes, vectors).max(inner)
}

fn accesses<'a>(
    block: &'a Block,
    f: &mut dyn FnMut(tilewright_tile::ParamId, tilewright_tile::TileId, &'a [Dim]),
) {
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

fn shape(kernel: &Kernel, size: &dyn Fn(&str) -> Option<i64>, aligned: i64) -> Result<Shape> {
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
        aligned,
        whole: reduces_outside_loops(&kernel.body),
        reduces: directions.reduces,
        planes: 1,
        vectors: 0,
        folds: reductions_in_loops(&kernel.body),
    };
    (out.planes, out.vectors) = loads(&directions, &kernel.body);
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
    /// As [`GpuSchedule::lines_for_addresses`], for tensors that start at multiples of 16 bytes.
    ///
    /// # Errors
    /// A size without a value; a program that has no rows and columns.
    pub fn lines_for(
        kernel: &Kernel,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<Option<GpuSchedule>> {
        GpuSchedule::lines_for_addresses(kernel, arch, size, 16)
    }

    /// A schedule for a program without products; `size` gives the values of its size symbols. Every tensor
    /// starts at a multiple of `aligned` of its elements (a power of two), or of 16 bytes. `None` when a row
    /// that the tile must hold has more elements than the registers of a block hold.
    ///
    /// # Errors
    /// A size without a value; a program that has no rows and columns.
    pub fn lines_for_addresses(
        kernel: &Kernel,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
        aligned: i64,
    ) -> Result<Option<GpuSchedule>> {
        let s = shape(kernel, size, aligned)?;
        let runs = (s.cols + s.vector - 1) / s.vector;
        // With a single row, what varies along columns alone is as large as the rest.
        let (planes, vectors) =
            if s.rows == 1 { (s.planes + s.vectors, 0) } else { (s.planes, s.vectors) };
        let in_flight = (IN_FLIGHT / planes.max(1)).max(1);
        let (mut lanes, mut runs_each, rows_each, threads);
        if s.whole {
            if s.cols > WHOLE_ROW {
                return Ok(None);
            }
            let keep = (KEEP / s.vector).max(1);
            lanes = match runs {
                r if r <= 32 => power_of_two_from(r),
                r if r <= 32 * keep => 32,
                r => power_of_two_from((r + keep - 1) / keep),
            };
            runs_each = (runs + lanes - 1) / lanes;
            threads = lanes.max(128);
            rows_each = (in_flight / runs_each).max(1);
        } else if s.reduces {
            // In pieces: as many threads a row as keep all multiprocessors busy.
            let wanted = power_of_two_from(BLOCKS * 256 / s.rows.max(1));
            let useful = power_of_two_from(runs / IN_FLIGHT);
            lanes = wanted.clamp(32, 512).min(useful.max(32));
            runs_each = in_flight.min((runs + lanes - 1) / lanes);
            threads = lanes.max(128);
            rows_each = 1;
        } else {
            threads = 256;
            // Lanes that waste little of the last run of blocks along a row.
            let covered = |lanes: i64| {
                let step = lanes * s.vector;
                (s.cols + step - 1) / step * step
            };
            let most = power_of_two_from(runs).min(256);
            let mut best = most;
            let mut at = most;
            while at > 8 && covered(best) * 8 > s.cols * 9 {
                at /= 2;
                if covered(at) < covered(best) {
                    best = at;
                }
            }
            lanes = best;
            let lines = threads / lanes;
            rows_each = power_of_two_from((s.rows + lines - 1) / lines).clamp(1, in_flight);
            runs_each = (in_flight / rows_each).min((runs + lanes - 1) / lanes).max(1);
        }
        // Without an axis of rows a tile is one row, and all threads share it.
        if s.row.is_none() && lanes != threads {
            lanes = threads;
            runs_each = (runs_each.min((runs + lanes - 1) / lanes)).max(1);
        }
        // Fewer rows a block when there are few blocks.
        let lines = threads / lanes;
        let mut rows_each = rows_each;
        let blocks = |rows_each: i64| {
            let along =
                if s.reduces { 1 } else { (runs + lanes * runs_each - 1) / (lanes * runs_each) };
            (s.rows + lines * rows_each - 1) / (lines * rows_each) * along
        };
        while rows_each > 1 && blocks(rows_each) < BLOCKS {
            rows_each = (rows_each / 2).max(1);
        }
        let mut schedule = GpuSchedule::hopper(&[]);
        schedule.arch = arch;
        schedule.persistent = false;
        schedule.vector = s.aligned.min(s.vector) as u32;
        // Lines that start anywhere are read element by element, neighbours by neighbouring threads.
        schedule.lines =
            LinesKnobs { threads: threads as u32, lanes: lanes as u32, vector: schedule.vector };
        // Blocks that a multiprocessor holds follow from registers: each plane that is alive, sums that
        // loops keep, vectors that come late, and addresses of single elements.
        let registers = |runs_each: i64| {
            let each = rows_each * runs_each * s.vector;
            let planes = if s.whole { planes.min(2) } else { planes };
            let single = each * planes + runs_each * s.vector * vectors;
            let addresses = if s.aligned < s.vector { 48 + single } else { 0 };
            32 + each * (planes + s.folds) + vectors * 8 + addresses
        };
        let file = 65536 / threads;
        while !s.whole && runs_each > 1 && registers(runs_each) > file.min(160) {
            runs_each = (runs_each + 1) / 2;
        }
        if s.whole && registers(runs_each) > file.min(255) {
            return Ok(None);
        }
        let blocks = (file / registers(runs_each)).clamp(1, (1024 / threads).clamp(1, 4));
        schedule.blocks_per_sm = blocks as u32;
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
