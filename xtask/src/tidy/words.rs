//! Text that must not be committed: paths of one machine, hosts of one network, unfinished marks.
//!
//! The needles are written in pieces so that this file does not contain what it looks for.

use super::{Problem, Repo};

/// What must not appear, and what to do instead.
#[rustfmt::skip] // One row per needle.
const FORBIDDEN: &[(&str, &str)] = &[
    (concat!("/ho", "me/"),             "a path of one machine: use a path relative to the repository"),
    (concat!("/wo", "rk/"),             "a path of one machine: use a path relative to the repository"),
    (concat!("/Use", "rs/"),            "a path of one machine: use a path relative to the repository"),
    (concat!("/t", "mp/"),              "a fixed temporary path: ask the system for a temporary directory"),
    (concat!("../sha", "red"),          "a path outside the repository"),
    (concat!("py", "pi.org"),           "a registry's host: leave it to the user's configuration"),
    (concat!("python", "hosted.org"),   "a registry's host: leave it to the user's configuration"),
    (concat!("registry.", "npmjs"),     "a registry's host: leave it to the user's configuration"),
    (concat!("deb.", "debian.org"),     "a registry's host: leave it to the user's configuration"),
    (concat!("static.", "crates.io"),   "a registry's host: leave it to the user's configuration"),
    (concat!("FIX", "ME"),              "finish it, or make it a clear error that names what is unsupported"),
    (concat!("<<<<", "<<< "),           "a merge conflict"),
    (concat!(">>>>", ">>> "),           "a merge conflict"),
];

/// No committed text contains one of the needles.
pub(super) fn forbidden(repo: &Repo) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in &repo.files {
        for (needle, instead) in FORBIDDEN {
            // Most files contain none: look at the whole text first.
            if !text.contains(needle) {
                continue;
            }
            for (index, line) in text.lines().enumerate() {
                if line.contains(needle) {
                    problems.push(Problem::new(path, index + 1, format!("`{needle}`: {instead}")));
                }
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_needle_is_found_with_its_line() {
        for (needle, _) in FORBIDDEN {
            let repo = Repo::of(&[("a.md", &format!("fine\nsee {needle}x\n"))]);
            let problems = forbidden(&repo);
            assert_eq!(problems.len(), 1, "{needle}");
            assert_eq!(problems[0].line, 2);
        }
    }

    #[test]
    fn this_file_is_clean() {
        let repo = Repo::of(&[("words.rs", include_str!("words.rs"))]);
        assert_eq!(forbidden(&repo), []);
    }
}
