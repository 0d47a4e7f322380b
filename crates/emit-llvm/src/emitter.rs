//! [`Emitter`]: the state while a kernel is written, integer expressions, memory access, and loop
//! nests over tiles.
//!
//! Coordinates are [`Dim`]s. The lanes of a vector are one more symbol, [`LANE`]: a coordinate
//! that mentions it differs from lane to lane, and the coefficient of `LANE` in the resulting
//! offset tells whether an access is contiguous, a broadcast, or a gather. Coordinates read from
//! data (gathered rows) are symbols of the same kind, bound to vector values.

use crate::ops::{Code, constant, mem_elem, reg_elem, splat_lit, suffix, vector};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Value;
use tilewright_layout::{
    Atom, Axis, Block, Dim, Facts, Layout, Range, atom_dim, linear_in, mentions, uppers,
};
use tilewright_tile::{CpuKnobs, Kernel, TileId, TileOp};

/// The symbol of a vector's lane number.
pub(crate) const LANE: &str = "$l";

/// A tile in scratch memory.
#[derive(Clone, Debug)]
pub(crate) struct Buf {
    /// Address of its first element.
    pub(crate) ptr: String,
    pub(crate) dtype: DType,
    /// Constant strides.
    pub(crate) layout: Layout,
    /// Lanes up to this many past the end of a run along the last axis may be written.
    pub(crate) pad: i64,
}

/// What runs on each piece of a matrix product as soon as it is final.
#[derive(Clone, Debug)]
pub(crate) struct Epilogue {
    /// The matrix, as the stores name it.
    pub(crate) result: TileId,
    /// Indices of the fused store statements in their block, with the axes of the stored tile that
    /// are the matrix's rows and columns.
    pub(crate) stores: Vec<(tilewright_tile::Stmt, Vec<Option<usize>>)>,
}

/// Where a tile's elements come from.
#[derive(Clone, Debug)]
pub(crate) enum Loc {
    /// Computed from its definition when needed.
    Virtual,
    /// Scratch memory.
    Buffer(Buf),
    /// The accumulator of a loop, not yet written in the first iteration.
    Acc(Box<Acc>),
}

/// See [`Loc::Acc`].
#[derive(Clone, Debug)]
pub(crate) struct Acc {
    pub(crate) buf: Buf,
    pub(crate) init: TileId,
    /// `i1`: this is the first iteration of all loops around.
    pub(crate) first: String,
    /// `i1`: this is the last.
    pub(crate) last: String,
    pub(crate) epilogue: Option<Epilogue>,
}

/// Values known at this point of the text; dropped where the block ends that computed them.
#[derive(Debug, Default)]
struct Scope {
    dims: HashMap<Dim, String>,
    vectors: HashMap<Dim, String>,
    pub(crate) evals: HashMap<(TileId, Vec<Dim>, u32), String>,
}

/// Where an access goes and under which conditions it is inside.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) base: String,
    pub(crate) dtype: DType,
    /// In elements, expanded and simplified.
    pub(crate) offset: Dim,
    /// Coordinates with extents that were not proven to lie inside.
    pub(crate) guards: Vec<(Dim, Dim)>,
    /// Reading past the mask does no harm.
    pub(crate) over_read: bool,
}

/// See the module's head.
pub(crate) struct Emitter<'a> {
    /// With tile sizes bound.
    pub(crate) k: &'a Kernel,
    pub(crate) knobs: CpuKnobs,
    pub(crate) c: Code,
    pub(crate) facts: Facts,
    scopes: Vec<Scope>,
    env: HashMap<Arc<str>, String>,
    vec_env: HashMap<Arc<str>, String>,
    pub(crate) defs: Vec<Option<&'a TileOp>>,
    pub(crate) loc: Vec<Loc>,
    pub(crate) need: Vec<Option<Vec<Dim>>>,
    pub(crate) materialise: Vec<bool>,
    pub(crate) lanes: u32,
    pub(crate) mask: Option<String>,
    fresh: u32,
    scratch_top: i64,
    pub(crate) scratch_max: i64,
    /// Helper functions of this kernel: micro-kernels.
    pub(crate) functions: Vec<String>,
    /// Whole vectors are being stored past the caches.
    pub(crate) streaming: bool,
    /// Some were: the kernel ends with a fence.
    pub(crate) streamed: bool,
    /// Some product lies in tile registers.
    pub(crate) tiles: bool,
    /// Number of the loop nest that is being written.
    pub(crate) site: u32,
    /// Guards that hold here: see `inside.rs`.
    pub(crate) assumed: Vec<(Dim, Dim)>,
    /// The tile that the next loop nest evaluates, when its reads may be split by their guards.
    pub(crate) split: Option<TileId>,
    /// The axis along which this many neighbours are computed in one turn: see `side.rs`.
    pub(crate) side_by_side: Option<(usize, i64)>,
    /// The first loop nest that reads a parameter, and the one that asks for the next block's.
    sites: BTreeMap<tilewright_tile::ParamId, (u32, Option<u32>)>,
}

impl<'a> Emitter<'a> {
    pub(crate) fn new(k: &'a Kernel, knobs: CpuKnobs) -> Emitter<'a> {
        let n = k.values.len();
        let mut facts = Facts::default();
        for s in &k.symbols {
            facts.declare(&s.name, s.range, vec![]);
        }
        let code = Code { vector_bits: knobs.vector_bits, ..Code::default() };
        Emitter {
            k,
            knobs,
            c: code,
            facts,
            scopes: vec![Scope::default()],
            env: HashMap::new(),
            vec_env: HashMap::new(),
            defs: vec![None; n],
            loc: vec![Loc::Virtual; n],
            need: vec![None; n],
            materialise: vec![false; n],
            lanes: 1,
            mask: None,
            fresh: 0,
            scratch_top: 0,
            scratch_max: 0,
            functions: Vec::new(),
            streaming: false,
            streamed: false,
            tiles: false,
            site: 0,
            assumed: Vec::new(),
            split: None,
            side_by_side: None,
            sites: BTreeMap::new(),
        }
    }

    /// A constant extent of a tile.
    pub(crate) fn extents(&self, tile: TileId) -> Result<Vec<i64>> {
        let ty = self.k.ty(tile);
        ty.shape
            .iter()
            .map(|d| {
                d.as_const().filter(|n| *n >= 0).ok_or_else(|| {
                    Error::bug(format!(
                        "tile {tile} of kernel @{} has no static shape: {ty}",
                        self.k.name
                    ))
                })
            })
            .collect()
    }

    /// A new symbol name.
    pub(crate) fn symbol(&mut self) -> Arc<str> {
        self.fresh += 1;
        format!("${}", self.fresh).into()
    }

    pub(crate) fn bind(&mut self, symbol: &str, value: &str) {
        self.env.insert(symbol.into(), value.to_owned());
    }

    pub(crate) fn bind_vector(&mut self, symbol: &str, value: &str) {
        self.vec_env.insert(symbol.into(), value.to_owned());
    }

    pub(crate) fn push_scope(&mut self) {
        self.scopes.push(Scope::default());
    }

    pub(crate) fn pop_scope(&mut self) {
        self.scopes.pop();
    }

    /// Forgets tile values read so far: memory that they came from is about to change.
    pub(crate) fn forget_values(&mut self) {
        for scope in &mut self.scopes {
            scope.evals.clear();
        }
    }

    pub(crate) fn known_value(&self, key: &(TileId, Vec<Dim>, u32)) -> Option<String> {
        self.scopes.iter().rev().find_map(|s| s.evals.get(key)).cloned()
    }

    pub(crate) fn remember_value(&mut self, key: (TileId, Vec<Dim>, u32), value: &str) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.evals.insert(key, value.to_owned());
        }
    }

    /// Expanded and simplified.
    pub(crate) fn settle(&self, dim: &Dim) -> Dim {
        self.facts.simplify(&self.facts.expand(dim))
    }

    /// True when the value differs from lane to lane.
    pub(crate) fn varies(&self, dim: &Dim) -> bool {
        let mut found = false;
        dim.for_each_symbol(&mut |s| found |= &**s == LANE || self.vec_env.contains_key(s));
        if found {
            return true;
        }
        let expanded = self.facts.expand(dim);
        expanded.for_each_symbol(&mut |s| found |= &**s == LANE || self.vec_env.contains_key(s));
        found
    }

    /// The value of an expression as `i64`.
    pub(crate) fn dim(&mut self, dim: &Dim) -> String {
        let dim = self.settle(dim);
        self.dim_settled(&dim)
    }

    fn dim_settled(&mut self, dim: &Dim) -> String {
        if let Some(v) = dim.as_const() {
            return v.to_string();
        }
        if let Some(known) = self.scopes.iter().rev().find_map(|s| s.dims.get(dim)) {
            return known.clone();
        }
        let mut sum: Option<String> = None;
        let mut constant = 0;
        for (mono, coeff) in dim.terms() {
            if mono.is_empty() {
                constant = *coeff;
                continue;
            }
            let mut product: Option<String> = None;
            for atom in mono {
                let value = self.atom(atom);
                product = Some(match product {
                    None => value,
                    Some(p) => self.c.t.ins(format_args!("mul nsw i64 {p}, {value}")),
                });
            }
            let mut product = product.unwrap_or_default();
            let negative = *coeff < 0 && sum.is_some();
            let factor = if negative { coeff.wrapping_neg() } else { *coeff };
            if factor != 1 {
                product = self.c.t.ins(format_args!("mul nsw i64 {product}, {factor}"));
            }
            sum = Some(match sum {
                None => product,
                Some(s) if negative => self.c.t.ins(format_args!("sub nsw i64 {s}, {product}")),
                Some(s) => self.c.t.ins(format_args!("add nsw i64 {s}, {product}")),
            });
        }
        let mut value = sum.unwrap_or_else(|| "0".into());
        if constant != 0 {
            value = self.c.t.ins(format_args!("add nsw i64 {value}, {constant}"));
        }
        if let Some(scope) = self.scopes.last_mut() {
            scope.dims.insert(dim.clone(), value.clone());
        }
        value
    }

    fn atom(&mut self, atom: &Atom) -> String {
        match atom {
            Atom::Sym(name) => match self.env.get(name) {
                Some(v) => v.clone(),
                None => {
                    debug_assert!(false, "symbol {name} has no value in kernel @{}", self.k.name);
                    "poison".into()
                }
            },
            Atom::FloorDiv(a, b) => {
                let plain = self.facts.bounds(a).min >= 0 && self.facts.bounds(b).min > 0;
                let (x, y) = (self.dim_settled(a), self.dim_settled(b));
                if plain {
                    return self.c.t.ins(format_args!("udiv i64 {x}, {y}"));
                }
                self.scalar_floor(&x, &y).0
            }
            Atom::Mod(a, b) => {
                let plain = self.facts.bounds(a).min >= 0 && self.facts.bounds(b).min > 0;
                let (x, y) = (self.dim_settled(a), self.dim_settled(b));
                if plain {
                    return self.c.t.ins(format_args!("urem i64 {x}, {y}"));
                }
                self.scalar_floor(&x, &y).1
            }
            Atom::Min(a, b) | Atom::Max(a, b) => {
                let name = if matches!(atom, Atom::Min(..)) { "smin" } else { "smax" };
                let (x, y) = (self.dim_settled(a), self.dim_settled(b));
                self.c.call(name, "i64", 1, &[&x, &y])
            }
        }
    }

    /// Quotient rounded down and its remainder, for a positive divisor.
    fn scalar_floor(&mut self, x: &str, y: &str) -> (String, String) {
        let q = self.c.t.ins(format_args!("sdiv i64 {x}, {y}"));
        let p = self.c.t.ins(format_args!("mul i64 {q}, {y}"));
        let r = self.c.t.ins(format_args!("sub i64 {x}, {p}"));
        let neg = self.c.t.ins(format_args!("icmp slt i64 {r}, 0"));
        let down = self.c.t.ins(format_args!("sub i64 {q}, 1"));
        let up = self.c.t.ins(format_args!("add i64 {r}, {y}"));
        let q = self.c.t.ins(format_args!("select i1 {neg}, i64 {down}, i64 {q}"));
        let r = self.c.t.ins(format_args!("select i1 {neg}, i64 {up}, i64 {r}"));
        (q, r)
    }

    /// `<0, 1, 2, ...>`.
    pub(crate) fn lane_numbers(&self) -> String {
        Self::numbers(self.lanes)
    }

    /// `<0, 1, 2, ...>` of so many lanes.
    pub(crate) fn numbers(lanes: u32) -> String {
        if lanes == 1 {
            return "0".into();
        }
        let list: Vec<String> = (0..lanes).map(|i| format!("i64 {i}")).collect();
        format!("<{}>", list.join(", "))
    }

    /// The value of an expression in each lane.
    pub(crate) fn dim_vector(&mut self, dim: &Dim) -> String {
        let dim = self.settle(dim);
        self.dim_vector_settled(&dim)
    }

    fn dim_vector_settled(&mut self, dim: &Dim) -> String {
        let lanes = self.lanes;
        if lanes == 1 && !self.varies(dim) {
            return self.dim_settled(dim);
        }
        if let Some(v) = dim.as_const() {
            return splat_lit("i64", &v.to_string(), lanes);
        }
        if !self.varies(dim) {
            let scalar = self.dim_settled(dim);
            return self.c.splat("i64", &scalar, lanes);
        }
        if let Some(known) = self.scopes.iter().rev().find_map(|s| s.vectors.get(dim)) {
            return known.clone();
        }
        let (mut uniform, mut sum) = (Dim::new(0), None::<String>);
        for (mono, coeff) in dim.terms() {
            let mut scale = Dim::new(*coeff);
            let mut product: Option<String> = None;
            for atom in mono {
                let d = atom_dim(atom);
                if !self.varies(&d) {
                    scale = scale * d;
                    continue;
                }
                let value = self.atom_vector(atom);
                product = Some(match product {
                    None => value,
                    Some(p) => self.c.bin("mul", "i64", lanes, &p, &value),
                });
            }
            match product {
                None => uniform = uniform + scale,
                Some(mut p) => {
                    if !scale.is(1) {
                        let s = self.dim_settled(&scale);
                        let s = if scale.as_const().is_some() {
                            splat_lit("i64", &s, lanes)
                        } else {
                            self.c.splat("i64", &s, lanes)
                        };
                        p = self.c.bin("mul", "i64", lanes, &p, &s);
                    }
                    sum = Some(match sum {
                        None => p,
                        Some(s) => self.c.bin("add", "i64", lanes, &s, &p),
                    });
                }
            }
        }
        let mut value = sum.unwrap_or_default();
        if !uniform.is(0) {
            let u = self.dim_vector_settled(&uniform);
            value = self.c.bin("add", "i64", lanes, &value, &u);
        }
        if let Some(scope) = self.scopes.last_mut() {
            scope.vectors.insert(dim.clone(), value.clone());
        }
        value
    }

    fn atom_vector(&mut self, atom: &Atom) -> String {
        let lanes = self.lanes;
        match atom {
            Atom::Sym(name) if &**name == LANE => self.lane_numbers(),
            Atom::Sym(name) => self.vec_env.get(name).cloned().unwrap_or_else(|| "poison".into()),
            Atom::FloorDiv(a, b) | Atom::Mod(a, b) => {
                let floor = matches!(atom, Atom::FloorDiv(..));
                let plain = self.facts.bounds(a).min >= 0 && self.facts.bounds(b).min > 0;
                let (x, y) = (self.dim_vector_settled(a), self.dim_vector_settled(b));
                if plain {
                    return self.c.bin(if floor { "udiv" } else { "urem" }, "i64", lanes, &x, &y);
                }
                let zero = splat_lit("i64", "0", lanes);
                let r = self.c.bin("srem", "i64", lanes, &x, &y);
                let neg = self.c.cmp("slt", "i64", lanes, &r, &zero);
                let up = self.c.bin("add", "i64", lanes, &r, &y);
                let r = self.c.select("i64", lanes, &neg, &up, &r);
                if !floor {
                    return r;
                }
                let whole = self.c.bin("sub", "i64", lanes, &x, &r);
                self.c.bin("sdiv", "i64", lanes, &whole, &y)
            }
            Atom::Min(a, b) | Atom::Max(a, b) => {
                let name = if matches!(atom, Atom::Min(..)) { "smin" } else { "smax" };
                let (x, y) = (self.dim_vector_settled(a), self.dim_vector_settled(b));
                self.c.call(name, "i64", lanes, &[&x, &y])
            }
        }
    }

    // ---- scratch memory -------------------------------------------------------------------

    pub(crate) fn scratch_mark(&self) -> i64 {
        self.scratch_top
    }

    pub(crate) fn scratch_release(&mut self, mark: i64) {
        self.scratch_top = mark;
    }

    /// `bytes` of scratch memory, aligned to a cache line.
    pub(crate) fn scratch(&mut self, bytes: i64) -> String {
        let at = self.scratch_top;
        // Vectors may be read past the end of a tile: leave room for one.
        self.scratch_top = (at + bytes + 64 + 63) & !63;
        self.scratch_max = self.scratch_max.max(self.scratch_top);
        self.c.t.ins(format_args!("getelementptr inbounds i8, ptr %scratch, i64 {at}"))
    }

    /// A row-major tile, its last axis padded to whole vectors.
    pub(crate) fn new_buffer(&mut self, dtype: DType, shape: &[i64]) -> Buf {
        let lanes = i64::from(self.knobs.vector_bits / 32);
        let mut axes = Vec::new();
        let mut stride = 1;
        for (i, &extent) in shape.iter().enumerate().rev() {
            axes.push(Axis { extent: extent.into(), stride: stride.into(), block: None });
            let last = i + 1 == shape.len();
            if !last || extent == 1 {
                stride *= extent;
                continue;
            }
            stride = (extent + lanes - 1) / lanes * lanes;
            // Rows a multiple of 512 bytes apart would share few sets of the cache.
            if shape.len() > 1 && stride * dtype.size() as i64 % 512 == 0 {
                stride += 64 / dtype.size() as i64;
            }
        }
        axes.reverse();
        let ptr = self.scratch(stride.max(1) * dtype.size() as i64 + 64);
        Buf { ptr, dtype, layout: Layout { axes, offset: Dim::new(0) }, pad: lanes }
    }

    /// A matrix in panels of `width` columns: element `(i, j)` at
    /// `floor(j/width)*rows*width + i*width + j%width`.
    pub(crate) fn new_panels(&mut self, dtype: DType, rows: i64, cols: i64, width: i64) -> Buf {
        let layout = Layout {
            axes: vec![
                Axis { extent: rows.into(), stride: width.into(), block: None },
                Axis {
                    extent: cols.into(),
                    stride: (rows * width).into(),
                    block: Some(Block { size: width, stride: Dim::new(1) }),
                },
            ],
            offset: Dim::new(0),
        };
        let panels = (cols + width - 1) / width;
        let ptr = self.scratch(panels * rows * width * dtype.size() as i64);
        Buf { ptr, dtype, layout, pad: width }
    }

    // ---- memory access --------------------------------------------------------------------

    /// Where element `coords` of a scratch tile lies.
    pub(crate) fn buffer_place(&self, buf: &Buf, coords: &[Dim]) -> Place {
        let coords: Vec<Dim> = coords.iter().map(|c| self.facts.expand(c)).collect();
        Place {
            base: buf.ptr.clone(),
            dtype: buf.dtype,
            offset: self.settle(&buf.layout.offset_of(&coords)),
            guards: vec![],
            over_read: true,
        }
    }

    /// Where element `global` of a parameter lies.
    pub(crate) fn param_place(&self, param: tilewright_tile::ParamId, global: &[Dim]) -> Place {
        let info = &self.k.params[param];
        let mut guards = Vec::new();
        for (x, axis) in global.iter().zip(&info.layout.axes) {
            let x = self.facts.simplify(x);
            let inside = self.facts.proves_non_negative(&x)
                && self.facts.proves_non_negative(&(&axis.extent - 1 - &x));
            if !inside && !self.assumed.iter().any(|(a, e)| *a == x && *e == axis.extent) {
                guards.push((x, axis.extent.clone()));
            }
        }
        let expanded: Vec<Dim> = global.iter().map(|c| self.settle(c)).collect();
        Place {
            base: format!("%p{}", param.0),
            dtype: info.dtype,
            offset: self.settle(&info.layout.offset_of(&expanded)),
            guards,
            over_read: false,
        }
    }

    /// Conditions of the guards: one for all lanes, and one per lane.
    fn conditions(&mut self, guards: &[(Dim, Dim)]) -> (Option<String>, Option<String>) {
        let (mut scalar, mut lanes) = (None::<String>, None::<String>);
        for (x, extent) in guards {
            if self.lanes > 1 && self.varies(x) {
                let v = self.dim_vector(x);
                let e = self.dim_vector(extent);
                let n = self.lanes;
                let inside = self.c.cmp("ult", "i64", n, &v, &e);
                lanes = Some(match lanes {
                    None => inside,
                    Some(l) => self.c.bin("and", "i1", n, &l, &inside),
                });
            } else {
                let (v, e) = if self.varies(x) {
                    (self.dim_vector(x), self.dim(extent))
                } else {
                    (self.dim(x), self.dim(extent))
                };
                let inside = self.c.cmp("ult", "i64", 1, &v, &e);
                scalar = Some(match scalar {
                    None => inside,
                    Some(s) => self.c.bin("and", "i1", 1, &s, &inside),
                });
            }
        }
        (scalar, lanes)
    }

    /// The mask of an access: lanes in use, and inside. `None` when all are.
    pub(crate) fn access_mask(&mut self, place: &Place, for_read: bool) -> Option<String> {
        let (scalar, lanes) = self.conditions(&place.guards);
        let n = self.lanes;
        let tail = if for_read && place.over_read { None } else { self.mask.clone() };
        let scalar = scalar.map(|s| self.c.splat("i1", &s, n));
        let mut all: Option<String> = None;
        for m in [tail, scalar, lanes].into_iter().flatten() {
            all = Some(match all {
                None => m,
                Some(a) => self.c.bin("and", "i1", n, &a, &m),
            });
        }
        all
    }

    fn pointer(&mut self, place: &Place, elem: &str) -> String {
        let base = &place.base;
        if place.offset.is(0) {
            return base.clone();
        }
        let offset = if self.varies(&place.offset) {
            self.dim_vector(&place.offset)
        } else {
            self.dim(&place.offset)
        };
        self.c.t.ins(format_args!("getelementptr inbounds {elem}, ptr {base}, i64 {offset}"))
    }

    /// Reads elements into register form; outside gives `fill`.
    pub(crate) fn load(&mut self, place: &Place, fill: Option<Value>) -> String {
        let dtype = place.dtype;
        if dtype.bits() == 4 {
            return self.load_nibbles(place, fill);
        }
        let (elem, reg, lanes) = (mem_elem(dtype), reg_elem(dtype), self.lanes);
        let fill = fill.unwrap_or(Value::Int(0));
        let align = dtype.size();
        if lanes == 1 || !self.varies(&place.offset) {
            // One element, perhaps for all lanes.
            let keep = (self.lanes, self.mask.take());
            let (scalar, lane_cond) = self.conditions(&place.guards);
            self.lanes = 1;
            let mut p = self.pointer(place, elem);
            if let Some(inside) = &scalar {
                p = self.c.t.ins(format_args!("select i1 {inside}, ptr {p}, ptr %scratch"));
            }
            // Outside, the address is that of scratch memory.
            let tag = if scalar.is_some() { String::new() } else { self.read_tag(&place.base) };
            let x = self.c.t.ins(format_args!("load {elem}, ptr {p}, align {align}{tag}"));
            let mut x = self.c.widen(dtype, 1, &x);
            if let Some(inside) = &scalar {
                let fill = constant(dtype, fill, 1);
                x = self.c.select(reg, 1, inside, &x, &fill);
            }
            (self.lanes, self.mask) = keep;
            let mut x = self.c.splat(reg, &x, self.lanes);
            if let Some(inside) = lane_cond {
                let fill = constant(dtype, fill, self.lanes);
                x = self.c.select(reg, self.lanes, &inside, &x, &fill);
            }
            return x;
        }
        let mask = self.access_mask(place, true);
        let guarded = !place.guards.is_empty();
        let v = vector(elem, lanes);
        let m = vector("i1", lanes);
        let tag = self.read_tag(&place.base);
        let contiguous = self.vec_env_free(&place.offset)
            && linear_in(&place.offset, LANE).is_some_and(|(c, _)| c.is(1));
        let raw = if contiguous {
            let (_, start) = linear_in(&place.offset, LANE).unwrap_or_default();
            let first = Place { offset: start, ..place.clone() };
            let p = self.pointer(&first, elem);
            match &mask {
                None => self.c.t.ins(format_args!("load {v}, ptr {p}, align {align}{tag}")),
                Some(mask) => {
                    let name = format!("llvm.masked.load.{}.p0", suffix(elem, lanes));
                    let ptr = format!("ptr align {align}");
                    let args = [(ptr.as_str(), p.as_str()), (&m, mask), (&v, "zeroinitializer")];
                    self.c.t.tagged(&v, &name, &args, &tag)
                }
            }
        } else {
            let p = self.pointers(place, elem);
            let ones = splat_lit("i1", "true", lanes);
            let mask = mask.clone().unwrap_or(ones);
            let name = format!("llvm.masked.gather.{}.v{lanes}p0", suffix(elem, lanes));
            let ptrs = format!("<{lanes} x ptr> align {align}");
            let args = [(ptrs.as_str(), p.as_str()), (&m, &mask), (&v, "zeroinitializer")];
            self.c.t.intrinsic(&v, &name, &args)
        };
        let x = self.c.widen(dtype, lanes, &raw);
        match mask {
            Some(mask) if guarded && !is_zero(fill) => {
                let fill = constant(dtype, fill, lanes);
                self.c.select(reg, lanes, &mask, &x, &fill)
            }
            _ => x,
        }
    }

    fn vec_env_free(&self, dim: &Dim) -> bool {
        let mut free = true;
        dim.for_each_symbol(&mut |s| free &= !self.vec_env.contains_key(s));
        free
    }

    /// One address per lane.
    fn pointers(&mut self, place: &Place, elem: &str) -> String {
        let lanes = self.lanes;
        let offsets = self.dim_vector(&place.offset);
        self.c.t.ins(format_args!(
            "getelementptr inbounds {elem}, ptr {}, <{lanes} x i64> {offsets}",
            place.base
        ))
    }

    fn load_nibbles(&mut self, place: &Place, fill: Option<Value>) -> String {
        let byte = Place {
            dtype: DType::U8,
            offset: self.facts.simplify(&place.offset.floor_div(&Dim::new(2))),
            guards: place.guards.clone(),
            ..place.clone()
        };
        let bytes = self.load(&byte, None);
        let lanes = self.lanes;
        let half = self.dim_vector(&place.offset.modulo(&Dim::new(2)));
        let half = self.c.conv("trunc", "i64", "i8", lanes, &half);
        let two = splat_lit("i8", "2", lanes);
        let shift = self.c.bin("shl", "i8", lanes, &half, &two);
        let low = self.c.bin("lshr", "i8", lanes, &bytes, &shift);
        let x = self.c.round(place.dtype, lanes, &low);
        if place.guards.is_empty() {
            return x;
        }
        let (scalar, lane_cond) = self.conditions(&place.guards);
        let fill = constant(place.dtype, fill.unwrap_or(Value::Int(0)), lanes);
        let mut x = x;
        if let Some(s) = scalar {
            let s = self.c.splat("i1", &s, lanes);
            x = self.c.select("i8", lanes, &s, &x, &fill);
        }
        if let Some(l) = lane_cond {
            x = self.c.select("i8", lanes, &l, &x, &fill);
        }
        x
    }

    /// Writes registers; lanes outside are dropped.
    pub(crate) fn store(&mut self, place: &Place, value: &str, padded: bool) -> Result<()> {
        let dtype = place.dtype;
        let (elem, lanes) = (mem_elem(dtype), self.lanes);
        let align = dtype.size();
        if lanes == 1 {
            let skip = self.enter_if_inside(place);
            if dtype.bits() == 4 {
                self.store_nibble(place, value);
            } else {
                let p = self.pointer(place, elem);
                let raw = self.c.narrow(dtype, 1, value);
                let tag = self.write_tag(&place.base);
                self.c.t.stmt(format_args!("store {elem} {raw}, ptr {p}, align {align}{tag}"));
            }
            self.leave_if_inside(skip);
            return Ok(());
        }
        if dtype.bits() == 4 {
            return Err(Error::bug("four-bit elements are stored one by one"));
        }
        let raw = self.c.narrow(dtype, lanes, value);
        let mask = if padded { None } else { self.store_mask(place, elem) };
        let (v, m) = (vector(elem, lanes), vector("i1", lanes));
        let tag = self.write_tag(&place.base);
        let contiguous = self.vec_env_free(&place.offset)
            && linear_in(&place.offset, LANE).is_some_and(|(c, _)| c.is(1));
        if contiguous {
            let (_, start) = linear_in(&place.offset, LANE).unwrap_or_default();
            let p = self.pointer(&Place { offset: start, ..place.clone() }, elem);
            match mask {
                None if self.streaming => {
                    let whole = lanes as usize * dtype.size();
                    self.c.t.stmt(format_args!(
                        "store {v} {raw}, ptr {p}, align {whole}, !nontemporal !0{tag}"
                    ));
                }
                None => {
                    self.c.t.stmt(format_args!("store {v} {raw}, ptr {p}, align {align}{tag}"));
                }
                Some(mask) => {
                    let name = format!("llvm.masked.store.{}.p0", suffix(elem, lanes));
                    let ptr = format!("ptr align {align}");
                    let args = [(v.as_str(), raw.as_str()), (&ptr, &p), (&m, &mask)];
                    self.c.t.tagged("void", &name, &args, &tag);
                }
            }
        } else {
            let p = self.pointers(place, elem);
            let mask = mask.unwrap_or_else(|| splat_lit("i1", "true", lanes));
            let name = format!("llvm.masked.scatter.{}.v{lanes}p0", suffix(elem, lanes));
            let ptrs = format!("<{lanes} x ptr> align {align}");
            let args = [(v.as_str(), raw.as_str()), (&ptrs, &p), (&m, &mask)];
            self.c.t.intrinsic("void", &name, &args);
        }
        Ok(())
    }

    /// Asks memory for the same part of the next block's operand, when this is the second time that
    /// the block reads it: what is computed meanwhile hides the way there.
    pub(crate) fn ask_ahead(&mut self, param: tilewright_tile::ParamId, global: &[Dim]) {
        let site = self.site;
        let (first, second) = self.sites.entry(param).or_insert((site, None));
        if *first == site || *second.get_or_insert(site) != site || self.lanes == 1 {
            return;
        }
        let Some(grid) = self.k.grid.last().map(|axis| axis.name.clone()) else { return };
        let next = |s: &str| (s == &*grid).then(|| Dim::sym(grid.clone()) + 1);
        let info = &self.k.params[param];
        let here: Vec<Dim> = global.iter().map(|x| self.settle(x)).collect();
        let there: Vec<Dim> = here.iter().map(|x| x.substitute(&next)).collect();
        let offset = self.facts.simplify(&info.layout.offset_of(&there));
        let Some((_, start)) = linear_in(&offset, LANE).filter(|(c, _)| c.is(1)) else { return };
        if here == there || !self.vec_env_free(&start) {
            return;
        }
        let (elem, at) = (mem_elem(info.dtype), self.dim(&start));
        // The last block asks for what lies behind: no `inbounds`, and asking never faults.
        let p = self.c.t.ins(format_args!("getelementptr {elem}, ptr %p{}, i64 {at}", param.0));
        let args = [("ptr", p.as_str()), ("i32", "0"), ("i32", "3"), ("i32", "1")];
        self.c.t.intrinsic("void", "llvm.prefetch.p0", &args);
    }

    /// Opens a branch that runs where a single element lies inside; `None` when it always does.
    pub(crate) fn enter_if_inside(&mut self, place: &Place) -> Option<String> {
        let (inside, _) = self.conditions(&place.guards);
        inside.map(|inside| {
            let (yes, no) = (self.c.t.label(), self.c.t.label());
            self.c.t.br_if(&inside, &yes, &no);
            self.c.t.place(&yes);
            self.push_scope();
            no
        })
    }

    /// Closes it.
    pub(crate) fn leave_if_inside(&mut self, open: Option<String>) {
        if let Some(no) = open {
            self.pop_scope();
            self.c.t.br(&no);
            self.c.t.place(&no);
        }
    }

    /// Address of a single element.
    pub(crate) fn address(&mut self, place: &Place, elem: &str) -> String {
        self.pointer(place, elem)
    }

    fn store_nibble(&mut self, place: &Place, value: &str) {
        let byte = Place {
            offset: self.facts.simplify(&place.offset.floor_div(&Dim::new(2))),
            ..place.clone()
        };
        let p = self.pointer(&byte, "i8");
        let old = self.c.t.ins(format_args!("load i8, ptr {p}, align 1"));
        let half = self.dim_vector(&place.offset.modulo(&Dim::new(2)));
        let half = self.c.conv("trunc", "i64", "i8", 1, &half);
        let shift = self.c.bin("shl", "i8", 1, &half, "2");
        let hole = self.c.bin("shl", "i8", 1, "15", &shift);
        let hole = self.c.bin("xor", "i8", 1, &hole, "-1");
        let kept = self.c.bin("and", "i8", 1, &old, &hole);
        let low = self.c.bin("and", "i8", 1, value, "15");
        let up = self.c.bin("shl", "i8", 1, &low, &shift);
        let new = self.c.bin("or", "i8", 1, &kept, &up);
        self.c.t.stmt(format_args!("store i8 {new}, ptr {p}, align 1"));
    }

    // ---- loops ----------------------------------------------------------------------------

    /// Runs `body` for a symbol in `0..count`; a count of one needs no loop.
    pub(crate) fn counted(
        &mut self,
        count: &Dim,
        body: &mut dyn FnMut(&mut Self, Dim) -> Result<()>,
    ) -> Result<()> {
        let count = self.facts.simplify(count);
        if count.is(1) {
            return body(self, Dim::new(0));
        }
        let name = self.symbol();
        let hi = self.dim(&count);
        let max = self.facts.bounds(&count).max.saturating_sub(1).max(0);
        let open = self.c.t.begin_loop("0", &hi, "1");
        self.facts.declare(&name, Range { min: 0, max }, uppers(&count));
        self.bind(&name, &open.iv);
        self.push_scope();
        body(self, Dim::sym(name.clone()))?;
        self.pop_scope();
        self.c.t.end_loop(open);
        Ok(())
    }

    /// Runs `body` for every coordinate `base + 0..counts`, with `lanes` neighbours along
    /// `lane_axis` at once. The last, partial vector runs under a mask.
    pub(crate) fn nest(
        &mut self,
        base: &[Dim],
        counts: &[Dim],
        lane_axis: Option<usize>,
        lanes: u32,
        body: &mut dyn FnMut(&mut Self, &[Dim]) -> Result<()>,
    ) -> Result<()> {
        self.site += 1;
        let order: Vec<usize> = (0..counts.len()).filter(|d| Some(*d) != lane_axis).collect();
        let mut coords = base.to_vec();
        let written = self.nest_level(base, counts, &order, lane_axis, lanes, &mut coords, body);
        self.split = None;
        written
    }

    #[allow(clippy::too_many_arguments, reason = "the recursion carries the whole nest")]
    fn nest_level(
        &mut self,
        base: &[Dim],
        counts: &[Dim],
        order: &[usize],
        lane_axis: Option<usize>,
        lanes: u32,
        coords: &mut Vec<Dim>,
        body: &mut dyn FnMut(&mut Self, &[Dim]) -> Result<()>,
    ) -> Result<()> {
        if let Some((&axis, rest)) = order.split_first() {
            let innermost = self.split.take_if(|_| rest.is_empty());
            let most = lane_axis.map_or(1, |a| self.facts.bounds(&counts[a]).max);
            let probe = innermost.map(|t| (t, self.probe(base, coords, axis, lane_axis, most)));
            let mut inner = |e: &mut Self, x: Dim| {
                coords[axis] = &base[axis] + x;
                e.nest_level(base, counts, rest, lane_axis, lanes, coords, body)
            };
            return match probe {
                Some((t, at)) => self.counted_inside(&counts[axis], axis, t, &at, &mut inner),
                None => self.counted(&counts[axis], &mut inner),
            };
        }
        let Some(axis) = lane_axis.filter(|_| lanes > 1) else {
            return match lane_axis {
                None => body(self, coords),
                Some(axis) => self.counted(&counts[axis], &mut |e, x| {
                    coords[axis] = &base[axis] + x;
                    body(e, coords)
                }),
            };
        };
        let start = base[axis].clone();
        self.vectors(&counts[axis], lanes, &mut |e, x| {
            coords[axis] = &start + x;
            body(e, coords)
        })
    }

    /// Runs `body` for `0..count` in vectors of `lanes`; `x` is the coordinate of each lane.
    pub(crate) fn vectors(
        &mut self,
        count: &Dim,
        lanes: u32,
        body: &mut dyn FnMut(&mut Self, Dim) -> Result<()>,
    ) -> Result<()> {
        let w = i64::from(lanes);
        let count = self.facts.simplify(count);
        let whole = self.facts.simplify(&count.floor_div(&Dim::new(w)));
        let rest = self.facts.simplify(&count.modulo(&Dim::new(w)));
        self.facts.declare(LANE, Range { min: 0, max: w - 1 }, vec![]);
        let outer = (self.lanes, self.mask.take());
        if !whole.is(0) {
            self.counted(&whole, &mut |e, v| {
                let name = e.symbol();
                e.facts.define(&name, uppers(&count), v * w + Dim::sym(LANE));
                e.lanes = lanes;
                e.push_scope();
                body(e, Dim::sym(name))?;
                e.pop_scope();
                e.lanes = outer.0;
                Ok(())
            })?;
        }
        if !rest.is(0) {
            let left = self.dim(&rest);
            let guard = rest.as_const().is_none().then(|| {
                let some = self.c.t.ins(format_args!("icmp ne i64 {left}, 0"));
                let (yes, no) = (self.c.t.label(), self.c.t.label());
                self.c.t.br_if(&some, &yes, &no);
                self.c.t.place(&yes);
                no
            });
            self.push_scope();
            let name = self.symbol();
            self.facts.define(&name, uppers(&count), &whole * w + Dim::sym(LANE));
            self.lanes = lanes;
            let numbers = self.lane_numbers();
            let limit = match rest.as_const() {
                Some(_) => splat_lit("i64", &left, lanes),
                None => self.c.splat("i64", &left, lanes),
            };
            let mask = self.c.cmp("ult", "i64", lanes, &numbers, &limit);
            self.mask = Some(mask);
            body(self, Dim::sym(name))?;
            self.pop_scope();
            self.mask = None;
            self.lanes = outer.0;
            if let Some(no) = guard {
                self.c.t.br(&no);
                self.c.t.place(&no);
            }
        }
        (self.lanes, self.mask) = outer;
        Ok(())
    }
}

fn is_zero(value: Value) -> bool {
    matches!(value, Value::Int(0)) || matches!(value, Value::Float(v) if v.to_bits() == 0)
}

/// The coefficient of `LANE`: 0 and 1 are cheap, everything else is not.
pub(crate) fn lane_coefficient(offset: &Dim) -> Option<Dim> {
    if !mentions(offset, LANE) {
        return Some(Dim::new(0));
    }
    linear_in(offset, LANE).map(|(c, _)| c)
}
