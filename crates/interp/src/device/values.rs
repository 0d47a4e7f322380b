//! Steps that move and compute values: boxes, fragments, products.
//!
//! Each says which memory and registers it touches first; values follow only when the machine has buffers.

use super::clock::{Part, component};
use super::machine::{Machine, Stage};
use super::memory::{Access, GlobalAccess, Kind, Proxy, Rect, zeros};
use super::tensor::{TensorCore, floats, tf32_cut, tf32_near};
use crate::Mode;
use crate::func::eval_func;
use crate::tile::identity;
use crate::value::{Buf, float_to_int, int_to_float, round_to, wrap_to};
use tilewright_base::{DType, Error, Result};
use tilewright_data::{from_f64, from_i64, read_f64, read_i64};
use tilewright_device::*;
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{Access as Declared, ParamId, ReduceKind};

/// Columns `c0..c1` of a fragment.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) frag: usize,
    pub(super) rect: Rect,
}

/// Floats as two TF32 numbers each: the nearest one, and what is left of it.
fn two_parts(x: &Buf) -> (Buf, Buf) {
    match x {
        Buf::F(x) => {
            let high = x.iter().map(|x| tf32_near(*x));
            let low = x.iter().map(|x| tf32_cut(x - tf32_near(*x)));
            (Buf::F(high.collect()), Buf::F(low.collect()))
        }
        Buf::I(_) => (x.clone(), x.clone()),
    }
}

/// A rectangle's elements, row-major.
fn get(from: &Buf, cols: usize, rect: Rect) -> Buf {
    let range = |r: usize| r * cols + rect.c0..r * cols + rect.c1;
    match from {
        Buf::F(v) => Buf::F((rect.r0..rect.r1).flat_map(|r| &v[range(r)]).copied().collect()),
        Buf::I(v) => Buf::I((rect.r0..rect.r1).flat_map(|r| &v[range(r)]).copied().collect()),
    }
}

/// Writes a rectangle's elements; both sides are of one kind.
pub(super) fn put(to: &mut Buf, cols: usize, rect: Rect, data: &Buf) {
    let width = rect.cols();
    for (i, r) in (rect.r0..rect.r1).enumerate() {
        let (range, from) = (r * cols + rect.c0..r * cols + rect.c1, i * width..(i + 1) * width);
        match (&mut *to, data) {
            (Buf::F(to), Buf::F(data)) => to[range].copy_from_slice(&data[from]),
            (Buf::I(to), Buf::I(data)) => to[range].copy_from_slice(&data[from]),
            _ => {}
        }
    }
}

/// Elements of one type as another.
pub(super) fn convert(data: Buf, from: DType, to: DType, mode: Mode) -> Buf {
    let round = |v: f64| if mode == Mode::Exact { round_to(to, v) } else { v };
    match (data, to.is_float()) {
        (Buf::F(v), true) if mode == Mode::F64 || from == to => Buf::F(v),
        (Buf::F(v), true) => Buf::F(v.into_iter().map(round).collect()),
        (Buf::F(v), false) => Buf::I(v.into_iter().map(|x| float_to_int(to, x)).collect()),
        (Buf::I(v), true) => Buf::F(v.into_iter().map(|x| round(int_to_float(from, x))).collect()),
        (Buf::I(v), false) => Buf::I(v.into_iter().map(|x| wrap_to(to, x)).collect()),
    }
}

/// `acc[m,n] += a[m,k] * b[k,n]`, each sum in order of `k`.
fn multiply(
    acc: &mut Buf,
    (m, k, n): (usize, usize, usize),
    a: &Buf,
    b: &Buf,
    to: DType,
    mode: Mode,
) {
    match (acc, a, b) {
        (Buf::F(acc), Buf::F(a), Buf::F(b)) => {
            for i in 0..m {
                for x in 0..k {
                    let left = a[i * k + x];
                    let row = acc[i * n..(i + 1) * n].iter_mut().zip(&b[x * n..(x + 1) * n]);
                    for (t, right) in row {
                        *t += left * right;
                        if mode == Mode::Exact {
                            *t = round_to(to, *t);
                        }
                    }
                }
            }
        }
        (Buf::I(acc), Buf::I(a), Buf::I(b)) => {
            for i in 0..m {
                for x in 0..k {
                    let left = a[i * k + x];
                    let row = acc[i * n..(i + 1) * n].iter_mut().zip(&b[x * n..(x + 1) * n]);
                    for (t, right) in row {
                        *t = wrap_to(to, t.wrapping_add(left.wrapping_mul(*right)));
                    }
                }
            }
        }
        _ => {}
    }
}

pub(super) fn combine(kind: ReduceKind, dtype: DType, mode: Mode, a: Value, b: Value) -> Value {
    match (a, b) {
        (Value::Float(x), Value::Float(y)) => {
            let v = match kind {
                ReduceKind::Sum => x + y,
                ReduceKind::Prod => x * y,
                _ if x.is_nan() || y.is_nan() => f64::NAN,
                ReduceKind::Max => x.max(y),
                ReduceKind::Min => x.min(y),
            };
            Value::Float(if mode == Mode::Exact { round_to(dtype, v) } else { v })
        }
        (Value::Int(x), Value::Int(y)) => {
            let unsigned = dtype == DType::U64;
            let v = match kind {
                ReduceKind::Sum => x.wrapping_add(y),
                ReduceKind::Prod => x.wrapping_mul(y),
                ReduceKind::Max if unsigned => (x as u64).max(y as u64) as i64,
                ReduceKind::Min if unsigned => (x as u64).min(y as u64) as i64,
                ReduceKind::Max => x.max(y),
                ReduceKind::Min => x.min(y),
            };
            Value::Int(wrap_to(dtype, v))
        }
        (other, _) => other,
    }
}

pub(super) fn value_at(buf: &Buf, i: usize) -> Value {
    match buf {
        Buf::F(v) => Value::Float(v[i]),
        Buf::I(v) => Value::Int(v[i]),
    }
}

pub(super) fn set(buf: &mut Buf, i: usize, value: Value) {
    match (buf, value) {
        (Buf::F(v), Value::Float(x)) => v[i] = x,
        (Buf::I(v), Value::Int(x)) => v[i] = x,
        _ => {}
    }
}

impl<'p> Machine<'p, '_> {
    /// The steps that `step.rs` does not know.
    pub(super) fn values(&mut self, agent: usize, stmt: &'p Stmt) -> Result<()> {
        if !matches!(stmt, Stmt::CopyIn { .. }) {
            self.all_threads(agent, stmt)?;
            if self.agents[agent].stage != Stage::Body {
                return Err(self.fail(agent, stmt, "is not run by a role"));
            }
        }
        match stmt {
            Stmt::CopyIn { param, at, axes, to, vector, ends } => {
                let (smem, rect) = self.place(agent, stmt, to)?;
                let at = self.dims(agent, stmt, at)?;
                for (axis, tile) in [(axes.0, rect.rows()), (axes.1, rect.cols())] {
                    let along = &self.program.params[*param].layout.axes[axis];
                    if *ends || *vector < 2 || !along.stride.is(1) {
                        continue;
                    }
                    let left = self.dim(agent, stmt, &along.extent)? - at[axis];
                    if (1..tile as i64).contains(&left) && left % i64::from(*vector) != 0 {
                        return Err(self.fail(
                            agent,
                            stmt,
                            "an access goes beyond the end of a line",
                        ));
                    }
                }
                let a = &mut self.agents[agent];
                let solo = a.solo();
                let (groups, part) = match solo {
                    true => (&mut a.clocks.leader_copy, Part::LeaderCopy),
                    false => (&mut a.clocks.others_copy, Part::OthersCopy),
                };
                let stamp = groups.issue();
                let write = self.access(agent, stmt, component(agent, part), stamp, Kind::Write);
                self.touch_smem(agent, stmt, smem, rect, write)?;
                let (axes, shape) = ((Some(axes.0), Some(axes.1)), (rect.rows(), rect.cols()));
                let dtype = self.program.params[*param].dtype;
                let zero = if dtype.is_float() { Value::Float(0.0) } else { Value::Int(0) };
                let data = self.global_read(agent, stmt, *param, (&at, axes), shape, zero, 0)?;
                if let Some(data) = data {
                    let data = convert(data, dtype, self.smem_type(to), self.options.mode);
                    self.smem_put(agent, smem, rect, &data);
                }
            }
            Stmt::Wgmma { acc, a, b, turned, zero_if } => {
                self.wgmma(agent, stmt, acc, a, (b, *turned), zero_if.as_ref())?;
            }
            Stmt::Mma { acc, a, b, split } => {
                let left = match a {
                    WgmmaA::Smem(tile) => self.smem_read(agent, stmt, tile)?,
                    WgmmaA::Frag(frag) => {
                        let view = self.reg_read(agent, stmt, frag)?;
                        self.reg_get(agent, view)
                    }
                };
                let right = self.smem_read(agent, stmt, b)?;
                let view = self.reg_read(agent, stmt, acc)?;
                self.reg_write(agent, stmt, acc)?;
                if let (Some(left), Some(right)) = (left, right) {
                    let operand = self.program.smem[b.smem].dtype;
                    let k = b.rows as usize;
                    // Small terms first. Outside of exact mode the parts make the whole.
                    let parts = match *split && self.options.mode == Mode::Exact {
                        true => {
                            let ((high, low), (right, right_low)) =
                                (two_parts(&left), two_parts(&right));
                            vec![(low, right.clone()), (high.clone(), right_low), (high, right)]
                        }
                        false => vec![(left, right)],
                    };
                    for (left, right) in &parts {
                        self.product(agent, view, (operand, k), left, right, false);
                    }
                }
            }
            Stmt::Fill { dst, value } => {
                let view = self.reg_write(agent, stmt, dst)?;
                let n = view.rect.rows() * view.rect.cols();
                let data = match value {
                    Value::Float(v) => Buf::F(vec![*v; n]),
                    Value::Int(v) => Buf::I(vec![*v; n]),
                };
                self.reg_put(agent, view, data);
            }
            Stmt::Map { dst, func, args } => {
                let views = args
                    .iter()
                    .map(|a| self.reg_read(agent, stmt, a))
                    .collect::<Result<Vec<_>>>()?;
                let view = self.reg_write(agent, stmt, dst)?;
                if self.buffers.is_none() {
                    return Ok(());
                }
                let (rows, cols) = (view.rect.rows(), view.rect.cols());
                let args: Vec<Buf> =
                    views.iter().map(|&v| self.stretched(agent, v, rows, cols)).collect();
                let args: Vec<&Buf> = args.iter().collect();
                let data = eval_func(func, &args, rows * cols, self.options.mode);
                self.reg_put(agent, view, data);
            }
            Stmt::Iota { dst, axis, start } => {
                let start = self.dim(agent, stmt, start)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let (rows, cols) = (view.rect.rows(), view.rect.cols());
                let position = |i: usize| if *axis == 0 { i / cols } else { i % cols };
                let values = (0..rows * cols).map(|i| start + position(i) as i64);
                let dtype = self.program.frags[dst.frag].dtype;
                let data = match dtype.is_float() {
                    true => Buf::F(values.map(|v| v as f64).collect()),
                    false => Buf::I(values.collect()),
                };
                self.reg_put(agent, view, convert(data, dtype, dtype, self.options.mode));
            }
            Stmt::Reduce { dst, kind, src, accumulate } => {
                let from = self.reg_read(agent, stmt, src)?;
                if *accumulate {
                    self.reg_read(agent, stmt, dst)?;
                }
                let view = self.reg_write(agent, stmt, dst)?;
                if self.buffers.is_some() {
                    self.reduce(agent, view, dst, *kind, from, *accumulate);
                }
                // The warps of a row exchange what they have behind a barrier of the block (`across_row` in `lines.cuh`).
                let by_row = self.program.frags[dst.frag].extent == Extent::PerRow;
                let warps = matches!(self.program.frags[src.frag].spread, Spread::Lines { lanes, .. } if lanes > 32);
                if by_row && warps {
                    let clocks = &mut self.agents[agent].clocks;
                    let all = clocks.together();
                    clocks.meet(&all);
                }
            }
            Stmt::Load { dst, param, at, axes, fill, .. } => {
                let at = self.dims(agent, stmt, at)?;
                let view = self.reg_write(agent, stmt, dst)?;
                let shape = (view.rect.rows(), view.rect.cols());
                let mapping = self.mapping(dst, view, &at, *axes);
                let data =
                    self.global_read(agent, stmt, *param, (&at, *axes), shape, *fill, mapping)?;
                if let Some(data) = data {
                    let (from, to) =
                        (self.program.params[*param].dtype, self.program.frags[dst.frag].dtype);
                    self.reg_put(agent, view, convert(data, from, to, self.options.mode));
                }
            }
            Stmt::Store { param, at, axes, src, .. } => {
                let at = self.dims(agent, stmt, at)?;
                let view = self.reg_read(agent, stmt, src)?;
                let mapping = self.mapping(src, view, &at, *axes);
                let (component, stamp) = self.agents[agent].clocks.stamp(false);
                let access = self.access(agent, stmt, component, stamp, Kind::Write);
                let data = self.reg_get(agent, view);
                let cols = view.rect.cols();
                let mut here = at.clone();
                for i in 0..view.rect.rows() * cols {
                    along(&mut here, &at, *axes, i / cols, i % cols);
                    let value = data.as_ref().map(|d| value_at(d, i));
                    self.element_write(*param, &here, access, mapping, value)?;
                }
            }
            Stmt::ToSmem { to, src } => {
                let (smem, rect) = self.place(agent, stmt, to)?;
                let view = self.reg_read(agent, stmt, src)?;
                let (component, stamp) = self.agents[agent].clocks.stamp(false);
                let write = self.access(agent, stmt, component, stamp, Kind::Write);
                self.touch_smem(agent, stmt, smem, rect, write)?;
                if let Some(data) = self.reg_get(agent, view) {
                    let from = self.program.frags[src.frag].dtype;
                    let data = convert(data, from, self.smem_type(to), self.options.mode);
                    self.smem_put(agent, smem, rect, &data);
                }
            }
            Stmt::FromSmem { dst, from } => {
                let data = self.smem_read(agent, stmt, from)?;
                let view = self.reg_write(agent, stmt, dst)?;
                if let Some(data) = data {
                    let to = self.program.frags[dst.frag].dtype;
                    let data = convert(data, self.smem_type(from), to, self.options.mode);
                    self.reg_put(agent, view, data);
                }
            }
            Stmt::Line(step) => self.line_step(agent, stmt, step)?,
            _ => return Err(self.fail(agent, stmt, "is not known to the interpreter")),
        }
        Ok(())
    }

    pub(super) fn access(
        &self,
        agent: usize,
        stmt: &'p Stmt,
        component: u32,
        stamp: u32,
        kind: Kind,
    ) -> Access<'p> {
        Access { component, stamp, kind, proxy: Proxy::Generic, load: 0, agent, stmt }
    }

    fn smem_type(&self, tile: &SmemTile) -> DType {
        self.program.smem[tile.smem].dtype
    }

    fn smem_put(&mut self, agent: usize, smem: (usize, usize), rect: Rect, data: &Buf) {
        let block = self.agents[agent].block;
        let buffer = &mut self.blocks[block].smem[smem.0][smem.1];
        put(&mut buffer.data, buffer.cols, rect, data);
    }

    fn smem_get(&self, agent: usize, smem: (usize, usize), rect: Rect) -> Option<Buf> {
        self.buffers.as_ref()?;
        let buffer = &self.blocks[self.agents[agent].block].smem[smem.0][smem.1];
        Some(get(&buffer.data, buffer.cols, rect))
    }

    /// A plain read of shared memory by all threads.
    fn smem_read(&mut self, agent: usize, stmt: &'p Stmt, tile: &SmemTile) -> Result<Option<Buf>> {
        let (smem, rect) = self.place(agent, stmt, tile)?;
        let (component, stamp) = self.agents[agent].clocks.stamp(false);
        let read = self.access(agent, stmt, component, stamp, Kind::Read);
        self.touch_smem(agent, stmt, smem, rect, read)?;
        Ok(self.smem_get(agent, smem, rect))
    }

    pub(super) fn view(&self, agent: usize, stmt: &Stmt, frag: &FragRef) -> Result<View> {
        let col = self.dim(agent, stmt, &frag.col)?;
        let state = &self.agents[agent].frags[frag.frag.index()];
        let left = i64::try_from(state.cols).unwrap_or(0) - col;
        let cols = frag.cols.map_or(left, i64::from);
        if col < 0 || cols < 1 || cols > left {
            let what = format!("uses columns {col} +{cols} of {}", state.cols);
            return Err(self.fail(agent, stmt, &what));
        }
        let (c0, c1) = (col as usize, (col + cols) as usize);
        Ok(View { frag: frag.frag.index(), rect: Rect { r0: 0, r1: state.rows, c0, c1 } })
    }

    /// Plain steps read these registers.
    pub(super) fn reg_read(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        frag: &FragRef,
    ) -> Result<View> {
        let view = self.view(agent, stmt, frag)?;
        let a = &mut self.agents[agent];
        let done = a.wgmma.done;
        let columns = &mut a.frags[view.frag].columns[view.rect.c0..view.rect.c1];
        let wrong = if columns.iter().any(|c| !c.written) {
            Some("reads registers that nothing has written")
        } else if columns.iter().any(|c| c.accumulated > done) {
            Some("reads accumulators of a wgmma group that may be open")
        } else {
            columns.iter_mut().for_each(|c| c.touched = true);
            None
        };
        wrong.map_or(Ok(view), |what| Err(self.fail(agent, stmt, what)))
    }

    /// Plain steps write these registers.
    pub(super) fn reg_write(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        frag: &FragRef,
    ) -> Result<View> {
        let view = self.view(agent, stmt, frag)?;
        let a = &mut self.agents[agent];
        let done = a.wgmma.done;
        let columns = &mut a.frags[view.frag].columns[view.rect.c0..view.rect.c1];
        if columns.iter().any(|c| c.accumulated > done || c.operand > done) {
            let what = "writes registers of a wgmma group that may be open";
            return Err(self.fail(agent, stmt, what));
        }
        for c in columns {
            (c.written, c.touched, c.changed) = (true, true, true);
        }
        Ok(view)
    }

    pub(super) fn reg_get(&self, agent: usize, view: View) -> Option<Buf> {
        self.buffers.as_ref()?;
        let frag = &self.agents[agent].frags[view.frag];
        Some(get(&frag.data, frag.cols, view.rect))
    }

    pub(super) fn reg_put(&mut self, agent: usize, view: View, data: Buf) {
        if self.buffers.is_some() {
            let frag = &mut self.agents[agent].frags[view.frag];
            put(&mut frag.data, frag.cols, view.rect, &data);
        }
    }

    /// An operand repeated along the axis that it lacks.
    pub(super) fn stretched(&self, agent: usize, view: View, rows: usize, cols: usize) -> Buf {
        let frag = &self.agents[agent].frags[view.frag];
        let data = get(&frag.data, frag.cols, view.rect);
        let (have_rows, have_cols) = (view.rect.rows(), view.rect.cols());
        if (have_rows, have_cols) == (rows, cols) {
            return data;
        }
        let from = |i: usize| {
            let (r, c) = (i / cols, i % cols);
            (if have_rows == 1 { 0 } else { r }) * have_cols + if have_cols == 1 { 0 } else { c }
        };
        match data {
            Buf::F(v) => Buf::F((0..rows * cols).map(|i| v[from(i)]).collect()),
            Buf::I(v) => Buf::I((0..rows * cols).map(|i| v[from(i)]).collect()),
        }
    }

    fn reduce(
        &mut self,
        agent: usize,
        view: View,
        dst: &FragRef,
        kind: ReduceKind,
        from: View,
        accumulate: bool,
    ) {
        let info = &self.program.frags[dst.frag];
        let (dtype, mode) = (info.dtype, self.options.mode);
        let (Some(src), Some(mut out)) = (self.reg_get(agent, from), self.reg_get(agent, view))
        else {
            return;
        };
        let (rows, cols) = (from.rect.rows(), from.rect.cols());
        let per_row = info.extent == Extent::PerRow;
        let (results, along) = if per_row { (rows, cols) } else { (cols, rows) };
        for r in 0..results {
            let mut total = identity(kind, dtype);
            for i in 0..along {
                let at = if per_row { r * cols + i } else { i * cols + r };
                total = combine(kind, dtype, mode, total, value_at(&src, at));
            }
            if accumulate {
                total = combine(kind, dtype, mode, value_at(&out, r), total);
            }
            set(&mut out, r, total);
        }
        self.reg_put(agent, view, out);
    }

    fn product(
        &mut self,
        agent: usize,
        view: View,
        (operand, k): (DType, usize),
        a: &Buf,
        b: &Buf,
        zero: bool,
    ) {
        let Frag { dtype, spread, .. } = self.program.frags[FragId(view.frag as u32)];
        let shape = (view.rect.rows(), k, view.rect.cols());
        let start = match zero {
            true => Some(zeros(dtype, shape.0 * shape.2)),
            false => self.reg_get(agent, view),
        };
        if let Some(mut acc) = start {
            let core = TensorCore::of(operand, spread)
                .filter(|_| self.options.mode == Mode::Exact && dtype == DType::F32);
            match (core, floats(&mut acc, a, b)) {
                (Some(core), Some((acc, a, b))) => core.multiply(acc, shape, a, b),
                _ => multiply(&mut acc, shape, a, b, dtype, self.options.mode),
            }
            self.reg_put(agent, view, acc);
        }
    }

    fn wgmma(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        acc: &FragRef,
        left: &WgmmaA,
        (right, turned): (&SmemTile, bool),
        zero_if: Option<&Cond>,
    ) -> Result<()> {
        let zero = match zero_if {
            Some(cond) => self.cond(agent, stmt, cond)?,
            None => false,
        };
        let stamp = self.agents[agent].wgmma.issue();
        let read = Access {
            component: component(agent, Part::Wgmma),
            stamp,
            kind: Kind::Read,
            proxy: Proxy::Async,
            load: 0,
            agent,
            stmt,
        };
        let view = self.view(agent, stmt, acc)?;
        let columns = &mut self.agents[agent].frags[view.frag].columns;
        let columns = &mut columns[view.rect.c0..view.rect.c1];
        let bits = self.program.smem[right.smem].dtype.bits();
        let shape = (view.rect.c0, view.rect.c1, bits);
        let wrong = if columns.iter().any(|c| c.touched) {
            Some("follows other accesses to its accumulators without a fence")
        } else if columns.iter().any(|c| c.shape.is_some_and(|s| s != shape)) {
            // Only products of one shape are ordered by themselves (PTX ISA, "wgmma.fence").
            Some("follows products of another shape on its accumulators without a fence")
        } else if !zero && columns.iter().any(|c| !c.written) {
            Some("adds to accumulators that nothing has written")
        } else {
            for c in columns {
                (c.written, c.accumulated, c.shape) = (true, stamp, Some(shape));
            }
            None
        };
        if let Some(what) = wrong {
            return Err(self.fail(agent, stmt, what));
        }
        let a = match left {
            WgmmaA::Smem(tile) => {
                let (smem, rect) = self.place(agent, stmt, tile)?;
                self.touch_smem(agent, stmt, smem, rect, read)?;
                self.smem_get(agent, smem, rect)
            }
            WgmmaA::Frag(frag) => {
                let view = self.view(agent, stmt, frag)?;
                let a = &mut self.agents[agent];
                let done = a.wgmma.done;
                let columns = &mut a.frags[view.frag].columns[view.rect.c0..view.rect.c1];
                let wrong = if columns.iter().any(|c| c.changed) {
                    Some("follows writes to its left operand without a fence")
                } else if columns.iter().any(|c| !c.written) {
                    Some("reads registers that nothing has written")
                } else if columns.iter().any(|c| c.accumulated > done) {
                    Some("reads accumulators of a wgmma group that may be open")
                } else {
                    columns.iter_mut().for_each(|c| c.operand = stamp);
                    None
                };
                if let Some(what) = wrong {
                    return Err(self.fail(agent, stmt, what));
                }
                self.reg_get(agent, view)
            }
        };
        let (smem, rect) = self.place(agent, stmt, right)?;
        self.touch_smem(agent, stmt, smem, rect, read)?;
        let b = self.smem_get(agent, smem, rect);
        if let (Some(a), Some(b)) = (a, b) {
            let operand = self.program.smem[right.smem].dtype;
            let (depth, b) = match turned {
                true => (rect.cols(), transposed(&b, rect.rows(), rect.cols())),
                false => (rect.rows(), b),
            };
            self.product(agent, view, (operand, depth), &a, &b, zero);
        }
        Ok(())
    }

    // Global memory.

    /// A number for how a fragment's elements at this place belong to threads.
    pub(super) fn mapping(
        &mut self,
        frag: &FragRef,
        view: View,
        at: &[i64],
        axes: (Option<usize>, Option<usize>),
    ) -> u32 {
        let f = &self.program.frags[frag.frag];
        self.mapping_of((f.rows, f.cols, f.spread, f.extent), view.rect.c0, at, axes)
    }

    /// The same for what is spread like that, from a column on.
    pub(super) fn mapping_of(
        &mut self,
        shape: (u32, u32, Spread, Extent),
        col: usize,
        at: &[i64],
        axes: (Option<usize>, Option<usize>),
    ) -> u32 {
        self.global.mapping(format!("{shape:?} {col} {at:?} {axes:?}"))
    }

    fn buffer_offset(&self, param: ParamId, at: &[i64]) -> Result<Option<usize>> {
        let placed = &self.params[param.index()];
        let Some(offset) = placed.offset_of(at) else { return Ok(None) };
        let end = usize::try_from(offset).ok().and_then(|o| placed.dtype.bytes_for(o + 1));
        let fits = match (&self.buffers, end) {
            (Some(buffers), Some(end)) => end <= buffers[param.index()].len(),
            (None, end) => end.is_some(),
            _ => false,
        };
        if !fits {
            let name = &self.program.params[param].name;
            return Err(Error::bug(format!("element offset {offset} is outside of {name}")));
        }
        Ok(Some(offset as usize))
    }

    pub(super) fn grid_waited(&self, agent: usize, stmt: &Stmt, param: ParamId) -> Result<()> {
        let a = &self.agents[agent];
        let known = a.clocks.clock(a.solo()).knows(self.grid_component, 1);
        if !self.uses_grid_wait || known || self.options.constants.contains(&param) {
            return Ok(());
        }
        Err(self.fail(agent, stmt, "uses a tensor before the grid wait"))
    }

    fn element_touch(
        &mut self,
        param: ParamId,
        offset: usize,
        access: Access<'p>,
        mapping: u32,
    ) -> Result<()> {
        let a = &self.agents[access.agent];
        let new = GlobalAccess { cluster: self.cluster, mapping, access };
        let clock = a.clocks.clock(a.solo());
        self.global.touch(param.index(), offset, new, clock).map_err(|conflict| {
            let memory = format!("element {offset} of {}", self.program.params[param].name);
            self.conflict(access.agent, access.stmt, &memory, conflict)
        })
    }

    pub(super) fn element_read(
        &mut self,
        param: ParamId,
        at: &[i64],
        fill: Value,
        access: Access<'p>,
        mapping: u32,
    ) -> Result<Value> {
        let Some(offset) = self.buffer_offset(param, at)? else { return Ok(fill) };
        if self.program.params[param].access != Declared::In {
            self.element_touch(param, offset, access, mapping)?;
        }
        let Some(buffers) = &self.buffers else { return Ok(fill) };
        let (dtype, bytes) = (self.params[param.index()].dtype, &buffers[param.index()]);
        Ok(match dtype.is_float() {
            true => Value::Float(read_f64(dtype, bytes, offset)),
            false => Value::Int(read_i64(dtype, bytes, offset)),
        })
    }

    pub(super) fn element_write(
        &mut self,
        param: ParamId,
        at: &[i64],
        access: Access<'p>,
        mapping: u32,
        value: Option<Value>,
    ) -> Result<()> {
        if self.program.params[param].access == Declared::In {
            return Err(self.fail(access.agent, access.stmt, "writes a tensor that is only read"));
        }
        self.grid_waited(access.agent, access.stmt, param)?;
        let Some(offset) = self.buffer_offset(param, at)? else { return Ok(()) };
        self.element_touch(param, offset, access, mapping)?;
        let (Some(buffers), Some(value)) = (&mut self.buffers, value) else { return Ok(()) };
        let (dtype, bytes) = (self.params[param.index()].dtype, &mut buffers[param.index()]);
        let add = access.kind == Kind::Add;
        match value {
            Value::Float(v) => {
                let old = if add { read_f64(dtype, bytes, offset) } else { 0.0 };
                from_f64(dtype, bytes, offset, if add { old + v } else { v });
            }
            Value::Int(v) => {
                let old = if add { read_i64(dtype, bytes, offset) } else { 0 };
                from_i64(dtype, bytes, offset, old.wrapping_add(v));
            }
        }
        Ok(())
    }

    /// Reads a tile of a tensor; no values when none are computed.
    #[expect(clippy::too_many_arguments, reason = "what, where, how large, and what else")]
    pub(super) fn global_read(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        param: ParamId,
        (at, axes): (&[i64], (Option<usize>, Option<usize>)),
        (rows, cols): (usize, usize),
        fill: Value,
        mapping: u32,
    ) -> Result<Option<Buf>> {
        self.grid_waited(agent, stmt, param)?;
        let read_only = self.program.params[param].access == Declared::In;
        if self.buffers.is_none() && read_only {
            return Ok(None);
        }
        let (component, stamp) = {
            let a = &self.agents[agent];
            a.clocks.stamp(a.solo())
        };
        let access = self.access(agent, stmt, component, stamp, Kind::Read);
        let mut out = zeros(self.program.params[param].dtype, rows * cols);
        let mut here = at.to_vec();
        for i in 0..rows * cols {
            along(&mut here, at, axes, i / cols, i % cols);
            set(&mut out, i, self.element_read(param, &here, fill, access, mapping)?);
        }
        Ok(self.buffers.is_some().then_some(out))
    }

    /// The coordinates of a box's elements one after another, in the order of a tile `[rows, cols]` of `smem`.
    fn box_coords(&self, map: MapId, at: &[i64], smem: &Smem, rect: Rect) -> Vec<i64> {
        let map = &self.program.maps[map];
        let (rows, cols) = (rect.rows(), rect.cols());
        let mut out = Vec::with_capacity(rows * cols * at.len());
        for i in 0..rows * cols {
            let (line, position) = match smem.contiguous {
                1 => (i / cols, i % cols),
                _ => (i % cols, i / cols),
            };
            let first = out.len();
            out.extend_from_slice(at);
            let mut rest = line;
            for axis in (0..at.len()).rev() {
                let extent = map.box_shape[axis].max(1) as usize;
                if axis == map.contiguous {
                    out[first + axis] += position as i64;
                } else {
                    out[first + axis] += (rest % extent) as i64;
                    rest /= extent;
                }
            }
        }
        out
    }

    /// The elements of a box, zero outside of the tensor.
    pub(super) fn box_read(
        &mut self,
        agent: usize,
        stmt: &'p Stmt,
        map: MapId,
        at: &[i64],
        smem: &Smem,
        rect: Rect,
    ) -> Result<Option<Buf>> {
        let param = self.program.maps[map].param;
        let round = self.program.maps[map].tf32 && self.options.mode == Mode::Exact;
        self.grid_waited(agent, stmt, param)?;
        let info = &self.program.params[param];
        if self.buffers.is_none() && info.access == Declared::In {
            return Ok(None);
        }
        let (component, stamp) = self.agents[agent].clocks.stamp(true);
        let mut access = self.access(agent, stmt, component, stamp, Kind::Read);
        access.proxy = Proxy::Async;
        let zero = if info.dtype.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let mut out = zeros(info.dtype, rect.rows() * rect.cols());
        let (at, tap) = at.split_at(info.layout.rank().min(at.len()));
        let mut coords = self.box_coords(map, at, smem, rect);
        if let Some(w) = &self.program.maps[map].windows {
            let two = |d: &[Dim; 2]| {
                Ok::<_, Error>([self.dim(agent, stmt, &d[0])?, self.dim(agent, stmt, &d[1])?])
            };
            let (size, outputs) = (two(&w.size)?, two(&w.outputs)?);
            let tap = [tap.first(), tap.get(1)].map(|t| t.copied().unwrap_or(0));
            for line in coords.chunks_mut(2) {
                line[0] = w.line(size, outputs, line[0], tap).unwrap_or(-1);
            }
        }
        for (i, at) in coords.chunks(at.len()).enumerate() {
            let value = match self.element_read(param, at, zero, access, 0)? {
                Value::Float(v) if round => Value::Float(tf32(v)),
                value => value,
            };
            set(&mut out, i, value);
        }
        Ok(self.buffers.is_some().then_some(out))
    }

    /// Writes a box from shared memory; what lies outside of the tensor is dropped.
    pub(super) fn box_write(
        &mut self,
        agent: usize,
        map: MapId,
        at: &[i64],
        (smem, rect): ((usize, usize), Rect),
        access: Access<'p>,
    ) -> Result<()> {
        let param = self.program.maps[map].param;
        let data = self.smem_get(agent, smem, rect);
        let info = &self.program.smem[SmemId(smem.0 as u32)];
        let coords = self.box_coords(map, at, info, rect);
        for (i, at) in coords.chunks(at.len()).enumerate() {
            let value = data.as_ref().map(|d| value_at(d, i));
            self.element_write(param, at, access, 0, value)?;
        }
        Ok(())
    }
}

/// The nearest value with TF32's 10 bits of mantissa, ties to even.
fn tf32(value: f64) -> f64 {
    let bits = (value as f32).to_bits();
    if !value.is_finite() {
        return value;
    }
    let rounded = bits.wrapping_add(0x0FFF + ((bits >> 13) & 1)) & !0x1FFF;
    f64::from(f32::from_bits(rounded))
}

/// `[cols, rows]` of `[rows, cols]`.
fn transposed(x: &Buf, rows: usize, cols: usize) -> Buf {
    let order = (0..cols).flat_map(|c| (0..rows).map(move |r| r * cols + c));
    match x {
        Buf::F(v) => Buf::F(order.map(|i| v[i]).collect()),
        Buf::I(v) => Buf::I(order.map(|i| v[i]).collect()),
    }
}

/// The coordinate `row`, `col` away from `at`.
pub(super) fn along(
    here: &mut [i64],
    at: &[i64],
    axes: (Option<usize>, Option<usize>),
    row: usize,
    col: usize,
) {
    here.copy_from_slice(at);
    for (axis, by) in [(axes.0, row), (axes.1, col)] {
        if let Some(x) = axis.and_then(|a| here.get_mut(a)) {
            *x += by as i64;
        }
    }
}
