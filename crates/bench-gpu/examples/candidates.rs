//! Times many of the planner's candidates for each product of a list, not only the first: what the time models are
//! judged and fitted by.
//!
//! `candidates SHAPES [--types T,..] [--each N] [--seconds S] [--cache DIR] [--compile-only]` prints a line of JSON per
//! candidate: the product, its place by the model, the model's time, the measured one, tiles and threads. Of the
//! kernels for few rows and of the others it takes the first of the ranking, and then some spread over the rest of it.

use clap::Parser;
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{Ours, planner_gpu, programs};
use tilewright_bench_gpu::case::{Case, read_list};
use tilewright_bench_gpu::measure::{Sets, time_ours};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::{Gpu, Nvrtc};
use tilewright_kernels::gemm::{Candidate, plan_untuned};
use tilewright_launch::Loader;

/// Times candidates of the planner.
#[derive(Parser, Debug)]
struct Options {
    /// List of shapes, as for `tw-gpu-bench`
    shapes: PathBuf,
    /// Kinds of numbers, separated by commas
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    /// Candidates of each kind of kernel, per product
    #[arg(long, default_value_t = 24)]
    each: usize,
    /// How many candidates are ranked
    #[arg(long, default_value_t = 400)]
    most: usize,
    /// Seconds in all
    #[arg(long, default_value_t = 30.0)]
    seconds: f64,
    /// Folder of compiled kernels
    #[arg(long)]
    cache: Option<PathBuf>,
    /// The first of each form of cluster, with and without parts of the depth, instead of some spread over the ranking
    #[arg(long)]
    by_cluster: bool,
    /// Fill the cache, time nothing
    #[arg(long)]
    compile_only: bool,
}

/// The first half of `count` places, and others spread evenly over the rest of `len`.
fn spread(len: usize, count: usize) -> Vec<usize> {
    let first = (count / 2).min(len);
    let rest = (count - count / 2).min(len - first);
    (0..first).chain((0..rest).map(|i| first + i * (len - first) / rest.max(1))).collect()
}

fn chosen(candidates: &[Candidate], each: usize) -> Vec<usize> {
    let of_rows = |c: &Candidate| c.steps.iter().any(|s| s.kernel.name.starts_with("gemv"));
    let mut out = Vec::new();
    for wanted in [true, false] {
        let places: Vec<usize> =
            (0..candidates.len()).filter(|i| of_rows(&candidates[*i]) == wanted).collect();
        out.extend(spread(places.len(), each).into_iter().map(|i| places[i]));
    }
    out
}

/// The first `each` candidates of every form of cluster, with and without parts of the depth.
fn by_cluster(candidates: &[Candidate], each: usize) -> Vec<usize> {
    let mut found = std::collections::BTreeMap::<_, usize>::new();
    let mut out = Vec::new();
    for (i, candidate) in candidates.iter().enumerate() {
        let product = |s: &&tilewright_kernels::gemm::Step| s.kernel.tiles.contains(&"BK".into());
        let Some(step) = candidate.steps.iter().find(product) else { continue };
        let s = &step.schedule;
        let form = (s.cluster, s.cluster_axis, step.sizes.contains_key("S"));
        let count = found.entry(form).or_default();
        *count += 1;
        if *count <= each {
            out.push(i);
        }
    }
    out
}

fn line(case: &Case, place: usize, candidate: &Candidate, us: Option<f64>) -> String {
    // Copies and sums go before and after the product itself.
    let product = |name: &str| name.starts_with("gemm") || name.starts_with("gemv");
    let step = candidate
        .steps
        .iter()
        .find(|s| product(&s.kernel.name) && !s.kernel.name.ends_with("_sum"))
        .or(candidate.steps.first());
    let Some(step) = step else { return String::new() };
    let l = &step.schedule.lines;
    json!({
        "case": format!("{} {} {}", case.numbers.name, case.shape_text(), case.orders_text()),
        "place": place,
        "estimate_us": candidate.estimate_us,
        "us": us,
        "kernel": &*step.kernel.name,
        "steps": candidate.steps.len(),
        "tiles": step.schedule.tiles.iter().map(|(k, v)| (k.to_string(), *v)).collect::<std::collections::BTreeMap<_, _>>(),
        "threads": l.threads,
        "lanes": l.lanes,
        "vector": l.vector,
        "blocks": step.schedule.blocks_per_sm,
        "splits": step.sizes.get("S").copied().unwrap_or(1),
        "schedule": step.schedule.to_string(),
    })
    .to_string()
}

fn main() -> Result<()> {
    let options = Options::parse();
    let text = std::fs::read_to_string(&options.shapes)
        .map_err(|e| Error::user(format!("{}: {e}", options.shapes.display())))?;
    let cases = read_list(&options.shapes.display().to_string(), &text, &options.types)?;
    let gpu = Gpu::open(0)?;
    let nvrtc = Nvrtc::open(options.cache.as_deref())?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let target = planner_gpu(&gpu);
    let loader = Loader::new(gpu.clone(), nvrtc);
    let begin = Instant::now();
    let limit = Duration::from_secs_f64(options.seconds);
    let mut plans = Vec::new();
    for case in &cases {
        let candidates = plan_untuned(&case.problem(), &target, options.most)?;
        let chosen = match options.by_cluster {
            true => by_cluster(&candidates, options.each),
            false => chosen(&candidates, options.each),
        };
        plans.push((case, candidates, chosen));
    }
    eprintln!("{} products planned in {:.1} s", plans.len(), begin.elapsed().as_secs_f64());
    for (case, candidates, chosen) in &plans {
        let wanted: Vec<_> =
            chosen.iter().flat_map(|i| programs(&candidates[*i]).unwrap_or_default()).collect();
        if begin.elapsed() > limit {
            eprintln!("no time is left for {}", case.shape_text());
            continue;
        }
        let failed = loader.load_all(&wanted).iter().filter(|k| k.is_err()).count();
        eprintln!(
            "{} {}: {} kernels, {failed} failed, {:.1} s",
            case.numbers.name,
            case.shape_text(),
            wanted.len(),
            begin.elapsed().as_secs_f64()
        );
        if options.compile_only {
            continue;
        }
        let sets = Sets::new(&stream, &support, case)?;
        for index in chosen {
            let time = Ours::load(&loader, &stream, &candidates[*index])
                .and_then(|ours| time_ours(&stream, &sets, &ours, f64::INFINITY));
            if let Err(error) = &time {
                eprintln!("{error}");
            }
            println!("{}", line(case, *index, &candidates[*index], time.ok()));
        }
    }
    Ok(())
}
