//! The sum or mean of cross-entropy over rows, alone or with its gradient.
//!
//! The gradient of a mean needs the number of rows that count before the losses are there. On a GPU nobody waits for it: a kernel counts
//! and writes what each row's gradient is multiplied by, the rows' kernel follows, and one more adds the losses up (`device/losses.cu`).
//! Every sum has one order. Where no row counts, the mean is no number and the gradient 0, as PyTorch's.

use super::cross_entropy::{Form, checked};
use crate::host;
use crate::tensors::{Rows, wide};
use crate::written::{Set, Text, element, launch};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Args;
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// The sum or mean of the losses, and with `GRADIENT` that of the logits for it.
pub(crate) struct CrossEntropyTotal<const GRADIENT: bool>;

impl<const GRADIENT: bool> Operator for CrossEntropyTotal<GRADIENT> {
    const NAME: &'static str =
        if GRADIENT { "cross_entropy_total" } else { "cross_entropy_total.inference" };
    const OVERLOADS: &'static [&'static str] = if GRADIENT { &["raw"] } else { &[] };
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("x", Arg::Tensor),
        ("targets", Arg::Tensor),
        ("ignore_index", Arg::Int),
        ("label_smoothing", Arg::Float),
        ("z_loss", Arg::Float),
        ("softcap", Arg::Float),
        ("mean", Arg::Bool),
    ];
    const RETURNS: &'static str = if GRADIENT { "(Tensor total, Tensor dx)" } else { "Tensor" };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, targets, ignored, smoothing, z, cap, mean] = args else {
            return Err(Error::bug("arguments"));
        };
        let numbers = [smoothing.float()?, z.float()?, cap.float()?];
        let (x, targets, form, rows) =
            checked(x.tensor()?, targets.tensor()?, ignored.int()?, numbers)?;
        if rows.columns == 0 {
            return Err(Error::user("x has rows of no logits"));
        }
        let (mean, c) = (mean.bool()?, wide(form.dtype));
        let total = Tensor::empty(abi, &[], c, x.device())?;
        let dx = match GRADIENT {
            true => Some(Tensor::empty(abi, x.sizes(), form.dtype, x.device())?),
            false => None,
        };
        let call = Call { form, rows, mean };
        match x.device() {
            Device::Cuda(index) => call.on_gpu(abi, index, &x, &targets, &total, dx.as_ref())?,
            Device::Cpu if c == DType::F64 => {
                call.on_host::<f64>(abi, &x, &targets, &total, dx.as_ref())?;
            }
            Device::Cpu => call.on_host::<f32>(abi, &x, &targets, &total, dx.as_ref())?,
        }
        Ok([Some(total), dx].into_iter().flatten().map(Value::Tensor).collect())
    }
}

struct Call {
    form: Form,
    rows: Rows,
    mean: bool,
}

/// Rows that one block looks at; with more there are blocks for parts of them.
const FEW_ROWS: i64 = 32768;
/// Rows of a part, at least.
const PART: i64 = 8192;
/// Parts, at most: each block of the next kernel reads all of their numbers.
const MOST_PARTS: i64 = 1024;
/// Threads of a block of `losses.cu`.
const THREADS: u32 = 1024;

/// How many rows a part has, and how many parts there are (0 where one block looks at all).
fn parts(rows: i64) -> (i64, i64) {
    if rows <= FEW_ROWS {
        return (rows, 0);
    }
    let stretch = (rows.cast_unsigned().div_ceil(MOST_PARTS as u64) as i64).max(PART);
    (stretch, rows.cast_unsigned().div_ceil(stretch.cast_unsigned()) as i64)
}

/// The next multiple of 16.
fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(16)
}

impl Call {
    fn on_gpu(
        &self,
        abi: &'static Abi,
        index: u32,
        x: &Tensor,
        targets: &Tensor,
        total: &Tensor,
        dx: Option<&Tensor>,
    ) -> Result<()> {
        let Call { form, rows: Rows { rows, .. }, mean } = *self;
        let c = wide(form.dtype);
        let (stretch, parts) = parts(rows);
        // Behind each other: losses, factors or logarithms, sums and counts of the parts.
        let list = aligned(rows.unsigned_abs() * c.size() as u64);
        let each_part = aligned(parts.unsigned_abs() * 8);
        let bytes = i64::try_from(2 * list + 2 * each_part).unwrap_or(i64::MAX);
        let scratch = Tensor::empty(abi, &[bytes.max(16)], DType::U8, x.device())?;
        let losses = scratch.part(0, &[rows], c)?;
        let beside = scratch.part(list, &[rows], c)?;
        let sums = scratch.address()? + 2 * list;
        let counts = sums + each_part;
        let none = ("", 0);
        let set: Set = [element(c)?, none, none, none];
        let start = |entry: &'static str, blocks: i64, args: &Args| {
            let what = (Text::Losses, entry, &set);
            launch(abi, index, what, blocks.max(1).unsigned_abs(), THREADS, args)
        };
        let at = targets.address()?;
        let ignored = form.ignored;
        if let Some(dx) = dx {
            if parts > 0 && mean {
                let args = Args::new().value(at).value(rows).value(stretch).value(ignored);
                start("count_parts", parts, &args.value(counts))?;
            }
            let args = Args::new().value(at).value(rows).value(stretch).value(ignored);
            let args = args.value(counts).value(parts).value(i32::from(mean));
            start("divide", parts, &args.value(beside.address()?))?;
            form.losses(abi, &self.rows, [x, targets, &losses, dx], Some(&beside))?;
        } else {
            form.losses(abi, &self.rows, [x, targets, &losses, &beside], None)?;
        }
        let from = losses.address()?;
        if parts > 0 {
            let args = Args::new().value(from).value(at).value(rows).value(stretch);
            start("sum_parts", parts, &args.value(ignored).value(sums).value(counts))?;
        }
        let args = Args::new().value(from).value(at).value(rows).value(ignored).value(sums);
        let args = args.value(counts).value(parts).value(i32::from(mean));
        start("total", 1, &args.value(total.address()?))
    }

    fn on_host<T: host::Float>(
        &self,
        abi: &'static Abi,
        x: &Tensor,
        targets: &Tensor,
        total: &Tensor,
        dx: Option<&Tensor>,
    ) -> Result<()> {
        let Call { form, rows, mean } = *self;
        let list = rows.rows.unsigned_abs() * T::DTYPE.size() as u64;
        let scratch = Tensor::empty(abi, &[2 * rows.rows], T::DTYPE, Device::Cpu)?;
        let losses = scratch.part(0, &[rows.rows], T::DTYPE)?;
        let beside = scratch.part(list, &[rows.rows], T::DTYPE)?;
        let mut count = 0_u64;
        for target in host::read_whole(targets)?.iter().filter(|t| **t != form.ignored) {
            if !(0..rows.columns).contains(target) {
                let message = format!("target {target}, and there are {} logits", rows.columns);
                return Err(Error::user(message));
            }
            count += 1;
        }
        let factor = if mean && count > 0 { 1.0 / count as f64 } else { 1.0 };
        match dx {
            Some(dx) => {
                host::write::<T>(&beside)?.fill(T::of(factor));
                form.losses(abi, &rows, [x, targets, &losses, dx], Some(&beside))?;
            }
            None => form.losses(abi, &rows, [x, targets, &losses, &beside], None)?,
        }
        let sum: f64 = host::read::<T>(&losses)?.iter().map(|loss| loss.double()).sum();
        let sum = if mean { sum / count as f64 } else { sum };
        host::write::<T>(total)?.fill(T::of(sum));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_and_are_few() {
        for rows in [0, 1, FEW_ROWS] {
            assert_eq!(parts(rows).1, 0);
        }
        for rows in [FEW_ROWS + 1, 100_000, 5_000_000, 1 << 40, i64::MAX] {
            let (stretch, parts) = parts(rows);
            assert!(parts <= MOST_PARTS && parts > 1, "{rows}: {parts}");
            assert!(i128::from(stretch) * i128::from(parts) >= i128::from(rows));
            assert!(i128::from(stretch) * i128::from(parts - 1) < i128::from(rows));
        }
    }
}
