//! The data types, as one table.
//!
//! Adding one: a variant of [`DType`] and its row in [`DType::TABLE`]; the exhaustive matches in
//! the crates above then name every place that must learn it.

use std::fmt;
use std::str::FromStr;

/// What kind of arithmetic a data type has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// IEEE-like floating point.
    Float,
    /// Two's complement integers, wrapping.
    Signed,
    /// Unsigned integers, wrapping.
    Unsigned,
    /// `true` or `false`, one byte in memory (0 or 1).
    Bool,
}

/// The type of one tensor element. Prints and parses as its short name (`bf16`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the documentation; widths are in TABLE")]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    /// 4 exponent bits, 3 mantissa bits, no infinities (OCP FP8, "E4M3FN").
    F8E4M3,
    /// 5 exponent bits, 2 mantissa bits, with infinities (OCP FP8).
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    /// Two per byte, low nibble first.
    I4,
    U64,
    U32,
    U16,
    U8,
    /// Two per byte, low nibble first.
    U4,
    Bool,
}

impl DType {
    /// Every data type with its name, class and width in bits.
    #[rustfmt::skip]
    pub const TABLE: [(DType, &'static str, Class, u32); 17] = [
        (DType::F64,    "f64",    Class::Float,    64),
        (DType::F32,    "f32",    Class::Float,    32),
        (DType::F16,    "f16",    Class::Float,    16),
        (DType::BF16,   "bf16",   Class::Float,    16),
        (DType::F8E4M3, "f8e4m3", Class::Float,     8),
        (DType::F8E5M2, "f8e5m2", Class::Float,     8),
        (DType::I64,    "i64",    Class::Signed,   64),
        (DType::I32,    "i32",    Class::Signed,   32),
        (DType::I16,    "i16",    Class::Signed,   16),
        (DType::I8,     "i8",     Class::Signed,    8),
        (DType::I4,     "i4",     Class::Signed,    4),
        (DType::U64,    "u64",    Class::Unsigned, 64),
        (DType::U32,    "u32",    Class::Unsigned, 32),
        (DType::U16,    "u16",    Class::Unsigned, 16),
        (DType::U8,     "u8",     Class::Unsigned,  8),
        (DType::U4,     "u4",     Class::Unsigned,  4),
        (DType::Bool,   "bool",   Class::Bool,      8),
    ];

    fn row(self) -> &'static (DType, &'static str, Class, u32) {
        &Self::TABLE[self as usize]
    }

    /// The short name, as in every text format: `f32`, `bf16`, `i64`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The kind of arithmetic.
    pub fn class(self) -> Class {
        self.row().2
    }

    /// Width of one element in bits (`bool` occupies 8).
    pub fn bits(self) -> u32 {
        self.row().3
    }

    /// Bytes that `n` elements occupy; the two 4-bit types round up to whole bytes.
    /// `None` when the count overflows.
    pub fn bytes_for(self, n: usize) -> Option<usize> {
        match self.bits() {
            4 => Some(n / 2 + n % 2),
            bits => n.checked_mul(bits as usize / 8),
        }
    }

    /// Whole bytes of one element; the 4-bit types answer 1, the unpacked size.
    pub fn size(self) -> usize {
        (self.bits() as usize).div_ceil(8)
    }

    /// True for every floating-point type.
    pub fn is_float(self) -> bool {
        self.class() == Class::Float
    }

    /// True for signed and unsigned integers, not for `bool`.
    pub fn is_int(self) -> bool {
        matches!(self.class(), Class::Signed | Class::Unsigned)
    }

    /// True for signed integers.
    pub fn is_signed_int(self) -> bool {
        self.class() == Class::Signed
    }

    /// The type in which arithmetic on this one is carried out before the result is rounded back:
    /// the 8- and 16-bit floats compute in `f32`, 4-bit integers in 8 bits, all else in itself.
    pub fn compute(self) -> DType {
        match self {
            DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => DType::F32,
            DType::I4 => DType::I8,
            DType::U4 => DType::U8,
            other => other,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        Self::TABLE.iter().find(|row| row.1 == s).map(|row| row.0).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_variant_order_and_names_round_trip() {
        for (i, row) in DType::TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(row.1.parse::<DType>(), Ok(row.0));
        }
    }

    #[test]
    fn nibbles_round_up() {
        assert_eq!(DType::I4.bytes_for(3), Some(2));
        assert_eq!(DType::F32.bytes_for(usize::MAX), None);
    }
}
