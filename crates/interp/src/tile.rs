//! Runs a tile program on the CPU, element by element: the oracle of every tile target.
//!
//! [`run`] executes all blocks of the grid, in order. Values are whole tiles; a float tile is a
//! vector of `f64`, an integer or `bool` tile a vector of `i64`. [`Mode::Exact`] rounds each float
//! result to its tile's type, [`Mode::F64`] keeps it and rounds only when storing.
//!
//! Buffers are bytes in the layout of their parameter, exactly what compiled kernels get.
//!
//! To add an operation: an arm in `Machine::eval`, written so that it can be compared with the
//! sentence that documents the operation in `tilewright_tile`.

use crate::Mode;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{from_f64, from_i64, read_f64, read_i64};
use tilewright_expr::{Func, Value};
use tilewright_layout::{Dim, Env};
use tilewright_tile::{
    Block, Compare, Kernel, Operand, Param, ParamId, ReduceKind, Schedule, Stmt, TileId, TileOp,
};

/// The elements of a tile in row-major order.
#[derive(Clone, Debug)]
enum Data {
    Float(Vec<f64>),
    Int(Vec<i64>),
}

impl Data {
    fn get(&self, i: usize) -> Value {
        match self {
            Data::Float(v) => Value::Float(v[i]),
            Data::Int(v) => Value::Int(v[i]),
        }
    }
}

#[derive(Clone, Debug)]
struct Tile {
    shape: Vec<usize>,
    data: Data,
}

impl Tile {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Runs `kernel` over its whole grid.
///
/// `sizes` gives each size symbol of the kernel; `buffers` has the bytes of each parameter in
/// order. Errors when a size is missing, a buffer is too small for its layout, or an access leaves
/// its buffer (a bug of whoever made the kernel).
pub fn run(
    kernel: &Kernel,
    schedule: &Schedule,
    sizes: &Env,
    buffers: &mut [Vec<u8>],
    mode: Mode,
) -> Result<()> {
    let mut env = sizes.clone();
    for name in &kernel.tiles {
        let Some(&size) = schedule.tiles.get(name) else {
            return Err(Error::bug(format!("tile size {name} of {} has no value", kernel.name)));
        };
        env.insert(name.clone(), size);
    }
    if buffers.len() != kernel.params.len() {
        return Err(Error::bug(format!("{} buffers for {}", buffers.len(), kernel.name)));
    }
    let mut machine = Machine {
        kernel,
        env,
        tiles: BTreeMap::new(),
        buffers: RefCell::new(buffers),
        mode,
        params: Vec::new(),
    };
    for (_, param) in kernel.params.iter() {
        machine.params.push(Placed::new(param, &|d| machine.dim(d))?);
    }
    let extents = kernel.grid.iter().map(|g| machine.dim(&g.extent)).collect::<Result<Vec<_>>>()?;
    let blocks: i64 = extents.iter().map(|&e| e.max(0)).product();
    for block in 0..blocks {
        let mut rest = block;
        for (axis, extent) in kernel.grid.iter().zip(&extents).rev() {
            machine.env.insert(axis.name.clone(), rest % extent);
            rest /= extent;
        }
        machine.tiles.clear();
        machine.block(&kernel.body)?;
    }
    Ok(())
}

/// A parameter's layout in numbers.
pub(crate) struct Placed {
    pub(crate) dtype: DType,
    axes: Vec<PlacedAxis>,
    offset: i64,
}

struct PlacedAxis {
    extent: i64,
    stride: i64,
    block: Option<(i64, i64)>,
}

impl Placed {
    /// Evaluates a parameter's layout.
    pub(crate) fn new(param: &Param, eval: &dyn Fn(&Dim) -> Result<i64>) -> Result<Placed> {
        let axes = param
            .layout
            .axes
            .iter()
            .map(|a| {
                let block = match &a.block {
                    None => None,
                    Some(b) => Some((b.size, eval(&b.stride)?)),
                };
                Ok(PlacedAxis { extent: eval(&a.extent)?, stride: eval(&a.stride)?, block })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Placed { dtype: param.dtype, axes, offset: eval(&param.layout.offset)? })
    }

    /// Element offset of a coordinate, or `None` outside the shape.
    pub(crate) fn offset_of(&self, at: &[i64]) -> Option<i64> {
        let mut offset = self.offset;
        for (axis, &x) in self.axes.iter().zip(at) {
            if x < 0 || x >= axis.extent {
                return None;
            }
            offset += match axis.block {
                None => x * axis.stride,
                Some((size, inner)) => (x / size) * axis.stride + (x % size) * inner,
            };
        }
        Some(offset)
    }
}

struct Machine<'a, 'b> {
    kernel: &'a Kernel,
    env: Env,
    tiles: BTreeMap<TileId, Arc<Tile>>,
    buffers: RefCell<&'b mut [Vec<u8>]>,
    mode: Mode,
    params: Vec<Placed>,
}

/// Calls `f` with every coordinate below `shape`, row-major.
fn for_each(shape: &[usize], mut f: impl FnMut(&[usize]) -> Result<()>) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut at = vec![0usize; shape.len()];
    loop {
        f(&at)?;
        let mut axis = shape.len();
        loop {
            if axis == 0 {
                return Ok(());
            }
            axis -= 1;
            at[axis] += 1;
            if at[axis] < shape[axis] {
                break;
            }
            at[axis] = 0;
        }
    }
}

fn flat(at: &[usize], shape: &[usize]) -> usize {
    at.iter().zip(shape).fold(0, |acc, (&x, &d)| acc * d + x)
}

impl Machine<'_, '_> {
    fn dim(&self, dim: &Dim) -> Result<i64> {
        dim.eval(&self.env).ok_or_else(|| {
            Error::bug(format!("`{dim}` in kernel {} cannot be evaluated", self.kernel.name))
        })
    }

    fn dims(&self, dims: &[Dim]) -> Result<Vec<i64>> {
        dims.iter().map(|d| self.dim(d)).collect()
    }

    fn shape_of(&self, tile: TileId) -> Result<(DType, Vec<usize>)> {
        let ty = self.kernel.ty(tile);
        let shape = self.dims(&ty.shape)?.into_iter().map(|d| d.max(0) as usize).collect();
        Ok((ty.dtype, shape))
    }

    fn tile(&self, id: TileId) -> Result<Arc<Tile>> {
        self.tiles
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::bug(format!("tile {id} is read before it is made")))
    }

    /// Makes a tile by asking for each element; floats are rounded in exact mode.
    fn make(
        &self,
        dtype: DType,
        shape: Vec<usize>,
        mut element: impl FnMut(&[usize]) -> Result<Value>,
    ) -> Result<Tile> {
        let mut floats = Vec::new();
        let mut ints = Vec::new();
        for_each(&shape, |at| {
            match element(at)? {
                Value::Float(v) if dtype.is_float() => floats.push(self.round(dtype, v)),
                Value::Int(v) if !dtype.is_float() => ints.push(wrap(dtype, v)),
                other => return Err(Error::bug(format!("{other:?} in a {dtype} tile"))),
            }
            Ok(())
        })?;
        let data = if dtype.is_float() { Data::Float(floats) } else { Data::Int(ints) };
        Ok(Tile { shape, data })
    }

    fn round(&self, dtype: DType, value: f64) -> f64 {
        match (self.mode, dtype) {
            (Mode::F64, _) | (_, DType::F64) => value,
            (Mode::Exact, DType::F32) => f64::from(value as f32),
            (Mode::Exact, _) => {
                let mut bytes = [0u8; 8];
                from_f64(dtype, &mut bytes, 0, value);
                read_f64(dtype, &bytes, 0)
            }
        }
    }

    fn read(&self, param: ParamId, at: &[i64], fill: Value) -> Result<Value> {
        let placed = &self.params[param.index()];
        let Some(offset) = placed.offset_of(at) else { return Ok(fill) };
        let buffers = self.buffers.borrow();
        let bytes = &buffers[param.index()];
        self.check(param, offset, bytes.len())?;
        Ok(if placed.dtype.is_float() {
            Value::Float(read_f64(placed.dtype, bytes, offset as usize))
        } else {
            Value::Int(read_i64(placed.dtype, bytes, offset as usize))
        })
    }

    fn check(&self, param: ParamId, offset: i64, len: usize) -> Result<()> {
        let dtype = self.params[param.index()].dtype;
        let needed = usize::try_from(offset).ok().and_then(|o| dtype.bytes_for(o + 1));
        if needed.is_some_and(|n| n <= len) {
            return Ok(());
        }
        Err(Error::bug(format!(
            "kernel {}: element offset {offset} of {} is outside its {len} bytes",
            self.kernel.name, self.kernel.params[param].name
        )))
    }

    fn write(&self, param: ParamId, at: &[i64], value: Value, add: bool) -> Result<()> {
        let placed = &self.params[param.index()];
        let Some(offset) = placed.offset_of(at) else { return Ok(()) };
        let mut buffers = self.buffers.borrow_mut();
        let bytes = &mut buffers[param.index()];
        self.check(param, offset, bytes.len())?;
        let i = offset as usize;
        match value {
            Value::Float(v) => {
                let old = if add { read_f64(placed.dtype, bytes, i) } else { 0.0 };
                from_f64(placed.dtype, bytes, i, if add { old + v } else { v });
            }
            Value::Int(v) => {
                let old = if add { read_i64(placed.dtype, bytes, i) } else { 0 };
                from_i64(placed.dtype, bytes, i, old.wrapping_add(v));
            }
        }
        Ok(())
    }

    fn block(&mut self, block: &Block) -> Result<()> {
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(id, op) => {
                    let tile = self.eval(*id, op)?;
                    self.tiles.insert(*id, Arc::new(tile));
                }
                Stmt::Store { param, index, value } => self.store(*param, index, *value, false)?,
                Stmt::AtomicAdd { param, index, value } => {
                    self.store(*param, index, *value, true)?
                }
                Stmt::For(f) => {
                    let (lo, hi) = (self.dim(&f.lo)?, self.dim(&f.hi)?);
                    let mut carried = f
                        .carry
                        .iter()
                        .map(|(_, init)| self.tile(*init))
                        .collect::<Result<Vec<_>>>()?;
                    for i in lo..hi {
                        self.env.insert(f.var.clone(), i);
                        for ((inner, _), tile) in f.carry.iter().zip(&carried) {
                            self.tiles.insert(*inner, tile.clone());
                        }
                        self.block(&f.body)?;
                        carried =
                            f.yields.iter().map(|y| self.tile(*y)).collect::<Result<Vec<_>>>()?;
                    }
                    self.env.remove(&f.var);
                    for (result, tile) in f.results.iter().zip(carried) {
                        self.tiles.insert(*result, tile);
                    }
                }
                Stmt::If(branch) => {
                    let (a, b) = (self.dim(&branch.lhs)?, self.dim(&branch.rhs)?);
                    let holds = match branch.compare {
                        Compare::Lt => a < b,
                        Compare::Le => a <= b,
                        Compare::Eq => a == b,
                        Compare::Ne => a != b,
                    };
                    let (body, yields) = if holds {
                        (&branch.then, &branch.then_yields)
                    } else {
                        (&branch.otherwise, &branch.otherwise_yields)
                    };
                    self.block(body)?;
                    for (result, y) in branch.results.iter().zip(yields) {
                        let tile = self.tile(*y)?;
                        self.tiles.insert(*result, tile);
                    }
                }
            }
        }
        Ok(())
    }

    fn store(&self, param: ParamId, index: &[Dim], value: TileId, add: bool) -> Result<()> {
        let tile = self.tile(value)?;
        let base = self.dims(index)?;
        let (mut coord, mut next) = (base.clone(), 0);
        for_each(&tile.shape, |at| {
            coord.iter_mut().zip(&base).zip(at).for_each(|((c, b), &x)| *c = b + x as i64);
            next += 1;
            self.write(param, &coord, tile.data.get(next - 1), add)
        })
    }

    fn operand(&self, operand: &Operand) -> Result<(Arc<Tile>, Vec<usize>)> {
        Ok((self.tile(operand.tile)?, operand.along.clone()))
    }

    fn limit(&self, limit: &Option<Dim>, extent: usize) -> Result<usize> {
        match limit {
            None => Ok(extent),
            Some(limit) => Ok(self.dim(limit)?.clamp(0, extent as i64) as usize),
        }
    }

    fn eval(&self, id: TileId, op: &TileOp) -> Result<Tile> {
        let (dtype, shape) = self.shape_of(id)?;
        match op {
            TileOp::Full(value) => self.make(dtype, shape, |_| Ok(*value)),
            TileOp::Load { param, index, steps, fill } => {
                let base = self.dims(index)?;
                let mut coord = base.clone();
                self.make(dtype, shape, |at| {
                    let from = base.iter().zip(steps).zip(at);
                    for (c, ((b, step), &x)) in coord.iter_mut().zip(from) {
                        *c = b + step * x as i64;
                    }
                    self.read(*param, &coord, *fill)
                })
            }
            TileOp::Gather { param, axis, rows, index, fill } => {
                let base = self.dims(index)?;
                let rows = self.tile(*rows)?;
                self.make(dtype, shape, |at| {
                    let mut coord: Vec<i64> =
                        base.iter().zip(at).map(|(b, &x)| b + x as i64).collect();
                    let Value::Int(row) = rows.data.get(at[*axis]) else {
                        return Err(Error::bug("gather rows are not integers"));
                    };
                    coord[*axis] = base[*axis].wrapping_add(row);
                    self.read(*param, &coord, *fill)
                })
            }
            TileOp::Map { func, args } => {
                let args = args.iter().map(|a| self.operand(a)).collect::<Result<Vec<_>>>()?;
                let args: Vec<Data> =
                    args.iter().map(|(tile, along)| repeated(tile, along, &shape)).collect();
                let count = shape.iter().product();
                let mut values = self.call(func, &args, count).into_iter();
                self.make(dtype, shape, |_| {
                    values.next().ok_or_else(|| Error::bug("a function of fewer elements"))
                })
            }
            TileOp::Reduce { kind, x, axis, limit } => {
                let x = self.tile(*x)?;
                let count = self.limit(limit, x.shape[*axis])?;
                let line = Line::of(&x.shape, *axis);
                self.make(dtype, shape, |at| {
                    let mut total = identity(*kind, dtype);
                    let first = line.first(at);
                    for i in 0..count {
                        let value = x.data.get(first + i * line.step);
                        total = self.combine(*kind, dtype, total, value);
                    }
                    Ok(total)
                })
            }
            TileOp::ArgReduce { kind, x, axis, limit, last } => {
                let x = self.tile(*x)?;
                let count = self.limit(limit, x.shape[*axis])?;
                let line = Line::of(&x.shape, *axis);
                self.make(dtype, shape, |at| {
                    let first = line.first(at);
                    let value = |i: usize| x.data.get(first + i * line.step);
                    let mut best = 0;
                    for i in 1..count {
                        let (new, old) = (value(i), value(best));
                        if beats(*kind, new, old) || (*last && !beats(*kind, old, new)) {
                            best = i;
                        }
                    }
                    Ok(Value::Int(best as i64))
                })
            }
            TileOp::Scan { kind, x, axis, exclusive, reverse } => {
                let x = self.tile(*x)?;
                let extent = x.shape[*axis];
                let step = Line::of(&x.shape, *axis).step;
                self.make(dtype, shape, |at| {
                    let mut total = identity(*kind, dtype);
                    let here = at[*axis];
                    let first = flat(at, &x.shape) - here * step;
                    let (count, skipped) =
                        (if *reverse { extent - here } else { here + 1 }, *exclusive);
                    for i in 0..count - usize::from(skipped) {
                        let i = if *reverse { extent - 1 - i } else { i };
                        total = self.combine(*kind, dtype, total, x.data.get(first + i * step));
                    }
                    Ok(total)
                })
            }
            TileOp::Mma { acc, a, b, limit } => {
                let (acc, a, b) = (self.tile(*acc)?, self.tile(*a)?, self.tile(*b)?);
                let count = self.limit(limit, a.shape[1])?;
                let (depth, cols) = (a.shape[1], b.shape[1]);
                self.make(dtype, shape, |at| {
                    let start = flat(at, &acc.shape);
                    let pairs = (0..count).map(|k| (at[0] * depth + k, k * cols + at[1]));
                    Ok(match (&acc.data, &a.data, &b.data) {
                        (Data::Float(acc), Data::Float(a), Data::Float(b)) => {
                            let add = |t: f64, (x, y)| self.round(dtype, t + a[x] * b[y]);
                            Value::Float(pairs.fold(acc[start], add))
                        }
                        (Data::Float(acc), Data::Float(a), Data::Int(b)) => {
                            let add = |t: f64, (x, y)| self.round(dtype, t + a[x] * b[y] as f64);
                            Value::Float(pairs.fold(acc[start], add))
                        }
                        (Data::Int(acc), Data::Int(a), Data::Int(b)) => {
                            let add = |t: i64, (x, y): (usize, usize)| {
                                wrap(dtype, t.wrapping_add(a[x].wrapping_mul(b[y])))
                            };
                            Value::Int(pairs.fold(acc[start], add))
                        }
                        _ => return Err(Error::bug("mma mixes integers and floats")),
                    })
                })
            }
            TileOp::Permute { x, perm } => {
                let x = self.tile(*x)?;
                let mut from = vec![0; shape.len()];
                self.make(dtype, shape, |at| {
                    for (i, &p) in perm.iter().enumerate() {
                        from[p] = at[i];
                    }
                    Ok(x.data.get(flat(&from, &x.shape)))
                })
            }
            TileOp::Reshape(x) => {
                let x = self.tile(*x)?;
                if x.len() != shape.iter().product::<usize>() {
                    return Err(Error::bug(format!("reshape of {:?} to {shape:?}", x.shape)));
                }
                Ok(Tile { shape, data: x.data.clone() })
            }
            TileOp::Broadcast(operand) => {
                let (x, along) = self.operand(operand)?;
                let data = repeated(&x, &along, &shape);
                Ok(Tile { shape, data })
            }
            TileOp::Iota { axis, start } => {
                let start = self.dim(start)?;
                self.make(dtype, shape, |at| {
                    let value = start + at[*axis] as i64;
                    Ok(if dtype.is_float() {
                        Value::Float(value as f64)
                    } else {
                        Value::Int(value)
                    })
                })
            }
            TileOp::Random { seed, start } => {
                let start = self.dim(start)?;
                let target = shape.clone();
                self.make(dtype, shape, |at| {
                    let counter = (start as u64).wrapping_add(flat(at, &target) as u64);
                    Ok(Value::Float(crate::ops::random::element(dtype, *seed, counter)?))
                })
            }
        }
    }

    /// A function of `count` elements at a time.
    fn call(&self, func: &Func, args: &[Data], count: usize) -> Vec<Value> {
        let float = func.dtype().is_float() || args.iter().any(|a| matches!(a, Data::Float(_)));
        if self.mode == Mode::F64 && float {
            let args: Vec<Vec<f64>> = args
                .iter()
                .map(|a| match a {
                    Data::Float(v) => v.clone(),
                    Data::Int(v) => v.iter().map(|&v| v as f64).collect(),
                })
                .collect();
            let slices: Vec<&[f64]> = args.iter().map(Vec::as_slice).collect();
            let mut out = vec![0.0; count];
            func.eval_f64_many(&slices, &mut out);
            return match func.dtype().is_float() {
                true => out.into_iter().map(Value::Float).collect(),
                false => out.into_iter().map(|v| Value::Int(v as i64)).collect(),
            };
        }
        // In F64: integers through and through, exact in 64 bits.
        let args: Vec<Vec<Value>> = args
            .iter()
            .map(|a| match a {
                Data::Float(v) => v.iter().map(|&v| Value::Float(v)).collect(),
                Data::Int(v) => v.iter().map(|&v| Value::Int(v)).collect(),
            })
            .collect();
        let slices: Vec<&[Value]> = args.iter().map(Vec::as_slice).collect();
        let mut out = vec![Value::Int(0); count];
        func.eval_many(&slices, &mut out);
        out
    }

    fn combine(&self, kind: ReduceKind, dtype: DType, a: Value, b: Value) -> Value {
        match (a, b) {
            (Value::Float(x), Value::Float(y)) => Value::Float(self.round(
                dtype,
                match kind {
                    ReduceKind::Sum => x + y,
                    ReduceKind::Prod => x * y,
                    ReduceKind::Max if x.is_nan() || y.is_nan() => f64::NAN,
                    ReduceKind::Min if x.is_nan() || y.is_nan() => f64::NAN,
                    ReduceKind::Max => x.max(y),
                    ReduceKind::Min => x.min(y),
                },
            )),
            (Value::Int(x), Value::Int(y)) => Value::Int(wrap(
                dtype,
                match kind {
                    ReduceKind::Sum => x.wrapping_add(y),
                    ReduceKind::Prod => x.wrapping_mul(y),
                    ReduceKind::Max if dtype == DType::U64 => (x as u64).max(y as u64) as i64,
                    ReduceKind::Min if dtype == DType::U64 => (x as u64).min(y as u64) as i64,
                    ReduceKind::Max => x.max(y),
                    ReduceKind::Min => x.min(y),
                },
            )),
            _ => unreachable!("tiles hold one kind of value"),
        }
    }
}

/// The elements along one axis of a row-major shape.
struct Line<'a> {
    shape: &'a [usize],
    axis: usize,
    /// Distance between neighbours.
    step: usize,
}

impl Line<'_> {
    fn of(shape: &[usize], axis: usize) -> Line<'_> {
        Line { shape, axis, step: shape[axis + 1..].iter().product() }
    }

    /// Where the line begins that stands at `at` on the other axes.
    fn first(&self, at: &[usize]) -> usize {
        let before = flat(&at[..self.axis], &self.shape[..self.axis]) * self.shape[self.axis];
        let after = flat(&at[self.axis..], &self.shape[self.axis + 1..]);
        before * self.step + after
    }
}

/// A tile over `shape`, along whose axes `along` its own axes run.
fn repeated(tile: &Tile, along: &[usize], shape: &[usize]) -> Data {
    if tile.shape == shape && along.iter().copied().eq(0..shape.len()) {
        return tile.data.clone();
    }
    let mut places = Vec::with_capacity(shape.iter().product());
    let found = for_each(shape, |at| {
        let axes = along.iter().zip(&tile.shape);
        places.push(axes.fold(0, |i, (&axis, &d)| i * d + if d == 1 { 0 } else { at[axis] }));
        Ok(())
    });
    debug_assert!(found.is_ok(), "nothing above fails");
    match &tile.data {
        Data::Float(v) => Data::Float(places.iter().map(|&i| v[i]).collect()),
        Data::Int(v) => Data::Int(places.iter().map(|&i| v[i]).collect()),
    }
}

pub(crate) fn beats(kind: ReduceKind, new: Value, old: Value) -> bool {
    match (new, old) {
        (Value::Float(n), Value::Float(o)) => match (n.is_nan(), o.is_nan()) {
            (true, false) => true,
            (_, true) => false,
            _ if kind == ReduceKind::Max => n > o,
            _ => n < o,
        },
        (Value::Int(n), Value::Int(o)) => {
            if kind == ReduceKind::Max {
                n > o
            } else {
                n < o
            }
        }
        _ => false,
    }
}

/// What a reduction of nothing gives.
pub(crate) fn identity(kind: ReduceKind, dtype: DType) -> Value {
    let bits = dtype.bits();
    let (low, high) = match (dtype.is_signed_int(), dtype) {
        (true, _) => (i64::MIN >> (64 - bits), i64::MAX >> (64 - bits)),
        (false, DType::Bool) => (0, 1),
        (false, DType::U64) => (0, -1),
        (false, _) => (0, ((1u64 << (bits % 64)) - 1) as i64),
    };
    match (kind, dtype.is_float()) {
        (ReduceKind::Sum, true) => Value::Float(0.0),
        (ReduceKind::Prod, true) => Value::Float(1.0),
        (ReduceKind::Max, true) => Value::Float(f64::NEG_INFINITY),
        (ReduceKind::Min, true) => Value::Float(f64::INFINITY),
        (ReduceKind::Sum, false) => Value::Int(0),
        (ReduceKind::Prod, false) => Value::Int(1),
        (ReduceKind::Max, false) => Value::Int(low),
        (ReduceKind::Min, false) => Value::Int(high),
    }
}

fn wrap(dtype: DType, value: i64) -> i64 {
    let mut bytes = [0u8; 8];
    from_i64(dtype, &mut bytes, 0, value);
    read_i64(dtype, &bytes, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_layout::{Layout, Range, Symbol};
    use tilewright_tile::{Access, KernelBuilder, TileType};

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
    }

    /// relu(A B + bias) with partial tiles on every side, against three plain loops.
    #[test]
    fn a_matrix_product_with_partial_tiles() {
        let (m, n, k) = (5usize, 7usize, 6usize);
        let mut b = KernelBuilder::new("linear_relu");
        for name in ["M", "N", "K"] {
            b.symbol(Symbol { name: name.into(), range: Range { min: 0, max: 100 } });
        }
        let [sm, sn, sk] = ["M", "N", "K"].map(Dim::sym);
        let [bm, bn, bk] = ["BM", "BN", "BK"].map(|t| b.tile(t));
        let pm = b.grid("pm", sm.ceil_div(&bm));
        let pn = b.grid("pn", sn.ceil_div(&bn));
        let row = |x: &Dim, y: &Dim| Layout::row_major(&[x.clone(), y.clone()]);
        let pa = b.param("A", DType::F32, row(&sm, &sk), Access::In);
        let pb = b.param("B", DType::F32, row(&sk, &sn), Access::In);
        let pv =
            b.param("bias", DType::F32, Layout::row_major(std::slice::from_ref(&sn)), Access::In);
        let pc = b.param("C", DType::F32, row(&sm, &sn), Access::Out);
        let zero = b.full(Value::Float(0.0), TileType::new(DType::F32, [bm.clone(), bn.clone()]));
        let (i, carried) = b.begin_for("i", Dim::new(0), sk.ceil_div(&bk), &[zero]);
        let ta = b.load(pa, vec![&pm * &bm, &i * &bk], vec![bm.clone(), bk.clone()]);
        let tb = b.load(pb, vec![&i * &bk, &pn * &bn], vec![bk.clone(), bn.clone()]);
        let d = b.mma(carried[0], ta, tb, Some(&sk - &i * &bk));
        let acc = b.end_for(&[d])[0];
        let v = b.load(pv, vec![&pn * &bn], vec![bn.clone()]);
        let func = Func::parse("{ x, b -> max(x + b, 0) }", &[DType::F32, DType::F32]).unwrap();
        let args = vec![b.plain(acc), Operand { tile: v, along: vec![1] }];
        let r = b.map(func, args, vec![bm.clone(), bn.clone()]);
        b.store(pc, vec![&pm * &bm, &pn * &bn], r);
        let kernel = b.finish();

        let values =
            |n: usize, f: f32| (0..n).map(|i| ((i as f32) * f).sin()).collect::<Vec<f32>>();
        let (a, w, bias) = (values(m * k, 1.1), values(k * n, 0.7), values(n, 0.3));
        let mut schedule = Schedule::default();
        for (name, size) in [("BM", 2), ("BN", 4), ("BK", 4)] {
            schedule.tiles.insert(name.into(), size);
        }
        let sizes: Env =
            [("M", m), ("N", n), ("K", k)].map(|(s, v)| (Arc::from(s), v as i64)).into();
        let mut buffers = vec![bytes(&a), bytes(&w), bytes(&bias), vec![0u8; m * n * 4]];
        run(&kernel, &schedule, &sizes, &mut buffers, Mode::F64).unwrap();
        let got = floats(&buffers[3]);
        for i in 0..m {
            for j in 0..n {
                let sum: f64 =
                    (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(w[x * n + j])).sum();
                let want = (sum + f64::from(bias[j])).max(0.0) as f32;
                assert_eq!(got[i * n + j], want, "at {i},{j}");
            }
        }
        // A buffer that is too small is an error, not a panic.
        buffers[0].truncate(8);
        assert!(run(&kernel, &schedule, &sizes, &mut buffers, Mode::F64).is_err());
    }
}
