//! What is known while a model is imported: small constants are computed in the interpreter, and
//! small integer tensors are computed as expressions over symbols.
//!
//! Symbolic values follow three rules. `Dims` *is* a list of expressions. Operators that move
//! elements are run in the interpreter on positions instead of values, and the answer says which
//! expression lands where. Arithmetic is evaluated on expressions, where the ranges of the symbols
//! decide comparisons. Anything else, or any doubt, answers `None`: not known.

use std::collections::BTreeMap;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{Func, Node, Op as ExprOp, Value};
use tilewright_graph::{GraphBuilder, Op, PadMode, ReduceKind, ScatterKind, TensorType};
use tilewright_interp::Mode;
use tilewright_layout::{Dim, Range, Symbols};

/// The largest integer tensor whose values are followed symbolically.
pub(crate) const LIMIT: usize = 1024;

/// Runs one operator on constants. `None` when it fails: then the node stays and fails (or not)
/// where its words have context.
pub(crate) fn run(
    op: &Op,
    inputs: &[Tensor],
    outs: &[TensorType],
    symbols: &Symbols,
) -> Option<Vec<Tensor>> {
    let mut b = GraphBuilder::new("fold");
    for s in symbols {
        b.symbol(&s.name, s.range);
    }
    let mut free = false;
    for ty in outs {
        for d in &ty.shape {
            d.for_each_symbol(&mut |_| free = true);
        }
    }
    // Sizes over the model's symbols are not numbers yet; only host operators find their own.
    if free && !matches!(op, Op::Host(_)) {
        return None;
    }
    let ids: Vec<_> = inputs
        .iter()
        .map(|t| {
            let shape: Vec<Dim> = t.shape().iter().map(|&d| Dim::from(d)).collect();
            b.input("", TensorType::new(t.dtype(), shape))
        })
        .collect();
    let results = b.node(op.clone(), &ids).ok()?;
    for v in results {
        b.output("", v);
    }
    tilewright_interp::run(&b.finish(), inputs, Mode::Exact).ok()
}

/// The values of an operator's only result as expressions, row-major.
pub(crate) fn symbolic(
    op: &Op,
    types: &[TensorType],
    values: &[Vec<Dim>],
    out: &TensorType,
    bounds: &dyn Fn(&Dim) -> Range,
) -> Option<Vec<Dim>> {
    match op {
        Op::Dims(dims) => Some(dims.clone()),
        Op::Reshape(_) => values.first().cloned(),
        Op::Map(func) => map(func, types, values, out, bounds),
        Op::Reduce { kind, axes, .. } => reduce(*kind, axes, types.first()?, values.first()?),
        Op::Permute(_)
        | Op::Expand(_)
        | Op::Slice { .. }
        | Op::Concat(_)
        | Op::Pad { .. }
        | Op::Gather(_)
        | Op::GatherElements(_)
        | Op::GatherNd { .. }
        | Op::ScatterElements { kind: ScatterKind::Set, .. }
        | Op::ScatterNd { kind: ScatterKind::Set } => movement(op, types, values),
        _ => None,
    }
}

/// Runs a data movement on positions in a table of expressions.
fn movement(op: &Op, types: &[TensorType], values: &[Vec<Dim>]) -> Option<Vec<Dim>> {
    let mut table: Vec<Dim> = Vec::new();
    let mut op = op.clone();
    if let Op::Pad { mode: PadMode::Constant(value), .. } = &mut op {
        let Value::Int(v) = *value else { return None };
        table.push(Dim::new(v));
        *value = Value::Int(0);
    }
    let mut inputs = Vec::new();
    for (i, (ty, vals)) in types.iter().zip(values).enumerate() {
        let indices = i == 1
            && matches!(
                op,
                Op::Gather(_)
                    | Op::GatherElements(_)
                    | Op::GatherNd { .. }
                    | Op::ScatterElements { .. }
                    | Op::ScatterNd { .. }
            );
        let numbers: Vec<i64> = if indices {
            vals.iter().map(Dim::as_const).collect::<Option<_>>()?
        } else {
            let first = table.len() as i64;
            table.extend(vals.iter().cloned());
            (first..first + vals.len() as i64).collect()
        };
        let shape = ty.const_shape()?;
        inputs.push(Tensor::from_i64s(DType::I64, &shape, &numbers).ok()?);
    }
    let result = run(&op, &inputs, &[], &Symbols::new())?;
    let [result] = result.as_slice() else { return None };
    result.to_i64s().into_iter().map(|i| table.get(usize::try_from(i).ok()?).cloned()).collect()
}

fn reduce(kind: ReduceKind, axes: &[usize], ty: &TensorType, values: &[Dim]) -> Option<Vec<Dim>> {
    // Over everything only: what `Size` and products of shapes need.
    if axes.len() != ty.rank() || ty.rank() > 1 {
        return None;
    }
    match kind {
        ReduceKind::Sum => Some(vec![values.iter().fold(Dim::new(0), |a, d| a + d)]),
        ReduceKind::Prod => Some(vec![values.iter().fold(Dim::new(1), |a, d| a * d)]),
        ReduceKind::Max | ReduceKind::Min => None,
    }
}

fn map(
    func: &Func,
    types: &[TensorType],
    values: &[Vec<Dim>],
    out: &TensorType,
    bounds: &dyn Fn(&Dim) -> Range,
) -> Option<Vec<Dim>> {
    let shape = out.const_shape()?;
    let count: usize = shape.iter().product();
    let shapes: Option<Vec<Vec<usize>>> = types.iter().map(TensorType::const_shape).collect();
    let shapes = shapes?;
    (0..count)
        .map(|flat| {
            let args: Option<Vec<Dim>> = shapes
                .iter()
                .zip(values)
                .map(|(operand, vals)| {
                    let (mut rest, mut at, mut stride) = (flat, 0, 1);
                    for axis in (0..shape.len()).rev() {
                        let x = rest % shape[axis];
                        rest /= shape[axis];
                        if let Some(a) = (axis + operand.len()).checked_sub(shape.len()) {
                            at += if operand[a] == 1 { 0 } else { x * stride };
                            stride *= operand[a];
                        }
                    }
                    vals.get(at).cloned()
                })
                .collect();
            eval(func, &args?, bounds)
        })
        .collect()
}

/// One scalar function on expressions.
fn eval(func: &Func, args: &[Dim], bounds: &dyn Fn(&Dim) -> Range) -> Option<Dim> {
    let mut done: BTreeMap<u32, Dim> = BTreeMap::new();
    for (id, node, dtype) in func.nodes() {
        if dtype.is_float() {
            return None;
        }
        let value = match node {
            Node::Param(p) => args.get(*p as usize)?.clone(),
            Node::Const(Value::Int(v)) => Dim::new(*v),
            Node::Const(Value::Float(_)) => return None,
            Node::Op(op, operands) => {
                let x: Option<Vec<Dim>> =
                    operands.iter().map(|a| done.get(&a.0).cloned()).collect();
                let x = x?;
                let operand_type = func.dtype_of(*operands.first()?);
                apply(*op, operand_type, dtype, &x, bounds)?
            }
        };
        done.insert(id.0, value);
    }
    done.get(&func.result().0).cloned()
}

/// One operation on expressions, on values that fit the type (sizes do).
fn apply(
    op: ExprOp,
    from: DType,
    to: DType,
    x: &[Dim],
    bounds: &dyn Fn(&Dim) -> Range,
) -> Option<Dim> {
    let flag = |b: bool| Some(Dim::new(b.into()));
    let one = x.first()?;
    let two = x.get(1).unwrap_or(one);
    let diff = || bounds(&(one - two));
    match op {
        ExprOp::Add => Some(one + two),
        ExprOp::Sub => Some(one - two),
        ExprOp::Mul => Some(one * two),
        ExprOp::Neg => Some(-one),
        ExprOp::Div => {
            // Truncation is rounding down where nothing is negative.
            let signs = (bounds(one).min >= 0, bounds(two).min >= 1);
            (signs == (true, true)).then(|| one.floor_div(two))
        }
        ExprOp::Mod | ExprOp::Rem => {
            let signs = (bounds(one).min >= 0, bounds(two).min >= 1);
            (signs == (true, true)).then(|| one.modulo(two))
        }
        ExprOp::Min => Some(if diff().max <= 0 {
            one.clone()
        } else if diff().min >= 0 {
            two.clone()
        } else {
            one.min_with(two)
        }),
        ExprOp::Max => Some(if diff().min >= 0 {
            one.clone()
        } else if diff().max <= 0 {
            two.clone()
        } else {
            one.max_with(two)
        }),
        ExprOp::Abs => (bounds(one).min >= 0).then(|| one.clone()),
        ExprOp::Eq | ExprOp::Ne => {
            let range = diff();
            let equal = match (one == two, range.max < 0 || range.min > 0) {
                (true, _) => true,
                (_, true) => false,
                _ => return None,
            };
            flag(equal == (op == ExprOp::Eq))
        }
        ExprOp::Lt | ExprOp::Ge => match diff() {
            r if r.max < 0 => flag(op == ExprOp::Lt),
            r if r.min >= 0 => flag(op == ExprOp::Ge),
            _ => None,
        },
        ExprOp::Le | ExprOp::Gt => match diff() {
            r if r.max <= 0 => flag(op == ExprOp::Le),
            r if r.min > 0 => flag(op == ExprOp::Gt),
            _ => None,
        },
        ExprOp::Not if to == DType::Bool => flag(one.as_const()? == 0),
        ExprOp::And if to == DType::Bool => flag(one.as_const()? != 0 && two.as_const()? != 0),
        ExprOp::Or if to == DType::Bool => flag(one.as_const()? != 0 || two.as_const()? != 0),
        ExprOp::Select => {
            let (yes, no) = (x.get(1)?, x.get(2)?);
            match one.as_const() {
                Some(c) => Some(if c != 0 { yes.clone() } else { no.clone() }),
                None => (yes == no).then(|| yes.clone()),
            }
        }
        ExprOp::Cast if from.is_int() && matches!(to, DType::I64 | DType::I32) => Some(one.clone()),
        ExprOp::Cast if from == DType::Bool && to.is_int() => Some(one.clone()),
        ExprOp::Cast if to == DType::Bool => {
            let r = bounds(one);
            if one.is(0) {
                flag(false)
            } else if r.min > 0 || r.max < 0 {
                flag(true)
            } else {
                None
            }
        }
        _ => None,
    }
}
