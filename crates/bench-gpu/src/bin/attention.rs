//! `tw-gpu-attention`: attention on this machine's GPU, tested against float64 or measured.
//!
//! `tw-gpu-attention test` runs every case of `attention.rs`; `bench` times the planner's first candidates on
//! cold tensors and prints one line of JSON each; `emit DIR` writes the CUDA text of what would be measured
//! (no GPU needed). The exit code is 1 when a result was wrong.

use clap::{Parser, Subcommand};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use tilewright_base::{DType, Error, Kind, Result, ResultExt};
use tilewright_bench_gpu::arms::planner_gpu;
use tilewright_bench_gpu::attention::{
    Case, MEASURED, Ours, Tensors, cases, compare, describe, programs, time,
};
use tilewright_bench_gpu::measure::quartiles;
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::{Gpu, Nvrtc, Stream};
use tilewright_kernels::attention::{Problem, Strides, plan};
use tilewright_kernels::gemm::Precision;
use tilewright_launch::Loader;

/// Attention on a GPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    what: What,
    /// Folder of compiled kernels; nothing is cached without.
    #[arg(long, global = true)]
    cache: Option<PathBuf>,
    /// Which GPU.
    #[arg(long, global = true, default_value_t = 0)]
    gpu: u32,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Against float64.
    Test {
        /// Only every n-th case.
        #[arg(long, default_value_t = 1)]
        every: usize,
        /// Unsupported cases count as failures.
        #[arg(long)]
        strict: bool,
        /// Only cases whose text contains this.
        #[arg(long)]
        filter: Option<String>,
    },
    /// Times.
    Bench {
        /// How many of the planner's candidates are timed.
        #[arg(long, default_value_t = 1)]
        candidates: usize,
        /// Only cases whose text contains this.
        #[arg(long)]
        filter: Option<String>,
        /// Samples of each.
        #[arg(long, default_value_t = 9)]
        samples: usize,
        /// Decoding steps (one query, long keys) instead of whole sequences.
        #[arg(long)]
        decode: bool,
        /// Which numbers: `bf16`, `f16`, `f32`, `tf32` (f32 whose operands are rounded).
        #[arg(long, default_value = "bf16")]
        types: String,
    },
    /// Writes CUDA text.
    Emit {
        /// Where to.
        folder: PathBuf,
        /// How many candidates of each.
        #[arg(long, default_value_t = 1)]
        candidates: usize,
        /// Only cases whose text contains this.
        #[arg(long)]
        filter: Option<String>,
        /// As for `bench`.
        #[arg(long, default_value = "bf16")]
        types: String,
    },
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::from(error.exit_code() as u8)
        }
    }
}

/// A type by its name, and whether operands are rounded to TF32.
fn numbers(name: &str) -> Result<(DType, Precision)> {
    match name {
        "bf16" => Ok((DType::BF16, Precision::F32)),
        "f16" => Ok((DType::F16, Precision::F32)),
        "f32" => Ok((DType::F32, Precision::F32)),
        "tf32" => Ok((DType::F32, Precision::Tf32)),
        _ => Err(Error::user(format!("no numbers called {name}: bf16, f16, f32 or tf32"))),
    }
}

fn measured(filter: Option<&str>, decode: bool, types: &str) -> Result<Vec<Case>> {
    let (dtype, precision) = numbers(types)?;
    let mut out = Vec::new();
    let whole = MEASURED.iter().filter(|_| !decode);
    for (batch, len) in whole {
        for depth in [64, 128] {
            for causal in [None, Some(0)] {
                let p = Problem::dense(*batch, 16, *len, depth, dtype);
                out.push(Case { problem: Problem { causal, precision, ..p } });
            }
        }
    }
    if decode {
        for (batch, heads, groups, rows, keys) in [
            (1, 32, 8, 1, 2048),
            (1, 32, 8, 1, 32768),
            (16, 32, 8, 1, 8192),
            (128, 32, 8, 1, 8192),
            (16, 32, 32, 1, 8192),
            (16, 32, 8, 4, 8192),
        ] {
            let strides = Strides::heads_first(groups, keys, 128);
            let p = Problem::dense(batch, heads, rows, 128, dtype);
            let p =
                Problem { precision, kv_heads: groups, kv_len: keys, k: strides, v: strides, ..p };
            let causal = (rows > 1).then_some(keys - rows);
            out.push(Case { problem: Problem { causal, ..p } });
        }
    }
    out.retain(|c| filter.is_none_or(|f| c.to_string().contains(f)));
    Ok(out)
}

fn run(options: &Options) -> Result<bool> {
    if let What::Emit { folder, candidates, filter, types } = &options.what {
        return emit(folder, *candidates, filter.as_deref(), types);
    }
    let gpu = Gpu::open(options.gpu)?;
    let nvrtc = Nvrtc::open(options.cache.as_deref())?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let loader = Loader::new(gpu, nvrtc);
    match &options.what {
        What::Test { every, strict, filter } => {
            let named = |c: &Case| filter.as_deref().is_none_or(|f| c.to_string().contains(f));
            let cases = cases().into_iter().filter(named).step_by((*every).max(1)).collect();
            test(&stream, &support, &loader, cases, *strict)
        }
        What::Bench { candidates, filter, samples, decode, types } => {
            let cases = measured(filter.as_deref(), *decode, types)?;
            bench(&stream, &support, &loader, &cases, *candidates, *samples)
        }
        What::Emit { .. } => Ok(true),
    }
}

fn test(
    stream: &Stream,
    support: &Support,
    loader: &Loader,
    cases: Vec<Case>,
    strict: bool,
) -> Result<bool> {
    let gpu = planner_gpu(loader.gpu());
    let plans: Vec<_> = cases.iter().map(|c| plan(&c.problem, &gpu, 1)).collect();
    let all: Vec<_> = plans
        .iter()
        .flatten()
        .filter_map(|p| p.first())
        .flat_map(|c| programs(c).unwrap_or_default())
        .collect();
    loader.load_all(&all);
    let (mut passed, mut failed, mut unsupported, mut worst) = (0, 0, 0, 0.0f64);
    for (case, plan) in cases.iter().zip(plans) {
        let candidate = match plan {
            Ok(mut candidates) if !candidates.is_empty() => candidates.remove(0),
            Ok(_) => continue,
            Err(e) if e.kind() == Kind::Unsupported => {
                println!("unsupported {case}: {e}");
                unsupported += 1;
                continue;
            }
            Err(e) => return Err(e),
        };
        let tensors = Tensors::new(stream, support, case, 7)?;
        let outcome = Ours::load(loader, stream, &candidate).and_then(|ours| {
            ours.bind(&tensors)?.launch(stream)?;
            stream.synchronize()?;
            compare(stream, case, &tensors, 400)
        });
        match outcome {
            Ok(Ok(ratio)) => {
                passed += 1;
                worst = worst.max(ratio);
            }
            Ok(Err(wrong)) => {
                failed += 1;
                println!("FAILED {case}: {wrong}; {}", describe(&candidate));
            }
            Err(error) => {
                failed += 1;
                println!("FAILED {case}: {error:?}; {}", describe(&candidate));
                // A fault ends everything.
                stream.synchronize()?;
            }
        }
    }
    println!(
        "attention: {passed} passed, {failed} failed, {unsupported} unsupported; largest error {worst:.2} of the model's"
    );
    Ok(failed == 0 && passed > 0 && (unsupported == 0 || !strict))
}

fn bench(
    stream: &Stream,
    support: &Support,
    loader: &Loader,
    cases: &[Case],
    candidates: usize,
    samples: usize,
) -> Result<bool> {
    let gpu = planner_gpu(loader.gpu());
    let mut right = true;
    let plans =
        cases.iter().map(|c| plan(&c.problem, &gpu, candidates)).collect::<Result<Vec<_>>>()?;
    let all: Vec<_> =
        plans.iter().flatten().flat_map(|c| programs(c).unwrap_or_default()).collect();
    loader.load_all(&all);
    for (case, plan) in cases.iter().zip(plans) {
        let sets = ((250e6 / case.bytes()).ceil() as usize).clamp(2, 64);
        let sets = (0..sets)
            .map(|i| Tensors::new(stream, support, case, 10 * i as u64 + 1))
            .collect::<Result<Vec<_>>>()?;
        for (index, candidate) in plan.iter().enumerate() {
            let ours = match Ours::load(loader, stream, candidate) {
                Ok(ours) => ours,
                Err(error) => {
                    println!("{case}: {error}; {}", describe(candidate));
                    right = false;
                    continue;
                }
            };
            let us = quartiles(&time(stream, &ours, &sets, samples)?);
            let checked = if index == 0 { compare(stream, case, &sets[0], 16)? } else { Ok(0.0) };
            let wrong = checked.err();
            right &= wrong.is_none();
            let line = json!({
                "case": case.to_string(),
                "candidate": index,
                "us": us,
                "tflops": case.flops() / us[1] / 1e6,
                "tb_per_s": case.bytes() / us[1] / 1e6,
                "estimate_us": candidate.estimate_us,
                "schedule": describe(candidate),
                "wrong": wrong,
            });
            println!("{line}");
        }
    }
    Ok(right)
}

fn emit(
    folder: &std::path::Path,
    candidates: usize,
    filter: Option<&str>,
    types: &str,
) -> Result<bool> {
    let gpu = tilewright_target::Gpu::h200();
    std::fs::create_dir_all(folder).map_err(|e| tilewright_base::Error::user(e.to_string()))?;
    for case in measured(filter, false, types)?.into_iter().chain(measured(filter, true, types)?) {
        let plan = plan(&case.problem, &gpu, candidates)?;
        for (index, candidate) in plan.iter().enumerate() {
            for (step, program) in programs(candidate)?.iter().enumerate() {
                let name = case.to_string().replace([' ', '/'], "_");
                let at = folder.join(format!("{name}_{index}_{step}.cu"));
                let text = tilewright_emit_cuda::emit(program)?.text;
                std::fs::write(&at, text)
                    .map_err(|e| tilewright_base::Error::user(e.to_string()))
                    .context(|| format!("writing {}", at.display()))?;
                println!("{}: {}", at.display(), candidate.steps[step].schedule);
            }
        }
    }
    Ok(true)
}
