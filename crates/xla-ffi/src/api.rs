//! The structures of XLA's foreign function interface, as `xla/ffi/api/c_api.h` of OpenXLA lays them out
//! (version 0.3; fields are only ever added behind those that are here).
//!
//! Names are those of the header without `XLA_FFI_`.

use std::ffi::{c_char, c_void};

/// Version of the header.
pub(crate) const MAJOR: i32 = 0;
/// Version of the header.
pub(crate) const MINOR: i32 = 3;

/// `XLA_FFI_Extension_Metadata`.
pub(crate) const EXTENSION_METADATA: u32 = 1;
/// `XLA_FFI_ArgType_BUFFER` and `XLA_FFI_RetType_BUFFER`.
pub(crate) const BUFFER: u32 = 1;
/// `XLA_FFI_AttrType_STRING`.
pub(crate) const ATTR_STRING: u32 = 4;
/// `XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE`.
pub(crate) const RECORDABLE: u32 = 1;
/// `XLA_FFI_ExecutionStage_INITIALIZE`.
pub(crate) const INITIALIZE: u32 = 2;
/// `XLA_FFI_ExecutionStage_EXECUTE`.
pub(crate) const EXECUTE: u32 = 3;

/// Codes of errors.
pub(crate) const INVALID_ARGUMENT: u32 = 3;
/// As above.
pub(crate) const UNIMPLEMENTED: u32 = 12;
/// As above.
pub(crate) const INTERNAL: u32 = 13;

/// XLA's own error; made and freed by XLA.
#[repr(C)]
pub(crate) struct Error {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ExtensionBase {
    pub(crate) struct_size: usize,
    pub(crate) kind: u32,
    pub(crate) next: *mut ExtensionBase,
}

#[repr(C)]
pub(crate) struct ApiVersion {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) major: i32,
    pub(crate) minor: i32,
}

#[repr(C)]
pub(crate) struct Metadata {
    pub(crate) struct_size: usize,
    pub(crate) api_version: ApiVersion,
    pub(crate) traits: u32,
}

#[repr(C)]
pub(crate) struct MetadataExtension {
    pub(crate) base: ExtensionBase,
    pub(crate) metadata: *mut Metadata,
}

#[repr(C)]
pub(crate) struct ErrorCreateArgs {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) message: *const c_char,
    pub(crate) code: u32,
}

#[repr(C)]
pub(crate) struct StreamGetArgs {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) ctx: *mut c_void,
    pub(crate) stream: *mut c_void,
}

#[repr(C)]
pub(crate) struct DeviceOrdinalGetArgs {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) ctx: *mut c_void,
    pub(crate) ordinal: i32,
}

#[repr(C)]
pub(crate) struct Buffer {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) dtype: u32,
    pub(crate) data: *mut c_void,
    pub(crate) rank: i64,
    pub(crate) dims: *mut i64,
}

#[repr(C)]
pub(crate) struct ByteSpan {
    pub(crate) ptr: *const u8,
    pub(crate) len: usize,
}

/// `XLA_FFI_Args` and `XLA_FFI_Rets`, which look alike.
#[repr(C)]
pub(crate) struct Operands {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) size: i64,
    pub(crate) types: *mut u32,
    pub(crate) values: *mut *mut c_void,
}

#[repr(C)]
pub(crate) struct Attrs {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) size: i64,
    pub(crate) types: *mut u32,
    pub(crate) names: *mut *mut ByteSpan,
    pub(crate) values: *mut *mut c_void,
}

/// One call.
#[repr(C)]
pub(crate) struct CallFrame {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) api: *const Api,
    pub(crate) ctx: *mut c_void,
    pub(crate) stage: u32,
    pub(crate) args: Operands,
    pub(crate) rets: Operands,
    pub(crate) attrs: Attrs,
}

type Function<A> = Option<unsafe extern "C" fn(*mut A) -> *mut Error>;
type Unused = *const c_void;

/// XLA's functions. Those that are not called here are addresses only.
#[repr(C)]
pub(crate) struct Api {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) api_version: ApiVersion,
    pub(crate) internal_api: Unused,
    pub(crate) error_create: Function<ErrorCreateArgs>,
    pub(crate) error_get_message: Unused,
    pub(crate) error_destroy: Option<unsafe extern "C" fn(*mut ErrorDestroyArgs)>,
    pub(crate) handler_register: Unused,
    pub(crate) stream_get: Function<StreamGetArgs>,
    pub(crate) type_register: Unused,
    pub(crate) execution_context_get: Unused,
    pub(crate) state_set: Unused,
    pub(crate) state_get: Unused,
    pub(crate) device_memory_allocate: Unused,
    pub(crate) device_memory_free: Unused,
    pub(crate) thread_pool_schedule: Unused,
    pub(crate) thread_pool_num_threads: Unused,
    pub(crate) future_create: Unused,
    pub(crate) future_set_available: Unused,
    pub(crate) future_set_error: Unused,
    pub(crate) run_id_get: Unused,
    pub(crate) device_ordinal_get: Function<DeviceOrdinalGetArgs>,
}

#[repr(C)]
pub(crate) struct ErrorDestroyArgs {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) error: *mut Error,
}
