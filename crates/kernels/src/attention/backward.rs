//! The tile programs of attention's gradient.
//!
//! With `s = scale q k^T` (hidden ones minus infinity), `p = exp(s - lse)`, `do` the gradient of the result and
//! `delta = rowsum(do * o)`:
//!
//! ```text
//! dv = p^T do        dp = do v^T        ds = p (dp - delta)        dq = scale ds k        dk = scale ds^T q
//! ```
//!
//! Three programs, each of which writes what it alone computes, so that every sum has one order and a result is the
//! same bits each time:
//!
//! ```text
//! rows:     shift = -log2(e) lse, delta                                            per query
//! keys:     for each block of queries that sees the block of keys, from the last:
//!             s' = k q^T, dp' = v do^T, p' = 2^(c s' + shift)                      [BT,BQ], c = scale log2 e
//!             dv += p' do,  dk += (p' (dp' - delta)) q
//! queries:  for each block of keys that the block of queries sees:
//!             s = q k^T, dp = do v^T, p = 2^(c s + shift)                          [BQ,BT]
//!             dq += (p (dp - delta)) k
//! ```
//!
//! Beyond a depth of 128 the sums of keys and values do not fit registers together: two programs for keys, one of which has the
//! scores again.
//!
//! Scores and their gradient are computed twice: seven products instead of five. The other way is to add the shares of
//! `dq` in memory, block of keys by block of keys, which takes turns (or has an order of its own each time).
//!
//! Weights and gradients of scores stay in registers: the programs compute each tile in the orientation in which it is the
//! left operand of the next product. Heads of queries that share keys are summed within a block.

use crate::attention::problem::MaskKind;
use crate::attention::program::{Causal, exp2, func, padded};
use tilewright_base::DType;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType,
};

/// The gradient of attention for all lengths and layouts.
///
/// Size symbols as in [`AttentionSpec`](crate::attention::AttentionSpec), with `ob oh os` the strides of the result (and
/// `ub uh us` of its gradient), and of the gradients `xb xh xs` (queries), `yb yh ys` (keys), `zb zh zs` (values); `ld`,
/// the distance in elements between heads of `shift` and `delta`, `[B, H, S]` of f32; `hc`, a divisor of the heads of all
/// batches (of keys, or of queries), how many of them are walked together; of a mask `mb mh ms`.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardSpec {
    /// Type of all matrices: 16 bits.
    pub dtype: DType,
    /// Depth of queries and keys.
    pub depth: i64,
    /// Depth of values.
    pub width: i64,
    /// Which keys a query sees.
    pub causal: Causal,
    /// Heads of queries may share keys.
    pub grouped: bool,
    /// Factor of the scores: above zero.
    pub scale: f64,
    /// What is known of scores beside.
    pub mask: Option<BackwardMask>,
}

/// What the program for keys computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySums {
    /// The gradients of keys and of values.
    Both,
    /// That of the values alone.
    Values,
    /// That of the keys alone.
    Keys,
}

/// A mask, which has no gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardMask {
    /// What it does.
    pub kind: MaskKind,
    /// Element type.
    pub dtype: DType,
    /// Queries have masks of their own.
    pub by_row: bool,
    /// Heads have masks of their own.
    pub by_head: bool,
}

/// A block's place and the parameters of a program.
struct Place<'a> {
    batch: &'a Dim,
    head: &'a Dim,
    row: &'a Dim,
}

fn one() -> Dim {
    Dim::new(1)
}

/// `[rows, cols]` of a matrix's head.
fn matrix(k: &mut KernelBuilder, param: ParamId, at: &Place<'_>, rows: &Dim, cols: i64) -> TileId {
    let index = vec![at.batch.clone(), at.head.clone(), at.row.clone(), Dim::new(0)];
    let tile = k.load(param, index, vec![one(), one(), rows.clone(), Dim::new(cols)]);
    k.reshape(tile, vec![rows.clone(), Dim::new(cols)])
}

/// `[rows]` of a vector of each head.
fn vector(k: &mut KernelBuilder, param: ParamId, at: &Place<'_>, rows: &Dim) -> TileId {
    let index = vec![at.batch.clone(), at.head.clone(), at.row.clone()];
    let tile = k.load(param, index, vec![one(), one(), rows.clone()]);
    k.reshape(tile, vec![rows.clone()])
}

fn zeros(k: &mut KernelBuilder, shape: &[&Dim]) -> TileId {
    let shape: Vec<Dim> = shape.iter().map(|d| (*d).clone()).collect();
    k.full(Value::Float(0.0), TileType::new(DType::F32, shape))
}

fn sizes(k: &mut KernelBuilder, names: &[&str]) {
    for name in names {
        let min = i64::from(matches!(*name, "B" | "H" | "G" | "R" | "S" | "T" | "hc"));
        let range = Range { min, max: i32::MAX.into() };
        k.symbol(Symbol { name: (*name).into(), range });
    }
}

impl BackwardSpec {
    /// Extents of tiles along the depths of keys and of values.
    pub fn depths(&self) -> (i64, i64) {
        (padded(self.depth, self.dtype), padded(self.width, self.dtype))
    }

    /// A parameter `[B, heads, rows, depth]`, whose strides are named after `stride`.
    fn param(
        &self,
        k: &mut KernelBuilder,
        name: &str,
        extents: [&str; 2],
        depth: i64,
        stride: &str,
        access: Access,
    ) -> ParamId {
        let extents = [Dim::sym("B"), Dim::sym(extents[0]), Dim::sym(extents[1]), Dim::new(depth)];
        let strides = ["b", "h", "s"].map(|axis| Dim::sym(format!("{stride}{axis}")));
        let axis = |(extent, stride): (Dim, Dim)| Axis { extent, stride, block: None };
        let axes = extents.into_iter().zip(strides.into_iter().chain([one()])).map(axis).collect();
        k.param(name, self.dtype, Layout { axes, offset: Dim::new(0) }, access)
    }

    /// A parameter `[B, H, S]` of f32.
    fn numbers(k: &mut KernelBuilder, name: &str, access: Access) -> ParamId {
        let (heads, ld) = (Dim::sym("H"), Dim::sym("ld"));
        let axis =
            |extent: &str, stride: Dim| Axis { extent: Dim::sym(extent), stride, block: None };
        let axes = vec![axis("B", heads * &ld), axis("H", ld), axis("S", one())];
        k.param(name, DType::F32, Layout { axes, offset: Dim::new(0) }, access)
    }

    /// The grid: batch, head and block. Sections of `hc` heads of all batches go one after another, of which the first blocks of
    /// all come first, then the second ones, and so on.
    fn blocks(k: &mut KernelBuilder, heads: &str, blocks: Dim) -> [Dim; 3] {
        let (heads, each) = (Dim::sym(heads), Dim::sym("hc"));
        let all = Dim::sym("B") * &heads;
        let section = k.grid("ps", all.ceil_div(&each));
        let block = k.grid("pk", blocks);
        let head = section * &each + k.grid("ph", each);
        [head.floor_div(&heads), head.modulo(&heads), block]
    }

    fn mask_sizes(&self) -> &'static [&'static str] {
        if self.mask.is_some() { &["mb", "mh", "ms"] } else { &[] }
    }

    /// The mask's parameter `[B, H, S or 1, T]`.
    fn mask_param(&self, k: &mut KernelBuilder) -> Option<ParamId> {
        let mask = self.mask?;
        let rows = if mask.by_row { Dim::sym("S") } else { one() };
        let extents = [Dim::sym("B"), Dim::sym("H"), rows, Dim::sym("T")];
        let strides = [Dim::sym("mb"), Dim::sym("mh"), Dim::sym("ms"), one()];
        let axis = |(extent, stride): (Dim, Dim)| Axis {
            // An axis of one element has no neighbours.
            stride: if extent.is(1) { one() } else { stride },
            extent,
            block: None,
        };
        let axes = extents.into_iter().zip(strides).map(axis).collect();
        Some(k.param("mask", mask.dtype, Layout { axes, offset: Dim::new(0) }, Access::In))
    }

    /// A block of the mask: `[keys]`, or `[queries, keys]`. Outside of it everything is hidden.
    fn mask_tile(
        &self,
        k: &mut KernelBuilder,
        param: Option<ParamId>,
        at: &Place<'_>,
        k0: &Dim,
        [bq, bt]: [&Dim; 2],
    ) -> Option<TileId> {
        let (param, mask) = param.zip(self.mask)?;
        let head = if mask.by_head { at.head.clone() } else { Dim::new(0) };
        let (row, rows) =
            if mask.by_row { (at.row.clone(), bq.clone()) } else { (Dim::new(0), one()) };
        let index = vec![at.batch.clone(), head, row, k0.clone()];
        let shape = vec![one(), one(), rows, bt.clone()];
        let hidden = match mask.kind {
            MaskKind::Add => Value::Float(f64::NEG_INFINITY),
            MaskKind::Keep => Value::Int(0),
        };
        let tile = k.load_with(param, index, vec![1; 4], hidden, shape);
        let shape = if mask.by_row { vec![bq.clone(), bt.clone()] } else { vec![bt.clone()] };
        Some(k.reshape(tile, shape))
    }

    /// What a mask makes of the products; `keys` is the axis of the plane along which keys run.
    fn masked(
        &self,
        k: &mut KernelBuilder,
        dots: TileId,
        tile: Option<TileId>,
        keys: usize,
        plane: &[Dim],
    ) -> TileId {
        let Some((tile, mask)) = tile.zip(self.mask) else { return dots };
        let operand = match (mask.by_row, keys) {
            (false, axis) => at(tile, axis),
            (true, 1) => k.plain(tile),
            (true, _) => {
                let turned = k.permute(tile, &[1, 0]);
                k.plain(turned)
            }
        };
        let score = func(&[DType::F32, mask.dtype], |f, a| match mask.kind {
            MaskKind::Add => {
                let added = f.cast(a[1], DType::F32);
                let factor = f.constant(self.scale, DType::F32);
                f.op(Op::Fma, &[a[0], factor, added])
            }
            MaskKind::Keep => {
                let seen = f.cast(a[1], DType::Bool);
                let low = f.constant(f64::NEG_INFINITY, DType::F32);
                f.op(Op::Select, &[seen, a[0], low])
            }
        });
        let args = vec![k.plain(dots), operand];
        k.map(score, args, plane.to_vec())
    }

    /// Scores are in natural units, with the scale and a mask: masks of the largest negative number stay finite.
    fn natural(&self) -> bool {
        self.mask.is_some_and(|m| m.kind == MaskKind::Add)
    }

    /// Query `i` sees keys up to `i` and this.
    fn ahead(&self) -> Dim {
        match self.causal {
            Causal::Ahead => Dim::sym("ahead"),
            _ => Dim::sym("T") - &Dim::sym("S"),
        }
    }

    fn ahead_size(&self) -> &'static [&'static str] {
        if self.causal == Causal::Ahead { &["ahead"] } else { &[] }
    }

    /// The numbers of each query: parameters `O`, `U` (its gradient), `lse` (dense), `shift`, `delta`; tile sizes `BR`, `BE`,
    /// of which `BE` covers the width. A query that sees nothing has the shift minus infinity and delta 0: it has no share
    /// in any gradient.
    pub fn rows_program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["B", "H", "S", "ld", "ob", "oh", "os", "ub", "uh", "us"]);
        let (br, be) = (k.tile("BR"), k.tile("BE"));
        let o = self.param(&mut k, "O", ["H", "S"], self.width, "o", Access::In);
        let u = self.param(&mut k, "U", ["H", "S"], self.width, "u", Access::In);
        let dense = Layout::row_major(&["B", "H", "S"].map(Dim::sym));
        let lse = k.param("lse", DType::F32, dense, Access::In);
        let shift = Self::numbers(&mut k, "shift", Access::Out);
        let delta = Self::numbers(&mut k, "delta", Access::Out);
        let (b, h) = (k.grid("pb", Dim::sym("B")), k.grid("ph", Dim::sym("H")));
        let row = k.grid("pr", Dim::sym("S").ceil_div(&br)) * &br;
        let (line, plane) = (vec![br.clone()], vec![br.clone(), be.clone()]);
        let tile = |k: &mut KernelBuilder, param: ParamId| {
            let index = vec![b.clone(), h.clone(), row.clone(), Dim::new(0)];
            let tile = k.load(param, index, vec![one(), one(), br.clone(), be.clone()]);
            k.reshape(tile, plane.clone())
        };
        let (o, u) = (tile(&mut k, o), tile(&mut k, u));
        let product = func(&[self.dtype; 2], |f, a| {
            let (x, y) = (f.cast(a[0], DType::F32), f.cast(a[1], DType::F32));
            f.op(Op::Mul, &[x, y])
        });
        let args = vec![k.plain(o), k.plain(u)];
        let products = k.map(product, args, plane.clone());
        let sums = k.reduce(ReduceKind::Sum, products, 1, None);
        let at = Place { batch: &b, head: &h, row: &row };
        let lse = vector(&mut k, lse, &at, &br);
        let shifted = func(&[DType::F32], |f, a| {
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            let none = f.op(Op::Eq, &[a[0], low]);
            let unit = if self.natural() { 1.0 } else { std::f64::consts::LOG2_E };
            let factor = f.constant(-unit, DType::F32);
            let x = f.op(Op::Mul, &[a[0], factor]);
            f.op(Op::Select, &[none, low, x])
        });
        let args = vec![k.plain(lse)];
        let shifts = k.map(shifted, args, line.clone());
        let or_none = func(&[DType::F32; 2], |f, a| {
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            let none = f.op(Op::Eq, &[a[1], low]);
            let zero = f.constant(0.0, DType::F32);
            f.op(Op::Select, &[none, zero, a[0]])
        });
        let args = vec![k.plain(sums), k.plain(lse)];
        let deltas = k.map(or_none, args, line);
        for (param, tile) in [(shift, shifts), (delta, deltas)] {
            let tile = k.reshape(tile, vec![one(), one(), br.clone()]);
            k.store(param, vec![b.clone(), h.clone(), row.clone()], tile);
        }
        k.finish()
    }

    /// The gradients of keys and values: parameters `Q`, `K`, `V`, `U`, `shift`, `delta`, `mask` if there is one,
    /// `DK`, `DV`; tile sizes `BQ`, `BT`. For values alone without `V`, `delta` and `DK`, for keys alone without `DV`.
    pub fn keys_program(&self, name: &str, wanted: KeySums) -> Kernel {
        let (for_keys, for_values) = (wanted != KeySums::Values, wanted != KeySums::Keys);
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["B", "H", "G", "R", "S", "T"]);
        sizes(&mut k, self.ahead_size());
        sizes(&mut k, self.mask_sizes());
        sizes(&mut k, &["hc", "ld", "qb", "qh", "qs", "kb", "kh", "ks"]);
        sizes(&mut k, if for_keys { &["vb", "vh", "vs"] } else { &[] });
        sizes(&mut k, &["ub", "uh", "us"]);
        sizes(&mut k, if for_keys { &["yb", "yh", "ys"] } else { &[] });
        sizes(&mut k, if for_values { &["zb", "zh", "zs"] } else { &[] });
        let (bq, bt) = (k.tile("BQ"), k.tile("BT"));
        let (dk, dv) = self.depths();
        let q = self.param(&mut k, "Q", ["H", "S"], self.depth, "q", Access::In);
        let kk = self.param(&mut k, "K", ["G", "T"], self.depth, "k", Access::In);
        let v = for_keys.then(|| self.param(&mut k, "V", ["G", "T"], self.width, "v", Access::In));
        let u = self.param(&mut k, "U", ["H", "S"], self.width, "u", Access::In);
        let shift = Self::numbers(&mut k, "shift", Access::In);
        let delta = for_keys.then(|| Self::numbers(&mut k, "delta", Access::In));
        let mask = self.mask_param(&mut k);
        let mut out = |wanted: bool, name: &str, depth: i64, stride: &str| {
            wanted.then(|| self.param(&mut k, name, ["G", "T"], depth, stride, Access::Out))
        };
        let dk_out = out(for_keys, "DK", self.depth, "y");
        let dv_out = out(for_values, "DV", self.width, "z");

        // The first keys are seen by the most queries: long blocks first, so that short ones fill the end.
        let [b, g, block] = Self::blocks(&mut k, "G", Dim::sym("T").ceil_div(&bt));
        let k0 = block * &bt;
        let keys = Place { batch: &b, head: &g, row: &k0 };
        let k_tile = matrix(&mut k, kk, &keys, &bt, dk);
        let v_tile = v.map(|v| matrix(&mut k, v, &keys, &bt, dv));
        let (wide_k, wide_v) = (Dim::new(dk), Dim::new(dv));
        // What all turns share is loaded once.
        let shared = self.mask.is_some_and(|m| !(m.by_row || m.by_head && self.grouped));
        let shared = shared.then_some(mask).flatten();
        let shared = self.mask_tile(&mut k, shared, &keys, &k0, [&bq, &bt]);
        let mut sums = Vec::new();
        for wide in for_values.then_some(&wide_v).into_iter().chain(for_keys.then_some(&wide_k)) {
            sums.push(zeros(&mut k, &[&bt, wide]));
        }
        let blocks = Dim::sym("S").ceil_div(&bq);
        let first = match self.causal {
            Causal::No => Dim::new(0),
            _ => (k0.clone() - &self.ahead()).max_with(&Dim::new(0)).floor_div(&bq),
        };
        let count = (blocks.clone() - &first.min_with(&blocks))
            * &match self.grouped {
                true => Dim::sym("R"),
                false => one(),
            };
        let (n, carried) = k.begin_for("n", Dim::new(0), count, &sums);
        // From the last queries to those that see only some of the keys; for each block the heads that share them.
        let (back, head) = match self.grouped {
            true => {
                let each = Dim::sym("R");
                (n.floor_div(&each), g.clone() * &each + &n.modulo(&each))
            }
            false => (n, g.clone()),
        };
        let q0 = (blocks - &one() - &back) * &bq;
        let queries = Place { batch: &b, head: &head, row: &q0 };
        let (q_tile, u_tile) =
            (matrix(&mut k, q, &queries, &bq, dk), matrix(&mut k, u, &queries, &bq, dv));
        let shift = vector(&mut k, shift, &queries, &bq);
        let delta = delta.map(|delta| vector(&mut k, delta, &queries, &bq));
        let plane = vec![bt.clone(), bq.clone()];
        let dots = |k: &mut KernelBuilder, a: TileId, b: TileId| {
            let zero = zeros(k, &[&bt, &bq]);
            let turned = k.permute(b, &[1, 0]);
            k.mma(zero, a, turned, None)
        };
        let scores = dots(&mut k, k_tile, q_tile);
        let down = v_tile.map(|v_tile| dots(&mut k, v_tile, u_tile));
        let masked = match shared {
            Some(tile) => Some(tile),
            None => self.mask_tile(&mut k, mask, &queries, &k0, [&bq, &bt]),
        };
        let mut scores = self.masked(&mut k, scores, masked, 0, &plane);
        if self.natural() {
            // What lies beyond the last query is zero, but its weight may not be finite.
            let query = k.iota(DType::I32, 0, q0.clone(), vec![bq.clone()]);
            let last = k.iota(DType::I32, 0, Dim::sym("S") - &one(), vec![one()]);
            let args = vec![k.plain(scores), at(query, 1), at(last, 0)];
            scores = k.map(later_hidden(), args, plane.clone());
        }
        let hidden = match self.causal {
            Causal::No => scores,
            // Rows are keys: those later than the last one that the column's query sees.
            _ => {
                let key = k.iota(DType::I32, 0, k0.clone(), vec![bt.clone()]);
                let last = k.iota(DType::I32, 0, q0.clone() + &self.ahead(), vec![bq.clone()]);
                let args = vec![k.plain(scores), at(key, 0), at(last, 1)];
                k.map(later_hidden(), args, plane.clone())
            }
        };
        let args = vec![k.plain(hidden), at(shift, 1)];
        let weights = k.map(self.weight(), args, plane.clone());
        let (mut next, mut outs) = (Vec::new(), Vec::new());
        if let Some(out) = dv_out {
            let left = self.narrow(&mut k, weights, &plane);
            next.push(k.mma(carried[0], left, u_tile, None));
            outs.push((out, &wide_v, 1.0));
        }
        if let Some(((out, down), delta)) = dk_out.zip(down).zip(delta) {
            let args = vec![k.plain(weights), k.plain(down), at(delta, 1)];
            let gradients = k.map(gradient(), args, plane.clone());
            let left = self.narrow(&mut k, gradients, &plane);
            next.push(k.mma(carried[next.len()], left, q_tile, None));
            outs.push((out, &wide_k, self.scale));
        }
        let results = k.end_for(&next);
        for ((param, width, factor), tile) in outs.into_iter().zip(results) {
            self.finish(&mut k, param, &keys, tile, [&bt, width], factor);
        }
        k.finish()
    }

    /// The gradient of the queries: parameters `Q`, `K`, `V`, `U`, `shift`, `delta`, `mask` if there is one, `DQ`; tile sizes `BQ`, `BT`.
    pub fn queries_program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["B", "H", "G", "R", "S", "T"]);
        sizes(&mut k, self.ahead_size());
        sizes(&mut k, self.mask_sizes());
        sizes(&mut k, &["hc", "ld", "qb", "qh", "qs", "kb", "kh", "ks", "vb", "vh", "vs"]);
        sizes(&mut k, &["ub", "uh", "us", "xb", "xh", "xs"]);
        let (bq, bt) = (k.tile("BQ"), k.tile("BT"));
        let (dk, dv) = self.depths();
        let q = self.param(&mut k, "Q", ["H", "S"], self.depth, "q", Access::In);
        let kk = self.param(&mut k, "K", ["G", "T"], self.depth, "k", Access::In);
        let v = self.param(&mut k, "V", ["G", "T"], self.width, "v", Access::In);
        let u = self.param(&mut k, "U", ["H", "S"], self.width, "u", Access::In);
        let shift = Self::numbers(&mut k, "shift", Access::In);
        let delta = Self::numbers(&mut k, "delta", Access::In);
        let mask = self.mask_param(&mut k);
        let dq_out = self.param(&mut k, "DQ", ["H", "S"], self.depth, "x", Access::Out);

        let blocks = Dim::sym("S").ceil_div(&bq);
        let [b, h, p] = Self::blocks(&mut k, "H", blocks.clone());
        // Long rows first, so that short ones fill the end.
        let q0 = if self.causal == Causal::No { p * &bq } else { (blocks - &p - one()) * &bq };
        let group = if self.grouped { h.floor_div(&Dim::sym("R")) } else { h.clone() };
        let queries = Place { batch: &b, head: &h, row: &q0 };
        let (q_tile, u_tile) =
            (matrix(&mut k, q, &queries, &bq, dk), matrix(&mut k, u, &queries, &bq, dv));
        let (shift, delta) =
            (vector(&mut k, shift, &queries, &bq), vector(&mut k, delta, &queries, &bq));
        let wide = Dim::new(dk);
        let sums = [zeros(&mut k, &[&bq, &wide])];
        let end = match self.causal {
            Causal::No => Dim::sym("T"),
            _ => Dim::sym("T").min_with(&(q0.clone() + &bq + &self.ahead())),
        };
        let (t, carried) = k.begin_for("t", Dim::new(0), end.ceil_div(&bt), &sums);
        let k0 = t * &bt;
        let keys = Place { batch: &b, head: &group, row: &k0 };
        let (k_tile, v_tile) =
            (matrix(&mut k, kk, &keys, &bt, dk), matrix(&mut k, v, &keys, &bt, dv));
        let plane = vec![bq.clone(), bt.clone()];
        let dots = |k: &mut KernelBuilder, a: TileId, b: TileId| {
            let zero = zeros(k, &[&bq, &bt]);
            let turned = k.permute(b, &[1, 0]);
            k.mma(zero, a, turned, None)
        };
        let (scores, down) = (dots(&mut k, q_tile, k_tile), dots(&mut k, u_tile, v_tile));
        let key = k.iota(DType::I32, 0, k0.clone(), vec![bt.clone()]);
        let masked = self.mask_tile(&mut k, mask, &queries, &k0, [&bq, &bt]);
        let mut hidden = self.masked(&mut k, scores, masked, 1, &plane);
        if self.causal != Causal::No {
            let last = k.iota(DType::I32, 0, q0.clone() + &self.ahead(), vec![bq.clone()]);
            let args = vec![k.plain(hidden), at(key, 1), at(last, 0)];
            hidden = k.map(later_hidden(), args, plane.clone());
        }
        // What lies beyond the last key is zero, but its weight may not be finite. When all end together, no row sees it.
        if self.causal != Causal::EndTogether {
            let last = k.iota(DType::I32, 0, Dim::sym("T") - &one(), vec![one()]);
            let args = vec![k.plain(hidden), at(key, 1), at(last, 0)];
            hidden = k.map(later_hidden(), args, plane.clone());
        }
        let args = vec![k.plain(hidden), at(shift, 0)];
        let weights = k.map(self.weight(), args, plane.clone());
        let args = vec![k.plain(weights), k.plain(down), at(delta, 0)];
        let gradients = k.map(gradient(), args, plane.clone());
        let left = self.narrow(&mut k, gradients, &plane);
        let sum = k.mma(carried[0], left, k_tile, None);
        let results = k.end_for(&[sum]);
        self.finish(&mut k, dq_out, &queries, results[0], [&bq, &wide], self.scale);
        k.finish()
    }

    /// As a left operand.
    fn narrow(&self, k: &mut KernelBuilder, tile: TileId, plane: &[Dim]) -> TileId {
        let args = vec![k.plain(tile)];
        k.map(Func::cast(DType::F32, self.dtype), args, plane.to_vec())
    }

    /// Stores sums times a factor.
    fn finish(
        &self,
        k: &mut KernelBuilder,
        param: ParamId,
        at: &Place<'_>,
        sums: TileId,
        shape: [&Dim; 2],
        factor: f64,
    ) {
        let scaled = func(&[DType::F32], |f, a| {
            let factor = f.constant(factor, DType::F32);
            let y = f.op(Op::Mul, &[a[0], factor]);
            f.cast(y, self.dtype)
        });
        let args = vec![k.plain(sums)];
        let shape = shape.map(Dim::clone).to_vec();
        let tile = match factor.to_bits() == 1f64.to_bits() {
            true => self.narrow(k, sums, &shape),
            false => k.map(scaled, args, shape.clone()),
        };
        let tile = k.reshape(tile, [vec![one(), one()], shape].concat());
        let index = vec![at.batch.clone(), at.head.clone(), at.row.clone(), Dim::new(0)];
        k.store(param, index, tile);
    }

    /// `2^(c s + shift)`, in natural units `exp(s + shift)`.
    fn weight(&self) -> Func {
        use std::f64::consts::LOG2_E;
        func(&[DType::F32; 2], |f, a| {
            let power = match self.natural() {
                true => {
                    let x = f.op(Op::Add, &[a[0], a[1]]);
                    let factor = f.constant(LOG2_E, DType::F32);
                    f.op(Op::Mul, &[x, factor])
                }
                false => {
                    let factor = f.constant(self.scale * LOG2_E, DType::F32);
                    f.op(Op::Fma, &[a[0], factor, a[1]])
                }
            };
            exp2(f, power)
        })
    }
}

/// A vector as an operand along an axis of a tile.
fn at(tile: TileId, axis: usize) -> Operand {
    Operand { tile, along: vec![axis] }
}

/// The score, minus infinity where the key is later than the last one that is seen.
fn later_hidden() -> Func {
    func(&[DType::F32, DType::I32, DType::I32], |f, a| {
        let low = f.constant(f64::NEG_INFINITY, DType::F32);
        let later = f.op(Op::Gt, &[a[1], a[2]]);
        f.op(Op::Select, &[later, low, a[0]])
    })
}

/// `p (dp - delta)`.
fn gradient() -> Func {
    func(&[DType::F32; 3], |f, a| {
        let d = f.op(Op::Sub, &[a[1], a[2]]);
        f.op(Op::Mul, &[a[0], d])
    })
}
