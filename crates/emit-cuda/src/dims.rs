//! Integers as C++ expressions. Everything is `int`; offsets into tensors are `tw::i64`.

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_layout::{Atom, Dim, Range};

/// Names in scope: how each is written, and which values it takes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    names: BTreeMap<Arc<str>, (String, Range)>,
}

impl Scope {
    /// Binds a symbol.
    pub(crate) fn bind(&mut self, name: &Arc<str>, text: String, range: Range) {
        self.names.insert(name.clone(), (text, range));
    }

    /// Bounds of an expression.
    pub(crate) fn bounds(&self, dim: &Dim) -> Range {
        dim.bounds(&|name| self.names.get(name).map(|(_, r)| *r))
    }

    /// The expression in C++, in `int` arithmetic.
    pub(crate) fn text(&self, dim: &Dim) -> String {
        self.print(dim, false)
    }

    /// The expression in C++, in 64-bit arithmetic.
    pub(crate) fn wide(&self, dim: &Dim) -> String {
        self.print(dim, true)
    }

    fn print(&self, dim: &Dim, wide: bool) -> String {
        if let Some(value) = dim.as_const() {
            return if wide { format!("{value}ll") } else { value.to_string() };
        }
        let mut out = String::new();
        // Positive terms first, so that no expression starts with a sign.
        let mut terms: Vec<_> = dim.terms().iter().collect();
        terms.sort_by_key(|(_, c)| *c < 0);
        for (i, (atoms, coefficient)) in terms.into_iter().enumerate() {
            let magnitude = coefficient.unsigned_abs();
            let sign = match (i, *coefficient < 0) {
                (0, true) => "-",
                (0, false) => "",
                (_, true) => " - ",
                (_, false) => " + ",
            };
            let mut factors: Vec<String> = atoms.iter().map(|a| self.atom(a, wide)).collect();
            if wide && let Some(first) = factors.first_mut() {
                *first = format!("(tw::i64){first}");
            }
            if magnitude != 1 || factors.is_empty() {
                factors.push(magnitude.to_string());
            }
            out.push_str(sign);
            out.push_str(&factors.join(" * "));
        }
        if dim.terms().len() > 1 || out.starts_with('-') { format!("({out})") } else { out }
    }

    fn atom(&self, atom: &Atom, wide: bool) -> String {
        match atom {
            Atom::Sym(name) => match self.names.get(name) {
                Some((text, _)) => text.clone(),
                None => format!("unbound_{name}"),
            },
            Atom::FloorDiv(a, b) | Atom::Mod(a, b) => {
                let (x, y) = (self.print(a, wide), self.print(b, wide));
                let division = matches!(atom, Atom::FloorDiv(..));
                if self.bounds(a).min >= 0 {
                    format!("({x} {} {y})", if division { "/" } else { "%" })
                } else {
                    format!("tw::{}({x}, {y})", if division { "floor_div" } else { "floor_mod" })
                }
            }
            Atom::Min(a, b) | Atom::Max(a, b) => {
                let name = if matches!(atom, Atom::Min(..)) { "min" } else { "max" };
                format!("{name}({}, {})", self.print(a, wide), self.print(b, wide))
            }
        }
    }
}
