//! [`Term`]: elementwise arithmetic seen as one expression, wherever the boundaries of `Map` nodes
//! lie.
//!
//! A frontend writes one `Map` per operator, the simplifier moves literals into functions, fusion
//! joins maps: patterns should not care. A term is a graph value or a node inside a map's function;
//! [`View::op`] steps through maps, parameters and broadcasts. For `v2 = map(v1) { x -> x * 2 }`,
//! `v1 = expand v0`: the term `v2` is `Mul(v0, 2)`.
//!
//! Shapes are not looked at: a pattern checks those of the values that it ends with.

use tilewright_expr::{ExprId, Node as ExprNode, Op as ExprOp, Value};
use tilewright_graph::{Graph, NodeId, Op, ReduceKind, ValueId};
use tilewright_layout::Dim;

/// A place in the arithmetic; see the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Term {
    /// A value of the graph.
    Value(ValueId),
    /// A node of the function of a `Map`.
    Inner(NodeId, ExprId),
}

/// Reads terms of a graph.
#[derive(Clone, Copy)]
pub(crate) struct View<'g>(pub(crate) &'g Graph);

impl View<'_> {
    /// Steps through maps, parameters and broadcasts to an operation, a literal or a value that is
    /// made in another way.
    pub(crate) fn resolve(self, mut term: Term) -> Term {
        loop {
            match term {
                Term::Value(v) => {
                    let Some(id) = self.0.producer(v) else { return term };
                    let node = &self.0.nodes[id];
                    term = match &node.op {
                        Op::Map(func) => Term::Inner(id, func.result()),
                        Op::Expand(_) => Term::Value(node.inputs[0]),
                        _ => return term,
                    };
                }
                Term::Inner(id, expr) => {
                    let node = &self.0.nodes[id];
                    let Op::Map(func) = &node.op else { return term };
                    match func.node(expr) {
                        ExprNode::Param(p) => match node.inputs.get(*p as usize) {
                            Some(&v) => term = Term::Value(v),
                            None => return term,
                        },
                        _ => return term,
                    }
                }
            }
        }
    }

    /// The operation that makes the term, with its operands.
    pub(crate) fn op(self, term: Term) -> Option<(ExprOp, Vec<Term>)> {
        let Term::Inner(id, expr) = self.resolve(term) else { return None };
        let Op::Map(func) = &self.0.nodes[id].op else { return None };
        match func.node(expr) {
            ExprNode::Op(op, args) => {
                Some((*op, args.iter().map(|&a| Term::Inner(id, a)).collect()))
            }
            _ => None,
        }
    }

    /// The operands when the term is made by `op`.
    pub(crate) fn is(self, term: Term, op: ExprOp) -> Option<Vec<Term>> {
        self.op(term).filter(|(o, _)| *o == op).map(|(_, args)| args)
    }

    /// The two operands when the term is made by `op` of two.
    pub(crate) fn pair(self, term: Term, op: ExprOp) -> Option<(Term, Term)> {
        match self.is(term, op)?.as_slice() {
            [a, b] => Some((*a, *b)),
            _ => None,
        }
    }

    /// The number when the term is a literal, or a constant whose elements are all equal.
    pub(crate) fn number(self, term: Term) -> Option<f64> {
        match self.resolve(term) {
            Term::Value(v) => match crate::edit::splat(self.0.as_const(v)?)? {
                Value::Float(x) => Some(x),
                Value::Int(x) => Some(x as f64),
            },
            Term::Inner(id, expr) => {
                let Op::Map(func) = &self.0.nodes[id].op else { return None };
                match func.node(expr) {
                    ExprNode::Const(Value::Float(x)) => Some(*x),
                    ExprNode::Const(Value::Int(x)) => Some(*x as f64),
                    _ => None,
                }
            }
        }
    }

    /// The graph value that holds the term, if one does.
    pub(crate) fn value(self, term: Term) -> Option<ValueId> {
        match term {
            Term::Value(v) => Some(v),
            Term::Inner(id, expr) => {
                let node = &self.0.nodes[id];
                let Op::Map(func) = &node.op else { return None };
                match func.node(expr) {
                    ExprNode::Param(p) => node.inputs.get(*p as usize).copied(),
                    _ if expr == func.result() => node.outputs.first().copied(),
                    _ => None,
                }
            }
        }
    }

    /// True when both terms surely compute the same elements (up to broadcasting).
    pub(crate) fn same(self, a: Term, b: Term) -> bool {
        self.same_to(a, b, 6)
    }

    fn same_to(self, a: Term, b: Term, depth: usize) -> bool {
        let (a, b) = (self.resolve(a), self.resolve(b));
        if a == b {
            return true;
        }
        if depth == 0 {
            return false;
        }
        if let (Some(x), Some(y)) = (self.number(a), self.number(b)) {
            return x.to_bits() == y.to_bits();
        }
        match (self.op(a), self.op(b)) {
            // A cast's target type is not part of the operation: those must be the same term.
            (Some((ExprOp::Cast, _)), _) => false,
            (Some((f, xs)), Some((g, ys))) => {
                f == g
                    && xs.len() == ys.len()
                    && xs.iter().zip(&ys).all(|(&x, &y)| self.same_to(x, y, depth - 1))
            }
            _ => false,
        }
    }

    /// A reduction: what is reduced, how, over which axes. Reshapes that only add or drop axes of
    /// extent 1 are looked through.
    pub(crate) fn reduction(self, term: Term) -> Option<(ValueId, ReduceKind, Vec<usize>)> {
        let Term::Value(mut v) = self.resolve(term) else { return None };
        loop {
            let node = &self.0.nodes[self.0.producer(v)?];
            match &node.op {
                Op::Reduce { kind, axes, .. } => {
                    return Some((node.inputs[0], *kind, axes.clone()));
                }
                Op::Reshape(shape) if same_but_units(shape, self.0.shape(node.inputs[0])) => {
                    v = node.inputs[0];
                }
                _ => return None,
            }
        }
    }

    /// A mean, as a sum divided by (or multiplied with one over) the number of elements: what is
    /// averaged, over which axes. Those extents must be numbers.
    pub(crate) fn mean(self, term: Term) -> Option<(ValueId, Vec<usize>)> {
        let (sum, count) = if let Some((a, b)) = self.pair(term, ExprOp::Div) {
            (a, self.number(b)?)
        } else {
            let (a, b) = self.pair(term, ExprOp::Mul)?;
            let (sum, factor) = match (self.number(a), self.number(b)) {
                (None, Some(f)) => (a, f),
                (Some(f), None) => (b, f),
                _ => return None,
            };
            (sum, 1.0 / factor)
        };
        let (x, kind, axes) = self.reduction(sum)?;
        let extents: Option<Vec<i64>> =
            axes.iter().map(|&a| self.0.shape(x)[a].as_const()).collect();
        let n = extents?.iter().product::<i64>() as f64;
        // 1/n is rounded to the data type where it is written as a factor.
        (kind == ReduceKind::Sum && n > 0.0 && (count / n - 1.0).abs() < 1e-6).then_some((x, axes))
    }
}

/// True when two shapes agree after dropping extents of 1.
pub(crate) fn same_but_units(a: &[Dim], b: &[Dim]) -> bool {
    a.iter().filter(|d| !d.is(1)).eq(b.iter().filter(|d| !d.is(1)))
}
