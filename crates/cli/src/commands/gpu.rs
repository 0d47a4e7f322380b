//! Commands on a GPU: `tw run|verify|bench|explain --device cuda`.

use super::verify::running;
use crate::args::{BenchArgs, ExplainArgs, ModelArgs, RunArgs, VerifyArgs};
use crate::output::{Output, progress, say};
use serde_json::json;
use std::fmt::Write as _;
use std::time::{Duration, Instant};
use tilewright::bench::Times;
use tilewright::explain::{bytes_text, time_text};
use tilewright::gpu::{GpuCompiler, GpuDevice, GpuModel, RunReport, Session, ordinal};
use tilewright::verify::Report;
use tilewright::{Choice, Model, Result};
use tilewright_base::Error;
use tilewright_data::Tensor;
use tilewright_graph::Graph;

/// Reads the model, plans it and copies its weights to the device.
fn load(args: &ModelArgs) -> Result<(Model, GpuModel)> {
    let device = open(args)?;
    let model = super::open(args)?;
    let loaded = plan(args, &device, model.graph.clone())?;
    Ok((model, loaded))
}

/// Plans a graph and copies its weights to the device.
pub(crate) fn load_graph(args: &ModelArgs, graph: Graph) -> Result<GpuModel> {
    plan(args, &open(args)?, graph)
}

fn open(args: &ModelArgs) -> Result<GpuDevice> {
    let cache = if args.no_cache { None } else { super::cache_folder(args) };
    GpuDevice::open_as(ordinal(&args.device)?, cache.as_deref(), args.target.as_deref())
}

fn plan(args: &ModelArgs, device: &GpuDevice, graph: Graph) -> Result<GpuModel> {
    let mut compiler = GpuCompiler::new(device.machine().clone());
    compiler.fold = !args.no_fold;
    compiler.fold_operands = args.fold_operands;
    if args.no_fusion {
        compiler.fusion = Choice::Apart;
    }
    compiler.precision = args.precision.parse().map_err(Error::user)?;
    let _progress = progress(format!("planning {}", graph.name));
    device.load(compiler.plan(graph)?)
}

/// Says what does not run on the device, and what did not go as planned.
pub(crate) fn warn(report: &RunReport) {
    for warning in &report.warnings {
        say(&format!("warning: {warning}"));
    }
    if let Some((step, reason)) = report.host_steps.first() {
        let more = report.host_steps.len();
        say(&format!("{more} steps run on the host, the first is {step}: {reason}"));
    }
}

fn summary(report: &RunReport) -> String {
    format!(
        "{} launches in {} graphs, {} steps on the host",
        report.launches,
        report.graphs,
        report.host_steps.len()
    )
}

pub(crate) fn run(args: &RunArgs, output: &Output) -> Result<()> {
    let start = Instant::now();
    let (model, loaded) = load(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let mut session = loaded.session()?;
    let results = session.run(&inputs)?;
    let first = start.elapsed().as_secs_f64();
    let report = session.report(&inputs)?;
    warn(&report);
    let (mut text, values) = super::run::describe(&model, &results, args.output.as_deref())?;
    // Writing to a string cannot fail.
    let _ = writeln!(text, "from file to first result in {first:.3} s; {}", summary(&report));
    output.result(
        &text,
        &json!({
            "outputs": values, "first_result_s": first, "launches": report.launches,
            "graphs": report.graphs, "host_steps": report.host_steps,
        }),
    );
    Ok(())
}

pub(crate) fn verify(args: &VerifyArgs) -> Result<Report> {
    let (model, loaded) = load(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let _progress = running(&model.graph.name);
    loaded.verify(&model.graph, &inputs)
}

pub(crate) fn bench(args: &BenchArgs, output: &Output) -> Result<()> {
    let start = Instant::now();
    let (model, loaded) = load(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let mut session = loaded.session()?.with_graphs(!args.no_graph);
    session.run(&inputs)?;
    let first = start.elapsed().as_secs_f64();
    warn(&session.report(&inputs)?);
    let name = &model.graph.name;
    if !args.turns {
        return measure(args, output, name, &mut session, &inputs, first);
    }
    output.result("ready", &json!({ "ready": true, "first_result_ms": first * 1e3 }));
    for line in std::io::stdin().lines() {
        line.map_err(|e| Error::user(format!("cannot read standard input: {e}")))?;
        measure(args, output, name, &mut session, &inputs, first)?;
    }
    Ok(())
}

/// One result of `tw bench`.
fn measure(
    args: &BenchArgs,
    output: &Output,
    name: &str,
    session: &mut Session,
    inputs: &[Tensor],
    first: f64,
) -> Result<()> {
    let report = session.report(inputs)?;
    let mut runs = Vec::new();
    let mut whole = Vec::new();
    let begin = Instant::now();
    let mut warmup = args.warmup;
    while runs.len() < args.runs.max(3)
        && (runs.len() < 3 || begin.elapsed().as_secs_f64() < args.seconds)
    {
        let some = (args.runs.max(3) - runs.len()).min(10);
        let times = session.times_us(inputs, warmup, some)?;
        warmup = 0;
        runs.extend(times.into_iter().map(|t| Duration::from_secs_f64(t * 1e-6)));
        let one = Instant::now();
        session.run(inputs)?;
        whole.push(one.elapsed());
    }
    let (device, whole) = (Times { runs }, Times { runs: whole });
    let at = |q: f64| device.quantile(q).as_secs_f64();
    let memory = session.memory(inputs)?;
    let total = memory.constant_bytes + memory.arena_bytes + memory.workspace_bytes;
    let text = format!(
        "{name}: median {} on the device (fastest {}, 90% within {}) over {} runs, {} with copies from and to the host; {}; memory {} ({} of it weights); {} from file to first result",
        time_text(at(0.5)),
        time_text(at(0.0)),
        time_text(at(0.9)),
        device.runs.len(),
        time_text(whole.median().as_secs_f64()),
        summary(&report),
        bytes_text(total as f64),
        bytes_text(memory.constant_bytes as f64),
        time_text(first),
    );
    let json = json!({
        "model": name, "median_ms": at(0.5) * 1e3, "min_ms": at(0.0) * 1e3,
        "p90_ms": at(0.9) * 1e3, "with_copies_ms": whole.median().as_secs_f64() * 1e3,
        "first_result_ms": first * 1e3, "runs": device.runs.len(), "launches": report.launches,
        "graphs": report.graphs, "host_steps": report.host_steps,
        "memory_bytes": total, "weight_bytes": memory.constant_bytes,
        "arena_bytes": memory.arena_bytes, "workspace_bytes": memory.workspace_bytes,
    });
    output.result(&text, &json);
    Ok(())
}

pub(crate) fn explain(args: &ExplainArgs, output: &Output) -> Result<()> {
    let (model, loaded) = load(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let report = loaded.explain(&inputs, args.runs)?;
    let mut text = report.text(args.top);
    if args.groups {
        text += &format!("\n{}", loaded.planned().fusion());
    } else {
        text += &format!("fusion: {}\n", loaded.planned().fusion().summary());
    }
    if let Some(file) = &args.html {
        crate::npy::write_whole(file, tilewright::html::gpu_page(&report).as_bytes())?;
        text += &format!("\nwrote {}", file.display());
    }
    let value = serde_json::to_value(&report).map_err(|e| Error::bug(e.to_string()))?;
    output.result(&text, &value);
    Ok(())
}
