//! [`GpuSchedule::lines_for`]: a schedule for a program without products, from its sizes alone.
//!
//! Memory sets the pace, so what counts is bytes in flight: each thread starts about four accesses of 16
//! bytes before it uses the first, and as many blocks share a multiprocessor as registers allow. A row
//! belongs to as few threads as that permits, since a reduction within a warp needs no barrier. What is longer
//! than the registers of a block, or too few for the device, is shared out over a cluster.

use crate::axes::{Direction, Directions, directions};
use crate::schedule::{GpuSchedule, LinesKnobs};
use crate::steps::{has_order, operations, reductions, reductions_in_loops};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Arch, Streams};
use tilewright_layout::Dim;
use tilewright_tile::{Access, Block, Kernel, Stmt, TileOp, TopK};

/// Accesses that a thread has in flight.
const IN_FLIGHT: i64 = 4;
/// Blocks that shall at least be there, so that every multiprocessor has some.
const BLOCKS: i64 = 264;
/// Elements of one row that a thread keeps.
const KEEP: i64 = 32;
/// The same of rows that fit their tile better so.
const TIGHT_EACH: i64 = 40;
/// Elements of 16 bytes from which they are narrow.
const NARROW: i64 = 8;
/// Bytes under way on a multiprocessor that memory needs to be busy.
const ENOUGH_BYTES: i64 = 64 << 10;
/// The same where blocks have 256 threads and each register two elements.
const FEW_BYTES: i64 = 48 << 10;
/// Operations of a map that 32 registers have room for.
const FEW_STEPS: i64 = 40;

/// The longest row that a block can hold whole, when nothing else takes registers.
const WHOLE_ROW: i64 = 1024 * KEEP;
/// Blocks of a cluster at most.
const CLUSTER_MOST: i64 = 8;
/// Elements of a row below which it is not shared out for want of other rows.
const SHARE: i64 = 8192;
/// Threads of a block that has a long row alone, and of each block of a cluster that shares a longer one.
const LANES_ALONE: i64 = 256;
const LANES_SHARED: i64 = 128;
/// Elements of a row from which its pieces are kept in shared memory, and bytes that a block keeps if it can choose: six
/// blocks then share a multiprocessor.
const KEPT_FROM: i64 = 16384;
const KEPT_BYTES: i64 = 36 << 10;
/// Shorter rows are kept where there are so many of them, if fewer bytes of whole rows would be under way: of those above
/// and up to 4096 columns.
const SHORT_FROM: i64 = 2048;
const SHORT_ROWS: i64 = 8 * PROCESSORS;
const WHOLE_BYTES: [i64; 2] = [44 << 10, 32 << 10];
/// Blocks with 36 KiB, and operations of maps that their 40 registers have room for.
const KEPT_BLOCKS: i64 = 6;
const KEPT_STEPS: i64 = 48;
/// Operations of maps from which a warp has no more than two runs of a row.
const HEAVY_STEPS: i64 = 48;
/// Bytes that a block keeps at most, and elements of a piece that a thread has.
const KEPT_MOST: i64 = 200 << 10;
const KEPT_EACH: i64 = 16;
/// Loads of the plane from which a program is one of windows: its accesses are found in the first-level cache, and what
/// varies along columns alone (weights) serves several rows.
const MANY_PLANES: i64 = 3;
/// Bytes of rows from which they are read with lines of the second-level cache that go last: twice what it has.
const LAST_BYTES: i64 = 100 << 20;
/// Multiprocessors of the device that schedules are made for.
const PROCESSORS: i64 = 132;
/// Threads of a block of a map that has work for the whole device, and elements that a thread of any other has at once.
const MAP_THREADS: i64 = 256;
const LEAST_VECTOR: i64 = 2;

/// What the picker knows of a program.
struct Shape {
    /// Name of the tile size along rows and along columns.
    row: Option<Arc<str>>,
    col: Option<Arc<str>>,
    /// Sizes that are the extent of a tensor along columns.
    col_sizes: BTreeMap<Arc<str>, i64>,
    /// Extents of the tensors along them.
    rows: i64,
    cols: i64,
    /// Elements of 16 bytes of the widest tensor that varies along columns.
    vector: i64,
    /// Elements by which every line of every tensor starts aligned.
    aligned: i64,
    /// A plane is stored.
    stores: bool,
    /// Reductions outside loops: the tile must hold the row.
    whole: bool,
    /// Along what reductions go.
    reduces: Option<Direction>,
    /// Something is scanned, or the position of an extreme sought.
    ordered: bool,
    /// The largest tensors are contiguous along rows: they are read along rows and turned.
    turns: bool,
    /// Loads of tiles that vary along columns: of the plane, and of columns alone.
    planes: i64,
    vectors: i64,
    /// The most reductions in one loop: each keeps its own sums in registers.
    folds: i64,
    /// Operations of all maps.
    steps: i64,
    /// Planes are bf16 and rows are reduced once: they lie in registers as they do in memory (`unpack_again` in `lines.rs`).
    packed: bool,
}

fn reduces_outside_loops(directions: &Directions, block: &Block) -> bool {
    block.stmts.iter().any(|s| match s {
        Stmt::Let(
            _,
            TileOp::Reduce { x, axis, .. }
            | TileOp::ArgReduce { x, axis, .. }
            | TileOp::Scan { x, axis, .. },
        ) => directions.of(*x)[*axis].is_some(),
        Stmt::If(f) => {
            reduces_outside_loops(directions, &f.then)
                || reduces_outside_loops(directions, &f.otherwise)
        }
        // A loop that does not move along what is reduced reduces whole lines in every turn.
        Stmt::For(f) => !moves_along(directions, f) && reduces_outside_loops(directions, &f.body),
        _ => false,
    })
}

/// Whether a loop loads different pieces of the lines that are reduced.
fn moves_along(directions: &Directions, f: &tilewright_tile::For) -> bool {
    let mut found = false;
    accesses(&f.body, &mut |_, tile, index| {
        for (axis, at) in index.iter().enumerate() {
            let along = directions.of(tile).get(axis).copied().flatten();
            let here = along.is_some() && along == directions.reduces;
            at.for_each_symbol(&mut |s| found |= here && *s == f.var);
        }
    });
    found
}

/// The most loads of tiles that one block of steps starts, over the plane and over columns alone.
fn loads(directions: &Directions, block: &Block) -> (i64, i64) {
    let (mut planes, mut vectors) = (0, 0);
    let mut inner = (0, 0);
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(id, TileOp::Load { .. } | TileOp::Gather { .. }) => {
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
            Stmt::Let(
                id,
                TileOp::Load { param, index, .. } | TileOp::Gather { param, index, .. },
            ) => {
                f(*param, *id, index);
            }
            Stmt::Store { param, value, index } | Stmt::AtomicAdd { param, value, index } => {
                f(*param, *value, index);
            }
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
        col_sizes: BTreeMap::new(),
        rows: 1,
        cols: 1,
        vector: 16,
        aligned,
        stores: false,
        whole: reduces_outside_loops(&directions, &kernel.body),
        reduces: directions.reduces,
        turns: false,
        ordered: has_order(&kernel.body),
        planes: 1,
        vectors: 0,
        folds: reductions_in_loops(&kernel.body),
        steps: operations(&kernel.body),
        packed: reductions(&kernel.body) == 1,
    };
    (out.planes, out.vectors) = loads(&directions, &kernel.body);
    let mut failed = None;
    accesses(&kernel.body, &mut |param, tile, _| {
        let p = &kernel.params[param];
        let mut look = || -> Result<()> {
            let (row, col) =
                (directions.axis(tile, Direction::Row), directions.axis(tile, Direction::Col));
            let near = |axis: Option<usize>| axis.is_some_and(|a| p.layout.axes[a].stride.is(1));
            out.turns |= near(row) && col.is_some() && !near(col);
            out.stores |= row.is_some() && col.is_some() && p.access != Access::In;
            for (axis, direction) in directions.of(tile).iter().enumerate() {
                let Some(direction) = direction else { continue };
                let a = &p.layout.axes[axis];
                let extent = value(&a.extent)?;
                let name = kernel.ty(tile).shape[axis].as_symbol().cloned();
                if *direction == Direction::Row {
                    out.rows = out.rows.max(extent);
                    out.row = out.row.take().or(name);
                } else {
                    out.cols = out.cols.max(extent);
                    out.col = out.col.take().or(name);
                    if let Some(size) = a.extent.as_symbol() {
                        out.col_sizes.insert(size.clone(), extent);
                    }
                    // What is stored once per column does not matter when columns are reduced, nor where each thread
                    // reads a plane many times.
                    let many = out.reduces.is_none() && out.planes >= MANY_PLANES;
                    out.packed &= row.is_none() || p.dtype == DType::BF16;
                    if row.is_some() || out.reduces != Some(Direction::Row) && !many {
                        out.vector = out.vector.min(i64::from((128 / p.dtype.bits()).max(1)));
                    }
                }
                // What varies along rows alone is read one by one.
                if a.stride.is(1) && col.is_some() {
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
    limits(&kernel.body, &mut |x, axis, limit| {
        let Some(direction) = directions.of(x)[axis] else { return };
        let name = kernel.ty(x).shape[axis].as_symbol().cloned();
        let extent = limit.eval_with(size).unwrap_or(1);
        let (extents, names) = match direction {
            Direction::Row => (&mut out.rows, &mut out.row),
            Direction::Col => (&mut out.cols, &mut out.col),
        };
        *extents = (*extents).max(extent);
        *names = names.take().or(name);
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(out),
    }
}

/// What reductions outside loops count: a row that only repeats a value has no tensor to tell its length.
fn limits<'a>(block: &'a Block, f: &mut dyn FnMut(tilewright_tile::TileId, usize, &'a Dim)) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(
                _,
                TileOp::Reduce { x, axis, limit: Some(limit), .. }
                | TileOp::ArgReduce { x, axis, limit: Some(limit), .. },
            ) => f(*x, *axis, limit),
            Stmt::If(i) => {
                limits(&i.then, f);
                limits(&i.otherwise, f);
            }
            _ => {}
        }
    }
}

fn power_of_two_from(x: i64) -> i64 {
    (x.max(1) as u64).next_power_of_two() as i64
}

fn power_of_two_to(x: i64) -> i64 {
    power_of_two_from(x / 2 + 1)
}

fn up(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

impl Shape {
    /// A map that turns lines which begin anywhere.
    fn turns_anywhere(&self) -> bool {
        let plain = self.reduces.is_none() && !self.whole && !self.ordered;
        self.turns && plain && self.aligned < self.vector
    }
}

/// How threads share a tile, before tile sizes have their names.
#[derive(Clone, Copy)]
struct Choice {
    threads: i64,
    lanes: i64,
    /// Rows, and runs of columns, of a thread.
    rows_each: i64,
    runs_each: i64,
    cluster: i64,
}

impl Choice {
    fn lines(&self) -> i64 {
        self.threads / self.lanes
    }

    /// Elements of a row that a thread has. Of whole rows that are read in smaller accesses it has as few as there are.
    fn of_row(&self, s: &Shape) -> i64 {
        let most = self.runs_each * s.vector;
        if s.turns_anywhere() {
            return (most / 2).max(1);
        }
        if !s.whole || s.reduces != Some(Direction::Col) || s.aligned >= s.vector {
            return most;
        }
        let share = up(s.cols, self.cluster);
        (up(share, self.lanes * s.aligned) * s.aligned).min(most)
    }

    /// Tile sizes along rows and columns, of the whole cluster.
    fn tile(&self, s: &Shape) -> (i64, i64) {
        let (rows, cols) = (self.lines() * self.rows_each, self.lanes * self.of_row(s));
        match s.reduces {
            Some(Direction::Row) => (rows * self.cluster, cols),
            Some(Direction::Col) => (rows, cols * self.cluster),
            None => (rows, cols),
        }
    }
}

/// What the picker asks besides the shape.
struct Picker<'a> {
    kernel: &'a Kernel,
    arch: Arch,
    size: &'a dyn Fn(&str) -> Option<i64>,
    s: Shape,
    /// Runs of columns of a line.
    runs: i64,
    /// Accesses in flight of one tensor.
    in_flight: i64,
    /// Threads of a block of a map.
    map_threads: i64,
}

impl Picker<'_> {
    /// Blocks of the grid.
    fn blocks(&self, choice: Choice) -> i64 {
        let (rows, cols) = choice.tile(&self.s);
        let value = |name: &str| {
            let is = |n: &Option<Arc<str>>| n.as_deref() == Some(name);
            match self.kernel.tiles.iter().any(|t| &**t == name) {
                true if is(&self.s.row) => Some(rows),
                true if is(&self.s.col) => Some(cols),
                true => Some(1),
                false => (self.size)(name),
            }
        };
        let extents = self.kernel.grid.iter().map(|g| g.extent.eval_with(&value).unwrap_or(1));
        extents.product::<i64>() * choice.cluster
    }

    /// Whether the device has clusters, and the program's reductions a form across them.
    fn clusters_work(&self) -> bool {
        self.arch >= Arch::Sm90a && !self.s.ordered
    }

    /// Fewer rows a block when there are few blocks.
    fn spread_rows(&self, mut choice: Choice) -> Choice {
        while choice.rows_each > 1 && self.blocks(choice) < BLOCKS {
            choice.rows_each = (choice.rows_each / 2).max(1);
        }
        choice
    }

    /// Rows that a tile holds whole; none when they are too long.
    fn whole_rows(&self, cluster: i64) -> Option<Choice> {
        let s = &self.s;
        if s.cols > WHOLE_ROW * cluster {
            return None;
        }
        let runs = up(self.runs, cluster);
        // Elements that are read one by one take an address each.
        let single = s.aligned == 1 && s.vector > 1;
        let keep = (if single { KEEP / 2 } else { KEEP } / s.vector).max(1);
        let lanes = match runs {
            r if r <= 32 && cluster == 1 => power_of_two_from(r),
            r if r <= 32 * keep => 32,
            r => power_of_two_from(up(r, keep)),
        };
        // Blocks of few threads stand still less: half of a multiprocessor's rows load while others meet.
        let most = if cluster == 1 { LANES_ALONE } else { LANES_SHARED };
        if lanes > most && cluster < CLUSTER_MOST && self.clusters_work() {
            return None;
        }
        let runs_each = up(runs, lanes);
        let alone = cluster > 1 || single;
        let rows_each = if alone { 1 } else { (self.in_flight / runs_each).max(1) };
        // Rows of a warp, or of a few of its threads, each wait for no other.
        let least = match (single, lanes) {
            (true, ..=32) if s.vector >= NARROW => 128,
            (true, _) if s.vector >= NARROW => 64,
            (true, _) => 256,
            (false, ..=32) => 64,
            (false, _) => 128,
        };
        let threads = if cluster > 1 { lanes } else { lanes.max(least) };
        let choice = self.spread_rows(Choice { threads, lanes, rows_each, runs_each, cluster });
        // A warp that does much with many elements has no registers left for others beside it.
        let heavy = s.steps > HEAVY_STEPS && runs_each > 2;
        // Two warps with half as much each, where nothing is lost, read the next rows sooner.
        let halves = lanes == 32 && runs_each > 2 && runs_each % 2 == 0;
        if lanes <= 32 && !heavy && !halves || alone {
            return Some(choice);
        }
        // Twice the threads with half as much each, where that takes no bytes from their way: more warps work while
        // others of their row are waited for.
        let (lanes, runs_each) = (lanes * 2, up(runs, lanes * 2));
        let threads = lanes.max(64);
        let wide = self.spread_rows(Choice { threads, lanes, rows_each: 1, runs_each, cluster });
        let few =
            if self.is_packed(wide) && lanes <= LANES_ALONE { FEW_BYTES } else { ENOUGH_BYTES };
        let better = halves || self.under_way(wide) >= self.under_way(choice).min(few);
        let found = if better { wide } else { choice };
        Some(self.tight(found).unwrap_or(found))
    }

    /// Rows of whole units in tiles that are hardly longer than they are, where those of a choice are longer by more than an
    /// eighth and there is more than one vector along the columns: each of them has its accesses and registers for what
    /// lies behind the row, too. With fewer, more threads with less each are as fast.
    fn tight(&self, than: Choice) -> Option<Choice> {
        let s = &self.s;
        let loose = than.lanes * than.runs_each * 8 > self.runs * 9;
        let costly = s.vectors > 1 && s.vector >= NARROW;
        if !(loose && costly) || s.aligned < s.vector || than.cluster > 1 {
            return None;
        }
        let most = TIGHT_EACH / s.vector;
        let forms = (5..=8).map(|n| 1i64 << n).map(|lanes| (up(self.runs, lanes), lanes));
        let (runs_each, lanes) = forms
            .filter(|(each, lanes)| *each <= most && each * lanes < than.runs_each * than.lanes)
            .min_by_key(|(each, lanes)| (each * lanes, *each))?;
        Some(Choice { threads: lanes.max(64), lanes, rows_each: 1, runs_each, cluster: 1 })
    }

    /// Bytes of whole rows that the blocks of a multiprocessor have under way, up to what memory needs.
    fn under_way(&self, choice: Choice) -> i64 {
        let s = &self.s;
        let each = choice.rows_each * choice.runs_each * s.vector;
        let registers = match self.is_lean(choice) {
            true => self.lean_registers(choice),
            false => self.registers(choice, true),
        };
        let blocks = 65536 / choice.threads / ((registers + 7) / 8 * 8);
        (blocks * choice.threads * each * s.planes.max(1) * 16 / s.vector).min(ENOUGH_BYTES)
    }

    /// Whole rows of which threads of several warps have little each.
    fn is_lean(&self, choice: Choice) -> bool {
        let s = &self.s;
        let plain = s.whole && s.reduces == Some(Direction::Col) && s.aligned >= s.vector;
        let few = choice.rows_each * choice.runs_each * s.vector <= KEEP / 2;
        plain && few && choice.lanes > 32 && choice.cluster == 1 && !s.ordered
            || self.is_packed(choice)
    }

    /// Whole rows that fill their tile, of which each register has two elements while warps meet.
    fn is_packed(&self, choice: Choice) -> bool {
        let s = &self.s;
        let plain = s.packed && s.whole && s.reduces == Some(Direction::Col) && !s.ordered;
        let full = choice.lanes * choice.runs_each * s.vector == s.cols;
        plain && full && s.aligned >= s.vector && choice.lanes > 32 && choice.cluster == 1
    }

    /// Registers of such threads, as compiled: there is little beside what they have.
    fn lean_registers(&self, choice: Choice) -> i64 {
        let s = &self.s;
        let each = choice.rows_each * choice.runs_each * s.vector;
        if self.is_packed(choice) {
            return 24 + each * (s.planes.clamp(1, 2) + s.vectors) / 2;
        }
        20 + each * s.planes.clamp(1, 2) + 2 * s.vectors * choice.runs_each
    }

    /// Rows in pieces: as many threads a row as keep all multiprocessors busy.
    fn rows_in_pieces(&self) -> Choice {
        let wanted = power_of_two_from(BLOCKS * 256 / self.s.rows.max(1));
        let useful = power_of_two_from(self.runs / IN_FLIGHT);
        let lanes = wanted.clamp(32, 512).min(useful.max(32));
        let runs_each = self.in_flight.min(up(self.runs, lanes));
        Choice { threads: lanes.max(128), lanes, rows_each: 1, runs_each, cluster: 1 }
    }

    /// Columns that a tile holds whole; none when they are too long.
    fn whole_columns(&self, cluster: i64) -> Option<Choice> {
        let rows = up(self.s.rows, cluster);
        let most = power_of_two_from(self.runs).min(32);
        let mut best = None;
        for threads in [256, 512, 1024] {
            let mut lanes = most;
            while lanes >= 1 {
                let rows_each = up(rows, threads / lanes);
                if rows_each * self.s.vector <= 2 * KEEP {
                    let choice = Choice { threads, lanes, rows_each, runs_each: 1, cluster };
                    let full = self.blocks(choice) >= PROCESSORS || lanes <= 4;
                    best = Some(choice);
                    if full {
                        return best;
                    }
                }
                lanes /= 2;
            }
            if best.is_some() {
                return best;
            }
        }
        best
    }

    /// Columns in pieces: strips of 512 bytes where there are enough of them, else of 128 bytes in tall tiles.
    fn columns_in_pieces(&self) -> Choice {
        let threads = 256;
        let strips = |lanes: i64| {
            let lanes = power_of_two_from(self.runs).min(lanes);
            let most = up(self.s.rows, threads / lanes);
            let rows_each = power_of_two_to(most.min(2 * self.in_flight));
            Choice { threads, lanes, rows_each, runs_each: 1, cluster: 1 }
        };
        let wide = strips(32);
        if self.blocks(wide) >= BLOCKS { wide } else { strips(8) }
    }

    /// Nothing is reduced, and every thread reads the plane and columns many times: a convolution of each channel.
    fn is_windows(&self) -> bool {
        let s = &self.s;
        let many = s.planes >= MANY_PLANES && s.vectors >= s.planes;
        s.reduces.is_none() && many && !s.turns && s.aligned >= s.vector
    }

    /// A map of whole units that takes few registers.
    fn is_light(&self) -> bool {
        let s = &self.s;
        let plain = s.reduces.is_none() && !s.ordered && !s.turns && s.aligned >= s.vector;
        plain && s.steps <= FEW_STEPS && !self.is_windows()
    }

    /// Threads that waste little of either direction: rows of an image are short, and channels few.
    fn windows(&self) -> Choice {
        let s = &self.s;
        let (mut best, mut least) = (None, f64::INFINITY);
        for threads in [256, 128] {
            for rows_each in [2, 1] {
                let mut lanes = power_of_two_from(self.runs).min(threads);
                while lanes >= 1 {
                    let choice = Choice { threads, lanes, rows_each, runs_each: 1, cluster: 1 };
                    let (rows, cols) = choice.tile(s);
                    let covered = (up(s.rows, rows) * rows * up(s.cols, cols) * cols) as f64;
                    // Weights serve the rows of a thread together; sectors of memory have 32 bytes.
                    let weights = if rows_each == 1 { 1.25 } else { 1.0 };
                    let narrow = match lanes {
                        1 => 1.4,
                        2 | 3 => 1.1,
                        _ => 1.0,
                    };
                    let few = if self.blocks(choice) < BLOCKS { 1.5 } else { 1.0 };
                    let small = if threads < 256 { 1.02 } else { 1.0 };
                    let cost = covered * weights * narrow * few * small;
                    if cost < least {
                        (best, least) = (Some(choice), cost);
                    }
                    lanes /= 2;
                }
            }
        }
        best.unwrap_or_else(|| self.map())
    }

    /// Nothing is reduced.
    fn map(&self) -> Choice {
        let (s, threads) = (&self.s, self.map_threads);
        if s.turns {
            // Lines of 128 bytes both ways; where they begin anywhere, longer ones to write, a warp each.
            let anywhere = s.turns_anywhere();
            let lanes = power_of_two_from(self.runs).min(if anywhere { 32 } else { 8 });
            let most = if anywhere { 8 } else { 4 };
            let rows_each = power_of_two_from(up(s.rows, threads / lanes)).clamp(1, most);
            return Choice { threads, lanes, rows_each, runs_each: 1, cluster: 1 };
        }
        // Lanes that waste little of the last run of blocks along a row.
        let covered = |lanes: i64| up(s.cols, lanes * s.vector) * lanes * s.vector;
        let most = power_of_two_from(self.runs).min(threads);
        let (mut best, mut at) = (most, most);
        while at > 8 && covered(best) * 8 > s.cols * 9 {
            at /= 2;
            if covered(at) < covered(best) {
                best = at;
            }
        }
        let lanes = best;
        // Where many blocks share a multiprocessor, two accesses a thread are enough, and one of whole planes alone is better: blocks
        // with 4 KiB of each come and go evenly.
        let in_flight = match (self.is_light(), s.vectors) {
            (true, 0) => 1,
            (true, _) => (self.in_flight / 2).max(1),
            (false, _) => self.in_flight,
        };
        let rows_each = power_of_two_from(up(s.rows, threads / lanes)).clamp(1, in_flight);
        let runs_each = (in_flight / rows_each).min(up(self.runs, lanes)).max(1);
        self.spread_rows(Choice { threads, lanes, rows_each, runs_each, cluster: 1 })
    }

    /// Registers of a thread, roughly: each plane that is alive, sums that loops keep, vectors that come early,
    /// and addresses of single elements.
    fn registers(&self, choice: Choice, early: bool) -> i64 {
        let s = &self.s;
        let of_row = choice.of_row(s);
        let each = choice.rows_each * of_row;
        if self.is_windows() {
            // Sums, and what is loaded for one of the taps: the compiler orders the loads.
            return 40 + each * 3;
        }
        if self.is_light() {
            return 12 + (each + 2) * s.planes.max(1);
        }
        let planes = if s.whole { s.planes.clamp(1, 2) } else { s.planes.max(1) };
        let single = each * planes + of_row * s.vectors;
        // Of few elements, addresses are worked out as they are needed.
        let few = s.aligned == 1 && s.whole && each <= KEEP / 2;
        let addresses = match s.aligned < s.vector {
            // As compiled: LayerNorm fits where RMSNorm spills.
            true if few && s.vectors > 1 => 8,
            true if few => 24,
            // One address serves what a unit has of a turned tile.
            true if s.turns_anywhere() => 0,
            true => 48 + single,
            false => 0,
        };
        // Wide elements that come late take more.
        let vectors =
            s.vectors * if early { choice.runs_each * 2 + 2 } else { 64 / s.vector.clamp(4, 8) };
        // Vectors of several rows are addressed apart.
        let rows = if choice.lines() > 1 && s.vectors > 0 && early && !few { 24 } else { 0 };
        // As compiled, beside whole rows of the other lines.
        let tight = if s.whole && each > KEEP && choice.lines() > 1 { 8 } else { 0 };
        28 + each * (planes + s.folds) + vectors + rows + addresses + tight
    }

    /// More blocks for few long rows (or columns), if the device has clusters.
    fn clusters(&self, mut choice: Choice, fits: impl Fn(i64) -> Option<Choice>) -> Choice {
        let length =
            if self.s.reduces == Some(Direction::Row) { self.s.rows * 32 } else { self.s.cols };
        let mut cluster = choice.cluster;
        while self.clusters_work()
            && cluster < CLUSTER_MOST
            && length >= 2 * SHARE * cluster
            && self.blocks(choice) * 2 <= PROCESSORS
        {
            cluster *= 2;
            match fits(cluster) {
                Some(wider) => choice = wider,
                None => break,
            }
        }
        choice
    }

    fn choose(&self) -> Option<Choice> {
        let clusters = if self.clusters_work() { CLUSTER_MOST } else { 1 };
        let sizes = || (0..4).map(|n| 1i64 << n).filter(|c| *c <= clusters);
        let room = |c: &Choice| self.registers(*c, false) <= (65536 / c.threads).min(255);
        let choice = match (self.s.reduces, self.s.whole) {
            (Some(Direction::Col), true) => {
                let fits = |cluster| self.whole_rows(cluster).filter(room);
                self.clusters(sizes().find_map(fits)?, fits)
            }
            (Some(Direction::Row), true) => {
                let fits = |cluster| self.whole_columns(cluster).filter(room);
                self.clusters(sizes().find_map(fits)?, fits)
            }
            (Some(direction), false) => {
                let choice = match direction {
                    Direction::Col => self.rows_in_pieces(),
                    Direction::Row => self.columns_in_pieces(),
                };
                let choice = self.with_room(choice);
                self.clusters(choice, |cluster| Some(Choice { cluster, ..choice }))
            }
            (None, _) if self.is_windows() => self.windows(),
            (None, _) => self.with_room(self.map()),
        };
        Some(choice)
    }

    /// Fewer elements a thread until registers hold them.
    fn with_room(&self, mut choice: Choice) -> Choice {
        let file = 65536 / choice.threads;
        while self.registers(choice, false) > file.min(160) {
            if choice.runs_each > 1 {
                choice.runs_each = up(choice.runs_each, 2);
            } else if choice.rows_each > 1 {
                choice.rows_each = up(choice.rows_each, 2);
            } else {
                break;
            }
        }
        choice
    }

    /// Bytes that whole rows in registers have under way on a multiprocessor; none when a row is a cluster's.
    fn whole_under_way(&self) -> i64 {
        let Some(choice) = self.choose().filter(|c| c.cluster == 1) else { return 0 };
        let (s, blocks) = (&self.s, i64::from(self.schedule(choice).blocks_per_sm));
        blocks * choice.tile(s).0 * s.cols * s.planes.max(1) * 16 / s.vector
    }

    /// Rows in pieces that stay in shared memory between the loops that read them, rather than `whole` ones in registers;
    /// `None` for rows that are short.
    fn kept(&self, whole: &Picker<'_>) -> Option<GpuSchedule> {
        let s = &self.s;
        let rows = !s.whole && s.reduces == Some(Direction::Col) && !s.ordered;
        let many = s.cols > SHORT_FROM && s.rows >= SHORT_ROWS && s.aligned >= s.vector;
        let short = s.cols < KEPT_FROM;
        let enough = WHOLE_BYTES[usize::from(s.cols <= 4096)];
        if !rows || s.cols <= KEPT_FROM && !(many && whole.whole_under_way() < enough) {
            return None;
        }
        let bytes = s.cols * s.planes.max(1) * 16 / s.vector;
        let most = if self.clusters_work() { CLUSTER_MOST } else { 1 };
        let mut cluster = 1;
        // Wide elements of vectors take registers, too.
        let narrow = s.vector >= 8 || s.vectors == 0;
        let light = s.steps <= KEPT_STEPS && s.aligned >= s.vector && narrow;
        // What varies along columns alone serves twice the threads.
        let shared = light && !short && s.vectors > 0;
        let long = |cluster: i64| up(bytes, cluster) > KEPT_BYTES * if shared { 2 } else { 1 };
        let few =
            |cluster: i64| s.rows * cluster * 2 <= PROCESSORS && s.cols >= 2 * SHARE * cluster;
        while cluster < most && (long(cluster) || few(cluster)) {
            cluster *= 2;
        }
        // More blocks than every device offers, for the longest rows only.
        if cluster == CLUSTER_MOST && most == CLUSTER_MOST && long(cluster) {
            cluster *= 2;
        }
        let room = i64::from(self.arch.smem_bytes()).min(KEPT_MOST);
        let wasted = |piece: i64| up(s.cols, piece) * piece - s.cols;
        // Threads, elements of a piece that each has, and blocks with room for their registers.
        let (threads, each, together) = match (light, short) {
            (true, false) if shared => (512, KEPT_EACH, KEPT_BLOCKS / 2),
            (true, false) => (256, KEPT_EACH, KEPT_BLOCKS),
            (true, true) if wasted(256 * KEPT_EACH / 2) * 8 <= s.cols => {
                (256, KEPT_EACH / 2, if s.planes > 1 { KEPT_BLOCKS } else { 8 })
            }
            (_, true) => (128, KEPT_EACH / 2, 2 * KEPT_BLOCKS),
            (false, false) => (128, KEPT_EACH, KEPT_BLOCKS),
        };
        let runs_each = (each / s.vector).max(1);
        let choice = Choice { threads, lanes: threads, rows_each: 1, runs_each, cluster };
        let piece = threads * runs_each * s.vector;
        let piece_bytes = piece * s.planes.max(1) * 16 / s.vector;
        let kept = up(s.cols, piece * cluster).min(room / piece_bytes).max(1);
        let mut schedule = self.schedule(choice);
        let fit = (220 << 10) / (kept * piece_bytes + 2048);
        let most = up(self.blocks(choice), PROCESSORS).min(together);
        if light {
            schedule.blocks_per_sm = most.max(1) as u32;
        }
        schedule.blocks_per_sm = schedule.blocks_per_sm.min(fit.max(1) as u32);
        schedule.lines.kept = kept as u32;
        // The number of pieces is a number then, and so is whether all of them are kept.
        schedule.sizes = s.col_sizes.clone();
        Some(schedule)
    }

    /// The largest elements of rows, each of a warp or of a block ([`TopK`]).
    fn top_k(&self) -> GpuSchedule {
        let s = &self.s;
        // Few long rows are sooner done by more threads.
        let threads = match s.cols {
            n if n <= 2048 => 128,
            n if n <= 16384 || s.rows >= BLOCKS => 256,
            _ => 1024,
        };
        let lanes = if s.cols <= 2048 { 32 } else { threads };
        let runs_each = up(self.runs, lanes);
        let choice = Choice { threads, lanes, rows_each: 1, runs_each, cluster: 1 };
        let mut schedule = self.schedule(choice);
        // 80 registers, or what a block of 1024 threads can have: with 64 some kernels spill.
        schedule.blocks_per_sm = (768 / threads).max(1) as u32;
        schedule
    }

    /// Rows that are stored again and do not fit the second-level cache are read with lines that go last there: what was written
    /// leaves it sooner, and evenly. Nothing of smaller tensors is to be driven out.
    fn streams(&self) -> Streams {
        let s = &self.s;
        let bytes = s.rows * s.cols * s.planes.max(1) * 16 / s.vector;
        match (s.reduces, s.stores) {
            (Some(_), false) => Streams::Past,
            (Some(Direction::Col), true) if s.whole && bytes >= LAST_BYTES => Streams::Last,
            _ => Streams::Cached,
        }
    }

    fn schedule(&self, choice: Choice) -> GpuSchedule {
        let s = &self.s;
        let heavy = s.steps > HEAVY_STEPS;
        let mut schedule = GpuSchedule::hopper(&[]);
        schedule.arch = self.arch;
        schedule.persistent = false;
        schedule.cluster = choice.cluster as u32;
        schedule.vector = s.aligned.min(s.vector) as u32;
        schedule.lines = LinesKnobs {
            threads: choice.threads as u32,
            lanes: choice.lanes as u32,
            vector: schedule.vector,
            streams: self.streams(),
            // Rows of one or two warps wait for few: registers for another block are worth more, unless elements come one by one.
            early: choice.cluster == 1
                && (!s.whole
                    || choice.lanes > 64
                    || choice.lanes > 32 && (heavy || schedule.vector < 4)),
            ahead: false,
            kept: 0,
            fetched: 0,
            ragged: false,
        };
        // Registers are given out in steps of 8.
        let lean = self.is_lean(choice);
        let needed = match lean {
            true => self.lean_registers(choice),
            false => self.registers(choice, schedule.lines.early),
        };
        let needed = (needed + 7) / 8 * 8;
        let blocks = 65536 / choice.threads / needed;
        // Registers are not worth saving for blocks that are not there.
        let room = match (self.is_light(), lean) {
            (true, _) => 2048,
            (_, true) => 1536,
            _ => 1024,
        } / choice.threads;
        let most = up(self.blocks(choice), PROCESSORS).min(room.clamp(1, 16));
        schedule.blocks_per_sm = blocks.clamp(1, most.max(1)) as u32;
        let (rows, cols) = choice.tile(s);
        for name in &self.kernel.tiles {
            let extent = if Some(name) == s.row.as_ref() {
                rows
            } else if Some(name) == s.col.as_ref() {
                cols
            } else {
                1
            };
            schedule.tiles.insert(name.clone(), extent);
        }
        // Where a tile is as long as the rows, nothing lies behind them: no element is asked whether it does. Of those that are read one
        // by one, only the last ones are asked when the length is a number: a third fewer instructions.
        if s.whole && s.reduces == Some(Direction::Col) {
            let narrow = schedule.vector == 1 && s.vector >= NARROW;
            let single = narrow && choice.cluster == 1;
            let full = s.col_sizes.iter().filter(|(_, extent)| **extent == cols || single);
            schedule.sizes = full.map(|(name, extent)| (name.clone(), *extent)).collect();
        }
        schedule
    }
}

impl GpuSchedule {
    /// A schedule for a program whose loops go over the same pieces of rows, and that keeps these in shared memory.
    /// Tensors start at multiples of 16 bytes. `None` when the rows are so short that registers hold them.
    ///
    /// # Errors
    /// A size without a value; a program that has no rows and columns.
    pub fn lines_kept(
        kernel: &Kernel,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<Option<GpuSchedule>> {
        let picker = |s: Shape| {
            let runs = up(s.cols, s.vector);
            let in_flight = (IN_FLIGHT / s.planes.max(1)).max(1);
            Picker { kernel, arch, size, s, runs, in_flight, map_threads: MAP_THREADS }
        };
        let pieces = shape(kernel, size, 16)?;
        let whole = Shape { whole: true, folds: 0, ..shape(kernel, size, 16)? };
        let kept = picker(pieces).kept(&picker(whole));
        Ok(kept.filter(|schedule| crate::lower(kernel, schedule).is_ok()))
    }

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
    /// that the tile must hold has more elements than the registers of a cluster hold.
    ///
    /// # Errors
    /// A size without a value; a program that has no rows and columns.
    pub fn lines_for_addresses(
        kernel: &Kernel,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
        aligned: i64,
    ) -> Result<Option<GpuSchedule>> {
        let mut s = shape(kernel, size, aligned)?;
        if s.col.is_none() {
            s.vector = 1;
        }
        // With a single row, what varies along columns alone is as large as the rest.
        if s.rows == 1 {
            (s.planes, s.vectors) = (s.planes + s.vectors, 0);
        }
        let runs = up(s.cols, s.vector);
        let in_flight = (IN_FLIGHT / s.planes.max(1)).max(1);
        let mut picker =
            Picker { kernel, arch, size, s, runs, in_flight, map_threads: MAP_THREADS };
        if TopK::of(kernel).is_some() {
            return Ok(Some(picker.top_k()));
        }
        let Some(mut choice) = picker.choose() else { return Ok(None) };
        // A little work is sooner done by more threads, each with less of it, and by more blocks.
        let maps = picker.s.reduces.is_none() && !picker.s.turns && !picker.is_windows();
        while maps && picker.blocks(choice) < PROCESSORS && picker.s.vector > LEAST_VECTOR {
            let before = picker.blocks(choice);
            picker.s.vector /= 2;
            picker.runs = up(picker.s.cols, picker.s.vector);
            let Some(next) = picker.choose() else { break };
            choice = next;
            if picker.blocks(choice) <= before {
                break;
            }
        }
        if maps && picker.blocks(choice) < PROCESSORS {
            picker.map_threads = MAP_THREADS / 2;
            choice = picker.choose().unwrap_or(choice);
        }
        let schedule = picker.schedule(choice);
        if choice.cluster > 1 && crate::lower(kernel, &schedule).is_err() {
            // What has no form across a cluster.
            let alone = Picker { arch: arch.min(Arch::Sm89), ..picker };
            let Some(choice) = alone.choose() else { return Ok(None) };
            return Ok(Some(GpuSchedule { arch, ..alone.schedule(choice) }));
        }
        Ok(Some(schedule))
    }
}
