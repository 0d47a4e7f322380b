//! [`N`]: one ONNX node as converters see it: operands, attributes with defaults, opset.

use super::cx::Cx;
use super::proto::{AttributeProto, AttributeType, GraphProto, NodeProto, TensorProto};
use tilewright_base::{DType, Error, Result};
use tilewright_graph::ValueId;
use tilewright_layout::Dim;

/// What an ONNX name stands for.
#[derive(Clone, Debug)]
pub(crate) enum Val {
    /// A tensor.
    T(ValueId),
    /// A sequence whose length is known at import.
    Seq(Vec<ValueId>),
    /// An absent optional.
    Absent,
    /// A result of a node that could not be converted; what reads it is skipped.
    Poison,
}

/// One ONNX node.
pub(crate) struct N<'a> {
    pub(crate) proto: &'a NodeProto,
    /// Operands; `None` where an optional one is left out.
    pub(crate) ins: Vec<Option<Val>>,
    /// Version of the node's operator set.
    pub(crate) opset: i64,
}

impl N<'_> {
    fn find(&self, name: &str) -> Option<&AttributeProto> {
        self.proto.attribute.iter().find(|a| a.name == name)
    }

    fn wrong(&self, name: &str, kind: &str) -> Error {
        Error::user(format!("attribute `{name}` of {} is not {kind}", self.proto.op_type))
    }

    /// True when the attribute is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// An integer, if there.
    pub(crate) fn int_opt(&self, name: &str) -> Result<Option<i64>> {
        match self.find(name) {
            None => Ok(None),
            Some(a) if a.r#type == AttributeType::Int as i32 => Ok(Some(a.i)),
            Some(_) => Err(self.wrong(name, "an integer")),
        }
    }

    /// An integer with a default.
    pub(crate) fn int(&self, name: &str, default: i64) -> Result<i64> {
        Ok(self.int_opt(name)?.unwrap_or(default))
    }

    /// A flag with a default.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.int(name, default.into())? != 0)
    }

    /// A float, if there. The exact value of the single-precision attribute.
    pub(crate) fn float_opt(&self, name: &str) -> Result<Option<f64>> {
        match self.find(name) {
            None => Ok(None),
            Some(a) if a.r#type == AttributeType::Float as i32 => Ok(Some(a.f.into())),
            Some(_) => Err(self.wrong(name, "a float")),
        }
    }

    /// A float with a default.
    pub(crate) fn float(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self.float_opt(name)?.unwrap_or(default))
    }

    /// A string with a default.
    pub(crate) fn str(&self, name: &str, default: &str) -> Result<String> {
        match self.find(name) {
            None => Ok(default.to_string()),
            Some(a) if a.r#type == AttributeType::String as i32 => {
                String::from_utf8(a.s.to_vec()).map_err(|_| self.wrong(name, "text"))
            }
            Some(_) => Err(self.wrong(name, "a string")),
        }
    }

    /// A list of strings, if there.
    pub(crate) fn strs(&self, name: &str) -> Result<Option<Vec<String>>> {
        match self.find(name) {
            None => Ok(None),
            Some(a) if a.r#type == AttributeType::Strings as i32 => a
                .strings
                .iter()
                .map(|s| String::from_utf8(s.to_vec()).map_err(|_| self.wrong(name, "text")))
                .collect::<Result<_>>()
                .map(Some),
            Some(_) => Err(self.wrong(name, "a list of strings")),
        }
    }

    /// A list of integers, if there.
    pub(crate) fn ints(&self, name: &str) -> Result<Option<Vec<i64>>> {
        match self.find(name) {
            None => Ok(None),
            Some(a) if a.r#type == AttributeType::Ints as i32 => Ok(Some(a.ints.clone())),
            Some(_) => Err(self.wrong(name, "a list of integers")),
        }
    }

    /// A list of floats, if there.
    pub(crate) fn floats(&self, name: &str) -> Result<Option<Vec<f64>>> {
        match self.find(name) {
            None => Ok(None),
            Some(a) if a.r#type == AttributeType::Floats as i32 => {
                Ok(Some(a.floats.iter().map(|&v| v.into()).collect()))
            }
            Some(_) => Err(self.wrong(name, "a list of floats")),
        }
    }

    /// A tensor, if there.
    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorProto> {
        self.find(name).and_then(|a| a.t.as_ref())
    }

    /// A subgraph.
    pub(crate) fn graph(&self, name: &str) -> Result<&GraphProto> {
        self.find(name).and_then(|a| a.g.as_ref()).ok_or_else(|| {
            Error::user(format!("{} without its subgraph `{name}`", self.proto.op_type))
        })
    }

    /// A data type attribute, if there (and not 0, which means absent).
    pub(crate) fn dtype(&self, name: &str) -> Result<Option<DType>> {
        match self.int_opt(name)? {
            None | Some(0) => Ok(None),
            Some(code) => super::tensor::dtype_of(i32::try_from(code).unwrap_or(-1)).map(Some),
        }
    }

    /// Operand `i` as a tensor, if given.
    pub(crate) fn opt(&self, i: usize) -> Result<Option<ValueId>> {
        match self.ins.get(i) {
            None | Some(None) | Some(Some(Val::Absent)) => Ok(None),
            Some(Some(Val::T(v))) => Ok(Some(*v)),
            Some(Some(_)) => Err(Error::unsupported(format!(
                "operand {i} of {} is a sequence",
                self.proto.op_type
            ))),
        }
    }

    /// Operand `i` as a tensor.
    pub(crate) fn x(&self, i: usize) -> Result<ValueId> {
        self.opt(i)?.ok_or_else(|| {
            Error::user(format!("{} without its operand number {i}", self.proto.op_type))
        })
    }

    /// Operand `i` as a sequence.
    pub(crate) fn seq(&self, i: usize) -> Result<Vec<ValueId>> {
        match self.ins.get(i) {
            Some(Some(Val::Seq(items))) => Ok(items.clone()),
            _ => {
                Err(Error::user(format!("operand {i} of {} is not a sequence", self.proto.op_type)))
            }
        }
    }

    /// All operands as tensors; at least one.
    pub(crate) fn all(&self) -> Result<Vec<ValueId>> {
        if self.ins.is_empty() {
            return Err(Error::user(format!("{} without operands", self.proto.op_type)));
        }
        (0..self.ins.len()).map(|i| self.x(i)).collect()
    }

    /// True when result `i` is asked for.
    pub(crate) fn wants(&self, i: usize) -> bool {
        self.proto.output.get(i).is_some_and(|o| !o.is_empty())
    }

    /// A list of integers that older opsets give as an attribute and newer ones as operand `i`.
    pub(crate) fn ints_or_operand(
        &self,
        cx: &mut Cx,
        name: &str,
        i: usize,
    ) -> Result<Option<Vec<i64>>> {
        if let Some(list) = self.ints(name)? {
            return Ok(Some(list));
        }
        match self.opt(i)? {
            Some(v) => cx.const_ints(v, name).map(Some),
            None => Ok(None),
        }
    }

    /// As [`N::ints_or_operand`], symbolic.
    pub(crate) fn dims_or_operand(
        &self,
        cx: &mut Cx,
        name: &str,
        i: usize,
    ) -> Result<Option<Vec<Dim>>> {
        if let Some(list) = self.ints(name)? {
            return Ok(Some(list.into_iter().map(Dim::new).collect()));
        }
        match self.opt(i)? {
            Some(v) => cx.ints(v, name).map(Some),
            None => Ok(None),
        }
    }

    /// An axis attribute, counted from the front.
    pub(crate) fn axis(&self, name: &str, default: i64, rank: usize) -> Result<usize> {
        axis(self.int(name, default)?, rank)
    }
}

/// A possibly negative axis, counted from the front.
pub(crate) fn axis(axis: i64, rank: usize) -> Result<usize> {
    let from_front = if axis < 0 { axis.saturating_add(rank as i64) } else { axis };
    usize::try_from(from_front)
        .ok()
        .filter(|&a| a < rank)
        .ok_or_else(|| Error::user(format!("axis {axis} of a tensor with {rank} axes")))
}

/// Possibly negative axes, counted from the front; an error when one occurs twice.
pub(crate) fn axes(list: &[i64], rank: usize) -> Result<Vec<usize>> {
    let out: Vec<usize> = list.iter().map(|&a| axis(a, rank)).collect::<Result<_>>()?;
    let mut sorted = out.clone();
    sorted.sort_unstable();
    if sorted.windows(2).any(|w| w[0] == w[1]) {
        return Err(Error::user(format!("an axis occurs twice in {list:?}")));
    }
    Ok(out)
}

/// One tensor as a converter's result.
pub(crate) fn one(v: ValueId) -> Result<Vec<Val>> {
    Ok(vec![Val::T(v)])
}
