//! Prints an operator histogram of a model after each pass that changed something, and the times.
//!
//! `cargo run --release -p tilewright-passes --example stages -- model.onnx [--text STAGE] [--check]`
//!
//! With `--text STAGE` the graph after that stage follows (`end`: after the last). With `--check`
//! the model runs in the interpreter (float64, slow) before and after, on small random inputs.

use std::time::Instant;
use tilewright_base::{Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_interp::Mode;
use tilewright_passes::{Histogram, PIPELINE, PassContext, choose_layouts, run_observed};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or_else(|| Error::user("which model?"))?;
    let stage = args.iter().position(|a| a == "--text").and_then(|i| args.get(i + 1));
    let start = Instant::now();
    let mut graph = tilewright_import::onnx::load(path.as_ref())?;
    println!("import        {:8.1?}  {}", start.elapsed(), Histogram::of(&graph));
    let original = graph.clone();
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
    if args.iter().any(|a| a == "--check") {
        check(&original, &graph)?;
    }
    if stage.is_some_and(|s| s == "end") {
        shown = Some(graph);
    }
    if let Some(g) = shown {
        println!("{g}");
    }
    Ok(())
}

/// Runs both and prints the largest difference. Sizes must be numbers.
fn check(before: &Graph, after: &Graph) -> Result<()> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    let mut inputs = Vec::new();
    for &v in &before.inputs {
        let ty = before.ty(v);
        let shape = ty.const_shape().ok_or_else(|| Error::user("an input has symbolic sizes"))?;
        let n: usize = shape.iter().product();
        // Integers are 0 or 1: indices and masks alike.
        let draw = |x: f64| if ty.dtype.is_float() { 2.0 * x - 1.0 } else { (2.0 * x).floor() };
        let values: Vec<f64> = (0..n).map(|_| draw(next())).collect();
        inputs.push(Tensor::from_f64s(ty.dtype, &shape, &values)?);
    }
    let start = Instant::now();
    let a = tilewright_interp::run(before, &inputs, Mode::F64)?;
    println!("interpreted before the passes in {:.1?}", start.elapsed());
    let start = Instant::now();
    let b = tilewright_interp::run(after, &inputs, Mode::F64)?;
    println!("interpreted after them in {:.1?}", start.elapsed());
    for ((name, _), (x, y)) in before.outputs.iter().zip(a.iter().zip(&b)) {
        let (x, y) = (x.to_f64s(), y.to_f64s());
        let size = x.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let worst = x.iter().zip(&y).fold(0.0f64, |m, (p, q)| m.max((p - q).abs()));
        println!("output `{name}`: largest value {size:.4}, largest difference {worst:.3e}");
    }
    Ok(())
}
