//! Device programs: a tile program after scheduling for a GPU.
//!
//! A [`Program`] says who does what and in which memory: roles (groups of warps), shared-memory
//! buffers with their swizzle, register tiles with their spread over threads, copies by the copy
//! engine, mbarrier phases, `wgmma` groups. Everything asynchronous is explicit, so that a checker can
//! see whether each access is ordered after what it needs, and an interpreter can run the program on
//! a CPU. It prints as CUDA C++ that calls the device library; nothing here knows that text.
//!
//! Values stay logical: a tile in shared memory is `[rows, cols]` of elements whatever its swizzle, a
//! fragment is a tile whatever its spread. That the physical forms agree (the swizzle of a tensor map
//! with that of the buffer, the spread of an accumulator with the instruction) is checked by rules.
//!
//! To add a step: a variant of [`Stmt`], its line in `print.rs`, its rule in `verify/steps.rs`; the
//! compiler then names the interpreter and the emitter.

mod ir;
mod lines;
mod print;
mod verify;

pub use ir::*;
pub use lines::{LineStep, Shelf, ShelfId, ShelfRef, identity};
pub use verify::verify;
