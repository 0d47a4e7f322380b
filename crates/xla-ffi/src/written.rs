//! Kernels of the operator pack that are written by hand, on the tensors of a call.
//!
//! The attribute `kernel` names one, and its numbers: `adamw dtype=bf16 tensors=3 masters=1 beta1=0.9 ...`. Operands and results:
//!
//! | kernel | operands | results |
//! |---|---|---|
//! | `adamw`, `lion` | number of the step, rate, factor of gradients (one `f32` each), then lists: weights, gradients, first moments, second moments (`adamw`), masters (if there are) | the lists but gradients, in the memory of their operands |
//! | `bags` | the table, row numbers and offsets (`i32`), weights (if there are), zeros like the next | bags, which bag each position is in (in the memory of the zeros), how many rows each counts, where maxima came from |
//! | `bags_table` | the gradient of the bags, row numbers in order, where each was, weights (if there are), the last three of `bags`, zeros | the gradient of the table, in the memory of the zeros |
//! | `bags_weights` | the gradient of the bags, the table, row numbers, which bag each is in | the gradient of the weights |
//! | `dropout` | operand, key (`u32[2]`, the lower word first), a residual (if there is one) | one like the operand |

use crate::frame::{Call, Tensor};
use crate::programs::{Once, device};
use std::fmt::Debug;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use tilewright::gpu::Stream;
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Function, LaunchShape, Nvrtc};
use tilewright_torch_ops::plain::{BagsPart, Entry, Kernel, Mode, Numbers, Rule, Work};

/// The text of a call: a name, and numbers by name.
struct Words<'a> {
    name: &'a str,
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn of(call: &Call<'a>) -> Result<Words<'a>> {
        let missing = || Error::user("a call without the attribute `kernel`");
        let text = call.text("kernel")?.ok_or_else(missing)?;
        let (name, rest) = text.split_once(' ').unwrap_or((text, ""));
        Ok(Words { name, rest })
    }

    /// A number by its name.
    fn get<T: FromStr<Err: Debug>>(&self, name: &str) -> Result<T> {
        let mut all = self.rest.split(' ').filter_map(|word| word.split_once('='));
        let found = all.find(|(given, _)| *given == name).and_then(|(_, value)| value.parse().ok());
        found.ok_or_else(|| Error::user(format!("the kernel `{}` needs `{name}`", self.name)))
    }
}

/// Takes tensors of a call one after the other, and refuses those that are not what a kernel takes.
struct Taken<'a>(std::slice::Iter<'a, Tensor>);

impl Taken<'_> {
    fn next(&mut self, dtype: DType, elements: Option<i64>) -> Result<(u64, i64)> {
        let Some(tensor) = self.0.next() else { return Err(Error::user("too few tensors")) };
        let count = tensor.dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
        let count = count.and_then(|n| i64::try_from(n).ok());
        let count = count.ok_or_else(|| Error::user("a tensor that is too large"))?;
        if tensor.dtype != dtype || elements.is_some_and(|wanted| wanted != count) {
            let Tensor { dtype: given, dims, .. } = tensor;
            let wanted = elements.map_or(String::new(), |n| format!(" of {n} elements"));
            return Err(Error::user(format!("a tensor {given}{dims:?} where {dtype}{wanted} is")));
        }
        Ok((tensor.address as u64, count))
    }

    fn list(&mut self, dtype: DType, sizes: &[i64]) -> Result<Vec<u64>> {
        sizes.iter().map(|&n| Ok(self.next(dtype, Some(n))?.0)).collect()
    }

    fn end(mut self) -> Result<()> {
        match self.0.next() {
            None => Ok(()),
            Some(_) => Err(Error::user("too many tensors")),
        }
    }
}

/// What sums are kept in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The work of a call on these tensors.
fn work(words: &Words<'_>, inputs: &[Tensor], outputs: &[Tensor]) -> Result<Work> {
    let dtype = words.get::<DType>("dtype")?;
    let (mut given, mut results) = (Taken(inputs.iter()), Taken(outputs.iter()));
    let work = match words.name {
        "adamw" | "lion" => {
            let rule = if words.name == "lion" { Rule::Lion } else { Rule::AdamW };
            let numbers = numbers(words, rule)?;
            let masters = words.get::<u8>("masters")? != 0;
            let tensors = words.get::<usize>("tensors")?;
            let mut one = || Ok::<_, Error>(given.next(DType::F32, Some(1))?.0);
            let (count, rate, factor) = (one()?, one()?, one()?);
            let weights = (0..tensors).map(|_| given.next(dtype, None));
            let weights = weights.collect::<Result<Vec<_>>>()?;
            let sizes: Vec<i64> = weights.iter().map(|w| w.1).collect();
            let weights: Vec<u64> = weights.into_iter().map(|w| w.0).collect();
            let gradients = given.list(dtype, &sizes)?;
            let nothing = vec![0; tensors];
            let first = given.list(wide(dtype), &sizes)?;
            let second = match rule {
                Rule::AdamW => given.list(wide(dtype), &sizes)?,
                Rule::Lion => nothing.clone(),
            };
            let masters_at =
                if masters { given.list(wide(dtype), &sizes)? } else { nothing.clone() };
            let mut written = vec![(&weights, dtype), (&first, wide(dtype))];
            if rule == Rule::AdamW {
                written.push((&second, wide(dtype)));
            }
            if masters {
                written.push((&masters_at, wide(dtype)));
            }
            for (list, of) in written {
                if results.list(of, &sizes)? != *list {
                    return Err(Error::bug("a result that is not in the memory of its operand"));
                }
            }
            let entries = (0..tensors).map(|i| Entry {
                places: [weights[i], gradients[i], first[i], second[i], masters_at[i], 0],
                elements: sizes[i],
            });
            let entries = entries.collect();
            Work::Step { rule, dtype, numbers, count, rate, factor, masters, entries }
        }
        "dropout" => {
            let (x, elements) = given.next(dtype, None)?;
            let (key, _) = given.next(DType::U32, Some(2))?;
            let residual = match words.get::<u8>("residual")? {
                0 => 0,
                _ => given.next(dtype, Some(elements))?.0,
            };
            let (y, _) = results.next(dtype, Some(elements))?;
            let share = words.get("share")?;
            Work::Dropout { dtype, share, places: [x, residual, y, key], elements }
        }
        "bags" | "bags_table" | "bags_weights" => bags(words, dtype, &mut given, &mut results)?,
        other => return Err(Error::user(format!("there is no kernel `{other}`"))),
    };
    given.end()?;
    results.end()?;
    work.check()?;
    Ok(work)
}

/// Bags of these sizes, at no addresses.
fn bags_of(words: &Words<'_>, dtype: DType) -> Result<(BagsPart, Work)> {
    let part = match words.name {
        "bags" => BagsPart::Forward,
        "bags_table" => BagsPart::Table,
        _ => BagsPart::Weights,
    };
    let work = Work::Bags {
        part,
        dtype,
        mode: Mode::of(words.get("mode")?)?,
        places: Vec::new(),
        rows: words.get("rows")?,
        columns: words.get("columns")?,
        positions: words.get("positions")?,
        bags: words.get("bags")?,
        padding: words.get("padding")?,
    };
    work.check()?;
    Ok((part, work))
}

fn bags(
    words: &Words<'_>,
    dtype: DType,
    given: &mut Taken<'_>,
    results: &mut Taken<'_>,
) -> Result<Work> {
    let (part, mut work) = bags_of(words, dtype)?;
    let Work::Bags { mode, places, rows, columns, positions, bags, .. } = &mut work else {
        return Err(Error::bug("no bags"));
    };
    let (positions, bags) = (*positions, *bags);
    let size = |n: i64| n.checked_mul(*columns).ok_or_else(|| Error::user("a table too large"));
    let (whole_table, all) = (size(*rows)?, size(bags)?);
    let maxima = if *mode == Mode::Max { all } else { 0 };
    let weighted = words.get::<u8>("weights")? != 0;
    let mut take = |dtype, n| Ok::<_, Error>(given.next(dtype, Some(n))?.0);
    let mut give = |dtype, n| Ok::<_, Error>(results.next(dtype, Some(n))?.0);
    let short = DType::I32;
    *places = match part {
        BagsPart::Forward => {
            let table = take(dtype, whole_table)?;
            let (indices, offsets) = (take(short, positions)?, take(short, bags)?);
            let weights = if weighted { take(dtype, positions)? } else { 0 };
            let zeros = take(short, positions)?;
            let (y, bag_of) = (give(dtype, all)?, give(short, positions)?);
            if bag_of != zeros {
                return Err(Error::bug("a result that is not in the memory of its operand"));
            }
            let (count, place) = (give(short, bags)?, give(short, maxima)?);
            vec![table, indices, offsets, weights, y, bag_of, count, place]
        }
        BagsPart::Table => {
            let dy = take(dtype, all)?;
            let (sorted, position) = (take(short, positions)?, take(short, positions)?);
            let weights = if weighted { take(dtype, positions)? } else { 0 };
            let bag_of = take(short, positions)?;
            let (count, place) = (take(short, bags)?, take(short, maxima)?);
            let (zeros, gradient) = (take(dtype, whole_table)?, give(dtype, whole_table)?);
            if gradient != zeros {
                return Err(Error::bug("a result that is not in the memory of its operand"));
            }
            vec![dy, sorted, position, weights, bag_of, count, place, gradient]
        }
        BagsPart::Weights => {
            let (dy, table) = (take(dtype, all)?, take(dtype, whole_table)?);
            let (indices, bag_of) = (take(short, positions)?, take(short, positions)?);
            vec![dy, table, indices, bag_of, give(dtype, positions)?]
        }
    };
    Ok(work)
}

fn numbers(words: &Words<'_>, rule: Rule) -> Result<Numbers> {
    Ok(Numbers {
        rate: 0.0,
        beta1: words.get("beta1")?,
        beta2: words.get("beta2")?,
        eps: if rule == Rule::AdamW { words.get("eps")? } else { 0.0 },
        decay: words.get("decay")?,
        maximize: words.get::<u8>("maximize")? != 0,
    })
}

/// The same work without tensors: its kernels are those of the work.
fn without_tensors(words: &Words<'_>) -> Result<Work> {
    let dtype = words.get::<DType>("dtype")?;
    match words.name {
        "adamw" | "lion" => {
            let rule = if words.name == "lion" { Rule::Lion } else { Rule::AdamW };
            let (numbers, masters) = (numbers(words, rule)?, words.get::<u8>("masters")? != 0);
            let entry = Entry { places: [0; 6], elements: 1 };
            let entries = vec![entry; words.get("tensors")?];
            Ok(Work::Step { rule, dtype, numbers, count: 0, rate: 0, factor: 0, masters, entries })
        }
        "bags" | "bags_table" | "bags_weights" => Ok(bags_of(words, dtype)?.1),
        _ => Ok(Work::Dropout { dtype, share: 0.0, places: [0; 4], elements: 1 }),
    }
}

/// A run on the processor.
pub(crate) fn run_cpu(call: &Call<'_>) -> Result<()> {
    let work = work(&Words::of(call)?, &call.inputs()?, &call.outputs()?)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: `work` has seen that XLA's tensors are of these types and sizes; XLA keeps them for the call. Results that are written
    // lie apart from everything else, or are the memory of their own operand, which is not read as another one.
    unsafe { work.on_host(threads) }
}

fn function(kernel: &Kernel, ordinal: u32) -> Result<Arc<Function>> {
    static KNOWN: Once<(Kernel, u32), Function> = Once::new();
    static NVRTC: OnceLock<Result<Nvrtc>> = OnceLock::new();
    KNOWN.get(&(*kernel, ordinal), || {
        let device = device(ordinal)?;
        let folder = tilewright::cache_dir().map(|f| f.join("cuda"));
        let nvrtc = NVRTC.get_or_init(|| Nvrtc::open(folder.as_deref()));
        let nvrtc = nvrtc.as_ref().map_err(Clone::clone)?;
        let gpu = device.gpu();
        gpu.load(&nvrtc.compile(&kernel.request(gpu.arch()))?)?.function(kernel.entry)
    })
}

/// Compiles a call's kernels before it runs, or is recorded: while a stream records, nothing may be compiled.
pub(crate) fn prepare_cuda(call: &Call<'_>) -> Result<()> {
    let ordinal = call.ordinal()?;
    let launches = without_tensors(&Words::of(call)?)?.launches()?;
    launches.iter().try_for_each(|launch| function(&launch.kernel, ordinal).map(|_| ()))
}

/// A run on a GPU, in the call's stream.
pub(crate) fn run_cuda(call: &Call<'_>) -> Result<()> {
    let ordinal = call.ordinal()?;
    let device = device(ordinal)?;
    let work = work(&Words::of(call)?, &call.inputs()?, &call.outputs()?)?;
    // SAFETY: XLA's stream, of the primary context of its device, which outlives the call's work.
    let stream = unsafe { Stream::from_raw(device.gpu(), call.stream()?) };
    for launch in work.launches()? {
        if launch.blocks == 0 {
            continue;
        }
        let blocks = i32::try_from(launch.blocks).ok().and_then(|b| u32::try_from(b).ok());
        let blocks =
            blocks.ok_or_else(|| Error::unsupported("a launch of more blocks than a grid has"))?;
        let block = [launch.threads, 1, 1];
        let shape = LaunchShape { grid: [blocks, 1, 1], block, ..LaunchShape::default() };
        let prepared = function(&launch.kernel, ordinal)?.prepare(&shape, &launch.args)?;
        // SAFETY: as in `run_cpu`; XLA keeps its tensors for the work in its stream.
        unsafe { prepared.launch(&stream) }?;
    }
    Ok(())
}
