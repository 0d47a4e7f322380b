//! [`Native`]: a compiled model that runs on NumPy arrays.

use crate::memory::{Input, input, type_string};
use crate::program::compiler;
use crate::python_error;
use pyo3::exceptions::PyNotImplementedError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tilewright::{Model, Session, Tensor};

/// An output: NumPy reads it through the array interface, without a copy.
#[pyclass(frozen)]
pub(crate) struct Output {
    tensor: Arc<Tensor>,
}

#[pymethods]
impl Output {
    #[getter(__array_interface__)]
    fn array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dtype = self.tensor.dtype();
        let typestr = type_string(dtype);
        if typestr.is_empty() {
            let message = format!("NumPy has no element type for {dtype}");
            return Err(PyNotImplementedError::new_err(message));
        }
        let shape = pyo3::types::PyTuple::new(py, self.tensor.shape())?;
        let dict = PyDict::new(py);
        dict.set_item("version", 3)?;
        dict.set_item("typestr", typestr)?;
        dict.set_item("shape", shape)?;
        dict.set_item("data", (self.tensor.bytes().as_ptr() as usize, false))?;
        Ok(dict)
    }
}

/// A compiled model.
#[pyclass(frozen)]
pub(crate) struct Native {
    compiled: tilewright::Compiled,
    state: Mutex<State>,
    inputs: Vec<(String, &'static str)>,
    outputs: Vec<String>,
}

struct State {
    session: Session,
    /// Outputs of the last run: their memory is used again when nobody holds them any more.
    last: Vec<Arc<Tensor>>,
}

#[pymethods]
impl Native {
    /// Names and NumPy types of the inputs, in order.
    #[getter]
    fn inputs(&self) -> Vec<(String, &'static str)> {
        self.inputs.clone()
    }

    /// Names of the outputs, in order.
    #[getter]
    fn outputs(&self) -> Vec<String> {
        self.outputs.clone()
    }

    /// Distinct kernels, and how many came out of the cache.
    #[getter]
    fn kernels(&self) -> (usize, usize) {
        let (hits, all) = self.compiled.cache_hits();
        (all, hits)
    }

    /// Runs on inputs in order.
    fn run(&self, py: Python<'_>, inputs: Vec<Input>) -> PyResult<Vec<Output>> {
        let tensors = inputs.into_iter().map(input).collect::<PyResult<Vec<Tensor>>>()?;
        let results = py.detach(|| {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let State { session, last } = &mut *state;
            // Memory of outputs that were dropped serves again: no pages to map and clear.
            let reusable = !last.is_empty() && last.iter().all(|t| Arc::strong_count(t) == 1);
            let mut outputs: Vec<Tensor> = match reusable {
                true => last.drain(..).filter_map(Arc::into_inner).collect(),
                false => Vec::new(),
            };
            if outputs.is_empty() || session.run_into(&tensors, &mut outputs).is_err() {
                outputs = session.run(&tensors)?;
            }
            *last = outputs.into_iter().map(Arc::new).collect();
            Ok(last.clone())
        });
        let results: Vec<Arc<Tensor>> = results.map_err(python_error)?;
        Ok(results.into_iter().map(|tensor| Output { tensor }).collect())
    }
}

/// Reads and compiles a model file or directory.
#[pyfunction]
#[pyo3(signature = (path, threads=0, cache=true))]
pub(crate) fn load(py: Python<'_>, path: PathBuf, threads: usize, cache: bool) -> PyResult<Native> {
    py.detach(|| {
        let model = Model::open(&path)?;
        let compiled = compiler(threads, cache)?.compile(&model)?;
        let graph = &model.graph;
        let inputs = graph
            .inputs
            .iter()
            .map(|&v| (graph.values[v].name.clone(), type_string(graph.dtype(v))))
            .collect();
        let outputs = graph.outputs.iter().map(|(name, _)| name.clone()).collect();
        let state = Mutex::new(State { session: compiled.session()?, last: Vec::new() });
        Ok(Native { compiled, state, inputs, outputs })
    })
    .map_err(python_error)
}
