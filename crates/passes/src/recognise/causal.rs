//! A constant mask that hides all later positions becomes `causal`.
//!
//! ```text
//! before: y = attention score { s, m -> s * 0.125 + m } q, k, v, mask      mask: 0 up to the row's position, then -inf
//! after:  y = attention causal score { s -> s * 0.125 } q, k, v
//! ```
//!
//! Kernels then skip the blocks of keys that no row of theirs sees, about half of the work, and read no mask.
//!
//! Side conditions: the mask is added to the rest of the score, or chooses between it and a very negative number;
//! it is the same for all heads, 0 (or true) exactly where position `t` is at most `s + (T - S)`, elsewhere below
//! [`HIDDEN`] (or false). There are at least as many keys as queries, so that every row sees some. A score hidden by
//! a finite number has the weight 0 all the same, unless the others are as far below zero.

use crate::edit::Editor;
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::{ExprId, Func, FuncBuilder, Node, Op as ExprOp, Value};
use tilewright_graph::{AttentionAttrs, NodeId, Op, ValueId};

/// Scores below this have no weight beside ordinary ones.
const HIDDEN: f64 = -1e30;

/// See the module's head.
pub(super) fn rule(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    let node = &ed.graph.nodes[id];
    let Op::Attention(AttentionAttrs { score, causal: false, zeros }) = &node.op else {
        return Ok(None);
    };
    let zeros = *zeros;
    let (inputs, graph) = (node.inputs.clone(), &ed.graph);
    let extent = |v: ValueId| graph.shape(v)[2].as_const().and_then(|n| usize::try_from(n).ok());
    let (Some(rows), Some(keys)) = (extent(inputs[0]), extent(inputs[1])) else { return Ok(None) };
    let hides = |i: &usize| {
        let mask = graph.as_const(inputs[2 + i]);
        mask.is_some_and(|mask| keys >= rows && hides_later(mask, rows, keys))
    };
    let masks: Vec<usize> = (1..score.params().len()).filter(hides).collect();
    let found = masks.iter().find_map(|&i| Some((i, without(score, i)?)));
    let Some((mask, score)) = found else { return Ok(None) };
    let mut rest = inputs;
    rest.remove(2 + mask);
    ed.op(Op::Attention(AttentionAttrs { score, causal: true, zeros }), &rest).map(Some)
}

/// Whether a mask `[.., rows, keys]` shows each row the positions up to its own and no others.
fn hides_later(mask: &Tensor, rows: usize, keys: usize) -> bool {
    let Some((matrix, outer)) = mask.shape().split_last_chunk::<2>().map(|(o, m)| (m, o)) else {
        return false;
    };
    let truth = mask.dtype() == DType::Bool;
    if *matrix != [rows, keys]
        || outer.iter().any(|&d| d != 1)
        || !(truth || mask.dtype().is_float())
    {
        return false;
    }
    (0..rows * keys).all(|at| {
        let visible = at % keys <= at / keys + (keys - rows);
        let value = mask.get_f64(at);
        match (truth, visible) {
            (true, _) => (value != 0.0) == visible,
            (false, true) => value == 0.0,
            (false, false) => value <= HIDDEN,
        }
    })
}

/// A score function without its parameter `mask`, where that is only a mask: see the module's head.
fn without(score: &Func, mask: usize) -> Option<Func> {
    let is_mask = |x: ExprId| matches!(score.node(x), Node::Param(p) if *p as usize == mask);
    let number = |x: ExprId| match score.node(x) {
        Node::Const(Value::Float(v)) => Some(*v),
        _ => None,
    };
    let hidden = |x: ExprId| match score.node(x) {
        Node::Op(ExprOp::Neg, of) => number(of[0]).is_some_and(|v| -v <= HIDDEN),
        _ => number(x).is_some_and(|v| v <= HIDDEN),
    };
    let Node::Op(op, args) = score.node(score.result()) else { return None };
    let rest = match (op, args.as_slice()) {
        (ExprOp::Add, [x, m]) | (ExprOp::Add, [m, x]) if is_mask(*m) && !is_mask(*x) => *x,
        (ExprOp::Select, [m, x, low]) if is_mask(*m) && hidden(*low) => *x,
        _ => return None,
    };
    let mut f = FuncBuilder::new();
    let params: Vec<Option<ExprId>> = score
        .params()
        .iter()
        .enumerate()
        .map(|(i, p)| (i != mask).then(|| f.param(&p.name, p.dtype)))
        .collect();
    let mut made: Vec<Option<ExprId>> = Vec::new();
    for (_, node, dtype) in score.nodes() {
        let new = match node {
            Node::Param(p) => params[*p as usize],
            Node::Const(value) => Some(f.value(*value, dtype)),
            Node::Op(op, args) => {
                let args: Option<Vec<ExprId>> = args.iter().map(|a| made[a.index()]).collect();
                args.map(|args| match op {
                    ExprOp::Cast => f.cast(args[0], dtype),
                    op => f.op(*op, &args),
                })
            }
        };
        made.push(new);
    }
    Some(f.finish(made[rest.index()]?))
}
