//! [`Once`]: the steps of a plan that depend on its constants alone. They run once, when the plan is loaded.
//!
//! ```text
//! plan:  b2 = cast(w0)   b3 = pack(b2)   b4 = product(x, b3)   b5 = cast(w1)   b6 = product(b4, b5)
//! once:  [b2 = cast(w0)  b3 = pack(b2)]  [b5 = cast(w1)]       parts: what shares no memory that it makes
//! run:   b4 = product(x, b3)   b6 = product(b4, b5)            b3, b5: constants
//! ```
//!
//! A part is a plan of its own, with what the run reads of it as outputs. Parts run one after another, so that the
//! constants that only they read are on the device for one part at a time.
//!
//! Side conditions: a step reads constants and what such steps make, all of its sizes are known numbers, and it writes
//! nothing that anybody else writes, too. Outputs are the caller's, and are written in every run. What would take much more
//! memory than the constants that it is made of is made in the run as well.

use std::collections::BTreeSet;
use tilewright_base::IdVec;
use tilewright_layout::{Dim, Layout, Symbols};
use tilewright_plan::{Buffer, BufferId, Plan, Step, Storage};
use tilewright_tile::Access;

/// How many times as long as what it reads the result of a step may be (16 bits out of 4), and the length that is always allowed.
const GROWTH: usize = 4;
const FREE_BYTES: usize = 1 << 20;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Once {
    steps: BTreeSet<usize>,
    /// Buffers that those steps make.
    made: BTreeSet<BufferId>,
    /// Constants and made buffers that the run reads.
    read: BTreeSet<BufferId>,
}

/// Steps that share memory which they make, as a plan.
pub(crate) struct Part {
    pub(crate) plan: Plan,
    /// The buffers of its outputs, in order; the same numbers as in the whole plan.
    pub(crate) outputs: Vec<BufferId>,
}

/// What a step reads and writes; both for what it changes.
fn touched(plan: &Plan, step: &Step) -> (Vec<BufferId>, Vec<BufferId>) {
    match step {
        Step::Library { inputs, outputs, .. } | Step::Host { inputs, outputs, .. } => {
            (inputs.clone(), outputs.clone())
        }
        Step::Launch { kernel, args, .. } => {
            let params = plan.kernels[*kernel].kernel.params.iter().zip(args);
            let (mut read, mut written) = (Vec::new(), Vec::new());
            for ((_, param), &buffer) in params {
                match param.access {
                    Access::In => read.push(buffer),
                    Access::Out => written.push(buffer),
                    Access::InOut => {
                        read.push(buffer);
                        written.push(buffer);
                    }
                }
            }
            (read, written)
        }
    }
}

/// Whether a step has a form for the device and sizes that are numbers.
fn fixed_launch(step: &Step) -> bool {
    match step {
        Step::Launch { sizes, .. } => sizes.iter().all(|d| d.as_const().is_some()),
        Step::Library { .. } | Step::Host { .. } => false,
    }
}

/// Bytes that a buffer takes; nothing where its size is no number.
fn bytes(buffer: &Buffer) -> usize {
    let elements = buffer.layout.alloc_elements().as_const().and_then(|n| usize::try_from(n).ok());
    elements.and_then(|n| buffer.dtype.bytes_for(n)).unwrap_or(0)
}

fn fixed_size(buffer: &Buffer) -> bool {
    buffer.layout.alloc_elements().as_const().is_some()
        && buffer.layout.shape().iter().all(|d| d.as_const().is_some())
}

impl Once {
    /// Nothing is done beforehand.
    pub fn none(plan: &Plan) -> Once {
        let mut once = Once::default();
        once.find_read(plan);
        once
    }

    /// What can be done beforehand; `runs` says whether the device runs a step.
    pub fn of(plan: &Plan, runs: &mut dyn FnMut(usize) -> bool) -> Once {
        let arena = |b: BufferId| matches!(plan.buffers[b].storage, Storage::Arena);
        let mut once = Once::default();
        let all: Vec<_> = plan.steps.iter().map(|s| touched(plan, s)).collect();
        for (number, (read, written)) in all.iter().enumerate() {
            let known = |b: &BufferId| {
                matches!(plan.buffers[*b].storage, Storage::Const(_)) || once.made.contains(b)
            };
            let own = |b: &BufferId| arena(*b) && fixed_size(&plan.buffers[*b]);
            // What it changes in place, it may be the first to write.
            let bytes = |list: &[BufferId]| list.iter().map(|b| bytes(&plan.buffers[*b])).sum();
            let (from, to): (usize, usize) = (bytes(read), bytes(written));
            let fits = fixed_launch(&plan.steps[number])
                && to <= from.saturating_mul(GROWTH).max(FREE_BYTES)
                && read.iter().all(|b| known(b) || written.contains(b))
                && written.iter().all(own);
            if fits && runs(number) {
                once.steps.insert(number);
                once.made.extend(written);
            }
        }
        // What others write as well is made in the run, and so is what depends on it.
        loop {
            let others = all.iter().enumerate().filter(|(number, _)| !once.has(*number));
            let theirs: BTreeSet<BufferId> = others.flat_map(|(_, (_, w))| w.clone()).collect();
            let ours = once.steps.iter().flat_map(|&number| all[number].1.clone());
            once.made = ours.filter(|b| !theirs.contains(b)).collect();
            let (made, before) = (&once.made, once.steps.len());
            once.steps.retain(|&number| {
                let (read, written) = &all[number];
                let constant = |b: &BufferId| matches!(plan.buffers[*b].storage, Storage::Const(_));
                written.iter().all(|b| made.contains(b))
                    && read.iter().all(|b| constant(b) || made.contains(b))
            });
            if once.steps.len() == before {
                break;
            }
        }
        once.find_read(plan);
        once
    }

    fn find_read(&mut self, plan: &Plan) {
        for (number, step) in plan.steps.iter().enumerate() {
            if !self.steps.contains(&number) {
                self.read.extend(touched(plan, step).0);
            }
        }
    }

    /// Numbers of the steps, in order.
    pub fn steps(&self) -> impl Iterator<Item = usize> + '_ {
        self.steps.iter().copied()
    }

    /// Whether a step is done beforehand.
    pub fn has(&self, step: usize) -> bool {
        self.steps.contains(&step)
    }

    /// Whether such a step makes a buffer.
    pub fn makes(&self, buffer: BufferId) -> bool {
        self.made.contains(&buffer)
    }

    /// Whether the run reads a buffer.
    pub fn is_read(&self, buffer: BufferId) -> bool {
        self.read.contains(&buffer)
    }

    /// The parts, in the order of their first steps.
    pub(crate) fn parts(&self, plan: &Plan) -> Vec<Part> {
        let mut groups: Vec<(Vec<usize>, BTreeSet<BufferId>)> = Vec::new();
        for number in self.steps() {
            let (read, written) = touched(plan, &plan.steps[number]);
            let made = read.into_iter().chain(written).filter(|b| self.makes(*b));
            let (mut steps, mut buffers) = (vec![number], made.collect::<BTreeSet<_>>());
            // Groups that share a buffer with this step become one, where the first of them stood.
            let mut place = None;
            let mut at = 0;
            while at < groups.len() {
                if groups[at].1.is_disjoint(&buffers) {
                    at += 1;
                    continue;
                }
                let (others, theirs) = groups.remove(at);
                place = place.or(Some(at));
                steps.extend(others);
                buffers.extend(theirs);
            }
            steps.sort_unstable();
            groups.insert(place.unwrap_or(groups.len()), (steps, buffers));
        }
        groups.into_iter().map(|(steps, made)| self.part(plan, &steps, &made)).collect()
    }

    fn part(&self, plan: &Plan, steps: &[usize], made: &BTreeSet<BufferId>) -> Part {
        let mut used = made.clone();
        used.extend(steps.iter().flat_map(|&n| touched(plan, &plan.steps[n]).0));
        let outputs: Vec<BufferId> = made.iter().copied().filter(|b| self.is_read(*b)).collect();
        let mut buffers: IdVec<BufferId, Buffer> = IdVec::new();
        for (id, buffer) in plan.buffers.iter() {
            let mut own = match used.contains(&id) {
                true => buffer.clone(),
                // Numbers stay as they are; nobody reads or writes it.
                false => Buffer {
                    name: String::new(),
                    value: None,
                    dtype: buffer.dtype,
                    layout: Layout::row_major(&[Dim::new(0)]),
                    storage: Storage::Arena,
                },
            };
            if let Some(i) = outputs.iter().position(|b| *b == id) {
                own.storage = Storage::Output(i);
            }
            buffers.push(own);
        }
        let signature = |b: &BufferId| {
            let buffer = &plan.buffers[*b];
            (buffer.name.clone(), buffer.dtype, buffer.layout.shape())
        };
        let own = Plan {
            name: plan.name.clone(),
            symbols: Symbols::default(),
            buffers,
            kernels: plan.kernels.clone(),
            steps: steps.iter().map(|&n| plan.steps[n].clone()).collect(),
            outputs: outputs.iter().map(signature).collect(),
            ..Plan::default()
        };
        Part { plan: own, outputs }
    }
}
