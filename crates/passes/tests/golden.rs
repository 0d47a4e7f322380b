//! One rewrite per file: `golden/*.txt` holds the passes to run, a graph before and the graph after.
//!
//! The first line is `// passes: NAME, NAME`; a line `---` stands between before and after. Both
//! sides are also run in the interpreter on random inputs; `// sizes: N=3` gives symbols values.
//! `BLESS=1 cargo test -p tilewright-passes --test golden` writes what the passes give now: look at
//! the difference before you keep it.

mod common;
use common::*;
use std::path::Path;
use tilewright_graph::{Constants, Graph, verify};
use tilewright_layout::Env;

fn sizes(text: &str) -> Env {
    let line = text.lines().find_map(|l| l.strip_prefix("// sizes:")).unwrap_or("");
    line.split(',')
        .filter_map(|part| part.split_once('='))
        .map(|(name, value)| (name.trim().into(), value.trim().parse().expect("a number")))
        .collect()
}

#[test]
fn golden_files() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 8, "where are the files?");
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().to_string();
        let text = std::fs::read_to_string(&file).unwrap();
        let (before_text, expected) = text.split_once("---\n").unwrap_or((&text, ""));
        let passes: Vec<&str> = before_text
            .lines()
            .find_map(|l| l.strip_prefix("// passes:"))
            .unwrap_or_else(|| panic!("{name}: no passes"))
            .split(',')
            .map(str::trim)
            .collect();
        let before = Graph::parse_with(&name, before_text, Constants::Seeded(1))
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        verify(&before).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let after = rewritten(&before, &passes);
        same_within(&before, &after, &sizes(before_text), ROUNDED_CONSTANTS);
        let printed = after.to_string();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&file, format!("{before_text}---\n{printed}")).unwrap();
        } else if printed != expected {
            wrong.push(format!("{name}: expected\n{expected}\nfound\n{printed}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
