//! [`Builder`]: Python writes a graph node by node, in the words of the graph's text form.
//!
//! `op("reduce sum axes=[1] keep", [x])` adds one node. Operators, attributes, sizes and types are
//! text; values are numbers. Each node is checked when it is added, so a frontend finds out at once
//! what is not taken, and leaves it to whoever else can run it.

use crate::gpu::GpuProgram;
use crate::memory::borrowed;
#[cfg(feature = "cpu")]
use crate::program::{Program, compiler};
use crate::python_error;
use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use tilewright::{DType, Precision, Tensor};
use tilewright_graph::{Graph, GraphBuilder, TensorType, ValueId};
use tilewright_layout::Range;

/// A graph under construction.
#[pyclass]
pub(crate) struct Builder {
    graph: Option<GraphBuilder>,
    values: Vec<ValueId>,
}

impl Builder {
    fn graph(&mut self) -> PyResult<&mut GraphBuilder> {
        self.graph.as_mut().ok_or_else(|| PyRuntimeError::new_err("the graph is compiled already"))
    }

    fn value(&self, number: usize) -> PyResult<ValueId> {
        self.values
            .get(number)
            .copied()
            .ok_or_else(|| PyIndexError::new_err(format!("there is no value {number}")))
    }

    fn add(&mut self, value: ValueId) -> usize {
        self.values.push(value);
        self.values.len() - 1
    }

    /// The graph, without nodes that nothing reads.
    fn finished(&mut self) -> PyResult<Graph> {
        self.graph()?;
        let Some(builder) = self.graph.take() else {
            return Err(PyRuntimeError::new_err("the graph is compiled already"));
        };
        let mut graph = builder.finish();
        graph.remove_dead();
        Ok(graph)
    }

    fn parse_type(&mut self, text: &str) -> PyResult<TensorType> {
        self.graph()?.graph().parse_type(text).map_err(python_error)
    }
}

fn parsed(precision: &str) -> PyResult<Precision> {
    precision.parse().map_err(|_| PyValueError::new_err(format!("precision `{precision}`")))
}

#[pymethods]
impl Builder {
    /// An empty graph of this name.
    #[new]
    fn new(name: &str) -> Builder {
        Builder { graph: Some(GraphBuilder::new(name)), values: Vec::new() }
    }

    /// Declares a size with inclusive bounds.
    #[pyo3(signature = (name, min, max=None))]
    fn symbol(&mut self, name: &str, min: i64, max: Option<i64>) -> PyResult<()> {
        let max = max.unwrap_or(i64::MAX);
        let plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !plain || min > max {
            return Err(PyValueError::new_err(format!("size `{name}` in {min}..={max}")));
        }
        self.graph()?.symbol(name, Range { min, max });
        Ok(())
    }

    /// Adds an input of a type such as `f32[N,384]`.
    fn input(&mut self, name: &str, ty: &str) -> PyResult<usize> {
        let ty = self.parse_type(ty)?;
        let value = self.graph()?.input(name, ty);
        Ok(self.add(value))
    }

    /// Adds known data: `owner`'s memory of `bytes` bytes at `address`, which is not copied and must not
    /// change while the compiled program lives.
    fn constant(
        &mut self,
        name: &str,
        ty: &str,
        address: usize,
        bytes: usize,
        owner: Py<PyAny>,
    ) -> PyResult<usize> {
        let ty = self.parse_type(ty)?;
        let shape = ty
            .const_shape()
            .ok_or_else(|| PyValueError::new_err("a constant's shape is not symbolic"))?;
        let memory = borrowed(address, bytes, Some(owner))?;
        let tensor = Tensor::new(ty.dtype, shape, memory).map_err(python_error)?;
        let value = self.graph()?.constant(name, tensor);
        Ok(self.add(value))
    }

    /// Adds a scalar of an element type; integers beyond 2^53 are given exactly with `integer`.
    #[pyo3(signature = (dtype, value, integer=None))]
    fn scalar(&mut self, dtype: &str, value: f64, integer: Option<i64>) -> PyResult<usize> {
        let dtype: DType = dtype.parse().map_err(|_| PyValueError::new_err(dtype.to_string()))?;
        let tensor = match integer {
            Some(integer) if !dtype.is_float() => {
                Tensor::from_i64s(dtype, &[], &[integer]).map_err(python_error)?
            }
            _ => Tensor::scalar(dtype, value),
        };
        let value = self.graph()?.constant("", tensor);
        Ok(self.add(value))
    }

    /// Adds a node: an operator with its attributes as in the graph's text form, and its operands.
    /// `result` is its result's type where the operator does not determine it; several stand between semicolons.
    #[pyo3(signature = (text, inputs, result=None, origin=""))]
    fn op(
        &mut self,
        text: &str,
        inputs: Vec<usize>,
        result: Option<&str>,
        origin: &str,
    ) -> PyResult<Vec<usize>> {
        let inputs = inputs.into_iter().map(|v| self.value(v)).collect::<PyResult<Vec<_>>>()?;
        let declared = match result {
            Some(text) => {
                let types = text.split(';').map(|one| self.parse_type(one.trim()).map(Some));
                types.collect::<PyResult<Vec<_>>>()?
            }
            None => vec![None],
        };
        let graph = self.graph()?;
        let types: Vec<TensorType> = inputs.iter().map(|&v| graph.ty(v).clone()).collect();
        let op = graph.graph().parse_op(text, &types, &declared).map_err(python_error)?;
        graph.set_origin(origin);
        let results = graph.node(op, &inputs).map_err(python_error)?;
        Ok(results.into_iter().map(|v| self.add(v)).collect())
    }

    /// Element type and sizes of a value, as text.
    fn type_of(&mut self, value: usize) -> PyResult<(String, Vec<String>)> {
        let value = self.value(value)?;
        let ty = self.graph()?.ty(value).clone();
        Ok((ty.dtype.to_string(), ty.shape.iter().map(ToString::to_string).collect()))
    }

    /// Whether a value has this type.
    fn has_type(&mut self, value: usize, ty: &str) -> PyResult<bool> {
        let (value, ty) = (self.value(value)?, self.parse_type(ty)?);
        Ok(*self.graph()?.ty(value) == ty)
    }

    /// Makes a value an output.
    fn output(&mut self, name: &str, value: usize) -> PyResult<()> {
        let value = self.value(value)?;
        self.graph()?.output(name, value);
        Ok(())
    }

    /// The graph's text form.
    fn text(&mut self) -> PyResult<String> {
        Ok(self.graph()?.graph().to_string())
    }

    /// Plans the graph for GPU `device`, which this object gives up. Kernels are compiled when sizes are known. With `cache`, a
    /// program without symbols is kept under the name `keep`, for `restore_gpu` of another process.
    #[pyo3(signature = (device=0, cache=true, precision="f32", keep=None))]
    fn compile_gpu(
        &mut self,
        py: Python<'_>,
        device: u32,
        cache: bool,
        precision: &str,
        keep: Option<&str>,
    ) -> PyResult<GpuProgram> {
        let precision = parsed(precision)?;
        let graph = self.finished()?;
        py.detach(|| GpuProgram::new(graph, device, precision, cache, keep)).map_err(python_error)
    }

    /// The steps that a plan for an H200 has, without a GPU: label, what each is built around, the nodes fused in it.
    #[pyo3(signature = (precision="f32"))]
    fn plan_gpu(
        &mut self,
        py: Python<'_>,
        precision: &str,
    ) -> PyResult<Vec<(String, String, Vec<String>)>> {
        let precision = parsed(precision)?;
        let graph = self.finished()?;
        py.detach(|| {
            let mut compiler = tilewright::gpu::GpuCompiler::h200();
            compiler.precision = precision;
            let planned = compiler.plan(graph)?;
            let note = |step: &_| {
                let note = tilewright::explain::note_of(step);
                (note.label.clone(), note.anchor.clone(), note.nodes.clone())
            };
            Ok(planned.plan().steps.iter().map(note).collect())
        })
        .map_err(python_error)
    }

    /// Compiles the graph, which this object gives up.
    #[cfg(feature = "cpu")]
    #[pyo3(signature = (threads=0, cache=true, precision="f32"))]
    fn compile(
        &mut self,
        py: Python<'_>,
        threads: usize,
        cache: bool,
        precision: &str,
    ) -> PyResult<Program> {
        let precision = parsed(precision)?;
        let graph = self.finished()?;
        py.detach(|| {
            let mut compiler = compiler(threads, cache)?;
            compiler.precision = precision;
            let operators = graph.order.len();
            let compiled = compiler.compile_graph(graph)?;
            Program::new(compiled, operators)
        })
        .map_err(python_error)
    }
}
