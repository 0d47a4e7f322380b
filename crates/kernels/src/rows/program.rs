//! Tile programs of softmax and normalisations.

use std::ops::RangeInclusive;
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op, Value};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, Param, ParamId, ReduceKind, TileId, TileType,
};

/// What is computed from each row `x` of `N` elements, in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowOp {
    /// `exp(x - max) / sum(exp(x - max))`
    Softmax,
    /// `x - max - log(sum(exp(x - max)))`
    LogSoftmax,
    /// `(x - mean) / sqrt(var + eps) * scale + shift`
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// `x / sqrt(mean(x * x) + eps) * scale`
    RmsNorm {
        /// Added to the mean of squares.
        eps: f64,
    },
}

/// A row operation for all sizes: `Y[M, N]` from `X[M, N]`.
///
/// Size symbols: `M`, `N`, and `ldx`, `ldy`, the distances in elements between rows. Normalisations
/// read `scale [N]`, layer normalisation also `shift [N]`. With `residual` the row is `X + R`, rounded to
/// the tensors' type, and is stored too, as `H`; `R` and `H` lie as `X`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSpec {
    /// What is computed.
    pub op: RowOp,
    /// Type of all tensors.
    pub dtype: DType,
    /// Adds `R` first.
    pub residual: bool,
}

pub(crate) fn func(
    params: &[DType],
    f: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
) -> Func {
    let mut b = FuncBuilder::new();
    let ids: Vec<ExprId> =
        params.iter().enumerate().map(|(i, t)| b.param(&format!("a{i}"), *t)).collect();
    let result = f(&mut b, &ids);
    b.finish(result)
}

pub(super) fn lines(rows: &str, cols: &str, leading: &str) -> Layout {
    let axis = |extent: &str, stride: Dim| Axis { extent: Dim::sym(extent), stride, block: None };
    Layout {
        axes: vec![axis(rows, Dim::sym(leading)), axis(cols, Dim::new(1))],
        offset: Dim::new(0),
    }
}

pub(crate) fn sizes(k: &mut KernelBuilder, names: &[&str]) {
    for name in names {
        let range = Range { min: 1, max: i32::MAX.into() };
        k.symbol(Symbol { name: (*name).into(), range });
    }
}

/// `exp(x - most)` of elements of a type. Where that has 16 bits, as `2^(x log2(e) - most log2(e))`, zero below 2^-126:
/// the products round by less than `|x - most|` times 2^-24, which such results do not show.
pub(super) fn exponential(f: &mut FuncBuilder, dtype: DType, x: ExprId, most: ExprId) -> ExprId {
    if dtype.bits() > 16 {
        let d = f.op(Op::Sub, &[x, most]);
        return f.op(Op::Exp, &[d]);
    }
    let log2_e = f.constant(std::f64::consts::LOG2_E, DType::F32);
    let less = f.constant(-std::f64::consts::LOG2_E, DType::F32);
    let start = f.op(Op::Mul, &[most, less]);
    let power = f.op(Op::Fma, &[x, log2_e, start]);
    let least = f.constant(-126.0, DType::F32);
    let nothing = f.constant(0.0, DType::F32);
    let low = f.op(Op::Lt, &[power, least]);
    let value = f.op(Op::Exp2, &[power]);
    f.op(Op::Select, &[low, nothing, value])
}

/// A row vector or a column vector as an operand of a map on a tile.
pub(super) fn along(tile: TileId, axis: usize) -> Operand {
    Operand { tile, along: vec![axis] }
}

/// A program under construction: parameters and the tile that is being worked on.
struct Rows<'a> {
    spec: &'a RowSpec,
    k: KernelBuilder,
    x: ParamId,
    r: Option<ParamId>,
    h: Option<ParamId>,
    y: ParamId,
    scale: Option<ParamId>,
    shift: Option<ParamId>,
    bm: Dim,
    bn: Dim,
    row0: Dim,
    begin: Begin,
    loops: usize,
}

/// Units of memory that tiles begin with, in elements, and by how many elements more than whole units rows lie apart. A
/// tile has one row where these are more than none.
#[derive(Clone, Copy)]
pub(super) struct Units {
    unit: i64,
    rest: i64,
}

impl Units {
    /// Tiles begin with the row.
    pub(super) const ROWS: Units = Units { unit: 1, rest: 0 };
}

/// Where the tiles of a row begin: with the row, or at the whole unit of memory that holds its first element.
pub(super) struct Begin {
    /// Elements by which they begin before the row.
    pub(super) before: Dim,
    /// What they cover at most.
    pub(super) span: Dim,
}

impl Begin {
    /// For tiles of the row `row`.
    pub(super) fn new(row: &Dim, units: Units) -> Begin {
        let Units { unit, rest } = units;
        let span = Dim::sym("N") + if rest == 0 { 0 } else { unit - 1 };
        Begin { before: (row * rest).modulo(&Dim::new(unit)), span }
    }

    /// Whether tiles may begin before the row.
    pub(super) fn is_early(&self) -> bool {
        self.before != Dim::new(0)
    }

    /// The column of the row with which the tile begins that is `col` elements behind the first one.
    pub(super) fn at(&self, col: &Dim) -> Dim {
        col - &self.before
    }
}

/// What a pass computes from a piece of a row, for [`Rows::reduce`].
enum Piece {
    /// `x`
    Plain,
    /// `x * x`
    Square,
    /// `exp(x - a)`
    Exp(TileId),
    /// `(x - a)^2`
    SquaredDistance(TileId),
}

impl Rows<'_> {
    fn shape(&self) -> Vec<Dim> {
        vec![self.bm.clone(), self.bn.clone()]
    }

    /// The row's elements from `col` on, in f32.
    fn row(&mut self, col: &Dim, store_sum: bool) -> TileId {
        let dtype = self.spec.dtype;
        let fill = match self.spec.op {
            RowOp::Softmax | RowOp::LogSoftmax => f64::NEG_INFINITY,
            _ => 0.0,
        };
        let at = vec![self.row0.clone(), self.begin.at(col)];
        let shape = self.shape();
        let load = |k: &mut KernelBuilder, p| {
            k.load_with(p, at.clone(), vec![1, 1], Value::Float(fill), shape.clone())
        };
        let mut x = load(&mut self.k, self.x);
        if let (Some(r), Some(h)) = (self.r, self.h) {
            let r = load(&mut self.k, r);
            let sum = func(&[dtype, dtype], |f, a| {
                let (x, r) = (f.cast(a[0], DType::F32), f.cast(a[1], DType::F32));
                let sum = f.op(Op::Add, &[x, r]);
                f.cast(sum, dtype)
            });
            let args = vec![self.k.plain(x), self.k.plain(r)];
            x = self.k.map(sum, args, shape.clone());
            if store_sum {
                self.k.store(h, at.clone(), x);
            }
        }
        let args = vec![self.k.plain(x)];
        self.k.map(Func::cast(dtype, DType::F32), args, shape)
    }

    fn piece(&mut self, piece: &Piece, x: TileId) -> TileId {
        let two = [DType::F32, DType::F32];
        let mut args = vec![self.k.plain(x)];
        let f = match piece {
            Piece::Plain => return x,
            Piece::Square => func(&two[..1], |f, a| f.op(Op::Mul, &[a[0], a[0]])),
            Piece::Exp(m) => {
                args.push(along(*m, 0));
                let dtype = self.spec.dtype;
                func(&two, |f, a| exponential(f, dtype, a[0], a[1]))
            }
            Piece::SquaredDistance(m) => {
                args.push(along(*m, 0));
                func(&two, |f, a| {
                    let d = f.op(Op::Sub, &[a[0], a[1]]);
                    f.op(Op::Mul, &[d, d])
                })
            }
        };
        let shape = self.shape();
        self.k.map(f, args, shape)
    }

    /// Combines a row: of the tile that is there, or in pieces.
    fn reduce(
        &mut self,
        kind: ReduceKind,
        piece: &Piece,
        whole: Option<TileId>,
        first: bool,
    ) -> TileId {
        // What lies outside the row adds nothing, except where a mean was taken off.
        let limited = matches!(piece, Piece::SquaredDistance(_));
        if let Some(x) = whole {
            let x = self.piece(piece, x);
            return if limited {
                self.sum_inside(x, &Dim::new(0))
            } else {
                self.k.reduce(kind, x, 1, None)
            };
        }
        let start = if kind == ReduceKind::Max { f64::NEG_INFINITY } else { 0.0 };
        let ty = TileType::new(DType::F32, [self.bm.clone()]);
        let init = self.k.full(Value::Float(start), ty);
        let name = self.loop_name();
        let pieces = self.begin.span.ceil_div(&self.bn);
        let (var, carried) = self.k.begin_for(&name, Dim::new(0), pieces, &[init]);
        let col = var * &self.bn;
        let x = self.row(&col, first);
        let x = self.piece(piece, x);
        let part = if limited { self.sum_inside(x, &col) } else { self.k.reduce(kind, x, 1, None) };
        let op = if kind == ReduceKind::Max { Op::Max } else { Op::Add };
        let args = vec![self.k.plain(carried[0]), self.k.plain(part)];
        let next = self.k.map(Func::binary(op, DType::F32), args, vec![self.bm.clone()]);
        self.k.end_for(&[next])[0]
    }

    /// The sum of a tile from column `col` on, of what lies in the row.
    fn sum_inside(&mut self, x: TileId, col: &Dim) -> TileId {
        let n = Dim::sym("N");
        if self.begin.before.is(0) {
            return self.k.reduce(ReduceKind::Sum, x, 1, Some(n - col));
        }
        let at = self.begin.at(col);
        let line = || vec![self.bn.clone()];
        let args = [at.clone(), at - &n].map(|start| self.k.iota(DType::I32, 0, start, line()));
        let args = vec![self.k.plain(x), along(args[0], 1), along(args[1], 1)];
        let f = func(&[DType::F32, DType::I32, DType::I32], |f, a| {
            let zero = f.constant_int(0, DType::I32);
            let begun = f.op(Op::Ge, &[a[1], zero]);
            let there = f.op(Op::Lt, &[a[2], zero]);
            let inside = f.op(Op::And, &[begun, there]);
            let nothing = f.constant(0.0, DType::F32);
            f.op(Op::Select, &[inside, a[0], nothing])
        });
        let shape = self.shape();
        let x = self.k.map(f, args, shape);
        self.k.reduce(ReduceKind::Sum, x, 1, None)
    }

    /// A new name for a loop variable.
    fn loop_name(&mut self) -> String {
        self.loops += 1;
        format!("piece{}", self.loops)
    }

    /// A per-row map.
    fn per_row(&mut self, f: Func, args: &[TileId]) -> TileId {
        let args = args.iter().map(|a| self.k.plain(*a)).collect();
        self.k.map(f, args, vec![self.bm.clone()])
    }

    /// `1 / sqrt(sum / N + eps)`
    fn inverse_root(&mut self, sum: TileId, inverse_n: TileId, eps: f64) -> TileId {
        let f = func(&[DType::F32, DType::F32], |f, a| {
            let mean = f.op(Op::Mul, &[a[0], a[1]]);
            let eps = f.constant(eps, DType::F32);
            let x = f.op(Op::Add, &[mean, eps]);
            f.op(Op::Rsqrt, &[x])
        });
        self.per_row_with_scalar(f, sum, inverse_n)
    }

    /// A map of a per-row tile and a scalar.
    fn per_row_with_scalar(&mut self, f: Func, x: TileId, scalar: TileId) -> TileId {
        let args = vec![self.k.plain(x), Operand { tile: scalar, along: vec![] }];
        self.k.map(f, args, vec![self.bm.clone()])
    }

    /// `1 / N`
    fn inverse_n(&mut self) -> TileId {
        let one = self.k.iota(DType::I32, 0, Dim::sym("N"), vec![Dim::new(1)]);
        let n = self.k.reshape(one, vec![]);
        let f = func(&[DType::I32], |f, a| {
            let n = f.cast(a[0], DType::F32);
            let one = f.constant(1.0, DType::F32);
            f.op(Op::Div, &[one, n])
        });
        self.k.map(f, vec![Operand { tile: n, along: vec![] }], vec![])
    }

    fn body(&mut self, whole: bool) {
        let dtype = self.spec.dtype;
        let zero = Dim::new(0);
        let x = whole.then(|| self.row(&zero, true));
        let three = [DType::F32; 3];
        // The per-row operands of the last step, and the step.
        let (stats, last): (Vec<TileId>, Func) = match self.spec.op {
            RowOp::Softmax => {
                let m = self.reduce(ReduceKind::Max, &Piece::Plain, x, true);
                if let Some(x) = x {
                    // The exponentials stay in registers.
                    let e = self.piece(&Piece::Exp(m), x);
                    let s = self.k.reduce(ReduceKind::Sum, e, 1, None);
                    let inverse = self.per_row(inverse(), &[s]);
                    let f = func(&three[..2], |f, a| {
                        let y = f.op(Op::Mul, &[a[0], a[1]]);
                        f.cast(y, dtype)
                    });
                    let args = vec![self.k.plain(e), along(inverse, 0)];
                    let shape = self.shape();
                    let y = self.k.map(f, args, shape);
                    self.k.store(self.y, vec![self.row0.clone(), self.begin.at(&zero)], y);
                    return;
                }
                let s = self.reduce(ReduceKind::Sum, &Piece::Exp(m), x, false);
                let inverse = self.per_row(inverse(), &[s]);
                let f = func(&three, |f, a| {
                    let e = exponential(f, dtype, a[0], a[1]);
                    let y = f.op(Op::Mul, &[e, a[2]]);
                    f.cast(y, dtype)
                });
                (vec![m, inverse], f)
            }
            RowOp::LogSoftmax => {
                let m = self.reduce(ReduceKind::Max, &Piece::Plain, x, true);
                let s = self.reduce(ReduceKind::Sum, &Piece::Exp(m), x, false);
                let log = self.per_row(Func::unary(Op::Log, DType::F32), &[s]);
                let f = func(&three, |f, a| {
                    let d = f.op(Op::Sub, &[a[0], a[1]]);
                    let y = f.op(Op::Sub, &[d, a[2]]);
                    f.cast(y, dtype)
                });
                (vec![m, log], f)
            }
            RowOp::LayerNorm { eps } => {
                let inverse_n = self.inverse_n();
                let sum = self.reduce(ReduceKind::Sum, &Piece::Plain, x, true);
                let product = Func::binary(Op::Mul, DType::F32);
                let mean = self.per_row_with_scalar(product, sum, inverse_n);
                let end = |f: &mut FuncBuilder, d: ExprId, a: &[ExprId]| {
                    let d = f.op(Op::Mul, &[d, a[0]]);
                    let (scale, shift) = (f.cast(a[1], DType::F32), f.cast(a[2], DType::F32));
                    let y = f.op(Op::Fma, &[d, scale, shift]);
                    f.cast(y, dtype)
                };
                if let Some(x) = x {
                    // The distances from the mean stay in registers.
                    let args = vec![self.k.plain(x), along(mean, 0)];
                    let shape = self.shape();
                    let d = self.k.map(Func::binary(Op::Sub, DType::F32), args, shape);
                    let square = self.piece(&Piece::Square, d);
                    let var = self.sum_inside(square, &zero);
                    let inverse = self.inverse_root(var, inverse_n, eps);
                    let f =
                        func(&[DType::F32, DType::F32, dtype, dtype], |f, a| end(f, a[0], &a[1..]));
                    self.finish_piece(&f, d, &[inverse], &zero);
                    return;
                }
                let var = self.reduce(ReduceKind::Sum, &Piece::SquaredDistance(mean), x, false);
                let inverse = self.inverse_root(var, inverse_n, eps);
                let f = func(&[DType::F32, DType::F32, DType::F32, dtype, dtype], |f, a| {
                    let d = f.op(Op::Sub, &[a[0], a[1]]);
                    end(f, d, &a[2..])
                });
                (vec![mean, inverse], f)
            }
            RowOp::RmsNorm { eps } => {
                let inverse_n = self.inverse_n();
                let sum = self.reduce(ReduceKind::Sum, &Piece::Square, x, true);
                let inverse = self.inverse_root(sum, inverse_n, eps);
                let f = func(&[DType::F32, DType::F32, dtype], |f, a| {
                    let d = f.op(Op::Mul, &[a[0], a[1]]);
                    let scale = f.cast(a[2], DType::F32);
                    let y = f.op(Op::Mul, &[d, scale]);
                    f.cast(y, dtype)
                });
                (vec![inverse], f)
            }
        };
        match x {
            Some(x) => self.finish_piece(&last, x, &stats, &zero),
            None => {
                let name = self.loop_name();
                let pieces = self.begin.span.ceil_div(&self.bn);
                let (var, _) = self.k.begin_for(&name, Dim::new(0), pieces, &[]);
                let col = var * &self.bn;
                let x = self.row(&col, false);
                self.finish_piece(&last, x, &stats, &col);
                self.k.end_for(&[]);
            }
        }
    }

    /// Stores `last(x, stats..., scale, shift)` from column `col` on.
    fn finish_piece(&mut self, last: &Func, x: TileId, stats: &[TileId], col: &Dim) {
        let col = self.begin.at(col);
        let mut args = vec![self.k.plain(x)];
        args.extend(stats.iter().map(|s| along(*s, 0)));
        for p in [self.scale, self.shift].into_iter().flatten() {
            let v = self.k.load(p, vec![col.clone()], vec![self.bn.clone()]);
            args.push(along(v, 1));
        }
        let shape = self.shape();
        let y = self.k.map(last.clone(), args, shape);
        self.k.store(self.y, vec![self.row0.clone(), col], y);
    }
}

fn up(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

fn inverse() -> Func {
    func(&[DType::F32], |f, a| {
        let one = f.constant(1.0, DType::F32);
        f.op(Op::Div, &[one, a[0]])
    })
}

impl RowSpec {
    /// The tile program, with tile sizes `BM`, `BN`. With `whole`, `BN` must be at least `N`.
    pub fn program(&self, name: &str, whole: bool) -> Kernel {
        self.program_in_units(name, whole, Units::ROWS)
    }

    /// The program whose tiles begin at units of memory; `ldx` and `ldy` are the same then.
    fn program_in_units(&self, name: &str, whole: bool, units: Units) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ldx", "ldy"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let x = k.param("X", self.dtype, lines("M", "N", "ldx"), Access::In);
        let r = self.residual.then(|| k.param("R", self.dtype, lines("M", "N", "ldx"), Access::In));
        let vector = || Layout::row_major(&[Dim::sym("N")]);
        let scales = matches!(self.op, RowOp::LayerNorm { .. } | RowOp::RmsNorm { .. });
        let scale = scales.then(|| k.param("scale", self.dtype, vector(), Access::In));
        let shifts = matches!(self.op, RowOp::LayerNorm { .. });
        let shift = shifts.then(|| k.param("shift", self.dtype, vector(), Access::In));
        let h =
            self.residual.then(|| k.param("H", self.dtype, lines("M", "N", "ldx"), Access::Out));
        let y = k.param("Y", self.dtype, lines("M", "N", "ldy"), Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&bm));
        let row0 = pm * &bm;
        let begin = Begin::new(&row0, units);
        let mut rows =
            Rows { spec: self, k, x, r, h, y, scale, shift, bm, bn, row0, begin, loops: 0 };
        rows.body(whole);
        rows.k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A size without a value.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        let program = |whole, units| self.program_in_units(name, whole, units);
        let whole_from = match self.op {
            RowOp::Softmax | RowOp::LogSoftmax if !self.residual => {
                Some(if self.dtype.bits() == 16 { WHOLE_FROM } else { WIDE_WHOLE_FROM })
            }
            _ => None,
        };
        let (dtype, least) = (self.dtype, FINE_LEAST);
        let rows = Lines { dtype, distances: &["ldx", "ldy"], whole_from, least };
        let form = whole_or_pieces(arch, size, &rows, program)?;
        Ok((form.kernel, form.schedule))
    }
}

/// Elements of a row of 16 bits from which tiles that begin at whole units of memory were faster, on an H200 (see `docs/src/facts.md`),
/// where rows are held by registers and nothing but exponentials is made of them. Norms never were: vectors along their columns
/// cost twice the accesses, and more of what they do is wasted on what a tile is too long.
const WHOLE_FROM: i64 = 500;

/// The same of wider elements.
pub(super) const WIDE_WHOLE_FROM: i64 = 4097;

/// The same where shared memory keeps rows that are read in accesses of several elements otherwise, and where they are read one by
/// one beside vectors along the columns.
const KEPT_WIDE_FROM: i64 = 16385;
const KEPT_BESIDE_FROM: i64 = 4096;

/// Elements that a thread has of a piece of a row at least, where little is done with them.
const FINE_LEAST: i64 = 8;

/// Elements that a thread should hold of a whole row: warps with fewer wait more for each other, and more take its registers.
const TIGHT: RangeInclusive<i64> = 16..=40;

/// The form of a program that suits some sizes.
pub(super) struct Form {
    /// The program itself.
    pub(super) kernel: Kernel,
    /// Its schedule.
    pub(super) schedule: GpuSchedule,
    /// Rows are whole; else they are in pieces.
    pub(super) whole: bool,
    /// Where its tiles begin.
    pub(super) units: Units,
}

/// What is known of the rows of a program.
pub(super) struct Lines<'a> {
    /// Type of the elements.
    pub(super) dtype: DType,
    /// The sizes that are distances between rows.
    pub(super) distances: &'a [&'a str],
    /// Elements of rows in registers from which tiles begin at whole units of memory.
    pub(super) whole_from: Option<i64>,
    /// Elements that a thread has of a piece of a row at least.
    pub(super) least: i64,
}

/// The form of a program, of whole rows or of rows in pieces, that suits these sizes, and its schedule. `program` makes one
/// of whole rows or not, with tiles that begin at such units.
pub(super) fn whole_or_pieces(
    arch: Arch,
    size: &dyn Fn(&str) -> Option<i64>,
    lines: &Lines<'_>,
    program: impl Fn(bool, Units) -> Kernel,
) -> Result<Form> {
    match in_units(arch, size, lines, &program)? {
        Some(found) => Ok(found),
        None => plain_form(arch, size, Units::ROWS, &program),
    }
}

/// The form for rows that begin or end within units of 16 bytes: one row a block, with tiles that begin where memory's
/// units do, so that all but the first and the last access of a row are whole. None where other forms are sooner done.
fn in_units(
    arch: Arch,
    size: &dyn Fn(&str) -> Option<i64>,
    of: &Lines<'_>,
    program: &dyn Fn(bool, Units) -> Kernel,
) -> Result<Option<Form>> {
    let unit = i64::from(128 / of.dtype.bits());
    let far: Option<Vec<i64>> = of.distances.iter().map(|d| size(d)).collect();
    let (Some(n), Some(far)) = (size("N"), far) else { return Ok(None) };
    let rest = far.first().map_or(0, |d| d % unit);
    if n % unit == 0 && rest == 0 || far.iter().any(|d| d % unit != rest) {
        return Ok(None);
    }
    // Picked as for rows of whole units that are long enough wherever the row begins.
    let units = Units { unit, rest };
    let before = if rest == 0 { 0 } else { unit - 1 };
    let long = up(n + before, unit) * unit;
    let wide = |name: &str| match name == "N" || of.distances.contains(&name) {
        true => Some(long),
        false => size(name),
    };
    let mut form = plain_form(arch, &wide, units, program)?;
    let (kernel, schedule) = (&form.kernel, &mut form.schedule);
    let along_columns =
        |p: &Param| matches!(p.layout.axes.as_slice(), [a] if a.extent == Dim::sym("N"));
    let vectors = kernel.params.iter().filter(|(_, p)| along_columns(p)).count();
    // What one access could take at most otherwise.
    let one_by_one = (n | rest) % 2 != 0;
    let gains = match (schedule.lines.kept > 0, one_by_one) {
        (true, true) => vectors == 0 || n >= KEPT_BESIDE_FROM,
        (true, false) => vectors == 0 && n >= KEPT_WIDE_FROM,
        (false, true) => schedule.cluster == 1 && of.whole_from.is_some_and(|from| n >= from),
        (false, false) => false,
    };
    if !gains {
        return Ok(None);
    }
    match form.whole {
        true => one_tight_row(schedule, unit, up(n + before, unit)),
        false => finer_pieces(schedule, unit.max(of.least), n + before),
    }
    schedule.lines.ragged = true;
    // What varies along columns alone comes late, and takes more registers.
    schedule.lines.early = false;
    schedule.sizes = of.distances.iter().zip(far).map(|(d, far)| ((*d).into(), far)).collect();
    schedule.sizes.insert("N".into(), n);
    let works = schedule.tiles.get("BM") == Some(&1)
        && tilewright_lower_gpu::lower(kernel, schedule).is_ok();
    Ok(works.then_some(form))
}

/// One row of at most so many units a block, by as many lanes as leave the fewest of the tile's units unused.
fn one_tight_row(schedule: &mut GpuSchedule, unit: i64, span: i64) {
    let lines = &mut schedule.lines;
    let tile = |name: &str| schedule.tiles.get(name).copied().unwrap_or(1);
    let before = tile("BM") * tile("BN") / i64::from(lines.threads);
    let tight = (5..=9)
        .map(|n| (1i64 << n, up(span, 1 << n)))
        .map(|(lanes, each)| (lanes * each, each * unit, lanes))
        .filter(|(_, each, _)| each <= TIGHT.end())
        .min_by_key(|(covered, each, _)| (*covered, each < TIGHT.start(), *each));
    let Some((covered, each, lanes)) = tight else { return };
    // As much under way on a multiprocessor as before.
    let threads = i64::from(schedule.blocks_per_sm * lines.threads) * before / each;
    schedule.blocks_per_sm = (threads / lanes).clamp(1, 32) as u32;
    (lines.threads, lines.lanes) = (lanes as u32, lanes as u32);
    schedule.tiles.insert("BM".into(), 1);
    schedule.tiles.insert("BN".into(), covered * unit);
}

/// Pieces of half the length, and twice as many, while more than an eighth of the last one lies behind the row.
fn finer_pieces(schedule: &mut GpuSchedule, least: i64, span: i64) {
    let threads = i64::from(schedule.lines.threads * schedule.cluster);
    let Some(mut piece) = schedule.tiles.get("BN").copied() else { return };
    let unused = |piece: i64| up(span, piece) * piece - span;
    while unused(piece) * 8 > span && piece % (2 * least * threads) == 0 {
        piece /= 2;
        let kept = i64::from(schedule.lines.kept * 2).min(up(span, piece));
        schedule.lines.kept = kept as u32;
    }
    schedule.tiles.insert("BN".into(), piece);
}

fn plain_form(
    arch: Arch,
    size: &dyn Fn(&str) -> Option<i64>,
    units: Units,
    program: &dyn Fn(bool, Units) -> Kernel,
) -> Result<Form> {
    let form = |kernel, schedule, whole| Form { kernel, schedule, whole, units };
    let pieces = program(false, units);
    if let Some(schedule) = GpuSchedule::lines_kept(&pieces, arch, size)? {
        return Ok(form(pieces, schedule, false));
    }
    let whole = program(true, units);
    if let Some(schedule) = GpuSchedule::lines_for(&whole, arch, size)? {
        return Ok(form(whole, schedule, true));
    }
    let schedule = GpuSchedule::lines_for(&pieces, arch, size)?
        .ok_or_else(|| Error::bug("a row in pieces has a schedule"))?;
    Ok(form(pieces, schedule, false))
}
