//! Compiled graphs by key, and running them on PyTorch's tensors.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::hash::Hash;
#[cfg(feature = "cpu")]
use std::sync::Mutex;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
#[cfg(not(feature = "cpu"))]
use tilewright_base::Error;
use tilewright_base::{DType, Result};
use tilewright_cuda::{Nvrtc, Stream};
use tilewright_graph::Graph;
use tilewright_launch::Loader;
use tilewright_runtime_gpu::{
    AttentionCall, AttentionKernels, AttentionPlaces, AttentionPlan, Direct, Losses, LossesOf,
    LossesPlaces, NormBackward, NormGradient, NormGradientPlaces,
};
use tilewright_target::Gpu as Machine;
use tilewright_torch_abi::{Abi, Device, Tensor};

/// What a plan was compiled for: the operator and the numbers that its text depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    name: &'static str,
    used: usize,
    words: [u64; 12],
}

impl Hash for Key {
    /// Words alone: few operators have the same.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.len().hash(state);
        for word in self.words.iter().take(self.used) {
            word.hash(state);
        }
    }
}

impl Key {
    pub(crate) fn new(name: &'static str) -> Key {
        Key { name, used: 0, words: [0; 12] }
    }

    /// Adds a number. Numbers are told apart by their order; no operator has more than there is room for.
    pub(crate) fn with(mut self, number: u64) -> Key {
        debug_assert!(self.used < self.words.len(), "{} has too many numbers", self.name);
        if let Some(place) = self.words.get_mut(self.used) {
            *place = number;
        }
        self.used += 1;
        self
    }

    pub(crate) fn dtype(self, dtype: DType) -> Key {
        self.with(dtype as u64)
    }
}

/// Hashes of keys, which nobody chooses to collide: a multiplication a word.
#[derive(Clone, Copy, Default)]
#[cfg(feature = "cpu")]
struct Mixer(u64);

#[cfg(feature = "cpu")]
impl std::hash::Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let word = chunk.iter().rev().fold(0, |w, b| (w << 8) | u64::from(*b));
            self.write_u64(word);
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517C_C1B7_2722_0A95);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}

#[cfg(feature = "cpu")]
type Mixed = std::hash::BuildHasherDefault<Mixer>;

/// Runs the graph that `text` writes on these tensors: `sizes` are the values of its symbols, in order. Inputs and outputs are
/// row-major, on one device, and have the graph's types and shapes.
pub(crate) fn run(
    key: Key,
    sizes: &[i64],
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    let Some(first) = outputs.first() else { return Ok(()) };
    if crate::triton::entered() {
        return crate::triton::run(key, sizes, inputs, outputs, text);
    }
    match first.device() {
        Device::Cpu => on_cpu(key, sizes, inputs, outputs, text),
        Device::Cuda(index) => on_cuda(index, key, sizes, inputs, outputs, text),
    }
}

// ---- on the processor ------------------------------------------------------------------------------

/// Fewer elements than this are computed by the calling thread (PyTorch's own bound for maps).
#[cfg(feature = "cpu")]
const FEW: i64 = 32768;

#[cfg(feature = "cpu")]
fn on_cpu(
    key: Key,
    sizes: &[i64],
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    type Plans = RwLock<HashMap<(u32, Key), Arc<Mutex<tilewright::Session>>, Mixed>>;
    static PLANS: OnceLock<Plans> = OnceLock::new();
    let plans = PLANS.get_or_init(Plans::default);
    // A forked process has none of its parent's threads: it makes plans of its own.
    let key = (tilewright_torch_abi::forks(), key);
    let known = plans.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let session = match known {
        Some(session) => session,
        None => {
            let compiler = compiler(key.0, first_abi(outputs)?)?;
            let compiled = compiler.compile_graph(Graph::parse(&text()?)?)?;
            let session = Arc::new(Mutex::new(compiled.session()?));
            let mut plans = plans.write().unwrap_or_else(PoisonError::into_inner);
            plans.entry(key).or_insert(session).clone()
        }
    };
    let alone = inputs.iter().chain(outputs).map(|t| t.elements()).sum::<i64>() < FEW;
    let place = |t: &&Tensor| t.address().map(|a| a as usize);
    let inputs = inputs.iter().map(place).collect::<Result<Vec<_>>>()?;
    let outputs = outputs.iter().map(place).collect::<Result<Vec<_>>>()?;
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the operators give tensors of the graph's types and shapes (`run`'s contract, which each keeps by checking
    // its arguments and making its results from them), and PyTorch's tensors live until the call ends. Outputs are new.
    unsafe { session.run_at(sizes, &inputs, &outputs, alone) }
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(
    _key: Key,
    _sizes: &[i64],
    _inputs: &[&Tensor],
    _outputs: &[&Tensor],
    _text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    Err(Error::unsupported("this build has no kernels for the processor"))
}

#[cfg(feature = "cpu")]
fn first_abi(tensors: &[&Tensor]) -> Result<&'static Abi> {
    tensors
        .first()
        .map(|t| t.abi())
        .ok_or_else(|| tilewright_base::Error::bug("an operator without results"))
}

/// The compiler of this process, on as many threads as PyTorch has when it is first asked for.
#[cfg(feature = "cpu")]
fn compiler(process: u32, abi: &Abi) -> Result<tilewright::Compiler> {
    static COMPILERS: OnceLock<Mutex<HashMap<u32, tilewright::Compiler>>> = OnceLock::new();
    let known = COMPILERS.get_or_init(Mutex::default);
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(compiler) = known.get(&process) {
        return Ok(compiler.clone());
    }
    let folder = tilewright::cache_dir();
    let cpu = tilewright::host_cpu(abi.threads(), folder.as_deref())?;
    let compiler = tilewright::Compiler::for_cpu(cpu, folder);
    known.insert(process, compiler.clone());
    Ok(compiler)
}

// ---- on a CUDA device ------------------------------------------------------------------------------

/// A device with its compiler and its plans.
pub(crate) struct Cuda {
    pub(crate) loader: Arc<Loader>,
    machine: Machine,
    /// Whether it is the only one.
    pub(crate) alone: bool,
    plans: RwLock<BTreeMap<Key, Arc<Direct>>>,
    /// By the key of a norm's gradient and its number of rows; `None` where it has no kernel.
    norms: RwLock<BTreeMap<(Key, i64), Option<NormKernels>>>,
    /// By all numbers of a call.
    attentions: RwLock<BTreeMap<Vec<i64>, AttentionMade>>,
    /// By the key of a cross-entropy and the number of rows that its schedule is for; `None` where it has no kernel.
    losses: RwLock<BTreeMap<(Key, i64), LossKernel>>,
}

/// Kernels of an attention, and how many bytes of scratch memory they take.
type AttentionMade = (Arc<AttentionKernels>, u64);

impl Cuda {
    /// What plans for this device know of it.
    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }
}

/// The gradient of a norm, and how many bytes of scratch memory it takes.
type NormKernels = (Arc<NormBackward>, u64);

/// A cross-entropy, if there is a kernel for it.
type LossKernel = Option<Arc<Losses>>;

/// How many sizes are remembered; then all are forgotten (compiled kernels stay).
const MAX_NORMS: usize = 1024;

pub(crate) fn cuda(index: u32) -> Result<Arc<Cuda>> {
    static DEVICES: OnceLock<RwLock<HashMap<u32, Arc<Cuda>>>> = OnceLock::new();
    let devices = DEVICES.get_or_init(RwLock::default);
    if let Some(known) = devices.read().unwrap_or_else(PoisonError::into_inner).get(&index) {
        return Ok(known.clone());
    }
    let alone = tilewright_cuda::Gpu::count()? == 1;
    // Opening a device makes it the current one.
    let _guard = if alone { None } else { Some(Abi::open()?.cuda_guard(index)?) };
    let folder = tilewright::cache_dir();
    let device = tilewright::gpu::GpuDevice::open(index, folder.as_deref())?;
    let nvrtc = Nvrtc::open(folder.map(|f| f.join("cuda")).as_deref())?;
    let loader = Arc::new(Loader::new(device.gpu().clone(), nvrtc));
    let machine = device.machine().clone();
    let made = Arc::new(Cuda {
        loader,
        machine,
        alone,
        plans: RwLock::default(),
        norms: RwLock::default(),
        attentions: RwLock::default(),
        losses: RwLock::default(),
    });
    let mut devices = devices.write().unwrap_or_else(PoisonError::into_inner);
    Ok(devices.entry(index).or_insert(made).clone())
}

/// A graph planned for a GPU. The texts are written to be one kernel wherever that is possible, and the search, which does not
/// know how many rows there will be, does not always find it: of its plan and the plain rule's, the one with fewer kernels.
pub(crate) fn planned(machine: &Machine, graph: &Graph) -> Result<tilewright::gpu::GpuPlan> {
    let mut compiler = tilewright::gpu::GpuCompiler::new(machine.clone());
    let found = compiler.plan(graph.clone())?;
    compiler.fusion = tilewright::Choice::Greedy;
    let plain = compiler.plan(graph.clone())?;
    Ok(if plain.plan().steps.len() < found.plan().steps.len() { plain } else { found })
}

fn on_cuda(
    index: u32,
    key: Key,
    sizes: &[i64],
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    let device = cuda(index)?;
    let Some(first) = outputs.first() else { return Ok(()) };
    let abi = first.abi();
    // With one device it is the current one.
    let _guard = if device.alone { None } else { Some(abi.cuda_guard(index)?) };
    let known = device.plans.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let plan = match known {
        Some(plan) => plan,
        None => {
            let planned = planned(&device.machine, &Graph::parse(&text()?)?)?;
            let plan = planned.plan().clone();
            let made = Direct::new(plan, device.loader.clone(), device.machine.clone())?;
            let mut plans = device.plans.write().unwrap_or_else(PoisonError::into_inner);
            plans.entry(key).or_insert(Arc::new(made)).clone()
        }
    };
    let fitted = plan.fit(sizes)?;
    let scratch = match fitted.scratch_bytes() {
        0 => None,
        bytes => {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            Some(Tensor::empty(abi, &[bytes], DType::U8, Device::Cuda(index))?)
        }
    };
    let place = |t: &&Tensor| t.address();
    let inputs = inputs.iter().map(place).collect::<Result<Vec<_>>>()?;
    let outputs = outputs.iter().map(place).collect::<Result<Vec<_>>>()?;
    let scratch_at = scratch.as_ref().map_or(Ok(0), Tensor::address)?;
    let stream: *mut c_void = abi.cuda_stream(index)?;
    // SAFETY: PyTorch's current stream of this device, which belongs to the primary context and outlives the call.
    let stream = unsafe { Stream::from_raw(device.loader.gpu(), stream) };
    // SAFETY: tensors of the graph's types and shapes, row-major and aligned (`run`'s contract). PyTorch's allocator gives memory
    // that is freed while kernels are in flight only to later work of the same stream.
    unsafe { fitted.launch(&inputs, &outputs, scratch_at, &stream) }
}

/// The gradient of a norm on a GPU, if there is a kernel for it that reads the rows once: whether there was. `places` come without
/// scratch memory; the tensors behind them are as `what` says, row-major and aligned.
pub(crate) fn norm_backward(
    abi: &'static Abi,
    index: u32,
    key: Key,
    what: NormGradient,
    mut places: NormGradientPlaces,
) -> Result<bool> {
    let device = cuda(index)?;
    let _guard = if device.alone { None } else { Some(abi.cuda_guard(index)?) };
    let key = (key, what.rows);
    let known = device.norms.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let mut scratch = None;
    let mut memory = |bytes: u64| -> Result<u64> {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let made = scratch.insert(Tensor::empty(abi, &[bytes], DType::U8, Device::Cuda(index))?);
        made.address()
    };
    let found = match known {
        Some(None) => return Ok(false),
        Some(Some((kernels, bytes))) => {
            places.scratch = memory(bytes)?;
            kernels
        }
        None => {
            let made = NormBackward::plan(&device.machine, &what).and_then(|(plan, bytes)| {
                places.scratch = memory(bytes)?;
                let made = NormBackward::new(&device.loader, what, &plan, &places)?;
                Ok((Arc::new(made), bytes))
            });
            let mut norms = device.norms.write().unwrap_or_else(PoisonError::into_inner);
            if norms.len() >= MAX_NORMS {
                norms.clear();
            }
            match made {
                Ok((kernels, bytes)) => {
                    norms.insert(key, Some((kernels.clone(), bytes)));
                    kernels
                }
                Err(error) if error.kind() == tilewright_base::Kind::Unsupported => {
                    norms.insert(key, None);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
    };
    let stream: *mut c_void = abi.cuda_stream(index)?;
    // SAFETY: as in `on_cuda`.
    let stream = unsafe { Stream::from_raw(device.loader.gpu(), stream) };
    // SAFETY: this function's contract; the scratch memory was just made, and what PyTorch's allocator frees while kernels are in
    // flight goes to later work of the same stream only.
    unsafe { found.launch(&places, &stream)? };
    Ok(true)
}

/// Attention that keeps its log-sum-exp, or with `backward` its gradient, on a GPU. `places` come without scratch memory; the
/// tensors behind them are as `call` says.
///
/// # Errors
/// Unsupported where the library has no kernel.
pub(crate) fn attention_training(
    abi: &'static Abi,
    index: u32,
    call: &AttentionCall,
    backward: bool,
    mut places: AttentionPlaces,
) -> Result<()> {
    let device = cuda(index)?;
    let _guard = if device.alone { None } else { Some(abi.cuda_guard(index)?) };
    let AttentionCall { batch, heads, kv_heads, queries, keys, depth, width, .. } = *call;
    let mut key = vec![batch, heads, kv_heads, queries, keys, depth, width];
    let flags = [call.dtype as i64, call.causal.into(), backward.into()];
    key.extend(flags);
    key.push(call.scale.to_bits().cast_signed());
    key.extend(call.strides.as_flattened());
    if let Some(mask) = &call.mask {
        key.extend([mask.dtype as i64, mask.align]);
        key.extend(mask.strides);
    }
    let known = device.attentions.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let mut scratch = None;
    let mut memory = |bytes: u64| -> Result<u64> {
        if bytes == 0 {
            return Ok(0);
        }
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let made = scratch.insert(Tensor::empty(abi, &[bytes], DType::U8, Device::Cuda(index))?);
        made.address()
    };
    let kernels = match known {
        Some((kernels, bytes)) => {
            places.scratch = memory(bytes)?;
            kernels
        }
        None => {
            let plan = match backward {
                true => AttentionPlan::backward(&device.machine, call)?,
                false => AttentionPlan::forward(&device.machine, call)?,
            };
            let bytes = plan.scratch_bytes();
            places.scratch = memory(bytes)?;
            let made = AttentionKernels::new(&device.loader, call.clone(), plan, &places)?;
            let made = Arc::new(made);
            let mut attentions = device.attentions.write().unwrap_or_else(PoisonError::into_inner);
            if attentions.len() >= MAX_NORMS {
                attentions.clear();
            }
            attentions.insert(key, (made.clone(), bytes));
            made
        }
    };
    let stream: *mut c_void = abi.cuda_stream(index)?;
    // SAFETY: as in `on_cuda`.
    let stream = unsafe { Stream::from_raw(device.loader.gpu(), stream) };
    // SAFETY: this function's contract; the scratch memory was just made, and what PyTorch's allocator frees while kernels are in
    // flight goes to later work of the same stream only.
    unsafe { kernels.launch(&places, &stream) }
}

/// Cross-entropy on a GPU, if the library has a kernel for it: whether there was. The tensors behind `places` are as `what` says,
/// row-major and aligned.
pub(crate) fn losses(
    abi: &'static Abi,
    index: u32,
    key: Key,
    what: LossesOf,
    places: LossesPlaces,
) -> Result<bool> {
    if crate::triton::entered() {
        return Ok(false);
    }
    let device = cuda(index)?;
    let _guard = if device.alone { None } else { Some(abi.cuda_guard(index)?) };
    let key = (key, what.schedule_rows());
    let known = device.losses.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let found = match known {
        Some(known) => known,
        None => {
            let made = match Losses::new(&device.machine, &device.loader, what) {
                Ok(made) => Some(Arc::new(made)),
                Err(error) if error.kind() == tilewright_base::Kind::Unsupported => None,
                Err(error) => return Err(error),
            };
            let mut losses = device.losses.write().unwrap_or_else(PoisonError::into_inner);
            if losses.len() >= MAX_NORMS {
                losses.clear();
            }
            losses.entry(key).or_insert(made).clone()
        }
    };
    let Some(found) = found else { return Ok(false) };
    let stream: *mut c_void = abi.cuda_stream(index)?;
    // SAFETY: as in `on_cuda`.
    let stream = unsafe { Stream::from_raw(device.loader.gpu(), stream) };
    // SAFETY: this function's contract; what PyTorch's allocator frees while kernels are in flight goes to later work of the same
    // stream only.
    unsafe { found.launch(what.rows, &places, &stream)? };
    Ok(true)
}

/// The kernels that ran on a device for some operator so far, with their schedules: for people.
pub fn schedules(index: u32, sizes: &[i64]) -> Result<Vec<String>> {
    let device = cuda(index)?;
    let plans = device.plans.read().unwrap_or_else(PoisonError::into_inner);
    let fitted = plans.iter().filter_map(|(key, plan)| Some((&key.name, plan.fit(sizes).ok()?)));
    let mut lines: Vec<String> = fitted
        .flat_map(|(name, f)| {
            f.schedules().iter().map(|s| format!("{name} {s}")).collect::<Vec<_>>()
        })
        .collect();
    lines.sort();
    Ok(lines)
}
