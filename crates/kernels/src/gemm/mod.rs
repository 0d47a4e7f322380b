//! Matrix products: `C = epilogue(A B)`, batched and strided.
//!
//! ```text
//! Problem --plan--> candidates, best first: steps (tile program, schedule, sizes, operands) + workspace
//!            |
//!            +-- vectors       few rows or columns: the kernels of `rows/gemv.rs` (`vector.rs`)
//!            +-- orientation   the product, or its transpose when there are few rows
//!            +-- preparation   operands that the copy engine or the tensor cores cannot read are copied
//!            +-- splits        of the depth, when there are too few tiles for the machine
//!            +-- space         every legal schedule (`space.rs`)
//!            +-- model         its estimated time (`model.rs`)
//! ```
//!
//! No tuning is needed: the model picks. A tuner measures the first candidates instead.

mod model;
mod plan;
mod problem;
mod program;
mod space;
mod vector;

pub use model::estimate_us;
pub use plan::{Candidate, Place, Step, plan};
pub use problem::{Precision, Problem};
pub use program::{Epilogue, GemmSpec, Math, Order};
pub use space::space;
