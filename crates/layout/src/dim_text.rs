//! Text form of [`Dim`]: `B*S + 1`, `ceil(M/BM)`, `floor(x/2)`, `x % 4`, `min(a, b)`.
//!
//! Grammar: `sum := product (("+"|"-") product)*`, `product := factor (("*"|"/"|"%") factor)*`
//! (`/` rounds down), `factor := integer | name | "-" factor | "(" sum ")" | call`, where a call
//! is `floor(a/b)`, `ceil(a/b)`, `min(a, b)` or `max(a, b)`.

use crate::dim::{Atom, Dim};
use std::fmt;
use std::str::FromStr;

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms().is_empty() {
            return f.write_str("0");
        }
        // floor((x - 1)/y) + 1 is how ceil(x/y) looks in normal form.
        if let [(_, 1), ..] = self.terms()
            && let rest = self - 1
            && let [(mono, 1)] = rest.terms()
            && let [Atom::FloorDiv(a, b)] = mono.as_slice()
            // Not where a constant at the end of `i64` saturates.
            && (&**a + 1).ceil_div(b) == *self
        {
            return write!(f, "ceil({}/{})", tight(&(&**a + 1)), tight(b));
        }
        // Symbolic terms first, the constant last: `N + 1` reads better than `1 + N`.
        let terms = self.terms();
        let (constant, symbolic): (Vec<_>, Vec<_>) = terms.iter().partition(|(m, _)| m.is_empty());
        for (i, (mono, coeff)) in symbolic.into_iter().chain(constant).enumerate() {
            match (i, *coeff < 0) {
                (0, true) => f.write_str("-")?,
                (0, false) => {}
                (_, true) => f.write_str(" - ")?,
                (_, false) => f.write_str(" + ")?,
            }
            let magnitude = coeff.unsigned_abs();
            if mono.is_empty() {
                write!(f, "{magnitude}")?;
                continue;
            }
            if magnitude != 1 {
                write!(f, "{magnitude}*")?;
            }
            for (j, atom) in mono.iter().enumerate() {
                if j > 0 {
                    f.write_str("*")?;
                }
                write!(f, "{atom}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Atom::Sym(name) => f.write_str(name),
            Atom::FloorDiv(a, b) => {
                // ceil(x/4) is floor((x + 3)/4) in normal form.
                if let (Some(d), Some((mono, c))) = (b.as_const(), a.terms().first())
                    && d > 1
                    && mono.is_empty()
                    && *c == d - 1
                {
                    return write!(f, "ceil({}/{d})", tight(&(&**a - *c)));
                }
                write!(f, "floor({}/{})", tight(a), tight(b))
            }
            Atom::Mod(a, b) => write!(f, "({} % {})", tight(a), tight(b)),
            Atom::Min(a, b) => write!(f, "min({a}, {b})"),
            Atom::Max(a, b) => write!(f, "max({a}, {b})"),
        }
    }
}

/// An operand of a division: anything but a plain number or name gets its own parentheses.
fn tight(d: &Dim) -> String {
    match d.as_const() {
        Some(c) if c >= 0 => d.to_string(),
        _ if d.as_symbol().is_some() => d.to_string(),
        _ => format!("({d})"),
    }
}

impl FromStr for Dim {
    type Err = String;

    fn from_str(text: &str) -> Result<Dim, String> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let dim = parser.sum()?;
        parser.skip_space();
        if parser.at < text.len() {
            return Err(format!("unexpected `{}` in size `{text}`", &text[parser.at..]));
        }
        Ok(dim)
    }
}

/// Products of sums multiply out, so a short text can mean a huge polynomial; a product with more
/// symbols than this is refused.
const WEIGHT_MAX: usize = 20_000;

/// How many terms and atoms a size holds, inside its atoms too.
fn weight(dim: &Dim) -> usize {
    let atom = |atom: &Atom| match atom {
        Atom::Sym(_) => 1,
        Atom::FloorDiv(a, b) | Atom::Mod(a, b) | Atom::Min(a, b) | Atom::Max(a, b) => {
            1 + weight(a) + weight(b)
        }
    };
    dim.terms().iter().map(|(mono, _)| 1 + mono.iter().map(atom).sum::<usize>()).sum()
}

/// Magnitude of `i64::MIN`, which only its sign makes a number that fits.
const SMALLEST: &str = "9223372036854775808";

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn skip_space(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    fn eat(&mut self, c: char) -> bool {
        self.skip_space();
        let found = self.text[self.at..].starts_with(c);
        if found {
            self.at += c.len_utf8();
        }
        found
    }

    fn expect(&mut self, c: char) -> Result<(), String> {
        if self.eat(c) { Ok(()) } else { Err(format!("expected `{c}` in size `{}`", self.text)) }
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> &str {
        let rest = &self.text[self.at..];
        let len = rest.find(|c| !accept(c)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    /// Whether the magnitude of `i64::MIN` follows.
    fn at_smallest(&mut self) -> bool {
        self.skip_space();
        let rest = self.text[self.at..].strip_prefix(SMALLEST);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    }

    fn sum(&mut self) -> Result<Dim, String> {
        let mut sum = self.product()?;
        loop {
            let before = self.at;
            if self.eat('+') {
                sum = sum + self.product()?;
            } else if self.eat('-') {
                if self.at_smallest() {
                    // The sign belongs to the number here: its magnitude alone has no value.
                    self.at = before;
                    sum = sum + self.product()?;
                } else {
                    sum = sum - self.product()?;
                }
            } else {
                return Ok(sum);
            }
        }
    }

    fn product(&mut self) -> Result<Dim, String> {
        let mut product = self.factor()?;
        loop {
            if self.eat('*') {
                let factor = self.factor()?;
                product = self.times(&product, &factor)?;
            } else if self.eat('/') {
                product = product.floor_div(&self.divisor()?);
            } else if self.eat('%') {
                product = product.modulo(&self.divisor()?);
            } else {
                return Ok(product);
            }
        }
    }

    /// A product, unless it is unreasonably large.
    fn times(&self, a: &Dim, b: &Dim) -> Result<Dim, String> {
        let (n_a, n_b) = (a.terms().len(), b.terms().len());
        if n_b.saturating_mul(weight(a)).saturating_add(n_a.saturating_mul(weight(b))) > WEIGHT_MAX
        {
            return Err(format!("size `{}` multiplies out to too many terms", self.text));
        }
        Ok(a * b)
    }

    /// A factor that is not zero in normal form.
    fn divisor(&mut self) -> Result<Dim, String> {
        let divisor = self.factor()?;
        if divisor.is(0) {
            return Err(format!("division by zero in size `{}`", self.text));
        }
        Ok(divisor)
    }

    fn factor(&mut self) -> Result<Dim, String> {
        self.depth += 1;
        if self.depth > 200 {
            return Err(format!("size `{}` is nested too deeply", self.text));
        }
        let factor = self.factor_inner();
        self.depth -= 1;
        factor
    }

    fn factor_inner(&mut self) -> Result<Dim, String> {
        if self.eat('(') {
            let inner = self.sum()?;
            self.expect(')')?;
            return Ok(inner);
        }
        if self.eat('-') {
            if self.at_smallest() {
                self.at += SMALLEST.len();
                return Ok(Dim::new(i64::MIN));
            }
            return Ok(-&self.factor()?);
        }
        let Some(first) = self.text[self.at..].chars().next() else {
            return Err(format!("size `{}` ends too early", self.text));
        };
        if first.is_ascii_digit() {
            let digits = self.take_while(|c| c.is_ascii_digit()).to_string();
            return digits
                .parse::<i64>()
                .map(Dim::new)
                .map_err(|_| format!("`{digits}` is too large"));
        }
        if !(first.is_alphabetic() || first == '_') {
            return Err(format!("unexpected `{first}` in size `{}`", self.text));
        }
        let name = self.take_while(|c| c.is_alphanumeric() || c == '_' || c == '.').to_string();
        if !self.eat('(') {
            return Ok(Dim::sym(name));
        }
        let value = match name.as_str() {
            "floor" | "ceil" => {
                // Inside floor(a/b) and ceil(a/b) the slash separates the two operands.
                let mut a = self.factor()?;
                while self.eat('*') {
                    let factor = self.factor()?;
                    a = self.times(&a, &factor)?;
                }
                self.expect('/')?;
                let b = self.divisor()?;
                if name == "floor" { a.floor_div(&b) } else { a.ceil_div(&b) }
            }
            "min" | "max" => {
                let a = self.sum()?;
                self.expect(',')?;
                let b = self.sum()?;
                if name == "min" { a.min_with(&b) } else { a.max_with(&b) }
            }
            other => return Err(format!("unknown function `{other}` in size `{}`", self.text)),
        };
        self.expect(')')?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_back() {
        for text in [
            "0",
            "-3",
            "N",
            "B*S + 1",
            "2*B - S",
            "floor((N + 1)/2)",
            "(N % 4)",
            "min(M, N + 1)",
            "floor((N + 1)/(2*K))",
            "max(0, N - 3)",
            "-N + 3*(M % 8)",
            "-9223372036854775808",
            "N - 9223372036854775808",
            "floor((N - 1)/2) + 1",
            "2*ceil((N - 7)/4) - floor((N + 9)/4)",
            "ceil(N/M) - floor((N - 3)/M)",
            "((N - 9) % 4)",
            "ceil((floor(N/2))/2)",
        ] {
            let dim: Dim = text.parse().unwrap();
            assert_eq!(dim.to_string().parse::<Dim>().unwrap(), dim, "{text} -> {dim}");
        }
        assert_eq!("ceil(M/BM)".parse::<Dim>().unwrap().to_string(), "ceil(M/BM)");
    }

    #[test]
    fn bad_text_is_an_error() {
        for text in [
            "",
            "N +",
            "floor(3)",
            "1 2",
            "min(1)",
            "99999999999999999999",
            "foo(1)",
            "(",
            "N/0",
            "N % (M - M)",
        ] {
            assert!(text.parse::<Dim>().is_err(), "{text}");
        }
        assert!("(".repeat(10_000).parse::<Dim>().is_err());
        // 2^40 terms if multiplied out.
        let sums: Vec<String> = (0..40).map(|i| format!("(a{i} + b{i})")).collect();
        assert!(sums.join("*").parse::<Dim>().is_err());
        assert!(sums[..8].join("*").parse::<Dim>().is_ok());
    }

    #[test]
    fn one_unknown_is_solved() {
        let env = [("M".into(), 2i64)].into();
        let solve = |text: &str, v| text.parse::<Dim>().unwrap().solve(v, &env);
        assert_eq!(solve("N + 3", 7), Some(("N".into(), 4)));
        assert_eq!(solve("3*N*M + M", 14), Some(("N".into(), 2)));
        assert_eq!(solve("2*N", 7), None);
        assert_eq!(solve("N + K", 7), None);
        assert_eq!(solve("M", 2), None);
        assert_eq!(solve("floor(N/2)", 2), None);
    }

    #[test]
    fn normal_form() {
        let (n, m) = (Dim::sym("N"), Dim::sym("M"));
        assert_eq!((&n * 4 + 3).floor_div(&Dim::new(4)), n);
        assert_eq!((&n * 4 + 5).modulo(&Dim::new(4)), Dim::new(1));
        assert_eq!((&n - 1).floor_div(&Dim::new(2)) + 1, n.ceil_div(&Dim::new(2)));
        assert_eq!((&n - 1).floor_div(&Dim::new(2)).to_string(), "ceil(N/2) - 1");
        assert_eq!((&n + 9).modulo(&Dim::new(4)), (&n - 3).modulo(&Dim::new(4)));
        assert_eq!((&n * &m).exact_div(&m), Some(n.clone()));
        assert_eq!((&n + 1).exact_div(&m), None);
        assert_eq!((&n - &n).as_const(), Some(0));
    }
}
