//! Products with a matrix of codes ([`Op::GroupProduct`]): the codes are unpacked in registers, and each group of the
//! depth is summed apart, so that its scale is multiplied once.
//!
//! ```text
//! acc[BM,BN] = 0
//! for g: part = mma(0, X[m.., g*G..], codes[g*G.., n..])
//!        acc  = acc + part * scales[g, n..]
//! y = epilogue(acc, bias, residual, ...)
//! ```
//!
//! With zeros, `zeros[g, n] * sum of X[m, g*G..]` is taken off `part`. Codes and scales lie in panels as wide as the
//! micro-kernel, so that a block reads one stream of each, in order.
//!
//! Where X is in codes of 8 bits as well, `part` is a sum of integers, exact, and is multiplied by both scales. Codes
//! of four bits then lie in panels whose columns have eight neighbours of the depth together ([`TOGETHER`]), a word for
//! each column, and blocks are several panels wide.

use crate::block::{KernelParts, zero};
use crate::contract::{Operands, Product, Side};
use crate::fuse::Group;
use crate::lowering::Lowering;
use crate::place::Place;
use crate::rows::func;
use crate::views::broadcast_axis;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, Node, Op, ValueId};
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_plan::BufferId;
use tilewright_tile::{CpuKnobs, MatrixUnit, Operand, ParamId, ReduceKind, TileId};

/// The scales of a product's right operand.
#[derive(Clone)]
pub(crate) struct Scaled {
    /// Depth that shares a scale.
    pub(crate) group: i64,
    /// Scales, and zeros if there are some.
    pub(crate) factors: Vec<Factor>,
    /// The left operand's own scales, under a layout over the space whose last axis counts groups.
    pub(crate) own: Option<Side>,
    /// Codes of four bits lie eight neighbours of the depth together.
    pub(crate) together: bool,
    /// The type of the sums over all groups.
    pub(crate) acc: DType,
}

/// Neighbours of the depth that lie together where both operands are codes.
pub(crate) const TOGETHER: i64 = 8;

/// One number per column and group, under a layout `[N, groups]`.
#[derive(Clone)]
pub(crate) struct Factor {
    buffer: BufferId,
    dtype: DType,
    layout: Layout,
}

impl Factor {
    /// The parameter of a kernel that reads it.
    pub(crate) fn param(&self, k: &mut KernelParts) -> ParamId {
        k.input(self.buffer, self.dtype, self.layout.clone())
    }
}

impl Scaled {
    /// `acc + (part - zeros * sum of a) * scales`, for the columns and the group at `at`; `own` are the scales of `a`.
    pub(crate) fn add(
        &self,
        k: &mut KernelParts,
        [acc, part, a]: [TileId; 3],
        own: Option<TileId>,
        at: &[Dim; 2],
        limit: Option<Dim>,
    ) -> TileId {
        let ty = k.b.ty(acc).clone();
        let mut args = vec![k.b.plain(acc), k.b.plain(part)];
        let mut types = vec![ty.dtype, k.b.ty(part).dtype];
        for factor in &self.factors {
            let param = factor.param(k);
            let shape = vec![ty.shape[1].clone(), Dim::new(1)];
            let fill = zero(factor.dtype);
            let tile = k.b.load_with(param, at.to_vec(), vec![1, 1], fill, shape);
            let tile = k.b.reshape(tile, vec![ty.shape[1].clone()]);
            args.push(Operand { tile, along: vec![1] });
            types.push(factor.dtype);
        }
        if self.factors.len() > 1 {
            let (from, to, shape) = (k.b.ty(a).dtype, types[1], k.b.ty(a).shape.clone());
            let mut wide = a;
            if !from.is_float() {
                let cast = func(&[from], |f, x| f.cast(x[0], to));
                let arg = k.b.plain(a);
                wide = k.b.map(cast, vec![arg], shape);
            }
            let sums = k.b.reduce(ReduceKind::Sum, wide, 1, limit);
            args.push(Operand { tile: sums, along: vec![0] });
            types.push(k.b.ty(sums).dtype);
        }
        if let Some(own) = own {
            args.push(Operand { tile: own, along: vec![0] });
            types.push(k.b.ty(own).dtype);
        }
        let func = func(&types, |f, x| {
            let wide: Vec<_> = x.iter().map(|&x| f.cast(x, ty.dtype)).collect();
            let mut part = wide[1];
            if self.factors.len() > 1 {
                let shift = f.op(ExprOp::Mul, &[wide[3], wide[4]]);
                part = f.op(ExprOp::Sub, &[part, shift]);
            }
            if let (Some(_), Some(&own)) = (own, wide.last()) {
                part = f.op(ExprOp::Mul, &[part, own]);
            }
            f.op(ExprOp::Fma, &[part, wide[2], wide[0]])
        });
        k.b.map(func, args, ty.shape)
    }
}

/// Whether x is in codes.
fn is_coded(graph: &Graph, node: &Node) -> bool {
    graph.dtype(node.inputs[0]) == DType::I8
}

/// Whether there is a kernel for it: codes and factors are constants, which are packed once. Where x is in codes as
/// well, groups are whole steps of the instruction.
pub(crate) fn fits(graph: &Graph, node: &Node) -> bool {
    let coded = is_coded(graph, node);
    let mut given = node.inputs.iter().enumerate().skip(1).filter(|(i, _)| !(coded && *i == 3));
    let constant = given.all(|(_, &v)| graph.as_const(v).is_some());
    constant && (in_whole_steps(graph, node) || !coded)
}

/// Whether groups and the depth are whole steps of [`TOGETHER`].
fn in_whole_steps(graph: &Graph, node: &Node) -> bool {
    let whole = |d: &Dim| d.as_const().is_some_and(|d| d % TOGETHER == 0);
    let depth = graph.shape(node.inputs[0]).last();
    let group = match node.op {
        Op::GroupProduct { group } => group % TOGETHER == 0,
        _ => false,
    };
    group && depth.is_some_and(whole)
}

/// Vectors and rows of the micro-kernel: four vectors hide the latency of multiply-adds for a single row.
pub(crate) fn knobs(from: CpuKnobs) -> CpuKnobs {
    let rows = match from.unit {
        // Both halves of four vectors of codes are in registers as well.
        MatrixUnit::I8Dot => 4,
        _ if from.vector_bits >= 512 => 5,
        _ => 2,
    };
    CpuKnobs { mma_vectors: 4, mma_rows: rows, ..from }
}

impl Lowering<'_> {
    /// Writes the kernel of such a group.
    pub(crate) fn group_product_group(&mut self, group: &Group) -> Result<()> {
        if self.on_gpu() {
            return Err(Error::unsupported("products with grouped codes on a GPU"));
        }
        let graph = self.graph;
        let mut nodes = group.nodes.iter().map(|&n| &graph.nodes[n]);
        let node = nodes.find(|n| matches!(n.op, Op::GroupProduct { .. }));
        let Some((node, &Op::GroupProduct { group: size })) = node.map(|n| (n, &n.op)) else {
            return Err(Error::bug("a group without the product that it is built around"));
        };
        let (x, codes) = (node.inputs[0], node.inputs[1]);
        let mut space = graph.shape(node.outputs[0]).to_vec();
        let result_axes = space.len();
        let Some(depth) = graph.shape(x).last().cloned() else {
            return Err(Error::bug("a product of a scalar"));
        };
        space.push(depth);
        let (n_axis, k_axis) = (result_axes - 1, result_axes);
        let coded = is_coded(graph, node);
        let acc = graph.dtype(node.outputs[0]).compute();
        let left = if coded { DType::I8 } else { graph.dtype(x).compute() };
        let over = |layout: &Layout, at: &dyn Fn(usize) -> usize| {
            let axes = space.iter().map(|d| broadcast_axis(d.clone())).collect();
            let mut out = Layout { axes, offset: layout.offset.clone() };
            for (i, axis) in layout.axes.iter().enumerate().filter(|(_, a)| !a.extent.is(1)) {
                out.axes[at(i)] = Axis { extent: space[at(i)].clone(), ..axis.clone() };
            }
            out
        };
        let place = self.operand_place(x, left)?;
        let rank = graph.shape(x).len();
        let layout = over(&place.layout, &|i| if i + 1 == rank { k_axis } else { i });
        let dtype = self.plan.buffers[place.buffer].dtype;
        let lhs = Side { buffer: place.buffer, dtype, layout };
        let own = match node.inputs.get(3).filter(|_| coded) {
            None => None,
            Some(&v) => {
                let place = self.place(v)?;
                let mut layout = over(&place.layout, &|i| if i + 1 == rank { k_axis } else { i });
                // Its last axis counts groups.
                if let Some(axis) = place.layout.axes.last().filter(|a| !a.extent.is(1)) {
                    layout.axes[k_axis] = axis.clone();
                }
                Some(Side { buffer: place.buffer, dtype: graph.dtype(v), layout })
            }
        };
        let together = graph.dtype(codes).bits() == 4
            && self.target.lanes >= 16
            && in_whole_steps(graph, node)
            && matches!(left, DType::I8 | DType::F32);
        let place = self.codes_place(codes, coded, together);
        let layout = over(&place.layout, &|i| if i == 0 { n_axis } else { k_axis });
        let code_type = graph.dtype(codes);
        let rhs = Side { buffer: place.buffer, dtype: code_type, layout };
        let factors = node.inputs.iter().enumerate().skip(2).filter(|(i, _)| !(coded && *i == 3));
        let factors = factors.map(|(_, &v)| {
            let place = self.in_panels(v);
            Factor { buffer: place.buffer, dtype: graph.dtype(v), layout: place.layout }
        });
        let factors = factors.collect();
        let product = Product {
            space,
            result_axes,
            lhs,
            rhs,
            computed: [None, None],
            operands: Operands {
                left,
                right: code_type,
                acc: if coded { DType::I32 } else { acc },
            },
            dtype: graph.dtype(node.outputs[0]),
            scaled: Some(Scaled { group: size, factors, own, together, acc }),
            first: None,
        };
        let dag = self.dag(group)?;
        let (name, note) = (self.kernel_name(group), self.note(group));
        self.product_kernel(name, &product, &dag, note)
    }

    /// Knobs of such a product. Rows are few, so codes are not for tiles, which would be nearly empty.
    pub(crate) fn group_knobs(
        &self,
        from: CpuKnobs,
        operands: Operands,
        together: bool,
    ) -> CpuKnobs {
        let Operands { left, right, acc } = operands;
        let dot = self.target.int8_unit != MatrixUnit::Fma;
        let unit = match together {
            true if MatrixUnit::Codes.takes(left, right, acc) => MatrixUnit::Codes,
            _ if dot && MatrixUnit::I8Dot.takes(left, right, acc) => MatrixUnit::I8Dot,
            _ => return knobs(from),
        };
        knobs(CpuKnobs { unit, ..self.knobs() })
    }

    /// Columns of a block of such a product.
    pub(crate) fn group_panel(&self) -> i64 {
        i64::from(knobs(self.knobs()).mma_vectors) * self.target.lanes
    }

    /// Columns of a block: where codes lie together, a few panels, so that what is done for a row and a group is shared; no
    /// more than leaves each thread two blocks.
    pub(crate) fn group_block(&self, together: bool, columns: i64) -> i64 {
        let panel = self.group_panel();
        let blocks = |panels: i64| (columns + panels * panel - 1) / (panels * panel);
        let enough = |panels: &i64| together && blocks(*panels) >= 2 * self.target.threads;
        [4, 2].into_iter().find(enough).unwrap_or(1) * panel
    }

    /// Where the codes lie.
    fn codes_place(&mut self, v: ValueId, coded: bool, together: bool) -> Place {
        let dtype = self.graph.dtype(v);
        let together = match together {
            true => TOGETHER,
            false if coded && dtype.bits() == 8 => MatrixUnit::I8Dot.depth_group(),
            false => return self.in_panels(v),
        };
        let width = self.group_panel();
        let layout = Layout::grouped_panels(self.graph.shape(v), 0, width, 1, together);
        self.const_place_as(v, dtype, layout)
    }

    /// A constant `[N, ..]` in panels along its first axis, in its own type.
    fn in_panels(&mut self, v: ValueId) -> Place {
        let width = self.group_panel();
        let layout = Layout::panels(self.graph.shape(v), 0, width);
        self.const_place_as(v, self.graph.dtype(v), layout)
    }
}

/// The extent of a block of the depth.
pub(crate) fn depth_block(group: i64, depth: &Dim) -> i64 {
    depth.as_const().map_or(group, |k| group.min(k.max(1)))
}
