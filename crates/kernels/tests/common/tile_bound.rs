//! How far results of a tile program may be from float64, element by element: a running error analysis, as
//! `testkit::bound` makes it of graphs.
//!
//! Next to every value goes a bound of its error. A map moves its operands by their bounds, node by node, and adds
//! the roundings of each node in its type; sums add the bounds of their terms and the roundings of their number;
//! moves move. What depends on an open comparison has no bound: infinity, nothing is compared.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::Value;
use tilewright_layout::{Dim, Env};
use tilewright_testkit::bound::{map_errors, roundings};
use tilewright_testkit::budget::{smallest_normal, unit_roundoff};
use tilewright_tile::{
    Block, Compare, Kernel, Operand, ParamId, ReduceKind, Schedule, Stmt, TileId, TileOp,
};

/// A number and a bound of its error.
pub(crate) type Bounded = (f64, f64);

#[derive(Clone)]
struct Tile {
    shape: Vec<usize>,
    dtype: DType,
    of: Vec<Bounded>,
}

struct Machine<'a> {
    kernel: &'a Kernel,
    env: Env,
    tiles: BTreeMap<TileId, Arc<Tile>>,
    memory: Vec<Vec<Bounded>>,
}

/// Runs a program without products over its whole grid: for each parameter, every element of its buffer with its bound.
/// None for programs with random numbers.
pub(crate) fn bounds(
    kernel: &Kernel,
    planned: &Schedule,
    env: &Env,
    buffers: &[Vec<u8>],
) -> Option<Vec<Vec<Bounded>>> {
    let mut env = env.clone();
    for name in &kernel.tiles {
        env.insert(name.clone(), planned.tiles[name]);
    }
    let memory = kernel
        .params
        .iter()
        .zip(buffers)
        .map(|((_, p), bytes)| {
            let count = bytes.len() * 8 / p.dtype.bits() as usize;
            let read = |i: usize| match p.dtype.is_float() {
                true => tilewright_data::read_f64(p.dtype, bytes, i),
                false => tilewright_data::read_i64(p.dtype, bytes, i) as f64,
            };
            (0..count).map(|i| (read(i), 0.0)).collect()
        })
        .collect();
    let mut machine = Machine { kernel, env, tiles: BTreeMap::new(), memory };
    let extents: Vec<i64> = kernel.grid.iter().map(|g| machine.dim(&g.extent)).collect();
    for block in 0..extents.iter().map(|e| (*e).max(0)).product::<i64>() {
        let mut rest = block;
        for (axis, extent) in kernel.grid.iter().zip(&extents).rev() {
            machine.env.insert(axis.name.clone(), rest % extent);
            rest /= extent;
        }
        machine.tiles.clear();
        machine.block(&kernel.body)?;
    }
    Some(machine.memory)
}

/// The first element of the results that is further from its value than its bound.
pub(crate) fn beyond(kernel: &Kernel, got: &[Vec<u8>], bounds: &[Vec<Bounded>]) -> Option<String> {
    for ((_, param), (bytes, bounds)) in kernel.params.iter().zip(got.iter().zip(bounds)) {
        for (i, (want, error)) in bounds.iter().enumerate() {
            let value = match param.dtype.is_float() {
                true => tilewright_data::read_f64(param.dtype, bytes, i),
                false => tilewright_data::read_i64(param.dtype, bytes, i) as f64,
            };
            let same = value == *want || (value.is_nan() && want.is_nan());
            let open = error.is_infinite() || error.is_nan();
            // Beyond the type's range there is infinity.
            let large = value.is_infinite() && want.abs() > 0.99 * largest(param.dtype);
            if !(same || open || large || (value - want).abs() <= *error) {
                let name = &param.name;
                return Some(format!("{name} at {i} is {value}, not {want} within {error:.2e}"));
            }
        }
    }
    None
}

fn largest(dtype: DType) -> f64 {
    tilewright_testkit::budget::largest(dtype)
}

/// Calls `f` with every coordinate below `shape`, row-major.
fn coordinates(shape: &[usize]) -> Vec<Vec<usize>> {
    let mut out = vec![Vec::new()];
    for &extent in shape {
        let longer = |at: &Vec<usize>| {
            let at = at.clone();
            (0..extent).map(move |i| [at.as_slice(), &[i]].concat())
        };
        out = out.iter().flat_map(longer).collect();
    }
    out
}

fn flat(at: &[usize], shape: &[usize]) -> usize {
    at.iter().zip(shape).fold(0, |sum, (x, extent)| sum * extent + x)
}

/// Where an operand along some axes of a tile has the element of a coordinate.
fn along(at: &[usize], axes: &[usize], shape: &[usize]) -> usize {
    axes.iter()
        .zip(shape)
        .fold(0, |sum, (axis, extent)| sum * extent + if *extent == 1 { 0 } else { at[*axis] })
}

/// Terms of a reduction or a scan, as one.
fn reduced(kind: ReduceKind, dtype: DType, terms: &[Bounded]) -> Bounded {
    let u = unit_roundoff(dtype) * roundings(terms.len() as f64);
    let size = |t: &Bounded| if t.0.is_finite() { t.0.abs() } else { 0.0 };
    let widest = terms.iter().map(|t| t.1).fold(0.0, f64::max);
    let nan = terms.iter().any(|t| t.0.is_nan());
    match kind {
        ReduceKind::Sum => {
            let sizes: f64 = terms.iter().map(size).sum();
            let errors: f64 = terms.iter().map(|t| t.1).sum();
            (terms.iter().map(|t| t.0).sum(), errors + u * sizes)
        }
        ReduceKind::Prod => {
            let sizes: f64 = terms.iter().map(size).product();
            let grown: f64 = terms.iter().map(|t| size(t) + t.1).product();
            (terms.iter().map(|t| t.0).product(), grown - sizes + 2.0 * u * grown)
        }
        ReduceKind::Max | ReduceKind::Min if nan => (f64::NAN, widest),
        ReduceKind::Max => (terms.iter().map(|t| t.0).fold(f64::NEG_INFINITY, f64::max), widest),
        ReduceKind::Min => (terms.iter().map(|t| t.0).fold(f64::INFINITY, f64::min), widest),
    }
}

/// The first (or last) place of the extreme; open when others come near it.
fn extreme(kind: ReduceKind, last: bool, terms: &[Bounded]) -> Bounded {
    let beats = |a: f64, b: f64| match (a.is_nan(), b.is_nan()) {
        (true, false) => true,
        (_, true) => false,
        _ if kind == ReduceKind::Max => a > b,
        _ => a < b,
    };
    let mut best = 0;
    for i in 1..terms.len() {
        let (new, old) = (terms[i].0, terms[best].0);
        if beats(new, old) || (last && !beats(old, new)) {
            best = i;
        }
    }
    let (top, error) = terms[best];
    let near = |t: &Bounded| t.1 + error > 0.0 && (t.0 - top).abs() <= t.1 + error;
    let open = terms.iter().enumerate().any(|(i, t)| i != best && near(t));
    (best as f64, if open { f64::INFINITY } else { 0.0 })
}

impl Machine<'_> {
    fn dim(&self, dim: &Dim) -> i64 {
        dim.eval(&self.env).unwrap_or_else(|| panic!("{dim} has no value"))
    }

    fn tile(&self, id: TileId) -> Arc<Tile> {
        self.tiles[&id].clone()
    }

    fn make(&self, id: TileId, of: impl FnMut(Vec<usize>) -> Bounded) -> Tile {
        let ty = self.kernel.ty(id);
        let shape: Vec<usize> = ty.shape.iter().map(|d| self.dim(d).max(0) as usize).collect();
        let of = coordinates(&shape).into_iter().map(of).collect();
        Tile { shape, dtype: ty.dtype, of }
    }

    fn place(&self, param: ParamId, at: &[i64]) -> Option<usize> {
        let layout = &self.kernel.params[param].layout;
        let mut offset = self.dim(&layout.offset);
        for (axis, &x) in layout.axes.iter().zip(at) {
            if x < 0 || x >= self.dim(&axis.extent) {
                return None;
            }
            let stride = self.dim(&axis.stride);
            offset += match &axis.block {
                None => x * stride,
                Some(b) => (x / b.size) * stride + (x % b.size) * self.dim(&b.stride),
            };
        }
        Some(offset as usize)
    }

    fn read(&self, param: ParamId, at: &[i64], fill: Value) -> Bounded {
        match self.place(param, at) {
            Some(i) => self.memory[param.index()][i],
            None => (number(fill), 0.0),
        }
    }

    fn block(&mut self, block: &Block) -> Option<()> {
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(id, op) => {
                    let tile = self.eval(*id, op)?;
                    self.tiles.insert(*id, Arc::new(tile));
                }
                Stmt::Store { param, index, value } => self.store(*param, index, *value, false),
                Stmt::AtomicAdd { param, index, value } => self.store(*param, index, *value, true),
                Stmt::For(f) => {
                    let (lo, hi) = (self.dim(&f.lo), self.dim(&f.hi));
                    let mut carried: Vec<_> =
                        f.carry.iter().map(|(_, init)| self.tile(*init)).collect();
                    for i in lo..hi {
                        self.env.insert(f.var.clone(), i);
                        for ((inner, _), tile) in f.carry.iter().zip(&carried) {
                            self.tiles.insert(*inner, tile.clone());
                        }
                        self.block(&f.body)?;
                        carried = f.yields.iter().map(|y| self.tile(*y)).collect();
                    }
                    self.env.remove(&f.var);
                    for (result, tile) in f.results.iter().zip(carried) {
                        self.tiles.insert(*result, tile);
                    }
                }
                Stmt::If(branch) => {
                    let (a, b) = (self.dim(&branch.lhs), self.dim(&branch.rhs));
                    let holds = match branch.compare {
                        Compare::Lt => a < b,
                        Compare::Le => a <= b,
                        Compare::Eq => a == b,
                        Compare::Ne => a != b,
                    };
                    let (body, yields) = match holds {
                        true => (&branch.then, &branch.then_yields),
                        false => (&branch.otherwise, &branch.otherwise_yields),
                    };
                    self.block(body)?;
                    for (result, y) in branch.results.iter().zip(yields) {
                        let tile = self.tile(*y);
                        self.tiles.insert(*result, tile);
                    }
                }
            }
        }
        Some(())
    }

    /// Rounded once more, to the type of the tensor.
    fn store(&mut self, param: ParamId, index: &[Dim], value: TileId, add: bool) {
        let tile = self.tile(value);
        let base: Vec<i64> = index.iter().map(|d| self.dim(d)).collect();
        let dtype = self.kernel.params[param].dtype;
        let u = if dtype.is_float() { unit_roundoff(dtype) } else { 0.0 };
        let tiny = if u > 0.0 { smallest_normal(dtype) } else { 0.0 };
        for (at, (v, e)) in coordinates(&tile.shape).into_iter().zip(&tile.of) {
            let at: Vec<i64> = base.iter().zip(at).map(|(b, x)| b + x as i64).collect();
            let Some(i) = self.place(param, &at) else { continue };
            let old = if add { self.memory[param.index()][i] } else { (0.0, 0.0) };
            let sum = old.0 + v;
            let size = if sum.is_finite() { old.0.abs() + v.abs() } else { 0.0 };
            self.memory[param.index()][i] = (sum, old.1 + e + u * size + tiny);
        }
    }

    fn operand(&self, operand: &Operand, at: &[usize]) -> Bounded {
        let tile = &self.tiles[&operand.tile];
        tile.of[along(at, &operand.along, &tile.shape)]
    }

    fn eval(&self, id: TileId, op: &TileOp) -> Option<Tile> {
        let dims = |list: &[Dim]| list.iter().map(|d| self.dim(d)).collect::<Vec<i64>>();
        let dtype = self.kernel.ty(id).dtype;
        Some(match op {
            TileOp::Full(value) => self.make(id, |_| (number(*value), 0.0)),
            TileOp::Load { param, index, steps, fill } => {
                let base = dims(index);
                self.make(id, |at| {
                    let place = base.iter().zip(steps).zip(&at);
                    let place: Vec<i64> = place.map(|((b, s), x)| b + s * *x as i64).collect();
                    self.read(*param, &place, *fill)
                })
            }
            TileOp::Gather { param, axis, rows, index, fill } => {
                let (base, rows) = (dims(index), self.tile(*rows));
                self.make(id, |at| {
                    let mut place: Vec<i64> =
                        base.iter().zip(&at).map(|(b, x)| b + *x as i64).collect();
                    let row = rows.of[at[*axis]];
                    place[*axis] = base[*axis] + row.0 as i64;
                    let (v, e) = self.read(*param, &place, *fill);
                    (v, if row.1 > 0.0 { f64::INFINITY } else { e })
                })
            }
            TileOp::Map { func, args } => {
                let shape = self.make(id, |_| (0.0, 0.0)).shape;
                let all = coordinates(&shape);
                let given: Vec<Vec<Bounded>> = args
                    .iter()
                    .map(|a| all.iter().map(|at| self.operand(a, at)).collect())
                    .collect();
                let count = all.len();
                let tensors: Vec<Tensor> = given
                    .iter()
                    .zip(args)
                    .map(|(list, arg)| {
                        let values: Vec<f64> = list.iter().map(|b| b.0).collect();
                        let float = self.tiles[&arg.tile].dtype.is_float();
                        let dtype = if float { DType::F64 } else { DType::I64 };
                        Tensor::from_f64s(dtype, &[count], &values).ok()
                    })
                    .collect::<Option<_>>()?;
                let errors: Vec<Vec<f64>> =
                    given.iter().map(|list| list.iter().map(|b| b.1).collect()).collect();
                let of = map_errors(func, &tensors, &errors, count);
                Tile { shape, dtype, of }
            }
            TileOp::Reduce { kind, x, axis, limit } => {
                let x = self.tile(*x);
                let count = self.count(limit.as_ref(), x.shape[*axis]);
                self.make(id, |at| reduced(*kind, dtype, &line(&x, &at, *axis, 0..count)))
            }
            TileOp::ArgReduce { kind, x, axis, limit, last } => {
                let x = self.tile(*x);
                let count = self.count(limit.as_ref(), x.shape[*axis]);
                self.make(id, |at| extreme(*kind, *last, &line(&x, &at, *axis, 0..count)))
            }
            TileOp::Scan { kind, x, axis, exclusive, reverse } => {
                let x = self.tile(*x);
                let own = usize::from(!exclusive);
                self.make(id, |at| {
                    let here = at[*axis];
                    let range = match reverse {
                        false => 0..here + own,
                        true => here + 1 - own..x.shape[*axis],
                    };
                    let mut others = at.clone();
                    others.remove(*axis);
                    let terms = line(&x, &others, *axis, range);
                    match terms.is_empty() {
                        true => (number(empty(*kind, dtype)), 0.0),
                        false => reduced(*kind, dtype, &terms),
                    }
                })
            }
            TileOp::Permute { x, perm } => {
                let x = self.tile(*x);
                self.make(id, |at| {
                    let mut from = vec![0; at.len()];
                    perm.iter().enumerate().for_each(|(i, &p)| from[p] = at[i]);
                    x.of[flat(&from, &x.shape)]
                })
            }
            TileOp::Reshape(x) => {
                let x = self.tile(*x);
                let mut next = x.of.iter();
                self.make(id, |_| next.next().copied().unwrap_or((0.0, 0.0)))
            }
            TileOp::Broadcast(operand) => self.make(id, |at| self.operand(operand, &at)),
            TileOp::Iota { axis, start } => {
                let start = self.dim(start);
                self.make(id, |at| ((start + at[*axis] as i64) as f64, 0.0))
            }
            TileOp::Random { .. } | TileOp::Mma { .. } => return None,
        })
    }

    fn count(&self, limit: Option<&Dim>, extent: usize) -> usize {
        limit.map_or(extent, |l| self.dim(l).clamp(0, extent as i64) as usize)
    }
}

/// What a scan of nothing gives.
fn empty(kind: ReduceKind, dtype: DType) -> Value {
    let (low, high) = match dtype.is_float() {
        true => (f64::NEG_INFINITY, f64::INFINITY),
        false => (f64::from(i32::MIN), f64::from(i32::MAX)),
    };
    Value::Float(match kind {
        ReduceKind::Sum => 0.0,
        ReduceKind::Prod => 1.0,
        ReduceKind::Max => low,
        ReduceKind::Min => high,
    })
}

fn number(value: Value) -> f64 {
    match value {
        Value::Float(x) => x,
        Value::Int(x) => x as f64,
    }
}

/// Elements of a tile along an axis, at the coordinate of the other axes.
fn line(x: &Tile, at: &[usize], axis: usize, range: std::ops::Range<usize>) -> Vec<Bounded> {
    range
        .map(|i| {
            let mut full = at.to_vec();
            full.insert(axis, i);
            x.of[flat(&full, &x.shape)]
        })
        .collect()
}
