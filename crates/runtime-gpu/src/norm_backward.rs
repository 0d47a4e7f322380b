//! [`NormBackward`]: the gradient of a normalisation in a caller's stream, over a caller's memory.
//!
//! The graph language has no kernel that stores sums over the rows beside the rows themselves, so this is a kernel of the library,
//! made for the sizes of the call: rows are read once.

use std::sync::{Mutex, PoisonError};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Stream;
use tilewright_device::Arch;
use tilewright_kernels::rows::{NormBackwardPlan, NormBackwardSpec, RowOp};
use tilewright_launch::{BoundKernel, Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

/// Which gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormGradient {
    /// Layer normalisation; else RMS normalisation.
    pub centred: bool,
    /// What is added to the variance.
    pub eps: f64,
    /// Type of matrices and vectors.
    pub dtype: DType,
    /// Another gradient of the rows is added to the result.
    pub added: bool,
    /// Rows.
    pub rows: i64,
    /// Elements of a row.
    pub columns: i64,
}

/// Where the tensors of a call lie on the device, in bytes: row-major, at multiples of 16.
#[derive(Clone, Copy, Debug)]
pub struct NormGradientPlaces {
    /// The rows that were normalised.
    pub x: u64,
    /// The gradient of the result.
    pub dy: u64,
    /// The vector that scales.
    pub scale: u64,
    /// The other gradient of the rows, with `added`.
    pub other: u64,
    /// The gradient of the rows.
    pub dx: u64,
    /// The gradients of the vectors: scale, and shift if `centred`.
    pub vectors: [u64; 2],
    /// Memory for the parts of the sums: [`NormBackward::scratch_bytes`].
    pub scratch: u64,
}

/// Kernels that are compiled, loaded and bound.
pub struct NormBackward {
    what: NormGradient,
    parts_count: i64,
    kernels: Mutex<Vec<BoundKernel>>,
}

impl NormBackward {
    /// Plans the kernels; nothing is compiled. The number of bytes of scratch memory that they need, too.
    ///
    /// # Errors
    /// Unsupported for rows that the registers of a block do not hold, float64, and machines before Hopper.
    pub fn plan(machine: &Gpu, what: &NormGradient) -> Result<(NormBackwardPlan, u64)> {
        if !matches!(what.dtype, DType::F32 | DType::BF16 | DType::F16) || machine.capability < 90 {
            let message = format!("the gradient of a normalisation of {} in one pass", what.dtype);
            return Err(Error::unsupported(message));
        }
        let eps = what.eps;
        let op = if what.centred { RowOp::LayerNorm { eps } } else { RowOp::RmsNorm { eps } };
        let spec = NormBackwardSpec { op, dtype: what.dtype, added: what.added };
        let plan = spec.plan(Arch::Sm90a, &|name| match name {
            "M" => Some(what.rows),
            "N" | "ld" => Some(what.columns),
            _ => None,
        })?;
        let vector = plan.parts_count.unsigned_abs() * what.columns.unsigned_abs() * 4;
        let scratch = vector.next_multiple_of(16) * (1 + u64::from(what.centred));
        Ok((plan, scratch))
    }

    /// The size symbols of its kernels.
    pub(crate) fn sizes(what: &NormGradient, plan: &NormBackwardPlan) -> Env {
        let sizes: [(&str, i64); 5] = [
            ("M", what.rows),
            ("N", what.columns),
            ("ld", what.columns),
            ("P", plan.parts_count),
            ("C", plan.turns),
        ];
        sizes.into_iter().map(|(name, size)| (name.into(), size)).collect()
    }

    /// Compiles, loads and binds a plan for these places.
    ///
    /// # Errors
    /// What does not compile or load.
    pub fn new(
        loader: &Loader,
        what: NormGradient,
        plan: &NormBackwardPlan,
        places: &NormGradientPlaces,
    ) -> Result<NormBackward> {
        let env = NormBackward::sizes(&what, plan);
        let programs =
            [&plan.parts, &plan.finish].map(|(k, s)| lower(k, &s.clone().behind_others()));
        let programs = programs.into_iter().collect::<Result<Vec<_>>>()?;
        let made = NormBackward { what, parts_count: plan.parts_count, kernels: Mutex::default() };
        let mut kernels = Vec::new();
        for (loaded, operands) in loader.load_all(&programs).into_iter().zip(made.operands(places))
        {
            kernels.push(loaded?.bind(&env, &operands)?);
        }
        *made.kernels.lock().unwrap_or_else(PoisonError::into_inner) = kernels;
        Ok(made)
    }

    /// Bytes of the parts of one vector's sums.
    fn vector_bytes(&self) -> u64 {
        let bytes = self.parts_count.unsigned_abs() * self.what.columns.unsigned_abs() * 4;
        bytes.next_multiple_of(16)
    }

    /// The operands of each kernel, in the order of its parameters.
    fn operands(&self, places: &NormGradientPlaces) -> Vec<Vec<Operand>> {
        let NormGradientPlaces { x, dy, scale, other, dx, vectors, scratch } = *places;
        let number = self.what.dtype.size() as u64;
        let line = self.what.columns.unsigned_abs() * number;
        let matrix = |address| Operand { address, bytes: self.what.rows.unsigned_abs() * line };
        let vector = |address| Operand { address, bytes: line };
        let part = |address| Operand { address, bytes: self.vector_bytes() };
        let parts = [scratch, scratch + self.vector_bytes()];
        let mut first = vec![matrix(x), matrix(dy), vector(scale)];
        first.extend(self.what.added.then(|| matrix(other)));
        first.push(matrix(dx));
        let vectors = &vectors[..1 + usize::from(self.what.centred)];
        first.extend(parts[..vectors.len()].iter().map(|p| part(*p)));
        let finish = vectors.iter().zip(parts).flat_map(|(v, p)| [part(p), vector(*v)]);
        vec![first, finish.collect()]
    }

    /// Puts the kernels into the stream.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The places hold tensors of the types and sizes that this was made for, of which the results and the scratch memory are used by
    /// nobody else in another order than the stream's until the kernels have run.
    pub unsafe fn launch(&self, places: &NormGradientPlaces, stream: &Stream) -> Result<()> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        for (kernel, operands) in kernels.iter_mut().zip(self.operands(places)) {
            let addresses: Vec<u64> = operands.iter().map(|o| o.address).collect();
            kernel.move_to(&addresses)?;
            // SAFETY: the caller's promise.
            unsafe { kernel.launch(stream)? };
        }
        Ok(())
    }
}
