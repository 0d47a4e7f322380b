//! Rules for the documentation: the map names every crate, lists are complete, links lead somewhere.

use super::{Problem, Repo};

const MAP: &str = "ARCHITECTURE.md";
const BOOK: &str = "docs/src/";
const SUMMARY: &str = "docs/src/SUMMARY.md";
const DECISIONS: &str = "docs/src/decisions/";
const DECISIONS_INDEX: &str = "docs/src/decisions/index.md";

/// Every crate has a row in the map's table, and the map has no row for a crate without arrows.
pub(super) fn crates_are_in_the_map(repo: &Repo) -> Vec<Problem> {
    let Some(map) = repo.text(MAP) else {
        return vec![Problem::new(MAP, 0, "is missing")];
    };
    let rows: Vec<(usize, &str)> = map
        .lines()
        .enumerate()
        .filter_map(|(index, line)| {
            Some((index + 1, line.strip_prefix("| `")?.split_once("` |")?.0))
        })
        .collect();
    let mut problems = Vec::new();
    for (name, _) in repo.manifests() {
        if !rows.iter().any(|(_, row)| *row == name) {
            problems.push(Problem::new(MAP, 0, format!("crate `{name}` has no row in the table")));
        }
    }
    for (line, row) in rows {
        // A row with a slash describes a folder.
        if !super::arrows::is_listed(row) && row != "xtask" && !row.ends_with('/') {
            problems.push(Problem::new(MAP, line, format!("there is no crate `{row}`")));
        }
    }
    problems
}

/// Every page of the book is in its table of contents.
pub(super) fn summary_lists_every_page(repo: &Repo) -> Vec<Problem> {
    listed(repo, BOOK, SUMMARY)
}

/// Every decision note is in the index of decisions.
pub(super) fn decisions_are_indexed(repo: &Repo) -> Vec<Problem> {
    listed(repo, DECISIONS, DECISIONS_INDEX)
}

fn listed(repo: &Repo, folder: &str, index_path: &str) -> Vec<Problem> {
    let pages: Vec<&str> = repo
        .with_suffix(".md")
        .map(|(path, _)| path)
        .filter(|path| path.starts_with(folder) && *path != index_path)
        .collect();
    let Some(index) = repo.text(index_path) else {
        if pages.is_empty() {
            return Vec::new();
        }
        return vec![Problem::new(index_path, 0, "is missing")];
    };
    let targets: Vec<String> =
        links(index).into_iter().filter_map(|(_, link)| resolve(index_path, &link)).collect();
    pages
        .into_iter()
        .filter(|page| !targets.iter().any(|target| target == page))
        .map(|page| Problem::new(index_path, 0, format!("does not list {page}")))
        .collect()
}

/// Links of Markdown files to files of this repository lead to a file or a folder.
pub(super) fn links_resolve(repo: &Repo) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in repo.with_suffix(".md") {
        for (line, link) in links(text) {
            let is_elsewhere = link.contains("://") || link.starts_with("mailto:");
            if is_elsewhere || link.starts_with('#') || link.is_empty() {
                continue;
            }
            let found = resolve(path, &link).is_some_and(|target| {
                let folder = format!("{target}/");
                target.is_empty()
                    || repo.files.contains_key(&target)
                    || repo.files.keys().any(|file| file.starts_with(&folder))
            });
            if !found {
                problems.push(Problem::new(path, line, format!("link to `{link}` leads nowhere")));
            }
        }
    }
    problems
}

/// The targets of `[text](target)` and `src="target"` outside code, with their line numbers.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_fence = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
            continue;
        }
        if in_fence || line.starts_with("    ") && !line.trim_start().starts_with(['-', '*']) {
            continue;
        }
        // Odd parts between back-quotes are code.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        for (opening, closing) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
            for part in prose.split(opening).skip(1) {
                if let Some((target, _)) = part.split_once(closing) {
                    let target = target.split_whitespace().next().unwrap_or("");
                    found.push((index + 1, target.to_owned()));
                }
            }
        }
    }
    found
}

/// The path, from the root, that a link in file `from` means; `None` when it leaves the repository.
fn resolve(from: &str, link: &str) -> Option<String> {
    let link = link.split('#').next().unwrap_or("");
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_and_rows_must_match_both_ways() {
        let map =
            "| crate | is for |\n|---|---|\n| `base` | x |\n| `gone` | x |\n| `demo/` | x |\n";
        let repo = Repo::of(&[
            (MAP, map),
            ("crates/base/Cargo.toml", ""),
            ("crates/graph/Cargo.toml", ""),
        ]);
        let messages: Vec<String> =
            crates_are_in_the_map(&repo).iter().map(ToString::to_string).collect();
        assert_eq!(
            messages,
            [
                "ARCHITECTURE.md: crate `graph` has no row in the table",
                "ARCHITECTURE.md:4: there is no crate `gone`",
            ]
        );
    }

    #[test]
    fn a_page_missing_from_the_summary_is_found() {
        let repo = Repo::of(&[
            (SUMMARY, "- [A](a.md)\n  - [C](decisions/0001-c.md)\n"),
            ("docs/src/a.md", ""),
            ("docs/src/b.md", ""),
            ("docs/src/decisions/0001-c.md", ""),
        ]);
        let problems = summary_lists_every_page(&repo);
        assert_eq!(problems, [Problem::new(SUMMARY, 0, "does not list docs/src/b.md")]);
        assert_eq!(decisions_are_indexed(&repo), [Problem::new(DECISIONS_INDEX, 0, "is missing")]);
    }

    #[test]
    fn links_to_missing_files_are_found_and_code_is_skipped() {
        let text = "[ok](docs/a.md#part) [dir](docs) [web](https://example.org)\n\
                    [bad](docs/b.md) `[code](c.md)`\n```\n[fenced](d.md)\n```\n";
        let repo =
            Repo::of(&[("README.md", text), ("docs/a.md", "[up](../README.md) [out](../../x)")]);
        let messages: Vec<String> = links_resolve(&repo).iter().map(ToString::to_string).collect();
        assert_eq!(
            messages,
            [
                "README.md:2: link to `docs/b.md` leads nowhere",
                "docs/a.md:1: link to `../../x` leads nowhere",
            ]
        );
    }
}
