//! Values between elementwise operators that are rounded to 16 bits only to be widened again stay in 32 bits.
//!
//! ```text
//! before: v1: bf16 = map(v0) { x -> bf16(f32(x) * 0.5) }     after: v1: f32 = map(v0) { x -> f32(x) * 0.5 }
//!         v2: bf16 = map(v1) { x -> bf16(tanh(f32(x))) }            v2: bf16 = map(v1) { x -> bf16(tanh(x)) }
//! ```
//!
//! PyTorch's operators round each of their results; one kernel for several needs no more than their last. The derivative of GELU by
//! `tanh`, written operator by operator in bf16, took 66 us for 12.6 million elements on an H200, 40 of them for roundings. Results
//! are nearer to those of exact arithmetic, and do not depend on what is fused: the graph says what is rounded.
//!
//! Side conditions: all readers are elementwise, have the value's shape and widen it first, and lead to no sum or norm before something
//! is stored; the value is no result of the graph; the operator reads no product and is more than a conversion (what asks for a
//! rounding gets it).

use crate::edit::retype;
use std::collections::BTreeSet;
use tilewright_base::{DType, Result};
use tilewright_expr::{ExprId, Func, FuncBuilder, Node as ExprNode, Op as ExprOp};
use tilewright_graph::{Graph, Node, NodeId, Op, ValueId};

/// See the module's head. True when something changed.
///
/// # Errors
/// Bugs only.
pub fn round_late(graph: &mut Graph) -> Result<bool> {
    let users = graph.users();
    let mut late: BTreeSet<ValueId> = graph
        .live()
        .filter_map(|(_, node)| {
            let (Op::Map(func), [v]) = (&node.op, &node.outputs[..]) else { return None };
            let read = &users[*v];
            let stays = graph.is_output(*v) || node.inputs.iter().any(|&v| is_product(graph, v));
            let fits = !stays && is_rounded(func) && !read.is_empty();
            (fits && read.iter().all(|&r| widens(graph, r, *v))).then_some(*v)
        })
        .collect();
    let summed = in_sums(graph, &late);
    late.retain(|v| !summed.contains(v));
    if late.is_empty() {
        return Ok(false);
    }
    let touched: Vec<NodeId> = graph
        .live()
        .filter(|(_, n)| n.inputs.iter().chain(&n.outputs).any(|v| late.contains(v)))
        .map(|(id, _)| id)
        .collect();
    for id in touched {
        let node = &graph.nodes[id];
        let Op::Map(func) = &node.op else { continue };
        let wide: Vec<bool> = node.inputs.iter().map(|v| late.contains(v)).collect();
        let func = without_roundings(func, &wide, late.contains(&node.outputs[0]));
        graph.nodes[id].op = Op::Map(func);
        retype(graph, id)?;
    }
    Ok(true)
}

/// Values that lead to sums, norms and the like through elementwise operators and views, without a value of 16 bits that stays one
/// (`late` are those that may not). Kernels of several kinds read such ones (a gradient of rows and one of columns), so that they are stored.
fn in_sums(graph: &Graph, late: &BTreeSet<ValueId>) -> BTreeSet<ValueId> {
    let mut found = BTreeSet::new();
    let nodes: Vec<&Node> = graph.live().map(|(_, node)| node).collect();
    for node in nodes.into_iter().rev() {
        let leads = match &node.op {
            Op::Map(_) | Op::Reshape(_) | Op::Permute(_) | Op::Expand(_) => {
                let wide = |v: &ValueId| graph.dtype(*v).bits() != 16 || late.contains(v);
                node.outputs.iter().any(|v| found.contains(v) && wide(v))
            }
            Op::Contract { .. } | Op::Conv(_) | Op::Host { .. } => false,
            _ => true,
        };
        if leads {
            found.extend(node.inputs.iter().copied());
        }
    }
    found
}

/// Whether a value is a product, or one in another shape: what follows it may be its epilogue, which stores 16 bits.
fn is_product(graph: &Graph, mut v: ValueId) -> bool {
    while let Some(id) = graph.producer(v) {
        match &graph.nodes[id].op {
            Op::Reshape(_) | Op::Permute(_) => v = graph.nodes[id].inputs[0],
            op => return matches!(op, Op::Contract { .. } | Op::Conv(_)),
        }
    }
    false
}

/// The f32 value that a function rounds to 16 bits in the end, when it does more than that.
fn rounded(func: &Func) -> Option<ExprId> {
    let narrow = matches!(func.dtype(), DType::BF16 | DType::F16);
    match func.node(func.result()) {
        ExprNode::Op(ExprOp::Cast, args) if narrow && func.dtype_of(args[0]) == DType::F32 => {
            Some(args[0])
        }
        _ => None,
    }
}

fn is_rounded(func: &Func) -> bool {
    let computes = |node: &ExprNode| matches!(node, ExprNode::Op(op, _) if *op != ExprOp::Cast);
    rounded(func).is_some() && func.nodes().any(|(_, node, _)| computes(node))
}

/// Whether a node is elementwise, of a value's shape, and does nothing with the value before it is f32.
fn widens(graph: &Graph, reader: NodeId, v: ValueId) -> bool {
    let node = &graph.nodes[reader];
    let Op::Map(func) = &node.op else { return false };
    let of_value = |p: u32| node.inputs.get(p as usize) == Some(&v);
    let is_value = |id: ExprId| matches!(func.node(id), ExprNode::Param(p) if of_value(*p));
    let widened = |(_, n, dtype): (ExprId, &ExprNode, DType)| match n {
        ExprNode::Op(ExprOp::Cast, args) if is_value(args[0]) => dtype == DType::F32,
        ExprNode::Op(_, args) => !args.iter().any(|&a| is_value(a)),
        _ => true,
    };
    graph.shape(node.outputs[0]) == graph.shape(v)
        && func.nodes().all(widened)
        && !is_value(func.result())
}

/// A function whose parameters are f32 already where `wide` says so, and whose result stays f32 if `late`.
fn without_roundings(func: &Func, wide: &[bool], late: bool) -> Func {
    let mut b = FuncBuilder::new();
    let params: Vec<ExprId> = func
        .params()
        .iter()
        .zip(wide)
        .map(|(p, &wide)| b.param(&p.name, if wide { DType::F32 } else { p.dtype }))
        .collect();
    let mut map: Vec<ExprId> = Vec::new();
    for (_, node, dtype) in func.nodes() {
        let id = match node {
            ExprNode::Param(p) => params[*p as usize],
            ExprNode::Const(value) => b.value(*value, dtype),
            // Nothing where the parameter is f32.
            ExprNode::Op(ExprOp::Cast, args) => b.cast(map[args[0].index()], dtype),
            ExprNode::Op(op, args) => {
                let args: Vec<ExprId> = args.iter().map(|a| map[a.index()]).collect();
                b.op(*op, &args)
            }
        };
        map.push(id);
    }
    let result = match rounded(func) {
        Some(wide) if late => wide,
        _ => func.result(),
    };
    b.finish(map[result.index()])
}
