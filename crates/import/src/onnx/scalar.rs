//! Scalar functions written as Rust closures: `build(&[Param(F32)], .., |p| p[0] * p[0].sigmoid())`.
//!
//! A thin notation over [`FuncBuilder`]. A number stands for a constant of the other operand's
//! type. Types come from models, so a mixture of types, or an operation on a type that does not
//! have it, is no panic: the first such mistake is kept and [`build`] returns it.

use std::cell::RefCell;
use std::ops::{Add, Div, Mul, Neg, Sub};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{ExprId, Func, FuncBuilder, Op, Value};

/// What a [`Scalar`] is made of.
pub(crate) enum Arg {
    /// A parameter of this type.
    Param(DType),
    /// A constant put in place of a parameter.
    Const(DType, Value),
}

/// The function so far, and the first mistake.
#[derive(Default)]
struct State {
    builder: FuncBuilder,
    mistake: Option<String>,
}

/// A node of the function being built.
#[derive(Clone, Copy)]
pub(crate) struct Scalar<'a> {
    state: &'a RefCell<State>,
    id: ExprId,
}

/// Builds a function. `compute` converts every argument to one type first, and the result to `out`.
pub(crate) fn build(
    args: &[Arg],
    compute: Option<DType>,
    out: Option<DType>,
    body: impl for<'a> FnOnce(&[Scalar<'a>]) -> Scalar<'a>,
) -> Result<Func> {
    let state = RefCell::new(State::default());
    let result = {
        let params: Vec<Scalar<'_>> = args
            .iter()
            .map(|arg| {
                let id = match arg {
                    Arg::Param(dtype) => state.borrow_mut().builder.param("x", *dtype),
                    Arg::Const(dtype, value) => state.borrow_mut().builder.value(*value, *dtype),
                };
                let x = Scalar { state: &state, id };
                compute.map_or(x, |dtype| x.cast(dtype))
            })
            .collect();
        let result = body(&params);
        out.map_or(result, |dtype| result.cast(dtype)).id
    };
    let State { builder, mistake } = state.into_inner();
    match mistake {
        None => Ok(builder.finish(result)),
        Some(mistake) => Err(Error::user(mistake)),
    }
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
        self.state.borrow().builder.dtype_of(self.id)
    }

    /// A constant of this node's type.
    pub(crate) fn number(self, value: f64) -> Scalar<'a> {
        let dtype = self.dtype();
        Scalar { id: self.state.borrow_mut().builder.constant(value, dtype), ..self }
    }

    /// An integer constant of this node's type.
    pub(crate) fn integer(self, value: i64) -> Scalar<'a> {
        let dtype = self.dtype();
        Scalar { id: self.state.borrow_mut().builder.constant_int(value, dtype), ..self }
    }

    /// Adds an operation when the types allow it; otherwise notes the mistake.
    fn emit(self, op: Op, args: &[Scalar<'a>]) -> Scalar<'a> {
        let operands = if op == Op::Select { &args[1..] } else { args };
        let dtype = operands[0].dtype();
        let mistake = if op == Op::Select && args[0].dtype() != DType::Bool {
            Some(format!("a condition of type {}", args[0].dtype()))
        } else if let Some(other) = operands.iter().find(|a| a.dtype() != dtype) {
            Some(format!("operands have different types {dtype} and {}", other.dtype()))
        } else if !op.accepts(dtype.class()) {
            Some(format!("an operand of type {dtype} where it is not defined"))
        } else {
            None
        };
        let mut state = self.state.borrow_mut();
        if let Some(mistake) = mistake {
            state.mistake.get_or_insert(mistake);
            return self;
        }
        let ids: Vec<ExprId> = args.iter().map(|a| a.id).collect();
        Scalar { id: state.builder.op(op, &ids), ..self }
    }

    pub(crate) fn un(self, op: Op) -> Scalar<'a> {
        self.emit(op, &[self])
    }

    pub(crate) fn bin(self, op: Op, other: impl Operand<'a>) -> Scalar<'a> {
        let other = other.node(self);
        self.emit(op, &[self, other])
    }

    /// Conversion; see [`Op::Cast`].
    pub(crate) fn cast(self, to: DType) -> Scalar<'a> {
        Scalar { id: self.state.borrow_mut().builder.cast(self.id, to), ..self }
    }

    /// `self ? yes : no`, for a `bool` node.
    pub(crate) fn select(self, yes: Scalar<'a>, no: impl Operand<'a>) -> Scalar<'a> {
        let no = no.node(yes);
        self.emit(Op::Select, &[self, yes, no])
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
