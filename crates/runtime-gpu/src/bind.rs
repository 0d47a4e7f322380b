//! [`bind`]: a plan with all sizes known: steps over one block of memory.
//!
//! Inputs, outputs, intermediates and the workspace of the kernels share one block (the arena), so that
//! addresses stay the same from run to run and a recorded graph stays valid. Constants have a block of
//! their own, filled once, with what steps make of them alone ([`Once`]).

use crate::choose::{Choice, Chooser};
use crate::in_place::join;
use crate::once::Once;
use crate::product::ALIGNED;
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_layout::Env;
use tilewright_plan::arena::{Live, plan_arena};
use tilewright_plan::bind::{concrete, eval_all};
use tilewright_plan::{BufferId, KernelId, Plan, Step, Storage};

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Among the constants, or made of them alone.
    Const,
    /// In the arena, from this byte on.
    Arena(usize),
    /// In the caller's memory: this input of the plan.
    Input(usize),
    /// In the caller's memory: this output of the plan.
    Output(usize),
}

/// Where the inputs and outputs of a run lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the arena, with copies from and to the host.
    Arena,
    /// In the caller's memory on the device, at addresses that each run brings along.
    Caller,
}

impl Place {
    /// Where a buffer lies if it is the caller's.
    fn slot(self, storage: &Storage) -> Option<Slot> {
        match (self, storage) {
            (Place::Caller, Storage::Input(i)) => Some(Slot::Input(*i)),
            (Place::Caller, Storage::Output(i)) => Some(Slot::Output(*i)),
            _ => None,
        }
    }
}

/// The key of a run: the values of the plan's symbols.
pub(crate) fn key(plan: &Plan, env: &Env) -> Vec<i64> {
    plan.symbols.iter().map(|s| env.get(&s.name).copied().unwrap_or(0)).collect()
}

/// One step with its sizes.
#[derive(Clone, Debug)]
pub enum BoundStep {
    /// Launches of a kernel.
    Device {
        /// Which kernel; none for kernels of the library.
        kernel: Option<KernelId>,
        /// A buffer per parameter.
        args: Vec<BufferId>,
        /// Its size symbols.
        sizes: Env,
        /// The ways to run it.
        choice: Arc<Choice>,
    },
    /// A kernel that the device cannot run: its tile program runs in the interpreter.
    HostKernel {
        /// Which kernel.
        kernel: KernelId,
        /// A buffer per parameter.
        args: Vec<BufferId>,
        /// Its size symbols.
        sizes: Env,
        /// Why.
        reason: String,
    },
    /// An operator that only the interpreter has.
    HostOp,
    /// Nothing: it was done when the plan was loaded.
    Once,
}

/// A plan with all sizes known.
#[derive(Debug)]
pub struct Bound {
    /// The values of the plan's symbols, in order.
    pub key: Vec<i64>,
    /// The same by name.
    pub env: Env,
    /// Shape of each buffer.
    pub shapes: Vec<Vec<usize>>,
    /// Bytes of each buffer.
    pub bytes: Vec<usize>,
    /// Place of each buffer.
    pub slots: Vec<Slot>,
    /// Size of the arena without the workspace.
    pub arena_bytes: usize,
    /// What one allocation per buffer would take.
    pub naive_bytes: usize,
    /// Size of the arena if no result lay in the memory of an operand.
    pub apart_bytes: usize,
    /// Size of the workspace; it follows the rest of the arena.
    pub workspace_bytes: usize,
    /// One per step of the plan.
    pub steps: Vec<BoundStep>,
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNED as usize)
}

impl Bound {
    /// First byte of the workspace.
    pub fn workspace(&self) -> usize {
        aligned(self.arena_bytes)
    }

    /// Size of the whole block.
    pub fn total_bytes(&self) -> usize {
        self.workspace() + self.workspace_bytes
    }

    /// Steps that run on the host, with their reasons.
    pub fn host_steps<'a>(&'a self, plan: &'a Plan) -> Vec<(usize, String)> {
        let reason = |step: &BoundStep, number: usize| match (step, &plan.steps[number]) {
            (BoundStep::HostKernel { reason, .. }, _) => Some(reason.clone()),
            (BoundStep::HostOp, Step::Host { op, .. }) => {
                Some(format!("{} runs in the interpreter", op.name))
            }
            _ => None,
        };
        let steps = self.steps.iter().enumerate();
        steps.filter_map(|(i, s)| reason(s, i).map(|r| (i, r))).collect()
    }
}

/// Binds a plan to sizes.
///
/// # Errors
/// The user's when a size is not known or too large, or layouts are not those of a plan for a GPU; our bugs.
pub fn bind(plan: &Plan, env: &Env, chooser: &mut Chooser) -> Result<Bound> {
    bind_at(plan, env, Place::Arena, &Once::none(plan), chooser)
}

/// Binds a plan to sizes, with inputs and outputs in the caller's memory or in the arena, and some steps done beforehand.
///
/// # Errors
/// As [`bind`].
pub fn bind_at(
    plan: &Plan,
    env: &Env,
    place: Place,
    once: &Once,
    chooser: &mut Chooser,
) -> Result<Bound> {
    let (mut shapes, mut bytes) = (Vec::new(), Vec::new());
    for (_, buffer) in plan.buffers.iter() {
        let shape = concrete(&buffer.layout.shape(), env)?;
        let elements = match shape.contains(&0) {
            true => 0,
            false => concrete(&[buffer.layout.alloc_elements()], env)?[0],
        };
        let size = buffer.dtype.bytes_for(elements).filter(|&b| b < isize::MAX as usize / 2);
        bytes.push(size.ok_or_else(|| {
            Error::user(format!("`{}` of shape {shape:?} is too large", buffer.name))
        })?);
        shapes.push(shape);
    }
    let mut steps = Vec::with_capacity(plan.steps.len());
    let mut workspace_bytes = 0;
    for (number, step) in plan.steps.iter().enumerate() {
        steps.push(match step {
            _ if once.has(number) => BoundStep::Once,
            Step::Launch { kernel, args, sizes, .. } => {
                let values = eval_all(sizes, env)?;
                let choice = chooser.choose(plan, *kernel, &values)?;
                let (kernel, args) = (*kernel, args.clone());
                let symbols = plan.kernels[kernel].kernel.symbols.iter();
                let sizes = symbols.zip(values).map(|(s, v)| (s.name.clone(), v)).collect();
                if choice.ways.is_empty() {
                    BoundStep::HostKernel { kernel, args, sizes, reason: choice.reason() }
                } else {
                    let most = choice.ways.iter().map(|w| w.workspace_bytes).max().unwrap_or(0);
                    workspace_bytes = workspace_bytes.max(aligned(most as usize));
                    BoundStep::Device { kernel: Some(kernel), args, sizes, choice }
                }
            }
            Step::Library { call, inputs, outputs, .. } => {
                let choice = chooser.library(call, env)?;
                if choice.ways.is_empty() {
                    let reason = choice.reason();
                    return Err(Error::unsupported(format!("{}: {reason}", call.name())));
                }
                let most = choice.ways.iter().map(|w| w.workspace_bytes).max().unwrap_or(0);
                workspace_bytes = workspace_bytes.max(aligned(most as usize));
                let args = [inputs.as_slice(), outputs.as_slice()].concat();
                BoundStep::Device { kernel: None, args, sizes: Env::new(), choice }
            }
            Step::Host { .. } => BoundStep::HostOp,
        });
    }
    let mut lives = lives(plan, once, &bytes);
    let mut callers = Vec::with_capacity(lives.len());
    for ((_, buffer), live) in plan.buffers.iter().zip(&mut lives) {
        let slot = place.slot(&buffer.storage);
        if slot.is_some() {
            *live = None;
        }
        callers.push(slot);
    }
    let apart: Vec<usize> = (0..lives.len()).collect();
    let mut arena = placed(&lives, &apart, &lives);
    // Sharing is a wish of each kernel alone; the arena as a whole may be better off without.
    let on_device = |number: usize| matches!(steps[number], BoundStep::Device { .. });
    let (joined, home) = join(plan, &on_device, &lives);
    let shared = placed(&joined, &home, &lives);
    let (naive_bytes, apart_bytes) = (arena.naive_bytes, arena.bytes);
    if shared.bytes < arena.bytes {
        arena = shared;
    }
    let own = arena.slots.into_iter().zip(callers);
    let slots = own.map(|(slot, caller)| caller.unwrap_or(slot)).collect();
    Ok(Bound {
        key: key(plan, env),
        env: env.clone(),
        shapes,
        bytes,
        slots,
        arena_bytes: arena.bytes,
        naive_bytes,
        apart_bytes,
        workspace_bytes,
        steps,
    })
}

/// An arena with the place of each buffer.
struct Placed {
    slots: Vec<Slot>,
    bytes: usize,
    naive_bytes: usize,
}

/// Places lives; each buffer that has one in `lives` lies where its home does.
fn placed(joined: &[Option<Live>], home: &[usize], lives: &[Option<Live>]) -> Placed {
    let listed: Vec<Live> = joined.iter().flatten().copied().collect();
    let arena = plan_arena(&listed);
    let mut offsets = arena.offsets.iter();
    let at: Vec<Option<usize>> =
        joined.iter().map(|live| live.and_then(|_| offsets.next().copied())).collect();
    let slot = |b: usize| match lives[b] {
        Some(_) => Slot::Arena(at[home[b]].unwrap_or(0)),
        None => Slot::Const,
    };
    let slots = (0..lives.len()).map(slot).collect();
    Placed { slots, bytes: arena.bytes, naive_bytes: arena.naive_bytes }
}

/// From which step to which each buffer is needed; `None` for constants and what is made of them alone. Sizes are whole units of
/// [`ALIGNED`], so that all starts are, too.
fn lives(plan: &Plan, once: &Once, bytes: &[usize]) -> Vec<Option<Live>> {
    let last = plan.steps.len();
    let mut lives: Vec<Option<Live>> = plan
        .buffers
        .iter()
        .map(|(id, buffer)| {
            let bytes = aligned(bytes[id.index()]);
            match buffer.storage {
                Storage::Const(_) | Storage::State(_) => None,
                _ if once.makes(id) => None,
                // Inputs stay, so that a run can be repeated without copying them again.
                Storage::Input(_) => Some(Live { bytes, first: 0, last }),
                Storage::Output(_) => Some(Live { bytes, first: usize::MAX, last }),
                Storage::Arena => Some(Live { bytes, first: usize::MAX, last: 0 }),
            }
        })
        .collect();
    for (number, step) in plan.steps.iter().enumerate().filter(|(n, _)| !once.has(*n)) {
        let mut touch = |b: &BufferId| {
            if let Some(live) = &mut lives[b.index()] {
                live.first = live.first.min(number);
                live.last = live.last.max(number);
            }
        };
        match step {
            Step::Launch { args, .. } => args.iter().for_each(&mut touch),
            Step::Library { inputs, outputs, .. } | Step::Host { inputs, outputs, .. } => {
                inputs.iter().chain(outputs).for_each(&mut touch);
            }
        }
    }
    for live in lives.iter_mut().flatten() {
        // What stays in the registers of a fused kernel needs no memory.
        if live.first == usize::MAX && live.last == 0 {
            live.bytes = 0;
        }
        live.first = live.first.min(live.last);
    }
    lives
}
