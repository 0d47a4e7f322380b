//! Programs without products: rows and columns in registers, one block a tile.
//!
//! ```text
//! load (runs of columns, all in flight) -> maps in registers -> reductions over lanes and warps -> store
//! ```
//!
//! Every tile is a plane of rows and columns (`axes.rs`) in `Spread::Lines`: a row belongs to `lanes`
//! neighbouring threads, each with runs of `vector` columns. A row that a tile holds whole is read once
//! and stays in registers. Rows in pieces go through a loop; what a loop only folds into a carried
//! reduction is kept apart per register and combined over threads once, after the loop.
//!
//! Reductions go along columns, or along rows where those are contiguous in memory (`axes.rs`). With a cluster
//! the axis that is reduced is shared out over its blocks, each with as much of the plane as fits its registers, and
//! reductions end in an exchange.
//!
//! Single operations are in `line_ops.rs`, how large registers are in `extents.rs`.

use crate::axes::{Direction, Directions, directions};
use crate::extents::Extents;
use crate::schedule::GpuSchedule;
use crate::shelf::Turns;
use crate::streams::{byte_product, extents};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_device::{
    Arch, CLUSTER, CLUSTERS, CTA, Cond, Extent, Frag, FragId, FragRef, LineStep, Program, Role,
    Shelf, ShelfId, Spread, Stmt, identity,
};
use tilewright_expr::{Func, Op};
use tilewright_layout::{Dim, Range};
use tilewright_tile::{
    Access, Block, Compare, For, If, Kernel, ParamId, ReduceKind, TileId, TileOp, TopK,
};

/// So much of its weights a block asks for before the kernel's turn: all blocks that are there together ask for a sixth
/// of the second-level cache. More of it gets in the way of the kernel that still runs.
const AHEAD_BYTES: i64 = 16384;

pub(crate) fn combine(kind: ReduceKind) -> Op {
    match kind {
        ReduceKind::Sum => Op::Add,
        ReduceKind::Prod => Op::Mul,
        ReduceKind::Max => Op::Max,
        ReduceKind::Min => Op::Min,
    }
}

/// Whether the program has a product.
pub(crate) fn has_product(block: &Block) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        tilewright_tile::Stmt::Let(_, op) => matches!(op, TileOp::Mma { .. }),
        tilewright_tile::Stmt::For(f) => has_product(&f.body),
        tilewright_tile::Stmt::If(f) => has_product(&f.then) || has_product(&f.otherwise),
        _ => false,
    })
}

/// A reduction that a loop folds into a carried tile.
struct Folded {
    reduce: TileId,
    next: TileId,
    kind: ReduceKind,
    x: TileId,
}

pub(crate) struct Lines<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) schedule: &'a GpuSchedule,
    pub(crate) directions: Directions,
    pub(crate) extents: Extents,
    /// Of the part of the plane that one block has.
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    /// The direction that is shared out over the blocks of a cluster.
    pub(crate) shared: Option<Direction>,
    /// Loops around the step.
    pub(crate) loops: usize,
    /// What the variables of those loops may be, where that is known.
    pub(crate) ranges: BTreeMap<Arc<str>, Range>,
    pub(crate) shelves: IdVec<ShelfId, Shelf>,
    /// What the innermost loop finds on shelves.
    pub(crate) turns: Option<Turns>,
    pub(crate) frags: IdVec<FragId, Frag>,
    pub(crate) tiles: BTreeMap<TileId, FragId>,
    /// Positions less a limit, by direction and limit.
    pub(crate) masks: BTreeMap<String, FragId>,
    /// Reductions that the loop around them keeps apart: the accumulator by the reduction's tile.
    pub(crate) folded: BTreeMap<TileId, FragId>,
    /// Folded sums of products of bytes, by the reduction's tile: the tiles of the operands.
    pub(crate) dots: BTreeMap<TileId, [TileId; 2]>,
    /// Combinations with a carried tile that a folded reduction replaces.
    pub(crate) skipped: Vec<TileId>,
    /// Fetches of weights that need not wait for the kernel before.
    pub(crate) unwaited: Vec<Stmt>,
}

/// Schedules a kernel without products: as it was written, and with tile sizes put in.
pub(crate) fn lower(written: &Kernel, kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    let directions = directions(written)?.with_sizes(kernel);
    let (mut rows, mut cols) = (1, 1);
    for (tile, info) in kernel.values.iter() {
        let shape = extents(kernel, tile)?;
        for (axis, direction) in directions.of(tile).iter().enumerate() {
            let known = match direction {
                Some(Direction::Row) => &mut rows,
                Some(Direction::Col) => &mut cols,
                None => continue,
            };
            if *known != 1 && *known != shape[axis] {
                return Err(Error::unsupported(format!(
                    "tiles of {} and {} elements along one direction: {}",
                    known, shape[axis], info.ty
                )));
            }
            *known = shape[axis];
        }
    }
    // What has one row or column may be any of the threads'.
    let knobs = &schedule.lines;
    let lines = (knobs.threads / knobs.lanes.max(1)).max(1);
    let of_cluster = |d| if directions.reduces == Some(d) { schedule.cluster } else { 1 };
    if rows == 1 {
        rows = lines * of_cluster(Direction::Row);
    }
    if cols == 1 {
        cols = knobs.lanes * knobs.vector * of_cluster(Direction::Col);
    }
    let shared = directions.reduces.filter(|_| schedule.cluster > 1);
    let share =
        |all: u32| if all.is_multiple_of(schedule.cluster) { all / schedule.cluster } else { 0 };
    match shared {
        Some(Direction::Row) => rows = share(rows),
        Some(Direction::Col) => cols = share(cols),
        None => {}
    }
    let legal = knobs.lanes.is_power_of_two()
        && knobs.vector.is_power_of_two()
        && knobs.threads.is_power_of_two()
        && (32..=1024).contains(&knobs.threads)
        && knobs.lanes <= knobs.threads
        && rows > 0
        && cols > 0
        && rows.is_multiple_of(knobs.threads / knobs.lanes)
        && cols.is_multiple_of(knobs.lanes * knobs.vector);
    if !legal {
        return Err(Error::unsupported(format!(
            "a tile of {rows} rows and {cols} columns over {} threads, {} lanes a row, {} columns a run",
            knobs.threads, knobs.lanes, knobs.vector
        )));
    }
    let extents = Extents::new(kernel, &directions, rows);
    let mut lines = Lines {
        kernel,
        schedule,
        directions,
        extents,
        rows,
        cols,
        shared,
        loops: 0,
        ranges: BTreeMap::new(),
        shelves: IdVec::new(),
        turns: None,
        frags: IdVec::new(),
        tiles: BTreeMap::new(),
        masks: BTreeMap::new(),
        folded: BTreeMap::new(),
        dots: BTreeMap::new(),
        skipped: Vec::new(),
        unwaited: Vec::new(),
    };
    let item = Dim::sym("item");
    let mut items = Dim::new(1);
    let mut work = Vec::new();
    // The last axis of the grid runs fastest.
    let mut rest = item.clone();
    for (i, axis) in kernel.grid.iter().enumerate().rev() {
        items = items * &axis.extent;
        let name = axis.name.clone();
        if i == 0 {
            work.push(Stmt::Let { name, value: rest.clone() });
        } else {
            work.push(Stmt::Let { name, value: rest.modulo(&axis.extent) });
            let outer: Arc<str> = Arc::from(format!("item_{i}"));
            work.push(Stmt::Let { name: outer.clone(), value: rest.floor_div(&axis.extent) });
            rest = Dim::sym(outer);
        }
    }
    let indices = work.len();
    match top_k_step(written, kernel, schedule) {
        Some(step) => work.push(Stmt::Line(step)),
        None => lines.block(&kernel.body, &mut work)?,
    }
    let mut body = Vec::new();
    let dependent = schedule.dependent && schedule.arch >= Arch::Sm90a;
    let ahead = schedule.reads_ahead();
    if ahead {
        // The next kernel may start as soon as all blocks of this one have: it waits for their end itself.
        let mut first = vec![Stmt::GridRelease];
        first.extend(work.drain(..indices));
        match lines.unwaited.is_empty() {
            true => first.extend(lines.lines_ahead(&kernel.body)),
            false => first.append(&mut lines.unwaited),
        }
        first.push(Stmt::GridWait);
        work.splice(0..0, first);
    } else if dependent {
        body.push(Stmt::GridWait);
    }
    if schedule.persistent {
        let (lo, step) = (Dim::sym(CLUSTER), Dim::sym(CLUSTERS));
        body.push(Stmt::For { var: "item".into(), lo, hi: items.clone(), step, body: work });
    } else {
        body.push(Stmt::Let { name: "item".into(), value: Dim::sym(CLUSTER) });
        body.extend(work);
    }
    if dependent && !ahead {
        body.push(Stmt::GridRelease);
    }
    Ok(Program {
        name: kernel.name.clone(),
        arch: schedule.arch,
        params: kernel.params.clone(),
        symbols: kernel.symbols.clone(),
        maps: IdVec::new(),
        cluster: if shared.is_some() { schedule.cluster } else { 1 },
        threads: knobs.threads,
        items,
        persistent: schedule.persistent,
        blocks_per_sm: schedule.blocks_per_sm,
        streams: knobs.streams,
        ragged: knobs.ragged,
        smem: IdVec::new(),
        barriers: IdVec::new(),
        rings: IdVec::new(),
        frags: lines.frags,
        shelves: lines.shelves,
        setup: Vec::new(),
        roles: vec![Role {
            name: "lines".into(),
            first_warp: 0,
            warps: knobs.threads / 32,
            instances: 1,
            instance: "group".into(),
            single_thread: false,
            registers: None,
            body,
        }],
        teardown: Vec::new(),
    })
}

/// The step of a program that finds the largest elements of rows, with a row for each group of lanes.
fn top_k_step(written: &Kernel, kernel: &Kernel, schedule: &GpuSchedule) -> Option<LineStep> {
    let top = TopK::of(written)?;
    let ([axis], [bm, _]) = (kernel.grid.as_slice(), written.tiles.as_slice()) else { return None };
    let knobs = &schedule.lines;
    let rows = *schedule.tiles.get(bm)?;
    let fits = (knobs.lanes == 32 || knobs.lanes == knobs.threads)
        && rows == i64::from(knobs.threads / knobs.lanes)
        && kernel.params.iter().all(|(_, p)| p.layout.axes.iter().all(|a| a.block.is_none()));
    let near = kernel.params[top.x].layout.axes[1].stride.is(1);
    let count = u32::try_from(top.count.as_const()?).ok()?;
    fits.then(|| LineStep::TopK {
        x: top.x,
        values: top.values,
        places: top.places,
        row: Dim::sym(axis.name.clone()) * rows,
        count,
        largest: top.largest,
        lanes: knobs.lanes,
        vector: if near { knobs.vector } else { 1 },
    })
}

pub(crate) fn whole(frag: FragId) -> FragRef {
    FragRef { frag, col: Dim::new(0), cols: None }
}

/// The number of neighbouring elements, a power of two up to `most`, of which every value of the
/// expression is a multiple, symbols standing for anything.
pub(crate) fn aligned(dim: &Dim, most: u32) -> u32 {
    let mut run = most.max(1);
    while run > 1 && dim.terms().iter().any(|(_, c)| c % i64::from(run) != 0) {
        run /= 2;
    }
    run
}

impl Lines<'_> {
    pub(crate) fn frag(&mut self, dtype: DType, extent: Extent) -> FragId {
        let name = match extent {
            Extent::Tile => "tile",
            Extent::PerRow => "per_row",
            Extent::PerCol => "per_col",
        };
        let name = format!("{name}_{}", self.frags.len());
        let knobs = &self.schedule.lines;
        let spread =
            Spread::Lines { lanes: knobs.lanes, vector: knobs.vector, threads: knobs.threads };
        self.frags.push(Frag { name, dtype, rows: self.rows, cols: self.cols, spread, extent })
    }

    /// How a tile lies in the plane.
    fn extent(&self, tile: TileId) -> Extent {
        self.extents.of(tile)
    }

    pub(crate) fn dtype(&self, tile: TileId) -> DType {
        self.kernel.ty(tile).dtype
    }

    pub(crate) fn new_tile(&mut self, tile: TileId) -> FragId {
        let frag = self.frag(self.dtype(tile), self.extent(tile));
        self.tiles.insert(tile, frag);
        frag
    }

    pub(crate) fn get(&self, tile: TileId) -> Result<FragId> {
        self.tiles.get(&tile).copied().ok_or_else(|| Error::bug(format!("{tile} has no registers")))
    }

    /// Where this block's part of the plane starts along a direction.
    pub(crate) fn start(&self, direction: Direction) -> Dim {
        let extent = if direction == Direction::Row { self.rows } else { self.cols };
        match self.shared == Some(direction) {
            true => Dim::sym(CTA) * i64::from(extent),
            false => Dim::new(0),
        }
    }

    fn block(&mut self, block: &Block, out: &mut Vec<Stmt>) -> Result<()> {
        let kept = self.find_kept(block);
        let order = early_loads(self.kernel, block, self.schedule.lines.early);
        for (done, (place, stmt)) in order.iter().copied().enumerate() {
            self.fetch_kept(&kept, place, out);
            match stmt {
                tilewright_tile::Stmt::Let(id, op) => {
                    self.operation(*id, op, out)?;
                    if std::ptr::eq(block, &self.kernel.body) && self.meets(op) {
                        let (before, behind) = order.split_at(done + 1);
                        self.unpack_again(before, behind, out)?;
                    }
                }
                tilewright_tile::Stmt::Store { param, index, value } => {
                    self.store(*param, index, *value, out)?;
                }
                tilewright_tile::Stmt::AtomicAdd { param, index, value } => {
                    self.atomic_add(*param, index, *value, out)?;
                }
                tilewright_tile::Stmt::For(f) => {
                    let shared = self.turns_of_kept(&kept, place, f);
                    self.for_loop(f, shared, out)?;
                }
                tilewright_tile::Stmt::If(f) => self.branch(f, out)?,
            }
        }
        Ok(())
    }

    /// Whether warps meet in a step that reduces whole rows.
    fn meets(&self, op: &TileOp) -> bool {
        let TileOp::Reduce { x, axis, .. } = op else { return false };
        let along = self.directions.of(*x)[*axis];
        along == Some(Direction::Col) && self.schedule.lines.lanes > 32
    }

    /// Tiles of bf16 that steps on both sides of a meeting read wait for it as they lie in memory, two elements a register, and so do
    /// those that are the same in f32.
    fn unpack_again(
        &mut self,
        before: &[(usize, &tilewright_tile::Stmt)],
        behind: &[(usize, &tilewright_tile::Stmt)],
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        if !self.schedule.lines.vector.is_multiple_of(2) {
            return Ok(());
        }
        let read = |by: &[(usize, &tilewright_tile::Stmt)], tile| {
            by.iter().map(|(_, stmt)| uses_of(stmt, tile)).sum::<usize>() > 0
        };
        let wide = Func::cast(DType::BF16, DType::F32);
        for (_, stmt) in before {
            let tilewright_tile::Stmt::Let(tile, _) = stmt else { continue };
            let plane = self.extent(*tile) == Extent::Tile && self.dtype(*tile) == DType::BF16;
            if !plane || !read(before, *tile) {
                continue;
            }
            let casts: Vec<TileId> = before
                .iter()
                .filter_map(|(_, stmt)| match stmt {
                    tilewright_tile::Stmt::Let(to, TileOp::Map { func, args }) => {
                        let same = *func == wide && args.len() == 1 && args[0].tile == *tile;
                        (same && read(behind, *to)).then_some(*to)
                    }
                    _ => None,
                })
                .collect();
            if casts.is_empty() && !read(behind, *tile) {
                continue;
            }
            let src = whole(self.get(*tile)?);
            let dst = whole(self.new_tile(*tile));
            out.push(Stmt::Line(LineStep::Unpack { dst: dst.clone(), src }));
            for to in casts {
                let to = whole(self.new_tile(to));
                out.push(Stmt::Map { dst: to, func: wide.clone(), args: vec![dst.clone()] });
            }
        }
        Ok(())
    }

    /// Asks for the beginnings of the lines of matrices that the first loop reads planes from.
    fn lines_ahead(&self, block: &Block) -> Vec<Stmt> {
        let first = block.stmts.iter().find_map(|s| match s {
            tilewright_tile::Stmt::For(f) => Some(f),
            _ => None,
        });
        let Some(f) = first else { return Vec::new() };
        let begin = |name: &str| (*name == *f.var).then(|| f.lo.clone());
        // The parameter, where its lines begin, and the bytes of one.
        let line = |s: &tilewright_tile::Stmt| {
            let tilewright_tile::Stmt::Let(id, TileOp::Load { param, index, .. }) = s else {
                return None;
            };
            let (row, col) = (
                self.directions.axis(*id, Direction::Row),
                self.directions.axis(*id, Direction::Col),
            );
            let p = &self.kernel.params[*param];
            let [lines, depth] = p.layout.axes.as_slice() else { return None };
            let at: Vec<Dim> = index.iter().map(|d| d.substitute(&begin)).collect();
            let bytes = |d: &Dim| d.as_const().map(|n| n * i64::from(p.dtype.bits()) / 8);
            let whole = (row, col) == (Some(0), Some(1)) && depth.stride.is(1) && at[1].is(0);
            let aligned = bytes(&lines.stride).is_some_and(|b| b % 16 == 0);
            (p.access == Access::In && whole && aligned).then_some(())?;
            Some((*param, at, bytes(&depth.extent)?))
        };
        let all: Vec<_> = f.body.stmts.iter().filter_map(line).collect();
        let each = AHEAD_BYTES / (i64::from(self.rows) * all.len().max(1) as i64);
        let ask = |(param, at, bytes): (ParamId, Vec<Dim>, i64)| {
            let bytes = u32::try_from(bytes.min(each) / 16 * 16).ok().filter(|b| *b > 0)?;
            let rows = self.rows;
            Some(Stmt::Line(LineStep::Prefetch { param, at, row: 0, rows, bytes }))
        };
        all.into_iter().filter_map(ask).collect()
    }

    /// All stores of the program.
    pub(crate) fn stores(&self) -> Vec<(ParamId, &[Dim], TileId)> {
        fn visit<'b>(block: &'b Block, found: &mut Vec<(ParamId, &'b [Dim], TileId)>) {
            for stmt in &block.stmts {
                match stmt {
                    tilewright_tile::Stmt::Store { param, index, value } => {
                        found.push((*param, index, *value));
                    }
                    tilewright_tile::Stmt::For(f) => visit(&f.body, found),
                    tilewright_tile::Stmt::If(f) => {
                        visit(&f.then, found);
                        visit(&f.otherwise, found);
                    }
                    _ => {}
                }
            }
        }
        let mut found = Vec::new();
        visit(&self.kernel.body, &mut found);
        found
    }

    /// Steps that only one block of the cluster takes, because each has the same values.
    pub(crate) fn by_one_block(&self, steps: Vec<Stmt>, same: bool, out: &mut Vec<Stmt>) {
        if same && self.shared.is_some() {
            let (lhs, compare, rhs) = (Dim::sym(CTA), Compare::Eq, Dim::new(0));
            out.push(Stmt::If { cond: Cond { lhs, compare, rhs }, then: steps, otherwise: vec![] });
        } else {
            out.extend(steps);
        }
    }

    /// A reduction of this block's part, and of the cluster's.
    pub(crate) fn reduce(
        &mut self,
        dst: FragId,
        kind: ReduceKind,
        src: FragId,
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        out.push(Stmt::Reduce { dst: whole(dst), kind, src: whole(src), accumulate: false });
        let along = match self.frags[dst].extent {
            Extent::PerCol => Direction::Row,
            _ => Direction::Col,
        };
        if self.shared == Some(along) {
            if self.loops > 0 {
                return Err(Error::unsupported("an exchange across a cluster in a loop"));
            }
            out.push(Stmt::Line(LineStep::AcrossCluster { frag: whole(dst), kind }));
        }
        Ok(())
    }

    pub(crate) fn copy(&mut self, dst: FragId, src: FragId, out: &mut Vec<Stmt>) {
        if dst != src {
            let func = Func::identity(self.frags[dst].dtype);
            out.push(Stmt::Map { dst: whole(dst), func, args: vec![whole(src)] });
        }
    }

    fn for_loop(&mut self, f: &For, kept: Option<Turns>, out: &mut Vec<Stmt>) -> Result<()> {
        let folds: Vec<Option<Folded>> =
            (0..f.carry.len()).map(|i| self.folded_reduction(f, i)).collect();
        let mut carried = Vec::new();
        for ((inner, init), fold) in f.carry.iter().zip(&folds) {
            let init = self.get(*init)?;
            if let Some(fold) = fold {
                let dtype = self.dtype(fold.x);
                // A vector along the columns keeps its sums once per column, not once per element of the plane.
                let acc = self.frag(dtype, self.extent(fold.x));
                out.push(Stmt::Fill { dst: whole(acc), value: identity(fold.kind, dtype) });
                self.folded.insert(fold.reduce, acc);
                self.skipped.push(fold.next);
                if let Some(operands) = self.dot(f, fold) {
                    self.dots.insert(fold.reduce, operands);
                    self.skipped.push(fold.x);
                }
                carried.push(acc);
            } else {
                let frag = self.new_tile(*inner);
                self.copy(frag, init, out);
                carried.push(frag);
            }
        }
        let outer_masks = self.masks.clone();
        let mut body = Vec::new();
        let ahead = if kept.is_none() { self.turns_ahead(f, out) } else { None };
        let fetches = ahead.is_some();
        if let Some(turns) = &ahead {
            self.begin_turn(turns, &f.hi, &mut body);
        }
        let outer_turns = std::mem::replace(&mut self.turns, kept.or(ahead));
        self.loops += 1;
        let known = |d: &Dim| d.bounds(&|name| self.ranges.get(name).copied());
        let range = Range { min: known(&f.lo).min, max: known(&f.hi).max.saturating_sub(1) };
        self.ranges.insert(f.var.clone(), range);
        let done = self.block(&f.body, &mut body);
        self.ranges.remove(&f.var);
        self.loops -= 1;
        self.turns = outer_turns;
        done?;
        self.masks = outer_masks;
        // All next values are read before any carried tile changes.
        let mut moves = Vec::new();
        for (i, frag) in carried.iter().enumerate() {
            if folds[i].is_none() {
                let next = self.get(f.yields[i])?;
                let clash = next != *frag && carried.contains(&next);
                let from = if clash {
                    let spare = self.frag(self.frags[next].dtype, self.frags[next].extent);
                    self.copy(spare, next, &mut body);
                    spare
                } else {
                    next
                };
                moves.push((*frag, from));
            }
        }
        for (to, from) in moves {
            self.copy(to, from, &mut body);
        }
        out.push(Stmt::For {
            var: f.var.clone(),
            lo: f.lo.clone(),
            hi: f.hi.clone(),
            step: Dim::new(1),
            body,
        });
        if fetches {
            out.push(Stmt::CopyWait { pending: 0 });
        }
        for (i, fold) in folds.iter().enumerate() {
            let Some(fold) = fold else {
                self.tiles.insert(f.results[i], carried[i]);
                continue;
            };
            let init = self.get(f.carry[i].1)?;
            let sum = self.frag(self.dtype(fold.reduce), self.extent(fold.reduce));
            let mut all = carried[i];
            if self.frags[all].extent != Extent::Tile {
                all = self.frag(self.dtype(fold.x), Extent::Tile);
                self.copy(all, carried[i], out);
            }
            self.reduce(sum, fold.kind, all, out)?;
            let result = self.new_tile(f.results[i]);
            out.push(Stmt::Map {
                dst: whole(result),
                func: Func::binary(combine(fold.kind), self.dtype(f.results[i])),
                args: vec![whole(init), whole(sum)],
            });
        }
        Ok(())
    }

    /// Whether carried tile `i` is only folded with a reduction of this loop's body: nothing else reads
    /// it or the reduction, so that the reduction may wait until after the loop.
    fn folded_reduction(&self, f: &For, i: usize) -> Option<Folded> {
        let definition = |tile: TileId| {
            f.body.stmts.iter().find_map(|s| match s {
                tilewright_tile::Stmt::Let(id, op) if *id == tile => Some(op),
                _ => None,
            })
        };
        let (inner, next) = (f.carry[i].0, f.yields[i]);
        let TileOp::Map { func, args } = definition(next)? else { return None };
        let [a, b] = args.as_slice() else { return None };
        let op = func.as_single_op()?;
        let reduce = match (a.tile == inner, b.tile == inner) {
            (true, false) => b.tile,
            (false, true) => a.tile,
            _ => return None,
        };
        let TileOp::Reduce { kind, x, axis, limit } = definition(reduce)? else { return None };
        let once =
            |tile| uses(&f.body, tile) + f.yields.iter().filter(|y| **y == tile).count() == 1;
        let plane = self.extent(*x) == Extent::Tile && self.extent(reduce) != Extent::Tile;
        let line = self.extent(*x) == Extent::PerCol
            && self.directions.of(*x)[*axis] == Some(Direction::Col)
            && limit.is_none();
        (op == combine(*kind) && (plane || line) && once(inner) && once(reduce) && once(next))
            .then_some(Folded { reduce, next, kind: *kind, x: *x })
    }

    /// The operands of a folded sum of products of bytes along columns, which neighbours in runs of fours share.
    fn dot(&self, f: &For, fold: &Folded) -> Option<[TileId; 2]> {
        let definition = |tile: TileId| {
            f.body.stmts.iter().find_map(|s| match s {
                tilewright_tile::Stmt::Let(id, op) if *id == tile => Some(op),
                _ => None,
            })
        };
        let TileOp::Reduce { kind: ReduceKind::Sum, axis, limit: None, .. } =
            definition(fold.reduce)?
        else {
            return None;
        };
        let TileOp::Map { func, args } = definition(fold.x)? else { return None };
        let [a, b] = args.as_slice() else { return None };
        let bytes = self.dtype(a.tile);
        let fits = matches!(bytes, DType::I8 | DType::U8)
            && *func == byte_product(bytes)
            && self.schedule.lines.vector.is_multiple_of(4)
            && self.directions.of(fold.x)[*axis] == Some(Direction::Col)
            && self.extent(fold.x) == Extent::Tile
            && [a, b].iter().all(|arg| self.extent(arg.tile) != Extent::PerRow)
            && uses(&f.body, fold.x) == 1;
        fits.then_some([a.tile, b.tile])
    }

    fn branch(&mut self, f: &If, out: &mut Vec<Stmt>) -> Result<()> {
        let results: Vec<FragId> = f.results.iter().map(|r| self.new_tile(*r)).collect();
        let outer_masks = self.masks.clone();
        let mut sides = Vec::new();
        for (block, yields) in [(&f.then, &f.then_yields), (&f.otherwise, &f.otherwise_yields)] {
            let mut side = Vec::new();
            self.block(block, &mut side)?;
            for (to, from) in results.iter().zip(yields) {
                let from = self.get(*from)?;
                self.copy(*to, from, &mut side);
            }
            self.masks = outer_masks.clone();
            sides.push(side);
        }
        let otherwise = sides.pop().unwrap_or_default();
        let then = sides.pop().unwrap_or_default();
        let cond = Cond { lhs: f.lhs.clone(), compare: f.compare, rhs: f.rhs.clone() };
        out.push(Stmt::If { cond, then, otherwise });
        Ok(())
    }
}

/// The steps of a block with their places, loads of what nobody writes first: their data are under way while reductions wait.
fn early_loads<'b>(
    kernel: &Kernel,
    block: &'b Block,
    early: bool,
) -> Vec<(usize, &'b tilewright_tile::Stmt)> {
    let early = |(_, stmt): &(usize, &tilewright_tile::Stmt)| {
        early
            && matches!(stmt, tilewright_tile::Stmt::Let(_, TileOp::Load { param, .. })
            if kernel.params[*param].access == Access::In)
    };
    let all = || block.stmts.iter().enumerate();
    all().filter(early).chain(all().filter(|s| !early(s))).collect()
}

/// How often steps of a block read a tile, nested blocks included.
pub(crate) fn uses(block: &Block, tile: TileId) -> usize {
    block.stmts.iter().map(|stmt| uses_of(stmt, tile)).sum()
}

/// How often a step reads a tile.
fn uses_of(stmt: &tilewright_tile::Stmt, tile: TileId) -> usize {
    let is = |t: &TileId| usize::from(*t == tile);
    match stmt {
        tilewright_tile::Stmt::Let(_, op) => match op {
            TileOp::Map { args, .. } => args.iter().map(|a| is(&a.tile)).sum(),
            TileOp::Broadcast(a) => is(&a.tile),
            TileOp::Gather { rows, .. } => is(rows),
            TileOp::Reduce { x, .. }
            | TileOp::ArgReduce { x, .. }
            | TileOp::Scan { x, .. }
            | TileOp::Permute { x, .. }
            | TileOp::Reshape(x) => is(x),
            TileOp::Mma { acc, a, b, .. } => is(acc) + is(a) + is(b),
            TileOp::Full(_) | TileOp::Load { .. } | TileOp::Iota { .. } | TileOp::Random { .. } => {
                0
            }
        },
        tilewright_tile::Stmt::Store { value, .. }
        | tilewright_tile::Stmt::AtomicAdd { value, .. } => is(value),
        tilewright_tile::Stmt::For(f) => {
            f.carry.iter().map(|(_, init)| is(init)).sum::<usize>()
                + f.yields.iter().map(is).sum::<usize>()
                + uses(&f.body, tile)
        }
        tilewright_tile::Stmt::If(f) => {
            f.then_yields.iter().chain(&f.otherwise_yields).map(is).sum::<usize>()
                + uses(&f.then, tile)
                + uses(&f.otherwise, tile)
        }
    }
}
