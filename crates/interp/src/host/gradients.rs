//! What a library of kernels computes in training: attention that keeps its log-sum-exp, its gradient, and that of layer
//! normalisations. In `f64`, rounded once; slow.
//!
//! Matrices of attention are `[batch, row, head, column]`, masks `[batch, head, row, key]` with axes of one element that
//! repeat, log-sum-exps `[batch, head, row]`. Attributes: `scale`, and `causal` (1: query `i` sees keys up to
//! `i + keys - queries`). A row that sees nothing gives 0, has the logarithm minus infinity, and no share in a gradient.

use super::{Attrs, operand};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::HostAttr;

fn number(attrs: &Attrs<'_>, name: &str) -> Result<f64> {
    match attrs.get(name) {
        Some(HostAttr::Int(v)) => Ok(*v as f64),
        _ => attrs.float(name),
    }
}

/// Queries, keys and values with their sizes.
struct Heads {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    sizes: [usize; 7],
    scale: f64,
    causal: bool,
    mask: Option<Tensor>,
}

impl Heads {
    fn new(attrs: &Attrs<'_>, [q, k, v]: [&Tensor; 3], mask: Option<&Tensor>) -> Result<Heads> {
        let bad = || Error::bug("operands of attention that do not go together");
        let (&[b, s, h, d], &[kb, t, g, kd], &[vb, vt, vg, e]) = (q.shape(), k.shape(), v.shape())
        else {
            return Err(bad());
        };
        if kb != b || vb != b || vt != t || vg != g || kd != d || g == 0 || h % g != 0 {
            return Err(bad());
        }
        let wanted = [b, h, s, t];
        let repeats = |m: &Tensor| {
            m.shape().len() == 4 && m.shape().iter().zip(wanted).all(|(n, w)| *n == 1 || *n == w)
        };
        if !mask.is_none_or(repeats) {
            return Err(bad());
        }
        Ok(Heads {
            q: q.to_f64s(),
            k: k.to_f64s(),
            v: v.to_f64s(),
            sizes: [b, h, g, s, t, d, e],
            scale: number(attrs, "scale")?,
            causal: attrs.int_or("causal", 0) != 0,
            mask: mask.cloned(),
        })
    }

    /// The scores of a row, hidden ones minus infinity.
    fn scores(&self, [batch, head, row]: [usize; 3]) -> Vec<f64> {
        let [_, _, _, s, t, d, _] = self.sizes;
        let q = &self.q[self.at_query(batch, row, head, d)..][..d];
        let score = |key: usize| {
            let k = &self.k[self.at_key(batch, key, head, d)..][..d];
            let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
            let hidden = self.causal && key + s > row + t;
            if hidden {
                f64::NEG_INFINITY
            } else {
                self.masked(dot * self.scale, [batch, head, row, key])
            }
        };
        (0..t).map(score).collect()
    }

    fn masked(&self, score: f64, at: [usize; 4]) -> f64 {
        let Some(mask) = &self.mask else { return score };
        let place = mask
            .shape()
            .iter()
            .zip(at)
            .fold(0, |sum, (&n, i)| sum * n + if n == 1 { 0 } else { i });
        match mask.dtype() {
            DType::Bool if mask.get_i64(place) == 0 => f64::NEG_INFINITY,
            DType::Bool => score,
            _ => score + mask.get_f64(place),
        }
    }

    fn at_query(&self, batch: usize, row: usize, head: usize, columns: usize) -> usize {
        let [_, h, _, s, ..] = self.sizes;
        ((batch * s + row) * h + head) * columns
    }

    fn at_key(&self, batch: usize, key: usize, head: usize, columns: usize) -> usize {
        let [_, h, g, _, t, ..] = self.sizes;
        ((batch * t + key) * g + head / (h / g)) * columns
    }

    /// Batch, head and row of every row.
    fn rows(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [b, h, _, s, ..] = self.sizes;
        (0..b * h * s).map(move |i| [i / (h * s), i / s % h, i % s])
    }
}

/// Attention and the logarithm of each row's sum of exponentials, from q, k, v and maybe a mask.
pub(super) fn attention_lse(attrs: &Attrs<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let [q, k, v] = [operand(inputs, 0)?, operand(inputs, 1)?, operand(inputs, 2)?];
    let heads = Heads::new(attrs, [q, k, v], inputs.get(3))?;
    let [b, h, _, s, t, _, e] = heads.sizes;
    let (mut y, mut lse) = (vec![0.0; b * s * h * e], Vec::with_capacity(b * h * s));
    for at @ [batch, head, row] in heads.rows() {
        let scores = heads.scores(at);
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if largest == f64::NEG_INFINITY {
            lse.push(largest);
            continue;
        }
        let sum: f64 = scores.iter().map(|x| (x - largest).exp()).sum();
        lse.push(largest + sum.ln());
        let out = heads.at_query(batch, row, head, e);
        for (key, score) in scores.iter().enumerate().take(t) {
            let weight = (score - largest).exp() / sum;
            let v = heads.at_key(batch, key, head, e);
            for column in 0..e {
                y[out + column] += weight * heads.v[v + column];
            }
        }
    }
    Ok(vec![
        Tensor::from_f64s(q.dtype(), &[b, s, h, e], &y)?,
        Tensor::from_f64s(DType::F32, &[b, h, s], &lse)?,
    ])
}

/// The gradients of q, k and v, from that of the result, q, k, v, the result, its log-sum-exps and maybe a mask.
pub(super) fn attention_backward(attrs: &Attrs<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let [dy, q, k, v, y, lse] = [0, 1, 2, 3, 4, 5].map(|i| operand(inputs, i));
    let (dy, q, k, v, y, lse) = (dy?, q?, k?, v?, y?, lse?);
    let heads = Heads::new(attrs, [q, k, v], inputs.get(6))?;
    let [b, h, _, s, _, d, e] = heads.sizes;
    if *dy.shape() != [b, s, h, e] || y.shape() != dy.shape() || *lse.shape() != [b, h, s] {
        return Err(Error::bug("operands of attention's gradient that do not go together"));
    }
    let (of_result, result, lse) = (dy.to_f64s(), y.to_f64s(), lse.to_f64s());
    let (mut dq, mut dk, mut dv) =
        (vec![0.0; heads.q.len()], vec![0.0; heads.k.len()], vec![0.0; heads.v.len()]);
    for (number, at @ [batch, head, row]) in heads.rows().enumerate() {
        if lse[number] == f64::NEG_INFINITY {
            continue;
        }
        let out = heads.at_query(batch, row, head, e);
        let dy = &of_result[out..][..e];
        let delta: f64 = dy.iter().zip(&result[out..]).map(|(a, b)| a * b).sum();
        let query = heads.at_query(batch, row, head, d);
        for (key, score) in heads.scores(at).into_iter().enumerate() {
            let weight = (score - lse[number]).exp();
            let (at_k, at_v) =
                (heads.at_key(batch, key, head, d), heads.at_key(batch, key, head, e));
            let mut dp = 0.0;
            for (column, g) in dy.iter().enumerate() {
                dp += g * heads.v[at_v + column];
                dv[at_v + column] += weight * g;
            }
            let ds = weight * (dp - delta) * heads.scale;
            for column in 0..d {
                dq[query + column] += ds * heads.k[at_k + column];
                dk[at_k + column] += ds * heads.q[query + column];
            }
        }
    }
    let made = |like: &Tensor, data: &[f64]| Tensor::from_f64s(like.dtype(), like.shape(), data);
    Ok(vec![made(q, &dq)?, made(k, &dk)?, made(v, &dv)?])
}

/// The gradients of rows, scale and shift of a layer normalisation over the last axis, from that of the result `[rows, columns]`,
/// the rows, the scale, and maybe another gradient of the rows that is added. Attribute: `eps`.
pub(super) fn layer_norm_backward(attrs: &Attrs<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let [dy, x, scale] = [operand(inputs, 0)?, operand(inputs, 1)?, operand(inputs, 2)?];
    let &[_, columns] = x.shape() else { return Err(Error::bug("rows of a matrix")) };
    let fits = dy.shape() == x.shape()
        && *scale.shape() == [columns]
        && inputs.get(3).is_none_or(|o| o.shape() == x.shape());
    if !fits {
        return Err(Error::bug("operands of a normalisation's gradient that do not go together"));
    }
    let eps = number(attrs, "eps")?;
    let weights = scale.to_f64s();
    let mut dx = inputs.get(3).map_or_else(|| vec![0.0; x.len()], Tensor::to_f64s);
    let (mut dw, mut db) = (vec![0.0; columns], vec![0.0; columns]);
    let (rows, gradients) = (x.to_f64s(), dy.to_f64s());
    let n = columns as f64;
    let all = rows.chunks(columns.max(1)).zip(gradients.chunks(columns.max(1)));
    for ((row, dy), dx) in all.zip(dx.chunks_mut(columns.max(1))) {
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
        let factor = 1.0 / (variance + eps).sqrt();
        let normal = |i: usize| (row[i] - mean) * factor;
        let scaled: Vec<f64> = dy.iter().zip(&weights).map(|(g, w)| g * w).collect();
        let sum = scaled.iter().sum::<f64>() / n;
        let dot = scaled.iter().enumerate().map(|(i, g)| g * normal(i)).sum::<f64>() / n;
        for i in 0..columns {
            dx[i] += factor * (scaled[i] - sum - normal(i) * dot);
            dw[i] += dy[i] * normal(i);
            db[i] += dy[i];
        }
    }
    let vector = |data: &[f64]| Tensor::from_f64s(scale.dtype(), scale.shape(), data);
    Ok(vec![Tensor::from_f64s(x.dtype(), x.shape(), &dx)?, vector(&dw)?, vector(&db)?])
}
