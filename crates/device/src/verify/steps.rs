//! Rules about single steps.

use super::Checker;
use crate::ir::*;
use crate::lines::{LineStep, Shelf, ShelfRef};
use tilewright_base::DType;
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{Access, ParamId};

impl Checker<'_> {
    /// Whether a sum is a multiple of `n` whatever its symbols are.
    pub(super) fn multiple(&self, dim: &Dim, n: u32) -> bool {
        self.put_in(dim).terms().iter().all(|(_, c)| c % i64::from(n.max(1)) == 0)
    }

    fn slot(&mut self, stmt: &Stmt, slot: &Slot, slots: u32) {
        match slot {
            Slot::Ring(ring) | Slot::Before(ring) => match self.program.rings.get(*ring) {
                Some(r) => {
                    let fits = r.stages <= slots;
                    self.step(stmt, fits, "the ring has more stages than there are slots");
                }
                None => self.step(stmt, false, "the ring does not exist"),
            },
            Slot::At(at) => {
                self.known(stmt, at);
                let inside =
                    self.put_in(at).as_const().is_none_or(|x| (0..slots.into()).contains(&x));
                self.step(stmt, inside, "the slot does not exist");
            }
        }
    }

    fn barrier(&mut self, stmt: &Stmt, barrier: &BarrierRef) {
        match self.program.barriers.get(barrier.barrier) {
            Some(b) => self.slot(stmt, &barrier.slot, b.slots),
            None => self.step(stmt, false, "the barrier does not exist"),
        }
    }

    fn reach(&mut self, stmt: &Stmt, reach: &Reach) {
        if let Reach::Cta(cta) = reach {
            self.known(stmt, cta);
            let most = i64::from(self.program.cluster);
            let inside = self.put_in(cta).as_const().is_none_or(|x| (0..most).contains(&x));
            self.step(stmt, inside, "the cluster has no such block");
        }
        if let Reach::Row(width) | Reach::Column(width) | Reach::Cross(width) = reach {
            let whole = *width > 0 && self.program.cluster.is_multiple_of(*width);
            self.step(stmt, whole, "the cluster has no whole rows of that width");
        }
    }

    /// Checks a tile of shared memory; whether its buffer exists.
    pub(super) fn tile(&mut self, stmt: &Stmt, tile: &SmemTile) -> bool {
        let Some(smem) = self.program.smem.get(tile.smem) else {
            self.step(stmt, false, "the buffer does not exist");
            return false;
        };
        self.slot(stmt, &tile.slot, smem.slots);
        for (at, n, of) in [(&tile.row, tile.rows, smem.rows), (&tile.col, tile.cols, smem.cols)] {
            self.known(stmt, at);
            let at = self.put_in(at).as_const().unwrap_or(0);
            let inside = at >= 0 && at.saturating_add(n.into()) <= of.into() && n > 0;
            self.step(stmt, inside, "the tile is not inside of its buffer");
        }
        true
    }

    /// Checks a range of a fragment; its rows and columns.
    pub(super) fn frag(&mut self, stmt: &Stmt, frag: &FragRef) -> Option<(u32, u32)> {
        let Some(f) = self.program.frags.get(frag.frag) else {
            self.step(stmt, false, "the fragment does not exist");
            return None;
        };
        self.known(stmt, &frag.col);
        let Some(col) = self.put_in(&frag.col).as_const() else {
            self.step(stmt, false, "the first column is not a number once loops are unrolled");
            return None;
        };
        let rows = if f.extent == Extent::PerCol { 1 } else { f.rows };
        let width = i64::from(if f.extent == Extent::PerRow { 1 } else { f.cols });
        let cols = frag.cols.map_or(width - col, i64::from);
        if col < 0 || cols < 1 || col.saturating_add(cols) > width {
            self.step(stmt, false, "the columns are not inside of the fragment");
            return None;
        }
        if let Some(role) = self.role {
            let threads = match f.spread {
                Spread::Wgmma => 128,
                Spread::MmaSync { warps_m, warps_n } => warps_m * warps_n * 32,
                Spread::Lines { threads, .. } => threads,
                Spread::Outer { threads_m, threads_n, .. } => threads_m * threads_n,
            };
            let fits = threads == role.warps * 32;
            self.step(stmt, fits, "the fragment is not spread over the threads of the role");
        }
        Some((rows, cols as u32))
    }

    fn solo_step(&mut self, stmt: &Stmt) {
        self.step(stmt, self.solo(), "belongs to one thread");
    }

    fn shared_step(&mut self, stmt: &Stmt) {
        let all = !self.solo() && self.whole;
        self.step(stmt, all, "belongs to all threads of the instance");
    }

    fn same(&mut self, stmt: &Stmt, a: Option<(u32, u32)>, b: Option<(u32, u32)>, what: &str) {
        if let (Some(a), Some(b)) = (a, b) {
            self.step(stmt, a == b, what);
        }
    }

    fn value(&mut self, stmt: &Stmt, dtype: DType, value: Value) {
        let fits = dtype.is_float() == matches!(value, Value::Float(_));
        self.step(stmt, fits, "the constant is not of the element type");
    }

    fn coordinates(&mut self, stmt: &Stmt, param: ParamId, at: &[Dim]) -> bool {
        self.coordinates_and(stmt, param, at, 0)
    }

    /// As many coordinates as the tensor has axes, and `more`.
    fn coordinates_and(&mut self, stmt: &Stmt, param: ParamId, at: &[Dim], more: usize) -> bool {
        at.iter().for_each(|d| self.known(stmt, d));
        if !self.has_param(stmt, param) {
            return false;
        }
        let rank = at.len() == self.program.params[param].layout.rank() + more;
        self.step(stmt, rank, "one coordinate per axis of the tensor");
        rank
    }

    /// A copy between a tensor map's box and a tile.
    fn boxed(&mut self, stmt: &Stmt, map: MapId, at: &[Dim], tile: &SmemTile) {
        let Some(m) = self.program.maps.get(map) else {
            self.step(stmt, false, "the tensor map does not exist");
            return;
        };
        let taps = if m.windows.is_some() { 2 } else { 0 };
        if !self.coordinates_and(stmt, m.param, at, taps) || !self.tile(stmt, tile) {
            return;
        }
        let (param, smem) = (&self.program.params[m.param], &self.program.smem[tile.smem]);
        self.step(stmt, param.dtype == smem.dtype, "the element types differ");
        self.step(stmt, m.swizzle == smem.swizzle, "the swizzles differ");
        let Some(&inner) = m.box_shape.get(m.contiguous) else { return };
        let lines =
            m.box_shape.iter().map(|&e| u64::from(e)).product::<u64>() / u64::from(inner.max(1));
        let (along, across, at_along, at_across) = match smem.contiguous {
            1 => (tile.cols, tile.rows, &tile.col, &tile.row),
            _ => (tile.rows, tile.cols, &tile.row, &tile.col),
        };
        let one_box = inner == along && lines == u64::from(across);
        self.step(stmt, one_box, "the tile is not one box of the map");
        let span = m.swizzle.span_bytes() * 8 / smem.dtype.bits();
        self.step(stmt, self.multiple(at_along, span), "the tile does not start at a whole panel");
        let group = if m.swizzle == Swizzle::None { 1 } else { 8 };
        let grouped = self.multiple(at_across, group);
        self.step(stmt, grouped, "the tile does not start at a whole group of 8 lines");
    }

    /// Announced bytes against the copies that stand in the same run of steps.
    pub(super) fn announced_bytes(&mut self, block: &[Stmt]) {
        for stmt in block {
            let Stmt::ExpectBytes { barrier, bytes } = stmt else { continue };
            let announcements =
                |s: &&Stmt| matches!(s, Stmt::ExpectBytes { barrier: b, .. } if b == barrier);
            let moves = block.iter().filter(|s| matches!(s, Stmt::Advance { .. })).count();
            if block.iter().filter(announcements).count() != 1 || moves > 1 {
                continue;
            }
            if let Some(sum) = self.copied(block, barrier).filter(|&sum| sum > 0) {
                let what = format!("the copies of this phase bring {sum} bytes");
                self.step(stmt, sum == u64::from(*bytes), &what);
            }
        }
    }

    /// Bytes that the copies of a run of steps bring to this block; `None` when it depends.
    fn copied(&self, block: &[Stmt], of: &BarrierRef) -> Option<u64> {
        let mut sum = 0u64;
        for stmt in block {
            match stmt {
                Stmt::TmaLoad { to, barrier, reach, .. } if barrier == of => {
                    let bits = self.program.smem.get(to.smem)?.dtype.bits();
                    let bytes = u64::from(to.rows) * u64::from(to.cols) * u64::from(bits) / 8;
                    // A copy to other blocks is one of each of them.
                    sum += bytes * u64::from(reach.blocks(self.program.cluster));
                }
                Stmt::Unroll { body, count, .. } => {
                    sum += self.copied(body, of)? * u64::from(*count);
                }
                Stmt::Once(body) => sum += self.copied(body, of)?,
                Stmt::For { body, .. } if self.copied(body, of) != Some(0) => return None,
                Stmt::If { then, otherwise, .. }
                    if [then, otherwise].iter().any(|b| self.copied(b, of) != Some(0)) =>
                {
                    return None;
                }
                _ => {}
            }
        }
        Some(sum)
    }

    pub(super) fn simple(&mut self, stmt: &Stmt) {
        match stmt {
            Stmt::Let { .. }
            | Stmt::For { .. }
            | Stmt::Unroll { .. }
            | Stmt::If { .. }
            | Stmt::Once(_)
            | Stmt::BarrierInit
            | Stmt::FenceBarrierInit
            | Stmt::FenceAsync
            | Stmt::CopyCommit
            | Stmt::CopyWait { .. }
            | Stmt::GridWait
            | Stmt::GridRelease => {}
            Stmt::SyncBlock
            | Stmt::SyncCluster
            | Stmt::WgmmaFence
            | Stmt::WgmmaCommit
            | Stmt::WgmmaWait { .. } => self.shared_step(stmt),
            Stmt::TmaCommit | Stmt::TmaWait { .. } => self.solo_step(stmt),
            Stmt::NamedSync { id, threads } | Stmt::NamedArrive { id, threads } => {
                self.shared_step(stmt);
                self.known(stmt, id);
                let number = self.put_in(id).as_const();
                let legal = number.is_none_or(|id| (1..=15).contains(&id));
                self.step(stmt, legal, "hardware barriers are 1 to 15");
                let whole = threads % 32 == 0 && (32..=self.program.threads).contains(threads);
                self.step(stmt, whole, "not whole warps of the block");
            }
            Stmt::Wait { barrier, phase } => {
                self.barrier(stmt, barrier);
                match phase {
                    Phase::Of(ring) | Phase::Before(ring) => {
                        let exists = self.program.rings.get(*ring).is_some();
                        self.step(stmt, exists, "the ring does not exist");
                        let same = barrier.slot == Slot::Ring(*ring);
                        self.step(stmt, same, "the phase is not that of the barrier's slot");
                    }
                    Phase::Parity(parity) => self.known(stmt, parity),
                }
            }
            Stmt::Arrive { barrier, reach } => {
                self.barrier(stmt, barrier);
                self.reach(stmt, reach);
            }
            Stmt::ExpectBytes { barrier, bytes } => {
                self.barrier(stmt, barrier);
                let legal = (1..1 << 20).contains(bytes);
                self.step(stmt, legal, "a phase takes 1 to 2^20 - 1 bytes");
            }
            Stmt::Advance { ring, by } => {
                self.known(stmt, by);
                let exists = self.program.rings.get(*ring).is_some();
                self.step(stmt, exists, "the ring does not exist");
                let all = !self.once && self.whole;
                self.step(stmt, all, "moves the ring of some threads only");
            }
            Stmt::TmaLoad { map, at, to, barrier, reach, .. } => {
                self.solo_step(stmt);
                self.boxed(stmt, *map, at, to);
                self.barrier(stmt, barrier);
                self.reach(stmt, reach);
                let legal = !matches!(reach, Reach::Cta(_) | Reach::Cross(_));
                self.step(stmt, legal, "a copy reaches its own block, a row, a column or all");
            }
            Stmt::TmaStore { map, at, from, .. } => {
                self.solo_step(stmt);
                let plain = self.program.maps.get(*map).is_none_or(|m| m.windows.is_none());
                self.step(stmt, plain, "windows are only read");
                self.boxed(stmt, *map, at, from);
                self.writes(stmt, self.program.maps.get(*map).map(|m| m.param));
            }
            Stmt::CopyIn { param, at, axes, to, vector, .. } => {
                if self.coordinates(stmt, *param, at) && self.tile(stmt, to) {
                    let p = &self.program.params[*param];
                    let two = axes.0 != axes.1 && axes.0.max(axes.1) < at.len();
                    self.step(stmt, two, "rows and columns are two axes of the tensor");
                    let same = p.dtype == self.program.smem[to.smem].dtype;
                    self.step(stmt, same, "the element types differ");
                }
                self.step(stmt, *vector >= 1, "accesses of no elements");
            }
            Stmt::Wgmma { acc, a, b, turned, zero_if } => {
                self.shared_step(stmt);
                if let Some(cond) = zero_if {
                    self.known(stmt, &cond.lhs);
                    self.known(stmt, &cond.rhs);
                }
                self.wgmma(stmt, acc, a, b, *turned);
            }
            Stmt::Mma { acc, a, b, split } => {
                self.shared_step(stmt);
                let left = match a {
                    WgmmaA::Smem(tile) if self.tile(stmt, tile) => {
                        Some((tile.rows, tile.cols, self.program.smem[tile.smem].dtype))
                    }
                    WgmmaA::Frag(frag) => self
                        .frag(stmt, frag)
                        .map(|(rows, cols)| (rows, cols, self.program.frags[frag.frag].dtype)),
                    WgmmaA::Smem(_) => None,
                };
                if let (Some((rows, cols)), Some((left_rows, depth, dtype)), true) =
                    (self.frag(stmt, acc), left, self.tile(stmt, b))
                {
                    let fits = (left_rows, b.cols, depth) == (rows, cols, b.rows);
                    self.step(stmt, fits, "the operands' extents do not agree");
                    let spread = self.program.frags[acc.frag].spread;
                    let fits = matches!(spread, Spread::MmaSync { .. } | Spread::Outer { .. });
                    self.step(stmt, fits, "accumulators are not spread for mma.sync or plain sums");
                    let same = dtype == self.program.smem[b.smem].dtype
                        && dtype.is_float() == self.program.frags[acc.frag].dtype.is_float();
                    self.step(stmt, same, "the operands' element types do not agree");
                    if let WgmmaA::Frag(frag) = a {
                        let own = self.program.frags[frag.frag].spread == spread
                            && matches!(spread, Spread::MmaSync { warps_n: 1, .. });
                        let bits = matches!(dtype.bits(), 16 | 32);
                        self.step(
                            stmt,
                            own && bits,
                            "a left operand in registers has 16 or 32 bits and warps along rows",
                        );
                    }
                    let three = dtype == DType::F32 && matches!(spread, Spread::MmaSync { .. });
                    self.step(stmt, !split || three, "only tensor cores take f32 in two parts");
                }
            }
            _ => self.registers(stmt),
        }
    }

    fn writes(&mut self, stmt: &Stmt, param: Option<ParamId>) {
        if let Some(p) = param.and_then(|p| self.program.params.get(p)) {
            self.step(stmt, p.access != Access::In, "the tensor is only read");
        }
    }

    /// Steps on fragments.
    fn registers(&mut self, stmt: &Stmt) {
        self.shared_step(stmt);
        self.step(stmt, self.role.is_some(), "fragments belong to roles");
        let p = self.program;
        match stmt {
            Stmt::Fill { dst, value } => {
                let Some(_) = self.frag(stmt, dst) else { return };
                self.value(stmt, p.frags[dst.frag].dtype, *value);
            }
            Stmt::Map { dst, func, args } => {
                let Some((rows, cols)) = self.frag(stmt, dst) else { return };
                let to = &p.frags[dst.frag];
                self.step(stmt, func.dtype() == to.dtype, "the result is not of the element type");
                if args.len() != func.params().len() {
                    self.step(stmt, false, "one operand per parameter");
                    return;
                }
                for (arg, param) in args.iter().zip(func.params()) {
                    let Some((r, c)) = self.frag(stmt, arg) else { continue };
                    let from = &p.frags[arg.frag];
                    self.step(stmt, from.dtype == param.dtype, "an operand's element type differs");
                    self.step(stmt, from.spread == to.spread, "an operand's spread differs");
                    let fits = match from.extent {
                        Extent::Tile => (r, c) == (rows, cols),
                        Extent::PerRow => r == rows,
                        Extent::PerCol => c == cols,
                    };
                    self.step(stmt, fits, "an operand's extents differ");
                }
            }
            Stmt::Iota { dst, axis, start } => {
                self.known(stmt, start);
                self.frag(stmt, dst);
                self.step(stmt, *axis < 2, "an axis is 0 or 1");
            }
            Stmt::Reduce { dst, kind: _, src, .. } => {
                let (to, from) = (self.frag(stmt, dst), self.frag(stmt, src));
                let (Some(to), Some(from)) = (to, from) else { return };
                let (d, s) = (&p.frags[dst.frag], &p.frags[src.frag]);
                let fits = match d.extent {
                    Extent::Tile => false,
                    Extent::PerRow => to.0 == from.0,
                    Extent::PerCol => to.1 == from.1,
                };
                self.step(stmt, fits, "the result is not one value per row or column");
                self.step(stmt, s.extent == Extent::Tile, "the operand is not a tile");
                let same = d.dtype == s.dtype && d.spread == s.spread;
                self.step(stmt, same, "element types or spreads differ");
            }
            Stmt::Load { dst, param, at, axes, fill, vector } => {
                self.frag(stmt, dst);
                self.step(stmt, *vector >= 1, "accesses of no elements");
                if self.coordinates(stmt, *param, at) {
                    self.axes(stmt, *axes, at.len());
                    self.value(stmt, p.params[*param].dtype, *fill);
                }
            }
            Stmt::Store { param, at, axes, src, vector } => {
                self.frag(stmt, src);
                self.step(stmt, *vector >= 1, "accesses of no elements");
                if self.coordinates(stmt, *param, at) {
                    self.axes(stmt, *axes, at.len());
                    self.writes(stmt, Some(*param));
                }
            }
            Stmt::ToSmem { to, src } => {
                let extents = self.tile(stmt, to).then_some((to.rows, to.cols));
                let have = self.frag(stmt, src);
                self.same(stmt, extents, have, "the extents differ");
            }
            Stmt::FromSmem { dst, from } => {
                let extents = self.tile(stmt, from).then_some((from.rows, from.cols));
                let have = self.frag(stmt, dst);
                self.same(stmt, extents, have, "the extents differ");
            }
            Stmt::Line(step) => self.line_step(stmt, step),
            _ => {}
        }
    }

    /// The shelf that a step names.
    fn shelf(&mut self, stmt: &Stmt, of: &ShelfRef) -> Option<Shelf> {
        self.known(stmt, &of.slot);
        let shelf = self.program.shelves.get(of.shelf).cloned();
        self.step(stmt, shelf.is_some(), "the shelf does not exist");
        let (slot, slots) =
            (self.put_in(&of.slot).as_const(), shelf.as_ref().map_or(0, |s| s.slots));
        let inside = slot.is_none_or(|slot| (0..i64::from(slots)).contains(&slot));
        self.step(stmt, inside, "the shelf has no such slot");
        shelf
    }

    /// Steps of threads in lines.
    fn line_step(&mut self, stmt: &Stmt, step: &LineStep) {
        let p = self.program;
        for frag in step.reads().into_iter().chain(step.writes()) {
            if self.frag(stmt, frag).is_none() {
                return;
            }
            let lines = matches!(p.frags[frag.frag].spread, Spread::Lines { .. });
            self.step(stmt, lines, "the fragment is not spread in lines");
        }
        let (to, from) = (
            step.writes().map(|f| &p.frags[f.frag]),
            step.reads().first().map(|f| &p.frags[f.frag]),
        );
        let tile = |f: Option<&Frag>| f.is_some_and(|f| f.extent == Extent::Tile);
        match step {
            LineStep::Pick { param, at, axes, steps, rows, fill, vector, .. } => {
                if !self.coordinates(stmt, *param, at) {
                    return;
                }
                self.axes(stmt, *axes, at.len());
                self.value(stmt, p.params[*param].dtype, *fill);
                let single = steps.1 == 1 || *vector == 1;
                self.step(stmt, *vector >= 1 && single, "runs of columns that are not neighbours");
                if let (Some((axis, _)), Some(from)) = (rows, from) {
                    let free = *axis < at.len() && axes.0 != Some(*axis) && axes.1 != Some(*axis);
                    self.step(stmt, free, "the picked axis is one of rows or columns");
                    self.step(stmt, !from.dtype.is_float(), "picked coordinates are integers");
                }
            }
            LineStep::Turn { param, at, axes, fill, vector, .. } => {
                if !self.coordinates(stmt, *param, at) {
                    return;
                }
                self.axes(stmt, (Some(axes.0), Some(axes.1)), at.len());
                self.value(stmt, p.params[*param].dtype, *fill);
                self.step(stmt, tile(to), "the result is not a tile");
                self.step(stmt, *vector >= 1, "accesses of no elements");
                let all = self.role.is_some_and(|r| r.warps * 32 == p.threads);
                self.step(stmt, all, "belongs to all threads of the block");
            }
            LineStep::Fetch { to, param, at, axes, fill } => {
                if !self.coordinates(stmt, *param, at) {
                    return;
                }
                self.axes(stmt, *axes, at.len());
                self.value(stmt, p.params[*param].dtype, *fill);
                if let Some(shelf) = self.shelf(stmt, to) {
                    let same = shelf.dtype == p.params[*param].dtype;
                    self.step(stmt, same, "the element types differ");
                }
            }
            LineStep::Recall { from, .. } => {
                let Some(shelf) = self.shelf(stmt, from) else { return };
                let of_shelf = (shelf.dtype, shelf.rows, shelf.cols, shelf.spread);
                let same = to.is_some_and(|f| (f.dtype, f.rows, f.cols, f.spread) == of_shelf);
                self.step(stmt, same && tile(to), "the result is not a tile as the shelf's");
            }
            LineStep::Unpack { .. } => {
                let pairs = |f: &Frag| match f.spread {
                    Spread::Lines { vector, .. } => vector % 2 == 0 && f.dtype == DType::BF16,
                    _ => false,
                };
                let same = to.map(|f| (f.dtype, f.spread)) == from.map(|f| (f.dtype, f.spread));
                let fits = tile(from) && tile(to) && same && to.is_some_and(pairs);
                self.step(stmt, fits, "the operands are not tiles of bf16 in pairs");
            }
            LineStep::ArgReduce { limit, .. } => {
                self.known(stmt, limit);
                self.step(stmt, tile(from), "the operand is not a tile");
                let fits = to.is_some_and(|t| t.extent == Extent::PerRow && t.dtype == DType::I64);
                self.step(stmt, fits, "the result is not one i64 per row");
            }
            LineStep::Scan { .. } => {
                self.step(stmt, tile(from) && tile(to), "the operands are not tiles");
                let same = to.map(|f| (f.dtype, f.spread)) == from.map(|f| (f.dtype, f.spread));
                self.step(stmt, same, "element types or spreads differ");
            }
            LineStep::Random { start, .. } => {
                self.known(stmt, start);
                let float = to.is_some_and(|t| t.dtype.is_float());
                self.step(stmt, float, "random numbers are floats");
            }
            LineStep::Add { param, at, axes, src } => {
                if self.coordinates(stmt, *param, at) {
                    self.axes(stmt, *axes, at.len());
                    self.writes(stmt, Some(*param));
                    let same = p.params[*param].dtype == p.frags[src.frag].dtype;
                    self.step(stmt, same, "the element types differ");
                }
            }
            LineStep::Prefetch { param, at, row, rows, bytes } => {
                if self.coordinates(stmt, *param, at) {
                    let layout = &p.params[*param].layout;
                    let near = layout.axes.last().is_some_and(|a| a.stride.is(1));
                    let line = row + 1 < at.len() && near && at.last().is_some_and(|d| d.is(0));
                    self.step(stmt, line, "not whole lines of a tensor");
                    self.step(stmt, *rows > 0, "no lines");
                    self.step(stmt, *bytes > 0 && bytes % 16 == 0, "not units of 16 bytes");
                }
            }
            LineStep::Dot { a, b, .. } => {
                let fours = |f: &Frag| match f.spread {
                    Spread::Lines { vector, .. } => vector % 4 == 0,
                    _ => false,
                };
                let sums = to.is_some_and(|f| f.dtype == DType::I32 && fours(f));
                self.step(
                    stmt,
                    tile(to) && sums,
                    "the sums are not a tile of i32 in runs of fours",
                );
                let [a, b] = [a, b].map(|f| &p.frags[f.frag]);
                let bytes = a.dtype == b.dtype && matches!(a.dtype, DType::I8 | DType::U8);
                self.step(stmt, bytes, "the operands are not 8-bit integers of one type");
                let alike = |f: &Frag| {
                    f.extent != Extent::PerRow && to.is_some_and(|t| t.spread == f.spread)
                };
                self.step(stmt, alike(a) && alike(b), "the operands do not lie as the sums");
            }
            LineStep::TopK { x, values, places, row, count, lanes, vector, .. } => {
                let at = [row.clone(), Dim::new(0)];
                if ![x, values, places].iter().all(|param| self.coordinates(stmt, **param, &at)) {
                    return;
                }
                self.writes(stmt, Some(*values));
                self.writes(stmt, Some(*places));
                let types = [x, values, places].map(|param| p.params[*param].dtype);
                let known = matches!(types[0], DType::F32 | DType::F16 | DType::BF16);
                let fits = known && types[1] == types[0] && types[2] == DType::I64;
                self.step(stmt, fits, "the element types do not fit");
                let shared = *lanes == 32 || *lanes == p.threads;
                self.step(stmt, shared, "a row belongs to a warp or to the block");
                self.step(stmt, *count > 0 && *vector > 0, "nothing is found or read");
                let near = *vector == 1 || p.params[*x].layout.axes[1].stride.is(1);
                self.step(stmt, near, "runs of columns that are not neighbours");
                let all = self.role.is_some_and(|r| r.warps * 32 == p.threads);
                self.step(stmt, all, "belongs to all threads of the block");
            }
            LineStep::AcrossCluster { .. } => {
                self.step(stmt, !tile(to), "the operand is a tile");
                let all = self.role.is_some_and(|r| r.warps * 32 == p.threads);
                self.step(stmt, all, "belongs to all threads of the block");
            }
        }
    }

    fn axes(&mut self, stmt: &Stmt, axes: (Option<usize>, Option<usize>), rank: usize) {
        let inside = [axes.0, axes.1].iter().flatten().all(|&a| a < rank);
        let distinct = axes.0.is_none() || axes.0 != axes.1;
        self.step(stmt, inside && distinct, "rows and columns run along two axes of the tensor");
    }
}
