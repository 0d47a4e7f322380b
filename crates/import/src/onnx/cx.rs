//! [`Cx`]: the graph under construction, with folding and shape arithmetic done on the way.
//!
//! Converters emit operators through [`Cx::node`], [`Cx::op`] and the helpers. Each emission
//! 1. computes integer values symbolically when the operands are known so (`Shape -> Gather ->
//!    Concat` chains become sizes, see `known.rs`),
//! 2. computes small constants right away in the interpreter,
//! 3. otherwise adds the node.
//!
//! So a converter asks [`Cx::ints`] for the value of a `shape` or `axes` operand and gets sizes,
//! whether they come from an initialiser, from arithmetic over shapes or from a bound input.

use super::known;
use super::scalar::{self, Arg, Scalar};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_expr::{Func, Op as ExprOp, Value as Number};
use tilewright_graph::{Def, GraphBuilder, HostAttr, HostOp, Op, ReduceKind, TensorType, ValueId};
use tilewright_layout::{Dim, Range};

/// Constants of more elements than this are left for the passes to fold.
const FOLD_LIMIT: usize = 1 << 18;

/// The graph under construction.
pub(crate) struct Cx {
    /// The builder beneath; emit through [`Cx::node`] instead where folding may apply.
    pub(crate) b: GraphBuilder,
    /// Integer and bool values known as expressions over symbols, row-major.
    known: BTreeMap<ValueId, Vec<Dim>>,
    /// Graph inputs whose values conversion asked for.
    pub(crate) needed: BTreeSet<String>,
    unbacked: usize,
}

impl Cx {
    pub(crate) fn new(name: &str) -> Cx {
        Cx {
            b: GraphBuilder::new(name),
            known: BTreeMap::new(),
            needed: BTreeSet::new(),
            unbacked: 0,
        }
    }

    // ---- types ------------------------------------------------------------------------------

    pub(crate) fn ty(&self, v: ValueId) -> TensorType {
        self.b.ty(v).clone()
    }

    pub(crate) fn shape(&self, v: ValueId) -> Vec<Dim> {
        self.b.shape(v)
    }

    pub(crate) fn rank(&self, v: ValueId) -> usize {
        self.b.ty(v).rank()
    }

    pub(crate) fn dtype(&self, v: ValueId) -> DType {
        self.b.dtype(v)
    }

    /// Bounds of a size over the declared ranges of the symbols.
    pub(crate) fn bounds(&self, dim: &Dim) -> Range {
        let symbols = &self.b.graph().symbols;
        dim.bounds(&|name| symbols.iter().find(|s| &*s.name == name).map(|s| s.range))
    }

    /// The smaller, decided from the ranges when possible.
    pub(crate) fn min(&self, a: &Dim, b: &Dim) -> Dim {
        let diff = self.bounds(&(a - b));
        if diff.max <= 0 {
            a.clone()
        } else if diff.min >= 0 {
            b.clone()
        } else {
            a.min_with(b)
        }
    }

    /// The larger, decided from the ranges when possible.
    pub(crate) fn max(&self, a: &Dim, b: &Dim) -> Dim {
        let diff = self.bounds(&(a - b));
        if diff.min >= 0 {
            a.clone()
        } else if diff.max <= 0 {
            b.clone()
        } else {
            a.max_with(b)
        }
    }

    /// The shape in numbers; `what` says why it must be known.
    pub(crate) fn static_shape(&self, v: ValueId, what: &str) -> Result<Vec<usize>> {
        self.b.ty(v).const_shape().ok_or_else(|| {
            Error::unsupported(format!("{what} of a tensor with symbolic shape {}", self.b.ty(v)))
        })
    }

    /// A size in numbers.
    pub(crate) fn static_dim(&self, dim: &Dim, what: &str) -> Result<i64> {
        dim.as_const().ok_or_else(|| Error::unsupported(format!("{what} with symbolic size {dim}")))
    }

    /// A size that only the run knows: a fresh symbol between 0 and `max`.
    pub(crate) fn unbacked(&mut self, name: &str, max: &Dim) -> Dim {
        self.unbacked += 1;
        let max = self.bounds(max).max;
        self.b.symbol(&format!("{name}_{}", self.unbacked), Range { min: 0, max })
    }

    // ---- known values -----------------------------------------------------------------------

    /// The data when the value is a constant.
    pub(crate) fn as_const(&self, v: ValueId) -> Option<&Tensor> {
        self.b.graph().as_const(v)
    }

    /// Integer values as expressions, when they are known.
    pub(crate) fn try_ints(&self, v: ValueId) -> Option<Vec<Dim>> {
        if let Some(known) = self.known.get(&v) {
            return Some(known.clone());
        }
        let tensor = self.as_const(v)?;
        if tensor.dtype().is_float() || tensor.len() > known::LIMIT {
            return None;
        }
        Some(tensor.to_i64s().into_iter().map(Dim::new).collect())
    }

    /// Integer values that conversion cannot do without.
    pub(crate) fn ints(&mut self, v: ValueId, what: &str) -> Result<Vec<Dim>> {
        if let Some(values) = self.try_ints(v) {
            return Ok(values);
        }
        if let Some(tensor) = self.as_const(v) {
            return Ok(tensor.to_i64s().into_iter().map(Dim::new).collect());
        }
        Err(self.ask_for(v, what))
    }

    /// As [`Cx::ints`], in numbers.
    pub(crate) fn const_ints(&mut self, v: ValueId, what: &str) -> Result<Vec<i64>> {
        let values = self.ints(v, what)?;
        let numbers: Option<Vec<i64>> = values.iter().map(Dim::as_const).collect();
        numbers.ok_or_else(|| {
            let list: Vec<String> = values.iter().map(Dim::to_string).collect();
            Error::unsupported(format!("{what} [{}] depends on symbolic sizes", list.join(", ")))
        })
    }

    /// One integer that conversion cannot do without.
    pub(crate) fn const_int(&mut self, v: ValueId, what: &str) -> Result<i64> {
        match self.const_ints(v, what)?.as_slice() {
            [one] => Ok(*one),
            other => Err(Error::user(format!("{what} has {} values, not one", other.len()))),
        }
    }

    /// The data of a value that conversion cannot do without.
    pub(crate) fn tensor(&mut self, v: ValueId, what: &str) -> Result<Tensor> {
        if let Some(tensor) = self.as_const(v) {
            return Ok(tensor.clone());
        }
        Err(self.ask_for(v, what))
    }

    /// One number that conversion cannot do without.
    pub(crate) fn const_float(&mut self, v: ValueId, what: &str) -> Result<f64> {
        match self.tensor(v, what)?.to_f64s().as_slice() {
            [one] => Ok(*one),
            other => Err(Error::user(format!("{what} has {} values, not one", other.len()))),
        }
    }

    /// Notes which graph inputs `v` depends on, and says that its value is needed.
    fn ask_for(&mut self, v: ValueId, what: &str) -> Error {
        let graph = self.b.graph();
        let (mut stack, mut seen) = (vec![v], BTreeSet::new());
        let mut found = BTreeSet::new();
        while let Some(v) = stack.pop() {
            if !seen.insert(v) {
                continue;
            }
            match &graph.values[v].def {
                Def::Input(_) => {
                    found.insert(graph.values[v].name.clone());
                }
                Def::Const(_) => {}
                Def::Node(node, _) => stack.extend(&graph.nodes[*node].inputs),
            }
        }
        let names: Vec<String> = found.iter().map(|n| format!("`{n}`")).collect();
        self.needed.extend(found);
        Error::unsupported(format!(
            "{what} is computed while the model runs (from {}); it must be known at import",
            if names.is_empty() { "nothing".to_string() } else { names.join(", ") }
        ))
    }

    // ---- emission ---------------------------------------------------------------------------

    /// Emits an operator with any number of results; see the module's head.
    pub(crate) fn node(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        let foldable = !matches!(op, Op::Random { .. });
        let tensors: Option<Vec<&Tensor>> = inputs
            .iter()
            .map(|&v| self.b.graph().as_const(v).filter(|t| t.len() <= FOLD_LIMIT))
            .collect();
        let mut folded: Option<Vec<Tensor>> = None;
        if let (true, Some(tensors)) = (foldable, tensors) {
            let types: Vec<TensorType> = inputs.iter().map(|&v| self.ty(v)).collect();
            if let Ok(outs) = tilewright_graph::infer(&op, &types) {
                let small = outs.iter().all(|ty| {
                    let count = ty
                        .shape
                        .iter()
                        .try_fold(1i64, |n, d| Some(n.saturating_mul(self.bounds(d).max.max(0))));
                    count.is_some_and(|n| n <= FOLD_LIMIT as i64)
                });
                if small {
                    let tensors: Vec<Tensor> = tensors.into_iter().cloned().collect();
                    folded = known::run(&op, &tensors, &outs, &self.b.graph().symbols);
                }
            }
        }
        if let Some(tensors) = folded {
            return Ok(tensors.into_iter().map(|t| self.b.constant("", t)).collect());
        }
        let values = self.symbolic(&op, inputs);
        if let Some(values) = &values
            && let Some(numbers) = values.iter().map(Dim::as_const).collect::<Option<Vec<i64>>>()
        {
            let types: Vec<TensorType> = inputs.iter().map(|&v| self.ty(v)).collect();
            let outs = tilewright_graph::infer(&op, &types)?;
            if let [ty] = outs.as_slice()
                && let Some(shape) = ty.const_shape()
            {
                let tensor = Tensor::from_i64s(ty.dtype, &shape, &numbers)?;
                return Ok(vec![self.b.constant("", tensor)]);
            }
        }
        let outs = self.b.node(op, inputs)?;
        if let (Some(values), [out]) = (values, outs.as_slice()) {
            self.known.insert(*out, values);
        }
        Ok(outs)
    }

    fn symbolic(&self, op: &Op, inputs: &[ValueId]) -> Option<Vec<Dim>> {
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.ty(v)).collect();
        // Cheap refusals first: most nodes are float arithmetic.
        if types.iter().any(|t| t.dtype.is_float() || t.const_shape().is_none()) {
            return None;
        }
        let outs = tilewright_graph::infer(op, &types).ok()?;
        let [out] = outs.as_slice() else { return None };
        if out.dtype.is_float() {
            return None;
        }
        let count = out.const_shape()?.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        if count > known::LIMIT {
            return None;
        }
        let values: Option<Vec<Vec<Dim>>> = inputs.iter().map(|&v| self.try_ints(v)).collect();
        known::symbolic(op, &types, &values?, out, &|d| self.bounds(d))
    }

    /// Emits an operator with one result.
    pub(crate) fn op(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        self.node(op, inputs)?
            .first()
            .copied()
            .ok_or_else(|| Error::bug("operator without results"))
    }

    /// Emits a host operator.
    pub(crate) fn host(
        &mut self,
        name: &str,
        inputs: &[ValueId],
        attrs: &[(&str, HostAttr)],
        types: Vec<TensorType>,
    ) -> Result<Vec<ValueId>> {
        let mut attrs: Vec<(String, HostAttr)> =
            attrs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        attrs.sort_by(|a, b| a.0.cmp(&b.0));
        self.node(Op::Host(HostOp { name: name.to_string(), attrs, types }), inputs)
    }

    // ---- constants --------------------------------------------------------------------------

    pub(crate) fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.b.constant("", tensor)
    }

    pub(crate) fn scalar(&mut self, dtype: DType, value: f64) -> ValueId {
        self.b.scalar(dtype, value)
    }

    /// A vector of `i64`.
    pub(crate) fn int_vec(&mut self, values: &[i64]) -> Result<ValueId> {
        Ok(self.b.constant("", Tensor::from_i64s(DType::I64, &[values.len()], values)?))
    }

    /// A size as a scalar of any type.
    pub(crate) fn dim_scalar(&mut self, dim: &Dim, dtype: DType) -> Result<ValueId> {
        if let Some(value) = dim.as_const() {
            return Ok(self.constant(match dtype.is_float() {
                true => Tensor::from_f64s(dtype, &[], &[value as f64])?,
                false => Tensor::from_i64s(dtype, &[], &[value])?,
            }));
        }
        let v = self.op(Op::Dims(vec![dim.clone()]), &[])?;
        let v = self.reshape(v, &[])?;
        self.cast(v, dtype)
    }

    /// `0, 1, 2, ...` of a length, along one axis of a shape that is 1 elsewhere.
    pub(crate) fn iota(
        &mut self,
        dtype: DType,
        rank: usize,
        axis: usize,
        len: &Dim,
    ) -> Result<ValueId> {
        let mut shape = vec![Dim::new(1); rank];
        if axis >= rank {
            return Err(Error::bug("iota axis outside its rank"));
        }
        shape[axis] = len.clone();
        self.op(Op::Iota { ty: TensorType::new(dtype, shape), axis }, &[])
    }

    /// One value everywhere.
    pub(crate) fn full(&mut self, dtype: DType, value: f64, shape: &[Dim]) -> Result<ValueId> {
        let v = self.scalar(dtype, value);
        self.expand(v, shape)
    }

    // ---- elementwise ------------------------------------------------------------------------

    fn arg(&self, v: ValueId, inline: bool) -> Arg {
        let dtype = self.dtype(v);
        match self.as_const(v) {
            Some(t) if inline && t.len() == 1 => Arg::Const(
                dtype,
                if dtype.is_float() {
                    Number::Float(t.get_f64(0))
                } else {
                    Number::Int(t.get_i64(0))
                },
            ),
            _ => Arg::Param(dtype),
        }
    }

    fn map_with(
        &mut self,
        inputs: &[ValueId],
        compute: Option<DType>,
        out: Option<DType>,
        body: impl for<'a> FnOnce(&[Scalar<'a>]) -> Scalar<'a>,
    ) -> Result<ValueId> {
        // A constant of one element is written into the function, unless it decides the shape.
        let rank_of_others = |i: usize| {
            inputs
                .iter()
                .enumerate()
                .filter(|(j, v)| *j != i && self.as_const(**v).is_none_or(|t| t.len() != 1))
                .map(|(_, v)| self.rank(*v))
                .max()
        };
        let args: Vec<Arg> = inputs
            .iter()
            .enumerate()
            .map(|(i, &v)| self.arg(v, rank_of_others(i).is_some_and(|r| r >= self.rank(v))))
            .collect();
        let kept: Vec<ValueId> = inputs
            .iter()
            .zip(&args)
            .filter(|(_, a)| matches!(a, Arg::Param(_)))
            .map(|(v, _)| *v)
            .collect();
        let func = scalar::build(&args, compute, out, body)?;
        self.map_func(func, &kept)
    }

    /// A function elementwise, operands broadcast.
    pub(crate) fn map_func(&mut self, func: Func, inputs: &[ValueId]) -> Result<ValueId> {
        self.op(Op::Map(func), inputs)
    }

    /// A closure elementwise; parameters have the operands' types, which the caller has checked.
    pub(crate) fn map(
        &mut self,
        inputs: &[ValueId],
        body: impl for<'a> FnOnce(&[Scalar<'a>]) -> Scalar<'a>,
    ) -> Result<ValueId> {
        self.map_with(inputs, None, None, body)
    }

    /// A closure elementwise over floats, all converted to the first operand's computing type; the
    /// result has the first operand's type.
    pub(crate) fn fmap(
        &mut self,
        inputs: &[ValueId],
        body: impl for<'a> FnOnce(&[Scalar<'a>]) -> Scalar<'a>,
    ) -> Result<ValueId> {
        let dtype = inputs.first().map_or(DType::F32, |v| self.dtype(*v));
        for &v in inputs {
            self.float(v)?;
        }
        self.map_with(inputs, Some(dtype.compute()), Some(dtype), body)
    }

    /// A closure elementwise with arguments converted to `compute` and the result to `out`.
    pub(crate) fn map_as(
        &mut self,
        inputs: &[ValueId],
        compute: DType,
        out: DType,
        body: impl for<'a> FnOnce(&[Scalar<'a>]) -> Scalar<'a>,
    ) -> Result<ValueId> {
        self.map_with(inputs, Some(compute), Some(out), body)
    }

    /// One operation elementwise on operands of one type.
    pub(crate) fn apply(&mut self, op: ExprOp, inputs: &[ValueId]) -> Result<ValueId> {
        self.same_dtype(inputs)?;
        let dtype = inputs.first().map_or(DType::F32, |v| self.dtype(*v));
        if !op.accepts(dtype.class()) {
            return Err(Error::user(format!("operand of type {dtype} where it is not defined")));
        }
        let small_float = dtype.is_float() && dtype.compute() != dtype;
        let (compute, out) = match small_float {
            true if op.is_predicate() => (Some(dtype.compute()), None),
            true => (Some(dtype.compute()), Some(dtype)),
            false => (None, None),
        };
        match inputs.len() {
            1 => self.map_with(inputs, compute, out, |p| p[0].un(op)),
            _ => self.map_with(inputs, compute, out, |p| p[0].bin(op, p[1])),
        }
    }

    pub(crate) fn add(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.apply(ExprOp::Add, &[a, b])
    }
    pub(crate) fn sub(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.apply(ExprOp::Sub, &[a, b])
    }
    pub(crate) fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.apply(ExprOp::Mul, &[a, b])
    }
    pub(crate) fn div(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.apply(ExprOp::Div, &[a, b])
    }

    /// Conversion; the value itself when the type is already right.
    pub(crate) fn cast(&mut self, v: ValueId, to: DType) -> Result<ValueId> {
        let from = self.dtype(v);
        if from == to { Ok(v) } else { self.map_func(Func::cast(from, to), &[v]) }
    }

    /// Errors when the value is not of a float type.
    pub(crate) fn float(&self, v: ValueId) -> Result<()> {
        if self.dtype(v).is_float() {
            return Ok(());
        }
        Err(Error::user(format!("needs a floating-point operand, not {}", self.dtype(v))))
    }

    /// Errors when the types differ.
    pub(crate) fn same_dtype(&self, values: &[ValueId]) -> Result<()> {
        let mut dtypes = values.iter().map(|v| self.dtype(*v));
        let Some(first) = dtypes.next() else { return Ok(()) };
        match dtypes.find(|d| *d != first) {
            None => Ok(()),
            Some(other) => {
                Err(Error::user(format!("operands have different types {first} and {other}")))
            }
        }
    }

    // ---- movement ---------------------------------------------------------------------------

    pub(crate) fn reshape(&mut self, v: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.b.graph().shape(v) == shape {
            return Ok(v);
        }
        self.op(Op::Reshape(shape.to_vec()), &[v])
    }

    pub(crate) fn permute(&mut self, v: ValueId, perm: &[usize]) -> Result<ValueId> {
        if perm.len() == self.rank(v) && perm.iter().enumerate().all(|(i, &p)| i == p) {
            return Ok(v);
        }
        self.op(Op::Permute(perm.to_vec()), &[v])
    }

    pub(crate) fn expand(&mut self, v: ValueId, shape: &[Dim]) -> Result<ValueId> {
        if self.b.graph().shape(v) == shape {
            return Ok(v);
        }
        self.op(Op::Expand(shape.to_vec()), &[v])
    }

    /// `len` elements of one axis from `start`.
    pub(crate) fn slice(
        &mut self,
        v: ValueId,
        axis: usize,
        start: Dim,
        len: Dim,
    ) -> Result<ValueId> {
        let mut lens = self.shape(v);
        let mut starts = vec![Dim::new(0); lens.len()];
        let steps = vec![1; lens.len()];
        if axis >= lens.len() {
            return Err(Error::user(format!("axis {axis} of a tensor with {} axes", lens.len())));
        }
        if start.is(0) && lens[axis] == len {
            return Ok(v);
        }
        (starts[axis], lens[axis]) = (start, len);
        self.op(Op::Slice { starts, lens, steps }, &[v])
    }

    /// Element `i` along an axis, which vanishes.
    pub(crate) fn pick(&mut self, v: ValueId, axis: usize, i: i64) -> Result<ValueId> {
        let v = self.slice(v, axis, Dim::new(i), Dim::new(1))?;
        let mut shape = self.shape(v);
        shape.remove(axis);
        self.reshape(v, &shape)
    }

    /// One axis backwards.
    pub(crate) fn reverse(&mut self, v: ValueId, axis: usize) -> Result<ValueId> {
        let lens = self.shape(v);
        if axis >= lens.len() {
            return Err(Error::user(format!("axis {axis} of a tensor with {} axes", lens.len())));
        }
        let mut starts = vec![Dim::new(0); lens.len()];
        let mut steps = vec![1; lens.len()];
        starts[axis] = &lens[axis] - 1;
        steps[axis] = -1;
        self.op(Op::Slice { starts, lens, steps }, &[v])
    }

    pub(crate) fn concat(&mut self, values: &[ValueId], axis: usize) -> Result<ValueId> {
        match values {
            [one] => Ok(*one),
            _ => self.op(Op::Concat(axis), values),
        }
    }

    /// Axes of extent 1 put in at the given positions of the result, ascending.
    pub(crate) fn unsqueeze(&mut self, v: ValueId, axes: &[usize]) -> Result<ValueId> {
        let mut shape = self.shape(v);
        for &axis in axes {
            if axis > shape.len() {
                return Err(Error::user(format!("axis {axis} is outside the result's rank")));
            }
            shape.insert(axis, Dim::new(1));
        }
        self.reshape(v, &shape)
    }

    /// Reshapes a vector so that it lies along `axis` of a tensor of `rank` axes.
    pub(crate) fn along(&mut self, v: ValueId, axis: usize, rank: usize) -> Result<ValueId> {
        let mut shape = vec![Dim::new(1); rank];
        match (self.shape(v).as_slice(), shape.get_mut(axis)) {
            ([len], Some(slot)) => *slot = len.clone(),
            _ => return Err(Error::user(format!("{} where a vector is needed", self.b.ty(v)))),
        }
        self.reshape(v, &shape)
    }

    // ---- reductions and contractions ----------------------------------------------------------

    pub(crate) fn reduce(
        &mut self,
        kind: ReduceKind,
        v: ValueId,
        axes: &[usize],
        keep: bool,
    ) -> Result<ValueId> {
        let mut axes = axes.to_vec();
        axes.sort_unstable();
        axes.dedup();
        if axes.is_empty() {
            return Ok(v);
        }
        self.op(Op::Reduce { kind, axes, keep }, &[v])
    }

    /// Mean over axes, in the value's (float) type.
    pub(crate) fn mean(&mut self, v: ValueId, axes: &[usize], keep: bool) -> Result<ValueId> {
        let shape = self.shape(v);
        let mut count = Dim::new(1);
        for &a in axes {
            count = count * shape.get(a).ok_or_else(|| Error::user(format!("axis {a}")))?;
        }
        let sum = self.reduce(ReduceKind::Sum, v, axes, keep)?;
        let count = self.dim_scalar(&count, self.dtype(v))?;
        self.div(sum, count)
    }

    /// Einsum of two operands of one type.
    pub(crate) fn contract(&mut self, spec: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        let dtype = self.dtype(a);
        self.same_dtype(&[a, b])?;
        let split = spec.split_once("->").and_then(|(ins, out)| {
            ins.split_once(',').map(|(l, r)| (l.to_string(), r.to_string(), out.to_string()))
        });
        let Some((lhs, rhs, out)) = split else {
            return Err(Error::bug(format!("contraction `{spec}`")));
        };
        self.op(Op::Contract { lhs, rhs, out, acc: dtype.compute(), dtype }, &[a, b])
    }
}
