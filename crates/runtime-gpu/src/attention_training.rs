//! [`AttentionKernels`]: attention that keeps its log-sum-exp, and its gradient, in a caller's stream, over a caller's memory.
//!
//! The graph language has no gradient of attention in one piece, so these are kernels of the library, made for the sizes of the
//! call: scores are never in memory.

use std::sync::{Mutex, PoisonError};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Stream;
use tilewright_device::Program;
use tilewright_kernels::attention::{
    self, BackwardPlace, BackwardProblem, Gradients, Mask, MaskKind, Place, Problem, Strides,
};
use tilewright_kernels::gemm::Precision;
use tilewright_launch::{BoundKernel, Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

/// An attention and how its tensors `[batch, head, row, depth]` lie: distances in elements between neighbours along the
/// first three axes. Along the depth, neighbours are neighbours in memory; addresses are multiples of 16 bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionCall {
    /// Sequences.
    pub batch: i64,
    /// Heads of queries.
    pub heads: i64,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: i64,
    /// Queries per sequence.
    pub queries: i64,
    /// Keys per sequence.
    pub keys: i64,
    /// Depth of queries and keys.
    pub depth: i64,
    /// Depth of values and results.
    pub width: i64,
    /// Type of all matrices.
    pub dtype: DType,
    /// Factor of the scores.
    pub scale: f64,
    /// Query `i` sees keys up to `i + keys - queries`.
    pub causal: bool,
    /// A mask.
    pub mask: Option<AttentionMask>,
    /// Of queries, keys, values, the result, its gradient, and the gradients of queries, keys and values.
    pub strides: [[i64; 3]; 8],
}

/// A mask `[batch, head, row, key]`: added to the scores, or truth values that say what is seen. Keys are neighbours in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionMask {
    /// A float, or `bool`.
    pub dtype: DType,
    /// Distances in elements along the first three axes; 0 where it repeats itself.
    pub strides: [i64; 3],
    /// Alignment of its address, in bytes.
    pub align: i64,
}

/// Where the tensors of a call lie on the device, in bytes; those that a direction does not use may be 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionPlaces {
    /// In the order of [`AttentionCall::strides`].
    pub tensors: [u64; 8],
    /// The log-sum-exp of each row, f32, a dense `[batch, heads, queries]`.
    pub lse: u64,
    /// The mask, if there is one.
    pub mask: u64,
    /// Memory without contents: [`AttentionPlan::scratch_bytes`].
    pub scratch: u64,
}

/// An operand of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Tensor(usize),
    Lse,
    Mask,
    Scratch { offset: u64, bytes: u64 },
}

/// Kernels in order, before they are compiled.
#[derive(Debug)]
pub struct AttentionPlan {
    programs: Vec<Program>,
    sizes: Vec<Env>,
    operands: Vec<Vec<Part>>,
    scratch_bytes: u64,
}

impl AttentionPlan {
    /// Bytes of scratch memory.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch_bytes
    }

    /// The result and the log-sum-exp of each row.
    ///
    /// # Errors
    /// Unsupported when the library has no kernel for it.
    pub fn forward(machine: &Gpu, call: &AttentionCall) -> Result<AttentionPlan> {
        let candidates = attention::plan(&call.problem(), machine, 1)?;
        let Some(candidate) = candidates.into_iter().next() else {
            return Err(Error::unsupported("attention without a kernel"));
        };
        let mut plan = AttentionPlan::empty(candidate.workspace_bytes);
        for step in candidate.steps {
            let part = |place: &Place| match place {
                Place::Q => Ok(Part::Tensor(0)),
                Place::K => Ok(Part::Tensor(1)),
                Place::V => Ok(Part::Tensor(2)),
                Place::O => Ok(Part::Tensor(3)),
                Place::Lse => Ok(Part::Lse),
                Place::Mask => Ok(Part::Mask),
                Place::Workspace { offset, bytes } => {
                    Ok(Part::Scratch { offset: *offset, bytes: *bytes })
                }
            };
            plan.programs.push(lower(&step.kernel, &step.schedule)?);
            plan.operands.push(step.operands.iter().map(part).collect::<Result<_>>()?);
            plan.sizes.push(step.sizes);
        }
        Ok(plan)
    }

    /// The gradients of queries, keys and values, from the result, its gradient and the log-sum-exp of each row.
    ///
    /// # Errors
    /// Unsupported when the library has no kernel for it.
    pub fn backward(machine: &Gpu, call: &AttentionCall) -> Result<AttentionPlan> {
        let [.., o, q, k, v] = call.strides.map(strides);
        let gradients = Gradients { o, q, k, v, align: [16; 4] };
        let problem = BackwardProblem { forward: call.problem(), gradients };
        let found = attention::backward_plan(&problem, machine)?;
        let mut plan = AttentionPlan::empty(found.workspace_bytes);
        for step in found.steps {
            let part = |place: &BackwardPlace| match place {
                BackwardPlace::Q => Part::Tensor(0),
                BackwardPlace::K => Part::Tensor(1),
                BackwardPlace::V => Part::Tensor(2),
                BackwardPlace::O => Part::Tensor(3),
                BackwardPlace::DO => Part::Tensor(4),
                BackwardPlace::DQ => Part::Tensor(5),
                BackwardPlace::DK => Part::Tensor(6),
                BackwardPlace::DV => Part::Tensor(7),
                BackwardPlace::Lse => Part::Lse,
                BackwardPlace::Mask => Part::Mask,
                BackwardPlace::Workspace { offset, bytes } => {
                    Part::Scratch { offset: *offset, bytes: *bytes }
                }
            };
            plan.programs.push(lower(&step.kernel, &step.schedule)?);
            plan.operands.push(step.operands.iter().map(part).collect());
            plan.sizes.push(step.sizes);
        }
        Ok(plan)
    }

    fn empty(scratch_bytes: u64) -> AttentionPlan {
        let (programs, sizes, operands) = (Vec::new(), Vec::new(), Vec::new());
        AttentionPlan { programs, sizes, operands, scratch_bytes }
    }
}

fn strides([batch, head, row]: [i64; 3]) -> Strides {
    Strides { batch, head, row }
}

impl AttentionCall {
    fn problem(&self) -> Problem {
        let [q, k, v, o, ..] = self.strides.map(strides);
        Problem {
            batch: self.batch,
            heads: self.heads,
            kv_heads: self.kv_heads,
            q_len: self.queries,
            kv_len: self.keys,
            depth: self.depth,
            width: self.width,
            dtype: self.dtype,
            result: self.dtype,
            precision: Precision::F32,
            scale: self.scale,
            causal: self.causal.then_some(self.keys - self.queries),
            mask: self.mask.map(|m| Mask {
                dtype: m.dtype,
                kind: if m.dtype == DType::Bool { MaskKind::Keep } else { MaskKind::Add },
                strides: strides(m.strides),
                align: m.align,
            }),
            lse: true,
            zeros: true,
            q,
            k,
            v,
            o,
            align: [16; 4],
        }
    }

    /// Bytes from the first element of a tensor to behind its last.
    fn bytes(&self, tensor: usize) -> u64 {
        let queries = matches!(tensor, 0 | 3 | 4 | 5);
        let (heads, rows) =
            if queries { (self.heads, self.queries) } else { (self.kv_heads, self.keys) };
        let line = if matches!(tensor, 0 | 1 | 5 | 6) { self.depth } else { self.width };
        let counts = [self.batch, heads, rows];
        let last =
            counts.iter().zip(self.strides[tensor]).map(|(n, stride)| (n - 1).max(0) * stride);
        (last.sum::<i64>() + line).unsigned_abs() * self.dtype.size() as u64
    }
}

/// Kernels that are compiled, loaded and bound.
#[derive(Debug)]
pub struct AttentionKernels {
    call: AttentionCall,
    operands: Vec<Vec<Part>>,
    kernels: Mutex<Vec<BoundKernel>>,
}

impl AttentionKernels {
    /// Compiles, loads and binds a plan for these places.
    ///
    /// # Errors
    /// What does not compile or load.
    pub fn new(
        loader: &Loader,
        call: AttentionCall,
        plan: AttentionPlan,
        places: &AttentionPlaces,
    ) -> Result<AttentionKernels> {
        let AttentionPlan { programs, sizes, operands, .. } = plan;
        let made = AttentionKernels { call, operands, kernels: Mutex::default() };
        let mut kernels = Vec::new();
        let loaded = loader.load_all(&programs).into_iter();
        for ((kernel, sizes), parts) in loaded.zip(&sizes).zip(&made.operands) {
            let operands: Vec<Operand> = parts.iter().map(|p| made.operand(*p, places)).collect();
            kernels.push(kernel?.bind(sizes, &operands)?);
        }
        *made.kernels.lock().unwrap_or_else(PoisonError::into_inner) = kernels;
        Ok(made)
    }

    fn operand(&self, part: Part, places: &AttentionPlaces) -> Operand {
        match part {
            Part::Tensor(i) => Operand { address: places.tensors[i], bytes: self.call.bytes(i) },
            Part::Lse => {
                let AttentionCall { batch, heads, queries, .. } = self.call;
                let bytes = (batch * heads * queries).unsigned_abs() * 4;
                Operand { address: places.lse, bytes }
            }
            Part::Mask => {
                let AttentionCall { batch, heads, queries, keys, mask, .. } = self.call;
                let last = |m: AttentionMask| {
                    let counts = [batch, heads, queries];
                    let far = counts.iter().zip(m.strides).map(|(n, s)| (n - 1) * s);
                    (far.sum::<i64>() + keys).unsigned_abs() * m.dtype.size() as u64
                };
                Operand { address: places.mask, bytes: mask.map_or(0, last) }
            }
            Part::Scratch { offset, bytes } => Operand { address: places.scratch + offset, bytes },
        }
    }

    /// Puts the kernels into the stream.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The places hold tensors of the types, sizes and distances that this was made for, of which the results and the scratch memory
    /// are used by nobody else in another order than the stream's until the kernels have run.
    pub unsafe fn launch(&self, places: &AttentionPlaces, stream: &Stream) -> Result<()> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        for (kernel, parts) in kernels.iter_mut().zip(&self.operands) {
            let addresses: Vec<u64> =
                parts.iter().map(|part| self.operand(*part, places).address).collect();
            kernel.move_to(&addresses)?;
            // SAFETY: the caller's promise.
            unsafe { kernel.launch(stream)? };
        }
        Ok(())
    }
}
