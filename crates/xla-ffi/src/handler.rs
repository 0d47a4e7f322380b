//! The functions that XLA calls.

use crate::api::{CallFrame, Error as XlaError};
use crate::frame::Call;
use crate::{programs, written};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use tilewright_base::{Error, Result};

/// The handlers by their targets' names and XLA's names of platforms, as the addresses that XLA wants (`XLA_FFI_Handler*`).
pub fn handlers() -> [(&'static str, &'static str, usize); 4] {
    let address = |handler: Handler| handler as *const () as usize;
    let (graph, kernel) = ("tilewright_graph", "tilewright_kernel");
    [
        (graph, "cpu", address(cpu_handler)),
        (graph, "CUDA", address(cuda_handler)),
        (kernel, "cpu", address(cpu_kernel_handler)),
        (kernel, "CUDA", address(cuda_kernel_handler)),
    ]
}

type Handler = unsafe extern "C" fn(*mut CallFrame) -> *mut XlaError;

/// The handler for processors: a graph's run in XLA's memory.
///
/// # Safety
/// Called by XLA, with its frame of a call.
pub(crate) unsafe extern "C" fn cpu_handler(frame: *mut CallFrame) -> *mut XlaError {
    // SAFETY: the caller's.
    unsafe { handled(frame, |_| Ok(()), programs::run_cpu) }
}

/// The handler for CUDA devices: a graph's run in XLA's memory and stream.
///
/// # Safety
/// Called by XLA, with its frame of a call.
pub(crate) unsafe extern "C" fn cuda_handler(frame: *mut CallFrame) -> *mut XlaError {
    // SAFETY: the caller's.
    unsafe { handled(frame, programs::prepare_cuda, programs::run_cuda) }
}

/// The handler of kernels that are written by hand, for processors.
///
/// # Safety
/// Called by XLA, with its frame of a call.
pub(crate) unsafe extern "C" fn cpu_kernel_handler(frame: *mut CallFrame) -> *mut XlaError {
    // SAFETY: the caller's.
    unsafe { handled(frame, |_| Ok(()), written::run_cpu) }
}

/// The handler of kernels that are written by hand, for CUDA devices.
///
/// # Safety
/// Called by XLA, with its frame of a call.
pub(crate) unsafe extern "C" fn cuda_kernel_handler(frame: *mut CallFrame) -> *mut XlaError {
    // SAFETY: the caller's.
    unsafe { handled(frame, written::prepare_cuda, written::run_cuda) }
}

/// # Safety
/// XLA's frame of a call that is going on.
unsafe fn handled(
    frame: *mut CallFrame,
    prepare: fn(&Call<'_>) -> Result<()>,
    run: fn(&Call<'_>) -> Result<()>,
) -> *mut XlaError {
    if frame.is_null() {
        return null_mut();
    }
    // SAFETY: the caller's; nobody else has the frame meanwhile.
    let Some(call) = (unsafe { Call::read(&mut *frame) }) else { return null_mut() };
    let step = match (call.initialises(), call.executes()) {
        (true, _) => prepare,
        (_, true) => run,
        _ => return null_mut(),
    };
    // A panic must not cross into C++.
    match catch_unwind(AssertUnwindSafe(|| step(&call))) {
        Ok(Ok(())) => null_mut(),
        Ok(Err(error)) => call.fail(&error),
        Err(_) => call.fail(&Error::bug("a panic in a custom call")),
    }
}
