//! [`Interop`]: tensors of Python without the dispatcher, for calls in which it would do nothing but cost time.
//!
//! A tensor's place, shape and type come from DLPack's exchange interface (`Tensor.__dlpack_c_exchange_api__`, PyTorch 2.10
//! and later), as a [`Tensor`] that borrows. A result becomes an object of Python by `torch_tensor_to_pyobject` (2.14) or what
//! that calls. Whether the dispatcher would do something, such as tracing, transforming functions, or recording for a profiler, is
//! in two words of this thread and two functions ([`Interop::state`]). These are not parts of the stable interface, so each is
//! looked for, and where one is missing there is no `Interop`: everything then goes through the dispatcher, with the same results.

use crate::api::{Abi, Device, TensorHandle, symbol};
use crate::tensor::{Axes, Tensor};
use libloading::os::unix::Library;
use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// DLPack's `DLTensor`, which keeps its layout within a major version.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_kind: i32,
    device_index: i32,
    rank: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    sizes: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type StableWrap = unsafe extern "C" fn(TensorHandle, *mut c_void, *mut *mut c_void) -> i32;
type PlainWrap = unsafe extern "C" fn(TensorHandle) -> *mut c_void;
type Asked = unsafe extern "C" fn() -> bool;
type ViewOf = unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> i32;

/// DLPack's `DLPackExchangeAPI`.
#[repr(C)]
struct Exchange {
    major: u32,
    minor: u32,
    older: *const Exchange,
    _allocate: *const c_void,
    _export: *const c_void,
    _import: *const c_void,
    view: Option<ViewOf>,
}

/// The version of DLPack that [`DlTensor`] and [`Exchange`] are of.
const MAJOR: u32 = 1;
/// DLPack's numbers of kinds of devices.
const CPU: i32 = 1;
const CUDA: i32 = 2;

#[derive(Clone, Copy)]
enum Wrap {
    /// `torch_tensor_to_pyobject`
    Stable(StableWrap),
    /// `THPVariable_Wrap(const at::TensorBase&)`: a handle is the address of an `at::Tensor`.
    Plain(PlainWrap),
}

/// The words of the dispatcher: which keys are forced, and which left out, beside those that always are.
pub type State = [u64; 2];

/// Ways around the dispatcher.
pub struct Interop {
    abi: &'static Abi,
    view: ViewOf,
    wrap: Wrap,
    /// Whether a mode stands before all functions of `torch`.
    function_modes: Asked,
    /// Whether somebody records calls: a profiler.
    recorded: Asked,
}

thread_local! {
    /// Where this thread's [`State`] lies.
    static STATE: Cell<*const State> = const { Cell::new(std::ptr::null()) };
}

fn state_of_this_thread(libraries: &[Library]) -> *const State {
    const NAME: &[u8] = b"_ZN3c104impl26raw_local_dispatch_key_setE";
    // SAFETY: the symbol is two words of each thread. The loader gives the address of the calling thread's.
    let found = libraries.iter().find_map(|l| unsafe { l.get::<*const State>(NAME) }.ok());
    found.map_or(std::ptr::null(), |symbol| symbol.into_raw().cast_const().cast())
}

impl Interop {
    /// Finds what is needed, or nothing.
    ///
    /// # Safety
    /// `exchange` is what the capsule `Tensor.__dlpack_c_exchange_api__` holds.
    pub unsafe fn open(abi: &'static Abi, exchange: *const c_void) -> Option<Interop> {
        let mut table = exchange.cast::<Exchange>();
        // SAFETY: the caller's promise; a table of another version begins with its version and that of an older one.
        let table = unsafe {
            while !table.is_null() && (*table).major != MAJOR {
                table = (*table).older;
            }
            table.as_ref()?
        };
        let libraries = abi.libraries();
        // SAFETY: what each of these functions takes and gives in all versions so far; C++ passes these as C does.
        let (stable, plain, function_modes, recorded) = unsafe {
            (
                symbol::<StableWrap>(libraries, "torch_tensor_to_pyobject"),
                symbol::<PlainWrap>(libraries, "_Z16THPVariable_WrapRKN2at10TensorBaseE"),
                *symbol::<Asked>(libraries, "_ZN2at4impl27torch_function_mode_enabledEv")?,
                *symbol::<Asked>(libraries, "_ZN2at12hasCallbacksEv")?,
            )
        };
        let wrap = match (stable, plain) {
            (Some(stable), _) => Wrap::Stable(*stable),
            (None, plain) => Wrap::Plain(*plain?),
        };
        if state_of_this_thread(libraries).is_null() {
            return None;
        }
        Some(Interop { abi, view: table.view?, wrap, function_modes, recorded })
    }

    /// The interface that tensors are made through.
    pub fn abi(&self) -> &'static Abi {
        self.abi
    }

    /// What the dispatcher would do in this thread; `None` where somebody stands before it.
    pub fn state(&self) -> Option<State> {
        // SAFETY: functions without arguments.
        if unsafe { (self.function_modes)() || (self.recorded)() } {
            return None;
        }
        STATE.with(|place| {
            if place.get().is_null() {
                place.set(state_of_this_thread(self.abi.libraries()));
            }
            // SAFETY: null, or two words of this thread, which live as long as it does and which nobody else writes.
            unsafe { place.get().as_ref() }.copied()
        })
    }

    /// Whether autograd records what this thread does.
    pub fn grad_enabled(&self) -> bool {
        // SAFETY: takes nothing.
        unsafe { (self.abi.functions.grad_enabled)() }
    }

    /// A tensor of Python, borrowed: it cannot be copied into order, and is no result. `None` leaves an exception of Python's where it is.
    ///
    /// # Safety
    /// `object` is a `torch.Tensor`, which lives as long as the result is used; the interpreter's lock is held.
    pub unsafe fn view(&self, object: *mut c_void) -> Option<Tensor> {
        let mut view = DlTensor {
            data: null_mut(),
            device_kind: 0,
            device_index: 0,
            rank: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            sizes: std::ptr::null(),
            strides: std::ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: the caller's promise, and a place for the view.
        if unsafe { (self.view)(object, &mut view) } != 0 {
            return None;
        }
        let device = match view.device_kind {
            CPU => Device::Cpu,
            CUDA => Device::Cuda(view.device_index.unsigned_abs()),
            _ => return None,
        };
        // DLPack's codes: 0 signed, 1 unsigned, 2 float, 4 bfloat, 6 truth value.
        let f = &self.abi.codes;
        let dtype = match (view.code, view.bits, view.lanes) {
            (2, 32, 1) => f.float32,
            (4, 16, 1) => f.bfloat16,
            (2, 16, 1) => f.float16,
            (2, 64, 1) => f.float64,
            (0, 64, 1) => f.int64,
            (0, 32, 1) => f.int32,
            (6, 8, 1) => f.boolean,
            _ => return None,
        };
        let rank = usize::try_from(view.rank).ok()?;
        let (mut sizes, mut strides) = (Axes::new(), Axes::new());
        if rank > 0 {
            if view.sizes.is_null() || view.strides.is_null() {
                return None;
            }
            // SAFETY: the tensor's own arrays, with a number for each axis.
            unsafe {
                sizes.extend_from_slice(std::slice::from_raw_parts(view.sizes, rank));
                strides.extend_from_slice(std::slice::from_raw_parts(view.strides, rank));
            }
        }
        let address = (view.data as u64).wrapping_add(view.byte_offset);
        // A tensor that is all zeros may have no memory.
        if address == 0 && !sizes.contains(&0) {
            return None;
        }
        Some(Tensor::borrowed(self.abi, address, dtype, device, sizes, strides))
    }

    /// A result as a new reference to an object of Python; `None` where that fails.
    ///
    /// # Safety
    /// The interpreter's lock is held.
    pub unsafe fn wrap(&self, tensor: &Tensor) -> Option<*mut c_void> {
        let handle = tensor.handle()?;
        let mut object = null_mut();
        // SAFETY: a tensor that is alive; the object is a reference of its own.
        unsafe {
            match self.wrap {
                Wrap::Stable(wrap) => {
                    if wrap(handle, null_mut(), &mut object) != 0 {
                        return None;
                    }
                }
                Wrap::Plain(wrap) => object = wrap(handle),
            }
        }
        (!object.is_null()).then_some(object)
    }
}

/// How often this process has been forked off: a child of a process has another number than its parent.
pub fn forks() -> u32 {
    static FORKS: AtomicU32 = AtomicU32::new(0);
    static WATCHED: Once = Once::new();
    extern "C" fn forked() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    unsafe extern "C" {
        fn pthread_atfork(
            before: Option<extern "C" fn()>,
            parent: Option<extern "C" fn()>,
            child: Option<extern "C" fn()>,
        ) -> i32;
    }
    WATCHED.call_once(|| {
        // SAFETY: the function stays, since the library is never unloaded, and adds to a number only. Without memory for it the
        // number stays 0 in children.
        let _ = unsafe { pthread_atfork(None, None, Some(forked)) };
    });
    FORKS.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_that_was_not_forked_has_one_number() {
        assert_eq!(super::forks(), super::forks());
    }
}
