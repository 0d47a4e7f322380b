//! Library kernels. Each is a folder: a tile program, its schedule space, a picker that needs no
//! tuning, and how to launch it.

pub mod attention;
pub mod decode;
pub mod gemm;
pub mod map;
pub mod reduce;
pub mod rows;
