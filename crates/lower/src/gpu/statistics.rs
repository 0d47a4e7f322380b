//! Sums over rows are left by the product that makes the rows, and products that scale their rows by them add up what was left.
//!
//! ```text
//! C = A B + R                            C = A B + R,  P[m,j] = sum of f(C) over part j of row m
//! r = g(sum of f(C) over a row)    =>
//! Y = C W * r                            Y = C W * g(P[m,0] + P[m,1] + ...)
//! ```
//!
//! The kernel in the middle, which reads all of `C` again, is gone. Side conditions: `f` and `g` read nothing else; one product writes `C`,
//! dense and row-major, with columns of a known number; products alone read `r`, as their vector along rows, and have as many of them.
//! Columns behind the last one of `C` must count as zero in sums: either there are none (the columns are whole parts), or the epilogue of zeros is zero.

use super::pairs::{drop_unused, users};
use super::{inline, no_blocks};
use crate::block::{Dag, DagOp};
use crate::views::is_broadcast;
use tilewright_base::{DType, Result};
use tilewright_expr::{Func, FuncBuilder};
use tilewright_layout::{Dim, Layout, numel};
use tilewright_plan::{
    Buffer, BufferId, Form, KernelId, LeftSums, PART_COLUMNS, Plan, PlanKernel, Product, RowSums,
    Step, Storage,
};
use tilewright_tile::{
    Access, Kernel, Operand, Param, ParamId, ReduceKind, Stmt, TileId, TileInfo, TileOp, TileType,
};

/// A kernel that makes one number of each row: `whole(sum of each(x) over the row)`.
#[derive(Clone, Debug)]
pub(crate) struct RowSum {
    from: BufferId,
    to: BufferId,
    each: Func,
    whole: Func,
}

/// Whether a layout over `shape` is row-major and dense along the axes before `end`, and repeats along the others.
fn dense(layout: &Layout, shape: &[Dim], end: usize) -> bool {
    let lies = |a: usize| {
        let axis = &layout.axes[a];
        match a < end {
            true => !is_broadcast(axis) && axis.stride == numel(&shape[a + 1..end]),
            false => is_broadcast(axis),
        }
    };
    let real = (0..shape.len()).filter(|&a| !shape[a].is(1));
    layout.offset.is(0) && no_blocks(layout) && real.into_iter().all(lies)
}

/// What a group of row reductions computes, if it is such a sum over the last axis.
pub(crate) fn row_sum(dag: &Dag, shape: &[Dim], reduced: &[usize]) -> Option<RowSum> {
    let last = shape.len().checked_sub(1)?;
    let ([store], true) = (dag.stores.as_slice(), reduced == [last]) else { return None };
    let (mut loaded, mut summed) = (None, None);
    for (i, node) in dag.nodes.iter().enumerate() {
        match &node.op {
            DagOp::Ext(_) if loaded.replace(i).is_some() => return None,
            DagOp::Reduce(ReduceKind::Sum) if summed.replace(i).is_some() => return None,
            DagOp::Ext(_) | DagOp::Reduce(ReduceKind::Sum) | DagOp::Map(_) => {}
            _ => return None,
        }
    }
    let (loaded, summed) = (loaded?, summed?);
    let DagOp::Ext(ext) = &dag.nodes[loaded].op else { return None };
    let types = [dag.nodes[summed].dtype, dag.nodes[store.node].dtype];
    let lies = dense(&ext.layout, shape, last + 1) && dense(&store.layout, shape, last);
    let direct = reads(dag, store.node, summed, loaded);
    if types != [DType::F32; 2] || ext.shift.is_some() || !lies || direct {
        return None;
    }
    let mut f = FuncBuilder::new();
    let x = f.param("x", ext.dtype);
    let y = inline(dag, dag.nodes[summed].args[0], &mut f, x, &[(loaded, x)]);
    let each = f.finish(y);
    let mut f = FuncBuilder::new();
    let sum = f.param("sum", DType::F32);
    let y = inline(dag, store.node, &mut f, sum, &[(summed, sum)]);
    Some(RowSum { from: ext.buffer, to: store.buffer, each, whole: f.finish(y) })
}

/// Whether a node reads another otherwise than through `past`.
fn reads(dag: &Dag, node: usize, past: usize, other: usize) -> bool {
    node == other
        || node != past && dag.nodes[node].args.iter().any(|&a| reads(dag, a, past, other))
}

/// A step that launches a kernel whose only form is a single matrix product.
struct Launched<'a> {
    planned: &'a PlanKernel,
    product: &'a Product,
    args: &'a [BufferId],
}

fn launched(plan: &Plan, at: usize) -> Option<Launched<'_>> {
    let Step::Launch { kernel, args, .. } = plan.steps.get(at)? else { return None };
    let planned = &plan.kernels[*kernel];
    let [Form::Product(product)] = planned.forms.as_slice() else { return None };
    let single = product.windows.is_none()
        && product.prologue.is_none()
        && product.repeat.is_empty()
        && product.sum == DType::F32;
    single.then_some(Launched { planned, product, args })
}

/// Whether a step reads or writes a buffer.
fn touches(step: &Step, buffer: BufferId) -> bool {
    match step {
        Step::Launch { args, .. } => args.contains(&buffer),
        Step::Library { inputs, outputs, .. } | Step::Host { inputs, outputs, .. } => {
            inputs.contains(&buffer) || outputs.contains(&buffer)
        }
    }
}

/// Has every such sum left by the product before it; says which.
///
/// # Errors
/// A bug: a program that breaks the rules.
pub(crate) fn sums_from_products(plan: &mut Plan, sums: &[RowSum]) -> Result<Vec<String>> {
    let mut said = Vec::new();
    for sum in sums {
        if let Some(change) = change(plan, sum)? {
            let (from, to) = (&plan.buffers[sum.from].name, &plan.buffers[sum.to].name);
            said.push(format!(
                "taken: the product that makes {from} leaves the sums that {to} is made of"
            ));
            change.apply(plan);
        }
    }
    drop_unused(plan);
    Ok(said)
}

/// New steps in place of old ones.
struct Change {
    sums: Buffer,
    /// Step, kernel, and which argument the sums are; one behind the last is added.
    steps: Vec<(usize, PlanKernel, usize)>,
    /// The step that is not needed any more.
    gone: usize,
}

impl Change {
    fn apply(self, plan: &mut Plan) {
        let sums = plan.buffers.push(self.sums);
        for (at, new, place) in self.steps {
            let known = plan.kernels.iter().find(|(_, k)| {
                k.schedule == new.schedule && k.kernel == new.kernel && k.forms == new.forms
            });
            let known: Option<KernelId> = known.map(|(id, _)| id);
            let id = known.unwrap_or_else(|| plan.kernels.push(new));
            let Step::Launch { kernel, args, .. } = &mut plan.steps[at] else { continue };
            *kernel = id;
            match args.get_mut(place) {
                Some(arg) => *arg = sums,
                None => args.push(sums),
            }
        }
        plan.steps.remove(self.gone);
    }
}

fn change(plan: &Plan, sum: &RowSum) -> Result<Option<Change>> {
    let arena = matches!(plan.buffers[sum.to].storage, Storage::Arena);
    let writes = |i: usize| {
        let Step::Launch { kernel, args, .. } = &plan.steps[i] else { return false };
        let params = plan.kernels[*kernel].kernel.params.iter();
        params.zip(args).any(|((_, p), a)| *a == sum.to && p.access == Access::Out)
    };
    let touching: Vec<usize> =
        (0..plan.steps.len()).filter(|&i| touches(&plan.steps[i], sum.to)).collect();
    let Some((&gone, readers)) = touching.split_first() else { return Ok(None) };
    if !arena || !writes(gone) || readers.is_empty() || users(plan, sum.to) != touching.len() {
        return Ok(None);
    }
    let Some(maker) = (0..gone)
        .rev()
        .find(|&i| launched(plan, i).is_some_and(|l| l.args[l.product.c.param] == sum.from))
    else {
        return Ok(None);
    };
    // Nobody writes the rows in between.
    let between = (maker + 1..gone).any(|i| match &plan.steps[i] {
        Step::Launch { kernel, args, .. } => {
            let params = plan.kernels[*kernel].kernel.params.iter();
            params.zip(args).any(|((_, p), a)| *a == sum.from && p.access != Access::In)
        }
        Step::Library { outputs, .. } | Step::Host { outputs, .. } => outputs.contains(&sum.from),
    });
    let Some(made) = launched(plan, maker).filter(|_| !between) else { return Ok(None) };
    let Some(parts) = parts_of(&made, sum) else { return Ok(None) };
    let rows = made.product.m.clone();
    let Some(kernel) = leaving(&made, sum, parts)? else { return Ok(None) };
    let mut steps = vec![(maker, kernel, made.args.len())];
    for &at in readers {
        let Some(reader) = launched(plan, at).filter(|l| l.product.m == rows) else {
            return Ok(None);
        };
        let Some((kernel, place)) = reading(&reader, sum, parts)? else { return Ok(None) };
        steps.push((at, kernel, place));
    }
    let name = format!("{} sums", plan.buffers[sum.from].name);
    let layout = Layout::row_major(&[rows, Dim::new(parts)]);
    let sums = Buffer { name, value: None, dtype: DType::F32, layout, storage: Storage::Arena };
    Ok(Some(Change { sums, steps, gone }))
}

/// How many parts the rows of a product's result have, when sums over them can be left.
fn parts_of(made: &Launched<'_>, sum: &RowSum) -> Option<i64> {
    let p = made.product;
    let n = p.n.as_const().filter(|n| *n > 0)?;
    let dense = p.c.offset.is(0) && p.c.col.is(1) && (p.c.row.is(n) || p.m.is(1));
    let alone = p.leaves.is_none() && p.second.is_none();
    let types = p.c.dtype == sum.each.params()[0].dtype && p.c.dtype.is_float();
    let whole = n % PART_COLUMNS == 0;
    let zeros = vec![0.0; p.epilogue.params().len()];
    let behind =
        p.rows.is_none() && p.epilogue.eval_f64(&zeros) == 0.0 && sum.each.eval_f64(&[0.0]) == 0.0;
    (dense && alone && types && (whole || behind)).then(|| (n + PART_COLUMNS - 1) / PART_COLUMNS)
}

/// The product that also leaves sums, in a parameter of its own behind the others. None when its program has another form.
fn leaving(made: &Launched<'_>, sum: &RowSum, parts: i64) -> Result<Option<PlanKernel>> {
    let (planned, product) = (made.planned, made.product);
    let old = &planned.kernel;
    let result = ParamId::from(product.c.param);
    let stores = old.body.stmts.iter().filter(|s| matches!(s, Stmt::Store { .. })).count();
    let Some(Stmt::Store { param, index, value }) = old.body.stmts.last() else {
        return Ok(None);
    };
    let shape = old.ty(*value).shape.clone();
    let cols = match &shape[..] {
        [_, cols] => old.tiles.iter().find(|t| *cols == Dim::sym((*t).clone())).cloned(),
        _ => None,
    };
    let Some(cols) = cols.filter(|_| *param == result && stores == 1 && index.len() == 2) else {
        return Ok(None);
    };
    // Tiles of whole parts.
    let name: std::sync::Arc<str> = format!("{cols}_parts").into();
    let wide = Dim::sym(name.clone()) * PART_COLUMNS;
    let mut kernel = tilewright_tile::substitute(old, &|s| (*s == *cols).then(|| wide.clone()));
    kernel.name = format!("{}_sums", old.name);
    for tile in kernel.tiles.iter_mut().filter(|t| **t == cols) {
        *tile = name.clone();
    }
    let mut schedule = planned.schedule.clone();
    let width = schedule.tiles.remove(&cols).unwrap_or(PART_COLUMNS);
    schedule.tiles.insert(name.clone(), (width + PART_COLUMNS - 1) / PART_COLUMNS);
    let mut param_name = "sums".to_string();
    while kernel.params.iter().any(|(_, p)| *p.name == *param_name) {
        param_name.push('_');
    }
    let param = kernel.params.push(Param {
        name: param_name.into(),
        dtype: DType::F32,
        layout: Layout::row_major(&[product.m.clone(), Dim::new(parts)]),
        access: Access::Out,
    });
    let Some(Stmt::Store { index, value, .. }) = kernel.body.stmts.last().cloned() else {
        return Ok(None);
    };
    let rows = kernel.ty(value).shape[0].clone();
    let mut steps = Steps { kernel: &mut kernel, stmts: Vec::new() };
    let tile = vec![rows.clone(), wide];
    let args = vec![Operand { tile: value, along: vec![0, 1] }];
    let each = TileOp::Map { func: sum.each.clone(), args };
    let each = steps.add(each, tile);
    let counted = vec![rows.clone(), Dim::sym(name.clone()), Dim::new(PART_COLUMNS)];
    let each = steps.add(TileOp::Reshape(each), counted);
    let sums = TileOp::Reduce { kind: ReduceKind::Sum, x: each, axis: 2, limit: None };
    let sums = steps.add(sums, vec![rows, Dim::sym(name)]);
    let at = vec![index[0].clone(), index[1].floor_div(&Dim::new(PART_COLUMNS))];
    let mut stmts = steps.stmts;
    stmts.push(Stmt::Store { param, index: at, value: sums });
    kernel.body.stmts.extend(stmts);
    tilewright_tile::verify(&kernel)?;
    let leaves = Some(LeftSums { param: param.index(), func: sum.each.clone() });
    let form = Form::Product(Box::new(Product { leaves, ..product.clone() }));
    Ok(Some(PlanKernel { kernel: kernel.into(), schedule, forms: vec![form] }))
}

/// The product whose vector along rows is made of sums, and which argument that is. None when its program has another form.
fn reading(reader: &Launched<'_>, sum: &RowSum, parts: i64) -> Result<Option<(PlanKernel, usize)>> {
    let (planned, product) = (reader.planned, reader.product);
    let Some(rows) = &product.rows else { return Ok(None) };
    let once = reader.args.iter().filter(|a| **a == sum.to).count() == 1;
    let plain = rows.offset.is(0) && rows.dtype == DType::F32 && product.row_sums.is_none();
    if !once || !plain || reader.args[rows.param] != sum.to {
        return Ok(None);
    }
    let mut kernel = (*planned.kernel).clone();
    let param = ParamId::from(rows.param);
    let [axis] = &kernel.params[param].layout.axes[..] else { return Ok(None) };
    let count = axis.extent.clone();
    kernel.params[param].layout = Layout::row_major(&[count, Dim::new(parts)]);
    let mut stmts = Vec::new();
    for stmt in std::mem::take(&mut kernel.body.stmts) {
        let (id, start) = match &stmt {
            Stmt::Let(id, TileOp::Load { param: p, index, steps, .. }) if *p == param => {
                match (&index[..], &steps[..]) {
                    ([start], [1]) => (*id, start.clone()),
                    _ => return Ok(None),
                }
            }
            Stmt::For(f) if mentions(&f.body.stmts, param) => return Ok(None),
            Stmt::If(_) => return Ok(None),
            _ => {
                stmts.push(stmt);
                continue;
            }
        };
        let [tile_rows] = &kernel.ty(id).shape[..] else { return Ok(None) };
        let tile_rows = tile_rows.clone();
        let mut steps = Steps { kernel: &mut kernel, stmts: Vec::new() };
        let load = TileOp::Load {
            param,
            index: vec![start, Dim::new(0)],
            steps: vec![1, 1],
            fill: crate::block::zero(DType::F32),
        };
        let loaded = steps.add(load, vec![tile_rows.clone(), Dim::new(parts)]);
        let total = TileOp::Reduce { kind: ReduceKind::Sum, x: loaded, axis: 1, limit: None };
        let total = steps.add(total, vec![tile_rows]);
        stmts.append(&mut steps.stmts);
        let args = vec![Operand { tile: total, along: vec![0] }];
        stmts.push(Stmt::Let(id, TileOp::Map { func: sum.whole.clone(), args }));
    }
    kernel.body.stmts = stmts;
    kernel.name = format!("{}_of_sums", kernel.name);
    tilewright_tile::verify(&kernel)?;
    let row_sums = Some(RowSums { parts, func: sum.whole.clone() });
    let form = Form::Product(Box::new(Product { row_sums, ..product.clone() }));
    let schedule = planned.schedule.clone();
    Ok(Some((PlanKernel { kernel: kernel.into(), schedule, forms: vec![form] }, rows.param)))
}

/// Whether steps load from a tensor.
fn mentions(stmts: &[Stmt], param: ParamId) -> bool {
    stmts.iter().any(|s| match s {
        Stmt::Let(_, TileOp::Load { param: p, .. } | TileOp::Gather { param: p, .. }) => {
            *p == param
        }
        Stmt::For(f) => mentions(&f.body.stmts, param),
        _ => false,
    })
}

/// New steps of a kernel, in f32.
struct Steps<'a> {
    kernel: &'a mut Kernel,
    stmts: Vec<Stmt>,
}

impl Steps<'_> {
    fn add(&mut self, op: TileOp, shape: Vec<Dim>) -> TileId {
        let ty = TileType::new(DType::F32, shape);
        let id = self.kernel.values.push(TileInfo { name: String::new(), ty });
        self.stmts.push(Stmt::Let(id, op));
        id
    }
}
