//! Symbolic sizes ([`Dim`]) and layouts ([`Layout`]): shapes, strides, blocking, and their algebra.
//!
//! This crate knows nothing of the arithmetic of data types, of tensors or of programs.

mod dim;
mod dim_text;
mod facts;
mod strided;

pub use dim::{Atom, Dim, Env, Range, Symbol, Symbols};
pub use facts::{Facts, atom_dim, linear_in, mentions, uppers};
pub use strided::{Axis, Block, Layout, broadcast_shapes, numel};
