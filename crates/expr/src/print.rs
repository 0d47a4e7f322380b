//! CUDA C++ and Triton text for a [`Func`], one statement per operation.
//!
//! **Values.** f64 is `double` and f32 `float`; the narrower floats are held in `float` (Triton:
//! `tl.float32`), each operation rounding its result to the type. Integers are held in their C
//! type, 4-bit ones in 8 bits. Whoever loads and stores converts. Compiled without contraction and
//! without fast math (`-fmad=false`, Triton's `enable_fp_fusion=False`), `+ - * /`, `sqrt`, `fma` and all integer operations give the
//! bits of [`Func::eval`]; the other functions stay within the bounds of the target's library.
//! In CUDA, `1 + erf(x)` of f32 is one function (absolute error below 3e-7), and so is `sigmoid` (3 ulp).
//!
//! The text of an operation is its template in `op_table.rs`; what templates call is in
//! [`CUDA_HELPERS`], to be put once before the printed functions. It needs no header.

use crate::ir::{ExprId, Func, FuncBuilder, Node, Value};
use crate::op::Op;
use std::fmt::Write;
use tilewright_base::{Class, DType, Error, Result};

/// Definitions that printed CUDA functions use.
pub const CUDA_HELPERS: &str = include_str!("helpers.cuh");

/// Names that a parameter cannot have in C++ or Python.
const RESERVED: [&str; 62] = [
    "abs",
    "and",
    "as",
    "asm",
    "auto",
    "bool",
    "break",
    "case",
    "catch",
    "char",
    "class",
    "const",
    "continue",
    "def",
    "default",
    "del",
    "delete",
    "do",
    "double",
    "elif",
    "else",
    "enum",
    "exp",
    "extern",
    "float",
    "for",
    "from",
    "global",
    "goto",
    "if",
    "import",
    "in",
    "inline",
    "int",
    "is",
    "lambda",
    "libdevice",
    "log",
    "long",
    "mod",
    "new",
    "not",
    "or",
    "pass",
    "pow",
    "private",
    "public",
    "register",
    "return",
    "short",
    "signed",
    "sizeof",
    "static",
    "struct",
    "switch",
    "this",
    "tl",
    "typedef",
    "union",
    "unsigned",
    "void",
    "while",
];

impl Func {
    /// The function as `__device__ __forceinline__` CUDA C++ named `name`; see the module's head
    /// for how values are held. Put [`CUDA_HELPERS`] before it.
    pub fn to_cuda(&self, name: &str) -> String {
        self.cuda_text(name, false)
    }

    /// As [`Func::to_cuda`], for results that are rounded to 16 bits: logistic functions have an error that such a result
    /// does not show, and a third of the instructions.
    pub fn to_cuda_for_16_bits(&self, name: &str) -> String {
        self.cuda_text(name, true)
    }

    fn cuda_text(&self, name: &str, short: bool) -> String {
        let names = parameter_names(self);
        let params: Vec<String> = self
            .params()
            .iter()
            .zip(&names)
            .map(|(p, name)| format!("{} {name}", cuda_type(p.dtype)))
            .collect();
        let result = cuda_type(self.dtype());
        let mut out =
            format!("__device__ __forceinline__ {result} {name}({}) {{\n", params.join(", "));
        let mut operands: Vec<String> = Vec::new();
        let inside = self.inside_of_flushed_exp2();
        for (id, node, dtype) in self.nodes() {
            let text = match node {
                Node::Param(p) => names[*p as usize].clone(),
                Node::Const(v) => cuda_constant(*v, dtype),
                // Part of a single instruction further on.
                Node::Op(..) if inside.contains(&id) => String::new(),
                Node::Op(op, args) => {
                    let known = self.one_plus(*op, args, dtype).or_else(|| {
                        let logistic = short && *op == Op::Sigmoid && dtype == DType::F32;
                        logistic.then(|| ("tw_sigmoid", args[0]))
                    });
                    let text = match known {
                        Some((name @ ("tw_sigmoid" | "tw_one_plus_tanh"), x)) if short => {
                            format!("{name}_short({})", operands[x.index()])
                        }
                        Some((name, x)) => format!("{name}({})", operands[x.index()]),
                        None => self.cuda_operation(*op, args, dtype, &operands),
                    };
                    let _ = writeln!(out, "  const {} t{} = {text};", cuda_type(dtype), id.0);
                    format!("t{}", id.0)
                }
            };
            operands.push(text);
        }
        let _ = write!(out, "  return {};\n}}\n", operands[self.result().index()]);
        out
    }

    /// A helper and `x` when the operation is `1 + erf(x)` or `1 + tanh(x)` in f32, as they stand in GELU.
    fn one_plus(&self, op: Op, args: &[ExprId], dtype: DType) -> Option<(&'static str, ExprId)> {
        let [a, b] = args else { return None };
        let one = |x: ExprId| matches!(self.node(x), Node::Const(Value::Float(v)) if *v == 1.0);
        let sum = match (one(*a), one(*b)) {
            (true, false) => *b,
            (false, true) => *a,
            _ => return None,
        };
        match self.node(sum) {
            Node::Op(inner, x) if op == Op::Add && dtype == DType::F32 => match inner {
                Op::Erf => Some(("tw_one_plus_erf", x[0])),
                Op::Tanh => Some(("tw_one_plus_tanh", x[0])),
                _ => None,
            },
            _ => None,
        }
    }

    fn cuda_operation(&self, op: Op, args: &[ExprId], dtype: DType, names: &[String]) -> String {
        let arg = |i: usize| names[args[i].index()].as_str();
        let from = self.dtype_of(args[args.len() - 1]);
        if op == Op::Cast {
            return cuda_cast(arg(0), from, dtype);
        }
        if let Some(power) = self.flushed_exp2(op, args) {
            return format!("tw_exp2_flushed({})", names[power.index()]);
        }
        let class = class_index(from);
        let text = fill(
            op.row().cuda[class],
            from,
            &args.iter().map(|a| names[a.index()].as_str()).collect::<Vec<_>>(),
        );
        let text = match (op, dtype) {
            // C's complement of a bool is an int.
            (Op::Not, DType::Bool) => format!("!{}", arg(0)),
            _ => text,
        };
        match dtype {
            DType::I4 | DType::U4 => format!("tw_wrap_{dtype}({text})"),
            _ if narrow(dtype) && !keeps_type(op) => format!("tw_round_{dtype}({text})"),
            _ => text,
        }
    }

    /// `where(x < -126, 0, exp2(x))` of f32: the exponent.
    fn flushed_exp2(&self, op: Op, args: &[ExprId]) -> Option<ExprId> {
        let constant = |id: ExprId, value: f64| matches!(self.node(id), Node::Const(Value::Float(v)) if v.to_bits() == value.to_bits());
        let [below, zero, power] = args else { return None };
        let (Node::Op(Op::Lt, less), Node::Op(Op::Exp2, x)) =
            (self.node(*below), self.node(*power))
        else {
            return None;
        };
        let fits = op == Op::Select
            && self.dtype_of(*power) == DType::F32
            && less[0] == x[0]
            && constant(less[1], -126.0)
            && constant(*zero, 0.0);
        fits.then_some(x[0])
    }

    /// Nodes that only the instructions of [`Func::flushed_exp2`] use.
    fn inside_of_flushed_exp2(&self) -> Vec<ExprId> {
        let mut inside = Vec::new();
        let mut uses: Vec<ExprId> = vec![self.result()];
        for (_, node, _) in self.nodes() {
            let Node::Op(op, args) = node else { continue };
            if self.flushed_exp2(*op, args).is_some() {
                inside.extend([args[0], args[2]]);
            } else {
                uses.extend(args.iter());
            }
        }
        inside.retain(|id| !uses.contains(id));
        inside
    }

    /// The function as Triton source, to be decorated with `@triton.jit` by whoever embeds it
    /// (`tl` and `libdevice` must be imported). What Triton cannot say is an error.
    pub fn to_triton(&self, name: &str) -> Result<String> {
        let func = self.expand(|op, dtype| op.row().triton[class_index(dtype)].is_empty());
        let names = parameter_names(&func);
        let mut out = format!("def {name}({}):\n", names.join(", "));
        let mut operands: Vec<String> = Vec::new();
        for (id, node, dtype) in func.nodes() {
            let text = match node {
                Node::Param(p) => names[*p as usize].clone(),
                Node::Const(v) => triton_constant(*v, dtype),
                Node::Op(op, args) => {
                    let from = func.dtype_of(args[args.len() - 1]);
                    let template = op.row().triton[class_index(from)];
                    if template.is_empty() {
                        return Err(Error::unsupported(format!(
                            "Triton has no `{}` on {from}",
                            op.name()
                        )));
                    }
                    let arg_names: Vec<&str> =
                        args.iter().map(|a| operands[a.index()].as_str()).collect();
                    let text = if *op == Op::Cast {
                        triton_cast(arg_names[0], from, dtype)
                    } else {
                        let text = fill(template, from, &arg_names);
                        let rounds = narrow(dtype) && !keeps_type(*op);
                        if rounds { triton_round(&format!("({text})"), dtype) } else { text }
                    };
                    let wrapped = matches!(dtype, DType::I4 | DType::U4);
                    if wrapped {
                        return Err(Error::unsupported(format!("Triton has no {dtype}")));
                    }
                    let _ = writeln!(out, "    t{} = {text}", id.0);
                    format!("t{}", id.0)
                }
            };
            operands.push(text);
        }
        let _ = writeln!(out, "    return {}", operands[func.result().index()]);
        Ok(out)
    }

    /// The function with every operation for which `needed(op, type of its operands)` replaced by
    /// its expansion in the table, if it has one.
    #[must_use]
    pub fn expand(&self, needed: impl Fn(Op, DType) -> bool) -> Func {
        let mut b = FuncBuilder::new();
        for p in self.params() {
            b.param(&p.name, p.dtype);
        }
        let mut map: Vec<ExprId> = Vec::new();
        for (_, node, dtype) in self.nodes() {
            let id = match node {
                Node::Param(p) => ExprId(*p),
                Node::Const(v) => b.value(*v, dtype),
                Node::Op(op, args) => {
                    let args: Vec<ExprId> = args.iter().map(|a| map[a.index()]).collect();
                    let from = b.dtype_of(args[args.len() - 1]);
                    let expansion = op.row().expansion;
                    let expanded = if !expansion.is_empty() && needed(*op, from) {
                        let names = ["a", "b", "c"][..args.len()].join(", ");
                        Func::parse(
                            &format!("{{ {names} -> {expansion} }}"),
                            &vec![from; args.len()],
                        )
                        .ok()
                    } else {
                        None
                    };
                    match (expanded, op) {
                        (Some(func), _) => b.inline(&func, &args),
                        (None, Op::Cast) => b.cast(args[0], dtype),
                        (None, op) => b.op(*op, &args),
                    }
                }
            };
            map.push(id);
        }
        b.finish(map[self.result().index()])
    }
}

/// Parameters as C++ and Python can name them: no keyword, none of our temporaries.
fn parameter_names(func: &Func) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for p in func.params() {
        let mut name = p.name.to_string();
        let temporary =
            name.strip_prefix('t').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
        if temporary
            || RESERVED.contains(&&*name)
            || name.starts_with("tw_")
            || name.starts_with("__")
        {
            name.insert_str(0, "arg_");
        }
        while names.contains(&name)
            || (name != *p.name && func.params().iter().any(|q| *q.name == *name))
        {
            name.push('_');
        }
        names.push(name);
    }
    names
}

/// Column of the table for a type.
fn class_index(dtype: DType) -> usize {
    match dtype.class() {
        Class::Float => 0,
        Class::Signed => 1,
        Class::Unsigned | Class::Bool => 2,
    }
}

/// A float that computes in f32.
fn narrow(dtype: DType) -> bool {
    dtype.is_float() && dtype.compute() != dtype
}

/// Operations whose result is a value of the type when the operands are.
fn keeps_type(op: Op) -> bool {
    use Op::*;
    matches!(op, Neg | Abs | Sign | Min | Max | Select | Rem)
}

/// Fills a template for operands of type `dtype`.
fn fill(template: &str, dtype: DType, args: &[&str]) -> String {
    let mut text = template.to_string();
    for (i, arg) in args.iter().enumerate() {
        text = text.replace(&format!("${i}"), arg);
    }
    let unsigned = match cuda_type(dtype) {
        // Small types compute in int, where a product could overflow.
        "signed char" | "short" | "int" | "unsigned char" | "unsigned short" => "unsigned int",
        "long long" => "unsigned long long",
        other => other,
    };
    // Triton templates with a type are the ones on `tl.` types.
    let ty = if template.contains(".to({T})") { triton_type(dtype) } else { cuda_type(dtype) };
    text.replace("{f}", if dtype == DType::F64 { "" } else { "f" })
        .replace("{T}", ty)
        .replace("{U}", unsigned)
        .replace("{B}", &dtype.bits().to_string())
}

fn cuda_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => "float",
        DType::I64 => "long long",
        DType::I32 => "int",
        DType::I16 => "short",
        DType::I8 | DType::I4 => "signed char",
        DType::U64 => "unsigned long long",
        DType::U32 => "unsigned int",
        DType::U16 => "unsigned short",
        DType::U8 | DType::U4 => "unsigned char",
        DType::Bool => "bool",
    }
}

fn cuda_constant(value: Value, dtype: DType) -> String {
    match value {
        Value::Int(v) => match dtype {
            DType::Bool => (v != 0).to_string(),
            DType::I64 if v == i64::MIN => "(-9223372036854775807LL - 1)".to_string(),
            DType::I32 if v == i32::MIN.into() => "(-2147483647 - 1)".to_string(),
            DType::I64 => format!("({v}LL)"),
            DType::U64 => format!("{}ULL", v as u64),
            DType::U32 => format!("{v}U"),
            DType::I32 => format!("({v})"),
            _ => format!("({})({v})", cuda_type(dtype)),
        },
        Value::Float(v) if dtype == DType::F64 => match v {
            v if v.is_finite() => format!("({v:?})"),
            v => format!("__longlong_as_double(0x{:016x}LL)", v.to_bits()),
        },
        Value::Float(v) => match v as f32 {
            v if v.is_finite() => format!("({v:?}f)"),
            v => format!("__uint_as_float(0x{:08x}u)", v.to_bits()),
        },
    }
}

fn cuda_cast(x: &str, from: DType, to: DType) -> String {
    let ty = cuda_type(to);
    match (from.class(), to.class()) {
        (_, Class::Bool) => format!("({x} != 0)"),
        (Class::Float, Class::Float) => match (from, to) {
            (_, DType::F64) => format!("(double){x}"),
            (DType::F64, DType::F32) => format!("(float){x}"),
            (DType::F64, _) => format!("tw_round_{to}(tw_round_to_odd({x}))"),
            (_, DType::F32) => x.to_string(),
            _ => format!("tw_round_{to}({x})"),
        },
        (Class::Float, class) => {
            let bits = to.bits();
            let (low, high) = match class {
                Class::Signed => (
                    format!("(-(1LL << {}))", bits - 1),
                    format!("(((1LL << {}) - 1) * 2 + 1)", bits - 2),
                ),
                _ => ("0".to_string(), format!("(((1ULL << {}) - 1) * 2 + 1)", bits - 1)),
            };
            let low = if bits == 64 && class == Class::Signed {
                "(-9223372036854775807LL - 1)".to_string()
            } else {
                low
            };
            let limit = if class == Class::Signed { bits - 1 } else { bits };
            let bound = 2f64.powi(limit as i32);
            format!("tw_saturate<{ty}>({x}, {bound:?}, ({ty}){low}, ({ty}){high})")
        }
        (_, Class::Float) if narrow(to) => format!("tw_round_{to}((float){x})"),
        _ if matches!(to, DType::I4 | DType::U4) => format!("tw_wrap_{to}(({ty}){x})"),
        _ => format!("({ty}){x}"),
    }
}

fn triton_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "tl.float64",
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => "tl.float32",
        DType::I64 => "tl.int64",
        DType::I32 => "tl.int32",
        DType::I16 => "tl.int16",
        DType::I8 | DType::I4 => "tl.int8",
        DType::U64 => "tl.uint64",
        DType::U32 => "tl.uint32",
        DType::U16 => "tl.uint16",
        DType::U8 | DType::U4 => "tl.uint8",
        DType::Bool => "tl.int1",
    }
}

fn triton_constant(value: Value, dtype: DType) -> String {
    let text = match value {
        Value::Int(v) if dtype == DType::U64 => (v as u64).to_string(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) if v.is_finite() => format!("{v:?}"),
        Value::Float(v) if v.is_nan() => "float('nan')".to_string(),
        Value::Float(v) => format!("float('{}inf')", if v < 0.0 { "-" } else { "" }),
    };
    // Typed, because a bare Python number next to another would choose its own type.
    format!("tl.full((), {text}, {})", triton_type(dtype))
}

fn triton_round(x: &str, dtype: DType) -> String {
    let narrow = match dtype {
        DType::F16 => "tl.float16",
        DType::BF16 => "tl.bfloat16",
        DType::F8E4M3 => "tl.float8e4nv",
        _ => "tl.float8e5",
    };
    format!("{x}.to({narrow}).to(tl.float32)")
}

fn triton_cast(x: &str, from: DType, to: DType) -> String {
    match to {
        DType::Bool => format!("({x} != 0)"),
        _ if narrow(to) => triton_round(&format!("{x}.to(tl.float32)"), to),
        // Out-of-range floats saturate in ours, and are anything in Triton's conversion.
        _ if from.is_float() && to.is_int() => {
            let bits = to.bits();
            let (low, high) = match to.class() {
                Class::Signed => (-(2f64.powi(bits as i32 - 1)), 2f64.powi(bits as i32 - 1)),
                _ => (0.0, 2f64.powi(bits as i32)),
            };
            let ty = triton_type(to);
            let (min, max) = match to.class() {
                Class::Signed => (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1),
                _ => (0, (1i128 << bits) - 1),
            };
            format!(
                "tl.where({x} != {x}, tl.full((), 0, {ty}), tl.where({x} <= {low:?}, tl.full((), {min}, {ty}), \
                 tl.where({x} >= {high:?}, tl.full((), {max}, {ty}), {x}.to({ty}))))"
            )
        }
        _ => format!("{x}.to({})", triton_type(to)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testgen;
    use proptest::prelude::*;

    #[test]
    fn cuda_is_one_statement_per_operation() {
        let f =
            Func::parse("{ x, b -> max(x + b, 0) * 0.5 }", &[DType::BF16, DType::BF16]).unwrap();
        assert_eq!(
            f.to_cuda("epilogue"),
            "\
__device__ __forceinline__ float epilogue(float x, float b) {
  const float t2 = tw_round_bf16(x + b);
  const float t4 = tw_max(t2, (0.0f));
  const float t6 = tw_round_bf16(t4 * (0.5f));
  return t6;
}
"
        );
    }

    #[test]
    fn triton_has_typed_constants_and_rounds() {
        let f = Func::parse("{ x, int -> where(x < 1.0, exp(x), int) }", &[DType::F16; 2]).unwrap();
        assert_eq!(
            f.to_triton("f").unwrap(),
            "\
def f(x, arg_int):
    t2 = x < tl.full((), 1.0, tl.float32)
    t3 = (libdevice.exp(x)).to(tl.float16).to(tl.float32)
    t5 = tl.where(t2, t3, arg_int)
    return t5
"
        );
        let f = Func::binary(Op::Pow, DType::I32);
        assert_eq!(f.to_triton("f").unwrap_err().exit_code(), 3);
    }

    #[test]
    fn expansion_replaces_only_what_is_asked_for() {
        let f = Func::parse("{ x -> sigmoid(x) + rsqrt(x) }", &[DType::F32]).unwrap();
        let g = f.expand(|op, _| op == Op::Sigmoid);
        assert_eq!(g.to_string(), "{ x -> 1.0 / (1.0 + exp(-x)) + rsqrt(x) }");
    }

    proptest! {
        #[test]
        fn every_function_prints_without_holes(func in testgen::func(20)) {
            let cuda = func.to_cuda("f");
            prop_assert!(!cuda.contains('$') && !cuda.contains("{T}") && !cuda.contains("= ;"), "{}", cuda);
            if let Ok(triton) = func.to_triton("f") {
                prop_assert!(!triton.contains('$') && !triton.contains("{T}"), "{}", triton);
            }
        }
    }
}
