//! Makes equal computations one.
//!
//! ```text
//! before: v1 = map(v0) { x -> exp(x) }     after: v1 = map(v0) { x -> exp(x) }
//!         v2 = map(v0) { x -> exp(x) }            v3 = map(v1, v1) { a, b -> a + b }
//!         v3 = map(v1, v2) { a, b -> a + b }
//! ```
//!
//! Equal means: the same operator with the same attributes on the same values. Constants are equal
//! when type, shape and bits are; large ones only when they share their bytes. Host operators stay:
//! their results may introduce sizes of their own.

use crate::manager::PassContext;
use std::collections::{BTreeMap, HashMap};
use tilewright_base::Result;
use tilewright_data::Tensor;
use tilewright_graph::{Def, Graph, NodeId, Op, ValueId};

/// Constants up to this many bytes are compared by content.
const SMALL_BYTES: usize = 4096;

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    let mut changed = merge_constants(graph);
    // By operands: the nodes seen. Looked up, never iterated.
    let mut seen: HashMap<Vec<ValueId>, Vec<NodeId>> = HashMap::new();
    changed |= crate::edit::rewrite(graph, &mut |ed, id| {
        let node = &ed.graph.nodes[id];
        if matches!(node.op, Op::Host(_)) {
            return Ok(None);
        }
        let candidates = seen.entry(node.inputs.clone()).or_default();
        if let Some(&twin) = candidates.iter().find(|&&t| ed.graph.nodes[t].op == node.op) {
            return Ok(Some(ed.graph.nodes[twin].outputs.clone()));
        }
        candidates.push(id);
        Ok(None)
    })?;
    Ok(changed)
}

fn key(tensor: &Tensor) -> (usize, Vec<usize>, Vec<u8>) {
    let small = tensor.byte_len() <= SMALL_BYTES;
    let content = if small {
        tensor.bytes().to_vec()
    } else {
        // The address stands for the content.
        let bytes = tensor.shared_bytes().stored();
        let mut id = (bytes.as_ptr() as usize).to_le_bytes().to_vec();
        id.extend_from_slice(&bytes.len().to_le_bytes());
        id
    };
    (tensor.dtype() as usize * 2 + usize::from(small), tensor.shape().to_vec(), content)
}

fn merge_constants(graph: &mut Graph) -> bool {
    let mut first: BTreeMap<(usize, Vec<usize>, Vec<u8>), ValueId> = BTreeMap::new();
    let mut twin: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let mut read: Vec<ValueId> = graph.live().flat_map(|(_, n)| n.inputs.clone()).collect();
    read.sort_unstable();
    read.dedup();
    for v in read {
        if let Def::Const(tensor) = &graph.values[v].def {
            let kept = *first.entry(key(tensor)).or_insert(v);
            if kept != v {
                twin.insert(v, kept);
            }
        }
    }
    if twin.is_empty() {
        return false;
    }
    for i in 0..graph.order.len() {
        let id = graph.order[i];
        for v in &mut graph.nodes[id].inputs {
            *v = twin.get(v).copied().unwrap_or(*v);
        }
    }
    true
}
