//! [`GraphBuilder`]: makes graphs in program order, inferring types on the way.
//!
//! Frontends and tests use it. Every method that adds a node returns a [`Result`]: what goes wrong
//! is the model's fault and is said in the model's words.

use crate::infer::infer;
use crate::ir::{Def, Graph, TensorType, Value, ValueId};
use crate::op::{Op, ReduceKind};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result, ResultExt};
use tilewright_data::Tensor;
use tilewright_expr::{Func, Op as ExprOp};
use tilewright_layout::{Dim, Range, Symbol};

/// Builds a [`Graph`] node by node.
#[derive(Clone, Debug, Default)]
pub struct GraphBuilder {
    graph: Graph,
    origin: String,
}

impl GraphBuilder {
    /// An empty graph of this name.
    pub fn new(name: impl Into<String>) -> GraphBuilder {
        GraphBuilder { graph: Graph::new(name), origin: String::new() }
    }

    /// Continues a graph: new nodes stand behind those it has.
    pub fn from_graph(graph: Graph) -> GraphBuilder {
        GraphBuilder { graph, origin: String::new() }
    }

    /// The graph built so far.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Says which of the user's nodes the following nodes come from.
    pub fn set_origin(&mut self, origin: impl Into<String>) {
        self.origin = origin.into();
    }

    /// Declares a symbol (again with the same name: keeps the first range) and returns it as a size.
    pub fn symbol(&mut self, name: &str, range: Range) -> Dim {
        if !self.graph.symbols.iter().any(|s| &*s.name == name) {
            self.graph.symbols.push(Symbol { name: Arc::from(name), range });
        }
        Dim::sym(name)
    }

    /// Adds an input.
    pub fn input(&mut self, name: impl Into<String>, ty: TensorType) -> ValueId {
        let def = Def::Input(self.graph.inputs.len());
        let id = self.graph.values.push(Value { name: name.into(), ty, def });
        self.graph.inputs.push(id);
        id
    }

    /// Adds an output.
    pub fn output(&mut self, name: impl Into<String>, value: ValueId) {
        self.graph.outputs.push((name.into(), value));
    }

    /// Adds a named constant.
    pub fn constant(&mut self, name: impl Into<String>, tensor: Tensor) -> ValueId {
        self.graph.add_const(name, tensor)
    }

    /// Adds a scalar constant.
    pub fn scalar(&mut self, dtype: DType, value: f64) -> ValueId {
        self.graph.add_const("", Tensor::scalar(dtype, value))
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> &TensorType {
        self.graph.ty(value)
    }

    /// The shape of a value.
    pub fn shape(&self, value: ValueId) -> Vec<Dim> {
        self.graph.shape(value).to_vec()
    }

    /// The element type of a value.
    pub fn dtype(&self, value: ValueId) -> DType {
        self.graph.dtype(value)
    }

    /// Names a value, for messages and for finding it again.
    pub fn name(&mut self, value: ValueId, name: impl Into<String>) {
        self.graph.values[value].name = name.into();
    }

    /// Adds a node with any number of results.
    pub fn node(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.graph.ty(v).clone()).collect();
        let types = infer(&op, &types).context(|| match self.origin.as_str() {
            "" => "building the graph".to_string(),
            origin => format!("node `{origin}`"),
        })?;
        let id = self.graph.add_node(op, inputs.to_vec(), types, self.origin.clone());
        self.graph.order.push(id);
        Ok(self.graph.nodes[id].outputs.clone())
    }

    /// Adds a node with one result.
    pub fn op(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        self.node(op, inputs)?
            .first()
            .copied()
            .ok_or_else(|| Error::bug("operator without results"))
    }

    /// `func` elementwise, operands broadcast.
    pub fn map(&mut self, func: Func, inputs: &[ValueId]) -> Result<ValueId> {
        self.op(Op::Map(func), inputs)
    }

    /// `func` elementwise, written as text: `{ x, b -> gelu(x + b) }`. The parameters take the
    /// operands' types.
    pub fn map_text(&mut self, text: &str, inputs: &[ValueId]) -> Result<ValueId> {
        let dtypes: Vec<DType> = inputs.iter().map(|&v| self.dtype(v)).collect();
        self.map(Func::parse(text, &dtypes)?, inputs)
    }

    /// One elementwise operation on one operand.
    pub fn unary(&mut self, op: ExprOp, x: ValueId) -> Result<ValueId> {
        self.map(Func::unary(op, self.dtype(x)), &[x])
    }

    /// One elementwise operation on two operands of one type, broadcast.
    pub fn binary(&mut self, op: ExprOp, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.map(Func::binary(op, self.dtype(a)), &[a, b])
    }

    /// Conversion; the value itself when the type is already right.
    pub fn cast(&mut self, x: ValueId, to: DType) -> Result<ValueId> {
        if self.dtype(x) == to { Ok(x) } else { self.map(Func::cast(self.dtype(x), to), &[x]) }
    }

    /// `x` of `[..., K]` in codes of 8 bits with a scale for each group of `group` neighbours, which divides K: codes of
    /// x's shape, and scales `[..., K/group]` of its type, the largest magnitude of the group over 127. What
    /// [`Op::GroupProduct`] takes.
    ///
    /// # Errors
    /// A depth that is unknown or no whole groups.
    pub fn in_codes(&mut self, x: ValueId, group: i64) -> Result<[ValueId; 2]> {
        let shape = self.shape(x);
        let depth = shape.last().and_then(Dim::as_const).filter(|d| group > 0 && d % group == 0);
        let Some(depth) = depth else {
            return Err(Error::user(format!("the depth is no whole groups of {group}")));
        };
        let mut scaled = shape.clone();
        scaled.pop();
        scaled.push(Dim::new(depth / group));
        let mut split = scaled.clone();
        split.push(Dim::new(group));
        let groups = self.reshape(x, &split)?;
        let sizes = self.map_text("{ x -> abs(x) }", &[groups])?;
        let most = self.reduce(ReduceKind::Max, sizes, &[split.len() - 1], true)?;
        let codes =
            self.map_text("{ x, m -> round(x * where(m > 0, 127 / m, 0)) }", &[groups, most])?;
        let codes = self.cast(codes, DType::I8)?;
        let codes = self.reshape(codes, &shape)?;
        let scales = self.map_text("{ m -> m / 127 }", &[most])?;
        Ok([codes, self.reshape(scales, &scaled)?])
    }

    /// Another shape; the value itself when it has it already.
    pub fn reshape(&mut self, x: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.graph.shape(x) == shape {
            Ok(x)
        } else {
            self.op(Op::Reshape(shape.to_vec()), &[x])
        }
    }

    /// Axes reordered; the value itself for the identity.
    pub fn permute(&mut self, x: ValueId, perm: &[usize]) -> Result<ValueId> {
        if perm.iter().enumerate().all(|(i, &p)| i == p) && perm.len() == self.graph.shape(x).len()
        {
            return Ok(x);
        }
        self.op(Op::Permute(perm.to_vec()), &[x])
    }

    /// Broadcast; the value itself when it has the shape already.
    pub fn expand(&mut self, x: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.graph.shape(x) == shape { Ok(x) } else { self.op(Op::Expand(shape.to_vec()), &[x]) }
    }

    /// `len` elements of one axis from `start`, step 1.
    pub fn slice_axis(&mut self, x: ValueId, axis: usize, start: Dim, len: Dim) -> Result<ValueId> {
        let mut lens = self.shape(x);
        let mut starts = vec![Dim::new(0); lens.len()];
        let steps = vec![1; lens.len()];
        if axis >= lens.len() {
            return Err(Error::user(format!("axis {axis} of a tensor with {} axes", lens.len())));
        }
        (starts[axis], lens[axis]) = (start, len);
        self.op(Op::Slice { starts, lens, steps }, &[x])
    }

    /// Reduction over axes (any order).
    pub fn reduce(
        &mut self,
        kind: ReduceKind,
        x: ValueId,
        axes: &[usize],
        keep: bool,
    ) -> Result<ValueId> {
        let mut axes = axes.to_vec();
        axes.sort_unstable();
        axes.dedup();
        self.op(Op::Reduce { kind, axes, keep }, &[x])
    }

    /// Einsum of two operands of one type, `"bmk,bkn->bmn"`. Accumulates in `f32` for the 8- and
    /// 16-bit floats, in `i32` for 8-bit integers, otherwise in the type itself.
    pub fn contract(&mut self, spec: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        let dtype = self.dtype(a);
        let acc = match dtype {
            DType::I8 | DType::U8 => DType::I32,
            other => other.compute(),
        };
        let split = spec.split_once("->").and_then(|(ins, out)| {
            ins.split_once(',')
                .map(|(lhs, rhs)| (lhs.to_string(), rhs.to_string(), out.to_string()))
        });
        let Some((lhs, rhs, out)) = split else {
            return Err(Error::user(format!("`{spec}` is not of the form `ab,bc->ac`")));
        };
        self.op(Op::Contract { lhs, rhs, out, acc, dtype }, &[a, b])
    }

    /// The finished graph.
    pub fn finish(self) -> Graph {
        self.graph
    }
}
