//! Attention for a GPU: the form in which the kernel library takes it.
//!
//! Its score function is a factor and a mask that is added, or of truth values; its columns are neighbours in memory; what follows
//! it is a kernel of its own. [`attention_fits`] says of a node whether it has this form: of others products
//! and a softmax must be made before lowering.

use super::dense_like;
use crate::block::{Dag, DagOp, DagStore, Ext, KernelParts, zero};
use crate::fuse::Group;
use crate::lowering::Lowering;
use crate::place::Place;
use tilewright_base::{DType, Result};
use tilewright_expr::{ExprId, Func, Node as ExprNode, Op as ExprOp, Value};
use tilewright_graph::{AttentionAttrs, Graph, Node, NodeId, Op};
use tilewright_layout::{Dim, Layout, numel};
use tilewright_plan::{Attention, BufferId, Form, Heads, Note};
use tilewright_target::Precision;

/// Attention with where its operands lie.
pub(crate) struct Attended<'a> {
    pub(crate) node: &'a Node,
    pub(crate) attrs: &'a AttentionAttrs,
    /// Of queries, keys and values.
    pub(crate) places: &'a [Place],
    /// What the score function reads, over `[B, H, S, T]`.
    pub(crate) scores: &'a Dag,
    pub(crate) dag: &'a Dag,
}

/// Whether a GPU's kernel takes this node as it is, if it is attention at all.
pub fn attention_fits(graph: &Graph, id: NodeId) -> bool {
    let node = &graph.nodes[id];
    let Op::Attention(attrs) = &node.op else { return false };
    let (q, v) = (graph.shape(node.inputs[0]), graph.shape(node.inputs[2]));
    let mask = node.inputs.get(3);
    // Keys of a mask are neighbours in memory, and each key has its own.
    let own_keys = mask.is_none_or(|&m| {
        let keys = &graph.shape(node.inputs[1])[2];
        let known = graph.dtype(m).is_float() || graph.dtype(m) == DType::Bool;
        known && graph.shape(m).last() == Some(keys)
    });
    let small = |d: &Dim| d.as_const().is_some_and(|n| (1..=256).contains(&n));
    small(&q[3])
        && small(&v[3])
        && node.inputs.len() <= 4
        && own_keys
        && scaled(&attrs.score).is_some()
}

/// The factor of a score function `factor * score (+ mask)`, or `where(mask, factor * score, -inf)`.
fn scaled(score: &Func) -> Option<f64> {
    if score.params().get(1).is_some_and(|p| p.dtype == DType::Bool) {
        let ExprNode::Op(ExprOp::Select, args) = score.node(score.result()) else { return None };
        let &[seen, shown, hidden] = &args[..] else { return None };
        let by_mask = matches!(score.node(seen), ExprNode::Param(1));
        let low = linear(score, hidden) == Some([0.0, 0.0, f64::NEG_INFINITY]);
        let [factor, mask, rest] = linear(score, shown)?;
        let plain = by_mask && low && mask == 0.0 && rest == 0.0 && factor != 0.0;
        return (plain && score.params().len() == 2).then_some(factor);
    }
    let [factor, mask, rest] = linear(score, score.result())?;
    let masks = score.params().len() == 2;
    (rest == 0.0 && factor != 0.0 && mask == if masks { 1.0 } else { 0.0 }).then_some(factor)
}

/// An expression as `a * p0 + b * p1 + c`.
fn linear(f: &Func, id: ExprId) -> Option<[f64; 3]> {
    let each = |x: [f64; 3], y: [f64; 3], g: fn(f64, f64) -> f64| {
        [g(x[0], y[0]), g(x[1], y[1]), g(x[2], y[2])]
    };
    let constant = |x: [f64; 3]| (x[0] == 0.0 && x[1] == 0.0).then_some(x[2]);
    Some(match f.node(id) {
        ExprNode::Param(0) => [1.0, 0.0, 0.0],
        ExprNode::Param(1) => [0.0, 1.0, 0.0],
        ExprNode::Param(_) => return None,
        ExprNode::Const(Value::Float(v)) => [0.0, 0.0, *v],
        ExprNode::Const(Value::Int(v)) => [0.0, 0.0, *v as f64],
        ExprNode::Op(op, args) => {
            let x = linear(f, *args.first()?)?;
            match (op, args.get(1)) {
                (ExprOp::Cast, _) => x,
                (ExprOp::Neg, _) => x.map(|v| -v),
                (_, None) => return None,
                (op, Some(&second)) => {
                    let y = linear(f, second)?;
                    match op {
                        ExprOp::Add => each(x, y, |a, b| a + b),
                        ExprOp::Sub => each(x, y, |a, b| a - b),
                        ExprOp::Div => {
                            let by = constant(y)?;
                            x.map(|v| v / by)
                        }
                        ExprOp::Mul => match (constant(x), constant(y)) {
                            (Some(c), _) => y.map(|v| v * c),
                            (_, Some(c)) => x.map(|v| v * c),
                            _ => return None,
                        },
                        ExprOp::Fma => {
                            let z = linear(f, *args.get(2)?)?;
                            let product = match (constant(x), constant(y)) {
                                (Some(c), _) => y.map(|v| v * c),
                                (_, Some(c)) => x.map(|v| v * c),
                                _ => return None,
                            };
                            each(product, z, |a, b| a + b)
                        }
                        _ => return None,
                    }
                }
            }
        }
    })
}

/// What follows attention in its group: a kernel's name, what it computes, and its note.
pub(crate) type Rest = (String, Dag, Note);

impl Lowering<'_> {
    /// Takes what follows attention out of its group: the result goes to memory as it is, `dag` becomes that
    /// store. `None` when nothing follows.
    pub(crate) fn attention_apart(&mut self, group: &Group, dag: &mut Dag) -> Result<Option<Rest>> {
        let [store] = dag.stores.as_slice() else { return self.stored_apart(group, dag).map(Some) };
        let node = &dag.nodes[store.node];
        let cast = matches!(&node.op, DagOp::Map(f) if f.as_single_op() == Some(ExprOp::Cast))
            && node.args.iter().all(|&a| matches!(dag.nodes[a].op, DagOp::Anchor));
        let plain = matches!(node.op, DagOp::Anchor) || cast;
        let near = store.layout.axes[3].stride.is(1) && super::no_blocks(&store.layout);
        if plain && near { Ok(None) } else { self.stored_apart(group, dag).map(Some) }
    }

    fn stored_apart(&mut self, group: &Group, dag: &mut Dag) -> Result<Rest> {
        let shape = &group.shape;
        let anchor = dag.nodes.iter().find(|n| matches!(n.op, DagOp::Anchor));
        let wide = anchor.map_or(tilewright_base::DType::F32, |n| n.dtype);
        let stored = self.operand_type(wide);
        let mut layout = dense_like(&dag.stores[0].layout, shape, &self.graph.symbols);
        if !layout.axes[3].stride.is(1) {
            layout = Layout::row_major(shape);
        }
        let name = self.kernel_name(group);
        let buffer = self.spare(format!("{name} result"), stored, layout.clone());
        let mut rest = dag.clone();
        let read =
            Ext { buffer, dtype: stored, layout: layout.clone(), shift: None, fill: zero(stored) };
        // The loaded value in front, so that operands still come before their users.
        let mut with_load = Dag::default();
        let loaded = with_load.push(DagOp::Ext(read), vec![], vec![true; shape.len()], stored);
        let widened = with_load.cast(loaded, wide);
        let shift = with_load.nodes.len();
        for node in &rest.nodes {
            let mut node = node.clone();
            for arg in &mut node.args {
                *arg = if matches!(rest.nodes[*arg].op, DagOp::Anchor) {
                    widened
                } else {
                    *arg + shift
                };
            }
            with_load.nodes.push(node);
        }
        for store in &rest.stores {
            let node = match rest.nodes[store.node].op {
                DagOp::Anchor => widened,
                _ => store.node + shift,
            };
            with_load.stores.push(DagStore { node, ..store.clone() });
        }
        // The old anchor is read by nobody.
        for node in &mut with_load.nodes {
            if matches!(node.op, DagOp::Anchor) {
                node.op = DagOp::Size(Dim::new(0));
            }
        }
        rest = with_load;
        let mut plain = Dag::default();
        let node = plain.push(DagOp::Anchor, vec![], vec![true; shape.len()], wide);
        let node = plain.cast(node, stored);
        plain.stores.push(DagStore { node, buffer, layout });
        *dag = plain;
        let label = format!("{name} epilogue");
        let bytes = numel(shape) * (2 * stored.size() as i64);
        let note = Note { label: label.clone(), anchor: "map".into(), bytes, ..Note::default() };
        Ok((format!("{name}_epilogue"), rest, note))
    }

    /// Queries, keys and values whose columns are neighbours in memory: copies where they are not.
    pub(crate) fn with_near_columns(
        &mut self,
        node: &Node,
        mut places: Vec<Place>,
    ) -> Result<Vec<Place>> {
        if !self.on_gpu() {
            return Ok(places);
        }
        for (i, place) in places.iter_mut().enumerate() {
            if !place.layout.axes[3].stride.is(1) && !place.layout.axes[3].extent.is(1) {
                *place = self.row_major_copy(node.inputs[i], place)?;
            }
        }
        Ok(places)
    }

    /// Attention as the library takes it; `None` when it does not.
    pub(crate) fn attention_form(&self, parts: &KernelParts, given: &Attended<'_>) -> Option<Form> {
        let Attended { node, attrs, places, scores, dag } = given;
        let graph = self.graph;
        let shape = |i: usize| graph.shape(node.inputs[i]);
        let (q, k, v) = (shape(0), shape(1), shape(2));
        let param = |b: BufferId| parts.args.iter().position(|a| *a == b);
        let heads = |layout: &Layout, buffer: BufferId| {
            let near = layout.axes[3].stride.is(1) || layout.axes[3].extent.is(1);
            let strides = [0, 1, 2].map(|i| {
                let axis = &layout.axes[i];
                if axis.extent.is(1) { Dim::new(0) } else { axis.stride.clone() }
            });
            let dtype = self.plan.buffers[buffer].dtype;
            let (param, offset) = (param(buffer)?, layout.offset.clone());
            (near && super::no_blocks(layout)).then_some(Heads { param, dtype, offset, strides })
        };
        let mask = match node.inputs.get(3) {
            None => None,
            Some(_) => {
                let ext = scores.nodes.iter().find_map(|n| match &n.op {
                    DagOp::Ext(ext) => Some(ext),
                    _ => None,
                })?;
                Some(heads(&ext.layout, ext.buffer)?)
            }
        };
        let [store] = dag.stores.as_slice() else { return None };
        let place = |i: usize| heads(&places[i].layout, places[i].buffer);
        Some(Form::Attention(Box::new(Attention {
            batch: q[0].clone(),
            heads: q[1].clone(),
            kv_heads: k[1].clone(),
            queries: q[2].clone(),
            keys: k[2].clone(),
            depth: q[3].as_const()?,
            width: v[3].as_const()?,
            q: place(0)?,
            k: place(1)?,
            v: place(2)?,
            o: heads(&store.layout, store.buffer)?,
            mask,
            scale: scaled(&attrs.score)?,
            causal: attrs.causal,
            zeros: attrs.zeros,
            tf32: self.precision == Precision::Tf32,
        })))
    }
}
