//! Host operators: what no kernel computes, run as written, in exact types.
//!
//! Adding one: a file (or a function in its family's file) with a
//! `fn(attrs: &Attrs, inputs: &[Tensor]) -> Result<Vec<Tensor>>`, and its row in [`TABLE`], which is
//! sorted by name. Rules:
//!
//! * The number and data types of results are those of the node's `HostOp::types`; the caller
//!   checks them, and binds size symbols that the node introduces from the shapes that come out.
//! * Attributes have been written by a frontend: a missing one is reported by the getters of
//!   [`Attrs`] as our bug. Operand *values* come from the user: complain with `Error::user`.
//! * Operands arrive in the data types that the graph declares, in both modes of the interpreter
//!   (in `f64` mode they are rounded first: these operators mostly move or count elements).

mod gradients;
mod non_max_suppression;
mod nonzero;
mod unique;

use tilewright_base::{Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::HostAttr;

/// The attributes of a host operator, with typed access.
pub struct Attrs<'a>(pub &'a [(String, HostAttr)]);

/// What a host operator does.
pub type Run = fn(&Attrs<'_>, &[Tensor]) -> Result<Vec<Tensor>>;

/// One registered operator.
pub struct HostFn {
    /// Its name in graphs.
    pub name: &'static str,
    /// Computes the results.
    pub run: Run,
}

/// Every host operator, sorted by name.
pub const TABLE: &[HostFn] = &[
    HostFn { name: "attention_backward", run: gradients::attention_backward },
    HostFn { name: "attention_lse", run: gradients::attention_lse },
    HostFn { name: "layer_norm_backward", run: gradients::layer_norm_backward },
    HostFn { name: "non_max_suppression", run: non_max_suppression::non_max_suppression },
    HostFn { name: "nonzero", run: nonzero::nonzero },
    HostFn { name: "unique", run: unique::unique },
];

/// The operator of this name.
pub fn lookup(name: &str) -> Option<&'static HostFn> {
    TABLE.iter().find(|row| row.name == name)
}

impl Attrs<'_> {
    /// The attribute, if it is there.
    pub fn get(&self, name: &str) -> Option<&HostAttr> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }

    fn missing(name: &str, kind: &str) -> Error {
        Error::bug(format!("host operator without its {kind} attribute `{name}`"))
    }

    /// An integer.
    pub fn int(&self, name: &str) -> Result<i64> {
        match self.get(name) {
            Some(HostAttr::Int(v)) => Ok(*v),
            _ => Err(Self::missing(name, "integer")),
        }
    }

    /// An integer with a default.
    pub fn int_or(&self, name: &str, default: i64) -> i64 {
        self.int(name).unwrap_or(default)
    }

    /// A float.
    pub fn float(&self, name: &str) -> Result<f64> {
        match self.get(name) {
            Some(HostAttr::Float(v)) => Ok(*v),
            _ => Err(Self::missing(name, "float")),
        }
    }

    /// A float with a default.
    pub fn float_or(&self, name: &str, default: f64) -> f64 {
        self.float(name).unwrap_or(default)
    }

    /// A string.
    pub fn str(&self, name: &str) -> Result<&str> {
        match self.get(name) {
            Some(HostAttr::Str(v)) => Ok(v),
            _ => Err(Self::missing(name, "string")),
        }
    }

    /// A string with a default.
    pub fn str_or<'b>(&'b self, name: &str, default: &'b str) -> &'b str {
        self.str(name).unwrap_or(default)
    }

    /// A list of integers.
    pub fn ints(&self, name: &str) -> Result<&[i64]> {
        match self.get(name) {
            Some(HostAttr::Ints(v)) => Ok(v),
            _ => Err(Self::missing(name, "integer list")),
        }
    }

    /// A list of floats.
    pub fn floats(&self, name: &str) -> Result<&[f64]> {
        match self.get(name) {
            Some(HostAttr::Floats(v)) => Ok(v),
            _ => Err(Self::missing(name, "float list")),
        }
    }
}

/// Operand `i`; its absence is our bug, since type inference does not count a host operator's
/// operands.
pub fn operand(inputs: &[Tensor], i: usize) -> Result<&Tensor> {
    inputs.get(i).ok_or_else(|| Error::bug(format!("host operator without its operand {i}")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_is_sorted_and_unique() {
        assert!(super::TABLE.windows(2).all(|w| w[0].name < w[1].name));
    }
}
