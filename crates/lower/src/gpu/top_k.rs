//! The largest or smallest elements of rows as a kernel of a GPU.
//!
//! The program is [`TopK`]'s, which the lowering to devices knows: one pass over rows of any length. More elements than
//! its candidates have room for are the host's.

use crate::block::KernelParts;
use crate::lowering::Lowering;
use tilewright_base::{DType, Result};
use tilewright_graph::{NodeId, Op};
use tilewright_layout::{Dim, Layout, numel};
use tilewright_plan::{BufferId, Note};
use tilewright_tile::TopK;

/// The longest rows, whose positions are 32-bit numbers, and the most elements of each.
const LONGEST: i64 = 1 << 30;
const MOST: i64 = 64;

/// Rows and columns, and how many are wanted.
struct Sizes {
    rows: Dim,
    cols: Dim,
    count: Dim,
    largest: bool,
}

impl Lowering<'_> {
    fn top_k_sizes(&self, id: NodeId) -> Option<Sizes> {
        let node = &self.graph.nodes[id];
        let Op::TopK { axis, k, largest } = &node.op else { return None };
        let x = node.inputs[0];
        let shape = self.graph.shape(x);
        let float = matches!(self.graph.dtype(x), DType::F32 | DType::F16 | DType::BF16);
        let within = |d: &Dim, most: i64| d.as_const().is_some_and(|v| (1..=most).contains(&v));
        let fits = float
            && within(k, MOST)
            && within(&shape[*axis], LONGEST)
            && shape[axis + 1..].iter().all(|d| d.is(1));
        fits.then(|| Sizes {
            rows: numel(&shape[..*axis]),
            cols: shape[*axis].clone(),
            count: k.clone(),
            largest: *largest,
        })
    }

    /// A kernel that finds the largest (or smallest) elements of rows in row-major buffers: values and positions, in their
    /// order. False: it is the host's.
    pub(crate) fn top_k(
        &mut self,
        id: NodeId,
        (inputs, outputs): (&[BufferId], &[BufferId]),
        note: &Note,
    ) -> Result<bool> {
        let ([x], [values, places]) = (inputs, outputs) else { return Ok(false) };
        let sizes = if self.on_gpu() { self.top_k_sizes(id) } else { None };
        let Some(sizes) = sizes else { return Ok(false) };
        let dtype = self.graph.dtype(self.graph.nodes[id].inputs[0]);
        let mut k = KernelParts::new(format!("top_k_{id}"), &self.graph.symbols);
        let plane = |cols: &Dim| Layout::row_major(&[sizes.rows.clone(), cols.clone()]);
        let x = k.input(*x, dtype, plane(&sizes.cols));
        let values = k.output(*values, dtype, plane(&sizes.count));
        let places = k.output(*places, DType::I64, plane(&sizes.count));
        let ((bm, bm_name), (bn, bn_name)) = (k.tile("BM"), k.tile("BN"));
        let row0 = k.grid("p", sizes.rows.ceil_div(&bm)) * &bm;
        let turn = k.fresh("turn");
        let top = TopK { x, values, places, count: sizes.count.clone(), largest: sizes.largest };
        top.write(&mut k.b, &turn, (&bm, &bn, &row0));
        let tiles = vec![(bm_name, 1), (bn_name, sizes.cols.as_const().unwrap_or(1))];
        let knobs = self.knobs();
        self.launch_forms(k, tiles, knobs, Vec::new(), note.clone())?;
        Ok(true)
    }
}
