//! Pooling: taps combined elementwise, channels as the vector axis where they are blocked.

use crate::block::{Emit, KernelParts, Pos};
use crate::contract::{finish_acc, give_anchor};
use crate::fuse::Group;
use crate::lowering::Lowering;
use crate::map::block_of;
use crate::rows::{combine_op, func, identity, reduce_type};
use crate::schedule::even;
use crate::taps::{Geometry, Stand};
use crate::views::nominal;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{ExprId, FuncBuilder, Op as ExprOp};
use tilewright_graph::{Op, WindowAttrs, WindowKind};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Operand, ReduceKind, TileId, TileType};

/// Windows up to this many taps are written out; larger ones loop.
const WRITTEN_OUT: i64 = 25;

/// Channels of one tile where they are innermost, for a schedule that does not choose.
const CHANNELS_LAST_TILE: i64 = 64;

/// The position of a block on the result of a window over `[N, C, spatial...]`: channels are the
/// vector axis when blocked or innermost, else the last spatial axis is. Gives the position in the order
/// `N, spatial..., C` and the tile sizes.
pub(crate) fn stand(
    low: &Lowering<'_>,
    k: &mut KernelParts,
    shape: &[Dim],
    layouts: &[&Layout],
) -> (Stand, Vec<(String, i64)>) {
    let symbols = &low.graph.symbols;
    let size = |d: &Dim| nominal(d, symbols);
    let block = block_of(layouts, &[1]);
    let rank = shape.len();
    let lanes = low.target.lanes;
    let width = size(&shape[rank - 1]);
    let innermost = |l: &&Layout| l.axes[1].stride.is(1) && l.axes[1].block.is_none();
    let channels = size(&shape[1]);
    let (bc, bw) = match block {
        Some(b) => (b, even(width, 16, 1)),
        None if low.windows && low.on_gpu() && channels > 1 && layouts.iter().any(innermost) => {
            (even(channels, CHANNELS_LAST_TILE, 1), even(width, 16, 1))
        }
        None => (1, even(width, 512, lanes)),
    };
    let mut tiles = Vec::new();
    let mut pos: Vec<Pos> = Vec::new();
    let n = k.grid("pn", shape[0].clone());
    let c = if bc > 1 {
        let (bc_dim, name) = k.tile("BC");
        tiles.push((name, bc));
        let c = k.grid("pc", shape[1].ceil_div(&bc_dim));
        Pos::tile(c * &bc_dim, bc_dim)
    } else {
        Pos::unit(k.grid("pc", shape[1].clone()))
    };
    pos.push(Pos::unit(n));
    for (i, extent) in shape.iter().enumerate().skip(2) {
        if i + 1 == rank {
            let (bw_dim, name) = k.tile("BW");
            tiles.push((name, bw));
            let w = k.grid("pw", extent.ceil_div(&bw_dim));
            pos.push(Pos::tile(w * &bw_dim, bw_dim));
        } else {
            pos.push(Pos::unit(k.grid("ph", extent.clone())));
        }
    }
    pos.push(c);
    (Stand { pos }, tiles)
}

/// Reference axes in the order of [`stand`].
pub(crate) fn canon(rank: usize) -> Vec<Vec<usize>> {
    std::iter::once(0).chain(2..rank).chain([1]).map(|a| vec![a]).collect()
}

impl Lowering<'_> {
    pub(crate) fn window_group(&mut self, group: &Group) -> Result<()> {
        let graph = self.graph;
        let node = group.nodes.iter().map(|&n| &graph.nodes[n]).find_map(|n| match &n.op {
            Op::Window(attrs) => Some((n, attrs)),
            _ => None,
        });
        let Some((node, attrs)) = node else { return Err(Error::bug("no window in its group")) };
        let x = self.place(node.inputs[0])?;
        let dtype = self.plan.buffers[x.buffer].dtype;
        let spatial = graph.shape(node.inputs[0])[2..].to_vec();
        let dag = self.dag(group)?;
        let shape = &group.shape;
        let mut layouts = dag.layouts();
        layouts.push(&x.layout);
        let mut k = KernelParts::new(self.kernel_name(group), &graph.symbols);
        let (stand, tiles) = stand(self, &mut k, shape, &layouts);
        let param = k.input(x.buffer, dtype, x.layout.clone());
        let result = pool(&mut k, &stand, attrs, &spatial, param, dtype);
        let result = finish_acc(&mut k, result, dtype, graph.dtype(node.inputs[0]));
        let canon = canon(shape.len());
        let mut emit = Emit::new(&dag, &canon, stand.pos.clone());
        give_anchor(&mut emit, result);
        emit.store_all(&mut k);
        let (knobs, note) = (self.knobs(), self.note(group));
        self.launch(k, tiles, knobs, note)
    }
}

fn pool(
    k: &mut KernelParts,
    stand: &Stand,
    attrs: &WindowAttrs,
    spatial: &[Dim],
    x: tilewright_tile::ParamId,
    dtype: DType,
) -> TileId {
    let geometry = Geometry {
        kernel: attrs.kernel.clone(),
        strides: attrs.strides.clone(),
        pads: attrs.pads_lo.clone(),
        dilations: attrs.dilations.clone(),
    };
    let kind = match attrs.kind {
        WindowKind::Max => ReduceKind::Max,
        _ => ReduceKind::Sum,
    };
    let compute = reduce_type(dtype);
    let fill = identity(kind, dtype);
    let op = combine_op(kind);
    let shape: Vec<Dim> = stand.pos.iter().filter_map(|p| p.tile.clone()).collect();
    let total = if geometry.taps() <= WRITTEN_OUT {
        let loads: Vec<TileId> = geometry
            .each_tap()
            .iter()
            .map(|tap| {
                let tap: Vec<Dim> = tap.iter().map(|&t| Dim::new(t)).collect();
                stand.load(k, x, &geometry, &tap, stand.channel(), fill)
            })
            .collect();
        let combine = func(&vec![dtype; loads.len()], |f, a| {
            let mut all = a.iter().map(|&v| f.cast(v, compute)).collect::<Vec<_>>().into_iter();
            let first = all.next().unwrap_or(ExprId(0));
            all.fold(first, |acc, v| f.op(op, &[acc, v]))
        });
        let args = loads.iter().map(|&t| k.b.plain(t)).collect();
        k.b.map(combine, args, shape.clone())
    } else {
        let mut acc =
            vec![k.b.full(identity(kind, compute), TileType::new(compute, shape.clone()))];
        let mut tap = Vec::new();
        for &extent in &geometry.kernel {
            let name = k.fresh("t");
            let (var, inner) = k.b.begin_for(&name, Dim::new(0), Dim::new(extent), &acc);
            tap.push(var);
            acc = inner;
        }
        let v = stand.load(k, x, &geometry, &tap, stand.channel(), fill);
        let step = func(&[compute, dtype], |f, a| {
            let v = f.cast(a[1], compute);
            f.op(op, &[a[0], v])
        });
        let args = vec![k.b.plain(acc[0]), k.b.plain(v)];
        let mut sum = vec![k.b.map(step, args, shape.clone())];
        for _ in &geometry.kernel {
            sum = k.b.end_for(&sum);
        }
        sum[0]
    };
    let count = match attrs.kind {
        WindowKind::Max | WindowKind::Sum => {
            return crate::contract::finish_acc(k, total, compute, dtype);
        }
        WindowKind::MeanWithPad => None,
        WindowKind::Mean => Some(inside(k, stand, &geometry, spatial)),
    };
    let taps = geometry.taps();
    let dtypes: Vec<DType> =
        std::iter::once(compute).chain(count.iter().flatten().map(|_| DType::I64)).collect();
    let mean = func(&dtypes, |f, a| {
        let n = match a.split_first() {
            Some((_, counts)) if !counts.is_empty() => {
                let one = f.constant_int(1, DType::I64);
                let n = counts.iter().fold(one, |n, &c| f.op(ExprOp::Mul, &[n, c]));
                f.cast(n, compute)
            }
            _ => f.constant(taps as f64, compute),
        };
        let y = f.op(ExprOp::Div, &[a[0], n]);
        f.cast(y, dtype)
    });
    let mut args = vec![k.b.plain(total)];
    args.extend(count.into_iter().flatten());
    k.b.map(mean, args, shape)
}

/// For each spatial axis, how many taps of the window at each output lie inside the data.
fn inside(
    k: &mut KernelParts,
    stand: &Stand,
    geometry: &Geometry,
    spatial: &[Dim],
) -> Vec<Operand> {
    let mut counts = Vec::new();
    let mut tile_axis = 0;
    for (i, extent) in spatial.iter().enumerate() {
        let pos = &stand.pos[1 + i];
        let shape: Vec<Dim> = vec![Stand::len(pos)];
        let at = k.b.iota(DType::I64, 0, pos.start.clone(), shape.clone());
        let extent = k.b.iota(DType::I64, 0, extent.clone(), vec![Dim::new(1)]);
        let (taps, stride) = (geometry.kernel[i], geometry.strides[i]);
        let (pad, dilation) = (geometry.pads[i], geometry.dilations[i]);
        let count = func(&[DType::I64, DType::I64], |f, a| {
            let int = |f: &mut FuncBuilder, v: i64| f.constant_int(v, DType::I64);
            let zero = int(f, 0);
            // The first tap reads coordinate `at * stride - pad`.
            let stride = int(f, stride);
            let pad = int(f, pad);
            let start = f.op(ExprOp::Mul, &[a[0], stride]);
            let start = f.op(ExprOp::Sub, &[start, pad]);
            let d = int(f, dilation);
            // Taps before the data: ceil(-start / d); taps up to its end: ceil((extent - start) / d).
            let ceil = |f: &mut FuncBuilder, x: ExprId| {
                let x = f.op(ExprOp::Max, &[x, zero]);
                let up = int(f, dilation - 1);
                let x = f.op(ExprOp::Add, &[x, up]);
                f.op(ExprOp::Div, &[x, d])
            };
            let before = f.op(ExprOp::Neg, &[start]);
            let before = ceil(f, before);
            let end = f.op(ExprOp::Sub, &[a[1], start]);
            let end = ceil(f, end);
            let taps = int(f, taps);
            let end = f.op(ExprOp::Min, &[end, taps]);
            let n = f.op(ExprOp::Sub, &[end, before]);
            f.op(ExprOp::Max, &[n, zero])
        });
        let args = vec![k.b.plain(at), Operand { tile: extent, along: vec![0] }];
        let count = k.b.map(count, args, shape);
        counts.push(match &pos.tile {
            Some(_) => Operand { tile: count, along: vec![tile_axis] },
            None => Operand { tile: k.b.reshape(count, vec![]), along: vec![] },
        });
        tile_axis += usize::from(pos.tile.is_some());
    }
    counts
}
