//! Scalar functions as vector code: register forms of the data types, their conversions, and one
//! arm per operation.
//!
//! In registers `f16`, `bf16` and the 8-bit floats are `float`s that hold a value of the narrow
//! type exactly: arithmetic runs in `float` and its result is rounded. Four-bit integers are `i8`s
//! in range, `bool` is `i1`. Every function works on `lanes` elements at once; one lane is a plain
//! scalar. To add an operation: an arm in [`Code::op`], and its body in `math.rs` when it is more
//! than a few instructions.

use crate::text::Text;
use std::collections::BTreeMap;
use tilewright_base::{Class, DType};
use tilewright_expr::{Func, Node, Op, Value};

/// A function being written, and the helper functions that it calls.
#[derive(Debug, Default)]
pub(crate) struct Code {
    /// The function.
    pub(crate) t: Text,
    /// Helper functions by name: whole definitions.
    pub(crate) helpers: BTreeMap<String, String>,
    /// Width of a vector register in bits.
    pub(crate) vector_bits: u32,
    /// Round to `bf16` with the instruction of AVX512-BF16 (subnormal numbers become zero).
    pub(crate) native_bf16: bool,
}

/// `T` or `<lanes x T>`.
pub(crate) fn vector(elem: &str, lanes: u32) -> String {
    if lanes == 1 { elem.to_owned() } else { format!("<{lanes} x {elem}>") }
}

/// The LLVM type of an element in a register.
pub(crate) fn reg_elem(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => "float",
        DType::I64 | DType::U64 => "i64",
        DType::I32 | DType::U32 => "i32",
        DType::I16 | DType::U16 => "i16",
        DType::I8 | DType::U8 | DType::I4 | DType::U4 => "i8",
        DType::Bool => "i1",
    }
}

/// The LLVM type of an element in memory; the four-bit types have none.
pub(crate) fn mem_elem(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 => "float",
        DType::F16 => "half",
        DType::I64 | DType::U64 => "i64",
        DType::I32 | DType::U32 => "i32",
        DType::BF16 | DType::I16 | DType::U16 => "i16",
        _ => "i8",
    }
}

/// Name part of a vector type in intrinsics: `v16f32`, `f32`.
pub(crate) fn suffix(elem: &str, lanes: u32) -> String {
    let e = match elem {
        "double" => "f64",
        "float" => "f32",
        "half" => "f16",
        other => other,
    };
    if lanes == 1 { e.to_owned() } else { format!("v{lanes}{e}") }
}

/// A float literal of type `float` or `double`.
pub(crate) fn float_lit(elem: &str, value: f64) -> String {
    let value = if value.is_nan() { f64::NAN } else { value };
    let value = if elem == "float" { f64::from(value as f32) } else { value };
    format!("0x{:016X}", value.to_bits())
}

/// A scalar literal, or the literal in every lane.
pub(crate) fn splat_lit(elem: &str, lit: &str, lanes: u32) -> String {
    if lanes == 1 { lit.to_owned() } else { format!("splat ({elem} {lit})") }
}

/// A constant in register form.
pub(crate) fn constant(dtype: DType, value: Value, lanes: u32) -> String {
    let elem = reg_elem(dtype);
    let lit = match value {
        Value::Float(v) if dtype.is_float() => float_lit(elem, v),
        Value::Float(v) => format!("{}", v as i64),
        Value::Int(v) if dtype.is_float() => float_lit(elem, v as f64),
        Value::Int(v) if dtype == DType::Bool => format!("{}", u8::from(v != 0)),
        Value::Int(v) => match elem {
            "i8" => format!("{}", v as i8),
            "i16" => format!("{}", v as i16),
            "i32" => format!("{}", v as i32),
            _ => format!("{v}"),
        },
    };
    splat_lit(elem, &lit, lanes)
}

impl Code {
    /// All lanes equal to the scalar `x`.
    pub(crate) fn splat(&mut self, elem: &str, x: &str, lanes: u32) -> String {
        if lanes == 1 {
            return x.to_owned();
        }
        let v = vector(elem, lanes);
        let first = self.t.ins(format_args!("insertelement {v} poison, {elem} {x}, i64 0"));
        self.t.ins(format_args!(
            "shufflevector {v} {first}, {v} poison, <{lanes} x i32> zeroinitializer"
        ))
    }

    /// The first elements of all parts, then the second ones, and so on: one vector of all elements.
    pub(crate) fn interleave(&mut self, elem: &str, lanes: u32, parts: &[String]) -> String {
        let mask = |order: &mut dyn Iterator<Item = u32>| {
            let list: Vec<String> = order.map(|i| format!("i32 {i}")).collect();
            format!("<{} x i32> <{}>", list.len(), list.join(", "))
        };
        let mut joined = parts.to_vec();
        let mut width = lanes;
        while joined.len() > 2 {
            let v = vector(elem, width);
            let order = mask(&mut (0..2 * width));
            joined = joined
                .chunks(2)
                .map(|p| {
                    self.t.ins(format_args!("shufflevector {v} {}, {v} {}, {order}", p[0], p[1]))
                })
                .collect();
            width *= 2;
        }
        let [a, b] = joined.as_slice() else { return joined.concat() };
        let count = parts.len() as u32;
        let order = mask(&mut (0..lanes).flat_map(|l| (0..count).map(move |i| i * lanes + l)));
        let v = vector(elem, width);
        self.t.ins(format_args!("shufflevector {v} {a}, {v} {b}, {order}"))
    }

    /// Calls an LLVM intrinsic on values of one type.
    pub(crate) fn call(&mut self, name: &str, elem: &str, lanes: u32, args: &[&str]) -> String {
        let v = vector(elem, lanes);
        let args: Vec<(&str, &str)> = args.iter().map(|a| (v.as_str(), *a)).collect();
        self.t.intrinsic(&v, &format!("llvm.{name}.{}", suffix(elem, lanes)), &args)
    }

    /// `a op b` on one type.
    pub(crate) fn bin(&mut self, op: &str, elem: &str, lanes: u32, a: &str, b: &str) -> String {
        self.t.ins(format_args!("{op} {} {a}, {b}", vector(elem, lanes)))
    }

    /// `icmp`/`fcmp`.
    pub(crate) fn cmp(&mut self, cc: &str, elem: &str, lanes: u32, a: &str, b: &str) -> String {
        let kind = if matches!(elem, "float" | "double") { "fcmp" } else { "icmp" };
        self.t.ins(format_args!("{kind} {cc} {} {a}, {b}", vector(elem, lanes)))
    }

    /// `c ? a : b` lane by lane.
    pub(crate) fn select(&mut self, elem: &str, lanes: u32, c: &str, a: &str, b: &str) -> String {
        let (v, m) = (vector(elem, lanes), vector("i1", lanes));
        self.t.ins(format_args!("select {m} {c}, {v} {a}, {v} {b}"))
    }

    /// The smaller or larger of two floats, the second when they compare neither way: what x86's
    /// instruction does. Named where it fits a register, because LLVM takes the comparison and the
    /// choice apart again.
    fn plain_extreme(&mut self, min: bool, elem: &str, lanes: u32, a: &str, b: &str) -> String {
        let bits = lanes * if elem == "double" { 64 } else { 32 };
        let (name, short) =
            (if min { "min" } else { "max" }, if elem == "double" { "pd" } else { "ps" });
        let v = vector(elem, lanes);
        match bits {
            512 if self.vector_bits == 512 => {
                let name = format!("llvm.x86.avx512.{name}.{short}.512");
                self.t.intrinsic(&v, &name, &[(&v, a), (&v, b), ("i32", "4")])
            }
            256 => {
                let name = format!("llvm.x86.avx.{name}.{short}.256");
                self.t.intrinsic(&v, &name, &[(&v, a), (&v, b)])
            }
            _ => {
                let first = self.cmp(if min { "olt" } else { "ogt" }, elem, lanes, a, b);
                self.select(elem, lanes, &first, a, b)
            }
        }
    }

    /// One conversion instruction.
    pub(crate) fn conv(&mut self, op: &str, from: &str, to: &str, lanes: u32, x: &str) -> String {
        self.t.ins(format_args!("{op} {} {x} to {}", vector(from, lanes), vector(to, lanes)))
    }

    /// Memory form to register form.
    pub(crate) fn widen(&mut self, dtype: DType, lanes: u32, x: &str) -> String {
        match dtype {
            DType::F16 => self.conv("fpext", "half", "float", lanes, x),
            DType::BF16 => {
                let wide = self.conv("zext", "i16", "i32", lanes, x);
                let sixteen = splat_lit("i32", "16", lanes);
                let up = self.bin("shl", "i32", lanes, &wide, &sixteen);
                self.conv("bitcast", "i32", "float", lanes, &up)
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let wide = self.conv("zext", "i8", "i32", lanes, x);
                self.helper_call(
                    &format!("decode_{}", dtype.name()),
                    "float",
                    lanes,
                    "i32",
                    &[&wide],
                )
            }
            DType::Bool => {
                let zero = splat_lit("i8", "0", lanes);
                self.cmp("ne", "i8", lanes, x, &zero)
            }
            _ => x.to_owned(),
        }
    }

    /// Register form to memory form; the value is representable already.
    pub(crate) fn narrow(&mut self, dtype: DType, lanes: u32, x: &str) -> String {
        match dtype {
            DType::F16 => self.conv("fptrunc", "float", "half", lanes, x),
            DType::BF16 => {
                let bits = self.conv("bitcast", "float", "i32", lanes, x);
                let sixteen = splat_lit("i32", "16", lanes);
                let down = self.bin("lshr", "i32", lanes, &bits, &sixteen);
                self.conv("trunc", "i32", "i16", lanes, &down)
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let bits = self.helper_call(
                    &format!("encode_{}", dtype.name()),
                    "i32",
                    lanes,
                    "float",
                    &[x],
                );
                self.conv("trunc", "i32", "i8", lanes, &bits)
            }
            DType::Bool => self.conv("zext", "i1", "i8", lanes, x),
            _ => x.to_owned(),
        }
    }

    /// Rounds a register of the type's compute form to the type.
    pub(crate) fn round(&mut self, dtype: DType, lanes: u32, x: &str) -> String {
        match dtype {
            DType::F16 => {
                let half = self.conv("fptrunc", "float", "half", lanes, x);
                self.conv("fpext", "half", "float", lanes, &half)
            }
            DType::BF16 if self.native_bf16 && lanes == 16 => {
                let (wide, half) = (vector("float", 16), vector("bfloat", 16));
                let name = "llvm.x86.avx512bf16.cvtneps2bf16.512";
                let y = self.t.intrinsic(&half, name, &[(&wide, x)]);
                let bits = self.conv("bitcast", "bfloat", "i16", lanes, &y);
                self.widen(dtype, lanes, &bits)
            }
            DType::BF16 => {
                let bits = self.conv("bitcast", "float", "i32", lanes, x);
                let lit = |v: &str| splat_lit("i32", v, lanes);
                let odd = self.bin("lshr", "i32", lanes, &bits, &lit("16"));
                let odd = self.bin("and", "i32", lanes, &odd, &lit("1"));
                let bias = self.bin("add", "i32", lanes, &odd, &lit("32767"));
                let sum = self.bin("add", "i32", lanes, &bits, &bias);
                let quiet = self.bin("or", "i32", lanes, &bits, &lit("4194304"));
                let nan = self.cmp("uno", "float", lanes, x, x);
                let kept = self.select("i32", lanes, &nan, &quiet, &sum);
                let kept = self.bin("and", "i32", lanes, &kept, &lit("-65536"));
                self.conv("bitcast", "i32", "float", lanes, &kept)
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let name = dtype.name();
                let code = self.helper_call(&format!("encode_{name}"), "i32", lanes, "float", &[x]);
                self.helper_call(&format!("decode_{name}"), "float", lanes, "i32", &[&code])
            }
            DType::I4 => {
                let four = splat_lit("i8", "4", lanes);
                let up = self.bin("shl", "i8", lanes, x, &four);
                self.bin("ashr", "i8", lanes, &up, &four)
            }
            DType::U4 => {
                let mask = splat_lit("i8", "15", lanes);
                self.bin("and", "i8", lanes, x, &mask)
            }
            _ => x.to_owned(),
        }
    }

    /// Floats of type `fe` as integers of 16 bits and fewer: towards zero, the nearest that there is, NaN to 0. LLVM takes
    /// what saturates apart into single elements; bounds first, and the conversion is one of vectors.
    fn saturated(&mut self, fe: &str, to: DType, lanes: u32, x: &str) -> String {
        let signed = to.class() == Class::Signed;
        let bits = i32::try_from(to.bits()).unwrap_or(16);
        let (lo, hi) = match signed {
            true => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
            false => (0, (1 << bits) - 1),
        };
        let [lo, hi, zero] =
            [lo, hi, 0].map(|v| splat_lit(fe, &float_lit(fe, f64::from(v)), lanes));
        // A NaN is not greater than anything.
        let above = self.cmp("ogt", fe, lanes, x, &lo);
        let v = self.select(fe, lanes, &above, x, &lo);
        let below = self.cmp("olt", fe, lanes, &v, &hi);
        let mut v = self.select(fe, lanes, &below, &v, &hi);
        if signed {
            let nan = self.cmp("uno", fe, lanes, x, x);
            v = self.select(fe, lanes, &nan, &zero, &v);
        }
        let v = self.conv("fptosi", fe, "i32", lanes, &v);
        self.conv("trunc", "i32", reg_elem(to), lanes, &v)
    }

    /// Conversion between data types, in register form.
    pub(crate) fn cast(&mut self, from: DType, to: DType, lanes: u32, x: &str) -> String {
        if from == to {
            return x.to_owned();
        }
        let (fe, te) = (reg_elem(from), reg_elem(to));
        if to == DType::Bool {
            let zero = constant(from, Value::Int(0), lanes);
            return self.cmp(if from.is_float() { "une" } else { "ne" }, fe, lanes, x, &zero);
        }
        if from == DType::Bool {
            return if to.is_float() {
                self.conv("uitofp", "i1", te, lanes, x)
            } else {
                self.conv("zext", "i1", te, lanes, x)
            };
        }
        let signed = |d: DType| d.class() == Class::Signed;
        match (from.is_float(), to.is_float()) {
            (true, true) => {
                let y = match (fe, te) {
                    ("double", "float") if to != DType::F32 => {
                        // Two roundings could differ from one: first round to odd.
                        self.helper_call("round_odd", "float", lanes, "double", &[x])
                    }
                    ("double", "float") => self.conv("fptrunc", fe, te, lanes, x),
                    ("float", "double") => self.conv("fpext", fe, te, lanes, x),
                    _ => x.to_owned(),
                };
                self.round(to, lanes, &y)
            }
            (true, false) => {
                let name = if signed(to) { "fptosi" } else { "fptoui" };
                if to.bits() <= 16 {
                    return self.saturated(fe, to, lanes, x);
                }
                let (tv, fv) = (vector(te, lanes), vector(fe, lanes));
                let full = format!("llvm.{name}.sat.{}.{}", suffix(te, lanes), suffix(fe, lanes));
                self.t.intrinsic(&tv, &full, &[(&fv, x)])
            }
            (false, true) => {
                let op = if signed(from) { "sitofp" } else { "uitofp" };
                if te == "float" && to != DType::F32 && from.bits() > 16 {
                    // As from f64: an integer of up to 32 bits is exact there.
                    let wide = self.conv(op, fe, "double", lanes, x);
                    return self.cast(DType::F64, to, lanes, &wide);
                }
                let y = self.conv(op, fe, te, lanes, x);
                self.round(to, lanes, &y)
            }
            (false, false) => {
                let (fb, tb) = (bits_of(fe), bits_of(te));
                let y = if tb < fb {
                    self.conv("trunc", fe, te, lanes, x)
                } else if tb > fb {
                    self.conv(if signed(from) { "sext" } else { "zext" }, fe, te, lanes, x)
                } else {
                    x.to_owned()
                };
                self.round(to, lanes, &y)
            }
        }
    }

    /// The function applied to registers of its parameters' types.
    pub(crate) fn func(&mut self, func: &Func, args: &[String], lanes: u32) -> String {
        let mut values: Vec<String> = Vec::new();
        for (_, node, dtype) in func.nodes() {
            let value = match node {
                Node::Param(p) => args[*p as usize].clone(),
                Node::Const(v) => constant(dtype, *v, lanes),
                Node::Op(op, operands) => {
                    let from = func.dtype_of(operands[operands.len() - 1]);
                    let operands: Vec<&str> =
                        operands.iter().map(|o| values[o.index()].as_str()).collect();
                    if *op == Op::Cast {
                        self.cast(from, dtype, lanes, operands[0])
                    } else {
                        self.op(*op, from, lanes, &operands)
                    }
                }
            };
            values.push(value);
        }
        values[func.result().index()].clone()
    }

    /// One operation on operands of type `d`; the result is rounded to the type.
    pub(crate) fn op(&mut self, op: Op, d: DType, lanes: u32, x: &[&str]) -> String {
        let e = reg_elem(d);
        let float = d.is_float();
        let unsigned = matches!(d.class(), Class::Unsigned | Class::Bool);
        let lit = |v: i64| constant(d, Value::Int(v), lanes);
        if op == Op::Select {
            return self.select(e, lanes, x[0], x[1], x[2]);
        }
        let raw = match op {
            Op::Neg if float => self.t.ins(format_args!("fneg {} {}", vector(e, lanes), x[0])),
            Op::Neg => self.bin("sub", e, lanes, &lit(0), x[0]),
            Op::Abs if float => self.call("fabs", e, lanes, &[x[0]]),
            Op::Abs if unsigned => x[0].to_owned(),
            Op::Abs => {
                let negative = self.cmp("slt", e, lanes, x[0], &lit(0));
                let minus = self.bin("sub", e, lanes, &lit(0), x[0]);
                self.select(e, lanes, &negative, &minus, x[0])
            }
            Op::Sign if float => {
                let one = self.call("copysign", e, lanes, &[&lit(1), x[0]]);
                let (zero, nan) = (
                    self.cmp("ueq", e, lanes, x[0], &lit(0)),
                    self.cmp("uno", e, lanes, x[0], x[0]),
                );
                let keep = self.bin("or", "i1", lanes, &zero, &nan);
                self.select(e, lanes, &keep, x[0], &one)
            }
            Op::Sign => {
                let positive =
                    self.cmp(if unsigned { "ne" } else { "sgt" }, e, lanes, x[0], &lit(0));
                let up = self.select(e, lanes, &positive, &lit(1), &lit(0));
                if unsigned {
                    up
                } else {
                    let negative = self.cmp("slt", e, lanes, x[0], &lit(0));
                    self.select(e, lanes, &negative, &lit(-1), &up)
                }
            }
            Op::Floor => self.call("floor", e, lanes, &[x[0]]),
            Op::Ceil => self.call("ceil", e, lanes, &[x[0]]),
            Op::Round => self.call("roundeven", e, lanes, &[x[0]]),
            Op::Trunc => self.call("trunc", e, lanes, &[x[0]]),
            Op::Sqrt => self.call("sqrt", e, lanes, &[x[0]]),
            Op::Rsqrt => {
                let root = self.call("sqrt", e, lanes, &[x[0]]);
                self.bin("fdiv", e, lanes, &lit(1), &root)
            }
            Op::IsNan => return self.cmp("uno", e, lanes, x[0], x[0]),
            Op::IsInf => {
                let a = self.call("fabs", e, lanes, &[x[0]]);
                let inf = constant(d, Value::Float(f64::INFINITY), lanes);
                return self.cmp("oeq", e, lanes, &a, &inf);
            }
            Op::Not => {
                let ones = if d == DType::Bool { lit(1) } else { lit(-1) };
                self.bin("xor", e, lanes, x[0], &ones)
            }
            Op::Add if float => self.bin("fadd", e, lanes, x[0], x[1]),
            Op::Sub if float => self.bin("fsub", e, lanes, x[0], x[1]),
            Op::Mul if float => self.bin("fmul", e, lanes, x[0], x[1]),
            Op::Div if float => self.bin("fdiv", e, lanes, x[0], x[1]),
            Op::Add => self.bin("add", e, lanes, x[0], x[1]),
            Op::Sub => self.bin("sub", e, lanes, x[0], x[1]),
            Op::Mul => self.bin("mul", e, lanes, x[0], x[1]),
            Op::Div | Op::Rem | Op::Mod if !float => self.int_div(op, d, lanes, x[0], x[1]),
            Op::Rem if float => self.math("fmod", d, lanes, x),
            Op::Mod if float => self.math("pymod", d, lanes, x),
            Op::Min | Op::Max if float => {
                // The second operand when either is NaN, then NaN of the first.
                let best = self.plain_extreme(op == Op::Min, e, lanes, x[0], x[1]);
                let nan = self.cmp("uno", e, lanes, x[0], x[0]);
                self.select(e, lanes, &nan, x[0], &best)
            }
            Op::Min if d == DType::Bool => self.bin("and", e, lanes, x[0], x[1]),
            Op::Max if d == DType::Bool => self.bin("or", e, lanes, x[0], x[1]),
            Op::Min | Op::Max => {
                let name = match (op == Op::Min, unsigned) {
                    (true, true) => "umin",
                    (true, false) => "smin",
                    (false, true) => "umax",
                    (false, false) => "smax",
                };
                self.call(name, e, lanes, &[x[0], x[1]])
            }
            Op::And => self.bin("and", e, lanes, x[0], x[1]),
            Op::Or => self.bin("or", e, lanes, x[0], x[1]),
            Op::Xor => self.bin("xor", e, lanes, x[0], x[1]),
            Op::Shl | Op::Shr => self.shift(op, d, lanes, x[0], x[1]),
            Op::Lt | Op::Le | Op::Gt | Op::Ge | Op::Eq | Op::Ne => {
                let cc = match (op, float, unsigned) {
                    (Op::Eq, true, _) => "oeq",
                    (Op::Ne, true, _) => "une",
                    (Op::Lt, true, _) => "olt",
                    (Op::Le, true, _) => "ole",
                    (Op::Gt, true, _) => "ogt",
                    (_, true, _) => "oge",
                    (Op::Eq, ..) => "eq",
                    (Op::Ne, ..) => "ne",
                    (Op::Lt, _, true) => "ult",
                    (Op::Le, _, true) => "ule",
                    (Op::Gt, _, true) => "ugt",
                    (_, _, true) => "uge",
                    (Op::Lt, ..) => "slt",
                    (Op::Le, ..) => "sle",
                    (Op::Gt, ..) => "sgt",
                    _ => "sge",
                };
                return self.cmp(cc, e, lanes, x[0], x[1]);
            }
            Op::Fma if float => match d {
                DType::F64 | DType::F32 => self.call("fma", e, lanes, &[x[0], x[1], x[2]]),
                _ => {
                    // One rounding: the product of two narrow floats and the sum are exact enough
                    // in double, and round-to-odd keeps the last rounding the only one.
                    let wide: Vec<String> =
                        x.iter().map(|v| self.conv("fpext", "float", "double", lanes, v)).collect();
                    let y = self.call("fma", "double", lanes, &[&wide[0], &wide[1], &wide[2]]);
                    return self.cast(DType::F64, d, lanes, &y);
                }
            },
            Op::Fma => {
                let p = self.bin("mul", e, lanes, x[0], x[1]);
                self.bin("add", e, lanes, &p, x[2])
            }
            Op::Pow if !float => self.helper_call(
                &format!("ipow_{}", d.compute().name()),
                e,
                lanes,
                e,
                &[x[0], x[1]],
            ),
            other => self.math(other.name(), d, lanes, x),
        };
        self.round(d, lanes, &raw)
    }

    fn int_div(&mut self, op: Op, d: DType, lanes: u32, a: &str, b: &str) -> String {
        let e = reg_elem(d);
        let lit = |v: i64| constant(d, Value::Int(v), lanes);
        let unsigned = d.class() == Class::Unsigned;
        let zero = self.cmp("eq", e, lanes, b, &lit(0));
        let mut safe = self.select(e, lanes, &zero, &lit(1), b);
        if unsigned {
            let y = self.bin(if op == Op::Div { "udiv" } else { "urem" }, e, lanes, a, &safe);
            return self.select(e, lanes, &zero, &lit(0), &y);
        }
        // The smallest integer divided by -1 would trap: negate instead.
        let minus_one = self.cmp("eq", e, lanes, b, &lit(-1));
        safe = self.select(e, lanes, &minus_one, &lit(1), &safe);
        let y = if op == Op::Div {
            let q = self.bin("sdiv", e, lanes, a, &safe);
            let neg = self.bin("sub", e, lanes, &lit(0), a);
            self.select(e, lanes, &minus_one, &neg, &q)
        } else {
            let r = self.bin("srem", e, lanes, a, &safe);
            if op == Op::Mod {
                let sign = self.bin("xor", e, lanes, &r, &safe);
                let differs = self.cmp("slt", e, lanes, &sign, &lit(0));
                let some = self.cmp("ne", e, lanes, &r, &lit(0));
                let fix = self.bin("and", "i1", lanes, &differs, &some);
                let moved = self.bin("add", e, lanes, &r, &safe);
                self.select(e, lanes, &fix, &moved, &r)
            } else {
                r
            }
        };
        self.select(e, lanes, &zero, &lit(0), &y)
    }

    fn shift(&mut self, op: Op, d: DType, lanes: u32, a: &str, b: &str) -> String {
        let e = reg_elem(d);
        let width = i64::from(d.bits());
        let lit = |v: i64| constant(d, Value::Int(v), lanes);
        // Unsigned comparison: a negative count is a large one.
        let large = self.cmp("uge", e, lanes, b, &lit(width));
        if op == Op::Shl {
            let count = self.select(e, lanes, &large, &lit(0), b);
            let y = self.bin("shl", e, lanes, a, &count);
            return self.select(e, lanes, &large, &lit(0), &y);
        }
        let signed = d.class() == Class::Signed;
        let count = self.select(e, lanes, &large, &lit(if signed { width - 1 } else { 0 }), b);
        let y = self.bin(if signed { "ashr" } else { "lshr" }, e, lanes, a, &count);
        if signed { y } else { self.select(e, lanes, &large, &lit(0), &y) }
    }
}

/// Width of an LLVM integer type by its name.
pub(crate) fn bits_of(elem: &str) -> u32 {
    match elem {
        "double" => 64,
        "float" => 32,
        "half" => 16,
        other => other.trim_start_matches('i').parse().unwrap_or(8),
    }
}
