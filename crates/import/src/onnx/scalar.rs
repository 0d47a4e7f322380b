//! Scalar functions written as Rust closures: `func(&[F32], |p| p[0] * p[0].sigmoid())`.
//!
//! A thin, typed notation over [`FuncBuilder`]. A number stands for a constant of the other
//! operand's type. Operands of different types panic in the builder, so converters check types
//! first (`Cx::map` and `Cx::fmap` do).

use std::cell::RefCell;
use std::ops::{Add, Div, Mul, Neg, Sub};
use tilewright_base::DType;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op, Value};

/// What a [`Scalar`] is made of.
pub(crate) enum Arg {
    /// A parameter of this type.
    Param(DType),
    /// A constant put in place of a parameter.
    Const(DType, Value),
}

/// A node of the function being built.
#[derive(Clone, Copy)]
pub(crate) struct Scalar<'a> {
    builder: &'a RefCell<FuncBuilder>,
    id: ExprId,
}

/// Builds a function. `compute` converts every argument to one type first, and the result to `out`.
pub(crate) fn build(
    args: &[Arg],
    compute: Option<DType>,
    out: Option<DType>,
    body: impl for<'a> FnOnce(&[Scalar<'a>]) -> Scalar<'a>,
) -> Func {
    let builder = RefCell::new(FuncBuilder::new());
    let result = {
        let params: Vec<Scalar<'_>> = args
            .iter()
            .map(|arg| {
                let id = match arg {
                    Arg::Param(dtype) => builder.borrow_mut().param("x", *dtype),
                    Arg::Const(dtype, value) => builder.borrow_mut().value(*value, *dtype),
                };
                let x = Scalar { builder: &builder, id };
                compute.map_or(x, |dtype| x.cast(dtype))
            })
            .collect();
        let result = body(&params);
        out.map_or(result, |dtype| result.cast(dtype)).id
    };
    builder.into_inner().finish(result)
}

/// A second operand: another node, or a number of the first one's type.
pub(crate) trait Operand<'a> {
    /// The node.
    fn node(self, like: Scalar<'a>) -> Scalar<'a>;
}
impl<'a> Operand<'a> for Scalar<'a> {
    fn node(self, _: Scalar<'a>) -> Scalar<'a> {
        self
    }
}
impl<'a> Operand<'a> for f64 {
    fn node(self, like: Scalar<'a>) -> Scalar<'a> {
        like.number(self)
    }
}

macro_rules! unary {
    ($($name:ident = $op:ident),* $(,)?) => { $(
        pub(crate) fn $name(self) -> Scalar<'a> { self.un(Op::$op) }
    )* };
}
macro_rules! binary {
    ($($name:ident = $op:ident),* $(,)?) => { $(
        pub(crate) fn $name(self, other: impl Operand<'a>) -> Scalar<'a> { self.bin(Op::$op, other) }
    )* };
}

impl<'a> Scalar<'a> {
    /// The type of this node.
    pub(crate) fn dtype(self) -> DType {
        self.builder.borrow().dtype_of(self.id)
    }

    /// A constant of this node's type.
    pub(crate) fn number(self, value: f64) -> Scalar<'a> {
        let dtype = self.dtype();
        Scalar { id: self.builder.borrow_mut().constant(value, dtype), ..self }
    }

    /// An integer constant of this node's type.
    pub(crate) fn integer(self, value: i64) -> Scalar<'a> {
        let dtype = self.dtype();
        Scalar { id: self.builder.borrow_mut().constant_int(value, dtype), ..self }
    }

    pub(crate) fn un(self, op: Op) -> Scalar<'a> {
        Scalar { id: self.builder.borrow_mut().op(op, &[self.id]), ..self }
    }

    pub(crate) fn bin(self, op: Op, other: impl Operand<'a>) -> Scalar<'a> {
        let other = other.node(self);
        Scalar { id: self.builder.borrow_mut().op(op, &[self.id, other.id]), ..self }
    }

    /// Conversion; see [`Op::Cast`].
    pub(crate) fn cast(self, to: DType) -> Scalar<'a> {
        Scalar { id: self.builder.borrow_mut().cast(self.id, to), ..self }
    }

    /// `self ? yes : no`, for a `bool` node.
    pub(crate) fn select(self, yes: Scalar<'a>, no: impl Operand<'a>) -> Scalar<'a> {
        let no = no.node(yes);
        Scalar { id: self.builder.borrow_mut().op(Op::Select, &[self.id, yes.id, no.id]), ..self }
    }

    unary! {
        abs = Abs, floor = Floor, round = Round, trunc = Trunc, sqrt = Sqrt, exp = Exp, expm1 = Expm1,
        log = Log, log1p = Log1p, cos = Cos, tanh = Tanh, erf = Erf, sigmoid = Sigmoid,
        is_nan = IsNan, is_inf = IsInf,
    }
    binary! {
        min = Min, max = Max, pow = Pow, modulo = Mod, and = And, or = Or,
        lt = Lt, le = Le, gt = Gt, ge = Ge, eq = Eq, ne = Ne,
    }

    /// Between two bounds.
    pub(crate) fn clamp(self, lo: f64, hi: f64) -> Scalar<'a> {
        self.max(lo).min(hi)
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident) => {
        impl<'a, T: Operand<'a>> $trait<T> for Scalar<'a> {
            type Output = Scalar<'a>;
            fn $method(self, other: T) -> Scalar<'a> {
                self.bin(Op::$trait, other)
            }
        }
    };
}
operator!(Add, add);
operator!(Sub, sub);
operator!(Mul, mul);
operator!(Div, div);

impl<'a> Neg for Scalar<'a> {
    type Output = Scalar<'a>;
    fn neg(self) -> Scalar<'a> {
        self.un(Op::Neg)
    }
}
