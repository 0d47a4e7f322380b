//! Fusion: which nodes become one kernel.
//!
//! [`fuse`] walks the graph once in program order. A contraction, convolution, attention, pooling,
//! gather or row reduction starts a group and is its *anchor*; a map joins the group of an operand
//! where it can (an epilogue), and a row reduction joins a group of maps over its rows (a prologue).
//! Two questions decide, each one function: [`Fuser::axes_in`] (can the node be computed where the
//! group's block stands?) and [`Fuser::reaches`] (would the group have to run before itself?); a
//! third, [`gain_ns`], says what it saves in the time model.
//!
//! A group computes over a *reference shape*: the anchor's result, or the operand of a row
//! reduction. Every value inside knows which reference axis each of its axes runs along. Views that
//! only add, drop or stretch axes of extent 1 are looked through.

use crate::block::func_cost;
use crate::target::CpuTarget;
use crate::views::nominal;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use tilewright_base::DType;
use tilewright_graph::{Graph, Node, NodeId, Op, PadMode, ValueId};
use tilewright_layout::Dim;

/// What a group is built around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Anchor {
    /// Nothing: elementwise only.
    Map,
    /// Reductions over the same axes of one shape, normalisations, softmax.
    Rows,
    /// Pooling.
    Window,
    /// Rows picked by data.
    Gather,
    /// Fused attention.
    Attention,
    /// Convolution.
    Conv,
    /// Contraction.
    Contract,
    /// Joined by storing into slices of one buffer.
    Concat,
    /// Sizes as data.
    Dims,
    /// Runs in the interpreter.
    Host,
}

impl Anchor {
    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Anchor::Map => "map",
            Anchor::Rows => "rows",
            Anchor::Window => "window",
            Anchor::Gather => "gather",
            Anchor::Attention => "attention",
            Anchor::Conv => "conv",
            Anchor::Contract => "contract",
            Anchor::Concat => "concat",
            Anchor::Dims => "dims",
            Anchor::Host => "host",
        }
    }
}

/// For each axis of a value the reference axis along which it runs; `None` for extent 1 and for
/// stretched axes.
pub(crate) type AxisMap = Vec<Option<usize>>;

/// Nodes that become one kernel.
#[derive(Clone, Debug)]
pub struct Group {
    /// What it is built around.
    pub anchor: Anchor,
    /// Its nodes in program order.
    pub nodes: Vec<NodeId>,
    /// The shape over which it computes.
    pub shape: Vec<Dim>,
    /// For row groups: the reference axes that reductions combine.
    pub reduced: Vec<usize>,
    /// Results that somebody outside reads.
    pub outputs: Vec<ValueId>,
    /// Estimated time in nanoseconds at likely sizes.
    pub estimate_ns: f64,
    /// Why nodes joined, one line each.
    pub reasons: Vec<String>,
    /// Values inside, with their axes.
    pub(crate) vals: BTreeMap<ValueId, AxisMap>,
}

/// All groups, in an order in which they can run.
#[derive(Clone, Debug, Default)]
pub struct FusionPlan {
    /// The groups.
    pub groups: Vec<Group>,
    lines: Vec<String>,
}

impl fmt::Display for FusionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// True for operators that only say where elements lie.
pub(crate) fn is_view(op: &Op) -> bool {
    matches!(op, Op::Reshape(_) | Op::Permute(_) | Op::Slice { .. } | Op::Expand(_))
}

/// The value whose memory a chain of views looks at.
pub(crate) fn root(graph: &Graph, mut v: ValueId) -> ValueId {
    while let Some(node) = graph.producer(v) {
        let node = &graph.nodes[node];
        if !is_view(&node.op) {
            break;
        }
        v = node.inputs[0];
    }
    v
}

/// Looks through views that only add, drop or stretch axes of extent 1: the value behind them, and
/// for each axis of `v` the axis there.
pub(crate) fn see_through(graph: &Graph, mut v: ValueId) -> (ValueId, AxisMap) {
    let mut map: AxisMap = (0..graph.shape(v).len()).map(Some).collect();
    while let Some(node) = graph.producer(v) {
        let node = &graph.nodes[node];
        let from = node.inputs.first().copied();
        let step: Option<AxisMap> = match (&node.op, from) {
            (Op::Reshape(to), Some(from)) => unit_reshape(graph.shape(from), to),
            (Op::Expand(to), Some(from)) => {
                let shape = graph.shape(from);
                let lead = to.len() - shape.len();
                Some(
                    (0..to.len())
                        .map(|i| i.checked_sub(lead).filter(|&j| shape[j] == to[i]))
                        .collect(),
                )
            }
            _ => None,
        };
        let (Some(step), Some(from)) = (step, from) else { break };
        map = map.into_iter().map(|a| a.and_then(|a| step[a])).collect();
        v = from;
    }
    (v, map)
}

/// The axes of a reshape that only adds or drops extents of 1.
fn unit_reshape(from: &[Dim], to: &[Dim]) -> Option<AxisMap> {
    let mut old = from.iter().enumerate().filter(|(_, d)| !d.is(1));
    let map: Option<AxisMap> = to
        .iter()
        .map(|d| match d.is(1) {
            true => Some(None),
            false => old.next().filter(|(_, o)| *o == d).map(|(i, _)| Some(i)),
        })
        .collect();
    map.filter(|_| old.next().is_none())
}

/// The axes that a row operator combines.
pub(crate) fn row_axes(op: &Op, rank: usize) -> Option<Vec<usize>> {
    match op {
        Op::Softmax { axis, .. } | Op::ArgReduce { axis, .. } | Op::Scan { axis, .. } => {
            Some(vec![*axis])
        }
        Op::Reduce { axes, .. } => Some(axes.clone()),
        Op::LayerNorm { axis, .. } | Op::RmsNorm { axis, .. } => Some((*axis..rank).collect()),
        _ => None,
    }
}

/// Rows up to this many elements are computed in one pass over a tile that holds them whole.
pub(crate) const WHOLE_ROW: i64 = 32 << 10;

fn is_nibble(dtype: DType) -> bool {
    matches!(dtype, DType::I4 | DType::U4)
}

/// The kind of group that a node starts.
fn anchor_of(graph: &Graph, node: &Node) -> Anchor {
    let nibbles = node.inputs.iter().chain(&node.outputs).any(|&v| is_nibble(graph.dtype(v)));
    if nibbles {
        return Anchor::Host;
    }
    let x_shape = node.inputs.first().map(|&x| graph.shape(x)).unwrap_or_default();
    match &node.op {
        Op::Map(_) | Op::Iota { .. } | Op::Random { .. } => Anchor::Map,
        Op::Pad { mode: PadMode::Constant(_), .. } => Anchor::Map,
        Op::Reduce { axes, .. } if axes.is_empty() => Anchor::Host,
        Op::Reduce { .. } | Op::Softmax { .. } => Anchor::Rows,
        Op::ArgReduce { .. } => Anchor::Rows,
        Op::LayerNorm { .. } | Op::RmsNorm { .. } => Anchor::Rows,
        Op::Scan { axis, .. } => match x_shape[*axis].as_const() {
            Some(n) if n <= WHOLE_ROW => Anchor::Rows,
            _ => Anchor::Host,
        },
        Op::Contract { .. } => Anchor::Contract,
        Op::Conv(attrs) if conv_fits(graph, node, attrs) => Anchor::Conv,
        Op::Window(_) => Anchor::Window,
        Op::Attention(_) if attention_fits(graph, node) => Anchor::Attention,
        Op::Gather(_) => Anchor::Gather,
        Op::Concat(_) => Anchor::Concat,
        Op::Dims(_) => Anchor::Dims,
        _ => Anchor::Host,
    }
}

fn conv_fits(graph: &Graph, node: &Node, attrs: &tilewright_graph::ConvAttrs) -> bool {
    let w = graph.shape(node.inputs[1]);
    let known = w.iter().all(|d| d.as_const().is_some_and(|v| v > 0));
    known && w[0].as_const().is_some_and(|o| o % attrs.groups == 0)
}

fn attention_fits(graph: &Graph, node: &Node) -> bool {
    let (q, k) = (graph.shape(node.inputs[0]), graph.shape(node.inputs[1]));
    let v = graph.shape(node.inputs[2]);
    let small = |d: &Dim| d.as_const().is_some_and(|n| (1..=512).contains(&n));
    let heads = match (q[1].as_const(), k[1].as_const()) {
        (Some(h), Some(g)) => g > 0 && h % g == 0,
        _ => q[1] == k[1],
    };
    small(&q[3]) && small(&v[3]) && heads && q[0] == k[0] && k[0] == v[0]
}

/// Bytes of a value at likely sizes.
pub(crate) fn bytes_of(graph: &Graph, v: ValueId) -> f64 {
    let ty = graph.ty(v);
    let elements: f64 = ty.shape.iter().map(|d| nominal(d, &graph.symbols) as f64).product();
    elements * f64::from(ty.dtype.bits()) / 8.0
}

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
            vals,
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

    /// Order in which groups can run: each after its feeders, otherwise as created.
    fn sorted(&self) -> Vec<usize> {
        let mut done: BTreeSet<usize> = BTreeSet::new();
        let mut order = Vec::new();
        for start in (0..self.groups.len()).filter(|&g| self.groups[g].is_some()) {
            // Depth first, without recursion: a group is emitted once its feeders are.
            let mut stack = vec![start];
            while let Some(&g) = stack.last() {
                if done.contains(&g) {
                    stack.pop();
                    continue;
                }
                let missing: Vec<usize> =
                    self.feeders(g).into_iter().filter(|f| !done.contains(f)).collect();
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

/// Identity up to axes of extent 1.
fn is_identity(map: &AxisMap, shape: &[Dim]) -> bool {
    map.iter().enumerate().all(|(i, m)| m.map_or(shape[i].is(1), |a| a == i))
}

/// The axes of an anchor's result over its reference shape.
fn result_axes(op: &Op, shape: &[Dim], out: &[Dim]) -> AxisMap {
    let (axes, keep) = match op {
        Op::Reduce { axes, keep, .. } => (axes.clone(), *keep),
        Op::ArgReduce { axis, keep, .. } => (vec![*axis], *keep),
        _ => return (0..out.len()).map(Some).collect(),
    };
    let kept = (0..shape.len()).filter(|a| keep || !axes.contains(a));
    kept.map(|a| (!axes.contains(&a)).then_some(a)).collect()
}

/// A short name of a node for labels: `gelu`, `add`, `softmax`.
pub(crate) fn label(node: &Node) -> String {
    match &node.op {
        Op::Map(func) => match func.as_single_op() {
            Some(op) => format!("{op:?}").to_lowercase(),
            None => "map".to_string(),
        },
        Op::Contract { .. } => "contract".to_string(),
        Op::Conv(_) => "conv".to_string(),
        Op::Window(_) => "pool".to_string(),
        Op::Attention(_) => "attention".to_string(),
        Op::Softmax { log, .. } => if *log { "logsoftmax" } else { "softmax" }.to_string(),
        Op::LayerNorm { .. } => "layernorm".to_string(),
        Op::RmsNorm { .. } => "rmsnorm".to_string(),
        Op::Reduce { kind, .. } => format!("{kind:?}").to_lowercase(),
        Op::ArgReduce { kind, .. } => format!("arg{kind:?}").to_lowercase(),
        Op::Scan { kind, .. } => format!("scan{kind:?}").to_lowercase(),
        Op::Gather(_) => "gather".to_string(),
        Op::Pad { .. } => "pad".to_string(),
        Op::Concat(_) => "concat".to_string(),
        Op::Dims(_) => "dims".to_string(),
        Op::Iota { .. } => "iota".to_string(),
        Op::Random { .. } => "random".to_string(),
        Op::Host(host) => host.name.clone(),
        other => {
            let text = format!("{other:?}");
            let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
            text[..end].to_lowercase()
        }
    }
}

/// Groups the nodes of a graph; see the module's head.
pub fn fuse(graph: &Graph, target: &CpuTarget, enabled: bool) -> FusionPlan {
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
    finish(&fuser)
}

fn finish(fuser: &Fuser<'_>) -> FusionPlan {
    let graph = fuser.graph;
    let mut stored: BTreeSet<ValueId> = graph.outputs.iter().map(|o| root(graph, o.1)).collect();
    for (g, group) in fuser.groups.iter().enumerate() {
        let Some(group) = group else { continue };
        for &n in &group.nodes {
            for &v in &graph.nodes[n].inputs {
                let inside = group.vals.contains_key(&see_through(graph, v).0);
                if !(inside && fuser.maker(v) == Some(g)) {
                    stored.insert(root(graph, v));
                }
            }
        }
    }
    let mut plan = FusionPlan::default();
    for (number, g) in fuser.sorted().into_iter().enumerate() {
        let mut group = fuser.group(g).clone();
        group.nodes.sort_unstable_by_key(|n| graph.order.iter().position(|o| o == n));
        let made = group.nodes.iter().flat_map(|&n| graph.nodes[n].outputs.clone());
        group.outputs = match group.anchor {
            Anchor::Host | Anchor::Concat | Anchor::Dims => made.collect(),
            _ => made.filter(|v| stored.contains(v)).collect(),
        };
        let names: Vec<String> = group.nodes.iter().map(|&n| label(&graph.nodes[n])).collect();
        plan.lines.push(format!("{number}: {} [{}]", group.anchor.name(), names.join(" ")));
        plan.lines.extend(group.reasons.iter().map(|r| format!("     {r}")));
        plan.groups.push(group);
    }
    plan
}
