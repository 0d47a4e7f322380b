//! NVRTC's functions, opened from a path.
//!
//! A function pointer per row; a library without one of them is refused when it is opened. Result
//! codes are plain numbers, because a newer library may know codes that this list does not.

use crate::find;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use tilewright_base::{Error, Result};

type Program = *mut c_void;

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The library and its functions.
        pub(super) struct Api {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
            pub(super) path: PathBuf,
            pub(super) version: (u32, u32),
            /// The functions above are valid as long as these are open.
            _libraries: Vec<Library>,
        }

        fn functions(library: Library, mut kept: Vec<Library>, path: &Path) -> Result<Api, String> {
            let missing = |symbol: &str| format!("{} has no function {symbol}", path.display());
            $(
                // SAFETY: the type is the one in NVIDIA's nvrtc.h, which has not changed since the
                // function exists.
                let $field = unsafe {
                    library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol.as_bytes())
                };
                let $field = *$field.map_err(|_| missing($symbol))?;
            )*
            kept.push(library);
            Ok(Api { $($field,)* path: path.to_owned(), version: (0, 0), _libraries: kept })
        }
    };
}

functions! {
    version_of = "nvrtcVersion" (*mut c_int, *mut c_int) -> c_int;
    error_string = "nvrtcGetErrorString" (c_int) -> *const c_char;
    create = "nvrtcCreateProgram" (*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int;
    destroy = "nvrtcDestroyProgram" (*mut Program) -> c_int;
    compile = "nvrtcCompileProgram" (Program, c_int, *const *const c_char) -> c_int;
    cubin_size = "nvrtcGetCUBINSize" (Program, *mut usize) -> c_int;
    cubin = "nvrtcGetCUBIN" (Program, *mut c_char) -> c_int;
    ptx_size = "nvrtcGetPTXSize" (Program, *mut usize) -> c_int;
    ptx = "nvrtcGetPTX" (Program, *mut c_char) -> c_int;
    log_size = "nvrtcGetProgramLogSize" (Program, *mut usize) -> c_int;
    log = "nvrtcGetProgramLog" (Program, *mut c_char) -> c_int;
    arch_count = "nvrtcGetNumSupportedArchs" (*mut c_int) -> c_int;
    archs = "nvrtcGetSupportedArchs" (*mut c_int) -> c_int;
}

/// What a compilation gives: the log always, the rest when it succeeded.
pub(super) struct Output {
    pub(super) log: String,
    pub(super) code: Result<(Vec<u8>, String), String>,
}

impl Api {
    /// The first library of [`find::nvrtc`] that opens.
    pub(super) fn open() -> Result<Api> {
        let candidates = find::nvrtc();
        let mut failures = Vec::new();
        for path in &candidates {
            match Api::open_at(path) {
                Ok(api) => return Ok(api),
                Err(failure) => failures.push(failure),
            }
        }
        let error = match std::env::var(find::NVRTC_VARIABLE) {
            Ok(given) if !given.is_empty() => {
                Error::user(format!("{} names no NVRTC: {given}", find::NVRTC_VARIABLE))
            }
            _ => Error::unsupported("NVRTC, NVIDIA's run-time compiler, was not found").with_hint(
                format!(
                    "install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc`, or set {}",
                    find::NVRTC_VARIABLE
                ),
            ),
        };
        Err(failures.into_iter().fold(error, Error::with_note))
    }

    fn open_at(path: &Path) -> Result<Api, String> {
        let mut kept = Vec::new();
        for part in find::nvrtc_builtins(path) {
            // SAFETY: NVIDIA's library; what it runs when it is opened is what NVRTC would run.
            kept.extend(unsafe { Library::new(part) });
        }
        // SAFETY: as above. A file of another kind is refused by the loader or by `functions`.
        let library = unsafe { Library::new(path) }.map_err(|e| find::reason(path, &e))?;
        let mut api = functions(library, kept, path)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two places for an int each.
        let code = unsafe { (api.version_of)(&mut major, &mut minor) };
        api.check(code)?;
        api.version = (major.unsigned_abs(), minor.unsigned_abs());
        Ok(api)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: takes any number, gives a static text (or null, which is checked).
        let text = unsafe {
            let text = (self.error_string)(code);
            if text.is_null() { None } else { Some(CStr::from_ptr(text)) }
        };
        Err(text.map_or_else(|| format!("NVRTC error {code}"), |t| t.to_string_lossy().into()))
    }

    /// Numbers of the architectures that the library compiles for: 80, 90, 100.
    pub(super) fn architectures(&self) -> Result<Vec<i32>, String> {
        let mut count = 0;
        // SAFETY: a place for an int.
        self.check(unsafe { (self.arch_count)(&mut count) })?;
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: room for as many as the library said.
        self.check(unsafe { (self.archs)(archs.as_mut_ptr()) })?;
        Ok(archs)
    }

    /// Compiles one program. An error is a failure of the call; one of the text is in the output.
    pub(super) fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        options: &[String],
    ) -> Result<Output, String> {
        let c = |text: &str| CString::new(text).map_err(|_| "a zero byte in the text".to_owned());
        let (name, source) = (c(name)?, c(source)?);
        let names = headers.iter().map(|h| c(h.0)).collect::<Result<Vec<_>, _>>()?;
        let texts = headers.iter().map(|h| c(h.1)).collect::<Result<Vec<_>, _>>()?;
        let options = options.iter().map(|o| c(o)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |list: &[CString]| list.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
        let (names_at, texts_at, options_at) =
            (pointers(&names), pointers(&texts), pointers(&options));
        let count = |n: usize| c_int::try_from(n).map_err(|_| "too many of them".to_owned());
        let mut program = Owned { api: self, raw: null_mut() };
        // SAFETY: zero-terminated texts and lists of them, all alive until the call returns (NVRTC
        // copies them); the counts are theirs.
        self.check(unsafe {
            (self.create)(
                &mut program.raw,
                source.as_ptr(),
                name.as_ptr(),
                count(names.len())?,
                texts_at.as_ptr(),
                names_at.as_ptr(),
            )
        })?;
        // SAFETY: a program, and a list of as many texts as said.
        let code =
            unsafe { (self.compile)(program.raw, count(options.len())?, options_at.as_ptr()) };
        let compiled = self.check(code);
        let log = self.bytes(program.raw, self.log_size, self.log)?;
        let code = match compiled {
            Err(e) => Err(e),
            Ok(()) => {
                let cubin = self.bytes(program.raw, self.cubin_size, self.cubin)?;
                Ok((cubin, text_of(self.bytes(program.raw, self.ptx_size, self.ptx)?)))
            }
        };
        Ok(Output { log: text_of(log), code })
    }

    /// One of the results: ask for its size, then for it.
    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: a program, and a place for the size.
        self.check(unsafe { size(program, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: room for as many bytes as the library said.
        self.check(unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

/// A program of NVRTC, given back at the end.
struct Owned<'a> {
    api: &'a Api,
    raw: Program,
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by `create`, and nobody else has it.
            let _ = unsafe { (self.api.destroy)(&mut self.raw) };
        }
    }
}

/// Without the zero byte at its end.
fn text_of(mut bytes: Vec<u8>) -> String {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
