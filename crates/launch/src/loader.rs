//! [`Loader`]: programs to loaded kernels, once each; [`LoadedKernel`]: ready to be bound.

use crate::arguments::{Operand, Value, arguments};
use crate::fallback::{Taken, first_that_works};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tilewright_base::{Error, Result};
use tilewright_cuda::{
    Arch, Args, CompileRequest, Compiled, Function, Gpu, LaunchShape, Nvrtc, PreparedLaunch,
    Stream, TensorMap, TensorMapSpec,
};
use tilewright_device::{Program, Stmt};
use tilewright_emit_cuda::{Argument, COMPILER_OPTIONS, Source, emit, headers};
use tilewright_layout::Env;

/// Compiles and loads programs for one device, and remembers what came of each.
pub struct Loader {
    gpu: Gpu,
    nvrtc: Nvrtc,
    /// What is compiled for.
    target: Arch,
    /// Looked up only, never iterated.
    known: Mutex<HashMap<Program, Result<LoadedKernel>>>,
    /// Compiled and not loaded yet; looked up only.
    ahead: Mutex<HashMap<Program, Result<Compiled>>>,
    /// How many programs are still to be spoiled ([`FAIL_FIRST`]).
    to_fail: AtomicUsize,
}

/// Environment variable: so many programs, the first that are loaded, get a text that does not compile. For trying out
/// what happens then.
pub const FAIL_FIRST: &str = "TILEWRIGHT_FAIL_FIRST";

impl Loader {
    /// A loader for a device.
    pub fn new(gpu: Gpu, nvrtc: Nvrtc) -> Loader {
        let to_fail = std::env::var(FAIL_FIRST).ok().and_then(|v| v.parse().ok()).unwrap_or(0);
        let to_fail = AtomicUsize::new(to_fail);
        let target = gpu.arch();
        Loader { gpu, nvrtc, target, known: Mutex::default(), ahead: Mutex::default(), to_fail }
    }

    /// The same for code of another architecture, which the device must run or translate: an earlier one without a letter.
    ///
    /// # Errors
    /// The user's for one that it does neither with.
    pub fn for_target(self, target: Arch) -> Result<Loader> {
        let device = self.gpu.properties();
        let (major, minor) = (device.major, device.minor);
        if !target.runs_on(major, minor) && !target.translates_to(major, minor) {
            let message = format!("{} does not run code for {target}", device.name);
            return Err(Error::user(message)
                .with_hint(format!("it runs {}, and sm_80 to sm_{major}{minor}", device.arch())));
        }
        Ok(Loader { target, ..self })
    }

    /// The architecture that is compiled for.
    pub fn target(&self) -> Arch {
        self.target
    }

    /// The same with so many programs spoiled, the first that are loaded, as [`FAIL_FIRST`] asks for.
    #[must_use]
    pub fn failing_first(self, programs: usize) -> Loader {
        Loader { to_fail: AtomicUsize::new(programs), ..self }
    }

    /// The program's text, spoiled if that was asked for.
    fn text(&self, program: &Program) -> Result<Source> {
        let mut source = emit(program)?;
        let one_less = |n: usize| n.checked_sub(1);
        if self.to_fail.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            source.text = format!("#error \"{FAIL_FIRST} is set\"\n{}", source.text);
        }
        Ok(source)
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The compiler.
    pub fn nvrtc(&self) -> &Nvrtc {
        &self.nvrtc
    }

    /// A program, compiled and loaded. The second time it is only looked up.
    ///
    /// # Errors
    /// What cannot be emitted is unsupported; what does not compile or load is a bug, with the folder
    /// of source and log.
    pub fn load(&self, program: &Program) -> Result<LoadedKernel> {
        let mut all = self.load_all(std::slice::from_ref(program));
        all.pop().unwrap_or_else(|| Err(Error::bug("a program was not loaded")))
    }

    /// Compiles a program on this thread and keeps the result for [`Loader::load`]. Nothing is asked of the device, which
    /// may be measuring.
    ///
    /// # Errors
    /// As [`Loader::load`], which will say the same.
    pub fn compile(&self, program: &Program) -> Result<()> {
        let lock = || self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_compiled(program) {
            return Ok(());
        }
        let source = emit(program)?;
        let compiled = self.nvrtc.compile(&request(program, &source, self.target));
        let outcome = compiled.as_ref().map(|_| ()).map_err(Clone::clone);
        lock().insert(program.clone(), compiled);
        outcome
    }

    fn is_compiled(&self, program: &Program) -> bool {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).contains_key(program)
            || self.ahead.lock().unwrap_or_else(PoisonError::into_inner).contains_key(program)
    }

    /// Compiles programs on all processors and keeps the results for [`Loader::load_all`], as [`Loader::compile`] does. What
    /// does not compile is said there.
    pub fn compile_all(&self, programs: &[Program]) {
        // Programs that are to be spoiled are, when they are loaded.
        if self.to_fail.load(Ordering::Relaxed) > 0 {
            return;
        }
        let mut fresh: Vec<(&Program, Source)> = Vec::new();
        for program in programs {
            if self.is_compiled(program) {
                continue;
            }
            if !fresh.iter().any(|(p, _)| *p == program)
                && let Ok(source) = emit(program)
            {
                fresh.push((program, source));
            }
        }
        let requests: Vec<CompileRequest> =
            fresh.iter().map(|(program, source)| request(program, source, self.target)).collect();
        let compiled = self.nvrtc.compile_all(&requests, processors());
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        for ((program, _), compiled) in fresh.into_iter().zip(compiled) {
            // Somebody else may have loaded it meanwhile.
            if !known.contains_key(program) {
                ahead.insert(program.clone(), compiled);
            }
        }
    }

    /// Loads programs, compiling on all processors. Result `i` belongs to program `i`.
    pub fn load_all(&self, programs: &[Program]) -> Vec<Result<LoadedKernel>> {
        let mut fresh: Vec<(&Program, Result<Source>)> = Vec::new();
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            for program in programs {
                if !known.contains_key(program) && !fresh.iter().any(|(p, _)| *p == program) {
                    fresh.push((program, self.text(program)));
                }
            }
        }
        let mut ahead: Vec<Option<Result<Compiled>>> = {
            let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            fresh.iter().map(|(program, _)| ahead.remove(*program)).collect()
        };
        let requests: Vec<CompileRequest> = fresh
            .iter()
            .zip(&ahead)
            .filter(|(_, ahead)| ahead.is_none())
            .filter_map(|((program, source), _)| {
                source.as_ref().ok().map(|s| request(program, s, self.target))
            })
            .collect();
        let mut compiled = self.nvrtc.compile_all(&requests, processors()).into_iter();
        for ((program, source), ahead) in fresh.into_iter().zip(&mut ahead) {
            let loaded = source.and_then(|source| {
                let compiled = ahead.take().or_else(|| compiled.next());
                let compiled =
                    compiled.unwrap_or_else(|| Err(Error::bug("a program was not compiled")))?;
                self.finish(program, source, compiled)
            });
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(program.clone(), loaded);
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = || Err(Error::bug("a program was not loaded"));
        programs.iter().map(|p| known.get(p).cloned().unwrap_or_else(missing)).collect()
    }

    /// The first program that loads and with which `attempt` (binding, a launch) succeeds.
    ///
    /// # Errors
    /// As [`first_that_works`].
    pub fn load_or_next<T>(
        &self,
        programs: impl IntoIterator<Item = Result<Program>>,
        mut attempt: impl FnMut(&LoadedKernel) -> Result<T>,
    ) -> Result<Taken<T>> {
        first_that_works(programs, |program| attempt(&self.load(&program?)?))
    }

    fn finish(
        &self,
        program: &Program,
        source: Source,
        compiled: Compiled,
    ) -> Result<LoadedKernel> {
        let function = self.gpu.load(&compiled)?.function(&source.entry)?;
        let shape = LaunchShape {
            grid: [1; 3],
            block: [source.threads, 1, 1],
            cluster: [source.cluster, 1, 1],
            smem_bytes: source.smem_bytes,
            programmatic: waits_for_the_grid_before(program),
            cooperative: false,
        };
        let clusters_at_once = function.max_active_clusters(&shape)?;
        if clusters_at_once == 0 {
            return Err(Error::unsupported(format!(
                "no cluster of {} blocks of {} threads with {} bytes of shared memory fits {}",
                source.cluster,
                source.threads,
                source.smem_bytes,
                self.gpu.properties().name
            )));
        }
        let program = program.clone();
        let inner = Inner { program, source, function, compiled, shape, clusters_at_once };
        Ok(LoadedKernel(Arc::new(inner)))
    }
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loader({:?})", self.gpu)
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the compiler is asked for: the program's text, the device library, and how arithmetic is meant.
pub fn request(program: &Program, source: &Source, arch: Arch) -> CompileRequest {
    let request = CompileRequest::new(program.name.clone(), source.text.clone(), arch);
    let request = COMPILER_OPTIONS.iter().fold(request, |request, option| request.option(*option));
    headers().iter().fold(request, |request, (name, text)| request.header(*name, *text))
}

/// Whether a program is made to start beside the tail of the kernel before it.
fn waits_for_the_grid_before(program: &Program) -> bool {
    fn any(stmts: &[Stmt]) -> bool {
        stmts.iter().any(|stmt| match stmt {
            Stmt::GridWait => true,
            Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => any(body),
            Stmt::If { then, otherwise, .. } => any(then) || any(otherwise),
            _ => false,
        })
    }
    any(&program.setup)
        || program.roles.iter().any(|role| any(&role.body))
        || any(&program.teardown)
}

/// A program on a device. Cheap to clone.
#[derive(Clone)]
pub struct LoadedKernel(Arc<Inner>);

struct Inner {
    program: Program,
    source: Source,
    function: Function,
    compiled: Compiled,
    /// With a grid of one block.
    shape: LaunchShape,
    clusters_at_once: u32,
}

impl LoadedKernel {
    /// The program.
    pub fn program(&self) -> &Program {
        &self.0.program
    }

    /// Its text and what it passes.
    pub fn source(&self) -> &Source {
        &self.0.source
    }

    /// What the compiler said, and where it keeps the files.
    pub fn compiled(&self) -> &Compiled {
        &self.0.compiled
    }

    /// Clusters that the device runs at once.
    pub fn clusters_at_once(&self) -> u32 {
        self.0.clusters_at_once
    }

    /// Binds sizes and operands, one per parameter of the program in order.
    ///
    /// # Errors
    /// A bug when they do not fit the program; unsupported, in words, when the copy engine cannot
    /// address a tensor as it lies.
    pub fn bind(&self, sizes: &Env, operands: &[Operand]) -> Result<BoundKernel> {
        let Inner { program, source, function, shape, clusters_at_once, .. } = &*self.0;
        let bound = arguments(program, &source.arguments, sizes, operands)?;
        if bound.items == 0 {
            return Ok(BoundKernel { launch: None, shape: None, movable: Vec::new() });
        }
        let mut args = Args::new();
        let mut movable = Vec::new();
        for (index, (value, argument)) in bound.values.iter().zip(&source.arguments).enumerate() {
            args = match value {
                Value::Map(spec) => args.value(TensorMap::encode(function.gpu(), spec)?),
                Value::Pointer(address) => args.value(*address),
                Value::Size(size) => args.value(*size),
            };
            let (operand, map) = match (argument, value) {
                (Argument::Map(id), Value::Map(spec)) => {
                    let operand = program.maps[*id].param.index();
                    let from_start = spec.address.wrapping_sub(operands[operand].address);
                    (operand, Some((Box::new(spec.clone()), from_start)))
                }
                (Argument::Pointer(id), _) => (id.index(), None),
                _ => continue,
            };
            movable.push(Movable { index, operand, map });
        }
        let blocks = program.grid_blocks(bound.items, u64::from(*clusters_at_once));
        let blocks = u32::try_from(blocks).map_err(|_| {
            Error::unsupported(format!(
                "{} needs {blocks} blocks: more than a grid has",
                program.name
            ))
        })?;
        let shape = LaunchShape { grid: [blocks, 1, 1], ..*shape };
        let launch = Some(function.prepare(&shape, &args)?);
        Ok(BoundKernel { launch, shape: Some(shape), movable })
    }
}

impl fmt::Debug for LoadedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LoadedKernel({})", self.0.program.name)
    }
}

/// A kernel with sizes and operands: a launch is one call of the driver, or none when there is
/// nothing to compute.
#[derive(Debug)]
pub struct BoundKernel {
    pub(crate) launch: Option<PreparedLaunch>,
    /// That of the launch.
    pub(crate) shape: Option<LaunchShape>,
    /// What depends on where operands lie.
    pub(crate) movable: Vec<Movable>,
}

/// An argument that follows from the address of an operand.
#[derive(Debug)]
pub(crate) struct Movable {
    /// Number of the argument.
    pub(crate) index: usize,
    /// Number of the operand.
    pub(crate) operand: usize,
    /// The tensor map to encode again, and how far behind the operand's start it begins.
    pub(crate) map: Option<(Box<TensorMapSpec>, u64)>,
}

impl BoundKernel {
    /// Moves the operands: the sizes stay, `addresses` has the new place of each. They must be as long and as aligned
    /// as those that it was bound with.
    ///
    /// # Errors
    /// The driver's, for tensor maps.
    pub fn move_to(&mut self, addresses: &[u64]) -> Result<()> {
        let Some(launch) = &mut self.launch else { return Ok(()) };
        for Movable { index, operand, map } in &mut self.movable {
            let Some(&address) = addresses.get(*operand) else {
                return Err(Error::bug(format!("no address for operand {operand}")));
            };
            match map {
                None => launch.set_arg(*index, &address.to_le_bytes())?,
                Some((spec, from_start)) => {
                    let address = address.wrapping_add(*from_start);
                    if spec.address != address {
                        spec.address = address;
                        let map = TensorMap::encode(launch.function().gpu(), spec)?;
                        launch.set_arg(*index, map.bytes())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Puts the launch into the stream.
    ///
    /// # Safety
    /// The memory of the operands is there, and used by nobody else in another order than the
    /// stream's, until the kernel has run (and as long as a recording of it is in use).
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        match &self.launch {
            // SAFETY: the arguments are those that the program's text takes (`arguments` worked them
            // out from it), a verified program stays inside its tensors, those lie inside the
            // operands (`arguments` checked it), and the operands are the caller's promise. A kernel that was kept has the
            // machine code and the arguments that were worked out so, with the addresses that `move_to` put in.
            Some(launch) => unsafe { launch.launch(stream) },
            None => Ok(()),
        }
    }

    /// The launch as the driver takes it; none when there is nothing to compute.
    pub fn prepared(&self) -> Option<&PreparedLaunch> {
        self.launch.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_base::DType;
    use tilewright_kernels::gemm::GemmSpec;
    use tilewright_lower_gpu::{GpuSchedule, lower};

    #[test]
    fn what_the_compiler_is_asked_for_compiles_as_it_is_passed() {
        let nvrtc = match Nvrtc::open(None) {
            Ok(nvrtc) => nvrtc,
            Err(error) => {
                let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
                assert!(!required, "{error:?}");
                println!("skipped: no NVRTC");
                return;
            }
        };
        let kernel = GemmSpec::plain(DType::BF16, DType::F32, DType::BF16).program("gemm");
        let schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", 64)]);
        let program = lower(&kernel, &schedule).unwrap();
        let source = emit(&program).unwrap();
        let compiled = nvrtc.compile(&request(&program, &source, Arch::SM_90A)).unwrap();
        let kernel = compiled.resources(&source.entry).unwrap();
        assert!(kernel.is_kernel, "{kernel:?}");
    }

    #[test]
    fn only_dependent_programs_start_early() {
        let kernel = GemmSpec::plain(DType::BF16, DType::F32, DType::BF16).program("gemm");
        let mut schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", 64)]);
        assert!(!waits_for_the_grid_before(&lower(&kernel, &schedule).unwrap()));
        schedule.dependent = true;
        assert!(waits_for_the_grid_before(&lower(&kernel, &schedule).unwrap()));
    }
}
