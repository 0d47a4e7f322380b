//! The oracle: runs graph, tile and device programs on the CPU, slowly and obviously.
//!
//! [`graph::run`] executes a graph in one of two [`Mode`]s: in its own data types, or with every
//! float held as `f64`, which is what compiled kernels are judged against. Operators are one file
//! per family under `ops/`; operators that only run on the host are registered in [`host`].
//!
//! Every loop sums in one fixed order, whatever the number of threads: the same inputs give the
//! same bits.

pub mod device;
mod func;
pub mod graph;
pub mod host;
mod ops;
pub mod plan;
pub mod tile;
mod value;

pub use graph::{Mode, Options, Outcome, run, run_with};
pub use ops::random::philox4x32_10;
