//! [`interpret`]: a bound plan in the device interpreter, over one arena as on the device. The whole way
//! from a model to device programs is tested with it, without a GPU.

use crate::bind::{Bound, BoundStep, Place, Slot, bind_at};
use crate::choose::{Chooser, Source};
use crate::host::{self, Memory, constant, merged};
use crate::once::Once;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use tilewright_base::{Error, Result, ResultExt};
use tilewright_data::{Bytes, Tensor};
use tilewright_interp::{Mode, device};
use tilewright_layout::Env;
use tilewright_plan::bind::{bind_symbols, eval_all, has_unbacked};
use tilewright_plan::{BufferId, Plan, Step, Storage};
use tilewright_tile::Access;

/// The arena in host memory; bytes that nobody has written are 0xFF (NaN in every float type).
struct Arena<'a> {
    bound: &'a Bound,
    bytes: Vec<u8>,
    /// What was made of constants alone.
    made: &'a BTreeMap<BufferId, Vec<u8>>,
}

impl Arena<'_> {
    fn range(&self, b: BufferId) -> Result<std::ops::Range<usize>> {
        match self.bound.slots[b.index()] {
            Slot::Arena(offset) => Ok(offset..offset + self.bound.bytes[b.index()]),
            _ => Err(Error::bug("a buffer that is not in the arena")),
        }
    }
}

impl Memory for Arena<'_> {
    fn read(&mut self, b: BufferId) -> Result<Vec<u8>> {
        if let Some(made) = self.made.get(&b) {
            return Ok(made.clone());
        }
        let range = self.range(b)?;
        Ok(self.bytes[range].to_vec())
    }

    fn write(&mut self, b: BufferId, bytes: &[u8]) -> Result<()> {
        let range = self.range(b)?;
        if range.len() != bytes.len() {
            return Err(Error::bug(format!(
                "{} bytes for a buffer of {}",
                bytes.len(),
                range.len()
            )));
        }
        self.bytes[range].copy_from_slice(bytes);
        Ok(())
    }
}

/// What a run in the interpreter gives.
#[derive(Debug)]
pub struct Interpreted {
    /// The outputs.
    pub outputs: Vec<Tensor>,
    /// The sizes, ways and memory with which it ran.
    pub bound: Bound,
}

/// Runs a plan on inputs in its order, every kernel in its best way; what depends on constants alone first, in memory of its own.
///
/// # Errors
/// The user's about the inputs; bugs that the interpreter finds in the device programs.
pub fn interpret(plan: &Plan, inputs: &[Tensor], chooser: &mut Chooser) -> Result<Interpreted> {
    let env = bind_symbols(plan, inputs)?;
    if has_unbacked(plan, &env) {
        return Err(Error::unsupported("sizes that depend on data, on a GPU"));
    }
    let once = Once::of(plan, &mut |number| match &plan.steps[number] {
        Step::Launch { kernel, sizes, .. } => {
            let values = eval_all(sizes, &env);
            let choice = values.and_then(|values| chooser.choose(plan, *kernel, &values));
            choice.is_ok_and(|choice| !choice.ways.is_empty())
        }
        Step::Library { .. } | Step::Host { .. } => false,
    });
    let mut made: BTreeMap<BufferId, Vec<u8>> = BTreeMap::new();
    for part in once.parts(plan) {
        let bound =
            bind_at(&part.plan, &Env::new(), Place::Arena, &Once::none(&part.plan), chooser)?;
        let none = BTreeMap::new();
        let mut arena =
            Arena { bound: &bound, bytes: vec![0xFF; bound.total_bytes()], made: &none };
        for number in 0..part.plan.steps.len() {
            step(&part.plan, &mut arena, number).context(|| format!("step {number} at loading"))?;
        }
        for b in part.outputs {
            made.insert(b, arena.read(b)?);
        }
    }
    let bound = bind_at(plan, &env, Place::Arena, &once, chooser)?;
    let mut arena = Arena { bound: &bound, bytes: vec![0xFF; bound.total_bytes()], made: &made };
    for (id, buffer) in plan.buffers.iter() {
        if let Storage::Input(i) = buffer.storage {
            arena.write(id, inputs[i].bytes())?;
        }
    }
    for number in 0..plan.steps.len() {
        step(plan, &mut arena, number).context(|| format!("step {number} of {}", plan.name))?;
    }
    let mut outputs = Vec::new();
    for i in 0..plan.outputs.len() {
        let found =
            plan.buffers.iter().find(|(_, b)| matches!(b.storage, Storage::Output(o) if o == i));
        let (id, buffer) = found.ok_or_else(|| Error::bug(format!("no buffer of output {i}")))?;
        let bytes = Bytes::copy_from(&arena.read(id)?);
        outputs.push(Tensor::new(buffer.dtype, bound.shapes[id.index()].clone(), bytes)?);
    }
    Ok(Interpreted { outputs, bound })
}

fn step(plan: &Plan, arena: &mut Arena<'_>, number: usize) -> Result<()> {
    let bound = arena.bound;
    if matches!(bound.steps[number], BoundStep::Once) {
        return Ok(());
    }
    let BoundStep::Device { args, choice, .. } = &bound.steps[number] else {
        return host::run(plan, bound, number, arena);
    };
    for launch in &choice.ways[0].launches {
        let program = &launch.program;
        let mut before: BTreeMap<BufferId, Vec<u8>> = BTreeMap::new();
        let mut buffers = Vec::new();
        for source in &launch.operands {
            buffers.push(match source {
                Source::Param { param, offset } => {
                    let b = args[*param];
                    if let Entry::Vacant(slot) = before.entry(b) {
                        slot.insert(match constant(&plan.buffers[b])? {
                            Some(tensor) => tensor.bytes().to_vec(),
                            None => arena.read(b)?,
                        });
                    }
                    let bytes = before[&b].get(*offset as usize..);
                    bytes.ok_or_else(|| Error::bug("an operand behind its buffer"))?.to_vec()
                }
                Source::Workspace { offset, bytes } => {
                    let start = bound.workspace() + *offset as usize;
                    arena.bytes[start..start + *bytes as usize].to_vec()
                }
            });
        }
        let options =
            device::Options { mode: Mode::Exact, clusters: 2, ..device::Options::default() };
        device::run(program, &launch.sizes, &mut buffers, &options)
            .context(|| format!("program {} ({})", program.name, launch.schedule))?;
        let mut written: Vec<(BufferId, Vec<u8>)> = Vec::new();
        for (((_, param), source), bytes) in
            program.params.iter().zip(&launch.operands).zip(buffers)
        {
            match source {
                _ if param.access == Access::In => {}
                Source::Workspace { offset, .. } => {
                    let start = bound.workspace() + *offset as usize;
                    arena.bytes[start..start + bytes.len()].copy_from_slice(&bytes);
                }
                Source::Param { param, offset } => {
                    let b = args[*param];
                    let mut whole = before[&b].clone();
                    whole[*offset as usize..].copy_from_slice(&bytes);
                    written.push((b, whole));
                }
            }
        }
        for (b, bytes) in merged(&before, written.iter().map(|(b, w)| (*b, w.as_slice()))) {
            arena.write(b, &bytes)?;
        }
    }
    Ok(())
}
