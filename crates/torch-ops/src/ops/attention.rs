//! Attention: `softmax(q k^T * scale + mask) v`, without storing the scores, and the part of its gradient that is along rows of scores.
//! A row that sees nothing is 0, as PyTorch's.

use crate::plans::{Key, run};
use crate::tensors::{Rows, float, like, plain, same_device, wide};
use tilewright_base::{DType, Error, Result};
use tilewright_torch_abi::{Abi, Arg, Operator, Tensor, Value};

struct Form {
    dtype: DType,
    /// Query heads and key heads.
    heads: [i64; 2],
    /// Of queries and keys, and of values.
    depths: [i64; 2],
    scale: f64,
    causal: bool,
    /// The mask's type, and whether batches and heads have one of their own.
    mask: Option<(DType, bool, bool)>,
}

impl Form {
    fn text(&self) -> String {
        let Form { dtype: t, heads: [h, g], depths: [d, e], scale, causal, mask } = *self;
        let c = wide(t);
        let mut text = format!(
            "graph @attention(B in 1.., S in 1.., T in 1..) {{
  %q \"q\": {t}[B,{h},S,{d}] = input
  %k \"k\": {t}[B,{g},T,{d}] = input
  %v \"v\": {t}[B,{g},T,{e}] = input
"
        );
        let causal = if causal { " causal" } else { "" };
        match mask {
            Some((m, batches, each_head)) => {
                let b = if batches { "B".to_string() } else { "1".to_string() };
                let n = if each_head { h } else { 1 };
                text += &format!("  %m \"mask\": {m}[{b},{n},S,T] = input\n");
                let (mask, score) = match m {
                    DType::Bool => ("%m", format!("where(m, s * {scale:e}, {c}(-inf))")),
                    _ => ("%w", format!("s * {scale:e} + m")),
                };
                if m != DType::Bool {
                    text += &format!("  %w = map {{ m -> {c}(m) }} %m\n");
                }
                text += &format!(
                    "  %y = attention score={c} {{ s, m -> {score} }}{causal} zeros %q, %k, %v, {mask}\n"
                );
            }
            None => {
                text += &format!(
                    "  %y = attention score={c} {{ s -> s * {scale:e} }}{causal} zeros %q, %k, %v\n"
                );
            }
        }
        text + "  return \"y\": %y\n}\n"
    }
}

/// Attention of `q [B, H, S, D]`, `k [B, G, T, D]` and `v [B, G, T, E]`, `H` a multiple of `G`.
pub(crate) struct Attention;

impl Operator for Attention {
    const NAME: &'static str = "attention";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("q", Arg::Tensor),
        ("k", Arg::Tensor),
        ("v", Arg::Tensor),
        ("mask", Arg::Optional),
        ("scale", Arg::Float),
        ("causal", Arg::Bool),
    ];
    const RETURNS: &'static str = "Tensor";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [q, k, v, mask, scale, causal] = args else { return Err(Error::bug("arguments")) };
        let (q, k, v, mask) = (q.tensor()?, k.tensor()?, v.tensor()?, mask.optional()?);
        let (scale, causal) = (scale.float()?, causal.bool()?);
        let dtype = float("q", &q)?;
        let (&[b, h, s, d], &[kb, g, t, kd], &[vb, vg, vt, e]) = (q.sizes(), k.sizes(), v.sizes())
        else {
            return Err(Error::user("q, k and v must have the axes [batch, heads, length, depth]"));
        };
        let fits = kb == b && vb == b && vg == g && kd == d && vt == t && g > 0 && h % g == 0;
        if !fits {
            let message = format!(
                "q, k and v have shapes {:?}, {:?} and {:?}, which do not go together",
                q.sizes(),
                k.sizes(),
                v.sizes()
            );
            return Err(Error::user(message));
        }
        for (name, tensor) in [("k", &k), ("v", &v)] {
            same_device(name, tensor, &q)?;
            if tensor.dtype()? != dtype {
                return Err(Error::user(format!("{name} is {}, and q {dtype}", tensor.dtype()?)));
            }
        }
        if !scale.is_finite() {
            return Err(Error::user(format!("scale is {scale}")));
        }
        let mut form = None;
        if let Some(m) = &mask {
            same_device("mask", m, &q)?;
            let wanted = matches!(*m.sizes(), [mb, mh, ms, mt] if (mb == 1 || mb == b) && (mh == 1 || mh == h) && ms == s && mt == t);
            if !wanted {
                let message = format!(
                    "mask has shape {:?}; it must be [{b} or 1, {h} or 1, {s}, {t}]",
                    m.sizes()
                );
                return Err(Error::user(message));
            }
            let dtype = if m.dtype()? == DType::Bool { DType::Bool } else { float("mask", m)? };
            form = Some((dtype, m.sizes()[0] != 1 || b == 1, m.sizes()[1] != 1));
        }
        if t == 0 || d == 0 {
            let what =
                if t == 0 { "attention to no keys" } else { "queries and keys of no numbers" };
            return Err(Error::unsupported(what));
        }
        let (q, k, v) = (plain(q)?, plain(k)?, plain(v)?);
        let mask = mask.map(plain).transpose()?;
        let y = Tensor::empty(abi, &[b, h, s, e], dtype, q.device())?;
        if y.elements() > 0 {
            let form = Form { dtype, heads: [h, g], depths: [d, e], scale, causal, mask: form };
            let mask_word = form.mask.map_or(0, |(m, batches, each_head)| {
                1 + u64::from(batches) + 2 * u64::from(each_head) + 4 * (m as u64)
            });
            let key = Key::new("attention").dtype(dtype);
            let key = [h, g, d, e].into_iter().fold(key, |key, n| key.with(n as u64));
            let key = key.with(scale.to_bits()).with(causal.into()).with(mask_word);
            let inputs = [Some(&q), Some(&k), Some(&v), mask.as_ref()];
            let inputs: Vec<&Tensor> = inputs.into_iter().flatten().collect();
            run(key, &[b, s, t], &inputs, &[&y], || Ok(form.text()))?;
        }
        Ok(vec![Value::Tensor(y)])
    }
}

/// From rows of scores `s` and of the gradient `dp` of their softmax: `p = softmax(s * before)` and `ds = p (dp - sum(p dp)) after`; both
/// are 0 where all scores are minus infinity.
fn rows_text(t: DType, before: f64, after: f64) -> String {
    let c = wide(t);
    format!(
        "graph @attention_rows(M in 1.., N in 1..) {{
  %s \"s\": {t}[M,N] = input
  %dp \"dp\": {t}[M,N] = input
  %f = map {{ a -> {c}(a) * {before:e} }} %s
  %m = reduce max axes=[1] keep %f
  %e = map {{ a, m -> where(m == {c}(-inf), {c}(0), exp(a - m)) }} %f, %m
  %z = reduce sum axes=[1] keep %e
  %i = map {{ z -> where(z == {c}(0), {c}(0), 1.0 / z) }} %z
  %w = map {{ e, i -> e * i }} %e, %i
  %wd = map {{ w, d -> w * {c}(d) }} %w, %dp
  %q = reduce sum axes=[1] keep %wd
  %p = map {{ w -> {t}(w) }} %w
  %ds = map {{ w, d, q -> {t}(w * ({c}(d) - q) * {after:e}) }} %w, %dp, %q
  return \"p\": %p, \"ds\": %ds
}}
"
    )
}

/// Probabilities and the gradient of the scores of some queries, from their scores and the gradient of the probabilities.
pub(crate) struct AttentionRows;

impl Operator for AttentionRows {
    const NAME: &'static str = "attention_rows";
    const ARGS: &'static [(&'static str, Arg)] =
        &[("s", Arg::Tensor), ("dp", Arg::Tensor), ("before", Arg::Float), ("after", Arg::Float)];
    const RETURNS: &'static str = "(Tensor p, Tensor ds)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [s, dp, before, after] = args else { return Err(Error::bug("arguments")) };
        let (s, dp, before, after) = (s.tensor()?, dp.tensor()?, before.float()?, after.float()?);
        let (dtype, rows) = (float("s", &s)?, Rows::of("s", &s)?);
        like("dp", &dp, &s)?;
        if !(before.is_finite() && after.is_finite()) {
            return Err(Error::user(format!("scales are {before} and {after}")));
        }
        let (s, dp) = (plain(s)?, plain(dp)?);
        let make = || Tensor::empty(abi, s.sizes(), dtype, s.device());
        let (p, ds) = (make()?, make()?);
        if !rows.is_empty() {
            let key = Key::new("attention_rows").dtype(dtype);
            let key = key.with(before.to_bits()).with(after.to_bits());
            let sizes = [rows.rows, rows.columns];
            run(key, &sizes, &[&s, &dp], &[&p, &ds], || Ok(rows_text(dtype, before, after)))?;
        }
        Ok(vec![Value::Tensor(p), Value::Tensor(ds)])
    }
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let plain = Form {
        dtype: DType::BF16,
        heads: [2, 1],
        depths: [16, 16],
        scale: 0.25,
        causal: true,
        mask: None,
    };
    let masked = Form {
        heads: [2, 2],
        causal: false,
        mask: Some((DType::F32, true, false)),
        depths: [16, 16],
        ..plain
    };
    let seen = Form { mask: Some((DType::Bool, false, false)), ..plain };
    vec![
        ("attention, seen".to_string(), seen.text()),
        ("attention, causal".to_string(), plain.text()),
        ("attention, masked".to_string(), masked.text()),
        ("rows of attention's gradient".to_string(), rows_text(DType::F32, 0.5, 0.25)),
    ]
}
