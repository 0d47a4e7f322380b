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
            Extent::Tile => (Some("row(i)"), Some("col(i)")),
            Extent::PerRow => (Some("row_of(i)"), None),
            Extent::PerCol => (None, Some("col_of(i)")),
        };
        let mut offset = if p.layout.offset.is(0) { "0".to_owned() } else { self.scope.wide(&p.layout.offset) };
        let mut inside = Vec::new();
        let mut lets = Vec::new();
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
            let name = format!("x{axis}");
            let value = match part {
                Some(text) => format!("{} + {spread}::{text}", self.scope.text(coordinate)),
                None => self.scope.text(coordinate),
            };
            lets.push(format!("const int {name} = {value};"));
            let _ = write!(offset, " + (tw::i64){name} * {}", self.scope.wide(&a.stride));
            if self.scope.bounds(coordinate).min < 0 {
                inside.push(format!("{name} >= 0"));
            }
            inside.push(format!("{name} < {}", self.scope.text(&a.extent)));
        }
        let inside = if inside.is_empty() { "true".to_owned() } else { inside.join(" && ") };
        let vector = if frag.extent == Extent::PerRow { 1 } else { vector.max(1) };
        let pointer = format!("p_{} + ({offset})", p.name);
        let Some(fill) = fill else {
            let registers = (0..vector)
                .map(|k| self.register(frag_ref, &format!("i + {k}")))
                .collect::<Result<Vec<_>>>()?;
            self.line("#pragma unroll");
            self.line(&format!("for (int i = 0; i < {count}; i += {vector}) {{"));
            lets.iter().for_each(|text| self.line(&format!("  {text}")));
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
            return Ok(());
        };
        let register = self.register(frag_ref, "i")?;
        let value = constant(fill, frag.dtype);
        self.line("{");
        self.line(&format!("  tw::Run<{ty}, {vector}> runs[{count} / {vector}];"));
        self.line("#pragma unroll");
        self.line(&format!("  for (int i = 0; i < {count}; i += {vector}) {{"));
        lets.iter().for_each(|text| self.line(&format!("    {text}")));
        self.line(&format!(
            "    runs[i / {vector}] = tw::load_run_if<{ty}, {vector}>({inside}, {pointer}, tw::narrow_to<{ty}>::from({value}));"
        ));
        self.line("  }");
        self.line("#pragma unroll");
        self.line(&format!(
            "  for (int i = 0; i < {count}; ++i) {register} = tw::widen(runs[i / {vector}].at[i % {vector}]);"
        ));
        self.line("}");
        Ok(())
    }
}
