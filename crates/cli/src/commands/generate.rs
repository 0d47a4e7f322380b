//! `tw generate`: continues a text (or tokens) with a decoder, on a CPU or a GPU.

use crate::args::GenerateArgs;
#[cfg(feature = "cpu")]
use crate::output::progress;
use crate::output::{Output, say};
use serde_json::json;
use std::fmt::Write as _;
use std::time::Instant;
use tilewright::explain::time_text;
use tilewright::generate::{
    Generated, GpuGeneratorOptions, GpuGeneratorPlan, MatrixForm, Request, Sampling, end_tokens,
};
use tilewright::gpu::{GpuDevice, ordinal};
use tilewright::verify::Report;
use tilewright::{DType, Result};
use tilewright_base::Error;

/// More sequences side by side are a mistake.
const MOST_SEQUENCES: usize = 1 << 20;

pub(crate) fn run(args: &GenerateArgs, output: &Output) -> Result<()> {
    let prompts = prompts(args)?;
    let request = Request {
        count: args.max_tokens,
        sampling: sampling(args)?,
        seed: args.seed,
        ends: if args.ignore_eos { Vec::new() } else { end_tokens(&args.model.model) },
        prompts,
    };
    let generated = match super::on_gpu(&args.model)? {
        true => on_gpu(args, &request, output)?,
        false => on_cpu(args, &request, output)?,
    };
    if let Some(generated) = generated {
        report(args, &request, &generated, output)?;
    }
    Ok(())
}

/// What the prompts are: tokens, or a text.
fn prompts(args: &GenerateArgs) -> Result<Vec<Vec<i64>>> {
    let number = |t: &str| {
        t.trim().parse().map_err(|_| Error::user(format!("`{t}` is not the number of a token")))
    };
    let one: Vec<i64> = match (&args.tokens, &args.prompt) {
        (Some(tokens), _) => tokens.split(',').map(number).collect::<Result<_>>()?,
        (None, Some(text)) => encoded(args, text)?,
        (None, None) => {
            return Err(Error::user("there is nothing to continue")
                .with_hint("give --prompt TEXT, or --tokens 1,2,3"));
        }
    };
    if args.batch > MOST_SEQUENCES {
        return Err(Error::user(format!("--batch {}: at most {MOST_SEQUENCES}", args.batch)));
    }
    Ok(vec![one; args.batch])
}

fn encoded(args: &GenerateArgs, text: &str) -> Result<Vec<i64>> {
    let tokenizer = tilewright_text::Tokenizer::open(&args.model.model, 1 << 20)?;
    Ok(tokenizer.encode(&[text])?.input_ids.to_i64s())
}

/// The text of tokens, where the directory has a tokenizer.
fn decoded(args: &GenerateArgs, tokens: &[i64]) -> Option<String> {
    let tokenizer = tilewright_text::Tokenizer::open(&args.model.model, 1 << 20).ok()?;
    let ids: Vec<u32> = tokens.iter().filter_map(|&t| u32::try_from(t).ok()).collect();
    tokenizer.decode(&ids).ok()
}

fn sampling(args: &GenerateArgs) -> Result<Option<Sampling>> {
    let limits = args.top_k.is_some() || args.top_p.is_some();
    if args.temperature == 0.0 && limits {
        return Err(Error::user("--top-k and --top-p have no effect without --temperature"));
    }
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::user(format!("--temperature {}", args.temperature)));
    }
    if args.top_k.is_some_and(|k| k < 1) {
        return Err(Error::user("--top-k leaves no token"));
    }
    if args.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        return Err(Error::user("--top-p is a probability above 0"));
    }
    let (temperature, top_k, top_p) = (args.temperature, args.top_k, args.top_p);
    Ok((temperature > 0.0).then_some(Sampling { temperature, top_k, top_p }))
}

/// Positions for which there is memory: what is asked for, or prompt and new tokens.
fn max_length(args: &GenerateArgs, request: &Request) -> i64 {
    let needed = request.prompts[0].len().saturating_add(request.count);
    args.max_length.unwrap_or_else(|| i64::try_from(needed).unwrap_or(i64::MAX))
}

/// The form of matrices.
fn matrices(args: &GenerateArgs) -> Result<MatrixForm> {
    let both = match args.activations.as_str() {
        "f32" => false,
        "int8" => true,
        other => {
            return Err(Error::user(format!("--activations {other}")).with_hint("f32 or int8"));
        }
    };
    let coded = |dtype: DType, usual: i64| match args.group.unwrap_or(usual) {
        group @ 1.. => Ok(MatrixForm::Codes { dtype, group, both }),
        group => Err(Error::user(format!("--group {group}"))),
    };
    let form = match args.weights.as_str() {
        "stored" => MatrixForm::Stored,
        "f32" => MatrixForm::Compute,
        "int8" => return coded(DType::I8, 128),
        "int4" => return coded(DType::I4, 32),
        other => {
            return Err(
                Error::user(format!("--weights {other}")).with_hint("stored, f32, int8 or int4")
            );
        }
    };
    if both {
        return Err(Error::user("--activations int8 without --weights int8 or int4"));
    }
    match args.group {
        None => Ok(form),
        Some(_) => Err(Error::user("--group has no effect without --weights int8 or int4")),
    }
}

#[cfg(feature = "cpu")]
fn on_cpu(args: &GenerateArgs, request: &Request, output: &Output) -> Result<Option<Generated>> {
    if args.explain {
        return Err(Error::unsupported("--explain of `tw generate` on a CPU")
            .with_hint("tw explain takes the model"));
    }
    let (compiler, matrices) = (super::compiler(&args.model)?, matrices(args)?);
    let (dir, random) = (&args.model.model, args.model.random_weights);
    let start = Instant::now();
    let mut generator = {
        let _progress = progress(format!("compiling {}", dir.display()));
        let longest = max_length(args, request);
        tilewright::generate::CpuGenerator::open(dir, &compiler, longest, matrices, random)?
    };
    say(&format!("ready after {}", time_text(start.elapsed().as_secs_f64())));
    if args.verify {
        let report = generator.verify(&request.prompts, dir, matrices, random)?;
        return verified(&report, output).map(|()| None);
    }
    // The first one finds cold caches and clocks.
    if args.warm {
        generator.generate(request)?;
    }
    let generated = generator.generate(request)?;
    let middle = request.prompts[0].len() + generated.steps / 2;
    let step = generator.step_bytes(request.prompts.len(), middle);
    let floor = step.bytes / step.bytes_per_s;
    if generated.steps == 0 {
        return Ok(Some(generated));
    }
    let took = generated.rest.as_secs_f64() / generated.steps as f64;
    say(&format!(
        "a step reads {:.1} MB, which takes {} at the {:.1} GB/s that {}: {:.0}% of that rate reached",
        step.bytes * 1e-6,
        time_text(floor),
        step.bytes_per_s * 1e-9,
        if step.measured { "`tw machine` measured" } else { "are guessed (`tw machine` measures)" },
        100.0 * floor / took.max(1e-12),
    ));
    Ok(Some(generated))
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(_: &GenerateArgs, _: &Request, _: &Output) -> Result<Option<Generated>> {
    Err(super::without_cpu())
}

fn on_gpu(args: &GenerateArgs, request: &Request, output: &Output) -> Result<Option<Generated>> {
    if matrices(args)? != MatrixForm::Stored {
        return Err(Error::unsupported(format!("--weights {} on a GPU", args.weights)));
    }
    let cache = if args.model.no_cache { None } else { super::cache_folder(&args.model) };
    let target = args.model.target.as_deref();
    let device = GpuDevice::open_as(ordinal(&args.model.device)?, cache.as_deref(), target)?;
    let stored = match args.model.precision.as_str() {
        "bf16" => Some(DType::BF16),
        "f16" => Some(DType::F16),
        _ => None,
    };
    let options = GpuGeneratorOptions {
        batch: i64::try_from(args.batch).unwrap_or(i64::MAX),
        max_length: max_length(args, request),
        stored,
        sampling: request.sampling,
        random_weights: args.model.random_weights,
    };
    let start = Instant::now();
    let dir = &args.model.model;
    let mut plan = GpuGeneratorPlan::open(dir, device.machine().clone(), &options)?;
    if args.many_kernels {
        plan = plan.in_launches()?;
    }
    let mut generator = plan.load(&device, !args.no_graph)?;
    let ready = start.elapsed().as_secs_f64();
    for warning in generator.decoding().machine().warnings() {
        say(&format!("warning: {warning}"));
    }
    if args.verify {
        let report = generator.verify(&request.prompts, dir, args.model.random_weights)?;
        return verified(&report, output).map(|()| None);
    }
    if args.explain {
        let explained = generator.explain(&request.prompts, 20)?;
        let value = serde_json::to_value(&explained).map_err(|e| Error::bug(e.to_string()))?;
        let text = format!("{}ready after {}\n", explained.text(), time_text(ready));
        output.result(&text, &value);
        return Ok(None);
    }
    // The first one finds cold caches and clocks.
    if args.warm {
        generator.generate(request)?;
    }
    generator.generate(request).map(Some)
}

fn verified(report: &Report, output: &Output) -> Result<()> {
    let worst = report.outputs.iter().map(|d| d.ratio).fold(0.0, f64::max);
    let prompts = report.outputs.iter().filter(|d| d.name.contains("prompt"));
    let prompts: Vec<(String, f64)> = prompts.map(|d| (d.name.clone(), d.ratio)).collect();
    let positions = report.outputs.len() - prompts.len();
    let mut text = format!(
        "{positions} positions, the worst at {worst:.3} of its budget: {}",
        if report.passed() { "passed" } else { "FAILED" },
    );
    // Writing to a string cannot fail.
    for (name, ratio) in &prompts {
        let _ = write!(text, "\n{name} at {ratio:.3}");
    }
    output.result(&text, &json!({"positions": positions, "worst": worst, "prompts": prompts}));
    match report.outputs.iter().find(|d| d.ratio > 1.0) {
        None => Ok(()),
        Some(bad) => Err(Error::bug(format!("{} is wrong: {:?}", bad.name, bad.first_bad))),
    }
}

fn report(
    args: &GenerateArgs,
    request: &Request,
    generated: &Generated,
    output: &Output,
) -> Result<()> {
    let mut text = String::new();
    for tokens in &generated.tokens {
        let line = decoded(args, tokens).unwrap_or_else(|| {
            let all: Vec<String> = tokens.iter().map(i64::to_string).collect();
            all.join(",")
        });
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    }
    let (prompt, rest) = (generated.prompt.as_secs_f64(), generated.rest.as_secs_f64());
    let step = rest / generated.steps.max(1) as f64;
    let batch = generated.tokens.len();
    let rate = (generated.steps > 0).then(|| batch as f64 / step.max(1e-12));
    let _ = write!(text, "{} tokens of prompt in {}", request.prompts[0].len(), time_text(prompt));
    if let Some(rate) = rate {
        let _ = write!(text, ", then {rate:.1} tokens/s ({} a step of {batch})", time_text(step));
    }
    text.push('\n');
    let value = json!({
        "tokens": generated.tokens, "prompt_s": prompt, "step_ms": step * 1e3,
        "steps": generated.steps, "tokens_per_s": rate,
    });
    output.result(&text, &value);
    Ok(())
}
