//! Sums over rows in the epilogue of a product.
//!
//! ```text
//! left:  store P[m, part] = reduce(reshape(t, [BM, parts, PART_COLUMNS]), axis 2)      t: a tile of the product's shape
//! read:  r = reduce(load P[m, 0..parts], axis 1)                                       r: one number a row
//! ```
//!
//! Each part is summed by one instance of the multiplying role, chunk after chunk, and stored once; a row's parts are added in order.

use crate::epilogue::{Evaluator, PART_COLUMNS, vector_along, whole};
use crate::streams::{Defs, definitions, extents};
use std::collections::BTreeSet;
use tilewright_base::{Error, Result};
use tilewright_device::{Cond, Extent, FragRef, Stmt};
use tilewright_layout::Dim;
use tilewright_tile::{Compare, ParamId, ReduceKind, TileId, TileOp};

/// Registers of a thread for parts that are read at once.
const READ_REGISTERS: u32 = 16;

/// Tiles that are only summed.
pub(crate) fn summed(after: &[tilewright_tile::Stmt]) -> BTreeSet<TileId> {
    let defs = definitions(after);
    let of = |op: &&TileOp| match op {
        TileOp::Reduce { x, .. } => Some(*x),
        _ => None,
    };
    defs.values().filter_map(of).collect()
}

/// Whether a stored value is sums over parts of rows.
pub(crate) fn is_sum(defs: &Defs<'_>, value: TileId) -> bool {
    matches!(defs.get(&value), Some(TileOp::Reduce { .. }))
}

impl Evaluator<'_, '_> {
    /// The tile behind sums of parts of [`PART_COLUMNS`] columns.
    fn in_parts(&self, value: TileId) -> Result<TileId> {
        let refused = || Error::unsupported("a reduction after the products");
        let TileOp::Reduce { kind: ReduceKind::Sum, x, axis: 2, limit: None } =
            self.definition(value)?
        else {
            return Err(refused());
        };
        let TileOp::Reshape(tile) = self.definition(x)? else { return Err(refused()) };
        let (parts, whole) = (extents(self.b.kernel, x)?, extents(self.b.kernel, tile)?);
        match (&parts[..], &whole[..]) {
            ([rows, count, PART_COLUMNS], [tile_rows, cols])
                if rows == tile_rows && count * PART_COLUMNS == *cols =>
            {
                Ok(tile)
            }
            _ => Err(refused()),
        }
    }

    /// Stores sums over parts of rows: each with the chunk that ends it.
    pub(crate) fn store_part_sums(
        &mut self,
        param: ParamId,
        index: Vec<Dim>,
        value: TileId,
    ) -> Result<()> {
        let tile = self.in_parts(value)?;
        if !PART_COLUMNS.is_multiple_of(self.chunk) || index.len() != 2 {
            return Err(Error::unsupported(format!(
                "sums over {PART_COLUMNS} columns in chunks of {}",
                self.chunk
            )));
        }
        let src = self.tile(tile)?;
        let dtype = self.dtype(tile);
        let dst = whole(self.b.frag("sums", dtype, self.chunk, Extent::PerRow));
        let chunks = Dim::new(i64::from(PART_COLUMNS / self.chunk));
        let chunk = Dim::sym("chunk");
        let mut at = index;
        at[0] = at[0].clone() + &self.b.row0();
        at[1] = at[1].clone() + &chunk.floor_div(&chunks);
        let kind = ReduceKind::Sum;
        let reduce =
            |accumulate| Stmt::Reduce { dst: dst.clone(), kind, src: src.clone(), accumulate };
        let store = Stmt::Store { param, at, axes: (Some(0), None), src: dst.clone(), vector: 1 };
        if self.chunk == PART_COLUMNS {
            self.steps.extend([reduce(false), store]);
            return Ok(());
        }
        let within = chunk.modulo(&chunks);
        let last = chunks - &Dim::new(1);
        let when = |rhs: Dim, then: Vec<Stmt>, otherwise: Vec<Stmt>| Stmt::If {
            cond: Cond { lhs: within.clone(), compare: Compare::Eq, rhs },
            then,
            otherwise,
        };
        self.steps.push(when(Dim::new(0), vec![reduce(false)], vec![reduce(true)]));
        self.steps.push(when(last, vec![store], Vec::new()));
        Ok(())
    }

    /// Adds up the loaded parts of each row.
    pub(crate) fn sum_loaded(&mut self, dst: &FragRef, x: TileId) -> Result<()> {
        let shape = extents(self.b.kernel, x)?;
        let (TileOp::Load { param, index, steps, fill }, [_, parts]) =
            (self.definition(x)?, &shape[..])
        else {
            return Err(Error::unsupported("a reduction after the products"));
        };
        if steps.iter().any(|s| *s != 1) {
            return Err(Error::unsupported("a strided load after the products"));
        }
        let most = (READ_REGISTERS * 128 / self.b.rows).max(8);
        let cols = parts.next_multiple_of(8).min(most);
        let src = whole(self.b.frag("parts", self.dtype(x), cols, Extent::Tile));
        // Lines of an odd number of parts do not all begin where a wider access may.
        let vector = match vector_along(self.b, param, 1) {
            wide if parts.is_multiple_of(wide) => wide,
            _ => 1,
        };
        for piece in 0..parts.div_ceil(cols) {
            let mut at = index.clone();
            at[0] = at[0].clone() + &self.b.row0();
            at[1] = at[1].clone() + &Dim::new(i64::from(piece * cols));
            let axes = (Some(0), Some(1));
            self.once.push(Stmt::Load { dst: src.clone(), param, at, axes, fill, vector });
            let (dst, src) = (dst.clone(), src.clone());
            let kind = ReduceKind::Sum;
            self.once.push(Stmt::Reduce { dst, kind, src, accumulate: piece > 0 });
        }
        Ok(())
    }
}
