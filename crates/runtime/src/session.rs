//! [`Executable`] and [`Session`]: a compiled plan, and one caller's means to run it.

use crate::clock::Watch;
use crate::constants::{Constant, constants};
use crate::float_mode::FloatMode;
use crate::images::{BoundRun, Inside, run_images};
use crate::in_place::{join_in_place, shareable};
use crate::memory::AlignedBuffer;
use crate::pack::unpack;
use crate::pool::Pool;
use crate::states::Kept;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tilewright_base::{DType, Error, Result, ResultExt};
use tilewright_data::{Bytes, Tensor, check_memory, element_count};
use tilewright_jit::Library;
use tilewright_layout::{Dim, Env};
use tilewright_plan::arena::{ArenaPlan, Live};
use tilewright_plan::bind::{bind_shape, bind_symbols, concrete, eval_all, has_unbacked};
use tilewright_plan::{Buffer, BufferId, HostCall, KernelId, Plan, Step, Storage};
use tilewright_tile::{Kernel, ParamId, Schedule};

/// A compiled kernel: `(buffers, sizes, first block, one past the last block, scratch)`.
///
/// It runs blocks `first..last` of the linearised grid, the last grid axis fastest. `buffers` has
/// one base address per parameter, `sizes` one value per symbol of the kernel, `scratch` is
/// private to the thread and aligned to 64 bytes.
pub(crate) type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

/// [`KernelFn`] in LLVM's words.
const KERNEL_SIGNATURE: &str = "void (ptr, ptr, i64, i64, ptr)";

/// Machine code of one kernel.
#[derive(Clone)]
pub struct Code {
    entry: KernelFn,
    scratch_bytes: usize,
    number: usize,
    mode: FloatMode,
    /// Keeps the code mapped.
    library: Arc<Library>,
}

impl Code {
    /// Function `number` of a library, a kernel that takes `scratch_bytes` of scratch. Errors when
    /// there is no such function or it is not a kernel.
    pub fn from_library(
        library: &Arc<Library>,
        number: usize,
        scratch_bytes: usize,
    ) -> Result<Code> {
        let address = entry(library, number, KERNEL_SIGNATURE)?;
        // SAFETY: the function has the parameters and the result of `KernelFn` (checked above), and
        // `library` keeps it mapped. That it stays inside its buffers and its scratch is the
        // contract of the emitter, whose texts are all that this process compiles.
        let entry = unsafe { std::mem::transmute::<*const (), KernelFn>(address) };
        let mode = FloatMode::Default;
        Ok(Code { entry, scratch_bytes, number, mode, library: library.clone() })
    }

    /// As the code of this kernel.
    fn of_kernel(self, kernel: &Kernel) -> Result<Code> {
        if self.name() != kernel.name {
            let name = self.name();
            return Err(Error::bug(format!("the code of {name} for kernel {}", kernel.name)));
        }
        Ok(Code { mode: FloatMode::of(kernel), ..self })
    }

    /// The name of the function.
    fn name(&self) -> &str {
        self.library.prototype(self.number).map_or("", |p| &p.name)
    }
}

/// The address of function `number`, which must have this signature.
pub(crate) fn entry(library: &Library, number: usize, signature: &str) -> Result<*const ()> {
    let Some(prototype) = library.prototype(number) else {
        return Err(Error::bug(format!("function {number} of a library of {}", library.len())));
    };
    if prototype.signature != signature {
        return Err(Error::bug(format!(
            "function {} is `{}` where `{signature}` is called",
            prototype.name, prototype.signature
        )));
    }
    Ok(library.address(number))
}

/// A plan with code for its kernels and its constants in place.
pub struct Executable {
    plan: Plan,
    code: Vec<Code>,
    constants: Arc<Vec<Option<Constant>>>,
    /// For each kernel, the parameters that may share memory: operand and result.
    shareable: Vec<Vec<(ParamId, ParamId)>>,
    in_place: bool,
    pool: Arc<Pool>,
}

impl Executable {
    /// Packs the constants. `code` has an entry per kernel of the plan, in order.
    pub fn new(plan: Plan, code: Vec<Code>, pool: Arc<Pool>) -> Result<Executable> {
        if code.len() != plan.kernels.len() {
            return Err(Error::bug(format!(
                "{} codes for {} kernels",
                code.len(),
                plan.kernels.len()
            )));
        }
        let kernels = plan.kernels.iter().map(|(_, planned)| &planned.kernel);
        let code = code.into_iter().zip(kernels).map(|(code, kernel)| code.of_kernel(kernel));
        let code = code.collect::<Result<_>>()?;
        let constants = Arc::new(constants(&plan, &pool)?);
        let shareable = plan.kernels.iter().map(|(_, k)| shareable(&k.kernel)).collect();
        Ok(Executable { plan, code, constants, shareable, in_place: true, pool })
    }

    /// The same plan with other schedules and their code, an entry per kernel. Constants stay where they are.
    pub fn rescheduled(&self, schedules: Vec<Schedule>, code: Vec<Code>) -> Result<Executable> {
        let mut plan = self.plan.clone();
        if schedules.len() != plan.kernels.len() || code.len() != plan.kernels.len() {
            return Err(Error::bug("schedules and codes for another number of kernels"));
        }
        let ids: Vec<KernelId> = plan.kernels.ids().collect();
        let mut of_kernels = Vec::with_capacity(code.len());
        for ((id, schedule), code) in ids.into_iter().zip(schedules).zip(code) {
            let planned = &mut plan.kernels[id];
            of_kernels.push(code.of_kernel(&planned.kernel)?);
            planned.schedule = schedule;
        }
        let (constants, shareable) = (self.constants.clone(), self.shareable.clone());
        let (code, pool) = (of_kernels, self.pool.clone());
        Ok(Executable { plan, code, constants, shareable, in_place: self.in_place, pool })
    }

    /// The code of each kernel.
    pub fn code(&self) -> &[Code] {
        &self.code
    }

    pub(crate) fn code_of(&self, kernel: KernelId) -> &Code {
        &self.code[kernel.index()]
    }

    /// With `false`, every intermediate has memory of its own, also where a kernel could write its
    /// result over an operand that nobody reads again.
    pub fn with_in_place(self, in_place: bool) -> Executable {
        Executable { in_place, ..self }
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The threads it runs on.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

/// Where an argument lies.
#[derive(Clone, Copy, Debug)]
enum Slot {
    Input(usize),
    Output(usize),
    Arena(usize),
    Fixed(usize),
    State(usize),
}

pub(crate) enum BoundStep {
    Launch { kernel: KernelId, args: Vec<BufferId>, sizes: Vec<i64>, blocks: i64 },
    Host { step: usize },
}

/// A plan with all sizes known.
pub(crate) struct Bound {
    key: Vec<i64>,
    /// Whether runs of steps go image by image.
    by_image: bool,
    env: Env,
    slots: Vec<Slot>,
    /// Concrete shape and bytes of each buffer.
    shapes: Vec<Vec<usize>>,
    arena: ArenaPlan,
    /// Size of the arena if no result lay over an operand.
    apart_bytes: usize,
    pub(crate) steps: Vec<BoundStep>,
    runs: Vec<BoundRun>,
    output_shapes: Vec<Vec<usize>>,
}

/// Time that one step took.
#[derive(Clone, Copy, Debug)]
pub struct StepTime {
    /// Number of the step in the plan.
    pub step: usize,
    /// Wall time; with one thread, that thread's time on a processor.
    pub time: Duration,
}

/// Memory of a bound plan.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryReport {
    /// Size of the arena.
    pub arena_bytes: usize,
    /// Size of the arena if no kernel wrote its result over an operand.
    pub apart_bytes: usize,
    /// What one allocation per intermediate would take.
    pub naive_bytes: usize,
    /// Constants used in place, as they lie in the file.
    pub shared_constant_bytes: usize,
    /// Constants copied into another layout.
    pub packed_constant_bytes: usize,
    /// Scratch of all threads together.
    pub scratch_bytes: usize,
}

/// One caller's means to run an [`Executable`]: arena, scratch, argument tables.
pub struct Session {
    pub(crate) exe: Arc<Executable>,
    arena: AlignedBuffer,
    scratch: Vec<AlignedBuffer>,
    pub(crate) states: Vec<Kept>,
    /// Most recently used last; few, because callers use few sizes.
    bound: Vec<Bound>,
    pointers: Vec<*mut u8>,
}

// SAFETY: the pointers in `pointers` are scratch space, rewritten before each use.
unsafe impl Send for Session {}

/// A tensor for an output.
fn output(dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let bytes = element_count(shape).ok().and_then(|n| dtype.bytes_for(n)).unwrap_or(usize::MAX);
    check_memory(bytes, "an output")?;
    Tensor::zeros(dtype, shape)
}

/// How many sizes a session remembers.
const MAX_BOUND: usize = 16;

impl Session {
    /// A session on `exe`, with scratch for each thread.
    pub fn new(exe: Arc<Executable>) -> Result<Session> {
        let scratch_bytes = exe.code.iter().map(|c| c.scratch_bytes).max().unwrap_or(0);
        let scratch = (0..exe.pool.threads())
            .map(|_| AlignedBuffer::new(scratch_bytes, "scratch memory"))
            .collect::<Result<Vec<_>>>()?;
        let arena = AlignedBuffer::new(0, "the arena")?;
        let states = Vec::new();
        Ok(Session { exe, arena, scratch, states, bound: Vec::new(), pointers: Vec::new() })
    }

    /// The executable.
    pub fn executable(&self) -> &Arc<Executable> {
        &self.exe
    }

    /// Runs with these inputs, in the plan's order, and returns the outputs.
    pub fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.run_with(inputs, None)
    }

    /// As [`Session::run`], and adds the time of each step.
    pub fn run_timed(
        &mut self,
        inputs: &[Tensor],
        times: &mut Vec<StepTime>,
    ) -> Result<Vec<Tensor>> {
        self.run_with(inputs, Some(times))
    }

    fn run_with(
        &mut self,
        inputs: &[Tensor],
        times: Option<&mut Vec<StepTime>>,
    ) -> Result<Vec<Tensor>> {
        let env = bind_symbols(&self.exe.plan, inputs)?;
        if has_unbacked(&self.exe.plan, &env) {
            return self.run_dynamic(inputs, env, times);
        }
        let at = self.bind(&env, true)?;
        let mut outputs = Vec::with_capacity(self.exe.plan.outputs.len());
        for ((_, dtype, _), shape) in
            self.exe.plan.outputs.iter().zip(&self.bound[at].output_shapes)
        {
            outputs.push(output(*dtype, shape)?);
        }
        self.execute(at, inputs, &mut outputs, times, None)?;
        Ok(outputs)
    }

    /// As [`Session::run`], and shows each buffer's contents (row-major) after the step that wrote
    /// it: for checking a plan kernel by kernel. Slow. Errors on plans with sizes that are only
    /// found while running.
    pub fn run_observed(
        &mut self,
        inputs: &[Tensor],
        observe: &mut dyn FnMut(usize, BufferId, Tensor),
    ) -> Result<Vec<Tensor>> {
        let env = bind_symbols(&self.exe.plan, inputs)?;
        if has_unbacked(&self.exe.plan, &env) {
            return Err(Error::unsupported("observing a model whose sizes depend on its data"));
        }
        let at = self.bind(&env, false)?;
        let mut outputs = Vec::new();
        for ((_, dtype, _), shape) in
            self.exe.plan.outputs.iter().zip(&self.bound[at].output_shapes)
        {
            outputs.push(output(*dtype, shape)?);
        }
        let mut failed = None;
        let exe = self.exe.clone();
        let mut after =
            |number: usize, bound: &Bound, arena: &AlignedBuffer, outputs: &[Tensor]| {
                let written: Vec<BufferId> = match &exe.plan.steps[number] {
                    Step::Library { outputs, .. } | Step::Host { outputs, .. } => outputs.clone(),
                    Step::Launch { kernel, args, .. } => {
                        let params = &exe.plan.kernels[*kernel].kernel.params;
                        let writes =
                            params.iter().map(|(_, p)| p.access != tilewright_tile::Access::In);
                        args.iter().zip(writes).filter(|(_, w)| *w).map(|(b, _)| *b).collect()
                    }
                };
                for b in written {
                    let bytes = match bound.slots[b.index()] {
                        Slot::Arena(offset) => &arena.bytes()[offset..],
                        Slot::Output(i) => outputs[i].bytes(),
                        Slot::Input(_) | Slot::Fixed(_) | Slot::State(_) => continue,
                    };
                    match unpack(bytes, &exe.plan.buffers[b], &bound.shapes[b.index()], &env) {
                        Ok(tensor) => observe(number, b, tensor),
                        Err(e) => failed = Some(e),
                    }
                }
            };
        self.execute(at, inputs, &mut outputs, None, Some(&mut after))?;
        match failed {
            Some(e) => Err(e),
            None => Ok(outputs),
        }
    }

    /// Runs into tensors that exist already, allocating nothing for sizes seen before. Errors when
    /// an output has another type or shape than the run gives.
    pub fn run_into(&mut self, inputs: &[Tensor], outputs: &mut [Tensor]) -> Result<()> {
        let env = bind_symbols(&self.exe.plan, inputs)?;
        if has_unbacked(&self.exe.plan, &env) {
            let results = self.run_dynamic(inputs, env, None)?;
            if results.len() != outputs.len() {
                return Err(Error::user(format!(
                    "{} outputs are given, the model has {}",
                    outputs.len(),
                    results.len()
                )));
            }
            outputs.clone_from_slice(&results);
            return Ok(());
        }
        let at = self.bind(&env, true)?;
        let expected = &self.bound[at].output_shapes;
        let fits = outputs.len() == expected.len()
            && outputs.iter().zip(expected).zip(&self.exe.plan.outputs).all(
                |((t, shape), (_, dtype, _))| t.shape() == shape.as_slice() && t.dtype() == *dtype,
            );
        if !fits {
            return Err(Error::user(
                "the given outputs do not have the types and shapes of the results",
            ));
        }
        self.execute(at, inputs, outputs, None, None)
    }

    /// The shapes of the outputs for these sizes, which need not follow from the inputs.
    pub fn output_shapes(&mut self, env: &Env) -> Result<Vec<Vec<usize>>> {
        let at = self.bind_given(env)?;
        Ok(self.bound[at].output_shapes.clone())
    }

    /// As [`Session::run_into`] with the sizes given by the caller, for plans whose symbols do not all
    /// occur as plain dimensions of an input. Adds the time of each step when `times` is given.
    pub fn run_sized(
        &mut self,
        env: &Env,
        inputs: &[Tensor],
        outputs: &mut [Tensor],
        times: Option<&mut Vec<StepTime>>,
    ) -> Result<()> {
        let at = self.bind_given(env)?;
        let plan = &self.exe.plan;
        if inputs.len() != plan.inputs.len() || outputs.len() != plan.outputs.len() {
            return Err(Error::user(format!(
                "{} inputs and {} outputs are given, the plan has {} and {}",
                inputs.len(),
                outputs.len(),
                plan.inputs.len(),
                plan.outputs.len()
            )));
        }
        let fits = |t: &Tensor, dtype: DType, dims: &[Dim]| {
            let same = |(d, &n): (&Dim, &usize)| d.eval(env) == Some(n as i64);
            t.dtype() == dtype
                && t.shape().len() == dims.len()
                && dims.iter().zip(t.shape()).all(same)
        };
        let given = inputs.iter().zip(&plan.inputs);
        let wanted = outputs.iter().zip(&plan.outputs);
        for (tensor, (name, dtype, dims)) in given.chain(wanted) {
            if !fits(tensor, *dtype, dims) {
                return Err(Error::user(format!(
                    "`{name}` is {}{:?}, which is not what the plan takes for these sizes",
                    tensor.dtype(),
                    tensor.shape()
                )));
            }
        }
        self.execute(at, inputs, outputs, times, None)
    }

    /// As [`Session::run_sized`] on bare addresses: `sizes` are the values of the plan's symbols, in order; inputs and
    /// outputs lie row-major where the addresses say. Nothing is allocated for sizes seen before. With `alone` the calling
    /// thread does it all: for work that is done before the others have woken up.
    ///
    /// # Errors
    /// The user's about the sizes; unsupported for plans with steps of the interpreter.
    ///
    /// # Safety
    /// Each address is that of a tensor of the type and shape that the plan has for these sizes, aligned to its elements. Inputs
    /// are not written to and outputs not used by anybody else while this runs, and outputs do not overlap with anything.
    pub unsafe fn run_at(
        &mut self,
        sizes: &[i64],
        inputs: &[usize],
        outputs: &[usize],
        alone: bool,
    ) -> Result<()> {
        let plan = &self.exe.plan;
        let counts = (sizes.len(), inputs.len(), outputs.len());
        if counts != (plan.symbols.len(), plan.inputs.len(), plan.outputs.len()) {
            return Err(Error::bug(format!("{counts:?} sizes, inputs and outputs for a plan")));
        }
        let at = match self.bound.iter().position(|b| b.by_image && b.key == sizes) {
            Some(at) => at,
            None => {
                let names = plan.symbols.iter().map(|s| s.name.clone());
                let env: Env = names.zip(sizes.iter().copied()).collect();
                self.bind_given(&env)?
            }
        };
        self.check_states(&self.bound[at].env)?;
        let Session { exe, arena, scratch, bound, pointers, states } = self;
        let bound = &bound[at];
        if bound.steps.iter().any(|s| matches!(s, BoundStep::Host { .. })) {
            return Err(Error::unsupported("a step of the interpreter on bare addresses"));
        }
        let address = |arg: &BufferId| match bound.slots[arg.index()] {
            Slot::Input(i) => inputs[i] as *mut u8,
            Slot::Output(i) => outputs[i] as *mut u8,
            // SAFETY: the arena plan keeps each offset plus size inside the arena.
            Slot::Arena(offset) => unsafe { arena.as_ptr().add(offset) },
            Slot::Fixed(address) => address as *mut u8,
            Slot::State(i) => states[i].memory.as_ptr(),
        };
        let mut next = 0;
        while let Some(step) = bound.steps.get(next) {
            pointers.clear();
            if let Some(run) = bound.run_at(next) {
                pointers
                    .extend(bound.steps[run.steps.clone()].iter().flat_map(args_of).map(address));
                run_images(exe, bound, run, pointers, scratch, [alone, false]);
                next = run.steps.end;
                continue;
            }
            next += 1;
            let BoundStep::Launch { kernel, args, sizes, blocks } = step else { continue };
            pointers.extend(args.iter().map(address));
            let pool = if alone { None } else { Some(&*exe.pool) };
            launch(exe.code_of(*kernel), pointers, sizes, 0..*blocks, scratch, pool);
        }
        Ok(())
    }

    /// The binding for sizes that a caller gives.
    fn bind_given(&mut self, env: &Env) -> Result<usize> {
        for symbol in &self.exe.plan.symbols {
            let Some(&value) = env.get(&symbol.name) else {
                return Err(Error::user(format!("size {} is not given", symbol.name)));
            };
            if value < symbol.range.min || value > symbol.range.max {
                return Err(Error::user(format!(
                    "size {} = {value} is outside the plan's range {}..={}",
                    symbol.name, symbol.range.min, symbol.range.max
                )));
            }
        }
        self.bind(env, true)
    }

    /// Memory that running with these inputs takes.
    pub fn memory(&mut self, inputs: &[Tensor]) -> Result<MemoryReport> {
        let env = bind_symbols(&self.exe.plan, inputs)?;
        let mut report = MemoryReport {
            scratch_bytes: self.scratch.iter().map(AlignedBuffer::len).sum(),
            ..MemoryReport::default()
        };
        for constant in self.exe.constants.iter().flatten() {
            match constant {
                Constant::Shared(bytes) => report.shared_constant_bytes += bytes.len(),
                Constant::Packed(buffer) => report.packed_constant_bytes += buffer.len(),
            }
        }
        if !has_unbacked(&self.exe.plan, &env) {
            let at = self.bind(&env, true)?;
            report.arena_bytes = self.bound[at].arena.bytes;
            report.apart_bytes = self.bound[at].apart_bytes;
            report.naive_bytes = self.bound[at].arena.naive_bytes;
        }
        Ok(report)
    }

    /// Finds or makes the binding for these sizes, with or without runs image by image; returns its position in
    /// `self.bound`.
    fn bind(&mut self, env: &Env, by_image: bool) -> Result<usize> {
        let matches = |b: &Bound| {
            b.by_image == by_image
                && b.key.len() == self.exe.plan.symbols.len()
                && self
                    .exe
                    .plan
                    .symbols
                    .iter()
                    .zip(&b.key)
                    .all(|(s, v)| env.get(&s.name) == Some(v))
        };
        if let Some(at) = self.bound.iter().position(matches) {
            return Ok(at);
        }
        let bound = bind_plan(&self.exe, env, by_image)?;
        if bound.arena.bytes > self.arena.len() {
            self.arena =
                AlignedBuffer::new(bound.arena.bytes, "the arena of intermediate results")?;
        }
        if self.bound.len() == MAX_BOUND {
            self.bound.remove(0);
        }
        let most_args = bound.steps.iter().map(|s| match s {
            BoundStep::Launch { args, .. } => args.len(),
            BoundStep::Host { .. } => 0,
        });
        let most_args = most_args.max().unwrap_or(0);
        self.pointers.reserve(most_args.saturating_sub(self.pointers.len()));
        self.bound.push(bound);
        Ok(self.bound.len() - 1)
    }

    fn execute(
        &mut self,
        at: usize,
        inputs: &[Tensor],
        outputs: &mut [Tensor],
        mut times: Option<&mut Vec<StepTime>>,
        mut after: Option<AfterStep<'_>>,
    ) -> Result<()> {
        self.check_states(&self.bound[at].env)?;
        let Session { exe, arena, scratch, bound, pointers, states } = self;
        let bound = &bound[at];
        let mut number = 0;
        while let Some(step) = bound.steps.get(number) {
            let start = times.is_some().then(|| Watch::start(exe.pool.threads()));
            let run = bound.run_at(number);
            let steps = run.map_or(std::slice::from_ref(step), |r| &bound.steps[r.steps.clone()]);
            pointers.clear();
            for arg in steps.iter().flat_map(args_of) {
                pointers.push(match bound.slots[arg.index()] {
                    Slot::Input(i) => inputs[i].bytes().as_ptr().cast_mut(),
                    Slot::Output(i) => outputs[i].bytes_mut().as_mut_ptr(),
                    // SAFETY: the arena plan keeps each offset plus size inside the arena.
                    Slot::Arena(offset) => unsafe { arena.as_ptr().add(offset) },
                    Slot::Fixed(address) => address as *mut u8,
                    Slot::State(i) => states[i].memory.as_ptr(),
                });
            }
            if let Some(run) = run {
                let timed = times.is_some();
                let spent = run_images(exe, bound, run, pointers, scratch, [false, timed]);
                if let Some(times) = times.as_deref_mut() {
                    let steps = run.steps.clone().zip(spent);
                    times.extend(steps.map(|(step, time)| StepTime { step, time }));
                }
                number = run.steps.end;
                continue;
            }
            match step {
                BoundStep::Launch { kernel, sizes, blocks, .. } => {
                    let pool = Some(&*exe.pool);
                    launch(exe.code_of(*kernel), pointers, sizes, 0..*blocks, scratch, pool);
                }
                BoundStep::Host { step } => {
                    host_step(exe, bound, *step, inputs, outputs, arena)?;
                }
            }
            if let (Some(times), Some(start)) = (times.as_deref_mut(), start) {
                times.push(StepTime { step: number, time: start.elapsed() });
            }
            if let Some(after) = &mut after {
                after(number, bound, arena, outputs);
            }
            number += 1;
        }
        Ok(())
    }

    /// Runs a plan in which some sizes are only found on the way: one allocation per buffer.
    fn run_dynamic(
        &mut self,
        inputs: &[Tensor],
        mut env: Env,
        mut times: Option<&mut Vec<StepTime>>,
    ) -> Result<Vec<Tensor>> {
        let exe = self.exe.clone();
        let plan = &exe.plan;
        let mut tensors: Vec<Option<Tensor>> = plan.buffers.ids().map(|_| None).collect();
        for (id, buffer) in plan.buffers.iter() {
            tensors[id.index()] = match &buffer.storage {
                Storage::Input(i) => Some(inputs[*i].clone()),
                Storage::Const(t) if buffer.layout.is_row_major() => Some(t.rounded(buffer.dtype)?),
                _ => None,
            };
        }
        for (number, step) in plan.steps.iter().enumerate() {
            let start = times.is_some().then(|| Watch::start(exe.pool.threads()));
            match step {
                Step::Host { op, inputs, outputs, .. } => {
                    let operands = inputs
                        .iter()
                        .map(|b| {
                            let missing = || Error::bug(format!("host operand {b} has no value"));
                            tensors[b.index()].clone().ok_or_else(missing)
                        })
                        .collect::<Result<Vec<_>>>()?;
                    let results = call_host(op, &operands, &env, outputs.len())?;
                    for (b, tensor) in outputs.iter().zip(results) {
                        bind_shape(&mut env, &plan.buffers[*b].layout.shape(), tensor.shape())?;
                        tensors[b.index()] = Some(tensor);
                    }
                }
                Step::Library { call, .. } => return Err(no_library(call)),
                Step::Launch { kernel, args, sizes, .. } => {
                    let values = eval_all(sizes, &env)?;
                    let blocks = grid_blocks(plan, *kernel, &values)?;
                    for arg in args {
                        if tensors[arg.index()].is_none()
                            && !matches!(exe.constants[arg.index()], Some(Constant::Packed(_)))
                        {
                            tensors[arg.index()] = Some(allocate(&plan.buffers[*arg], &env)?);
                        }
                    }
                    let mut pointers: Vec<*mut u8> = Vec::with_capacity(args.len());
                    let read_only: Vec<bool> = plan.kernels[*kernel]
                        .kernel
                        .params
                        .iter()
                        .map(|(_, p)| p.access == tilewright_tile::Access::In)
                        .collect();
                    for (arg, read_only) in args.iter().zip(read_only) {
                        pointers.push(
                            match (&exe.constants[arg.index()], &mut tensors[arg.index()]) {
                                (Some(Constant::Packed(buffer)), _) => buffer.as_ptr(),
                                (_, Some(tensor)) if read_only => {
                                    tensor.bytes().as_ptr().cast_mut()
                                }
                                (_, Some(tensor)) => tensor.bytes_mut().as_mut_ptr(),
                                _ => {
                                    return Err(Error::bug(format!(
                                        "argument {arg} has no memory"
                                    )));
                                }
                            },
                        );
                    }
                    let (code, pool) = (exe.code_of(*kernel), Some(&*exe.pool));
                    launch(code, &pointers, &values, 0..blocks, &self.scratch, pool);
                }
            }
            if let (Some(times), Some(start)) = (times.as_deref_mut(), start) {
                times.push(StepTime { step: number, time: start.elapsed() });
            }
        }
        let mut outputs: Vec<Option<Tensor>> = plan.outputs.iter().map(|_| None).collect();
        for (id, buffer) in plan.buffers.iter() {
            if let Storage::Output(i) = buffer.storage {
                let shape = concrete(&buffer.layout.shape(), &env)?;
                let flat = tensors[id.index()].take();
                let flat = flat.map_or_else(|| allocate(buffer, &env), Ok)?;
                outputs[i] = Some(flat.reshaped(shape)?);
            }
        }
        outputs
            .into_iter()
            .map(|t| t.ok_or_else(|| Error::bug("an output has no buffer")))
            .collect()
    }
}

/// Called after each step with what it may have written.
type AfterStep<'a> = &'a mut dyn FnMut(usize, &Bound, &AlignedBuffer, &[Tensor]);

/// The arguments of a step that is a launch.
fn args_of(step: &BoundStep) -> &[BufferId] {
    match step {
        BoundStep::Launch { args, .. } => args,
        BoundStep::Host { .. } => &[],
    }
}

impl Bound {
    /// The run of steps that begins with this one.
    fn run_at(&self, step: usize) -> Option<&BoundRun> {
        self.runs.iter().find(|run| run.steps.start == step)
    }
}

/// Runs blocks of a kernel on this thread.
pub(crate) fn call(
    code: &Code,
    pointers: &[*mut u8],
    sizes: &[i64],
    blocks: Range<i64>,
    scratch: &AlignedBuffer,
) {
    let mode = code.mode.enter();
    // SAFETY: `Code::from_library` sees to it that the entry follows `KernelFn` and stays inside its
    // buffers and scratch; every pointer refers to a buffer of at least its layout's size
    // (checked for inputs and outputs by `bind_symbols` and `run_into`, by construction for
    // the arena and constants), or is moved so that what these blocks touch of it lies in the arena (`run_images`);
    // each worker has scratch of its own.
    unsafe {
        let (pointers, sizes) = (pointers.as_ptr(), sizes.as_ptr());
        (code.entry)(pointers, sizes, blocks.start, blocks.end, scratch.as_ptr());
    }
    drop(mode);
}

pub(crate) fn launch(
    code: &Code,
    pointers: &[*mut u8],
    sizes: &[i64],
    blocks: Range<i64>,
    scratch: &[AlignedBuffer],
    pool: Option<&Pool>,
) {
    /// Raw addresses that worker threads may use.
    struct Addresses<'a>(&'a [*mut u8]);
    // SAFETY: the table outlives the parallel region, and blocks touch disjoint outputs.
    unsafe impl Sync for Addresses<'_> {}
    impl Addresses<'_> {
        fn table(&self) -> &[*mut u8] {
            self.0
        }
    }
    let addresses = Addresses(pointers);
    let share = |first, last, worker: usize| {
        let blocks = blocks.start + first..blocks.start + last;
        call(code, addresses.table(), sizes, blocks, &scratch[worker]);
    };
    let count = blocks.end - blocks.start;
    match pool {
        Some(pool) => pool.run(count, &share),
        None if count > 0 => share(0, count, 0),
        None => {}
    }
}

fn call_host(
    op: &HostCall,
    operands: &[Tensor],
    env: &Env,
    expected: usize,
) -> Result<Vec<Tensor>> {
    let results = (op.run)(operands, env).context(|| format!("host operator `{}`", op.name))?;
    if results.len() != expected {
        return Err(Error::bug(format!(
            "host operator {} gave {} results",
            op.name,
            results.len()
        )));
    }
    Ok(results)
}

fn host_step(
    exe: &Executable,
    bound: &Bound,
    step: usize,
    inputs: &[Tensor],
    outputs: &mut [Tensor],
    arena: &mut AlignedBuffer,
) -> Result<()> {
    let Step::Host { op, inputs: from, outputs: to, .. } = &exe.plan.steps[step] else {
        return Err(Error::bug("a host step that is none"));
    };
    let mut operands = Vec::with_capacity(from.len());
    for b in from {
        let dtype = exe.plan.buffers[*b].dtype;
        let shape = bound.shapes[b.index()].clone();
        let bytes = byte_len(dtype, &shape)?;
        operands.push(match (bound.slots[b.index()], &exe.plan.buffers[*b].storage) {
            (Slot::Input(i), _) => inputs[i].clone(),
            (Slot::Output(i), _) => outputs[i].clone(),
            (Slot::Arena(offset), _) => {
                Tensor::new(dtype, shape, Bytes::copy_from(&arena.bytes()[offset..offset + bytes]))?
            }
            (Slot::Fixed(_), Storage::Const(tensor)) => tensor.clone(),
            (Slot::State(_), _) => {
                let name = &op.name;
                return Err(Error::unsupported(format!("`{name}` on what is kept between runs")));
            }
            (Slot::Fixed(_), _) => return Err(Error::bug("fixed memory that is no constant")),
        });
    }
    let results = call_host(op, &operands, &bound.env, to.len())?;
    for (b, result) in to.iter().zip(results) {
        let buffer = &exe.plan.buffers[*b];
        if result.shape() != bound.shapes[b.index()] || result.dtype() != buffer.dtype {
            return Err(Error::bug(format!(
                "host operator {} gave {}{:?} where {}{:?} was planned",
                op.name,
                result.dtype(),
                result.shape(),
                buffer.dtype,
                bound.shapes[b.index()]
            )));
        }
        match bound.slots[b.index()] {
            Slot::Output(i) if outputs[i].shared_bytes().is_lent() => {
                outputs[i].bytes_mut().copy_from_slice(result.bytes());
            }
            Slot::Output(i) => outputs[i] = result,
            Slot::Arena(offset) => {
                arena.bytes_mut()[offset..offset + result.bytes().len()]
                    .copy_from_slice(result.bytes());
            }
            _ => return Err(Error::bug("a host operator writes an input or constant")),
        }
    }
    Ok(())
}

pub(crate) fn byte_len(dtype: DType, shape: &[usize]) -> Result<usize> {
    dtype
        .bytes_for(tilewright_data::element_count(shape)?)
        .ok_or_else(|| Error::user(format!("a {dtype} tensor of shape {shape:?} is too large")))
}

fn allocate(buffer: &Buffer, env: &Env) -> Result<Tensor> {
    // Blocked layouts need more than the shape says: allocate flat.
    let elements = concrete(&[buffer.layout.alloc_elements()], env)?;
    let shape = concrete(&buffer.layout.shape(), env)?;
    if buffer.layout.is_row_major() || shape.contains(&0) {
        return Tensor::zeros(buffer.dtype, shape);
    }
    Tensor::zeros(buffer.dtype, elements)
}

/// Kernels of a library are a GPU's.
fn no_library(call: &tilewright_plan::Library) -> Error {
    Error::unsupported(format!("{} on a processor", call.name()))
}

fn grid_blocks(plan: &Plan, kernel: KernelId, sizes: &[i64]) -> Result<i64> {
    let planned = &plan.kernels[kernel];
    let lookup = |name: &str| {
        let symbol = planned.kernel.symbols.iter().position(|s| &*s.name == name);
        symbol.map(|i| sizes[i]).or_else(|| planned.schedule.tiles.get(name).copied())
    };
    planned.kernel.grid.iter().try_fold(1i64, |blocks, axis| {
        let extent = axis.extent.eval_with(&lookup).map(|e| e.max(0));
        extent
            .and_then(|e| blocks.checked_mul(e))
            .ok_or_else(|| Error::user(format!("the grid of {} is too large", planned.kernel.name)))
    })
}

fn bind_plan(exe: &Executable, env: &Env, by_image: bool) -> Result<Bound> {
    let plan = &exe.plan;
    let inside = Inside::new(plan, exe.pool.threads(), by_image);
    let mut shapes = Vec::with_capacity(plan.buffers.len());
    let mut lives: Vec<Live> = Vec::new();
    let mut live_of: Vec<Option<usize>> = vec![None; plan.buffers.len()];
    for (id, buffer) in plan.buffers.iter() {
        let shape = concrete(&buffer.layout.shape(), env)?;
        if matches!(buffer.storage, Storage::Arena) {
            let elements = match inside.elements(id) {
                _ if shape.contains(&0) => 0,
                Some(of_image) => usize::try_from(of_image).unwrap_or(usize::MAX),
                None => concrete(&[buffer.layout.alloc_elements()], env)?[0],
            };
            let bytes = buffer.dtype.bytes_for(elements).filter(|&b| b < isize::MAX as usize / 2);
            let bytes = bytes.ok_or_else(|| {
                Error::user(format!(
                    "intermediate `{}` of shape {shape:?} is too large",
                    buffer.name
                ))
            })?;
            live_of[id.index()] = Some(lives.len());
            lives.push(Live { bytes, first: usize::MAX, last: 0 });
        }
        shapes.push(shape);
    }
    let mut steps = Vec::with_capacity(plan.steps.len());
    for (number, step) in plan.steps.iter().enumerate() {
        let mut touch = |b: &BufferId| {
            if let Some(live) = live_of[b.index()] {
                lives[live].first = lives[live].first.min(number);
                lives[live].last = lives[live].last.max(number);
            }
        };
        match step {
            Step::Launch { kernel, args, sizes, .. } => {
                args.iter().for_each(&mut touch);
                let sizes = eval_all(sizes, env)?;
                let blocks = grid_blocks(plan, *kernel, &sizes)?;
                steps.push(BoundStep::Launch {
                    kernel: *kernel,
                    args: args.clone(),
                    sizes,
                    blocks,
                });
            }
            Step::Library { call, .. } => return Err(no_library(call)),
            Step::Host { inputs, outputs, .. } => {
                inputs.iter().chain(outputs).for_each(&mut touch);
                steps.push(BoundStep::Host { step: number });
            }
        }
    }
    for live in &mut lives {
        live.first = live.first.min(live.last);
    }
    for (id, live) in plan.buffers.ids().zip(&live_of) {
        if let Some(live) = *live {
            lives[live] = inside.widened(id, lives[live]);
        }
    }
    let (apart, mut parts) = inside.places(&lives, &live_of);
    let naive_bytes = apart.naive_bytes;
    let apart_bytes = apart.bytes;
    let mut arena = apart;
    if exe.in_place {
        // Sharing is a wish of each kernel alone; the arena as a whole may be better off without.
        let (joined, joined_of) = join_in_place(&exe.shareable, &steps, &inside, &lives, &live_of);
        let (shared, shared_parts) = inside.places(&joined, &joined_of);
        if shared.bytes < arena.bytes {
            (arena, live_of) = (ArenaPlan { naive_bytes, ..shared }, joined_of);
            parts = shared_parts;
        }
    }
    let mut output_shapes = vec![Vec::new(); plan.outputs.len()];
    let mut slots = Vec::with_capacity(plan.buffers.len());
    for (id, buffer) in plan.buffers.iter() {
        slots.push(match &buffer.storage {
            Storage::Input(i) => Slot::Input(*i),
            Storage::Output(i) => {
                output_shapes[*i] = shapes[id.index()].clone();
                Slot::Output(*i)
            }
            Storage::Const(_) => Slot::Fixed(match &exe.constants[id.index()] {
                Some(Constant::Shared(bytes)) => bytes.as_ptr() as usize,
                Some(Constant::Packed(buffer)) => buffer.as_ptr() as usize,
                None => return Err(Error::bug(format!("constant {} has no data", buffer.name))),
            }),
            Storage::State(i) => Slot::State(*i),
            Storage::Arena => Slot::Arena(live_of[id.index()].map_or(0, |l| arena.offsets[l])),
        });
    }
    let key = plan.symbols.iter().map(|s| env.get(&s.name).copied().unwrap_or(0)).collect();
    let (env, runs) = (env.clone(), inside.bound(plan, &steps, &parts));
    Ok(Bound { key, by_image, env, slots, shapes, arena, apart_bytes, steps, runs, output_shapes })
}
