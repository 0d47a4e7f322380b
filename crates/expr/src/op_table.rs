//! The table of operations: one row per [`Op`], in the order of the enum.
//!
//! A row says everything about an operation: on which classes of types it works, its value, its
//! derivative, and how each target writes it. To add an operation: a variant of [`Op`], its row
//! here, and whatever the tests below then ask for.
//!
//! **Templates** (`cuda`, `triton`): `$0 $1 $2` are the operands; `{f}` is `f` for f32 and nothing
//! for f64 (`exp{f}($0)`, `1.0{f}`); `{T}` is the type, `{U}` its unsigned twin, `{B}` its bits.
//! **Expansions and derivatives** are written in the language itself, with the operands `a b c`
//! and the result `y`. All per-class columns are ordered float, signed, unsigned (and `bool`).
//! `Not` is `xor` with all ones and `Cast` depends on both types: emitters write them.
//! Narrow floats compute in f32 and round after each operation, so templates see f32 or f64.

use crate::op::Op;
use crate::parse::level;
use tilewright_base::{Class, DType};

/// The value of an operation on floats, in f64.
#[derive(Clone, Copy, Debug)]
pub enum FloatEval {
    /// Not on floats, or done by the evaluator itself (`Cast`, `Select`).
    None,
    /// `f(a)`
    One(fn(f64) -> f64),
    /// `f(a, b)`
    Two(fn(f64, f64) -> f64),
    /// `f(a, b, c)`
    Three(fn(f64, f64, f64) -> f64),
    /// `f(a)`, a `bool`
    Test1(fn(f64) -> bool),
    /// `f(a, b)`, a `bool`
    Test2(fn(f64, f64) -> bool),
}

/// What an evaluator needs to know of an integer type; `bool` is unsigned of width 1.
#[derive(Clone, Copy, Debug)]
pub struct Int {
    /// Width in bits.
    pub bits: u32,
    /// Two's complement.
    pub signed: bool,
}

impl Int {
    /// That of a data type which is not a float.
    pub fn of(dtype: DType) -> Int {
        let bits = if dtype == DType::Bool { 1 } else { dtype.bits() };
        Int { bits, signed: dtype.class() == Class::Signed }
    }
}

/// The value of an operation on integers, before wrapping. Operands are sign- or zero-extended.
#[derive(Clone, Copy, Debug)]
pub enum IntEval {
    /// Not on integers, or done by the evaluator itself.
    None,
    /// `f(a)`
    One(fn(Int, i64) -> i64),
    /// `f(a, b)`
    Two(fn(Int, i64, i64) -> i64),
    /// `f(a, b, c)`
    Three(fn(Int, i64, i64, i64) -> i64),
    /// `f(a, b)`, a `bool`
    Test(fn(Int, i64, i64) -> bool),
}

/// How LLVM IR says an operation on one class of types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Llvm {
    /// The operation does not exist on this class.
    None,
    /// An instruction with the operands as they are: `fadd`, `xor`.
    Inst(&'static str),
    /// A comparison: `fcmp olt`, `icmp slt`.
    Compare(&'static str),
    /// The intrinsic `llvm.<name>.<type>`.
    Intrinsic(&'static str),
    /// A mathematical function that the emitter's vector library provides under this name.
    Library(&'static str),
    /// An integer division: 0 for a zero divisor, and no trap for smallest / -1.
    Guarded(&'static str),
    /// A shift whose amount may exceed the width; see [`Op::Shl`] and [`Op::Shr`].
    Shift(&'static str),
    /// By the expansion column.
    Expand,
    /// Written by the emitter itself: negation and complement of integers, `Select`, `Cast`.
    Special,
}

/// One operation; see the module's head for the columns.
#[derive(Clone, Copy, Debug)]
pub struct OpRow {
    /// Which operation.
    pub op: Op,
    /// Its name in calls.
    pub name: &'static str,
    /// Its operator, if it has one.
    pub symbol: Option<&'static str>,
    /// Classes of operands (of the branches for `Select`): some of `fsub`.
    pub classes: &'static str,
    /// Value on floats.
    pub float: FloatEval,
    /// Value on integers and `bool`.
    pub int: IntEval,
    /// Partial derivative by each operand; empty where the derivative is zero everywhere or the
    /// rule is the derivative pass's own (`Cast`, `Select`).
    pub partials: &'static [&'static str],
    /// The operation in terms of simpler ones, for targets that lack it.
    pub expansion: &'static str,
    /// CUDA C++.
    pub cuda: [&'static str; 3],
    /// Triton.
    pub triton: [&'static str; 3],
    /// LLVM IR.
    pub llvm: [Llvm; 3],
    /// The MLIR operation (with its predicate), or empty: by the expansion.
    pub mlir: [&'static str; 3],
}

const fn row(op: Op, name: &'static str, symbol: &'static str, classes: &'static str) -> OpRow {
    OpRow {
        op,
        name,
        symbol: if symbol.is_empty() { None } else { Some(symbol) },
        classes,
        float: FloatEval::None,
        int: IntEval::None,
        partials: &[],
        expansion: "",
        cuda: [""; 3],
        triton: [""; 3],
        llvm: [Llvm::None; 3],
        mlir: [""; 3],
    }
}

impl OpRow {
    const fn f1(mut self, f: fn(f64) -> f64) -> OpRow {
        self.float = FloatEval::One(f);
        self
    }
    const fn f2(mut self, f: fn(f64, f64) -> f64) -> OpRow {
        self.float = FloatEval::Two(f);
        self
    }
    const fn f3(mut self, f: fn(f64, f64, f64) -> f64) -> OpRow {
        self.float = FloatEval::Three(f);
        self
    }
    const fn test1(mut self, f: fn(f64) -> bool) -> OpRow {
        self.float = FloatEval::Test1(f);
        self
    }
    const fn test2(mut self, f: fn(f64, f64) -> bool, i: fn(Int, i64, i64) -> bool) -> OpRow {
        self.float = FloatEval::Test2(f);
        self.int = IntEval::Test(i);
        self
    }
    const fn i1(mut self, f: fn(Int, i64) -> i64) -> OpRow {
        self.int = IntEval::One(f);
        self
    }
    const fn i2(mut self, f: fn(Int, i64, i64) -> i64) -> OpRow {
        self.int = IntEval::Two(f);
        self
    }
    const fn i3(mut self, f: fn(Int, i64, i64, i64) -> i64) -> OpRow {
        self.int = IntEval::Three(f);
        self
    }
    const fn d(mut self, partials: &'static [&'static str]) -> OpRow {
        self.partials = partials;
        self
    }
    const fn expansion(mut self, text: &'static str) -> OpRow {
        self.expansion = text;
        self
    }
    const fn cuda(mut self, f: &'static str, s: &'static str, u: &'static str) -> OpRow {
        self.cuda = [f, s, u];
        self
    }
    const fn triton(mut self, f: &'static str, s: &'static str, u: &'static str) -> OpRow {
        self.triton = [f, s, u];
        self
    }
    const fn llvm(mut self, f: Llvm, s: Llvm, u: Llvm) -> OpRow {
        self.llvm = [f, s, u];
        self
    }
    const fn mlir(mut self, f: &'static str, s: &'static str, u: &'static str) -> OpRow {
        self.mlir = [f, s, u];
        self
    }
    /// A function of one float that every target has under some name.
    const fn math(
        self,
        f: fn(f64) -> f64,
        partials: &'static [&'static str],
        llvm: Llvm,
        names: [&'static str; 3],
    ) -> OpRow {
        let [cuda, triton, mlir] = names;
        self.f1(f)
            .d(partials)
            .llvm(llvm, Llvm::None, Llvm::None)
            .cuda(cuda, "", "")
            .triton(triton, "", "")
            .mlir(mlir, "", "")
    }
    /// A comparison.
    const fn compare(self, signed: &'static str, predicates: [&'static str; 3]) -> OpRow {
        let [f, s, u] = predicates;
        self.cuda(signed, signed, signed).triton(signed, signed, signed).mlir(f, s, u)
    }
}

use Llvm::{Compare, Expand, Guarded, Inst, Intrinsic, Library, Shift, Special};
const NO: Llvm = Llvm::None;

/// Every operation.
#[rustfmt::skip]
pub static OPS: [OpRow; 56] = [
    row(Op::Neg, "neg", "-", "fsu").f1(|a| -a).i1(|_, a| a.wrapping_neg()).d(&["-1"]).expansion("0 - a")
        .cuda("-$0", "({T})-({U})$0", "({T})-$0").triton("-$0", "-$0", "-$0")
        .llvm(Inst("fneg"), Special, Special).mlir("arith.negf", "", ""),
    row(Op::Abs, "abs", "", "fsu").f1(f64::abs).i1(int_abs).d(&["sign(a)"])
        .expansion("where(a < 0, -a, a)")
        .cuda("fabs{f}($0)", "($0 < 0 ? ({T})-({U})$0 : $0)", "$0").triton("tl.abs($0)", "tl.abs($0)", "$0")
        .llvm(Intrinsic("fabs"), Expand, Expand).mlir("math.absf", "math.absi", ""),
    row(Op::Sign, "sign", "", "fsu").f1(sign).i1(int_sign)
        .expansion("where(a > 0, 1, where(a < 0, -1, a))")
        .cuda("($0 > 0 ? 1.0{f} : $0 < 0 ? -1.0{f} : $0)", "({T})(($0 > 0) - ($0 < 0))", "({T})($0 != 0)")
        .triton("tl.where($0 > 0, 1.0, tl.where($0 < 0, -1.0, $0))", "($0 > 0).to({T}) - ($0 < 0).to({T})", "($0 != 0).to({T})")
        .llvm(Expand, Expand, Special),
    row(Op::Floor, "floor", "", "f").math(f64::floor, &[], Intrinsic("floor"),
        ["floor{f}($0)", "tl.floor($0)", "math.floor"]),
    row(Op::Ceil, "ceil", "", "f").math(f64::ceil, &[], Intrinsic("ceil"),
        ["ceil{f}($0)", "tl.ceil($0)", "math.ceil"]),
    row(Op::Round, "round", "", "f").math(f64::round_ties_even, &[], Intrinsic("roundeven"),
        ["rint{f}($0)", "libdevice.rint($0)", "math.roundeven"]),
    row(Op::Trunc, "trunc", "", "f").math(f64::trunc, &[], Intrinsic("trunc"),
        ["trunc{f}($0)", "libdevice.trunc($0)", "math.trunc"]),
    row(Op::Sqrt, "sqrt", "", "f").math(f64::sqrt, &["0.5 / y"], Intrinsic("sqrt"),
        ["sqrt{f}($0)", "libdevice.sqrt_rn($0)", "math.sqrt"]),
    row(Op::Rsqrt, "rsqrt", "", "f").math(|a| 1.0 / a.sqrt(), &["-0.5 * y / a"], Expand,
        ["rsqrt{f}($0)", "tl.rsqrt($0)", "math.rsqrt"]).expansion("1 / sqrt(a)"),
    row(Op::Exp, "exp", "", "f").math(libm::exp, &["y"], Library("exp"),
        ["exp{f}($0)", "libdevice.exp($0)", "math.exp"]),
    row(Op::Exp2, "exp2", "", "f").math(libm::exp2, &["y * 0.693147180559945309417232121458176568"], Library("exp2"),
        ["exp2{f}($0)", "tl.exp2($0)", "math.exp2"]),
    row(Op::Expm1, "expm1", "", "f").math(libm::expm1, &["y + 1"], Library("expm1"),
        ["expm1{f}($0)", "libdevice.expm1($0)", "math.expm1"]),
    row(Op::Log, "log", "", "f").math(libm::log, &["1 / a"], Library("log"),
        ["log{f}($0)", "tl.log($0)", "math.log"]),
    row(Op::Log2, "log2", "", "f").math(libm::log2, &["1.44269504088896340735992468100189214 / a"], Library("log2"),
        ["log2{f}($0)", "tl.log2($0)", "math.log2"]),
    row(Op::Log1p, "log1p", "", "f").math(libm::log1p, &["1 / (1 + a)"], Library("log1p"),
        ["log1p{f}($0)", "libdevice.log1p($0)", "math.log1p"]),
    row(Op::Sin, "sin", "", "f").math(libm::sin, &["cos(a)"], Library("sin"),
        ["sin{f}($0)", "tl.sin($0)", "math.sin"]),
    row(Op::Cos, "cos", "", "f").math(libm::cos, &["-sin(a)"], Library("cos"),
        ["cos{f}($0)", "tl.cos($0)", "math.cos"]),
    row(Op::Tan, "tan", "", "f").math(libm::tan, &["1 + y * y"], Library("tan"),
        ["tan{f}($0)", "libdevice.tan($0)", "math.tan"]),
    row(Op::Asin, "asin", "", "f").math(libm::asin, &["rsqrt(1 - a * a)"], Library("asin"),
        ["asin{f}($0)", "libdevice.asin($0)", "math.asin"]),
    row(Op::Acos, "acos", "", "f").math(libm::acos, &["-rsqrt(1 - a * a)"], Library("acos"),
        ["acos{f}($0)", "libdevice.acos($0)", "math.acos"]),
    row(Op::Atan, "atan", "", "f").math(libm::atan, &["1 / (1 + a * a)"], Library("atan"),
        ["atan{f}($0)", "libdevice.atan($0)", "math.atan"]),
    row(Op::Sinh, "sinh", "", "f").math(libm::sinh, &["cosh(a)"], Library("sinh"),
        ["sinh{f}($0)", "libdevice.sinh($0)", "math.sinh"]),
    row(Op::Cosh, "cosh", "", "f").math(libm::cosh, &["sinh(a)"], Library("cosh"),
        ["cosh{f}($0)", "libdevice.cosh($0)", "math.cosh"]),
    row(Op::Tanh, "tanh", "", "f").math(libm::tanh, &["1 - y * y"], Library("tanh"),
        ["tanh{f}($0)", "libdevice.tanh($0)", "math.tanh"]),
    row(Op::Asinh, "asinh", "", "f").math(libm::asinh, &["rsqrt(a * a + 1)"], Library("asinh"),
        ["asinh{f}($0)", "libdevice.asinh($0)", "math.asinh"]),
    row(Op::Acosh, "acosh", "", "f").math(libm::acosh, &["rsqrt(a - 1) * rsqrt(a + 1)"], Library("acosh"),
        ["acosh{f}($0)", "libdevice.acosh($0)", "math.acosh"]),
    row(Op::Atanh, "atanh", "", "f").math(libm::atanh, &["1 / (1 - a * a)"], Library("atanh"),
        ["atanh{f}($0)", "libdevice.atanh($0)", "math.atanh"]),
    row(Op::Erf, "erf", "", "f").math(libm::erf, &["1.12837916709551257389615890312154517 * exp(-a * a)"], Library("erf"),
        ["erf{f}($0)", "tl.erf($0)", "math.erf"]),
    row(Op::Sigmoid, "sigmoid", "", "f").math(sigmoid, &["y * (1 - y)"], Expand,
        ["tw_sigmoid($0)", "tl.sigmoid($0)", ""]).expansion("1 / (1 + exp(-a))"),
    row(Op::IsNan, "isnan", "", "f").test1(f64::is_nan).expansion("a != a")
        .cuda("($0 != $0)", "", "").triton("($0 != $0)", "", "").llvm(Expand, NO, NO).mlir("math.isnan", "", ""),
    row(Op::IsInf, "isinf", "", "f").test1(f64::is_infinite).expansion("abs(a) == inf")
        .cuda("isinf($0)", "", "").triton("(tl.abs($0) == float('inf'))", "", "").llvm(Expand, NO, NO).mlir("math.isinf", "", ""),
    row(Op::Not, "not", "!", "sub").i1(|_, a| !a)
        .cuda("", "({T})~$0", "({T})~$0").triton("", "~$0", "~$0").llvm(NO, Special, Special),
    row(Op::Cast, "cast", "", "fsub")
        .cuda("({T})$0", "({T})$0", "({T})$0").triton("$0.to({T})", "$0.to({T})", "$0.to({T})").llvm(Special, Special, Special),
    row(Op::Add, "add", "+", "fsu").f2(|a, b| a + b).i2(|_, a, b| a.wrapping_add(b)).d(&["1", "1"])
        .cuda("$0 + $1", "({T})(({U})$0 + ({U})$1)", "({T})(({U})$0 + ({U})$1)").triton("$0 + $1", "$0 + $1", "$0 + $1")
        .llvm(Inst("fadd"), Inst("add"), Inst("add")).mlir("arith.addf", "arith.addi", "arith.addi"),
    row(Op::Sub, "sub", "-", "fsu").f2(|a, b| a - b).i2(|_, a, b| a.wrapping_sub(b)).d(&["1", "-1"])
        .cuda("$0 - $1", "({T})(({U})$0 - ({U})$1)", "({T})(({U})$0 - ({U})$1)").triton("$0 - $1", "$0 - $1", "$0 - $1")
        .llvm(Inst("fsub"), Inst("sub"), Inst("sub")).mlir("arith.subf", "arith.subi", "arith.subi"),
    row(Op::Mul, "mul", "*", "fsu").f2(|a, b| a * b).i2(|_, a, b| a.wrapping_mul(b)).d(&["b", "a"])
        .cuda("$0 * $1", "({T})(({U})$0 * ({U})$1)", "({T})(({U})$0 * ({U})$1)").triton("$0 * $1", "$0 * $1", "$0 * $1")
        .llvm(Inst("fmul"), Inst("mul"), Inst("mul")).mlir("arith.mulf", "arith.muli", "arith.muli"),
    row(Op::Div, "div", "/", "fsu").f2(|a, b| a / b).i2(int_div).d(&["1 / b", "-y / b"])
        .cuda("$0 / $1", "tw_div($0, $1)", "tw_div($0, $1)")
        .triton("libdevice.div_rn($0, $1)", "tl.where($1 == 0, 0, $0 // tl.where($1 == 0, 1, $1))", "tl.where($1 == 0, 0, $0 // tl.where($1 == 0, 1, $1))")
        .llvm(Inst("fdiv"), Guarded("sdiv"), Guarded("udiv")).mlir("arith.divf", "arith.divsi", "arith.divui"),
    row(Op::Rem, "rem", "%", "fsu").f2(libm::fmod).i2(int_rem).d(&["1", "-trunc(a / b)"])
        .cuda("fmod{f}($0, $1)", "tw_rem($0, $1)", "tw_rem($0, $1)")
        .triton("libdevice.fmod($0, $1)", "tl.where($1 == 0, 0, $0 % tl.where($1 == 0, 1, $1))", "tl.where($1 == 0, 0, $0 % tl.where($1 == 0, 1, $1))")
        .llvm(Inst("frem"), Guarded("srem"), Guarded("urem")).mlir("arith.remf", "arith.remsi", "arith.remui"),
    row(Op::Mod, "mod", "", "fsu").f2(float_mod).i2(int_mod).d(&["1", "-floor(a / b)"])
        .expansion("where(a % b != 0 && (a % b < 0) != (b < 0), a % b + b, a % b)")
        .cuda("tw_mod($0, $1)", "tw_mod($0, $1)", "tw_rem($0, $1)").triton("", "", "")
        .llvm(Library("mod"), Expand, Guarded("urem")),
    row(Op::Pow, "pow", "**", "fsu").f2(pow).i2(int_pow)
        .d(&["where(b == 0, 0, b * a ** (b - 1))", "where(a == 0 && b >= 0, 0, y * log(a))"])
        .cuda("pow{f}($0, $1)", "tw_pow($0, $1)", "tw_pow($0, $1)").triton("libdevice.pow($0, $1)", "", "")
        .llvm(Library("pow"), Library("ipow"), Library("upow")).mlir("math.powf", "math.ipowi", ""),
    row(Op::Min, "min", "", "fsub").f2(minimum).i2(int_min).d(&["where(a <= b, 1, 0)", "where(a <= b, 0, 1)"])
        .cuda("tw_min($0, $1)", "tw_min($0, $1)", "tw_min($0, $1)")
        .triton("tl.minimum($0, $1, propagate_nan=tl.PropagateNan.ALL)", "tl.minimum($0, $1)", "tl.minimum($0, $1)")
        .llvm(Intrinsic("minimum"), Intrinsic("smin"), Intrinsic("umin")).mlir("arith.minimumf", "arith.minsi", "arith.minui"),
    row(Op::Max, "max", "", "fsub").f2(maximum).i2(int_max).d(&["where(a >= b, 1, 0)", "where(a >= b, 0, 1)"])
        .cuda("tw_max($0, $1)", "tw_max($0, $1)", "tw_max($0, $1)")
        .triton("tl.maximum($0, $1, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum($0, $1)", "tl.maximum($0, $1)")
        .llvm(Intrinsic("maximum"), Intrinsic("smax"), Intrinsic("umax")).mlir("arith.maximumf", "arith.maxsi", "arith.maxui"),
    row(Op::Atan2, "atan2", "", "f").f2(libm::atan2).d(&["b / (a * a + b * b)", "-a / (a * a + b * b)"])
        .cuda("atan2{f}($0, $1)", "", "").triton("libdevice.atan2($0, $1)", "", "")
        .llvm(Library("atan2"), NO, NO).mlir("math.atan2", "", ""),
    row(Op::And, "and", "&", "sub").i2(|_, a, b| a & b)
        .cuda("", "({T})($0 & $1)", "({T})($0 & $1)").triton("", "$0 & $1", "$0 & $1")
        .llvm(NO, Inst("and"), Inst("and")).mlir("", "arith.andi", "arith.andi"),
    row(Op::Or, "or", "|", "sub").i2(|_, a, b| a | b)
        .cuda("", "({T})($0 | $1)", "({T})($0 | $1)").triton("", "$0 | $1", "$0 | $1")
        .llvm(NO, Inst("or"), Inst("or")).mlir("", "arith.ori", "arith.ori"),
    row(Op::Xor, "xor", "^", "sub").i2(|_, a, b| a ^ b)
        .cuda("", "({T})($0 ^ $1)", "({T})($0 ^ $1)").triton("", "$0 ^ $1", "$0 ^ $1")
        .llvm(NO, Inst("xor"), Inst("xor")).mlir("", "arith.xori", "arith.xori"),
    row(Op::Shl, "shl", "<<", "su").i2(int_shl)
        .cuda("", "tw_shl($0, $1, {B})", "tw_shl($0, $1, {B})")
        .triton("", "tl.where(($1 >= 0) & ($1 < {B}), $0 << ($1 & ({B} - 1)), 0)", "tl.where($1 < {B}, $0 << ($1 & ({B} - 1)), 0)")
        .llvm(NO, Shift("shl"), Shift("shl")).mlir("", "arith.shli", "arith.shli"),
    row(Op::Shr, "shr", ">>", "su").i2(int_shr)
        .cuda("", "tw_shr($0, $1, {B})", "tw_shr($0, $1, {B})")
        .triton("", "$0 >> tl.where(($1 >= 0) & ($1 < {B}), $1, {B} - 1)", "tl.where($1 < {B}, $0 >> ($1 & ({B} - 1)), 0)")
        .llvm(NO, Shift("ashr"), Shift("lshr")).mlir("", "arith.shrsi", "arith.shrui"),
    row(Op::Lt, "lt", "<", "fsub").test2(|a, b| a < b, |t, a, b| order(t, a) < order(t, b))
        .llvm(Compare("fcmp olt"), Compare("icmp slt"), Compare("icmp ult"))
        .compare("$0 < $1", ["arith.cmpf olt", "arith.cmpi slt", "arith.cmpi ult"]),
    row(Op::Le, "le", "<=", "fsub").test2(|a, b| a <= b, |t, a, b| order(t, a) <= order(t, b))
        .llvm(Compare("fcmp ole"), Compare("icmp sle"), Compare("icmp ule"))
        .compare("$0 <= $1", ["arith.cmpf ole", "arith.cmpi sle", "arith.cmpi ule"]),
    row(Op::Gt, "gt", ">", "fsub").test2(|a, b| a > b, |t, a, b| order(t, a) > order(t, b))
        .llvm(Compare("fcmp ogt"), Compare("icmp sgt"), Compare("icmp ugt"))
        .compare("$0 > $1", ["arith.cmpf ogt", "arith.cmpi sgt", "arith.cmpi ugt"]),
    row(Op::Ge, "ge", ">=", "fsub").test2(|a, b| a >= b, |t, a, b| order(t, a) >= order(t, b))
        .llvm(Compare("fcmp oge"), Compare("icmp sge"), Compare("icmp uge"))
        .compare("$0 >= $1", ["arith.cmpf oge", "arith.cmpi sge", "arith.cmpi uge"]),
    row(Op::Eq, "eq", "==", "fsub").test2(|a, b| a == b, |t, a, b| order(t, a) == order(t, b))
        .llvm(Compare("fcmp oeq"), Compare("icmp eq"), Compare("icmp eq"))
        .compare("$0 == $1", ["arith.cmpf oeq", "arith.cmpi eq", "arith.cmpi eq"]),
    row(Op::Ne, "ne", "!=", "fsub").test2(|a, b| a != b, |t, a, b| order(t, a) != order(t, b))
        .llvm(Compare("fcmp une"), Compare("icmp ne"), Compare("icmp ne"))
        .compare("$0 != $1", ["arith.cmpf une", "arith.cmpi ne", "arith.cmpi ne"]),
    row(Op::Select, "select", "", "fsub")
        .cuda("($0 ? $1 : $2)", "($0 ? $1 : $2)", "($0 ? $1 : $2)")
        .triton("tl.where($0, $1, $2)", "tl.where($0, $1, $2)", "tl.where($0, $1, $2)")
        .llvm(Special, Special, Special).mlir("arith.select", "arith.select", "arith.select"),
    row(Op::Fma, "fma", "", "fsu").f3(f64::mul_add).i3(|_, a, b, c| a.wrapping_mul(b).wrapping_add(c)).d(&["b", "a", "1"])
        .expansion("a * b + c")
        .cuda("fma{f}($0, $1, $2)", "({T})(({U})$0 * ({U})$1 + ({U})$2)", "({T})(({U})$0 * ({U})$1 + ({U})$2)")
        .triton("tl.fma($0, $1, $2)", "$0 * $1 + $2", "$0 * $1 + $2")
        .llvm(Intrinsic("fma"), Expand, Expand).mlir("math.fma", "", ""),
];

// Evaluators that are more than one call.

fn sign(a: f64) -> f64 {
    if a > 0.0 {
        1.0
    } else if a < 0.0 {
        -1.0
    } else {
        a
    }
}

/// On either side the form whose exponential cannot overflow.
fn sigmoid(a: f64) -> f64 {
    if a >= 0.0 {
        1.0 / (1.0 + libm::exp(-a))
    } else {
        let e = libm::exp(a);
        e / (1.0 + e)
    }
}

/// Squares and reciprocals are exactly what the multiplication and the division give, so that the
/// simplifier may use them.
fn pow(a: f64, b: f64) -> f64 {
    if b == 2.0 {
        a * a
    } else if b == -1.0 {
        1.0 / a
    } else {
        libm::pow(a, b)
    }
}

fn float_mod(a: f64, b: f64) -> f64 {
    let r = libm::fmod(a, b);
    if r == 0.0 {
        0.0f64.copysign(b)
    } else if (r < 0.0) != (b < 0.0) {
        r + b
    } else {
        r
    }
}

/// IEEE 754-2019 `minimum`: NaN when either is, and -0 below +0.
fn minimum(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else if a < b || (a == b && a.is_sign_negative()) {
        a
    } else {
        b
    }
}

fn maximum(a: f64, b: f64) -> f64 {
    -minimum(-a, -b)
}

/// Maps to numbers that compare as the type does.
fn order(t: Int, a: i64) -> i128 {
    if t.signed { a.into() } else { (a as u64).into() }
}

fn int_abs(t: Int, a: i64) -> i64 {
    if t.signed { a.wrapping_abs() } else { a }
}

fn int_sign(t: Int, a: i64) -> i64 {
    order(t, a).signum() as i64
}

fn int_div(t: Int, a: i64, b: i64) -> i64 {
    if b == 0 {
        0
    } else if t.signed {
        a.wrapping_div(b)
    } else {
        (a as u64 / b as u64) as i64
    }
}

fn int_rem(t: Int, a: i64, b: i64) -> i64 {
    if b == 0 {
        0
    } else if t.signed {
        a.wrapping_rem(b)
    } else {
        (a as u64 % b as u64) as i64
    }
}

fn int_mod(t: Int, a: i64, b: i64) -> i64 {
    let r = int_rem(t, a, b);
    if t.signed && r != 0 && (r < 0) != (b < 0) { r + b } else { r }
}

fn int_pow(t: Int, a: i64, b: i64) -> i64 {
    if t.signed && b < 0 {
        return match a {
            1 => 1,
            -1 if b % 2 == 0 => 1,
            -1 => -1,
            _ => 0,
        };
    }
    let (mut base, mut exponent, mut result) = (a, b as u64, 1i64);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = result.wrapping_mul(base);
        }
        base = base.wrapping_mul(base);
        exponent >>= 1;
    }
    result
}

fn int_min(t: Int, a: i64, b: i64) -> i64 {
    if order(t, a) <= order(t, b) { a } else { b }
}

fn int_max(t: Int, a: i64, b: i64) -> i64 {
    if order(t, a) >= order(t, b) { a } else { b }
}

/// A negative amount is a huge unsigned one.
fn int_shl(t: Int, a: i64, b: i64) -> i64 {
    if (b as u64) < t.bits.into() { a << b } else { 0 }
}

fn int_shr(t: Int, a: i64, b: i64) -> i64 {
    match (t.signed, (b as u64) < t.bits.into()) {
        (true, true) => a >> b,
        (true, false) => a >> 63,
        (false, true) => ((a as u64) >> b) as i64,
        (false, false) => 0,
    }
}

impl Op {
    /// The operation's row.
    pub fn row(self) -> &'static OpRow {
        &OPS[self as usize]
    }

    /// Its name in calls: `exp`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Its operator, if it has one: `+`.
    pub fn symbol(self) -> Option<&'static str> {
        self.row().symbol
    }

    /// The operation with this name.
    pub fn from_name(name: &str) -> Option<Op> {
        OPS.iter().find(|row| row.name == name).map(|row| row.op)
    }

    /// All operations in order.
    pub fn all() -> impl Iterator<Item = Op> {
        OPS.iter().map(|row| row.op)
    }

    /// Spelling and level of an infix operator; `on_bool` spells `And` as `&&`.
    pub(crate) fn infix(self, on_bool: bool) -> Option<(&'static str, u8)> {
        let level = match self {
            Op::And if on_bool => return Some(("&&", level::AND)),
            Op::Or if on_bool => return Some(("||", level::OR)),
            Op::And => level::BIT_AND,
            Op::Or => level::BIT_OR,
            Op::Xor => level::BIT_XOR,
            Op::Shl | Op::Shr => level::SHIFT,
            Op::Add | Op::Sub => level::ADD,
            Op::Mul | Op::Div | Op::Rem => level::MUL,
            Op::Pow => level::POWER,
            Op::Lt | Op::Le | Op::Gt | Op::Ge | Op::Eq | Op::Ne => level::COMPARE,
            _ => return None,
        };
        self.symbol().map(|symbol| (symbol, level))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Func;

    #[test]
    fn rows_are_in_the_order_of_the_enum() {
        for (i, row) in OPS.iter().enumerate() {
            assert_eq!(row.op as usize, i, "{}", row.name);
            assert_eq!(Op::from_name(row.name), Some(row.op));
        }
        assert_eq!(Op::Fma as usize + 1, OPS.len());
    }

    /// Every class that an operation accepts has a value and a form on each target, no other has.
    #[test]
    fn every_cell_that_must_be_filled_is() {
        for row in &OPS {
            for (i, (letter, class)) in
                [('f', Class::Float), ('s', Class::Signed), ('u', Class::Unsigned)]
                    .into_iter()
                    .enumerate()
            {
                let accepts = row.op.accepts(class);
                assert_eq!(accepts, row.classes.contains(letter), "{} {letter}: classes", row.name);
                let own = matches!(row.op, Op::Cast | Op::Select);
                let value = if class == Class::Float {
                    !matches!(row.float, FloatEval::None)
                } else {
                    !matches!(row.int, IntEval::None)
                };
                assert_eq!(accepts && !own, value, "{} {letter}: evaluator", row.name);
                assert_eq!(accepts, row.llvm[i] != Llvm::None, "{} {letter}: LLVM", row.name);
                assert_eq!(accepts, !row.cuda[i].is_empty(), "{} {letter}: CUDA", row.name);
                if row.llvm[i] == Llvm::Expand {
                    assert!(!row.expansion.is_empty(), "{} {letter}: expansion", row.name);
                }
            }
            assert_eq!(row.op.accepts(Class::Bool), row.classes.contains('b'), "{}", row.name);
            assert!(
                row.partials.is_empty() || row.partials.len() == row.op.arity(),
                "{}",
                row.name
            );
        }
    }

    /// What MLIR says neither by an operation nor by the expansion; may only get shorter.
    #[test]
    fn the_gaps_of_the_mlir_column_are_known() {
        let mut gaps = Vec::new();
        for row in &OPS {
            for (i, letter) in ['f', 's', 'u'].into_iter().enumerate() {
                let own = row.op == Op::Cast || row.op == Op::Not;
                let said = !row.mlir[i].is_empty() || !row.expansion.is_empty() || own;
                if row.classes.contains(letter) && !said {
                    gaps.push(format!("{} {letter}", row.name));
                }
            }
        }
        assert_eq!(gaps, ["pow u"]);
    }

    /// Expansions give what the operation gives, bit for bit up to the last place of f64.
    #[test]
    fn expansions_agree_with_the_operations() {
        for row in OPS.iter().filter(|row| !row.expansion.is_empty()) {
            let names = &["a", "b", "c"][..row.op.arity()];
            let text = format!("{{ {} -> {} }}", names.join(", "), row.expansion);
            for dtype in [DType::F64, DType::I32] {
                let on_floats = dtype == DType::F64;
                // Float `mod` has the sign of a zero, float `fma` one rounding.
                let differs = on_floats && matches!(row.op, Op::Mod | Op::Fma);
                if differs || !row.op.accepts(dtype.class()) {
                    continue;
                }
                let f = Func::parse(&text, &vec![dtype; names.len()]).unwrap();
                let values =
                    [-3.0, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 7.0, 0.5, f64::NAN, f64::INFINITY];
                for a in values {
                    for b in values {
                        let args = &[a, b, 2.0][..names.len()];
                        let direct = match names.len() {
                            1 => Func::unary(row.op, dtype).eval_f64(args),
                            2 => Func::binary(row.op, dtype).eval_f64(args),
                            _ => a.trunc() * b.trunc() + 2.0,
                        };
                        let got = f.eval_f64(args);
                        let close = (got - direct).abs() <= 4e-16 * direct.abs();
                        let same = got == direct || close || (got.is_nan() && direct.is_nan());
                        let finite = on_floats || (a.is_finite() && b.is_finite());
                        assert!(same || !finite, "{text} {args:?}: {got}, not {direct}");
                    }
                }
            }
        }
    }
}
