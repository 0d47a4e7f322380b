//! Printing: plain text for people, JSON for programs, errors for both.

use serde_json::{Value, json};
use std::fmt;
use std::process::ExitCode;
use tilewright_base::{Error, Kind};

/// How results are printed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json }
    }

    /// Prints a result: `text` for people, `value` for programs.
    pub(crate) fn result(self, text: &str, value: &Value) {
        // A closed pipe (`tw ... | head`) ends the output quietly.
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        let text = if self.json { value.to_string() } else { text.trim_end().to_string() };
        let _ = writeln!(out, "{text}");
    }

    /// Prints an error and gives its exit code.
    pub(crate) fn error(self, error: &Error) -> ExitCode {
        if self.json {
            let span = error.span().map(
                |s| json!({"name": &*s.name, "start": s.start, "len": s.len, "label": s.label}),
            );
            let kind = match error.kind() {
                Kind::User => "user",
                Kind::Unsupported => "unsupported",
                Kind::Bug => "bug",
            };
            let value = json!({"error": {
                "kind": kind, "message": error.to_string(), "notes": error.notes(),
                "hint": error.hint(), "span": span,
            }});
            println!("{value}");
        }
        let report = Report(error);
        let handler = miette::GraphicalReportHandler::new_themed(theme()).with_width(100);
        let mut text = String::new();
        match handler.render_report(&mut text, &report) {
            Ok(()) => eprint!("{}", text.trim_start_matches('\n')),
            Err(_) => eprintln!("error: {error:?}"),
        }
        for note in error.notes() {
            eprintln!("  - {note}");
        }
        if error.kind() == Kind::Bug {
            eprintln!("  this is a bug of Tilewright; reproduce: {}", command_line());
        }
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(70))
    }
}

fn theme() -> miette::GraphicalTheme {
    use std::io::IsTerminal;
    if std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        miette::GraphicalTheme::unicode()
    } else {
        miette::GraphicalTheme::unicode_nocolor()
    }
}

/// The command as it was typed, quoted for a shell.
pub(crate) fn command_line() -> String {
    let quote = |a: String| {
        let plain = a.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=,:".contains(c));
        if plain && !a.is_empty() { a } else { format!("'{}'", a.replace('\'', "'\\''")) }
    };
    let words: Vec<String> =
        std::env::args_os().map(|a| quote(a.to_string_lossy().into_owned())).collect();
    words.join(" ")
}

/// Our error in the shape that the renderer wants.
#[derive(Debug)]
struct Report<'a>(&'a Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Report<'_> {}

impl miette::Diagnostic for Report<'_> {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.0.hint().map(|h| Box::new(h) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.0.span().map(|s| &*s.text as &str).map(|_| self as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = miette::LabeledSpan> + '_>> {
        let span = self.0.span()?;
        let label = miette::LabeledSpan::new(Some(span.label.clone()), span.start, span.len);
        Some(Box::new(std::iter::once(label)))
    }
}

impl miette::SourceCode for Report<'_> {
    fn read_span<'a>(
        &'a self,
        span: &miette::SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn miette::SpanContents<'a> + 'a>, miette::MietteError> {
        let source = self.0.span().ok_or(miette::MietteError::OutOfBounds)?;
        let inner = <str as miette::SourceCode>::read_span(&source.text, span, before, after)?;
        Ok(Box::new(miette::MietteSpanContents::new_named(
            source.name.to_string(),
            inner.data(),
            *inner.span(),
            inner.line(),
            inner.column(),
            inner.line_count(),
        )))
    }
}
