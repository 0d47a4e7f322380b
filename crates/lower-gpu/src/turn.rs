//! Heads that turn behind a product ([`Turn`]), where a row's halves lie in the registers of one thread.
//!
//! ```text
//! for each part of a half:   tables of the part, once
//!   for each head:           x, y = the same columns of both halves;  x', y' = f, g (x, y, tables)    or x, y of a head that stays
//! ```
//!
//! Accumulators of tensor cores hold columns 8 apart in each thread, so both halves are there when they are whole eights. The result has registers
//! of its own, which take the place of the sums'.

use crate::epilogue::Evaluator;
use std::collections::BTreeSet;
use tilewright_base::{Error, Result};
use tilewright_device::{Cond, Extent, FragId, FragRef, Spread, Stmt};
use tilewright_expr::Func;
use tilewright_layout::Dim;
use tilewright_tile::{Compare, Kernel, TileId, Turn};

use crate::streams::Defs;

/// Columns of a half that are turned at once: so many values of each table a thread holds for every two rows.
const PART: u32 = 32;

/// How the heads of a stored tile turn, if they do.
pub(crate) fn found(kernel: &Kernel, defs: &Defs<'_>, value: TileId) -> Option<Turn> {
    Turn::read(kernel, &|tile| defs.get(&tile).copied(), value)
}

/// Tiles that are tables of such heads.
pub(crate) fn tables(kernel: &Kernel, defs: &Defs<'_>) -> BTreeSet<TileId> {
    defs.keys().filter_map(|t| found(kernel, defs, *t)).flat_map(|turn| turn.tables).collect()
}

impl Evaluator<'_, '_> {
    /// `cols` columns of a tile from a known one on.
    fn columns(&mut self, tile: TileId, from: u32, cols: u32) -> Result<FragRef> {
        let whole = self.narrow(Dim::new(i64::from(from)), cols);
        let part = self.tile(tile);
        self.restore(whole);
        part
    }

    /// The tile with its heads turned, in registers of its own.
    pub(crate) fn turn(&mut self, turn: &Turn, tile_cols: u32) -> Result<FragId> {
        let refused = || Error::unsupported(format!("heads of {} columns that turn", turn.width));
        let width = u32::try_from(turn.width).map_err(|_| refused())?;
        let half = width / 2;
        let step = [PART, 16, 8].into_iter().find(|s| half.is_multiple_of(*s));
        let (Some(step), Spread::Wgmma) = (step, self.b.spread) else { return Err(refused()) };
        if !tile_cols.is_multiple_of(width) {
            return Err(refused());
        }
        let dtype = self.dtype(turn.tile);
        let out = self.b.frag("turned", dtype, tile_cols, Extent::Tile);
        for at in (0..half).step_by(step as usize) {
            let mut tables = Vec::new();
            for table in &turn.tables {
                tables.push(self.columns(*table, at, step)?);
            }
            for head in 0..tile_cols / width {
                let from = [0, half].map(|side| head * width + side + at);
                let [low, high] =
                    [self.columns(turn.tile, from[0], step)?, self.columns(turn.tile, from[1], step)?];
                let place = |from: u32| FragRef {
                    frag: out,
                    col: Dim::new(i64::from(from)),
                    cols: Some(step),
                };
                let (mut then, mut otherwise) = (Vec::new(), Vec::new());
                for ((from, func), old) in from.into_iter().zip(&turn.halves).zip([&low, &high]) {
                    let args = [&low, &high].into_iter().chain(&tables).cloned().collect();
                    then.push(Stmt::Map { dst: place(from), func: func.clone(), args });
                    let func = Func::identity(dtype);
                    let args = vec![old.clone()];
                    otherwise.push(Stmt::Map { dst: place(from), func, args });
                }
                let cond = Cond {
                    lhs: turn.first.clone() + &Dim::new(i64::from(head)),
                    compare: Compare::Lt,
                    rhs: Dim::new(0),
                };
                self.steps.push(Stmt::If { cond, then, otherwise });
            }
        }
        Ok(out)
    }
}
