//! What lowering for a GPU does differently.
//!
//! The same groups become the same tile programs, all of them row-major. Tile sizes are left to those who
//! pick schedules once the sizes are known, and beside the tile program stand the forms that they choose
//! among ([`Form`]):
//!
//! * a contraction is a [`Product`] when its operands are matrices and its epilogue reads at most a vector
//!   along the columns, one along the rows and a matrix that lies as the result. What does not fit is made to
//!   fit: the epilogue becomes a kernel of its own ([`Lowering::product_apart`]), operands are copied into
//!   matrices ([`Lowering::product_packed`]);
//! * attention is an [`Attention`](tilewright_plan::Attention) (`attention.rs`);
//! * a convolution is such a product whose left operand is read through windows (`windows.rs`), or with its data in another
//!   order (`patches`), or with a copy of its windows (`copied_windows.rs`; `im2col` for weights that are no constants);
//! * two products of one operand, one of which multiplies the other's result, are one kernel (`pairs.rs`);
//! * sums over rows, the statistics of norms, are left by the product that makes the rows (`statistics.rs`);
//! * the few largest elements of rows are found by a kernel (`top_k.rs`), and what stands at computed places is read or written by
//!   one (`places.rs`);
//! * attention with its log-sum-exp and gradients are the library's (`library.rs`);
//! * a reduction over rows is also given with whole rows in a tile (`rows.rs`).
//!
//! Under `f16` and `bf16`, weights and what is computed from them are *stored* in that type: kernels widen
//! what they load and round what they store, so sums and statistics stay `f32`. Values that depend on no
//! weight (positions, masks) and the caller's inputs and outputs keep their type.

mod attention;
mod copied_windows;
mod library;
mod pairs;
mod places;
mod statistics;
mod top_k;
mod windows;

pub(crate) use attention::Attended;
pub use attention::attention_fits;
pub(crate) use pairs::pair_products;
pub(crate) use statistics::{RowSum, row_sum, sums_from_products};
pub(crate) use windows::{WindowForm, channels_last};

use crate::block::{Dag, DagOp, DagStore, Ext, KernelParts, zero};
use crate::contract::{Product, Side};
use crate::conv::Conv;
use crate::lowering::Lowering;
use crate::place::Place;
use crate::prologue::Computed;
use crate::views::{broadcast_axis, by_distance, is_broadcast, merge};
use crate::{Device, Options};
use std::collections::BTreeSet;
use tilewright_base::{DType, Result};
use tilewright_expr::{ExprId, Func, FuncBuilder, Op as ExprOp};
use tilewright_graph::{Def, Graph, Op, ValueId};
use tilewright_layout::{Axis, Dim, Layout, numel};
use tilewright_plan::{
    Buffer, BufferId, Depth, Form, Matrix, Note, Product as Multiplied, Prologue, Repeat, Storage,
    Vector,
};
use tilewright_target::Precision;

/// The copy engine takes rows of whole units of so many bytes.
const ROW_BYTES: i64 = 16;
/// Rows of copies begin at lines of the caches.
const CACHE_LINE: i64 = 128;
/// Elements from which an operand of several products is copied once rather than by each: less costs no more than a launch.
const SHARED_COPY_ELEMENTS: i64 = 1 << 18;

/// Values that are stored in 16 bits: weights that are no vectors, and what is computed from them.
pub(crate) fn narrow_values(graph: &Graph, options: &Options) -> BTreeSet<ValueId> {
    let narrow = matches!(options.precision, Precision::F16 | Precision::Bf16);
    let mut found = BTreeSet::new();
    if options.device != Device::Gpu || !narrow {
        return found;
    }
    for (v, value) in graph.values.iter() {
        let matrix = value.ty.shape.iter().filter(|d| !d.is(1)).count() >= 2;
        if matches!(value.def, Def::Const(_)) && value.ty.dtype == DType::F32 && matrix {
            found.insert(v);
        }
    }
    let statistics = statistics(graph);
    for (_, node) in graph.live() {
        if node.inputs.iter().any(|v| found.contains(v)) {
            let wide = |v: &ValueId| graph.dtype(*v) == DType::F32 && !statistics.contains(v);
            found.extend(node.outputs.iter().filter(|v| wide(v)));
        }
    }
    found
}

/// One number for each row: sums over the last axis, and what is computed from such alone, as far as maps alone read them. A rounded one
/// would move its whole row.
fn statistics(graph: &Graph) -> BTreeSet<ValueId> {
    let mut found: BTreeSet<ValueId> = BTreeSet::new();
    for (_, node) in graph.live() {
        let is_one = match &node.op {
            Op::Reduce { axes, keep, .. } => {
                *keep && axes.last().is_some_and(|a| a + 1 == graph.shape(node.inputs[0]).len())
            }
            Op::Map(_) => {
                let number = |v: &ValueId| graph.shape(*v).is_empty();
                let of = |v: &ValueId| found.contains(v) || number(v);
                node.inputs.iter().all(of) && !node.inputs.iter().all(number)
            }
            _ => false,
        };
        if is_one {
            found.extend(&node.outputs);
        }
    }
    for (_, node) in graph.live() {
        if !matches!(node.op, Op::Map(_)) {
            for v in &node.inputs {
                found.remove(v);
            }
        }
    }
    found
}

/// Why a product has no form as matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Misfit {
    /// Its types.
    Types,
    /// Its epilogue, or how its result lies.
    Result,
    /// How its operands lie.
    Operands,
}

/// What was already done to make a product fit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tried {
    /// Its epilogue is a kernel of its own.
    pub(crate) apart: bool,
    /// Its operands are copies.
    pub(crate) packed: bool,
}

/// A product in its kernel: canonical axes are `units` grid axes, rows, columns, and sums.
pub(crate) struct Written<'a> {
    pub(crate) parts: &'a KernelParts,
    pub(crate) sides: &'a [Side; 2],
    pub(crate) computed: &'a [Option<Computed>; 2],
    /// Over the whole space.
    pub(crate) dag: &'a Dag,
    pub(crate) space: &'a [Dim],
    pub(crate) canon: &'a [Vec<usize>],
    pub(crate) units: usize,
}

/// What to do with a product on a GPU.
pub(crate) enum Fit {
    /// Launch it with these forms.
    Forms(Vec<Form>),
    /// First make its epilogue a kernel of its own.
    Apart,
    /// First copy its operands.
    Packed,
    /// First compute its operands in kernels of their own.
    Uncomputed,
}

impl Lowering<'_> {
    /// Whether the plan is for a GPU.
    pub(crate) fn on_gpu(&self) -> bool {
        self.device == Device::Gpu
    }

    /// The type in which an intermediate value or a constant is stored.
    pub(crate) fn stored_type(&self, v: ValueId) -> DType {
        match (self.precision, self.narrow.contains(&v)) {
            (Precision::F16, true) => DType::F16,
            (Precision::Bf16, true) => DType::BF16,
            _ => self.graph.dtype(v),
        }
    }

    /// An operand of a product in the type in which it is multiplied, where it is stored in another.
    pub(crate) fn operand_place(&mut self, v: ValueId, wanted: DType) -> Result<Place> {
        let place = self.place(v)?;
        let stored = self.plan.buffers[place.buffer].dtype;
        if !self.on_gpu() || stored == wanted {
            return Ok(place);
        }
        if self.graph.as_const(v).is_some() {
            return Ok(self.const_place_as(v, wanted, Layout::row_major(self.graph.shape(v))));
        }
        self.row_major_copy_as(v, wanted, &place)
    }

    /// Whether a constant matrix is to lie with neighbours along `axis`, the lines of a result, next to each other: so plain
    /// multiply-adds read their right operand, and every run would turn it. Matrices that others read as well stay.
    fn turns(&self, v: ValueId, axis: usize, dtype: DType) -> bool {
        let shape = self.graph.shape(v);
        let real = shape.iter().filter(|d| !d.is(1)).count() >= 2;
        let whole = shape[axis].as_const().is_some_and(|n| n > 1 && n % 4 == 0);
        let near = shape[axis + 1..].iter().all(|d| d.is(1));
        self.on_gpu()
            && self.precision == Precision::F32
            && [dtype, self.graph.dtype(v)] == [DType::F32; 2]
            && self.graph.as_const(v).is_some()
            && self.users[v].len() == 1
            && real
            && whole
            && !near
    }

    /// Such a matrix, turned when the plan is loaded.
    pub(crate) fn turned_weight(
        &mut self,
        v: ValueId,
        axis: usize,
        dtype: DType,
    ) -> Result<Option<Place>> {
        if !self.turns(v, axis, dtype) {
            return Ok(None);
        }
        let shape = self.graph.shape(v).to_vec();
        let order: Vec<usize> = (0..shape.len()).filter(|&a| a != axis).chain([axis]).collect();
        let permuted: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
        let layout = Layout::row_major(&permuted).permute(&crate::conv::inverse(&order));
        let place = self.place(v)?;
        self.copy_as(v, dtype, &place, layout).map(Some)
    }

    /// An operand of several products whose rows the copy engine does not take, in rows that it does: copied once, where each
    /// product would copy it for itself.
    pub(crate) fn aligned_copy(&mut self, v: ValueId, dtype: DType) -> Result<Option<Place>> {
        let root = crate::fuse::root(self.graph, v);
        if !self.on_gpu() || self.graph.as_const(root).is_some() || dtype.bits() != 16 {
            return Ok(None);
        }
        let sizes: Option<Vec<i64>> = self.graph.shape(root).iter().map(Dim::as_const).collect();
        let sizes = sizes.unwrap_or_default();
        let Some(columns) = sizes.last() else { return Ok(None) };
        let (size, elements) = (dtype.size() as i64, sizes.iter().product::<i64>());
        if columns * size % ROW_BYTES == 0 || elements < SHARED_COPY_ELEMENTS {
            return Ok(None);
        }
        let of_root = |operand: &ValueId| crate::fuse::root(self.graph, *operand) == root;
        let products = self.graph.live().filter(|(_, n)| matches!(n.op, Op::Contract { .. }));
        if products.filter(|(_, n)| n.inputs.iter().any(of_root)).count() < 2 {
            return Ok(None);
        }
        let from = self.place(root)?;
        let plain = from.layout.is_row_major() && self.plan.buffers[from.buffer].dtype == dtype;
        let padded = (columns * size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE / size;
        let mut layout = from.layout.clone();
        let mut stride = 1;
        for (axis, extent) in sizes.iter().enumerate().rev() {
            layout.axes[axis].stride = Dim::new(stride);
            stride *= if stride == 1 { padded } else { *extent };
        }
        // The same views of the copy, as far as they are views.
        let mut chain = Vec::new();
        let mut at = v;
        while at != root {
            let Some(node) = self.graph.producer(at) else { return Ok(None) };
            chain.push(self.graph.nodes[node].op.clone());
            at = self.graph.nodes[node].inputs[0];
        }
        let mut seen = Some(layout.clone());
        for op in chain.iter().rev() {
            seen = seen.and_then(|layout| crate::place::view(op, &layout));
        }
        let Some(seen) = seen.filter(|_| plain) else { return Ok(None) };
        let copy = self.copy_as(root, dtype, &from, layout)?;
        Ok(Some(Place { buffer: copy.buffer, layout: seen }))
    }

    /// How a GPU is to run a product.
    pub(crate) fn fit(&self, product: &Product, written: &Written<'_>, tried: Tried) -> Fit {
        match self.product_form(product, written) {
            Ok(form) => Fit::Forms(vec![Form::Product(Box::new(form))]),
            Err(_) if product.computed.iter().any(Option::is_some) => Fit::Uncomputed,
            Err(Misfit::Result) if !tried.apart => Fit::Apart,
            Err(Misfit::Operands) if !tried.packed => Fit::Packed,
            Err(_) => Fit::Forms(vec![]),
        }
    }

    fn product_form(
        &self,
        product: &Product,
        written: &Written<'_>,
    ) -> std::result::Result<tilewright_plan::Product, Misfit> {
        let Written { parts, sides, computed, dag, space, canon, units } = written;
        let left = if computed[0].is_some() { product.operands.left } else { sides[0].dtype };
        let types = [left, sides[1].dtype];
        // Right operands come from memory.
        if computed[1].is_some() {
            return Err(Misfit::Operands);
        }
        let float = matches!(types[0], DType::F32 | DType::F16 | DType::BF16);
        let sums = if float { DType::F32 } else { DType::I32 };
        let known = float || types[0] == DType::I8;
        if types[0] != types[1] || !known || product.operands.acc != sums {
            return Err(Misfit::Types);
        }
        if canon.len() != units + 3 {
            return Err(Misfit::Operands);
        }
        let (m, n, k) = (*units, units + 1, units + 2);
        let extent = |c: usize| crate::map::extent(space, &canon[c]);
        let merged = |layout: &Layout| merge(layout, canon).filter(no_blocks);
        let stride = |l: &Layout, c: usize| match is_broadcast(&l.axes[c]) {
            true => Dim::new(0),
            false => l.axes[c].stride.clone(),
        };
        let param = |buffer: BufferId| parts.args.iter().position(|b| *b == buffer);
        let matrix = |l: &Layout, buffer: BufferId, dtype: DType, row: usize, col: usize| {
            let line = |c: usize| l.axes[c].stride.is(1) || extent(c).is(1);
            (line(row) || line(col)).then_some(())?;
            let (offset, row, col) = (l.offset.clone(), stride(l, row), stride(l, col));
            Some(Matrix { param: param(buffer)?, dtype, offset, row, col })
        };
        let [lhs, rhs] = [&sides[0], &sides[1]].map(|s| merged(&s.layout));
        let (lhs, rhs) = lhs.zip(rhs).ok_or(Misfit::Operands)?;
        let a = matrix(&lhs, sides[0].buffer, sides[0].dtype, m, k).ok_or(Misfit::Operands)?;
        let b = matrix(&rhs, sides[1].buffer, types[1], k, n).ok_or(Misfit::Operands)?;
        let [store] = dag.stores.as_slice() else { return Err(Misfit::Result) };
        let out = merged(&store.layout).ok_or(Misfit::Result)?;
        let result = dag.nodes[store.node].dtype;
        let c = matrix(&out, store.buffer, result, m, n).ok_or(Misfit::Result)?;
        let mut form = Multiplied {
            m: extent(m),
            n: extent(n),
            k: extent(k),
            repeat: (0..*units)
                .map(|u| Repeat {
                    extent: extent(u),
                    strides: [stride(&lhs, u), stride(&rhs, u), stride(&out, u)],
                })
                .collect(),
            a,
            windows: None,
            prologue: None,
            b,
            c,
            tf32: self.precision == Precision::Tf32 && types[0] == DType::F32,
            sum: sums,
            epilogue: Func::identity(sums),
            cols: None,
            rows: None,
            residual: None,
            second: None,
            row_sums: None,
            leaves: None,
        };
        epilogue_of(dag, canon, (m, n), &out, &param, &mut form)?;
        if let Some(c) = &computed[0] {
            form.prologue = Some(prologue_of(c, canon, &lhs, (sides[0].buffer, left), &param)?);
        }
        Ok(form)
    }

    /// A product whose computed operands are made by kernels of their own.
    pub(crate) fn product_uncomputed(
        &mut self,
        name: &str,
        product: &Product,
        dag: &Dag,
        note: Note,
        tried: Tried,
    ) -> Result<()> {
        let mut sides = [product.lhs.clone(), product.rhs.clone()];
        let types = [product.operands.left, product.operands.right];
        for (i, computed) in product.computed.iter().enumerate() {
            let Some(c) = computed else { continue };
            let axes: Vec<usize> = (0..product.space.len()).filter(|&a| c.varies(a)).collect();
            let shape: Vec<Dim> = axes.iter().map(|&a| product.space[a].clone()).collect();
            let kept = |layout: &Layout| Layout {
                axes: axes.iter().map(|&a| layout.axes[a].clone()).collect(),
                offset: layout.offset.clone(),
            };
            let mut own = c.dag.clone();
            for node in &mut own.nodes {
                node.axes = axes.iter().map(|&a| node.axes[a]).collect();
                if let DagOp::Ext(ext) = &mut node.op {
                    ext.layout = kept(&ext.layout);
                }
            }
            let layout = dense_like(&kept(&sides[i].layout), &shape, &self.graph.symbols);
            let buffer = self.spare(format!("{name} operand"), types[i], layout.clone());
            let mut node = c.node;
            let from = own.nodes[node].dtype;
            if from != types[i] {
                let cast = Func::cast(from, types[i]);
                node = own.push(DagOp::Map(cast), vec![node], vec![true; axes.len()], types[i]);
            }
            own.stores.push(DagStore { node, buffer, layout: layout.clone() });
            let bytes = numel(&shape) * (2 * types[i].size() as i64);
            let label = format!("{} operand", note.label);
            let note = Note { label, anchor: "map".to_string(), bytes, ..Note::default() };
            self.map_kernel(format!("{name}_operand"), &own, &shape, note)?;
            sides[i] = Side { buffer, dtype: types[i], layout: product.repeated(&axes, layout) };
        }
        let [lhs, rhs] = sides;
        let plain = product.between(lhs, rhs);
        self.product_tried(name.to_string(), &plain, dag, note, tried)
    }

    /// A product whose sums go to memory of their own, and its epilogue as a kernel. Where all of the epilogue reads the sums rounded to a
    /// narrower type, that is what is stored, in the result's memory if it is one.
    pub(crate) fn product_apart(
        &mut self,
        name: &str,
        product: &Product,
        dag: &Dag,
        note: Note,
        tried: Tried,
    ) -> Result<()> {
        let shape = product.space[..product.result_axes].to_vec();
        let mut rest = dag.clone();
        let rounded = only_rounding(dag);
        let dtype = rounded.map_or(product.dtype, |c| dag.nodes[c].dtype);
        let dense = |l: &Layout| dense_like(l, &shape, &self.graph.symbols);
        // A result that is the sums themselves.
        let own =
            dag.stores.iter().position(|s| Some(s.node) == rounded && dense(&s.layout) == s.layout);
        let (buffer, layout) = match own {
            Some(i) => {
                let store = rest.stores.remove(i);
                (store.buffer, store.layout)
            }
            None => {
                let layout = dense(&dag.stores[0].layout);
                (self.spare(format!("{name} sums"), dtype, layout.clone()), layout)
            }
        };
        let mut plain = Dag::default();
        let varies = vec![true; shape.len()];
        let node = plain.push(DagOp::Anchor, vec![], varies, product.dtype);
        let node = plain.cast(node, dtype);
        plain.stores.push(DagStore { node, buffer, layout: layout.clone() });
        let label = format!("{} epilogue", note.label);
        self.product_tried(
            name.to_string(),
            product,
            &plain,
            note,
            Tried { apart: true, ..tried },
        )?;
        if rest.stores.is_empty() {
            return Ok(());
        }
        let read = Ext { buffer, dtype, layout, shift: None, fill: zero(dtype) };
        for (i, node) in rest.nodes.iter_mut().enumerate() {
            let anchor = matches!(node.op, DagOp::Anchor);
            if rounded.map_or(anchor, |c| c == i) {
                (node.op, node.args) = (DagOp::Ext(read.clone()), vec![]);
            } else if anchor {
                // Read by nobody now.
                node.op = DagOp::Size(Dim::new(0));
            }
        }
        let bytes = numel(&shape) * (2 * dtype.size() as i64);
        let note = Note { label, anchor: "map".to_string(), bytes, ..Note::default() };
        self.map_kernel(format!("{name}_epilogue"), &rest, &shape, note)
    }

    /// A product of copies of its operands: rows, then sums, each in row-major order.
    pub(crate) fn product_packed(
        &mut self,
        name: &str,
        product: &Product,
        dag: &Dag,
        note: Note,
        tried: Tried,
    ) -> Result<()> {
        let result: Vec<usize> = (0..product.result_axes).collect();
        let mut order = by_distance(&result, &dag.stores[0].layout, &self.graph.symbols);
        order.extend(product.result_axes..product.space.len());
        let operands = [product.operands.left, product.operands.right];
        let mut sides = Vec::new();
        for (side, dtype) in [&product.lhs, &product.rhs].into_iter().zip(operands) {
            let axes: Vec<usize> =
                order.iter().copied().filter(|&a| !is_broadcast(&side.layout.axes[a])).collect();
            let shape: Vec<Dim> = axes.iter().map(|&a| product.space[a].clone()).collect();
            let to = Layout::row_major(&shape);
            let from = Layout {
                axes: axes.iter().map(|&a| side.layout.axes[a].clone()).collect(),
                offset: side.layout.offset.clone(),
            };
            let stored = self.plan.buffers[side.buffer].dtype;
            let buffer = match stored == dtype && from == to {
                true => side.buffer,
                false => {
                    let buffer = self.spare(format!("{name} operand"), dtype, to.clone());
                    self.copy_step(
                        &Place { buffer: side.buffer, layout: from },
                        &Place { buffer, layout: to.clone() },
                        name,
                    )?;
                    buffer
                }
            };
            sides.push(Side { buffer, dtype, layout: product.repeated(&axes, to) });
        }
        let (Some(rhs), Some(lhs)) = (sides.pop(), sides.pop()) else { return Ok(()) };
        let packed = product.between(lhs, rhs);
        self.product_tried(name.to_string(), &packed, dag, note, Tried { packed: true, ..tried })
    }

    /// A convolution whose windows do not overlap, as a product with its data in another order: `X[n, outputs, (c, taps)]`.
    pub(crate) fn patches(
        &mut self,
        name: String,
        conv: &Conv<'_>,
        dag: &Dag,
        note: Note,
    ) -> Result<()> {
        let (x, w) = (conv.node.inputs[0], conv.node.inputs[1]);
        let dtype = self.graph.dtype(w);
        let operand = self.operand_type(dtype);
        let (data, weights) = (self.place(x)?, self.operand_place(w, operand)?);
        let rank = conv.geometry.rank();
        // Axes: n, o, outputs..., then c, taps....
        let mut space = conv.shape.to_vec();
        space.extend(conv.w[1..].iter().map(|&extent| Dim::new(extent)));
        let result_axes = conv.shape.len();
        let of = |extent: &Dim, stride: Dim| Axis { extent: extent.clone(), stride, block: None };
        let (xs, ws) = (&data.layout.axes, &weights.layout.axes);
        let all = || -> Vec<Axis> { space.iter().map(|d| broadcast_axis(d.clone())).collect() };
        let (mut lhs, mut rhs) = (all(), all());
        lhs[0] = of(&space[0], xs[0].stride.clone());
        rhs[1] = of(&space[1], ws[0].stride.clone());
        for i in 0..rank {
            lhs[2 + i] = of(&space[2 + i], &xs[2 + i].stride * conv.geometry.strides[i]);
        }
        for i in 0..=rank {
            let at = result_axes + i;
            lhs[at] = of(&space[at], xs[1 + i].stride.clone());
            rhs[at] = of(&space[at], ws[1 + i].stride.clone());
        }
        let side = |place: &Place, axes: Vec<Axis>| Side {
            buffer: place.buffer,
            dtype: operand,
            layout: Layout { axes, offset: place.layout.offset.clone() },
        };
        let product = Product {
            result_axes,
            lhs: side(&data, lhs),
            rhs: side(&weights, rhs),
            computed: [None, None],
            operands: self.conv_operands(dtype),
            dtype,
            space,
            scaled: None,
        };
        self.product_packed(&name, &product, dag, note, Tried::default())
    }

    /// A convolution as a product with a copy of its windows: `X[n, g, (c, taps), outputs]`.
    pub(crate) fn im2col(
        &mut self,
        name: String,
        conv: &Conv<'_>,
        dag: &Dag,
        note: Note,
    ) -> Result<()> {
        let graph = self.graph;
        let (x, w) = (conv.node.inputs[0], conv.node.inputs[1]);
        let dtype = graph.dtype(w);
        let operand = self.operand_type(dtype);
        let padded = self.padded(conv, crate::conv::Padded::RowMajor)?;
        let weights = self.operand_place(w, operand)?;
        let (groups, rank) = (conv.attrs.groups, conv.geometry.rank());
        let (outputs, channels) = (conv.w[0] / groups, conv.w[1]);
        // Axes: n, g, o, outputs..., then c, taps....
        let (images, spatial) = (conv.shape[0].clone(), conv.shape[2..].to_vec());
        let mut space = vec![images.clone(), Dim::new(groups), Dim::new(outputs)];
        space.extend(spatial.iter().cloned());
        let result_axes = space.len();
        space.push(Dim::new(channels));
        space.extend(conv.w[2..].iter().map(|&t| Dim::new(t)));
        let of = |extent: &Dim, stride: &Dim, times: i64| Axis {
            extent: extent.clone(),
            stride: stride * times,
            block: None,
        };
        let xs = &padded.layout.axes;
        // The windows: n, g, c, taps, outputs.
        let mut windows = vec![
            of(&images, &xs[0].stride, 1),
            of(&Dim::new(groups), &xs[1].stride, channels),
            of(&Dim::new(channels), &xs[1].stride, 1),
        ];
        for i in 0..rank {
            let tap = Dim::new(conv.w[2 + i]);
            windows.push(of(&tap, &xs[2 + i].stride, conv.geometry.dilations[i]));
        }
        for i in 0..rank {
            windows.push(of(&spatial[i], &xs[2 + i].stride, conv.geometry.strides[i]));
        }
        let windows = Layout { axes: windows, offset: padded.layout.offset.clone() };
        let dense = Layout::row_major(&windows.shape());
        let buffer = self.spare(format!("{} windows", self.value_name(x)), operand, dense.clone());
        let copy = places::WindowCopy {
            from: &padded,
            to: buffer,
            images: &images,
            channels: groups * channels,
            taps: &conv.w[2..],
            outputs: &spatial,
            dilations: &conv.geometry.dilations,
            strides: &conv.geometry.strides,
        };
        let bytes = numel(&dense.shape()) * (2 * operand.size() as i64);
        let copied = Note {
            label: "copy".to_string(),
            anchor: "map".to_string(),
            nodes: vec![name.clone()],
            bytes,
            ..Note::default()
        };
        if !self.window_copy(&copy, copied)? {
            let from = Place { buffer: padded.buffer, layout: windows };
            self.copy_step(&from, &Place { buffer, layout: dense.clone() }, &name)?;
        }
        let repeat = || -> Vec<Axis> { space.iter().map(|d| broadcast_axis(d.clone())).collect() };
        let (mut lhs, mut rhs) = (repeat(), repeat());
        let ws = &weights.layout.axes;
        lhs[1] = of(&space[1], &ws[0].stride, outputs);
        lhs[2] = of(&space[2], &ws[0].stride, 1);
        for i in 0..=rank {
            lhs[result_axes + i] = of(&space[result_axes + i], &ws[1 + i].stride, 1);
            rhs[result_axes + i] = dense.axes[2 + i].clone();
        }
        (rhs[0], rhs[1]) = (dense.axes[0].clone(), dense.axes[1].clone());
        for i in 0..rank {
            rhs[3 + i] = dense.axes[3 + rank + i].clone();
        }
        let side = |buffer: BufferId, axes: Vec<Axis>, offset: &Dim| Side {
            buffer,
            dtype: operand,
            layout: Layout { axes, offset: offset.clone() },
        };
        let product = Product {
            result_axes,
            lhs: side(weights.buffer, lhs, &weights.layout.offset),
            rhs: side(buffer, rhs, &Dim::new(0)),
            computed: [None, None],
            operands: self.conv_operands(dtype),
            dtype,
            space,
            scaled: None,
        };
        // The result's channels in two axes: groups and those of one group.
        let mut dag = dag.clone();
        split_axis(&mut dag, 1, groups, outputs);
        self.product_kernel(name, &product, &dag, note)
    }

    /// Memory for something that no value of the graph is.
    pub(crate) fn spare(&mut self, name: String, dtype: DType, layout: Layout) -> BufferId {
        let storage = Storage::Arena;
        self.plan.buffers.push(Buffer { name, value: None, dtype, layout, storage })
    }
}

/// Adds what the epilogue of a stored result reads and computes to a form; `out` is the result's layout over the
/// canonical axes, `m` and `n` among them are rows and columns.
fn epilogue_of(
    dag: &Dag,
    canon: &[Vec<usize>],
    (m, n): (usize, usize),
    out: &Layout,
    param: &dyn Fn(BufferId) -> Option<usize>,
    form: &mut Multiplied,
) -> std::result::Result<(), Misfit> {
    let [store] = dag.stores.as_slice() else { return Err(Misfit::Result) };
    let merged = |layout: &Layout| merge(layout, canon).filter(no_blocks);
    let stride = |l: &Layout, c: usize| match is_broadcast(&l.axes[c]) {
        true => Dim::new(0),
        false => l.axes[c].stride.clone(),
    };
    let sums = form.sum;
    // What the epilogue reads, in the order of its function's parameters.
    let mut leaves = Vec::new();
    outside(dag, store.node, &mut leaves)?;
    let mut order: [Option<usize>; 3] = [None; 3];
    for node in leaves {
        let DagOp::Ext(ext) = &dag.nodes[node].op else { return Err(Misfit::Result) };
        let l = merged(&ext.layout).ok_or(Misfit::Result)?;
        let varies = |c: usize| !stride(&l, c).is(0);
        let over: Vec<usize> = (0..canon.len()).filter(|&c| varies(c)).collect();
        let same = (0..canon.len()).all(|c| stride(&l, c) == stride(out, c));
        let (slot, at) = match over.as_slice() {
            [c] if *c == n && stride(&l, n).is(1) => (&mut form.cols, 0),
            [c] if *c == m && stride(&l, m).is(1) => (&mut form.rows, 1),
            _ if same => (&mut form.residual, 2),
            _ => return Err(Misfit::Result),
        };
        let param = param(ext.buffer).ok_or(Misfit::Result)?;
        if slot.replace(Vector { param, dtype: ext.dtype, offset: l.offset }).is_some() {
            return Err(Misfit::Result);
        }
        order[at] = Some(node);
    }
    let mut f = FuncBuilder::new();
    let sum = f.param("sum", sums);
    let mut given: Vec<(usize, ExprId)> = Vec::new();
    for (node, name) in order.into_iter().zip(["cols", "rows", "residual"]) {
        let Some(node) = node else { continue };
        given.push((node, f.param(name, dag.nodes[node].dtype)));
    }
    let y = inline(dag, store.node, &mut f, sum, &given);
    form.epilogue = f.finish(y);
    Ok(())
}

/// The node that rounds a product's sums to a narrower type, where nothing else reads the sums.
fn only_rounding(dag: &Dag) -> Option<usize> {
    let anchor = dag.nodes.iter().position(|n| matches!(n.op, DagOp::Anchor))?;
    let readers: Vec<usize> =
        (0..dag.nodes.len()).filter(|&i| dag.nodes[i].args.contains(&anchor)).collect();
    let &[only] = readers.as_slice() else { return None };
    let node = &dag.nodes[only];
    let cast = matches!(&node.op, DagOp::Map(f) if f.as_single_op() == Some(ExprOp::Cast));
    let narrower = node.dtype.is_float() && node.dtype.size() < dag.nodes[anchor].dtype.size();
    let stored = dag.stores.iter().any(|s| s.node == anchor);
    (cast && narrower && !stored).then_some(only)
}

/// How a left operand is computed: `lhs` is the layout of what it is computed from, which is in `buffer`, over the canonical axes. The last of
/// these is the depth; in front of rows and columns stands at most one, along which the product is repeated.
fn prologue_of(
    c: &Computed,
    canon: &[Vec<usize>],
    lhs: &Layout,
    (buffer, operand): (BufferId, DType),
    param: &dyn Fn(BufferId) -> Option<usize>,
) -> std::result::Result<Prologue, Misfit> {
    let units = canon.len() - 3;
    if units > 1 {
        return Err(Misfit::Operands);
    }
    let merged = |layout: &Layout| merge(layout, canon).filter(no_blocks);
    let mut leaves = Vec::new();
    outside(&c.dag, c.node, &mut leaves)?;
    let mut main = None;
    let mut others = Vec::new();
    for node in leaves {
        let DagOp::Ext(ext) = &c.dag.nodes[node].op else { return Err(Misfit::Operands) };
        let layout = merged(&ext.layout).ok_or(Misfit::Operands)?;
        if main.is_none() && ext.buffer == buffer && layout == *lhs {
            main = Some(node);
            continue;
        }
        let varies = |at: usize| !is_broadcast(&layout.axes[at]);
        let depth = layout.axes[units + 2].stride.is(1) && varies(units + 2);
        if !depth || varies(units) || varies(units + 1) {
            return Err(Misfit::Operands);
        }
        let param = param(ext.buffer).ok_or(Misfit::Operands)?;
        let strides = (0..units).map(|u| match varies(u) {
            true => layout.axes[u].stride.clone(),
            false => Dim::new(0),
        });
        let vector = Vector { param, dtype: ext.dtype, offset: layout.offset.clone() };
        others.push((node, Depth { strides: strides.collect(), vector }));
    }
    let main = main.ok_or(Misfit::Operands)?;
    let mut f = FuncBuilder::new();
    let x = f.param("x", c.dag.nodes[main].dtype);
    let mut given = vec![(main, x)];
    for (i, (node, _)) in others.iter().enumerate() {
        given.push((*node, f.param(&format!("d{i}"), c.dag.nodes[*node].dtype)));
    }
    let y = inline(&c.dag, c.node, &mut f, x, &given);
    let y = f.cast(y, operand);
    let func = f.finish(y);
    Ok(Prologue { func, operand, vectors: others.into_iter().map(|(_, d)| d).collect() })
}

pub(crate) fn no_blocks(layout: &Layout) -> bool {
    layout.axes.iter().all(|a| a.block.is_none())
}

/// Dense memory for a shape, its axes in the order in which they lie in `like`.
pub(crate) fn dense_like(
    like: &Layout,
    shape: &[Dim],
    symbols: &tilewright_layout::Symbols,
) -> Layout {
    let all: Vec<usize> = (0..shape.len()).collect();
    let order = by_distance(&all, like, symbols);
    let ordered: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
    let mut inverse = vec![0; shape.len()];
    order.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
    Layout::row_major(&ordered).permute(&inverse)
}

/// Splits reference axis `axis` of a [`Dag`] into `outer` times `inner`.
fn split_axis(dag: &mut Dag, axis: usize, outer: i64, inner: i64) {
    let split = |layout: &mut Layout| {
        let old = layout.axes[axis].clone();
        let part = |extent: i64, times: i64| match is_broadcast(&old) {
            true => broadcast_axis(Dim::new(extent)),
            false => Axis { extent: Dim::new(extent), stride: &old.stride * times, block: None },
        };
        layout.axes.splice(axis..=axis, [part(outer, inner), part(inner, 1)]);
    };
    for node in &mut dag.nodes {
        // Along a single element nothing varies: such an axis merges with ones along which the node is the same.
        let varies = node.axes[axis];
        node.axes.splice(axis..=axis, [varies && outer != 1, varies && inner != 1]);
        if let DagOp::Ext(ext) = &mut node.op {
            split(&mut ext.layout);
            if let Some(shift) = &mut ext.shift {
                shift.insert(axis, Dim::new(0));
            }
        }
    }
    dag.stores.iter_mut().for_each(|s| split(&mut s.layout));
}

/// The loads behind a node, each once; refuses what is neither elementwise nor the anchor.
fn outside(dag: &Dag, node: usize, found: &mut Vec<usize>) -> std::result::Result<(), Misfit> {
    let here = &dag.nodes[node];
    match &here.op {
        DagOp::Anchor => Ok(()),
        DagOp::Ext(ext) if ext.shift.is_none() => {
            if !found.contains(&node) {
                found.push(node);
            }
            Ok(())
        }
        DagOp::Map(_) => here.args.iter().try_for_each(|&a| outside(dag, a, found)),
        _ => Err(Misfit::Result),
    }
}

/// A node as an expression of the sum and what is given.
fn inline(
    dag: &Dag,
    node: usize,
    f: &mut FuncBuilder,
    sum: ExprId,
    given: &[(usize, ExprId)],
) -> ExprId {
    if let Some(known) = given.iter().find(|g| g.0 == node) {
        return known.1;
    }
    let here = &dag.nodes[node];
    match &here.op {
        DagOp::Map(func) => {
            let args: Vec<ExprId> =
                here.args.iter().map(|&a| inline(dag, a, f, sum, given)).collect();
            f.inline(func, &args)
        }
        _ => f.cast(sum, here.dtype),
    }
}
