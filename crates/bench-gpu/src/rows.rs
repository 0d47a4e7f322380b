//! Kernels along rows, elementwise kernels and reductions: what is measured, with which tensors, and what is right.
//!
//! A [`RowCase`] is a line of `bench/rows_shapes.txt`. Its tensors come in several [`Sets`], so that caches are cold:
//! together they are more than five times the second-level cache. Results are compared with float64 on sampled
//! rows, worked out on the host from the tensors as they lie on the device.

use crate::case::Place;
use crate::support::{Support, relative_error};
use std::cell::RefCell;
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Buffer, GraphExec, Stream};
use tilewright_data::{from_f64, read_f64};
use tilewright_device::Arch;
use tilewright_device::Program;
use tilewright_kernels::gemm::Order;
use tilewright_kernels::map::{MapSpec, Varies};
use tilewright_kernels::reduce::{Over, ReduceSpec};
use tilewright_kernels::rows::{RowOp, RowSpec};
use tilewright_launch::{BoundKernel, Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_tile::{Access, Kernel};

/// The sets together are this many times the second-level cache.
const CACHES: usize = 5;
/// At most this many sets.
const SETS_MAX: usize = 256;
/// Rows (or columns) of a result that are compared with float64.
const SAMPLES: usize = 6;

/// What is computed.
#[derive(Clone, Debug)]
enum Work {
    Row(RowSpec),
    Map(MapSpec),
    Reduce(ReduceSpec),
}

/// A line of the list.
#[derive(Clone, Debug)]
pub struct RowCase {
    /// The operation as it is written.
    pub name: String,
    /// Type of the tensors.
    pub dtype: DType,
    /// Rows and columns.
    pub shape: (i64, i64),
    work: Work,
    env: Env,
    steps: Vec<(Kernel, GpuSchedule)>,
}

/// Reads a list of cases; `#` begins a comment.
///
/// # Errors
/// The user's, with the line.
pub fn read_list(name: &str, text: &str) -> Result<Vec<RowCase>> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, l)| !l.trim().is_empty() && !l.trim().starts_with('#'));
    lines
        .map(|(number, line)| {
            RowCase::parse(line).map_err(|e| e.with_context(format!("{name}, line {}", number + 1)))
        })
        .collect()
}

impl RowCase {
    fn parse(line: &str) -> Result<RowCase> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, dtype, m, n] = words.as_slice() else {
            return Err(Error::user(format!("`{line}` is not: operation, type, rows, columns")));
        };
        let dtype: DType =
            dtype.parse().map_err(|_| Error::user(format!("there is no type `{dtype}`")))?;
        let size = |text: &str| match text.parse::<i64>() {
            Ok(v) if (1..=i64::from(i32::MAX)).contains(&v) => Ok(v),
            _ => Err(Error::user(format!("`{text}` is no size"))),
        };
        let (m, n) = (size(m)?, size(n)?);
        let (plain, residual) = match name.strip_suffix("+r") {
            Some(plain) => (plain, true),
            None => (*name, false),
        };
        let row = |op| Work::Row(RowSpec { op, dtype, residual });
        let sum = |over| Work::Reduce(ReduceSpec::sum(over, dtype));
        let work = match plain {
            "softmax" => row(RowOp::Softmax),
            "logsoftmax" => row(RowOp::LogSoftmax),
            "layernorm" => row(RowOp::LayerNorm { eps: 1e-5 }),
            "rmsnorm" => row(RowOp::RmsNorm { eps: 1e-6 }),
            "copy" => Work::Map(MapSpec::copy(dtype, dtype)),
            "transpose" => Work::Map(MapSpec { transposed: true, ..MapSpec::copy(dtype, dtype) }),
            "biasgelu" => Work::Map(MapSpec::bias_gelu(dtype)),
            "swiglu" => Work::Map(MapSpec::swiglu(dtype)),
            "fused" => Work::Map(MapSpec::scale_shift_relu_add(dtype)),
            "sumall" => sum(Over::All),
            "sumrows" => sum(Over::Rows),
            _ => return Err(Error::user(format!("there is no operation `{name}`"))),
        };
        let mut env = Env::new();
        let leading = if plain == "transpose" { m } else { n };
        for (name, v) in [("M", m), ("N", n), ("ldx", n), ("ldy", n), ("ld0", leading), ("ld1", n)]
        {
            env.insert(name.into(), v);
        }
        if plain == "sumall" {
            let all = m.checked_mul(n).filter(|v| *v <= i64::from(i32::MAX));
            env.insert("N".into(), all.ok_or_else(|| Error::user("too many elements"))?);
        }
        let size = |name: &str| env.get(name).copied();
        let steps = match &work {
            Work::Row(spec) => vec![spec.kernel("rows", Arch::Sm90a, &size)?],
            Work::Map(spec) => vec![spec.kernel("map", Arch::Sm90a, &size)?],
            Work::Reduce(spec) => {
                let plan = spec.plan(Arch::Sm90a, &size)?;
                env.insert("P".into(), plan.parts_count);
                env.insert("C".into(), plan.pieces);
                std::iter::once(plan.parts).chain(plan.finish).collect()
            }
        };
        Ok(RowCase { name: (*name).into(), dtype, shape: (m, n), work, env, steps })
    }

    /// The schedules, in a line.
    pub fn plan(&self) -> String {
        let all: Vec<String> = self.steps.iter().map(|(_, s)| s.lines_text()).collect();
        all.join("; ")
    }

    /// Name, length in elements and type of every tensor, and whether it is given.
    fn tensors(&self) -> Result<Vec<(String, usize, DType, bool)>> {
        let mut out: Vec<(String, usize, DType, bool)> = Vec::new();
        for (kernel, _) in &self.steps {
            for (_, p) in kernel.params.iter() {
                let elements = p.layout.alloc_elements().eval(&self.env);
                let elements =
                    elements.ok_or_else(|| Error::bug("a size without a value"))? as usize;
                if !out.iter().any(|(name, ..)| *name == p.name.as_ref()) {
                    out.push((p.name.to_string(), elements, p.dtype, p.access == Access::In));
                }
            }
        }
        Ok(out)
    }

    /// Bytes that must be read and written: every tensor once, but for partial results.
    pub fn bytes(&self) -> usize {
        let tensors = self.tensors().unwrap_or_default();
        let real = tensors.iter().filter(|(name, ..)| name != "P");
        real.map(|(_, n, dtype, _)| n * dtype.size()).sum()
    }
}

/// Tensors of a case by name, several times.
#[derive(Debug)]
pub struct Sets {
    sets: Vec<BTreeMap<String, Buffer>>,
}

impl Sets {
    /// Allocates and fills enough of them.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(stream: &Stream, support: &Support, case: &RowCase) -> Result<Sets> {
        let tensors = case.tensors()?;
        let bytes = case.bytes().max(1);
        let l2 = stream.gpu().properties().l2_bytes as usize;
        let count = (CACHES * l2).div_ceil(bytes).clamp(1, SETS_MAX);
        let mut sets = Vec::new();
        for index in 0..count {
            let mut set = BTreeMap::new();
            for (at, (name, elements, dtype, given)) in tensors.iter().enumerate() {
                let buffer = stream.alloc((elements * dtype.size()).max(16))?;
                if *given {
                    let place = Place::dense(*dtype, Order::Row, 1, *elements as u64, 1);
                    support.fill(stream, &buffer, &place, (index * 8 + at) as u64 + 1)?;
                } else {
                    buffer.poison(stream)?;
                }
                set.insert(name.clone(), buffer);
            }
            sets.push(set);
        }
        stream.synchronize()?;
        Ok(Sets { sets })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.sets.len()
    }
}

/// A case's kernels bound to every set, recorded as one graph.
#[derive(Debug)]
pub struct Recorded<'a> {
    graph: GraphExec,
    _bound: Vec<BoundKernel>,
    _sets: &'a Sets,
}

impl<'a> Recorded<'a> {
    /// Loads and records.
    ///
    /// # Errors
    /// What cannot be lowered, compiled or started.
    pub fn new(
        stream: &Stream,
        loader: &Loader,
        case: &RowCase,
        sets: &'a Sets,
    ) -> Result<Recorded<'a>> {
        let mut bound = Vec::new();
        for set in &sets.sets {
            for (kernel, schedule) in &case.steps {
                let operands: Result<Vec<Operand>> = kernel
                    .params
                    .iter()
                    .map(|(_, p)| {
                        let buffer = set.get(p.name.as_ref());
                        let buffer = buffer.ok_or_else(|| Error::bug("a tensor is missing"))?;
                        Ok(Operand { address: buffer.address(), bytes: buffer.len() as u64 })
                    })
                    .collect();
                let loaded = loader.load(&lower(kernel, schedule)?)?;
                bound.push(loaded.bind(&case.env, &operands?)?);
            }
        }
        let record = |stream: &Stream| {
            // SAFETY: the sets are borrowed as long as the recording is there, and only this stream uses them.
            bound.iter().try_for_each(|b| unsafe { b.launch(stream) })
        };
        // A first run outside a recording: kernels are loaded when they are first used.
        record(stream)?;
        stream.synchronize()?;
        let graph = stream.capture(record)?.instantiate()?;
        Ok(Recorded { graph, _bound: bound, _sets: sets })
    }

    /// Runs every set once.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the kernels and the sets that were recorded are there (`Recorded::new`).
        unsafe { self.graph.launch(stream) }
    }
}

/// A tensor whose elements come to the host in pages, when they are first asked for.
struct Host<'a> {
    stream: &'a Stream,
    buffer: &'a Buffer,
    dtype: DType,
    page_bytes: usize,
    pages: RefCell<Vec<Option<Vec<u8>>>>,
    /// What went wrong first.
    failed: RefCell<Option<Error>>,
}

/// Bytes of a page, unless everything is asked for.
const PAGE_BYTES: usize = 256 << 10;

impl<'a> Host<'a> {
    fn new(stream: &'a Stream, buffer: &'a Buffer, dtype: DType, whole: bool) -> Host<'a> {
        let page_bytes = if whole { buffer.len().max(1) } else { PAGE_BYTES };
        let pages = RefCell::new(vec![None; buffer.len().div_ceil(page_bytes)]);
        Host { stream, buffer, dtype, page_bytes, pages, failed: RefCell::new(None) }
    }

    fn read(&self, page: usize) -> Result<Vec<u8>> {
        let from = page * self.page_bytes;
        let mut bytes = vec![0; self.page_bytes.min(self.buffer.len().saturating_sub(from))];
        self.buffer.read_at(self.stream, from, &mut bytes)?;
        Ok(bytes)
    }

    /// An element in float64; NaN for what cannot be read.
    fn at(&self, i: usize) -> f64 {
        let each = self.page_bytes / self.dtype.size();
        let mut pages = self.pages.borrow_mut();
        let Some(page) = pages.get_mut(i / each) else { return f64::NAN };
        if page.is_none() {
            match self.read(i / each) {
                Ok(bytes) => *page = Some(bytes),
                Err(error) => {
                    self.failed.borrow_mut().get_or_insert(error);
                }
            }
        }
        page.as_ref().map_or(f64::NAN, |bytes| read_f64(self.dtype, bytes, i % each))
    }
}

/// The largest error of the sampled rows of a set's results, relative to float64 in the Euclidean norm.
///
/// # Errors
/// The driver's.
pub fn error(stream: &Stream, case: &RowCase, sets: &Sets, set: usize) -> Result<f64> {
    // Sums need every element, rows only the sampled ones.
    let whole = matches!(case.work, Work::Reduce(_));
    let mut host = BTreeMap::new();
    for (name, _, dtype, _) in case.tensors()? {
        let buffer = sets.sets.get(set).and_then(|s| s.get(&name));
        let buffer = buffer.ok_or_else(|| Error::bug("a tensor is missing"))?;
        host.insert(name, Host::new(stream, buffer, dtype, whole));
    }
    let tensor = |name: &str| host.get(name).ok_or_else(|| Error::bug(format!("no {name}")));
    let (m, n) = (case.shape.0 as usize, case.shape.1 as usize);
    let y = tensor("Y")?;
    let mut worst: f64 = 0.0;
    let sampled = |all: usize| {
        let count = all.min(SAMPLES);
        (0..count).map(move |i| if count == 1 { 0 } else { i * (all - 1) / (count - 1) })
    };
    match &case.work {
        Work::Row(spec) => {
            for i in sampled(m) {
                let mut x: Vec<f64> =
                    (0..n).map(|j| tensor("X").map_or(0.0, |x| x.at(i * n + j))).collect();
                if spec.residual {
                    let r = tensor("R")?;
                    for (j, x) in x.iter_mut().enumerate() {
                        *x = rounded(case.dtype, *x + r.at(i * n + j));
                    }
                    let h = tensor("H")?;
                    let got: Vec<f64> = (0..n).map(|j| h.at(i * n + j)).collect();
                    worst = worst.max(relative_error(&got, &x));
                }
                let vector = |name: &str| -> Vec<f64> {
                    tensor(name).map_or(Vec::new(), |t| (0..n).map(|j| t.at(j)).collect())
                };
                let want = exact_row(&spec.op, &x, &vector("scale"), &vector("shift"));
                let got: Vec<f64> = (0..n).map(|j| y.at(i * n + j)).collect();
                worst = worst.max(relative_error(&got, &want));
            }
        }
        Work::Map(spec) => {
            for i in sampled(m) {
                let mut want = Vec::with_capacity(n);
                for j in 0..n {
                    let mut args = Vec::new();
                    for (at, varies) in spec.operands.iter().enumerate() {
                        let place = match varies {
                            Varies::Both if spec.transposed => j * m + i,
                            Varies::Both => i * n + j,
                            Varies::Cols => j,
                            Varies::Rows => i,
                        };
                        args.push(tensor(&format!("X{at}"))?.at(place));
                    }
                    want.push(spec.func.eval_f64(&args));
                }
                let got: Vec<f64> = (0..n).map(|j| y.at(i * n + j)).collect();
                worst = worst.max(relative_error(&got, &want));
            }
        }
        Work::Reduce(spec) => {
            let x = tensor("X")?;
            // Sums of numbers of both signs: the error is relative to the sum of magnitudes.
            let sums = |list: &mut dyn Iterator<Item = f64>| {
                list.fold((0.0, 0.0), |(sum, size): (f64, f64), v| (sum + v, size + v.abs()))
            };
            let columns: Vec<usize> = match spec.over {
                Over::All => vec![0],
                Over::Rows => sampled(n).collect(),
            };
            for j in columns {
                let (sum, size) = match spec.over {
                    Over::All => sums(&mut (0..m * n).map(|i| x.at(i))),
                    Over::Rows => sums(&mut (0..m).map(|i| x.at(i * n + j))),
                };
                let apart = (y.at(j) - sum).abs() / size.max(f64::MIN_POSITIVE);
                worst = worst.max(if apart.is_nan() { f64::INFINITY } else { apart });
            }
        }
    }
    for tensor in host.into_values() {
        if let Some(error) = tensor.failed.into_inner() {
            return Err(error);
        }
    }
    Ok(worst)
}

fn rounded(dtype: DType, value: f64) -> f64 {
    let mut bytes = [0u8; 8];
    from_f64(dtype, &mut bytes, 0, value);
    read_f64(dtype, &bytes, 0)
}

/// A row's result in float64.
fn exact_row(op: &RowOp, x: &[f64], scale: &[f64], shift: &[f64]) -> Vec<f64> {
    let n = x.len() as f64;
    let factor = |list: &[f64], j: usize| list.get(j).copied().unwrap_or(1.0);
    match op {
        RowOp::Softmax | RowOp::LogSoftmax => {
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
            let log = matches!(op, RowOp::LogSoftmax);
            let one = |v: &f64| if log { v - max - sum.ln() } else { (v - max).exp() / sum };
            x.iter().map(one).collect()
        }
        RowOp::LayerNorm { eps } => {
            let mean = x.iter().sum::<f64>() / n;
            let var = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
            let inverse = 1.0 / (var + eps).sqrt();
            let one = |(j, v): (usize, &f64)| {
                (v - mean) * inverse * factor(scale, j) + shift.get(j).copied().unwrap_or(0.0)
            };
            x.iter().enumerate().map(one).collect()
        }
        RowOp::RmsNorm { eps } => {
            let inverse = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / n + eps).sqrt();
            x.iter().enumerate().map(|(j, v)| v * inverse * factor(scale, j)).collect()
        }
    }
}

impl RowCase {
    /// Its device programs, without those that cannot be lowered.
    pub fn programs(&self) -> impl Iterator<Item = Program> + '_ {
        self.steps.iter().filter_map(|(kernel, schedule)| lower(kernel, schedule).ok())
    }

    /// The error that a right result may have: a few roundings of the results' type.
    pub fn error_max(&self) -> f64 {
        match (&self.work, self.dtype) {
            (Work::Reduce(_), _) | (_, DType::F32) => 4e-6,
            (_, DType::F16) => 6e-4,
            _ => 4e-3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_shapes_is_read_and_every_case_has_a_program() {
        let text = include_str!("../../../bench/rows_shapes.txt");
        let cases = read_list("rows_shapes.txt", text).unwrap();
        assert!(cases.len() > 30);
        for case in &cases {
            assert!(case.bytes() > 0);
            for (kernel, schedule) in &case.steps {
                let program =
                    lower(kernel, schedule).unwrap_or_else(|e| panic!("{}: {e}", case.name));
                tilewright_device::verify(&program).unwrap();
            }
        }
        assert!(read_list("x", "softmax bf16 3").is_err());
        assert!(read_list("x", "jump bf16 3 4").is_err());
    }

    #[test]
    fn rows_in_float64() {
        let y = exact_row(&RowOp::Softmax, &[0.0, 0.0], &[], &[]);
        assert_eq!(y, [0.5, 0.5]);
        let y = exact_row(&RowOp::LayerNorm { eps: 0.0 }, &[1.0, 3.0], &[2.0, 2.0], &[1.0, 1.0]);
        assert_eq!(y, [-1.0, 3.0]);
        let y = exact_row(&RowOp::RmsNorm { eps: 0.0 }, &[3.0, 3.0], &[1.0, 2.0], &[]);
        assert_eq!(y, [1.0, 2.0]);
    }
}
