//! The cursor over a kernel's text: words, sizes, bracketed parts, and errors that point.
//!
//! White space, line ends and comments (`#` or `//` to the end of the line) separate and mean
//! nothing else. Every method skips them before what it reads; positions only move forward, so
//! reading ends for every text.

use std::sync::Arc;
use tilewright_base::{Error, Result, SourceSpan};
use tilewright_layout::Dim;

/// The longest size expression that is read.
const DIM_LENGTH_MAX: usize = 2000;

/// A piece of the text and where it starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) text: &'a str,
    pub(crate) at: usize,
}

/// A position in the text.
pub(crate) struct Cursor<'a> {
    name: &'a str,
    text: &'a str,
    at: usize,
}

/// Characters of names, keywords and numbers.
fn wordy(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '.'
}

/// Length of the word that `text` starts with; a word ends before `..`, which stands in ranges.
fn word_length(text: &str) -> usize {
    let len = text.find(|c| !wordy(c)).unwrap_or(text.len());
    text[..len].find("..").unwrap_or(len)
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(name: &'a str, text: &'a str) -> Cursor<'a> {
        Cursor { name, text, at: 0 }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// An error about a piece of the text.
    pub(crate) fn error_on(&self, piece: Piece<'_>, message: impl Into<String>) -> Error {
        let message = message.into();
        Error::user(message.clone()).with_span(self.span(piece.at, piece.text.len(), message))
    }

    /// A place in this text.
    pub(crate) fn span(&self, start: usize, len: usize, label: String) -> SourceSpan {
        SourceSpan { name: Arc::from(self.name), text: Arc::from(self.text), start, len, label }
    }

    /// An error here, about what was expected instead.
    pub(crate) fn expected(&mut self, what: &str) -> Error {
        self.space();
        let rest = self.rest();
        let len = match word_length(rest) {
            0 => rest.chars().next().map_or(0, char::len_utf8),
            len => len,
        };
        let found = match &rest[..len] {
            "" => "the end of the text".to_string(),
            found => format!("`{}`", found.escape_debug()),
        };
        let piece = Piece { text: &rest[..len], at: self.at };
        self.error_on(piece, format!("expected {what}, found {found}"))
    }

    /// Skips white space and comments.
    fn space(&mut self) {
        loop {
            let rest = self.rest();
            self.at += rest.len() - rest.trim_start().len();
            let rest = self.rest();
            if !(rest.starts_with('#') || rest.starts_with("//")) {
                return;
            }
            self.at += rest.find('\n').unwrap_or(rest.len());
        }
    }

    /// Whether `token` is next.
    pub(crate) fn at(&mut self, token: &str) -> bool {
        self.space();
        self.rest().starts_with(token)
    }

    /// Takes `token` if it is next.
    pub(crate) fn eat(&mut self, token: &str) -> bool {
        let found = self.at(token);
        if found {
            self.at += token.len();
        }
        found
    }

    pub(crate) fn need(&mut self, token: &str) -> Result<()> {
        if self.eat(token) { Ok(()) } else { Err(self.expected(&format!("`{token}`"))) }
    }

    /// Takes the whole word `keyword` if it is next.
    pub(crate) fn eat_word(&mut self, keyword: &str) -> bool {
        self.space();
        let rest = self.rest();
        let found = &rest[..word_length(rest)] == keyword;
        if found {
            self.at += keyword.len();
        }
        found
    }

    pub(crate) fn need_word(&mut self, keyword: &str) -> Result<()> {
        if self.eat_word(keyword) { Ok(()) } else { Err(self.expected(&format!("`{keyword}`"))) }
    }

    fn take(&mut self, len: usize) -> Piece<'a> {
        let piece = Piece { text: &self.rest()[..len], at: self.at };
        self.at += len;
        piece
    }

    /// A word: a name, a keyword, an unsigned number.
    pub(crate) fn word(&mut self, what: &str) -> Result<Piece<'a>> {
        self.space();
        match word_length(self.rest()) {
            0 => Err(self.expected(what)),
            len => Ok(self.take(len)),
        }
    }

    /// A name: a letter or `_`, then letters, digits, `_` and `.`.
    pub(crate) fn identifier(&mut self, what: &str) -> Result<Piece<'a>> {
        self.space();
        if self.rest().starts_with(|c: char| c.is_alphabetic() || c == '_') {
            self.word(what)
        } else {
            Err(self.expected(what))
        }
    }

    /// A number with its sign: `-1.5e-7`, `inf`.
    pub(crate) fn number(&mut self, what: &str) -> Result<Piece<'a>> {
        self.space();
        let rest = self.rest();
        let sign = usize::from(rest.starts_with('-'));
        let mut len = sign + word_length(&rest[sign..]);
        if rest[sign..len].starts_with(|c: char| c.is_ascii_digit())
            && rest[..len].ends_with(['e', 'E'])
            && rest[len..].starts_with(['-', '+'])
        {
            len += 1 + word_length(&rest[len + 1..]);
        }
        if len == sign { Err(self.expected(what)) } else { Ok(self.take(len)) }
    }

    /// Anything that `FromStr` reads.
    pub(crate) fn parsed<T: std::str::FromStr>(&self, piece: Piece<'_>, what: &str) -> Result<T> {
        piece.text.parse().map_err(|_| {
            self.error_on(piece, format!("`{}` is not {what}", piece.text.escape_debug()))
        })
    }

    /// A part in brackets of one kind, brackets included; comments inside it are skipped.
    pub(crate) fn bracketed(&mut self, open: char, close: char, what: &str) -> Result<Piece<'a>> {
        self.space();
        let rest = self.rest();
        if !rest.starts_with(open) {
            return Err(self.expected(what));
        }
        let (mut depth, mut comment) = (0usize, false);
        let mut last = ' ';
        for (i, c) in rest.char_indices() {
            comment = (comment && c != '\n') || c == '#' || (c == '/' && last == '/');
            last = c;
            if comment {
                continue;
            }
            if c == open {
                depth += 1;
            } else if c == close {
                depth -= 1;
                if depth == 0 {
                    return Ok(self.take(i + c.len_utf8()));
                }
            }
        }
        let piece = Piece { text: &rest[..open.len_utf8()], at: self.at };
        Err(self.error_on(piece, format!("this `{open}` is not closed")))
    }

    /// A size expression: as far as operands and operators alternate.
    pub(crate) fn dim(&mut self) -> Result<(Dim, Piece<'a>)> {
        self.space();
        let start = self.at;
        let end = loop {
            self.space();
            while self.eat("-") {
                self.space();
            }
            if self.rest().starts_with('(') {
                self.bracketed('(', ')', "a size")?;
            } else {
                let name = self.word("a size")?;
                let called = !name.text.starts_with(|c: char| c.is_ascii_digit());
                if called && self.rest().starts_with('(') {
                    self.bracketed('(', ')', "a size")?;
                }
            }
            let end = self.at;
            self.space();
            if !self.rest().starts_with(['+', '-', '*', '/', '%']) {
                break end;
            }
            self.at += 1;
        };
        self.at = end;
        let piece = Piece { text: &self.text[start..end], at: start };
        if piece.text.len() > DIM_LENGTH_MAX {
            return Err(self.error_on(piece, "this size is too long"));
        }
        let dim = piece.text.parse().map_err(|e: String| self.error_on(piece, e))?;
        Ok((dim, piece))
    }

    /// The text since `start` of a part that was read.
    pub(crate) fn since(&self, start: usize) -> Piece<'a> {
        Piece { text: &self.text[start..self.at], at: start }
    }

    /// The rest of the line from `start`.
    pub(crate) fn line_at(&self, start: usize) -> Piece<'a> {
        Piece { text: self.text[start..].lines().next().unwrap_or(""), at: start }
    }

    /// Where the next token starts.
    pub(crate) fn here(&mut self) -> usize {
        self.space();
        self.at
    }

    /// Whether everything has been read.
    pub(crate) fn is_done(&mut self) -> bool {
        self.space();
        self.rest().is_empty()
    }
}
