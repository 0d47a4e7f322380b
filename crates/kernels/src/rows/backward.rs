//! Gradients of normalisations.
//!
//! ```text
//! parts:  block p has every P-th row: dX of each, and over its rows the sums for the scale and the shift -> PW[p, n], PB[p, n]
//! finish: one more kernel adds the parts in their order                                                      -> dscale, dshift
//! ```
//!
//! `X` and `DY` are read once. The numbers of the rows (mean, inverse deviation) are worked out again, from the row
//! that is in registers anyway. How many parts there are depends on the sizes alone, so every sum has one order.

use super::program::{along, func, lines, sizes};
use super::{RowOp, RowSpec};
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Arch, Streams};
use tilewright_expr::{ExprId, Func, FuncBuilder, Op, Value};
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_lower_gpu::{GpuSchedule, LinesKnobs};
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType,
};

/// The gradient of a normalisation of the rows of `X[M, N]`, for all sizes: `DX[M, N]` from `DY[M, N]`, and the parts
/// of the gradients of the vectors.
///
/// With `x'` the row less its mean (RMS normalisation: the row), `r = 1 / sqrt(mean(x'^2) + eps)`, and
/// `g = DY * scale`, in f32:
///
/// ```text
/// DX = r * (g - mean(g) - x' * r^2 * mean(g * x'))        RMS normalisation: without mean(g)
/// PW[p] = sum over p's rows of DY * x' * r
/// PB[p] = sum over p's rows of DY                         layer normalisation only
/// ```
///
/// With `added`, `A[M, N]` is one more gradient of `X` (which goes on beside the normalisation), and `DX` has it added.
///
/// Size symbols: `M`, `N`; `ld`, the distance in elements between rows of all matrices; `P` parts of `C` turns each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormBackwardSpec {
    /// [`RowOp::LayerNorm`] or [`RowOp::RmsNorm`].
    pub op: RowOp,
    /// Type of matrices and vectors.
    pub dtype: DType,
    /// Another gradient of the rows is added.
    pub added: bool,
}

/// Kernels of a gradient, one after the other.
#[derive(Clone, Debug)]
pub struct NormBackwardPlan {
    /// Parameters `X`, `DY`, `scale`, `A` if it is added, `DX`, `PW`, `PB`.
    pub parts: (Kernel, GpuSchedule),
    /// Parameters `PW`, `DW` (scale), and `PB`, `DB` (shift) for a layer normalisation; sizes `N` and `P`.
    pub finish: (Kernel, GpuSchedule),
    /// The size `P`.
    pub parts_count: i64,
    /// The size `C`.
    pub turns: i64,
}

/// Multiprocessors of the device that plans are made for.
const PROCESSORS: i64 = 132;
/// Elements of a row that a thread shall have, and has at most.
const EACH: i64 = 16;
const EACH_MOST: i64 = 32;
/// Turns whose loads are under way, the one that is worked on among them: with more, reads and writes are in each other's way.
const AHEAD: i64 = 2;
/// Shared memory of a multiprocessor that blocks may share.
const SHARED_BYTES: i64 = 220 << 10;

/// Sums of `N` columns, of `P` parts each.
fn parts() -> Layout {
    let axis = |extent: &str, stride: Dim| Axis { extent: Dim::sym(extent), stride, block: None };
    Layout { axes: vec![axis("P", Dim::sym("N")), axis("N", Dim::new(1))], offset: Dim::new(0) }
}

fn up(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

impl NormBackwardSpec {
    fn eps(&self) -> Result<(f64, bool)> {
        match self.op {
            RowOp::LayerNorm { eps } => Ok((eps, true)),
            RowOp::RmsNorm { eps } => Ok((eps, false)),
            _ => Err(Error::unsupported("the gradient of what is no normalisation")),
        }
    }

    /// The tile program, with tile sizes `BM`, `BN`; `BN` must be at least `N`.
    ///
    /// # Errors
    /// Unsupported for anything but normalisations.
    pub fn program(&self, name: &str) -> Result<Kernel> {
        let (eps, centred) = self.eps()?;
        let dtype = self.dtype;
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ld", "P", "C"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let matrix = || lines("M", "N", "ld");
        let x = k.param("X", dtype, matrix(), Access::In);
        let dy = k.param("DY", dtype, matrix(), Access::In);
        let scale = k.param("scale", dtype, Layout::row_major(&[Dim::sym("N")]), Access::In);
        let other = self.added.then(|| k.param("A", dtype, matrix(), Access::In));
        let dx = k.param("DX", dtype, matrix(), Access::Out);
        let pw = k.param("PW", DType::F32, parts(), Access::Out);
        let pb = centred.then(|| k.param("PB", DType::F32, parts(), Access::Out));
        let part = k.grid("part", Dim::sym("P"));
        let (plane, row, zero) = (vec![bm.clone(), bn.clone()], vec![bm.clone()], Dim::new(0));
        let n = Dim::sym("N");
        let map = |k: &mut KernelBuilder,
                   shape: &[Dim],
                   args: Vec<Operand>,
                   f: &dyn Fn(&mut FuncBuilder, &[ExprId]) -> ExprId| {
            let types: Vec<DType> = args.iter().map(|a| k.ty(a.tile).dtype).collect();
            k.map(func(&types, |b, a| f(b, a)), args, shape.to_vec())
        };
        let wide = |f: &mut FuncBuilder, a: &[ExprId]| f.cast(a[0], DType::F32);
        let scalar = |tile| Operand { tile, along: vec![] };

        let vector = k.load(scale, vec![zero.clone()], vec![bn.clone()]);
        let args = vec![k.plain(vector)];
        let w = map(&mut k, std::slice::from_ref(&bn), args, &wide);
        let count = k.iota(DType::I32, 0, n.clone(), vec![Dim::new(1)]);
        let count = k.reshape(count, vec![]);
        let inverse_n = map(&mut k, &[], vec![scalar(count)], &|f, a| {
            let n = f.cast(a[0], DType::F32);
            let one = f.constant(1.0, DType::F32);
            f.op(Op::Div, &[one, n])
        });
        let start = |k: &mut KernelBuilder| {
            k.full(Value::Float(0.0), TileType::new(DType::F32, [bn.clone()]))
        };
        let mut init = vec![start(&mut k)];
        if centred {
            init.push(start(&mut k));
        }
        let (turn, carried) = k.begin_for("turn", Dim::new(0), Dim::sym("C"), &init);
        // Blocks read neighbouring rows at a time.
        let row0 = (turn * Dim::sym("P") + &part) * &bm;
        let at = vec![row0, zero.clone()];
        let load = |k: &mut KernelBuilder, p| {
            let raw = k.load(p, at.clone(), plane.clone());
            let args = vec![k.plain(raw)];
            map(k, &plane, args, &wide)
        };
        let (x, dy) = (load(&mut k, x), load(&mut k, dy));
        let other = other.map(|p| load(&mut k, p));
        let product = |f: &mut FuncBuilder, a: &[ExprId]| f.op(Op::Mul, &[a[0], a[1]]);
        let args = vec![k.plain(dy), along(w, 1)];
        let g = map(&mut k, &plane, args, &product);
        let mean = |k: &mut KernelBuilder, of: TileId, limit: Option<Dim>| {
            let sum = k.reduce(ReduceKind::Sum, of, 1, limit);
            let args = vec![k.plain(sum), scalar(inverse_n)];
            map(k, &row, args, &product)
        };
        // The row less its mean. What lies behind the row counts for the variance only.
        let (d, limit) = match centred {
            false => (x, None),
            true => {
                let m = mean(&mut k, x, None);
                let args = vec![k.plain(x), along(m, 0)];
                let less = |f: &mut FuncBuilder, a: &[ExprId]| f.op(Op::Sub, &[a[0], a[1]]);
                (map(&mut k, &plane, args, &less), Some(n))
            }
        };
        let args = vec![k.plain(d), k.plain(d)];
        let square = map(&mut k, &plane, args, &product);
        // Of this come the gradient of the scale and the slope, in a multiply-add each.
        let args = vec![k.plain(dy), k.plain(d)];
        let both = map(&mut k, &plane, args, &product);
        let var = mean(&mut k, square, limit);
        let args = vec![k.plain(both), along(w, 1)];
        let sloped = map(&mut k, &plane, args, &product);
        let slope = mean(&mut k, sloped, None);
        let level = centred.then(|| mean(&mut k, g, None));
        let args = vec![k.plain(var)];
        let r = map(&mut k, &row, args, &|f, a| {
            let eps = f.constant(eps, DType::F32);
            let v = f.op(Op::Add, &[a[0], eps]);
            f.op(Op::Rsqrt, &[v])
        });
        let args = vec![k.plain(r), k.plain(slope)];
        let slope = map(&mut k, &row, args, &|f, a| {
            let square = f.op(Op::Mul, &[a[0], a[0]]);
            f.op(Op::Mul, &[square, a[1]])
        });
        // r * g - x' * (r * slope) - r * mean(g), in two multiply-adds an element.
        let args = vec![k.plain(r), k.plain(slope)];
        let steep = map(&mut k, &row, args, &|f, a| {
            let product = f.op(Op::Mul, &[a[0], a[1]]);
            f.op(Op::Neg, &[product])
        });
        let low = level.map(|l| {
            let args = vec![k.plain(r), k.plain(l)];
            map(&mut k, &row, args, &|f, a| {
                let product = f.op(Op::Mul, &[a[0], a[1]]);
                f.op(Op::Neg, &[product])
            })
        });
        let mut args = vec![k.plain(g), k.plain(d), along(r, 0), along(steep, 0)];
        args.extend(low.map(|l| along(l, 0)));
        args.extend(other.map(|o| k.plain(o)));
        let result = map(&mut k, &plane, args, &|f, a| {
            let mut v = match centred {
                true => f.op(Op::Fma, &[a[1], a[3], a[4]]),
                false => f.op(Op::Mul, &[a[1], a[3]]),
            };
            v = f.op(Op::Fma, &[a[0], a[2], v]);
            if let Some(other) = a.get(4 + usize::from(centred)) {
                v = f.op(Op::Add, &[v, *other]);
            }
            f.cast(v, dtype)
        });
        k.store(dx, at, result);
        let args = vec![k.plain(both), along(r, 0)];
        let share = map(&mut k, &plane, args, &product);
        let mut next = Vec::new();
        for (old, new) in carried.into_iter().zip([share, dy]) {
            let sum = k.reduce(ReduceKind::Sum, new, 0, None);
            let args = vec![k.plain(old), k.plain(sum)];
            let add = Func::binary(Op::Add, DType::F32);
            next.push(k.map(add, args, vec![bn.clone()]));
        }
        let sums = k.end_for(&next);
        for (param, sum) in [Some(pw), pb].into_iter().flatten().zip(sums) {
            let line = k.reshape(sum, vec![Dim::new(1), bn.clone()]);
            k.store(param, vec![part.clone(), zero.clone()], line);
        }
        Ok(k.finish())
    }

    /// Adds the parts of each vector, all of a column at once.
    fn finish(&self) -> Result<Kernel> {
        let (_, centred) = self.eps()?;
        let mut k = KernelBuilder::new("norm_backward_finish");
        sizes(&mut k, &["N", "P"]);
        let (bp, bn) = (k.tile("BP"), k.tile("BN"));
        let mut vectors = Vec::new();
        for names in &[["PW", "DW"], ["PB", "DB"]][..1 + usize::from(centred)] {
            let parts = k.param(names[0], DType::F32, parts(), Access::In);
            let line = Layout::row_major(&[Dim::sym("N")]);
            vectors.push((parts, k.param(names[1], self.dtype, line, Access::Out)));
        }
        let col = k.grid("pn", Dim::sym("N").ceil_div(&bn)) * &bn;
        let from = vec![Dim::new(0), col.clone()];
        let load =
            |(p, _): &(ParamId, ParamId)| k.load(*p, from.clone(), vec![bp.clone(), bn.clone()]);
        let planes: Vec<TileId> = vectors.iter().map(load).collect();
        for (plane, (_, result)) in planes.into_iter().zip(vectors) {
            let sum = k.reduce(ReduceKind::Sum, plane, 0, None);
            let args = vec![k.plain(sum)];
            let sum = k.map(Func::cast(DType::F32, self.dtype), args, vec![bn.clone()]);
            k.store(result, vec![col.clone()], sum);
        }
        Ok(k.finish())
    }

    /// The kernels and how many parts they have.
    ///
    /// # Errors
    /// A size without a value; unsupported when a row has more elements than the registers of a block hold.
    pub fn plan(&self, arch: Arch, size: &dyn Fn(&str) -> Option<i64>) -> Result<NormBackwardPlan> {
        let need =
            |name: &str| size(name).ok_or_else(|| Error::bug(format!("{name} has no value")));
        let (m, n, ld) = (need("M")?, need("N")?, need("ld")?);
        let bytes = i64::from(self.dtype.bits() / 8);
        let vector = 16 / bytes;
        let mut aligned = vector;
        while n % aligned != 0 || ld % aligned != 0 {
            aligned /= 2;
        }
        // Few columns too many, then about EACH elements a thread.
        let forms = (3..=10).map(|p| 1i64 << p).filter_map(|lanes| {
            let each = up(up(n, vector), lanes) * vector;
            (each <= EACH_MOST).then_some((lanes * each, (each - EACH).abs(), lanes, each))
        });
        let (cols, _, lanes, each) = forms.min().ok_or_else(|| {
            Error::unsupported(format!("the gradient of a normalisation of {n} columns"))
        })?;
        let threads = lanes.max(256);
        let bm = threads / lanes;
        let shelf = AHEAD * (2 + i64::from(self.added)) * bm * cols * bytes;
        // Elements one by one have an address each.
        let registers = 48 + each * (if aligned == 1 { 7 } else { 5 } + i64::from(self.added));
        let blocks = (65536 / threads / registers).min(SHARED_BYTES / shelf).clamp(1, 4);
        let all = up(m, bm);
        let turns = up(all, (PROCESSORS * blocks).min(all.max(1)));
        let parts_count = up(all, turns.max(1)).max(1);
        let mut schedule = GpuSchedule::hopper(&[("BM", bm), ("BN", cols)]);
        schedule.arch = arch;
        schedule.persistent = false;
        schedule.vector = aligned as u32;
        schedule.blocks_per_sm = blocks as u32;
        schedule.lines = LinesKnobs {
            threads: threads as u32,
            lanes: lanes as u32,
            vector: aligned as u32,
            early: true,
            ahead: false,
            kept: 0,
            fetched: if turns > 1 { AHEAD as u32 } else { 0 },
            streams: Streams::Cached,
            ragged: false,
        };
        // Nothing lies behind rows that fill their tile: no element is asked whether it does.
        if cols == n {
            schedule.sizes.insert("N".into(), n);
            if ld == n {
                schedule.sizes.insert("ld".into(), n);
            }
        }
        let finish = self.finish()?;
        let few = |name: &str| if name == "P" { Some(parts_count) } else { size(name) };
        let last = GpuSchedule::lines_for(&finish, arch, &few)?
            .ok_or_else(|| Error::unsupported(format!("sums of {parts_count} parts")))?;
        Ok(NormBackwardPlan {
            parts: (self.program("norm_backward")?, schedule),
            finish: (finish, last),
            parts_count,
            turns,
        })
    }
}

impl RowSpec {
    /// The gradient of this normalisation.
    pub fn backward(&self) -> NormBackwardSpec {
        NormBackwardSpec { op: self.op, dtype: self.dtype, added: false }
    }
}
