//! PyTorch's stable C interface: operators in its dispatcher, tensors, the current CUDA stream.
//!
//! Nothing of PyTorch is linked, and no C++ is compiled: the process that has imported `torch` has its libraries
//! loaded, and [`Abi::open`] finds their functions by name. The interface (`aoti_torch_*`, declared in
//! `torch/csrc/inductor/aoti_torch/c/shim.h` and `torch/csrc/stable/c/shim.h`) keeps its meaning between versions, so one
//! build serves PyTorch 2.10 and later; a function that is missing is an error that names it.
//!
//! | part | is for |
//! |---|---|
//! | [`Abi`] | the functions, found once per process |
//! | [`Operator`], [`Library`] | a schema and a kernel, registered for a device |
//! | [`Value`] | an argument of a call: owned, freed when the call ends |
//! | [`Tensor`] | a tensor of PyTorch: its place, shape and type |
//! | [`Interop`] | tensors of Python without the dispatcher, where it would do nothing |
//!
//! An error of a kernel becomes PyTorch's own exception (`RuntimeError` in Python); a panic becomes one, too. What is
//! `unsafe` here stays here: [`Tensor::address`] gives a number, and what is done with it is its user's affair.

mod api;
mod call;
mod interop;
mod library;
mod tensor;

pub use api::{Abi, CudaGuard, Device};
pub use call::{Arg, Value};
pub use interop::{Interop, State, forks};
pub use library::{Library, Operator, schema};
pub use tensor::{Axes, Tensor, contiguous_strides};
