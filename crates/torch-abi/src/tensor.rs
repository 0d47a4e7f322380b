//! [`Tensor`]: a tensor of PyTorch, owned through the C interface.

use crate::api::{Abi, Device, TensorHandle};
use smallvec::{SmallVec, smallvec};
use std::ptr::null_mut;
use tilewright_base::{DType, Error, Result};

/// Sizes or strides; few tensors have more axes than fit here without memory of their own.
pub type Axes = SmallVec<[i64; 6]>;

/// A reference to a tensor. Dropping it gives the reference back.
///
/// The common facts are read once, when it arrives; they are those of the tensor at that moment, and nobody changes a
/// tensor's shape while an operator runs on it.
pub struct Tensor {
    abi: &'static Abi,
    /// Null for a tensor that somebody else holds ([`Tensor::borrowed`]), and whose address is known.
    handle: TensorHandle,
    known: u64,
    dtype: i32,
    device: Device,
    sizes: Axes,
    strides: Axes,
}

/// Strides of a row-major tensor of these sizes, in elements.
pub fn contiguous_strides(sizes: &[i64]) -> Axes {
    let mut strides: Axes = smallvec![1; sizes.len()];
    for axis in (1..sizes.len()).rev() {
        strides[axis - 1] = strides[axis] * sizes[axis].max(1);
    }
    strides
}

impl Tensor {
    /// Takes over a reference.
    ///
    /// # Safety
    /// The handle is a reference that nobody else gives back.
    pub(crate) unsafe fn own(abi: &'static Abi, handle: TensorHandle) -> Result<Tensor> {
        // First the value that frees the handle, so that an error below does.
        let mut tensor = Tensor {
            abi,
            handle,
            known: 0,
            dtype: 0,
            device: Device::Cpu,
            sizes: Axes::new(),
            strides: Axes::new(),
        };
        const ASKING: &str = "reading a tensor";
        let f = &abi.functions;
        let (mut rank, mut kind, mut index, mut layout) = (0, 0, 0, 0);
        // SAFETY: a tensor, and places for numbers, for each of these.
        unsafe {
            abi.checked((f.get_layout)(handle, &mut layout), ASKING)?;
            abi.checked((f.get_device_type)(handle, &mut kind), ASKING)?;
            abi.checked((f.get_device_index)(handle, &mut index), ASKING)?;
            abi.checked((f.get_dtype)(handle, &mut tensor.dtype), ASKING)?;
        }
        if layout != abi.strided {
            return Err(Error::unsupported("sparse, jagged and other tensors without strides"));
        }
        tensor.device = match kind {
            _ if kind == abi.cpu => Device::Cpu,
            _ if kind == abi.cuda => Device::Cuda(index.unsigned_abs()),
            _ => return Err(Error::unsupported("devices other than CPU and CUDA")),
        };
        let (mut sizes, mut strides) = (std::ptr::null(), std::ptr::null());
        // SAFETY: as above; the arrays belong to the tensor and have as many numbers as it has axes.
        unsafe {
            abi.checked((f.get_dim)(handle, &mut rank), ASKING)?;
            abi.checked((f.get_sizes)(handle, &mut sizes), ASKING)?;
            abi.checked((f.get_strides)(handle, &mut strides), ASKING)?;
            if rank > 0 {
                let rank = rank as usize;
                tensor.sizes.extend_from_slice(std::slice::from_raw_parts(sizes, rank));
                tensor.strides.extend_from_slice(std::slice::from_raw_parts(strides, rank));
            }
        }
        Ok(tensor)
    }

    /// A new row-major tensor; its contents are whatever the memory holds.
    ///
    /// # Errors
    /// PyTorch's, such as that memory has run out.
    pub fn empty(abi: &'static Abi, sizes: &[i64], dtype: DType, device: Device) -> Result<Tensor> {
        Tensor::empty_strided(abi, sizes, &contiguous_strides(sizes), dtype, device)
    }

    /// The same with these distances between neighbours along each axis, in elements.
    ///
    /// # Errors
    /// PyTorch's; our bug where there are not as many strides as sizes.
    pub fn empty_strided(
        abi: &'static Abi,
        sizes: &[i64],
        strides: &[i64],
        dtype: DType,
        device: Device,
    ) -> Result<Tensor> {
        if strides.len() != sizes.len() {
            return Err(Error::bug(format!("strides {strides:?} for sizes {sizes:?}")));
        }
        let code = abi.code(dtype)?;
        let (kind, index) = match device {
            Device::Cpu => (abi.cpu, 0),
            Device::Cuda(index) => (abi.cuda, index.cast_signed()),
        };
        let mut handle = null_mut();
        // SAFETY: sizes and strides have as many numbers as said; a place for the handle.
        let result = unsafe {
            (abi.functions.empty_strided)(
                sizes.len() as i64,
                sizes.as_ptr(),
                strides.as_ptr(),
                code,
                kind,
                index,
                &mut handle,
            )
        };
        abi.checked(result, "making a tensor")?;
        Ok(Tensor {
            abi,
            handle,
            known: 0,
            dtype: code,
            device,
            sizes: Axes::from_slice(sizes),
            strides: Axes::from_slice(strides),
        })
    }

    /// The interface it came through.
    pub fn abi(&self) -> &'static Abi {
        self.abi
    }

    /// Its element type.
    ///
    /// # Errors
    /// Unsupported for types that Tilewright does not have, such as complex numbers.
    pub fn dtype(&self) -> Result<DType> {
        let known = self.abi.dtypes.iter().find(|(code, _)| *code == self.dtype);
        known.map(|(_, d)| *d).ok_or_else(|| {
            Error::unsupported("tensors of complex, quantised or other rare element types")
        })
    }

    /// What tensors of one shape and type, on one device, have in common.
    pub fn alike(&self) -> (i32, Device, Axes) {
        (self.dtype, self.device, self.sizes.clone())
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its sizes.
    pub fn sizes(&self) -> &[i64] {
        &self.sizes
    }

    /// Distances between neighbours along each axis, in elements.
    pub fn strides(&self) -> &[i64] {
        &self.strides
    }

    /// How many elements it has.
    pub fn elements(&self) -> i64 {
        self.sizes.iter().product()
    }

    /// Whether it is row-major without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut next = 1;
        for (&size, &stride) in self.sizes.iter().zip(&self.strides).rev() {
            if size == 0 {
                return true;
            }
            if size != 1 {
                if stride != next {
                    return false;
                }
                next *= size;
            }
        }
        true
    }

    /// This tensor, or a copy that is row-major and starts at a multiple of `align` bytes.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn laid_out(self, align: u64) -> Result<Tensor> {
        if self.is_contiguous() && self.address()?.is_multiple_of(align) {
            return Ok(self);
        }
        self.own_handle()?;
        let copy = Tensor::empty(self.abi, &self.sizes, self.dtype()?, self.device)?;
        copy.copy_from(&self)?;
        Ok(copy)
    }

    /// Copies the elements of another tensor of the same shape, converting them.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn copy_from(&self, other: &Tensor) -> Result<()> {
        let (to, from) = (self.own_handle()?, other.own_handle()?);
        // SAFETY: two tensors, both alive.
        let code = unsafe { (self.abi.functions.copy)(to, from, 0) };
        self.abi.checked(code, "copying a tensor")
    }

    /// Makes all elements zero.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn zero(&self) -> Result<()> {
        let handle = self.own_handle()?;
        // SAFETY: a tensor.
        let code = unsafe { (self.abi.functions.zero)(handle) };
        self.abi.checked(code, "clearing a tensor")
    }

    /// Fills it with whole numbers of `low..high` that the generator of its device draws.
    ///
    /// # Errors
    /// Unsupported where PyTorch has no such function in its C interface; PyTorch's.
    pub fn draw(&self, low: i64, high: i64) -> Result<()> {
        let functions = &self.abi.functions;
        let function = match self.device {
            Device::Cpu => functions.cpu_randint,
            Device::Cuda(_) => functions.cuda_randint,
        };
        let function = function.ok_or_else(|| {
            Error::unsupported("this PyTorch draws no numbers through its C interface")
        })?;
        let handle = self.own_handle()?;
        // SAFETY: a tensor and its sizes.
        let code =
            unsafe { function(handle, low, high, self.sizes.as_ptr(), self.sizes.len() as i64) };
        self.abi.checked(code, "drawing random numbers")
    }

    /// The address of its first element.
    ///
    /// # Errors
    /// PyTorch's, for tensors without memory.
    pub fn address(&self) -> Result<u64> {
        if self.handle.is_null() {
            return Ok(self.known);
        }
        let mut address = null_mut();
        // SAFETY: a tensor, and a place for an address.
        let code = unsafe { (self.abi.functions.get_data_ptr)(self.handle, &mut address) };
        self.abi.checked(code, "asking for a tensor's memory")?;
        Ok(address as u64)
    }

    /// Another reference to the same tensor.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn share(&self) -> Result<Tensor> {
        let (own, mut handle) = (self.own_handle()?, null_mut());
        // SAFETY: a tensor, and a place for the new reference.
        let code = unsafe { (self.abi.functions.new_handle)(own, &mut handle) };
        self.abi.checked(code, "sharing a tensor")?;
        let (abi, dtype, device) = (self.abi, self.dtype, self.device);
        let (sizes, strides) = (self.sizes.clone(), self.strides.clone());
        Ok(Tensor { abi, handle, known: 0, dtype, device, sizes, strides })
    }

    /// A row-major tensor in the memory of this one, so many bytes behind its beginning. It holds nothing: this one must be kept for
    /// as long as it is used.
    ///
    /// # Errors
    /// Our bug where it would reach beyond the end of this one, which must be row-major; PyTorch's.
    pub fn part(&self, behind: u64, sizes: &[i64], dtype: DType) -> Result<Tensor> {
        let bytes = |elements: i64, dtype: DType| elements.unsigned_abs() * dtype.size() as u64;
        let end = behind + bytes(sizes.iter().product(), dtype);
        if !self.is_contiguous() || end > bytes(self.elements(), self.dtype()?) {
            return Err(Error::bug(format!("{end} bytes of {self:?}")));
        }
        let code = self.abi.code(dtype)?;
        let known = self.address()? + behind;
        let (sizes, strides) = (Axes::from_slice(sizes), contiguous_strides(sizes));
        Ok(Tensor::borrowed(self.abi, known, code, self.device, sizes, strides))
    }

    /// A tensor that somebody else holds for as long as this is used.
    pub(crate) fn borrowed(
        abi: &'static Abi,
        known: u64,
        dtype: i32,
        device: Device,
        sizes: Axes,
        strides: Axes,
    ) -> Tensor {
        Tensor { abi, handle: null_mut(), known, dtype, device, sizes, strides }
    }

    /// The reference; a borrowed tensor has none.
    pub(crate) fn handle(&self) -> Option<TensorHandle> {
        (!self.handle.is_null()).then_some(self.handle)
    }

    fn own_handle(&self) -> Result<TensorHandle> {
        self.handle().ok_or_else(|| Error::bug("a borrowed tensor where a reference is needed"))
    }

    /// Gives the reference to somebody else.
    pub(crate) fn into_handle(mut self) -> Result<TensorHandle> {
        self.own_handle()?;
        Ok(std::mem::replace(&mut self.handle, null_mut()))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: our reference, used for the last time.
            let _ = unsafe { (self.abi.functions.delete_tensor)(self.handle) };
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {:?})", self.sizes, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::contiguous_strides;

    #[test]
    fn strides_are_row_major() {
        assert_eq!(contiguous_strides(&[2, 3, 4])[..], [12, 4, 1]);
        assert_eq!(contiguous_strides(&[2, 0, 4])[..], [4, 4, 1]);
        assert!(contiguous_strides(&[]).is_empty());
    }
}
