//! The operator pack: operators of PyTorch whose kernels this compiler makes on the user's machine.
//!
//! ```text
//! torch.ops.tilewright.rms_norm(x, weight, eps)
//!   --dispatcher (torch-abi)--> ops::norm: checks, shapes, results
//!   --graph text for this type and row length--> plans: compiled once, kept
//!   --CPU: machine code on the tensors' memory | CUDA: kernels in PyTorch's current stream
//! ```
//!
//! An operator is its schema, its checks, and one text: a graph in the language of `tilewright-graph`, with the number
//! of rows as a symbol. Both devices run that text, and so does the interpreter in the tests. What Python adds (fake
//! tensors, derivatives, functions with default values) is in `python/tilewright/ops`.
//!
//! What the graph language does not say (tables of addresses, random numbers under a key that is known on the device only, sums by index) is
//! written by hand: `device/*.cu` for GPUs ([`written`]), loops over slices for the processor ([`host`]).
//!
//! The same for frontends that have no tensors of PyTorch's: [`plain`].
//!
//! To add an operator: a file in `ops/` with a type that implements `Operator`, and its name in `for_each_operator`.

mod host;
mod ops;
pub mod plain;
mod plans;
mod tensors;
#[cfg(test)]
mod texts;
pub mod triton;
mod written;

pub use ops::{formula, number_of, variables};
pub use plans::schedules;

use ops::for_each_operator;
use std::sync::OnceLock;
use tilewright_base::Result;
use tilewright_torch_abi::{Abi, Arg, Library, Operator, Value};

/// What calls without the dispatcher need.
pub use tilewright_torch_abi as abi;

/// The namespace of the operators in PyTorch: `torch.ops.tilewright`.
pub const NAMESPACE: &str = "tilewright";

/// Whether kernels for the processor can be made.
pub const CPU: bool = cfg!(feature = "cpu");

/// Registers all operators with the PyTorch that is loaded; the second time nothing happens.
///
/// # Errors
/// Unsupported where no PyTorch is loaded, or one that is too old; PyTorch's own.
pub fn register() -> Result<()> {
    static DONE: OnceLock<Result<()>> = OnceLock::new();
    DONE.get_or_init(register_once).clone()
}

/// Whether kernels on processors and on CUDA devices can draw random numbers of PyTorch's.
///
/// # Errors
/// Unsupported where no PyTorch is loaded, or one that is too old.
pub fn draws() -> Result<[bool; 2]> {
    Ok(Abi::open()?.draws())
}

/// A kernel that can be called without the dispatcher.
pub struct Kernel {
    /// The operator, with its overload where that is another kernel.
    pub name: &'static str,
    /// Its arguments.
    pub args: &'static [(&'static str, Arg)],
    /// Computes the results, as `Operator::run`.
    pub run: fn(&'static Abi, &mut [Value]) -> Result<Vec<Value>>,
}

/// The kernel of an operator that writes to none of its arguments.
pub fn kernel(name: &str) -> Option<Kernel> {
    let mut found = None;
    macro_rules! look {
        ($($operator:ty),* $(,)?) => { $(
            if <$operator as Operator>::NAME == name {
                let (name, args) = (<$operator as Operator>::NAME, <$operator as Operator>::ARGS);
                found = Some(Kernel { name, args, run: <$operator as Operator>::run });
            }
        )* };
    }
    for_each_operator!(look);
    found.filter(|k| !k.args.iter().any(|(_, a)| matches!(a, Arg::Written | Arg::AllWritten)))
}

fn register_once() -> Result<()> {
    let abi = Abi::open()?;
    let definitions = Library::define(abi, NAMESPACE)?;
    macro_rules! define {
        ($($operator:ty),* $(,)?) => { $(definitions.def::<$operator>()?;)* };
    }
    for_each_operator!(define);
    let cpu = if CPU { Some("CPU") } else { None };
    for key in cpu.into_iter().chain(["CUDA"]) {
        let kernels = Library::kernels(abi, NAMESPACE, key)?;
        macro_rules! implement {
            ($($operator:ty),* $(,)?) => { $(kernels.kernel::<$operator>()?;)* };
        }
        for_each_operator!(implement);
    }
    Ok(())
}
