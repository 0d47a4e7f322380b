//! Statements: definitions that must be computed in place, stores, loops and branches.

use crate::analyze::{defined_in, operands};
use crate::emitter::{Acc, Buf, Emitter, Epilogue, Loc};
use tilewright_base::{Error, Result};
use tilewright_layout::{Dim, Range, uppers};
use tilewright_tile::{Compare, For, If, Stmt, TileId, TileOp};

impl<'a> Emitter<'a> {
    /// Writes the statements of a block. `yields` says for tiles that an enclosing loop carries
    /// where their next value belongs.
    pub(crate) fn block(&mut self, stmts: &'a [Stmt], yields: &[(TileId, Loc)]) -> Result<()> {
        let mut fused: Vec<usize> = Vec::new();
        for (n, stmt) in stmts.iter().enumerate() {
            self.forget_values();
            if fused.contains(&n) {
                continue;
            }
            match stmt {
                Stmt::Let(tile, op) => {
                    if self.need[tile.index()].is_none() {
                        continue;
                    }
                    self.defs[tile.index()] = Some(op);
                    self.loc[tile.index()] = Loc::Virtual;
                    match op {
                        TileOp::Reduce { .. } | TileOp::ArgReduce { .. } | TileOp::Scan { .. } => {
                            self.c.t.comment(format_args!("{tile}: reduction"));
                            self.reduction(*tile, op)?;
                        }
                        TileOp::Mma { .. } => {
                            self.c.t.comment(format_args!("{tile}: product"));
                            let target = yields.iter().find(|(t, _)| t == tile).map(|y| &y.1);
                            let (epilogue, used) = match target {
                                Some(_) => (None, vec![]),
                                None => self.find_epilogue(&stmts[n + 1..], *tile, n + 1),
                            };
                            let always = epilogue.is_some();
                            self.mma(*tile, op, target, epilogue)?;
                            if always {
                                fused.extend(used);
                            }
                        }
                        _ if self.materialise[tile.index()] => {
                            self.c.t.comment(format_args!("{tile}: kept"));
                            let buf = self.keep(*tile)?;
                            self.loc[tile.index()] = Loc::Buffer(buf);
                        }
                        _ => {}
                    }
                }
                Stmt::Store { param, index, value } => {
                    let counts = self.need_of(*value);
                    let shape = self.extents(*value)?;
                    let axes = &self.k.params[*param].layout.axes;
                    let counts: Vec<Dim> = (0..shape.len())
                        .map(|d| {
                            let left = &axes[d].extent - &index[d];
                            counts[d].min_with(&left).min_with(&shape[d].into())
                        })
                        .collect();
                    let base = vec![Dim::new(0); shape.len()];
                    self.store_tile(*param, index, *value, &base, &counts)?;
                }
                Stmt::AtomicAdd { param, index, value } => {
                    self.atomic_add(*param, index, *value)?
                }
                Stmt::For(f) => {
                    let rest = &stmts[n + 1..];
                    let used = self.for_loop(f, rest, n + 1, yields)?;
                    fused.extend(used);
                }
                Stmt::If(i) => self.branch(i)?,
            }
        }
        self.forget_values();
        Ok(())
    }

    /// The needed part of a tile.
    pub(crate) fn need_of(&self, tile: TileId) -> Vec<Dim> {
        match &self.need[tile.index()] {
            Some(need) => need.clone(),
            None => self.k.ty(tile).shape.clone(),
        }
    }

    /// Stores the part of `value` that starts at `base` and extends over `counts`.
    pub(crate) fn store_tile(
        &mut self,
        param: tilewright_tile::ParamId,
        index: &[Dim],
        value: TileId,
        base: &[Dim],
        counts: &[Dim],
    ) -> Result<()> {
        let counts: Vec<Dim> = counts.iter().map(|c| self.facts.simplify(c)).collect();
        let nibbles = self.k.params[param].dtype.bits() == 4;
        let at = |e: &Self, coords: &[Dim]| {
            let global: Vec<Dim> = index
                .iter()
                .zip(coords)
                .zip(base)
                .map(|((i, c), b)| e.facts.expand(&(i + b + c)))
                .collect();
            Some(e.k.params[param].layout.offset_of(&global))
        };
        let to = |e: &Emitter<'_>, coords: &[Dim]| {
            let global: Vec<Dim> = index.iter().zip(coords).map(|(i, c)| i + c).collect();
            e.param_place(param, &global)
        };
        let turn = self.turn_of(value, base, &counts, &to);
        let (axis, lanes) = match turn {
            Some(turn) => (Some(turn.to), turn.lanes),
            None => self.choose_axis(value, &counts, &at)?,
        };
        let lanes = if nibbles { 1 } else { lanes };
        let plain = |e: &mut Self, base: &[Dim], counts: &[Dim]| {
            e.split = Some(value);
            e.nest(base, counts, axis, lanes, &mut |e, coords| {
                e.each_neighbour(value, coords, &mut |e, coords, v| {
                    let place = to(e, coords);
                    e.store(&place, v, false)
                })
            })
        };
        let write = |e: &mut Self| match turn {
            Some(turn) => e.turn(turn, value, [base, &counts], &to, &mut |e, base, counts| {
                plain(e, base, counts)
            }),
            None => plain(e, base, &counts),
        };
        if !self.knobs.stream || !self.may_stream(param, index, base, axis, lanes) {
            return write(self);
        }
        // Only whole aligned vectors go past the caches; where the buffer starts is known at run
        // time.
        let mask = i64::from(lanes) * self.k.params[param].dtype.size() as i64 - 1;
        let at = self.c.t.ins(format_args!("ptrtoint ptr %p{} to i64", param.0));
        let low = self.c.t.ins(format_args!("and i64 {at}, {mask}"));
        let aligned = self.c.t.ins(format_args!("icmp eq i64 {low}, 0"));
        let (yes, no, end) = (self.c.t.label(), self.c.t.label(), self.c.t.label());
        self.c.t.br_if(&aligned, &yes, &no);
        self.streamed = true;
        let site = self.site;
        for (label, streaming) in [(&yes, true), (&no, false)] {
            self.c.t.place(label);
            self.site = site;
            self.push_scope();
            self.streaming = streaming;
            let written = write(self);
            self.streaming = false;
            self.pop_scope();
            written?;
            self.c.t.br(&end);
        }
        self.c.t.place(&end);
        Ok(())
    }

    /// Every vector of a store starts a multiple of its own size behind the buffer's start.
    fn may_stream(
        &self,
        param: tilewright_tile::ParamId,
        index: &[Dim],
        base: &[Dim],
        axis: Option<usize>,
        lanes: u32,
    ) -> bool {
        let info = &self.k.params[param];
        let whole = |d: &Dim| self.settle(&d.modulo(&Dim::new(i64::from(lanes)))).is(0);
        let Some(axis) = axis else { return false };
        lanes as usize * info.dtype.size() >= 16
            && whole(&info.layout.offset)
            && whole(&(&index[axis] + &base[axis]))
            && info.layout.axes.iter().enumerate().all(|(d, a)| {
                let steps = if d == axis { a.stride.is(1) } else { whole(&a.stride) };
                a.block.is_none() && steps
            })
    }

    /// Evaluates a tile into scratch memory.
    pub(crate) fn keep(&mut self, tile: TileId) -> Result<Buf> {
        let shape = self.extents(tile)?;
        let buf = self.new_buffer(self.k.ty(tile).dtype.size_aligned(), &shape);
        let counts = self.need_of(tile);
        self.fill_buffer(&buf, tile, &counts)?;
        Ok(buf)
    }

    /// Evaluates the first `counts` elements of a tile into a buffer.
    pub(crate) fn fill_buffer(&mut self, buf: &Buf, tile: TileId, counts: &[Dim]) -> Result<()> {
        let base = vec![Dim::new(0); counts.len()];
        self.fill_region(buf, tile, &base, counts)
    }

    /// Evaluates part of a tile into a buffer.
    pub(crate) fn fill_region(
        &mut self,
        buf: &Buf,
        tile: TileId,
        base: &[Dim],
        counts: &[Dim],
    ) -> Result<()> {
        let at = |e: &Self, coords: &[Dim]| {
            let coords: Vec<Dim> =
                coords.iter().zip(base).map(|(c, b)| e.facts.expand(&(b + c))).collect();
            Some(buf.layout.offset_of(&coords))
        };
        let buf = buf.clone();
        let to = |e: &Emitter<'_>, coords: &[Dim]| e.buffer_place(&buf, coords);
        let turn = self.turn_of(tile, base, counts, &to);
        let (axis, lanes) = match turn {
            Some(turn) => (Some(turn.to), turn.lanes),
            None => self.choose_axis(tile, counts, &at)?,
        };
        let mut plain = |e: &mut Self, base: &[Dim], counts: &[Dim]| {
            e.split = Some(tile);
            e.nest(base, counts, axis, lanes, &mut |e, coords| {
                e.each_neighbour(tile, coords, &mut |e, coords, v| {
                    let place = e.buffer_place(&buf, coords);
                    e.store(&place, v, false)
                })
            })
        };
        match turn {
            Some(turn) => self.turn(turn, tile, [base, counts], &to, &mut plain),
            None => plain(self, base, counts),
        }
    }

    /// Copies between two buffers of one shape.
    fn copy_buffer(&mut self, tile: TileId, from: &Buf, to: &Buf) -> Result<()> {
        let counts = self.need_of(tile);
        let before = std::mem::replace(&mut self.loc[tile.index()], Loc::Buffer(from.clone()));
        self.fill_buffer(to, tile, &counts)?;
        self.loc[tile.index()] = before;
        Ok(())
    }

    /// How often `tile` is read in the statements (at any depth), and yields.
    fn reads(stmts: &[Stmt], tile: TileId) -> u32 {
        let mut n = 0;
        for stmt in stmts {
            n += match stmt {
                Stmt::Let(_, op) => operands(op).iter().filter(|t| **t == tile).count() as u32,
                Stmt::Store { value, .. } | Stmt::AtomicAdd { value, .. } => {
                    u32::from(*value == tile)
                }
                Stmt::For(f) => {
                    f.carry.iter().filter(|(_, init)| *init == tile).count() as u32
                        + Self::reads(&f.body.stmts, tile)
                        + f.yields.iter().filter(|y| **y == tile).count() as u32
                }
                Stmt::If(i) => {
                    Self::reads(&i.then.stmts, tile)
                        + Self::reads(&i.otherwise.stmts, tile)
                        + i.then_yields
                            .iter()
                            .chain(&i.otherwise_yields)
                            .filter(|y| **y == tile)
                            .count() as u32
                }
            };
        }
        n
    }

    /// The statement of the block, if any, that turns carried tile `inner` into `yielded` by adding
    /// products to it and nothing else.
    fn accumulates(f: &For, n: usize) -> bool {
        let (inner, _) = f.carry[n];
        let yielded = f.yields[n];
        if Self::reads(&f.body.stmts, inner) != 1 || f.yields.contains(&inner) {
            return false;
        }
        if Self::reads(&f.body.stmts, yielded) != 0
            || f.yields.iter().filter(|y| **y == yielded).count() != 1
        {
            return false;
        }
        f.body.stmts.iter().any(|stmt| match stmt {
            Stmt::Let(t, TileOp::Mma { acc, .. }) => *t == yielded && *acc == inner,
            Stmt::For(g) => g
                .results
                .iter()
                .position(|r| *r == yielded)
                .is_some_and(|m| g.carry[m].1 == inner && Self::accumulates(g, m)),
            _ => false,
        })
    }

    fn for_loop(
        &mut self,
        f: &'a For,
        rest: &'a [Stmt],
        rest_at: usize,
        outer_yields: &[(TileId, Loc)],
    ) -> Result<Vec<usize>> {
        self.c.t.comment(format_args!("for {} in {}..{}", f.var, f.lo, f.hi));
        let lo = self.facts.simplify(&f.lo);
        let hi = self.facts.simplify(&f.hi);
        let runs = self.facts.proves_non_negative(&(&hi - 1 - &lo));
        let single = runs && (&hi - &lo).is(1);
        let mut used = Vec::new();
        let mut plans: Vec<Option<Loc>> = Vec::new();
        let mut bufs: Vec<Option<Buf>> = Vec::new();
        for (n, (inner, init)) in f.carry.iter().enumerate() {
            let result = f.results[n];
            if self.need[inner.index()].is_none() && self.need[result.index()].is_none() {
                plans.push(None);
                bufs.push(None);
                continue;
            }
            if runs && Self::accumulates(f, n) {
                // Accumulator of products: written first by the first product.
                let outer = match &self.loc[init.index()] {
                    Loc::Acc(acc) if outer_yields.iter().any(|(t, _)| *t == result) => {
                        Some((**acc).clone())
                    }
                    _ => None,
                };
                let acc = match outer {
                    Some(acc) => acc,
                    None => {
                        let (epilogue, stores) = self.find_epilogue(rest, result, rest_at);
                        used.extend(stores);
                        let buf = self.accumulator(*inner, single && epilogue.is_some())?;
                        Acc {
                            buf,
                            init: *init,
                            first: "true".into(),
                            last: "true".into(),
                            epilogue,
                        }
                    }
                };
                bufs.push(Some(acc.buf.clone()));
                plans.push(Some(Loc::Acc(Box::new(acc))));
            } else {
                let shape = self.extents(*inner)?;
                if matches!(self.loc[init.index()], Loc::Acc(_)) {
                    return Err(Error::bug("a loop reads an open accumulator"));
                }
                // A product that is written in place wants panels.
                let buf = if self.may_write_in_place(f, f.yields[n]) {
                    self.accumulator(*inner, false)?
                } else {
                    self.new_buffer(self.k.ty(*inner).dtype.size_aligned(), &shape)
                };
                let counts = self.need_of(*init);
                self.fill_buffer(&buf, *init, &counts)?;
                bufs.push(Some(buf.clone()));
                plans.push(Some(Loc::Buffer(buf)));
            }
        }
        // The loop itself.
        let (lo_v, hi_v) = (self.dim(&lo), self.dim(&hi));
        let (blo, bhi) = (self.facts.bounds(&lo), self.facts.bounds(&hi));
        let range = Range { min: blo.min, max: bhi.max.saturating_sub(1).max(blo.min) };
        self.facts.declare(&f.var, range, uppers(&hi));
        let open = (!single).then(|| self.c.t.begin_loop(&lo_v, &hi_v, "1"));
        let iv = open.as_ref().map_or(lo_v.clone(), |o| o.iv.clone());
        if single && lo.as_const().is_some() {
            let at = lo.as_const().unwrap_or(0);
            self.facts.declare(&f.var, Range { min: at, max: at }, uppers(&hi));
        }
        self.bind(&f.var, &iv);
        self.push_scope();
        let mark = self.scratch_mark();
        let mut yields: Vec<(TileId, Loc)> = Vec::new();
        for (n, (inner, _)) in f.carry.iter().enumerate() {
            match plans[n].clone() {
                Some(Loc::Acc(mut acc)) => {
                    if !single {
                        let here = self.c.t.ins(format_args!("icmp eq i64 {iv}, {lo_v}"));
                        acc.first = self.both(&acc.first.clone(), &here);
                        let end = self.dim(&(&hi - 1));
                        let here = self.c.t.ins(format_args!("icmp eq i64 {iv}, {end}"));
                        acc.last = self.both(&acc.last.clone(), &here);
                    }
                    yields.push((f.yields[n], Loc::Acc(acc.clone())));
                    self.loc[inner.index()] = Loc::Acc(acc);
                }
                Some(loc) => {
                    if let Loc::Buffer(buf) = &loc {
                        yields.push((f.yields[n], Loc::Buffer(buf.clone())));
                    }
                    self.loc[inner.index()] = loc;
                }
                None => {}
            }
        }
        // A product may write straight into the carried buffer when nobody reads the old value
        // after it.
        let direct: Vec<(TileId, Loc)> = yields
            .iter()
            .filter(|(y, loc)| match loc {
                Loc::Acc(_) => true,
                _ => self.may_write_in_place(f, *y),
            })
            .cloned()
            .collect();
        self.block(&f.body.stmts, &direct)?;
        self.write_yields(f, &bufs)?;
        self.scratch_release(mark);
        self.pop_scope();
        if let Some(open) = open {
            self.c.t.end_loop(open);
        }
        for (n, result) in f.results.iter().enumerate() {
            if let Some(buf) = &bufs[n] {
                self.loc[result.index()] = Loc::Buffer(buf.clone());
            }
        }
        self.forget_values();
        Ok(used)
    }

    /// `a && b` on scalars.
    fn both(&mut self, a: &str, b: &str) -> String {
        if a == "true" { b.to_owned() } else { self.c.bin("and", "i1", 1, a, b) }
    }

    /// True when `yielded` is a product on (an expression of) its own carried tile, after which no
    /// statement and no other yield reads that tile.
    fn may_write_in_place(&self, f: &'a For, yielded: TileId) -> bool {
        let Some(n) = f.yields.iter().position(|y| *y == yielded) else { return false };
        if f.yields.iter().filter(|y| **y == yielded).count() != 1 {
            return false;
        }
        let inner = f.carry[n].0;
        let Some(at) = f
            .body
            .stmts
            .iter()
            .position(|s| matches!(s, Stmt::Let(t, TileOp::Mma { .. }) if *t == yielded))
        else {
            return false;
        };
        let Stmt::Let(_, TileOp::Mma { acc, a, b, .. }) = &f.body.stmts[at] else { return false };
        // Tiles of the body whose value, computed late, reads the carried tile.
        let mut tainted = vec![inner];
        for stmt in &f.body.stmts {
            if let Stmt::Let(t, op) = stmt
                && !self.materialise[t.index()]
                && !matches!(
                    op,
                    TileOp::Reduce { .. }
                        | TileOp::ArgReduce { .. }
                        | TileOp::Scan { .. }
                        | TileOp::Mma { .. }
                )
                && operands(op).iter().any(|o| tainted.contains(o))
            {
                tainted.push(*t);
            }
        }
        if tainted.contains(a) || tainted.contains(b) || !self.elementwise(f, *acc, inner) {
            return false;
        }
        tainted
            .iter()
            .all(|t| Self::reads(&f.body.stmts[at + 1..], *t) == 0 && !f.yields.contains(t))
    }

    /// True when element (i, j) of `tile` depends on no other element of `inner` than (i, j).
    fn elementwise(&self, f: &'a For, tile: TileId, inner: TileId) -> bool {
        if tile == inner {
            return true;
        }
        let op = f.body.stmts.iter().find_map(|s| match s {
            Stmt::Let(t, op) if *t == tile => Some(op),
            _ => None,
        });
        match op {
            _ if self.materialise[tile.index()] => true,
            None => true,
            Some(TileOp::Map { args, .. }) => args.iter().all(|a| {
                let plain = a.along.iter().copied().eq(0..self.k.ty(tile).shape.len())
                    && self.k.ty(a.tile).shape == self.k.ty(tile).shape;
                if plain {
                    self.elementwise(f, a.tile, inner)
                } else {
                    !self.depends(f, a.tile, inner)
                }
            }),
            Some(op) => operands(op).iter().all(|t| !self.depends(f, *t, inner)),
        }
    }

    fn depends(&self, f: &'a For, tile: TileId, on: TileId) -> bool {
        if tile == on {
            return true;
        }
        if self.materialise[tile.index()] {
            return false;
        }
        f.body.stmts.iter().any(|s| match s {
            Stmt::Let(
                t,
                TileOp::Reduce { .. }
                | TileOp::ArgReduce { .. }
                | TileOp::Scan { .. }
                | TileOp::Mma { .. },
            ) if *t == tile => false,
            Stmt::Let(t, op) if *t == tile => operands(op).iter().any(|o| self.depends(f, *o, on)),
            _ => false,
        })
    }

    /// Moves the carried tiles' next values into their buffers, all as if at once.
    fn write_yields(&mut self, f: &'a For, bufs: &[Option<Buf>]) -> Result<()> {
        self.forget_values();
        let mut pending: Vec<(usize, Buf)> = Vec::new();
        for (n, buf) in bufs.iter().enumerate() {
            let Some(buf) = buf else { continue };
            match &self.loc[f.yields[n].index()] {
                // Written in place.
                Loc::Buffer(b) if b.ptr == buf.ptr => {}
                Loc::Acc(a) if a.buf.ptr == buf.ptr => {}
                _ => pending.push((n, buf.clone())),
            }
        }
        let mut copies: Vec<(usize, Buf, Buf)> = Vec::new();
        for (n, to) in &pending {
            let y = f.yields[*n];
            let counts = self.need_of(y);
            // Reading `y` late must not see a carried tile that was overwritten already.
            let others = f
                .carry
                .iter()
                .enumerate()
                .filter(|(m, _)| m != n && pending.iter().any(|(p, _)| p == m))
                .any(|(_, (inner, _))| self.depends(f, y, *inner));
            let own = self.elementwise(f, y, f.carry[*n].0);
            match self.loc[y.index()].clone() {
                Loc::Buffer(from) if f.carry.iter().all(|(inner, _)| *inner != y) => {
                    copies.push((*n, from, to.clone()));
                }
                _ if !others && own && pending.len() == 1 => self.fill_buffer(to, y, &counts)?,
                _ => {
                    let from = self.new_buffer(to.dtype, &self.extents(y)?);
                    self.fill_buffer(&from, y, &counts)?;
                    copies.push((*n, from, to.clone()));
                }
            }
        }
        for (n, from, to) in copies {
            self.forget_values();
            self.copy_buffer(f.yields[n], &from, &to)?;
        }
        self.forget_values();
        Ok(())
    }

    /// Stores after a product (statements `rest`, the first being number `at` of its block) that
    /// can run on each piece of it: everything that reads `result` is elementwise, up to stores.
    fn find_epilogue(
        &mut self,
        rest: &'a [Stmt],
        result: TileId,
        at: usize,
    ) -> (Option<Epilogue>, Vec<usize>) {
        let mut derived = vec![result];
        let mut stores = Vec::new();
        let mut used = Vec::new();
        for (n, stmt) in rest.iter().enumerate() {
            match stmt {
                Stmt::Let(t, op) => {
                    let late = matches!(
                        op,
                        TileOp::Reduce { .. }
                            | TileOp::ArgReduce { .. }
                            | TileOp::Scan { .. }
                            | TileOp::Mma { .. }
                    ) || self.materialise[t.index()];
                    if operands(op).iter().any(|o| derived.contains(o)) {
                        if late || matches!(op, TileOp::Gather { .. }) {
                            return (None, vec![]);
                        }
                        derived.push(*t);
                    }
                }
                Stmt::Store { value, .. } if derived.contains(value) => {
                    let Some(axes) = self.axes_of(rest, *value, result, rest) else {
                        return (None, vec![]);
                    };
                    stores.push((stmt.clone(), axes));
                    used.push(at + n);
                }
                Stmt::Store { .. } => {}
                Stmt::AtomicAdd { value, .. } if !derived.contains(value) => {}
                Stmt::AtomicAdd { .. } => return (None, vec![]),
                Stmt::For(_) | Stmt::If(_) => {
                    if derived.iter().any(|d| Self::reads(std::slice::from_ref(stmt), *d) > 0) {
                        return (None, vec![]);
                    }
                }
            }
        }
        if stores.is_empty() {
            return (None, vec![]);
        }
        // The definitions are needed now.
        for stmt in rest {
            if let Stmt::Let(t, op) = stmt
                && derived.contains(t)
            {
                self.define_virtual(rest, *t, op);
            }
        }
        (Some(Epilogue { result, stores }), used)
    }

    fn define_virtual(&mut self, rest: &'a [Stmt], tile: TileId, op: &'a TileOp) {
        self.defs[tile.index()] = Some(op);
        self.loc[tile.index()] = Loc::Virtual;
        for operand in operands(op) {
            let found = rest.iter().find_map(|s| match s {
                Stmt::Let(t, op) if *t == operand => Some(op),
                _ => None,
            });
            if let Some(op) = found {
                self.define_virtual(rest, operand, op);
            }
        }
    }

    /// For each axis of `tile`, which axis of the product it is. `None` when it is not a plain
    /// rearrangement, or reads something that does not exist yet.
    fn axes_of(
        &self,
        rest: &'a [Stmt],
        tile: TileId,
        result: TileId,
        all: &'a [Stmt],
    ) -> Option<Vec<Option<usize>>> {
        if tile == result {
            return Some(vec![Some(0), Some(1)]);
        }
        let shape = &self.k.ty(tile).shape;
        let op = rest.iter().find_map(|s| match s {
            Stmt::Let(t, op) if *t == tile => Some(op),
            _ => None,
        });
        let Some(op) = op else {
            // Defined before the product, or by a loop after it.
            let later = all.iter().any(|s| match s {
                Stmt::For(f) => f.results.contains(&tile) || defined_in(&f.body, tile),
                Stmt::If(i) => i.results.contains(&tile),
                _ => false,
            });
            return (!later).then(|| vec![None; shape.len()]);
        };
        if self.materialise[tile.index()] {
            return None;
        }
        match op {
            TileOp::Full(_) | TileOp::Load { .. } | TileOp::Iota { .. } | TileOp::Random { .. } => {
                Some(vec![None; shape.len()])
            }
            TileOp::Gather { rows, .. } => {
                self.axes_of(rest, *rows, result, all)?;
                Some(vec![None; shape.len()])
            }
            TileOp::Map { args, .. } => {
                let mut axes = vec![None; shape.len()];
                for arg in args {
                    let inner = self.axes_of(rest, arg.tile, result, all)?;
                    for (a, &to) in inner.iter().zip(&arg.along) {
                        match (a, &mut axes[to]) {
                            (None, _) => {}
                            (Some(x), slot @ None) => *slot = Some(*x),
                            (Some(x), Some(y)) if x == y => {}
                            _ => return None,
                        }
                    }
                }
                self.all_axes(axes, shape, args.iter().map(|a| a.tile), rest, result)
            }
            TileOp::Broadcast(o) => {
                let inner = self.axes_of(rest, o.tile, result, all)?;
                let mut axes = vec![None; shape.len()];
                for (a, &to) in inner.iter().zip(&o.along) {
                    axes[to] = *a;
                }
                self.all_axes(axes, shape, [o.tile].into_iter(), rest, result)
            }
            TileOp::Permute { x, perm } => {
                let inner = self.axes_of(rest, *x, result, all)?;
                Some(perm.iter().map(|&p| inner[p]).collect())
            }
            TileOp::Reshape(x) => {
                let inner = self.axes_of(rest, *x, result, all)?;
                let from = &self.k.ty(*x).shape;
                let kept: Vec<usize> = (0..from.len()).filter(|&i| !from[i].is(1)).collect();
                let to: Vec<usize> = (0..shape.len()).filter(|&i| !shape[i].is(1)).collect();
                let same = kept.len() == to.len()
                    && kept.iter().zip(&to).all(|(&a, &b)| from[a] == shape[b]);
                if !same {
                    return inner.iter().all(Option::is_none).then(|| vec![None; shape.len()]);
                }
                let mut axes = vec![None; shape.len()];
                for (&a, &b) in kept.iter().zip(&to) {
                    axes[b] = inner[a];
                }
                Some(axes)
            }
            _ => None,
        }
    }

    /// A map over the product must not repeat it along further axes.
    fn all_axes(
        &self,
        axes: Vec<Option<usize>>,
        shape: &[Dim],
        mut args: impl Iterator<Item = TileId>,
        _rest: &'a [Stmt],
        _result: TileId,
    ) -> Option<Vec<Option<usize>>> {
        let _ = args.next();
        let reads = axes.iter().any(Option::is_some);
        let repeated = axes.iter().zip(shape).any(|(a, s)| a.is_none() && !s.is(1));
        // An axis of the product of extent 1 may be missing.
        if reads && repeated { None } else { Some(axes) }
    }

    fn branch(&mut self, i: &'a If) -> Result<()> {
        let (l, r) = (self.dim(&i.lhs), self.dim(&i.rhs));
        let cc = match i.compare {
            Compare::Lt => "slt",
            Compare::Le => "sle",
            Compare::Eq => "eq",
            Compare::Ne => "ne",
        };
        let mut bufs = Vec::new();
        for r in &i.results {
            let shape = self.extents(*r)?;
            bufs.push(match self.need[r.index()] {
                Some(_) => Some(self.new_buffer(self.k.ty(*r).dtype.size_aligned(), &shape)),
                None => None,
            });
        }
        let cond = self.c.t.ins(format_args!("icmp {cc} i64 {l}, {r}"));
        let (yes, no, end) = (self.c.t.label(), self.c.t.label(), self.c.t.label());
        self.c.t.br_if(&cond, &yes, &no);
        for (label, block, yields) in
            [(&yes, &i.then, &i.then_yields), (&no, &i.otherwise, &i.otherwise_yields)]
        {
            self.c.t.place(label);
            self.push_scope();
            let mark = self.scratch_mark();
            self.block(&block.stmts, &[])?;
            for (y, buf) in yields.iter().zip(&bufs) {
                if let Some(buf) = buf {
                    let counts = self.need_of(*y);
                    self.fill_buffer(buf, *y, &counts)?;
                    self.forget_values();
                }
            }
            self.scratch_release(mark);
            self.pop_scope();
            self.c.t.br(&end);
        }
        self.c.t.place(&end);
        for (r, buf) in i.results.iter().zip(bufs) {
            if let Some(buf) = buf {
                self.loc[r.index()] = Loc::Buffer(buf);
            }
        }
        Ok(())
    }

    fn atomic_add(
        &mut self,
        param: tilewright_tile::ParamId,
        index: &[Dim],
        value: TileId,
    ) -> Result<()> {
        let dtype = self.k.params[param].dtype;
        let elem = crate::ops::mem_elem(dtype);
        let native = match dtype.class() {
            tilewright_base::Class::Float => matches!(elem, "float" | "double"),
            _ => dtype.bits() >= 8,
        };
        if !native {
            return Err(Error::unsupported(format!("atomic_add on {dtype}")));
        }
        let counts = self.need_of(value);
        let base = vec![Dim::new(0); counts.len()];
        self.nest(&base, &counts, None, 1, &mut |e, coords| {
            let v = e.eval(value, coords)?;
            let global: Vec<Dim> = index.iter().zip(coords).map(|(i, c)| i + c).collect();
            let place = e.param_place(param, &global);
            e.atomic(&place, &v)
        })
    }
}

/// The element type that scratch memory holds for a tile's type.
pub(crate) trait ScratchType {
    /// Four-bit integers are kept one per byte.
    fn size_aligned(self) -> tilewright_base::DType;
}

impl ScratchType for tilewright_base::DType {
    fn size_aligned(self) -> tilewright_base::DType {
        use tilewright_base::DType;
        match self {
            DType::I4 => DType::I8,
            DType::U4 => DType::U8,
            other => other,
        }
    }
}
