//! [`Lent`]: memory of somebody else, lent for writing.
//!
//! Results go straight to where the caller wants them (a tensor of another library) without a copy.
//! The one constructor is unsafe: it is the caller who knows that the memory is there.

/// Writable memory that somebody else owns.
#[derive(Debug)]
pub struct Lent {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: the lender promises (`Lent::new`) that nobody else touches the memory while this lives, so
// whichever thread has the `Lent` has the memory.
unsafe impl Send for Lent {}
// SAFETY: as above; through a shared `Lent` the memory is only read.
unsafe impl Sync for Lent {}

impl Lent {
    /// Takes `bytes` bytes at `address` on loan.
    ///
    /// # Safety
    /// While the result lives, `address` must point to `bytes` (not 0) readable and writable bytes that
    /// nobody else reads or writes.
    pub unsafe fn new(address: *mut u8, bytes: usize) -> Lent {
        Lent { address, bytes }
    }

    /// The memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the promise of `new`.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }

    /// The memory, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the promise of `new`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, Tensor};
    use std::sync::Arc;
    use tilewright_base::DType;

    #[test]
    fn writes_go_to_the_lender() {
        let mut memory = [0u8; 8];
        // SAFETY: `memory` outlives the loan and is not touched meanwhile.
        let lent = unsafe { Lent::new(memory.as_mut_ptr(), 8) };
        let mut tensor = Tensor::new(DType::F32, [2], Bytes::Lent(Arc::new(lent))).unwrap();
        tensor.bytes_mut().copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(tensor.shared_bytes().is_lent());
        // A second owner sees the values and writes elsewhere.
        let mut copy = tensor.clone();
        copy.bytes_mut()[0] = 9;
        drop((tensor, copy));
        assert_eq!(memory, [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
