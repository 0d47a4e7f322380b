//! Memory that Python owns: arrays and tensors cross the border as addresses, without copies and
//! without knowing NumPy or PyTorch.
//!
//! All `unsafe` of this crate is here. What makes it sound is a contract with the Python half of the
//! package: an address that it passes belongs to a contiguous array of at least the bytes that go
//! with it, and the array lives while it is used.

#![cfg_attr(
    not(feature = "cpu"),
    allow(dead_code, reason = "arrays are for programs on processors")
)]

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Arc;
use tilewright::Tensor;
use tilewright::gpu::{Fitted, Gpu, Stream};
use tilewright_base::DType;
use tilewright_data::{Bytes, Lent};

/// NumPy's type strings for the types that NumPy has.
pub(crate) const TYPES: [(DType, &str); 12] = [
    (DType::F64, "<f8"),
    (DType::F32, "<f4"),
    (DType::F16, "<f2"),
    (DType::I64, "<i8"),
    (DType::I32, "<i4"),
    (DType::I16, "<i2"),
    (DType::I8, "|i1"),
    (DType::U64, "<u8"),
    (DType::U32, "<u4"),
    (DType::U16, "<u2"),
    (DType::U8, "|u1"),
    (DType::Bool, "|b1"),
];

/// NumPy's name of a type; empty where it has none.
pub(crate) fn type_string(dtype: DType) -> &'static str {
    TYPES.iter().find(|(d, _)| *d == dtype).map_or("", |(_, t)| *t)
}

/// Memory of a Python object that is only read.
struct Borrowed {
    address: usize,
    bytes: usize,
    /// Keeps the memory alive; `None` when the caller does.
    _owner: Option<Py<PyAny>>,
}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the module's contract: `bytes` readable bytes at `address` while the owner (or the
        // call that borrowed) lives, and nobody writes there while a run reads (the documented
        // contract of `Model.run`; compiled PyTorch functions run one after the other).
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }
}

/// Bytes to read.
pub(crate) fn borrowed(address: usize, bytes: usize, owner: Option<Py<PyAny>>) -> PyResult<Bytes> {
    match (bytes, address) {
        (0, _) => Ok(Bytes::zeroed(0)),
        (_, 0) => Err(PyValueError::new_err("a tensor without memory")),
        _ => Ok(Bytes::Foreign(Arc::new(Borrowed { address, bytes, _owner: owner }))),
    }
}

/// Bytes to write.
pub(crate) fn lent(address: usize, bytes: usize) -> PyResult<Bytes> {
    match (bytes, address) {
        (0, _) => Ok(Bytes::zeroed(0)),
        (_, 0) => Err(PyValueError::new_err("a tensor without memory")),
        _ => {
            // SAFETY: the module's contract, and results are new tensors that only this run knows.
            let lent = unsafe { Lent::new(address as *mut u8, bytes) };
            Ok(Bytes::Lent(Arc::new(lent)))
        }
    }
}

/// One input: element type, shape, address, bytes, and the array that owns the memory.
pub(crate) type Input = (String, Vec<usize>, usize, usize, Py<PyAny>);

/// An array as a tensor over its memory.
pub(crate) fn input((typestr, shape, address, bytes, owner): Input) -> PyResult<Tensor> {
    let dtype = TYPES.iter().find(|(_, t)| *t == typestr).map(|(d, _)| *d);
    let dtype = dtype.ok_or_else(|| PyValueError::new_err(format!("element type {typestr}")))?;
    let memory = borrowed(address, bytes, Some(owner))?;
    Tensor::new(dtype, shape, memory).map_err(crate::python_error)
}

/// Puts a run into a stream of the caller's, from inputs to outputs in its memory on the device; with `timed`
/// waits, and gives the number and the seconds of each step.
pub(crate) fn run_at(
    fitted: &Fitted,
    (inputs, outputs, scratch): (&[u64], &[u64], u64),
    stream: &Stream,
    timed: bool,
) -> tilewright::Result<Vec<(usize, f64)>> {
    if !timed {
        // SAFETY: the module's contract: the tensors are contiguous and aligned, live until the work in
        // `stream` is done with them (the framework's allocator goes by streams), and results and scratch memory are new.
        unsafe { fitted.replay(inputs, outputs, scratch, stream)? };
        return Ok(Vec::new());
    }
    // SAFETY: as above.
    let times = unsafe { fitted.launch_timed(inputs, outputs, scratch, stream)? };
    Ok(times.into_iter().map(|t| (t.step, t.time.as_secs_f64())).collect())
}

/// A stream of the framework's by its handle.
pub(crate) fn stream(gpu: &Gpu, handle: usize) -> Stream {
    // SAFETY: the module's contract: the handle is that of a stream of the framework's, which keeps its streams.
    unsafe { Stream::from_raw(gpu, handle as *mut std::ffi::c_void) }
}
