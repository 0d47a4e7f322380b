//! The memory of PyTorch's tensors on the processor, as slices, and work on it by several threads.

use half::{bf16, f16};
use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::Mutex;
use std::sync::PoisonError;
use tilewright_base::{DType, Error, Result};
use tilewright_torch_abi::{Device, Tensor};

/// A number as it lies in memory.
pub(crate) trait Number: Copy + Send + Sync + 'static {
    /// Its type.
    const DTYPE: DType;
    /// What it is computed in.
    type Wide: Float;
    fn wide(self) -> Self::Wide;
    fn narrow(x: Self::Wide) -> Self;
}

/// What numbers are computed in.
pub(crate) trait Float:
    Number<Wide = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    fn of(x: f64) -> Self;
    fn double(self) -> f64;
    fn root(self) -> Self;
}

macro_rules! float {
    ($($float:ident is $dtype:ident),*) => {$(
        impl Number for $float {
            const DTYPE: DType = DType::$dtype;
            type Wide = $float;
            fn wide(self) -> $float {
                self
            }
            fn narrow(x: $float) -> $float {
                x
            }
        }
        impl Float for $float {
            fn of(x: f64) -> $float {
                x as $float
            }
            fn double(self) -> f64 {
                self.into()
            }
            fn root(self) -> $float {
                self.sqrt()
            }
        }
    )*};
}
float!(f32 is F32, f64 is F64);

macro_rules! narrow {
    ($($number:ident is $dtype:ident),*) => {$(
        impl Number for $number {
            const DTYPE: DType = DType::$dtype;
            type Wide = f32;
            fn wide(self) -> f32 {
                self.to_f32()
            }
            fn narrow(x: f32) -> $number {
                $number::from_f32(x)
            }
        }
    )*};
}
narrow!(bf16 is BF16, f16 is F16);

/// Calls a function with the Rust type of a float type of PyTorch's.
macro_rules! with_number {
    ($dtype:expr, $function:ident ( $($argument:expr),* $(,)? )) => {
        match $dtype {
            tilewright_base::DType::F32 => $function::<f32>($($argument),*),
            tilewright_base::DType::BF16 => $function::<half::bf16>($($argument),*),
            tilewright_base::DType::F16 => $function::<half::f16>($($argument),*),
            tilewright_base::DType::F64 => $function::<f64>($($argument),*),
            other => Err(tilewright_base::Error::bug(format!("a kernel for {other}"))),
        }
    };
}
pub(crate) use with_number;

/// Whether the tensor fills a stretch of memory, in some order of its axes.
pub(crate) fn is_dense(tensor: &Tensor) -> bool {
    let mut axes: Vec<(i64, i64)> =
        tensor.strides().iter().copied().zip(tensor.sizes().iter().copied()).collect();
    axes.retain(|(_, size)| *size != 1);
    axes.sort_unstable();
    let mut next = 1;
    axes.iter().all(|&(stride, size)| {
        let fits = size == 0 || stride == next;
        next *= size;
        fits
    })
}

fn extent(tensor: &Tensor, dtype: DType) -> Result<(u64, usize)> {
    let good = tensor.device() == Device::Cpu && tensor.dtype()? == dtype && is_dense(tensor);
    if !good {
        return Err(Error::bug(format!("{tensor:?} where a dense one of {dtype} is taken")));
    }
    let elements = usize::try_from(tensor.elements()).map_err(|_| Error::bug("a size"))?;
    Ok((tensor.address()?, elements))
}

fn shared<T>((address, elements): (u64, usize)) -> &'static [T] {
    if elements == 0 {
        return &[];
    }
    // SAFETY: `extent` has seen a dense tensor of this type, whose memory PyTorch keeps while the operator runs; callers keep
    // the slice no longer (`read`'s contract).
    unsafe { std::slice::from_raw_parts(address as *const T, elements) }
}

/// The numbers of a dense tensor in the order of its memory. Used no longer than the tensor lives.
pub(crate) fn read<T: Number>(tensor: &Tensor) -> Result<&[T]> {
    Ok(shared(extent(tensor, T::DTYPE)?))
}

/// The same for whole numbers.
pub(crate) fn read_whole(tensor: &Tensor) -> Result<&[i64]> {
    Ok(shared(extent(tensor, DType::I64)?))
}

fn owned<T>((address, elements): (u64, usize)) -> &'static mut [T] {
    if elements == 0 {
        return &mut [];
    }
    // SAFETY: as for `shared`; and nobody else has a slice of it (`write`'s contract: a result that was just made, or an argument
    // that the schema says is written, after `distinct`).
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, elements) }
}

/// The numbers of a dense tensor, to be written: one that was made by the operator, or that [`distinct`] has seen.
#[allow(clippy::mut_from_ref, reason = "the tensor is a handle; its memory is elsewhere")]
pub(crate) fn write<T: Number>(tensor: &Tensor) -> Result<&mut [T]> {
    Ok(owned(extent(tensor, T::DTYPE)?))
}

/// The same for whole numbers.
#[allow(clippy::mut_from_ref, reason = "the tensor is a handle; its memory is elsewhere")]
pub(crate) fn write_whole(tensor: &Tensor) -> Result<&mut [i64]> {
    Ok(owned(extent(tensor, DType::I64)?))
}

/// Refuses tensors that share memory, among those that are written and with those that are read.
pub(crate) fn distinct<'a>(
    written: impl Iterator<Item = &'a Tensor>,
    read: impl Iterator<Item = &'a Tensor>,
) -> Result<()> {
    let mut spans = Vec::new();
    for (tensor, writes) in written.map(|t| (t, true)).chain(read.map(|t| (t, false))) {
        let bytes = tensor.elements().unsigned_abs() * tensor.dtype()?.size() as u64;
        if bytes > 0 {
            let start = tensor.address()?;
            spans.push((start, start + bytes, writes));
        }
    }
    spans.sort_unstable();
    let mut last_written = 0;
    let mut last = 0;
    for (start, end, writes) in spans {
        if start < last_written || (writes && start < last) {
            return Err(Error::user("tensors that are updated share memory"));
        }
        last = last.max(end);
        if writes {
            last_written = last_written.max(end);
        }
    }
    Ok(())
}

/// Runs a loop with the processor's wider vectors where it has them; the loop must be `#[inline(always)]`.
pub(crate) fn wider<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,f16c")]
        fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("f16c")
        {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

/// Fewer elements than this are computed by the calling thread.
const FEW: usize = 32768;

/// Does all jobs, on as many threads as PyTorch has; `elements` is how much there is to do.
pub(crate) fn in_parallel<J: Send>(
    threads: usize,
    elements: usize,
    jobs: Vec<J>,
    work: impl Fn(J) + Sync,
) {
    let threads = threads.min(jobs.len());
    if threads <= 1 || elements < FEW {
        jobs.into_iter().for_each(work);
        return;
    }
    let queue = Mutex::new(jobs.into_iter());
    let run = || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(job) = next else { return };
            work(job);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Without another thread the calling one does it all.
            let _ = std::thread::Builder::new().spawn_scoped(scope, run);
        }
        run();
    });
}
