//! Reading a call: XLA's structures as safe values, and XLA's functions as safe ones.

use crate::api::{self, CallFrame};
use std::ffi::{CString, c_void};
use std::mem::{offset_of, size_of};
use std::ptr::null_mut;
use tilewright_base::{DType, Error, Kind, Result};

/// A tensor of the call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) dtype: DType,
    pub(crate) dims: Vec<usize>,
    pub(crate) address: usize,
}

/// A call.
pub(crate) struct Call<'a> {
    frame: &'a CallFrame,
    api: &'a api::Api,
}

impl<'a> Call<'a> {
    /// Reads a call. `None` when XLA only asks for the interface's version, which is then answered.
    ///
    /// # Safety
    /// XLA's frame of a call that is going on.
    pub(crate) unsafe fn read(frame: &'a mut CallFrame) -> Option<Call<'a>> {
        let mut extension = frame.extension_start;
        while !extension.is_null() {
            // SAFETY: XLA's list of extensions; each starts with this head.
            let head = unsafe { &*extension };
            if head.kind == api::EXTENSION_METADATA {
                // SAFETY: an extension of this kind has the metadata's address behind its head, and XLA wants
                // the fields of the metadata written.
                let metadata =
                    unsafe { &mut *(*extension.cast::<api::MetadataExtension>()).metadata };
                metadata.api_version.major = api::MAJOR;
                metadata.api_version.minor = api::MINOR;
                // A call launches the same kernels each time. What must not happen while XLA records a command
                // buffer (compiling) has been done when it initialised the call.
                metadata.traits = api::RECORDABLE;
                return None;
            }
            extension = head.next;
        }
        // SAFETY: XLA's table of functions lives as long as the process.
        let api = unsafe { &*frame.api };
        Some(Call { frame, api })
    }

    /// Whether this is the call itself.
    pub(crate) fn executes(&self) -> bool {
        self.frame.stage == api::EXECUTE
    }

    /// Whether XLA gets the call ready, before it runs or records it.
    pub(crate) fn initialises(&self) -> bool {
        self.frame.stage == api::INITIALIZE
    }

    pub(crate) fn inputs(&self) -> Result<Vec<Tensor>> {
        tensors(&self.frame.args)
    }

    pub(crate) fn outputs(&self) -> Result<Vec<Tensor>> {
        tensors(&self.frame.rets)
    }

    /// An attribute that is text.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        let attrs = &self.frame.attrs;
        for i in 0..usize::try_from(attrs.size).unwrap_or(0) {
            // SAFETY: XLA's lists have `size` entries, and names are spans of bytes.
            let (kind, given) = unsafe { (*attrs.types.add(i), span(*attrs.names.add(i))) };
            if given != name.as_bytes() {
                continue;
            }
            if kind != api::ATTR_STRING {
                return Err(Error::user(format!("the attribute `{name}` is not text")));
            }
            // SAFETY: as above; the value of an attribute of this kind is a span of bytes.
            let value = unsafe { span((*attrs.values.add(i)).cast()) };
            let text = std::str::from_utf8(value);
            return text.map(Some).map_err(|_| Error::user(format!("`{name}` is not UTF-8")));
        }
        Ok(None)
    }

    /// The stream of a call on a GPU.
    pub(crate) fn stream(&self) -> Result<*mut c_void> {
        let missing = || Error::unsupported("an XLA without streams for custom calls");
        let get = self.function(offset_of!(api::Api, stream_get), self.api.stream_get);
        let mut args = api::StreamGetArgs {
            struct_size: size_of::<api::StreamGetArgs>(),
            extension_start: null_mut(),
            ctx: self.frame.ctx,
            stream: null_mut(),
        };
        // SAFETY: XLA's function with its arguments, for the call that is going on.
        let error = unsafe { get.ok_or_else(missing)?(&mut args) };
        self.check(error, "asking for the stream")?;
        Ok(args.stream)
    }

    /// The number of the call's device; 0 where XLA is too old to say.
    pub(crate) fn ordinal(&self) -> Result<u32> {
        let at = offset_of!(api::Api, device_ordinal_get);
        let Some(get) = self.function(at, self.api_function_at_end()) else { return Ok(0) };
        let mut args = api::DeviceOrdinalGetArgs {
            struct_size: size_of::<api::DeviceOrdinalGetArgs>(),
            extension_start: null_mut(),
            ctx: self.frame.ctx,
            ordinal: 0,
        };
        // SAFETY: as in `stream`.
        let error = unsafe { get(&mut args) };
        self.check(error, "asking for the device")?;
        u32::try_from(args.ordinal).map_err(|_| Error::user("a call on no device"))
    }

    /// The last function of the table, or none when the table ends before it.
    fn api_function_at_end(
        &self,
    ) -> Option<unsafe extern "C" fn(*mut api::DeviceOrdinalGetArgs) -> *mut api::Error> {
        let end = offset_of!(api::Api, device_ordinal_get) + size_of::<usize>();
        if self.api.struct_size < end { None } else { self.api.device_ordinal_get }
    }

    /// A function, if XLA's table reaches to it.
    fn function<F>(&self, offset: usize, function: Option<F>) -> Option<F> {
        function.filter(|_| self.api.struct_size >= offset + size_of::<usize>())
    }

    /// One of XLA's errors as ours.
    fn check(&self, error: *mut api::Error, doing: &str) -> Result<()> {
        if error.is_null() {
            return Ok(());
        }
        if let Some(destroy) = self.api.error_destroy {
            let struct_size = size_of::<api::ErrorDestroyArgs>();
            let mut args =
                api::ErrorDestroyArgs { struct_size, extension_start: null_mut(), error };
            // SAFETY: an error that XLA handed to us, given back once.
            unsafe { destroy(&mut args) };
        }
        Err(Error::bug(format!("XLA failed while {doing}")))
    }

    /// Our error as one of XLA's.
    pub(crate) fn fail(&self, error: &Error) -> *mut api::Error {
        let code = match error.kind() {
            Kind::User => api::INVALID_ARGUMENT,
            Kind::Unsupported => api::UNIMPLEMENTED,
            Kind::Bug => api::INTERNAL,
        };
        let text = format!("tilewright: {error:?}").replace('\0', " ");
        let message = CString::new(text).unwrap_or_default();
        let mut args = api::ErrorCreateArgs {
            struct_size: size_of::<api::ErrorCreateArgs>(),
            extension_start: null_mut(),
            message: message.as_ptr(),
            code,
        };
        match self.api.error_create {
            // SAFETY: XLA's function, which copies the message.
            Some(create) => unsafe { create(&mut args) },
            None => null_mut(),
        }
    }
}

/// # Safety
/// A span of XLA's that lives as long as its call.
unsafe fn span<'a>(span: *const api::ByteSpan) -> &'a [u8] {
    // SAFETY: the caller's.
    let span = unsafe { &*span };
    if span.len == 0 {
        return &[];
    }
    // SAFETY: a span is `len` bytes from `ptr` on.
    unsafe { std::slice::from_raw_parts(span.ptr, span.len) }
}

fn tensors(operands: &api::Operands) -> Result<Vec<Tensor>> {
    let size = usize::try_from(operands.size).unwrap_or(0);
    (0..size)
        .map(|i| {
            // SAFETY: XLA's lists have `size` entries; an entry of this kind points to a buffer, whose list of
            // dimensions has `rank` entries.
            let (kind, buffer) = unsafe {
                (*operands.types.add(i), (*operands.values.add(i)).cast::<api::Buffer>())
            };
            if kind != api::BUFFER {
                return Err(Error::user("an operand that is not a tensor"));
            }
            // SAFETY: as above.
            let buffer = unsafe { &*buffer };
            let rank = usize::try_from(buffer.rank).unwrap_or(0);
            let dims: &[i64] = match rank {
                0 => &[],
                // SAFETY: as above.
                _ => unsafe { std::slice::from_raw_parts(buffer.dims, rank) },
            };
            let dims = dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
            Ok(Tensor { dtype: dtype(buffer.dtype)?, dims, address: buffer.data as usize })
        })
        .collect()
}

/// An element type by XLA's number.
fn dtype(number: u32) -> Result<DType> {
    Ok(match number {
        1 => DType::Bool,
        2 => DType::I8,
        3 => DType::I16,
        4 => DType::I32,
        5 => DType::I64,
        6 => DType::U8,
        7 => DType::U16,
        8 => DType::U32,
        9 => DType::U64,
        10 => DType::F16,
        11 => DType::F32,
        12 => DType::F64,
        16 => DType::BF16,
        other => return Err(Error::unsupported(format!("XLA's element type {other}"))),
    })
}
