//! The driver's functions, opened when first asked for, and its result codes as our errors.
//!
//! The types are those of the crate `cudarc` (generated from `cuda.h`); its functions are not used,
//! for two reasons. They panic when the library or a function is missing. And they return a Rust
//! enumeration, while a newer driver may return a code that this enumeration lacks, which would be
//! undefined behaviour. Here a code is a number, and a missing function is an error.
//!
//! To use one more function: a row below, with the symbol's versioned name and its arguments from
//! `cuda.h` (or from `cudarc::driver::sys`, which has the same names).

use crate::find;
use cudarc::driver::sys;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tilewright_base::{Error, Result};

/// CUDA version of the oldest driver that has every function below.
const OLDEST: (u32, u32) = (12, 8);

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),* $(,)?);)*) => {
        /// The functions. Each returns a result code: 0, or one for [`Api::check`].
        pub(crate) struct Api {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// The functions above are valid as long as it is open.
            _library: Library,
        }

        impl Api {
            fn load(library: Library, path: &Path) -> Result<Api, String> {
                $(
                    // SAFETY: the type is the one of `cuda.h` for this symbol; a symbol's type never
                    // changes, a changed function gets a new suffix.
                    let $field = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($symbol.as_bytes())
                    };
                    let $field = *$field
                        .map_err(|_| format!("{} has no function {}", path.display(), $symbol))?;
                )*
                Ok(Api { $($field,)* _library: library })
            }
        }
    };
}

functions! {
    init = "cuInit" (c_uint);
    driver_get_version = "cuDriverGetVersion" (*mut c_int);
    get_error_name = "cuGetErrorName" (c_int, *mut *const c_char);
    get_error_string = "cuGetErrorString" (c_int, *mut *const c_char);

    device_get_count = "cuDeviceGetCount" (*mut c_int);
    device_get = "cuDeviceGet" (*mut sys::CUdevice, c_int);
    device_get_name = "cuDeviceGetName" (*mut c_char, c_int, sys::CUdevice);
    device_total_mem = "cuDeviceTotalMem_v2" (*mut usize, sys::CUdevice);
    device_get_attribute = "cuDeviceGetAttribute" (*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    primary_ctx_retain = "cuDevicePrimaryCtxRetain" (*mut sys::CUcontext, sys::CUdevice);
    primary_ctx_release = "cuDevicePrimaryCtxRelease_v2" (sys::CUdevice);
    ctx_set_current = "cuCtxSetCurrent" (sys::CUcontext);
    ctx_synchronize = "cuCtxSynchronize" ();

    mem_get_info = "cuMemGetInfo_v2" (*mut usize, *mut usize);
    mem_pool_create = "cuMemPoolCreate" (*mut sys::CUmemoryPool, *const sys::CUmemPoolProps);
    mem_pool_destroy = "cuMemPoolDestroy" (sys::CUmemoryPool);
    mem_pool_set_attribute = "cuMemPoolSetAttribute" (sys::CUmemoryPool, sys::CUmemPool_attribute, *mut c_void);
    mem_pool_get_attribute = "cuMemPoolGetAttribute" (sys::CUmemoryPool, sys::CUmemPool_attribute, *mut c_void);
    mem_pool_trim_to = "cuMemPoolTrimTo" (sys::CUmemoryPool, usize);
    mem_alloc_from_pool = "cuMemAllocFromPoolAsync" (*mut sys::CUdeviceptr, usize, sys::CUmemoryPool, sys::CUstream);
    mem_free_async = "cuMemFreeAsync" (sys::CUdeviceptr, sys::CUstream);
    mem_host_alloc = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
    mem_free_host = "cuMemFreeHost" (*mut c_void);
    memcpy_htod = "cuMemcpyHtoDAsync_v2" (sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
    memcpy_dtoh = "cuMemcpyDtoHAsync_v2" (*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
    memcpy_dtod = "cuMemcpyDtoDAsync_v2" (sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream);
    memset_d8 = "cuMemsetD8Async" (sys::CUdeviceptr, u8, usize, sys::CUstream);

    stream_create = "cuStreamCreateWithPriority" (*mut sys::CUstream, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2" (sys::CUstream);
    stream_synchronize = "cuStreamSynchronize" (sys::CUstream);
    stream_wait_event = "cuStreamWaitEvent" (sys::CUstream, sys::CUevent, c_uint);
    stream_is_capturing = "cuStreamIsCapturing" (sys::CUstream, *mut c_int);
    stream_begin_capture = "cuStreamBeginCapture_v2" (sys::CUstream, sys::CUstreamCaptureMode);
    thread_exchange_stream_capture_mode = "cuThreadExchangeStreamCaptureMode" (*mut sys::CUstreamCaptureMode);
    stream_end_capture = "cuStreamEndCapture" (sys::CUstream, *mut sys::CUgraph);
    event_create = "cuEventCreate" (*mut sys::CUevent, c_uint);
    event_destroy = "cuEventDestroy_v2" (sys::CUevent);
    event_record = "cuEventRecord" (sys::CUevent, sys::CUstream);
    event_synchronize = "cuEventSynchronize" (sys::CUevent);
    event_elapsed_time = "cuEventElapsedTime_v2" (*mut f32, sys::CUevent, sys::CUevent);

    module_load_data = "cuModuleLoadData" (*mut sys::CUmodule, *const c_void);
    module_unload = "cuModuleUnload" (sys::CUmodule);
    module_get_function = "cuModuleGetFunction" (*mut sys::CUfunction, sys::CUmodule, *const c_char);
    func_get_attribute = "cuFuncGetAttribute" (*mut c_int, sys::CUfunction_attribute, sys::CUfunction);
    func_set_attribute = "cuFuncSetAttribute" (sys::CUfunction, sys::CUfunction_attribute, c_int);
    func_get_name = "cuFuncGetName" (*mut *const c_char, sys::CUfunction);
    func_get_param_info = "cuFuncGetParamInfo" (sys::CUfunction, usize, *mut usize, *mut usize);
    occupancy_max_active_blocks = "cuOccupancyMaxActiveBlocksPerMultiprocessor" (*mut c_int, sys::CUfunction, c_int, usize);
    occupancy_max_active_clusters = "cuOccupancyMaxActiveClusters" (*mut c_int, sys::CUfunction, *const sys::CUlaunchConfig);
    launch_kernel = "cuLaunchKernelEx" (*const sys::CUlaunchConfig, sys::CUfunction, *mut *mut c_void, *mut *mut c_void);

    tensor_map_encode_tiled = "cuTensorMapEncodeTiled" (*mut sys::CUtensorMap, sys::CUtensorMapDataType, u32, *mut c_void, *const u64, *const u64, *const u32, *const u32, sys::CUtensorMapInterleave, sys::CUtensorMapSwizzle, sys::CUtensorMapL2promotion, sys::CUtensorMapFloatOOBfill);
    tensor_map_encode_im2col = "cuTensorMapEncodeIm2col" (*mut sys::CUtensorMap, sys::CUtensorMapDataType, u32, *mut c_void, *const u64, *const u64, *const c_int, *const c_int, u32, u32, *const u32, sys::CUtensorMapInterleave, sys::CUtensorMapSwizzle, sys::CUtensorMapL2promotion, sys::CUtensorMapFloatOOBfill);

    graph_instantiate = "cuGraphInstantiateWithFlags" (*mut sys::CUgraphExec, sys::CUgraph, c_ulonglong);
    graph_launch = "cuGraphLaunch" (sys::CUgraphExec, sys::CUstream);
    graph_destroy = "cuGraphDestroy" (sys::CUgraph);
    graph_exec_destroy = "cuGraphExecDestroy" (sys::CUgraphExec);
    graph_exec_update = "cuGraphExecUpdate_v2" (sys::CUgraphExec, sys::CUgraph, *mut UpdateResult);
    graph_get_nodes = "cuGraphGetNodes" (sys::CUgraph, *mut sys::CUgraphNode, *mut usize);
    graph_node_get_type = "cuGraphNodeGetType" (sys::CUgraphNode, *mut c_int);
    graph_kernel_node_get_params = "cuGraphKernelNodeGetParams_v2" (sys::CUgraphNode, *mut sys::CUDA_KERNEL_NODE_PARAMS);
    graph_exec_kernel_node_set_params = "cuGraphExecKernelNodeSetParams_v2" (sys::CUgraphExec, sys::CUgraphNode, *const sys::CUDA_KERNEL_NODE_PARAMS);
}

/// `CUgraphExecUpdateResultInfo` with its result as a number.
#[repr(C)]
pub(crate) struct UpdateResult {
    pub(crate) result: c_int,
    pub(crate) node: sys::CUgraphNode,
    pub(crate) from_node: sys::CUgraphNode,
}

/// The driver, opened and initialised once per process.
pub(crate) fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api>> = OnceLock::new();
    API.get_or_init(|| open(&find::driver())).as_ref().map_err(Clone::clone)
}

/// Version of CUDA that the installed driver supports, major and minor: 13.0 for driver 580.
pub fn driver_version() -> Result<(u32, u32)> {
    version(api()?)
}

fn open(candidates: &[PathBuf]) -> Result<Api> {
    let mut failures = Vec::new();
    for path in candidates {
        // SAFETY: NVIDIA's library; opening it runs what every CUDA program runs at its start.
        let opened = unsafe { Library::new(path) };
        match opened
            .map_err(|e| find::reason(path, &e))
            .and_then(|library| Api::load(library, path))
        {
            Ok(api) => {
                start(&api)?;
                return Ok(api);
            }
            Err(failure) => failures.push(failure),
        }
    }
    // A library that is there and lacks a function is an old driver (or something else of its name).
    let incomplete = failures.iter().any(|f| f.contains("has no function"));
    let (major, minor) = OLDEST;
    let message = if incomplete {
        format!("the NVIDIA driver is too old: CUDA {major}.{minor} or later is needed")
    } else {
        "no NVIDIA driver was found, so no GPU can be used".to_owned()
    };
    let error = Error::unsupported(message)
        .with_hint("install NVIDIA's driver 570 or later (`nvidia-smi` shows what is there)");
    Err(failures.into_iter().fold(error, Error::with_note))
}

fn start(api: &Api) -> Result<()> {
    let found = version(api)?;
    if found < OLDEST {
        let text = |v: (u32, u32)| format!("{}.{}", v.0, v.1);
        let (found, needed) = (text(found), text(OLDEST));
        return Err(Error::unsupported(format!(
            "the NVIDIA driver supports CUDA {found}, and {needed} or later is needed"
        ))
        .with_hint("install NVIDIA's driver 570 or later"));
    }
    // SAFETY: no flags are defined, zero is asked for.
    let code = unsafe { (api.init)(0) };
    api.check(code, "starting the NVIDIA driver")
}

fn version(api: &Api) -> Result<(u32, u32)> {
    let mut version = 0;
    // SAFETY: a place for an int.
    let code = unsafe { (api.driver_get_version)(&mut version) };
    api.check(code, "asking for the driver's version")?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// Result codes that we treat in a way of their own.
pub(crate) mod code {
    pub(crate) const INVALID_VALUE: i32 = 1;
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const STUB_LIBRARY: i32 = 34;
    pub(crate) const DEVICE_UNAVAILABLE: i32 = 46;
    pub(crate) const NO_DEVICE: i32 = 100;
    pub(crate) const INVALID_IMAGE: i32 = 200;
    pub(crate) const NO_BINARY_FOR_GPU: i32 = 209;
    pub(crate) const UNSUPPORTED_PTX: i32 = 222;
    pub(crate) const NOT_FOUND: i32 = 500;
    pub(crate) const COOPERATIVE_TOO_LARGE: i32 = 720;
    pub(crate) const SYSTEM_DRIVER_MISMATCH: i32 = 803;
    pub(crate) const COMPAT_NOT_SUPPORTED: i32 = 804;
    pub(crate) const GRAPH_EXEC_UPDATE_FAILURE: i32 = 910;
}

/// Codes of kernels that went wrong while they ran. After one of them the context is of no use.
#[rustfmt::skip]
const FAULTS: &[(i32, &str)] = &[
    (700, "a kernel accessed memory that does not belong to it"),
    (702, "a kernel ran too long and was stopped"),
    (714, "a kernel made a mistake in hardware-checked stack use"),
    (715, "a kernel reached an instruction that the device does not have"),
    (716, "a kernel accessed memory at a misaligned address"),
    (717, "a kernel used an address of the wrong memory space"),
    (718, "a kernel jumped out of its code"),
    (719, "a kernel failed while it ran"),
];

/// Why a capture or a graph is refused.
#[rustfmt::skip]
const CAPTURE: &[(i32, &str)] = &[
    (900, "an operation that cannot be recorded was called while recording (a wait, a synchronous copy)"),
    (901, "an earlier operation of the recording failed, so the recording is of no use"),
    (902, "two recordings would become one"),
    (903, "the recording was not started on this stream"),
    (904, "another stream joined the recording and was not joined back (record an event there and wait for it here)"),
    (905, "the recording would depend on work outside it"),
    (906, "the legacy default stream was used while recording"),
    (907, "an event of the recording was used outside it"),
    (908, "the recording was started by another thread"),
    (910, "the graph differs too much from the instantiated one"),
];

impl Api {
    /// Whether a call succeeded; `doing` says what it was for.
    pub(crate) fn check(&self, code: c_int, doing: &str) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(self.error(code, doing)) }
    }

    /// The error of a result code.
    #[cold]
    pub(crate) fn error(&self, code: c_int, doing: &str) -> Error {
        let (name, description) = self.texts(code);
        error_of(code, &name, &description).with_context(doing.to_owned())
    }

    fn texts(&self, code: c_int) -> (String, String) {
        let ask = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: takes any number; sets the pointer to a static text, or to null.
            unsafe {
                let known = function(code, &mut text) == 0 && !text.is_null();
                known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        let name = ask(self.get_error_name).unwrap_or_else(|| format!("CUDA error {code}"));
        (name, ask(self.get_error_string).unwrap_or_else(|| "no description".into()))
    }
}

/// Whose fault a result code is, and what to say. [`Api::error`] supplies the driver's own words.
fn error_of(code: c_int, name: &str, description: &str) -> Error {
    let plain = format!("{description} ({name})");
    let known = |table: &'static [(i32, &'static str)]| {
        table.iter().find(|row| row.0 == code).map(|row| format!("{} ({name})", row.1))
    };
    if let Some(message) = known(FAULTS) {
        return Error::bug(message)
            .with_note("this process can use the device no more: start it again")
            .with_hint("run with CUDA_LAUNCH_BLOCKING=1 to learn which launch it is, or under compute-sanitizer to learn which access");
    }
    if let Some(message) = known(CAPTURE) {
        return Error::bug(message);
    }
    match code {
        code::NO_DEVICE => Error::unsupported(format!("no NVIDIA GPU is present ({name})"))
            .with_hint("an empty CUDA_VISIBLE_DEVICES hides all devices"),
        code::STUB_LIBRARY => {
            Error::unsupported(format!("the driver's library is a stub for linking only ({name})"))
                .with_hint("remove the toolkit's folder `stubs` from LD_LIBRARY_PATH")
        }
        code::SYSTEM_DRIVER_MISMATCH | code::COMPAT_NOT_SUPPORTED => Error::unsupported(plain)
            .with_hint("the driver's library and its kernel module differ: restart the machine"),
        code::DEVICE_UNAVAILABLE => {
            Error::user(format!("another process has the device for itself ({name})"))
        }
        code::COOPERATIVE_TOO_LARGE => {
            Error::bug(format!("a cooperative launch has more blocks than fit at once ({name})"))
        }
        code::OUT_OF_MEMORY => Error::unsupported(format!("out of memory on the device ({name})")),
        _ => Error::bug(plain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_base::Kind;

    #[test]
    fn a_missing_driver_is_an_error_and_no_panic() {
        let error = open(&[PathBuf::from("libcuda-of-nobody.so.1")]).err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("no NVIDIA driver was found"), "{error:?}");
        assert!(error.notes()[0].contains("libcuda-of-nobody.so.1"), "{error:?}");
    }

    #[test]
    fn another_library_is_no_driver() {
        let error = open(&[PathBuf::from("libm.so.6")]).err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("too old"), "{error:?}");
        assert!(error.notes()[0].contains("has no function cuInit"), "{error:?}");
    }

    #[test]
    fn codes_become_errors_of_the_right_kind() {
        let kind = |code| error_of(code, "NAME", "words").kind();
        assert_eq!(kind(code::NO_DEVICE), Kind::Unsupported);
        assert_eq!(kind(code::DEVICE_UNAVAILABLE), Kind::User);
        assert_eq!(kind(716), Kind::Bug);
        assert_eq!(kind(12345), Kind::Bug);
        let error = error_of(716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address");
        assert!(error.message().contains("misaligned address (CUDA_ERROR_MISALIGNED_ADDRESS)"));
        assert!(error_of(904, "NAME", "").message().contains("not joined back"));
        assert!(error_of(12345, "CUDA error 12345", "no description").message().contains("12345"));
    }
}
