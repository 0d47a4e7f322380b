//! Reductions, positions of extremes, running sums, and atomic addition.
//!
//! Along the contiguous axis a sum runs in several independent vectors (`reduce_chains`), which are
//! combined in a fixed order: the result depends on the schedule, never on the number of threads.

use crate::emitter::{Buf, Emitter, Loc, Place};
use crate::ops::{constant, mem_elem, reg_elem, vector};
use crate::stmts::ScratchType;
use tilewright_base::{Class, DType, Error, Result};
use tilewright_expr::{Op, Value};
use tilewright_layout::{Dim, Range, uppers};
use tilewright_tile::{ReduceKind, TileId, TileOp};

/// The operation that combines two elements.
fn combine_op(kind: ReduceKind) -> Op {
    match kind {
        ReduceKind::Sum => Op::Add,
        ReduceKind::Prod => Op::Mul,
        ReduceKind::Max => Op::Max,
        ReduceKind::Min => Op::Min,
    }
}

/// The result of combining nothing.
pub(crate) fn identity(kind: ReduceKind, dtype: DType) -> Value {
    if dtype.is_float() {
        return Value::Float(match kind {
            ReduceKind::Sum => 0.0,
            ReduceKind::Prod => 1.0,
            ReduceKind::Max => f64::NEG_INFINITY,
            ReduceKind::Min => f64::INFINITY,
        });
    }
    let bits = if dtype == DType::Bool { 1 } else { dtype.bits() };
    let (min, max) = match dtype.class() {
        Class::Signed => (-1i64 << (bits - 1), !(-1i64 << (bits - 1))),
        _ if bits == 64 => (0, -1),
        _ => (0, (1i64 << bits) - 1),
    };
    Value::Int(match kind {
        ReduceKind::Sum => 0,
        ReduceKind::Prod => 1,
        ReduceKind::Max => min,
        ReduceKind::Min => max,
    })
}

impl<'a> Emitter<'a> {
    /// Computes a reduction or scan into scratch memory.
    pub(crate) fn reduction(&mut self, tile: TileId, op: &'a TileOp) -> Result<()> {
        let shape = self.extents(tile)?;
        let buf = self.new_buffer(self.k.ty(tile).dtype.size_aligned(), &shape);
        match op {
            TileOp::Reduce { kind, x, axis, limit } => {
                self.reduce(tile, &buf, *kind, *x, *axis, limit)?;
            }
            TileOp::ArgReduce { kind, x, axis, limit, last } => {
                self.arg_reduce(tile, &buf, *kind, *x, *axis, limit, *last)?;
            }
            TileOp::Scan { kind, x, axis, exclusive, reverse } => {
                self.scan(tile, &buf, *kind, *x, *axis, *exclusive, *reverse)?;
            }
            _ => return Err(Error::bug("not a reduction")),
        }
        self.loc[tile.index()] = Loc::Buffer(buf);
        Ok(())
    }

    fn combine(&mut self, kind: ReduceKind, d: DType, lanes: u32, a: &str, b: &str) -> String {
        if d == DType::Bool {
            let op = match kind {
                ReduceKind::Sum | ReduceKind::Max => "or",
                ReduceKind::Prod | ReduceKind::Min => "and",
            };
            return self.c.bin(op, "i1", lanes, a, b);
        }
        self.c.op(combine_op(kind), d, lanes, &[a, b])
    }

    fn reduce(
        &mut self,
        tile: TileId,
        buf: &Buf,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        limit: &Option<Dim>,
    ) -> Result<()> {
        let d = self.k.ty(x).dtype;
        let full = self.extents(x)?;
        let count = crate::analyze::limited(&Dim::new(full[axis]), limit);
        let count = self.facts.simplify(&count);
        let outer = self.need_of(tile);
        let mut counts = outer.clone();
        counts.insert(axis, count.clone());
        let (lane_axis, lanes) = self.choose_axis(x, &counts, &|_, _| None)?;
        let base = vec![Dim::new(0); outer.len()];
        // Sums of narrow floats run in the compute type and are rounded once.
        let work = if d.is_float() { d.compute() } else { d };
        let start = identity(kind, if d.is_float() { work } else { d });
        let buf = buf.clone();
        if lane_axis == Some(axis) && lanes > 1 {
            return self.nest(&base, &outer, None, 1, &mut |e, at| {
                let total = e.reduce_lanes(kind, x, axis, &count, lanes, work, start, at)?;
                let total = e.c.round(d, 1, &total);
                let place = e.buffer_place(&buf, at);
                e.store(&place, &total, false)
            });
        }
        // Lanes along another axis, or none: a plain loop over the axis.
        let lane_axis = lane_axis.map(|a| if a > axis { a - 1 } else { a }).filter(|_| lanes > 1);
        let lanes = if lane_axis.is_some() { lanes } else { 1 };
        self.nest(&base, &outer, lane_axis, lanes, &mut |e, at| {
            let v = vector(reg_elem(work), e.lanes);
            let n = e.lanes;
            let slot = e.c.t.alloca(&v);
            let first = constant(work, start, n);
            e.c.t.stmt(format_args!("store {v} {first}, ptr {slot}"));
            e.counted(&count, &mut |e, r| {
                let mut coords = at.to_vec();
                coords.insert(axis, r);
                let value = e.eval(x, &coords)?;
                let old = e.c.t.ins(format_args!("load {v}, ptr {slot}"));
                let new = e.combine(kind, work, n, &old, &value);
                e.c.t.stmt(format_args!("store {v} {new}, ptr {slot}"));
                Ok(())
            })?;
            let total = e.c.t.ins(format_args!("load {v}, ptr {slot}"));
            let total = e.c.round(d, n, &total);
            let place = e.buffer_place(&buf, at);
            e.store(&place, &total, false)
        })
    }

    /// One reduction along the vector axis, to a scalar.
    #[allow(clippy::too_many_arguments, reason = "one reduction is this many facts")]
    fn reduce_lanes(
        &mut self,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        count: &Dim,
        lanes: u32,
        work: DType,
        start: Value,
        at: &[Dim],
    ) -> Result<String> {
        let elem = reg_elem(work);
        let v = vector(elem, lanes);
        let chains = self.knobs.reduce_chains.clamp(1, 16);
        let first = constant(work, start, lanes);
        let mut slots: Vec<String> = Vec::new();
        for _ in 0..chains {
            let slot = self.c.t.alloca(&v);
            self.c.t.stmt(format_args!("store {v} {first}, ptr {slot}"));
            slots.push(slot);
        }
        let w = i64::from(lanes);
        let group = w * i64::from(chains);
        let groups = self.facts.simplify(&count.floor_div(&Dim::new(group)));
        let add = |e: &mut Self, slot: &str, coords: &[Dim]| -> Result<()> {
            let mut value = e.eval(x, coords)?;
            if let Some(mask) = e.mask.clone() {
                value = e.c.select(elem, lanes, &mask, &value, &first);
            }
            let old = e.c.t.ins(format_args!("load {v}, ptr {slot}"));
            let new = e.combine(kind, work, lanes, &old, &value);
            e.c.t.stmt(format_args!("store {v} {new}, ptr {slot}"));
            Ok(())
        };
        self.facts.declare(crate::emitter::LANE, Range { min: 0, max: w - 1 }, vec![]);
        let keep = (self.lanes, self.mask.take());
        let whole_groups = if chains > 1 { groups } else { Dim::new(0) };
        if !whole_groups.is(0) {
            let at = at.to_vec();
            let slots = slots.clone();
            self.counted(&whole_groups, &mut |e, g| {
                e.lanes = lanes;
                for (c, slot) in slots.iter().enumerate() {
                    let name = e.symbol();
                    let spot = &g * group + (c as i64 * w) + Dim::sym(crate::emitter::LANE);
                    e.facts.define(&name, uppers(count), spot);
                    let mut coords = at.clone();
                    coords.insert(axis, Dim::sym(name));
                    add(e, slot, &coords)?;
                }
                e.lanes = keep.0;
                Ok(())
            })?;
        }
        // The rest, in single vectors on the first chain.
        let done = &whole_groups * group;
        let left = self.facts.simplify(&(count - &done));
        if !left.is(0) {
            let at = at.to_vec();
            let slot = slots[0].clone();
            self.vectors(&left, lanes, &mut |e, r| {
                let name = e.symbol();
                e.facts.define(&name, uppers(count), &done + r);
                let mut coords = at.clone();
                coords.insert(axis, Dim::sym(name));
                add(e, &slot, &coords)
            })?;
        }
        (self.lanes, self.mask) = keep;
        // Chains in pairs, then halves of the vector.
        let mut parts: Vec<String> =
            slots.iter().map(|s| self.c.t.ins(format_args!("load {v}, ptr {s}"))).collect();
        while parts.len() > 1 {
            let half = parts.len().div_ceil(2);
            for i in 0..parts.len() - half {
                parts[i] =
                    self.combine(kind, work, lanes, &parts[i].clone(), &parts[i + half].clone());
            }
            parts.truncate(half);
        }
        let mut value = parts[0].clone();
        let mut n = lanes;
        while n > 1 {
            let half = n / 2;
            let from = vector(elem, n);
            let pick = |lo: u32| -> String {
                let list: Vec<String> = (lo..lo + half).map(|i| format!("i32 {i}")).collect();
                format!("<{}>", list.join(", "))
            };
            if half == 1 {
                let a = self.c.t.ins(format_args!("extractelement {from} {value}, i64 0"));
                let b = self.c.t.ins(format_args!("extractelement {from} {value}, i64 1"));
                value = self.combine(kind, work, 1, &a, &b);
            } else {
                let mut part = |lo: u32| {
                    self.c.t.ins(format_args!(
                        "shufflevector {from} {value}, {from} poison, <{half} x i32> {}",
                        pick(lo)
                    ))
                };
                let (a, b) = (part(0), part(half));
                value = self.combine(kind, work, half, &a, &b);
            }
            n = half;
        }
        Ok(value)
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one operation")]
    fn arg_reduce(
        &mut self,
        tile: TileId,
        buf: &Buf,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        limit: &Option<Dim>,
        last: bool,
    ) -> Result<()> {
        let d = self.k.ty(x).dtype;
        let full = self.extents(x)?;
        let count = crate::analyze::limited(&Dim::new(full[axis]), limit);
        let count = self.facts.simplify(&count);
        let outer = self.need_of(tile);
        let mut counts = outer.clone();
        counts.insert(axis, Dim::new(1));
        let (lane_axis, lanes) = self.choose_axis(x, &counts, &|_, _| None)?;
        let lane_axis =
            lane_axis.filter(|a| *a != axis && lanes > 1).map(|a| if a > axis { a - 1 } else { a });
        let lanes = if lane_axis.is_some() { lanes } else { 1 };
        let base = vec![Dim::new(0); outer.len()];
        let buf = buf.clone();
        let start = identity(kind, d);
        self.nest(&base, &outer, lane_axis, lanes, &mut |e, at| {
            let n = e.lanes;
            let elem = reg_elem(d);
            let (v, iv) = (vector(elem, n), vector("i64", n));
            let (best, spot) = (e.c.t.alloca(&v), e.c.t.alloca(&iv));
            let first = constant(d, start, n);
            e.c.t.stmt(format_args!("store {v} {first}, ptr {best}"));
            let none = constant(DType::I64, Value::Int(-1), n);
            e.c.t.stmt(format_args!("store {iv} {none}, ptr {spot}"));
            e.counted(&count, &mut |e, r| {
                let mut coords = at.to_vec();
                coords.insert(axis, r.clone());
                let value = e.eval(x, &coords)?;
                let old = e.c.t.ins(format_args!("load {v}, ptr {best}"));
                let old_at = e.c.t.ins(format_args!("load {iv}, ptr {spot}"));
                let here = e.dim_vector(&r);
                let op = match (kind == ReduceKind::Max, last) {
                    (true, false) => Op::Gt,
                    (true, true) => Op::Ge,
                    (false, false) => Op::Lt,
                    (false, true) => Op::Le,
                };
                let mut better = e.c.op(op, d, n, &[&value, &old]);
                if d.is_float() {
                    // NaN beats all; among NaNs the first (or last) wins.
                    let nan = e.c.cmp("uno", elem, n, &value, &value);
                    let had = e.c.cmp("uno", elem, n, &old, &old);
                    let one = crate::ops::splat_lit("i1", "true", n);
                    let fresh = e.c.bin("xor", "i1", n, &had, &one);
                    let wins = if last { nan } else { e.c.bin("and", "i1", n, &nan, &fresh) };
                    let may = e.c.bin("and", "i1", n, &better, &fresh);
                    better = e.c.bin("or", "i1", n, &wins, &may);
                }
                // The first element always counts.
                let unset = e.c.cmp("eq", "i64", n, &old_at, &none);
                let better = e.c.bin("or", "i1", n, &better, &unset);
                let new = e.c.select(elem, n, &better, &value, &old);
                let at = e.c.select("i64", n, &better, &here, &old_at);
                e.c.t.stmt(format_args!("store {v} {new}, ptr {best}"));
                e.c.t.stmt(format_args!("store {iv} {at}, ptr {spot}"));
                Ok(())
            })?;
            let found = e.c.t.ins(format_args!("load {iv}, ptr {spot}"));
            let zero = constant(DType::I64, Value::Int(0), n);
            let unset = e.c.cmp("eq", "i64", n, &found, &none);
            let found = e.c.select("i64", n, &unset, &zero, &found);
            let place = e.buffer_place(&buf, at);
            e.store(&place, &found, false)
        })
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one operation")]
    fn scan(
        &mut self,
        tile: TileId,
        buf: &Buf,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        exclusive: bool,
        reverse: bool,
    ) -> Result<()> {
        let d = self.k.ty(x).dtype;
        let need = self.need_of(tile);
        let full = self.extents(x)?;
        let count = if reverse { Dim::new(full[axis]) } else { need[axis].clone() };
        let mut outer = need.clone();
        outer.remove(axis);
        let mut counts = need.clone();
        counts[axis] = Dim::new(1);
        let (lane_axis, lanes) = self.choose_axis(x, &counts, &|_, _| None)?;
        let lane_axis =
            lane_axis.filter(|a| *a != axis && lanes > 1).map(|a| if a > axis { a - 1 } else { a });
        let lanes = if lane_axis.is_some() { lanes } else { 1 };
        let base = vec![Dim::new(0); outer.len()];
        let buf = buf.clone();
        let work = if d.is_float() { d.compute() } else { d };
        let start = identity(kind, work);
        self.nest(&base, &outer, lane_axis, lanes, &mut |e, at| {
            let n = e.lanes;
            let v = vector(reg_elem(work), n);
            let slot = e.c.t.alloca(&v);
            let first = constant(work, start, n);
            e.c.t.stmt(format_args!("store {v} {first}, ptr {slot}"));
            e.counted(&count, &mut |e, r| {
                let r = if reverse { &count - 1 - r } else { r };
                let mut coords = at.to_vec();
                coords.insert(axis, r);
                let value = e.eval(x, &coords)?;
                let old = e.c.t.ins(format_args!("load {v}, ptr {slot}"));
                let new = e.combine(kind, work, n, &old, &value);
                e.c.t.stmt(format_args!("store {v} {new}, ptr {slot}"));
                let out = if exclusive { &old } else { &new };
                let out = e.c.round(d, n, out);
                let place = e.buffer_place(&buf, &coords);
                e.store(&place, &out, false)
            })
        })
    }

    /// Adds one element to memory, indivisibly.
    pub(crate) fn atomic(&mut self, place: &Place, value: &str) -> Result<()> {
        let elem = mem_elem(place.dtype);
        let op = if place.dtype.is_float() { "fadd" } else { "add" };
        let guard = self.enter_if_inside(place);
        let p = self.address(place, elem);
        self.c.t.stmt(format_args!("atomicrmw {op} ptr {p}, {elem} {value} monotonic"));
        self.leave_if_inside(guard);
        Ok(())
    }
}
