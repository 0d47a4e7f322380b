//! Puts the schedule's tile sizes, and the sizes that it is for, into a tile program, so that every extent of a tile
//! is a number.

use crate::schedule::GpuSchedule;
use tilewright_base::{Error, Result};
use tilewright_layout::{Dim, Range};
use tilewright_tile::{Kernel, substitute};

/// The program with numbers for tile sizes.
pub(crate) fn specialise(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Kernel> {
    for name in &kernel.tiles {
        if !schedule.tiles.contains_key(name) {
            return Err(Error::bug(format!("tile size {name} of {} has no value", kernel.name)));
        }
    }
    let number = |name: &str| schedule.tiles.get(name).or_else(|| schedule.sizes.get(name));
    let lookup = |name: &str| number(name).map(|v| Dim::new(*v));
    let mut out = substitute(kernel, &lookup);
    // The kernel takes no other values.
    for symbol in &mut out.symbols {
        if let Some(v) = schedule.sizes.get(&symbol.name) {
            symbol.range = Range { min: *v, max: *v };
        }
    }
    out.tiles.clear();
    out.bounds.clear();
    Ok(out)
}
