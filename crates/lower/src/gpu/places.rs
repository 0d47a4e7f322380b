//! Elements at computed places, as kernels of a GPU: gathers by elements and by coordinates, borders that are mirrored or
//! repeated, scatters; and copies of windows.
//!
//! A gather is one axis: element `p` of the row-major result is taken apart into coordinates, these become the offset of
//! an element of the row-major operand, and that is a gather along its one axis. A coordinate outside its axis reads
//! zero, as [`Op::Gather`] does.
//!
//! A scatter goes the other way round: every block has a tile of the result in registers, goes over all updates in their
//! order, and takes those that are meant for its elements. So the last of several writes to one place stays, sums are formed in
//! the order of the updates, every run gives the same bits, and nothing is atomic. The price is that each element looks at
//! each update that may be meant for it: `ScatterElements` at those of its own line, `ScatterNd` at all.

use crate::block::KernelParts;
use crate::lowering::{Lowering, reduce_kind};
use crate::place::Place;
use crate::rows::combine_op;
use tilewright_base::{DType, Result};
use tilewright_expr::{ExprId, FuncBuilder, Op as ExprOp, Value};
use tilewright_graph::{NodeId, Op, PadMode, ReduceKind, ScatterKind};
use tilewright_layout::{Axis, Dim, Layout, numel};
use tilewright_plan::{BufferId, Note};
use tilewright_tile::{Operand, TileId};

/// Elements of a tile, for the plan's own schedule; those of a device are picked when sizes are known.
const TILE: i64 = 1024;
/// Rows of a tile of a scatter.
const ROWS: i64 = 8;

/// An elementwise function in the making, with the tiles that it reads.
struct Formula {
    f: FuncBuilder,
    args: Vec<Operand>,
    /// The type of positions and sizes.
    dtype: DType,
}

impl Formula {
    /// With positions of 64 bits.
    fn new() -> Formula {
        Formula { f: FuncBuilder::new(), args: Vec::new(), dtype: DType::I64 }
    }

    /// With positions of 32 bits, for what is known to have so few elements: divisions take a third of the instructions.
    fn short() -> Formula {
        Formula { dtype: DType::I32, ..Formula::new() }
    }

    /// A tile whose axes run along these of the result.
    fn tile(&mut self, k: &KernelParts, tile: TileId, along: &[usize]) -> ExprId {
        self.args.push(Operand { tile, along: along.to_vec() });
        self.f.param("x", k.b.ty(tile).dtype)
    }

    /// A tile as positions.
    fn integer(&mut self, k: &KernelParts, tile: TileId, along: &[usize]) -> ExprId {
        let x = self.tile(k, tile, along);
        self.f.cast(x, self.dtype)
    }

    /// A size as a position.
    fn size(&mut self, k: &mut KernelParts, size: &Dim) -> ExprId {
        match size.as_const() {
            Some(value) => self.f.constant_int(value, self.dtype),
            None => {
                let tile = k.b.iota(self.dtype, 0, size.clone(), vec![Dim::new(1)]);
                self.tile(k, tile, &[0])
            }
        }
    }

    fn number(&mut self, value: i64) -> ExprId {
        self.f.constant_int(value, self.dtype)
    }

    fn op(&mut self, op: ExprOp, a: ExprId, b: ExprId) -> ExprId {
        self.f.op(op, &[a, b])
    }

    /// `sum + x * times`, without what is nothing.
    fn add_times(&mut self, k: &mut KernelParts, sum: ExprId, x: ExprId, times: &Dim) -> ExprId {
        let part = match times.is(1) {
            true => x,
            false => {
                let times = self.size(k, times);
                self.op(ExprOp::Mul, x, times)
            }
        };
        self.op(ExprOp::Add, sum, part)
    }

    /// The row-major coordinates of position `p` under these extents.
    fn coordinates(&mut self, k: &mut KernelParts, p: ExprId, extents: &[Dim]) -> Vec<ExprId> {
        let mut rest = p;
        let mut found = vec![p; extents.len()];
        for axis in (0..extents.len()).rev() {
            if extents[axis].is(1) {
                found[axis] = self.number(0);
                continue;
            }
            if extents[..axis].iter().all(|d| d.is(1)) {
                found[axis] = rest;
                continue;
            }
            let extent = self.size(k, &extents[axis]);
            let outer = self.op(ExprOp::Div, rest, extent);
            let whole = self.op(ExprOp::Mul, outer, extent);
            found[axis] = self.op(ExprOp::Sub, rest, whole);
            rest = outer;
        }
        found
    }

    /// A coordinate counted from the front, and whether it lies on its axis.
    fn on_axis(&mut self, k: &mut KernelParts, i: ExprId, extent: &Dim) -> (ExprId, ExprId) {
        let (zero, extent) = (self.number(0), self.size(k, extent));
        let from_end = self.op(ExprOp::Add, i, extent);
        let negative = self.op(ExprOp::Lt, i, zero);
        let i = self.f.op(ExprOp::Select, &[negative, from_end, i]);
        let (above, below) = (self.op(ExprOp::Le, zero, i), self.op(ExprOp::Lt, i, extent));
        (i, self.op(ExprOp::And, above, below))
    }

    fn finish(self, k: &mut KernelParts, result: ExprId, shape: Vec<Dim>) -> TileId {
        k.b.map(self.f.finish(result), self.args, shape)
    }
}

/// All elements of a shape as one axis.
fn flat(shape: &[Dim]) -> Layout {
    Layout::row_major(&[numel(shape)])
}

/// The distance of neighbours along each axis of row-major memory.
fn strides(shape: &[Dim]) -> Vec<Dim> {
    Layout::row_major(shape).axes.into_iter().map(|a| a.stride).collect()
}

/// A row-major buffer and the shape of what it holds.
type Tensor<'a> = (BufferId, &'a [Dim]);

/// A kernel over the elements of a result, as one axis.
struct Elements {
    k: KernelParts,
    tiles: Vec<(String, i64)>,
    /// First element of the tile, how many it has, and the positions of all.
    start: Dim,
    tile: Dim,
    position: TileId,
}

/// A copy of windows: for each image and channel the window's element of each tap and output.
pub(super) struct WindowCopy<'a> {
    /// The images, padded: `[N, C, ...]`.
    pub(super) from: &'a Place,
    /// Where to, dense: `[N, C, taps..., outputs...]`.
    pub(super) to: BufferId,
    pub(super) images: &'a Dim,
    pub(super) channels: i64,
    pub(super) taps: &'a [i64],
    pub(super) outputs: &'a [Dim],
    pub(super) dilations: &'a [i64],
    pub(super) strides: &'a [i64],
}

impl Lowering<'_> {
    /// Copies windows of a known size, a block for an image's channel: its taps and outputs are one axis, and their places are
    /// computed. False: outputs of unknown size.
    pub(super) fn window_copy(&mut self, w: &WindowCopy<'_>, note: Note) -> Result<bool> {
        let axes = &w.from.layout.axes;
        let plain = axes.iter().all(|a| a.block.is_none());
        let steps: Option<Vec<i64>> = axes[2..].iter().map(|a| a.stride.as_const()).collect();
        let sizes: Option<Vec<i64>> = axes[2..].iter().map(|a| a.extent.as_const()).collect();
        let known = w.outputs.iter().all(|d| d.as_const().is_some());
        let (Some(steps), Some(sizes)) = (steps, sizes) else { return Ok(false) };
        // The last element of a channel, counted from its first.
        let last = steps.iter().zip(&sizes).map(|(step, size)| step.saturating_mul(size - 1));
        let span = last.fold(1i64, i64::saturating_add);
        let mut inner: Vec<Dim> = w.taps.iter().map(|&t| Dim::new(t)).collect();
        inner.extend(w.outputs.iter().cloned());
        let count = numel(&inner);
        let few = |n: i64| (1..=1 << 30).contains(&n);
        let fits = plain
            && known
            && few(span)
            && count.as_const().is_some_and(few)
            && steps.iter().all(|s| *s >= 0);
        if !fits {
            return Ok(false);
        }
        let [from, to] = [w.from.buffer, w.to].map(|b| self.plan.buffers[b].dtype);
        let channels = Dim::new(w.channels);
        let mut k = KernelParts::new("windows", &self.graph.symbols);
        let (tile, name) = k.tile("BN");
        let image = k.grid("n", w.images.clone());
        let channel = k.grid("c", channels.clone());
        let start = k.grid("p", count.ceil_div(&tile)) * &tile;
        let position = k.b.iota(DType::I32, 0, start.clone(), vec![tile.clone()]);
        let mut f = Formula::short();
        let p = f.tile(&k, position, &[0]);
        let at = f.coordinates(&mut k, p, &inner);
        let rank = w.taps.len();
        let mut place = f.number(0);
        for i in 0..rank {
            place = f.add_times(&mut k, place, at[i], &Dim::new(w.dilations[i] * steps[i]));
            place = f.add_times(&mut k, place, at[rank + i], &Dim::new(w.strides[i] * steps[i]));
        }
        let place = f.finish(&mut k, place, vec![tile.clone()]);
        let axis = |extent: Dim, stride: Dim| Axis { extent, stride, block: None };
        let seen = Layout {
            axes: vec![
                axis(w.images.clone(), axes[0].stride.clone()),
                axis(channels.clone(), axes[1].stride.clone()),
                axis(Dim::new(span), Dim::new(1)),
            ],
            offset: w.from.layout.offset.clone(),
        };
        let x = k.input(w.from.buffer, from, seen);
        let y = k.output(w.to, to, Layout::row_major(&[w.images.clone(), channels, count]));
        let one = Dim::new(1);
        let shape = vec![one.clone(), one, tile];
        let index = vec![image.clone(), channel.clone(), Dim::new(0)];
        let mut picked = k.b.gather(x, 2, place, index, shape.clone());
        if from != to {
            let arg = k.b.plain(picked);
            picked = k.b.map(tilewright_expr::Func::cast(from, to), vec![arg], shape);
        }
        k.b.store(y, vec![image, channel, start], picked);
        let knobs = self.knobs();
        self.launch(k, vec![(name, TILE)], knobs, note)?;
        Ok(true)
    }

    fn elements(&self, id: NodeId, shape: &[Dim]) -> Elements {
        let name = format!("{}_{id}", self.graph.nodes[id].op.name());
        let mut k = KernelParts::new(name, &self.graph.symbols);
        let (tile, name) = k.tile("BN");
        let start = k.grid("p", numel(shape).ceil_div(&tile)) * &tile;
        let position = k.b.iota(DType::I64, 0, start.clone(), vec![tile.clone()]);
        Elements { k, tiles: vec![(name, TILE)], start, tile, position }
    }

    /// Element `at` of `data` for every element of the result; below zero is nothing.
    fn pick(
        &mut self,
        mut e: Elements,
        (data, out): (Tensor<'_>, Tensor<'_>),
        (formula, at): (Formula, ExprId),
        note: Note,
    ) -> Result<()> {
        let at = formula.finish(&mut e.k, at, vec![e.tile.clone()]);
        let [from, to] = [data.0, out.0].map(|b| self.plan.buffers[b].dtype);
        let x = e.k.input(data.0, from, flat(data.1));
        let y = e.k.output(out.0, to, flat(out.1));
        let picked = e.k.b.gather(x, 0, at, vec![Dim::new(0)], vec![e.tile]);
        e.k.b.store(y, vec![e.start], picked);
        let knobs = self.knobs();
        self.launch(e.k, e.tiles, knobs, note)
    }

    /// A kernel for an operator that moves elements to or from computed places, between row-major buffers in the types of the
    /// model. False: it is the host's.
    pub(crate) fn places(
        &mut self,
        id: NodeId,
        (inputs, outputs): (&[BufferId], &[BufferId]),
        note: &Note,
    ) -> Result<bool> {
        if !self.on_gpu() {
            return Ok(false);
        }
        let node = &self.graph.nodes[id];
        let note = |anchor: &str| Note { anchor: anchor.to_string(), ..note.clone() };
        match (&node.op, inputs, outputs) {
            (Op::GatherElements(axis), &[x, i], &[y]) => {
                self.gather_elements(id, *axis, [x, i, y], note("gather"))?;
            }
            (Op::GatherNd { batch }, &[x, i], &[y]) => {
                self.gather_nd(id, *batch, [x, i, y], note("gather"))?;
            }
            (Op::Pad { lo, mode, .. }, &[x], &[y]) => {
                self.borders(id, (lo, mode), [x, y], note("gather"))?;
            }
            (Op::ScatterElements { axis, kind }, &[x, i, u], &[y]) if self.adds(id, *kind) => {
                self.scatter_elements(id, (*axis, *kind), [x, i, u, y], note("scatter"))?;
            }
            (Op::ScatterNd { kind }, &[x, i, u], &[y]) if self.adds(id, *kind) => {
                self.scatter_nd(id, *kind, [x, i, u, y], note("scatter"))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Truth values are set, not combined.
    fn adds(&self, id: NodeId, kind: ScatterKind) -> bool {
        let data = self.graph.nodes[id].inputs[0];
        kind == ScatterKind::Set || self.graph.dtype(data) != DType::Bool
    }

    fn gather_elements(
        &mut self,
        id: NodeId,
        axis: usize,
        [x, i, y]: [BufferId; 3],
        note: Note,
    ) -> Result<()> {
        let inputs = &self.graph.nodes[id].inputs;
        let (data, shape) = (self.graph.shape(inputs[0]), self.graph.shape(inputs[1]));
        let mut e = self.elements(id, shape);
        // Neighbouring axes that lie alike in both are one.
        let mut axes: Vec<(Dim, Dim, bool)> = Vec::new();
        for (a, stride) in strides(data).into_iter().enumerate() {
            let here = a == axis;
            match axes.last_mut() {
                Some(last) if !last.2 && !here && data[a] == shape[a] => {
                    *last = (&last.0 * &shape[a], stride, false);
                }
                _ => axes.push((shape[a].clone(), stride, here)),
            }
        }
        let indices = e.k.input(i, self.plan.buffers[i].dtype, flat(shape));
        let index = e.k.b.load(indices, vec![e.start.clone()], vec![e.tile.clone()]);
        let (mut f, k) = (Formula::new(), &mut e.k);
        let p = f.tile(k, e.position, &[0]);
        let index = f.integer(k, index, &[0]);
        let extents: Vec<Dim> = axes.iter().map(|a| a.0.clone()).collect();
        let coordinates = f.coordinates(k, p, &extents);
        let (index, inside) = f.on_axis(k, index, &data[axis]);
        let mut at = f.number(0);
        for ((_, stride, here), coordinate) in axes.iter().zip(coordinates) {
            at = f.add_times(k, at, if *here { index } else { coordinate }, stride);
        }
        let nothing = f.number(-1);
        let at = f.f.op(ExprOp::Select, &[inside, at, nothing]);
        self.pick(e, ((x, data), (y, shape)), (f, at), note)
    }

    fn gather_nd(
        &mut self,
        id: NodeId,
        batch: usize,
        [x, i, y]: [BufferId; 3],
        note: Note,
    ) -> Result<()> {
        let node = &self.graph.nodes[id];
        let (data, index) = (self.graph.shape(node.inputs[0]), self.graph.shape(node.inputs[1]));
        let shape = self.graph.shape(node.outputs[0]);
        let (depth, data_strides) = (coordinates_of(index), strides(data));
        let mut e = self.elements(id, shape);
        let run = numel(&data[batch + depth..]);
        let per_batch = numel(&index[batch..index.len() - 1]);
        let indices = e.k.input(i, self.plan.buffers[i].dtype, flat(index));
        // Which vector of coordinates, and where each of its numbers stands.
        let vector = |f: &mut Formula, e: &mut Elements| {
            let p = f.tile(&e.k, e.position, &[0]);
            f.coordinates(&mut e.k, p, &[Dim::new(2), run.clone()])[0]
        };
        let mut found = Vec::new();
        for d in 0..depth {
            let mut f = Formula::new();
            let vector = vector(&mut f, &mut e);
            let first = f.number(d as i64);
            let at = f.add_times(&mut e.k, first, vector, &Dim::from(depth));
            let at = f.finish(&mut e.k, at, vec![e.tile.clone()]);
            found.push(e.k.b.gather(indices, 0, at, vec![Dim::new(0)], vec![e.tile.clone()]));
        }
        let (mut f, k) = (Formula::new(), &mut e.k);
        let p = f.tile(k, e.position, &[0]);
        let parts = f.coordinates(k, p, &[Dim::new(2), run]);
        let mut at = parts[1];
        if batch > 0 {
            let block = f.coordinates(k, parts[0], &[Dim::new(2), per_batch])[0];
            at = f.add_times(k, at, block, &numel(&data[batch..]));
        }
        let mut inside = None;
        for (d, tile) in found.into_iter().enumerate() {
            let i = f.integer(k, tile, &[0]);
            let (i, on) = f.on_axis(k, i, &data[batch + d]);
            at = f.add_times(k, at, i, &data_strides[batch + d]);
            inside = Some(inside.map_or(on, |all| f.op(ExprOp::And, all, on)));
        }
        if let Some(inside) = inside {
            let nothing = f.number(-1);
            at = f.f.op(ExprOp::Select, &[inside, at, nothing]);
        }
        self.pick(e, ((x, data), (y, shape)), (f, at), note)
    }

    /// Borders that repeat what the operand has.
    fn borders(
        &mut self,
        id: NodeId,
        (lo, mode): (&[Dim], &PadMode),
        [x, y]: [BufferId; 2],
        note: Note,
    ) -> Result<()> {
        let node = &self.graph.nodes[id];
        let (data, shape) = (self.graph.shape(node.inputs[0]), self.graph.shape(node.outputs[0]));
        let mut e = self.elements(id, shape);
        let (mut f, k) = (Formula::new(), &mut e.k);
        let p = f.tile(k, e.position, &[0]);
        let coordinates = f.coordinates(k, p, shape);
        let (zero, one) = (f.number(0), f.number(1));
        let mut at = zero;
        for ((axis, stride), c) in strides(data).into_iter().enumerate().zip(coordinates) {
            let mut c = c;
            if data[axis] != shape[axis] || !lo[axis].is(0) {
                let (before, size) = (f.size(k, &lo[axis]), f.size(k, &data[axis]));
                let last = f.op(ExprOp::Sub, size, one);
                c = f.op(ExprOp::Sub, c, before);
                c = match mode {
                    PadMode::Wrap => f.op(ExprOp::Mod, c, size),
                    PadMode::Reflect => {
                        // Of one element the period is 0, and what is left by that is 0.
                        let period = f.op(ExprOp::Add, last, last);
                        let c = f.op(ExprOp::Mod, c, period);
                        let back = f.op(ExprOp::Sub, period, c);
                        f.op(ExprOp::Min, c, back)
                    }
                    PadMode::Edge | PadMode::Constant(_) => {
                        let c = f.op(ExprOp::Max, c, zero);
                        f.op(ExprOp::Min, c, last)
                    }
                };
            }
            at = f.add_times(k, at, c, &stride);
        }
        self.pick(e, ((x, data), (y, shape)), (f, at), note)
    }

    fn scatter_elements(
        &mut self,
        id: NodeId,
        (axis, kind): (usize, ScatterKind),
        [x, i, u, y]: [BufferId; 4],
        note: Note,
    ) -> Result<()> {
        let inputs = &self.graph.nodes[id].inputs;
        let (data, index) = (self.graph.shape(inputs[0]), self.graph.shape(inputs[1]));
        let dtype = self.graph.dtype(inputs[0]);
        let last = data.len() - 1;
        // A tile of the axis and of another one; the last is among them.
        let other = if axis == last { last.checked_sub(1) } else { Some(last) };
        let mut k = KernelParts::new(format!("scatter_{id}"), &self.graph.symbols);
        let (mut tiles, mut start, mut len) = (Vec::new(), Vec::new(), Vec::new());
        let mut plane = Vec::new();
        for (a, extent) in data.iter().enumerate() {
            if a != axis && Some(a) != other {
                start.push(k.grid(&format!("g{a}"), extent.clone()));
                len.push(Dim::new(1));
                continue;
            }
            let (tile, name) = k.tile(if a == last { "BN" } else { "BM" });
            tiles.push((name, if a == last { TILE } else { ROWS }));
            start.push(k.grid(&format!("g{a}"), extent.ceil_div(&tile)) * &tile);
            len.push(tile.clone());
            plane.push(tile);
        }
        // Where the axis and the other one are in the plane.
        let (here, beside) = match other {
            Some(other) if other < axis => (1, 0),
            Some(_) => (0, 1),
            None => (0, 0),
        };
        let layout = Layout::row_major;
        let types = [i, u].map(|b| self.plan.buffers[b].dtype);
        let from = k.input(x, dtype, layout(data));
        let indices = k.input(i, types[0], layout(index));
        let updates = k.input(u, types[1], layout(index));
        let to = k.output(y, dtype, layout(data));
        let first = k.b.load(from, start.clone(), len.clone());
        let first = k.b.reshape(first, plane.clone());
        let position = k.b.iota(DType::I64, 0, start[axis].clone(), vec![len[axis].clone()]);
        let turn = k.fresh("turn");
        let (turn, carried) = k.b.begin_for(&turn, Dim::new(0), index[axis].clone(), &[first]);
        let (mut at, mut line) = (start.clone(), len.clone());
        (at[axis], line[axis]) = (turn, Dim::new(1));
        // Outside the updates nothing is meant: no index is as low.
        let nowhere = crate::rows::identity(tilewright_tile::ReduceKind::Max, types[0]);
        let steps = vec![1; at.len()];
        let index_tile = k.b.load_with(indices, at.clone(), steps, nowhere, line.clone());
        let update_tile = k.b.load(updates, at, line);
        let (line, along) = match other {
            Some(other) => (len[other].clone(), beside),
            None => (Dim::new(1), 0),
        };
        let [index_tile, update_tile] =
            [index_tile, update_tile].map(|tile| k.b.reshape(tile, vec![line.clone()]));
        let mut f = Formula::new();
        let old = f.tile(&k, carried[0], &(0..plane.len()).collect::<Vec<_>>());
        let update = f.tile(&k, update_tile, &[along]);
        let place = f.integer(&k, index_tile, &[along]);
        let position = f.tile(&k, position, &[here]);
        // One that is still negative after counting from the end stands nowhere.
        let (place, _) = f.on_axis(&mut k, place, &data[axis]);
        let meant = f.op(ExprOp::Eq, place, position);
        let next = combined(&mut f.f, (kind, dtype), (meant, old, update));
        let next = f.finish(&mut k, next, plane);
        let done = k.b.end_for(&[next]);
        let done = k.b.reshape(done[0], len);
        k.b.store(to, start, done);
        let knobs = self.knobs();
        self.launch(k, tiles, knobs, note)
    }

    fn scatter_nd(
        &mut self,
        id: NodeId,
        kind: ScatterKind,
        [x, i, u, y]: [BufferId; 4],
        note: Note,
    ) -> Result<()> {
        let inputs = &self.graph.nodes[id].inputs;
        let (data, index) = (self.graph.shape(inputs[0]), self.graph.shape(inputs[1]));
        let dtype = self.graph.dtype(inputs[0]);
        let depth = coordinates_of(index);
        let count = numel(&index[..index.len() - 1]);
        let (rows, run) = (numel(&data[..depth]), numel(&data[depth..]));
        let mut k = KernelParts::new(format!("scatter_{id}"), &self.graph.symbols);
        let ((bm, bm_name), (bn, bn_name)) = (k.tile("BM"), k.tile("BN"));
        let row0 = k.grid("g0", rows.ceil_div(&bm)) * &bm;
        let col0 = k.grid("g1", run.ceil_div(&bn)) * &bn;
        let plane = vec![bm.clone(), bn.clone()];
        let matrix = |rows: &Dim, cols: &Dim| Layout::row_major(&[rows.clone(), cols.clone()]);
        let types = [i, u].map(|b| self.plan.buffers[b].dtype);
        let from = k.input(x, dtype, matrix(&rows, &run));
        let indices = k.input(i, types[0], matrix(&count, &Dim::from(depth)));
        let updates = k.input(u, types[1], matrix(&count, &run));
        let to = k.output(y, dtype, matrix(&rows, &run));
        let at = vec![row0.clone(), col0.clone()];
        let first = k.b.load(from, at.clone(), plane.clone());
        let position = k.b.iota(DType::I64, 0, row0, vec![bm]);
        let turn = k.fresh("turn");
        let (turn, carried) = k.b.begin_for(&turn, Dim::new(0), count, &[first]);
        let one = Dim::new(1);
        let row_strides = strides(&data[..depth]);
        // The row that is meant; below zero none.
        let mut f = Formula::new();
        let mut row = f.number(0);
        let mut inside = None;
        for d in 0..depth {
            let at = vec![turn.clone(), Dim::from(d)];
            let tile = k.b.load(indices, at, vec![one.clone(), one.clone()]);
            let tile = k.b.reshape(tile, vec![one.clone()]);
            let i = f.integer(&k, tile, &[0]);
            let (i, on) = f.on_axis(&mut k, i, &data[d]);
            row = f.add_times(&mut k, row, i, &row_strides[d]);
            inside = Some(inside.map_or(on, |all| f.op(ExprOp::And, all, on)));
        }
        if let Some(inside) = inside {
            let nowhere = f.number(-1);
            row = f.f.op(ExprOp::Select, &[inside, row, nowhere]);
        }
        let row = match depth {
            0 => k
                .b
                .full(Value::Int(0), tilewright_tile::TileType::new(DType::I64, vec![one.clone()])),
            _ => f.finish(&mut k, row, vec![one.clone()]),
        };
        let update = k.b.load(updates, vec![turn, col0], vec![one, bn.clone()]);
        let update = k.b.reshape(update, vec![bn]);
        let mut f = Formula::new();
        let old = f.tile(&k, carried[0], &[0, 1]);
        let update = f.tile(&k, update, &[1]);
        let row = f.tile(&k, row, &[0]);
        let position = f.tile(&k, position, &[0]);
        let meant = f.op(ExprOp::Eq, row, position);
        let next = combined(&mut f.f, (kind, dtype), (meant, old, update));
        let next = f.finish(&mut k, next, plane);
        let done = k.b.end_for(&[next]);
        k.b.store(to, at, done[0]);
        let knobs = self.knobs();
        self.launch(k, vec![(bm_name, ROWS), (bn_name, TILE)], knobs, note)
    }
}

/// Numbers in each vector of coordinates.
fn coordinates_of(index: &[Dim]) -> usize {
    let last = index.last().and_then(Dim::as_const);
    last.and_then(|d| usize::try_from(d).ok()).unwrap_or(0)
}

/// What stands at a place after an update that is meant for it, rounded to the type of memory; else what stood there.
fn combined(
    f: &mut FuncBuilder,
    (kind, dtype): (ScatterKind, DType),
    (meant, old, update): (ExprId, ExprId, ExprId),
) -> ExprId {
    let kind = match kind {
        ScatterKind::Set => None,
        ScatterKind::Add => Some(ReduceKind::Sum),
        ScatterKind::Mul => Some(ReduceKind::Prod),
        ScatterKind::Max => Some(ReduceKind::Max),
        ScatterKind::Min => Some(ReduceKind::Min),
    };
    let new = match kind {
        None => update,
        Some(kind) => {
            let wide = dtype.compute();
            let (a, b) = (f.cast(old, wide), f.cast(update, wide));
            let both = f.op(combine_op(reduce_kind(kind)), &[a, b]);
            f.cast(both, dtype)
        }
    };
    f.op(ExprOp::Select, &[meant, new, old])
}
