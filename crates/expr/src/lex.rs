//! The lexer: text to [`Token`]s, each with its place in the text.
//!
//! Blanks, line ends and comments (`#` or `//` to the end of the line) separate tokens and are
//! dropped. A bad character becomes one error and is skipped, so that all of them are reported.
//! A new operator is a row in [`PUNCTUATION`] (longer spellings first) and a [`TokenKind`].

use std::fmt;
use std::sync::Arc;
use tilewright_base::{Error, SourceSpan};

/// Part of a text, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// Byte after the last.
    pub end: usize,
}

impl Span {
    /// From the start of `self` to the end of `other`.
    pub fn to(self, other: Span) -> Span {
        Span { start: self.start, end: other.end }
    }
}

/// A text with its name, shared by all errors about it.
#[derive(Clone, Debug)]
pub struct Source {
    /// A file name or `<expression>`.
    pub name: Arc<str>,
    /// The whole text.
    pub text: Arc<str>,
}

impl Source {
    /// Names a text.
    pub fn new(name: &str, text: &str) -> Source {
        Source { name: name.into(), text: text.into() }
    }

    /// A user's mistake at `span`, with `label` under the caret.
    pub fn error(&self, span: Span, message: impl Into<String>, label: impl Into<String>) -> Error {
        Error::user(message).with_span(SourceSpan {
            name: self.name.clone(),
            text: self.text.clone(),
            start: span.start,
            len: span.end - span.start,
            label: label.into(),
        })
    }
}

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the spelling in PUNCTUATION is the documentation")]
pub enum TokenKind {
    /// `12`, `0x1f`, `1_000`, `.5`, `1e-3`
    Number,
    /// A name or a keyword.
    Ident,
    OrOr,
    AndAnd,
    EqEq,
    NotEq,
    LessEq,
    GreaterEq,
    Shl,
    Shr,
    StarStar,
    Arrow,
    Less,
    Greater,
    Or,
    And,
    Caret,
    Plus,
    Minus,
    Star,
    Slash,
    Percent,
    Bang,
    Tilde,
    Assign,
    Question,
    Colon,
    Comma,
    Semicolon,
    OpenParen,
    CloseParen,
    OpenBrace,
    CloseBrace,
    /// The end of the text; always the last token.
    End,
}

/// Spellings, longer ones before their prefixes.
#[rustfmt::skip]
pub(crate) const PUNCTUATION: [(&str, TokenKind); 31] = [
    ("||", TokenKind::OrOr),      ("&&", TokenKind::AndAnd),    ("==", TokenKind::EqEq),
    ("!=", TokenKind::NotEq),     ("<=", TokenKind::LessEq),    (">=", TokenKind::GreaterEq),
    ("<<", TokenKind::Shl),       (">>", TokenKind::Shr),       ("**", TokenKind::StarStar),
    ("->", TokenKind::Arrow),     ("<",  TokenKind::Less),      (">",  TokenKind::Greater),
    ("|",  TokenKind::Or),        ("&",  TokenKind::And),       ("^",  TokenKind::Caret),
    ("+",  TokenKind::Plus),      ("-",  TokenKind::Minus),     ("*",  TokenKind::Star),
    ("/",  TokenKind::Slash),     ("%",  TokenKind::Percent),   ("!",  TokenKind::Bang),
    ("~",  TokenKind::Tilde),     ("=",  TokenKind::Assign),    ("?",  TokenKind::Question),
    (":",  TokenKind::Colon),     (",",  TokenKind::Comma),     (";",  TokenKind::Semicolon),
    ("(",  TokenKind::OpenParen), (")",  TokenKind::CloseParen),
    ("{",  TokenKind::OpenBrace), ("}",  TokenKind::CloseBrace),
];

impl fmt::Display for TokenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenKind::Number => f.write_str("a number"),
            TokenKind::Ident => f.write_str("a name"),
            TokenKind::End => f.write_str("the end of the text"),
            other => {
                let row = PUNCTUATION.iter().find(|row| row.1 == *other);
                write!(f, "`{}`", row.map_or("?", |row| row.0))
            }
        }
    }
}

/// One token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// What it is.
    pub kind: TokenKind,
    /// Where it stands.
    pub span: Span,
}

/// True for what may be a name of a parameter: a letter or `_`, then letters, digits and `_`.
pub(crate) fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(is_name_start) && chars.all(is_name_part)
}

fn is_name_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

fn is_name_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Splits `source` into tokens (the last is [`TokenKind::End`]) and finds all lexical errors.
pub fn tokens(source: &Source) -> (Vec<Token>, Vec<Error>) {
    let text: &str = &source.text;
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    let mut pos = 0;
    while let Some(c) = text[pos..].chars().next() {
        let rest = &text[pos..];
        if c.is_whitespace() {
            pos += c.len_utf8();
        } else if c == '#' || rest.starts_with("//") {
            pos += rest.find('\n').unwrap_or(rest.len());
        } else if is_name_start(c) {
            let len = rest.find(|c| !is_name_part(c)).unwrap_or(rest.len());
            out.push(Token { kind: TokenKind::Ident, span: Span { start: pos, end: pos + len } });
            pos += len;
        } else if c.is_ascii_digit()
            || (c == '.' && rest[1..].starts_with(|c: char| c.is_ascii_digit()))
        {
            let len = number_length(rest);
            let span = Span { start: pos, end: pos + len };
            out.push(Token { kind: TokenKind::Number, span });
            pos += len;
            let tail = &text[pos..];
            if tail.starts_with(is_name_part) {
                let end = pos + tail.find(|c| !is_name_part(c)).unwrap_or(tail.len());
                let (number, name) = (&text[span.start..span.end], &text[pos..end]);
                let message = format!("`{number}{name}` is neither a number nor a name");
                let whole = Span { start: span.start, end };
                let error = source.error(whole, message, "read as one word");
                errors.push(error.with_hint(format!("to multiply, write `{number} * {name}`")));
                pos = end;
            }
        } else if let Some((spelling, kind)) = PUNCTUATION.iter().find(|p| rest.starts_with(p.0)) {
            let end = pos + spelling.len();
            out.push(Token { kind: *kind, span: Span { start: pos, end } });
            pos = end;
        } else {
            let span = Span { start: pos, end: pos + c.len_utf8() };
            let message = format!("unexpected character `{}`", c.escape_debug());
            errors.push(source.error(span, message, "no token starts with this"));
            pos = span.end;
        }
    }
    let span = Span { start: text.len(), end: text.len() };
    out.push(Token { kind: TokenKind::End, span });
    (out, errors)
}

/// Length of the number that `text` starts with.
fn number_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digits = |mut i: usize, hex: bool| {
        let ok = |b: &u8| *b == b'_' || b.is_ascii_digit() || (hex && b.is_ascii_hexdigit());
        while bytes.get(i).is_some_and(ok) {
            i += 1;
        }
        i
    };
    let is_digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    if text.starts_with("0x") && bytes.get(2).is_some_and(u8::is_ascii_hexdigit) {
        return digits(2, true);
    }
    let mut i = digits(0, false);
    if bytes.get(i) == Some(&b'.') {
        i = digits(i + 1, false);
    }
    if matches!(bytes.get(i), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(i + 1), Some(b'+' | b'-')));
        if is_digit(i + 1 + sign) {
            i = digits(i + 1 + sign, false);
        }
    }
    i
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spellings(text: &str) -> Vec<String> {
        let source = Source::new("<test>", text);
        let (tokens, errors) = tokens(&source);
        assert!(errors.is_empty(), "{errors:?}");
        tokens.iter().map(|t| text[t.span.start..t.span.end].to_string()).collect()
    }

    #[test]
    fn longest_spelling_wins_and_comments_vanish() {
        assert_eq!(
            spellings("a**-2.5e-3<=b # x\n//y\n.5"),
            ["a", "**", "-", "2.5e-3", "<=", "b", ".5", ""]
        );
        assert_eq!(spellings("0xff 1_000 2."), ["0xff", "1_000", "2.", ""]);
    }

    #[test]
    fn all_lexical_errors_are_reported() {
        let (_, errors) = tokens(&Source::new("<test>", "2x + $ + y @ 3"));
        let messages: Vec<_> = errors.iter().map(|e| e.message().to_string()).collect();
        assert_eq!(
            messages,
            [
                "`2x` is neither a number nor a name",
                "unexpected character `$`",
                "unexpected character `@`"
            ]
        );
    }
}
