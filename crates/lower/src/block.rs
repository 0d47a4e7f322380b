//! What a block of a fused kernel computes around its anchor, and how it becomes tile operations.
//!
//! A [`Dag`] is the group's elementwise and reducing part over one *reference shape* (the anchor's
//! result, or for row reductions the operand). Each node says along which reference axes it varies,
//! so broadcasting is data: a bias varies along one axis, a row's maximum along all but one.
//!
//! A kernel sees the reference axes through *canonical axes*: runs of reference axes that every
//! layout in the kernel walks with one stride. [`Pos`] says where the block stands on each: at which
//! coordinate its tile starts and how long the tile is (`None`: one element, no tile axis).
//! [`Emit`] turns nodes into tiles; chains of maps become one map.

use crate::views::{is_broadcast, merge};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::DType;
use tilewright_expr::{ExprId, Func, FuncBuilder, Value};
use tilewright_layout::{Axis, Dim, Layout, Symbols};
use tilewright_plan::BufferId;
use tilewright_tile::{
    Access, Block, Bound, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, Stmt, TileId, TileOp,
};

/// Zero of a type.
pub(crate) fn zero(dtype: DType) -> Value {
    if dtype.is_float() { Value::Float(0.0) } else { Value::Int(0) }
}

/// A kernel in the making: the builder and the buffers of its parameters.
pub(crate) struct KernelParts {
    pub(crate) b: KernelBuilder,
    pub(crate) args: Vec<BufferId>,
    seen: Vec<(BufferId, Layout, DType, ParamId)>,
    written: Vec<(BufferId, Layout, ParamId)>,
    taken: BTreeSet<String>,
}

impl KernelParts {
    /// Starts a kernel. The names of the model's symbols are taken.
    pub(crate) fn new(name: impl Into<String>, symbols: &Symbols) -> KernelParts {
        KernelParts {
            b: KernelBuilder::new(name),
            args: Vec::new(),
            seen: Vec::new(),
            written: Vec::new(),
            taken: symbols.iter().map(|s| s.name.to_string()).collect(),
        }
    }

    /// `name`, or a variation that is not taken; distinct from all names given so far.
    pub(crate) fn fresh(&mut self, name: &str) -> String {
        let mut unique = name.to_string();
        let mut n = 1;
        while !self.taken.insert(unique.clone()) {
            unique = format!("{name}_{n}");
            n += 1;
        }
        unique
    }

    /// A parameter that is read. The same buffer under the same layout is one parameter.
    pub(crate) fn input(&mut self, buffer: BufferId, dtype: DType, layout: Layout) -> ParamId {
        let known = self.seen.iter().find(|s| s.0 == buffer && s.1 == layout && s.2 == dtype);
        if let Some(known) = known {
            return known.3;
        }
        let name = self.fresh(&format!("x{}", self.args.len()));
        let id = self.b.param(&name, dtype, layout.clone(), Access::In);
        self.args.push(buffer);
        self.seen.push((buffer, layout, dtype, id));
        id
    }

    /// A parameter that is written. The same buffer under the same layout is one parameter.
    pub(crate) fn output(&mut self, buffer: BufferId, dtype: DType, layout: Layout) -> ParamId {
        let known = self.written.iter().find(|s| s.0 == buffer && s.1 == layout);
        if let Some(known) = known {
            return known.2;
        }
        let name = self.fresh(&format!("y{}", self.args.len()));
        self.args.push(buffer);
        let id = self.b.param(&name, dtype, layout.clone(), Access::Out);
        self.written.push((buffer, layout, id));
        id
    }

    /// Declares a tile size and returns it with its name.
    pub(crate) fn tile(&mut self, name: &str) -> (Dim, String) {
        let name = self.fresh(name);
        (self.b.tile(&name), name)
    }

    /// Says what CPU schedules may give a tile size. A GPU's schedules are made and checked apart.
    pub(crate) fn bound(&mut self, tile: &str, bound: Bound) {
        self.b.bound(tile, bound);
    }

    /// Declares a grid axis and returns its index.
    pub(crate) fn grid(&mut self, name: &str, extent: Dim) -> Dim {
        let name = self.fresh(name);
        self.b.grid(&name, extent)
    }

    /// The kernel with the symbols that it uses, and its buffers.
    pub(crate) fn finish(mut self, symbols: &Symbols) -> (Kernel, Vec<BufferId>) {
        let kernel = self.b.finish();
        let mut used = BTreeSet::new();
        let mut visit = |d: &Dim| {
            d.for_each_symbol(&mut |s| {
                used.insert(s.to_string());
            });
        };
        for (_, p) in kernel.params.iter() {
            visit(&p.layout.offset);
            for a in &p.layout.axes {
                visit(&a.extent);
                visit(&a.stride);
                if let Some(b) = &a.block {
                    visit(&b.stride);
                }
            }
        }
        kernel.grid.iter().for_each(|g| visit(&g.extent));
        visit_dims(&kernel.body, &mut visit);
        let mut kernel = kernel;
        kernel.symbols = symbols.iter().filter(|s| used.contains(&*s.name)).cloned().collect();
        (kernel, std::mem::take(&mut self.args))
    }
}

/// Every index expression of a block.
fn visit_dims(block: &Block, visit: &mut dyn FnMut(&Dim)) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(_, op) => match op {
                TileOp::Load { index, .. } | TileOp::Gather { index, .. } => {
                    index.iter().for_each(&mut *visit);
                }
                TileOp::Reduce { limit: Some(d), .. }
                | TileOp::ArgReduce { limit: Some(d), .. }
                | TileOp::Mma { limit: Some(d), .. }
                | TileOp::Iota { start: d, .. }
                | TileOp::Random { start: d, .. } => visit(d),
                _ => {}
            },
            Stmt::Store { index, .. } | Stmt::AtomicAdd { index, .. } => {
                index.iter().for_each(&mut *visit);
            }
            Stmt::For(f) => {
                visit(&f.lo);
                visit(&f.hi);
                visit_dims(&f.body, visit);
            }
            Stmt::If(i) => {
                visit(&i.lhs);
                visit(&i.rhs);
                visit_dims(&i.then, visit);
                visit_dims(&i.otherwise, visit);
            }
        }
    }
}

/// A tensor in memory as the group sees it.
#[derive(Clone, Debug)]
pub(crate) struct Ext {
    pub(crate) buffer: BufferId,
    pub(crate) dtype: DType,
    /// Over the reference axes; an axis along which it does not vary has stride 0.
    pub(crate) layout: Layout,
    /// Added to the coordinates (padding reads at shifted places), one per reference axis.
    pub(crate) shift: Option<Vec<Dim>>,
    /// What lies outside.
    pub(crate) fill: Value,
}

/// What a node of a [`Dag`] is.
#[derive(Clone, Debug)]
pub(crate) enum DagOp {
    /// Loaded.
    Ext(Ext),
    /// The anchor's result, computed before.
    Anchor,
    /// Elementwise.
    Map(Func),
    /// Combination over the reduced axes.
    Reduce(ReduceKind),
    /// Position of the extreme over the (single) reduced axis.
    ArgReduce(ReduceKind, bool),
    /// Running combination along the (single) reduced axis: kind, exclusive, reverse.
    Scan(ReduceKind, bool, bool),
    /// A size as `i64`.
    Size(Dim),
    /// The coordinate along a reference axis.
    Iota(usize),
    /// Uniform numbers; the counter is the row-major position in the reference shape.
    Random(u64),
}

/// A node: what, of which nodes, varying along which reference axes, of which type.
#[derive(Clone, Debug)]
pub(crate) struct DagNode {
    pub(crate) op: DagOp,
    pub(crate) args: Vec<usize>,
    pub(crate) axes: Vec<bool>,
    pub(crate) dtype: DType,
}

/// A stored result.
#[derive(Clone, Debug)]
pub(crate) struct DagStore {
    pub(crate) node: usize,
    pub(crate) buffer: BufferId,
    /// Over the reference axes.
    pub(crate) layout: Layout,
}

/// The elementwise and reducing part of a group; operands come before users.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dag {
    pub(crate) nodes: Vec<DagNode>,
    pub(crate) stores: Vec<DagStore>,
}

impl Dag {
    pub(crate) fn push(
        &mut self,
        op: DagOp,
        args: Vec<usize>,
        axes: Vec<bool>,
        dtype: DType,
    ) -> usize {
        self.nodes.push(DagNode { op, args, axes, dtype });
        self.nodes.len() - 1
    }

    /// A map; it varies along the axes of its operands.
    pub(crate) fn map(&mut self, func: Func, args: Vec<usize>, rank: usize) -> usize {
        let axes = (0..rank).map(|a| args.iter().any(|&n| self.nodes[n].axes[a])).collect();
        let dtype = func.dtype();
        self.push(DagOp::Map(func), args, axes, dtype)
    }

    /// A node in another type; the same one twice is one node.
    pub(crate) fn cast(&mut self, node: usize, to: DType) -> usize {
        let from = self.nodes[node].dtype;
        if from == to {
            return node;
        }
        let func = Func::cast(from, to);
        let is_it = |n: &DagNode| n.args == [node] && matches!(&n.op, DagOp::Map(f) if *f == func);
        if let Some(known) = self.nodes.iter().position(is_it) {
            return known;
        }
        let axes = self.nodes[node].axes.clone();
        self.push(DagOp::Map(func), vec![node], axes, to)
    }

    /// The layouts over the reference axes that the canonical axes must serve.
    pub(crate) fn layouts(&self) -> Vec<&Layout> {
        let loads = self.nodes.iter().filter_map(|n| match &n.op {
            DagOp::Ext(e) => Some(&e.layout),
            _ => None,
        });
        loads.chain(self.stores.iter().map(|s| &s.layout)).collect()
    }

    /// Whether coordinates along a reference axis are shifted in some load: it merges with none.
    pub(crate) fn solo(&self, axis: usize) -> bool {
        self.nodes.iter().any(|n| match &n.op {
            DagOp::Ext(Ext { shift: Some(shift), layout, .. }) => {
                !shift[axis].is(0) || layout.axes[axis].extent != self.reference_extent(axis)
            }
            DagOp::Iota(a) => *a == axis,
            _ => false,
        })
    }

    /// Extent of a reference axis, as the first store knows it.
    fn reference_extent(&self, axis: usize) -> Dim {
        self.stores.first().map_or(Dim::new(1), |s| s.layout.axes[axis].extent.clone())
    }

    /// How often each node is read by nodes; a store counts too.
    pub(crate) fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.nodes.len()];
        self.nodes.iter().flat_map(|n| &n.args).for_each(|&a| uses[a] += 1);
        self.stores.iter().for_each(|s| uses[s.node] += 1);
        uses
    }
}

/// Operations of a function, dear ones by their weight in flops: how many additions a core does in
/// the time (measured on arrays of `f32` with 512-bit vectors; see the book's facts).
pub(crate) fn func_cost(func: &Func) -> i64 {
    use tilewright_expr::{Node, Op};
    func.nodes()
        .map(|(_, node, _)| match node {
            Node::Op(op, _) => match op {
                Op::Cast | Op::Neg | Op::Abs | Op::Select | Op::Not => 1,
                Op::Div => 5,
                Op::Sqrt | Op::Exp | Op::Exp2 => 10,
                Op::Rsqrt | Op::Sigmoid | Op::Tanh => 16,
                Op::Log | Op::Log2 | Op::Expm1 => 24,
                Op::Erf => 30,
                Op::Mod | Op::Rem => 40,
                Op::Sin | Op::Cos => 48,
                Op::Pow | Op::Atan2 => 220,
                op if op.arity() == 1 && *op > Op::Sqrt && *op < Op::IsNan => 80,
                _ => 1,
            },
            _ => 0,
        })
        .sum()
}

/// Where a block stands on a canonical axis.
#[derive(Clone, Debug)]
pub(crate) struct Pos {
    /// Coordinate of the first element.
    pub(crate) start: Dim,
    /// Extent of the tile; `None` for a single element that is no tile axis.
    pub(crate) tile: Option<Dim>,
}

impl Pos {
    pub(crate) fn unit(start: Dim) -> Pos {
        Pos { start, tile: None }
    }
    pub(crate) fn tile(start: Dim, tile: Dim) -> Pos {
        Pos { start, tile: Some(tile) }
    }
}

/// Turns nodes of a [`Dag`] into tiles at one position.
pub(crate) struct Emit<'a> {
    pub(crate) dag: &'a Dag,
    /// Reference axes of each canonical axis.
    pub(crate) canon: &'a [Vec<usize>],
    pub(crate) pos: Vec<Pos>,
    /// Canonical axes over which reductions go, and the extent that counts.
    pub(crate) reduced: Option<(usize, Dim)>,
    pub(crate) uses: Vec<usize>,
    /// Tiles made so far.
    pub(crate) memo: BTreeMap<usize, TileId>,
}

impl<'a> Emit<'a> {
    pub(crate) fn new(dag: &'a Dag, canon: &'a [Vec<usize>], pos: Vec<Pos>) -> Emit<'a> {
        Emit { dag, canon, pos, reduced: None, uses: dag.uses(), memo: BTreeMap::new() }
    }

    /// Canonical axes along which a node varies and that are tile axes here.
    fn tile_axes(&self, axes: &[bool]) -> Vec<usize> {
        (0..self.canon.len())
            .filter(|&c| {
                let varies = self.canon[c].iter().any(|&a| axes[a]);
                self.pos[c].tile.is_some() && varies
            })
            .collect()
    }

    fn tile_shape(&self, canon: &[usize]) -> Vec<Dim> {
        canon.iter().filter_map(|&c| self.pos[c].tile.clone()).collect()
    }

    /// The shape of a node's tile here.
    pub(crate) fn shape_of(&self, node: usize) -> Vec<Dim> {
        self.tile_shape(&self.tile_axes(&self.dag.nodes[node].axes))
    }

    /// The shape of what a reduction of a node's tile over the rows leaves.
    pub(crate) fn reduced_shape(&self, node: usize) -> Vec<Dim> {
        let row = self.reduced.as_ref().map(|(canon, _)| *canon);
        let mut axes = self.tile_axes(&self.dag.nodes[node].axes);
        axes.retain(|c| Some(*c) != row);
        self.tile_shape(&axes)
    }

    /// Along which tile axes of a result (given as canonical axes) an operand's tile runs.
    fn along(&self, node: usize, result: &[usize]) -> Vec<usize> {
        self.tile_axes(&self.dag.nodes[node].axes)
            .iter()
            .filter_map(|c| result.iter().position(|r| r == c))
            .collect()
    }

    /// The tile of a node.
    pub(crate) fn tile(&mut self, k: &mut KernelParts, node: usize) -> TileId {
        if let Some(&tile) = self.memo.get(&node) {
            return tile;
        }
        let DagNode { op, args, axes, dtype } = &self.dag.nodes[node];
        let tile = match op {
            DagOp::Ext(ext) => self.load(k, ext),
            DagOp::Anchor => unreachable!("the anchor's tile is given before its epilogue"),
            DagOp::Map(_) => self.map(k, node),
            DagOp::Reduce(kind) => {
                let (x, axis, limit) = self.reduce_operand(k, args[0]);
                k.b.reduce(*kind, x, axis, limit)
            }
            DagOp::ArgReduce(kind, last) => {
                let (x, axis, limit) = self.reduce_operand(k, args[0]);
                k.b.arg_reduce(*kind, x, axis, limit, *last)
            }
            DagOp::Scan(kind, exclusive, reverse) => {
                let (x, axis, _) = self.reduce_operand(k, args[0]);
                k.b.scan(*kind, x, axis, *exclusive, *reverse)
            }
            DagOp::Size(size) => {
                let one = k.b.iota(*dtype, 0, size.clone(), vec![Dim::new(1)]);
                k.b.reshape(one, vec![])
            }
            DagOp::Iota(axis) => {
                let tiled = self.tile_axes(axes);
                let c = self.canon.iter().position(|g| g.contains(axis)).unwrap_or(0);
                let start = self.pos[c].start.clone();
                if tiled.is_empty() {
                    let one = k.b.iota(*dtype, 0, start, vec![Dim::new(1)]);
                    k.b.reshape(one, vec![])
                } else {
                    k.b.iota(*dtype, 0, start, self.tile_shape(&tiled))
                }
            }
            DagOp::Random(seed) => {
                let tiled = self.tile_axes(axes);
                let start = self.pos.last().map_or(Dim::new(0), |p| p.start.clone());
                k.b.random(*dtype, *seed, start, self.tile_shape(&tiled))
            }
        };
        self.memo.insert(node, tile);
        tile
    }

    /// The operand of a reduction with its full shape, its tile axis that vanishes, and the limit.
    pub(crate) fn reduce_operand(
        &mut self,
        k: &mut KernelParts,
        arg: usize,
    ) -> (TileId, usize, Option<Dim>) {
        let x = self.tile(k, arg);
        let (canon, extent) = self.reduced.clone().expect("a reduction outside a row group");
        let have = self.tile_axes(&self.dag.nodes[arg].axes);
        let pos = &self.pos[canon];
        let left = &extent - &pos.start;
        let limit = (Some(&left) != pos.tile.as_ref()).then_some(left);
        if let Some(axis) = have.iter().position(|&c| c == canon) {
            return (x, axis, limit);
        }
        // The operand does not vary along the reduced axis: repeat it.
        let mut want = have.clone();
        want.push(canon);
        want.sort_unstable();
        let along = have.iter().filter_map(|c| want.iter().position(|w| w == c)).collect();
        let axis = want.iter().position(|&c| c == canon).unwrap_or(0);
        let shape = self.tile_shape(&want);
        (k.b.broadcast(Operand { tile: x, along }, shape), axis, limit)
    }

    fn load(&mut self, k: &mut KernelParts, ext: &Ext) -> TileId {
        let layout = merge(&ext.layout, self.canon).expect("canonical axes serve every layout");
        let (mut axes, mut index, mut shape): (Vec<Axis>, Vec<Dim>, Vec<Dim>) = Default::default();
        let mut tile_shape = Vec::new();
        for (c, axis) in layout.axes.iter().enumerate() {
            let first = self.canon[c].first();
            let shift = ext.shift.as_ref().zip(first).map(|(s, &a)| s[a].clone());
            // Padded data varies along every axis, also where it has a single element.
            if is_broadcast(axis) && shift.is_none() {
                continue;
            }
            axes.push(axis.clone());
            index.push(&self.pos[c].start + shift.unwrap_or_default());
            shape.push(self.pos[c].tile.clone().unwrap_or(Dim::new(1)));
            tile_shape.extend(self.pos[c].tile.clone());
        }
        let layout = Layout { axes, offset: layout.offset };
        let param = k.input(ext.buffer, ext.dtype, layout);
        let steps = vec![1; index.len()];
        let tile = k.b.load_with(param, index, steps, ext.fill, shape);
        k.b.reshape(tile, tile_shape)
    }

    /// A map with the maps of the same shape that only it reads folded in.
    fn map(&mut self, k: &mut KernelParts, node: usize) -> TileId {
        let mut f = FuncBuilder::new();
        let mut leaves: Vec<(usize, ExprId)> = Vec::new();
        let result = self.inline(k, node, node, &mut f, &mut leaves);
        let canon = self.tile_axes(&self.dag.nodes[node].axes);
        let args: Vec<Operand> = leaves
            .iter()
            .map(|(leaf, _)| Operand { tile: self.memo[leaf], along: self.along(*leaf, &canon) })
            .collect();
        let func = f.finish(result);
        k.b.map(func, args, self.tile_shape(&canon))
    }

    fn inline(
        &mut self,
        k: &mut KernelParts,
        root: usize,
        node: usize,
        f: &mut FuncBuilder,
        leaves: &mut Vec<(usize, ExprId)>,
    ) -> ExprId {
        let dag = self.dag;
        let info = &dag.nodes[node];
        let same_shape = info.axes == dag.nodes[root].axes;
        let cheap = |n: usize| matches!(&dag.nodes[n].op, DagOp::Map(func) if func_cost(func) <= 2);
        let fold = node == root
            || (same_shape
                && !self.memo.contains_key(&node)
                && (self.uses[node] == 1 || cheap(node)));
        if let (DagOp::Map(func), true) = (&info.op, fold) {
            let args: Vec<ExprId> =
                info.args.iter().map(|&a| self.inline(k, root, a, f, leaves)).collect();
            return f.inline(func, &args);
        }
        if let Some(known) = leaves.iter().find(|l| l.0 == node) {
            return known.1;
        }
        self.tile(k, node);
        let param = f.param(&format!("a{}", leaves.len()), info.dtype);
        leaves.push((node, param));
        param
    }

    /// Stores a result at this position.
    pub(crate) fn store(&mut self, k: &mut KernelParts, store: &DagStore) {
        let tile = self.tile(k, store.node);
        let node = &self.dag.nodes[store.node];
        let layout = merge(&store.layout, self.canon).expect("canonical axes serve every layout");
        let have = self.tile_axes(&node.axes);
        let (mut axes, mut index, mut shape): (Vec<Axis>, Vec<Dim>, Vec<Dim>) = Default::default();
        let mut wanted = Vec::new();
        for (c, axis) in layout.axes.iter().enumerate() {
            let reduced = self.reduced.as_ref().is_some_and(|(r, _)| *r == c)
                && !self.canon[c].iter().any(|&a| node.axes[a])
                && is_broadcast(axis);
            let tile = if reduced { None } else { self.pos[c].tile.clone() };
            if tile.is_none() && is_broadcast(axis) {
                continue;
            }
            axes.push(axis.clone());
            index.push(self.pos[c].start.clone());
            if tile.is_some() {
                wanted.push(c);
            }
            shape.push(tile.unwrap_or(Dim::new(1)));
        }
        let layout = Layout { axes, offset: layout.offset };
        // A result that does not vary along a tile axis (all its operands are broadcast) repeats.
        let full = self.tile_shape(&wanted);
        let tile = if have == wanted {
            tile
        } else {
            let along = have.iter().filter_map(|c| wanted.iter().position(|w| w == c)).collect();
            k.b.broadcast(Operand { tile, along }, full)
        };
        let value = k.b.reshape(tile, shape);
        let param = k.output(store.buffer, node.dtype, layout);
        k.b.store(param, index, value);
    }

    /// Stores all results.
    pub(crate) fn store_all(&mut self, k: &mut KernelParts) {
        let dag = self.dag;
        for store in &dag.stores {
            self.store(k, store);
        }
    }
}
