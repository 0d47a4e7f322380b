//! Steps of AdamW and Lion over many tensors at once, in place, and the norm of many gradients.
//!
//! ```text
//! AdamW:  m = beta1 m + (1 - beta1) g         v = beta2 v + (1 - beta2) g^2
//!         w = w (1 - rate decay) - rate / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//! Lion:   w = w (1 - rate decay) - rate sign(beta1 m + (1 - beta1) g)
//!         m = beta2 m + (1 - beta2) g
//! ```
//!
//! With maxima (AMSGrad) the step divides by the largest `v` so far instead. `g` is the gradient times `factor`, negated to maximise. Moments are `f32` (`f64` for `f64`). Weights of 16 bits may have a wide
//! copy, a master, which is what is updated; they are then its rounding. On a GPU all tensors of a call are one launch (one for
//! every 509). The number `t` of this step, and if wished `rate` and `factor`, are read from the device; so is
//! `found_inf`, of which anything but 0 leaves everything as it is.

use crate::host::{self, Float, Number, with_number};
use crate::tensors::{float, wide};
use crate::written::{Set, Text, element, launch};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Args;
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// What a step does to a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Kingma and Ba's, with decoupled decay.
    AdamW,
    /// Chen et al.'s.
    Lion,
}

/// The numbers of a call.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    /// How large steps are.
    pub rate: f64,
    /// How much stays of the first moment, in `0..1`.
    pub beta1: f64,
    /// How much stays of the second moment, in `0..1`.
    pub beta2: f64,
    /// What is added to the root of the second moment.
    pub eps: f64,
    /// Decay of weights, in steps.
    pub decay: f64,
    /// Whether steps go along gradients, not against them.
    pub maximize: bool,
}

impl Numbers {
    /// Refuses what kernels cannot compute with.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::user(format!("{name} is {beta}; it must be in 0..1")));
            }
        }
        for (name, x) in [("lr", self.rate), ("eps", self.eps), ("weight_decay", self.decay)] {
            if !(x >= 0.0 && x.is_finite()) {
                let message = format!("{name} is {x}; it must be a number of at least 0");
                return Err(Error::user(message));
            }
        }
        Ok(())
    }
}

/// The tensors of a call: one list for each kind, all as long as `weights`, or empty.
struct Tensors {
    dtype: DType,
    device: Device,
    weights: Vec<Tensor>,
    gradients: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    masters: Vec<Tensor>,
    maxima: Vec<Tensor>,
}

/// The tensor in the memory order of another one of the same shape.
fn in_order_of(tensor: Tensor, other: &Tensor) -> Result<Tensor> {
    if tensor.strides() == other.strides() || (tensor.is_contiguous() && other.is_contiguous()) {
        return Ok(tensor);
    }
    let (abi, dtype) = (tensor.abi(), tensor.dtype()?);
    let copy = Tensor::empty_strided(abi, other.sizes(), other.strides(), dtype, other.device())?;
    copy.copy_from(&tensor)?;
    Ok(copy)
}

impl Tensors {
    /// Checks everything that the kernels rely on; `None` where there is nothing to do.
    fn checked(lists: [(&str, Vec<Tensor>); 6], seconds: bool) -> Result<Option<Tensors>> {
        let [(_, weights), (grads, gradients), first, second, masters, maxima] = lists;
        let Some(one) = weights.first() else { return Ok(None) };
        let (dtype, device) = (float("params", one)?, one.device());
        let (some_masters, some_maxima) = (!masters.1.is_empty(), !maxima.1.is_empty());
        for (index, w) in weights.iter().enumerate() {
            if w.dtype()? != dtype || w.device() != device {
                let message = "params have several types or devices; a call takes one of each";
                return Err(Error::user(message));
            }
            if !host::is_dense(w) {
                let message = format!("parameter {index} has gaps in memory or overlaps itself");
                return Err(Error::unsupported(message).with_hint("call .contiguous() on it"));
            }
        }
        let states =
            [(&first, true), (&second, seconds), (&masters, some_masters), (&maxima, some_maxima)];
        for ((name, list), given) in states {
            if !given && list.is_empty() {
                continue;
            }
            if list.len() != weights.len() {
                let message = format!("{} {name} for {} params", list.len(), weights.len());
                return Err(Error::user(message));
            }
            for (index, (t, w)) in list.iter().zip(&weights).enumerate() {
                let order = t.strides() == w.strides() || (t.is_contiguous() && w.is_contiguous());
                let good = t.dtype()? == wide(dtype)
                    && t.device() == device
                    && t.sizes() == w.sizes()
                    && order;
                if !good {
                    let message = format!(
                        "{name}[{index}] is {} of shape {:?} on {:?}; it must be {} and lie like its parameter, of shape {:?} on {device:?}",
                        t.dtype()?,
                        t.sizes(),
                        t.device(),
                        wide(dtype),
                        w.sizes()
                    );
                    return Err(Error::user(message));
                }
            }
        }
        if gradients.len() != weights.len() {
            let message = format!("{} {grads} for {} params", gradients.len(), weights.len());
            return Err(Error::user(message));
        }
        let gradients = gradients.into_iter().zip(&weights).enumerate().map(|(index, (g, w))| {
            if g.sizes() != w.sizes() || g.dtype()? != dtype || g.device() != device {
                return Err(Error::user(format!(
                    "{grads}[{index}] is {} of shape {:?} on {:?}, and its parameter {dtype} of shape {:?} on {device:?}",
                    g.dtype()?,
                    g.sizes(),
                    g.device(),
                    w.sizes()
                )));
            }
            in_order_of(g, w)
        });
        let gradients = gradients.collect::<Result<Vec<_>>>()?;
        let (first, second, masters, maxima) = (first.1, second.1, masters.1, maxima.1);
        Ok(Some(Tensors { dtype, device, weights, gradients, first, second, masters, maxima }))
    }
}

/// A number in a tensor of one element, on the processor.
fn number(name: &str, tensor: &Tensor) -> Result<f64> {
    let one = match tensor.dtype()? {
        DType::F32 => host::read::<f32>(tensor)?.first().map(|x| f64::from(*x)),
        DType::F64 => host::read::<f64>(tensor)?.first().copied(),
        _ => None,
    };
    one.ok_or_else(|| Error::user(format!("{name} must be one number of float32 or float64")))
}

/// Refuses what is not one number of float32 (or float64 where that is allowed) on the device of the parameters.
fn one_number(name: &str, tensor: &Tensor, device: Device, double: bool) -> Result<()> {
    let dtype = tensor.dtype()?;
    let known = dtype == DType::F32 || (double && dtype == DType::F64);
    if tensor.elements() == 1 && known && tensor.device() == device {
        return Ok(());
    }
    Err(Error::user(format!(
        "{name} is {dtype} of shape {:?} on {:?}; it must be one number of float32 on {device:?}",
        tensor.sizes(),
        tensor.device()
    )))
}

/// Numbers that a step may find in tensors on the device of the parameters.
#[derive(Default)]
struct Given {
    /// How many steps this one makes.
    count: Option<Tensor>,
    rate: Option<Tensor>,
    factor: Option<Tensor>,
    found: Option<Tensor>,
}

fn step(
    abi: &'static Abi,
    rule: Rule,
    tensors: &Tensors,
    given: &Given,
    numbers: Numbers,
) -> Result<()> {
    let Given { count, rate, factor, found } = given;
    let [count, rate, factor, found] = [count, rate, factor, found].map(Option::as_ref);
    let value = numbers.rate;
    numbers.check()?;
    for (name, tensor, double) in [
        ("step", count, false),
        ("lr", rate, true),
        ("factor", factor, false),
        ("found_inf", found, false),
    ] {
        if let Some(tensor) = tensor {
            one_number(name, tensor, tensors.device, double)?;
        }
    }
    let Device::Cuda(index) = tensors.device else {
        let Tensors { weights, first, second, masters, maxima, .. } = tensors;
        let written = [weights, first, second, masters, maxima];
        host::distinct(written.into_iter().flatten(), tensors.gradients.iter())?;
        let numbers = Numbers { rate: rate.map_or(Ok(value), |t| number("lr", t))?, ..numbers };
        let count = count.map_or(Ok(1.0), |t| number("step", t))?;
        let factor = factor.map_or(Ok(1.0), |t| number("factor", t))?;
        if found.map_or(Ok(0.0), |t| number("found_inf", t))? != 0.0 {
            return Ok(());
        }
        return with_number!(tensors.dtype, on_host(abi, rule, tensors, count, factor, numbers));
    };
    let at = |t: Option<&Tensor>| t.map_or(Ok(0), Tensor::address);
    let head = Head {
        step: at(count)?,
        rate: at(rate)?,
        factor: at(factor)?,
        found: at(found)?,
        rate_is_double: rate.map(|r| r.dtype()).transpose()? == Some(DType::F64),
        numbers,
    };
    let entry = match rule {
        Rule::AdamW if tensors.maxima.is_empty() => "adamw",
        Rule::AdamW => "amsgrad",
        Rule::Lion => "lion",
    };
    let some = !tensors.masters.is_empty();
    for table in tables(&tensors.entries()?, &head, PIECE)? {
        let [bytes, count] = table_definitions(table.places);
        let set: Set = [element(tensors.dtype)?, bytes, count, ("TW_MASTER", some.into())];
        let args = Args::new().bytes(&table.bytes);
        launch(abi, index, (Text::Optimizers, entry, &set), table.blocks, THREADS, &args)?;
    }
    Ok(())
}

// ---- tables of tensors on a GPU ---------------------------------------------------------------------

/// Threads of a block of `optimizers.cu`.
pub(crate) const THREADS: u32 = 256;
/// Elements that a block steps: 1.24 G parameters took 8.14 ms on an H200 with one piece a block and 8.64 with sixteen, where a piece of
/// two accesses of 16 bytes a thread took 8.30.
pub(crate) const PIECE: i64 = 1024;
/// Bytes of `Entry` and of what is before the entries in `Table`.
const ENTRY_BYTES: u64 = 64;
const HEAD_BYTES: u64 = 120;
/// Tensors in a small table and in the largest that a launch can pass.
const PLACES: [u64; 2] = [64, 509];

/// How `optimizers.cu` is told of tables with so many places.
pub(crate) fn table_definitions(places: u64) -> [(&'static str, u64); 2] {
    [("TW_TABLE_BYTES", HEAD_BYTES + places * ENTRY_BYTES), ("TW_COUNT", places)]
}

/// Where the numbers of a step lie, or 0, and those that are known.
pub(crate) struct Head {
    pub(crate) step: u64,
    pub(crate) rate: u64,
    pub(crate) factor: u64,
    pub(crate) found: u64,
    pub(crate) rate_is_double: bool,
    pub(crate) numbers: Numbers,
}

/// One parameter: addresses of weights, gradients, moments, masters and maxima (0 where there are none), and how many elements
/// each has.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// In the order above.
    pub places: [u64; 6],
    /// Of each.
    pub elements: i64,
}

/// One launch.
pub(crate) struct Table {
    pub(crate) bytes: Vec<u8>,
    pub(crate) places: u64,
    pub(crate) blocks: u64,
}

/// Elements of which a block sums the squares: one block adds up all sums, and a small model wants work for the whole device.
fn summed_at_once(elements: i64) -> i64 {
    let pairs = (elements / (2 * PIECE * 132 * 32)).clamp(1, 8);
    pairs * 2 * PIECE
}

impl Tensors {
    fn entries(&self) -> Result<Vec<Entry>> {
        let of = |(i, weights): (usize, &Tensor)| {
            let at = |list: &[Tensor]| list.get(i).map_or(Ok(0), Tensor::address);
            let places = [
                at(&self.weights)?,
                at(&self.gradients)?,
                at(&self.first)?,
                at(&self.second)?,
                at(&self.masters)?,
                at(&self.maxima)?,
            ];
            Ok(Entry { places, elements: weights.elements() })
        };
        self.weights.iter().enumerate().map(of).collect()
    }
}

/// Launches for these tensors, whose blocks take `chunk` elements each.
pub(crate) fn tables(entries: &[Entry], head: &Head, chunk: i64) -> Result<Vec<Table>> {
    let kept: Vec<&Entry> = entries.iter().filter(|e| e.elements > 0).collect();
    let mut all = Vec::new();
    for part in kept.chunks(PLACES[1] as usize) {
        let places = if part.len() as u64 <= PLACES[0] { PLACES[0] } else { PLACES[1] };
        let size = HEAD_BYTES + places * ENTRY_BYTES;
        let mut bytes = Vec::with_capacity(size as usize);
        let Numbers { rate, beta1, beta2, eps, decay, maximize } = head.numbers;
        for address in [head.step, head.rate, head.factor, head.found] {
            bytes.extend(address.to_le_bytes());
        }
        let numbers =
            [rate, beta1, beta2, 1.0 - beta1, 1.0 - beta2, beta1.ln(), beta2.ln(), eps, decay];
        for number in numbers {
            bytes.extend(number.to_le_bytes());
        }
        let words =
            [u32::from(head.rate_is_double), maximize.into(), chunk as u32, part.len() as u32];
        for word in words {
            bytes.extend(word.to_le_bytes());
        }
        let mut blocks = 0_u64;
        for &&Entry { places, elements } in part {
            for place in places {
                bytes.extend(place.to_le_bytes());
            }
            bytes.extend(elements.to_le_bytes());
            let first_block = u32::try_from(blocks)
                .map_err(|_| Error::unsupported("a model of more than 2^42 parameters"))?;
            bytes.extend(first_block.to_le_bytes());
            let vector = places.iter().all(|place| place.is_multiple_of(16));
            bytes.extend(u32::from(vector).to_le_bytes());
            blocks += elements.cast_unsigned().div_ceil(chunk.cast_unsigned());
        }
        bytes.resize(size as usize, 0);
        all.push(Table { bytes, places, blocks });
    }
    Ok(all)
}

// ---- on the processor -------------------------------------------------------------------------------

/// One tensor, or a stretch of one.
pub(crate) struct Job<'a, T: Number> {
    pub(crate) weights: &'a mut [T],
    pub(crate) gradients: &'a [T],
    pub(crate) first: &'a mut [T::Wide],
    /// Empty for Lion.
    pub(crate) second: &'a mut [T::Wide],
    /// Empty without masters.
    pub(crate) masters: &'a mut [T::Wide],
    /// Of the second moments; empty but for AMSGrad.
    pub(crate) maxima: &'a mut [T::Wide],
}

/// Elements of a job.
const STRETCH: usize = 1 << 16;

#[allow(clippy::mut_from_ref, reason = "tensors are handles; their memory is elsewhere")]
fn on_host<T: Number>(
    abi: &'static Abi,
    rule: Rule,
    tensors: &Tensors,
    count: f64,
    factor: f64,
    numbers: Numbers,
) -> Result<()> {
    fn whole<W: Number>(list: &[Tensor], i: usize) -> Result<&mut [W]> {
        list.get(i).map_or(Ok(&mut []), host::write)
    }
    let mut all = Vec::new();
    for i in 0..tensors.weights.len() {
        all.push(Job {
            weights: host::write::<T>(&tensors.weights[i])?,
            gradients: host::read::<T>(&tensors.gradients[i])?,
            first: whole(&tensors.first, i)?,
            second: whole(&tensors.second, i)?,
            masters: whole(&tensors.masters, i)?,
            maxima: whole(&tensors.maxima, i)?,
        });
    }
    step_on_slices(abi.threads(), rule, all, count, factor, numbers);
    Ok(())
}

/// A step of tensors that lie in memory.
pub(crate) fn step_on_slices<T: Number>(
    threads: usize,
    rule: Rule,
    tensors: Vec<Job<'_, T>>,
    count: f64,
    factor: f64,
    numbers: Numbers,
) {
    let mut jobs = Vec::new();
    let mut elements = 0;
    for Job { weights, gradients, first, second, masters, maxima } in tensors {
        let mut first = first.chunks_mut(STRETCH);
        let mut second = second.chunks_mut(STRETCH);
        let mut masters = masters.chunks_mut(STRETCH);
        let mut maxima = maxima.chunks_mut(STRETCH);
        elements += gradients.len();
        for (weights, gradients) in weights.chunks_mut(STRETCH).zip(gradients.chunks(STRETCH)) {
            jobs.push(Job {
                weights,
                gradients,
                first: first.next().unwrap_or_default(),
                second: second.next().unwrap_or_default(),
                masters: masters.next().unwrap_or_default(),
                maxima: maxima.next().unwrap_or_default(),
            });
        }
    }
    let sign = if numbers.maximize { -factor } else { factor };
    let Numbers { rate, beta1, beta2, eps, decay, .. } = numbers;
    // 1 - beta^t without cancellation.
    let correction = |beta: f64| -(count * beta.ln()).exp_m1();
    let of = T::Wide::of;
    let constants = Constants {
        factor: of(sign),
        beta: [of(beta1), of(beta2)],
        rest: [of(1.0 - beta1), of(1.0 - beta2)],
        keep: of(1.0 - rate * decay),
        rate: of(match rule {
            Rule::AdamW => rate / correction(beta1),
            Rule::Lion => rate,
        }),
        root_scale: of(1.0 / correction(beta2).sqrt()),
        eps: of(eps),
    };
    host::in_parallel(threads, elements, jobs, |job| match rule {
        Rule::AdamW if job.maxima.is_empty() => host::wider(|| adamw(job, &constants)),
        Rule::AdamW => host::wider(|| amsgrad(job, &constants)),
        Rule::Lion => host::wider(|| lion(job, &constants)),
    });
}

struct Constants<W> {
    factor: W,
    beta: [W; 2],
    rest: [W; 2],
    keep: W,
    rate: W,
    root_scale: W,
    eps: W,
}

#[inline(always)]
fn adamw<T: Number>(job: Job<'_, T>, c: &Constants<T::Wide>) {
    let Job { weights, gradients, first, second, masters, .. } = job;
    let update = |w: T::Wide, g: T, m: &mut T::Wide, v: &mut T::Wide| {
        let g = g.wide() * c.factor;
        *m = c.beta[0] * *m + c.rest[0] * g;
        *v = c.beta[1] * *v + c.rest[1] * (g * g);
        w * c.keep - c.rate * (*m / (v.root() * c.root_scale + c.eps))
    };
    let moments = first.iter_mut().zip(second).zip(gradients);
    if masters.is_empty() {
        for (w, ((m, v), g)) in weights.iter_mut().zip(moments) {
            *w = T::narrow(update(w.wide(), *g, m, v));
        }
    } else {
        for ((w, q), ((m, v), g)) in weights.iter_mut().zip(masters).zip(moments) {
            *q = update(*q, *g, m, v);
            *w = T::narrow(*q);
        }
    }
}

/// AdamW that divides by the root of the largest second moment so far.
#[inline(always)]
fn amsgrad<T: Number>(job: Job<'_, T>, c: &Constants<T::Wide>) {
    let Job { weights, gradients, first, second, masters, maxima } = job;
    let moments = first.iter_mut().zip(second).zip(maxima);
    for (i, ((w, g), ((m, v), most))) in weights.iter_mut().zip(gradients).zip(moments).enumerate()
    {
        let g = g.wide() * c.factor;
        *m = c.beta[0] * *m + c.rest[0] * g;
        *v = c.beta[1] * *v + c.rest[1] * (g * g);
        // What is not a number stays, as in PyTorch.
        if *v > *most || v.double().is_nan() {
            *most = *v;
        }
        let master = masters.get_mut(i);
        let old = master.as_ref().map_or(w.wide(), |q| **q);
        let next = old * c.keep - c.rate * (*m / (most.root() * c.root_scale + c.eps));
        if let Some(q) = master {
            *q = next;
        }
        *w = T::narrow(next);
    }
}

#[inline(always)]
fn lion<T: Number>(job: Job<'_, T>, c: &Constants<T::Wide>) {
    let Job { weights, gradients, first, masters, .. } = job;
    let zero = T::Wide::of(0.0);
    let update = |w: T::Wide, g: T, m: &mut T::Wide| {
        let g = g.wide() * c.factor;
        let direction = c.beta[0] * *m + c.rest[0] * g;
        *m = c.beta[1] * *m + c.rest[1] * g;
        let sign = if direction > zero {
            T::Wide::of(1.0)
        } else if direction < zero {
            T::Wide::of(-1.0)
        } else {
            direction
        };
        w * c.keep - c.rate * sign
    };
    let moments = first.iter_mut().zip(gradients);
    if masters.is_empty() {
        for (w, (m, g)) in weights.iter_mut().zip(moments) {
            *w = T::narrow(update(w.wide(), *g, m));
        }
    } else {
        for ((w, q), (m, g)) in weights.iter_mut().zip(masters).zip(moments) {
            *q = update(*q, *g, m);
            *w = T::narrow(*q);
        }
    }
}

// ---- the operators ----------------------------------------------------------------------------------

/// A step of AdamW.
pub(crate) struct AdamW;

impl Operator for AdamW {
    const NAME: &'static str = "adamw_";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("params", Arg::AllWritten),
        ("grads", Arg::Tensors),
        ("exp_avgs", Arg::AllWritten),
        ("exp_avg_sqs", Arg::AllWritten),
        ("masters", Arg::AllWritten),
        ("max_exp_avg_sqs", Arg::AllWritten),
        ("step", Arg::Tensor),
        ("lr_tensor", Arg::Optional),
        ("factor", Arg::Optional),
        ("found_inf", Arg::Optional),
        ("lr", Arg::Float),
        ("beta1", Arg::Float),
        ("beta2", Arg::Float),
        ("eps", Arg::Float),
        ("weight_decay", Arg::Float),
        ("maximize", Arg::Bool),
    ];
    const RETURNS: &'static str = "()";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [
            params,
            grads,
            first,
            second,
            masters,
            maxima,
            count,
            rate,
            factor,
            found,
            numbers @ ..,
        ] = args
        else {
            return Err(Error::bug("arguments"));
        };
        let [lr, beta1, beta2, eps, decay, maximize] = numbers else {
            return Err(Error::bug("arguments"));
        };
        let lists = [
            ("params", params.tensors()?),
            ("grads", grads.tensors()?),
            ("exp_avgs", first.tensors()?),
            ("exp_avg_sqs", second.tensors()?),
            ("masters", masters.tensors()?),
            ("max_exp_avg_sqs", maxima.tensors()?),
        ];
        let numbers = Numbers {
            rate: lr.float()?,
            beta1: beta1.float()?,
            beta2: beta2.float()?,
            eps: eps.float()?,
            decay: decay.float()?,
            maximize: maximize.bool()?,
        };
        let given = Given {
            count: Some(count.tensor()?),
            rate: rate.optional()?,
            factor: factor.optional()?,
            found: found.optional()?,
        };
        let Some(tensors) = Tensors::checked(lists, true)? else { return Ok(Vec::new()) };
        step(abi, Rule::AdamW, &tensors, &given, numbers)?;
        Ok(Vec::new())
    }
}

/// A step of Lion.
pub(crate) struct Lion;

impl Operator for Lion {
    const NAME: &'static str = "lion_";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("params", Arg::AllWritten),
        ("grads", Arg::Tensors),
        ("exp_avgs", Arg::AllWritten),
        ("masters", Arg::AllWritten),
        ("lr_tensor", Arg::Optional),
        ("factor", Arg::Optional),
        ("found_inf", Arg::Optional),
        ("lr", Arg::Float),
        ("beta1", Arg::Float),
        ("beta2", Arg::Float),
        ("weight_decay", Arg::Float),
        ("maximize", Arg::Bool),
    ];
    const RETURNS: &'static str = "()";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [params, grads, first, masters, rate, factor, found, numbers @ ..] = args else {
            return Err(Error::bug("arguments"));
        };
        let [lr, beta1, beta2, decay, maximize] = numbers else {
            return Err(Error::bug("arguments"));
        };
        let lists = [
            ("params", params.tensors()?),
            ("grads", grads.tensors()?),
            ("exp_avgs", first.tensors()?),
            ("exp_avg_sqs", Vec::new()),
            ("masters", masters.tensors()?),
            ("max_exp_avg_sqs", Vec::new()),
        ];
        let numbers = Numbers {
            rate: lr.float()?,
            beta1: beta1.float()?,
            beta2: beta2.float()?,
            eps: 0.0,
            decay: decay.float()?,
            maximize: maximize.bool()?,
        };
        let given = Given {
            count: None,
            rate: rate.optional()?,
            factor: factor.optional()?,
            found: found.optional()?,
        };
        let Some(tensors) = Tensors::checked(lists, false)? else { return Ok(Vec::new()) };
        step(abi, Rule::Lion, &tensors, &given, numbers)?;
        Ok(Vec::new())
    }
}

/// The Euclidean norm of all elements of tensors of one type, and by what they are to be multiplied so that it is `most` at most:
/// `min(1, most / (norm + 1e-6))`.
pub(crate) struct GradientNorm;

impl Operator for GradientNorm {
    const NAME: &'static str = "gradient_norm";
    const ARGS: &'static [(&'static str, Arg)] =
        &[("grads", Arg::Tensors), ("max_norm", Arg::Float)];
    const RETURNS: &'static str = "(Tensor norm, Tensor factor)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [grads, most] = args else { return Err(Error::bug("arguments")) };
        let (grads, most) = (grads.tensors()?, most.float()?);
        let Some(one) = grads.first() else {
            return Err(Error::user("the norm of no gradients"));
        };
        let (dtype, device) = (float("grads", one)?, one.device());
        if most.is_nan() || most < 0.0 {
            return Err(Error::user(format!("max_norm is {most}; it must be at least 0")));
        }
        if grads.iter().any(|g| g.device() != device) || one_type(&grads)? != dtype {
            return Err(Error::user("grads have several types or devices; a call takes one"));
        }
        let laid_out = |g: Tensor| match host::is_dense(&g) {
            true => Ok(g),
            false => g.laid_out(1),
        };
        let grads = grads.into_iter().map(laid_out).collect::<Result<Vec<_>>>()?;
        let number = || Tensor::empty(abi, &[], DType::F32, device);
        let (norm, factor) = (number()?, number()?);
        let Device::Cuda(index) = device else {
            let squares = with_number!(dtype, squares_on_host(abi, &grads))?;
            let (all, by) = (squares.sqrt(), most / (squares.sqrt() + 1e-6));
            host::write::<f32>(&norm)?[0] = all as f32;
            host::write::<f32>(&factor)?[0] = if by > 1.0 { 1.0 } else { by as f32 };
            return Ok(vec![Value::Tensor(norm), Value::Tensor(factor)]);
        };
        let numbers =
            Numbers { rate: 0.0, beta1: 0.5, beta2: 0.5, eps: 0.0, decay: 0.0, maximize: false };
        let head = Head { step: 0, rate: 0, factor: 0, found: 0, rate_is_double: false, numbers };
        let gradients = grads.iter().map(Tensor::share).collect::<Result<Vec<_>>>()?;
        let none = Vec::new;
        let tensors = Tensors {
            dtype,
            device,
            weights: grads,
            gradients,
            first: none(),
            second: none(),
            masters: none(),
            maxima: none(),
        };
        let entries = tensors.entries()?;
        let chunk = summed_at_once(entries.iter().map(|e| e.elements).sum());
        let tables = tables(&entries, &head, chunk)?;
        let parts_count = tables.iter().map(|t| t.blocks).sum::<u64>();
        let width = wide(dtype);
        let parts = Tensor::empty(abi, &[parts_count.cast_signed()], width, device)?;
        let start = parts.address()?;
        let mut done = 0;
        let mut set = None;
        for table in tables {
            let [bytes, count] = table_definitions(table.places);
            let these: Set = [element(dtype)?, bytes, count, ("TW_MASTER", 0)];
            let args = Args::new().bytes(&table.bytes).value(start + done * width.size() as u64);
            launch(
                abi,
                index,
                (Text::Optimizers, "squares", &these),
                table.blocks,
                THREADS,
                &args,
            )?;
            done += table.blocks;
            set = Some(these);
        }
        let [bytes, count] = table_definitions(PLACES[0]);
        let set = set.unwrap_or([element(dtype)?, bytes, count, ("TW_MASTER", 0)]);
        let args = Args::new().value(start).value(parts_count).value(most);
        let args = args.value(norm.address()?).value(factor.address()?);
        launch(abi, index, (Text::Optimizers, "whole_norm", &set), 1, 1024, &args)?;
        Ok(vec![Value::Tensor(norm), Value::Tensor(factor)])
    }
}

/// The type of all tensors; `bool` where they have several.
fn one_type(tensors: &[Tensor]) -> Result<DType> {
    let mut found = None;
    for tensor in tensors {
        let dtype = tensor.dtype()?;
        if *found.get_or_insert(dtype) != dtype {
            return Ok(DType::Bool);
        }
    }
    Ok(found.unwrap_or(DType::Bool))
}

fn squares_on_host<T: Number>(abi: &'static Abi, grads: &[Tensor]) -> Result<f64> {
    let mut stretches = Vec::new();
    for grad in grads {
        stretches.extend(host::read::<T>(grad)?.chunks(STRETCH));
    }
    let mut sums = vec![0.0; stretches.len()];
    let elements = stretches.iter().map(|s| s.len()).sum();
    let jobs = sums.iter_mut().zip(stretches).collect();
    host::in_parallel(abi.threads(), elements, jobs, |(sum, stretch): (&mut f64, &[T])| {
        host::wider(|| {
            // Eight sums side by side, each in one order.
            let mut parts = [0.0_f64; 8];
            for eight in stretch.chunks(8) {
                for (part, x) in parts.iter_mut().zip(eight) {
                    let x = x.wide().double();
                    *part += x * x;
                }
            }
            *sum = parts.iter().sum();
        });
    });
    Ok(sums.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_leave_work_for_all_and_few_blocks() {
        assert_eq!(summed_at_once(1), 2 * PIECE);
        assert_eq!(summed_at_once(25_000_000), 4 * PIECE);
        assert_eq!(summed_at_once(10_000_000_000), 16 * PIECE);
    }

    #[test]
    fn the_largest_table_fits_a_launch() {
        // `squares` has an address beside its table.
        assert!(HEAD_BYTES + PLACES[1] * ENTRY_BYTES + 8 <= 32764);
    }
}
