//! The parser: tokens to a [`Program`], by recursive descent with precedence climbing.
//!
//! ```text
//! program   = { function | let } expression [";"]   |   "{" [name {"," name}] "->" block "}"
//! function  = name "(" [name {"," name}] ")" "=" ( expression | "{" block "}" ) ";"
//! let       = "let" name "=" expression ";"
//! block     = { let } expression
//! ```
//!
//! From weakest to strongest binding:
//!
//! | operators | | grouping |
//! |---|---|---|
//! | `c ? a : b` | conditional | right |
//! | `\|\|` `or` | logical or | left |
//! | `&&` `and` | logical and | left |
//! | `not` | logical not, of a whole comparison | prefix |
//! | `<` `<=` `>` `>=` `==` `!=` | comparison | none: `a < b < c` is an error |
//! | `\|`, then `^`, then `&` | bitwise or, exclusive or, and | left |
//! | `<<` `>>` | shifts | left |
//! | `+` `-` | | left |
//! | `*` `/` `%` | | left |
//! | `-` `!` `~` | unary | |
//! | `**` | power | right; binds stronger than a sign on its left |
//!
//! A `-` directly before a number belongs to the number unless `**` follows; `-(1)` is an
//! operation. After a syntax error the parser skips to the next `;` and goes on, so that the
//! errors of all statements are reported together.

use crate::ast::{AstId, AstKind, AstNode, Binder, Block, Function, Number, Program};
use crate::lex::{Source, Span, Token, TokenKind, tokens};
use crate::op::Op;
use std::sync::Arc;
use tilewright_base::Error;

/// Parentheses, signs and calls inside each other.
const NESTING_MAX: usize = 128;
/// Errors after which the parser stops looking for more.
const ERRORS_MAX: usize = 20;

/// Words that cannot be names.
pub(crate) const KEYWORDS: [&str; 8] = ["let", "true", "false", "inf", "nan", "and", "or", "not"];

/// Binding strength of each level of the table above; higher binds stronger.
pub(crate) mod level {
    pub(crate) const OR: u8 = 1;
    pub(crate) const AND: u8 = 2;
    pub(crate) const COMPARE: u8 = 3;
    pub(crate) const BIT_OR: u8 = 4;
    pub(crate) const BIT_XOR: u8 = 5;
    pub(crate) const BIT_AND: u8 = 6;
    pub(crate) const SHIFT: u8 = 7;
    pub(crate) const ADD: u8 = 8;
    pub(crate) const MUL: u8 = 9;
    pub(crate) const UNARY: u8 = 10;
    pub(crate) const POWER: u8 = 11;
    pub(crate) const PRIMARY: u8 = 12;
}

/// What a text may contain.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Statements and a result.
    Program,
    /// Only function definitions.
    Prelude,
    /// `{ a, b -> block }`
    Closed,
}

/// Parses `source`; every error found.
pub(crate) fn parse(source: &Source, form: Form) -> Result<Program, Vec<Error>> {
    let (tokens, errors) = tokens(source);
    let mut parser = Parser {
        source,
        tokens,
        pos: 0,
        depth: 0,
        nodes: Vec::new(),
        // The parser stumbles over holes that bad characters leave: only the first errors count.
        errors: Vec::new(),
    };
    let program = match form {
        Form::Closed => parser.closed(),
        form => parser.program(form),
    };
    let mut errors = errors;
    errors.append(&mut parser.errors);
    match program {
        Some(program) if errors.is_empty() => Ok(program),
        _ => Err(errors),
    }
}

struct Parser<'a> {
    source: &'a Source,
    tokens: Vec<Token>,
    pos: usize,
    depth: usize,
    nodes: Vec<AstNode>,
    errors: Vec<Error>,
}

/// `None`: an error has been recorded.
type Parsed<T> = Option<T>;

impl Parser<'_> {
    fn peek(&self) -> Token {
        self.tokens[self.pos]
    }

    fn kind_at(&self, offset: usize) -> TokenKind {
        self.tokens.get(self.pos + offset).map_or(TokenKind::End, |t| t.kind)
    }

    /// The current token, stepping over it; the end is never left behind.
    fn advance(&mut self) -> Token {
        let token = self.peek();
        self.pos = (self.pos + 1).min(self.tokens.len() - 1);
        token
    }

    fn text(&self, span: Span) -> &str {
        &self.source.text[span.start..span.end]
    }

    fn at(&self, kind: TokenKind) -> bool {
        self.peek().kind == kind
    }

    fn at_word(&self, word: &str) -> bool {
        self.at(TokenKind::Ident) && self.text(self.peek().span) == word
    }

    fn eat(&mut self, kind: TokenKind) -> bool {
        let found = self.at(kind);
        if found {
            self.advance();
        }
        found
    }

    /// Records an error at `span`.
    fn fail<T>(&mut self, span: Span, message: impl Into<String>, label: &str) -> Parsed<T> {
        self.errors.push(self.source.error(span, message, label));
        None
    }

    fn unexpected<T>(&mut self, wanted: &str) -> Parsed<T> {
        let token = self.peek();
        let found = match token.kind {
            TokenKind::Number | TokenKind::Ident => format!("`{}`", self.text(token.span)),
            other => other.to_string(),
        };
        self.fail(token.span, format!("expected {wanted}, found {found}"), "here")
    }

    fn expect(&mut self, kind: TokenKind) -> Parsed<Token> {
        if self.at(kind) { Some(self.advance()) } else { self.unexpected(&kind.to_string()) }
    }

    fn push(&mut self, kind: AstKind, span: Span, first: AstId) -> AstId {
        let id = AstId::from(self.nodes.len());
        self.nodes.push(AstNode { kind, span, first });
        id
    }

    fn next_id(&self) -> AstId {
        AstId::from(self.nodes.len())
    }

    fn span_of(&self, id: AstId) -> Span {
        self.nodes[id.index()].span
    }

    // Statements.

    fn program(&mut self, form: Form) -> Parsed<Program> {
        let mut functions = Vec::new();
        let mut lets = Vec::new();
        let mut result = None;
        let mut failed = false;
        while !self.at(TokenKind::End) {
            if self.errors.len() >= ERRORS_MAX {
                return None;
            }
            let before = self.pos;
            let ok = if self.at_function() {
                self.function().map(|f| functions.push(f))
            } else if self.at_word("let") {
                self.let_statement().map(|l| lets.push(l))
            } else if form == Form::Prelude {
                self.unexpected("a function definition")
            } else {
                self.result_statement().map(|id| result = Some(id))
            };
            if ok.is_none() {
                failed = true;
                // On to the next statement; always past at least one token.
                while !self.at(TokenKind::End) && !self.eat(TokenKind::Semicolon) {
                    self.advance();
                }
                if self.pos == before {
                    self.advance();
                }
            }
        }
        let body = match result {
            Some(result) => Some(Block { lets, result, first: AstId(0) }),
            None if failed => return None,
            None if form == Form::Prelude => None,
            None => {
                let span = self.peek().span;
                self.errors.push(
                    self.source
                        .error(span, "the text has no result", "an expression is missing here")
                        .with_hint("end with the expression to compute, such as `x * 2`"),
                );
                return None;
            }
        };
        let nodes = std::mem::take(&mut self.nodes);
        Some(Program { source: self.source.clone(), nodes, functions, params: None, body })
    }

    fn closed(&mut self) -> Parsed<Program> {
        self.expect(TokenKind::OpenBrace)?;
        let mut params = Vec::new();
        while !self.eat(TokenKind::Arrow) {
            if !params.is_empty() {
                self.expect(TokenKind::Comma)?;
            }
            params.push(self.binder("the name of a parameter or `->`")?);
        }
        self.no_duplicates(&params)?;
        let body = self.block()?;
        self.expect(TokenKind::CloseBrace)?;
        self.expect(TokenKind::End)?;
        let nodes = std::mem::take(&mut self.nodes);
        let source = self.source.clone();
        Some(Program { source, nodes, functions: vec![], params: Some(params), body: Some(body) })
    }

    /// The result must be the last statement.
    fn result_statement(&mut self) -> Parsed<AstId> {
        let id = self.expression()?;
        self.eat(TokenKind::Semicolon);
        if self.at(TokenKind::End) {
            return Some(id);
        }
        self.unexpected("an operator or the end of the text")
    }

    /// `name(a, b) =` starts a definition, any other `name(...)` an expression.
    fn at_function(&self) -> bool {
        if self.kind_at(0) != TokenKind::Ident || self.kind_at(1) != TokenKind::OpenParen {
            return false;
        }
        let mut i = 2;
        while matches!(self.kind_at(i), TokenKind::Ident | TokenKind::Comma) {
            i += 1;
        }
        self.kind_at(i) == TokenKind::CloseParen && self.kind_at(i + 1) == TokenKind::Assign
    }

    fn function(&mut self) -> Parsed<Function> {
        let name = self.binder("the name of a function")?;
        self.expect(TokenKind::OpenParen)?;
        let mut params = Vec::new();
        while !self.eat(TokenKind::CloseParen) {
            if !params.is_empty() {
                self.expect(TokenKind::Comma)?;
            }
            params.push(self.binder("the name of a parameter")?);
        }
        self.no_duplicates(&params)?;
        self.expect(TokenKind::Assign)?;
        let body = if self.eat(TokenKind::OpenBrace) {
            let block = self.block()?;
            self.expect(TokenKind::CloseBrace)?;
            block
        } else {
            let first = self.next_id();
            Block { lets: Vec::new(), result: self.expression()?, first }
        };
        self.expect(TokenKind::Semicolon)?;
        Some(Function { name, params, body })
    }

    fn no_duplicates(&mut self, params: &[Binder]) -> Parsed<()> {
        let mut seen = std::collections::BTreeSet::new();
        for p in params {
            if !seen.insert(p.name.clone()) {
                let message = format!("two parameters are named `{}`", p.name);
                return self.fail(p.span, message, "the second");
            }
        }
        Some(())
    }

    fn let_statement(&mut self) -> Parsed<(Binder, AstId)> {
        self.advance();
        let name = self.binder("a name")?;
        self.expect(TokenKind::Assign)?;
        let value = self.expression()?;
        self.expect(TokenKind::Semicolon)?;
        Some((name, value))
    }

    fn block(&mut self) -> Parsed<Block> {
        let first = self.next_id();
        let mut lets = Vec::new();
        while self.at_word("let") {
            lets.push(self.let_statement()?);
        }
        Some(Block { lets, result: self.expression()?, first })
    }

    fn binder(&mut self, wanted: &str) -> Parsed<Binder> {
        if !self.at(TokenKind::Ident) {
            return self.unexpected(wanted);
        }
        let span = self.advance().span;
        let name: Arc<str> = self.text(span).into();
        if KEYWORDS.contains(&&*name) {
            return self.fail(span, format!("`{name}` is a word of the language"), "not a name");
        }
        Some(Binder { name, span })
    }

    // Expressions.

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth == NESTING_MAX {
            let message = format!("more than {NESTING_MAX} levels of nesting");
            let span = self.peek().span;
            self.errors.push(
                self.source
                    .error(span, message, "too deep")
                    .with_hint("name inner parts: `let part = ...;`"),
            );
            return None;
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    fn expression(&mut self) -> Parsed<AstId> {
        self.nested(Self::conditional)
    }

    fn conditional(&mut self) -> Parsed<AstId> {
        let first = self.next_id();
        let condition = self.binary(level::OR)?;
        if !self.eat(TokenKind::Question) {
            return Some(condition);
        }
        let a = self.expression()?;
        self.expect(TokenKind::Colon)?;
        let b = self.expression()?;
        let span = self.span_of(condition).to(self.span_of(b));
        Some(self.push(AstKind::Conditional([condition, a, b]), span, first))
    }

    /// The infix operator at the current token: operation, level, whether it is logical.
    fn infix(&self) -> Option<(Op, u8, bool)> {
        Some(match self.peek().kind {
            TokenKind::OrOr => (Op::Or, level::OR, true),
            TokenKind::AndAnd => (Op::And, level::AND, true),
            TokenKind::Less => (Op::Lt, level::COMPARE, false),
            TokenKind::LessEq => (Op::Le, level::COMPARE, false),
            TokenKind::Greater => (Op::Gt, level::COMPARE, false),
            TokenKind::GreaterEq => (Op::Ge, level::COMPARE, false),
            TokenKind::EqEq => (Op::Eq, level::COMPARE, false),
            TokenKind::NotEq => (Op::Ne, level::COMPARE, false),
            TokenKind::Or => (Op::Or, level::BIT_OR, false),
            TokenKind::Caret => (Op::Xor, level::BIT_XOR, false),
            TokenKind::And => (Op::And, level::BIT_AND, false),
            TokenKind::Shl => (Op::Shl, level::SHIFT, false),
            TokenKind::Shr => (Op::Shr, level::SHIFT, false),
            TokenKind::Plus => (Op::Add, level::ADD, false),
            TokenKind::Minus => (Op::Sub, level::ADD, false),
            TokenKind::Star => (Op::Mul, level::MUL, false),
            TokenKind::Slash => (Op::Div, level::MUL, false),
            TokenKind::Percent => (Op::Rem, level::MUL, false),
            TokenKind::Ident if self.at_word("or") => (Op::Or, level::OR, true),
            TokenKind::Ident if self.at_word("and") => (Op::And, level::AND, true),
            _ => return None,
        })
    }

    /// Operators of `lowest` level and stronger.
    fn binary(&mut self, lowest: u8) -> Parsed<AstId> {
        let first = self.next_id();
        let mut left = if lowest <= level::COMPARE && self.at_word("not") {
            let span = self.advance().span;
            let operand = self.nested(|p| p.binary(level::COMPARE))?;
            let span = span.to(self.span_of(operand));
            self.push(AstKind::Unary(Op::Not, operand), span, first)
        } else {
            self.unary()?
        };
        let mut compared = false;
        while let Some((op, level, logical)) = self.infix() {
            if level < lowest {
                break;
            }
            let operator = self.advance();
            if level == level::COMPARE && compared {
                self.errors.push(
                    self.source
                        .error(operator.span, "comparisons cannot be chained", "the second")
                        .with_hint("write `a < b && b < c`"),
                );
                return None;
            }
            compared = level == level::COMPARE;
            // Everything stronger belongs to the right operand.
            let right = self.nested(|p| p.binary(level + 1))?;
            let span = self.span_of(left).to(self.span_of(right));
            left = self.push(AstKind::Binary { op, logical, args: [left, right] }, span, first);
        }
        Some(left)
    }

    fn unary(&mut self) -> Parsed<AstId> {
        let first = self.next_id();
        let token = self.peek();
        let op = match token.kind {
            TokenKind::Minus => Op::Neg,
            TokenKind::Bang | TokenKind::Tilde => Op::Not,
            _ => return self.power(),
        };
        self.advance();
        let number_follows =
            self.at(TokenKind::Number) || self.at_word("inf") || self.at_word("nan");
        let operand = self.nested(Self::unary)?;
        let span = token.span.to(self.span_of(operand));
        if let (Op::Neg, true) = (op, number_follows) {
            let node = &mut self.nodes[operand.index()];
            if let AstKind::Number(number) = &mut node.kind {
                number.negative = true;
                node.span = span;
                return Some(operand);
            }
        }
        Some(self.push(AstKind::Unary(op, operand), span, first))
    }

    fn power(&mut self) -> Parsed<AstId> {
        let first = self.next_id();
        let base = self.primary()?;
        if !self.eat(TokenKind::StarStar) {
            return Some(base);
        }
        let exponent = self.nested(Self::unary)?;
        let span = self.span_of(base).to(self.span_of(exponent));
        let args = [base, exponent];
        Some(self.push(AstKind::Binary { op: Op::Pow, logical: false, args }, span, first))
    }

    fn primary(&mut self) -> Parsed<AstId> {
        let first = self.next_id();
        let token = self.peek();
        match token.kind {
            TokenKind::Number => {
                self.advance();
                let text = self.text(token.span).replace('_', "").into();
                let number = Number { text, negative: false };
                Some(self.push(AstKind::Number(number), token.span, first))
            }
            TokenKind::OpenParen => {
                self.advance();
                let inner = self.expression()?;
                let close = self.expect(TokenKind::CloseParen)?;
                // Errors about the value mark the parentheses too.
                self.nodes[inner.index()].span = token.span.to(close.span);
                Some(inner)
            }
            TokenKind::Ident => {
                let name: Arc<str> = self.text(token.span).into();
                let kind = match &*name {
                    "true" => AstKind::Bool(true),
                    "false" => AstKind::Bool(false),
                    "inf" | "nan" => {
                        AstKind::Number(Number { text: name.clone(), negative: false })
                    }
                    "let" => {
                        let message = "`let` cannot stand inside an expression";
                        return self.fail(token.span, message, "statements come first");
                    }
                    "and" | "or" | "not" => return self.unexpected("an operand"),
                    _ => AstKind::Name(name.clone()),
                };
                self.advance();
                match kind {
                    AstKind::Name(_) if self.at(TokenKind::OpenParen) => {
                        self.call(name, token.span, first)
                    }
                    kind => Some(self.push(kind, token.span, first)),
                }
            }
            TokenKind::End => self.unexpected("an operand"),
            _ => self.unexpected("a number, a name or `(`"),
        }
    }

    fn call(&mut self, name: Arc<str>, name_span: Span, first: AstId) -> Parsed<AstId> {
        let open = self.advance();
        let mut args = Vec::new();
        if !self.at(TokenKind::CloseParen) {
            loop {
                args.push(self.expression()?);
                if !self.eat(TokenKind::Comma) {
                    break;
                }
            }
        }
        if !self.at(TokenKind::CloseParen) {
            if self.at(TokenKind::End) {
                return self.fail(open.span, "this `(` is never closed", "opened here");
            }
            return self.unexpected("`,` or `)`");
        }
        let span = name_span.to(self.advance().span);
        if &*name == "where" && args.len() == 3 {
            let args = [args[0], args[1], args[2]];
            return Some(self.push(AstKind::Conditional(args), span, first));
        }
        Some(self.push(AstKind::Call { name, name_span, args }, span, first))
    }
}
