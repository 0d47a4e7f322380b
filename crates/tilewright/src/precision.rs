//! What rounding may cost: the part of the error budget that `--precision tf32`, `f16` and `bf16` add.
//!
//! A product `c = sum over k of a[k] * b[k]` with operands rounded to nearest errs by
//! `sum of a[k] * b[k] * (d[k] + e[k])`, where `d` and `e` are at most the unit roundoff `u`
//! (`2^-8` for `bf16`).
//! For independent roundings, Hoeffding's inequality bounds this, but for a chance of
//! `2 exp(-L^2/2)`, by
//!
//! ```text
//! L * 2u * sqrt(sum over k of a[k]^2 * b[k]^2)        L = 6: one element in 33 million
//! ```
//!
//! The sum is computed in float64, from the oracle's operands; the reduction length is in it. Its
//! largest value over a result, divided by the result's largest magnitude, is the product's *share*.
//! Shares of the products that a value depends on add as independent errors do, the square root of
//! the sum of squares, and their part of the value's budget is that times its largest magnitude. So
//! the operators between products are taken to pass a relative error on about as it is.
//!
//! A value that is stored in fewer bits errs by at most `u` times its magnitude; that is a share, too.
//! Softmax turns the absolute error of its operand into twice that, relative, in its result; so the
//! shares that arose since the last product count times the largest magnitude of those scores that matter.
//!
//! Attention is two products: the scores, whose error is an absolute one in the exponent (twice that,
//! relative, in a weight), and the weighted sum of the values, whose weights add to 1.

use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_graph::{AttentionAttrs, Def, Graph, Node, NodeId, Op, Value, ValueId};
use tilewright_interp::{Mode, Options, run_with};
use tilewright_layout::Env;
use tilewright_plan::Plan;
use tilewright_target::Precision;

/// How many standard widths of Hoeffding's bound.
const WIDTHS: f64 = 6.0;

/// What is rounded in a run.
#[derive(Clone, Debug)]
pub(crate) struct Rounding {
    /// Unit roundoff of the operands of `f32` products, and of stored values.
    unit: f64,
    /// Values that are stored rounded, too.
    stored: BTreeSet<ValueId>,
}

impl Rounding {
    /// What a plan rounds under this precision; `None` for nothing.
    pub(crate) fn of(precision: Precision, graph: &Graph, plan: &Plan) -> Option<Rounding> {
        let unit = match precision {
            Precision::F32 => return None,
            // The tensor cores may drop the digits beyond the eleventh instead of rounding.
            Precision::Tf32 => 1.0 / 1024.0,
            Precision::F16 => 1.0 / 2048.0,
            Precision::Bf16 => 1.0 / 256.0,
        };
        let stored = plan
            .buffers
            .iter()
            .filter_map(|(_, b)| Some((ValueId(b.value?), b.dtype)))
            .filter(|(v, dtype)| dtype.is_float() && dtype.bits() < graph.dtype(*v).bits())
            .map(|(v, _)| v)
            .collect();
        Some(Rounding { unit, stored })
    }
}

/// For each value, what rounding may cost it, relative to its largest magnitude.
pub(crate) fn shares(
    graph: &Graph,
    trace: &BTreeMap<ValueId, Tensor>,
    env: &Env,
    rounding: &Rounding,
) -> Result<BTreeMap<ValueId, f64>> {
    // Errors that arise at a node: of its product, of its softmax, of storing its result.
    let mut squares: BTreeMap<(NodeId, u8), f64> = BTreeMap::new();
    let mut above: BTreeMap<ValueId, BTreeSet<(NodeId, u8)>> = BTreeMap::new();
    // Of these, the ones that arose at the last product on the way or after it.
    let mut fresh: BTreeMap<ValueId, BTreeSet<(NodeId, u8)>> = BTreeMap::new();
    let mut shares = BTreeMap::new();
    for (id, node) in graph.live() {
        let mut all: BTreeSet<(NodeId, u8)> = BTreeSet::new();
        let mut new: BTreeSet<(NodeId, u8)> = BTreeSet::new();
        for v in &node.inputs {
            all.extend(above.get(v).into_iter().flatten());
            new.extend(fresh.get(v).into_iter().flatten());
        }
        if let Some(share) = own_share(graph, node, trace, env, rounding.unit)? {
            squares.insert((id, 0), share * share);
            all.insert((id, 0));
            new = BTreeSet::from([(id, 0)]);
        }
        if let Op::Softmax { axis, .. } = node.op {
            let total: f64 = new.iter().map(|n| squares[n]).sum();
            let scores = trace.get(&node.inputs[0]).map_or(0.0, |x| relevant(x, axis));
            let slope = (2.0 * scores).max(1.0);
            squares.insert((id, 1), total * slope * slope);
            all.retain(|n| !new.contains(n));
            all.insert((id, 1));
            new = BTreeSet::from([(id, 1)]);
        }
        // Weights that are no operand of a product are rounded, too.
        let rounded = |v: &ValueId| rounding.stored.contains(v);
        let constants = node.inputs.iter().filter(|v| graph.as_const(**v).is_some());
        let count = constants.filter(|v| rounded(v)).count()
            + usize::from(node.outputs.iter().any(|v| rounded(v)));
        if count > 0 {
            squares.insert((id, 2), count as f64 * rounding.unit * rounding.unit);
            all.insert((id, 2));
            new.insert((id, 2));
        }
        let total: f64 = all.iter().map(|n| squares[n]).sum();
        for &v in &node.outputs {
            shares.insert(v, total.sqrt());
            above.insert(v, all.clone());
            fresh.insert(v, new.clone());
        }
    }
    Ok(shares)
}

/// The share of a node that rounds its operands; `None` for all others.
fn own_share(
    graph: &Graph,
    node: &Node,
    trace: &BTreeMap<ValueId, Tensor>,
    env: &Env,
    unit: f64,
) -> Result<Option<f64>> {
    let is_f32 = |i: usize| graph.dtype(node.inputs[i]) == DType::F32;
    let product = match &node.op {
        Op::Contract { .. } | Op::Conv(_) => is_f32(0) || is_f32(1),
        Op::Attention(_) => is_f32(0),
        _ => false,
    };
    if !product {
        return Ok(None);
    }
    let operand = |i: usize| {
        let v = node.inputs[i];
        graph.as_const(v).or_else(|| trace.get(&v))
    };
    let Some(result) = trace.get(&node.outputs[0]) else { return Ok(None) };
    let largest = magnitude(result);
    if largest == 0.0 {
        return Ok(None);
    }
    let error = match &node.op {
        Op::Attention(attrs) => match (operand(0), operand(1), operand(2)) {
            (Some(q), Some(k), Some(v)) => {
                let scores = WIDTHS * 2.0 * unit * score_squares(q, k).sqrt();
                let weights = 2.0 * scores * slope(attrs) + WIDTHS * 2.0 * unit;
                weights * magnitude(v)
            }
            _ => return Ok(None),
        },
        _ => {
            let (Some(a), Some(b)) = (operand(0), operand(1)) else { return Ok(None) };
            let (alone, operands) = (alone(graph, node), [squared(a)?, squared(b)?]);
            let options = Options { env: env.clone(), ..Options::new(Mode::F64) };
            let sums = run_with(&alone, &operands, &options)?.outputs;
            WIDTHS * 2.0 * unit * magnitude(&sums[0]).sqrt()
        }
    };
    Ok(Some(error / largest))
}

/// Largest finite magnitude.
fn magnitude(tensor: &Tensor) -> f64 {
    (0..tensor.len()).map(|i| tensor.get_f64(i).abs()).filter(|x| x.is_finite()).fold(0.0, f64::max)
}

/// Largest magnitude of scores that are no more than 20 below the largest of their row: what is lower has
/// a weight below 2e-9.
fn relevant(tensor: &Tensor, axis: usize) -> f64 {
    let shape = tensor.shape();
    let len = shape.get(axis).copied().unwrap_or(1);
    let inner: usize = shape.iter().skip(axis + 1).product();
    let mut most = 0.0f64;
    for start in (0..tensor.len()).filter(|i| (i / inner.max(1)) % len.max(1) == 0) {
        let row = (0..len).map(|i| tensor.get_f64(start + i * inner));
        let top = row.clone().filter(|x| x.is_finite()).fold(f64::NEG_INFINITY, f64::max);
        most = row.filter(|x| *x >= top - 20.0).map(f64::abs).fold(most, f64::max);
    }
    most
}

fn squared(tensor: &Tensor) -> Result<Tensor> {
    let values: Vec<f64> = (0..tensor.len()).map(|i| tensor.get_f64(i).powi(2)).collect();
    Tensor::from_f64s(DType::F64, tensor.shape(), &values)
}

/// How much the score function stretches a difference of dot products: its slope from 0 to 1 where
/// all else is 0.
fn slope(attrs: &AttentionAttrs) -> f64 {
    let others = attrs.score.params().len() - 1;
    let at = |dot: f64| {
        let mut args = vec![0.0; others + 1];
        args[0] = dot;
        attrs.score.eval_f64(&args)
    };
    let slope = (at(1.0) - at(0.0)).abs();
    if slope.is_finite() { slope } else { 1.0 }
}

/// Largest `sum over d of q[s,d]^2 * k[t,d]^2` over all rows, keys, heads and batches.
fn score_squares(q: &Tensor, k: &Tensor) -> f64 {
    let (qs, ks) = (q.shape(), k.shape());
    let (rows, depth, keys) = (qs[2], qs[3], ks[2]);
    let squares = |t: &Tensor| -> Vec<f64> { t.to_f64s().iter().map(|x| x * x).collect() };
    let (q2, k2) = (squares(q), squares(k));
    let per_group = (qs[1] / ks[1].max(1)).max(1);
    let mut most = 0.0f64;
    for b in 0..qs[0] {
        for h in 0..qs[1] {
            let (from, other) = (b * qs[1] + h, b * ks[1] + h / per_group);
            for s in 0..rows {
                let row = &q2[(from * rows + s) * depth..][..depth];
                for t in 0..keys {
                    let key = &k2[(other * keys + t) * depth..][..depth];
                    let sum: f64 = row.iter().zip(key).map(|(x, y)| x * y).sum();
                    if sum.is_finite() {
                        most = most.max(sum);
                    }
                }
            }
        }
    }
    most
}

/// A graph of this node and its first two operands only.
fn alone(graph: &Graph, node: &Node) -> Graph {
    let mut alone = Graph::new(graph.name.clone());
    alone.symbols = graph.symbols.clone();
    let inputs: Vec<ValueId> = node.inputs[..2]
        .iter()
        .enumerate()
        .map(|(i, &v)| {
            let (name, ty) = (format!("operand {i}"), graph.ty(v).clone());
            alone.values.push(Value { name, ty, def: Def::Input(i) })
        })
        .collect();
    alone.inputs = inputs.clone();
    let types = node.outputs.iter().map(|&v| graph.ty(v).clone()).collect();
    let id = alone.add_node(node.op.clone(), inputs, types, node.origin.clone());
    alone.order.push(id);
    alone.outputs.push(("sum".into(), alone.nodes[id].outputs[0]));
    alone
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_graph::{GraphBuilder, TensorType};
    use tilewright_layout::Dim;

    /// `[1, 2] x [3; 4]`: the sum of squares is 9 + 64, the result 11, and a map keeps the share.
    #[test]
    fn the_share_of_a_product_worked_out_by_hand() {
        let mut b = GraphBuilder::new("g");
        let d = |n: i64| Dim::new(n);
        let x = b.input("x", TensorType::new(DType::F32, vec![d(1), d(2)]));
        let w = b.constant("w", Tensor::from_f64s(DType::F32, &[2, 1], &[3.0, 4.0]).unwrap());
        let y = b.contract("mk,kn->mn", x, w).unwrap();
        let z = b.binary(tilewright_expr::Op::Add, y, y).unwrap();
        b.output("z", z);
        let graph = b.finish();
        let input = Tensor::from_f64s(DType::F32, &[1, 2], &[1.0, 2.0]).unwrap();
        let options = Options { trace: true, ..Options::new(Mode::F64) };
        let run = run_with(&graph, &[input], &options).unwrap();
        let rounding = Rounding { unit: 1.0 / 256.0, stored: BTreeSet::new() };
        let shares = shares(&graph, &run.trace, &run.env, &rounding).unwrap();
        let want = 6.0 * 2.0 / 256.0 * 73f64.sqrt() / 11.0;
        assert!((shares[&y] - want).abs() < 1e-12, "{} {want}", shares[&y]);
        assert_eq!(shares[&y], shares[&z]);
    }
}
