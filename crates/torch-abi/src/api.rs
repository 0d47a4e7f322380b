//! [`Abi`]: PyTorch's functions, found by name in the loaded process.
//!
//! A row per function. Those of the first table must be there; those of the second came with later versions, or with the
//! CUDA build only.

use libloading::os::unix::{Library, RTLD_NOW, Symbol};
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;
use tilewright_base::{DType, Error, Result};

/// A tensor of PyTorch, owned.
pub(crate) type TensorHandle = *mut c_void;
pub(crate) type LibraryHandle = *mut c_void;
/// What an argument or a result is on the stack of a boxed kernel: a number or an address.
pub(crate) type StableValue = u64;
/// A kernel as the dispatcher calls it: stack, number of arguments, number of results.
pub(crate) type Boxed = unsafe extern "C-unwind" fn(*mut StableValue, u64, u64);

/// glibc's `RTLD_NOLOAD`: only a library that is there already.
const RTLD_NOLOAD: i32 = 4;

macro_rules! functions {
    (
        needed { $($field:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)* }
        wanted { $($later:ident = $later_symbol:literal ($($later_argument:ty),*) -> $later_result:ty;)* }
    ) => {
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            $(pub(crate) $later: Option<unsafe extern "C" fn($($later_argument),*) -> $later_result>,)*
            /// Throws PyTorch's exception when its first argument is false.
            pub(crate) check: unsafe extern "C-unwind" fn(bool, *const c_char, *const c_char, u32, *const c_char),
        }

        impl Functions {
            fn find(libraries: &[Library]) -> Result<Functions> {
                Ok(Functions {
                    $(
                        // SAFETY: the type is that of PyTorch's `shim.h`, whose functions keep theirs.
                        $field: *unsafe {
                            symbol::<unsafe extern "C" fn($($argument),*) -> $result>(libraries, $symbol)
                        }.ok_or_else(|| missing($symbol))?,
                    )*
                    $(
                        // SAFETY: as above.
                        $later: unsafe {
                            symbol::<unsafe extern "C" fn($($later_argument),*) -> $later_result>(libraries, $later_symbol)
                        }.map(|found| *found),
                    )*
                    // SAFETY: as above. It throws a C++ exception, hence the ABI that lets one pass.
                    check: *unsafe { symbol(libraries, "aoti_torch_check") }
                        .ok_or_else(|| missing("aoti_torch_check"))?,
                })
            }
        }
    };
}

functions! {
    needed {
        library_def = "aoti_torch_library_init_def" (*const c_char, *const c_char, u32, *mut LibraryHandle) -> i32;
        library_impl = "aoti_torch_library_init_impl" (*const c_char, *const c_char, *const c_char, u32, *mut LibraryHandle) -> i32;
        define = "aoti_torch_library_def" (LibraryHandle, *const c_char) -> i32;
        implement = "aoti_torch_library_impl" (LibraryHandle, *const c_char, Boxed) -> i32;
        get_dim = "aoti_torch_get_dim" (TensorHandle, *mut i64) -> i32;
        get_sizes = "aoti_torch_get_sizes" (TensorHandle, *mut *const i64) -> i32;
        get_strides = "aoti_torch_get_strides" (TensorHandle, *mut *const i64) -> i32;
        get_dtype = "aoti_torch_get_dtype" (TensorHandle, *mut i32) -> i32;
        get_layout = "aoti_torch_get_layout" (TensorHandle, *mut i32) -> i32;
        get_device_type = "aoti_torch_get_device_type" (TensorHandle, *mut i32) -> i32;
        get_device_index = "aoti_torch_get_device_index" (TensorHandle, *mut i32) -> i32;
        get_data_ptr = "aoti_torch_get_data_ptr" (TensorHandle, *mut *mut c_void) -> i32;
        empty_strided = "aoti_torch_empty_strided" (i64, *const i64, *const i64, i32, i32, i32, *mut TensorHandle) -> i32;
        copy = "aoti_torch_copy_" (TensorHandle, TensorHandle, i32) -> i32;
        zero = "aoti_torch_zero_" (TensorHandle) -> i32;
        new_handle = "aoti_torch_new_tensor_handle" (TensorHandle, *mut TensorHandle) -> i32;
        delete_tensor = "aoti_torch_delete_tensor_object" (TensorHandle) -> i32;
        list_size = "torch_list_size" (*mut c_void, *mut usize) -> i32;
        list_get = "torch_list_get_item" (*mut c_void, usize, *mut StableValue) -> i32;
        new_list = "torch_new_list_reserve_size" (usize, *mut *mut c_void) -> i32;
        list_push = "torch_list_push_back" (*mut c_void, StableValue) -> i32;
        delete_list = "torch_delete_list" (*mut c_void) -> i32;
        string_length = "torch_string_length" (*mut c_void, *mut usize) -> i32;
        string_text = "torch_string_c_str" (*mut c_void, *mut *const c_char) -> i32;
        delete_string = "torch_delete_string" (*mut c_void) -> i32;
        threads = "torch_get_num_threads" (*mut u32) -> i32;
        grad_enabled = "aoti_torch_grad_mode_is_enabled" () -> bool;
        cpu = "aoti_torch_device_type_cpu" () -> i32;
        cuda = "aoti_torch_device_type_cuda" () -> i32;
        strided = "aoti_torch_layout_strided" () -> i32;
        float64 = "aoti_torch_dtype_float64" () -> i32;
        float32 = "aoti_torch_dtype_float32" () -> i32;
        float16 = "aoti_torch_dtype_float16" () -> i32;
        bfloat16 = "aoti_torch_dtype_bfloat16" () -> i32;
        int64 = "aoti_torch_dtype_int64" () -> i32;
        int32 = "aoti_torch_dtype_int32" () -> i32;
        int16 = "aoti_torch_dtype_int16" () -> i32;
        int8 = "aoti_torch_dtype_int8" () -> i32;
        uint8 = "aoti_torch_dtype_uint8" () -> i32;
        boolean = "aoti_torch_dtype_bool" () -> i32;
    }
    wanted {
        delete_value = "torch_delete_stable_ivalue" (*mut StableValue) -> i32;
        exception = "torch_exception_get_what_without_backtrace" () -> *const c_char;
        cuda_stream = "aoti_torch_get_current_cuda_stream" (i32, *mut *mut c_void) -> i32;
        cuda_guard = "aoti_torch_create_cuda_guard" (i32, *mut *mut c_void) -> i32;
        delete_cuda_guard = "aoti_torch_delete_cuda_guard" (*mut c_void) -> i32;
        cpu_randint = "aoti_torch_cpu_randint_low_out" (TensorHandle, i64, i64, *const i64, i64) -> i32;
        cuda_randint = "aoti_torch_cuda_randint_low_out" (TensorHandle, i64, i64, *const i64, i64) -> i32;
        operator_delete = "_ZdlPv" (*mut c_void) -> ();
    }
}

/// The first library that has it.
///
/// # Safety
/// `T` is the type of the function of this name.
pub(crate) unsafe fn symbol<T>(libraries: &[Library], name: &str) -> Option<Symbol<T>> {
    // SAFETY: the caller's promise.
    libraries.iter().find_map(|library| unsafe { library.get::<T>(name.as_bytes()) }.ok())
}

fn missing(name: &str) -> Error {
    Error::unsupported(format!("this PyTorch has no function {name}"))
        .with_hint("the operators need PyTorch 2.10 or later")
}

/// Where a tensor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// In the host's memory.
    Cpu,
    /// On this CUDA device.
    Cuda(u32),
}

/// While it lives, a CUDA device is the thread's current one; then the one before is again.
pub struct CudaGuard {
    abi: &'static Abi,
    handle: *mut c_void,
}

impl Drop for CudaGuard {
    fn drop(&mut self) {
        if let Some(delete) = self.abi.functions.delete_cuda_guard {
            // SAFETY: our guard, used for the last time.
            let _ = unsafe { delete(self.handle) };
        }
    }
}

/// PyTorch's functions, and how it counts types and devices.
pub struct Abi {
    pub(crate) functions: Functions,
    pub(crate) dtypes: [(i32, DType); 10],
    pub(crate) cpu: i32,
    pub(crate) cuda: i32,
    pub(crate) strided: i32,
    /// How it counts the types that DLPack has, too.
    pub(crate) codes: Codes,
    /// Loaded for as long as the process lives: PyTorch unloads nothing.
    libraries: Vec<Library>,
}

/// PyTorch's numbers of types.
pub(crate) struct Codes {
    pub(crate) float32: i32,
    pub(crate) bfloat16: i32,
    pub(crate) float16: i32,
    pub(crate) float64: i32,
    pub(crate) int64: i32,
    pub(crate) int32: i32,
    pub(crate) boolean: i32,
}

impl Abi {
    /// The functions of the PyTorch that this process has loaded; found once.
    ///
    /// # Errors
    /// Unsupported, naming what is missing, where `torch` is not imported or too old.
    pub fn open() -> Result<&'static Abi> {
        static ABI: OnceLock<Result<Abi>> = OnceLock::new();
        ABI.get_or_init(Abi::find).as_ref().map_err(Clone::clone)
    }

    fn find() -> Result<Abi> {
        // By name alone: with `RTLD_NOLOAD` the loader answers with the library of this name that is loaded.
        let names = [
            "libtorch_cpu.so",
            "libtorch_cuda.so",
            "libtorch.so",
            "libtorch_python.so",
            "libc10.so",
            "libstdc++.so.6",
        ];
        let mut libraries = Vec::new();
        for name in names {
            // SAFETY: nothing is loaded and nothing runs: a library that is not there is refused.
            if let Ok(library) = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_NOLOAD) } {
                libraries.push(library);
            } else if name == "libtorch_cpu.so" {
                return Err(Error::unsupported("PyTorch's library is not loaded in this process")
                    .with_hint("`import torch` before the operators are used"));
            }
        }
        let functions = Functions::find(&libraries)?;
        if functions.delete_value.is_none() && functions.operator_delete.is_none() {
            return Err(missing("torch_delete_stable_ivalue"));
        }
        let code = |f: unsafe extern "C" fn() -> i32| {
            // SAFETY: these functions take nothing and return a constant.
            unsafe { f() }
        };
        let f = &functions;
        let dtypes = [
            (code(f.float32), DType::F32),
            (code(f.bfloat16), DType::BF16),
            (code(f.float16), DType::F16),
            (code(f.int64), DType::I64),
            (code(f.float64), DType::F64),
            (code(f.int32), DType::I32),
            (code(f.int16), DType::I16),
            (code(f.int8), DType::I8),
            (code(f.uint8), DType::U8),
            (code(f.boolean), DType::Bool),
        ];
        let codes = Codes {
            float32: code(f.float32),
            bfloat16: code(f.bfloat16),
            float16: code(f.float16),
            float64: code(f.float64),
            int64: code(f.int64),
            int32: code(f.int32),
            boolean: code(f.boolean),
        };
        let (cpu, cuda, strided) = (code(f.cpu), code(f.cuda), code(f.strided));
        Ok(Abi { functions, dtypes, cpu, cuda, strided, codes, libraries })
    }

    pub(crate) fn libraries(&self) -> &[Library] {
        &self.libraries
    }

    /// PyTorch's number of an element type.
    pub(crate) fn code(&self, dtype: DType) -> Result<i32> {
        let code = self.dtypes.iter().find(|(_, d)| *d == dtype).map(|(code, _)| *code);
        code.ok_or_else(|| Error::unsupported(format!("PyTorch has no {dtype}")))
    }

    /// How many threads PyTorch's own kernels use.
    pub fn threads(&self) -> usize {
        let mut threads = 0;
        // SAFETY: a place for a number.
        let code = unsafe { (self.functions.threads)(&mut threads) };
        if code == 0 { threads.max(1) as usize } else { 1 }
    }

    /// Whether tensors on processors and on CUDA devices can be filled with random numbers ([`crate::Tensor::draw`]).
    pub fn draws(&self) -> [bool; 2] {
        [self.functions.cpu_randint.is_some(), self.functions.cuda_randint.is_some()]
    }

    /// PyTorch's current stream on this CUDA device: a `cudaStream_t` of the primary context.
    ///
    /// # Errors
    /// Unsupported where PyTorch has no CUDA.
    pub fn cuda_stream(&self, device: u32) -> Result<*mut c_void> {
        let function = self.functions.cuda_stream.ok_or_else(|| {
            Error::unsupported("this PyTorch has no CUDA (aoti_torch_get_current_cuda_stream)")
        })?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the stream.
        let code = unsafe { function(device.cast_signed(), &mut stream) };
        self.checked(code, "asking for the current stream")?;
        Ok(stream)
    }

    /// Makes a CUDA device the current one of this thread for as long as the result lives.
    ///
    /// # Errors
    /// Unsupported where PyTorch has no CUDA.
    pub fn cuda_guard(&'static self, device: u32) -> Result<CudaGuard> {
        let function = self.functions.cuda_guard.ok_or_else(|| {
            Error::unsupported("this PyTorch has no CUDA (aoti_torch_create_cuda_guard)")
        })?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for the guard.
        let code = unsafe { function(device.cast_signed(), &mut handle) };
        self.checked(code, "choosing a CUDA device")?;
        Ok(CudaGuard { abi: self, handle })
    }

    /// Whether a call of the interface succeeded; `doing` says what it was for.
    pub(crate) fn checked(&self, code: i32, doing: &str) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(self.failure(doing)) }
    }

    #[cold]
    fn failure(&self, doing: &str) -> Error {
        let what = self.functions.exception.and_then(|what| {
            // SAFETY: takes nothing; the text lives until the next exception of this thread.
            let text = unsafe { what() };
            // SAFETY: not null, and ends with a zero.
            (!text.is_null())
                .then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        });
        let what = what.unwrap_or_else(|| "PyTorch's interface failed".to_string());
        Error::user(what).with_context(doing.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_pytorch_the_error_says_so() {
        let error = Abi::open().err().unwrap();
        assert_eq!(error.kind(), tilewright_base::Kind::Unsupported);
        assert!(error.message().contains("not loaded"), "{error:?}");
        assert!(error.hint().unwrap().contains("import torch"), "{error:?}");
    }

    #[test]
    fn a_library_without_the_functions_is_refused_by_name() {
        // SAFETY: the C library, which every process has.
        let libc = unsafe { Library::open(Some("libc.so.6"), RTLD_NOW | RTLD_NOLOAD) }.unwrap();
        let error = Functions::find(&[libc]).err().unwrap();
        assert!(error.message().contains("aoti_torch_library_init_def"), "{error:?}");
        assert!(error.hint().unwrap().contains("2.10"), "{error:?}");
    }
}
