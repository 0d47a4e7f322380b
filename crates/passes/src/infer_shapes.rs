//! Computes all types again, and gives sizes that must be equal one name.
//!
//! ```text
//! before: (%a: f32[N,8], %b: f32[M,8])                after: (%a: f32[N,8], %b: f32[N,8])
//!         %c = concat axis=1 %a, %b : f32[N,16]              %c = concat axis=1 %a, %b : f32[N,16]
//! ```
//!
//! Sizes that must be equal for the program to have a meaning: the axes of joined tensors other
//! than the joining one, summed letters of a contraction, channels of a convolution, the shared
//! axes of attention. Elementwise operands are *not* among them, nor batch letters: a size of 1
//! stretches there. A symbol is replaced by a number or by a symbol declared earlier, everywhere;
//! its range is narrowed to what both allow.
//!
//! Side condition: the graph's caller checks that inputs agree with each other (the runtime binds
//! each symbol once), so a program that was meaningless for some sizes now says so earlier.

use crate::edit::retype;
use crate::manager::PassContext;
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::Result;
use tilewright_graph::{Graph, Node, Op, TensorType};
use tilewright_layout::Dim;

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    let mut changed = retype_all(graph)?;
    let equal = equalities(graph);
    if !equal.is_empty() {
        substitute(graph, &equal);
        retype_all(graph)?;
        changed = true;
    }
    Ok(changed)
}

fn retype_all(graph: &mut Graph) -> Result<bool> {
    let mut changed = false;
    for i in 0..graph.order.len() {
        changed |= retype(graph, graph.order[i])?;
    }
    Ok(changed)
}

type Equal = BTreeMap<Arc<str>, Dim>;

/// What a symbol stands for by now.
fn find(equal: &Equal, mut d: Dim) -> Dim {
    // Chains are followed to their end; entries never form a cycle (see `unify`).
    while let Some(next) = d.as_symbol().and_then(|s| equal.get(s)) {
        d = next.clone();
    }
    d
}

fn unify(graph: &Graph, equal: &mut Equal, a: &Dim, b: &Dim) {
    let (a, b) = (find(equal, a.clone()), find(equal, b.clone()));
    if a == b {
        return;
    }
    let place =
        |d: &Dim| d.as_symbol().and_then(|s| graph.symbols.iter().position(|k| k.name == *s));
    let (pa, pb) = (place(&a), place(&b));
    match (pa, pb) {
        (Some(pa), Some(pb)) => {
            let (late, early) = if pa > pb { (a, b) } else { (b, a) };
            if let Some(name) = late.as_symbol() {
                equal.insert(name.clone(), early);
            }
        }
        (Some(_), None) if b.as_const().is_some() => {
            if let Some(name) = a.as_symbol() {
                equal.insert(name.clone(), b);
            }
        }
        (None, Some(_)) if a.as_const().is_some() => {
            if let Some(name) = b.as_symbol() {
                equal.insert(name.clone(), a);
            }
        }
        // Sizes that are formulas: nothing is concluded.
        _ => {}
    }
}

fn equalities(graph: &Graph) -> Equal {
    let mut equal = Equal::new();
    for (_, node) in graph.live() {
        forced(graph, node, &mut |a, b| unify(graph, &mut equal, a, b));
    }
    equal
}

/// Calls `same` with sizes that this node forces to be equal.
fn forced(graph: &Graph, node: &Node, same: &mut dyn FnMut(&Dim, &Dim)) {
    let shape = |i: usize| graph.shape(node.inputs[i]);
    match &node.op {
        Op::Concat(axis) => {
            for &other in &node.inputs[1..] {
                for (i, (a, b)) in shape(0).iter().zip(graph.shape(other)).enumerate() {
                    if i != *axis {
                        same(a, b);
                    }
                }
            }
        }
        Op::Contract { lhs, rhs, out, .. } => {
            for (a, letter) in lhs.chars().enumerate() {
                if let Some(b) = rhs.chars().position(|l| l == letter)
                    && !out.contains(letter)
                    && !shape(0)[a].is(1)
                    && !shape(1)[b].is(1)
                {
                    same(&shape(0)[a], &shape(1)[b]);
                }
            }
        }
        Op::Conv(attrs) => same(&shape(0)[1], &(&shape(1)[1] * attrs.groups)),
        Op::Attention(_) => {
            same(&shape(0)[0], &shape(1)[0]);
            same(&shape(0)[0], &shape(2)[0]);
            same(&shape(0)[3], &shape(1)[3]);
            same(&shape(1)[1], &shape(2)[1]);
            same(&shape(1)[2], &shape(2)[2]);
        }
        _ => {}
    }
}

fn substitute(graph: &mut Graph, equal: &Equal) {
    let lookup = |name: &str| equal.get(name).map(|d| find(equal, d.clone()));
    for (name, to) in equal {
        let Some(range) = graph.symbols.iter().find(|s| s.name == *name).map(|s| s.range) else {
            continue;
        };
        let to = find(equal, to.clone());
        if let Some(kept) = to.as_symbol().cloned()
            && let Some(kept) = graph.symbols.iter_mut().find(|s| s.name == kept)
        {
            kept.range.min = kept.range.min.max(range.min);
            kept.range.max = kept.range.max.min(range.max);
        }
    }
    graph.symbols.retain(|s| !equal.contains_key(&s.name));
    let fix = |dims: &mut Vec<Dim>| {
        for d in dims.iter_mut() {
            *d = d.substitute(&lookup);
        }
    };
    let fix_type = |ty: &mut TensorType| fix(&mut ty.shape);
    for (_, value) in graph.values.iter_mut() {
        fix_type(&mut value.ty);
    }
    for i in 0..graph.order.len() {
        let id = graph.order[i];
        match &mut graph.nodes[id].op {
            Op::Reshape(dims) | Op::Expand(dims) | Op::Dims(dims) => fix(dims),
            Op::Slice { starts, lens, .. } => {
                fix(starts);
                fix(lens);
            }
            Op::Pad { lo, hi, .. } => {
                fix(lo);
                fix(hi);
            }
            Op::Iota { ty, .. } | Op::Random { ty, .. } => fix_type(ty),
            Op::TopK { k, .. } => *k = k.substitute(&lookup),
            Op::Host(host) => host.types.iter_mut().for_each(fix_type),
            _ => {}
        }
    }
}
