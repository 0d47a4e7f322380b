//! Where the operands of a product lie: addresses that move linearly with the depth, the row or the
//! column, perhaps in blocks of one size. What has no such address is copied first.

use crate::emitter::{Emitter, Place};
use std::sync::Arc;
use tilewright_layout::{Dim, Range, linear_in, mentions};
use tilewright_tile::{TileId, TileOp};

/// How an operand's address moves with the depth index.
#[derive(Clone, Debug)]
pub(crate) struct DepthAccess {
    /// Distance between neighbours (inside a block).
    pub(crate) inner: Dim,
    /// Distance between blocks.
    pub(crate) outer: Dim,
}

/// How the left operand's address moves with the row.
#[derive(Clone, Debug)]
pub(crate) struct RowAccess {
    /// Distance between neighbours (inside a block).
    pub(crate) inner: Dim,
    /// Distance between blocks.
    pub(crate) outer: Dim,
    /// Rows come in blocks of this size: rows of an image.
    pub(crate) block: Option<i64>,
}

impl RowAccess {
    /// Most rows, up to `most`, of a group that a micro-kernel can take at constant distances:
    /// part of a block or whole blocks.
    pub(crate) fn group(&self, most: i64) -> i64 {
        match self.block {
            None => most,
            Some(size) if size <= most => most / size * size,
            Some(size) => (1..=most).rev().find(|r| size % r == 0).unwrap_or(1),
        }
    }

    /// Where row `i` lies.
    pub(crate) fn at(&self, i: &Dim) -> Dim {
        match self.block {
            None => &self.inner * i,
            Some(size) => {
                let size = Dim::new(size);
                i.floor_div(&size) * &self.outer + i.modulo(&size) * &self.inner
            }
        }
    }
}

impl Emitter<'_> {
    /// Splits an offset by the depth symbol. With `block` the depth is given as
    /// `block * outer + inner`.
    pub(crate) fn depth_access(
        &self,
        operand: TileId,
        coords: &dyn Fn(Dim) -> Vec<Dim>,
        depth: &str,
        blocks: &[i64],
    ) -> Option<(Place, DepthAccess, Dim, Option<i64>)> {
        let place = self.packed_view(operand, &coords(Dim::sym(depth)))?;
        if let Some((inner, rest)) = linear_in(&place.offset, depth) {
            let outer = Dim::new(0);
            return Some((place, DepthAccess { inner, outer }, rest, None));
        }
        for &size in blocks {
            let mut e = self.facts.clone();
            let bound = self.facts.bounds(&Dim::sym(depth)).max;
            e.declare("$kb", Range { min: 0, max: bound / size }, vec![]);
            e.declare("$ki", Range { min: 0, max: size - 1 }, vec![]);
            let split = Dim::sym("$kb") * size + Dim::sym("$ki");
            // Guards were checked with the plain symbol; only the address is split.
            let offset =
                e.simplify(&place.offset.substitute(&|s| (s == depth).then(|| split.clone())));
            if let Some((outer, rest)) = linear_in(&offset, "$kb")
                && let Some((inner, rest)) = linear_in(&rest, "$ki")
                && !mentions(&outer, "$ki")
            {
                return Some((place, DepthAccess { inner, outer }, rest, Some(size)));
            }
        }
        None
    }

    pub(crate) fn block_sizes(&self, operand: TileId) -> Vec<i64> {
        let mut sizes = Vec::new();
        let mut todo = vec![operand];
        while let Some(t) = todo.pop() {
            if let Some(op) = self.defs[t.index()] {
                if let TileOp::Load { param, .. } = op {
                    for axis in &self.k.params[*param].layout.axes {
                        sizes.extend(axis.block.as_ref().map(|b| b.size));
                    }
                } else if todo.len() < 16 {
                    // Axes that were merged into the depth.
                    if let TileOp::Reshape(x) = op {
                        let extents = self.extents(*x).unwrap_or_default();
                        sizes.extend(extents.into_iter().filter(|&e| e > 1));
                    }
                    todo.extend(crate::analyze::operands(op));
                }
            }
        }
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    #[allow(clippy::type_complexity, reason = "the parts of one address")]
    pub(crate) fn row_access(
        &self,
        tile: TileId,
        coords: &dyn Fn(Dim) -> Vec<Dim>,
        depth: &Arc<str>,
        row: &Arc<str>,
        blocks: &[i64],
    ) -> Option<(Place, DepthAccess, RowAccess, Dim, Option<i64>)> {
        let (place, access, rest, block) = self.depth_access(tile, coords, depth, blocks)?;
        if place.dtype.bits() < 8 {
            return None;
        }
        if [&access.inner, &access.outer].iter().any(|d| mentions(d, row) || mentions(d, depth)) {
            return None;
        }
        let clean = |d: &Dim| !mentions(d, row) && !mentions(d, depth);
        if let Some((inner, rest)) = linear_in(&rest, row) {
            let rows = RowAccess { inner, outer: Dim::new(0), block: None };
            return clean(&rows.inner).then_some((place, access, rows, rest, block));
        }
        for &size in blocks {
            let mut e = self.facts.clone();
            let bound = self.facts.bounds(&Dim::sym(row.clone())).max;
            e.declare("$rb", Range { min: 0, max: bound / size }, vec![]);
            e.declare("$ri", Range { min: 0, max: size - 1 }, vec![]);
            let split = Dim::sym("$rb") * size + Dim::sym("$ri");
            let at = e.simplify(&rest.substitute(&|s| (s == &**row).then(|| split.clone())));
            if let Some((outer, at)) = linear_in(&at, "$rb")
                && let Some((inner, at)) = linear_in(&at, "$ri")
                && !mentions(&outer, "$ri")
                && [&outer, &inner, &at].into_iter().all(clean)
            {
                let rows = RowAccess { inner, outer, block: Some(size) };
                return Some((place, access, rows, at, block));
            }
        }
        None
    }

    #[allow(clippy::type_complexity, reason = "the parts of one address")]
    pub(crate) fn column_access(
        &self,
        tile: TileId,
        column: &Arc<str>,
        col: &Arc<str>,
        depth: &Arc<str>,
        blocks: &[i64],
        group: i64,
    ) -> Option<(Place, DepthAccess, Dim, Dim, Option<i64>)> {
        let at = Dim::sym(column.clone());
        let coords = |k: Dim| vec![k, at.clone()];
        let (place, access, rest, block) = self.depth_access(tile, &coords, depth, blocks)?;
        let (stride, rest) = linear_in(&rest, col)?;
        // Within a group, neighbours of the depth lie together, and columns a group apart.
        let one_group = block.is_none()
            && self.facts.proves_non_negative(&(Dim::new(group - 1) - Dim::sym(depth.clone())));
        if group > 1 && !one_group && (block != Some(group) || !access.inner.is(1)) {
            return None;
        }
        if !stride.is(group) || [&access.inner, &access.outer].iter().any(|d| mentions(d, col)) {
            return None;
        }
        Some((place, access, stride, rest, block))
    }

    /// Reading whole panels past the last column stays inside the operand's memory.
    pub(crate) fn may_over_read(
        &self,
        _tile: TileId,
        place: Option<&Place>,
        width: i64,
        group: i64,
    ) -> bool {
        let Some(place) = place else { return false };
        let Some(param) = place.base.strip_prefix("%p").and_then(|p| p.parse::<u32>().ok()) else {
            // Scratch memory: only panels are wide enough.
            return false;
        };
        let layout = &self.k.params[tilewright_tile::ParamId(param)].layout;
        layout.axes.iter().any(|axis| {
            axis.block.as_ref().is_some_and(|b| b.stride.is(group) && b.size % width == 0)
        })
    }
}

/// True when so many rows at this distance fall into so few sets of the first-level cache (64 sets of 8 lines of
/// 64 bytes) that they evict each other. Copying then pays.
pub(crate) fn rows_crowd(place: &Place, stride: &Dim, rows: i64) -> bool {
    let bytes = stride.as_const().map_or(0, |s| s.saturating_mul(place.dtype.size() as i64));
    // Rows that begin at different places of a line spread over the sets as they go on.
    let lines = if bytes % 64 == 0 { bytes / 64 } else { 1 };
    let sets = 64 >> lines.trailing_zeros().min(6);
    place.base.starts_with("%p") && bytes >= 1024 && 2 * rows > 8 * sets
}

/// True when neighbours at this distance fall into the same few sets of the first-level cache (64
/// sets of 64 bytes), so that a handful of them evict each other. Copying then pays.
pub(crate) fn crowds(place: &Place, stride: &Dim) -> bool {
    let bytes = stride.as_const().map_or(0, |s| s.saturating_mul(place.dtype.size() as i64));
    place.base.starts_with("%p") && bytes >= 1024 && bytes % 512 == 0
}
