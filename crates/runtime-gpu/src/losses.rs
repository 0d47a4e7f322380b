//! [`Losses`]: cross-entropy of rows of logits in a caller's stream, over a caller's memory.
//!
//! Graphs have no lookup that a row kernel could take: there each logit is compared with its row's target, and rows wait in registers
//! for their sums. This is the kernel of the library, which keeps rows in shared memory. Its schedule depends on the number of rows
//! only where they are few: [`LossesOf::schedule_rows`].

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Stream;
use tilewright_device::Arch;
use tilewright_kernels::rows::{CrossEntropyForm, CrossEntropySpec};
use tilewright_launch::{BoundKernel, LoadedKernel, Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

pub use tilewright_kernels::rows::CrossEntropyTerms;

/// Which losses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossesOf {
    /// Type of the logits, and of their gradient.
    pub dtype: DType,
    /// Rows.
    pub rows: i64,
    /// Logits of a row.
    pub columns: i64,
    /// The gradient is wanted beside the losses; else the logarithms of the sums are.
    pub gradient: bool,
    /// What the losses have beside the target's logit.
    pub terms: CrossEntropyTerms,
}

/// Where the tensors of a call lie on the device, in bytes: row-major, at multiples of 16.
#[derive(Clone, Copy, Debug)]
pub struct LossesPlaces {
    /// The logits.
    pub x: u64,
    /// The targets, `i64`. A row whose target is no column has the loss 0.
    pub targets: u64,
    /// What each row's gradient is multiplied by, `f32`; used with `gradient`.
    pub factors: u64,
    /// The losses, `f32`.
    pub losses: u64,
    /// The gradient of the logits, or the logarithms of the sums (`f32`).
    pub other: u64,
}

/// From so many rows on one schedule serves all: there are several blocks for each multiprocessor.
const MANY_ROWS: i64 = 4096;

/// How many numbers of rows are remembered with their arguments; then all are forgotten (the kernel stays).
const MAX_BOUND: usize = 256;

impl LossesOf {
    /// The number of rows that the schedule is picked for: the next power of two, and at most [`MANY_ROWS`]. Calls that differ in
    /// [`LossesOf::rows`] only share a kernel where this is the same.
    pub fn schedule_rows(&self) -> i64 {
        (self.rows.clamp(1, MANY_ROWS) as u64).next_power_of_two() as i64
    }
}

/// A kernel that is compiled and loaded, for all numbers of rows of one schedule.
pub struct Losses {
    what: LossesOf,
    kernel: LoadedKernel,
    /// By the number of rows.
    bound: Mutex<BTreeMap<i64, BoundKernel>>,
}

impl Losses {
    /// Compiles and loads the kernel.
    ///
    /// # Errors
    /// Unsupported for float64 and for machines before Hopper; what does not compile or load.
    pub fn new(machine: &Gpu, loader: &Loader, what: LossesOf) -> Result<Losses> {
        if !matches!(what.dtype, DType::F32 | DType::BF16 | DType::F16) || machine.capability < 90 {
            let message = format!("cross-entropy of {} by the kernel of the library", what.dtype);
            return Err(Error::unsupported(message));
        }
        let form = if what.gradient { CrossEntropyForm::Beside } else { CrossEntropyForm::Losses };
        let sizes = sizes(&what, what.schedule_rows());
        let size = |name: &str| sizes.get(name).copied();
        let spec = CrossEntropySpec { dtype: what.dtype, form, terms: what.terms };
        let (kernel, schedule) = spec.kernel("cross_entropy", Arch::Sm90a, &size)?;
        let program = lower(&kernel, &schedule.behind_others())?;
        Ok(Losses { what, kernel: loader.load(&program)?, bound: Mutex::default() })
    }

    /// Puts the kernel into the stream, for `rows` rows.
    ///
    /// # Errors
    /// The driver's; a bug for a number of rows that has another schedule.
    ///
    /// # Safety
    /// The places hold tensors of the types and columns that this was made for, and of `rows` rows; the results are used by nobody else in
    /// another order than the stream's until the kernel has run.
    pub unsafe fn launch(&self, rows: i64, places: &LossesPlaces, stream: &Stream) -> Result<()> {
        let what = LossesOf { rows, ..self.what };
        if what.schedule_rows() != self.what.schedule_rows() {
            return Err(Error::bug(format!("{rows} rows for the losses of {}", self.what.rows)));
        }
        let operands = operands(&what, places);
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if !bound.contains_key(&rows) {
            if bound.len() >= MAX_BOUND {
                bound.clear();
            }
            bound.insert(rows, self.kernel.bind(&sizes(&what, rows), &operands)?);
        }
        let Some(kernel) = bound.get_mut(&rows) else { return Ok(()) };
        let addresses: Vec<u64> = operands.iter().map(|o| o.address).collect();
        kernel.move_to(&addresses)?;
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream) }
    }
}

/// The kernel's size symbols.
fn sizes(what: &LossesOf, rows: i64) -> Env {
    let sizes = [("M", rows), ("N", what.columns), ("ldx", what.columns)];
    sizes.into_iter().map(|(name, size)| (name.into(), size)).collect()
}

/// The operands in the order of the kernel's parameters.
fn operands(what: &LossesOf, places: &LossesPlaces) -> Vec<Operand> {
    let rows = what.rows.unsigned_abs();
    let matrix = |address| {
        let bytes = rows * what.columns.unsigned_abs() * what.dtype.size() as u64;
        Operand { address, bytes }
    };
    let numbers = |address, width: u64| Operand { address, bytes: rows * width };
    let mut all = vec![matrix(places.x), numbers(places.targets, 8)];
    if what.gradient {
        all.extend([numbers(places.factors, 4), numbers(places.losses, 4), matrix(places.other)]);
    } else {
        all.extend([numbers(places.losses, 4), numbers(places.other, 4)]);
    }
    all
}
