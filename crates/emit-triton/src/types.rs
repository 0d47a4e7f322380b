//! Data types and constants as Triton spells them, and what of a tile Triton sees.
//!
//! Tiles are held in their own element type (`bf16` as `tl.bfloat16`); arithmetic on narrow floats
//! is carried out in `tl.float32` and rounded to the type, as everywhere.
//!
//! Triton wants extents that are powers of two. A tile's axes of extent 1 are left out, so a
//! `f32[1,BQ,64]` is a `(BQ, 64)` of Triton and a reshape that only moves ones is free. Another
//! extent is rounded up; what lies in the added part is arbitrary, and whoever would see it
//! (a store, a reduction, a product) masks it.

use tilewright_base::{Class, DType};
use tilewright_expr::Value;
use tilewright_tile::ReduceKind;

/// Triton's element type; none for the 4-bit integers.
pub(crate) fn element(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F64 => "tl.float64",
        DType::F32 => "tl.float32",
        DType::F16 => "tl.float16",
        DType::BF16 => "tl.bfloat16",
        DType::F8E4M3 => "tl.float8e4nv",
        DType::F8E5M2 => "tl.float8e5",
        DType::I64 => "tl.int64",
        DType::I32 => "tl.int32",
        DType::I16 => "tl.int16",
        DType::I8 => "tl.int8",
        DType::U64 => "tl.uint64",
        DType::U32 => "tl.uint32",
        DType::U16 => "tl.uint16",
        DType::U8 => "tl.uint8",
        DType::Bool => "tl.int1",
        DType::I4 | DType::U4 => return None,
    })
}

/// What PyTorch calls it.
pub(crate) fn torch(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F8E4M3 => "float8_e4m3fn",
        DType::F8E5M2 => "float8_e5m2",
        DType::I64 => "int64",
        DType::I32 => "int32",
        DType::I16 => "int16",
        DType::I8 | DType::I4 => "int8",
        DType::U64 => "uint64",
        DType::U32 => "uint32",
        DType::U16 => "uint16",
        DType::U8 | DType::U4 => "uint8",
        DType::Bool => "bool",
    }
}

/// A float that computes in f32.
pub(crate) fn narrow(dtype: DType) -> bool {
    dtype.is_float() && dtype.compute() != dtype
}

/// A constant of a type.
pub(crate) fn constant(value: Value, dtype: DType) -> String {
    match value {
        Value::Int(v) if dtype == DType::U64 => (v as u64).to_string(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) if v.is_nan() => "float(\"nan\")".to_string(),
        Value::Float(v) if v.is_infinite() => {
            format!("float(\"{}inf\")", if v < 0.0 { "-" } else { "" })
        }
        Value::Float(v) => format!("{v:?}"),
    }
}

/// What a reduction of nothing gives.
pub(crate) fn identity(kind: ReduceKind, dtype: DType) -> Value {
    let bits = dtype.bits();
    let (low, high) = match dtype.class() {
        Class::Signed => (i64::MIN >> (64 - bits), i64::MAX >> (64 - bits)),
        Class::Bool => (0, 1),
        // All ones; `constant` prints the bits without a sign.
        _ if bits == 64 => (0, -1),
        _ => (0, (1i64 << bits) - 1),
    };
    let float = dtype.is_float();
    match kind {
        ReduceKind::Sum if float => Value::Float(0.0),
        ReduceKind::Prod if float => Value::Float(1.0),
        ReduceKind::Max if float => Value::Float(f64::NEG_INFINITY),
        ReduceKind::Min if float => Value::Float(f64::INFINITY),
        ReduceKind::Sum => Value::Int(0),
        ReduceKind::Prod => Value::Int(1),
        ReduceKind::Max => Value::Int(low),
        ReduceKind::Min => Value::Int(high),
    }
}

/// One axis of a tile as Triton sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    /// Which axis of the tile.
    pub(crate) logical: usize,
    /// Its extent.
    pub(crate) extent: i64,
    /// The next power of two.
    pub(crate) padded: i64,
    /// The power of two as it prints: `BM`, or a number.
    pub(crate) text: String,
}

impl Axis {
    /// Whether elements were added.
    pub(crate) fn is_padded(&self) -> bool {
        self.extent != self.padded
    }
}

/// A shape as a Python tuple.
pub(crate) fn tuple<'a>(axes: impl IntoIterator<Item = &'a Axis>) -> String {
    let texts: Vec<&str> = axes.into_iter().map(|a| a.text.as_str()).collect();
    match texts.as_slice() {
        [one] => format!("({one},)"),
        all => format!("({})", all.join(", ")),
    }
}

/// `text`, a value with these axes of a result of rank `rank`, with ones for the others.
pub(crate) fn across(text: &str, axes: &[usize], rank: usize) -> String {
    if axes.is_empty() || axes.len() == rank {
        return text.to_string();
    }
    let marks: Vec<&str> =
        (0..rank).map(|i| if axes.contains(&i) { ":" } else { "None" }).collect();
    format!("{text}[{}]", marks.join(", "))
}
