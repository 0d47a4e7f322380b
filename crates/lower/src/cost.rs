//! The time model: flops and bytes of a group as expressions over the sizes, and the estimate made
//! from them: the slower of memory and arithmetic, plus the launch.

use crate::block::func_cost;
use crate::fuse::{Anchor, Group, see_through};
use crate::target::CpuTarget;
use crate::views::nominal;
use std::collections::BTreeSet;
use tilewright_graph::{Graph, Node, Op, ValueId};
use tilewright_layout::{Dim, numel};
use tilewright_plan::Note;

/// Floating-point operations of one node.
fn node_flops(graph: &Graph, node: &Node) -> Dim {
    let Some(&out) = node.outputs.first() else { return Dim::new(0) };
    let elements = numel(graph.shape(out));
    let operand = |i: usize| node.inputs.get(i).map(|&v| graph.shape(v)).unwrap_or_default();
    match &node.op {
        Op::Map(func) => elements * func_cost(func),
        Op::Contract { lhs, rhs, out, .. } => {
            let mut product = Dim::new(2);
            let mut seen = BTreeSet::new();
            for (letters, shape) in [(lhs, operand(0)), (rhs, operand(1))] {
                for (letter, extent) in letters.chars().zip(shape) {
                    // The stretched side of a letter has extent 1 and does not count.
                    if !extent.is(1) && seen.insert(letter) {
                        product = product * extent;
                    }
                }
            }
            let _ = out;
            product
        }
        Op::Conv(_) => elements * 2 * numel(&operand(1)[1..]),
        Op::Window(attrs) => elements * attrs.kernel.iter().product::<i64>(),
        Op::Attention(_) => {
            let (q, k, v) = (operand(0), operand(1), operand(2));
            let scores = &(&q[0] * &q[1]) * &(&q[2] * &k[2]);
            &scores * &((&q[3] + &v[3]) * 2 + 16)
        }
        Op::Softmax { .. } => elements * 16,
        Op::LayerNorm { .. } => elements * 8,
        Op::RmsNorm { .. } => elements * 5,
        Op::Reduce { .. } | Op::ArgReduce { .. } => numel(operand(0)),
        Op::Scan { .. } => elements,
        _ => Dim::new(0),
    }
}

fn bytes(graph: &Graph, v: ValueId) -> Dim {
    numel(graph.shape(v)) * graph.dtype(v).size() as i64
}

/// Flops, bytes that must move, bytes that fusion keeps out of memory.
fn totals(graph: &Graph, group: &Group) -> (Dim, Dim, Dim) {
    let (mut flops, mut moved, mut saved) = (Dim::new(0), Dim::new(0), Dim::new(0));
    let mut read = BTreeSet::new();
    for &n in &group.nodes {
        let node = &graph.nodes[n];
        flops = flops + node_flops(graph, node);
        for &v in &node.inputs {
            let (base, _) = see_through(graph, v);
            if group.vals.contains_key(&base) || !read.insert(base) {
                continue;
            }
            // A gather reads as many rows as it writes, not the whole table.
            moved = match (&node.op, group.anchor) {
                (Op::Gather(_), Anchor::Gather) if node.inputs[0] == v => {
                    moved + bytes(graph, node.outputs[0])
                }
                _ => moved + bytes(graph, base),
            };
        }
    }
    for &v in &group.outputs {
        moved = moved + bytes(graph, v);
    }
    for &v in group.vals.keys() {
        if !group.outputs.contains(&v) {
            saved = saved + bytes(graph, v) * 2;
        }
    }
    if group.anchor == Anchor::Attention {
        // The score matrix, written and read by softmax and both products.
        let attention = group.nodes.iter().map(|&n| &graph.nodes[n]);
        for node in attention.filter(|n| matches!(n.op, Op::Attention(_))) {
            let (q, k) = (graph.shape(node.inputs[0]), graph.shape(node.inputs[1]));
            let scores = &(&q[0] * &q[1]) * &(&q[2] * &k[2]);
            saved = saved + scores * (4 * graph.dtype(node.inputs[0]).size() as i64);
        }
    }
    (flops, moved, saved)
}

/// Estimated time of a group at likely sizes, in nanoseconds.
pub(crate) fn estimate_ns(graph: &Graph, target: &CpuTarget, group: &Group) -> f64 {
    let (flops, moved, _) = totals(graph, group);
    let at = |d: &Dim| nominal(d, &graph.symbols) as f64;
    // Matrix work comes near the peak, elementwise chains to about a quarter.
    let share = match group.anchor {
        Anchor::Contract | Anchor::Conv => 0.8,
        Anchor::Attention => 0.5,
        Anchor::Host => 0.002,
        _ => 0.25,
    };
    let compute = at(&flops) / (target.flops_per_second * share);
    let memory = at(&moved) / target.bytes_per_second;
    compute.max(memory) * 1e9 + target.launch_ns
}

/// What `explain` shows of a group.
pub(crate) fn note(graph: &Graph, group: &Group) -> Note {
    let (flops, bytes, bytes_saved) = totals(graph, group);
    let mut nodes: Vec<String> = Vec::new();
    let mut parts: Vec<String> = Vec::new();
    for &n in &group.nodes {
        let node = &graph.nodes[n];
        if !node.origin.is_empty() && nodes.last() != Some(&node.origin) {
            nodes.push(node.origin.clone());
        }
        parts.push(crate::fuse::label(node));
    }
    parts.dedup();
    Note {
        label: parts.join("+"),
        anchor: group.anchor.name().to_string(),
        nodes,
        flops,
        bytes,
        bytes_saved,
        estimate_ns: group.estimate_ns,
    }
}
