//! Control flow, barriers, the copy engine, groups: everything but values.

use super::clock::{Part, component};
use super::machine::{Agent, Copying, Frame, Machine, Meeting, Progress, Stage, Who};
use super::memory::{Access, Kind, PENDING, Proxy, Rect};
use tilewright_base::Result;
use tilewright_device::*;
use tilewright_layout::Dim;
use tilewright_tile::Compare;

/// Which meeting of threads.
#[derive(Clone, Copy, Debug)]
enum Place {
    Named(usize),
    Block,
    Cluster,
}

fn holds(compare: Compare, a: i64, b: i64) -> bool {
    match compare {
        Compare::Lt => a < b,
        Compare::Le => a <= b,
        Compare::Eq => a == b,
        Compare::Ne => a != b,
    }
}

impl<'p> Machine<'p, '_> {
    /// The value of an integer for an instance.
    pub(super) fn dim(&self, agent: usize, stmt: &Stmt, dim: &Dim) -> Result<i64> {
        if let Some(value) = dim.as_const() {
            return Ok(value);
        }
        let env = &self.agents[agent].env;
        dim.eval_with(&|name| env.iter().rev().find(|(n, _)| **n == *name).map(|e| e.1))
            .ok_or_else(|| self.fail(agent, stmt, &format!("uses `{dim}`, which has no value")))
    }

    pub(super) fn dims(&self, agent: usize, stmt: &Stmt, dims: &[Dim]) -> Result<Vec<i64>> {
        dims.iter().map(|d| self.dim(agent, stmt, d)).collect()
    }

    pub(super) fn cond(&self, agent: usize, stmt: &Stmt, cond: &Cond) -> Result<bool> {
        let (a, b) = (self.dim(agent, stmt, &cond.lhs)?, self.dim(agent, stmt, &cond.rhs)?);
        Ok(holds(cond.compare, a, b))
    }

    /// The number of a slot, below `slots`.
    pub(super) fn slot(&self, agent: usize, stmt: &Stmt, slot: &Slot, slots: u32) -> Result<usize> {
        let ring = |ring: &RingId| {
            let stages = i64::from(self.program.rings[*ring].stages);
            (self.agents[agent].rings[ring.index()], stages)
        };
        let at = match slot {
            Slot::Ring(r) => {
                let (moved, stages) = ring(r);
                moved % stages
            }
            Slot::Before(r) => {
                let (moved, stages) = ring(r);
                (moved + stages - 1) % stages
            }
            Slot::At(dim) => self.dim(agent, stmt, dim)?,
        };
        match usize::try_from(at) {
            Ok(at) if at < slots as usize => Ok(at),
            _ => Err(self.fail(agent, stmt, &format!("uses slot {at} of {slots}"))),
        }
    }

    /// Buffer, slot and rectangle of a tile in shared memory.
    pub(super) fn place(
        &self,
        agent: usize,
        stmt: &Stmt,
        tile: &SmemTile,
    ) -> Result<((usize, usize), Rect)> {
        let smem = &self.program.smem[tile.smem];
        let slot = self.slot(agent, stmt, &tile.slot, smem.slots)?;
        let (row, col) = (self.dim(agent, stmt, &tile.row)?, self.dim(agent, stmt, &tile.col)?);
        let inside = |at: i64, n: u32, of: u32| at >= 0 && at + i64::from(n) <= i64::from(of);
        if !inside(row, tile.rows, smem.rows) || !inside(col, tile.cols, smem.cols) {
            let (rows, cols, name) = (tile.rows, tile.cols, &smem.name);
            let what = format!("uses [{row} +{rows}, {col} +{cols}], which {name} has not");
            return Err(self.fail(agent, stmt, &what));
        }
        let (r0, c0) = (row as usize, col as usize);
        let rect = Rect { r0, r1: r0 + tile.rows as usize, c0, c1: c0 + tile.cols as usize };
        Ok(((tile.smem.index(), slot), rect))
    }

    /// The barrier's array and slot, which must be initialised in all of `blocks` as far as this
    /// step's threads know.
    fn mbarrier(
        &self,
        agent: usize,
        stmt: &Stmt,
        barrier: &BarrierRef,
        blocks: &[usize],
    ) -> Result<(usize, usize)> {
        let slots = self.program.barriers[barrier.barrier].slots;
        let slot = self.slot(agent, stmt, &barrier.slot, slots)?;
        let a = &self.agents[agent];
        let clock = a.clocks.clock(a.solo());
        for &block in blocks {
            if self.blocks[block].gone {
                return Err(self.fail(agent, stmt, &format!("uses block {block}, which is gone")));
            }
            if !clock.knows(self.blocks[block].fence_component, 1) {
                let what = format!(
                    "uses a barrier of block {block} that may not be initialised: no fence and \
                     sync after it"
                );
                return Err(self.fail(agent, stmt, &what));
            }
        }
        Ok((barrier.barrier.index(), slot))
    }

    /// The blocks that a step reaches.
    fn reached(&self, agent: usize, stmt: &Stmt, reach: &Reach) -> Result<Vec<usize>> {
        match reach {
            Reach::Own => Ok(vec![self.agents[agent].block]),
            Reach::All | Reach::Row(_) | Reach::Column(_) | Reach::Cross(_) => {
                let own = self.agents[agent].block as u32;
                let takes = |other: &usize| reach.takes_in(own, *other as u32);
                Ok((0..self.blocks.len()).filter(takes).collect())
            }
            Reach::Cta(cta) => {
                let at = self.dim(agent, stmt, cta)?;
                match usize::try_from(at) {
                    Ok(block) if block < self.blocks.len() => Ok(vec![block]),
                    _ => Err(self.fail(agent, stmt, &format!("reaches block {at}"))),
                }
            }
        }
    }

    /// Lets an instance make one step, or move on to its next stage.
    pub(super) fn step(&mut self, agent: usize) -> Result<Progress> {
        loop {
            let a = &mut self.agents[agent];
            if a.waiting || a.stage == Stage::Done {
                return Ok(Progress::Blocked);
            }
            let Some(frame) = a.frames.last_mut() else {
                let (stage, block): (Stage, &'p [Stmt]) = match a.stage {
                    Stage::Setup => (Stage::Body, a.role.map_or(&[], |r| &r.body)),
                    Stage::Body => (Stage::Teardown, &self.program.teardown),
                    _ => (Stage::Done, &[]),
                };
                a.stage = stage;
                if stage == Stage::Done {
                    self.finish(agent)?;
                    return Ok(Progress::Stepped);
                }
                a.push(block, Who::Same, None);
                continue;
            };
            let Some(stmt) = frame.block.get(frame.at) else {
                let names = frame.names;
                a.env.truncate(names);
                match frame.again {
                    Some((next, hi, step)) if next < hi => {
                        frame.at = 0;
                        frame.again = Some((next + step, hi, step));
                        // The variable stands just below the names of the body.
                        a.env[names - 1].1 = next;
                    }
                    looped => {
                        a.frames.pop();
                        if looped.is_some() {
                            a.env.pop();
                        }
                    }
                }
                continue;
            };
            let progress = self.exec(agent, stmt)?;
            if progress == Progress::Stepped {
                self.count(agent, stmt)?;
            }
            return Ok(progress);
        }
    }

    /// Goes past the step that an instance stands at.
    fn pass(&mut self, agent: usize) {
        if let Some(frame) = self.agents[agent].frames.last_mut() {
            frame.at += 1;
        }
    }

    fn exec(&mut self, agent: usize, stmt: &'p Stmt) -> Result<Progress> {
        match stmt {
            Stmt::For { .. } | Stmt::Unroll { .. } | Stmt::If { .. } | Stmt::Once(_) => {
                self.pass(agent);
                self.enter(agent, stmt)?;
                return Ok(Progress::Stepped);
            }
            Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::SyncBlock
            | Stmt::SyncCluster => return self.meet(agent, stmt),
            Stmt::Line(LineStep::AcrossCluster { frag, kind }) => {
                return self.across_cluster(agent, stmt, frag, *kind);
            }
            Stmt::Wait { barrier, phase } => {
                if !self.wait(agent, stmt, barrier, phase)? {
                    return Ok(Progress::Blocked);
                }
            }
            Stmt::Let { name, value } => {
                let value = self.dim(agent, stmt, value)?;
                self.agents[agent].env.push((name.clone(), value));
            }
            Stmt::BarrierInit => {
                let block = self.agents[agent].block;
                if self.agents[agent].first_thread == 0 || self.agents[agent].solo() {
                    if self.blocks[block].initialised {
                        return Err(self.fail(agent, stmt, "initialises barriers again"));
                    }
                    self.blocks[block].initialised = true;
                }
            }
            Stmt::FenceBarrierInit => {
                let a = &mut self.agents[agent];
                let block = &self.blocks[a.block];
                if block.initialised && (a.first_thread == 0 || a.solo()) {
                    a.clocks.leader.raise(block.fence_component, 1);
                }
            }
            Stmt::Arrive { barrier, reach } => {
                let blocks = self.reached(agent, stmt, reach)?;
                self.arrive(agent, stmt, barrier, &blocks, 0)?;
            }
            Stmt::ExpectBytes { barrier, bytes } => {
                let own = [self.agents[agent].block];
                self.arrive(agent, stmt, barrier, &own, i64::from(*bytes))?;
            }
            Stmt::Advance { ring, by } => {
                let by = self.dim(agent, stmt, by)?;
                let a = &self.agents[agent];
                if by < 0 {
                    return Err(self.fail(agent, stmt, "moves a ring backwards"));
                }
                if a.frames.iter().any(|f| f.who != Who::Same) {
                    return Err(self.fail(agent, stmt, "moves the ring of some threads only"));
                }
                self.agents[agent].rings[ring.index()] += by;
            }
            Stmt::TmaLoad { map, at, to, barrier, reach, .. } => {
                self.tma_load(agent, stmt, (*map, at), to, barrier, reach)?;
            }
            Stmt::TmaStore { map, at, from, add } => {
                self.alone(agent, stmt)?;
                self.tma_store(agent, stmt, (*map, at), from, *add)?;
            }
            Stmt::TmaCommit => {
                self.alone(agent, stmt)?;
                self.agents[agent].stores.commit();
            }
            Stmt::TmaWait { pending, reads_only } => {
                self.alone(agent, stmt)?;
                let a = &mut self.agents[agent];
                let done = a.stores.committed.saturating_sub(*pending);
                a.clocks.raise(Part::StoreRead, done, true);
                if !reads_only {
                    a.clocks.raise(Part::StoreWrite, done, true);
                }
            }
            Stmt::FenceAsync => {
                let a = &mut self.agents[agent];
                let solo = a.solo();
                a.clocks.fence(solo);
            }
            Stmt::CopyCommit => {
                let a = &mut self.agents[agent];
                let groups = match a.solo() {
                    true => &mut a.clocks.leader_copy,
                    false => &mut a.clocks.others_copy,
                };
                groups.commit();
                a.shelves.commit();
            }
            Stmt::CopyWait { pending } => {
                let a = &mut self.agents[agent];
                let solo = a.solo();
                a.clocks.copy_wait(*pending, solo);
                a.shelves.wait(*pending);
            }
            Stmt::WgmmaFence => {
                let columns = self.agents[agent].frags.iter_mut().flat_map(|f| &mut f.columns);
                columns.for_each(|c| (c.touched, c.changed, c.shape) = (false, false, None));
            }
            Stmt::WgmmaCommit => {
                let a = &mut self.agents[agent];
                // An empty group is complete with the one before.
                let waits = match a.wgmma.open {
                    0 => a.wgmma_waits.last().copied().unwrap_or(0),
                    _ => a.clocks.waits(),
                };
                a.wgmma_waits.push(waits);
                a.wgmma.commit();
            }
            Stmt::WgmmaWait { pending } => {
                let a = &mut self.agents[agent];
                let done = a.wgmma.wait(*pending);
                a.clocks.raise(Part::Wgmma, done, false);
                // All warps of the group had issued it, and waited for what stands before it.
                let waits = (done as usize).checked_sub(1).and_then(|i| a.wgmma_waits.get(i));
                a.clocks.raise(Part::Waits, waits.copied().unwrap_or(0), true);
            }
            Stmt::GridWait => {
                let solo = self.agents[agent].solo();
                let clocks = &mut self.agents[agent].clocks;
                clocks.leader.raise(self.grid_component, 1);
                if !solo {
                    clocks.others.raise(self.grid_component, 1);
                }
            }
            Stmt::GridRelease => {}
            _ => self.values(agent, stmt)?,
        }
        self.pass(agent);
        Ok(Progress::Stepped)
    }

    fn enter(&mut self, agent: usize, stmt: &'p Stmt) -> Result<()> {
        match stmt {
            Stmt::For { var, lo, hi, step, body } => {
                let (lo, hi) = (self.dim(agent, stmt, lo)?, self.dim(agent, stmt, hi)?);
                let step = self.dim(agent, stmt, step)?;
                if step < 1 {
                    return Err(self.fail(agent, stmt, "has a step that is not positive"));
                }
                self.agents[agent].begin_loop(var, (lo, hi, step), body);
            }
            Stmt::Unroll { var, count, body } => {
                self.agents[agent].begin_loop(var, (0, i64::from(*count), 1), body);
            }
            Stmt::Once(body) => {
                let a = &mut self.agents[agent];
                // Outside of roles the instance is the block.
                if a.stage == Stage::Body || a.first_thread == 0 {
                    a.push(body, Who::Leader, None);
                }
            }
            Stmt::If { cond, then, otherwise } => {
                let mut by_thread = false;
                for side in [&cond.lhs, &cond.rhs] {
                    side.for_each_symbol(&mut |s| by_thread |= &**s == THREAD);
                }
                if !by_thread {
                    let body = if self.cond(agent, stmt, cond)? { then } else { otherwise };
                    self.agents[agent].push(body, Who::Same, None);
                    return Ok(());
                }
                let a = &self.agents[agent];
                if a.stage == Stage::Body {
                    return Err(self.fail(agent, stmt, "asks for the thread within a role"));
                }
                let (first, threads) = (a.first_thread, a.threads);
                let mut taken = Vec::new();
                for thread in first..first + threads {
                    self.agents[agent].env.push((THREAD.into(), i64::from(thread)));
                    let taken_here = self.cond(agent, stmt, cond);
                    self.agents[agent].env.pop();
                    taken.push(taken_here?);
                }
                let count = taken.iter().filter(|&&t| t).count();
                let a = &mut self.agents[agent];
                let mut branch = |body, first: bool, count: usize| {
                    if count == taken.len() {
                        a.push(body, Who::Same, None);
                    } else if count == 1 && first {
                        a.push(body, Who::Leader, None);
                    } else if count > 0 {
                        a.push(body, Who::Some, None);
                    }
                };
                branch(otherwise, !taken[0], taken.len() - count);
                branch(then, taken[0], count);
            }
            _ => {}
        }
        Ok(())
    }

    /// Steps of one thread.
    fn alone(&self, agent: usize, stmt: &Stmt) -> Result<()> {
        if self.agents[agent].solo() {
            return Ok(());
        }
        Err(self.fail(agent, stmt, "is run by more than one thread"))
    }

    /// Steps of all threads of an instance.
    pub(super) fn all_threads(&self, agent: usize, stmt: &Stmt) -> Result<()> {
        let a = &self.agents[agent];
        if a.solo() || a.frames.iter().any(|f| f.who == Who::Some) {
            return Err(self.fail(agent, stmt, "is not run by all threads of the instance"));
        }
        Ok(())
    }

    /// Arrives at a barrier of threads; whoever completes it moves everyone on.
    pub(super) fn meet(&mut self, agent: usize, stmt: &'p Stmt) -> Result<Progress> {
        self.all_threads(agent, stmt)?;
        let block = self.agents[agent].block;
        let (place, need, stays) = match stmt {
            Stmt::NamedSync { id, threads } | Stmt::NamedArrive { id, threads } => {
                let id = self.dim(agent, stmt, id)?;
                if !(1..16).contains(&id) {
                    return Err(self.fail(agent, stmt, &format!("uses hardware barrier {id}")));
                }
                let stays = matches!(stmt, Stmt::NamedSync { .. });
                (Place::Named(id as usize), Some(*threads), stays)
            }
            Stmt::SyncBlock => (Place::Block, None, true),
            _ => (Place::Cluster, None, true),
        };
        let a = &mut self.agents[agent];
        let meeting: &mut Meeting = match place {
            Place::Named(id) => &mut self.blocks[block].named[id],
            Place::Block => &mut self.blocks[block].all,
            Place::Cluster => &mut self.everyone,
        };
        if let Some(need) = need {
            if meeting.got > 0 && meeting.need != need {
                let what = format!("expects {need} threads where others expect {}", meeting.need);
                return Err(self.fail(agent, stmt, &what));
            }
            meeting.need = need;
        }
        meeting.got += a.threads;
        meeting.clock.join(&a.clocks.together());
        if stays {
            meeting.members.push(agent);
            a.waiting = true;
        }
        if meeting.got > meeting.need {
            let (got, need) = (meeting.got, meeting.need);
            return Err(self.fail(agent, stmt, &format!("brings {got} threads where {need} meet")));
        }
        let complete = meeting.got == meeting.need;
        if complete {
            meeting.got = 0;
            for member in std::mem::take(&mut meeting.members) {
                let a = &mut self.agents[member];
                a.waiting = false;
                a.clocks.meet(&meeting.clock);
                if let Some(frame) = a.frames.last_mut() {
                    frame.at += 1;
                }
            }
            meeting.clock.clear();
        }
        if !stays {
            // What these threads do from here on is not what they arrived with.
            self.agents[agent].clocks.tick_all();
            self.pass(agent);
        }
        Ok(Progress::Stepped)
    }

    /// Whether the phase is complete; what its arrivals did is then known.
    fn wait(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        barrier: &BarrierRef,
        phase: &Phase,
    ) -> Result<bool> {
        let block = self.agents[agent].block;
        let (array, slot) = self.mbarrier(agent, stmt, barrier, &[block])?;
        let pass = |ring: &RingId| {
            let stages = i64::from(self.program.rings[*ring].stages);
            self.agents[agent].rings[ring.index()] / stages
        };
        let (wanted, ring) = match phase {
            Phase::Of(ring) => (pass(ring), Some(*ring)),
            Phase::Before(ring) => (pass(ring) - 1, Some(*ring)),
            Phase::Parity(parity) => (self.dim(agent, stmt, parity)?, None),
        };
        let b = &mut self.blocks[block].barriers[array][slot];
        let completed = i64::from(b.completed);
        if completed.rem_euclid(2) == wanted.rem_euclid(2) {
            return Ok(false);
        }
        let of_ring = matches!((&barrier.slot, ring), (Slot::Ring(a), Some(b)) if *a == b);
        if of_ring && completed - 1 != wanted {
            let what = format!(
                "waits for phase {wanted} of slot {slot} and meets phase {} (a parity says no more)",
                completed - 1
            );
            return Err(self.fail(agent, stmt, &what));
        }
        let a = &mut self.agents[agent];
        let solo = a.solo();
        a.clocks.acquire(&b.released, solo);
        if !solo {
            let (component, stamp) = a.clocks.waited();
            b.seeing.push((component, stamp, agent));
        }
        Ok(true)
    }

    /// One arrival at the barrier of each block, with announced bytes.
    fn arrive(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        barrier: &BarrierRef,
        blocks: &[usize],
        bytes: i64,
    ) -> Result<()> {
        let (array, slot) = self.mbarrier(agent, stmt, barrier, blocks)?;
        let a = &mut self.agents[agent];
        let own = a.block;
        if !a.solo() && a.threads == 32 {
            // The threads of a warp come together before one of them arrives.
            let together = a.clocks.together();
            a.clocks.meet(&together);
        }
        // An arrival in another block is a release within the own block only (`device-lib/sync.cuh`): it hands over
        // what the copy engine and the tensor cores have completed, and no plain accesses.
        let staff = self.agents.iter().enumerate().filter(|(_, a)| a.block == own);
        let abroad = self.agents[agent].clocks.leader.without_plain(staff.map(|(index, _)| index));
        for &block in blocks {
            let state = &mut self.blocks[block];
            if block != own {
                let (component, stamp) = self.agents[agent].clocks.arrive_remotely();
                state.until_exit.insert(component, (stamp, agent, stmt));
            }
            let b = &mut state.barriers[array][slot];
            if b.pending == 0 {
                let (arrivals, missing) = (b.arrivals, b.bytes);
                let what = format!(
                    "arrives at slot {slot} of block {block}, whose phase {} had its {arrivals} \
                     arrivals and lacks {missing} bytes",
                    b.completed
                );
                return Err(self.fail(agent, stmt, &what));
            }
            b.pending -= 1;
            b.bytes += bytes;
            if block == own {
                b.gathering.join(&self.agents[agent].clocks.leader);
            } else {
                b.gathering.join(&abroad);
            }
            self.complete(agent, stmt, block, (array, slot))?;
        }
        self.agents[agent].clocks.tick();
        Ok(())
    }

    /// Ends a barrier's phase when everything has come.
    fn complete(
        &mut self,
        agent: usize,
        stmt: &Stmt,
        block: usize,
        (array, slot): (usize, usize),
    ) -> Result<()> {
        let b = &mut self.blocks[block].barriers[array][slot];
        if b.pending > 0 {
            return Ok(());
        }
        if b.bytes < 0 {
            let what = format!(
                "brings phase {} of slot {slot} of block {block} {} bytes more than announced",
                b.completed, -b.bytes
            );
            return Err(self.fail(agent, stmt, &what));
        }
        if b.bytes == 0 {
            let late = b.seeing.iter().find(|(c, stamp, _)| !b.gathering.knows(*c, *stamp));
            if let Some(&(_, _, who)) = late {
                let what = format!(
                    "completes phase {} of slot {slot} of block {block} while warps of {} may still look for \
                     the phase before: a parity does not tell them apart",
                    b.completed, self.agents[who].name
                );
                return Err(self.fail(agent, stmt, &what));
            }
            b.seeing.clear();
            b.completed += 1;
            b.pending = b.arrivals;
            b.gathering.raise(b.component, b.completed);
            b.released.join(&b.gathering);
            b.gathering.clear();
        }
        Ok(())
    }

    fn tma_load(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        (map, at): (MapId, &[Dim]),
        to: &SmemTile,
        barrier: &BarrierRef,
        reach: &Reach,
    ) -> Result<()> {
        self.alone(agent, stmt)?;
        let blocks = self.reached(agent, stmt, reach)?;
        let (smem, rect) = self.place(agent, stmt, to)?;
        let (array, slot) = self.mbarrier(agent, stmt, barrier, &blocks)?;
        let at = self.dims(agent, stmt, at)?;
        let data = self.box_read(agent, stmt, map, &at, &self.program.smem[to.smem], rect)?;
        let program = self.program;
        let bits = program.smem[to.smem].dtype.bits() as usize;
        let bytes = (rect.rows() * rect.cols() * bits / 8) as i64;
        for block in blocks {
            let id = self.next_copy;
            self.next_copy += 1;
            let access = Access {
                component: self.blocks[block].barriers[array][slot].component,
                stamp: PENDING,
                kind: Kind::Write,
                proxy: Proxy::Async,
                load: id,
                agent,
                stmt,
            };
            let clock = &self.agents[agent].clocks.leader;
            let buffer = &mut self.blocks[block].smem[smem.0][smem.1];
            if let Err(conflict) = buffer.touch(rect, access, clock) {
                let memory = format!("{}[{}] of block {block}", program.smem[to.smem].name, smem.1);
                return Err(self.conflict(agent, stmt, &memory, conflict));
            }
            let barrier = (array, slot);
            let data = data.clone();
            self.copies.push(Copying { id, block, barrier, bytes, smem, rect, data, agent, stmt });
        }
        Ok(())
    }

    /// A copy into shared memory ends: its bytes are there and counted.
    pub(super) fn end_copy(&mut self, index: usize) -> Result<()> {
        let copy = self.copies.remove(index);
        let (array, slot) = copy.barrier;
        if self.blocks[copy.block].gone {
            let what = format!("ends after block {} is gone", copy.block);
            return Err(self.fail(copy.agent, copy.stmt, &what));
        }
        let state = &mut self.blocks[copy.block];
        let b = &mut state.barriers[array][slot];
        let stamp = b.completed + 1;
        b.bytes -= copy.bytes;
        state.until_exit.insert(b.component, (stamp, copy.agent, copy.stmt));
        let buffer = &mut state.smem[copy.smem.0][copy.smem.1];
        buffer.settle(copy.id, stamp);
        if let Some(data) = &copy.data {
            super::values::put(&mut buffer.data, buffer.cols, copy.rect, data);
        }
        self.complete(copy.agent, copy.stmt, copy.block, copy.barrier)
    }

    fn tma_store(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        (map, at): (MapId, &[Dim]),
        from: &SmemTile,
        add: bool,
    ) -> Result<()> {
        let (smem, rect) = self.place(agent, stmt, from)?;
        let at = self.dims(agent, stmt, at)?;
        let stamp = self.agents[agent].stores.issue();
        let access = |part, kind| Access {
            component: component(agent, part),
            stamp,
            kind,
            proxy: Proxy::Async,
            load: 0,
            agent,
            stmt,
        };
        let read = access(Part::StoreRead, Kind::Read);
        self.touch_smem(agent, stmt, smem, rect, read)?;
        let kind = if add { Kind::Add } else { Kind::Write };
        let write = access(Part::StoreWrite, kind);
        self.box_write(agent, map, &at, (smem, rect), write)
    }

    /// An access to shared memory of the own block by the clock of the step's threads.
    pub(super) fn touch_smem(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        smem: (usize, usize),
        rect: Rect,
        access: Access<'p>,
    ) -> Result<()> {
        let a = &self.agents[agent];
        let clock = a.clocks.clock(a.solo());
        let buffer = &mut self.blocks[a.block].smem[smem.0][smem.1];
        buffer.touch(rect, access, clock).map_err(|conflict| {
            let name = &self.program.smem[SmemId(smem.0 as u32)].name;
            self.conflict(agent, stmt, &format!("{name}[{}]", smem.1), conflict)
        })
    }
}

impl<'p> Agent<'p> {
    fn push(&mut self, block: &'p [Stmt], who: Who, again: Option<(i64, i64, i64)>) {
        let names = self.env.len();
        self.frames.push(Frame { block, at: 0, who, names, again });
    }

    fn begin_loop(
        &mut self,
        var: &std::sync::Arc<str>,
        (lo, hi, step): (i64, i64, i64),
        body: &'p [Stmt],
    ) {
        if lo < hi {
            self.env.push((var.clone(), lo));
            self.push(body, Who::Same, Some((lo + step, hi, step)));
        }
    }
}
