//! The cursor over a graph's text: words, strings, lists, and errors that point.

use std::sync::Arc;
use tilewright_base::{Error, Result, SourceSpan};

/// The longest size expression that is read: products of sums multiply out when parsed.
const DIM_LENGTH_MAX: usize = 400;

/// A piece of the text and where it starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
}

/// A position in the text.
pub(super) struct Cursor<'a> {
    name: &'a str,
    text: &'a str,
    pub(super) at: usize,
}

/// Characters of labels, names, keywords and numbers.
fn wordy(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '.'
}

impl<'a> Cursor<'a> {
    pub(super) fn new(name: &'a str, text: &'a str) -> Cursor<'a> {
        Cursor { name, text, at: 0 }
    }

    pub(super) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// An error about `len` bytes at `start`.
    pub(super) fn error_at(&self, start: usize, len: usize, message: impl Into<String>) -> Error {
        let message = message.into();
        Error::user(message.clone()).with_span(SourceSpan {
            name: Arc::from(self.name),
            text: Arc::from(self.text),
            start,
            len,
            label: message,
        })
    }

    pub(super) fn error_on(&self, piece: Piece<'_>, message: impl Into<String>) -> Error {
        self.error_at(piece.at, piece.text.len(), message)
    }

    /// An error here, about what was expected instead.
    pub(super) fn expected(&self, what: &str) -> Error {
        let found = self.rest().chars().next();
        let len = found.map_or(1, char::len_utf8);
        let found = found.map_or("the end".to_string(), |c| format!("`{}`", c.escape_debug()));
        self.error_at(self.at, len, format!("expected {what}, found {found}"))
    }

    /// Skips blanks and tabs.
    pub(super) fn blanks(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t']).len();
    }

    /// Skips white space, line ends and comments.
    pub(super) fn space(&mut self) {
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

    /// Takes `token` if it is next, after blanks.
    pub(super) fn eat(&mut self, token: &str) -> bool {
        self.blanks();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    pub(super) fn need(&mut self, token: &str) -> Result<()> {
        if self.eat(token) { Ok(()) } else { Err(self.expected(&format!("`{token}`"))) }
    }

    /// Takes characters while `accept` holds; may be empty.
    pub(super) fn take_while(&mut self, accept: impl Fn(char) -> bool) -> Piece<'a> {
        let rest = self.rest();
        let len = rest.find(|c| !accept(c)).unwrap_or(rest.len());
        let piece = Piece { text: &rest[..len], at: self.at };
        self.at += len;
        piece
    }

    /// A word: a label, a keyword, an unsigned number.
    pub(super) fn word(&mut self, what: &str) -> Result<Piece<'a>> {
        self.blanks();
        let word = self.take_while(wordy);
        if word.text.is_empty() { Err(self.expected(what)) } else { Ok(word) }
    }

    /// A word that may carry signs: `-1.5e-7`.
    pub(super) fn scalar(&mut self, what: &str) -> Result<Piece<'a>> {
        self.blanks();
        let word = self.take_while(|c| wordy(c) || c == '-' || c == '+');
        if word.text.is_empty() { Err(self.expected(what)) } else { Ok(word) }
    }

    /// A string in quotes with Rust's escapes.
    pub(super) fn string(&mut self) -> Result<String> {
        self.need("\"")?;
        let mut out = String::new();
        loop {
            let start = self.at;
            let Some(c) = self.rest().chars().next().filter(|&c| c != '\n') else {
                return Err(self.expected("`\"` at the end of the string"));
            };
            self.at += c.len_utf8();
            match c {
                '"' => return Ok(out),
                '\\' => {
                    let escape = self.rest().chars().next();
                    self.at += escape.map_or(0, char::len_utf8);
                    let c = match escape {
                        Some('n') => Some('\n'),
                        Some('r') => Some('\r'),
                        Some('t') => Some('\t'),
                        Some('0') => Some('\0'),
                        Some(c @ ('"' | '\'' | '\\')) => Some(c),
                        Some('u') if self.rest().starts_with('{') => {
                            self.at += 1;
                            let digits = self.take_while(|c| c.is_ascii_hexdigit()).text;
                            let closed = self.rest().starts_with('}');
                            self.at += usize::from(closed);
                            u32::from_str_radix(digits, 16)
                                .ok()
                                .filter(|_| closed)
                                .and_then(char::from_u32)
                        }
                        _ => None,
                    };
                    out.push(c.ok_or_else(|| {
                        self.error_at(start, self.at - start, "unknown escape in a string")
                    })?);
                }
                c => out.push(c),
            }
        }
    }

    /// A bracketed list, cut at the commas outside parentheses; the pieces are trimmed.
    pub(super) fn list(&mut self) -> Result<Vec<Piece<'a>>> {
        self.need("[")?;
        let open = self.at - 1;
        let (mut items, mut depth, mut start) = (Vec::new(), 0usize, self.at);
        let text = self.text;
        let trimmed = |from: usize, to: usize| {
            let piece = &text[from..to];
            Piece { text: piece.trim(), at: from + piece.len() - piece.trim_start().len() }
        };
        for (i, c) in self.rest().char_indices() {
            let at = self.at + i;
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    items.push(trimmed(start, at));
                    start = at + 1;
                }
                ']' => {
                    let last = trimmed(start, at);
                    if !(items.is_empty() && last.text.is_empty()) {
                        items.push(last);
                    }
                    self.at = at + 1;
                    return Ok(items);
                }
                '\n' => break,
                _ => {}
            }
        }
        Err(self.error_at(open, 1, "this list is not closed"))
    }

    /// A text in braces, braces included, within one line.
    pub(super) fn braces(&mut self) -> Result<Piece<'a>> {
        self.blanks();
        let rest = self.rest();
        let line = rest.lines().next().unwrap_or("");
        let end = line.find('}').filter(|_| line.starts_with('{'));
        let Some(end) = end else { return Err(self.expected("a function in braces")) };
        let piece = Piece { text: &rest[..=end], at: self.at };
        self.at += end + 1;
        Ok(piece)
    }

    /// A size expression.
    pub(super) fn dim(&self, piece: Piece<'_>) -> Result<tilewright_layout::Dim> {
        if piece.text.len() > DIM_LENGTH_MAX {
            return Err(self.error_on(piece, "this size is too long"));
        }
        piece.text.parse().map_err(|e: String| self.error_on(piece, e))
    }

    /// Anything that `FromStr` reads.
    pub(super) fn parsed<T: std::str::FromStr>(&self, piece: Piece<'_>, what: &str) -> Result<T> {
        piece.text.parse().map_err(|_| {
            self.error_on(piece, format!("`{}` is not {what}", piece.text.escape_debug()))
        })
    }
}
