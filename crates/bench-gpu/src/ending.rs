//! What follows the sums: the epilogues that are tested.
//!
//! To add one: a variant of [`Ending`], its line in [`ENDINGS`], its function.

use crate::case::Numbers;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{CompileOptions, ExprId, Func, FuncBuilder, Op, compile};
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
    /// A formula of the user.
    Formula(&'static Formula),
}

/// A formula of what an ending may read, by the names of [`NAMES`], in f32. A factor for all sums of bytes is its own
/// affair.
#[derive(Debug)]
pub struct Formula {
    text: String,
    func: Func,
}

impl PartialEq for Formula {
    fn eq(&self, other: &Formula) -> bool {
        self.text == other.text
    }
}

impl Eq for Formula {}

/// What a formula may read: the sum, the sum of the second product of a pair, vectors along the columns (of the second
/// product, too) and along the rows, and a matrix of the result's type.
pub const NAMES: [&str; 6] = ["sum", "sum2", "cols", "cols2", "rows", "residual"];

impl Formula {
    fn reads(&self, name: &str) -> bool {
        self.func.params().iter().any(|p| p.name.as_ref() == name)
    }

    fn is_pair(&self) -> bool {
        self.reads("sum2") || self.reads("cols2")
    }

    fn epilogue(&self, sum: DType, to: DType) -> Epilogue {
        let there = |name: &str, dtype: DType| self.reads(name).then_some(dtype);
        let pair = self.is_pair();
        // Of a pair both products have a vector, or none has.
        let vector = self.reads("cols") || self.reads("cols2");
        let cols = vector.then_some(DType::F32);
        let (rows, residual) = (there("rows", DType::F32), there("residual", to));
        let types = [Some(sum), pair.then_some(sum), cols, cols.filter(|_| pair), rows, residual];
        let mut f = FuncBuilder::new();
        let mut given = Vec::new();
        for (name, dtype) in NAMES.iter().zip(types) {
            let Some(dtype) = dtype else { continue };
            given.push((*name, f.param(name, dtype)));
        }
        let given: Vec<(&str, ExprId)> =
            given.into_iter().map(|(name, x)| (name, f.cast(x, DType::F32))).collect();
        let find = |p: &str| given.iter().find(|(name, _)| *name == p).map(|(_, x)| *x);
        let args: Vec<ExprId> = self.func.params().iter().filter_map(|p| find(&p.name)).collect();
        let x = f.inline(&self.func, &args);
        let x = f.cast(x, to);
        let pair = if pair { Pair::Right } else { Pair::None };
        Epilogue { func: f.finish(x), col_vector: cols, row_vector: rows, residual, pair }
    }
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

    /// An ending by its name, or as a formula of what stands in [`NAMES`]: `relu(sum + cols) + residual`. A formula is
    /// kept as long as the program runs.
    ///
    /// # Errors
    /// The user's: a formula that cannot be read, or that reads something else.
    pub fn parse(text: &str) -> Result<Ending> {
        if let Some(named) = Ending::named(text) {
            return Ok(named);
        }
        let hint = || {
            let known: Vec<&str> = ENDINGS.iter().map(|e| e.name()).collect();
            format!("known: {}; or a formula of {}", known.join(", "), NAMES.join(", "))
        };
        let options = CompileOptions { default: DType::F32, ..CompileOptions::default() };
        let func = compile(text, &options).map_err(|e| e.with_hint(hint()))?.func;
        if let Some(p) = func.params().iter().find(|p| !NAMES.contains(&p.name.as_ref())) {
            let message = format!("an ending does not know `{}`", p.name);
            return Err(Error::user(message).with_hint(hint()));
        }
        if !func.params().iter().any(|p| p.name.as_ref() == "sum") {
            return Err(Error::user("an ending that does not read `sum`").with_hint(hint()));
        }
        Ok(Ending::Formula(Box::leak(Box::new(Formula { text: text.to_owned(), func }))))
    }

    /// The epilogue. Vectors are f32, a residual has the result's type.
    pub fn epilogue(self, numbers: &Numbers) -> Epilogue {
        let sum = if numbers.operand.is_float() { DType::F32 } else { DType::I32 };
        let to = self.result(numbers);
        match self {
            Ending::Plain => return Epilogue::cast(sum, to),
            Ending::Formula(formula) => return formula.epilogue(sum, to),
            _ => {}
        }
        let f32s = Some(DType::F32);
        let (cols, rows, residual) = match self {
            Ending::Plain | Ending::Formula(_) | Ending::TensorScale | Ending::SwiGlu => {
                (None, None, None)
            }
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
            Ending::Plain | Ending::Formula(_) => x,
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
        match self {
            Ending::Formula(formula) => formula.is_pair(),
            _ => matches!(self, Ending::SwiGlu | Ending::GeGluBias),
        }
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
            Ending::Formula(formula) => &formula.text,
        }
    }
}

/// Relative error of rounding to a type: no implementation can promise less.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        // Eight digits.
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-12 + 1),
        DType::F32 => 2f64.powi(-24),
        DType::F8E4M3 => 2f64.powi(-4),
        DType::F8E5M2 => 2f64.powi(-3),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_formula_is_the_ending_of_the_same_name() {
        let Some(bf16) = Numbers::named("bf16") else { panic!("there is bf16") };
        let formula = Ending::parse("max(sum + cols, 0) + residual").unwrap().epilogue(bf16);
        let named = Ending::BiasReluResidual.epilogue(bf16);
        let reads = |e: &Epilogue| (e.col_vector, e.row_vector, e.residual, e.pair);
        assert_eq!(reads(&formula), reads(&named));
        for args in [[1.5, -2.0, 0.25], [1.5, 2.0, 0.25], [-3.0, 1.0, 7.0]] {
            assert_eq!(formula.func.eval_f64(&args), named.func.eval_f64(&args));
        }
        let pair = Ending::parse("sum * sum2 + cols2").unwrap();
        assert!(pair.is_pair());
        assert_eq!(pair.epilogue(bf16).func.eval_f64(&[2.0, 3.0, 9.0, 1.0]), 7.0);
        assert_eq!(Ending::parse("swiglu").unwrap(), Ending::SwiGlu);
        for wrong in ["sum + bias", "cols + 1", "sum +"] {
            assert_eq!(
                Ending::parse(wrong).unwrap_err().kind(),
                tilewright_base::Kind::User,
                "{wrong}"
            );
        }
    }
}
