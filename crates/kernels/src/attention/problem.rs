//! [`Problem`]: one attention with its sizes.

use crate::attention::program::{AttentionSpec, Causal};
use crate::gemm::Precision;
use tilewright_base::{DType, Error, Result};

/// Distances between neighbours along three axes of `[batch, head, row, depth]`, in elements; neighbours
/// along the depth are neighbours in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// Between batches.
    pub batch: i64,
    /// Between heads.
    pub head: i64,
    /// Between rows.
    pub row: i64,
}

impl Strides {
    /// Of a dense `[batch, head, row, depth]`.
    pub fn heads_first(heads: i64, rows: i64, depth: i64) -> Strides {
        Strides { batch: heads * rows * depth, head: rows * depth, row: depth }
    }

    /// Of a dense `[batch, row, head, depth]`.
    pub fn rows_first(heads: i64, rows: i64, depth: i64) -> Strides {
        Strides { batch: heads * rows * depth, head: depth, row: heads * depth }
    }

    pub(crate) fn all(&self) -> [i64; 3] {
        [self.batch, self.head, self.row]
    }
}

/// What a mask does to a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MaskKind {
    /// Is added, after the scale.
    Add,
    /// Hides the score where it is 0 (false).
    Keep,
}

/// A mask `[batch, head, row, key]`; keys are neighbours in memory, strides of 0 repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Element type: a float for [`MaskKind::Add`], `bool` or `u8` for [`MaskKind::Keep`].
    pub dtype: DType,
    /// What it does.
    pub kind: MaskKind,
    /// In elements.
    pub strides: Strides,
    /// Alignment of its address, in bytes.
    pub align: i64,
}

/// `O[b,h,i,:] = sum over j of softmax_j(scale * Q[b,h,i,:] . K[b,g,j,:] + mask[b,h,i,j]) * V[b,g,j,:]` with
/// `g = h / (heads / kv_heads)`.
///
/// Strides count elements, alignments are those of the addresses, in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Number of sequences.
    pub batch: i64,
    /// Heads of the queries.
    pub heads: i64,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: i64,
    /// Queries per sequence.
    pub q_len: i64,
    /// Keys per sequence.
    pub kv_len: i64,
    /// Depth of queries and keys.
    pub depth: i64,
    /// Depth of values and results.
    pub width: i64,
    /// Type of queries, keys and values.
    pub dtype: DType,
    /// Type of the result.
    pub result: DType,
    /// How exactly f32 operands are multiplied: rounded to TF32, or else as three products of TF32 parts.
    pub precision: Precision,
    /// Factor of the scores.
    pub scale: f64,
    /// Query `i` sees keys up to `i + offset`: 0 when both begin together, `kv_len - q_len` when they
    /// end together (a cache before them). All keys without.
    pub causal: Option<i64>,
    /// What is known of scores beside.
    pub mask: Option<Mask>,
    /// Store the log-sum-exp of each row's scores too: f32, a dense `[batch, heads, q_len]`.
    pub lse: bool,
    /// A row that sees nothing is 0, not NaN.
    pub zeros: bool,
    /// Of the queries.
    pub q: Strides,
    /// Of the keys.
    pub k: Strides,
    /// Of the values.
    pub v: Strides,
    /// Of the result.
    pub o: Strides,
    /// Alignment of the addresses of `Q`, `K`, `V`, `O`, in bytes.
    pub align: [i64; 4],
}

impl Problem {
    /// Dense `[batch, head, row, depth]`, equal lengths and heads, scale `1/sqrt(depth)`, no mask.
    pub fn dense(batch: i64, heads: i64, len: i64, depth: i64, dtype: DType) -> Problem {
        let strides = Strides::heads_first(heads, len, depth);
        Problem {
            batch,
            heads,
            kv_heads: heads,
            q_len: len,
            kv_len: len,
            depth,
            width: depth,
            dtype,
            result: dtype,
            precision: Precision::F32,
            scale: 1.0 / (depth as f64).sqrt(),
            causal: None,
            mask: None,
            lse: false,
            zeros: false,
            q: strides,
            k: strides,
            v: strides,
            o: strides,
            align: [256; 4],
        }
    }

    /// What is computed, for every length.
    ///
    /// # Errors
    /// Unsupported: a causal offset below zero other than `kv_len - q_len`.
    pub fn spec(&self) -> Result<AttentionSpec> {
        let causal = match self.causal {
            None => Causal::No,
            Some(offset) if offset == self.kv_len - self.q_len => Causal::EndTogether,
            Some(offset) if offset >= 0 => Causal::Ahead,
            Some(offset) => {
                return Err(Error::unsupported(format!("causal attention with offset {offset}")));
            }
        };
        Ok(AttentionSpec {
            dtype: self.dtype,
            result: self.result,
            tf32: self.dtype == DType::F32 && self.precision == Precision::Tf32,
            depth: self.depth,
            width: self.width,
            causal,
            mask: self.mask.map(|m| (m.kind, m.dtype, m.strides.row != 0)),
            scale: self.scale,
            lse: self.lse,
            zeros: self.zeros,
        })
    }

    /// # Errors
    /// The user's: sizes below zero or beyond 32 bits, heads that do not divide, types that do not fit.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("batch", self.batch, 0),
            ("heads", self.heads, 0),
            ("kv_heads", self.kv_heads, 1),
            ("q_len", self.q_len, 0),
            ("kv_len", self.kv_len, 0),
            ("depth", self.depth, 1),
            ("width", self.width, 1),
        ];
        for (name, size, least) in sizes {
            if !(least..=i64::from(i32::MAX)).contains(&size) {
                return Err(Error::user(format!(
                    "{name} = {size} is not a size from {least} to 2^31 - 1"
                )));
            }
        }
        if self.heads % self.kv_heads != 0 {
            return Err(Error::user(format!(
                "{} heads of queries over {} of keys and values",
                self.heads, self.kv_heads
            )));
        }
        if !self.dtype.is_float() || !self.result.is_float() {
            return Err(Error::user(format!("attention of {} into {}", self.dtype, self.result)));
        }
        if let Some(mask) = &self.mask {
            let fits = match mask.kind {
                MaskKind::Add => mask.dtype.is_float() && mask.dtype != DType::F64,
                MaskKind::Keep => matches!(mask.dtype, DType::Bool | DType::U8),
            };
            if !fits {
                return Err(Error::user(format!("a mask of {} ({:?})", mask.dtype, mask.kind)));
            }
        }
        let masks = self.mask.iter().map(|m| &m.strides);
        for strides in [&self.q, &self.k, &self.v, &self.o].into_iter().chain(masks) {
            if strides.all().iter().any(|s| !(0..=i64::from(i32::MAX)).contains(s)) {
                return Err(Error::user(format!("strides {strides:?}: 0 to 2^31 - 1 elements")));
            }
        }
        Ok(())
    }

    /// Bytes of one element of the operands.
    pub(crate) fn operand_bytes(&self) -> i64 {
        i64::from(self.dtype.bits()) / 8
    }
}
