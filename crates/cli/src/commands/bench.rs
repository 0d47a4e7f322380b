//! `tw bench`: times a model.

use super::{compile, inputs};
use crate::args::{BenchArgs, BenchWhat, NO_MODEL};
use crate::output::Output;
use serde_json::json;
use std::time::{Duration, Instant};
use tilewright::explain::time_text;
use tilewright::{Result, bench};
use tilewright_base::Error;

pub(crate) fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    if let Some(BenchWhat::Gemm(args)) = &args.what {
        return super::gemm::bench(args, output);
    }
    if args.model.model.as_os_str() == NO_MODEL {
        return Err(
            Error::user("no model was given").with_hint("tw bench MODEL, or tw bench gemm M N K")
        );
    }
    let start = Instant::now();
    let (model, compiled) = compile(&args.model)?;
    let inputs = inputs(&model, &args.inputs)?;
    compiled.session()?.run(&inputs)?;
    let first = start.elapsed().as_secs_f64();
    let limit = Duration::from_secs_f64(args.seconds.clamp(0.0, 86_400.0));
    let times = bench::time(&compiled, &inputs, args.warmup, args.runs, limit)?;
    let at = |q: f64| times.quantile(q).as_secs_f64();
    let text = format!(
        "{}: median {} (fastest {}, 90% within {}) over {} runs on {} threads; {} from file to first result",
        model.graph.name,
        time_text(at(0.5)),
        time_text(at(0.0)),
        time_text(at(0.9)),
        times.runs.len(),
        compiled.cpu().threads,
        time_text(first),
    );
    let json = json!({
        "model": model.graph.name, "median_ms": at(0.5) * 1e3, "min_ms": at(0.0) * 1e3,
        "p90_ms": at(0.9) * 1e3, "first_result_ms": first * 1e3,
        "runs": times.runs.len(), "threads": compiled.cpu().threads,
    });
    output.result(&text, &json);
    Ok(())
}
