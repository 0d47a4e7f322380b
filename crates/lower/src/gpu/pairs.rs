//! Gated units: two products of one operand, where the epilogue of one reads the result of the other, become one
//! kernel with two sums (`silu(x gate) * (x up)`).
//!
//! ```text
//! G = f(A B1)                 one step: C = g(A B2, f(A B1)), a product with a second right operand,
//! C = g(A B2, G)       =>     and the tile program that says so: that of G, then that of C, whose loads of G
//!                             are the tile that was stored
//! ```
//!
//! Side conditions: nobody else reads `G`; both products have the same sizes and the same left operand; the right operands
//! lie alike; both have a vector along columns or neither has one; where both have a vector along rows, it is the same one. Weights stay where
//! they are: two tensors, read by one kernel.

use std::sync::Arc;
use tilewright_base::{IdVec, Result};
use tilewright_expr::{ExprId, Func, FuncBuilder};
use tilewright_plan::{
    BufferId, Form, KernelId, Note, Plan, PlanKernel, Product, Second, Step, Storage, Vector,
};
use tilewright_tile::{Access, Block, Kernel, Names, Param, ParamId, Stmt, TileId, TileOp};

/// A step that launches a kernel whose only form is a product.
struct Launched<'a> {
    at: usize,
    planned: &'a PlanKernel,
    product: &'a Product,
    args: &'a [BufferId],
    note: &'a Note,
}

fn launched(plan: &Plan, at: usize) -> Option<Launched<'_>> {
    let Step::Launch { kernel, args, note, .. } = plan.steps.get(at)? else { return None };
    let planned = &plan.kernels[*kernel];
    let [Form::Product(product)] = planned.forms.as_slice() else { return None };
    let plain = product.windows.is_none() && product.prologue.is_none();
    (product.second.is_none() && plain).then_some(Launched { at, planned, product, args, note })
}

/// How many steps use a buffer.
pub(super) fn users(plan: &Plan, buffer: BufferId) -> usize {
    let uses = |step: &&Step| match step {
        Step::Launch { args, .. } => args.contains(&buffer),
        Step::Library { inputs, outputs, .. } | Step::Host { inputs, outputs, .. } => {
            inputs.contains(&buffer) || outputs.contains(&buffer)
        }
    };
    plan.steps.iter().filter(uses).count()
}

/// Makes every such pair one step.
///
/// # Errors
/// A bug: a program that breaks the rules.
pub(crate) fn pair_products(plan: &mut Plan) -> Result<()> {
    let mut at = 0;
    while at < plan.steps.len() {
        if let Some((first, step, kernel)) = paired(plan, at)? {
            let Step::Launch { args, note, .. } = step else { continue };
            let sizes = kernel.kernel.symbols.iter();
            let sizes = sizes.map(|s| tilewright_layout::Dim::sym(s.name.clone())).collect();
            let known = plan.kernels.iter().find(|(_, k)| {
                k.schedule == kernel.schedule
                    && k.kernel == kernel.kernel
                    && k.forms == kernel.forms
            });
            let known = known.map(|(id, _)| id);
            let kernel = known.unwrap_or_else(|| plan.kernels.push(kernel));
            plan.steps[at] = Step::Launch { kernel, args, sizes, note };
            plan.steps.remove(first);
        } else {
            at += 1;
        }
    }
    drop_unused(plan);
    Ok(())
}

/// Kernels that no step launches any more.
pub(super) fn drop_unused(plan: &mut Plan) {
    let used = |id: KernelId| {
        plan.steps.iter().any(|s| matches!(s, Step::Launch { kernel, .. } if *kernel == id))
    };
    let mut kept = IdVec::new();
    let new: Vec<Option<KernelId>> = plan
        .kernels
        .iter()
        .map(|(id, kernel)| used(id).then(|| kept.push(kernel.clone())))
        .collect();
    for step in &mut plan.steps {
        if let Step::Launch { kernel, .. } = step
            && let Some(id) = new[kernel.index()]
        {
            *kernel = id;
        }
    }
    plan.kernels = kept;
}

/// The step at `at` with the product whose result it reads: where that one is, the step that does both, its kernel.
fn paired(plan: &Plan, at: usize) -> Result<Option<(usize, Step, PlanKernel)>> {
    let Some(last) = launched(plan, at) else { return Ok(None) };
    let Some(read) = &last.product.residual else { return Ok(None) };
    let gate = last.args[read.param];
    let writes = |i: &usize| launched(plan, *i).is_some_and(|l| l.args[l.product.c.param] == gate);
    let Some(first) = (0..at).find(writes).and_then(|i| launched(plan, i)) else { return Ok(None) };
    let arena = matches!(plan.buffers[gate].storage, Storage::Arena);
    if !arena || users(plan, gate) != 2 || !fits(&first, &last, read) {
        return Ok(None);
    }
    let Some(joined) = join(&first, &last, read.param) else { return Ok(None) };
    tilewright_tile::verify(&joined.kernel)?;
    let product = product(&first, &last, &joined);
    let note = Note {
        label: format!("{} with {}", last.note.label, first.note.label),
        anchor: last.note.anchor.clone(),
        nodes: first.note.nodes.iter().chain(&last.note.nodes).cloned().collect(),
        flops: first.note.flops.clone() + &last.note.flops,
        bytes: first.note.bytes.clone() + &last.note.bytes,
        bytes_saved: first.note.bytes_saved.clone() + &last.note.bytes_saved,
        estimate_ns: first.note.estimate_ns + last.note.estimate_ns,
    };
    let step = Step::Launch { kernel: KernelId::from(0), args: joined.args, sizes: vec![], note };
    let kernel = PlanKernel {
        kernel: Arc::new(joined.kernel),
        schedule: last.planned.schedule.clone(),
        forms: vec![Form::Product(Box::new(product))],
    };
    Ok(Some((first.at, step, kernel)))
}

/// Whether two products are a pair; `read` is the first one's result as the second one reads it.
fn fits(first: &Launched<'_>, last: &Launched<'_>, read: &Vector) -> bool {
    let (p, q) = (first.product, last.product);
    let lies = |m: &tilewright_plan::Matrix| (m.dtype, m.row.clone(), m.col.clone());
    let rows_agree = match (&p.rows, &q.rows) {
        (Some(v), Some(w)) => {
            let from = (first.args[v.param], last.args[w.param]);
            from.0 == from.1 && (v.dtype, &v.offset) == (w.dtype, &w.offset)
        }
        _ => true,
    };
    (&p.m, &p.n, &p.k, &p.repeat) == (&q.m, &q.n, &q.k, &q.repeat)
        && first.args[p.a.param] == last.args[q.a.param]
        && (lies(&p.a), &p.a.offset) == (lies(&q.a), &q.a.offset)
        && lies(&p.b) == lies(&q.b)
        && (&p.c.row, &p.c.col) == (&q.c.row, &q.c.col)
        && p.c.offset == read.offset
        && p.c.dtype == read.dtype
        && (p.sum, p.tf32) == (q.sum, q.tf32)
        && p.cols.as_ref().map(|v| v.dtype) == q.cols.as_ref().map(|v| v.dtype)
        && rows_agree
        && first.planned.schedule.tiles == last.planned.schedule.tiles
}

/// Both programs as one, and where the parameters of each went.
struct Joined {
    kernel: Kernel,
    args: Vec<BufferId>,
    first: Vec<ParamId>,
    last: Vec<ParamId>,
}

/// The first program, then the second one, in which loads of the first one's result are the tile that was to be stored.
/// None when the programs walk their results differently.
fn join(first: &Launched<'_>, last: &Launched<'_>, read: usize) -> Option<Joined> {
    let (k, l) = (&first.planned.kernel, &last.planned.kernel);
    let stored = ParamId::from(first.product.c.param);
    let read = ParamId::from(read);
    if k.grid != l.grid || k.tiles != l.tiles {
        return None;
    }
    let (Stmt::Store { param, index, value }, before) = k.body.stmts.split_last()? else {
        return None;
    };
    if *param != stored || mentions(before, stored) {
        return None;
    }
    // Parameters: the second program's without what it reads of the first, then what the first one has beside them.
    let mut params: IdVec<ParamId, Param> = IdVec::new();
    let mut args = Vec::new();
    let mut new_last = Vec::new();
    for (id, param) in l.params.iter() {
        // What is read of the first product is read nowhere any more.
        new_last.push(if id == read { ParamId::from(0) } else { params.push(param.clone()) });
        args.extend((id != read).then(|| last.args[id.index()]));
    }
    let mut new_first = Vec::new();
    for (id, param) in k.params.iter() {
        let buffer = first.args[id.index()];
        let same = params.iter().find(|(at, p)| {
            args[at.index()] == buffer
                && p.access == Access::In
                && (p.dtype, &p.layout, p.access) == (param.dtype, &param.layout, param.access)
        });
        new_first.push(match same.map(|(at, _)| at) {
            _ if id == stored => ParamId::from(0),
            Some(at) => at,
            None => {
                let mut name = param.name.to_string();
                while params.iter().any(|(_, p)| *p.name == *name) {
                    name.push('2');
                }
                args.push(buffer);
                params.push(Param { name: name.into(), ..param.clone() })
            }
        });
    }
    // Tiles: the second program's keep their numbers.
    let mut values = l.values.clone();
    let shift = values.len();
    for (_, info) in k.values.iter() {
        let mut info = info.clone();
        info.name.clear();
        values.push(info);
    }
    let moved = |t: TileId| TileId::from(t.index() + shift);
    let names = Names { param: &|p| new_first[p.index()], tile: &moved };
    let mut stmts: Vec<Stmt> = before.iter().map(|s| names.stmt(s)).collect();
    let kept = moved(*value);
    let ty = k.ty(*value);
    let mut loads = Vec::new();
    for stmt in &l.body.stmts {
        match stmt {
            Stmt::Let(id, TileOp::Load { param, index: at, steps, .. }) if *param == read => {
                if at != index || steps.iter().any(|s| *s != 1) || l.ty(*id) != ty {
                    return None;
                }
                loads.push(*id);
            }
            other if mentions(std::slice::from_ref(other), read) => return None,
            _ => {}
        }
    }
    let tile = |t: TileId| if loads.contains(&t) { kept } else { t };
    let names = Names { param: &|p| new_last[p.index()], tile: &tile };
    let rest = l.body.stmts.iter().filter(|s| !matches!(s, Stmt::Let(id, _) if loads.contains(id)));
    stmts.extend(rest.map(|s| names.stmt(s)));
    let mut symbols = l.symbols.clone();
    let more = k.symbols.iter().filter(|s| l.symbols.iter().all(|t| t.name != s.name));
    symbols.extend(more.cloned());
    let kernel = Kernel {
        name: format!("{}_{}", k.name, l.name),
        params,
        symbols,
        tiles: l.tiles.clone(),
        bounds: l.bounds.clone(),
        grid: l.grid.clone(),
        values,
        body: Block { stmts },
    };
    Some(Joined { kernel, args, first: new_first, last: new_last })
}

/// Whether steps read or write a tensor.
fn mentions(stmts: &[Stmt], param: ParamId) -> bool {
    let found = std::cell::Cell::new(false);
    let look = |p: ParamId| {
        found.set(found.get() || p == param);
        p
    };
    let names = Names { param: &look, tile: &|t| t };
    stmts.iter().for_each(|s| drop(names.stmt(s)));
    found.get()
}

/// The product with both right operands: the first sum is the first product's.
fn product(first: &Launched<'_>, last: &Launched<'_>, joined: &Joined) -> Product {
    let (p, q) = (first.product, last.product);
    let of = |new: &[ParamId], param: usize| new[param].index();
    let vector = |v: &Option<Vector>, new: &[ParamId]| {
        v.as_ref().map(|v| Vector { param: of(new, v.param), ..v.clone() })
    };
    let matrix = |m: &tilewright_plan::Matrix, new: &[ParamId]| tilewright_plan::Matrix {
        param: of(new, m.param),
        ..m.clone()
    };
    let cols = vector(&p.cols, &joined.first);
    let second_cols = vector(&q.cols, &joined.last);
    let rows = vector(&p.rows, &joined.first).or(vector(&q.rows, &joined.last));
    let residual = vector(&p.residual, &joined.first);
    // Parameters in the order of a pair's.
    let mut f = FuncBuilder::new();
    let sums = ["sum", "sum2"].map(|name| f.param(name, p.sum));
    let mut given = |v: &Option<Vector>, name: &str| v.as_ref().map(|v| f.param(name, v.dtype));
    let cols_in = [given(&cols, "cols"), given(&second_cols, "cols2")];
    let rows_in = given(&rows, "rows");
    let residual_in = given(&residual, "residual");
    let mut call = |func: &Func, args: &[Option<ExprId>]| {
        let args: Vec<ExprId> = args.iter().copied().flatten().collect();
        f.inline(func, &args)
    };
    let rows_of = |v: &Option<Vector>| rows_in.filter(|_| v.is_some());
    let gate = [Some(sums[0]), cols_in[0], rows_of(&p.rows), residual_in];
    let gate = call(&p.epilogue, &gate);
    let both = [Some(sums[1]), cols_in[1], rows_of(&q.rows), Some(gate)];
    let result = call(&q.epilogue, &both);
    let epilogue = f.finish(result);
    Product {
        windows: None,
        prologue: None,
        m: q.m.clone(),
        n: q.n.clone(),
        k: q.k.clone(),
        repeat: q.repeat.clone(),
        a: matrix(&q.a, &joined.last),
        b: matrix(&p.b, &joined.first),
        c: matrix(&q.c, &joined.last),
        tf32: q.tf32,
        sum: q.sum,
        epilogue,
        cols,
        rows,
        residual,
        second: Some(Second { b: matrix(&q.b, &joined.last), cols: second_cols }),
        row_sums: None,
        leaves: None,
    }
}
