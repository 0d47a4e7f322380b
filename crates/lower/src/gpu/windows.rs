//! Convolutions whose data the copy engine reads through windows, as they lie: no copy of the windows is made.
//!
//! That takes data with their channels innermost (`[N, H, W, C]` in memory), so on a GPU what convolutions and
//! pooling compute lies that way ([`channels_last`]), and the matrix of the product is `[N * outputs, taps * C]`. The copy
//! engine wants lines of whole 16 bytes: data with fewer channels are copied once, with channels of zeros. It takes steps up to 8;
//! convolutions with longer ones copy their windows (`copied_windows.rs`), and so do those in `f32`, whose multiply-adds do not
//! go through it, and those in groups whose weights with all their zeros would be too many.

use super::{Misfit, epilogue_of, no_blocks};
use crate::block::{Dag, DagOp, DagStore, Ext, zero};
use crate::conv::Conv;
use crate::lowering::Lowering;
use crate::place::Place;
use crate::taps::Geometry;
use crate::views::merge;
use crate::{Device, Layouts, Options};
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::Func;
use tilewright_graph::{Graph, Op, ValueId};
use tilewright_layout::{Axis, Dim, Layout, numel};
use tilewright_plan::{Buffer, BufferId, Matrix, Note, Product, Storage, Windows};
use tilewright_target::Precision;

/// The furthest that windows reach beyond an image, and taps from each other: coordinates have 8 bits.
const REACH_MAX: i64 = 100;
/// The longest step.
const STEP_MAX: i64 = 8;

/// Channels innermost, for a value of shape `[N, C, spatial...]`.
pub(super) fn nhwc(shape: &[Dim]) -> Layout {
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
    if !gpu {
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
    /// Input channels, with those of zeros; or the elements of a line of the window, where lines are one piece of memory.
    pub(crate) channels: i64,
    /// The windows, one tap wide where lines are channels.
    pub(crate) geometry: Geometry,
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
        let (outputs, channels) = (conv.w[0], conv.w[1]);
        let spatial = conv.geometry.rank();
        // Lines of whole 16 bytes.
        let unit = 16 / operand.size() as i64;
        let few = if channels % unit == 0 { None } else { conv.few_channels(unit) };
        let g = few.as_ref().map_or(&conv.geometry, |few| &few.geometry);
        let small = (0..spatial).all(|i| {
            let reach = g.dilations[i] * (g.kernel[i] - 1);
            let after = if few.is_some() && i + 1 == spatial { 0 } else { conv.attrs.pads_hi[i] };
            reach <= REACH_MAX
                && [g.pads[i], after].iter().all(|p| (0..=REACH_MAX).contains(p))
                && (1..=STEP_MAX).contains(&g.strides[i])
        });
        let fits = self.on_gpu()
            && self.windows
            && (operand.bits() == 16 || tf32)
            && conv.attrs.groups == 1
            && (conv.joined == 1 || channels % unit == 0)
            && (1..=2).contains(&spatial)
            && small
            && graph.as_const(w).is_some();
        if !fits {
            return Ok(None);
        }
        // Outputs are a matrix of images, rows and columns by channels.
        let canon = [[0].into_iter().chain(2..2 + spatial).collect(), vec![1]];
        let [store] = dag.stores.as_slice() else { return Ok(None) };
        let Some(out) = merge(&store.layout, &canon).filter(no_blocks) else { return Ok(None) };
        let plain = |a: usize| out.axes[a].stride.is(1) || out.axes[a].extent.is(1);
        if !plain(0) && !plain(1) {
            return Ok(None);
        }
        let (data, weights);
        let mut size = graph.shape(x)[2..].to_vec();
        let channels = if let Some(few) = &few {
            let Some(lined) = self.line_weights(w, few, operand, unit)? else { return Ok(None) };
            (data, weights) = (self.line_data(x, few, operand)?, lined);
            size[spatial - 1] = data.layout.axes[1 + spatial].extent.clone();
            few.line
        } else if channels % unit == 0 {
            let placed = self.operand_place(x, operand)?;
            data = match pixels(&placed.layout) {
                Some(_) => placed,
                None => self.copy_as(x, operand, &placed, nhwc(graph.shape(x)))?,
            };
            // Output channels, taps, input channels.
            weights = match conv.joined {
                1 => self.const_place_as(w, operand, nhwc(graph.shape(w))),
                groups => self.dense_weights(w, groups, operand)?,
            };
            channels
        } else {
            let whole = (channels + unit - 1) / unit * unit;
            let few = FewChannels::apart(conv, whole);
            let Some(wide) = self.line_weights(w, &few, operand, unit)? else { return Ok(None) };
            (data, weights) = (self.wide_data(x, whole, operand)?, wide);
            whole
        };
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
            row_sums: None,
            leaves: None,
            prologue: None,
            m: extent(&canon[0]),
            n: Dim::new(outputs),
            k: Dim::new(taps * channels),
            repeat: Vec::new(),
            a: matrix(0, operand, &data.layout.offset, pixel, Dim::new(1)),
            windows: Some(Windows {
                images: conv.shape[0].clone(),
                size: two_dims(&size),
                outputs: two_dims(&conv.shape[2..]),
                taps: two(&g.kernel, 1),
                steps: two(&g.strides, 1),
                before: two(&g.pads, 0),
                dilations: two(&g.dilations, 1),
            }),
            b: matrix(1, operand, &Dim::new(0), Dim::new(1), weights.layout.axes[0].stride.clone()),
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
            Ok(()) => {
                let geometry = g.clone();
                Ok(Some(WindowForm { data, weights, channels, geometry, form, buffers }))
            }
            Err(Misfit::Types | Misfit::Result | Misfit::Operands) => Ok(None),
        }
    }

    /// Weights as [`FewChannels`] lays them out: `[outputs, rows, line]`, with zeros for channels that are not there; lines
    /// begin at multiples of `unit` elements.
    fn line_weights(
        &mut self,
        w: ValueId,
        few: &FewChannels,
        dtype: DType,
        unit: i64,
    ) -> Result<Option<Place>> {
        let graph = self.graph;
        let Some(tensor) = graph.as_const(w).filter(|t| t.dtype() == DType::F32) else {
            return Ok(None);
        };
        let have = tensor.shape();
        let taps: usize = have[2..].iter().product();
        // Columns of the window that are in a line.
        let columns = (few.line / few.channels) as usize;
        let (rows, channels) = (taps / columns.max(1), few.channels as usize);
        let whole = (few.line + unit - 1) / unit * unit;
        let values = tensor.to_f64s();
        let mut lined = vec![0.0; have[0] * rows * whole as usize];
        for (i, run) in values.chunks(taps.max(1)).enumerate() {
            let (output, channel) = (i / have[1], i % have[1]);
            for (tap, value) in run.iter().enumerate() {
                let (row, column) = (tap / columns, tap % columns);
                let line = (output * rows + row) * whole as usize;
                lined[line + column * channels + channel] = *value;
            }
        }
        let mut shape = vec![Dim::from(have[0]), Dim::new(whole)];
        shape.extend(few.geometry.kernel.iter().map(|&t| Dim::new(t)));
        let mut layout = nhwc(&shape);
        layout.axes[1].extent = Dim::new(few.line);
        // The tensor lies as the buffer does: outputs, rows, line.
        let flat = Tensor::from_f64s(DType::F32, &[lined.len()], &lined)?;
        let flat_layout = Layout::row_major(&[Dim::from(lined.len())]);
        let name = format!("{} in lines", self.value_name(w));
        let storage = Storage::Const(flat);
        let buffer = Buffer { name, value: None, dtype, layout: flat_layout, storage };
        Ok(Some(Place { buffer: self.plan.buffers.push(buffer), layout }))
    }

    /// Data whose lines of the window are one piece of memory each: rows with the zeros before and after them. The place
    /// shows them as pixels of `line` channels that overlap, as many in a row as steps fit into one.
    fn line_data(&mut self, x: ValueId, few: &FewChannels, dtype: DType) -> Result<Place> {
        let have = self.graph.shape(x).to_vec();
        let last = have.len() - 1;
        let mut shape = have.clone();
        shape[1] = Dim::new(few.channels);
        let steps = few.steps_of(&have[last]);
        shape[last] = &steps * few.step;
        // What the last pixel would have beyond the last row is never read, but belongs to the memory.
        let (elements, layout) = (numel(&shape) + few.line, nhwc(&shape));
        let all = Layout::row_major(&[elements]);
        let mut shift = vec![Dim::new(0); shape.len()];
        shift[last] = Dim::new(-few.before);
        let name = format!("{} in lines", self.value_name(x));
        let buffer = self.spare(name.clone(), dtype, all);
        self.shifted_copy(x, (buffer, dtype), &layout, shift, name)?;
        let mut pixels = layout;
        pixels.axes[1].extent = Dim::new(few.line);
        pixels.axes[last].extent = steps;
        pixels.axes[last].stride = Dim::new(few.channels * few.step);
        Ok(Place { buffer, layout: pixels })
    }

    /// Data with more channels, of zeros, channels innermost.
    fn wide_data(&mut self, x: ValueId, channels: i64, dtype: DType) -> Result<Place> {
        let mut shape = self.graph.shape(x).to_vec();
        shape[1] = Dim::new(channels);
        let layout = nhwc(&shape);
        let name = format!("{} widened", self.value_name(x));
        let buffer = self.spare(name.clone(), dtype, layout.clone());
        let shift = vec![Dim::new(0); shape.len()];
        self.shifted_copy(x, (buffer, dtype), &layout, shift, name)?;
        Ok(Place { buffer, layout })
    }

    /// Fills a buffer, seen as `to`, with a value that is read at coordinates plus `shift`; zeros outside.
    pub(super) fn shifted_copy(
        &mut self,
        x: ValueId,
        (buffer, dtype): (BufferId, DType),
        to: &Layout,
        shift: Vec<Dim>,
        name: String,
    ) -> Result<()> {
        let place = self.place(x)?;
        let stored = self.plan.buffers[place.buffer].dtype;
        let shape = to.shape();
        let ext = Ext {
            buffer: place.buffer,
            dtype: stored,
            layout: place.layout,
            shift: Some(shift),
            fill: zero(stored),
        };
        let mut dag = Dag::default();
        let node = dag.push(DagOp::Ext(ext), vec![], vec![true; shape.len()], stored);
        let node = dag.cast(node, dtype);
        dag.stores.push(DagStore { node, buffer, layout: to.clone() });
        let bytes = numel(&shape) * (stored.size() + dtype.size()) as i64;
        let (label, anchor, nodes) = ("pad".to_string(), "map".to_string(), vec![name]);
        let note = Note { label, anchor, nodes, bytes, ..Note::default() };
        self.map_kernel("pad".to_string(), &dag, &shape, note)
    }
}

/// A convolution of few channels, as one of few rows: a line of its window is one piece of memory, once the rows have
/// their zeros before and after them. A step along a row is as many elements as make whole 16 bytes.
///
/// Of three channels and 7 x 7 taps with steps of two, in 16 bits: four channels, lines of 28 elements every 8 elements,
/// and windows of 7 x 1.
#[derive(Clone, Debug)]
pub(crate) struct FewChannels {
    /// Channels, with those of zeros.
    channels: i64,
    /// Elements of a line: columns of the window times channels.
    line: i64,
    /// Columns from one window to the next.
    step: i64,
    /// Zeros before a row and after it.
    before: i64,
    after: i64,
    geometry: Geometry,
}

impl FewChannels {
    /// Channels with zeros behind them, and the windows as they are.
    fn apart(conv: &Conv<'_>, channels: i64) -> FewChannels {
        let geometry = conv.geometry.clone();
        FewChannels { channels, line: channels, step: 1, before: 0, after: 0, geometry }
    }

    /// Steps in a row of `width` columns and its zeros: at least as many as windows, the last of which ends in the row.
    fn steps_of(&self, width: &Dim) -> Dim {
        (width + (self.before + self.after)).ceil_div(&Dim::new(self.step))
    }
}

impl Conv<'_> {
    /// Its lines as pieces of memory, for data whose channels are no multiple of `unit`.
    pub(crate) fn few_channels(&self, unit: i64) -> Option<FewChannels> {
        let last = self.geometry.rank().checked_sub(1)?;
        let g = &self.geometry;
        let (columns, step) = (g.kernel[last], g.strides[last]);
        if g.dilations[last] != 1 || step < 1 || columns < 1 || self.attrs.groups != 1 {
            return None;
        }
        let channels = (self.w[1]..self.w[1] + unit).find(|c| c * step % unit == 0)?;
        let mut geometry = g.clone();
        (geometry.kernel[last], geometry.strides[last], geometry.pads[last]) = (1, 1, 0);
        let (before, after) = (self.attrs.pads_lo[last], self.attrs.pads_hi[last]);
        if before < 0 || after < 0 {
            return None;
        }
        let line = columns * channels;
        Some(FewChannels { channels, line, step, before, after, geometry })
    }
}
