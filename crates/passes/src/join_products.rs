//! Products of one operand with several weights become one.
//!
//! ```text
//! before: q = contract "bsk,nk->bsn" x, wq     q1 = map(q, bq) { q, b -> q + b }       and so for k and v
//! after:  y = contract "bsk,nk->bsn" x, w      y1 = map(y, b) { q, b -> q + b }        w, b: one after the other
//!         q1 = slice y1 0..n    k1 = slice y1 n..2n    v1 = slice y1 2n..3n
//! ```
//!
//! Attention's queries, keys and values are such: one larger product uses a machine better than three small ones, and
//! reads `x` once. The slices are views; whoever reads them takes the longer distance between lines.
//!
//! Side conditions: weights (and what is added, if anything is) are constants and differ only in their number of columns,
//! which is the result's last axis; nobody else reads a product before its addition. Products whose results meet in one
//! elementwise operator stay apart: they are a gated unit, which a target may have a form of its own for.

use crate::edit::rewrite;
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{DType, Result};
use tilewright_data::{Bytes, Tensor};
use tilewright_expr::Func;
use tilewright_graph::{Graph, NodeId, Op, ValueId};
use tilewright_layout::Dim;

/// A product that may be joined with others.
struct Member {
    /// The node whose result is the member's: the product, or the addition behind it.
    last: NodeId,
    contract: NodeId,
    /// What is added, and as which operand.
    added: Option<(ValueId, usize)>,
    columns: i64,
}

/// What members have in common.
#[derive(PartialEq)]
struct Form {
    x: ValueId,
    letters: [String; 3],
    types: [DType; 2],
    /// Type and shape of the weights, and which axis of theirs grows.
    weights: (DType, Vec<usize>, usize),
    /// The addition: what it does, its other operand's place, type and rank.
    added: Option<(Func, usize, DType, usize)>,
}

/// Where the members of a group are in the joined result.
struct Place {
    group: usize,
    first: i64,
}

fn member(graph: &Graph, users: &[Vec<NodeId>], id: NodeId) -> Option<(Form, Member)> {
    let node = &graph.nodes[id];
    let Op::Contract { lhs, rhs, out, acc, dtype } = &node.op else { return None };
    let weights = graph.as_const(node.inputs[1])?;
    let columns: Vec<char> = rhs.chars().filter(|l| !lhs.contains(*l)).collect();
    let [column] = columns[..] else { return None };
    let axis = rhs.chars().position(|l| l == column)?;
    if !out.ends_with(column) || weights.dtype().bits() % 8 != 0 {
        return None;
    }
    let mut shape = weights.shape().to_vec();
    let n = std::mem::replace(&mut shape[axis], 0);
    let y = node.outputs[0];
    let is_output = |v: ValueId| graph.outputs.iter().any(|(_, o)| *o == v);
    let addition = match users[y.index()][..] {
        [user] if !is_output(y) => Some(user),
        _ => None,
    };
    let added = addition.and_then(|user| {
        let map = &graph.nodes[user];
        let Op::Map(func) = &map.op else { return None };
        let [a, b] = map.inputs[..] else { return None };
        let (other, at) = if a == y { (b, 1) } else { (a, 0) };
        let tensor = graph.as_const(other)?;
        let (last, rest) = tensor.shape().split_last()?;
        let vector = *last == n && rest.iter().all(|d| *d == 1);
        let same = graph.shape(map.outputs[0]) == graph.shape(y);
        let fits = vector && same && a != b && tensor.dtype().bits() % 8 == 0;
        let form = (func.clone(), at, tensor.dtype(), tensor.shape().len());
        fits.then_some((user, other, form))
    });
    let (last, operand, form) = match added {
        Some((user, other, form)) => (user, Some((other, form.1)), Some(form)),
        None => (id, None, None),
    };
    let form = Form {
        x: node.inputs[0],
        letters: [lhs.clone(), rhs.clone(), out.clone()],
        types: [*acc, *dtype],
        weights: (weights.dtype(), shape, axis),
        added: form,
    };
    Some((form, Member { last, contract: id, added: operand, columns: n as i64 }))
}

/// The elementwise operators that a value reaches through such operators and views.
fn reached(graph: &Graph, users: &[Vec<NodeId>], from: ValueId) -> BTreeSet<NodeId> {
    let (mut found, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(v) = open.pop() {
        for &user in &users[v.index()] {
            let node = &graph.nodes[user];
            let through = matches!(
                node.op,
                Op::Map(_)
                    | Op::Reshape(_)
                    | Op::Permute(_)
                    | Op::Slice { .. }
                    | Op::Expand(_)
                    | Op::Concat(_)
            );
            if through && found.insert(user) {
                open.extend(&node.outputs);
            }
        }
    }
    found
}

/// Constants one after the other along an axis.
fn joined(tensors: &[&Tensor], axis: usize) -> Result<Tensor> {
    let first = tensors[0];
    let narrow: Option<Vec<Tensor>> = tensors.iter().map(|t| t.narrow()).collect();
    if let Some(narrow) = narrow
        && narrow.iter().all(|t| t.dtype() == narrow[0].dtype())
        && let Some(wide) = joined(&narrow.iter().collect::<Vec<_>>(), axis)?.widened()
    {
        return Ok(wide);
    }
    let size = first.dtype().size();
    let mut shape = first.shape().to_vec();
    let outer: usize = shape[..axis].iter().product();
    let inner: usize = shape[axis + 1..].iter().product();
    let mut bytes = Vec::new();
    for line in 0..outer {
        for tensor in tensors {
            let run = tensor.shape()[axis] * inner * size;
            bytes.extend_from_slice(&tensor.bytes()[line * run..][..run]);
        }
    }
    shape[axis] = tensors.iter().map(|t| t.shape()[axis]).sum();
    Tensor::new(first.dtype(), shape, Bytes::copy_from(&bytes))
}

/// See the module's head. True when something changed.
///
/// # Errors
/// Bugs only.
pub fn join_products(graph: &mut Graph) -> Result<bool> {
    let mut users: Vec<Vec<NodeId>> = vec![Vec::new(); graph.values.len()];
    for (id, node) in graph.live() {
        for v in &node.inputs {
            users[v.index()].push(id);
        }
    }
    let mut groups: Vec<(Form, Vec<Member>)> = Vec::new();
    for (id, _) in graph.live() {
        let Some((form, member)) = member(graph, &users, id) else { continue };
        match groups.iter_mut().find(|(f, _)| *f == form) {
            Some((_, members)) => members.push(member),
            None => groups.push((form, vec![member])),
        }
    }
    let result = |m: &Member, graph: &Graph| graph.nodes[m.last].outputs[0];
    groups.retain(|(_, members)| {
        let mut seen = BTreeSet::new();
        members.len() > 1
            && members.iter().all(|m| {
                let reached = reached(graph, &users, result(m, graph));
                let apart = seen.is_disjoint(&reached);
                seen.extend(reached);
                apart
            })
    });
    let mut places: BTreeMap<NodeId, Place> = BTreeMap::new();
    for (group, (_, members)) in groups.iter().enumerate() {
        let mut first = 0;
        for m in members {
            places.insert(m.last, Place { group, first });
            first += m.columns;
        }
    }
    let mut made: Vec<Option<ValueId>> = vec![None; groups.len()];
    rewrite(graph, &mut |ed, id| {
        let Some(place) = places.get(&id) else { return Ok(None) };
        let (form, members) = &groups[place.group];
        let whole = match made[place.group] {
            Some(whole) => whole,
            None => {
                let constant = |v: ValueId| ed.graph.as_const(v);
                let weights: Option<Vec<&Tensor>> = members
                    .iter()
                    .map(|m| constant(ed.graph.nodes[m.contract].inputs[1]))
                    .collect();
                let added: Option<Vec<&Tensor>> =
                    members.iter().map(|m| m.added.and_then(|(v, _)| constant(v))).collect();
                let Some(weights) = weights else { return Ok(None) };
                let weights = joined(&weights, form.weights.2)?;
                let added = match &form.added {
                    Some((.., rank)) => added.map(|list| joined(&list, rank - 1)).transpose()?,
                    None => None,
                };
                let contract = ed.graph.nodes[members[0].contract].clone();
                let weights = ed.constant(weights);
                let mut whole = ed.op(contract.op, &[contract.inputs[0], weights])?;
                if let (Some((func, at, ..)), Some(added)) = (&form.added, added) {
                    let added = ed.constant(added);
                    let inputs = if *at == 1 { [whole, added] } else { [added, whole] };
                    whole = ed.map(func.clone(), &inputs)?;
                }
                made[place.group] = Some(whole);
                whole
            }
        };
        let shape = ed.graph.shape(whole).to_vec();
        let mut starts = vec![Dim::new(0); shape.len()];
        let mut lens = shape;
        let steps = vec![1; lens.len()];
        if let (Some(start), Some(len), Some(m)) =
            (starts.last_mut(), lens.last_mut(), members.iter().find(|m| m.last == id))
        {
            (*start, *len) = (Dim::new(place.first), Dim::new(m.columns));
        }
        Ok(Some(vec![ed.op(Op::Slice { starts, lens, steps }, &[whole])?]))
    })
}
