//! The constants of a plan: packed into the layouts that kernels read, or used as they lie in the file.

use crate::memory::AlignedBuffer;
use crate::pack::{pack_into, packed_bytes};
use crate::pool::Pool;
use std::sync::atomic::{AtomicUsize, Ordering};
use tilewright_base::{Result, ResultExt};
use tilewright_data::{Bytes, Tensor};
use tilewright_plan::{Buffer, BufferId, Plan, Storage};

/// Constant data in the layout its buffer wants.
pub(crate) enum Constant {
    /// As in the file.
    Shared(Bytes),
    Packed(AlignedBuffer),
}

/// Memory for a constant, and what became of it.
type Place = (AlignedBuffer, Result<Option<Filled>>);

/// The constants of all buffers, in their order, on all threads.
pub(crate) fn constants(plan: &Plan, pool: &Pool) -> Result<Vec<Option<Constant>>> {
    let ids: Vec<BufferId> = plan.buffers.ids().collect();
    // Memory of all that are packed, in one piece; then each is filled by some thread.
    let sizes = ids.iter().map(|&id| constant_bytes(&plan.buffers[id]));
    let sizes = sizes.collect::<Result<Vec<usize>>>()?;
    let memory = AlignedBuffer::many(&sizes, "packed constants")?;
    let slots: Vec<std::sync::Mutex<Place>> =
        memory.into_iter().map(|m| std::sync::Mutex::new((m, Ok(None)))).collect();
    let filled = |i: usize| slots[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // The largest first, so that no thread begins one of them when the others are done.
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
    let next = AtomicUsize::new(0);
    pool.run(pool.threads() as i64, &|_, _, _| {
        while let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (memory, constant) = &mut *filled(i);
            *constant = fill_constant(&plan.buffers[ids[i]], memory);
        }
    });
    slots
        .into_iter()
        .zip(&ids)
        .map(|(slot, &id)| {
            // Reading a neighbour may have brought pages back that were let go.
            let_go(&plan.buffers[id]);
            let slot = slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (memory, constant) = slot;
            Ok(match constant? {
                Some(Filled::Shared(bytes)) => Some(Constant::Shared(bytes)),
                Some(Filled::Packed) => Some(Constant::Packed(memory)),
                None => None,
            })
        })
        .collect()
}

/// What became of a constant.
enum Filled {
    Shared(Bytes),
    /// It lies in the memory that was given.
    Packed,
}

/// Whether a buffer's constant is used as it lies: not in another layout, nor where a file has it beside the multiples
/// of its elements' size.
fn as_it_lies(buffer: &Buffer, tensor: &Tensor) -> bool {
    buffer.layout.is_row_major() && (tensor.is_aligned() || tensor.dtype() != buffer.dtype)
}

/// Bytes of the memory that a buffer's constant is packed into; none where it is used as it lies.
fn constant_bytes(buffer: &Buffer) -> Result<usize> {
    match &buffer.storage {
        Storage::Const(tensor) if !as_it_lies(buffer, tensor) => {
            packed_bytes(buffer.dtype, &buffer.layout)
        }
        _ => Ok(0),
    }
}

/// Packs a buffer's constant into memory of [`constant_bytes`], or says where it lies.
fn fill_constant(buffer: &Buffer, memory: &mut AlignedBuffer) -> Result<Option<Filled>> {
    let Storage::Const(tensor) = &buffer.storage else { return Ok(None) };
    let lies = as_it_lies(buffer, tensor);
    let rounded;
    let tensor = if tensor.dtype() == buffer.dtype {
        tensor
    } else {
        rounded = tensor.rounded(buffer.dtype).context(|| format!("rounding `{}`", buffer.name))?;
        &rounded
    };
    if lies {
        return Ok(Some(Filled::Shared(tensor.shared_bytes().clone())));
    }
    pack_into(tensor, &buffer.layout, memory).context(|| format!("packing `{}`", buffer.name))?;
    let_go(buffer);
    Ok(Some(Filled::Packed))
}

/// The packed weights are what will be read, not the file's.
fn let_go(buffer: &Buffer) {
    if let Storage::Const(tensor) = &buffer.storage
        && !as_it_lies(buffer, tensor)
    {
        tensor.shared_bytes().let_go();
    }
}
