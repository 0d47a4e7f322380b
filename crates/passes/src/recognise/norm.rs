//! Layer norm and RMS norm out of their parts.
//!
//! ```text
//! before: v1 = mean of v0                      after: v9 = layer_norm axis=2 eps=1e-12 v0, g, b
//!         v2 = map(v0, v1) { x, m -> x - m }
//!         v4 = mean of map(v2) { d -> d^2 }
//!         v6 = map(v4) { v -> sqrt(v + 1e-12) }
//!         v9 = map(v2, v6, g, b) { d, s, g, b -> d / s * g + b }
//! ```
//!
//! The normalised value may be `d / sqrt(..)`, `d * rsqrt(..)`, `d * (1 / sqrt(..))` or
//! `d * pow(.., -0.5)`; the square `d * d` or `pow(d, 2)`; a mean is a sum divided by the count.
//! RMS norm is the same with `x` for `d`. Factors and summands may stand in either order. The scale
//! may be missing (ones are made), the bias too.
//!
//! Side conditions: the means are over the last axes, of sizes that are numbers; scale and bias
//! vary along those axes only; the result has the type of `x`.

use crate::edit::Editor;
use crate::view::{Term, View};
use tilewright_base::Result;
use tilewright_data::Tensor;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{NodeId, Op, ValueId};

/// What was found.
struct Norm {
    x: ValueId,
    axis: usize,
    eps: f64,
    centred: bool,
    scale: Option<ValueId>,
    bias: Option<ValueId>,
}

pub(super) fn rule(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    let out = ed.graph.nodes[id].outputs[0];
    if let Some(v) = absorb(ed, out)? {
        return Ok(Some(v));
    }
    let Some(norm) = find(View(ed.graph), out) else { return Ok(None) };
    let (x, axis) = (norm.x, norm.axis);
    if ed.graph.ty(x) != ed.graph.ty(out) {
        return Ok(None);
    }
    let row = ed.graph.shape(x).len() - axis;
    // Operands of the norm live in the normalised axes; leading axes of extent 1 go.
    let mut operands = vec![x];
    for v in [norm.scale, norm.bias].into_iter().flatten() {
        let shape = ed.graph.shape(v).to_vec();
        let real = shape.len() - shape.iter().take_while(|d| d.is(1)).count();
        if real > row {
            return Ok(None);
        }
        let lead = shape.len().saturating_sub(row);
        operands.push(ed.reshape(v, &shape[lead..])?);
    }
    if norm.scale.is_none() {
        let ones = ed.constant(Tensor::from_f64s(ed.graph.dtype(x), &[1], &[1.0])?);
        operands.insert(1, ones);
    }
    let eps = norm.eps.to_bits();
    let op = if norm.centred { Op::LayerNorm { axis, eps } } else { Op::RmsNorm { axis, eps } };
    Ok(Some(ed.op(op, &operands)?))
}

/// A factor after a norm with scale one is its scale, a summand after a norm without bias its bias.
/// (The bare norm comes first in the program and is found first.)
fn absorb(ed: &mut Editor<'_>, out: ValueId) -> Result<Option<ValueId>> {
    let view = View(ed.graph);
    let root = Term::Value(out);
    let (pair, is_scale) = match (view.pair(root, ExprOp::Mul), view.pair(root, ExprOp::Add)) {
        (Some(pair), _) => (pair, true),
        (_, Some(pair)) => (pair, false),
        _ => return Ok(None),
    };
    for (norm, other) in [pair, (pair.1, pair.0)] {
        let (Some(norm), Some(other)) = (view.value(norm), view.value(other)) else { continue };
        let Some(node) = ed.node_of(norm) else { continue };
        let (op, mut operands) = (node.op.clone(), node.inputs.clone());
        let (Op::LayerNorm { axis, .. } | Op::RmsNorm { axis, .. }) = op else { continue };
        let free = if is_scale {
            operands.len() == 2 && view.number(Term::Value(operands[1])) == Some(1.0)
        } else {
            operands.len() == 2 && matches!(op, Op::LayerNorm { .. })
        };
        let shape = ed.graph.shape(other).to_vec();
        let row = ed.graph.shape(norm).len() - axis;
        let real = shape.len() - shape.iter().take_while(|d| d.is(1)).count();
        if !free || real > row || ed.graph.ty(norm) != ed.graph.ty(out) {
            continue;
        }
        let other = ed.reshape(other, &shape[shape.len().saturating_sub(row)..])?;
        match is_scale {
            true => operands[1] = other,
            false => operands.push(other),
        }
        return Ok(Some(ed.op(op, &operands)?));
    }
    Ok(None)
}

fn find(view: View<'_>, out: ValueId) -> Option<Norm> {
    let root = Term::Value(out);
    // ((x-m)/s * g) + b, with b or g or both missing.
    if let Some((a, b)) = view.pair(root, ExprOp::Add) {
        for (scaled, bias) in [(a, b), (b, a)] {
            if let Some(norm) = scaled_norm(view, scaled)
                && norm.centred
                && let Some(bias) = view.value(bias)
            {
                return Some(Norm { bias: Some(bias), ..norm });
            }
        }
        return None;
    }
    // A centred norm whose bias follows is found there: the whole is better than the part.
    scaled_norm(view, root)
}

fn scaled_norm(view: View<'_>, term: Term) -> Option<Norm> {
    if let Some(norm) = normalised(view, term) {
        return Some(norm);
    }
    let (a, b) = view.pair(term, ExprOp::Mul)?;
    for (inner, scale) in [(a, b), (b, a)] {
        if let Some(norm) = normalised(view, inner)
            && let Some(scale) = view.value(scale)
        {
            return Some(Norm { scale: Some(scale), ..norm });
        }
        // x * (rsqrt(..) * g), as some exporters write it.
        if let Some((c, d)) = view.pair(scale, ExprOp::Mul) {
            for (factor, scale) in [(c, d), (d, c)] {
                if let Some(v) = inverse_root(view, factor)
                    && let Some(norm) = over_variance(view, inner, v)
                    && let Some(scale) = view.value(scale)
                {
                    return Some(Norm { scale: Some(scale), ..norm });
                }
            }
        }
    }
    None
}

/// `d / sqrt(v)` in any spelling.
fn normalised(view: View<'_>, term: Term) -> Option<Norm> {
    if let Some((d, s)) = view.pair(term, ExprOp::Div) {
        let v = root_of(view, s)?;
        return over_variance(view, d, v);
    }
    let (a, b) = view.pair(term, ExprOp::Mul)?;
    for (d, factor) in [(a, b), (b, a)] {
        if let Some(v) = inverse_root(view, factor)
            && let Some(norm) = over_variance(view, d, v)
        {
            return Some(norm);
        }
    }
    None
}

/// `v` of `sqrt(v)` or `pow(v, 0.5)`.
fn root_of(view: View<'_>, term: Term) -> Option<Term> {
    if let Some(args) = view.is(term, ExprOp::Sqrt) {
        return args.first().copied();
    }
    let (v, p) = view.pair(term, ExprOp::Pow)?;
    (view.number(p)? == 0.5).then_some(v)
}

/// `v` of `1 / sqrt(v)`.
fn inverse_root(view: View<'_>, term: Term) -> Option<Term> {
    if let Some(args) = view.is(term, ExprOp::Rsqrt) {
        return args.first().copied();
    }
    if let Some((one, s)) = view.pair(term, ExprOp::Div) {
        return if view.number(one)? == 1.0 { root_of(view, s) } else { None };
    }
    let (v, p) = view.pair(term, ExprOp::Pow)?;
    (view.number(p)? == -0.5).then_some(v)
}

/// `d / sqrt(v)` is a norm when `v` is the mean of the squares of `d`, plus a number.
fn over_variance(view: View<'_>, d: Term, v: Term) -> Option<Norm> {
    let (mean, eps) = match view.pair(v, ExprOp::Add) {
        Some((a, b)) => match (view.number(a), view.number(b)) {
            (None, Some(eps)) => (a, eps),
            (Some(eps), None) => (b, eps),
            _ => return None,
        },
        None => (v, 0.0),
    };
    let (squares, axes) = view.mean(mean)?;
    let base = square_of(view, Term::Value(squares))?;
    if !view.same(base, d) {
        return None;
    }
    let rank = view.0.shape(squares).len();
    let axis = *axes.first()?;
    if !axes.iter().copied().eq(axis..rank) {
        return None;
    }
    // Centred when d is x minus its mean over the same axes.
    if let Some((x, m)) = view.pair(d, ExprOp::Sub)
        && let Some((averaged, mean_axes)) = view.mean(m)
        && mean_axes == axes
        && view.same(Term::Value(averaged), x)
    {
        let x = view.value(x)?;
        return Some(Norm { x, axis, eps, centred: true, scale: None, bias: None });
    }
    Some(Norm { x: view.value(d)?, axis, eps, centred: false, scale: None, bias: None })
}

fn square_of(view: View<'_>, term: Term) -> Option<Term> {
    if let Some((a, b)) = view.pair(term, ExprOp::Mul) {
        return view.same(a, b).then_some(a);
    }
    let (x, p) = view.pair(term, ExprOp::Pow)?;
    (view.number(p)? == 2.0).then_some(x)
}
