//! [`Attention`]: an attention inside a plan, with its sizes and strides over the plan's symbols.
//!
//! ```text
//! O[b,h,i,:] = sum over j of softmax_j(scale * Q[b,h,i,:] . K[b,g,j,:] + mask[b,h,i,j]) * V[b,g,j,:]
//! ```
//!
//! `g` is the group of heads that `h` belongs to. Under `causal`, query `i` sees keys up to `i + keys - queries`.

use tilewright_base::DType;
use tilewright_layout::Dim;

/// A tensor `[batch, head, row, column]` in the memory of a parameter; columns are neighbours in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Heads {
    /// Which parameter of the kernel.
    pub param: usize,
    /// Type of its elements.
    pub dtype: DType,
    /// Where the first element is, in elements.
    pub offset: Dim,
    /// Distances between batches, heads and rows, in elements; 0 repeats.
    pub strides: [Dim; 3],
}

/// Attention, forward.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Number of sequences.
    pub batch: Dim,
    /// Heads of the queries.
    pub heads: Dim,
    /// Heads of keys and values.
    pub kv_heads: Dim,
    /// Queries per sequence.
    pub queries: Dim,
    /// Keys per sequence.
    pub keys: Dim,
    /// Depth of queries and keys.
    pub depth: i64,
    /// Depth of values and results.
    pub width: i64,
    /// Queries.
    pub q: Heads,
    /// Keys.
    pub k: Heads,
    /// Values.
    pub v: Heads,
    /// Result.
    pub o: Heads,
    /// Added to the scores, or of truth values: hides the score where it is false.
    pub mask: Option<Heads>,
    /// Factor of the scores.
    pub scale: f64,
    /// Later keys are hidden.
    pub causal: bool,
    /// A row that sees nothing is 0, not NaN.
    pub zeros: bool,
    /// Operands may be rounded to TF32 on the way in.
    pub tf32: bool,
}
