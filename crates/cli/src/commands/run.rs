//! `tw run`: a model on given or random inputs.

use super::{compile, inputs};
use crate::args::RunArgs;
use crate::npy;
use crate::output::Output;
use serde_json::json;
use std::fmt::Write as _;
use std::time::Instant;
use tilewright::Result;
use tilewright_base::Error;

pub(crate) fn run(args: &RunArgs, output: &Output) -> Result<()> {
    let start = Instant::now();
    let (model, compiled) = compile(&args.model)?;
    let inputs = inputs(&model, &args.inputs)?;
    let mut session = compiled.session()?;
    let results = session.run(&inputs)?;
    let first = start.elapsed().as_secs_f64();
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::user(format!("cannot make folder {}: {e}", folder.display())))?;
    }
    let mut text = String::new();
    let mut values = Vec::new();
    for ((name, _), tensor) in model.graph.outputs.iter().zip(&results) {
        let numbers = tensor.to_f64s();
        let finite = numbers.iter().copied().filter(|v| v.is_finite());
        let (low, high) = finite
            .clone()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let mean = finite.sum::<f64>() / numbers.len().max(1) as f64;
        let head: Vec<String> = numbers.iter().take(6).map(|v| format!("{v:.5}")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{name}: {}{:?}  min {low:.5}  mean {mean:.5}  max {high:.5}  [{}{}]",
            tensor.dtype(),
            tensor.shape(),
            head.join(", "),
            if numbers.len() > 6 { ", ..." } else { "" }
        );
        values.push(json!({
            "name": name, "dtype": tensor.dtype().name(), "shape": tensor.shape(),
            "min": low, "mean": mean, "max": high,
        }));
        if let Some(folder) = &args.output {
            let file: String = name
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' })
                .collect();
            npy::write(&folder.join(format!("{file}.npy")), tensor)?;
        }
    }
    let (hits, kernels) = compiled.cache_hits();
    let _ = writeln!(
        text,
        "from file to first result in {first:.3} s ({hits} of {kernels} kernels from the cache)"
    );
    output.result(
        &text,
        &json!({
            "outputs": values, "first_result_s": first, "kernels": kernels, "cache_hits": hits,
        }),
    );
    Ok(())
}
