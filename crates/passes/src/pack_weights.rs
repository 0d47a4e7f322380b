//! Layouts for weights: panels for contractions, blocks for convolutions.
//!
//! ```text
//! before: v2 = contract bsk,kn->bsn v0, w      after: the same graph, and  w: (K,(N/16,16)):(16,(16*K,1))
//! ```
//!
//! A matrix micro-kernel computes `panel_width` columns at a time and reads one row of that many
//! weights per step: with the columns in panels of that width it reads memory in order. The panel
//! axis is the letter that only the weights have and that the result keeps (`n`).
//!
//! Convolution weights `[O, C/g, ...]` are blocked by output channels (`OChw16o`: the vector runs over
//! output channels), depthwise weights `[C, 1, ...]` by their channels, when the result's channels
//! are blocked.
//!
//! Only constants are packed: the runtime packs once, when the model is loaded. A constant read by
//! several nodes gets a layout only if all agree.

use crate::layout::Layouts;
use crate::manager::PassContext;
use std::collections::BTreeMap;
use tilewright_graph::{Graph, Op, ValueId};
use tilewright_layout::Layout;

/// Adds the layouts of weights to `layouts`, which has those of activations.
pub(crate) fn pack(graph: &Graph, ctx: &PassContext, layouts: &mut Layouts) {
    let mut wanted: BTreeMap<ValueId, Option<Layout>> = BTreeMap::new();
    for (_, node) in graph.live() {
        for (at, &v) in node.inputs.iter().enumerate() {
            if graph.as_const(v).is_none() {
                continue;
            }
            let wish = match &node.op {
                Op::Contract { lhs, rhs, out, .. } => {
                    let (own, other) = if at == 0 { (lhs, rhs) } else { (rhs, lhs) };
                    panels(graph, v, own, other, out, ctx)
                }
                Op::Conv(_) if at == 1 && layouts.get(&node.outputs[0]).is_some() => {
                    Some(Layout::blocked(graph.shape(v), 0, ctx.vector_lanes))
                }
                _ => None,
            };
            wanted
                .entry(v)
                .and_modify(|known| {
                    if *known != wish {
                        *known = None;
                    }
                })
                .or_insert(wish);
        }
    }
    for (_, v) in &graph.outputs {
        wanted.remove(v);
    }
    layouts.extend(wanted.into_iter().filter_map(|(v, layout)| Some((v, layout?))));
}

fn panels(
    graph: &Graph,
    v: ValueId,
    own: &str,
    other: &str,
    out: &str,
    ctx: &PassContext,
) -> Option<Layout> {
    let shape = graph.shape(v);
    // The last kept letter that only this operand has; nothing to gain for vectors.
    let axis = own
        .chars()
        .enumerate()
        .filter(|(_, l)| out.contains(*l) && !other.contains(*l))
        .map(|(i, _)| i)
        .last()?;
    let summed = own.chars().any(|l| !out.contains(l));
    (summed && shape.len() >= 2).then(|| Layout::panels(shape, axis, ctx.panel_width))
}
