//! Texts to compiled programs, each compiled once per device, and their runs in the memory of a call.

use crate::frame::{Call, Tensor};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tilewright::Precision;
use tilewright::gpu::{Direct, Fitted, GpuCompiler, GpuDevice, Room, Stream};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::Graph;
use tilewright_layout::{Dim, Env};

/// A value that is made once per key; looked up only, never iterated.
pub(crate) struct Once<K, V>(OnceLock<Mutex<HashMap<K, Place<V>>>>);

/// Where one value goes; locked while it is made.
type Place<V> = Arc<Mutex<Option<Arc<V>>>>;

impl<K: std::hash::Hash + Eq + Clone, V> Once<K, V> {
    pub(crate) const fn new() -> Once<K, V> {
        Once(OnceLock::new())
    }

    /// The value for a key. Others who want the same one wait; the rest do not.
    pub(crate) fn get(&self, key: &K, make: impl FnOnce() -> Result<V>) -> Result<Arc<V>> {
        let place = {
            let table = self.0.get_or_init(Mutex::default);
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            table.entry(key.clone()).or_default().clone()
        };
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Some(known) => Ok(known.clone()),
            None => Ok(place.insert(Arc::new(make()?)).clone()),
        }
    }
}

/// What a call wants run.
struct Wanted<'a> {
    text: &'a str,
    precision: Precision,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

/// A call's text and precision.
fn named<'a>(call: &Call<'a>) -> Result<(&'a str, Precision)> {
    let missing = || Error::user("a call without the attribute `graph`");
    let text = call.text("graph")?.ok_or_else(missing)?;
    let precision = call.text("precision")?.unwrap_or("f32");
    let precision =
        precision.parse().map_err(|_| Error::user(format!("the precision `{precision}`")))?;
    Ok((text, precision))
}

fn wanted<'a>(call: &Call<'a>) -> Result<Wanted<'a>> {
    let (text, precision) = named(call)?;
    Ok(Wanted { text, precision, inputs: call.inputs()?, outputs: call.outputs()? })
}

fn parsed(text: &str) -> Result<Graph> {
    let graph = Graph::parse(text)?;
    tilewright_graph::verify(&graph)?;
    if !graph.symbols.is_empty() {
        return Err(Error::user("a graph with symbolic sizes in a custom call"));
    }
    Ok(graph)
}

/// The tensors of a call are those of the plan.
fn check(given: &[Tensor], plan: &[(String, DType, Vec<Dim>)]) -> Result<()> {
    if given.len() != plan.len() {
        let message = format!("{} tensors where the graph has {}", given.len(), plan.len());
        return Err(Error::user(message));
    }
    for (tensor, (name, dtype, dims)) in given.iter().zip(plan) {
        let sizes = dims.iter().map(|d| d.eval(&Env::new()).and_then(|n| usize::try_from(n).ok()));
        let same = sizes.clone().eq(tensor.dims.iter().map(|&d| Some(d)));
        if !same || tensor.dtype != *dtype {
            let sizes: Vec<_> = sizes.map(Option::unwrap_or_default).collect();
            let Tensor { dtype: given, dims, .. } = tensor;
            let message =
                format!("`{name}` is {given}{dims:?}, and the graph has {dtype}{sizes:?}");
            return Err(Error::user(message));
        }
    }
    Ok(())
}

/// A run on the processor.
#[cfg(feature = "cpu")]
pub(crate) fn run_cpu(call: &Call<'_>) -> Result<()> {
    use tilewright::{Compiled, Compiler, Session};
    use tilewright_data::{Bytes, Lent};

    static COMPILER: OnceLock<Mutex<Option<Compiler>>> = OnceLock::new();
    static PROGRAMS: Once<(String, String), (Compiled, Mutex<Session>)> = Once::new();

    struct Borrowed(usize, usize);
    impl AsRef<[u8]> for Borrowed {
        fn as_ref(&self) -> &[u8] {
            // SAFETY: XLA's memory of an operand, `.1` bytes at `.0`, which nobody writes during the call.
            unsafe { std::slice::from_raw_parts(self.0 as *const u8, self.1) }
        }
    }

    let wanted = wanted(call)?;
    let program = PROGRAMS.get(&(wanted.text.into(), wanted.precision.to_string()), || {
        let compiler = {
            let mut known =
                COMPILER.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            match &*known {
                Some(known) => known.clone(),
                None => known.insert(Compiler::new()?).clone(),
            }
        };
        let mut compiler = compiler;
        compiler.precision = wanted.precision;
        let compiled = compiler.compile_graph(parsed(wanted.text)?)?;
        let session = Mutex::new(compiled.session()?);
        Ok((compiled, session))
    })?;
    let (compiled, session) = &*program;
    let plan = compiled.plan();
    check(&wanted.inputs, &plan.inputs)?;
    check(&wanted.outputs, &plan.outputs)?;
    let bytes = |t: &Tensor| {
        let count = t.dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = count.and_then(|n| t.dtype.bytes_for(n));
        bytes.ok_or_else(|| Error::user("a tensor that is too large"))
    };
    let input = |t: &Tensor| {
        let memory = match bytes(t)? {
            0 => Bytes::zeroed(0),
            n => Bytes::Foreign(Arc::new(Borrowed(t.address, n))),
        };
        tilewright::Tensor::new(t.dtype, t.dims.clone(), memory)
    };
    let output = |t: &Tensor| {
        let memory = match bytes(t)? {
            0 => Bytes::zeroed(0),
            // SAFETY: XLA's memory of a result, of this size, which only this call knows.
            n => Bytes::Lent(Arc::new(unsafe { Lent::new(t.address as *mut u8, n) })),
        };
        tilewright::Tensor::new(t.dtype, t.dims.clone(), memory)
    };
    let inputs: Vec<_> = wanted.inputs.iter().map(input).collect::<Result<_>>()?;
    let mut outputs: Vec<_> = wanted.outputs.iter().map(output).collect::<Result<_>>()?;
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    session.run_sized(&Env::new(), &inputs, &mut outputs, None)
}

/// A run on the processor.
#[cfg(not(feature = "cpu"))]
pub(crate) fn run_cpu(_: &Call<'_>) -> Result<()> {
    Err(Error::unsupported("this build has no code for processors"))
}

/// A program on a GPU.
struct Program {
    direct: Direct,
    fitted: Arc<Fitted>,
    room: Mutex<Room>,
    /// Memory of recorded runs, by the address of their first result: a command buffer may run calls side by side, and two
    /// that write to one place are never beside each other. Looked up only, never iterated.
    recorded: Mutex<HashMap<u64, Room>>,
}

pub(crate) fn device(ordinal: u32) -> Result<Arc<GpuDevice>> {
    static DEVICES: Once<u32, GpuDevice> = Once::new();
    let cache = tilewright::cache_dir();
    DEVICES.get(&ordinal, || GpuDevice::open(ordinal, cache.as_deref()))
}

/// The program of a text on a device, compiled when it is first asked for.
fn program(text: &str, precision: Precision, ordinal: u32) -> Result<Arc<Program>> {
    static PROGRAMS: Once<(String, String, u32), Program> = Once::new();
    PROGRAMS.get(&(text.to_string(), precision.to_string(), ordinal), || {
        let device = device(ordinal)?;
        let mut compiler = GpuCompiler::new(device.machine().clone());
        compiler.precision = precision;
        let direct = device.direct(&compiler.plan(parsed(text)?)?)?;
        let fitted = direct.fit(&[])?;
        let room = Mutex::new(device.room(&fitted)?);
        Ok(Program { direct, fitted, room, recorded: Mutex::default() })
    })
}

/// Compiles a call's program before it runs, or is recorded: while a stream records, nothing may be compiled.
pub(crate) fn prepare_cuda(call: &Call<'_>) -> Result<()> {
    let (text, precision) = named(call)?;
    program(text, precision, call.ordinal()?).map(|_| ())
}

/// A run on a GPU, in the call's stream.
pub(crate) fn run_cuda(call: &Call<'_>) -> Result<()> {
    let wanted = wanted(call)?;
    let ordinal = call.ordinal()?;
    let (device, program) = (device(ordinal)?, program(wanted.text, wanted.precision, ordinal)?);
    let plan = program.direct.plan();
    check(&wanted.inputs, &plan.inputs)?;
    check(&wanted.outputs, &plan.outputs)?;
    // XLA places what it allocates on a GPU at multiples of 256 bytes.
    let addresses = |tensors: &[Tensor]| -> Result<Vec<u64>> {
        let mut all = tensors.iter().map(|t| t.address as u64);
        if let Some(odd) = all.clone().find(|a| a % 256 != 0) {
            return Err(Error::unsupported(format!(
                "a tensor at {odd:#x}, not aligned to 256 bytes"
            )));
        }
        Ok(all.by_ref().collect())
    };
    let (inputs, outputs) = (addresses(&wanted.inputs)?, addresses(&wanted.outputs)?);
    // SAFETY: XLA's stream, of the primary context of its device, which outlives the call's work.
    let stream = unsafe { Stream::from_raw(device.gpu(), call.stream()?) };
    let mut alone = program.room.lock().unwrap_or_else(PoisonError::into_inner);
    let mut recorded = program.recorded.lock().unwrap_or_else(PoisonError::into_inner);
    let room = match outputs.first() {
        Some(&first) if program.fitted.scratch_bytes() > 0 && stream.is_capturing()? => {
            match recorded.entry(first) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => place.insert(device.room(&program.fitted)?),
            }
        }
        _ => &mut *alone,
    };
    // SAFETY: XLA's tensors, of the plan's sizes (`check`) and aligned as promised above; XLA keeps them for the
    // work in its stream, and gives results memory of their own. Recorded runs have memory of their own, too, and programs
    // are never dropped.
    unsafe { room.replay(&program.fitted, &inputs, &outputs, &stream) }
}
