//! The step of a decoder that takes one token per sequence: few kernels, each at the pace of memory.
//!
//! ```text
//! embed        x = table[token]
//! per layer:
//!   qkv        norm, one product with Wq Wk Wv, rotation; keys and values go to the cache
//!   heads      where each head has a norm: that, and then rotation and the cache
//!   parts      attention over a part of the cache: maximum, sum, weighted values
//!   combine    the parts of a head, in their order
//!   o          product, + x
//!   gate_up    norm, two products, act(gate) * up; or `up`: one product, act(up)
//!   down       product, + x
//! head         rms norm, product with the vocabulary
//! pieces, pick the best token, or draw: one by its probability
//! ```
//!
//! How many positions the cache holds is a number in memory ([`AT`]), not a size of the launch: one recorded graph
//! serves every step. Tensors between the kernels are f32; weights and the cache keep the type in which they are stored.
//!
//! Rows are `sequences x new` tokens: `new` neighbouring positions of each sequence, all taken in one step, so that the
//! same kernels read a prompt. A weight is read once for all rows.

mod attention;
mod draw;
mod heads;
mod keep;
mod product;
mod sample;

pub use attention::AttentionParts;
pub use draw::{Draw, DrawPlace, DrawStep};
pub use heads::head_norms;
pub use keep::keep;
pub use product::{Ending, Form, Norm, VectorProduct};
pub use sample::{advance, embed, pick, pieces};

use tilewright_base::{DType, Result};
use tilewright_device::{Arch, Streams};
use tilewright_expr::Func;
use tilewright_layout::{Dim, Range, Symbol};
use tilewright_lower_gpu::{GpuSchedule, LinesKnobs};
use tilewright_tile::{Kernel, KernelBuilder, Operand, TileId};

/// The size that holds the number of positions in the cache before the step.
pub const AT: &str = "live_at";
/// Rows that a step takes at most: each has its own sums in registers.
pub const MOST_ROWS: i64 = 8;

/// Rows of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Sequences.
    pub batch: i64,
    /// Tokens that each of them gets.
    pub new: i64,
    /// Positions for which there is memory.
    pub positions: i64,
}

impl Rows {
    /// Their number.
    pub fn count(&self) -> i64 {
        self.batch * self.new
    }

    /// The sequence of a row, and its position.
    fn place(&self, row: &Dim) -> (Dim, Dim) {
        let new = Dim::new(self.new);
        (row.floor_div(&new), Dim::sym(AT) + &row.modulo(&new))
    }

    fn declare(&self, k: &mut KernelBuilder) {
        let range = Range { min: 0, max: self.positions };
        k.symbol(Symbol { name: AT.into(), range });
    }
}

/// A kernel with its schedule.
#[derive(Clone, Debug)]
pub struct Scheduled {
    /// What one block computes.
    pub kernel: Kernel,
    /// How.
    pub schedule: GpuSchedule,
}

/// A schedule of lines: `dependent` kernels start beside the tail of the one before. Lines of the tensors have `line`
/// elements, or multiples of that: accesses are not wider than that allows.
fn schedule(
    arch: Arch,
    tiles: &[(&str, i64)],
    (threads, lanes, vector): (i64, i64, i64),
    line: i64,
    dependent: bool,
) -> GpuSchedule {
    let mut s = GpuSchedule::hopper(tiles);
    s.arch = arch;
    s.persistent = false;
    s.dependent = dependent && arch >= Arch::Sm90a;
    s.vector = vector.min(1 << line.max(1).trailing_zeros().min(8)) as u32;
    s.lines = LinesKnobs {
        threads: threads as u32,
        lanes: lanes as u32,
        vector: vector as u32,
        early: false,
        ahead: s.dependent,
        streams: Streams::Past,
        ..LinesKnobs::default()
    };
    s.blocks_per_sm = 1;
    s
}

/// A function from its text.
fn text(text: &str, types: &[DType]) -> Result<Func> {
    Func::parse(text, types)
}

/// The activation of a gate from its text, from f32 to f32.
///
/// # Errors
/// The text's.
pub fn activation(text: &str) -> Result<Func> {
    Func::parse(text, &[DType::F32])
}

/// A tile along one axis of the result.
fn along(tile: TileId, axis: usize) -> Operand {
    Operand { tile, along: vec![axis] }
}

/// A scalar as an operand.
fn scalar(tile: TileId) -> Operand {
    Operand { tile, along: vec![] }
}

fn power_of_two(x: i64) -> i64 {
    (x.max(1) as u64).next_power_of_two() as i64
}
