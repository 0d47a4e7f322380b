//! Evaluation of functions: the oracle in f64, and exact evaluation that rounds every step.
//!
//! | | float operations | float conversions | integers and `bool` |
//! |---|---|---|---|
//! | oracle ([`Func::eval_f64`]) | f64, never rounded further | nothing happens | exact, wrapping |
//! | exact ([`Func::eval`]) | f64, rounded to f32, then to a narrower type | rounded | exact, wrapping |
//!
//! For f32, `+ - * /` and `sqrt` come out correctly rounded that way (53 >= 2 * 24 + 2 digits), and
//! the others within a hair of it. The scalar evaluators of each operation are in `op_table.rs`;
//! here they run over single values and over arrays, node by node and chunk by chunk.

use crate::ir::{Func, Node, Value};
use crate::op::Op;
use crate::op_table::{FloatEval, Int, IntEval};
use tilewright_base::{Class, DType};

/// Elements that one node computes before the next: all nodes' buffers stay in the caches.
const CHUNK: usize = 256;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Oracle,
    Exact,
}

impl Func {
    /// The value in f64 arithmetic; integer and `bool` parameters take the value converted.
    ///
    /// # Panics
    /// When the number of arguments is wrong.
    pub fn eval_f64(&self, args: &[f64]) -> f64 {
        let mut out = [0.0];
        let slices: Vec<&[f64]> = args.iter().map(std::slice::from_ref).collect();
        self.eval_f64_many(&slices, &mut out);
        out[0]
    }

    /// [`Func::eval_f64`] on arrays: `out[i]` from `args[..][i]`. An argument of length 1 serves
    /// every element.
    ///
    /// # Panics
    /// When the number of arguments or a length is wrong.
    pub fn eval_f64_many(&self, args: &[&[f64]], out: &mut [f64]) {
        self.check_lengths(args.iter().map(|a| a.len()), out.len());
        let load = |p: usize, i: usize, dtype: DType, lane: &mut Lane| match lane {
            Lane::Float(lane) => fill(lane, args[p], i, |v| v),
            Lane::Int(lane) => fill(lane, args[p], i, |v| float_to_int(v, dtype)),
        };
        let dtype = self.dtype();
        self.run(Mode::Oracle, out.len(), load, |i, lane| match lane {
            Lane::Float(lane) => out[i..i + lane.len()].copy_from_slice(lane),
            Lane::Int(lane) => {
                for (o, v) in out[i..].iter_mut().zip(lane) {
                    *o = int_to_f64(*v, dtype);
                }
            }
        });
    }

    /// The value with every operation rounded to its node's type. All NaNs are one.
    ///
    /// # Panics
    /// When the number of arguments or the kind of one is wrong.
    pub fn eval(&self, args: &[Value]) -> Value {
        let mut out = [Value::Int(0)];
        let slices: Vec<&[Value]> = args.iter().map(std::slice::from_ref).collect();
        self.eval_many(&slices, &mut out);
        out[0]
    }

    /// [`Func::eval`] on arrays; as [`Func::eval_f64_many`].
    ///
    /// # Panics
    /// When the number of arguments, a length, or the kind of a value is wrong.
    pub fn eval_many(&self, args: &[&[Value]], out: &mut [Value]) {
        self.run_values(Mode::Exact, args, out);
    }

    /// As [`Func::eval_many`] with floats as in [`Func::eval_f64`], and 64-bit integers exact.
    ///
    /// # Panics
    /// As [`Func::eval_many`].
    pub fn eval_oracle_many(&self, args: &[&[Value]], out: &mut [Value]) {
        self.run_values(Mode::Oracle, args, out);
    }

    fn run_values(&self, mode: Mode, args: &[&[Value]], out: &mut [Value]) {
        self.check_lengths(args.iter().map(|a| a.len()), out.len());
        let load = |p: usize, i: usize, dtype: DType, lane: &mut Lane| match lane {
            Lane::Float(lane) => fill(lane, args[p], i, |v| match v {
                Value::Float(v) if mode == Mode::Exact => round(dtype, v),
                Value::Float(v) => v,
                Value::Int(v) => panic!("parameter {p} is {dtype}, its argument the integer {v}"),
            }),
            Lane::Int(lane) => fill(lane, args[p], i, |v| match v {
                Value::Int(v) => wrap(dtype, v),
                Value::Float(v) => panic!("parameter {p} is {dtype}, its argument the float {v}"),
            }),
        };
        self.run(mode, out.len(), load, |i, lane| match lane {
            Lane::Float(lane) => {
                for (o, v) in out[i..].iter_mut().zip(lane) {
                    *o = Value::Float(if v.is_nan() { f64::NAN } else { *v });
                }
            }
            Lane::Int(lane) => {
                for (o, v) in out[i..].iter_mut().zip(lane) {
                    *o = Value::Int(*v);
                }
            }
        });
    }

    fn check_lengths(&self, lengths: impl ExactSizeIterator<Item = usize>, count: usize) {
        assert_eq!(lengths.len(), self.params().len(), "wrong number of arguments");
        for (i, len) in lengths.enumerate() {
            assert!(len == count || len == 1, "argument {i} has {len} elements, not {count}");
        }
    }

    fn run(
        &self,
        mode: Mode,
        count: usize,
        load: impl Fn(usize, usize, DType, &mut Lane),
        mut store: impl FnMut(usize, &Lane),
    ) {
        let width = count.min(CHUNK);
        let mut lanes: Vec<Lane> = Vec::with_capacity(self.nodes().len());
        for (_, node, dtype) in self.nodes() {
            lanes.push(match node {
                Node::Const(Value::Float(v)) => Lane::Float(vec![*v; width]),
                Node::Const(Value::Int(v)) => Lane::Int(vec![*v; width]),
                _ if dtype.is_float() => Lane::Float(vec![0.0; width]),
                _ => Lane::Int(vec![0; width]),
            });
        }
        let mut start = 0;
        while start < count {
            let len = (count - start).min(width);
            if len < width {
                lanes.iter_mut().for_each(|lane| lane.truncate(len));
            }
            for (id, node, dtype) in self.nodes() {
                let (before, rest) = lanes.split_at_mut(id.index());
                let out = &mut rest[0];
                match node {
                    Node::Const(_) => {}
                    Node::Param(p) => load(*p as usize, start, dtype, out),
                    Node::Op(op, args) => {
                        let arg = |i: usize| &before[args[i].index()];
                        match op {
                            Op::Cast => convert(mode, self.dtype_of(args[0]), dtype, arg(0), out),
                            Op::Select => select(arg(0).ints(), arg(1), arg(2), out),
                            _ => {
                                let from = self.dtype_of(args[0]);
                                let operands: [&Lane; 3] = match args.len() {
                                    1 => [arg(0); 3],
                                    2 => [arg(0), arg(1), arg(1)],
                                    _ => [arg(0), arg(1), arg(2)],
                                };
                                operation(mode, *op, from, operands, out);
                            }
                        }
                    }
                }
            }
            store(start, &lanes[self.result().index()]);
            start += len;
        }
    }
}

/// The values of one node for a chunk of elements.
enum Lane {
    Float(Vec<f64>),
    Int(Vec<i64>),
}

impl Lane {
    fn truncate(&mut self, len: usize) {
        match self {
            Lane::Float(v) => v.truncate(len),
            Lane::Int(v) => v.truncate(len),
        }
    }

    fn floats(&self) -> &[f64] {
        match self {
            Lane::Float(v) => v,
            Lane::Int(_) => unreachable!("a float node has float lanes"),
        }
    }

    fn ints(&self) -> &[i64] {
        match self {
            Lane::Int(v) => v,
            Lane::Float(_) => unreachable!("an integer node has integer lanes"),
        }
    }
}

fn fill<S: Copy, T>(lane: &mut [T], source: &[S], start: usize, f: impl Fn(S) -> T) {
    let broadcast = source.len() == 1;
    for (i, out) in lane.iter_mut().enumerate() {
        *out = f(source[if broadcast { 0 } else { start + i }]);
    }
}

fn map1<A: Copy, R>(a: &[A], out: &mut [R], f: impl Fn(A) -> R) {
    for (o, a) in out.iter_mut().zip(a) {
        *o = f(*a);
    }
}

fn map2<A: Copy, R>(a: &[A], b: &[A], out: &mut [R], f: impl Fn(A, A) -> R) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = f(*a, *b);
    }
}

fn map3<A: Copy, R>(a: &[A], b: &[A], c: &[A], out: &mut [R], f: impl Fn(A, A, A) -> R) {
    for (((o, a), b), c) in out.iter_mut().zip(a).zip(b).zip(c) {
        *o = f(*a, *b, *c);
    }
}

fn select(condition: &[i64], a: &Lane, b: &Lane, out: &mut Lane) {
    match out {
        Lane::Float(out) => {
            for (i, o) in out.iter_mut().enumerate() {
                *o = if condition[i] != 0 { a.floats()[i] } else { b.floats()[i] };
            }
        }
        Lane::Int(out) => {
            for (i, o) in out.iter_mut().enumerate() {
                *o = if condition[i] != 0 { a.ints()[i] } else { b.ints()[i] };
            }
        }
    }
}

/// An operation on operands of type `dtype`.
fn operation(mode: Mode, op: Op, dtype: DType, args: [&Lane; 3], out: &mut Lane) {
    let [a, b, c] = args;
    let row = op.row();
    if !dtype.is_float() {
        let int = Int::of(dtype);
        let (a, b, c, Lane::Int(out)) = (a.ints(), b.ints(), c.ints(), out) else {
            unreachable!("integers give integers")
        };
        match (op, row.int) {
            (Op::Add, _) => map2(a, b, out, i64::wrapping_add),
            (Op::Mul, _) => map2(a, b, out, i64::wrapping_mul),
            (_, IntEval::One(f)) => map1(a, out, |a| f(int, a)),
            (_, IntEval::Two(f)) => map2(a, b, out, |a, b| f(int, a, b)),
            (_, IntEval::Test(f)) => map2(a, b, out, |a, b| f(int, a, b).into()),
            (_, IntEval::Three(f)) => map3(a, b, c, out, |a, b, c| f(int, a, b, c)),
            (_, IntEval::None) => unreachable!("{op:?} is not an operation on {dtype}"),
        }
        if !op.is_predicate() && dtype.bits() < 64 {
            out.iter_mut().for_each(|v| *v = wrap(dtype, *v));
        }
        return;
    }
    let (a, b, c) = (a.floats(), b.floats(), c.floats());
    match (row.float, out) {
        (FloatEval::Test1(f), Lane::Int(out)) => map1(a, out, |a| f(a).into()),
        (FloatEval::Test2(f), Lane::Int(out)) => map2(a, b, out, |a, b| f(a, b).into()),
        (eval, Lane::Float(out)) => {
            match (op, eval) {
                // The most frequent ones as loops of their own.
                (Op::Add, _) => map2(a, b, out, |a, b| a + b),
                (Op::Sub, _) => map2(a, b, out, |a, b| a - b),
                (Op::Mul, _) => map2(a, b, out, |a, b| a * b),
                (Op::Div, _) => map2(a, b, out, |a, b| a / b),
                (Op::Fma, _) if mode == Mode::Exact && dtype != DType::F64 => {
                    map3(a, b, c, out, |a, b, c| (a as f32).mul_add(b as f32, c as f32).into());
                }
                (_, FloatEval::One(f)) => map1(a, out, f),
                (_, FloatEval::Two(f)) => map2(a, b, out, f),
                (_, FloatEval::Three(f)) => map3(a, b, c, out, f),
                _ => unreachable!("{op:?} is not an operation on {dtype}"),
            }
            if mode == Mode::Exact {
                match dtype {
                    DType::F64 => {}
                    DType::F32 => out.iter_mut().for_each(|v| *v = (*v as f32).into()),
                    _ => out.iter_mut().for_each(|v| *v = round(dtype, (*v as f32).into())),
                }
            }
        }
        _ => unreachable!("{op:?} on {dtype} has another result type"),
    }
}

fn convert(mode: Mode, from: DType, to: DType, arg: &Lane, out: &mut Lane) {
    match (arg, out) {
        (Lane::Float(a), Lane::Float(out)) => match mode {
            Mode::Oracle => out.copy_from_slice(a),
            Mode::Exact => map1(a, out, |v| round(to, v)),
        },
        (Lane::Float(a), Lane::Int(out)) => map1(a, out, |v| float_to_int(v, to)),
        (Lane::Int(a), Lane::Float(out)) => match mode {
            Mode::Oracle => map1(a, out, |v| int_to_f64(v, from)),
            Mode::Exact => map1(a, out, |v| int_to_float(v, from, to)),
        },
        (Lane::Int(a), Lane::Int(out)) => {
            map1(a, out, |v| if to == DType::Bool { (v != 0).into() } else { wrap(to, v) });
        }
    }
}

/// `value` rounded once to a float type.
pub(crate) fn round(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => (value as f32).into(),
        _ => {
            let mut bytes = [0u8; 8];
            tilewright_data::from_f64(dtype, &mut bytes, 0, value);
            tilewright_data::read_f64(dtype, &bytes, 0)
        }
    }
}

/// The low bits of `value` as an integer type (or `bool`) reads them.
pub(crate) fn wrap(dtype: DType, value: i64) -> i64 {
    match dtype.bits() {
        _ if dtype == DType::Bool => value & 1,
        64 => value,
        bits if dtype.class() == Class::Signed => value << (64 - bits) >> (64 - bits),
        bits => value & ((1 << bits) - 1),
    }
}

fn int_to_f64(value: i64, dtype: DType) -> f64 {
    if dtype == DType::U64 { value as u64 as f64 } else { value as f64 }
}

/// Rounded once for f64 and f32; the narrower types by way of f32, in which they compute.
fn int_to_float(value: i64, from: DType, to: DType) -> f64 {
    if to == DType::F64 {
        return int_to_f64(value, from);
    }
    let single = if from == DType::U64 { value as u64 as f32 } else { value as f32 };
    round(to, single.into())
}

fn float_to_int(value: f64, to: DType) -> i64 {
    match to {
        DType::Bool => (value != 0.0).into(),
        DType::U64 => value as u64 as i64,
        DType::I64 => value as i64,
        _ => {
            let bits = to.bits();
            let (low, high) = match to.class() {
                Class::Signed => (-(1i64 << (bits - 1)), (1i64 << (bits - 1)) - 1),
                _ => (0, (1i64 << bits) - 1),
            };
            (value as i64).clamp(low, high)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testgen;
    use proptest::prelude::*;
    use tilewright_base::DType::*;

    fn exact(text: &str, types: &[DType], args: &[Value]) -> Value {
        Func::parse(text, types).unwrap_or_else(|e| panic!("{e:?}")).eval(args)
    }

    fn float(text: &str, dtype: DType, args: &[f64]) -> f64 {
        let values: Vec<Value> = args.iter().map(|v| Value::Float(*v)).collect();
        match exact(text, &vec![dtype; args.len()], &values) {
            Value::Float(v) => v,
            Value::Int(v) => v as f64,
        }
    }

    fn int(text: &str, dtype: DType, args: &[i64]) -> i64 {
        let values: Vec<Value> = args.iter().map(|v| Value::Int(*v)).collect();
        match exact(text, &vec![dtype; args.len()], &values) {
            Value::Int(v) => v,
            Value::Float(v) => panic!("float {v}"),
        }
    }

    #[test]
    fn floats_round_at_every_step() {
        assert_eq!(float("{ a, b -> a + b }", F32, &[16777216.0, 1.0]), 16777216.0);
        assert_eq!(float("{ a, b -> a + b - a }", BF16, &[256.0, 1.0]), 0.0);
        let f = Func::parse("{ a, b -> a + b - a }", &[BF16, BF16]).unwrap();
        assert_eq!(f.eval_f64(&[256.0, 1.0]), 1.0);
        assert_eq!(float("{ a -> a * a }", F16, &[300.0]), f64::INFINITY);
        assert_eq!(float("{ a -> a * a }", F8E4M3, &[30.0]), 448.0);
        // fma(1 + 2^-12, 1 + 2^-12, -1) keeps the 2^-24 that rounding the product drops.
        let x = 1.0 + 2f64.powi(-12);
        assert_eq!(float("{ a -> fma(a, a, -1.0) }", F32, &[x]), x * x - 1.0);
    }

    #[test]
    fn minimum_and_maximum_keep_nan_and_signed_zeros() {
        assert!(float("{ a, b -> min(a, b) }", F32, &[1.0, f64::NAN]).is_nan());
        assert!(float("{ a, b -> max(a, b) }", F32, &[f64::NAN, 1.0]).is_nan());
        assert!(float("{ a, b -> min(a, b) }", F32, &[0.0, -0.0]).is_sign_negative());
        assert!(float("{ a, b -> max(a, b) }", F32, &[-0.0, 0.0]).is_sign_positive());
    }

    #[test]
    fn integers_wrap_and_division_never_traps() {
        assert_eq!(int("{ a, b -> a / b }", I32, &[i32::MIN.into(), -1]), i32::MIN.into());
        assert_eq!(int("{ a, b -> a / b }", I64, &[i64::MIN, -1]), i64::MIN);
        assert_eq!(int("{ a, b -> a / b }", I8, &[5, 0]), 0);
        assert_eq!(int("{ a, b -> a / b }", U64, &[-1, 2]), i64::MAX);
        assert_eq!(int("{ a, b -> a % b }", I32, &[-7, 3]), -1);
        assert_eq!(int("{ a, b -> mod(a, b) }", I32, &[-7, 3]), 2);
        assert_eq!(int("{ a, b -> mod(a, b) }", I32, &[7, -3]), -2);
        assert_eq!(int("{ a, b -> a ** b }", I32, &[3, 5]), 243);
        assert_eq!(int("{ a, b -> a ** b }", I32, &[-1, -3]), -1);
        assert_eq!(int("{ a, b -> a ** b }", I32, &[2, -1]), 0);
        assert_eq!(int("{ a, b -> a << b }", I32, &[1, 32]), 0);
        assert_eq!(int("{ a, b -> a << b }", I32, &[1, -1]), 0);
        assert_eq!(int("{ a, b -> a >> b }", I32, &[-5, 40]), -1);
        assert_eq!(int("{ a, b -> a >> b }", U8, &[255, 8]), 0);
        assert_eq!(int("{ a -> -a }", I4, &[-8]), -8);
        assert_eq!(int("{ a -> ~a }", U4, &[5]), 10);
        assert_eq!(int("{ a -> a + 1 }", I4, &[7]), -8);
    }

    #[test]
    fn conversions_follow_the_rules_of_cast() {
        let cast = |from: DType, to: DType, v: Value| Func::cast(from, to).eval(&[v]);
        assert_eq!(cast(F32, I8, Value::Float(300.7)), Value::Int(127));
        assert_eq!(cast(F32, U4, Value::Float(-3.0)), Value::Int(0));
        assert_eq!(cast(F64, U64, Value::Float(1e30)), Value::Int(-1));
        assert_eq!(cast(F32, I32, Value::Float(f64::NAN)), Value::Int(0));
        assert_eq!(cast(F32, Bool, Value::Float(f64::NAN)), Value::Int(1));
        assert_eq!(cast(I32, I8, Value::Int(200)), Value::Int(-56));
        assert_eq!(cast(I32, Bool, Value::Int(256)), Value::Int(1));
        assert_eq!(cast(U64, F64, Value::Int(-1)), Value::Float(18446744073709551616.0));
        // 2^60 + 2^36 + 1 lies just above the middle of two f32: one rounding goes up.
        let v = (1i64 << 60) + (1 << 36) + 1;
        assert_eq!(cast(I64, F32, Value::Int(v)), Value::Float((v as f32).into()));
    }

    #[test]
    fn special_functions_have_known_values() {
        for (text, x, want) in [
            ("{ x -> erf(x) }", 0.5, 0.5204998778130465),
            ("{ x -> gelu(x) }", 1.0, 0.8413447460685429),
            ("{ x -> sigmoid(x) }", -745.0, 5e-324),
            ("{ x -> softplus(x) }", -40.0, 4.248354255291589e-18),
            ("{ x -> expm1(x) }", 1e-10, 1.00000000005e-10),
            ("{ x -> log1p(x) }", 1e-10, 9.9999999995e-11),
            ("{ x -> round(x) }", 2.5, 2.0),
            ("{ x -> sign(x) }", -3.0, -1.0),
            ("{ x -> rsqrt(x) }", 4.0, 0.5),
            ("{ x -> atan2(x, -1.0) }", 1.0, 2.356194490192345),
            ("{ x -> mod(x, -3.0) }", 7.0, -2.0),
            ("{ x -> x % -3.0 }", 7.0, 1.0),
        ] {
            let got = Func::parse(text, &[F64]).unwrap().eval_f64(&[x]);
            assert!((got - want).abs() <= 2e-15 * want.abs(), "{text} {x}: {got} not {want}");
        }
    }

    proptest! {
        /// Chunks, the last partial one and broadcasting change nothing.
        #[test]
        fn arrays_give_what_single_values_give(
            func in testgen::func(20),
            bits in proptest::collection::vec(any::<u64>(), 3 * 600),
            count in prop_oneof![Just(1usize), Just(256), Just(257), 0usize..600],
        ) {
            let columns: Vec<Vec<Value>> = func.params().iter().enumerate().map(|(p, param)| {
                let n = if p == 1 { 1 } else { count };
                (0..n).map(|i| testgen::value(param.dtype, bits[p * 600 + i])).collect()
            }).collect();
            let slices: Vec<&[Value]> = columns.iter().map(|c| &c[..]).collect();
            let mut out = vec![Value::Int(0); count];
            func.eval_many(&slices, &mut out);
            for i in (0..count).step_by(37) {
                let args: Vec<Value> =
                    columns.iter().map(|c| c[if c.len() == 1 { 0 } else { i }]).collect();
                prop_assert_eq!(func.eval(&args), out[i]);
            }
        }
    }
}
