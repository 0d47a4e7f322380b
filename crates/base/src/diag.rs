//! Errors for three audiences.
//!
//! | kind | whose fault | what it says | exit code |
//! |---|---|---|---|
//! | [`Kind::User`] | the user's input | their words, their file and place, a hint | 2 |
//! | [`Kind::Unsupported`] | nobody's: we cannot do it (yet) | everything unsupported at once | 3 |
//! | [`Kind::Bug`] | ours | stage, printed node, command that reproduces it | 70 |
//!
//! One struct carries all three, so that a crate needs no error enum of its own: nobody handles
//! these errors by case, they are shown to a person (or printed as JSON by the command line).

use std::fmt;
use std::sync::Arc;

/// Shorthand for a result with our [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The input is wrong.
    User,
    /// The input is right, and we cannot do it.
    Unsupported,
    /// A broken promise between our own stages.
    Bug,
}

impl Kind {
    /// The process exit code that reports this kind.
    pub fn exit_code(self) -> i32 {
        match self {
            Kind::User => 2,
            Kind::Unsupported => 3,
            Kind::Bug => 70,
        }
    }
}

/// A place in a text that the user wrote: shown with a caret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpan {
    /// What the text is called: a file name or `<expression>`.
    pub name: Arc<str>,
    /// The whole text.
    pub text: Arc<str>,
    /// First byte of the marked part.
    pub start: usize,
    /// Length of the marked part in bytes.
    pub len: usize,
    /// What is said under the caret.
    pub label: String,
}

#[derive(Clone, Debug)]
struct Inner {
    kind: Kind,
    message: String,
    context: Vec<String>,
    notes: Vec<String>,
    hint: Option<String>,
    span: Option<SourceSpan>,
}

/// An error to be shown to a person. Built in one line, refined with the `with_*` methods:
///
/// ```
/// use tilewright_base::Error;
/// let e = Error::user("input `ids` has 3 dimensions, the model takes 2")
///     .with_context("running model.onnx")
///     .with_hint("add a batch dimension");
/// assert_eq!(e.exit_code(), 2);
/// ```
#[derive(Clone)]
pub struct Error(Box<Inner>);

impl Error {
    fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            context: Vec::new(),
            notes: Vec::new(),
            hint: None,
            span: None,
        }))
    }

    /// The user's mistake.
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(Kind::User, message)
    }

    /// Right, but beyond what we do.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    /// Our bug.
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Kind::Bug, message)
    }

    /// Says what was being done; the outermost context is added last and shown first.
    #[must_use]
    pub fn with_context(mut self, context: impl Into<String>) -> Self {
        self.0.context.push(context.into());
        self
    }

    /// Adds one more finding: the second unsupported operator, the printed node.
    #[must_use]
    pub fn with_note(mut self, note: impl Into<String>) -> Self {
        self.0.notes.push(note.into());
        self
    }

    /// Says what the user can do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Points into the user's text.
    #[must_use]
    pub fn with_span(mut self, span: SourceSpan) -> Self {
        self.0.span = Some(span);
        self
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The sentence itself, without context.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Further findings.
    pub fn notes(&self) -> &[String] {
        &self.0.notes
    }

    /// The hint, if any.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The place in the user's text, if any.
    pub fn span(&self) -> Option<&SourceSpan> {
        self.0.span.as_ref()
    }

    /// What was being done, outermost first.
    pub fn context(&self) -> impl Iterator<Item = &str> {
        self.0.context.iter().rev().map(String::as_str)
    }

    /// The process exit code: 2, 3 or 70.
    pub fn exit_code(&self) -> i32 {
        self.0.kind.exit_code()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for context in self.context() {
            write!(f, "{context}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

/// The whole report: message, marked source, notes and hint.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        if let Some(span) = self.span() {
            let before = &span.text[..span.start.min(span.text.len())];
            let line_start = before.rfind('\n').map_or(0, |p| p + 1);
            let line_no = before.matches('\n').count() + 1;
            let line = span.text[line_start..].lines().next().unwrap_or("");
            let column = before[line_start..].chars().count();
            write!(f, "\n  --> {}:{}:{}\n   | {}\n   | ", span.name, line_no, column + 1, line)?;
            let carets = span.len.max(1).min(line.len().saturating_sub(column).max(1));
            write!(f, "{}{} {}", " ".repeat(column), "^".repeat(carets), span.label)?;
        }
        for note in self.notes() {
            write!(f, "\n  - {note}")?;
        }
        if let Some(hint) = self.hint() {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Adds context to a failed result: `read(path).context(|| format!("reading {path}"))`.
pub trait ResultExt<T> {
    /// Adds what was being done when it failed.
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.with_context(context()))
    }
}
