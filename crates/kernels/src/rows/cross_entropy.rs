//! Cross-entropy of rows of logits, alone or with its gradient.

use super::program::{Begin, Units, along, exponential, func, lines, sizes, whole_or_pieces};
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
/// [`CrossEntropyForm`] says which of them are written, and what `s` is. A target outside `0..N` is ignored: its loss is 0, and so
/// is its row's gradient. Size symbols: `M`, `N`, and `ldx`, the distance in elements between rows. A row that a tile holds
/// whole, or that shared memory keeps, is read once and written once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrossEntropySpec {
    /// Type of the logits, and of the gradient.
    pub dtype: DType,
    /// What is written.
    pub form: CrossEntropyForm,
}

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
    x: ParamId,
    gradient: Option<ParamId>,
    bm: Dim,
    bn: Dim,
    row0: Dim,
    begin: Begin,
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

    /// The logits from column `col` on, in f32.
    fn logits(&mut self, col: &Dim) -> TileId {
        let at = vec![self.row0.clone(), self.begin.at(col)];
        let (fill, shape) = (Value::Float(f64::NEG_INFINITY), self.shape());
        let raw = self.k.load_with(self.x, at, vec![1, 1], fill, shape.clone());
        let args = vec![self.k.plain(raw)];
        self.k.map(Func::cast(self.dtype, DType::F32), args, shape)
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

    /// Writes the gradient from column `col` on: `e * share`, less `factor` at the target.
    fn gradient(&mut self, e: TileId, col: &Dim, [share, factor, target]: [TileId; 3]) {
        let Some(into) = self.gradient else { return };
        let (here, dtype) = (self.columns(col), self.dtype);
        let args = vec![
            self.k.plain(e),
            along(share, 0),
            along(factor, 0),
            along(here, 1),
            along(target, 0),
        ];
        let shape = self.shape();
        let g = self.map(args, shape, |f, a| {
            let hit = f.op(Op::Eq, &[a[3], a[4]]);
            let nothing = f.constant(0.0, DType::F32);
            let off = f.op(Op::Select, &[hit, a[2], nothing]);
            let share = f.op(Op::Mul, &[a[0], a[1]]);
            let g = f.op(Op::Sub, &[share, off]);
            f.cast(g, dtype)
        });
        self.k.store(into, vec![self.row0.clone(), self.begin.at(col)], g);
    }
}

impl CrossEntropySpec {
    /// The tile program, with tile sizes `BM`, `BN`. With `whole`, `BN` must be at least `N`; without, rows are gone
    /// over in pieces three times.
    pub fn program(&self, name: &str, whole: bool) -> Kernel {
        self.program_in_units(name, whole, Units::ROWS)
    }

    /// The program whose tiles begin at units of memory.
    fn program_in_units(&self, name: &str, whole: bool, units: Units) -> Kernel {
        let CrossEntropySpec { dtype, form } = *self;
        let (in_place, losses) =
            (form == CrossEntropyForm::InPlace, form == CrossEntropyForm::Losses);
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ldx"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
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
        let mut b = Builder { k, dtype, x, gradient, bm, bn, row0: row0.clone(), begin };
        // A target that wraps to a column is outside, and then its row counts nothing.
        let args = vec![b.k.plain(t)];
        let target = b.map(args, row.clone(), |f, a| f.cast(a[0], DType::I32));
        let v = whole.then(|| b.logits(&zero));
        let (max, sum, logit, e) = match v {
            Some(v) => {
                let max = b.k.reduce(ReduceKind::Max, v, 1, None);
                let e = b.exponentials(v, max);
                let sum = b.k.reduce(ReduceKind::Sum, e, 1, None);
                let picked = b.picked(v, &zero, target);
                (max, sum, b.k.reduce(ReduceKind::Sum, picked, 1, None), Some(e))
            }
            None => {
                let [max] = b.over_pieces("piece1", [ReduceKind::Max], |_, v, _| [v]);
                let kinds = [ReduceKind::Sum, ReduceKind::Sum];
                let [sum, logit] = b.over_pieces("piece2", kinds, |b, v, col| {
                    [b.exponentials(v, max), b.picked(v, col, target)]
                });
                (max, sum, logit, None)
            }
        };
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
        let args = [log, logit, counts].iter().map(|x| b.k.plain(*x)).collect();
        // Not a product: a row that does not count may have a loss that is no number.
        let value = b.map(args, row.clone(), |f, a| {
            let loss = f.op(Op::Sub, &[a[0], a[1]]);
            let nothing = f.constant(0.0, DType::F32);
            let counts = f.op(Op::Gt, &[a[2], nothing]);
            f.op(Op::Select, &[counts, loss, nothing])
        });
        b.k.store(loss, vec![row0.clone()], value);
        if let Some(logs) = logs {
            b.k.store(logs, vec![row0], log);
        }
        let Some(s) = s else { return b.k.finish() };
        let args = vec![b.k.plain(counts), s];
        let factor = b.map(args, row.clone(), |f, a| f.op(Op::Mul, &[a[0], a[1]]));
        let args = vec![b.k.plain(factor), b.k.plain(sum)];
        let share = b.map(args, row, |f, a| f.op(Op::Div, &[a[0], a[1]]));
        match e {
            Some(e) => b.gradient(e, &zero, [share, factor, target]),
            None => {
                let pieces = b.begin.span.ceil_div(&b.bn);
                let (var, _) = b.k.begin_for("piece3", Dim::new(0), pieces, &[]);
                let col = var * &b.bn;
                let v = b.logits(&col);
                let e = b.exponentials(v, max);
                b.gradient(e, &col, [share, factor, target]);
                b.k.end_for(&[]);
            }
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
        let (kernel, mut schedule) =
            whole_or_pieces(arch, size, (self.dtype, &["ldx"]), |whole, units| {
                self.program_in_units(name, whole, units)
            })?;
        // A row's largest, its sum and the logit at its target are exchanged within one warp together: registers that
        // the picker does not count.
        if schedule.lines.lanes <= 32 {
            schedule.blocks_per_sm = (schedule.blocks_per_sm / 2).max(1);
        }
        Ok((kernel, schedule))
    }
}
