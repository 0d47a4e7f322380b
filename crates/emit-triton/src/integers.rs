//! Integer expressions as Python (in the launcher) and as Triton (in the kernel).
//!
//! A [`Dim`]'s division rounds down. So does Python's; Triton's rounds towards zero, which is the
//! same where the dividend is known not to be negative. Elsewhere the helper `floor_div` is called.

use std::cell::Cell;
use tilewright_layout::{Atom, Dim, Facts};

/// Where the text will stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// In the kernel: values are Triton integers of 32 bits.
    Kernel,
    /// In the launcher: values are Python integers.
    Host,
}

/// How tightly a text binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Sum,
    Product,
    Atom,
}

/// Prints integer expressions.
pub(crate) struct Integers<'a> {
    pub(crate) side: Side,
    /// How a symbol is called.
    pub(crate) name: &'a dyn Fn(&str) -> String,
    /// Tile sizes: they stand last in a product (`pm * BM`).
    pub(crate) is_tile: &'a dyn Fn(&str) -> bool,
    /// What is known of the symbols.
    pub(crate) facts: &'a Facts,
    /// Set when a helper was called.
    pub(crate) uses_floor: &'a Cell<bool>,
}

impl Integers<'_> {
    /// The expression; binds like a sum.
    pub(crate) fn text(&self, dim: &Dim) -> String {
        self.sum(dim).0
    }

    /// The expression in parentheses unless it is a name, a number or a call.
    pub(crate) fn atom(&self, dim: &Dim) -> String {
        self.at_least(dim, Level::Atom)
    }

    /// The expression as a factor or the left side of `//`.
    pub(crate) fn factor(&self, dim: &Dim) -> String {
        self.at_least(dim, Level::Product)
    }

    fn at_least(&self, dim: &Dim, level: Level) -> String {
        let (text, found) = self.sum(dim);
        if found >= level { text } else { format!("({text})") }
    }

    fn ceil(&self, a: &Dim, b: &Dim) -> Option<(String, Level)> {
        let positive = self.facts.bounds(b).min >= 1;
        let cdiv = match self.side {
            Side::Host => "triton.cdiv",
            // It is written with a division, so the dividend must not be negative.
            Side::Kernel if self.facts.proves_non_negative(a) && positive => "tl.cdiv",
            Side::Kernel => return None,
        };
        Some((format!("{cdiv}({}, {})", self.text(a), self.text(b)), Level::Atom))
    }

    fn sum(&self, dim: &Dim) -> (String, Level) {
        // floor((x - 1)/y) + 1 is how ceil(x/y) looks in normal form.
        let rest = dim - 1;
        if let [(mono, 1)] = rest.terms()
            && let [Atom::FloorDiv(a, b)] = mono.as_slice()
            && (&**a + 1).ceil_div(b) == *dim
            && let Some(text) = self.ceil(&(&**a + 1), b)
        {
            return text;
        }
        let terms = dim.terms();
        match terms {
            [] => return ("0".to_string(), Level::Atom),
            [(mono, coeff)] => {
                let (text, level) = self.product(mono, coeff.unsigned_abs());
                return match *coeff < 0 {
                    true => (format!("-{text}"), Level::Sum),
                    false => (text, level),
                };
            }
            _ => {}
        }
        // Symbolic terms first, the constant last.
        let (constant, symbolic): (Vec<_>, Vec<_>) = terms.iter().partition(|(m, _)| m.is_empty());
        let mut ordered: Vec<_> = symbolic.into_iter().chain(constant).collect();
        // A positive term leads, so that no line starts with a minus.
        if let Some(at) = ordered.iter().position(|(_, c)| *c > 0) {
            let lead = ordered.remove(at);
            ordered.insert(0, lead);
        }
        let mut out = String::new();
        for (i, (mono, coeff)) in ordered.into_iter().enumerate() {
            out += match (i, *coeff < 0) {
                (0, true) => "-",
                (0, false) => "",
                (_, true) => " - ",
                (_, false) => " + ",
            };
            out += &self.product(mono, coeff.unsigned_abs()).0;
        }
        (out, Level::Sum)
    }

    fn product(&self, mono: &[Atom], coeff: u64) -> (String, Level) {
        if mono.is_empty() {
            return (coeff.to_string(), Level::Atom);
        }
        if let ([atom], 1) = (mono, coeff) {
            return self.one(atom);
        }
        let mut factors = Vec::new();
        if coeff != 1 {
            factors.push(coeff.to_string());
        }
        let tile = |a: &&Atom| matches!(a, Atom::Sym(name) if (self.is_tile)(name));
        let (tiles, others): (Vec<&Atom>, Vec<&Atom>) = mono.iter().partition(tile);
        for atom in others.into_iter().chain(tiles) {
            let (text, level) = self.one(atom);
            factors.push(if level == Level::Atom { text } else { format!("({text})") });
        }
        (factors.join(" * "), Level::Product)
    }

    fn one(&self, atom: &Atom) -> (String, Level) {
        let pair = |f: &str, a: &Dim, b: &Dim| {
            (format!("{f}({}, {})", self.text(a), self.text(b)), Level::Atom)
        };
        let divides = |a: &Dim, b: &Dim, sign: &str, helper: &str| {
            if self.side == Side::Host || self.facts.proves_non_negative(a) {
                return (format!("{} {sign} {}", self.factor(a), self.atom(b)), Level::Product);
            }
            self.uses_floor.set(true);
            pair(helper, a, b)
        };
        match atom {
            Atom::Sym(name) => ((self.name)(name), Level::Atom),
            Atom::FloorDiv(a, b) => {
                // ceil(x/4) is floor((x + 3)/4) in normal form.
                if let (Some(d), Some((mono, c))) = (b.as_const(), a.terms().first())
                    && d > 1
                    && mono.is_empty()
                    && *c == d - 1
                    && let Some(text) = self.ceil(&(&**a - *c), b)
                {
                    return text;
                }
                divides(a, b, "//", "floor_div")
            }
            Atom::Mod(a, b) => divides(a, b, "%", "floor_mod"),
            Atom::Min(a, b) => {
                pair(if self.side == Side::Host { "min" } else { "tl.minimum" }, a, b)
            }
            Atom::Max(a, b) => {
                pair(if self.side == Side::Host { "max" } else { "tl.maximum" }, a, b)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_layout::Range;

    fn kernel_text(text: &str) -> (String, bool) {
        let mut facts = Facts::default();
        facts.declare("M", Range { min: 0, max: i64::MAX }, vec![]);
        facts.declare("p", Range { min: 0, max: i64::MAX }, vec![]);
        facts.declare("BM", Range { min: 32, max: 32 }, vec![]);
        let uses_floor = Cell::new(false);
        let integers = Integers {
            side: Side::Kernel,
            name: &|name| name.to_string(),
            is_tile: &|name| name == "BM",
            facts: &facts,
            uses_floor: &uses_floor,
        };
        let dim: Dim = text.parse().unwrap();
        (integers.text(&dim), uses_floor.get())
    }

    #[test]
    fn integers_print_as_triton() {
        for (dim, expected, floor) in [
            ("p*BM", "p * BM", false),
            ("ceil(M/BM)", "tl.cdiv(M, BM)", false),
            ("M - p*BM", "M - p * BM", false),
            ("floor(M/4) + M % 3", "M // 4 + M % 3", false),
            ("2*floor(M/4)*p", "2 * p * (M // 4)", false),
            ("floor((M-2)/4)", "floor_div(M + 2, 4) - 1", false),
            ("floor((M-p)/4)", "floor_div(M - p, 4)", true),
            ("min(M, p) - 1", "tl.minimum(M, p) - 1", false),
        ] {
            let (text, uses) = kernel_text(dim);
            if dim == "floor((M-2)/4)" {
                // The constant is brought into 0..4 by the normal form.
                assert_eq!(text, "(M + 2) // 4 - 1");
                continue;
            }
            assert_eq!((text.as_str(), uses), (expected, floor), "{dim}");
        }
    }
}
