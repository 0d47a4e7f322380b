//! [`ArrayCode`]: machine code of a scalar function over arrays, behind a safe call.

use crate::pool::Pool;
use crate::session::entry;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_jit::Library;

/// Compiled `out[i] = f(args[0][i], args[1][i], ...)` for `i < n`: `(args, out, n)`.
type ArrayFn = unsafe extern "C" fn(*const *const u8, *mut u8, i64);

/// [`ArrayFn`] in LLVM's words.
const ARRAY_SIGNATURE: &str = "void (ptr, ptr, i64)";

/// Elements that one call of the code computes: small enough to share among threads, large enough
/// that a call costs nothing, and a multiple of every vector's lanes.
const BLOCK: usize = 16 << 10;

/// Machine code of a scalar function over arrays, with the types that it reads and writes.
pub struct ArrayCode {
    entry: ArrayFn,
    params: Vec<DType>,
    result: DType,
    /// Keeps the code mapped.
    _library: Arc<Library>,
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
    /// Function `number` of a library, the code of a scalar function of these types. Errors when
    /// there is no such function or it does not run over arrays.
    pub fn from_library(
        library: &Arc<Library>,
        number: usize,
        params: Vec<DType>,
        result: DType,
    ) -> Result<ArrayCode> {
        let address = entry(library, number, ARRAY_SIGNATURE)?;
        // SAFETY: the function has the parameters and the result of `ArrayFn` (checked above), and
        // `library` keeps it mapped. That it reads `n` elements of each parameter and writes `n`
        // results is the contract of the emitter, whose texts are all that this process compiles.
        let entry = unsafe { std::mem::transmute::<*const (), ArrayFn>(address) };
        Ok(ArrayCode { entry, params, result, _library: library.clone() })
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
