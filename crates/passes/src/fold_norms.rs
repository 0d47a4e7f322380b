//! RMS norms that products alone read are folded into these: the scale into their weights, the rest into one number a row.
//!
//! ```text
//! before: y = rms_norm x, w          z = contract "bsk,nk->bsn" y, b             (and more products of y)
//! after:  s = map(x) { x * x }       t = reduce sum s over k      r = map(t, k) { 1 / sqrt(t / k + eps) }
//!         u = contract "bsk,nk->bsn" x, b w      z = map(u, r) { u * r }
//! ```
//!
//! `y` is never made: the products read `x` as it lies, their epilogues multiply sums by `r`, and a reduction that reads `x` once and writes
//! a number a row (or sums that the product before leaves) takes the place of a kernel that reads and writes all of it. Whether that takes less time
//! is for the caller to say, who knows the machine. `b w` is computed here, once, and rounded to the type of `b`.
//!
//! Side conditions: every reader of `y` is a product whose left operand it is, whose depth is the axis that the norm is over, and whose right
//! operand is a constant with one more axis; `y` is no output. Rounding: `y` is not rounded to the operands' type any more, `b w` is, so
//! that sums have as many roundings as before; what is stored of `x` was stored before.

use crate::edit::{Editor, rewrite};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{Error, Result};
use tilewright_data::Tensor;
use tilewright_expr::{FuncBuilder, Op as ExprOp};
use tilewright_graph::{Graph, NodeId, Op, ReduceKind, ValueId};
use tilewright_layout::numel;

/// A norm that is folded.
struct Norm {
    x: ValueId,
    scale: ValueId,
    eps: u64,
}

/// Whether a product of `y` can take the norm in; where the depth is among its weights' axes.
fn depth_of(graph: &Graph, id: NodeId, y: ValueId) -> Option<usize> {
    let node = &graph.nodes[id];
    let Op::Contract { lhs, rhs, out, .. } = &node.op else { return None };
    let [left, right] = node.inputs[..] else { return None };
    if left != y || right == y {
        return None;
    }
    let weights = graph.as_const(right)?;
    let depth = lhs.chars().last()?;
    let own: Vec<char> = rhs.chars().filter(|l| *l != depth).collect();
    let [column] = own[..] else { return None };
    let kept = &lhs[..lhs.len() - depth.len_utf8()];
    let plain = !lhs.contains(column) && *out == format!("{kept}{column}");
    let letters: BTreeSet<char> = lhs.chars().collect();
    let fits = plain && letters.len() == lhs.chars().count() && weights.dtype().is_float();
    (fits && rhs.chars().count() == 2).then(|| rhs.chars().position(|l| l == depth))?
}

/// The norms to fold, by what they make.
fn norms(
    graph: &Graph,
    wanted: &mut dyn FnMut(&Graph, NodeId, &[NodeId]) -> bool,
) -> BTreeMap<ValueId, Norm> {
    let mut users: Vec<Vec<NodeId>> = vec![Vec::new(); graph.values.len()];
    for (id, node) in graph.live() {
        for v in &node.inputs {
            users[v.index()].push(id);
        }
    }
    let mut found = BTreeMap::new();
    for (id, node) in graph.live() {
        let Op::RmsNorm { axis, eps } = node.op else { continue };
        let (x, scale, y) = (node.inputs[0], node.inputs[1], node.outputs[0]);
        let rank = graph.shape(y).len();
        let readers = &users[y.index()];
        let inside = !readers.is_empty() && graph.outputs.iter().all(|(_, v)| *v != y);
        let products = || readers.iter().all(|&id| depth_of(graph, id, y).is_some());
        let known = graph.as_const(scale).is_some_and(|t| t.dtype().is_float());
        let can = axis + 1 == rank && rank >= 2 && inside && known && products();
        if can && wanted(graph, id, readers) {
            found.insert(y, Norm { x, scale, eps });
        }
    }
    found
}

/// Weights times the norm's scale along the axis `depth` of two, rounded to their type; themselves where the scale is 1.
fn scaled(weights: &Tensor, scale: &Tensor, depth: usize) -> Result<Option<Tensor>> {
    let scale = scale.to_f64s();
    if scale.iter().all(|s| *s == 1.0) {
        return Ok(None);
    }
    let [rows, cols] = weights.shape()[..] else {
        return Err(Error::bug("weights that are no matrix"));
    };
    if scale.len() != [rows, cols][depth] {
        return Err(Error::bug("a norm's scale as long as no depth"));
    }
    let mut out = Tensor::zeros(weights.dtype(), [rows, cols])?;
    let (dtype, from) = (weights.dtype(), weights.bytes());
    let to = out.bytes_mut();
    for row in 0..rows {
        for col in 0..cols {
            let at = row * cols + col;
            let s = scale[if depth == 0 { row } else { col }];
            let value = tilewright_data::read_f64(dtype, from, at) * s;
            tilewright_data::from_f64(dtype, to, at, value);
        }
    }
    Ok(Some(out))
}

/// `1 / sqrt(mean of squares + eps)` of each row.
fn inverse_rms(ed: &mut Editor<'_>, norm: &Norm) -> Result<ValueId> {
    let shape = ed.graph.shape(norm.x).to_vec();
    let wide = ed.graph.dtype(norm.x).compute();
    let last = shape.len() - 1;
    let mut f = FuncBuilder::new();
    let x = f.param("x", ed.graph.dtype(norm.x));
    let x = f.cast(x, wide);
    let square = f.op(ExprOp::Mul, &[x, x]);
    let squares = ed.map(f.finish(square), &[norm.x])?;
    let reduce = Op::Reduce { kind: ReduceKind::Sum, axes: vec![last], keep: true };
    let sum = ed.op(reduce, &[squares])?;
    let mut f = FuncBuilder::new();
    let sum_in = f.param("sum", wide);
    let mut args = vec![sum];
    let count = match shape[last].as_const() {
        Some(n) => f.constant(n as f64, wide),
        None => {
            let n = ed.op(Op::Dims(vec![numel(&shape[last..])]), &[])?;
            let n = ed.reshape(n, &[])?;
            args.push(n);
            let n = f.param("n", ed.graph.dtype(n));
            f.cast(n, wide)
        }
    };
    let mean = f.op(ExprOp::Div, &[sum_in, count]);
    let eps = f.constant(f64::from_bits(norm.eps), wide);
    let mean = f.op(ExprOp::Add, &[mean, eps]);
    let root = f.op(ExprOp::Sqrt, &[mean]);
    let one = f.constant(1.0, wide);
    let inverse = f.op(ExprOp::Div, &[one, root]);
    ed.map(f.finish(inverse), &args)
}

/// See the module's head. `wanted` decides for each norm that could be folded, knowing the products that read it. True when
/// something changed.
///
/// # Errors
/// Bugs only.
pub fn fold_norms(
    graph: &mut Graph,
    wanted: &mut dyn FnMut(&Graph, NodeId, &[NodeId]) -> bool,
) -> Result<bool> {
    let norms = norms(graph, wanted);
    if norms.is_empty() {
        return Ok(false);
    }
    let mut made: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    rewrite(graph, &mut |ed, id| {
        let node = ed.graph.nodes[id].clone();
        let Some((y, norm)) = node.inputs.first().and_then(|y| Some((*y, norms.get(y)?))) else {
            return Ok(None);
        };
        let Some(depth) = depth_of(ed.graph, id, y) else { return Ok(None) };
        let Op::Contract { lhs, rhs, out, acc, dtype } = node.op else { return Ok(None) };
        let inverse = match made.get(&y) {
            Some(inverse) => *inverse,
            None => {
                let inverse = inverse_rms(ed, norm)?;
                made.insert(y, inverse);
                inverse
            }
        };
        let (weights, scale) = (ed.graph.as_const(node.inputs[1]), ed.graph.as_const(norm.scale));
        let (Some(weights), Some(scale)) = (weights, scale) else { return Ok(None) };
        let weights = match scaled(weights, scale, depth)? {
            Some(tensor) => ed.constant(tensor),
            None => node.inputs[1],
        };
        let product = Op::Contract { lhs, rhs, out, acc, dtype: acc };
        let sums = ed.op(product, &[norm.x, weights])?;
        let mut f = FuncBuilder::new();
        let (u, r) = (f.param("u", acc), f.param("r", ed.graph.dtype(inverse)));
        let r = f.cast(r, acc);
        let z = f.op(ExprOp::Mul, &[u, r]);
        let z = f.cast(z, dtype);
        Ok(Some(vec![ed.map(f.finish(z), &[sums, inverse])?]))
    })
}
