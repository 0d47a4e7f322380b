//! Reads kernels and schedules in the text form that `print.rs` writes; the crate's head shows an
//! example.
//!
//! Post-condition: `parse(print(k))` is `k` with its tiles renumbered in the order of the text, so
//! it prints as the same text (tiles that nothing defines vanish). What may be left out, by hand:
//! `sizes(..)` (then the sizes are the symbols of the parameters' shapes, in order of appearance and
//! at least 0), steps of 1, fills of zero, axes of an operand that are all axes in order.
//!
//! The parser resolves names (of tiles, parameters, sizes, loop variables) and needs what it must
//! know to read on; whether the types of operations fit together is said by
//! [`verify`](crate::verify()).
//!
//! To add an operation: an arm in [`Parser::op`], beside its arm in `print.rs`.

use crate::cursor::{Cursor, Piece};
use crate::ir::*;
use crate::schedule::{MatrixUnit, Schedule};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{Func, Value};
use tilewright_layout::{Dim, Layout, Range, Symbol};

/// Loops and branches nest at most this deep.
const DEPTH_MAX: usize = 64;

impl Kernel {
    /// Reads the text form. `name` is what errors call the text: a file name or `<kernel>`.
    pub fn parse(name: &str, text: &str) -> Result<Kernel> {
        let kernel = Kernel {
            name: String::new(),
            params: Default::default(),
            symbols: Vec::new(),
            tiles: Vec::new(),
            bounds: Vec::new(),
            grid: Vec::new(),
            values: Default::default(),
            body: Block::default(),
        };
        let mut parser = Parser {
            cursor: Cursor::new(name, text),
            kernel,
            params: BTreeMap::new(),
            labels: BTreeMap::new(),
            visible: Vec::new(),
            scope: Vec::new(),
            depth: 0,
        };
        parser.kernel()?;
        Ok(parser.kernel)
    }
}

impl Schedule {
    /// Reads the text form: `BM=64 BN=32 vector=256 mma=6x2 unroll=2 chains=4`. Knobs may be left
    /// out; every other key is a tile size.
    pub fn parse(name: &str, text: &str) -> Result<Schedule> {
        let mut cursor = Cursor::new(name, text);
        let mut schedule = Schedule::default();
        let mut seen: Vec<&str> = Vec::new();
        while !cursor.is_done() {
            let key = cursor.identifier("a tile size or a knob")?;
            if seen.contains(&key.text) {
                return Err(cursor.error_on(key, format!("`{}` is set twice", key.text)));
            }
            seen.push(key.text);
            cursor.need("=")?;
            if key.text == "unit" {
                let unit = cursor.identifier("a matrix unit")?;
                let known = MatrixUnit::ALL.into_iter().find(|u| u.name() == unit.text);
                schedule.cpu.unit = known.ok_or_else(|| {
                    let names = MatrixUnit::ALL.map(MatrixUnit::name).join(", ");
                    cursor.error_on(unit, format!("not a matrix unit: {names}"))
                })?;
                continue;
            }
            let value = cursor.number("a number")?;
            let cpu = &mut schedule.cpu;
            let knob = match key.text {
                "vector" => &mut cpu.vector_bits,
                "unroll" => &mut cpu.unroll_k,
                "chains" => &mut cpu.reduce_chains,
                "jam" => &mut cpu.jam,
                "stream" | "ahead" => {
                    let set = match value.text {
                        "0" => false,
                        "1" => true,
                        _ => return Err(cursor.error_on(value, "not 0 or 1")),
                    };
                    *(if key.text == "stream" { &mut cpu.stream } else { &mut cpu.ahead }) = set;
                    continue;
                }
                "mma" => {
                    let sizes = value.text.split_once('x');
                    let sizes = sizes.and_then(|(m, n)| Some((m.parse().ok()?, n.parse().ok()?)));
                    let Some(sizes) = sizes else {
                        return Err(cursor.error_on(value, "not rows and vectors like 6x2"));
                    };
                    (cpu.mma_rows, cpu.mma_vectors) = sizes;
                    continue;
                }
                tile => {
                    let size = cursor.parsed(value, "a tile size")?;
                    schedule.tiles.insert(Arc::from(tile), size);
                    continue;
                }
            };
            *knob = cursor.parsed(value, "a knob's value")?;
        }
        Ok(schedule)
    }
}

struct Parser<'a> {
    cursor: Cursor<'a>,
    kernel: Kernel,
    params: BTreeMap<&'a str, ParamId>,
    /// Every tile that has been named so far, and whether it can be seen here.
    labels: BTreeMap<&'a str, (TileId, bool)>,
    /// The tiles that can be seen, in order of definition: the end of a block hides its own.
    visible: Vec<&'a str>,
    /// The integers that can be seen: sizes, tile sizes, grid indices, variables of open loops.
    scope: Vec<Arc<str>>,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn kernel(&mut self) -> Result<()> {
        self.cursor.need_word("kernel")?;
        self.cursor.need("@")?;
        self.kernel.name = self.cursor.identifier("the kernel's name")?.text.to_string();
        self.cursor.need("(")?;
        // The sizes are declared after the parameters that use them.
        let mut pending = Vec::new();
        while !self.cursor.eat(")") {
            self.param(&mut pending)?;
            self.comma(")")?;
        }
        if self.cursor.eat_word("sizes") {
            self.sizes()?;
        } else {
            self.sizes_of_params();
        }
        for (dim, piece) in &pending {
            self.resolved(dim, *piece)?;
        }
        self.cursor.need_word("tile")?;
        self.cursor.need("(")?;
        while !self.cursor.eat(")") {
            let name = self.declared("a tile size")?;
            self.kernel.tiles.push(name.clone());
            while let Some(bound) = self.bound()? {
                self.kernel.bounds.push((name.clone(), bound));
            }
            self.comma(")")?;
        }
        self.cursor.need_word("grid")?;
        self.cursor.need("(")?;
        let mut indices: Vec<Arc<str>> = Vec::new();
        while !self.cursor.eat(")") {
            let start = self.cursor.here();
            let name = self.declared("a grid index")?;
            if indices.contains(&name) {
                let piece = self.cursor.since(start);
                return Err(self.cursor.error_on(piece, format!("`{name}` is declared twice")));
            }
            // The extents of the grid do not see its indices.
            indices.extend(self.scope.pop());
            self.cursor.need_word("in")?;
            let extent = self.dim()?;
            self.kernel.grid.push(GridAxis { name, extent });
            self.comma(")")?;
        }
        self.scope.append(&mut indices);
        let (body, yields) = self.block()?;
        if let Some((piece, _)) = yields.first() {
            return Err(self.cursor.error_on(*piece, "a kernel's body yields nothing"));
        }
        self.kernel.body = body;
        if self.cursor.is_done() {
            Ok(())
        } else {
            Err(self.cursor.expected("the end of the text"))
        }
    }

    /// What schedules may give the tile size before it, if that is said.
    fn bound(&mut self) -> Result<Option<Bound>> {
        let make = if self.cursor.eat(">=") {
            Bound::AtLeast
        } else if self.cursor.eat("==") {
            Bound::Exactly
        } else if self.cursor.eat_word("divides") {
            Bound::Divides
        } else {
            return Ok(None);
        };
        let number = self.cursor.number("a number")?;
        self.cursor.parsed(number, "a tile size").map(make).map(Some)
    }

    /// A comma, unless the list ends here.
    fn comma(&mut self, close: &str) -> Result<()> {
        if self.cursor.at(close) { Ok(()) } else { self.cursor.need(",") }
    }

    /// The name of a new integer.
    fn declared(&mut self, what: &str) -> Result<Arc<str>> {
        let name = self.cursor.identifier(what)?;
        if self.scope.iter().any(|n| **n == *name.text) {
            return Err(self.cursor.error_on(name, format!("`{}` is declared twice", name.text)));
        }
        let name: Arc<str> = Arc::from(name.text);
        self.scope.push(name.clone());
        Ok(name)
    }

    fn param(&mut self, pending: &mut Vec<(Dim, Piece<'a>)>) -> Result<()> {
        let access = match () {
            _ if self.cursor.eat_word("out") => Access::Out,
            _ if self.cursor.eat_word("inout") => Access::InOut,
            _ => Access::In,
        };
        self.cursor.need("%")?;
        let name = self.cursor.identifier("a parameter's name")?;
        if self.params.contains_key(name.text) {
            return Err(self.cursor.error_on(name, format!("two parameters `{}`", name.text)));
        }
        self.cursor.need(":")?;
        let dtype = self.dtype()?;
        let mut shape = Vec::new();
        self.cursor.need("[")?;
        while !self.cursor.eat("]") {
            let (dim, piece) = self.cursor.dim()?;
            shape.push(dim.clone());
            pending.push((dim, piece));
            self.comma("]")?;
        }
        let layout = match self.cursor.eat_word("at") {
            false => Layout::row_major(&shape),
            true => {
                let start = self.cursor.here();
                self.cursor.bracketed('(', ')', "a layout")?;
                self.cursor.need(":")?;
                self.cursor.bracketed('(', ')', "strides")?;
                if self.cursor.eat("+") {
                    self.cursor.dim()?;
                }
                let piece = self.cursor.since(start);
                let layout = piece.text.parse::<Layout>();
                let layout = layout.map_err(|e| self.cursor.error_on(piece, e))?;
                let layout = placed(layout, &shape);
                let layout = layout.map_err(|e| self.cursor.error_on(piece, e))?;
                let strides = layout.axes.iter().map(|a| a.stride.clone());
                let inner =
                    layout.axes.iter().filter_map(|a| Some(a.block.as_ref()?.stride.clone()));
                pending.extend(
                    strides.chain(inner).chain([layout.offset.clone()]).map(|d| (d, piece)),
                );
                layout
            }
        };
        let param = Param { name: Arc::from(name.text), dtype, layout, access };
        let id = self.kernel.params.push(param);
        self.params.insert(name.text, id);
        Ok(())
    }

    /// `N in 1..=4096, M in 0..` after `sizes`.
    fn sizes(&mut self) -> Result<()> {
        self.cursor.need("(")?;
        while !self.cursor.eat(")") {
            let name = self.declared("a size")?;
            self.cursor.need_word("in")?;
            let min = self.cursor.number("the smallest size")?;
            let start = min;
            let min = self.cursor.parsed(min, "a whole number")?;
            self.cursor.need("..")?;
            let max = match self.cursor.eat("=") {
                false => i64::MAX,
                true => {
                    let max = self.cursor.number("the largest size")?;
                    self.cursor.parsed(max, "a whole number")?
                }
            };
            if max < min {
                return Err(self.cursor.error_on(start, format!("the range of `{name}` is empty")));
            }
            self.kernel.symbols.push(Symbol { name, range: Range { min, max } });
            self.comma(")")?;
        }
        Ok(())
    }

    /// Without `sizes`: the symbols of the parameters' shapes.
    fn sizes_of_params(&mut self) {
        for (_, param) in self.kernel.params.iter() {
            for axis in &param.layout.axes {
                axis.extent.for_each_symbol(&mut |name| {
                    if !self.scope.iter().any(|n| **n == **name) {
                        self.scope.push(name.clone());
                        let range = Range { min: 0, max: i64::MAX };
                        self.kernel.symbols.push(Symbol { name: name.clone(), range });
                    }
                });
            }
        }
    }

    fn dtype(&mut self) -> Result<DType> {
        let word = self.cursor.word("an element type")?;
        self.cursor.parsed(word, "an element type")
    }

    /// Every symbol of `dim` can be seen here.
    fn resolved(&self, dim: &Dim, piece: Piece<'_>) -> Result<()> {
        let mut unknown = None;
        dim.for_each_symbol(&mut |name| {
            if !self.scope.iter().any(|n| **n == **name) {
                unknown = Some(name.clone());
            }
        });
        match unknown {
            None => Ok(()),
            Some(name) => Err(self.cursor.error_on(piece, format!("`{name}` is not declared"))),
        }
    }

    /// An integer expression over what can be seen.
    fn dim(&mut self) -> Result<Dim> {
        let (dim, piece) = self.cursor.dim()?;
        self.resolved(&dim, piece)?;
        Ok(dim)
    }

    fn dims(&mut self) -> Result<Vec<Dim>> {
        self.cursor.need("[")?;
        let mut dims = Vec::new();
        while !self.cursor.eat("]") {
            dims.push(self.dim()?);
            self.comma("]")?;
        }
        Ok(dims)
    }

    fn tile_type(&mut self) -> Result<TileType> {
        let dtype = self.dtype()?;
        Ok(TileType::new(dtype, self.dims()?))
    }

    /// Reads the name of a new tile; nothing sees it until [`Parser::show`].
    fn new_tile(&mut self) -> Result<(TileId, &'a str)> {
        self.cursor.need("%")?;
        let label = self.cursor.word("a tile's name")?;
        let numbered = label.text.starts_with(|c: char| c.is_ascii_digit());
        if numbered && !label.text.chars().all(|c| c.is_ascii_digit()) {
            return Err(self.cursor.error_on(label, "a tile is called by a number or by a name"));
        }
        if self.labels.contains_key(label.text) {
            let message = format!("`%{}` is defined twice", label.text);
            return Err(self.cursor.error_on(label, message));
        }
        let name = if numbered { String::new() } else { label.text.to_string() };
        let ty = TileType::new(DType::F32, Vec::new());
        let id = self.kernel.values.push(TileInfo { name, ty });
        self.labels.insert(label.text, (id, false));
        Ok((id, label.text))
    }

    /// From here on the tile can be read.
    fn show(&mut self, (id, label): (TileId, &'a str), ty: TileType) {
        self.kernel.values[id].ty = ty;
        self.labels.insert(label, (id, true));
        self.visible.push(label);
    }

    /// A tile that can be seen here.
    fn tile(&mut self) -> Result<(Piece<'a>, TileId)> {
        self.cursor.need("%")?;
        let label = self.cursor.word("a tile")?;
        match self.labels.get(label.text) {
            Some(&(id, true)) => Ok((label, id)),
            Some((_, false)) => {
                let message = format!("`%{}` cannot be seen here", label.text);
                Err(self.cursor.error_on(label, message))
            }
            None if self.params.contains_key(label.text) => {
                let message = format!("`%{}` is a parameter: load it first", label.text);
                Err(self.cursor.error_on(label, message))
            }
            None => {
                let message = format!("no tile is called `%{}`", label.text);
                Err(self.cursor.error_on(label, message))
            }
        }
    }

    /// `%C[i, j]`
    fn place(&mut self) -> Result<(ParamId, Vec<Dim>)> {
        self.cursor.need("%")?;
        let name = self.cursor.word("a parameter")?;
        let Some(&param) = self.params.get(name.text) else {
            let message = format!("no parameter is called `%{}`", name.text);
            return Err(self.cursor.error_on(name, message));
        };
        Ok((param, self.dims()?))
    }

    /// A block in braces, and what it yields.
    fn block(&mut self) -> Result<(Block, Vec<(Piece<'a>, TileId)>)> {
        let open = self.cursor.here();
        self.cursor.need("{")?;
        if self.depth >= DEPTH_MAX {
            let piece = self.cursor.since(open);
            return Err(self.cursor.error_on(piece, "loops and branches nest too deeply"));
        }
        self.depth += 1;
        let outside = self.visible.len();
        let (mut block, mut yields) = (Block::default(), Vec::new());
        while !self.cursor.eat("}") {
            if self.cursor.eat_word("yield") {
                yields.push(self.tile()?);
                while self.cursor.eat(",") {
                    yields.push(self.tile()?);
                }
                self.cursor.need("}")?;
                break;
            }
            let stmt = self.stmt()?;
            block.stmts.push(stmt);
        }
        for label in self.visible.drain(outside..) {
            if let Some(entry) = self.labels.get_mut(label) {
                entry.1 = false;
            }
        }
        self.depth -= 1;
        Ok((block, yields))
    }

    fn stmt(&mut self) -> Result<Stmt> {
        let mut heads = Vec::new();
        let start = self.cursor.here();
        if self.cursor.at("%") {
            heads.push(self.new_tile()?);
            while self.cursor.eat(",") {
                heads.push(self.new_tile()?);
            }
            self.cursor.need("=")?;
        }
        if self.cursor.eat_word("for") {
            return self.for_loop(heads, start);
        }
        if self.cursor.eat_word("if") {
            return self.branch(heads, start);
        }
        if heads.is_empty() {
            let atomic = self.cursor.eat_word("atomic_add");
            if !atomic && !self.cursor.eat_word("store") {
                let what = "`%tile = ...`, `store`, `atomic_add`, `for`, `if`, `yield` or `}`";
                return Err(self.cursor.expected(what));
            }
            let (param, index) = self.place()?;
            self.cursor.need(",")?;
            let value = self.tile()?.1;
            return Ok(match atomic {
                true => Stmt::AtomicAdd { param, index, value },
                false => Stmt::Store { param, index, value },
            });
        }
        let &[head] = heads.as_slice() else {
            let piece = self.cursor.since(start);
            return Err(self.cursor.error_on(piece, "an operation has one result"));
        };
        let (op, ty) = self.op()?;
        self.show(head, ty);
        Ok(Stmt::Let(head.0, op))
    }

    /// As many tiles as there are results, or an error about the statement at `start`.
    fn counts(&self, start: usize, what: &str, n_tiles: usize, n_results: usize) -> Result<()> {
        if n_tiles == n_results {
            return Ok(());
        }
        let message = format!("{n_results} results, but {what} {n_tiles} tiles");
        let line = self.cursor.line_at(start);
        Err(self.cursor.error_on(line, message))
    }

    fn for_loop(&mut self, heads: Vec<(TileId, &'a str)>, start: usize) -> Result<Stmt> {
        let var = self.declared("a loop variable")?;
        // The bounds are outside the loop.
        self.scope.pop();
        self.cursor.need_word("in")?;
        let lo = self.dim()?;
        self.cursor.need("..")?;
        let hi = self.dim()?;
        let (mut carry, mut inner) = (Vec::new(), Vec::new());
        if self.cursor.eat_word("carry") {
            self.cursor.need("(")?;
            while !self.cursor.eat(")") {
                let tile = self.new_tile()?;
                self.cursor.need("=")?;
                carry.push((tile.0, self.tile()?.1));
                inner.push(tile);
                self.comma(")")?;
            }
        }
        self.counts(start, "the loop carries", carry.len(), heads.len())?;
        let types: Vec<TileType> = carry.iter().map(|c| self.kernel.ty(c.1).clone()).collect();
        let outside = self.visible.len();
        for (tile, ty) in inner.into_iter().zip(&types) {
            self.show(tile, ty.clone());
        }
        self.scope.push(var.clone());
        let (body, yields) = self.block()?;
        self.scope.pop();
        for label in self.visible.drain(outside..) {
            if let Some(entry) = self.labels.get_mut(label) {
                entry.1 = false;
            }
        }
        self.counts(start, "the body yields", yields.len(), heads.len())?;
        let results = heads.iter().map(|h| h.0).collect();
        for (head, ty) in heads.into_iter().zip(types) {
            self.show(head, ty);
        }
        let yields = yields.into_iter().map(|y| y.1).collect();
        Ok(Stmt::For(Box::new(For { var, lo, hi, carry, body, yields, results })))
    }

    fn branch(&mut self, heads: Vec<(TileId, &'a str)>, start: usize) -> Result<Stmt> {
        let lhs = self.dim()?;
        let compare = match () {
            _ if self.cursor.eat("<=") => Compare::Le,
            _ if self.cursor.eat("<") => Compare::Lt,
            _ if self.cursor.eat("==") => Compare::Eq,
            _ if self.cursor.eat("!=") => Compare::Ne,
            _ => return Err(self.cursor.expected("`<`, `<=`, `==` or `!=`")),
        };
        let rhs = self.dim()?;
        let (then, then_yields) = self.block()?;
        self.counts(start, "the first branch yields", then_yields.len(), heads.len())?;
        let (otherwise, otherwise_yields) = match self.cursor.eat_word("else") {
            true => self.block()?,
            false => (Block::default(), Vec::new()),
        };
        self.counts(start, "the second branch yields", otherwise_yields.len(), heads.len())?;
        let results = heads.iter().map(|h| h.0).collect();
        for (head, (_, y)) in heads.into_iter().zip(&then_yields) {
            self.show(head, self.kernel.ty(*y).clone());
        }
        let ids = |yields: Vec<(Piece<'a>, TileId)>| yields.into_iter().map(|y| y.1).collect();
        Ok(Stmt::If(Box::new(If {
            lhs,
            compare,
            rhs,
            then,
            then_yields: ids(then_yields),
            otherwise,
            otherwise_yields: ids(otherwise_yields),
            results,
        })))
    }

    /// A number as it is written; what it means depends on a type that may come later.
    fn value(&self, piece: Piece<'_>, dtype: DType) -> Result<Value> {
        let text = piece.text;
        let what = format!("a number of type {dtype}");
        Ok(match dtype {
            _ if dtype.is_float() => Value::Float(self.cursor.parsed(piece, &what)?),
            DType::Bool if text == "true" => Value::Int(1),
            DType::Bool if text == "false" => Value::Int(0),
            // Read by its bits, so written without a sign or, as printed, with one.
            DType::U64 if !text.starts_with('-') => {
                Value::Int(self.cursor.parsed::<u64>(piece, &what)? as i64)
            }
            _ => Value::Int(self.cursor.parsed(piece, &what)?),
        })
    }

    /// `fill -inf` of a load; zero when it is not said.
    fn fill(&mut self, param: ParamId) -> Result<Value> {
        let dtype = self.kernel.params[param].dtype;
        if self.cursor.eat_word("fill") {
            let number = self.cursor.number("a number")?;
            return self.value(number, dtype);
        }
        Ok(if dtype.is_float() { Value::Float(0.0) } else { Value::Int(0) })
    }

    fn axis(&mut self) -> Result<usize> {
        self.cursor.need_word("axis")?;
        let word = self.cursor.word("an axis")?;
        self.cursor.parsed(word, "an axis")
    }

    /// `(1, 0, 2)`
    fn numbers<T: std::str::FromStr>(&mut self) -> Result<Vec<T>> {
        self.cursor.need("(")?;
        let mut out = Vec::new();
        while !self.cursor.eat(")") {
            let word = self.cursor.number("a number")?;
            out.push(self.cursor.parsed(word, "a whole number")?);
            self.comma(")")?;
        }
        Ok(out)
    }

    fn limit(&mut self) -> Result<Option<Dim>> {
        if self.cursor.eat_word("limit") { Ok(Some(self.dim()?)) } else { Ok(None) }
    }

    fn kind(&mut self) -> Result<ReduceKind> {
        let word = self.cursor.word("`sum`, `prod`, `max` or `min`")?;
        Ok(match word.text {
            "sum" => ReduceKind::Sum,
            "prod" => ReduceKind::Prod,
            "max" => ReduceKind::Max,
            "min" => ReduceKind::Min,
            _ => return Err(self.cursor.error_on(word, "not `sum`, `prod`, `max` or `min`")),
        })
    }

    /// A tile with `along 1` or `along (0, 2)`; without, it runs along all axes of the result.
    fn operand(&mut self) -> Result<(TileId, Option<Vec<usize>>)> {
        let tile = self.tile()?.1;
        let along = match self.cursor.eat_word("along") {
            false => None,
            true if self.cursor.at("(") => Some(self.numbers()?),
            true => {
                let word = self.cursor.word("an axis")?;
                Some(vec![self.cursor.parsed(word, "an axis")?])
            }
        };
        Ok((tile, along))
    }

    /// An operation and the type of its result.
    fn op(&mut self) -> Result<(TileOp, TileType)> {
        let name = self.cursor.word("an operation")?;
        let all = |along: Option<Vec<usize>>, ty: &TileType| {
            along.unwrap_or_else(|| (0..ty.shape.len()).collect())
        };
        let op = match name.text {
            // These know more once the type has been read.
            "full" => {
                let number = self.cursor.number("a number")?;
                let ty = self.result_type()?;
                return Ok((TileOp::Full(self.value(number, ty.dtype)?), ty));
            }
            "map" => {
                let args = self.map_operands()?;
                let func = self.func(&args)?;
                let ty = self.result_type()?;
                let args = args.into_iter().map(|(tile, a)| Operand { tile, along: all(a, &ty) });
                return Ok((TileOp::Map { func, args: args.collect() }, ty));
            }
            "broadcast" => {
                let (tile, along) = self.operand()?;
                let ty = self.result_type()?;
                return Ok((TileOp::Broadcast(Operand { tile, along: all(along, &ty) }), ty));
            }
            "load" => {
                let (param, index) = self.place()?;
                let steps = match self.cursor.eat_word("step") {
                    true => self.numbers()?,
                    false => vec![1; index.len()],
                };
                let fill = self.fill(param)?;
                TileOp::Load { param, index, steps, fill }
            }
            "gather" => {
                let (param, index) = self.place()?;
                let axis = self.axis()?;
                self.cursor.need_word("rows")?;
                let rows = self.tile()?.1;
                let fill = self.fill(param)?;
                TileOp::Gather { param, axis, rows, index, fill }
            }
            "reduce" => {
                let (kind, x, axis) = (self.kind()?, self.tile()?.1, self.axis()?);
                TileOp::Reduce { kind, x, axis, limit: self.limit()? }
            }
            "arg" => {
                let (kind, x, axis) = (self.kind()?, self.tile()?.1, self.axis()?);
                let limit = self.limit()?;
                TileOp::ArgReduce { kind, x, axis, limit, last: self.cursor.eat_word("last") }
            }
            "scan" => {
                let (kind, x, axis) = (self.kind()?, self.tile()?.1, self.axis()?);
                let exclusive = self.cursor.eat_word("exclusive");
                let reverse = self.cursor.eat_word("reverse");
                TileOp::Scan { kind, x, axis, exclusive, reverse }
            }
            "mma" => {
                let acc = self.tile()?.1;
                self.cursor.need(",")?;
                let a = self.tile()?.1;
                self.cursor.need(",")?;
                let b = self.tile()?.1;
                TileOp::Mma { acc, a, b, limit: self.limit()? }
            }
            "permute" => {
                let x = self.tile()?.1;
                TileOp::Permute { x, perm: self.numbers()? }
            }
            "reshape" => TileOp::Reshape(self.tile()?.1),
            "iota" => {
                let axis = self.axis()?;
                self.cursor.need_word("from")?;
                TileOp::Iota { axis, start: self.dim()? }
            }
            "random" => {
                self.cursor.need_word("seed")?;
                let seed = self.cursor.word("a seed")?;
                let seed = self.cursor.parsed(seed, "a seed")?;
                self.cursor.need_word("from")?;
                TileOp::Random { seed, start: self.dim()? }
            }
            unknown => {
                let message = format!("no operation is called `{}`", unknown.escape_debug());
                return Err(self.cursor.error_on(name, message));
            }
        };
        Ok((op, self.result_type()?))
    }

    fn result_type(&mut self) -> Result<TileType> {
        self.cursor.need(":")?;
        self.tile_type()
    }

    fn map_operands(&mut self) -> Result<Vec<(TileId, Option<Vec<usize>>)>> {
        self.cursor.need("(")?;
        let mut args = Vec::new();
        while !self.cursor.eat(")") {
            args.push(self.operand()?);
            self.comma(")")?;
        }
        Ok(args)
    }

    /// The function of a map; its parameters have the types of the operands.
    fn func(&mut self, args: &[(TileId, Option<Vec<usize>>)]) -> Result<Func> {
        let piece = self.cursor.bracketed('{', '}', "a function in braces")?;
        let types: Vec<DType> = args.iter().map(|a| self.kernel.ty(a.0).dtype).collect();
        Func::parse(piece.text, &types).map_err(|e| self.inside(piece, &e))
    }

    /// An error about a part of this text, as an error about this text.
    fn inside(&self, piece: Piece<'_>, error: &Error) -> Error {
        let span = match error.span() {
            Some(s) => self.cursor.span(piece.at + s.start, s.len, s.label.clone()),
            None => self.cursor.span(piece.at, piece.text.len(), error.message().to_string()),
        };
        let moved = Error::user(error.message()).with_span(span);
        let moved = error.notes().iter().fold(moved, |e, note| e.with_note(note.clone()));
        match error.hint() {
            Some(hint) => moved.with_hint(hint),
            None => moved,
        }
    }
}

/// `layout` with the extents of `shape`, which it must have; a blocked axis is only known in blocks.
fn placed(mut layout: Layout, shape: &[Dim]) -> Result<Layout, String> {
    if layout.rank() != shape.len() {
        return Err(format!("a layout of {} axes for {}", layout.rank(), shape.len()));
    }
    for (axis, extent) in layout.axes.iter_mut().zip(shape) {
        let same = match &axis.block {
            None => axis.extent == *extent,
            Some(b) => {
                let size = Dim::new(b.size);
                axis.extent.ceil_div(&size) == extent.ceil_div(&size)
            }
        };
        if !same {
            return Err(format!(
                "the layout has extent {} where the shape has {extent}",
                axis.extent
            ));
        }
        axis.extent = extent.clone();
    }
    Ok(layout)
}
