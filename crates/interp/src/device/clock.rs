//! Vector clocks: what each thread knows to have happened.
//!
//! A component is something whose events happen in order, and its stamp counts them. Threads are
//! components, and so is everything asynchronous, by what announces its end: a copy into shared memory is an event of
//! its barrier (the phase that it belongs to), a store by the copy engine an event of its issuer's
//! groups, and so on. An access that carries component `c` and stamp `s` happened before everything that a thread
//! with `hb[c] >= s` does.
//!
//! Of the threads of a role's instance two stand for all: the one that runs `once`, called the leader, and the others.
//! A step of all threads counts as the others': nothing orders two of them but a barrier, so the clock of the
//! others knows their own stamps only up to the last one ([`Threads::meet`] merges what has piled up since).

/// Components of one instance; barriers' slots follow after those of all instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The leader's plain accesses.
    Leader,
    /// The other threads' plain accesses.
    Others,
    /// The leader's `cp.async` groups.
    LeaderCopy,
    /// The other threads' `cp.async` groups.
    OthersCopy,
    /// Store groups: shared memory has been read.
    StoreRead,
    /// Store groups: global memory has been written.
    StoreWrite,
    /// `wgmma` groups.
    Wgmma,
    /// Arrivals at barriers of other blocks.
    Remote,
    /// Waits of the other threads at mbarriers.
    Waits,
}

/// Number of [`Part`]s.
pub(super) const PARTS: usize = 9;

/// The parts that are plain accesses.
pub(super) const PLAIN: [Part; 4] =
    [Part::Leader, Part::Others, Part::LeaderCopy, Part::OthersCopy];

/// The component of an instance's part.
pub(super) fn component(agent: usize, part: Part) -> u32 {
    (agent * PARTS + part as usize) as u32
}

/// What is known to have happened, and which of the plain writes the copy engine and the tensor
/// cores see (a `fence.proxy.async` of the writer stands between).
#[derive(Clone, Debug, Default)]
pub(super) struct Clock {
    pub(super) hb: Vec<u32>,
    pub(super) fenced: Vec<u32>,
}

impl Clock {
    pub(super) fn new(components: usize) -> Clock {
        Clock { hb: vec![0; components], fenced: vec![0; components] }
    }

    pub(super) fn join(&mut self, other: &Clock) {
        for (a, b) in self.hb.iter_mut().zip(&other.hb) {
            *a = (*a).max(*b);
        }
        for (a, b) in self.fenced.iter_mut().zip(&other.fenced) {
            *a = (*a).max(*b);
        }
    }

    pub(super) fn clear(&mut self) {
        self.hb.fill(0);
        self.fenced.fill(0);
    }

    /// Without what is known of plain accesses by these instances.
    pub(super) fn without_plain(&self, agents: impl Iterator<Item = usize>) -> Clock {
        let mut cut = self.clone();
        for agent in agents {
            for part in PLAIN {
                let at = component(agent, part) as usize;
                (cut.hb[at], cut.fenced[at]) = (0, 0);
            }
        }
        cut
    }

    pub(super) fn raise(&mut self, component: u32, stamp: u32) {
        let at = &mut self.hb[component as usize];
        *at = (*at).max(stamp);
    }

    pub(super) fn knows(&self, component: u32, stamp: u32) -> bool {
        self.hb[component as usize] >= stamp
    }

    pub(super) fn sees(&self, component: u32, stamp: u32) -> bool {
        self.fenced[component as usize] >= stamp
    }
}

/// Groups of asynchronous operations that complete in order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Groups {
    /// Closed so far; what is open belongs to group `committed + 1`.
    pub(super) committed: u32,
    /// Operations that no group has taken yet.
    pub(super) open: u32,
    /// Groups known to be complete.
    pub(super) done: u32,
}

impl Groups {
    pub(super) fn issue(&mut self) -> u32 {
        self.open += 1;
        self.committed + 1
    }

    pub(super) fn commit(&mut self) {
        self.committed += 1;
        self.open = 0;
    }

    pub(super) fn wait(&mut self, pending: u32) -> u32 {
        self.done = self.done.max(self.committed.saturating_sub(pending));
        self.done
    }

    pub(super) fn is_complete(&self) -> bool {
        self.open == 0 && self.done == self.committed
    }
}

/// The clocks of an instance's threads.
#[derive(Clone, Debug)]
pub(super) struct Threads {
    agent: usize,
    pub(super) leader: Clock,
    pub(super) others: Clock,
    leader_stamp: u32,
    others_stamp: u32,
    /// Up to which stamp the other threads' writes are fenced; they know it of each other only
    /// after they meet.
    others_fenced: u32,
    others_copy_fenced: u32,
    /// Arrivals of the leader at barriers of other blocks.
    remote: u32,
    /// Waits of the other threads at mbarriers, all of which they know; the leader knows those that a barrier
    /// or a complete `wgmma` group stands behind.
    waits: u32,
    pub(super) leader_copy: Groups,
    pub(super) others_copy: Groups,
}

impl Threads {
    pub(super) fn new(agent: usize, components: usize) -> Threads {
        let mut threads = Threads {
            agent,
            leader: Clock::new(components),
            others: Clock::new(components),
            leader_stamp: 0,
            others_stamp: 1,
            others_fenced: 0,
            others_copy_fenced: 0,
            remote: 0,
            waits: 0,
            leader_copy: Groups::default(),
            others_copy: Groups::default(),
        };
        threads.tick();
        threads
    }

    /// The clock that a step goes by.
    pub(super) fn clock(&self, solo: bool) -> &Clock {
        if solo { &self.leader } else { &self.others }
    }

    /// Component and stamp of a plain access.
    pub(super) fn stamp(&self, solo: bool) -> (u32, u32) {
        match solo {
            true => (component(self.agent, Part::Leader), self.leader_stamp),
            false => (component(self.agent, Part::Others), self.others_stamp),
        }
    }

    /// Later accesses of the leader are no longer those that it has released.
    pub(super) fn tick(&mut self) {
        self.leader_stamp += 1;
        self.leader.raise(component(self.agent, Part::Leader), self.leader_stamp);
    }

    /// As [`Threads::tick`], for all threads.
    pub(super) fn tick_all(&mut self) {
        self.others_stamp += 1;
        self.tick();
    }

    pub(super) fn acquire(&mut self, clock: &Clock, solo: bool) {
        self.leader.join(clock);
        if !solo {
            self.others.join(clock);
        }
    }

    pub(super) fn raise(&mut self, part: Part, stamp: u32, solo: bool) {
        let component = component(self.agent, part);
        self.leader.raise(component, stamp);
        if !solo {
            self.others.raise(component, stamp);
        }
    }

    /// The leader arrives in another block: component and stamp.
    pub(super) fn arrive_remotely(&mut self) -> (u32, u32) {
        self.remote += 1;
        self.raise(Part::Remote, self.remote, true);
        (component(self.agent, Part::Remote), self.remote)
    }

    /// All threads have waited at an mbarrier: component and stamp.
    pub(super) fn waited(&mut self) -> (u32, u32) {
        self.waits += 1;
        self.others.raise(component(self.agent, Part::Waits), self.waits);
        (component(self.agent, Part::Waits), self.waits)
    }

    /// How often the other threads have waited.
    pub(super) fn waits(&self) -> u32 {
        self.waits
    }

    /// `fence.proxy.async`, by the leader or by every thread.
    pub(super) fn fence(&mut self, solo: bool) {
        let at = |part| component(self.agent, part) as usize;
        self.leader.fenced[at(Part::Leader)] = self.leader_stamp;
        self.leader.fenced[at(Part::LeaderCopy)] = self.leader_copy.done;
        self.tick();
        if !solo {
            self.others_fenced = self.others_stamp;
            self.others_copy_fenced = self.others_copy.done;
            self.others_stamp += 1;
        }
    }

    pub(super) fn copy_wait(&mut self, pending: u32, solo: bool) {
        if solo {
            let done = self.leader_copy.wait(pending);
            self.raise(Part::LeaderCopy, done, true);
        } else {
            self.others_copy.wait(pending);
        }
    }

    /// What all threads together have done and know.
    pub(super) fn together(&self) -> Clock {
        let mut all = self.leader.clone();
        all.join(&self.others);
        let at = |part| component(self.agent, part) as usize;
        all.hb[at(Part::Others)] = self.others_stamp;
        all.hb[at(Part::OthersCopy)] = self.others_copy.done;
        all.fenced[at(Part::Others)] = self.others_fenced;
        all.fenced[at(Part::OthersCopy)] = self.others_copy_fenced;
        all
    }

    /// All threads pass a barrier that hands them `clock`, which contains [`Threads::together`].
    pub(super) fn meet(&mut self, clock: &Clock) {
        self.leader.join(clock);
        self.others.join(clock);
        self.others_stamp += 1;
        self.tick();
    }
}
