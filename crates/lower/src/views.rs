//! Layout algebra that lowering needs beyond the crate `layout`: merging neighbouring axes,
//! splitting one, and ordering axes by how close their elements lie in memory.

use tilewright_layout::{Axis, Dim, Layout, Symbols};

/// An axis that repeats one element.
pub(crate) fn broadcast_axis(extent: Dim) -> Axis {
    Axis { extent, stride: Dim::new(0), block: None }
}

/// True when moving along the axis stays at the same element.
pub(crate) fn is_broadcast(axis: &Axis) -> bool {
    axis.extent.is(1) || (axis.block.is_none() && axis.stride.is(0))
}

/// Distance between neighbours of an axis (inside a block when blocked).
pub(crate) fn inner_stride(axis: &Axis) -> &Dim {
    axis.block.as_ref().map_or(&axis.stride, |b| &b.stride)
}

/// One axis that runs over `group` (axes of `layout`, outermost first) in row-major order; `None`
/// when that is not one stride. Post-condition: coordinate `c` of the result lies where the
/// row-major split of `c` over the group lies.
fn merge_group(layout: &Layout, group: &[usize]) -> Option<Axis> {
    let extent = group.iter().fold(Dim::new(1), |n, &i| n * &layout.axes[i].extent);
    let real: Vec<&Axis> =
        group.iter().map(|&i| &layout.axes[i]).filter(|a| !a.extent.is(1)).collect();
    match real.as_slice() {
        [] => Some(broadcast_axis(extent)),
        [one] => Some((*one).clone()),
        many => {
            // The last may be blocked, in whole blocks.
            let last = many[many.len() - 1];
            let plain = many[..many.len() - 1].iter().all(|a| a.block.is_none());
            let steps = |a: &Axis| match &a.block {
                None => Some(a.extent.clone()),
                Some(b) => a.extent.exact_div(&Dim::new(b.size)),
            };
            let affine = many
                .windows(2)
                .all(|w| steps(w[1]).is_some_and(|steps| w[0].stride == &w[1].stride * &steps));
            (plain && affine).then(|| Axis { extent, ..last.clone() })
        }
    }
}

/// The layout whose axis `i` runs over `groups[i]`.
pub(crate) fn merge(layout: &Layout, groups: &[Vec<usize>]) -> Option<Layout> {
    let axes: Option<Vec<Axis>> = groups.iter().map(|g| merge_group(layout, g)).collect();
    Some(Layout { axes: axes?, offset: layout.offset.clone() })
}

/// Elements along one axis of a kernel, at most: kernels of a GPU count with 31 bits, and round up to whole tiles.
const LONGEST_AXIS: i64 = i32::MAX as i64 - (1 << 20);

/// Whether one axis for these is known to be longer than kernels can count.
fn too_long(axes: &[usize], layout: &Layout) -> bool {
    let extents = axes.iter().filter_map(|&a| layout.axes[a].extent.as_const());
    extents.fold(1i64, i64::saturating_mul) > LONGEST_AXIS
}

/// Cuts `axes` (in the order given) into the longest runs that merge in every layout, and that a kernel can count. An
/// axis for which `solo` holds stays alone.
pub(crate) fn partition(
    axes: &[usize],
    layouts: &[&Layout],
    solo: &dyn Fn(usize) -> bool,
) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for &axis in axes {
        if let Some(last) = groups.last_mut()
            && !solo(axis)
            && !solo(last[0])
        {
            last.push(axis);
            if layouts.iter().all(|l| merge_group(l, last).is_some() && !too_long(last, l)) {
                continue;
            }
            last.pop();
        }
        groups.push(vec![axis]);
    }
    groups
}

/// A likely value of a size: constants are themselves, symbols their range's value nearest 64.
pub(crate) fn nominal(dim: &Dim, symbols: &Symbols) -> i64 {
    dim.eval_with(&|name| {
        let range = symbols.iter().find(|s| &*s.name == name).map(|s| s.range);
        Some(range.map_or(64, |r| 64.clamp(r.min.min(r.max), r.max)))
    })
    .unwrap_or(64)
}

/// `axes` sorted from far to near by the layout's inner strides; broadcast axes keep their place
/// among the far ones. Ties keep their order.
pub(crate) fn by_distance(axes: &[usize], layout: &Layout, symbols: &Symbols) -> Vec<usize> {
    let mut order = axes.to_vec();
    let key = |&i: &usize| {
        let a = &layout.axes[i];
        if is_broadcast(a) {
            i64::MAX
        } else {
            let near = nominal(inner_stride(a), symbols).abs();
            // An axis of a blocked neighbour may have the same stride as the block is long.
            near.max(1)
        }
    };
    order.sort_by_key(|i| std::cmp::Reverse(key(i)));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(sizes: &[i64]) -> Vec<Dim> {
        sizes.iter().map(|&d| Dim::new(d)).collect()
    }

    #[test]
    fn neighbours_merge_when_one_stride_serves_all_layouts() {
        let row = Layout::row_major(&dims(&[2, 3, 4]));
        assert_eq!(partition(&[0, 1, 2], &[&row], &|_| false), [vec![0, 1, 2]]);
        let bias = Layout::row_major(&dims(&[4])).expand(&dims(&[2, 3, 4])).unwrap();
        assert_eq!(partition(&[0, 1, 2], &[&row, &bias], &|_| false), [vec![0, 1], vec![2]]);
        let large = Layout::row_major(&dims(&[3, 1 << 16, 1 << 15]));
        assert_eq!(partition(&[0, 1, 2], &[&large], &|_| false), [vec![0, 1], vec![2]]);
        let heads = row.permute(&[1, 0, 2]);
        assert_eq!(partition(&[0, 1, 2], &[&heads], &|_| false), [vec![0], vec![1], vec![2]]);
        assert_eq!(by_distance(&[0, 1, 2], &heads, &vec![]), [1, 0, 2]);
    }
}
