//! Constants stored in 16 bits and computed with in `f32` become constants in `f32`.
//!
//! ```text
//! before: v1 = map(w) { x -> f32(x) }    with w: bf16      after: v2 = contract "mk,nk->mn" x, w'
//!         v2 = contract "mk,nk->mn" x, v1                         w': f32, kept in bf16 until somebody reads it
//! ```
//!
//! For targets whose kernels take operands from memory only, in the type in which they multiply: they store such a
//! constant in that type, once, and 16-bit values go there as they lie in the file ([`tilewright_data::Widened`]).
//! Elsewhere the cast stays in the kernel, which then reads half as much.

use crate::edit::rewrite;
use tilewright_base::{DType, Result};
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, Op};

/// See the module's head. True when something changed.
///
/// # Errors
/// Bugs only.
pub fn widen_constants(graph: &mut Graph) -> Result<bool> {
    rewrite(graph, &mut |ed, id| {
        let node = &ed.graph.nodes[id];
        let Op::Map(func) = &node.op else { return Ok(None) };
        let cast = func.params().len() == 1 && func.as_single_op() == Some(ExprOp::Cast);
        if !cast || func.dtype() != DType::F32 {
            return Ok(None);
        }
        let tensor = ed.graph.as_const(node.inputs[0]);
        let Some(wide) = tensor.and_then(|t| t.widened()) else { return Ok(None) };
        // A map with one operand has that operand's shape, unless it broadcasts.
        let shape = ed.graph.ty(node.outputs[0]).const_shape();
        match shape.as_deref() == Some(wide.shape()) {
            true => Ok(Some(vec![ed.constant(wide)])),
            false => Ok(None),
        }
    })
}
