//! Formulas on tensors of one shape, and their gradients, found symbolically.
//!
//! `map([x, y], "x * sigmoid(y)")` computes the formula for each element, in `f32` (`f64` for `f64`). Tensors belong to the
//! formula's variables in the order in which these first occur. `map_backward` gives the gradient of each tensor. `d0: x * y` is the
//! derivative of a formula by its first variable, with the same tensors.

use crate::plans::{Key, run};
use crate::tensors::{float, like, plain, wide};
use std::collections::HashMap;
use std::sync::{OnceLock, PoisonError, RwLock};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{CompileOptions, Func, compile};
use tilewright_torch_abi::{Abi, Arg, Operator, Tensor, Value};

/// The longest formula that is taken, in bytes.
const LONGEST: usize = 10_000;
/// The highest order of a derivative that a formula's text may ask for: texts of derivatives grow quickly.
const MOST_DERIVATIVES: usize = 4;

/// The formulas that were met, each with its number: its place in the list.
#[derive(Default)]
struct Formulas {
    numbers: HashMap<String, u64>,
    texts: Vec<String>,
}

fn formulas() -> &'static RwLock<Formulas> {
    static KNOWN: OnceLock<RwLock<Formulas>> = OnceLock::new();
    KNOWN.get_or_init(RwLock::default)
}

/// A number for each formula: the same text, the same number, in this process.
pub fn number_of(text: &str) -> u64 {
    let known = formulas();
    if let Some(number) = known.read().unwrap_or_else(PoisonError::into_inner).numbers.get(text) {
        return *number;
    }
    let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
    let next = known.texts.len() as u64;
    if let Some(number) = known.numbers.get(text) {
        return *number;
    }
    known.numbers.insert(text.to_string(), next);
    known.texts.push(text.to_string());
    next
}

/// The formula of a number.
fn text_of(number: u64) -> Result<String> {
    let known = formulas().read().unwrap_or_else(PoisonError::into_inner);
    let text = usize::try_from(number).ok().and_then(|n| known.texts.get(n));
    text.cloned()
        .ok_or_else(|| Error::user(format!("there is no formula with the number {number}")))
}

/// The names of a formula's variables, in order.
///
/// # Errors
/// The user's: what is wrong with the text, and where.
pub fn variables(text: &str) -> Result<Vec<String>> {
    Ok(function(text, DType::F32)?.params().iter().map(|p| p.name.to_string()).collect())
}

/// A formula in `f32` or `f64` and its derivatives by its variables, in the language of a graph's `map`.
///
/// # Errors
/// The user's: what is wrong with the text, and where.
pub fn formula(text: &str, double: bool) -> Result<(String, Vec<String>)> {
    let func = function(text, if double { DType::F64 } else { DType::F32 })?;
    let slopes = (0..func.params().len()).map(|i| Ok(func.derivative(i)?.simplify().to_string()));
    Ok((func.to_string(), slopes.collect::<Result<_>>()?))
}

pub(super) fn function(text: &str, c: DType) -> Result<Func> {
    if text.len() > LONGEST {
        return Err(Error::user(format!("a formula of {} bytes", text.len())));
    }
    // `d0: f` is the derivative of `f` by its first variable.
    let mark = text.strip_prefix('d').and_then(|rest| rest.split_once(": "));
    if let Some((number, rest)) = mark.and_then(|(n, rest)| Some((n.parse::<usize>().ok()?, rest)))
    {
        if rest.matches(": ").count() >= MOST_DERIVATIVES {
            return Err(Error::user("a derivative of too high an order"));
        }
        let func = function(rest, c)?;
        if number >= func.params().len() {
            return Err(Error::user(format!("`{rest}` has no variable {number}")));
        }
        return Ok(func.derivative(number)?.simplify());
    }
    let options = CompileOptions { default: c, ..CompileOptions::default() };
    let func = compile(text, &options)?.func.simplify();
    if func.dtype() != c {
        return Err(Error::user(format!(
            "the formula gives {}; it must give a float",
            func.dtype()
        ))
        .with_hint("convert it: f32(...)"));
    }
    Ok(func)
}

/// The inputs of the graph, widened: `%f0`, `%f1` and so on.
fn inputs(t: DType, count: usize) -> (String, String) {
    let c = wide(t);
    let (mut text, mut operands) = (String::new(), Vec::new());
    for i in 0..count {
        text += &format!("  %x{i} \"x{i}\": {t}[E] = input\n");
        operands.push(format!("%f{i}"));
    }
    for i in 0..count {
        text += &format!("  %f{i} = map {{ a -> {c}(a) }} %x{i}\n");
    }
    (text, operands.join(", "))
}

fn forward(func: &Func, t: DType) -> String {
    let (inputs, operands) = inputs(t, func.params().len());
    format!(
        "graph @formula(E in 1..) {{\n{inputs}  %w = map {func} {operands}\n  %y = map {{ a -> {t}(a) }} %w\n  return \"y\": %y\n}}\n"
    )
}

fn backward(func: &Func, t: DType) -> Result<String> {
    let c = wide(t);
    let count = func.params().len();
    let (inputs, operands) = inputs(t, count);
    let mut text = format!("graph @gradient(E in 1..) {{\n  %dy \"dy\": {t}[E] = input\n{inputs}");
    let mut results = Vec::new();
    for i in 0..count {
        let slope = func.derivative(i)?;
        text += &format!("  %s{i} = map {slope} {operands}\n");
        text += &format!("  %d{i} = map {{ d, s -> {t}({c}(d) * s) }} %dy, %s{i}\n");
        results.push(format!("\"d{i}\": %d{i}"));
    }
    Ok(format!("{text}  return {}\n}}\n", results.join(", ")))
}

/// The tensors of a call, of one shape and type, and the formula for that type.
fn checked(tensors: Vec<Tensor>) -> Result<(Vec<Tensor>, DType)> {
    let Some(first) = tensors.first() else {
        return Err(Error::user("a formula needs at least one tensor"));
    };
    let dtype = float("x", first)?;
    for (index, tensor) in tensors.iter().enumerate().skip(1) {
        if let Err(error) = like("x", tensor, first) {
            let what = format!("tensor {index} of a formula, beside its first");
            return Err(error.with_context(what));
        }
    }
    Ok((tensors.into_iter().map(plain).collect::<Result<_>>()?, dtype))
}

fn fits(func: &Func, tensors: &[Tensor], text: &str) -> Result<()> {
    let (wanted, given) = (func.params().len(), tensors.len());
    if wanted == given {
        return Ok(());
    }
    Err(Error::user(format!("{given} tensors for the {wanted} variables of `{text}`")))
}

fn value(abi: &'static Abi, xs: Vec<Tensor>, number: u64) -> Result<Tensor> {
    let (xs, dtype) = checked(xs)?;
    let y = Tensor::empty(abi, xs[0].sizes(), dtype, xs[0].device())?;
    let key = Key::new("map").with(number).dtype(dtype).with(xs.len() as u64);
    let elements = y.elements();
    if elements > 0 {
        let inputs: Vec<&Tensor> = xs.iter().collect();
        run(key, &[elements], &inputs, &[&y], || {
            let text = text_of(number)?;
            let func = function(&text, wide(dtype))?;
            fits(&func, &xs, &text)?;
            Ok(forward(&func, dtype))
        })?;
    }
    Ok(y)
}

fn gradients(abi: &'static Abi, dy: Tensor, xs: Vec<Tensor>, text: &str) -> Result<Vec<Tensor>> {
    let (xs, dtype) = checked(xs)?;
    like("dy", &dy, &xs[0])?;
    let dy = plain(dy)?;
    let dxs = xs
        .iter()
        .map(|x| Tensor::empty(abi, x.sizes(), dtype, x.device()))
        .collect::<Result<Vec<_>>>()?;
    let key = Key::new("map_backward").with(number_of(text)).dtype(dtype).with(xs.len() as u64);
    let elements = dy.elements();
    if elements > 0 {
        let inputs: Vec<&Tensor> = std::iter::once(&dy).chain(&xs).collect();
        let outputs: Vec<&Tensor> = dxs.iter().collect();
        run(key, &[elements], &inputs, &outputs, || {
            let func = function(text, wide(dtype))?;
            fits(&func, &xs, text)?;
            backward(&func, dtype)
        })?;
    }
    Ok(dxs)
}

/// [`Map`] of a formula by its number ([`number_of`]), which is quicker than a text and means nothing in another process.
pub(crate) struct Numbered<const N: usize>;

impl<const N: usize> Operator for Numbered<N> {
    const NAME: &'static str = ["", "map1.numbered", "map2.numbered"][N];
    const ARGS: &'static [(&'static str, Arg)] = match N {
        1 => &[("x", Arg::Tensor), ("formula", Arg::Int)],
        _ => &[("x", Arg::Tensor), ("y", Arg::Tensor), ("formula", Arg::Int)],
    };
    const RETURNS: &'static str = "Tensor";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [tensors @ .., formula] = args else { return Err(Error::bug("arguments")) };
        let xs = tensors.iter_mut().map(Value::tensor).collect::<Result<_>>()?;
        Ok(vec![Value::Tensor(value(abi, xs, formula.int()?.cast_unsigned())?)])
    }
}

/// A formula of `N` tensors; 0 stands for any number, which come as a list. PyTorch handles lists more slowly.
pub(crate) struct Map<const N: usize>;

impl<const N: usize> Operator for Map<N> {
    const NAME: &'static str = ["map", "map1", "map2"][N];
    const ARGS: &'static [(&'static str, Arg)] = match N {
        0 => &[("xs", Arg::Tensors), ("formula", Arg::Str)],
        1 => &[("x", Arg::Tensor), ("formula", Arg::Str)],
        _ => &[("x", Arg::Tensor), ("y", Arg::Tensor), ("formula", Arg::Str)],
    };
    const RETURNS: &'static str = "Tensor";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let Some((formula, tensors)) = args.split_last_mut() else {
            return Err(Error::bug("arguments"));
        };
        let xs = match N {
            0 => tensors[0].tensors()?,
            _ => tensors.iter_mut().map(Value::tensor).collect::<Result<_>>()?,
        };
        Ok(vec![Value::Tensor(value(abi, xs, number_of(formula.str()?))?)])
    }
}

/// The gradients of [`Map`].
pub(crate) struct MapBackward<const N: usize>;

impl<const N: usize> Operator for MapBackward<N> {
    const NAME: &'static str = ["map_backward", "map1_backward", "map2_backward"][N];
    const ARGS: &'static [(&'static str, Arg)] = match N {
        0 => &[("dy", Arg::Tensor), ("xs", Arg::Tensors), ("formula", Arg::Str)],
        1 => &[("dy", Arg::Tensor), ("x", Arg::Tensor), ("formula", Arg::Str)],
        _ => &[("dy", Arg::Tensor), ("x", Arg::Tensor), ("y", Arg::Tensor), ("formula", Arg::Str)],
    };
    const RETURNS: &'static str = ["Tensor[]", "Tensor", "(Tensor dx, Tensor dy)"][N];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, tensors @ .., formula] = args else { return Err(Error::bug("arguments")) };
        let xs = match N {
            0 => tensors[0].tensors()?,
            _ => tensors.iter_mut().map(Value::tensor).collect::<Result<_>>()?,
        };
        let found = gradients(abi, dy.tensor()?, xs, formula.str()?)?;
        Ok(match N {
            0 => vec![Value::Tensors(found)],
            _ => found.into_iter().map(Value::Tensor).collect(),
        })
    }
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let formulas = ["x * sigmoid(1.702 * x)", "x * sigmoid(x) * y"];
    let texts = formulas.map(|text| {
        let func = function(text, DType::F32).expect("a formula");
        let gradient = backward(&func, DType::BF16).expect("a derivative");
        [(text.to_string(), forward(&func, DType::F32)), (format!("{text}, backward"), gradient)]
    });
    texts.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_come_in_the_order_of_their_first_use() {
        assert_eq!(variables("b * sigmoid(a) + b").expect("a formula"), ["b", "a"]);
        assert!(variables("x +").is_err());
        assert!(variables("x > 1").is_err());
        assert!(variables(&"x+".repeat(10_000)).is_err());
        assert_eq!(variables("d1: d0: b * sigmoid(a)").expect("a derivative"), ["b", "a"]);
        assert!(variables("d2: a * b").is_err());
        assert!(variables(&("d0: ".repeat(100) + "a")).is_err());
    }

    #[test]
    fn the_same_text_has_the_same_number() {
        let (a, b) = (number_of("x + 1"), number_of("x + 2"));
        assert_ne!(a, b);
        assert_eq!(number_of("x + 1"), a);
    }
}
