//! Scalar expressions: functions of a few scalars, `gelu(x) = 0.5 * x * (1 + erf(x / sqrt(2)))`.
//!
//! One definition serves elementwise operators, GEMM epilogues, attention score rules, quantisation
//! formulas and optimiser steps. This crate knows no tensors and no devices.

mod ast;
mod check;
mod derivative;
mod eval;
mod ir;
#[cfg(test)]
mod lang_tests;
mod lex;
mod op;
mod op_table;
mod parse;
mod prelude;
mod print;
mod rules;
mod simplify;
#[cfg(test)]
mod testgen;
mod text;

pub use ast::{AstId, AstKind, AstNode, Binder, Block, Function, Number, Program};
pub use check::{CompileOptions, Compiled, compile, list_tokens, parse_program};
pub use ir::{ExprId, Func, FuncBuilder, Node, Param, Value};
pub use lex::{Source, Span, Token, TokenKind, tokens};
pub use op::Op;
pub use op_table::{FloatEval, Int, IntEval, Llvm, OPS, OpRow};
pub use print::CUDA_HELPERS;
