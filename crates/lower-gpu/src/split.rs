//! Reductions of few results over much data, as two kernels.
//!
//! ```text
//! parts:  block (p, ...) folds its share of the pieces   -> W[p, ...], one tensor per reduction
//! finish: block (...)    folds the parts in their order   -> what the kernel does with its results
//! ```
//!
//! [`split_reduction`] writes both from any tile program whose only loop folds pieces of its operands into reductions and
//! stores nothing: sums of whole tensors and of columns with whatever is computed before and after. The order of every
//! sum follows from the number of parts alone.

use crate::lines::{combine, uses};
use std::collections::BTreeSet;
use std::sync::Arc;
use tilewright_device::identity;
use tilewright_expr::Func;
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_tile::{
    Access, Block, For, GridAxis, Kernel, Operand, Param, ParamId, ReduceKind, Stmt, TileId,
    TileInfo, TileOp, TileType,
};

/// Size symbols of the two kernels: how many parts there are, and how many pieces each folds.
pub const SPLIT_PARTS: &str = "split_parts";
/// See [`SPLIT_PARTS`].
pub const SPLIT_PIECES: &str = "split_pieces";
/// The part of a block.
const PART: &str = "split_part";
/// Tile size of the second kernel: parts that are folded together.
const TILE: &str = "SPLIT";

/// A kernel as two. Their parameters are the kernel's, in order, and then `partial`.
#[derive(Clone, Debug)]
pub struct SplitReduction {
    /// The first: writes `partial`.
    pub parts: Kernel,
    /// The second: reads `partial`, and does the rest.
    pub finish: Kernel,
    /// Results of the parts.
    pub partial: Vec<ParamId>,
    /// How many pieces there are in all, in terms of the kernel's sizes and tile sizes.
    pub pieces: Dim,
}

/// How carried tile `i` of a loop folds pieces, if that is all that happens to it.
fn folds(kernel: &Kernel, f: &For, i: usize) -> Option<ReduceKind> {
    let definition = |tile: TileId| {
        f.body.stmts.iter().find_map(|s| match s {
            Stmt::Let(id, op) if *id == tile => Some(op),
            _ => None,
        })
    };
    let (inner, next) = (f.carry[i].0, f.yields[i]);
    let TileOp::Map { func, args } = definition(next)? else { return None };
    let [a, b] = args.as_slice() else { return None };
    let piece = match (a.tile == inner, b.tile == inner) {
        (true, false) => b.tile,
        (false, true) => a.tile,
        _ => return None,
    };
    let TileOp::Reduce { kind, .. } = definition(piece)? else { return None };
    let ty = kernel.ty(inner);
    let straight = |o: &Operand| o.along.iter().copied().eq(0..ty.shape.len());
    let once = uses(&f.body, inner) + f.yields.iter().filter(|y| **y == inner).count() == 1;
    let same = kernel.ty(piece) == ty && kernel.ty(next) == ty && ty.dtype.bits() >= 32;
    (func.as_single_op()? == combine(*kind)
        && straight(a)
        && straight(b)
        && once
        && same
        && f.yields.iter().filter(|y| **y == next).count() == 1)
        .then_some(*kind)
}

/// The extents of a tile that are not 1.
fn long(ty: &TileType) -> Vec<&Dim> {
    ty.shape.iter().filter(|d| !d.is(1)).collect()
}

/// Where results of the loop are: coordinates and extents of a tensor that is stored as they lie.
struct Home {
    index: Vec<Dim>,
    extents: Vec<Dim>,
    tile: Vec<Dim>,
}

fn home(kernel: &Kernel, after: &[Stmt], result: TileId) -> Option<Home> {
    // One value a block, whose number does not follow from tile sizes.
    let mut tiled = false;
    let mut note = |name: &Arc<str>| tiled |= kernel.tiles.contains(name);
    kernel.grid.iter().for_each(|axis| axis.extent.for_each_symbol(&mut note));
    if kernel.ty(result).shape.is_empty() && !tiled {
        return Some(Home {
            index: kernel.grid.iter().map(|axis| Dim::sym(axis.name.clone())).collect(),
            extents: kernel.grid.iter().map(|axis| axis.extent.clone()).collect(),
            tile: vec![Dim::new(1); kernel.grid.len()],
        });
    }
    after.iter().find_map(|stmt| {
        let Stmt::Store { param, index, value } = stmt else { return None };
        let ty = kernel.ty(*value);
        let extents = kernel.params[*param].layout.shape();
        (long(ty) == long(kernel.ty(result))).then(|| Home {
            index: index.clone(),
            extents,
            tile: ty.shape.clone(),
        })
    })
}

fn new_tile(kernel: &mut Kernel, ty: TileType) -> TileId {
    kernel.values.push(TileInfo { name: String::new(), ty })
}

fn size_symbol(kernel: &mut Kernel, name: &str) {
    let range = Range { min: 1, max: i32::MAX.into() };
    kernel.symbols.push(Symbol { name: name.into(), range });
}

/// The kernel as two, when it has that form.
pub fn split_reduction(kernel: &Kernel) -> Option<SplitReduction> {
    let stmts = &kernel.body.stmts;
    let at = stmts.iter().position(|s| matches!(s, Stmt::For(_)))?;
    let Stmt::For(f) = &stmts[at] else { return None };
    let (before, after) = (&stmts[..at], &stmts[at + 1..]);
    let computes = |s: &Stmt| matches!(s, Stmt::Let(..));
    let plain = before.iter().all(computes)
        && f.body.stmts.iter().all(computes)
        && after.iter().all(|s| matches!(s, Stmt::Let(..) | Stmt::Store { .. }))
        && f.lo.is(0)
        && !f.carry.is_empty();
    if !plain {
        return None;
    }
    let kinds: Vec<ReduceKind> =
        (0..f.carry.len()).map(|i| folds(kernel, f, i)).collect::<Option<_>>()?;
    let homes: Vec<Home> =
        f.results.iter().map(|r| home(kernel, after, *r)).collect::<Option<_>>()?;
    let mut parts = kernel.clone();
    parts.name = format!("{}_parts", kernel.name);
    size_symbol(&mut parts, SPLIT_PARTS);
    let mut finish = parts.clone();
    finish.name = format!("{}_finish", kernel.name);
    size_symbol(&mut parts, SPLIT_PIECES);
    let mut partial = Vec::new();
    for (i, home) in homes.iter().enumerate() {
        let mut extents = vec![Dim::sym(SPLIT_PARTS)];
        extents.extend(home.extents.iter().cloned());
        let param = Param {
            name: Arc::from(format!("split_{i}")),
            dtype: kernel.ty(f.results[i]).dtype,
            layout: Layout::row_major(&extents),
            access: Access::Out,
        };
        finish.params.push(Param { access: Access::In, ..param.clone() });
        partial.push(parts.params.push(param));
    }
    write_parts(&mut parts, (before, f), &kinds, (&homes, &partial));
    write_finish(&mut finish, (before, f, after), &kinds, (&homes, &partial));
    Some(SplitReduction { parts, finish, partial, pieces: f.hi.clone() })
}

fn write_parts(
    kernel: &mut Kernel,
    (before, f): (&[Stmt], &For),
    kinds: &[ReduceKind],
    (homes, partial): (&[Home], &[ParamId]),
) {
    kernel.grid.insert(0, GridAxis { name: PART.into(), extent: Dim::sym(SPLIT_PARTS) });
    let (part, pieces) = (Dim::sym(PART), Dim::sym(SPLIT_PIECES));
    let start = &part * &pieces;
    let mut f = f.clone();
    let shifted = |name: &str| (*name == *f.var).then(|| &start + Dim::sym(f.var.clone()));
    let mut body = f.body.clone();
    tilewright_tile::substitute_block(&mut body, &|d| d.substitute(&shifted));
    f.body = body;
    f.hi = pieces.min_with(&(&f.hi - &start));
    let mut stmts = before.to_vec();
    // A part starts with nothing; what the kernel starts with is added at the end.
    for (i, kind) in kinds.iter().enumerate() {
        let ty = kernel.ty(f.carry[i].0).clone();
        let nothing = identity(*kind, ty.dtype);
        f.carry[i].1 = new_tile(kernel, ty);
        stmts.push(Stmt::Let(f.carry[i].1, TileOp::Full(nothing)));
    }
    let results = f.results.clone();
    stmts.push(Stmt::For(Box::new(f)));
    for ((result, home), param) in results.into_iter().zip(homes).zip(partial) {
        let mut shape = vec![Dim::new(1)];
        shape.extend(home.tile.iter().cloned());
        let ty = TileType { dtype: kernel.ty(result).dtype, shape };
        let value = new_tile(kernel, ty);
        stmts.push(Stmt::Let(value, TileOp::Reshape(result)));
        let mut index = vec![part.clone()];
        index.extend(home.index.iter().cloned());
        stmts.push(Stmt::Store { param: *param, index, value });
    }
    kernel.body = Block { stmts };
}

fn write_finish(
    kernel: &mut Kernel,
    (before, f, after): (&[Stmt], &For, &[Stmt]),
    kinds: &[ReduceKind],
    (homes, partial): (&[Home], &[ParamId]),
) {
    // Of what comes before the loop, what is read after it.
    let all: Vec<TileId> = kernel.values.iter().map(|(id, _)| id).collect();
    let reads = |stmt: &Stmt| -> BTreeSet<TileId> {
        let one = Block { stmts: vec![stmt.clone()] };
        all.iter().copied().filter(|t| uses(&one, *t) > 0).collect()
    };
    let mut needed: BTreeSet<TileId> = after.iter().flat_map(reads).collect();
    needed.extend(f.carry.iter().map(|(_, init)| *init));
    let mut stmts = Vec::new();
    for stmt in before.iter().rev() {
        if matches!(stmt, Stmt::Let(id, _) if needed.contains(id)) {
            needed.extend(reads(stmt));
            stmts.push(stmt.clone());
        }
    }
    stmts.reverse();
    let tile: Arc<str> = TILE.into();
    kernel.tiles.push(tile.clone());
    let var: Arc<str> = "split_piece".into();
    let mut body = Vec::new();
    let mut yields = Vec::new();
    for (i, kind) in kinds.iter().enumerate() {
        let ty = kernel.ty(f.carry[i].0).clone();
        let mut shape = vec![Dim::sym(tile.clone())];
        shape.extend(homes[i].tile.iter().cloned());
        let plane = TileType { dtype: ty.dtype, shape };
        let line = TileType { dtype: ty.dtype, shape: homes[i].tile.clone() };
        let [x, sum, here, next] =
            [plane, line, ty.clone(), ty.clone()].map(|t| new_tile(kernel, t));
        let mut index = vec![Dim::sym(var.clone()) * Dim::sym(tile.clone())];
        index.extend(homes[i].index.iter().cloned());
        let steps = vec![1; index.len()];
        let fill = identity(*kind, ty.dtype);
        body.push(Stmt::Let(x, TileOp::Load { param: partial[i], index, steps, fill }));
        body.push(Stmt::Let(sum, TileOp::Reduce { kind: *kind, x, axis: 0, limit: None }));
        body.push(Stmt::Let(here, TileOp::Reshape(sum)));
        let along: Vec<usize> = (0..ty.shape.len()).collect();
        let args = [f.carry[i].0, here].map(|tile| Operand { tile, along: along.clone() }).to_vec();
        let func = Func::binary(combine(*kind), ty.dtype);
        body.push(Stmt::Let(next, TileOp::Map { func, args }));
        yields.push(next);
    }
    stmts.push(Stmt::For(Box::new(For {
        var,
        lo: Dim::new(0),
        hi: Dim::sym(SPLIT_PARTS).ceil_div(&Dim::sym(tile)),
        carry: f.carry.clone(),
        body: Block { stmts: body },
        yields,
        results: f.results.clone(),
    })));
    stmts.extend(after.iter().cloned());
    kernel.body = Block { stmts };
}
