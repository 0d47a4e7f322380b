//! Computes what does not depend on inputs.
//!
//! ```text
//! before: v1 = map(2.0) { x -> sqrt(x) }       after: return map(v0) { x -> x * b } with b = 1.41..
//!         v2 = map(v0, v1) { a, b -> a * b }
//! ```
//!
//! Every operand is a constant (or there is none, as for `dims` of known sizes). The result is what
//! the interpreter computes in exact types, so folding changes no bits.
//!
//! Side conditions: the result is not larger than [`PassContext::fold_limit_bytes`] unless it is no
//! larger than the operands that it replaces and is the only reader of the largest one (a cast or
//! permuted weight); host operators and random numbers are not folded.

use crate::edit::{Editor, rewrite};
use crate::manager::PassContext;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Bytes, Tensor, element_count};
use tilewright_graph::{Graph, GraphBuilder, NodeId, Op, ValueId};
use tilewright_interp::Mode;

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, ctx: &PassContext) -> Result<bool> {
    rewrite(graph, &mut |ed, id| {
        if !worth_folding(ed, id, ctx) {
            return Ok(None);
        }
        let node = &ed.graph.nodes[id];
        let tensors: Option<Vec<Tensor>> =
            node.inputs.iter().map(|&v| ed.graph.as_const(v).cloned()).collect();
        let Some(tensors) = tensors else { return Ok(None) };
        let results = match fast(&node.op, &tensors)? {
            Some(result) => Some(vec![result]),
            None => evaluate(ed.graph, id, &tensors),
        };
        let Some(results) = results else { return Ok(None) };
        // Only results of the promised types replace the node's.
        let outputs = node.outputs.clone();
        let fits = outputs.len() == results.len()
            && outputs.iter().zip(&results).all(|(&v, t)| {
                ed.graph.dtype(v) == t.dtype()
                    && ed.graph.ty(v).const_shape().as_deref() == Some(t.shape())
            });
        if !fits {
            return Ok(None);
        }
        Ok(Some(results.into_iter().map(|t| ed.constant(t)).collect()))
    })
}

fn worth_folding(ed: &Editor<'_>, id: NodeId, ctx: &PassContext) -> bool {
    let node = &ed.graph.nodes[id];
    if matches!(node.op, Op::Host(_) | Op::Random { .. }) {
        return false;
    }
    let bytes = |dtype: DType, shape: &[usize]| {
        element_count(shape).ok().and_then(|n| dtype.bytes_for(n)).unwrap_or(usize::MAX)
    };
    let mut made = 0usize;
    for &v in &node.outputs {
        match ed.graph.ty(v).const_shape() {
            Some(shape) => made = made.saturating_add(bytes(ed.graph.dtype(v), &shape)),
            None => return false,
        }
    }
    let mut largest = 0usize;
    for &v in &node.inputs {
        match ed.graph.as_const(v) {
            Some(t) if ed.only_here(v) => largest = largest.max(t.byte_len()),
            Some(_) => {}
            None => return false,
        }
    }
    // Reshaped constants share their bytes.
    matches!(node.op, Op::Reshape(_)) || made <= ctx.fold_limit_bytes.max(largest)
}

/// Whole weights are reshaped and permuted here: no arithmetic, and they are large.
fn fast(op: &Op, tensors: &[Tensor]) -> Result<Option<Tensor>> {
    match (op, tensors) {
        (Op::Reshape(shape), [x]) => {
            let shape: Option<Vec<usize>> =
                shape.iter().map(|d| d.as_const().and_then(|v| usize::try_from(v).ok())).collect();
            shape.map(|s| x.reshaped(s)).transpose()
        }
        (Op::Permute(perm), [x]) => permute(x, perm).map(Some),
        (Op::Dims(dims), []) => {
            let sizes: Option<Vec<i64>> = dims.iter().map(|d| d.as_const()).collect();
            sizes.map(|s| Tensor::from_i64s(DType::I64, &[s.len()], &s)).transpose()
        }
        _ => Ok(None),
    }
}

/// Copies elements of a whole number of bytes into permuted order.
pub(crate) fn permute(x: &Tensor, perm: &[usize]) -> Result<Tensor> {
    if let Some(narrow) = x.narrow() {
        let moved = permute(&narrow, perm)?;
        return moved.widened().ok_or_else(|| Error::bug("what was widened is not narrow"));
    }
    let from = x.shape();
    let shape: Vec<usize> = perm.iter().map(|&p| from[p]).collect();
    let n = x.len();
    let mut strides = vec![1usize; from.len()];
    for i in (0..from.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * from[i + 1];
    }
    let strides: Vec<usize> = perm.iter().map(|&p| strides[p]).collect();
    let sub_byte = x.dtype().bits() < 8;
    let size = x.dtype().size();
    let mut out = vec![0u8; if sub_byte { x.bytes().len() } else { n * size }];
    let source = x.bytes();
    let mut index = vec![0usize; shape.len()];
    let mut at = 0usize;
    for i in 0..n {
        if sub_byte {
            let value = tilewright_data::read_i64(x.dtype(), source, at);
            tilewright_data::from_i64(x.dtype(), &mut out, i, value);
        } else {
            out[i * size..(i + 1) * size].copy_from_slice(&source[at * size..(at + 1) * size]);
        }
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    Tensor::new(x.dtype(), shape, Bytes::copy_from(&out))
}

/// Runs the node alone in the interpreter. `None` when it cannot: what is wrong with it is told
/// when the program runs, and only if it is reached then.
fn evaluate(graph: &Graph, id: NodeId, tensors: &[Tensor]) -> Option<Vec<Tensor>> {
    let node = &graph.nodes[id];
    let mut alone = GraphBuilder::new("constant");
    let inputs: Vec<ValueId> =
        node.inputs.iter().map(|&v| alone.input(v.to_string(), graph.ty(v).clone())).collect();
    let outputs = alone.node(node.op.clone(), &inputs).ok()?;
    for v in outputs {
        alone.output(v.to_string(), v);
    }
    tilewright_interp::run(&alone.finish(), tensors, Mode::Exact).ok()
}
