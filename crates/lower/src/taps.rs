//! What convolutions and pooling share: windows over spatial axes.
//!
//! Both compute over the result `[N, C, spatial...]`. A *tap* is one position of the window; the
//! elements that all outputs of a tile see through one tap are one strided load of the data, with
//! what lies outside filled.

use crate::block::{KernelParts, Pos};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{ParamId, TileId};

/// Window geometry, one entry per spatial axis.
#[derive(Clone, Debug)]
pub(crate) struct Geometry {
    pub(crate) kernel: Vec<i64>,
    pub(crate) strides: Vec<i64>,
    pub(crate) pads: Vec<i64>,
    pub(crate) dilations: Vec<i64>,
}

impl Geometry {
    /// Number of spatial axes.
    pub(crate) fn rank(&self) -> usize {
        self.kernel.len()
    }

    /// Number of taps.
    pub(crate) fn taps(&self) -> i64 {
        self.kernel.iter().product()
    }

    /// Every tap, the last axis fastest.
    pub(crate) fn each_tap(&self) -> Vec<Vec<i64>> {
        let mut taps = vec![vec![]];
        for &extent in &self.kernel {
            taps = taps
                .iter()
                .flat_map(|t| (0..extent).map(move |k| [t.as_slice(), &[k]].concat()))
                .collect();
        }
        taps
    }
}

/// Where a block stands: the axes in the order `N, spatial..., C`.
pub(crate) struct Stand {
    pub(crate) pos: Vec<Pos>,
}

impl Stand {
    pub(crate) fn channel(&self) -> &Pos {
        &self.pos[self.pos.len() - 1]
    }

    /// Extent of the tile along a position, 1 for a single element.
    pub(crate) fn len(pos: &Pos) -> Dim {
        pos.tile.clone().unwrap_or(Dim::new(1))
    }

    /// Loads what the outputs of this block see through `tap`, as a tile `[spatial tile axes..., C]`:
    /// channels `channel.start..`, coordinates outside the data read `fill`.
    pub(crate) fn load(
        &self,
        k: &mut KernelParts,
        x: ParamId,
        geometry: &Geometry,
        tap: &[Dim],
        channel: &Pos,
        fill: Value,
    ) -> TileId {
        let mut index = vec![self.pos[0].start.clone(), channel.start.clone()];
        let mut steps = vec![1, 1];
        let mut shape = vec![Dim::new(1), Stand::len(channel)];
        let mut flat: Vec<Dim> = channel.tile.clone().into_iter().collect();
        for (i, tap) in tap.iter().enumerate() {
            let pos = &self.pos[1 + i];
            let start = &pos.start * geometry.strides[i] + tap * geometry.dilations[i];
            index.push(start - geometry.pads[i]);
            steps.push(geometry.strides[i]);
            shape.push(Stand::len(pos));
            flat.extend(pos.tile.clone());
        }
        let tile = k.b.load_with(x, index, steps, fill, shape);
        let rank = flat.len();
        let tile = k.b.reshape(tile, flat);
        if channel.tile.is_none() || rank < 2 {
            return tile;
        }
        // The channel last.
        let perm: Vec<usize> = (1..rank).chain([0]).collect();
        k.b.permute(tile, &perm)
    }
}
