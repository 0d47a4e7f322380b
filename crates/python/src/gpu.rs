//! [`GpuProgram`]: a compiled graph that runs on a GPU, in the memory and the stream of the caller.

use crate::memory::{run_at, stream as stream_of};
use crate::python_error;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tilewright::gpu::{Direct, GpuCompiler, GpuDevice, GpuModel, GpuPlan};
use tilewright::{Error, Precision, Result};
use tilewright_graph::Graph;
use tilewright_layout::Env;

/// Device `ordinal`; programs of one device share their kernels.
fn device(ordinal: u32, cache: bool) -> Result<Arc<GpuDevice>> {
    /// By number, and whether compiled kernels are kept on disk.
    static DEVICES: Mutex<BTreeMap<(u32, bool), Arc<GpuDevice>>> = Mutex::new(BTreeMap::new());
    let mut table = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = table.get(&(ordinal, cache)) {
        return Ok(known.clone());
    }
    let folder = if cache { tilewright::cache_dir() } else { None };
    let opened = Arc::new(GpuDevice::open(ordinal, folder.as_deref())?);
    Ok(table.entry((ordinal, cache)).or_insert(opened).clone())
}

/// Plans a graph for device `ordinal` and copies its weights there. `cache`: keep compiled kernels on disk.
pub(crate) fn load(
    graph: Graph,
    ordinal: u32,
    precision: Precision,
    cache: bool,
) -> Result<GpuModel> {
    let device = device(ordinal, cache)?;
    let mut compiler = GpuCompiler::new(device.machine().clone());
    compiler.precision = precision;
    device.load(compiler.plan(graph)?)
}

/// A graph on a GPU. May be shared by threads, and by all places of a model that compute the same: memory comes with each run.
#[pyclass(frozen, weakref)]
pub(crate) struct GpuProgram {
    planned: GpuPlan,
    direct: Direct,
    device: Arc<GpuDevice>,
    operators: usize,
}

/// Addresses of inputs and outputs, and of scratch memory.
type Places<'a> = (&'a [u64], &'a [u64], u64);

impl GpuProgram {
    /// Plans a graph for device `ordinal`. `cache`: keep compiled kernels on disk.
    pub(crate) fn new(
        graph: Graph,
        ordinal: u32,
        precision: Precision,
        cache: bool,
    ) -> Result<GpuProgram> {
        let operators = graph.order.len();
        let device = device(ordinal, cache)?;
        let mut compiler = GpuCompiler::new(device.machine().clone());
        compiler.precision = precision;
        let planned = compiler.plan(graph)?;
        let direct = device.direct(&planned)?;
        Ok(GpuProgram { planned, direct, device, operators })
    }

    fn env(&self, sizes: &[i64]) -> PyResult<Env> {
        let symbols = &self.planned.plan().symbols;
        if symbols.len() != sizes.len() {
            let message = format!("{} sizes for {} symbols", sizes.len(), symbols.len());
            return Err(PyValueError::new_err(message));
        }
        for (symbol, &size) in symbols.iter().zip(sizes) {
            if !(symbol.range.min..=symbol.range.max).contains(&size) {
                let (min, max) = (symbol.range.min, symbol.range.max);
                let message = format!("size {} is {size}, and must be {min} to {max}", symbol.name);
                return Err(PyValueError::new_err(message));
            }
        }
        Ok(symbols.iter().map(|s| s.name.clone()).zip(sizes.iter().copied()).collect())
    }

    /// Runs, or times each step.
    fn execute(
        &self,
        py: Python<'_>,
        places: Places<'_>,
        sizes: &[i64],
        stream: usize,
        timed: bool,
    ) -> PyResult<Vec<(usize, f64)>> {
        let plan = self.planned.plan();
        if (places.0.len(), places.1.len()) != (plan.inputs.len(), plan.outputs.len()) {
            let message = format!(
                "{} and {} addresses for {} inputs and {} outputs",
                places.0.len(),
                places.1.len(),
                plan.inputs.len(),
                plan.outputs.len()
            );
            return Err(PyValueError::new_err(message));
        }
        py.detach(|| {
            let stream = stream_of(self.device.gpu(), stream);
            run_at(&*self.direct.fit(sizes)?, places, &stream, timed)
        })
        .map_err(python_error)
    }
}

#[pymethods]
impl GpuProgram {
    /// Names of the sizes that a run is given, in order.
    #[getter]
    fn symbols(&self) -> Vec<String> {
        self.planned.plan().symbols.iter().map(|s| s.name.to_string()).collect()
    }

    /// Operators of the graph as given, steps of the plan, distinct kernels, and 0.
    #[getter]
    fn counts(&self) -> (usize, usize, usize, usize) {
        let plan = self.planned.plan();
        (self.operators, plan.steps.len(), plan.kernels.len(), 0)
    }

    /// Each step of the plan: label, what it is built around, the nodes fused in it.
    #[getter]
    fn steps(&self) -> Vec<(String, String, Vec<String>)> {
        let note = |step: &_| {
            let note = tilewright::explain::note_of(step);
            (note.label.clone(), note.anchor.clone(), note.nodes.clone())
        };
        self.planned.plan().steps.iter().map(note).collect()
    }

    /// The least seconds of each step by the device's ceilings, and which one it is, for these values of `symbols`.
    fn least_times(&self, sizes: Vec<i64>) -> PyResult<Vec<(f64, &'static str)>> {
        Ok(self.planned.least_times(&self.env(&sizes)?))
    }

    /// Seconds of each stage of planning.
    #[getter]
    fn stages(&self) -> Vec<(String, f64)> {
        let stages = self.planned.stages().iter();
        stages.map(|s| (s.name.clone(), s.time.as_secs_f64())).collect()
    }

    /// The graph after the passes, as text.
    fn text(&self) -> String {
        self.planned.graph().to_string()
    }

    /// Shapes of the outputs for these values of `symbols`, and the bytes of scratch memory that a run takes. The first time
    /// kernels are chosen and compiled, which is refused in a stream that is being recorded.
    fn fit(
        &self,
        py: Python<'_>,
        sizes: Vec<i64>,
        stream: usize,
    ) -> PyResult<(Vec<Vec<usize>>, usize)> {
        self.env(&sizes)?;
        py.detach(|| {
            if !self.direct.is_fit(&sizes) && stream_of(self.device.gpu(), stream).is_capturing()? {
                return Err(Error::unsupported(
                    "the first run with new sizes, in a stream that is recorded",
                )
                .with_hint("run once before the recording begins"));
            }
            let fitted = self.direct.fit(&sizes)?;
            Ok((self.direct.output_shapes(&sizes)?, fitted.scratch_bytes()))
        })
        .map_err(python_error)
    }

    /// The device programs with their schedules, for these values of `symbols`.
    fn schedules(&self, sizes: Vec<i64>) -> PyResult<Vec<String>> {
        self.env(&sizes)?;
        let fitted = self.direct.fit(&sizes).map_err(python_error)?;
        Ok(fitted.schedules().to_vec())
    }

    /// Puts a run on the contiguous inputs at these addresses of the device, into the contiguous outputs at
    /// those, into the stream with this handle; `scratch` is as much memory as `fit` says. Addresses are aligned to 16 bytes, that of
    /// scratch memory to 256. Sizes are as the graph says; nothing checks the addresses.
    fn run(
        &self,
        py: Python<'_>,
        inputs: Vec<u64>,
        outputs: Vec<u64>,
        scratch: u64,
        sizes: Vec<i64>,
        stream: usize,
    ) -> PyResult<()> {
        self.execute(py, (&inputs, &outputs, scratch), &sizes, stream, false).map(|_| ())
    }

    /// As `run`; waits, and returns the number and the seconds of each step.
    fn run_timed(
        &self,
        py: Python<'_>,
        inputs: Vec<u64>,
        outputs: Vec<u64>,
        scratch: u64,
        sizes: Vec<i64>,
        stream: usize,
    ) -> PyResult<Vec<(usize, f64)>> {
        self.execute(py, (&inputs, &outputs, scratch), &sizes, stream, true)
    }
}
