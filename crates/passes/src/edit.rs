//! The editing engine that all rewrites share.
//!
//! [`rewrite`] walks the program once, operands before users, and offers each node to a rule. A
//! rule looks *backwards* (at the producers of the operands, which are already rewritten), adds
//! nodes through the [`Editor`], and answers with the values that stand for the node's results; or
//! it answers `None` and the node stays. Readers are redirected and what nobody needs any more is
//! dropped at the end. Rules that enable each other meet again in the next round of the pass
//! manager's fixed point.

use tilewright_base::{Error, Result, ResultExt};
use tilewright_data::Tensor;
use tilewright_expr::Func;
use tilewright_graph::{Graph, Node, NodeId, Op, TensorType, ValueId, infer};
use tilewright_layout::Dim;

/// What a rule answers: nothing, or one value per result of the node.
pub(crate) type Rewritten = Result<Option<Vec<ValueId>>>;

/// The graph during one [`rewrite`].
pub(crate) struct Editor<'g> {
    pub(crate) graph: &'g mut Graph,
    /// The program so far.
    order: Vec<NodeId>,
    /// By value: what stands for it now.
    replaced: Vec<Option<ValueId>>,
    /// By value: readers, graph outputs included. Never counted down, so at least the truth.
    uses: Vec<u32>,
    origin: String,
}

impl Editor<'_> {
    /// Readers of a value, graph outputs included: the true number or more.
    pub(crate) fn uses(&self, value: ValueId) -> u32 {
        self.uses.get(value.index()).copied().unwrap_or(0)
    }

    /// True when at most the node being looked at reads the value.
    pub(crate) fn only_here(&self, value: ValueId) -> bool {
        self.uses(value) <= 1
    }

    /// The node that makes `value`, when it is in the program.
    pub(crate) fn node_of(&self, value: ValueId) -> Option<&Node> {
        self.graph.producer(value).map(|id| &self.graph.nodes[id])
    }

    /// The operator that makes `value`.
    pub(crate) fn op_of(&self, value: ValueId) -> Option<&Op> {
        self.node_of(value).map(|n| &n.op)
    }

    fn grow(&mut self) {
        let n = self.graph.values.len();
        self.replaced.resize(n, None);
        self.uses.resize(n, 0);
    }

    /// Adds a node with its results.
    pub(crate) fn node(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.graph.ty(v).clone()).collect();
        let types = infer(&op, &types).context(|| format!("rewriting `{}`", self.origin))?;
        let id = self.graph.add_node(op, inputs.to_vec(), types, self.origin.clone());
        self.order.push(id);
        self.grow();
        for v in inputs {
            self.uses[v.index()] += 1;
        }
        Ok(self.graph.nodes[id].outputs.clone())
    }

    /// Adds a node with one result.
    pub(crate) fn op(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        let results = self.node(op, inputs)?;
        results.first().copied().ok_or_else(|| Error::bug("operator without results"))
    }

    /// Adds an elementwise node.
    pub(crate) fn map(&mut self, func: Func, inputs: &[ValueId]) -> Result<ValueId> {
        self.op(Op::Map(func), inputs)
    }

    /// Adds a constant.
    pub(crate) fn constant(&mut self, tensor: Tensor) -> ValueId {
        let id = self.graph.add_const("", tensor);
        self.grow();
        id
    }

    /// Reshaped, unless it has the shape already. A constant stays a constant.
    pub(crate) fn reshape(&mut self, x: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.graph.shape(x) == shape {
            return Ok(x);
        }
        if let Some(tensor) = self.graph.as_const(x)
            && let Some(sizes) = TensorType::new(tensor.dtype(), shape).const_shape()
        {
            let reshaped = tensor.reshaped(sizes)?;
            return Ok(self.constant(reshaped));
        }
        let source = match self.node_of(x) {
            Some(node) if matches!(node.op, Op::Reshape(_)) => node.inputs[0],
            _ => x,
        };
        if self.graph.shape(source) == shape {
            return Ok(source);
        }
        self.op(Op::Reshape(shape.to_vec()), &[source])
    }

    /// Permuted, unless by the identity.
    pub(crate) fn permute(&mut self, x: ValueId, perm: &[usize]) -> Result<ValueId> {
        let (source, perm) = match self.node_of(x) {
            Some(Node { op: Op::Permute(first), inputs, .. }) => (inputs[0], permuted(first, perm)),
            _ => (x, perm.to_vec()),
        };
        if is_identity(&perm) { Ok(source) } else { self.op(Op::Permute(perm), &[source]) }
    }

    /// A constant with its axes reordered.
    pub(crate) fn permuted_constant(&mut self, x: ValueId, perm: &[usize]) -> Result<ValueId> {
        match self.graph.as_const(x) {
            Some(tensor) if !is_identity(perm) => {
                let moved = crate::fold_constants::permute(tensor, perm)?;
                Ok(self.constant(moved))
            }
            _ => self.permute(x, perm),
        }
    }

    /// Broadcast, unless it has the shape already.
    pub(crate) fn expand(&mut self, x: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.graph.shape(x) == shape { Ok(x) } else { self.op(Op::Expand(shape.to_vec()), &[x]) }
    }
}

/// Offers every node of the program to `rule`, in order. True when something changed.
pub(crate) fn rewrite(
    graph: &mut Graph,
    rule: &mut dyn FnMut(&mut Editor<'_>, NodeId) -> Rewritten,
) -> Result<bool> {
    let mut uses = vec![0u32; graph.values.len()];
    for (_, node) in graph.live() {
        for v in &node.inputs {
            uses[v.index()] += 1;
        }
    }
    for (_, v) in &graph.outputs {
        uses[v.index()] += 1;
    }
    let old_order = std::mem::take(&mut graph.order);
    let old_nodes = graph.nodes.len();
    let replaced = vec![None; graph.values.len()];
    let mut ed = Editor {
        order: Vec::with_capacity(old_order.len()),
        replaced,
        uses,
        origin: String::new(),
        graph,
    };
    let mut changed = false;
    // Set once a replacement has another spelling of the same shape: users are then typed again.
    let mut retyped = false;
    for (i, &id) in old_order.iter().enumerate() {
        for at in 0..ed.graph.nodes[id].inputs.len() {
            let v = ed.graph.nodes[id].inputs[at];
            if let Some(new) = ed.replaced[v.index()] {
                ed.graph.nodes[id].inputs[at] = new;
            }
        }
        if retyped {
            retype(ed.graph, id)?;
        }
        ed.origin.clone_from(&ed.graph.nodes[id].origin);
        let outcome = rule(&mut ed, id);
        let results = match outcome {
            Ok(Some(results)) => results,
            Ok(None) => {
                ed.order.push(id);
                continue;
            }
            Err(e) => {
                // Leave a whole graph behind, for the report.
                ed.order.extend_from_slice(&old_order[i..]);
                let order = std::mem::take(&mut ed.order);
                graph.order = order;
                return Err(e.with_note(format!("at {:?}", graph.nodes[id])));
            }
        };
        changed = true;
        let outputs = ed.graph.nodes[id].outputs.clone();
        if results.len() != outputs.len() {
            return Err(Error::bug(format!("a rewrite of {id} lost a result")));
        }
        for (&old, &new) in outputs.iter().zip(&results) {
            let (was, is) = (ed.graph.ty(old), ed.graph.ty(new));
            if was.dtype != is.dtype || was.rank() != is.rank() {
                return Err(Error::bug(format!("a rewrite turned {old}: {was} into {new}: {is}"))
                    .with_note(format!("at {:?}", ed.graph.nodes[id])));
            }
            retyped |= was != is;
            if ed.graph.values[new].name.is_empty() {
                ed.graph.values[new].name = ed.graph.values[old].name.clone();
            }
            ed.replaced[old.index()] = Some(new);
            // The reader of the old value (this node) is gone, its readers come.
            ed.uses[new.index()] += ed.uses[old.index()];
        }
    }
    let (order, replaced) = (std::mem::take(&mut ed.order), std::mem::take(&mut ed.replaced));
    graph.order = order;
    for (_, v) in &mut graph.outputs {
        if let Some(new) = replaced[v.index()] {
            *v = new;
        }
    }
    // A rule that gave up half-way may have left nodes behind, too.
    if changed || graph.nodes.len() > old_nodes {
        graph.remove_dead();
    }
    Ok(changed)
}

/// Computes the types of a node's results again from its operands.
pub(crate) fn retype(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let node = &graph.nodes[id];
    let types: Vec<TensorType> = node.inputs.iter().map(|&v| graph.ty(v).clone()).collect();
    let types = infer(&node.op, &types).context(|| format!("node `{}`", node.origin))?;
    let mut changed = false;
    for (v, ty) in graph.nodes[id].outputs.clone().into_iter().zip(types) {
        if graph.values[v].ty != ty {
            graph.values[v].ty = ty;
            changed = true;
        }
    }
    Ok(changed)
}

/// True for `[0, 1, 2, ...]`.
pub(crate) fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(i, &p)| i == p)
}

/// The permutation that undoes `perm`.
pub(crate) fn inverse(perm: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; perm.len()];
    for (i, &p) in perm.iter().enumerate() {
        inverse[p] = i;
    }
    inverse
}

/// `perm` applied to a list: entry `i` of the result is entry `perm[i]`.
pub(crate) fn permuted<T: Clone>(items: &[T], perm: &[usize]) -> Vec<T> {
    perm.iter().map(|&p| items[p].clone()).collect()
}

/// The one value that every element of the tensor has, if so (and there is at least one).
/// Compared by bits: -0.0 is not 0.0.
pub(crate) fn splat(tensor: &Tensor) -> Option<tilewright_expr::Value> {
    use tilewright_expr::Value;
    let n = tensor.len();
    if n == 0 {
        return None;
    }
    let read = |i: usize| match tensor.dtype().is_float() {
        true => Value::Float(tensor.get_f64(i)),
        false => Value::Int(tensor.get_i64(i)),
    };
    let first = read(0);
    // Large constants that are not splats differ early; those that are pay one scan.
    (1..n).all(|i| read(i) == first).then_some(first)
}
