//! What [`crate::pick`] counts of a program's steps.

use tilewright_tile::{Block, Stmt, TileOp};

/// Whether something is scanned, or the position of an extreme sought.
pub(crate) fn has_order(block: &Block) -> bool {
    block.stmts.iter().any(|s| match s {
        Stmt::Let(_, op) => matches!(op, TileOp::ArgReduce { .. } | TileOp::Scan { .. }),
        Stmt::For(f) => has_order(&f.body),
        Stmt::If(f) => has_order(&f.then) || has_order(&f.otherwise),
        _ => false,
    })
}

/// Operations of the maps of a block.
pub(crate) fn operations(block: &Block) -> i64 {
    let of = |s: &Stmt| match s {
        Stmt::Let(_, TileOp::Map { func, .. }) => func.nodes().len() as i64,
        Stmt::For(f) => operations(&f.body),
        Stmt::If(f) => operations(&f.then) + operations(&f.otherwise),
        _ => 0,
    };
    block.stmts.iter().map(of).sum()
}

/// Reductions of a block.
pub(crate) fn reductions(block: &Block) -> usize {
    let of = |s: &Stmt| match s {
        Stmt::Let(_, TileOp::Reduce { .. }) => 1,
        Stmt::For(f) => reductions(&f.body),
        Stmt::If(f) => reductions(&f.then) + reductions(&f.otherwise),
        _ => 0,
    };
    block.stmts.iter().map(of).sum()
}

/// The most reductions that one loop's body has.
pub(crate) fn reductions_in_loops(block: &Block) -> i64 {
    let inside = |s: &Stmt| match s {
        Stmt::For(f) => {
            let here =
                f.body.stmts.iter().filter(|s| matches!(s, Stmt::Let(_, TileOp::Reduce { .. })));
            (here.count() as i64).max(reductions_in_loops(&f.body))
        }
        Stmt::If(f) => reductions_in_loops(&f.then).max(reductions_in_loops(&f.otherwise)),
        _ => 0,
    };
    block.stmts.iter().map(inside).max().unwrap_or(0)
}
