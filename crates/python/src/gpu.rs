//! [`GpuProgram`]: a compiled graph that runs on a GPU, in the memory and the stream of the caller.
//!
//! One that was worked out under a name (`keep`) is written to the cache with its first run, so that another process only loads it
//! ([`restore_gpu`]).

use crate::memory::{run_at, stream as stream_of};
use crate::python_error;
use pyo3::exceptions::{PyNotImplementedError, PyValueError};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use tilewright::gpu::{Direct, GpuCompiler, GpuDevice, GpuModel, GpuPlan, Kept, KeptFolder};
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
    made: Made,
    device: Arc<GpuDevice>,
}

/// Where a program comes from.
enum Made {
    /// This process.
    Planned(Arc<Planned>),
    /// Another one.
    Kept(Box<Kept>),
}

struct Planned {
    planned: GpuPlan,
    direct: Direct,
    operators: usize,
    /// The place in the cache that waits for it.
    keep: Mutex<Option<(KeptFolder, String)>>,
    ahead: Ahead,
}

/// A compilation of kernels beside other work: how many of them run, and a bell for when one ends.
#[derive(Default)]
struct Ahead {
    running: Mutex<usize>,
    ended: Condvar,
}

/// All compilations of this process. A child that was forked off has the number, but not the threads.
static RUNNING: Mutex<(u32, usize)> = Mutex::new((0, 0));
static NONE_RUNS: Condvar = Condvar::new();

impl Ahead {
    fn wait(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running > 0 {
            running = self.ended.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Counts a compilation while it runs, also where it panics.
struct Counted(Arc<Planned>);

impl Counted {
    fn new(planned: &Arc<Planned>) -> Counted {
        let mut all = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let here = std::process::id();
        *all = (here, if all.0 == here { all.1 } else { 0 } + 1);
        *planned.ahead.running.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Counted(planned.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *self.0.ahead.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ahead.ended.notify_all();
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).1 -= 1;
        NONE_RUNS.notify_all();
    }
}

/// Returns when no kernels are compiled beside other work any more ([`GpuProgram::compile_ahead`]): before a process unloads the compiler.
#[pyfunction]
pub(crate) fn wait_for_compilers(py: Python<'_>) {
    py.detach(|| {
        let mut all = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        while all.0 == std::process::id() && all.1 > 0 {
            all = NONE_RUNS.wait(all).unwrap_or_else(PoisonError::into_inner);
        }
    });
}

/// Where runs of a device are kept under a name, and the whole name: with all that they depend on beside the graph.
fn place(device: &GpuDevice, precision: Precision, keep: &str) -> Option<(KeptFolder, String)> {
    let folder = KeptFolder::new(&tilewright::cache_dir()?);
    Some((folder, device.name_of_run(&[keep, &precision.to_string()])))
}

/// A program that another process worked out under this name, for device `ordinal`, if there is one.
#[pyfunction]
#[pyo3(signature = (keep, device=0, precision="f32"))]
pub(crate) fn restore_gpu(
    py: Python<'_>,
    keep: &str,
    device: u32,
    precision: &str,
) -> PyResult<Option<GpuProgram>> {
    let precision: Precision =
        precision.parse().map_err(|_| PyValueError::new_err(format!("precision `{precision}`")))?;
    let restored = || -> Result<Option<GpuProgram>> {
        let device = self::device(device, true)?;
        let Some((folder, name)) = place(&device, precision, keep) else { return Ok(None) };
        let Some(bytes) = folder.load(&name) else { return Ok(None) };
        let kept = device.restore(&bytes)?;
        Ok(kept.map(|kept| GpuProgram { made: Made::Kept(Box::new(kept)), device }))
    };
    py.detach(restored).map_err(python_error)
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
        keep: Option<&str>,
    ) -> Result<GpuProgram> {
        let operators = graph.order.len();
        let device = device(ordinal, cache)?;
        let mut compiler = GpuCompiler::new(device.machine().clone());
        compiler.precision = precision;
        let planned = compiler.plan(graph)?;
        let direct = device.direct(&planned)?;
        let keep = keep.filter(|_| cache && planned.plan().symbols.is_empty());
        let keep = Mutex::new(keep.and_then(|keep| place(&device, precision, keep)));
        let ahead = Ahead::default();
        let made = Made::Planned(Arc::new(Planned { planned, direct, operators, keep, ahead }));
        Ok(GpuProgram { made, device })
    }

    fn planned(&self) -> PyResult<&Planned> {
        match &self.made {
            Made::Planned(planned) => Ok(planned),
            Made::Kept(_) => Err(PyNotImplementedError::new_err(
                "a program that was read from the cache has no plan: compile it without the cache to see its steps",
            )),
        }
    }

    fn env(&self, sizes: &[i64]) -> PyResult<Env> {
        let planned = match &self.made {
            Made::Planned(planned) => planned,
            Made::Kept(_) if sizes.is_empty() => return Ok(Env::new()),
            Made::Kept(_) => return Err(PyValueError::new_err("sizes for no symbols")),
        };
        let symbols = &planned.planned.plan().symbols;
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
        let (inputs, outputs) = match &self.made {
            Made::Planned(p) => (p.planned.plan().inputs.len(), p.planned.plan().outputs.len()),
            Made::Kept(kept) => (kept.fitted().input_bytes().len(), kept.output_shapes().len()),
        };
        if (places.0.len(), places.1.len()) != (inputs, outputs) {
            let message = format!(
                "{} and {} addresses for {inputs} inputs and {outputs} outputs",
                places.0.len(),
                places.1.len(),
            );
            return Err(PyValueError::new_err(message));
        }
        py.detach(|| {
            let stream = stream_of(self.device.gpu(), stream);
            match &self.made {
                Made::Planned(p) => run_at(&*p.direct.fit(sizes)?, places, &stream, timed),
                Made::Kept(kept) => run_at(kept.fitted(), places, &stream, timed),
            }
        })
        .map_err(python_error)
    }
}

#[pymethods]
impl GpuProgram {
    /// Names of the sizes that a run is given, in order.
    #[getter]
    fn symbols(&self) -> Vec<String> {
        match &self.made {
            Made::Planned(p) => {
                p.planned.plan().symbols.iter().map(|s| s.name.to_string()).collect()
            }
            Made::Kept(_) => Vec::new(),
        }
    }

    /// Whether another process worked it out: then it has no graph and no plan to show.
    #[getter]
    fn kept(&self) -> bool {
        matches!(self.made, Made::Kept(_))
    }

    /// Operators of the graph as given, steps of the plan, distinct kernels, and 0.
    #[getter]
    fn counts(&self) -> PyResult<(usize, usize, usize, usize)> {
        let planned = self.planned()?;
        let plan = planned.planned.plan();
        Ok((planned.operators, plan.steps.len(), plan.kernels.len(), 0))
    }

    /// Each step of the plan: label, what it is built around, the nodes fused in it.
    #[getter]
    fn steps(&self) -> PyResult<Vec<(String, String, Vec<String>)>> {
        let note = |step: &_| {
            let note = tilewright::explain::note_of(step);
            (note.label.clone(), note.anchor.clone(), note.nodes.clone())
        };
        Ok(self.planned()?.planned.plan().steps.iter().map(note).collect())
    }

    /// The least seconds of each step by the device's ceilings, and which one it is, for these values of `symbols`.
    fn least_times(&self, sizes: Vec<i64>) -> PyResult<Vec<(f64, &'static str)>> {
        Ok(self.planned()?.planned.least_times(&self.env(&sizes)?))
    }

    /// Seconds of each stage of planning.
    #[getter]
    fn stages(&self) -> Vec<(String, f64)> {
        let Made::Planned(planned) = &self.made else { return Vec::new() };
        let stages = planned.planned.stages().iter();
        stages.map(|s| (s.name.clone(), s.time.as_secs_f64())).collect()
    }

    /// The graph after the passes, as text.
    fn text(&self) -> PyResult<String> {
        Ok(self.planned()?.planned.graph().to_string())
    }

    /// Begins to compile the kernels for these values of `symbols` in a thread of its own, for which `fit` waits. The thread asks the device
    /// for nothing.
    fn compile_ahead(&self, sizes: Vec<i64>) -> PyResult<()> {
        self.env(&sizes)?;
        let Made::Planned(planned) = &self.made else { return Ok(()) };
        let counted = Counted::new(planned);
        // What goes wrong here goes wrong in `fit` again, which says it; without a thread, `fit` does all.
        let _ = std::thread::Builder::new().name("tilewright-ahead".to_owned()).spawn(move || {
            let _ = counted.0.direct.compile_ahead(&sizes);
        });
        Ok(())
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
        let planned = match &self.made {
            Made::Planned(planned) => planned,
            Made::Kept(kept) => {
                return Ok((kept.output_shapes().to_vec(), kept.fitted().scratch_bytes()));
            }
        };
        py.detach(|| {
            let direct = &planned.direct;
            if !direct.is_fit(&sizes) && stream_of(self.device.gpu(), stream).is_capturing()? {
                return Err(Error::unsupported(
                    "the first run with new sizes, in a stream that is recorded",
                )
                .with_hint("run once before the recording begins"));
            }
            planned.ahead.wait();
            let fitted = direct.fit(&sizes)?;
            let keep = planned.keep.lock().unwrap_or_else(PoisonError::into_inner).take();
            // What cannot be written is worked out again.
            if let Some((folder, name)) = keep
                && let Ok(Some(bytes)) = direct.keep(&sizes)
            {
                let _ = folder.store(&name, &bytes);
            }
            Ok((direct.output_shapes(&sizes)?, fitted.scratch_bytes()))
        })
        .map_err(python_error)
    }

    /// The device programs with their schedules, for these values of `symbols`.
    fn schedules(&self, sizes: Vec<i64>) -> PyResult<Vec<String>> {
        self.env(&sizes)?;
        match &self.made {
            Made::Planned(planned) => {
                let fitted = planned.direct.fit(&sizes).map_err(python_error)?;
                Ok(fitted.schedules().to_vec())
            }
            Made::Kept(kept) => Ok(kept.fitted().schedules().to_vec()),
        }
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
