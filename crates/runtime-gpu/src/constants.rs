//! [`Constants`]: a plan's constants on a device, and what its steps make of them alone.
//!
//! Constants go there once, straight from the mapped file, one after another: what a rounded copy takes on the host is
//! free before the next one. Those that are the same bytes in the same type are there once. What steps make of constants
//! alone ([`Once`]) is computed then, part by part; constants that nothing else reads are on the device for their part only.

use crate::choose::Chooser;
use crate::direct::{Direct, Room};
use crate::host::{constant, constant_elements};
use crate::once::Once;
use crate::product::ALIGNED;
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{Result, ResultExt};
use tilewright_cuda::{Buffer as Memory, Stream};
use tilewright_data::Tensor;
use tilewright_launch::Loader;
use tilewright_plan::bind::eval_all;
use tilewright_plan::{Buffer, BufferId, Plan, Step, Storage};
use tilewright_target::Gpu;

/// Where on the device a caller has a constant already, if it has.
pub(crate) type Known<'a> = &'a dyn Fn(&Tensor) -> Option<u64>;

/// See the module's head.
pub(crate) struct Constants {
    memory: Memory,
    /// Address of each buffer that the run reads and does not write; 0 for the others.
    at: Vec<u64>,
    once: Once,
}

/// What makes two constants one: address and length of the stored bytes, their type and the buffer's.
type Key = (usize, usize, usize, usize);

fn key(buffer: &Buffer, tensor: &Tensor) -> Key {
    let stored = tensor.shared_bytes().stored();
    let narrow = tensor.narrow().map_or(tensor.dtype(), |t| t.dtype());
    (stored.as_ptr() as usize, stored.len(), narrow as usize, buffer.dtype as usize)
}

impl Constants {
    /// Copies what a plan's steps read, and makes what they make of that alone.
    ///
    /// # Errors
    /// When it does not fit the device's memory; the compiler's.
    pub(crate) fn load(
        plan: &Plan,
        loader: &Arc<Loader>,
        machine: &Gpu,
        known: Known<'_>,
    ) -> Result<Constants> {
        let mut chooser = Chooser::new(machine.clone());
        let once = Once::of(plan, &mut |number| on_device(plan, number, &mut chooser));
        let stream = loader.gpu().stream()?;
        let constants = Constants::copied(plan, once, &stream, known)?;
        for part in constants.once.parts(plan) {
            let name = part.plan.name.clone();
            constants
                .make(part, loader, machine, &stream)
                .context(|| format!("computing what depends on the weights of `{name}` alone"))?;
        }
        Ok(constants)
    }

    /// Copies what a plan's steps read, all of which are for its run.
    ///
    /// # Errors
    /// When it does not fit the device's memory.
    pub(crate) fn plain(plan: &Plan, stream: &Stream, known: Known<'_>) -> Result<Constants> {
        Constants::copied(plan, Once::none(plan), stream, known)
    }

    fn copied(plan: &Plan, once: Once, stream: &Stream, known: Known<'_>) -> Result<Constants> {
        let (mut total, mut at) = (0usize, vec![0u64; plan.buffers.len()]);
        let mut here: Vec<(BufferId, usize)> = Vec::new();
        let mut first: BTreeMap<Key, Vec<BufferId>> = BTreeMap::new();
        let mut twins: Vec<(BufferId, BufferId)> = Vec::new();
        for (id, buffer) in plan.buffers.iter() {
            let tensor = match &buffer.storage {
                Storage::Const(tensor) => Some(tensor),
                _ if once.makes(id) => None,
                _ => continue,
            };
            if !once.is_read(id) {
                continue;
            }
            if let Some(tensor) = tensor {
                // As it is stored, where that is how the plan wants it.
                let stored = tensor.narrow().unwrap_or_else(|| tensor.clone());
                let as_it_is = stored.dtype() == buffer.dtype && buffer.layout.is_row_major();
                if as_it_is && let Some(address) = known(&stored) {
                    at[id.index()] = address;
                    continue;
                }
                let same = first.entry(key(buffer, tensor)).or_default();
                match same.iter().find(|b| plan.buffers[**b].layout == buffer.layout) {
                    Some(twin) => {
                        twins.push((id, *twin));
                        continue;
                    }
                    None => same.push(id),
                }
            }
            here.push((id, total));
            let bytes = buffer.dtype.bytes_for(constant_elements(buffer)?);
            let bytes = bytes.unwrap_or(usize::MAX / 2);
            total = total.saturating_add(bytes).next_multiple_of(ALIGNED as usize);
        }
        let memory = stream.alloc(total)?;
        for (id, place) in here {
            at[id.index()] = memory.address() + place as u64;
            if let Some(tensor) = constant(&plan.buffers[id])? {
                memory.write_at(stream, place, tensor.bytes())?;
            }
        }
        for (id, twin) in twins {
            at[id.index()] = at[twin.index()];
        }
        stream.synchronize()?;
        Ok(Constants { memory, at, once })
    }

    /// Runs a part, with its outputs at their places in these constants.
    fn make(
        &self,
        part: crate::once::Part,
        loader: &Arc<Loader>,
        machine: &Gpu,
        stream: &Stream,
    ) -> Result<()> {
        // What the run reads as well is there already.
        let shared = |tensor: &Tensor| self.find(&part.plan, tensor);
        let outputs: Vec<u64> = part.outputs.iter().map(|b| self.at[b.index()]).collect();
        let direct = Direct::plain(part.plan.clone(), loader.clone(), machine.clone(), &shared)?;
        let fitted = direct.fit(&[])?;
        let mut room = Room::new(&fitted, loader)?;
        // SAFETY: the outputs are places of these constants, as long as the buffers of the plan that the part was cut
        // from, aligned, and nobody else's until this returns; the room is the part's own.
        unsafe { room.replay(&fitted, &[], &outputs, stream)? };
        stream.synchronize()
    }

    /// The address of a constant of a part that the run reads, too, as it is stored.
    fn find(&self, plan: &Plan, tensor: &Tensor) -> Option<u64> {
        let stored = tensor.shared_bytes().stored();
        let same = |b: &Buffer| match &b.storage {
            Storage::Const(t) => {
                let narrow = t.narrow().map_or(t.dtype(), |t| t.dtype());
                std::ptr::eq(t.shared_bytes().stored(), stored)
                    && (narrow, t.shape()) == (tensor.dtype(), tensor.shape())
                    && b.dtype == tensor.dtype()
                    && b.layout.is_row_major()
            }
            _ => false,
        };
        let mut there = plan.buffers.iter().filter(|(_, b)| same(b)).map(|(id, _)| id);
        there.find(|id| self.once.is_read(*id)).map(|id| self.at[id.index()])
    }

    /// The address of a constant, or of what was made of constants.
    pub(crate) fn address(&self, buffer: BufferId) -> u64 {
        self.at[buffer.index()]
    }

    /// What was done beforehand.
    pub(crate) fn once(&self) -> &Once {
        &self.once
    }

    /// All of it on the device.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Bytes on the device.
    pub(crate) fn len(&self) -> usize {
        self.memory.len()
    }

    /// Reads what was made of constants.
    pub(crate) fn read(&self, stream: &Stream, buffer: BufferId, to: &mut [u8]) -> Result<()> {
        let at = self.at[buffer.index()].saturating_sub(self.memory.address());
        self.memory.read_at(stream, at as usize, to)
    }
}

/// Whether the device has a way to run a step of known sizes.
fn on_device(plan: &Plan, number: usize, chooser: &mut Chooser) -> bool {
    let Step::Launch { kernel, sizes, .. } = &plan.steps[number] else { return false };
    let values = eval_all(sizes, &tilewright_layout::Env::new());
    let choice = values.and_then(|values| chooser.choose(plan, *kernel, &values));
    choice.is_ok_and(|choice| !choice.ways.is_empty())
}
