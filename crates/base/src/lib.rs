//! The vocabulary every other crate shares: data types, typed ids and diagnostics.
//!
//! This crate knows no shapes, no tensors and no devices.

mod diag;
mod dtype;
mod id;

pub use diag::{Error, Kind, Result, ResultExt, SourceSpan};
pub use dtype::{Class, DType};
pub use id::IdVec;
