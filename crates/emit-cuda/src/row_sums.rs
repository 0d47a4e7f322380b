//! Reductions of the rows of tiles in [`Spread::Lines`].
//!
//! What a row's warps have goes by shared memory, and the block meets for it. Neighbouring reductions meet once for all of
//! them, and each such group has scratch of its own. So nobody needs to meet before it writes there:
//!
//! - outside loops, for nobody has read it;
//! - in a loop with several groups, for between two turns of one lies the meeting of another;
//! - in a single loop with one group, for it has two places in turns, and who writes to one has been at the meeting of the
//!   other, where everybody went after reading the first.
//!
//! Groups under a condition in a loop do meet before.

use crate::line_steps::put;
use crate::memory_type;
use crate::reduce::combination;
use crate::stmts::Printer;
use tilewright_base::Result;
use tilewright_device::{Extent, FragId, FragRef, Program, Spread, Stmt};
use tilewright_tile::ReduceKind;

/// What the printer knows of the loop that it is in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Around {
    /// Groups of reductions over several warps that every turn of the innermost loop meets for.
    groups: usize,
    /// Its variable, if it is the only loop and steps by one.
    turn: Option<String>,
}

/// A reduction of the rows of a tile.
struct RowSum<'a> {
    dst: &'a FragRef,
    kind: ReduceKind,
    src: &'a FragRef,
    accumulate: bool,
}

fn row_sum<'a>(program: &Program, stmt: &'a Stmt) -> Option<(RowSum<'a>, u32, u32)> {
    let Stmt::Reduce { dst, kind, src, accumulate } = stmt else { return None };
    let (d, s) = (&program.frags[dst.frag], &program.frags[src.frag]);
    let Spread::Lines { lanes, threads, .. } = s.spread else { return None };
    let sum = RowSum { dst, kind: *kind, src, accumulate: *accumulate };
    (d.extent == Extent::PerRow).then_some((sum, lanes, threads))
}

/// How many of the first of these steps are reductions of rows that meet together: none where the first is no such
/// reduction.
fn together(program: &Program, stmts: &[Stmt]) -> usize {
    let shape = |stmt: &Stmt| {
        let (sum, lanes, threads) = row_sum(program, stmt)?;
        let d = &program.frags[sum.dst.frag];
        Some((lanes, threads, d.rows, d.dtype))
    };
    let Some(first) = stmts.first().and_then(shape) else { return 0 };
    if first.0 <= 32 {
        return 1;
    }
    stmts.iter().take_while(|stmt| shape(stmt) == Some(first)).count()
}

impl Around {
    /// For a loop with this body, inside others or not.
    pub(crate) fn of(program: &Program, body: &[Stmt], turn: Option<String>) -> Around {
        let (mut groups, mut at) = (0, 0);
        while at < body.len() {
            let n = together(program, &body[at..]);
            let meets =
                n > 0 && row_sum(program, &body[at]).is_some_and(|(_, lanes, _)| lanes > 32);
            groups += usize::from(meets);
            at += n.max(1);
        }
        Around { groups, turn }
    }
}

impl Printer<'_> {
    /// What a thread has of its row `j`, as a statement that declares `x`.
    fn folded(&self, sum: &RowSum<'_>, spread: &str, held: &str) -> String {
        let products = self.products.of(sum.src.frag).filter(|_| sum.kind == ReduceKind::Sum);
        let Some([a, b]) = products else {
            let from = self.frag_name(sum.src.frag);
            return format!("tw::value<{held}> x = tw::fold_row<{spread}>({from}, j, combine);");
        };
        let factor = |f: FragId| {
            let at = match self.program.frags[f].extent {
                Extent::Tile => format!("j * {spread}::EACH + k"),
                Extent::PerCol => "k".to_owned(),
                Extent::PerRow => "j".to_owned(),
            };
            format!("[&](int k) {{ return {}[{at}]; }}", self.frag_name(f))
        };
        format!("float x = tw::fold_products<{spread}::EACH>({}, {});", factor(a), factor(b))
    }

    /// Prints steps, reductions of rows that meet together as one.
    pub(crate) fn steps(&mut self, stmts: &[Stmt]) -> Result<()> {
        let mut rest = stmts;
        while let Some((stmt, others)) = rest.split_first() {
            let n = together(self.program, rest);
            if n == 0 {
                self.stmt(stmt)?;
                rest = others;
                continue;
            }
            let (sums, others) = rest.split_at(n);
            sums.iter().for_each(|s| self.products.before(s));
            self.reduce_rows(sums)?;
            sums.iter().for_each(|s| self.products.after(self.program, s));
            rest = others;
        }
        Ok(())
    }

    /// Reductions of rows that meet together.
    fn reduce_rows(&mut self, stmts: &[Stmt]) -> Result<()> {
        let program = self.program;
        let sums: Vec<_> = stmts.iter().filter_map(|s| row_sum(program, s)).collect();
        let Some((first, lanes, threads)) = sums.first() else { return Ok(()) };
        let (lanes, d) = (*lanes, &program.frags[first.dst.frag]);
        let held = memory_type(d.dtype);
        let of = |sum: &RowSum<'_>| {
            let s = &program.frags[sum.src.frag];
            Self::spread(s, s.cols)
        };
        self.needs_helpers();
        if lanes <= 32 {
            for (sum, ..) in &sums {
                let spread = of(sum);
                self.line("{");
                self.combine_line(held, combination(sum.kind));
                self.line("#pragma unroll");
                self.line(&format!("  for (int j = 0; j < {spread}::PER_ROW; ++j) {{"));
                let x = self.folded(sum, &spread, held);
                self.line(&format!("    {x}"));
                self.line(&format!("    x = tw::across_lanes<{lanes}>(x, combine);"));
                let to = self.frag_name(sum.dst.frag);
                self.line(&put(&to, sum.accumulate));
                self.line("  }");
                self.line("}");
            }
            return Ok(());
        }
        let each = d.rows / (threads / lanes);
        let count = each * sums.len() as u32;
        let around = self.around.clone();
        let turn = around.turn.filter(|_| around.groups == 1);
        let meets_before = self.loops > 0 && around.groups < 2 && turn.is_none();
        let places = if turn.is_some() { 2 } else { 1 };
        self.line("{");
        self.line(&format!("  __shared__ tw::value<{held}> places[{places}][{count} * 32];"));
        let place = turn.map_or("0".to_owned(), |var| format!("{var} & 1"));
        self.line(&format!("  tw::value<{held}>* const scratch = places[{place}];"));
        self.line(&format!("  tw::value<{held}> warp[{count}];"));
        for (n, (sum, ..)) in sums.iter().enumerate() {
            let (spread, at) = (of(sum), n as u32 * each);
            self.line("  {");
            self.combine_line(held, combination(sum.kind));
            self.line("#pragma unroll");
            self.line(&format!("  for (int j = 0; j < {each}; ++j) {{"));
            let x = self.folded(sum, &spread, held);
            self.line(&format!("    {x}"));
            self.line(&format!("    warp[{at} + j] = tw::across_lanes<32>(x, combine);"));
            self.line("  }");
            self.line("  }");
        }
        self.line(&format!("  tw::meet_with<{meets_before}>(warp, scratch);"));
        for (n, (sum, ..)) in sums.iter().enumerate() {
            let at = n as u32 * each;
            self.line("  {");
            self.combine_line(held, combination(sum.kind));
            self.line("#pragma unroll");
            self.line(&format!("  for (int j = 0; j < {each}; ++j) {{"));
            self.line(&format!(
                "    const tw::value<{held}> x = tw::of_warps<{lanes}>(scratch + ({at} + j) * 32, combine);"
            ));
            let to = self.frag_name(sum.dst.frag);
            self.line(&put(&to, sum.accumulate));
            self.line("  }");
            self.line("  }");
        }
        self.line("}");
        Ok(())
    }
}
