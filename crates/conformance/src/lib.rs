//! Official test suites, run as ratchets: a committed list of what passes, which may only grow.
//!
//! [`onnx_backend`] runs the node tests of the `onnx` Python package.

pub mod onnx_backend;
