//! [`AlignedBuffer`]: zeroed memory aligned to cache lines; and whether memory can be had at all.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use tilewright_base::{Error, Result};

/// Requests below this are not checked: asking the system takes longer than getting them.
const UNCHECKED_BYTES: usize = 256 << 20;

/// Errors when `bytes` do not fit the memory that is left. The system grants more than it has and
/// ends the process when it is used, so large requests ask first.
pub fn check_memory(bytes: usize, what: &str) -> Result<()> {
    let enough = bytes < UNCHECKED_BYTES || available_bytes().is_none_or(|left| bytes <= left);
    if enough { Ok(()) } else { Err(out_of_memory(bytes, what)) }
}

fn out_of_memory(bytes: usize, what: &str) -> Error {
    Error::user(format!("out of memory: {what} takes {bytes} bytes"))
        .with_hint("use smaller sizes, or a machine with more memory")
}

/// What the system, or the control group that this process lives in, has left; `None` when neither
/// says.
fn available_bytes() -> Option<usize> {
    let read = |file: &str| std::fs::read_to_string(file).ok();
    let number = |file: &str| read(file)?.trim().parse::<usize>().ok();
    let system = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
        line.split_ascii_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)
    });
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(max, current)| {
            // Cached files count as used, but give way.
            let stat = read("/sys/fs/cgroup/memory.stat").unwrap_or_default();
            let file = stat.lines().find_map(|l| l.strip_prefix("file ")?.parse::<usize>().ok());
            max.saturating_sub(current.saturating_sub(file.unwrap_or(0)))
        });
    match (system, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Owned bytes at an address that is a multiple of 64, zero at first.
#[derive(Debug)]
pub struct AlignedBuffer {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory and hands out access only through `&self`/`&mut self` or raw
// pointers whose users state their own argument.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    const ALIGN: usize = 64;

    fn layout(len: usize) -> Option<Layout> {
        // One cache line of slack, so that no buffer is of size zero.
        Layout::from_size_align(len.checked_add(Self::ALIGN)?, Self::ALIGN).ok()
    }

    /// `len` zero bytes. Errors when they cannot be had.
    pub fn new(len: usize, what: &str) -> Result<AlignedBuffer> {
        let failed = || out_of_memory(len, what);
        check_memory(len, what)?;
        let layout = Self::layout(len).ok_or_else(failed)?;
        // SAFETY: the layout's size is not zero (at least one cache line).
        let ptr = unsafe { alloc_zeroed(layout) };
        Ok(AlignedBuffer { ptr: NonNull::new(ptr).ok_or_else(failed)?, len })
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len` bytes, initialised (zeroed) at allocation.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `new` with the same layout, and never freed before.
            unsafe { dealloc(self.ptr.as_ptr(), layout) }
        }
    }
}
