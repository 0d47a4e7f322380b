//! Single operations of programs without products, as steps on registers in lines.

use crate::axes::{Direction, long_axes};
use crate::lines::{Lines, aligned, whole};
use crate::streams::extents;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Cond, Extent, FragId, LineStep, Stmt, identity};
use tilewright_expr::{ExprId, Func, FuncBuilder, Node, Op, Value};
use tilewright_layout::Dim;
use tilewright_tile::{Compare, Operand, ParamId, ReduceKind, TileId, TileOp};

/// Shared memory that a transposed load may use.
const TURN_BYTES: u32 = 32 << 10;

impl Lines<'_> {
    pub(crate) fn axes(&self, tile: TileId) -> (Option<usize>, Option<usize>) {
        let axis = |d| self.directions.axis(tile, d);
        (axis(Direction::Row), axis(Direction::Col))
    }

    /// Coordinates of this block's part of a tile.
    pub(crate) fn here(
        &self,
        at: &[Dim],
        axes: (Option<usize>, Option<usize>),
        steps: (i64, i64),
    ) -> Vec<Dim> {
        let mut at = at.to_vec();
        for (axis, direction, step) in
            [(axes.0, Direction::Row, steps.0), (axes.1, Direction::Col, steps.1)]
        {
            if let Some(axis) = axis {
                at[axis] = &at[axis] + self.start(direction) * step;
            }
        }
        at
    }

    /// Neighbouring columns that one access may take: they lie aligned in memory.
    pub(crate) fn run(&self, param: ParamId, axis: Option<usize>, at: &[Dim]) -> u32 {
        let p = &self.kernel.params[param];
        let Some(axis) = axis else { return 1 };
        if !p.layout.axes[axis].stride.is(1) {
            return 1;
        }
        let widest = (128 / p.dtype.bits()).max(1);
        let most = self.schedule.vector.min(self.schedule.lines.vector).min(widest).max(1);
        if self.schedule.lines.ragged {
            return self.run_in_memory(param, axis, at, most);
        }
        aligned(&p.layout.offset, aligned(&at[axis], most))
    }

    /// Neighbours that one access may take where lines begin anywhere: `most` for a tile that begins as much before a multiple
    /// of the access as its line lies behind one, which is aligned in memory then.
    fn run_in_memory(&self, param: ParamId, axis: usize, at: &[Dim], most: u32) -> u32 {
        let layout = &self.kernel.params[param].layout;
        let rest = |d: &Dim| d.as_const().map(|n| n.rem_euclid(most.into()));
        let Some(offset) = rest(&layout.offset) else { return 1 };
        let mut line = Dim::new(offset);
        for (i, a) in layout.axes.iter().enumerate().filter(|(i, _)| *i != axis) {
            let Some(stride) = rest(&a.stride) else { return 1 };
            line = line + &at[i] * stride;
        }
        let begins = &at[axis] + line.modulo(&Dim::from(most as usize));
        if aligned(&begins, most) == most { most } else { 1 }
    }

    /// Neighbouring rows that one access may take, when a tile is better read along rows and turned.
    pub(crate) fn turned(
        &self,
        id: TileId,
        param: ParamId,
        axes: (Option<usize>, Option<usize>),
        at: &[Dim],
    ) -> Option<u32> {
        let (Some(row), Some(col)) = axes else { return None };
        let (p, bits) = (&self.kernel.params[param], self.kernel.params[param].dtype.bits());
        let unit = 128 / bits;
        let tile = self.extents.of(id) == Extent::Tile;
        let along = p.layout.axes[row].stride.is(1) && !p.layout.axes[col].stride.is(1);
        let plain = p.layout.axes.iter().all(|a| a.block.is_none());
        let fits = self.rows.is_multiple_of(unit)
            && (self.rows / unit).is_power_of_two()
            && self.rows * self.cols * bits / 8 <= TURN_BYTES;
        if !(tile && along && plain && fits && (8..=64).contains(&bits)) {
            return None;
        }
        let most = self.schedule.vector.min(unit).max(1);
        Some(aligned(&p.layout.offset, aligned(&at[row], most)))
    }

    pub(crate) fn store(
        &mut self,
        param: ParamId,
        index: &[Dim],
        value: TileId,
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let src = whole(self.get(value)?);
        let axes = self.axes(value);
        let at = self.here(index, axes, (1, 1));
        let vector = self.run(param, axes.1, &at);
        let same = self.same_in_all_blocks(axes);
        self.by_one_block(vec![Stmt::Store { param, at, axes, src, vector }], same, out);
        Ok(())
    }

    /// Whether what is stored along these axes is the same for every block of a cluster.
    fn same_in_all_blocks(&self, axes: (Option<usize>, Option<usize>)) -> bool {
        match self.shared {
            Some(Direction::Row) => axes.0.is_none(),
            Some(Direction::Col) => axes.1.is_none(),
            None => false,
        }
    }

    pub(crate) fn atomic_add(
        &mut self,
        param: ParamId,
        index: &[Dim],
        value: TileId,
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let frag = self.get(value)?;
        let axes = self.axes(value);
        let extent = self.frags[frag].extent;
        let once = match extent {
            Extent::Tile => {
                axes.0.is_some() == (self.rows > 1) && axes.1.is_some() == (self.cols > 1)
            }
            Extent::PerRow => axes.0.is_some() == (self.rows > 1),
            Extent::PerCol => axes.1.is_some() == (self.cols > 1),
        };
        if !once {
            return Err(Error::unsupported("an atomic addition of a repeated tile on a GPU"));
        }
        let at = self.here(index, axes, (1, 1));
        let same = self.same_in_all_blocks(axes);
        let step = Stmt::Line(LineStep::Add { param, at, axes, src: whole(frag) });
        self.by_one_block(vec![step], same, out);
        Ok(())
    }

    fn map(
        &mut self,
        id: TileId,
        func: &Func,
        args: &[Operand],
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let args = args.iter().map(|a| Ok(whole(self.get(a.tile)?))).collect::<Result<_>>()?;
        let dst = whole(self.new_tile(id));
        out.push(Stmt::Map { dst, func: func.clone(), args });
        Ok(())
    }

    /// The tile with the identity from `limit` on along a direction.
    fn below(
        &mut self,
        x: FragId,
        kind: ReduceKind,
        (direction, limit): (Direction, &Dim),
        out: &mut Vec<Stmt>,
    ) -> FragId {
        let key = format!("{direction:?} {limit}");
        let mask = match self.masks.get(&key) {
            Some(mask) => *mask,
            None => {
                let row = direction == Direction::Row;
                let mask = self.frag(DType::I32, if row { Extent::PerRow } else { Extent::PerCol });
                let start = self.start(direction) - limit;
                out.push(Stmt::Iota { dst: whole(mask), axis: usize::from(!row), start });
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

    /// A tile of the plane, repeated where it has no such axis.
    fn plane(&mut self, x: TileId, out: &mut Vec<Stmt>) -> Result<FragId> {
        let frag = self.get(x)?;
        if self.frags[frag].extent == Extent::Tile {
            return Ok(frag);
        }
        let dst = self.frag(self.dtype(x), Extent::Tile);
        self.copy(dst, frag, out);
        Ok(dst)
    }

    /// A limit that leaves something out, as far as one can tell without the sizes.
    fn real_limit<'l>(&self, x: TileId, axis: usize, limit: Option<&'l Dim>) -> Option<&'l Dim> {
        let all = &self.kernel.ty(x).shape[axis];
        let behind = |l: &Dim| (l - all).bounds(&|name| self.ranges.get(name).copied()).min;
        limit.filter(|l| behind(l) < 0)
    }

    /// A reduction over an axis of one element: the element, or what a reduction of nothing gives.
    fn single(
        &mut self,
        id: TileId,
        x: TileId,
        (kind, limit): (ReduceKind, Option<&Dim>),
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let frag = self.get(x)?;
        let Some(limit) = limit else {
            self.tiles.insert(id, frag);
            return Ok(());
        };
        let dst = self.new_tile(id);
        let mut then = Vec::new();
        self.copy(dst, frag, &mut then);
        let value = identity(kind, self.dtype(id));
        let otherwise = vec![Stmt::Fill { dst: whole(dst), value }];
        let cond = Cond { lhs: Dim::new(1), compare: Compare::Le, rhs: limit.clone() };
        out.push(Stmt::If { cond, then, otherwise });
        Ok(())
    }

    fn reduce_op(
        &mut self,
        id: TileId,
        (kind, x, axis): (ReduceKind, TileId, usize),
        limit: Option<&Dim>,
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let limit = self.real_limit(x, axis, limit);
        let Some(direction) = self.directions.of(x)[axis] else {
            return self.single(id, x, (kind, limit), out);
        };
        let folded = self.folded.get(&id).copied();
        if let (Some(acc), Some([a, b])) = (folded, self.dots.get(&id).copied()) {
            let (a, b) = (whole(self.get(a)?), whole(self.get(b)?));
            out.push(Stmt::Line(LineStep::Dot { acc: whole(acc), a, b }));
            return Ok(());
        }
        let line = folded.is_some_and(|acc| self.frags[acc].extent != Extent::Tile);
        let mut src = if line { self.get(x)? } else { self.plane(x, out)? };
        if let Some(limit) = limit {
            src = self.below(src, kind, (direction, limit), out);
        }
        if let Some(acc) = folded {
            if let (ReduceKind::Sum, Some(step)) = (kind, product_added(out.last(), src, acc)) {
                out.push(step);
                return Ok(());
            }
            let func = Func::binary(crate::lines::combine(kind), self.dtype(x));
            out.push(Stmt::Map { dst: whole(acc), func, args: vec![whole(acc), whole(src)] });
            return Ok(());
        }
        let dst = self.new_tile(id);
        self.reduce(dst, kind, src, out)
    }

    fn load(
        &mut self,
        id: TileId,
        (param, index): (ParamId, &[Dim]),
        (steps, fill): (&[i64], Value),
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let axes = self.axes(id);
        let step = |axis: Option<usize>| axis.map_or(1, |a| steps[a]);
        let steps = (step(axes.0), step(axes.1));
        let at = self.here(index, axes, steps);
        let frag = self.new_tile(id);
        let dst = whole(frag);
        if steps != (1, 1) {
            let vector = if steps.1 == 1 { self.run(param, axes.1, &at) } else { 1 };
            let rows = None;
            let step = LineStep::Pick { dst, param, at, axes, steps, rows, fill, vector };
            out.push(Stmt::Line(step));
            return Ok(());
        }
        if let (Some(vector), (Some(row), Some(col))) = (self.turned(id, param, axes, &at), axes) {
            let step = LineStep::Turn { dst, param, at, axes: (row, col), fill, vector };
            out.push(Stmt::Line(step));
            return Ok(());
        }
        let vector = self.run(param, axes.1, &at);
        let plain = Stmt::Load { dst, param, at, axes, fill, vector };
        out.push(self.recalled((param, index, fill), (id, frag), plain));
        Ok(())
    }

    fn gather(
        &mut self,
        id: TileId,
        (param, axis, rows): (ParamId, usize, TileId),
        (index, fill): (&[Dim], Value),
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        let free = |a: Option<usize>| a.filter(|a| *a != axis);
        let axes = self.axes(id);
        let axes = (free(axes.0), free(axes.1));
        let at = self.here(index, axes, (1, 1));
        let picked = self.get(rows)?;
        let dst = whole(self.new_tile(id));
        let vector = self.run(param, axes.1, &at);
        let (steps, rows) = ((1, 1), Some((axis, whole(picked))));
        out.push(Stmt::Line(LineStep::Pick { dst, param, at, axes, steps, rows, fill, vector }));
        Ok(())
    }

    /// The length of the lines that a program reads and writes, when it is the same everywhere: what lies behind
    /// is not data. From the stores of the tile's axis.
    fn line_length(&self) -> Option<Dim> {
        let mut found: Option<Dim> = None;
        for (param, index, value) in self.stores() {
            let Some(axis) = self.directions.axis(value, Direction::Col) else { continue };
            let left = &self.kernel.params[param].layout.axes[axis].extent - &index[axis];
            if found.get_or_insert_with(|| left.clone()) != &left {
                return None;
            }
        }
        found
    }

    fn scan(
        &mut self,
        id: TileId,
        (kind, x, axis): (ReduceKind, TileId, usize),
        (exclusive, reverse): (bool, bool),
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        if self.directions.of(x)[axis].is_none() {
            let frag = self.get(x)?;
            if exclusive {
                let dst = self.new_tile(id);
                out.push(Stmt::Fill { dst: whole(dst), value: identity(kind, self.dtype(id)) });
            } else {
                self.tiles.insert(id, frag);
            }
            return Ok(());
        }
        if self.shared.is_some() {
            return Err(Error::unsupported("a scan across a cluster"));
        }
        let mut src = self.plane(x, out)?;
        if reverse {
            let limit = self.line_length().ok_or_else(|| {
                Error::unsupported("a scan from the end of lines of several lengths on a GPU")
            })?;
            src = self.below(src, kind, (Direction::Col, &limit), out);
        }
        let (dst, src) = (whole(self.new_tile(id)), whole(src));
        out.push(Stmt::Line(LineStep::Scan { dst, kind, src, exclusive, reverse }));
        Ok(())
    }

    fn arg_reduce(
        &mut self,
        id: TileId,
        (kind, x, axis): (ReduceKind, TileId, usize),
        (limit, last): (Option<&Dim>, bool),
        out: &mut Vec<Stmt>,
    ) -> Result<()> {
        if self.directions.of(x)[axis].is_none() {
            let dst = whole(self.new_tile(id));
            out.push(Stmt::Fill { dst, value: Value::Int(0) });
            return Ok(());
        }
        if self.shared.is_some() {
            return Err(Error::unsupported("the position of an extreme across a cluster"));
        }
        let src = whole(self.plane(x, out)?);
        let all = Dim::from(self.cols as usize);
        let limit = self.real_limit(x, axis, limit).cloned().unwrap_or(all);
        let dst = whole(self.new_tile(id));
        out.push(Stmt::Line(LineStep::ArgReduce { dst, kind, src, limit, last }));
        Ok(())
    }

    fn random(&mut self, id: TileId, seed: u64, start: &Dim, out: &mut Vec<Stmt>) -> Result<()> {
        let shape = extents(self.kernel, id)?;
        let step = |axis: Option<usize>| {
            axis.map_or(0, |a| shape[a + 1..].iter().map(|e| i64::from(*e)).product::<i64>())
        };
        let axes = self.axes(id);
        let steps = (step(axes.0), step(axes.1));
        let start =
            start + self.start(Direction::Row) * steps.0 + self.start(Direction::Col) * steps.1;
        let dst = whole(self.new_tile(id));
        out.push(Stmt::Line(LineStep::Random { dst, seed, start, steps }));
        Ok(())
    }

    fn iota(&mut self, id: TileId, axis: usize, start: &Dim, out: &mut Vec<Stmt>) -> Result<()> {
        let Some(direction) = self.directions.of(id).get(axis).copied().flatten() else {
            return self.scalar(id, start, out);
        };
        let row = direction == Direction::Row;
        let start = start + self.start(direction);
        let dst = whole(self.new_tile(id));
        out.push(Stmt::Iota { dst, axis: usize::from(!row), start });
        Ok(())
    }

    pub(crate) fn operation(&mut self, id: TileId, op: &TileOp, out: &mut Vec<Stmt>) -> Result<()> {
        if self.skipped.contains(&id) {
            return Ok(());
        }
        match op {
            TileOp::Full(value) => {
                let dst = whole(self.new_tile(id));
                out.push(Stmt::Fill { dst, value: *value });
            }
            TileOp::Load { param, index, steps, fill } => {
                self.load(id, (*param, index), (steps, *fill), out)?;
            }
            TileOp::Gather { param, axis, rows, index, fill } => {
                self.gather(id, (*param, *axis, *rows), (index, *fill), out)?;
            }
            TileOp::Map { func, args } => self.map(id, func, args, out)?,
            TileOp::Broadcast(arg) => {
                let func = Func::identity(self.dtype(id));
                self.map(id, &func, std::slice::from_ref(arg), out)?;
            }
            TileOp::Reduce { kind, x, axis, limit } => {
                self.reduce_op(id, (*kind, *x, *axis), limit.as_ref(), out)?;
            }
            TileOp::ArgReduce { kind, x, axis, limit, last } => {
                self.arg_reduce(id, (*kind, *x, *axis), (limit.as_ref(), *last), out)?;
            }
            TileOp::Scan { kind, x, axis, exclusive, reverse } => {
                self.scan(id, (*kind, *x, *axis), (*exclusive, *reverse), out)?;
            }
            TileOp::Permute { x, .. } => {
                let frag = self.get(*x)?;
                self.tiles.insert(id, frag);
            }
            TileOp::Reshape(x) => {
                let long = |tile: TileId| -> Result<Vec<u32>> {
                    let shape = extents(self.kernel, tile)?;
                    Ok(long_axes(self.kernel, tile).into_iter().map(|a| shape[a]).collect())
                };
                if long(*x)? != long(id)? {
                    return Err(Error::unsupported(format!(
                        "a reshape of {} to {} on a GPU",
                        self.kernel.ty(*x),
                        self.kernel.ty(id)
                    )));
                }
                let frag = self.get(*x)?;
                self.tiles.insert(id, frag);
            }
            TileOp::Iota { axis, start } => self.iota(id, *axis, start, out)?,
            TileOp::Random { seed, start } => self.random(id, *seed, start, out)?,
            TileOp::Mma { .. } => return Err(Error::bug("a product among lines")),
        }
        Ok(())
    }

    /// A size as data: `start` itself, which is the start of an iota less its position.
    fn scalar(&mut self, id: TileId, start: &Dim, out: &mut Vec<Stmt>) -> Result<()> {
        let dtype = self.dtype(id);
        let dst = self.new_tile(id);
        let extent = self.frags[dst].extent;
        let axis = usize::from(extent != Extent::PerRow);
        let (zero, first) = (self.frag(dtype, extent), self.frag(dtype, extent));
        out.push(Stmt::Iota { dst: whole(zero), axis, start: Dim::new(0) });
        out.push(Stmt::Iota { dst: whole(first), axis, start: start.clone() });
        let func = Func::binary(Op::Sub, dtype);
        out.push(Stmt::Map { dst: whole(dst), func, args: vec![whole(first), whole(zero)] });
        Ok(())
    }
}

/// `acc + src` as a multiply-add, where the last step computed `src` as a product of f32.
fn product_added(last: Option<&Stmt>, src: FragId, acc: FragId) -> Option<Stmt> {
    let Some(Stmt::Map { dst, func, args }) = last else { return None };
    let Node::Op(Op::Mul, factors) = func.node(func.result()) else { return None };
    if dst.frag != src || dst.cols.is_some() || func.dtype() != DType::F32 {
        return None;
    }
    let mut b = FuncBuilder::new();
    let params: Vec<ExprId> = func.params().iter().map(|p| b.param(&p.name, p.dtype)).collect();
    let sum = b.param("sum", DType::F32);
    let nodes = b.inline_nodes(func, &params);
    let (x, y) = (nodes[factors[0].index()], nodes[factors[1].index()]);
    let result = b.op(Op::Fma, &[x, y, sum]);
    let args = args.iter().cloned().chain([whole(acc)]).collect();
    Some(Stmt::Map { dst: whole(acc), func: b.finish(result), args })
}
