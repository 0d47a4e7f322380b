//! The check after each pass.

use tilewright_base::{Error, Result};
use tilewright_graph::{Def, Graph, TensorType, infer};

/// Checks the invariants of [`Graph`]: order, types, definitions.
pub fn verify(graph: &Graph) -> Result<()> {
    let mut defined = vec![false; graph.values.len()];
    for (id, value) in graph.values.iter() {
        defined[id.index()] = !matches!(value.def, Def::Node(..));
    }
    for (id, node) in graph.live() {
        let at = || format!("{id} {:?} `{}`", node.op, node.origin);
        for v in &node.inputs {
            if !defined.get(v.index()).copied().unwrap_or(false) {
                return Err(Error::bug(format!("{v} is read before it is made")).with_note(at()));
            }
        }
        let types: Vec<TensorType> = node.inputs.iter().map(|&v| graph.ty(v).clone()).collect();
        let expected =
            infer(&node.op, &types).map_err(|e| Error::bug(e.to_string()).with_note(at()))?;
        if expected.len() != node.outputs.len() {
            return Err(Error::bug("wrong number of results").with_note(at()));
        }
        for (i, (&v, ty)) in node.outputs.iter().zip(&expected).enumerate() {
            if graph.ty(v) != ty {
                let found = graph.ty(v);
                return Err(
                    Error::bug(format!("{v} is {found}, its node makes {ty}")).with_note(at())
                );
            }
            if !matches!(graph.values[v].def, Def::Node(n, k) if n == id && k == i) {
                return Err(Error::bug(format!("{v} does not point back")).with_note(at()));
            }
            if std::mem::replace(&mut defined[v.index()], true) {
                return Err(Error::bug(format!("{v} is made twice")).with_note(at()));
            }
        }
    }
    for (name, v) in &graph.outputs {
        if !defined.get(v.index()).copied().unwrap_or(false) {
            return Err(Error::bug(format!("output `{name}` = {v} is never made")));
        }
    }
    Ok(())
}
