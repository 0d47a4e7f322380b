//! Addresses and masks: loads, gathers, stores.
//!
//! A coordinate has 32 bits; offsets are computed in `INDEX`, which the launcher makes 64 bits wide
//! for large tensors. A bound is checked only where it is not proven ([`Facts`]).
//!
//! [`Facts`]: tilewright_layout::Facts

use crate::emitter::{Emitter, is_blocked};
use crate::integers::Side;
use crate::types::{Axis, across, constant};
use tilewright_base::DType;
use tilewright_expr::Value;
use tilewright_layout::{Dim, Range};
use tilewright_tile::{ParamId, TileId, TileOp};

/// Stands for a position along an axis in expressions.
const LANE: &str = "$lane";

/// What makes an access.
pub(crate) struct Access {
    pointer: String,
    masks: Vec<String>,
}

/// Coordinates along one axis that are data.
struct Rows {
    axis: usize,
    text: String,
}

impl Emitter<'_> {
    /// Pointers to, and masks for, `param[index + steps * position]` over these axes. When
    /// `exactly`, positions in the padding are masked.
    fn access(
        &mut self,
        param: ParamId,
        index: &[Dim],
        steps: &[i64],
        axes: &[Axis],
        exactly: bool,
        rows: Option<&Rows>,
    ) -> Access {
        let info = &self.kernel.params[param];
        let text = self.params[param.index()].clone();
        let rank = axes.len();
        let mut pointer = text.pointer.clone();
        if let Some(offset) = &text.offset {
            pointer += &format!(" + tl.cast({offset}, INDEX)");
        }
        let mut masks = Vec::new();
        for (i, of_param) in info.layout.axes.iter().enumerate() {
            let extent = &of_param.extent;
            let at = axes.iter().position(|a| a.logical == i);
            let data = rows.filter(|r| r.axis == i);
            let step = steps.get(i).copied().unwrap_or(1);
            // The coordinate: its expression, and how it is called.
            let last = at.map_or(1, |q| if exactly { axes[q].extent } else { axes[q].padded }) - 1;
            self.facts.declare(LANE, Range { min: 0, max: last }, vec![]);
            let coordinate = &index[i] + Dim::sym(LANE) * if at.is_some() { step } else { 0 };
            let above = data.is_none() && self.proves_non_negative(&coordinate);
            let below = data.is_none() && self.proves_non_negative(&(extent - 1 - &coordinate));
            let name = match (data, at) {
                (Some(rows), Some(q)) => across(&rows.text, &[q], rank),
                (Some(rows), None) => rows.text.clone(),
                (None, Some(q)) => {
                    let hint = match extent.as_symbol() {
                        Some(symbol) => format!("offs_{}", symbol.to_lowercase()),
                        None => format!("offs_{}{i}", text.tensor),
                    };
                    let name = self.offsets(&index[i], step, &axes[q], &hint);
                    across(&name, &[q], rank)
                }
                (None, None) => self.int(&index[i]),
            };
            if !above {
                masks.push(format!("({name} >= 0)"));
            }
            if !below {
                masks.push(format!("({name} < {})", self.int(extent)));
            }
            if let Some(q) = at.filter(|&q| exactly && axes[q].is_padded()) {
                let lanes = format!("tl.arange(0, {})", axes[q].text);
                masks.push(format!("({} < {})", across(&lanes, &[q], rank), axes[q].extent));
            }
            match &of_param.block {
                None => pointer += &self.term(&coordinate, &name, &text.strides[i], at, data),
                Some(block) => {
                    let size = Dim::new(block.size);
                    let parts = [
                        (coordinate.floor_div(&size), "//", &text.strides[i]),
                        (coordinate.modulo(&size), "%", &text.inner[i]),
                    ];
                    for (part, sign, stride) in parts {
                        if data.is_some() {
                            pointer += &format!(" + ({name} {sign} {size}) * {stride}");
                            continue;
                        }
                        let part = self.facts.simplify(&self.bound(&part));
                        pointer +=
                            &self.blocked_term(&part, stride, at.map(|q| (&axes[q], q)), rank);
                    }
                }
            }
            self.facts.forget(LANE);
        }
        Access { pointer, masks }
    }

    /// ` + coordinate * stride`
    fn term(
        &self,
        coordinate: &Dim,
        name: &str,
        stride: &str,
        at: Option<usize>,
        data: Option<&Rows>,
    ) -> String {
        match (at, data) {
            (None, None) if coordinate.is(0) => String::new(),
            (None, None) => format!(" + tl.cast({name}, INDEX) * {stride}"),
            _ => format!(" + {name} * {stride}"),
        }
    }

    /// ` + part * stride` for a quotient or remainder of a coordinate.
    fn blocked_term(
        &self,
        part: &Dim,
        stride: &str,
        at: Option<(&Axis, usize)>,
        rank: usize,
    ) -> String {
        if part.is(0) || stride == "0" {
            return String::new();
        }
        let lanes = match at {
            Some((axis, q)) => across(&format!("tl.arange(0, {})", axis.text), &[q], rank),
            None => String::new(),
        };
        let extra = [(LANE, lanes)];
        let text = self.with_integers(Side::Kernel, &extra, |p| p.text(part));
        match stride {
            "1" => format!(" + tl.cast({text}, INDEX)"),
            _ => format!(" + tl.cast({text}, INDEX) * {stride}"),
        }
    }

    /// `name = tl.load(...)`
    fn read(&mut self, name: &str, access: Access, fill: Value, dtype: DType) {
        let mut arguments = vec![access.pointer];
        if !access.masks.is_empty() {
            arguments.push(format!("mask={}", joined(&access.masks)));
            arguments.push(format!("other={}", constant(fill, dtype)));
        }
        self.call(name, "tl.load", &arguments, "");
    }

    pub(crate) fn load(
        &mut self,
        name: &str,
        id: TileId,
        param: ParamId,
        index: &[Dim],
        steps: &[i64],
        fill: Value,
    ) {
        let axes = self.axes(id);
        let access = self.access(param, index, steps, &axes, false, None);
        self.read(name, access, fill, self.kernel.ty(id).dtype);
    }

    pub(crate) fn gather(&mut self, name: &str, id: TileId, op: &TileOp) {
        let TileOp::Gather { param, axis, rows, index, fill } = op else { return };
        let axes = self.axes(id);
        let first = &index[*axis];
        let rows = self.tile(*rows);
        let coordinates = self.names.fresh(&format!("at_{rows}"));
        let plus = if first.is(0) { String::new() } else { format!(" + {}", self.int(first)) };
        self.line(format!("{coordinates} = tl.cast({rows}, tl.int64){plus}"));
        let rows = Rows { axis: *axis, text: coordinates };
        let access = self.access(*param, index, &[], &axes, false, Some(&rows));
        self.read(name, access, *fill, self.kernel.ty(id).dtype);
    }

    pub(crate) fn store(&mut self, param: ParamId, index: &[Dim], value: TileId, add: bool) {
        let axes = self.axes(value);
        let dtype = self.kernel.ty(value).dtype;
        if add && (matches!(dtype.bits(), 8) || matches!(dtype, DType::I16 | DType::U16)) {
            self.problem(value, format_args!("atomic_add: Triton adds no {dtype} in memory"));
        }
        let steps = vec![1; index.len()];
        let access = self.access(param, index, &steps, &axes, true, None);
        let mut arguments = vec![access.pointer, self.tile(value)];
        if !access.masks.is_empty() {
            arguments.push(format!("mask={}", joined(&access.masks)));
        }
        if add {
            arguments.push("sem=\"relaxed\"".to_string());
        }
        self.call("", if add { "tl.atomic_add" } else { "tl.store" }, &arguments, "");
    }

    /// The value that all elements of a tile have from position `limit` along an axis on, when that
    /// is known: where a load has left its parameter.
    pub(crate) fn beyond(&self, tile: TileId, axis: usize, limit: &Dim) -> Option<Value> {
        match self.defs[tile.index()]? {
            TileOp::Full(value) => Some(*value),
            TileOp::Load { param, index, steps, fill } if steps[axis] == 1 => {
                let info = &self.kernel.params[*param];
                let extent = &info.layout.axes[axis].extent;
                let past = &index[axis] + limit - extent;
                // Blocked layouts are checked against their extent, too.
                self.proves_non_negative(&past).then_some(*fill)
            }
            TileOp::Permute { x, perm } => self.beyond(*x, perm[axis], limit),
            TileOp::Reshape(x) => {
                let (from, to) = (self.axes(*x), self.axes(tile));
                let same = from.len() == to.len()
                    && from.iter().zip(&to).all(|(a, b)| a.extent == b.extent);
                let at = to.iter().position(|a| a.logical == axis).filter(|_| same)?;
                self.beyond(*x, from[at].logical, limit)
            }
            _ => None,
        }
    }

    /// Whether the launcher passes flat memory for a parameter.
    pub(crate) fn takes_memory(&self, param: ParamId) -> bool {
        is_blocked(&self.kernel.params[param])
    }
}

/// Masks joined by "and".
fn joined(masks: &[String]) -> String {
    match masks {
        [one] => one.strip_prefix('(').and_then(|t| t.strip_suffix(')')).unwrap_or(one).to_string(),
        all => all.join(" & "),
    }
}
