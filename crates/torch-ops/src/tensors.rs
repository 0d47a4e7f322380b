//! Checks and shapes that operators share. Messages speak of the operator's arguments by name.

use tilewright_base::{DType, Error, Result};
use tilewright_torch_abi::{Device, Tensor};

/// Every kernel may read 16 bytes at a time.
const ALIGN: u64 = 16;

/// Element types that rows are computed in.
const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];

/// What sums and intermediate values are kept in: `f64` for `f64`, `f32` for the rest.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The type of a tensor of floats.
pub(crate) fn float(name: &str, tensor: &Tensor) -> Result<DType> {
    let dtype = tensor.dtype()?;
    let known = FLOATS.contains(&dtype);
    let message = || format!("{name} is {dtype}; it must be float32, bfloat16, float16 or float64");
    known.then_some(dtype).ok_or_else(|| Error::user(message()))
}

/// The same tensor, row-major and aligned.
pub(crate) fn plain(tensor: Tensor) -> Result<Tensor> {
    match tensor.device() {
        // Code for processors loads from any address.
        Device::Cpu => tensor.laid_out(1),
        Device::Cuda(_) => tensor.laid_out(ALIGN),
    }
}

/// A tensor seen as a matrix: all axes but the last are its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) rows: i64,
    pub(crate) columns: i64,
}

impl Rows {
    pub(crate) fn of(name: &str, tensor: &Tensor) -> Result<Rows> {
        let Some((&columns, lead)) = tensor.sizes().split_last() else {
            return Err(Error::user(format!("{name} has no axes; it must have at least one")));
        };
        Ok(Rows { rows: lead.iter().product(), columns })
    }

    pub(crate) fn is_empty(self) -> bool {
        self.rows == 0 || self.columns == 0
    }
}

/// Refuses a tensor on another device than `first`.
pub(crate) fn same_device(name: &str, tensor: &Tensor, first: &Tensor) -> Result<()> {
    if tensor.device() == first.device() {
        return Ok(());
    }
    let message = format!("{name} is on {:?}, and x on {:?}", tensor.device(), first.device());
    Err(Error::user(message))
}

/// Refuses a tensor of another shape, type or device than `first`.
pub(crate) fn like(name: &str, tensor: &Tensor, first: &Tensor) -> Result<()> {
    same_device(name, tensor, first)?;
    if tensor.sizes() != first.sizes() {
        let message = format!("{name} has shape {:?}, and x {:?}", tensor.sizes(), first.sizes());
        return Err(Error::user(message));
    }
    if tensor.dtype()? != first.dtype()? {
        let message = format!("{name} is {}, and x {}", tensor.dtype()?, first.dtype()?);
        return Err(Error::user(message));
    }
    Ok(())
}

/// Refuses a tensor that is not a vector of `columns` numbers on the device of `first`; its type.
pub(crate) fn vector(name: &str, tensor: &Tensor, columns: i64, first: &Tensor) -> Result<DType> {
    same_device(name, tensor, first)?;
    if tensor.sizes() != [columns] {
        let message = format!("{name} has shape {:?}; it must be [{columns}]", tensor.sizes());
        return Err(Error::user(message));
    }
    float(name, tensor)
}
