//! Golden tests: text files with input and expected output side by side.
//!
//! ```text
//! ==== what is shown here: command
//! input
//! ----
//! expected output
//! ```
//!
//! A file holds any number of such cases; text before the first is for the reader. With the
//! environment variable `TW_BLESS=1` the expected parts are rewritten: look at the diff.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use tilewright_base::Error;

/// One case of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// What is shown.
    pub title: String,
    /// What to do with the input; what follows the last colon of the title line.
    pub command: String,
    /// The input.
    pub input: String,
    /// What should come out.
    pub expected: String,
}

/// A file's heading and its cases.
fn split(text: &str) -> (String, Vec<Case>) {
    let (mut heading, mut cases) = (String::new(), Vec::<Case>::new());
    let mut in_expected = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("==== ") {
            let (title, command) = title.rsplit_once(':').unwrap_or((title, ""));
            let [title, command] = [title, command].map(|s| s.trim().to_string());
            cases.push(Case { title, command, input: String::new(), expected: String::new() });
            in_expected = false;
            continue;
        }
        let part = match cases.last_mut() {
            None => &mut heading,
            Some(_) if line == "----" && !in_expected => {
                in_expected = true;
                continue;
            }
            Some(case) if in_expected => &mut case.expected,
            Some(case) => &mut case.input,
        };
        part.push_str(line);
        part.push('\n');
    }
    (heading, cases)
}

/// Blank lines at the end are for the reader.
fn trimmed(text: &str) -> &str {
    text.trim_end()
}

fn join(heading: &str, cases: &[Case]) -> String {
    let mut out = heading.to_string();
    for case in cases {
        let command =
            if case.command.is_empty() { String::new() } else { format!(": {}", case.command) };
        let (input, expected) = (trimmed(&case.input), trimmed(&case.expected));
        let _ = write!(out, "==== {}{command}\n{input}\n----\n{expected}\n\n", case.title);
    }
    let len = out.trim_end().len();
    out.truncate(len);
    out.push('\n');
    out
}

/// Runs every case of every file in `directory` with this extension; an error is expected output
/// too: its whole report.
///
/// # Panics
/// With a report of every case that differs, when there is one, and when there are no files.
pub fn check(directory: &Path, extension: &str, run: impl Fn(&Case) -> Result<String, Error>) {
    let bless = std::env::var_os("TW_BLESS").is_some_and(|v| v == "1");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no .{extension} files in {}", directory.display());
    let mut report = String::new();
    for file in files {
        let text =
            std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let (heading, mut cases) = split(&text);
        for case in &mut cases {
            let got = run(case).unwrap_or_else(|e| format!("error: {e:?}\n"));
            if trimmed(&got) == trimmed(&case.expected) {
                continue;
            }
            let _ = writeln!(report, "{}: {}", file.display(), case.title);
            let _ = writeln!(report, "{}", first_difference(&case.expected, &got));
            case.expected = got;
        }
        let blessed = join(&heading, &cases);
        if bless && blessed != text {
            std::fs::write(&file, blessed).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
    }
    assert!(bless || report.is_empty(), "{report}run again with TW_BLESS=1 to accept");
}

fn first_difference(expected: &str, got: &str) -> String {
    let (mut a, mut b) = (trimmed(expected).lines(), trimmed(got).lines());
    let mut number = 1;
    loop {
        match (a.next(), b.next()) {
            (Some(x), Some(y)) if x == y => number += 1,
            (x, y) => {
                let show = |s: Option<&str>| s.unwrap_or("(nothing)").to_string();
                return format!("  line {number}:\n  - {}\n  + {}", show(x), show(y));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_split_and_join() {
        let text =
            "About this file.\n\n==== one: parse twice\na\nb\n----\nc\n\n==== two\nd\n----\n";
        let (heading, cases) = split(text);
        assert_eq!(cases.len(), 2);
        assert_eq!((&*cases[0].title, &*cases[0].command), ("one", "parse twice"));
        assert_eq!((&*cases[0].input, trimmed(&cases[0].expected)), ("a\nb\n", "c"));
        assert_eq!(split(&join(&heading, &cases)).1[0].input, "a\nb\n");
        assert_eq!(first_difference("x\ny\n", "x\nz\n"), "  line 2:\n  - y\n  + z");
    }

    #[test]
    fn a_wrong_expectation_fails() {
        let directory = std::env::temp_dir().join(format!("golden-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("a.txt"), "==== upper\nabc\n----\nABC\n").unwrap();
        check(&directory, "txt", |case| Ok(case.input.to_uppercase()));
        let wrong = std::panic::catch_unwind(|| check(&directory, "txt", |c| Ok(c.input.clone())));
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(wrong.is_err() || std::env::var_os("TW_BLESS").is_some());
    }
}
