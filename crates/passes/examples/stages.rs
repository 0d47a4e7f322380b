//! Prints an operator histogram of a model after each pass that changed something, and the times.
//!
//! `cargo run --release -p tilewright-passes --example stages -- model.onnx [--text STAGE]`
//!
//! With `--text STAGE` the graph after that stage follows (`end`: after the last).

use std::time::Instant;
use tilewright_base::{Error, Result};
use tilewright_graph::Graph;
use tilewright_passes::{Histogram, PIPELINE, PassContext, choose_layouts, run_observed};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or_else(|| Error::user("which model?"))?;
    let stage = args.iter().position(|a| a == "--text").and_then(|i| args.get(i + 1));
    let start = Instant::now();
    let mut graph = tilewright_import::onnx::load(path.as_ref())?;
    println!("import        {:8.1?}  {}", start.elapsed(), Histogram::of(&graph));
    let mut last = Histogram::of(&graph);
    let mut shown: Option<Graph> = None;
    let start = Instant::now();
    let report = run_observed(&mut graph, &PassContext::default(), PIPELINE, &mut |name, g| {
        let now = Histogram::of(g);
        if now != last {
            println!("{name:20} {now}");
            last = now;
        }
        if stage.is_some_and(|s| s == name) {
            shown = Some(g.clone());
        }
    })?;
    let total = start.elapsed();
    for s in &report.stages {
        println!(
            "{:20} {:2} rounds, {:2} changed, {:9.1?}, verify {:9.1?}",
            s.name, s.rounds, s.changes, s.time, s.verify_time
        );
    }
    println!("all passes {total:.1?}; unstable: {:?}", report.unstable);
    let start = Instant::now();
    let layouts = choose_layouts(&graph, &PassContext::default());
    println!("layouts: {} values, {:.1?}", layouts.len(), start.elapsed());
    if stage.is_some_and(|s| s == "end") {
        shown = Some(graph);
    }
    if let Some(g) = shown {
        println!("{g}");
    }
    Ok(())
}
