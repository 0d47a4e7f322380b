//! `non_max_suppression`: per class keeps the best boxes that do not overlap a better one too much.
//!
//! Operands: boxes `[B, N, 4]`, scores `[B, C, N]`, the most boxes per class (`i64`), the overlap
//! limit and the score limit (`f32`). Attribute `center_point_box`: 0 for two corners
//! `[y1, x1, y2, x2]`, 1 for `[x, y, width, height]`. One result `i64[K, 3]`: batch, class, box.

use super::{Attrs, operand};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;

/// `[top, left, bottom, right]` in order.
fn corners(boxes: &Tensor, at: usize, centred: bool) -> [f64; 4] {
    let v = |i: usize| boxes.get_f64(at * 4 + i);
    if centred {
        let (x, y, w, h) = (v(0), v(1), v(2), v(3));
        return [y - h / 2.0, x - w / 2.0, y + h / 2.0, x + w / 2.0];
    }
    [v(0).min(v(2)), v(1).min(v(3)), v(0).max(v(2)), v(1).max(v(3))]
}

fn overlap(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let area = |r: &[f64; 4]| (r[2] - r[0]) * (r[3] - r[1]);
    let height = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let width = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let common = height * width;
    let union = area(a) + area(b) - common;
    if union > 0.0 { common / union } else { 0.0 }
}

pub(super) fn non_max_suppression(attrs: &Attrs<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let (boxes, scores) = (operand(inputs, 0)?, operand(inputs, 1)?);
    let one = |i: usize| -> Result<&Tensor> {
        let t = operand(inputs, i)?;
        if t.len() == 1 { Ok(t) } else { Err(Error::user("a limit that is not one number")) }
    };
    let most = usize::try_from(one(2)?.get_i64(0)).unwrap_or(0);
    let (iou, least) = (one(3)?.get_f64(0), one(4)?.get_f64(0));
    let centred = attrs.int_or("center_point_box", 0) == 1;
    let (&[batches, n, 4], &[b, classes, m]) = (boxes.shape(), scores.shape()) else {
        return Err(Error::user(format!(
            "boxes {:?} and scores {:?} of non-maximum suppression",
            boxes.shape(),
            scores.shape()
        )));
    };
    if b != batches || m != n {
        return Err(Error::user(format!("{batches}x{n} boxes for scores {:?}", scores.shape())));
    }
    let mut out = Vec::new();
    for batch in 0..batches {
        for class in 0..classes {
            let score = |i: usize| scores.get_f64((batch * classes + class) * n + i);
            let mut order: Vec<usize> = (0..n).filter(|&i| score(i) > least).collect();
            order.sort_by(|&i, &j| score(j).total_cmp(&score(i)).then(i.cmp(&j)));
            let mut kept: Vec<[f64; 4]> = Vec::new();
            for i in order {
                if kept.len() >= most {
                    break;
                }
                let candidate = corners(boxes, batch * n + i, centred);
                if kept.iter().all(|k| overlap(k, &candidate) <= iou) {
                    kept.push(candidate);
                    out.extend([batch as i64, class as i64, i as i64]);
                }
            }
        }
    }
    Ok(vec![Tensor::from_i64s(DType::I64, &[out.len() / 3, 3], &out)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weaker_of_two_overlapping_boxes_goes() {
        let boxes = [0f32, 0., 1., 1., 0., 0.1, 1., 1.1, 0., 5., 1., 6.];
        let inputs = [
            Tensor::from_slice(&[1, 3, 4], &boxes).unwrap(),
            Tensor::from_slice(&[1, 1, 3], &[0.8f32, 0.9, 0.3]).unwrap(),
            Tensor::from_i64s(DType::I64, &[], &[10]).unwrap(),
            Tensor::scalar(DType::F32, 0.5),
            Tensor::scalar(DType::F32, 0.0),
        ];
        let out = non_max_suppression(&Attrs(&[]), &inputs).unwrap();
        assert_eq!(out[0].to_i64s(), [0, 0, 1, 0, 0, 2]);
    }
}
