//! Copies between tiles that lie across each other: what is contiguous along one axis where it is
//! read, and along another where it is written.
//!
//! Square blocks go through registers: one vector per row is read, the rows are turned into columns,
//! and one vector per column is written. For `L` lanes, step `d = 1, 2, 4, ..` exchanges, between the
//! rows `i` and `i + d`, the lanes whose bit `d` differs from the row's:
//!
//! ```text
//! a0 a1     a0 b0
//! b0 b1  -> a1 b1      (L = 2, d = 1)
//! ```
//!
//! Elements have 32 or 8 bits. What is left at the ends of both axes is copied element by element.

use crate::emitter::{Emitter, LANE, Place, lane_coefficient};
use crate::ops::{mem_elem, reg_elem, vector};
use std::sync::Arc;
use tilewright_base::Result;
use tilewright_layout::{Dim, Range, uppers};
use tilewright_tile::TileId;

/// Two axes to turn, and the lanes of a vector.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// Contiguous where it is read.
    from: usize,
    /// Contiguous where it is written.
    pub(crate) to: usize,
    pub(crate) lanes: u32,
}

/// Side of a square of bytes: as many as an instruction that picks among bytes of two registers takes, whatever the
/// processor's longest vectors are.
const BYTES: u32 = 16;

/// Where the element at some coordinates of a tile is written.
pub(crate) type Destination<'d> = &'d dyn Fn(&Emitter<'_>, &[Dim]) -> Place;

impl Emitter<'_> {
    /// The axes to turn when this part of a tile is memory that lies across its destination.
    pub(crate) fn turn_of(
        &mut self,
        tile: TileId,
        base: &[Dim],
        counts: &[Dim],
        to: Destination<'_>,
    ) -> Option<Turn> {
        let dtype = self.k.ty(tile).dtype;
        let lanes = match dtype.bits() {
            32 => self.knobs.vector_bits / 32,
            8 => BYTES,
            _ => return None,
        };
        let w = i64::from(lanes);
        if mem_elem(dtype) != reg_elem(dtype) {
            return None;
        }
        let long: Vec<usize> =
            (0..counts.len()).filter(|&d| self.facts.bounds(&counts[d]).max >= w).collect();
        if long.len() < 2 {
            return None;
        }
        self.facts.declare(LANE, Range { min: 0, max: w - 1 }, vec![]);
        // Any whole vector along `lane`, any element along the others.
        let at = |e: &mut Self, lane: usize| -> Vec<Dim> {
            let mut coords = Vec::new();
            for (d, count) in counts.iter().enumerate() {
                let name: Arc<str> = format!("$turn{d}").into();
                let part: Arc<str> = format!("$turned{d}").into();
                let position = match d == lane {
                    true => {
                        let whole = e.facts.simplify(&count.floor_div(&Dim::new(w)));
                        let max = e.facts.bounds(&whole).max.saturating_sub(1).max(0);
                        e.facts.declare(&part, Range { min: 0, max }, uppers(&whole));
                        Dim::sym(part) * w + Dim::sym(LANE)
                    }
                    false => {
                        let max = e.facts.bounds(count).max.saturating_sub(1).max(0);
                        e.facts.declare(&part, Range { min: 0, max }, uppers(count));
                        Dim::sym(part)
                    }
                };
                e.facts.define(&name, uppers(count), position);
                coords.push(&base[d] + Dim::sym(name));
            }
            coords
        };
        let mut found = None;
        for &b in &long {
            let coords = at(self, b);
            let place = to(self, &coords);
            let offset = self.settle(&place.offset);
            let writes = place.guards.is_empty() && place.dtype == dtype;
            if !writes || !lane_coefficient(&offset).is_some_and(|c| c.is(1)) {
                continue;
            }
            let reads = |e: &Self, coords: &[Dim]| {
                let coords: Vec<Dim> = coords.iter().map(|c| e.facts.simplify(c)).collect();
                let place = e.guarded_view(tile, &coords).filter(|p| p.dtype == dtype)?;
                Some(lane_coefficient(&e.settle(&place.offset)).is_some_and(|c| c.is(1)))
            };
            if reads(self, &coords) != Some(false) {
                continue;
            }
            for &a in long.iter().filter(|a| **a != b) {
                let coords = at(self, a);
                if reads(self, &coords) == Some(true) {
                    found = Some(Turn { from: a, to: b, lanes });
                }
            }
        }
        found
    }

    /// Copies this part of a tile, turned. `plain` copies a part without.
    #[allow(clippy::type_complexity, reason = "a callback over the emitter's state")]
    pub(crate) fn turn(
        &mut self,
        turn: Turn,
        tile: TileId,
        [base, counts]: [&[Dim]; 2],
        to: Destination<'_>,
        plain: &mut dyn FnMut(&mut Self, &[Dim], &[Dim]) -> Result<()>,
    ) -> Result<()> {
        let w = Dim::new(i64::from(turn.lanes));
        let wholes = [turn.from, turn.to].map(|d| self.facts.simplify(&counts[d].floor_div(&w)));
        let others: Vec<usize> =
            (0..counts.len()).filter(|d| ![turn.from, turn.to].contains(d)).collect();
        let mut coords = base.to_vec();
        self.turn_level(turn, tile, [base, counts], &others, &wholes, &mut coords, to)?;
        // The ends: of the axis that is read along, and of the other beside whole blocks.
        let mut counts = counts.to_vec();
        for (axis, whole) in [turn.from, turn.to].into_iter().zip(&wholes) {
            let done = self.facts.simplify(&(whole * &w));
            let rest = self.facts.simplify(&counts[axis].modulo(&w));
            if !rest.is(0) {
                let (mut from, mut left) = (base.to_vec(), counts.clone());
                from[axis] = &base[axis] + &done;
                left[axis] = rest;
                plain(self, &from, &left)?;
            }
            counts[axis] = done;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the recursion carries the whole nest")]
    fn turn_level(
        &mut self,
        turn: Turn,
        tile: TileId,
        [base, counts]: [&[Dim]; 2],
        others: &[usize],
        wholes: &[Dim; 2],
        coords: &mut Vec<Dim>,
        to: Destination<'_>,
    ) -> Result<()> {
        if let Some((&axis, rest)) = others.split_first() {
            return self.counted(&counts[axis], &mut |e, x| {
                coords[axis] = &base[axis] + x;
                e.turn_level(turn, tile, [base, counts], rest, wholes, coords, to)
            });
        }
        self.counted(&wholes[0], &mut |e, i| {
            e.counted(&wholes[1], &mut |e, j| {
                let corner = [&i, &j].map(|x| x * i64::from(turn.lanes));
                e.turn_block(turn, tile, [base, counts], coords, &corner, to)
            })
        })
    }

    /// One square of vectors, whose first element is at `corner` along the two axes.
    fn turn_block(
        &mut self,
        turn: Turn,
        tile: TileId,
        [base, counts]: [&[Dim]; 2],
        coords: &[Dim],
        corner: &[Dim; 2],
        to: Destination<'_>,
    ) -> Result<()> {
        let lanes = turn.lanes;
        self.facts.declare(LANE, Range { min: 0, max: i64::from(lanes) - 1 }, vec![]);
        let named = |e: &mut Self, axis: usize, at: Dim| {
            let name = e.symbol();
            e.facts.define(&name, uppers(&counts[axis]), at);
            &base[axis] + Dim::sym(name)
        };
        let outer = (std::mem::replace(&mut self.lanes, lanes), self.mask.take());
        let along = named(self, turn.from, &corner[0] + Dim::sym(LANE));
        let mut rows = Vec::new();
        for i in 0..i64::from(lanes) {
            let mut at = coords.to_vec();
            at[turn.from] = along.clone();
            at[turn.to] = named(self, turn.to, &corner[1] + i);
            let at: Vec<Dim> = at.iter().map(|c| self.facts.simplify(c)).collect();
            // Elements that may lie outside are read under a mask.
            let row = match self.view(tile, &at) {
                Some(place) => self.load(&place, None),
                None => self.eval(tile, &at)?,
            };
            rows.push(row);
        }
        let columns = self.turned(rows, self.k.ty(tile).dtype, lanes);
        let along = named(self, turn.to, &corner[1] + Dim::sym(LANE));
        for (i, column) in (0..).zip(&columns) {
            let mut at = coords.to_vec();
            at[turn.from] = named(self, turn.from, &corner[0] + i);
            at[turn.to] = along.clone();
            let place = to(self, &at);
            self.store(&place, column, false)?;
        }
        (self.lanes, self.mask) = outer;
        Ok(())
    }

    /// Rows to columns.
    fn turned(
        &mut self,
        mut rows: Vec<String>,
        dtype: tilewright_base::DType,
        lanes: u32,
    ) -> Vec<String> {
        let v = vector(reg_elem(dtype), lanes);
        let mut d = 1;
        while d < rows.len() {
            for i in (0..rows.len()).filter(|i| i & d == 0) {
                let mut pick = |lane: &dyn Fn(usize) -> usize| {
                    let lanes: Vec<String> =
                        (0..lanes as usize).map(|j| format!("i32 {}", lane(j))).collect();
                    let mask = format!("<{} x i32> <{}>", lanes.len(), lanes.join(", "));
                    let (a, b) = (&rows[i], &rows[i | d]);
                    self.c.t.ins(format_args!("shufflevector {v} {a}, {v} {b}, {mask}"))
                };
                let n = lanes as usize;
                let low = pick(&|j| if j & d == 0 { j } else { n + (j ^ d) });
                let high = pick(&|j| if j & d == 0 { j ^ d } else { n + j });
                (rows[i], rows[i | d]) = (low, high);
            }
            d *= 2;
        }
        rows
    }
}
