//! Compares a result with the oracle's.
//!
//! An element may differ by `budget.relative * (|want| + scale) + budget.absolute`, where `scale` is
//! the root mean square of the oracle's finite elements: sums that cancel are accurate to the size
//! of what was summed, not to what is left. Integers and `bool` must be equal. NaN matches only
//! NaN; an infinity matches the same infinity, or an oracle's number that the type cannot hold.

use crate::budget::{Budget, largest};
use std::fmt;
use tilewright_data::Tensor;

/// One element that was looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Element {
    /// Its coordinate.
    pub at: Vec<usize>,
    /// What came out.
    pub got: f64,
    /// What the oracle says.
    pub want: f64,
    /// Error as a multiple of what is allowed there.
    pub ratio: f64,
}

/// The outcome of a comparison; prints as one line.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Number of elements.
    pub count: usize,
    /// How many break the budget.
    pub mismatches: usize,
    /// The first that does, in row-major order.
    pub first: Option<Element>,
    /// The one with the largest ratio; absent for empty tensors.
    pub worst: Option<Element>,
    /// Why nothing was compared (shapes or types differ).
    pub refused: Option<String>,
}

impl Comparison {
    /// No element breaks the budget.
    pub fn passed(&self) -> bool {
        self.mismatches == 0 && self.refused.is_none()
    }

    /// The largest error as a multiple of the budget; 0 for empty tensors.
    pub fn max_ratio(&self) -> f64 {
        self.worst.as_ref().map_or(0.0, |w| w.ratio)
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "at {:?}: got {:?}, want {:?} ({:.3} x budget)",
            self.at, self.got, self.want, self.ratio
        )
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = &self.refused {
            return f.write_str(reason);
        }
        write!(f, "{} of {} elements wrong", self.mismatches, self.count)?;
        if let Some(first) = &self.first {
            write!(f, "; first {first}")?;
        }
        if let Some(worst) = &self.worst {
            write!(f, "; worst {worst}")?;
        }
        Ok(())
    }
}

fn coordinate(shape: &[usize], mut flat: usize) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for (i, &extent) in at.iter_mut().zip(shape).rev() {
        *i = flat % extent;
        flat /= extent;
    }
    at
}

/// Compares `got` with the oracle's `want` (for floats of any type, usually `f64`).
pub fn compare(got: &Tensor, want: &Tensor, budget: &Budget) -> Comparison {
    let mut result =
        Comparison { count: want.len(), mismatches: 0, first: None, worst: None, refused: None };
    let same_class = got.dtype().is_float() == want.dtype().is_float()
        && (got.dtype().is_float() || got.dtype() == want.dtype());
    if got.shape() != want.shape() || !same_class {
        result.refused = Some(format!(
            "got {}{:?}, want {}{:?}",
            got.dtype(),
            got.shape(),
            want.dtype(),
            want.shape()
        ));
        return result;
    }
    let float = got.dtype().is_float();
    let finite = || (0..want.len()).map(|i| want.get_f64(i)).filter(|x| x.is_finite());
    let scale = (finite().map(|x| x * x).sum::<f64>() / finite().count().max(1) as f64).sqrt();
    for i in 0..want.len() {
        let (g, w) = (got.get_f64(i), want.get_f64(i));
        let ratio = if !float {
            // By bits: 64-bit integers do not fit f64.
            if got.get_i64(i) == want.get_i64(i) { 0.0 } else { f64::INFINITY }
        } else if g.is_nan() || w.is_nan() {
            if g.is_nan() && w.is_nan() { 0.0 } else { f64::INFINITY }
        } else if g == w {
            0.0
        } else if g.is_infinite() || w.is_infinite() {
            let out_of_range = w.abs() >= largest(got.dtype()) * (1.0 - budget.relative);
            if g.is_infinite() && out_of_range && g.signum() == w.signum() {
                0.0
            } else {
                f64::INFINITY
            }
        } else {
            (g - w).abs() / (budget.relative * (w.abs() + scale) + budget.absolute)
        };
        // A difference under a budget of nothing at all is 0/0 only when equal, handled above.
        let wrong = ratio > 1.0 || ratio.is_nan();
        result.mismatches += usize::from(wrong);
        let element = || Element { at: coordinate(want.shape(), i), got: g, want: w, ratio };
        if wrong && result.first.is_none() {
            result.first = Some(element());
        }
        if result.worst.as_ref().is_none_or(|worst| ratio > worst.ratio || ratio.is_nan()) {
            result.worst = Some(element());
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_base::DType;

    fn f32s(values: &[f32]) -> Tensor {
        Tensor::from_slice(&[values.len() / 2, 2], values).unwrap()
    }

    #[test]
    fn reports_count_first_and_worst() {
        let want = Tensor::from_slice(&[2, 2], &[1f64, 1., 1., 1.]).unwrap();
        let budget = Budget { relative: 1e-3, absolute: 0.0 };
        let c = compare(&f32s(&[1.0, 1.004, 0.9, 1.001]), &want, &budget);
        assert_eq!((c.count, c.mismatches, c.passed()), (4, 2, false));
        assert_eq!(c.first.as_ref().unwrap().at, [0, 1]);
        assert_eq!(c.worst.as_ref().unwrap().at, [1, 0]);
        assert!((c.max_ratio() - 50.0).abs() < 0.01, "{c}");
        assert!(c.to_string().starts_with("2 of 4 elements wrong; first at [0, 1]: got 1.00"));
    }

    #[test]
    fn special_values_must_agree() {
        let budget = Budget { relative: 1e-3, absolute: 0.0 };
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let same = f32s(&[nan, inf, -inf, 0.0]);
        assert!(compare(&same, &same, &budget).passed());
        for other in [[0.0, inf, -inf, 0.0], [nan, -inf, -inf, 0.0], [nan, inf, 3.0, 0.0]] {
            assert_eq!(compare(&f32s(&other), &same, &budget).mismatches, 1);
            assert_eq!(compare(&same, &f32s(&other), &budget).mismatches, 1);
        }
        // The oracle's number is beyond half precision: infinity is right.
        let want = Tensor::from_slice(&[1], &[70000f64]).unwrap();
        let got = Tensor::from_f64s(DType::F16, &[1], &[f64::INFINITY]).unwrap();
        assert!(compare(&got, &want, &budget).passed());
        let small = Tensor::from_slice(&[1], &[60000f64]).unwrap();
        assert!(!compare(&got, &small, &budget).passed());
    }

    #[test]
    fn integers_are_exact_and_shapes_must_agree() {
        let budget = Budget { relative: 1.0, absolute: 1.0 };
        let a = Tensor::from_slice(&[1], &[i64::MAX]).unwrap();
        let b = Tensor::from_slice(&[1], &[i64::MAX - 1]).unwrap();
        assert!(!compare(&a, &b, &budget).passed());
        let c = Tensor::from_slice(&[1, 1], &[i64::MAX]).unwrap();
        assert_eq!(compare(&a, &c, &budget).to_string(), "got i64[1], want i64[1, 1]");
    }
}
