//! Search for the fastest schedule by measuring, and the records it leaves.
//!
//! | part | is for |
//! |---|---|
//! | [`search`] | which schedules are timed, and which one is taken; knows no GPU |
//! | [`products`] | matrix products: their space as the search sees it |
//! | [`device`] | timing, compiling meanwhile, checking against float64 |
//! | [`store`] | records and earlier timings on disk |
//! | [`tune`] | all of it for one product |
//! | `bin/tune.rs` | `tw-gpu-tune`, for machines without the rest |
//!
//! What a record is, and when the picker takes one, is in `tilewright_kernels::gemm`.

pub mod search;
