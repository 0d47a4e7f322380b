//! Reshapes of what maps make of tensors in memory: of the tensors themselves.
//!
//! ```text
//! before: v1 = map(x) { a -> f32(a) }       after: v1 = reshape [4096, 50257] x
//!         v2 = reshape [4096, 50257] v1            v2 = map(v1) { a -> f32(a) }
//!         v3 = reduce max axes=[1] v2              v3 = reduce max axes=[1] v2
//!         v4 = map(v2, v3) { .. }                  v4 = map(v2, v3) { .. }
//! ```
//!
//! Views sink while they may meet their inverse or a product. What is left between a map and several readers would have the map
//! stored for a view; what lies in memory anyway has another shape at no cost, and the map is computed where it is read. Last
//! of all passes, since `cancel-views` lets views sink again.
//!
//! Side conditions: only the reshape reads the map; the map's operands are inputs or outputs of the graph with its shape, or
//! single elements.

use crate::edit::rewrite;
use tilewright_base::Result;
use tilewright_graph::{Def, Graph, Op};

/// See the module's head. True when something changed.
///
/// # Errors
/// Bugs only.
pub fn lift_reshapes(graph: &mut Graph) -> Result<bool> {
    rewrite(graph, &mut |ed, id| {
        let node = &ed.graph.nodes[id];
        let Op::Reshape(to) = &node.op else { return Ok(None) };
        let (to, from) = (to.clone(), node.inputs[0]);
        let Some(map) = ed.node_of(from) else { return Ok(None) };
        let Op::Map(func) = &map.op else { return Ok(None) };
        let (func, operands) = (func.clone(), map.inputs.clone());
        let shape = ed.graph.shape(from).to_vec();
        let one = |v| ed.graph.shape(v).iter().all(|d| d.is(1));
        let given = |v| {
            let stored = matches!(ed.graph.values[v].def, Def::Input(_)) || ed.graph.is_output(v);
            stored && ed.graph.shape(v) == shape.as_slice()
        };
        let fits = operands.iter().all(|v| given(*v) || one(*v) && ed.graph.shape(*v).is_empty());
        if !ed.only_here(from) || !operands.iter().any(|v| given(*v)) || !fits {
            return Ok(None);
        }
        let mut moved = Vec::with_capacity(operands.len());
        for v in operands {
            let whole = ed.graph.shape(v) == shape.as_slice();
            moved.push(if whole { ed.reshape(v, &to)? } else { v });
        }
        Ok(Some(vec![ed.map(func, &moved)?]))
    })
}
