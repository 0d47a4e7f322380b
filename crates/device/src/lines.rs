//! [`LineStep`]: steps that only threads spread in lines take ([`Spread::Lines`](crate::Spread::Lines)).
//!
//! They are one variant of [`Stmt`](crate::Stmt), because nothing but programs without products has them.
//! What one of them needs of shared memory belongs to the step: the printer declares it.

use crate::ir::{FragRef, Spread};
use tilewright_base::{DType, typed_id};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{ParamId, ReduceKind};

typed_id!(
    /// A shelf.
    ShelfId,
    "shelf"
);

/// `slots` tiles `[rows, cols]` in shared memory, of which every thread has for itself what it would have in
/// registers: nobody else reads it, so threads need not meet, and slots are numbered at run time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shelf {
    /// For people.
    pub name: String,
    /// Element type, as in global memory.
    pub dtype: DType,
    /// Rows of a tile.
    pub rows: u32,
    /// Columns of a tile.
    pub cols: u32,
    /// Over which threads: lines.
    pub spread: Spread,
    /// Neighbouring columns that are moved together; divides the spread's.
    pub vector: u32,
    /// How many tiles.
    pub slots: u32,
}

impl Shelf {
    /// Bytes of all slots.
    pub fn bytes(&self) -> u32 {
        let bits = u64::from(self.rows) * u64::from(self.cols) * self.dtype.bits() as u64;
        u32::try_from(bits / 8 * u64::from(self.slots)).unwrap_or(u32::MAX).next_multiple_of(16)
    }
}

/// A tile of a shelf.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ShelfRef {
    /// The shelf.
    pub shelf: ShelfId,
    /// Which slot.
    pub slot: Dim,
}

/// A step on fragments in lines; every thread of the role's instance takes part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LineStep {
    /// As [`Stmt::Load`](crate::Stmt::Load), but neighbouring rows and columns are `steps` coordinates
    /// apart, and along one axis a coordinate may be data.
    Pick {
        /// What is written.
        dst: FragRef,
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element, one per axis of the tensor.
        at: Vec<Dim>,
        /// Axes of the tensor along which rows and columns run.
        axes: (Option<usize>, Option<usize>),
        /// Coordinates between neighbouring rows and columns.
        steps: (i64, i64),
        /// An axis, which neither rows nor columns run along, and what is added to `at` there: integers.
        rows: Option<(usize, FragRef)>,
        /// What lies outside.
        fill: Value,
        /// Neighbouring columns that one access may take; 1 unless the step is 1.
        vector: u32,
    },
    /// As [`Stmt::Load`](crate::Stmt::Load) into a tile, for a tensor whose neighbours are neighbouring
    /// rows: runs of rows are read, and turned in shared memory. All threads of the block meet.
    Turn {
        /// What is written: a tile.
        dst: FragRef,
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element, one per axis of the tensor.
        at: Vec<Dim>,
        /// Axes of the tensor along which rows and columns run.
        axes: (usize, usize),
        /// What lies outside.
        fill: Value,
        /// Neighbouring rows that one access takes.
        vector: u32,
    },
    /// Starts a [`Stmt::Load`](crate::Stmt::Load) of a tile into a slot of a shelf. Its group (`CopyCommit`) must be
    /// complete (`CopyWait`) before the slot is recalled.
    Fetch {
        /// What is written.
        to: ShelfRef,
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element, one per axis of the tensor.
        at: Vec<Dim>,
        /// Axes of the tensor along which rows and columns run.
        axes: (Option<usize>, Option<usize>),
        /// What lies outside.
        fill: Value,
    },
    /// A tile of a shelf into registers.
    Recall {
        /// What is written: a tile.
        dst: FragRef,
        /// What is read.
        from: ShelfRef,
    },
    /// A tile of bf16 as it is, from two elements a register: until here nothing else holds them.
    Unpack {
        /// What is written: a tile.
        dst: FragRef,
        /// A tile.
        src: FragRef,
    },
    /// Position (`i64`) of the first (or last) extreme element of each row among the first `limit`; NaN is
    /// extreme, and of no elements it is 0.
    ArgReduce {
        /// What is written: one position per row.
        dst: FragRef,
        /// `Max` or `Min`.
        kind: ReduceKind,
        /// A tile.
        src: FragRef,
        /// How many columns count.
        limit: Dim,
        /// The last among equals instead of the first.
        last: bool,
    },
    /// Running combination along columns.
    Scan {
        /// What is written: a tile.
        dst: FragRef,
        /// How.
        kind: ReduceKind,
        /// A tile.
        src: FragRef,
        /// Leave out the element itself.
        exclusive: bool,
        /// From the end.
        reverse: bool,
    },
    /// Uniform numbers in [0, 1): Philox4x32-10 of `seed` at counter `start + row * steps.0 + col * steps.1`.
    Random {
        /// What is written.
        dst: FragRef,
        /// The key.
        seed: u64,
        /// Counter of the first element.
        start: Dim,
        /// Counters between neighbouring rows and columns.
        steps: (i64, i64),
    },
    /// Adds to global memory, indivisibly; what lies outside is dropped. Each element of the fragment is added
    /// once, though several threads may hold it.
    Add {
        /// The tensor.
        param: ParamId,
        /// Coordinate of the first element, one per axis of the tensor.
        at: Vec<Dim>,
        /// Axes of the tensor along which rows and columns run.
        axes: (Option<usize>, Option<usize>),
        /// What.
        src: FragRef,
    },
    /// Asks for lines of a tensor to be brought into the second-level cache: `rows` of them from `at` on along an axis, each
    /// from its beginning. Nothing waits for it and nothing is read, so it may stand before the grid wait.
    Prefetch {
        /// The tensor; its last axis is contiguous.
        param: ParamId,
        /// Coordinate of the first line, one per axis of the tensor; 0 along the last.
        at: Vec<Dim>,
        /// Along which axis the lines follow each other.
        row: usize,
        /// How many.
        rows: u32,
        /// Of each, a multiple of 16, and not more than it has.
        bytes: u32,
    },
    /// Products of 8-bit integers, summed by fours: of every four neighbouring columns the first of `acc` grows by the four
    /// products of `a` and `b`, and the others stay as they are. For sums that are combined in the end.
    Dot {
        /// What grows: a tile of i32.
        acc: FragRef,
        /// 8-bit integers: a tile, or one value per column.
        a: FragRef,
        /// The same.
        b: FragRef,
    },
    /// The largest or smallest elements of rows, as [`TopK`](tilewright_tile::TopK) says: one row each of `lanes` threads.
    /// All threads of the block meet when these are more than a warp.
    TopK {
        /// The rows: axes 0 and 1.
        x: ParamId,
        /// Values.
        values: ParamId,
        /// Positions.
        places: ParamId,
        /// First row of the block.
        row: Dim,
        /// How many are found.
        count: u32,
        /// The largest, not the smallest.
        largest: bool,
        /// Threads of a row: a warp, or the whole block.
        lanes: u32,
        /// Neighbouring columns that one access takes.
        vector: u32,
    },
    /// Combines what the blocks of the cluster hold, in the order of their indices; all of them get the
    /// result. All threads of the cluster meet.
    AcrossCluster {
        /// One value per row or per column.
        frag: FragRef,
        /// How.
        kind: ReduceKind,
    },
}

impl LineStep {
    /// Fragments that the step writes.
    pub fn writes(&self) -> Option<&FragRef> {
        match self {
            LineStep::Pick { dst, .. }
            | LineStep::Turn { dst, .. }
            | LineStep::Recall { dst, .. }
            | LineStep::Unpack { dst, .. }
            | LineStep::ArgReduce { dst, .. }
            | LineStep::Scan { dst, .. }
            | LineStep::Random { dst, .. } => Some(dst),
            LineStep::AcrossCluster { frag, .. } => Some(frag),
            LineStep::Dot { acc, .. } => Some(acc),
            LineStep::Add { .. }
            | LineStep::Fetch { .. }
            | LineStep::Prefetch { .. }
            | LineStep::TopK { .. } => None,
        }
    }

    /// Fragments that the step reads.
    pub fn reads(&self) -> Vec<&FragRef> {
        match self {
            LineStep::Pick { rows, .. } => rows.iter().map(|(_, frag)| frag).collect(),
            LineStep::ArgReduce { src, .. }
            | LineStep::Scan { src, .. }
            | LineStep::Unpack { src, .. }
            | LineStep::Add { src, .. } => vec![src],
            LineStep::AcrossCluster { frag, .. } => vec![frag],
            LineStep::Dot { acc, a, b } => vec![acc, a, b],
            LineStep::Turn { .. }
            | LineStep::Random { .. }
            | LineStep::Prefetch { .. }
            | LineStep::Fetch { .. }
            | LineStep::TopK { .. }
            | LineStep::Recall { .. } => Vec::new(),
        }
    }
}

/// What a reduction of nothing gives.
pub fn identity(kind: ReduceKind, dtype: DType) -> Value {
    let (bits, signed) = (dtype.bits(), dtype.is_signed_int());
    let low = if signed { i64::MIN >> (64 - bits) } else { 0 };
    let high = match (signed, dtype) {
        (true, _) => i64::MAX >> (64 - bits),
        (false, DType::Bool) => 1,
        // The bits of the largest number; `u64` wraps into the sign.
        (false, DType::U64) => -1,
        (false, _) => (1 << bits) - 1,
    };
    match (kind, dtype.is_float()) {
        (ReduceKind::Sum, true) => Value::Float(0.0),
        (ReduceKind::Prod, true) => Value::Float(1.0),
        (ReduceKind::Max, true) => Value::Float(f64::NEG_INFINITY),
        (ReduceKind::Min, true) => Value::Float(f64::INFINITY),
        (ReduceKind::Sum, false) => Value::Int(0),
        (ReduceKind::Prod, false) => Value::Int(1),
        (ReduceKind::Max, false) => Value::Int(low),
        (ReduceKind::Min, false) => Value::Int(high),
    }
}
