//! [`Native`]: a compiled model that runs on NumPy arrays.

use crate::memory::{Input, input, type_string};
use crate::python_error;
use pyo3::exceptions::PyNotImplementedError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tilewright::{Model, Precision, Result, Tensor};
use tilewright_base::Error;
use tilewright_graph::Graph;

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

/// What runs a model.
enum Runner {
    #[cfg(feature = "cpu")]
    Cpu(tilewright::Session),
    Gpu(Box<tilewright::gpu::Session>),
}

impl Runner {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        match self {
            #[cfg(feature = "cpu")]
            Runner::Cpu(session) => session.run(inputs),
            Runner::Gpu(session) => session.run(inputs),
        }
    }

    /// The same in place of earlier outputs, on a processor in their memory.
    fn run_into(&mut self, inputs: &[Tensor], outputs: &mut Vec<Tensor>) -> Result<()> {
        match self {
            #[cfg(feature = "cpu")]
            Runner::Cpu(session) => session.run_into(inputs, outputs),
            Runner::Gpu(session) => {
                *outputs = session.run(inputs)?;
                Ok(())
            }
        }
    }
}

/// A compiled model.
#[pyclass(frozen)]
pub(crate) struct Native {
    kernels: (usize, usize),
    state: Mutex<State>,
    inputs: Vec<(String, &'static str)>,
    outputs: Vec<String>,
}

struct State {
    runner: Runner,
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

    /// Distinct kernels, and how many came out of the cache; a GPU's are compiled when sizes are known, and count 0.
    #[getter]
    fn kernels(&self) -> (usize, usize) {
        self.kernels
    }

    /// Runs on inputs in order.
    fn run(&self, py: Python<'_>, inputs: Vec<Input>) -> PyResult<Vec<Output>> {
        let tensors = inputs.into_iter().map(input).collect::<PyResult<Vec<Tensor>>>()?;
        let results = py.detach(|| {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let State { runner, last } = &mut *state;
            // Memory of outputs that were dropped serves again: no pages to map and clear.
            let reusable = !last.is_empty() && last.iter().all(|t| Arc::strong_count(t) == 1);
            let mut outputs: Vec<Tensor> = match reusable {
                true => last.drain(..).filter_map(Arc::into_inner).collect(),
                false => Vec::new(),
            };
            if outputs.is_empty() || runner.run_into(&tensors, &mut outputs).is_err() {
                outputs = runner.run(&tensors)?;
            }
            *last = outputs.into_iter().map(Arc::new).collect();
            Ok(last.clone())
        });
        let results: Vec<Arc<Tensor>> = results.map_err(python_error)?;
        Ok(results.into_iter().map(|tensor| Output { tensor }).collect())
    }
}

/// Reads and compiles a model file or directory for `cpu`, `cuda` or `cuda:1`.
#[pyfunction]
#[pyo3(signature = (path, threads=0, cache=true, device="cpu", precision="f32"))]
pub(crate) fn load(
    py: Python<'_>,
    path: PathBuf,
    threads: usize,
    cache: bool,
    device: &str,
    precision: &str,
) -> PyResult<Native> {
    py.detach(|| {
        let precision: Precision = precision.parse().map_err(Error::user)?;
        let ordinal = if device == "cpu" { None } else { Some(tilewright::gpu::ordinal(device)?) };
        let model = Model::open(&path)?;
        let graph = &model.graph;
        let inputs = graph
            .inputs
            .iter()
            .map(|&v| (graph.values[v].name.clone(), type_string(graph.dtype(v))))
            .collect();
        let outputs = graph.outputs.iter().map(|(name, _)| name.clone()).collect();
        let (runner, kernels) = match ordinal {
            None => on_cpu(graph, threads, cache, precision)?,
            Some(ordinal) => {
                let loaded = crate::gpu::load(graph.clone(), ordinal, precision, cache)?;
                let kernels = loaded.planned().plan().kernels.len();
                (Runner::Gpu(Box::new(loaded.session()?)), (kernels, 0))
            }
        };
        let state = Mutex::new(State { runner, last: Vec::new() });
        Ok(Native { kernels, state, inputs, outputs })
    })
    .map_err(python_error)
}

#[cfg(feature = "cpu")]
fn on_cpu(
    graph: &Graph,
    threads: usize,
    cache: bool,
    precision: Precision,
) -> Result<(Runner, (usize, usize))> {
    let mut compiler = crate::program::compiler(threads, cache)?;
    compiler.precision = precision;
    let compiled = compiler.compile_graph(graph.clone())?;
    let (hits, all) = compiled.cache_hits();
    Ok((Runner::Cpu(compiled.session()?), (all, hits)))
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(_: &Graph, _: usize, _: bool, _: Precision) -> Result<(Runner, (usize, usize))> {
    Err(Error::unsupported("this build has no compiler for processors (LLVM)")
        .with_hint("give device=\"cuda\""))
}
