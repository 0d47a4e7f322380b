//! Attention out of two contractions around a softmax.
//!
//! ```text
//! before: v1 = contract bshd,bthd->bhst q, k
//!         v2 = map(v1, mask) { s, m -> s / 8 + m }
//!         v3 = softmax axis=3 v2
//!         v4 = contract bhst,bthe->bshe v3, v
//! after:  q1 = permute [0,2,1,3] q, and k1, v1 alike
//!         v5 = attention { s, m -> s / 8 + m } q1, k1, v1, mask
//!         v4 = permute [0,2,1,3] v5
//! ```
//!
//! The maps between the first contraction and the softmax become the score function; operands that
//! do not depend on the scores become extra operands (a mask is computed once, not per head). A
//! factor on q or k moves into the score function, where it costs nothing. Letters may stand in any
//! order: permutes in front of the attention are views that lowering reads through.
//!
//! Side conditions: the softmax runs over an axis that the second contraction sums; the scores and
//! probabilities are read nowhere else; one or two batch letters (or none); q spans all of them,
//! k and v span the second ("heads") fully or not at all; floats of one type.

use crate::edit::Editor;
use crate::view::{Term, View};
use tilewright_base::Result;
use tilewright_expr::{ExprId, FuncBuilder, Op as ExprOp};
use tilewright_graph::{AttentionAttrs, NodeId, Op, ValueId};
use tilewright_layout::{Dim, broadcast_shapes};

/// The matched program, before anything is built.
struct Match {
    /// The first contraction's result.
    scores: ValueId,
    /// The softmax's operand.
    masked: ValueId,
    q: Operand,
    k: Operand,
    v: Operand,
    /// The letters of the score's axes, in their order.
    axes: Vec<char>,
    /// Batch letters in the order of the score's axes, at most two.
    batch: Vec<char>,
    /// The letters of query position, key position, and what v adds.
    s: char,
    t: char,
    d: Vec<char>,
    e: Vec<char>,
    /// Letters of the second contraction's result.
    out: String,
}

/// A value with letters for its axes.
#[derive(Clone)]
struct Operand {
    value: ValueId,
    letters: String,
}

pub(super) fn rule(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    match find(ed, id) {
        Some(m) => build(ed, &m),
        None => Ok(None),
    }
}

fn find(ed: &Editor<'_>, id: NodeId) -> Option<Match> {
    let Op::Contract { lhs, rhs, out, .. } = &ed.graph.nodes[id].op else { return None };
    let inputs = &ed.graph.nodes[id].inputs;
    let sides = [(inputs[0], lhs, inputs[1], rhs), (inputs[1], rhs, inputs[0], lhs)];
    sides
        .into_iter()
        .find_map(|(p, p_letters, v, v_letters)| find_with(ed, p, p_letters, v, v_letters, out))
}

fn find_with(
    ed: &Editor<'_>,
    p: ValueId,
    p_letters: &str,
    v: ValueId,
    v_letters: &str,
    out: &str,
) -> Option<Match> {
    let softmax = ed.node_of(p)?;
    let Op::Softmax { axis, log: false } = softmax.op else { return None };
    if !ed.only_here(p) {
        return None;
    }
    let masked = softmax.inputs[0];
    let p_axes: Vec<char> = p_letters.chars().collect();
    let t = *p_axes.get(axis)?;
    if out.contains(t) || !v_letters.contains(t) {
        return None;
    }
    let scores = scores_under(ed, masked)?;
    let first = ed.node_of(scores)?;
    let Op::Contract { lhs, rhs, out: score_letters, .. } = &first.op else { return None };
    if ed.graph.shape(scores).len() != p_axes.len()
        || ed.graph.shape(masked) != ed.graph.shape(scores)
    {
        return None;
    }
    // One alphabet for both contractions: score axis i is called p_axes[i]; summed letters of the
    // first get names of their own.
    let scored: Vec<char> = score_letters.chars().collect();
    let rename = |letters: &str| -> String {
        letters
            .chars()
            .map(|l| match scored.iter().position(|s| *s == l) {
                Some(i) => p_axes[i],
                None => char::from_u32(0xE000 + l as u32).unwrap_or('?'),
            })
            .collect()
    };
    let a = Operand { value: first.inputs[0], letters: rename(lhs) };
    let b = Operand { value: first.inputs[1], letters: rename(rhs) };
    let (q, k) = if b.letters.contains(t) { (a, b) } else { (b, a) };
    if q.letters.contains(t) || !k.letters.contains(t) {
        return None;
    }
    let v = Operand { value: v, letters: v_letters.to_string() };
    // The query position: the score axis that only q has, and that stays.
    let mut own = p_axes.iter().filter(|c| {
        **c != t && q.letters.contains(**c) && !k.letters.contains(**c) && !v.letters.contains(**c)
    });
    // With k and v shared by all heads there are two such axes: the position is the last.
    let s = *own.next_back()?;
    if !out.contains(s) {
        return None;
    }
    let batch: Vec<char> = p_axes.iter().copied().filter(|c| *c != s && *c != t).collect();
    let e: Vec<char> = v.letters.chars().filter(|c| *c != t && !batch.contains(c)).collect();
    let d: Vec<char> = q.letters.chars().filter(|c| *c != s && !batch.contains(c)).collect();
    let d_in_k = k.letters.chars().filter(|c| *c != t && !batch.contains(c)).count();
    let good = batch.len() <= 2
        && batch.iter().all(|c| q.letters.contains(*c) && out.contains(*c))
        && d.len() == 1
        && d_in_k == 1
        && d.iter().all(|c| k.letters.contains(*c))
        && e.len() == 1
        && e.iter().all(|c| out.contains(*c) && !p_axes.contains(c));
    if !good {
        return None;
    }
    // Extents: the batch is common; heads of k and v are all or one, and the same for both.
    let extent = |o: &Operand, c: char| {
        o.letters.chars().position(|l| l == c).map(|i| ed.graph.shape(o.value)[i].clone())
    };
    for (i, &c) in batch.iter().enumerate() {
        let (n, g, h) = (extent(&q, c)?, extent(&k, c), extent(&v, c));
        let heads = i + 1 == batch.len();
        let one = |d: &Option<Dim>| d.as_ref().is_none_or(|d| d.is(1));
        let full = |d: &Option<Dim>| d.as_ref() == Some(&n);
        let shared = heads && one(&g) && one(&h);
        if !(shared || (full(&g) && full(&h))) {
            return None;
        }
    }
    let same = |a: Option<Dim>, b: Option<Dim>| a.is_some() && a == b;
    if !same(extent(&q, d[0]), extent(&k, d[0])) || !same(extent(&k, t), extent(&v, t)) {
        return None;
    }
    let dtype = ed.graph.dtype(v.value);
    if !dtype.is_float() || ed.graph.dtype(q.value) != dtype || ed.graph.dtype(k.value) != dtype {
        return None;
    }
    Some(Match { scores, masked, q, k, v, axes: p_axes, batch, s, t, d, e, out: out.to_string() })
}

/// The contraction at the root of a chain of maps, each read only here and of one shape.
fn scores_under(ed: &Editor<'_>, mut v: ValueId) -> Option<ValueId> {
    let shape = ed.graph.shape(v).to_vec();
    loop {
        if !ed.only_here(v) || ed.graph.shape(v) != shape {
            return None;
        }
        let node = ed.node_of(v)?;
        match &node.op {
            Op::Contract { .. } => return Some(v),
            Op::Map(_) => {
                let mut next = None;
                for &input in &node.inputs {
                    if ed.graph.shape(input) == shape && leads_to_contract(ed, input) {
                        if next.is_some_and(|n| n != input) {
                            return None;
                        }
                        next = Some(input);
                    }
                }
                v = next?;
            }
            _ => return None,
        }
    }
}

fn leads_to_contract(ed: &Editor<'_>, v: ValueId) -> bool {
    match ed.node_of(v) {
        Some(node) => match &node.op {
            Op::Contract { .. } => true,
            Op::Map(_) => node.inputs.iter().any(|&i| leads_to_contract(ed, i)),
            _ => false,
        },
        None => false,
    }
}

fn build(ed: &mut Editor<'_>, m: &Match) -> Result<Option<ValueId>> {
    // Factors on q and k.
    let (q, q_factor) = unscaled(ed, m.q.value)?;
    let (k, k_factor) = unscaled(ed, m.k.value)?;
    let dtype = ed.graph.dtype(m.v.value);
    if ed.graph.dtype(q) != dtype || ed.graph.dtype(k) != dtype {
        return Ok(None);
    }
    // The score function. Its first parameter has the type of the scores.
    let mut f = FuncBuilder::new();
    let score_type = ed.graph.dtype(m.scores);
    let dot = f.param("s", score_type);
    let factor = q_factor * k_factor;
    let scaled = if factor == 1.0 {
        dot
    } else {
        let factor = f.constant(factor, score_type);
        f.op(ExprOp::Mul, &[dot, factor])
    };
    let mut extras: Vec<(ValueId, ExprId)> = Vec::new();
    let result = score(ed, m, m.masked, scaled, &mut f, &mut extras);
    let score = f.finish(result);

    // Axes as attention has them: batch, heads, position, features. Missing ones have extent 1.
    let missing = 2 - m.batch.len();
    let mut operands = Vec::with_capacity(3 + extras.len());
    for (value, letters, position, feature) in [
        (q, &m.q.letters, m.s, m.d[0]),
        (k, &m.k.letters, m.t, m.d[0]),
        (m.v.value, &m.v.letters, m.t, m.e[0]),
    ] {
        let mut wanted: Vec<char> = m.batch.clone();
        wanted.extend([position, feature]);
        let perm: Vec<usize> =
            wanted.iter().filter_map(|c| letters.chars().position(|l| l == *c)).collect();
        let moved = ed.permute(value, &perm)?;
        let mut shape = vec![Dim::new(1); missing];
        let mut extents = ed.graph.shape(moved).to_vec().into_iter();
        for c in &wanted {
            let here = letters.contains(*c);
            shape.push(if here { extents.next().unwrap_or_default() } else { Dim::new(1) });
        }
        operands.push(ed.reshape(moved, &shape)?);
    }
    // Extra operands are spread over the score's axes `[batch.., s, t]`, in the order that the
    // score had; bring them into attention's.
    let p_axes = &m.axes;
    let mut wanted: Vec<char> = m.batch.clone();
    wanted.extend([m.s, m.t]);
    let perm: Vec<usize> =
        wanted.iter().filter_map(|c| p_axes.iter().position(|p| p == c)).collect();
    let mut full =
        vec![ed.graph.shape(operands[0])[0].clone(), ed.graph.shape(operands[0])[1].clone()];
    full.push(ed.graph.shape(operands[0])[2].clone());
    full.push(ed.graph.shape(operands[1])[2].clone());
    for (v, _) in &extras {
        let mut shape = vec![Dim::new(1); p_axes.len() - ed.graph.shape(*v).len()];
        shape.extend_from_slice(ed.graph.shape(*v));
        let spread = ed.reshape(*v, &shape)?;
        let moved = ed.permute(spread, &perm)?;
        let mut shape = vec![Dim::new(1); missing];
        shape.extend_from_slice(ed.graph.shape(moved));
        let extra = ed.reshape(moved, &shape)?;
        if broadcast_shapes(&full, ed.graph.shape(extra)).as_ref() != Some(&full) {
            return Ok(None);
        }
        operands.push(extra);
    }
    let attrs = AttentionAttrs { score, causal: false, zeros: false };
    let attended = ed.op(Op::Attention(attrs), &operands)?;
    // Back to the axes of the second contraction's result.
    let mut have: Vec<char> = m.batch.clone();
    have.extend([m.s, m.e[0]]);
    let shape = ed.graph.shape(attended)[missing..].to_vec();
    let flat = ed.reshape(attended, &shape)?;
    let perm: Vec<usize> =
        m.out.chars().filter_map(|c| have.iter().position(|h| *h == c)).collect();
    if perm.len() != have.len() {
        return Ok(None);
    }
    Ok(Some(ed.permute(flat, &perm)?))
}

/// The value without multiplications and divisions by numbers (also below views), and the factor.
fn unscaled(ed: &mut Editor<'_>, v: ValueId) -> Result<(ValueId, f64)> {
    let view = View(ed.graph);
    let term = Term::Value(v);
    let found = if let Some((a, b)) = view.pair(term, ExprOp::Mul) {
        match (view.number(a), view.number(b)) {
            (None, Some(c)) => Some((a, c)),
            (Some(c), None) => Some((b, c)),
            _ => None,
        }
    } else if let Some((a, b)) = view.pair(term, ExprOp::Div) {
        view.number(b).map(|c| (a, 1.0 / c))
    } else {
        None
    };
    if let Some((x, c)) = found
        && let Some(x) = view.value(x)
        && ed.graph.ty(x) == ed.graph.ty(v)
        && c.is_finite()
        && c != 0.0
    {
        let (x, more) = unscaled(ed, x)?;
        return Ok((x, c * more));
    }
    let Some(node) = ed.node_of(v).cloned() else { return Ok((v, 1.0)) };
    if !matches!(node.op, Op::Reshape(_) | Op::Permute(_)) {
        return Ok((v, 1.0));
    }
    let (x, c) = unscaled(ed, node.inputs[0])?;
    if x == node.inputs[0] {
        return Ok((v, 1.0));
    }
    Ok((ed.op(node.op, &[x])?, c))
}

/// The score function's node for `v`, a value between the scores and the softmax.
fn score(
    ed: &Editor<'_>,
    m: &Match,
    v: ValueId,
    scaled: ExprId,
    f: &mut FuncBuilder,
    extras: &mut Vec<(ValueId, ExprId)>,
) -> ExprId {
    if v == m.scores {
        return scaled;
    }
    // Only values of the score's shape that depend on it are looked into.
    if ed.graph.shape(v) == ed.graph.shape(m.scores)
        && depends(ed, v, m.scores)
        && let Some(node) = ed.node_of(v)
        && let Op::Map(func) = &node.op
    {
        let args: Vec<ExprId> =
            node.inputs.iter().map(|&i| score(ed, m, i, scaled, f, extras)).collect();
        return f.inline(func, &args);
    }
    if let Some((_, e)) = extras.iter().find(|(known, _)| *known == v) {
        return *e;
    }
    // Expanded masks are read at their source: attention broadcasts.
    let source = match ed.node_of(v) {
        Some(node) if matches!(node.op, Op::Expand(_)) => node.inputs[0],
        _ => v,
    };
    let e = f.param("m", ed.graph.dtype(source));
    extras.push((source, e));
    e
}

fn depends(ed: &Editor<'_>, v: ValueId, on: ValueId) -> bool {
    v == on
        || ed.node_of(v).is_some_and(|node| {
            matches!(node.op, Op::Map(_)) && node.inputs.iter().any(|&i| depends(ed, i, on))
        })
}
