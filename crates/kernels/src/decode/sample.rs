//! From a token to its vector, and from logits to the next token.
//!
//! The best token is found in two steps: pieces of the vocabulary, then the best piece. `draw.rs` draws one instead.

use super::{Rows, Scheduled, along, power_of_two, schedule, text};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::Value;
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Access, KernelBuilder, ParamId, ReduceKind};

/// Logits of a piece of the vocabulary.
const PIECE: i64 = 1024;

fn shape(extents: &[i64]) -> Layout {
    Layout::row_major(&extents.iter().map(|&n| Dim::new(n)).collect::<Vec<_>>())
}

/// `X[row, :] = table[token[row], :]`: `tokens [rows]` i32, `table`, `X` f32. With `places` rows of a table of that many
/// positions are added, which stands behind the other.
///
/// # Errors
/// Our bug.
pub fn embed(
    of: &Rows,
    [vocabulary, hidden]: [i64; 2],
    places: Option<i64>,
    stored: DType,
    arch: Arch,
) -> Result<Scheduled> {
    let (d, rows) = (Dim::new, of.count());
    let mut k = KernelBuilder::new("decode_embed");
    let bc = k.tile("BC");
    let tokens = k.param("tokens", DType::I32, shape(&[rows]), Access::In);
    let table = k.param("table", stored, shape(&[vocabulary, hidden]), Access::In);
    let places = places.map(|n| k.param("places", stored, shape(&[n, hidden]), Access::In));
    let x = k.param("X", DType::F32, shape(&[rows, hidden]), Access::Out);
    let row = k.grid("row", d(rows));
    let at = k.grid("pc", d(hidden).ceil_div(&bc)) * &bc;
    let token = k.load(tokens, vec![row.clone()], vec![d(1)]);
    let one = vec![d(1), bc.clone()];
    let picked = k.gather(table, 0, token, vec![d(0), at.clone()], one.clone());
    let f = text("{ x -> f32(x) }", &[stored])?;
    let mut wide = k.map(f, vec![k.plain(picked)], one.clone());
    if let Some(places) = places {
        of.declare(&mut k);
        let (_, position) = of.place(&row);
        let place = k.load(places, vec![position, at.clone()], one.clone());
        let f = text("{ x, p -> x + f32(p) }", &[DType::F32, stored])?;
        wide = k.map(f, vec![k.plain(wide), k.plain(place)], one);
    }
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
pub(super) fn results(k: &mut KernelBuilder, rows: &Rows) -> (ParamId, ParamId) {
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
