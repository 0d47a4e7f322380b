//! Cross-entropy of rows of logits, alone or with its gradient.

use super::program::{
    Begin, Form, Lines, Units, WIDE_WHOLE_FROM, along, exponential, func, lines, sizes,
    whole_or_pieces,
};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType,
};

/// For every row `x` of `X[M, N]` and its target `t = T[i]` (`i64`), in f32:
///
/// ```text
/// Z[i]    = log(sum(exp(x - max))) + max
/// L[i]    = Z[i] - x[t]
/// G[i, j] = (exp(x[j] - max) / sum(exp(x - max)) - (j == t)) * s
/// ```
///
/// and with what else [`CrossEntropyTerms`] has. [`CrossEntropyForm`] says which of them are written, and what `s` is. A target outside `0..N` is ignored: its loss is 0, and so
/// is its row's gradient. Size symbols: `M`, `N`, and `ldx`, the distance in elements between rows. A row that a tile holds
/// whole, or that shared memory keeps, is read once and written once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropySpec {
    /// Type of the logits, and of the gradient.
    pub dtype: DType,
    /// What is written.
    pub form: CrossEntropyForm,
    /// What the losses have beside the target's logit.
    pub terms: CrossEntropyTerms,
}

/// Further terms of a cross-entropy; zeros leave them out. With `v = cap * tanh(x / cap)` (`v = x` without a cap) and `Z` of `v`
/// instead of `x`:
///
/// ```text
/// L[i]    = Z[i] - (1 - smoothing) * v[t] - smoothing * mean(v) + z * Z[i]^2
/// G[i, j] = (exp(v[j] - Z[i]) * (1 + 2 z Z[i]) - (1 - smoothing) * (j == t) - smoothing / N) * (1 - (v[j] / cap)^2) * s
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyTerms {
    /// The share of the target that goes to all columns alike, 0 to 1.
    pub smoothing: f64,
    /// The factor of the square of the logarithm of the sum, at least 0.
    pub z: f64,
    /// What logits are bounded by, at least 0.
    pub cap: f64,
}

/// Elements of a row of 16 bits that registers hold from which its tiles may begin at whole units of memory.
const WHOLE_FROM: i64 = 2049;

/// What a cross-entropy writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CrossEntropyForm {
    /// The losses, and the gradient over the logits; `s = S[0]`. Parameters: `X`, `T`, `S`, `L`.
    #[default]
    InPlace,
    /// The losses, and the gradient beside the logits; `s = S[i]`. Parameters: `X`, `T`, `S`, `L`, `G`.
    Beside,
    /// The losses, and the logarithms of the sums. Parameters: `X`, `T`, `L`, `Z`.
    Losses,
}

/// A program under construction.
struct Builder {
    k: KernelBuilder,
    dtype: DType,
    terms: CrossEntropyTerms,
    x: ParamId,
    gradient: Option<ParamId>,
    bm: Dim,
    bn: Dim,
    row0: Dim,
    begin: Begin,
}

/// What the gradient of a row is made of.
struct OfRow {
    /// The factor of the exponentials.
    share: TileId,
    /// What the target's column has less.
    factor: TileId,
    /// What every column has less, where labels are smoothed.
    rest: Option<TileId>,
    /// The target's column.
    target: TileId,
}

impl Builder {
    fn shape(&self) -> Vec<Dim> {
        vec![self.bm.clone(), self.bn.clone()]
    }

    fn map(
        &mut self,
        args: Vec<Operand>,
        shape: Vec<Dim>,
        f: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
    ) -> TileId {
        let types: Vec<DType> = args.iter().map(|a| self.k.ty(a.tile).dtype).collect();
        self.k.map(func(&types, f), args, shape)
    }

    /// The logits from column `col` on, in f32, minus infinity beyond the row. With a cap, those that are bounded by it.
    fn logits(&mut self, col: &Dim) -> TileId {
        let at = vec![self.row0.clone(), self.begin.at(col)];
        let (fill, shape) = (Value::Float(f64::NEG_INFINITY), self.shape());
        let raw = self.k.load_with(self.x, at, vec![1, 1], fill, shape.clone());
        let args = vec![self.k.plain(raw)];
        let cap = self.terms.cap;
        if cap == 0.0 {
            return self.k.map(Func::cast(self.dtype, DType::F32), args, shape);
        }
        let (here, n, early) = (self.columns(col), self.length(), self.begin.is_early());
        let args = vec![args[0].clone(), along(here, 1), n];
        self.map(args, shape, |f, a| {
            let x = f.cast(a[0], DType::F32);
            let bounded = bounded(f, x, cap);
            let inside = in_row(f, a[1], a[2], early);
            let outside = f.constant(f64::NEG_INFINITY, DType::F32);
            f.op(Op::Select, &[inside, bounded, outside])
        })
    }

    /// The length of a row, `i32`.
    fn length(&mut self) -> Operand {
        let n = self.k.iota(DType::I32, 0, Dim::sym("N"), vec![Dim::new(1)]);
        Operand { tile: self.k.reshape(n, vec![]), along: vec![] }
    }

    /// The length of a row in f32, for each row.
    fn lengths(&mut self) -> TileId {
        let (n, row) = (self.length(), vec![self.bm.clone()]);
        self.map(vec![n], row, |f, a| f.cast(a[0], DType::F32))
    }

    /// The logits, zero beyond the row.
    fn inside(&mut self, v: TileId, col: &Dim) -> TileId {
        let (here, n, early) = (self.columns(col), self.length(), self.begin.is_early());
        let (args, shape) = (vec![self.k.plain(v), along(here, 1), n], self.shape());
        self.map(args, shape, |f, a| {
            let inside = in_row(f, a[1], a[2], early);
            let nothing = f.constant(0.0, DType::F32);
            f.op(Op::Select, &[inside, a[0], nothing])
        })
    }

    /// `exp(v - max)`
    fn exponentials(&mut self, v: TileId, max: TileId) -> TileId {
        let (args, shape) = (vec![self.k.plain(v), along(max, 0)], self.shape());
        let dtype = self.dtype;
        self.map(args, shape, |f, a| exponential(f, dtype, a[0], a[1]))
    }

    /// Numbers of the columns from `col` on.
    fn columns(&mut self, col: &Dim) -> TileId {
        self.k.iota(DType::I32, 0, self.begin.at(col), vec![self.bn.clone()])
    }

    /// The target's logit in a tile of one row, read by itself; zero without such a column.
    fn logit(&mut self, target: TileId) -> TileId {
        let at = vec![self.row0.clone(), Dim::new(0)];
        let one = vec![Dim::new(1), Dim::new(1)];
        let raw = self.k.gather(self.x, 1, target, at, one);
        let raw = self.k.reshape(raw, vec![self.bm.clone()]);
        let cap = self.terms.cap;
        let args = vec![self.k.plain(raw)];
        self.map(args, vec![self.bm.clone()], |f, a| {
            let x = f.cast(a[0], DType::F32);
            if cap == 0.0 { x } else { bounded(f, x, cap) }
        })
    }

    /// The target's logit, zero elsewhere.
    fn picked(&mut self, v: TileId, col: &Dim, target: TileId) -> TileId {
        let here = self.columns(col);
        let (args, shape) = (vec![self.k.plain(v), along(here, 1), along(target, 0)], self.shape());
        self.map(args, shape, |f, a| {
            let hit = f.op(Op::Eq, &[a[1], a[2]]);
            let nothing = f.constant(0.0, DType::F32);
            f.op(Op::Select, &[hit, a[0], nothing])
        })
    }

    /// A loop over the pieces of a row that carries reductions of what `piece` makes of its logits.
    fn over_pieces<const COUNT: usize>(
        &mut self,
        name: &str,
        kinds: [ReduceKind; COUNT],
        piece: impl FnOnce(&mut Builder, TileId, &Dim) -> [TileId; COUNT],
    ) -> [TileId; COUNT] {
        let init = kinds.map(|kind| {
            let start = if kind == ReduceKind::Max { f64::NEG_INFINITY } else { 0.0 };
            self.k.full(Value::Float(start), TileType::new(DType::F32, [self.bm.clone()]))
        });
        let pieces = self.begin.span.ceil_div(&self.bn);
        let (var, carried) = self.k.begin_for(name, Dim::new(0), pieces, &init);
        let col = var * &self.bn;
        let v = self.logits(&col);
        let tiles = piece(self, v, &col);
        let mut next = Vec::new();
        for ((kind, tile), old) in kinds.into_iter().zip(tiles).zip(carried) {
            let part = self.k.reduce(kind, tile, 1, None);
            let args = vec![self.k.plain(old), self.k.plain(part)];
            let op = if kind == ReduceKind::Max { Op::Max } else { Op::Add };
            next.push(self.k.map(Func::binary(op, DType::F32), args, vec![self.bm.clone()]));
        }
        let done = self.k.end_for(&next);
        std::array::from_fn(|i| done[i])
    }

    /// From the factor of a row's gradient, the sum of its exponentials and that sum's logarithm.
    fn of_row(&mut self, [factor, sum, log, target]: [TileId; 4]) -> OfRow {
        let (row, CrossEntropyTerms { smoothing, z, .. }) = (vec![self.bm.clone()], self.terms);
        let mut args = vec![self.k.plain(factor), self.k.plain(sum)];
        if z > 0.0 {
            args.push(self.k.plain(log));
        }
        let share = self.map(args, row.clone(), |f, a| {
            let share = f.op(Op::Div, &[a[0], a[1]]);
            if z == 0.0 {
                return share;
            }
            let (twice, one) = (f.constant(2.0 * z, DType::F32), f.constant(1.0, DType::F32));
            let slope = f.op(Op::Mul, &[a[2], twice]);
            let slope = f.op(Op::Add, &[slope, one]);
            f.op(Op::Mul, &[share, slope])
        });
        if smoothing == 0.0 {
            return OfRow { share, factor, rest: None, target };
        }
        let n = self.lengths();
        let args = vec![self.k.plain(factor), self.k.plain(n)];
        let rest = self.map(args, row.clone(), |f, a| {
            let each = f.constant(smoothing, DType::F32);
            let all = f.op(Op::Mul, &[a[0], each]);
            f.op(Op::Div, &[all, a[1]])
        });
        let args = vec![self.k.plain(factor)];
        let factor = self.map(args, row, |f, a| {
            let keep = f.constant(1.0 - smoothing, DType::F32);
            f.op(Op::Mul, &[a[0], keep])
        });
        OfRow { share, factor, rest: Some(rest), target }
    }

    /// The losses, from the logarithms of the sums, the targets' logits and whether rows count; with smoothed labels also
    /// from the means of the logits.
    fn loss(&mut self, row: [TileId; 3], mean: Option<TileId>) -> TileId {
        let (terms, smooth) = (self.terms, mean.is_some());
        let args = row.iter().chain(&mean).map(|x| self.k.plain(*x)).collect();
        // Not a product: a row that does not count may have a loss that is no number.
        self.map(args, vec![self.bm.clone()], |f, a| {
            let mut picked = a[1];
            if smooth {
                let keep = f.constant(1.0 - terms.smoothing, DType::F32);
                let rest = f.constant(terms.smoothing, DType::F32);
                let (of_target, of_all) =
                    (f.op(Op::Mul, &[picked, keep]), f.op(Op::Mul, &[a[3], rest]));
                picked = f.op(Op::Add, &[of_target, of_all]);
            }
            let mut loss = f.op(Op::Sub, &[a[0], picked]);
            if terms.z > 0.0 {
                let (z, square) = (f.constant(terms.z, DType::F32), f.op(Op::Mul, &[a[0], a[0]]));
                let more = f.op(Op::Mul, &[square, z]);
                loss = f.op(Op::Add, &[loss, more]);
            }
            let nothing = f.constant(0.0, DType::F32);
            let counts = f.op(Op::Gt, &[a[2], nothing]);
            f.op(Op::Select, &[counts, loss, nothing])
        })
    }

    /// Writes the gradient from column `col` on: `e * share`, less `factor` at the target, and less `rest` everywhere where labels are
    /// smoothed; with a cap, times its slope at the bounded logits `v`.
    fn gradient(&mut self, [e, v]: [TileId; 2], col: &Dim, of_row: &OfRow) {
        let Some(into) = self.gradient else { return };
        let (here, dtype, terms) = (self.columns(col), self.dtype, self.terms);
        let args = vec![self.k.plain(e), along(of_row.share, 0)];
        let shape = self.shape();
        let g = self.map(args, shape.clone(), |f, a| f.op(Op::Mul, &[a[0], a[1]]));
        // By itself, since it changes one column.
        let row = [along(here, 1), along(of_row.target, 0), along(of_row.factor, 0)];
        let args = std::iter::once(self.k.plain(g)).chain(row).collect();
        let mut g = self.map(args, shape.clone(), |f, a| {
            let hit = f.op(Op::Eq, &[a[1], a[2]]);
            let less = f.op(Op::Sub, &[a[0], a[3]]);
            f.op(Op::Select, &[hit, less, a[0]])
        });
        if of_row.rest.is_some() || terms.cap > 0.0 || dtype != DType::F32 {
            let mut args = vec![self.k.plain(g), self.k.plain(v)];
            args.extend(of_row.rest.map(|rest| along(rest, 0)));
            let smooth = of_row.rest.is_some();
            g = self.map(args, shape, |f, a| {
                let mut g = a[0];
                if smooth {
                    g = f.op(Op::Sub, &[g, a[2]]);
                }
                if terms.cap > 0.0 {
                    let square = f.op(Op::Mul, &[a[1], a[1]]);
                    let inverse = f.constant(1.0 / (terms.cap * terms.cap), DType::F32);
                    let lost = f.op(Op::Mul, &[square, inverse]);
                    let one = f.constant(1.0, DType::F32);
                    let slope = f.op(Op::Sub, &[one, lost]);
                    g = f.op(Op::Mul, &[g, slope]);
                }
                f.cast(g, dtype)
            });
        }
        self.k.store(into, vec![self.row0.clone(), self.begin.at(col)], g);
    }
}

/// `cap * tanh(x / cap)`
fn bounded(f: &mut FuncBuilder, x: ExprId, cap: f64) -> ExprId {
    let (inverse, cap) = (f.constant(1.0 / cap, DType::F32), f.constant(cap, DType::F32));
    let x = f.op(Op::Mul, &[x, inverse]);
    let x = f.op(Op::Tanh, &[x]);
    f.op(Op::Mul, &[x, cap])
}

/// Whether a column lies in a row of `n`; columns below 0 are asked for where tiles begin before the row.
fn in_row(f: &mut FuncBuilder, column: ExprId, n: ExprId, early: bool) -> ExprId {
    let below = f.op(Op::Lt, &[column, n]);
    if !early {
        return below;
    }
    let zero = f.constant_int(0, DType::I32);
    let behind = f.op(Op::Ge, &[column, zero]);
    f.op(Op::And, &[below, behind])
}

impl CrossEntropySpec {
    /// Without further terms.
    #[must_use]
    pub fn plain(dtype: DType, form: CrossEntropyForm) -> CrossEntropySpec {
        CrossEntropySpec { dtype, form, terms: CrossEntropyTerms::default() }
    }

    /// The tile program, with tile sizes `BM`, `BN`. With `whole`, `BN` must be at least `N`; without, rows are gone
    /// over in pieces three times.
    pub fn program(&self, name: &str, whole: bool) -> Kernel {
        self.program_in_units(name, whole, Units::ROWS, false)
    }

    /// The program whose tiles begin at units of memory. With `single`, tiles have one row, and the target's logit is read by itself
    /// instead of being picked out of the row.
    fn program_in_units(&self, name: &str, whole: bool, units: Units, single: bool) -> Kernel {
        let CrossEntropySpec { dtype, form, terms } = *self;
        let smooth = terms.smoothing > 0.0;
        let (in_place, losses) =
            (form == CrossEntropyForm::InPlace, form == CrossEntropyForm::Losses);
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ldx"]);
        let bm = if single { Dim::new(1) } else { k.tile("BM") };
        let bn = k.tile("BN");
        let access = if in_place { Access::InOut } else { Access::In };
        let x = k.param("X", dtype, lines("M", "N", "ldx"), access);
        let rows = || Layout::row_major(&[Dim::sym("M")]);
        let targets = k.param("T", DType::I64, rows(), Access::In);
        let factors = if in_place { Layout::row_major(&[Dim::new(1)]) } else { rows() };
        let scale = (!losses).then(|| k.param("S", DType::F32, factors, Access::In));
        let loss = k.param("L", DType::F32, rows(), Access::Out);
        let gradient = match form {
            CrossEntropyForm::InPlace => Some(x),
            CrossEntropyForm::Beside => {
                Some(k.param("G", dtype, lines("M", "N", "ldx"), Access::Out))
            }
            CrossEntropyForm::Losses => None,
        };
        let logs = losses.then(|| k.param("Z", DType::F32, rows(), Access::Out));
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&bm));
        let row0 = pm * &bm;
        let (zero, row) = (Dim::new(0), vec![bm.clone()]);
        let t = k.load(targets, vec![row0.clone()], row.clone());
        let s = scale.map(|scale| {
            if in_place {
                let s = k.load(scale, vec![zero.clone()], vec![Dim::new(1)]);
                return Operand { tile: k.reshape(s, vec![]), along: vec![] };
            }
            let s = k.load(scale, vec![row0.clone()], row.clone());
            k.plain(s)
        });
        let begin = Begin::new(&row0, units);
        let mut b = Builder { k, dtype, terms, x, gradient, bm, bn, row0: row0.clone(), begin };
        // A target that wraps to a column is outside, and then its row counts nothing.
        let args = vec![b.k.plain(t)];
        let target = b.map(args, row.clone(), |f, a| f.cast(a[0], DType::I32));
        let v = whole.then(|| b.logits(&zero));
        let (max, sum, logit, total, e) = match v {
            Some(v) => {
                let max = b.k.reduce(ReduceKind::Max, v, 1, None);
                // Between two reductions: its address has come, and nothing is written yet.
                let known = single.then(|| b.logit(target));
                let e = b.exponentials(v, max);
                let sum = b.k.reduce(ReduceKind::Sum, e, 1, None);
                let logit = known.unwrap_or_else(|| {
                    let picked = b.picked(v, &zero, target);
                    b.k.reduce(ReduceKind::Sum, picked, 1, None)
                });
                let total = smooth.then(|| {
                    let inside = b.inside(v, &zero);
                    b.k.reduce(ReduceKind::Sum, inside, 1, None)
                });
                (max, sum, logit, total, Some([e, v]))
            }
            None => {
                let [max] = b.over_pieces("piece1", [ReduceKind::Max], |_, v, _| [v]);
                let known = single.then(|| b.logit(target));
                let sums = ReduceKind::Sum;
                let (sum, logit, total) = match (known, smooth) {
                    (None, true) => {
                        let [sum, logit, total] =
                            b.over_pieces("piece2", [sums; 3], |b, v, col| {
                                let exponentials = b.exponentials(v, max);
                                [exponentials, b.picked(v, col, target), b.inside(v, col)]
                            });
                        (sum, logit, Some(total))
                    }
                    (None, false) => {
                        let [sum, logit] = b.over_pieces("piece2", [sums; 2], |b, v, col| {
                            [b.exponentials(v, max), b.picked(v, col, target)]
                        });
                        (sum, logit, None)
                    }
                    (Some(logit), true) => {
                        let [sum, total] = b.over_pieces("piece2", [sums; 2], |b, v, col| {
                            [b.exponentials(v, max), b.inside(v, col)]
                        });
                        (sum, logit, Some(total))
                    }
                    (Some(logit), false) => {
                        let [sum] =
                            b.over_pieces("piece2", [sums], |b, v, _| [b.exponentials(v, max)]);
                        (sum, logit, None)
                    }
                };
                (max, sum, logit, total, None)
            }
        };
        let mean = total.map(|total| {
            let n = b.lengths();
            let args = vec![b.k.plain(total), b.k.plain(n)];
            b.map(args, row.clone(), |f, a| f.op(Op::Div, &[a[0], a[1]]))
        });
        // Whether the row counts, as a factor.
        let n = b.k.iota(DType::I64, 0, Dim::sym("N"), vec![Dim::new(1)]);
        let n = b.k.reshape(n, vec![]);
        let scalar = |tile| Operand { tile, along: vec![] };
        let args = vec![b.k.plain(t), scalar(n)];
        let counts = b.map(args, row.clone(), |f, a| {
            let zero = f.constant_int(0, DType::I64);
            let low = f.op(Op::Ge, &[a[0], zero]);
            let high = f.op(Op::Lt, &[a[0], a[1]]);
            let both = f.op(Op::And, &[low, high]);
            f.cast(both, DType::F32)
        });
        let args = vec![b.k.plain(sum), b.k.plain(max)];
        let log = b.map(args, row.clone(), |f, a| {
            let log = f.op(Op::Log, &[a[0]]);
            f.op(Op::Add, &[log, a[1]])
        });
        // The gradient first: losses wait for the logit.
        if let Some(s) = s {
            let args = vec![b.k.plain(counts), s];
            let factor = b.map(args, row, |f, a| f.op(Op::Mul, &[a[0], a[1]]));
            let of_row = b.of_row([factor, sum, log, target]);
            match e {
                Some(e) => b.gradient(e, &zero, &of_row),
                None => {
                    let pieces = b.begin.span.ceil_div(&b.bn);
                    let (var, _) = b.k.begin_for("piece3", Dim::new(0), pieces, &[]);
                    let col = var * &b.bn;
                    let v = b.logits(&col);
                    let e = b.exponentials(v, max);
                    b.gradient([e, v], &col, &of_row);
                    b.k.end_for(&[]);
                }
            }
        }
        let value = b.loss([log, logit, counts], mean);
        b.k.store(loss, vec![row0.clone()], value);
        if let Some(logs) = logs {
            b.k.store(logs, vec![row0], log);
        }
        b.k.finish()
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
        let program = |whole, units| self.program_in_units(name, whole, units, false);
        // Shorter rows in registers are as soon done one element at a time, on an H200.
        let from = if self.dtype.bits() == 16 { WHOLE_FROM } else { WIDE_WHOLE_FROM };
        let (dtype, whole_from) = (self.dtype, Some(from));
        let rows = Lines { dtype, distances: &["ldx"], whole_from, least: 4 };
        let picked = whole_or_pieces(arch, size, &rows, program)?;
        let Form { mut kernel, mut schedule, whole, units } = picked;
        let lines = schedule.lines;
        let rows = schedule.tiles.get("BM").copied().unwrap_or(1);
        // The threads of a row meet before they write over its logits, except those of a single warp.
        let meet = lines.lanes > 32 || self.form != CrossEntropyForm::InPlace;
        if meet && lines.lanes >= 32 && rows == i64::from(lines.threads / lines.lanes) {
            kernel = self.program_in_units(name, whole, units, true);
            schedule.tiles.remove("BM");
            schedule.lines.threads = lines.lanes;
            schedule.blocks_per_sm = (schedule.blocks_per_sm * rows as u32).min(32);
        }
        // A row's largest, its sum and the logit at its target are exchanged within one warp together: registers that
        // the picker does not count.
        // So is what a cap needs: the hyperbolic tangent, and the bounded logits beside the exponentials.
        if schedule.lines.lanes <= 32 || self.terms.cap > 0.0 {
            schedule.blocks_per_sm = (schedule.blocks_per_sm / 2).max(1);
        }
        Ok((kernel, schedule))
    }
}
