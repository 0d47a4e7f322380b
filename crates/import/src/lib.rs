//! Models in files to graph IR: ONNX and Hugging Face directories.

pub mod hf;
pub mod onnx;
