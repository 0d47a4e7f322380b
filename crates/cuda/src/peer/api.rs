//! cuBLASLt's functions, opened when first asked for. Types and numbers are those of `cublasLt.h`
//! (CUDA 13); handles and descriptors are opaque pointers, and result codes plain numbers.

use crate::find;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tilewright_base::{Error, Result};

/// An opaque handle or descriptor.
pub(super) type Handle = *mut c_void;

/// `cublasLtMatmulAlgo_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Heuristic {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
    pub(super) state: c_int,
    pub(super) waves: f32,
    reserved: [c_int; 4],
}

/// `CUBLAS_STATUS_NOT_SUPPORTED`.
pub(super) const NOT_SUPPORTED: c_int = 15;

/// `cublasComputeType_t`.
pub(super) mod compute {
    pub(in super::super) const F32: i32 = 68;
    pub(in super::super) const TF32: i32 = 77;
    pub(in super::super) const I32: i32 = 72;
}

/// `cublasLtMatmulDescAttributes_t`.
pub(super) mod matmul {
    pub(in super::super) const TRANS_A: i32 = 3;
    pub(in super::super) const TRANS_B: i32 = 4;
    pub(in super::super) const A_SCALE: i32 = 17;
    pub(in super::super) const B_SCALE: i32 = 18;
    pub(in super::super) const FAST_ACCUMULATION: i32 = 25;
}

/// `cublasLtMatrixLayoutAttribute_t`.
pub(super) mod matrix {
    pub(in super::super) const BATCH_COUNT: i32 = 5;
    pub(in super::super) const BATCH_STRIDE: i32 = 6;
}

/// `cublasLtMatmulPreferenceAttributes_t`.
pub(super) mod preference {
    pub(in super::super) const WORKSPACE_BYTES: i32 = 1;
    pub(in super::super) const ALIGNMENT_A: i32 = 5;
    pub(in super::super) const ALIGNMENT_B: i32 = 6;
    pub(in super::super) const ALIGNMENT_C: i32 = 7;
    pub(in super::super) const ALIGNMENT_D: i32 = 8;
}

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),* $(,)?) -> $result:ty;)*) => {
        /// The functions.
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            pub(super) path: PathBuf,
            /// The functions above are valid as long as it is open.
            _library: Library,
        }

        impl Api {
            fn load(library: Library, path: &Path) -> Result<Api, String> {
                $(
                    // SAFETY: the type is the one of `cublasLt.h` for this symbol, enumerations
                    // being ints there.
                    let $field = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol.as_bytes())
                    };
                    let $field = *$field
                        .map_err(|_| format!("{} has no function {}", path.display(), $symbol))?;
                )*
                Ok(Api { $($field,)* path: path.to_owned(), _library: library })
            }
        }
    };
}

functions! {
    create = "cublasLtCreate" (*mut Handle) -> c_int;
    destroy = "cublasLtDestroy" (Handle) -> c_int;
    version = "cublasLtGetVersion" () -> usize;
    status_name = "cublasLtGetStatusName" (c_int) -> *const c_char;
    matmul_create = "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int) -> c_int;
    matmul_destroy = "cublasLtMatmulDescDestroy" (Handle) -> c_int;
    matmul_set = "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize) -> c_int;
    matrix_create = "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64) -> c_int;
    matrix_destroy = "cublasLtMatrixLayoutDestroy" (Handle) -> c_int;
    matrix_set = "cublasLtMatrixLayoutSetAttribute" (Handle, c_int, *const c_void, usize) -> c_int;
    preference_create = "cublasLtMatmulPreferenceCreate" (*mut Handle) -> c_int;
    preference_destroy = "cublasLtMatmulPreferenceDestroy" (Handle) -> c_int;
    preference_set = "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize) -> c_int;
    heuristic = "cublasLtMatmulAlgoGetHeuristic" (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int) -> c_int;
    run = "cublasLtMatmul" (Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void, Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle) -> c_int;
}

/// The library, opened once per process.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api>> = OnceLock::new();
    API.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Api> {
    let mut failures = Vec::new();
    for path in find::cublaslt() {
        // SAFETY: NVIDIA's library; opening it runs what every program that links it runs.
        let opened = unsafe { Library::new(&path) }.map_err(|e| find::reason(&path, &e));
        match opened.and_then(|library| Api::load(library, &path)) {
            Ok(api) => return Ok(api),
            Err(failure) => failures.push(failure),
        }
    }
    let error = match std::env::var(find::CUBLASLT_VARIABLE) {
        Ok(given) if !given.is_empty() => {
            Error::user(format!("{} names no cuBLASLt: {given}", find::CUBLASLT_VARIABLE))
        }
        _ => Error::unsupported("cuBLASLt was not found").with_hint(format!(
            "install the CUDA toolkit, or `pip install nvidia-cublas`, or set {}",
            find::CUBLASLT_VARIABLE
        )),
    };
    Err(failures.into_iter().fold(error, Error::with_note))
}

impl Api {
    /// Whether a call succeeded; what it refuses as not supported is unsupported, the rest a bug.
    pub(super) fn check(&self, code: c_int, doing: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: takes any number, gives a static text, or null.
        let name = unsafe {
            let name = (self.status_name)(code);
            if name.is_null() { "unknown".into() } else { CStr::from_ptr(name).to_string_lossy() }
        };
        let message = format!("cuBLASLt: {name} ({code})");
        let error =
            if code == NOT_SUPPORTED { Error::unsupported(message) } else { Error::bug(message) };
        Err(error.with_context(doing.to_owned()))
    }
}
