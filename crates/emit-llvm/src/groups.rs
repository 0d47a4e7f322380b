//! Operands in groups: how products lay them out whose instruction takes several steps of the depth
//! at once.
//!
//! With groups of `G`, the left operand is row-major with a depth of whole groups, and the right one
//! lies in panels in which the `G` neighbours of a column are together:
//!
//! ```text
//! left:   a[i][k]  at  i*row + k                                   k < ceil(K/G)*G
//! right:  b[k][j]  at  floor(j/W)*ceil(K/G)*G*W + floor(k/G)*G*W + (j%W)*G + k%G
//! ```
//!
//! What a last, partial group lacks is zero on the left. On the right it only has to be finite:
//! constants are packed with zeros, and copies made here write zeros too.

use crate::dots::SHIFT;
use crate::emitter::{Buf, Emitter};
use crate::mma::MicroKind;
use crate::ops::{mem_elem, splat_lit, vector};
use crate::stmts::ScratchType;
use tilewright_base::{DType, Error, Result};
use tilewright_layout::{Axis, Block, Dim, Layout, linear_in, uppers};
use tilewright_tile::TileId;

impl Emitter<'_> {
    /// The type in which a product reads this operand.
    pub(crate) fn operand_type(&self, tile: TileId) -> DType {
        self.k.ty(tile).dtype
    }

    /// Evaluates a left operand into row-major scratch memory, its depth made whole groups.
    pub(crate) fn keep_left(&mut self, tile: TileId, kind: MicroKind, depth: &Dim) -> Result<Buf> {
        let group = kind.group();
        if group == 1 {
            return self.keep(tile);
        }
        let shape = self.extents(tile)?;
        let buf = self.new_buffer(self.k.ty(tile).dtype, &shape);
        let counts = self.need_of(tile);
        let whole = self.facts.simplify(&depth.modulo(&Dim::new(group))).is(0);
        if !whole {
            // The last group first, then the elements over it.
            let elem = mem_elem(buf.dtype);
            let at = depth.floor_div(&Dim::new(group)) * group;
            self.counted(&counts[0], &mut |e, i| {
                let place = e.buffer_place(&buf, &[i, at.clone()]);
                let p = e.address(&place, elem);
                e.c.t.stmt(format_args!("store i32 0, ptr {p}, align {}", buf.dtype.size()));
                Ok(())
            })?;
        }
        let counts = [counts[0].clone(), depth.clone()];
        self.with_native_rounding(kind, |e| e.fill_buffer(&buf, tile, &counts))?;
        Ok(buf)
    }

    /// Copies rows of signed bytes from memory, in which the rows begin `rest` behind `base` and `step` apart, and moves them
    /// up by 128. The depth is whole groups of four.
    pub(crate) fn copy_up(
        &mut self,
        tile: TileId,
        (base, rest, step): (String, Dim, Dim),
        [rows, depth]: [&Dim; 2],
    ) -> Result<Buf> {
        let shape = self.extents(tile)?;
        let buf = self.new_buffer(self.k.ty(tile).dtype, &shape);
        let vector_bytes = i64::from(self.knobs.vector_bits / 8);
        let whole = self.facts.simplify(&(depth.floor_div(&Dim::new(vector_bytes)) * vector_bytes));
        self.counted(rows, &mut |e, i| {
            let from = e.facts.simplify(&(&rest + &step * &i));
            let from = e.dim(&from);
            let from = e.c.t.ins(format_args!("getelementptr inbounds i8, ptr {base}, i64 {from}"));
            let place = e.buffer_place(&buf, &[i, Dim::new(0)]);
            let to = e.address(&place, "i8");
            let (whole, depth) = (e.dim(&whole), e.dim(depth));
            let pieces = [("0", &whole, e.knobs.vector_bits / 32), (&*whole, &depth, 1)];
            for (first, last, lanes) in pieces {
                let words = vector("i32", lanes);
                let open = e.c.t.begin_loop(first, last, &(4 * lanes).to_string());
                let k = &open.iv;
                let p = e.c.t.ins(format_args!("getelementptr inbounds i8, ptr {from}, i64 {k}"));
                let x = e.c.t.ins(format_args!("load {words}, ptr {p}, align 1"));
                let x = e.c.bin("xor", "i32", lanes, &x, &splat_lit("i32", SHIFT, lanes));
                let p = e.c.t.ins(format_args!("getelementptr inbounds i8, ptr {to}, i64 {k}"));
                e.c.t.stmt(format_args!("store {words} {x}, ptr {p}, align 1"));
                e.c.t.end_loop(open);
            }
            Ok(())
        })?;
        Ok(buf)
    }

    /// Moves `rows` rows of signed bytes, kept row-major, up by 128; false, and nothing is written, where rows are no whole
    /// groups.
    pub(crate) fn move_up(&mut self, buf: &Buf, rows: &Dim) -> bool {
        let stride = buf.layout.axes.first().and_then(|a| a.stride.as_const());
        let Some(stride) = stride.filter(|s| s % 4 == 0) else { return false };
        let groups = self.facts.simplify(&(rows * (stride / 4)));
        let count = self.dim(&groups);
        let open = self.c.t.begin_loop("0", &count, "1");
        let (base, i) = (&buf.ptr, &open.iv);
        let p = self.c.t.ins(format_args!("getelementptr inbounds i32, ptr {base}, i64 {i}"));
        let x = self.c.t.ins(format_args!("load i32, ptr {p}, align 1"));
        let x = self.c.bin("xor", "i32", 1, &x, SHIFT);
        self.c.t.stmt(format_args!("store i32 {x}, ptr {p}, align 1"));
        self.c.t.end_loop(open);
        true
    }

    /// Evaluates a right operand into panels of groups.
    pub(crate) fn keep_right(
        &mut self,
        tile: TileId,
        kind: MicroKind,
        [depth, cols]: [&Dim; 2],
        [depth_max, cols_max]: [i64; 2],
        width: i64,
    ) -> Result<Buf> {
        let group = kind.group();
        let dtype = self.k.ty(tile).dtype.size_aligned();
        let deep = (depth_max + group - 1) / group * group;
        let panels = (cols_max + width - 1) / width;
        let axis = |extent: i64, stride: i64, size: i64, inner: i64| Axis {
            extent: extent.into(),
            stride: stride.into(),
            block: Some(Block { size, stride: inner.into() }),
        };
        let axes = vec![
            axis(depth_max, group * width, group, 1),
            axis(cols_max, deep * width, width, group),
        ];
        let layout = Layout { axes, offset: Dim::new(0) };
        let ptr = self.scratch(panels * deep * width * dtype.size() as i64);
        let buf = Buf { ptr, dtype, layout, pad: width };
        self.with_native_rounding(kind, |e| e.fill_groups(&buf, tile, depth, cols, group))?;
        Ok(buf)
    }

    /// Runs `body` while rounding to `bf16` may use the instruction of the unit, which flushes
    /// subnormal numbers to zero as its products do.
    fn with_native_rounding<R>(
        &mut self,
        kind: MicroKind,
        body: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        let before = self.c.native_bf16;
        self.c.native_bf16 = kind == MicroKind::Bf16Dot;
        let result = body(self);
        self.c.native_bf16 = before;
        result
    }

    fn fill_groups(
        &mut self,
        buf: &Buf,
        tile: TileId,
        depth: &Dim,
        cols: &Dim,
        group: i64,
    ) -> Result<()> {
        let lanes = self.knobs.vector_bits / 32;
        let whole = self.facts.simplify(&depth.floor_div(&Dim::new(group)));
        let rest = self.facts.simplify(&depth.modulo(&Dim::new(group)));
        let elem = mem_elem(buf.dtype);
        if !whole.is(0) {
            self.counted(&whole, &mut |e, g| {
                let first = e.facts.simplify(&(g * group));
                // Named, so that they are known to lie below the depth.
                let neighbours: Vec<Dim> =
                    (0..group).map(|i| e.depth_at(&first + i, depth)).collect();
                e.vectors(cols, lanes, &mut |e, x| {
                    let mut parts = Vec::new();
                    for k in &neighbours {
                        let value = e.eval(tile, &[k.clone(), x.clone()])?;
                        parts.push(e.c.narrow(buf.dtype, lanes, &value));
                    }
                    let joined = e.c.interleave(elem, lanes, &parts);
                    e.store_group(buf, &first, &x, &joined, group)
                })
            })?;
        }
        if rest.is(0) {
            return Ok(());
        }
        let first = whole * group;
        let left = self.dim(&rest);
        for i in 0..group {
            // Zeros once, then the elements that there are.
            let at_least = self.c.t.ins(format_args!("icmp sgt i64 {left}, {i}"));
            let (yes, no) = (self.c.t.label(), self.c.t.label());
            self.c.t.br_if(&at_least, &yes, &no);
            self.c.t.place(&yes);
            self.push_scope();
            if i == 0 {
                self.vectors(cols, lanes, &mut |e, x| {
                    e.store_group(buf, &first, &x, "zeroinitializer", group)
                })?;
            }
            let at = self.depth_at(&first + i, depth);
            self.counted(cols, &mut |e, x| {
                let value = e.eval(tile, &[at.clone(), x.clone()])?;
                let place = e.buffer_place(buf, &[&first + i, x]);
                e.store(&place, &value, true)
            })?;
            self.pop_scope();
            self.c.t.br(&no);
            self.c.t.place(&no);
        }
        Ok(())
    }

    /// A name for a coordinate that lies below the depth.
    fn depth_at(&mut self, value: Dim, depth: &Dim) -> Dim {
        let name = self.symbol();
        self.facts.define(&name, uppers(depth), value);
        Dim::sym(name)
    }

    /// Stores the groups of a vector of columns: whole vectors, since panels are whole.
    fn store_group(
        &mut self,
        buf: &Buf,
        depth: &Dim,
        columns: &Dim,
        value: &str,
        group: i64,
    ) -> Result<()> {
        let place = self.buffer_place(buf, &[depth.clone(), columns.clone()]);
        let start = linear_in(&place.offset, crate::emitter::LANE)
            .filter(|(step, _)| step.is(group))
            .map(|(_, start)| start)
            .ok_or_else(|| Error::bug(format!("groups of columns lie apart: {}", place.offset)))?;
        let elem = mem_elem(buf.dtype);
        let lanes = std::mem::replace(&mut self.lanes, 1);
        let p = self.address(&crate::emitter::Place { offset: start, ..place }, elem);
        self.lanes = lanes;
        let v = vector(elem, lanes * group as u32);
        self.c.t.stmt(format_args!("store {v} {value}, ptr {p}, align {}", buf.dtype.size()));
        Ok(())
    }
}
