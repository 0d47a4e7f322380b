//! [`Operator`], [`Library`]: schemas and kernels in PyTorch's dispatcher.

use crate::api::{Abi, Boxed, LibraryHandle, StableValue};
use crate::call::{Arg, Value, give};
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tilewright_base::{Error, Result};

/// An operator: a type without values, so that each has a kernel function of its own.
pub trait Operator {
    /// Its name in the namespace.
    const NAME: &'static str;
    /// Names and kinds of its arguments. One with a default value has it behind `=`: `eps=1e-5`.
    const ARGS: &'static [(&'static str, Arg)];
    /// Its results as the schema says them: `Tensor`, `(Tensor, Tensor)`, `()`.
    const RETURNS: &'static str;
    /// Names of further overloads with the same kernel: `["inference"]` adds `name.inference`.
    const OVERLOADS: &'static [&'static str] = &[];

    /// Computes the results.
    ///
    /// # Errors
    /// What PyTorch's exception is to say.
    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>>;
}

/// The schema of an operator, as PyTorch reads it: `scale(Tensor x, float by=1) -> Tensor`.
pub fn schema<O: Operator>() -> String {
    schema_of::<O>(O::NAME)
}

/// The names under which an operator is registered.
fn names<O: Operator>() -> impl Iterator<Item = String> {
    let overloads = O::OVERLOADS.iter().map(|overload| format!("{}.{overload}", O::NAME));
    std::iter::once(O::NAME.to_string()).chain(overloads)
}

fn schema_of<O: Operator>(name: &str) -> String {
    let written = |kind: &Arg| matches!(kind, Arg::Written | Arg::AllWritten);
    let mut aliases = (b'a'..=b'z').map(char::from);
    let args: Vec<String> = O::ARGS
        .iter()
        .map(|(name, kind)| {
            let alias = if written(kind) { aliases.next().unwrap_or('z') } else { ' ' };
            let ty = match kind {
                Arg::Tensor => "Tensor".to_string(),
                Arg::Written => format!("Tensor({alias}!)"),
                Arg::Optional => "Tensor?".to_string(),
                Arg::Tensors => "Tensor[]".to_string(),
                Arg::AllWritten => format!("Tensor({alias}!)[]"),
                Arg::Float => "float".to_string(),
                Arg::Int => "int".to_string(),
                Arg::Bool => "bool".to_string(),
                Arg::Str => "str".to_string(),
            };
            format!("{ty} {name}")
        })
        .collect();
    format!("{name}({}) -> {}", args.join(", "), O::RETURNS)
}

/// A part of PyTorch's dispatcher: the definitions of a namespace, or its kernels for one device.
///
/// What is registered stays for as long as the process lives.
pub struct Library {
    abi: &'static Abi,
    handle: LibraryHandle,
}

fn c_text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::bug(format!("a zero byte in {text:?}")))
}

const FILE: &std::ffi::CStr = c"tilewright";

impl Library {
    /// The definitions of a namespace, which nobody else defines.
    ///
    /// # Errors
    /// PyTorch's, such as that the namespace exists.
    pub fn define(abi: &'static Abi, namespace: &str) -> Result<Library> {
        let name = c_text(namespace)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: texts that end with a zero, and a place for the handle.
        let code =
            unsafe { (abi.functions.library_def)(name.as_ptr(), FILE.as_ptr(), 0, &mut handle) };
        abi.checked(code, "defining operators in PyTorch")?;
        Ok(Library { abi, handle })
    }

    /// The kernels of a namespace for one key of the dispatcher: `CPU`, `CUDA`.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn kernels(abi: &'static Abi, namespace: &str, key: &str) -> Result<Library> {
        let (name, key) = (c_text(namespace)?, c_text(key)?);
        let mut handle = std::ptr::null_mut();
        // SAFETY: as above.
        let code = unsafe {
            (abi.functions.library_impl)(name.as_ptr(), key.as_ptr(), FILE.as_ptr(), 0, &mut handle)
        };
        abi.checked(code, "registering kernels in PyTorch")?;
        Ok(Library { abi, handle })
    }

    /// Defines an operator.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn def<O: Operator>(&self) -> Result<()> {
        for name in names::<O>() {
            let schema = c_text(&schema_of::<O>(&name))?;
            // SAFETY: a library, and a text that ends with a zero.
            let code = unsafe { (self.abi.functions.define)(self.handle, schema.as_ptr()) };
            self.abi.checked(code, "defining an operator in PyTorch")?;
        }
        Ok(())
    }

    /// Registers the operator's kernel.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn kernel<O: Operator>(&self) -> Result<()> {
        let kernel: Boxed = boxed::<O>;
        for name in names::<O>() {
            let name = c_text(&name)?;
            // SAFETY: a library, a text, and a function that lives as long as this module is loaded, which Python never
            // unloads.
            let code =
                unsafe { (self.abi.functions.implement)(self.handle, name.as_ptr(), kernel) };
            self.abi.checked(code, "registering a kernel in PyTorch")?;
        }
        Ok(())
    }
}

thread_local! {
    /// The message of the exception that is being thrown: the exception copies it.
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// The kernel of `O` as the dispatcher calls it.
///
/// # Safety
/// Called by PyTorch for `O`'s schema: the stack has the arguments, and room for the results.
unsafe extern "C-unwind" fn boxed<O: Operator>(
    stack: *mut StableValue,
    arguments: u64,
    results: u64,
) {
    let Ok(abi) = Abi::open() else { return };
    // SAFETY: the caller's promise.
    let failed = unsafe { run::<O>(abi, stack, arguments as usize, results as usize) };
    if let Some(message) = failed {
        // Nothing of ours is alive here that an exception would have to free.
        // SAFETY: texts that end with a zero. The function throws; this function's ABI lets exceptions pass, and its
        // caller is C++.
        unsafe { (abi.functions.check)(false, c"tilewright".as_ptr(), FILE.as_ptr(), 0, message) };
    }
}

/// Runs the kernel; the message of its failure, which lives until this thread's next one.
///
/// # Safety
/// As [`boxed`].
unsafe fn run<O: Operator>(
    abi: &'static Abi,
    stack: *mut StableValue,
    arguments: usize,
    results: usize,
) -> Option<*const c_char> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        if arguments != O::ARGS.len() {
            return Err(Error::bug(format!("{arguments} arguments for {}", schema::<O>())));
        }
        let mut values = Vec::with_capacity(arguments);
        let mut refused = None;
        for (index, (_, kind)) in O::ARGS.iter().enumerate() {
            // SAFETY: the stack has as many values as the schema says, each of the kind that it says.
            match unsafe { Value::take(abi, *kind, *stack.add(index)) } {
                Ok(value) => values.push(value),
                Err(error) => {
                    refused.get_or_insert(error);
                    values.push(Value::None);
                }
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        let given = O::run(abi, &mut values)?;
        if given.len() != results {
            return Err(Error::bug(format!("{} results for {}", given.len(), schema::<O>())));
        }
        for (index, value) in given.into_iter().enumerate() {
            let raw = give(abi, value)?;
            // SAFETY: the stack has room for as many values as there are results.
            unsafe { *stack.add(index) = raw };
        }
        Ok(())
    }));
    let error = match outcome {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Error::bug(format!("a panic: {}", text.unwrap_or("of no text")))
        }
    };
    let text = describe(O::NAME, &error).replace('\0', " ");
    let text = CString::new(text).unwrap_or_default();
    Some(MESSAGE.with(|message| {
        *message.borrow_mut() = text;
        message.borrow().as_ptr()
    }))
}

/// What the exception says: the operator, the message, what it is about, what to do.
fn describe(name: &str, error: &Error) -> String {
    let mut text = format!("tilewright::{name}: {}", error.message());
    for context in error.context() {
        text += &format!(" ({context})");
    }
    for note in error.notes() {
        text += &format!("\n  {note}");
    }
    if let Some(hint) = error.hint() {
        text += &format!("\n  hint: {hint}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scale;
    impl Operator for Scale {
        const NAME: &'static str = "scale";
        const ARGS: &'static [(&'static str, Arg)] = &[
            ("x", Arg::Tensor),
            ("w", Arg::Optional),
            ("out", Arg::Written),
            ("by=1", Arg::Float),
        ];
        const RETURNS: &'static str = "Tensor";
        fn run(_: &'static Abi, _: &mut [Value]) -> Result<Vec<Value>> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn schemas_are_what_pytorch_reads() {
        let text = "scale(Tensor x, Tensor? w, Tensor(a!) out, float by=1) -> Tensor";
        assert_eq!(schema::<Scale>(), text);
    }

    #[test]
    fn an_error_says_what_to_do() {
        let error = Error::user("x is too wide").with_hint("make it narrower");
        assert_eq!(
            describe("scale", &error),
            "tilewright::scale: x is too wide\n  hint: make it narrower"
        );
    }
}
