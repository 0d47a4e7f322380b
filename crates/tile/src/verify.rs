//! The verifier: every promise of the IR, checked; all violations are reported at once.
//!
//! A kernel is well-formed when
//!
//! 1. its name, and the names of parameters, sizes, tile sizes, grid indices, loop variables and
//!    named tiles, are identifiers (a letter or `_`, then letters, digits, `_` and `.`, no `..`);
//!    integers have distinct names (loops that do not enclose each other may share one), and so have
//!    parameters and tiles; ranges are not empty; no tile size is called like a knob; bounds are of
//!    tile sizes, in their order, and positive;
//! 2. integer expressions only name what is in scope: layouts of parameters the sizes, extents of
//!    the grid the sizes and tile sizes, shapes of tiles the tile sizes, everything else also the
//!    grid indices and the variables of enclosing loops; no extent is a negative number, blocks of a
//!    layout have at least one element;
//! 3. every tile is defined at most once, and before it is read; what a loop body or a branch
//!    defines is not read outside;
//! 4. parameters are only loaded from unless `out`, only stored to when `out` or `inout`, only added
//!    to when `inout`; indices, steps, the tile and the parameter have the same rank and, but for
//!    the index, element type; fill values and constants fit their type;
//! 5. a map has an operand of the right type for each parameter of its function, and the function's
//!    result is the tile's type; the axes of an operand (of a map, of a broadcast) ascend, are axes
//!    of the result, and have its extent or 1;
//! 6. reductions and scans have an axis of their operand, and the type that follows (positions are
//!    `i64`, of `max` or `min`); `iota` has an axis of its result and is not `bool`;
//! 7. `mma` is `[M,N] + [M,K] * [K,N]`, all floats or all integers, and its accumulator is at least
//!    as wide as both factors;
//! 8. a permutation has each axis once; a reshape keeps the number of elements; neither changes the
//!    element type; random numbers are floats; gathered rows are integers of rank 1, as many as the
//!    result has along the axis;
//! 9. a loop carries, yields and results in tiles of the same types, one for one; both branches of
//!    an `if` yield the types of its results.
//!
//! A schedule is legal for a kernel when it has a positive size for each tile size and for nothing
//! else, which the kernel's bounds allow, under which every tile has elements and every reshape keeps their number; vectors have 256
//! or 512 bits; the other knobs are at least 1; and the accumulators of the matrix micro-kernel,
//! a row of vectors and one more fit the registers (16 of 256 bits, 32 of 512). A matrix unit other
//! than `fma` goes with vectors of 512 bits; for `bf16tile` results and operands fit 8 tiles of 16 rows.
//!
//! To add a rule: a sentence above, its check here, and a row in the table of `tests/verify.rs`.

use crate::ir::*;
use crate::print::tile_names;
use crate::schedule::{MatrixUnit, Schedule};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Value;
use tilewright_layout::{Dim, Env, numel};

/// Knobs that stand beside tile sizes in the text form of a schedule.
const KNOBS: [&str; 8] = ["vector", "mma", "unroll", "chains", "stream", "ahead", "jam", "unit"];

/// Checks every promise in the module's head. The error is our bug (kernels are made by lowering)
/// and notes every violation.
pub fn verify(kernel: &Kernel) -> Result<()> {
    let mut checker = Checker {
        kernel,
        names: tile_names(kernel),
        found: Vec::new(),
        integers: BTreeSet::new(),
        tile_sizes: kernel.tiles.iter().cloned().collect(),
        defined: BTreeSet::new(),
        visible: BTreeSet::new(),
    };
    checker.header();
    checker.tile_types();
    checker.block(&kernel.body);
    let what = format!("kernel `{}` is not well-formed", kernel.name);
    report(what, checker.found)
}

/// Checks that `schedule` is legal for `kernel`, which is well-formed; see the module's head.
pub fn verify_schedule(kernel: &Kernel, schedule: &Schedule) -> Result<()> {
    let mut found = Vec::new();
    let mut env = Env::new();
    for name in &kernel.tiles {
        match schedule.tiles.get(name) {
            None => found.push(format!("tile size {name} has no value")),
            Some(&size) if size < 1 => found.push(format!("tile size {name} is {size}")),
            Some(&size) => {
                for bound in kernel.bounds_of(name).filter(|b| !b.allows(size)) {
                    let (word, number) = (bound.word(), bound.number());
                    found.push(format!("tile size {name} is {size}, not {name} {word} {number}"));
                }
                env.insert(name.clone(), size);
            }
        }
    }
    for name in schedule.tiles.keys().filter(|&n| !kernel.tiles.contains(n)) {
        found.push(format!("the kernel has no tile size {name}"));
    }
    if env.len() == kernel.tiles.len() {
        tiles_under(kernel, &env, &mut found);
    }
    let c = &schedule.cpu;
    for (knob, value) in [
        ("mma rows", c.mma_rows),
        ("mma vectors", c.mma_vectors),
        ("unroll", c.unroll_k),
        ("chains", c.reduce_chains),
        ("jam", c.jam),
    ] {
        if value < 1 {
            found.push(format!("{knob} is {value}"));
        }
    }
    let registers = match c.vector_bits {
        256 => Some(16),
        512 => Some(32),
        bits => {
            found.push(format!("vectors of {bits} bits: 256 or 512 are known"));
            None
        }
    };
    if c.unit != MatrixUnit::Fma && c.vector_bits != 512 {
        found.push(format!("unit={} with vectors of {} bits", c.unit.name(), c.vector_bits));
    }
    let vectors = u64::from(c.mma_vectors);
    let used = u64::from(c.mma_rows).saturating_mul(vectors).saturating_add(vectors + 1);
    let (rows, vectors) = (c.mma_rows, c.mma_vectors);
    if c.unit.is_tile() {
        // Results, left and right operands in tiles of 16 rows.
        let (tall, wide) = (u64::from(rows).div_ceil(16), u64::from(vectors));
        let used = tall.saturating_mul(wide).saturating_add(tall + wide);
        if used > 8 {
            found.push(format!("mma={rows}x{vectors} uses {used} of 8 tile registers"));
        }
    } else if let Some(registers) = registers.filter(|&r| used > r) {
        found.push(format!("mma={rows}x{vectors} uses {used} of {registers} registers"));
    }
    report(format!("the schedule of kernel `{}` is not legal", kernel.name), found)
}

/// One error with a note per violation.
fn report(what: String, found: Vec<String>) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let error = Error::bug(format!("{what}: {} violations", found.len()));
    Err(found.into_iter().fold(error, Error::with_note))
}

/// What a schedule makes of the tiles: they have elements, and reshapes keep their number.
fn tiles_under(kernel: &Kernel, env: &Env, found: &mut Vec<String>) {
    let names = tile_names(kernel);
    let count = |shape: &[Dim]| {
        shape.iter().try_fold(1i64, |n, d| n.checked_mul(d.eval(env).filter(|&d| d >= 1)?))
    };
    for (id, name) in &names {
        if let Some(info) = kernel.values.get(*id)
            && count(&info.ty.shape).is_none()
        {
            found.push(format!("{name}: {} has no elements, or too many", info.ty));
        }
    }
    for_each_let(&kernel.body, &mut |id, op| {
        if let TileOp::Reshape(x) = op
            && let (Some(to), Some(from)) = (kernel.values.get(id), kernel.values.get(*x))
            && count(&to.ty.shape) != count(&from.ty.shape)
        {
            let name = names.get(&id).map_or("", String::as_str);
            found.push(format!("{name}: reshape of {} to {}", from.ty, to.ty));
        }
    });
}

/// Calls `visit` with every operation.
fn for_each_let(block: &Block, visit: &mut impl FnMut(TileId, &TileOp)) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(id, op) => visit(*id, op),
            Stmt::Store { .. } | Stmt::AtomicAdd { .. } => {}
            Stmt::For(l) => for_each_let(&l.body, visit),
            Stmt::If(b) => {
                for_each_let(&b.then, visit);
                for_each_let(&b.otherwise, visit);
            }
        }
    }
}

/// Whether a text form can hold this name.
fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.')
        && !name.contains("..")
        && !name.ends_with('.')
}

/// Whether a tile or parameter of this type can hold the value.
fn fits(value: Value, dtype: DType) -> bool {
    match value {
        Value::Float(_) => dtype.is_float(),
        Value::Int(_) if dtype.is_float() => false,
        Value::Int(v) => match (dtype.bits(), dtype.is_signed_int()) {
            (64, _) => true,
            (_, _) if dtype == DType::Bool => (0..=1).contains(&v),
            (bits, true) => v >> (bits - 1) == 0 || v >> (bits - 1) == -1,
            (bits, false) => v >> bits == 0,
        },
    }
}

struct Checker<'a> {
    kernel: &'a Kernel,
    names: BTreeMap<TileId, String>,
    found: Vec<String>,
    /// Integers in scope: sizes, tile sizes, grid indices, variables of enclosing loops.
    integers: BTreeSet<Arc<str>>,
    tile_sizes: BTreeSet<Arc<str>>,
    /// Tiles defined so far anywhere, and those of them that can be read here.
    defined: BTreeSet<TileId>,
    visible: BTreeSet<TileId>,
}

impl<'a> Checker<'a> {
    fn report(&mut self, message: impl Into<String>) {
        self.found.push(message.into());
    }

    fn name(&self, tile: TileId) -> String {
        self.names.get(&tile).cloned().unwrap_or_else(|| format!("%?{}", tile.0))
    }

    fn identifier(&mut self, what: &str, name: &str) {
        if !is_identifier(name) {
            self.report(format!("{what} {name:?} is not called by an identifier"));
        }
    }

    /// Brings a new integer into scope.
    fn declare(&mut self, what: &str, name: &Arc<str>) {
        self.identifier(what, name);
        if !self.integers.insert(name.clone()) {
            self.report(format!("{what} {name}: the name is taken"));
        }
    }

    /// Every symbol of `dim` is in `scope`.
    fn symbols_in(&mut self, place: &str, dim: &Dim, scope: &BTreeSet<Arc<str>>) {
        let mut unknown = BTreeSet::new();
        dim.for_each_symbol(&mut |name| {
            if !scope.contains(name) {
                unknown.insert(name.clone());
            }
        });
        for name in unknown {
            self.report(format!("{place}: `{name}` in `{dim}` is not in scope"));
        }
    }

    fn dim(&mut self, place: &str, dim: &Dim) {
        let scope = std::mem::take(&mut self.integers);
        self.symbols_in(place, dim, &scope);
        self.integers = scope;
    }

    fn dims(&mut self, place: &str, dims: &[Dim]) {
        for dim in dims {
            self.dim(place, dim);
        }
    }

    fn header(&mut self) {
        let kernel = self.kernel;
        self.identifier("kernel", &kernel.name);
        for symbol in &kernel.symbols {
            self.declare("size", &symbol.name);
            if symbol.range.min > symbol.range.max {
                self.report(format!("size {} has an empty range", symbol.name));
            }
        }
        let mut names: BTreeSet<&str> = BTreeSet::new();
        for (_, param) in kernel.params.iter() {
            let place = format!("parameter {}", param.name);
            self.identifier("parameter", &param.name);
            if !names.insert(&param.name) {
                self.report(format!("{place}: the name is taken"));
            }
            for axis in &param.layout.axes {
                self.dim(&place, &axis.extent);
                self.dim(&place, &axis.stride);
                if axis.extent.as_const().is_some_and(|d| d < 0) {
                    self.report(format!("{place}: negative extent {}", axis.extent));
                }
                if let Some(block) = &axis.block {
                    self.dim(&place, &block.stride);
                    if block.size < 1 {
                        self.report(format!("{place}: blocks of {} elements", block.size));
                    }
                }
            }
            self.dim(&place, &param.layout.offset);
        }
        for tile in &kernel.tiles {
            self.declare("tile size", tile);
            if KNOBS.contains(&&**tile) {
                self.report(format!("tile size {tile} is called like a knob"));
            }
        }
        let mut before = 0;
        for (name, bound) in &kernel.bounds {
            match kernel.tiles.iter().position(|t| t == name) {
                None => self.report(format!("bound of {name}: there is no such tile size")),
                Some(at) if at < before => {
                    self.report(format!("bound of {name} stands behind a later tile size's"));
                }
                Some(at) => before = at,
            }
            if bound.number() < 1 {
                let (word, number) = (bound.word(), bound.number());
                self.report(format!("tile size {name} {word} {number} allows none"));
            }
        }
        for axis in &kernel.grid {
            self.dim(&format!("grid index {}", axis.name), &axis.extent);
        }
        for axis in &kernel.grid {
            self.declare("grid index", &axis.name);
        }
        for id in self.names.keys().copied().collect::<Vec<_>>() {
            if let Some(info) = kernel.values.get(id).filter(|info| !info.name.is_empty()) {
                self.identifier("tile", &info.name);
                if !names.insert(&info.name) {
                    self.report(format!("tile {}: the name is taken", info.name));
                }
            }
        }
    }

    fn tile_types(&mut self) {
        let kernel = self.kernel;
        let scope = std::mem::take(&mut self.tile_sizes);
        for id in self.names.keys().copied().collect::<Vec<_>>() {
            let name = self.name(id);
            let Some(info) = kernel.values.get(id) else {
                self.report(format!("{name}: there is no tile {}", id.0));
                continue;
            };
            for dim in &info.ty.shape {
                self.symbols_in(&name, dim, &scope);
                if dim.as_const().is_some_and(|d| d < 0) {
                    self.report(format!("{name}: negative extent {dim}"));
                }
            }
        }
        self.tile_sizes = scope;
    }

    fn define(&mut self, tile: TileId) {
        if !self.defined.insert(tile) {
            self.report(format!("{} is defined twice", self.name(tile)));
        }
        self.visible.insert(tile);
    }

    /// The type of a tile that is read; reports when it cannot be.
    fn read(&mut self, place: &str, tile: TileId) -> Option<&'a TileType> {
        if !self.visible.contains(&tile) {
            let name = self.name(tile);
            self.report(match self.defined.contains(&tile) {
                true => format!("{place}: {name} is not in scope"),
                false => format!("{place}: {name} is read before it is defined"),
            });
        }
        self.ty(tile)
    }

    fn ty(&self, tile: TileId) -> Option<&'a TileType> {
        self.kernel.values.get(tile).map(|info| &info.ty)
    }

    /// Reports a type other than the expected one.
    fn same(&mut self, place: &str, what: &str, found: &TileType, expected: &TileType) {
        if found != expected {
            self.report(format!("{place}: {what} is {found}, not {expected}"));
        }
    }

    fn block(&mut self, block: &'a Block) {
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(id, op) => {
                    if let Some(ty) = self.ty(*id) {
                        self.op(&self.name(*id), op, ty);
                    }
                    self.define(*id);
                }
                Stmt::Store { param, index, value } => self.store(*param, index, *value, false),
                Stmt::AtomicAdd { param, index, value } => self.store(*param, index, *value, true),
                Stmt::For(l) => self.for_loop(l),
                Stmt::If(b) => self.branch(b),
            }
        }
    }

    /// What happens inside is not seen outside.
    fn inside(&mut self, body: impl FnOnce(&mut Self)) {
        let outside = self.visible.clone();
        body(self);
        self.visible = outside;
    }

    fn for_loop(&mut self, l: &'a For) {
        let place = format!("for {}", l.var);
        self.dim(&place, &l.lo);
        self.dim(&place, &l.hi);
        let types: Vec<Option<&TileType>> =
            l.carry.iter().map(|&(_, init)| self.read(&place, init)).collect();
        let (n_carry, n_yields, n_results) = (l.carry.len(), l.yields.len(), l.results.len());
        if n_yields != n_carry || n_results != n_carry {
            self.report(format!(
                "{place}: {n_carry} tiles are carried, {n_yields} yielded, {n_results} results"
            ));
        }
        let was_free = !self.integers.contains(&l.var);
        self.declare("loop variable", &l.var);
        self.inside(|this| {
            for (&(inner, _), ty) in l.carry.iter().zip(&types) {
                this.define(inner);
                this.carried(&place, inner, *ty);
            }
            this.block(&l.body);
            for (&y, ty) in l.yields.iter().zip(&types) {
                this.read(&place, y);
                this.carried(&place, y, *ty);
            }
            for &y in l.yields.iter().skip(types.len()) {
                this.read(&place, y);
            }
        });
        if was_free {
            self.integers.remove(&l.var);
        }
        for (i, &result) in l.results.iter().enumerate() {
            self.define(result);
            self.carried(&place, result, types.get(i).copied().flatten());
        }
    }

    /// A tile that stands for a carried one has its type.
    fn carried(&mut self, place: &str, tile: TileId, expected: Option<&TileType>) {
        if let (Some(found), Some(expected)) = (self.ty(tile), expected) {
            self.same(place, &self.name(tile), found, expected);
        }
    }

    fn branch(&mut self, b: &'a If) {
        let place = "if";
        self.dim(place, &b.lhs);
        self.dim(place, &b.rhs);
        for (body, yields) in [(&b.then, &b.then_yields), (&b.otherwise, &b.otherwise_yields)] {
            if yields.len() != b.results.len() {
                let (n_yields, n_results) = (yields.len(), b.results.len());
                self.report(format!("{place}: {n_yields} tiles yielded, {n_results} results"));
            }
            self.inside(|this| {
                this.block(body);
                for (i, &y) in yields.iter().enumerate() {
                    this.read(place, y);
                    let result = b.results.get(i).and_then(|&r| this.ty(r));
                    this.carried(place, y, result);
                }
            });
        }
        for &result in &b.results {
            self.define(result);
        }
    }

    /// The parameter of a load or store: it exists, may be accessed so, and has the index's rank.
    fn param(
        &mut self,
        place: &str,
        param: ParamId,
        index: &[Dim],
        allowed: &[Access],
    ) -> Option<&'a Param> {
        self.dims(place, index);
        let Some(info) = self.kernel.params.get(param) else {
            self.report(format!("{place}: there is no parameter {param}"));
            return None;
        };
        if !allowed.contains(&info.access) {
            let access = info.access;
            self.report(format!("{place}: parameter {} is {access:?}", info.name));
        }
        if index.len() != info.layout.rank() {
            let (n_index, rank) = (index.len(), info.layout.rank());
            self.report(format!("{place}: {n_index} coordinates in {} of rank {rank}", info.name));
        }
        Some(info)
    }

    fn store(&mut self, param: ParamId, index: &[Dim], value: TileId, add: bool) {
        let place = if add { "atomic_add" } else { "store" };
        let allowed = if add { &[Access::InOut][..] } else { &[Access::Out, Access::InOut] };
        let ty = self.read(place, value);
        let info = self.param(place, param, index, allowed);
        if let (Some(ty), Some(info)) = (ty, info) {
            self.of_param(&format!("{place} of {}", self.name(value)), ty, info);
            if add && ty.dtype == DType::Bool {
                self.report(format!("{place}: bool cannot be added"));
            }
        }
    }

    /// A tile that is loaded from or stored to a parameter.
    fn of_param(&mut self, place: &str, ty: &TileType, param: &Param) {
        let name = &param.name;
        if ty.dtype != param.dtype {
            self.report(format!("{place}: {} in {name} of type {}", ty.dtype, param.dtype));
        }
        let (rank, of_param) = (ty.shape.len(), param.layout.rank());
        if rank != of_param {
            self.report(format!("{place}: a tile of rank {rank} in {name} of rank {of_param}"));
        }
    }

    fn constant(&mut self, place: &str, value: Value, dtype: DType) {
        if !fits(value, dtype) {
            self.report(format!("{place}: {value:?} does not fit {dtype}"));
        }
    }

    /// An operand of a map or broadcast.
    fn operand(
        &mut self,
        place: &str,
        operand: &Operand,
        result: &TileType,
    ) -> Option<&'a TileType> {
        let ty = self.read(place, operand.tile)?;
        let name = self.name(operand.tile);
        if operand.along.len() != ty.shape.len() {
            let n_along = operand.along.len();
            self.report(format!("{place}: {name}: {ty} along {n_along} axes"));
        }
        if operand.along.windows(2).any(|w| w[0] >= w[1]) {
            self.report(format!("{place}: {name}: axes {:?} do not ascend", operand.along));
        }
        for (extent, &axis) in ty.shape.iter().zip(&operand.along) {
            match result.shape.get(axis) {
                None => self.report(format!("{place}: {name}: {result} has no axis {axis}")),
                Some(of_result) if extent == of_result || extent.is(1) => {}
                Some(of_result) => self.report(format!(
                    "{place}: {name}: extent {extent} along axis {axis} of extent {of_result}"
                )),
            }
        }
        Some(ty)
    }

    /// The shape without one of its axes.
    fn without(&mut self, place: &str, ty: &TileType, axis: usize) -> Option<Vec<Dim>> {
        if axis >= ty.shape.len() {
            self.report(format!("{place}: {ty} has no axis {axis}"));
            return None;
        }
        let mut shape = ty.shape.clone();
        shape.remove(axis);
        Some(shape)
    }

    fn op(&mut self, place: &str, op: &'a TileOp, ty: &'a TileType) {
        const READS: [Access; 2] = [Access::In, Access::InOut];
        match op {
            TileOp::Full(value) => self.constant(place, *value, ty.dtype),
            TileOp::Load { param, index, steps, fill } => {
                if let Some(info) = self.param(place, *param, index, &READS) {
                    self.of_param(place, ty, info);
                    self.constant(place, *fill, info.dtype);
                }
                if steps.len() != index.len() {
                    let (n_steps, n_index) = (steps.len(), index.len());
                    self.report(format!("{place}: {n_steps} steps for {n_index} coordinates"));
                }
            }
            TileOp::Gather { param, axis, rows, index, fill } => {
                if let Some(info) = self.param(place, *param, index, &READS) {
                    self.of_param(place, ty, info);
                    self.constant(place, *fill, info.dtype);
                }
                let Some(rows) = self.read(place, *rows) else { return };
                match ty.shape.get(*axis) {
                    None => self.report(format!("{place}: {ty} has no axis {axis}")),
                    Some(extent) => {
                        if rows.shape.as_slice() != std::slice::from_ref(extent) {
                            self.report(format!("{place}: rows {rows} along extent {extent}"));
                        }
                    }
                }
                if !rows.dtype.is_int() {
                    self.report(format!("{place}: rows of type {}", rows.dtype));
                }
            }
            TileOp::Map { func, args } => {
                let (n_params, n_args) = (func.params().len(), args.len());
                if n_params != n_args {
                    self.report(format!("{place}: {n_args} operands for {n_params} parameters"));
                }
                for (i, arg) in args.iter().enumerate() {
                    let found = self.operand(place, arg, ty);
                    if let (Some(found), Some(param)) = (found, func.params().get(i))
                        && found.dtype != param.dtype
                    {
                        let (name, param) = (self.name(arg.tile), param.dtype);
                        self.report(format!(
                            "{place}: {name} is {found}, the function takes {param}"
                        ));
                    }
                }
                if func.dtype() != ty.dtype {
                    let result = func.dtype();
                    self.report(format!("{place}: the function gives {result}, not {}", ty.dtype));
                }
            }
            TileOp::Reduce { x, axis, limit, .. } => {
                self.limit(place, limit);
                if let Some(x) = self.read(place, *x)
                    && let Some(shape) = self.without(place, x, *axis)
                {
                    self.same(place, "the result", ty, &TileType::new(x.dtype, shape));
                }
            }
            TileOp::ArgReduce { kind, x, axis, limit, .. } => {
                self.limit(place, limit);
                if !matches!(kind, ReduceKind::Max | ReduceKind::Min) {
                    self.report(format!("{place}: position of {kind:?}"));
                }
                if let Some(x) = self.read(place, *x)
                    && let Some(shape) = self.without(place, x, *axis)
                {
                    self.same(place, "the result", ty, &TileType::new(DType::I64, shape));
                }
            }
            TileOp::Scan { x, axis, .. } => {
                if let Some(x) = self.read(place, *x) {
                    self.without(place, x, *axis);
                    self.same(place, "the result", ty, x);
                }
            }
            TileOp::Mma { acc, a, b, limit } => {
                self.limit(place, limit);
                let (acc, a, b) =
                    (self.read(place, *acc), self.read(place, *a), self.read(place, *b));
                if let (Some(acc), Some(a), Some(b)) = (acc, a, b) {
                    self.mma(place, acc, a, b);
                    self.same(place, "the result", ty, acc);
                }
            }
            TileOp::Permute { x, perm } => {
                let Some(x) = self.read(place, *x) else { return };
                let mut sorted = perm.clone();
                sorted.sort_unstable();
                if sorted.iter().copied().ne(0..x.shape.len()) {
                    return self
                        .report(format!("{place}: {perm:?} is no order of the axes of {x}"));
                }
                let shape: Vec<Dim> = perm.iter().map(|&p| x.shape[p].clone()).collect();
                self.same(place, "the result", ty, &TileType::new(x.dtype, shape));
            }
            TileOp::Reshape(x) => {
                let Some(x) = self.read(place, *x) else { return };
                if x.dtype != ty.dtype || numel(&x.shape) != numel(&ty.shape) {
                    self.report(format!("{place}: reshape of {x} to {ty}"));
                }
            }
            TileOp::Broadcast(operand) => {
                if let Some(x) = self.operand(place, operand, ty)
                    && x.dtype != ty.dtype
                {
                    self.report(format!("{place}: broadcast of {x} to {ty}"));
                }
            }
            TileOp::Iota { axis, start } => {
                self.dim(place, start);
                self.without(place, ty, *axis);
                if ty.dtype == DType::Bool {
                    self.report(format!("{place}: iota of type bool"));
                }
            }
            TileOp::Random { start, .. } => {
                self.dim(place, start);
                if !ty.dtype.is_float() {
                    self.report(format!("{place}: random numbers of type {}", ty.dtype));
                }
            }
        }
    }

    fn limit(&mut self, place: &str, limit: &Option<Dim>) {
        if let Some(limit) = limit {
            self.dim(place, limit);
        }
    }

    fn mma(&mut self, place: &str, acc: &TileType, a: &TileType, b: &TileType) {
        let shapes = match (acc.shape.as_slice(), a.shape.as_slice(), b.shape.as_slice()) {
            ([m, n], [am, ak], [bk, bn]) => m == am && n == bn && ak == bk,
            _ => false,
        };
        if !shapes {
            self.report(format!("{place}: mma of {acc}, {a}, {b}"));
        }
        let types = [acc.dtype, a.dtype, b.dtype];
        // Codes of 4 or 8 bits are exact in every float that sums.
        let codes =
            acc.dtype.is_float() && a.dtype.is_float() && b.dtype.is_int() && b.dtype.bits() <= 8;
        let alike = codes || types.iter().all(|t| t.is_float()) || types.iter().all(|t| t.is_int());
        if !alike || acc.dtype.bits() < a.dtype.bits().max(b.dtype.bits()) {
            self.report(format!("{place}: mma in {} of {} and {}", types[0], types[1], types[2]));
        }
    }
}
