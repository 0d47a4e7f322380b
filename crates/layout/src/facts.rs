//! What is known about integer symbols, and what follows from it.
//!
//! [`Facts`] holds for each symbol a range, upper bounds over other symbols (`$3 <= M - 8*pm - 1`)
//! and, for derived symbols, a definition (`$5 = 16*$4 + $l`). From these it simplifies floors and
//! remainders ([`Facts::simplify`]) and proves that a coordinate lies inside a tensor
//! ([`Facts::proves_non_negative`]): the two things on which fast addresses depend.

use crate::dim::{Atom, Dim, Range};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Knowledge about one symbol.
#[derive(Clone, Debug)]
struct Fact {
    range: Range,
    /// The symbol is at most each of these.
    at_most: Vec<Dim>,
    definition: Option<Dim>,
}

/// Knowledge about all symbols in scope.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    map: BTreeMap<Arc<str>, Fact>,
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a.abs() } else { gcd(b, a % b) }
}

impl Facts {
    /// Declares a symbol.
    pub fn declare(&mut self, name: &str, range: Range, at_most: Vec<Dim>) {
        self.map.insert(name.into(), Fact { range, at_most, definition: None });
    }

    /// Declares a symbol that stands for an expression.
    pub fn define(&mut self, name: &str, at_most: Vec<Dim>, definition: Dim) {
        let mut range = self.bounds(&definition);
        for limit in &at_most {
            range.max = range.max.min(self.bounds(limit).max);
        }
        let fact = Fact { range, at_most, definition: Some(definition) };
        self.map.insert(name.into(), fact);
    }

    /// Forgets a symbol.
    pub fn forget(&mut self, name: &str) {
        self.map.remove(name);
    }

    /// Interval of the value.
    pub fn bounds(&self, dim: &Dim) -> Range {
        dim.bounds(&|name| self.map.get(name).map(|f| f.range))
    }

    /// Replaces derived symbols by their definitions.
    pub fn expand(&self, dim: &Dim) -> Dim {
        let mut dim = dim.clone();
        for _ in 0..8 {
            let mut derived = false;
            dim.for_each_symbol(&mut |s| {
                derived |= self.map.get(s).is_some_and(|f| f.definition.is_some());
            });
            if !derived {
                break;
            }
            dim = dim.substitute(&|name| self.map.get(name).and_then(|f| f.definition.clone()));
        }
        dim
    }

    /// The same value with floors, remainders, minima and maxima resolved where ranges allow.
    pub fn simplify(&self, dim: &Dim) -> Dim {
        let mut sum = Dim::new(0);
        for (mono, coeff) in dim.terms() {
            let mut product = Dim::new(*coeff);
            for atom in mono {
                let factor = match atom {
                    Atom::Sym(name) => Dim::sym(name.clone()),
                    Atom::FloorDiv(a, b) => self.floor_div(&self.simplify(a), &self.simplify(b)),
                    Atom::Mod(a, b) => self.modulo(&self.simplify(a), &self.simplify(b)),
                    Atom::Min(a, b) => {
                        let (a, b) = (self.simplify(a), self.simplify(b));
                        if self.proves_le(&a, &b) {
                            a
                        } else if self.proves_le(&b, &a) {
                            b
                        } else {
                            a.min_with(&b)
                        }
                    }
                    Atom::Max(a, b) => {
                        let (a, b) = (self.simplify(a), self.simplify(b));
                        if self.proves_le(&a, &b) {
                            b
                        } else if self.proves_le(&b, &a) {
                            a
                        } else {
                            a.max_with(&b)
                        }
                    }
                };
                product = &product * &factor;
            }
            sum = &sum + &product;
        }
        sum
    }

    /// Splits `a = g*q + r` with `g` a divisor of `b` and `0 <= r < g`, both seen from the terms
    /// and ranges: then `floor(a/b) = floor(q/(b/g))` and `a mod b = g*(q mod (b/g)) + r`.
    fn split(&self, a: &Dim, b: i64) -> Option<(i64, Dim, Dim)> {
        let mut divisors: Vec<i64> =
            a.terms().iter().map(|(_, c)| gcd(*c, b)).filter(|g| *g > 1).collect();
        divisors.sort_unstable();
        divisors.dedup();
        for g in divisors.into_iter().rev() {
            let (mut q, mut r) = (Dim::new(0), Dim::new(0));
            for (mono, coeff) in a.terms() {
                let mut term = Dim::new(1);
                for atom in mono {
                    term = term * atom_dim(atom);
                }
                if coeff % g == 0 {
                    q = q + term * (coeff / g);
                } else {
                    r = r + term * *coeff;
                }
            }
            let range = self.bounds(&r);
            if range.min >= 0 && range.max < g {
                return Some((g, q, r));
            }
        }
        None
    }

    fn floor_div(&self, a: &Dim, b: &Dim) -> Dim {
        let plain = a.floor_div(b);
        let Some(divisor) = b.as_const().filter(|d| *d > 0) else { return plain };
        // The constructor may have split off whole multiples already.
        let [(mono, 1)] = plain.terms() else { return self.resolve_atoms(&plain) };
        let [Atom::FloorDiv(a, _)] = mono.as_slice() else { return plain };
        let range = self.bounds(a);
        if range.min > i64::MIN && range.max < i64::MAX {
            let (low, high) = (range.min.div_euclid(divisor), range.max.div_euclid(divisor));
            if low == high {
                return Dim::new(low);
            }
        }
        match self.split(a, divisor) {
            Some((g, q, _)) => self.floor_div(&q, &Dim::new(divisor / g)),
            None => plain,
        }
    }

    fn resolve_atoms(&self, dim: &Dim) -> Dim {
        // One more look at floors that appear inside a sum.
        let mut sum = Dim::new(0);
        for (mono, coeff) in dim.terms() {
            let mut product = Dim::new(*coeff);
            for atom in mono {
                let factor = match atom {
                    Atom::FloorDiv(a, b) if a.floor_div(b) == atom_dim(atom) => {
                        self.floor_div(a, b)
                    }
                    other => atom_dim(other),
                };
                product = product * factor;
            }
            sum = sum + product;
        }
        sum
    }

    fn modulo(&self, a: &Dim, b: &Dim) -> Dim {
        let plain = a.modulo(b);
        let Some(divisor) = b.as_const().filter(|d| *d > 0) else { return plain };
        let [(mono, 1)] = plain.terms() else { return plain };
        let [Atom::Mod(a, _)] = mono.as_slice() else { return plain };
        let range = self.bounds(a);
        if range.min > i64::MIN && range.max < i64::MAX {
            let low = range.min.div_euclid(divisor);
            if low == range.max.div_euclid(divisor) {
                return &**a - low * divisor;
            }
        }
        match self.split(a, divisor) {
            Some((g, q, r)) => self.modulo(&q, &Dim::new(divisor / g)) * g + r,
            None => plain,
        }
    }

    /// `a <= b` for all values of the symbols.
    pub fn proves_le(&self, a: &Dim, b: &Dim) -> bool {
        self.proves_non_negative(&(b - a))
    }

    /// `dim >= 0` for all values of the symbols.
    pub fn proves_non_negative(&self, dim: &Dim) -> bool {
        self.prove(dim, 4)
    }

    fn prove(&self, dim: &Dim, depth: u32) -> bool {
        if self.bounds(dim).min >= 0 {
            return true;
        }
        if depth == 0 {
            return false;
        }
        // A symbol that counts against us may be replaced by what it is at most.
        for (mono, coeff) in dim.terms() {
            let [Atom::Sym(name)] = mono.as_slice() else { continue };
            if *coeff >= 0 {
                continue;
            }
            let Some(fact) = self.map.get(name) else { continue };
            let own = Dim::sym(name.clone());
            let rest = dim - &own * *coeff;
            let mut elsewhere = false;
            rest.for_each_symbol(&mut |s| elsewhere |= s == name);
            if elsewhere {
                continue;
            }
            for limit in &fact.at_most {
                if self.prove(&(&rest + limit * *coeff), depth - 1) {
                    return true;
                }
            }
            if let Some(definition) = &fact.definition
                && self.prove(&(&rest + definition * *coeff), depth - 1)
            {
                return true;
            }
        }
        false
    }
}

/// What a count promises about an index below it: the index is at most each of these.
pub fn uppers(count: &Dim) -> Vec<Dim> {
    if let [(mono, 1)] = count.terms()
        && let [Atom::Min(a, b)] = mono.as_slice()
    {
        let mut all = uppers(a);
        all.extend(uppers(b));
        return all;
    }
    vec![count - 1]
}

/// An atom as an expression.
pub fn atom_dim(atom: &Atom) -> Dim {
    match atom {
        Atom::Sym(name) => Dim::sym(name.clone()),
        Atom::FloorDiv(a, b) => a.floor_div(b),
        Atom::Mod(a, b) => a.modulo(b),
        Atom::Min(a, b) => a.min_with(b),
        Atom::Max(a, b) => a.max_with(b),
    }
}

/// True when the symbol occurs.
pub fn mentions(dim: &Dim, symbol: &str) -> bool {
    let mut found = false;
    dim.for_each_symbol(&mut |s| found |= &**s == symbol);
    found
}

/// `dim = coeff * symbol + rest` with neither mentioning the symbol.
pub fn linear_in(dim: &Dim, symbol: &str) -> Option<(Dim, Dim)> {
    let (mut coeff, mut rest) = (Dim::new(0), Dim::new(0));
    for (mono, c) in dim.terms() {
        let mut times = 0;
        let mut factor = Dim::new(*c);
        for atom in mono {
            match atom {
                Atom::Sym(name) if &**name == symbol => times += 1,
                other => {
                    let d = atom_dim(other);
                    if mentions(&d, symbol) {
                        return None;
                    }
                    factor = factor * d;
                }
            }
        }
        match times {
            0 => rest = rest + factor,
            1 => coeff = coeff + factor,
            _ => return None,
        }
    }
    Some((coeff, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let mut f = Facts::default();
        f.declare("l", Range { min: 0, max: 15 }, vec![]);
        f.declare("j", Range { min: 0, max: 100 }, vec![]);
        f.declare("M", Range { min: 1, max: 4096 }, vec![]);
        f.declare("p", Range { min: 0, max: 511 }, vec![]);
        f
    }

    #[test]
    fn lanes_stay_inside_their_block() {
        let f = facts();
        let x = Dim::sym("j") * 16 + Dim::sym("l");
        let half = Dim::sym("j").floor_div(&Dim::new(2));
        assert_eq!(f.simplify(&x.floor_div(&Dim::new(32))), half);
        assert_eq!(f.simplify(&x.floor_div(&Dim::new(16))), Dim::sym("j"));
        assert_eq!(f.simplify(&x.modulo(&Dim::new(16))), Dim::sym("l"));
        let odd = Dim::sym("j").modulo(&Dim::new(2)) * 16 + Dim::sym("l");
        assert_eq!(f.simplify(&x.modulo(&Dim::new(32))), odd);
        assert_eq!(f.simplify(&Dim::sym("l").floor_div(&Dim::new(16))), Dim::new(0));
    }

    #[test]
    fn a_row_below_its_bound_lies_inside() {
        let mut f = facts();
        let (m, p) = (Dim::sym("M"), Dim::sym("p"));
        let left = &m - &p * 8;
        f.declare("i", Range { min: 0, max: 7 }, vec![&left - 1]);
        let row = &p * 8 + Dim::sym("i");
        assert!(f.proves_non_negative(&(&m - 1 - &row)));
        assert!(!f.proves_non_negative(&(&m - 2 - &row)));
        assert!(f.proves_non_negative(&row));
    }
}
