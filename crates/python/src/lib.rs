//! The native half of the Python package `tilewright`: models that run on NumPy arrays.
//!
//! Arrays cross the border without copies and without knowing NumPy: inputs come as addresses that
//! the Python half (python/tilewright/__init__.py) takes from contiguous arrays, outputs offer
//! NumPy's array interface (`__array_interface__`, version 3).

use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tilewright::{Compiler, Model, Session, Tensor};
use tilewright_base::{DType, Error, Kind};
use tilewright_data::Bytes;

/// NumPy's type strings for the types that NumPy has.
const TYPES: [(DType, &str); 12] = [
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

fn python_error(error: Error) -> PyErr {
    let text = format!("{error:?}");
    match error.kind() {
        Kind::User => PyValueError::new_err(text),
        Kind::Unsupported => PyNotImplementedError::new_err(text),
        Kind::Bug => PyRuntimeError::new_err(text),
    }
}

/// Memory of a Python object.
struct Borrowed {
    address: usize,
    bytes: usize,
    /// Keeps the memory alive.
    _owner: Py<PyAny>,
}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `input` promises `bytes` readable bytes at `address` while the owner lives, and
        // the owner lives as long as this struct. The caller of `run` does not write to an input
        // while it runs (the documented contract of `Model.run`).
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }
}

/// An output: NumPy reads it through the array interface, without a copy.
#[pyclass(frozen)]
struct Output {
    tensor: Arc<Tensor>,
}

#[pymethods]
impl Output {
    #[getter(__array_interface__)]
    fn array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dtype = self.tensor.dtype();
        let typestr =
            TYPES.iter().find(|(d, _)| *d == dtype).map(|(_, t)| *t).ok_or_else(|| {
                PyNotImplementedError::new_err(format!("NumPy has no element type for {dtype}"))
            })?;
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
struct Native {
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

/// One input: element type, shape, address, bytes, and the array that owns the memory.
type Input = (String, Vec<usize>, usize, usize, Py<PyAny>);

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

fn input((typestr, shape, address, bytes, owner): Input) -> PyResult<Tensor> {
    let dtype = TYPES.iter().find(|(_, t)| *t == typestr).map(|(d, _)| *d);
    let dtype = dtype.ok_or_else(|| PyValueError::new_err(format!("element type {typestr}")))?;
    let memory = match bytes {
        0 => Bytes::zeroed(0),
        _ => Bytes::Foreign(Arc::new(Borrowed { address, bytes, _owner: owner })),
    };
    Tensor::new(dtype, shape, memory).map_err(python_error)
}

/// Reads and compiles a model file or directory.
#[pyfunction]
#[pyo3(signature = (path, threads=0, cache=true))]
fn load(py: Python<'_>, path: PathBuf, threads: usize, cache: bool) -> PyResult<Native> {
    py.detach(|| {
        let folder = if cache { tilewright::cache_dir() } else { None };
        let cpu = tilewright::host_cpu(threads, folder.as_deref())?;
        let model = Model::open(&path)?;
        let compiled = Compiler::for_cpu(cpu, folder).compile(&model)?;
        let graph = &model.graph;
        let inputs = graph
            .inputs
            .iter()
            .map(|&v| {
                let typestr =
                    TYPES.iter().find(|(d, _)| *d == graph.dtype(v)).map_or("", |(_, t)| *t);
                (graph.values[v].name.clone(), typestr)
            })
            .collect();
        let outputs = graph.outputs.iter().map(|(name, _)| name.clone()).collect();
        let state = Mutex::new(State { session: compiled.session()?, last: Vec::new() });
        Ok(Native { compiled, state, inputs, outputs })
    })
    .map_err(python_error)
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Native>()?;
    module.add_class::<Output>()?;
    module.add_function(wrap_pyfunction!(load, module)?)
}
