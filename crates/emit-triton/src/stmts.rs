//! Statements: stores, loops, branches.

use crate::emitter::Emitter;
use crate::integers::Side;
use tilewright_layout::{Range, uppers};
use tilewright_tile::{Block, Compare, For, If, Stmt, TileId};

impl<'a> Emitter<'a> {
    pub(crate) fn block(&mut self, block: &'a Block) {
        for stmt in &block.stmts {
            self.stmt(stmt);
        }
    }

    fn stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::Let(id, op) => self.op(*id, op, None),
            Stmt::Store { param, index, value } => self.store(*param, index, *value, false),
            Stmt::AtomicAdd { param, index, value } => self.store(*param, index, *value, true),
            Stmt::For(l) => self.for_loop(l),
            Stmt::If(b) => self.branch(b),
        }
    }

    /// `targets = values`, at once; what already has its name is left out.
    fn assign(&mut self, targets: &[String], tiles: &[TileId]) {
        let pairs: Vec<(&String, String)> = targets
            .iter()
            .zip(tiles.iter().map(|t| self.tile(*t)))
            .filter(|(target, value)| **target != *value)
            .collect();
        if pairs.is_empty() {
            return;
        }
        let left: Vec<&str> = pairs.iter().map(|p| p.0.as_str()).collect();
        let right: Vec<&str> = pairs.iter().map(|p| p.1.as_str()).collect();
        self.line(format!("{} = {}", left.join(", "), right.join(", ")));
    }

    fn for_loop(&mut self, l: &'a For) {
        let (lo, hi) = (self.bound(&l.lo), self.bound(&l.hi));
        let range = match (l.lo.is(0), self.int(&l.hi)) {
            (true, hi) => hi,
            (false, hi) => format!("{}, {hi}", self.int(&l.lo)),
        };
        // A carried tile and its result are one Python variable.
        let carried: Vec<String> = l
            .results
            .iter()
            .zip(&l.carry)
            .map(|(&result, (inner, _))| {
                let named = |t: TileId| !self.kernel.values[t].name.is_empty();
                let name = match named(result) || !named(*inner) {
                    true => self.define(result),
                    false => self.define(*inner),
                };
                self.tiles[result.index()] = name.clone();
                self.tiles[inner.index()] = name.clone();
                name
            })
            .collect();
        let first: Vec<TileId> = l.carry.iter().map(|c| c.1).collect();
        self.assign(&carried, &first);
        let var = self.name_integer(&l.var);
        let bounds = Range {
            min: self.facts.bounds(&lo).min,
            max: self.facts.bounds(&hi).max.saturating_sub(1),
        };
        self.facts.declare(&l.var, bounds, uppers(&hi));
        self.open(Some(l.var.clone()));
        for (i, stmt) in l.body.stmts.iter().enumerate() {
            match stmt {
                // The last step may write its carried tile at once when nobody reads the old value
                // after it.
                Stmt::Let(id, op) if i + 1 == l.body.stmts.len() => {
                    let at = l.yields.iter().position(|y| y == id);
                    let target = at.map(|at| carried[at].clone()).filter(|target| {
                        let once = l.yields.iter().filter(|y| *y == id).count() == 1;
                        once && l
                            .yields
                            .iter()
                            .filter(|y| *y != id)
                            .all(|y| self.tiles[y.index()] != *target)
                    });
                    self.op(*id, op, target);
                }
                _ => self.stmt(stmt),
            }
        }
        self.assign(&carried, &l.yields);
        self.close(format!("for {var} in range({range}):"));
        self.facts.forget(&l.var);
    }

    fn branch(&mut self, b: &'a If) {
        let compare = match b.compare {
            Compare::Lt => "<",
            Compare::Le => "<=",
            Compare::Eq => "==",
            Compare::Ne => "!=",
        };
        let (lhs, rhs) =
            self.with_integers(Side::Kernel, &[], |p| (p.text(&b.lhs), p.text(&b.rhs)));
        let results: Vec<String> = b.results.iter().map(|&r| self.define(r)).collect();
        self.open(None);
        self.block(&b.then);
        self.assign(&results, &b.then_yields);
        self.close(format!("if {lhs} {compare} {rhs}:"));
        if b.otherwise.stmts.is_empty() && b.otherwise_yields.is_empty() {
            return;
        }
        self.open(None);
        self.block(&b.otherwise);
        self.assign(&results, &b.otherwise_yields);
        self.close("else:".to_string());
    }
}
