//! Prints tile kernels as Triton source: a Python module with the kernel and a function `launch`.
//!
//! [`emit_kernel`] decides nothing: tile sizes come from the [`Schedule`], warps and pipeline stages
//! from [`Knobs`]. The module's docstring holds the tile program it was printed from, and
//!
//! ```text
//! launch(A, B, C, *, num_warps=4, num_stages=3, enable_fp_fusion=True, stream=None)
//! ```
//!
//! takes PyTorch tensors in the order of the kernel's parameters. It reads the sizes from their
//! shapes, checks them, and starts one program per block of the grid, linearised with the last axis
//! fastest. Sizes that no shape gives are further keyword arguments.
//!
//! **Strides.** A parameter without blocks is taken as a tensor of its logical shape with any
//! strides: those in the tile program are one of the layouts that the kernel can read. A parameter
//! with a blocked axis is taken as contiguous memory in exactly its layout.
//!
//! **Masks** stand where a bound is not proven for the tile sizes of the schedule; other tile sizes
//! are printed anew. **Precision:** products of `f32` are IEEE products, sums of narrow floats are
//! kept in `f32` and rounded once.
//!
//! | file | holds |
//! |---|---|
//! | `emitter.rs` | state: names, facts, lines by scope |
//! | `stmts.rs` | loops, branches |
//! | `ops.rs` | tile operations |
//! | `memory.rs` | addresses, masks, loads, stores |
//! | `launch.rs` | the launcher, and the module around everything |
//! | `integers.rs`, `types.rs`, `names.rs` | integers, constants, types and names in Python's words |
//! | `helpers.rs` | functions that generated modules call |

mod emitter;
mod helpers;
mod integers;
mod launch;
mod memory;
mod names;
mod ops;
mod stmts;
mod types;

use emitter::Emitter;
use tilewright_base::{Error, Result};
use tilewright_tile::{Kernel, Schedule, verify_schedule};

/// What a launch says beside the schedule's tile sizes; defaults of the launcher's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Knobs {
    /// Warps of a program.
    pub num_warps: u32,
    /// Stages of the software pipeline of loops.
    pub num_stages: u32,
}

impl Default for Knobs {
    /// Triton's own defaults.
    fn default() -> Knobs {
        Knobs { num_warps: 4, num_stages: 3 }
    }
}

/// A kernel as a Python module.
#[derive(Clone, Debug)]
pub struct Emitted {
    /// Name of the kernel's function.
    pub name: String,
    /// The module.
    pub python: String,
}

/// Prints a well-formed kernel under a schedule. Everything that cannot be said in Triton is
/// reported at once.
pub fn emit_kernel(kernel: &Kernel, schedule: &Schedule, knobs: Knobs) -> Result<Emitted> {
    verify_schedule(kernel, schedule)?;
    let mut e = Emitter::new(kernel, schedule);
    let name = e.names.fresh(&kernel.name);
    let prologue = e.grid_prologue();
    e.block(&kernel.body);
    let python = e.module(&name, &prologue, knobs);
    if e.problems.is_empty() {
        return Ok(Emitted { name, python });
    }
    let n_problems = e.problems.len();
    let error = Error::unsupported(format!(
        "kernel @{} as Triton: {n_problems} unsupported {}",
        kernel.name,
        if n_problems == 1 { "operation" } else { "operations" }
    ));
    Err(e.problems.into_iter().fold(error, Error::with_note))
}
