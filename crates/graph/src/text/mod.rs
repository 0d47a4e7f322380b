//! The text form of graphs: printed, read back, equal.
//!
//! ```text
//! graph @mlp(N in 1..4096) {
//!   %0 "x": f32[N,784] = input
//!   %1 "w": f32[784,10] = const @4f0c21d37b5e6a98
//!   %2: f32[N,10] = contract "mk,kn->mn" acc=f32 %0, %1  # fc1
//!   %3: f32[] = const 0.5
//!   %4: f32[N,10] = map { x, c -> max(x * c, 0.0) } %2, %3
//!   return "y": %4
//! }
//! ```
//!
//! * `%label "name": type = ...`: the label is local to the text (the printer numbers values in
//!   order of appearance), the name is the frontend's, and is left out when empty. The type may be
//!   left out where the operator determines it; otherwise it must be what the operator gives.
//! * `N in 1..4096` declares a symbol with inclusive bounds; `N in 1..` has no upper bound.
//! * Constants of at most [`INLINE_ELEMENTS`] elements are written out (a number, or a list in
//!   row-major order); larger ones are named by a hash of their content, and their data stands in
//!   a table beside the text ([`Graph::text_with_data`], [`Constants`]).
//! * `# ...` after a node says which of the user's nodes it came from. Comments on lines of their
//!   own (`#` or `//`) mean nothing.
//! * Dead nodes and constants that no one reads are not printed.
//!
//! Each operator is one case in `print.rs` and one in `parse.rs`, in the order of `op.rs`: its name
//! ([`crate::Op::name`]), then attributes (`key=value`, bare words, lists in brackets), then operands.

mod lex;
mod parse;
mod print;

use crate::{Graph, Op, TensorType};
use std::collections::BTreeMap;
use std::fmt;
use tilewright_base::Result;
use tilewright_data::Tensor;

/// Constants of at most this many elements are written out in the text.
pub const INLINE_ELEMENTS: usize = 16;

/// Where the parser gets the data of constants that the text only names.
#[derive(Clone, Copy, Debug, Default)]
pub enum Constants<'a> {
    /// Nowhere: such a constant is an error.
    #[default]
    None,
    /// From a table by key (without the `@`).
    Table(&'a BTreeMap<String, Tensor>),
    /// All zeros.
    Zeros,
    /// Small pseudo-random numbers in [-1, 1) (integers: 0 to 7) that depend on this seed and on
    /// the key.
    Seeded(u64),
}

impl Graph {
    /// Reads the text form; see the module's head. Names of large constants are an error:
    /// [`Graph::parse_with`] takes their data.
    pub fn parse(text: &str) -> Result<Graph> {
        Graph::parse_with("<graph>", text, Constants::None)
    }

    /// Reads the text form of a file called `name`.
    pub fn parse_with(name: &str, text: &str, constants: Constants<'_>) -> Result<Graph> {
        parse::parse(name, text, constants)
    }

    /// Reads an operator with its attributes, as it stands behind `=` in the text form but without
    /// operands (`reduce sum axes=[1] keep`), over this graph's symbols. `operands` are the types it
    /// will be applied to, `results` the declared types of its results where the operator does not
    /// determine them (`iota`).
    pub fn parse_op(
        &self,
        text: &str,
        operands: &[TensorType],
        results: &[Option<TensorType>],
    ) -> Result<Op> {
        parse::parse_op(self, text, operands, results)
    }

    /// Reads a type such as `f32[N,4]` over this graph's symbols.
    pub fn parse_type(&self, text: &str) -> Result<TensorType> {
        parse::parse_type(self, text)
    }

    /// The text, and the data of the constants that it only names, by key.
    pub fn text_with_data(&self) -> (String, BTreeMap<String, Tensor>) {
        let mut text = String::new();
        let table = print::print(self, &mut text);
        (text, table)
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text_with_data().0)
    }
}
