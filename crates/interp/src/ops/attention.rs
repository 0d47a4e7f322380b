//! `Attention`: `softmax(score(q k^T, extras...)) v` per batch entry and head.
//!
//! A position hidden by `causal` has score minus infinity; a row with nothing visible is therefore
//! NaN, exactly as the softmax of such a row, unless the node says `zeros`. In exact mode the dot products are rounded to the
//! score function's parameter type, the function rounds as any elementwise function does, and the
//! rest is computed in `f64` and rounded once.

use super::float_result;
use super::norm::softmax_row;
use super::numeric::gemm_rows;
use super::views::{expand, permute};
use crate::func::eval_func;
use crate::graph::Mode;
use crate::value::{Buf, Val, each_buf};
use rayon::prelude::*;
use tilewright_graph::AttentionAttrs;

pub(super) fn attention(inputs: &[Val], attrs: &AttentionAttrs, mode: Mode) -> Buf {
    let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
    let [batch, heads, rows, depth] = [0, 1, 2, 3].map(|i| q.shape[i]);
    let (groups, keys, width) = (k.shape[1], k.shape[2], v.shape[3]);
    let k_transposed = permute(k, &[0, 1, 3, 2]);
    let (q_data, k_data, v_data) = (q.floats(), k_transposed.floats(), v.floats());
    let score_shape = [batch, heads, rows, keys];
    let extras: Vec<Val> = inputs[3..].iter().map(|x| expand(x, &score_shape)).collect();
    let score_type = attrs.score.params()[0].dtype;
    let mut out = vec![0.0; batch * heads * rows * width];
    let size = rows * width;
    if out.is_empty() {
        return Buf::F(out);
    }
    out.par_chunks_mut(size).enumerate().for_each(|(plane, out)| {
        let (entry, head) = (plane / heads, plane % heads);
        let source = entry * groups + head / (heads / groups);
        let mut scores = vec![0.0; rows * keys];
        let q = &q_data[plane * rows * depth..][..rows * depth];
        let k = &k_data[source * depth * keys..][..depth * keys];
        gemm_rows(&mut scores, q, k, keys, depth);
        let dots = float_result(score_type, mode, scores);
        let cut = |x: &Val| -> Buf {
            let range = plane * rows * keys..(plane + 1) * rows * keys;
            each_buf!(&*x.buf, v => v[range].to_vec())
        };
        let cut: Vec<Buf> = extras.iter().map(cut).collect();
        let args: Vec<&Buf> = std::iter::once(&dots).chain(&cut).collect();
        let Buf::F(mut scores) = eval_func(&attrs.score, &args, rows * keys, mode) else {
            unreachable!("the score is a float: checked with the node's types");
        };
        for (s, row) in scores.chunks_mut(keys.max(1)).enumerate() {
            if attrs.causal {
                // Hidden when t > s + (keys - rows).
                let visible = (s + keys + 1).saturating_sub(rows).min(keys);
                row[visible..].fill(f64::NEG_INFINITY);
            }
            if attrs.zeros && row.iter().all(|s| *s == f64::NEG_INFINITY) {
                row.fill(0.0);
            } else {
                softmax_row(row, false);
            }
        }
        let v = &v_data[source * keys * width..][..keys * width];
        gemm_rows(out, &scores, v, width, keys);
    });
    float_result(q.dtype, mode, out)
}
