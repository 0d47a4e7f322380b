//! Maps that change one column a row: `select(column == target, f(x, ..), x)` of a tile, where the columns are counted and
//! the target is data of the row. A thread compares the target with each of its runs of columns, and only the run that has it with
//! its elements.

use crate::stmts::Printer;
use crate::walk::visit;
use std::collections::BTreeSet;
use tilewright_base::{DType, Result};
use tilewright_device::{Extent, FragId, FragRef, Program, Spread, Stmt};
use tilewright_expr::{ExprId, Func, Node, Op};

/// Fragments of tiles that hold numbers of columns, and nothing else.
pub(crate) fn columns(program: &Program) -> BTreeSet<FragId> {
    let (mut counted, mut others) = (BTreeSet::new(), BTreeSet::new());
    let roles = program.roles.iter().map(|r| &r.body);
    for body in roles.chain([&program.setup, &program.teardown]) {
        visit(body, &mut |stmt| match stmt {
            Stmt::Iota { dst, axis: 1, .. } if program.frags[dst.frag].extent == Extent::Tile => {
                counted.insert(dst.frag);
            }
            Stmt::Iota { dst, .. }
            | Stmt::Fill { dst, .. }
            | Stmt::Load { dst, .. }
            | Stmt::Map { dst, .. }
            | Stmt::Reduce { dst, .. }
            | Stmt::FromSmem { dst, .. } => {
                others.insert(dst.frag);
            }
            Stmt::Line(step) => others.extend(step.writes().into_iter().map(|f| f.frag)),
            _ => {}
        });
    }
    &counted - &others
}

/// The operands of such a map.
struct Hit<'a> {
    /// What stays as it is elsewhere.
    plain: &'a FragRef,
    columns: &'a FragRef,
    target: &'a FragRef,
    /// Columns of a run.
    run: u32,
}

/// Which operand a node of a function is.
fn operand<'a>(func: &Func, id: ExprId, args: &'a [FragRef]) -> Option<&'a FragRef> {
    let Node::Param(p) = func.node(id) else { return None };
    args.get(*p as usize)
}

impl Printer<'_> {
    fn hit<'a>(&self, dst: &FragRef, func: &Func, args: &'a [FragRef]) -> Option<Hit<'a>> {
        let Node::Op(Op::Select, parts) = func.node(func.result()) else { return None };
        let Node::Op(Op::Eq, sides) = func.node(parts[0]) else { return None };
        let plain = operand(func, parts[2], args)?;
        let (a, b) = (operand(func, sides[0], args)?, operand(func, sides[1], args)?);
        let (columns, target) = if self.columns.contains(&a.frag) { (a, b) } else { (b, a) };
        let frag = |r: &FragRef| &self.program.frags[r.frag];
        let of = frag(dst);
        let Spread::Lines { vector: run, .. } = of.spread else { return None };
        let alike = |r: &FragRef| {
            let f = frag(r);
            (f.extent, f.rows, f.cols) == (of.extent, of.rows, of.cols) && f.spread == of.spread
        };
        let whole = [dst, plain, columns, target].iter().all(|r| r.cols.is_none());
        let fits = whole
            && of.extent == Extent::Tile
            && run > 1
            && of.cols % run == 0
            && self.columns.contains(&columns.frag)
            && alike(plain)
            && alike(columns)
            && frag(target).extent == Extent::PerRow
            && [columns, target].iter().all(|r| frag(r).dtype == DType::I32)
            && frag(plain).dtype == of.dtype;
        fits.then_some(Hit { plain, columns, target, run })
    }

    /// Prints a map that changes one column a row; whether it is one.
    pub(crate) fn one_column(
        &mut self,
        dst: &FragRef,
        func: &Func,
        args: &[FragRef],
        call: &str,
    ) -> Result<bool> {
        let Some(Hit { plain, columns, target, run }) = self.hit(dst, func, args) else {
            return Ok(false);
        };
        let count = Printer::count(&self.program.frags[dst.frag], self.cols(dst));
        let to = self.register(dst, "i")?;
        let from = self.operand(dst, plain, "i")?;
        let (target, first) = (self.operand(dst, target, "n")?, self.operand(dst, columns, "n")?);
        self.line("#pragma unroll");
        self.line(&format!("for (int n = 0; n < {count}; n += {run}) {{"));
        self.line("#pragma unroll");
        self.line(&format!("  for (int i = n; i < n + {run}; ++i) {to} = {from};"));
        self.line(&format!(
            "  if (__builtin_expect((tw::u32){target} - (tw::u32){first} < {run}u, 0)) {{"
        ));
        self.line("#pragma unroll");
        self.line(&format!("    for (int i = n; i < n + {run}; ++i) {to} = {call};"));
        self.line("  }");
        self.line("}");
        Ok(true)
    }
}
