//! Reads graphs. Line by line, operand types known, so that every error points at its place; the
//! type rules run on each node as it is read.

use super::Constants;
use super::lex::{Cursor, Piece};
use super::print::{reduce_name, scatter_name, window_name};
use crate::infer::infer;
use crate::ir::{Def, Graph, TensorType, Value, ValueId};
use crate::op::{
    AttentionAttrs, ConvAttrs, HostAttr, HostOp, Op, PadMode, ReduceKind, ScatterKind, WindowAttrs,
    WindowKind,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, element_count, from_f64, from_i64};
use tilewright_expr::Func;
use tilewright_layout::{Dim, Range, Symbol};

/// Constants made up by [`Constants::Zeros`] and [`Constants::Seeded`] are at most this large.
const MADE_UP_ELEMENTS_MAX: usize = 1 << 28;

pub(super) fn parse(name: &str, text: &str, constants: Constants<'_>) -> Result<Graph> {
    let graph = Graph::new("");
    let cursor = Cursor::new(name, text);
    let mut parser = Parser { cursor, graph, labels: BTreeMap::new(), constants };
    parser.graph()?;
    Ok(parser.graph)
}

/// An operator as it stands behind `=`, without operands; see [`Graph::parse_op`].
pub(super) fn parse_op(
    graph: &Graph,
    text: &str,
    operands: &[TensorType],
    results: &[Option<TensorType>],
) -> Result<Op> {
    let mut symbols = Graph::new("");
    symbols.symbols = graph.symbols.clone();
    let cursor = Cursor::new("<operator>", text);
    let mut parser =
        Parser { cursor, graph: symbols, labels: BTreeMap::new(), constants: Constants::None };
    let name = parser.cursor.word("an operator")?;
    let mut attrs = parser.attributes()?;
    let op = parser.op(name, &mut attrs, operands, results)?;
    parser.nothing_left(&attrs, name)?;
    parser.cursor.space();
    if parser.cursor.rest().is_empty() { Ok(op) } else { Err(parser.cursor.expected("the end")) }
}

/// A type such as `f32[N,4]`; see [`Graph::parse_type`].
pub(super) fn parse_type(graph: &Graph, text: &str) -> Result<TensorType> {
    let mut symbols = Graph::new("");
    symbols.symbols = graph.symbols.clone();
    let cursor = Cursor::new("<type>", text);
    let mut parser =
        Parser { cursor, graph: symbols, labels: BTreeMap::new(), constants: Constants::None };
    let ty = parser.tensor_type()?;
    parser.cursor.space();
    if parser.cursor.rest().is_empty() { Ok(ty) } else { Err(parser.cursor.expected("the end")) }
}

/// Literals as a tensor; the error says what is wrong with which one.
pub(super) fn literal_tensor(
    dtype: DType,
    shape: &[usize],
    items: &[impl AsRef<str>],
) -> Result<Tensor, String> {
    if element_count(shape).ok() != Some(items.len()) {
        return Err(format!("{} elements for shape {shape:?}", items.len()));
    }
    let mut tensor = Tensor::zeros(dtype, shape).map_err(|e| e.to_string())?;
    let bytes = tensor.bytes_mut();
    for (i, item) in items.iter().enumerate() {
        let item = item.as_ref();
        let bad = || format!("`{}` is not a number of type {dtype}", item.escape_debug());
        if dtype.is_float() {
            from_f64(dtype, bytes, i, item.parse().map_err(|_| bad())?);
        } else if dtype == DType::Bool {
            from_i64(dtype, bytes, i, item.parse::<bool>().map_err(|_| bad())?.into());
        } else if dtype == DType::U64 {
            from_i64(dtype, bytes, i, item.parse::<u64>().map_err(|_| bad())? as i64);
        } else {
            let value: i64 = item.parse().map_err(|_| bad())?;
            from_i64(dtype, bytes, i, value);
            if tilewright_data::read_i64(dtype, bytes, i) != value {
                return Err(bad());
            }
        }
    }
    Ok(tensor)
}

/// One attribute's value as written.
enum Attr<'a> {
    Str(String),
    List(Vec<Piece<'a>>),
    Floats(Vec<Piece<'a>>),
    Scalar(Piece<'a>),
}

/// The attributes of one node; the getters take them out, what is left at the end is an error.
#[derive(Default)]
struct Attrs<'a> {
    keyed: Vec<(Piece<'a>, Attr<'a>)>,
    words: Vec<Piece<'a>>,
    strings: Vec<String>,
    lists: Vec<Vec<Piece<'a>>>,
    func: Option<Piece<'a>>,
}

/// One result on the left of `=`.
struct Head<'a> {
    label: Piece<'a>,
    name: String,
    ty: Option<TensorType>,
}

struct Parser<'a> {
    cursor: Cursor<'a>,
    graph: Graph,
    labels: BTreeMap<&'a str, ValueId>,
    constants: Constants<'a>,
}

impl<'a> Parser<'a> {
    fn graph(&mut self) -> Result<()> {
        self.cursor.space();
        self.cursor.need("graph")?;
        self.cursor.need("@")?;
        self.graph.name = if self.cursor.rest().starts_with('"') {
            self.cursor.string()?
        } else {
            self.cursor.word("the graph's name")?.text.to_string()
        };
        if self.cursor.eat("(") {
            self.symbols()?;
        }
        self.cursor.need("{")?;
        loop {
            self.cursor.space();
            if self.cursor.rest().starts_with('%') {
                self.statement()?;
            } else if self.cursor.eat("return") {
                self.outputs()?;
                break;
            } else {
                return Err(self.cursor.expected("`%value = ...` or `return`"));
            }
        }
        self.cursor.space();
        self.cursor.need("}")?;
        self.cursor.space();
        if self.cursor.rest().is_empty() { Ok(()) } else { Err(self.cursor.expected("the end")) }
    }

    fn symbols(&mut self) -> Result<()> {
        loop {
            let name = self.cursor.word("a symbol")?;
            let starts = name.text.starts_with(|c: char| c.is_alphabetic() || c == '_');
            if !starts || self.graph.symbols.iter().any(|s| &*s.name == name.text) {
                return Err(self.cursor.error_on(name, "not a new symbol's name"));
            }
            self.cursor.need("in")?;
            let range = self.cursor.scalar("a range like 1..4096")?;
            let bounds = range.text.split_once("..").and_then(|(min, max)| {
                let max = if max.is_empty() { Some(i64::MAX) } else { max.parse().ok() };
                Some(Range { min: min.parse().ok()?, max: max? })
            });
            let Some(bounds) = bounds.filter(|r| r.min <= r.max) else {
                return Err(self.cursor.error_on(range, "not a range like 1..4096"));
            };
            self.graph.symbols.push(Symbol { name: Arc::from(name.text), range: bounds });
            if self.cursor.eat(")") {
                return Ok(());
            }
            self.cursor.need(",")?;
        }
    }

    fn outputs(&mut self) -> Result<()> {
        self.cursor.blanks();
        while self.cursor.rest().starts_with('"') {
            let name = self.cursor.string()?;
            self.cursor.need(":")?;
            let value = self.operand()?;
            self.graph.outputs.push((name, value));
            if !self.cursor.eat(",") {
                break;
            }
            self.cursor.blanks();
        }
        Ok(())
    }

    fn operand(&mut self) -> Result<ValueId> {
        self.cursor.need("%")?;
        let label = self.cursor.word("a value")?;
        self.labels
            .get(label.text)
            .copied()
            .ok_or_else(|| self.cursor.error_on(label, format!("`%{}` is not defined", label.text)))
    }

    fn tensor_type(&mut self) -> Result<TensorType> {
        let dtype = self.cursor.word("a type")?;
        let dtype = self.cursor.parsed(dtype, "an element type")?;
        let dims: Result<Vec<Dim>> =
            self.cursor.list()?.into_iter().map(|p| self.declared_dim(p)).collect();
        Ok(TensorType::new(dtype, dims?))
    }

    /// A size whose symbols are declared.
    fn declared_dim(&self, piece: Piece<'_>) -> Result<Dim> {
        let dim = self.cursor.dim(piece)?;
        let mut unknown = None;
        dim.for_each_symbol(&mut |name| {
            if !self.graph.symbols.iter().any(|s| s.name == *name) {
                unknown = Some(name.clone());
            }
        });
        match unknown {
            None => Ok(dim),
            Some(name) => {
                Err(self.cursor.error_on(piece, format!("the symbol {name} is not declared")))
            }
        }
    }

    fn statement(&mut self) -> Result<()> {
        let mut heads: Vec<Head<'a>> = Vec::new();
        loop {
            self.cursor.need("%")?;
            let label = self.cursor.word("a value")?;
            let twice = heads.iter().any(|h| h.label.text == label.text);
            if twice || self.labels.contains_key(label.text) {
                return Err(self.cursor.error_on(label, "defined twice"));
            }
            self.cursor.blanks();
            let quoted = self.cursor.rest().starts_with('"');
            let name = if quoted { self.cursor.string()? } else { String::new() };
            let ty = if self.cursor.eat(":") { Some(self.tensor_type()?) } else { None };
            heads.push(Head { label, name, ty });
            if !self.cursor.eat(",") {
                break;
            }
            self.cursor.blanks();
        }
        self.cursor.need("=")?;
        let op = self.cursor.word("an operator")?;
        match op.text {
            "input" | "const" => {
                let [Head { label, name, ty }] = heads.as_slice() else {
                    return Err(self.cursor.error_on(op, "defines one value"));
                };
                let Some(ty) = ty.clone() else {
                    return Err(self.cursor.error_on(*label, "needs a type"));
                };
                let def = if op.text == "input" {
                    Def::Input(self.graph.inputs.len())
                } else {
                    Def::Const(self.constant(&ty)?)
                };
                let is_input = matches!(def, Def::Input(_));
                let id = self.graph.values.push(Value { name: name.clone(), ty, def });
                if is_input {
                    self.graph.inputs.push(id);
                }
                self.labels.insert(label.text, id);
                Ok(())
            }
            _ => self.node(heads, op),
        }
    }

    fn constant(&mut self, ty: &TensorType) -> Result<Tensor> {
        self.cursor.blanks();
        let start = self.cursor.at;
        let Some(shape) = ty.const_shape() else {
            return Err(self.cursor.error_at(start, 1, "a constant's shape is not symbolic"));
        };
        if self.cursor.eat("@") {
            let key = self.cursor.word("a constant's key")?;
            return self.large_constant(key, ty.dtype, &shape);
        }
        let items: Vec<&str> = if self.cursor.rest().starts_with('[') {
            self.cursor.list()?.into_iter().map(|p| p.text).collect()
        } else {
            vec![self.cursor.scalar("a number, a list or `@key`")?.text]
        };
        literal_tensor(ty.dtype, &shape, &items)
            .map_err(|e| self.cursor.error_at(start, self.cursor.at - start, e))
    }

    fn large_constant(&self, key: Piece<'_>, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let fail = |message: String| self.cursor.error_on(key, message);
        if let Constants::Zeros | Constants::Seeded(_) = self.constants
            && element_count(shape).map_or(true, |n| n > MADE_UP_ELEMENTS_MAX)
        {
            return Err(fail(format!("{shape:?} is too large to be made up")));
        }
        match self.constants {
            Constants::None => Err(fail("the data of this constant is not at hand".to_string())),
            Constants::Table(table) => {
                let tensor = table
                    .get(key.text)
                    .ok_or_else(|| fail(format!("there is no constant @{}", key.text)))?;
                if tensor.dtype() != dtype || tensor.shape() != shape {
                    return Err(fail(format!(
                        "the data of @{} is {}{:?}",
                        key.text,
                        tensor.dtype(),
                        tensor.shape()
                    )));
                }
                Ok(tensor.clone())
            }
            Constants::Zeros => Tensor::zeros(dtype, shape),
            Constants::Seeded(seed) => seeded(seed, key.text, dtype, shape),
        }
    }

    fn node(&mut self, heads: Vec<Head<'a>>, name: Piece<'a>) -> Result<()> {
        let mut attrs = self.attributes()?;
        let mut inputs = Vec::new();
        if self.cursor.rest().starts_with('%') {
            loop {
                inputs.push(self.operand()?);
                if !self.cursor.eat(",") {
                    break;
                }
                self.cursor.blanks();
            }
        }
        let end = self.cursor.at;
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.graph.ty(v).clone()).collect();
        let results: Vec<Option<TensorType>> = heads.iter().map(|h| h.ty.clone()).collect();
        let op = self.op(name, &mut attrs, &types, &results)?;
        self.nothing_left(&attrs, name)?;
        let here = |e: Error| {
            let about = Piece { text: "", at: name.at };
            let about = self.cursor.error_at(about.at, end - about.at, e.message());
            e.notes().iter().fold(about, |about, note| about.with_note(note.clone()))
        };
        let inferred = infer(&op, &types).map_err(here)?;
        if inferred.len() != heads.len() {
            let message = format!("{} has {} results", name.text, inferred.len());
            return Err(self.cursor.error_on(name, message));
        }
        for (head, ty) in heads.iter().zip(&inferred) {
            if head.ty.as_ref().is_some_and(|declared| declared != ty) {
                let message = format!("the type of `%{}` is {ty}", head.label.text);
                return Err(self.cursor.error_on(head.label, message));
            }
        }
        self.cursor.blanks();
        let mut origin = String::new();
        if self.cursor.eat("#") {
            self.cursor.blanks();
            origin = if self.cursor.rest().starts_with('"') {
                self.cursor.string()?
            } else {
                self.cursor.take_while(|c| c != '\n').text.trim_end().to_string()
            };
        }
        let id = self.graph.add_node(op, inputs, inferred, origin);
        self.graph.order.push(id);
        for (head, v) in heads.into_iter().zip(self.graph.nodes[id].outputs.clone()) {
            self.graph.values[v].name = head.name;
            self.labels.insert(head.label.text, v);
        }
        self.cursor.blanks();
        if !self.cursor.rest().is_empty() && !self.cursor.rest().starts_with(['\n', '\r']) {
            return Err(self.cursor.expected("the end of the line"));
        }
        Ok(())
    }

    /// Everything up to the first operand or the end of the line.
    fn attributes(&mut self) -> Result<Attrs<'a>> {
        let mut attrs = Attrs::default();
        loop {
            self.cursor.blanks();
            match self.cursor.rest().chars().next() {
                None | Some('%' | '\n' | '\r' | '#') => return Ok(attrs),
                Some('{') => attrs.func = Some(self.cursor.braces()?),
                Some('[') => attrs.lists.push(self.cursor.list()?),
                Some('"') => attrs.strings.push(self.cursor.string()?),
                Some(_) => {
                    let word = self.cursor.word("an attribute or an operand")?;
                    if !self.cursor.rest().starts_with('=') {
                        attrs.words.push(word);
                        continue;
                    }
                    self.cursor.at += 1;
                    let value = match self.cursor.rest().as_bytes().first() {
                        Some(b'"') => Attr::Str(self.cursor.string()?),
                        Some(b'[') => Attr::List(self.cursor.list()?),
                        Some(b'f') if self.cursor.rest().starts_with("f[") => {
                            self.cursor.at += 1;
                            Attr::Floats(self.cursor.list()?)
                        }
                        _ => Attr::Scalar(self.cursor.scalar("a value")?),
                    };
                    attrs.keyed.push((word, value));
                }
            }
        }
    }

    fn nothing_left(&self, attrs: &Attrs<'_>, name: Piece<'_>) -> Result<()> {
        let unknown = attrs.keyed.iter().map(|(k, _)| *k).chain(attrs.words.iter().copied()).next();
        if let Some(unknown) = unknown {
            let message = format!("`{}` has no attribute `{}`", name.text, unknown.text);
            return Err(self.cursor.error_on(unknown, message));
        }
        if !attrs.strings.is_empty() || !attrs.lists.is_empty() || attrs.func.is_some() {
            let message = format!("`{}` has too many attributes", name.text);
            return Err(self.cursor.error_on(name, message));
        }
        Ok(())
    }

    fn keyed(&self, attrs: &mut Attrs<'a>, name: Piece<'a>, key: &str) -> Result<Attr<'a>> {
        match attrs.keyed.iter().position(|(k, _)| k.text == key) {
            Some(i) => Ok(attrs.keyed.remove(i).1),
            None => Err(self.cursor.error_on(name, format!("`{}` needs `{key}=`", name.text))),
        }
    }

    fn scalar<T: std::str::FromStr>(
        &self,
        attrs: &mut Attrs<'a>,
        name: Piece<'a>,
        key: &str,
    ) -> Result<T> {
        match self.keyed(attrs, name, key)? {
            Attr::Scalar(piece) => self.cursor.parsed(piece, &format!("a value for `{key}`")),
            _ => Err(self.cursor.error_on(name, format!("`{key}` takes one value"))),
        }
    }

    fn pieces(&self, attrs: &mut Attrs<'a>, name: Piece<'a>, key: &str) -> Result<Vec<Piece<'a>>> {
        match self.keyed(attrs, name, key)? {
            Attr::List(items) => Ok(items),
            _ => Err(self.cursor.error_on(name, format!("`{key}` takes a list"))),
        }
    }

    fn numbers<T: std::str::FromStr>(
        &self,
        attrs: &mut Attrs<'a>,
        name: Piece<'a>,
        key: &str,
    ) -> Result<Vec<T>> {
        let pieces = self.pieces(attrs, name, key)?;
        pieces.into_iter().map(|p| self.cursor.parsed(p, "a whole number")).collect()
    }

    fn dims(&self, attrs: &mut Attrs<'a>, name: Piece<'a>, key: &str) -> Result<Vec<Dim>> {
        let pieces = self.pieces(attrs, name, key)?;
        pieces.into_iter().map(|p| self.declared_dim(p)).collect()
    }

    /// The one list without a key.
    fn list(&self, attrs: &mut Attrs<'a>, name: Piece<'a>) -> Result<Vec<Piece<'a>>> {
        attrs
            .lists
            .pop()
            .ok_or_else(|| self.cursor.error_on(name, format!("`{}` needs a list", name.text)))
    }

    fn eps(&self, attrs: &mut Attrs<'a>, name: Piece<'a>) -> Result<u64> {
        Ok(self.scalar::<f64>(attrs, name, "eps")?.to_bits())
    }

    /// Removes a bare word; whether it was there.
    fn flag(attrs: &mut Attrs<'a>, word: &str) -> bool {
        let at = attrs.words.iter().position(|w| w.text == word);
        at.map(|i| attrs.words.remove(i)).is_some()
    }

    /// The bare word that names one of `kinds`.
    fn kind<T: Copy>(
        &self,
        attrs: &mut Attrs<'a>,
        name: Piece<'a>,
        kinds: &[T],
        name_of: fn(T) -> &'static str,
    ) -> Result<T> {
        for &kind in kinds {
            if Self::flag(attrs, name_of(kind)) {
                return Ok(kind);
            }
        }
        let all: Vec<&str> = kinds.iter().map(|&k| name_of(k)).collect();
        let message = format!("`{}` needs one of {}", name.text, all.join(", "));
        Err(self.cursor.error_on(name, message))
    }

    fn reduce_kind(&self, attrs: &mut Attrs<'a>, name: Piece<'a>) -> Result<ReduceKind> {
        use ReduceKind::{Max, Min, Prod, Sum};
        self.kind(attrs, name, &[Sum, Prod, Max, Min], reduce_name)
    }

    fn scatter_kind(&self, attrs: &mut Attrs<'a>, name: Piece<'a>) -> Result<ScatterKind> {
        use ScatterKind::{Add, Max, Min, Mul, Set};
        self.kind(attrs, name, &[Set, Add, Mul, Max, Min], scatter_name)
    }

    fn func(&self, attrs: &mut Attrs<'a>, name: Piece<'a>, types: &[DType]) -> Result<Func> {
        let text = attrs.func.take().ok_or_else(|| {
            self.cursor.error_on(name, format!("`{}` needs a function in braces", name.text))
        })?;
        Func::parse(text.text, types).map_err(|e| {
            // The function's own span counts from its brace.
            let (start, len) =
                e.span().map_or((text.at, text.text.len()), |s| (text.at + s.start, s.len));
            self.cursor.error_at(start, len, e.message())
        })
    }

    /// The operator called `name`.
    fn op(
        &self,
        name: Piece<'a>,
        attrs: &mut Attrs<'a>,
        operands: &[TensorType],
        results: &[Option<TensorType>],
    ) -> Result<Op> {
        let declared = || -> Result<TensorType> {
            results.first().cloned().flatten().ok_or_else(|| {
                self.cursor.error_on(name, format!("`{}` needs a result type", name.text))
            })
        };
        let shape = |attrs: &mut Attrs<'a>| -> Result<Vec<Dim>> {
            self.list(attrs, name)?.into_iter().map(|p| self.declared_dim(p)).collect()
        };
        Ok(match name.text {
            "map" => {
                let types: Vec<DType> = operands.iter().map(|t| t.dtype).collect();
                Op::Map(self.func(attrs, name, &types)?)
            }
            "reshape" => Op::Reshape(shape(attrs)?),
            "permute" => Op::Permute(
                self.list(attrs, name)?
                    .into_iter()
                    .map(|p| self.cursor.parsed(p, "an axis"))
                    .collect::<Result<_>>()?,
            ),
            "expand" => Op::Expand(shape(attrs)?),
            "slice" => Op::Slice {
                starts: self.dims(attrs, name, "starts")?,
                lens: self.dims(attrs, name, "lens")?,
                steps: self.numbers(attrs, name, "steps")?,
            },
            "pad" => Op::Pad {
                lo: self.dims(attrs, name, "lo")?,
                hi: self.dims(attrs, name, "hi")?,
                mode: self.pad_mode(attrs, name)?,
            },
            "concat" => Op::Concat(self.scalar(attrs, name, "axis")?),
            "iota" => Op::Iota { ty: declared()?, axis: self.scalar(attrs, name, "axis")? },
            "dims" => Op::Dims(shape(attrs)?),
            "reduce" => Op::Reduce {
                kind: self.reduce_kind(attrs, name)?,
                axes: self.numbers(attrs, name, "axes")?,
                keep: Self::flag(attrs, "keep"),
            },
            "arg_reduce" => Op::ArgReduce {
                kind: self.reduce_kind(attrs, name)?,
                axis: self.scalar(attrs, name, "axis")?,
                keep: Self::flag(attrs, "keep"),
                last: Self::flag(attrs, "last"),
            },
            "scan" => Op::Scan {
                kind: self.reduce_kind(attrs, name)?,
                axis: self.scalar(attrs, name, "axis")?,
                exclusive: Self::flag(attrs, "exclusive"),
                reverse: Self::flag(attrs, "reverse"),
            },
            "contract" => self.contract(attrs, name, operands, results)?,
            "group_product" => Op::GroupProduct { group: self.scalar(attrs, name, "group")? },
            "conv" => Op::Conv(ConvAttrs {
                strides: self.numbers(attrs, name, "strides")?,
                pads_lo: self.numbers(attrs, name, "pads_lo")?,
                pads_hi: self.numbers(attrs, name, "pads_hi")?,
                dilations: self.numbers(attrs, name, "dilations")?,
                groups: self.scalar(attrs, name, "groups")?,
            }),
            "window" => {
                use WindowKind::{Max, Mean, MeanWithPad, Sum};
                Op::Window(WindowAttrs {
                    kind: self.kind(attrs, name, &[Max, Sum, Mean, MeanWithPad], window_name)?,
                    kernel: self.numbers(attrs, name, "kernel")?,
                    strides: self.numbers(attrs, name, "strides")?,
                    pads_lo: self.numbers(attrs, name, "pads_lo")?,
                    pads_hi: self.numbers(attrs, name, "pads_hi")?,
                    dilations: self.numbers(attrs, name, "dilations")?,
                })
            }
            "attention" => {
                let mut types: Vec<DType> = vec![self.scalar_dtype(attrs, name, "score")?];
                types.extend(operands.iter().skip(3).map(|t| t.dtype));
                Op::Attention(AttentionAttrs {
                    score: self.func(attrs, name, &types)?,
                    causal: Self::flag(attrs, "causal"),
                    zeros: Self::flag(attrs, "zeros"),
                })
            }
            "gather" => Op::Gather(self.scalar(attrs, name, "axis")?),
            "gather_elements" => Op::GatherElements(self.scalar(attrs, name, "axis")?),
            "gather_nd" => Op::GatherNd { batch: self.scalar(attrs, name, "batch")? },
            "scatter_elements" => Op::ScatterElements {
                axis: self.scalar(attrs, name, "axis")?,
                kind: self.scatter_kind(attrs, name)?,
            },
            "scatter_nd" => Op::ScatterNd { kind: self.scatter_kind(attrs, name)? },
            "top_k" => {
                let mut k = self.dims(attrs, name, "k")?;
                let (Some(k), true) = (k.pop(), k.is_empty()) else {
                    return Err(self.cursor.error_on(name, "`k` is one size: `k=[5]`"));
                };
                let axis = self.scalar(attrs, name, "axis")?;
                Op::TopK { axis, k, largest: Self::flag(attrs, "largest") }
            }
            "random" => Op::Random { ty: declared()?, seed: self.scalar(attrs, name, "seed")? },
            "softmax" => Op::Softmax {
                axis: self.scalar(attrs, name, "axis")?,
                log: Self::flag(attrs, "log"),
            },
            "layer_norm" => Op::LayerNorm {
                axis: self.scalar(attrs, name, "axis")?,
                eps: self.eps(attrs, name)?,
            },
            "rms_norm" => {
                Op::RmsNorm { axis: self.scalar(attrs, name, "axis")?, eps: self.eps(attrs, name)? }
            }
            "batch_norm" => Op::BatchNorm { eps: self.eps(attrs, name)? },
            "group_norm" => Op::GroupNorm {
                groups: self.scalar(attrs, name, "groups")?,
                eps: self.eps(attrs, name)?,
            },
            "host" => self.host(attrs, name, results)?,
            other => {
                let message = format!("there is no operator `{}`", other.escape_debug());
                return Err(self.cursor.error_on(name, message));
            }
        })
    }

    fn scalar_dtype(&self, attrs: &mut Attrs<'a>, name: Piece<'a>, key: &str) -> Result<DType> {
        match self.keyed(attrs, name, key)? {
            Attr::Scalar(piece) => self.cursor.parsed(piece, "an element type"),
            _ => Err(self.cursor.error_on(name, format!("`{key}` takes an element type"))),
        }
    }

    fn pad_mode(&self, attrs: &mut Attrs<'a>, name: Piece<'a>) -> Result<PadMode> {
        for (word, mode) in
            [("edge", PadMode::Edge), ("reflect", PadMode::Reflect), ("wrap", PadMode::Wrap)]
        {
            if Self::flag(attrs, word) {
                return Ok(mode);
            }
        }
        let text: String = self.scalar(attrs, name, "constant")?;
        let value = match text.parse::<i64>() {
            Ok(value) => Some(tilewright_expr::Value::Int(value)),
            Err(_) => text.parse().ok().map(tilewright_expr::Value::Float),
        };
        value
            .map(PadMode::Constant)
            .ok_or_else(|| self.cursor.error_on(name, "`constant` takes a number"))
    }

    fn contract(
        &self,
        attrs: &mut Attrs<'a>,
        name: Piece<'a>,
        operands: &[TensorType],
        results: &[Option<TensorType>],
    ) -> Result<Op> {
        let spec = attrs.strings.pop().unwrap_or_default();
        let split = spec
            .split_once("->")
            .and_then(|(ins, out)| ins.split_once(',').map(|(lhs, rhs)| [lhs, rhs, out]));
        let Some(parts) = split.filter(|p| p.concat().chars().all(char::is_alphabetic)) else {
            let message = "`contract` needs letters like \"mk,kn->mn\"";
            return Err(self.cursor.error_on(name, message));
        };
        let [lhs, rhs, out] = parts.map(str::to_string);
        let acc = self.scalar_dtype(attrs, name, "acc")?;
        let declared = results.first().cloned().flatten().map(|t| t.dtype);
        let dtype = declared.or_else(|| operands.first().map(|t| t.dtype)).unwrap_or(acc);
        Ok(Op::Contract { lhs, rhs, out, acc, dtype })
    }

    fn host(
        &self,
        attrs: &mut Attrs<'a>,
        name: Piece<'a>,
        results: &[Option<TensorType>],
    ) -> Result<Op> {
        let Some(host_name) = attrs.strings.pop() else {
            return Err(self.cursor.error_on(name, "`host` needs the operator's name in quotes"));
        };
        let types: Option<Vec<TensorType>> = results.iter().cloned().collect();
        let Some(types) = types else {
            return Err(self.cursor.error_on(name, "`host` needs its result types"));
        };
        let mut named = Vec::new();
        for (key, value) in std::mem::take(&mut attrs.keyed) {
            let whole = |p: Piece<'_>| self.cursor.parsed::<i64>(p, "a whole number");
            let real = |p: Piece<'_>| self.cursor.parsed::<f64>(p, "a number");
            let value = match value {
                Attr::Str(text) => HostAttr::Str(text),
                Attr::List(items) => {
                    HostAttr::Ints(items.into_iter().map(whole).collect::<Result<_>>()?)
                }
                Attr::Floats(items) => {
                    HostAttr::Floats(items.into_iter().map(real).collect::<Result<_>>()?)
                }
                Attr::Scalar(piece) => match piece.text.parse() {
                    Ok(value) => HostAttr::Int(value),
                    Err(_) => HostAttr::Float(real(piece)?),
                },
            };
            named.push((key.text.to_string(), value));
        }
        Ok(Op::Host(HostOp { name: host_name, attrs: named, types }))
    }
}

/// Made-up data: SplitMix64 over the seed, the key and the position.
fn seeded(seed: u64, key: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let mut state = key.bytes().fold(mix(seed), |s, b| mix(s ^ u64::from(b)));
    let mut tensor = Tensor::zeros(dtype, shape)?;
    let n = tensor.len();
    let bytes = tensor.bytes_mut();
    for i in 0..n {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = mix(state);
        if dtype.is_float() {
            from_f64(dtype, bytes, i, (word >> 40) as f64 / f64::from(1 << 23) - 1.0);
        } else {
            from_i64(dtype, bytes, i, (word >> 61) as i64);
        }
    }
    Ok(tensor)
}
