//! Chooses where elements lie in memory.
//!
//! A layout is data about a value, never an operator: this file fills the table [`Layouts`] and
//! leaves the graph as it is. A value that is not in the table is row-major.
//!
//! Activations between convolutions get their channels in blocks of one vector (`nChw16c`), because
//! a convolution's micro-kernel computes a vector of output channels at a time. The rules, by the
//! operator that makes a value or reads it:
//!
//! | operator | its result may be blocked | it can read blocked operands |
//! |---|---|---|
//! | convolution | yes, when its output channels fill a block | yes, when groups respect blocks |
//! | map | yes, when an operand of the full shape is | yes |
//! | window | yes, when its operand is | yes |
//! | concat of channels | yes, when all operands are, and fill whole blocks | yes, likewise |
//! | sum, max.. over spatial axes | yes, when kept and its operand is | yes |
//! | anything else | no | no |
//!
//! Graph inputs and outputs are row-major: the caller reads and writes them. A value that some
//! reader cannot read blocked is row-major. So blocking starts and ends inside a convolution (which
//! reads and writes either way) and costs no pass over memory of its own. The table is the
//! greatest one that these rules allow: start with everything that may be blocked, take back what
//! breaks a rule, until nothing changes.

use crate::manager::PassContext;
use std::collections::{BTreeMap, BTreeSet};
use tilewright_graph::{Graph, Node, Op, ValueId};
use tilewright_layout::Layout;

/// Layouts of values that are not row-major.
pub type Layouts = BTreeMap<ValueId, Layout>;

/// Layouts for all values of a graph, weights included; see the module's head.
pub fn choose_layouts(graph: &Graph, ctx: &PassContext) -> Layouts {
    let mut layouts: Layouts = blocked_values(graph, ctx.vector_lanes)
        .into_iter()
        .map(|v| (v, Layout::blocked(graph.shape(v), 1, ctx.vector_lanes)))
        .collect();
    crate::pack_weights::pack(graph, ctx, &mut layouts);
    layouts
}

/// Data `[N, C, spatial...]` with a known number of channels that fills a block.
fn has_channels(graph: &Graph, v: ValueId, lanes: i64) -> bool {
    let shape = graph.shape(v);
    shape.len() >= 3 && shape[1].as_const().is_some_and(|c| c >= lanes)
}

fn whole_blocks(graph: &Graph, v: ValueId, lanes: i64) -> bool {
    graph.shape(v)[1].as_const().is_some_and(|c| c % lanes == 0)
}

fn blocked_values(graph: &Graph, lanes: i64) -> BTreeSet<ValueId> {
    let mut blocked: BTreeSet<ValueId> = BTreeSet::new();
    for (_, node) in graph.live() {
        for &v in &node.outputs {
            let kind = matches!(
                node.op,
                Op::Conv(_) | Op::Map(_) | Op::Window(_) | Op::Concat(1) | Op::Reduce { .. }
            );
            if kind && lanes > 1 && has_channels(graph, v, lanes) && !graph.is_output(v) {
                blocked.insert(v);
            }
        }
    }
    loop {
        let before = blocked.len();
        for (_, node) in graph.live() {
            let Some(&out) = node.outputs.first() else { continue };
            if blocked.contains(&out) && !may_make(graph, node, &blocked, lanes) {
                blocked.remove(&out);
            }
            for &v in &node.inputs {
                if blocked.contains(&v) && !may_read(graph, node, v, &blocked, lanes) {
                    blocked.remove(&v);
                }
            }
        }
        if blocked.len() == before {
            return blocked;
        }
    }
}

/// Whether the node can write its result blocked, given what its operands are.
fn may_make(graph: &Graph, node: &Node, blocked: &BTreeSet<ValueId>, lanes: i64) -> bool {
    let out = node.outputs[0];
    match &node.op {
        Op::Conv(attrs) => {
            let channels = graph.shape(out)[1].as_const().unwrap_or(0);
            // Grouped: each group's outputs fill whole blocks, or the convolution is depthwise.
            attrs.groups == 1 || channels == attrs.groups || (channels / attrs.groups) % lanes == 0
        }
        Op::Map(_) => {
            let full: Vec<ValueId> = node
                .inputs
                .iter()
                .copied()
                .filter(|&v| graph.shape(v) == graph.shape(out))
                .collect();
            !full.is_empty() && full.iter().all(|v| blocked.contains(v))
        }
        Op::Window(_) => blocked.contains(&node.inputs[0]),
        Op::Concat(1) => {
            node.inputs.iter().all(|v| blocked.contains(v) && whole_blocks(graph, *v, lanes))
        }
        Op::Reduce { axes, keep, .. } => {
            *keep && axes.iter().all(|&a| a >= 2) && blocked.contains(&node.inputs[0])
        }
        _ => false,
    }
}

/// Whether the node can read this operand blocked.
fn may_read(
    graph: &Graph,
    node: &Node,
    v: ValueId,
    blocked: &BTreeSet<ValueId>,
    lanes: i64,
) -> bool {
    match &node.op {
        Op::Conv(attrs) => {
            let channels = graph.shape(v)[1].as_const().unwrap_or(0);
            v == node.inputs[0]
                && v != node.inputs[1]
                && (attrs.groups == 1
                    || channels == attrs.groups
                    || (channels / attrs.groups) % lanes == 0)
        }
        // An elementwise kernel walks one layout: its result's.
        Op::Map(_) => blocked.contains(&node.outputs[0]),
        Op::Window(_) | Op::Concat(1) => blocked.contains(&node.outputs[0]),
        // A reduction over whole planes writes any order.
        Op::Reduce { axes, .. } => axes.iter().all(|&a| a >= 2),
        _ => false,
    }
}
