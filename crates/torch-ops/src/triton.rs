//! The operators' texts as Triton modules: the same graphs, planned, their tile programs printed by `emit-triton` instead of
//! compiled here. Who launches them is Python's ([`set_launcher`]): Triton lives there.
//!
//! ```text
//! Python: enter(true); torch.ops.tilewright.softmax(x) --> plans::run --> here: modules (once), one launch per step --> Python
//! ```
//!
//! Tile sizes and warps are those that the picker of our own kernels finds on a device without clusters, for few rows or for many:
//! a module serves all numbers of rows on its side of [`MANY_ROWS`]. Products have the tiles of [`product_tiles`].

use crate::plans::Key;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Buffer;
use tilewright_device::Arch;
use tilewright_emit_triton::{Emitted, Knobs, emit_kernel};
use tilewright_graph::Graph;
use tilewright_layout::{Dim, Env};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_plan::{BufferId, Form, Plan, PlanKernel, Step, Storage};
use tilewright_target::Gpu;
use tilewright_tile::{Kernel, Schedule};
use tilewright_torch_abi::{Device, Tensor};

/// Rows from which an operator has many; schedules are picked for [`FEW`] or for [`MANY`].
const MANY_ROWS: i64 = 1024;
const FEW: i64 = 128;
const MANY: i64 = 16384;

/// A tensor as a launch takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Address of the first element.
    pub address: u64,
    /// Element type.
    pub dtype: DType,
    /// Extent of each axis.
    pub shape: Vec<i64>,
    /// Elements between neighbours along each axis.
    pub strides: Vec<i64>,
}

/// One kernel on its tensors.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The module: its function `launch` takes the tensors in order.
    pub module: Arc<Emitted>,
    /// The tensors.
    pub tensors: Vec<Memory>,
    /// All sizes of its program by name: `launch` takes those as keywords that no shape gives.
    pub sizes: Vec<(String, i64)>,
}

/// What runs launches, in order, on a device (`None`: the processor, under Triton's interpreter).
pub type Launcher = fn(Option<u32>, &[Launch]) -> Result<()>;

static LAUNCHER: OnceLock<Launcher> = OnceLock::new();
thread_local! {
    static ENTERED: Cell<bool> = const { Cell::new(false) };
}

/// Says who launches. The first stays.
pub fn set_launcher(launcher: Launcher) {
    let _ = LAUNCHER.set(launcher);
}

/// Whether operators that this thread calls from now on run as Triton kernels; returns what held before.
pub fn enter(on: bool) -> bool {
    ENTERED.replace(on)
}

pub(crate) fn entered() -> bool {
    ENTERED.get()
}

/// A step of a plan: its module, and where its tensors are.
struct Planned {
    module: Arc<Emitted>,
    kernel: Arc<Kernel>,
    args: Vec<BufferId>,
    sizes: Vec<Dim>,
}

/// The modules of a graph's text, as for an H200 and symbols of about these values: names and sources, in the order in which
/// they run.
///
/// # Errors
/// What is wrong with the text; unsupported, by kernel, what Triton has no words for.
pub fn modules(text: &str, sizes: &[i64]) -> Result<Vec<(String, String)>> {
    let program = Program::new(text, &Gpu::h200(), sizes)?;
    Ok(program.steps.iter().map(|s| (s.module.name.clone(), s.module.python.clone())).collect())
}

/// A graph as Triton modules.
struct Program {
    plan: Plan,
    steps: Vec<Planned>,
    /// Addresses of the graph's own tensors, and what holds them on a device.
    constants: BTreeMap<BufferId, u64>,
    _held: Vec<Buffer>,
}

impl Program {
    /// Plans a graph for a device and prints its kernels, for symbols of about these values.
    fn new(text: &str, machine: &Gpu, sizes: &[i64]) -> Result<Program> {
        let planned = crate::plans::planned(machine, &Graph::parse(text)?)?;
        let plan = planned.plan().clone();
        let about: Env =
            plan.symbols.iter().zip(sizes).map(|(s, v)| (s.name.clone(), *v)).collect();
        let mut steps = Vec::new();
        for step in &plan.steps {
            let Step::Launch { kernel, args, sizes, .. } = step else {
                return Err(Error::unsupported("an operator that runs on the host, as Triton"));
            };
            let of_kernel = &plan.kernels[*kernel];
            let values = sizes.iter().map(|d| d.eval(&about)).collect::<Option<Vec<_>>>();
            let values = values.ok_or_else(|| Error::bug("a size without a value"))?;
            let (kernel, params, schedule, warps) = scheduled(of_kernel, &values)?;
            let knobs = Knobs { num_warps: warps, ..Knobs::default() };
            let module = Arc::new(emit_kernel(&kernel, &schedule, knobs)?);
            let args = params.iter().map(|p| args[*p]).collect();
            steps.push(Planned { module, kernel, args, sizes: sizes.clone() });
        }
        Ok(Program { plan, steps, constants: BTreeMap::new(), _held: Vec::new() })
    }

    /// Puts the graph's own tensors where kernels find them: on a device, or where they lie.
    fn place_constants(&mut self, device: Option<u32>) -> Result<()> {
        for (id, buffer) in self.plan.buffers.iter() {
            let Storage::Const(tensor) = &buffer.storage else { continue };
            if tensor.dtype() != buffer.dtype || !buffer.layout.is_row_major() {
                return Err(Error::unsupported("packed tensors of a graph's own, as Triton"));
            }
            let address = match device {
                None => tensor.bytes().as_ptr() as u64,
                Some(index) => {
                    let device = crate::plans::cuda(index)?;
                    let stream = device.loader.gpu().stream()?;
                    let memory = stream.alloc(tensor.bytes().len().max(1))?;
                    memory.write_at(&stream, 0, tensor.bytes())?;
                    stream.synchronize()?;
                    let address = memory.address();
                    self._held.push(memory);
                    address
                }
            };
            self.constants.insert(id, address);
        }
        Ok(())
    }

    /// The launches for these sizes. `arena` gives memory for what lives between kernels, by bytes.
    fn launches(
        &self,
        sizes: &[i64],
        inputs: &[u64],
        outputs: &[u64],
        arena: &mut dyn FnMut(i64) -> Result<u64>,
    ) -> Result<Vec<Launch>> {
        let env: Env =
            self.plan.symbols.iter().zip(sizes).map(|(s, v)| (s.name.clone(), *v)).collect();
        let unknown = || Error::bug("an extent without a value");
        let mut between: BTreeMap<BufferId, u64> = BTreeMap::new();
        let mut out = Vec::new();
        for step in &self.steps {
            let kernel = &step.kernel;
            let values = step.sizes.iter().map(|d| d.eval(&env)).collect::<Option<Vec<_>>>();
            let own: Env = kernel
                .symbols
                .iter()
                .zip(values.ok_or_else(unknown)?)
                .map(|(s, v)| (s.name.clone(), v))
                .collect();
            let mut tensors = Vec::new();
            for (id, (_, param)) in step.args.iter().zip(kernel.params.iter()) {
                let buffer = &self.plan.buffers[*id];
                let given = |list: &[u64], i: usize| {
                    list.get(i).copied().ok_or_else(|| Error::bug("a tensor that was not given"))
                };
                let address = match (&buffer.storage, between.get(id)) {
                    (Storage::Input(i), _) => given(inputs, *i)?,
                    (Storage::Output(i), _) => given(outputs, *i)?,
                    (Storage::Arena, Some(known)) => *known,
                    (Storage::Arena, None) => {
                        let elements = buffer.layout.alloc_elements().eval(&env);
                        let elements = elements.ok_or_else(unknown)?.max(1);
                        let made = arena(elements * i64::from(buffer.dtype.bits().max(8)) / 8)?;
                        between.insert(*id, made);
                        made
                    }
                    (Storage::Const(_), _) => *self
                        .constants
                        .get(id)
                        .ok_or_else(|| Error::bug("a tensor of a graph's own has no place"))?,
                    (Storage::State(_), _) => {
                        return Err(Error::unsupported("state between calls, as Triton"));
                    }
                };
                let axes = &param.layout.axes;
                let all = |of: &dyn Fn(usize) -> Dim| {
                    (0..axes.len()).map(|a| of(a).eval(&own)).collect::<Option<Vec<i64>>>()
                };
                let shape = all(&|a| axes[a].extent.clone()).ok_or_else(unknown)?;
                let strides = all(&|a| axes[a].stride.clone()).ok_or_else(unknown)?;
                let first = param.layout.offset.eval(&own).ok_or_else(unknown)?;
                let offset = first * i64::from(param.dtype.bits()) / 8;
                let address = address.wrapping_add_signed(offset);
                tensors.push(Memory { address, dtype: param.dtype, shape, strides });
            }
            let sizes = own.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
            out.push(Launch { module: step.module.clone(), tensors, sizes });
        }
        Ok(out)
    }
}

/// A kernel's form for Triton: the program, which parameters of the step's kernel it has, its tile sizes, and warps.
fn scheduled(
    planned: &PlanKernel,
    sizes: &[i64],
) -> Result<(Arc<Kernel>, Vec<usize>, Schedule, u32)> {
    let env: Env =
        planned.kernel.symbols.iter().zip(sizes).map(|(s, v)| (s.name.clone(), *v)).collect();
    let lookup = |name: &str| env.get(name).copied();
    let whole = planned.forms.iter().filter_map(|form| match form {
        Form::Program { kernel, params } => Some((kernel.clone(), params.clone())),
        _ => None,
    });
    let all: Vec<usize> = (0..planned.kernel.params.len()).collect();
    if planned.kernel.tiles.iter().any(|t| &**t == "BK") {
        let (tiles, warps) = product_tiles(&planned.kernel, sizes);
        let tiles = planned.kernel.tiles.iter().zip(tiles).map(|(t, n)| (t.clone(), n)).collect();
        let schedule = Schedule { tiles, ..Schedule::default() };
        return Ok((planned.kernel.clone(), all, schedule, warps));
    }
    for (kernel, params) in whole.chain([(planned.kernel.clone(), all)]) {
        // A program of Triton's has no cluster: rows that a block does not hold go in pieces.
        if let Some(picked) = GpuSchedule::lines_for(&kernel, Arch::Sm89, &lookup)? {
            let schedule = Schedule { tiles: picked.tiles, ..Schedule::default() };
            return Ok((kernel, params, schedule, (picked.lines.threads / 32).max(1)));
        }
    }
    Err(Error::unsupported(format!("@{} as Triton: no tile sizes fit", planned.kernel.name)))
}

/// Rows, columns and depth of a product's tiles, and warps: what Triton's own tutorials take on Hopper for 16 bits; smaller
/// ones where operands take more room, and for few rows.
fn product_tiles(kernel: &Kernel, sizes: &[i64]) -> ([i64; 3], u32) {
    let few = sizes.first().is_some_and(|rows| *rows < MANY_ROWS);
    let widest = kernel.params.iter().map(|(_, p)| p.dtype.bits()).max().unwrap_or(32);
    match (widest, few) {
        (..=16, false) => ([128, 128, 64], 8),
        (..=16, true) => ([64, 128, 64], 4),
        (17..=32, _) => ([64, 64, 32], 4),
        _ => ([32, 32, 16], 4),
    }
}

/// Runs an operator's graph; the contract is that of [`crate::plans::run`].
pub(crate) fn run(
    key: Key,
    sizes: &[i64],
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    type Programs = RwLock<BTreeMap<(Key, Vec<i64>, Option<u32>), Arc<Program>>>;
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    let Some(first) = outputs.first() else { return Ok(()) };
    let launcher = LAUNCHER.get().ok_or_else(|| Error::bug("nobody launches Triton's kernels"))?;
    let (device, abi) = (first.device(), first.abi());
    let index = match device {
        Device::Cuda(index) => Some(index),
        Device::Cpu => None,
    };
    let about: Vec<i64> = sizes.iter().map(|v| if *v < MANY_ROWS { FEW } else { MANY }).collect();
    let key = (key, about, index);
    let programs = PROGRAMS.get_or_init(Programs::default);
    let known = programs.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let program = match known {
        Some(program) => program,
        None => {
            let machine = match index {
                Some(index) => crate::plans::cuda(index)?.machine().clone(),
                None => Gpu::h200(),
            };
            let mut made = Program::new(&text()?, &machine, &key.1)?;
            made.place_constants(index)?;
            let made = Arc::new(made);
            let mut programs = programs.write().unwrap_or_else(PoisonError::into_inner);
            programs.entry(key).or_insert(made).clone()
        }
    };
    let place = |t: &&Tensor| t.address();
    let inputs = inputs.iter().map(place).collect::<Result<Vec<_>>>()?;
    let outputs = outputs.iter().map(place).collect::<Result<Vec<_>>>()?;
    // What PyTorch's allocator frees while kernels are in flight goes to later work of the same stream only.
    let mut held = Vec::new();
    let mut arena = |bytes: i64| -> Result<u64> {
        held.push(Tensor::empty(abi, &[bytes], DType::U8, device)?);
        held.last().map_or(Ok(0), Tensor::address)
    };
    let launches = program.launches(sizes, &inputs, &outputs, &mut arena)?;
    launcher(index, &launches)
}
