//! [`Buffer`]: bytes on the device, and [`PinnedBuffer`]: bytes on the host that the device copies
//! from and to by itself.
//!
//! A buffer comes from the device's pool in the order of a stream, and goes back in that order. Used
//! on another stream, an event must order the two, or the contents are arbitrary. They are bytes for
//! copying all the same: no host value depends on them being right.

use super::api::code;
use super::device::Gpu;
use super::stream::Stream;
use cudarc::driver::sys;
use std::ffi::c_void;
use std::fmt;
use std::ptr::{NonNull, null_mut};
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Bytes, Tensor};

/// Bytes on a device. Starts at a multiple of 256 bytes (the driver's rule for allocations).
pub struct Buffer {
    stream: Stream,
    address: sys::CUdeviceptr,
    len: usize,
}

impl Buffer {
    pub(super) fn new(stream: &Stream, len: usize, planned_bytes: Option<u64>) -> Result<Buffer> {
        if stream.is_capturing()? {
            return Err(Error::bug(
                "memory was asked for while recording a graph: allocate before, so that a replay allocates nothing",
            ));
        }
        if len == 0 {
            return Ok(Buffer { stream: stream.clone(), address: 0, len });
        }
        let gpu = stream.gpu();
        // Kernels read whole units of 16 bytes at the ends of lines that are not aligned.
        let taken = len.checked_next_multiple_of(16).unwrap_or(len);
        let allocate = || {
            let mut address = 0;
            // SAFETY: a place for the address; our pool and stream, and the context is current.
            let code = unsafe {
                (gpu.0.api.mem_alloc_from_pool)(&mut address, taken, gpu.0.pool, stream.0.raw)
            };
            (code, address)
        };
        let (mut result, mut address) = allocate();
        if result == code::OUT_OF_MEMORY {
            // Memory that other streams are about to free becomes free.
            gpu.synchronize()?;
            (result, address) = allocate();
        }
        match result {
            0 => Ok(Buffer { stream: stream.clone(), address, len }),
            code::OUT_OF_MEMORY => Err(out_of_memory(gpu, len, planned_bytes)),
            other => Err(gpu.0.api.error(other, &format!("allocating {len} bytes on {gpu:?}"))),
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is, in the device's memory. 0 for an empty one.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The device it is on.
    pub fn gpu(&self) -> &Gpu {
        self.stream.gpu()
    }

    /// Sets every byte, in the order of the stream.
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<()> {
        if self.begin(stream)? {
            let api = self.gpu().0.api;
            // SAFETY: `len` bytes at the address are ours.
            let code = unsafe { (api.memset_d8)(self.address, byte, self.len, stream.0.raw) };
            api.check(code, "filling a buffer")?;
        }
        Ok(())
    }

    /// Sets every byte to 0.
    pub fn zero(&self, stream: &Stream) -> Result<()> {
        self.fill(stream, 0)
    }

    /// Sets every byte to 0xff: a NaN in every floating-point format, and an index out of range. What
    /// a kernel forgets to write shows.
    pub fn poison(&self, stream: &Stream) -> Result<()> {
        self.fill(stream, 0xff)
    }

    /// Copies all of the host's bytes here. Waits until it is done.
    pub fn write(&self, stream: &Stream, bytes: &[u8]) -> Result<()> {
        self.same_len(bytes.len())?;
        if self.begin(stream)? {
            let api = self.gpu().0.api;
            // SAFETY: `len` bytes at either place, and the borrow lasts until the end of the copy,
            // which is waited for below.
            let code = unsafe {
                (api.memcpy_htod)(self.address, bytes.as_ptr().cast(), self.len, stream.0.raw)
            };
            finish(stream, code, "copying to the device")?;
        }
        Ok(())
    }

    /// Copies all bytes to the host. Waits until it is done, and so for all earlier work.
    pub fn read(&self, stream: &Stream, bytes: &mut [u8]) -> Result<()> {
        self.same_len(bytes.len())?;
        if self.begin(stream)? {
            let api = self.gpu().0.api;
            // SAFETY: `len` bytes at either place; the exclusive borrow lasts until the end of the
            // copy, which is waited for below.
            let code = unsafe {
                (api.memcpy_dtoh)(bytes.as_mut_ptr().cast(), self.address, self.len, stream.0.raw)
            };
            finish(stream, code, "copying from the device")?;
        }
        Ok(())
    }

    /// Copies the host's bytes to `offset` and what follows. Waits until it is done.
    pub fn write_at(&self, stream: &Stream, offset: usize, bytes: &[u8]) -> Result<()> {
        self.inside(offset, bytes.len())?;
        if self.begin(stream)? && !bytes.is_empty() {
            let api = self.gpu().0.api;
            let to = self.address + offset as u64;
            // SAFETY: the bytes from `offset` on are ours (checked above), and the borrow lasts until
            // the end of the copy, which is waited for below.
            let code =
                unsafe { (api.memcpy_htod)(to, bytes.as_ptr().cast(), bytes.len(), stream.0.raw) };
            finish(stream, code, "copying to the device")?;
        }
        Ok(())
    }

    /// Copies the bytes from `offset` on to the host. Waits until it is done, and so for all earlier work.
    pub fn read_at(&self, stream: &Stream, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.inside(offset, bytes.len())?;
        if self.begin(stream)? && !bytes.is_empty() {
            let api = self.gpu().0.api;
            let from = self.address + offset as u64;
            // SAFETY: the bytes from `offset` on are ours (checked above); the exclusive borrow lasts
            // until the end of the copy, which is waited for below.
            let code = unsafe {
                (api.memcpy_dtoh)(bytes.as_mut_ptr().cast(), from, bytes.len(), stream.0.raw)
            };
            finish(stream, code, "copying from the device")?;
        }
        Ok(())
    }

    /// All bytes, on the host.
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        self.read(stream, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes of a host tensor.
    pub fn of_tensor(stream: &Stream, tensor: &Tensor) -> Result<Buffer> {
        stream.upload(tensor.bytes())
    }

    /// The bytes as a host tensor; type and shape must fit the length.
    pub fn to_tensor(&self, stream: &Stream, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(dtype, shape, Bytes::copy_from(&self.to_vec(stream)?))
    }

    /// Copies all bytes of another buffer here, in the order of the stream.
    pub fn copy_from(&self, stream: &Stream, other: &Buffer) -> Result<()> {
        self.same_len(other.len)?;
        stream.same_gpu(other.gpu())?;
        if self.begin(stream)? {
            let api = self.gpu().0.api;
            // SAFETY: `len` bytes at either address are a buffer's. Dropping a buffer frees it in
            // the order of its own stream; with another one, see the head of this file.
            let code =
                unsafe { (api.memcpy_dtod)(self.address, other.address, self.len, stream.0.raw) };
            api.check(code, "copying on the device")?;
        }
        Ok(())
    }

    /// Copies from pinned memory without waiting: in the order of the stream.
    ///
    /// # Safety
    /// Until the stream has done the copy, `host` is neither dropped nor written.
    pub unsafe fn write_async(&self, stream: &Stream, host: &PinnedBuffer) -> Result<()> {
        self.same_len(host.len)?;
        if self.begin(stream)? {
            let api = self.gpu().0.api;
            // SAFETY: `len` bytes at either place; the caller keeps the host's until the end.
            let code = unsafe {
                (api.memcpy_htod)(self.address, host.data.as_ptr().cast(), self.len, stream.0.raw)
            };
            api.check(code, "copying to the device")?;
        }
        Ok(())
    }

    /// Copies to pinned memory without waiting: in the order of the stream.
    ///
    /// # Safety
    /// Until the stream has done the copy, `host` is neither dropped, read nor written.
    pub unsafe fn read_async(&self, stream: &Stream, host: &mut PinnedBuffer) -> Result<()> {
        self.same_len(host.len)?;
        if self.begin(stream)? {
            let api = self.gpu().0.api;
            // SAFETY: `len` bytes at either place; the caller keeps away from the host's until the end.
            let code = unsafe {
                (api.memcpy_dtoh)(host.data.as_ptr().cast(), self.address, self.len, stream.0.raw)
            };
            api.check(code, "copying from the device")?;
        }
        Ok(())
    }

    /// Checks the device and makes it current; false when there is nothing to do.
    fn begin(&self, stream: &Stream) -> Result<bool> {
        stream.same_gpu(self.gpu())?;
        self.gpu().make_current()?;
        Ok(self.len > 0)
    }

    fn inside(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        Err(Error::bug(format!("{len} bytes at {offset} of a buffer of {} bytes", self.len)))
    }

    fn same_len(&self, other: usize) -> Result<()> {
        if self.len == other {
            return Ok(());
        }
        Err(Error::bug(format!("a copy between a buffer of {} bytes and {other} bytes", self.len)))
    }
}

/// Waits for a copy from or to the host, whatever came of starting it: no pointer outlives its borrow.
fn finish(stream: &Stream, code: i32, doing: &str) -> Result<()> {
    let started = stream.gpu().0.api.check(code, doing);
    let done = stream.synchronize();
    started.and(done)
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.address != 0 {
            self.stream.free(self.address);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes at {:#x})", self.len, self.address)
    }
}

fn out_of_memory(gpu: &Gpu, asked: usize, planned: Option<u64>) -> Error {
    let memory = gpu.memory().ok();
    memory_error(&format!("{gpu:?}"), asked as u64, planned, memory)
}

/// The words for memory that did not suffice: asked, free, total, planned.
fn memory_error(
    device: &str,
    asked: u64,
    planned: Option<u64>,
    memory: Option<super::device::DeviceMemory>,
) -> Error {
    let mut error =
        Error::unsupported(format!("out of memory on {device}: {} asked for", mib(asked)));
    if let Some(memory) = memory {
        error = error
            .with_note(format!("{} free of {}", mib(memory.free_bytes), mib(memory.total_bytes)))
            .with_note(format!(
                "{} held by this process's buffers, {} kept for the next ones",
                mib(memory.used_bytes),
                mib(memory.pool_bytes.saturating_sub(memory.used_bytes))
            ));
    }
    if let Some(planned) = planned {
        error = error.with_note(format!("{} planned in all", mib(planned)));
    }
    error.with_hint("a smaller batch or sequence needs less; `nvidia-smi` shows who holds the rest")
}

fn mib(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1.0 { format!("{bytes} bytes") } else { format!("{mib:.1} MiB") }
}

/// Bytes on the host at a fixed place, which the device reads and writes by itself: copies are
/// faster than from ordinary memory, and need not be waited for.
pub struct PinnedBuffer {
    gpu: Gpu,
    data: NonNull<u8>,
    len: usize,
}

// SAFETY: the only owner of ordinary, process-wide memory, like a boxed slice.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access is reading only.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// New bytes, all zero.
    pub fn zeroed(gpu: &Gpu, len: usize) -> Result<PinnedBuffer> {
        gpu.make_current()?;
        let mut data: *mut c_void = null_mut();
        if len > 0 {
            // SAFETY: a place for the address; the context is current.
            let code = unsafe { (gpu.0.api.mem_host_alloc)(&mut data, len, 0) };
            gpu.0.api.check(code, &format!("allocating {len} bytes of pinned memory"))?;
        }
        let data = NonNull::new(data.cast::<u8>()).unwrap_or(NonNull::dangling());
        // SAFETY: `len` bytes that nobody else knows.
        unsafe { data.as_ptr().write_bytes(0, len) };
        Ok(PinnedBuffer { gpu: gpu.clone(), data, len })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes; those who let the device write promise not to look.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    /// The bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.len > 0 {
            let _ = self.gpu.make_current();
            // SAFETY: from `mem_host_alloc`, used for the last time.
            let _ = unsafe { (self.gpu.0.api.mem_free_host)(self.data.as_ptr().cast()) };
        }
    }
}

impl fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBuffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::DeviceMemory;
    use super::*;

    #[test]
    fn the_error_says_what_was_asked_what_is_free_and_what_was_planned() {
        let memory = DeviceMemory {
            free_bytes: 3 << 20,
            total_bytes: 10 << 20,
            pool_bytes: 5 << 20,
            used_bytes: 4 << 20,
        };
        let error = memory_error("Gpu(0)", 8 << 20, Some(20 << 20), Some(memory));
        let text = format!("{error:?}");
        for part in [
            "8.0 MiB asked",
            "3.0 MiB free of 10.0 MiB",
            "4.0 MiB held",
            "1.0 MiB kept",
            "20.0 MiB planned",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(format!("{:?}", memory_error("Gpu(0)", 5, None, None)).contains("5 bytes asked"));
    }
}
