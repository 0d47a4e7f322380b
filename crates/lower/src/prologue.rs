//! Prologues: maps that compute an operand of a product block by block, inside its kernel.
//!
//! ```text
//! for k: acc = mma(acc, prologue(X[m.., k..], gate[k..], ...), W[k.., n..])
//! ```
//!
//! A prologue has a space of its own, the operand's axes: the result's axes do not have the summed ones. So it is
//! a small group beside the one around the anchor ([`prologues`] finds it, for [`form`](crate::form)), and a [`Dag`]
//! of its own ([`Lowering::computed_side`]). The operand never lies in memory: no other group reads it, and each block
//! of the result's other axis computes it again, which `cost` counts.
//!
//! Products of a GPU compute left operands of 16 bits, from one tensor of the operand's shape and others that vary along the depth and a batch
//! alone ([`taken_by_gpu`]): the scale of a channel (squeeze and excitation), a norm's scale and shift. Which of their kernels does so, and
//! whether it is better done apart, is decided when the sizes are known (`gemm/computed.rs` of `kernels`).

use crate::block::{Dag, DagOp, Emit, KernelParts};
use crate::contract::Side;
use crate::form::in_place;
use crate::fuse::{Anchor, AxisMap, Group};
use crate::lowering::Lowering;
use crate::survey::Survey;
use crate::views::{broadcast_axis, is_broadcast};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{Error, Result};
use tilewright_graph::{Node, NodeId, Op, ValueId};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Operand, TileId};

/// The part of a group that computes an operand of its anchor.
#[derive(Clone, Debug)]
pub(crate) struct Prologue {
    /// Which operand.
    pub(crate) operand: usize,
    /// Its nodes in program order; the last one makes the operand.
    pub(crate) nodes: Vec<NodeId>,
    /// The operand's number of axes.
    pub(crate) rank: usize,
    /// Values inside; axes are those of the operand.
    pub(crate) vals: BTreeMap<ValueId, AxisMap>,
}

/// An operand that a kernel computes.
#[derive(Clone)]
pub(crate) struct Computed {
    /// Over the space of the product.
    pub(crate) dag: Dag,
    /// The node that is the operand.
    pub(crate) node: usize,
}

/// Which of a group's nodes compute operands of its anchor; `None` when something else would read what they
/// make, or read it elsewhere than it stands.
pub(crate) fn prologues(s: &Survey<'_>, nodes: &[NodeId], anchor: Anchor) -> Option<Vec<Prologue>> {
    if !matches!(anchor, Anchor::Contract | Anchor::Conv) {
        return Some(Vec::new());
    }
    let graph = s.graph;
    let at = *nodes.iter().find(|&&n| s.anchor(n) == Some(anchor))?;
    let made: BTreeMap<ValueId, NodeId> =
        nodes.iter().filter(|&&n| s.is_map(n)).map(|&n| (graph.nodes[n].outputs[0], n)).collect();
    let mut found: Vec<Prologue> = Vec::new();
    for (operand, v) in graph.nodes[at].inputs.iter().enumerate() {
        if !made.contains_key(v) {
            continue;
        }
        if !s.prologues || !takes(s, &graph.nodes[at], operand) {
            return None;
        }
        let mut wanted = BTreeSet::from([*v]);
        let mut chain: Vec<NodeId> = Vec::new();
        for &n in nodes.iter().rev() {
            let out = graph.nodes[n].outputs[0];
            if made.contains_key(&out) && wanted.contains(&out) {
                chain.push(n);
                wanted.extend(graph.nodes[n].inputs.iter().map(|&v| s.seen(v).0));
            }
        }
        chain.reverse();
        let own: BTreeSet<ValueId> = chain.iter().map(|&n| graph.nodes[n].outputs[0]).collect();
        let others = nodes.iter().filter(|n| !chain.contains(n));
        for &n in others {
            for (i, &read) in graph.nodes[n].inputs.iter().enumerate() {
                let as_operand = (n, i, read) == (at, operand, *v);
                if own.contains(&s.root(read)) && !as_operand {
                    return None;
                }
            }
        }
        if s.gpu && !taken_by_gpu(s, &graph.nodes[at], operand, &chain) {
            return None;
        }
        let vals = in_place(s, &chain, *v)?;
        found.push(Prologue { operand, rank: graph.shape(*v).len(), nodes: chain, vals });
    }
    Some(found)
}

/// Whether a kernel of a GPU takes such an operand: what it is computed from is one tensor of its shape, and others that vary along the depth
/// and the first axis only. One of these is computed, too, or the first is made by what has no epilogue: otherwise these steps stand better
/// behind the product that makes it.
fn taken_by_gpu(s: &Survey<'_>, node: &Node, operand: usize, chain: &[NodeId]) -> bool {
    let graph = s.graph;
    let shape = graph.shape(node.inputs[operand]);
    let depth = match &node.op {
        Op::Contract { lhs, out, .. } => lhs.chars().position(|l| !out.contains(l)),
        _ => Some(1),
    };
    let (Some(depth), 0) = (depth, operand) else { return false };
    let own: BTreeSet<ValueId> = chain.iter().map(|&n| graph.nodes[n].outputs[0]).collect();
    let mut read: Vec<ValueId> = Vec::new();
    for &n in chain {
        let fresh = graph.nodes[n].inputs.iter().filter(|v| !own.contains(&s.root(**v)));
        for v in fresh {
            if !read.contains(v) {
                read.push(*v);
            }
        }
    }
    let varies = |v: ValueId, axis: usize| {
        let own = graph.shape(v);
        let missing = shape.len() - own.len().min(shape.len());
        axis >= missing && !own[axis - missing].is(1)
    };
    let full = |v: &ValueId| (0..shape.len()).all(|a| shape[a].is(1) || varies(*v, a));
    let (mains, others): (Vec<ValueId>, Vec<ValueId>) = read.into_iter().partition(full);
    let [main] = mains[..] else { return false };
    let along =
        |v: &ValueId| varies(*v, depth) && (1..shape.len()).all(|a| a == depth || !varies(*v, a));
    let made = graph.producer(s.root(main)).and_then(|n| s.anchor(n));
    let has_epilogue = matches!(
        made,
        Some(Anchor::Contract | Anchor::Conv | Anchor::Map | Anchor::Rows | Anchor::Attention)
    );
    let computed = others.iter().any(|v| graph.as_const(s.root(*v)).is_none());
    !others.is_empty() && others.iter().all(along) && (computed || !has_epilogue)
}

/// Whether an operand of this anchor can be computed in its kernel: every element is read once for each place of the
/// result's other axes. Of convolutions only those with one tap at each output.
fn takes(s: &Survey<'_>, node: &Node, operand: usize) -> bool {
    match &node.op {
        Op::Contract { lhs, rhs, .. } => {
            let letters = [lhs, rhs][operand.min(1)];
            let distinct: BTreeSet<char> = letters.chars().collect();
            distinct.len() == letters.chars().count()
        }
        Op::Conv(attrs) => {
            let one = |n: &i64| *n == 1;
            let pads = attrs.pads_lo.iter().chain(&attrs.pads_hi);
            let taps = s.graph.shape(node.inputs[1])[2..].iter().all(|d| d.is(1));
            let plain = taps && attrs.groups == 1 && attrs.strides.iter().all(one);
            operand == 0 && plain && pads.into_iter().all(|&p| p == 0)
        }
        _ => false,
    }
}

/// For each axis of an operand the axis of the result, as far as it has one.
pub(crate) fn operand_axes(op: &Op, operand: usize, rank: usize) -> AxisMap {
    match op {
        Op::Contract { lhs, rhs, out, .. } => {
            let letters = if operand == 0 { lhs } else { rhs };
            letters.chars().map(|l| out.chars().position(|o| o == l)).collect()
        }
        // Channels are summed.
        _ => (0..rank).map(|a| (a != 1).then_some(a)).collect(),
    }
}

impl Lowering<'_> {
    /// The operand that a prologue of the group computes, over the product's `space`; `axes` says where the operand's
    /// axes are in it. The side tells how what it is computed from lies.
    pub(crate) fn computed_side(
        &mut self,
        group: &Group,
        operand: usize,
        axes: &[usize],
        space: &[Dim],
    ) -> Result<Option<(Side, Computed)>> {
        let Some(prologue) = group.prologues.iter().find(|p| p.operand == operand) else {
            return Ok(None);
        };
        let graph = self.graph;
        let last = prologue.nodes.last().map(|&n| graph.nodes[n].outputs[0]);
        let shape = last.map(|v| graph.shape(v).to_vec()).unwrap_or_default();
        let mut dag = Dag::default();
        let mut made = BTreeMap::new();
        for &n in &prologue.nodes {
            self.map_node(&mut dag, &prologue.vals, &shape, &mut made, n)?;
        }
        let Some(&node) = last.and_then(|v| made.get(&v)) else {
            return Err(Error::bug("a prologue without a result"));
        };
        // From the operand's axes to those of the product.
        let over = |layout: &Layout| {
            let mut out = Layout {
                axes: space.iter().map(|d| broadcast_axis(d.clone())).collect(),
                offset: layout.offset.clone(),
            };
            for (axis, &to) in layout.axes.iter().zip(axes) {
                if !axis.extent.is(1) {
                    out.axes[to] = axis.clone();
                }
            }
            out
        };
        for info in &mut dag.nodes {
            let mut varies = vec![false; space.len()];
            axes.iter().zip(&info.axes).for_each(|(&to, v)| varies[to] = *v);
            info.axes = varies;
            if let DagOp::Ext(ext) = &mut info.op {
                ext.layout = over(&ext.layout);
            }
        }
        let loads = dag.nodes.iter().filter_map(|n| match &n.op {
            DagOp::Ext(e) => Some(e),
            _ => None,
        });
        let real = |layout: &Layout| layout.axes.iter().filter(|a| !is_broadcast(a)).count();
        let Some(main) = loads.max_by_key(|e| real(&e.layout)) else {
            return Err(Error::bug("a prologue that reads nothing"));
        };
        let side = Side { buffer: main.buffer, dtype: main.dtype, layout: main.layout.clone() };
        Ok(Some((side, Computed { dag, node })))
    }
}

impl Computed {
    /// Whether it varies along an axis of the space.
    pub(crate) fn varies(&self, axis: usize) -> bool {
        self.dag.nodes[self.node].axes[axis]
    }

    /// Its tile as a matrix whose axes are the canonical axes `want`.
    pub(crate) fn tile(
        &self,
        k: &mut KernelParts,
        canon: &[Vec<usize>],
        pos: &[crate::block::Pos],
        want: [usize; 2],
    ) -> TileId {
        let mut emit = Emit::new(&self.dag, canon, pos.to_vec());
        let tile = emit.tile(k, self.node);
        let varies = |c: &usize| canon[*c].iter().any(|&a| self.varies(a));
        let have: Vec<usize> =
            (0..canon.len()).filter(|c| pos[*c].tile.is_some() && varies(c)).collect();
        let mut sorted = want;
        sorted.sort_unstable();
        let shape: Vec<Dim> = sorted.iter().filter_map(|&c| pos[c].tile.clone()).collect();
        let tile = if have == sorted {
            tile
        } else {
            // It repeats along an axis.
            let along = have.iter().filter_map(|c| sorted.iter().position(|s| s == c)).collect();
            k.b.broadcast(Operand { tile, along }, shape)
        };
        if sorted == want { tile } else { k.b.permute(tile, &[1, 0]) }
    }
}
