//! NVIDIA GPUs: CUDA C++ text to machine code, and machine code on a device.
//!
//! ```no_run
//! # fn main() -> tilewright_base::Result<()> {
//! use tilewright_cuda::{Args, CompileRequest, Gpu, LaunchShape, Nvrtc};
//! let gpu = Gpu::open(0)?;
//! let nvrtc = Nvrtc::open(None)?;
//! let text = r#"extern "C" __global__ void add(float* a, const float* b, int n) {
//!     int i = blockIdx.x * blockDim.x + threadIdx.x;
//!     if (i < n) a[i] += b[i];
//! }"#;
//! let compiled = nvrtc.compile(&CompileRequest::new("add", text, gpu.arch()))?;
//! let add = gpu.load(&compiled)?.function("add")?;
//! let stream = gpu.stream()?;
//! let a = stream.upload(&[0u8; 4096])?;
//! let b = stream.upload(&[0u8; 4096])?;
//! let shape = LaunchShape { grid: [4, 1, 1], block: [256, 1, 1], ..LaunchShape::default() };
//! let launch = add.prepare(&shape, &Args::new().buffer(&a).buffer(&b).value(1024i32))?;
//! // SAFETY: the kernel takes two pointers to 1024 floats and an `int`, as given.
//! unsafe { launch.launch(&stream)? };
//! let mut bytes = vec![0; 4096];
//! a.read(&stream, &mut bytes)?;
//! # Ok(())
//! # }
//! ```
//!
//! | part | is for |
//! |---|---|
//! | [`Nvrtc`] | compiling, with a cache on disk; needs no GPU |
//! | [`Gpu`], [`Stream`], [`Event`] | a device, its queues and its clock |
//! | [`Buffer`], [`PinnedBuffer`] | memory on the device, and on the host for fast copies |
//! | [`Module`], [`Function`], [`PreparedLaunch`] | loaded code, a kernel, a launch that costs one driver call |
//! | [`Graph`], [`GraphExec`] | a recorded sequence of launches, replayed as one |
//! | [`peer`] | cuBLASLt, to be measured against |
//! | [`TensorMap`] | how the tensor memory accelerator addresses an array |
//!
//! Neither library is linked: both are opened when first asked for, and what is missing is an
//! [`Error`](tilewright_base::Error), never a panic. This crate knows host tensors and nothing above
//! them: what a kernel computes is its callers' affair.
//!
//! What is `unsafe` here: a launch, because the kernel's text decides what it touches. Everything
//! else may run out of memory or come in the wrong order (and then says so, or gives wrong numbers
//! in device memory), but cannot break the host program: device memory is reached by copies only.

mod arch;
mod driver;
mod find;
mod nvrtc;
pub mod peer;

pub use arch::Arch;
pub use driver::{
    Args, Buffer, DeviceMemory, Event, Function, FunctionAttributes, Gpu, Graph, GraphExec,
    KernelNode, L2Promotion, LaunchShape, MapElement, Module, OobFill, PinnedBuffer, Plain,
    PreparedLaunch, Properties, RawLaunch, Stream, Swizzle, TensorMap, TensorMapSpec, WindowBox,
    driver_version,
};
pub use nvrtc::{CompileRequest, Compiled, FunctionResources, Nvrtc, Warning, WarningKind};
