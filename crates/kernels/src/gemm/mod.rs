//! Matrix products: `C = epilogue(A B)`, batched and strided.
//!
//! [`GemmSpec`] says what is computed, for every size; [`GemmSpec::program`] is its tile program.

mod program;

pub use program::{Epilogue, GemmSpec, Math, Order};
