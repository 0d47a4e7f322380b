//! The text form of a [`Func`]: `{ x, b -> let t0 = x + b; t0 * t0 }`.
//!
//! [`Func::parse`] reads it back to an equal function. Parentheses are as few as the grammar
//! allows; a node used twice gets a name, and so does the inside of a very deep expression, so
//! that no text nests deeper than the parser goes. A number is written bare where something beside
//! it tells its type, else as a conversion: `f32(2.0)`.

use crate::ir::{ExprId, Func, Node, Value};
use crate::op::Op;
use crate::parse::level;
use std::fmt::{self, Write};
use tilewright_base::DType;

/// Depth of an expression beyond which its inner part gets a name.
const DEPTH_MAX: u32 = 30;

impl fmt::Display for Func {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.params().iter().map(|p| &*p.name).collect();
        write!(f, "{{ {}{}-> ", names.join(", "), if names.is_empty() { "" } else { " " })?;
        let printer = Printer::new(self);
        for (id, ..) in self.nodes() {
            if let Some(name) = &printer.names[id.index()] {
                let mut text = String::new();
                printer.expression(id, 0, false, &mut text);
                write!(f, "let {name} = {text}; ")?;
            }
        }
        let mut text = String::new();
        printer.node(self.result(), 0, false, &mut text);
        write!(f, "{text} }}")
    }
}

/// A constant as the language writes it, without its type.
pub(crate) fn literal(value: Value, dtype: DType) -> String {
    match value {
        Value::Int(v) if dtype == DType::Bool => (v != 0).to_string(),
        Value::Int(v) if dtype == DType::U64 => (v as u64).to_string(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) if v.is_nan() => "nan".to_string(),
        Value::Float(v) if v.is_infinite() => if v > 0.0 { "inf" } else { "-inf" }.to_string(),
        Value::Float(v) if dtype == DType::F64 => format!("{v:?}"),
        // The narrower types are exact in f32.
        Value::Float(v) => format!("{:?}", v as f32),
    }
}

struct Printer<'a> {
    func: &'a Func,
    /// Names of nodes that have a `let`.
    names: Vec<Option<String>>,
    /// Whether the node's own text tells its type.
    definite: Vec<bool>,
}

impl Printer<'_> {
    fn new(func: &Func) -> Printer<'_> {
        let count = func.nodes().len();
        let mut uses = vec![0u32; count];
        for (_, node, _) in func.nodes() {
            if let Node::Op(_, args) = node {
                for a in args {
                    uses[a.index()] += 1;
                }
            }
        }
        let mut printer = Printer { func, names: vec![None; count], definite: vec![true; count] };
        let mut depths = vec![0u32; count];
        let mut next = 0;
        for (id, node, dtype) in func.nodes() {
            let i = id.index();
            let Node::Op(op, args) = node else {
                printer.definite[i] = dtype == DType::Bool || matches!(node, Node::Param(_));
                continue;
            };
            depths[i] = 1 + args.iter().map(|a| depths[a.index()]).max().unwrap_or(0);
            if (uses[i] > 1 || depths[i] > DEPTH_MAX) && id != func.result() {
                depths[i] = 0;
                let taken = |name: &str| func.params().iter().any(|p| *p.name == *name);
                while taken(&format!("t{next}")) {
                    next += 1;
                }
                printer.names[i] = Some(format!("t{next}"));
                next += 1;
            } else if *op != Op::Cast && !op.is_predicate() {
                let operands = if *op == Op::Select { &args[1..] } else { &args[..] };
                printer.definite[i] = operands.iter().any(|a| printer.definite[a.index()]);
            }
        }
        printer
    }

    /// A node or its name. `known`: the context tells the type of a bare number.
    fn node(&self, id: ExprId, min_level: u8, known: bool, out: &mut String) {
        match &self.names[id.index()] {
            Some(name) => out.push_str(name),
            None => self.expression(id, min_level, known, out),
        }
    }

    /// Writes the node itself, in parentheses when it binds weaker than `min_level`.
    fn expression(&self, id: ExprId, min_level: u8, known: bool, out: &mut String) {
        let dtype = self.func.dtype_of(id);
        let (op, args) = match self.func.node(id) {
            Node::Param(p) => return out.push_str(&self.func.params()[*p as usize].name),
            Node::Const(value) => {
                let text = literal(*value, dtype);
                let _ = if !known && dtype != DType::Bool {
                    write!(out, "{dtype}({text})")
                } else if text.starts_with('-') && min_level > level::UNARY {
                    write!(out, "({text})")
                } else {
                    out.write_str(&text)
                };
                return;
            }
            Node::Op(op, args) => (*op, &args[..]),
        };
        // Where no operand tells the type, the first is made to, unless the context does.
        let operands = if op == Op::Select { &args[1..] } else { args };
        let tells =
            operands.iter().any(|a| self.names[a.index()].is_some() || self.definite[a.index()]);
        let told = tells || (known && !op.is_predicate() && op != Op::Cast);
        let first_known = told && op != Op::Cast;
        let own = match op {
            Op::Neg | Op::Not => level::UNARY,
            _ => op.infix(dtype == DType::Bool).map_or(level::PRIMARY, |(_, level)| level),
        };
        let parenthesised = own < min_level;
        if parenthesised {
            out.push('(');
        }
        match op {
            Op::Neg | Op::Not => {
                out.push_str(match op {
                    Op::Neg => "-",
                    _ if dtype == DType::Bool => "!",
                    _ => "~",
                });
                // `-1.0` would be read as a number.
                let bare = matches!(self.func.node(args[0]), Node::Const(_)) && first_known;
                if bare && op == Op::Neg {
                    out.push('(');
                    self.node(args[0], 0, first_known, out);
                    out.push(')');
                } else {
                    self.node(args[0], level::UNARY, first_known, out);
                }
            }
            Op::Cast => {
                let _ = write!(out, "{dtype}(");
                self.node(args[0], 0, false, out);
                out.push(')');
            }
            _ if own < level::PRIMARY => {
                let (symbol, level) = op.infix(dtype == DType::Bool).unwrap_or(("?", own));
                let (left, right) = match level {
                    level::COMPARE => (level + 1, level + 1),
                    level::POWER => (level + 1, level::UNARY),
                    _ => (level, level + 1),
                };
                self.node(args[0], left, first_known, out);
                let _ = write!(out, " {symbol} ");
                self.node(args[1], right, true, out);
            }
            _ => {
                let name = if op == Op::Select { "where" } else { op.name() };
                let _ = write!(out, "{name}(");
                let first_operand = args.len() - operands.len();
                for (i, a) in args.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    let known = i > first_operand || (i == first_operand && first_known);
                    self.node(*a, 0, known, out);
                }
                out.push(')');
            }
        }
        if parenthesised {
            out.push(')');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testgen;
    use proptest::prelude::*;

    fn types(func: &Func) -> Vec<DType> {
        func.params().iter().map(|p| p.dtype).collect()
    }

    /// Text that parses and prints as itself.
    fn same(text: &str, types: &[DType]) {
        match Func::parse(text, types) {
            Ok(f) => assert_eq!(f.to_string(), text),
            Err(e) => panic!("{e:?}"),
        }
    }

    #[test]
    fn canonical_texts_print_as_they_are_written() {
        use DType::*;
        same("{ a, b -> a * b + 1.0 }", &[F32, F32]);
        same("{ x, b -> let t0 = x + b; t0 * t0 }", &[BF16, BF16]);
        same("{ x -> x - (x - 1.0) - -1.0 }", &[F64]);
        same("{ x -> -x ** 2.0 + (-x) ** -2.0 ** x }", &[F32]);
        same("{ x -> (x ** x) ** (-1.0) ** x }", &[F32]);
        same("{ -> f32(1.0) }", &[]);
        same("{ -> i32(f32(1.5)) }", &[]);
        same("{ -> -f32(1.0) + 2.0 }", &[]);
        same("{ x -> -(1.0) + x }", &[F32]);
        same("{ x -> where(x < 0.0, -inf, nan) + x }", &[F16]);
        same("{ x -> where(isnan(x), f32(1.0), 2.0) }", &[F16]);
        same("{ x -> exp(f64(1.0)) < 2.0 && x }", &[Bool]);
        same("{ x -> !(x || true) }", &[Bool]);
        same("{ x -> ~(x & 15 | x ^ 3) << 2 >> x }", &[U8]);
        same("{ x -> x + 18446744073709551615 }", &[U64]);
        same("{ x -> x + -9223372036854775808 }", &[I64]);
        same("{ x -> (x < 1.0) == (x > 0.0) }", &[F32]);
        same("{ x, t0 -> let t1 = x * t0; t1 / t1 }", &[F32, F32]);
        same("{ x -> x + where(i64(4611686018427387904) < 0, 0, 0 + 0) }", &[I32]);
        same("{ x -> fma(x, 0.1, max(1e-30, x)) }", &[F32]);
    }

    #[test]
    fn numbers_without_a_type_and_unknown_names_are_errors() {
        for (text, message) in [
            ("{ x -> 1.0 }", "the type of this number is not known"),
            ("{ x -> y }", "`y` is not known"),
            ("{ x, y -> x }", "the function has 2 parameters, 1 are given"),
            ("{ x -> x + }", "expected a number, a name or `(`, found `}`"),
        ] {
            assert_eq!(Func::parse(text, &[DType::F32]).unwrap_err().message(), message);
        }
    }

    #[test]
    fn names_of_parameters_become_printable() {
        let mut b = crate::FuncBuilder::new();
        let x = b.param("input.1", DType::F32);
        let y = b.param("inf", DType::F32);
        let z = b.param("", DType::F32);
        let s = b.op(Op::Add, &[x, y]);
        let s = b.op(Op::Add, &[s, z]);
        let f = b.finish(s);
        assert_eq!(f.to_string(), "{ input_1, _inf, _ -> input_1 + _inf + _ }");
        assert_eq!(Func::parse(&f.to_string(), &types(&f)).unwrap(), f);
    }

    #[test]
    fn long_and_deep_functions_round_trip() {
        for op in [Op::Neg, Op::Exp, Op::Add, Op::Pow] {
            let mut b = crate::FuncBuilder::new();
            let x = b.param("x", DType::F32);
            let mut y = x;
            for _ in 0..20_000 {
                y = if op.arity() == 1 { b.op(op, &[y]) } else { b.op(op, &[x, y]) };
            }
            let f = b.finish(y);
            assert_eq!(Func::parse(&f.to_string(), &types(&f)).unwrap(), f);
        }
    }

    proptest! {
        #![proptest_config(testgen::config(1500))]
        #[test]
        fn every_function_comes_back_from_its_text(func in testgen::func(40)) {
            let text = func.to_string();
            match Func::parse(&text, &types(&func)) {
                Ok(back) => prop_assert_eq!(back, func, "{}", text),
                Err(e) => prop_assert!(false, "{text}\n{e:?}"),
            }
        }
    }
}
