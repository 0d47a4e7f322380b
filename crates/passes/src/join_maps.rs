//! Elementwise operators that do the same to neighbouring slices become one.
//!
//! ```text
//! before: q = slice y 0..n     q1 = f(q, t)     k = slice y n..n+m     k1 = f(k, t)
//! after:  x = slice y 0..n+m   x1 = f(x, t)     q1 = slice x1 0..n     k1 = slice x1 n..n+m
//! ```
//!
//! So rotary positions turn queries and keys, which one product made side by side, in one kernel. Between slice and operator there may be
//! reshapes, permutations, slices and concatenations along other axes; both chains must have the same ones.
//!
//! Side conditions: what else the operators read is the same for both and does not vary along the axis of the slices; sizes along that axis
//! are constants.

use crate::edit::rewrite;
use std::collections::BTreeMap;
use tilewright_base::Result;
use tilewright_graph::{Graph, Node, NodeId, Op, ValueId};
use tilewright_layout::{Dim, numel};

/// A value, the one that is made of the neighbouring slice, and the axis along which they lie side by side.
type Pairs = BTreeMap<ValueId, (ValueId, usize)>;

/// The first and the second of a pair of nodes, and the axis of their results.
type NodePairs = BTreeMap<NodeId, (NodeId, usize)>;

fn users_of(graph: &Graph) -> Vec<Vec<NodeId>> {
    let mut users: Vec<Vec<NodeId>> = vec![Vec::new(); graph.values.len()];
    for (id, node) in graph.live() {
        for v in &node.inputs {
            users[v.index()].push(id);
        }
    }
    users
}

/// The axis of two slices of one value that lie side by side, the first one first.
fn neighbours(graph: &Graph, one: &Node, other: &Node) -> Option<usize> {
    let (Op::Slice { starts, lens, steps }, Op::Slice { starts: from, lens: long, steps: by }) =
        (&one.op, &other.op)
    else {
        return None;
    };
    let plain = steps.iter().chain(by).all(|s| *s == 1) && one.inputs == other.inputs;
    let different: Vec<usize> =
        (0..starts.len()).filter(|&a| (&starts[a], &lens[a]) != (&from[a], &long[a])).collect();
    let &[axis] = different.as_slice() else { return None };
    let known = starts[axis].as_const()? + lens[axis].as_const()? == from[axis].as_const()?;
    let whole =
        long[axis].as_const().is_some_and(|n| n > 0) && graph.shape(one.inputs[0]).len() > axis;
    (plain && known && whole).then_some(axis)
}

/// The axis along which the results of two nodes lie side by side, when they do the same to operands that do.
fn alike(graph: &Graph, one: &Node, other: &Node, pairs: &Pairs) -> Option<usize> {
    if one.inputs.len() != other.inputs.len() || one.outputs.len() != 1 || other.outputs.len() != 1
    {
        return None;
    }
    let out = graph.shape(one.outputs[0]);
    let out_other = graph.shape(other.outputs[0]);
    if out.len() != out_other.len() {
        return None;
    }
    // Where the axis of each operand is in the result; operands that both read must not vary along it.
    let mut joined = None;
    let mut common = Vec::new();
    for (&v, &w) in one.inputs.iter().zip(&other.inputs) {
        let Some(&(second, axis)) = pairs.get(&v) else {
            if v != w {
                return None;
            }
            common.push(v);
            continue;
        };
        let shape = graph.shape(v);
        let to = match (&one.op, &other.op) {
            (Op::Map(f), Op::Map(g)) if f == g => axis + out.len().checked_sub(shape.len())?,
            (Op::Concat(a), Op::Concat(b)) if a == b && *a != axis => axis,
            (Op::Permute(p), Op::Permute(q)) if p == q => p.iter().position(|&a| a == axis)?,
            (Op::Slice { starts, lens, steps }, Op::Slice { starts: s, lens: l, steps: t }) => {
                let same = (0..starts.len())
                    .filter(|&a| a != axis)
                    .all(|a| (&starts[a], &lens[a], steps[a]) == (&s[a], &l[a], t[a]));
                let whole = |start: &Dim, len: &Dim, step: i64, of: ValueId| {
                    start.is(0) && *len == graph.shape(of)[axis] && step == 1
                };
                let full = whole(&starts[axis], &lens[axis], steps[axis], v)
                    && whole(&s[axis], &l[axis], t[axis], w);
                (same && full).then_some(axis)?
            }
            (Op::Reshape(_), Op::Reshape(_)) => {
                let before = numel(&shape[..axis]);
                (0..out.len()).find(|&a| {
                    let rest = out[a + 1..] == out_other[a + 1..];
                    numel(&out[..a]) == before
                        && out[..a] == out_other[..a]
                        && rest
                        && out[a] != out_other[a]
                })?
            }
            _ => return None,
        };
        if second != w || joined.is_some_and(|j| j != to) {
            return None;
        }
        joined = Some(to);
    }
    let to = joined?;
    let varies = |v: ValueId| {
        let shape = graph.shape(v);
        let at = (to + shape.len()).checked_sub(out.len());
        at.is_some_and(|a| !shape[a].is(1))
    };
    let elementwise = matches!(one.op, Op::Map(_));
    let fits = common.iter().all(|&v| elementwise && !varies(v));
    let sizes = out[to].as_const().is_some() && out_other[to].as_const().is_some();
    let same = (0..out.len()).all(|a| a == to || out[a] == out_other[a]);
    (fits && sizes && same).then_some(to)
}

/// What follows two neighbouring slices and is the same for both; nothing when no elementwise operator is among it.
fn follow(
    graph: &Graph,
    users: &[Vec<NodeId>],
    (one, other, axis): (NodeId, NodeId, usize),
) -> NodePairs {
    let mut found = NodePairs::from([(one, (other, axis))]);
    let of = |n: NodeId| graph.nodes[n].outputs[0];
    let mut pairs = Pairs::from([(of(one), (of(other), axis))]);
    let mut maps = false;
    for (id, node) in graph.live() {
        let Some(&(second, _)) = node.inputs.iter().find_map(|v| pairs.get(v)) else { continue };
        let partner = users[second.index()].iter().find_map(|&n| {
            let taken = n == id || found.contains_key(&n) || found.values().any(|(m, _)| *m == n);
            let axis = alike(graph, node, &graph.nodes[n], &pairs).filter(|_| !taken)?;
            Some((n, axis))
        });
        if let Some((n, axis)) = partner {
            found.insert(id, (n, axis));
            pairs.insert(of(id), (of(n), axis));
            maps |= matches!(node.op, Op::Map(_));
        }
    }
    if maps { found } else { NodePairs::new() }
}

/// See the module's head. True when something changed.
///
/// # Errors
/// Bugs only.
pub fn join_maps(graph: &mut Graph) -> Result<bool> {
    let users = users_of(graph);
    let slices: Vec<NodeId> =
        graph.live().filter(|(_, n)| matches!(n.op, Op::Slice { .. })).map(|(id, _)| id).collect();
    let mut all = NodePairs::new();
    for &one in &slices {
        for &other in users[graph.nodes[one].inputs[0].index()].iter().filter(|&&n| n != one) {
            let (a, b) = (&graph.nodes[one], &graph.nodes[other]);
            let Some(axis) = neighbours(graph, a, b) else { continue };
            let found = follow(graph, &users, (one, other, axis));
            let taken = |n: &NodeId| all.contains_key(n) || all.values().any(|(m, _)| m == n);
            if !found.iter().any(|(n, (m, _))| taken(n) || taken(m)) {
                all.extend(found);
            }
        }
    }
    if all.is_empty() {
        return Ok(false);
    }
    let firsts: BTreeMap<NodeId, NodeId> = all.iter().map(|(n, (m, _))| (*m, *n)).collect();
    // By the first value of a pair: what both are slices of. Values are those of the old graph.
    let old: Vec<Vec<ValueId>> = graph.nodes.iter().map(|(_, n)| n.inputs.clone()).collect();
    let outs: Vec<Option<ValueId>> =
        graph.nodes.iter().map(|(_, n)| n.outputs.first().copied()).collect();
    let shapes: Vec<Vec<Dim>> = graph.values.ids().map(|v| graph.shape(v).to_vec()).collect();
    let mut whole: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    rewrite(graph, &mut |ed, id| {
        let part =
            |ed: &mut crate::edit::Editor<'_>, of: ValueId, axis: usize, start: Dim, len: Dim| {
                let mut lens = ed.graph.shape(of).to_vec();
                let mut starts = vec![Dim::new(0); lens.len()];
                let steps = vec![1; lens.len()];
                (starts[axis], lens[axis]) = (start, len);
                ed.op(Op::Slice { starts, lens, steps }, &[of])
            };
        let first = firsts.get(&id).copied().unwrap_or(id);
        let Some(&(second, axis)) = all.get(&first) else { return Ok(None) };
        let (Some(a), Some(b)) = (outs[first.index()], outs[second.index()]) else {
            return Ok(None);
        };
        let lens = [a, b].map(|v| shapes[v.index()][axis].clone());
        let both = match whole.get(&a) {
            Some(both) => *both,
            None if id != first => return Ok(None),
            None => {
                let node = ed.graph.nodes[id].clone();
                let mut op = node.op.clone();
                match &mut op {
                    Op::Reshape(shape) => shape[axis] = lens[0].clone() + &lens[1],
                    Op::Slice { lens: l, .. } => l[axis] = lens[0].clone() + &lens[1],
                    _ => {}
                }
                let given = old[id.index()].iter().zip(&node.inputs);
                let inputs: Vec<ValueId> =
                    given.map(|(v, now)| whole.get(v).copied().unwrap_or(*now)).collect();
                let both = ed.op(op, &inputs)?;
                whole.insert(a, both);
                both
            }
        };
        let (start, len) = match id == first {
            true => (Dim::new(0), lens[0].clone()),
            false => (lens[0].clone(), lens[1].clone()),
        };
        Ok(Some(vec![part(ed, both, axis, start, len)?]))
    })
}
