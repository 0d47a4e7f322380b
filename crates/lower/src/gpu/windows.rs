//! Convolutions whose data the copy engine reads through windows, as they lie: no copy of the windows is made.
//!
//! That takes data with their channels innermost (`[N, H, W, C]` in memory), so on a GPU what convolutions and
//! pooling compute lies that way ([`channels_last`]), and the matrix of the product is `[N * outputs, taps * C]`. The copy
//! engine wants lines of whole 16 bytes: data with fewer channels are copied once, with channels of zeros. It takes steps up to 8;
//! convolutions with longer ones copy their windows (`im2col`), and so do those in groups and in `f32`, whose
//! multiply-adds do not go through it.

use super::{Misfit, epilogue_of, no_blocks};
use crate::block::{Dag, DagOp, DagStore, Ext, zero};
use crate::conv::Conv;
use crate::lowering::Lowering;
use crate::place::Place;
use crate::views::merge;
use crate::{Device, Layouts, Options};
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::Func;
use tilewright_graph::{Graph, Op, ValueId};
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_plan::{Buffer, BufferId, Matrix, Note, Product, Storage, Windows};
use tilewright_target::Precision;

/// The furthest that windows reach beyond an image, and taps from each other: coordinates have 8 bits.
const REACH_MAX: i64 = 100;
/// The longest step.
const STEP_MAX: i64 = 8;

/// Channels innermost, for a value of shape `[N, C, spatial...]`.
fn nhwc(shape: &[Dim]) -> Layout {
    let rank = shape.len();
    let order: Vec<usize> = [0].into_iter().chain(2..rank).chain([1]).collect();
    let there: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
    let back: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    Layout::row_major(&there).permute(&back)
}

/// The layouts of what convolutions, pooling and the elementwise operators between them compute. A value that is only
/// reshaped or permuted afterwards is left to those who read it.
pub(crate) fn channels_last(graph: &Graph, given: &Layouts, options: &Options) -> Layouts {
    let mut layouts = given.clone();
    let gpu = options.device == Device::Gpu && options.windows;
    if !gpu || options.precision == Precision::F32 {
        return layouts;
    }
    let users = graph.users();
    let mut images = std::collections::BTreeSet::new();
    for (_, node) in graph.live() {
        let Some(&out) = node.outputs.first() else { continue };
        let shape = graph.shape(out);
        let follows = |v: &ValueId| images.contains(v) && graph.shape(*v).len() == shape.len();
        let takes = match &node.op {
            Op::Conv(_) => true,
            Op::Window(_) | Op::Map(_) => node.inputs.iter().any(follows),
            _ => false,
        };
        if !takes || !(3..=5).contains(&shape.len()) {
            continue;
        }
        images.insert(out);
        let moved = |n: &tilewright_graph::NodeId| {
            matches!(graph.nodes[*n].op, Op::Reshape(_) | Op::Permute(_))
        };
        if !(users[out].len() == 1 && users[out].iter().all(moved)) {
            layouts.entry(out).or_insert_with(|| nhwc(shape));
        }
    }
    layouts
}

/// A convolution as a product over windows: its operands, and the form with buffers for parameters.
pub(crate) struct WindowForm {
    pub(crate) data: Place,
    pub(crate) weights: Place,
    /// Input channels, with those of zeros.
    pub(crate) channels: i64,
    form: Product,
    /// The buffer of each parameter that the form names.
    buffers: Vec<BufferId>,
}

impl WindowForm {
    /// The form for a kernel with these arguments.
    pub(crate) fn over(mut self, args: &[BufferId]) -> Option<Product> {
        let at = |i: usize| args.iter().position(|b| *b == self.buffers[i]);
        let form = &mut self.form;
        for matrix in [&mut form.a, &mut form.b, &mut form.c] {
            matrix.param = at(matrix.param)?;
        }
        for vector in [&mut form.cols, &mut form.rows, &mut form.residual].into_iter().flatten() {
            vector.param = at(vector.param)?;
        }
        Some(self.form)
    }
}

/// Whether the images are a list of pixels, `[images * height * width, channels]`: its distance between pixels.
fn pixels(layout: &Layout) -> Option<Dim> {
    let rank = layout.axes.len();
    let axis = |i: usize| &layout.axes[i];
    let single = |a: &Axis| a.extent.is(1);
    if !no_blocks(layout) || !(axis(1).stride.is(1) || single(axis(1))) {
        return None;
    }
    let pixel = match single(axis(rank - 1)) {
        true => axis(1).extent.clone(),
        false => axis(rank - 1).stride.clone(),
    };
    let mut expected = pixel.clone();
    for i in (2..rank).rev().chain([0]) {
        if !single(axis(i)) && axis(i).stride != expected {
            return None;
        }
        expected = expected * &axis(i).extent;
    }
    Some(pixel)
}

impl Lowering<'_> {
    /// The convolution as a product over windows, if the copy engine can read them.
    pub(crate) fn windows(&mut self, conv: &Conv<'_>, dag: &Dag) -> Result<Option<WindowForm>> {
        let graph = self.graph;
        let (x, w) = (conv.node.inputs[0], conv.node.inputs[1]);
        let dtype = graph.dtype(w);
        let operand = self.operand_type(dtype);
        let tf32 = operand == DType::F32 && self.precision == Precision::Tf32;
        let g = &conv.geometry;
        let (outputs, channels) = (conv.w[0], conv.w[1]);
        let spatial = g.rank();
        let small = (0..spatial).all(|i| {
            let reach = g.dilations[i] * (g.kernel[i] - 1);
            let pads = [conv.attrs.pads_lo[i], conv.attrs.pads_hi[i]];
            reach <= REACH_MAX
                && pads.iter().all(|p| (0..=REACH_MAX).contains(p))
                && (1..=STEP_MAX).contains(&g.strides[i])
        });
        let fits = self.on_gpu()
            && self.windows
            && (operand.bits() == 16 || tf32)
            && conv.attrs.groups == 1
            && (1..=2).contains(&spatial)
            && small
            && graph.as_const(w).is_some();
        if !fits {
            return Ok(None);
        }
        // Lines of whole 16 bytes.
        let unit = 16 / operand.size() as i64;
        let whole = (channels + unit - 1) / unit * unit;
        // Outputs are a matrix of images, rows and columns by channels.
        let canon = [[0].into_iter().chain(2..2 + spatial).collect(), vec![1]];
        let [store] = dag.stores.as_slice() else { return Ok(None) };
        let Some(out) = merge(&store.layout, &canon).filter(no_blocks) else { return Ok(None) };
        let plain = |a: usize| out.axes[a].stride.is(1) || out.axes[a].extent.is(1);
        if !plain(0) && !plain(1) {
            return Ok(None);
        }
        let (data, weights);
        if whole == channels {
            let placed = self.operand_place(x, operand)?;
            data = match pixels(&placed.layout) {
                Some(_) => placed,
                None => self.copy_as(x, operand, &placed, nhwc(graph.shape(x)))?,
            };
            // Output channels, taps, input channels.
            weights = self.const_place_as(w, operand, nhwc(graph.shape(w)));
        } else {
            let Some(wide) = self.wide_weights(w, whole, operand)? else { return Ok(None) };
            (data, weights) = (self.wide_data(x, whole, operand)?, wide);
        }
        let channels = whole;
        let Some(pixel) = pixels(&data.layout) else { return Ok(None) };
        let two = |of: &[i64], one: i64| match of {
            [a] => [one, *a],
            [a, b] => [*a, *b],
            _ => [one; 2],
        };
        let two_dims = |of: &[Dim]| match of {
            [a] => [Dim::new(1), a.clone()],
            [a, b] => [a.clone(), b.clone()],
            _ => [Dim::new(1), Dim::new(1)],
        };
        let extent = |axes: &[usize]| axes.iter().fold(Dim::new(1), |n, &a| n * &conv.shape[a]);
        let taps = g.taps();
        let mut buffers = vec![data.buffer, weights.buffer, store.buffer];
        let number = |buffers: &mut Vec<BufferId>, b: BufferId| {
            buffers.iter().position(|x| *x == b).unwrap_or_else(|| {
                buffers.push(b);
                buffers.len() - 1
            })
        };
        for node in &dag.nodes {
            if let crate::block::DagOp::Ext(ext) = &node.op {
                number(&mut buffers, ext.buffer);
            }
        }
        let matrix = |param: usize, dtype: DType, offset: &Dim, row: Dim, col: Dim| Matrix {
            param,
            dtype,
            offset: offset.clone(),
            row,
            col,
        };
        let stride = |a: usize| out.axes[a].stride.clone();
        let result = dag.nodes[store.node].dtype;
        let mut form = Product {
            second: None,
            m: extent(&canon[0]),
            n: Dim::new(outputs),
            k: Dim::new(taps * channels),
            repeat: Vec::new(),
            a: matrix(0, operand, &data.layout.offset, pixel, Dim::new(1)),
            windows: Some(Windows {
                images: conv.shape[0].clone(),
                size: two_dims(&graph.shape(x)[2..]),
                outputs: two_dims(&conv.shape[2..]),
                taps: two(&g.kernel, 1),
                steps: two(&g.strides, 1),
                before: two(&g.pads, 0),
                dilations: two(&g.dilations, 1),
            }),
            b: matrix(1, operand, &Dim::new(0), Dim::new(1), Dim::new(taps * channels)),
            c: matrix(2, result, &out.offset, stride(0), stride(1)),
            tf32,
            sum: DType::F32,
            epilogue: Func::identity(DType::F32),
            cols: None,
            rows: None,
            residual: None,
        };
        let find = |b: BufferId| buffers.iter().position(|x| *x == b);
        match epilogue_of(dag, &canon, (0, 1), &out, &find, &mut form) {
            Ok(()) => Ok(Some(WindowForm { data, weights, channels, form, buffers })),
            Err(Misfit::Types | Misfit::Result | Misfit::Operands) => Ok(None),
        }
    }

    /// Weights with more input channels, of zeros, channels innermost.
    fn wide_weights(&mut self, w: ValueId, channels: i64, dtype: DType) -> Result<Option<Place>> {
        let graph = self.graph;
        let Some(tensor) = graph.as_const(w).filter(|t| t.dtype() == DType::F32) else {
            return Ok(None);
        };
        let mut extents = tensor.shape().to_vec();
        let have = extents[1];
        extents[1] = channels as usize;
        let taps: usize = extents[2..].iter().product();
        let values = tensor.to_f64s();
        let mut wide = vec![0.0; extents.iter().product()];
        for (i, run) in values.chunks(taps.max(1)).enumerate() {
            let at = (i / have * extents[1] + i % have) * taps;
            wide[at..at + run.len()].copy_from_slice(run);
        }
        let shape: Vec<Dim> = extents.iter().map(|&e| Dim::from(e)).collect();
        let storage = Storage::Const(Tensor::from_f64s(DType::F32, &extents, &wide)?);
        let (name, layout) = (format!("{} widened", self.value_name(w)), nhwc(&shape));
        let buffer = Buffer { name, value: None, dtype, layout: layout.clone(), storage };
        Ok(Some(Place { buffer: self.plan.buffers.push(buffer), layout }))
    }

    /// Data with more channels, of zeros, channels innermost.
    fn wide_data(&mut self, x: ValueId, channels: i64, dtype: DType) -> Result<Place> {
        let place = self.place(x)?;
        let stored = self.plan.buffers[place.buffer].dtype;
        let mut shape = self.graph.shape(x).to_vec();
        shape[1] = Dim::new(channels);
        let layout = nhwc(&shape);
        let name = format!("{} widened", self.value_name(x));
        let buffer = self.spare(name.clone(), dtype, layout.clone());
        let mut dag = Dag::default();
        let shift = Some(vec![Dim::new(0); shape.len()]);
        let ext = Ext {
            buffer: place.buffer,
            dtype: stored,
            layout: place.layout,
            shift,
            fill: zero(stored),
        };
        let node = dag.push(DagOp::Ext(ext), vec![], vec![true; shape.len()], stored);
        let node = dag.cast(node, dtype);
        dag.stores.push(DagStore { node, buffer, layout: layout.clone() });
        let bytes = tilewright_layout::numel(&shape) * (stored.size() + dtype.size()) as i64;
        let (label, anchor, nodes) = ("pad".to_string(), "map".to_string(), vec![name]);
        let note = Note { label, anchor, nodes, bytes, ..Note::default() };
        self.map_kernel("pad".to_string(), &dag, &shape, note)?;
        Ok(Place { buffer, layout })
    }
}
