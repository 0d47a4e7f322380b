//! Contractions: einsums of two operands as blocked matrix products.
//!
//! Letters fall into four classes: *batch* (in both operands and the result), *M* (left and result),
//! *N* (right and result), *K* (summed). All tensors are seen over one space whose axes are the
//! letters, a missing letter being a stride of 0; so transposed weights, heads inside rows and
//! stretched batches are layouts, not cases. Letters of one class that walk memory with one stride
//! in every tensor merge; the last run of M, N and K is blocked by `BM`, `BN`, `BK`, the others
//! (and the batch) are grid axes, for K loops.
//!
//! ```text
//! acc[BM,BN] = 0
//! for k: acc = mma(acc, A[m.., k..], B[k.., n..])
//! y = epilogue(acc, bias, residual, ...)
//! ```

use crate::block::{Dag, DagOp, Emit, KernelParts, Pos};
use crate::conv::inverse;
use crate::cost;
use crate::fuse::Group;
use crate::gpu::{Fit, Tried, Written};
use crate::group_product::{self, Scaled};
use crate::lowering::Lowering;
use crate::map::{block_of, extent};
use crate::place::Place;
use crate::prologue::Computed;
use crate::rows::func;
use crate::schedule::{
    FEW_ROWS, How, depth_unit, even, gemm_tiles, panel_for, round_up, with_panel,
};
use crate::views::{broadcast_axis, by_distance, is_broadcast, merge, nominal, partition};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Op, ValueId};
use tilewright_layout::{Axis, Dim, Layout, numel};
use tilewright_plan::{BufferId, Note};
use tilewright_tile::{Bound, MatrixUnit, ParamId, TileId, TileType};

/// One operand over the space of letters.
#[derive(Clone)]
pub(crate) struct Side {
    pub(crate) buffer: BufferId,
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
}

/// A contraction over a space whose first axes are the result's and whose last axes are summed.
pub(crate) struct Product {
    /// Extents of all axes.
    pub(crate) space: Vec<Dim>,
    /// How many of them are the result's.
    pub(crate) result_axes: usize,
    pub(crate) lhs: Side,
    pub(crate) rhs: Side,
    /// Operands that the kernel computes; their sides then only say how what they are computed from lies.
    pub(crate) computed: [Option<Computed>; 2],
    pub(crate) operands: Operands,
    pub(crate) dtype: DType,
    /// The right operand holds codes: scales for each group of the depth.
    pub(crate) scaled: Option<Scaled>,
    /// An axis of the result that shall be the first of the grid, alone: images, so that steps can go image by image.
    /// On a CPU.
    pub(crate) first: Option<usize>,
}

impl Product {
    /// The same product of operands that lie in memory, elsewhere.
    pub(crate) fn between(&self, lhs: Side, rhs: Side) -> Product {
        Product {
            space: self.space.clone(),
            result_axes: self.result_axes,
            lhs,
            rhs,
            computed: [None, None],
            operands: self.operands,
            dtype: self.dtype,
            scaled: None,
            first: self.first,
        }
    }

    /// A layout of some axes of the space, as one of all: along the others it repeats itself.
    pub(crate) fn repeated(&self, axes: &[usize], layout: Layout) -> Layout {
        let mut all: Vec<Axis> = self.space.iter().map(|d| broadcast_axis(d.clone())).collect();
        for (&a, axis) in axes.iter().zip(layout.axes) {
            all[a] = axis;
        }
        Layout { axes: all, offset: layout.offset }
    }
}

/// In which types a product multiplies and sums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    pub(crate) left: DType,
    pub(crate) right: DType,
    pub(crate) acc: DType,
}

/// Size of every letter: the first extent that is not 1.
fn letter_size(letter: char, operands: &[(&str, &[Dim])]) -> Dim {
    let mut size = Dim::new(1);
    for (letters, shape) in operands {
        for (l, d) in letters.chars().zip(*shape) {
            if l == letter && size.is(1) {
                size = d.clone();
            }
        }
    }
    size
}

/// A layout over the letters of `space`; a letter that the operand lacks, or stretches, repeats.
fn over_letters(layout: &Layout, letters: &str, space: &[char], sizes: &[Dim]) -> Layout {
    let axes = space
        .iter()
        .zip(sizes)
        .map(|(letter, size)| match letters.chars().position(|l| l == *letter) {
            Some(i) if !layout.axes[i].extent.is(1) => {
                Axis { extent: size.clone(), ..layout.axes[i].clone() }
            }
            _ => broadcast_axis(size.clone()),
        })
        .collect();
    Layout { axes, offset: layout.offset.clone() }
}

impl Lowering<'_> {
    pub(crate) fn contract_group(&mut self, group: &Group) -> Result<()> {
        let anchor = group.nodes.iter().map(|&n| &self.graph.nodes[n]);
        let node = anchor.clone().find(|n| matches!(n.op, Op::Contract { .. }));
        let Some((node, Op::Contract { lhs, rhs, out, acc, dtype })) = node.map(|n| (n, &n.op))
        else {
            return Err(Error::bug("a contraction group without a contraction"));
        };
        let graph = self.graph;
        let shapes = [
            (lhs.as_str(), graph.shape(node.inputs[0])),
            (rhs.as_str(), graph.shape(node.inputs[1])),
        ];
        let mut space: Vec<char> = out.chars().collect();
        for l in lhs.chars().chain(rhs.chars()) {
            if !space.contains(&l) {
                space.push(l);
            }
        }
        let sizes: Vec<Dim> = space.iter().map(|&l| letter_size(l, &shapes)).collect();
        let dag = self.dag(group)?;
        let in_rhs_only = |l: char| {
            let here = |side: usize| {
                shapes[side].0.chars().zip(shapes[side].1).any(|(c, d)| c == l && !d.is(1))
            };
            here(1) && !here(0)
        };
        // A weight that becomes the right operand lies in panels along its last N letter.
        let mut near = self.near_result_axis(&dag, &sizes[..out.chars().count()]);
        if self.as_given_only(node.inputs[0], node.inputs[1], *acc) {
            // Of the axes that the right operand has, the nearest: results may then lie across.
            let across = (0..out.chars().count()).filter(|&a| in_rhs_only(space[a]));
            near = across.max_by_key(|&a| Some(a) == near).or(near);
        }
        let swapped = near.is_some_and(|a| !in_rhs_only(space[a]))
            && near.is_some_and(|a| lhs.contains(space[a]));
        let (right, right_letters) = if swapped { (0, lhs) } else { (1, rhs) };
        let n_letter = near.map(|a| space[a]);
        // What the sum has in common with the right operand, innermost; a sum over nothing gains
        // nothing from narrow operands.
        let depth = right_letters.chars().rev().position(|l| !out.contains(l));
        let depth = depth.map(|from_end| right_letters.chars().count() - 1 - from_end);
        let single = sizes[out.chars().count()..].iter().all(|d| d.is(1));
        let types = [0, 1].map(|i| graph.dtype(node.inputs[i]));
        let operands = match (single, *acc) {
            (false, DType::F32) => types.map(|t| self.operand_type(t)),
            _ => types,
        };
        let operands = if right == 0 { [operands[1], operands[0]] } else { operands };
        let operands = Operands { left: operands[0], right: operands[1], acc: *acc };
        let mut sides = Vec::new();
        let mut computed = [None, None];
        for (i, letters) in [(0, lhs), (1, rhs)] {
            let v = node.inputs[i];
            let at = |l| space.iter().position(|s| *s == l).unwrap_or_default();
            let axes: Vec<usize> = letters.chars().map(at).collect();
            if let Some((side, made)) = self.computed_side(group, i, &axes, &sizes)? {
                computed[i] = Some(made);
                sides.push(side);
                continue;
            }
            let left = (i == 0) != swapped;
            let wanted = if left { operands.left } else { operands.right };
            let mut place = self.operand_place(v, wanted)?;
            if i == right
                && let Some(axis) =
                    n_letter.and_then(|n| right_letters.chars().position(|l| l == n))
                && let Some(packed) = self.packed_weight(v, axis, depth, operands)
            {
                place = packed;
            } else if i == right
                && let Some(axis) =
                    n_letter.and_then(|n| right_letters.chars().position(|l| l == n))
                && let Some(turned) = self.turned_weight(v, axis, wanted)?
            {
                place = turned;
            } else if let Some(aligned) = self.aligned_copy(v, wanted)? {
                place = aligned;
            } else if !self.on_gpu()
                && i == right
                && let Some(n) = n_letter
                && let (Some(near), Some(depth)) =
                    (right_letters.chars().position(|l| l == n), depth)
            {
                let rows: Vec<Dim> = out
                    .chars()
                    .zip(&sizes)
                    .filter(|(l, _)| !right_letters.contains(*l))
                    .map(|(_, d)| d.clone())
                    .collect();
                place = self.near_copy(v, place, [near, depth], &numel(&rows), operands)?;
            }
            let layout = over_letters(&place.layout, letters, &space, &sizes);
            let dtype = self.plan.buffers[place.buffer].dtype;
            sides.push(Side { buffer: place.buffer, dtype, layout });
        }
        let rhs_side = sides.pop().ok_or_else(|| Error::bug("an operand"))?;
        let lhs_side = sides.pop().ok_or_else(|| Error::bug("an operand"))?;
        let (lhs_side, rhs_side) =
            if swapped { (rhs_side, lhs_side) } else { (lhs_side, rhs_side) };
        if swapped {
            computed.reverse();
        }
        let product = Product {
            space: sizes,
            result_axes: out.chars().count(),
            lhs: lhs_side,
            rhs: rhs_side,
            computed,
            operands,
            dtype: *dtype,
            scaled: None,
            first: None,
        };
        let (name, note) = (self.kernel_name(group), self.note(group));
        self.product_kernel(name, &product, &dag, note)
    }

    /// Whether a matrix unit multiplies these operands as they stand, and not each in the other's place: bytes of which
    /// the right ones are signed and the left ones are not.
    fn as_given_only(&self, left: ValueId, right: ValueId, acc: DType) -> bool {
        let [a, b] = [left, right].map(|v| self.graph.dtype(v));
        let unit = |a, b| self.product_knobs(a, b, acc).unit;
        !self.on_gpu()
            && acc == DType::I32
            && unit(a, b) != MatrixUnit::Fma
            && unit(b, a) == MatrixUnit::Fma
    }

    /// The right operand of a product of `rows` rows, which wants neighbours along its axis `near`
    /// next to each other. When they lie next to each other along the depth instead, each block of
    /// rows gathers them element by element: or a copy does that once, when that is estimated to be
    /// faster. When they are in rows of a matrix that several blocks of rows read, each of these would
    /// collect its panels from far apart in memory: a copy puts them into panels once.
    fn near_copy(
        &mut self,
        v: ValueId,
        place: Place,
        [near, depth]: [usize; 2],
        rows: &Dim,
        operands: Operands,
    ) -> Result<Place> {
        let symbols = &self.graph.symbols;
        let axes = &place.layout.axes;
        let plain = axes.iter().all(|a| a.block.is_none());
        let gathered = axes[depth].stride.is(1) && !axes[near].stride.is(1);
        let in_rows = axes[near].stride.is(1);
        let real = !axes[depth].extent.is(1) && !is_broadcast(&axes[near]);
        if self.graph.as_const(v).is_some() || !(plain && (gathered || in_rows) && real) {
            return Ok(place);
        }
        let size = |d: &Dim| nominal(d, symbols);
        let shape = self.graph.shape(v).to_vec();
        let bytes = operands.left.size().max(operands.right.size()) as i64;
        let knobs = self.product_knobs(operands.left, operands.right, operands.acc);
        let elements = size(&numel(&shape)) as f64;
        let batch = size(&numel(&shape)) / (size(&shape[near]) * size(&shape[depth])).max(1);
        let (n, k) = (size(&shape[near]), size(&shape[depth]));
        let how = if in_rows { How::RightLoose } else { How::Plain };
        let bm = gemm_tiles(self.target, &knobs, bytes, batch, [size(rows), n, k], how).bm;
        let blocks = (size(rows).max(1) + bm - 1) / bm;
        // Gathered in memory's type where the product takes that.
        let bytes = operands.right.size().min(self.graph.dtype(v).size());
        let moved = 2.0 * elements * self.graph.dtype(v).size() as f64;
        let once = match gathered {
            true => cost::gather_ns(self.target, elements, bytes),
            false => cost::copy_ns(self.target, moved) - self.target.launch_ns,
        };
        let (read, copied) = (once * blocks as f64, once + cost::copy_ns(self.target, moved));
        let name = self.value_name(v);
        let to = if gathered { "transposed" } else { "in panels" };
        let times = [crate::fuse::time(copied), crate::fuse::time(read)];
        let panels = [operands.right, self.graph.dtype(v)] == [DType::F32; 2];
        if copied >= read || (in_rows && !panels) {
            self.views.push(format!("not: copy {name} {to}: {} instead of {}", times[0], times[1]));
            return Ok(place);
        }
        self.views.push(format!("taken: copy {name} {to}: {} instead of {}", times[0], times[1]));
        let layout = if gathered {
            let order: Vec<usize> = (0..shape.len()).filter(|&a| a != near).chain([near]).collect();
            let permuted: Vec<Dim> = order.iter().map(|&a| shape[a].clone()).collect();
            Layout::row_major(&permuted).permute(&inverse(&order))
        } else {
            Layout::panels(&shape, near, panel_for(self.target, n))
        };
        let dtype = self.plan.buffers[place.buffer].dtype;
        self.copy_as(v, dtype, &place, layout)
    }

    /// The result axis whose elements lie closest together in the first stored result.
    pub(crate) fn near_result_axis(&self, dag: &Dag, shape: &[Dim]) -> Option<usize> {
        let layout = &dag.stores[0].layout;
        let axes: Vec<usize> = (0..shape.len()).collect();
        by_distance(&axes, layout, &self.graph.symbols)
            .into_iter()
            .rfind(|&a| !is_broadcast(&layout.axes[a]))
    }

    /// A constant weight in panels along `axis`, in the type and the groups (along `depth`) that the
    /// product's unit wants; unless the layouts already say how it lies.
    fn packed_weight(
        &mut self,
        v: ValueId,
        axis: usize,
        depth: Option<usize>,
        operands: Operands,
    ) -> Option<Place> {
        let shape = self.graph.shape(v).to_vec();
        let narrow = shape[axis].as_const().is_none_or(|n| n < self.target.lanes);
        let group = self.depth_group(operands);
        let dtype = operands.right;
        if self.on_gpu() {
            return None;
        }
        let own = group > 1 || dtype != self.graph.dtype(v);
        let matrix = shape.iter().filter(|d| !d.is(1)).count() == 2;
        let known = self.layouts.contains_key(&v) || !matrix;
        if self.graph.as_const(v).is_none() || (known && !own) || narrow {
            return None;
        }
        let width = panel_for(self.target, shape[axis].as_const().unwrap_or(1));
        let layout = match depth {
            Some(depth) if group > 1 => Layout::grouped_panels(&shape, axis, width, depth, group),
            _ => Layout::panels(&shape, axis, width),
        };
        Some(self.const_place_as(v, dtype, layout))
    }

    /// Neighbours of the depth that the unit of such a product takes at once.
    pub(crate) fn depth_group(&self, o: Operands) -> i64 {
        self.product_knobs(o.left, o.right, o.acc).unit.depth_group()
    }

    /// Writes the kernel of a product with its epilogue.
    pub(crate) fn product_kernel(
        &mut self,
        name: String,
        product: &Product,
        dag: &Dag,
        note: Note,
    ) -> Result<()> {
        self.product_tried(name, product, dag, note, Tried::default())
    }

    /// As [`Lowering::product_kernel`], knowing what was tried to make it fit a GPU.
    pub(crate) fn product_tried(
        &mut self,
        name: String,
        product: &Product,
        given: &Dag,
        note: Note,
        tried: Tried,
    ) -> Result<()> {
        let symbols = &self.graph.symbols;
        let rank = product.space.len();
        let result: Vec<usize> = (0..product.result_axes).collect();
        // Everything over the whole space: results and epilogue operands repeat along sums.
        let mut dag = given.clone();
        let mut space = product.space.clone();
        // One more axis of extent 1 for M and one for N, so that neither is without axes.
        space.extend([Dim::new(1), Dim::new(1)]);
        extend_dag(&mut dag, &space, rank);
        let dag = &dag;
        let mut sides = [product.lhs.clone(), product.rhs.clone()];
        sides.iter_mut().for_each(|s| widen(&mut s.layout, &space));
        let mut computed = product.computed.clone();
        computed.iter_mut().flatten().for_each(|c| extend_dag(&mut c.dag, &space, rank));
        let lhs = &sides[0].layout;
        // What each operand is read from.
        let read: [Vec<&Layout>; 2] = [0, 1].map(|i| match &computed[i] {
            Some(c) => c.dag.layouts(),
            None => vec![&sides[i].layout],
        });
        let own = product.scaled.as_ref().and_then(|s| s.own.clone()).map(|mut own| {
            widen(&mut own.layout, &space);
            own
        });
        let layouts: Vec<&Layout> = dag
            .layouts()
            .into_iter()
            .chain(read.iter().flatten().copied())
            .chain(own.iter().map(|own| &own.layout))
            .collect();
        let has = |i: usize, a: usize| match &computed[i] {
            Some(c) => c.varies(a),
            None => !is_broadcast(&sides[i].layout.axes[a]),
        };
        let first = product.first.filter(|_| !self.on_gpu());
        let of = |in_l: bool, in_r: bool| -> Vec<usize> {
            let wanted = |&&a: &&usize| {
                // A letter of extent 1 everywhere is an M letter.
                let (l, r) = (has(0, a), has(1, a));
                let (l, r) = if !l && !r { (true, false) } else { (l, r) };
                (l, r) == (in_l, in_r)
            };
            let others = result.iter().filter(|a| Some(**a) != first);
            others.filter(wanted).copied().collect()
        };
        let solo = |_: usize| false;
        let store = &dag.stores[0].layout;
        let batch = partition(&by_distance(&of(true, true), store, symbols), &layouts, &solo);
        let mut m = partition(&by_distance(&of(true, false), store, symbols), &layouts, &solo);
        let mut n = partition(&by_distance(&of(false, true), store, symbols), &layouts, &solo);
        let k_axes: Vec<usize> = (product.result_axes..rank).collect();
        let mut ks = partition(&by_distance(&k_axes, lhs, symbols), &layouts, &solo);
        let m_tile = m.pop().unwrap_or(vec![rank]);
        let n_tile = n.pop().unwrap_or(vec![rank + 1]);
        let k_tile = ks.pop().unwrap_or_default();
        // Canonical axes: grid axes, the tile, the sums.
        let mut canon: Vec<Vec<usize>> = first.map(|a| vec![a]).into_iter().collect();
        canon.extend(batch);
        canon.extend(m);
        canon.extend(n);
        let units = canon.len();
        let first_k = units + 2;
        canon.push(m_tile);
        canon.push(n_tile);
        canon.extend(ks);
        canon.push(k_tile);
        let last = canon.len() - 1;

        let space = &space;
        let size = |c: usize| nominal(&extent(space, &canon[c]), symbols);
        let batch_size = (0..units).map(size).product();
        let Operands { left, right, acc: acc_type } = product.operands;
        let mut knobs = self.product_knobs(left, right, acc_type);
        let depth_unit = depth_unit(knobs.unit);
        let bytes = left.size().max(right.size()) as i64;
        let sizes = [size(units), size(units + 1), size(last)];
        // A right operand in rows of more than a few vectors: its rows are too far apart to be read as panels.
        let in_rows = |l: &Layout| {
            let near = canon[units + 1].iter().map(|&a| &l.axes[a]).find(|a| a.stride.is(1));
            near.is_some_and(|a| a.block.is_none()) && block_of(&[l], &canon[units + 1]).is_none()
        };
        let loose =
            computed[1].is_none() && knobs.unit == MatrixUnit::Fma && in_rows(&sides[1].layout);
        let how = match (computed[0].is_some(), loose) {
            (true, _) => How::LeftComputed,
            (false, true) => How::RightLoose,
            (false, false) => How::Plain,
        };
        // Panels that were made for another shape of the micro-kernel say which.
        if let Some(width) = block_of(&[&sides[1].layout], &canon[units + 1])
            && knobs.unit == MatrixUnit::Fma
            && sizes[0] > FEW_ROWS
            && (width > self.target.lanes || sizes[1] <= width)
        {
            knobs = with_panel(self.target, knobs, width);
        }
        let mut t = gemm_tiles(self.target, &knobs, bytes, batch_size, sizes, how);
        if let Some(scaled) = &product.scaled {
            knobs = self.group_knobs(knobs, product.operands, scaled.together);
        }
        // A tile of a blocked axis is one block, so that it stays affine; packed panels are made
        // for the micro-kernel and may be several side by side.
        let operand_block = |c: usize, i: usize| block_of(&read[i], &canon[c]);
        if let Some(b) = operand_block(units, 0) {
            t.bm = b;
        }
        if let Some(b) = operand_block(last, 0).or(operand_block(last, 1)) {
            t.bk = even(size(last), t.bk, b.max(depth_unit));
        }
        let outs: Vec<&Layout> = dag.layouts();
        if let Some(b) = block_of(&outs, &canon[units]) {
            t.bm = b;
        }
        if let Some(b) = block_of(&outs, &canon[units + 1]) {
            t.bn = round_up(t.bn, b);
        }

        if let Some(scaled) = &product.scaled {
            t.bn = self.group_block(scaled.together, size(units + 1));
            t.bk = group_product::depth_block(scaled.group, &extent(space, &canon[last]));
        }

        let mut k = KernelParts::new(name.clone(), symbols);
        let (bm, bm_name) = k.tile("BM");
        let (bn, bn_name) = k.tile("BN");
        let (bk, bk_name) = k.tile("BK");
        let k_extent = extent(space, &canon[last]);
        let divides = k_extent.as_const().is_some_and(|e| e % t.bk == 0);
        if !self.on_gpu() {
            match (&product.scaled, k_extent.as_const()) {
                // Scales are counted in steps of the depth.
                (Some(_), _) => k.bound(&bk_name, Bound::Exactly(t.bk)),
                (None, Some(depth)) if divides && depth > 0 => {
                    k.bound(&bk_name, Bound::Divides(depth));
                }
                (None, _) => {}
            }
        }
        let tiles = vec![(bm_name, t.bm), (bn_name, t.bn), (bk_name, t.bk)];
        let mut pos: Vec<Pos> = Vec::new();
        for (c, axes) in canon[..units].iter().enumerate() {
            pos.push(Pos::unit(k.grid(&format!("g{c}"), extent(space, axes))));
        }
        // The operand that is read again and again should be the smaller one: when the left one is,
        // its blocks run fastest while the right block stays in cache.
        let rows_fastest = size(units) <= size(units + 1);
        let (m_blocks, n_blocks) = (
            extent(space, &canon[units]).ceil_div(&bm),
            extent(space, &canon[units + 1]).ceil_div(&bn),
        );
        let (pm, pn) = if rows_fastest {
            let pn = k.grid("pn", n_blocks);
            (k.grid("pm", m_blocks), pn)
        } else {
            let pm = k.grid("pm", m_blocks);
            (pm, k.grid("pn", n_blocks))
        };
        pos.push(Pos::tile(pm * &bm, bm.clone()));
        pos.push(Pos::tile(pn * &bn, bn.clone()));

        let tiled = [[units, last], [units + 1, last]];
        let params = [0, 1].map(|i| match &computed[i] {
            Some(_) => None,
            None => Some(side_param(&mut k, &sides[i], &canon, &tiled[i])),
        });
        let own = own.map(|own| side_param(&mut k, &own, &canon, &[units]));
        let total = product.scaled.as_ref().map_or(acc_type, |s| s.acc);
        let acc_ty = TileType::new(total, vec![bm.clone(), bn.clone()]);
        let mut acc = vec![k.b.full(crate::block::zero(total), acc_ty)];
        // Loops over the sums.
        let mut step = Dim::new(0);
        for (c, axes) in canon.iter().enumerate().skip(first_k) {
            let extent = extent(space, axes);
            let var = k.fresh("k");
            let hi = if c == last { extent.ceil_div(&bk) } else { extent };
            let (var, inner) = k.b.begin_for(&var, Dim::new(0), hi, &acc);
            step = var.clone();
            pos.push(match c == last {
                true => Pos::tile(var * &bk, bk.clone()),
                false => Pos::unit(var),
            });
            acc = inner;
        }
        let wanted = [(left, [units, last]), (right, [last, units + 1])];
        let mut tiles_of = Vec::new();
        for (i, (dtype, want)) in wanted.into_iter().enumerate() {
            let tile = match (&computed[i], &params[i]) {
                (Some(c), _) => c.tile(&mut k, &canon, &pos, want),
                (None, Some(param)) => side_tile(&mut k, param, &pos, want),
                (None, None) => return Err(Error::bug("an operand")),
            };
            let from = k.b.ty(tile).dtype;
            tiles_of.push(finish_acc(&mut k, tile, from, dtype));
        }
        let (a, b) = (tiles_of[0], tiles_of[1]);
        let limit = (!divides).then(|| k_extent - &pos[last].start);
        let mut sum = match &product.scaled {
            None => vec![k.b.mma(acc[0], a, b, limit)],
            Some(scaled) => {
                let part_ty = TileType::new(acc_type, vec![bm.clone(), bn.clone()]);
                let zero = k.b.full(crate::block::zero(acc_type), part_ty);
                let part = k.b.mma(zero, a, b, limit.clone());
                let own = own.map(|own| own_tile(&mut k, &own, &pos, [units, last], &step));
                let at = [pos[units + 1].start.clone(), step];
                vec![scaled.add(&mut k, [acc[0], part, a], own, &at, limit)]
            }
        };
        for _ in first_k..=last {
            sum = k.b.end_for(&sum);
        }
        let result = finish_acc(&mut k, sum[0], total, product.dtype);
        // The epilogue stands at the tile; sums are over.
        for p in &mut pos[first_k..] {
            *p = Pos::unit(Dim::new(0));
        }
        let mut emit = Emit::new(dag, &canon, pos);
        give_anchor(&mut emit, result);
        emit.store_all(&mut k);
        if !self.on_gpu() {
            let knobs = self.with_chains(knobs, dag);
            return self.launch(k, tiles, knobs, note);
        }
        let computed = &computed;
        let written =
            Written { parts: &k, sides: &sides, computed, dag, space, canon: &canon, units };
        match self.fit(product, &written, tried) {
            Fit::Forms(forms) => self.launch_forms(k, tiles, knobs, forms, note),
            Fit::Apart => self.product_apart(&name, product, given, note, tried),
            Fit::Packed => self.product_packed(&name, product, given, note, tried),
            Fit::Uncomputed => self.product_uncomputed(&name, product, given, note, tried),
        }
    }
}

/// Adds axes along which the layout repeats.
fn widen(layout: &mut Layout, space: &[Dim]) {
    for d in &space[layout.axes.len()..] {
        layout.axes.push(broadcast_axis(d.clone()));
    }
}

/// Makes a [`Dag`] over the result's axes one over the whole space; the anchor, and what is computed
/// from it, also runs along the axes from `extra` on.
fn extend_dag(dag: &mut Dag, space: &[Dim], extra: usize) {
    for i in 0..dag.nodes.len() {
        let anchored = matches!(dag.nodes[i].op, DagOp::Anchor)
            || dag.nodes[i].args.iter().any(|&a| dag.nodes[a].axes[extra]);
        let node = &mut dag.nodes[i];
        node.axes.resize(space.len(), false);
        node.axes[extra..].fill(anchored);
        if let DagOp::Ext(ext) = &mut node.op {
            widen(&mut ext.layout, space);
        }
    }
    dag.stores.iter_mut().for_each(|s| widen(&mut s.layout, space));
}

/// Rounds a tile (an accumulator, an operand) from one type to another.
pub(crate) fn finish_acc(k: &mut KernelParts, acc: TileId, from: DType, to: DType) -> TileId {
    if from == to {
        return acc;
    }
    let shape = k.b.ty(acc).shape.clone();
    let cast = func(&[from], |f, a| f.cast(a[0], to));
    let arg = k.b.plain(acc);
    k.b.map(cast, vec![arg], shape)
}

/// Gives the anchor's tile to the node that stands for it.
pub(crate) fn give_anchor(emit: &mut Emit<'_>, tile: TileId) {
    let dag = emit.dag;
    for (i, node) in dag.nodes.iter().enumerate() {
        if matches!(node.op, DagOp::Anchor) {
            emit.memo.insert(i, tile);
        }
    }
}

/// A parameter for an operand, and which canonical axes it has. The tile's axes are always there.
fn side_param(
    k: &mut KernelParts,
    side: &Side,
    canon: &[Vec<usize>],
    tile: &[usize],
) -> (ParamId, Vec<usize>) {
    let layout = merge(&side.layout, canon).expect("canonical axes serve every layout");
    let kept: Vec<usize> =
        (0..canon.len()).filter(|c| tile.contains(c) || !is_broadcast(&layout.axes[*c])).collect();
    let axes = kept.iter().map(|&c| layout.axes[c].clone()).collect();
    let layout = Layout { axes, offset: layout.offset };
    (k.input(side.buffer, side.dtype, layout), kept)
}

/// Loads one number for each row of the axis `rows`: those of the group `step`, which the axis `groups` counts.
fn own_tile(
    k: &mut KernelParts,
    (param, kept): &(ParamId, Vec<usize>),
    pos: &[Pos],
    [rows, groups]: [usize; 2],
    step: &Dim,
) -> TileId {
    let start = |c: usize| if c == groups { step.clone() } else { pos[c].start.clone() };
    let index: Vec<Dim> = kept.iter().map(|&c| start(c)).collect();
    let height = pos[rows].tile.clone().unwrap_or(Dim::new(1));
    let extent = |c: usize| if c == rows { height.clone() } else { Dim::new(1) };
    let shape: Vec<Dim> = kept.iter().map(|&c| extent(c)).collect();
    let fill = crate::block::zero(k.b.param_info(*param).dtype);
    let steps = vec![1; index.len()];
    let tile = k.b.load_with(*param, index, steps, fill, shape);
    k.b.reshape(tile, vec![height])
}

/// Loads an operand's tile as a matrix whose axes are the canonical axes `want`.
fn side_tile(
    k: &mut KernelParts,
    (param, kept): &(ParamId, Vec<usize>),
    pos: &[Pos],
    want: [usize; 2],
) -> TileId {
    let index: Vec<Dim> = kept.iter().map(|&c| pos[c].start.clone()).collect();
    let shape: Vec<Dim> =
        kept.iter().map(|&c| pos[c].tile.clone().unwrap_or(Dim::new(1))).collect();
    let fill = crate::block::zero(k.b.param_info(*param).dtype);
    let steps = vec![1; index.len()];
    let tile = k.b.load_with(*param, index, steps, fill, shape);
    let have: Vec<usize> = kept.iter().copied().filter(|&c| pos[c].tile.is_some()).collect();
    let flat: Vec<Dim> = have.iter().filter_map(|&c| pos[c].tile.clone()).collect();
    let tile = k.b.reshape(tile, flat);
    if have == want { tile } else { k.b.permute(tile, &[1, 0]) }
}
