//! Formulas over arrays: a scalar function becomes machine code, and its slow obvious twin.
//!
//! [`ArrayFunc`] runs the whole function on each element while it is in registers. [`Temporaries`]
//! evaluates as NumPy does: one loop and one new array per operation. [`measure`] times both.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, check_memory};
use tilewright_emit_llvm::emit_func_array;
use tilewright_expr::{ExprId, FloatEval, Func, Node, Op, Value};
use tilewright_jit::{Jit, Options, Source};
use tilewright_runtime::{ArrayCode, Pool};
use tilewright_target::Cpu;

/// Name of the compiled function.
const NAME: &str = "expr";

/// A scalar function compiled for arrays.
pub struct ArrayFunc {
    func: Func,
    source: Source,
    code: ArrayCode,
    pool: Pool,
}

/// LLVM IR of the function over arrays, in vectors as wide as the machine's.
pub fn llvm_ir(func: &Func, cpu: &Cpu) -> Result<String> {
    Ok(emit_func_array(func, NAME, cpu.vector_bits)?.llvm_ir)
}

/// Machine code of the function over arrays, as text.
pub fn assembly(func: &Func, cpu: &Cpu) -> Result<String> {
    let source = Source { symbol: NAME.into(), text: llvm_ir(func, cpu)? };
    Jit::new(Options::default())?.assembly(&source)
}

impl ArrayFunc {
    /// Compiles the function for this machine; it will run on `cpu.threads` threads.
    pub fn new(func: &Func, cpu: &Cpu) -> Result<ArrayFunc> {
        let source = Source { symbol: NAME.into(), text: llvm_ir(func, cpu)? };
        let build = Jit::new(Options::default())?.build(std::slice::from_ref(&source))?;
        let library = Arc::new(build.library);
        let params = func.params().iter().map(|p| p.dtype).collect();
        let code = ArrayCode::from_library(&library, 0, params, func.dtype())?;
        Ok(ArrayFunc { func: func.clone(), source, code, pool: Pool::new(cpu.threads) })
    }

    /// The function.
    pub fn func(&self) -> &Func {
        &self.func
    }

    /// The LLVM IR that was compiled.
    pub fn llvm_ir(&self) -> &str {
        &self.source.text
    }

    /// The results for arrays of `count` elements, one per parameter.
    pub fn run(&self, args: &[Tensor], count: usize) -> Result<Tensor> {
        let mut out = Tensor::zeros(self.func.dtype(), vec![count])?;
        self.code.run(&self.pool, args, &mut out)?;
        Ok(out)
    }

    /// As [`ArrayFunc::run`] into an array that exists.
    pub fn run_into(&self, args: &[Tensor], out: &mut Tensor) -> Result<()> {
        self.code.run(&self.pool, args, out)
    }
}

/// An intermediate result: an array, or a number that serves every element.
enum Array {
    F64(Vec<f64>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Number(f64),
}

/// An operand: as [`Array`], borrowed.
#[derive(Clone, Copy)]
enum Side<'a, T> {
    Array(&'a [T]),
    Number(T),
}

fn one<T: Copy, R>(a: Side<'_, T>, n: usize, f: impl Fn(T) -> R) -> Vec<R> {
    match a {
        Side::Array(a) => a.iter().map(|a| f(*a)).collect(),
        Side::Number(a) => (0..n).map(|_| f(a)).collect(),
    }
}

fn two<T: Copy, R>(a: Side<'_, T>, b: Side<'_, T>, n: usize, f: impl Fn(T, T) -> R) -> Vec<R> {
    // A loop for each shape, so that each of them is vectorised.
    match (a, b) {
        (Side::Array(a), Side::Array(b)) => a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect(),
        (Side::Array(a), Side::Number(b)) => a.iter().map(|a| f(*a, b)).collect(),
        (Side::Number(a), Side::Array(b)) => b.iter().map(|b| f(a, *b)).collect(),
        (Side::Number(a), Side::Number(b)) => (0..n).map(|_| f(a, b)).collect(),
    }
}

fn at<T: Copy>(side: Side<'_, T>, i: usize) -> T {
    match side {
        Side::Array(a) => a[i],
        Side::Number(a) => a,
    }
}

/// Evaluation as NumPy does it: one loop and one temporary array per operation, in plain loops that
/// the compiler vectorises; functions such as `exp` are those of the standard library. Knows f64, f32
/// and conditions.
pub struct Temporaries<'a> {
    func: &'a Func,
    /// For each node its last user: afterwards the temporary is freed.
    last: Vec<usize>,
}

macro_rules! float_operation {
    ($name:ident, $t:ty, $variant:ident) => {
        fn $name(op: Op, args: &[Side<'_, $t>], n: usize) -> Array {
            use Array::{Bool, $variant as Out};
            let arg = |i: usize| args.get(i).copied().unwrap_or(Side::Number(0.0));
            let (a, b) = (arg(0), arg(1));
            match op {
                Op::Neg => Out(one(a, n, |a| -a)),
                Op::Abs => Out(one(a, n, <$t>::abs)),
                Op::Floor => Out(one(a, n, <$t>::floor)),
                Op::Ceil => Out(one(a, n, <$t>::ceil)),
                Op::Round => Out(one(a, n, <$t>::round_ties_even)),
                Op::Trunc => Out(one(a, n, <$t>::trunc)),
                Op::Sqrt => Out(one(a, n, <$t>::sqrt)),
                Op::Rsqrt => Out(one(a, n, |a| 1.0 / a.sqrt())),
                Op::Exp => Out(one(a, n, <$t>::exp)),
                Op::Exp2 => Out(one(a, n, <$t>::exp2)),
                Op::Expm1 => Out(one(a, n, <$t>::exp_m1)),
                Op::Log => Out(one(a, n, <$t>::ln)),
                Op::Log2 => Out(one(a, n, <$t>::log2)),
                Op::Log1p => Out(one(a, n, <$t>::ln_1p)),
                Op::Sin => Out(one(a, n, <$t>::sin)),
                Op::Cos => Out(one(a, n, <$t>::cos)),
                Op::Tan => Out(one(a, n, <$t>::tan)),
                Op::Tanh => Out(one(a, n, <$t>::tanh)),
                Op::Add => Out(two(a, b, n, |a, b| a + b)),
                Op::Sub => Out(two(a, b, n, |a, b| a - b)),
                Op::Mul => Out(two(a, b, n, |a, b| a * b)),
                Op::Div => Out(two(a, b, n, |a, b| a / b)),
                Op::Rem => Out(two(a, b, n, |a, b| a % b)),
                Op::Pow => Out(two(a, b, n, <$t>::powf)),
                Op::Lt => Bool(two(a, b, n, |a, b| a < b)),
                Op::Le => Bool(two(a, b, n, |a, b| a <= b)),
                Op::Gt => Bool(two(a, b, n, |a, b| a > b)),
                Op::Ge => Bool(two(a, b, n, |a, b| a >= b)),
                Op::Eq => Bool(two(a, b, n, |a, b| a == b)),
                Op::Ne => Bool(two(a, b, n, |a, b| a != b)),
                Op::IsNan => Bool(one(a, n, <$t>::is_nan)),
                Op::IsInf => Bool(one(a, n, <$t>::is_infinite)),
                Op::Min => Out(two(a, b, n, |a, b| if a < b || a.is_nan() { a } else { b })),
                Op::Max => Out(two(a, b, n, |a, b| if a > b || a.is_nan() { a } else { b })),
                // The seldom ones through the oracle's own functions.
                _ => match op.row().float {
                    FloatEval::One(f) => Out(one(a, n, |a| f(a.into()) as $t)),
                    FloatEval::Two(f) => Out(two(a, b, n, |a, b| f(a.into(), b.into()) as $t)),
                    FloatEval::Three(f) => Out((0..n)
                        .map(|i| f(at(a, i).into(), at(b, i).into(), at(arg(2), i).into()) as $t)
                        .collect()),
                    FloatEval::Test1(f) => Bool(one(a, n, |a| f(a.into()))),
                    FloatEval::Test2(f) => Bool(two(a, b, n, |a, b| f(a.into(), b.into()))),
                    FloatEval::None => Array::Number(f64::NAN),
                },
            }
        }
    };
}
float_operation!(operation_f64, f64, F64);
float_operation!(operation_f32, f32, F32);

impl<'a> Temporaries<'a> {
    /// For functions of f64, f32 and conditions; `None` for others.
    pub fn new(func: &'a Func) -> Option<Temporaries<'a>> {
        let known = |d: DType| matches!(d, DType::F64 | DType::F32);
        let mut last: Vec<usize> = vec![0; func.nodes().len()];
        for (id, node, dtype) in func.nodes() {
            let inputs_known = match node {
                Node::Op(op, args) => {
                    args.iter().for_each(|a| last[a.index()] = id.index());
                    // Conversions between conditions and numbers, and 64-bit shifts of bits: not here.
                    let from = func.dtype_of(args[0]);
                    *op != Op::Cast || (known(from) && known(dtype))
                }
                Node::Param(_) => known(dtype),
                Node::Const(_) => true,
            };
            if !inputs_known || !(known(dtype) || dtype == DType::Bool) {
                return None;
            }
        }
        known(func.dtype()).then_some(Temporaries { func, last })
    }

    /// The results for arrays of `count` elements.
    pub fn run(&self, args: &[Tensor], count: usize) -> Result<Tensor> {
        let mut values: Vec<Option<Array>> = Vec::with_capacity(self.last.len());
        for (id, node, dtype) in self.func.nodes() {
            let value = match node {
                Node::Param(_) => None,
                Node::Const(Value::Float(v)) => Some(Array::Number(*v)),
                Node::Const(Value::Int(v)) => Some(Array::Number(*v as f64)),
                Node::Op(op, operands) => {
                    Some(self.operation(*op, operands, dtype, args, &values, count)?)
                }
            };
            values.push(value);
            if let Node::Op(_, operands) = node {
                for o in operands.iter().filter(|o| self.last[o.index()] == id.index()) {
                    values[o.index()] = None;
                }
            }
        }
        let result = self.func.result();
        match (self.func.node(result), values.swap_remove(result.index())) {
            (Node::Param(p), _) => Ok(args[*p as usize].clone()),
            (_, Some(Array::F64(v))) => Tensor::from_slice(&[count], &v),
            (_, Some(Array::F32(v))) => Tensor::from_slice(&[count], &v),
            (_, Some(Array::Number(v))) => {
                Tensor::from_f64s(self.func.dtype(), &[count], &vec![v; count])
            }
            _ => Err(Error::bug("a function of floats has another result")),
        }
    }

    fn operation(
        &self,
        op: Op,
        operands: &[ExprId],
        dtype: DType,
        args: &[Tensor],
        values: &[Option<Array>],
        n: usize,
    ) -> Result<Array> {
        let from = self.func.dtype_of(operands[operands.len() - 1]);
        let param = |id: ExprId| match self.func.node(id) {
            Node::Param(p) => args.get(*p as usize),
            _ => None,
        };
        macro_rules! side {
            ($id:expr, $t:ty, $variant:ident) => {{
                let id: ExprId = $id;
                match (param(id), &values[id.index()]) {
                    (Some(tensor), _) => Side::Array(tensor.as_slice::<$t>()?),
                    (_, Some(Array::$variant(v))) => Side::Array(v.as_slice()),
                    (_, Some(Array::Number(v))) => Side::Number(*v as $t),
                    _ => return Err(Error::bug("an operand of another type")),
                }
            }};
        }
        let bools = |id: ExprId| match &values[id.index()] {
            Some(Array::Bool(v)) => Ok(Side::Array(v.as_slice())),
            Some(Array::Number(v)) => Ok(Side::Number(*v != 0.0)),
            _ => Err(Error::bug("a condition of another type")),
        };
        if op == Op::Select {
            let c = bools(operands[0])?;
            macro_rules! choose {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    (0..n).map(|i| if at(c, i) { at(a, i) } else { at(b, i) }).collect()
                }};
            }
            let (a, b) = (operands[1], operands[2]);
            return Ok(match dtype {
                DType::F64 => Array::F64(choose!(side!(a, f64, F64), side!(b, f64, F64))),
                DType::F32 => Array::F32(choose!(side!(a, f32, F32), side!(b, f32, F32))),
                _ => Array::Bool(choose!(bools(a)?, bools(b)?)),
            });
        }
        match (from, dtype) {
            (DType::F32, DType::F64) if op == Op::Cast => {
                Ok(Array::F64(one(side!(operands[0], f32, F32), n, f64::from)))
            }
            (DType::F64, DType::F32) if op == Op::Cast => {
                Ok(Array::F32(one(side!(operands[0], f64, F64), n, |v| v as f32)))
            }
            (DType::F64, _) => {
                let sides =
                    operands.iter().map(|o| Ok(side!(*o, f64, F64))).collect::<Result<Vec<_>>>()?;
                Ok(operation_f64(op, &sides, n))
            }
            (DType::F32, _) => {
                let sides =
                    operands.iter().map(|o| Ok(side!(*o, f32, F32))).collect::<Result<Vec<_>>>()?;
                Ok(operation_f32(op, &sides, n))
            }
            _ => {
                let a = bools(operands[0])?;
                let b = operands.get(1).map_or(Ok(Side::Number(false)), |b| bools(*b))?;
                Ok(Array::Bool(match op {
                    Op::Not => one(a, n, |a| !a),
                    Op::And => two(a, b, n, |a, b| a & b),
                    Op::Or => two(a, b, n, |a, b| a | b),
                    Op::Xor | Op::Ne => two(a, b, n, |a, b| a ^ b),
                    Op::Eq => two(a, b, n, |a, b| a == b),
                    _ => return Err(Error::unsupported(format!("`{}` of conditions", op.name()))),
                }))
            }
        }
    }
}

/// What [`measure`] found.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Elements of each array.
    pub elements: usize,
    /// Median seconds of the compiled function on one thread.
    pub one_thread_s: f64,
    /// The same on all threads.
    pub all_threads_s: f64,
    /// How many those are.
    pub threads: usize,
    /// Median seconds with one temporary array per operation (one thread, as NumPy); `None` when
    /// the types are not f64 and f32.
    pub temporaries_s: Option<f64>,
    /// Operations of the function, as the temporaries count them.
    pub operations: usize,
    /// Largest relative difference between the two results.
    pub max_difference: Option<f64>,
    /// Largest relative difference between the compiled function and float64 (for integers: 1 when
    /// some element differs), over the first elements.
    pub max_error: f64,
}

/// Times a function over arrays of `count` elements: floats lie between 0.25 and 4, integers between 0 and 99.
pub fn measure(written: &Func, compiled: &Func, cpu: &Cpu, count: usize) -> Result<Measured> {
    // The arguments, the result, and up to two temporaries at a time.
    let arrays = written.params().len() + 3;
    check_memory(count.saturating_mul(8 * arrays), "arrays of this many elements")?;
    let args = written
        .params()
        .iter()
        .enumerate()
        .map(|(p, param)| example(param.dtype, count, p as u64))
        .collect::<Result<Vec<_>>>()?;
    let all = ArrayFunc::new(compiled, cpu)?;
    let single = ArrayFunc::new(compiled, &Cpu { threads: 1, ..cpu.clone() })?;
    let temporaries = Temporaries::new(written);
    let mut out = all.run(&args, count)?;
    let max_error = error(compiled, &args, &out);
    let max_difference = match &temporaries {
        Some(t) => {
            let other = t.run(&args, count)?;
            let pairs = (0..count).map(|i| (out.get_f64(i), other.get_f64(i)));
            Some(pairs.map(|(a, b)| difference(a, b)).fold(0.0, f64::max))
        }
        None => None,
    };
    // Taking turns, so that a change of the machine's pace meets all three alike.
    let begin = Instant::now();
    let mut times: [Vec<Duration>; 3] = Default::default();
    while times[0].len() < 5
        || (begin.elapsed() < Duration::from_millis(1500) && times[0].len() < 10_000)
    {
        let start = Instant::now();
        single.run_into(&args, &mut out)?;
        times[0].push(start.elapsed());
        let start = Instant::now();
        all.run_into(&args, &mut out)?;
        times[1].push(start.elapsed());
        if let Some(t) = &temporaries {
            let start = Instant::now();
            let result = t.run(&args, count)?;
            times[2].push(start.elapsed());
            drop(result);
        }
    }
    let [one_thread_s, all_threads_s, temporaries_s] =
        times.map(|runs| crate::bench::Times { runs }.median().as_secs_f64());
    Ok(Measured {
        elements: count,
        one_thread_s,
        all_threads_s,
        threads: cpu.threads,
        temporaries_s: temporaries.is_some().then_some(temporaries_s),
        operations: written.nodes().filter(|(_, n, _)| matches!(n, Node::Op(..))).count(),
        max_difference,
        max_error,
    })
}

/// Relative difference; NaN beside NaN is none.
fn difference(a: f64, b: f64) -> f64 {
    if a == b || (a.is_nan() && b.is_nan()) {
        return 0.0;
    }
    let d = (a - b).abs() / a.abs().max(b.abs()).max(f64::MIN_POSITIVE);
    if d.is_nan() { f64::INFINITY } else { d }
}

fn error(func: &Func, args: &[Tensor], out: &Tensor) -> f64 {
    let count = out.len().min(1 << 16);
    let columns: Vec<Vec<Value>> = args
        .iter()
        .map(|a| {
            let float = a.dtype().is_float();
            let value =
                |i| if float { Value::Float(a.get_f64(i)) } else { Value::Int(a.get_i64(i)) };
            (0..count).map(value).collect()
        })
        .collect();
    let columns: Vec<&[Value]> = columns.iter().map(Vec::as_slice).collect();
    let mut want = vec![Value::Int(0); count];
    func.eval_oracle_many(&columns, &mut want);
    let each = want.iter().enumerate().map(|(i, want)| match want {
        Value::Float(want) => difference(out.get_f64(i), *want),
        Value::Int(want) => f64::from(u8::from(out.get_i64(i) != *want)),
    });
    each.fold(0.0, f64::max)
}

/// An array of made-up numbers.
fn example(dtype: DType, count: usize, seed: u64) -> Result<Tensor> {
    check_memory(dtype.bytes_for(count).unwrap_or(usize::MAX), "an array")?;
    let mut tensor = Tensor::zeros(dtype, vec![count])?;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        // Marsaglia's xorshift: any spread-out numbers do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 11
    };
    let bytes = tensor.bytes_mut();
    for i in 0..count {
        match dtype {
            _ if dtype.is_float() => {
                let unit = next() as f64 / (1u64 << 53) as f64;
                tilewright_data::from_f64(dtype, bytes, i, 0.25 + 3.75 * unit);
            }
            DType::Bool => tilewright_data::from_i64(dtype, bytes, i, (next() & 1) as i64),
            _ => tilewright_data::from_i64(dtype, bytes, i, (next() % 100) as i64),
        }
    }
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_expr::{CompileOptions, compile};

    fn func(text: &str, dtype: DType) -> Func {
        let options = CompileOptions { default: dtype, ..CompileOptions::default() };
        compile(text, &options).unwrap().func
    }

    /// Compiled code, temporaries and oracle agree, also on the last partial vector. None of the
    /// formulas cancels on the arguments, so that relative errors stay those of the functions.
    #[test]
    fn three_ways_agree() {
        let cpu = Cpu::detect(2).unwrap();
        for text in [
            "x * 2 + y / 3",
            "gelu(x) * sigmoid(y)",
            "where(x > y, sqrt(x), -exp(y))",
            "min(x, y) + max(x, 1) * tanh(y) ** 2",
            "where(x > 1 && !(y < 2), log(x), fma(x, y, 1))",
        ] {
            for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 4e-6)] {
                let f = func(text, dtype);
                for count in [0, 1, 7, 1000, 40_000] {
                    let args: Vec<Tensor> = f
                        .params()
                        .iter()
                        .enumerate()
                        .map(|(i, p)| example(p.dtype, count, i as u64).unwrap())
                        .collect();
                    let got =
                        ArrayFunc::new(&f.simplify(), &cpu).unwrap().run(&args, count).unwrap();
                    assert!(error(&f, &args, &got) < tolerance, "{text} {dtype} {count}");
                    let other = Temporaries::new(&f).unwrap().run(&args, count).unwrap();
                    for i in 0..count {
                        let (a, b) = (got.get_f64(i), other.get_f64(i));
                        assert!(difference(a, b) < tolerance, "{text} {dtype} {i}: {a} {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn integers_and_narrow_floats_run_too() {
        let cpu = Cpu::detect(1).unwrap();
        for dtype in [DType::I64, DType::I32, DType::U8, DType::BF16, DType::F16] {
            let f = func("x * 3 + y", dtype);
            let args: Vec<Tensor> = (0..2).map(|i| example(dtype, 100, i).unwrap()).collect();
            let got = ArrayFunc::new(&f, &cpu).unwrap().run(&args, 100).unwrap();
            let tolerance = if dtype.is_float() { 0.02 } else { 0.5 };
            assert!(error(&f, &args, &got) < tolerance, "{dtype}");
            assert!(Temporaries::new(&f).is_none());
        }
    }
}
