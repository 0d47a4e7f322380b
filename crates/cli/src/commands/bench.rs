//! `tw bench`: times a model.

use super::{compile, inputs};
use crate::args::BenchArgs;
use crate::output::Output;
use serde_json::json;
use std::time::Duration;
use tilewright::explain::time_text;
use tilewright::{Result, bench};

pub(crate) fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    let (model, compiled) = compile(&args.model)?;
    let inputs = inputs(&model, &args.inputs)?;
    let limit = Duration::from_secs_f64(args.seconds.clamp(0.0, 86_400.0));
    let times = bench::time(&compiled, &inputs, args.warmup, args.runs, limit)?;
    let at = |q: f64| times.quantile(q).as_secs_f64();
    let text = format!(
        "{}: median {} (fastest {}, 90% within {}) over {} runs on {} threads",
        model.graph.name,
        time_text(at(0.5)),
        time_text(at(0.0)),
        time_text(at(0.9)),
        times.runs.len(),
        compiled.cpu().threads,
    );
    let json = json!({
        "model": model.graph.name, "median_s": at(0.5), "min_s": at(0.0), "p90_s": at(0.9),
        "runs": times.runs.len(), "threads": compiled.cpu().threads,
    });
    output.result(&text, &json);
    Ok(())
}
