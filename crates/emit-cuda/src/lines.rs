//! Loads and stores of fragments in `Spread::Lines`.
//!
//! A load first starts every access of the fragment, predicated and without branches, and converts
//! when all are on their way; the number of accesses in flight is what memory bandwidth needs.

use crate::memory_type;
use crate::stmts::{Printer, constant};
use std::fmt::Write;
use tilewright_base::{Error, Result};
use tilewright_device::{Extent, FragRef};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::ParamId;

impl Printer<'_> {
    /// A load (with `fill`) or a store; `vector` columns an access.
    pub(crate) fn global_lines(
        &mut self,
        frag_ref: &FragRef,
        param: ParamId,
        at: &[Dim],
        axes: (Option<usize>, Option<usize>),
        vector: u32,
        fill: Option<Value>,
    ) -> Result<()> {
        let p = self.program.params[param].clone();
        let frag = self.program.frags[frag_ref.frag].clone();
        let cols = self.cols(frag_ref);
        let spread = Self::spread(&frag, cols);
        let count = Self::count(&frag, cols);
        let ty = memory_type(p.dtype);
        let (row, col) = match frag.extent {
            Extent::Tile => (Some(("row0()", "row_step(i)")), Some(("col0()", "col_step(i)"))),
            Extent::PerRow => (Some(("row0()", "row_step(i * spread_t::EACH)")), None),
            Extent::PerCol => (None, Some(("col0()", "col_step(i)"))),
        };
        // One base address, and distances of the registers from it: constants along contiguous axes.
        let mut base =
            if p.layout.offset.is(0) { "0".to_owned() } else { self.scope.wide(&p.layout.offset) };
        let mut offset = String::new();
        let mut inside = Vec::new();
        let mut lets = vec![format!("using spread_t = {spread};")];
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
            let name = format!("at_{axis}");
            let start = self.scope.text(coordinate);
            let stride = self.scope.wide(&a.stride);
            let here = match part {
                Some((first, step)) => {
                    lets.push(format!("const int {name} = {start} + spread_t::{first};"));
                    let _ = write!(offset, " + (tw::i64)spread_t::{step} * {stride}");
                    format!("{name} + spread_t::{step}")
                }
                None => {
                    lets.push(format!("const int {name} = {start};"));
                    name.clone()
                }
            };
            let _ = write!(base, " + (tw::i64){name} * {stride}");
            if self.scope.bounds(coordinate).min < 0 {
                inside.push(format!("{here} >= 0"));
            }
            inside.push(format!("{here} < {}", self.scope.text(&a.extent)));
        }
        let constant_pointer = if fill.is_some() { "const " } else { "" };
        lets.push(format!("{constant_pointer}{ty}* const first_at = p_{} + ({base});", p.name));
        let inside = if inside.is_empty() { "true".to_owned() } else { inside.join(" && ") };
        let vector = if frag.extent == Extent::PerRow { 1 } else { vector.max(1) };
        let pointer = format!("first_at{offset}");
        let Some(fill) = fill else {
            let registers = (0..vector)
                .map(|k| self.register(frag_ref, &format!("i + {k}")))
                .collect::<Result<Vec<_>>>()?;
            self.line("{");
            lets.iter().for_each(|text| self.line(&format!("  {text}")));
            self.line("#pragma unroll");
            self.line(&format!("for (int i = 0; i < {count}; i += {vector}) {{"));
            self.line(&format!("  tw::Run<{ty}, {vector}> run;"));
            if vector == 1 {
                self.line(&format!("  run.at[0] = tw::narrow_to<{ty}>::from({});", registers[0]));
            } else {
                for (k, pair) in registers.chunks(2).enumerate() {
                    self.line(&format!(
                        "  tw::set_pair<{ty}>(&run.at[{}], {}, {});",
                        2 * k,
                        pair[0],
                        pair[1]
                    ));
                }
            }
            self.line(&format!("  tw::store_run_if<{ty}, {vector}>({inside}, {pointer}, run);"));
            self.line("}");
            self.line("}");
            return Ok(());
        };
        let register = self.register(frag_ref, "i")?;
        let value = constant(fill, frag.dtype);
        self.line("{");
        lets.iter().for_each(|text| self.line(&format!("  {text}")));
        self.line(&format!("  tw::Run<{ty}, {vector}> runs[{count} / {vector}];"));
        self.line("#pragma unroll");
        self.line(&format!("  for (int i = 0; i < {count}; i += {vector}) {{"));
        self.line(&format!(
            "    runs[i / {vector}] = tw::load_run_if<{ty}, {vector}>({inside}, {pointer}, tw::narrow_to<{ty}>::from({value}));"
        ));
        self.line("  }");
        self.line("#pragma unroll");
        if vector == 1 {
            self.line(&format!(
                "  for (int i = 0; i < {count}; ++i) {register} = tw::widen(runs[i].at[0]);"
            ));
        } else {
            let next = self.register(frag_ref, "i + 1")?;
            self.line(&format!(
                "  for (int i = 0; i < {count}; i += 2) tw::widen_pair(runs[i / {vector}].at[i % {vector}], runs[i / {vector}].at[i % {vector} + 1], {register}, {next});"
            ));
        }
        self.line("}");
        Ok(())
    }
}
