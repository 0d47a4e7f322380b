//! Row reductions: softmax, normalisations, sums, and whatever maps surround them.
//!
//! [`expand`] writes each operator as maps and reductions, so that one emitter serves all of them.
//! A row that fits is one tile: it is loaded once and everything is computed on it. Longer rows, or
//! rows of unknown length, are walked in pieces, once per reduction that depends on another and once
//! more to store what varies along the row.

use crate::block::{Dag, DagOp, Emit, KernelParts, Pos};
use crate::fuse::{Group, WHOLE_ROW};
use crate::lowering::{Lowering, reduce_kind};
use crate::map::{block_of, extent};
use crate::schedule::{even, round_up, row_tile};
use crate::views::{by_distance, is_broadcast, nominal, partition};
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{ExprId, Func, FuncBuilder, Op as ExprOp, Value};
use tilewright_graph::Op;
use tilewright_layout::{Dim, Layout, Symbols, numel};
use tilewright_plan::{BufferId, Form, Note};
use tilewright_tile::{Bound, Operand, ReduceKind, TileId, TileType};

/// A function of operands of these types, built by `body`.
pub(crate) fn func(
    dtypes: &[DType],
    body: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
) -> Func {
    let mut f = FuncBuilder::new();
    let params: Vec<ExprId> =
        dtypes.iter().enumerate().map(|(i, d)| f.param(&format!("a{i}"), *d)).collect();
    let result = body(&mut f, &params);
    f.finish(result)
}

/// The type in which a reduction of `dtype` is carried out.
pub(crate) fn reduce_type(dtype: DType) -> DType {
    // Booleans as bytes: the identities 0 and 255 come back as false and true.
    if dtype == DType::Bool { DType::U8 } else { dtype.compute() }
}

/// What a reduction of nothing gives.
pub(crate) fn identity(kind: ReduceKind, dtype: DType) -> Value {
    let bits = dtype.bits();
    let signed = dtype.is_signed_int();
    let low = if signed { i64::MIN >> (64 - bits) } else { 0 };
    let high = match (signed, bits) {
        (true, _) => i64::MAX >> (64 - bits),
        (false, 64) => -1,
        (false, _) => (1i64 << bits) - 1,
    };
    match (kind, dtype.is_float()) {
        (ReduceKind::Sum, true) => Value::Float(0.0),
        (ReduceKind::Sum, false) => Value::Int(0),
        (ReduceKind::Prod, true) => Value::Float(1.0),
        (ReduceKind::Prod, false) => Value::Int(1),
        (ReduceKind::Max, true) => Value::Float(f64::NEG_INFINITY),
        (ReduceKind::Min, true) => Value::Float(f64::INFINITY),
        (ReduceKind::Max, false) => Value::Int(low),
        (ReduceKind::Min, false) => Value::Int(high),
    }
}

/// The operation that combines two partial results.
pub(crate) fn combine_op(kind: ReduceKind) -> ExprOp {
    match kind {
        ReduceKind::Sum => ExprOp::Add,
        ReduceKind::Prod => ExprOp::Mul,
        ReduceKind::Max => ExprOp::Max,
        ReduceKind::Min => ExprOp::Min,
    }
}

struct Expander<'a> {
    dag: &'a mut Dag,
    reduced: &'a [usize],
    rank: usize,
}

impl Expander<'_> {
    fn dtype(&self, node: usize) -> DType {
        self.dag.nodes[node].dtype
    }

    fn map(
        &mut self,
        args: &[usize],
        body: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
    ) -> usize {
        let dtypes: Vec<DType> = args.iter().map(|&a| self.dtype(a)).collect();
        self.dag.map(func(&dtypes, body), args.to_vec(), self.rank)
    }

    fn cast(&mut self, node: usize, to: DType) -> usize {
        if self.dtype(node) == to { node } else { self.map(&[node], |f, a| f.cast(a[0], to)) }
    }

    fn reduce(&mut self, kind: ReduceKind, x: usize) -> usize {
        self.over_rows(DagOp::Reduce(kind), x, self.dtype(x))
    }

    fn over_rows(&mut self, op: DagOp, x: usize, dtype: DType) -> usize {
        let mut axes = self.dag.nodes[x].axes.clone();
        self.reduced.iter().for_each(|&r| axes[r] = false);
        self.dag.push(op, vec![x], axes, dtype)
    }

    /// `sum / count` of a row.
    fn mean(&mut self, x: usize, count: &Dim) -> usize {
        let sum = self.reduce(ReduceKind::Sum, x);
        let dtype = self.dtype(sum);
        match count.as_const() {
            Some(n) => self.map(&[sum], |f, a| {
                let n = f.constant(n as f64, dtype);
                f.op(ExprOp::Div, &[a[0], n])
            }),
            None => {
                let axes = vec![false; self.rank];
                let n = self.dag.push(DagOp::Size(count.clone()), vec![], axes, DType::I64);
                self.map(&[sum, n], |f, a| {
                    let n = f.cast(a[1], dtype);
                    f.op(ExprOp::Div, &[a[0], n])
                })
            }
        }
    }

    /// `1 / sqrt(x + eps)`
    fn inverse_root(&mut self, x: usize, eps: u64) -> usize {
        let dtype = self.dtype(x);
        self.map(&[x], |f, a| {
            let eps = f.constant(f64::from_bits(eps), dtype);
            let sum = f.op(ExprOp::Add, &[a[0], eps]);
            let root = f.op(ExprOp::Sqrt, &[sum]);
            let one = f.constant(1.0, dtype);
            f.op(ExprOp::Div, &[one, root])
        })
    }

    /// `normal * scale (+ bias)`, rounded to `dtype`.
    fn affine(&mut self, normal: usize, rest: &[usize], dtype: DType) -> usize {
        let compute = self.dtype(normal);
        let mut args = vec![normal];
        args.extend_from_slice(rest);
        self.map(&args, |f, a| {
            let mut y = a[0];
            if let Some(&scale) = a.get(1) {
                let scale = f.cast(scale, compute);
                y = f.op(ExprOp::Mul, &[y, scale]);
            }
            if let Some(&bias) = a.get(2) {
                let bias = f.cast(bias, compute);
                y = f.op(ExprOp::Add, &[y, bias]);
            }
            f.cast(y, dtype)
        })
    }
}

/// A row operator as maps and reductions; returns its result.
pub(crate) fn expand(
    dag: &mut Dag,
    op: &Op,
    args: &[usize],
    reduced: &[usize],
    shape: &[Dim],
) -> usize {
    let dtype = dag.nodes[args[0]].dtype;
    let compute = reduce_type(dtype);
    let mut e = Expander { dag, reduced, rank: shape.len() };
    let row: Vec<Dim> = reduced.iter().map(|&r| shape[r].clone()).collect();
    let count = numel(&row);
    let x = e.cast(args[0], compute);
    match op {
        Op::Reduce { kind, .. } => {
            let r = e.reduce(reduce_kind(*kind), x);
            e.cast(r, dtype)
        }
        Op::ArgReduce { kind, last, .. } => {
            e.over_rows(DagOp::ArgReduce(reduce_kind(*kind), *last), x, DType::I64)
        }
        Op::Scan { kind, exclusive, reverse, .. } => {
            let mut axes = e.dag.nodes[x].axes.clone();
            reduced.iter().for_each(|&r| axes[r] = true);
            let op = DagOp::Scan(reduce_kind(*kind), *exclusive, *reverse);
            let r = e.dag.push(op, vec![x], axes, compute);
            e.cast(r, dtype)
        }
        Op::Softmax { log, .. } => {
            let max = e.reduce(ReduceKind::Max, x);
            let shifted = e.map(&[x, max], |f, a| f.op(ExprOp::Sub, &[a[0], a[1]]));
            let exp = e.map(&[shifted], |f, a| f.op(ExprOp::Exp, &[a[0]]));
            let sum = e.reduce(ReduceKind::Sum, exp);
            if *log {
                let log = e.map(&[sum], |f, a| f.op(ExprOp::Log, &[a[0]]));
                return e.map(&[shifted, log], |f, a| {
                    let y = f.op(ExprOp::Sub, &[a[0], a[1]]);
                    f.cast(y, dtype)
                });
            }
            let scale = e.map(&[sum], |f, a| {
                let one = f.constant(1.0, compute);
                f.op(ExprOp::Div, &[one, a[0]])
            });
            e.map(&[exp, scale], |f, a| {
                let y = f.op(ExprOp::Mul, &[a[0], a[1]]);
                f.cast(y, dtype)
            })
        }
        Op::LayerNorm { eps, .. } => {
            let mean = e.mean(x, &count);
            let centred = e.map(&[x, mean], |f, a| f.op(ExprOp::Sub, &[a[0], a[1]]));
            let square = e.map(&[centred], |f, a| f.op(ExprOp::Mul, &[a[0], a[0]]));
            let variance = e.mean(square, &count);
            let scale = e.inverse_root(variance, *eps);
            let normal = e.map(&[centred, scale], |f, a| f.op(ExprOp::Mul, &[a[0], a[1]]));
            e.affine(normal, &args[1..], dtype)
        }
        Op::RmsNorm { eps, .. } => {
            let square = e.map(&[x], |f, a| f.op(ExprOp::Mul, &[a[0], a[0]]));
            let mean = e.mean(square, &count);
            let scale = e.inverse_root(mean, *eps);
            let normal = e.map(&[x, scale], |f, a| f.op(ExprOp::Mul, &[a[0], a[1]]));
            e.affine(normal, &args[1..], dtype)
        }
        other => unreachable!("not a row operator: {other:?}"),
    }
}

/// How many reductions lie behind each node, one after another.
fn levels(dag: &Dag) -> Vec<usize> {
    let mut levels: Vec<usize> = Vec::with_capacity(dag.nodes.len());
    for node in &dag.nodes {
        let before = node.args.iter().map(|&a| levels[a]).max().unwrap_or(0);
        levels.push(before + usize::from(is_reduction(&node.op)));
    }
    levels
}

fn is_reduction(op: &DagOp) -> bool {
    matches!(op, DagOp::Reduce(_) | DagOp::ArgReduce(..))
}

/// The geometry of one row kernel.
struct Rows<'a> {
    dag: &'a Dag,
    shape: &'a [Dim],
    canon: Vec<Vec<usize>>,
    pos: Vec<Pos>,
    /// Canonical axes that reductions combine; the last one is a tile axis.
    rows: Vec<usize>,
    /// Extent of that one.
    width: Dim,
}

impl Lowering<'_> {
    pub(crate) fn rows_group(&mut self, group: &Group) -> Result<()> {
        let dag = self.dag(group)?;
        let (name, note) = (self.kernel_name(group), self.note(group));
        if self.on_gpu() {
            self.row_sums.extend(crate::gpu::row_sum(&dag, &group.shape, &group.reduced));
        }
        self.rows_kernel(name, &dag, &group.shape, &group.reduced, note)
    }

    fn rows_kernel(
        &mut self,
        name: String,
        dag: &Dag,
        shape: &[Dim],
        reduced: &[usize],
        note: Note,
    ) -> Result<()> {
        let symbols = &self.graph.symbols;
        let layouts = dag.layouts();
        let varying = |l: &&&Layout| l.axes.iter().filter(|a| !is_broadcast(a)).count();
        let primary = layouts.iter().rev().max_by_key(varying).copied();
        let primary = primary.expect("a group stores something");
        let (rows, others): (Vec<usize>, Vec<usize>) =
            (0..shape.len()).partition(|a| reduced.contains(a));
        let all: Vec<usize> = (0..shape.len()).collect();
        let near = by_distance(&all, primary, symbols)
            .into_iter()
            .rfind(|&a| !is_broadcast(&primary.axes[a]));
        let row_inside = near.is_none_or(|a| rows.contains(&a));
        let solo = |a: usize| dag.solo(a);
        let r_parts = partition(&by_distance(&rows, primary, symbols), &layouts, &solo);
        let mut o_parts = partition(&by_distance(&others, primary, symbols), &layouts, &solo);
        if o_parts.is_empty() {
            o_parts.push(vec![]);
        }
        let inner = o_parts.pop().unwrap_or_default();
        // Grid axes, then the tile: [BM, BN] with the row last, or [BN, BM] with it first.
        let mut canon = o_parts;
        let outer = canon.len();
        let (tile_axis, row_axes): (usize, Vec<usize>) = if row_inside {
            canon.push(inner);
            canon.extend(r_parts.clone());
            (outer, (outer + 1..canon.len()).collect())
        } else {
            canon.extend(r_parts.clone());
            canon.push(inner);
            (canon.len() - 1, (outer..canon.len() - 1).collect())
        };
        let row_axis = row_axes[row_axes.len() - 1];
        let width = extent(shape, &canon[row_axis]);
        let depth = levels(dag).into_iter().max().unwrap_or(0);
        let scans = dag.nodes.iter().any(|n| matches!(n.op, DagOp::Scan(..)));
        let stores_rows =
            dag.stores.iter().any(|s| reduced.iter().any(|&r| dag.nodes[s.node].axes[r]));
        let most = match (row_inside, depth <= 1 && !stores_rows) {
            (true, false) => WHOLE_ROW,
            (true, true) => 4096,
            (false, false) => 1024,
            (false, true) => 256,
        };
        let whole = row_axes.len() == 1
            && width.as_const().is_some_and(|w| w <= if scans { WHOLE_ROW } else { most });

        let lanes = self.target.lanes;
        let height = nominal(&extent(shape, &canon[tile_axis]), symbols);
        let wide = nominal(&width, symbols);
        let block = |c: usize| block_of(&layouts, &canon[c]);
        let unit = if row_inside { lanes } else { 1 };
        let bn = match (whole, block(row_axis)) {
            // Nothing may lie behind the row: a scan from the end would start there.
            (true, _) if scans => wide.max(1),
            (true, None) => round_up(wide, unit),
            // A whole row in one tile, also when its axis is blocked.
            (true, Some(b)) => round_up(wide, b),
            (false, Some(b)) => b,
            (false, None) => even(wide, if row_inside { 2048 } else { 128 }, unit),
        };
        let bm = match (row_inside, block(tile_axis)) {
            (_, Some(b)) => b,
            (true, None) => row_tile(self.target, height, bn),
            (false, None) => even(height, (4096 / bn).clamp(lanes, 1024), lanes),
        };

        let geometry = Geometry {
            dag,
            shape,
            canon: &canon,
            row_axes: &row_axes,
            row_axis,
            tile_axis,
            on_gpu: self.on_gpu(),
        };
        // A GPU gets both where it can: which one runs is known with the sizes.
        let fits = width.as_const().is_none_or(|w| w <= if stores_rows { WHOLE_ROW } else { most });
        let both = self.on_gpu() && row_axes.len() == 1 && !scans && fits;
        let whole = whole && !both;
        let (k, tiles) = geometry.write(&name, &self.graph.symbols, whole, [bm, bn]);
        let mut forms = Vec::new();
        if both {
            let (other, _) = geometry.write(&name, &self.graph.symbols, true, [bm, bn]);
            let (kernel, args) = other.finish(&self.graph.symbols);
            let find = |b: &BufferId| k.args.iter().position(|a| a == b);
            let params: Option<Vec<usize>> = args.iter().map(find).collect();
            let params = params.ok_or_else(|| Error::bug("forms of one kernel read the same"))?;
            forms.push(Form::Program { kernel: kernel.into(), params });
        }
        let mut knobs = self.memory_knobs(dag);
        // Only a tile that holds the row is read again from the caches.
        knobs.ahead &= whole;
        self.launch_forms(k, tiles, knobs, forms, note)
    }
}

/// Where the tile of a row kernel stands.
struct Geometry<'a> {
    dag: &'a Dag,
    shape: &'a [Dim],
    canon: &'a [Vec<usize>],
    /// Canonical axes that reductions combine.
    row_axes: &'a [usize],
    /// The one of them that is a tile axis.
    row_axis: usize,
    /// The other tile axis.
    tile_axis: usize,
    on_gpu: bool,
}

impl Geometry<'_> {
    /// The kernel, with whole rows in a tile or with rows in pieces; and its tile sizes.
    fn write(
        &self,
        name: &str,
        symbols: &Symbols,
        whole: bool,
        [bm, bn]: [i64; 2],
    ) -> (KernelParts, Vec<(String, i64)>) {
        let Geometry { dag, shape, canon, row_axes, row_axis, tile_axis, on_gpu } = *self;
        let mut k = KernelParts::new(name, symbols);
        let (bm_dim, bm_name) = k.tile("BM");
        let (bn_dim, bn_name) = k.tile("BN");
        let mut pos = Vec::new();
        for (c, axes) in canon.iter().enumerate() {
            let extent = extent(shape, axes);
            pos.push(if row_axes.contains(&c) {
                match c == row_axis {
                    true => Pos::tile(Dim::new(0), bn_dim.clone()),
                    false => Pos::unit(Dim::new(0)),
                }
            } else if c == tile_axis {
                let index = k.grid("g", extent.ceil_div(&bm_dim));
                Pos::tile(index * &bm_dim, bm_dim.clone())
            } else {
                Pos::unit(k.grid(&format!("g{c}"), extent))
            });
        }
        let width = extent(shape, &canon[row_axis]);
        let scan = dag.nodes.iter().position(|n| matches!(n.op, DagOp::Scan(..)));
        if let Some(width) = width.as_const().filter(|&w| whole && !on_gpu && w > 0) {
            // Nothing may lie behind a row that a scan walks from its end.
            let bound = if scan.is_some() { Bound::Exactly } else { Bound::AtLeast };
            k.bound(&bn_name, bound(width));
        }
        let (canon, row_axes) = (canon.to_vec(), row_axes.to_vec());
        let rows = Rows { dag, shape, canon, pos, rows: row_axes, width };
        match (whole, scan) {
            (true, _) => rows.whole(&mut k),
            (false, Some(scan)) => rows.scan_in_pieces(&mut k, scan),
            (false, None) => rows.pieces(&mut k),
        }
        (k, vec![(bm_name, bm), (bn_name, bn)])
    }
}

impl Rows<'_> {
    fn row_axis(&self) -> usize {
        self.rows[self.rows.len() - 1]
    }

    fn emit(&self, pos: Vec<Pos>, memo: BTreeMap<usize, TileId>) -> Emit<'_> {
        let mut emit = Emit::new(self.dag, &self.canon, pos);
        emit.reduced = Some((self.row_axis(), self.width.clone()));
        emit.memo = memo;
        emit
    }

    /// One tile holds the row.
    fn whole(&self, k: &mut KernelParts) {
        self.emit(self.pos.clone(), BTreeMap::new()).store_all(k);
    }

    /// Opens loops over the pieces of a row; the position inside, and the carried tiles.
    fn open(&self, k: &mut KernelParts, init: &[TileId]) -> (Vec<Pos>, Vec<Vec<TileId>>) {
        let mut pos = self.pos.clone();
        let mut carried: Vec<Vec<TileId>> = Vec::new();
        for &c in &self.rows {
            let extent = extent(self.shape, &self.canon[c]);
            let name = k.fresh("r");
            let from = carried.last().map_or(init.to_vec(), Clone::clone);
            let hi = match &self.pos[c].tile {
                Some(tile) => extent.ceil_div(tile),
                None => extent,
            };
            let (var, inner) = k.b.begin_for(&name, Dim::new(0), hi, &from);
            pos[c] = match &self.pos[c].tile {
                Some(tile) => Pos::tile(var * tile, tile.clone()),
                None => Pos::unit(var),
            };
            carried.push(inner);
        }
        (pos, carried)
    }

    fn close(&self, k: &mut KernelParts, mut yields: Vec<TileId>) -> Vec<TileId> {
        for _ in &self.rows {
            yields = k.b.end_for(&yields);
        }
        yields
    }

    fn varies(&self, node: usize) -> bool {
        let axes = &self.dag.nodes[node].axes;
        self.rows.iter().any(|&c| self.canon[c].iter().any(|&a| axes[a]))
    }

    /// Row values that pieces read, computed once before the loop.
    fn hoist(
        &self,
        k: &mut KernelParts,
        memo: &mut BTreeMap<usize, TileId>,
        level: &[usize],
        now: usize,
    ) {
        for (i, node) in self.dag.nodes.iter().enumerate() {
            if !self.varies(i) {
                continue;
            }
            for &a in &node.args {
                let ready = level[a] < now && matches!(self.dag.nodes[a].op, DagOp::Map(_));
                if ready && !self.varies(a) && !memo.contains_key(&a) {
                    let mut emit = self.emit(self.pos.clone(), std::mem::take(memo));
                    emit.tile(k, a);
                    *memo = emit.memo;
                }
            }
        }
    }

    /// One walk over the row per level of reductions, and one to store.
    fn pieces(&self, k: &mut KernelParts) {
        let level = levels(self.dag);
        let depth = level.iter().copied().max().unwrap_or(0);
        let mut memo: BTreeMap<usize, TileId> = BTreeMap::new();
        for now in 1..=depth {
            self.hoist(k, &mut memo, &level, now);
            let wanted: Vec<usize> = (0..self.dag.nodes.len())
                .filter(|&n| level[n] == now && is_reduction(&self.dag.nodes[n].op))
                .collect();
            let shapes = self.emit(self.pos.clone(), BTreeMap::new());
            let mut init = Vec::new();
            for &n in &wanted {
                let shape = shapes.shape_of(n);
                init.extend(self.start(k, n, shape));
            }
            let (pos, carried) = self.open(k, &init);
            let mut now_carried = carried.last().map_or(vec![], Clone::clone).into_iter();
            let mut emit = self.emit(pos, memo.clone());
            let mut yields = Vec::new();
            for &n in &wanted {
                self.step(k, &mut emit, n, &mut now_carried, &mut yields);
            }
            let mut results = self.close(k, yields).into_iter();
            for &n in &wanted {
                if matches!(self.dag.nodes[n].op, DagOp::ArgReduce(..)) {
                    results.next();
                }
                memo.extend(results.next().map(|tile| (n, tile)));
            }
        }
        let (long, short): (Vec<_>, Vec<_>) =
            self.dag.stores.iter().partition(|s| self.varies(s.node));
        self.hoist(k, &mut memo, &level, depth + 1);
        let mut emit = self.emit(self.pos.clone(), memo.clone());
        short.iter().for_each(|s| emit.store(k, s));
        if !long.is_empty() {
            let (pos, _) = self.open(k, &[]);
            let mut emit = self.emit(pos, memo);
            long.iter().for_each(|s| emit.store(k, s));
            self.close(k, vec![]);
        }
    }

    /// One walk over the row from its start, which carries what all pieces before come to. The only row operator is the scan,
    /// and it does not start at the end ([`form`](crate::form) sees to that).
    fn scan_in_pieces(&self, k: &mut KernelParts, scan: usize) {
        let node = &self.dag.nodes[scan];
        let DagOp::Scan(kind, exclusive, _) = node.op else { return };
        let arg = node.args[0];
        let dtype = self.dag.nodes[arg].dtype;
        let (long, short): (Vec<_>, Vec<_>) =
            self.dag.stores.iter().partition(|s| self.varies(s.node));
        let mut around = self.emit(self.pos.clone(), BTreeMap::new());
        short.iter().for_each(|s| around.store(k, s));
        let row = around.reduced_shape(arg);
        let nothing = k.b.full(identity(kind, dtype), TileType::new(dtype, row.clone()));
        let (pos, carried) = self.open(k, &[nothing]);
        let Some(&before) = carried.last().and_then(|c| c.first()) else { return };
        let mut emit = self.emit(pos, BTreeMap::new());
        let (x, axis, limit) = emit.reduce_operand(k, arg);
        let plane = k.b.ty(x).shape.clone();
        let piece = k.b.scan(kind, x, axis, exclusive, false);
        let along = (0..plane.len()).filter(|a| *a != axis).collect();
        let combine = || Func::binary(combine_op(kind), dtype);
        let args = vec![Operand { tile: before, along }, k.b.plain(piece)];
        let running = k.b.map(combine(), args, plane);
        emit.memo.insert(scan, running);
        let all = k.b.reduce(kind, x, axis, limit);
        let args = vec![k.b.plain(before), k.b.plain(all)];
        let next = k.b.map(combine(), args, row);
        long.iter().for_each(|s| emit.store(k, s));
        self.close(k, vec![next]);
    }

    /// First values of a reduction's carried tiles: the partial result, for positions also where.
    fn start(&self, k: &mut KernelParts, node: usize, shape: Vec<Dim>) -> Vec<TileId> {
        let info = &self.dag.nodes[node];
        let x = self.dag.nodes[info.args[0]].dtype;
        match &info.op {
            DagOp::ArgReduce(kind, _) => vec![
                k.b.full(identity(*kind, x), TileType::new(x, shape.clone())),
                k.b.full(Value::Int(0), TileType::new(DType::I64, shape)),
            ],
            DagOp::Reduce(kind) => vec![k.b.full(identity(*kind, x), TileType::new(x, shape))],
            _ => vec![],
        }
    }

    /// Folds one piece into a reduction's carried tiles.
    fn step(
        &self,
        k: &mut KernelParts,
        emit: &mut Emit<'_>,
        node: usize,
        carried: &mut impl Iterator<Item = TileId>,
        yields: &mut Vec<TileId>,
    ) {
        let info = &self.dag.nodes[node];
        let arg = info.args[0];
        let dtype = self.dag.nodes[arg].dtype;
        let (x, axis, limit) = emit.reduce_operand(k, arg);
        let shape = emit.shape_of(node);
        let plain = |k: &KernelParts, tile: TileId| -> Operand { k.b.plain(tile) };
        let Some(before) = carried.next() else { return };
        match &info.op {
            DagOp::Reduce(kind) => {
                let piece = k.b.reduce(*kind, x, axis, limit);
                let args = vec![plain(k, before), plain(k, piece)];
                yields.push(k.b.map(Func::binary(combine_op(*kind), dtype), args, shape));
            }
            DagOp::ArgReduce(kind, last) => {
                let Some(at_before) = carried.next() else { return };
                let best = k.b.reduce(*kind, x, axis, limit.clone());
                let at = k.b.arg_reduce(*kind, x, axis, limit, *last);
                let start = emit.pos[self.row_axis()].start.clone();
                let start = k.b.iota(DType::I64, 0, start, vec![Dim::new(1)]);
                let start = k.b.reshape(start, vec![]);
                let win = |f: &mut FuncBuilder, old: ExprId, new: ExprId| {
                    wins(f, *kind, *last, dtype, old, new)
                };
                // The first piece always wins: nothing was seen before it.
                let value = func(&[dtype, dtype], |f, a| {
                    let w = win(f, a[0], a[1]);
                    f.op(ExprOp::Select, &[w, a[1], a[0]])
                });
                let place = func(&[dtype, dtype, DType::I64, DType::I64, DType::I64], |f, a| {
                    let zero = f.constant_int(0, DType::I64);
                    let first = f.op(ExprOp::Eq, &[a[4], zero]);
                    let w = win(f, a[0], a[1]);
                    let w = f.op(ExprOp::Or, &[first, w]);
                    let here = f.op(ExprOp::Add, &[a[3], a[4]]);
                    f.op(ExprOp::Select, &[w, here, a[2]])
                });
                let args = vec![
                    plain(k, before),
                    plain(k, best),
                    plain(k, at_before),
                    plain(k, at),
                    Operand { tile: start, along: vec![] },
                ];
                let at = k.b.map(place, args, shape.clone());
                let args = vec![plain(k, before), plain(k, best)];
                yields.push(k.b.map(value, args, shape));
                yields.push(at);
            }
            _ => {}
        }
    }
}

/// Whether the extreme of a later piece replaces the extreme so far: NaN beats numbers.
fn wins(
    f: &mut FuncBuilder,
    kind: ReduceKind,
    last: bool,
    dtype: DType,
    old: ExprId,
    new: ExprId,
) -> ExprId {
    let op = match (kind == ReduceKind::Max, last) {
        (true, false) => ExprOp::Gt,
        (true, true) => ExprOp::Ge,
        (false, false) => ExprOp::Lt,
        (false, true) => ExprOp::Le,
    };
    let better = f.op(op, &[new, old]);
    if !dtype.is_float() {
        return better;
    }
    let new_nan = f.op(ExprOp::IsNan, &[new]);
    if last {
        return f.op(ExprOp::Or, &[better, new_nan]);
    }
    let old_nan = f.op(ExprOp::IsNan, &[old]);
    let old_number = f.op(ExprOp::Not, &[old_nan]);
    let takes = f.op(ExprOp::And, &[new_nan, old_number]);
    f.op(ExprOp::Or, &[better, takes])
}
