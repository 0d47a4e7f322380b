//! [`DeviceDecoder`]: a plan on a device.

use super::prompt::Prompt;
use super::streamed::Launch;
use super::written::Written;
use super::{DecodeMachine, DecodePlan, DecodeStep, Which};
use std::sync::Arc;
use tilewright_base::{Error, Kind, Result, ResultExt};
use tilewright_cuda::{Buffer, Function, GraphExec, PreparedLaunch, Stream};
use tilewright_kernels::decode::MOST_ROWS;
use tilewright_launch::{BoundKernel, Loader, Operand};

/// Starts of regions are multiples of this.
const ALIGNED: usize = 256;

/// One launch that is ready.
enum ReadyStep {
    Bound(BoundKernel),
    Written(PreparedLaunch),
}

/// Launches that are ready.
struct Ready {
    /// Before the others.
    streamed: Option<Launch>,
    kernels: Vec<ReadyStep>,
    graph: Option<GraphExec>,
}

/// A launch of a step, as [`DeviceDecoder::launch_times_us`] times it.
#[derive(Clone, Debug)]
pub struct TimedLaunch {
    /// What it does.
    pub label: String,
    /// Bytes of weights that it reads.
    pub weight_bytes: u64,
    /// Bytes of the cache that it reads for each position.
    pub cache_bytes: u64,
    /// Its schedule, for people.
    pub schedule: String,
}

/// Weights and state on a device, with one recorded graph per kind of step.
pub struct DeviceDecoder {
    plan: Arc<DecodePlan>,
    loader: Arc<Loader>,
    stream: Stream,
    weights: Buffer,
    state: Buffer,
    /// First byte of each region in its buffer.
    starts: Vec<usize>,
    token: Ready,
    chunk: Ready,
    prompt: Option<Prompt>,
    /// Why a step is not recorded.
    warnings: Vec<String>,
}

impl DeviceDecoder {
    /// Copies weights to the device, one tensor at a time from the mapped files, compiles, and records.
    ///
    /// # Errors
    /// When memory does not suffice, which is known before anything is copied; the compiler's and the driver's.
    pub fn new(plan: Arc<DecodePlan>, loader: Arc<Loader>, graphs: bool) -> Result<DeviceDecoder> {
        let stream = loader.gpu().stream()?;
        let (weight_bytes, state_bytes) = plan.bytes();
        let all = (weight_bytes + state_bytes) as u64;
        let weights = stream.alloc_planned(weight_bytes, all)?;
        let state = stream.alloc_planned(state_bytes, all)?;
        state.poison(&stream)?;
        let (mut at, mut starts) = ([0, 0], Vec::new());
        for region in &plan.regions {
            let place = &mut at[usize::from(region.data.is_empty())];
            starts.push(*place);
            let mut offset = *place;
            for tensor in &region.data {
                let rounded = region.stored(tensor)?;
                weights.write_at(&stream, offset, rounded.bytes())?;
                offset += rounded.bytes().len();
            }
            *place = (*place + region.bytes).next_multiple_of(ALIGNED);
        }
        let empty = || Ready { streamed: None, kernels: Vec::new(), graph: None };
        let mut this = DeviceDecoder {
            plan: plan.clone(),
            loader,
            stream,
            weights,
            state,
            starts,
            token: empty(),
            chunk: empty(),
            prompt: None,
            warnings: Vec::new(),
        };
        let streamed = match this.streamed() {
            // A device on which not all blocks run at once, say.
            Err(error) if error.kind() == Kind::Unsupported && plan.batch <= MOST_ROWS => {
                this.warnings.push(format!("a step goes launch by launch: {error}"));
                None
            }
            other => other?,
        };
        let instead_of = plan.streamed.as_ref().filter(|_| streamed.is_some());
        let skipped = instead_of.map_or(0, |s| s.instead_of);
        let steps = launched(&plan.token[skipped..]).chain(launched(&plan.chunk));
        let lowered = steps.filter(|(_, written)| written.is_none());
        let mut programs: Vec<_> = lowered.map(|(s, _)| s.program.clone()).collect();
        programs.sort_by_key(|p| Arc::as_ptr(p) as usize);
        programs.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let programs: Vec<_> = programs.iter().map(|p| (**p).clone()).collect();
        this.loader.load_all(&programs).into_iter().try_for_each(|r| r.map(drop))?;
        this.token = this.ready(streamed, &plan.token[skipped..], graphs)?;
        this.chunk = this.ready(None, &plan.chunk, graphs)?;
        if let Some(prompt) = &plan.prompt {
            let address = |region: usize| this.operand(region).address;
            this.prompt = Some(Prompt::new(&plan, prompt, this.loader.clone(), &address)?);
        }
        Ok(this)
    }

    fn operand(&self, region: usize) -> Operand {
        let r = &self.plan.regions[region];
        let buffer = if r.data.is_empty() { &self.state } else { &self.weights };
        let address = buffer.address() + self.starts[region] as u64;
        Operand { address, bytes: r.bytes as u64 }
    }

    /// The launch in which most of a step goes.
    fn streamed(&self) -> Result<Option<Launch>> {
        let Some(streamed) = &self.plan.streamed else { return Ok(None) };
        for region in streamed.zeros() {
            let zeros = vec![0; self.plan.regions[region].bytes];
            self.state.write_at(&self.stream, self.starts[region], &zeros)?;
        }
        let address = |region: usize| self.operand(region).address;
        let launch = streamed.prepare(&self.loader, &self.stream, &self.plan.regions, &address);
        launch.context(|| "the launch of a step".into()).map(Some)
    }

    fn ready(
        &mut self,
        streamed: Option<Launch>,
        steps: &[DecodeStep],
        graphs: bool,
    ) -> Result<Ready> {
        let mut kernels = Vec::new();
        let mut known: Vec<(&Written, Function)> = Vec::new();
        let address = |region: usize| self.operand(region).address;
        for (step, written) in launched(steps) {
            if let Some(written) = written {
                let found = known.iter().find(|(w, _)| w.same_kernel(written));
                let function = match found {
                    Some((_, function)) => function.clone(),
                    None => {
                        let function = written.function(&self.loader);
                        let function = function.context(|| step.label.clone())?;
                        known.push((written, function.clone()));
                        function
                    }
                };
                let launch = written.prepare(&function, &address);
                kernels.push(ReadyStep::Written(launch.context(|| step.label.clone())?));
                continue;
            }
            let operands: Vec<Operand> = step.operands.iter().map(|&r| self.operand(r)).collect();
            let kernel = self.loader.load(&step.program)?;
            let bound = kernel.bind(&step.sizes, &operands);
            kernels.push(ReadyStep::Bound(bound.context(|| format!("binding {}", step.label))?));
        }
        let mut graph = None;
        if graphs && !kernels.is_empty() {
            let recorded = self
                .stream
                .capture(|stream| launch_all(streamed.as_ref(), &kernels, stream))
                .and_then(|graph| graph.instantiate());
            match recorded {
                Ok(recorded) => graph = Some(recorded),
                Err(error) => self.warnings.push(format!("a step is not recorded: {error}")),
            }
        }
        Ok(Ready { streamed, kernels, graph })
    }

    /// What did not go as planned.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Bytes of weights and of everything else on the device.
    pub fn bytes(&self) -> (usize, usize) {
        (self.weights.len(), self.state.len())
    }

    /// The stream in which it runs.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The launches of a step with the next token.
    pub fn launches(&self) -> Vec<TimedLaunch> {
        let mut all = Vec::new();
        let mut steps = self.plan.token.as_slice();
        if let (Some(streamed), Some(_)) = (&self.plan.streamed, &self.token.streamed) {
            let (here, behind) = steps.split_at(streamed.instead_of);
            steps = behind;
            all.push(TimedLaunch {
                label: "streamed".into(),
                weight_bytes: here.iter().map(|s| s.weight_bytes).sum(),
                cache_bytes: here.iter().map(|s| s.cache_bytes).sum(),
                schedule: streamed.schedule(),
            });
        }
        all.extend(launched(steps).map(|(s, written)| TimedLaunch {
            label: s.label.clone(),
            weight_bytes: s.weight_bytes,
            cache_bytes: s.cache_bytes,
            schedule: written.map_or(&s.schedule, |w| &w.schedule).clone(),
        }));
        all
    }

    /// Time of each of [`Self::launches`] with the next token, in microseconds: from the end of the one before, with the device
    /// kept busy so that launches do not show. The position moves on by two.
    ///
    /// # Errors
    /// The device's.
    pub fn launch_times_us(&mut self) -> Result<Vec<f64>> {
        // While the device is busy with this step, the host gets ahead of it.
        self.run(Which::Token)?;
        let mut marks = vec![self.stream.record()?];
        if let Some(streamed) = &self.token.streamed {
            launch_all(Some(streamed), &[], &self.stream)?;
            marks.push(self.stream.record()?);
        }
        for kernel in &self.token.kernels {
            launch_all(None, std::slice::from_ref(kernel), &self.stream)?;
            marks.push(self.stream.record()?);
        }
        self.stream.synchronize()?;
        marks.windows(2).map(|pair| pair[1].since_us(&pair[0])).collect()
    }
}

/// What is launched for these steps: each, or what stands in for it and perhaps for those behind it.
fn launched(steps: &[DecodeStep]) -> impl Iterator<Item = (&DecodeStep, Option<&Written>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let step = steps.get(at)?;
        at += step.written.as_ref().map_or(1, |w| w.stands_for);
        Some((step, step.written.as_ref()))
    })
}

fn launch_all(streamed: Option<&Launch>, kernels: &[ReadyStep], stream: &Stream) -> Result<()> {
    if let Some(streamed) = streamed {
        // SAFETY: as below; the launch owns its tables, and `DeviceDecoder::streamed` has zeroed what must be zero.
        unsafe { streamed.prepared().launch(stream)? };
    }
    for kernel in kernels {
        match kernel {
            // SAFETY: weights and state live as long as the decoder, which synchronises before it drops them;
            // nobody else uses them, and always in this stream.
            ReadyStep::Bound(kernel) => unsafe { kernel.launch(stream)? },
            // SAFETY: as above; its arguments are places of the plan's regions, which have the sizes that it was defined with.
            ReadyStep::Written(launch) => unsafe { launch.launch(stream)? },
        }
    }
    Ok(())
}

impl DecodeMachine for DeviceDecoder {
    fn write(&mut self, region: usize, bytes: &[u8]) -> Result<()> {
        let r = &self.plan.regions[region];
        if !r.data.is_empty() || bytes.len() > r.bytes {
            return Err(Error::bug(format!("{} bytes for {}", bytes.len(), r.name)));
        }
        self.state.write_at(&self.stream, self.starts[region], bytes)
    }

    fn read(&mut self, region: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.plan.regions[region].bytes];
        self.state.read_at(&self.stream, self.starts[region], &mut bytes)?;
        Ok(bytes)
    }

    fn prompt(&mut self, prompts: &[Vec<i64>]) -> Result<bool> {
        let Some(prompt) = &self.prompt else { return Ok(false) };
        let operand = |region: usize| self.operand(region);
        match prompt.run(&self.plan, prompts, (&self.loader, &self.stream), &operand) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == Kind::Unsupported => {
                self.warnings.push(format!("the prompt goes token by token: {error}"));
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn run(&mut self, which: Which) -> Result<()> {
        let ready = if which == Which::Token { &self.token } else { &self.chunk };
        match &ready.graph {
            // SAFETY: as in `launch_all`; recordings are dropped with the memory that they name.
            Some(graph) => unsafe { graph.launch(&self.stream) },
            None => launch_all(ready.streamed.as_ref(), &ready.kernels, &self.stream),
        }
    }
}

impl Drop for DeviceDecoder {
    fn drop(&mut self) {
        // Memory goes only when the device is done with it; there is nobody to tell of an error.
        let _ = self.stream.synchronize();
    }
}
