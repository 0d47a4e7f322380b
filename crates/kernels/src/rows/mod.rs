//! Kernels along rows of a matrix: softmax, normalisations, products with a vector.
//!
//! [`RowSpec`] and [`GemvSpec`] say what is computed, for every size. A [`RowSpec`] has one tile program per
//! form: a tile that holds whole rows and reads them once, or a walk over pieces of a row per reduction.
//! Which form fits, and its schedule, follow from the row's length: [`RowSpec::kernel`].
//!
//! To add an operation: a variant of [`RowOp`], its statistics in `program.rs`.

mod backward;
mod cross_entropy;
mod gemv;
mod program;
mod top_k;

pub use backward::{NormBackwardPlan, NormBackwardSpec};
pub use cross_entropy::{CrossEntropyForm, CrossEntropySpec, CrossEntropyTerms};
pub use gemv::{GemvForm, GemvSizes, GemvSpec, MOST_VECTORS};
pub use program::{RowOp, RowSpec};
pub(crate) use program::{func, sizes};
pub use top_k::TopKSpec;
