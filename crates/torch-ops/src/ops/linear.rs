//! A linear layer with what follows it: `activation(x weight^T + bias) + residual`, one kernel.
//!
//! For training [`Linear`] with `SUMS` stores the sums before the activation, too, which the derivative needs: from them and the
//! gradient of the result one kernel makes the gradient of the sums, [`ColumnSums`] that of the bias, and products of PyTorch's the
//! rest.

use crate::ops::elementwise::{function, number_of};
use crate::plans::{Key, run};
use crate::tensors::{Rows, float, plain, same_device, vector, wide};
use tilewright_base::{DType, Error, Result};
use tilewright_torch_abi::{Abi, Arg, Operator, Tensor, Value};

#[derive(Clone, Copy)]
struct Form<'a> {
    dtype: DType,
    inner: i64,
    outer: i64,
    bias: Option<DType>,
    residual: bool,
    /// What comes before the activation is a result, too.
    sums: bool,
    formula: &'a str,
}

impl Form<'_> {
    fn text(&self) -> Result<String> {
        let Form { dtype: t, inner: k, outer: n, .. } = *self;
        let c = wide(t);
        let mut text = format!(
            "graph @linear(M in 1..) {{\n  %x \"x\": {t}[M,{k}] = input\n  %w \"weight\": {t}[{n},{k}] = input\n"
        );
        if let Some(b) = self.bias {
            text += &format!("  %b \"bias\": {b}[{n}] = input\n");
        }
        if self.residual {
            text += &format!("  %r \"residual\": {t}[M,{n}] = input\n");
        }
        text += &format!("  %s: {c}[M,{n}] = contract \"mk,nk->mn\" acc={c} %x, %w\n");
        let mut value = "%s";
        if self.bias.is_some() {
            text += &format!("  %sb = map {{ a, b -> a + {c}(b) }} %s, %b\n");
            value = "%sb";
        }
        if self.sums {
            text += &format!("  %kept = map {{ a -> {t}(a) }} {value}\n");
        }
        if !self.formula.is_empty() {
            let func = function(self.formula, c)?;
            if func.params().len() != 1 {
                let message = format!("the activation `{}` must have one variable", self.formula);
                return Err(Error::user(message));
            }
            text += &format!("  %sa = map {func} {value}\n");
            value = "%sa";
        }
        text += &match self.residual {
            true => format!("  %y = map {{ a, r -> {t}(a + {c}(r)) }} {value}, %r\n"),
            false => format!("  %y = map {{ a -> {t}(a) }} {value}\n"),
        };
        let sums = if self.sums { ", \"sums\": %kept" } else { "" };
        Ok(text + &format!("  return \"y\": %y{sums}\n}}\n"))
    }

    /// Runs the product on `x`, `weight`, and of the others those that are there.
    fn run(&self, rows: i64, operands: &[Option<&Tensor>], outputs: &[&Tensor]) -> Result<()> {
        let key =
            Key::new("linear").dtype(self.dtype).with(self.inner as u64).with(self.outer as u64);
        let key = key.with(self.bias.map_or(0, |b| b as u64 + 1)).with(self.residual.into());
        let key = key.with(number_of(self.formula)).with(self.sums.into());
        let inputs: Vec<&Tensor> = operands.iter().copied().flatten().collect();
        run(key, &[rows], &inputs, outputs, || self.text())
    }
}

/// `activation(x weight^T + bias) + residual` for `x [..., K]` and `weight [N, K]`.
/// With `SUMS` the sums before the activation are a second result (of no elements without an activation).
pub(crate) struct Linear<const SUMS: bool>;

impl<const SUMS: bool> Operator for Linear<SUMS> {
    const NAME: &'static str = if SUMS { "linear_with_sums" } else { "linear" };
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("weight", Arg::Tensor),
        ("bias", Arg::Optional),
        ("residual", Arg::Optional),
        ("activation", Arg::Str),
    ];
    const RETURNS: &'static str = if SUMS { "(Tensor y, Tensor sums)" } else { "Tensor" };
    const OVERLOADS: &'static [&'static str] = if SUMS { &["inference"] } else { &[] };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, weight, bias, residual, activation] = args else {
            return Err(Error::bug("arguments"));
        };
        let (x, weight) = (x.tensor()?, weight.tensor()?);
        let formula = activation.str()?;
        let (dtype, rows) = (float("x", &x)?, Rows::of("x", &x)?);
        same_device("weight", &weight, &x)?;
        let &[outer, inner] = weight.sizes() else {
            let message = format!("weight has shape {:?}; it must be [N, K]", weight.sizes());
            return Err(Error::user(message));
        };
        if inner != rows.columns || weight.dtype()? != dtype {
            let message = format!(
                "weight is {} of shape {:?}, and x {dtype} with rows of {}",
                weight.dtype()?,
                weight.sizes(),
                rows.columns
            );
            return Err(Error::user(message));
        }
        let mut sizes = x.sizes().to_vec();
        if let Some(last) = sizes.last_mut() {
            *last = outer;
        }
        let bias = bias.optional()?;
        let bias_type = bias.as_ref().map(|b| vector("bias", b, outer, &x)).transpose()?;
        let residual = residual.optional()?;
        if let Some(r) = &residual {
            same_device("residual", r, &x)?;
            if r.sizes() != sizes || r.dtype()? != dtype {
                let (given, shape) = (r.dtype()?, r.sizes());
                let message = format!(
                    "residual is {given} of shape {shape:?}; it must be {dtype} of shape {sizes:?}"
                );
                return Err(Error::user(message));
            }
        }
        let (x, weight) = (plain(x)?, plain(weight)?);
        let (bias, residual) = (bias.map(plain).transpose()?, residual.map(plain).transpose()?);
        let y = Tensor::empty(abi, &sizes, dtype, x.device())?;
        let with_sums = SUMS && !formula.is_empty();
        let kept: &[i64] = if with_sums { &sizes } else { &[0] };
        let sums = SUMS.then(|| Tensor::empty(abi, kept, dtype, x.device())).transpose()?;
        if inner == 0 {
            return Err(Error::unsupported("a product over rows of no numbers"));
        }
        if y.elements() > 0 {
            let given = residual.is_some();
            let form = Form {
                dtype,
                inner,
                outer,
                bias: bias_type,
                residual: given,
                sums: with_sums,
                formula,
            };
            let operands = [Some(&x), Some(&weight), bias.as_ref(), residual.as_ref()];
            let kept = sums.as_ref().filter(|_| with_sums);
            let outputs: Vec<&Tensor> = std::iter::once(&y).chain(kept).collect();
            form.run(rows.rows, &operands, &outputs)?;
        }
        Ok(std::iter::once(y).chain(sums).map(Value::Tensor).collect())
    }
}

/// The sums of the columns of `x [..., N]`, in the type of `like [N]`: the gradient of a bias.
pub(crate) struct ColumnSums;

/// Added up in the wide type.
fn column_sums(t: DType, columns: i64, to: DType) -> String {
    let c = wide(t);
    format!(
        "graph @column_sums(M in 1..) {{
  %x \"x\": {t}[M,{columns}] = input
  %f = map {{ a -> {c}(a) }} %x
  %s = reduce sum axes=[0] %f
  %y = map {{ a -> {to}(a) }} %s
  return \"y\": %y
}}
"
    )
}

impl Operator for ColumnSums {
    const NAME: &'static str = "column_sums";
    const ARGS: &'static [(&'static str, Arg)] = &[("x", Arg::Tensor), ("like", Arg::Tensor)];
    const RETURNS: &'static str = "Tensor";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, bias] = args else { return Err(Error::bug("arguments")) };
        let (x, bias) = (x.tensor()?, bias.tensor()?);
        let (dtype, rows) = (float("x", &x)?, Rows::of("x", &x)?);
        let to = vector("like", &bias, rows.columns, &x)?;
        let x = plain(x)?;
        let y = Tensor::empty(abi, &[rows.columns], to, x.device())?;
        if rows.rows == 0 {
            return Err(Error::unsupported("sums of no rows"));
        }
        if rows.columns > 0 {
            let key = Key::new("column_sums").dtype(dtype).dtype(to).with(rows.columns as u64);
            run(key, &[rows.rows], &[&x], &[&y], || Ok(column_sums(dtype, rows.columns, to)))?;
        }
        Ok(vec![Value::Tensor(y)])
    }
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let plain = Form {
        dtype: DType::F32,
        inner: 24,
        outer: 40,
        bias: None,
        residual: false,
        sums: false,
        formula: "",
    };
    let rich = Form {
        dtype: DType::BF16,
        bias: Some(DType::BF16),
        residual: true,
        formula: "x * sigmoid(x)",
        ..plain
    };
    let kept = Form { sums: true, ..rich };
    let forms =
        [("linear", plain), ("linear with everything", rich), ("linear with its sums", kept)];
    let mut texts =
        forms.map(|(name, form)| (name.to_string(), form.text().expect("a text"))).to_vec();
    texts.push(("linear's bias".to_string(), column_sums(DType::BF16, 40, DType::BF16)));
    texts
}
