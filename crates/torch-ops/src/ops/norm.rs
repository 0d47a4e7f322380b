//! RMS norm and layer norm over the last axis, with an optional addition before them, and their gradients.
//!
//! With `h = x + residual` (rounded to the type of `x`; `h = x` without a residual), and for a row of `N`:
//!
//! ```text
//! rms_norm:   r = 1 / sqrt(mean(h^2) + eps)             y = h * r * weight
//! layer_norm: r = 1 / sqrt(mean((h - m)^2) + eps)       y = (h - m) * r * weight + bias
//! ```
//!
//! `m` and `r` are results, for the gradient. Weights may have another float type than `x`. Their gradients are summed in two steps,
//! in an order that depends on the number of rows alone. On a GPU, where all types are one, the gradient is a kernel of the library that
//! reads the rows once and works `m` and `r` out again.

use crate::plans::{Key, norm_backward, run};
use crate::tensors::{Rows, float, like, plain, same_device, vector, wide};
use tilewright_base::{DType, Error, Result};
use tilewright_runtime_gpu::{NormGradient, NormGradientPlaces};
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

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
    /// `m` and `r` are results.
    statistics: bool,
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
            .with(self.statistics.into())
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
        if self.statistics && self.kind == Kind::Layer {
            text += ", \"mean\": %mean";
        }
        if self.statistics {
            text += ", \"rstd\": %rstd";
        }
        text + "\n}\n"
    }

    /// `%z`, the row before its weight.
    fn normalised(&self) -> String {
        let c = wide(self.dtype);
        match self.kind {
            Kind::Rms => format!("  %z = map {{ x, r -> {c}(x) * r }} %x, %r\n"),
            Kind::Layer => {
                format!("  %z = map {{ x, m, r -> ({c}(x) - m) * r }} %x, %mean, %r\n")
            }
        }
    }

    /// The inputs of a gradient, with these leading axes.
    fn given(&self, lead: &str) -> String {
        let Form { columns: n, dtype: t, .. } = *self;
        let c = wide(t);
        let mut text =
            format!("  %dy \"dy\": {t}[{lead},{n}] = input\n  %x \"x\": {t}[{lead},{n}] = input\n");
        if self.kind == Kind::Layer {
            text += &format!("  %mean \"mean\": {c}[{lead},1] = input\n");
        }
        text + &format!("  %r \"rstd\": {c}[{lead},1] = input\n")
    }

    /// The gradient of `x`. `residual` says that a gradient of `h` is given, too.
    fn backward(&self) -> String {
        let Form { columns: n, dtype: t, .. } = *self;
        let c = wide(t);
        let mut text = format!("graph @norm_backward(M in 1..) {{\n{}", self.given("M"));
        if self.residual {
            text += &format!("  %dh \"dh\": {t}[M,{n}] = input\n");
        }
        text += &Form { bias: None, ..*self }.vectors();
        text += &self.normalised();
        let inverse_n = 1.0 / n as f64;
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
        text + "  return \"dx\": %dx\n}\n"
    }

    /// Sums for the gradients of weight and bias, over `Q` rows each: `P` parts of them.
    fn parts(&self) -> String {
        let c = wide(self.dtype);
        let mut text = format!("graph @parts(P in 1.., Q in 1..) {{\n{}", self.given("P,Q"));
        let mut results = Vec::new();
        if self.weight.is_some() {
            text += &self.normalised();
            text += &format!("  %dyz = map {{ d, z -> {c}(d) * z }} %dy, %z\n");
            text += "  %dw = reduce sum axes=[1] %dyz\n";
            results.push("\"dw\": %dw");
        }
        if self.bias.is_some() {
            text += &format!("  %dyc = map {{ d -> {c}(d) }} %dy\n");
            text += "  %db = reduce sum axes=[1] %dyc\n";
            results.push("\"db\": %db");
        }
        text + &format!("  return {}\n}}\n", results.join(", "))
    }
}

/// The sum of `P` parts, rounded to the vector's type.
fn whole(c: DType, to: DType, n: i64) -> String {
    format!(
        "graph @whole(P in 1..) {{
  %a \"a\": {c}[P,{n}] = input
  %s = reduce sum axes=[0] %a
  %y = map {{ a -> {to}(a) }} %s
  return \"y\": %y
}}
"
    )
}

/// Rows to be summed in one part: about as many rows as parts, so that both sums are short and there is work for all.
fn rows_of_a_part(rows: i64) -> i64 {
    let root = (rows as f64).sqrt() as i64;
    (1..=root.max(1)).rev().find(|q| rows % q == 0).unwrap_or(1)
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

/// `x, residual?, weight?, bias?` and `eps` to `y, h?`, and with `statistics` also `mean?, rstd`.
#[allow(clippy::too_many_arguments, reason = "the operands of the formula")]
fn forward(
    abi: &'static Abi,
    kind: Kind,
    with_statistics: bool,
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
    let some = |wanted: bool| wanted.then(|| statistics(&x, dtype)).transpose();
    let mean = some(with_statistics && kind == Kind::Layer)?;
    let rstd = some(with_statistics)?;
    let form = Form {
        kind,
        columns: rows.columns,
        dtype,
        weight: wt,
        bias: bt,
        residual: residual.is_some(),
        statistics: with_statistics,
    };
    if !rows.is_empty() {
        let inputs: Vec<&Tensor> = [Some(&x), residual.as_ref(), weight.as_ref(), bias.as_ref()]
            .into_iter()
            .flatten()
            .collect();
        let outputs: Vec<&Tensor> =
            [Some(&y), h.as_ref(), mean.as_ref(), rstd.as_ref()].into_iter().flatten().collect();
        let name = if kind == Kind::Rms { "rms_norm" } else { "layer_norm" };
        run(form.key(name, eps), &[rows.rows], &inputs, &outputs, || Ok(form.forward(eps)))?;
    }
    let results = [Some(y), h, mean, rstd];
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
    eps: f64,
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
    let form = Form {
        kind,
        columns: rows.columns,
        dtype,
        weight: wt,
        bias,
        residual: dh.is_some(),
        statistics: true,
    };
    let vectors = [Some(&dw), (kind == Kind::Layer).then_some(&db)];
    let tensors = [Some(&x), Some(&dy), weight.as_ref(), dh.as_ref(), Some(&dx)];
    if rows.is_empty() {
        dw.zero()?;
        db.zero()?;
    } else if crate::triton::entered() || !in_one_pass(&form, eps, rows, tensors, vectors)? {
        let shared = [Some(&dy), Some(&x), mean.as_ref(), Some(&rstd)];
        let shared: Vec<&Tensor> = shared.into_iter().flatten().collect();
        let mut inputs = shared.clone();
        inputs.extend([dh.as_ref(), weight.as_ref()].into_iter().flatten());
        let name = if kind == Kind::Rms { "rms_norm_backward" } else { "layer_norm_backward" };
        run(form.key(name, 0.0), &[rows.rows], &inputs, &[&dx], || Ok(form.backward()))?;
        let wanted: Vec<(DType, &Tensor)> =
            [wt.map(|t| (t, &dw)), bias.map(|t| (t, &db))].into_iter().flatten().collect();
        if !wanted.is_empty() {
            let of_a_part = rows_of_a_part(rows.rows);
            let parts = rows.rows / of_a_part;
            let c = wide(dtype);
            let sums = wanted
                .iter()
                .map(|_| Tensor::empty(abi, &[parts, rows.columns], c, x.device()))
                .collect::<Result<Vec<_>>>()?;
            let form = Form { residual: false, ..form };
            let name = if kind == Kind::Rms { "rms_norm_parts" } else { "layer_norm_parts" };
            let outputs: Vec<&Tensor> = sums.iter().collect();
            let sizes = [parts, of_a_part];
            run(form.key(name, 0.0), &sizes, &shared, &outputs, || Ok(form.parts()))?;
            for (sum, (to, gradient)) in sums.iter().zip(&wanted) {
                let key = Key::new("sum_of_parts").dtype(c).dtype(*to).with(rows.columns as u64);
                run(key, &[parts], &[sum], &[gradient], || Ok(whole(c, *to, rows.columns)))?;
            }
        }
    }
    let mut results = vec![Value::Tensor(dx), Value::Tensor(dw)];
    if kind == Kind::Layer {
        results.push(Value::Tensor(db));
    }
    Ok(results)
}

/// The gradient on a GPU by the kernel that reads each row once, if this call has what that takes: whether it was.
fn in_one_pass(
    form: &Form,
    eps: f64,
    rows: Rows,
    [x, dy, weight, dh, dx]: [Option<&Tensor>; 5],
    [dw, db]: [Option<&Tensor>; 2],
) -> Result<bool> {
    let centred = form.kind == Kind::Layer;
    let (Some(x), Some(dy), Some(weight), Some(dx), Some(dw)) = (x, dy, weight, dx, dw) else {
        return Ok(false);
    };
    let Device::Cuda(index) = x.device() else { return Ok(false) };
    let one_type = form.weight == Some(form.dtype)
        && (!centred || form.bias == Some(form.dtype))
        && form.dtype != DType::F64;
    if !one_type || eps < 0.0 {
        return Ok(false);
    }
    let what = NormGradient {
        centred,
        eps,
        dtype: form.dtype,
        added: dh.is_some(),
        rows: rows.rows,
        columns: rows.columns,
    };
    let at = |t: Option<&Tensor>| t.map_or(Ok(0), Tensor::address);
    let places = NormGradientPlaces {
        x: x.address()?,
        dy: dy.address()?,
        scale: weight.address()?,
        other: at(dh)?,
        dx: dx.address()?,
        vectors: [dw.address()?, at(db)?],
        scratch: 0,
    };
    let name = if centred { "layer_norm_gradient" } else { "rms_norm_gradient" };
    norm_backward(x.abi(), index, form.key(name, eps), what, places)
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
/// Without the statistics it is the overload `inference`.
pub(crate) struct RmsNorm<const STATISTICS: bool>;

impl<const STATISTICS: bool> Operator for RmsNorm<STATISTICS> {
    const NAME: &'static str = if STATISTICS { "rms_norm" } else { "rms_norm.inference" };
    const OVERLOADS: &'static [&'static str] = if STATISTICS { &["raw"] } else { &[] };
    const ARGS: &'static [(&'static str, Arg)] =
        &[("x", Arg::Tensor), ("weight", Arg::Optional), ("eps", Arg::Float)];
    const RETURNS: &'static str = if STATISTICS { "(Tensor y, Tensor rstd)" } else { "Tensor" };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, weight, eps] = args else { return Err(Error::bug("arguments")) };
        forward(
            abi,
            Kind::Rms,
            STATISTICS,
            x.tensor()?,
            None,
            weight.optional()?,
            None,
            eps.float()?,
        )
    }
}

/// [`RmsNorm`] of `x + residual`, which is a result, too.
/// Without the statistics it is the overload `inference`.
pub(crate) struct AddRmsNorm<const STATISTICS: bool>;

impl<const STATISTICS: bool> Operator for AddRmsNorm<STATISTICS> {
    const NAME: &'static str = if STATISTICS { "add_rms_norm" } else { "add_rms_norm.inference" };
    const OVERLOADS: &'static [&'static str] = if STATISTICS { &["raw"] } else { &[] };
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("residual", Arg::Tensor),
        ("weight", Arg::Optional),
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str =
        if STATISTICS { "(Tensor y, Tensor h, Tensor rstd)" } else { "(Tensor y, Tensor h)" };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, r, weight, eps] = args else { return Err(Error::bug("arguments")) };
        let (x, r) = (x.tensor()?, Some(r.tensor()?));
        forward(abi, Kind::Rms, STATISTICS, x, r, weight.optional()?, None, eps.float()?)
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
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor dx, Tensor dweight)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, x, rstd, dh, weight, eps] = args else { return Err(Error::bug("arguments")) };
        let eps = eps.float()?;
        let (dy, x, rstd) = (dy.tensor()?, x.tensor()?, rstd.tensor()?);
        let (dh, weight) = (dh.optional()?, weight.optional()?);
        backward(abi, Kind::Rms, dy, x, None, rstd, dh, weight, None, eps)
    }
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last axis.
/// Without the statistics it is the overload `inference`.
pub(crate) struct LayerNorm<const STATISTICS: bool>;

impl<const STATISTICS: bool> Operator for LayerNorm<STATISTICS> {
    const NAME: &'static str = if STATISTICS { "layer_norm" } else { "layer_norm.inference" };
    const OVERLOADS: &'static [&'static str] = if STATISTICS { &["raw"] } else { &[] };
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("weight", Arg::Optional),
        ("bias", Arg::Optional),
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str =
        if STATISTICS { "(Tensor y, Tensor mean, Tensor rstd)" } else { "Tensor" };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, weight, bias, eps] = args else { return Err(Error::bug("arguments")) };
        let (weight, bias) = (weight.optional()?, bias.optional()?);
        forward(abi, Kind::Layer, STATISTICS, x.tensor()?, None, weight, bias, eps.float()?)
    }
}

/// [`LayerNorm`] of `x + residual`, which is a result, too.
/// Without the statistics it is the overload `inference`.
pub(crate) struct AddLayerNorm<const STATISTICS: bool>;

impl<const STATISTICS: bool> Operator for AddLayerNorm<STATISTICS> {
    const NAME: &'static str =
        if STATISTICS { "add_layer_norm" } else { "add_layer_norm.inference" };
    const OVERLOADS: &'static [&'static str] = if STATISTICS { &["raw"] } else { &[] };
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("residual", Arg::Tensor),
        ("weight", Arg::Optional),
        ("bias", Arg::Optional),
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str = if STATISTICS {
        "(Tensor y, Tensor h, Tensor mean, Tensor rstd)"
    } else {
        "(Tensor y, Tensor h)"
    };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, r, weight, bias, eps] = args else { return Err(Error::bug("arguments")) };
        let (x, r) = (x.tensor()?, Some(r.tensor()?));
        let (weight, bias) = (weight.optional()?, bias.optional()?);
        forward(abi, Kind::Layer, STATISTICS, x, r, weight, bias, eps.float()?)
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
        ("eps", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor dx, Tensor dweight, Tensor dbias)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, x, mean, rstd, dh, weight, bias, eps] = args else {
            return Err(Error::bug("arguments"));
        };
        let eps = eps.float()?;
        let (dy, x, mean, rstd) = (dy.tensor()?, x.tensor()?, mean.tensor()?, rstd.tensor()?);
        let (dh, weight) = (dh.optional()?, weight.optional()?);
        let bias = bias.optional()?.map(|b| float("bias", &b)).transpose()?;
        backward(abi, Kind::Layer, dy, x, Some(mean), rstd, dh, weight, bias, eps)
    }
}

#[cfg(test)]
#[test]
fn parts_have_about_as_many_rows_as_there_are_parts() {
    let cases = [(16384, 128), (1, 1), (7, 1), (1000, 25), (4096 * 3, 96)];
    assert!(cases.iter().all(|&(rows, q)| rows_of_a_part(rows) == q && rows % q == 0));
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let mut all = vec![("a sum of parts".to_string(), whole(DType::F32, DType::BF16, 48))];
    for (kind, dtype) in [(Kind::Rms, DType::F32), (Kind::Layer, DType::BF16)] {
        for residual in [false, true] {
            let weight = Some(dtype);
            let bias = (kind == Kind::Layer).then_some(DType::F32);
            let form = Form { kind, columns: 48, dtype, weight, bias, residual, statistics: true };
            let name = format!(
                "{} of {dtype}, residual {residual}",
                if bias.is_some() { "layer" } else { "rms" }
            );
            all.push((name.clone(), form.forward(1e-5)));
            all.push((format!("{name}, backward"), form.backward()));
            all.push((format!("{name}, parts"), form.parts()));
        }
    }
    all
}
