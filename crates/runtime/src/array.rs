//! [`ArrayCode`]: machine code of a scalar function over arrays, behind a safe call.

use crate::pool::Pool;
use std::any::Any;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;

/// Compiled `out[i] = f(args[0][i], args[1][i], ...)` for `i < n`: `(args, out, n)`.
pub type ArrayFn = unsafe extern "C" fn(*const *const u8, *mut u8, i64);

/// Elements that one call of the code computes: small enough to share among threads, large enough
/// that a call costs nothing, and a multiple of every vector's lanes.
const BLOCK: usize = 16 << 10;

/// Machine code of a scalar function over arrays, with the types that it reads and writes.
pub struct ArrayCode {
    entry: ArrayFn,
    params: Vec<DType>,
    result: DType,
    /// Keeps the code mapped.
    _owner: Arc<dyn Any + Send + Sync>,
}

/// An address that threads may share: they write disjoint parts behind it.
struct Address(*mut u8);

// SAFETY: only `ArrayCode::run` makes one, and its threads write disjoint blocks behind it.
unsafe impl Sync for Address {}

impl Address {
    /// A method, so that closures capture the whole (which is `Sync`) and not the field.
    fn at(&self, bytes: usize) -> *mut u8 {
        self.0.wrapping_add(bytes)
    }
}

impl ArrayCode {
    /// Machine code that `owner` keeps mapped.
    ///
    /// # Safety
    /// `entry` must follow [`ArrayFn`], read `n` elements of each of `params` and write `n` elements
    /// of `result`, touch nothing else, stay valid while `owner` lives, and be callable from several
    /// threads on disjoint parts.
    pub unsafe fn new(
        entry: ArrayFn,
        params: Vec<DType>,
        result: DType,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> ArrayCode {
        ArrayCode { entry, params, result, _owner: owner }
    }

    /// Computes `out` from `args`, all of the same number of elements. Errors when types or counts
    /// do not fit.
    pub fn run(&self, pool: &Pool, args: &[Tensor], out: &mut Tensor) -> Result<()> {
        let count = out.len();
        let fits = args.len() == self.params.len()
            && args.iter().zip(&self.params).all(|(a, p)| a.dtype() == *p && a.len() == count)
            && out.dtype() == self.result
            && self.params.iter().chain([&self.result]).all(|d| d.bits() >= 8);
        if !fits {
            return Err(Error::bug("arrays that do not fit the function's parameters"));
        }
        let size = self.result.size();
        let address = Address(out.bytes_mut().as_mut_ptr());
        pool.run(count.div_ceil(BLOCK) as i64, &|first, last, _| {
            let (start, end) = (first as usize * BLOCK, (last as usize * BLOCK).min(count));
            let pointers: Vec<*const u8> =
                args.iter().map(|a| a.bytes()[start * a.dtype().size()..].as_ptr()).collect();
            // SAFETY: the types and counts were checked above, `start..end` lies inside every
            // array, and the pool hands out disjoint ranges; `out` is borrowed mutably, so no
            // argument shares its memory.
            unsafe {
                (self.entry)(pointers.as_ptr(), address.at(start * size), (end - start) as i64);
            }
        });
        Ok(())
    }
}
