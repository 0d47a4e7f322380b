//! From the syntax tree to the typed [`Func`]: names, types, and the expansion of functions.
//!
//! Types go by one rule: **a number takes the type of what it stands beside**. So every node is
//! either *typed* (it has a place in the DAG) or *pending* (built of numbers alone). A typed
//! operand settles its pending neighbours; what is pending to the end takes the default type, or
//! is an error where there is none (in `{ x -> ... }`). There are no other implicit conversions.
//!
//! Functions are expanded where they are called, once per distinct list of arguments, so they work
//! on every type that their body accepts; they see their parameters and constants, nothing else,
//! and cannot call themselves. A node that is *bad* had an error already and causes no second one.

use crate::ast::{AstId, AstKind, Block, Number, Program};
use crate::ir::{ExprId, Func, FuncBuilder, Node, Value};
use crate::lex::{Source, Span, TokenKind};
use crate::op::Op;
use crate::parse::{self, Form};
use crate::prelude::prelude;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};

/// Calls inside calls.
const CALL_DEPTH_MAX: usize = 64;
/// Syntax nodes visited, over all expansions of functions.
const WORK_MAX: usize = 2_000_000;

/// Named constants. More digits than any type holds: each rounds them once.
const CONSTANTS: [(&str, &str); 3] = [
    ("pi", "3.14159265358979323846264338327950288"),
    ("tau", "6.28318530717958647692528676655900577"),
    ("e", "2.71828182845904523536028747135266250"),
];

/// How to read an expression of the user.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// What error messages call the text.
    pub name: String,
    /// Type of variables that `types` does not list, and of numbers that stand alone.
    pub default: DType,
    /// Types of single variables.
    pub types: BTreeMap<String, DType>,
}

impl Default for CompileOptions {
    fn default() -> Self {
        CompileOptions { name: "<expression>".into(), default: DType::F64, types: BTreeMap::new() }
    }
}

/// A checked text: the tree with a type for each node, and the function it means.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The function; its parameters are the free variables in order of first use.
    pub func: Func,
    program: Program,
    types: Vec<Option<DType>>,
}

impl Compiled {
    /// The syntax tree.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Type of a node of the body.
    pub fn type_of(&self, id: AstId) -> Option<DType> {
        self.types.get(id.index()).copied().flatten()
    }

    /// The typed tree as text.
    pub fn tree(&self) -> String {
        self.program.tree_with(&|id| self.type_of(id))
    }
}

/// The tokens of a text, one per line: place, kind, spelling.
pub fn list_tokens(text: &str, options: &CompileOptions) -> Result<String> {
    let (tokens, errors) = crate::lex::tokens(&Source::new(&options.name, text));
    if !errors.is_empty() {
        return Err(merge(errors));
    }
    let mut out = String::new();
    for token in tokens.iter().filter(|t| t.kind != TokenKind::End) {
        let Span { start, end } = token.span;
        let place = format!("{start}..{end}");
        let kind = token.kind.to_string();
        out += &format!("{place:<7} {kind:<10} {}\n", &text[start..end]);
    }
    Ok(out)
}

/// Parses a text without looking at names and types; for showing the tree.
pub fn parse_program(text: &str, options: &CompileOptions) -> Result<Program> {
    parse::parse(&Source::new(&options.name, text), Form::Program).map_err(merge)
}

/// Compiles an expression of the user: definitions, `let`s, and the expression.
///
/// ```
/// use tilewright_expr::{CompileOptions, compile};
/// let c = compile("half(x) = x / 2; half(a) + b * half(a)", &CompileOptions::default()).unwrap();
/// assert_eq!(c.func.to_string(), "{ a, b -> let t0 = a / 2.0; t0 + b * t0 }");
/// assert_eq!(c.func.eval_f64(&[4.0, 3.0]), 8.0);
/// ```
pub fn compile(text: &str, options: &CompileOptions) -> Result<Compiled> {
    let program = parse_program(text, options)?;
    let Some(body) = &program.body else {
        return Err(Error::bug("a program without a body passed the parser"));
    };
    let mut checker = Checker::new(&program, Some(options.default));
    checker.open = Some(&options.types);
    let mut types = Vec::new();
    let result = checker.run(body, &mut types);
    let func = checker.finish(result)?;
    Ok(Compiled { func, program, types })
}

impl Func {
    /// Reads the text form `{ a, b -> a * b + 1.0 }` with the parameters' types from the context.
    /// It is the language of [`compile`] (with its prelude, without definitions); a number must
    /// have something typed beside it, or be written as `f32(2)`.
    pub fn parse(text: &str, types: &[DType]) -> Result<Func> {
        let source = Source::new("<function>", text);
        let program = parse::parse(&source, Form::Closed).map_err(merge)?;
        let (Some(params), Some(body)) = (&program.params, &program.body) else {
            return Err(Error::bug("a closed function without parameters passed the parser"));
        };
        if params.len() != types.len() {
            let message =
                format!("the function has {} parameters, {} are given", params.len(), types.len());
            return Err(source.error(Span { start: 0, end: 1 }, message, "in this function"));
        }
        let mut checker = Checker::new(&program, None);
        for (param, dtype) in params.iter().zip(types) {
            let id = checker.builder.param(&param.name, *dtype);
            checker.closed.push((param.name.clone(), id));
        }
        let result = checker.run(body, &mut Vec::new());
        checker.finish(result)
    }
}

/// Many errors as one: the first, with the others as notes.
fn merge(errors: Vec<Error>) -> Error {
    let mut unique: Vec<Error> = Vec::new();
    for error in errors {
        let same =
            |other: &Error| other.message() == error.message() && other.span() == error.span();
        if !unique.iter().any(same) {
            unique.push(error);
        }
        if unique.len() == 20 {
            break;
        }
    }
    let mut errors = unique.into_iter();
    let Some(first) = errors.next() else { return Error::bug("failed without an error") };
    errors.fold(first, |merged, e| merged.with_note(format!("{e:?}")))
}

/// What is known about a node.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Val {
    Typed(ExprId),
    Pending,
    Bad,
}

impl From<Option<ExprId>> for Val {
    fn from(id: Option<ExprId>) -> Val {
        id.map_or(Val::Bad, Val::Typed)
    }
}

#[derive(Clone, Copy)]
enum Local {
    Value(ExprId),
    Let(AstId),
}

/// A block under evaluation.
struct Frame<'a> {
    program: &'a Program,
    top: bool,
    base: usize,
    vals: Vec<Val>,
    /// By name, in order: the first node that sees a meaning, and the meaning.
    scope: BTreeMap<Arc<str>, Vec<(AstId, Local)>>,
    settled_lets: HashMap<(AstId, DType), Option<ExprId>>,
}

impl<'a> Frame<'a> {
    fn new(program: &'a Program, block: &Block, top: bool) -> Frame<'a> {
        let base = block.first.index();
        let vals = vec![Val::Bad; block.result.index() + 1 - base];
        Frame { program, top, base, vals, scope: BTreeMap::new(), settled_lets: HashMap::new() }
    }

    fn val(&self, id: AstId) -> Val {
        self.vals[id.index() - self.base]
    }

    fn set(&mut self, id: AstId, val: Val) {
        self.vals[id.index() - self.base] = val;
    }

    fn bind(&mut self, name: &Arc<str>, from: AstId, meaning: Local) {
        self.scope.entry(name.clone()).or_default().push((from, meaning));
    }

    fn local(&self, name: &str, user: AstId) -> Option<Local> {
        let meanings = self.scope.get(name)?;
        meanings.iter().rev().find(|(from, _)| *from <= user).map(|m| m.1)
    }
}

/// The nodes of a subtree, operands first.
fn subtree(program: &Program, root: AstId) -> impl Iterator<Item = AstId> + use<> {
    (program.node(root).first.0..=root.0).map(AstId)
}

/// A function: whether it is of the prelude, and its number there.
type FunctionKey = (bool, usize);

struct Checker<'a> {
    builder: FuncBuilder,
    errors: Vec<Error>,
    program: &'a Program,
    default: Option<DType>,
    /// Types of free variables, when there may be any.
    open: Option<&'a BTreeMap<String, DType>>,
    free: BTreeMap<Arc<str>, ExprId>,
    closed: Vec<(Arc<str>, ExprId)>,
    calls: Vec<FunctionKey>,
    memo: HashMap<(FunctionKey, Vec<ExprId>, Option<DType>), Option<ExprId>>,
    depth: usize,
    work: usize,
}

impl<'a> Checker<'a> {
    fn new(program: &'a Program, default: Option<DType>) -> Checker<'a> {
        Checker {
            builder: FuncBuilder::new(),
            errors: Vec::new(),
            program,
            default,
            open: None,
            free: BTreeMap::new(),
            closed: Vec::new(),
            calls: Vec::new(),
            memo: HashMap::new(),
            depth: 0,
            work: 0,
        }
    }

    fn run(&mut self, body: &Block, types: &mut Vec<Option<DType>>) -> Option<ExprId> {
        self.check_definitions();
        let mut frame = Frame::new(self.program, body, true);
        for (name, id) in &self.closed {
            frame.bind(name, AstId(0), Local::Value(*id));
        }
        let result = self.block(&mut frame, body, None);
        types.resize(frame.base, None);
        types.extend(frame.vals.iter().map(|v| match v {
            Val::Typed(id) => Some(self.builder.dtype_of(*id)),
            _ => None,
        }));
        result
    }

    fn finish(self, result: Option<ExprId>) -> Result<Func> {
        match result {
            Some(result) if self.errors.is_empty() => Ok(self.builder.finish(result)),
            _ => Err(merge(self.errors)),
        }
    }

    fn error(&mut self, frame: &Frame<'_>, span: Span, message: String, label: &str, hint: &str) {
        let error = frame.program.source.error(span, message, label);
        self.errors.push(if hint.is_empty() { error } else { error.with_hint(hint) });
    }

    /// Names in all function definitions, called or not, and definitions that clash.
    fn check_definitions(&mut self) {
        let program = self.program;
        let mut seen: Vec<&str> = Vec::new();
        for function in &program.functions {
            let name: &str = &function.name.name;
            let clash = if Op::from_name(name).is_some()
                || name == "where"
                || name.parse::<DType>().is_ok()
            {
                Some(format!("`{name}` is built in"))
            } else if seen.contains(&name) {
                Some(format!("`{name}` is defined twice"))
            } else {
                None
            };
            if let Some(message) = clash {
                let span = function.name.span;
                self.errors.push(program.source.error(span, message, "choose another name"));
            }
            seen.push(name);
            let mut frame = Frame::new(program, &function.body, false);
            for p in &function.params {
                frame.bind(&p.name, AstId(0), Local::Let(AstId(0)));
            }
            for (binder, root) in &function.body.lets {
                frame.bind(&binder.name, AstId(root.0 + 1), Local::Let(*root));
            }
            for id in (function.body.first.0..=function.body.result.0).map(AstId) {
                let node = program.node(id);
                match &node.kind {
                    AstKind::Name(n) if frame.local(n, id).is_none() && constant(n).is_none() => {
                        let known = frame.scope.keys().map(|name| &**name);
                        let hint = did_you_mean(n, known.chain(CONSTANTS.iter().map(|c| c.0)));
                        let message = format!("`{n}` is not known in `{name}`");
                        let hint = hint.unwrap_or_else(|| {
                            "a function sees its own parameters only: pass the value".to_string()
                        });
                        self.error(&frame, node.span, message, "unknown name", &hint);
                    }
                    AstKind::Call { name, name_span, .. } => {
                        self.known_call(&frame, name, *name_span);
                    }
                    _ => {}
                }
            }
        }
    }

    fn find_function(&self, frame: &Frame<'_>, name: &str) -> Option<FunctionKey> {
        let position = |p: &Program| p.functions.iter().position(|f| *f.name.name == *name);
        let of_user = std::ptr::eq(frame.program, self.program);
        let user = if of_user { position(self.program).map(|i| (false, i)) } else { None };
        user.or_else(|| position(prelude()).map(|i| (true, i)))
    }

    /// Reports a call of something that does not exist.
    fn known_call(&mut self, frame: &Frame<'_>, name: &str, span: Span) -> bool {
        if Op::from_name(name).is_some()
            || name == "where"
            || name.parse::<DType>().is_ok()
            || self.find_function(frame, name).is_some()
        {
            return true;
        }
        let message = format!("there is no function `{name}`");
        let mut names: Vec<&str> = Vec::new();
        for program in [self.program, prelude()] {
            names.extend(program.functions.iter().map(|f| &*f.name.name));
        }
        names.extend(Op::all().map(|op| -> &str { op.name() }));
        names.push("where");
        let hint = did_you_mean(name, names.into_iter()).unwrap_or_default();
        self.error(frame, span, message, "unknown function", &hint);
        false
    }

    // Blocks.

    fn block(
        &mut self,
        frame: &mut Frame<'_>,
        block: &Block,
        want: Option<DType>,
    ) -> Option<ExprId> {
        for (binder, root) in &block.lets {
            self.tree(frame, *root);
            frame.bind(&binder.name, AstId(root.0 + 1), Local::Let(*root));
        }
        self.tree(frame, block.result);
        self.settle(frame, block.result, want.or(self.default))
    }

    fn tree(&mut self, frame: &mut Frame<'_>, root: AstId) {
        for id in subtree(frame.program, root) {
            self.work += 1;
            if self.work > WORK_MAX {
                if self.work == WORK_MAX + 1 {
                    let span = frame.program.node(root).span;
                    let message = "the functions expand to too many operations".to_string();
                    self.error(frame, span, message, "gave up here", "");
                }
                frame.set(root, Val::Bad);
                return;
            }
            let val = self.visit(frame, id);
            frame.set(id, val);
        }
    }

    /// Gives a pending node and its operands a type.
    fn settle(&mut self, frame: &mut Frame<'_>, id: AstId, want: Option<DType>) -> Option<ExprId> {
        match frame.val(id) {
            Val::Typed(e) => return Some(e),
            Val::Bad => return None,
            Val::Pending => {}
        }
        let span = frame.program.node(id).span;
        let Some(dtype) = want else {
            let message = "the type of this number is not known".to_string();
            self.error(frame, span, message, "no type beside it", "write it as `f32(1)`");
            frame.set(id, Val::Bad);
            return None;
        };
        if self.depth == CALL_DEPTH_MAX {
            let message = format!("more than {CALL_DEPTH_MAX} definitions inside each other");
            self.error(frame, span, message, "too deep", "");
            frame.set(id, Val::Bad);
            return None;
        }
        self.depth += 1;
        for j in subtree(frame.program, id) {
            if frame.val(j) == Val::Pending {
                let val = self.force(frame, j, dtype).into();
                frame.set(j, val);
            }
        }
        self.depth -= 1;
        match frame.val(id) {
            Val::Typed(e) => Some(e),
            _ => None,
        }
    }

    /// The value of a pending node as `dtype`; its operands are settled.
    fn force(&mut self, frame: &mut Frame<'_>, id: AstId, dtype: DType) -> Option<ExprId> {
        let program = frame.program;
        let node = program.node(id);
        let args = program.children(id);
        match &node.kind {
            AstKind::Number(n) => self.literal(frame, node.span, n, dtype),
            AstKind::Bool(b) => Some(self.builder.constant_int((*b).into(), DType::Bool)),
            AstKind::Name(name) => match frame.local(name, id) {
                Some(Local::Value(e)) => Some(e),
                // Used with several types, the `let` keeps its own state.
                Some(Local::Let(root)) => {
                    if let Some(known) = frame.settled_lets.get(&(root, dtype)) {
                        return *known;
                    }
                    let from = program.node(root).first.index() - frame.base;
                    let range = from..root.index() + 1 - frame.base;
                    let saved = frame.vals[range.clone()].to_vec();
                    let result = self.settle(frame, root, Some(dtype));
                    frame.vals[range].copy_from_slice(&saved);
                    frame.settled_lets.insert((root, dtype), result);
                    result
                }
                None => {
                    let text = constant(name)?.into();
                    self.literal(frame, node.span, &Number { text, negative: false }, dtype)
                }
            },
            AstKind::Unary(op, _) => self.build(frame, id, *op, args, false),
            AstKind::Binary { op, logical, .. } => self.build(frame, id, *op, args, *logical),
            AstKind::Conditional(_) => self.build(frame, id, Op::Select, args, false),
            AstKind::Call { name, name_span, .. } => match Op::from_name(name) {
                Some(op) => self.build(frame, id, op, args, false),
                None => {
                    let key = self.find_function(frame, name)?;
                    let values = self.typed(frame, args)?;
                    self.call(frame, key, *name_span, values, Some(dtype))
                }
            },
        }
    }

    fn typed(&self, frame: &Frame<'_>, args: &[AstId]) -> Option<Vec<ExprId>> {
        args.iter()
            .map(|a| match frame.val(*a) {
                Val::Typed(e) => Some(e),
                _ => None,
            })
            .collect()
    }

    // Nodes.

    fn visit(&mut self, frame: &mut Frame<'_>, id: AstId) -> Val {
        let program = frame.program;
        let node = program.node(id);
        let args = program.children(id);
        if args.iter().any(|a| frame.val(*a) == Val::Bad) {
            return Val::Bad;
        }
        match &node.kind {
            AstKind::Number(_) => Val::Pending,
            AstKind::Bool(b) => Val::Typed(self.builder.constant_int((*b).into(), DType::Bool)),
            AstKind::Name(name) => self.name(frame, id, name, node.span),
            AstKind::Unary(op, _) => self.operation(frame, id, *op, args, false),
            AstKind::Binary { op, logical, .. } => self.operation(frame, id, *op, args, *logical),
            AstKind::Conditional(_) => self.operation(frame, id, Op::Select, args, false),
            AstKind::Call { name, name_span, .. } => {
                if let Ok(to) = name.parse::<DType>() {
                    return self.conversion(frame, id, to, args).into();
                }
                if name.as_ref() == "where" {
                    return self.wrong_count(frame, id, "where", 3, args.len());
                }
                if let Some(op) = Op::from_name(name) {
                    if op == Op::Cast {
                        let message = "`cast` needs a type".to_string();
                        self.error(frame, node.span, message, "", "write `f32(x)`");
                        return Val::Bad;
                    }
                    if op.arity() != args.len() {
                        return self.wrong_count(frame, id, name, op.arity(), args.len());
                    }
                    return self.operation(frame, id, op, args, false);
                }
                let Some(key) = self.find_function(frame, name) else {
                    if frame.top {
                        self.known_call(frame, name, *name_span);
                    }
                    return Val::Bad;
                };
                let count = self.function(key).params.len();
                if count != args.len() {
                    return self.wrong_count(frame, id, name, count, args.len());
                }
                let kinds = args.iter().filter_map(|a| match frame.val(*a) {
                    Val::Typed(e) => Some(self.builder.dtype_of(e)),
                    _ => None,
                });
                let number = kinds.clone().find(|d| *d != DType::Bool);
                if number.is_none() && (args.is_empty() || kinds.count() < args.len()) {
                    return Val::Pending;
                }
                for a in args {
                    self.settle(frame, *a, number);
                }
                let Some(values) = self.typed(frame, args) else { return Val::Bad };
                self.call(frame, key, *name_span, values, number).into()
            }
        }
    }

    fn wrong_count(
        &mut self,
        frame: &Frame<'_>,
        id: AstId,
        name: &str,
        want: usize,
        got: usize,
    ) -> Val {
        let plural = if want == 1 { "" } else { "s" };
        let message = format!("`{name}` takes {want} argument{plural}, not {got}");
        self.error(frame, frame.program.node(id).span, message, &format!("{got} given"), "");
        Val::Bad
    }

    fn name(&mut self, frame: &Frame<'_>, id: AstId, name: &Arc<str>, span: Span) -> Val {
        match frame.local(name, id) {
            Some(Local::Value(e)) => return Val::Typed(e),
            Some(Local::Let(root)) => return frame.val(root),
            None => {}
        }
        let open = if frame.top { self.open } else { None };
        let given = open.and_then(|types| types.get(&**name)).copied();
        if given.is_none() && constant(name).is_some() {
            return Val::Pending;
        }
        if let Some(id) = self.free.get(name).filter(|_| frame.top) {
            return Val::Typed(*id);
        }
        let is_function = Op::from_name(name).is_some()
            || name.parse::<DType>().is_ok()
            || self.find_function(frame, name).is_some();
        if given.is_none() && is_function {
            let message = format!("`{name}` is a function");
            self.error(frame, span, message, "not called", &format!("write `{name}(...)`"));
            return Val::Bad;
        }
        match (open, given.or(self.default)) {
            (Some(_), Some(dtype)) => {
                let id = self.builder.param(name, dtype);
                self.free.insert(name.clone(), id);
                Val::Typed(id)
            }
            _ => {
                if frame.top {
                    let hint = did_you_mean(name, frame.scope.keys().map(|name| &**name));
                    let message = format!("`{name}` is not known");
                    self.error(frame, span, message, "unknown name", &hint.unwrap_or_default());
                }
                Val::Bad
            }
        }
    }

    /// An operation whose number of operands is right.
    fn operation(
        &mut self,
        frame: &mut Frame<'_>,
        id: AstId,
        op: Op,
        args: &[AstId],
        logical: bool,
    ) -> Val {
        let mut operands = args;
        if op == Op::Select {
            if self.settle(frame, args[0], self.default).is_none() {
                return Val::Bad;
            }
            operands = &args[1..];
        }
        let mut dtype = operands.iter().find_map(|a| match frame.val(*a) {
            Val::Typed(e) => Some(self.builder.dtype_of(e)),
            _ => None,
        });
        if logical {
            dtype = self.default;
        } else if dtype.is_none() {
            if !op.is_predicate() {
                return Val::Pending;
            }
            dtype = self.default;
        }
        for a in operands {
            if self.settle(frame, *a, dtype).is_none() {
                return Val::Bad;
            }
        }
        self.build(frame, id, op, args, logical).into()
    }

    /// Builds an operation on settled operands, if their types fit.
    fn build(
        &mut self,
        frame: &Frame<'_>,
        id: AstId,
        op: Op,
        args: &[AstId],
        logical: bool,
    ) -> Option<ExprId> {
        let values = self.typed(frame, args)?;
        let span = frame.program.node(id).span;
        let types: Vec<DType> = values.iter().map(|v| self.builder.dtype_of(*v)).collect();
        let arg_span = |i: usize| frame.program.node(args[i]).span;
        if op == Op::Select && types[0] != DType::Bool {
            let message = format!("a condition must be bool, this is {}", types[0]);
            self.error(frame, arg_span(0), message, "not a condition", "compare it: `x != 0`");
            return None;
        }
        let operands = if op == Op::Select { &types[1..] } else { &types[..] };
        if let (true, Some(i)) = (logical, types.iter().position(|t| *t != DType::Bool)) {
            let message = format!(
                "`{}` joins conditions, this is {}",
                if op == Op::And { "&&" } else { "||" },
                types[i]
            );
            self.error(frame, arg_span(i), message, "not a condition", "compare it: `x != 0`");
            return None;
        }
        if let Some(i) = operands.iter().position(|t| *t != operands[0]) {
            let (a, b) = (operands[0], operands[i]);
            let spelling = op.symbol().unwrap_or(op.name());
            let message = format!("the operands of `{spelling}` have the types {a} and {b}");
            let hint = format!("convert one of them: `{a}(...)` or `{b}(...)`");
            let at = arg_span(i + args.len() - operands.len());
            self.error(frame, at, message, &format!("this is {b}"), &hint);
            return None;
        }
        let dtype = operands[0];
        if !op.accepts(dtype.class()) {
            let spelling = op.symbol().unwrap_or(op.name());
            let message = format!("`{spelling}` does not work on {dtype}");
            let hint = match op {
                Op::Xor if dtype.is_float() => "for a power, write `a ** b`".to_string(),
                _ if dtype == DType::Bool => "convert first: `f32(...)`".to_string(),
                _ if dtype.is_float() => "convert first: `i32(...)`".to_string(),
                _ => format!("convert first: `{}(f32(...))`", op.name()),
            };
            self.error(frame, span, message, "", &hint);
            return None;
        }
        Some(self.builder.op(op, &values))
    }

    /// `f32(x)`
    fn conversion(
        &mut self,
        frame: &mut Frame<'_>,
        id: AstId,
        to: DType,
        args: &[AstId],
    ) -> Option<ExprId> {
        let [arg] = *args else {
            self.wrong_count(frame, id, to.name(), 1, args.len());
            return None;
        };
        if frame.val(arg) == Val::Pending {
            let node = frame.program.node(arg);
            if let AstKind::Number(n) = &node.kind {
                let converted = if to.is_float() || (to.is_int() && is_integer_text(&n.text)) {
                    self.literal(frame, node.span, n, to)
                } else {
                    Some(self.builder.constant(f64_value(n).unwrap_or(f64::NAN), to))
                };
                // Settled: a type from further out must not reach in.
                frame.set(arg, converted.into());
                return converted;
            }
            // `i32(7 / 2)` divides integers, `i32(7 / 2.0)` converts the result.
            let integers = subtree(frame.program, arg).all(|j| match &frame.program.node(j).kind {
                AstKind::Number(n) => is_integer_text(&n.text),
                AstKind::Name(_) | AstKind::Call { .. } => false,
                _ => true,
            });
            let direct = to.is_float() || (to.is_int() && integers);
            let dtype = if direct { Some(to) } else { self.default };
            let value = self.settle(frame, arg, dtype)?;
            return Some(self.builder.cast(value, to));
        }
        let [value] = self.typed(frame, args)?[..] else { return None };
        Some(self.builder.cast(value, to))
    }

    fn literal(
        &mut self,
        frame: &Frame<'_>,
        span: Span,
        n: &Number,
        dtype: DType,
    ) -> Option<ExprId> {
        let written = format!("{}{}", if n.negative { "-" } else { "" }, n.text);
        if dtype == DType::Bool {
            let message = format!("`{written}` stands where a bool is needed");
            self.error(frame, span, message, "a number", "write `true` or `false`, or compare");
            return None;
        }
        if dtype.is_float() {
            // Read at the width that computes, so that a printed f32 comes back exactly.
            let value = if dtype == DType::F64 || n.text.starts_with("0x") {
                f64_value(n)
            } else {
                written.parse::<f32>().ok().map(f64::from)
            };
            let id = self.builder.constant(value.unwrap_or(f64::NAN), dtype);
            let got = match self.builder.node(id) {
                Node::Const(Value::Float(v)) => *v,
                _ => f64::NAN,
            };
            // The 8-bit floats saturate where the others overflow.
            let largest = match dtype {
                DType::F8E4M3 => 448.0,
                DType::F8E5M2 => 57344.0,
                _ => f64::INFINITY,
            };
            let lost = value.is_some_and(|v| v.is_finite() && v.abs() > largest * 1.0625);
            if value.is_none() || lost || (got.is_infinite() && &*n.text != "inf") {
                let message = format!("the number `{written}` is too large for {dtype}");
                self.error(frame, span, message, "out of range", "write `inf` if meant");
                return None;
            }
            return Some(id);
        }
        if !is_integer_text(&n.text) {
            let message = format!("`{written}` is not an integer, and {dtype} is needed here");
            self.error(frame, span, message, "", "convert the other operand: `f32(...)`");
            return None;
        }
        let magnitude = integer_value(&n.text);
        let value = magnitude.map(|m| if n.negative { -m } else { m });
        let bits = dtype.bits();
        let (low, high) = if dtype.is_signed_int() {
            (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
        } else {
            (0, (1i128 << bits) - 1)
        };
        match value {
            Some(v) if (low..=high).contains(&v) => {
                Some(self.builder.constant_int(v as i64, dtype))
            }
            _ => {
                let message = format!("the number `{written}` does not fit in {dtype}");
                self.error(frame, span, message, &format!("{low} to {high}"), "");
                None
            }
        }
    }

    // Functions.

    fn function(&self, key: FunctionKey) -> &'a crate::ast::Function {
        let program = if key.0 { prelude() } else { self.program };
        &program.functions[key.1]
    }

    fn call(
        &mut self,
        frame: &Frame<'_>,
        key: FunctionKey,
        span: Span,
        args: Vec<ExprId>,
        want: Option<DType>,
    ) -> Option<ExprId> {
        let memo_key = (key, args, want);
        if let Some(known) = self.memo.get(&memo_key) {
            return *known;
        }
        let function = self.function(key);
        if self.calls.contains(&key) || self.depth >= CALL_DEPTH_MAX {
            let message = if self.calls.contains(&key) {
                format!("`{}` is defined through itself", function.name.name)
            } else {
                format!("more than {CALL_DEPTH_MAX} definitions inside each other")
            };
            self.error(frame, span, message, "this call", "functions are expanded, not called");
            return None;
        }
        let program = if key.0 { prelude() } else { self.program };
        let mut inner = Frame::new(program, &function.body, false);
        for (param, arg) in function.params.iter().zip(&memo_key.1) {
            inner.bind(&param.name, AstId(0), Local::Value(*arg));
        }
        self.calls.push(key);
        self.depth += 1;
        let errors_before = self.errors.len();
        let result = self.block(&mut inner, &function.body, want);
        self.depth -= 1;
        self.calls.pop();
        // The prelude's text is not the user's: its errors are told at the call.
        if key.0 && self.errors.len() > errors_before {
            let cause = self.errors[errors_before].message().to_string();
            self.errors.truncate(errors_before);
            let types: Vec<_> =
                memo_key.1.iter().map(|a| self.builder.dtype_of(*a).name()).collect();
            let name = &function.name.name;
            let message = format!("`{name}` does not work on ({})", types.join(", "));
            self.error(frame, span, message, &format!("inside it, {cause}"), "");
        }
        self.memo.insert(memo_key, result);
        result
    }
}

fn constant(name: &str) -> Option<&'static str> {
    CONSTANTS.iter().find(|c| c.0 == name).map(|c| c.1)
}

fn is_integer_text(text: &str) -> bool {
    text.starts_with("0x") || text.bytes().all(|b| b.is_ascii_digit())
}

/// The value of integer digits; `None` when larger than any type holds.
fn integer_value(text: &str) -> Option<i128> {
    match text.strip_prefix("0x") {
        Some(hex) => i128::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn f64_value(n: &Number) -> Option<f64> {
    let magnitude = if n.text.starts_with("0x") {
        integer_value(&n.text)? as f64
    } else {
        n.text.parse::<f64>().ok()?
    };
    Some(if n.negative { -magnitude } else { magnitude })
}

/// The closest of `known` as a hint, if one is close enough.
fn did_you_mean<'b>(name: &str, known: impl Iterator<Item = &'b str>) -> Option<String> {
    let allowed = (name.len() / 3).clamp(1, 2);
    known
        .map(|k| (edit_distance(name, k), k))
        .filter(|(d, _)| *d <= allowed)
        .min()
        .map(|(_, k)| format!("did you mean `{k}`?"))
}

/// Edits (replace, insert, drop, exchange neighbours) from one name to the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() > 40 || b.len() > 40 {
        return usize::MAX;
    }
    let mut d = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            d[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replace = d[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let best = replace.min(d[i - 1][j] + 1).min(d[i][j - 1] + 1);
                let exchanged = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                if exchanged { best.min(d[i - 2][j - 2] + 1) } else { best }
            };
        }
    }
    d[a.len()][b.len()]
}
