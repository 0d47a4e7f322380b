//! The two ways to multiply: [`Ours`], a plan of our kernels, and [`Peer`], cuBLASLt.

use crate::case::Case;
use tilewright_base::{Error, Result};
use tilewright_cuda::peer::{CublasLt, Matmul};
use tilewright_cuda::{Buffer, Gpu, Stream};
use tilewright_device::Program;
use tilewright_kernels::gemm::{Candidate, Place};
use tilewright_launch::{BoundKernel, LoadedKernel, Loader, Operand};
use tilewright_lower_gpu::lower;

/// Workspace that cuBLASLt may use.
pub const PEER_WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms that cuBLASLt is asked for.
pub const PEER_ALGORITHMS: usize = 16;

/// One set of matrices.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Matrices {
    pub a: Buffer,
    pub b: Buffer,
    pub c: Buffer,
}

impl Matrices {
    /// Memory for a case, not filled.
    pub fn new(stream: &Stream, case: &Case) -> Result<Matrices> {
        let (a, b, c) = (case.a.bytes(), case.b.bytes(), case.c.bytes());
        Ok(Matrices { a: stream.alloc(a)?, b: stream.alloc(b)?, c: stream.alloc(c)? })
    }

    /// Addresses of the first elements.
    pub fn addresses(&self, case: &Case) -> [u64; 3] {
        let at = |buffer: &Buffer, place: &crate::case::Place| {
            buffer.address() + place.offset * place.dtype.size() as u64
        };
        [at(&self.a, &case.a), at(&self.b, &case.b), at(&self.c, &case.c)]
    }
}

/// The device as our planner sees it: the constants of the model are those of the H200, the counts
/// the driver's.
pub fn planner_gpu(gpu: &Gpu) -> tilewright_target::Gpu {
    let properties = gpu.properties();
    tilewright_target::Gpu {
        name: properties.name.clone(),
        capability: properties.major * 10 + properties.minor,
        sms: properties.sm_count,
        l2_bytes: properties.l2_bytes,
        ..tilewright_target::Gpu::h200()
    }
}

/// The programs of a candidate's steps.
pub fn programs(candidate: &Candidate) -> Result<Vec<Program>> {
    candidate.steps.iter().map(|step| lower(&step.kernel, &step.schedule)).collect()
}

/// What a candidate is, in a line: its schedules.
pub fn describe(candidate: &Candidate) -> String {
    let steps: Vec<String> =
        candidate.steps.iter().map(|s| format!("{} {}", s.kernel.name, s.schedule)).collect();
    steps.join("; ")
}

/// A candidate, loaded, with its workspace.
#[derive(Debug)]
pub struct Ours {
    candidate: Candidate,
    kernels: Vec<LoadedKernel>,
    workspace: Buffer,
}

impl Ours {
    /// Lowers, compiles (or finds) and loads a candidate.
    pub fn load(loader: &Loader, stream: &Stream, candidate: &Candidate) -> Result<Ours> {
        let context = |e: Error| e.with_context(format!("schedule {}", describe(candidate)));
        let programs = programs(candidate).map_err(context)?;
        let kernels =
            loader.load_all(&programs).into_iter().collect::<Result<_>>().map_err(context)?;
        let workspace = stream.alloc(candidate.workspace_bytes as usize)?;
        Ok(Ours { candidate: candidate.clone(), kernels, workspace })
    }

    /// What was loaded.
    pub fn candidate(&self) -> &Candidate {
        &self.candidate
    }

    /// Binds a set of matrices.
    pub fn bind(&self, case: &Case, matrices: &Matrices) -> Result<Vec<BoundKernel>> {
        let [a, b, c] = matrices.addresses(case);
        let rest = |buffer: &Buffer, start: u64| Operand {
            address: start,
            bytes: (buffer.address() + buffer.len() as u64).saturating_sub(start),
        };
        let bind = |(step, kernel): (&tilewright_kernels::gemm::Step, &LoadedKernel)| {
            let operands = step
                .operands
                .iter()
                .map(|place| match place {
                    Place::A => Ok(rest(&matrices.a, a)),
                    Place::B => Ok(rest(&matrices.b, b)),
                    Place::C => Ok(rest(&matrices.c, c)),
                    Place::Workspace { offset, bytes } => {
                        let whole = self.workspace.len() as u64;
                        if offset.checked_add(*bytes).is_none_or(|end| end > whole) {
                            return Err(Error::bug(format!(
                                "{place:?} in {whole} bytes of workspace"
                            )));
                        }
                        Ok(Operand { address: self.workspace.address() + offset, bytes: *bytes })
                    }
                    other => Err(Error::bug(format!("a plain product asks for {other:?}"))),
                })
                .collect::<Result<Vec<_>>>()?;
            kernel.bind(&step.sizes, &operands)
        };
        self.candidate.steps.iter().zip(&self.kernels).map(bind).collect()
    }
}

/// Puts the steps of a bound plan into the stream.
///
/// # Safety
/// As for [`BoundKernel::launch`], of every step; the plan's [`Ours`] lives as long.
pub unsafe fn launch_all(steps: &[BoundKernel], stream: &Stream) -> Result<()> {
    for step in steps {
        // SAFETY: the caller's promise.
        unsafe { step.launch(stream)? };
    }
    Ok(())
}

/// cuBLASLt with its algorithms for a case, and its workspace.
#[derive(Debug)]
pub struct Peer<'a> {
    matmul: Matmul<'a>,
    workspace: &'a Buffer,
}

impl<'a> Peer<'a> {
    /// Asks for algorithms. `workspace` has [`PEER_WORKSPACE_BYTES`].
    ///
    /// # Errors
    /// Unsupported when cuBLASLt has none.
    pub fn new(peer: &'a CublasLt, case: &Case, workspace: &'a Buffer) -> Result<Peer<'a>> {
        let matmul = peer.matmul(&case.of_peer(), workspace.len(), PEER_ALGORITHMS)?;
        Ok(Peer { matmul, workspace })
    }

    /// How many algorithms there are.
    pub fn algorithms(&self) -> usize {
        self.matmul.algorithms()
    }

    /// Bytes of workspace that an algorithm uses.
    pub fn workspace_bytes(&self, algorithm: usize) -> usize {
        self.matmul.algorithm(algorithm).map_or(0, |(bytes, _)| bytes)
    }

    /// Puts a product into the stream.
    ///
    /// # Safety
    /// The matrices live, and are used in no other order than the stream's, until it has run.
    pub unsafe fn launch(
        &self,
        algorithm: usize,
        stream: &Stream,
        case: &Case,
        matrices: &Matrices,
    ) -> Result<()> {
        // SAFETY: the matrices lie in their buffers as the case says, which was what cuBLASLt was
        // told; all work goes to one stream, so that the workspace has one user at a time.
        unsafe { self.matmul.run(algorithm, stream, matrices.addresses(case), self.workspace) }
    }
}
