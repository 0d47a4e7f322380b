//! Heads turn behind the product that makes them, before they are stored: rotary positions of queries and keys.
//!
//! ```text
//! y = A B, a line is heads q|k|v                      y = A B with heads q|k turned
//! x = heads q|k of y, seen as [b, head, s, width]
//! z = concat f(x's halves, tables), g(the same)  =>   z = the same view of y
//! ```
//!
//! The kernel in the middle is gone, and `z` lies where `x` would have. Side conditions: nothing else reads those columns of `y`, which are whole
//! heads, the first ones of a line; one product writes `y`, dense and row-major; tables vary along the positions and within a half alone, lie
//! dense, one line per row of `y` or per so many rows that divide its number, and are there before the product runs.

use super::inline;
use super::statistics::launched;
use crate::block::{Dag, DagOp};
use crate::fuse::{Anchor, Group};
use crate::lowering::Lowering;
use crate::place::Place;
use crate::views::is_broadcast;
use tilewright_base::{DType, Result};
use tilewright_expr::{Func, FuncBuilder, Op as ExprOp};
use tilewright_graph::{Graph, NodeId, Op, ValueId};
use tilewright_layout::{Dim, Layout, numel};
use tilewright_plan::{BufferId, Form, PlanKernel, Product, Step, Storage, Turned, Vector};
use tilewright_tile::{Access, Operand, Param, ParamId, Stmt, TileInfo, TileOp, TileType, Turn};

/// Bytes of a line of the chunks in which tiles of products leave: heads that turn do not go across.
const CHUNK_BYTES: i64 = 128;

/// Halves of heads that a group computes from both halves and tables.
struct Halves {
    /// The new halves.
    made: [ValueId; 2],
    /// What they are put together to.
    whole: ValueId,
    /// The heads that they are made of.
    of: ValueId,
}

/// The part of the last axis that a slice takes, and whether it takes all of the others.
fn columns(graph: &Graph, node: NodeId) -> Option<(i64, i64)> {
    let node = &graph.nodes[node];
    let Op::Slice { starts, lens, steps } = &node.op else { return None };
    let shape = graph.shape(node.inputs[0]);
    let last = shape.len().checked_sub(1)?;
    let whole = (0..last).all(|a| starts[a].is(0) && lens[a] == shape[a]);
    let plain = whole && steps.iter().all(|s| *s == 1);
    plain.then_some((starts[last].as_const()?, lens[last].as_const()?))
}

impl Lowering<'_> {
    fn only_used(&self, v: ValueId, by: &[NodeId]) -> bool {
        !self.graph.is_output(v) && self.users[v].iter().all(|n| by.contains(n))
    }

    /// The halves that a group of two maps computes.
    fn halves(&self, group: &Group) -> Option<Halves> {
        let graph = self.graph;
        let ([first, second], Anchor::Map) = (group.nodes.as_slice(), group.anchor) else {
            return None;
        };
        let is_map = |n: &NodeId| matches!(graph.nodes[*n].op, Op::Map(_));
        let user = self.users[graph.nodes[*first].outputs[0]].first()?;
        let Op::Concat(axis) = graph.nodes[*user].op else { return None };
        let inputs = &graph.nodes[*user].inputs;
        let &[low, high] = inputs.as_slice() else { return None };
        let whole = graph.nodes[*user].outputs[0];
        let last = graph.shape(whole).len() == axis + 1;
        let of_group = |v: ValueId| {
            graph.producer(v).is_some_and(|n| group.nodes.contains(&n))
                && self.only_used(v, &[*user])
        };
        let both = low != high && of_group(low) && of_group(high);
        if !(last && both && is_map(first) && is_map(second)) || graph.is_output(whole) {
            return None;
        }
        // Both read both halves of one value, which nobody else reads.
        let slices: Vec<NodeId> = graph.nodes[*first]
            .inputs
            .iter()
            .filter_map(|v| graph.producer(*v))
            .filter(|n| columns(graph, *n).is_some())
            .collect();
        let of = *slices.iter().find_map(|n| {
            let v = &graph.nodes[*n].inputs[0];
            (graph.shape(*v) == graph.shape(whole)).then_some(v)
        })?;
        let width = graph.shape(of).last()?.as_const()?;
        let halves = [(0, width / 2), (width / 2, width / 2)];
        let fits = width % 2 == 0
            && !graph.is_output(of)
            && self.users[of].iter().all(|n| {
                let half = columns(graph, *n).is_some_and(|c| halves.contains(&c));
                half && self.only_used(graph.nodes[*n].outputs[0], &group.nodes)
            });
        fits.then_some(Halves { made: [low, high], whole, of })
    }

    /// The columns of a product's result that a value is a view of, when nothing else reads these: their number.
    fn first_columns(&self, of: ValueId) -> Option<i64> {
        let graph = self.graph;
        let mut v = of;
        loop {
            let node = graph.producer(v)?;
            let from = *graph.nodes[node].inputs.first()?;
            if let Some((0, len)) = columns(graph, node) {
                let behind = |n: &NodeId| {
                    *n == node || columns(graph, *n).is_some_and(|(start, _)| start >= len)
                };
                let alone = !graph.is_output(from) && self.users[from].iter().all(behind);
                return alone.then_some(len);
            }
            let view = matches!(graph.nodes[node].op, Op::Reshape(_) | Op::Permute(_));
            if !view || graph.is_output(from) || self.users[from].len() != 1 {
                return None;
            }
            v = from;
        }
    }

    /// Has the product before a group turn its heads, when that is what the group does; says whether.
    ///
    /// # Errors
    /// A bug: a program that breaks the rules.
    pub(crate) fn turned_behind(&mut self, group: &Group) -> Result<bool> {
        let Some(halves) = self.halves(group).filter(|_| self.turns) else { return Ok(false) };
        let Some(columns) = self.first_columns(halves.of) else { return Ok(false) };
        if self.places.contains_key(&halves.whole) {
            return Ok(false);
        }
        let place = self.place(halves.of)?;
        let maker = (0..self.plan.steps.len()).rev().find(|&i| {
            launched(&self.plan, i).is_some_and(|l| l.args[l.product.c.param] == place.buffer)
        });
        let stored = self.stored_type(halves.whole) == self.plan.buffers[place.buffer].dtype;
        let Some(maker) = maker.filter(|_| stored) else { return Ok(false) };
        // As if the result lay in the place of the operand.
        self.places.insert(halves.whole, place.clone());
        let dag = self.dag(group)?;
        let new = match turned(self, &dag, &group.shape, maker, &place, columns) {
            Some((turned, args)) => turning(self, maker, turned)?.map(|k| (k, args)),
            None => None,
        };
        let Some((kernel, more)) = new else {
            self.places.remove(&halves.whole);
            halves.made.iter().for_each(|v| drop(self.places.remove(v)));
            return Ok(false);
        };
        let id = self.plan.kernels.push(kernel);
        if let Step::Launch { kernel, args, .. } = &mut self.plan.steps[maker] {
            *kernel = id;
            args.extend(more);
        }
        let name = self.plan.buffers[place.buffer].name.clone();
        self.views.push(format!("taken: the product that makes {name} turns its heads"));
        Ok(true)
    }
}

/// What a product is to do so that a group's stores need no kernel, and the tables' buffers, which become its last parameters.
fn turned(
    low: &Lowering<'_>,
    dag: &Dag,
    shape: &[Dim],
    maker: usize,
    place: &Place,
    columns: i64,
) -> Option<(Turned, Vec<BufferId>)> {
    let made = launched(&low.plan, maker)?;
    let p = made.product;
    let n = p.n.as_const()?;
    let dense = p.c.offset.is(0) && p.c.col.is(1) && p.c.row.is(n);
    let alone = p.leaves.is_none()
        && p.second.is_none()
        && p.residual.is_none()
        && p.turns.is_none()
        && p.repeat.is_empty();
    let [one, two] = dag.stores.as_slice() else { return None };
    let within = [one, two].iter().all(|s| s.buffer == place.buffer);
    if !(dense && alone && within) {
        return None;
    }
    // Heads, positions within a half, and rows, of which the last ones are neighbours.
    let last = shape.len().checked_sub(1)?;
    let half = shape[last].as_const()?;
    let real = |a: usize| !shape[a].is(1);
    let strides = |l: &Layout, a: usize| l.axes[a].stride.clone();
    let is_head = |a: usize| real(a) && strides(&one.layout, a).is(2 * half);
    let heads: Vec<usize> = (0..last).filter(|&a| is_head(a)).collect();
    let count = match heads[..] {
        [] => 1,
        [a] => shape[a].as_const()?,
        _ => return None,
    };
    let rows: Vec<usize> = (0..last).filter(|a| real(*a) && !heads.contains(a)).collect();
    let lies = |layout: &Layout, start: i64| {
        let mut lines = Dim::new(n);
        let mut row_major = true;
        for &a in rows.iter().rev() {
            row_major &= strides(layout, a) == lines;
            lines = lines * &shape[a];
        }
        row_major
            && layout.axes.iter().all(|a| a.block.is_none())
            && layout.offset.is(start)
            && strides(layout, last).is(1)
            && heads.iter().all(|&a| strides(layout, a).is(2 * half))
    };
    let extents =
        |axes: &[usize]| numel(&axes.iter().map(|&a| shape[a].clone()).collect::<Vec<_>>());
    let whole = extents(&rows) == p.m
        && count * 2 * half == columns
        && n % (2 * half) == 0
        && half % 16 == 0
        && 2 * half * p.c.dtype.size() as i64 <= CHUNK_BYTES
        && lies(&one.layout, 0)
        && lies(&two.layout, half);
    if !whole {
        return None;
    }
    // What the halves are made of.
    let (mut sides, mut tables, mut lines) = ([None; 2], Vec::new(), None);
    for (i, node) in dag.nodes.iter().enumerate() {
        let DagOp::Ext(ext) = &node.op else {
            if matches!(node.op, DagOp::Map(_)) {
                continue;
            }
            return None;
        };
        if ext.shift.is_some() {
            return None;
        }
        if ext.buffer == place.buffer {
            let side = [one, two].iter().position(|s| s.layout == ext.layout)?;
            if sides[side].replace(i).is_some() {
                return None;
            }
            continue;
        }
        // The rows along which a table varies are the last ones.
        let varies = |a: &usize| !is_broadcast(&ext.layout.axes[*a]);
        let from = rows.iter().position(varies).unwrap_or(rows.len());
        let mut stride = Dim::new(half);
        let mut row_major = strides(&ext.layout, last).is(1) && !heads.iter().any(varies);
        for &a in rows[from..].iter().rev() {
            row_major &= varies(&a) && strides(&ext.layout, a) == stride;
            stride = stride * &shape[a];
        }
        let of = extents(&rows[from..]);
        let same = lines.get_or_insert_with(|| of.clone()) == &of;
        let known = |d: &Dim| {
            let mut known = true;
            d.for_each_symbol(&mut |s| {
                known &= made.planned.kernel.symbols.iter().any(|k| k.name == *s);
            });
            known
        };
        let plain = ext.layout.axes.iter().all(|a| a.block.is_none());
        if !(row_major && same && plain && known(&of) && known(&ext.layout.offset))
            || !there(low, ext.buffer, maker)
        {
            return None;
        }
        tables.push((i, ext));
    }
    let [Some(x), Some(y)] = sides else { return None };
    let mut given = vec![x, y];
    given.extend(tables.iter().map(|(i, _)| *i));
    let func = |node: usize| {
        let mut f = FuncBuilder::new();
        let names = ["x", "y"].into_iter().map(String::from);
        let names = names.chain((0..tables.len()).map(|i| format!("t{i}")));
        let params: Vec<_> = given
            .iter()
            .zip(names)
            .map(|(&i, name)| (i, f.param(&name, dag.nodes[i].dtype)))
            .collect();
        let first = params[0].1;
        let y = inline(dag, node, &mut f, first, &params);
        f.finish(y)
    };
    let halves = [func(one.node), func(two.node)];
    let result = p.c.dtype;
    let types = halves.iter().all(|f| f.dtype() == result)
        && [x, y].iter().all(|i| dag.nodes[*i].dtype == result);
    let first = made.planned.kernel.params.len();
    let vectors = tables.iter().enumerate().map(|(i, (_, ext))| Vector {
        param: first + i,
        dtype: ext.dtype,
        offset: ext.layout.offset.clone(),
    });
    let turned =
        Turned { width: 2 * half, heads: count, halves, tables: vectors.collect(), rows: lines? };
    let buffers = tables.iter().map(|(_, ext)| ext.buffer).collect();
    (types && !tables.is_empty()).then_some((turned, buffers))
}

/// Whether a buffer has its numbers before a step runs.
fn there(low: &Lowering<'_>, buffer: BufferId, step: usize) -> bool {
    let written = |s: &Step| match s {
        Step::Launch { kernel, args, .. } => {
            let params = low.plan.kernels[*kernel].kernel.params.iter();
            params.zip(args).any(|((_, p), a)| *a == buffer && p.access != Access::In)
        }
        Step::Library { outputs, .. } | Step::Host { outputs, .. } => outputs.contains(&buffer),
    };
    let later = low.plan.steps[step..].iter().any(written);
    let before = low.plan.steps[..step].iter().any(written);
    !later && (before || !matches!(low.plan.buffers[buffer].storage, Storage::Arena))
}

/// The product with its heads turned. None when its program has another form.
fn turning(low: &Lowering<'_>, maker: usize, turned: Turned) -> Result<Option<PlanKernel>> {
    let Some(made) = launched(&low.plan, maker) else { return Ok(None) };
    let (planned, product) = (made.planned, made.product);
    let old = &planned.kernel;
    let result = ParamId::from(product.c.param);
    let stores = old.body.stmts.iter().filter(|s| matches!(s, Stmt::Store { .. })).count();
    let Some(Stmt::Store { param, index, value }) = old.body.stmts.last() else {
        return Ok(None);
    };
    let cols = match &old.ty(*value).shape[..] {
        [_, cols] => old.tiles.iter().find(|t| *cols == Dim::sym((*t).clone())).cloned(),
        _ => None,
    };
    let Some(cols) = cols.filter(|_| *param == result && stores == 1 && index.len() == 2) else {
        return Ok(None);
    };
    // Tiles of whole heads.
    let name: std::sync::Arc<str> = format!("{cols}_heads").into();
    let wide = Dim::sym(name.clone()) * turned.width;
    let mut kernel = tilewright_tile::substitute(old, &|s| (*s == *cols).then(|| wide.clone()));
    kernel.name = format!("{}_turned", old.name);
    for tile in kernel.tiles.iter_mut().filter(|t| **t == cols) {
        *tile = name.clone();
    }
    let mut schedule = planned.schedule.clone();
    let width = schedule.tiles.remove(&cols).unwrap_or(turned.width);
    schedule.tiles.insert(name.clone(), (width + turned.width - 1) / turned.width);
    let (half, lines) = (Dim::new(turned.width / 2), turned.rows.clone());
    let mut tables = Vec::new();
    for table in &turned.tables {
        let mut name = format!("table{}", tables.len());
        while kernel.params.iter().any(|(_, p)| *p.name == *name) {
            name.push('_');
        }
        let mut layout = Layout::row_major(&[lines.clone(), half.clone()]);
        layout.offset = table.offset.clone();
        let param = Param { name: name.into(), dtype: table.dtype, layout, access: Access::In };
        tables.push(kernel.params.push(param));
    }
    let Some(Stmt::Store { param, index, value }) = kernel.body.stmts.pop() else {
        return Ok(None);
    };
    let (dtype, rows) = (kernel.ty(value).dtype, kernel.ty(value).shape[0].clone());
    let mut stmts = Vec::new();
    let values = &mut kernel.values;
    let mut emit = |op: TileOp, ty: TileType| {
        let id = values.push(TileInfo { name: String::new(), ty });
        stmts.push(Stmt::Let(id, op));
        id
    };
    let fill = crate::block::zero(DType::F32);
    // Tables begin again within a tile where its rows are of several sequences.
    let number = |extent: &Dim| TileType::new(DType::I64, [extent.clone()]);
    let count = |start: &Dim| TileOp::Iota { axis: 0, start: start.clone() };
    let along = |tile| Operand { tile, along: vec![0] };
    let args = vec![
        along(emit(count(&index[0]), number(&rows))),
        along(emit(count(&lines), number(&Dim::new(1)))),
    ];
    let func = Func::binary(ExprOp::Rem, DType::I64);
    let line = emit(TileOp::Map { func, args }, number(&rows));
    let loads = tables.iter().zip(&turned.tables).map(|(param, table)| {
        let index = vec![Dim::new(0), Dim::new(0)];
        let op = TileOp::Gather { param: *param, axis: 0, rows: line, index, fill };
        emit(op, TileType::new(table.dtype, [rows.clone(), half.clone()]))
    });
    let tables = loads.collect();
    let first = index[1].floor_div(&Dim::new(turned.width)) - &Dim::new(turned.heads);
    let halves = turned.halves.clone();
    let turn = Turn { tile: value, width: turned.width, first, halves, tables };
    let value = turn.build((&rows, &Dim::sym(name)), dtype, &mut emit);
    stmts.push(Stmt::Store { param, index, value });
    kernel.body.stmts.extend(stmts);
    tilewright_tile::verify(&kernel)?;
    let form = Form::Product(Box::new(Product { turns: Some(turned), ..product.clone() }));
    Ok(Some(PlanKernel { kernel: kernel.into(), schedule, forms: vec![form] }))
}
