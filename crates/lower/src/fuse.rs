//! Fusion: which nodes become one kernel.
//!
//! ```text
//! graph --greedy--> a first grouping --planner--> the grouping of least estimated time
//!                   (fuse whenever legal)  (moves: recompute, store, detach, merge ...)
//! ```
//!
//! A group computes over a *reference shape*: the anchor's result, or the operand of a row
//! reduction. Every value inside knows which reference axis each of its axes runs along. Views that
//! only add, drop or stretch axes of extent 1 are looked through. [`form`](crate::form) says whether
//! a set of nodes can be one group; a node may be computed in several groups, and one of them (its
//! owner) stores the result when somebody reads it from memory.
//!
//! `greedy` makes the first grouping, `moves` lists what could be different, `cost` estimates, and
//! `planner` searches. [`FusionPlan`] prints the groups with what was considered.

use crate::Device;
use crate::greedy::greedy;
use crate::planner::{Planner, Verdict};
use crate::prologue::Prologue;
use crate::survey::Survey;
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

/// Which grouping is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Every node is a kernel of its own (to find what a fusion breaks).
    Apart,
    /// Fused whenever it can be, as the program comes: where the search starts.
    Greedy,
    /// The one of least estimated time.
    #[default]
    Fastest,
    /// Some legal one, by this number: for tests.
    Any(u64),
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
    /// Nodes that other groups compute, too: no result of theirs is stored from here.
    pub copies: BTreeSet<NodeId>,
    /// Which of its nodes compute operands of the anchor.
    pub(crate) prologues: Vec<Prologue>,
    /// Values inside, with their axes.
    pub(crate) vals: BTreeMap<ValueId, AxisMap>,
}

/// All groups, in an order in which they can run.
#[derive(Clone, Debug, Default)]
pub struct FusionPlan {
    /// The groups.
    pub groups: Vec<Group>,
    /// Estimated time of the greedy grouping, in nanoseconds.
    pub greedy_ns: f64,
    /// Estimated time of this grouping, in nanoseconds.
    pub estimate_ns: f64,
    /// Alternatives whose time was estimated.
    pub considered: usize,
    /// What is different from the greedy grouping, one line each.
    pub decisions: Vec<String>,
    /// Transposed operands: copied or read as they lie, one line each, with the estimated times.
    pub views: Vec<String>,
    lines: Vec<String>,
}

impl FusionPlan {
    /// In one line: estimated time, that of the greedy grouping, how much was considered.
    pub fn summary(&self) -> &str {
        self.lines.first().map_or("", String::as_str)
    }
}

impl fmt::Display for FusionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().chain(&self.views).try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// True for operators that only say where elements lie.
pub fn is_view(op: &Op) -> bool {
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

/// Whether a scan's rows are too long for a tile, or of unknown length.
pub(crate) fn scan_in_pieces(graph: &Graph, node: &Node) -> bool {
    let Op::Scan { axis, .. } = &node.op else { return false };
    let shape = node.inputs.first().map(|&x| graph.shape(x)).unwrap_or_default();
    shape[*axis].as_const().is_none_or(|n| n > WHOLE_ROW)
}

/// The kind of group that a node starts.
pub(crate) fn anchor_of(graph: &Graph, node: &Node) -> Anchor {
    if matches!(node.op, Op::GroupProduct { .. }) {
        let fits = crate::group_product::fits(graph, node);
        return if fits { Anchor::Contract } else { Anchor::Host };
    }
    let nibbles = node.inputs.iter().chain(&node.outputs).any(|&v| is_nibble(graph.dtype(v)));
    if nibbles {
        return Anchor::Host;
    }
    match &node.op {
        Op::Map(_) | Op::Iota { .. } | Op::Random { .. } => Anchor::Map,
        Op::Pad { mode: PadMode::Constant(_), .. } => Anchor::Map,
        Op::Reduce { axes, .. } if axes.is_empty() => Anchor::Host,
        Op::Reduce { .. } | Op::Softmax { .. } => Anchor::Rows,
        Op::ArgReduce { .. } => Anchor::Rows,
        Op::LayerNorm { .. } | Op::RmsNorm { .. } => Anchor::Rows,
        // From the end, the length of what is left must be known.
        Op::Scan { reverse: true, .. } if scan_in_pieces(graph, node) => Anchor::Host,
        Op::Scan { .. } => Anchor::Rows,
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

/// Identity up to axes of extent 1.
pub(crate) fn is_identity(map: &AxisMap, shape: &[Dim]) -> bool {
    map.iter().enumerate().all(|(i, m)| m.map_or(shape[i].is(1), |a| a == i))
}

/// The axes of an anchor's result over its reference shape.
pub(crate) fn result_axes(op: &Op, shape: &[Dim], out: &[Dim]) -> AxisMap {
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

/// Groups the nodes of a graph for a device; see the module's head. `prologues`: products may compute their operands.
pub fn fuse(
    graph: &Graph,
    target: &CpuTarget,
    choice: Choice,
    device: Device,
    prologues: bool,
) -> FusionPlan {
    let mut survey = Survey::new(graph, target, device);
    survey.prologues = prologues;
    let first = greedy(graph, target, choice != Choice::Apart);
    let mut planner = Planner::new(&survey, first);
    let greedy_ns = planner.total_ns();
    match choice {
        Choice::Apart | Choice::Greedy => {}
        Choice::Fastest => planner.search(),
        Choice::Any(seed) => planner.scramble(seed),
    }
    finish(&planner, greedy_ns)
}

/// The groups in the order in which they can run, with their lines for people.
fn finish(planner: &Planner<'_>, greedy_ns: f64) -> FusionPlan {
    let graph = planner.graph();
    let verdict = planner.verdict();
    let mut plan = FusionPlan {
        greedy_ns,
        estimate_ns: planner.total_ns(),
        considered: planner.considered(),
        ..FusionPlan::default()
    };
    plan.lines.push(format!(
        "estimated {} (greedy: {}); {} alternatives, {} taken",
        time(plan.estimate_ns),
        time(greedy_ns),
        plan.considered,
        verdict.iter().filter(|v| matches!(v, (_, Verdict::Taken(_)))).count(),
    ));
    let order = planner.sorted();
    let mut computed: BTreeMap<NodeId, usize> = BTreeMap::new();
    let everywhere = order.iter().flat_map(|&slot| &planner.group(slot).nodes);
    everywhere.for_each(|n| *computed.entry(*n).or_default() += 1);
    for (number, slot) in order.into_iter().enumerate() {
        let mut group = planner.group(slot).clone();
        group.copies.retain(|n| computed[n] > 1);
        let again = |n: &NodeId| if computed[n] > 1 { "*" } else { "" };
        let names: Vec<String> = group
            .nodes
            .iter()
            .map(|n| format!("{}{}", label(&graph.nodes[*n]), again(n)))
            .collect();
        plan.lines.push(format!(
            "{number}: {} [{}] {}",
            group.anchor.name(),
            names.join(" "),
            time(group.estimate_ns)
        ));
        for p in &group.prologues {
            let names: Vec<String> = p.nodes.iter().map(|n| label(&graph.nodes[*n])).collect();
            plan.lines.push(format!(
                "     prologue: {} compute{} operand {}",
                names.join(" "),
                if names.len() == 1 { "s" } else { "" },
                p.operand
            ));
        }
        plan.lines.extend(group.reasons.iter().map(|r| format!("     {r}")));
        for (_, said) in verdict.iter().filter(|(s, _)| *s == slot) {
            match said {
                Verdict::Taken(line) => {
                    plan.decisions.push(line.clone());
                    plan.lines.push(format!("     taken: {line}"));
                }
                Verdict::Refused(line) => plan.lines.push(format!("     not: {line}")),
            }
        }
        plan.groups.push(group);
    }
    plan
}

/// Nanoseconds for people.
pub(crate) fn time(ns: f64) -> String {
    match ns {
        ns if ns >= 1e6 => format!("{:.2} ms", ns * 1e-6),
        ns if ns >= 1e4 => format!("{:.1} us", ns * 1e-3),
        ns => format!("{:.2} us", ns * 1e-3),
    }
}
