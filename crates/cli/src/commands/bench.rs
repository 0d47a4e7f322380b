//! `tw bench`: times a model.

use crate::args::{BenchArgs, BenchWhat, NO_MODEL};
use crate::output::Output;
use tilewright::Result;
use tilewright_base::Error;
#[cfg(feature = "cpu")]
use {
    serde_json::json,
    std::time::{Duration, Instant},
    tilewright::{bench, explain::time_text},
};

pub(crate) fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    if let Some(BenchWhat::Gemm(args)) = &args.what {
        return super::gemm::bench(args, output);
    }
    if args.model.model.as_os_str() == NO_MODEL {
        return Err(
            Error::user("no model was given").with_hint("tw bench MODEL, or tw bench gemm M N K")
        );
    }
    if super::on_gpu(&args.model)? {
        return super::gpu::bench(args, output);
    }
    on_cpu(args, output)
}

#[cfg(not(feature = "cpu"))]
use super::no_cpu as on_cpu;

#[cfg(feature = "cpu")]
fn on_cpu(args: &BenchArgs, output: &Output) -> Result<()> {
    let start = Instant::now();
    let (model, compiled) = super::compile(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
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
