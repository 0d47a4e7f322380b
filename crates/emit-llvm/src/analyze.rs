//! Before writing: tile sizes are bound, and two questions answered for each tile: which part of
//! it is needed, and whether it is kept in scratch memory or computed anew by each user.

use std::collections::BTreeMap;
use tilewright_base::{Error, Result};
use tilewright_expr::{Func, Node, Op};
use tilewright_layout::{Dim, Facts, Range, mentions, uppers};
use tilewright_tile::{Access, Block, Kernel, Operand, Schedule, Stmt, TileId, TileOp};

/// The kernel with the schedule's numbers for its tile sizes.
pub(crate) fn bind_tiles(kernel: &Kernel, schedule: &Schedule) -> Result<Kernel> {
    for name in &kernel.tiles {
        if schedule.tiles.get(name).is_none_or(|n| *n <= 0) {
            return Err(Error::bug(format!("the schedule of @{} lacks tile {name}", kernel.name)));
        }
    }
    let lookup = |name: &str| schedule.tiles.get(name).map(|n| Dim::new(*n));
    let sub = |d: &mut Dim| *d = d.substitute(&lookup);
    let mut k = kernel.clone();
    for (_, p) in k.params.iter_mut() {
        p.layout = p.layout.substitute(&lookup);
    }
    for g in &mut k.grid {
        sub(&mut g.extent);
    }
    for (_, v) in k.values.iter_mut() {
        v.ty.shape.iter_mut().for_each(sub);
    }
    substitute_block(&mut k.body, &sub);
    Ok(k)
}

fn substitute_block(block: &mut Block, sub: &dyn Fn(&mut Dim)) {
    for stmt in &mut block.stmts {
        match stmt {
            Stmt::Let(_, op) => match op {
                TileOp::Load { index, .. } | TileOp::Gather { index, .. } => {
                    index.iter_mut().for_each(sub);
                }
                TileOp::Reduce { limit, .. }
                | TileOp::ArgReduce { limit, .. }
                | TileOp::Mma { limit, .. } => limit.iter_mut().for_each(sub),
                TileOp::Iota { start, .. } | TileOp::Random { start, .. } => sub(start),
                _ => {}
            },
            Stmt::Store { index, .. } | Stmt::AtomicAdd { index, .. } => {
                index.iter_mut().for_each(sub);
            }
            Stmt::For(f) => {
                sub(&mut f.lo);
                sub(&mut f.hi);
                substitute_block(&mut f.body, sub);
            }
            Stmt::If(i) => {
                sub(&mut i.lhs);
                sub(&mut i.rhs);
                substitute_block(&mut i.then, sub);
                substitute_block(&mut i.otherwise, sub);
            }
        }
    }
}

/// The tiles that an operation reads.
pub(crate) fn operands(op: &TileOp) -> Vec<TileId> {
    match op {
        TileOp::Full(_) | TileOp::Load { .. } | TileOp::Iota { .. } | TileOp::Random { .. } => {
            vec![]
        }
        TileOp::Gather { rows, .. } => vec![*rows],
        TileOp::Map { args, .. } => args.iter().map(|a| a.tile).collect(),
        TileOp::Reduce { x, .. }
        | TileOp::ArgReduce { x, .. }
        | TileOp::Scan { x, .. }
        | TileOp::Permute { x, .. }
        | TileOp::Reshape(x) => vec![*x],
        TileOp::Broadcast(o) => vec![o.tile],
        TileOp::Mma { acc, a, b, .. } => vec![*acc, *a, *b],
    }
}

/// Rough cost of a function in vector instructions.
pub(crate) fn cost(func: &Func) -> u32 {
    func.nodes()
        .map(|(_, node, _)| match node {
            Node::Op(op, _) => match op {
                Op::Cast | Op::Neg | Op::Abs | Op::Add | Op::Sub | Op::Mul | Op::Min | Op::Max => 1,
                Op::Div | Op::Sqrt | Op::Rsqrt => 8,
                op if op.is_predicate() || *op == Op::Select || *op == Op::Fma => 1,
                _ => 16,
            },
            _ => 0,
        })
        .sum()
}

/// Which part of each tile is needed, as extents.
pub(crate) struct Needs<'k> {
    kernel: &'k Kernel,
    facts: Facts,
    /// By tile; `None` for one that nobody reads.
    pub(crate) need: Vec<Option<Vec<Dim>>>,
}

impl<'k> Needs<'k> {
    /// Walks the whole kernel. `facts` knows the size symbols.
    pub(crate) fn of(kernel: &'k Kernel, facts: &Facts) -> Result<Needs<'k>> {
        let mut facts = facts.clone();
        for axis in &kernel.grid {
            let max = facts.bounds(&axis.extent).max.saturating_sub(1).max(0);
            facts.declare(&axis.name, Range { min: 0, max }, uppers(&axis.extent));
        }
        let mut needs = Needs { kernel, facts, need: vec![None; kernel.values.len()] };
        needs.block(&kernel.body)?;
        Ok(needs)
    }

    fn full(&self, tile: TileId) -> Vec<Dim> {
        self.kernel.ty(tile).shape.clone()
    }

    /// Adds a need; true when the tile's need grew.
    fn add(&mut self, tile: TileId, extents: &[Dim]) -> bool {
        let full = self.full(tile);
        let new: Vec<Dim> = match &self.need[tile.index()] {
            None => extents
                .iter()
                .zip(&full)
                .map(|(e, f)| self.facts.simplify(&e.min_with(f)))
                .collect(),
            Some(old) => old
                .iter()
                .zip(extents)
                .zip(&full)
                .map(|((o, e), f)| {
                    let e = self.facts.simplify(&e.min_with(f));
                    if self.facts.proves_le(&e, o) {
                        o.clone()
                    } else if self.facts.proves_le(o, &e) {
                        e
                    } else {
                        self.facts.simplify(&o.max_with(&e))
                    }
                })
                .collect(),
        };
        let grew = self.need[tile.index()].as_ref() != Some(&new);
        self.need[tile.index()] = Some(new);
        grew
    }

    fn operand(&mut self, operand: &Operand, extents: &[Dim]) {
        let part: Vec<Dim> = operand.along.iter().map(|&a| extents[a].clone()).collect();
        let _ = self.add(operand.tile, &part);
    }

    fn block(&mut self, block: &Block) -> Result<()> {
        for stmt in block.stmts.iter().rev() {
            match stmt {
                Stmt::Store { param, index, value } | Stmt::AtomicAdd { param, index, value } => {
                    let shape = self.full(*value);
                    let axes = &self.kernel.params[*param].layout.axes;
                    let part: Vec<Dim> = shape
                        .iter()
                        .zip(index)
                        .zip(axes)
                        .map(|((extent, at), axis)| extent.min_with(&(&axis.extent - at)))
                        .collect();
                    let _ = self.add(*value, &part);
                }
                Stmt::Let(tile, op) => {
                    if let Some(need) = self.need[tile.index()].clone() {
                        self.op(*tile, op, &need);
                    }
                }
                Stmt::For(f) => self.for_loop(f)?,
                Stmt::If(i) => {
                    for (n, result) in i.results.iter().enumerate() {
                        if let Some(need) = self.need[result.index()].clone() {
                            let _ = self.add(i.then_yields[n], &need);
                            let _ = self.add(i.otherwise_yields[n], &need);
                        }
                    }
                    self.block(&i.then)?;
                    self.block(&i.otherwise)?;
                }
            }
        }
        Ok(())
    }

    fn for_loop(&mut self, f: &tilewright_tile::For) -> Result<()> {
        let (lo, hi) = (self.facts.bounds(&f.lo), self.facts.bounds(&f.hi));
        let range = Range { min: lo.min, max: hi.max.saturating_sub(1).max(lo.min) };
        self.facts.declare(&f.var, range, uppers(&f.hi));
        for (n, result) in f.results.iter().enumerate() {
            if let Some(need) = self.need[result.index()].clone() {
                let _ = self.add(f.yields[n], &need);
            }
        }
        for _ in 0..8 {
            self.block(&f.body)?;
            // What the next iteration reads, this one must give.
            let mut grew = false;
            for (n, (inner, _)) in f.carry.iter().enumerate() {
                if let Some(need) = self.need[inner.index()].clone() {
                    let need = self.without(&need, &f.var, *inner);
                    self.need[inner.index()] = Some(need.clone());
                    grew |= self.add(f.yields[n], &need);
                    let _ = self.add(f.results[n], &need);
                }
            }
            if !grew {
                break;
            }
        }
        for (n, (inner, init)) in f.carry.iter().enumerate() {
            let both = [self.need[inner.index()].clone(), self.need[f.results[n].index()].clone()];
            for need in both.into_iter().flatten() {
                let _ = self.add(*init, &need);
            }
        }
        // Outside the loop its variable means nothing.
        for i in 0..self.need.len() {
            if let Some(need) = self.need[i].clone()
                && need.iter().any(|d| mentions(d, &f.var))
                && !defined_in(&f.body, TileId(i as u32))
            {
                self.need[i] = Some(self.without(&need, &f.var, TileId(i as u32)));
            }
        }
        Ok(())
    }

    fn without(&self, need: &[Dim], var: &str, tile: TileId) -> Vec<Dim> {
        let full = self.full(tile);
        need.iter().zip(full).map(|(d, f)| if mentions(d, var) { f } else { d.clone() }).collect()
    }

    fn op(&mut self, tile: TileId, op: &TileOp, need: &[Dim]) {
        match op {
            TileOp::Full(_) | TileOp::Load { .. } | TileOp::Iota { .. } | TileOp::Random { .. } => {
            }
            TileOp::Gather { axis, rows, .. } => {
                let _ = self.add(*rows, &need[*axis..=*axis]);
            }
            TileOp::Map { args, .. } => {
                for arg in args {
                    self.operand(arg, need);
                }
            }
            TileOp::Broadcast(operand) => self.operand(operand, need),
            TileOp::Reduce { x, axis, limit, .. } | TileOp::ArgReduce { x, axis, limit, .. } => {
                let mut part = need.to_vec();
                let full = self.full(*x)[*axis].clone();
                part.insert(*axis, limited(&full, limit));
                let _ = self.add(*x, &part);
            }
            TileOp::Scan { x, axis, reverse, .. } => {
                let mut part = need.to_vec();
                if *reverse {
                    part[*axis] = self.full(*x)[*axis].clone();
                }
                let _ = self.add(*x, &part);
            }
            TileOp::Mma { acc, a, b, limit } => {
                let k = limited(&self.full(*a)[1], limit);
                let _ = self.add(*acc, need);
                let _ = self.add(*a, &[need[0].clone(), k.clone()]);
                let _ = self.add(*b, &[k, need[1].clone()]);
            }
            TileOp::Permute { x, perm } => {
                let mut part = vec![Dim::new(1); perm.len()];
                for (i, &p) in perm.iter().enumerate() {
                    part[p] = need[i].clone();
                }
                let _ = self.add(*x, &part);
            }
            TileOp::Reshape(x) => {
                let part = reshape_need(&self.full(*x), &self.full(tile), need);
                let _ = self.add(*x, &part);
            }
        }
    }
}

/// `min(extent, max(limit, 0))`.
pub(crate) fn limited(extent: &Dim, limit: &Option<Dim>) -> Dim {
    match limit {
        None => extent.clone(),
        Some(l) => extent.min_with(&l.max_with(&Dim::new(0))),
    }
}

/// Extents needed before a reshape: axes that survive keep theirs, others are needed whole.
fn reshape_need(from: &[Dim], to: &[Dim], need: &[Dim]) -> Vec<Dim> {
    let kept = |s: &[Dim]| -> Vec<usize> { (0..s.len()).filter(|&i| !s[i].is(1)).collect() };
    let (a, b) = (kept(from), kept(to));
    let mut out = from.to_vec();
    // From both ends, as long as the extents agree.
    let mut front = 0;
    while front < a.len() && front < b.len() && from[a[front]] == to[b[front]] {
        out[a[front]] = need[b[front]].clone();
        front += 1;
    }
    let mut back = 0;
    while front + back < a.len()
        && front + back < b.len()
        && from[a[a.len() - 1 - back]] == to[b[b.len() - 1 - back]]
    {
        out[a[a.len() - 1 - back]] = need[b[b.len() - 1 - back]].clone();
        back += 1;
    }
    out
}

/// True when a statement of the block, at any depth, defines the tile.
pub(crate) fn defined_in(block: &Block, tile: TileId) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(t, _) => *t == tile,
        Stmt::Store { .. } | Stmt::AtomicAdd { .. } => false,
        Stmt::For(f) => {
            f.results.contains(&tile)
                || f.carry.iter().any(|(inner, _)| *inner == tile)
                || defined_in(&f.body, tile)
        }
        Stmt::If(i) => {
            i.results.contains(&tile) || defined_in(&i.then, tile) || defined_in(&i.otherwise, tile)
        }
    })
}

/// One reading of a tile.
#[derive(Clone, Debug, Default)]
pub(crate) struct Uses {
    /// How often the text reads it.
    pub(crate) count: u32,
    /// Read as `a` or `b` of a product.
    pub(crate) by_mma: u32,
    /// Some reader repeats its elements.
    pub(crate) repeated: bool,
    /// Read in a deeper loop than where it is defined.
    pub(crate) deeper: bool,
}

struct UseWalk<'k> {
    kernel: &'k Kernel,
    uses: Vec<Uses>,
    depth_of: BTreeMap<TileId, u32>,
}

/// How each tile is read.
pub(crate) fn uses(kernel: &Kernel) -> Vec<Uses> {
    let mut walk = UseWalk {
        kernel,
        uses: vec![Uses::default(); kernel.values.len()],
        depth_of: BTreeMap::new(),
    };
    walk.block(&kernel.body, 0);
    walk.uses
}

impl UseWalk<'_> {
    fn read(&mut self, tile: TileId, depth: u32) -> &mut Uses {
        let at = self.depth_of.get(&tile).copied().unwrap_or(0);
        let u = &mut self.uses[tile.index()];
        u.count += 1;
        u.deeper |= depth > at;
        u
    }

    fn size(&self, tile: TileId) -> i64 {
        let shape = &self.kernel.ty(tile).shape;
        shape.iter().map(|d| d.as_const().unwrap_or(1)).fold(1, i64::saturating_mul)
    }

    fn block(&mut self, block: &Block, depth: u32) {
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(tile, op) => {
                    self.depth_of.insert(*tile, depth);
                    let size = self.size(*tile);
                    for x in operands(op) {
                        let smaller = self.size(x) < size;
                        let u = self.read(x, depth);
                        u.repeated |=
                            smaller && matches!(op, TileOp::Map { .. } | TileOp::Broadcast(_));
                    }
                    if let TileOp::Mma { a, b, .. } = op {
                        self.uses[a.index()].by_mma += 1;
                        self.uses[b.index()].by_mma += 1;
                    }
                }
                Stmt::Store { value, .. } | Stmt::AtomicAdd { value, .. } => {
                    let _ = self.read(*value, depth);
                }
                Stmt::For(f) => {
                    for (inner, init) in &f.carry {
                        let _ = self.read(*init, depth);
                        self.depth_of.insert(*inner, depth + 1);
                    }
                    self.block(&f.body, depth + 1);
                    for y in &f.yields {
                        let _ = self.read(*y, depth + 1);
                    }
                    for r in &f.results {
                        self.depth_of.insert(*r, depth);
                    }
                }
                Stmt::If(i) => {
                    self.block(&i.then, depth);
                    self.block(&i.otherwise, depth);
                    for y in i.then_yields.iter().chain(&i.otherwise_yields) {
                        let _ = self.read(*y, depth);
                    }
                    for r in &i.results {
                        self.depth_of.insert(*r, depth);
                    }
                }
            }
        }
    }
}

/// For each tile: kept in scratch memory from its definition on.
pub(crate) fn materialised(kernel: &Kernel, uses: &[Uses]) -> Vec<bool> {
    let mut keep = vec![false; kernel.values.len()];
    mark(kernel, uses, &kernel.body, &mut keep);
    keep
}

fn mark(kernel: &Kernel, uses: &[Uses], block: &Block, keep: &mut [bool]) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(tile, op) => {
                let u = &uses[tile.index()];
                keep[tile.index()] = match op {
                    TileOp::Map { func, args } => {
                        let price = cost(func) + 2 * args.len() as u32;
                        (u.repeated && cost(func) > 0)
                            || (u.count > 1 && (price >= 12 || u.by_mma > 0))
                            || (u.deeper && cost(func) > 0)
                    }
                    TileOp::Random { .. } => u.count > 1,
                    TileOp::Gather { .. } => u.count > 1 && u.by_mma > 0,
                    // Reading later could see what this kernel wrote meanwhile.
                    TileOp::Load { param, .. } => kernel.params[*param].access == Access::InOut,
                    _ => false,
                };
            }
            Stmt::For(f) => mark(kernel, uses, &f.body, keep),
            Stmt::If(i) => {
                mark(kernel, uses, &i.then, keep);
                mark(kernel, uses, &i.otherwise, keep);
            }
            _ => {}
        }
    }
}
