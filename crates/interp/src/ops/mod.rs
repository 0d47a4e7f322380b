//! The meaning of each operator, on concrete shapes.
//!
//! [`apply`] gets the operator with all sizes as numbers, its operands, and the result types that
//! [`tilewright_graph::infer`] gave for them; so the files here check only what types cannot say
//! (index values, element counts of scatters, ...).
//!
//! Rounding in exact mode: an elementwise function rounds at each of its nodes; a contraction
//! accumulates in its `acc` type; every other operator (reductions, norms, softmax, pooling) is one
//! operation: computed in `f64` (or wrapping integers) and rounded once to the result's type.

mod attention;
mod contract;
mod conv;
mod index;
mod norm;
mod numeric;
pub(crate) mod random;
mod reduce;
pub(crate) mod views;
mod window;

use crate::func::eval_func;
use crate::graph::Mode;
use crate::value::{Buf, Val, round_to};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::Op;

/// A result's type with its shape in numbers.
pub(crate) type OutType = (DType, Vec<usize>);

/// Floats as a result of type `dtype`: rounded in exact mode.
pub(crate) fn float_result(dtype: DType, mode: Mode, mut values: Vec<f64>) -> Buf {
    if mode == Mode::Exact && dtype != DType::F64 {
        for v in &mut values {
            *v = round_to(dtype, *v);
        }
    }
    Buf::F(values)
}

/// Computes the results of one operator other than a host operator.
pub(crate) fn apply(op: &Op, inputs: &[Val], outs: &[OutType], mode: Mode) -> Result<Vec<Val>> {
    let (dtype, shape) = outs.first().cloned().ok_or_else(|| Error::bug("no result types"))?;
    let out = |buf: Buf| vec![Val::new(dtype, shape.clone(), buf)];
    Ok(match op {
        Op::Map(func) => {
            let args: Vec<Val> = inputs.iter().map(|x| views::expand(x, &shape)).collect();
            let bufs: Vec<&Buf> = args.iter().map(|v| &*v.buf).collect();
            out(eval_func(func, &bufs, shape.iter().product(), mode))
        }
        Op::Reshape(_) => vec![views::reshape(&inputs[0], &shape)?],
        Op::Permute(perm) => vec![views::permute(&inputs[0], perm)],
        Op::Expand(_) => vec![views::expand(&inputs[0], &shape)],
        Op::Slice { starts, steps, .. } => out(views::slice(&inputs[0], starts, steps, &shape)?),
        Op::Pad { lo, mode, .. } => out(views::pad(&inputs[0], lo, mode, &shape)?),
        Op::Concat(axis) => out(views::concat(inputs, *axis, dtype)),
        Op::Iota { axis, .. } => out(views::iota(dtype, &shape, *axis, mode)),
        Op::Dims(dims) => {
            let values: Option<Vec<i64>> = dims.iter().map(|d| d.as_const()).collect();
            out(Buf::I(values.ok_or_else(|| Error::bug("a size is not a number"))?))
        }
        Op::Reduce { kind, axes, .. } => out(reduce::reduce(&inputs[0], *kind, axes, mode)),
        Op::ArgReduce { kind, axis, last, .. } => {
            out(reduce::arg_reduce(&inputs[0], *kind, *axis, *last)?)
        }
        Op::Scan { kind, axis, exclusive, reverse } => {
            vec![reduce::scan(&inputs[0], *kind, *axis, *exclusive, *reverse, mode)]
        }
        Op::Contract { lhs, rhs, out: result, acc, .. } => {
            out(contract::contract(&inputs[0], &inputs[1], [lhs, rhs, result], *acc, dtype, mode)?)
        }
        Op::GroupProduct { group } => out(contract::group_product(inputs, *group, mode)?),
        Op::Conv(attrs) => out(conv::conv(&inputs[0], &inputs[1], attrs, &shape, mode)),
        Op::Window(attrs) => out(window::window(&inputs[0], attrs, &shape, mode)),
        Op::Attention(attrs) => out(attention::attention(inputs, attrs, mode)),
        Op::Gather(axis) => out(index::gather(&inputs[0], &inputs[1], *axis)?),
        Op::GatherElements(axis) => out(index::gather_elements(&inputs[0], &inputs[1], *axis)?),
        Op::GatherNd { batch } => out(index::gather_nd(&inputs[0], &inputs[1], *batch)?),
        Op::ScatterElements { axis, kind } => {
            out(index::scatter_elements(&inputs[0], &inputs[1], &inputs[2], *axis, *kind, mode)?)
        }
        Op::ScatterNd { kind } => {
            out(index::scatter_nd(&inputs[0], &inputs[1], &inputs[2], *kind, mode)?)
        }
        Op::TopK { axis, largest, .. } => {
            let k = shape.get(*axis).copied().unwrap_or(0);
            let (values, positions) = index::top_k(&inputs[0], *axis, k, *largest);
            let position_shape = outs.get(1).map_or_else(|| shape.clone(), |o| o.1.clone());
            vec![
                Val::new(dtype, shape.clone(), values),
                Val::new(DType::I64, position_shape, Buf::I(positions)),
            ]
        }
        Op::Random { seed, .. } => out(random::uniform(dtype, shape.iter().product(), *seed)?),
        Op::Softmax { axis, log } => vec![norm::softmax(&inputs[0], *axis, *log, mode)],
        Op::LayerNorm { axis, eps } => out(norm::layer_norm(inputs, *axis, *eps, mode)),
        Op::RmsNorm { axis, eps } => out(norm::rms_norm(inputs, *axis, *eps, mode)),
        Op::BatchNorm { eps } => out(norm::batch_norm(inputs, *eps, mode)),
        Op::GroupNorm { groups, eps } => out(norm::group_norm(inputs, *groups, *eps, mode)?),
        Op::Host(host) => {
            return Err(Error::bug(format!("host operator `{}` reached `apply`", host.name)));
        }
    })
}
