//! Tile program + GPU schedule -> device program.
//!
//! ```text
//! tile::Kernel --specialise--> tile sizes are numbers
//!              --streams-----> which loads feed the tensor cores, and through which ring of stages
//!              --roles-------> a producer that fills the ring, consumers that drain it
//!              --epilogue----> what follows the loop, in chunks of columns of the accumulators
//!              --raster------> which item of work is which block of the grid
//! ```
//!
//! Nothing here knows what a kernel is for: pipelining and warp specialisation are transformations of a
//! loop that loads tiles and multiplies them. Programs without a product go to `lines.rs`.

mod ampere;
mod ampere_chain;
mod axes;
mod chain;
mod computed_left;
mod epilogue;
mod extents;
mod hopper;
mod hopper_chain;
mod in_order;
mod line_ops;
mod lines;
mod pick;
mod raster;
mod row_sums;
mod schedule;
mod shelf;
mod specialise;
mod split;
mod steps;
mod streams;

pub use epilogue::{PART_COLUMNS, STAGED_COLUMNS, residual_span};
pub use schedule::{GpuSchedule, LinesKnobs, Mode, ProductKind, StoreKind};
pub use split::{SPLIT_PARTS, SPLIT_PIECES, SplitReduction, split_reduction};
pub use streams::{byte_product, tf32_round, window_line};

use tilewright_base::Result;
use tilewright_device::Program;
use tilewright_tile::Kernel;

/// Schedules a verified tile program for a GPU.
///
/// # Errors
/// Unsupported, naming the step, when the program has no form under this schedule.
pub fn lower(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    let written = kernel;
    let kernel = specialise::specialise(written, schedule)?;
    if !lines::has_product(&kernel.body) {
        return lines::lower(written, &kernel, schedule);
    }
    let chained = chain::is_chained(&kernel)?;
    match schedule.product {
        ProductKind::Wgmma if chained => hopper_chain::lower(&kernel, schedule),
        ProductKind::Wgmma => hopper::lower(&kernel, schedule),
        _ if chained => ampere_chain::lower(&kernel, schedule),
        _ => ampere::lower(&kernel, schedule),
    }
}
