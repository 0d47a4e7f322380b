//! The greedy grouping: where the planner starts.
//!
//! [`greedy`] walks the graph once in program order. A contraction, convolution, attention, pooling,
//! gather or row reduction starts a group and is its *anchor*; a map joins the group of an operand
//! where it can (an epilogue), and a row reduction joins a group of maps over its rows (a prologue).
//! Two questions decide, each one function: [`Fuser::axes_in`] (can the node be computed where the
//! group's block stands?) and [`Fuser::reaches`] (would the group have to run before itself?); a
//! third, [`gain_ns`], says what it saves.

use crate::block::func_cost;
use crate::fuse::{
    Anchor, AxisMap, Group, anchor_of, bytes_of, is_identity, is_view, label, result_axes, root,
    row_axes, see_through,
};
use crate::target::CpuTarget;
use std::collections::{BTreeMap, BTreeSet};
use tilewright_graph::{Graph, Node, NodeId, Op, ValueId};

/// What computing `node` inside the group of its operand saves in the time model: the operand is
/// not read again, not written either when nobody else reads it, and a launch goes away; what it
/// costs: maps that are computed once per pass over long rows.
fn gain_ns(
    graph: &Graph,
    target: &CpuTarget,
    operand: ValueId,
    readers: usize,
    node: &Node,
) -> f64 {
    let bytes = bytes_of(graph, operand) * if readers == 1 { 2.0 } else { 1.0 };
    let saved = bytes / target.bytes_per_second * 1e9 + target.launch_ns;
    let again = match &node.op {
        Op::Map(func) => {
            let elements = bytes_of(graph, node.outputs[0])
                / (f64::from(graph.dtype(node.outputs[0]).bits()) / 8.0);
            // At most one more evaluation on average; most chains are computed once.
            0.1 * elements * func_cost(func) as f64 / target.flops_per_second * 1e9
        }
        _ => 0.0,
    };
    saved - again
}

struct Fuser<'a> {
    graph: &'a Graph,
    target: &'a CpuTarget,
    groups: Vec<Option<Group>>,
    group_of: BTreeMap<NodeId, usize>,
    readers: Vec<usize>,
}

impl Fuser<'_> {
    fn group(&self, g: usize) -> &Group {
        self.groups[g].as_ref().expect("a merged group is not asked for")
    }

    /// The group that computes the memory behind a value.
    fn maker(&self, v: ValueId) -> Option<usize> {
        let node = self.graph.producer(root(self.graph, v))?;
        self.group_of.get(&node).copied()
    }

    /// Groups that make what `g` reads.
    fn feeders(&self, g: usize) -> BTreeSet<usize> {
        let group = self.group(g);
        let inputs = group.nodes.iter().flat_map(|&n| &self.graph.nodes[n].inputs);
        inputs.filter_map(|&v| self.maker(v)).filter(|&f| f != g).collect()
    }

    /// Whether `goal` runs before one of `from` (or is one of them).
    fn reaches(&self, from: impl IntoIterator<Item = usize>, goal: usize) -> bool {
        let mut stack: Vec<usize> = from.into_iter().collect();
        let mut seen: BTreeSet<usize> = stack.iter().copied().collect();
        while let Some(g) = stack.pop() {
            if g == goal {
                return true;
            }
            for f in self.feeders(g) {
                if seen.insert(f) {
                    stack.push(f);
                }
            }
        }
        false
    }

    /// The axes of a map's result over the reference axes of a group, when the group can compute
    /// it: operands inside run along agreeing axes, and every axis is known.
    fn axes_in(&self, group: &Group, node: &Node) -> Option<AxisMap> {
        let out = self.graph.shape(node.outputs[0]);
        let mut map: AxisMap = vec![None; out.len()];
        for &v in &node.inputs {
            let (base, through) = see_through(self.graph, v);
            let Some(inside) = group.vals.get(&base) else { continue };
            let shift = out.len() - through.len();
            for (i, axis) in through.iter().enumerate() {
                let Some(reference) = axis.and_then(|a| inside[a]) else { continue };
                match map[i + shift] {
                    Some(known) if known != reference => return None,
                    _ => map[i + shift] = Some(reference),
                }
            }
        }
        for i in 0..out.len() {
            if map[i].is_none() && !out[i].is(1) {
                if out != group.shape.as_slice() || map.contains(&Some(i)) {
                    return None;
                }
                map[i] = Some(i);
            }
        }
        let extents = map.iter().zip(out).all(|(m, d)| m.is_none_or(|a| group.shape[a] == *d));
        let distinct: BTreeSet<usize> = map.iter().flatten().copied().collect();
        (extents && distinct.len() == map.iter().flatten().count()).then_some(map)
    }

    /// Whether every operand of `node` is either inside `g` where it can be seen, or made before.
    fn legal(&self, g: usize, node: &Node) -> bool {
        let mut outside = BTreeSet::new();
        for &v in &node.inputs {
            let (base, _) = see_through(self.graph, v);
            if self.group(g).vals.contains_key(&base) {
                continue;
            }
            match self.maker(v) {
                Some(f) if f == g => return false,
                Some(f) => {
                    outside.insert(f);
                }
                None => {}
            }
        }
        !self.reaches(outside, g)
    }

    fn join(&mut self, g: usize, id: NodeId, axes: AxisMap, why: String) {
        let out = self.graph.nodes[id].outputs[0];
        let group = self.groups[g].as_mut().expect("joins a live group");
        group.nodes.push(id);
        group.vals.insert(out, axes);
        group.reasons.push(why);
        self.group_of.insert(id, g);
    }

    fn start(&mut self, id: NodeId, anchor: Anchor) {
        let node = &self.graph.nodes[id];
        let mut vals = BTreeMap::new();
        let (mut shape, mut reduced) = (Vec::new(), Vec::new());
        if let Some(&out) = node.outputs.first() {
            shape = self.graph.shape(out).to_vec();
            let fused = !matches!(anchor, Anchor::Concat | Anchor::Dims | Anchor::Host);
            if anchor == Anchor::Rows {
                shape = self.graph.shape(node.inputs[0]).to_vec();
                reduced = row_axes(&node.op, shape.len()).unwrap_or_default();
            }
            if fused {
                vals.insert(out, result_axes(&node.op, &shape, self.graph.shape(out)));
            }
        }
        self.group_of.insert(id, self.groups.len());
        self.groups.push(Some(Group {
            anchor,
            nodes: vec![id],
            shape,
            reduced,
            outputs: Vec::new(),
            estimate_ns: 0.0,
            reasons: Vec::new(),
            prologues: Vec::new(),
            vals,
            copies: BTreeSet::new(),
        }));
    }

    /// Groups that could take the node, the most rewarding first.
    fn candidates(&self, node: &Node) -> Vec<(usize, ValueId)> {
        let mut found: Vec<(usize, ValueId)> = Vec::new();
        for &v in &node.inputs {
            let (base, _) = see_through(self.graph, v);
            if let Some(g) = self.maker(v)
                && self.group(g).vals.contains_key(&base)
                && found.iter().all(|f| f.0 != g)
            {
                found.push((g, base));
            }
        }
        found.sort_by_key(|f| std::cmp::Reverse((self.group(f.0).anchor, f.0)));
        found
    }

    fn place_map(&mut self, id: NodeId) {
        let node = &self.graph.nodes[id];
        for (g, operand) in self.candidates(node) {
            let Some(axes) = self.axes_in(self.group(g), node) else { continue };
            let gain =
                gain_ns(self.graph, self.target, operand, self.readers[operand.index()], node);
            if gain <= 0.0 || !self.legal(g, node) {
                continue;
            }
            self.join(g, id, axes, format!("{}: epilogue, saves {gain:.0} ns", label(node)));
            self.absorb_maps(g, id);
            return;
        }
        self.start(id, Anchor::Map);
        self.absorb_maps(self.groups.len() - 1, id);
    }

    fn place_rows(&mut self, id: NodeId) {
        let node = &self.graph.nodes[id];
        let x = node.inputs[0];
        let shape = self.graph.shape(x);
        let reduced = row_axes(&node.op, shape.len()).unwrap_or_default();
        let whole = |group: &Group| group.vals.get(&x).is_some_and(|m| is_identity(m, shape));
        if let Some(g) = self.maker(x) {
            let group = self.group(g);
            let compatible = match group.anchor {
                Anchor::Map => group.shape == shape && !self.counts(group),
                Anchor::Rows => group.reduced == reduced && group.shape == shape,
                _ => false,
            };
            if compatible && whole(group) && self.legal(g, node) {
                let axes = result_axes(&node.op, shape, self.graph.shape(node.outputs[0]));
                let gain = gain_ns(self.graph, self.target, x, self.readers[x.index()], node);
                self.join(g, id, axes, format!("{}: rows, saves {gain:.0} ns", label(node)));
                let group = self.groups[g].as_mut().expect("joins a live group");
                group.anchor = Anchor::Rows;
                group.reduced = reduced;
                return;
            }
        }
        self.start(id, Anchor::Rows);
        // Another reduction over the same rows of the same operand shares the pass.
        let me = self.groups.len() - 1;
        let other = (0..me).rev().find(|&g| {
            self.groups[g].as_ref().is_some_and(|group| {
                group.anchor == Anchor::Rows
                    && group.reduced == reduced
                    && group.shape == shape
                    && group.nodes.iter().any(|&n| self.graph.nodes[n].inputs.contains(&x))
            })
        });
        if let Some(g) = other
            && self.legal(g, &self.graph.nodes[id])
        {
            self.groups.pop();
            let axes = result_axes(
                &self.graph.nodes[id].op,
                shape,
                self.graph.shape(self.graph.nodes[id].outputs[0]),
            );
            let why = format!("{}: reads the same rows", label(&self.graph.nodes[id]));
            self.join(g, id, axes, why);
        }
    }

    /// Random numbers count positions of the whole tensor: such a group stays flat.
    fn counts(&self, group: &Group) -> bool {
        group.nodes.iter().any(|&n| matches!(self.graph.nodes[n].op, Op::Random { .. }))
    }

    /// Padding and counters know single axes: they stay out of groups that merge axes at will.
    fn has_places(&self, group: &Group) -> bool {
        let mut ops = group.nodes.iter().map(|&n| &self.graph.nodes[n].op);
        ops.any(|op| matches!(op, Op::Pad { .. } | Op::Iota { .. }))
    }

    /// Merges groups of maps that only feed `g` into it, where `id` reads them.
    fn absorb_maps(&mut self, g: usize, id: NodeId) {
        let inputs = self.graph.nodes[id].inputs.clone();
        for v in inputs {
            let Some(f) = self.maker(v).filter(|&f| f != g) else { continue };
            let (from, into) = (self.group(f), self.group(g));
            let fits = from.anchor == Anchor::Map
                && from.shape == into.shape
                && !self.counts(from)
                && !self.counts(into)
                && (matches!(into.anchor, Anchor::Map | Anchor::Rows) || !self.has_places(from))
                && from.vals.contains_key(&see_through(self.graph, v).0)
                && from.vals.iter().all(|(v, m)| is_identity(m, self.graph.shape(*v)));
            if !fits {
                continue;
            }
            // Whoever reads these values in the group must read them where it stands: maps along
            // the axes that they were placed on, row operators as the whole row; an anchor of
            // another kind reads memory.
            let mut probe = into.clone();
            probe.vals.extend(from.vals.clone());
            let aligned = into.nodes.iter().all(|&n| {
                let node = &self.graph.nodes[n];
                let hidden = node.inputs.iter().any(|&v| {
                    self.maker(v) == Some(f)
                        && !from.vals.contains_key(&see_through(self.graph, v).0)
                });
                if hidden {
                    return false;
                }
                let mut reads = node
                    .inputs
                    .iter()
                    .enumerate()
                    .filter(|(_, v)| from.vals.contains_key(&see_through(self.graph, **v).0));
                match node.op {
                    Op::Map(_) => {
                        reads.next().is_none()
                            || self.axes_in(&probe, node).as_ref()
                                == into.vals.get(&node.outputs[0])
                    }
                    _ if into.anchor == Anchor::Rows && row_axes(&node.op, 0).is_some() => {
                        reads.all(|(i, v)| i == 0 && from.vals.contains_key(v))
                    }
                    _ => reads.next().is_none(),
                }
            });
            let between = {
                let mut others = self.feeders(g);
                others.remove(&f);
                self.reaches(others, f) || self.reaches(self.feeders(f), g)
            };
            if !aligned || between {
                continue;
            }
            let from = self.groups[f].take().expect("checked above");
            for &n in &from.nodes {
                self.group_of.insert(n, g);
            }
            let into = self.groups[g].as_mut().expect("checked above");
            into.nodes.extend(from.nodes);
            into.nodes.sort_unstable();
            into.vals.extend(from.vals);
            into.reasons.extend(from.reasons);
            into.reasons.push("maps that feed it: prologue".to_string());
        }
    }
}

/// Groups the nodes of a graph, in order of their creation; see the module's head.
pub(crate) fn greedy(graph: &Graph, target: &CpuTarget, enabled: bool) -> Vec<Group> {
    let readers = vec![0; graph.values.len()];
    let mut fuser = Fuser { graph, target, groups: Vec::new(), group_of: BTreeMap::new(), readers };
    for (_, node) in graph.live() {
        for &v in &node.inputs {
            fuser.readers[see_through(graph, v).0.index()] += 1;
        }
    }
    for (_, v) in &graph.outputs {
        fuser.readers[root(graph, *v).index()] += 1;
    }
    for (id, node) in graph.live() {
        if is_view(&node.op) {
            continue;
        }
        match (anchor_of(graph, node), &node.op) {
            (Anchor::Map, Op::Map(_)) if enabled => fuser.place_map(id),
            (Anchor::Rows, _) if enabled => fuser.place_rows(id),
            (anchor, _) => fuser.start(id, anchor),
        }
    }
    let mut groups: Vec<Group> = fuser.groups.into_iter().flatten().collect();
    let position: BTreeMap<NodeId, usize> =
        graph.order.iter().enumerate().map(|(i, &n)| (n, i)).collect();
    for group in &mut groups {
        group.nodes.sort_unstable_by_key(|n| position[n]);
    }
    groups
}
