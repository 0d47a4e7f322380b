//! [`Stream`]: a queue of work, and [`Event`]: a point in it, with a time.

use super::device::Gpu;
use super::memory::Buffer;
use cudarc::driver::sys;
use std::fmt;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};
use tilewright_base::{Error, Result};

/// Does not wait for the legacy default stream.
const NON_BLOCKING: u32 = 1;

/// A queue of work on a device: what is put in is done in that order. Cheap to clone (the same
/// queue). Different streams run side by side; an [`Event`] orders them where it matters.
#[derive(Clone)]
pub struct Stream(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) gpu: Gpu,
    pub(super) raw: sys::CUstream,
    /// Whether the stream is somebody else's.
    borrowed: bool,
    /// Memory of buffers that were dropped while the stream was recording: freed after it.
    deferred: Mutex<Vec<sys::CUdeviceptr>>,
}

// SAFETY: a handle, which the driver takes on any thread; see `device::Inner`.
unsafe impl Send for Inner {}
// SAFETY: as above; the list has a lock.
unsafe impl Sync for Inner {}

impl Stream {
    pub(super) fn new(gpu: &Gpu) -> Result<Stream> {
        gpu.make_current()?;
        let mut raw = null_mut();
        // SAFETY: a place for the stream; the context is current.
        let code = unsafe { (gpu.0.api.stream_create)(&mut raw, NON_BLOCKING, 0) };
        gpu.0.api.check(code, "making a stream")?;
        Ok(Stream::of(gpu, raw, false))
    }

    fn of(gpu: &Gpu, raw: sys::CUstream, borrowed: bool) -> Stream {
        Stream(Arc::new(Inner { gpu: gpu.clone(), raw, borrowed, deferred: Mutex::default() }))
    }

    /// A stream of another library (its `CUstream` or `cudaStream_t`), to run our kernels in its order.
    ///
    /// # Safety
    /// It is a stream of this device's primary context (null is the legacy default stream), and lives
    /// as long as this and everything allocated on it.
    pub unsafe fn from_raw(gpu: &Gpu, raw: *mut std::ffi::c_void) -> Stream {
        Stream::of(gpu, raw.cast(), true)
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// The driver's handle (`CUstream`), for other libraries of this crate.
    pub(crate) fn raw_handle(&self) -> *mut std::ffi::c_void {
        self.0.raw.cast()
    }

    /// Waits until everything in the queue is done. The error of a kernel that failed shows here.
    pub fn synchronize(&self) -> Result<()> {
        self.0.gpu.make_current()?;
        // SAFETY: a stream, and its context is current.
        let code = unsafe { (self.0.gpu.0.api.stream_synchronize)(self.0.raw) };
        self.0.gpu.0.api.check(code, "waiting for a stream")
    }

    /// What comes after this in the queue waits for the event.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.same_gpu(&event.gpu)?;
        self.0.gpu.make_current()?;
        // SAFETY: a stream and an event, both alive.
        let code = unsafe { (self.0.gpu.0.api.stream_wait_event)(self.0.raw, event.raw, 0) };
        self.0.gpu.0.api.check(code, "making a stream wait")
    }

    /// A new event, recorded here: "done so far".
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(&self.0.gpu)?;
        event.record(self)?;
        Ok(event)
    }

    /// Runs `work` and gives the time between its first and its last operation on the device, in
    /// microseconds. Waits for the end.
    pub fn time_us(&self, work: impl FnOnce(&Stream) -> Result<()>) -> Result<f64> {
        let start = self.record()?;
        work(self)?;
        let end = self.record()?;
        end.synchronize()?;
        end.since_us(&start)
    }

    /// Memory on the device, not initialised. Free for use in the order of this stream.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Buffer::new(self, bytes, None)
    }

    /// [`alloc`](Self::alloc) as part of a plan: when memory does not suffice, the error also says
    /// how much the whole plan needs.
    pub fn alloc_planned(&self, bytes: usize, planned_bytes: u64) -> Result<Buffer> {
        Buffer::new(self, bytes, Some(planned_bytes))
    }

    /// Memory on the device with these bytes.
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.alloc(bytes.len())?;
        buffer.write(self, bytes)?;
        Ok(buffer)
    }

    /// Whether this is the same queue.
    pub fn same(&self, other: &Stream) -> bool {
        self.0.gpu.is(&other.0.gpu) && self.0.raw == other.0.raw
    }

    /// Whether the stream is recording a graph.
    pub fn is_capturing(&self) -> Result<bool> {
        self.0.gpu.make_current()?;
        let mut status = 0;
        // SAFETY: a stream, and a place for the status (an int).
        let code = unsafe { (self.0.gpu.0.api.stream_is_capturing)(self.0.raw, &mut status) };
        self.0.gpu.0.api.check(code, "asking a stream for its state")?;
        Ok(status != 0)
    }

    pub(super) fn same_gpu(&self, other: &Gpu) -> Result<()> {
        if self.0.gpu.is(other) {
            return Ok(());
        }
        let message = format!("a stream of {:?} was used with something of {other:?}", self.0.gpu);
        Err(Error::bug(message))
    }

    /// Frees memory in the order of the stream, or later when the stream is recording.
    pub(super) fn free(&self, address: sys::CUdeviceptr) {
        if self.is_capturing().unwrap_or(false) {
            self.0.deferred.lock().unwrap_or_else(PoisonError::into_inner).push(address);
        } else {
            self.free_now(address);
        }
    }

    /// Frees what was put off during a recording.
    pub(super) fn free_deferred(&self) {
        let list =
            std::mem::take(&mut *self.0.deferred.lock().unwrap_or_else(PoisonError::into_inner));
        for address in list {
            self.free_now(address);
        }
    }

    fn free_now(&self, address: sys::CUdeviceptr) {
        let _ = self.0.gpu.make_current();
        // SAFETY: the address is from the pool, and its only owner is being dropped. The driver hands
        // the memory out again only in the order of this stream.
        let _ = unsafe { (self.0.gpu.0.api.mem_free_async)(address, self.0.raw) };
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.borrowed {
            let _ = self.gpu.make_current();
            // SAFETY: our stream, used for the last time. The driver finishes the work in it first.
            let _ = unsafe { (self.gpu.0.api.stream_destroy)(self.raw) };
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.0.gpu)
    }
}

/// A point in a stream, with the time when the device reached it.
pub struct Event {
    gpu: Gpu,
    raw: sys::CUevent,
}

// SAFETY: a handle, which the driver takes on any thread; see `device::Inner`.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that is nowhere yet.
    pub fn new(gpu: &Gpu) -> Result<Event> {
        gpu.make_current()?;
        let mut raw = null_mut();
        // SAFETY: a place for the event; the context is current.
        let code = unsafe { (gpu.0.api.event_create)(&mut raw, 0) };
        gpu.0.api.check(code, "making an event")?;
        Ok(Event { gpu: gpu.clone(), raw })
    }

    /// Puts it at the present end of the stream; where it was before is forgotten.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        stream.same_gpu(&self.gpu)?;
        self.gpu.make_current()?;
        // SAFETY: an event and a stream, both alive.
        let code = unsafe { (self.gpu.0.api.event_record)(self.raw, stream.0.raw) };
        self.gpu.0.api.check(code, "recording an event")
    }

    /// Waits until the device has reached it.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.make_current()?;
        // SAFETY: an event.
        let code = unsafe { (self.gpu.0.api.event_synchronize)(self.raw) };
        self.gpu.0.api.check(code, "waiting for an event")
    }

    /// Time since an earlier event, in microseconds. Both must have been reached.
    pub fn since_us(&self, earlier: &Event) -> Result<f64> {
        self.gpu.make_current()?;
        let mut ms = 0f32;
        // SAFETY: a place for the time, and two events.
        let code = unsafe { (self.gpu.0.api.event_elapsed_time)(&mut ms, earlier.raw, self.raw) };
        self.gpu.0.api.check(code, "reading the time between two events")?;
        Ok(f64::from(ms) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.gpu.make_current();
        // SAFETY: our event, used for the last time.
        let _ = unsafe { (self.gpu.0.api.event_destroy)(self.raw) };
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:?})", self.gpu)
    }
}
