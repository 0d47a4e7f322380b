//! Device programs on a device.
//!
//! ```text
//! Program --Loader::load--> LoadedKernel          emitted, compiled (or found in the cache), loaded
//!         --bind----------> BoundKernel           sizes, addresses and tensor maps packed; grid known
//!         --launch--------> work in a stream      one call of the driver
//!         --keep----------> KeptKernel            data, from which another process restores it
//! ```
//!
//! What a launch passes is worked out from the program alone: a parameter's layout and the sizes give
//! the tensor map, [`Source::arguments`](tilewright_emit_cuda::Source) the order. That part is
//! [`arguments`], which needs no device. What the copy engine cannot address is said in words before
//! the driver would refuse it.
//!
//! A schedule that does not compile, fit or launch is a bug, and no reason to stop:
//! [`first_that_works`] takes the next legal one and keeps what failed.

mod arguments;
mod fallback;
mod kept;
mod loader;

pub use arguments::{Arguments, Operand, Value, arguments};
pub use fallback::{Taken, first_that_works};
pub use kept::{KeptKernel, KeptModules};
pub use loader::{BoundKernel, FAIL_FIRST, LoadedKernel, Loader, request};
