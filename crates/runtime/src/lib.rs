//! Runs plans on the CPU: aligned memory, the arena planner, the thread pool, sessions.
//!
//! An [`Executable`] is a plan with machine code for its kernels and its constants in place; it is
//! shared. A [`Session`] holds what one caller at a time needs to run it: the arena and the
//! argument tables for the sizes last used. Running with sizes seen before allocates nothing (host
//! steps excepted). This crate decides nothing about compilation: it is handed loaded libraries.

mod array;
mod clock;
mod constants;
mod float_mode;
mod images;
mod in_place;
mod machine;
mod memory;
mod pack;
mod permission;
mod pool;
mod session;
mod states;

pub use array::ArrayCode;
pub use machine::measure;
pub use memory::AlignedBuffer;
pub use pack::pack;
pub use permission::request_tiles;
pub use pool::Pool;
pub use session::{Code, Executable, MemoryReport, Session, StepTime};
