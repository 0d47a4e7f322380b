//! Rotary position embedding, by halves: pairs are `(x[j], x[j + D/2])`, as Llama, Mistral, Qwen and Gemma have them.
//!
//! ```text
//! y[j]       = x[j] * cos[j] - x[j + D/2] * sin[j]                   j < D/2
//! y[j + D/2] = x[j + D/2] * cos[j + D/2] + x[j] * sin[j + D/2]
//! ```
//!
//! The gradient is the same with the rotation turned back. On a GPU this is a kernel written by hand, which reads rows where they lie;
//! rows that are no multiple of 16 are copied into order, and are two kernels.

use crate::plans::{Key, run};
use crate::tensors::{float, plain, same_device, wide};
use crate::written::{Set, Text, element, launch};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Args;
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

fn text(t: DType, table: DType, d: i64, shared: bool, turned_back: bool) -> String {
    let c = wide(t);
    let (h, batch) = (d / 2, if shared { "1" } else { "B" });
    let half = |name: &str, from: &str, which: i64, lead: &str| {
        format!(
            "  %{name} = slice starts=[0, 0, 0, {which}, 0] lens=[{lead}, 1, {h}] steps=[1, 1, 1, 1, 1] %{from}\n"
        )
    };
    let mut text = format!(
        "graph @rotary(B in 1.., H in 1.., S in 1..) {{
  %x \"x\": {t}[B,H,S,2,{h}] = input
  %cos \"cos\": {table}[{batch},1,S,2,{h}] = input
  %sin \"sin\": {table}[{batch},1,S,2,{h}] = input
"
    );
    let vectors = format!("{batch}, 1, S");
    for (from, lead) in [("x", "B, H, S"), ("cos", &*vectors), ("sin", &*vectors)] {
        text += &half(&format!("{from}0"), from, 0, lead);
        text += &half(&format!("{from}1"), from, 1, lead);
    }
    // The gradient takes the table of the half that the product went to.
    let (sign, other) = if turned_back { (["+", "-"], [1, 0]) } else { (["-", "+"], [0, 1]) };
    for half in 0..2 {
        text += &format!(
            "  %y{half} = map {{ a, b, c, s -> {t}({c}(a) * {c}(c) {} {c}(b) * {c}(s)) }} %x{half}, %x{}, %cos{half}, %sin{}\n",
            sign[half],
            1 - half,
            other[half]
        );
    }
    text + "  %y = concat axis=3 %y0, %y1\n  return \"y\": %y\n}\n"
}

/// Rotates `x [B, H, S, D]` by `cos` and `sin [B or 1, S, D]`.
pub(crate) struct Rotary;

impl Operator for Rotary {
    const NAME: &'static str = "rotary";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("cos", Arg::Tensor),
        ("sin", Arg::Tensor),
        ("turned_back", Arg::Bool),
    ];
    const RETURNS: &'static str = "Tensor";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, cos, sin, turned_back] = args else { return Err(Error::bug("arguments")) };
        let (x, cos, sin) = (x.tensor()?, cos.tensor()?, sin.tensor()?);
        let turned_back = turned_back.bool()?;
        let (dtype, table) = (float("x", &x)?, float("cos", &cos)?);
        let &[batch, heads, length, d] = x.sizes() else {
            return Err(Error::user(format!(
                "x has shape {:?}; it must be [B, H, S, D]",
                x.sizes()
            )));
        };
        if d % 2 != 0 {
            return Err(Error::user(format!("x has rows of {d} numbers, which make no pairs")));
        }
        for (name, tensor) in [("cos", &cos), ("sin", &sin)] {
            same_device(name, tensor, &x)?;
            let fits = matches!(*tensor.sizes(), [b, s, e] if (b == 1 || b == batch) && s == length && e == d);
            if !fits {
                let message = format!(
                    "{name} has shape {:?}; it must be [{batch} or 1, {length}, {d}]",
                    tensor.sizes()
                );
                return Err(Error::user(message));
            }
            if tensor.sizes() != cos.sizes() || tensor.dtype()? != table {
                let message = format!(
                    "{name} is {} of shape {:?}, and cos {table} of shape {:?}; they must be alike",
                    tensor.dtype()?,
                    tensor.sizes(),
                    cos.sizes()
                );
                return Err(Error::user(message));
            }
        }
        let shared = cos.sizes().first() == Some(&1);
        let (cos, sin) = (plain(cos)?, plain(sin)?);
        let types = (dtype, table);
        if let Some(y) = by_hand(abi, types, &x, [&cos, &sin], shared, turned_back)? {
            return Ok(vec![Value::Tensor(y)]);
        }
        let x = plain(x)?;
        let y = Tensor::empty(abi, x.sizes(), dtype, x.device())?;
        if y.elements() > 0 {
            let key = Key::new("rotary").dtype(dtype).dtype(table).with(d as u64);
            let key = key.with(shared.into()).with(turned_back.into());
            let sizes = [batch, heads, length];
            run(key, &sizes, &[&x, &cos, &sin], &[&y], || {
                Ok(text(dtype, table, d, shared, turned_back))
            })?;
        }
        Ok(vec![Value::Tensor(y)])
    }
}

/// Threads of a block of `rotary.cu`, and pairs of a head that each of them turns.
const THREADS: u64 = 128;
const PAIRS: i64 = 8;
/// Heads whose pairs a thread turns with the same numbers of the tables, where their number can be divided by it.
const HEADS: i64 = 2;

/// The kernel written by hand, where the device and the layout of `x` suit it.
fn by_hand(
    abi: &'static Abi,
    (dtype, table): (DType, DType),
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    shared: bool,
    turned_back: bool,
) -> Result<Option<Tensor>> {
    let Device::Cuda(index) = x.device() else { return Ok(None) };
    if crate::triton::entered() {
        return Ok(None);
    }
    let (&[_, heads, length, d], &[along_batch, along_heads, along_length, inner]) =
        (x.sizes(), x.strides())
    else {
        return Ok(None);
    };
    let each = if heads % HEADS == 0 { HEADS } else { 1 };
    let packs = x.elements() / (2 * PAIRS * each);
    let strides = [along_batch, along_heads, along_length];
    let suits = inner == 1
        && d % (2 * PAIRS) == 0
        && strides.iter().all(|s| *s >= 0 && s % PAIRS == 0)
        && x.address()?.is_multiple_of(16);
    let numbers = [packs, heads, length, d / 2].map(u32::try_from);
    let [Ok(packs), Ok(heads), Ok(length), Ok(half)] = numbers else { return Ok(None) };
    if !suits || packs > u32::MAX - THREADS as u32 {
        return Ok(None);
    }
    let y = Tensor::empty(abi, x.sizes(), dtype, x.device())?;
    if packs == 0 {
        return Ok(Some(y));
    }
    let mut args = Args::new();
    for tensor in [x, cos, sin, &y] {
        args = args.value(tensor.address()?);
    }
    for number in [packs, heads, length, half] {
        args = args.value(number);
    }
    for stride in strides {
        args = args.value(stride);
    }
    let args = args.value(u32::from(shared));
    let (_, tables) = element(table)?;
    let back = ("TW_BACK", u64::from(turned_back));
    let set: Set = [element(dtype)?, ("TW_TABLE", tables), back, ("TW_HEADS", each.unsigned_abs())];
    let blocks = u64::from(packs).div_ceil(THREADS);
    launch(abi, index, (Text::Rotary, "rotary", &set), blocks, THREADS as u32, &args)?;
    Ok(Some(y))
}

#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    vec![
        ("rotary".to_string(), text(DType::F32, DType::F32, 16, true, false)),
        ("rotary, turned back".to_string(), text(DType::BF16, DType::F32, 16, false, true)),
    ]
}
