//! Compiled graphs as custom calls of XLA, so that JAX (and whatever else runs on XLA) calls them inside of its
//! own programs.
//!
//! ```text
//! XLA --CallFrame--> handler: buffers, the graph's text, the stream
//!     --programs-->  the text compiled for the call's device, once
//!     -->            a run in XLA's memory; on a GPU in XLA's stream
//! ```
//!
//! What the graph language does not say (steps of optimizers in place, dropout) is a call of the target `tilewright_kernel`, which
//! names a kernel of the operator pack in the attribute `kernel`.
//!
//! One handler per platform serves every graph: the call carries the text form of its graph in the attribute
//! `graph` (and optionally `precision`), so that a program that XLA has saved can be run by another process.
//!
//! | module | holds |
//! |---|---|
//! | `api` | the structures of XLA's interface (`xla/ffi/api/c_api.h`, version 0.3) |
//! | `frame` | reading a call, as safe values |
//! | `handler` | the functions that XLA calls |
//! | `programs` | texts to compiled programs |
//! | `written` | the operator pack's kernels that are written by hand, in place or by a key |

mod api;
mod frame;
mod handler;
mod programs;
mod written;

pub use handler::handlers;
