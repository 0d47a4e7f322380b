//! Heads that turn behind a product ([`Turn`]), where a row's halves lie in the registers of one thread.
//!
//! ```text
//! for each chunk of columns, whole heads:
//!   for each part of a half:    tables of the part, once
//!     for each head:            x, y = the same columns of both halves;  x', y' = f, g (x, y, tables)    or x, y of a head that stays
//!                               staged for the copy engine
//! ```
//!
//! Accumulators of tensor cores hold columns 8 apart in each thread, so both halves are there. A part is staged as soon as it is turned: a compiler
//! keeps the accumulators from one tile to the next, and beside them there is room for little.

use crate::epilogue::{Evaluator, whole};
use crate::streams::Defs;
use std::collections::BTreeSet;
use tilewright_base::{Error, Result};
use tilewright_device::{Cond, Extent, FragRef, SmemTile, Spread, Stmt};
use tilewright_layout::Dim;
use tilewright_tile::{Compare, Kernel, TileId, Turn};

/// Columns of a half that are turned at once: those of one store of matrices to shared memory.
const PART: u32 = 16;

/// How the heads of a stored tile turn, if they do.
pub(crate) fn found(kernel: &Kernel, defs: &Defs<'_>, value: TileId) -> Option<Turn> {
    Turn::read(kernel, &|tile| defs.get(&tile).copied(), value)
}

/// Tiles that are tables of such heads.
pub(crate) fn tables(kernel: &Kernel, defs: &Defs<'_>) -> BTreeSet<TileId> {
    defs.keys().filter_map(|t| found(kernel, defs, *t)).flat_map(|turn| turn.tables).collect()
}

impl Evaluator<'_, '_> {
    /// A part of the columns of a tile.
    fn part(&mut self, tile: TileId, from: Dim) -> Result<FragRef> {
        let outside = self.narrow(from, PART);
        let part = self.tile(tile);
        self.restore(outside);
        part
    }

    /// Stages the chunk of a tile with its heads turned.
    pub(crate) fn turn(&mut self, turn: &Turn, to: &SmemTile) -> Result<()> {
        let refused = || Error::unsupported(format!("heads of {} columns that turn", turn.width));
        let width = u32::try_from(turn.width).map_err(|_| refused())?;
        let half = width / 2;
        let heads = self.chunk / width;
        let fits = half.is_multiple_of(PART) && self.chunk.is_multiple_of(width);
        if !fits || self.b.spread != Spread::Wgmma {
            return Err(refused());
        }
        let number = |n: u32| Dim::new(i64::from(n));
        for at in (0..half).step_by(PART as usize) {
            let mut tables = Vec::new();
            for table in &turn.tables {
                tables.push(self.part(*table, number(at))?);
            }
            for head in 0..heads {
                let from = [0, half].map(|side| head * width + side + at);
                let mut old = Vec::new();
                for from in from {
                    old.push(self.part(turn.tile, self.column.clone() + &number(from))?);
                }
                let args: Vec<FragRef> = old.iter().chain(&tables).cloned().collect();
                let (mut then, mut otherwise) = (Vec::new(), Vec::new());
                for ((from, func), src) in from.into_iter().zip(&turn.halves).zip(old) {
                    let to = SmemTile { col: number(from), cols: PART, ..to.clone() };
                    let new = whole(self.b.frag("turned", func.dtype(), PART, Extent::Tile));
                    let (dst, func) = (new.clone(), func.clone());
                    then.push(Stmt::Map { dst, func, args: args.clone() });
                    then.push(Stmt::ToSmem { to: to.clone(), src: new });
                    otherwise.push(Stmt::ToSmem { to, src });
                }
                let before = Dim::sym("chunk") * &number(heads) + &number(head);
                let cond = Cond {
                    lhs: turn.first.clone() + &before,
                    compare: Compare::Lt,
                    rhs: Dim::new(0),
                };
                self.steps.push(Stmt::If { cond, then, otherwise });
            }
        }
        Ok(())
    }
}
