//! The two ways to multiply: [`Ours`], a plan of our kernels, and [`Peer`], cuBLASLt; and [`Pass`], a
//! recording of either.
//!
//! Launches are safe here because of what is borrowed: whatever is bound to matrices borrows them, and
//! buffers are freed in the order of their stream, which is the one that the launches go to. So what a
//! launch touches is there until it has run, even if the borrow has ended.

use crate::case::{Case, Place as Lies};
use crate::ending::Ending;
use std::marker::PhantomData;
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_cuda::peer::{CublasLt, Matmul, MatmulSpec};
use tilewright_cuda::{Buffer, Gpu, GraphExec, Stream};
use tilewright_device::{Arch, Program};
use tilewright_kernels::gemm::{Candidate, Order, Place, Step};
use tilewright_launch::{BoundKernel, LoadedKernel, Loader, Operand};
use tilewright_lower_gpu::{GpuSchedule, lower};

/// Workspace that cuBLASLt may use.
pub const PEER_WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms that cuBLASLt is asked for.
pub const PEER_ALGORITHMS: usize = 16;

/// One set of matrices.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Matrices {
    pub a: Buffer,
    /// With the second right operand of a pair, as `Case::second` says.
    pub b: Buffer,
    pub c: Buffer,
    /// What the ending reads, as `Case::extras`.
    pub extras: [Option<Buffer>; 4],
    /// Where a peer that has no such ending puts its sums.
    pub sums: Option<Buffer>,
}

impl Matrices {
    /// Memory for a case, not filled.
    pub fn new(stream: &Stream, case: &Case) -> Result<Matrices> {
        let (a, b, c) = (case.a.bytes(), case.right_bytes(), case.c.bytes());
        let [a, b, c] = [stream.alloc(a)?, stream.alloc(b)?, stream.alloc(c)?];
        let spec = case.of_peer();
        let sums = spec.m * spec.n * u64::from(spec.batch) * spec.result.size() as u64;
        let apart = case.ending != Ending::Plain;
        let sums = apart.then(|| stream.alloc(sums as usize)).transpose()?;
        Ok(Matrices { a, b, c, extras: Matrices::extras(stream, case)?, sums })
    }

    /// Memory for what the ending reads.
    pub fn extras(stream: &Stream, case: &Case) -> Result<[Option<Buffer>; 4]> {
        let [cols, rows, residual, second] = case.extras();
        let alloc = |p: Option<crate::case::Place>| p.map(|p| stream.alloc(p.bytes())).transpose();
        Ok([alloc(cols)?, alloc(rows)?, alloc(residual)?, alloc(second)?])
    }

    /// Addresses of the first elements.
    pub fn addresses(&self, case: &Case) -> [u64; 3] {
        let at = |buffer: &Buffer, place: &crate::case::Place| {
            buffer.address() + place.offset * place.dtype.size() as u64
        };
        [at(&self.a, &case.a), at(&self.b, &case.b), at(&self.c, &case.c)]
    }
}

/// The device as our planner sees it: the constants of the model are those of a known machine of its compute capability,
/// the counts the driver's.
pub fn planner_gpu(gpu: &Gpu) -> tilewright_target::Gpu {
    let properties = gpu.properties();
    tilewright_target::Gpu {
        name: properties.name.clone(),
        sms: properties.sm_count,
        l2_bytes: properties.l2_bytes,
        ..tilewright_target::Gpu::of_capability(properties.major * 10 + properties.minor)
    }
}

/// The device that a loader's kernels are planned for: its own, or one of the capability that it compiles for.
pub fn planner_for(loader: &Loader) -> tilewright_target::Gpu {
    let (own, target) = (loader.gpu().arch(), loader.target());
    let real = planner_gpu(loader.gpu());
    if own == target {
        return real;
    }
    let known = tilewright_target::Gpu::of_capability(target.major() * 10 + target.minor());
    tilewright_target::Gpu { name: real.name, sms: real.sms, l2_bytes: real.l2_bytes, ..known }
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
    workspace: Arc<Buffer>,
}

impl Ours {
    /// Lowers, compiles (or finds) and loads a candidate.
    pub fn load(loader: &Loader, stream: &Stream, candidate: &Candidate) -> Result<Ours> {
        let context = |e: Error| e.with_context(format!("schedule {}", describe(candidate)));
        let programs = programs(candidate).map_err(context)?;
        let kernels =
            loader.load_all(&programs).into_iter().collect::<Result<_>>().map_err(context)?;
        let workspace = Arc::new(stream.alloc(candidate.workspace_bytes as usize)?);
        Ok(Ours { candidate: candidate.clone(), kernels, workspace })
    }

    /// What was loaded.
    pub fn candidate(&self) -> &Candidate {
        &self.candidate
    }

    /// Binds a set of matrices.
    pub fn bind<'a>(&self, case: &Case, matrices: &'a Matrices) -> Result<BoundOurs<'a>> {
        let [a, b, c] = matrices.addresses(case);
        let rest = |buffer: &Buffer, start: u64| Operand {
            address: start,
            bytes: (buffer.address() + buffer.len() as u64).saturating_sub(start),
        };
        let extra = |i: usize, first: u64| {
            let buffer = matrices.extras[i].as_ref();
            let buffer = buffer.ok_or_else(|| Error::bug("an ending reads what is not there"))?;
            let size = case.extras()[i].map_or(1, |p| p.dtype.size()) as u64;
            Ok(rest(buffer, buffer.address() + first * size))
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
                    Place::B2 => {
                        let apart = case.second_at() * case.b.dtype.size() as u64;
                        Ok(rest(&matrices.b, b + apart))
                    }
                    Place::Cols2 => extra(3, 0),
                    Place::Cols => extra(0, 0),
                    Place::Rows => extra(1, 0),
                    Place::Residual => extra(2, case.c.offset),
                    Place::Depth(_) | Place::Parts => Err(Error::bug("a plain product")),
                })
                .collect::<Result<Vec<_>>>()?;
            kernel.bind(&step.sizes, &operands)
        };
        let steps =
            self.candidate.steps.iter().zip(&self.kernels).map(bind).collect::<Result<_>>()?;
        Ok(BoundOurs { steps, _workspace: self.workspace.clone(), _matrices: PhantomData })
    }
}

/// A plan, bound to a set of matrices.
#[derive(Debug)]
pub struct BoundOurs<'a> {
    steps: Vec<BoundKernel>,
    _workspace: Arc<Buffer>,
    _matrices: PhantomData<&'a Matrices>,
}

impl BoundOurs<'_> {
    /// Puts the steps into the stream, the one that the matrices were allocated on.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        for step in &self.steps {
            // SAFETY: matrices and workspace are there until this has run (the module's head).
            unsafe { step.launch(stream)? };
        }
        Ok(())
    }
}

/// Products in a row, recorded, so that the host's launches cost nothing. What was launched while
/// recording is borrowed.
#[derive(Debug)]
pub struct Pass<'a> {
    graph: GraphExec,
    _recorded: PhantomData<&'a ()>,
}

impl<'a> Pass<'a> {
    /// Records `launch(0)`, `launch(1)`, ... `launch(count - 1)`.
    pub fn record(
        stream: &Stream,
        count: usize,
        launch: impl Fn(usize) -> Result<()> + 'a,
    ) -> Result<Pass<'a>> {
        let graph = stream.capture(|_| (0..count).try_for_each(&launch))?.instantiate()?;
        Ok(Pass { graph, _recorded: PhantomData })
    }

    /// Runs them.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: what was recorded came from `BoundOurs::launch` and `Peer::launch`, whose matrices,
        // workspaces and kernels are borrowed as long as this is there (and see the module's head).
        unsafe { self.graph.launch(stream) }
    }
}

/// cuBLASLt with its algorithms for a case, and its workspace. An ending is a kernel of its own behind the product, one of
/// ours: as fast as memory, and what a framework that fuses elementwise operators would launch.
#[derive(Debug)]
pub struct Peer<'a> {
    spec: MatmulSpec,
    matmul: Matmul<'a>,
    workspace: &'a Buffer,
    ending: Option<(Step, LoadedKernel)>,
}

impl<'a> Peer<'a> {
    /// Asks for algorithms. `workspace` has [`PEER_WORKSPACE_BYTES`].
    ///
    /// # Errors
    /// Unsupported when cuBLASLt has none, and for endings of results that are not row-major or of batches.
    pub fn new(
        peer: &'a CublasLt,
        loader: &Loader,
        case: &Case,
        workspace: &'a Buffer,
    ) -> Result<Peer<'a>> {
        let spec = case.of_peer();
        let matmul = peer.matmul(&spec, workspace.len(), PEER_ALGORITHMS)?;
        let ending = (case.ending != Ending::Plain).then(|| ending_step(case)).transpose()?;
        let ending = match ending {
            Some(step) => {
                let kernel = loader.load(&lower(&step.kernel, &step.schedule)?)?;
                Some((step, kernel))
            }
            None => None,
        };
        Ok(Peer { spec, matmul, workspace, ending })
    }

    /// How many algorithms there are.
    pub fn algorithms(&self) -> usize {
        self.matmul.algorithms()
    }

    /// Bytes of workspace that an algorithm uses.
    pub fn workspace_bytes(&self, algorithm: usize) -> usize {
        self.matmul.algorithm(algorithm).map_or(0, |(bytes, _)| bytes)
    }

    /// Puts a product into the stream, the one that the matrices were allocated on.
    ///
    /// # Errors
    /// A bug when the matrices are too short.
    pub fn launch(
        &self,
        algorithm: usize,
        stream: &Stream,
        case: &Case,
        matrices: &Matrices,
    ) -> Result<()> {
        let needed = self.spec.m * self.spec.n * u64::from(self.spec.batch);
        let needed = needed as usize * self.spec.result.size();
        let sums = matrices.sums.as_ref().filter(|sums| sums.len() >= needed);
        let long_enough = case.of_peer() == self.spec
            && matrices.a.len() >= case.a.bytes()
            && matrices.b.len() >= case.right_bytes()
            && matrices.c.len() >= case.c.bytes()
            && (self.ending.is_none() || sums.is_some());
        if !long_enough {
            return Err(Error::bug("matrices of another product"));
        }
        let [a, b, c] = matrices.addresses(case);
        let to = match (&self.ending, sums) {
            (Some(_), Some(sums)) => sums.address(),
            _ => c,
        };
        // SAFETY: the matrices lie in their buffers as the case says, which was what cuBLASLt was
        // told, and are there until this has run (the module's head); all work goes to one stream, so
        // that the workspace has one user at a time.
        unsafe { self.matmul.run(algorithm, stream, [a, b, to], self.workspace)? };
        let (Some((step, kernel)), Some(sums)) = (&self.ending, sums) else { return Ok(()) };
        let second = case.n * self.spec.result.size() as u64;
        let extra = |i: usize| {
            let buffer = matrices.extras[i].as_ref();
            let buffer = buffer.ok_or_else(|| Error::bug("an ending reads what is not there"))?;
            Ok(Operand { address: buffer.address(), bytes: buffer.len() as u64 })
        };
        let rest = |buffer: &Buffer, skip: u64| Operand {
            address: buffer.address() + skip,
            bytes: buffer.len() as u64 - skip,
        };
        let operand = |place: &Place| match place {
            Place::A => Ok(rest(sums, 0)),
            Place::B2 => Ok(rest(sums, second)),
            Place::C => Ok(rest(&matrices.c, 0)),
            Place::Cols => extra(0),
            Place::Rows => extra(1),
            Place::Residual => extra(2),
            Place::Cols2 => extra(3),
            Place::B | Place::Depth(_) | Place::Parts | Place::Workspace { .. } => {
                Err(Error::bug("an ending of products"))
            }
        };
        let operands = step.operands.iter().map(operand).collect::<Result<Vec<_>>>()?;
        let bound = kernel.bind(&step.sizes, &operands)?;
        // SAFETY: as above; the kernel's tensors were bound to their buffers.
        unsafe { bound.launch(stream) }
    }
}

/// The kernel that follows a product without an ending: its sums stand for `A` and, of a pair, for `B2`.
fn ending_step(case: &Case) -> Result<Step> {
    let dense = case.c == Lies::dense(case.c.dtype, Order::Row, case.m, case.n, 1);
    let joined = case.b.order == Order::Col
        && case.b == Lies::dense(case.b.dtype, Order::Col, case.k, case.n, 1)
        && case.second_at() == case.n * case.k;
    if !dense || (case.ending.is_pair() && !joined) {
        return Err(Error::unsupported("an ending behind a product that does not lie densely"));
    }
    let problem = case.problem();
    let kernel = problem.spec().apart_program("ending", case.numbers.result);
    let n = case.n as i64;
    let lds = (case.n * case.rights()) as i64;
    let sizes: tilewright_layout::Env = [("M", case.m as i64), ("N", n), ("lds", lds), ("ldc", n)]
        .into_iter()
        .map(|(name, size)| (Arc::from(name), size))
        .collect();
    let size = |name: &str| sizes.get(name).copied();
    let aligned = 16 / case.numbers.result.size().max(case.c.dtype.size()) as i64;
    let schedule = GpuSchedule::lines_for_addresses(&kernel, Arch::Sm90a, &size, aligned)?
        .ok_or_else(|| Error::bug("no schedule for an ending"))?;
    let mut operands = vec![Place::A];
    operands.extend(case.ending.is_pair().then_some(Place::B2));
    let [cols, rows, residual, second] = case.extras().map(|p| p.is_some());
    let list = [
        (cols, Place::Cols),
        (second, Place::Cols2),
        (rows, Place::Rows),
        (residual, Place::Residual),
    ];
    operands.extend(list.into_iter().filter(|(there, _)| *there).map(|(_, place)| place));
    operands.push(Place::C);
    Ok(Step { kernel, schedule, sizes, operands })
}
