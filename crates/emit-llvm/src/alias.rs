//! What LLVM is told about which memory is which: results do not lie over operands, so that a value
//! read once may stay in a register while results are stored.
//!
//! Parameters are addresses from a table, of which LLVM knows nothing. Each operand has a scope;
//! its reads belong to it, and stores name the scopes that they keep out of. A result may lie in the
//! memory of an operand of the same type and layout (`may_overwrite` of the tile IR): such pairs
//! are left open.

use crate::emitter::Emitter;
use std::fmt::Write;
use tilewright_tile::{Access, Param, ParamId};

/// Number of the first node; `!0` is the mark of stores past the caches.
const FIRST: u32 = 1;

impl Emitter<'_> {
    fn operand_of(&self, base: &str) -> Option<(u32, &Param)> {
        let number = base.strip_prefix("%p")?.parse::<u32>().ok()?;
        Some((number, &self.k.params[ParamId(number)]))
    }

    /// The scopes that a store to `param` keeps out of.
    fn kept_out(&self, param: &Param) -> Vec<String> {
        let may_lie_over = |from: &Param| from.dtype == param.dtype && from.layout == param.layout;
        let operands = self.k.params.iter();
        operands
            .filter(|(_, p)| p.access == Access::In && !may_lie_over(p))
            .map(|(id, _)| format!("!{}", FIRST + 1 + 2 * id.0))
            .collect()
    }

    /// Follows a read from this base.
    pub(crate) fn read_tag(&self, base: &str) -> String {
        match self.operand_of(base) {
            Some((n, param)) if param.access == Access::In => {
                format!(", !alias.scope !{}", FIRST + 2 + 2 * n)
            }
            _ => String::new(),
        }
    }

    /// Follows a store to this base.
    pub(crate) fn write_tag(&self, base: &str) -> String {
        match self.operand_of(base) {
            Some((n, param)) if param.access == Access::Out && !self.kept_out(param).is_empty() => {
                format!(", !noalias !{}", FIRST + 1 + 2 * self.k.params.len() as u32 + n)
            }
            _ => String::new(),
        }
    }

    /// The nodes that the tags name.
    pub(crate) fn alias_nodes(&self) -> String {
        let mut out = format!("!{FIRST} = distinct !{{!{FIRST}}}\n");
        let count = self.k.params.len() as u32;
        for (id, param) in self.k.params.iter() {
            let scope = FIRST + 1 + 2 * id.0;
            let lists = FIRST + 1 + 2 * count + id.0;
            let _ = writeln!(out, "!{scope} = distinct !{{!{scope}, !{FIRST}}}");
            let _ = writeln!(out, "!{} = !{{!{scope}}}", scope + 1);
            let _ = writeln!(out, "!{lists} = !{{{}}}", self.kept_out(param).join(", "));
        }
        out
    }
}
