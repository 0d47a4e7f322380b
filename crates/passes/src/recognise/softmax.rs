//! Softmax out of its parts.
//!
//! ```text
//! before: v1 = reduce max axes=[2] keep v0     after: v6 = softmax axis=2 v0
//!         v2 = map(v0, v1) { x, m -> x - m }
//!         v3 = map(v2) { x -> exp(x) }
//!         v4 = reduce sum axes=[2] keep v3
//!         v6 = map(v3, v4) { e, s -> e / s }
//! ```
//!
//! Also without the maximum (`exp(x) / sum(exp(x))`): softmax is what that computes wherever it
//! does not overflow. Side conditions: one axis, the same for both reductions; the result has the
//! shape of `x`.

use crate::edit::Editor;
use crate::view::{Term, View};
use tilewright_base::Result;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{NodeId, Op, ReduceKind, ValueId};

pub(super) fn rule(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    let out = ed.graph.nodes[id].outputs[0];
    let Some((x, axis)) = find(View(ed.graph), out) else { return Ok(None) };
    if ed.graph.ty(x) != ed.graph.ty(out) || !ed.graph.dtype(x).is_float() {
        return Ok(None);
    }
    Ok(Some(ed.op(Op::Softmax { axis, log: false }, &[x])?))
}

fn find(view: View<'_>, out: ValueId) -> Option<(ValueId, usize)> {
    let (e, s) = view.pair(Term::Value(out), ExprOp::Div)?;
    let (summed, kind, axes) = view.reduction(s)?;
    let [axis] = axes.as_slice() else { return None };
    if kind != ReduceKind::Sum || !view.same(Term::Value(summed), e) {
        return None;
    }
    let [argument] = view.is(e, ExprOp::Exp)?.try_into().ok()?;
    let x = match view.pair(argument, ExprOp::Sub) {
        Some((x, m)) => match view.reduction(m) {
            Some((reduced, ReduceKind::Max, axes))
                if axes == [*axis] && view.same(Term::Value(reduced), x) =>
            {
                x
            }
            _ => argument,
        },
        None => argument,
    };
    Some((view.value(x)?, *axis))
}
