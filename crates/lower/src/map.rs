//! Elementwise kernels, copies among them.

use crate::block::{Dag, DagOp, Emit, KernelParts, Pos};
use crate::fuse::Group;
use crate::lowering::Lowering;
use crate::schedule::map_tiles;
use crate::views::{by_distance, inner_stride, is_broadcast, merge, nominal, partition};
use tilewright_base::{DType, Result};
use tilewright_layout::{Dim, Layout, numel};
use tilewright_plan::Note;
use tilewright_tile::CpuKnobs;

/// The block size of canonical axis `c` in any of the layouts.
pub(crate) fn block_of(layouts: &[&Layout], canon: &[usize]) -> Option<i64> {
    let blocks = layouts.iter().flat_map(|l| canon.iter().map(|&a| &l.axes[a]));
    blocks.filter(|a| !a.extent.is(1)).filter_map(|a| a.block.as_ref()).map(|b| b.size).min()
}

/// Extent of a canonical axis.
pub(crate) fn extent(shape: &[Dim], canon: &[usize]) -> Dim {
    canon.iter().fold(Dim::new(1), |n, &a| n * &shape[a])
}

impl Lowering<'_> {
    pub(crate) fn map_group(&mut self, group: &Group) -> Result<()> {
        let dag = self.dag(group)?;
        let (name, note) = (self.kernel_name(group), self.note(group));
        self.map_kernel(name, &dag, &group.shape, note)
    }

    /// A kernel that stores the results of `dag` for every coordinate of `shape`.
    pub(crate) fn map_kernel(
        &mut self,
        name: String,
        dag: &Dag,
        shape: &[Dim],
        note: Note,
    ) -> Result<()> {
        let symbols = &self.graph.symbols;
        let layouts = dag.layouts();
        let primary = &dag.stores[0].layout;
        let axes: Vec<usize> = (0..shape.len()).collect();
        let mut canon =
            partition(&by_distance(&axes, primary, symbols), &layouts, &|a| dag.solo(a));
        let transposed = move_other_near_axis(dag, &mut canon, symbols);
        let n = canon.len();
        let nominal_extent = |c: &[usize]| nominal(&extent(shape, c), symbols);
        let cols = canon.last().map_or(1, |c| nominal_extent(c));
        let rows = if n >= 2 { nominal_extent(&canon[n - 2]) } else { 1 };
        let block = canon.last().and_then(|c| block_of(&layouts, c));
        // Every element is read once: the processor sees that coming by itself.
        let knobs = CpuKnobs { ahead: false, ..self.memory_knobs(dag) };
        let shape_of = [transposed, knobs.stream && !self.on_gpu()];
        let (bm, bn) = map_tiles(self.target, rows, cols, block, shape_of);
        let bm = if n >= 2 { block_of(&layouts, &canon[n - 2]).unwrap_or(bm) } else { bm };
        // A tile that spans a blocked axis together with a long one would be scattered.
        let mut k = KernelParts::new(name, symbols);
        let mut tiles = Vec::new();
        let mut pos = Vec::new();
        for (c, group) in canon.iter().enumerate() {
            let extent = extent(shape, group);
            let size = match n - c {
                1 => Some(("BN", bn)),
                2 if bm > 1 || self.on_gpu() => Some(("BM", bm)),
                _ => None,
            };
            pos.push(match size {
                None => Pos::unit(k.grid(&format!("g{c}"), extent)),
                Some((name, size)) => {
                    let (tile, name) = k.tile(name);
                    tiles.push((name, size));
                    let index = k.grid(&format!("g{c}"), extent.ceil_div(&tile));
                    Pos::tile(index * &tile, tile)
                }
            });
        }
        if canon.is_empty() {
            k.grid("g0", Dim::new(1));
        }
        let mut emit = Emit::new(dag, &canon, pos);
        emit.store_all(&mut k);
        self.launch(k, tiles, knobs, note)
    }

    /// The knobs of a kernel that is bound by memory: results that no cache holds go past all of
    /// them, and operands that the second level does not hold are asked for ahead.
    pub(crate) fn memory_knobs(&self, dag: &Dag) -> CpuKnobs {
        let bytes = |layout: &Layout, dtype: DType| {
            let real = layout.axes.iter().filter(|a| !is_broadcast(a)).map(|a| a.extent.clone());
            let elements = nominal(&numel(&real.collect::<Vec<Dim>>()), &self.graph.symbols);
            elements.saturating_mul(dtype.size() as i64)
        };
        let stored =
            dag.stores.iter().map(|s| bytes(&s.layout, dag.nodes[s.node].dtype)).max().unwrap_or(0);
        let loaded = dag.nodes.iter().filter_map(|n| match &n.op {
            DagOp::Ext(e) => Some(bytes(&e.layout, n.dtype)),
            _ => None,
        });
        CpuKnobs {
            stream: stored > self.target.l3_bytes.min(HELD_BYTES),
            ahead: loaded.max().unwrap_or(0) > self.target.l2_bytes,
            ..self.knobs()
        }
    }
}

/// More than this is not written through a last-level cache, however large: with one of 300 MB that many cores share, a softmax
/// whose 67 MB of results go there took three times as long.
const HELD_BYTES: i64 = 32 << 20;

/// When the largest load is contiguous along another canonical axis than the store, moves that axis
/// next to the last one, so that both lie in the tile. Says whether it did.
fn move_other_near_axis(
    dag: &Dag,
    canon: &mut Vec<Vec<usize>>,
    symbols: &tilewright_layout::Symbols,
) -> bool {
    let loads = dag.nodes.iter().filter_map(|n| match &n.op {
        DagOp::Ext(e) => Some(&e.layout),
        _ => None,
    });
    let size = |l: &&Layout| {
        let real: Vec<Dim> =
            l.axes.iter().filter(|a| !is_broadcast(a)).map(|a| a.extent.clone()).collect();
        nominal(&numel(&real), symbols)
    };
    let Some(largest) = loads.max_by_key(size) else { return false };
    let Some(layout) = merge(largest, canon) else { return false };
    let near = (0..canon.len())
        .filter(|&c| !is_broadcast(&layout.axes[c]))
        .min_by_key(|&c| nominal(inner_stride(&layout.axes[c]), symbols).abs());
    match near {
        Some(c) if c + 1 < canon.len() && !is_broadcast(&layout.axes[canon.len() - 1]) => {
            let axis = canon.remove(c);
            canon.insert(canon.len() - 1, axis);
            true
        }
        _ => false,
    }
}
