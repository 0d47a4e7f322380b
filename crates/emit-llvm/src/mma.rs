//! Matrix products: register-blocked micro-kernels and the loops around them.
//!
//! A product runs panel by panel of columns (as wide as the micro-kernel), and within a panel by
//! groups of rows, so that a panel of `b` stays in the first-level cache. A micro-kernel holds its
//! piece of the result in registers over the whole depth of the tile. Operands are read where they
//! are when their addresses allow it (any row stride; any depth stride, also in blocks; columns
//! contiguous), and copied into scratch memory first otherwise.
//!
//! Result pieces lie in scratch memory in panels; in the last iteration of the loops around, each
//! piece goes through the epilogue and to its destination while it is still in the cache.

use crate::access::{DepthAccess, crowds, rows_crowd};
use crate::codes;
use crate::dots::{SHIFT, dot_step};
use crate::emitter::{Buf, Emitter, Epilogue, Loc};
use crate::nibbles;
use crate::ops::{Code, mem_elem, reg_elem, splat_lit, vector};
use crate::stmts::ScratchType;
use std::fmt::Write;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Value;
use tilewright_layout::{Dim, Range, uppers};
use tilewright_tile::{MatrixUnit, Stmt, TileId, TileOp};

/// Shape of the micro-kernel for a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Elements of a vector.
    pub(crate) lanes: u32,
    /// Vectors per row.
    pub(crate) vectors: u32,
    /// Columns of a panel.
    pub(crate) width: i64,
    /// Most rows.
    rows: i64,
}

/// A stride: known now, or an argument of the micro-kernel.
#[derive(Clone, Debug)]
pub(crate) enum Stride {
    Known(i64),
    Given(String),
}

/// How the micro-kernel multiplies. One variant per instruction family; chosen by the schedule's
/// unit where the operand types fit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MicroKind {
    /// Float fused multiply-add; narrow operands are widened when loaded.
    Fma,
    /// Integer multiply and add.
    MulAdd,
    /// `vdpbf16ps`: two neighbours of the depth at once.
    Bf16Dot,
    /// `tdpbf16ps`: see `amx.rs`.
    Bf16Tile,
    /// `vpdpbusd`: four neighbours of the depth at once, unsigned times signed. A signed left
    /// operand is moved up by 128, which `shifted` says; its share is taken off at the end. `moved`: that was done when
    /// it was copied, and the shares of a panel's columns are an argument.
    I8Dot { shifted: bool, moved: bool },
    /// `tdpbssd`, or `tdpbusd` for an unsigned left operand.
    I8Tile { signed: bool },
    /// `vpdpbusd` with codes of four bits on the right, eight neighbours of the depth at once: see `codes.rs`.
    CodesDot { signed: bool },
    /// Float fused multiply-adds with such codes.
    CodesFma { signed: bool },
}

impl MicroKind {
    /// Neighbours of the depth that lie together in both operands.
    pub(crate) fn group(self) -> i64 {
        match self {
            MicroKind::Fma | MicroKind::MulAdd => 1,
            MicroKind::Bf16Dot | MicroKind::Bf16Tile => 2,
            MicroKind::I8Dot { .. } | MicroKind::I8Tile { .. } => 4,
            MicroKind::CodesDot { .. } | MicroKind::CodesFma { .. } => 8,
        }
    }

    /// Whether the right operand has codes of four bits that lie eight together: see `codes.rs`.
    fn is_codes(self) -> bool {
        matches!(self, MicroKind::CodesDot { .. } | MicroKind::CodesFma { .. })
    }

    /// Whether operands lie in tile registers: see `amx.rs`.
    pub(crate) fn is_tile(self) -> bool {
        matches!(self, MicroKind::Bf16Tile | MicroKind::I8Tile { .. })
    }
}

/// Everything that one micro-kernel text depends on, but for its number of rows.
#[derive(Clone, Debug)]
pub(crate) struct Micro {
    pub(crate) kind: MicroKind,
    pub(crate) geometry: Geometry,
    acc: DType,
    pub(crate) a: DType,
    pub(crate) b: DType,
    /// Rows of `a`, depth of `a` and of `b`, then their blocks.
    pub(crate) a_row: Stride,
    /// Rows of `a` come in blocks of this size at this distance.
    row_block: Option<(i64, Stride)>,
    a_depth: Stride,
    pub(crate) b_depth: Stride,
    a_block: Stride,
    b_block: Stride,
    /// Depth comes in blocks of this size.
    block: Option<i64>,
    /// The depth is known to be whole blocks.
    whole_blocks: bool,
    /// Asks for what follows this panel in memory: the next panel, or the next piece of this one.
    ahead: bool,
    unroll: u32,
}

/// Depth from which on a panel is long enough to ask ahead in it.
const AHEAD_FROM: i64 = 32;

/// How many lengths of this piece a panel of 4-bit numbers is asked for ahead.
const NIBBLES_AHEAD: i64 = 4;

/// Groups of rows from which on codes are unpacked once for all of them.
const UNPACK_FROM: i64 = 2;

/// Bytes of a cache line.
const LINE: i64 = 64;

/// Steps of the depth that are written out without a loop.
const WRITTEN_OUT: i64 = 8;

impl<'a> Emitter<'a> {
    /// The instruction for these operands; every other pair multiplies and adds.
    fn micro_kind(&self, acc: DType, a: DType, b: DType) -> MicroKind {
        match self.knobs.unit {
            unit if !unit.takes(a, b, acc) || unit == MatrixUnit::Fma => match acc.is_float() {
                true => MicroKind::Fma,
                false => MicroKind::MulAdd,
            },
            MatrixUnit::Codes => MicroKind::CodesFma { signed: b == DType::I4 },
            MatrixUnit::Bf16Dot | MatrixUnit::Fma => MicroKind::Bf16Dot,
            MatrixUnit::Bf16Tile => MicroKind::Bf16Tile,
            MatrixUnit::I8Dot if b.bits() == 4 => MicroKind::CodesDot { signed: b == DType::I4 },
            MatrixUnit::I8Dot => MicroKind::I8Dot { shifted: a == DType::I8, moved: false },
            MatrixUnit::I8Tile => MicroKind::I8Tile { signed: a == DType::I8 },
        }
    }

    fn geometry(&self, dtype: DType, cols: i64) -> Geometry {
        let lanes = self.lanes_for(dtype);
        let w = i64::from(lanes);
        let wanted = self.knobs.mma_vectors.max(1);
        let vectors = u32::try_from((cols + w - 1) / w).unwrap_or(1).clamp(1, wanted);
        // The same number of accumulators in a narrower, taller shape.
        let registers = if self.knobs.vector_bits >= 512 { 24 } else { 10 };
        let rows = if vectors == wanted {
            self.knobs.mma_rows.max(1)
        } else {
            (self.knobs.mma_rows * wanted / vectors).clamp(1, registers / vectors.max(1))
        };
        Geometry { lanes, vectors, width: w * i64::from(vectors), rows: i64::from(rows.max(1)) }
    }

    /// Memory for a product's result. When every piece is final at once and goes through an
    /// epilogue, one piece is enough.
    pub(crate) fn accumulator(&mut self, tile: TileId, one_piece: bool) -> Result<Buf> {
        let shape = self.extents(tile)?;
        let [rows, cols] = shape.as_slice() else {
            return Err(Error::bug(format!("product {tile} is no matrix")));
        };
        let dtype = self.k.ty(tile).dtype.size_aligned();
        let g = self.geometry(dtype, *cols);
        if one_piece {
            let mut buf = self.new_panels(dtype, g.rows, g.width, g.width);
            buf.pad = -1;
            return Ok(buf);
        }
        Ok(self.new_panels(dtype, *rows, *cols, g.width))
    }

    /// Writes a product; see the module's head. `target` is the accumulator of the loop around.
    pub(crate) fn mma(
        &mut self,
        tile: TileId,
        op: &'a TileOp,
        target: Option<&Loc>,
        epilogue: Option<Epilogue>,
    ) -> Result<()> {
        let TileOp::Mma { acc, a, b, limit } = op else { return Err(Error::bug("not a product")) };
        let shape = self.extents(tile)?;
        let (rows_max, cols_max) = (shape[0], shape[1]);
        let depth_max = self.extents(*a)?[1];
        let dtype = self.k.ty(tile).dtype;
        let g = self.geometry(dtype, cols_max);
        let need = self.need_of(tile);
        let (m, n) = (need[0].clone(), need[1].clone());
        let depth = crate::analyze::limited(&Dim::new(depth_max), limit);
        let depth = self.facts.simplify(&depth);
        // Where the result lies and what it starts from.
        let (buf, init, first, last, epilogue) = match target {
            Some(Loc::Acc(t)) => {
                (t.buf.clone(), t.init, t.first.clone(), t.last.clone(), t.epilogue.clone())
            }
            Some(Loc::Buffer(buf)) => (buf.clone(), *acc, "true".into(), "false".into(), None),
            _ => {
                let one = epilogue.is_some();
                let buf = self.accumulator(tile, one)?;
                (buf, *acc, "true".to_owned(), "true".to_owned(), epilogue)
            }
        };
        let one_piece = buf.pad < 0;
        let zero_init = matches!(self.defs[init.index()], Some(TileOp::Full(Value::Int(0))))
            || matches!(self.defs[init.index()], Some(TileOp::Full(Value::Float(v))) if v.to_bits() == 0);
        let zero_init = zero_init && matches!(self.loc[init.index()], Loc::Virtual);
        let in_place = matches!(&self.loc[init.index()], Loc::Buffer(b) if b.ptr == buf.ptr);

        // Operands.
        let k_sym = self.symbol();
        self.facts.declare(&k_sym, Range { min: 0, max: depth_max - 1 }, uppers(&depth));
        let i_sym = self.symbol();
        self.facts.declare(&i_sym, Range { min: 0, max: rows_max - 1 }, uppers(&m));
        let mut blocks = self.block_sizes(*a);
        blocks.extend(self.block_sizes(*b));
        let i_dim = Dim::sym(i_sym.clone());
        let rows_of = |k: Dim| vec![i_dim.clone(), k];
        let a_tile = *a;
        let narrow = |e: &Self, t: TileId| e.operand_type(t);
        let mut kind = self.micro_kind(dtype, narrow(self, a_tile), narrow(self, *b));
        let group = kind.group();
        let whole_groups = self.facts.simplify(&depth.modulo(&Dim::new(group))).is(0);
        let mut a_access = self
            .row_access(a_tile, &rows_of, &k_sym, &i_sym, &blocks)
            .filter(|a| group == 1 || (whole_groups && a.1.inner.is(1) && a.4.is_none()))
            .filter(|a| match a.2.block {
                None => true,
                Some(size) => {
                    let r = a.2.group(g.rows);
                    group == 1 && 2 * r > g.rows && m.as_const().is_some_and(|m| m % size == 0)
                }
            });
        let crowded = a_access.as_ref().is_some_and(|(place, _, row, ..)| {
            rows_max >= 4 && cols_max > 2 * g.width && rows_crowd(place, &row.inner, g.rows)
        });
        // Each panel would move it up again.
        let shifted = matches!(kind, MicroKind::I8Dot { shifted: true, .. });
        let moves = shifted && rows_max >= 4 && cols_max > 2 * g.width;
        let mut unmoved = None;
        if a_access.is_none() || crowded || moves {
            self.c.t.comment("left operand copied");
            let in_rows = a_access.as_ref().filter(|(_, _, row, _, block)| {
                shifted && row.block.is_none() && block.is_none() && whole_groups
            });
            let (kept, moved) = match in_rows {
                Some((place, _, row, rest, _)) => {
                    let from = (place.base.clone(), rest.clone(), row.inner.clone());
                    (self.copy_up(a_tile, from, [&m, &depth])?, true)
                }
                None => {
                    let kept = self.keep_left(a_tile, kind, &depth)?;
                    let moved = shifted && self.move_up(&kept, &m);
                    (kept, moved)
                }
            };
            let before = std::mem::replace(&mut self.loc[a_tile.index()], Loc::Buffer(kept));
            if moved {
                kind = MicroKind::I8Dot { shifted, moved };
                // Who else reads the tile wants it as it is.
                unmoved = Some(before);
            }
            self.forget_values();
            a_access = self.row_access(a_tile, &rows_of, &k_sym, &i_sym, &blocks);
        }
        let Some((a_place, a_depth, a_row, a_rest, a_block)) = a_access else {
            return Err(Error::bug("a copied left operand has no address"));
        };
        // Panels of b.
        let width = g.width;
        let panel = self.symbol();
        let panels = self.facts.simplify(&n.ceil_div(&Dim::new(width)));
        let panel_max = self.facts.bounds(&panels).max.saturating_sub(1).max(0);
        self.facts.declare(&panel, Range { min: 0, max: panel_max }, uppers(&panels));
        let col = self.symbol();
        self.facts.declare(&col, Range { min: 0, max: width - 1 }, vec![]);
        let n_sym = self.symbol();
        let spot = Dim::sym(panel.clone()) * width + Dim::sym(col.clone());
        self.facts.define(&n_sym, uppers(&n), spot);
        let b_tile = *b;
        let even = self.facts.simplify(&n.modulo(&Dim::new(width))).is(0);
        let mut b_access = self.column_access(b_tile, &n_sym, &col, &k_sym, &blocks, group);
        // A block of the depth must be one for both.
        if let Some(access) = &b_access
            && group == 1
            && access.4 != a_block
            && access.4.is_some()
            && a_block.is_some()
        {
            b_access = None;
        }
        let crowded = b_access.as_ref().is_some_and(|(place, depth_access, ..)| {
            group == 1 && rows_max >= 3 * g.rows && crowds(place, &depth_access.inner)
        });
        // Two columns share a byte: whole pairs of vectors are read from memory, else bytes are unpacked first.
        let packed = |place: &crate::emitter::Place| place.dtype.bits() == 4;
        if let Some((place, depth_access, ..)) = &b_access
            && packed(place)
            && group == 1
        {
            let whole = [&depth_access.inner, &depth_access.outer]
                .iter()
                .all(|d| d.as_const().is_some_and(|d| d % 2 == 0));
            let wide = g.vectors.is_multiple_of(2) && kind == MicroKind::Fma;
            let inside = self.may_over_read(b_tile, Some(place), width, group);
            if !(whole && wide && inside) {
                b_access = None;
            }
        }
        let mut tail = None;
        // Read in a narrower type than its tile has: a panel of it would be copied in the tile's.
        let widened = b_access
            .as_ref()
            .is_some_and(|(place, ..)| place.dtype != self.k.ty(b_tile).dtype.size_aligned());
        let over_read =
            even || self.may_over_read(b_tile, b_access.as_ref().map(|b| &b.0), width, group);
        if group > 1 {
            let there = b_access.is_some() && over_read;
            if kind.is_codes() && !there {
                return Err(Error::bug("codes of a product that do not lie eight together"));
            }
            if !there {
                self.c.t.comment("right operand copied in groups");
                let kept =
                    self.keep_right(b_tile, kind, [&depth, &n], [depth_max, cols_max], width)?;
                self.loc[b_tile.index()] = Loc::Buffer(kept);
                self.forget_values();
                b_access = self.column_access(b_tile, &n_sym, &col, &k_sym, &[group], group);
            }
        } else if b_access.is_none() || crowded || (!over_read && widened) {
            self.c.t.comment("right operand copied");
            let kept =
                self.new_panels(self.k.ty(b_tile).dtype.size_aligned(), depth_max, cols_max, width);
            let counts = [depth.clone(), n.clone()];
            self.fill_buffer(&kept, b_tile, &counts)?;
            self.loc[b_tile.index()] = Loc::Buffer(kept);
            self.forget_values();
            b_access = self.column_access(b_tile, &n_sym, &col, &k_sym, &blocks, 1);
        } else if !over_read {
            // The last panel is copied, so that whole vectors can be read.
            self.c.t.comment("last panel of the right operand copied");
            let kept =
                self.new_panels(self.k.ty(b_tile).dtype.size_aligned(), depth_max, width, width);
            let whole = self.facts.simplify(&n.floor_div(&Dim::new(width)));
            let rest = self.facts.simplify(&n.modulo(&Dim::new(width)));
            let mut shifted = kept.clone();
            // The panel's own columns count from zero.
            let stride = Dim::new(depth_max * width);
            shifted.layout.offset = &whole * &stride * -1;
            let base = [Dim::new(0), &whole * width];
            self.fill_region(&shifted, b_tile, &base, &[depth.clone(), rest])?;
            self.forget_values();
            tail = Some((kept, whole));
        }
        let Some((b_place, b_depth, _, b_rest, b_block)) = b_access else {
            return Err(Error::bug("a copied right operand has no address"));
        };
        // Groups are steps of the depth; their neighbours are one instruction's affair.
        let (a_depth, b_depth, b_block) = match group {
            1 => (a_depth, b_depth, b_block),
            _ => {
                let step = |inner: Dim| DepthAccess { inner, outer: Dim::new(0) };
                (step(Dim::new(group)), step(b_depth.outer), None)
            }
        };
        let depth = self.facts.simplify(&depth.ceil_div(&Dim::new(group)));
        let block = a_block.or(b_block);
        let unblocked = |access: &DepthAccess, own: Option<i64>| match (block, own) {
            (Some(size), None) => &access.inner * size,
            _ => access.outer.clone(),
        };
        let a_outer = unblocked(&a_depth, a_block);
        let b_outer = unblocked(&b_depth, b_block);
        // From elements to bytes.
        let nibbles = packed(&b_place);
        let halved = |d: &Dim| if nibbles { d.floor_div(&Dim::new(2)) } else { d.clone() };
        let b_depth = DepthAccess { inner: halved(&b_depth.inner), outer: halved(&b_depth.outer) };
        let b_outer = halved(&b_outer);

        // Blocks of the depth follow each other in b as its steps do.
        let b_unbroken =
            block.is_none_or(|size| self.facts.simplify(&(&b_outer - &b_depth.inner * size)).is(0));

        // Strides that are not known are arguments.
        let mut given: Vec<String> = Vec::new();
        let mut names: Vec<String> = Vec::new();
        let mut stride = |e: &mut Self, dim: &Dim, name: &str| match dim.as_const() {
            Some(v) => Stride::Known(v),
            None => {
                given.push(e.dim(dim));
                names.push(name.to_owned());
                Stride::Given(format!("%{name}"))
            }
        };
        let mut micro = Micro {
            kind,
            geometry: g,
            acc: dtype,
            a: a_place.dtype,
            b: b_place.dtype,
            a_row: stride(self, &a_row.inner, "a_row"),
            row_block: a_row.block.map(|size| (size, stride(self, &a_row.outer, "a_rows"))),
            a_depth: stride(self, &a_depth.inner, "a_depth"),
            b_depth: Stride::Known(0),
            a_block: stride(self, &a_outer, "a_block"),
            b_block: Stride::Known(0),
            block,
            whole_blocks: block
                .is_some_and(|size| self.facts.simplify(&depth.modulo(&Dim::new(size))).is(0)),
            ahead: b_unbroken
                && tail.is_none()
                && !kind.is_tile()
                && b_place.base.starts_with("%p")
                && self.facts.bounds(&depth).max * if nibbles { group } else { 1 } >= AHEAD_FROM,
            unroll: self.knobs.unroll_k.max(1),
        };
        let depth_v = self.dim(&depth);
        if tail.is_none() {
            micro.b_depth = stride(self, &b_depth.inner, "b_depth");
            micro.b_block = stride(self, &b_outer, "b_block");
        } else {
            micro.b_depth = Stride::Given("%b_depth".into());
            micro.b_block = Stride::Given("%b_block".into());
            let inner = self.dim(&b_depth.inner);
            given.push(inner);
            names.push("b_depth".into());
            let outer = self.dim(&b_outer);
            given.push(outer);
            names.push("b_block".into());
        }
        let group_rows = a_row.group(g.rows);
        let variants = match a_row.block {
            // Whole tiles as long as there are some: they need no configuration of their own.
            None if kind.is_tile() && m.as_const().is_some_and(|m| m > g.rows) => {
                let rest = m.as_const().unwrap_or(0) % g.rows;
                [g.rows, rest].into_iter().filter(|r| *r > 0).collect()
            }
            None => self.row_variants(&m, g.rows),
            Some(_) => {
                let rest = m.as_const().unwrap_or(0) % group_rows;
                [group_rows, rest].into_iter().filter(|r| *r > 0).collect()
            }
        };
        let functions = self.micro_kernels(&micro, &variants, &names);
        // Codes are unpacked once where many rows multiply them.
        let unpacked = (matches!(kind, MicroKind::CodesFma { .. })
            && self.facts.bounds(&m).max > UNPACK_FROM * g.rows)
            .then(|| {
                let plain = Micro {
                    kind: MicroKind::Fma,
                    b: DType::F32,
                    a_depth: Stride::Known(1),
                    b_depth: Stride::Known(width),
                    ahead: false,
                    ..micro.clone()
                };
                let name = format!("{}.mma{}.unpack", self.k.name, self.functions.len());
                let (text, code) = codes::unpacking(&micro, &name, &names, self.knobs.vector_bits);
                self.functions.push(text);
                self.c.helpers.extend(code.helpers);
                self.c.t.declares.extend(code.t.declares);
                let room = self.scratch(depth_max * width * 4);
                (self.micro_kernels(&plain, &variants, &names), name, room)
            });

        // What a left operand that was moved up adds, once for each panel: the product with rows of 128.
        let mut panel_shares = None;
        if matches!(kind, MicroKind::I8Dot { moved: true, .. }) {
            let name = format!("{}.mma{}.shares", self.k.name, self.functions.len());
            let ups = Micro {
                kind: MicroKind::I8Dot { shifted: false, moved: false },
                a_row: Stride::Known(0),
                a_depth: Stride::Known(0),
                ahead: false,
                ..micro.clone()
            };
            let (text, code) = micro_kernel(&ups, 1, &name, &names, self.knobs.vector_bits);
            self.functions.push(text);
            self.c.helpers.extend(code.helpers);
            self.c.t.declares.extend(code.t.declares);
            let (up, sums) = (self.scratch(4), self.scratch(4 * width));
            self.c.t.stmt(format_args!("store i32 {SHIFT}, ptr {up}, align 4"));
            panel_shares = Some((name, up, sums));
        }

        // The loops.
        let before = std::mem::replace(&mut self.loc[tile.index()], Loc::Virtual);
        drop(before);
        let panels_v = self.dim(&panels);
        let m_v = self.dim(&m);
        let whole_panel = panels.is(1);
        let open = (!whole_panel).then(|| self.c.t.begin_loop("0", &panels_v, "1"));
        let np = open.as_ref().map_or("0".to_owned(), |o| o.iv.clone());
        self.bind(&panel, &np);
        if whole_panel {
            self.facts.declare(&panel, Range { min: 0, max: 0 }, vec![Dim::new(0)]);
        }
        self.push_scope();
        let mut b_ptr = {
            let at = self.settle(&b_rest);
            let at = self.facts.simplify(&halved(&at));
            let at = self.dim(&at);
            let elem = mem_elem(b_place.dtype);
            self.c
                .t
                .ins(format_args!("getelementptr inbounds {elem}, ptr {}, i64 {at}", b_place.base))
        };
        if let Some((kept, whole)) = &tail {
            let whole = self.dim(whole);
            let is_tail = self.c.t.ins(format_args!("icmp eq i64 {np}, {whole}"));
            b_ptr =
                self.c.t.ins(format_args!("select i1 {is_tail}, ptr {}, ptr {b_ptr}", kept.ptr));
            let at = names.iter().position(|n| n == "b_depth").unwrap_or(0);
            given[at] =
                self.c.t.ins(format_args!("select i1 {is_tail}, i64 {width}, i64 {}", given[at]));
            let at = names.iter().position(|n| n == "b_block").unwrap_or(0);
            let size = width * block.unwrap_or(0);
            given[at] =
                self.c.t.ins(format_args!("select i1 {is_tail}, i64 {size}, i64 {}", given[at]));
        }
        let mut more: String = given.iter().map(|g| format!(", i64 {g}")).collect();
        if let Some((name, up, sums)) = &panel_shares {
            let args = format!("ptr {up}, ptr {b_ptr}, ptr {sums}, i64 {depth_v}, i1 true{more}");
            self.c.t.stmt(format_args!("call void @{name}({args})"));
            let _ = write!(more, ", ptr {sums}");
        }
        let unpacked = unpacked.map(|(functions, name, room)| {
            let limit = UNPACK_FROM * g.rows;
            let many = self.c.t.ins(format_args!("icmp sgt i64 {m_v}, {limit}"));
            let (yes, no) = (self.c.t.label(), self.c.t.label());
            self.c.t.br_if(&many, &yes, &no);
            self.c.t.place(&yes);
            let args = format!("ptr {b_ptr}, ptr {room}, i64 {depth_v}{more}");
            self.c.t.stmt(format_args!("call void @{name}({args})"));
            self.c.t.br(&no);
            self.c.t.place(&no);
            let deep = self.c.t.ins(format_args!("mul nsw i64 {depth_v}, {group}"));
            (functions, many, room, deep)
        });
        let mut row_loop = self.c.t.begin_loop("0", &m_v, "1");
        let i0 = self.symbol();
        self.facts.declare(&i0, Range { min: 0, max: (rows_max - 1).max(0) }, uppers(&m));
        self.bind(&i0, &row_loop.iv);
        self.push_scope();
        let even = a_row.block.is_none() && !kind.is_tile();
        let count_v = self.row_count(&m, g.rows, &variants, &row_loop.iv.clone(), &m_v, even);
        row_loop.set_step(&count_v);
        let count = self.symbol();
        let max = variants.iter().copied().max().unwrap_or(1);
        let min = variants.iter().copied().min().unwrap_or(1);
        let i0_dim = Dim::sym(i0.clone());
        self.facts.declare(&count, Range { min, max }, vec![Dim::new(max), &m - &i0_dim]);
        self.bind(&count, &count_v);
        let count_dim = if variants.len() == 1 { Dim::new(max) } else { Dim::sym(count) };
        // The piece's place in the result.
        let mut piece = buf.clone();
        if one_piece {
            let panel_stride = g.rows * width;
            piece.layout.offset = &i0_dim * width * -1 - Dim::sym(panel.clone()) * panel_stride;
            piece.pad = width;
        }
        let np_dim = Dim::sym(panel.clone());
        let corner = [i0_dim.clone(), &np_dim * width];
        let cols = n.min_with(&(&corner[1] + width)) - &corner[1];
        let cols =
            self.facts.simplify(&(&n - &corner[1]).min_with(&Dim::new(width)).min_with(&cols));
        let region = [count_dim.clone(), cols];
        let c_ptr = {
            let place = self.buffer_place(&piece, &corner);
            let at = self.dim(&place.offset);
            let elem = mem_elem(piece.dtype);
            self.c.t.ins(format_args!("getelementptr inbounds {elem}, ptr {}, i64 {at}", piece.ptr))
        };
        let zero = if zero_init {
            first.clone()
        } else {
            if !in_place {
                let guard = (first != "true").then(|| {
                    let (yes, no) = (self.c.t.label(), self.c.t.label());
                    self.c.t.br_if(&first, &yes, &no);
                    self.c.t.place(&yes);
                    no
                });
                self.push_scope();
                self.fill_region(&piece, init, &corner, &region)?;
                self.pop_scope();
                if let Some(no) = guard {
                    self.c.t.br(&no);
                    self.c.t.place(&no);
                }
            }
            "false".into()
        };
        let a_ptr = {
            let offset = a_rest + a_row.at(&i0_dim);
            let at = self.dim(&offset);
            let elem = mem_elem(a_place.dtype);
            self.c
                .t
                .ins(format_args!("getelementptr inbounds {elem}, ptr {}, i64 {at}", a_place.base))
        };
        let args = format!("ptr {a_ptr}, ptr {b_ptr}, ptr {c_ptr}, i64 {depth_v}, i1 {zero}{more}");
        match &unpacked {
            None => self.call_for_rows(&functions, &count_v, &args),
            Some((plain, many, room, deep)) => {
                let [yes, no, end] = [0; 3].map(|_| self.c.t.label());
                self.c.t.br_if(many, &yes, &no);
                self.c.t.place(&yes);
                let on_floats =
                    format!("ptr {a_ptr}, ptr {room}, ptr {c_ptr}, i64 {deep}, i1 {zero}{more}");
                self.call_for_rows(plain, &count_v, &on_floats);
                self.c.t.br(&end);
                self.c.t.place(&no);
                self.call_for_rows(&functions, &count_v, &args);
                self.c.t.br(&end);
                self.c.t.place(&end);
            }
        }
        if let Some(epilogue) = &epilogue {
            self.run_epilogue(epilogue, &piece, &corner, &region, &last)?;
        }
        self.pop_scope();
        self.c.t.end_loop(row_loop);
        self.pop_scope();
        if let Some(open) = open {
            self.c.t.end_loop(open);
        }
        if let Some(before) = unmoved {
            self.loc[a_tile.index()] = before;
            self.forget_values();
        }
        self.loc[tile.index()] = match target {
            Some(Loc::Acc(acc)) => Loc::Acc(acc.clone()),
            _ => Loc::Buffer(buf),
        };
        Ok(())
    }

    /// Stores what is made of a finished piece.
    fn run_epilogue(
        &mut self,
        epilogue: &Epilogue,
        piece: &Buf,
        corner: &[Dim],
        region: &[Dim],
        last: &str,
    ) -> Result<()> {
        self.forget_values();
        let guard = (last != "true").then(|| {
            let (yes, no) = (self.c.t.label(), self.c.t.label());
            self.c.t.br_if(last, &yes, &no);
            self.c.t.place(&yes);
            no
        });
        self.push_scope();
        let result = epilogue.result.index();
        let before = std::mem::replace(&mut self.loc[result], Loc::Buffer(piece.clone()));
        for (stmt, axes) in &epilogue.stores {
            let Stmt::Store { param, index, value } = stmt else { continue };
            self.forget_values();
            let extents = &self.k.params[*param].layout.axes;
            let shape = self.extents(*value)?;
            let (mut base, mut counts) = (Vec::new(), Vec::new());
            for (d, axis) in axes.iter().enumerate() {
                let clip = Dim::new(shape[d]).min_with(&(&extents[d].extent - &index[d]));
                let clip = self.facts.simplify(&clip);
                match axis {
                    Some(x) => {
                        base.push(corner[*x].clone());
                        let left = &clip - &corner[*x];
                        counts.push(self.facts.simplify(&region[*x].min_with(&left)));
                    }
                    None => {
                        base.push(Dim::new(0));
                        counts.push(clip);
                    }
                }
            }
            self.store_tile(*param, index, *value, &base, &counts)?;
        }
        self.loc[result] = before;
        self.pop_scope();
        if let Some(no) = guard {
            self.c.t.br(&no);
            self.c.t.place(&no);
        }
        Ok(())
    }
}

/// The text of one micro-kernel: `c[r][0..width] (+)= sum over k of a[r][k] * b[k][0..width]`.
pub(crate) fn micro_kernel(
    micro: &Micro,
    rows: i64,
    name: &str,
    names: &[String],
    vector_bits: u32,
) -> (String, Code) {
    let g = micro.geometry;
    let mut c = Code { vector_bits, ..Code::default() };
    c.t = crate::text::Text::new();
    let acc_elem = reg_elem(micro.acc);
    let c_elem = mem_elem(micro.acc);
    let v = vector(acc_elem, g.lanes);
    let cv = vector(c_elem, g.lanes);
    let align = micro.acc.size();
    let (rows_n, vecs) = (rows as usize, g.vectors as usize);
    let mut accs = Vec::new();
    for _ in 0..rows_n * vecs {
        accs.push(c.t.alloca(&v));
    }
    let text = |s: &Stride| match s {
        Stride::Known(v) => v.to_string(),
        Stride::Given(n) => n.clone(),
    };
    // Sums of even and of odd columns apart.
    let halves = micro.b.bits() == 4 && micro.kind == MicroKind::Fma;
    // What the 8 added to signed codes contribute, per row.
    let row_shares = match micro.kind {
        MicroKind::CodesDot { signed: true } => codes::shares(&mut c, rows_n),
        _ => vec![],
    };
    // What the 128 added to a signed left operand contribute, per column.
    let mut shares = Vec::new();
    if matches!(micro.kind, MicroKind::I8Dot { shifted: true, moved: false }) {
        shares.extend((0..vecs).map(|_| c.t.alloca(&v)));
    }
    // Rows of a from its first.
    let mut row_offsets: Vec<String> = Vec::new();
    let times = |c: &mut Code, stride: &Stride, n: i64| match stride {
        Stride::Known(s) => Stride::Known(s * n),
        Stride::Given(s) => Stride::Given(c.t.ins(format_args!("mul nsw i64 {s}, {n}"))),
    };
    for r in 0..rows {
        let offset = match &micro.row_block {
            Some((size, blocks)) if r >= *size => {
                let (a, b) =
                    (times(&mut c, &micro.a_row, r % size), times(&mut c, blocks, r / size));
                match (&a, &b) {
                    (Stride::Known(a), Stride::Known(b)) => Stride::Known(a + b),
                    _ => Stride::Given(c.t.ins(format_args!(
                        "add nsw i64 {}, {}",
                        text(&a),
                        text(&b)
                    ))),
                }
            }
            _ => times(&mut c, &micro.a_row, r),
        };
        row_offsets.push(text(&offset));
    }
    let c_at = |c: &mut Code, r: usize, j: usize| {
        let at = r as i64 * g.width + j as i64 * i64::from(g.lanes);
        c.t.ins(format_args!("getelementptr inbounds {c_elem}, ptr %c, i64 {at}"))
    };
    for share in &shares {
        c.t.stmt(format_args!("store {v} zeroinitializer, ptr {share}"));
    }
    c.t.br_if("%zero", "fresh", "old");
    c.t.place("fresh");
    let nothing =
        splat_lit(acc_elem, if micro.acc.is_float() { "0x0000000000000000" } else { "0" }, g.lanes);
    for a in &accs {
        c.t.stmt(format_args!("store {v} {nothing}, ptr {a}"));
    }
    c.t.br("go");
    c.t.place("old");
    for r in 0..rows_n {
        for j in 0..vecs {
            let p = c_at(&mut c, r, j);
            let x = c.t.ins(format_args!("load {cv}, ptr {p}, align {align}"));
            let x = c.widen(micro.acc, g.lanes, &x);
            c.t.stmt(format_args!("store {v} {x}, ptr {}", accs[r * vecs + j]));
        }
    }
    if halves {
        nibbles::apart(&mut c, acc_elem, g.lanes, &accs);
    }
    c.t.br("go");
    c.t.place("go");
    // Where windows overlap, one step reads what another row read in the step before. LLVM would
    // keep these for the later step, and spill them: hide that the addresses are equal.
    let overlaps = match (&micro.a_row, &micro.a_depth) {
        (Stride::Known(row), Stride::Known(step)) if *row > 0 && *step > 0 => {
            (1..micro.block.unwrap_or(0).min(WRITTEN_OUT))
                .any(|u| (u * step) % row == 0 && u * step / row < rows)
        }
        _ => false,
    };
    let be = mem_elem(micro.b);
    let next = micro.ahead.then(|| {
        let mut past = c.t.ins(format_args!("mul nsw i64 %depth, {}", text(&micro.b_depth)));
        if micro.b.bits() == 4 {
            // A group of the depth is so short in memory that the next one would come too late.
            past = c.t.ins(format_args!("mul nsw i64 {past}, {NIBBLES_AHEAD}"));
        }
        c.t.ins(format_args!("getelementptr {be}, ptr %b, i64 {past}"))
    });
    let step = |c: &mut Code, k: &str, a: &str, b: &str, next: Option<&str>, u: u32| {
        // Addresses of depth k + u.
        let at = |c: &mut Code, elem: &str, base: &str, stride: &Stride| {
            let first = match stride {
                Stride::Known(1) => k.to_owned(),
                s => c.t.ins(format_args!("mul nsw i64 {k}, {}", text(s))),
            };
            // What lies ahead may be nobody's, and asking for it never faults.
            let known = if next == Some(base) { "" } else { "inbounds " };
            let p = c.t.ins(format_args!("getelementptr {known}{elem}, ptr {base}, i64 {first}"));
            if u == 0 {
                return p;
            }
            let more = match stride {
                Stride::Known(s) => (s * i64::from(u)).to_string(),
                Stride::Given(s) => c.t.ins(format_args!("mul nsw i64 {s}, {u}")),
            };
            c.t.ins(format_args!("getelementptr {known}{elem}, ptr {p}, i64 {more}"))
        };
        let ae = mem_elem(micro.a);
        let mut a = a.to_owned();
        if u > 0 && overlaps {
            a = c.t.ins(format_args!("call ptr asm sideeffect \"\", \"=r,0\"(ptr {a})"));
        }
        let pa = at(c, ae, &a, &micro.a_depth);
        let pb = at(c, be, b, &micro.b_depth);
        if let Some(next) = next {
            let p = at(c, be, next, &micro.b_depth);
            let bytes = g.width * micro.kind.group() * i64::from(micro.b.bits()) / 8;
            // Rows that share a line ask for it once.
            let shared = (LINE / bytes.max(1)).max(1);
            let lines = match micro.b.bits() {
                4 if i64::from(u) % shared == 0 => (bytes / LINE).max(1),
                4 => 0,
                _ => bytes / LINE,
            };
            for line in 0..lines {
                let p = c.t.ins(format_args!("getelementptr i8, ptr {p}, i64 {}", line * LINE));
                // To read, into the second level, as data.
                let args = [("ptr", p.as_str()), ("i32", "0"), ("i32", "2"), ("i32", "1")];
                c.t.intrinsic("void", "llvm.prefetch.p0", &args);
            }
        }
        let shape = [g.lanes, g.vectors];
        match micro.kind {
            MicroKind::CodesDot { .. } => {
                let slots = [&accs[..], &row_shares];
                return codes::step(c, shape, [&pa, &pb], &row_offsets, slots);
            }
            MicroKind::CodesFma { signed } => {
                return codes::float_step(c, shape, [&pa, &pb], &row_offsets, &accs, signed);
            }
            _ => {}
        }
        if micro.kind.group() > 1 {
            return dot_step(c, micro, [&pa, &pb], &row_offsets, &accs, &shares);
        }
        let mut bs = Vec::new();
        if micro.b.bits() == 4 {
            bs = nibbles::load(c, micro.b, widened(micro.acc), [g.lanes, g.vectors], &pb);
        }
        for j in bs.len() as u32..g.vectors {
            let off = j * g.lanes;
            let p = c.t.ins(format_args!("getelementptr inbounds {be}, ptr {pb}, i64 {off}"));
            let bv = vector(be, g.lanes);
            let x = c.t.ins(format_args!("load {bv}, ptr {p}, align {}", micro.b.size()));
            let x = c.widen(micro.b, g.lanes, &x);
            bs.push(c.cast(micro.b, widened(micro.acc), g.lanes, &x));
        }
        for r in 0..rows_n {
            let p = c
                .t
                .ins(format_args!("getelementptr inbounds {ae}, ptr {pa}, i64 {}", row_offsets[r]));
            let x = c.t.ins(format_args!("load {ae}, ptr {p}, align {}", micro.a.size()));
            let x = c.widen(micro.a, 1, &x);
            let x = c.cast(micro.a, widened(micro.acc), 1, &x);
            let x = c.splat(acc_elem, &x, g.lanes);
            for (j, bj) in bs.iter().enumerate() {
                let slot = &accs[r * vecs + j];
                let old = c.t.ins(format_args!("load {v}, ptr {slot}"));
                let new = match micro.kind {
                    MicroKind::Fma => c.call("fma", acc_elem, g.lanes, &[&x, bj, &old]),
                    MicroKind::MulAdd => {
                        let p = c.bin("mul", acc_elem, g.lanes, &x, bj);
                        c.bin("add", acc_elem, g.lanes, &p, &old)
                    }
                    _ => unreachable!("groups were multiplied above"),
                };
                c.t.stmt(format_args!("store {v} {new}, ptr {slot}"));
            }
        }
    };
    let run = |c: &mut Code, count: &str, a: &str, b: &str, next: Option<&str>| {
        if let Ok(known @ 1..=WRITTEN_OUT) = count.parse::<i64>() {
            for i in 0..known as u32 {
                step(c, "0", a, b, next, i);
            }
            return;
        }
        let u = micro.unroll;
        if u > 1 {
            let whole = c.t.ins(format_args!("udiv i64 {count}, {u}"));
            let whole = c.t.ins(format_args!("mul nsw i64 {whole}, {u}"));
            let open = c.t.begin_loop("0", &whole, &u.to_string());
            let k = open.iv.clone();
            for i in 0..u {
                step(c, &k, a, b, next, i);
            }
            c.t.end_loop(open);
            let open = c.t.begin_loop(&whole, count, "1");
            let k = open.iv.clone();
            step(c, &k, a, b, next, 0);
            c.t.end_loop(open);
        } else {
            let open = c.t.begin_loop("0", count, "1");
            let k = open.iv.clone();
            step(c, &k, a, b, next, 0);
            c.t.end_loop(open);
        }
    };
    match micro.block {
        None => run(&mut c, "%depth", "%a", "%b", next.as_deref()),
        Some(size) => {
            let open = c.t.begin_loop("0", "%depth", &size.to_string());
            let k0 = open.iv.clone();
            let mut count = size.to_string();
            if !micro.whole_blocks {
                let left = c.t.ins(format_args!("sub nsw i64 %depth, {k0}"));
                count = c.call("smin", "i64", 1, &[&left, &count]);
            }
            let number = c.t.ins(format_args!("udiv i64 {k0}, {size}"));
            let mut ptr = |known: &str, elem: &str, base: &str, stride: &Stride| {
                let off = c.t.ins(format_args!("mul nsw i64 {number}, {}", text(stride)));
                c.t.ins(format_args!("getelementptr {known}{elem}, ptr {base}, i64 {off}"))
            };
            let a = ptr("inbounds ", mem_elem(micro.a), "%a", &micro.a_block);
            let b = ptr("inbounds ", be, "%b", &micro.b_block);
            let next = next.map(|next| ptr("", be, &next, &micro.b_block));
            run(&mut c, &count, &a, &b, next.as_deref());
            c.t.end_loop(open);
        }
    }
    if halves {
        nibbles::together(&mut c, acc_elem, g.lanes, &accs);
    }
    for r in 0..rows_n {
        let row_share = row_shares.get(r).map(|share| codes::share(&mut c, g.lanes, share));
        for j in 0..vecs {
            let p = c_at(&mut c, r, j);
            let mut x = c.t.ins(format_args!("load {v}, ptr {}", accs[r * vecs + j]));
            if let Some(share) = &row_share {
                x = c.bin("sub", acc_elem, g.lanes, &x, share);
            }
            let known = match micro.kind {
                MicroKind::I8Dot { moved: true, .. } => {
                    let at = j as i64 * i64::from(g.lanes);
                    Some(c.t.ins(format_args!("getelementptr inbounds i32, ptr %shares, i64 {at}")))
                }
                _ => shares.get(j).cloned(),
            };
            if let Some(share) = known {
                let share = c.t.ins(format_args!("load {v}, ptr {share}"));
                x = c.bin("sub", acc_elem, g.lanes, &x, &share);
            }
            let x = c.round(micro.acc, g.lanes, &x);
            let x = c.narrow(micro.acc, g.lanes, &x);
            c.t.stmt(format_args!("store {cv} {x}, ptr {p}, align {align}"));
        }
    }
    c.t.stmt("ret void");
    let mut params =
        "ptr noalias %a, ptr noalias %b, ptr noalias %c, i64 %depth, i1 %zero".to_owned();
    for n in names {
        let _ = write!(params, ", i64 %{n}");
    }
    if matches!(micro.kind, MicroKind::I8Dot { moved: true, .. }) {
        params.push_str(", ptr noalias %shares");
    }
    let mut out = format!("define internal void @{name}({params}) #1 {{\nstart:\n");
    out.push_str(&c.t.allocas);
    out.push_str(&c.t.body);
    out.push_str("}\n");
    (out, c)
}

/// The type whose register form accumulates.
fn widened(acc: DType) -> DType {
    acc.compute()
}
