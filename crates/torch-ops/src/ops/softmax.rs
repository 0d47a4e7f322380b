//! Softmax and its logarithm over the last axis, and their gradients.

use crate::plans::{Key, run};
use crate::tensors::{Rows, float, like, plain, wide};
use tilewright_base::{DType, Error, Result};
use tilewright_torch_abi::{Abi, Arg, Operator, Tensor, Value};

fn forward(t: DType, n: i64, log: bool) -> String {
    let c = wide(t);
    let last = if log {
        format!(
            "  %l = map {{ s -> log(s) }} %s\n  %y = map {{ a, m, l -> {t}(a - m - l) }} %f, %m, %l\n"
        )
    } else {
        // One division per row, not one per element.
        format!("  %i = map {{ s -> 1.0 / s }} %s\n  %y = map {{ e, i -> {t}(e * i) }} %e, %i\n")
    };
    format!(
        "graph @softmax(M in 1..) {{
  %x \"x\": {t}[M,{n}] = input
  %f = map {{ a -> {c}(a) }} %x
  %m = reduce max axes=[1] keep %f
  %e = map {{ a, m -> exp(a - m) }} %f, %m
  %s = reduce sum axes=[1] keep %e
{last}  return \"y\": %y
}}
"
    )
}

fn backward(t: DType, n: i64, log: bool) -> String {
    let c = wide(t);
    let (product, last) = if log {
        (
            format!("{c}(d)"),
            format!("map {{ d, y, s -> {t}({c}(d) - exp({c}(y)) * s) }} %dy, %y, %s"),
        )
    } else {
        (
            format!("{c}(d) * {c}(y)"),
            format!("map {{ d, y, s -> {t}({c}(y) * ({c}(d) - s)) }} %dy, %y, %s"),
        )
    };
    let operands = if log { ("d", "%dy") } else { ("d, y", "%dy, %y") };
    let (names, values) = operands;
    format!(
        "graph @softmax_backward(M in 1..) {{
  %dy \"dy\": {t}[M,{n}] = input
  %y \"y\": {t}[M,{n}] = input
  %p = map {{ {names} -> {product} }} {values}
  %s = reduce sum axes=[1] keep %p
  %dx = {last}
  return \"dx\": %dx
}}
"
    )
}

/// `exp(x - max) / sum(exp(x - max))` over the last axis, or its logarithm.
pub(crate) struct Softmax;

impl Operator for Softmax {
    const NAME: &'static str = "softmax";
    const ARGS: &'static [(&'static str, Arg)] = &[("x", Arg::Tensor), ("log", Arg::Bool)];
    const RETURNS: &'static str = "Tensor";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, log] = args else { return Err(Error::bug("arguments")) };
        let (x, log) = (x.tensor()?, log.bool()?);
        let (dtype, rows) = (float("x", &x)?, Rows::of("x", &x)?);
        let x = plain(x)?;
        let y = Tensor::empty(abi, x.sizes(), dtype, x.device())?;
        if !rows.is_empty() {
            let key = Key::new("softmax").dtype(dtype).with(rows.columns as u64).with(log.into());
            run(key, &[rows.rows], &[&x], &[&y], || Ok(forward(dtype, rows.columns, log)))?;
        }
        Ok(vec![Value::Tensor(y)])
    }
}

/// The gradient of [`Softmax`] from its result.
pub(crate) struct SoftmaxBackward;

impl Operator for SoftmaxBackward {
    const NAME: &'static str = "softmax_backward";
    const ARGS: &'static [(&'static str, Arg)] =
        &[("dy", Arg::Tensor), ("y", Arg::Tensor), ("log", Arg::Bool)];
    const RETURNS: &'static str = "Tensor";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, y, log] = args else { return Err(Error::bug("arguments")) };
        let (dy, y, log) = (dy.tensor()?, y.tensor()?, log.bool()?);
        let (dtype, rows) = (float("y", &y)?, Rows::of("y", &y)?);
        like("dy", &dy, &y)?;
        let (dy, y) = (plain(dy)?, plain(y)?);
        let dx = Tensor::empty(abi, y.sizes(), dtype, y.device())?;
        if !rows.is_empty() {
            let key = Key::new("softmax_backward").dtype(dtype);
            let key = key.with(rows.columns as u64).with(log.into());
            run(key, &[rows.rows], &[&dy, &y], &[&dx], || Ok(backward(dtype, rows.columns, log)))?;
        }
        Ok(vec![Value::Tensor(dx)])
    }
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let both = [("softmax", false), ("log softmax", true)];
    let texts = both.map(|(name, log)| {
        [
            (name.to_string(), forward(DType::BF16, 4096, log)),
            (format!("{name}, backward"), backward(DType::BF16, 40, log)),
        ]
    });
    texts.concat()
}
