//! Gather along one axis: embedding tables, picked rows and columns.
//!
//! The result's axes are those of the data before the axis, those of the indices, and those of the
//! data behind it. A tile is a run of indices by a run of the data behind the axis.

use crate::block::{Emit, KernelParts, Pos};
use crate::contract::{finish_acc, give_anchor};
use crate::fuse::Group;
use crate::lowering::Lowering;
use crate::map::extent;
use crate::rows::func;
use crate::schedule::even;
use crate::views::{broadcast_axis, merge, nominal, partition};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Op as ExprOp;
use tilewright_graph::Op;
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_tile::{Operand, TileId};

impl Lowering<'_> {
    pub(crate) fn gather_group(&mut self, group: &Group) -> Result<()> {
        let graph = self.graph;
        let symbols = &graph.symbols;
        let node = group.nodes.iter().map(|&n| &graph.nodes[n]).find_map(|n| match n.op {
            Op::Gather(axis) => Some((n, axis)),
            _ => None,
        });
        let Some((node, axis)) = node else { return Err(Error::bug("no gather in its group")) };
        let dag = self.dag(group)?;
        let (data, indices) = (node.inputs[0], node.inputs[1]);
        let (data_place, index_place) = (self.place(data)?, self.place(indices)?);
        let shape = &group.shape;
        let picked = graph.shape(indices).len();
        let behind = axis + picked;
        let repeat = |d: &Dim| broadcast_axis(d.clone());
        let real = |a: &Axis, d: &Dim| match crate::views::is_broadcast(a) {
            true => repeat(d),
            false => a.clone(),
        };
        // The data without the axis, and the indices, over the result's axes.
        let over = |pick: &dyn Fn(usize) -> Axis, offset: &Dim| Layout {
            axes: (0..shape.len()).map(pick).collect(),
            offset: offset.clone(),
        };
        let data_axes = &data_place.layout.axes;
        let data_layout = over(
            &|i| match i {
                i if i < axis => real(&data_axes[i], &shape[i]),
                i if i < behind => repeat(&shape[i]),
                i => real(&data_axes[i - picked + 1], &shape[i]),
            },
            &data_place.layout.offset,
        );
        let index_layout = over(
            &|i| match (axis..behind).contains(&i) {
                true => real(&index_place.layout.axes[i - axis], &shape[i]),
                false => repeat(&shape[i]),
            },
            &index_place.layout.offset,
        );
        let mut layouts = dag.layouts();
        layouts.extend([&data_layout, &index_layout]);
        let solo = |_: usize| false;
        let list = |r: std::ops::Range<usize>| r.collect::<Vec<usize>>();
        let before = partition(&list(0..axis), &layouts, &solo);
        let picks = partition(&list(axis..behind), &layouts, &solo);
        let rest = partition(&list(behind..shape.len()), &layouts, &solo);
        let (first_pick, first_rest) = (before.len(), before.len() + picks.len());
        let canon: Vec<Vec<usize>> = [before, picks, rest].concat();
        let n = canon.len();
        let size = |c: usize| nominal(&extent(shape, &canon[c]), symbols);
        let bb = if first_rest < n { even(size(n - 1), 1024, self.target.lanes) } else { 1 };
        let bi = match first_pick < first_rest {
            true => {
                let most = if first_rest < n { (4096 / bb).max(1) } else { 1024 };
                let share = size(first_rest - 1) / (self.target.threads * 4).max(1);
                even(size(first_rest - 1), most.min(share.max(1)), 1)
            }
            false => 1,
        };

        let mut k = KernelParts::new(self.kernel_name(group), symbols);
        let mut tiles = Vec::new();
        let mut pos: Vec<Pos> = Vec::new();
        for (c, axes) in canon.iter().enumerate() {
            let extent = extent(shape, axes);
            let tile = if c + 1 == n && c >= first_rest {
                Some(("BB", bb))
            } else if c + 1 == first_rest && c >= first_pick {
                Some(("BI", bi))
            } else {
                None
            };
            pos.push(match tile {
                Some((name, value)) => {
                    let (tile, name) = k.tile(name);
                    tiles.push((name, value));
                    let p = k.grid(&format!("g{c}"), extent.ceil_div(&tile));
                    Pos::tile(p * &tile, tile)
                }
                None => Pos::unit(k.grid(&format!("g{c}"), extent)),
            });
        }
        if n == 0 {
            k.grid("g0", Dim::new(1));
        }
        // The indices, counted from the front.
        let picks = first_pick..first_rest;
        let merged = merge(&index_layout, &canon).ok_or_else(|| Error::bug("indices merge"))?;
        let param = k.input(
            index_place.buffer,
            graph.dtype(indices),
            Layout {
                axes: picks.clone().map(|c| merged.axes[c].clone()).collect(),
                offset: merged.offset.clone(),
            },
        );
        let index: Vec<Dim> = picks.clone().map(|c| pos[c].start.clone()).collect();
        let len = |p: &Pos| p.tile.clone().unwrap_or(Dim::new(1));
        let load: Vec<Dim> = picks.clone().map(|c| len(&pos[c])).collect();
        let count = picks.clone().filter_map(|c| pos[c].tile.clone()).next().unwrap_or(Dim::new(1));
        let raw = k.b.load(param, index, load);
        let raw = k.b.reshape(raw, vec![count.clone()]);
        let extent_here = data_axes[axis].extent.clone();
        let rows = from_front(&mut k, raw, graph.dtype(indices), &extent_here, &count);
        // The data: its canonical axes with the gathered one in between.
        let merged = merge(&data_layout, &canon).ok_or_else(|| Error::bug("data merges"))?;
        let kept: Vec<usize> = (0..n).filter(|c| !picks.contains(c)).collect();
        let mut axes: Vec<Axis> = kept.iter().map(|&c| merged.axes[c].clone()).collect();
        axes.insert(first_pick, data_axes[axis].clone());
        let layout = Layout { axes, offset: merged.offset };
        let stored = self.plan.buffers[data_place.buffer].dtype;
        let param = k.input(data_place.buffer, stored, layout);
        let mut index: Vec<Dim> = kept.iter().map(|&c| pos[c].start.clone()).collect();
        index.insert(first_pick, Dim::new(0));
        let mut load: Vec<Dim> = kept.iter().map(|&c| len(&pos[c])).collect();
        load.insert(first_pick, count);
        let tile = k.b.gather(param, first_pick, rows, index, load);
        let flat: Vec<Dim> = pos.iter().filter_map(|p| p.tile.clone()).collect();
        let tile = k.b.reshape(tile, flat);
        let tile = finish_acc(&mut k, tile, stored, graph.dtype(data));
        let mut emit = Emit::new(&dag, &canon, pos);
        give_anchor(&mut emit, tile);
        emit.store_all(&mut k);
        let (knobs, note) = (self.knobs(), self.note(group));
        self.launch(k, tiles, knobs, note)
    }
}

/// Indices as `i64`, negative ones counted from the end.
fn from_front(k: &mut KernelParts, raw: TileId, dtype: DType, extent: &Dim, count: &Dim) -> TileId {
    let signed = dtype.is_signed_int();
    let size = k.b.iota(DType::I64, 0, extent.clone(), vec![Dim::new(1)]);
    let fix = func(&[dtype, DType::I64], |f, a| {
        let i = f.cast(a[0], DType::I64);
        if !signed {
            return i;
        }
        let zero = f.constant_int(0, DType::I64);
        let negative = f.op(ExprOp::Lt, &[i, zero]);
        let wrapped = f.op(ExprOp::Add, &[i, a[1]]);
        f.op(ExprOp::Select, &[negative, wrapped, i])
    });
    let args = vec![k.b.plain(raw), Operand { tile: size, along: vec![0] }];
    k.b.map(fix, args, vec![count.clone()])
}
