//! Scalar expressions: functions of a few scalars, `gelu(x) = 0.5 * x * (1 + erf(x / sqrt(2)))`.
//!
//! One definition serves elementwise operators, GEMM epilogues, attention score rules, quantisation
//! formulas and optimiser steps. This crate knows no tensors and no devices. It is a compiler of
//! its own:
//!
//! ```text
//! text --lex--> tokens --parse--> Program (tree with places) --check--> Func (typed DAG)
//! Func --simplify, derivative, expand--> Func --eval, Display, to_cuda, to_triton--> value, text
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | `op.rs`, `op_table.rs` | the operations and what each of them means, as one table |
//! | `ir.rs` | [`Func`], the typed DAG, and its builder |
//! | `lex.rs`, `ast.rs`, `parse.rs`, `check.rs`, `prelude.rs` | the language |
//! | `text.rs` | the text form of a `Func`, which parses back |
//! | `eval.rs` | the oracle in f64, and exact evaluation |
//! | `rules.rs`, `simplify.rs`, `derivative.rs` | rewriting |
//! | `print.rs`, `helpers.cuh` | CUDA C++ and Triton |
//!
//! ```
//! use tilewright_expr::{CompileOptions, compile};
//! let f = compile("loss(x, y) = (x - y) ** 2; loss(a, b) / 2", &CompileOptions::default())?.func;
//! assert_eq!(f.simplify().to_string(), "{ a, b -> let t0 = a - b; t0 * t0 * 0.5 }");
//! assert_eq!(f.derivative(0)?.eval_f64(&[5.0, 2.0]), 3.0);
//! # Ok::<(), tilewright_base::Error>(())
//! ```

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
