//! [`Move`]: what could be different in a grouping, one step at a time.
//!
//! | move | what it does |
//! |---|---|
//! | recompute | the readers of a map's result compute it themselves; when it was their only reader, an epilogue becomes a prologue |
//! | store | a chain of maps inside a group becomes a kernel of its own, its result is stored |
//! | detach | the end of a group becomes a kernel of its own |
//! | rehome | the end of a group becomes the end of another that it reads |
//! | merge | a group and one that reads it, or two that read the same, become one |
//!
//! A move only changes which nodes are in which group; [`form`](crate::form) says whether that can
//! be, and the planner what it takes. To add one: a variant, its arm in each method, and a line in
//! [`moves_of`].

use crate::fuse::{Anchor, Group, label};
use crate::planner::Planner;
use std::collections::BTreeSet;
use tilewright_graph::{NodeId, ValueId};

/// Nodes that are computed again together, at most.
const MOST_COPIED: usize = 24;

/// Groups beside each other that are tried for one, per value that they read.
const MOST_BESIDE: usize = 6;

/// See the module's head. Numbers are the planner's slots.
#[derive(Clone, Debug)]
pub(crate) enum Move {
    /// `readers` compute `value` themselves; `deep`: with the maps before it.
    Recompute { value: ValueId, readers: Vec<usize>, deep: bool },
    /// `node`, with the maps before it, leaves the group that reads it.
    Store { slot: usize, node: NodeId },
    /// `node` and what follows it leave the group.
    Detach { slot: usize, node: NodeId },
    /// `node` and what follows it go to the end of another group.
    Rehome { from: usize, node: NodeId, to: usize },
    /// Two groups become one, in the slot of the second.
    Merge { one: usize, other: usize },
}

/// The moves that concern a group, always in the same order.
pub(crate) fn moves_of(p: &Planner<'_>, slot: usize) -> Vec<Move> {
    let Some(piece) = p.get(slot).filter(|p| !p.fixed) else { return Vec::new() };
    let graph = p.graph();
    let mut moves = Vec::new();
    for &value in &piece.reads {
        let Some(maker) = graph.producer(value) else { continue };
        let Some(feeder) = p.owner(maker) else { continue };
        let readers: Vec<usize> = p.readers(value).iter().copied().collect();
        if p.s.is_map(maker) {
            for deep in [false, true] {
                moves.push(Move::Recompute { value, readers: vec![slot], deep });
                if readers.len() > 1 && readers[0] == slot {
                    moves.push(Move::Recompute { value, readers: readers.clone(), deep });
                }
            }
        }
        for &node in &piece.group.nodes {
            let reads = |v: &ValueId| p.s.seen(*v).0 == value;
            if p.s.is_map(node) && graph.nodes[node].inputs.iter().any(reads) {
                moves.push(Move::Rehome { from: slot, node, to: feeder });
            }
        }
        moves.push(Move::Merge { one: feeder, other: slot });
        let alike = |&&r: &&usize| {
            r > slot && p.get(r).is_some_and(|r| r.group.anchor == piece.group.anchor)
        };
        if matches!(piece.group.anchor, Anchor::Map | Anchor::Rows) {
            for &other in readers.iter().filter(alike).take(MOST_BESIDE) {
                moves.push(Move::Merge { one: slot, other });
            }
        }
    }
    for &node in &piece.group.nodes {
        if p.s.is_map(node) && piece.group.nodes.len() > 1 {
            moves.push(Move::Store { slot, node });
            moves.push(Move::Detach { slot, node });
        }
    }
    moves
}

/// `node` and the members that it needs.
fn before(p: &Planner<'_>, group: &Group, node: NodeId) -> BTreeSet<NodeId> {
    let mut wanted: BTreeSet<ValueId> = p.graph().nodes[node].outputs.iter().copied().collect();
    let mut found = BTreeSet::new();
    for &n in group.nodes.iter().rev() {
        let node = &p.graph().nodes[n];
        if node.outputs.iter().any(|v| wanted.contains(v)) {
            found.insert(n);
            wanted.extend(node.inputs.iter().map(|&v| p.s.seen(v).0));
        }
    }
    found
}

/// `node` and the members that need it.
fn after(p: &Planner<'_>, group: &Group, node: NodeId) -> BTreeSet<NodeId> {
    let mut made: BTreeSet<ValueId> = p.graph().nodes[node].outputs.iter().copied().collect();
    let mut found = BTreeSet::from([node]);
    for &n in &group.nodes {
        let node = &p.graph().nodes[n];
        if node.inputs.iter().any(|&v| made.contains(&p.s.seen(v).0)) {
            found.insert(n);
            made.extend(node.outputs.iter().copied());
        }
    }
    found
}

/// Whether the group that stores a value also reads it itself.
fn kept_inside(p: &Planner<'_>, value: ValueId) -> bool {
    let owner = p.graph().producer(value).and_then(|n| p.owner(n)).and_then(|slot| p.get(slot));
    owner.is_some_and(|owner| {
        let mut inputs = owner.group.nodes.iter().flat_map(|&n| &p.graph().nodes[n].inputs);
        inputs.any(|&v| p.s.seen(v).0 == value)
    })
}

/// Members of a group: its nodes, and those that it only computes again.
fn members(group: &Group) -> (BTreeSet<NodeId>, BTreeSet<NodeId>) {
    (group.nodes.iter().copied().collect(), group.copies.clone())
}

fn minus(a: &BTreeSet<NodeId>, b: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    a.difference(b).copied().collect()
}

impl Move {
    /// Changes the grouping; false when it cannot be (the planner then takes back what was changed).
    pub(crate) fn apply(&self, p: &mut Planner<'_>) -> bool {
        self.attempt(p).unwrap_or(false)
    }

    fn attempt(&self, p: &mut Planner<'_>) -> Option<bool> {
        let open = |p: &Planner<'_>, slot: usize| p.get(slot).filter(|p| !p.fixed).cloned();
        match self {
            Move::Recompute { value, readers, deep } => {
                let maker = p.graph().producer(*value)?;
                let from = p.get(p.owner(maker)?)?.clone();
                let chain: BTreeSet<NodeId> = match deep {
                    true => {
                        let all = before(p, &from.group, maker);
                        all.into_iter().filter(|&n| p.s.is_map(n)).collect()
                    }
                    false => BTreeSet::from([maker]),
                };
                if chain.len() > MOST_COPIED || (*deep && chain.len() == 1) {
                    return Some(false);
                }
                for &reader in readers {
                    let (mut nodes, mut copies) = members(&open(p, reader)?.group);
                    copies.extend(minus(&chain, &nodes));
                    nodes.extend(&chain);
                    if !p.regroup(reader, &nodes, &copies) {
                        return Some(false);
                    }
                }
            }
            Move::Store { slot, node } => {
                let piece = open(p, *slot)?;
                let chain = before(p, &piece.group, *node);
                let (mut nodes, copies) = members(&piece.group);
                if chain.len() == nodes.len() || !chain.iter().all(|&n| p.s.is_map(n)) {
                    return Some(false);
                }
                nodes.remove(node);
                if !p.regroup(*slot, &nodes, &copies) {
                    return Some(false);
                }
                // Somebody may store it already: then it is only read.
                if p.owner(*node).is_none() {
                    let new = p.new_slot();
                    let again = minus(&chain, &BTreeSet::from([*node]));
                    return Some(p.regroup(new, &chain, &again));
                }
            }
            Move::Detach { slot, node } => {
                let piece = open(p, *slot)?;
                let (nodes, copies) = members(&piece.group);
                let end = after(p, &piece.group, *node);
                let rest = minus(&nodes, &end);
                if rest.is_empty() || !end.iter().all(|&n| p.s.is_map(n)) {
                    return Some(false);
                }
                let new = p.new_slot();
                return Some(p.regroup(*slot, &rest, &copies) && p.regroup(new, &end, &copies));
            }
            Move::Rehome { from, node, to } => {
                let (piece, home) = (open(p, *from)?, open(p, *to)?);
                let (nodes, copies) = members(&piece.group);
                let end = after(p, &piece.group, *node);
                if !end.iter().all(|&n| p.s.is_map(n)) {
                    return Some(false);
                }
                let (mut there, there_copies) = members(&home.group);
                // Owned where it was, owned where it goes.
                let owned = minus(&there, &there_copies);
                let mut again = minus(&there_copies, &minus(&end, &copies));
                again.extend(minus(&end, &owned).intersection(&copies));
                there.extend(&end);
                let rest = minus(&nodes, &end);
                return Some(p.regroup(*from, &rest, &copies) && p.regroup(*to, &there, &again));
            }
            Move::Merge { one, other } => {
                let (a, b) = (open(p, *one)?, open(p, *other)?);
                let ((mut nodes, a_copies), (b_nodes, b_copies)) =
                    (members(&a.group), members(&b.group));
                let owned: BTreeSet<NodeId> =
                    minus(&nodes, &a_copies).union(&minus(&b_nodes, &b_copies)).copied().collect();
                nodes.extend(b_nodes);
                let copies = minus(&nodes, &owned);
                let empty = BTreeSet::new();
                return Some(p.regroup(*one, &empty, &empty) && p.regroup(*other, &nodes, &copies));
            }
        }
        Some(true)
    }

    /// The group that the move leaves its nodes in, when that is known beforehand.
    pub(crate) fn goal(&self) -> Option<usize> {
        match self {
            Move::Recompute { readers, .. } => readers.first().copied(),
            Move::Store { slot, .. } | Move::Detach { slot, .. } => Some(*slot),
            Move::Rehome { to, .. } => Some(*to),
            Move::Merge { other, .. } => Some(*other),
        }
    }

    /// In a few words.
    pub(crate) fn describe(&self, p: &Planner<'_>) -> String {
        let graph = p.graph();
        let name = |n: &NodeId| label(&graph.nodes[*n]);
        let kind = |slot: &usize| p.get(*slot).map_or("group", |p| p.group.anchor.name());
        match self {
            Move::Recompute { value, readers, deep } => {
                let maker = graph.producer(*value).as_ref().map_or(String::new(), name);
                let all = readers.len() == p.readers(*value).len() && !p.s.is_asked(*value);
                let chain = if *deep { " and the maps before it" } else { "" };
                match (all && !kept_inside(p, *value), readers.len()) {
                    (true, 1) => format!("move {maker}{chain} into its only reader"),
                    (true, n) => format!("compute {maker}{chain} in each of its {n} readers"),
                    (false, 1) => format!("compute {maker}{chain} here too"),
                    (false, n) => format!("compute {maker}{chain} in {n} readers too"),
                }
            }
            Move::Store { node, .. } => format!("store {}", name(node)),
            Move::Detach { node, .. } => format!("a kernel from {} on", name(node)),
            Move::Rehome { node, to, .. } => {
                format!("{} at the end of the {} before it", name(node), kind(to))
            }
            Move::Merge { one, .. } => format!("one kernel with the {} before it", kind(one)),
        }
    }
}
