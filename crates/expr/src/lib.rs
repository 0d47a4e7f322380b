//! Scalar expressions: functions of a few scalars, `gelu(x) = 0.5 * x * (1 + erf(x / sqrt(2)))`.
//!
//! One definition serves elementwise operators, GEMM epilogues, attention score rules, quantisation
//! formulas and optimiser steps. This crate knows no tensors and no devices.

mod ir;
mod op;

pub use ir::{ExprId, Func, FuncBuilder, Node, Param, Value};
pub use op::Op;
