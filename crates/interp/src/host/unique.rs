//! `unique`: the distinct elements of a tensor, or the distinct slices along an axis.
//!
//! One operand. Attributes: `axis` (absent: over all elements), `sorted` (0: in order of first
//! occurrence). Results as in ONNX: the distinct ones; where each first occurs; for each original
//! one its place among the distinct; how often each occurs.

use super::{Attrs, operand};
use std::cmp::Ordering;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::HostAttr;

pub(super) fn unique(attrs: &Attrs<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let x = operand(inputs, 0)?;
    let shape = x.shape().to_vec();
    let axis = match attrs.get("axis") {
        Some(HostAttr::Int(a)) => Some(*a as usize),
        _ => None,
    };
    // Seen as [outer, count, inner]; one item is everything at one position of the middle.
    let (outer, count, inner) = match axis {
        Some(a) if a < shape.len() => {
            (shape[..a].iter().product(), shape[a], shape[a + 1..].iter().product())
        }
        Some(a) => return Err(Error::bug(format!("axis {a} of shape {shape:?}"))),
        None => (1usize, x.len(), 1usize),
    };
    let at = |item: usize, i: usize| ((i / inner) * count + item) * inner + i % inner;
    let float = x.dtype().is_float();
    let unsigned = x.dtype() == DType::U64;
    let order = |a: usize, b: usize| -> Ordering {
        for i in 0..outer * inner {
            let (p, q) = (at(a, i), at(b, i));
            let ordering = if float {
                // NaN is last and equals itself.
                let (p, q) = (x.get_f64(p), x.get_f64(q));
                p.partial_cmp(&q).unwrap_or(p.is_nan().cmp(&q.is_nan()))
            } else if unsigned {
                (x.get_i64(p) as u64).cmp(&(x.get_i64(q) as u64))
            } else {
                x.get_i64(p).cmp(&x.get_i64(q))
            };
            if ordering != Ordering::Equal {
                return ordering;
            }
        }
        Ordering::Equal
    };
    let mut sorted: Vec<usize> = (0..count).collect();
    sorted.sort_by(|&a, &b| order(a, b).then(a.cmp(&b)));
    // Groups of equal items: the first of each, and its members.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for item in sorted {
        match groups.last_mut() {
            Some(group) if order(group[0], item) == Ordering::Equal => group.push(item),
            _ => groups.push(vec![item]),
        }
    }
    if attrs.int_or("sorted", 1) == 0 {
        groups.sort_by_key(|g| g[0]);
    }
    let mut inverse = vec![0i64; count];
    for (place, group) in groups.iter().enumerate() {
        for &item in group {
            inverse[item] = place as i64;
        }
    }
    let mut out_shape = if axis.is_some() { shape } else { vec![0] };
    out_shape[axis.unwrap_or(0)] = groups.len();
    let mut y = Tensor::zeros(x.dtype(), out_shape)?;
    let dtype = x.dtype();
    let bytes = y.bytes_mut();
    for (place, group) in groups.iter().enumerate() {
        for i in 0..outer * inner {
            let to = ((i / inner) * groups.len() + place) * inner + i % inner;
            if float {
                tilewright_data::from_f64(dtype, bytes, to, x.get_f64(at(group[0], i)));
            } else {
                tilewright_data::from_i64(dtype, bytes, to, x.get_i64(at(group[0], i)));
            }
        }
    }
    let list = |v: &[i64]| Tensor::from_i64s(DType::I64, &[v.len()], v);
    let first: Vec<i64> = groups.iter().map(|g| g[0] as i64).collect();
    let counts: Vec<i64> = groups.iter().map(|g| g.len() as i64).collect();
    Ok(vec![y, list(&first)?, list(&inverse)?, list(&counts)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_order_of_first_occurrence() {
        let x = Tensor::from_slice(&[3, 2], &[5i32, 1, 2, 2, 5, 1]).unwrap();
        let attrs =
            [("axis".to_string(), HostAttr::Int(0)), ("sorted".to_string(), HostAttr::Int(0))];
        let out = unique(&Attrs(&attrs), &[x]).unwrap();
        assert_eq!(out[0].to_i64s(), [5, 1, 2, 2]);
        assert_eq!(out[1].to_i64s(), [0, 1]);
        assert_eq!(out[2].to_i64s(), [0, 1, 0]);
        assert_eq!(out[3].to_i64s(), [2, 1]);
    }
}
