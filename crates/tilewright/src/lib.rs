//! Tilewright: compiles tensor programs to fast, verified kernels.
//!
//! ```no_run
//! use tilewright::{Compiler, Model};
//! # fn main() -> tilewright::Result<()> {
//! let model = Model::open("model.onnx".as_ref())?;
//! let compiled = Compiler::new()?.compile(&model)?;
//! let mut session = compiled.session()?;
//! let inputs = tilewright::inputs::random(&model.graph, &Default::default(), 0)?;
//! let outputs = session.run(&inputs)?;
//! # Ok(()) }
//! ```
//!
//! The way of the data, one module per step: [`Model`] (a file becomes a graph), [`Compiler`]
//! (graph passes, fusion, tile programs, machine code), `Session` (runs it), [`verify`] (compares
//! with the float64 oracle), [`explain`] (costs, roofline, memory), [`mod@bench`] (times). Formulas go
//! their own short way: [`expr`].

pub mod bench;
mod compile;
pub mod explain;
pub mod expr;
pub mod html;
pub mod inputs;
mod machine;
mod model;
mod precision;
pub mod verify;

pub use compile::{Compiled, Compiler, Stage, StageTime};
pub use machine::{cache_dir, host_cpu, measured_cpu};
pub use model::{Model, Source};
pub use tilewright_base::{DType, Error, Kind, Result};
pub use tilewright_data::Tensor;
pub use tilewright_lower::Choice;
pub use tilewright_runtime::Session;
pub use tilewright_target::{Cpu, Precision};
