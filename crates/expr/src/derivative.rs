//! The symbolic derivative: forward mode over the DAG, with the rules of `op_table.rs`.
//!
//! Each node gets the derivative of its value by the parameter, or none where that is zero, so
//! that zero times infinity never arises from a path that does not matter. Shared nodes are
//! differentiated once. At kinks the rules choose: `abs` and `sign` have 0 at 0, `min` and `max`
//! follow the first operand at a tie, roundings and comparisons have 0 everywhere.

use crate::ir::{ExprId, Func, FuncBuilder, Node};
use crate::op::Op;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};

impl Func {
    /// The derivative by parameter number `param`, on the same parameters, simplified. It has the
    /// type of the function; parameter and result must be floats.
    pub fn derivative(&self, param: usize) -> Result<Func> {
        let Some(by) = self.params().get(param) else {
            return Err(Error::user(format!("the function has no parameter number {param}")));
        };
        for (what, dtype) in [("parameter", by.dtype), ("result", self.dtype())] {
            if !dtype.is_float() {
                let message = format!("a derivative needs floats, the {what} is {dtype}");
                return Err(Error::user(message).with_hint("convert it to f32 first"));
            }
        }
        let mut b = FuncBuilder::new();
        for p in self.params() {
            b.param(&p.name, p.dtype);
        }
        // The function itself keeps its ids in `values`.
        let mut values: Vec<ExprId> = Vec::new();
        let mut slopes: Vec<Option<ExprId>> = Vec::new();
        for (_, node, dtype) in self.nodes() {
            let (value, slope) = match node {
                Node::Param(p) => {
                    let one = (*p as usize == param).then(|| b.constant(1.0, dtype));
                    (ExprId(*p), one)
                }
                Node::Const(v) => (b.value(*v, dtype), None),
                Node::Op(op, args) => {
                    let operands: Vec<ExprId> = args.iter().map(|a| values[a.index()]).collect();
                    let ds: Vec<Option<ExprId>> = args.iter().map(|a| slopes[a.index()]).collect();
                    let value = match op {
                        Op::Cast => b.cast(operands[0], dtype),
                        _ => b.op(*op, &operands),
                    };
                    (value, slope(&mut b, *op, dtype, &operands, value, &ds)?)
                }
            };
            values.push(value);
            slopes.push(slope);
        }
        let result = match slopes[self.result().index()] {
            Some(id) => id,
            None => b.constant(0.0, self.dtype()),
        };
        Ok(b.finish(result).simplify())
    }
}

/// Derivative of one node from those of its operands.
fn slope(
    b: &mut FuncBuilder,
    op: Op,
    dtype: DType,
    operands: &[ExprId],
    value: ExprId,
    ds: &[Option<ExprId>],
) -> Result<Option<ExprId>> {
    // Integers and bools on the way have no slope: a change too small to see.
    if !dtype.is_float() || ds.iter().all(Option::is_none) {
        return Ok(None);
    }
    match op {
        Op::Cast => return Ok(ds[0].map(|d| b.cast(d, dtype))),
        Op::Select => {
            let mut branch = |d: Option<ExprId>| match d {
                Some(d) => d,
                None => b.constant(0.0, dtype),
            };
            let (x, y) = (branch(ds[1]), branch(ds[2]));
            return Ok(Some(b.op(Op::Select, &[operands[0], x, y])));
        }
        _ => {}
    }
    let mut sum: Option<ExprId> = None;
    for (text, d) in op.row().partials.iter().zip(ds) {
        let Some(d) = *d else { continue };
        let partial = partial(text, dtype)?;
        let mut args = operands.to_vec();
        args.resize(3, operands[0]);
        args.push(value);
        let factor = b.inline(&partial, &args);
        let term = b.op(Op::Mul, &[factor, d]);
        sum = Some(sum.map_or(term, |s| b.op(Op::Add, &[s, term])));
    }
    Ok(sum)
}

/// A derivative rule as a function of `a b c y`.
fn partial(text: &str, dtype: DType) -> Result<Arc<Func>> {
    // A number alone takes its type from the conversion.
    let text = format!("{{ a, b, c, y -> {dtype}({text}) }}");
    Func::parse(&text, &[dtype; 4]).map(Arc::new).map_err(|e| {
        Error::bug(format!("the derivative rule {text} does not parse: {}", e.message()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op_table::OPS;
    use tilewright_base::Class;

    /// Central difference with a step that balances rounding and curvature.
    fn numeric(func: &Func, args: &[f64], param: usize) -> f64 {
        let at = |h: f64| {
            let mut args = args.to_vec();
            args[param] += h;
            func.eval_f64(&args)
        };
        let h = 1e-4;
        // Richardson extrapolation: error of order h^4.
        let slope = |h: f64| (at(h) - at(-h)) / (2.0 * h);
        (4.0 * slope(h / 2.0) - slope(h)) / 3.0
    }

    fn check(func: &Func, args: &[f64], what: &str) -> usize {
        let mut checked = 0;
        for param in 0..args.len() {
            if func.params()[param].dtype != DType::F64 {
                continue;
            }
            let exact = func.derivative(param).unwrap().eval_f64(args);
            let close = numeric(func, args, param);
            if close.is_nan() {
                continue;
            }
            let error = (exact - close).abs() / exact.abs().max(1.0);
            assert!(error < 1e-9, "{what} at {args:?} by {param}: {exact}, not {close}");
            checked += 1;
        }
        checked
    }

    #[test]
    fn every_operation_agrees_with_its_difference_quotient() {
        for row in &OPS {
            let op = row.op;
            if !op.accepts(Class::Float) || op.is_predicate() || op == Op::Cast {
                continue;
            }
            let mut b = FuncBuilder::new();
            let args: Vec<ExprId> = (0..op.arity())
                .map(|i| {
                    let dtype = if op == Op::Select && i == 0 { DType::Bool } else { DType::F64 };
                    b.param("x", dtype)
                })
                .collect();
            let y = b.op(op, &args);
            let func = b.finish(y);
            let mut checked = 0;
            for point in [[0.3, 0.7, 1.1], [-0.6, 0.4, 2.2], [1.7, -1.3, 0.2], [3.4, 1.6, -0.8]] {
                checked += check(&func, &point[..op.arity()], row.name);
            }
            assert!(checked >= 2, "{}: only {checked} points", row.name);
        }
    }

    #[test]
    fn functions_of_the_prelude_agree_with_their_difference_quotients() {
        for text in [
            "gelu(x)",
            "gelu_tanh(x)",
            "silu(x)",
            "softplus(x)",
            "mish(x)",
            "logsigmoid(x)",
            "selu(x)",
            "elu(x, 0.7)",
            "hardswish(x)",
            "x ** y",
            "smoothstep(-2, 3, x)",
            "where(x < y, x * x, sin(y) * x)",
            "f64(f32(x)) * x",
            "hypot(x, y) * erfc(x)",
        ] {
            let func = crate::compile(text, &Default::default()).unwrap().func;
            for point in [[0.31, 0.7], [1.7, -1.3], [2.4, 1.6]] {
                check(&func, &point[..func.params().len()], text);
            }
        }
    }

    #[test]
    fn derivatives_are_short() {
        for (text, derivative) in [
            ("{ x, y -> x * y + 3.0 }", "{ x, y -> y }"),
            ("{ x, y -> exp(x) }", "{ x, y -> exp(x) }"),
            ("{ x, y -> y }", "{ x, y -> f32(0.0) }"),
            ("{ x, y -> x ** 2.0 }", "{ x, y -> x + x }"),
            ("{ x, y -> floor(x) + y }", "{ x, y -> f32(0.0) }"),
            ("{ x, y -> tanh(x) }", "{ x, y -> let t0 = tanh(x); 1.0 - t0 * t0 }"),
        ] {
            let func = Func::parse(text, &[DType::F32; 2]).unwrap();
            // What squares become first is the simplifier's choice.
            assert_eq!(func.simplify().derivative(0).unwrap().to_string(), derivative);
        }
    }

    #[test]
    fn integers_have_no_derivative() {
        let func = Func::parse("{ x -> x * 2 }", &[DType::I32]).unwrap();
        assert!(func.derivative(0).unwrap_err().message().contains("i32"));
        assert!(func.derivative(1).is_err());
    }
}
