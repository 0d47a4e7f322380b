//! The text-IR golden tests of graphs: `tests/graph/*.txt` in the repository's root.

use std::path::Path;
use tilewright_base::Error;
use tilewright_graph::{Constants, Graph, verify};
use tilewright_interp::{Mode, run};
use tilewright_testkit::golden;

#[test]
fn graph_goldens() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/graph");
    golden::check(&directory, "txt", |case| {
        let g = Graph::parse_with("input", &case.input, Constants::Seeded(1))?;
        verify(&g)?;
        match case.command.as_str() {
            "parse" => Ok(g.to_string()),
            "run exact" | "run f64" => {
                let mode = if case.command.ends_with("f64") { Mode::F64 } else { Mode::Exact };
                let outputs = run(&g, &[], mode)?;
                let lines =
                    g.outputs.iter().zip(&outputs).map(|((n, _), t)| format!("{n}: {t:?}\n"));
                Ok(lines.collect())
            }
            other => Err(Error::user(format!("unknown command `{other}`"))),
        }
    });
}
