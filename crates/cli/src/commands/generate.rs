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
    Generated, GpuGeneratorOptions, GpuGeneratorPlan, Request, Sampling, end_tokens,
};
use tilewright::gpu::{GpuDevice, ordinal};
use tilewright::verify::Report;
use tilewright::{DType, Result};
use tilewright_base::Error;

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
        false => on_cpu(args, &request)?,
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
    Ok(vec![one; args.batch.max(1)])
}

#[cfg(feature = "cpu")]
fn encoded(args: &GenerateArgs, text: &str) -> Result<Vec<i64>> {
    let tokenizer = tilewright_text::Tokenizer::open(&args.model.model, 1 << 20)?;
    Ok(tokenizer.encode(&[text])?.input_ids.to_i64s())
}

#[cfg(not(feature = "cpu"))]
fn encoded(_: &GenerateArgs, _: &str) -> Result<Vec<i64>> {
    Err(Error::unsupported("this `tw` was built without tokenizers").with_hint("give --tokens"))
}

/// The text of tokens, where the directory has a tokenizer.
#[cfg(feature = "cpu")]
fn decoded(args: &GenerateArgs, tokens: &[i64]) -> Option<String> {
    let tokenizer = tilewright_text::Tokenizer::open(&args.model.model, 1 << 20).ok()?;
    let ids: Vec<u32> = tokens.iter().filter_map(|&t| u32::try_from(t).ok()).collect();
    tokenizer.decode(&ids).ok()
}

#[cfg(not(feature = "cpu"))]
fn decoded(_: &GenerateArgs, _: &[i64]) -> Option<String> {
    None
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
    let needed = request.prompts[0].len() + request.count;
    args.max_length.unwrap_or_else(|| i64::try_from(needed).unwrap_or(i64::MAX))
}

#[cfg(feature = "cpu")]
fn on_cpu(args: &GenerateArgs, request: &Request) -> Result<Option<Generated>> {
    if args.verify || args.explain {
        return Err(Error::unsupported("--verify and --explain of `tw generate` on a CPU")
            .with_hint("tw verify and tw explain take the model"));
    }
    let compiler = super::compiler(&args.model)?;
    let mut generator = {
        let _progress = progress(format!("compiling {}", args.model.model.display()));
        tilewright::generate::CpuGenerator::open(
            &args.model.model,
            &compiler,
            max_length(args, request),
            args.model.random_weights,
        )?
    };
    generator.generate(request).map(Some)
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(_: &GenerateArgs, _: &Request) -> Result<Option<Generated>> {
    Err(super::without_cpu())
}

fn on_gpu(args: &GenerateArgs, request: &Request, output: &Output) -> Result<Option<Generated>> {
    let cache = if args.model.no_cache { None } else { super::cache_folder(&args.model) };
    let target = args.model.target.as_deref();
    let device = GpuDevice::open_as(ordinal(&args.model.device)?, cache.as_deref(), target)?;
    let stored = match args.model.precision.as_str() {
        "bf16" => Some(DType::BF16),
        "f16" => Some(DType::F16),
        _ => None,
    };
    let options = GpuGeneratorOptions {
        batch: i64::try_from(args.batch.max(1)).unwrap_or(i64::MAX),
        max_length: max_length(args, request),
        stored,
        sampling: request.sampling,
        random_weights: args.model.random_weights,
    };
    let start = Instant::now();
    let dir = &args.model.model;
    let plan = GpuGeneratorPlan::open(dir, device.machine().clone(), &options)?;
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
    let _ = writeln!(
        text,
        "{} tokens of prompt in {}, then {:.1} tokens/s ({} a step of {batch})",
        request.prompts[0].len(),
        time_text(prompt),
        batch as f64 / step.max(1e-12),
        time_text(step),
    );
    let value = json!({
        "tokens": generated.tokens, "prompt_s": prompt, "step_ms": step * 1e3,
        "steps": generated.steps, "tokens_per_s": batch as f64 / step.max(1e-12),
    });
    output.result(&text, &value);
    Ok(())
}
