//! [`Problem`]: one matrix product with its sizes.

use crate::gemm::program::{Epilogue, GemmSpec, Math, Order, Pair, Windows};
use crate::gemm::statistics::Statistics;
use tilewright_base::{DType, Error, Result};

/// How exactly f32 operands are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Precision {
    /// As f32: plain multiply-adds.
    F32,
    /// Close to f32 on the tensor cores: three products of TF32 parts.
    Tf32x3,
    /// Operands rounded to TF32.
    Tf32,
}

/// Images of which `A` is read through windows: `m` counts outputs (over images, rows, columns), `k` taps times channels.
/// `A` is the list of pixels, `leading` its distance between pixels, which may share memory; `B` is column-major with taps
/// outermost: `[n, taps, channels]`, `leading` apart, taps an equal part of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Images {
    /// Which windows.
    pub windows: Windows,
    /// How many images.
    pub count: i64,
    /// Height and width of an image.
    pub size: [i64; 2],
    /// Rows and columns of outputs.
    pub outputs: [i64; 2],
}

/// `C[m,n] = epilogue(sum over k of A[m,k] * B[k,n])`, repeated over `batch`.
///
/// Leading dimensions and batch strides count elements; alignments are those of the addresses, in
/// bytes. An epilogue of a pair ([`Pair::Right`]) reads the sums of `A B` and of `A B2`; `B2` lies as `B`.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Rows of `A` and `C`.
    pub m: i64,
    /// Columns of `B` and `C`.
    pub n: i64,
    /// Columns of `A`, rows of `B`.
    pub k: i64,
    /// Number of products; their operands are `stride_*` apart.
    pub batch: i64,
    /// Type of the operands.
    pub operand: DType,
    /// Type of the sums.
    pub sum: DType,
    /// Type of the result.
    pub result: DType,
    /// For f32 operands.
    pub precision: Precision,
    /// For 8-bit float operands: sums of one tile depth are added in f32.
    pub promoted: bool,
    /// Order of `A`, `B`, `C`.
    pub order: (Order, Order, Order),
    /// Leading dimensions of `A`, `B`, `C`.
    pub leading: (i64, i64, i64),
    /// Distances between the batches of `A`, `B`, `C`.
    pub stride: (i64, i64, i64),
    /// Alignment of the addresses of `A`, `B`, `C`, in bytes. What the epilogue reads is aligned as `C`, and
    /// a residual has its strides.
    pub align: (i64, i64, i64),
    /// What happens to the sums.
    pub epilogue: Epilogue,
    /// `A` is read through windows over images.
    pub images: Option<Images>,
    /// Sums over rows that the product leaves, or makes its vector along rows of.
    pub statistics: Statistics,
}

impl Problem {
    /// A dense row-major product with aligned operands and only a conversion of the result.
    pub fn dense(m: i64, n: i64, k: i64, operand: DType, result: DType) -> Problem {
        let sum = if operand.is_float() { DType::F32 } else { DType::I32 };
        Problem {
            m,
            n,
            k,
            batch: 1,
            operand,
            sum,
            result,
            precision: Precision::F32,
            promoted: false,
            order: (Order::Row, Order::Row, Order::Row),
            leading: (k, n, n),
            stride: (m * k, k * n, m * n),
            align: (256, 256, 256),
            epilogue: Epilogue::cast(sum, result),
            images: None,
            statistics: Statistics::default(),
        }
    }

    /// The same with other orders, densely packed.
    #[must_use]
    pub fn ordered(mut self, a: Order, b: Order, c: Order) -> Problem {
        let pick =
            |order: Order, rows: i64, cols: i64| if order == Order::Row { cols } else { rows };
        self.order = (a, b, c);
        self.leading = (pick(a, self.m, self.k), pick(b, self.k, self.n), pick(c, self.m, self.n));
        self
    }

    /// What is computed, for every size.
    pub fn spec(&self) -> GemmSpec {
        let math = match (self.operand, self.precision) {
            (DType::F32, Precision::Tf32) => Math::Tf32,
            (DType::F32, Precision::Tf32x3) => Math::Tf32x3,
            _ if self.promoted => Math::Promoted,
            _ => Math::Exact,
        };
        GemmSpec {
            operand: self.operand,
            sum: self.sum,
            result: self.result,
            math,
            a: self.order.0,
            b: self.order.1,
            c: self.order.2,
            batched: self.batch != 1,
            epilogue: self.epilogue.clone(),
            windows: self.images.map(|i| i.windows),
            prologue: None,
            statistics: self.statistics.clone(),
        }
    }

    /// Taps of windows; 1 without.
    pub(crate) fn taps(&self) -> i64 {
        self.images.map_or(1, |i| i.windows.count())
    }

    /// Steps of the depth in tiles of `bk`.
    pub(crate) fn depth_steps(&self, bk: i64) -> i64 {
        let each = self.k / self.taps().max(1);
        self.taps() * ((each + bk - 1) / bk)
    }

    /// Bytes of one operand element.
    pub(crate) fn operand_bytes(&self) -> i64 {
        i64::from(self.operand.bits()) / 8
    }

    /// Bytes of one element of the result.
    pub(crate) fn result_bytes(&self) -> i64 {
        i64::from(self.result.bits()) / 8
    }

    /// # Errors
    /// The user's: sizes below zero, leading dimensions that overlap lines, sizes beyond 32 bits.
    pub fn check(&self) -> Result<()> {
        let sizes = [("m", self.m), ("n", self.n), ("k", self.k), ("batch", self.batch)];
        for (name, size) in sizes {
            if !(0..=i64::from(i32::MAX)).contains(&size) {
                return Err(Error::user(format!(
                    "{name} = {size} is not a size from 0 to 2^31 - 1"
                )));
            }
        }
        if let Some(i) = &self.images {
            let [rows, cols] = i.outputs;
            let whole = i.windows.count() > 0
                && self.k % i.windows.count() == 0
                && self.m == i.count * rows * cols
                && self.leading.1 % i.windows.count() == 0
                && (self.order.0, self.order.1, self.batch) == (Order::Row, Order::Col, 1);
            if !whole || i.size.iter().chain(&i.outputs).any(|n| *n < 1) {
                return Err(Error::user(format!("{i:?} do not make {} outputs", self.m)));
            }
        }
        let lines = [
            ("A", self.order.0, self.m, self.k / self.taps().max(1), self.leading.0),
            ("B", self.order.1, self.k, self.n, self.leading.1),
            ("C", self.order.2, self.m, self.n, self.leading.2),
        ];
        for (name, order, rows, cols, leading) in lines {
            let line = if order == Order::Row { cols } else { rows };
            // Neighbouring windows may share memory.
            let overlaps = name == "A" && self.images.is_some() && leading > 0;
            if leading < line && !overlaps || leading > i64::from(i32::MAX) {
                return Err(Error::user(format!(
                    "leading dimension {leading} of {name}: lines have {line} elements"
                )));
            }
        }
        if self.epilogue.pair == Pair::Left {
            let message =
                "a pair of left operands: give the transposed product a pair of right ones";
            return Err(Error::user(message));
        }
        Ok(())
    }
}
