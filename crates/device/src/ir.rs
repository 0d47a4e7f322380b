//! [`Program`] and its parts.
//!
//! Integers (coordinates, bounds, slots) are [`Dim`]s. Their symbols are, besides the sizes of
//! `Program::symbols`, the names bound by `Let`, `For` and `Role::instance`, and these four, which
//! every program may use:
//!
//! | symbol | value |
//! |---|---|
//! | [`CTA`] | index of this block in its cluster, `0..cluster` |
//! | [`CLUSTER`] | index of this cluster in the grid |
//! | [`CLUSTERS`] | number of clusters in the grid |
//! | [`THREAD`] | thread within the block; only inside `setup` and `teardown` |

use crate::lines::{LineStep, Shelf, ShelfId};
use std::sync::Arc;
use tilewright_base::{DType, IdVec, typed_id};
use tilewright_expr::{Func, Value};
use tilewright_layout::{Dim, Symbols};
use tilewright_tile::{Compare, Param, ParamId, ReduceKind};

/// Index of the block in its cluster.
pub const CTA: &str = "cta";
/// Index of the cluster in the grid.
pub const CLUSTER: &str = "cluster";
/// Number of clusters in the grid.
pub const CLUSTERS: &str = "clusters";
/// Thread within the block.
pub const THREAD: &str = "thread";

typed_id!(
    /// A tensor map (TMA descriptor). Prints as `map0`, or by its name.
    MapId,
    "map"
);
typed_id!(
    /// A shared-memory buffer.
    SmemId,
    "s"
);
typed_id!(
    /// An array of mbarriers.
    BarrierId,
    "bar"
);
typed_id!(
    /// A ring position: which slot, and which pass over the ring.
    RingId,
    "ring"
);
typed_id!(
    /// A tile in registers.
    FragId,
    "f"
);

/// What a program is compiled for. Orders by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// Ampere: `cp.async`, `mma.sync`.
    Sm80,
    /// Ada: as Ampere, and FP8 `mma.sync`.
    Sm89,
    /// Hopper with the architecture-specific instructions: TMA, `wgmma`, clusters.
    Sm90a,
}

impl Arch {
    /// The newest form that a device of this compute capability (times ten: 86) runs. Instructions of `sm_90a` are
    /// those of 9.0 alone: later devices take the portable form.
    pub fn of_capability(capability: u32) -> Arch {
        match capability {
            90 => Arch::Sm90a,
            89.. => Arch::Sm89,
            _ => Arch::Sm80,
        }
    }

    /// As compilers spell it: `sm_90a`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
        }
    }

    /// Shared memory that one block may use, in bytes (CUDA C++ Programming Guide, table of
    /// technical specifications per compute capability).
    pub fn smem_bytes(self) -> u32 {
        match self {
            Arch::Sm80 => 163 << 10,
            Arch::Sm89 => 99 << 10,
            Arch::Sm90a => 227 << 10,
        }
    }
}

/// How 16-byte units are permuted within shared memory so that neither the copy engine, the
/// tensor cores nor vector accesses meet bank conflicts. The span is also the extent of the
/// contiguous axis of one copy box, in bytes. (PTX ISA, "Tensor swizzling modes".)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Swizzle {
    /// Row after row, as they come.
    None,
    /// Spans of 32 bytes.
    B32,
    /// Spans of 64 bytes.
    B64,
    /// Spans of 128 bytes.
    B128,
}

impl Swizzle {
    /// Bytes of a span; 16 for none.
    pub fn span_bytes(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }
}

/// A tensor map: how the copy engine cuts boxes out of a global tensor. Coordinates of loads and
/// stores are logical, one per axis of the parameter; what lies outside reads zero and is not
/// written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorMap {
    /// For people.
    pub name: String,
    /// The tensor.
    pub param: ParamId,
    /// Extent of the box along each axis of the parameter. Along the contiguous axis it is at most
    /// one swizzle span; larger tiles take several boxes.
    pub box_shape: Vec<u32>,
    /// The axis of the parameter whose neighbours are neighbours in memory.
    pub contiguous: usize,
    /// How boxes lie in shared memory.
    pub swizzle: Swizzle,
    /// Loads round f32 to TF32 (nearest), since the tensor cores drop the low bits.
    pub tf32: bool,
    /// The tensor is a list of pixels, and boxes are positions of a window.
    pub windows: Option<Windows>,
}

/// Windows over images, for convolutions: the tensor `[images * height * width, channels]` is read as if it
/// were the matrix with a line per output and tap, without making it.
///
/// A load from such a map has two coordinates more, the tap's distances `(down, right)` from the window's first
/// pixel. Line `i` of the box at `pixel` is output `pixel + i`, counted over images, rows and columns of outputs:
///
/// ```text
/// image = output / (rows * cols)
/// y = output / cols % rows * step_y + down - before_y      x = output % cols * step_x + right - before_x
/// ```
///
/// It holds pixel `(image * height + y) * width + x`, and zeros where `y` or `x` lies outside the image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Windows {
    /// Height and width of an image.
    pub size: [Dim; 2],
    /// Rows and columns of outputs.
    pub outputs: [Dim; 2],
    /// Distance between neighbouring windows, 1 to 8.
    pub steps: [i64; 2],
    /// Rows and columns of zeros before the image.
    pub before: [i64; 2],
}

impl Windows {
    /// The line of the tensor that output number `output` sees at `tap`; `None` outside the image. `size` and
    /// `outputs` are the numbers of those fields.
    pub fn line(
        &self,
        size: [i64; 2],
        outputs: [i64; 2],
        output: i64,
        tap: [i64; 2],
    ) -> Option<i64> {
        let [rows, cols] = outputs.map(|n| n.max(1));
        let image = output.div_euclid(rows * cols);
        let at = [output.div_euclid(cols).rem_euclid(rows), output.rem_euclid(cols)];
        let [y, x] = [0, 1].map(|i| at[i] * self.steps[i] + tap[i] - self.before[i]);
        let inside = (0..size[0]).contains(&y) && (0..size[1]).contains(&x);
        inside.then(|| (image * size[0] + y) * size[1] + x)
    }
}

/// A buffer of `slots` tiles `[rows, cols]` in shared memory. A tile is stored as panels: the
/// contiguous axis is cut into spans of the swizzle, and each panel holds one span of every line
/// of the other axis. Prints as `bf16[128,64] cols-contiguous x4 swizzle 128`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Smem {
    /// For people.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extent of axis 0.
    pub rows: u32,
    /// Extent of axis 1.
    pub cols: u32,
    /// The axis whose neighbours are neighbours in memory: 1 is row-major.
    pub contiguous: usize,
    /// How panels are permuted.
    pub swizzle: Swizzle,
    /// How many tiles.
    pub slots: u32,
}

impl Smem {
    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> u32 {
        (u64::from(self.rows) * u64::from(self.cols) * self.dtype.bits() as u64 / 8) as u32
    }
}

/// `slots` mbarriers. A phase completes when `arrivals` arrivals and all announced bytes came.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Barrier {
    /// For people.
    pub name: String,
    /// How many.
    pub slots: u32,
    /// Arrivals per phase, from all blocks of the cluster.
    pub arrivals: u32,
}

/// A position in a ring of stages: a slot `0..stages` and a phase bit that flips on each pass.
/// Every instance of a role has its own, starting at slot 0, phase 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ring {
    /// For people.
    pub name: String,
    /// Slots.
    pub stages: u32,
}

/// How a fragment is spread over the threads of a role's instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spread {
    /// Accumulators of `wgmma` over the 4 warps of a warpgroup; `rows` is a multiple of 64.
    /// (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16".)
    Wgmma,
    /// Accumulators of `mma.sync.m16n8`, over `warps_m x warps_n` warps, which take turns along both
    /// axes in slabs of 16: each warp holds `[rows / warps_m, cols / warps_n]`, and any range of
    /// `16 * warps_n` columns is spread as a tile of its own.
    MmaSync {
        /// Warps along rows.
        warps_m: u32,
        /// Warps along columns.
        warps_n: u32,
    },
    /// Plain threads: `lanes` neighbouring threads share a row, each holding vectors of `vector`
    /// elements that repeat every `lanes * vector` columns; rows go round the other threads.
    Lines {
        /// Threads along a row; a power of two.
        lanes: u32,
        /// Neighbouring elements per thread.
        vector: u32,
        /// Threads of the instance.
        threads: u32,
    },
    /// Outer-product accumulators for plain multiply-adds: `[rows, cols]` over a grid of
    /// `threads_m x threads_n` threads, each with blocks of `block_m x block_n` that repeat every
    /// `threads_m * block_m` rows and `threads_n * block_n` columns. A warp is 8 x 4 threads of the
    /// grid. Blocks of 4 suit an operand that is contiguous along the axis, 1 one that is
    /// contiguous along the depth.
    Outer {
        /// Threads along rows; a multiple of 8.
        threads_m: u32,
        /// Threads along columns; a multiple of 4.
        threads_n: u32,
        /// Neighbouring rows of a thread: 1 or 4.
        block_m: u32,
        /// Neighbouring columns of a thread: 1 or 4.
        block_n: u32,
    },
}

/// Which axes of the spread tile a fragment has. A vector is held by every thread that holds an
/// element of its row or column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extent {
    /// The tile `[rows, cols]`.
    Tile,
    /// One value per row: `[rows]`.
    PerRow,
    /// One value per column: `[cols]`.
    PerCol,
}

/// A tile in the registers of a role's instance.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frag {
    /// For people.
    pub name: String,
    /// Element type. Narrow floats are held in 32 bits unless they feed `wgmma`.
    pub dtype: DType,
    /// Rows of the spread tile.
    pub rows: u32,
    /// Columns of the spread tile.
    pub cols: u32,
    /// Over which threads.
    pub spread: Spread,
    /// Tile or vector.
    pub extent: Extent,
}

/// Where an instance stands in a buffer or barrier array.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The slot of a ring position.
    Ring(RingId),
    /// The slot before a ring position (the last one released late).
    Before(RingId),
    /// A computed slot.
    At(Dim),
}

/// One mbarrier.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BarrierRef {
    /// The array.
    pub barrier: BarrierId,
    /// Which of it.
    pub slot: Slot,
}

/// Which phase a wait is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The phase bit of a ring position: waits for what fills the slot on this pass.
    Of(RingId),
    /// The opposite bit: waits for the pass before; returns at once on the first pass.
    Before(RingId),
    /// A computed parity (0 or 1).
    Parity(Dim),
}

/// Part of a tile in shared memory: `[row, col] + [rows, cols]` of one slot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SmemTile {
    /// The buffer.
    pub smem: SmemId,
    /// Which slot.
    pub slot: Slot,
    /// First row.
    pub row: Dim,
    /// First column.
    pub col: Dim,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
}

/// A fragment, or a range of its columns. `col` must become a number when enclosing [`Stmt::Unroll`]
/// variables are put in, since registers have no addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FragRef {
    /// The fragment.
    pub frag: FragId,
    /// First column.
    pub col: Dim,
    /// Columns; all from `col` on when `None`.
    pub cols: Option<u32>,
}

/// Left operand of a product on tensor cores.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WgmmaA {
    /// From shared memory.
    Smem(SmemTile),
    /// From registers: a fragment in the accumulators' spread, of 16 bits for `wgmma`, of 16 or 32 bits for `mma.sync` of
    /// warps along rows.
    Frag(FragRef),
}

/// A condition that is the same for all threads of an instance: `lhs compare rhs`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cond {
    /// Left side.
    pub lhs: Dim,
    /// The comparison.
    pub compare: Compare,
    /// Right side.
    pub rhs: Dim,
}

/// What the second-level cache does with data that a copy brings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CachePolicy {
    /// As for any access.
    #[default]
    Normal,
    /// They are read once: others stay.
    EvictFirst,
    /// They are read again later: others go first.
    EvictLast,
}

/// How streams, which the device reads and no block reads again, go through the caches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Streams {
    /// As any access.
    #[default]
    Cached,
    /// By the first-level cache.
    Past,
    /// With lines of the second-level cache that go last.
    Last,
}

/// Which blocks of the cluster something reaches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// This block.
    Own,
    /// The block with this index in the cluster.
    Cta(Dim),
    /// Every block of the cluster (a multicast load: same offset in each one's shared memory, and
    /// each one's barrier gets the bytes).
    All,
    /// The blocks in this one's row, where the cluster is a matrix with rows of so many blocks, numbered row by row.
    Row(u32),
    /// The blocks in this one's column of such a matrix.
    Column(u32),
    /// Both, this block once.
    Cross(u32),
}

impl Reach {
    /// How many blocks of a cluster it reaches.
    pub fn blocks(&self, cluster: u32) -> u32 {
        match self {
            Reach::Own | Reach::Cta(_) => 1,
            Reach::All => cluster,
            Reach::Row(width) => *width,
            Reach::Column(width) => cluster / (*width).max(1),
            Reach::Cross(width) => width + cluster / (*width).max(1) - 1,
        }
    }

    /// Whether it reaches block `other` from block `own`; that of a [`Reach::Cta`] is not known here.
    pub fn takes_in(&self, own: u32, other: u32) -> bool {
        let row = |width: u32| own / width.max(1) == other / width.max(1);
        let column = |width: u32| own % width.max(1) == other % width.max(1);
        match self {
            Reach::Own => own == other,
            Reach::Cta(_) => false,
            Reach::All => true,
            Reach::Row(width) => row(*width),
            Reach::Column(width) => column(*width),
            Reach::Cross(width) => row(*width) || column(*width),
        }
    }
}

/// One step. "Instance" is the group of threads that runs the role: every thread executes the step,
/// unless [`Stmt::Once`] or a single-threaded role says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stmt {
    /// Names an integer for the rest of the block.
    Let {
        /// The name.
        name: Arc<str>,
        /// Its value.
        value: Dim,
    },
    /// A counted loop: `var` from `lo` while below `hi`.
    For {
        /// Loop variable.
        var: Arc<str>,
        /// First value.
        lo: Dim,
        /// One past the last value.
        hi: Dim,
        /// Distance between values; positive.
        step: Dim,
        /// The steps.
        body: Vec<Stmt>,
    },
    /// As a loop over `0..count` that is always unrolled, so that its variable is a number.
    Unroll {
        /// Loop variable.
        var: Arc<str>,
        /// Repetitions.
        count: u32,
        /// The steps.
        body: Vec<Stmt>,
    },
    /// A branch.
    If {
        /// When.
        cond: Cond,
        /// Runs when it holds.
        then: Vec<Stmt>,
        /// Runs otherwise.
        otherwise: Vec<Stmt>,
    },
    /// One thread of the instance, always the same one, runs the body.
    Once(Vec<Stmt>),

    // Barriers.
    /// Initialises every barrier of the block; by one thread.
    BarrierInit,
    /// Makes initialised barriers visible to the cluster and to the copy engine.
    FenceBarrierInit,
    /// All threads of the block meet.
    SyncBlock,
    /// All threads of the cluster meet.
    SyncCluster,
    /// `threads` threads meet at hardware barrier `id` (1..=15).
    NamedSync {
        /// Which one.
        id: Dim,
        /// How many threads take part, those that only arrive included.
        threads: u32,
    },
    /// Arrives at a hardware barrier without waiting.
    NamedArrive {
        /// Which one.
        id: Dim,
        /// How many threads take part.
        threads: u32,
    },
    /// Waits for a phase of an mbarrier to complete; what its arrivals had done is then visible.
    Wait {
        /// The barrier.
        barrier: BarrierRef,
        /// The phase.
        phase: Phase,
    },
    /// Arrives once (one thread does it, after all threads of each warp came here; with warps not
    /// ordered among each other: put a `NamedSync` before, or count one arrival per warp).
    Arrive {
        /// The barrier.
        barrier: BarrierRef,
        /// Whose.
        reach: Reach,
    },
    /// Arrives once and announces bytes that the copy engine will deliver.
    ExpectBytes {
        /// The barrier.
        barrier: BarrierRef,
        /// How many, from all copies of this phase into this block.
        bytes: u32,
    },
    /// Moves a ring position forward.
    Advance {
        /// Which.
        ring: RingId,
        /// By how many stages.
        by: Dim,
    },

    // The copy engine.
    /// Starts copying a box into shared memory; completion adds its bytes to the barrier.
    TmaLoad {
        /// The tensor.
        map: MapId,
        /// Coordinate of the box's first element, one per axis of the parameter.
        at: Vec<Dim>,
        /// Where to: exactly one box.
        to: SmemTile,
        /// Whose bytes.
        barrier: BarrierRef,
        /// `Own` or `All`.
        reach: Reach,
        /// How long the second-level cache should keep the data.
        cache: CachePolicy,
    },
    /// Starts copying a box from shared memory.
    TmaStore {
        /// The tensor.
        map: MapId,
        /// Coordinate of the box's first element.
        at: Vec<Dim>,
        /// From where: exactly one box.
        from: SmemTile,
        /// Adds to what is there instead of replacing it.
        add: bool,
    },
    /// Closes a group of stores of this thread.
    TmaCommit,
    /// Waits until at most `pending` of this thread's groups are open.
    TmaWait {
        /// How many may be open.
        pending: u32,
        /// Only that shared memory was read; the writes may still be under way.
        reads_only: bool,
    },
    /// Orders this thread's earlier plain accesses to shared memory before later ones of the copy
    /// engine and the tensor cores (`fence.proxy.async`).
    FenceAsync,

    // Plain copies into shared memory, for tensors that the copy engine cannot address.
    /// Every thread copies its share of a box with ordinary or `cp.async` loads; `zero` outside the
    /// tensor. Plain (generic proxy) writes: complete at `CopyWait` (or at once when not async).
    CopyIn {
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element.
        at: Vec<Dim>,
        /// Which two axes of the tensor are the tile's rows and columns.
        axes: (usize, usize),
        /// Where to.
        to: SmemTile,
        /// Elements per access that the tensor's alignment allows.
        vector: u32,
        /// Lines may end within an access.
        ends: bool,
    },
    /// Closes a group of this thread's asynchronous plain copies.
    CopyCommit,
    /// Waits until at most `pending` of this thread's copy groups are open.
    CopyWait {
        /// How many may be open.
        pending: u32,
    },

    // Tensor cores.
    /// Orders this instance's earlier register accesses before later `wgmma`.
    WgmmaFence,
    /// `acc += a * b` over the tile's whole depth, asynchronously. `a` is `[rows, k]`, `b` is
    /// `[k, cols]` in logical terms: a `SmemTile` of B has `k` rows unless it is `turned`.
    Wgmma {
        /// Accumulators.
        acc: FragRef,
        /// Left operand.
        a: WgmmaA,
        /// Right operand.
        b: SmemTile,
        /// The tile of `b` is `[cols, k]`: the product takes its transpose.
        turned: bool,
        /// Starts from zero when this holds; `None` always adds.
        zero_if: Option<Cond>,
    },
    /// Closes a group of `wgmma`.
    WgmmaCommit,
    /// Waits until at most `pending` groups are open.
    WgmmaWait {
        /// How many may be open.
        pending: u32,
    },
    /// `acc += a * b` with `mma.sync` (operands through `ldmatrix`) or plain multiply-adds,
    /// according to the accumulators' spread. Synchronous.
    Mma {
        /// Accumulators.
        acc: FragRef,
        /// Left operand, `[rows, k]`.
        a: WgmmaA,
        /// Right operand, `[k, cols]`.
        b: SmemTile,
        /// f32 operands are taken as two TF32 numbers each, and their products as three: sums of about f32's exactness
        /// on tensor cores.
        split: bool,
    },

    // Registers.
    /// Every element becomes `value`.
    Fill {
        /// What is written.
        dst: FragRef,
        /// The value.
        value: Value,
    },
    /// `dst = func(args...)`, elementwise; vectors repeat along the axis that they lack.
    Map {
        /// What is written.
        dst: FragRef,
        /// Computed for each element.
        func: Func,
        /// Operands of the same spread.
        args: Vec<FragRef>,
    },
    /// Element `(i, j)` becomes `start + i` or `start + j`.
    Iota {
        /// What is written.
        dst: FragRef,
        /// Along rows (0) or columns (1).
        axis: usize,
        /// The first value.
        start: Dim,
    },
    /// Combines along columns into a per-row fragment, or along rows into a per-column one; across
    /// all threads that share the row or column.
    Reduce {
        /// What is written.
        dst: FragRef,
        /// How.
        kind: ReduceKind,
        /// Operand.
        src: FragRef,
        /// Combine with what `dst` holds.
        accumulate: bool,
    },
    /// Reads global memory, `fill` outside. The fragment's rows and columns run along `axes` of
    /// the tensor.
    Load {
        /// What is written.
        dst: FragRef,
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element, one per axis of the tensor.
        at: Vec<Dim>,
        /// Axes of the tensor along which rows and columns run (`None`: the fragment has no such
        /// axis, or it is not an axis of the tensor).
        axes: (Option<usize>, Option<usize>),
        /// What lies outside.
        fill: Value,
        /// Neighbouring columns that one access may take.
        vector: u32,
    },
    /// Writes global memory; what lies outside is dropped.
    Store {
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element.
        at: Vec<Dim>,
        /// Axes of the tensor along which rows and columns run.
        axes: (Option<usize>, Option<usize>),
        /// What.
        src: FragRef,
        /// Neighbouring columns that one access may take.
        vector: u32,
    },
    /// Writes registers to shared memory (`stmatrix` where it fits).
    ToSmem {
        /// Where to.
        to: SmemTile,
        /// What; converted to the buffer's type.
        src: FragRef,
    },
    /// Reads shared memory into registers.
    FromSmem {
        /// What is written.
        dst: FragRef,
        /// From where.
        from: SmemTile,
    },

    /// A step of threads that are spread in lines.
    Line(LineStep),

    // Dependent launches.
    /// Waits until the kernels before this one in the stream have finished writing
    /// (`griddepcontrol.wait`).
    GridWait,
    /// Lets the next kernel in the stream start (`griddepcontrol.launch_dependents`).
    GridRelease,
}

/// A group of warps that runs its own code.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Role {
    /// For people: `producer`, `consumer`.
    pub name: String,
    /// First warp of the block.
    pub first_warp: u32,
    /// Warps of one instance: 4 is a warpgroup.
    pub warps: u32,
    /// How many instances, one after another.
    pub instances: u32,
    /// Symbol for the index of the instance.
    pub instance: Arc<str>,
    /// Only one thread of each instance runs the body.
    pub single_thread: bool,
    /// Registers per thread, set with `setmaxnreg` for the whole warpgroups of the role.
    pub registers: Option<u32>,
    /// What it does.
    pub body: Vec<Stmt>,
}

/// Sizes whose names begin so are numbers in memory of the device: a launch passes the address of an `i32`, and the
/// kernel reads it when it starts. One recorded graph then serves every value. Grids and the extents of tensors must
/// not depend on such a size, and no kernel may write it that the reading one can overlap with.
pub const LIVE: &str = "live_";

/// Whether a size is read from memory; see [`LIVE`].
pub fn is_live(size: &str) -> bool {
    size.starts_with(LIVE)
}

/// A scheduled kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// Name, an identifier.
    pub name: String,
    /// For what.
    pub arch: Arch,
    /// Global tensors, as the tile program's.
    pub params: IdVec<ParamId, Param>,
    /// Sizes: arguments of a launch, in this order.
    pub symbols: Symbols,
    /// Tensor maps, made by the host from the parameters' sizes.
    pub maps: IdVec<MapId, TensorMap>,
    /// Blocks per cluster.
    pub cluster: u32,
    /// Threads per block.
    pub threads: u32,
    /// Work items (tiles): the grid is `min(items, what fits)` clusters when `persistent`, else
    /// one cluster per item.
    pub items: Dim,
    /// Whether clusters loop over items.
    pub persistent: bool,
    /// Blocks per multiprocessor that registers are limited for (`__launch_bounds__`).
    pub blocks_per_sm: u32,
    /// How streams go through the caches.
    pub streams: Streams,
    /// Lines begin and end within accesses of several elements: fragments in lines take what is there one by one.
    pub ragged: bool,
    /// Shared memory.
    pub smem: IdVec<SmemId, Smem>,
    /// Barriers.
    pub barriers: IdVec<BarrierId, Barrier>,
    /// Ring positions; each instance that uses one has its own.
    pub rings: IdVec<RingId, Ring>,
    /// Register tiles; each instance that uses one has its own.
    pub frags: IdVec<FragId, Frag>,
    /// Tiles that threads keep for themselves in shared memory.
    pub shelves: IdVec<ShelfId, Shelf>,
    /// Runs first, by all threads.
    pub setup: Vec<Stmt>,
    /// Run side by side.
    pub roles: Vec<Role>,
    /// Runs last, by all threads.
    pub teardown: Vec<Stmt>,
}

impl Program {
    /// Bytes of shared memory for tiles, each slot aligned to 1024, barriers, and shelves.
    pub fn smem_bytes(&self) -> u32 {
        let tiles: u32 =
            self.smem.iter().map(|(_, s)| s.slot_bytes().next_multiple_of(1024) * s.slots).sum();
        let barriers: u32 = self.barriers.iter().map(|(_, b)| b.slots * 8).sum();
        let start = tiles + barriers.next_multiple_of(16);
        self.shelves.iter().fold(start, |at, (_, s)| at.saturating_add(s.bytes()))
    }

    /// Blocks of a launch: `items` as the sizes give it, `clusters_at_once` what the device holds.
    pub fn grid_blocks(&self, items: u64, clusters_at_once: u64) -> u64 {
        let clusters = if self.persistent { items.min(clusters_at_once.max(1)) } else { items };
        clusters * u64::from(self.cluster)
    }
}
