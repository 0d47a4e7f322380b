//! Runs a plan on the CPU through the tile interpreter: the oracle of the runtime, and the test of
//! lowering.
//!
//! Every buffer has memory of its own. Memory that nobody has written holds bytes of 0xFF (NaN in
//! every float type), so that reading it shows.

use crate::Mode;
use crate::tile;
use std::collections::BTreeMap;
use tilewright_base::{Error, IdVec, Result, ResultExt};
use tilewright_data::{Bytes, Tensor, from_i64};
use tilewright_layout::{Dim, Env, Layout};
use tilewright_plan::{Buffer, BufferId, Plan, Step, Storage};
use tilewright_tile::Access;

type Memory = IdVec<BufferId, Option<Vec<u8>>>;

/// Runs a plan on inputs in its order; symbols that no input determines are taken from `known`.
pub fn run(plan: &Plan, inputs: &[Tensor], known: &Env, mode: Mode) -> Result<Vec<Tensor>> {
    let mut env = known.clone();
    if inputs.len() != plan.inputs.len() {
        return Err(Error::user(format!("{} inputs for {}", inputs.len(), plan.inputs.len())));
    }
    for ((name, _, shape), tensor) in plan.inputs.iter().zip(inputs) {
        learn(shape, tensor.shape(), &mut env).context(|| format!("input `{name}`"))?;
    }
    let mut memory: Memory = plan.buffers.ids().map(|_| None).collect();
    for (id, buffer) in plan.buffers.iter() {
        let tensor = match &buffer.storage {
            Storage::Input(i) => inputs.get(*i),
            Storage::Const(tensor) => Some(tensor),
            _ => None,
        };
        if let Some(tensor) = tensor {
            let packed = match tensor.dtype() == buffer.dtype {
                true => pack(tensor, &buffer.layout, &env)?,
                false => pack(&tensor.rounded(buffer.dtype)?, &buffer.layout, &env)?,
            };
            memory[id] = Some(packed);
        }
    }
    for (number, step) in plan.steps.iter().enumerate() {
        run_step(plan, step, &mut memory, &mut env, mode)
            .context(|| format!("step {number} of plan {}", plan.name))?;
    }
    let mut outputs = Vec::new();
    for i in 0..plan.outputs.len() {
        let found =
            plan.buffers.iter().find(|(_, b)| matches!(b.storage, Storage::Output(o) if o == i));
        let (id, buffer) = found.ok_or_else(|| Error::bug(format!("no buffer of output {i}")))?;
        outputs.push(read(buffer, &mut memory, id, &env)?);
    }
    Ok(outputs)
}

/// Symbols that stand alone in a shape take the sizes found.
fn learn(shape: &[Dim], sizes: &[usize], env: &mut Env) -> Result<()> {
    if shape.len() != sizes.len() {
        return Err(Error::user(format!("{} axes where {} are taken", sizes.len(), shape.len())));
    }
    for (dim, &size) in shape.iter().zip(sizes) {
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        if let Some(name) = dim.as_symbol() {
            env.entry(name.clone()).or_insert(size);
        }
        match dim.eval(env) {
            Some(value) if value != size => {
                return Err(Error::user(format!("size {dim} is {value}, not {size}")));
            }
            _ => {}
        }
    }
    Ok(())
}

fn number(dim: &Dim, env: &Env) -> Result<i64> {
    dim.eval(env).ok_or_else(|| Error::bug(format!("size {dim} has no value")))
}

fn concrete(shape: &[Dim], env: &Env) -> Result<Vec<usize>> {
    shape
        .iter()
        .map(|d| {
            let value = number(d, env)?;
            usize::try_from(value).map_err(|_| Error::bug(format!("size {d} is {value}")))
        })
        .collect()
}

/// Bytes of a buffer.
fn length(buffer: &Buffer, env: &Env) -> Result<usize> {
    let elements = number(&buffer.layout.alloc_elements(), env)?.max(0);
    let elements = usize::try_from(elements).unwrap_or(0);
    buffer.dtype.bytes_for(elements).ok_or_else(|| Error::user("a buffer is too large"))
}

/// Memory of a buffer; made on first use.
fn memory_of(plan: &Plan, memory: &mut Memory, id: BufferId, env: &Env) -> Result<Vec<u8>> {
    match memory[id].take() {
        Some(bytes) => Ok(bytes),
        None => Ok(vec![0xFF; length(&plan.buffers[id], env)?]),
    }
}

/// Offsets of all elements in row-major order.
fn offsets(layout: &Layout, shape: &[usize], env: &Env) -> Result<Vec<usize>> {
    let mut offsets = vec![number(&layout.offset, env)?];
    for (axis, &extent) in layout.axes.iter().zip(shape) {
        let stride = number(&axis.stride, env)?;
        let inner = match &axis.block {
            Some(b) => Some((b.size, number(&b.stride, env)?)),
            None => None,
        };
        let steps: Vec<i64> = (0..i64::try_from(extent).unwrap_or(0))
            .map(|x| match inner {
                None => x * stride,
                Some((size, inner)) => x / size * stride + x % size * inner,
            })
            .collect();
        offsets = offsets.iter().flat_map(|o| steps.iter().map(move |s| o + s)).collect();
    }
    offsets
        .into_iter()
        .map(|o| usize::try_from(o).map_err(|_| Error::bug("an element before its buffer")))
        .collect()
}

/// A tensor's bytes in a layout.
fn pack(tensor: &Tensor, layout: &Layout, env: &Env) -> Result<Vec<u8>> {
    if layout.is_row_major() {
        return Ok(tensor.bytes().to_vec());
    }
    let dtype = tensor.dtype();
    let size = dtype.size();
    let count = usize::try_from(number(&layout.alloc_elements(), env)?.max(0)).unwrap_or(0);
    if dtype.bits() < 8 {
        let mut bytes = vec![0; dtype.bytes_for(count).unwrap_or(0)];
        for (i, to) in offsets(layout, tensor.shape(), env)?.into_iter().enumerate() {
            from_i64(dtype, &mut bytes, to, tensor.get_i64(i));
        }
        return Ok(bytes);
    }
    let mut bytes = vec![0; count * size];
    for (i, to) in offsets(layout, tensor.shape(), env)?.into_iter().enumerate() {
        bytes[to * size..][..size].copy_from_slice(&tensor.bytes()[i * size..][..size]);
    }
    Ok(bytes)
}

/// A row-major buffer as a tensor.
fn read(buffer: &Buffer, memory: &mut Memory, id: BufferId, env: &Env) -> Result<Tensor> {
    let shape = concrete(&buffer.layout.shape(), env)?;
    let bytes = memory[id].clone().unwrap_or_default();
    let len = tilewright_data::element_count(&shape)?;
    let len = buffer.dtype.bytes_for(len).unwrap_or(usize::MAX);
    let bytes = bytes.get(..len).ok_or_else(|| {
        Error::bug(format!("buffer {id} `{}` is read and was not written", buffer.name))
    })?;
    Tensor::new(buffer.dtype, shape, Bytes::copy_from(bytes))
}

fn run_step(
    plan: &Plan,
    step: &Step,
    memory: &mut Memory,
    env: &mut Env,
    mode: Mode,
) -> Result<()> {
    match step {
        Step::Launch { kernel, args, sizes, .. } => {
            let entry = &plan.kernels[*kernel];
            let mut values = Env::new();
            for (symbol, size) in entry.kernel.symbols.iter().zip(sizes) {
                values.insert(symbol.name.clone(), number(size, env)?);
            }
            // A buffer may serve several parameters: each gets a copy, writes are merged after.
            let mut before: BTreeMap<BufferId, Vec<u8>> = BTreeMap::new();
            for &id in args {
                if let std::collections::btree_map::Entry::Vacant(slot) = before.entry(id) {
                    slot.insert(memory_of(plan, memory, id, env)?);
                }
            }
            let mut bytes: Vec<Vec<u8>> = args.iter().map(|id| before[id].clone()).collect();
            tile::run(&entry.kernel, &entry.schedule, &values, &mut bytes, mode)
                .context(|| format!("kernel {}", entry.kernel.name))?;
            let mut after = before.clone();
            for ((param, id), bytes) in entry.kernel.params.iter().zip(args).zip(bytes) {
                if param.1.access == Access::In {
                    continue;
                }
                let (old, new) = (&before[id], after.get_mut(id));
                for ((to, old), now) in new.into_iter().flatten().zip(old).zip(bytes) {
                    if *old != now {
                        *to = now;
                    }
                }
            }
            for (id, bytes) in after {
                memory[id] = Some(bytes);
            }
        }
        Step::Library { call, .. } => {
            return Err(Error::unsupported(format!("{} has no tile program", call.name())));
        }
        Step::Host { op, inputs, outputs, .. } => {
            let mut operands = Vec::new();
            for &id in inputs {
                operands.push(read(&plan.buffers[id], memory, id, env)?);
            }
            let results = (op.run)(&operands, env).context(|| format!("host step {}", op.name))?;
            if results.len() != outputs.len() {
                return Err(Error::bug(format!("{} results of {}", results.len(), op.name)));
            }
            for (&id, tensor) in outputs.iter().zip(results) {
                let buffer = &plan.buffers[id];
                learn(&buffer.layout.shape(), tensor.shape(), env)?;
                if tensor.dtype() != buffer.dtype {
                    return Err(Error::bug(format!(
                        "{} gives {}, its buffer is {}",
                        op.name,
                        tensor.dtype(),
                        buffer.dtype
                    )));
                }
                memory[id] = Some(tensor.bytes().to_vec());
            }
        }
    }
    Ok(())
}
