//! Whether a norm goes into the products that read it: the sooner of both, by the constants of the machine.
//!
//! ```text
//! apart:  one kernel reads the rows and writes them again
//! folded: sums of squares, from the product that makes the rows or from a kernel that reads them;
//!         one multiplication for each element of each product's result, which no tensor core hides
//! ```

use crate::cost::{MAP_SHARE, copy_ns};
use crate::fuse::time;
use crate::target::CpuTarget;
use crate::views::nominal;
use tilewright_graph::{Graph, NodeId, Op, ValueId};
use tilewright_layout::numel;
use tilewright_plan::PART_COLUMNS;

/// A norm with the products that read it, as a plan for a GPU has them.
#[derive(Clone, Copy, Debug)]
pub struct FoldedNorm<'a> {
    /// The norm.
    pub norm: NodeId,
    /// The products.
    pub products: &'a [NodeId],
    /// Bytes of an element as it is stored.
    pub bytes: usize,
    /// Products leave sums over the rows that they make.
    pub statistics: bool,
}

/// Estimated times of a norm, in nanoseconds at likely sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormTimes {
    /// As a part of the products.
    pub folded_ns: f64,
    /// As a kernel of its own.
    pub apart_ns: f64,
}

impl NormTimes {
    /// Whether folding is estimated to take less time.
    pub fn folds(&self) -> bool {
        self.folded_ns < self.apart_ns
    }
}

impl std::fmt::Display for NormTimes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (folded, apart) = (time(self.folded_ns), time(self.apart_ns));
        write!(f, "{folded} in them instead of {apart} in front")
    }
}

/// Whether a product's kernel makes a value: the product, or maps of its size behind it.
fn made_by_product(graph: &Graph, v: ValueId) -> bool {
    let Some(node) = graph.producer(v).map(|n| &graph.nodes[n]) else { return false };
    match &node.op {
        Op::Contract { .. } => true,
        Op::Map(_) => {
            let same = |i: &&ValueId| graph.shape(**i) == graph.shape(v);
            node.inputs.iter().filter(same).any(|&i| made_by_product(graph, i))
        }
        _ => false,
    }
}

/// Estimates both.
pub fn norm_times(graph: &Graph, target: &CpuTarget, folded: &FoldedNorm<'_>) -> NormTimes {
    let rows = graph.nodes[folded.norm].inputs[0];
    let size = |v: ValueId| nominal(&numel(graph.shape(v)), &graph.symbols) as f64;
    let elements = size(rows);
    let bytes = elements * folded.bytes as f64;
    let map_ns = |operations: f64| operations / (target.flops_per_second * MAP_SHARE) * 1e9;
    // A square and a sum for each element; parts are written once and read by each product.
    let parts = elements / PART_COLUMNS as f64 * 4.0;
    let times = 1.0 + folded.products.len() as f64;
    let sums = match folded.statistics && made_by_product(graph, rows) {
        true => map_ns(elements * 2.0) + copy_ns(target, parts * times) - target.launch_ns,
        false => copy_ns(target, bytes),
    };
    let results = folded.products.iter().map(|&n| size(graph.nodes[n].outputs[0]));
    let folded_ns = sums + map_ns(results.sum());
    NormTimes { folded_ns, apart_ns: copy_ns(target, 2.0 * bytes) }
}
