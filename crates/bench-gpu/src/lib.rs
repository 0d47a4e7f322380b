//! Matrix products on a GPU, beside cuBLASLt, and kernels along rows, beside a copy: how fast, and how exact.
//!
//! | part | is for |
//! |---|---|
//! | [`case`] | what is multiplied: kinds of numbers, shapes, layouts, the list of shapes |
//! | [`support`] | inputs, a float64 reference and digests on the device (`support.cu`) |
//! | [`arms`] | the two ways to multiply: a plan of our kernels, and cuBLASLt's best algorithm |
//! | [`measure`] | samples that alternate between the arms, cold caches, quartiles |
//! | [`record`] | the JSON record and the table |
//! | [`suite`], [`check`] | the products that are tested, and what is checked of each |
//! | [`rows`] | kernels along rows, elementwise kernels and reductions: tensors, launches, what is right |
//! | [`attention`] | attention: cases, tensors, its reference; `bin/attention.rs` is `tw-gpu-attention` |
//! | `bin/bench.rs` | `tw-gpu-bench` |
//! | `bin/rows.rs` | `tw-gpu-rows` |
//! | `bin/test.rs` | `tw-gpu-test` |
//!
//! To add a kind of numbers: its row in [`case::NUMBERS`] and, if its types are new there, its lines at
//! the end of `support.cu`.

pub mod arms;
pub mod attention;
pub mod case;
pub mod check;
pub mod ending;
pub mod measure;
pub mod record;
pub mod rows;
pub mod suite;
pub mod support;
