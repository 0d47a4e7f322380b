//! One token of each row by its probability, all blocks of the machine at work.
//!
//! ```text
//! ends      largest and smallest logit of each piece of the vocabulary
//! open      the range of thresholds: from the smallest to above the largest, cut at TRIES places
//! per level, first for top_k (how many tokens), then for top_p (how much weight):
//!   measure what lies at or above each threshold, per piece
//!   narrow  the sums over the pieces; the cut that still has enough, and the next one, are the next range
//! kept      the weight of each piece at or above the last threshold
//! choose    the piece, then the token, at which the running sum passes a random number
//! ```
//!
//! Everything is summed in an order that does not depend on who was first. Random numbers are a table in memory, one per
//! position and sequence.

use super::{AT, Rows, Scheduled, along, power_of_two, scalar, schedule, text};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType,
};

/// Logits of a piece of the vocabulary at most.
const PIECE: i64 = 1024;
/// Thresholds of a level: eight binary digits.
const TRIES: i64 = 256;
/// Thresholds that one block measures at once, and how often it does.
const MEASURED: i64 = 16;
const TURNS: i64 = 4;
/// Levels: 32 binary digits of the range from the smallest to the largest logit.
const LEVELS: usize = 4;
/// No place in a row.
const NOWHERE: i64 = i32::MAX as i64;

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

/// What the launches of a draw read and write. Sizes are those of [`Draw::memory`]; tables of thresholds and states are
/// there twice, since a launch reads one and writes the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrawPlace {
    /// `[rows, vocabulary]` f32.
    Logits,
    /// Inverse temperature, number and probability that are kept: f32.
    Knobs,
    /// `[positions + 1, rows]` f32 in [0, 1).
    Random,
    /// `[rows]` i32: the chosen tokens.
    Tokens,
    /// `[positions + 1, rows]` i32.
    History,
    /// Memory of its own: the index in [`Draw::memory`].
    Own(usize),
}

/// One launch of a draw.
pub struct DrawStep {
    /// What it does; launches of one name are the same kernel.
    pub label: &'static str,
    /// The kernel.
    pub make: fn(&Draw, Arch) -> Result<Scheduled>,
    /// A place for each parameter.
    pub operands: Vec<DrawPlace>,
}

fn shape(extents: &[i64]) -> Layout {
    Layout::row_major(&extents.iter().map(|&n| Dim::new(n)).collect::<Vec<_>>())
}

fn f32s(shape: &[&Dim]) -> TileType {
    TileType::new(DType::F32, shape.iter().map(|&d| d.clone()).collect::<Vec<_>>())
}

/// A scalar of a table `[rows, n]`.
fn entry(k: &mut KernelBuilder, table: ParamId, row: &Dim, i: Dim) -> TileId {
    let t = k.load(table, vec![row.clone(), i], vec![Dim::new(1), Dim::new(1)]);
    k.reshape(t, vec![])
}

/// A function of scalars.
fn of(k: &mut KernelBuilder, f: &str, args: &[TileId]) -> Result<TileId> {
    let types: Vec<DType> = args.iter().map(|&a| k.ty(a).dtype).collect();
    Ok(k.map(text(f, &types)?, args.iter().map(|&a| scalar(a)).collect(), vec![]))
}

/// A function of tiles along one axis, and of scalars.
fn line(k: &mut KernelBuilder, f: &str, args: &[TileId], extent: &Dim) -> Result<TileId> {
    let types: Vec<DType> = args.iter().map(|&a| k.ty(a).dtype).collect();
    let operand = |&a: &TileId| if k.ty(a).shape.is_empty() { scalar(a) } else { along(a, 0) };
    let operands: Vec<Operand> = args.iter().map(operand).collect();
    Ok(k.map(text(f, &types)?, operands, vec![extent.clone()]))
}

/// The columns of a state `[rows, STATE]`.
const STATE: i64 = 4;
const MOST: i64 = 0;
const ABOVE: i64 = 1;
const HIGH: i64 = 2;
const ENOUGH: i64 = 3;

impl Draw {
    /// Pieces of a row; the last ones may lie behind its end.
    fn pieces(&self) -> i64 {
        let each = self.piece_len();
        ((self.vocabulary + each - 1) / each + 3) & !3
    }

    /// Logits of a piece.
    fn piece_len(&self) -> i64 {
        power_of_two(self.vocabulary).clamp(128, PIECE)
    }

    /// Extents of the memory that the launches share, all f32.
    pub fn memory(&self) -> Vec<(&'static str, Vec<i64>)> {
        let (rows, pieces) = (self.rows.batch, self.pieces());
        vec![
            ("piece most", vec![rows, pieces]),
            ("piece least", vec![rows, pieces]),
            ("thresholds", vec![rows, TRIES]),
            ("thresholds 2", vec![rows, TRIES]),
            ("range", vec![rows, STATE]),
            ("range 2", vec![rows, STATE]),
            ("measured", vec![rows, TRIES, pieces]),
            ("kept", vec![rows, pieces]),
        ]
    }

    /// The launches, in order.
    pub fn steps(&self) -> Vec<DrawStep> {
        use DrawPlace::{History, Knobs, Logits, Own, Random, Tokens};
        let mut out = Vec::new();
        let mut step = |label, make, operands: &[DrawPlace]| {
            out.push(DrawStep { label, make, operands: operands.to_vec() });
        };
        step("draw_ends", Draw::ends, &[Logits, Own(0), Own(1)]);
        step("draw_open", Draw::open, &[Own(0), Own(1), Own(2), Own(4)]);
        let mut side = 0;
        let mut levels = |weigh: bool, reopen: bool| {
            for level in 0..LEVELS {
                let (tries, state) = (Own(2 + side), Own(4 + side));
                match weigh {
                    false => step("draw_count", Draw::count, &[Logits, tries, Own(6)]),
                    true => step("draw_weigh", Draw::weigh, &[Logits, Knobs, tries, state, Own(6)]),
                }
                let (label, make): (_, fn(&Draw, Arch) -> Result<Scheduled>) =
                    match (weigh, level == 0, reopen && level + 1 == LEVELS) {
                        (false, _, false) => {
                            ("draw_narrow_k", |d, a| d.narrow(a, false, false, false))
                        }
                        (false, _, true) => ("draw_end_k", |d, a| d.narrow(a, false, false, true)),
                        (true, true, _) => ("draw_begin_p", |d, a| d.narrow(a, true, true, false)),
                        (true, false, _) => {
                            ("draw_narrow_p", |d, a| d.narrow(a, true, false, false))
                        }
                    };
                side = 1 - side;
                step(label, make, &[Own(6), tries, state, Knobs, Own(2 + side), Own(4 + side)]);
            }
        };
        if self.top_k {
            levels(false, self.top_p);
        }
        if self.top_p {
            levels(true, false);
        }
        let (tries, state) = (Own(2 + side), Own(4 + side));
        step("draw_kept", Draw::kept, &[Logits, Knobs, tries, state, Own(7)]);
        let operands = [Logits, Knobs, tries, state, Own(7), Random, Tokens, History];
        step("draw", Draw::choose, &operands);
        out
    }

    fn logits(&self, k: &mut KernelBuilder) -> ParamId {
        k.param("logits", DType::F32, shape(&[self.rows.batch, self.vocabulary]), Access::In)
    }

    fn table(&self, k: &mut KernelBuilder, name: &str, columns: i64, access: Access) -> ParamId {
        k.param(name, DType::F32, shape(&[self.rows.batch, columns]), access)
    }

    fn knobs(&self, k: &mut KernelBuilder) -> ParamId {
        k.param("knobs", DType::F32, shape(&[1, 4]), Access::In)
    }

    /// A piece of a row; behind its end nothing is likely.
    fn piece(
        &self,
        k: &mut KernelBuilder,
        logits: ParamId,
        row: &Dim,
        piece: Dim,
        bv: &Dim,
    ) -> TileId {
        let low = Value::Float(f64::NEG_INFINITY);
        let one = vec![Dim::new(1), bv.clone()];
        let x = k.load_with(logits, vec![row.clone(), piece * bv], vec![1, 1], low, one);
        k.reshape(x, vec![bv.clone()])
    }

    fn finish(&self, k: KernelBuilder, arch: Arch, bv: i64, threads: i64) -> Result<Scheduled> {
        let threads = threads.min(bv / 4);
        let kernel: Kernel = k.finish();
        let schedule = schedule(arch, &[("BV", bv)], (threads, threads, 4), self.vocabulary, true);
        Ok(Scheduled { kernel, schedule })
    }

    /// `logits`, the largest logit of each piece, the smallest that is finite.
    fn ends(&self, arch: Arch) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw_ends");
        let bv = k.tile("BV");
        let logits = self.logits(&mut k);
        let most = self.table(&mut k, "most", self.pieces(), Access::Out);
        let least = self.table(&mut k, "least", self.pieces(), Access::Out);
        let row = k.grid("row", d(self.rows.batch));
        let piece = k.grid("piece", d(self.pieces()));
        let x = self.piece(&mut k, logits, &row, piece.clone(), &bv);
        let high = k.reduce(ReduceKind::Max, x, 0, None);
        let finite = line(&mut k, "{ x -> where(x > -f32(3e38), x, f32(3e38)) }", &[x], &bv)?;
        let low = k.reduce(ReduceKind::Min, finite, 0, None);
        for (to, value) in [(most, high), (least, low)] {
            let value = k.reshape(value, vec![d(1), d(1)]);
            k.store(to, vec![row.clone(), piece.clone()], value);
        }
        self.finish(k, arch, self.piece_len(), 128)
    }

    /// `most`, `least`, thresholds, state.
    fn open(&self, arch: Arch) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw_open");
        let bv = k.tile("BV");
        let most = self.table(&mut k, "most", self.pieces(), Access::In);
        let least = self.table(&mut k, "least", self.pieces(), Access::In);
        let tries = self.table(&mut k, "tries", TRIES, Access::Out);
        let state = self.table(&mut k, "state", STATE, Access::Out);
        let row = k.grid("row", d(self.rows.batch));
        let ends = [f64::NEG_INFINITY, f64::INFINITY];
        let init = ends.map(|v| k.full(Value::Float(v), f32s(&[])));
        let turns = d(self.pieces()).ceil_div(&bv);
        let (var, best) = k.begin_for("pieces", d(0), turns, &init);
        let mut next = Vec::new();
        for (i, (table, op, kind)) in
            [(most, Op::Max, ReduceKind::Max), (least, Op::Min, ReduceKind::Min)]
                .into_iter()
                .enumerate()
        {
            let one = vec![d(1), bv.clone()];
            let index = vec![row.clone(), var.clone() * &bv];
            let x = k.load_with(table, index, vec![1, 1], Value::Float(ends[i]), one);
            let x = k.reshape(x, vec![bv.clone()]);
            let here = k.reduce(kind, x, 0, None);
            let f = Func::binary(op, DType::F32);
            next.push(k.map(f, vec![scalar(best[i]), scalar(here)], vec![]));
        }
        let best = k.end_for(&next);
        let above = of(&mut k, "{ m -> m + max(abs(m), f32(1)) * f32(1e-5) }", &[best[0]])?;
        let nothing = k.full(Value::Float(0.0), f32s(&[]));
        self.range(&mut k, (tries, state), &row, &bv, best[1], [best[0], above, above, nothing])?;
        self.finish(k, arch, TRIES, 64)
    }

    /// Writes the thresholds from `low` to a state's `HIGH`, and the state.
    fn range(
        &self,
        k: &mut KernelBuilder,
        (tries, state): (ParamId, ParamId),
        row: &Dim,
        extent: &Dim,
        low: TileId,
        values: [TileId; STATE as usize],
    ) -> Result<()> {
        let places = k.iota(DType::I32, 0, Dim::new(0), vec![extent.clone()]);
        let share = 1.0 / TRIES as f64;
        let f = format!("{{ i, l, h -> l + (h - l) * (f32(i) * f32({share:?})) }}");
        let all = line(k, &f, &[places, low, values[HIGH as usize]], extent)?;
        let all = k.reshape(all, vec![Dim::new(1), extent.clone()]);
        k.store(tries, vec![row.clone(), Dim::new(0)], all);
        for (i, value) in values.into_iter().enumerate() {
            let one = k.reshape(value, vec![Dim::new(1), Dim::new(1)]);
            k.store(state, vec![row.clone(), Dim::new(i as i64)], one);
        }
        Ok(())
    }

    fn count(&self, arch: Arch) -> Result<Scheduled> {
        self.measure(arch, false)
    }

    fn weigh(&self, arch: Arch) -> Result<Scheduled> {
        self.measure(arch, true)
    }

    /// `logits`, thresholds, what is measured; with weights `logits`, `knobs`, thresholds, state, what is measured.
    fn measure(&self, arch: Arch, weigh: bool) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k =
            KernelBuilder::new(if weigh { "decode_draw_weigh" } else { "decode_draw_count" });
        let (bt, bv) = (k.tile("BT"), k.tile("BV"));
        let logits = self.logits(&mut k);
        let knobs = weigh.then(|| self.knobs(&mut k));
        let tries = self.table(&mut k, "tries", TRIES, Access::In);
        let state = weigh.then(|| self.table(&mut k, "state", STATE, Access::In));
        let all = shape(&[self.rows.batch, TRIES, self.pieces()]);
        let sums = k.param("sums", DType::F32, all, Access::Out);
        let row = k.grid("row", d(self.rows.batch));
        let some = k.grid("some", d(TRIES / TURNS).ceil_div(&bt)) * TURNS;
        let piece = k.grid("piece", d(self.pieces()));
        let x = self.piece(&mut k, logits, &row, piece.clone(), &bv);
        let weight = match (knobs, state) {
            (Some(knobs), Some(state)) => {
                Some(self.weight(&mut k, (knobs, state), &row, x, &bv)?)
            }
            _ => None,
        };
        let (turn, _) = k.begin_for("turn", d(0), d(TURNS), &[]);
        let first = (some + &turn) * &bt;
        let t = k.load(tries, vec![row.clone(), first.clone()], vec![d(1), bt.clone()]);
        let t = k.reshape(t, vec![bt.clone()]);
        let plane = vec![bt.clone(), bv.clone()];
        let kept = match weight {
            Some(w) => {
                let f = text("{ x, t, w -> where(x >= t, w, f32(0)) }", &[DType::F32; 3])?;
                k.map(f, vec![along(x, 1), along(t, 0), along(w, 1)], plane)
            }
            None => {
                let f = text("{ x, t -> where(x >= t, f32(1), f32(0)) }", &[DType::F32; 2])?;
                k.map(f, vec![along(x, 1), along(t, 0)], plane)
            }
        };
        let sum = k.reduce(ReduceKind::Sum, kept, 1, None);
        let sum = k.reshape(sum, vec![d(1), bt.clone(), d(1)]);
        k.store(sums, vec![row, first, piece], sum);
        k.end_for(&[]);
        let tiles = [("BT", MEASURED), ("BV", self.piece_len())];
        let schedule = schedule(arch, &tiles, (256, 32, 4), self.vocabulary, true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }

    /// `exp((x - most) * sharp)`.
    fn weight(
        &self,
        k: &mut KernelBuilder,
        (knobs, state): (ParamId, ParamId),
        row: &Dim,
        x: TileId,
        bv: &Dim,
    ) -> Result<TileId> {
        let sharp = entry(k, knobs, &Dim::new(0), Dim::new(0));
        let most = entry(k, state, row, Dim::new(MOST));
        line(k, "{ x, m, t -> exp((x - m) * t) }", &[x, most, sharp], bv)
    }

    /// What was measured, thresholds, state, `knobs`, next thresholds, next state. Of weights the `first` time says how
    /// much is enough; to `reopen` is to begin anew from the threshold that was found.
    fn narrow(&self, arch: Arch, weigh: bool, first: bool, reopen: bool) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw_narrow");
        let (bt, bp) = (k.tile("BT"), k.tile("BP"));
        let all = shape(&[self.rows.batch, TRIES, self.pieces()]);
        let sums = k.param("sums", DType::F32, all, Access::In);
        let tries = self.table(&mut k, "tries", TRIES, Access::In);
        let state = self.table(&mut k, "state", STATE, Access::In);
        let knobs = self.knobs(&mut k);
        let next_tries = self.table(&mut k, "next_tries", TRIES, Access::Out);
        let next_state = self.table(&mut k, "next_state", STATE, Access::Out);
        let row = k.grid("row", d(self.rows.batch));
        let none = k.full(Value::Float(0.0), f32s(&[&bt]));
        let turns = d(self.pieces()).ceil_div(&bp);
        let (var, sum) = k.begin_for("pieces", d(0), turns, &[none]);
        let one = vec![d(1), bt.clone(), bp.clone()];
        let some = k.load(sums, vec![row.clone(), d(0), var * &bp], one);
        let some = k.reshape(some, vec![bt.clone(), bp.clone()]);
        let here = k.reduce(ReduceKind::Sum, some, 1, None);
        let add = Func::binary(Op::Add, DType::F32);
        let next = k.map(add, vec![along(sum[0], 0), along(here, 0)], vec![bt.clone()]);
        let sum = k.end_for(&[next])[0];
        let t = k.load(tries, vec![row.clone(), d(0)], vec![d(1), bt.clone()]);
        let t = k.reshape(t, vec![bt.clone()]);
        let [most, above, high] = [MOST, ABOVE, HIGH].map(|i| entry(&mut k, state, &row, d(i)));
        let enough = match (weigh, first) {
            (false, _) => entry(&mut k, knobs, &d(0), d(1)),
            (true, false) => entry(&mut k, state, &row, d(ENOUGH)),
            (true, true) => {
                let all = k.reduce(ReduceKind::Max, sum, 0, None);
                let share = entry(&mut k, knobs, &d(0), d(2));
                of(&mut k, "{ a, s -> a * s }", &[all, share])?
            }
        };
        // The lowest threshold keeps what the ones before found, whether that is enough or not.
        let lowest = k.reduce(ReduceKind::Min, t, 0, None);
        let f = "{ t, s, e, l -> where(s >= e, t, l) }";
        let has = line(&mut k, f, &[t, sum, enough, lowest], &bt)?;
        let low = k.reduce(ReduceKind::Max, has, 0, None);
        let f = "{ t, s, e, l, h -> where(s >= e, h, where(t > l, t, h)) }";
        let lacks = line(&mut k, f, &[t, sum, enough, lowest, high], &bt)?;
        let next_high = k.reduce(ReduceKind::Min, lacks, 0, None);
        let next_high = if reopen { above } else { next_high };
        let values = [most, above, next_high, enough];
        self.range(&mut k, (next_tries, next_state), &row, &bt, low, values)?;
        let tiles = [("BT", TRIES), ("BP", 128)];
        let schedule = schedule(arch, &tiles, (1024, 32, 4), self.pieces(), true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }

    /// The weights of the logits that are kept; `from` is the threshold.
    fn kept_of(
        &self,
        k: &mut KernelBuilder,
        x: TileId,
        weight: TileId,
        from: TileId,
        bv: &Dim,
    ) -> Result<TileId> {
        line(k, "{ x, t, w -> where(x >= t, w, f32(0)) }", &[x, from, weight], bv)
    }

    /// `logits`, `knobs`, thresholds, state, the weight of each piece.
    fn kept(&self, arch: Arch) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw_kept");
        let bv = k.tile("BV");
        let logits = self.logits(&mut k);
        let knobs = self.knobs(&mut k);
        let tries = self.table(&mut k, "tries", TRIES, Access::In);
        let state = self.table(&mut k, "state", STATE, Access::In);
        let weights = self.table(&mut k, "weights", self.pieces(), Access::Out);
        let row = k.grid("row", d(self.rows.batch));
        let piece = k.grid("piece", d(self.pieces()));
        let x = self.piece(&mut k, logits, &row, piece.clone(), &bv);
        let from = entry(&mut k, tries, &row, d(0));
        let weight = self.weight(&mut k, (knobs, state), &row, x, &bv)?;
        let kept = self.kept_of(&mut k, x, weight, from, &bv)?;
        let sum = k.reduce(ReduceKind::Sum, kept, 0, None);
        let sum = k.reshape(sum, vec![d(1), d(1)]);
        k.store(weights, vec![row, piece], sum);
        self.finish(k, arch, self.piece_len(), 128)
    }

    /// `logits`, `knobs`, thresholds, state, the weight of each piece, `random`, `tokens`, `history`.
    fn choose(&self, arch: Arch) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw");
        let bv = k.tile("BV");
        let rows = &self.rows;
        rows.declare(&mut k);
        let logits = self.logits(&mut k);
        let knobs = self.knobs(&mut k);
        let tries = self.table(&mut k, "tries", TRIES, Access::In);
        let state = self.table(&mut k, "state", STATE, Access::In);
        let weights = self.table(&mut k, "weights", self.pieces(), Access::In);
        let table = shape(&[rows.positions + 1, rows.batch]);
        let random = k.param("random", DType::F32, table, Access::In);
        let (tokens, history) = super::sample::results(&mut k, rows);
        let row = k.grid("row", d(rows.batch));
        let turns = d(self.pieces()).ceil_div(&bv);
        let weights_at = |k: &mut KernelBuilder, var: &Dim| {
            let index = vec![row.clone(), var.clone() * &bv];
            let w = k.load(weights, index, vec![d(1), bv.clone()]);
            k.reshape(w, vec![bv.clone()])
        };
        let (add, min, max) = (
            Func::binary(Op::Add, DType::F32),
            Func::binary(Op::Min, DType::I32),
            Func::binary(Op::Max, DType::I32),
        );
        let none = k.full(Value::Float(0.0), f32s(&[]));
        let (var, all) = k.begin_for("total", d(0), turns.clone(), &[none]);
        let w = weights_at(&mut k, &var);
        let here = k.reduce(ReduceKind::Sum, w, 0, None);
        let next = k.map(add.clone(), vec![scalar(all[0]), scalar(here)], vec![]);
        let all = k.end_for(&[next])[0];
        let next_row = Dim::sym(AT) + rows.new;
        let u = entry(&mut k, random, &next_row, row.clone());
        let wanted = of(&mut k, "{ a, u -> a * u }", &[all, u])?;

        // The first piece with weight at which the running sum is beyond, or the last one with weight.
        let int = TileType::new(DType::I32, vec![]);
        let [zero, nowhere] = [0, NOWHERE].map(|v| k.full(Value::Int(v), int.clone()));
        let (var, found) = k.begin_for("piece", d(0), turns.clone(), &[none, nowhere, zero]);
        let w = weights_at(&mut k, &var);
        let running = k.scan(ReduceKind::Sum, w, 0, false, false);
        let places = k.iota(DType::I32, 0, var * &bv, vec![bv.clone()]);
        let [beyond, last] = self.places(&mut k, w, running, places, found[0], wanted, &bv)?;
        let here = k.reduce(ReduceKind::Sum, w, 0, None);
        let next = [
            k.map(add.clone(), vec![scalar(found[0]), scalar(here)], vec![]),
            k.map(min.clone(), vec![scalar(found[1]), scalar(beyond)], vec![]),
            k.map(max, vec![scalar(found[2]), scalar(last)], vec![]),
        ];
        let found = k.end_for(&next);
        let piece = k.map(min.clone(), vec![scalar(found[1]), scalar(found[2])], vec![]);
        let (var, before) = k.begin_for("before", d(0), turns, &[none]);
        let w = weights_at(&mut k, &var);
        let places = k.iota(DType::I32, 0, var * &bv, vec![bv.clone()]);
        let earlier =
            line(&mut k, "{ w, i, p -> where(i < p, w, f32(0)) }", &[w, places, piece], &bv)?;
        let here = k.reduce(ReduceKind::Sum, earlier, 0, None);
        let next = k.map(add, vec![scalar(before[0]), scalar(here)], vec![]);
        let before = k.end_for(&[next])[0];

        // The same inside the piece.
        let places = k.iota(DType::I32, 0, d(0), vec![bv.clone()]);
        let places = line(
            &mut k,
            &format!("{{ i, p -> p * {} + i }}", self.piece_len()),
            &[places, piece],
            &bv,
        )?;
        let one = vec![d(1), bv.clone()];
        let x = k.gather(logits, 1, places, vec![row.clone(), d(0)], one);
        let x = k.reshape(x, vec![bv.clone()]);
        let weight = self.weight(&mut k, (knobs, state), &row, x, &bv)?;
        let from = entry(&mut k, tries, &row, d(0));
        let kept = self.kept_of(&mut k, x, weight, from, &bv)?;
        let f = format!("{{ w, i -> where(i < {}, w, f32(0)) }}", self.vocabulary);
        let kept = line(&mut k, &f, &[kept, places], &bv)?;
        let running = k.scan(ReduceKind::Sum, kept, 0, false, false);
        let [beyond, last] = self.places(&mut k, kept, running, places, before, wanted, &bv)?;
        let token = k.map(min, vec![scalar(beyond), scalar(last)], vec![]);
        let one = k.reshape(token, vec![d(1)]);
        k.store(tokens, vec![row.clone()], one);
        let one = k.reshape(token, vec![d(1), d(1)]);
        k.store(history, vec![next_row, row.clone()], one);
        self.finish(k, arch, self.piece_len(), 256)
    }

    /// Of the places that have weight: the first at which `before` and the running sum exceed what is wanted, and the
    /// last.
    #[allow(clippy::too_many_arguments, reason = "one search is this many facts")]
    fn places(
        &self,
        k: &mut KernelBuilder,
        weights: TileId,
        running: TileId,
        places: TileId,
        before: TileId,
        wanted: TileId,
        bv: &Dim,
    ) -> Result<[TileId; 2]> {
        let f = format!(
            "{{ w, r, i, b, t -> where(b + r > t, where(w > f32(0), i, i32({NOWHERE})), i32({NOWHERE})) }}"
        );
        let beyond = line(k, &f, &[weights, running, places, before, wanted], bv)?;
        let beyond = k.reduce(ReduceKind::Min, beyond, 0, None);
        let f = "{ w, i -> where(w > f32(0), i, i32(0)) }";
        let last = line(k, f, &[weights, places], bv)?;
        Ok([beyond, k.reduce(ReduceKind::Max, last, 0, None)])
    }
}
