//! The tile program of attention.
//!
//! ```text
//! m = -inf, l = 0, acc[BQ,E] = 0
//! for each block of keys:
//!   s   = q k^T, hidden ones -inf            [BQ,BT]
//!   m'  = max(m, rowmax s)
//!   p   = 2^(c (s - m')),  r = 2^(c (m - m'))    c = scale log2 e
//!   l   = l r + rowsum p
//!   acc = acc r + p v
//! o = acc / l
//! ```
//!
//! The scale is folded into the exponent. With a mask the score is `scale s + mask` in natural units, so that
//! masks of the largest negative number stay finite.

use crate::attention::problem::MaskKind;
use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Op, Value};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType,
};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Causal {
    /// All.
    No,
    /// Query `i` those up to `i + T - S`.
    EndTogether,
    /// Query `i` those up to `i + ahead`, a size symbol.
    Ahead,
}

/// Attention for all lengths and layouts.
///
/// Size symbols: `B`, `H`, `S`, `T` (batches, heads, queries, keys), `G` heads of keys and values, `R` heads
/// of queries for each of them, with [`Causal::Ahead`] also `ahead`; strides `qb qh qs`, `kb kh ks`,
/// `vb vh vs`, `ob oh os`, and of a mask `mb mh ms`.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Type of queries, keys and values.
    pub dtype: DType,
    /// Type of the result.
    pub result: DType,
    /// f32 operands are rounded to TF32.
    pub tf32: bool,
    /// Depth of queries and keys.
    pub depth: i64,
    /// Depth of values.
    pub width: i64,
    /// Which keys a query sees.
    pub causal: Causal,
    /// Kind and type of a mask, and whether it differs between rows.
    pub mask: Option<(MaskKind, DType, bool)>,
    /// Factor of the scores.
    pub scale: f64,
    /// Store the log-sum-exp of each row too.
    pub lse: bool,
    /// A row that sees nothing is 0, not NaN.
    pub zeros: bool,
}

/// `f(params) -> result`, a function of a few scalars.
pub(crate) fn func(
    params: &[DType],
    f: impl FnOnce(&mut FuncBuilder, &[tilewright_expr::ExprId]) -> tilewright_expr::ExprId,
) -> Func {
    let mut b = FuncBuilder::new();
    let names = ["x", "y", "z", "w"];
    let args: Vec<_> = params.iter().zip(names).map(|(t, n)| b.param(n, *t)).collect();
    let result = f(&mut b, &args);
    b.finish(result)
}

/// `2^x`, with 0 for what would be below the normal numbers: one instruction on GPUs.
pub(crate) fn exp2(f: &mut FuncBuilder, x: tilewright_expr::ExprId) -> tilewright_expr::ExprId {
    let least = f.constant(-126.0, DType::F32);
    let below = f.op(Op::Lt, &[x, least]);
    let zero = f.constant(0.0, DType::F32);
    let power = f.op(Op::Exp2, &[x]);
    f.op(Op::Select, &[below, zero, power])
}

/// Sums, maxima and weights of the parts: `P`, `M`, `L`.
fn parts(k: &mut KernelBuilder, width: i64, access: Access) -> (ParamId, ParamId, ParamId) {
    let rows = ["N", "B", "H", "S"].map(Dim::sym);
    let plane = [rows.as_slice(), &[Dim::new(width)]].concat();
    let p = k.param("P", DType::F32, Layout::row_major(&plane), access);
    let m = k.param("M", DType::F32, Layout::row_major(&rows), access);
    let l = k.param("L", DType::F32, Layout::row_major(&rows), access);
    (p, m, l)
}

/// Extent of a tile along a depth: whole instructions, and lines of at least 64 bytes where the depth has
/// them.
pub(crate) fn padded(depth: i64, dtype: DType) -> i64 {
    let line = 512 / i64::from(dtype.bits());
    if depth <= line / 2 { line / 2 } else { (depth + line - 1) / line * line }
}

impl AttentionSpec {
    /// Extents of tiles along the depths of keys and of values.
    pub fn depths(&self) -> (i64, i64) {
        (padded(self.depth, self.dtype), padded(self.width, self.dtype))
    }

    /// The tile program, with tile sizes `BQ` and `BT`.
    pub fn program(&self, name: &str) -> Kernel {
        self.build(name, false)
    }

    /// The program of keys in parts: part `ps` of `N` takes `each` blocks of keys and stores its sums to
    /// `P[ps]`, a tensor `[N, B, H, S, width]`, and each row's maximum and sum of weights to `M[ps]` and
    /// `L[ps]`. [`AttentionSpec::combine_program`] adds the parts up, always in the same order.
    pub fn part_program(&self, name: &str) -> Kernel {
        self.build(name, true)
    }

    fn build(&self, name: &str, split: bool) -> Kernel {
        let mut k = KernelBuilder::new(name);
        let mut sizes = vec!["B", "H", "G", "R", "S", "T"];
        if split {
            sizes.extend(["N", "each"]);
        }
        if self.causal == Causal::Ahead {
            sizes.push("ahead");
        }
        sizes.extend(["qb", "qh", "qs", "kb", "kh", "ks", "vb", "vh", "vs"]);
        if !split {
            sizes.extend(["ob", "oh", "os"]);
        }
        if self.mask.is_some() {
            sizes.extend(["mb", "mh", "ms"]);
        }
        for size in sizes {
            let min = i64::from(matches!(size, "B" | "H" | "G" | "R" | "S"));
            k.symbol(Symbol { name: size.into(), range: Range { min, max: i32::MAX.into() } });
        }
        let (bq, bt) = (k.tile("BQ"), k.tile("BT"));
        let sym = |s: &str| Dim::sym(s);
        let (rows, keys) = (sym("S"), sym("T"));
        let param =
            |k: &mut KernelBuilder, name, dtype, extents: [Dim; 4], strides: [&str; 3], access| {
                let mut axes: Vec<Axis> = extents
                    .into_iter()
                    .zip(strides.map(Dim::sym).into_iter().chain([Dim::new(1)]))
                    .map(|(extent, stride)| Axis { extent, stride, block: None })
                    .collect();
                // An axis of one element has no neighbours.
                for axis in &mut axes {
                    if axis.extent.is(1) {
                        axis.stride = Dim::new(1);
                    }
                }
                k.param(name, dtype, Layout { axes, offset: Dim::new(0) }, access)
            };
        let (depth, width) = (Dim::new(self.depth), Dim::new(self.width));
        let q = [sym("B"), sym("H"), rows.clone(), depth.clone()];
        let q = param(&mut k, "Q", self.dtype, q, ["qb", "qh", "qs"], Access::In);
        let kk = [sym("B"), sym("G"), keys.clone(), depth];
        let kk = param(&mut k, "K", self.dtype, kk, ["kb", "kh", "ks"], Access::In);
        let v = [sym("B"), sym("G"), keys.clone(), width.clone()];
        let v = param(&mut k, "V", self.dtype, v, ["vb", "vh", "vs"], Access::In);
        let mask = self.mask.map(|(_, dtype, by_row)| {
            let by = if by_row { rows.clone() } else { Dim::new(1) };
            let extents = [sym("B"), sym("H"), by, keys.clone()];
            param(&mut k, "mask", dtype, extents, ["mb", "mh", "ms"], Access::In)
        });
        let o = [sym("B"), sym("H"), rows.clone(), width];
        let (o, sums) = if split {
            let (p, m, l) = parts(&mut k, self.part_width(), Access::Out);
            (p, Some((m, l)))
        } else {
            (param(&mut k, "O", self.result, o, ["ob", "oh", "os"], Access::Out), None)
        };
        let lse = (self.lse && !split).then(|| {
            let layout = Layout::row_major(&[sym("B"), sym("H"), rows.clone()]);
            k.param("lse", DType::F32, layout, Access::Out)
        });

        let piece = split.then(|| k.grid("ps", sym("N")));
        let (b, h) = (k.grid("pb", sym("B")), k.grid("ph", sym("H")));
        let blocks = rows.ceil_div(&bq);
        let p = k.grid("pq", blocks.clone());
        // Long rows first, so that short ones fill the end.
        let q0 =
            if self.causal == Causal::No { p * &bq } else { (blocks - &p - Dim::new(1)) * &bq };
        let kv_head = h.floor_div(&sym("R"));
        let (dk, dv) = self.depths();
        let (dk, dv) = (Dim::new(dk), Dim::new(dv));
        let matrix =
            |k: &mut KernelBuilder, p: ParamId, head: &Dim, row: &Dim, n: &Dim, w: &Dim| {
                let index = vec![b.clone(), head.clone(), row.clone(), Dim::new(0)];
                let tile = k.load(p, index, vec![Dim::new(1), Dim::new(1), n.clone(), w.clone()]);
                k.reshape(tile, vec![n.clone(), w.clone()])
            };
        let rounded = |k: &mut KernelBuilder, tile: TileId| match self.tf32 {
            true => {
                let (arg, shape) = (k.plain(tile), k.ty(tile).shape.clone());
                k.map(tilewright_lower_gpu::tf32_round(), vec![arg], shape)
            }
            false => tile,
        };
        let q_tile = matrix(&mut k, q, &h, &q0, &bq, &dk);
        let q_tile = rounded(&mut k, q_tile);
        let f32_tile = |shape: &[&Dim]| {
            TileType::new(DType::F32, shape.iter().map(|d| (*d).clone()).collect::<Vec<_>>())
        };
        let max = k.full(Value::Float(f64::NEG_INFINITY), f32_tile(&[&bq]));
        let sum = k.full(Value::Float(0.0), f32_tile(&[&bq]));
        let acc = k.full(Value::Float(0.0), f32_tile(&[&bq, &dv]));
        // Row i sees keys up to i + ahead.
        let ahead = match self.causal {
            Causal::Ahead => sym("ahead"),
            _ => keys.clone() - &rows,
        };
        let end = match self.causal {
            Causal::No => keys.clone(),
            _ => keys.min_with(&(q0.clone() + &bq + &ahead)),
        };
        let blocks = end.ceil_div(&bt);
        let (lo, hi) = match &piece {
            Some(piece) => {
                let lo = piece.clone() * &sym("each");
                (lo.clone(), blocks.min_with(&(lo + &sym("each"))))
            }
            None => (Dim::new(0), blocks),
        };
        let (t, carried) = k.begin_for("t", lo, hi, &[max, sum, acc]);
        let t0 = t * &bt;
        let k_tile = matrix(&mut k, kk, &kv_head, &t0, &bt, &dk);
        let k_tile = k.permute(k_tile, &[1, 0]);
        let k_tile = rounded(&mut k, k_tile);
        let v_tile = matrix(&mut k, v, &kv_head, &t0, &bt, &dv);
        let v_tile = rounded(&mut k, v_tile);
        let zero = k.full(Value::Float(0.0), f32_tile(&[&bq, &bt]));
        let dots = k.mma(zero, q_tile, k_tile, None);
        let plane = vec![bq.clone(), bt.clone()];
        let scores = self.scores(&mut k, dots, mask, &b, &h, &q0, &t0, &plane);
        let scores = self.hide(&mut k, scores, &q0, &t0, &ahead, &plane);
        let (max, sum, acc) = (carried[0], carried[1], carried[2]);
        let block_max = k.reduce(ReduceKind::Max, scores, 1, None);
        let row = vec![bq.clone()];
        let args = vec![k.plain(max), k.plain(block_max)];
        let new_max = k.map(Func::binary(Op::Max, DType::F32), args, row.clone());
        // Nothing visible yet: subtract 0, so that weights are 0 and not NaN.
        let safe = func(&[DType::F32], |f, a| {
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            let none = f.op(Op::Eq, &[a[0], low]);
            let zero = f.constant(0.0, DType::F32);
            let shift = f.op(Op::Select, &[none, zero, a[0]]);
            if self.folded() {
                let factor = f.constant(-self.factor(), DType::F32);
                f.op(Op::Mul, &[shift, factor])
            } else {
                shift
            }
        });
        let args = vec![k.plain(new_max)];
        let shift = k.map(safe, args, row.clone());
        let args = vec![k.plain(max), k.plain(shift)];
        let rescale = k.map(self.weight(), args, row.clone());
        let args = vec![k.plain(scores), Operand { tile: shift, along: vec![0] }];
        let p = k.map(self.weight(), args, plane.clone());
        let block_sum = k.reduce(ReduceKind::Sum, p, 1, None);
        let total = func(&[DType::F32; 3], |f, a| f.op(Op::Fma, &[a[0], a[1], a[2]]));
        let args = [sum, rescale, block_sum].map(|t| k.plain(t)).to_vec();
        let new_sum = k.map(total, args, row.clone());
        let args = vec![k.plain(acc), Operand { tile: rescale, along: vec![0] }];
        let shape = vec![bq.clone(), dv.clone()];
        let apart = self.dtype == DType::F32 && !self.tf32;
        let scaled = match apart {
            true => k.full(Value::Float(0.0), f32_tile(&[&bq, &dv])),
            false => k.map(Func::binary(Op::Mul, DType::F32), args.clone(), shape.clone()),
        };
        let weights = if self.dtype == DType::F32 {
            rounded(&mut k, p)
        } else {
            let arg = k.plain(p);
            k.map(Func::cast(DType::F32, self.dtype), vec![arg], plane)
        };
        let mut new_acc = k.mma(scaled, weights, v_tile, None);
        if apart {
            // Tensor cores drop the low digits of their sums: those of one block are added in f32.
            let args = [args, vec![k.plain(new_acc)]].concat();
            let add = func(&[DType::F32; 3], |f, a| f.op(Op::Fma, &[a[0], a[1], a[2]]));
            new_acc = k.map(add, args, shape.clone());
        }
        let results = k.end_for(&[new_max, new_sum, new_acc]);
        if let (Some(piece), Some((m, l))) = (piece, sums) {
            let one = || Dim::new(1);
            let out = k.reshape(results[2], vec![one(), one(), one(), bq.clone(), dv]);
            let at = |last: Vec<Dim>| {
                [vec![piece.clone(), b.clone(), h.clone(), q0.clone()], last].concat()
            };
            k.store(o, at(vec![Dim::new(0)]), out);
            for (param, tile) in [(m, results[0]), (l, results[1])] {
                let tile = k.reshape(tile, vec![one(), one(), one(), bq.clone()]);
                k.store(param, at(Vec::new()), tile);
            }
            return k.finish();
        }
        let args = vec![k.plain(results[1])];
        let inverse = k.map(self.inverse(), args, row.clone());
        let args = vec![k.plain(results[2]), Operand { tile: inverse, along: vec![0] }];
        let out = k.map(self.scaled(), args, shape);
        let out = k.reshape(out, vec![Dim::new(1), Dim::new(1), bq.clone(), dv]);
        k.store(o, vec![b.clone(), h.clone(), q0.clone(), Dim::new(0)], out);
        if let Some(lse) = lse {
            let args = vec![k.plain(results[0]), k.plain(results[1])];
            let total = k.map(self.log_sum(), args, row);
            let total = k.reshape(total, vec![Dim::new(1), Dim::new(1), bq]);
            k.store(lse, vec![b, h, q0], total);
        }
        k.finish()
    }

    /// Columns of the parts' sums: whole units of 16 bytes.
    pub(crate) fn part_width(&self) -> i64 {
        (self.width + 3) / 4 * 4
    }

    /// The program that adds up the parts of [`AttentionSpec::part_program`], with tile sizes `BR`, `BE`.
    pub fn combine_program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        for size in ["B", "H", "S", "N", "ob", "oh", "os"] {
            let min = i64::from(!size.starts_with('o'));
            k.symbol(Symbol { name: size.into(), range: Range { min, max: i32::MAX.into() } });
        }
        let (br, be) = (k.tile("BR"), k.tile("BE"));
        let (rows, sym) = (Dim::sym("S"), |s: &str| Dim::sym(s));
        let (p, m, l) = parts(&mut k, self.part_width(), Access::In);
        let extents = [sym("B"), sym("H"), rows.clone(), Dim::new(self.width)];
        let strides = [sym("ob"), sym("oh"), sym("os"), Dim::new(1)];
        let axis = |(extent, stride): (Dim, Dim)| Axis { extent, stride, block: None };
        let axes = extents.into_iter().zip(strides).map(axis).collect();
        let layout = Layout { axes, offset: Dim::new(0) };
        let o = k.param("O", self.result, layout, Access::Out);
        let lse = self.lse.then(|| {
            let layout = Layout::row_major(&[sym("B"), sym("H"), rows.clone()]);
            k.param("lse", DType::F32, layout, Access::Out)
        });
        let (b, h) = (k.grid("pb", sym("B")), k.grid("ph", sym("H")));
        let r0 = k.grid("pr", rows.ceil_div(&br)) * &br;
        let e0 = k.grid("pe", Dim::new(self.width).ceil_div(&be)) * &be;
        let one = || Dim::new(1);
        let (row, plane) = (vec![br.clone()], vec![br.clone(), be.clone()]);
        let f32s = |shape: &[Dim]| TileType::new(DType::F32, shape.to_vec());
        let max = k.full(Value::Float(f64::NEG_INFINITY), f32s(&row));
        let sum = k.full(Value::Float(0.0), f32s(&row));
        let acc = k.full(Value::Float(0.0), f32s(&plane));
        let (n, carried) = k.begin_for("n", Dim::new(0), sym("N"), &[max, sum, acc]);
        let at =
            |last: Vec<Dim>| [vec![n.clone(), b.clone(), h.clone(), r0.clone()], last].concat();
        let vector = |k: &mut KernelBuilder, param: ParamId| {
            let tile = k.load(param, at(Vec::new()), vec![one(), one(), one(), br.clone()]);
            k.reshape(tile, row.clone())
        };
        let (part_max, part_sum) = (vector(&mut k, m), vector(&mut k, l));
        let shape = vec![one(), one(), one(), br.clone(), be.clone()];
        let part = k.load(p, at(vec![e0.clone()]), shape);
        let part = k.reshape(part, plane.clone());
        let args = vec![k.plain(carried[0]), k.plain(part_max)];
        let new_max = k.map(Func::binary(Op::Max, DType::F32), args, row.clone());
        // Nothing visible: weight 0, not NaN.
        let weight = func(&[DType::F32; 2], |f, a| {
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            let none = f.op(Op::Eq, &[a[0], low]);
            let factor = f.constant(self.factor(), DType::F32);
            let zero = f.constant(0.0, DType::F32);
            let d = f.op(Op::Sub, &[a[0], a[1]]);
            let d = f.op(Op::Mul, &[d, factor]);
            let w = exp2(f, d);
            f.op(Op::Select, &[none, zero, w])
        });
        let weigh = |k: &mut KernelBuilder, x: TileId| {
            let args = vec![k.plain(x), k.plain(new_max)];
            k.map(weight.clone(), args, row.clone())
        };
        let (old, new) = (weigh(&mut k, carried[0]), weigh(&mut k, part_max));
        let mix = func(&[DType::F32; 4], |f, a| {
            let y = f.op(Op::Mul, &[a[2], a[3]]);
            f.op(Op::Fma, &[a[0], a[1], y])
        });
        let args = [carried[1], old, part_sum, new].map(|t| k.plain(t)).to_vec();
        let new_sum = k.map(mix.clone(), args, row.clone());
        let by_row = |tile: TileId| Operand { tile, along: vec![0] };
        let args = vec![k.plain(carried[2]), by_row(old), k.plain(part), by_row(new)];
        let new_acc = k.map(mix, args, plane.clone());
        let results = k.end_for(&[new_max, new_sum, new_acc]);
        let args = vec![k.plain(results[1])];
        let inverse = k.map(self.inverse(), args, row.clone());
        let args = vec![k.plain(results[2]), by_row(inverse)];
        let out = k.map(self.scaled(), args, plane);
        let out = k.reshape(out, vec![one(), one(), br.clone(), be]);
        k.store(o, vec![b.clone(), h.clone(), r0.clone(), e0], out);
        if let Some(lse) = lse {
            let args = vec![k.plain(results[0]), k.plain(results[1])];
            let total = k.map(self.log_sum(), args, row);
            let total = k.reshape(total, vec![one(), one(), br]);
            k.store(lse, vec![b, h, r0], total);
        }
        k.finish()
    }

    /// One over the sum of a row's weights: one division a row. Infinity where nothing is seen, whose sums of zero it makes NaN.
    fn inverse(&self) -> Func {
        func(&[DType::F32], |f, a| {
            let (zero, one) = (f.constant(0.0, DType::F32), f.constant(1.0, DType::F32));
            // The largest weight is 1: there is no sum where nothing is seen.
            let sum = match self.zeros {
                true => {
                    let none = f.op(Op::Eq, &[a[0], zero]);
                    f.op(Op::Select, &[none, one, a[0]])
                }
                false => a[0],
            };
            f.op(Op::Div, &[one, sum])
        })
    }

    /// A sum times a number of its row, as the result's type.
    fn scaled(&self) -> Func {
        func(&[DType::F32; 2], |f, a| {
            let y = f.op(Op::Mul, &[a[0], a[1]]);
            f.cast(y, self.result)
        })
    }

    /// Scores are multiplied by the scale within the exponent: the largest stays the largest.
    fn folded(&self) -> bool {
        self.scale > 0.0 && self.mask.is_none_or(|(kind, ..)| kind == MaskKind::Keep)
    }

    /// Factor of the exponent.
    fn factor(&self) -> f64 {
        if self.folded() { self.scale * std::f64::consts::LOG2_E } else { std::f64::consts::LOG2_E }
    }

    /// `2^(c (x - shift))`; when folded, `y` is the shift times `-c`.
    fn weight(&self) -> Func {
        func(&[DType::F32; 2], |f, a| {
            let factor = f.constant(self.factor(), DType::F32);
            let power = if self.folded() {
                f.op(Op::Fma, &[a[0], factor, a[1]])
            } else {
                let d = f.op(Op::Sub, &[a[0], a[1]]);
                f.op(Op::Mul, &[d, factor])
            };
            exp2(f, power)
        })
    }

    /// Log-sum-exp of scores from the maximum and the sum of a row.
    fn log_sum(&self) -> Func {
        func(&[DType::F32; 2], |f, a| {
            let unit = if self.folded() { self.scale } else { 1.0 };
            let unit = f.constant(unit, DType::F32);
            let log = f.op(Op::Log, &[a[1]]);
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            let none = f.op(Op::Eq, &[a[0], low]);
            let total = f.op(Op::Fma, &[a[0], unit, log]);
            f.op(Op::Select, &[none, low, total])
        })
    }

    /// What the scale and a mask make of the products.
    #[expect(clippy::too_many_arguments, reason = "where the block stands")]
    fn scores(
        &self,
        k: &mut KernelBuilder,
        dots: TileId,
        mask: Option<ParamId>,
        b: &Dim,
        h: &Dim,
        q0: &Dim,
        t0: &Dim,
        plane: &[Dim],
    ) -> TileId {
        let scale = self.scale;
        let Some((mask, (kind, dtype, by_row))) = mask.zip(self.mask) else {
            if self.folded() {
                return dots;
            }
            let scaled = func(&[DType::F32], |f, a| {
                let factor = f.constant(scale, DType::F32);
                f.op(Op::Mul, &[a[0], factor])
            });
            let args = vec![k.plain(dots)];
            return k.map(scaled, args, plane.to_vec());
        };
        let (row, n) =
            if by_row { (q0.clone(), plane[0].clone()) } else { (Dim::new(0), Dim::new(1)) };
        let index = vec![b.clone(), h.clone(), row, t0.clone()];
        let tile = k.load(mask, index, vec![Dim::new(1), Dim::new(1), n, plane[1].clone()]);
        let operand = if by_row {
            let tile = k.reshape(tile, plane.to_vec());
            k.plain(tile)
        } else {
            let tile = k.reshape(tile, vec![plane[1].clone()]);
            Operand { tile, along: vec![1] }
        };
        let folded = self.folded();
        let score = func(&[DType::F32, dtype], |f, a| match kind {
            MaskKind::Add => {
                let mask = f.cast(a[1], DType::F32);
                let factor = f.constant(scale, DType::F32);
                f.op(Op::Fma, &[a[0], factor, mask])
            }
            MaskKind::Keep => {
                let seen = f.cast(a[1], DType::Bool);
                let low = f.constant(f64::NEG_INFINITY, DType::F32);
                let factor = f.constant(scale, DType::F32);
                let x = if folded { a[0] } else { f.op(Op::Mul, &[a[0], factor]) };
                f.op(Op::Select, &[seen, x, low])
            }
        });
        let args = vec![k.plain(dots), operand];
        k.map(score, args, plane.to_vec())
    }

    /// Scores of keys beyond the last one, and of later keys than the row sees, become minus infinity.
    fn hide(
        &self,
        k: &mut KernelBuilder,
        scores: TileId,
        q0: &Dim,
        t0: &Dim,
        ahead: &Dim,
        plane: &[Dim],
    ) -> TileId {
        let i32s =
            |k: &mut KernelBuilder, start: Dim, n: Dim| k.iota(DType::I32, 0, start, vec![n]);
        let col = i32s(k, t0.clone(), plane[1].clone());
        let at = |tile: TileId, axis: usize| Operand { tile, along: vec![axis] };
        // The last key that a row sees, and the last one there is. When all end together, no row sees beyond.
        let mut args = vec![k.plain(scores), at(col, 1)];
        if self.causal != Causal::No {
            let row = i32s(k, q0.clone() + ahead, plane[0].clone());
            args.push(at(row, 0));
        }
        if self.causal != Causal::EndTogether {
            let last = i32s(k, Dim::sym("T") - &Dim::new(1), Dim::new(1));
            args.push(at(last, 0));
        }
        let mut types = vec![DType::F32];
        types.resize(args.len(), DType::I32);
        let hide = func(&types, |f, a| {
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            a[2..].iter().fold(a[0], |x, last| {
                let later = f.op(Op::Gt, &[a[1], *last]);
                f.op(Op::Select, &[later, low, x])
            })
        });
        k.map(hide, args, plane.to_vec())
    }
}
