//! [`Arg`], [`Value`]: the arguments of a call, taken off the dispatcher's stack.
//!
//! On the stack every argument is 64 bits: a number, or the address of something that the callee now owns. Each is
//! turned into a [`Value`] first, all of them, whatever an earlier one was: so nothing is lost when one is refused.

use crate::api::{Abi, StableValue};
use crate::tensor::Tensor;
use std::ffi::c_void;
use tilewright_base::{Error, Result};

/// What an argument of a schema is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// `Tensor`
    Tensor,
    /// `Tensor(a!)`: written to.
    Written,
    /// `Tensor?`
    Optional,
    /// `Tensor[]`
    Tensors,
    /// `Tensor(a!)[]`: all of them are written to.
    AllWritten,
    /// `float`
    Float,
    /// `int`
    Int,
    /// `bool`
    Bool,
    /// `str`
    Str,
}

/// An argument of a call.
#[derive(Debug)]
pub enum Value {
    /// A tensor.
    Tensor(Tensor),
    /// An optional tensor that is not given.
    None,
    /// Tensors.
    Tensors(Vec<Tensor>),
    /// A number.
    Float(f64),
    /// A number.
    Int(i64),
    /// Yes or no.
    Bool(bool),
    /// Text.
    Str(String),
}

impl Value {
    /// Takes an argument off the stack.
    ///
    /// # Safety
    /// `raw` is what PyTorch passes for an argument of this kind, taken once.
    pub(crate) unsafe fn take(abi: &'static Abi, arg: Arg, raw: StableValue) -> Result<Value> {
        // SAFETY: the caller's promise: what the address of each kind points to.
        unsafe {
            Ok(match arg {
                Arg::Tensor | Arg::Written => Value::Tensor(Tensor::own(abi, raw as *mut c_void)?),
                Arg::Optional => match optional(abi, raw) {
                    Some(raw) => Value::Tensor(Tensor::own(abi, raw as *mut c_void)?),
                    None => Value::None,
                },
                Arg::Tensors | Arg::AllWritten => Value::Tensors(tensors(abi, raw as *mut c_void)?),
                Arg::Float => Value::Float(f64::from_bits(raw)),
                Arg::Int => Value::Int(raw.cast_signed()),
                Arg::Bool => Value::Bool(raw & 0xff != 0),
                Arg::Str => Value::Str(text(abi, raw as *mut c_void)?),
            })
        }
    }

    /// The tensor.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn tensor(&mut self) -> Result<Tensor> {
        match std::mem::replace(self, Value::None) {
            Value::Tensor(tensor) => Ok(tensor),
            other => Err(Error::bug(format!("{other:?} where a tensor is taken"))),
        }
    }

    /// The tensor, if it is given.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn optional(&mut self) -> Result<Option<Tensor>> {
        match self {
            Value::None => Ok(None),
            _ => self.tensor().map(Some),
        }
    }

    /// The tensors.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn tensors(&mut self) -> Result<Vec<Tensor>> {
        match std::mem::replace(self, Value::None) {
            Value::Tensors(tensors) => Ok(tensors),
            other => Err(Error::bug(format!("{other:?} where tensors are taken"))),
        }
    }

    /// The number.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn float(&self) -> Result<f64> {
        match self {
            Value::Float(x) => Ok(*x),
            other => Err(Error::bug(format!("{other:?} where a number is taken"))),
        }
    }

    /// The whole number.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn int(&self) -> Result<i64> {
        match self {
            Value::Int(x) => Ok(*x),
            other => Err(Error::bug(format!("{other:?} where a whole number is taken"))),
        }
    }

    /// Yes or no.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn bool(&self) -> Result<bool> {
        match self {
            Value::Bool(x) => Ok(*x),
            other => Err(Error::bug(format!("{other:?} where yes or no is taken"))),
        }
    }

    /// The text.
    ///
    /// # Errors
    /// Our bug where the schema says otherwise.
    pub fn str(&self) -> Result<&str> {
        match self {
            Value::Str(text) => Ok(text),
            other => Err(Error::bug(format!("{other:?} where text is taken"))),
        }
    }
}

/// What an optional holds; its cell is freed.
///
/// # Safety
/// `raw` is null or the address of a cell that we own.
unsafe fn optional(abi: &'static Abi, raw: StableValue) -> Option<StableValue> {
    let cell = raw as *mut StableValue;
    if cell.is_null() {
        return None;
    }
    // SAFETY: the caller's promise. The cell is made with C++'s `new`; before PyTorch 2.13 the callee frees it with
    // `delete`, which for a plain number is `operator delete`. `Abi::open` has seen to it that one of the two is there.
    unsafe {
        let value = *cell;
        match (abi.functions.delete_value, abi.functions.operator_delete) {
            (Some(delete), _) => {
                let _ = delete(cell);
            }
            (None, Some(delete)) => delete(cell.cast()),
            (None, None) => {}
        }
        Some(value)
    }
}

/// The tensors of a list; the list is freed.
///
/// # Safety
/// `list` is a list of tensors that we own.
unsafe fn tensors(abi: &'static Abi, list: *mut c_void) -> Result<Vec<Tensor>> {
    const READING: &str = "reading a list of tensors";
    let f = &abi.functions;
    let mut count = 0;
    let mut all = Vec::new();
    // SAFETY: the caller's promise; each element is a reference that is ours once it is read.
    unsafe {
        let mut result = abi.checked((f.list_size)(list, &mut count), READING);
        for index in 0..count {
            let mut raw = 0;
            let read = abi.checked((f.list_get)(list, index, &mut raw), READING);
            match read.and_then(|()| Tensor::own(abi, raw as *mut c_void)) {
                Ok(tensor) => all.push(tensor),
                Err(error) => result = Err(error),
            }
        }
        let _ = (f.delete_list)(list);
        result.map(|()| all)
    }
}

/// The text of a string; the string is freed.
///
/// # Safety
/// `string` is a string that we own.
unsafe fn text(abi: &'static Abi, string: *mut c_void) -> Result<String> {
    const READING: &str = "reading a text";
    let f = &abi.functions;
    let (mut length, mut start) = (0, std::ptr::null());
    // SAFETY: the caller's promise; the text has as many bytes as said and lives until the string is freed.
    unsafe {
        let known = abi.checked((f.string_length)(string, &mut length), READING);
        let known = known.and_then(|()| abi.checked((f.string_text)(string, &mut start), READING));
        let text = known.map(|()| {
            let bytes = std::slice::from_raw_parts(start.cast::<u8>(), length);
            String::from_utf8_lossy(bytes).into_owned()
        });
        let _ = (f.delete_string)(string);
        text
    }
}

/// Puts a result on the stack.
pub(crate) fn give(abi: &'static Abi, value: Value) -> Result<StableValue> {
    Ok(match value {
        Value::Tensor(tensor) => tensor.into_handle()? as StableValue,
        Value::Float(x) => x.to_bits(),
        Value::Int(x) => x.cast_unsigned(),
        Value::Bool(x) => x.into(),
        Value::Tensors(tensors) => {
            const MAKING: &str = "making a list of tensors";
            let f = &abi.functions;
            let mut list = std::ptr::null_mut();
            // SAFETY: a place for the list.
            abi.checked(unsafe { (f.new_list)(tensors.len(), &mut list) }, MAKING)?;
            for tensor in tensors {
                let handle = tensor.into_handle()?;
                // SAFETY: the list takes the reference over.
                let code = unsafe { (f.list_push)(list, handle as StableValue) };
                abi.checked(code, MAKING)?;
            }
            list as StableValue
        }
        Value::None | Value::Str(_) => return Err(Error::bug("a result of no kind")),
    })
}
