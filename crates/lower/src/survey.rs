//! [`Survey`]: what the planner asks about a graph again and again, looked up once.

use crate::Device;
use crate::block::func_cost;
use crate::cost::node_flops;
use crate::fuse::{Anchor, AxisMap, anchor_of, bytes_of, is_view, root, see_through};
use crate::target::CpuTarget;
use crate::views::nominal;
use tilewright_graph::{Def, Graph, NodeId, Op, ValueId};
use tilewright_layout::Dim;

/// A graph with sizes and places of its values; indexed by nodes and values.
pub(crate) struct Survey<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) target: &'a CpuTarget,
    position: Vec<usize>,
    anchors: Vec<Option<Anchor>>,
    work: Vec<f64>,
    seen: Vec<(ValueId, AxisMap)>,
    roots: Vec<ValueId>,
    bytes: Vec<f64>,
    elements: Vec<f64>,
    constant: Vec<bool>,
    asked: Vec<bool>,
    /// Whether kernels may compute operands of products.
    pub(crate) prologues: bool,
    /// Whether kernels are those of a GPU.
    pub(crate) gpu: bool,
    /// Bytes of all constants together.
    pub(crate) constant_bytes: f64,
}

impl<'a> Survey<'a> {
    pub(crate) fn new(graph: &'a Graph, target: &'a CpuTarget, device: Device) -> Survey<'a> {
        let mut position = vec![usize::MAX; graph.nodes.len()];
        graph.order.iter().enumerate().for_each(|(i, n)| position[n.index()] = i);
        // Operands of dead nodes may have changed since their types were checked: nobody asks.
        let live = |n: NodeId| position[n.index()] != usize::MAX;
        let anchor = |op: &Op, n: NodeId| {
            (live(n) && !is_view(op)).then(|| anchor_of(graph, &graph.nodes[n]))
        };
        let seen = |v: ValueId| match graph.producer(v) {
            Some(n) if !live(n) => (v, AxisMap::new()),
            _ => see_through(graph, v),
        };
        let size = |d: &Dim| nominal(d, &graph.symbols) as f64;
        let elements: Vec<f64> =
            graph.values.ids().map(|v| graph.shape(v).iter().map(size).product()).collect();
        let work = |n: NodeId| match &graph.nodes[n].op {
            _ if !live(n) => 0.0,
            Op::Map(func) => func_cost(func) as f64,
            _ => size(&node_flops(graph, &graph.nodes[n])),
        };
        let roots: Vec<ValueId> = graph.values.ids().map(|v| root(graph, v)).collect();
        let mut asked = vec![false; graph.values.len()];
        graph.outputs.iter().for_each(|(_, v)| asked[roots[v.index()].index()] = true);
        let bytes: Vec<f64> = graph.values.ids().map(|v| bytes_of(graph, v)).collect();
        let constant: Vec<bool> = graph
            .values
            .ids()
            .map(|v| matches!(graph.values[roots[v.index()]].def, Def::Const(_)))
            .collect();
        let constants =
            graph.values.ids().filter(|v| matches!(graph.values[*v].def, Def::Const(_)));
        let constant_bytes = constants.map(|v| bytes[v.index()]).sum();
        Survey {
            graph,
            target,
            anchors: graph.nodes.iter().map(|(n, node)| anchor(&node.op, n)).collect(),
            work: graph.nodes.ids().map(work).collect(),
            seen: graph.values.ids().map(seen).collect(),
            position,
            roots,
            bytes,
            elements,
            constant,
            asked,
            prologues: device == Device::Cpu,
            gpu: device == Device::Gpu,
            constant_bytes,
        }
    }

    /// Place in program order.
    pub(crate) fn position(&self, n: NodeId) -> usize {
        self.position[n.index()]
    }

    /// The kind of group that a node starts; `None` for views.
    pub(crate) fn anchor(&self, n: NodeId) -> Option<Anchor> {
        self.anchors[n.index()]
    }

    /// Whether it is a scalar function of its operands: what may be computed twice.
    pub(crate) fn is_map(&self, n: NodeId) -> bool {
        matches!(self.graph.nodes[n].op, Op::Map(_)) && self.anchor(n) == Some(Anchor::Map)
    }

    /// Flops of an anchor; of a map, flops per element.
    pub(crate) fn work(&self, n: NodeId) -> f64 {
        self.work[n.index()]
    }

    /// The value behind views of unit axes, and for each axis of `v` the axis there.
    pub(crate) fn seen(&self, v: ValueId) -> &(ValueId, AxisMap) {
        &self.seen[v.index()]
    }

    /// The value whose memory a chain of views looks at.
    pub(crate) fn root(&self, v: ValueId) -> ValueId {
        self.roots[v.index()]
    }

    /// Bytes at likely sizes.
    pub(crate) fn bytes(&self, v: ValueId) -> f64 {
        self.bytes[v.index()]
    }

    /// Elements at likely sizes.
    pub(crate) fn elements(&self, v: ValueId) -> f64 {
        self.elements[v.index()]
    }

    /// Whether it is a constant, or a view of one.
    pub(crate) fn is_constant(&self, v: ValueId) -> bool {
        self.constant[v.index()]
    }

    /// Whether the model gives this memory to its caller.
    pub(crate) fn is_asked(&self, root: ValueId) -> bool {
        self.asked[root.index()]
    }

    /// A likely extent.
    pub(crate) fn extent(&self, d: &Dim) -> f64 {
        nominal(d, &self.graph.symbols) as f64
    }
}
