//! Scales after a convolution go into its weights.
//!
//! ```text
//! before: v2 = conv v0, w                      after: v2 = conv v0, w'    w' = w * a
//!         v3 = batch_norm v2, g, b, m, v              v3 = map(v2, b') { x, b -> x + b }
//! ```
//!
//! with `a = g / sqrt(v + eps)` and `b' = b - m * a`, computed in float64 and rounded once. A bias
//! map between the two is taken along (`b' = b + (c - m) * a`). A map that multiplies by constants
//! per channel is folded the same way.
//!
//! Side conditions: weights and all norm operands are constants; the convolution is read only here.

use crate::edit::Editor;
use crate::view::{Term, View};
use tilewright_base::Result;
use tilewright_data::Tensor;
use tilewright_expr::{Func, Op as ExprOp};
use tilewright_graph::{NodeId, Op, ValueId};

/// A convolution with constant weights, perhaps followed by a constant bias per channel.
struct Convolution {
    op: Op,
    x: ValueId,
    weights: Tensor,
    bias: Option<Vec<f64>>,
}

/// The elements of a constant that has one per channel (`[C]`, `[C,1,1]`, `[1,C,1,1]`, or one
/// element) where data has `rank` axes.
fn per_channel(ed: &Editor<'_>, v: ValueId, channels: usize, rank: usize) -> Option<Vec<f64>> {
    let tensor = ed.graph.as_const(v)?;
    let shape = tensor.shape();
    if tensor.len() == 1 {
        return Some(vec![tensor.get_f64(0); channels]);
    }
    let channel_axis = (shape.len() + 1).checked_sub(rank)?;
    let fits =
        shape.iter().enumerate().all(|(i, &d)| d == if i == channel_axis { channels } else { 1 });
    fits.then(|| tensor.to_f64s())
}

fn convolution(ed: &Editor<'_>, v: ValueId) -> Option<Convolution> {
    if !ed.only_here(v) {
        return None;
    }
    let node = ed.node_of(v)?;
    if let Op::Conv(_) = node.op {
        let weights = ed.graph.as_const(node.inputs[1])?.clone();
        return Some(Convolution { op: node.op.clone(), x: node.inputs[0], weights, bias: None });
    }
    let (a, b) = View(ed.graph).pair(Term::Value(v), ExprOp::Add)?;
    let rank = ed.graph.shape(v).len();
    for (inner, bias) in [(a, b), (b, a)] {
        let (Some(inner), Some(bias)) = (View(ed.graph).value(inner), View(ed.graph).value(bias))
        else {
            continue;
        };
        if let Some(Op::Conv(_)) = ed.op_of(inner)
            && let Some(mut conv) = convolution(ed, inner)
            && let Some(bias) = per_channel(ed, bias, conv.weights.shape()[0], rank)
        {
            conv.bias = Some(bias);
            return Some(conv);
        }
    }
    None
}

/// `conv * scale + shift` as a convolution and a bias.
fn scaled(
    ed: &mut Editor<'_>,
    conv: &Convolution,
    scale: &[f64],
    shift: Option<&[f64]>,
) -> Result<ValueId> {
    let channels = conv.weights.shape()[0];
    let per = conv.weights.len() / channels.max(1);
    let mut weights = conv.weights.to_f64s();
    for (i, w) in weights.iter_mut().enumerate() {
        *w *= scale[i / per.max(1)];
    }
    let dtype = conv.weights.dtype();
    let rank = conv.weights.shape().len();
    let weights = ed.constant(Tensor::from_f64s(dtype, conv.weights.shape(), &weights)?);
    let out = ed.op(conv.op.clone(), &[conv.x, weights])?;
    let bias: Option<Vec<f64>> = match (&conv.bias, shift) {
        (None, None) => None,
        (bias, shift) => Some(
            (0..channels)
                .map(|c| {
                    bias.as_ref().map_or(0.0, |b| b[c] * scale[c]) + shift.map_or(0.0, |s| s[c])
                })
                .collect(),
        ),
    };
    match bias {
        None => Ok(out),
        Some(bias) => {
            let mut shape = vec![channels];
            shape.extend(std::iter::repeat_n(1, rank - 2));
            let bias = ed.constant(Tensor::from_f64s(dtype, &shape, &bias)?);
            ed.map(Func::binary(ExprOp::Add, dtype), &[out, bias])
        }
    }
}

pub(super) fn batch_norm_rule(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    let node = ed.graph.nodes[id].clone();
    let Op::BatchNorm { eps } = node.op else { return Ok(None) };
    let Some(conv) = convolution(ed, node.inputs[0]) else { return Ok(None) };
    let constants: Option<Vec<Vec<f64>>> =
        node.inputs[1..].iter().map(|&v| ed.graph.as_const(v).map(Tensor::to_f64s)).collect();
    let Some([gamma, beta, mean, var]) = constants.and_then(|c| <[Vec<f64>; 4]>::try_from(c).ok())
    else {
        return Ok(None);
    };
    let eps = f64::from_bits(eps);
    let scale: Vec<f64> = gamma.iter().zip(&var).map(|(g, v)| g / (v + eps).sqrt()).collect();
    let shift: Vec<f64> = (0..scale.len()).map(|c| beta[c] - mean[c] * scale[c]).collect();
    if scale.len() != conv.weights.shape()[0] {
        return Ok(None);
    }
    Ok(Some(scaled(ed, &conv, &scale, Some(&shift))?))
}

pub(super) fn map_rule(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    let out = ed.graph.nodes[id].outputs[0];
    let view = View(ed.graph);
    let Some((a, b)) = view.pair(Term::Value(out), ExprOp::Mul) else { return Ok(None) };
    for (inner, factor) in [(a, b), (b, a)] {
        let (Some(inner), Some(factor)) = (view.value(inner), view.value(factor)) else { continue };
        if ed.graph.ty(inner) != ed.graph.ty(out) {
            continue;
        }
        let Some(conv) = convolution(ed, inner) else { continue };
        let rank = ed.graph.shape(out).len();
        let Some(scale) = per_channel(ed, factor, conv.weights.shape()[0], rank) else { continue };
        return Ok(Some(scaled(ed, &conv, &scale, None)?));
    }
    Ok(None)
}
