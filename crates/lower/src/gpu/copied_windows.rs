//! Convolutions as products with a copy of their windows, channels innermost: what the copy engine has no form for (plain
//! multiply-adds in `f32`, many groups, long steps).
//!
//! ```text
//! copy:     X[n, outputs, part, taps, c] = data[n, outputs * steps + taps * dilations, part * C + c]
//! product:  Y[(n, outputs), part, o] = sum over taps, c:  X * W[part, taps, c, o]
//! ```
//!
//! Rows of the product are all outputs of all images, and a tap of the copy is whole lines of channels. Groups of few channels
//! are joined into parts of [`PART`] channels, whose weights are zeros where a channel belongs to another group: tiles of a
//! product have no fewer columns anyway.

use crate::block::Dag;
use crate::contract::{Product, Side};
use crate::conv::Conv;
use crate::lowering::Lowering;
use crate::place::Place;
use crate::views::broadcast_axis;
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_graph::ValueId;
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_plan::{Buffer, Note, Storage};
use tilewright_target::Precision;

use super::split_axis;
use super::windows::nhwc;

/// Channels that a part has at least, where there are so many.
const PART: i64 = 64;
/// Weights that groups may take as one, zeros among them.
const DENSE_WEIGHTS: i64 = 1 << 22;

/// Groups of a convolution, several of them taken together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub(crate) count: i64,
    /// Input channels of a part, without zeros behind them, and output channels.
    pub(crate) channels: i64,
    pub(crate) outputs: i64,
    /// Input and output channels of a group.
    group: [i64; 2],
}

impl Parts {
    /// The fewest groups together that have [`PART`] channels on either side.
    pub(crate) fn of(groups: i64, inputs: i64, outputs: i64) -> Parts {
        let enough = |r: &i64| groups % r == 0 && inputs * r >= PART && outputs * r >= PART;
        let joined = (1..groups).find(enough).unwrap_or(groups);
        Parts {
            count: groups / joined,
            channels: inputs * joined,
            outputs: outputs * joined,
            group: [inputs, outputs],
        }
    }

    /// All groups together.
    pub(crate) fn whole(groups: i64, inputs: i64, outputs: i64) -> Parts {
        let group = [inputs, outputs];
        Parts { count: 1, channels: inputs * groups, outputs: outputs * groups, group }
    }

    /// Weights `[O, C/groups, taps]` as `[part, taps, channels, outputs]`, or with outputs before taps; `channels` counts those of
    /// zeros.
    fn weights(&self, tensor: &Tensor, channels: i64, outputs_last: bool) -> Vec<f64> {
        let shape = tensor.shape();
        let taps: usize = shape[2..].iter().product();
        let [group_in, group_out] = self.group.map(|n| n as usize);
        let (width, outputs) = (channels as usize, self.outputs as usize);
        let values = tensor.to_f64s();
        let mut out = vec![0.0; self.count as usize * taps * width * outputs];
        for (i, run) in values.chunks(taps.max(1)).enumerate() {
            let (output, channel) = (i / shape[1], i % shape[1]);
            let (part, o) = (output / outputs, output % outputs);
            let c = (o / group_out.max(1)) * group_in + channel;
            for (tap, value) in run.iter().enumerate() {
                let at = match outputs_last {
                    true => ((part * taps + tap) * width + c) * outputs + o,
                    false => ((part * outputs + o) * taps + tap) * width + c,
                };
                out[at] = *value;
            }
        }
        out
    }
}

impl Lowering<'_> {
    /// Weights of a convolution in groups as those of one without, `[O, C, taps...]` with the channels innermost.
    pub(super) fn dense_weights(&mut self, w: ValueId, groups: i64, dtype: DType) -> Result<Place> {
        let graph = self.graph;
        let mut shape = graph.shape(w).to_vec();
        let size = |d: &Dim| d.as_const().unwrap_or(0);
        let parts = Parts::whole(groups, size(&shape[1]), size(&shape[0]) / groups);
        let values = match graph.as_const(w) {
            Some(tensor) => parts.weights(tensor, parts.channels, false),
            None => Vec::new(),
        };
        shape[1] = Dim::new(parts.channels);
        let name = format!("{} of all groups", self.value_name(w));
        let buffer = self.flat_constant(name, &values, dtype)?;
        Ok(Place { buffer, layout: nhwc(&shape) })
    }

    fn flat_constant(
        &mut self,
        name: String,
        values: &[f64],
        dtype: DType,
    ) -> Result<tilewright_plan::BufferId> {
        let storage = Storage::Const(Tensor::from_f64s(DType::F32, &[values.len()], values)?);
        let layout = Layout::row_major(&[Dim::from(values.len())]);
        Ok(self.plan.buffers.push(Buffer { name, value: None, dtype, layout, storage }))
    }

    /// Whether a convolution in groups is computed as one without, through the copy engine: sixteen-bit products of zeros cost
    /// less than a copy of the windows, as long as there are few.
    pub(crate) fn groups_as_one(&self, conv: &Conv<'_>) -> bool {
        let dtype = self.graph.dtype(conv.node.inputs[1]);
        let engine = self.operand_type(dtype).bits() == 16 || self.precision == Precision::Tf32;
        let taps: i64 = conv.geometry.taps();
        let weights = conv.w[0].saturating_mul(conv.w[1] * conv.attrs.groups).saturating_mul(taps);
        self.on_gpu()
            && self.windows
            && engine
            && conv.attrs.groups > 1
            && self.graph.as_const(conv.node.inputs[1]).is_some_and(|t| t.dtype() == DType::F32)
            && weights <= DENSE_WEIGHTS
    }

    /// Lowers a convolution with constant weights so; false where its result does not lie with its channels innermost.
    pub(crate) fn copied_windows(
        &mut self,
        name: &str,
        conv: &Conv<'_>,
        dag: &Dag,
        note: &Note,
    ) -> Result<bool> {
        let graph = self.graph;
        let (x, w) = (conv.node.inputs[0], conv.node.inputs[1]);
        let (groups, rank) = (conv.attrs.groups, conv.geometry.rank());
        let dtype = graph.dtype(w);
        let operand = self.operand_type(dtype);
        let unit = 16 / operand.size() as i64;
        let parts = Parts::of(groups, conv.w[1], conv.w[0] / groups);
        let channels = (parts.channels + unit - 1) / unit * unit;
        let innermost = dag.stores.iter().all(|s| s.layout.axes[1].stride.is(1));
        let negative = conv.attrs.pads_lo.iter().chain(&conv.attrs.pads_hi).any(|&p| p < 0);
        let fits = self.windows
            && innermost
            && !negative
            && (channels == parts.channels || parts.count == 1)
            && matches!(operand, DType::F32 | DType::F16 | DType::BF16);
        let Some(tensor) = graph.as_const(w).filter(|t| fits && t.dtype() == DType::F32) else {
            return Ok(false);
        };
        let data = self.bordered(conv, operand, channels * parts.count)?;
        // Axes: images, parts, outputs of a part, outputs; then taps and channels.
        let mut space = vec![conv.shape[0].clone(), Dim::new(parts.count), Dim::new(parts.outputs)];
        space.extend(conv.shape[2..].iter().cloned());
        let result_axes = space.len();
        space.extend(conv.w[2..].iter().map(|&t| Dim::new(t)));
        space.push(Dim::new(channels));
        let of = |extent: &Dim, stride: &Dim, times: i64| Axis {
            extent: extent.clone(),
            stride: stride * times,
            block: None,
        };
        let xs = &data.layout.axes;
        let mut windows = vec![of(&space[0], &xs[0].stride, 1)];
        for i in 0..rank {
            windows.push(of(&conv.shape[2 + i], &xs[2 + i].stride, conv.geometry.strides[i]));
        }
        windows.push(of(&space[1], &Dim::new(1), channels));
        for i in 0..rank {
            let tap = &space[result_axes + i];
            windows.push(of(tap, &xs[2 + i].stride, conv.geometry.dilations[i]));
        }
        windows.push(of(&Dim::new(channels), &Dim::new(1), 1));
        let windows = Layout { axes: windows, offset: data.layout.offset.clone() };
        let dense = Layout::row_major(&windows.shape());
        let buffer = self.spare(format!("{} windows", self.value_name(x)), operand, dense.clone());
        let from = Place { buffer: data.buffer, layout: windows };
        self.copy_step(&from, &Place { buffer, layout: dense.clone() }, name)?;

        // Plain multiply-adds want outputs next to each other, tensor cores the depth.
        let outputs_last = operand == DType::F32 && self.precision == Precision::F32;
        let values = parts.weights(tensor, channels, outputs_last);
        let taps = conv.geometry.taps();
        let weights =
            self.flat_constant(format!("{} in parts", self.value_name(w)), &values, operand)?;
        let (step, output) = match outputs_last {
            true => (Dim::new(parts.outputs), Dim::new(1)),
            false => (Dim::new(1), Dim::new(taps * channels)),
        };
        let repeat = || -> Vec<Axis> { space.iter().map(|d| broadcast_axis(d.clone())).collect() };
        let (mut lhs, mut rhs) = (repeat(), repeat());
        lhs[0] = dense.axes[0].clone();
        lhs[1] = dense.axes[1 + rank].clone();
        rhs[1] = of(&space[1], &Dim::new(taps * channels * parts.outputs), 1);
        rhs[2] = of(&space[2], &output, 1);
        let mut far = channels;
        for i in (0..rank).rev() {
            lhs[3 + i] = dense.axes[1 + i].clone();
            lhs[result_axes + i] = dense.axes[2 + rank + i].clone();
            rhs[result_axes + i] = of(&space[result_axes + i], &step, far);
            far *= conv.w[2 + i];
        }
        let last = result_axes + rank;
        lhs[last] = dense.axes[2 + 2 * rank].clone();
        rhs[last] = of(&space[last], &step, 1);
        for side in [&mut lhs, &mut rhs] {
            for axis in side.iter_mut().filter(|a| a.extent.is(1)) {
                *axis = broadcast_axis(axis.extent.clone());
            }
        }
        let side = |buffer, axes| Side {
            buffer,
            dtype: operand,
            layout: Layout { axes, offset: Dim::new(0) },
        };
        let product = Product {
            result_axes,
            lhs: side(buffer, lhs),
            rhs: side(weights, rhs),
            computed: [None, None],
            operands: self.conv_operands(dtype),
            dtype,
            space,
            scaled: None,
            first: None,
        };
        // The result's channels in two axes: parts and those of one part.
        let mut dag = dag.clone();
        split_axis(&mut dag, 1, parts.count, parts.outputs);
        self.product_kernel(name.to_string(), &product, &dag, note.clone())?;
        Ok(true)
    }

    /// The data of a convolution with zeros around it, its channels innermost, with more of them, of zeros, where it has fewer.
    fn bordered(&mut self, conv: &Conv<'_>, dtype: DType, channels: i64) -> Result<Place> {
        let x = conv.node.inputs[0];
        let (lo, hi) = (&conv.attrs.pads_lo, &conv.attrs.pads_hi);
        let place = self.place(x)?;
        let mut shape = self.graph.shape(x).to_vec();
        let whole = shape[1].is(channels);
        let there = self.plan.buffers[place.buffer].dtype == dtype
            && place.layout.axes[1].stride.is(1)
            && place.layout.axes.iter().all(|a| a.block.is_none());
        if whole && there && lo.iter().chain(hi).all(|&p| p == 0) {
            return Ok(place);
        }
        shape[1] = Dim::new(channels);
        let mut shift = vec![Dim::new(0); 2];
        for (i, (lo, hi)) in lo.iter().zip(hi).enumerate() {
            shape[2 + i] = &shape[2 + i] + (lo + hi);
            shift.push(Dim::new(-lo));
        }
        let layout = nhwc(&shape);
        let name = format!("{} with borders", self.value_name(x));
        let buffer = self.spare(name.clone(), dtype, layout.clone());
        self.shifted_copy(x, (buffer, dtype), &layout, shift, name)?;
        Ok(Place { buffer, layout })
    }
}
