//! [`Dim`]: an integer expression over symbols, kept in one normal form.
//!
//! A `Dim` is a polynomial with integer coefficients over *atoms*; an atom is a symbol (`N`) or an
//! opaque operation on other `Dim`s (`floor(x/y)`, `x % y`, `min`, `max`). Sums and products are
//! multiplied out and sorted, so two equal polynomials are equal as Rust values:
//!
//! ```
//! use tilewright_layout::Dim;
//! let (b, s) = (Dim::sym("B"), Dim::sym("S"));
//! assert_eq!((&b + 1) * &s, &b * &s + &s);
//! assert_eq!((&b * &s).floor_div(&s), b);
//! ```
//!
//! The same type serves tensor sizes, strides, offsets, tile sizes, loop bounds and grid indices:
//! what a symbol means is said by the container (a graph's symbols, a kernel's grid).
//! It prints and parses: `B*S + 1`, `ceil(M/BM)`, `floor(x/2)`, `x % 4`, `min(a, b)`.
//!
//! What it cannot represent: exact division as a promise, negative powers, data-dependent sizes
//! other than as a fresh symbol. Constant arithmetic saturates at the ends of `i64`: a size so
//! large fails later as too large instead of wrapping to something small.

use std::collections::BTreeMap;
use std::ops::{Add, Mul, Neg, Sub};
use std::sync::Arc;

/// An indivisible factor of a [`Dim`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Atom {
    /// A named unknown.
    Sym(Arc<str>),
    /// `floor(a / b)`.
    FloorDiv(Box<Dim>, Box<Dim>),
    /// `a - b * floor(a / b)`: the sign follows the divisor.
    Mod(Box<Dim>, Box<Dim>),
    /// The smaller.
    Min(Box<Dim>, Box<Dim>),
    /// The larger.
    Max(Box<Dim>, Box<Dim>),
}

/// A product of atoms, sorted, repeats for powers; empty for the constant term.
type Monomial = Vec<Atom>;

/// An integer expression over symbols in normal form; see the module's head.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Dim {
    /// Sorted by monomial, no zero coefficients; zero is the empty vector.
    terms: Vec<(Monomial, i64)>,
}

/// Values of symbols, for evaluation.
pub type Env = BTreeMap<Arc<str>, i64>;

/// Inclusive bounds of a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// Smallest value.
    pub min: i64,
    /// Largest value; `i64::MAX` when unbounded.
    pub max: i64,
}

/// A named unknown with its range, as graphs and kernels declare it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Symbol {
    /// The name, as in the text formats.
    pub name: Arc<str>,
    /// Which values it may take.
    pub range: Range,
}

/// Declared symbols, in order of declaration.
pub type Symbols = Vec<Symbol>;

impl Dim {
    /// The constant `value`.
    pub fn new(value: i64) -> Dim {
        if value == 0 { Dim::default() } else { Dim { terms: vec![(Vec::new(), value)] } }
    }

    /// The symbol `name`.
    pub fn sym(name: impl Into<Arc<str>>) -> Dim {
        Dim::atom(Atom::Sym(name.into()))
    }

    fn atom(atom: Atom) -> Dim {
        Dim { terms: vec![(vec![atom], 1)] }
    }

    fn from_map(map: BTreeMap<Monomial, i64>) -> Dim {
        Dim { terms: map.into_iter().filter(|(_, c)| *c != 0).collect() }
    }

    /// The terms of the polynomial, sorted: product of atoms and coefficient.
    pub fn terms(&self) -> &[(Vec<Atom>, i64)] {
        &self.terms
    }

    /// The value when it is a constant.
    pub fn as_const(&self) -> Option<i64> {
        match self.terms.as_slice() {
            [] => Some(0),
            [(monomial, value)] if monomial.is_empty() => Some(*value),
            _ => None,
        }
    }

    /// The name when it is exactly one symbol.
    pub fn as_symbol(&self) -> Option<&Arc<str>> {
        match self.terms.as_slice() {
            [(monomial, 1)] => match monomial.as_slice() {
                [Atom::Sym(name)] => Some(name),
                _ => None,
            },
            _ => None,
        }
    }

    /// True for the constant `value`.
    pub fn is(&self, value: i64) -> bool {
        self.as_const() == Some(value)
    }

    /// Splits `self` as `quotient * divisor + rest` where every term that the divisor divides
    /// goes to the quotient. The divisor must be a single term.
    fn split_by(&self, divisor: &Dim) -> Option<(Dim, Dim)> {
        let [(div_mono, div_coeff)] = divisor.terms.as_slice() else { return None };
        let (mut quotient, mut rest) = (BTreeMap::new(), BTreeMap::new());
        'terms: for (mono, coeff) in &self.terms {
            let mut left = mono.clone();
            let divides = coeff.checked_rem(*div_coeff) == Some(0)
                && div_mono.iter().all(|atom| {
                    left.iter().position(|a| a == atom).map(|at| left.remove(at)).is_some()
                });
            if divides {
                *quotient.entry(left).or_insert(0) += coeff / div_coeff;
                continue 'terms;
            }
            rest.insert(mono.clone(), *coeff);
        }
        Some((Dim::from_map(quotient), Dim::from_map(rest)))
    }

    /// For a positive constant divisor: `self` as `quotient * divisor + rest` where the constant
    /// term of `rest` lies in `0..divisor`. `None` when it does already.
    fn split_constant(&self, divisor: &Dim) -> Option<(i64, Dim)> {
        let d = divisor.as_const().filter(|&d| d > 0)?;
        let (_, constant) = self.terms.first().filter(|(mono, _)| mono.is_empty())?;
        let quotient = floor_div(*constant, d);
        quotient.checked_mul(d).filter(|&whole| whole != 0).map(|whole| (quotient, self - whole))
    }

    /// `floor(self / divisor)`. Dividing by zero stays symbolic and fails on evaluation.
    pub fn floor_div(&self, divisor: &Dim) -> Dim {
        if divisor.is(1) || self.is(0) {
            return self.clone();
        }
        if let (Some(a), Some(b)) = (self.as_const(), divisor.as_const())
            && b != 0
        {
            return Dim::new(floor_div(a, b));
        }
        if self == divisor {
            return Dim::new(1);
        }
        // floor((q*d + r) / d) = q + floor(r/d) for every integer q; so the constant term, too,
        // can be brought into 0..d.
        if let Some((quotient, rest)) = self.split_constant(divisor) {
            return rest.floor_div(divisor) + quotient;
        }
        if let Some((quotient, rest)) = self.split_by(divisor)
            && !quotient.is(0)
        {
            return quotient + rest.floor_div(divisor);
        }
        Dim::atom(Atom::FloorDiv(Box::new(self.clone()), Box::new(divisor.clone())))
    }

    /// `ceil(self / divisor)`, for a positive divisor.
    pub fn ceil_div(&self, divisor: &Dim) -> Dim {
        if let (Some(a), Some(b)) = (self.as_const(), divisor.as_const())
            && b > 0
        {
            return Dim::new(floor_div(a.saturating_add(b - 1), b));
        }
        // `floor((self + divisor - 1) / divisor)`, written so that a large divisor does not saturate.
        (self - 1).floor_div(divisor) + 1
    }

    /// `self - divisor * floor(self / divisor)`.
    pub fn modulo(&self, divisor: &Dim) -> Dim {
        if divisor.is(1) {
            return Dim::new(0);
        }
        if let (Some(a), Some(b)) = (self.as_const(), divisor.as_const())
            && b != 0
        {
            return Dim::new(a.wrapping_sub(b.wrapping_mul(floor_div(a, b))));
        }
        if let Some((_, rest)) = self.split_constant(divisor) {
            return rest.modulo(divisor);
        }
        match self.split_by(divisor) {
            Some((_, rest)) if rest.is(0) => Dim::new(0),
            Some((quotient, rest)) if !quotient.is(0) => rest.modulo(divisor),
            _ => Dim::atom(Atom::Mod(Box::new(self.clone()), Box::new(divisor.clone()))),
        }
    }

    /// The quotient when `divisor` divides `self` for every value of the symbols and this can be
    /// seen from the terms.
    pub fn exact_div(&self, divisor: &Dim) -> Option<Dim> {
        if divisor.is(1) {
            return Some(self.clone());
        }
        if self == divisor {
            return Some(Dim::new(1));
        }
        match self.split_by(divisor) {
            Some((quotient, rest)) if rest.is(0) => Some(quotient),
            _ => None,
        }
    }

    /// The smaller of two.
    pub fn min_with(&self, other: &Dim) -> Dim {
        match (self - other).as_const() {
            Some(diff) => {
                if diff <= 0 {
                    self.clone()
                } else {
                    other.clone()
                }
            }
            None => {
                let (a, b) = if self <= other { (self, other) } else { (other, self) };
                Dim::atom(Atom::Min(Box::new(a.clone()), Box::new(b.clone())))
            }
        }
    }

    /// The larger of two.
    pub fn max_with(&self, other: &Dim) -> Dim {
        match (self - other).as_const() {
            Some(diff) => {
                if diff >= 0 {
                    self.clone()
                } else {
                    other.clone()
                }
            }
            None => {
                let (a, b) = if self <= other { (self, other) } else { (other, self) };
                Dim::atom(Atom::Max(Box::new(a.clone()), Box::new(b.clone())))
            }
        }
    }

    /// The value under `env`; `None` when a symbol is missing, a divisor is zero, or it overflows.
    pub fn eval(&self, env: &Env) -> Option<i64> {
        self.eval_with(&|name| env.get(name).copied())
    }

    /// As [`Dim::eval`] with any lookup.
    pub fn eval_with(&self, lookup: &dyn Fn(&str) -> Option<i64>) -> Option<i64> {
        let mut sum = 0i64;
        for (mono, coeff) in &self.terms {
            let mut product = *coeff;
            for atom in mono {
                let value = match atom {
                    Atom::Sym(name) => lookup(name)?,
                    Atom::FloorDiv(a, b) => {
                        let (a, b) = (a.eval_with(lookup)?, b.eval_with(lookup)?);
                        if b == 0 { return None } else { floor_div(a, b) }
                    }
                    Atom::Mod(a, b) => {
                        let (a, b) = (a.eval_with(lookup)?, b.eval_with(lookup)?);
                        if b == 0 {
                            return None;
                        } else {
                            a.wrapping_sub(b.wrapping_mul(floor_div(a, b)))
                        }
                    }
                    Atom::Min(a, b) => a.eval_with(lookup)?.min(b.eval_with(lookup)?),
                    Atom::Max(a, b) => a.eval_with(lookup)?.max(b.eval_with(lookup)?),
                };
                product = product.checked_mul(value)?;
            }
            sum = sum.checked_add(product)?;
        }
        Some(sum)
    }

    /// The one unknown symbol and its value when `self` equals `value` under `env`: for `k*S + c`
    /// with `S` missing from `env`. `None` when nothing or more is unknown, or no whole number fits.
    pub fn solve(&self, value: i64, env: &Env) -> Option<(Arc<str>, i64)> {
        let known = self.substitute(&|name| env.get(name).map(|&v| Dim::new(v)));
        let constant = known.terms.iter().find(|(m, _)| m.is_empty()).map_or(0, |(_, c)| *c);
        let mut unknown = known.terms.iter().filter(|(m, _)| !m.is_empty());
        let (Some((mono, factor)), None) = (unknown.next(), unknown.next()) else { return None };
        let [Atom::Sym(name)] = mono.as_slice() else { return None };
        let rest = value.checked_sub(constant)?;
        (rest.checked_rem(*factor)? == 0).then(|| (name.clone(), rest / factor))
    }

    /// Replaces symbols; those for which `lookup` answers `None` stay.
    pub fn substitute(&self, lookup: &dyn Fn(&str) -> Option<Dim>) -> Dim {
        let mut sum = Dim::new(0);
        for (mono, coeff) in &self.terms {
            let mut product = Dim::new(*coeff);
            for atom in mono {
                let sub = |d: &Dim| d.substitute(lookup);
                let factor = match atom {
                    Atom::Sym(name) => lookup(name).unwrap_or_else(|| Dim::sym(name.clone())),
                    Atom::FloorDiv(a, b) => sub(a).floor_div(&sub(b)),
                    Atom::Mod(a, b) => sub(a).modulo(&sub(b)),
                    Atom::Min(a, b) => sub(a).min_with(&sub(b)),
                    Atom::Max(a, b) => sub(a).max_with(&sub(b)),
                };
                product = &product * &factor;
            }
            sum = &sum + &product;
        }
        sum
    }

    /// Calls `visit` with every symbol that occurs, in no promised order, repeats included.
    pub fn for_each_symbol(&self, visit: &mut dyn FnMut(&Arc<str>)) {
        for atom in self.terms.iter().flat_map(|(mono, _)| mono) {
            match atom {
                Atom::Sym(name) => visit(name),
                Atom::FloorDiv(a, b) | Atom::Mod(a, b) | Atom::Min(a, b) | Atom::Max(a, b) => {
                    a.for_each_symbol(visit);
                    b.for_each_symbol(visit);
                }
            }
        }
    }

    /// Bounds of the value when each symbol lies in its range (unknown symbols: anything).
    /// Sound, not tight: each occurrence of a symbol is taken on its own.
    pub fn bounds(&self, range_of: &dyn Fn(&str) -> Option<Range>) -> Range {
        const ANY: Range = Range { min: i64::MIN, max: i64::MAX };
        let mut sum = Range { min: 0, max: 0 };
        for (mono, coeff) in &self.terms {
            let mut product = Range { min: *coeff, max: *coeff };
            for atom in mono {
                let of = |d: &Dim| d.bounds(range_of);
                let r = match atom {
                    Atom::Sym(name) => range_of(name).unwrap_or(ANY),
                    Atom::FloorDiv(a, b) => {
                        let (a, b) = (of(a), of(b));
                        if b.min <= 0 {
                            ANY
                        } else {
                            let q = |x: i64, y: i64| {
                                if x == i64::MIN || x == i64::MAX { x } else { floor_div(x, y) }
                            };
                            let all = [
                                q(a.min, b.min),
                                q(a.min, b.max),
                                q(a.max, b.min),
                                q(a.max, b.max),
                            ];
                            span(&all)
                        }
                    }
                    Atom::Mod(a, b) => {
                        let (a, b) = (of(a), of(b));
                        if b.min <= 0 {
                            ANY
                        } else if a.min >= 0 {
                            Range { min: 0, max: a.max.min(b.max - 1) }
                        } else {
                            Range { min: 0, max: b.max - 1 }
                        }
                    }
                    Atom::Min(a, b) => {
                        let (a, b) = (of(a), of(b));
                        Range { min: a.min.min(b.min), max: a.max.min(b.max) }
                    }
                    Atom::Max(a, b) => {
                        let (a, b) = (of(a), of(b));
                        Range { min: a.min.max(b.min), max: a.max.max(b.max) }
                    }
                };
                product = span(&[
                    product.min.saturating_mul(r.min),
                    product.min.saturating_mul(r.max),
                    product.max.saturating_mul(r.min),
                    product.max.saturating_mul(r.max),
                ]);
            }
            sum = Range {
                min: sum.min.saturating_add(product.min),
                max: sum.max.saturating_add(product.max),
            };
        }
        sum
    }
}

fn span(values: &[i64]) -> Range {
    Range {
        min: values.iter().copied().min().unwrap_or(i64::MIN),
        max: values.iter().copied().max().unwrap_or(i64::MAX),
    }
}

/// Division that rounds towards minus infinity; `b` is not zero.
fn floor_div(a: i64, b: i64) -> i64 {
    let quotient = a.wrapping_div(b);
    if a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient }
}

impl From<i64> for Dim {
    fn from(value: i64) -> Dim {
        Dim::new(value)
    }
}
impl From<usize> for Dim {
    fn from(value: usize) -> Dim {
        Dim::new(i64::try_from(value).unwrap_or(i64::MAX))
    }
}
impl From<i32> for Dim {
    fn from(value: i32) -> Dim {
        Dim::new(value.into())
    }
}
impl From<&str> for Dim {
    fn from(name: &str) -> Dim {
        Dim::sym(name)
    }
}

fn add(a: &Dim, b: &Dim, sign: i64) -> Dim {
    if b.terms.is_empty() {
        return a.clone();
    }
    let mut map: BTreeMap<Monomial, i64> = a.terms.iter().cloned().collect();
    for (mono, coeff) in &b.terms {
        let entry = map.entry(mono.clone()).or_insert(0);
        *entry = entry.saturating_add(coeff.saturating_mul(sign));
    }
    Dim::from_map(map)
}

fn mul(a: &Dim, b: &Dim) -> Dim {
    if a.is(1) {
        return b.clone();
    }
    if b.is(1) {
        return a.clone();
    }
    let mut map: BTreeMap<Monomial, i64> = BTreeMap::new();
    for (mono_a, coeff_a) in &a.terms {
        for (mono_b, coeff_b) in &b.terms {
            let mut mono: Monomial = mono_a.iter().chain(mono_b).cloned().collect();
            mono.sort();
            let entry = map.entry(mono).or_insert(0);
            *entry = entry.saturating_add(coeff_a.saturating_mul(*coeff_b));
        }
    }
    Dim::from_map(map)
}

/// `impl Op for` every mix of `Dim`, `&Dim` and `i64`.
macro_rules! operator {
    ($trait:ident, $method:ident, $f:expr) => {
        impl $trait<&Dim> for &Dim {
            type Output = Dim;
            fn $method(self, rhs: &Dim) -> Dim {
                let f: fn(&Dim, &Dim) -> Dim = $f;
                f(self, rhs)
            }
        }
        impl $trait<Dim> for &Dim {
            type Output = Dim;
            fn $method(self, rhs: Dim) -> Dim {
                self.$method(&rhs)
            }
        }
        impl $trait<&Dim> for Dim {
            type Output = Dim;
            fn $method(self, rhs: &Dim) -> Dim {
                (&self).$method(rhs)
            }
        }
        impl $trait<Dim> for Dim {
            type Output = Dim;
            fn $method(self, rhs: Dim) -> Dim {
                (&self).$method(&rhs)
            }
        }
        impl $trait<i64> for &Dim {
            type Output = Dim;
            fn $method(self, rhs: i64) -> Dim {
                self.$method(&Dim::new(rhs))
            }
        }
        impl $trait<i64> for Dim {
            type Output = Dim;
            fn $method(self, rhs: i64) -> Dim {
                (&self).$method(&Dim::new(rhs))
            }
        }
    };
}
operator!(Add, add, |a, b| add(a, b, 1));
operator!(Sub, sub, |a, b| add(a, b, -1));
operator!(Mul, mul, mul);

impl Neg for &Dim {
    type Output = Dim;
    fn neg(self) -> Dim {
        self * -1
    }
}
