//! [`form`]: can these nodes be one kernel, and how do their values lie in it?
//!
//! The reference shape comes from the anchor (or, without one, from the largest value). From there
//! axes are handed along the edges: from operands to results, and from results back to operands
//! that are computed inside. At the end every edge is checked: what is read inside must be read
//! where it stands.

use crate::fuse::{Anchor, AxisMap, Group, is_identity, result_axes, row_axes, scan_in_pieces};
use crate::prologue::{operand_axes, prologues};
use crate::survey::Survey;
use std::collections::{BTreeMap, BTreeSet};
use tilewright_graph::{NodeId, Op, ValueId};
use tilewright_layout::Dim;

/// What a group is built around: kind, reference shape, reduced axes.
type Frame = (Anchor, Vec<Dim>, Vec<usize>);

/// The group of these nodes (in program order), or `None` when they cannot be one kernel. Outputs
/// and estimate are not filled in.
pub(crate) fn form(s: &Survey<'_>, nodes: &[NodeId]) -> Option<Group> {
    let (anchor, shape, reduced) = frame(s, nodes)?;
    // What computes operands of the anchor is a space of its own.
    let prologues = prologues(s, nodes, anchor)?;
    let apart = |n: &NodeId| prologues.iter().any(|p| p.nodes.contains(n));
    let around: Vec<NodeId> = nodes.iter().copied().filter(|n| !apart(n)).collect();
    let mut f = Form::new(s, &around, &shape);
    f.seeds(anchor)?;
    f.hand_along()?;
    if !f.agrees() {
        return None;
    }
    let mut vals = f.vals;
    // Programs of these kinds know their block by single axes.
    let full = |m: &AxisMap| shape.iter().enumerate().all(|(a, d)| d.is(1) || m.contains(&Some(a)));
    let plain = matches!(anchor, Anchor::Map | Anchor::Rows | Anchor::Contract | Anchor::Conv);
    if !plain && !vals.values().all(full) {
        return None;
    }
    for p in &prologues {
        let op = nodes.iter().map(|&n| &s.graph.nodes[n].op);
        let op = op.into_iter().find(|op| matches!(op, Op::Contract { .. } | Op::Conv(_)))?;
        for (v, axes) in &p.vals {
            let of_operand = operand_axes(op, p.operand, p.rank);
            vals.insert(*v, axes.iter().map(|a| a.and_then(|a| of_operand[a])).collect());
        }
    }
    Some(Group {
        prologues,
        anchor,
        nodes: nodes.to_vec(),
        shape,
        reduced,
        outputs: Vec::new(),
        estimate_ns: 0.0,
        reasons: Vec::new(),
        copies: BTreeSet::new(),
        vals,
    })
}

/// Whether a kernel of this group can store the value: every block that holds it holds a part of
/// its own.
pub(crate) fn can_store(group: &Group, v: ValueId) -> bool {
    let Some(axes) = group.vals.get(&v) else { return false };
    if group.prologues.iter().any(|p| p.vals.contains_key(&v)) {
        return false;
    }
    let has = |a: usize| group.shape[a].is(1) || axes.contains(&Some(a));
    let rows: Vec<bool> = group.reduced.iter().map(|&a| has(a)).collect();
    let others = (0..group.shape.len()).filter(|a| !group.reduced.contains(a)).all(has);
    let real = |a: &&usize| !group.shape[**a].is(1);
    let none = group.reduced.iter().filter(real).all(|&a| !has(a));
    others && (rows.iter().all(|&r| r) || none)
}

/// The axes of maps that make `result`, each read where it stands; over the result's axes.
pub(crate) fn in_place(
    s: &Survey<'_>,
    nodes: &[NodeId],
    result: ValueId,
) -> Option<BTreeMap<ValueId, AxisMap>> {
    let shape = s.graph.shape(result).to_vec();
    let mut f = Form::new(s, nodes, &shape);
    f.vals.insert(result, f.identity());
    f.hand_along()?;
    f.agrees().then_some(f.vals)
}

fn frame(s: &Survey<'_>, nodes: &[NodeId]) -> Option<Frame> {
    let graph = s.graph;
    let mut anchor = Anchor::Map;
    let mut found: Option<(Vec<Dim>, Vec<usize>)> = None;
    for &n in nodes {
        let node = &graph.nodes[n];
        let kind = s.anchor(n)?;
        match kind {
            Anchor::Map => {}
            Anchor::Rows => {
                let shape = graph.shape(node.inputs[0]).to_vec();
                let reduced = row_axes(&node.op, shape.len())?;
                // A scan in pieces walks alone.
                let alone = |n: &NodeId| scan_in_pieces(graph, &graph.nodes[*n]);
                if found.is_some() && nodes.iter().any(alone) {
                    return None;
                }
                match &found {
                    None => (anchor, found) = (Anchor::Rows, Some((shape, reduced))),
                    Some(known) if anchor == Anchor::Rows => {
                        if *known != (shape, reduced) {
                            return None;
                        }
                    }
                    Some(_) => return None,
                }
            }
            Anchor::Concat | Anchor::Dims | Anchor::Host => return None,
            _ if found.is_some() => return None,
            _ => {
                anchor = kind;
                found = Some((graph.shape(node.outputs[0]).to_vec(), Vec::new()));
            }
        }
        match node.op {
            // Counters of random numbers want a flat kernel, which operands may cut.
            Op::Random { .. } => return None,
            Op::Map(_) | Op::Pad { .. } | Op::Iota { .. } => {}
            _ if kind == Anchor::Map => return None,
            _ => {}
        }
    }
    let places = |n: &NodeId| matches!(graph.nodes[*n].op, Op::Pad { .. } | Op::Iota { .. });
    if !matches!(anchor, Anchor::Map | Anchor::Rows) && nodes.iter().any(places) {
        return None;
    }
    let (shape, reduced) = match found {
        Some(found) => found,
        None => (graph.shape(largest(s, nodes)?).to_vec(), Vec::new()),
    };
    Some((anchor, shape, reduced))
}

/// The first of the largest results.
fn largest(s: &Survey<'_>, nodes: &[NodeId]) -> Option<ValueId> {
    let outs = nodes.iter().map(|&n| s.graph.nodes[n].outputs[0]);
    outs.fold(None, |best: Option<ValueId>, v| match best {
        Some(b) if s.elements(b) >= s.elements(v) => Some(b),
        _ => Some(v),
    })
}

struct Form<'a, 's> {
    s: &'a Survey<'s>,
    nodes: &'a [NodeId],
    shape: &'a [Dim],
    /// Values computed inside.
    made: BTreeSet<ValueId>,
    vals: BTreeMap<ValueId, AxisMap>,
}

impl<'a, 's> Form<'a, 's> {
    fn new(s: &'a Survey<'s>, nodes: &'a [NodeId], shape: &'a [Dim]) -> Form<'a, 's> {
        let made = nodes.iter().filter_map(|&n| s.graph.nodes[n].outputs.first().copied());
        Form { s, nodes, shape, made: made.collect(), vals: BTreeMap::new() }
    }

    fn identity(&self) -> AxisMap {
        (0..self.shape.len()).map(Some).collect()
    }

    /// Axes that are known from the start; `None` when an anchor would read what is made inside.
    fn seeds(&mut self, anchor: Anchor) -> Option<()> {
        let graph = self.s.graph;
        for &n in self.nodes {
            let node = &graph.nodes[n];
            if matches!(node.op, Op::Map(_)) {
                continue;
            }
            let out = node.outputs[0];
            let rows = self.s.anchor(n) == Some(Anchor::Rows);
            if !rows && self.s.anchor(n) == Some(Anchor::Map) && graph.shape(out) != self.shape {
                return None;
            }
            let axes = result_axes(&node.op, self.shape, graph.shape(out));
            self.vals.insert(out, axes);
            for (i, &v) in node.inputs.iter().enumerate() {
                if rows && i == 0 && self.made.contains(&v) {
                    // A row operator reads its rows as they are.
                    if !self.vals.get(&v).is_none_or(|m| is_identity(m, self.shape)) {
                        return None;
                    }
                    let identity = self.identity();
                    self.vals.entry(v).or_insert(identity);
                } else if self.made.contains(&self.s.root(v)) {
                    return None;
                }
            }
        }
        if anchor == Anchor::Map && self.vals.is_empty() {
            let identity = self.identity();
            self.vals.insert(largest(self.s, self.nodes)?, identity);
        }
        Some(())
    }

    /// Hands axes along the edges until every value has some.
    fn hand_along(&mut self) -> Option<()> {
        let graph = self.s.graph;
        let maps: Vec<NodeId> = self
            .nodes
            .iter()
            .copied()
            .filter(|&n| matches!(graph.nodes[n].op, Op::Map(_)))
            .collect();
        loop {
            let before = self.vals.len();
            for &n in &maps {
                let out = graph.nodes[n].outputs[0];
                if !self.vals.contains_key(&out)
                    && let Some(axes) = self.forward(n)
                {
                    self.vals.insert(out, axes);
                }
            }
            for &n in maps.iter().rev() {
                self.backward(n);
            }
            if self.vals.len() == self.made.len() {
                return Some(());
            }
            if self.vals.len() > before {
                continue;
            }
            // Chains that only meet the others outside, or not at all.
            let missing = self.made.iter().copied().find(|v| !self.vals.contains_key(v))?;
            if graph.shape(missing) != self.shape {
                return None;
            }
            let identity = self.identity();
            self.vals.insert(missing, identity);
        }
    }

    /// A map's axes from those of its operands inside.
    fn forward(&self, n: NodeId) -> Option<AxisMap> {
        let node = &self.s.graph.nodes[n];
        let out = self.s.graph.shape(node.outputs[0]);
        let mut map: AxisMap = vec![None; out.len()];
        let mut any = false;
        for &v in &node.inputs {
            let (base, through) = self.s.seen(v);
            let Some(inside) = self.vals.get(base) else { continue };
            any = true;
            let shift = out.len() - through.len();
            for (i, axis) in through.iter().enumerate() {
                if let Some(reference) = axis.and_then(|a| inside[a]) {
                    map[i + shift].get_or_insert(reference);
                }
            }
        }
        for i in 0..out.len() {
            if map[i].is_none() && !out[i].is(1) {
                if out != self.shape || map.contains(&Some(i)) {
                    return None;
                }
                map[i] = Some(i);
            }
        }
        any.then_some(map)
    }

    /// Axes of a map's operands inside from its own.
    fn backward(&mut self, n: NodeId) {
        let node = &self.s.graph.nodes[n];
        let Some(axes) = self.vals.get(&node.outputs[0]).cloned() else { return };
        for &v in &node.inputs {
            let (base, through) = self.s.seen(v);
            if !self.made.contains(base) || self.vals.contains_key(base) {
                continue;
            }
            let mut map: AxisMap = vec![None; self.s.graph.shape(*base).len()];
            let shift = axes.len() - through.len();
            for (i, axis) in through.iter().enumerate() {
                if let Some(a) = *axis {
                    map[a] = axes[i + shift];
                }
            }
            self.vals.insert(*base, map);
        }
    }

    /// Whether every value runs along axes of its extents, and every reader inside reads it there.
    fn agrees(&self) -> bool {
        let graph = self.s.graph;
        let lies = |(v, map): (&ValueId, &AxisMap)| {
            let shape = graph.shape(*v);
            let distinct: BTreeSet<usize> = map.iter().flatten().copied().collect();
            let extents = map.iter().zip(shape).all(|(m, d)| match m {
                Some(a) => self.shape[*a] == *d,
                None => d.is(1),
            });
            extents && distinct.len() == map.iter().flatten().count()
        };
        self.vals.iter().all(lies) && self.nodes.iter().all(|&n| self.reads_in_place(n))
    }

    fn reads_in_place(&self, n: NodeId) -> bool {
        let node = &self.s.graph.nodes[n];
        if !matches!(node.op, Op::Map(_)) {
            // Seen to with the seeds.
            return true;
        }
        let axes = &self.vals[&node.outputs[0]];
        node.inputs.iter().all(|&v| {
            let (base, through) = self.s.seen(v);
            let Some(inside) = self.vals.get(base) else {
                // Made inside, but seen through a view that moves elements.
                return !self.made.contains(&self.s.root(v));
            };
            let shift = axes.len() - through.len();
            through.iter().enumerate().all(|(i, axis)| {
                let reference = axis.and_then(|a| inside[a]);
                reference.is_none() || reference == axes[i + shift]
            })
        })
    }
}
