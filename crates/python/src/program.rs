//! [`Program`]: a compiled graph that runs on addresses, into memory of the caller.

use crate::memory::{borrowed, lent};
use crate::python_error;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};
use tilewright::{Compiled, Compiler, Result, Session, Tensor};
use tilewright_base::DType;
use tilewright_data::{Bytes, element_count};
use tilewright_layout::{Dim, Env};

/// A compiler for this machine; all for one number of threads share one pool of threads.
pub(crate) fn compiler(threads: usize, cache: bool) -> Result<Compiler> {
    static COMPILERS: OnceLock<Mutex<BTreeMap<usize, Compiler>>> = OnceLock::new();
    let table = COMPILERS.get_or_init(Mutex::default);
    let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tilewright::cache_dir();
    let known = match table.get(&threads) {
        Some(known) => known.clone(),
        None => {
            let cpu = tilewright::host_cpu(threads, folder.as_deref())?;
            table.entry(threads).or_insert(Compiler::for_cpu(cpu, folder.clone())).clone()
        }
    };
    Ok(known.with_cache(if cache { folder } else { None }))
}

/// A compiled graph. May be shared by threads: runs take turns.
#[pyclass(frozen)]
pub(crate) struct Program {
    compiled: Compiled,
    operators: usize,
    session: Mutex<Session>,
}

/// Element type and shape of a tensor that crosses the border.
type Side = (String, DType, Vec<Dim>);

impl Program {
    pub(crate) fn new(compiled: Compiled, operators: usize) -> Result<Program> {
        let session = Mutex::new(compiled.session()?);
        Ok(Program { compiled, operators, session })
    }

    fn env(&self, sizes: &[i64]) -> PyResult<Env> {
        let symbols = &self.compiled.plan().symbols;
        if symbols.len() != sizes.len() {
            let message = format!("{} sizes for {} symbols", sizes.len(), symbols.len());
            return Err(PyValueError::new_err(message));
        }
        Ok(symbols.iter().map(|s| s.name.clone()).zip(sizes.iter().copied()).collect())
    }

    /// Tensors over the memory at these addresses, as large as the plan says for these sizes.
    fn tensors(
        sides: &[Side],
        addresses: &[usize],
        env: &Env,
        memory: fn(usize, usize) -> PyResult<Bytes>,
    ) -> PyResult<Vec<Tensor>> {
        if sides.len() != addresses.len() {
            let message = format!("{} addresses for {} tensors", addresses.len(), sides.len());
            return Err(PyValueError::new_err(message));
        }
        let tensor = |((name, dtype, dims), &address): (&Side, &usize)| {
            let known = |d: &Dim| d.eval(env).and_then(|n| usize::try_from(n).ok());
            let shape: Option<Vec<usize>> = dims.iter().map(known).collect();
            let bytes = shape.as_ref().and_then(|s| dtype.bytes_for(element_count(s).ok()?));
            let (Some(shape), Some(bytes)) = (shape, bytes) else {
                return Err(PyValueError::new_err(format!("`{name}` has no size")));
            };
            Tensor::new(*dtype, shape, memory(address, bytes)?).map_err(python_error)
        };
        sides.iter().zip(addresses).map(tensor).collect()
    }

    fn execute(
        &self,
        py: Python<'_>,
        inputs: &[usize],
        outputs: &[usize],
        sizes: &[i64],
        timed: bool,
    ) -> PyResult<Vec<(usize, f64)>> {
        let env = self.env(sizes)?;
        let plan = self.compiled.plan();
        let inputs = Program::tensors(&plan.inputs, inputs, &env, |a, n| borrowed(a, n, None))?;
        let mut outputs = Program::tensors(&plan.outputs, outputs, &env, lent)?;
        let mut times = Vec::new();
        py.detach(|| {
            let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
            let times = if timed { Some(&mut times) } else { None };
            session.run_sized(&env, &inputs, &mut outputs, times)
        })
        .map_err(python_error)?;
        Ok(times.into_iter().map(|t| (t.step, t.time.as_secs_f64())).collect())
    }
}

#[pymethods]
impl Program {
    /// Names of the sizes that a run is given, in order.
    #[getter]
    fn symbols(&self) -> Vec<String> {
        self.compiled.plan().symbols.iter().map(|s| s.name.to_string()).collect()
    }

    /// Operators of the graph as given, steps of the plan, distinct kernels, kernels that came out of the
    /// cache.
    #[getter]
    fn counts(&self) -> (usize, usize, usize, usize) {
        let plan = self.compiled.plan();
        let hits = self.compiled.cache_hits().0;
        (self.operators, plan.steps.len(), plan.kernels.len(), hits)
    }

    /// Each step of the plan: label, what it is built around, the nodes fused in it.
    #[getter]
    fn steps(&self) -> Vec<(String, String, Vec<String>)> {
        let note = |step: &_| {
            let note = tilewright::explain::note_of(step);
            (note.label.clone(), note.anchor.clone(), note.nodes.clone())
        };
        self.compiled.plan().steps.iter().map(note).collect()
    }

    /// The least seconds of each step by the machine's ceilings, and which one it is, for these values of `symbols`.
    fn least_times(&self, sizes: Vec<i64>) -> PyResult<Vec<(f64, &'static str)>> {
        let env = self.env(&sizes)?;
        Ok(tilewright::explain::least_times(&self.compiled, &env))
    }

    /// Seconds of each stage of compilation.
    #[getter]
    fn stages(&self) -> Vec<(String, f64)> {
        let stages = self.compiled.stages().iter();
        stages.map(|s| (s.name.clone(), s.time.as_secs_f64())).collect()
    }

    /// The graph after the passes, as text.
    fn text(&self) -> String {
        self.compiled.graph().to_string()
    }

    /// Shapes of the outputs for these values of `symbols`.
    fn output_shapes(&self, sizes: Vec<i64>) -> PyResult<Vec<Vec<usize>>> {
        let env = self.env(&sizes)?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.output_shapes(&env).map_err(python_error)
    }

    /// Runs on the contiguous inputs at these addresses, into the contiguous outputs at those, for these
    /// values of `symbols`. Sizes are as the graph says; nothing checks the addresses.
    fn run(
        &self,
        py: Python<'_>,
        inputs: Vec<usize>,
        outputs: Vec<usize>,
        sizes: Vec<i64>,
    ) -> PyResult<()> {
        self.execute(py, &inputs, &outputs, &sizes, false).map(|_| ())
    }

    /// As `run`; returns the number and the seconds of each step.
    fn run_timed(
        &self,
        py: Python<'_>,
        inputs: Vec<usize>,
        outputs: Vec<usize>,
        sizes: Vec<i64>,
    ) -> PyResult<Vec<(usize, f64)>> {
        self.execute(py, &inputs, &outputs, &sizes, true)
    }
}
