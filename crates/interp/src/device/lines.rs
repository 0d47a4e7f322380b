//! Steps of threads that are spread in lines.

use super::machine::{Machine, Progress};
use super::memory::{Kind, zeros};
use super::values::{View, along, combine, convert, set, value_at};
use crate::tile::{beats, identity};
use crate::value::Buf;
use tilewright_base::{Error, Result};
use tilewright_device::{Extent, FragRef, LineStep, Program, ShelfId, Spread, Stmt};
use tilewright_expr::Value;
use tilewright_tile::ReduceKind;

/// What an instance's threads have on shelves, and which of it has come.
#[derive(Debug)]
pub(super) struct Shelves {
    /// Per shelf and slot: the group that its latest contents came with, and these.
    slots: Vec<Vec<(u32, Option<Buf>)>>,
    committed: u32,
    complete: u32,
}

impl Shelves {
    pub(super) fn new(program: &Program) -> Shelves {
        let empty = |slots: u32| (0..slots).map(|_| (0, None)).collect();
        let slots = program.shelves.iter().map(|(_, s)| empty(s.slots)).collect();
        Shelves { slots, committed: 0, complete: 0 }
    }

    pub(super) fn commit(&mut self) {
        self.committed += 1;
    }

    pub(super) fn wait(&mut self, pending: u32) {
        self.complete = self.complete.max(self.committed.saturating_sub(pending));
    }

    fn fetch(
        &mut self,
        shelf: ShelfId,
        slot: i64,
        data: Option<Buf>,
    ) -> std::result::Result<(), &'static str> {
        let (group, complete) = (self.committed + 1, self.complete);
        let slot = usize::try_from(slot).ok().and_then(|s| self.slots[shelf.index()].get_mut(s));
        let slot = slot.ok_or("uses a slot that the shelf does not have")?;
        if slot.0 > complete {
            return Err("fetches into a slot whose last fetch may be under way");
        }
        *slot = (group, data);
        Ok(())
    }

    fn recall(&self, shelf: ShelfId, slot: i64) -> std::result::Result<Option<&Buf>, &'static str> {
        let slot = usize::try_from(slot).ok().and_then(|s| self.slots[shelf.index()].get(s));
        match slot {
            None => Err("uses a slot that the shelf does not have"),
            Some((0, _)) => Err("recalls a slot that nothing was fetched to"),
            Some((group, _)) if *group > self.complete => {
                Err("recalls a slot whose fetch may be under way")
            }
            Some((_, data)) => Ok(data.as_ref()),
        }
    }
}

impl<'p> Machine<'p, '_> {
    /// A step of lines; those that meet are in `step.rs`.
    pub(super) fn line_step(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        step: &'p LineStep,
    ) -> Result<()> {
        match step {
            LineStep::Pick { dst, param, at, axes, steps, rows, fill, .. } => {
                let at = self.dims(agent, stmt, at)?;
                let picked = match rows {
                    Some((axis, rows)) => Some((*axis, self.reg_read(agent, stmt, rows)?)),
                    None => None,
                };
                let view = self.reg_write(agent, stmt, dst)?;
                self.grid_waited(agent, stmt, *param)?;
                if self.buffers.is_none() {
                    return Ok(());
                }
                let picked = picked.map(|(axis, v)| (axis, v, self.reg_get(agent, v)));
                let mapping = self.mapping(dst, view, &at, *axes);
                let (component, stamp) = self.agents[agent].clocks.stamp(false);
                let access = self.access(agent, stmt, component, stamp, Kind::Read);
                let dtype = self.program.params[*param].dtype;
                let (rows, cols) = (view.rect.rows(), view.rect.cols());
                let mut out = zeros(dtype, rows * cols);
                for i in 0..rows * cols {
                    let (r, c) = (i / cols, i % cols);
                    let far = |n: usize, step: i64| n as i64 * step;
                    let mut place = at.clone();
                    for (axis, by) in [(axes.0, far(r, steps.0)), (axes.1, far(c, steps.1))] {
                        if let Some(x) = axis.and_then(|a| place.get_mut(a)) {
                            *x += by;
                        }
                    }
                    if let Some((axis, from, Some(data))) = &picked {
                        let Value::Int(by) = value_at(data, spread_index(*from, r, c)) else {
                            return Err(Error::bug("picked coordinates are integers"));
                        };
                        place[*axis] = place[*axis].wrapping_add(by);
                    }
                    let value = self.element_read(*param, &place, *fill, access, mapping)?;
                    set(&mut out, i, value);
                }
                let to = self.program.frags[dst.frag].dtype;
                self.reg_put(agent, view, convert(out, dtype, to, self.options.mode));
            }
            LineStep::Turn { dst, param, at, axes, fill, .. } => {
                let at = self.dims(agent, stmt, at)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let shape = (view.rect.rows(), view.rect.cols());
                let axes = (Some(axes.0), Some(axes.1));
                let mapping = self.mapping(dst, view, &at, axes);
                let data =
                    self.global_read(agent, stmt, *param, (&at, axes), shape, *fill, mapping)?;
                if let Some(data) = data {
                    let from = self.program.params[*param].dtype;
                    let to = self.program.frags[dst.frag].dtype;
                    self.reg_put(agent, view, convert(data, from, to, self.options.mode));
                }
            }
            LineStep::Fetch { to, param, at, axes, fill } => {
                let at = self.dims(agent, stmt, at)?;
                let slot = self.dim(agent, stmt, &to.slot)?;
                let shelf = &self.program.shelves[to.shelf];
                let shape = (shelf.rows, shelf.cols, shelf.spread, Extent::Tile);
                let mapping = self.mapping_of(shape, 0, &at, *axes);
                let shape = (shelf.rows as usize, shelf.cols as usize);
                let data =
                    self.global_read(agent, stmt, *param, (&at, *axes), shape, *fill, mapping)?;
                if let Err(what) = self.agents[agent].shelves.fetch(to.shelf, slot, data) {
                    return Err(self.fail(agent, stmt, what));
                }
            }
            LineStep::Recall { dst, from } => {
                let slot = self.dim(agent, stmt, &from.slot)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let data = match self.agents[agent].shelves.recall(from.shelf, slot) {
                    Ok(data) => data.cloned(),
                    Err(what) => return Err(self.fail(agent, stmt, what)),
                };
                if let Some(data) = data {
                    self.reg_put(agent, view, data);
                }
            }
            LineStep::Unpack { dst, src } => {
                let from = self.reg_read(agent, stmt, src)?;
                let view = self.reg_write(agent, stmt, dst)?;
                if let Some(data) = self.reg_get(agent, from) {
                    self.reg_put(agent, view, data);
                }
            }
            LineStep::ArgReduce { dst, kind, src, limit, last } => {
                let limit = self.dim(agent, stmt, limit)?;
                let from = self.reg_read(agent, stmt, src)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let Some(data) = self.reg_get(agent, from) else { return Ok(()) };
                let cols = from.rect.cols();
                let count = limit.clamp(0, cols as i64) as usize;
                let best = |r: usize| {
                    let value = |c: usize| value_at(&data, r * cols + c);
                    (1..count).fold(0, |best, c| {
                        let (new, old) = (value(c), value(best));
                        let wins = beats(*kind, new, old) || (*last && !beats(*kind, old, new));
                        if wins { c } else { best }
                    })
                };
                let found = (0..from.rect.rows()).map(|r| best(r) as i64).collect();
                self.reg_put(agent, view, Buf::I(found));
            }
            LineStep::Scan { dst, kind, src, exclusive, reverse } => {
                let from = self.reg_read(agent, stmt, src)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let Some(data) = self.reg_get(agent, from) else { return Ok(()) };
                let dtype = self.program.frags[dst.frag].dtype;
                let (rows, cols) = (from.rect.rows(), from.rect.cols());
                let mut out = zeros(dtype, rows * cols);
                for r in 0..rows {
                    let mut total = identity(*kind, dtype);
                    for step in 0..cols {
                        let c = if *reverse { cols - 1 - step } else { step };
                        let here = value_at(&data, r * cols + c);
                        let next = combine(*kind, dtype, self.options.mode, total, here);
                        set(&mut out, r * cols + c, if *exclusive { total } else { next });
                        total = next;
                    }
                }
                self.reg_put(agent, view, out);
            }
            LineStep::Random { dst, seed, start, steps } => {
                let start = self.dim(agent, stmt, start)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let dtype = self.program.frags[dst.frag].dtype;
                let (rows, cols) = (view.rect.rows(), view.rect.cols());
                let mut out = Vec::with_capacity(rows * cols);
                for i in 0..rows * cols {
                    let far = (i / cols) as i64 * steps.0 + (i % cols) as i64 * steps.1;
                    let counter = start.wrapping_add(far) as u64;
                    out.push(crate::ops::random::element(dtype, *seed, counter)?);
                }
                self.reg_put(agent, view, Buf::F(out));
            }
            LineStep::Add { param, at, axes, src } => {
                let at = self.dims(agent, stmt, at)?;
                let view = self.reg_read(agent, stmt, src)?;
                let mapping = self.mapping(src, view, &at, *axes);
                let (component, stamp) = self.agents[agent].clocks.stamp(false);
                let access = self.access(agent, stmt, component, stamp, Kind::Add);
                let data = self.reg_get(agent, view);
                let cols = view.rect.cols();
                let mut here = at.clone();
                for i in 0..view.rect.rows() * cols {
                    along(&mut here, &at, *axes, i / cols, i % cols);
                    let value = data.as_ref().map(|d| value_at(d, i));
                    self.element_write(*param, &here, access, mapping, value)?;
                }
            }
            LineStep::Prefetch { param, at, bytes, .. } => {
                // No values: only that lines are as long as it says.
                self.dims(agent, stmt, at)?;
                let p = &self.program.params[*param];
                let extent = p.layout.axes.last().and_then(|a| a.extent.as_const());
                let line = extent.and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
                if p.dtype.bytes_for(line).is_none_or(|have| have < *bytes as usize) {
                    return Err(self.fail(agent, stmt, "asks for more than a line has"));
                }
            }
            LineStep::Dot { acc, a, b } => {
                let [a, b] = [self.reg_read(agent, stmt, a)?, self.reg_read(agent, stmt, b)?];
                let before = self.reg_read(agent, stmt, acc)?;
                let view = self.reg_write(agent, stmt, acc)?;
                let Some(Buf::I(mut sums)) = self.reg_get(agent, before) else { return Ok(()) };
                let (rows, cols) = (view.rect.rows(), view.rect.cols());
                let [a, b] = [a, b].map(|v| self.stretched(agent, v, rows, cols));
                let (Buf::I(a), Buf::I(b)) = (a, b) else { return Ok(()) };
                for (i, (x, y)) in a.iter().zip(&b).enumerate() {
                    // Sums of i32 wrap.
                    let first = i / cols * cols + i % cols / 4 * 4;
                    sums[first] = i64::from((sums[first] + x * y) as i32);
                }
                self.reg_put(agent, view, Buf::I(sums));
            }
            LineStep::TopK { x, values, places, row, count, largest, lanes, .. } => {
                let (row, rows) = (self.dim(agent, stmt, row)?, self.program.threads / lanes);
                self.grid_waited(agent, stmt, *x)?;
                let axes = &self.program.params[*x].layout.axes;
                let all = self.dim(agent, stmt, &axes[0].extent)?;
                let cols = self.dim(agent, stmt, &axes[1].extent)?;
                if cols < i64::from(*count) {
                    return Err(self.fail(agent, stmt, "finds more elements than a row has"));
                }
                let threads = self.program.threads;
                let spread = Spread::Lines { lanes: *lanes, vector: 1, threads };
                let shape = (rows, *count, spread, Extent::Tile);
                let mapping = self.mapping_of(shape, 0, &[row, 0], (Some(0), Some(1)));
                let (component, stamp) = self.agents[agent].clocks.stamp(false);
                let access =
                    |machine: &Self, kind| machine.access(agent, stmt, component, stamp, kind);
                let (read, write) = (access(self, Kind::Read), access(self, Kind::Write));
                for r in row..all.min(row + i64::from(rows)) {
                    let mut found = Vec::new();
                    for col in 0..cols {
                        let fill = Value::Float(0.0);
                        let Value::Float(v) =
                            self.element_read(*x, &[r, col], fill, read, mapping)?
                        else {
                            return Err(Error::bug("the largest of what is no float"));
                        };
                        found.push((v, col));
                    }
                    // Stable: of equal elements the first stays first.
                    found.sort_by(|(a, _), (b, _)| {
                        let order = a.partial_cmp(b).unwrap_or(a.is_nan().cmp(&b.is_nan()));
                        if *largest { order.reverse() } else { order }
                    });
                    for (i, (v, col)) in found.into_iter().take(*count as usize).enumerate() {
                        let at = [r, i as i64];
                        let known = self.buffers.is_some();
                        let value = known.then_some(Value::Float(v));
                        self.element_write(*values, &at, write, mapping, value)?;
                        let place = known.then_some(Value::Int(col));
                        self.element_write(*places, &at, write, mapping, place)?;
                    }
                }
            }
            LineStep::AcrossCluster { .. } => {
                return Err(Error::bug("a meeting among plain steps"));
            }
        }
        Ok(())
    }

    /// Combines a fragment over the blocks of the cluster; whoever comes last computes.
    pub(super) fn across_cluster(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        frag: &FragRef,
        kind: ReduceKind,
    ) -> Result<Progress> {
        let view = self.reg_read(agent, stmt, frag)?;
        self.reg_write(agent, stmt, frag)?;
        self.brought.push((agent, view));
        let progress = self.meet(agent, stmt)?;
        if self.everyone.got == 0 {
            let mut brought = std::mem::take(&mut self.brought);
            brought.sort_by_key(|(agent, _)| self.agents[*agent].block);
            self.combine_brought(&brought, kind);
        }
        Ok(progress)
    }

    fn combine_brought(&mut self, brought: &[(usize, View)], kind: ReduceKind) {
        let Some((first, view)) = brought.first().copied() else { return };
        let dtype = self.program.frags.iter().nth(view.frag).map(|(_, f)| f.dtype);
        let (Some(mut total), Some(dtype)) = (self.reg_get(first, view), dtype) else { return };
        for (agent, view) in &brought[1..] {
            let Some(other) = self.reg_get(*agent, *view) else { return };
            for i in 0..view.rect.rows() * view.rect.cols() {
                let (a, b) = (value_at(&total, i), value_at(&other, i));
                set(&mut total, i, combine(kind, dtype, self.options.mode, a, b));
            }
        }
        for (agent, view) in brought {
            self.reg_put(*agent, *view, total.clone());
        }
    }
}

/// Where a fragment that may lack an axis has the value for a row and column.
fn spread_index(view: View, row: usize, col: usize) -> usize {
    let (rows, cols) = (view.rect.rows(), view.rect.cols());
    (if rows == 1 { 0 } else { row }) * cols + if cols == 1 { 0 } else { col }
}
