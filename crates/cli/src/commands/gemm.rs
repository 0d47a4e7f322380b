//! Matrix products on a GPU: `tw tune gemm`, `tw bench gemm`, `tw inspect gemm`.
//!
//! Inspecting needs no GPU, up to the CUDA text nothing at all: without `--device` it is for the H200, as data.

use crate::args::{BenchGemmArgs, InspectGemmArgs, KernelStage, TuneArgs, TuneWhat, TuningArgs};
use crate::output::{Output, progress, say};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tilewright::Result;
use tilewright_base::Error;
use tilewright_bench_gpu::arms::{
    Ours, PEER_ALGORITHMS, PEER_WORKSPACE_BYTES, Peer, describe, planner_gpu,
};
use tilewright_bench_gpu::case::Case;
use tilewright_bench_gpu::measure::{Measured, Sets, measure};
use tilewright_bench_gpu::record::Row;
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Arch, Gpu, Nvrtc};
use tilewright_emit_cuda::emit;
use tilewright_kernels::gemm::{Planned, Records, Source, plan_untuned, plan_with};
use tilewright_launch::{Loader, first_that_works, request};
use tilewright_lower_gpu::lower;
use tilewright_tune::command::tune_command;
use tilewright_tune::store::Store;

pub(crate) fn tune(args: &TuneArgs, output: &Output) -> Result<()> {
    let options = match &args.what {
        TuneWhat::Gemm(options) => options,
        #[cfg(feature = "cpu")]
        TuneWhat::Model(args) => return super::tune::model(args, output),
    };
    let cache = options.cache.clone().or_else(tilewright::cache_dir);
    let outcome = tune_command(options, cache.as_deref(), &mut |line| say(line))?;
    output.result(&outcome.table(), &outcome.json());
    Ok(())
}

/// Where files are kept.
fn cache(args: &TuningArgs) -> Option<PathBuf> {
    args.cache.cache.clone().or_else(tilewright::cache_dir)
}

/// A plan, after the records unless they are not wanted.
fn planned(
    case: &Case,
    gpu: &tilewright_target::Gpu,
    args: &TuningArgs,
    most: usize,
) -> Result<Planned> {
    let problem = case.problem();
    if args.untuned {
        let candidates = plan_untuned(&problem, gpu, most)?;
        return Ok(Planned { candidates, source: Source::Model, warnings: Vec::new() });
    }
    let folder = args.records.clone().or_else(|| cache(args).map(|c| Store::of_cache(&c)));
    let records = Records::shipped().clone();
    let records = folder.map_or(records.clone(), |folder| records.with_folder(folder));
    let planned = plan_with(&problem, gpu, most, &records)?;
    for warning in &planned.warnings {
        say(&format!("warning: {warning}"));
    }
    Ok(planned)
}

fn title(case: &Case) -> String {
    format!("{} {} {}", case.numbers.name, case.title(), case.orders_text())
}

pub(crate) fn inspect(args: &InspectGemmArgs, output: &Output) -> Result<()> {
    let cases = args.products.cases()?;
    let gpu = match args.tuning.device {
        Some(number) => planner_gpu(&Gpu::open(number)?),
        None => tilewright_target::Gpu::h200(),
    };
    let (mut text, mut values) = (String::new(), Vec::new());
    for case in &cases {
        let planned = planned(case, &gpu, &args.tuning, args.top.max(1))?;
        if args.emit == KernelStage::Schedule {
            let (lines, value) = schedules(case, &gpu, &planned);
            text += &lines;
            values.push(value);
            continue;
        }
        let first = planned.candidates.first();
        let steps = first.map(|c| c.steps.as_slice()).unwrap_or_default();
        let mut printed = Vec::new();
        for step in steps {
            let program = || lower(&step.kernel, &step.schedule);
            let stage = match args.emit {
                KernelStage::Tile | KernelStage::Schedule => step.kernel.to_string(),
                KernelStage::Device => program()?.to_string(),
                KernelStage::Cuda => emit(&program()?)?.text,
                KernelStage::Ptx => compiled(&program()?, &args.tuning)?.ptx().to_owned(),
                KernelStage::Sass => sass(compiled(&program()?, &args.tuning)?.cubin())?,
            };
            text += &stage;
            text.push('\n');
            let schedule = step.schedule.to_string();
            printed.push(json!({"kernel": step.kernel.name, "schedule": schedule, "text": stage}));
        }
        values.push(json!({
            "product": title(case), "source": planned.source.to_string(), "kernels": printed,
        }));
    }
    output.result(&text, &json!(values));
    Ok(())
}

/// The first candidates, and where the first one comes from.
fn schedules(case: &Case, gpu: &tilewright_target::Gpu, planned: &Planned) -> (String, Value) {
    let mut text = format!("{} on {}: {}\n", title(case), gpu.name, planned.source);
    let mut rows = Vec::new();
    for (at, candidate) in planned.candidates.iter().enumerate() {
        // The estimate of a tuned schedule is what the model wrongly thought of it: worth seeing.
        let us = candidate.estimate_us;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:>3}  {us:>9.2} us estimated  {}", at + 1, describe(candidate));
        rows.push(json!({
            "estimate_us": us, "schedule": describe(candidate), "steps": candidate.steps.len(),
            "workspace_bytes": candidate.workspace_bytes,
        }));
    }
    let record = match &planned.source {
        Source::Model => Value::Null,
        Source::Record(record) => json!(record),
    };
    let value = json!({
        "product": title(case), "gpu": gpu.name, "source": planned.source.to_string(),
        "record": record, "warnings": planned.warnings, "candidates": rows,
    });
    (text, value)
}

fn compiled(
    program: &tilewright_device::Program,
    args: &TuningArgs,
) -> Result<tilewright_cuda::Compiled> {
    let nvrtc = Nvrtc::open(cache(args).as_deref())?;
    nvrtc.compile(&request(program, &emit(program)?, Arch::SM_90A))
}

/// Machine code as text, through NVIDIA's disassembler.
fn sass(cubin: &[u8]) -> Result<String> {
    let tool = disassembler().ok_or_else(|| {
        Error::unsupported("nvdisasm was not found").with_hint(
            "it comes with the CUDA toolkit and the Python package nvidia-cuda-nvdisasm; $TILEWRIGHT_NVDISASM names it",
        )
    })?;
    let file = std::env::temp_dir().join(format!("tilewright-{}.cubin", std::process::id()));
    let failed = |e: std::io::Error| Error::user(format!("{}: {e}", tool.display()));
    std::fs::write(&file, cubin)
        .map_err(|e| Error::user(format!("{} cannot be written: {e}", file.display())))?;
    let ran = Command::new(&tool).arg(&file).output();
    let _ = std::fs::remove_file(&file);
    let ran = ran.map_err(failed)?;
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr).trim().to_owned();
        return Err(Error::unsupported(format!("{}: {said}", tool.display())));
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// NVIDIA's disassembler: what the environment names, on the path, in a toolkit, or beside NVRTC in its Python packages.
fn disassembler() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("TILEWRIGHT_NVDISASM").filter(|v| !v.is_empty()) {
        return Some(PathBuf::from(given));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.push("/usr/local/cuda/bin".into());
    if let Ok(nvrtc) = Nvrtc::open(None)
        && let Some(packages) = nvrtc.path().parent().and_then(|lib| lib.parent())
    {
        folders.push(packages.join("bin"));
    }
    folders.into_iter().map(|folder| folder.join("nvdisasm")).find(|tool| tool.is_file())
}

pub(crate) fn bench(args: &BenchGemmArgs, output: &Output) -> Result<()> {
    let cases = args.products.cases()?;
    if !(0.0..=3600.0).contains(&args.seconds) {
        return Err(Error::user(format!("{} is no number of seconds per product", args.seconds)));
    }
    let gpu = Gpu::open(args.tuning.device.unwrap_or(0))?;
    let nvrtc = Nvrtc::open(cache(&args.tuning).as_deref())?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let peer = CublasLt::open(&gpu);
    if let Err(error) = &peer {
        say(&format!("measuring without cuBLASLt: {}", error.message()));
    }
    let peer = peer.ok();
    let workspace = stream.alloc(PEER_WORKSPACE_BYTES)?;
    let target = planner_gpu(&gpu);
    let loader = Loader::new(gpu, nvrtc);
    let (mut text, mut values) = (String::new(), Vec::new());
    for case in &cases {
        let _progress = progress(format!("measuring {}", title(case)));
        let planned = planned(case, &target, &args.tuning, PEER_ALGORITHMS)?;
        let sets = Sets::new(&stream, &support, case)?;
        let theirs = peer.as_ref().and_then(|peer| Peer::new(peer, &loader, case, &workspace).ok());
        let budget = Duration::from_secs_f64(args.seconds);
        let taken = first_that_works(&planned.candidates, |candidate| {
            let ours = Ours::load(&loader, &stream, candidate)?;
            let measured = measure(&stream, &support, &sets, &ours, theirs.as_ref(), budget)?;
            Ok((measured, describe(candidate)))
        })?;
        for failure in &taken.failures {
            say(&format!("warning: a schedule gave way: {failure}"));
        }
        let (measured, plan) = taken.value;
        let (lines, value) = report(case, &target, &planned.source, measured, plan);
        text += &lines;
        values.push(value);
    }
    output.result(&text, &json!(values));
    Ok(())
}

/// What was measured, for people and for programs.
fn report(
    case: &Case,
    gpu: &tilewright_target::Gpu,
    source: &Source,
    measured: Measured,
    plan: String,
) -> (String, Value) {
    let rate = |us: f64| case.operations() / us / 1e6;
    // Of the units that multiply these numbers, at the sustained clock of the time model.
    let clocks = f64::from(gpu.sms) * gpu.model.clock_ghz / 1e3;
    let plain = case.numbers.operand.size() == 4 && case.numbers.name == "f32";
    let per_clock = if plain {
        gpu.f32_flops_per_clock
    } else {
        gpu.tensor_flops_per_clock * 2.0 / case.numbers.operand.size() as f64
    };
    let peak = clocks * per_clock;
    let share = |us: f64| 100.0 * rate(us) / peak;
    let us = measured.ours.us;
    let mut text = format!(
        "{}\n  ours      {:>9.2} us  {:>7.1} TFLOP/s  {:>4.1}% of the units' peak  error {:.2e}\n",
        title(case),
        us[1],
        rate(us[1]),
        share(us[1]),
        measured.ours.accuracy.errors[1]
    );
    let mut value = json!({
        "product": title(case), "us": us, "tflops": rate(us[1]), "percent_of_peak": share(us[1]),
        "peak_tflops": peak, "error": measured.ours.accuracy.errors[1], "schedule": plan, "source": source.to_string(),
    });
    // Writing to a string cannot fail.
    if let (Some(peer), Some(ratio)) = (&measured.peer, measured.ratio) {
        let theirs = peer.arm.us[1];
        let _ = writeln!(
            text,
            "  cuBLASLt  {theirs:>9.2} us  {:>7.1} TFLOP/s  {:>4.1}%{:>19}  error {:.2e}  (best of {} algorithms)\n  ratio     {:.3} ({:.3} to {:.3}) of its time",
            rate(theirs),
            share(theirs),
            "",
            peer.arm.accuracy.errors[1],
            peer.algorithms,
            ratio[1],
            ratio[0],
            ratio[2]
        );
        value["cublaslt_us"] = json!(peer.arm.us);
        value["cublaslt_tflops"] = json!(rate(theirs));
        value["cublaslt_error"] = json!(peer.arm.accuracy.errors[1]);
        value["latency_ratio"] = json!(ratio);
    }
    let _ = writeln!(text, "  schedule  {plan}\n            {source}");
    let row = Row {
        case: *case,
        plan,
        candidate: 0,
        failures: Vec::new(),
        outcome: Ok(measured),
        peer_missing: None,
        tuned: None,
    };
    if let Some(problem) = row.problem() {
        let _ = writeln!(text, "  WRONG     {problem}");
        value["problem"] = json!(problem);
    }
    (text, value)
}
