//! What follows the sums: the epilogues that are tested.
//!
//! To add one: a variant of [`Ending`], its line in [`ENDINGS`], its function.

use crate::case::Numbers;
use tilewright_base::DType;
use tilewright_expr::{ExprId, FuncBuilder, Op};
use tilewright_kernels::gemm::{Epilogue, Pair};

/// From sums to results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The conversion to the result's type.
    Plain,
    /// `gelu(sum + bias)`, by the error function.
    BiasGelu,
    /// `relu(sum + bias) + residual`
    BiasReluResidual,
    /// `silu(sum + bias)`
    BiasSilu,
    /// One factor for all: `sum / 64`.
    TensorScale,
    /// `sum * row * column`: scales of rows (tokens) and columns (channels). Integers are dequantised.
    Scales,
    /// `sum * row * column + residual`
    ScalesResidual,
    /// Rounded to 8-bit integers: `round(sum * row / 4)`, clamped.
    ToI8,
    /// To 8-bit floats: `sum * column / 8`.
    ToF8,
    /// `silu(sum) * second sum`: a pair.
    SwiGlu,
    /// `gelu(sum + column) * (second sum + second column)`, by the error function: a pair.
    GeGluBias,
}

/// All but [`Ending::Plain`].
pub const ENDINGS: &[Ending] = &[
    Ending::BiasGelu,
    Ending::BiasReluResidual,
    Ending::BiasSilu,
    Ending::TensorScale,
    Ending::Scales,
    Ending::ScalesResidual,
    Ending::ToI8,
    Ending::ToF8,
    Ending::SwiGlu,
    Ending::GeGluBias,
];

impl Ending {
    /// Type of the result. Integers leave as bf16, unless they stay sums.
    pub fn result(self, numbers: &Numbers) -> DType {
        match self {
            Ending::Plain => numbers.result,
            Ending::ToI8 => DType::I8,
            Ending::ToF8 => DType::F8E4M3,
            _ if numbers.result.is_float() => numbers.result,
            _ => DType::BF16,
        }
    }

    /// The epilogue. Vectors are f32, a residual has the result's type.
    pub fn epilogue(self, numbers: &Numbers) -> Epilogue {
        let sum = if numbers.operand.is_float() { DType::F32 } else { DType::I32 };
        let to = self.result(numbers);
        if self == Ending::Plain {
            return Epilogue::cast(sum, to);
        }
        let f32s = Some(DType::F32);
        let (cols, rows, residual) = match self {
            Ending::Plain | Ending::TensorScale | Ending::SwiGlu => (None, None, None),
            Ending::BiasGelu | Ending::BiasSilu | Ending::ToF8 | Ending::GeGluBias => {
                (f32s, None, None)
            }
            Ending::BiasReluResidual => (f32s, None, Some(to)),
            Ending::Scales => (f32s, f32s, None),
            Ending::ScalesResidual => (f32s, f32s, Some(to)),
            Ending::ToI8 => (None, f32s, None),
        };
        let pair = if self.is_pair() { Pair::Right } else { Pair::None };
        let mut f = FuncBuilder::new();
        let x = f.param("sum", sum);
        let second = self.is_pair().then(|| f.param("sum2", sum));
        let cols_in = cols.map(|t| f.param("cols", t));
        let second_cols = cols.filter(|_| self.is_pair()).map(|t| f.param("cols2", t));
        let rows_in = rows.map(|t| f.param("rows", t));
        let residual_in = residual.map(|t| f.param("residual", t));
        let start = |f: &mut FuncBuilder, x: ExprId| {
            let x = f.cast(x, DType::F32);
            if sum != DType::I32 {
                return x;
            }
            // Products of bytes are large.
            let down = f.constant(1.0 / 16384.0, DType::F32);
            f.op(Op::Mul, &[x, down])
        };
        let x = start(&mut f, x);
        let second = second.map(|y| start(&mut f, y));
        let scale = |f: &mut FuncBuilder, x: ExprId, by: f64| {
            let by = f.constant(by, DType::F32);
            f.op(Op::Mul, &[x, by])
        };
        let with = |f: &mut FuncBuilder, op: Op, x: ExprId, y: Option<ExprId>| {
            y.map_or(x, |y| f.op(op, &[x, y]))
        };
        let x = match self {
            Ending::Plain => x,
            Ending::BiasGelu | Ending::GeGluBias => {
                let x = with(&mut f, Op::Add, x, cols_in);
                let inner = scale(&mut f, x, std::f64::consts::FRAC_1_SQRT_2);
                let e = f.op(Op::Erf, &[inner]);
                let one = f.constant(1.0, DType::F32);
                let e = f.op(Op::Add, &[e, one]);
                let half = scale(&mut f, x, 0.5);
                f.op(Op::Mul, &[half, e])
            }
            Ending::BiasReluResidual => {
                let x = with(&mut f, Op::Add, x, cols_in);
                let zero = f.constant(0.0, DType::F32);
                f.op(Op::Max, &[x, zero])
            }
            Ending::BiasSilu | Ending::SwiGlu => {
                let x = with(&mut f, Op::Add, x, cols_in);
                let s = f.op(Op::Sigmoid, &[x]);
                f.op(Op::Mul, &[x, s])
            }
            Ending::TensorScale => scale(&mut f, x, 1.0 / 64.0),
            Ending::Scales | Ending::ScalesResidual => {
                let x = with(&mut f, Op::Mul, x, rows_in);
                with(&mut f, Op::Mul, x, cols_in)
            }
            Ending::ToI8 => {
                let x = with(&mut f, Op::Mul, x, rows_in);
                let x = scale(&mut f, x, 0.25);
                let x = f.op(Op::Round, &[x]);
                let (low, high) = (f.constant(-128.0, DType::F32), f.constant(127.0, DType::F32));
                let x = f.op(Op::Max, &[x, low]);
                f.op(Op::Min, &[x, high])
            }
            Ending::ToF8 => {
                let x = with(&mut f, Op::Mul, x, cols_in);
                let x = scale(&mut f, x, 0.125);
                // The largest number; what is beyond has none of its own.
                let (low, high) = (f.constant(-448.0, DType::F32), f.constant(448.0, DType::F32));
                let x = f.op(Op::Max, &[x, low]);
                f.op(Op::Min, &[x, high])
            }
        };
        let x = match second {
            Some(y) => {
                let y = with(&mut f, Op::Add, y, second_cols);
                f.op(Op::Mul, &[x, y])
            }
            None => x,
        };
        let x = match residual_in {
            Some(r) => {
                let r = f.cast(r, DType::F32);
                f.op(Op::Add, &[x, r])
            }
            None => x,
        };
        let x = f.cast(x, to);
        Epilogue { func: f.finish(x), col_vector: cols, row_vector: rows, residual, pair }
    }

    /// Whether it reads the sums of two products of one left operand.
    pub fn is_pair(self) -> bool {
        matches!(self, Ending::SwiGlu | Ending::GeGluBias)
    }

    /// The one of this name; none for the plain one.
    pub fn named(name: &str) -> Option<Ending> {
        ENDINGS.iter().copied().find(|e| e.name() == name)
    }

    /// In words, for reports.
    pub fn name(self) -> &'static str {
        match self {
            Ending::Plain => "plain",
            Ending::BiasGelu => "bias-gelu",
            Ending::BiasReluResidual => "bias-relu-residual",
            Ending::BiasSilu => "bias-silu",
            Ending::TensorScale => "tensor-scale",
            Ending::Scales => "scales",
            Ending::ScalesResidual => "scales-residual",
            Ending::ToI8 => "to-i8",
            Ending::ToF8 => "to-f8",
            Ending::SwiGlu => "swiglu",
            Ending::GeGluBias => "geglu-bias",
        }
    }
}

/// Relative error of rounding to a type: no implementation can promise less.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-9),
        DType::F16 => 2f64.powi(-12 + 1),
        DType::F32 => 2f64.powi(-24),
        DType::F8E4M3 => 2f64.powi(-4),
        DType::F8E5M2 => 2f64.powi(-3),
        _ => 0.0,
    }
}
