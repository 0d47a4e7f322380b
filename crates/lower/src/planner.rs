//! [`Planner`]: a grouping that can change, with its estimated time, and the search for a better
//! one.
//!
//! The search starts from the greedy grouping, visits group after group, tries every move that
//! [`moves`](crate::moves) lists there, and keeps the best one when the whole plan gets faster by
//! more than the [`MARGIN`]; it ends when no group has such a move. So the result is never
//! estimated slower than the greedy grouping, and depends on nothing but the graph and the target.
//!
//! Invariants, kept by [`Planner::put`] and [`Planner::settle`]: every value that is read from
//! memory, or that the caller asks for, has one owner that stores it; a group computes nothing that
//! its results do not need; groups do not wait for each other in a circle.

use crate::cost::estimate_ns;
use crate::form::{can_store, form};
use crate::fuse::{Anchor, Group, time};
use crate::moves::{Move, moves_of};
use crate::survey::Survey;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use tilewright_graph::{Graph, NodeId, ValueId};

/// A move must save this part of the time of the groups that it touches: less is within what the
/// model cannot tell apart.
const MARGIN: f64 = 0.02;

/// Alternatives that are estimated at most: a bound on planning time that depends on no clock.
const MOST_TRIED: usize = 40_000;

/// Times that all groups are visited at most.
const MOST_ROUNDS: usize = 6;

/// What the planner said about a group.
#[derive(Clone, Debug)]
pub(crate) enum Verdict {
    /// A move that made the plan faster.
    Taken(String),
    /// The best of the moves that did not.
    Refused(String),
}

/// A group with what it reads from memory.
pub(crate) struct Piece {
    pub(crate) group: Group,
    /// Values whose memory it reads, made by other groups.
    pub(crate) reads: Vec<ValueId>,
    /// No move changes it: a kind of its own, or one that [`form`] does not know.
    pub(crate) fixed: bool,
}

/// See the module's head.
pub(crate) struct Planner<'a> {
    pub(crate) s: &'a Survey<'a>,
    slots: Vec<Option<Rc<Piece>>>,
    owner: Vec<Option<usize>>,
    readers: Vec<BTreeSet<usize>>,
    journal: Vec<(usize, Option<Rc<Piece>>)>,
    dirty: BTreeSet<usize>,
    stale: BTreeSet<ValueId>,
    considered: usize,
    said: Vec<(usize, Verdict)>,
}

/// A point to return to.
struct Mark {
    changes: usize,
    slots: usize,
}

/// What a tried move would give.
struct Trial {
    /// Time of the groups that it touches, before and after.
    before: f64,
    after: f64,
}

impl<'a> Planner<'a> {
    /// Starts from a grouping in which every node is in one group.
    pub(crate) fn new(s: &'a Survey<'a>, groups: Vec<Group>) -> Planner<'a> {
        let mut p = Planner {
            s,
            slots: groups.iter().map(|_| None).collect(),
            owner: vec![None; s.graph.nodes.len()],
            readers: vec![BTreeSet::new(); s.graph.values.len()],
            journal: Vec::new(),
            dirty: BTreeSet::new(),
            stale: BTreeSet::new(),
            considered: 0,
            said: Vec::new(),
        };
        for (slot, group) in groups.into_iter().enumerate() {
            let fixed = form(s, &group.nodes).is_none();
            let piece = p.piece(group, fixed);
            p.put(slot, Some(Rc::new(piece)));
        }
        p.settle();
        p.journal.clear();
        p
    }

    pub(crate) fn graph(&self) -> &'a Graph {
        self.s.graph
    }

    /// Estimated time of the whole grouping.
    pub(crate) fn total_ns(&self) -> f64 {
        self.slots.iter().flatten().map(|p| p.group.estimate_ns).sum()
    }

    /// Alternatives estimated so far.
    pub(crate) fn considered(&self) -> usize {
        self.considered
    }

    /// What was decided, by group.
    pub(crate) fn verdict(&self) -> &[(usize, Verdict)] {
        &self.said
    }

    /// A live group.
    pub(crate) fn group(&self, slot: usize) -> &Group {
        &self.slots[slot].as_ref().expect("asked for a live group").group
    }

    pub(crate) fn get(&self, slot: usize) -> Option<&Rc<Piece>> {
        self.slots.get(slot)?.as_ref()
    }

    /// The group that stores what a node makes.
    pub(crate) fn owner(&self, n: NodeId) -> Option<usize> {
        self.owner[n.index()]
    }

    /// Groups that read the memory of a value.
    pub(crate) fn readers(&self, v: ValueId) -> &BTreeSet<usize> {
        &self.readers[v.index()]
    }

    /// A slot without a group.
    pub(crate) fn new_slot(&mut self) -> usize {
        self.slots.push(None);
        self.slots.len() - 1
    }

    fn piece(&self, group: Group, fixed: bool) -> Piece {
        let mut reads = BTreeSet::new();
        for &n in &group.nodes {
            for &v in &self.s.graph.nodes[n].inputs {
                let root = self.s.root(v);
                if !group.vals.contains_key(&self.s.seen(v).0)
                    && self.s.graph.producer(root).is_some()
                {
                    reads.insert(root);
                }
            }
        }
        Piece { group, reads: reads.into_iter().collect(), fixed }
    }

    /// Puts a group of these nodes into a slot; false when they cannot be one.
    pub(crate) fn regroup(
        &mut self,
        slot: usize,
        nodes: &BTreeSet<NodeId>,
        copies: &BTreeSet<NodeId>,
    ) -> bool {
        if nodes.is_empty() {
            self.put(slot, None);
            return true;
        }
        let mut order: Vec<NodeId> = nodes.iter().copied().collect();
        order.sort_unstable_by_key(|&n| self.s.position(n));
        let Some(mut group) = form(self.s, &order) else { return false };
        group.copies = nodes.intersection(copies).copied().collect();
        if let Some(old) = &self.slots[slot] {
            group.reasons.clone_from(&old.group.reasons);
        }
        let piece = self.piece(group, false);
        self.put(slot, Some(Rc::new(piece)));
        true
    }

    /// Replaces a slot's group, and remembers the old one.
    fn put(&mut self, slot: usize, new: Option<Rc<Piece>>) {
        let old = self.replace(slot, new);
        self.journal.push((slot, old));
    }

    fn replace(&mut self, slot: usize, new: Option<Rc<Piece>>) -> Option<Rc<Piece>> {
        let old = std::mem::replace(&mut self.slots[slot], new.clone());
        if let Some(old) = &old {
            for &r in &old.reads {
                self.readers[r.index()].remove(&slot);
                self.stale.insert(r);
            }
            for n in &old.group.nodes {
                if self.owner[n.index()] == Some(slot) {
                    self.owner[n.index()] = None;
                    self.stale.extend(&self.s.graph.nodes[*n].outputs);
                }
            }
        }
        if let Some(new) = new {
            for &r in &new.reads {
                self.readers[r.index()].insert(slot);
                self.stale.insert(r);
            }
            for n in new.group.nodes.iter().filter(|n| !new.group.copies.contains(n)) {
                self.owner[n.index()] = Some(slot);
            }
            self.dirty.insert(slot);
        }
        old
    }

    /// Brings outputs, dead nodes and estimates up to date; false when nobody stores what somebody
    /// reads.
    fn settle(&mut self) -> bool {
        let s = self.s;
        loop {
            for v in std::mem::take(&mut self.stale) {
                match s.graph.producer(v).and_then(|n| self.owner[n.index()]) {
                    Some(maker) => self.dirty.extend([maker]),
                    None if s.is_asked(v) || !self.readers[v.index()].is_empty() => return false,
                    None => {}
                }
            }
            let Some(slot) = self.dirty.pop_first() else { return true };
            let Some(piece) = self.slots[slot].clone() else { continue };
            let group = &piece.group;
            let apart = matches!(group.anchor, Anchor::Host | Anchor::Concat | Anchor::Dims);
            let made = group.nodes.iter().filter(|n| !group.copies.contains(n));
            let outputs: Vec<ValueId> = made
                .flat_map(|&n| s.graph.nodes[n].outputs.iter().copied())
                .filter(|&v| apart || s.is_asked(v) || !self.readers[v.index()].is_empty())
                .collect();
            let needed = self.needed(group, &outputs);
            if !piece.fixed && needed.len() < group.nodes.len() {
                if !self.regroup(slot, &needed, &group.copies.clone()) {
                    return false;
                }
                continue;
            }
            if outputs == group.outputs && group.estimate_ns > 0.0 {
                continue;
            }
            if !piece.fixed && !outputs.iter().all(|&v| can_store(group, v)) {
                return false;
            }
            let mut group = Group { outputs, ..group.clone() };
            group.estimate_ns = estimate_ns(s, &group);
            let piece = Piece { group, reads: piece.reads.clone(), fixed: piece.fixed };
            self.put(slot, Some(Rc::new(piece)));
        }
    }

    /// The nodes that these results need.
    fn needed(&self, group: &Group, outputs: &[ValueId]) -> BTreeSet<NodeId> {
        let mut wanted: BTreeSet<ValueId> = outputs.iter().copied().collect();
        let mut needed = BTreeSet::new();
        for &n in group.nodes.iter().rev() {
            let node = &self.s.graph.nodes[n];
            if node.outputs.iter().any(|v| wanted.contains(v)) {
                needed.insert(n);
                wanted.extend(node.inputs.iter().map(|&v| self.s.seen(v).0));
            }
        }
        needed
    }

    /// Groups that make what a group reads.
    fn feeders(&self, slot: usize) -> impl Iterator<Item = Option<usize>> + '_ {
        let reads = self.slots[slot].iter().flat_map(|p| &p.reads);
        reads.map(|&v| self.s.graph.producer(v).and_then(|n| self.owner[n.index()]))
    }

    /// Whether the groups that changed since `mark` wait for themselves, or for nobody.
    fn waits_in_circle(&self, mark: usize) -> bool {
        let changed: BTreeSet<usize> = self.journal[mark..].iter().map(|j| j.0).collect();
        changed.iter().any(|&goal| {
            let mut seen: BTreeSet<usize> = BTreeSet::new();
            let mut stack = vec![goal];
            while let Some(slot) = stack.pop() {
                for feeder in self.feeders(slot) {
                    match feeder {
                        None => return true,
                        Some(f) if f == goal => return true,
                        Some(f) if seen.insert(f) => stack.push(f),
                        Some(_) => {}
                    }
                }
            }
            false
        })
    }

    /// Makes a move; `None` (and everything as it was) when it is not legal.
    fn make(&mut self, step: &Move) -> Option<Trial> {
        let start = self.mark();
        let mark = start.changes;
        if step.apply(self) && self.settle() && !self.waits_in_circle(mark) {
            let mut touched: BTreeMap<usize, f64> = BTreeMap::new();
            for (slot, old) in &self.journal[mark..] {
                touched.entry(*slot).or_insert(old.as_ref().map_or(0.0, |p| p.group.estimate_ns));
            }
            let now = |slot: &usize| self.get(*slot).map_or(0.0, |p| p.group.estimate_ns);
            let after = touched.keys().map(now).sum();
            return Some(Trial { before: touched.values().sum(), after });
        }
        self.undo(&start);
        None
    }

    fn mark(&self) -> Mark {
        Mark { changes: self.journal.len(), slots: self.slots.len() }
    }

    fn undo(&mut self, to: &Mark) {
        while self.journal.len() > to.changes {
            if let Some((slot, old)) = self.journal.pop() {
                self.replace(slot, old);
            }
        }
        self.slots.truncate(to.slots);
        self.dirty.clear();
        self.stale.clear();
    }

    /// Searches; see the module's head.
    pub(crate) fn search(&mut self) {
        for _ in 0..MOST_ROUNDS {
            let mut better = false;
            self.said.retain(|s| matches!(s.1, Verdict::Taken(_)));
            let mut slot = 0;
            while slot < self.slots.len() {
                if self.improve(slot) {
                    better = true;
                } else {
                    slot += 1;
                }
                if self.considered > MOST_TRIED {
                    return;
                }
            }
            if !better {
                return;
            }
        }
    }

    /// Makes legal moves as a number says, whatever they cost: groupings that a test would not see
    /// otherwise.
    pub(crate) fn scramble(&mut self, seed: u64) {
        let mut state = seed;
        let mut next = move |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below.max(1)
        };
        for _ in 0..4 * self.slots.len() {
            let slot = next(self.slots.len());
            let moves = moves_of(self, slot);
            if let Some(step) = moves.get(next(moves.len()))
                && self.make(step).is_some()
            {
                self.considered += 1;
                self.journal.clear();
            }
        }
    }

    /// Makes the best move at a group; false when none is worth it.
    fn improve(&mut self, slot: usize) -> bool {
        let mut best: Option<(f64, Move, Trial)> = None;
        for step in moves_of(self, slot) {
            let mark = self.mark();
            let Some(trial) = self.make(&step) else { continue };
            self.undo(&mark);
            self.considered += 1;
            let gain = trial.before - trial.after;
            if best.as_ref().is_none_or(|b| gain > b.0) {
                best = Some((gain, step, trial));
            }
        }
        let Some((gain, step, trial)) = best else { return false };
        let times = format!("{} instead of {}", time(trial.after), time(trial.before));
        let line = format!("{}: {times}", step.describe(self));
        if gain <= MARGIN * trial.before {
            self.said.push((slot, Verdict::Refused(line)));
            return false;
        }
        let made = self.make(&step).is_some();
        self.journal.clear();
        // Said at the group that the move was for, or at the one that it became.
        let at = if self.get(slot).is_some() { slot } else { step.goal().unwrap_or(slot) };
        self.said.push((at, Verdict::Taken(line)));
        made
    }

    /// Live groups in an order in which they can run: each after its feeders, otherwise as created.
    pub(crate) fn sorted(&self) -> Vec<usize> {
        let mut done: BTreeSet<usize> = BTreeSet::new();
        let mut order = Vec::new();
        for start in (0..self.slots.len()).filter(|&g| self.slots[g].is_some()) {
            // Depth first, without recursion: a group is emitted once its feeders are.
            let mut stack = vec![start];
            while let Some(&g) = stack.last() {
                if done.contains(&g) {
                    stack.pop();
                    continue;
                }
                let missing: BTreeSet<usize> =
                    self.feeders(g).flatten().filter(|f| !done.contains(f)).collect();
                if missing.is_empty() {
                    done.insert(g);
                    order.push(g);
                    stack.pop();
                } else {
                    stack.extend(missing);
                }
            }
        }
        order
    }
}
