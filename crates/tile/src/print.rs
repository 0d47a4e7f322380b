//! Prints kernels in the text form that `parse.rs` reads; the crate's head shows an example.
//!
//! A tile prints as `%name`, or `%3` when it has no name: its place in the order in which the text
//! defines tiles (the results of a loop before what it carries, that before its body), which is its
//! id in a kernel that was read from text. What a reader can infer is left out: steps of 1, a fill
//! of zero, operands of a map that run along all axes in order.
//!
//! Printing never fails, whatever is wrong with the kernel: the verifier's reports show kernels.
//! A tile that nothing defines prints as `%?7`, a parameter that does not exist as `%?p7`.

use crate::ir::*;
use crate::schedule::{MatrixUnit, Schedule};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use tilewright_base::DType;
use tilewright_expr::Value;
use tilewright_layout::{Dim, Layout};

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel @{}(", self.name)?;
        for (i, (_, param)) in self.params.iter().enumerate() {
            f.write_str(if i > 0 { ", " } else { "" })?;
            f.write_str(match param.access {
                Access::In => "",
                Access::Out => "out ",
                Access::InOut => "inout ",
            })?;
            let shape = param.layout.shape();
            write!(f, "%{}: {}[{}]", param.name, param.dtype, list(&shape))?;
            if param.layout != Layout::row_major(&shape) {
                write!(f, " at {}", param.layout)?;
            }
        }
        f.write_str(")")?;
        if !self.symbols.is_empty() {
            let symbols: Vec<String> = self
                .symbols
                .iter()
                .map(|s| match s.range.max {
                    i64::MAX => format!("{} in {}..", s.name, s.range.min),
                    max => format!("{} in {}..={max}", s.name, s.range.min),
                })
                .collect();
            write!(f, "\n    sizes({})", symbols.join(", "))?;
        }
        let grid: Vec<String> =
            self.grid.iter().map(|g| format!("{} in {}", g.name, g.extent)).collect();
        let tiles: Vec<String> = self
            .tiles
            .iter()
            .map(|t| {
                let bounds = self.bounds_of(t).map(|b| format!(" {} {}", b.word(), b.number()));
                format!("{t}{}", bounds.collect::<String>())
            })
            .collect();
        writeln!(f, "\n    tile({}) grid({}) {{", tiles.join(", "), grid.join(", "))?;
        let mut text = String::new();
        Printer { kernel: self, names: tile_names(self), out: &mut text }.block(&self.body, 1)?;
        write!(f, "{text}}}")
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, size) in &self.tiles {
            write!(f, "{name}={size} ")?;
        }
        let c = &self.cpu;
        write!(
            f,
            "vector={} mma={}x{} unroll={} chains={}",
            c.vector_bits, c.mma_rows, c.mma_vectors, c.unroll_k, c.reduce_chains
        )?;
        for (name, set) in [("stream", c.stream), ("ahead", c.ahead)] {
            if set {
                write!(f, " {name}=1")?;
            }
        }
        if c.jam != 1 {
            write!(f, " jam={}", c.jam)?;
        }
        match c.unit {
            MatrixUnit::Fma => Ok(()),
            unit => write!(f, " unit={}", unit.name()),
        }
    }
}

fn list(dims: &[Dim]) -> String {
    let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
    dims.join(",")
}

/// A constant in a tile or parameter of this type; floats always show that they are floats.
fn value_text(value: Value, dtype: DType) -> String {
    match value {
        Value::Float(v) if v.is_nan() => "nan".to_string(),
        Value::Float(v) => format!("{v:?}"),
        Value::Int(v) if dtype == DType::U64 => (v as u64).to_string(),
        Value::Int(v) => v.to_string(),
    }
}

/// How every tile that is defined somewhere prints; see the module's head.
pub(crate) fn tile_names(kernel: &Kernel) -> BTreeMap<TileId, String> {
    let mut order = Vec::new();
    defined(&kernel.body, &mut order);
    let mut names = BTreeMap::new();
    for (number, &id) in order.iter().enumerate() {
        let name = match kernel.values.get(id) {
            Some(info) if !info.name.is_empty() => format!("%{}", info.name),
            _ => format!("%{number}"),
        };
        names.entry(id).or_insert(name);
    }
    names
}

/// The tiles that a block defines, in the order of the text.
fn defined(block: &Block, out: &mut Vec<TileId>) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(id, _) => out.push(*id),
            Stmt::Store { .. } | Stmt::AtomicAdd { .. } => {}
            Stmt::For(l) => {
                out.extend(&l.results);
                out.extend(l.carry.iter().map(|c| c.0));
                defined(&l.body, out);
            }
            Stmt::If(b) => {
                out.extend(&b.results);
                defined(&b.then, out);
                defined(&b.otherwise, out);
            }
        }
    }
}

fn kind_text(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Sum => "sum",
        ReduceKind::Prod => "prod",
        ReduceKind::Max => "max",
        ReduceKind::Min => "min",
    }
}

struct Printer<'a> {
    kernel: &'a Kernel,
    names: BTreeMap<TileId, String>,
    out: &'a mut String,
}

impl Printer<'_> {
    fn name(&self, tile: TileId) -> String {
        self.names.get(&tile).cloned().unwrap_or_else(|| format!("%?{}", tile.0))
    }

    fn names(&self, tiles: &[TileId]) -> String {
        let names: Vec<String> = tiles.iter().map(|&t| self.name(t)).collect();
        names.join(", ")
    }

    fn at(&self, param: ParamId, index: &[Dim]) -> String {
        let index: Vec<String> = index.iter().map(Dim::to_string).collect();
        match self.kernel.params.get(param) {
            Some(info) => format!("%{}[{}]", info.name, index.join(", ")),
            None => format!("%?{param}[{}]", index.join(", ")),
        }
    }

    fn operand(&self, operand: &Operand, rank: usize) -> String {
        let plain: Vec<usize> = (0..rank).collect();
        if operand.along == plain {
            return self.name(operand.tile);
        }
        let along: Vec<String> = operand.along.iter().map(usize::to_string).collect();
        format!("{} along ({})", self.name(operand.tile), along.join(","))
    }

    fn block(&mut self, block: &Block, depth: usize) -> fmt::Result {
        for stmt in &block.stmts {
            let pad = "  ".repeat(depth);
            match stmt {
                Stmt::Let(id, op) => {
                    let text = self.op(*id, op);
                    write!(self.out, "{pad}{} = {text}", self.name(*id))?;
                    match self.kernel.values.get(*id) {
                        Some(info) => writeln!(self.out, " : {}", info.ty)?,
                        None => self.out.push('\n'),
                    }
                }
                Stmt::Store { param, index, value } => {
                    let (to, value) = (self.at(*param, index), self.name(*value));
                    writeln!(self.out, "{pad}store {to}, {value}")?;
                }
                Stmt::AtomicAdd { param, index, value } => {
                    let (to, value) = (self.at(*param, index), self.name(*value));
                    writeln!(self.out, "{pad}atomic_add {to}, {value}")?;
                }
                Stmt::For(l) => {
                    let carry: Vec<String> = l
                        .carry
                        .iter()
                        .map(|(inner, init)| {
                            format!("{} = {}", self.name(*inner), self.name(*init))
                        })
                        .collect();
                    let results = match l.results.is_empty() {
                        true => String::new(),
                        false => format!("{} = ", self.names(&l.results)),
                    };
                    let carry = match carry.is_empty() {
                        true => String::new(),
                        false => format!(" carry({})", carry.join(", ")),
                    };
                    writeln!(
                        self.out,
                        "{pad}{results}for {} in {} .. {}{carry} {{",
                        l.var, l.lo, l.hi
                    )?;
                    self.block(&l.body, depth + 1)?;
                    self.end(&l.yields, depth)?;
                    writeln!(self.out, "{pad}}}")?;
                }
                Stmt::If(b) => {
                    let compare = match b.compare {
                        Compare::Lt => "<",
                        Compare::Le => "<=",
                        Compare::Eq => "==",
                        Compare::Ne => "!=",
                    };
                    let results = match b.results.is_empty() {
                        true => String::new(),
                        false => format!("{} = ", self.names(&b.results)),
                    };
                    writeln!(self.out, "{pad}{results}if {} {compare} {} {{", b.lhs, b.rhs)?;
                    self.block(&b.then, depth + 1)?;
                    self.end(&b.then_yields, depth)?;
                    writeln!(self.out, "{pad}}} else {{")?;
                    self.block(&b.otherwise, depth + 1)?;
                    self.end(&b.otherwise_yields, depth)?;
                    writeln!(self.out, "{pad}}}")?;
                }
            }
        }
        Ok(())
    }

    fn end(&mut self, yields: &[TileId], depth: usize) -> fmt::Result {
        if yields.is_empty() {
            return Ok(());
        }
        let text = self.names(yields);
        writeln!(self.out, "{}yield {text}", "  ".repeat(depth + 1))
    }

    fn op(&self, id: TileId, op: &TileOp) -> String {
        let limit = |limit: &Option<Dim>| match limit {
            Some(limit) => format!(" limit {limit}"),
            None => String::new(),
        };
        let fill = |param: &ParamId, fill: &Value| match fill {
            Value::Float(v) if v.to_bits() == 0 => String::new(),
            Value::Int(0) => String::new(),
            other => {
                let dtype = self.kernel.params.get(*param).map_or(DType::F64, |p| p.dtype);
                format!(" fill {}", value_text(*other, dtype))
            }
        };
        let (dtype, rank) = match self.kernel.values.get(id) {
            Some(info) => (info.ty.dtype, info.ty.shape.len()),
            None => (DType::F64, 0),
        };
        match op {
            TileOp::Full(value) => format!("full {}", value_text(*value, dtype)),
            TileOp::Load { param, index, steps, fill: outside } => {
                let steps = match steps.iter().all(|&s| s == 1) {
                    true => String::new(),
                    false => {
                        let steps: Vec<String> = steps.iter().map(i64::to_string).collect();
                        format!(" step ({})", steps.join(","))
                    }
                };
                format!("load {}{steps}{}", self.at(*param, index), fill(param, outside))
            }
            TileOp::Gather { param, axis, rows, index, fill: outside } => {
                let (from, rows) = (self.at(*param, index), self.name(*rows));
                format!("gather {from} axis {axis} rows {rows}{}", fill(param, outside))
            }
            TileOp::Map { func, args } => {
                let args: Vec<String> = args.iter().map(|a| self.operand(a, rank)).collect();
                format!("map({}) {func}", args.join(", "))
            }
            TileOp::Reduce { kind, x, axis, limit: l } => {
                format!("reduce {} {} axis {axis}{}", kind_text(*kind), self.name(*x), limit(l))
            }
            TileOp::ArgReduce { kind, x, axis, limit: l, last } => {
                let last = if *last { " last" } else { "" };
                format!("arg {} {} axis {axis}{}{last}", kind_text(*kind), self.name(*x), limit(l))
            }
            TileOp::Scan { kind, x, axis, exclusive, reverse } => {
                let exclusive = if *exclusive { " exclusive" } else { "" };
                let reverse = if *reverse { " reverse" } else { "" };
                format!(
                    "scan {} {} axis {axis}{exclusive}{reverse}",
                    kind_text(*kind),
                    self.name(*x)
                )
            }
            TileOp::Mma { acc, a, b, limit: l } => {
                format!("mma {}, {}, {}{}", self.name(*acc), self.name(*a), self.name(*b), limit(l))
            }
            TileOp::Permute { x, perm } => {
                let perm: Vec<String> = perm.iter().map(usize::to_string).collect();
                format!("permute {} ({})", self.name(*x), perm.join(","))
            }
            TileOp::Reshape(x) => format!("reshape {}", self.name(*x)),
            TileOp::Broadcast(x) => format!("broadcast {}", self.operand(x, rank)),
            TileOp::Iota { axis, start } => format!("iota axis {axis} from {start}"),
            TileOp::Random { seed, start } => format!("random seed {seed} from {start}"),
        }
    }
}
