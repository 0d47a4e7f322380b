//! Rules for every `.rs` file: a head that says what it is, a length one can read, FFI in its place.

use super::{Problem, Repo};

/// A longer file usually holds a second room.
const MAX_LINES: usize = 1000;

/// Files that may be longer because they are tables (one row per thing), with the reason.
const TABLES: &[(&str, &str)] =
    &[("crates/emit-llvm/src/math.rs", "one elementary function after another, with coefficients")];

/// Crates that may declare foreign functions.
const FFI_CRATES: &[&str] = &["crates/cuda/", "crates/jit/", "crates/runtime/"];

/// Every file opens with `//!`: what it is, the convention it follows, how to add to it.
pub(super) fn heads(repo: &Repo) -> Vec<Problem> {
    repo.with_suffix(".rs")
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(path, _)| Problem::new(path, 1, "the file must open with a `//!` head"))
        .collect()
}

/// No file is longer than [`MAX_LINES`] unless [`TABLES`] says why; no entry there is out of date.
pub(super) fn lengths(repo: &Repo) -> Vec<Problem> {
    lengths_except(repo, TABLES)
}

fn lengths_except(repo: &Repo, tables: &[(&str, &str)]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in repo.with_suffix(".rs") {
        let n_lines = text.lines().count();
        if n_lines > MAX_LINES && !tables.iter().any(|(listed, _)| *listed == path) {
            let message = format!("{n_lines} lines (at most {MAX_LINES}): is there a second room?");
            problems.push(Problem::new(path, n_lines, message));
        }
    }
    for (path, _) in tables {
        let n_lines = repo.text(path).map_or(0, |text| text.lines().count());
        if n_lines <= MAX_LINES {
            problems.push(Problem::new(path, 0, "listed as a long table, but it is not long"));
        }
    }
    problems
}

/// `extern "C"` appears only in the crates that own the FFI.
pub(super) fn ffi_stays_in_its_crates(repo: &Repo) -> Vec<Problem> {
    let marker = concat!("extern ", "\"C\"");
    repo.with_suffix(".rs")
        .filter(|(path, _)| !FFI_CRATES.iter().any(|owner| path.starts_with(owner)))
        // Tests and examples call compiled kernels directly.
        .filter(|(path, _)| !path.contains("/tests/") && !path.contains("/examples/"))
        .flat_map(|(path, text)| {
            text.lines()
                .enumerate()
                .filter(|(_, line)| !line.trim_start().starts_with("//") && line.contains(marker))
                .map(|(index, _)| {
                    Problem::new(path, index + 1, "foreign functions belong in `cuda`, `jit` or `runtime`")
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_head_is_found() {
        let repo = Repo::of(&[("a.rs", "//! What it is.\n"), ("b.rs", "// What it is.\n")]);
        let problems = heads(&repo);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].path, "b.rs");
    }

    #[test]
    fn long_files_need_an_entry_and_entries_need_a_long_file() {
        let long = "//! x\n".repeat(MAX_LINES + 1);
        let repo = Repo::of(&[("long.rs", &long), ("short.rs", "//! x\n")]);
        assert_eq!(lengths_except(&repo, &[]).len(), 1);
        assert_eq!(lengths_except(&repo, &[("long.rs", "one row per operation")]), []);
        assert_eq!(
            lengths_except(&repo, &[("long.rs", "rows"), ("short.rs", "rows")])[0].path,
            "short.rs"
        );
    }

    #[test]
    fn foreign_functions_outside_their_crates_are_found() {
        let text = concat!("//! x\nunsafe extern ", "\"C\" {}\n");
        let repo = Repo::of(&[("crates/graph/src/a.rs", text), ("crates/jit/src/a.rs", text)]);
        let problems = ffi_stays_in_its_crates(&repo);
        assert_eq!(
            problems,
            [Problem::new("crates/graph/src/a.rs", 2, problems[0].message.clone())]
        );
    }
}
