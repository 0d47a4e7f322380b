//! The table of operations: one row per [`Op`], in the order of the enum.

use crate::op::Op;
use crate::parse::level;

/// One operation: its name and spelling.
#[derive(Clone, Copy, Debug)]
pub struct OpRow {
    /// Which operation.
    pub op: Op,
    /// Its name in calls.
    pub name: &'static str,
    /// Its operator, if it has one.
    pub symbol: Option<&'static str>,
}

const fn row(op: Op, name: &'static str, symbol: &'static str) -> OpRow {
    OpRow { op, name, symbol: if symbol.is_empty() { None } else { Some(symbol) } }
}

/// Every operation.
#[rustfmt::skip]
pub const OPS: [OpRow; 56] = [
    row(Op::Neg, "neg", "-"),
    row(Op::Abs, "abs", ""),
    row(Op::Sign, "sign", ""),
    row(Op::Floor, "floor", ""),
    row(Op::Ceil, "ceil", ""),
    row(Op::Round, "round", ""),
    row(Op::Trunc, "trunc", ""),
    row(Op::Sqrt, "sqrt", ""),
    row(Op::Rsqrt, "rsqrt", ""),
    row(Op::Exp, "exp", ""),
    row(Op::Exp2, "exp2", ""),
    row(Op::Expm1, "expm1", ""),
    row(Op::Log, "log", ""),
    row(Op::Log2, "log2", ""),
    row(Op::Log1p, "log1p", ""),
    row(Op::Sin, "sin", ""),
    row(Op::Cos, "cos", ""),
    row(Op::Tan, "tan", ""),
    row(Op::Asin, "asin", ""),
    row(Op::Acos, "acos", ""),
    row(Op::Atan, "atan", ""),
    row(Op::Sinh, "sinh", ""),
    row(Op::Cosh, "cosh", ""),
    row(Op::Tanh, "tanh", ""),
    row(Op::Asinh, "asinh", ""),
    row(Op::Acosh, "acosh", ""),
    row(Op::Atanh, "atanh", ""),
    row(Op::Erf, "erf", ""),
    row(Op::Sigmoid, "sigmoid", ""),
    row(Op::IsNan, "isnan", ""),
    row(Op::IsInf, "isinf", ""),
    row(Op::Not, "not", "!"),
    row(Op::Cast, "cast", ""),
    row(Op::Add, "add", "+"),
    row(Op::Sub, "sub", "-"),
    row(Op::Mul, "mul", "*"),
    row(Op::Div, "div", "/"),
    row(Op::Rem, "rem", "%"),
    row(Op::Mod, "mod", ""),
    row(Op::Pow, "pow", "**"),
    row(Op::Min, "min", ""),
    row(Op::Max, "max", ""),
    row(Op::Atan2, "atan2", ""),
    row(Op::And, "and", "&"),
    row(Op::Or, "or", "|"),
    row(Op::Xor, "xor", "^"),
    row(Op::Shl, "shl", "<<"),
    row(Op::Shr, "shr", ">>"),
    row(Op::Lt, "lt", "<"),
    row(Op::Le, "le", "<="),
    row(Op::Gt, "gt", ">"),
    row(Op::Ge, "ge", ">="),
    row(Op::Eq, "eq", "=="),
    row(Op::Ne, "ne", "!="),
    row(Op::Select, "select", ""),
    row(Op::Fma, "fma", ""),
];

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

    #[test]
    fn rows_are_in_the_order_of_the_enum() {
        for (i, row) in OPS.iter().enumerate() {
            assert_eq!(row.op as usize, i, "{}", row.name);
            assert_eq!(Op::from_name(row.name), Some(row.op));
        }
        assert_eq!(Op::Fma as usize + 1, OPS.len());
    }
}
