//! RMS norm and layer norm over the last axis, with an optional addition before them, and their gradients.
//!
//! With `h = x + residual` (rounded to the type of `x`; `h = x` without a residual), and for a row of `N`:
//!
//! ```text
//! rms_norm:   r = 1 / sqrt(mean(h^2) + eps)             y = h * r * weight
//! layer_norm: r = 1 / sqrt(mean((h - m)^2) + eps)       y = (h - m) * r * weight + bias
//! ```
//!
//! `m` and `r` are results, for the gradient. Weights may have another float type than `x`.

use crate::plans::{Key, run};
use crate::tensors::{Rows, float, like, plain, same_device, vector, wide};
use tilewright_base::{DType, Error, Result};
use tilewright_torch_abi::{Abi, Arg, Operator, Tensor, Value};

/// What is taken off the row before it is scaled.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Rms,
    Layer,
}

/// The types of a call, and what is given.
#[derive(Clone, Copy)]
struct Form {
    kind: Kind,
    columns: i64,
    dtype: DType,
    weight: Option<DType>,
    bias: Option<DType>,
    residual: bool,
}

impl Form {
    fn key(&self, name: &'static str, number: f64) -> Key {
        let some = |d: Option<DType>| d.map_or(0, |d| d as u64 + 1);
        Key::new(name)
            .dtype(self.dtype)
            .with(self.columns as u64)
            .with(some(self.weight))
            .with(some(self.bias))
            .with(self.residual.into())
            .with(number.to_bits())
    }

    /// The inputs that are vectors of the row's length.
    fn vectors(&self) -> String {
        let one = |name: &str, ty: Option<DType>| {
            ty.map(|t| format!("  %{name} \"{name}\": {t}[{}] = input\n", self.columns))
        };
        [one("w", self.weight), one("b", self.bias)].into_iter().flatten().collect()
    }

    fn forward(&self, eps: f64) -> String {
        let Form { columns: n, dtype: t, .. } = *self;
        let c = wide(t);
        let mut text = format!("graph @norm(M in 1..) {{\n  %x \"x\": {t}[M,{n}] = input\n");
        if self.residual {
            text += &format!("  %r \"residual\": {t}[M,{n}] = input\n");
        }
        text += &self.vectors();
        if self.residual {
            text += &format!("  %h = map {{ a, b -> {t}({c}(a) + {c}(b)) }} %x, %r\n");
            text += &format!("  %f = map {{ a -> {c}(a) }} %h\n");
        } else {
            text += &format!("  %f = map {{ a -> {c}(a) }} %x\n");
        }
        let inverse_n = 1.0 / n as f64;
        let centred = match self.kind {
            Kind::Rms => "%f",
            Kind::Layer => {
                text += "  %sum = reduce sum axes=[1] keep %f\n";
                text += &format!("  %mean = map {{ s -> s * {inverse_n:e} }} %sum\n");
                text += "  %d = map { a, m -> a - m } %f, %mean\n";
                "%d"
            }
        };
        text += &format!("  %square = map {{ a -> a * a }} {centred}\n");
        text += "  %squares = reduce sum axes=[1] keep %square\n";
        text += &format!("  %rstd = map {{ s -> rsqrt(s * {inverse_n:e} + {eps:e}) }} %squares\n");
        let (mut names, mut operands) = ("a, r".to_string(), format!("{centred}, %rstd"));
        let mut value = "a * r".to_string();
        if self.weight.is_some() {
            names += ", w";
            operands += ", %w";
            value = format!("{value} * {c}(w)");
        }
        if self.bias.is_some() {
            names += ", b";
            operands += ", %b";
            value = format!("{value} + {c}(b)");
        }
        text += &format!("  %y = map {{ {names} -> {t}({value}) }} {operands}\n");
        text += "  return \"y\": %y";
        if self.residual {
            text += ", \"h\": %h";
        }
        if self.kind == Kind::Layer {
            text += ", \"mean\": %mean";
        }
        text + ", \"rstd\": %rstd\n}\n"
    }

    /// The gradient. `residual` says that a gradient of `h` is given, too.
    fn backward(&self) -> String {
        let Form { columns: n, dtype: t, .. } = *self;
        let c = wide(t);
        let mut text = format!(
            "graph @norm_backward(M in 1..) {{\n  %dy \"dy\": {t}[M,{n}] = input\n  %x \"x\": {t}[M,{n}] = input\n"
        );
        if self.kind == Kind::Layer {
            text += &format!("  %mean \"mean\": {c}[M,1] = input\n");
        }
        text += &format!("  %r \"rstd\": {c}[M,1] = input\n");
        if self.residual {
            text += &format!("  %dh \"dh\": {t}[M,{n}] = input\n");
        }
        text += &Form { bias: None, ..*self }.vectors();
        let inverse_n = 1.0 / n as f64;
        text += &match self.kind {
            Kind::Rms => format!("  %z = map {{ x, r -> {c}(x) * r }} %x, %r\n"),
            Kind::Layer => {
                format!("  %z = map {{ x, m, r -> ({c}(x) - m) * r }} %x, %mean, %r\n")
            }
        };
        text += &match self.weight {
            Some(_) => format!("  %g = map {{ d, w -> {c}(d) * {c}(w) }} %dy, %w\n"),
            None => format!("  %g = map {{ d -> {c}(d) }} %dy\n"),
        };
        text += "  %gz = map { g, z -> g * z } %g, %z\n";
        text += "  %s = reduce sum axes=[1] keep %gz\n";
        let (mut names, mut operands) = ("g, z, r, s".to_string(), "%g, %z, %r, %s".to_string());
        let mut value = format!("g - z * (s * {inverse_n:e})");
        if self.kind == Kind::Layer {
            text += "  %q = reduce sum axes=[1] keep %g\n";
            names += ", q";
            operands += ", %q";
            value = format!("{value} - q * {inverse_n:e}");
        }
        value = format!("r * ({value})");
        if self.residual {
            names += ", h";
            operands += ", %dh";
            value = format!("{value} + {c}(h)");
        }
        text += &format!("  %dx = map {{ {names} -> {t}({value}) }} {operands}\n");
        let mut results = "  return \"dx\": %dx".to_string();
        if let Some(w) = self.weight {
            text += &format!("  %dyz = map {{ d, z -> {c}(d) * z }} %dy, %z\n");
            text += "  %dws = reduce sum axes=[0] %dyz\n";
            text += &format!("  %dw = map {{ a -> {w}(a) }} %dws\n");
            results += ", \"dw\": %dw";
        }
        if let Some(b) = self.bias {
            text += &format!("  %dyc = map {{ d -> {c}(d) }} %dy\n");
            text += "  %dbs = reduce sum axes=[0] %dyc\n";
            text += &format!("  %db = map {{ a -> {b}(a) }} %dbs\n");
            results += ", \"db\": %db";
        }
        text + &results + "\n}\n"
    }
}

/// Where a row's statistics go: the shape of `x` with a last axis of 1.
fn statistics(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let mut sizes = x.sizes().to_vec();
    if let Some(last) = sizes.last_mut() {
        *last = 1;
    }
    Tensor::empty(x.abi(), &sizes, wide(dtype), x.device())
}

fn checked_vector(
    name: &str,
    given: Option<Tensor>,
    columns: i64,
    x: &Tensor,
) -> Result<(Option<Tensor>, Option<DType>)> {
    let Some(tensor) = given else { return Ok((None, None)) };
    let dtype = vector(name, &tensor, columns, x)?;
    Ok((Some(plain(tensor)?), Some(dtype)))
}

/// `x, residual?, weight?, bias?` and `eps` to `y, h, mean?, rstd`.
fn forward(
    abi: &'static Abi,
    kind: Kind,
    x: Tensor,
    residual: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    eps: f64,
) -> Result<Vec<Value>> {
    let (dtype, rows) = (float("x", &x)?, Rows::of("x", &x)?);
    if !(eps >= 0.0 && eps.is_finite()) {
        return Err(Error::user(format!("eps is {eps}; it must be a number of at least 0")));
    }
    let x = plain(x)?;
    let residual = match residual {
        Some(r) => {
            like("residual", &r, &x)?;
            Some(plain(r)?)
        }
        None => None,
    };
    let (weight, wt) = checked_vector("weight", weight, rows.columns, &x)?;
    let (bias, bt) = checked_vector("bias", bias, rows.columns, &x)?;
    let y = Tensor::empty(abi, x.sizes(), dtype, x.device())?;
    let h = match &residual {
        Some(_) => Some(Tensor::empty(abi, x.sizes(), dtype, x.device())?),
        None => None,
    };
    let mean = match kind {
        Kind::Rms => None,
        Kind::Layer => Some(statistics(&x, dtype)?),
    };
    let rstd = statistics(&x, dtype)?;
    let form = Form {
        kind,
        columns: rows.columns,
        dtype,
        weight: wt,
        bias: bt,
        residual: residual.is_some(),
    };
    if !rows.is_empty() {
        let inputs: Vec<&Tensor> = [Some(&x), residual.as_ref(), weight.as_ref(), bias.as_ref()]
            .into_iter()
            .flatten()
            .collect();
        let outputs: Vec<&Tensor> =
            [Some(&y), h.as_ref(), mean.as_ref(), Some(&rstd)].into_iter().flatten().collect();
        let name = if kind == Kind::Rms { "rms_norm" } else { "layer_norm" };
        run(form.key(name, eps), &[rows.rows], &inputs, &outputs, || Ok(form.forward(eps)))?;
    }
    let results = [Some(y), h, mean, Some(rstd)];
    Ok(results.into_iter().flatten().map(Value::Tensor).collect())
}

/// `dy, x, mean?, rstd, dh?, weight?` to `dx, dweight, dbias`. A gradient that nobody asks for is an empty tensor.
#[allow(clippy::too_many_arguments, reason = "the operands of the formula")]
fn backward(
    abi: &'static Abi,
    kind: Kind,
    dy: Tensor,
    x: Tensor,
    mean: Option<Tensor>,
    rstd: Tensor,
    dh: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<DType>,
) -> Result<Vec<Value>> {
    let (dtype, rows) = (float("x", &x)?, Rows::of("x", &x)?);
    like("dy", &dy, &x)?;
    let (x, dy) = (plain(x)?, plain(dy)?);
    let dh = match dh {
        Some(dh) => {
            like("dh", &dh, &x)?;
            Some(plain(dh)?)
        }
        None => None,
    };
    for (name, tensor) in [("mean", mean.as_ref()), ("rstd", Some(&rstd))] {
        let Some(tensor) = tensor else { continue };
        same_device(name, tensor, &x)?;
        if tensor.elements() != rows.rows || tensor.dtype()? != wide(dtype) {
            return Err(Error::user(format!("{name} is not what the forward pass gave")));
        }
    }
    let mean = mean.map(plain).transpose()?;
    let rstd = plain(rstd)?;
    let (weight, wt) = checked_vector("weight", weight, rows.columns, &x)?;
    let dx = Tensor::empty(abi, x.sizes(), dtype, x.device())?;
    let gradient = |ty: Option<DType>| {
        let columns = if ty.is_some() { rows.columns } else { 0 };
        Tensor::empty(abi, &[columns], ty.unwrap_or(dtype), x.device())
    };
    let (dw, db) = (gradient(wt)?, gradient(bias)?);
    let form =
        Form { kind, columns: rows.columns, dtype, weight: wt, bias, residual: dh.is_some() };
    if rows.is_empty() {
        if rows.columns > 0 && (wt.is_some() || bias.is_some()) {
            return Err(Error::unsupported("gradients of weights over no rows"));
        }
    } else {
        let inputs =
            [Some(&dy), Some(&x), mean.as_ref(), Some(&rstd), dh.as_ref(), weight.as_ref()];
        let inputs: Vec<&Tensor> = inputs.into_iter().flatten().collect();
        let outputs = [Some(&dx), wt.is_some().then_some(&dw), bias.is_some().then_some(&db)];
        let outputs: Vec<&Tensor> = outputs.into_iter().flatten().collect();
        let name = if kind == Kind::Rms { "rms_norm_backward" } else { "layer_norm_backward" };
        run(form.key(name, 0.0), &[rows.rows], &inputs, &outputs, || Ok(form.backward()))?;
    }
    let mut results = vec![Value::Tensor(dx), Value::Tensor(dw)];
    if kind == Kind::Layer {
        results.push(Value::Tensor(db));
    }
    Ok(results)
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
pub(crate) struct RmsNorm;

impl Operator for RmsNorm {
    const NAME: &'static str = "rms_norm";
    const ARGS: &'static [(&'static str, Arg)] =
        &[("x", Arg::Tensor), ("weight", Arg::Optional), ("eps", Arg::Float)];
    const RETURNS: &'static str = "(Tensor y, Tensor rstd)";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, weight, eps] = args else { return Err(Error::bug("arguments")) };
        forward(abi, Kind::Rms, x.tensor()?, None, weight.optional()?, None, eps.float()?)
    }
}

/// [`RmsNorm`] of `x + residual`, which is a result, too.
pub(crate) struct AddRmsNorm;

impl Operator for AddRmsNorm {
    const NAME: &'static str = "add_rms_norm";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("residual", Arg::Tensor),
        ("weight", Arg::Optional),
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor y, Tensor h, Tensor rstd)";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, r, weight, eps] = args else { return Err(Error::bug("arguments")) };
        let (x, r) = (x.tensor()?, Some(r.tensor()?));
        forward(abi, Kind::Rms, x, r, weight.optional()?, None, eps.float()?)
    }
}

/// The gradient of [`RmsNorm`], and with `dh` of [`AddRmsNorm`], whose `h` is `x` here.
pub(crate) struct RmsNormBackward;

impl Operator for RmsNormBackward {
    const NAME: &'static str = "rms_norm_backward";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dy", Arg::Tensor),
        ("x", Arg::Tensor),
        ("rstd", Arg::Tensor),
        ("dh", Arg::Optional),
        ("weight", Arg::Optional),
    ];
    const RETURNS: &'static str = "(Tensor dx, Tensor dweight)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, x, rstd, dh, weight] = args else { return Err(Error::bug("arguments")) };
        let (dy, x, rstd) = (dy.tensor()?, x.tensor()?, rstd.tensor()?);
        let (dh, weight) = (dh.optional()?, weight.optional()?);
        backward(abi, Kind::Rms, dy, x, None, rstd, dh, weight, None)
    }
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last axis.
pub(crate) struct LayerNorm;

impl Operator for LayerNorm {
    const NAME: &'static str = "layer_norm";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("weight", Arg::Optional),
        ("bias", Arg::Optional),
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor y, Tensor mean, Tensor rstd)";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, weight, bias, eps] = args else { return Err(Error::bug("arguments")) };
        let (weight, bias) = (weight.optional()?, bias.optional()?);
        forward(abi, Kind::Layer, x.tensor()?, None, weight, bias, eps.float()?)
    }
}

/// [`LayerNorm`] of `x + residual`, which is a result, too.
pub(crate) struct AddLayerNorm;

impl Operator for AddLayerNorm {
    const NAME: &'static str = "add_layer_norm";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("residual", Arg::Tensor),
        ("weight", Arg::Optional),
        ("bias", Arg::Optional),
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor y, Tensor h, Tensor mean, Tensor rstd)";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, r, weight, bias, eps] = args else { return Err(Error::bug("arguments")) };
        let (x, r) = (x.tensor()?, Some(r.tensor()?));
        let (weight, bias) = (weight.optional()?, bias.optional()?);
        forward(abi, Kind::Layer, x, r, weight, bias, eps.float()?)
    }
}

/// The gradient of [`LayerNorm`], and with `dh` of [`AddLayerNorm`], whose `h` is `x` here. `bias` is only looked at for its type.
pub(crate) struct LayerNormBackward;

impl Operator for LayerNormBackward {
    const NAME: &'static str = "layer_norm_backward";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dy", Arg::Tensor),
        ("x", Arg::Tensor),
        ("mean", Arg::Tensor),
        ("rstd", Arg::Tensor),
        ("dh", Arg::Optional),
        ("weight", Arg::Optional),
        ("bias", Arg::Optional),
    ];
    const RETURNS: &'static str = "(Tensor dx, Tensor dweight, Tensor dbias)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, x, mean, rstd, dh, weight, bias] = args else {
            return Err(Error::bug("arguments"));
        };
        let (dy, x, mean, rstd) = (dy.tensor()?, x.tensor()?, mean.tensor()?, rstd.tensor()?);
        let (dh, weight) = (dh.optional()?, weight.optional()?);
        let bias = bias.optional()?.map(|b| float("bias", &b)).transpose()?;
        backward(abi, Kind::Layer, dy, x, Some(mean), rstd, dh, weight, bias)
    }
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (kind, dtype) in [(Kind::Rms, DType::F32), (Kind::Layer, DType::BF16)] {
        for residual in [false, true] {
            let weight = Some(dtype);
            let bias = (kind == Kind::Layer).then_some(DType::F32);
            let form = Form { kind, columns: 48, dtype, weight, bias, residual };
            let name = format!(
                "{} of {dtype}, residual {residual}",
                if bias.is_some() { "layer" } else { "rms" }
            );
            all.push((name.clone(), form.forward(1e-5)));
            all.push((format!("{name}, backward"), form.backward()));
        }
    }
    all
}
