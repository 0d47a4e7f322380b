//! [`Product`]: a matrix product inside a plan, with its sizes and strides over the plan's symbols.
//!
//! ```text
//! for each index of `repeat`:   C[m,n] = epilogue(sum over k of A[m,k] * B[k,n], cols[n], rows[m], R[m,n])
//! ```
//!
//! A tile program says the same; this form is for those who pick among many schedules once the sizes are
//! known, and must see sizes, strides and epilogue without reading a program.

use tilewright_base::DType;
use tilewright_expr::Func;
use tilewright_layout::Dim;

/// A matrix in the memory of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Which parameter of the kernel.
    pub param: usize,
    /// Type of its elements.
    pub dtype: DType,
    /// Where the first element is, in elements.
    pub offset: Dim,
    /// Distance between neighbouring rows, in elements.
    pub row: Dim,
    /// Distance between neighbouring columns, in elements.
    pub col: Dim,
}

/// A vector in the memory of a parameter, contiguous.
#[derive(Clone, Debug, PartialEq)]
pub struct Vector {
    /// Which parameter of the kernel.
    pub param: usize,
    /// Type of its elements.
    pub dtype: DType,
    /// Where the first element is, in elements.
    pub offset: Dim,
}

/// An axis along which the product is repeated.
#[derive(Clone, Debug, PartialEq)]
pub struct Repeat {
    /// How often.
    pub extent: Dim,
    /// Distances between neighbours in `A`, `B` and `C`, in elements; 0 where it is the same matrix.
    pub strides: [Dim; 3],
}

/// The second right operand of a pair of products with one left operand.
#[derive(Clone, Debug, PartialEq)]
pub struct Second {
    /// `[k, n]`; its rows and columns are as far apart as those of the first.
    pub b: Matrix,
    /// A vector along the columns of `C`, when the first product has one.
    pub cols: Option<Vector>,
}

/// Windows over images: the left operand of a convolution as it lies, `[images, height, width, channels]`. Line
/// `(image, row, col)` of the matrix, column `(tap down, tap right, channel)`, is the pixel
/// `(row * steps + down * dilations - before, ...)`, or zero where that is outside. Entries are for rows and columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// How many images.
    pub images: Dim,
    /// Height and width.
    pub size: [Dim; 2],
    /// Rows and columns of outputs.
    pub outputs: [Dim; 2],
    /// Taps.
    pub taps: [i64; 2],
    /// Distances between neighbouring windows.
    pub steps: [i64; 2],
    /// Zeros before an image.
    pub before: [i64; 2],
    /// Distances between neighbouring taps.
    pub dilations: [i64; 2],
}

/// A vector along the depth.
#[derive(Clone, Debug, PartialEq)]
pub struct Depth {
    /// Where it is.
    pub vector: Vector,
    /// Distances between neighbours along the axes of [`Product::repeat`], in elements; 0 where it is the same vector.
    pub strides: Vec<Dim>,
}

/// How the left operand is computed from what is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Prologue {
    /// From an element of `A` as it is stored, and one of each vector, to `operand`.
    pub func: Func,
    /// Type in which it is multiplied.
    pub operand: DType,
    /// Vectors along the depth.
    pub vectors: Vec<Depth>,
}

/// Columns over which one part of the sums over a row goes.
pub const PART_COLUMNS: i64 = 64;

/// Sums over rows in parts that the vector along rows is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct RowSums {
    /// How many a row has.
    pub parts: i64,
    /// From their sum to an element of the vector along rows.
    pub func: Func,
}

/// Sums over rows that are left beside `C`: `P[m, part] = sum of func(C[m, n])` over [`PART_COLUMNS`] columns.
#[derive(Clone, Debug, PartialEq)]
pub struct LeftSums {
    /// `[m, parts]` in f32, dense.
    pub param: usize,
    /// From an element of `C` to f32.
    pub func: Func,
}

/// A matrix product, batched and strided, with what happens to its sums.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// Rows of `A` and `C`.
    pub m: Dim,
    /// Columns of `B` and `C`.
    pub n: Dim,
    /// Columns of `A`, rows of `B`.
    pub k: Dim,
    /// Outermost first.
    pub repeat: Vec<Repeat>,
    /// `[m, k]`; with windows, `row` is the distance between neighbouring pixels.
    pub a: Matrix,
    /// `A` is read through windows.
    pub windows: Option<Windows>,
    /// `A` is computed from what is stored.
    pub prologue: Option<Prologue>,
    /// `[k, n]`
    pub b: Matrix,
    /// `[m, n]`
    pub c: Matrix,
    /// Operands may be rounded to TF32 on the way in.
    pub tf32: bool,
    /// Type of the sums.
    pub sum: DType,
    /// From the sum (of a pair: both), and then those of `cols` (of a pair: both), `rows` and `residual` that are there,
    /// to the type of `C`.
    pub epilogue: Func,
    /// A vector along the columns of `C`.
    pub cols: Option<Vector>,
    /// A vector along its rows, or the sums that it is made of.
    pub rows: Option<Vector>,
    /// `rows` is `[m, parts]` in f32, dense: sums in parts.
    pub row_sums: Option<RowSums>,
    /// A matrix that lies as `C` does, in memory of its own.
    pub residual: Option<Vector>,
    /// A second product with the same `A`, whose sum the epilogue reads, too. `repeat` strides are those of `B`.
    pub second: Option<Second>,
    /// Sums over rows of `C`.
    pub leaves: Option<LeftSums>,
}
