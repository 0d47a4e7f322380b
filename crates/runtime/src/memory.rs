//! [`AlignedBuffer`]: zeroed memory aligned to cache lines.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use tilewright_base::Result;
use tilewright_data::{check_memory, out_of_memory};

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
