//! [`Executable`] and [`Session`]: a plan on a device, and one caller's means to run it.
//!
//! Weights go to the device once, straight from the mapped file, and what depends on them alone is computed then. A session has one arena; for each set of
//! sizes it keeps the loaded kernels with their arguments, recorded as graphs between host steps.

use crate::bind::{Bound, BoundStep, Place, Slot, bind_at, key};
use crate::choose::{Chooser, Source, Way};
use crate::constants::Constants;
use crate::host::{self, Memory};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result, ResultExt};
use tilewright_cuda::{Buffer, GraphExec, Nvrtc, Stream};
use tilewright_data::{Bytes, Tensor, check_memory};
use tilewright_launch::{BoundKernel, LoadedKernel, Loader, Operand, first_that_works};
use tilewright_layout::{Env, Layout};
use tilewright_plan::bind::{bind_symbols, concrete, has_unbacked};
use tilewright_plan::{BufferId, Plan, Step, Storage};
use tilewright_target::Gpu;
use tilewright_tile::Access;

/// A plan with its constants on a device.
pub struct Executable {
    plan: Plan,
    loader: Arc<Loader>,
    chooser: Mutex<Chooser>,
    constants: Constants,
}

impl Executable {
    /// Copies the constants of a plan to a device, and computes what depends on them alone.
    ///
    /// # Errors
    /// When they do not fit its memory; the compiler's.
    pub fn new(
        plan: Plan,
        gpu: tilewright_cuda::Gpu,
        nvrtc: Nvrtc,
        machine: Gpu,
    ) -> Result<Executable> {
        Executable::on(plan, Arc::new(Loader::new(gpu, nvrtc)), machine)
    }

    /// As [`Executable::new`], with kernels that other executables of the device have, too.
    ///
    /// # Errors
    /// As [`Executable::new`].
    pub fn on(plan: Plan, loader: Arc<Loader>, machine: Gpu) -> Result<Executable> {
        let constants = Constants::load(&plan, &loader, &machine, &|_| None)?;
        let chooser = Mutex::new(Chooser::new(machine));
        Ok(Executable { plan, loader, chooser, constants })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device and its compiler.
    pub fn loader(&self) -> &Loader {
        &self.loader
    }

    /// Bytes of weights on the device.
    pub fn constant_bytes(&self) -> usize {
        self.constants.len()
    }
}

/// A step that is ready to run.
enum ReadyStep {
    Device(Vec<BoundKernel>),
    Host,
}

/// Steps that run together.
enum Segment {
    /// Recorded.
    Graph(GraphExec),
    /// Launched one by one.
    Launches(Range<usize>),
    /// One step on the host.
    Host(usize),
}

/// A set of sizes with everything that a run needs.
struct Ready {
    bound: Bound,
    steps: Vec<ReadyStep>,
    segments: Vec<Segment>,
    report: RunReport,
}

/// What a run consists of.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// Kernels launched.
    pub launches: usize,
    /// Recorded graphs.
    pub graphs: usize,
    /// Steps on the host, with reasons.
    pub host_steps: Vec<(usize, String)>,
    /// Steps that were done when the plan was loaded: they depend on weights alone.
    pub once: Vec<usize>,
    /// Schedules that were given up, and recordings that failed: each with its reason.
    pub warnings: Vec<String>,
    /// The schedules of each step, in the plan's order.
    pub schedules: Vec<Vec<String>>,
}

/// Memory on the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryReport {
    /// Weights.
    pub constant_bytes: usize,
    /// Inputs, outputs and intermediates.
    pub arena_bytes: usize,
    /// What they would take if no result lay in the memory of an operand.
    pub apart_bytes: usize,
    /// What one allocation per buffer would take.
    pub naive_bytes: usize,
    /// Workspace of the kernels.
    pub workspace_bytes: usize,
}

/// Time that one step took.
#[derive(Clone, Copy, Debug)]
pub struct StepTime {
    /// Number of the step in the plan.
    pub step: usize,
    /// On the device, or for host steps the wall time.
    pub time: Duration,
}

/// Environment variable: with `1`, no run is recorded as a graph. For trying out what happens then.
pub const FAIL_RECORDING: &str = "TILEWRIGHT_FAIL_RECORDING";

/// How many sizes a session remembers.
const MAX_READY: usize = 8;

/// One caller's means to run an [`Executable`].
pub struct Session {
    exe: Arc<Executable>,
    stream: Stream,
    arena: Buffer,
    graphs: bool,
    /// Most recently made last.
    ready: Vec<Ready>,
}

/// The arena, to host steps.
struct DeviceMemory<'a> {
    bound: &'a Bound,
    arena: &'a Buffer,
    constants: &'a Constants,
    stream: &'a Stream,
}

impl DeviceMemory<'_> {
    fn at(&self, b: BufferId) -> Result<usize> {
        match self.bound.slots[b.index()] {
            Slot::Arena(offset) => Ok(offset),
            _ => Err(Error::bug("a buffer that is not in the arena")),
        }
    }
}

impl Memory for DeviceMemory<'_> {
    fn read(&mut self, b: BufferId) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bound.bytes[b.index()]];
        if self.constants.once().makes(b) {
            self.constants.read(self.stream, b, &mut bytes)?;
            return Ok(bytes);
        }
        self.arena.read_at(self.stream, self.at(b)?, &mut bytes)?;
        Ok(bytes)
    }

    fn write(&mut self, b: BufferId, bytes: &[u8]) -> Result<()> {
        if bytes.len() != self.bound.bytes[b.index()] {
            return Err(Error::bug(format!("{} bytes for buffer {b}", bytes.len())));
        }
        self.arena.write_at(self.stream, self.at(b)?, bytes)
    }
}

impl Session {
    /// A session on `exe`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(exe: Arc<Executable>) -> Result<Session> {
        let stream = exe.loader.gpu().stream()?;
        let arena = stream.alloc(0)?;
        Ok(Session { exe, stream, arena, graphs: true, ready: Vec::new() })
    }

    /// With `false`, kernels are launched one by one instead of as recorded graphs.
    #[must_use]
    pub fn with_graphs(mut self, graphs: bool) -> Session {
        self.graphs = graphs;
        self
    }

    /// The executable.
    pub fn executable(&self) -> &Arc<Executable> {
        &self.exe
    }

    /// The stream in which it runs.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Runs with these inputs, in the plan's order, and returns the outputs.
    ///
    /// # Errors
    /// The user's about the inputs; the device's.
    pub fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let at = self.prepare(inputs)?;
        self.write_inputs(at, inputs)?;
        self.replay(at)?;
        self.outputs(at)
    }

    /// What a run with these inputs consists of. Compiles what is missing.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn report(&mut self, inputs: &[Tensor]) -> Result<RunReport> {
        let at = self.prepare(inputs)?;
        Ok(self.ready[at].report.clone())
    }

    /// Memory that a run with these inputs takes.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn memory(&mut self, inputs: &[Tensor]) -> Result<MemoryReport> {
        let at = self.prepare(inputs)?;
        let bound = &self.ready[at].bound;
        Ok(MemoryReport {
            constant_bytes: self.exe.constants.len(),
            arena_bytes: bound.arena_bytes,
            apart_bytes: bound.apart_bytes,
            naive_bytes: bound.naive_bytes,
            workspace_bytes: bound.workspace_bytes,
        })
    }

    /// Times of `runs` runs on the device, in microseconds, without the copies of inputs and outputs;
    /// `warmup` runs before them are not counted.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn times_us(&mut self, inputs: &[Tensor], warmup: usize, runs: usize) -> Result<Vec<f64>> {
        let at = self.prepare(inputs)?;
        self.write_inputs(at, inputs)?;
        for _ in 0..warmup {
            self.replay(at)?;
        }
        let mut times = Vec::with_capacity(runs);
        for _ in 0..runs {
            let start = self.stream.record()?;
            self.replay(at)?;
            let end = self.stream.record()?;
            end.synchronize()?;
            times.push(end.since_us(&start)?);
        }
        Ok(times)
    }

    /// As [`Session::run`], and adds the time of each step: on the device from the end of the step before
    /// to its own, with the device kept busy so that launches do not show.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn run_timed(
        &mut self,
        inputs: &[Tensor],
        times: &mut Vec<StepTime>,
    ) -> Result<Vec<Tensor>> {
        let at = self.prepare(inputs)?;
        self.write_inputs(at, inputs)?;
        // While the device is busy with this run, the host gets ahead of it.
        self.replay(at)?;
        let Ready { bound, steps, .. } = &self.ready[at];
        let mut marks = vec![self.stream.record()?];
        let mut host = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            let start = Instant::now();
            match step {
                ReadyStep::Device(launches) => launch_all(launches, &self.stream)?,
                ReadyStep::Host => self.host_step(bound, number)?,
            }
            host.push(start.elapsed());
            marks.push(self.stream.record()?);
        }
        self.stream.synchronize()?;
        for (number, pair) in marks.windows(2).enumerate() {
            let time = match steps[number] {
                ReadyStep::Device(_) => Duration::from_secs_f64(pair[1].since_us(&pair[0])? * 1e-6),
                ReadyStep::Host => host[number],
            };
            times.push(StepTime { step: number, time });
        }
        self.outputs(at)
    }

    /// As [`Session::run`], and shows each buffer's contents after the step that wrote it: for checking a
    /// plan kernel by kernel. Slow.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn run_observed(
        &mut self,
        inputs: &[Tensor],
        observe: &mut dyn FnMut(usize, BufferId, Tensor),
    ) -> Result<Vec<Tensor>> {
        let at = self.prepare(inputs)?;
        self.arena.poison(&self.stream)?;
        self.write_inputs(at, inputs)?;
        let plan = &self.exe.plan;
        let Ready { bound, steps, .. } = &self.ready[at];
        for (number, step) in steps.iter().enumerate() {
            match step {
                ReadyStep::Device(launches) => launch_all(launches, &self.stream)?,
                ReadyStep::Host => self.host_step(bound, number)?,
            }
            let mut memory = self.memory_of(bound);
            let once = self.exe.constants.once();
            for b in written(plan, &plan.steps[number]) {
                // What only such steps read is gone.
                if once.makes(b) && !once.is_read(b) {
                    continue;
                }
                let bytes = memory.read(b)?;
                let buffer = &plan.buffers[b];
                let tensor = row_major(
                    &bytes,
                    buffer.dtype,
                    &buffer.layout,
                    &bound.shapes[b.index()],
                    &bound.env,
                )?;
                observe(number, b, tensor);
            }
        }
        self.outputs(at)
    }

    fn memory_of<'a>(&'a self, bound: &'a Bound) -> DeviceMemory<'a> {
        DeviceMemory {
            bound,
            arena: &self.arena,
            constants: &self.exe.constants,
            stream: &self.stream,
        }
    }

    fn host_step(&self, bound: &Bound, number: usize) -> Result<()> {
        host::run(&self.exe.plan, bound, number, &mut self.memory_of(bound))
    }

    fn write_inputs(&self, at: usize, inputs: &[Tensor]) -> Result<()> {
        let mut memory = self.memory_of(&self.ready[at].bound);
        for (id, buffer) in self.exe.plan.buffers.iter() {
            if let Storage::Input(i) = buffer.storage {
                memory.write(id, inputs[i].bytes())?;
            }
        }
        Ok(())
    }

    fn outputs(&self, at: usize) -> Result<Vec<Tensor>> {
        let bound = &self.ready[at].bound;
        let mut memory = self.memory_of(bound);
        let plan = &self.exe.plan;
        let mut outputs: Vec<Option<Tensor>> = vec![None; plan.outputs.len()];
        for (id, buffer) in plan.buffers.iter() {
            if let Storage::Output(i) = buffer.storage {
                check_memory(bound.bytes[id.index()], "an output")?;
                let bytes = Bytes::copy_from(&memory.read(id)?);
                let shape = bound.shapes[id.index()].clone();
                outputs[i] = Some(Tensor::new(buffer.dtype, shape, bytes)?);
            }
        }
        let missing = || Error::bug("an output has no buffer");
        outputs.into_iter().map(|t| t.ok_or_else(missing)).collect()
    }

    /// Puts one run into the session's stream.
    fn replay(&self, at: usize) -> Result<()> {
        let stream = &self.stream;
        let Ready { bound, steps, segments, .. } = &self.ready[at];
        for segment in segments {
            match segment {
                // SAFETY: arena and constants live as long as the session; a session that replaces its
                // arena drops its recordings first, and nobody else uses the arena.
                Segment::Graph(graph) => unsafe { graph.launch(stream)? },
                Segment::Launches(range) => {
                    for step in &steps[range.clone()] {
                        if let ReadyStep::Device(launches) = step {
                            launch_all(launches, stream)?;
                        }
                    }
                }
                Segment::Host(number) => self.host_step(bound, *number)?,
            }
        }
        Ok(())
    }

    /// Finds or makes what a run with the sizes of these inputs needs; its position in `self.ready`.
    fn prepare(&mut self, inputs: &[Tensor]) -> Result<usize> {
        let plan = &self.exe.plan;
        let env = bind_symbols(plan, inputs)?;
        let key = key(plan, &env);
        if let Some(at) = self.ready.iter().position(|r| r.bound.key == key) {
            return Ok(at);
        }
        let bound = self.bind(&env)?;
        self.fit(&bound)?;
        let at = self.push_ready(bound)?;
        let mut report = std::mem::take(&mut self.ready[at].report);
        self.ready[at].segments = self.record(&self.ready[at].steps, &mut report)?;
        self.ready[at].report = report;
        Ok(at)
    }

    /// Waits until nothing of this session runs.
    fn settle(&self) -> Result<()> {
        self.stream.synchronize()
    }

    fn bind(&self, env: &Env) -> Result<Bound> {
        let exe = &self.exe;
        if has_unbacked(&exe.plan, env) {
            return Err(Error::unsupported("a model whose sizes depend on its data, on a GPU")
                .with_hint("it runs on the CPU: leave out --device"));
        }
        let mut chooser = exe.chooser.lock().unwrap_or_else(PoisonError::into_inner);
        bind_at(&exe.plan, env, Place::Arena, exe.constants.once(), &mut chooser)
    }

    /// Makes the arena large enough, and room for one more set of sizes.
    fn fit(&mut self, bound: &Bound) -> Result<()> {
        if bound.total_bytes() > self.arena.len() {
            // Recordings hold the old address.
            self.settle()?;
            self.ready.clear();
            let planned = bound.total_bytes() + self.exe.constants.len();
            let none = self.stream.alloc(0)?;
            self.arena = none;
            self.arena = self.stream.alloc_planned(bound.total_bytes(), planned as u64)?;
            self.stream.synchronize()?;
        }
        if self.ready.len() >= MAX_READY {
            self.settle()?;
            self.ready.remove(0);
        }
        Ok(())
    }

    /// Compiles, loads and binds what a run needs. Its segments are launches, one range between host steps.
    fn push_ready(&mut self, mut bound: Bound) -> Result<usize> {
        let mut report = RunReport::default();
        let steps = self.ready_steps(&mut bound, &mut report)?;
        report.host_steps = bound.host_steps(&self.exe.plan);
        report.once = self.exe.constants.once().steps().collect();
        let segments = unrecorded(&steps);
        self.ready.push(Ready { bound, steps, segments, report });
        Ok(self.ready.len() - 1)
    }

    /// Loads the kernels of every step and binds their arguments; the next way where one fails.
    fn ready_steps(&self, bound: &mut Bound, report: &mut RunReport) -> Result<Vec<ReadyStep>> {
        let loader = &self.exe.loader;
        // All first choices at once, on all processors.
        let first = |s: &BoundStep| match s {
            BoundStep::Device { choice, .. } => choice.ways.first().cloned(),
            _ => None,
        };
        let ways = bound.steps.iter().filter_map(first);
        let mut programs: Vec<_> = ways.flat_map(|w| w.launches).map(|l| l.program).collect();
        programs.sort_by_key(|p| Arc::as_ptr(p) as usize);
        programs.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let programs: Vec<_> = programs.iter().map(|p| (**p).clone()).collect();
        loader.load_all(&programs);
        let mut steps = Vec::with_capacity(bound.steps.len());
        for number in 0..bound.steps.len() {
            let (kernel, args, sizes, choice) = match &bound.steps[number] {
                BoundStep::Device { kernel, args, sizes, choice } => (kernel, args, sizes, choice),
                BoundStep::Once => {
                    report.schedules.push(Vec::new());
                    steps.push(ReadyStep::Device(Vec::new()));
                    continue;
                }
                BoundStep::HostKernel { .. } | BoundStep::HostOp => {
                    report.schedules.push(Vec::new());
                    steps.push(ReadyStep::Host);
                    continue;
                }
            };
            let taken = first_that_works(&choice.ways, |way| self.bind_way(bound, args, way));
            match taken {
                Ok(taken) => {
                    let name = match kernel {
                        Some(id) => self.exe.plan.kernels[*id].kernel.name.as_str(),
                        None => self.exe.plan.steps[number].note().label.as_str(),
                    };
                    // The last note says where text and log are.
                    let lost = taken.failures.iter().map(|e| {
                        let kept = e.notes().last().map_or(String::new(), |n| format!(" ({n})"));
                        format!("{name}: a schedule gave way: {e}{kept}")
                    });
                    report.warnings.extend(lost);
                    report.launches += taken.value.len();
                    let way = &choice.ways[taken.index];
                    report.schedules.push(way.launches.iter().map(describe).collect());
                    steps.push(ReadyStep::Device(taken.value));
                }
                Err(error) => {
                    let Some(kernel) = *kernel else { return Err(error) };
                    let reason = format!("{error}");
                    let (args, sizes) = (args.clone(), sizes.clone());
                    bound.steps[number] = BoundStep::HostKernel { kernel, args, sizes, reason };
                    report.schedules.push(Vec::new());
                    steps.push(ReadyStep::Host);
                }
            }
        }
        Ok(steps)
    }

    fn bind_way(&self, bound: &Bound, args: &[BufferId], way: &Way) -> Result<Vec<BoundKernel>> {
        way.launches
            .iter()
            .map(|launch| {
                let kernel: LoadedKernel = self.exe.loader.load(&launch.program)?;
                let operands: Vec<Operand> = launch
                    .operands
                    .iter()
                    .map(|s| self.operand(bound, args, s))
                    .collect::<Result<_>>()?;
                kernel.bind(&launch.sizes, &operands)
            })
            .collect()
    }

    fn operand(&self, bound: &Bound, args: &[BufferId], source: &Source) -> Result<Operand> {
        Ok(match *source {
            Source::Workspace { offset, bytes } => {
                let address = self.arena.address() + bound.workspace() as u64 + offset;
                Operand { address, bytes }
            }
            Source::Param { param, offset } => {
                let b = args[param].index();
                let start = match bound.slots[b] {
                    Slot::Arena(at) => self.arena.address() + at as u64,
                    Slot::Const => self.exe.constants.address(args[param]),
                    Slot::Input(_) | Slot::Output(_) => {
                        return Err(Error::bug("a session's tensor that is not in its arena"));
                    }
                };
                let bytes = (bound.bytes[b] as u64).saturating_sub(offset);
                Operand { address: start + offset, bytes }
            }
        })
    }

    /// Records what lies between host steps.
    fn record(&self, steps: &[ReadyStep], report: &mut RunReport) -> Result<Vec<Segment>> {
        let mut segments = unrecorded(steps);
        if !self.graphs {
            return Ok(segments);
        }
        for segment in &mut segments {
            let Segment::Launches(range) = &segment else { continue };
            match self.record_steps(&steps[range.clone()]) {
                Ok(graph) => {
                    report.graphs += 1;
                    *segment = Segment::Graph(graph);
                }
                Err(error) => {
                    let Range { start, end } = range;
                    let warning = format!("steps {start} to {} are not recorded: {error}", end - 1);
                    report.warnings.push(warning);
                }
            }
        }
        Ok(segments)
    }

    fn record_steps(&self, steps: &[ReadyStep]) -> Result<GraphExec> {
        if std::env::var(FAIL_RECORDING).is_ok_and(|v| v == "1") {
            return Err(Error::unsupported(format!("{FAIL_RECORDING} is set")));
        }
        let graph = self.stream.capture(|stream| {
            for step in steps {
                if let ReadyStep::Device(launches) = step {
                    launch_all(launches, stream)?;
                }
            }
            Ok(())
        })?;
        graph.instantiate()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Kernels in flight use the arena and the modules.
        let _ = self.settle();
    }
}

/// Steps in order: those on the host, and ranges of the others.
fn unrecorded(steps: &[ReadyStep]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < steps.len() {
        let is_device = |s: &&ReadyStep| matches!(s, ReadyStep::Device(_));
        let end = at + steps[at..].iter().take_while(is_device).count();
        segments.push(if end == at { Segment::Host(at) } else { Segment::Launches(at..end) });
        at = end.max(at + 1);
    }
    segments
}

fn describe(launch: &crate::choose::Launch) -> String {
    format!("{}: {}", launch.program.name, launch.schedule)
}

fn launch_all(launches: &[BoundKernel], stream: &Stream) -> Result<()> {
    for launch in launches {
        // SAFETY: operands lie in the session's arena and the executable's constants, which live at
        // least as long as the session; it alone uses the arena, one run after the other.
        unsafe { launch.launch(stream)? };
    }
    Ok(())
}

/// Buffers that a step writes.
fn written(plan: &Plan, step: &Step) -> Vec<BufferId> {
    match step {
        Step::Library { outputs, .. } | Step::Host { outputs, .. } => outputs.clone(),
        Step::Launch { kernel, args, .. } => {
            let params = &plan.kernels[*kernel].kernel.params;
            let writes = params.iter().map(|(_, p)| p.access != Access::In);
            args.iter().zip(writes).filter(|(_, w)| *w).map(|(b, _)| *b).collect()
        }
    }
}

/// The elements of a strided layout in row-major order.
fn row_major(
    bytes: &[u8],
    dtype: tilewright_base::DType,
    layout: &Layout,
    shape: &[usize],
    env: &Env,
) -> Result<Tensor> {
    let size = dtype.size();
    let strides: Vec<_> = layout.axes.iter().map(|a| a.stride.clone()).collect();
    let strides = concrete(&strides, env)?;
    let mut at = concrete(std::slice::from_ref(&layout.offset), env)?;
    for (stride, extent) in strides.iter().zip(shape) {
        at = at.iter().flat_map(|o| (0..*extent).map(move |i| o + i * stride)).collect();
    }
    let mut out = Vec::with_capacity(at.len() * size);
    for start in at {
        let element = bytes.get(start * size..(start + 1) * size);
        let element = element.ok_or_else(|| Error::bug("an element behind its buffer"))?;
        out.extend_from_slice(element);
    }
    Tensor::new(dtype, shape, Bytes::copy_from(&out)).context(|| "reading a buffer".to_string())
}
