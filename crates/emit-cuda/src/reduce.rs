//! Reductions over the rows of fragments of tensor cores and of plain multiply-adds.

use crate::memory_type;
use crate::stmts::Printer;
use tilewright_base::{Error, Result};
use tilewright_device::{Extent, FragRef, Spread};
use tilewright_tile::ReduceKind;

impl Printer<'_> {
    /// Combines the elements of each row of `src` into `dst`, or into what is there.
    pub(crate) fn reduce(
        &mut self,
        dst: &FragRef,
        kind: ReduceKind,
        src: &FragRef,
        accumulate: bool,
    ) -> Result<()> {
        let d = self.program.frags[dst.frag].clone();
        let s = self.program.frags[src.frag].clone();
        let spread = Self::spread(&s, self.cols(src));
        let held = memory_type(d.dtype);
        let combine = combination(kind);
        self.needs_helpers();
        if let Spread::Lines { lanes, threads, .. } = s.spread {
            return self.reduce_lines(dst, src, (lanes, threads), kind, accumulate);
        }
        if d.extent != Extent::PerRow || s.extent != Extent::Tile {
            return Err(Error::unsupported("reduction over rows of a fragment"));
        }
        let across = match s.spread {
            Spread::Wgmma | Spread::MmaSync { warps_n: 1, .. } => "tw::across_lanes<4>(x, combine)",
            Spread::Outer { threads_n: 4, .. } => "tw::across_outer(x, combine)",
            _ => return Err(Error::unsupported("reduction in this spread")),
        };
        let from = self.register(src, "i")?;
        let to = self.register(dst, "j")?;
        self.line("{");
        self.line(&format!(
            "  const auto combine = [](tw::value<{held}> x, tw::value<{held}> y) -> tw::value<{held}> {{ return {combine}; }};"
        ));
        self.line("#pragma unroll");
        self.line(&format!("  for (int j = 0; j < {spread}::PER_ROW; ++j) {{"));
        // Two chains a row, since few warps share a scheduler.
        self.line(&format!("    tw::value<{held}> half[2];"));
        self.line("    int n = 0;");
        self.line("#pragma unroll");
        self.line(&format!(
            "    for (int i = 0; i < {spread}::TILE; ++i) if ({spread}::per_row(i) == j) {{ half[n % 2] = n < 2 ? (tw::value<{held}>){from} : combine(half[n % 2], {from}); ++n; }}"
        ));
        self.line(&format!("    tw::value<{held}> x = combine(half[0], half[1]);"));
        self.line(&format!("    x = {across};"));
        if accumulate {
            self.line(&format!("    {to} = combine({to}, x);"));
        } else {
            self.line(&format!("    {to} = x;"));
        }
        self.line("  }");
        self.line("}");
        Ok(())
    }
}

/// How `x` and `y` are combined.
pub(crate) fn combination(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Sum => "x + y",
        ReduceKind::Prod => "x * y",
        ReduceKind::Max => "tw_max(x, y)",
        ReduceKind::Min => "tw_min(x, y)",
    }
}
