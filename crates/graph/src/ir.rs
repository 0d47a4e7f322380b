//! [`Graph`], its values and its nodes.

use crate::op::Op;
use std::fmt;
use tilewright_base::{DType, IdVec, typed_id};
use tilewright_data::Tensor;
use tilewright_layout::{Dim, Symbols};

typed_id!(
    /// A value: a graph input, a constant, or a result of a node. Prints as `v3`.
    ValueId,
    "v"
);
typed_id!(
    /// A node. Prints as `n3`.
    NodeId,
    "n"
);

/// Element type and shape. Prints as `f32[N,384]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; expressions over the graph's symbols.
    pub shape: Vec<Dim>,
}

impl TensorType {
    /// `dtype[shape...]`.
    pub fn new(dtype: DType, shape: impl Into<Vec<Dim>>) -> TensorType {
        TensorType { dtype, shape: shape.into() }
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The shape in numbers, when no dimension is symbolic.
    pub fn const_shape(&self) -> Option<Vec<usize>> {
        self.shape.iter().map(|d| d.as_const().and_then(|v| usize::try_from(v).ok())).collect()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(","))
    }
}

/// Where a value comes from.
#[derive(Clone, Debug)]
pub enum Def {
    /// Graph input number `i`.
    Input(usize),
    /// Known data (a weight, a literal).
    Const(Tensor),
    /// Result number `.1` of a node.
    Node(NodeId, usize),
}

/// One value.
#[derive(Clone, Debug)]
pub struct Value {
    /// The frontend's name for it, for messages and for finding it again; may be empty.
    pub name: String,
    /// Element type and shape.
    pub ty: TensorType,
    /// Where it comes from.
    pub def: Def,
}

/// One operator application.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Operands, in the operator's order.
    pub inputs: Vec<ValueId>,
    /// Results, in the operator's order. Their `def` points back here.
    pub outputs: Vec<ValueId>,
    /// The user's node that this came from (an ONNX node name, a module path); may be empty.
    pub origin: String,
}

/// A tensor program.
///
/// Invariants, checked by the verifier:
/// * `order` lists each live node once, operands before users; a node outside `order` is dead.
/// * every value's type is what [`crate::infer`] says for its node.
/// * every symbol in a shape is declared in `symbols`, or is *unbacked*: a size found while
///   running by a data-dependent operator (`NonZero`); those are declared too, with the range
///   they may take, and introduced by a result type of that operator.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// A name for people.
    pub name: String,
    /// Declared symbols with ranges. Every symbol of an input's shape occurs as a plain dimension
    /// of some input, or is given by the caller.
    pub symbols: Symbols,
    /// All values ever made, dead ones included.
    pub values: IdVec<ValueId, Value>,
    /// All nodes ever made, dead ones included.
    pub nodes: IdVec<NodeId, Node>,
    /// The program: live nodes, operands before users.
    pub order: Vec<NodeId>,
    /// Inputs, in order.
    pub inputs: Vec<ValueId>,
    /// Outputs with their names, in order.
    pub outputs: Vec<(String, ValueId)>,
}

impl Graph {
    /// An empty program.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> &TensorType {
        &self.values[value].ty
    }

    /// The shape of a value.
    pub fn shape(&self, value: ValueId) -> &[Dim] {
        &self.values[value].ty.shape
    }

    /// The element type of a value.
    pub fn dtype(&self, value: ValueId) -> DType {
        self.values[value].ty.dtype
    }

    /// The data when the value is a constant.
    pub fn as_const(&self, value: ValueId) -> Option<&Tensor> {
        match &self.values[value].def {
            Def::Const(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The node that makes the value, if one does.
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        match self.values[value].def {
            Def::Node(node, _) => Some(node),
            _ => None,
        }
    }

    /// Live nodes in program order.
    pub fn live(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> {
        self.order.iter().map(|&id| (id, &self.nodes[id]))
    }

    /// For each value, the live nodes that read it (a node once per operand position), in order.
    pub fn users(&self) -> IdVec<ValueId, Vec<NodeId>> {
        let mut users: IdVec<ValueId, Vec<NodeId>> =
            self.values.ids().map(|_| Vec::new()).collect();
        for (id, node) in self.live() {
            for &v in &node.inputs {
                users[v].push(id);
            }
        }
        users
    }

    /// True when the value is a graph output.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.outputs.iter().any(|(_, v)| *v == value)
    }

    /// Adds a constant value.
    pub fn add_const(&mut self, name: impl Into<String>, tensor: Tensor) -> ValueId {
        let shape: Vec<Dim> = tensor.shape().iter().map(|&d| Dim::from(d)).collect();
        let ty = TensorType::new(tensor.dtype(), shape);
        self.values.push(Value { name: name.into(), ty, def: Def::Const(tensor) })
    }

    /// Makes a node with its result values *without* placing it in `order`; passes place it.
    /// The result types are given by the caller (from [`crate::infer`]).
    pub fn add_node(
        &mut self,
        op: Op,
        inputs: Vec<ValueId>,
        types: Vec<TensorType>,
        origin: impl Into<String>,
    ) -> NodeId {
        let origin = origin.into();
        let id = self.nodes.push(Node { op, inputs, outputs: Vec::new(), origin });
        let outputs = types
            .into_iter()
            .enumerate()
            .map(|(i, ty)| {
                self.values.push(Value { name: String::new(), ty, def: Def::Node(id, i) })
            })
            .collect();
        self.nodes[id].outputs = outputs;
        id
    }

    /// Makes every live reader of `from`, and the graph outputs, read `to` instead.
    pub fn replace_uses(&mut self, from: ValueId, to: ValueId) {
        for i in 0..self.order.len() {
            let id = self.order[i];
            for v in &mut self.nodes[id].inputs {
                if *v == from {
                    *v = to;
                }
            }
        }
        for (_, v) in &mut self.outputs {
            if *v == from {
                *v = to;
            }
        }
    }

    /// Drops nodes from `order` that no output needs.
    pub fn remove_dead(&mut self) {
        let mut needed: IdVec<NodeId, bool> = self.nodes.ids().map(|_| false).collect();
        let mut stack: Vec<ValueId> = self.outputs.iter().map(|(_, v)| *v).collect();
        while let Some(v) = stack.pop() {
            if let Some(node) = self.producer(v)
                && !needed[node]
            {
                needed[node] = true;
                stack.extend(&self.nodes[node].inputs);
            }
        }
        self.order.retain(|id| needed[*id]);
    }
}
