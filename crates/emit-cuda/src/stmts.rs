//! Steps as C++ statements.
//!
//! Convention: a fragment `%acc` is the array `acc`, a buffer `%sA` the address `sA` of its first slot,
//! a barrier array `%full` the address `full`, a ring `%r` the object `r`. Loops over registers use `i`,
//! depth steps of the tensor cores `k`; names of the program never clash with these because the printer
//! adds `_` to one-letter names.

use crate::dims::Scope;
use crate::funcs::Funcs;
use crate::hits::columns;
use crate::products::{Products, unread};
use crate::walk::{names_of_integers, stmt_names, visit};
use crate::{Argument, memory_type};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{
    BarrierRef, CLUSTER, CLUSTERS, CTA, CachePolicy, Cond, Extent, Frag, FragId, FragRef, MapId,
    Phase, Program, Reach, RingId, Role, ShelfId, Slot, SmemTile, Spread, Stmt, THREAD, Windows,
    is_live,
};
use tilewright_expr::Value;
use tilewright_layout::{Dim, Range};
use tilewright_tile::{Compare, ParamId};

/// State of printing one program.
pub(crate) struct Printer<'a> {
    pub(crate) program: &'a Program,
    pub(crate) scope: Scope,
    funcs: Funcs,
    defines: BTreeSet<String>,
    pub(crate) pointers: BTreeSet<ParamId>,
    /// Fragments whose last rounding is left to the store.
    unrounded: BTreeSet<FragId>,
    /// Fragments of 16 bits that only feed `wgmma`: two elements a register.
    pub(crate) packed: BTreeSet<FragId>,
    /// What the products since the last commit touch, and the groups since the last complete wait or
    /// the start of the block of steps.
    group: BTreeSet<FragId>,
    groups: Vec<BTreeSet<FragId>>,
    out: String,
    indent: usize,
    /// The role whose body is being printed.
    pub(crate) role: Option<&'a Role>,
    /// Loops around the step that is being printed.
    pub(crate) loops: u32,
    /// Exchanges across the cluster printed so far.
    pub(crate) exchanges: u32,
    /// Inside [`Stmt::Once`]: one thread runs already.
    once: bool,
    smem_offsets: Vec<u32>,
    barrier_offsets: Vec<u32>,
    /// What rings and fragments are called: by their names, unless sizes or loops have them.
    ring_names: Vec<String>,
    frag_names: Vec<String>,
    /// Planes that are products of two others, as long as none of the three changes.
    pub(crate) products: Products,
    /// Fragments whose maps are not printed.
    unread: BTreeSet<FragId>,
    /// Fragments that hold numbers of columns.
    pub(crate) columns: BTreeSet<FragId>,
}

const ANY: Range = Range { min: 0, max: i32::MAX as i64 };

/// A name of the program as a C++ identifier.
pub(crate) fn identifier(name: &str) -> String {
    let clean: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if clean.len() == 1 { format!("{clean}_") } else { clean }
}

impl<'a> Printer<'a> {
    pub(crate) fn new(program: &'a Program) -> Printer<'a> {
        let mut at = 0;
        let smem_offsets = program
            .smem
            .iter()
            .map(|(_, s)| {
                let start = at;
                at += s.slot_bytes().next_multiple_of(1024) * s.slots;
                start
            })
            .collect();
        let barrier_offsets = program
            .barriers
            .iter()
            .map(|(_, b)| {
                let start = at;
                at += b.slots * 8;
                start
            })
            .collect();
        let mut scope = Scope::default();
        for symbol in &program.symbols {
            let range = Range { min: symbol.range.min, max: symbol.range.max };
            scope.bind(&symbol.name, symbol.name.to_string(), range);
        }
        let max = i64::from(program.cluster) - 1;
        scope.bind(&CTA.into(), "cta".into(), Range { min: 0, max });
        scope.bind(&CLUSTER.into(), "cluster".into(), ANY);
        scope.bind(&CLUSTERS.into(), "clusters".into(), ANY);
        scope.bind(&THREAD.into(), "(int)threadIdx.x".into(), ANY);
        let mut taken = names_of_integers(program);
        let mut fresh = |name: &str| {
            let mut name = identifier(name);
            while !taken.insert(name.clone()) {
                name.push('_');
            }
            name
        };
        let ring_names = program.rings.iter().map(|(_, r)| fresh(&r.name)).collect();
        let frag_names = program.frags.iter().map(|(_, f)| fresh(&f.name)).collect();
        let mut printer = Printer {
            program,
            scope,
            funcs: Funcs::default(),
            defines: BTreeSet::new(),
            pointers: BTreeSet::new(),
            unrounded: BTreeSet::new(),
            packed: BTreeSet::new(),
            group: BTreeSet::new(),
            groups: Vec::new(),
            out: String::new(),
            indent: 1,
            role: None,
            loops: 0,
            exchanges: 0,
            once: false,
            smem_offsets,
            barrier_offsets,
            ring_names,
            frag_names,
            products: Products::default(),
            unread: unread(program),
            columns: columns(program),
        };
        printer.unrounded = printer.find_unrounded();
        printer.packed = printer.find_packed();
        printer
    }

    /// Fragments of a narrow float that are only stored as that type: storing rounds anyway.
    fn find_unrounded(&self) -> BTreeSet<FragId> {
        let mut stored: BTreeMap<FragId, bool> = BTreeMap::new();
        let bodies = self.program.roles.iter().map(|r| &r.body);
        for body in bodies.chain([&self.program.setup, &self.program.teardown]) {
            visit(body, &mut |stmt| {
                let mut note = |frag: FragId, only_stored: bool| {
                    *stored.entry(frag).or_insert(true) &= only_stored;
                };
                match stmt {
                    Stmt::Store { src, param, .. } => note(
                        src.frag,
                        self.program.params[*param].dtype == self.program.frags[src.frag].dtype,
                    ),
                    Stmt::ToSmem { src, to } => note(
                        src.frag,
                        self.program.smem[to.smem].dtype == self.program.frags[src.frag].dtype,
                    ),
                    Stmt::Map { args, .. } => args.iter().for_each(|a| note(a.frag, false)),
                    Stmt::Reduce { src, .. } => note(src.frag, false),
                    Stmt::Wgmma { acc, a, .. } | Stmt::Mma { acc, a, .. } => {
                        note(acc.frag, false);
                        if let tilewright_device::WgmmaA::Frag(a) = a {
                            note(a.frag, true);
                        }
                    }
                    Stmt::Line(step) => {
                        step.reads().into_iter().for_each(|f| note(f.frag, false));
                    }
                    _ => {}
                }
            });
        }
        stored
            .into_iter()
            .filter(|(frag, only)| {
                let dtype = self.program.frags[*frag].dtype;
                *only && dtype.is_float() && dtype.bits() < 32
            })
            .map(|(frag, _)| frag)
            .collect()
    }

    /// Fragments of 16 bits that maps write and only `wgmma` reads.
    fn find_packed(&self) -> BTreeSet<FragId> {
        let (mut left, mut other) = (BTreeSet::new(), BTreeSet::new());
        for role in &self.program.roles {
            visit(&role.body, &mut |stmt| match stmt {
                Stmt::Wgmma { acc, a, .. } => {
                    other.insert(acc.frag);
                    if let tilewright_device::WgmmaA::Frag(a) = a {
                        left.insert(a.frag);
                    }
                }
                Stmt::Map { dst, args, .. } => {
                    let frag = &self.program.frags[dst.frag];
                    if frag.rows != 64 && self.cols(dst) != frag.cols {
                        other.insert(dst.frag);
                    }
                    other.extend(args.iter().map(|a| a.frag));
                }
                _ => {
                    let mut frags = BTreeSet::new();
                    stmt_names(stmt, &mut BTreeSet::new(), &mut frags);
                    other.extend(frags);
                }
            });
        }
        left.difference(&other).copied().collect()
    }

    pub(crate) fn line(&mut self, text: &str) {
        if text.starts_with('#') {
            self.out.push_str(text);
        } else {
            let _ = write!(self.out, "{}{text}", "  ".repeat(self.indent));
        }
        self.out.push('\n');
    }

    /// Adds a definition before the kernel, once.
    pub(crate) fn define(&mut self, text: String) {
        self.defines.insert(text);
    }

    pub(crate) fn arguments(&self) -> Vec<Argument> {
        let maps = self.program.maps.iter().map(|(id, _)| Argument::Map(id));
        let pointers = self.pointers.iter().map(|p| Argument::Pointer(*p));
        let sizes = self.program.symbols.iter().map(|s| match is_live(&s.name) {
            true => Argument::Live(s.name.to_string()),
            false => Argument::Size(s.name.to_string()),
        });
        maps.chain(pointers).chain(sizes).collect()
    }

    pub(crate) fn definitions(&self) -> String {
        let mut out = String::new();
        if !self.defines.is_empty() {
            out.push_str("\nnamespace {\nusing namespace tw;\n");
            for define in &self.defines {
                let _ = writeln!(out, "{define}");
            }
            out.push_str("}  // namespace\n");
        }
        if !self.funcs.is_empty() {
            let _ = write!(out, "\n{}\n{}", tilewright_expr::CUDA_HELPERS, self.funcs.text());
        }
        out
    }

    pub(crate) fn frag_name(&self, frag: FragId) -> String {
        self.frag_names[frag.index()].clone()
    }

    pub(crate) fn shelf_name(&self, shelf: ShelfId) -> String {
        format!("shelf_{}", shelf.index())
    }

    fn ring_name(&self, ring: RingId) -> String {
        self.ring_names[ring.index()].clone()
    }

    /// The spread of a fragment's columns `[0, cols)`, as a C++ type.
    pub(crate) fn spread(frag: &Frag, cols: u32) -> String {
        Self::spread_of(frag.spread, frag.rows, cols)
    }

    /// A spread of a tile, as a C++ type.
    pub(crate) fn spread_of(spread: Spread, rows: u32, cols: u32) -> String {
        match spread {
            Spread::Wgmma => format!("tw::WgmmaSpread<{rows}, {cols}>"),
            Spread::MmaSync { warps_m, warps_n } => {
                format!("tw::MmaSpread<{rows}, {cols}, {warps_m}, {warps_n}>")
            }
            Spread::Lines { lanes, vector, threads } => {
                format!("tw::LineSpread<{rows}, {cols}, {lanes}, {vector}, {threads}>")
            }
            Spread::Outer { threads_m, threads_n, block_m, block_n } => format!(
                "tw::OuterSpread<{rows}, {cols}, {threads_m}, {threads_n}, {block_m}, {block_n}>"
            ),
        }
    }

    pub(crate) fn count(frag: &Frag, cols: u32) -> String {
        let spread = Self::spread(frag, cols);
        match frag.extent {
            Extent::Tile => format!("{spread}::TILE"),
            Extent::PerRow => format!("{spread}::PER_ROW"),
            Extent::PerCol => format!("{spread}::PER_COL"),
        }
    }

    pub(crate) fn cols(&self, r: &FragRef) -> u32 {
        r.cols.unwrap_or(self.program.frags[r.frag].cols)
    }

    /// Register `i` of the columns that `r` names, where `i` counts the registers of those columns.
    pub(crate) fn register(&self, r: &FragRef, i: &str) -> Result<String> {
        let frag = &self.program.frags[r.frag];
        let name = self.frag_name(r.frag);
        let width = self.cols(r);
        let col = self.scope.text(&r.col);
        let whole = width == frag.cols;
        let index = match (frag.extent, frag.spread) {
            (Extent::PerRow, _) => i.to_owned(),
            _ if whole => i.to_owned(),
            (Extent::Tile, Spread::Wgmma) if frag.rows == 64 => format!("{col} / 2 + {i}"),
            (Extent::Tile, Spread::Wgmma) => {
                let half = width / 2;
                format!("({i}) / {half} * {} + {col} / 2 + ({i}) % {half}", frag.cols / 2)
            }
            (Extent::PerCol, Spread::Wgmma) => format!("{col} / 4 + {i}"),
            // Ranges of whole slabs: every warp holds a share of each.
            (Extent::Tile, Spread::MmaSync { warps_n, .. }) => {
                let (part, all) = (width / warps_n / 2, frag.cols / warps_n / 2);
                format!("({i}) / {part} * {all} + {col} / {} + ({i}) % {part}", 2 * warps_n)
            }
            (Extent::PerCol, Spread::MmaSync { warps_n, .. }) => {
                format!("{col} / {} + {i}", 4 * warps_n)
            }
            (Extent::Tile, Spread::Outer { threads_n, .. }) => {
                let (part, all) = (width / threads_n, frag.cols / threads_n);
                format!("({i}) / {part} * {all} + {col} / {threads_n} + ({i}) % {part}")
            }
            (Extent::PerCol, Spread::Outer { threads_n, .. }) => {
                format!("{col} / {threads_n} + {i}")
            }
            _ => {
                return Err(Error::unsupported(format!(
                    "columns {} of {} in this spread cannot be taken apart",
                    r.col, frag.name
                )));
            }
        };
        Ok(format!("{name}[{index}]"))
    }

    /// `arg` as an operand where `i` counts registers of `dst`.
    pub(crate) fn operand(&self, dst: &FragRef, arg: &FragRef, i: &str) -> Result<String> {
        let (d, a) = (&self.program.frags[dst.frag], &self.program.frags[arg.frag]);
        let spread = Self::spread(d, self.cols(dst));
        let index = match (d.extent, a.extent) {
            (x, y) if x == y => i.to_owned(),
            (Extent::Tile, Extent::PerRow) => format!("{spread}::per_row({i})"),
            (Extent::Tile, Extent::PerCol) => format!("{spread}::per_col({i})"),
            _ => {
                return Err(Error::unsupported(format!(
                    "{} does not spread over {}",
                    a.name, d.name
                )));
            }
        };
        self.register(arg, &index)
    }

    pub(crate) fn cond(&self, cond: &Cond) -> String {
        let compare = match cond.compare {
            Compare::Lt => "<",
            Compare::Le => "<=",
            Compare::Eq => "==",
            Compare::Ne => "!=",
        };
        format!("{} {compare} {}", self.scope.text(&cond.lhs), self.scope.text(&cond.rhs))
    }

    fn slot(&self, slot: &Slot) -> String {
        match slot {
            Slot::Ring(ring) => format!("{}.slot", self.ring_name(*ring)),
            Slot::Before(ring) => {
                format!("{}.before()", self.ring_name(*ring))
            }
            Slot::At(dim) => self.scope.text(dim),
        }
    }

    /// Address of the slot that holds a tile.
    pub(crate) fn slot_address(&self, tile: &SmemTile) -> String {
        let smem = &self.program.smem[tile.smem];
        let slot = self.slot(&tile.slot);
        let name = identifier(&smem.name);
        if slot == "0" {
            name
        } else {
            format!("{name} + {slot} * {}", smem.slot_bytes().next_multiple_of(1024))
        }
    }

    /// Address of the first byte of a box within its buffer: whole panels and whole lines.
    fn box_address(&self, tile: &SmemTile) -> String {
        let smem = &self.program.smem[tile.smem];
        let span = smem.swizzle.span_bytes();
        let size = smem.dtype.bits() / 8;
        let (along, line, lines) = if smem.contiguous == 1 {
            (&tile.col, &tile.row, smem.rows)
        } else {
            (&tile.row, &tile.col, smem.cols)
        };
        let mut text = self.slot_address(tile);
        if !along.is(0) {
            let _ =
                write!(text, " + {} * {size} / {span} * {}", self.scope.text(along), lines * span);
        }
        if !line.is(0) {
            let _ = write!(text, " + {} * {span}", self.scope.text(line));
        }
        text
    }

    fn barrier(&self, barrier: &BarrierRef) -> String {
        let name = identifier(&self.program.barriers[barrier.barrier].name);
        match self.slot(&barrier.slot).as_str() {
            "0" => name,
            slot => format!("{name} + 8 * {slot}"),
        }
    }

    fn phase(&self, phase: &Phase) -> String {
        match phase {
            Phase::Of(ring) => format!("{}.phase", self.ring_name(*ring)),
            Phase::Before(ring) => {
                format!("{}.phase ^ 1", self.ring_name(*ring))
            }
            Phase::Parity(dim) => format!("(tw::u32)({})", self.scope.text(dim)),
        }
    }

    /// Coordinates for the copy engine, innermost first: the contiguous axis, then the others from
    /// the last to the first.
    fn coordinates(&self, map: MapId, at: &[Dim]) -> String {
        let contiguous = self.program.maps[map].contiguous;
        std::iter::once(contiguous)
            .chain((0..at.len()).rev().filter(|axis| *axis != contiguous))
            .map(|axis| self.scope.text(&at[axis]))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Channel, the first window's pixel (column, row, image), and the tap's distance from it (right, down).
    fn window_coordinates(&self, w: &Windows, at: &[Dim]) -> String {
        let [pixel, channel, down, right] = at else {
            unreachable!("the verifier counts coordinates")
        };
        let [rows, cols] = &w.outputs;
        let first = |at: Dim, i: usize| at * w.steps[i] - w.before[i];
        let x = first(pixel.modulo(cols), 1);
        let y = first(pixel.floor_div(cols).modulo(rows), 0);
        let image = pixel.floor_div(&(rows.clone() * cols));
        let all = [channel, &x, &y, &image, right, down];
        all.map(|d| self.scope.text(d)).join(", ")
    }

    pub(crate) fn kernel_body(&mut self) -> Result<String> {
        let program = self.program;
        self.declare_line_scratch()?;
        self.line("extern __shared__ __align__(1024) unsigned char shared_memory[];");
        self.line("const tw::smem_t smem = tw::smem_address(shared_memory);");
        for ((_, smem), offset) in program.smem.iter().zip(self.smem_offsets.clone()) {
            self.line(&format!("const tw::smem_t {} = smem + {offset};", identifier(&smem.name)));
        }
        for ((_, bar), offset) in program.barriers.iter().zip(self.barrier_offsets.clone()) {
            self.line(&format!("const tw::smem_t {} = smem + {offset};", identifier(&bar.name)));
        }
        let mut at = program.smem_bytes();
        for (id, shelf) in program.shelves.iter().collect::<Vec<_>>().into_iter().rev() {
            at -= shelf.bytes();
            self.line(&format!("const tw::smem_t {} = smem + {at};", self.shelf_name(id)));
        }
        if program.cluster > 1 {
            self.line("const int cta = (int)tw::cluster_cta();");
            self.line(&format!("const int cluster = (int)blockIdx.x / {};", program.cluster));
            self.line(&format!("const int clusters = (int)gridDim.x / {};", program.cluster));
        } else {
            self.line("const int cta = 0;");
            self.line("const int cluster = (int)blockIdx.x, clusters = (int)gridDim.x;");
        }
        self.line("const int warp = tw::warp();");
        self.line("(void)cta, (void)cluster, (void)clusters, (void)warp, (void)smem;");
        // Descriptors come from parameter memory: fetch them while barriers are set up.
        if program.maps.iter().next().is_some() {
            self.line("if (threadIdx.x == 32) {");
            for (_, map) in program.maps.iter() {
                let name = identifier(&format!("map_{}", map.name));
                self.line(&format!("  tw::tma_prefetch({name});"));
            }
            self.line("}");
        }
        self.block(&program.setup)?;
        let launch_registers = (65536 / program.threads / program.blocks_per_sm).min(255) / 8 * 8;
        for (i, role) in program.roles.iter().enumerate() {
            let last = role.first_warp + role.warps * role.instances;
            let whole = program.roles.len() == 1 && last * 32 == program.threads;
            let head = match (i, whole) {
                (_, true) => "{".to_owned(),
                (0, _) => format!("if (warp >= {} && warp < {last}) {{", role.first_warp),
                _ => format!("else if (warp >= {} && warp < {last}) {{", role.first_warp),
            };
            self.line(&format!("{head}  // {}", role.name));
            self.indent += 1;
            if let Some(registers) = role.registers {
                let verb = if registers > launch_registers { "increase" } else { "decrease" };
                self.line(&format!("tw::registers_{verb}<{registers}>();"));
            }
            self.role_body(role)?;
            self.indent -= 1;
            self.line("}");
        }
        self.block(&program.teardown)?;
        Ok(std::mem::take(&mut self.out))
    }

    fn role_body(&mut self, role: &'a Role) -> Result<()> {
        let name = identifier(&role.instance);
        self.line(&format!("const int {name} = (warp - {}) / {};", role.first_warp, role.warps));
        self.line(&format!("(void){name};"));
        let saved = self.scope.clone();
        let max = i64::from(role.instances) - 1;
        self.scope.bind(&role.instance, name, Range { min: 0, max });
        self.role = Some(role);
        let mut used_rings = BTreeSet::new();
        let mut used_frags = BTreeSet::new();
        visit(&role.body, &mut |stmt| stmt_names(stmt, &mut used_rings, &mut used_frags));
        used_frags.retain(|frag| !self.unread.contains(frag));
        if role.single_thread {
            self.line(&format!(
                "if ((warp - {}) % {} == 0 && tw::elect_one()) {{",
                role.first_warp, role.warps
            ));
            self.indent += 1;
        } else {
            self.line(&format!(
                "const bool leader = (warp - {}) % {} == 0 && tw::elect_one();",
                role.first_warp, role.warps
            ));
            self.line("(void)leader;");
        }
        for ring in used_rings {
            let stages = self.program.rings[ring].stages;
            self.line(&format!("tw::Ring<{stages}> {};", self.ring_name(ring)));
        }
        for id in used_frags {
            let frag = &self.program.frags[id];
            let count = Self::count(frag, frag.cols);
            let name = self.frag_name(id);
            if self.packed.contains(&id) {
                self.line(&format!("tw::u32 {name}[{count} / 2];"));
            } else {
                self.line(&format!("tw::value<{}> {name}[{count}];", memory_type(frag.dtype)));
            }
        }
        self.block(&role.body)?;
        if role.single_thread {
            self.indent -= 1;
            self.line("}");
            // Barriers of whole warps (`.aligned`) follow.
            if !self.program.teardown.is_empty() {
                self.line("__syncwarp();");
            }
        }
        self.role = None;
        self.scope = saved;
        Ok(())
    }

    fn block(&mut self, stmts: &[Stmt]) -> Result<()> {
        let saved = self.scope.clone();
        for stmt in stmts {
            self.stmt(stmt)?;
        }
        self.scope = saved;
        Ok(())
    }

    fn braced(&mut self, head: &str, stmts: &[Stmt]) -> Result<()> {
        self.line(&format!("{head} {{"));
        self.indent += 1;
        // Which groups are open is known within one run of steps only.
        self.group.clear();
        self.groups.clear();
        self.block(stmts)?;
        self.group.clear();
        self.groups.clear();
        self.indent -= 1;
        self.line("}");
        Ok(())
    }

    fn bind(&mut self, name: &Arc<str>, range: Range) -> String {
        let text = identifier(name);
        self.scope.bind(name, text.clone(), range);
        text
    }

    /// Arrives and the like: by one thread of the instance.
    fn leader_line(&mut self, text: &str) {
        if self.once || self.role.is_some_and(|r| r.single_thread) {
            self.line(text);
        } else {
            self.line(&format!("if (leader) {text}"));
        }
    }

    /// Row and column of this block in a cluster with rows of `width` blocks.
    fn place_in_cluster(&self, width: u32) -> (String, String) {
        let (cta, width) = (Dim::sym(CTA), Dim::new(i64::from(width.max(1))));
        let [row, column] = [cta.floor_div(&width), cta.modulo(&width)];
        (format!("({})", self.scope.text(&row)), format!("({})", self.scope.text(&column)))
    }

    /// The blocks that a copy reaches, as bits; `None` for its own only.
    fn reached_blocks(&self, reach: &Reach) -> Option<String> {
        let cluster = self.program.cluster;
        if reach.blocks(cluster) == 1 {
            return None;
        }
        // Of the first row, and of the first column.
        let bits =
            (0..cluster).filter(|other| reach.takes_in(0, *other)).fold(0u32, |b, i| b | 1 << i);
        match reach {
            Reach::Row(width) => {
                let (row, _) = self.place_in_cluster(*width);
                Some(format!("({bits} << {row} * {width})"))
            }
            Reach::Column(width) => {
                let (_, column) = self.place_in_cluster(*width);
                Some(format!("({bits} << {column})"))
            }
            _ => Some(bits.to_string()),
        }
    }

    /// Accumulators are written behind the compiler's back until a wait.
    fn touch_accumulators(&mut self) {
        let Some(role) = self.role else { return };
        let mut accumulators = BTreeSet::new();
        visit(&role.body, &mut |stmt| {
            if let Stmt::Wgmma { acc, a, .. } = stmt {
                accumulators.insert(acc.frag);
                if let tilewright_device::WgmmaA::Frag(a) = a
                    && self.packed.contains(&a.frag)
                {
                    accumulators.insert(a.frag);
                }
            }
        });
        // What runs now is not to be touched.
        let busy: BTreeSet<FragId> = self.groups.iter().flatten().copied().collect();
        for acc in accumulators.difference(&busy).copied() {
            let name = self.frag_name(acc);
            self.line(&format!("tw::wgmma_touch({name});"));
        }
    }

    /// After a wait: the registers of groups that are complete now change, those of open ones do not.
    fn touch_complete(&mut self, pending: usize) {
        let open = self.groups.split_off(self.groups.len().saturating_sub(pending));
        let busy: BTreeSet<FragId> = open.iter().flatten().copied().collect();
        let done: BTreeSet<FragId> = self.groups.drain(..).flatten().collect();
        self.groups = open;
        for frag in done.difference(&busy) {
            let name = self.frag_name(*frag);
            self.line(&format!("tw::wgmma_touch({name});"));
        }
    }

    fn stmt(&mut self, stmt: &Stmt) -> Result<()> {
        self.products.before(stmt);
        if !matches!(stmt, Stmt::Map { dst, .. } if self.unread.contains(&dst.frag)) {
            self.print_stmt(stmt)?;
        }
        self.products.after(self.program, stmt);
        Ok(())
    }

    fn print_stmt(&mut self, stmt: &Stmt) -> Result<()> {
        match stmt {
            Stmt::Let { name, value } => {
                let text = self.scope.text(value);
                let range = self.scope.bounds(value);
                let name = self.bind(name, range);
                self.line(&format!("const int {name} = {text};"));
            }
            Stmt::For { var, lo, hi, step, body } => {
                let (lo_text, hi_text) = (self.scope.text(lo), self.scope.text(hi));
                let step_text = self.scope.text(step);
                let range = Range {
                    min: self.scope.bounds(lo).min,
                    max: self.scope.bounds(hi).max.saturating_sub(1),
                };
                let saved = self.scope.clone();
                let var = self.bind(var, range);
                let next =
                    if step.is(1) { format!("++{var}") } else { format!("{var} += {step_text}") };
                self.line("#pragma unroll 1");
                self.loops += 1;
                let done = self.braced(
                    &format!("for (int {var} = {lo_text}; {var} < {hi_text}; {next})"),
                    body,
                );
                self.loops -= 1;
                done?;
                self.scope = saved;
            }
            Stmt::Unroll { var, count, body } => {
                let saved = self.scope.clone();
                let var = self.bind(var, Range { min: 0, max: i64::from(*count) - 1 });
                self.line("#pragma unroll");
                self.braced(&format!("for (int {var} = 0; {var} < {count}; ++{var})"), body)?;
                self.scope = saved;
            }
            Stmt::If { cond, then, otherwise } => {
                let cond = self.cond(cond);
                self.braced(&format!("if ({cond})"), then)?;
                if !otherwise.is_empty() {
                    self.braced("else", otherwise)?;
                }
            }
            Stmt::Once(body) if self.once || self.role.is_some_and(|r| r.single_thread) => {
                self.block(body)?;
            }
            Stmt::Once(body) => {
                let who = if self.role.is_some() { "leader" } else { "threadIdx.x == 0" };
                self.once = true;
                let done = self.braced(&format!("if ({who})"), body);
                self.once = false;
                done?;
            }
            Stmt::BarrierInit => {
                let barriers: Vec<_> =
                    self.program.barriers.iter().map(|(_, b)| b.clone()).collect();
                self.line("if (threadIdx.x == 0) {");
                for bar in barriers {
                    self.line(&format!(
                        "  for (int i = 0; i < {}; ++i) tw::mbarrier_init({} + 8 * i, {});",
                        bar.slots,
                        identifier(&bar.name),
                        bar.arrivals
                    ));
                }
                self.line("}");
            }
            Stmt::FenceBarrierInit => self.line("if (threadIdx.x == 0) tw::fence_barrier_init();"),
            Stmt::SyncBlock => self.line("__syncthreads();"),
            Stmt::SyncCluster if self.program.cluster == 1 => self.line("__syncthreads();"),
            Stmt::SyncCluster => self.line("tw::cluster_sync();"),
            Stmt::NamedSync { id, threads } => {
                let id = self.scope.text(id);
                self.line(&format!("tw::named_sync({id}, {threads});"));
            }
            Stmt::NamedArrive { id, threads } => {
                let id = self.scope.text(id);
                self.line(&format!("tw::named_arrive({id}, {threads});"));
            }
            Stmt::Wait { barrier, phase } => {
                let text =
                    format!("tw::mbarrier_wait({}, {});", self.barrier(barrier), self.phase(phase));
                self.line(&text);
            }
            Stmt::Arrive { barrier, reach } => {
                let bar = self.barrier(barrier);
                match reach {
                    Reach::Own => self.leader_line(&format!("tw::mbarrier_arrive({bar});")),
                    Reach::Cta(cta) => {
                        let cta = self.scope.text(cta);
                        self.leader_line(&format!("tw::mbarrier_arrive_at({bar}, {cta});"));
                    }
                    Reach::All => {
                        let n = self.program.cluster;
                        self.leader_line(&format!(
                            "for (int peer = 0; peer < {n}; ++peer) tw::mbarrier_arrive_at({bar}, peer);"
                        ));
                    }
                    Reach::Row(width) | Reach::Column(width) | Reach::Cross(width) => {
                        let rows = self.program.cluster / (*width).max(1);
                        let (row, column) = self.place_in_cluster(*width);
                        if !matches!(reach, Reach::Column(_)) {
                            self.leader_line(&format!(
                                "for (int peer = 0; peer < {width}; ++peer) tw::mbarrier_arrive_at({bar}, {row} * {width} + peer);"
                            ));
                        }
                        // The block's own row has been there.
                        let other = match reach {
                            Reach::Cross(_) => format!("if (peer != {row}) "),
                            _ => String::new(),
                        };
                        if !matches!(reach, Reach::Row(_)) {
                            self.leader_line(&format!(
                                "for (int peer = 0; peer < {rows}; ++peer) {other}tw::mbarrier_arrive_at({bar}, peer * {width} + {column});"
                            ));
                        }
                    }
                }
            }
            Stmt::ExpectBytes { barrier, bytes } => {
                let text =
                    format!("tw::mbarrier_expect_bytes({}, {bytes});", self.barrier(barrier));
                self.leader_line(&text);
            }
            Stmt::Advance { ring, by } => {
                let name = self.ring_name(*ring);
                let by = if by.is(1) { String::new() } else { self.scope.text(by) };
                self.line(&format!("{name}.advance({by});"));
            }
            Stmt::TmaLoad { map, at, to, barrier, reach, cache } => {
                let policy = match cache {
                    CachePolicy::Normal => "tw::EVICT_NORMAL",
                    CachePolicy::EvictFirst => "tw::EVICT_FIRST",
                    CachePolicy::EvictLast => "tw::EVICT_LAST",
                };
                let name = identifier(&format!("map_{}", self.program.maps[*map].name));
                let to = self.box_address(to);
                let bar = self.barrier(barrier);
                let (windows, coordinates) = match &self.program.maps[*map].windows {
                    Some(w) => ("_windows", self.window_coordinates(w, at)),
                    None => ("", self.coordinates(*map, at)),
                };
                let text = match self.reached_blocks(reach) {
                    Some(blocks) => format!(
                        "tw::tma_load{windows}_multicast({to}, {name}, {bar}, {policy}, (tw::u16){blocks}, {coordinates});"
                    ),
                    None => {
                        format!(
                            "tw::tma_load{windows}({to}, {name}, {bar}, {policy}, {coordinates});"
                        )
                    }
                };
                self.leader_line(&text);
            }
            Stmt::TmaStore { map, at, from, add } => {
                let verb = if *add { "tma_store_add" } else { "tma_store" };
                let name = identifier(&format!("map_{}", self.program.maps[*map].name));
                let text = format!(
                    "tw::{verb}({name}, {}, {});",
                    self.box_address(from),
                    self.coordinates(*map, at)
                );
                self.leader_line(&text);
            }
            Stmt::TmaCommit => self.leader_line("tw::tma_commit();"),
            Stmt::TmaWait { pending, reads_only } => {
                let verb = if *reads_only { "tma_wait_read" } else { "tma_wait" };
                self.leader_line(&format!("tw::{verb}<{pending}>();"));
            }
            Stmt::FenceAsync => self.line("tw::fence_async();"),
            Stmt::CopyIn { param, at, axes, to, vector, ends } => {
                self.copy_in(*param, at, *axes, to, (*vector, *ends))?
            }
            Stmt::CopyCommit => self.line("tw::copy_commit();"),
            Stmt::CopyWait { pending } => self.line(&format!("tw::copy_wait<{pending}>();")),
            Stmt::WgmmaFence => {
                self.touch_accumulators();
                self.line("tw::wgmma_fence();");
            }
            Stmt::Wgmma { acc, a, b, turned, zero_if } => {
                self.group.insert(acc.frag);
                if let tilewright_device::WgmmaA::Frag(a) = a
                    && self.packed.contains(&a.frag)
                {
                    self.group.insert(a.frag);
                }
                self.wgmma(acc, a, b, *turned, zero_if.as_ref())?;
            }
            Stmt::WgmmaCommit => {
                self.line("tw::wgmma_commit();");
                let group = std::mem::take(&mut self.group);
                self.groups.push(group);
            }
            Stmt::WgmmaWait { pending: 0 } => {
                self.line("tw::wgmma_wait<0>();");
                self.groups.clear();
                self.touch_accumulators();
            }
            Stmt::WgmmaWait { pending } => {
                self.line(&format!("tw::wgmma_wait<{pending}>();"));
                self.touch_complete(*pending as usize);
            }
            Stmt::Mma { acc, a, b, split } => self.mma(acc, a, b, *split)?,
            Stmt::Fill { dst, value } => {
                let frag = &self.program.frags[dst.frag];
                let count = Self::count(frag, self.cols(dst));
                let register = self.register(dst, "i")?;
                let text = constant(*value, frag.dtype);
                self.line("#pragma unroll");
                self.line(&format!("for (int i = 0; i < {count}; ++i) {register} = {text};"));
            }
            Stmt::Map { dst, func, args } => {
                let frag = &self.program.frags[dst.frag];
                let count = Self::count(frag, self.cols(dst));
                let name = self.funcs.name(func, self.unrounded.contains(&dst.frag));
                let call = |i: &str| -> Result<String> {
                    let operands = args.iter().map(|a| self.operand(dst, a, i));
                    Ok(format!("{name}({})", operands.collect::<Result<Vec<_>>>()?.join(", ")))
                };
                if self.packed.contains(&dst.frag) {
                    let pair = format!("{}, {}", call("2 * i")?, call("2 * i + 1")?);
                    let (to, col) = (self.frag_name(dst.frag), self.scope.text(&dst.col));
                    let ty = memory_type(frag.dtype);
                    self.line("#pragma unroll");
                    self.line(&format!(
                        "for (int i = 0; i < {count} / 2; ++i) {to}[{col} / 4 + i] = tw::pack_pair<{ty}>({pair});"
                    ));
                    return Ok(());
                }
                let register = self.register(dst, "i")?;
                let value = call("i")?;
                if self.one_column(dst, func, args, &value)? {
                    return Ok(());
                }
                self.line("#pragma unroll");
                self.line(&format!("for (int i = 0; i < {count}; ++i) {register} = {value};"));
            }
            Stmt::Iota { dst, axis, start } => {
                let frag = &self.program.frags[dst.frag];
                let spread = Self::spread(frag, self.cols(dst));
                let count = Self::count(frag, self.cols(dst));
                let register = self.register(dst, "i")?;
                let at = match (frag.extent, axis) {
                    (Extent::Tile, 0) => format!(" + {spread}::row(i)"),
                    (Extent::Tile, _) => format!(" + {spread}::col(i)"),
                    (Extent::PerRow, 0) => format!(" + {spread}::row_of(i)"),
                    (Extent::PerCol, 1) => format!(" + {spread}::col_of(i)"),
                    _ => String::new(),
                };
                let start = self.scope.text(start);
                let held = memory_type(frag.dtype);
                self.line("#pragma unroll");
                self.line(&format!(
                    "for (int i = 0; i < {count}; ++i) {register} = (tw::value<{held}>)({start}{at});"
                ));
            }
            Stmt::Reduce { dst, kind, src, accumulate } => {
                self.reduce(dst, *kind, src, *accumulate)?
            }
            Stmt::Load { dst, param, at, axes, fill, vector } => {
                self.global(dst, *param, at, *axes, *vector, Some(*fill))?;
            }
            Stmt::Store { param, at, axes, src, vector } => {
                self.global(src, *param, at, *axes, *vector, None)?;
            }
            Stmt::ToSmem { to, src } => self.store_smem(to, src)?,
            Stmt::FromSmem { dst, from } => self.load_smem(dst, from)?,
            Stmt::Line(step) => self.line_step(step)?,
            Stmt::GridWait => self.line("tw::grid_wait();"),
            Stmt::GridRelease => self.line("tw::grid_release();"),
        }
        Ok(())
    }

    /// The helpers of maps define tw_max and tw_min.
    pub(crate) fn needs_helpers(&mut self) {
        let _ = self.funcs.name(&tilewright_expr::Func::identity(DType::F32), false);
    }
}

/// A constant as a fragment holds it.
pub(crate) fn constant(value: Value, dtype: DType) -> String {
    match value {
        Value::Int(v) if dtype.is_float() => format!("{v}.0f"),
        Value::Int(i64::MIN) => "(-9223372036854775807ll - 1)".into(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) if v.is_nan() => "__int_as_float(0x7fc00000)".into(),
        Value::Float(v) if v.is_infinite() => {
            if v > 0.0 { "__int_as_float(0x7f800000)" } else { "__int_as_float(0xff800000)" }.into()
        }
        Value::Float(v) if dtype == DType::F64 => format!("{v:e}"),
        Value::Float(v) => format!("{v:e}f"),
    }
}
