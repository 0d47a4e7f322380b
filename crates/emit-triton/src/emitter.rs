//! The state of printing one kernel: names, what is known of integers, lines by scope, problems.

use crate::integers::{Integers, Side};
use crate::names::Names;
use crate::types::{Axis, element, tuple};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tilewright_expr::Func;
use tilewright_layout::{Dim, Facts, Range, uppers};
use tilewright_tile::{Kernel, Param, ParamId, Schedule, TileId, TileOp};

/// Elements that a Triton tile can have at most (`TRITON_MAX_TENSOR_NUMEL`).
const TILE_ELEMENTS_MAX: i64 = 1 << 20;

/// How wide a line may be.
pub(crate) const LINE_MAX: usize = 99;

/// How the kernel and the launcher call what belongs to a parameter.
#[derive(Clone, Debug, Default)]
pub(crate) struct ParamText {
    /// The tensor, in the launcher.
    pub(crate) tensor: String,
    /// The pointer, in the kernel.
    pub(crate) pointer: String,
    /// For each axis what its coordinate (or its block) is multiplied with: an argument or a number.
    pub(crate) strides: Vec<String>,
    /// For a blocked axis what the coordinate inside its block is multiplied with.
    pub(crate) inner: Vec<String>,
    /// Where coordinate zero lies, for blocked layouts that do not start at their first element.
    pub(crate) offset: Option<String>,
}

/// Whether the launcher takes flat memory for this parameter instead of a tensor of its shape.
pub(crate) fn is_blocked(param: &Param) -> bool {
    param.layout.axes.iter().any(|a| a.block.is_some())
}

/// An integer argument that the launcher computes from a layout.
#[derive(Clone, Debug)]
pub(crate) struct StrideArg {
    /// Its name.
    pub(crate) name: String,
    /// Its value: an axis of a tensor, or an expression over the sizes.
    pub(crate) value: StrideValue,
}

/// Where a stride comes from.
#[derive(Clone, Debug)]
pub(crate) enum StrideValue {
    /// From the tensor that is passed: its name and the axis.
    Tensor(String, usize),
    /// From the layout in the tile program.
    Layout(Dim),
}

/// Lines of one Python block.
#[derive(Debug, Default)]
pub(crate) struct Scope {
    /// The loop variable, when the block is a loop's body.
    pub(crate) var: Option<Arc<str>>,
    pub(crate) lines: Vec<String>,
    /// Coordinates that have a name here: first one, step and padded extent.
    offsets: BTreeMap<(Dim, i64, i64), String>,
}

/// The state.
pub(crate) struct Emitter<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) schedule: &'a Schedule,
    pub(crate) names: Names,
    /// How integers are called, by their name in the tile program.
    pub(crate) integers: BTreeMap<Arc<str>, String>,
    pub(crate) facts: Facts,
    pub(crate) params: Vec<ParamText>,
    pub(crate) stride_args: Vec<StrideArg>,
    /// How tiles are called, by id.
    pub(crate) tiles: Vec<String>,
    /// What defined a tile, by id; none for what loops and branches define.
    pub(crate) defs: Vec<Option<&'a TileOp>>,
    pub(crate) scopes: Vec<Scope>,
    /// Functions of maps: what they compute, their name and text.
    pub(crate) funcs: Vec<(Func, String, String)>,
    pub(crate) helpers: BTreeSet<&'static str>,
    pub(crate) uses_floor: Cell<bool>,
    /// What Triton cannot say, or we cannot say in Triton.
    pub(crate) problems: Vec<String>,
}

impl<'a> Emitter<'a> {
    pub(crate) fn new(kernel: &'a Kernel, schedule: &'a Schedule) -> Emitter<'a> {
        let names = Names::new(crate::helpers::HELPERS.iter().map(|h| h.name));
        let n = kernel.values.len();
        let mut e = Emitter {
            kernel,
            schedule,
            names,
            integers: BTreeMap::new(),
            facts: Facts::default(),
            params: Vec::new(),
            stride_args: Vec::new(),
            tiles: vec![String::new(); n],
            defs: vec![None; n],
            scopes: vec![Scope::default()],
            funcs: Vec::new(),
            helpers: BTreeSet::new(),
            uses_floor: Cell::new(false),
            problems: Vec::new(),
        };
        e.declare();
        e
    }

    fn declare(&mut self) {
        let kernel = self.kernel;
        for (_, param) in kernel.params.iter() {
            let tensor = self.names.fresh(&param.name);
            let pointer = self.names.fresh(&format!("{tensor}_ptr"));
            self.params.push(ParamText { tensor, pointer, ..ParamText::default() });
            if element(param.dtype).is_none() {
                let (name, dtype) = (&param.name, param.dtype);
                self.problems.push(format!("parameter %{name}: Triton has no type {dtype}"));
            }
        }
        for symbol in &kernel.symbols {
            self.name_integer(&symbol.name);
            self.facts.declare(&symbol.name, symbol.range, vec![]);
        }
        for tile in &kernel.tiles {
            self.name_integer(tile);
            let size = self.schedule.tiles.get(tile).copied().unwrap_or(1);
            self.facts.declare(tile, Range { min: size, max: size }, vec![]);
        }
        for axis in &kernel.grid {
            self.name_integer(&axis.name);
            let extent = self.bound(&axis.extent);
            let max = self.facts.bounds(&extent).max.saturating_sub(1).max(0);
            self.facts.declare(&axis.name, Range { min: 0, max }, uppers(&extent));
        }
        for id in 0..kernel.params.len() {
            self.declare_strides(ParamId::from(id));
        }
    }

    pub(crate) fn name_integer(&mut self, name: &Arc<str>) -> String {
        // Loops that do not enclose each other may share a variable.
        if let Some(known) = self.integers.get(name) {
            return known.clone();
        }
        let text = self.names.fresh(name);
        self.integers.insert(name.clone(), text.clone());
        text
    }

    fn declare_strides(&mut self, id: ParamId) {
        let param = &self.kernel.params[id];
        let tensor = self.params[id.index()].tensor.clone();
        let blocked = is_blocked(param);
        let (mut strides, mut inner) = (Vec::new(), Vec::new());
        for (i, axis) in param.layout.axes.iter().enumerate() {
            strides.push(match blocked {
                false => {
                    let name = self.names.fresh(&format!("{tensor}_stride{i}"));
                    let value = StrideValue::Tensor(tensor.clone(), i);
                    self.stride_args.push(StrideArg { name: name.clone(), value });
                    name
                }
                true => self.layout_number(&format!("{tensor}_stride{i}"), &axis.stride),
            });
            inner.push(match &axis.block {
                None => String::new(),
                Some(b) => self.layout_number(&format!("{tensor}_inner{i}"), &b.stride),
            });
        }
        // A tensor that is passed as such starts at its own first element.
        let offset = (blocked && !param.layout.offset.is(0))
            .then(|| self.layout_number(&format!("{tensor}_offset"), &param.layout.offset));
        let text = &mut self.params[id.index()];
        (text.strides, text.inner, text.offset) = (strides, inner, offset);
    }

    /// A number of a layout: itself when constant, else an argument.
    fn layout_number(&mut self, name: &str, dim: &Dim) -> String {
        match dim.as_const() {
            Some(number) => number.to_string(),
            None => {
                let name = self.names.fresh(name);
                let value = StrideValue::Layout(dim.clone());
                self.stride_args.push(StrideArg { name: name.clone(), value });
                name
            }
        }
    }

    /// With the schedule's numbers for tile sizes.
    pub(crate) fn bound(&self, dim: &Dim) -> Dim {
        let tiles = &self.schedule.tiles;
        dim.substitute(&|name| tiles.get(name).map(|n| Dim::new(*n)))
    }

    /// `dim >= 0` for all values of the symbols.
    pub(crate) fn proves_non_negative(&self, dim: &Dim) -> bool {
        let dim = self.facts.simplify(&self.bound(dim));
        self.facts.proves_non_negative(&dim)
    }

    /// Calls `f` with a printer whose symbols are called as `extra` or the kernel says.
    pub(crate) fn with_integers<T>(
        &self,
        side: Side,
        extra: &[(&str, String)],
        f: impl FnOnce(&Integers<'_>) -> T,
    ) -> T {
        let name = |symbol: &str| match extra.iter().find(|(s, _)| *s == symbol) {
            Some((_, text)) => text.clone(),
            None => self.integers.get(symbol).cloned().unwrap_or_else(|| symbol.to_string()),
        };
        f(&Integers {
            side,
            name: &name,
            is_tile: &|name| self.schedule.tiles.contains_key(name),
            facts: &self.facts,
            uses_floor: &self.uses_floor,
        })
    }

    /// An integer in the kernel; binds like a sum.
    pub(crate) fn int(&self, dim: &Dim) -> String {
        self.with_integers(Side::Kernel, &[], |p| p.text(dim))
    }

    /// The same in 64 bits.
    pub(crate) fn wide(&self, dim: &Dim) -> String {
        if let Some(number) = dim.as_const() {
            return format!("tl.cast({number}, tl.int64)");
        }
        let mut symbols: Vec<(Arc<str>, String)> = Vec::new();
        dim.for_each_symbol(&mut |s| {
            if !symbols.iter().any(|(known, _)| known == s) {
                let name = self.integers.get(s).map_or(&**s, String::as_str);
                symbols.push((s.clone(), format!("tl.cast({name}, tl.int64)")));
            }
        });
        let extra: Vec<(&str, String)> = symbols.iter().map(|(s, t)| (&**s, t.clone())).collect();
        self.with_integers(Side::Kernel, &extra, |p| p.text(dim))
    }

    /// The axes of a tile that Triton sees.
    pub(crate) fn axes(&self, tile: TileId) -> Vec<Axis> {
        let shape = &self.kernel.ty(tile).shape;
        let mut axes = Vec::new();
        for (logical, dim) in shape.iter().enumerate() {
            let extent = self.extent(dim);
            if extent == 1 {
                continue;
            }
            let padded = next_power_of_two(extent);
            let text = if padded == extent && dim.as_const().is_none() {
                self.int(dim)
            } else {
                padded.to_string()
            };
            axes.push(Axis { logical, extent, padded, text });
        }
        axes
    }

    /// A static extent in numbers.
    pub(crate) fn extent(&self, dim: &Dim) -> i64 {
        dim.eval(&self.schedule.tiles).unwrap_or(1).max(1)
    }

    /// How reports call a tile.
    pub(crate) fn tile_name(&self, tile: TileId) -> String {
        let name = &self.kernel.values[tile].name;
        if name.is_empty() { tile.to_string() } else { format!("%{name}") }
    }

    /// Notes what cannot be said of a tile.
    pub(crate) fn problem(&mut self, tile: TileId, what: impl std::fmt::Display) {
        let (name, ty) = (self.tile_name(tile), self.kernel.ty(tile));
        self.problems.push(format!("{name} : {ty}: {what}"));
    }

    /// A new name for a tile, and whether Triton can hold it.
    pub(crate) fn define(&mut self, tile: TileId) -> String {
        let info = &self.kernel.values[tile];
        let wanted = if info.name.is_empty() { format!("v{}", tile.0) } else { info.name.clone() };
        let name = self.names.fresh(&wanted);
        self.tiles[tile.index()] = name.clone();
        self.check_type(tile);
        name
    }

    pub(crate) fn check_type(&mut self, tile: TileId) {
        let dtype = self.kernel.ty(tile).dtype;
        if element(dtype).is_none() {
            self.problem(tile, format_args!("Triton has no type {dtype}"));
        }
        let elements = self.axes(tile).iter().fold(1i64, |n, a| n.saturating_mul(a.padded));
        if elements > TILE_ELEMENTS_MAX {
            self.problem(
                tile,
                format_args!("{elements} elements, a Triton tile has at most {TILE_ELEMENTS_MAX}"),
            );
        }
    }

    /// How a tile is called.
    pub(crate) fn tile(&self, tile: TileId) -> String {
        self.tiles[tile.index()].clone()
    }

    /// Triton's element type of a tile.
    pub(crate) fn element(&self, tile: TileId) -> &'static str {
        element(self.kernel.ty(tile).dtype).unwrap_or("tl.int8")
    }

    /// A tile's shape as Triton sees it.
    pub(crate) fn shape(&self, tile: TileId) -> String {
        tuple(&self.axes(tile))
    }

    /// Marks a helper, and what it calls, as used.
    pub(crate) fn helper(&mut self, name: &'static str) -> &'static str {
        self.helpers.insert(name);
        name
    }

    /// Appends a line to the innermost block.
    pub(crate) fn line(&mut self, text: impl Into<String>) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.lines.push(text.into());
        }
    }

    /// `target = callee(arguments)suffix`, broken into lines when it is long.
    pub(crate) fn call(&mut self, target: &str, callee: &str, arguments: &[String], suffix: &str) {
        let head = if target.is_empty() { String::new() } else { format!("{target} = ") };
        let line = format!("{head}{callee}({}){suffix}", arguments.join(", "));
        if line.len() + 4 * self.scopes.len() <= LINE_MAX {
            return self.line(line);
        }
        self.line(format!("{head}{callee}("));
        for argument in arguments {
            if argument.len() + 4 * self.scopes.len() + 5 <= LINE_MAX {
                self.line(format!("    {argument},"));
                continue;
            }
            let (keyword, value) = match argument.split_once("=") {
                Some((k, v)) if k.chars().all(|c| c.is_ascii_lowercase()) => (k, v),
                _ => ("", argument.as_str()),
            };
            if keyword.is_empty() {
                let terms = terms(value);
                let last = terms.len() - 1;
                for (i, term) in terms.iter().enumerate() {
                    self.line(format!("    {term}{}", if i == last { "," } else { "" }));
                }
            } else {
                self.line(format!("    {keyword}=("));
                for term in terms(value) {
                    self.line(format!("        {term}"));
                }
                self.line("    ),");
            }
        }
        self.line(format!("){suffix}"));
    }

    /// Opens a block.
    pub(crate) fn open(&mut self, var: Option<Arc<str>>) {
        self.scopes.push(Scope { var, ..Scope::default() });
    }

    /// Closes the innermost block and appends it below `head`.
    pub(crate) fn close(&mut self, head: String) {
        let scope = self.scopes.pop().unwrap_or_default();
        self.line(head);
        if scope.lines.is_empty() {
            self.line("    pass");
        }
        for line in scope.lines {
            self.line(format!("    {line}"));
        }
    }

    /// The name of coordinates `first + step * i`, `i < padded`. They are computed in the outermost
    /// block that knows all their symbols.
    pub(crate) fn offsets(&mut self, first: &Dim, step: i64, axis: &Axis, hint: &str) -> String {
        let key = (first.clone(), step, axis.padded);
        if let Some(known) = self.scopes.iter().rev().find_map(|s| s.offsets.get(&key)) {
            return known.clone();
        }
        let name = self.names.fresh(hint);
        let lanes = format!("tl.arange(0, {})", axis.text);
        let lanes = match step {
            1 => lanes,
            -1 => format!("-{lanes}"),
            _ => format!("{step} * {lanes}"),
        };
        let value = match (first.is(0), step) {
            (true, 1) => format!("{lanes}.to(INDEX)"),
            (true, _) => format!("({lanes}).to(INDEX)"),
            (false, _) => format!("({} + {lanes}).to(INDEX)", self.int(first)),
        };
        let at = self.home(first);
        let scope = &mut self.scopes[at];
        scope.lines.push(format!("{name} = {value}"));
        scope.offsets.insert(key, name.clone());
        name
    }

    /// The outermost block in which an integer can be computed.
    fn home(&self, dim: &Dim) -> usize {
        let mut at = 0;
        dim.for_each_symbol(&mut |symbol| {
            let inner = self.scopes.iter().rposition(|s| s.var.as_ref() == Some(symbol));
            at = at.max(inner.unwrap_or(0));
        });
        at
    }
}

/// The next power of two, or the largest that there is.
fn next_power_of_two(n: i64) -> i64 {
    let next = n.unsigned_abs().checked_next_power_of_two();
    next.and_then(|n| i64::try_from(n).ok()).unwrap_or(1 << 62)
}

/// A long sum or conjunction, split before each operator outside parentheses.
fn terms(text: &str) -> Vec<&str> {
    let (mut depth, mut from) = (0, 0);
    let mut parts = Vec::new();
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '+' | '&' if depth == 0 && text[..at].ends_with(' ') => {
                parts.push(text[from..at].trim_end());
                from = at;
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    parts
}
