//! The operator pack, for Python: registering it with PyTorch.

use crate::python_error;
use pyo3::prelude::*;
use std::sync::OnceLock;
use tilewright_base::Error;
use tilewright_torch_ops::triton;

/// Registers the operators with the PyTorch that is imported.
#[pyfunction]
fn register_operators(py: Python<'_>) -> PyResult<()> {
    py.detach(tilewright_torch_ops::register).map_err(python_error)
}

/// Whether operators on processors and on CUDA devices can draw random numbers of PyTorch's themselves.
#[pyfunction]
fn operators_draw() -> PyResult<(bool, bool)> {
    let [cpu, cuda] = tilewright_torch_ops::draws().map_err(python_error)?;
    Ok((cpu, cuda))
}

/// The names of a formula's variables, in order.
#[pyfunction]
fn formula_variables(text: &str) -> PyResult<Vec<String>> {
    tilewright_torch_ops::variables(text).map_err(python_error)
}

/// A formula in `f32` or `f64` and its derivatives, in the language of a graph's `map`.
#[pyfunction]
fn formula_and_slopes(text: &str, double: bool) -> PyResult<(String, Vec<String>)> {
    tilewright_torch_ops::formula(text, double).map_err(python_error)
}

/// The number of a formula in this process.
#[pyfunction]
fn formula_number(text: &str) -> u64 {
    tilewright_torch_ops::number_of(text)
}

/// The kernels on a CUDA device that serve these sizes, with their schedules.
#[pyfunction]
fn operator_schedules(device: u32, sizes: Vec<i64>) -> PyResult<Vec<String>> {
    tilewright_torch_ops::schedules(device, &sizes).map_err(python_error)
}

/// What launches Triton's kernels: `function(device, [(source, [(address, type, shape, strides)], sizes)])`.
static TRITON: OnceLock<Py<PyAny>> = OnceLock::new();

/// Gives the function that launches Triton's kernels; the first stays.
#[pyfunction]
fn triton_launcher(function: Py<PyAny>) {
    let _ = TRITON.set(function);
    triton::set_launcher(launch);
}

/// Whether operators that this thread calls run as Triton kernels from now on; returns what held before.
#[pyfunction]
fn triton_enter(on: bool) -> bool {
    triton::enter(on)
}

/// The Triton modules of a graph's text, for symbols of about these values: names and sources.
#[pyfunction]
fn triton_modules(text: &str, sizes: Vec<i64>) -> PyResult<Vec<(String, String)>> {
    triton::modules(text, &sizes).map_err(python_error)
}

fn launch(device: Option<u32>, launches: &[triton::Launch]) -> tilewright_base::Result<()> {
    let Some(function) = TRITON.get() else {
        return Err(Error::bug("nobody launches Triton's kernels"));
    };
    let tensor =
        |m: &triton::Memory| (m.address, m.dtype.to_string(), m.shape.clone(), m.strides.clone());
    let all: Vec<_> = launches
        .iter()
        .map(|l| {
            let tensors: Vec<_> = l.tensors.iter().map(tensor).collect();
            (l.module.python.clone(), tensors, l.sizes.clone())
        })
        .collect();
    Python::attach(|py| match function.call1(py, (device, all)) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::user(error.to_string())),
    })
}

pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("HAS_CPU", tilewright_torch_ops::CPU)?;
    module.add_function(wrap_pyfunction!(register_operators, module)?)?;
    module.add_function(wrap_pyfunction!(operators_draw, module)?)?;
    module.add_function(wrap_pyfunction!(formula_variables, module)?)?;
    module.add_function(wrap_pyfunction!(formula_and_slopes, module)?)?;
    module.add_function(wrap_pyfunction!(formula_number, module)?)?;
    module.add_function(wrap_pyfunction!(operator_schedules, module)?)?;
    module.add_function(wrap_pyfunction!(triton_launcher, module)?)?;
    module.add_function(wrap_pyfunction!(triton_enter, module)?)?;
    module.add_function(wrap_pyfunction!(triton_modules, module)?)
}
