//! The operator pack, for Python: registering it with PyTorch.

use crate::python_error;
use pyo3::prelude::*;

/// Registers the operators with the PyTorch that is imported.
#[pyfunction]
fn register_operators(py: Python<'_>) -> PyResult<()> {
    py.detach(tilewright_torch_ops::register).map_err(python_error)
}

/// The names of a formula's variables, in order.
#[pyfunction]
fn formula_variables(text: &str) -> PyResult<Vec<String>> {
    tilewright_torch_ops::variables(text).map_err(python_error)
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

pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("HAS_CPU", tilewright_torch_ops::CPU)?;
    module.add_function(wrap_pyfunction!(register_operators, module)?)?;
    module.add_function(wrap_pyfunction!(formula_variables, module)?)?;
    module.add_function(wrap_pyfunction!(formula_number, module)?)?;
    module.add_function(wrap_pyfunction!(operator_schedules, module)?)
}
