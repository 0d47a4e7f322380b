//! `tw run`: a model on given or random inputs.

use crate::args::RunArgs;
use crate::npy;
use crate::output::Output;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;
#[cfg(feature = "cpu")]
use std::time::Instant;
use tilewright::{Model, Result, Tensor};
use tilewright_base::Error;

pub(crate) fn run(args: &RunArgs, output: &Output) -> Result<()> {
    if super::on_gpu(&args.model)? {
        return super::gpu::run(args, output);
    }
    on_cpu(args, output)
}

#[cfg(not(feature = "cpu"))]
use super::no_cpu as on_cpu;

#[cfg(feature = "cpu")]
fn on_cpu(args: &RunArgs, output: &Output) -> Result<()> {
    let start = Instant::now();
    let (model, compiled) = super::compile(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let mut session = compiled.session()?;
    let results = session.run(&inputs)?;
    let first = start.elapsed().as_secs_f64();
    let (mut text, values) = describe(&model, &results, args.output.as_deref())?;
    let (hits, kernels) = compiled.cache_hits();
    // Writing to a string cannot fail.
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

/// A line and a JSON value per output; writes the outputs into the folder.
pub(crate) fn describe(
    model: &Model,
    results: &[Tensor],
    folder: Option<&Path>,
) -> Result<(String, Vec<Value>)> {
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::user(format!("cannot make folder {}: {e}", folder.display())))?;
    }
    let mut text = String::new();
    let mut values = Vec::new();
    for ((name, _), tensor) in model.graph.outputs.iter().zip(results) {
        let numbers = tensor.to_f64s();
        let finite = numbers.iter().copied().filter(|v| v.is_finite());
        let (low, high) = finite
            .clone()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let count = finite.clone().count();
        let mean = finite.sum::<f64>() / count as f64;
        let range = match count {
            0 => "nothing finite".to_owned(),
            _ => format!("min {low:.5}  mean {mean:.5}  max {high:.5}"),
        };
        let head: Vec<String> = numbers.iter().take(6).map(|v| format!("{v:.5}")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{name}: {}{:?}  {range}  [{}{}]",
            tensor.dtype(),
            tensor.shape(),
            head.join(", "),
            if numbers.len() > 6 { ", ..." } else { "" }
        );
        values.push(json!({
            "name": name, "dtype": tensor.dtype().name(), "shape": tensor.shape(),
            "min": low, "mean": mean, "max": high,
        }));
        if let Some(folder) = folder {
            let file: String = name
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' })
                .collect();
            npy::write(&folder.join(format!("{file}.npy")), tensor)?;
        }
    }
    Ok((text, values))
}
