//! Which crate may depend on which. [`CRATES`] is the rule; `ARCHITECTURE.md` explains it.
//!
//! Rows stand in the order of the map, and a crate may only know crates of earlier rows, so the arrows
//! can never form a cycle. A new arrow is a decision: add it here and say why in the commit. Development
//! dependencies (tests) are free.

use super::{Problem, Repo};

/// A crate (its folder under `crates/`) and the project's crates it may depend on.
struct Row {
    name: &'static str,
    may_know: &'static [&'static str],
}

#[rustfmt::skip] // One row per crate.
const CRATES: &[Row] = &[
    Row { name: "base",       may_know: &[] },
    Row { name: "layout",     may_know: &["base"] },
    Row { name: "data",       may_know: &["base"] },
    Row { name: "expr",       may_know: &["base", "data"] },
    Row { name: "target",     may_know: &["base"] },
    Row { name: "cuda",       may_know: &["base", "data", "target"] },
    Row { name: "graph",      may_know: &["base", "layout", "data", "expr"] },
    Row { name: "tile",       may_know: &["base", "layout", "data", "expr"] },
    Row { name: "device",     may_know: &["base", "layout", "data", "expr", "tile"] },
    Row { name: "plan",       may_know: &["base", "layout", "data", "expr", "tile"] },
    Row { name: "interp",     may_know: &["base", "layout", "data", "expr", "graph", "tile", "device", "plan"] },
    Row { name: "import",     may_know: &["base", "layout", "data", "expr", "graph", "plan", "interp"] },
    Row { name: "text",       may_know: &["base", "data"] },
    Row { name: "passes",     may_know: &["base", "layout", "data", "expr", "graph", "interp"] },
    Row { name: "lower",      may_know: &["base", "layout", "data", "expr", "target", "graph", "tile", "plan"] },
    Row { name: "emit-llvm",  may_know: &["base", "layout", "data", "expr", "target", "tile", "plan"] },
    Row { name: "emit-triton", may_know: &["base", "layout", "data", "expr", "target", "tile"] },
    Row { name: "emit-cuda",  may_know: &["base", "layout", "data", "expr", "tile", "device"] },
    Row { name: "lower-gpu",  may_know: &["base", "layout", "data", "expr", "target", "tile", "device"] },
    Row { name: "kernels",    may_know: &["base", "layout", "expr", "target", "tile", "device", "emit-cuda", "lower-gpu"] },
    Row { name: "launch",     may_know: &["base", "layout", "data", "cuda", "tile", "device", "emit-cuda", "lower-gpu"] },
    Row { name: "runtime-gpu", may_know: &["base", "layout", "data", "target", "tile", "device", "plan", "interp", "cuda", "lower-gpu", "kernels", "launch"] },
    Row { name: "bench-gpu",  may_know: &["base", "layout", "data", "expr", "target", "cuda", "tile", "device", "emit-cuda", "lower-gpu", "kernels", "launch"] },
    Row { name: "tune",       may_know: &["base", "target", "cuda", "device", "kernels", "launch", "bench-gpu"] },
    Row { name: "jit",        may_know: &["base", "data", "expr", "target"] },
    Row { name: "runtime",    may_know: &["base", "layout", "data", "target", "tile", "plan", "jit"] },
    Row { name: "tilewright", may_know: &["base", "layout", "data", "expr", "target", "graph", "tile", "plan", "interp", "import", "text", "passes", "lower", "emit-llvm", "jit", "runtime", "cuda", "launch", "runtime-gpu"] },
    Row { name: "cli",        may_know: &["base", "layout", "data", "expr", "target", "graph", "tile", "plan", "interp", "import", "text", "passes", "lower", "emit-llvm", "emit-triton", "device", "emit-cuda", "lower-gpu", "kernels", "cuda", "launch", "bench-gpu", "tune", "jit", "runtime", "tilewright"] },
    Row { name: "torch-abi",  may_know: &["base"] },
    Row { name: "torch-ops",  may_know: &["base", "layout", "expr", "target", "graph", "tile", "device", "plan", "lower-gpu", "emit-triton", "cuda", "launch", "runtime-gpu", "tilewright", "torch-abi"] },
    Row { name: "xla-ffi",    may_know: &["base", "layout", "data", "graph", "cuda", "tilewright", "torch-ops"] },
    Row { name: "python",     may_know: &["base", "layout", "data", "graph", "tilewright", "torch-ops", "xla-ffi"] },
    Row { name: "conformance", may_know: &["base", "data", "graph", "interp", "import", "tilewright"] },
    Row { name: "testkit",    may_know: &["base", "layout", "data", "expr", "target", "graph", "tile", "plan", "interp", "import", "passes", "lower", "emit-llvm", "jit", "runtime", "tilewright"] },
];

const HERE: &str = "xtask/src/tidy/arrows.rs";
const PREFIX: &str = "tilewright-";

/// Whether a crate has a row.
pub(super) fn is_listed(name: &str) -> bool {
    CRATES.iter().any(|row| row.name == name)
}

/// The table itself only names crates of earlier rows.
pub(super) fn table_points_down(_repo: &Repo) -> Vec<Problem> {
    upward_rows(CRATES)
        .map(|(name, known)| {
            Problem::new(HERE, 0, format!("`{name}` knows `{known}`, which is not an earlier row"))
        })
        .collect()
}

fn upward_rows(rows: &[Row]) -> impl Iterator<Item = (&'static str, &'static str)> {
    rows.iter().enumerate().flat_map(move |(index, row)| {
        let earlier = &rows[..index];
        row.may_know
            .iter()
            .filter(|known| !earlier.iter().any(|e| e.name == **known))
            .map(|known| (row.name, *known))
            .collect::<Vec<_>>()
    })
}

/// Every crate is a row, and depends on nothing but what its row allows.
pub(super) fn crates_follow_the_table(repo: &Repo) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, text) in repo.manifests() {
        let path = format!("crates/{name}/Cargo.toml");
        let manifest = match text.parse::<toml::Table>() {
            Ok(manifest) => manifest,
            Err(error) => {
                problems.push(Problem::new(&path, 0, format!("does not parse: {error}")));
                continue;
            }
        };
        let Some(row) = CRATES.iter().find(|row| row.name == name) else {
            let hint = "add its row, in the order of ARCHITECTURE.md";
            problems.push(Problem::new(HERE, 0, format!("crate `{name}` is not listed: {hint}")));
            continue;
        };
        let package =
            if name == "tilewright" { name.to_owned() } else { format!("{PREFIX}{name}") };
        let declared = manifest.get("package").and_then(|p| p.get("name")).and_then(|n| n.as_str());
        if declared != Some(&package) {
            problems.push(Problem::new(&path, 0, format!("the package must be named `{package}`")));
        }
        for section in ["dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(|d| d.as_table()) else {
                continue;
            };
            for dependency in dependencies.keys() {
                let known = dependency.strip_prefix(PREFIX).unwrap_or(dependency);
                let is_ours = dependency.starts_with(PREFIX) || dependency == "tilewright";
                if is_ours && !row.may_know.contains(&known) {
                    let line = line_of(text, dependency);
                    let message = format!(
                        "`{name}` may not know `{known}`; if it must, add the arrow in {HERE} and say why"
                    );
                    problems.push(Problem::new(&path, line, message));
                }
            }
        }
    }
    problems
}

/// Every crate takes its lints from the workspace.
pub(super) fn manifests_use_workspace_lints(repo: &Repo) -> Vec<Problem> {
    let xtask = repo.text("xtask/Cargo.toml").map(|text| ("xtask/Cargo.toml".to_owned(), text));
    let crates = repo.manifests().map(|(name, text)| (format!("crates/{name}/Cargo.toml"), text));
    crates
        .chain(xtask)
        .filter(|(_, text)| {
            let manifest = text.parse::<toml::Table>().unwrap_or_default();
            let inherits = manifest.get("lints").and_then(|l| l.get("workspace"));
            inherits.and_then(|w| w.as_bool()) != Some(true)
        })
        .map(|(path, _)| Problem::new(&path, 0, "add `[lints]` with `workspace = true`"))
        .collect()
}

fn line_of(text: &str, key: &str) -> usize {
    text.lines().position(|line| line.starts_with(key)).map_or(0, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINTS: &str = "[lints]\nworkspace = true\n";

    fn manifest(name: &str, dependencies: &str) -> String {
        format!("[package]\nname = \"{name}\"\n{LINTS}[dependencies]\n{dependencies}")
    }

    #[test]
    fn the_committed_table_points_down() {
        assert_eq!(table_points_down(&Repo::default()), []);
    }

    #[test]
    fn a_row_that_knows_a_later_one_is_found() {
        let rows = [Row { name: "a", may_know: &["b"] }, Row { name: "b", may_know: &[] }];
        assert_eq!(upward_rows(&rows).collect::<Vec<_>>(), [("a", "b")]);
    }

    #[test]
    fn an_allowed_arrow_and_foreign_crates_pass() {
        let text =
            manifest("tilewright-layout", "tilewright-base.workspace = true\nlibm = \"1\"\n");
        let repo = Repo::of(&[("crates/layout/Cargo.toml", &text)]);
        assert_eq!(crates_follow_the_table(&repo), []);
    }

    #[test]
    fn an_upward_arrow_is_found_with_its_line() {
        let text = manifest("tilewright-base", "tilewright-graph.workspace = true\n");
        let repo = Repo::of(&[("crates/base/Cargo.toml", &text)]);
        let problems = crates_follow_the_table(&repo);
        assert_eq!(problems.len(), 1);
        assert_eq!((problems[0].path.as_str(), problems[0].line), ("crates/base/Cargo.toml", 6));
        assert!(problems[0].message.contains("`base` may not know `graph`"));
    }

    #[test]
    fn the_facade_counts_as_ours_and_dev_dependencies_are_free() {
        let text = format!(
            "{}[dev-dependencies]\ntilewright-interp.workspace = true\n",
            manifest("tilewright-base", "tilewright.workspace = true\n")
        );
        let repo = Repo::of(&[("crates/base/Cargo.toml", &text)]);
        assert_eq!(crates_follow_the_table(&repo).len(), 1);
    }

    #[test]
    fn unlisted_crates_wrong_names_and_broken_manifests_are_found() {
        let repo = Repo::of(&[
            ("crates/nobody/Cargo.toml", &manifest("tilewright-nobody", "")),
            ("crates/base/Cargo.toml", &manifest("base", "")),
            ("crates/expr/Cargo.toml", "[package"),
        ]);
        let messages: Vec<String> =
            crates_follow_the_table(&repo).iter().map(ToString::to_string).collect();
        assert_eq!(messages.len(), 3, "{messages:?}");
        assert!(messages.iter().any(|m| m.contains("`nobody` is not listed")));
        assert!(messages.iter().any(|m| m.contains("must be named `tilewright-base`")));
        assert!(messages.iter().any(|m| m.contains("does not parse")));
    }

    #[test]
    fn a_manifest_without_workspace_lints_is_found() {
        let with = manifest("tilewright-base", "");
        let repo = Repo::of(&[
            ("crates/base/Cargo.toml", &with),
            ("crates/expr/Cargo.toml", "[package]\nname = \"tilewright-expr\"\n"),
        ]);
        let problems = manifests_use_workspace_lints(&repo);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].path, "crates/expr/Cargo.toml");
    }
}
