//! One token of each row by its probability, all blocks of the machine at work.
//!
//! ```text
//! ends     largest and smallest logit of each piece of the vocabulary: the first range of thresholds
//! per level, first for top_k (how many tokens), then for top_p (how much weight):
//!   level  the range, cut at TRIES places; per piece, what lies at or above each
//! kept     the weight of each piece at or above the last threshold
//! draw     the piece, then the token, at which the running sum passes a random number
//! ```
//!
//! The sums over the pieces, and with them the next range (from the cut that still has enough to the next one), are few
//! numbers: every block of the next launch works them out for itself, so that a level is one launch.
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

/// Pieces of the vocabulary at most: a block reads what was measured of all of them at once.
const PIECES: i64 = 128;
/// Thresholds of a level: six binary digits.
const TRIES: i64 = 64;
/// Levels: 30 binary digits of the range from the smallest to the largest logit.
const LEVELS: usize = 5;
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
const STATE: i64 = 8;
const MOST: i64 = 0;
const ABOVE: i64 = 1;
const LOW: i64 = 2;
const HIGH: i64 = 3;
const ENOUGH: i64 = 4;

/// What a launch knows of the thresholds before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// The ends of the pieces.
    Ends,
    /// How many logits lie at or above each threshold.
    Counts,
    /// How much weight, and whether that is the first time: it says how much is enough.
    Weights { first: bool },
}

/// Where that is: most and least, or what was measured, the thresholds and the state.
enum Source {
    Ends(ParamId, ParamId),
    Sums(ParamId, ParamId, ParamId),
}

/// A range of thresholds, and what stays the same.
struct Found {
    most: TileId,
    above: TileId,
    low: TileId,
    high: TileId,
    enough: TileId,
}

impl Draw {
    /// Pieces of a row; the last ones may lie behind its end.
    fn pieces(&self) -> i64 {
        let each = self.piece_len();
        ((self.vocabulary + each - 1) / each + 3) & !3
    }

    /// Logits of a piece.
    fn piece_len(&self) -> i64 {
        power_of_two((self.vocabulary + PIECES - 1) / PIECES).max(PIECES)
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
            ("measured 2", vec![rows, TRIES, pieces]),
            ("kept", vec![rows, pieces]),
        ]
    }

    /// The launches, in order.
    pub fn steps(&self) -> Vec<DrawStep> {
        use DrawPlace::{History, Knobs, Logits, Own, Random, Tokens};
        type Make = fn(&Draw, Arch) -> Result<Scheduled>;
        let mut out = Vec::new();
        let mut step = |label, make, operands: Vec<DrawPlace>| {
            out.push(DrawStep { label, make, operands });
        };
        step("draw_ends", Draw::ends, vec![Logits, Own(0), Own(1)]);
        let (mut known, mut side) = (Known::Ends, 0);
        let source = |known: Known, side: usize| match known {
            Known::Ends => vec![Own(0), Own(1)],
            _ => vec![Own(6 + side), Own(2 + side), Own(4 + side)],
        };
        for weigh in [(self.top_k, false), (self.top_p, true)].iter().filter(|w| w.0).map(|w| w.1) {
            for _ in 0..LEVELS {
                let (label, make): (_, Make) = match (known, weigh) {
                    (Known::Ends, false) => ("draw_open_k", |d, a| d.level(a, Known::Ends, false)),
                    (_, false) => ("draw_count", |d, a| d.level(a, Known::Counts, false)),
                    (Known::Ends, true) => ("draw_open_p", |d, a| d.level(a, Known::Ends, true)),
                    (Known::Counts, true) => {
                        ("draw_reopen_p", |d, a| d.level(a, Known::Counts, true))
                    }
                    (Known::Weights { first: true }, true) => {
                        ("draw_enough", |d, a| d.level(a, Known::Weights { first: true }, true))
                    }
                    (Known::Weights { first: false }, true) => {
                        ("draw_weigh", |d, a| d.level(a, Known::Weights { first: false }, true))
                    }
                };
                let mut operands = vec![Logits, Knobs];
                operands.extend(source(known, side));
                side = 1 - side;
                operands.extend([Own(6 + side), Own(2 + side), Own(4 + side)]);
                step(label, make, operands);
                let first = !matches!(known, Known::Weights { .. });
                known = if weigh { Known::Weights { first } } else { Known::Counts };
            }
        }
        let make: Make = match known {
            Known::Ends => |d, a| d.kept(a, Known::Ends),
            Known::Counts => |d, a| d.kept(a, Known::Counts),
            Known::Weights { .. } => |d, a| d.kept(a, Known::Weights { first: false }),
        };
        let mut operands = vec![Logits, Knobs];
        operands.extend(source(known, side));
        let state = Own(5 - side);
        operands.extend([Own(8), state]);
        step("draw_kept", make, operands);
        step("draw", Draw::choose, vec![Logits, Knobs, state, Own(8), Random, Tokens, History]);
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

    fn source(&self, k: &mut KernelBuilder, known: Known) -> Source {
        if known == Known::Ends {
            let [most, least] =
                ["most", "least"].map(|name| self.table(k, name, self.pieces(), Access::In));
            return Source::Ends(most, least);
        }
        let all = shape(&[self.rows.batch, TRIES, self.pieces()]);
        let sums = k.param("sums", DType::F32, all, Access::In);
        let tries = self.table(k, "tries", TRIES, Access::In);
        Source::Sums(sums, tries, self.table(k, "state", STATE, Access::In))
    }

    /// The range that follows from what is known; `bt` thresholds and `bp` pieces at once, all there are.
    fn found(
        &self,
        k: &mut KernelBuilder,
        (known, source, knobs): (Known, &Source, ParamId),
        row: &Dim,
        [bt, bp]: [&Dim; 2],
    ) -> Result<Found> {
        let d = Dim::new;
        let (sums, tries, state) = match source {
            Source::Ends(most, least) => {
                let mut end = |table: ParamId, kind: ReduceKind, fill: f64| {
                    let one = vec![d(1), bp.clone()];
                    let fill = Value::Float(fill);
                    let x = k.load_with(table, vec![row.clone(), d(0)], vec![1, 1], fill, one);
                    let x = k.reshape(x, vec![bp.clone()]);
                    k.reduce(kind, x, 0, None)
                };
                let most = end(*most, ReduceKind::Max, f64::NEG_INFINITY);
                let low = end(*least, ReduceKind::Min, f64::INFINITY);
                let above = of(k, "{ m -> m + max(abs(m), f32(1)) * f32(1e-5) }", &[most])?;
                let enough = k.full(Value::Float(0.0), f32s(&[]));
                return Ok(Found { most, above, low, high: above, enough });
            }
            Source::Sums(sums, tries, state) => (*sums, *tries, *state),
        };
        let one = vec![d(1), bt.clone(), bp.clone()];
        let all = k.load(sums, vec![row.clone(), d(0), d(0)], one);
        let all = k.reshape(all, vec![bt.clone(), bp.clone()]);
        let sum = k.reduce(ReduceKind::Sum, all, 1, None);
        let t = k.load(tries, vec![row.clone(), d(0)], vec![d(1), bt.clone()]);
        let t = k.reshape(t, vec![bt.clone()]);
        let [most, above, high] = [MOST, ABOVE, HIGH].map(|i| entry(k, state, row, d(i)));
        let enough = match known {
            Known::Weights { first: false } => entry(k, state, row, d(ENOUGH)),
            Known::Weights { first: true } => {
                let all = k.reduce(ReduceKind::Max, sum, 0, None);
                let share = entry(k, knobs, &d(0), d(2));
                of(k, "{ a, s -> a * s }", &[all, share])?
            }
            _ => entry(k, knobs, &d(0), d(1)),
        };
        // The lowest threshold keeps what the ones before found, whether that is enough or not.
        let lowest = k.reduce(ReduceKind::Min, t, 0, None);
        let has = line(k, "{ t, s, e, l -> where(s >= e, t, l) }", &[t, sum, enough, lowest], bt)?;
        let low = k.reduce(ReduceKind::Max, has, 0, None);
        let f = "{ t, s, e, l, h -> where(s >= e, h, where(t > l, t, h)) }";
        let lacks = line(k, f, &[t, sum, enough, lowest, high], bt)?;
        let high = k.reduce(ReduceKind::Min, lacks, 0, None);
        Ok(Found { most, above, low, high, enough })
    }

    /// The row of a table for what all blocks of a row know: that row for the first of them, one behind the end for the
    /// others, where nothing is stored.
    fn once(&self, row: &Dim, piece: &Dim) -> Dim {
        row.clone() + &(piece.clone() * self.rows.batch)
    }

    /// Puts the state of a range there.
    fn keep(&self, k: &mut KernelBuilder, state: ParamId, row: &Dim, found: &Found) {
        for (i, value) in [
            (MOST, found.most),
            (ABOVE, found.above),
            (LOW, found.low),
            (HIGH, found.high),
            (ENOUGH, found.enough),
        ] {
            let one = k.reshape(value, vec![Dim::new(1), Dim::new(1)]);
            k.store(state, vec![row.clone(), Dim::new(i)], one);
        }
    }

    /// A part of a piece: `bv` logits.
    fn part(
        &self,
        k: &mut KernelBuilder,
        logits: ParamId,
        [row, piece, turn]: [&Dim; 3],
        bv: &Dim,
    ) -> TileId {
        let low = Value::Float(f64::NEG_INFINITY);
        let at = piece.clone() * self.piece_len() + &(turn.clone() * bv);
        let one = vec![Dim::new(1), bv.clone()];
        let x = k.load_with(logits, vec![row.clone(), at], vec![1, 1], low, one);
        k.reshape(x, vec![bv.clone()])
    }

    /// `logits`, `knobs`, what is known; then what is measured, its thresholds, the state.
    fn level(&self, arch: Arch, known: Known, weigh: bool) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k =
            KernelBuilder::new(if weigh { "decode_draw_weigh" } else { "decode_draw_count" });
        let (bt, bv) = (k.tile("BT"), k.tile("BV"));
        let logits = self.logits(&mut k);
        let knobs = self.knobs(&mut k);
        let source = self.source(&mut k, known);
        let all = shape(&[self.rows.batch, TRIES, self.pieces()]);
        let next_sums = k.param("next_sums", DType::F32, all, Access::Out);
        let next_tries = self.table(&mut k, "next_tries", TRIES, Access::Out);
        let next_state = self.table(&mut k, "next_state", STATE, Access::InOut);
        let row = k.grid("row", d(self.rows.batch));
        let piece = k.grid("piece", d(self.pieces()));
        let mut found = self.found(&mut k, (known, &source, knobs), &row, [&bt, &bv])?;
        if weigh && known == Known::Counts {
            // Anew from the threshold that was found.
            found.high = found.above;
        }
        let places = k.iota(DType::I32, 0, d(0), vec![bt.clone()]);
        let share = 1.0 / TRIES as f64;
        let f = format!("{{ i, l, h -> l + (h - l) * (f32(i) * f32({share:?})) }}");
        let tries = line(&mut k, &f, &[places, found.low, found.high], &bt)?;

        let none = k.full(Value::Float(0.0), f32s(&[&bt]));
        let (turn, sum) = k.begin_for("turn", d(0), d(self.piece_len()).ceil_div(&bv), &[none]);
        let x = self.part(&mut k, logits, [&row, &piece, &turn], &bv);
        let plane = vec![bt.clone(), bv.clone()];
        let kept = match weigh {
            true => {
                let w = self.weight(&mut k, (knobs, found.most), x, &bv)?;
                let f = text("{ x, t, w -> where(x >= t, w, f32(0)) }", &[DType::F32; 3])?;
                k.map(f, vec![along(x, 1), along(tries, 0), along(w, 1)], plane)
            }
            false => {
                let f = text("{ x, t -> where(x >= t, f32(1), f32(0)) }", &[DType::F32; 2])?;
                k.map(f, vec![along(x, 1), along(tries, 0)], plane)
            }
        };
        let here = k.reduce(ReduceKind::Sum, kept, 1, None);
        let add = Func::binary(Op::Add, DType::F32);
        let next = k.map(add, vec![along(sum[0], 0), along(here, 0)], vec![bt.clone()]);
        let sum = k.end_for(&[next])[0];
        let sum = k.reshape(sum, vec![d(1), bt.clone(), d(1)]);
        k.store(next_sums, vec![row.clone(), d(0), piece.clone()], sum);
        let once = self.once(&row, &piece);
        let tries = k.reshape(tries, vec![d(1), bt.clone()]);
        k.store(next_tries, vec![once.clone(), d(0)], tries);
        self.keep(&mut k, next_state, &once, &found);
        let tiles = [("BT", TRIES), ("BV", PIECES)];
        let schedule = schedule(arch, &tiles, (256, 32, 4), self.vocabulary, true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }

    /// `exp((x - most) * sharp)`.
    fn weight(
        &self,
        k: &mut KernelBuilder,
        (knobs, most): (ParamId, TileId),
        x: TileId,
        bv: &Dim,
    ) -> Result<TileId> {
        let sharp = entry(k, knobs, &Dim::new(0), Dim::new(0));
        line(k, "{ x, m, t -> exp((x - m) * t) }", &[x, most, sharp], bv)
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

    /// `logits`, `knobs`, what is known; then the weight of each piece, the state.
    fn kept(&self, arch: Arch, known: Known) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw_kept");
        let (bt, bv) = (k.tile("BT"), k.tile("BV"));
        let logits = self.logits(&mut k);
        let knobs = self.knobs(&mut k);
        let source = self.source(&mut k, known);
        let weights = self.table(&mut k, "weights", self.pieces(), Access::Out);
        let next_state = self.table(&mut k, "next_state", STATE, Access::InOut);
        let row = k.grid("row", d(self.rows.batch));
        let piece = k.grid("piece", d(self.pieces()));
        let found = self.found(&mut k, (known, &source, knobs), &row, [&bt, &bv])?;
        let none = k.full(Value::Float(0.0), f32s(&[]));
        let (turn, sum) = k.begin_for("turn", d(0), d(self.piece_len()).ceil_div(&bv), &[none]);
        let x = self.part(&mut k, logits, [&row, &piece, &turn], &bv);
        let weight = self.weight(&mut k, (knobs, found.most), x, &bv)?;
        let kept = self.kept_of(&mut k, x, weight, found.low, &bv)?;
        let here = k.reduce(ReduceKind::Sum, kept, 0, None);
        let add = Func::binary(Op::Add, DType::F32);
        let next = k.map(add, vec![scalar(sum[0]), scalar(here)], vec![]);
        let sum = k.end_for(&[next])[0];
        let sum = k.reshape(sum, vec![d(1), d(1)]);
        k.store(weights, vec![row.clone(), piece.clone()], sum);
        self.keep(&mut k, next_state, &self.once(&row, &piece), &found);
        let tiles = [("BT", TRIES), ("BV", PIECES)];
        let schedule = schedule(arch, &tiles, (256, 32, 4), self.vocabulary, true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }

    /// `logits`, `knobs`, state, the weight of each piece, `random`, `tokens`, `history`.
    fn choose(&self, arch: Arch) -> Result<Scheduled> {
        let d = Dim::new;
        let mut k = KernelBuilder::new("decode_draw");
        let bv = k.tile("BV");
        let rows = &self.rows;
        rows.declare(&mut k);
        let logits = self.logits(&mut k);
        let knobs = self.knobs(&mut k);
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
        let [most, from] = [MOST, LOW].map(|i| entry(&mut k, state, &row, d(i)));
        let weight = self.weight(&mut k, (knobs, most), x, &bv)?;
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
