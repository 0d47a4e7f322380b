//! Host tensors: a data type, a concrete shape, and bytes in row-major order.
//!
//! [`Tensor`] is what files hold, what constants are, and what goes in and out of a run. Bytes are
//! shared (an owned vector or a part of a memory-mapped file), so cloning is cheap and weights are
//! never doubled; 16-bit ones that are computed with in `f32` are widened only where somebody reads them so ([`Widened`]). This crate does no arithmetic on tensors and knows no devices.

mod convert;
mod lent;
mod mapped;
mod room;
mod tensor;
mod widened;

pub use convert::{Number, from_f64, from_i64, read_f64, read_i64};
pub use lent::Lent;
pub use mapped::MappedFile;
pub use room::{check_memory, out_of_memory};
pub use tensor::{Bytes, Tensor, element_count};
pub use widened::Widened;
