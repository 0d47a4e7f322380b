//! Winograd's form of 3x3 convolutions with steps of one: fewer multiplications, on transformed tiles.
//!
//! An image is cut into tiles of `m x m` outputs (`m` = 2 or 4), each computed from `t x t` data, `t = m + 2`
//! (tiles overlap by two). With the constant matrices of a [`Form`], for each tile and pair of channels,
//!
//! ```text
//! V = B' * data * B      U = G * weights * G'      result = A' * (sum over channels of U .* V) * A
//! ```
//!
//! The sums in the middle are `t * t` matrix products of tiles and channels: `t * t / (m * m)` multiplications
//! for each output and pair of channels, where the definition takes 9. Three kernels:
//!
//! 1. `V[t*t, N, tiles, C]`: maps over the data, zeros around the image;
//! 2. `M[t*t, N, tiles, O] = V * U`: a product with `t * t` batches; `U` is computed here, once, in `f64`;
//! 3. maps over `M`, one for each of the `m * m` outputs of a tile, with the group's epilogue.
//!
//! Errors: with `m = 2` the matrices add and halve, and results lose about as much as by the definition
//! in another order of sums. Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015).

use crate::block::{Dag, DagOp, DagStore, Emit, KernelParts, Pos};
use crate::contract::{Product, Side, give_anchor};
use crate::conv::Conv;
use crate::cost;
use crate::lowering::Lowering;
use crate::map::block_of;
use crate::place::Place;
use crate::rows::func;
use crate::schedule::{even, panel_for, round_up};
use crate::taps::{Geometry, Stand};
use crate::views::{broadcast_axis, is_broadcast};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_expr::{ExprId, FuncBuilder, Op as ExprOp};
use tilewright_layout::{Axis, Block, Dim, Layout};
use tilewright_plan::{Buffer, BufferId, Note, Storage};
use tilewright_tile::TileId;

/// The matrices for one size of tiles.
struct Form {
    /// `B'`: `t` rows of `t`.
    data: &'static [&'static [f64]],
    /// `G`: `t` rows of 3.
    weights: &'static [[f64; 3]],
    /// `A'`: `m` rows of `t`.
    result: &'static [&'static [f64]],
}

/// `F(2x2, 3x3)`: 4 multiplications an output.
const TWO: Form = Form {
    data: &[
        &[1.0, 0.0, -1.0, 0.0],
        &[0.0, 1.0, 1.0, 0.0],
        &[0.0, -1.0, 1.0, 0.0],
        &[0.0, 1.0, 0.0, -1.0],
    ],
    weights: &[[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]],
    result: &[&[1.0, 1.0, 1.0, 0.0], &[0.0, 1.0, -1.0, -1.0]],
};

/// All forms.
const FORMS: [&Form; 1] = [&TWO];

/// Channels on both sides, at least: the sums of the products are as long.
const CHANNELS: i64 = 32;

/// Tiles, at least: so often each transformed weight is used, and there are more of them than of the weights.
const TILES: i64 = 32;

/// Flops of the convolution by its definition, at least: 70 us of two threads of a Zen 4, where two more launches and
/// the passes of the transforms are paid for.
const FLOPS: i64 = 16_000_000;

impl Form {
    /// Outputs of a tile along one axis.
    fn outputs(&self) -> i64 {
        self.result.len() as i64
    }

    /// Data of a tile along one axis.
    fn points(&self) -> i64 {
        self.data.len() as i64
    }

    /// Whether this form is faster than the definition for a result of `[n, o, h, w]` from `c` channels, on a machine with a
    /// last-level cache of so many bytes: what goes through memory between the kernels takes half of it at most, of all images
    /// or, in steps that go image by image, of one. Such steps take no more weights than a quarter of it.
    ///
    /// Sums have another order here. So this depends on sizes and caches only, not on measured rates or on the number of
    /// threads, and results do not either.
    fn pays(&self, l3_bytes: i64, [n, o, h, w, c]: [i64; 5]) -> Option<Images> {
        let weights = 4 * self.points() * self.points() * c * o;
        if self.pays_at_once(l3_bytes, [n, o, h, w, c]) {
            Some(Images::Together)
        } else if n > 1 && 4 * weights <= l3_bytes && self.pays_at_once(l3_bytes, [1, o, h, w, c]) {
            Some(Images::Apart)
        } else {
            None
        }
    }

    /// As above, of so many images together.
    fn pays_at_once(&self, l3_bytes: i64, [n, o, h, w, c]: [i64; 5]) -> bool {
        let m = self.outputs();
        let tiles = n * (h / m) * (w / m);
        let between = self.points() * self.points() * tiles * (c + o) * 4;
        o.min(c) >= CHANNELS
            && tiles >= TILES
            && 2 * 9 * (n * h * w) * c * o >= FLOPS
            && 2 * between <= l3_bytes
    }

    /// The transformed weights `[t*t, ceil(O / width), C, width]` of `[O, C, 3, 3]`: all outputs of a panel at once.
    fn transformed(&self, w: &[f32], [o, c]: [usize; 2], width: usize) -> Vec<f32> {
        let t = self.weights.len();
        let panels = o.div_ceil(width);
        let mut all = vec![0.0f32; t * t * panels * c * width];
        for panel in 0..panels {
            let mut taps = vec![0.0f64; 9 * width];
            let outputs = width.min(o - panel * width);
            for channel in 0..c {
                for i in 0..outputs {
                    let at = ((panel * width + i) * c + channel) * 9;
                    for (tap, value) in w[at..at + 9].iter().enumerate() {
                        taps[tap * width + i] = f64::from(*value);
                    }
                }
                let tap = |row: usize, column: usize| {
                    let at = (3 * row + column) * width;
                    &taps[at..at + width]
                };
                for (p, row) in self.weights.iter().enumerate() {
                    // One row of `G * weights`.
                    let mut mixed = vec![0.0f64; 3 * width];
                    for (j, line) in mixed.chunks_exact_mut(width).enumerate() {
                        mix(row, [tap(0, j), tap(1, j), tap(2, j)], line, |x| x);
                    }
                    let lines = [0, 1, 2].map(|j| &mixed[j * width..(j + 1) * width]);
                    for (q, row) in self.weights.iter().enumerate() {
                        let at = (((p * t + q) * panels + panel) * c + channel) * width;
                        let line = &mut all[at..at + width];
                        mix(row, lines, line, |x| x as f32);
                    }
                }
            }
        }
        all
    }
}

/// `factors[0] * x + factors[1] * y + factors[2] * z` of `[x, y, z]`, element by element.
fn mix<T>(factors: &[f64; 3], [x, y, z]: [&[f64]; 3], to: &mut [T], last: impl Fn(f64) -> T) {
    for (((to, x), y), z) in to.iter_mut().zip(x).zip(y).zip(z) {
        *to = last(factors[0] * x + factors[1] * y + factors[2] * z);
    }
}

/// Adds `terms`, each times its coefficient; none is zero.
fn combined(f: &mut FuncBuilder, terms: &[(f64, ExprId)], dtype: DType) -> ExprId {
    let mut terms = terms.to_vec();
    // A term that is added comes first, so that nothing has to be negated.
    terms.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut sum = None;
    for (factor, x) in terms {
        sum = Some(match sum {
            None if factor == 1.0 => x,
            None => {
                let factor = f.constant(factor, dtype);
                f.op(ExprOp::Mul, &[factor, x])
            }
            Some(sum) if factor == 1.0 => f.op(ExprOp::Add, &[sum, x]),
            Some(sum) if factor == -1.0 => f.op(ExprOp::Sub, &[sum, x]),
            Some(sum) => {
                let factor = f.constant(factor, dtype);
                f.op(ExprOp::Fma, &[factor, x, sum])
            }
        });
    }
    sum.unwrap_or_else(|| f.constant(0.0, dtype))
}

/// `sum over i, j of down[i] * across[j] * x[i][j]` as a map over the tiles `x`, row by row.
fn transform(
    k: &mut KernelParts,
    [down, across]: [&[f64]; 2],
    x: &[TileId],
    shape: &[Dim],
) -> TileId {
    let used = |r: &[f64]| (0..r.len()).filter(|&i| r[i] != 0.0).collect::<Vec<usize>>();
    let (rows, columns) = (used(down), used(across));
    let pairs = rows.iter().flat_map(|&i| columns.iter().map(move |&j| (i, j)));
    let picked: Vec<TileId> = pairs.map(|(i, j)| x[i * across.len() + j]).collect();
    let dtype = DType::F32;
    let map = func(&vec![dtype; picked.len()], |f, a| {
        let lines: Vec<(f64, ExprId)> = rows
            .iter()
            .zip(a.chunks(columns.len()))
            .map(|(&i, line)| {
                let terms: Vec<(f64, ExprId)> =
                    columns.iter().map(|&j| across[j]).zip(line.iter().copied()).collect();
                (down[i], combined(f, &terms, dtype))
            })
            .collect();
        combined(f, &lines, dtype)
    });
    let args = picked.iter().map(|&t| k.b.plain(t)).collect();
    k.b.map(map, args, shape.to_vec())
}

/// How images lie in transformed tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Images {
    /// Each of the products is over the tiles of all images.
    Together,
    /// One image's products lie behind another's: the kernels go image by image.
    Apart,
}

/// A convolution in Winograd's form.
pub(crate) struct Winograd {
    form: &'static Form,
    images: Images,
    /// Images, output channels, height, width, input channels.
    sizes: [i64; 5],
    /// Channels of a block of the data, and of the result.
    blocks: [i64; 2],
}

impl Lowering<'_> {
    /// The form to compute a convolution in, when it can be had and is faster.
    pub(crate) fn winograd_form(&mut self, conv: &Conv<'_>, dag: &Dag) -> Result<Option<Winograd>> {
        let (graph, g) = (self.graph, &conv.geometry);
        let [x, w] = [conv.node.inputs[0], conv.node.inputs[1]];
        let operands = self.conv_operands(graph.dtype(w));
        let plain = g.kernel == [3, 3]
            && g.strides == [1, 1]
            && g.dilations == [1, 1]
            && conv.attrs.groups == 1
            && [operands.left, operands.right, operands.acc] == [DType::F32; 3]
            && graph.as_const(w).is_some_and(|w| w.dtype() == DType::F32);
        if self.on_gpu() || !plain {
            return Ok(None);
        }
        let known: Option<Vec<i64>> = conv.shape.iter().map(Dim::as_const).collect();
        let Some([n, _, height, width]) = known.as_deref() else { return Ok(None) };
        let (n, height, width) = (*n, *height, *width);
        let (o, c) = (conv.w[0], conv.w[1]);
        let sizes = [n, o, height, width, c];
        let even = |f: &Form| height % f.outputs() == 0 && width % f.outputs() == 0;
        let pays = |f: &'static Form| {
            let images = f.pays(self.target.l3_bytes, sizes).filter(|_| even(f))?;
            Some((f, images))
        };
        let Some((form, images)) = FORMS.into_iter().find_map(pays) else { return Ok(None) };
        // Whole vectors of channels on both sides, and an epilogue that can be split.
        let place = self.place(x)?;
        let data = block_of(&[&place.layout], &[1]);
        let result = block_of(&dag.layouts(), &[1]);
        let (Some(data), Some(result)) = (data, result) else { return Ok(None) };
        let whole = c % data == 0 && o % result == 0;
        let f32_data = self.plan.buffers[place.buffer].dtype == DType::F32;
        let simple = dag.nodes.iter().all(|node| match &node.op {
            DagOp::Ext(e) => e.shift.is_none(),
            DagOp::Anchor | DagOp::Map(_) => true,
            _ => false,
        });
        let split = dag.layouts().iter().all(|l| l.axes[2..].iter().all(|a| a.block.is_none()));
        let good = whole && f32_data && simple && split;
        Ok(good.then_some(Winograd { form, images, sizes, blocks: [data, result] }))
    }

    /// Memory for one transformed tensor: points, images, tiles down and across, channels.
    fn transformed(&mut self, name: &str, shape: &[Dim], images: Images) -> Place {
        let layout = match images {
            Images::Together => Layout::row_major(shape),
            Images::Apart => {
                let mut of_image = shape.to_vec();
                of_image.swap(0, 1);
                Layout::row_major(&of_image).permute(&[1, 0, 2, 3, 4])
            }
        };
        let buffer = self.plan.buffers.push(Buffer {
            name: name.to_string(),
            value: None,
            dtype: DType::F32,
            layout: layout.clone(),
            storage: Storage::Arena,
        });
        Place { buffer, layout }
    }

    /// Writes the three kernels.
    pub(crate) fn winograd(
        &mut self,
        name: String,
        conv: &Conv<'_>,
        dag: &Dag,
        note: Note,
        how: &Winograd,
    ) -> Result<()> {
        let [n, o, height, width, c] = how.sizes;
        let (t, m) = (how.form.points(), how.form.outputs());
        let tiles = [n, height / m, width / m];
        let points = Dim::new(t * t);
        let shape = |channels: i64| -> Vec<Dim> {
            let tiles = tiles.map(Dim::new);
            [&[points.clone()][..], &tiles, &[Dim::new(channels)]].concat()
        };
        let base = self.value_name(conv.node.inputs[0]);
        let data = self.transformed(&format!("{base} transformed"), &shape(c), how.images);
        let sums = self.transformed(&format!("{name} transformed"), &shape(o), how.images);
        let step = |label: &str, anchor: &str, elements: i64| Note {
            label: label.to_string(),
            anchor: anchor.to_string(),
            nodes: vec![base.clone()],
            bytes: Dim::new(4 * elements),
            estimate_ns: cost::copy_ns(self.target, 4.0 * elements as f64),
            ..Note::default()
        };
        let results = n * height * width;
        let vectors = t * t * tiles.iter().product::<i64>();
        let before = step("winograd data", "map", results * c + vectors * c);
        let after = Note {
            flops: Dim::new(0),
            estimate_ns: cost::copy_ns(self.target, 4.0 * ((vectors + results) * o) as f64),
            ..note.clone()
        };
        let product = Note {
            label: "winograd product".to_string(),
            flops: Dim::new(2 * vectors * c * o),
            bytes: Dim::new(4 * (vectors * (c + o) + t * t * c * o)),
            ..note
        };
        self.transform_data(conv, how, tiles, &data, before)?;
        self.multiply(conv, how, tiles, [&data, &sums], product)?;
        self.transform_result(name, how, tiles, &sums, dag, after)
    }

    /// The first kernel.
    fn transform_data(
        &mut self,
        conv: &Conv<'_>,
        how: &Winograd,
        tiles: [i64; 3],
        to: &Place,
        note: Note,
    ) -> Result<()> {
        let x = self.place(conv.node.inputs[0])?;
        let (t, m) = (how.form.points(), how.form.outputs());
        let geometry = Geometry {
            kernel: vec![t, t],
            strides: vec![m, m],
            pads: conv.geometry.pads.clone(),
            dilations: vec![1, 1],
        };
        let mut k = KernelParts::new("winograd_data", &self.graph.symbols);
        let (stand, sizes) = stand(&mut k, tiles, how.sizes[4], how.blocks[0]);
        let xp = k.input(x.buffer, DType::F32, x.layout.clone());
        let out = k.output(to.buffer, DType::F32, to.layout.clone());
        let zero = crate::block::zero(DType::F32);
        let seen: Vec<TileId> = geometry
            .each_tap()
            .into_iter()
            .map(|tap| {
                let tap: Vec<Dim> = tap.into_iter().map(Dim::new).collect();
                stand.load(&mut k, xp, &geometry, &tap, stand.channel(), zero)
            })
            .collect();
        let shape: Vec<Dim> = stand.pos.iter().filter_map(|p| p.tile.clone()).collect();
        let lens: Vec<Dim> = stand.pos.iter().map(Stand::len).collect();
        for (i, down) in how.form.data.iter().enumerate() {
            for (j, across) in how.form.data.iter().enumerate() {
                let value = transform(&mut k, [down, across], &seen, &shape);
                let mut index = vec![Dim::new(i as i64 * t + j as i64)];
                index.extend(stand.pos.iter().map(|p| p.start.clone()));
                let value = k.b.reshape(value, [&[Dim::new(1)][..], &lens].concat());
                k.b.store(out, index, value);
            }
        }
        let knobs = self.knobs();
        self.launch(k, sizes, knobs, note)
    }

    /// The second kernel.
    fn multiply(
        &mut self,
        conv: &Conv<'_>,
        how: &Winograd,
        tiles: [i64; 3],
        [data, sums]: [&Place; 2],
        note: Note,
    ) -> Result<()> {
        let [_, o, _, _, c] = how.sizes;
        let points = how.form.points() * how.form.points();
        let width = panel_for(self.target, o);
        let weights = self.transformed_weights(conv, how, width)?;
        let mut space = vec![Dim::new(points)];
        space.extend(tiles.map(Dim::new));
        space.extend([Dim::new(o), Dim::new(c)]);
        // The data repeats along the outputs, the weights along the tiles.
        let mut lhs = data.layout.clone();
        lhs.axes.insert(4, broadcast_axis(Dim::new(o)));
        let mut rhs: Vec<Axis> = space.iter().map(|d| broadcast_axis(d.clone())).collect();
        let panels = round_up(o, width) / width;
        rhs[0].stride = Dim::new(panels * c * width);
        rhs[4].stride = Dim::new(c * width);
        rhs[4].block = Some(Block { size: width, stride: Dim::new(1) });
        rhs[5].stride = Dim::new(width);
        let side = |buffer: BufferId, layout: Layout| Side { buffer, dtype: DType::F32, layout };
        let product = Product {
            result_axes: 5,
            lhs: side(data.buffer, lhs),
            rhs: side(weights, Layout { axes: rhs, offset: Dim::new(0) }),
            computed: [None, None],
            operands: self.conv_operands(DType::F32),
            dtype: DType::F32,
            space,
            scaled: None,
            first: (how.images == Images::Apart).then_some(1),
        };
        let mut dag = Dag::default();
        let node = dag.push(DagOp::Anchor, vec![], vec![true; 5], DType::F32);
        dag.stores.push(DagStore { node, buffer: sums.buffer, layout: sums.layout.clone() });
        self.product_kernel("winograd_product".to_string(), &product, &dag, note)
    }

    /// A constant with the transformed weights.
    fn transformed_weights(
        &mut self,
        conv: &Conv<'_>,
        how: &Winograd,
        width: i64,
    ) -> Result<BufferId> {
        let [_, o, _, _, c] = how.sizes.map(|n| usize::try_from(n).unwrap_or(0));
        let panel = usize::try_from(width).unwrap_or(1);
        let v = conv.node.inputs[1];
        let Some(w) = self.graph.as_const(v) else {
            return Err(Error::bug("weights to transform"));
        };
        let values = how.form.transformed(w.aligned().as_slice::<f32>()?, [o, c], panel);
        w.shared_bytes().let_go();
        let t = how.form.weights.len();
        let shape = [t * t, o.div_ceil(panel), c, panel];
        let tensor = Tensor::from_slice(&shape, &values)?;
        let dims: Vec<Dim> = shape.iter().map(|&d| Dim::from(d)).collect();
        Ok(self.plan.buffers.push(Buffer {
            name: format!("{} transformed", self.value_name(v)),
            value: None,
            dtype: DType::F32,
            layout: Layout::row_major(&dims),
            storage: Storage::Const(tensor),
        }))
    }

    /// The third kernel.
    fn transform_result(
        &mut self,
        name: String,
        how: &Winograd,
        tiles: [i64; 3],
        sums: &Place,
        dag: &Dag,
        note: Note,
    ) -> Result<()> {
        let (t, m) = (how.form.points(), how.form.outputs());
        let dag = split_tiles(dag, m);
        // Images, rows of tiles, rows in a tile, tiles of a row, columns in a tile, channels.
        let canon: Vec<Vec<usize>> = [0, 2, 3, 4, 5, 1].iter().map(|&a| vec![a]).collect();
        let mut k = KernelParts::new(name, &self.graph.symbols);
        let (stand, sizes) = stand(&mut k, tiles, how.sizes[1], how.blocks[1]);
        let from = k.input(sums.buffer, DType::F32, sums.layout.clone());
        let shape: Vec<Dim> = stand.pos.iter().filter_map(|p| p.tile.clone()).collect();
        let lens: Vec<Dim> = stand.pos.iter().map(Stand::len).collect();
        let seen: Vec<TileId> = (0..t * t)
            .map(|point| {
                let mut index = vec![Dim::new(point)];
                index.extend(stand.pos.iter().map(|p| p.start.clone()));
                let tile = k.b.load(from, index, [&[Dim::new(1)][..], &lens].concat());
                k.b.reshape(tile, shape.clone())
            })
            .collect();
        for (i, down) in how.form.result.iter().enumerate() {
            for (j, across) in how.form.result.iter().enumerate() {
                let value = transform(&mut k, [down, across], &seen, &shape);
                let within = [i, j].map(|at| Pos::unit(Dim::new(at as i64)));
                let [image, row, column, channel] = [0, 1, 2, 3].map(|p| stand.pos[p].clone());
                let [down, across] = within;
                let pos = vec![image, row, down, column, across, channel];
                let mut emit = Emit::new(&dag, &canon, pos);
                give_anchor(&mut emit, value);
                emit.store_all(&mut k);
            }
        }
        let knobs = self.knobs();
        self.launch(k, sizes, knobs, note)
    }
}

/// A block's position on the tiles of an image, channels last, and its sizes.
fn stand(
    k: &mut KernelParts,
    [n, down, across]: [i64; 3],
    channels: i64,
    block: i64,
) -> (Stand, Vec<(String, i64)>) {
    let (bw, bw_name) = k.tile("BW");
    let (bc, bc_name) = k.tile("BC");
    let sizes = vec![(bw_name, even(across, 16, 1)), (bc_name, block)];
    let image = k.grid("pn", Dim::new(n));
    let row = k.grid("ph", Dim::new(down));
    let column = k.grid("pw", Dim::new(across).ceil_div(&bw));
    let channel = k.grid("pc", Dim::new(channels).ceil_div(&bc));
    let pos = vec![
        Pos::unit(image),
        Pos::unit(row),
        Pos::tile(column * &bw, bw),
        Pos::tile(channel * &bc, bc),
    ];
    (Stand { pos }, sizes)
}

/// A [`Dag`] over `[N, C, H, W]` as one over `[N, C, H / m, m, W / m, m]`.
fn split_tiles(dag: &Dag, m: i64) -> Dag {
    let split = |layout: &Layout| -> Layout {
        let mut axes = layout.axes[..2].to_vec();
        for axis in &layout.axes[2..] {
            let outer = axis.extent.floor_div(&Dim::new(m));
            if is_broadcast(axis) {
                axes.extend([broadcast_axis(outer), broadcast_axis(Dim::new(m))]);
                continue;
            }
            axes.push(Axis { extent: outer, stride: &axis.stride * m, block: None });
            axes.push(Axis { extent: Dim::new(m), stride: axis.stride.clone(), block: None });
        }
        Layout { axes, offset: layout.offset.clone() }
    };
    let mut dag = dag.clone();
    for node in &mut dag.nodes {
        let [n, c, h, w] = [0, 1, 2, 3].map(|a| node.axes[a]);
        node.axes = vec![n, c, h, h, w, w];
        if let DagOp::Ext(ext) = &mut node.op {
            ext.layout = split(&ext.layout);
        }
    }
    dag.stores.iter_mut().for_each(|s| s.layout = split(&s.layout));
    dag
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The forms are what they say: one row of outputs from one row of data, by the definition.
    #[test]
    fn one_dimension_of_each_form_is_a_convolution() {
        let mix = |rows: &[&[f64]], x: &[f64]| -> Vec<f64> {
            rows.iter().map(|r| r.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        for form in FORMS {
            let data: Vec<f64> = (0..form.points()).map(|i| (i * i + 3) as f64).collect();
            let taps = [2.0, -5.0, 7.0];
            let weights: Vec<&[f64]> = form.weights.iter().map(|r| &r[..]).collect();
            let (v, u) = (mix(form.data, &data), mix(&weights, &taps));
            let product: Vec<f64> = v.iter().zip(&u).map(|(a, b)| a * b).collect();
            let want: Vec<f64> = (0..form.result.len())
                .map(|i| (0..3).map(|k| data[i + k] * taps[k]).sum())
                .collect();
            let got = mix(form.result, &product);
            assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-9), "{got:?} {want:?}");
        }
    }

    /// Each transformed weight is `G * taps * G'`, where its panel says.
    #[test]
    fn weights_are_transformed_in_panels() {
        let (o, c, width) = (5, 3, 4);
        let w: Vec<f32> = (0..o * c * 9).map(|i| (i * i % 23) as f32 - 11.0).collect();
        let all = TWO.transformed(&w, [o, c], width);
        assert_eq!(all.len(), 16 * 2 * c * width);
        for point in 0..16 {
            let (down, across) = (TWO.weights[point / 4], TWO.weights[point % 4]);
            for out in 0..2 * width {
                for channel in 0..c {
                    let at = ((point * 2 + out / width) * c + channel) * width + out % width;
                    let taps =
                        |i: usize| w.get((out * c + channel) * 9 + i).copied().unwrap_or(0.0);
                    let want: f64 =
                        (0..9).map(|i| down[i / 3] * across[i % 3] * f64::from(taps(i))).sum();
                    let want = if out < o { want } else { 0.0 };
                    assert!((f64::from(all[at]) - want).abs() < 1e-5, "{point} {out} {channel}");
                }
            }
        }
    }

    #[test]
    fn it_pays_where_sums_are_long_and_weights_are_few() {
        let pays = |sizes| TWO.pays(32 << 20, sizes);
        for [o, side] in [[64, 56], [256, 14]] {
            assert_eq!(pays([1, o, side, side, o]), Some(Images::Together));
        }
        assert_eq!(pays([8, 256, 14, 14, 256]), Some(Images::Together));
        assert_eq!(pays([8, 64, 56, 56, 64]), Some(Images::Apart), "more than the cache holds");
        assert_eq!(pays([1, 256, 56, 56, 256]), None, "more of one image than the cache holds");
        assert_eq!(pays([8, 512, 28, 28, 512]), None, "weights that stay in no cache");
        assert_eq!(pays([1, 16, 112, 112, 16]), None);
        assert_eq!(pays([1, 512, 8, 8, 512]), None);
    }
}
