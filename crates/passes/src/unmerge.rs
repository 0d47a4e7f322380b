//! Axes that a reshape merges, a permute moves together and another reshape splits again.
//!
//! ```text
//! before: v1 = reshape [197,768,64] v0       after: v1 = reshape [197,64,12,64] v0
//!         v2 = permute [1,0,2] v1                   v2 = permute [1,2,0,3] v1
//!         v3 = reshape [64,12,197,64] v2
//! ```
//!
//! `v0 [197,64,768]` is a batch of 64 and 12 heads of 64: PyTorch's attention of several heads merges batch and heads. Where `v0`
//! lies in memory so that the two have no common stride, the first reshape would be a copy.
//!
//! Side condition: all sizes are known, and an axis of `v1` has parts of different axes of `v0` that are different axes of `v3`.

use crate::edit::Editor;
use std::ops::Range;
use tilewright_base::Result;
use tilewright_graph::{Op, ValueId};
use tilewright_layout::Dim;

/// The result of `reshape to v` without the merged axes; see the module's head.
///
/// # Errors
/// Bugs only.
pub(crate) fn unmerged(ed: &mut Editor<'_>, to: &[Dim], v: ValueId) -> Result<Option<ValueId>> {
    let of = |v: ValueId| ed.node_of(v).and_then(|n| Some((&n.op, *n.inputs.first()?)));
    let Some((Op::Permute(perm), merged)) = of(v) else { return Ok(None) };
    let Some((Op::Reshape(_), source)) = of(merged) else { return Ok(None) };
    let sizes = |shape: &[Dim]| -> Option<Vec<i64>> {
        shape.iter().map(|d| d.as_const().filter(|n| *n > 0)).collect()
    };
    let known = (sizes(ed.graph.shape(source)), sizes(ed.graph.shape(merged)), sizes(to));
    let (Some(from), Some(between), Some(to_sizes)) = known else { return Ok(None) };
    let Some((parts, perm)) = split(&from, &between, perm, &to_sizes) else { return Ok(None) };
    let parts: Vec<Dim> = parts.into_iter().map(Dim::new).collect();
    let apart = ed.reshape(source, &parts)?;
    let turned = ed.permute(apart, &perm)?;
    Ok(Some(ed.reshape(turned, to)?))
}

/// The sizes into which the source is split, and how these are permuted; nothing where no merged axis is split again.
fn split(
    from: &[i64],
    between: &[i64],
    perm: &[usize],
    to: &[i64],
) -> Option<(Vec<i64>, Vec<usize>)> {
    let coarse = refined(from, between)?;
    let of_axis = shares(between, &coarse)?;
    // Places of the parts, as they lie behind the permute.
    let order: Vec<usize> = perm.iter().flat_map(|&p| of_axis[p].clone()).collect();
    let turned: Vec<i64> = order.iter().map(|&i| coarse[i]).collect();
    let fine = refined(&turned, to)?;
    let of_part = shares(&turned, &fine)?;
    let mut pieces: Vec<Vec<i64>> = vec![Vec::new(); coarse.len()];
    for (place, range) in order.iter().zip(&of_part) {
        pieces[*place] = fine[range.clone()].to_vec();
    }
    let starts: Vec<usize> =
        pieces.iter().scan(0, |at, p| Some(std::mem::replace(at, *at + p.len()))).collect();
    let parts: Vec<i64> = pieces.iter().flatten().copied().collect();
    let perm: Vec<usize> =
        order.iter().flat_map(|&i| starts[i]..starts[i] + pieces[i].len()).collect();
    let axis_of = |ranges: &[Range<usize>], i: usize| ranges.iter().position(|r| r.contains(&i));
    let (sources, axes) = (shares(from, &parts)?, shares(between, &parts)?);
    let results = shares(to, &fine)?;
    let result_of = |i: usize| axis_of(&results, perm.iter().position(|&p| p == i)?);
    let merged = |i: usize| {
        axis_of(&axes, i) == axis_of(&axes, i + 1)
            && axis_of(&sources, i) != axis_of(&sources, i + 1)
            && result_of(i) != result_of(i + 1)
    };
    (1..parts.len()).any(|i| merged(i - 1)).then_some((parts, perm))
}

/// The coarsest sizes, without ones, of which runs multiply to the sizes of both lists.
fn refined(a: &[i64], b: &[i64]) -> Option<Vec<i64>> {
    let ends = |sizes: &[i64]| -> Option<Vec<i64>> {
        let mut all = 1i64;
        let each = sizes.iter().map(|n| {
            all = all.checked_mul(*n)?;
            Some(all)
        });
        each.collect()
    };
    let (a, b) = (ends(a)?, ends(b)?);
    if a.last().unwrap_or(&1) != b.last().unwrap_or(&1) {
        return None;
    }
    let mut all: Vec<i64> = [a, b].concat();
    all.sort_unstable();
    all.dedup();
    let mut before = 1;
    let mut found = Vec::new();
    for end in all.into_iter().filter(|n| *n > 1) {
        if end % before != 0 {
            return None;
        }
        found.push(end / before);
        before = end;
    }
    Some(found)
}

/// For each size the run of parts that multiply to it.
fn shares(sizes: &[i64], parts: &[i64]) -> Option<Vec<Range<usize>>> {
    let mut at = 0;
    let mut found = Vec::with_capacity(sizes.len());
    for size in sizes {
        let (start, mut product) = (at, 1);
        while product < *size {
            product *= parts.get(at)?;
            at += 1;
        }
        if product != *size {
            return None;
        }
        found.push(start..at);
    }
    (at == parts.len()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_are_merged_with_the_batch_are_split_at_once() {
        // [S, B, E] -> [S, B H, D] -> [B H, S, D] -> [B, H, S, D]
        let found = split(&[197, 64, 768], &[197, 768, 64], &[1, 0, 2], &[64, 12, 197, 64]);
        assert_eq!(found, Some((vec![197, 64, 12, 64], vec![1, 2, 0, 3])));
        // and back: [B, H, S, D] -> [B H, S, D] -> [S, B H, D] -> [S, B, E]
        let found = split(&[64, 12, 197, 64], &[768, 197, 64], &[1, 0, 2], &[197, 64, 768]);
        assert_eq!(found, Some((vec![64, 12, 197, 64], vec![2, 0, 1, 3])));
    }

    #[test]
    fn what_stays_merged_or_was_not_merged_is_left() {
        assert_eq!(split(&[2, 3, 4], &[6, 4], &[1, 0], &[4, 6]), None);
        assert_eq!(split(&[6, 4], &[6, 4], &[1, 0], &[4, 2, 3]), None);
        // Sizes that have no common parts.
        assert_eq!(split(&[4, 6], &[24], &[0], &[6, 4]), None);
        // Axes of one element.
        let found = split(&[1, 2, 3, 5], &[6, 1, 5], &[2, 1, 0], &[5, 2, 1, 3]);
        assert_eq!(found, Some((vec![2, 3, 5], vec![2, 0, 1])));
    }
}
