//! Puts the schedule's tile sizes, and the sizes that it is for, into a tile program, so that every extent of a tile
//! is a number.

use crate::schedule::GpuSchedule;
use tilewright_base::{Error, Result};
use tilewright_layout::{Dim, Range};
use tilewright_tile::{Block, For, If, Kernel, Stmt, TileOp};

/// The program with numbers for tile sizes.
pub(crate) fn specialise(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Kernel> {
    for name in &kernel.tiles {
        if !schedule.tiles.contains_key(name) {
            return Err(Error::bug(format!("tile size {name} of {} has no value", kernel.name)));
        }
    }
    let number = |name: &str| schedule.tiles.get(name).or_else(|| schedule.sizes.get(name));
    let lookup = |name: &str| number(name).map(|v| Dim::new(*v));
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
    block(&mut out.body, &sub);
    for (_, param) in out.params.iter_mut() {
        for axis in &mut param.layout.axes {
            (axis.extent, axis.stride) = (sub(&axis.extent), sub(&axis.stride));
        }
        param.layout.offset = sub(&param.layout.offset);
    }
    // The kernel takes no other values.
    for symbol in &mut out.symbols {
        if let Some(v) = schedule.sizes.get(&symbol.name) {
            symbol.range = Range { min: *v, max: *v };
        }
    }
    out.tiles.clear();
    out.bounds.clear();
    Ok(out)
}

pub(crate) fn block(b: &mut Block, sub: &dyn Fn(&Dim) -> Dim) {
    for stmt in &mut b.stmts {
        match stmt {
            Stmt::Let(_, op) => operation(op, sub),
            Stmt::Store { index, .. } | Stmt::AtomicAdd { index, .. } => {
                index.iter_mut().for_each(|d| *d = sub(d));
            }
            Stmt::For(f) => {
                let For { lo, hi, body, .. } = f.as_mut();
                (*lo, *hi) = (sub(lo), sub(hi));
                block(body, sub);
            }
            Stmt::If(i) => {
                let If { lhs, rhs, then, otherwise, .. } = i.as_mut();
                (*lhs, *rhs) = (sub(lhs), sub(rhs));
                block(then, sub);
                block(otherwise, sub);
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
