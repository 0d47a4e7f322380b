//! `cargo xtask tidy`: rules about the repository's shape, checked on the text of its files.
//!
//! Each check is a function from a [`Repo`] (paths and texts, in memory) to a list of [`Problem`]s, so a
//! test is a handful of files written in place. To add a check: write the function in the file of its
//! theme, with a test that sees it fail, and add it to [`CHECKS`].

mod arrows;
mod ci;
mod docs;
mod rust_files;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::Command;

/// The committed (and not ignored) text files: path relative to the root, with `/`, to text.
#[derive(Debug, Default)]
pub(crate) struct Repo {
    /// Text by path. Files that are not UTF-8 are in here with no text: they exist for links.
    pub(crate) files: BTreeMap<String, String>,
}

/// One broken rule at one place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Problem {
    path: String,
    line: usize,
    message: String,
}

impl Problem {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Problem { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: {}", self.path, self.message)
        } else {
            write!(f, "{}:{}: {}", self.path, self.line, self.message)
        }
    }
}

type Check = fn(&Repo) -> Vec<Problem>;

const CHECKS: &[Check] = &[
    arrows::table_points_down,
    arrows::crates_follow_the_table,
    arrows::manifests_use_workspace_lints,
    rust_files::heads,
    rust_files::lengths,
    rust_files::ffi_stays_in_its_crates,
    rust_files::unsafe_stays_in_its_places,
    docs::crates_are_in_the_map,
    docs::summary_lists_every_page,
    docs::decisions_are_indexed,
    docs::links_resolve,
    ci::workflows_run_our_commands,
    words::forbidden,
];

/// Runs every check; the result is sorted by path and line.
pub(crate) fn check(repo: &Repo) -> Vec<Problem> {
    let mut problems: Vec<Problem> = CHECKS.iter().flat_map(|check| check(repo)).collect();
    problems.sort();
    problems
}

impl Repo {
    /// Reads the working tree that contains this crate: tracked files, and new ones git does not ignore.
    pub(crate) fn from_git() -> Result<Self, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no parent directory")?;
        let output = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .map_err(|e| format!("git could not be started: {e}"))?;
        if !output.status.success() {
            return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr)));
        }
        let mut files = BTreeMap::new();
        for path in String::from_utf8_lossy(&output.stdout).split_terminator('\0') {
            // A file that was deleted but not yet from the index is no longer a file.
            if let Ok(bytes) = std::fs::read(root.join(path)) {
                files.insert(path.to_owned(), String::from_utf8(bytes).unwrap_or_default());
            }
        }
        Ok(Repo { files })
    }

    /// A repository made of these files, for tests.
    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|(p, t)| ((*p).to_owned(), (*t).to_owned())).collect();
        Repo { files }
    }

    fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(String::as_str)
    }

    fn with_suffix<'a>(&'a self, suffix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .iter()
            .filter(move |(path, _)| path.ends_with(suffix))
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// `base` and the text of `crates/base/Cargo.toml`, for every crate.
    fn manifests(&self) -> impl Iterator<Item = (&str, &str)> {
        self.with_suffix("/Cargo.toml").filter_map(|(path, text)| {
            let folder = path.strip_prefix("crates/")?.strip_suffix("/Cargo.toml")?;
            (!folder.contains('/')).then_some((folder, text))
        })
    }
}
