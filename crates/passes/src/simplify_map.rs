//! The part of `simplify` that looks at elementwise functions.
//!
//! ```text
//! before: v1 = expand [B,8] v0                 after: v2 = map(v3) { x -> x * 2 }
//!         v2 = map(v1, 2.0, v3) { a, b, x -> x * b }
//! ```
//!
//! | pattern | becomes | when |
//! |---|---|---|
//! | operand is a literal, or a constant of equal elements | literal in the function | the other operands give the shape |
//! | two operands are one value | one parameter | |
//! | parameter is not used | dropped | the other operands give the shape |
//! | operand is an `expand` | its source | the result keeps its shape |
//! | `map { x -> x }` | the operand | same shape |
//! | constant function | expanded literal | |
//! | cast of a cast | one cast | the first one loses nothing |
//! | all operands are expanded, or one element | `expand (map ..)` | on the smaller shape |
//! | any function | its simplified form | exact rules of the expression simplifier |

use crate::edit::{Editor, splat};
use tilewright_base::{Class, DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op as ExprOp, Value};
use tilewright_graph::{Op, ValueId};
use tilewright_layout::{Dim, broadcast_shapes};

/// What becomes of one operand of the map.
#[derive(Clone, Copy, PartialEq)]
enum Arg {
    /// Stays, perhaps as another value.
    Read(ValueId),
    /// Becomes a literal.
    Literal(Value),
    /// Is not used.
    Unused,
}

/// The value that replaces a map, if a rule applies.
pub(crate) fn rule(
    ed: &mut Editor<'_>,
    func: &Func,
    inputs: &[ValueId],
    out: ValueId,
) -> Result<Option<ValueId>> {
    let shape = ed.graph.shape(out).to_vec();
    if func.is_identity() && ed.graph.shape(inputs[0]) == shape {
        return Ok(Some(inputs[0]));
    }
    if let (Some(value), false) = (func.as_constant(), inputs.is_empty()) {
        let literal = ed.constant(literal(func.dtype(), value)?);
        return Ok(Some(ed.expand(literal, &shape)?));
    }
    if let Some(cast) = cast_of_cast(ed, func, inputs) {
        let (x, to) = cast;
        let from = ed.graph.dtype(x);
        return Ok(Some(if from == to { x } else { ed.map(Func::cast(from, to), &[x])? }));
    }
    if let Some(done) = fewer_operands(ed, func, inputs, &shape)? {
        return Ok(Some(done));
    }
    if let Some(done) = expand_after(ed, func, inputs, &shape)? {
        return Ok(Some(done));
    }
    let better = func.simplify();
    if better == *func {
        return Ok(None);
    }
    let nothing = better.is_identity() && ed.graph.shape(inputs[0]) == shape;
    Ok(Some(if nothing { inputs[0] } else { ed.map(better, inputs)? }))
}

/// A tensor of shape `[]`.
fn literal(dtype: DType, value: Value) -> Result<Tensor> {
    match value {
        Value::Float(x) => Tensor::from_f64s(dtype, &[], &[x]),
        Value::Int(x) => Tensor::from_i64s(dtype, &[], &[x]),
    }
}

/// The shape that these operands broadcast to; `None` when they do not.
fn common<'s>(shapes: impl Iterator<Item = &'s [Dim]>) -> Option<Vec<Dim>> {
    let mut all: Vec<Dim> = Vec::new();
    for s in shapes {
        all = broadcast_shapes(&all, s)?;
    }
    Some(all)
}

/// What the operand could be instead, wishing away its part in the shape.
fn wish(ed: &Editor<'_>, func: &Func, i: usize, v: ValueId) -> Option<Arg> {
    if !func.uses_param(i) {
        return Some(Arg::Unused);
    }
    if let Some(value) = ed.graph.as_const(v).and_then(splat) {
        return Some(Arg::Literal(value));
    }
    match ed.node_of(v) {
        Some(node) if matches!(node.op, Op::Expand(_)) => Some(Arg::Read(node.inputs[0])),
        _ => None,
    }
}

/// The shape that the operands still read give together.
fn reached(ed: &Editor<'_>, args: &[Arg]) -> Option<Vec<Dim>> {
    common(args.iter().filter_map(|a| match a {
        Arg::Read(v) => Some(ed.graph.shape(*v)),
        _ => None,
    }))
}

/// Literals, unused and expanded operands go as long as the others give the shape.
fn fewer_operands(
    ed: &mut Editor<'_>,
    func: &Func,
    inputs: &[ValueId],
    shape: &[Dim],
) -> Result<Option<ValueId>> {
    let mut args: Vec<Arg> = inputs.iter().map(|&v| Arg::Read(v)).collect();
    for (i, &v) in inputs.iter().enumerate() {
        if let Some(better) = wish(ed, func, i, v) {
            let before = std::mem::replace(&mut args[i], better);
            let left = args.iter().any(|a| matches!(a, Arg::Read(_)));
            if !left || reached(ed, &args).as_deref() != Some(shape) {
                args[i] = before;
            }
        }
    }
    let unchanged = args.iter().zip(inputs).all(|(a, v)| *a == Arg::Read(*v));
    let repeats = (0..inputs.len()).any(|i| inputs[..i].contains(&inputs[i]));
    if unchanged && !repeats {
        return Ok(None);
    }
    let (func, inputs) = specialised(func, &args);
    Ok(Some(ed.map(func, &inputs)?))
}

/// Computes before broadcasting when every operand that matters was broadcast.
fn expand_after(
    ed: &mut Editor<'_>,
    func: &Func,
    inputs: &[ValueId],
    shape: &[Dim],
) -> Result<Option<ValueId>> {
    let mut args: Vec<Arg> = Vec::with_capacity(inputs.len());
    for (i, &v) in inputs.iter().enumerate() {
        args.push(wish(ed, func, i, v).unwrap_or(Arg::Read(v)));
    }
    let left = args.iter().any(|a| matches!(a, Arg::Read(_)));
    match reached(ed, &args) {
        Some(small) if left && small != shape => {
            let (func, inputs) = specialised(func, &args);
            let small = ed.map(func, &inputs)?;
            Ok(Some(ed.expand(small, shape)?))
        }
        _ => Ok(None),
    }
}

/// The function with literals in place and one parameter per distinct operand.
fn specialised(func: &Func, args: &[Arg]) -> (Func, Vec<ValueId>) {
    let mut f = FuncBuilder::new();
    let mut inputs: Vec<(ValueId, ExprId)> = Vec::new();
    let mut exprs: Vec<ExprId> = Vec::with_capacity(args.len());
    for (arg, param) in args.iter().zip(func.params()) {
        exprs.push(match arg {
            Arg::Read(v) => match inputs.iter().find(|(known, _)| known == v) {
                Some((_, e)) => *e,
                None => {
                    let e = f.param(&param.name, param.dtype);
                    inputs.push((*v, e));
                    e
                }
            },
            Arg::Literal(value) => f.value(*value, param.dtype),
            Arg::Unused => f.constant(0.0, param.dtype),
        });
    }
    let result = f.inline(func, &exprs);
    (f.finish(result).simplify(), inputs.into_iter().map(|(v, _)| v).collect())
}

/// For `cast (cast x)` with an exact first cast: x and the final type.
fn cast_of_cast(ed: &Editor<'_>, func: &Func, inputs: &[ValueId]) -> Option<(ValueId, DType)> {
    let plain = |f: &Func| f.params().len() == 1 && f.as_single_op() == Some(ExprOp::Cast);
    if !plain(func) {
        return None;
    }
    let node = ed.node_of(inputs[0])?;
    match &node.op {
        Op::Map(first) if plain(first) => {
            let x = node.inputs[0];
            exact_cast(ed.graph.dtype(x), first.dtype()).then_some((x, func.dtype()))
        }
        _ => None,
    }
}

/// True when every value of `from` is a value of `to`, so that any later cast gives the same.
fn exact_cast(from: DType, to: DType) -> bool {
    let (a, b) = (from.bits(), to.bits());
    match (from.class(), to.class()) {
        (Class::Bool, _) => true,
        (Class::Float, Class::Float) => {
            from == to
                || to == DType::F64
                || (to == DType::F32 && b > a)
                || (to == DType::F16 && from == DType::F8E5M2)
                || (matches!(to, DType::F16 | DType::BF16) && from == DType::F8E4M3)
                || (to == DType::BF16 && from == DType::F8E5M2)
        }
        (Class::Signed, Class::Signed) | (Class::Unsigned, Class::Unsigned) => b >= a,
        (Class::Unsigned, Class::Signed) => b > a,
        // Small integers fit the mantissa.
        (Class::Signed | Class::Unsigned, Class::Float) => {
            (to == DType::F64 && a <= 32) || (to == DType::F32 && a <= 16)
        }
        _ => false,
    }
}
