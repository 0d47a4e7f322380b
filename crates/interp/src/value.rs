//! [`Val`]: a tensor while the interpreter works on it.
//!
//! Floats of every type are held as `f64` (which represents each of them exactly) and integers and
//! `bool` as `i64` (`u64` by its bits), so operators are written twice at most. In exact mode the
//! numbers in a [`Val`] are always representable in its `dtype`.

use std::borrow::Cow;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, element_count, from_f64, read_f64};

/// The most elements that one value may have (16 GiB at eight bytes each): beyond it the
/// interpreter says so instead of driving the machine out of memory.
const MOST_ELEMENTS: usize = 1 << 31;

/// The elements of a value.
#[derive(Clone, Debug)]
pub(crate) enum Buf {
    /// Floats of every type.
    F(Vec<f64>),
    /// Integers of every type, and `bool` as 0 and 1.
    I(Vec<i64>),
}

/// Runs one generic expression on whichever vector a [`Buf`] holds and wraps the result alike.
macro_rules! each_buf {
    ($buf:expr, $v:ident => $body:expr) => {
        match $buf {
            $crate::value::Buf::F($v) => $crate::value::Buf::F($body),
            $crate::value::Buf::I($v) => $crate::value::Buf::I($body),
        }
    };
}
pub(crate) use each_buf;

/// A tensor while the interpreter works on it; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Val {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) buf: Arc<Buf>,
}

/// `value` rounded to `dtype`.
pub(crate) fn round_to(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        other => {
            let mut bytes = [0u8; 8];
            from_f64(other, &mut bytes, 0, value);
            read_f64(other, &bytes, 0)
        }
    }
}

/// `value` wrapped to the integer type `dtype` (`bool`: 0 or 1).
pub(crate) fn wrap_to(dtype: DType, value: i64) -> i64 {
    match dtype {
        DType::I64 | DType::U64 => value,
        DType::Bool => (value != 0).into(),
        _ => {
            let shift = 64 - dtype.bits();
            if dtype.is_signed_int() {
                (value << shift) >> shift
            } else {
                ((value << shift) as u64 >> shift) as i64
            }
        }
    }
}

/// A float as an integer type: truncates, saturates, NaN is 0; `bool` is `x != 0`.
pub(crate) fn float_to_int(dtype: DType, value: f64) -> i64 {
    match dtype {
        DType::Bool => (value != 0.0).into(),
        DType::U64 => value as u64 as i64,
        DType::I64 => value as i64,
        _ => {
            let bits = dtype.bits();
            let (low, high) = if dtype.is_signed_int() {
                (-(1i64 << (bits - 1)), (1i64 << (bits - 1)) - 1)
            } else {
                (0, (1i64 << bits) - 1)
            };
            (value as i64).clamp(low, high)
        }
    }
}

/// An integer of type `dtype` as a float.
pub(crate) fn int_to_float(dtype: DType, value: i64) -> f64 {
    if dtype == DType::U64 { value as u64 as f64 } else { value as f64 }
}

/// The element count of a result, or an error when the interpreter will not hold that many.
pub(crate) fn checked_len(shape: &[usize]) -> Result<usize> {
    let n = element_count(shape)?;
    if n > MOST_ELEMENTS {
        return Err(Error::user(format!(
            "a tensor of shape {shape:?} has {n} elements; the interpreter holds at most \
             {MOST_ELEMENTS}"
        )));
    }
    Ok(n)
}

impl Val {
    /// A value of this type and shape; the caller's elements fit.
    pub(crate) fn new(dtype: DType, shape: Vec<usize>, buf: Buf) -> Val {
        let val = Val { dtype, shape, buf: Arc::new(buf) };
        debug_assert_eq!(val.buf.len(), val.len());
        val
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The same elements under another shape of the same size.
    pub(crate) fn with_shape(&self, shape: Vec<usize>) -> Val {
        Val { dtype: self.dtype, shape, buf: self.buf.clone() }
    }

    /// All elements as floats.
    pub(crate) fn floats(&self) -> Cow<'_, [f64]> {
        match &*self.buf {
            Buf::F(v) => Cow::Borrowed(v),
            Buf::I(v) => v.iter().map(|&x| int_to_float(self.dtype, x)).collect(),
        }
    }

    /// All elements as integers; floats truncate.
    pub(crate) fn ints(&self) -> Cow<'_, [i64]> {
        match &*self.buf {
            Buf::I(v) => Cow::Borrowed(v),
            Buf::F(v) => v.iter().map(|&x| x as i64).collect(),
        }
    }

    /// Reads a host tensor.
    pub(crate) fn from_tensor(tensor: &Tensor) -> Result<Val> {
        checked_len(tensor.shape())?;
        let dtype = tensor.dtype();
        let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect();
        let buf = match dtype {
            DType::F32 => Buf::F(tensor.as_slice::<f32>().map_or_else(|_| tensor.to_f64s(), wide)),
            DType::F64 => {
                Buf::F(tensor.as_slice::<f64>().map_or_else(|_| tensor.to_f64s(), <[f64]>::to_vec))
            }
            DType::I64 => {
                Buf::I(tensor.as_slice::<i64>().map_or_else(|_| tensor.to_i64s(), <[i64]>::to_vec))
            }
            _ if dtype.is_float() => Buf::F(tensor.to_f64s()),
            _ => Buf::I(tensor.to_i64s()),
        };
        Ok(Val::new(dtype, tensor.shape().to_vec(), buf))
    }

    /// As a host tensor of type `dtype` (the value's own, or `F64` for floats).
    pub(crate) fn to_tensor(&self, dtype: DType) -> Result<Tensor> {
        match &*self.buf {
            Buf::F(v) if dtype == DType::F64 => Tensor::from_slice(&self.shape, v),
            Buf::F(v) => Tensor::from_f64s(dtype, &self.shape, v),
            Buf::I(v) => Tensor::from_i64s(dtype, &self.shape, v),
        }
    }
}

impl Buf {
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Buf::F(v) => v.len(),
            Buf::I(v) => v.len(),
        }
    }
}

impl Val {
    /// The elements, without a copy when no one else holds them.
    pub(crate) fn take_buf(self) -> Buf {
        Arc::try_unwrap(self.buf).unwrap_or_else(|shared| (*shared).clone())
    }
}
