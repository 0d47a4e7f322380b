//! What `wgmma.mma_async` multiplies, as a table, and how a step must look to be one.
//!
//! PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async" (types, shapes and
//! their depth), "Matrix Shape" (columns), "Strides and Major-ness" (only 16-bit operands may lie
//! with their depth across).

use super::Checker;
use crate::ir::*;
use tilewright_base::DType::{self, BF16, F8E4M3, F8E5M2, F16, F32, I8, I32, U8};

/// Left and right element type, accumulator, depth of one instruction. `f32` is multiplied as `tf32`.
#[rustfmt::skip]
pub(super) const SHAPES: [(DType, DType, DType, u32); 12] = [
    (BF16,   BF16,   F32, 16),
    (F16,    F16,    F32, 16),
    (F16,    F16,    F16, 16),
    (F32,    F32,    F32,  8),
    (F8E4M3, F8E4M3, F32, 32),
    (F8E4M3, F8E5M2, F32, 32),
    (F8E5M2, F8E4M3, F32, 32),
    (F8E5M2, F8E5M2, F32, 32),
    (I8,     I8,     I32, 32),
    (I8,     U8,     I32, 32),
    (U8,     I8,     I32, 32),
    (U8,     U8,     I32, 32),
];

/// Whether an instruction has `n` columns.
fn has_columns(n: u32, accumulator: DType) -> bool {
    let fine = if accumulator == I32 && n > 32 { 16 } else { 8 };
    (8..=256).contains(&n) && n.is_multiple_of(fine)
}

impl Checker<'_> {
    pub(super) fn wgmma(
        &mut self,
        stmt: &Stmt,
        acc: &FragRef,
        a: &WgmmaA,
        b: &SmemTile,
        turned: bool,
    ) {
        let aligned = self.role.is_some_and(|r| r.warps == 4 && r.first_warp % 4 == 0);
        self.step(stmt, aligned, "the role is not an aligned warpgroup");
        let Some((rows, cols)) = self.frag(stmt, acc) else { return };
        let frag = &self.program.frags[acc.frag];
        let tile = frag.spread == Spread::Wgmma && frag.extent == Extent::Tile;
        self.step(stmt, tile, "accumulators are not spread as wgmma's");
        let (acc_type, right) = (frag.dtype, self.operand(stmt, b, usize::from(turned)));
        let (b_depth, b_cols) = if turned { (b.cols, b.rows) } else { (b.rows, b.cols) };
        let (left, a_rows, depth) = match a {
            WgmmaA::Smem(tile) => (self.operand(stmt, tile, 1), tile.rows, tile.cols),
            WgmmaA::Frag(operand) => {
                let Some((rows, cols)) = self.frag(stmt, operand) else { return };
                let frag = &self.program.frags[operand.frag];
                let fits = frag.dtype.bits() == 16 && frag.spread == Spread::Wgmma;
                self.step(stmt, fits, "a left operand in registers has 16 bits and wgmma's spread");
                (Some(frag.dtype), rows, cols)
            }
        };
        self.step(stmt, a_rows == rows, "left operand and accumulators differ in rows");
        self.step(stmt, depth == b_depth, "the operands differ in depth");
        self.step(stmt, b_cols == cols, "right operand and accumulators differ in columns");
        self.step(stmt, rows.is_multiple_of(64), "rows are not a multiple of 64");
        let columns = has_columns(cols, acc_type);
        self.step(stmt, columns, &format!("no instruction has {cols} columns"));
        let (Some(left), Some(right)) = (left, right) else { return };
        match SHAPES.iter().find(|s| (s.0, s.1, s.2) == (left, right, acc_type)) {
            Some((_, _, _, k)) => {
                let whole = depth > 0 && depth.is_multiple_of(*k);
                self.step(stmt, whole, &format!("the depth {depth} is not a multiple of {k}"));
            }
            None => {
                let what = format!("no instruction multiplies {left} by {right} into {acc_type}");
                self.step(stmt, false, &what);
            }
        }
    }

    /// An operand in shared memory, whose depth runs along `depth_axis` of the tile.
    fn operand(&mut self, stmt: &Stmt, tile: &SmemTile, depth_axis: usize) -> Option<DType> {
        if !self.tile(stmt, tile) {
            return None;
        }
        let smem = &self.program.smem[tile.smem];
        let (dtype, bits) = (smem.dtype, smem.dtype.bits());
        let deep = smem.contiguous == depth_axis;
        self.step(stmt, deep || bits == 16, "only 16-bit operands may lie across their depth");
        self.step(stmt, smem.swizzle != Swizzle::None, "an operand's buffer is not swizzled");
        let span = smem.swizzle.span_bytes() * 8 / bits.max(1);
        // Along the depth, an instruction may start inside of a panel: 32 bytes further on.
        let step = if deep { 32 * 8 / bits.max(1) } else { span };
        let (along, across) =
            if smem.contiguous == 1 { (&tile.col, &tile.row) } else { (&tile.row, &tile.col) };
        let starts = self.multiple(along, step) && self.multiple(across, 8);
        self.step(stmt, starts, "an operand does not start at a whole panel and group of 8 lines");
        Some(dtype)
    }
}
