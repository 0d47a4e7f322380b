//! Search for the fastest schedule by measuring, and the records it leaves.
//!
//! | part | is for |
//! |---|---|
//! | [`search`] | which schedules are timed, and which one is taken; knows no GPU |
//! | [`products`] | matrix products: their space as the search sees it |
//! | `device` | timing, compiling meanwhile, checking against float64 |
//! | [`store`] | records and earlier timings on disk |
//! | [`tuner`] | all of it for one product |
//! | [`command`] | what the commands share: arguments, products one after another, the table |
//! | `bin/tune.rs` | `tw-gpu-tune`, for machines without the rest |
//!
//! What a record is, and when the picker takes one, is in `tilewright_kernels::gemm`.

pub mod command;
mod device;
pub mod products;
pub mod search;
pub mod store;
pub mod tuner;
