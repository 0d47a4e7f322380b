//! [`Kernel`] and its parts.
//!
//! Every integer (index, bound, extent) is a [`Dim`] over four kinds of symbols: sizes
//! (`Kernel::symbols`), tile sizes (`Kernel::tiles`, bound by the schedule), grid indices
//! (`Kernel::grid`) and loop variables of enclosing loops. All names are distinct.

use std::fmt;
use std::sync::Arc;
use tilewright_base::{DType, IdVec, typed_id};
use tilewright_expr::{Func, Node, Op as ExprOp, Value};
use tilewright_layout::{Dim, Layout, Symbols};

typed_id!(
    /// A tile value. Prints as `%3`, or by its name.
    TileId,
    "%"
);
typed_id!(
    /// A parameter of a kernel, by position.
    ParamId,
    "p"
);

/// Element type and static shape of a tile: the extents are numbers or expressions over the tile
/// sizes only. Prints as `f32[BM,BN]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TileType {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; none for a scalar.
    pub shape: Vec<Dim>,
}

impl TileType {
    /// `dtype[shape...]`.
    pub fn new(dtype: DType, shape: impl Into<Vec<Dim>>) -> TileType {
        TileType { dtype, shape: shape.into() }
    }
}

impl fmt::Display for TileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(","))
    }
}

/// What a kernel does with a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Only loads.
    In,
    /// Only stores; every element of the logical shape is written by the whole grid.
    Out,
    /// Loads and stores, or atomics. Blocks never touch elements that other blocks write, except
    /// by atomics.
    InOut,
}

/// A global tensor that the kernel reads or writes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Name, unique among parameters.
    pub name: Arc<str>,
    /// Element type.
    pub dtype: DType,
    /// Shape (`layout.shape()`), strides, blocking and offset, over the size symbols.
    pub layout: Layout,
    /// Reads, writes or both.
    pub access: Access,
}

/// What a schedule may give a tile size, beyond a positive number: with any other the kernel would compute something
/// else. Prints behind the tile size: `BN >= 768`, `BK divides 64`, `BK == 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bound {
    /// At least this: one tile holds all that a reduction combines.
    AtLeast(i64),
    /// A divisor of this: no tile reaches beyond the end of an axis.
    Divides(i64),
    /// This and no other: something else counts in the same steps.
    Exactly(i64),
}

impl Bound {
    /// Whether a tile size of `size` is allowed; sizes are positive.
    pub fn allows(self, size: i64) -> bool {
        match self {
            Bound::AtLeast(n) => size >= n,
            Bound::Divides(n) => n % size == 0,
            Bound::Exactly(n) => size == n,
        }
    }

    /// The number in it.
    pub fn number(self) -> i64 {
        match self {
            Bound::AtLeast(n) | Bound::Divides(n) | Bound::Exactly(n) => n,
        }
    }

    /// How it stands between the tile size and the number in a kernel's text.
    pub fn word(self) -> &'static str {
        match self {
            Bound::AtLeast(_) => ">=",
            Bound::Divides(_) => "divides",
            Bound::Exactly(_) => "==",
        }
    }
}

/// One axis of the grid. Blocks run in any order and in parallel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GridAxis {
    /// The index, `0..extent`, in expressions.
    pub name: Arc<str>,
    /// Number of blocks along the axis.
    pub extent: Dim,
}

/// How a reduction or scan combines. As the graph's, restated here so that tile programs do not
/// know graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReduceKind {
    /// Sum; of nothing 0.
    Sum,
    /// Product; of nothing 1.
    Prod,
    /// Largest, NaN wins; of nothing the smallest value of the type (minus infinity).
    Max,
    /// Smallest, NaN wins; of nothing the largest value of the type (infinity).
    Min,
}

/// An operand of a map: a tile, and which axis of the result each of its axes runs along.
/// Axes of extent 1 stretch. `%v along 1` has `along == [1]`; the plain case is `[0, 1, ..]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Operand {
    /// The tile.
    pub tile: TileId,
    /// For each of its axes, the axis of the result; ascending.
    pub along: Vec<usize>,
}

/// An operation with one result tile.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TileOp {
    /// Every element is `value`.
    Full(Value),
    /// Element `(i0, i1, ...)` is `param[index0 + i0*step0, ...]`, or `fill` when that lies outside
    /// the parameter's shape (below zero included). The result has the parameter's rank.
    Load {
        /// From where.
        param: ParamId,
        /// Coordinate of the tile's first element, one per axis of the parameter.
        index: Vec<Dim>,
        /// Distance between neighbours, one per axis; usually 1.
        steps: Vec<i64>,
        /// What lies outside.
        fill: Value,
    },
    /// As a load with step 1, but along `axis` the coordinate of element `i` is `rows[i]`, an
    /// integer tile of rank 1 (`index[axis]` is added). Coordinates outside read `fill`.
    Gather {
        /// From where.
        param: ParamId,
        /// The axis whose coordinates are data.
        axis: usize,
        /// The coordinates.
        rows: TileId,
        /// Coordinate of the tile's first element along the other axes.
        index: Vec<Dim>,
        /// What lies outside.
        fill: Value,
    },
    /// `func` elementwise.
    Map {
        /// Computed for each element; its parameters are the operands in order.
        func: Func,
        /// The operands.
        args: Vec<Operand>,
    },
    /// Combines along `axis`, which vanishes. Only the first `limit` elements count when a limit is
    /// given (a limit beyond the extent counts all, a limit below 1 none).
    Reduce {
        /// How.
        kind: ReduceKind,
        /// The operand.
        x: TileId,
        /// The axis that vanishes.
        axis: usize,
        /// How many elements along the axis count.
        limit: Option<Dim>,
    },
    /// As `Reduce` with `Max` or `Min`, giving the position (`i64`) of the first (or `last`)
    /// extreme element; NaN is extreme.
    ArgReduce {
        /// `Max` or `Min`.
        kind: ReduceKind,
        /// The operand.
        x: TileId,
        /// The axis that vanishes.
        axis: usize,
        /// How many elements along the axis count.
        limit: Option<Dim>,
        /// The last among equals instead of the first.
        last: bool,
    },
    /// Running combination along `axis`.
    Scan {
        /// How.
        kind: ReduceKind,
        /// The operand.
        x: TileId,
        /// Along which axis.
        axis: usize,
        /// Leave out the element itself.
        exclusive: bool,
        /// From the end.
        reverse: bool,
    },
    /// `acc[m,n] + sum over k of a[m,k] * b[k,n]`, in the type of `acc`. With a limit only
    /// `k < limit` is summed.
    Mma {
        /// `[M,N]`, in the accumulation type.
        acc: TileId,
        /// `[M,K]`.
        a: TileId,
        /// `[K,N]`.
        b: TileId,
        /// How many `k` count.
        limit: Option<Dim>,
    },
    /// Axis `i` of the result is axis `perm[i]` of the operand.
    Permute {
        /// The operand.
        x: TileId,
        /// The order.
        perm: Vec<usize>,
    },
    /// The same elements in row-major order under the result's shape.
    Reshape(TileId),
    /// The operand's axes run along these axes of the result, the others repeat it.
    Broadcast(Operand),
    /// Element is `start + position along axis`.
    Iota {
        /// Along which axis.
        axis: usize,
        /// The first value.
        start: Dim,
    },
    /// Uniform numbers in [0,1): Philox4x32-10 of `seed` at counter `start + row-major position`.
    Random {
        /// The key.
        seed: u64,
        /// The first counter.
        start: Dim,
    },
}

/// How two integers compare, for `If`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compare {
    /// `<`
    Lt,
    /// `<=`
    Le,
    /// `==`
    Eq,
    /// `!=`
    Ne,
}

/// A counted loop with carried tiles.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct For {
    /// Loop variable, in expressions of the body.
    pub var: Arc<str>,
    /// First value.
    pub lo: Dim,
    /// One past the last value; at or below `lo` the body does not run.
    pub hi: Dim,
    /// For each carried tile: its name in the body, and its first value.
    pub carry: Vec<(TileId, TileId)>,
    /// Runs once per value of the variable.
    pub body: Block,
    /// The carried tiles' next values, from the body.
    pub yields: Vec<TileId>,
    /// The carried tiles' last values, outside.
    pub results: Vec<TileId>,
}

/// A branch on a condition that is the same for the whole block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct If {
    /// Left side of the comparison.
    pub lhs: Dim,
    /// The comparison.
    pub compare: Compare,
    /// Right side.
    pub rhs: Dim,
    /// Runs when it holds.
    pub then: Block,
    /// Values of `results` from `then`.
    pub then_yields: Vec<TileId>,
    /// Runs otherwise.
    pub otherwise: Block,
    /// Values of `results` from `otherwise`.
    pub otherwise_yields: Vec<TileId>,
    /// The tiles that the branch defines.
    pub results: Vec<TileId>,
}

/// One step of a block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stmt {
    /// `%result = op`
    Let(TileId, TileOp),
    /// Writes a tile: element `(i0, ...)` to `param[index0 + i0, ...]`; elements outside the shape
    /// are dropped. The tile has the parameter's rank.
    Store {
        /// To where.
        param: ParamId,
        /// Coordinate of the tile's first element.
        index: Vec<Dim>,
        /// What.
        value: TileId,
    },
    /// As a store, adding to what is there, indivisibly.
    AtomicAdd {
        /// To where.
        param: ParamId,
        /// Coordinate of the tile's first element.
        index: Vec<Dim>,
        /// What.
        value: TileId,
    },
    /// A loop.
    For(Box<For>),
    /// A branch.
    If(Box<If>),
}

/// Steps in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Block {
    /// The steps.
    pub stmts: Vec<Stmt>,
}

/// A tile value: its type, and a name for people (may be empty).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TileInfo {
    /// Name as written; printed as `%name` when not empty, and then unique.
    pub name: String,
    /// Element type and shape.
    pub ty: TileType,
}

/// The program of one block of a grid; see the crate's head.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Name, an identifier.
    pub name: String,
    /// Global tensors.
    pub params: IdVec<ParamId, Param>,
    /// Size symbols with ranges: arguments of a launch, in this order.
    pub symbols: Symbols,
    /// Tile sizes, bound by the schedule.
    pub tiles: Vec<Arc<str>>,
    /// What schedules may give them, in the order of the tile sizes.
    pub bounds: Vec<(Arc<str>, Bound)>,
    /// The grid; the last axis runs fastest when a target runs blocks one after another.
    pub grid: Vec<GridAxis>,
    /// All tile values.
    pub values: IdVec<TileId, TileInfo>,
    /// What one block does.
    pub body: Block,
}

impl Kernel {
    /// What a schedule may give this tile size; any positive number when there is nothing.
    pub fn bounds_of(&self, tile: &str) -> impl Iterator<Item = Bound> {
        self.bounds.iter().filter(move |(name, _)| **name == *tile).map(|b| b.1)
    }

    /// The type of a tile value.
    pub fn ty(&self, tile: TileId) -> &TileType {
        &self.values[tile].ty
    }

    /// Whether it multiplies and adds in this type: sums products, as matrix products, convolutions and attention do.
    pub fn multiplies_and_adds(&self, dtype: DType) -> bool {
        self.sums_products(&self.body, dtype)
    }

    fn sums_products(&self, block: &Block, dtype: DType) -> bool {
        block.stmts.iter().any(|stmt| match stmt {
            Stmt::Let(result, TileOp::Mma { .. }) => self.ty(*result).dtype == dtype,
            Stmt::Let(_, TileOp::Map { func, .. }) => func
                .nodes()
                .any(|(_, node, ty)| ty == dtype && matches!(node, Node::Op(ExprOp::Fma, _))),
            Stmt::Let(..) | Stmt::Store { .. } | Stmt::AtomicAdd { .. } => false,
            Stmt::For(f) => self.sums_products(&f.body, dtype),
            Stmt::If(i) => {
                self.sums_products(&i.then, dtype) || self.sums_products(&i.otherwise, dtype)
            }
        })
    }
}
