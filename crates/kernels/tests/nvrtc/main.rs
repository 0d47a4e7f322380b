//! Kernels of the library compile, keep what they work on in registers, and take no more of a multiprocessor than is
//! written down (`ratchet.rs`). No GPU is needed; without NVRTC the tests say that they were skipped, or fail where it is
//! required (`TILEWRIGHT_REQUIRE_NVRTC=1`, which `make test` sets).

mod attention;
mod gemm;
mod planned;
mod ratchet;
mod rows;
