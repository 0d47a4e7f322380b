//! A program with other expressions for some of its index symbols.

use crate::ir::{Block, For, If, Kernel, Stmt, TileOp};
use tilewright_layout::Dim;

/// The program in which `lookup` has replaced symbols of extents, strides and indices. The lists of symbols and of tile
/// sizes stay as they are.
#[must_use]
pub fn substitute(kernel: &Kernel, lookup: &dyn Fn(&str) -> Option<Dim>) -> Kernel {
    let sub = |dim: &Dim| dim.substitute(&lookup);
    let mut out = kernel.clone();
    for axis in &mut out.grid {
        axis.extent = sub(&axis.extent);
    }
    let ids: Vec<_> = out.values.iter().map(|(id, _)| id).collect();
    for id in ids {
        for dim in &mut out.values[id].ty.shape {
            *dim = sub(dim);
        }
    }
    substitute_block(&mut out.body, &sub);
    for (_, param) in out.params.iter_mut() {
        for axis in &mut param.layout.axes {
            (axis.extent, axis.stride) = (sub(&axis.extent), sub(&axis.stride));
        }
        param.layout.offset = sub(&param.layout.offset);
    }
    out
}

/// Puts what `sub` makes of them in place of all index expressions of a block.
pub fn substitute_block(b: &mut Block, sub: &dyn Fn(&Dim) -> Dim) {
    for stmt in &mut b.stmts {
        match stmt {
            Stmt::Let(_, op) => operation(op, sub),
            Stmt::Store { index, .. } | Stmt::AtomicAdd { index, .. } => {
                index.iter_mut().for_each(|d| *d = sub(d));
            }
            Stmt::For(f) => {
                let For { lo, hi, body, .. } = f.as_mut();
                (*lo, *hi) = (sub(lo), sub(hi));
                substitute_block(body, sub);
            }
            Stmt::If(i) => {
                let If { lhs, rhs, then, otherwise, .. } = i.as_mut();
                (*lhs, *rhs) = (sub(lhs), sub(rhs));
                substitute_block(then, sub);
                substitute_block(otherwise, sub);
            }
        }
    }
}

fn operation(op: &mut TileOp, sub: &dyn Fn(&Dim) -> Dim) {
    match op {
        TileOp::Load { index, .. } | TileOp::Gather { index, .. } => {
            index.iter_mut().for_each(|d| *d = sub(d));
        }
        TileOp::Reduce { limit, .. }
        | TileOp::ArgReduce { limit, .. }
        | TileOp::Mma { limit, .. } => {
            if let Some(limit) = limit {
                *limit = sub(limit);
            }
        }
        TileOp::Iota { start, .. } | TileOp::Random { start, .. } => *start = sub(start),
        TileOp::Full(_)
        | TileOp::Map { .. }
        | TileOp::Scan { .. }
        | TileOp::Permute { .. }
        | TileOp::Reshape(_)
        | TileOp::Broadcast(_) => {}
    }
}
