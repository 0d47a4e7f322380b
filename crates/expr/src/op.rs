//! The operations of the expression language.

/// One operation. Arithmetic works on the node's own type: integers wrap, floats round to the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    // One operand.
    /// `-x`
    Neg,
    /// Absolute value; the smallest integer stays itself.
    Abs,
    /// -1, 0 or 1; NaN stays NaN, -0.0 stays -0.0.
    Sign,
    /// Rounds down.
    Floor,
    /// Rounds up.
    Ceil,
    /// Rounds to nearest, ties to even.
    Round,
    /// Rounds towards zero.
    Trunc,
    /// Square root.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// e^x
    Exp,
    /// 2^x
    Exp2,
    /// e^x - 1, accurate near 0.
    Expm1,
    /// Natural logarithm.
    Log,
    /// Logarithm to base 2.
    Log2,
    /// log(1 + x), accurate near 0.
    Log1p,
    /// Sine (radians), and so on.
    Sin,
    /// Cosine.
    Cos,
    /// Tangent.
    Tan,
    /// Inverse sine.
    Asin,
    /// Inverse cosine.
    Acos,
    /// Inverse tangent.
    Atan,
    /// Hyperbolic sine.
    Sinh,
    /// Hyperbolic cosine.
    Cosh,
    /// Hyperbolic tangent.
    Tanh,
    /// Inverse hyperbolic sine.
    Asinh,
    /// Inverse hyperbolic cosine.
    Acosh,
    /// Inverse hyperbolic tangent.
    Atanh,
    /// Gauss error function.
    Erf,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// True for NaN.
    IsNan,
    /// True for both infinities.
    IsInf,
    /// Logical negation of `bool`, bitwise of integers.
    Not,
    /// Conversion to the node's type: float to integer truncates and saturates (NaN to 0), integer
    /// to narrower integer wraps, to `bool` is `x != 0`.
    Cast,

    // Two operands of one type.
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`; integers truncate towards zero, and division by zero gives 0.
    Div,
    /// Remainder with the sign of the dividend (C's `fmod` and `%`); integer `x rem 0` is 0.
    Rem,
    /// Remainder with the sign of the divisor (Python's `%`); integer `x mod 0` is 0.
    Mod,
    /// a^b; negative integer exponents give the truncated result.
    Pow,
    /// The smaller; NaN when either is NaN.
    Min,
    /// The larger; NaN when either is NaN.
    Max,
    /// Angle of the point (b, a).
    Atan2,
    /// Logical and bitwise and.
    And,
    /// Logical and bitwise or.
    Or,
    /// Logical and bitwise exclusive or.
    Xor,
    /// Shift left; by the width or more gives 0.
    Shl,
    /// Shift right, arithmetic for signed types; by the width or more as if by width - 1 and 1.
    Shr,
    /// Comparisons give `bool`; false when either is NaN (but `!=` is true).
    Lt,
    /// `a <= b`
    Le,
    /// `a > b`
    Gt,
    /// `a >= b`
    Ge,
    /// `a == b`
    Eq,
    /// `a != b`
    Ne,

    // Three operands.
    /// `cond ? a : b`
    Select,
    /// `a * b + c` with one rounding.
    Fma,
}
