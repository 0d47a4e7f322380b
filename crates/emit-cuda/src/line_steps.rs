//! Steps of threads that are spread in lines: reductions, and [`LineStep`].
//!
//! Scratch that a step needs is a static shared array of its own, but for two kinds: transposed loads share one,
//! since they meet before they use it, and exchanges across a cluster have barriers that are initialised when
//! the kernel starts.

use crate::lines::Access;
use crate::memory_type;
use crate::reduce::combination;
use crate::stmts::{Printer, constant};
use crate::walk::visit;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Extent, FragId, FragRef, LineStep, Spread, Stmt};
use tilewright_layout::Dim;
use tilewright_tile::{ParamId, ReduceKind};

/// Shared memory that a kernel may declare without asking for more.
const STATIC_SMEM_BYTES: u32 = 48 << 10;

impl Printer<'_> {
    /// What line steps share, declared where the kernel starts.
    pub(crate) fn declare_line_scratch(&mut self) -> Result<()> {
        let program = self.program;
        let (mut turn_bytes, mut exchanges) = (0, Vec::new());
        for role in &program.roles {
            visit(&role.body, &mut |stmt| match stmt {
                Stmt::Line(LineStep::Turn { dst, param, .. }) => {
                    let frag = &program.frags[dst.frag];
                    let bytes = frag.rows * frag.cols * program.params[*param].dtype.bits() / 8;
                    turn_bytes = turn_bytes.max(bytes);
                }
                Stmt::Line(LineStep::AcrossCluster { frag, .. }) => exchanges.push(frag.frag),
                _ => {}
            });
        }
        if turn_bytes > STATIC_SMEM_BYTES {
            return Err(Error::unsupported(format!("a transposed tile of {turn_bytes} bytes")));
        }
        if turn_bytes > 0 {
            self.line(&format!(
                "__shared__ __align__(16) unsigned char turn_scratch[{turn_bytes}];"
            ));
        }
        if program.cluster == 1 || exchanges.is_empty() {
            return Ok(());
        }
        let blocks = program.cluster;
        let mut begin = Vec::new();
        for (n, id) in exchanges.iter().enumerate() {
            let frag = &program.frags[*id];
            let count = if frag.extent == Extent::PerRow { frag.rows } else { frag.cols };
            let held = memory_type(frag.dtype);
            // Exchanges of a loop over items take two places in turns.
            let places = if program.persistent { 2 } else { 1 };
            self.line(&format!(
                "__shared__ tw::value<{held}> exchange_{n}[{}];",
                count * blocks * places
            ));
            if program.persistent {
                self.line(&format!("tw::u32 exchange_{n}_phase = 0;"));
            }
            self.line(&format!("__shared__ tw::u64 exchange_{n}_bar;"));
            begin.push(format!(
                "  tw::exchange_begin<{}, (int)sizeof(tw::value<{held}>)>(&exchange_{n}_bar);",
                count * blocks
            ));
        }
        self.line("if (threadIdx.x == 0) {");
        begin.iter().for_each(|text| self.line(text));
        self.line("  tw::fence_barrier_init();");
        self.line("}");
        self.line("tw::cluster_arrive();");
        if program.persistent {
            self.line("tw::cluster_wait();");
        }
        Ok(())
    }

    fn combine_line(&mut self, held: &str, combine: &str) {
        self.line(&format!(
            "  const auto combine = [](tw::value<{held}> x, tw::value<{held}> y) -> tw::value<{held}> {{ return {combine}; }};"
        ));
    }

    /// A reduction of a tile to one value per row, or per column.
    pub(crate) fn reduce_lines(
        &mut self,
        dst: &FragRef,
        src: &FragRef,
        (lanes, threads): (u32, u32),
        kind: ReduceKind,
        accumulate: bool,
    ) -> Result<()> {
        let combine = combination(kind);
        let (d, s) = (&self.program.frags[dst.frag], &self.program.frags[src.frag]);
        let (spread, held) = (Self::spread(s, s.cols), memory_type(d.dtype));
        let by_row = match d.extent {
            Extent::PerRow => true,
            Extent::PerCol => false,
            Extent::Tile => return Err(Error::bug("a reduction to a tile")),
        };
        let (to, from) = (self.frag_name(dst.frag), self.frag_name(src.frag));
        let each = d.rows / (threads / lanes);
        self.line("{");
        let (count, across) = if by_row {
            if lanes > 32 {
                self.line(&format!("  __shared__ tw::value<{held}> scratch[32];"));
            }
            let first = self.loops == 0 && each == 1;
            let scratch = if lanes > 32 { "scratch" } else { "(decltype(x)*)nullptr" };
            let across = format!("tw::across_row<{lanes}, {first}>(x, {scratch}, combine)");
            ("PER_ROW", across)
        } else {
            let several = threads / lanes.max(32) > 1;
            if several {
                self.line(&format!("  __shared__ tw::value<{held}> scratch[{threads}];"));
            }
            let scratch = if several { "scratch" } else { "(decltype(x)*)nullptr" };
            let across = format!("tw::across_column<{lanes}, {threads}>(x, {scratch}, combine)");
            ("PER_COL", across)
        };
        let fold = if by_row { "fold_row" } else { "fold_column" };
        self.combine_line(held, combine);
        self.line("#pragma unroll");
        self.line(&format!("  for (int j = 0; j < {spread}::{count}; ++j) {{"));
        let products = self.products.of(src.frag).filter(|_| by_row && kind == ReduceKind::Sum);
        match products {
            Some([a, b]) => {
                let factor = |f: FragId| {
                    let at = match self.program.frags[f].extent {
                        Extent::Tile => format!("j * {spread}::EACH + k"),
                        Extent::PerCol => "k".to_owned(),
                        Extent::PerRow => "j".to_owned(),
                    };
                    format!("[&](int k) {{ return {}[{at}]; }}", self.frag_name(f))
                };
                let text = format!(
                    "    float x = tw::fold_products<{spread}::EACH>({}, {});",
                    factor(a),
                    factor(b)
                );
                self.line(&text);
            }
            None => self.line(&format!(
                "    tw::value<{held}> x = tw::{fold}<{spread}>({from}, j, combine);"
            )),
        }
        self.line(&format!("    x = {across};"));
        match accumulate {
            true => self.line(&format!("    {to}[j] = combine({to}[j], x);")),
            false => self.line(&format!("    {to}[j] = x;")),
        }
        self.line("  }");
        self.line("}");
        Ok(())
    }

    /// One step.
    pub(crate) fn line_step(&mut self, step: &LineStep) -> Result<()> {
        match step {
            LineStep::Pick { dst, param, at, axes, steps, rows, fill, vector } => {
                self.pointers.insert(*param);
                let rows = rows.as_ref().map(|(axis, rows)| (*axis, rows));
                let access =
                    Access { param: *param, at, axes: *axes, steps: *steps, rows, vector: *vector };
                self.global_lines(dst, &access, Some(*fill))
            }
            LineStep::Turn { dst, param, at, axes, fill, vector } => {
                let fill = constant(*fill, self.program.params[*param].dtype);
                self.turn(dst, *param, at, *axes, &fill, *vector)
            }
            LineStep::Fetch { to, param, at, axes, fill } => {
                self.pointers.insert(*param);
                let (rows, vector) = (None, 1);
                let steps = (1, 1);
                let access = Access { param: *param, at, axes: *axes, steps, rows, vector };
                self.fetch(to, &access, *fill)
            }
            LineStep::Recall { dst, from } => self.recall(dst, from),
            LineStep::Unpack { dst, src } => {
                let frag = &self.program.frags[src.frag];
                let count = Self::count(frag, frag.cols);
                let (to, from) = (self.frag_name(dst.frag), self.frag_name(src.frag));
                self.line("#pragma unroll");
                self.line(&format!(
                    "for (int i = 0; i < {count}; i += 2) tw::unpack_again({from}[i], {from}[i + 1], {to}[i], {to}[i + 1]);"
                ));
                Ok(())
            }
            LineStep::ArgReduce { dst, kind, src, limit, last } => {
                let frag = &self.program.frags[src.frag];
                let (spread, held) = (Self::spread(frag, frag.cols), memory_type(frag.dtype));
                let (to, from) = (self.frag_name(dst.frag), self.frag_name(src.frag));
                let limit = self.scope.text(limit);
                let max = *kind == ReduceKind::Max;
                self.line("{");
                self.line(&format!("  __shared__ tw::Placed<tw::value<{held}>> scratch[32];"));
                self.line("#pragma unroll");
                self.line(&format!(
                    "  for (int j = 0; j < {spread}::PER_ROW; ++j) {to}[j] = tw::arg_row<{spread}, {max}, {last}>({from}, j, {limit}, scratch);"
                ));
                self.line("}");
                Ok(())
            }
            LineStep::Scan { dst, kind, src, exclusive, reverse } => {
                let frag = &self.program.frags[src.frag];
                let (spread, held) = (Self::spread(frag, frag.cols), memory_type(frag.dtype));
                let (to, from) = (self.frag_name(dst.frag), self.frag_name(src.frag));
                let identity = constant(tilewright_device::identity(*kind, frag.dtype), frag.dtype);
                self.needs_helpers();
                self.line("{");
                self.line(&format!("  __shared__ tw::value<{held}> scratch[32];"));
                self.combine_line(held, combination(*kind));
                self.line(&format!(
                    "  tw::scan_rows<{spread}, {exclusive}, {reverse}>({from}, {to}, (tw::value<{held}>){identity}, scratch, combine);"
                ));
                self.line("}");
                Ok(())
            }
            LineStep::Random { dst, seed, start, steps } => self.random(dst, *seed, start, *steps),
            LineStep::Add { param, at, axes, src } => self.add(*param, at, *axes, src),
            LineStep::Prefetch { param, at, row, rows, bytes } => {
                self.prefetch(*param, at, *row, (*rows, *bytes));
                Ok(())
            }
            LineStep::Dot { acc, a, b } => self.dot(acc, a, b),
            LineStep::TopK { x, values, places, row, count, largest, lanes, vector } => {
                let form =
                    format!("{largest}, {count}, {lanes}, {}, {vector}", self.program.threads);
                self.top_k([*x, *values, *places], row, *vector, &form);
                Ok(())
            }
            LineStep::AcrossCluster { frag, kind } => self.across_cluster(frag, *kind),
        }
    }

    /// Rows by `tw::TopK`, whose arguments behind the type are `form`.
    fn top_k(&mut self, [x, values, places]: [ParamId; 3], row: &Dim, vector: u32, form: &str) {
        self.pointers.extend([x, values, places]);
        let ty = memory_type(self.program.params[x].dtype);
        // Where a tensor has the row's column `col`.
        let place = |printer: &Self, param: ParamId, col: &str| {
            let p = &printer.program.params[param];
            let wide = |d: &Dim| printer.scope.wide(d);
            let [rows, cols] = [0, 1].map(|axis| wide(&p.layout.axes[axis].stride));
            let offset = wide(&p.layout.offset);
            format!("p_{}[{offset} + row * {rows} + (tw::i64){col} * {cols}]", p.name)
        };
        let from = place(self, x, "col");
        let [value, position] = [values, places].map(|param| place(self, param, "i"));
        let axes = &self.program.params[x].layout.axes;
        let extents = [&axes[0].extent, &axes[1].extent].map(|d| self.scope.text(d));
        let row = self.scope.text(row);
        let text = format!(
            "{{
  using top_t = tw::TopK<{ty}, {form}>;
  __shared__ top_t::Shared top;
  const tw::i64 row = (tw::i64){row} + top_t::row_of();
  const int count = {cols};
  const bool inside = row < {rows};
  top_t::row(top, inside, count, [&](int col, float (&to)[{vector}]) {{
    const auto run = tw::load_words_if<{ty}, {vector}>(inside && col < count, &{from}, tw::narrow_to<{ty}>::from(0.0f));
#pragma unroll
    for (int k = 0; k < {vector}; ++k) to[k] = tw::widen_at(run, k);
  }}, [&](int col) {{ return {from}; }}, [&](int i, int col, {ty} x) {{
    {value} = x;
    {position} = col;
  }});
}}",
            rows = extents[0],
            cols = extents[1],
        );
        text.lines().for_each(|line| self.line(line));
    }

    /// Sums of four products an instruction (PTX ISA, "dp4a"). Bytes of one word that are put together again cost nothing.
    fn dot(&mut self, acc: &FragRef, a: &FragRef, b: &FragRef) -> Result<()> {
        let frag = self.program.frags[acc.frag].clone();
        let signed = self.program.frags[a.frag].dtype.is_signed_int();
        let (name, ty) = if signed { ("dot4", "s32") } else { ("udot4", "u32") };
        self.define(format!(
            "TW_INLINE u32 {name}_word(u8 x, u8 y, u8 z, u8 w) {{ return (u32)x | (u32)y << 8 | (u32)z << 16 | (u32)w << 24; }}\n\
             TW_INLINE int {name}(u32 x, u32 y, int sum) {{\n  int r;\n  asm(\"dp4a.{ty}.{ty} %0, %1, %2, %3;\" : \"=r\"(r) : \"r\"(x), \"r\"(y), \"r\"(sum));\n  return r;\n}}"
        ));
        let count = Self::count(&frag, frag.cols);
        let word = |of: &FragRef| -> Result<String> {
            let bytes: Result<Vec<String>> = (0..4)
                .map(|k| Ok(format!("(u8){}", self.operand(acc, of, &format!("(i + {k})"))?)))
                .collect();
            Ok(format!("{name}_word({})", bytes?.join(", ")))
        };
        let (to, a, b) = (self.register(acc, "i")?, word(a)?, word(b)?);
        self.line("#pragma unroll");
        self.line(&format!("for (int i = 0; i < {count}; i += 4) {to} = {name}({a}, {b}, {to});"));
        Ok(())
    }

    /// One thread a line; one instruction each (PTX ISA, "cp.async.bulk.prefetch").
    fn prefetch(&mut self, param: ParamId, at: &[Dim], row: usize, (rows, bytes): (u32, u32)) {
        self.pointers.insert(param);
        self.define(
            "TW_INLINE void prefetch_line(const void* p, u32 bytes) {\n  asm volatile(\"cp.async.bulk.prefetch.L2.global [%0], %1;\" ::\"l\"(__cvta_generic_to_global(p)), \"r\"(bytes) : \"memory\");\n}"
                .to_owned(),
        );
        let p = self.program.params[param].clone();
        let mut place = self.scope.wide(&p.layout.offset);
        for (axis, coordinate) in at.iter().enumerate() {
            let stride = self.scope.wide(&p.layout.axes[axis].stride);
            let here = match axis == row {
                true => "(tw::i64)line".to_owned(),
                false => self.scope.wide(coordinate),
            };
            place += &format!(" + {here} * {stride}");
        }
        let (first, extent) =
            (self.scope.text(&at[row]), self.scope.text(&p.layout.axes[row].extent));
        self.line(&format!("for (int i = threadIdx.x; i < {rows}; i += blockDim.x) {{"));
        self.line(&format!("  const int line = {first} + i;"));
        self.line(&format!(
            "  if (line < {extent}) prefetch_line(p_{} + {place}, {bytes});",
            p.name
        ));
        self.line("}");
    }

    fn across_cluster(&mut self, frag: &FragRef, kind: ReduceKind) -> Result<()> {
        let f = &self.program.frags[frag.frag];
        let (spread, held) = (Self::spread(f, f.cols), memory_type(f.dtype));
        if self.program.cluster == 1 {
            return Ok(());
        }
        let again = self.program.persistent;
        if self.loops > u32::from(again) {
            return Err(Error::unsupported("an exchange across a cluster in a loop"));
        }
        if f.dtype.bits() < 32 && !f.dtype.is_float() {
            return Err(Error::unsupported(format!("an exchange of {} in a cluster", f.dtype)));
        }
        let n = self.exchanges;
        self.exchanges += 1;
        let by_row = f.extent == Extent::PerRow;
        let (count, blocks) = (if by_row { f.rows } else { f.cols }, self.program.cluster);
        let name = self.frag_name(frag.frag);
        self.needs_helpers();
        if n == 0 && !again {
            self.line("tw::cluster_wait();");
        }
        self.line("{");
        self.combine_line(held, combination(kind));
        let (template, phase) = match again {
            true => (", true", format!(", exchange_{n}_phase")),
            false => ("", String::new()),
        };
        self.line(&format!(
            "  tw::across_cluster<{spread}, {by_row}, {count}, {blocks}{template}>({name}, exchange_{n}, &exchange_{n}_bar, combine{phase});"
        ));
        if again {
            self.line(&format!("  exchange_{n}_phase ^= 1;"));
        }
        self.line("}");
        Ok(())
    }

    fn turn(
        &mut self,
        dst: &FragRef,
        param: ParamId,
        at: &[Dim],
        axes: (usize, usize),
        fill: &str,
        run: u32,
    ) -> Result<()> {
        self.pointers.insert(param);
        let p = self.program.params[param].clone();
        let frag = self.program.frags[dst.frag].clone();
        let (spread, ty) = (Self::spread(&frag, frag.cols), memory_type(p.dtype));
        let Spread::Lines { vector, threads, .. } = frag.spread else {
            return Err(Error::bug("a transposed load of a fragment that is not in lines"));
        };
        let mut base = self.scope.wide(&p.layout.offset);
        let (mut offset, mut inside) = (String::new(), Vec::new());
        self.line("{");
        for (axis, coordinate) in at.iter().enumerate() {
            let a = &p.layout.axes[axis];
            if a.block.is_some() {
                return Err(Error::unsupported(format!("{} has a blocked axis", p.name)));
            }
            let (start, stride) = (self.scope.text(coordinate), self.scope.wide(&a.stride));
            self.line(&format!("  const int at_{axis} = {start};"));
            base.push_str(&format!(" + (tw::i64)at_{axis} * {stride}"));
            let part = match axis {
                a if a == axes.0 => " + row",
                a if a == axes.1 => " + col",
                _ => "",
            };
            if !part.is_empty() {
                offset.push_str(&format!(" + (tw::i64){} * {stride}", &part[3..]));
            }
            let extent = self.scope.text(&a.extent);
            let mut tests = vec![format!("at_{axis}{part} < {extent}")];
            if self.scope.bounds(coordinate).min < 0 {
                tests.insert(0, format!("at_{axis}{part} >= 0"));
            }
            inside.extend(tests);
        }
        self.line(&format!("  const {ty}* const first_at = p_{} + ({base});", p.name));
        let tile = format!("tw::Turned<{ty}, {}, {}, {vector}, {threads}>", frag.rows, frag.cols);
        self.line(&format!(
            "  {tile}::turn_in_runs<{run}>(turn_scratch, tw::narrow_to<{ty}>::from({fill}), [&](int row, int col, bool& inside) {{"
        ));
        self.line(&format!("    inside = {};", inside.join(" && ")));
        self.line(&format!("    return first_at{offset};"));
        self.line("  });");
        let to = self.frag_name(dst.frag);
        self.line("#pragma unroll");
        self.line(&format!(
            "  for (int i = 0; i < {spread}::TILE; ++i) {to}[i] = tw::widen(tw::turned<{ty}, {}, {vector}>(turn_scratch, {spread}::row(i), {spread}::col(i)));",
            frag.rows
        ));
        // Whoever uses the scratch next meets before writing to it.
        self.line("}");
        Ok(())
    }

    fn random(&mut self, dst: &FragRef, seed: u64, start: &Dim, steps: (i64, i64)) -> Result<()> {
        let frag = &self.program.frags[dst.frag];
        let (spread, count) = (Self::spread(frag, frag.cols), Self::count(frag, frag.cols));
        let (row, col) = match frag.extent {
            Extent::Tile => ("row(i)", "col(i)"),
            Extent::PerRow => ("row_of(i)", ""),
            Extent::PerCol => ("", "col_of(i)"),
        };
        let part = |text: &str, step: i64| match text {
            "" => String::new(),
            text => format!(" + (tw::i64){spread}::{text} * {step}ll"),
        };
        let counter = format!(
            "(tw::u64)({}{}{})",
            self.scope.wide(start),
            part(row, steps.0),
            part(col, steps.1)
        );
        let bits = match frag.dtype {
            DType::F64 => 53,
            DType::F32 => 24,
            DType::F16 => 11,
            DType::BF16 => 8,
            DType::F8E4M3 => 4,
            DType::F8E5M2 => 3,
            other => return Err(Error::unsupported(format!("random numbers of type {other}"))),
        };
        let to = self.frag_name(dst.frag);
        let Spread::Lines { vector, .. } = frag.spread else {
            return Err(Error::bug("random numbers that are not in lines"));
        };
        // Four neighbours share one block of the generator.
        let multiple = |d: &Dim| d.terms().iter().all(|(_, c)| c % 4 == 0);
        let fours = bits < 53
            && frag.extent != Extent::PerRow
            && vector.is_multiple_of(4)
            && steps.1 == 1
            && steps.0 % 4 == 0
            && multiple(start);
        self.line("#pragma unroll");
        if fours {
            self.line(&format!("for (int i = 0; i < {count}; i += 4) {{"));
            self.line(&format!("  const tw::Words words = tw::philox({counter} / 4, {seed}ull);"));
            self.line("#pragma unroll");
            self.line(&format!(
                "  for (int k = 0; k < 4; ++k) {to}[i + k] = tw::uniform<{bits}>(words.at[k]);"
            ));
            self.line("}");
        } else {
            let function = match bits {
                53 => "tw::uniform_double_at".to_owned(),
                bits => format!("tw::uniform_at<{bits}>"),
            };
            self.line(&format!(
                "for (int i = 0; i < {count}; ++i) {to}[i] = {function}({counter}, {seed}ull);"
            ));
        }
        Ok(())
    }

    fn add(
        &mut self,
        param: ParamId,
        at: &[Dim],
        axes: (Option<usize>, Option<usize>),
        src: &FragRef,
    ) -> Result<()> {
        self.pointers.insert(param);
        let p = self.program.params[param].clone();
        let frag = self.program.frags[src.frag].clone();
        let narrow =
            matches!(p.dtype, DType::BF16) && self.program.arch < tilewright_device::Arch::Sm90a;
        let known = matches!(
            p.dtype,
            DType::F64
                | DType::F32
                | DType::F16
                | DType::BF16
                | DType::I32
                | DType::U32
                | DType::I64
                | DType::U64
        );
        if narrow || !known {
            return Err(Error::unsupported(format!(
                "an atomic addition of {} on {}",
                p.dtype,
                self.program.arch.name()
            )));
        }
        let (spread, count) = (Self::spread(&frag, frag.cols), Self::count(&frag, frag.cols));
        let (row, col, once) = match frag.extent {
            Extent::Tile => (Some("row(i)"), Some("col(i)"), None),
            Extent::PerRow => (Some("row_of(i)"), None, Some("col0() == 0")),
            Extent::PerCol => (None, Some("col_of(i)"), Some("row0() == 0")),
        };
        let mut wide_at = self.scope.wide(&p.layout.offset);
        let mut inside: Vec<String> = once.iter().map(|o| format!("{spread}::{o}")).collect();
        self.line("#pragma unroll");
        self.line(&format!("for (int i = 0; i < {count}; ++i) {{"));
        for (axis, coordinate) in at.iter().enumerate() {
            let a = &p.layout.axes[axis];
            if a.block.is_some() {
                return Err(Error::unsupported(format!("{} has a blocked axis", p.name)));
            }
            let part = match (axes.0 == Some(axis), axes.1 == Some(axis)) {
                (true, _) => row,
                (_, true) => col,
                _ => None,
            };
            let part = part.map_or(String::new(), |part| format!(" + {spread}::{part}"));
            self.line(&format!("  const int at_{axis} = {}{part};", self.scope.text(coordinate)));
            wide_at.push_str(&format!(" + (tw::i64)at_{axis} * {}", self.scope.wide(&a.stride)));
            if self.scope.bounds(coordinate).min < 0 {
                inside.push(format!("at_{axis} >= 0"));
            }
            inside.push(format!("at_{axis} < {}", self.scope.text(&a.extent)));
        }
        let inside = if inside.is_empty() { "true".to_owned() } else { inside.join(" && ") };
        let from = self.frag_name(src.frag);
        self.line(&format!("  if ({inside}) tw::add_to(p_{} + {wide_at}, {from}[i]);", p.name));
        self.line("}");
        Ok(())
    }
}
