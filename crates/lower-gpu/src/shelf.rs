//! What loops read again, or will read soon, kept in shared memory ([`Shelf`]).
//!
//! ```text
//! kept:   for p { fetch x[p] }; wait;  for p { .. recall p .. }   for p { .. recall p .. }
//! ahead:  fetch x[0..A-1];             for p { fetch x[p+A-1]; wait; .. recall p .. }
//! ```
//!
//! *Kept*: several loops of one block go over the same pieces of a tensor, as the passes of a softmax do over a long
//! row. The first [`kept`](crate::LinesKnobs::kept) pieces are read from memory once; what does not fit is read by
//! each loop. *Ahead*: what a loop reads once is fetched [`fetched`](crate::LinesKnobs::fetched) - 1 turns before, so
//! that memory is busy while threads meet. Threads fetch for themselves alone: nobody meets for it. The first fetches of
//! weights stand before the wait for the kernel before ([`ahead`](crate::LinesKnobs::ahead)).
//!
//! A piece may be read early when nothing writes the tensor before the loop reads the piece: it is an input, or its
//! only stores are of the very piece, in the last of the loops and after the load.

use crate::lines::Lines;
use tilewright_base::DType;
use tilewright_device::{Cond, Extent, FragId, LineStep, Shelf, ShelfId, ShelfRef, Spread, Stmt};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{
    Access, Block, Compare, For, Kernel, ParamId, Stmt as TileStmt, TileId, TileOp,
};

/// The loop variable in keys.
const TURN: &str = "#";
/// A load that several loops, or several turns, have in common.
#[derive(Clone, Debug, PartialEq)]
struct Key {
    param: ParamId,
    /// Coordinates, with [`TURN`] for the loop variable.
    index: Vec<Dim>,
    fill: Value,
    shape: Vec<Dim>,
}

/// A load in a loop, and where its pieces are.
#[derive(Clone, Debug)]
struct Shelved {
    key: Key,
    shelf: ShelfId,
}

/// The loop that is being lowered, as far as shelves know it.
#[derive(Clone, Debug)]
pub(crate) struct Turns {
    shelved: Vec<Shelved>,
    slot: Dim,
    /// Turns below this are on the shelf; all of them without.
    most: Option<Dim>,
    turn: Dim,
}

/// Loops of one block that keep pieces for each other, by their places in the block.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept {
    loops: Vec<usize>,
    shelved: Vec<Shelved>,
}

/// The loads of a loop's body, and their tiles.
fn loads(kernel: &Kernel, var: &str, body: &Block) -> Vec<(Key, TileId)> {
    let turn = |name: &str| (name == var).then(|| Dim::sym(TURN));
    let key = |stmt: &TileStmt| match stmt {
        TileStmt::Let(id, TileOp::Load { param, index, steps, fill })
            if steps.iter().all(|s| *s == 1) =>
        {
            let index: Vec<Dim> = index.iter().map(|d| d.substitute(&turn)).collect();
            let shape = kernel.ty(*id).shape.clone();
            Some((Key { param: *param, index, fill: *fill, shape }, *id))
        }
        _ => None,
    };
    body.stmts.iter().filter_map(key).collect()
}

/// Whether a block writes a tensor, other than where `except` says so.
fn writes(block: &Block, param: ParamId, except: &dyn Fn(&[Dim], TileId) -> bool) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        TileStmt::Store { param: p, index, value } => *p == param && !except(index, *value),
        TileStmt::AtomicAdd { param: p, .. } => *p == param,
        TileStmt::For(f) => writes(&f.body, param, except),
        TileStmt::If(f) => writes(&f.then, param, except) || writes(&f.otherwise, param, except),
        TileStmt::Let(..) => false,
    })
}

impl Lines<'_> {
    /// Whether the pieces that a load of the last loop reads are changed by nobody but that turn, afterwards.
    fn unchanged(&self, block: &Block, last: &For, key: &Key) -> bool {
        if self.kernel.params[key.param].access == Access::In {
            return true;
        }
        let turn = |name: &str| (*name == *last.var).then(|| Dim::sym(TURN));
        // Pieces of different turns are apart: the coordinate of one axis is the turn times the tile's extent.
        let apart = key.index.iter().zip(&key.shape).any(|(at, extent)| {
            let zero = |name: &str| (name == TURN).then(|| Dim::new(0));
            at - at.substitute(&zero) == Dim::sym(TURN) * extent
        });
        let own = |index: &[Dim], value: TileId| {
            let index: Vec<Dim> = index.iter().map(|d| d.substitute(&turn)).collect();
            index == key.index && self.kernel.ty(value).shape == key.shape
        };
        let here = last.body.stmts.iter().position(
            |s| matches!(s, TileStmt::Let(_, TileOp::Load { param, .. }) if *param == key.param),
        );
        let before = last
            .body
            .stmts
            .iter()
            .position(|s| matches!(s, TileStmt::Store { param, .. } if *param == key.param));
        let after = before.is_none_or(|store| here.is_some_and(|load| load < store));
        let is_last = |s: &TileStmt| matches!(s, TileStmt::For(f) if f.var == last.var);
        let others = Block { stmts: block.stmts.iter().filter(|s| !is_last(s)).cloned().collect() };
        apart
            && after
            && !writes(&others, key.param, &|_, _| false)
            && !writes(&last.body, key.param, &own)
    }

    fn shelf(&mut self, key: &Key, tile: TileId, slots: u32) -> ShelfId {
        let knobs = &self.schedule.lines;
        let (lanes, vector, threads) = (knobs.lanes, knobs.vector, knobs.threads);
        let axes = self.axes(tile);
        let at = self.here(&key.index, axes, (1, 1));
        let dtype = self.kernel.params[key.param].dtype;
        let shelf = Shelf {
            name: format!("shelf_{}", self.shelves.len()),
            dtype,
            rows: self.rows,
            cols: self.cols,
            spread: Spread::Lines { lanes, vector, threads },
            vector: self.run(key.param, axes.1, &at),
            slots,
        };
        self.shelves.push(shelf)
    }

    /// Whether a load can go by a shelf: it is of the whole plane, and not turned.
    fn can_be_shelved(&self, key: &Key, tile: TileId) -> bool {
        let axes = self.axes(tile);
        let at = self.here(&key.index, axes, (1, 1));
        let bits = self.kernel.params[key.param].dtype.bits();
        self.extents.of(tile) == Extent::Tile
            && (8..=64).contains(&bits)
            && self.dtype(tile) != DType::I4
            && self.dtype(tile) != DType::U4
            && self.turned(tile, key.param, axes, &at).is_none()
    }

    /// Loops of a block that go over the same pieces, when the schedule keeps any.
    pub(crate) fn find_kept(&mut self, block: &Block) -> Kept {
        let knobs = &self.schedule.lines;
        let slots = knobs.kept;
        let mut out = Kept::default();
        if slots == 0 {
            return out;
        }
        let loops: Vec<(usize, &For)> = block
            .stmts
            .iter()
            .enumerate()
            .filter_map(|(i, s)| match s {
                TileStmt::For(f) if f.lo.is(0) => Some((i, &**f)),
                _ => None,
            })
            .collect();
        let Some(hi) = loops.last().map(|(_, f)| f.hi.clone()) else { return out };
        let loops: Vec<(usize, &For)> = loops.into_iter().filter(|(_, f)| f.hi == hi).collect();
        let Some((_, last)) = loops.last() else { return out };
        let mut keys: Vec<(Key, TileId, usize)> = Vec::new();
        for (_, f) in &loops {
            for (key, tile) in loads(self.kernel, &f.var, &f.body) {
                match keys.iter_mut().find(|k| k.0 == key) {
                    Some(known) => known.2 += 1,
                    None => keys.push((key, tile, 1)),
                }
            }
        }
        for (key, tile, count) in keys {
            let varies = key.index.iter().any(|d| mentions(d, TURN));
            if count > 1
                && varies
                && self.can_be_shelved(&key, tile)
                && self.unchanged(block, last, &key)
            {
                let shelf = self.shelf(&key, tile, slots);
                out.shelved.push(Shelved { key, shelf });
            }
        }
        if !out.shelved.is_empty() {
            out.loops = loops.iter().map(|(i, _)| *i).collect();
        }
        out
    }

    /// Fetches a piece, `turn` of its loop.
    fn fetch(&self, s: &Shelved, turn: &Dim, slot: Dim) -> Stmt {
        let put = |name: &str| (name == TURN).then(|| turn.clone());
        let at: Vec<Dim> = s.key.index.iter().map(|d| d.substitute(&put)).collect();
        let axes = self.axes_of(&s.key.shape, s.key.param);
        let at = self.here(&at, axes, (1, 1));
        let to = ShelfRef { shelf: s.shelf, slot };
        Stmt::Line(LineStep::Fetch { to, param: s.key.param, at, axes, fill: s.key.fill })
    }

    /// Rows and columns of a tile that is loaded from a tensor: those of any load of it with this shape.
    fn axes_of(&self, shape: &[Dim], param: ParamId) -> (Option<usize>, Option<usize>) {
        fn find(block: &Block, f: &mut dyn FnMut(&TileOp, TileId)) {
            for stmt in &block.stmts {
                match stmt {
                    TileStmt::Let(id, op) => f(op, *id),
                    TileStmt::For(l) => find(&l.body, f),
                    TileStmt::If(i) => {
                        find(&i.then, f);
                        find(&i.otherwise, f);
                    }
                    _ => {}
                }
            }
        }
        let mut found = (None, None);
        find(&self.kernel.body, &mut |op, id| {
            if matches!(op, TileOp::Load { param: p, .. } if *p == param)
                && self.kernel.ty(id).shape == shape
            {
                found = self.axes(id);
            }
        });
        found
    }

    /// Fetches what the loops of a block keep, before the first of them.
    pub(crate) fn fetch_kept(&self, kept: &Kept, place: usize, out: &mut Vec<Stmt>) {
        if kept.loops.first() != Some(&place) {
            return;
        }
        // All pieces, to neighbouring slots.
        let turn = Dim::sym("kept_turn");
        let body = kept.shelved.iter().map(|s| self.fetch(s, &turn, turn.clone())).collect();
        let (lo, step) = (Dim::new(0), Dim::new(1));
        let hi = Dim::from(self.schedule.lines.kept as usize);
        out.push(Stmt::For { var: "kept_turn".into(), lo, hi, step, body });
        out.push(Stmt::CopyCommit);
        out.push(Stmt::CopyWait { pending: 0 });
    }

    /// What a loop finds on shelves that loops of its block share.
    pub(crate) fn turns_of_kept(&self, kept: &Kept, place: usize, f: &For) -> Option<Turns> {
        kept.loops.contains(&place).then(|| {
            let most = Dim::from(self.schedule.lines.kept as usize);
            let all = f.hi.as_const().is_some_and(|hi| hi <= self.schedule.lines.kept.into());
            let turn = Dim::sym(f.var.clone());
            Turns {
                shelved: kept.shelved.clone(),
                slot: turn.clone(),
                most: (!all).then_some(most),
                turn,
            }
        })
    }

    /// Shelves for a loop whose loads come ahead, if the schedule says so; its first fetches go to `out`.
    pub(crate) fn turns_ahead(&mut self, f: &For, out: &mut Vec<Stmt>) -> Option<Turns> {
        let slots = self.schedule.lines.fetched;
        let plain = f.lo.is(0) && self.loops == 0 && !has_loops(&f.body);
        // What comes before the kernel's turn are weights, and those of the first loop that reads some.
        let early = self.schedule.reads_ahead();
        if slots < 2 || !plain || early && !self.unwaited.is_empty() {
            return None;
        }
        let mut shelved: Vec<Shelved> = Vec::new();
        for (key, tile) in loads(self.kernel, &f.var, &f.body) {
            let varies = key.index.iter().any(|d| mentions(d, TURN));
            let input = self.kernel.params[key.param].access == Access::In;
            if varies
                && input
                && (!early || self.is_matrix(&key, tile))
                && shelved.iter().all(|s| s.key != key)
                && self.can_be_shelved(&key, tile)
            {
                let shelf = self.shelf(&key, tile, slots);
                shelved.push(Shelved { key, shelf });
            }
        }
        if shelved.is_empty() {
            return None;
        }
        let mut first = Vec::new();
        for turn in 0..slots - 1 {
            let turn = Dim::from(turn as usize);
            self.fetch_if(&shelved, &turn, &f.hi, turn.clone(), &mut first);
        }
        match early {
            true => self.unwaited = first,
            false => out.append(&mut first),
        }
        let (turn, slots) = (Dim::sym(f.var.clone()), Dim::from(slots as usize));
        Some(Turns { shelved, slot: turn.modulo(&slots), most: None, turn })
    }

    /// Whether a load is of lines of a matrix, as weights lie.
    fn is_matrix(&self, key: &Key, tile: TileId) -> bool {
        let axes = &self.kernel.params[key.param].layout.axes;
        self.axes(tile) == (Some(0), Some(1)) && axes.len() == 2 && axes[1].stride.is(1)
    }

    fn fetch_if(&self, all: &[Shelved], turn: &Dim, hi: &Dim, slot: Dim, out: &mut Vec<Stmt>) {
        let then = all.iter().map(|s| self.fetch(s, turn, slot.clone())).collect();
        let cond = Cond { lhs: turn.clone(), compare: Compare::Lt, rhs: hi.clone() };
        out.push(Stmt::If { cond, then, otherwise: vec![] });
        out.push(Stmt::CopyCommit);
    }

    /// The start of a turn of a loop whose loads come ahead.
    pub(crate) fn begin_turn(&self, turns: &Turns, hi: &Dim, out: &mut Vec<Stmt>) {
        let slots = self.schedule.lines.fetched;
        let next = &turns.turn + i64::from(slots - 1);
        let slot = next.modulo(&Dim::from(slots as usize));
        // The slot was read in the turn before.
        self.fetch_if(&turns.shelved, &next, hi, slot, out);
        out.push(Stmt::CopyWait { pending: slots - 1 });
    }

    /// A load of the loop that is being lowered, from its shelf; `plain` is the load itself.
    pub(crate) fn recalled(
        &self,
        (param, index, fill): (ParamId, &[Dim], Value),
        (tile, dst): (TileId, FragId),
        plain: Stmt,
    ) -> Stmt {
        let Some(turns) = &self.turns else { return plain };
        let Some(var) = turns.turn.as_symbol() else { return plain };
        let turn = |name: &str| (*name == **var).then(|| Dim::sym(TURN));
        let index: Vec<Dim> = index.iter().map(|d| d.substitute(&turn)).collect();
        let key = Key { param, index, fill, shape: self.kernel.ty(tile).shape.clone() };
        let Some(found) = turns.shelved.iter().find(|s| s.key == key) else { return plain };
        let from = ShelfRef { shelf: found.shelf, slot: turns.slot.clone() };
        let recall = Stmt::Line(LineStep::Recall { dst: crate::lines::whole(dst), from });
        match &turns.most {
            None => recall,
            Some(most) => {
                let (lhs, rhs) = (turns.turn.clone(), most.clone());
                let cond = Cond { lhs, compare: Compare::Lt, rhs };
                Stmt::If { cond, then: vec![recall], otherwise: vec![plain] }
            }
        }
    }
}

fn mentions(dim: &Dim, name: &str) -> bool {
    let mut found = false;
    dim.for_each_symbol(&mut |s| found |= **s == *name);
    found
}

fn has_loops(block: &Block) -> bool {
    block.stmts.iter().any(|s| match s {
        TileStmt::For(_) => true,
        TileStmt::If(f) => has_loops(&f.then) || has_loops(&f.otherwise),
        _ => false,
    })
}
