//! [`KernelBuilder`]: makes kernels step by step, inferring tile types.
//!
//! Loops and branches nest with [`KernelBuilder::begin_for`] and [`KernelBuilder::end_for`].
//! Builders are used by our own lowering and by library kernels, so misuse panics.

use crate::ir::*;
use std::sync::Arc;
use tilewright_base::{DType, IdVec};
use tilewright_expr::{Func, Value};
use tilewright_layout::{Dim, Layout, Symbol};

/// Builds a [`Kernel`].
#[derive(Debug)]
pub struct KernelBuilder {
    kernel: Kernel,
    open: Vec<(Vec<Stmt>, OpenFor)>,
    stmts: Vec<Stmt>,
}

#[derive(Debug)]
struct OpenFor {
    var: Arc<str>,
    lo: Dim,
    hi: Dim,
    carry: Vec<(TileId, TileId)>,
}

fn zero(dtype: DType) -> Value {
    if dtype.is_float() { Value::Float(0.0) } else { Value::Int(0) }
}

impl KernelBuilder {
    /// A kernel without parameters, grid or steps.
    pub fn new(name: impl Into<String>) -> KernelBuilder {
        KernelBuilder {
            kernel: Kernel {
                name: name.into(),
                params: IdVec::new(),
                symbols: Vec::new(),
                tiles: Vec::new(),
                bounds: Vec::new(),
                grid: Vec::new(),
                values: IdVec::new(),
                body: Block::default(),
            },
            open: Vec::new(),
            stmts: Vec::new(),
        }
    }

    /// Declares a size symbol (once).
    pub fn symbol(&mut self, symbol: Symbol) {
        if !self.kernel.symbols.iter().any(|s| s.name == symbol.name) {
            self.kernel.symbols.push(symbol);
        }
    }

    /// Declares a tile size and returns it.
    pub fn tile(&mut self, name: &str) -> Dim {
        self.kernel.tiles.push(name.into());
        Dim::sym(name)
    }

    /// Says what schedules may give a tile size that was declared.
    pub fn bound(&mut self, tile: &str, bound: Bound) {
        let place = |name: &str| self.kernel.tiles.iter().position(|t| **t == *name);
        let at = self.kernel.bounds.partition_point(|(name, _)| place(name) <= place(tile));
        self.kernel.bounds.insert(at, (tile.into(), bound));
    }

    /// Declares a grid axis and returns its index.
    pub fn grid(&mut self, name: &str, extent: Dim) -> Dim {
        self.kernel.grid.push(GridAxis { name: name.into(), extent });
        Dim::sym(name)
    }

    /// Declares a parameter.
    pub fn param(&mut self, name: &str, dtype: DType, layout: Layout, access: Access) -> ParamId {
        self.kernel.params.push(Param { name: name.into(), dtype, layout, access })
    }

    /// A parameter declared so far.
    pub fn param_info(&self, param: ParamId) -> &Param {
        &self.kernel.params[param]
    }

    /// The type of a tile built so far.
    pub fn ty(&self, tile: TileId) -> &TileType {
        self.kernel.ty(tile)
    }

    /// Names a tile.
    pub fn name(&mut self, tile: TileId, name: impl Into<String>) {
        self.kernel.values[tile].name = name.into();
    }

    fn value(&mut self, ty: TileType) -> TileId {
        self.kernel.values.push(TileInfo { name: String::new(), ty })
    }

    fn emit(&mut self, ty: TileType, op: TileOp) -> TileId {
        let id = self.value(ty);
        self.stmts.push(Stmt::Let(id, op));
        id
    }

    /// A tile of one repeated value.
    pub fn full(&mut self, value: Value, ty: TileType) -> TileId {
        self.emit(ty, TileOp::Full(value))
    }

    /// Loads a tile of this shape with step 1; outside reads zero.
    pub fn load(&mut self, param: ParamId, index: Vec<Dim>, shape: Vec<Dim>) -> TileId {
        let fill = zero(self.kernel.params[param].dtype);
        let steps = vec![1; index.len()];
        self.load_with(param, index, steps, fill, shape)
    }

    /// Loads a tile with steps and a fill value.
    pub fn load_with(
        &mut self,
        param: ParamId,
        index: Vec<Dim>,
        steps: Vec<i64>,
        fill: Value,
        shape: Vec<Dim>,
    ) -> TileId {
        let info = &self.kernel.params[param];
        assert!(index.len() == info.layout.rank() && shape.len() == index.len(), "load rank");
        let ty = TileType::new(info.dtype, shape);
        self.emit(ty, TileOp::Load { param, index, steps, fill })
    }

    /// Gathers rows; outside reads zero.
    pub fn gather(
        &mut self,
        param: ParamId,
        axis: usize,
        rows: TileId,
        index: Vec<Dim>,
        shape: Vec<Dim>,
    ) -> TileId {
        let dtype = self.kernel.params[param].dtype;
        let ty = TileType::new(dtype, shape);
        self.emit(ty, TileOp::Gather { param, axis, rows, index, fill: zero(dtype) })
    }

    /// Elementwise `func`; each operand with its `along` axes.
    pub fn map(&mut self, func: Func, args: Vec<Operand>, shape: Vec<Dim>) -> TileId {
        assert_eq!(func.params().len(), args.len(), "map operand count");
        for (arg, param) in args.iter().zip(func.params()) {
            assert_eq!(self.ty(arg.tile).dtype, param.dtype, "map operand type");
            assert_eq!(self.ty(arg.tile).shape.len(), arg.along.len(), "map operand rank");
        }
        let ty = TileType::new(func.dtype(), shape);
        self.emit(ty, TileOp::Map { func, args })
    }

    /// An operand whose axes run along the leading axes in order.
    pub fn plain(&self, tile: TileId) -> Operand {
        Operand { tile, along: (0..self.ty(tile).shape.len()).collect() }
    }

    /// Reduction of one axis.
    pub fn reduce(
        &mut self,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        limit: Option<Dim>,
    ) -> TileId {
        let mut ty = self.ty(x).clone();
        ty.shape.remove(axis);
        self.emit(ty, TileOp::Reduce { kind, x, axis, limit })
    }

    /// Position of the extreme element along one axis.
    pub fn arg_reduce(
        &mut self,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        limit: Option<Dim>,
        last: bool,
    ) -> TileId {
        let mut shape = self.ty(x).shape.clone();
        shape.remove(axis);
        self.emit(
            TileType::new(DType::I64, shape),
            TileOp::ArgReduce { kind, x, axis, limit, last },
        )
    }

    /// Running combination.
    pub fn scan(
        &mut self,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        exclusive: bool,
        reverse: bool,
    ) -> TileId {
        let ty = self.ty(x).clone();
        self.emit(ty, TileOp::Scan { kind, x, axis, exclusive, reverse })
    }

    /// Matrix multiply-accumulate.
    pub fn mma(&mut self, acc: TileId, a: TileId, b: TileId, limit: Option<Dim>) -> TileId {
        let (ty, ta, tb) = (self.ty(acc).clone(), self.ty(a), self.ty(b));
        assert!(
            ty.shape.len() == 2
                && ty.shape[0] == ta.shape[0]
                && ty.shape[1] == tb.shape[1]
                && ta.shape[1] == tb.shape[0],
            "mma shapes {ty} {ta} {tb}"
        );
        self.emit(ty, TileOp::Mma { acc, a, b, limit })
    }

    /// Axes reordered.
    pub fn permute(&mut self, x: TileId, perm: &[usize]) -> TileId {
        let from = self.ty(x);
        let ty = TileType::new(
            from.dtype,
            perm.iter().map(|&p| from.shape[p].clone()).collect::<Vec<_>>(),
        );
        self.emit(ty, TileOp::Permute { x, perm: perm.to_vec() })
    }

    /// The same elements under another shape; the tile itself when it has it already.
    pub fn reshape(&mut self, x: TileId, shape: Vec<Dim>) -> TileId {
        if self.ty(x).shape == shape {
            return x;
        }
        let ty = TileType::new(self.ty(x).dtype, shape);
        self.emit(ty, TileOp::Reshape(x))
    }

    /// Repeats along new or stretched axes.
    pub fn broadcast(&mut self, x: Operand, shape: Vec<Dim>) -> TileId {
        let ty = TileType::new(self.ty(x.tile).dtype, shape);
        self.emit(ty, TileOp::Broadcast(x))
    }

    /// Counts along an axis.
    pub fn iota(&mut self, dtype: DType, axis: usize, start: Dim, shape: Vec<Dim>) -> TileId {
        self.emit(TileType::new(dtype, shape), TileOp::Iota { axis, start })
    }

    /// Uniform random numbers.
    pub fn random(&mut self, dtype: DType, seed: u64, start: Dim, shape: Vec<Dim>) -> TileId {
        self.emit(TileType::new(dtype, shape), TileOp::Random { seed, start })
    }

    /// Stores a tile.
    pub fn store(&mut self, param: ParamId, index: Vec<Dim>, value: TileId) {
        assert_eq!(index.len(), self.ty(value).shape.len(), "store rank");
        self.stmts.push(Stmt::Store { param, index, value });
    }

    /// Adds a tile to memory, indivisibly per element.
    pub fn atomic_add(&mut self, param: ParamId, index: Vec<Dim>, value: TileId) {
        self.stmts.push(Stmt::AtomicAdd { param, index, value });
    }

    /// Opens a loop; returns its variable and the carried tiles as the body sees them.
    pub fn begin_for(
        &mut self,
        var: &str,
        lo: Dim,
        hi: Dim,
        init: &[TileId],
    ) -> (Dim, Vec<TileId>) {
        let carry: Vec<(TileId, TileId)> = init
            .iter()
            .map(|&i| {
                let ty = self.ty(i).clone();
                (self.value(ty), i)
            })
            .collect();
        let inner = carry.iter().map(|c| c.0).collect();
        let outer = std::mem::take(&mut self.stmts);
        self.open.push((outer, OpenFor { var: var.into(), lo, hi, carry }));
        (Dim::sym(var), inner)
    }

    /// Closes the innermost loop; returns the carried tiles' last values.
    pub fn end_for(&mut self, yields: &[TileId]) -> Vec<TileId> {
        let (outer, open) = self.open.pop().expect("end_for without begin_for");
        let body = Block { stmts: std::mem::replace(&mut self.stmts, outer) };
        assert_eq!(yields.len(), open.carry.len(), "loop yields");
        let results: Vec<TileId> = yields
            .iter()
            .map(|&y| {
                let ty = self.ty(y).clone();
                self.value(ty)
            })
            .collect();
        let OpenFor { var, lo, hi, carry } = open;
        self.stmts.push(Stmt::For(Box::new(For {
            var,
            lo,
            hi,
            carry,
            body,
            yields: yields.to_vec(),
            results: results.clone(),
        })));
        results
    }

    /// The finished kernel.
    pub fn finish(mut self) -> Kernel {
        assert!(self.open.is_empty(), "a loop is still open");
        self.kernel.body = Block { stmts: self.stmts };
        self.kernel
    }
}
