//! Names that Python accepts: tile programs may call a tile `max`, `%3` or `x.1`.

use std::collections::BTreeSet;

/// What generated names must not hide: Python's keywords, what the generated text itself uses, and
/// built-ins whose loss would confuse a reader.
#[rustfmt::skip]
const RESERVED: &[&str] = &[
    "False", "None", "True", "and", "as", "assert", "async", "await", "break", "class", "continue",
    "def", "del", "elif", "else", "except", "finally", "for", "from", "global", "if", "import", "in",
    "is", "lambda", "nonlocal", "not", "or", "pass", "raise", "return", "try", "while", "with", "yield",
    "abs", "all", "any", "bool", "dict", "float", "int", "len", "list", "map", "max", "min", "print",
    "range", "round", "set", "str", "sum", "tuple", "type", "zip",
    "contextlib", "libdevice", "tl", "torch", "triton",
    "launch", "stream", "num_warps", "num_stages", "enable_fp_fusion", "INDEX", "pid", "grid", "index",
];

/// Gives each wanted name once.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    taken: BTreeSet<String>,
}

impl Names {
    /// Nothing taken but what is reserved and these.
    pub(crate) fn new<'a>(also: impl IntoIterator<Item = &'a str>) -> Names {
        Names { taken: RESERVED.iter().copied().chain(also).map(str::to_string).collect() }
    }

    /// `wanted` as Python can spell it, with a number when it is taken already.
    pub(crate) fn fresh(&mut self, wanted: &str) -> String {
        let mut base: String =
            wanted.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if !base.starts_with(|c: char| c.is_ascii_alphabetic()) {
            // A leading underscore is for the module's own functions.
            base.insert(0, 'v');
        }
        let mut name = base.clone();
        let mut number = 1;
        while !self.taken.insert(name.clone()) {
            number += 1;
            name = format!("{base}_{number}");
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_python_and_distinct() {
        let mut names = Names::new(["nan_max"]);
        let got: Vec<String> = ["x", "x", "max", "x.1", "3", "é", "_x", "nan_max", "x_2"]
            .iter()
            .map(|n| names.fresh(n))
            .collect();
        let expected = ["x", "x_2", "max_2", "x_1", "v3", "v_", "v_x", "nan_max_2", "x_2_2"];
        assert_eq!(got, expected);
    }
}
