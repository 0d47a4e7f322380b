//! Programs without products: rows and columns in registers, one block a tile.
//!
//! ```text
//! load (runs of columns, all in flight) -> maps in registers -> reductions over lanes and warps -> store
//! ```
//!
//! Every tile is a plane of rows and columns (`axes.rs`) in `Spread::Lines`: a row belongs to `lanes`
//! neighbouring threads, each with runs of `vector` columns. A row that a tile holds whole is read once
//! and stays in registers. Rows in pieces go through a loop; what a loop only folds into a carried
//! reduction is kept apart per register and combined over threads once, after the loop. Sums along rows (of what
//! is contiguous along columns) are combined over threads through shared memory.

use crate::axes::{Direction, Directions, directions, long_axes};
use crate::schedule::GpuSchedule;
use crate::streams::extents;
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_device::{
    Arch, CLUSTER, CLUSTERS, Cond, Extent, Frag, FragId, FragRef, Program, Role, Spread, Stmt,
};
use tilewright_expr::{Func, FuncBuilder, Op, Value};
use tilewright_layout::Dim;
use tilewright_tile::{Block, For, If, Kernel, Operand, ParamId, ReduceKind, TileId, TileOp};

/// The value that a reduction starts from.
fn identity(kind: ReduceKind, dtype: DType) -> Value {
    let float = dtype.is_float();
    match kind {
        ReduceKind::Sum if float => Value::Float(0.0),
        ReduceKind::Prod if float => Value::Float(1.0),
        ReduceKind::Max if float => Value::Float(f64::NEG_INFINITY),
        ReduceKind::Min if float => Value::Float(f64::INFINITY),
        ReduceKind::Sum => Value::Int(0),
        ReduceKind::Prod => Value::Int(1),
        ReduceKind::Max => Value::Int(lowest(dtype)),
        ReduceKind::Min => Value::Int(highest(dtype)),
    }
}

fn is_signed(dtype: DType) -> bool {
    dtype.class() == tilewright_base::Class::Signed
}

fn lowest(dtype: DType) -> i64 {
    if is_signed(dtype) { i64::MIN >> (64 - dtype.bits()) } else { 0 }
}

fn highest(dtype: DType) -> i64 {
    match (is_signed(dtype), dtype) {
        (true, _) => i64::MAX >> (64 - dtype.bits()),
        (_, DType::Bool) => 1,
        // The bits of the largest number; `u64` wraps into the sign.
        (_, DType::U64) => -1,
        _ => (1 << dtype.bits()) - 1,
    }
}

fn combine(kind: ReduceKind) -> Op {
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

struct Lines<'a> {
    kernel: &'a Kernel,
    schedule: &'a GpuSchedule,
    directions: Directions,
    rows: u32,
    cols: u32,
    frags: IdVec<FragId, Frag>,
    tiles: BTreeMap<TileId, FragId>,
    /// Rows or columns below a limit, by direction and limit.
    masks: BTreeMap<String, FragId>,
    /// Reductions that the loop around them keeps apart: the accumulator by the reduction's tile.
    folded: BTreeMap<TileId, FragId>,
    /// Combinations with a carried tile that a folded reduction replaces.
    skipped: Vec<TileId>,
}

/// Schedules a kernel without products.
pub(crate) fn lower(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    let directions = directions(kernel)?;
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
    let knobs = &schedule.lines;
    let legal = knobs.lanes.is_power_of_two()
        && knobs.vector.is_power_of_two()
        && knobs.threads.is_power_of_two()
        && (32..=1024).contains(&knobs.threads)
        && knobs.lanes <= knobs.threads
        && rows.is_multiple_of(knobs.threads / knobs.lanes)
        && cols.is_multiple_of(knobs.lanes * knobs.vector);
    if !legal {
        return Err(Error::unsupported(format!(
            "a tile of {rows} rows and {cols} columns over {} threads, {} lanes a row, {} columns a run",
            knobs.threads, knobs.lanes, knobs.vector
        )));
    }
    let mut lines = Lines {
        kernel,
        schedule,
        directions,
        rows,
        cols,
        frags: IdVec::new(),
        tiles: BTreeMap::new(),
        masks: BTreeMap::new(),
        folded: BTreeMap::new(),
        skipped: Vec::new(),
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
    lines.block(&kernel.body, &mut work)?;
    let mut body = Vec::new();
    if schedule.dependent && schedule.arch >= Arch::Sm90a {
        // What comes next may start at once: it waits for the end of this kernel before it reads.
        body.extend([Stmt::GridRelease, Stmt::GridWait]);
    }
    if schedule.persistent {
        let (lo, step) = (Dim::sym(CLUSTER), Dim::sym(CLUSTERS));
        body.push(Stmt::For { var: "item".into(), lo, hi: items.clone(), step, body: work });
    } else {
        body.push(Stmt::Let { name: "item".into(), value: Dim::sym(CLUSTER) });
        body.extend(work);
    }
    Ok(Program {
        name: kernel.name.clone(),
        arch: schedule.arch,
        params: kernel.params.clone(),
        symbols: kernel.symbols.clone(),
        maps: IdVec::new(),
        cluster: 1,
        threads: knobs.threads,
        items,
        persistent: schedule.persistent,
        blocks_per_sm: schedule.blocks_per_sm,
        smem: IdVec::new(),
        barriers: IdVec::new(),
        rings: IdVec::new(),
        frags: lines.frags,
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

fn whole(frag: FragId) -> FragRef {
    FragRef { frag, col: Dim::new(0), cols: None }
}

/// The number of neighbouring elements, a power of two up to `most`, of which every value of the
/// expression is a multiple, symbols standing for anything.
fn aligned(dim: &Dim, most: u32) -> u32 {
    let mut run = most.max(1);
    while run > 1 && dim.terms().iter().any(|(_, c)| c % i64::from(run) != 0) {
        run /= 2;
    }
    run
}

impl Lines<'_> {
    fn frag(&mut self, dtype: DType, extent: Extent) -> FragId {
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

    /// How a tile lies in the plane. With a single row, columns alone are the whole plane.
    fn extent(&self, tile: TileId) -> Extent {
        let has = |d| self.directions.axis(tile, d).is_some();
        match (has(Direction::Row), has(Direction::Col)) {
            (true, true) => Extent::Tile,
            (false, true) if self.rows == 1 => Extent::Tile,
            (false, true) => Extent::PerCol,
            (_, false) => Extent::PerRow,
        }
    }

    fn dtype(&self, tile: TileId) -> DType {
        self.kernel.ty(tile).dtype
    }

    fn new_tile(&mut self, tile: TileId) -> FragId {
        let frag = self.frag(self.dtype(tile), self.extent(tile));
        self.tiles.insert(tile, frag);
        frag
    }

    fn get(&self, tile: TileId) -> Result<FragId> {
        self.tiles.get(&tile).copied().ok_or_else(|| Error::bug(format!("{tile} has no registers")))
    }

    fn block(&mut self, block: &Block, out: &mut Vec<Stmt>) -> Result<()> {
        for stmt in &block.stmts {
            match stmt {
                tilewright_tile::Stmt::Let(id, op) => self.operation(*id, op, out)?,
                tilewright_tile::Stmt::Store { param, index, value } => {
                    let src = self.get(*value)?;
                    let axes = (
                        self.directions.axis(*value, Direction::Row),
                        self.directions.axis(*value, Direction::Col),
                    );
                    let vector = self.run(*param, axes.1, index);
                    out.push(Stmt::Store {
                        param: *param,
                        at: index.clone(),
                        axes,
                        src: whole(src),
                        vector,
                    });
                }
                tilewright_tile::Stmt::AtomicAdd { .. } => {
                    return Err(Error::unsupported("an atomic addition on a GPU"));
                }
                tilewright_tile::Stmt::For(f) => self.for_loop(f, out)?,
                tilewright_tile::Stmt::If(f) => self.branch(f, out)?,
            }
        }
        Ok(())
    }

    /// Neighbouring columns that one access may take.
    fn run(&self, param: ParamId, axis: Option<usize>, at: &[Dim]) -> u32 {
        let p = &self.kernel.params[param];
        let Some(axis) = axis else { return 1 };
        if !p.layout.axes[axis].stride.is(1) {
            return 1;
        }
        let widest = (128 / p.dtype.bits()).max(1);
        let most = self.schedule.vector.min(self.schedule.lines.vector).min(widest).max(1);
        aligned(&p.layout.offset, aligned(&at[axis], most))
    }

    fn copy(&mut self, dst: FragId, src: FragId, out: &mut Vec<Stmt>) {
        if dst != src {
            let func = Func::identity(self.frags[dst].dtype);
            out.push(Stmt::Map { dst: whole(dst), func, args: vec![whole(src)] });
        }
    }

    fn for_loop(&mut self, f: &For, out: &mut Vec<Stmt>) -> Result<()> {
        let folds: Vec<Option<Folded>> =
            (0..f.carry.len()).map(|i| self.folded_reduction(f, i)).collect();
        let mut carried = Vec::new();
        for ((inner, init), fold) in f.carry.iter().zip(&folds) {
            let init = self.get(*init)?;
            if let Some(fold) = fold {
                let dtype = self.dtype(fold.x);
                let acc = self.frag(dtype, Extent::Tile);
                out.push(Stmt::Fill { dst: whole(acc), value: identity(fold.kind, dtype) });
                self.folded.insert(fold.reduce, acc);
                self.skipped.push(fold.next);
                carried.push(acc);
            } else {
                let frag = self.new_tile(*inner);
                self.copy(frag, init, out);
                carried.push(frag);
            }
        }
        let outer_masks = self.masks.clone();
        let mut body = Vec::new();
        self.block(&f.body, &mut body)?;
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
        for (i, fold) in folds.iter().enumerate() {
            let Some(fold) = fold else {
                self.tiles.insert(f.results[i], carried[i]);
                continue;
            };
            let init = self.get(f.carry[i].1)?;
            let sum = self.frag(self.dtype(fold.reduce), self.extent(fold.reduce));
            out.push(Stmt::Reduce {
                dst: whole(sum),
                kind: fold.kind,
                src: whole(carried[i]),
                accumulate: false,
            });
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
        let TileOp::Reduce { kind, x, .. } = definition(reduce)? else { return None };
        let once =
            |tile| uses(&f.body, tile) + f.yields.iter().filter(|y| **y == tile).count() == 1;
        let plane = self.extent(*x) == Extent::Tile && self.extent(reduce) != Extent::Tile;
        (op == combine(*kind) && plane && once(inner) && once(reduce) && once(next))
            .then_some(Folded { reduce, next, kind: *kind, x: *x })
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

    fn map(
        &mut self,
        id: TileId,
        func: &Func,
        args: &[Operand],
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let mut operands = Vec::new();
        let extent = self.extent(id);
        for arg in args {
            let frag = self.get(arg.tile)?;
            let given = self.frags[frag].extent;
            if extent != Extent::Tile && given != extent {
                return Err(Error::unsupported(format!(
                    "an operand {} of a map to {} on a GPU",
                    self.kernel.ty(arg.tile),
                    self.kernel.ty(id)
                )));
            }
            operands.push(whole(frag));
        }
        let dst = whole(self.new_tile(id));
        out.push(Stmt::Map { dst, func: func.clone(), args: operands });
        Ok(())
    }

    /// The tile with the identity from `limit` on along one direction.
    fn below(
        &mut self,
        x: FragId,
        along: Direction,
        kind: ReduceKind,
        limit: &Dim,
        out: &mut Vec<Stmt>,
    ) -> FragId {
        let (extent, axis, name) = match along {
            Direction::Row => (Extent::PerRow, 0, "rows"),
            Direction::Col => (Extent::PerCol, 1, "columns"),
        };
        let key = format!("{name} {limit}");
        let mask = match self.masks.get(&key) {
            Some(mask) => *mask,
            None => {
                let mask = self.frag(DType::I32, extent);
                let start = Dim::new(0) - limit;
                out.push(Stmt::Iota { dst: whole(mask), axis, start });
                self.masks.insert(key, mask);
                mask
            }
        };
        let dtype = self.frags[x].dtype;
        let mut f = FuncBuilder::new();
        let value = f.param("x", dtype);
        let at = f.param("behind", DType::I32);
        let zero = f.constant_int(0, DType::I32);
        let inside = f.op(Op::Lt, &[at, zero]);
        let rest = f.value(identity(kind, dtype), dtype);
        let result = f.op(Op::Select, &[inside, value, rest]);
        let dst = self.frag(dtype, Extent::Tile);
        out.push(Stmt::Map {
            dst: whole(dst),
            func: f.finish(result),
            args: vec![whole(x), whole(mask)],
        });
        dst
    }

    /// A reduction's operand as a tile of the plane, what does not count replaced.
    fn reduce_operand(
        &mut self,
        x: TileId,
        axis: usize,
        kind: ReduceKind,
        limit: Option<&Dim>,
        out: &mut Vec<Stmt>,
    ) -> Result<FragId> {
        let mut frag = self.get(x)?;
        if self.frags[frag].extent != Extent::Tile {
            let dst = self.frag(self.dtype(x), Extent::Tile);
            self.copy(dst, frag, out);
            frag = dst;
        }
        let all = &self.kernel.ty(x).shape[axis];
        let counts_all =
            |l: &Dim| l == all || l.as_const().zip(all.as_const()).is_some_and(|(l, a)| l >= a);
        match limit {
            Some(limit) if !counts_all(limit) => {
                let along = self.directions.of(x)[axis].unwrap_or(Direction::Col);
                Ok(self.below(frag, along, kind, limit, out))
            }
            _ => Ok(frag),
        }
    }

    fn operation(&mut self, id: TileId, op: &TileOp, out: &mut Vec<Stmt>) -> Result<()> {
        if self.skipped.contains(&id) {
            return Ok(());
        }
        match op {
            TileOp::Full(value) => {
                let dst = whole(self.new_tile(id));
                out.push(Stmt::Fill { dst, value: *value });
            }
            TileOp::Load { param, index, steps, fill } => {
                let long = long_axes(self.kernel, id);
                if long.iter().any(|a| steps[*a] != 1) {
                    return Err(Error::unsupported("a strided load on a GPU"));
                }
                let axes = (
                    self.directions.axis(id, Direction::Row),
                    self.directions.axis(id, Direction::Col),
                );
                let vector = self.run(*param, axes.1, index);
                let dst = whole(self.new_tile(id));
                let (param, at, fill) = (*param, index.clone(), *fill);
                out.push(Stmt::Load { dst, param, at, axes, fill, vector });
            }
            TileOp::Map { func, args } => self.map(id, func, args, out)?,
            TileOp::Broadcast(arg) => {
                let func = Func::identity(self.dtype(id));
                self.map(id, &func, std::slice::from_ref(arg), out)?;
            }
            TileOp::Reduce { kind, x, axis, limit } => {
                if self.directions.of(*x)[*axis].is_none() && limit.is_none() {
                    // One element.
                    let frag = self.get(*x)?;
                    self.tiles.insert(id, frag);
                    return Ok(());
                }
                let src = self.reduce_operand(*x, *axis, *kind, limit.as_ref(), out)?;
                if let Some(acc) = self.folded.get(&id).copied() {
                    out.push(Stmt::Map {
                        dst: whole(acc),
                        func: Func::binary(combine(*kind), self.dtype(*x)),
                        args: vec![whole(acc), whole(src)],
                    });
                    return Ok(());
                }
                let dst = whole(self.new_tile(id));
                out.push(Stmt::Reduce { dst, kind: *kind, src: whole(src), accumulate: false });
            }
            TileOp::Permute { x, .. } => {
                let frag = self.get(*x)?;
                self.tiles.insert(id, frag);
            }
            TileOp::Reshape(x) => {
                let extent = |tile| -> Result<Vec<u32>> {
                    Ok(extents(self.kernel, tile)?.into_iter().filter(|e| *e != 1).collect())
                };
                if extent(*x)? != extent(id)? {
                    return Err(Error::unsupported(format!(
                        "a reshape of {} to {} on a GPU",
                        self.kernel.ty(*x),
                        self.kernel.ty(id)
                    )));
                }
                let frag = self.get(*x)?;
                self.tiles.insert(id, frag);
            }
            TileOp::Iota { axis, start } => {
                let row =
                    self.directions.of(id).get(*axis).copied().flatten() == Some(Direction::Row);
                let single = self.directions.of(id).get(*axis).copied().flatten().is_none();
                if single {
                    return self.scalar(id, start, out);
                }
                let dst = whole(self.new_tile(id));
                out.push(Stmt::Iota { dst, axis: usize::from(!row), start: start.clone() });
            }
            TileOp::Gather { .. } => return Err(Error::unsupported("a gather on a GPU")),
            TileOp::ArgReduce { .. } => {
                return Err(Error::unsupported("the position of an extreme on a GPU"));
            }
            TileOp::Scan { .. } => return Err(Error::unsupported("a scan on a GPU")),
            TileOp::Random { .. } => return Err(Error::unsupported("random numbers on a GPU")),
            TileOp::Mma { .. } => return Err(Error::bug("a product among lines")),
        }
        Ok(())
    }

    /// A size as data: `start` itself, which is the start of an iota less its position.
    fn scalar(&mut self, id: TileId, start: &Dim, out: &mut Vec<Stmt>) -> Result<()> {
        let dtype = self.dtype(id);
        let dst = self.new_tile(id);
        let extent = self.frags[dst].extent;
        if extent == Extent::Tile {
            return Err(Error::unsupported("a tile filled with a size on a GPU"));
        }
        let axis = usize::from(extent == Extent::PerCol);
        let (zero, first) = (self.frag(dtype, extent), self.frag(dtype, extent));
        out.push(Stmt::Iota { dst: whole(zero), axis, start: Dim::new(0) });
        out.push(Stmt::Iota { dst: whole(first), axis, start: start.clone() });
        let func = Func::binary(Op::Sub, dtype);
        out.push(Stmt::Map { dst: whole(dst), func, args: vec![whole(first), whole(zero)] });
        Ok(())
    }
}

/// How often steps of a block read a tile, nested blocks included.
fn uses(block: &Block, tile: TileId) -> usize {
    let is = |t: &TileId| usize::from(*t == tile);
    block
        .stmts
        .iter()
        .map(|stmt| match stmt {
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
                TileOp::Full(_)
                | TileOp::Load { .. }
                | TileOp::Iota { .. }
                | TileOp::Random { .. } => 0,
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
        })
        .sum()
}
