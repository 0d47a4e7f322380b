//! A program under other names: what it takes to put one program into another.

use crate::ir::{Block, For, If, Operand, ParamId, Stmt, TileId, TileOp};

/// New names of tensors and tiles.
pub struct Names<'a> {
    /// Of a tensor.
    pub param: &'a dyn Fn(ParamId) -> ParamId,
    /// Of a tile.
    pub tile: &'a dyn Fn(TileId) -> TileId,
}

impl Names<'_> {
    /// The same steps on tensors and tiles of other names. Index symbols stay.
    pub fn block(&self, block: &Block) -> Block {
        Block { stmts: block.stmts.iter().map(|stmt| self.stmt(stmt)).collect() }
    }

    /// One step.
    pub fn stmt(&self, stmt: &Stmt) -> Stmt {
        let tile = |t: &TileId| (self.tile)(*t);
        let tiles = |list: &[TileId]| list.iter().map(tile).collect::<Vec<_>>();
        match stmt {
            Stmt::Let(id, op) => Stmt::Let(tile(id), self.op(op)),
            Stmt::Store { param, index, value } => Stmt::Store {
                param: (self.param)(*param),
                index: index.clone(),
                value: tile(value),
            },
            Stmt::AtomicAdd { param, index, value } => Stmt::AtomicAdd {
                param: (self.param)(*param),
                index: index.clone(),
                value: tile(value),
            },
            Stmt::For(f) => Stmt::For(Box::new(For {
                var: f.var.clone(),
                lo: f.lo.clone(),
                hi: f.hi.clone(),
                carry: f.carry.iter().map(|(inner, init)| (tile(inner), tile(init))).collect(),
                body: self.block(&f.body),
                yields: tiles(&f.yields),
                results: tiles(&f.results),
            })),
            Stmt::If(i) => Stmt::If(Box::new(If {
                lhs: i.lhs.clone(),
                compare: i.compare,
                rhs: i.rhs.clone(),
                then: self.block(&i.then),
                then_yields: tiles(&i.then_yields),
                otherwise: self.block(&i.otherwise),
                otherwise_yields: tiles(&i.otherwise_yields),
                results: tiles(&i.results),
            })),
        }
    }

    fn op(&self, op: &TileOp) -> TileOp {
        let operand = |o: &Operand| Operand { tile: (self.tile)(o.tile), along: o.along.clone() };
        let mut op = op.clone();
        match &mut op {
            TileOp::Full(_) | TileOp::Iota { .. } | TileOp::Random { .. } => {}
            TileOp::Load { param, .. } => *param = (self.param)(*param),
            TileOp::Gather { param, rows, .. } => {
                *param = (self.param)(*param);
                *rows = (self.tile)(*rows);
            }
            TileOp::Map { args, .. } => *args = args.iter().map(operand).collect(),
            TileOp::Reduce { x, .. }
            | TileOp::ArgReduce { x, .. }
            | TileOp::Scan { x, .. }
            | TileOp::Permute { x, .. }
            | TileOp::Reshape(x) => *x = (self.tile)(*x),
            TileOp::Mma { acc, a, b, .. } => {
                for tile in [acc, a, b] {
                    *tile = (self.tile)(*tile);
                }
            }
            TileOp::Broadcast(o) => *o = operand(o),
        }
        op
    }
}
