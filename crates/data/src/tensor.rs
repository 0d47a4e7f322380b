//! [`Tensor`] and the [`Bytes`] beneath it.

use crate::convert::{Number, from_f64, read_f64, read_i64};
use crate::lent::Lent;
use crate::mapped::MappedFile;
use crate::widened::Widened;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};

/// One cache line: what owned memory is made of, so that a vector never straddles two lines.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Line([u64; 8]);

/// Bytes of a [`Line`].
const LINE_BYTES: usize = 64;

/// Shared bytes: an owned buffer, a part of a memory-mapped file, or memory of somebody else.
#[derive(Clone)]
pub enum Bytes {
    /// Owned, aligned to 64 bytes. The length in bytes may be less than the lines hold.
    Owned(Arc<Vec<Line>>, usize),
    /// A part of a mapped file.
    Mapped(Arc<MappedFile>, Range<usize>),
    /// Memory of somebody else, who promises that it does not change or move.
    Foreign(Arc<dyn AsRef<[u8]> + Send + Sync>),
    /// Memory of somebody else, lent for writing.
    Lent(Arc<Lent>),
    /// 16-bit floats read as `f32`.
    Widened(Arc<Widened>),
}

impl Bytes {
    /// Says that the bytes will not be read for now: of a mapped file they need not stay in memory.
    pub fn let_go(&self) {
        match self {
            Bytes::Mapped(file, range) => file.let_go(range.clone()),
            Bytes::Widened(widened) => widened.stored().let_go(),
            _ => {}
        }
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        match self {
            Bytes::Owned(_, len) => *len,
            Bytes::Widened(widened) => widened.wide_len(),
            _ => (**self).len(),
        }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes as they are kept: of widened ones the narrow ones.
    pub fn stored(&self) -> &[u8] {
        match self {
            Bytes::Widened(widened) => widened.stored(),
            _ => self,
        }
    }

    /// Copies `bytes` into an aligned owned buffer.
    pub fn copy_from(bytes: &[u8]) -> Bytes {
        let mut lines = vec![Line([0; 8]); bytes.len().div_ceil(LINE_BYTES)];
        bytemuck::cast_slice_mut::<Line, u8>(&mut lines)[..bytes.len()].copy_from_slice(bytes);
        Bytes::Owned(Arc::new(lines), bytes.len())
    }

    /// Zeros.
    pub fn zeroed(len: usize) -> Bytes {
        Bytes::Owned(Arc::new(vec![Line([0; 8]); len.div_ceil(LINE_BYTES)]), len)
    }

    /// A part of these bytes whose address is a multiple of `alignment`: shared when they are mapped
    /// and the part is aligned, copied otherwise. `None` when the part lies outside.
    pub fn part(&self, range: Range<usize>, alignment: usize) -> Option<Bytes> {
        let part = self.get(range.clone())?;
        Some(match self {
            Bytes::Mapped(map, whole) if (part.as_ptr() as usize).is_multiple_of(alignment) => {
                Bytes::Mapped(map.clone(), whole.start + range.start..whole.start + range.end)
            }
            _ => Bytes::copy_from(part),
        })
    }

    /// True for memory that was lent for writing.
    pub fn is_lent(&self) -> bool {
        matches!(self, Bytes::Lent(_))
    }

    /// The bytes, for writing; copies first when they are shared or mapped.
    pub fn make_mut(&mut self) -> &mut [u8] {
        let in_place = match self {
            Bytes::Owned(..) => true,
            Bytes::Lent(lent) => Arc::get_mut(lent).is_some(),
            _ => false,
        };
        if !in_place {
            *self = Bytes::copy_from(self);
        }
        match self {
            Bytes::Lent(lent) => match Arc::get_mut(lent) {
                Some(lent) => lent.bytes_mut(),
                None => unreachable!("shared ones were replaced by an owned copy above"),
            },
            Bytes::Owned(lines, len) => {
                let lines = Arc::make_mut(lines);
                &mut bytemuck::cast_slice_mut(lines.as_mut_slice())[..*len]
            }
            _ => unreachable!("replaced by an owned copy above"),
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(lines, len) => &bytemuck::cast_slice(lines.as_slice())[..*len],
            Bytes::Mapped(map, range) => &map[range.clone()],
            Bytes::Foreign(owner) => (**owner).as_ref(),
            Bytes::Lent(lent) => lent.bytes(),
            Bytes::Widened(widened) => widened.wide(),
        }
    }
}

/// A data type, a concrete shape, and bytes in row-major order (4-bit types packed two per byte).
///
/// Invariant, kept by every constructor: `bytes.len() == dtype.bytes_for(product of shape)`.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
}

/// Product of a shape; an error when it does not fit `usize`.
pub fn element_count(shape: &[usize]) -> Result<usize> {
    // A zero extent makes the tensor empty even if the other extents overflow together.
    if shape.contains(&0) {
        return Ok(0);
    }
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(|| {
        Error::user(format!("shape {shape:?} has more elements than can be counted"))
    })
}

fn byte_count(dtype: DType, shape: &[usize]) -> Result<usize> {
    let n = element_count(shape)?;
    dtype.bytes_for(n).filter(|&b| isize::try_from(b).is_ok()).ok_or_else(|| {
        Error::user(format!("a {dtype} tensor of shape {shape:?} is too large for this machine"))
    })
}

impl Tensor {
    /// A tensor over existing bytes. Errors when the byte count does not fit the shape.
    pub fn new(dtype: DType, shape: impl Into<Vec<usize>>, bytes: Bytes) -> Result<Tensor> {
        let shape = shape.into();
        let expected = byte_count(dtype, &shape)?;
        if bytes.len() != expected {
            return Err(Error::user(format!(
                "a {dtype} tensor of shape {shape:?} needs {expected} bytes, {} are given",
                bytes.len()
            )));
        }
        Ok(Tensor { dtype, shape, bytes })
    }

    /// Zeros. Errors when it cannot be allocated.
    pub fn zeros(dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Tensor> {
        let shape = shape.into();
        let len = byte_count(dtype, &shape)?;
        let mut lines: Vec<Line> = Vec::new();
        lines.try_reserve_exact(len.div_ceil(LINE_BYTES)).map_err(|_| {
            Error::user(format!(
                "out of memory: a {dtype} tensor of shape {shape:?} takes {len} bytes"
            ))
        })?;
        lines.resize(len.div_ceil(LINE_BYTES), Line([0; 8]));
        Ok(Tensor { dtype, shape, bytes: Bytes::Owned(Arc::new(lines), len) })
    }

    /// A tensor of a Rust number type: `Tensor::from_slice(&[2, 2], &[1f32, 2., 3., 4.])`.
    /// Errors when the counts differ.
    pub fn from_slice<T: Number>(shape: &[usize], values: &[T]) -> Result<Tensor> {
        Tensor::new(T::DTYPE, shape, Bytes::copy_from(bytemuck::cast_slice(values)))
    }

    /// A scalar tensor (shape `[]`) of `dtype` nearest to `value`.
    pub fn scalar(dtype: DType, value: f64) -> Tensor {
        Tensor::from_f64s(dtype, &[], &[value]).expect("one element of shape []")
    }

    /// Rounds each value to `dtype`. Errors when the counts differ.
    pub fn from_f64s(dtype: DType, shape: &[usize], values: &[f64]) -> Result<Tensor> {
        if element_count(shape)? != values.len() {
            return Err(Error::user(format!("{} values for shape {shape:?}", values.len())));
        }
        let mut tensor = Tensor::zeros(dtype, shape)?;
        let bytes = tensor.bytes.make_mut();
        for (i, &v) in values.iter().enumerate() {
            from_f64(dtype, bytes, i, v);
        }
        Ok(tensor)
    }

    /// Integers, wrapped to `dtype`. Errors when the counts differ.
    pub fn from_i64s(dtype: DType, shape: &[usize], values: &[i64]) -> Result<Tensor> {
        if element_count(shape)? != values.len() {
            return Err(Error::user(format!("{} values for shape {shape:?}", values.len())));
        }
        let mut tensor = Tensor::zeros(dtype, shape)?;
        let bytes = tensor.bytes.make_mut();
        for (i, &v) in values.iter().enumerate() {
            crate::convert::from_i64(dtype, bytes, i, v);
        }
        Ok(tensor)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True when some extent is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The shared bytes themselves.
    pub fn shared_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Bytes that the elements take.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// The same values as `f32`, which nobody makes before they are read; `None` for other types than `f16` and `bf16`.
    pub fn widened(&self) -> Option<Tensor> {
        let widened = Widened::new(self.dtype, self.bytes.clone())?;
        let bytes = Bytes::Widened(Arc::new(widened));
        Some(Tensor { dtype: DType::F32, shape: self.shape.clone(), bytes })
    }

    /// For widened values, the narrow ones.
    pub fn narrow(&self) -> Option<Tensor> {
        let Bytes::Widened(widened) = &self.bytes else { return None };
        let (dtype, bytes) = (widened.narrow(), widened.stored().clone());
        Some(Tensor { dtype, shape: self.shape.clone(), bytes })
    }

    /// The bytes, for writing; copies first when they are shared or mapped.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.make_mut()
    }

    /// Whether the elements lie at multiples of their size, as typed views and kernels want them; those of a mapped file
    /// may not.
    pub fn is_aligned(&self) -> bool {
        match &self.bytes {
            Bytes::Mapped(..) | Bytes::Foreign(_) => {
                (self.bytes.as_ptr() as usize).is_multiple_of(self.dtype.size())
            }
            _ => true,
        }
    }

    /// The tensor itself where it [is aligned](Tensor::is_aligned), a copy otherwise.
    pub fn aligned(&self) -> Tensor {
        let bytes = match self.is_aligned() {
            true => self.bytes.clone(),
            false => Bytes::copy_from(&self.bytes),
        };
        Tensor { dtype: self.dtype, shape: self.shape.clone(), bytes }
    }

    /// The elements as a Rust type. Errors on another data type or (for mapped files) when the
    /// bytes are not aligned.
    pub fn as_slice<T: Number>(&self) -> Result<&[T]> {
        if T::DTYPE != self.dtype {
            return Err(Error::user(format!("the tensor is {}, not {}", self.dtype, T::DTYPE)));
        }
        bytemuck::try_cast_slice(&self.bytes).map_err(|_| {
            Error::user(format!("the {} tensor is not aligned in its file", self.dtype))
        })
    }

    /// Element `i` in row-major order as `f64` (64-bit integers round).
    pub fn get_f64(&self, i: usize) -> f64 {
        if let Bytes::Widened(widened) = &self.bytes {
            return read_f64(widened.narrow(), widened.stored(), i);
        }
        read_f64(self.dtype, &self.bytes, i)
    }

    /// Element `i` in row-major order as `i64`: floats truncate, `u64` wraps.
    pub fn get_i64(&self, i: usize) -> i64 {
        read_i64(self.dtype, &self.bytes, i)
    }

    /// All elements as `f64`.
    pub fn to_f64s(&self) -> Vec<f64> {
        (0..self.len()).map(|i| self.get_f64(i)).collect()
    }

    /// All elements as `i64`.
    pub fn to_i64s(&self) -> Vec<i64> {
        (0..self.len()).map(|i| self.get_i64(i)).collect()
    }

    /// The same values rounded to another float type, to nearest with ties to even; of widened ones nothing is kept that
    /// the result does not have. Errors when either type is no float, or out of memory.
    pub fn rounded(&self, dtype: DType) -> Result<Tensor> {
        if let Bytes::Widened(widened) = &self.bytes {
            let (shape, narrow) = (self.shape.clone(), widened.narrow());
            return match dtype == self.dtype {
                true => Ok(Tensor { dtype, shape, bytes: widened.made() }),
                false => {
                    Tensor { dtype: narrow, shape, bytes: widened.stored().clone() }.rounded(dtype)
                }
            };
        }
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        if !(dtype.is_float() && self.dtype.is_float()) {
            return Err(Error::bug(format!("rounding {} to {dtype}", self.dtype)));
        }
        let mut out = Tensor::zeros(dtype, self.shape.clone())?;
        let bytes = out.bytes.make_mut();
        if (self.dtype, dtype) == (DType::F32, DType::BF16) {
            for (to, from) in bytes.chunks_exact_mut(2).zip(self.bytes.chunks_exact(4)) {
                let x = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                to.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
            }
        } else if (self.dtype, dtype) == (DType::F32, DType::F16) {
            for (to, from) in bytes.chunks_exact_mut(2).zip(self.bytes.chunks_exact(4)) {
                let x = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                to.copy_from_slice(&half::f16::from_f32(x).to_le_bytes());
            }
        } else if (self.dtype, dtype) == (DType::BF16, DType::F16) {
            for (to, from) in bytes.chunks_exact_mut(2).zip(self.bytes.chunks_exact(2)) {
                let x = half::bf16::from_le_bytes([from[0], from[1]]).to_f32();
                to.copy_from_slice(&half::f16::from_f32(x).to_le_bytes());
            }
        } else if (self.dtype, dtype) == (DType::F16, DType::BF16) {
            for (to, from) in bytes.chunks_exact_mut(2).zip(self.bytes.chunks_exact(2)) {
                let x = half::f16::from_le_bytes([from[0], from[1]]).to_f32();
                to.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
            }
        } else {
            for i in 0..self.len() {
                from_f64(dtype, bytes, i, self.get_f64(i));
            }
        }
        Ok(out)
    }

    /// The same bytes under another shape. Errors when the element counts differ.
    pub fn reshaped(&self, shape: impl Into<Vec<usize>>) -> Result<Tensor> {
        let shape = shape.into();
        if element_count(&shape)? != self.len() {
            return Err(Error::user(format!("cannot reshape {:?} to {shape:?}", self.shape)));
        }
        Ok(Tensor { dtype: self.dtype, shape, bytes: self.bytes.clone() })
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)?;
        if self.len() <= 16 {
            match self.dtype.is_float() {
                true => write!(f, " {:?}", self.to_f64s())?,
                false => write!(f, " {:?}", self.to_i64s())?,
            }
        }
        Ok(())
    }
}

/// Bitwise: same type, shape and bytes.
impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        let same = || match (self.narrow(), other.narrow()) {
            (Some(a), Some(b)) if a.dtype == b.dtype => a.bytes() == b.bytes(),
            _ => self.bytes() == other.bytes(),
        };
        self.dtype == other.dtype && self.shape == other.shape && same()
    }
}
