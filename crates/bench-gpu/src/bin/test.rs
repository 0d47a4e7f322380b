//! `tw-gpu-test`: our matrix products against float64 and cuBLASLt's error, on this machine's GPU.
//!
//! Groups are in `suite.rs`, what is checked in `check.rs`. The exit code is 1 when a case failed, and
//! with `--strict` also when one was unsupported.

use clap::Parser;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{PEER_WORKSPACE_BYTES, programs};
use tilewright_bench_gpu::case::{Case, NUMBERS, Numbers};
use tilewright_bench_gpu::check::{Checker, Outcome, self_check};
use tilewright_bench_gpu::ending::ENDINGS;
use tilewright_bench_gpu::suite::{GROUPS, large, repeated};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Gpu, Nvrtc};
use tilewright_launch::Loader;

/// Tests of matrix products on a GPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Options {
    /// Kinds of numbers, separated by commas; all without.
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    /// Groups, separated by commas: sizes,orders,strides,batches,empty,deep,endings,repeat,large;
    /// all without.
    #[arg(long, value_delimiter = ',')]
    groups: Vec<String>,
    /// Of the group `endings`: only these, separated by commas (bias-gelu, to-i8, swiglu, ...).
    #[arg(long, value_delimiter = ',')]
    endings: Vec<String>,
    /// Only every n-th case of each group.
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// Unsupported cases count as failures.
    #[arg(long)]
    strict: bool,
    /// Without cuBLASLt: errors are measured by what the kinds of numbers promise. For tools that slow every kernel
    /// of the process down.
    #[arg(long)]
    alone: bool,
    /// Folder of compiled kernels; nothing is cached without.
    #[arg(long)]
    cache: Option<PathBuf>,
    /// Plans and compiles for another architecture, which the device must run or translate: `sm_80`.
    #[arg(long)]
    target: Option<tilewright_cuda::Arch>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: u32,
}

/// Runs of each case of the group `repeat`.
const REPEATS: usize = 100;
/// Cases that are planned and compiled together.
const CHUNK: usize = 512;
/// Failures that are shown in full.
const SHOWN: usize = 12;

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

/// Outcomes of the cases of one group and kind.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    unsupported: BTreeMap<String, usize>,
    /// Candidates that failed before another worked.
    gave_way: BTreeMap<String, usize>,
}

impl Tally {
    fn add(&mut self, case: &Case, outcome: Outcome) {
        match outcome {
            Outcome::Passed(failures) => {
                self.passed += 1;
                for failure in failures {
                    *self.gave_way.entry(first_line(&failure)).or_default() += 1;
                }
            }
            Outcome::Unsupported(reason) => *self.unsupported.entry(reason).or_default() += 1,
            Outcome::Failed(how) => {
                self.failed += 1;
                if self.failed <= SHOWN {
                    println!(
                        "  FAILED {} {} {} {:?}\n    {how}",
                        case.numbers.name,
                        case.shape_text(),
                        case.ending.name(),
                        [case.a, case.b, case.c]
                    );
                }
            }
        }
    }

    fn unsupported(&self) -> usize {
        self.unsupported.values().sum()
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn run(options: &Options) -> Result<bool> {
    if let Some(unknown) = options.types.iter().find(|t| Numbers::named(t).is_none()) {
        return Err(Error::user(format!("there is no kind of numbers `{unknown}`")));
    }
    let names: Vec<&str> = GROUPS.iter().map(|g| g.name).chain(["repeat", "large"]).collect();
    if let Some(unknown) = options.groups.iter().find(|g| !names.contains(&g.as_str())) {
        return Err(Error::user(format!("there is no group `{unknown}`"))
            .with_hint(format!("there are {}", names.join(", "))));
    }
    if let Some(unknown) = options.endings.iter().find(|e| ENDINGS.iter().all(|k| k.name() != *e)) {
        let names: Vec<&str> = ENDINGS.iter().map(|e| e.name()).collect();
        return Err(Error::user(format!("there is no ending `{unknown}`"))
            .with_hint(format!("there are {}", names.join(", "))));
    }
    let wants = |name: &str| options.groups.is_empty() || options.groups.iter().any(|g| g == name);
    let kinds = NUMBERS
        .iter()
        .filter(|n| options.types.is_empty() || options.types.iter().any(|t| t == n.name));

    let gpu = Gpu::open(options.gpu)?;
    let nvrtc = Nvrtc::open(options.cache.as_deref())?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    self_check(&stream, &support)?;
    println!("the checkers agree with the host");
    let peer = (!options.alone).then(|| CublasLt::open(&gpu));
    if let Some(Err(error)) = &peer {
        println!("testing without cuBLASLt: {error}");
    }
    let peer = peer.and_then(Result::ok);
    let workspace = stream.alloc(PEER_WORKSPACE_BYTES)?;
    let loader = Loader::new(gpu.clone(), nvrtc);
    let loader = match options.target {
        Some(target) => loader.for_target(target)?,
        None => loader,
    };
    let mut checker = Checker::new(&stream, &support, &loader, peer.as_ref(), &workspace);

    let (mut failed, mut unsupported, mut passed) = (0, 0, 0);
    for numbers in kinds {
        for name in names.iter().filter(|name| wants(name)) {
            let begin = Instant::now();
            let cases: Vec<Case> = match *name {
                "repeat" => repeated(numbers),
                "large" => large(numbers),
                _ => GROUPS
                    .iter()
                    .filter(|g| g.name == *name)
                    .flat_map(|g| (g.cases)(numbers))
                    .collect(),
            };
            let wanted = |c: &Case| {
                options.endings.is_empty() || options.endings.iter().any(|e| e == c.ending.name())
            };
            let cases = cases.into_iter().filter(|c| *name != "endings" || wanted(c));
            let cases: Vec<Case> = cases.step_by(options.every.max(1)).collect();
            let mut tally = Tally::default();
            for chunk in cases.chunks(CHUNK) {
                let plans: Vec<_> = chunk.iter().map(|c| checker.plan(c)).collect();
                let first = plans.iter().flatten().filter_map(|p| p.first());
                // What cannot be lowered shows when its turn comes.
                let all: Vec<_> = first.flat_map(|c| programs(c).unwrap_or_default()).collect();
                loader.load_all(&all);
                for (case, plan) in chunk.iter().zip(plans) {
                    let outcome = match *name {
                        "repeat" => checker.repeat(case, REPEATS),
                        "large" => checker.check_large(case),
                        _ => checker.check(case, plan),
                    };
                    tally.add(case, outcome);
                }
            }
            println!(
                "{:<6} {name:<8} {} passed, {} failed, {} unsupported, {:.1} s",
                numbers.name,
                tally.passed,
                tally.failed,
                tally.unsupported(),
                begin.elapsed().as_secs_f64()
            );
            for (reason, count) in &tally.unsupported {
                println!("  unsupported, {count} times: {reason}");
            }
            for (failure, count) in &tally.gave_way {
                println!("  gave way to the next candidate, {count} times: {failure}");
            }
            passed += tally.passed;
            failed += tally.failed;
            unsupported += tally.unsupported();
            // A fault of a kernel ends everything: the device is of no use to this process any more.
            stream.synchronize()?;
        }
    }
    println!("{passed} passed, {failed} failed, {unsupported} unsupported");
    Ok(failed == 0 && passed > 0 && (unsupported == 0 || !options.strict))
}
