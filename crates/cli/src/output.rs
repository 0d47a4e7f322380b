//! Printing: plain text for people, JSON for programs, errors for both.

use serde_json::{Value, json};
use std::cell::RefCell;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;
use tilewright_base::{Error, Kind, Result};

/// How results are printed.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    /// What went wrong while printing.
    failed: RefCell<Option<Error>>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json, failed: RefCell::new(None) }
    }

    /// Prints a result: `text` for people, `value` for programs.
    pub(crate) fn result(&self, text: &str, value: &Value) {
        let text = if self.json { value.to_string() } else { text.trim_end().to_string() };
        if let Err(e) = print_line(&text) {
            *self.failed.borrow_mut() = Some(Error::user(format!("cannot write the result: {e}")));
        }
    }

    /// Whether all that was printed arrived.
    pub(crate) fn finish(&self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Prints an error and gives its exit code.
    pub(crate) fn error(&self, error: &Error) -> ExitCode {
        let code = ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(70));
        if self.json {
            let span = error.span().map(
                |s| json!({"name": &*s.name, "start": s.start, "len": s.len, "label": s.label}),
            );
            let kind = match error.kind() {
                Kind::User => "user",
                Kind::Unsupported => "unsupported",
                Kind::Bug => "bug",
            };
            let mut value = json!({
                "kind": kind, "exit_code": error.exit_code(), "message": error.to_string(),
                "notes": error.notes(), "hint": error.hint(), "span": span,
            });
            if error.kind() == Kind::Bug {
                value["reproduce"] = json!(command_line());
            }
            // Nothing to be done when even this cannot be written.
            let _ = print_line(&json!({ "error": value }).to_string());
        }
        let report = Report(error);
        let handler = miette::GraphicalReportHandler::new_themed(theme()).with_width(100);
        let mut text = String::new();
        match handler.render_report(&mut text, &report) {
            Ok(()) => text = text.trim_start_matches('\n').to_string(),
            Err(_) => text = format!("error: {error:?}\n"),
        }
        for note in error.notes() {
            text += &format!("  - {note}\n");
        }
        if error.kind() == Kind::Bug {
            text += &format!("  this is a bug of Tilewright; reproduce: {}\n", command_line());
        }
        say(text.trim_end());
        code
    }
}

/// Prints a line to the standard output. A closed pipe (`tw ... | head`) ends it quietly.
fn print_line(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Prints a line to the standard error; when that is closed, nobody listens.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Turns while something takes long; gone when dropped.
pub(crate) struct Progress {
    done: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

/// How long something may take before a sign of life appears.
const PATIENCE: Duration = Duration::from_millis(600);

/// Shows `what` with the time that has passed, on a terminal only, once it takes long.
pub(crate) fn progress(what: String) -> Progress {
    let (done, wait) = mpsc::channel::<()>();
    let show = move || {
        if wait.recv_timeout(PATIENCE) != Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
        let bar = indicatif::ProgressBar::new_spinner().with_message(what).with_elapsed(PATIENCE);
        if let Ok(style) = indicatif::ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        // Ends when the sender is dropped.
        let _ = wait.recv();
        bar.finish_and_clear();
    };
    let thread = std::io::stderr().is_terminal().then(|| std::thread::spawn(show));
    Progress { done, thread }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let _ = self.done.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn theme() -> miette::GraphicalTheme {
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
