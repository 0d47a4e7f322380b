//! Steps that run on the host, over whatever memory there is.

use crate::bind::{Bound, BoundStep};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use tilewright_base::{Error, Result, ResultExt};
use tilewright_data::{Bytes, Tensor, check_memory};
use tilewright_interp::{Mode, tile};
use tilewright_plan::{Buffer, BufferId, Plan, Step, Storage};
use tilewright_tile::Access;

/// Bytes of buffers that are no constants.
pub(crate) trait Memory {
    /// All bytes of a buffer.
    fn read(&mut self, buffer: BufferId) -> Result<Vec<u8>>;
    /// Replaces all bytes of a buffer.
    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<()>;
}

/// The bytes of a constant as the plan stores them; the elements as one axis when they do not lie row-major.
pub(crate) fn constant(buffer: &Buffer) -> Result<Option<Tensor>> {
    let Storage::Const(tensor) = &buffer.storage else { return Ok(None) };
    let rounded = tensor.rounded(buffer.dtype).context(|| format!("rounding `{}`", buffer.name))?;
    if buffer.layout.is_row_major() {
        return Ok(Some(rounded));
    }
    packed(buffer, &rounded).map(Some)
}

/// Elements that a constant takes.
pub(crate) fn constant_elements(buffer: &Buffer) -> Result<usize> {
    let elements = buffer.layout.alloc_elements().as_const();
    let elements = elements.and_then(|n| usize::try_from(n).ok());
    elements.ok_or_else(|| Error::bug(format!("constant `{}` has a size unknown", buffer.name)))
}

/// A tensor under a strided layout; zeros where no element lies.
fn packed(buffer: &Buffer, tensor: &Tensor) -> Result<Tensor> {
    let bug = || Error::bug(format!("constant `{}` of a GPU's plan is in blocks", buffer.name));
    let elements = constant_elements(buffer)?;
    let size = buffer.dtype.bytes_for(1).filter(|_| buffer.dtype.bits() >= 8).ok_or_else(bug)?;
    let mut strides = Vec::new();
    for axis in &buffer.layout.axes {
        let stride = axis.stride.as_const().filter(|_| axis.block.is_none());
        strides.push(stride.and_then(|s| usize::try_from(s).ok()).ok_or_else(bug)?);
    }
    let offset = buffer.layout.offset.as_const().and_then(|o| usize::try_from(o).ok());
    let offset = offset.ok_or_else(bug)?;
    check_memory(elements.saturating_mul(size), "a packed constant")?;
    let mut out = vec![0u8; elements * size];
    let shape = tensor.shape();
    let mut at = vec![0usize; shape.len()];
    for element in tensor.bytes().chunks_exact(size) {
        let to = offset + at.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>();
        let place = out.get_mut(to * size..(to + 1) * size).ok_or_else(bug)?;
        place.copy_from_slice(element);
        for axis in (0..shape.len()).rev() {
            at[axis] += 1;
            if at[axis] < shape[axis] {
                break;
            }
            at[axis] = 0;
        }
    }
    Tensor::new(buffer.dtype, [elements], Bytes::copy_from(&out))
}

/// Runs one step that is the host's.
pub(crate) fn run(
    plan: &Plan,
    bound: &Bound,
    number: usize,
    memory: &mut dyn Memory,
) -> Result<()> {
    match (&bound.steps[number], &plan.steps[number]) {
        (BoundStep::HostKernel { .. }, _) => kernel(plan, bound, number, memory),
        (BoundStep::HostOp, Step::Host { op, inputs, outputs, .. }) => {
            let mut operands = Vec::new();
            for &b in inputs {
                let buffer = &plan.buffers[b];
                operands.push(match constant(buffer)? {
                    Some(tensor) => tensor,
                    None => {
                        let bytes = memory.read(b)?;
                        let shape = bound.shapes[b.index()].clone();
                        Tensor::new(buffer.dtype, shape, Bytes::copy_from(&bytes))?
                    }
                });
            }
            let results =
                (op.run)(&operands, &bound.env).context(|| format!("host step {}", op.name))?;
            if results.len() != outputs.len() {
                return Err(Error::bug(format!("{} results of {}", results.len(), op.name)));
            }
            for (&b, result) in outputs.iter().zip(results) {
                let fits = result.shape() == bound.shapes[b.index()]
                    && result.dtype() == plan.buffers[b].dtype;
                if !fits {
                    return Err(Error::bug(format!(
                        "{} gives {} {:?}, its buffer is {} {:?}",
                        op.name,
                        result.dtype(),
                        result.shape(),
                        plan.buffers[b].dtype,
                        bound.shapes[b.index()]
                    )));
                }
                memory.write(b, result.bytes())?;
            }
            Ok(())
        }
        _ => Err(Error::bug(format!("step {number} is not the host's"))),
    }
}

/// Runs a kernel in the tile interpreter.
fn kernel(plan: &Plan, bound: &Bound, number: usize, memory: &mut dyn Memory) -> Result<()> {
    let BoundStep::HostKernel { kernel, args, sizes, .. } = &bound.steps[number] else {
        return Ok(());
    };
    let planned = &plan.kernels[*kernel];
    let mut before: BTreeMap<BufferId, Vec<u8>> = BTreeMap::new();
    for &b in args {
        if let Entry::Vacant(slot) = before.entry(b) {
            slot.insert(match constant(&plan.buffers[b])? {
                Some(tensor) => tensor.bytes().to_vec(),
                None => memory.read(b)?,
            });
        }
    }
    let mut bytes: Vec<Vec<u8>> = args.iter().map(|b| before[b].clone()).collect();
    tile::run(&planned.kernel, &planned.schedule, sizes, &mut bytes, Mode::Exact)
        .context(|| format!("kernel {} on the host", planned.kernel.name))?;
    let params = planned.kernel.params.iter().map(|(_, p)| p.access != Access::In);
    let written = params.zip(args).zip(&bytes).filter(|((w, _), _)| *w);
    for (b, bytes) in merged(&before, written.map(|((_, b), bytes)| (*b, bytes.as_slice()))) {
        memory.write(b, &bytes)?;
    }
    Ok(())
}

/// What buffers hold after several writers changed copies of them, each its own bytes.
pub(crate) fn merged<'a>(
    before: &BTreeMap<BufferId, Vec<u8>>,
    written: impl Iterator<Item = (BufferId, &'a [u8])>,
) -> BTreeMap<BufferId, Vec<u8>> {
    let mut after: BTreeMap<BufferId, Vec<u8>> = BTreeMap::new();
    for (b, bytes) in written {
        let old = &before[&b];
        let now = after.entry(b).or_insert_with(|| old.clone());
        for ((to, old), new) in now.iter_mut().zip(old).zip(bytes) {
            if old != new {
                *to = *new;
            }
        }
    }
    after
}
