//! Evaluation of virtual tiles: the element(s) at given coordinates, computed from definitions down
//! to loads. Also what such an expression touches, for choosing the vector axis, and the place of
//! an element when a tile is plain memory.

use crate::emitter::{Emitter, LANE, Loc, Place, lane_coefficient};
use crate::ops::{constant, reg_elem};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{Node, Op};
use tilewright_layout::{Dim, Range};
use tilewright_tile::{Operand, TileId, TileOp};

impl Emitter<'_> {
    /// The definition of a tile that is computed on demand.
    fn definition(&self, tile: TileId) -> Result<&TileOp> {
        self.defs[tile.index()].ok_or_else(|| {
            Error::bug(format!("tile {tile} of kernel @{} has no value", self.k.name))
        })
    }

    /// Coordinates of a map or broadcast operand for a coordinate of the result.
    pub(crate) fn operand_coords(&self, operand: &Operand, coords: &[Dim]) -> Result<Vec<Dim>> {
        let shape = self.extents(operand.tile)?;
        Ok(operand
            .along
            .iter()
            .zip(shape)
            .map(|(&a, extent)| if extent == 1 { Dim::new(0) } else { coords[a].clone() })
            .collect())
    }

    /// Coordinates in a tile of shape `from` of the element at `coords` of its reshape to `to`.
    pub(crate) fn reshape_coords(&self, from: &[i64], to: &[i64], coords: &[Dim]) -> Vec<Dim> {
        let mut out = vec![Dim::new(0); from.len()];
        let (mut i, mut j) = (0, 0);
        while i < from.len() {
            if from[i] == 1 {
                i += 1;
                continue;
            }
            while j < to.len() && to[j] == 1 {
                j += 1;
            }
            // Shortest runs with equal products.
            let (mut i_end, mut j_end) = (i + 1, j + 1);
            let (mut a, mut b) = (from[i], to.get(j).copied().unwrap_or(1));
            while a != b {
                if a < b && i_end < from.len() {
                    a *= from[i_end];
                    i_end += 1;
                } else if j_end < to.len() {
                    b *= to[j_end];
                    j_end += 1;
                } else {
                    break;
                }
            }
            if i_end == i + 1 && j_end == j + 1 {
                out[i] = coords[j].clone();
            } else {
                let mut linear = Dim::new(0);
                for t in j..j_end.min(to.len()) {
                    linear = linear * to[t] + self.facts.expand(&coords[t]);
                }
                let mut stride = 1;
                for t in (i..i_end).rev() {
                    let mut x = linear.floor_div(&Dim::new(stride));
                    if t > i {
                        x = x.modulo(&Dim::new(from[t]));
                    }
                    out[t] = self.facts.simplify(&x);
                    stride *= from[t];
                }
            }
            i = i_end;
            j = j_end;
        }
        out
    }

    /// The elements at `coords` in register form, for the current lanes.
    pub(crate) fn eval(&mut self, tile: TileId, coords: &[Dim]) -> Result<String> {
        let coords: Vec<Dim> = coords.iter().map(|c| self.facts.simplify(c)).collect();
        let dtype = self.k.ty(tile).dtype;
        if self.lanes > 1 && !coords.iter().any(|c| self.varies(c)) {
            // One value for all lanes.
            let keep = (self.lanes, self.mask.take());
            self.lanes = 1;
            let scalar = self.eval(tile, &coords);
            (self.lanes, self.mask) = keep;
            let scalar = scalar?;
            return Ok(self.splat_value(dtype, &scalar));
        }
        let key = (tile, coords.clone(), self.lanes);
        if let Some(known) = self.known_value(&key) {
            return Ok(known);
        }
        let value = match self.loc[tile.index()].clone() {
            Loc::Buffer(buf) => {
                let place = self.buffer_place(&buf, &coords);
                self.load(&place, None)
            }
            Loc::Acc(_) => {
                return Err(Error::bug(format!("accumulator {tile} is read outside its product")));
            }
            Loc::Virtual => self.eval_op(tile, &coords, dtype)?,
        };
        self.remember_value(key, &value);
        Ok(value)
    }

    fn splat_value(&mut self, dtype: DType, scalar: &str) -> String {
        let elem = reg_elem(dtype);
        // A literal needs no instructions.
        if !scalar.starts_with('%') {
            return crate::ops::splat_lit(elem, scalar, self.lanes);
        }
        self.c.splat(elem, scalar, self.lanes)
    }

    fn eval_op(&mut self, tile: TileId, coords: &[Dim], dtype: DType) -> Result<String> {
        let op = self.definition(tile)?.clone();
        Ok(match op {
            TileOp::Full(value) => constant(dtype, value, self.lanes),
            TileOp::Load { param, index, steps, fill } => {
                let global = global_coords(&index, &steps, coords);
                let place = self.param_place(param, &global);
                if self.knobs.ahead && self.mask.is_none() {
                    self.ask_ahead(param, &global);
                }
                self.load(&place, Some(fill))
            }
            TileOp::Gather { param, axis, rows, index, fill } => {
                let row = self.gather_row(rows, &coords[axis])?;
                let mut global: Vec<Dim> = index.iter().zip(coords).map(|(i, c)| i + c).collect();
                global[axis] = &index[axis] + row;
                let place = self.param_place(param, &global);
                self.load(&place, Some(fill))
            }
            TileOp::Map { func, args } => {
                let mut values = Vec::with_capacity(args.len());
                for arg in &args {
                    let at = self.operand_coords(arg, coords)?;
                    values.push(self.eval(arg.tile, &at)?);
                }
                let lanes = self.lanes;
                self.c.func(&func, &values, lanes)
            }
            TileOp::Permute { x, perm } => {
                let mut at = vec![Dim::new(0); perm.len()];
                for (i, &p) in perm.iter().enumerate() {
                    at[p] = coords[i].clone();
                }
                self.eval(x, &at)?
            }
            TileOp::Reshape(x) => {
                let at = self.reshape_coords(&self.extents(x)?, &self.extents(tile)?, coords);
                self.eval(x, &at)?
            }
            TileOp::Broadcast(operand) => {
                let at = self.operand_coords(&operand, coords)?;
                self.eval(operand.tile, &at)?
            }
            TileOp::Iota { axis, start } => {
                let value = self.dim_vector(&(start + &coords[axis]));
                let lanes = self.lanes;
                self.c.cast(DType::I64, dtype, lanes, &value)
            }
            TileOp::Random { seed, start } => {
                let shape = self.extents(tile)?;
                let mut position = start;
                let mut stride = 1;
                for (c, extent) in coords.iter().zip(&shape).rev() {
                    position = position + c * stride;
                    stride *= extent;
                }
                let counter = self.dim_vector(&position);
                let lanes = self.lanes;
                self.c.random(dtype, seed, &counter, lanes)
            }
            TileOp::Reduce { .. }
            | TileOp::ArgReduce { .. }
            | TileOp::Scan { .. }
            | TileOp::Mma { .. } => {
                return Err(Error::bug(format!("tile {tile} is read before it is computed")));
            }
        })
    }

    /// A symbol for the row number that a gather reads from data.
    fn gather_row(&mut self, rows: TileId, at: &Dim) -> Result<Dim> {
        let dtype = self.k.ty(rows).dtype;
        let varies = self.varies(at);
        let keep = (self.lanes, self.mask.clone());
        if !varies {
            self.lanes = 1;
            self.mask = None;
        }
        let value = self.eval(rows, std::slice::from_ref(at));
        let lanes = self.lanes;
        let value = value.map(|v| self.c.cast(dtype, DType::I64, lanes, &v));
        (self.lanes, self.mask) = keep;
        let value = value?;
        let name = self.symbol();
        self.facts.declare(&name, Range { min: i64::MIN, max: i64::MAX }, vec![]);
        if varies && lanes > 1 {
            self.bind_vector(&name, &value);
        } else {
            self.bind(&name, &value);
        }
        Ok(Dim::sym(name))
    }

    /// Where the element lies, when the tile is memory as it stands (through views and lossless
    /// widening) and all of it lies inside. The place's type is the one in memory.
    pub(crate) fn view(&self, tile: TileId, coords: &[Dim]) -> Option<Place> {
        self.packed_view(tile, coords).filter(|place| place.dtype.bits() >= 8)
    }

    /// As [`Emitter::view`], also of numbers that share a byte: their offsets count numbers.
    pub(crate) fn packed_view(&self, tile: TileId, coords: &[Dim]) -> Option<Place> {
        self.guarded_view(tile, coords).filter(|place| place.guards.is_empty())
    }

    /// As [`Emitter::packed_view`], also of elements that may lie outside their memory: there they have another value.
    pub(crate) fn guarded_view(&self, tile: TileId, coords: &[Dim]) -> Option<Place> {
        Some(match &self.loc[tile.index()] {
            Loc::Buffer(buf) => self.buffer_place(buf, coords),
            Loc::Acc(_) => return None,
            Loc::Virtual => match self.defs[tile.index()]? {
                TileOp::Load { param, index, steps, .. } => {
                    self.param_place(*param, &global_coords(index, steps, coords))
                }
                TileOp::Permute { x, perm } => {
                    let mut at = vec![Dim::new(0); perm.len()];
                    for (i, &p) in perm.iter().enumerate() {
                        at[p] = coords[i].clone();
                    }
                    self.guarded_view(*x, &at)?
                }
                TileOp::Reshape(x) => {
                    let from = self.extents(*x).ok()?;
                    let to = self.extents(tile).ok()?;
                    self.guarded_view(*x, &self.reshape_coords(&from, &to, coords))?
                }
                TileOp::Broadcast(operand) => {
                    self.guarded_view(operand.tile, &self.operand_coords(operand, coords).ok()?)?
                }
                TileOp::Map { func, args } => {
                    let [arg] = args.as_slice() else { return None };
                    let widening = func.is_identity()
                        || matches!(func.node(func.result()), Node::Op(Op::Cast, a)
                            if matches!(func.node(a[0]), Node::Param(0))
                                && lossless(func.dtype_of(a[0]), func.dtype()));
                    if !widening {
                        return None;
                    }
                    self.packed_view(arg.tile, &self.operand_coords(arg, coords).ok()?)?
                }
                _ => return None,
            },
        })
    }

    /// Offsets of everything that the element depends on, with their element types.
    fn touched(&self, tile: TileId, coords: &[Dim], out: &mut Vec<(Dim, DType)>) -> Result<()> {
        if out.len() > 48 {
            return Ok(());
        }
        let coords: Vec<Dim> = coords.iter().map(|c| self.facts.simplify(c)).collect();
        match &self.loc[tile.index()] {
            Loc::Buffer(buf) => {
                let place = self.buffer_place(buf, &coords);
                out.push((place.offset, place.dtype));
                return Ok(());
            }
            Loc::Acc(_) => return Ok(()),
            Loc::Virtual => {}
        }
        match self.definition(tile)? {
            TileOp::Load { param, index, steps, .. } => {
                let place = self.param_place(*param, &global_coords(index, steps, &coords));
                out.push((place.offset, place.dtype));
            }
            TileOp::Gather { param, axis, rows, index, .. } => {
                self.touched(*rows, &coords[*axis..=*axis], out)?;
                let mut global: Vec<Dim> = index.iter().zip(&coords).map(|(i, c)| i + c).collect();
                // A gathered axis is never contiguous.
                global[*axis] = &index[*axis] + &coords[*axis] * 3;
                let place = self.param_place(*param, &global);
                out.push((place.offset, place.dtype));
            }
            TileOp::Map { args, .. } => {
                for arg in args {
                    self.touched(arg.tile, &self.operand_coords(arg, &coords)?, out)?;
                }
            }
            TileOp::Permute { x, perm } => {
                let mut at = vec![Dim::new(0); perm.len()];
                for (i, &p) in perm.iter().enumerate() {
                    at[p] = coords[i].clone();
                }
                self.touched(*x, &at, out)?;
            }
            TileOp::Reshape(x) => {
                let at = self.reshape_coords(&self.extents(*x)?, &self.extents(tile)?, &coords);
                self.touched(*x, &at, out)?;
            }
            TileOp::Broadcast(operand) => {
                self.touched(operand.tile, &self.operand_coords(operand, &coords)?, out)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Number of elements of 32 bits in a vector register; of 64 when the tile's type is wide.
    pub(crate) fn lanes_for(&self, dtype: DType) -> u32 {
        let bits = if dtype.bits() == 64 { 64 } else { 32 };
        (self.knobs.vector_bits / bits).max(1)
    }

    /// The axis of `tile` along which vectors run, and how many lanes: the one with most contiguous
    /// and fewest scattered accesses. `store` gives the destination's offset for coordinates.
    pub(crate) fn choose_axis(
        &mut self,
        tile: TileId,
        counts: &[Dim],
        store: &dyn Fn(&Self, &[Dim]) -> Option<Dim>,
    ) -> Result<(Option<usize>, u32)> {
        let dtype = self.k.ty(tile).dtype;
        let lanes = self.lanes_for(dtype);
        let mut best: Option<(i64, usize)> = None;
        let w = i64::from(lanes);
        self.facts.declare(LANE, Range { min: 0, max: w - 1 }, vec![]);
        for axis in 0..counts.len() {
            let extent = self.facts.bounds(&counts[axis]).max;
            if extent <= 1 {
                continue;
            }
            let probe: Vec<Dim> = counts
                .iter()
                .enumerate()
                .map(|(d, count)| {
                    let max = self.facts.bounds(count).max.saturating_sub(1).max(0);
                    let name = format!("$probe{d}");
                    if d == axis {
                        let range = Range { min: 0, max: max / w };
                        self.facts.declare(&name, range, vec![]);
                        Dim::sym(name) * w + Dim::sym(LANE)
                    } else {
                        self.facts.declare(&name, Range { min: 0, max }, vec![]);
                        Dim::sym(name)
                    }
                })
                .collect();
            let mut offsets = Vec::new();
            self.touched(tile, &probe, &mut offsets)?;
            let mut score = match store(self, &probe).map(|o| lane_coefficient(&self.settle(&o))) {
                Some(Some(c)) if c.is(1) => 8,
                Some(_) => -8,
                None => 0,
            };
            for (offset, d) in offsets {
                score += match lane_coefficient(&offset) {
                    Some(c) if c.is(1) => 6,
                    Some(c) if c.is(0) => 4,
                    _ if d.bits() < 32 => -12,
                    _ => -6,
                };
            }
            // Short axes waste lanes.
            if extent < w {
                score -= (8 * (w - extent) / w).max(1);
            }
            if best.is_none_or(|(s, _)| score >= s) {
                best = Some((score, axis));
            }
        }
        for d in 0..counts.len() {
            self.facts.forget(&format!("$probe{d}"));
        }
        Ok(match best {
            Some((_, axis)) => {
                let extent = self.facts.bounds(&counts[axis]).max;
                let mut lanes = lanes;
                while lanes > 1 && i64::from(lanes / 2) >= extent {
                    lanes /= 2;
                }
                (Some(axis), lanes)
            }
            None => (None, 1),
        })
    }
}

/// `index + step * coordinate` along each axis.
pub(crate) fn global_coords(index: &[Dim], steps: &[i64], coords: &[Dim]) -> Vec<Dim> {
    index.iter().zip(steps).zip(coords).map(|((i, s), c)| i + c * *s).collect()
}

/// Every value of `from` exists in `to`, and products in `to` are the same.
fn lossless(from: DType, to: DType) -> bool {
    use DType::{BF16, F8E4M3, F8E5M2, F16, F32, F64, I8, I16, I32, I64, U8, U16};
    matches!(
        (from, to),
        (BF16 | F16 | F8E4M3 | F8E5M2 | F32, F64)
            | (BF16 | F16 | F8E4M3 | F8E5M2, F32)
            | (I8 | U8, I16 | I32 | I64)
            | (I16 | U16, I32 | I64)
    )
}
