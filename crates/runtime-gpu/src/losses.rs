//! [`Losses`]: cross-entropy of rows of logits in a caller's stream, over a caller's memory.
//!
//! Graphs have no lookup that a row kernel could take: there each logit is compared with its row's target, and rows wait in registers
//! for their sums. This is the kernel of the library, which keeps rows in shared memory.

use std::sync::{Mutex, PoisonError};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Stream;
use tilewright_device::Arch;
use tilewright_kernels::rows::{CrossEntropyForm, CrossEntropySpec};
use tilewright_launch::{BoundKernel, Loader, Operand};
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

/// A kernel that is compiled, loaded and bound.
pub struct Losses {
    what: LossesOf,
    kernel: Mutex<BoundKernel>,
}

impl Losses {
    /// Compiles, loads and binds the kernel for these places.
    ///
    /// # Errors
    /// Unsupported for float64 and for machines before Hopper; what does not compile or load.
    pub fn new(
        machine: &Gpu,
        loader: &Loader,
        what: LossesOf,
        places: &LossesPlaces,
    ) -> Result<Losses> {
        if !matches!(what.dtype, DType::F32 | DType::BF16 | DType::F16) || machine.capability < 90 {
            let message = format!("cross-entropy of {} by the kernel of the library", what.dtype);
            return Err(Error::unsupported(message));
        }
        let form = if what.gradient { CrossEntropyForm::Beside } else { CrossEntropyForm::Losses };
        let sizes = [("M", what.rows), ("N", what.columns), ("ldx", what.columns)];
        let size = |name: &str| sizes.iter().find(|(known, _)| *known == name).map(|(_, n)| *n);
        let spec = CrossEntropySpec { dtype: what.dtype, form, terms: what.terms };
        let (kernel, schedule) = spec.kernel("cross_entropy", Arch::Sm90a, &size)?;
        let program = lower(&kernel, &schedule)?;
        let env: Env = sizes.into_iter().map(|(name, size)| (name.into(), size)).collect();
        let loaded = loader.load_all(&[program]).into_iter().next();
        let loaded = loaded.ok_or_else(|| Error::bug("a kernel was not loaded"))??;
        let bound = loaded.bind(&env, &operands(&what, places))?;
        Ok(Losses { what, kernel: Mutex::new(bound) })
    }

    /// Puts the kernel into the stream.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The places hold tensors of the types and sizes that this was made for, of which the results are used by nobody else in another
    /// order than the stream's until the kernel has run.
    pub unsafe fn launch(&self, places: &LossesPlaces, stream: &Stream) -> Result<()> {
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let addresses: Vec<u64> = operands(&self.what, places).iter().map(|o| o.address).collect();
        kernel.move_to(&addresses)?;
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream) }
    }
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
