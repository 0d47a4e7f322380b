//! [`Direct`]: a plan on a device, launched in a caller's stream over a caller's memory.
//!
//! For those who own memory and stream already (an operator of another framework): nothing is copied, nothing is
//! recorded, and a run is one call of the driver per kernel. Every kernel must run on the device.
//!
//! ```text
//! Direct --fit(sizes)--> Fitted: kernels compiled, loaded, arguments packed; remembered
//! Fitted --launch(addresses, stream)--> the driver
//! ```

use crate::bind::{BoundStep, bind};
use crate::choose::{Chooser, Launch, Source};
use crate::host::constant;
use crate::product::ALIGNED;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tilewright_base::{Error, Result};
use tilewright_cuda::{Buffer, Stream};
use tilewright_data::Tensor;
use tilewright_launch::{BoundKernel, Loader, Operand, first_that_works};
use tilewright_layout::Env;
use tilewright_plan::arena::{Live, plan_arena};
use tilewright_plan::{BufferId, Plan, Storage};
use tilewright_target::Gpu;

/// A plan on a device; see the module's head.
pub struct Direct {
    plan: Plan,
    loader: Arc<Loader>,
    chooser: Mutex<Chooser>,
    /// Held for its addresses.
    _constants: Buffer,
    /// Addresses.
    constant_at: Vec<u64>,
    /// By the values of the plan's symbols. Looked up only, never iterated.
    fitted: Mutex<HashMap<Vec<i64>, Arc<Fitted>>>,
}

/// How many sizes are remembered; then all are forgotten (compiled kernels stay).
const MAX_FITTED: usize = 1024;

/// Where a constant lies.
enum Fixed {
    /// In memory of the plan's own, from this byte.
    Here(usize),
    /// At an address of others.
    There(u64),
}

impl Fixed {
    fn address(self, start: u64) -> u64 {
        match self {
            Fixed::Here(at) => start + at as u64,
            Fixed::There(address) => address,
        }
    }
}

/// Where an operand lies.
#[derive(Clone, Copy)]
enum Place {
    Input(usize, u64),
    Output(usize, u64),
    /// In the caller's scratch memory.
    Scratch(u64),
    /// In the constants.
    Fixed(u64),
}

/// A plan with sizes.
pub struct Fitted {
    kernels: Mutex<Kernels>,
    scratch_bytes: usize,
    input_bytes: Vec<usize>,
    output_bytes: Vec<usize>,
    schedules: Vec<String>,
}

struct Kernels {
    steps: Vec<(BoundKernel, Vec<Place>)>,
    /// Room for the addresses of one launch.
    addresses: Vec<u64>,
}

impl Direct {
    /// Copies the plan's constants to the device of the loader.
    ///
    /// # Errors
    /// When they do not fit its memory.
    pub fn new(plan: Plan, loader: Arc<Loader>, machine: Gpu) -> Result<Direct> {
        Direct::with_known(plan, loader, machine, &|_| None)
    }

    /// The same, where some constants are on the device already: `known` says at which address, for those that lie
    /// row-major. They stay there as long as this is used.
    ///
    /// # Errors
    /// As [`Direct::new`].
    pub fn with_known(
        plan: Plan,
        loader: Arc<Loader>,
        machine: Gpu,
        known: &dyn Fn(&Tensor) -> Option<u64>,
    ) -> Result<Direct> {
        let stream = loader.gpu().stream()?;
        let (mut total, mut constant_at) = (0usize, Vec::new());
        for (_, buffer) in plan.buffers.iter() {
            if let Storage::Const(tensor) = &buffer.storage
                && tensor.dtype() == buffer.dtype
                && buffer.layout.is_row_major()
                && let Some(address) = known(tensor)
            {
                constant_at.push(Fixed::There(address));
                continue;
            }
            constant_at.push(Fixed::Here(total));
            if let Storage::Const(tensor) = &buffer.storage {
                let bytes = buffer.dtype.bytes_for(tensor.len()).unwrap_or(usize::MAX / 2);
                total = total.saturating_add(bytes).next_multiple_of(ALIGNED as usize);
            }
        }
        let constants = stream.alloc(total)?;
        for (id, buffer) in plan.buffers.iter() {
            if let Fixed::Here(at) = constant_at[id.index()]
                && let Some(tensor) = constant(buffer)?
            {
                constants.write_at(&stream, at, tensor.bytes())?;
            }
        }
        stream.synchronize()?;
        let start = constants.address();
        let constant_at = constant_at.into_iter().map(|place| place.address(start)).collect();
        let chooser = Mutex::new(Chooser::new(machine));
        Ok(Direct {
            plan,
            loader,
            chooser,
            _constants: constants,
            constant_at,
            fitted: Mutex::default(),
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The plan for these values of its symbols, in their order. The first time kernels are chosen, compiled and loaded.
    ///
    /// # Errors
    /// The user's about the sizes; unsupported, with the reason, when a kernel does not run on the device.
    pub fn fit(&self, sizes: &[i64]) -> Result<Arc<Fitted>> {
        let known = || self.fitted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fitted) = known().get(sizes) {
            return Ok(fitted.clone());
        }
        let fitted = Arc::new(self.fit_new(sizes)?);
        let mut known = known();
        if known.len() >= MAX_FITTED {
            known.clear();
        }
        known.insert(sizes.to_vec(), fitted.clone());
        Ok(fitted)
    }

    fn fit_new(&self, sizes: &[i64]) -> Result<Fitted> {
        if sizes.len() != self.plan.symbols.len() {
            return Err(Error::bug(format!("{} sizes for a plan", sizes.len())));
        }
        let mut env = Env::new();
        for (symbol, &size) in self.plan.symbols.iter().zip(sizes) {
            if size < symbol.range.min || size > symbol.range.max.min(i32::MAX.into()) {
                let message =
                    format!("size {} = {size} is outside of what kernels take", symbol.name);
                return Err(Error::unsupported(message));
            }
            env.insert(symbol.name.clone(), size);
        }
        let bound = {
            let mut chooser = self.chooser.lock().unwrap_or_else(PoisonError::into_inner);
            bind(&self.plan, &env, &mut chooser)?
        };
        if let Some((_, reason)) = bound.host_steps(&self.plan).into_iter().next() {
            return Err(Error::unsupported(format!("no kernel for the device: {reason}")));
        }
        if !self.plan.states.is_empty() {
            return Err(Error::unsupported("memory that is kept between runs, on a GPU"));
        }
        let (offsets, arena_bytes) = self.intermediates(&bound.bytes);
        let workspace = arena_bytes.next_multiple_of(ALIGNED as usize) as u64;
        let scratch_bytes = workspace as usize + bound.workspace_bytes;
        let place = |args: &[BufferId], source: &Source| match *source {
            Source::Workspace { offset, bytes } => (Place::Scratch(workspace + offset), bytes),
            Source::Param { param, offset } => {
                let id = args[param];
                let place = match self.plan.buffers[id].storage {
                    Storage::Input(i) => Place::Input(i, offset),
                    Storage::Output(i) => Place::Output(i, offset),
                    // There are no states: they were refused above.
                    Storage::Arena | Storage::State(_) => {
                        Place::Scratch(offsets[id.index()] as u64 + offset)
                    }
                    Storage::Const(_) => Place::Fixed(self.constant_at[id.index()] + offset),
                };
                (place, (bound.bytes[id.index()] as u64).saturating_sub(offset))
            }
        };
        let (mut steps, mut schedules) = (Vec::new(), Vec::new());
        // What is tried first is compiled on all processors; below it is only looked up.
        let mut first: Vec<tilewright_device::Program> = Vec::new();
        for step in &bound.steps {
            let BoundStep::Device { choice, .. } = step else { continue };
            for launch in choice.ways.iter().take(1).flat_map(|way| &way.launches) {
                if !first.contains(&launch.program) {
                    first.push((*launch.program).clone());
                }
            }
        }
        drop(self.loader.load_all(&first));
        for step in &bound.steps {
            let BoundStep::Device { args, choice, .. } = step else { continue };
            let load = |launch: &Launch| {
                let places: Vec<(Place, u64)> =
                    launch.operands.iter().map(|source| place(args, source)).collect();
                // Any place that is aligned as the real ones will be.
                let operand =
                    |&(_, bytes): &(Place, u64)| Operand { address: ALIGNED as u64, bytes };
                let operands: Vec<Operand> = places.iter().map(operand).collect();
                let kernel = self.loader.load(&launch.program)?.bind(&launch.sizes, &operands)?;
                Ok((kernel, places.into_iter().map(|(p, _)| p).collect::<Vec<_>>()))
            };
            let taken = first_that_works(&choice.ways, |way| {
                way.launches.iter().map(load).collect::<Result<Vec<_>>>()
            })?;
            let way = &choice.ways[taken.index];
            schedules
                .extend(way.launches.iter().map(|l| format!("{}: {}", l.program.name, l.schedule)));
            steps.extend(taken.value);
        }
        let (mut input_bytes, mut output_bytes) =
            (vec![0; self.plan.inputs.len()], vec![0; self.plan.outputs.len()]);
        for (id, buffer) in self.plan.buffers.iter() {
            match buffer.storage {
                Storage::Input(i) => input_bytes[i] = bound.bytes[id.index()],
                Storage::Output(i) => output_bytes[i] = bound.bytes[id.index()],
                _ => {}
            }
        }
        let kernels = Mutex::new(Kernels { steps, addresses: Vec::new() });
        Ok(Fitted { kernels, scratch_bytes, input_bytes, output_bytes, schedules })
    }

    /// Places of the intermediates in a block of their own, and its size.
    fn intermediates(&self, bytes: &[usize]) -> (Vec<usize>, usize) {
        let mut lives: Vec<Option<Live>> = self
            .plan
            .buffers
            .iter()
            .map(|(id, buffer)| {
                let bytes = bytes[id.index()].next_multiple_of(ALIGNED as usize);
                let live = Live { bytes, first: usize::MAX, last: 0 };
                matches!(buffer.storage, Storage::Arena).then_some(live)
            })
            .collect();
        for (number, step) in self.plan.steps.iter().enumerate() {
            let tilewright_plan::Step::Launch { args, .. } = step else { continue };
            for arg in args {
                if let Some(live) = &mut lives[arg.index()] {
                    live.first = live.first.min(number);
                    live.last = live.last.max(number);
                }
            }
        }
        for live in lives.iter_mut().flatten() {
            live.first = live.first.min(live.last);
        }
        let listed: Vec<Live> = lives.iter().flatten().copied().collect();
        let arena = plan_arena(&listed);
        let mut offsets = arena.offsets.iter();
        let place = |live: &Option<Live>| match live {
            Some(_) => offsets.next().copied().unwrap_or(0),
            None => 0,
        };
        (lives.iter().map(place).collect(), arena.bytes)
    }
}

impl Fitted {
    /// Bytes of memory beside inputs and outputs that a launch takes.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Bytes of each input.
    pub fn input_bytes(&self) -> &[usize] {
        &self.input_bytes
    }

    /// Bytes of each output.
    pub fn output_bytes(&self) -> &[usize] {
        &self.output_bytes
    }

    /// The kernels with their schedules, for people.
    pub fn schedules(&self) -> &[String] {
        &self.schedules
    }

    /// Puts a run into the stream.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// Addresses are those of memory of this device that starts at multiples of 16 bytes (scratch: 256) and is as long as
    /// this says; outputs and scratch overlap with nothing. All of it stays and is used by nobody else, in another order than the
    /// stream's, until the kernels have run (and as long as a recording of them is in use).
    pub unsafe fn launch(
        &self,
        inputs: &[u64],
        outputs: &[u64],
        scratch: u64,
        stream: &Stream,
    ) -> Result<()> {
        if (inputs.len(), outputs.len()) != (self.input_bytes.len(), self.output_bytes.len()) {
            return Err(Error::bug("addresses for another plan"));
        }
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let Kernels { steps, addresses } = &mut *kernels;
        for (kernel, places) in steps {
            addresses.clear();
            addresses.extend(places.iter().map(|place| match *place {
                Place::Input(i, offset) => inputs[i] + offset,
                Place::Output(i, offset) => outputs[i] + offset,
                Place::Scratch(offset) => scratch + offset,
                Place::Fixed(address) => address,
            }));
            kernel.move_to(addresses)?;
            // SAFETY: the operands are as long as those that the kernel was bound with (`fit_new` takes their sizes from
            // the plan), and the rest is the caller's promise.
            unsafe { kernel.launch(stream)? };
        }
        Ok(())
    }
}
