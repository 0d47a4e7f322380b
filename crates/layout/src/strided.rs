//! [`Layout`]: where each element of a tensor lies.
//!
//! A layout maps logical coordinates to an element offset. Each axis has an extent and a stride,
//! and may be *blocked*: split into runs of `block.size` consecutive elements that have a stride of
//! their own. The offset of coordinate `x` is
//!
//! ```text
//!   offset + sum over axes of  floor(x / block) * stride + (x % block) * block_stride
//! ```
//!
//! It prints CuTe-like as `(extents):(strides)`, a blocked axis as a nested pair with the inner
//! block last. Filled in by hand, for `f32[4, 6]`:
//!
//! | layout | notation | offset of (2, 5) |
//! |---|---|---|
//! | row-major | `(4,6):(6,1)` | 17 |
//! | transposed | `(4,6):(1,4)` | 22 |
//! | columns in panels of 2 | `(4,(3,2)):(2,(8,1))` | 2*2 + 2*8 + 1 = 21 |
//!
//! So a weight packed for a matrix micro-kernel, channels in blocks of 16 for convolution
//! (`nChw16c`), a transposed view and a broadcast (stride 0) are all data about a tensor; the
//! program that reads it does not change. What it cannot represent: two levels of blocking on one
//! axis, swizzles (they belong to shared memory, not to tensors), views whose reshape is not
//! affine (those must be copied).

use crate::dim::Dim;
use std::fmt;
use std::str::FromStr;

/// The inner run of a blocked axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// Consecutive logical elements in one block; at least 1.
    pub size: i64,
    /// Distance between them, in elements.
    pub stride: Dim,
}

/// One axis of a layout.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Axis {
    /// Logical extent. A blocked axis may be allocated larger (rounded up to whole blocks).
    pub extent: Dim,
    /// Distance between neighbours, or between neighbouring blocks when blocked; 0 broadcasts.
    pub stride: Dim,
    /// The inner run, if blocked.
    pub block: Option<Block>,
}

/// Where each element of a tensor lies; see the module's head.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Layout {
    /// One per logical axis, outermost first.
    pub axes: Vec<Axis>,
    /// Offset of coordinate zero, in elements.
    pub offset: Dim,
}

/// Product of the extents.
pub fn numel(shape: &[Dim]) -> Dim {
    shape.iter().fold(Dim::new(1), |acc, d| acc * d)
}

/// The common shape under NumPy's rule: aligned right, 1 stretches. `None` when two sizes differ
/// and neither is 1. Two different symbolic sizes are taken as a conflict.
pub fn broadcast_shapes(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map(|j| s[j].clone());
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (Some(x), Some(y)) if x == y => Some(x),
            (Some(x), Some(y)) if x.is(1) => Some(y),
            (Some(x), Some(y)) if y.is(1) => Some(x),
            (Some(_), Some(_)) => None,
            (Some(x), None) | (None, Some(x)) => Some(x),
            (None, None) => None,
        })
        .collect()
}

impl Layout {
    /// Row-major without gaps.
    pub fn row_major(shape: &[Dim]) -> Layout {
        let mut stride = Dim::new(1);
        let mut axes: Vec<Axis> = Vec::with_capacity(shape.len());
        for extent in shape.iter().rev() {
            axes.push(Axis { extent: extent.clone(), stride: stride.clone(), block: None });
            stride = stride * extent;
        }
        axes.reverse();
        Layout { axes, offset: Dim::new(0) }
    }

    /// Row-major order with `axis` cut into blocks of `size` that lie innermost, e.g. channels in
    /// blocks of 16 (`nChw16c`). The blocked axis is allocated rounded up to whole blocks.
    pub fn blocked(shape: &[Dim], axis: usize, size: i64) -> Layout {
        let mut stride = Dim::new(size);
        let mut axes: Vec<Axis> = Vec::with_capacity(shape.len());
        for (i, extent) in shape.iter().enumerate().rev() {
            let block = (i == axis).then(|| Block { size, stride: Dim::new(1) });
            axes.push(Axis { extent: extent.clone(), stride: stride.clone(), block });
            let steps = if i == axis { extent.ceil_div(&Dim::new(size)) } else { extent.clone() };
            stride = stride * steps;
        }
        axes.reverse();
        Layout { axes, offset: Dim::new(0) }
    }

    /// `axis` cut into panels of `size` elements, the panels outermost and each row-major with the
    /// panel's elements innermost: how a GEMM micro-kernel wants its weights
    /// (`f32[K,N]` by columns in panels of 16: `(K,(N/16,16)):(16,(16*K,1))`).
    pub fn panels(shape: &[Dim], axis: usize, size: i64) -> Layout {
        let mut layout = Layout::blocked(shape, axis, size);
        let mut stride = Dim::new(size);
        for i in (0..shape.len()).rev().filter(|&i| i != axis) {
            layout.axes[i].stride = stride.clone();
            stride = stride * &shape[i];
        }
        layout.axes[axis].stride = stride;
        layout
    }

    /// As [`Layout::panels`], with `group` neighbours along the axis `depth` next to each other: how
    /// an instruction that multiplies pairs or quadruples of the depth wants its right operand
    /// (`bf16[K,N]` in panels of 16 and pairs: `((K/2,2),(N/16,16)):((32,1),(16*K,2))`). Both axes are
    /// allocated in whole blocks.
    pub fn grouped_panels(
        shape: &[Dim],
        axis: usize,
        size: i64,
        depth: usize,
        group: i64,
    ) -> Layout {
        let mut layout = Layout::row_major(shape);
        let mut stride = Dim::new(size * group);
        layout.axes[depth].block = Some(Block { size: group, stride: Dim::new(1) });
        layout.axes[depth].stride = stride.clone();
        stride = stride * shape[depth].ceil_div(&Dim::new(group));
        for i in (0..shape.len()).rev().filter(|&i| i != axis && i != depth) {
            layout.axes[i].stride = stride.clone();
            stride = stride * &shape[i];
        }
        layout.axes[axis].block = Some(Block { size, stride: Dim::new(group) });
        layout.axes[axis].stride = stride;
        layout
    }

    /// Logical extents.
    pub fn shape(&self) -> Vec<Dim> {
        self.axes.iter().map(|a| a.extent.clone()).collect()
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.axes.len()
    }

    /// Elements that must be allocated: one more than the largest offset, for non-negative
    /// strides; whole blocks are counted.
    pub fn alloc_elements(&self) -> Dim {
        let mut last = self.offset.clone();
        for a in &self.axes {
            match &a.block {
                None => last = last + (&a.extent - 1) * &a.stride,
                Some(b) => {
                    last = last + (a.extent.ceil_div(&Dim::new(b.size)) - 1) * &a.stride;
                    last = last + &b.stride * (b.size - 1);
                }
            }
        }
        last + 1
    }

    /// True for row-major without gaps and without offset.
    pub fn is_row_major(&self) -> bool {
        let plain = Layout::row_major(&self.shape());
        self.offset.is(0)
            && self
                .axes
                .iter()
                .zip(&plain.axes)
                .all(|(a, p)| a.extent.is(1) || (a.block.is_none() && a.stride == p.stride))
    }

    /// Offset of `index`, which has one entry per axis.
    pub fn offset_of(&self, index: &[Dim]) -> Dim {
        let mut offset = self.offset.clone();
        for (axis, x) in self.axes.iter().zip(index) {
            match &axis.block {
                None => offset = offset + x * &axis.stride,
                Some(b) => {
                    let size = Dim::new(b.size);
                    offset =
                        offset + x.floor_div(&size) * &axis.stride + x.modulo(&size) * &b.stride;
                }
            }
        }
        offset
    }

    /// Axis `i` of the result is axis `perm[i]` of this layout.
    pub fn permute(&self, perm: &[usize]) -> Layout {
        Layout {
            axes: perm.iter().map(|&p| self.axes[p].clone()).collect(),
            offset: self.offset.clone(),
        }
    }

    /// Coordinates `start + step * i`, `i < len`, of one axis. `None` when the axis is blocked and
    /// the slice is neither whole nor starts and ends on block boundaries.
    pub fn slice(&self, axis: usize, start: &Dim, len: &Dim, step: i64) -> Option<Layout> {
        let mut out = self.clone();
        let a = &mut out.axes[axis];
        match &a.block {
            None => {
                out.offset = &out.offset + start * &a.stride;
                a.stride = &a.stride * step;
            }
            Some(b) => {
                let blocks = start.exact_div(&Dim::new(b.size));
                match blocks {
                    Some(blocks) if step == 1 => out.offset = &out.offset + blocks * &a.stride,
                    _ => return None,
                }
            }
        }
        a.extent = len.clone();
        Some(out)
    }

    /// Broadcast to `shape` under NumPy's rule: new and stretched axes have stride 0.
    /// `None` when the shapes do not agree.
    pub fn expand(&self, shape: &[Dim]) -> Option<Layout> {
        let lead = shape.len().checked_sub(self.rank())?;
        let mut axes = Vec::with_capacity(shape.len());
        for (i, extent) in shape.iter().enumerate() {
            let stretched = Axis { extent: extent.clone(), stride: Dim::new(0), block: None };
            axes.push(match i.checked_sub(lead).map(|j| &self.axes[j]) {
                None => stretched,
                Some(a) if &a.extent == extent => a.clone(),
                Some(a) if a.extent.is(1) => stretched,
                Some(_) => return None,
            });
        }
        Some(Layout { axes, offset: self.offset.clone() })
    }

    /// The same elements in the same row-major order under another shape, as a view.
    /// `None` when that needs a copy (or when it cannot be seen from the symbols that it does not).
    pub fn reshape(&self, shape: &[Dim]) -> Option<Layout> {
        // Only extents other than 1 matter; axes of extent 1 get stride 0.
        let old: Vec<&Axis> = self.axes.iter().filter(|a| !a.extent.is(1)).collect();
        let mut axes: Vec<Axis> = Vec::with_capacity(shape.len());
        let (mut i, mut j) = (0, 0);
        while j < shape.len() {
            if shape[j].is(1) {
                axes.push(Axis { extent: Dim::new(1), stride: Dim::new(0), block: None });
                j += 1;
                continue;
            }
            let start_old = old.get(i)?;
            if start_old.extent == shape[j] {
                axes.push((*start_old).clone());
                i += 1;
                j += 1;
                continue;
            }
            // Take the shortest runs of old and new axes with equal products.
            let (mut old_end, mut new_end) = (i + 1, j + 1);
            let mut old_size = start_old.extent.clone();
            let mut new_size = shape[j].clone();
            while old_size != new_size {
                // Which side is behind: the one whose size divides the other.
                let grow_new = old_size.exact_div(&new_size).is_some()
                    || (new_size.exact_div(&old_size).is_none() && old_end >= old.len());
                if grow_new && new_end < shape.len() {
                    new_size = new_size * &shape[new_end];
                    new_end += 1;
                } else if old_end < old.len() {
                    old_size = old_size * &old[old_end].extent;
                    old_end += 1;
                } else if new_end < shape.len() {
                    new_size = new_size * &shape[new_end];
                    new_end += 1;
                } else {
                    return None;
                }
            }
            // The old run must be one affine axis: stride[k] == stride[k+1] * extent[k+1].
            if old[i..old_end].iter().any(|a| a.block.is_some()) {
                return None;
            }
            let affine =
                old[i..old_end].windows(2).all(|w| w[0].stride == &w[1].stride * &w[1].extent);
            if !affine {
                return None;
            }
            let mut stride = old[old_end - 1].stride.clone();
            let mut run: Vec<Axis> = Vec::new();
            for extent in shape[j..new_end].iter().rev() {
                run.push(Axis { extent: extent.clone(), stride: stride.clone(), block: None });
                stride = stride * extent;
            }
            axes.extend(run.into_iter().rev());
            i = old_end;
            j = new_end;
        }
        (i == old.len()).then(|| Layout { axes, offset: self.offset.clone() })
    }

    /// Replaces symbols in extents, strides and offset.
    pub fn substitute(&self, lookup: &dyn Fn(&str) -> Option<Dim>) -> Layout {
        Layout {
            axes: self
                .axes
                .iter()
                .map(|a| Axis {
                    extent: a.extent.substitute(lookup),
                    stride: a.stride.substitute(lookup),
                    block: a
                        .block
                        .as_ref()
                        .map(|b| Block { size: b.size, stride: b.stride.substitute(lookup) }),
                })
                .collect(),
            offset: self.offset.substitute(lookup),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, item: &dyn Fn(&Axis) -> String| {
            let parts: Vec<String> = self.axes.iter().map(item).collect();
            write!(f, "({})", parts.join(","))
        };
        list(f, &|a| match &a.block {
            None => a.extent.to_string(),
            Some(b) => format!("({},{})", a.extent.ceil_div(&Dim::new(b.size)), b.size),
        })?;
        f.write_str(":")?;
        list(f, &|a| match &a.block {
            None => a.stride.to_string(),
            Some(b) => format!("({},{})", a.stride, b.stride),
        })?;
        if !self.offset.is(0) {
            write!(f, "+{}", self.offset)?;
        }
        Ok(())
    }
}

/// Reads the notation. A blocked axis shows how many blocks it has, not where in the last block it
/// ends, so its extent comes out as whole blocks: `(4,(3,2)):(2,(8,1))` has the shape `[4, 6]`.
impl FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Layout, String> {
        let bad = || format!("`{text}` is not a layout like `(4,6):(6,1)`");
        let close = |text: &str| closing(text).filter(|_| text.starts_with('('));
        let extents = text.trim();
        let end = close(extents).ok_or_else(bad)?;
        let strides = extents[end + 1..].trim_start().strip_prefix(':').ok_or_else(bad)?;
        let (extents, strides) = (&extents[..=end], strides.trim_start());
        let end = close(strides).ok_or_else(bad)?;
        let offset = strides[end + 1..].trim();
        let offset = match (offset, offset.strip_prefix('+')) {
            ("", _) => Dim::new(0),
            (_, Some(offset)) => offset.parse()?,
            (_, None) => return Err(bad()),
        };
        let (extents, strides) = (items(extents), items(&strides[..=end]));
        if extents.len() != strides.len() {
            return Err(format!("{} extents and {} strides", extents.len(), strides.len()));
        }
        let axes = extents.iter().zip(strides).map(|(extent, stride)| {
            match (pair(extent), pair(stride)) {
                (Some((blocks, size)), Some((stride, inner))) => {
                    let size: Dim = size.parse()?;
                    let whole = size.as_const().filter(|&s| s >= 1);
                    let whole = whole.ok_or_else(|| format!("`{size}` is not a block size"))?;
                    Ok(Axis {
                        extent: blocks.parse::<Dim>()? * whole,
                        stride: stride.parse()?,
                        block: Some(Block { size: whole, stride: inner.parse()? }),
                    })
                }
                (None, None) => {
                    Ok(Axis { extent: extent.parse()?, stride: stride.parse()?, block: None })
                }
                _ => Err(format!("only one of `{extent}` and `{stride}` is blocked")),
            }
        });
        Ok(Layout { axes: axes.collect::<Result<_, String>>()?, offset })
    }
}

/// Where the parenthesis that the text opens with closes.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    text.char_indices().find_map(|(i, c)| {
        depth += usize::from(c == '(');
        depth = depth.saturating_sub(usize::from(c == ')'));
        (c == ')' && depth == 0).then_some(i)
    })
}

/// What stands between the commas of a parenthesised list.
fn items(list: &str) -> Vec<&str> {
    let inner = &list[1..list.len() - 1];
    if inner.trim().is_empty() {
        return Vec::new();
    }
    let (mut depth, mut start, mut out) = (0usize, 0, Vec::new());
    for (i, c) in inner.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                out.push(inner[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    out.push(inner[start..].trim());
    out
}

/// The two parts of `(a,b)`; `(N % 4)` is a size.
fn pair(item: &str) -> Option<(&str, &str)> {
    let whole = item.starts_with('(') && closing(item) == Some(item.len() - 1);
    match items(if whole { item } else { "()" }).as_slice() {
        &[a, b] => Some((a, b)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Post-condition of parsing: what prints is read back, blocked axes in whole blocks.
    #[test]
    fn layouts_are_read_back() {
        let (n, k) = (Dim::sym("N"), Dim::sym("K"));
        let shape = [n.clone(), &k * 3 + 1, Dim::new(48), n.modulo(&Dim::new(4))];
        let mut shifted = Layout::row_major(&shape).permute(&[3, 1, 0, 2]);
        shifted.offset = &n - 7;
        let mut before = Layout::row_major(&shape[..1]);
        before.offset = Dim::new(-3);
        for layout in [
            Layout::row_major(&[]),
            Layout::row_major(&shape),
            Layout::row_major(&shape).expand(&[&[k.clone()][..], &shape].concat()).unwrap(),
            Layout::blocked(&shape, 2, 16),
            Layout::panels(&[n.clone(), &k * 32], 1, 32),
            Layout::panels(&[n.min_with(&k), &k * 32, n.clone()], 1, 32),
            shifted,
            before,
        ] {
            let text = layout.to_string();
            assert_eq!(text.parse::<Layout>(), Ok(layout), "{text}");
        }
        // A last block that is not full keeps its place, but not its extent.
        let ragged = Layout::panels(&[n.clone(), k.clone()], 1, 16);
        let back: Layout = ragged.to_string().parse().unwrap();
        assert_eq!(back.to_string(), ragged.to_string());
        assert_eq!(back.axes[1].extent, k.ceil_div(&Dim::new(16)) * 16);
    }

    #[test]
    fn text_that_is_no_layout_is_an_error() {
        for text in [
            "",
            "(4)",
            "(4):",
            "(4):(1",
            "4:1",
            "(4,6):(6)",
            "(4):(1)+",
            "(4):(1)-3",
            "(4):(1)+3)",
            "((3,2)):(1)",
            "(6):((1,2))",
            "((3,0)):((1,2))",
            "((3,N)):((1,2))",
            "((3,2,1)):((1,2,3))",
            "(4,):(6,1)",
            "(€):(1)",
            "))((:",
        ] {
            assert!(text.parse::<Layout>().is_err(), "{text}");
        }
    }

    fn dims(sizes: &[i64]) -> Vec<Dim> {
        sizes.iter().map(|&d| Dim::new(d)).collect()
    }

    /// Offsets of all coordinates in row-major order.
    fn offsets(layout: &Layout) -> Vec<i64> {
        let shape: Vec<i64> = layout.axes.iter().map(|a| a.extent.as_const().unwrap()).collect();
        let total: i64 = shape.iter().product();
        (0..total)
            .map(|flat| {
                let mut rest = flat;
                let mut index = vec![Dim::new(0); shape.len()];
                for (i, extent) in shape.iter().enumerate().rev() {
                    index[i] = Dim::new(rest % extent);
                    rest /= extent;
                }
                layout.offset_of(&index).as_const().unwrap()
            })
            .collect()
    }

    #[test]
    fn the_table_in_the_head() {
        let at = dims(&[2, 5]);
        let row = Layout::row_major(&dims(&[4, 6]));
        assert_eq!(row.to_string(), "(4,6):(6,1)");
        assert_eq!(row.offset_of(&at), Dim::new(17));
        let transposed = Layout::row_major(&dims(&[6, 4])).permute(&[1, 0]);
        assert_eq!(transposed.offset_of(&at), Dim::new(22));
        let blocked = Layout::blocked(&dims(&[4, 6]), 1, 2);
        assert_eq!(blocked.to_string(), "(4,(3,2)):(6,(2,1))");
        let panels = Layout::panels(&dims(&[4, 6]), 1, 2);
        assert_eq!(panels.to_string(), "(4,(3,2)):(2,(8,1))");
        assert_eq!(panels.offset_of(&at), Dim::new(21));
        assert_eq!(panels.alloc_elements(), Dim::new(24));
    }

    /// Post-condition of reshape: the same offsets in the same order.
    #[test]
    fn reshape_keeps_offsets_in_order() {
        let base = Layout::row_major(&dims(&[2, 3, 4]));
        for shape in
            [&[6, 4][..], &[24], &[2, 12], &[2, 3, 2, 2], &[1, 2, 3, 4, 1], &[4, 6], &[8, 3]]
        {
            let view = base.reshape(&dims(shape)).unwrap();
            assert_eq!(offsets(&view), offsets(&base), "{shape:?}");
        }
        let swapped = base.permute(&[1, 0, 2]);
        assert_eq!(swapped.reshape(&dims(&[6, 4])), None);
        assert_eq!(offsets(&swapped.reshape(&dims(&[3, 2, 2, 2])).unwrap()), offsets(&swapped));
    }

    #[test]
    fn symbolic_heads_split_and_merge() {
        let (b, s) = (Dim::sym("B"), Dim::sym("S"));
        let x = Layout::row_major(&[b.clone(), s.clone(), Dim::new(384)]);
        let heads = x.reshape(&[b.clone(), s.clone(), Dim::new(12), Dim::new(32)]).unwrap();
        assert_eq!(heads.to_string(), "(B,S,12,32):(384*S,384,32,1)");
        let flat = x.reshape(&[&b * &s, Dim::new(384)]).unwrap();
        assert_eq!(flat.to_string(), "(B*S,384):(384,1)");
        assert!(heads.permute(&[0, 2, 1, 3]).reshape(&[b, s, Dim::new(384)]).is_none());
    }

    #[test]
    fn slices_and_broadcasts() {
        let x = Layout::row_major(&dims(&[4, 6]));
        assert_eq!(
            offsets(&x.slice(1, &Dim::new(1), &Dim::new(2), 3).unwrap()),
            [1, 4, 7, 10, 13, 16, 19, 22]
        );
        let row = Layout::row_major(&dims(&[3]));
        assert_eq!(offsets(&row.expand(&dims(&[2, 3])).unwrap()), [0, 1, 2, 0, 1, 2]);
        assert!(row.expand(&dims(&[2, 4])).is_none());
    }
}
