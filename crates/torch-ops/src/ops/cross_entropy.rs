//! Cross-entropy of rows of logits, with label smoothing, z-loss and a soft cap, and its gradient.
//!
//! With `v = cap * tanh(x / cap)` (`v = x` without a cap), `l = log(sum(exp(v)))` and a target `t`, the loss of a row is
//!
//! ```text
//! l - (1 - smoothing) * v[t] - smoothing * mean(v) + z * l^2
//! ```
//!
//! and 0 where the target is `ignored`. `l` is a result, for the gradient. Targets must lie inside the row or be ignored, which the
//! Python half checks on the CPU; on a GPU (kernels raise no errors) others count as ignored, or as a target whose logit is 0.
//!
//! On a GPU losses, alone or with their gradient, are the library's kernel where the ignored index is no column.

use crate::plans::{Key, losses, run};
use crate::tensors::{Rows, float, plain, same_device, wide};
use tilewright_base::{DType, Error, Result};
use tilewright_runtime_gpu::{CrossEntropyTerms, LossesOf, LossesPlaces};
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// The numbers of a call.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) dtype: DType,
    pub(super) columns: i64,
    pub(super) ignored: i64,
    smoothing: f64,
    z: f64,
    cap: f64,
}

impl Form {
    fn key(&self, name: &'static str) -> Key {
        Key::new(name)
            .dtype(self.dtype)
            .with(self.columns as u64)
            .with(self.ignored.cast_unsigned())
            .with(self.smoothing.to_bits())
            .with(self.z.to_bits())
            .with(self.cap.to_bits())
    }

    /// From the logits to `%v`, with the positions `%at` in 32 bits: wider numbers make narrower vectors.
    fn head(&self) -> String {
        let Form { dtype: t, columns: n, cap, .. } = *self;
        let c = wide(t);
        let value = match cap > 0.0 {
            true => format!("tanh({c}(a) * {:e}) * {cap:e}", 1.0 / cap),
            false => format!("{c}(a)"),
        };
        format!(
            "  %x \"x\": {t}[M,{n}] = input
  %t \"targets\": i64[M,1] = input
  %v = map {{ a -> {value} }} %x
  %at: i32[1,{n}] = iota axis=1
"
        )
    }

    /// Whether the library's kernel computes this: it ignores what is outside of the row.
    fn in_library(&self) -> bool {
        !(0..self.columns).contains(&self.ignored)
    }

    /// The losses of rows, and beside them in `other` the gradient where `factors` are given, else the logarithms of the sums.
    pub(super) fn losses(
        &self,
        abi: &'static Abi,
        rows: &Rows,
        [x, targets, loss, other]: [&Tensor; 4],
        factors: Option<&Tensor>,
    ) -> Result<()> {
        if rows.is_empty() || self.by_library(abi, rows, [x, targets, loss, other], factors)? {
            return Ok(());
        }
        let (sizes, outputs) = ([rows.rows], [loss, other]);
        match factors {
            Some(factors) => {
                let (key, inputs) = (self.key("cross_entropy_both"), [x, targets, factors]);
                run(key, &sizes, &inputs, &outputs, || Ok(self.both()))
            }
            None => {
                let (key, inputs) = (self.key("cross_entropy"), [x, targets]);
                run(key, &sizes, &inputs, &outputs, || Ok(self.forward()))
            }
        }
    }

    /// The losses by the library's kernel, with the gradient where `factors` are given: whether there is one.
    fn by_library(
        &self,
        abi: &'static Abi,
        rows: &Rows,
        [x, targets, loss, other]: [&Tensor; 4],
        factors: Option<&Tensor>,
    ) -> Result<bool> {
        let Device::Cuda(index) = x.device() else { return Ok(false) };
        if !self.in_library() {
            return Ok(false);
        }
        let gradient = factors.is_some();
        let (dtype, columns) = (self.dtype, self.columns);
        let terms = CrossEntropyTerms { smoothing: self.smoothing, z: self.z, cap: self.cap };
        let what = LossesOf { dtype, rows: rows.rows, columns, gradient, terms };
        let places = LossesPlaces {
            x: x.address()?,
            targets: targets.address()?,
            factors: factors.map_or(Ok(0), Tensor::address)?,
            losses: loss.address()?,
            other: other.address()?,
        };
        let name = if gradient { "losses and gradient" } else { "losses" };
        losses(abi, index, self.key(name), what, places)
    }

    fn forward(&self) -> String {
        let text = format!("graph @cross_entropy(M in 1..) {{\n{}", self.head());
        text + &self.loss() + "  return \"loss\": %loss, \"l\": %l\n}\n"
    }

    /// From `%v` to `%l` and `%loss`.
    fn loss(&self) -> String {
        let Form { dtype: t, columns: n, ignored, smoothing, z, .. } = *self;
        let c = wide(t);
        let mut text = format!(
            "  %m = reduce max axes=[1] keep %v
  %e = map {{ a, m -> exp(a - m) }} %v, %m
  %s = reduce sum axes=[1] keep %e
  %l = map {{ s, m -> log(s) + m }} %s, %m
  %p = map {{ a, i, t -> i == i32(t) ? a : {c}(0.0) }} %v, %at, %t
  %picked = reduce sum axes=[1] keep %p
"
        );
        let keep = 1.0 - smoothing;
        let (mut names, mut operands) = ("l, p, t".to_string(), "%l, %picked, %t".to_string());
        let mut loss = format!("l - p * {keep:e}");
        if smoothing > 0.0 {
            text += "  %sum = reduce sum axes=[1] keep %v\n";
            names += ", s";
            operands += ", %sum";
            loss += &format!(" - s * {:e}", smoothing / n as f64);
        }
        if z > 0.0 {
            loss += &format!(" + l * l * {z:e}");
        }
        text += &format!(
            "  %loss = map {{ {names} -> t == {ignored} ? {c}(0.0) : {loss} }} {operands}\n"
        );
        text
    }

    fn backward(&self) -> String {
        let c = wide(self.dtype);
        let mut text = format!("graph @cross_entropy_backward(M in 1..) {{\n{}", self.head());
        text += &format!("  %l \"l\": {c}[M,1] = input\n  %d \"dloss\": {c}[M,1] = input\n");
        text + &self.gradient() + "  return \"dx\": %dx\n}\n"
    }

    /// Loss and gradient of the same logits, for a gradient of the loss that is known before.
    fn both(&self) -> String {
        let c = wide(self.dtype);
        let mut text = format!("graph @cross_entropy_both(M in 1..) {{\n{}", self.head());
        text += &format!("  %d \"dloss\": {c}[M,1] = input\n");
        text + &self.loss() + &self.gradient() + "  return \"loss\": %loss, \"dx\": %dx\n}\n"
    }

    /// From `%v`, `%l` and `%d` to `%dx`.
    fn gradient(&self) -> String {
        let Form { dtype: t, columns: n, ignored, smoothing, z, cap } = *self;
        let c = wide(t);
        let slope = if z > 0.0 { format!(" * (1.0 + l * {:e})", 2.0 * z) } else { String::new() };
        let rest = if smoothing > 0.0 {
            format!(" - {c}({:e})", smoothing / n as f64)
        } else {
            String::new()
        };
        // The derivative of the soft cap is 1 - (v / cap)^2.
        let outer = match cap > 0.0 {
            true => format!(" * (1.0 - a * a * {:e})", 1.0 / (cap * cap)),
            false => String::new(),
        };
        let keep = 1.0 - smoothing;
        format!(
            "  %dx = map {{ a, i, t, l, d -> {t}(t == {ignored} ? {c}(0.0) : (exp(a - l){slope} - (i == i32(t) ? {c}({keep:e}) : {c}(0.0)){rest}) * d{outer}) }} %v, %at, %t, %l, %d
"
        )
    }
}

/// Checked logits and targets, and the numbers.
pub(super) fn checked(
    x: Tensor,
    targets: Tensor,
    ignored: i64,
    numbers: [f64; 3],
) -> Result<(Tensor, Tensor, Form, Rows)> {
    let (dtype, rows) = (float("x", &x)?, Rows::of("x", &x)?);
    let [smoothing, z, cap] = numbers;
    if !(0.0..=1.0).contains(&smoothing) {
        return Err(Error::user(format!("label_smoothing is {smoothing}; it must be in 0..=1")));
    }
    for (name, number) in [("z_loss", z), ("softcap", cap)] {
        if !(number >= 0.0 && number.is_finite()) {
            let message = format!("{name} is {number}; it must be a number of at least 0");
            return Err(Error::user(message));
        }
    }
    same_device("targets", &targets, &x)?;
    let lead = x.sizes().split_last().map_or(&[][..], |(_, lead)| lead);
    if targets.sizes() != lead || targets.dtype()? != DType::I64 {
        let message = format!(
            "targets are {} of shape {:?}; they must be int64 of shape {lead:?}",
            targets.dtype()?,
            targets.sizes()
        );
        return Err(Error::user(message));
    }
    let form = Form { dtype, columns: rows.columns, ignored, smoothing, z, cap };
    Ok((plain(x)?, plain(targets)?, form, rows))
}

/// The loss of each row, and the logarithm of its sum.
pub(crate) struct CrossEntropy;

impl Operator for CrossEntropy {
    const NAME: &'static str = "cross_entropy";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("targets", Arg::Tensor),
        ("ignore_index", Arg::Int),
        ("label_smoothing", Arg::Float),
        ("z_loss", Arg::Float),
        ("softcap", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor loss, Tensor lse)";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, targets, ignored, smoothing, z, cap] = args else {
            return Err(Error::bug("arguments"));
        };
        let numbers = [smoothing.float()?, z.float()?, cap.float()?];
        let (x, targets, form, rows) =
            checked(x.tensor()?, targets.tensor()?, ignored.int()?, numbers)?;
        let make = || Tensor::empty(abi, targets.sizes(), wide(form.dtype), x.device());
        let (loss, l) = (make()?, make()?);
        if rows.columns == 0 {
            return Err(Error::user("x has rows of no logits"));
        }
        form.losses(abi, &rows, [&x, &targets, &loss, &l], None)?;
        Ok(vec![Value::Tensor(loss), Value::Tensor(l)])
    }
}

/// The gradient of [`CrossEntropy`].
pub(crate) struct CrossEntropyBackward;

impl Operator for CrossEntropyBackward {
    const NAME: &'static str = "cross_entropy_backward";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dloss", Arg::Tensor),
        ("x", Arg::Tensor),
        ("targets", Arg::Tensor),
        ("lse", Arg::Tensor),
        ("ignore_index", Arg::Int),
        ("label_smoothing", Arg::Float),
        ("z_loss", Arg::Float),
        ("softcap", Arg::Float),
    ];
    const RETURNS: &'static str = "Tensor";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dloss, x, targets, l, ignored, smoothing, z, cap] = args else {
            return Err(Error::bug("arguments"));
        };
        let numbers = [smoothing.float()?, z.float()?, cap.float()?];
        let (dloss, l) = (dloss.tensor()?, l.tensor()?);
        let (x, targets, form, rows) =
            checked(x.tensor()?, targets.tensor()?, ignored.int()?, numbers)?;
        for (name, tensor) in [("dloss", &dloss), ("lse", &l)] {
            same_device(name, tensor, &x)?;
            if tensor.sizes() != targets.sizes() || tensor.dtype()? != wide(form.dtype) {
                return Err(Error::user(format!("{name} is not what the forward pass gave")));
            }
        }
        let (dloss, l) = (plain(dloss)?, plain(l)?);
        let dx = Tensor::empty(abi, x.sizes(), form.dtype, x.device())?;
        if !rows.is_empty() {
            let inputs = [&x, &targets, &l, &dloss];
            let key = form.key("cross_entropy_backward");
            run(key, &[rows.rows], &inputs, &[&dx], || Ok(form.backward()))?;
        }
        Ok(vec![Value::Tensor(dx)])
    }
}

/// [`CrossEntropy`] and its gradient in one pass, for a gradient of the loss that is known before the loss is.
pub(crate) struct CrossEntropyBoth;

impl Operator for CrossEntropyBoth {
    const NAME: &'static str = "cross_entropy_both";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dloss", Arg::Tensor),
        ("x", Arg::Tensor),
        ("targets", Arg::Tensor),
        ("ignore_index", Arg::Int),
        ("label_smoothing", Arg::Float),
        ("z_loss", Arg::Float),
        ("softcap", Arg::Float),
    ];
    const RETURNS: &'static str = "(Tensor loss, Tensor dx)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dloss, x, targets, ignored, smoothing, z, cap] = args else {
            return Err(Error::bug("arguments"));
        };
        let numbers = [smoothing.float()?, z.float()?, cap.float()?];
        let dloss = dloss.tensor()?;
        let (x, targets, form, rows) =
            checked(x.tensor()?, targets.tensor()?, ignored.int()?, numbers)?;
        same_device("dloss", &dloss, &x)?;
        if dloss.sizes() != targets.sizes() || dloss.dtype()? != wide(form.dtype) {
            return Err(Error::user("dloss does not lie as the loss will"));
        }
        let dloss = plain(dloss)?;
        if rows.columns == 0 {
            return Err(Error::user("x has rows of no logits"));
        }
        let loss = Tensor::empty(abi, targets.sizes(), wide(form.dtype), x.device())?;
        let dx = Tensor::empty(abi, x.sizes(), form.dtype, x.device())?;
        form.losses(abi, &rows, [&x, &targets, &loss, &dx], Some(&dloss))?;
        Ok(vec![Value::Tensor(loss), Value::Tensor(dx)])
    }
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let plain =
        Form { dtype: DType::F32, columns: 40, ignored: -100, smoothing: 0.0, z: 0.0, cap: 0.0 };
    let rich = Form { dtype: DType::BF16, ignored: 1, smoothing: 0.1, z: 1e-3, cap: 30.0, ..plain };
    let texts =
        [("cross-entropy", plain), ("cross-entropy with everything", rich)].map(|(name, form)| {
            [
                (name.to_string(), form.forward()),
                (format!("{name}, backward"), form.backward()),
                (format!("{name}, both"), form.both()),
            ]
        });
    texts.concat()
}
