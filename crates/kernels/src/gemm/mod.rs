//! Matrix products: `C = epilogue(A B)`, batched and strided.
//!
//! ```text
//! Problem --plan--> candidates, best first: steps (tile program, schedule, sizes, operands) + workspace
//!            |
//!            +-- vectors       few rows or columns: the kernels of `rows/gemv.rs` (`vector.rs`)
//!            +-- orientation   the product, or its transpose when there are few rows
//!            +-- preparation   operands that the copy engine or the tensor cores cannot read are copied
//!            +-- statistics    sums over rows, left beside the result or read (`statistics.rs`)
//!            +-- splits        of the depth, when there are too few tiles for the machine
//!            +-- space         every legal schedule (`space.rs`; without the copy engine: `pipelined.rs`)
//!            +-- model         its estimated time (`model.rs`)
//! ```
//!
//! No tuning is needed: the model picks ([`plan_untuned`]). A tuner searches the whole space ([`choices`]) by measuring,
//! and leaves a record (`record.rs`), which [`plan`] takes before the model's word.

mod computed;
mod model;
mod pipelined;
mod plan;
mod problem;
mod program;
mod record;
mod space;
mod statistics;
mod vector;

pub use computed::{Computed, plan_computed};
pub use model::estimate_us;
pub use plan::{
    Candidate, Choice, Place, Step, candidate, choices, estimate_choice, picked, plan_untuned,
};
pub use problem::{Images, Precision, Problem};
pub use program::{Epilogue, GemmSpec, Math, Order, Pair, Prologue, Windows};
pub use record::{
    Device, FORMAT, Key, Knobs, Planned, Record, Records, Source, code_of, plan, plan_with, slug,
};
pub use space::space;
pub use statistics::{PART, RowSums, Statistics};
