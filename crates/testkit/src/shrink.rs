//! The minimiser: the smallest graph it can find that still fails.
//!
//! Candidates come from a few ways of making a graph smaller, largest steps first; one that still
//! fails (and is well-formed) replaces the graph, and the search starts over until nothing helps:
//!
//! 1. keep a single output;
//! 2. make an operand of an output's node the output;
//! 3. replace a node's result by a fresh input;
//! 4. let readers of a node read an operand of the same type instead;
//! 5. replace a symbol by a number, and a number in all shapes at once by a smaller one.

use tilewright_base::{DType, IdVec};
use tilewright_data::{Tensor, from_f64, from_i64};
use tilewright_graph::{Def, Graph, NodeId, Op, TensorType, Value, ValueId, infer, verify};
use tilewright_layout::Dim;

/// Tests of candidates in one call; each may run a compiler.
const TRIES_MAX: usize = 5000;

/// Makes `graph` smaller while `fails` says that it still fails. `fails` makes its own inputs from
/// the graph that it gets: their number and shapes change.
pub fn shrink(graph: &Graph, fails: impl Fn(&Graph) -> bool) -> Graph {
    let mut best = compact(graph);
    if !fails(&best) {
        return graph.clone();
    }
    let mut tries = 0;
    'again: loop {
        for candidate in candidates(&best) {
            let candidate = compact(&candidate);
            if size(&candidate) >= size(&best) || verify(&candidate).is_err() {
                continue;
            }
            tries += 1;
            if tries > TRIES_MAX {
                return best;
            }
            if fails(&candidate) {
                best = candidate;
                continue 'again;
            }
        }
        return best;
    }
}

/// What counts: nodes, then outputs, inputs and symbols, then the sum of all extents.
fn size(g: &Graph) -> (usize, usize, i64) {
    let extent = |d: &Dim| d.eval_with(&|_| Some(1000)).unwrap_or(1000);
    let extents = g.values.iter().flat_map(|(_, v)| &v.ty.shape).map(extent).sum();
    (g.order.len(), g.outputs.len() + g.inputs.len() + g.symbols.len(), extents)
}

fn candidates(g: &Graph) -> Vec<Graph> {
    let mut all = Vec::new();
    if g.outputs.len() > 1 {
        for output in &g.outputs {
            all.push(Graph { outputs: vec![output.clone()], ..g.clone() });
        }
    }
    for (i, (_, v)) in g.outputs.iter().enumerate() {
        let Some(node) = g.producer(*v) else { continue };
        for &operand in &g.nodes[node].inputs {
            let mut next = g.clone();
            next.outputs[i].1 = operand;
            all.push(next);
        }
    }
    // From the end of the program: cutting there drops the most.
    let nodes: Vec<NodeId> = g.order.iter().rev().copied().collect();
    for &id in &nodes {
        for &v in &g.nodes[id].outputs {
            let mut next = g.clone();
            let def = Def::Input(next.inputs.len());
            let ty = g.ty(v).clone();
            let input = next.values.push(Value { name: format!("cut{}", id.0), ty, def });
            next.inputs.push(input);
            next.replace_uses(v, input);
            all.push(next);
            let same = g.nodes[id].inputs.iter().find(|&&o| g.ty(o) == g.ty(v));
            if let Some(&operand) = same {
                let mut next = g.clone();
                next.replace_uses(v, operand);
                all.push(next);
            }
        }
    }
    for symbol in &g.symbols {
        for value in [symbol.range.min, 1, 2, 3] {
            if (symbol.range.min..=symbol.range.max).contains(&value) {
                let fixed = |d: &Dim| {
                    d.substitute(&|name| (name == &*symbol.name).then(|| Dim::new(value)))
                };
                all.extend(rebuild(g, &fixed));
            }
        }
    }
    let mut extents: Vec<i64> =
        g.values.iter().flat_map(|(_, v)| &v.ty.shape).filter_map(Dim::as_const).collect();
    extents.sort_unstable();
    extents.dedup();
    for &from in extents.iter().rev().filter(|&&e| e > 1) {
        for to in [1, 2, from / 2, from - 1] {
            if to < from {
                let smaller = |d: &Dim| if d.is(from) { Dim::new(to) } else { d.clone() };
                all.extend(rebuild(g, &smaller));
            }
        }
    }
    all
}

/// Only what the outputs need: fresh ids in program order, no dead values, no unused inputs and
/// symbols.
pub fn compact(g: &Graph) -> Graph {
    let mut live = g.clone();
    live.remove_dead();
    let same = |d: &Dim| d.clone();
    let mut out = rebuild(&live, &same).unwrap_or(live);
    let mut used: Vec<String> = Vec::new();
    for (_, value) in out.values.iter() {
        for d in &value.ty.shape {
            d.for_each_symbol(&mut |s| used.push(s.to_string()));
        }
    }
    for (_, node) in out.live() {
        for d in dims(&node.op) {
            d.for_each_symbol(&mut |s| used.push(s.to_string()));
        }
    }
    out.symbols.retain(|s| used.iter().any(|u| **u == *s.name));
    out
}

/// The same program with every size changed by `change` and types inferred anew; constants are cut
/// to their new shape. `None` when the program does not allow it.
pub fn rebuild(g: &Graph, change: &dyn Fn(&Dim) -> Dim) -> Option<Graph> {
    let mut out = Graph { symbols: g.symbols.clone(), ..Graph::new(g.name.clone()) };
    let mut map: IdVec<ValueId, Option<ValueId>> = g.values.ids().map(|_| None).collect();
    let mut read: IdVec<ValueId, bool> = g.values.ids().map(|_| false).collect();
    for v in g.live().flat_map(|(_, n)| n.inputs.iter()).chain(g.outputs.iter().map(|(_, v)| v)) {
        read[*v] = true;
    }
    let sizes = |dims: &[Dim]| -> Vec<Dim> { dims.iter().map(change).collect() };
    for &v in g.inputs.iter().filter(|&&v| read[v]) {
        let value = &g.values[v];
        let ty = TensorType::new(value.ty.dtype, sizes(&value.ty.shape));
        let def = Def::Input(out.inputs.len());
        let id = out.values.push(Value { name: value.name.clone(), ty, def });
        out.inputs.push(id);
        map[v] = Some(id);
    }
    let place = |v: ValueId, out: &mut Graph, map: &mut IdVec<ValueId, Option<ValueId>>| {
        if let (None, Def::Const(tensor)) = (map[v], &g.values[v].def) {
            let ty = TensorType::new(g.dtype(v), sizes(g.shape(v)));
            let cut = crop(tensor, &ty.const_shape()?)?;
            map[v] = Some(out.add_const(g.values[v].name.clone(), cut));
        }
        map[v]
    };
    for (_, node) in g.live() {
        let inputs: Option<Vec<ValueId>> =
            node.inputs.iter().map(|&v| place(v, &mut out, &mut map)).collect();
        let inputs = inputs?;
        let op = resize(&node.op, change);
        let types: Vec<TensorType> = inputs.iter().map(|&v| out.ty(v).clone()).collect();
        let results = infer(&op, &types).ok()?;
        let id = out.add_node(op, inputs, results, node.origin.clone());
        out.order.push(id);
        for (&old, &new) in node.outputs.iter().zip(&out.nodes[id].outputs.clone()) {
            out.values[new].name = g.values[old].name.clone();
            map[old] = Some(new);
        }
    }
    for (name, v) in &g.outputs {
        let v = place(*v, &mut out, &mut map)?;
        out.outputs.push((name.clone(), v));
    }
    Some(out)
}

/// The leading corner of a tensor; integers (indices) are brought into range of small axes.
fn crop(tensor: &Tensor, shape: &[usize]) -> Option<Tensor> {
    if tensor.shape() == shape {
        return Some(tensor.clone());
    }
    if shape.len() != tensor.shape().len() || shape.iter().zip(tensor.shape()).any(|(a, b)| a > b) {
        return None;
    }
    let dtype: DType = tensor.dtype();
    let mut out = Tensor::zeros(dtype, shape).ok()?;
    let n = out.len();
    let bytes = out.bytes_mut();
    for flat in 0..n {
        let (mut rest, mut from, mut stride) = (flat, 0, 1);
        for (&extent, &whole) in shape.iter().zip(tensor.shape()).rev() {
            from += rest % extent * stride;
            rest /= extent;
            stride *= whole;
        }
        if dtype.is_float() {
            from_f64(dtype, bytes, flat, tensor.get_f64(from));
        } else {
            from_i64(dtype, bytes, flat, tensor.get_i64(from));
        }
    }
    Some(out)
}

/// The sizes among an operator's attributes.
fn dims(op: &Op) -> Vec<Dim> {
    let found = std::cell::RefCell::new(Vec::new());
    resize(op, &|d| {
        found.borrow_mut().push(d.clone());
        d.clone()
    });
    found.into_inner()
}

/// `op` with its sizes changed.
fn resize(op: &Op, change: &dyn Fn(&Dim) -> Dim) -> Op {
    let all = |dims: &[Dim]| -> Vec<Dim> { dims.iter().map(change).collect() };
    let ty = |ty: &TensorType| TensorType::new(ty.dtype, all(&ty.shape));
    match op {
        Op::Reshape(shape) => Op::Reshape(all(shape)),
        Op::Expand(shape) => Op::Expand(all(shape)),
        Op::Dims(dims) => Op::Dims(all(dims)),
        Op::Slice { starts, lens, steps } => Op::Slice {
            // Starts are coordinates, not extents: only symbols in them may change.
            starts: starts
                .iter()
                .map(|d| if d.as_const().is_some() { d.clone() } else { change(d) })
                .collect(),
            lens: all(lens),
            steps: steps.clone(),
        },
        Op::Pad { lo, hi, mode } => {
            let symbolic = |dims: &[Dim]| -> Vec<Dim> {
                dims.iter()
                    .map(|d| if d.as_const().is_some() { d.clone() } else { change(d) })
                    .collect()
            };
            Op::Pad { lo: symbolic(lo), hi: symbolic(hi), mode: mode.clone() }
        }
        Op::Iota { ty: t, axis } => Op::Iota { ty: ty(t), axis: *axis },
        Op::Random { ty: t, seed } => Op::Random { ty: ty(t), seed: *seed },
        Op::TopK { axis, k, largest } => Op::TopK { axis: *axis, k: change(k), largest: *largest },
        Op::Host(host) => {
            let mut host = host.clone();
            host.types = host.types.iter().map(ty).collect();
            Op::Host(host)
        }
        other => other.clone(),
    }
}
