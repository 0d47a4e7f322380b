//! Finds composites in what frontends spelled out.
//!
//! One file per family; each states its pattern with the program before and after:
//!
//! * [`norm`]: layer norm and RMS norm out of means, differences and square roots,
//! * [`softmax`]: softmax out of maximum, exponential and sum,
//! * [`attention`]: two contractions around a softmax,
//! * [`causal`]: attention whose mask hides later positions,
//! * [`fold_scale`]: batch norm and per-channel scales into convolution weights.
//!
//! (GELU and its kin need nothing: they are chains of maps, which fusion joins.)
//!
//! A composite is what lowering takes whole as one pass over rows. The rewrites keep the computed
//! function over the reals; roundings may fall elsewhere, within the operator's error budget.

mod attention;
mod causal;
mod fold_scale;
mod norm;
mod softmax;

use crate::edit::rewrite;
use crate::manager::PassContext;
use tilewright_base::Result;
use tilewright_graph::{Graph, Op};

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    rewrite(graph, &mut |ed, id| {
        let replacement = match &ed.graph.nodes[id].op {
            Op::Map(_) => match norm::rule(ed, id)? {
                None => match softmax::rule(ed, id)? {
                    None => fold_scale::map_rule(ed, id)?,
                    found => found,
                },
                found => found,
            },
            Op::Contract { .. } => attention::rule(ed, id)?,
            Op::Attention(_) => causal::rule(ed, id)?,
            Op::BatchNorm { .. } => fold_scale::batch_norm_rule(ed, id)?,
            _ => None,
        };
        Ok(replacement.map(|v| vec![v]))
    })
}
