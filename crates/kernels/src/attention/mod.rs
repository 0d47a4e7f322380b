//! Attention: `O = softmax(scale Q K^T + mask) V`, forward, one kernel that never stores the scores.
//!
//! ```text
//! Problem --plan--> candidates, best first: steps (tile program, schedule, sizes, operands) + workspace
//!            |
//!            +-- program   one for every length and layout; depths and kinds of masks are its own
//!            +-- space     tiles, consumers and stages that fit registers and shared memory
//!            +-- steps     launches and choices, for the gradient too
//! ```
//!
//! Queries, keys and values are `[batch, head, row, depth]` with any strides but that of the depth,
//! which is 1: `[B, H, S, D]` and `[B, S, H, D]` are the same to it.
//!
//! # What is defined
//!
//! - A row that sees nothing (no keys, all hidden, all scores minus infinity) is NaN, as its softmax is
//!   0/0, or 0 with `zeros`; its log-sum-exp is minus infinity, and it has no share in any gradient.
//! - NaN or plus infinity among the scores that a row sees makes the row NaN.
//! - Scores of hidden keys are not looked at, but their values count with weight zero: values that are
//!   NaN or infinite make NaN. What lies beyond the lengths is never read.
//! - Masks of the largest negative number hide as the softmax of such scores does: a row in which
//!   everything is hidden so is the mean of its values.

mod backward;
mod backward_plan;
mod plan;
mod problem;
mod program;
mod space;
mod steps;

pub use backward::{BackwardMask, BackwardSpec, KeySums};
pub use backward_plan::{
    BackwardPlace, BackwardPlan, BackwardProblem, BackwardStep, Gradients, backward_plan,
    backward_spaces,
};
pub use plan::{Candidate, Place, Step, plan};
pub use problem::{Mask, MaskKind, Problem, Strides};
pub use program::{AttentionSpec, Causal};
pub use space::{Access, space};
pub use steps::Launch;
