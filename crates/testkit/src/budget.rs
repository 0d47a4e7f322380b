//! How far a result may be from the float64 oracle.
//!
//! Each value of a graph gets a relative error `r`, in the unit of its own size (see
//! [`crate::compare`] for what that is). Inputs and constants have 0. With `u(t)` the unit roundoff
//! of a type (half an ulp of 1: 2^-24 for f32) an operator's result has
//!
//! | operator | r |
//! |---|---|
//! | map | the largest operand's `r` times the gain of its steepest operation, plus `u` per float node (4 `u` for a transcendental one) in each node's type |
//! | reduce, scan, window | `r` in, plus `(2 sqrt(n) + 2) u` for `n` elements summed; `u` for max and min |
//! | contract, conv | sum of the operands' `r`, plus `(2 sqrt(n) + 2) u(acc)` for `n` products, plus `u` |
//! | softmax, attention | 8 times `r` of the scores, plus 16 `u` (attention: plus both contractions) |
//! | norms | twice `r` of the data, plus `r` of the parameters, plus `(2 sqrt(n) + 8) u` |
//! | moves, gathers | the largest operand's `r` |
//! | scatter | as a move; with arithmetic, 8 `u` more |
//!
//! `2 sqrt(n)`: rounding errors of a sequential sum of `n` terms of random sign grow like
//! `0.35 sqrt(n) u'` (`u'` one ulp) against the sum's own deviation; the largest of a million such
//! errors is about five deviations. The gain of `exp`, `softmax` and the like is the size of
//! their argument, taken as 8. The rules are for well-scaled data; a kernel is best judged alone,
//! on the oracle's own values for its operands, where every `r` in is 0.

use tilewright_base::DType;
use tilewright_expr::{Func, Node, Op as ExprOp};
use tilewright_graph::{Graph, Op, ReduceKind, TensorType, ValueId, WindowKind};
use tilewright_layout::{Dim, Env};

/// What one value may differ by: `relative * (size) + absolute`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// In units of the value's size.
    pub relative: f64,
    /// The smallest normal number: results below it may be flushed to zero.
    pub absolute: f64,
}

/// Number of significant bits, and the exponents of the smallest normal and of the largest number.
fn format(dtype: DType) -> (i32, i32, f64) {
    match dtype {
        DType::F64 => (53, -1022, f64::MAX),
        DType::F32 => (24, -126, f32::MAX.into()),
        DType::F16 => (11, -14, 65504.0),
        DType::BF16 => (8, -126, 3.389_531_389_251_535_5e38),
        DType::F8E4M3 => (4, -6, 448.0),
        DType::F8E5M2 => (3, -14, 57344.0),
        // Integers have no error.
        _ => (1074, -1022, f64::MAX),
    }
}

/// Unit roundoff: the largest relative error of rounding to this type. 0 for integers.
pub fn unit_roundoff(dtype: DType) -> f64 {
    if dtype.is_float() { 0.5f64.powi(format(dtype).0) } else { 0.0 }
}

/// The largest finite number of a float type.
pub fn largest(dtype: DType) -> f64 {
    format(dtype).2
}

/// The smallest normal number of a float type: results below it may be flushed to zero.
pub fn smallest_normal(dtype: DType) -> f64 {
    2f64.powi(format(dtype).1)
}

/// The gain of functions whose relative error out is the size of their argument times that in.
const STEEP: f64 = 8.0;

/// The budget of each of a graph's outputs. Symbolic extents count with the sizes in `env`, or with
/// 64 when it does not say.
pub fn of_outputs_at(graph: &Graph, env: &Env) -> Vec<Budget> {
    let mut relative: Vec<f64> = vec![0.0; graph.values.len()];
    for (_, node) in graph.live() {
        let r: Vec<f64> = node.inputs.iter().map(|v| relative[v.index()]).collect();
        let types: Vec<&TensorType> = node.inputs.iter().map(|&v| graph.ty(v)).collect();
        for &v in &node.outputs {
            relative[v.index()] = grow(&node.op, &r, &types, graph.ty(v), env);
        }
    }
    graph.outputs.iter().map(|(_, v)| of_value(graph, *v, &relative)).collect()
}

/// As [`of_outputs_at`] without sizes.
pub fn of_outputs(graph: &Graph) -> Vec<Budget> {
    of_outputs_at(graph, &Env::new())
}

fn of_value(graph: &Graph, v: ValueId, relative: &[f64]) -> Budget {
    let dtype = graph.dtype(v);
    Budget {
        // A value that is only moved still may be rounded once on its way out.
        relative: relative[v.index()] + unit_roundoff(dtype),
        absolute: 2f64.powi(format(dtype).1),
    }
}

fn extent(dims: &[Dim], env: &Env) -> f64 {
    let size = |d: &Dim| d.eval_with(&|name| Some(env.get(name).copied().unwrap_or(64)));
    dims.iter().map(|d| size(d).unwrap_or(64).max(1) as f64).product()
}

/// `(2 sqrt(n) + 2) u`.
fn sum_of(n: f64, u: f64) -> f64 {
    (2.0 * n.sqrt() + 2.0) * u
}

fn of_func(func: &Func, r: f64) -> f64 {
    let (mut gain, mut own) = (1.0f64, 0.0);
    for (_, node, dtype) in func.nodes() {
        let Node::Op(op, _) = node else { continue };
        let u = unit_roundoff(dtype);
        match op {
            ExprOp::Exp
            | ExprOp::Exp2
            | ExprOp::Expm1
            | ExprOp::Pow
            | ExprOp::Sinh
            | ExprOp::Cosh => {
                gain *= STEEP;
                own += 4.0 * STEEP * u;
            }
            // Differences and products: both operands' errors add.
            ExprOp::Add | ExprOp::Sub | ExprOp::Mul | ExprOp::Div | ExprOp::Fma => {
                gain += 1.0;
                own += 2.0 * u;
            }
            ExprOp::Cast | ExprOp::Neg | ExprOp::Abs | ExprOp::Min | ExprOp::Max => own += u,
            _ => {
                gain += 1.0;
                own += 4.0 * u;
            }
        }
    }
    gain * (r + own)
}

pub(crate) fn grow(op: &Op, r: &[f64], types: &[&TensorType], out: &TensorType, env: &Env) -> f64 {
    let u = unit_roundoff(out.dtype);
    let most = r.iter().copied().fold(0.0, f64::max);
    let all: f64 = r.iter().sum();
    let axes = |ty: &TensorType, axes: &[usize]| {
        let dims: Vec<Dim> = axes.iter().filter_map(|&a| ty.shape.get(a).cloned()).collect();
        extent(&dims, env)
    };
    match op {
        Op::Map(func) => of_func(func, most),
        Op::Reduce { kind: ReduceKind::Max | ReduceKind::Min, .. } => most + u,
        Op::Reduce { axes: which, .. } => most + sum_of(axes(types[0], which), u),
        Op::Scan { axis, .. } => most + sum_of(axes(types[0], &[*axis]), u),
        Op::Window(a) if a.kind == WindowKind::Max => most,
        Op::Window(a) => most + sum_of(a.kernel.iter().product::<i64>() as f64, u),
        Op::Contract { lhs, rhs, out: letters, acc, .. } => {
            let mut n = 1.0;
            let mut seen = String::new();
            for (spec, ty) in [lhs, rhs].into_iter().zip(types) {
                for (letter, dim) in spec.chars().zip(&ty.shape) {
                    if !letters.contains(letter) && !seen.contains(letter) {
                        seen.push(letter);
                        n *= extent(std::slice::from_ref(dim), env);
                    }
                }
            }
            all + sum_of(n, unit_roundoff(*acc)) + u
        }
        Op::GroupProduct { .. } => {
            let compute = unit_roundoff(out.dtype.compute());
            all + sum_of(axes(types[1], &[1]), compute) + 4.0 * compute + u
        }
        Op::Conv(_) => {
            all + sum_of(extent(&types[1].shape[1..], env), unit_roundoff(out.dtype.compute())) + u
        }
        Op::Attention(a) => {
            let compute = unit_roundoff(out.dtype.compute());
            let (depth, keys) = (axes(types[0], &[3]), axes(types[1], &[2]));
            let extras = r[3..].iter().copied().fold(0.0, f64::max);
            let scores = of_func(&a.score, r[0] + r[1] + extras + sum_of(depth, compute));
            STEEP * scores + r[2] + 16.0 * compute + sum_of(keys, compute) + u
        }
        Op::Softmax { .. } => STEEP * most + 16.0 * u,
        Op::LayerNorm { axis, .. } | Op::RmsNorm { axis, .. } => {
            let n = extent(&types[0].shape[*axis..], env);
            2.0 * r[0] + (all - r[0]) + sum_of(n, u) + 6.0 * u
        }
        Op::BatchNorm { .. } => 2.0 * r[0] + (all - r[0]) + 8.0 * u,
        Op::GroupNorm { .. } => {
            let n = extent(&types[0].shape[1..], env);
            2.0 * r[0] + (all - r[0]) + sum_of(n, u) + 6.0 * u
        }
        Op::ScatterElements { .. } | Op::ScatterNd { .. } => most + 8.0 * u,
        Op::Reshape(_)
        | Op::Permute(_)
        | Op::Expand(_)
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat(_)
        | Op::Iota { .. }
        | Op::Dims(_)
        | Op::ArgReduce { .. }
        | Op::Gather(_)
        | Op::GatherElements(_)
        | Op::GatherNd { .. }
        | Op::TopK { .. }
        | Op::Random { .. }
        | Op::Host(_) => most,
    }
}
