//! Drops nodes that no output needs.
//!
//! ```text
//! before: v1 = map(v0) { x -> exp(x) }     after: v2 = map(v0) { x -> x + 1 }
//!         v2 = map(v0) { x -> x + 1 }             return v2
//!         return v2
//! ```
//!
//! No side conditions: operators have no effects. The data of constants that nobody reads is let
//! go, so that weights replaced by folded ones do not stay in memory.

use crate::manager::PassContext;
use tilewright_base::Result;
use tilewright_data::Tensor;
use tilewright_graph::{Def, Graph};

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    let before = graph.order.len();
    graph.remove_dead();
    let mut read = vec![false; graph.values.len()];
    for (_, node) in graph.live() {
        for v in &node.inputs {
            read[v.index()] = true;
        }
    }
    for (_, v) in &graph.outputs {
        read[v.index()] = true;
    }
    // An unread constant keeps its id and becomes an empty tensor of its type.
    for (id, value) in graph.values.iter_mut() {
        if let Def::Const(tensor) = &mut value.def
            && !read[id.index()]
            && tensor.byte_len() > 64
        {
            *tensor = Tensor::zeros(tensor.dtype(), vec![0])?;
            value.ty.shape = vec![0.into()];
        }
    }
    Ok(graph.order.len() != before)
}
