//! Dropout, with a residual: `y = x / (1 - p) + residual` where an element stays, `y = residual` where it is dropped.
//!
//! Element `i` stays where word `i % 4` of Philox4x32-7 at counter `i / 4` is at least `p * 2^32`. The key is a tensor that
//! PyTorch's generator has drawn, so `torch.manual_seed` repeats it and a recorded CUDA graph draws anew in each replay. Nothing
//! else is stored: the gradient of `x` is the same operator on the gradient of `y`, with the same key and no residual.

use crate::host::{self, Float, Number, with_number};
use crate::plans::Key;
use crate::tensors::{float, like, plain, same_device, wide};
use crate::written::{Set, Text, element, launch};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Args;
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): seven rounds are
/// the fewest that pass BigCrush.
#[inline(always)]
fn philox(counter: u64, key: u64) -> [u32; 4] {
    let mut c = [counter as u32, (counter >> 32) as u32, 0, 0];
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..7 {
        let p = 0xD251_1F53 * u64::from(c[0]);
        let q = 0xCD9E_8D57 * u64::from(c[2]);
        c = [(q >> 32) as u32 ^ c[1] ^ k0, q as u32, (p >> 32) as u32 ^ c[3] ^ k1, p as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

/// Words below it drop an element.
fn threshold(p: f64) -> u32 {
    (p * 4_294_967_296.0).round() as u32
}

/// What elements that stay are multiplied by.
fn scale(p: f64) -> f64 {
    if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 }
}

/// What `dropout.cu` takes: addresses of `x`, of a residual (or 0), of the result and of the key, the share, and how many
/// elements there are; and how many blocks that is.
pub(crate) fn arguments([x, residual, y, key]: [u64; 4], p: f64, elements: i64) -> (Args, u64) {
    let args = Args::new().value(x).value(residual).value(y).value(key);
    let args = args.value(threshold(p)).value(scale(p)).value(elements);
    (args, elements.cast_unsigned().div_ceil(2048))
}

/// Dropout with the share `p` dropped, plus `residual`.
pub(crate) struct Dropout;

impl Operator for Dropout {
    const NAME: &'static str = "dropout";
    const ARGS: &'static [(&'static str, Arg)] =
        &[("x", Arg::Tensor), ("residual", Arg::Optional), ("key", Arg::Tensor), ("p", Arg::Float)];
    const RETURNS: &'static str = "Tensor";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, residual, key, p] = args else { return Err(Error::bug("arguments")) };
        let (x, residual, key, p) = (x.tensor()?, residual.optional()?, key.tensor()?, p.float()?);
        Ok(vec![Value::Tensor(dropped(abi, x, residual, &key, p)?)])
    }
}

/// The same under a key that is drawn here, which is the second result.
pub(crate) struct DropoutDrawn;

impl Operator for DropoutDrawn {
    const NAME: &'static str = "dropout_drawn";
    const ARGS: &'static [(&'static str, Arg)] =
        &[("x", Arg::Tensor), ("residual", Arg::Optional), ("p", Arg::Float)];
    const RETURNS: &'static str = "(Tensor y, Tensor key)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, residual, p] = args else { return Err(Error::bug("arguments")) };
        let (x, residual, p) = (x.tensor()?, residual.optional()?, p.float()?);
        let key = Tensor::empty(abi, &[1], DType::I64, x.device())?;
        key.draw(i64::MIN, i64::MAX)?;
        let y = dropped(abi, x, residual, &key, p)?;
        Ok(vec![Value::Tensor(y), Value::Tensor(key)])
    }
}

/// The same as a graph, for [`crate::triton`]: each element draws the four words of its counter and takes its own.
fn text(dtype: DType, residual: bool, p: f64) -> String {
    use std::fmt::Write;
    let (t, c) = (dtype, wide(dtype));
    let mut draw =
        "let c0 = u32(i >> i64(2)); let d0 = u32(i >> i64(34)); let e0 = u32(0); let f0 = u32(0); \
                    let k0 = u32(k); let l0 = u32(k >> i64(32))"
            .to_string();
    for r in 0..7 {
        let next = r + 1;
        let _ = write!(
            draw,
            "; let p{r} = u64(c{r}) * u64({}); let q{r} = u64(e{r}) * u64({}); \
             let c{next} = u32(q{r} >> u64(32)) ^ d{r} ^ k{r}; let d{next} = u32(q{r}); \
             let e{next} = u32(p{r} >> u64(32)) ^ f{r} ^ l{r}; let f{next} = u32(p{r}); \
             let k{next} = k{r} + u32({}); let l{next} = l{r} + u32({})",
            0xD251_1F53_u32, 0xCD9E_8D57_u32, 0x9E37_79B9_u32, 0xBB67_AE85_u32,
        );
    }
    let word = "let w = i & i64(3); \
                let drawn = where(w == i64(0), c7, where(w == i64(1), d7, where(w == i64(2), e7, f7)))";
    let scale = scale(p);
    let value = format!("where(drawn >= u32({}), {c}(a) * {scale:e}, {c}(0))", threshold(p));
    let mut text = format!("graph @dropout(N in 1..) {{\n  %x \"x\": {t}[N] = input\n");
    if residual {
        let _ = writeln!(text, "  %r \"residual\": {t}[N] = input");
    }
    let (name, operand) = if residual { (", r", ", %r") } else { ("", "") };
    let value = if residual { format!("{value} + {c}(r)") } else { value };
    text + &format!(
        "  %k \"key\": i64[1] = input
  %i: i64[N] = iota axis=0
  %y = map {{ a, i, k{name} -> {draw}; {word}; {t}({value}) }} %x, %i, %k{operand}
  return \"y\": %y
}}
"
    )
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    [(DType::F32, false), (DType::BF16, true)]
        .map(|(dtype, residual)| (format!("dropout {dtype}"), text(dtype, residual, 0.3)))
        .to_vec()
}

fn dropped(
    abi: &'static Abi,
    x: Tensor,
    residual: Option<Tensor>,
    key: &Tensor,
    p: f64,
) -> Result<Tensor> {
    let dtype = float("x", &x)?;
    if !(0.0..=1.0).contains(&p) {
        return Err(Error::user(format!("p is {p}; it must be in 0..=1")));
    }
    same_device("key", key, &x)?;
    if key.elements() != 1 || key.dtype()? != DType::I64 {
        let message = format!("key is {} of shape {:?}", key.dtype()?, key.sizes());
        return Err(Error::user(message).with_hint("it is one number of int64"));
    }
    if let Some(r) = &residual {
        like("residual", r, &x)?;
    }
    let (x, residual) = (plain(x)?, residual.map(plain).transpose()?);
    let y = Tensor::empty(abi, x.sizes(), dtype, x.device())?;
    let elements = x.elements();
    if elements == 0 {
        return Ok(y);
    }
    if crate::triton::entered() {
        let key_of_plan = Key::new("dropout").dtype(dtype).with(p.to_bits());
        let key_of_plan = key_of_plan.with(residual.is_some().into());
        let inputs = [Some(&x), residual.as_ref(), Some(key)];
        let inputs: Vec<&Tensor> = inputs.into_iter().flatten().collect();
        let write = || Ok(text(dtype, residual.is_some(), p));
        crate::triton::run(key_of_plan, &[elements], &inputs, &[&y], write)?;
        return Ok(y);
    }
    if let Device::Cuda(index) = x.device() {
        let at = |t: &Tensor| t.address();
        let residual = residual.as_ref().map_or(Ok(0), at)?;
        let (args, blocks) = arguments([at(&x)?, residual, at(&y)?, at(key)?], p, elements);
        let none = ("", 0);
        let set: Set = [element(dtype)?, none, none, none];
        launch(abi, index, (Text::Dropout, "dropout", &set), blocks, THREADS, &args)?;
    } else {
        let key = host::read_whole(key)?.first().copied().unwrap_or(0).cast_unsigned();
        let r = residual.as_ref();
        with_number!(dtype, on_host(abi, &x, r, &y, key, p))?;
    }
    Ok(y)
}

/// Threads of a block of `dropout.cu`.
pub(crate) const THREADS: u32 = 128;

/// Elements of a job; a multiple of four.
const STRETCH: usize = 1 << 14;

fn on_host<T: Number>(
    abi: &'static Abi,
    x: &Tensor,
    residual: Option<&Tensor>,
    y: &Tensor,
    key: u64,
    p: f64,
) -> Result<()> {
    let (x, y) = (host::read::<T>(x)?, host::write::<T>(y)?);
    let residual = residual.map(|r| host::read::<T>(r)).transpose()?;
    drop_on_slices(abi.threads(), x, residual, y, key, p);
    Ok(())
}

/// Dropout of numbers that lie in memory.
pub(crate) fn drop_on_slices<T: Number>(
    threads: usize,
    x: &[T],
    residual: Option<&[T]>,
    y: &mut [T],
    key: u64,
    p: f64,
) {
    let (threshold, scale) = (threshold(p), scale(p));
    let mut rest = residual.map(|r| r.chunks(STRETCH));
    let (elements, scale, zero) = (x.len(), T::Wide::of(scale), T::Wide::of(0.0));
    let mut jobs = Vec::new();
    for (number, (x, y)) in x.chunks(STRETCH).zip(y.chunks_mut(STRETCH)).enumerate() {
        let r = rest.as_mut().and_then(Iterator::next).unwrap_or_default();
        jobs.push((number * STRETCH / 4, x, r, y));
    }
    let work = |(first, x, r, y): (usize, &[T], &[T], &mut [T])| {
        host::wider(|| {
            for (block, (x, y)) in x.chunks(4).zip(y.chunks_mut(4)).enumerate() {
                let words = philox((first + block) as u64, key);
                for (i, ((x, y), word)) in x.iter().zip(y).zip(words).enumerate() {
                    let kept = if word >= threshold { x.wide() * scale } else { zero };
                    let added = r.get(block * 4 + i).map_or(kept, |r| kept + r.wide());
                    *y = T::narrow(added);
                }
            }
        });
    };
    host::in_parallel(threads, elements, jobs, work);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_words_are_those_of_the_authors() {
        // The first of the known answers that come with Random123.
        assert_eq!(philox(0, 0), [0x5F6F_B709, 0x0D89_3F64, 0x4F12_1F81, 0x4F73_0A48]);
    }

    #[test]
    fn everything_and_nothing_can_be_dropped() {
        assert_eq!(threshold(0.0), 0);
        assert_eq!(threshold(0.5), 1 << 31);
        assert_eq!(threshold(1.0), u32::MAX);
    }
}
