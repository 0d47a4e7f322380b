//! [`AlignedBuffer`]: zeroed memory aligned to cache lines.
//!
//! Large buffers are mappings, which ask for large pages: weights and intermediate results are walked from
//! end to end, and with pages of 4 KiB each of them costs a look into the page tables. Their pages are cleared
//! by the system when they are first written to, by whichever thread does that. Many small buffers that live
//! equally long share one mapping: see [`AlignedBuffer::many`].

use memmap2::{MmapMut, MmapOptions};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;
use tilewright_base::Result;
use tilewright_data::{check_memory, out_of_memory};

/// Owned bytes at an address that is a multiple of 64, zero at first.
#[derive(Debug)]
pub struct AlignedBuffer {
    ptr: NonNull<u8>,
    len: usize,
    /// What keeps the memory, where it is a mapping or a piece of one.
    mapped: Option<Arc<MmapMut>>,
}

/// Bytes from which on a buffer is a mapping: two large pages.
const MAPPED_FROM: usize = 2 * LARGE_PAGE;

/// Size of a large page of x86-64.
const LARGE_PAGE: usize = 2 << 20;

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
        if len >= MAPPED_FROM {
            let (map, ptr) = mapping(len).ok_or_else(failed)?;
            return Ok(AlignedBuffer { ptr, len, mapped: Some(Arc::new(map)) });
        }
        let layout = Self::layout(len).ok_or_else(failed)?;
        // SAFETY: the layout's size is not zero (at least one cache line).
        let ptr = unsafe { alloc_zeroed(layout) };
        Ok(AlignedBuffer { ptr: NonNull::new(ptr).ok_or_else(failed)?, len, mapped: None })
    }

    /// Buffers of these lengths, next to each other in one mapping where they are large together. Errors when
    /// they cannot be had.
    pub fn many(lens: &[usize], what: &str) -> Result<Vec<AlignedBuffer>> {
        let mut total = 0_usize;
        let mut starts = Vec::with_capacity(lens.len());
        for &len in lens {
            starts.push(total);
            let end = total.checked_add(len).and_then(|e| e.checked_next_multiple_of(Self::ALIGN));
            total = end.ok_or_else(|| out_of_memory(usize::MAX, what))?;
        }
        if total < MAPPED_FROM {
            return lens.iter().map(|&len| AlignedBuffer::new(len, what)).collect();
        }
        check_memory(total, what)?;
        let (map, base) = mapping(total).ok_or_else(|| out_of_memory(total, what))?;
        let map = Arc::new(map);
        let pieces = starts.into_iter().zip(lens).map(|(start, &len)| {
            // SAFETY: `start + len` is at most `total`, the mapping's length, so the address stays inside it or
            // one past its end. Pieces do not overlap, so each is its buffer's alone.
            let ptr = unsafe { base.add(start) };
            AlignedBuffer { ptr, len, mapped: Some(map.clone()) }
        });
        Ok(pieces.collect())
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
        if self.mapped.is_some() {
            return;
        }
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `new` with the same layout (it is no mapping), and never freed before.
            unsafe { dealloc(self.ptr.as_ptr(), layout) }
        }
    }
}

/// A mapping of at least `len` zero bytes in whole large pages, and where it begins: at a page, so at a cache line.
fn mapping(len: usize) -> Option<(MmapMut, NonNull<u8>)> {
    // Linux puts a mapping at a large page's beginning when its length is a multiple of one.
    let whole = len.checked_next_multiple_of(LARGE_PAGE)?;
    let mut map = MmapOptions::new().len(whole).map_anon().ok()?;
    // The system may refuse, and nothing depends on it.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let ptr = NonNull::new(map.as_mut_ptr())?;
    Some((map, ptr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_buffers_are_zero_aligned_and_writable() {
        for len in [0, 1, 4096, MAPPED_FROM - 1, MAPPED_FROM, MAPPED_FROM + 77] {
            let mut buffer = AlignedBuffer::new(len, "a test").unwrap();
            assert_eq!((buffer.len(), buffer.is_empty()), (len, len == 0));
            assert_eq!(buffer.as_ptr().addr() % 64, 0);
            assert!(buffer.bytes().iter().all(|&b| b == 0));
            buffer.bytes_mut().fill(7);
            assert!(buffer.bytes().iter().all(|&b| b == 7));
            assert_eq!(buffer.mapped.is_some(), len >= MAPPED_FROM);
        }
    }

    #[test]
    fn many_buffers_do_not_overlap() {
        for lens in [vec![3, 0, 64, 65], vec![MAPPED_FROM, 1, 0, 100, 3000]] {
            let mut all = AlignedBuffer::many(&lens, "a test").unwrap();
            for (i, buffer) in all.iter_mut().enumerate() {
                assert_eq!((buffer.len(), buffer.as_ptr().addr() % 64), (lens[i], 0));
                assert!(buffer.bytes().iter().all(|&b| b == 0));
                buffer.bytes_mut().fill(i as u8 + 1);
            }
            // One that goes first leaves the others their memory.
            all.remove(0);
            for (i, buffer) in all.iter().enumerate() {
                assert!(buffer.bytes().iter().all(|&b| b == i as u8 + 2));
            }
        }
    }
}
