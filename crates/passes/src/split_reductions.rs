//! Reductions to one element in two steps.
//!
//! ```text
//! before: y = reduce sum axes=[0, 1, 2] x            x: f32[64, 128, 256]: one block of work, on one thread
//! after:  p = reduce sum axes=[1, 2] x               p: f32[64]: one for each part
//!         y = reduce sum axes=[0] p
//! ```
//!
//! The parts follow from the shape alone, so results do not depend on who computes them. For processors: a GPU's plan splits reductions
//! when it knows the device.
//!
//! Side conditions: sizes are known, and there are enough elements ([`FROM`]) for a second launch. Axes are cut between two of
//! them; where that gives no good parts, the operand is reshaped first, unless a map makes it, which would no longer be computed on the way.

use crate::edit::rewrite;
use tilewright_base::Result;
use tilewright_graph::{Graph, Op};
use tilewright_layout::Dim;

/// Elements from which on a reduction is split.
const FROM: i64 = 1 << 17;

/// Parts that there are at least.
const PARTS: i64 = 8;

/// Elements of a part, at least.
const PART: i64 = 2048;

/// Splits all of them; true when there was one.
pub fn split_reductions(graph: &mut Graph) -> Result<bool> {
    rewrite(graph, &mut |ed, id| {
        let node = &ed.graph.nodes[id];
        let Op::Reduce { kind, axes, .. } = &node.op else { return Ok(None) };
        let (kind, mut x) = (*kind, node.inputs[0]);
        let result = ed.graph.shape(node.outputs[0]).to_vec();
        let shape: Option<Vec<i64>> = ed.graph.shape(x).iter().map(Dim::as_const).collect();
        let Some(mut shape) = shape else { return Ok(None) };
        let all = shape.iter().enumerate().all(|(a, &d)| d == 1 || axes.contains(&a));
        let elements = shape.iter().try_fold(1_i64, |n, &d| n.checked_mul(d)).unwrap_or(0);
        if !all || elements < FROM {
            return Ok(None);
        }
        let good = |cut: &usize| {
            let parts: i64 = shape[..*cut].iter().product();
            parts >= PARTS && elements / parts >= PART
        };
        let cut = (1..shape.len()).find(good);
        let cut = match cut {
            Some(cut) => cut,
            None if matches!(ed.op_of(x), Some(Op::Map(_))) => return Ok(None),
            None => {
                let fits = |p: &i64| elements % p == 0 && elements / p >= PART;
                let Some(parts) = (PARTS..=8 * PARTS).rev().find(fits) else { return Ok(None) };
                shape = vec![parts, elements / parts];
                x = ed.reshape(x, &shape.iter().map(|&d| Dim::new(d)).collect::<Vec<Dim>>())?;
                1
            }
        };
        let over =
            |axes: std::ops::Range<usize>| Op::Reduce { kind, axes: axes.collect(), keep: false };
        let parts = ed.op(over(cut..shape.len()), &[x])?;
        let whole = ed.op(over(0..cut), &[parts])?;
        Ok(Some(vec![ed.reshape(whole, &result)?]))
    })
}
