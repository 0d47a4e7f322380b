//! Tilewright: compiles tensor programs to fast, verified kernels.
//!
//! ```no_run
//! # #[cfg(feature = "cpu")] mod example {
//! use tilewright::{Compiler, Model};
//! # fn main() -> tilewright::Result<()> {
//! let model = Model::open("model.onnx".as_ref())?;
//! let compiled = Compiler::new()?.compile(&model)?;
//! let mut session = compiled.session()?;
//! let inputs = tilewright::inputs::random(&model.graph, &Default::default(), 0)?;
//! let outputs = session.run(&inputs)?;
//! # Ok(()) }
//! # }
//! ```
//!
//! The way of the data, one module per step: [`Model`] (a file becomes a graph), [`Compiler`]
//! (graph passes, fusion, tile programs, machine code), `Session` (runs it), [`verify`] (compares
//! with the float64 oracle), [`explain`] (costs, roofline, memory), [`mod@bench`] (times). Formulas go
//! their own short way: [`expr`]. The module [`gpu`] is the same for GPUs.
//!
//! Without the feature `cpu` nothing of LLVM is linked, and models run on GPUs only.

pub mod bench;
#[cfg(feature = "cpu")]
mod compile;
pub mod edges;
pub mod explain;
#[cfg(feature = "cpu")]
pub mod expr;
pub mod generate;
pub mod gpu;
mod host;
pub mod html;
pub mod inputs;
mod machine;
mod model;
mod precision;
mod stage;
#[cfg(feature = "cpu")]
pub mod tune;
pub mod verify;

#[cfg(feature = "cpu")]
pub use compile::{Compiled, Compiler};
pub use machine::cache_dir;
#[cfg(feature = "cpu")]
pub use machine::{host_cpu, measured_cpu};
pub use model::{Model, Source};
pub use stage::{Stage, StageTime};
pub use tilewright_base::{DType, Error, Kind, Result};
pub use tilewright_data::Tensor;
pub use tilewright_lower::Choice;
#[cfg(feature = "cpu")]
pub use tilewright_runtime::Session;
pub use tilewright_target::{Cpu, Precision};
