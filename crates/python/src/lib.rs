//! The native half of the Python package `tilewright`: models that run on NumPy arrays, and graphs that
//! other frontends (PyTorch) build and run on their own memory.
//!
//! Arrays cross the border without copies and without knowing NumPy or PyTorch: inputs come as addresses
//! that the Python half (python/tilewright/) takes from contiguous arrays (`memory`), outputs offer
//! NumPy's array interface (`__array_interface__`, version 3) or are written where the caller says
//! (`program`; on a GPU: [`gpu`]). [`builder`] is how Python writes a graph. [`operators`] registers the operator pack with
//! PyTorch, and [`direct`] calls it past the dispatcher. Without the feature `cpu` (LLVM) there is what runs on GPUs alone.

mod builder;
mod direct;
mod gpu;
mod memory;
mod model;
mod operators;
#[cfg(feature = "cpu")]
mod program;

use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use tilewright_base::{Error, Kind};

/// The error in Python's terms, by whose fault it is.
pub(crate) fn python_error(error: Error) -> PyErr {
    let text = format!("{error:?}");
    match error.kind() {
        Kind::User => PyValueError::new_err(text),
        Kind::Unsupported => PyNotImplementedError::new_err(text),
        Kind::Bug => PyRuntimeError::new_err(text),
    }
}

/// The addresses of the handlers of XLA's custom calls, by target and platform.
#[pyfunction]
fn xla_handlers() -> [(&'static str, &'static str, usize); 4] {
    tilewright_xla_ffi::handlers()
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    #[cfg(feature = "cpu")]
    module.add_class::<program::Program>()?;
    module.add_class::<model::Native>()?;
    module.add_class::<model::Output>()?;
    module.add_function(wrap_pyfunction!(model::load, module)?)?;
    module.add_class::<builder::Builder>()?;
    module.add_class::<gpu::GpuProgram>()?;
    module.add_function(wrap_pyfunction!(gpu::restore_gpu, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::wait_for_compilers, module)?)?;
    module.add_function(wrap_pyfunction!(xla_handlers, module)?)?;
    direct::add(module)?;
    operators::add(module)
}
