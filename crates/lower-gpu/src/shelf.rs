//! What loops read again, or will read soon, kept in shared memory ([`Shelf`]).
//!
//! ```text
//! kept:   for p { fetch x[p] }; wait;  for p { .. recall p .. }   for p { .. recall p .. }
//! ahead:  fetch x[0..A-1];             for p { fetch x[p+A-1]; wait; .. recall p .. }
//! ```
//!
//! Items of a persistent grid are such a loop, too: the tile of an item is fetched while those before it are worked on,
//! and so are the pieces that its loops keep.
//!
//! *Kept*: several loops of one block go over the same pieces of a tensor, as the passes of a softmax do over a long
//! row. The first [`kept`](crate::LinesKnobs::kept) pieces are read from memory once; what does not fit is read by
//! each loop. *Ahead*: what a loop reads once is fetched [`fetched`](crate::LinesKnobs::fetched) - 1 turns before, so
//! that memory is busy while threads meet. Threads fetch for themselves alone: nobody meets for it.
//!
//! A piece may be read early when nothing writes the tensor before the loop reads the piece: it is an input, or its
//! only stores are of the very piece, in the last of the loops and after the load.

use crate::lines::Lines;
use crate::schedule::LinesKnobs;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{
    CLUSTER, CLUSTERS, Cond, Extent, FragId, LineStep, Shelf, ShelfId, ShelfRef, Spread, Stmt,
};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{
    Access, Block, Compare, For, GridAxis, Kernel, ParamId, Stmt as TileStmt, TileId, TileOp,
};

/// The loop variable in keys.
const TURN: &str = "#";
/// The loop variable of the items of a cluster, when they are fetched ahead.
pub(crate) const ITEM_TURN: &str = "item_turn";

/// The item that a cluster works on in a turn.
pub(crate) fn item_of_turn(turn: &Dim) -> Dim {
    Dim::sym(CLUSTER) + turn * Dim::sym(CLUSTERS)
}

/// How many items this cluster has.
pub(crate) fn turns_of_items(items: &Dim) -> Dim {
    (items - Dim::sym(CLUSTER)).ceil_div(&Dim::sym(CLUSTERS))
}

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
    /// The pieces of later items of the grid come while those of one are worked on.
    ahead: bool,
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
        let shelf = Shelf {
            name: format!("shelf_{}", self.shelves.len()),
            dtype: self.kernel.params[key.param].dtype,
            rows: self.rows,
            cols: self.cols,
            spread: Spread::Lines { lanes, vector, threads },
            vector: self.aligned_run(key.param, axes.1, &at),
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
        if knobs.kept == 0 || self.items_ahead {
            return Kept::default();
        }
        if let Some(kept) = &self.kept_ahead {
            // Nested blocks have no loops of their own over rows.
            let here = std::ptr::eq(block, &raw const self.kernel.body);
            return if here { kept.clone() } else { Kept::default() };
        }
        self.kept_in(block, knobs.kept)
    }

    fn kept_in(&mut self, block: &Block, slots: u32) -> Kept {
        let mut out = Kept::default();
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

    /// Fetches a piece, `turn` of its loop, of the item of this turn of the grid or of the item that is worked on.
    fn fetch(&self, s: &Shelved, turn: &Dim, item_turn: Option<&Dim>, slot: Dim) -> Stmt {
        let item = item_turn.map(item_of_turn);
        let put = |name: &str| match (name, &item) {
            (TURN, _) => Some(turn.clone()),
            (name, Some(item)) => self.coordinate(name, item),
            _ => None,
        };
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
        if kept.loops.first() != Some(&place) || kept.ahead {
            return;
        }
        out.push(self.fetch_pieces(&kept.shelved, None, &Dim::new(0)));
        out.push(Stmt::CopyCommit);
        out.push(Stmt::CopyWait { pending: 0 });
    }

    /// Fetches all pieces of a row, to neighbouring slots.
    fn fetch_pieces(&self, all: &[Shelved], item_turn: Option<&Dim>, first: &Dim) -> Stmt {
        let turn = Dim::sym("kept_turn");
        let one = |s| self.fetch(s, &turn, item_turn, first + &turn);
        let body = all.iter().map(one).collect();
        let (lo, step) = (Dim::new(0), Dim::new(1));
        let hi = Dim::from(self.schedule.lines.kept as usize);
        Stmt::For { var: "kept_turn".into(), lo, hi, step, body }
    }

    /// First slot of the pieces of an item.
    fn slots_of_item(&self, turn: &Dim) -> Dim {
        let knobs = &self.schedule.lines;
        turn.modulo(&Dim::from(knobs.fetched as usize)) * i64::from(knobs.kept)
    }

    /// Rows in pieces that are kept, of which the next items' come ahead, if the schedule says so; the first fetches go
    /// to `out`.
    ///
    /// # Errors
    /// Unsupported when pieces cannot come ahead of their item.
    pub(crate) fn kept_ahead(&mut self, turns: &Dim, out: &mut Vec<Stmt>) -> Result<()> {
        let LinesKnobs { kept: slots, fetched, .. } = self.schedule.lines;
        if slots == 0 || fetched < 2 || !self.schedule.persistent {
            return Ok(());
        }
        let kernel = self.kernel;
        let mut kept = self.kept_in(&kernel.body, slots * fetched);
        let unsupported = |what: &str| Err(Error::unsupported(format!("rows ahead of {what}")));
        let all_kept = kept.loops.iter().all(|place| match &kernel.body.stmts[*place] {
            TileStmt::For(f) => f.hi.as_const().is_some_and(|hi| hi <= slots.into()),
            _ => false,
        });
        if kept.shelved.is_empty() || !all_kept {
            return unsupported("a loop that keeps a part of them");
        }
        // What an item changes must be no other item's.
        let own = |s: &Shelved| {
            let of_item = |axis: &GridAxis| {
                let zero = |name: &str| (*name == *axis.name).then(|| Dim::new(0));
                let here = Dim::sym(axis.name.clone());
                let moves =
                    |(at, extent): (&Dim, &Dim)| at - at.substitute(&zero) == &here * extent;
                s.key.index.iter().zip(&s.key.shape).any(moves)
            };
            self.kernel.params[s.key.param].access == Access::In || kernel.grid.iter().all(of_item)
        };
        if !kept.shelved.iter().all(own) {
            return unsupported("items that change them");
        }
        kept.ahead = true;
        for turn in 0..fetched - 1 {
            self.fetch_item(&kept, &Dim::from(turn as usize), turns, out);
        }
        self.kept_ahead = Some(kept);
        Ok(())
    }

    /// Fetches the pieces of the item of a turn, if there is one.
    fn fetch_item(&self, kept: &Kept, turn: &Dim, turns: &Dim, out: &mut Vec<Stmt>) {
        let then = vec![self.fetch_pieces(&kept.shelved, Some(turn), &self.slots_of_item(turn))];
        let cond = Cond { lhs: turn.clone(), compare: Compare::Lt, rhs: turns.clone() };
        out.push(Stmt::If { cond, then, otherwise: vec![] });
        out.push(Stmt::CopyCommit);
    }

    /// The start of a turn of the grid whose rows come ahead.
    pub(crate) fn begin_item(&self, turns: &Dim, out: &mut Vec<Stmt>) {
        let Some(kept) = &self.kept_ahead else { return };
        let pending = self.schedule.lines.fetched - 1;
        // Its slots were read in the turn before.
        self.fetch_item(kept, &(Dim::sym(ITEM_TURN) + i64::from(pending)), turns, out);
        out.push(Stmt::CopyWait { pending });
    }

    /// The coordinate of the grid that an item has.
    fn coordinate(&self, name: &str, item: &Dim) -> Option<Dim> {
        let mut rest = item.clone();
        for (i, axis) in self.kernel.grid.iter().enumerate().rev() {
            if *axis.name == *name {
                return Some(if i == 0 { rest } else { rest.modulo(&axis.extent) });
            }
            rest = rest.floor_div(&axis.extent);
        }
        None
    }

    /// Shelves for the tiles of a persistent grid's items, if the schedule says so; the first fetches go to `out`.
    pub(crate) fn items_ahead(&mut self, turns: &Dim, out: &mut Vec<Stmt>) -> Option<Turns> {
        let slots = self.schedule.lines.fetched;
        if slots < 2 || !self.schedule.persistent || self.schedule.lines.kept > 0 {
            return None;
        }
        let kernel = self.kernel;
        let mut shelved: Vec<Shelved> = Vec::new();
        for (key, tile) in loads(kernel, ITEM_TURN, &kernel.body) {
            let varies = |d: &Dim| kernel.grid.iter().any(|axis| mentions(d, &axis.name));
            let input = kernel.params[key.param].access == Access::In;
            if key.index.iter().any(varies)
                && input
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
        self.items_ahead = true;
        for turn in 0..slots - 1 {
            let turn = Dim::from(turn as usize);
            self.fetch_if(&shelved, &turn, turns, turn.clone(), out);
        }
        let (turn, slots) = (Dim::sym(ITEM_TURN), Dim::from(slots as usize));
        Some(Turns { shelved, slot: turn.modulo(&slots), most: None, turn })
    }

    /// What a loop finds on shelves that loops of its block share.
    pub(crate) fn turns_of_kept(&self, kept: &Kept, place: usize, f: &For) -> Option<Turns> {
        kept.loops.contains(&place).then(|| {
            let most = Dim::from(self.schedule.lines.kept as usize);
            let all = f.hi.as_const().is_some_and(|hi| hi <= self.schedule.lines.kept.into());
            let turn = Dim::sym(f.var.clone());
            let slot = match kept.ahead {
                true => self.slots_of_item(&Dim::sym(ITEM_TURN)) + &turn,
                false => turn.clone(),
            };
            Turns { shelved: kept.shelved.clone(), slot, most: (!all).then_some(most), turn }
        })
    }

    /// Shelves for a loop whose loads come ahead, if the schedule says so; its first fetches go to `out`.
    pub(crate) fn turns_ahead(&mut self, f: &For, out: &mut Vec<Stmt>) -> Option<Turns> {
        let slots = self.schedule.lines.fetched;
        let plain = f.lo.is(0) && self.loops == 0 && !self.items_ahead && !has_loops(&f.body);
        if slots < 2 || !plain || self.kept_ahead.is_some() {
            return None;
        }
        let mut shelved: Vec<Shelved> = Vec::new();
        for (key, tile) in loads(self.kernel, &f.var, &f.body) {
            let varies = key.index.iter().any(|d| mentions(d, TURN));
            let input = self.kernel.params[key.param].access == Access::In;
            if varies
                && input
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
        for turn in 0..slots - 1 {
            let turn = Dim::from(turn as usize);
            self.fetch_if(&shelved, &turn, &f.hi, turn.clone(), out);
        }
        let (turn, slots) = (Dim::sym(f.var.clone()), Dim::from(slots as usize));
        Some(Turns { shelved, slot: turn.modulo(&slots), most: None, turn })
    }

    fn fetch_if(&self, all: &[Shelved], turn: &Dim, hi: &Dim, slot: Dim, out: &mut Vec<Stmt>) {
        // A loop's own turns, or those of the grid.
        let item = self.items_ahead.then_some(turn);
        let then = all.iter().map(|s| self.fetch(s, turn, item, slot.clone())).collect();
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
