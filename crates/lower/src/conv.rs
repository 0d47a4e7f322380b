//! Convolution. Five ways, by shape:
//!
//! * one tap without padding: a contraction over channels ([`Product`]), spatial axes merged;
//! * 3x3 with steps of one, where fewer multiplications pay: the module `winograd`;
//! * depthwise: taps multiplied and added elementwise, channels as the vector axis;
//! * few input channels: all taps of a tile are one long sum. The data is padded once, with the
//!   channels of a row of the image next to each other (`[N, H, C, W]`), and read through a view in
//!   which windows overlap (an axis for taps and one for outputs over the same elements). In the
//!   order (row of the window, channel, column of the window) the sum walks memory with two
//!   strides, so the product reads the data where it lies;
//! * otherwise, per tap a matrix product of a strided load of the data with that tap's weights:
//!
//! ```text
//! acc[BH*BW, BO] = 0
//! for kh, kw, c: acc = mma(acc, X[n, c.., oh*s+kh.., ow*s+kw..] as [BH*BW, BC], W[o.., c.., kh, kw])
//! ```
//!
//! Groups are a grid axis; tiles of channels then divide a group, so that none reaches into the
//! next.

use crate::block::{Dag, Emit, KernelParts, Pos};
use crate::contract::{Operands, Product, Side, finish_acc, give_anchor};
use crate::cost;
use crate::fuse::Group;
use crate::gpu::WindowForm;
use crate::lowering::Lowering;
use crate::map::block_of;
use crate::place::Place;
use crate::rows::func;
use crate::schedule::{ConvTiles, FEW_ROWS, conv_tiles, panel_among, panel_for};
use crate::taps::{Geometry, Stand};
use crate::views::{broadcast_axis, nominal};
use crate::window::{canon, stand};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{ExprId, Op as ExprOp, Value};
use tilewright_graph::{ConvAttrs, Node, Op, ValueId};
use tilewright_layout::{Axis, Dim, Layout, numel};
use tilewright_plan::{Form, Note};
use tilewright_tile::{Bound, CpuKnobs, Operand, TileType};

/// Rows of an image's product from which on its blocks need none of the next image's.
const IMAGE_ROWS: i64 = 128;

/// Up to this many input channels all taps are one sum.
const FEW_CHANNELS: i64 = 8;

impl Lowering<'_> {
    pub(crate) fn conv_group(&mut self, group: &Group) -> Result<()> {
        let graph = self.graph;
        let node = group.nodes.iter().map(|&n| &graph.nodes[n]).find_map(|n| match &n.op {
            Op::Conv(attrs) => Some((n, attrs)),
            _ => None,
        });
        let Some((node, attrs)) = node else {
            return Err(Error::bug("no convolution in its group"));
        };
        let dag = self.dag(group)?;
        let (name, note) = (self.kernel_name(group), self.note(group));
        let sizes = |v: ValueId| -> Vec<i64> {
            graph.shape(v).iter().map(|d| d.as_const().unwrap_or(0)).collect()
        };
        let w = sizes(node.inputs[1]);
        let geometry = Geometry {
            kernel: w[2..].to_vec(),
            strides: attrs.strides.clone(),
            pads: attrs.pads_lo.clone(),
            dilations: attrs.dilations.clone(),
        };
        let (geometry_, shape) = (geometry.clone(), &group.shape[..]);
        let conv = Conv { node, attrs, geometry: geometry_, w: w.clone(), shape, joined: 1 };
        let depthwise = attrs.groups > 1 && w[1] == 1 && w[0] == attrs.groups;
        // Groups as one, with zeros for weights.
        let one = ConvAttrs { groups: 1, ..attrs.clone() };
        let joined = (!depthwise && self.groups_as_one(&conv)).then(|| {
            let (mut w, geometry) = (w.clone(), geometry.clone());
            w[1] *= attrs.groups;
            Conv { node, attrs: &one, geometry, w, shape, joined: attrs.groups }
        });
        let strided = geometry.strides.iter().any(|s| *s != 1);
        // A single tap that misses nothing is a plain product.
        if (geometry.taps() > 1 || strided)
            && let Some(form) = self.windows(joined.as_ref().unwrap_or(&conv), &dag)?
        {
            let mut conv = joined.unwrap_or(conv);
            conv.w[1] = form.channels;
            conv.w[2..].copy_from_slice(&form.geometry.kernel);
            conv.geometry = form.geometry.clone();
            return self.by_taps(name, &conv, &dag, note, Some(form));
        }
        let unpadded = attrs.pads_lo.iter().chain(&attrs.pads_hi).all(|&p| p == 0);
        let single = geometry.taps() == 1 && unpadded && attrs.groups == 1;
        // Steps leave no matrix of pixels: what they reach is copied.
        if single && strided && self.on_gpu() && self.copied_windows(&name, &conv, &dag, &note)? {
            return Ok(());
        }
        if single {
            return self.pointwise(name, node, &geometry, group, &dag, note);
        }
        if depthwise {
            return self.depthwise(name, &conv, group, &dag, note);
        }
        if self.on_gpu() {
            if conv.is_patches() {
                return self.patches(name, &conv, &dag, note);
            }
            return match self.copied_windows(&name, &conv, &dag, &note)? {
                true => Ok(()),
                false => self.im2col(name, &conv, &dag, note),
            };
        }
        if let Some(form) = self.winograd_form(&conv, &dag)? {
            return self.winograd(name, &conv, &dag, note, &form);
        }
        self.by_taps(name, &conv, &dag, note, None)
    }

    /// The weights as a constant in panels of output channels, with the input channels next to
    /// them and the taps outside; or as they are when they are not constant.
    fn conv_weights(
        &mut self,
        v: ValueId,
        width: i64,
        taps_inside: bool,
        operands: Operands,
    ) -> Result<Place> {
        if self.on_gpu()
            && let Some(place) = self.turned_weight(v, 0, operands.right)?
        {
            return Ok(place);
        }
        if self.on_gpu() || self.graph.as_const(v).is_none() {
            return self.operand_place(v, operands.right);
        }
        let shape = self.graph.shape(v).to_vec();
        let group = self.depth_group(operands);
        let panels = |shape: &[Dim], depth: usize| match group {
            1 => Layout::panels(shape, 0, width),
            _ => Layout::grouped_panels(shape, 0, width, depth, group),
        };
        let layout = if taps_inside && shape[2..].iter().any(|d| !d.is(1)) {
            // The sum runs over channels and taps: no axis of the weights is its depth.
            let order = channel_before_last(shape.len());
            let permuted: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
            Layout::panels(&permuted, 0, width).permute(&inverse(&order))
        } else if taps_inside {
            panels(&shape, 1)
        } else {
            // [O, taps..., C] in panels, seen as [O, C, taps...].
            let rank = shape.len();
            let order: Vec<usize> = [0].into_iter().chain(2..rank).chain([1]).collect();
            let permuted: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
            panels(&permuted, rank - 1).permute(&inverse(&order))
        };
        Ok(self.const_place_as(v, operands.right, layout))
    }

    /// In which types a convolution of this element type multiplies and sums.
    pub(crate) fn conv_operands(&self, dtype: DType) -> Operands {
        let operand = self.operand_type(dtype);
        Operands { left: operand, right: operand, acc: dtype.compute() }
    }

    /// One tap: `X[n, c, s * i] * W[o, c]`.
    fn pointwise(
        &mut self,
        name: String,
        node: &Node,
        geometry: &Geometry,
        group: &Group,
        dag: &Dag,
        note: Note,
    ) -> Result<()> {
        let graph = self.graph;
        let w = node.inputs[1];
        let outputs = graph.shape(w)[0].as_const().unwrap_or(1);
        let dtype = graph.dtype(w);
        let operands = self.conv_operands(dtype);
        let rows = numel(&group.shape).floor_div(&group.shape[1]);
        let many = nominal(&rows, &graph.symbols) > FEW_ROWS && operands.right == DType::F32;
        let width = match many {
            true => panel_among(self.target, outputs),
            false => panel_for(self.target, outputs),
        };
        let wp = self.conv_weights(w, width, true, operands)?;
        // Images that fill blocks stay apart.
        let pixels = numel(&group.shape[2..]).as_const().unwrap_or(0);
        let many_images = pixels >= IMAGE_ROWS && group.shape[0].as_const().is_some_and(|n| n > 1);
        let channels = graph.shape(w)[1].clone();
        // The space: the result's axes, then the input channels.
        let mut space = group.shape.clone();
        space.push(channels);
        let result_axes = group.shape.len();
        let x_axes: Vec<usize> = [0, result_axes].into_iter().chain(2..result_axes).collect();
        let axis = |a: &Axis, extent: &Dim, step: i64| match &a.block {
            _ if a.extent.is(1) => broadcast_axis(extent.clone()),
            None => Axis { extent: extent.clone(), stride: &a.stride * step, block: None },
            Some(_) => Axis { extent: extent.clone(), ..a.clone() },
        };
        let side = |low: &Self, place: &Place, axes: Vec<Axis>| Side {
            buffer: place.buffer,
            dtype: low.plan.buffers[place.buffer].dtype,
            layout: Layout { axes, offset: place.layout.offset.clone() },
        };
        let (lhs, computed) = match self.computed_side(group, 0, &x_axes, &space)? {
            Some((side, made)) => (side, Some(made)),
            None => {
                let x = self.operand_place(node.inputs[0], operands.left)?;
                let n = axis(&x.layout.axes[0], &space[0], 1);
                let mut axes = vec![n, broadcast_axis(space[1].clone())];
                for i in 0..geometry.rank() {
                    axes.push(axis(&x.layout.axes[2 + i], &space[2 + i], geometry.strides[i]));
                }
                axes.push(x.layout.axes[1].clone());
                (side(self, &x, axes), None)
            }
        };
        let mut rhs: Vec<Axis> = space.iter().map(|d| broadcast_axis(d.clone())).collect();
        rhs[1] = wp.layout.axes[0].clone();
        let last = rhs.len() - 1;
        rhs[last] = wp.layout.axes[1].clone();
        let product = Product {
            result_axes,
            lhs,
            rhs: side(self, &wp, rhs),
            computed: [computed, None],
            operands,
            dtype,
            space,
            scaled: None,
            first: many_images.then_some(0),
        };
        self.product_kernel(name, &product, dag, note)
    }

    /// Whether a depthwise convolution is estimated to be faster on data with its zeros around it: a copy first,
    /// and no windows at borders, whose reads go under masks.
    ///
    /// On a Zen 4 core a tap at a border takes about as long as four inside, and an output's share of the copy as
    /// long as ten.
    fn padding_pays(&self, conv: &Conv<'_>) -> bool {
        let (g, x) = (&conv.geometry, self.graph.shape(conv.node.inputs[0]));
        let mut inside = 1.0;
        for i in 0..g.rank() {
            let (Some(have), Some(outputs)) = (x[2 + i].as_const(), conv.shape[2 + i].as_const())
            else {
                return false;
            };
            let reach = (g.kernel[i] - 1) * g.dilations[i];
            let fits = |&o: &i64| {
                let first = o * g.strides[i] - g.pads[i];
                first >= 0 && first + reach < have
            };
            inside *= (0..outputs).filter(fits).count() as f64 / outputs.max(1) as f64;
        }
        let elements: f64 =
            conv.shape.iter().map(|d| nominal(d, &self.graph.symbols) as f64).product();
        let saved = (1.0 - inside) * g.taps() as f64 * 4.0 - 10.0;
        elements * saved * 2.0 / self.target.flops_per_second * 1e9 > self.target.launch_ns
    }

    /// One input channel per output channel.
    fn depthwise(
        &mut self,
        name: String,
        conv: &Conv<'_>,
        group: &Group,
        dag: &Dag,
        note: Note,
    ) -> Result<()> {
        let (graph, node) = (self.graph, conv.node);
        let (mut x, w) = (self.place(node.inputs[0])?, node.inputs[1]);
        let mut geometry = conv.geometry.clone();
        if let Some(size) = block_of(&[&x.layout], &[1])
            && !self.on_gpu()
            && self.padding_pays(conv)
        {
            let more = vec![0; geometry.rank()];
            x = self.padded(conv, Padded::Blocked { size, more: &more })?;
            geometry.pads.fill(0);
        }
        let geometry = &geometry;
        let dtype = graph.dtype(w);
        // Channels contiguous for every tap.
        let w_shape = graph.shape(w).to_vec();
        let wp = match graph.as_const(w) {
            None => self.place(w)?,
            Some(_) if self.on_gpu() && !x.layout.axes[1].stride.is(1) => self.place(w)?,
            Some(_) => {
                let rank = w_shape.len();
                let order: Vec<usize> = (1..rank).chain([0]).collect();
                let permuted: Vec<Dim> = order.iter().map(|&a| w_shape[a].clone()).collect();
                let inverse: Vec<usize> = [rank - 1].into_iter().chain(0..rank - 1).collect();
                self.const_place(w, Layout::row_major(&permuted).permute(&inverse))
            }
        };
        let shape = &group.shape;
        let mut layouts = dag.layouts();
        layouts.push(&x.layout);
        let mut k = KernelParts::new(name, &graph.symbols);
        let (stand, tiles) = stand(self, &mut k, shape, &layouts);
        let stored = [x.buffer, wp.buffer].map(|b| self.plan.buffers[b].dtype);
        let xp = k.input(x.buffer, stored[0], x.layout.clone());
        let wparam = k.input(wp.buffer, stored[1], wp.layout);
        let acc = dtype.compute();
        let tile_shape: Vec<Dim> = stand.pos.iter().filter_map(|p| p.tile.clone()).collect();
        let zero = crate::block::zero(dtype);
        let channel = stand.channel().clone();
        let along: Vec<usize> = channel.tile.iter().map(|_| tile_shape.len() - 1).collect();
        // What the outputs of this block see through some taps, and the weights of these.
        let load = |k: &mut KernelParts, taps: &[Vec<Dim>]| -> Vec<Operand> {
            let mut args = Vec::new();
            for tap in taps {
                let xt = stand.load(k, xp, geometry, tap, &channel, zero);
                let mut index = vec![channel.start.clone(), Dim::new(0)];
                index.extend(tap.iter().cloned());
                let mut load = vec![Dim::new(1); index.len()];
                load[0] = Stand::len(&channel);
                let wt = k.b.load(wparam, index, load);
                let wt = k.b.reshape(wt, channel.tile.clone().into_iter().collect());
                args.push(k.b.plain(xt));
                args.push(Operand { tile: wt, along: along.clone() });
            }
            args
        };
        let (outer, row_taps) = match geometry.kernel.split_last() {
            Some((&last, outer)) => (outer, last.max(1)),
            None => (&[][..], 1),
        };
        let result = if self.on_gpu() && !outer.is_empty() {
            // A row of the window in each turn: registers for more are worth more as further blocks.
            let mut sum = vec![k.b.full(zero, TileType::new(acc, tile_shape.clone()))];
            let mut tap = Vec::new();
            for &extent in outer {
                let name = k.fresh("t");
                let (var, inner) = k.b.begin_for(&name, Dim::new(0), Dim::new(extent), &sum);
                tap.push(var);
                sum = inner;
            }
            let row: Vec<Vec<Dim>> =
                (0..row_taps).map(|t| [tap.as_slice(), &[Dim::new(t)]].concat()).collect();
            let mut args = vec![k.b.plain(sum[0])];
            args.extend(load(&mut k, &row));
            let mut types = vec![acc];
            types.extend((1..args.len()).map(|i| stored[(i - 1) % 2]));
            let step = func(&types, |f, a| {
                a[1..].chunks(2).fold(a[0], |total, pair| {
                    let (x, w) = (f.cast(pair[0], acc), f.cast(pair[1], acc));
                    f.op(ExprOp::Fma, &[x, w, total])
                })
            });
            sum = vec![k.b.map(step, args, tile_shape)];
            for _ in outer {
                sum = k.b.end_for(&sum);
            }
            finish_acc(&mut k, sum[0], acc, dtype)
        } else {
            // The taps are written out as one expression over their loads: sums stay in registers.
            let taps: Vec<Vec<Dim>> = geometry
                .each_tap()
                .into_iter()
                .map(|tap| tap.into_iter().map(Dim::new).collect())
                .collect();
            let args = load(&mut k, &taps);
            let types: Vec<DType> = (0..args.len()).map(|i| stored[i % 2]).collect();
            let sum = func(&types, |f, a| {
                // One sum for each row of the window: they do not wait for each other.
                let rows = a.chunks(2 * row_taps as usize).map(|row| {
                    let mut total = None;
                    for pair in row.chunks(2) {
                        let (x, w) = (f.cast(pair[0], acc), f.cast(pair[1], acc));
                        total = Some(match total {
                            None => f.op(ExprOp::Mul, &[x, w]),
                            Some(total) => f.op(ExprOp::Fma, &[x, w, total]),
                        });
                    }
                    total
                });
                let mut sums: Vec<ExprId> = rows.flatten().collect();
                while sums.len() > 1 {
                    let pairs = sums.chunks(2);
                    sums = pairs
                        .map(|p| match *p {
                            [x, y] => f.op(ExprOp::Add, &[x, y]),
                            _ => p[0],
                        })
                        .collect();
                }
                let total = sums.first().copied();
                let total = total.unwrap_or_else(|| f.value(Value::Float(0.0), acc));
                f.cast(total, dtype)
            });
            k.b.map(sum, args, tile_shape)
        };
        let canon = canon(shape.len());
        let mut emit = Emit::new(dag, &canon, stand.pos.clone());
        give_anchor(&mut emit, result);
        emit.store_all(&mut k);
        // As many neighbours as have their sums of a few rows of the window in registers.
        let knobs = CpuKnobs { jam: self.jam(), ..self.knobs() };
        self.launch(k, tiles, knobs, note)
    }

    /// The data with its zeros around it, laid out as `order` says.
    pub(crate) fn padded(&mut self, conv: &Conv<'_>, order: Padded<'_>) -> Result<Place> {
        let x = conv.node.inputs[0];
        let place = self.place(x)?;
        let (lo, mut hi) = (&conv.attrs.pads_lo, conv.attrs.pads_hi.clone());
        let row_major = |order: &[usize], shape: &[Dim]| {
            let permuted: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
            Layout::row_major(&permuted).permute(&inverse(order))
        };
        let near = channel_before_last(conv.w.len());
        let as_wanted = match order {
            Padded::RowMajor => place.layout.axes.iter().all(|a| a.block.is_none()),
            Padded::ChannelsNear => place.layout.permute(&near).is_row_major(),
            Padded::Blocked { more, .. } => more.iter().all(|&m| m == 0),
        };
        if lo.iter().chain(&hi).all(|&p| p == 0) && as_wanted {
            return Ok(place);
        }
        let mut shape = self.graph.shape(x).to_vec();
        let mut shift = vec![Dim::new(0); 2];
        if let Padded::Blocked { more, .. } = order {
            hi.iter_mut().zip(more).for_each(|(hi, more)| *hi += more);
        }
        for i in 0..lo.len() {
            shape[2 + i] = &shape[2 + i] + (lo[i] + hi[i]);
            shift.push(Dim::new(-lo[i]));
        }
        let layout = match order {
            Padded::RowMajor => Layout::row_major(&shape),
            Padded::ChannelsNear => row_major(&near, &shape),
            Padded::Blocked { size, .. } => Layout::blocked(&shape, 1, size),
        };
        let dtype = self.plan.buffers[place.buffer].dtype;
        let name = format!("{} padded", self.value_name(x));
        let buffer = self.plan.buffers.push(tilewright_plan::Buffer {
            name: name.clone(),
            value: None,
            dtype,
            layout: layout.clone(),
            storage: tilewright_plan::Storage::Arena,
        });
        let mut dag = Dag::default();
        let ext = crate::block::Ext {
            buffer: place.buffer,
            dtype,
            layout: place.layout,
            shift: Some(shift),
            fill: crate::block::zero(dtype),
        };
        let varies = vec![true; shape.len()];
        let node = dag.push(crate::block::DagOp::Ext(ext), vec![], varies, dtype);
        dag.stores.push(crate::block::DagStore { node, buffer, layout: layout.clone() });
        let bytes = tilewright_layout::numel(&shape) * (2 * dtype.size() as i64);
        let note = Note {
            label: "pad".to_string(),
            anchor: "map".to_string(),
            nodes: vec![name],
            estimate_ns: cost::copy_ns(self.target, nominal(&bytes, &self.graph.symbols) as f64),
            bytes,
            ..Note::default()
        };
        self.map_kernel("pad".to_string(), &dag, &shape, note)?;
        Ok(Place { buffer, layout })
    }

    /// Per tap a product; on a GPU also in the form of `windows`, with its operands.
    fn by_taps(
        &mut self,
        name: String,
        conv: &Conv<'_>,
        dag: &Dag,
        note: Note,
        windows: Option<WindowForm>,
    ) -> Result<()> {
        let graph = self.graph;
        let symbols = &graph.symbols;
        let (o, cg) = (conv.w[0], conv.w[1]);
        let groups = conv.attrs.groups;
        let og = o / groups;
        let taps_inside =
            cg <= FEW_CHANNELS && conv.geometry.taps() > 1 && groups == 1 && windows.is_none();
        let mut x = match &windows {
            Some(form) => form.data.clone(),
            None if taps_inside => self.padded(conv, Padded::ChannelsNear)?,
            None => self.place(conv.node.inputs[0])?,
        };
        let x_type = self.plan.buffers[x.buffer].dtype;
        let dtype = graph.dtype(conv.node.inputs[1]);
        let acc_type = dtype.compute();
        let operands = self.conv_operands(dtype);
        let knobs = self.product_knobs(operands.left, operands.right, acc_type);
        let width = panel_for(self.target, og);
        let w_place = match &windows {
            Some(form) => form.weights.clone(),
            None => self.conv_weights(conv.node.inputs[1], width, taps_inside, operands)?,
        };
        let shape = conv.shape;
        let rank = shape.len();
        let size = |d: &Dim| nominal(d, symbols);
        let x_block = block_of(&[&x.layout], &[1]);
        let (oh, ow) = match rank {
            3 => (1, size(&shape[2])),
            _ => (size(&shape[rank - 2]), size(&shape[rank - 1])),
        };
        let others: i64 =
            size(&shape[0]) * shape[2..rank - 1].iter().map(size).product::<i64>() / oh.max(1);
        let depth_taps = if taps_inside { conv.geometry.taps() } else { 1 };
        let t = conv_tiles(self.target, &knobs, others.max(1) * groups, oh, ow, og, cg, depth_taps);
        let out_block = block_of(&dag.layouts(), &[1]);
        let divisor = |n: i64, most: i64| (1..=most.min(n)).rev().find(|d| n % d == 0).unwrap_or(1);
        let mut bo = t.bo;
        if let Some(b) = out_block {
            bo = crate::schedule::round_up(bo, b);
        }
        let mut bc = t.bc;
        if let Some(b) = x_block {
            bc = if cg >= b { crate::schedule::even(cg, bc, b) } else { cg };
        }
        if groups > 1 {
            (bo, bc) = (divisor(og, bo), divisor(cg, bc));
            if let Some(b) = x_block
                && bc % b != 0
            {
                bc = divisor(cg, bc.min(b));
            }
        }

        let mut pads = conv.geometry.pads.clone();
        if let Some(size) = x_block
            && !taps_inside
            && groups == 1
            && knobs.unit.depth_group() == 1
            && (t.bh == 1 || fills_groups(t.bw, i64::from(knobs.mma_rows)))
            && let Some(more) = conv.beyond(self.graph.shape(conv.node.inputs[0]), &t)
        {
            x = self.padded(conv, Padded::Blocked { size, more: &more })?;
            pads.fill(0);
        }
        let geometry = Geometry { pads, ..conv.geometry.clone() };

        let mut k = KernelParts::new(name, symbols);
        let mut tiles = Vec::new();
        let mut tile = |k: &mut KernelParts, name: &str, value: i64| {
            let (dim, name) = k.tile(name);
            tiles.push((name, value));
            dim
        };
        let bo_dim = tile(&mut k, "BO", bo);
        let bc_dim = match taps_inside {
            true => Dim::new(cg),
            false => tile(&mut k, "BC", bc),
        };
        let bw_dim = tile(&mut k, "BW", t.bw);
        let bh_dim = (t.bh > 1).then(|| tile(&mut k, "BH", t.bh));
        let bounded = !self.on_gpu();
        if groups > 1 && bounded {
            // The next group's channels lie behind this one's.
            k.bound("BO", Bound::Divides(og));
        }
        if !taps_inside && cg % bc == 0 && bounded {
            k.bound("BC", Bound::Divides(cg));
        }
        let n = k.grid("pn", shape[0].clone());
        let g = if groups > 1 { k.grid("pg", Dim::new(groups)) } else { Dim::new(0) };
        let po = k.grid("po", Dim::new(og).ceil_div(&bo_dim));
        let mut pos = vec![Pos::unit(n)];
        for (i, extent) in shape.iter().enumerate().skip(2) {
            let size = if i + 1 == rank {
                Some(bw_dim.clone())
            } else if i + 2 == rank {
                bh_dim.clone()
            } else {
                None
            };
            pos.push(match size {
                Some(tile) => {
                    let p = k.grid(&format!("p{i}"), extent.ceil_div(&tile));
                    Pos::tile(p * &tile, tile)
                }
                None => Pos::unit(k.grid(&format!("p{i}"), extent.clone())),
            });
        }
        let first_channel = &g * og + po * &bo_dim;
        pos.push(Pos::tile(first_channel.clone(), bo_dim.clone()));
        let stand = Stand { pos };
        let rows = stand.pos[..rank - 1]
            .iter()
            .filter_map(|p| p.tile.clone())
            .fold(Dim::new(1), |n, t| n * t);
        let acc_ty = TileType::new(acc_type, vec![rows.clone(), bo_dim.clone()]);
        let mut acc = vec![k.b.full(crate::block::zero(acc_type), acc_ty)];

        let x_layout = if taps_inside { conv.overlapping(&x.layout) } else { x.layout.clone() };
        let xp = k.input(x.buffer, x_type, x_layout.clone());
        let w_type = self.plan.buffers[w_place.buffer].dtype;
        let wp = k.input(w_place.buffer, w_type, w_place.layout);
        // Loops over taps, then over input channels.
        let mut tap: Vec<Dim> = Vec::new();
        let mut opened = 0;
        for &extent in &conv.geometry.kernel {
            if taps_inside || extent == 1 {
                tap.push(Dim::new(0));
                continue;
            }
            let name = k.fresh("t");
            let (var, inner) = k.b.begin_for(&name, Dim::new(0), Dim::new(extent), &acc);
            tap.push(var);
            acc = inner;
            opened += 1;
        }
        let mut c0 = Dim::new(0);
        if !taps_inside {
            let name = k.fresh("c");
            let blocks = Dim::new(cg).ceil_div(&bc_dim);
            let (c, inner) = k.b.begin_for(&name, Dim::new(0), blocks, &acc);
            acc = inner;
            opened += 1;
            c0 = c * &bc_dim;
        }
        let depth = &bc_dim * depth_taps;
        let xt = if taps_inside {
            conv.load_windows(&mut k, &stand, xp, &x_layout)
        } else {
            let channel = Pos::tile(&g * cg + &c0, bc_dim.clone());
            let zero = crate::block::zero(x_type);
            stand.load(&mut k, xp, &geometry, &tap, &channel, zero)
        };
        let xt = finish_acc(&mut k, xt, x_type, operands.left);
        let xt = k.b.reshape(xt, vec![rows, depth.clone()]);
        let mut index = vec![first_channel, c0.clone()];
        index.extend(tap);
        let mut load = vec![bo_dim.clone(), bc_dim.clone()];
        let seen = |&e: &i64| Dim::new(if taps_inside { e } else { 1 });
        load.extend(conv.geometry.kernel.iter().map(seen));
        let wt = k.b.load(wp, index, load);
        let wt = finish_acc(&mut k, wt, w_type, operands.right);
        let wt = match taps_inside {
            true => k.b.permute(wt, &channel_before_last(conv.w.len())),
            false => wt,
        };
        let wt = k.b.reshape(wt, vec![bo_dim.clone(), depth]);
        let wt = k.b.permute(wt, &[1, 0]);
        let limit = (!taps_inside && cg % bc != 0).then(|| Dim::new(cg) - c0);
        let mut sum = vec![k.b.mma(acc[0], xt, wt, limit)];
        for _ in 0..opened {
            sum = k.b.end_for(&sum);
        }
        let result = finish_acc(&mut k, sum[0], acc_type, dtype);
        let tile_shape: Vec<Dim> = stand.pos.iter().filter_map(|p| p.tile.clone()).collect();
        let result = k.b.reshape(result, tile_shape);
        let canon = canon(rank);
        let mut emit = Emit::new(dag, &canon, stand.pos.clone());
        give_anchor(&mut emit, result);
        emit.store_all(&mut k);
        let form = windows.and_then(|form| form.over(&k.args));
        let forms = form.into_iter().map(|f| Form::Product(Box::new(f))).collect();
        self.launch_forms(k, tiles, self.with_chains(knobs, dag), forms, note)
    }
}

/// A convolution by taps.
pub(crate) struct Conv<'a> {
    pub(crate) node: &'a Node,
    pub(crate) attrs: &'a ConvAttrs,
    pub(crate) geometry: Geometry,
    /// Extents of the weights.
    pub(crate) w: Vec<i64>,
    /// Shape of the result.
    pub(crate) shape: &'a [Dim],
    /// Groups of the weights that are taken as one; 1: as they are.
    pub(crate) joined: i64,
}

impl Conv<'_> {
    /// Whether windows meet but do not overlap: each number of the data is in one of them at most.
    fn is_patches(&self) -> bool {
        let (attrs, g) = (self.attrs, &self.geometry);
        attrs.groups == 1
            && attrs.pads_lo.iter().chain(&attrs.pads_hi).all(|&p| p == 0)
            && g.kernel == g.strides
            && g.dilations.iter().all(|&d| d == 1)
    }
}

/// Whether micro-kernels of at most `most` rows take whole rows of an image, or equal parts of one,
/// without leaving more than half of their registers idle.
fn fills_groups(row: i64, most: i64) -> bool {
    let taken = match row <= most {
        true => most / row.max(1) * row,
        false => (1..=most).rev().find(|r| row % r == 0).unwrap_or(1),
    };
    2 * taken > most
}

/// How padded data lies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Padded<'a> {
    RowMajor,
    /// Row-major, but the channels before the last axis.
    ChannelsNear,
    /// Channels in blocks of `size`; `more` zeros at the end of each spatial axis.
    Blocked {
        size: i64,
        more: &'a [i64],
    },
}

impl Conv<'_> {
    /// Zeros that whole tiles read beyond the padding at the end of each spatial axis, when padded
    /// data of this shape is worth it: when a product can then read it where it lies. `None` also
    /// when there is no padding, or sizes are not known.
    fn beyond(&self, x: &[Dim], t: &ConvTiles) -> Option<Vec<i64>> {
        let (lo, hi) = (&self.attrs.pads_lo, &self.attrs.pads_hi);
        if lo.iter().chain(hi).all(|&p| p == 0) {
            return None;
        }
        let rank = self.geometry.rank();
        let mut more = Vec::new();
        for i in 0..rank {
            let tile = match rank - 1 - i {
                0 => t.bw,
                1 => t.bh,
                _ => 1,
            };
            let (have, outputs) = (x[2 + i].as_const()?, self.shape[2 + i].as_const()?);
            let last = (crate::schedule::round_up(outputs, tile) - 1) * self.geometry.strides[i];
            let reach = last + (self.geometry.kernel[i] - 1) * self.geometry.dilations[i] + 1;
            more.push((reach - (have + lo[i] + hi[i])).max(0));
        }
        Some(more)
    }

    /// `[N, sums..., outputs...]` over padded data: windows overlap in memory. The sums are in the
    /// order of [`channel_before_last`]; neighbours that walk memory with one stride are one axis.
    fn overlapping(&self, x: &Layout) -> Layout {
        let mut sums: Vec<Axis> = Vec::new();
        for axis in channel_before_last(self.w.len()).into_iter().skip(1) {
            let mut next = Axis {
                extent: Dim::new(self.w[axis]),
                stride: x.axes[axis].stride.clone(),
                block: None,
            };
            if axis >= 2 {
                next.stride = next.stride * self.geometry.dilations[axis - 2];
            }
            // The last axis stays apart: columns of neighbouring rows overlap.
            match sums.last_mut() {
                Some(before) if axis == 1 && before.stride == &next.stride * &next.extent => {
                    next.extent = &next.extent * &before.extent;
                    *before = next;
                }
                _ => sums.push(next),
            }
        }
        let mut axes = vec![x.axes[0].clone()];
        axes.extend(sums);
        for i in 0..self.geometry.rank() {
            let stride = &x.axes[2 + i].stride * self.geometry.strides[i];
            axes.push(Axis { extent: self.shape[2 + i].clone(), stride, block: None });
        }
        Layout { axes, offset: x.offset.clone() }
    }

    /// All windows of a block's outputs through [`Conv::overlapping`]: `[spatial tile axes..., sums...]`.
    fn load_windows(
        &self,
        k: &mut KernelParts,
        stand: &Stand,
        x: tilewright_tile::ParamId,
        layout: &Layout,
    ) -> tilewright_tile::TileId {
        let sums = &layout.axes[1..layout.axes.len() - self.geometry.rank()];
        let mut index = vec![stand.pos[0].start.clone()];
        let mut shape = vec![Dim::new(1)];
        let mut flat = Vec::new();
        for axis in sums {
            index.push(Dim::new(0));
            shape.push(axis.extent.clone());
            flat.push(axis.extent.clone());
        }
        for pos in &stand.pos[1..=self.geometry.rank()] {
            index.push(pos.start.clone());
            shape.push(Stand::len(pos));
            flat.extend(pos.tile.clone());
        }
        let (n, rank) = (sums.len(), flat.len());
        let tile = k.b.load(x, index, shape);
        let tile = k.b.reshape(tile, flat);
        let perm: Vec<usize> = (n..rank).chain(0..n).collect();
        k.b.permute(tile, &perm)
    }
}

/// The axes of `[N or O, C, spatial...]` with the channels just before the last spatial axis.
fn channel_before_last(rank: usize) -> Vec<usize> {
    let mut order: Vec<usize> = [0].into_iter().chain(2..rank).collect();
    order.insert(rank - 2, 1);
    order
}

/// The permutation that undoes `order`.
pub(crate) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
    inverse
}
