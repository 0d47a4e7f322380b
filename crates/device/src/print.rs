//! Prints device programs, for people: reports of the rules and of the checker show these lines.
//!
//! Declarations come first (tensor maps, shared memory, barriers, rings, fragments), then `setup`, the
//! roles and `teardown`. A tile in shared memory is `buffer[slot][row +rows, col +cols]`, a barrier
//! `barrier[slot]`, a range of a fragment's columns `frag[:, col +cols]`; `before stage` is the slot
//! before a ring position, or the pass before. There is no parser: programs are made by lowering.
//!
//! Printing never fails: an id without its entity prints as `?s7`.

use crate::ir::*;
use crate::lines::LineStep;
use std::fmt::{self, Display, Write};
use tilewright_base::DType;
use tilewright_expr::Value;
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Access, Compare, ParamId, ReduceKind};

impl Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device @{}(", self.name)?;
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
        write!(f, ")\n    for {}", self.arch.name())?;
        if !self.symbols.is_empty() {
            let symbols: Vec<String> = self
                .symbols
                .iter()
                .map(|s| match s.range.max {
                    i64::MAX => format!("{} in {}..", s.name, s.range.min),
                    max => format!("{} in {}..={max}", s.name, s.range.min),
                })
                .collect();
            write!(f, " sizes({})", symbols.join(", "))?;
        }
        let persistent = if self.persistent { " persistent" } else { "" };
        writeln!(f, "\n    items({}){persistent} {{", self.items)?;
        let (threads, cluster, blocks) = (self.threads, self.cluster, self.blocks_per_sm);
        writeln!(f, "  block of {threads} threads, cluster of {cluster}, {blocks} per processor")?;
        let mut out = String::new();
        self.declarations(&mut out)?;
        self.block_text("setup", &self.setup, &mut out)?;
        for role in &self.roles {
            let first = role.first_warp;
            let last = first.saturating_add(role.warps.saturating_mul(role.instances));
            write!(out, "  role {} {} in {}", role.name, role.instance, role.instances)?;
            write!(out, " warps {first}..{last}")?;
            if role.single_thread {
                out.push_str(" one thread");
            }
            if let Some(registers) = role.registers {
                write!(out, " registers {registers}")?;
            }
            out.push_str(" {\n");
            Printer { program: self, out: &mut out }.block(&role.body, 2)?;
            out.push_str("  }\n");
        }
        self.block_text("teardown", &self.teardown, &mut out)?;
        write!(f, "{out}}}")
    }
}

impl Program {
    fn declarations(&self, out: &mut String) -> fmt::Result {
        for (_, m) in self.maps.iter() {
            let (param, swizzle) = (param_name(self, m.param), m.swizzle);
            write!(out, "  map {} = {param} box {:?}", m.name, m.box_shape)?;
            let tf32 = if m.tf32 { " tf32" } else { "" };
            write!(out, " contiguous {} swizzle {swizzle}{tf32}", m.contiguous)?;
            if let Some(Windows { size: [h, w], outputs: [r, c], steps, before }) = &m.windows {
                write!(out, " windows {r} x {c} of {h} x {w} steps {steps:?} before {before:?}")?;
            }
            writeln!(out)?;
        }
        for (_, s) in self.smem.iter() {
            writeln!(out, "  smem {} = {s}", s.name)?;
        }
        for (_, b) in self.barriers.iter() {
            writeln!(out, "  barrier {} x{} arrivals {}", b.name, b.slots, b.arrivals)?;
        }
        for (_, r) in self.rings.iter() {
            writeln!(out, "  ring {} x{}", r.name, r.stages)?;
        }
        for (_, frag) in self.frags.iter() {
            writeln!(out, "  frag {} = {frag}", frag.name)?;
        }
        for (_, s) in self.shelves.iter() {
            write!(out, "  shelf {} = {}[{},{}]", s.name, s.dtype, s.rows, s.cols)?;
            writeln!(out, " x{} vector {}", s.slots, s.vector)?;
        }
        Ok(())
    }

    fn block_text(&self, name: &str, block: &[Stmt], out: &mut String) -> fmt::Result {
        if block.is_empty() {
            return Ok(());
        }
        writeln!(out, "  {name} {{")?;
        Printer { program: self, out: &mut *out }.block(block, 2)?;
        out.push_str("  }\n");
        Ok(())
    }

    /// One step as it stands in the program's text, without the steps inside of it.
    pub fn step_text(&self, stmt: &Stmt) -> String {
        let mut out = String::new();
        let mut printer = Printer { program: self, out: &mut out };
        match stmt {
            Stmt::For { .. } | Stmt::Unroll { .. } | Stmt::If { .. } | Stmt::Once(_) => {
                printer.head(stmt);
            }
            _ => printer.out.push_str(&Printer::simple(self, stmt)),
        }
        out
    }
}

impl Display for Swizzle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Swizzle::None => f.write_str("none"),
            other => write!(f, "{}", other.span_bytes()),
        }
    }
}

impl Display for Smem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axis = if self.contiguous == 0 { "rows" } else { "cols" };
        write!(f, "{}[{},{}] {axis}-contiguous", self.dtype, self.rows, self.cols)?;
        write!(f, " x{} swizzle {}", self.slots, self.swizzle)
    }
}

impl Display for Frag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.extent {
            Extent::Tile => write!(f, "{}[{},{}]", self.dtype, self.rows, self.cols)?,
            Extent::PerRow => {
                write!(f, "{}[{}] per row of [{},{}]", self.dtype, self.rows, self.rows, self.cols)?
            }
            Extent::PerCol => write!(
                f,
                "{}[{}] per column of [{},{}]",
                self.dtype, self.cols, self.rows, self.cols
            )?,
        }
        match self.spread {
            Spread::Wgmma => f.write_str(" wgmma"),
            Spread::MmaSync { warps_m, warps_n } => {
                write!(f, " mma.sync {warps_m}x{warps_n} warps")
            }
            Spread::Lines { lanes, vector, threads } => {
                write!(f, " lines of {lanes} lanes x{vector} over {threads} threads")
            }
            Spread::Outer { threads_m, threads_n, block_m, block_n } => {
                write!(f, " outer {threads_m}x{threads_n} threads of {block_m}x{block_n}")
            }
        }
    }
}

impl Display for Cond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compare = match self.compare {
            Compare::Lt => "<",
            Compare::Le => "<=",
            Compare::Eq => "==",
            Compare::Ne => "!=",
        };
        write!(f, "{} {compare} {}", self.lhs, self.rhs)
    }
}

fn list<T: Display>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    items.join(",")
}

fn value_text(value: Value, dtype: Option<DType>) -> String {
    match value {
        Value::Float(v) if v.is_nan() => "nan".to_string(),
        Value::Float(v) => format!("{v:?}"),
        Value::Int(v) if dtype == Some(DType::U64) => (v as u64).to_string(),
        Value::Int(v) => v.to_string(),
    }
}

fn param_name(program: &Program, param: ParamId) -> String {
    program.params.get(param).map_or_else(|| format!("?{param}"), |p| format!("%{}", p.name))
}

/// The declared name, or the id with a question mark.
fn reduce_text(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Sum => "sum",
        ReduceKind::Prod => "prod",
        ReduceKind::Max => "max",
        ReduceKind::Min => "min",
    }
}

macro_rules! name {
    ($list:expr, $id:expr) => {
        $list.get($id).map_or_else(|| format!("?{}", $id), |x| x.name.clone())
    };
}

struct Printer<'a> {
    program: &'a Program,
    out: &'a mut String,
}

impl Printer<'_> {
    fn block(&mut self, block: &[Stmt], depth: usize) -> fmt::Result {
        let pad = "  ".repeat(depth);
        for stmt in block {
            match stmt {
                Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                    self.out.push_str(&pad);
                    self.head(stmt);
                    self.out.push_str(" {\n");
                    self.block(body, depth + 1)?;
                    writeln!(self.out, "{pad}}}")?;
                }
                Stmt::If { then, otherwise, .. } => {
                    self.out.push_str(&pad);
                    self.head(stmt);
                    self.out.push_str(" {\n");
                    self.block(then, depth + 1)?;
                    if !otherwise.is_empty() {
                        writeln!(self.out, "{pad}}} else {{")?;
                        self.block(otherwise, depth + 1)?;
                    }
                    writeln!(self.out, "{pad}}}")?;
                }
                _ => writeln!(self.out, "{pad}{}", Self::simple(self.program, stmt))?,
            }
        }
        Ok(())
    }

    /// The first line of a step that holds others.
    fn head(&mut self, stmt: &Stmt) {
        let text = match stmt {
            Stmt::For { var, lo, hi, step, .. } if step.is(1) => {
                format!("for {var} in {lo} .. {hi}")
            }
            Stmt::For { var, lo, hi, step, .. } => format!("for {var} in {lo} .. {hi} step {step}"),
            Stmt::Unroll { var, count, .. } => format!("unroll {var} in 0 .. {count}"),
            Stmt::If { cond, .. } => format!("if {cond}"),
            _ => "once".to_string(),
        };
        self.out.push_str(&text);
    }

    fn shelf(p: &Program, shelf: &crate::ShelfRef) -> String {
        format!("{}[{}]", name!(p.shelves, shelf.shelf), shelf.slot)
    }

    fn slot(p: &Program, slot: &Slot) -> String {
        match slot {
            Slot::Ring(ring) => name!(p.rings, *ring),
            Slot::Before(ring) => format!("before {}", name!(p.rings, *ring)),
            Slot::At(at) => at.to_string(),
        }
    }

    fn barrier(p: &Program, barrier: &BarrierRef) -> String {
        format!("{}[{}]", name!(p.barriers, barrier.barrier), Self::slot(p, &barrier.slot))
    }

    fn tile(p: &Program, tile: &SmemTile) -> String {
        let SmemTile { smem, slot, row, col, rows, cols } = tile;
        let slot = Self::slot(p, slot);
        format!("{}[{slot}][{row} +{rows}, {col} +{cols}]", name!(p.smem, *smem))
    }

    fn frag(p: &Program, frag: &FragRef) -> String {
        let name = name!(p.frags, frag.frag);
        match frag.cols {
            None if frag.col.is(0) => name,
            None => format!("{name}[:, {} ..]", frag.col),
            Some(cols) => format!("{name}[:, {} +{cols}]", frag.col),
        }
    }

    fn global(
        p: &Program,
        param: ParamId,
        at: &[Dim],
        axes: (Option<usize>, Option<usize>),
    ) -> String {
        let axis = |a: Option<usize>| a.map_or("-".to_string(), |a| a.to_string());
        let at: Vec<String> = at.iter().map(Dim::to_string).collect();
        let (rows, cols) = (axis(axes.0), axis(axes.1));
        format!("{}[{}] axes ({rows},{cols})", param_name(p, param), at.join(", "))
    }

    fn boxed(p: &Program, map: MapId, at: &[Dim]) -> String {
        let at: Vec<String> = at.iter().map(Dim::to_string).collect();
        format!("{}[{}]", name!(p.maps, map), at.join(", "))
    }

    fn reach(reach: &Reach) -> String {
        match reach {
            Reach::Own => String::new(),
            Reach::Cta(cta) => format!(" of block {cta}"),
            Reach::All => " of all blocks".to_string(),
            Reach::Row(width) => format!(" of its row of {width} blocks"),
            Reach::Column(width) => format!(" of its column between rows of {width} blocks"),
            Reach::Cross(width) => format!(" of its row of {width} blocks and its column"),
        }
    }

    fn line_step(p: &Program, step: &LineStep) -> String {
        let of_param = |param: &ParamId| p.params.get(*param).map(|p| p.dtype);
        match step {
            LineStep::Pick { dst, param, at, axes, steps, rows, fill, vector } => {
                let (dst, from) = (Self::frag(p, dst), Self::global(p, *param, at, *axes));
                let rows = rows.as_ref().map_or(String::new(), |(axis, rows)| {
                    format!(" axis {axis} by {}", Self::frag(p, rows))
                });
                let (fill, (r, c)) = (value_text(*fill, of_param(param)), *steps);
                format!("{dst} = pick {from}{rows} steps ({r},{c}) fill {fill} vector {vector}")
            }
            LineStep::Turn { dst, param, at, axes, fill, vector } => {
                let from = Self::global(p, *param, at, (Some(axes.0), Some(axes.1)));
                let (dst, fill) = (Self::frag(p, dst), value_text(*fill, of_param(param)));
                format!("{dst} = turn {from} fill {fill} vector {vector}")
            }
            LineStep::Fetch { to, param, at, axes, fill } => {
                let from = Self::global(p, *param, at, *axes);
                let fill = value_text(*fill, of_param(param));
                format!("{} <- fetch {from} fill {fill}", Self::shelf(p, to))
            }
            LineStep::Recall { dst, from } => {
                format!("{} = recall {}", Self::frag(p, dst), Self::shelf(p, from))
            }
            LineStep::Unpack { dst, src } => {
                format!("{} = unpack {}", Self::frag(p, dst), Self::frag(p, src))
            }
            LineStep::ArgReduce { dst, kind, src, limit, last } => {
                let which = if *last { "last" } else { "first" };
                let (dst, src, kind) = (Self::frag(p, dst), Self::frag(p, src), reduce_text(*kind));
                format!("{dst} = {which} arg{kind} {src} limit {limit}")
            }
            LineStep::Scan { dst, kind, src, exclusive, reverse } => {
                let exclusive = if *exclusive { " exclusive" } else { "" };
                let reverse = if *reverse { " reverse" } else { "" };
                let (dst, src, kind) = (Self::frag(p, dst), Self::frag(p, src), reduce_text(*kind));
                format!("{dst} = scan {kind} {src}{exclusive}{reverse}")
            }
            LineStep::Random { dst, seed, start, steps: (r, c) } => {
                let dst = Self::frag(p, dst);
                format!("{dst} = random seed {seed} from {start} steps ({r},{c})")
            }
            LineStep::Add { param, at, axes, src } => {
                format!("add {}, {}", Self::global(p, *param, at, *axes), Self::frag(p, src))
            }
            LineStep::Prefetch { param, at, row, rows, bytes } => {
                let from = Self::global(p, *param, at, (Some(*row), None));
                format!("prefetch {rows} lines of {bytes} bytes of {from}")
            }
            LineStep::Dot { acc, a, b } => {
                let [acc, a, b] = [acc, a, b].map(|f| Self::frag(p, f));
                format!("{acc} += {a} * {b} by fours")
            }
            LineStep::TopK { x, values, places, row, count, largest, lanes, vector } => {
                let [x, values, places] =
                    [x, values, places].map(|id| p.params.get(*id).map_or("?", |p| &*p.name));
                let order = if *largest { "largest" } else { "smallest" };
                format!(
                    "{values}, {places} = {count} {order} of {x} from row {row} by {lanes} lanes x{vector}"
                )
            }
            LineStep::AcrossCluster { frag, kind } => {
                let frag = Self::frag(p, frag);
                format!("{frag} = {} {frag} across the cluster", reduce_text(*kind))
            }
        }
    }

    fn simple(p: &Program, stmt: &Stmt) -> String {
        let dtype = |f: &FragRef| p.frags.get(f.frag).map(|f| f.dtype);
        match stmt {
            Stmt::Let { name, value } => format!("let {name} = {value}"),
            Stmt::For { .. } | Stmt::Unroll { .. } | Stmt::If { .. } | Stmt::Once(_) => {
                String::new()
            }
            Stmt::BarrierInit => "init barriers".to_string(),
            Stmt::FenceBarrierInit => "fence init".to_string(),
            Stmt::SyncBlock => "sync block".to_string(),
            Stmt::SyncCluster => "sync cluster".to_string(),
            Stmt::NamedSync { id, threads } => format!("sync named {id} threads {threads}"),
            Stmt::NamedArrive { id, threads } => format!("arrive named {id} threads {threads}"),
            Stmt::Wait { barrier, phase } => {
                let phase = match phase {
                    Phase::Of(ring) => format!("phase of {}", name!(p.rings, *ring)),
                    Phase::Before(ring) => format!("phase before {}", name!(p.rings, *ring)),
                    Phase::Parity(parity) => format!("parity {parity}"),
                };
                format!("wait {} {phase}", Self::barrier(p, barrier))
            }
            Stmt::Arrive { barrier, reach } => {
                format!("arrive {}{}", Self::barrier(p, barrier), Self::reach(reach))
            }
            Stmt::ExpectBytes { barrier, bytes } => {
                format!("expect {} bytes {bytes}", Self::barrier(p, barrier))
            }
            Stmt::Advance { ring, by } => format!("advance {} by {by}", name!(p.rings, *ring)),
            Stmt::TmaLoad { map, at, to, barrier, reach, cache } => {
                let (from, to) = (Self::boxed(p, *map, at), Self::tile(p, to));
                let (barrier, reach) = (Self::barrier(p, barrier), Self::reach(reach));
                let kept = match cache {
                    CachePolicy::Normal => "",
                    CachePolicy::EvictFirst => " evict first",
                    CachePolicy::EvictLast => " evict last",
                };
                format!("tma load {to}{reach} <- {from} on {barrier}{kept}")
            }
            Stmt::TmaStore { map, at, from, add } => {
                let verb = if *add { "add" } else { "store" };
                format!("tma {verb} {} <- {}", Self::boxed(p, *map, at), Self::tile(p, from))
            }
            Stmt::TmaCommit => "tma commit".to_string(),
            Stmt::TmaWait { pending, reads_only } => {
                format!("tma wait {pending}{}", if *reads_only { " read" } else { "" })
            }
            Stmt::FenceAsync => "fence async".to_string(),
            Stmt::CopyIn { param, at, axes, to, vector, ends } => {
                let ends = if *ends { " ends within" } else { "" };
                let from = Self::global(p, *param, at, (Some(axes.0), Some(axes.1)));
                format!("copy {} <- {from} vector {vector}{ends}", Self::tile(p, to))
            }
            Stmt::CopyCommit => "copy commit".to_string(),
            Stmt::CopyWait { pending } => format!("copy wait {pending}"),
            Stmt::WgmmaFence => "wgmma fence".to_string(),
            Stmt::Wgmma { acc, a, b, turned, zero_if } => {
                let a = match a {
                    WgmmaA::Smem(tile) => Self::tile(p, tile),
                    WgmmaA::Frag(frag) => Self::frag(p, frag),
                };
                let zero = zero_if.as_ref().map_or(String::new(), |c| format!(" zero if {c}"));
                let turned = if *turned { " turned" } else { "" };
                format!("wgmma {} += {a} * {}{turned}{zero}", Self::frag(p, acc), Self::tile(p, b))
            }
            Stmt::WgmmaCommit => "wgmma commit".to_string(),
            Stmt::WgmmaWait { pending } => format!("wgmma wait {pending}"),
            Stmt::Mma { acc, a, b, split } => {
                let a = match a {
                    WgmmaA::Smem(tile) => Self::tile(p, tile),
                    WgmmaA::Frag(frag) => Self::frag(p, frag),
                };
                let parts = if *split { " in two parts each" } else { "" };
                format!("mma {} += {a} * {}{parts}", Self::frag(p, acc), Self::tile(p, b))
            }
            Stmt::Fill { dst, value } => {
                format!("{} = fill {}", Self::frag(p, dst), value_text(*value, dtype(dst)))
            }
            Stmt::Map { dst, func, args } => {
                let args: Vec<String> = args.iter().map(|a| Self::frag(p, a)).collect();
                format!("{} = map({}) {func}", Self::frag(p, dst), args.join(", "))
            }
            Stmt::Iota { dst, axis, start } => {
                format!("{} = iota axis {axis} from {start}", Self::frag(p, dst))
            }
            Stmt::Reduce { dst, kind, src, accumulate } => {
                let kind = reduce_text(*kind);
                let with = if *accumulate { " accumulate" } else { "" };
                format!("{} = reduce {kind} {}{with}", Self::frag(p, dst), Self::frag(p, src))
            }
            Stmt::Load { dst, param, at, axes, fill, vector } => {
                let (dst, from) = (Self::frag(p, dst), Self::global(p, *param, at, *axes));
                let dtype = p.params.get(*param).map(|p| p.dtype);
                format!("{dst} = load {from} fill {} vector {vector}", value_text(*fill, dtype))
            }
            Stmt::Store { param, at, axes, src, vector } => {
                let to = Self::global(p, *param, at, *axes);
                format!("store {to}, {} vector {vector}", Self::frag(p, src))
            }
            Stmt::ToSmem { to, src } => {
                format!("{} <- {}", Self::tile(p, to), Self::frag(p, src))
            }
            Stmt::FromSmem { dst, from } => {
                format!("{} = {}", Self::frag(p, dst), Self::tile(p, from))
            }
            Stmt::Line(step) => Self::line_step(p, step),
            Stmt::GridWait => "grid wait".to_string(),
            Stmt::GridRelease => "grid release".to_string(),
        }
    }
}
