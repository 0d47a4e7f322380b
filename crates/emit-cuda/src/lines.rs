//! Loads and stores of fragments in `Spread::Lines`.
//!
//! A load first starts every access of the fragment, predicated and without branches, and converts
//! when all are on their way; the number of accesses in flight is what memory bandwidth needs.

use crate::memory_type;
use crate::stmts::{Printer, constant};
use crate::walk::visit;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_device::{Extent, Frag, FragRef, ShelfRef, Spread, Stmt, Streams};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::ParamId;

/// Where the elements of a fragment lie in a tensor.
pub(crate) struct Access<'a> {
    pub(crate) param: ParamId,
    /// Coordinate of the first element.
    pub(crate) at: &'a [Dim],
    /// Axes along which rows and columns run, and coordinates between neighbours along them.
    pub(crate) axes: (Option<usize>, Option<usize>),
    pub(crate) steps: (i64, i64),
    /// An axis along which the coordinate is data.
    pub(crate) rows: Option<(usize, &'a FragRef)>,
    /// Columns an access.
    pub(crate) vector: u32,
}

/// What [`Printer::place`] finds.
struct Place {
    lets: Vec<String>,
    /// That the first element is there.
    inside: String,
    /// Where a program is ragged, the same but for the axis of the columns, and the column with how many there are.
    along: Option<Along>,
    pointer: String,
}

/// The columns of an access to lines that end anywhere.
struct Along {
    others: String,
    here: String,
    extent: String,
}

impl Along {
    /// That all of a run is there, and that some of it is.
    fn tests(&self, vector: u32) -> (String, String) {
        let Along { others, here, extent } = self;
        let whole = format!("{here} >= 0 && {here} + {vector} <= {extent}");
        let edge = format!("{others} && {here} > -{vector} && {here} < {extent} && !({whole})");
        (format!("{others} && {whole}"), edge)
    }
}

/// `text` times a step that is often 1.
fn times(text: &str, step: i64) -> String {
    if step == 1 { text.to_owned() } else { format!("{text} * {step}") }
}

impl Printer<'_> {
    /// Whether coordinates depend on the item of the grid: on what the program names once.
    fn follows_item(&self, at: &[Dim]) -> bool {
        let mut symbols = BTreeSet::new();
        let mut note = |name: &Arc<str>| {
            symbols.insert(name.clone());
        };
        at.iter().for_each(|d| d.for_each_symbol(&mut note));
        let mut found = false;
        for role in &self.program.roles {
            visit(&role.body, &mut |stmt| {
                found |= matches!(stmt, Stmt::Let { name, .. } if symbols.contains(name));
            });
        }
        found
    }

    /// Where the elements of a tile (or a vector of it) lie: what must be computed first, the condition that
    /// register `i` is inside, and its address. `picked` gives the text of data that is added to a coordinate.
    fn place(
        &mut self,
        spread: &str,
        extent: Extent,
        access: &Access<'_>,
        picked: Option<&str>,
        constant: bool,
    ) -> Result<Place> {
        let Access { param, at, axes, steps, rows, .. } = *access;
        let p = self.program.params[param].clone();
        let (row, col) = match extent {
            Extent::Tile => (Some(("row0()", "row_step(i)")), Some(("col0()", "col_step(i)"))),
            Extent::PerRow => (Some(("row0()", "row_step(i * spread_t::EACH)")), None),
            Extent::PerCol => (None, Some(("col0()", "col_step(i)"))),
        };
        // One base address, and distances of the registers from it: constants along contiguous axes.
        let mut base =
            if p.layout.offset.is(0) { "0".to_owned() } else { self.scope.wide(&p.layout.offset) };
        let mut offset = String::new();
        let mut inside = Vec::new();
        let (mut along, mut of_columns) = (None, Vec::new());
        let mut lets = vec![format!("using spread_t = {spread};")];
        for (axis, coordinate) in at.iter().enumerate() {
            let a = &p.layout.axes[axis];
            if a.block.is_some() {
                return Err(Error::unsupported(format!("{} has a blocked axis", p.name)));
            }
            let part = match (axes.0 == Some(axis), axes.1 == Some(axis)) {
                (true, _) => row.map(|part| (part, steps.0)),
                (_, true) => col.map(|part| (part, steps.1)),
                _ => None,
            };
            let name = format!("at_{axis}");
            let start = self.scope.text(coordinate);
            let stride = self.scope.wide(&a.stride);
            let here = match part {
                Some(((first, step), by)) => {
                    let first = times(&format!("spread_t::{first}"), by);
                    let step = times(&format!("spread_t::{step}"), by);
                    lets.push(format!("const int {name} = {start} + {first};"));
                    let _ = write!(offset, " + (tw::i64)({step}) * {stride}");
                    format!("{name} + {step}")
                }
                None => {
                    lets.push(format!("const int {name} = {start};"));
                    name.clone()
                }
            };
            let _ = write!(base, " + (tw::i64){name} * {stride}");
            if let Some(by) = picked.filter(|_| rows.is_some_and(|(a, _)| a == axis)) {
                // Wide, because the data may be anything.
                let place = format!("((tw::i64){here} + (tw::i64){by})");
                let _ = write!(offset, " + (tw::i64){by} * {stride}");
                for test in
                    [format!("{place} >= 0"), format!("{place} < {}", self.scope.text(&a.extent))]
                {
                    inside.push(test);
                }
                continue;
            }
            let extent = self.scope.text(&a.extent);
            if self.program.ragged && axes.1 == Some(axis) && part.is_some() && a.stride.is(1) {
                along = Some((here.clone(), extent.clone()));
            }
            let mut tests = vec![format!("{here} < {extent}")];
            if self.scope.bounds(coordinate).min < 0 {
                tests.insert(0, format!("{here} >= 0"));
            }
            match along.is_some() && axes.1 == Some(axis) {
                true => of_columns = tests,
                false => inside.extend(tests),
            }
        }
        let constant = if constant { "const " } else { "" };
        let ty = memory_type(p.dtype);
        lets.push(format!("{constant}{ty}* const first_at = p_{} + ({base});", p.name));
        let all = |tests: &[String]| match tests.is_empty() {
            true => "true".to_owned(),
            false => tests.join(" && "),
        };
        let along = along.map(|(here, extent)| Along { others: all(&inside), here, extent });
        inside.extend(of_columns);
        Ok(Place { lets, inside: all(&inside), along, pointer: format!("first_at{offset}") })
    }

    /// Address of this thread's unit `i / vector` in a slot of a shelf, as text.
    fn on_shelf(&self, of: &ShelfRef) -> String {
        let shelf = &self.program.shelves[of.shelf];
        let (spread, ty) = (Self::spread_of(shelf.spread, shelf.rows, shelf.cols), shelf.dtype);
        let (slot, vector, name) =
            (self.scope.text(&of.slot), shelf.vector, self.shelf_name(of.shelf));
        format!("tw::on_shelf<{spread}, {}, {vector}>({name}, {slot}, i)", memory_type(ty))
    }

    /// Starts to copy a tile to a shelf.
    pub(crate) fn fetch(&mut self, to: &ShelfRef, access: &Access<'_>, fill: Value) -> Result<()> {
        let shelf = self.program.shelves[to.shelf].clone();
        let spread = Self::spread_of(shelf.spread, shelf.rows, shelf.cols);
        let place = self.place(&spread, Extent::Tile, access, None, true)?;
        let (ty, vector, value) =
            (memory_type(shelf.dtype), shelf.vector, constant(fill, shelf.dtype));
        let slot = self.on_shelf(to);
        self.line("{");
        place.lets.iter().for_each(|text| self.line(&format!("  {text}")));
        self.line("#pragma unroll");
        self.line(&format!("  for (int i = 0; i < spread_t::TILE; i += {vector}) {{"));
        // The copy itself can write zeros, and only those.
        let zero = fill == Value::Float(0.0) || fill == Value::Int(0);
        let ragged = place.along.as_ref().filter(|_| vector > 1).map(|a| (a, a.tests(vector)));
        let inside = ragged.as_ref().map_or(&place.inside, |(_, (whole, _))| whole);
        let pointer = &place.pointer;
        self.line(&match zero {
            true => format!("    tw::copy_run<{ty}, {vector}>({slot}, {pointer}, {inside});"),
            false => format!(
                "    tw::fetch_run<{ty}, {vector}>({slot}, {pointer}, {inside}, tw::narrow_to<{ty}>::from({value}));"
            ),
        });
        if let Some((Along { here, extent, .. }, (_, edge))) = &ragged {
            self.line(&format!(
                "    if ({edge}) tw::fetch_edge<{ty}, {vector}>({slot}, {pointer}, {here}, {extent}, tw::narrow_to<{ty}>::from({value}));"
            ));
        }
        self.line("  }");
        self.line("}");
        Ok(())
    }

    /// A tile of a shelf into registers.
    pub(crate) fn recall(&mut self, dst: &FragRef, from: &ShelfRef) -> Result<()> {
        let shelf = self.program.shelves[from.shelf].clone();
        let frag = self.program.frags[dst.frag].clone();
        let count = Self::count(&frag, frag.cols);
        let (ty, vector, slot) = (memory_type(shelf.dtype), shelf.vector, self.on_shelf(from));
        let register = self.register(dst, "i + k")?;
        self.line("#pragma unroll");
        self.line(&format!("for (int i = 0; i < {count}; i += {vector}) {{"));
        self.line(&format!(
            "  const tw::RunWords<{ty}, {vector}> run = tw::recall_run<{ty}, {vector}>({slot});"
        ));
        self.line("#pragma unroll");
        self.line(&format!(
            "  for (int k = 0; k < {vector}; ++k) {register} = tw::widen_at(run, k);"
        ));
        self.line("}");
        Ok(())
    }

    /// The elements of 16 bytes, where a vector along columns is to be read by such units although the tile begins within one:
    /// as the two units that each of its runs lies in.
    fn shifted(&self, frag: &Frag, access: &Access<'_>) -> Option<u32> {
        let Spread::Lines { vector, .. } = frag.spread else { return None };
        let p = &self.program.params[access.param];
        let line = matches!(p.layout.axes.as_slice(), [a] if a.stride.is(1));
        let begins = line && p.layout.offset.is(0) && access.rows.is_none();
        let unit = matches!(p.dtype.bits(), 16 | 32) && vector * p.dtype.bits() == 128;
        let columns =
            frag.extent != Extent::PerRow && access.axes.0.is_none() && access.steps.1 == 1;
        (self.program.ragged && begins && unit && columns && access.vector == 1).then_some(vector)
    }

    /// A load (with `fill`) or a store.
    pub(crate) fn global_lines(
        &mut self,
        frag_ref: &FragRef,
        access: &Access<'_>,
        fill: Option<Value>,
    ) -> Result<()> {
        let frag = self.program.frags[frag_ref.frag].clone();
        let cols = self.cols(frag_ref);
        let spread = Self::spread(&frag, cols);
        let count = Self::count(&frag, cols);
        let ty = memory_type(self.program.params[access.param].dtype);
        let vector = access.vector;
        let picked = access.rows.map(|(_, rows)| self.operand(frag_ref, rows, "i")).transpose()?;
        let Place { lets, mut inside, along, pointer } =
            self.place(&spread, frag.extent, access, picked.as_deref(), fill.is_some())?;
        let vector = if frag.extent == Extent::PerRow { 1 } else { vector.max(1) };
        // Runs that lines begin or end within are few, and come after the others.
        let mut edges = None;
        if let Some(along) = along.as_ref().filter(|_| vector > 1) {
            let (whole, edge) = along.tests(vector);
            (inside, edges) = (whole, Some((along, edge)));
        }
        let Some(fill) = fill else {
            let registers = (0..vector)
                .map(|k| self.register(frag_ref, &format!("i + {k}")))
                .collect::<Result<Vec<_>>>()?;
            self.line("{");
            lets.iter().for_each(|text| self.line(&format!("  {text}")));
            self.line("#pragma unroll");
            self.line(&format!("for (int i = 0; i < {count}; i += {vector}) {{"));
            self.line(&format!("  tw::RunWords<{ty}, {vector}> run;"));
            if vector == 1 {
                self.line(&format!(
                    "  run.run.at[0] = tw::narrow_to<{ty}>::from({});",
                    registers[0]
                ));
            } else {
                for (k, pair) in registers.chunks(2).enumerate() {
                    self.line(&format!(
                        "  tw::set_pair<{ty}, {vector}>(run, {}, {}, {});",
                        2 * k,
                        pair[0],
                        pair[1]
                    ));
                }
            }
            self.line(&format!("  tw::store_run_if<{ty}, {vector}>({inside}, {pointer}, run);"));
            if let Some((Along { here, extent, .. }, edge)) = &edges {
                self.line(&format!(
                    "  if ({edge}) tw::store_edge<{ty}, {vector}>({pointer}, {here}, {extent}, run);"
                ));
            }
            self.line("}");
            self.line("}");
            return Ok(());
        };
        let register = self.register(frag_ref, "i")?;
        let value = constant(fill, frag.dtype);
        // A vector along the columns of lines that begin anywhere.
        if let Some(unit) = self.shifted(&frag, access)
            && let Some(Along { here, extent, .. }) = &along
        {
            let (line, runs) = (format!("p_{}", self.program.params[access.param].name), "runs");
            self.line("{");
            // All but the address of the first element.
            let named = &lets[..lets.len().saturating_sub(1)];
            named.iter().for_each(|text| self.line(&format!("  {text}")));
            self.line(&format!("  tw::TwoRuns<{ty}, {unit}> {runs}[{count} / {unit}];"));
            self.line("#pragma unroll");
            self.line(&format!("  for (int i = 0; i < {count}; i += {unit}) {{"));
            self.line(&format!(
                "    {runs}[i / {unit}] = tw::load_two_runs<{ty}, {unit}, true>({line}, {here}, {extent}, tw::narrow_to<{ty}>::from({value}));"
            ));
            self.line("  }");
            self.line("#pragma unroll");
            self.line(&format!("  for (int i = 0; i < {count}; i += {unit}) {{"));
            self.line(&format!(
                "    tw::load_two_edges<{ty}, {unit}>({runs}[i / {unit}], {line}, {extent});"
            ));
            self.line(&format!(
                "    const tw::RunWords<{ty}, {unit}> run = tw::between({runs}[i / {unit}]);"
            ));
            self.line("#pragma unroll");
            self.line(&format!(
                "    for (int k = 0; k < {unit}; ++k) {} = tw::widen_at(run, k);",
                self.register(frag_ref, "i + k")?
            ));
            self.line("  }");
            self.line("}");
            return Ok(());
        }
        // What does not depend on the rows of the tile, or on its place in the grid, is read again by other blocks.
        let everywhere = access.axes.0.is_none() && !self.follows_item(access.at);
        let kept = frag.extent == Extent::PerCol || everywhere;
        self.line("{");
        lets.iter().for_each(|text| self.line(&format!("  {text}")));
        self.line(&format!("  tw::RunWords<{ty}, {vector}> runs[{count} / {vector}];"));
        self.line("#pragma unroll");
        self.line(&format!("  for (int i = 0; i < {count}; i += {vector}) {{"));
        let load = match self.program.streams {
            Streams::Last if !kept => format!("load_last_if<{ty}, {vector}>"),
            _ => format!("load_words_if<{ty}, {vector}, {kept}>"),
        };
        self.line(&format!(
            "    runs[i / {vector}] = tw::{load}({inside}, {pointer}, tw::narrow_to<{ty}>::from({value}));"
        ));
        self.line("  }");
        if let Some((Along { here, extent, .. }, edge)) = &edges {
            self.line("#pragma unroll");
            self.line(&format!("  for (int i = 0; i < {count}; i += {vector}) {{"));
            self.line(&format!(
                "    if ({edge}) tw::load_edge<{ty}, {vector}>(runs[i / {vector}], {pointer}, {here}, {extent});"
            ));
            self.line("  }");
        }
        self.line("#pragma unroll");
        self.line(&format!(
            "  for (int i = 0; i < {count}; ++i) {register} = tw::widen_at(runs[i / {vector}], i % {vector});"
        ));
        self.line("}");
        Ok(())
    }
}
