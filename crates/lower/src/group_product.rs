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
//! With zeros, `zeros[g, n] * sum of X[m, g*G..]` is taken off `part`. Codes and scales lie in panels as wide as a block,
//! so that a block reads one stream of each, in order.

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
use tilewright_tile::{CpuKnobs, Operand, ParamId, ReduceKind, TileId};

/// The scales of a product's right operand.
#[derive(Clone)]
pub(crate) struct Scaled {
    /// Depth that shares a scale.
    pub(crate) group: i64,
    /// Scales, and zeros if there are some.
    pub(crate) factors: Vec<Factor>,
}

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
    /// `acc + (part - zeros * sum of a) * scales`, for the columns and the group at `at`.
    pub(crate) fn add(
        &self,
        k: &mut KernelParts,
        [acc, part, a]: [TileId; 3],
        at: &[Dim; 2],
        limit: Option<Dim>,
    ) -> TileId {
        let ty = k.b.ty(acc).clone();
        let mut args = vec![k.b.plain(acc), k.b.plain(part)];
        let mut types = vec![ty.dtype, ty.dtype];
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
            let sums = k.b.reduce(ReduceKind::Sum, a, 1, limit);
            args.push(Operand { tile: sums, along: vec![0] });
            types.push(k.b.ty(sums).dtype);
        }
        let func = func(&types, |f, x| {
            let wide: Vec<_> = x.iter().map(|&x| f.cast(x, ty.dtype)).collect();
            let part = match wide[..] {
                [_, part, _, zeros, sums] => {
                    let shift = f.op(ExprOp::Mul, &[zeros, sums]);
                    f.op(ExprOp::Sub, &[part, shift])
                }
                _ => wide[1],
            };
            f.op(ExprOp::Fma, &[part, wide[2], wide[0]])
        });
        k.b.map(func, args, ty.shape)
    }
}

/// Whether there is a kernel for it: codes and factors are constants, which are packed once.
pub(crate) fn fits(graph: &Graph, node: &Node) -> bool {
    node.inputs[1..].iter().all(|&v| graph.as_const(v).is_some())
}

/// Vectors and rows of the micro-kernel: four vectors hide the latency of multiply-adds for a single row.
pub(crate) fn knobs(from: CpuKnobs) -> CpuKnobs {
    let rows = if from.vector_bits >= 512 { 5 } else { 2 };
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
        let compute = graph.dtype(x).compute();
        let over = |layout: &Layout, at: &dyn Fn(usize) -> usize| {
            let axes = space.iter().map(|d| broadcast_axis(d.clone())).collect();
            let mut out = Layout { axes, offset: layout.offset.clone() };
            for (i, axis) in layout.axes.iter().enumerate().filter(|(_, a)| !a.extent.is(1)) {
                out.axes[at(i)] = Axis { extent: space[at(i)].clone(), ..axis.clone() };
            }
            out
        };
        let place = self.operand_place(x, compute)?;
        let rank = graph.shape(x).len();
        let layout = over(&place.layout, &|i| if i + 1 == rank { k_axis } else { i });
        let dtype = self.plan.buffers[place.buffer].dtype;
        let lhs = Side { buffer: place.buffer, dtype, layout };
        let place = self.in_panels(codes);
        let layout = over(&place.layout, &|i| if i == 0 { n_axis } else { k_axis });
        let code_type = graph.dtype(codes);
        let rhs = Side { buffer: place.buffer, dtype: code_type, layout };
        let factors = node.inputs[2..].iter().map(|&v| {
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
            operands: Operands { left: compute, right: code_type, acc: compute },
            dtype: graph.dtype(node.outputs[0]),
            scaled: Some(Scaled { group: size, factors }),
        };
        let dag = self.dag(group)?;
        let (name, note) = (self.kernel_name(group), self.note(group));
        self.product_kernel(name, &product, &dag, note)
    }

    /// Columns of a block of such a product.
    pub(crate) fn group_panel(&self) -> i64 {
        i64::from(knobs(self.knobs()).mma_vectors) * self.target.lanes
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
