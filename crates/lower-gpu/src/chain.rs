//! Loops in which products feed each other: what is computed on register tiles, in which order, and in which
//! fragments.
//!
//! ```text
//! for each turn:  S = A B_t            products whose operands come through shared memory
//!                 maps, row reductions on S, per-row values that the loop carries
//!                 C = C' + f(S) D_t    a product whose left operand is made in registers
//! ```
//!
//! A last product of this form may run one turn late, beside the first products of the next turn: its
//! accumulator and its left operand are then touched only by steps that wait for it (the late steps).
//!
//! Conditions on positions (`hide where column > row`) hold for no element on most turns. They are linear in
//! the loop variable, so the loop is cut where they begin to matter, and the turns before it run simpler
//! functions.

use crate::hopper::{Builder, main_loop};
use crate::schedule::ProductKind;
use crate::streams::{
    Defs, LoadView, Stream, check_limit, computed_from, definitions, extents, load_view, stream,
    tf32_round,
};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Extent, FragId};
use tilewright_expr::{Func, FuncBuilder, Node, Op, Value};
use tilewright_layout::{Atom, Dim, atom_dim, linear_in, mentions};
use tilewright_tile::{For, Kernel, Operand, ReduceKind, Stmt, TileId, TileOp};

/// Left operand of a product.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Left {
    /// Through shared memory.
    Stream(usize),
    /// A register tile of the same turn.
    Registers(TileId),
}

/// One step on register tiles.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// `result = acc + a * b`, or the transpose of the stream's tile where `turned`; from zero without `acc`.
    Product { result: TileId, acc: Option<TileId>, a: Left, b: usize, turned: bool },
    /// Elementwise; `early` is what is left of it on the turns before the cut.
    Map { result: TileId, func: Func, args: Vec<Operand>, early: Option<(Func, Vec<Operand>)> },
    /// Along columns.
    Reduce { result: TileId, kind: ReduceKind, x: TileId },
}

impl Step {
    pub(crate) fn result(&self) -> TileId {
        match self {
            Step::Product { result, .. }
            | Step::Map { result, .. }
            | Step::Reduce { result, .. } => *result,
        }
    }

    pub(crate) fn uses(&self) -> Vec<TileId> {
        match self {
            Step::Product { acc, a, .. } => {
                let left = match a {
                    Left::Registers(t) => Some(*t),
                    Left::Stream(_) => None,
                };
                acc.iter().copied().chain(left).collect()
            }
            Step::Map { args, .. } => args.iter().map(|a| a.tile).collect(),
            Step::Reduce { x, .. } => vec![*x],
        }
    }
}

/// A loop taken apart.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Tiles that go through shared memory.
    pub(crate) streams: Vec<Stream>,
    /// Which of them are the same on every turn.
    pub(crate) invariant: Vec<bool>,
    /// Steps in order, without the next two.
    pub(crate) steps: Vec<Step>,
    /// Steps that wait for the deferred product of the turn before.
    pub(crate) late: Vec<Step>,
    /// The product that runs one turn late.
    pub(crate) deferred: Option<Step>,
    /// Products run in the order of the program, each waited for where its result is used: loops with several
    /// products whose left operands are made in registers, or that read a tile and its transpose.
    pub(crate) in_order: bool,
    /// On turns below this the `early` forms of maps hold.
    pub(crate) cut: Option<Dim>,
    /// Where register tiles are.
    pub(crate) frags: BTreeMap<TileId, FragId>,
    /// Fragments of the carried tiles.
    pub(crate) carried: Vec<FragId>,
    /// At the end of a turn: from, to.
    pub(crate) copies: Vec<(FragId, FragId)>,
}

/// Whether a kernel has one loop whose products feed each other, or that reduces between products.
pub(crate) fn is_chained(kernel: &Kernel) -> Result<bool> {
    let Ok((before, body, _)) = main_loop(kernel) else { return Ok(false) };
    let mut defs = definitions(&body.body.stmts);
    defs.extend(definitions(before));
    let tf32 = tf32_round();
    Ok(body.body.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(_, TileOp::Reduce { .. }) => true,
        Stmt::Let(_, TileOp::Mma { a, .. }) => {
            let a = match defs.get(a) {
                Some(TileOp::Map { func, args }) if *func == tf32 => args[0].tile,
                _ => *a,
            };
            load_view(kernel, &defs, a).is_none()
                && computed_from(kernel, &defs, a, &mut Vec::new()).is_none()
        }
        _ => false,
    }))
}

/// Takes a loop apart, or says what does not fit.
pub(crate) fn chain(
    b: &mut Builder<'_>,
    before: &[Stmt],
    body: &For,
    product: ProductKind,
) -> Result<Chain> {
    let kernel = b.kernel;
    let outer = definitions(before);
    let mut defs = definitions(&body.body.stmts);
    defs.extend(outer.iter().map(|(id, op)| (*id, *op)));
    let is_zero = |tile: &TileId| match defs.get(tile) {
        Some(TileOp::Full(Value::Int(v))) => *v == 0,
        Some(TileOp::Full(Value::Float(v))) => v.to_bits() == 0,
        _ => false,
    };
    let tf32 = tf32_round();
    let mut streams: Vec<Stream> = Vec::new();
    let mut invariant = Vec::new();
    let mut steps = Vec::new();
    let mut in_registers: BTreeSet<TileId> = body.carry.iter().map(|c| c.0).collect();
    for stmt in &body.body.stmts {
        let Stmt::Let(id, op) = stmt else {
            return Err(Error::unsupported("a loop over products that stores, branches or loops"));
        };
        match op {
            TileOp::Mma { acc, a, b: right, limit } => {
                let mut operand = |tile: TileId,
                                   depth_axis: usize|
                 -> Result<Option<(usize, bool)>> {
                    let (loaded, rounded) = match defs.get(&tile) {
                        Some(TileOp::Map { func, args }) if *func == tf32 => (args[0].tile, true),
                        _ => (tile, false),
                    };
                    let Some(view) = load_view(kernel, &defs, loaded) else { return Ok(None) };
                    check_limit(kernel, &view, view.axes[depth_axis], limit.as_ref())?;
                    if let Some(i) = streams.iter().position(|s| s.view == view) {
                        return Ok(Some((i, false)));
                    }
                    // The tensor cores read tiles of 16 bits either way.
                    let other = LoadView {
                        axes: view.axes.iter().rev().copied().collect(),
                        ..view.clone()
                    };
                    let bits = kernel.params[view.param].dtype.bits();
                    let both = product == ProductKind::Wgmma && bits == 16 && depth_axis == 0;
                    if let Some(i) = streams.iter().position(|s| both && s.view == other) {
                        return Ok(Some((i, true)));
                    }
                    let shape = extents(kernel, loaded)?;
                    let once = outer.contains_key(&view.load);
                    let sizes = (shape[0], shape[1]);
                    let s = stream(kernel, view, sizes, depth_axis, rounded, product)?;
                    streams.push(s);
                    invariant.push(once);
                    Ok(Some((streams.len() - 1, false)))
                };
                let Some((right, turned)) = operand(*right, 0)? else {
                    return Err(Error::unsupported("a right operand that is not a plain load"));
                };
                let a = match operand(*a, 1)? {
                    Some((stream, _)) => Left::Stream(stream),
                    None if limit.is_some() => {
                        return Err(Error::unsupported(
                            "a product of register tiles that stops before its operands",
                        ));
                    }
                    None if in_registers.contains(a) => Left::Registers(match defs.get(a) {
                        // `mma.sync` rounds what it takes from registers itself.
                        Some(TileOp::Map { func, args })
                            if product == ProductKind::MmaSync && *func == tf32 =>
                        {
                            args[0].tile
                        }
                        _ => *a,
                    }),
                    None => {
                        return Err(Error::unsupported(
                            "an operand that no step of the loop makes",
                        ));
                    }
                };
                let acc = match (in_registers.contains(acc), is_zero(acc)) {
                    (true, _) => Some(*acc),
                    (false, true) => None,
                    _ => {
                        return Err(Error::unsupported(
                            "a product that adds to a tile from outside its loop",
                        ));
                    }
                };
                steps.push(Step::Product { result: *id, acc, a, b: right, turned });
                in_registers.insert(*id);
            }
            TileOp::Map { func, args } if args.iter().any(|a| in_registers.contains(&a.tile)) => {
                let (func, args) = (func.clone(), args.clone());
                steps.push(Step::Map { result: *id, func, args, early: None });
                in_registers.insert(*id);
            }
            TileOp::Reduce { kind, x, axis, limit } if in_registers.contains(x) => {
                if *axis != 1 || limit.is_some() || kernel.ty(*x).shape.len() != 2 {
                    return Err(Error::unsupported(
                        "reductions between products other than of whole rows",
                    ));
                }
                steps.push(Step::Reduce { result: *id, kind: *kind, x: *x });
                in_registers.insert(*id);
            }
            other if uses_any(other, &in_registers) => {
                return Err(Error::unsupported("this step between products"));
            }
            // What no register tile enters is computed where it is used.
            _ => {}
        }
    }
    if !steps.iter().any(|s| matches!(s, Step::Product { .. })) {
        return Err(Error::unsupported("a loop without products"));
    }
    if product == ProductKind::MmaSync {
        let mut used: BTreeSet<TileId> = steps.iter().flat_map(Step::uses).collect();
        used.extend(&body.yields);
        steps.retain(|s| !matches!(s, Step::Map { result, .. } if !used.contains(result)));
    }
    let cut = cut(kernel, &defs, body, &mut steps)?;
    let made = |s: &Step| matches!(s, Step::Product { a: Left::Registers(_), .. });
    let both_ways = |s: &Step| matches!(s, Step::Product { turned: true, .. });
    let in_order = product == ProductKind::Wgmma
        && (steps.iter().any(both_ways) || steps.iter().filter(|s| made(s)).count() > 1);
    let (steps, late, deferred) = match in_order {
        true => (steps, Vec::new(), None),
        false => defer(kernel, body, steps, product),
    };
    let mut out = Chain {
        streams,
        invariant,
        steps,
        late,
        deferred,
        in_order,
        cut,
        frags: BTreeMap::new(),
        carried: Vec::new(),
        copies: Vec::new(),
    };
    allocate(b, body, &mut out)?;
    Ok(out)
}

fn uses_any(op: &TileOp, tiles: &BTreeSet<TileId>) -> bool {
    match op {
        TileOp::Full(_) | TileOp::Load { .. } | TileOp::Iota { .. } | TileOp::Random { .. } => {
            false
        }
        TileOp::Gather { rows: x, .. }
        | TileOp::Reduce { x, .. }
        | TileOp::ArgReduce { x, .. }
        | TileOp::Scan { x, .. }
        | TileOp::Permute { x, .. }
        | TileOp::Reshape(x) => tiles.contains(x),
        TileOp::Map { args, .. } => args.iter().any(|a| tiles.contains(&a.tile)),
        TileOp::Mma { acc, a, b, .. } => [acc, a, b].into_iter().any(|t| tiles.contains(t)),
        TileOp::Broadcast(arg) => tiles.contains(&arg.tile),
    }
}

/// Takes out a last product that can run a turn late, and the steps that must wait for it.
fn defer(
    kernel: &Kernel,
    body: &For,
    steps: Vec<Step>,
    product: ProductKind,
) -> (Vec<Step>, Vec<Step>, Option<Step>) {
    let last = steps.iter().rposition(|s| matches!(s, Step::Product { .. }));
    let Some(at) = last.filter(|at| *at > 0 && product == ProductKind::Wgmma) else {
        return (steps, Vec::new(), None);
    };
    let Step::Product { result, acc: Some(acc), a: Left::Registers(a), b, .. } = &steps[at] else {
        return (steps, Vec::new(), None);
    };
    // Its results are the loop's, its left operand is its own, its right operand nobody else's.
    let others = || steps.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, s)| s);
    let carried = body.yields.iter().position(|y| y == result);
    let alone = others().all(|s| !s.uses().contains(result) && !s.uses().contains(a))
        && !body.yields.contains(a)
        && kernel.ty(*a).dtype.bits() == 16
        && others().all(|s| !matches!(s, Step::Product { b: other, .. } if other == b))
        && others().any(|s| matches!(s, Step::Product { .. }));
    let Some(carried) = carried.filter(|_| alone) else { return (steps, Vec::new(), None) };
    // Late: the chain from the carried tile to the accumulator, and what makes the left operand.
    let mut late = BTreeSet::new();
    let mut tile = *acc;
    while tile != body.carry[carried].0 {
        let Some(i) = steps.iter().position(|s| s.result() == tile) else {
            return (steps, Vec::new(), None);
        };
        let Step::Map { args, .. } = &steps[i] else { return (steps, Vec::new(), None) };
        let users = steps.iter().filter(|s| s.uses().contains(&tile)).count();
        if users != 1 {
            return (steps, Vec::new(), None);
        }
        late.insert(i);
        let shape = &kernel.ty(tile).shape;
        match args.iter().find(|x| kernel.ty(x.tile).shape == *shape) {
            Some(arg) => tile = arg.tile,
            None => return (steps, Vec::new(), None),
        }
    }
    let inner = body.carry[carried].0;
    if steps.iter().filter(|s| s.uses().contains(&inner)).count() != 1 {
        return (steps, Vec::new(), None);
    }
    match steps.iter().position(|s| s.result() == *a) {
        Some(i) if matches!(steps[i], Step::Map { .. }) => late.insert(i),
        _ => return (steps, Vec::new(), None),
    };
    let (mut now, mut later, mut deferred) = (Vec::new(), Vec::new(), None);
    for (i, step) in steps.into_iter().enumerate() {
        match i {
            i if i == at => deferred = Some(step),
            i if late.contains(&i) => later.push(step),
            _ => now.push(step),
        }
    }
    (now, later, deferred)
}

/// Gives every register tile a fragment: that of an operand which dies there, where that is possible.
fn allocate(b: &mut Builder<'_>, body: &For, chain: &mut Chain) -> Result<()> {
    let kernel = b.kernel;
    let order: Vec<Step> =
        chain.steps.iter().chain(&chain.late).chain(&chain.deferred).cloned().collect();
    let mut last_use: BTreeMap<TileId, usize> = BTreeMap::new();
    for (i, step) in order.iter().enumerate() {
        for tile in step.uses() {
            last_use.insert(tile, i);
        }
    }
    for tile in &body.yields {
        last_use.insert(*tile, usize::MAX);
    }
    let shape_of = |tile: TileId| -> Result<(Extent, u32)> {
        let shape = extents(kernel, tile)?;
        match shape[..] {
            [_, cols] => Ok((Extent::Tile, cols)),
            // The spread of a tile of any width will do.
            [_] => Ok((Extent::PerRow, 16)),
            _ => Err(Error::unsupported("register tiles of other than one or two axes")),
        }
    };
    let fresh = |b: &mut Builder<'_>, name: &str, tile: TileId| -> Result<FragId> {
        let (extent, cols) = shape_of(tile)?;
        Ok(b.frag(name, kernel.ty(tile).dtype, cols, extent))
    };
    for (inner, _) in &body.carry {
        let name = if shape_of(*inner)?.0 == Extent::Tile { "acc" } else { "row" };
        let frag = fresh(b, name, *inner)?;
        chain.frags.insert(*inner, frag);
        chain.carried.push(frag);
    }
    for (i, step) in order.iter().enumerate() {
        let result = step.result();
        let dies = |tile: &TileId| last_use.get(tile) == Some(&i);
        let frag = match step {
            Step::Product { acc: Some(acc), .. } => {
                if !dies(acc) {
                    return Err(Error::unsupported("a sum that is used and added to"));
                }
                chain.frags.get(acc).copied()
            }
            Step::Product { acc: None, .. } => None,
            Step::Map { args, .. } => args
                .iter()
                .find(|arg| {
                    let plain = arg.along.iter().copied().eq(0..arg.along.len());
                    plain && dies(&arg.tile) && kernel.ty(arg.tile) == kernel.ty(result)
                })
                .and_then(|arg| chain.frags.get(&arg.tile).copied()),
            Step::Reduce { .. } => None,
        };
        let frag = match frag {
            Some(frag) => frag,
            None if matches!(step, Step::Product { .. }) => fresh(b, "part", result)?,
            None => fresh(b, "v", result)?,
        };
        chain.frags.insert(result, frag);
    }
    // Carried tiles whose next value is elsewhere are copied; none may be overwritten before it is read.
    for (i, tile) in body.yields.iter().enumerate() {
        let Some(from) = chain.frags.get(tile).copied() else {
            return Err(Error::unsupported("a loop that carries what it does not compute"));
        };
        let to = chain.carried[i];
        if from != to {
            let busy = body.yields.iter().any(|y| chain.frags.get(y) == Some(&to));
            if busy {
                return Err(Error::unsupported("a loop that permutes what it carries"));
            }
            chain.copies.push((from, to));
        }
    }
    Ok(())
}

/// An integer tile that counts along one axis: its first value and how many there are.
fn counts(kernel: &Kernel, defs: &Defs<'_>, tile: TileId) -> Option<(Dim, i64)> {
    match defs.get(&tile)? {
        TileOp::Iota { axis, start } => {
            let shape = extents(kernel, tile).ok()?;
            Some((start.clone(), i64::from(*shape.get(*axis)?)))
        }
        TileOp::Full(Value::Int(v)) => Some((Dim::new(*v), 1)),
        TileOp::Reshape(x) => counts(kernel, defs, *x),
        _ => None,
    }
}

/// `position` as `factor * t + rest` for a number `factor`, where `t` is the loop variable or its quotient by `each`.
fn linear(position: &Dim, var: &str) -> Option<(i64, Dim, Dim)> {
    if let Some((factor, rest)) = linear_in(position, var) {
        return Some((factor.as_const()?, rest, Dim::new(1)));
    }
    // The one quotient that the loop variable appears in.
    let mut each: Option<Dim> = None;
    for (product, _) in position.terms() {
        for atom in product {
            if let Atom::FloorDiv(x, by) = atom
                && x.as_symbol().is_some_and(|s| &**s == var)
                && !mentions(by, var)
            {
                each = Some((**by).clone());
            }
        }
    }
    let each = each?;
    let quotient = Dim::sym(var).floor_div(&each);
    let name = "quotient of the loop variable";
    let mut replaced = Dim::new(0);
    for (product, count) in position.terms() {
        let mut term = Dim::new(*count);
        for atom in product {
            let factor = atom_dim(atom);
            term = term * &if factor == quotient { Dim::sym(name) } else { factor };
        }
        replaced = replaced + &term;
    }
    if mentions(&replaced, var) {
        return None;
    }
    let (factor, rest) = linear_in(&replaced, name)?;
    Some((factor.as_const()?, rest, each))
}

/// Finds comparisons of positions that hold for no element on early turns, and the first turn on which one
/// may hold.
fn cut(kernel: &Kernel, defs: &Defs<'_>, body: &For, steps: &mut [Step]) -> Result<Option<Dim>> {
    let mut first: Option<Dim> = None;
    for step in steps {
        let Step::Map { func, args, early, .. } = step else { continue };
        let mut never = BTreeMap::new();
        for (id, node, _) in func.nodes() {
            let Node::Op(op, operands) = node else { continue };
            // `large > small` or `large >= small` with the loop's position on the left.
            let (large, small, strict) = match op {
                Op::Gt => (operands[0], operands[1], true),
                Op::Ge => (operands[0], operands[1], false),
                Op::Lt => (operands[1], operands[0], true),
                Op::Le => (operands[1], operands[0], false),
                _ => continue,
            };
            let position = |x| match func.node(x) {
                Node::Param(p) => counts(kernel, defs, args[*p as usize].tile),
                _ => None,
            };
            let (Some((start, n)), Some((least, _))) = (position(large), position(small)) else {
                continue;
            };
            let last = n - 1 + i64::from(!strict);
            let rising = linear(&start, &body.var).filter(|_| !mentions(&least, &body.var));
            let falling = linear(&least, &body.var).filter(|_| !mentions(&start, &body.var));
            let turns = match (rising, falling) {
                // Never while factor * t + rest + n - 1 <= least, or < least.
                (Some((factor, rest, each)), _) if factor > 0 => {
                    let room = least - &rest - &Dim::new(last);
                    (room + &Dim::new(factor)).floor_div(&Dim::new(factor)) * &each
                }
                // Never while start + n - 1 <= factor * t + rest, or <, and the factor is negative.
                (_, Some((factor, rest, each))) if factor < 0 => {
                    let room = rest - &start - &Dim::new(last);
                    (room + &Dim::new(-factor)).floor_div(&Dim::new(-factor)) * &each
                }
                _ => continue,
            };
            first = Some(match first {
                Some(f) => f.min_with(&turns),
                None => turns,
            });
            never.insert(id, ());
        }
        if !never.is_empty() {
            let simpler = with_false(func, &|id| never.contains_key(&id)).simplify();
            *early = Some(without_unused(&simpler, args));
        }
    }
    Ok(first)
}

/// The function with some nodes (of type bool) false.
fn with_false(func: &Func, is_false: &dyn Fn(tilewright_expr::ExprId) -> bool) -> Func {
    let mut b = FuncBuilder::new();
    let params: Vec<_> = func.params().iter().map(|p| b.param(&p.name, p.dtype)).collect();
    let mut map = Vec::new();
    for (id, node, dtype) in func.nodes() {
        let new = match node {
            _ if is_false(id) => b.value(Value::Int(0), DType::Bool),
            Node::Param(p) => params[*p as usize],
            Node::Const(v) => b.value(*v, dtype),
            Node::Op(Op::Cast, args) => b.cast(map[args[0].index()], dtype),
            Node::Op(op, args) => {
                let args: Vec<tilewright_expr::ExprId> =
                    args.iter().map(|a| map[a.index()]).collect();
                b.op(*op, &args)
            }
        };
        map.push(new);
    }
    b.finish(map[func.result().index()])
}

/// Only the parameters that matter.
fn without_unused(func: &Func, args: &[Operand]) -> (Func, Vec<Operand>) {
    let used: Vec<bool> = (0..args.len()).map(|i| func.uses_param(i)).collect();
    let mut b = FuncBuilder::new();
    let mut params = Vec::new();
    for (p, used) in func.params().iter().zip(&used) {
        params.push(used.then(|| b.param(&p.name, p.dtype)));
    }
    let mut map = Vec::new();
    for (_, node, dtype) in func.nodes() {
        let new = match node {
            // A parameter that is not used is never looked up again.
            Node::Param(p) => match params[*p as usize] {
                Some(id) => id,
                None => {
                    b.value(if dtype.is_float() { Value::Float(0.0) } else { Value::Int(0) }, dtype)
                }
            },
            Node::Const(v) => b.value(*v, dtype),
            Node::Op(Op::Cast, args) => b.cast(map[args[0].index()], dtype),
            Node::Op(op, args) => {
                let args: Vec<tilewright_expr::ExprId> =
                    args.iter().map(|a: &tilewright_expr::ExprId| map[a.index()]).collect();
                b.op(*op, &args)
            }
        };
        map.push(new);
    }
    let result = map[func.result().index()];
    let args = args.iter().zip(&used).filter(|(_, u)| **u).map(|(a, _)| a.clone()).collect();
    (b.finish(result), args)
}
