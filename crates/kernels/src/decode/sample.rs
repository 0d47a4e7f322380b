//! From a token to its vector, and from logits to the next token.
//!
//! The best token is found in two steps: pieces of the vocabulary, then the best piece. A drawn one needs three passes:
//! the smallest logit that `top_k` and `top_p` leave (eight times fewer candidates a turn, by bisection), and the first
//! token at which the running sum of probabilities passes a random number. Random numbers are a table in memory, one per
//! position and sequence.

use super::{Rows, Scheduled, along, power_of_two, scalar, schedule, text};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Access, KernelBuilder, ParamId, ReduceKind, TileId, TileType};

/// Logits of a piece of the vocabulary.
const PIECE: i64 = 1024;
/// Thresholds that one pass over the logits tries.
const TRIES: i64 = 7;
/// Passes: three binary digits each.
const PASSES: i64 = 11;

fn shape(extents: &[i64]) -> Layout {
    Layout::row_major(&extents.iter().map(|&n| Dim::new(n)).collect::<Vec<_>>())
}

/// `X[row, :] = table[token[row], :]`: `tokens [rows]` i32, `table`, `X` f32.
///
/// # Errors
/// Our bug.
pub fn embed(
    rows: i64,
    vocabulary: i64,
    hidden: i64,
    stored: DType,
    arch: Arch,
) -> Result<Scheduled> {
    let d = Dim::new;
    let mut k = KernelBuilder::new("decode_embed");
    let bc = k.tile("BC");
    let tokens = k.param("tokens", DType::I32, shape(&[rows]), Access::In);
    let table = k.param("table", stored, shape(&[vocabulary, hidden]), Access::In);
    let x = k.param("X", DType::F32, shape(&[rows, hidden]), Access::Out);
    let row = k.grid("row", d(rows));
    let at = k.grid("pc", d(hidden).ceil_div(&bc)) * &bc;
    let token = k.load(tokens, vec![row.clone()], vec![d(1)]);
    let one = vec![d(1), bc.clone()];
    let picked = k.gather(table, 0, token, vec![d(0), at.clone()], one.clone());
    let f = text("{ x -> f32(x) }", &[stored])?;
    let wide = k.map(f, vec![k.plain(picked)], one);
    k.store(x, vec![row, at], wide);
    // The first kernel of a step: it waits for the whole step before, which changes what others read early.
    let schedule = schedule(arch, &[("BC", 512)], (128, 128, 4), hidden, false);
    Ok(Scheduled { kernel: k.finish(), schedule })
}

/// The best token of each piece of the vocabulary: `logits [rows, vocabulary]`, `best [rows, pieces]`, `which` i32.
///
/// # Errors
/// Our bug.
pub fn pieces(rows: i64, vocabulary: i64, arch: Arch) -> Result<Scheduled> {
    let d = Dim::new;
    let count = (vocabulary + PIECE - 1) / PIECE;
    let mut k = KernelBuilder::new("decode_pieces");
    let bv = k.tile("BV");
    let logits = k.param("logits", DType::F32, shape(&[rows, vocabulary]), Access::In);
    let best = k.param("best", DType::F32, shape(&[rows, count]), Access::Out);
    let which = k.param("which", DType::I32, shape(&[rows, count]), Access::Out);
    let row = k.grid("row", d(rows));
    let piece = k.grid("piece", d(count));
    let low = Value::Float(f64::NEG_INFINITY);
    let index = vec![row.clone(), piece.clone() * &bv];
    let x = k.load_with(logits, index, vec![1, 1], low, vec![d(1), bv.clone()]);
    let most = k.reduce(ReduceKind::Max, x, 1, None);
    let at = k.arg_reduce(ReduceKind::Max, x, 1, None, false);
    let f = text("{ i -> i32(i) }", &[DType::I64])?;
    let at = k.map(f, vec![along(at, 0)], vec![d(1)]);
    let most = k.reshape(most, vec![d(1), d(1)]);
    k.store(best, vec![row.clone(), piece.clone()], most);
    let at = k.reshape(at, vec![d(1), d(1)]);
    k.store(which, vec![row, piece], at);
    let schedule = schedule(arch, &[("BV", PIECE)], (128, 128, 4), vocabulary, true);
    Ok(Scheduled { kernel: k.finish(), schedule })
}

/// Where the chosen tokens go: `tokens [rows]` i32 for the next step, `history [positions + 1, rows]`.
fn results(k: &mut KernelBuilder, rows: &Rows) -> (ParamId, ParamId) {
    let tokens = k.param("tokens", DType::I32, shape(&[rows.batch]), Access::InOut);
    let all = shape(&[rows.positions + 1, rows.batch]);
    (tokens, k.param("history", DType::I32, all, Access::InOut))
}

/// The best of the pieces: `best`, `which`, `tokens`, `history`.
///
/// # Errors
/// Our bug.
pub fn pick(rows: &Rows, vocabulary: i64, arch: Arch) -> Result<Scheduled> {
    let d = Dim::new;
    let count = (vocabulary + PIECE - 1) / PIECE;
    let mut k = KernelBuilder::new("decode_pick");
    let bp = k.tile("BP");
    rows.declare(&mut k);
    let best = k.param("best", DType::F32, shape(&[rows.batch, count]), Access::In);
    let which = k.param("which", DType::I32, shape(&[rows.batch, count]), Access::In);
    let (tokens, history) = results(&mut k, rows);
    let row = k.grid("row", d(rows.batch));
    let low = Value::Float(f64::NEG_INFINITY);
    let x = k.load_with(best, vec![row.clone(), d(0)], vec![1, 1], low, vec![d(1), bp.clone()]);
    let at = k.arg_reduce(ReduceKind::Max, x, 1, Some(d(count)), false);
    let within = k.gather(which, 1, at, vec![row.clone(), d(0)], vec![d(1), d(1)]);
    let within = k.reshape(within, vec![d(1)]);
    let f = text(&format!("{{ p, i -> i32(p) * {PIECE} + i }}"), &[DType::I64, DType::I32])?;
    let token = k.map(f, vec![along(at, 0), along(within, 0)], vec![d(1)]);
    k.store(tokens, vec![row.clone()], token);
    let token = k.reshape(token, vec![d(1), d(1)]);
    k.store(history, vec![Dim::sym(super::AT) + rows.new, row], token);
    let wide = power_of_two(count).max(32);
    let threads = wide.min(256);
    let tiles = [("BP", wide)];
    let schedule = schedule(arch, &tiles, (threads, threads, 1), 1, true);
    Ok(Scheduled { kernel: k.finish(), schedule })
}

/// Moves the position: `at [1]` i32 grows by `new`.
///
/// # Errors
/// Our bug.
pub fn advance(new: i64, arch: Arch) -> Result<Scheduled> {
    let d = Dim::new;
    let mut k = KernelBuilder::new("decode_advance");
    let at = k.param("at", DType::I32, shape(&[1]), Access::InOut);
    k.grid("once", d(1));
    let old = k.load(at, vec![d(0)], vec![d(1)]);
    let f = text(&format!("{{ p -> p + {new} }}"), &[DType::I32])?;
    let next = k.map(f, vec![along(old, 0)], vec![d(1)]);
    k.store(at, vec![d(0)], next);
    let schedule = schedule(arch, &[], (32, 32, 1), 1, true);
    Ok(Scheduled { kernel: k.finish(), schedule })
}

/// A token by its probability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Rows; one token each.
    pub rows: Rows,
    /// Logits of a row.
    pub vocabulary: i64,
    /// Only the likeliest `knobs[1]` tokens count.
    pub top_k: bool,
    /// Only the likeliest tokens count whose probabilities reach `knobs[2]` together.
    pub top_p: bool,
}

/// The logits of a row, and what is known of them.
struct Row<'a> {
    logits: ParamId,
    row: &'a Dim,
    /// Inverse temperature.
    sharp: TileId,
    /// Largest logit.
    most: TileId,
    vocabulary: i64,
    bv: &'a Dim,
}

impl Row<'_> {
    /// A piece of the row and `exp((x - most) * sharp)` of it, both along the columns.
    fn piece(&self, k: &mut KernelBuilder, var: &Dim) -> Result<(TileId, TileId)> {
        let one = vec![Dim::new(1), self.bv.clone()];
        let index = vec![self.row.clone(), var.clone() * self.bv];
        let low = Value::Float(f64::NEG_INFINITY);
        let x = k.load_with(self.logits, index, vec![1, 1], low, one);
        let x = k.reshape(x, vec![self.bv.clone()]);
        let f = text("{ x, m, t -> exp((x - m) * t) }", &[DType::F32; 3])?;
        let args = vec![along(x, 0), scalar(self.most), scalar(self.sharp)];
        let weight = k.map(f, args, vec![self.bv.clone()]);
        Ok((x, weight))
    }

    fn pieces(&self) -> Dim {
        Dim::new(self.vocabulary).ceil_div(self.bv)
    }

    /// The largest of the tried numbers `t` with `measure(x >= t) >= enough`, between `low` (which has it) and `high`
    /// (which has not): the logits from there on are kept. What is measured is their number, or their weight.
    fn threshold(
        &self,
        k: &mut KernelBuilder,
        (low, high): (TileId, TileId),
        enough: TileId,
        weigh: bool,
        name: &str,
    ) -> Result<TileId> {
        let f32s = [DType::F32; 2];
        let (_, ends) = k.begin_for(name, Dim::new(0), Dim::new(PASSES), &[low, high]);
        let tries: Vec<TileId> = (1..=TRIES)
            .map(|i| {
                let share = i as f64 / (TRIES + 1) as f64;
                let f = text(&format!("{{ l, h -> l + (h - l) * f32({share:?}) }}"), &f32s)?;
                Ok(k.map(f, vec![scalar(ends[0]), scalar(ends[1])], vec![]))
            })
            .collect::<Result<_>>()?;
        let zero = TileType::new(DType::F32, vec![]);
        let init: Vec<TileId> =
            tries.iter().map(|_| k.full(Value::Float(0.0), zero.clone())).collect();
        let (var, sums) = k.begin_for(&format!("{name}_piece"), Dim::new(0), self.pieces(), &init);
        let (x, weight) = self.piece(k, &var)?;
        let mut next = Vec::new();
        for (t, sum) in tries.iter().zip(&sums) {
            let kept = if weigh {
                let f = text("{ x, t, w -> where(x >= t, w, f32(0)) }", &[DType::F32; 3])?;
                let args = vec![along(x, 0), scalar(*t), along(weight, 0)];
                k.map(f, args, vec![self.bv.clone()])
            } else {
                let f = text("{ x, t -> where(x >= t, f32(1), f32(0)) }", &f32s)?;
                k.map(f, vec![along(x, 0), scalar(*t)], vec![self.bv.clone()])
            };
            let part = k.reduce(ReduceKind::Sum, kept, 0, None);
            let add = Func::binary(Op::Add, DType::F32);
            next.push(k.map(add, vec![scalar(*sum), scalar(part)], vec![]));
        }
        let sums = k.end_for(&next);
        let (mut low, mut high) = (ends[0], ends[1]);
        for (t, sum) in tries.iter().zip(&sums) {
            let f = text("{ l, t, s, e -> where(s >= e, t, l) }", &[DType::F32; 4])?;
            let args = [low, *t, *sum, enough].map(scalar).to_vec();
            low = k.map(f, args, vec![]);
        }
        for (t, sum) in tries.iter().zip(&sums).rev() {
            let f = text("{ h, t, s, e -> where(s >= e, h, t) }", &[DType::F32; 4])?;
            let args = [high, *t, *sum, enough].map(scalar).to_vec();
            high = k.map(f, args, vec![]);
        }
        Ok(k.end_for(&[low, high])[0])
    }

    /// The weight of all logits from `threshold` on.
    fn weight(&self, k: &mut KernelBuilder, threshold: TileId, name: &str) -> Result<TileId> {
        let zero = k.full(Value::Float(0.0), TileType::new(DType::F32, vec![]));
        let (var, sum) = k.begin_for(name, Dim::new(0), self.pieces(), &[zero]);
        let kept = self.kept(k, &var, threshold)?;
        let part = k.reduce(ReduceKind::Sum, kept, 0, None);
        let add = Func::binary(Op::Add, DType::F32);
        let next = k.map(add, vec![scalar(sum[0]), scalar(part)], vec![]);
        Ok(k.end_for(&[next])[0])
    }

    fn kept(&self, k: &mut KernelBuilder, var: &Dim, threshold: TileId) -> Result<TileId> {
        let (x, weight) = self.piece(k, var)?;
        let f = text("{ x, t, w -> where(x >= t, w, f32(0)) }", &[DType::F32; 3])?;
        let args = vec![along(x, 0), scalar(threshold), along(weight, 0)];
        Ok(k.map(f, args, vec![self.bv.clone()]))
    }
}

impl Draw {
    /// The kernel: `logits`, `knobs` (inverse temperature, number and probability that are kept), `random [positions + 1,
    /// rows]`, `tokens`, `history`.
    ///
    /// # Errors
    /// Our bug.
    pub fn scheduled(&self, arch: Arch) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw");
        let bv = k.tile("BV");
        let rows = &self.rows;
        rows.declare(&mut k);
        let logits =
            k.param("logits", DType::F32, shape(&[rows.batch, self.vocabulary]), Access::In);
        let knobs = k.param("knobs", DType::F32, shape(&[4]), Access::In);
        let table = shape(&[rows.positions + 1, rows.batch]);
        let random = k.param("random", DType::F32, table, Access::In);
        let (tokens, history) = results(&mut k, rows);
        let row = k.grid("row", d(rows.batch));
        let [sharp, count, share] = [0, 1, 2].map(|i| {
            let t = k.load(knobs, vec![d(i)], vec![d(1)]);
            k.reshape(t, vec![])
        });
        let scalars = TileType::new(DType::F32, vec![]);
        // The largest and the smallest logit.
        let ends = [f64::NEG_INFINITY, f64::INFINITY];
        let init = ends.map(|v| k.full(Value::Float(v), scalars.clone()));
        let pieces = d(self.vocabulary).ceil_div(&bv);
        let (var, ends) = k.begin_for("ends", d(0), pieces.clone(), &init);
        let index = vec![row.clone(), var.clone() * &bv];
        let low = Value::Float(f64::NEG_INFINITY);
        let x = k.load_with(logits, index, vec![1, 1], low, vec![d(1), bv.clone()]);
        let x = k.reshape(x, vec![bv.clone()]);
        let most = k.reduce(ReduceKind::Max, x, 0, None);
        let f = text("{ x -> where(x > -f32(3e38), x, f32(3e38)) }", &[DType::F32])?;
        let finite = k.map(f, vec![along(x, 0)], vec![bv.clone()]);
        let least = k.reduce(ReduceKind::Min, finite, 0, None);
        let next = [
            k.map(Func::binary(Op::Max, DType::F32), vec![scalar(ends[0]), scalar(most)], vec![]),
            k.map(Func::binary(Op::Min, DType::F32), vec![scalar(ends[1]), scalar(least)], vec![]),
        ];
        let ends = k.end_for(&next);
        let (most, least) = (ends[0], ends[1]);
        let this = Row { logits, row: &row, sharp, most, vocabulary: self.vocabulary, bv: &bv };
        let f = text("{ m -> m + max(abs(m), f32(1)) * f32(1e-5) }", &[DType::F32])?;
        let above = k.map(f, vec![scalar(most)], vec![]);
        let mut from = least;
        if self.top_k {
            from = this.threshold(&mut k, (from, above), count, false, "top_k")?;
        }
        if self.top_p {
            let all = this.weight(&mut k, from, "all")?;
            let mul = Func::binary(Op::Mul, DType::F32);
            let enough = k.map(mul, vec![scalar(all), scalar(share)], vec![]);
            from = this.threshold(&mut k, (from, above), enough, true, "top_p")?;
        }
        let all = this.weight(&mut k, from, "left")?;
        let next_row = Dim::sym(super::AT) + rows.new;
        let u = k.load(random, vec![next_row.clone(), row.clone()], vec![d(1), d(1)]);
        let u = k.reshape(u, vec![]);
        let mul = Func::binary(Op::Mul, DType::F32);
        let wanted = k.map(mul, vec![scalar(all), scalar(u)], vec![]);
        // Tokens whose running sum has not passed it, and the last one that counts at all.
        let none = k.full(Value::Float(0.0), scalars);
        let int = TileType::new(DType::I32, vec![]);
        let zero = k.full(Value::Int(0), int);
        let (var, state) = k.begin_for("draw", d(0), pieces, &[none, zero, zero]);
        let kept = this.kept(&mut k, &var, from)?;
        let running = k.scan(ReduceKind::Sum, kept, 0, false, false);
        let f = text("{ c, o, w -> where(c + o <= w, i32(1), i32(0)) }", &[DType::F32; 3])?;
        let args = vec![along(running, 0), scalar(state[0]), scalar(wanted)];
        let before = k.map(f, args, vec![bv.clone()]);
        let before = k.reduce(ReduceKind::Sum, before, 0, None);
        let places = k.iota(DType::I32, 0, var * &bv, vec![bv.clone()]);
        let f = text("{ w, i -> where(w > f32(0), i, i32(0)) }", &[DType::F32, DType::I32])?;
        let last = k.map(f, vec![along(kept, 0), along(places, 0)], vec![bv.clone()]);
        let last = k.reduce(ReduceKind::Max, last, 0, None);
        let here = k.reduce(ReduceKind::Sum, kept, 0, None);
        let next = [
            k.map(Func::binary(Op::Add, DType::F32), vec![scalar(state[0]), scalar(here)], vec![]),
            k.map(
                Func::binary(Op::Add, DType::I32),
                vec![scalar(state[1]), scalar(before)],
                vec![],
            ),
            k.map(Func::binary(Op::Max, DType::I32), vec![scalar(state[2]), scalar(last)], vec![]),
        ];
        let state = k.end_for(&next);
        let f = Func::binary(Op::Min, DType::I32);
        let token = k.map(f, vec![scalar(state[1]), scalar(state[2])], vec![]);
        let one = k.reshape(token, vec![d(1)]);
        k.store(tokens, vec![row.clone()], one);
        let one = k.reshape(token, vec![d(1), d(1)]);
        k.store(history, vec![next_row, row.clone()], one);
        let threads = 512;
        let schedule =
            schedule(arch, &[("BV", threads * 4)], (threads, threads, 4), self.vocabulary, true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }
}
