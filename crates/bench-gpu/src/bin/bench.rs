//! `tw-gpu-bench`: our matrix products against cuBLASLt on this machine's GPU; writes a record.
//!
//! `docs/src/measuring.md` says how it measures. The exit code is 1 when a result was wrong.

use clap::Parser;
use serde_json::{Map, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{
    Ours, PEER_ALGORITHMS, PEER_WORKSPACE_BYTES, Peer, describe, planner_gpu, programs,
};
use tilewright_bench_gpu::case::{Case, read_list};
use tilewright_bench_gpu::ending::Ending;
use tilewright_bench_gpu::measure::{Measured, Sets, compare_ours, measure, time_ours};
use tilewright_bench_gpu::record::{self, Row, Tuned};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Buffer, Gpu, Nvrtc, Stream};
use tilewright_kernels::gemm::{Candidate, Records, Source, plan_untuned, plan_with};
use tilewright_launch::{Loader, first_that_works};

/// Matrix products against cuBLASLt.
#[derive(Parser, Debug)]
#[command(version)]
struct Options {
    /// List of shapes; the one of the repository without.
    #[arg(long)]
    shapes: Option<PathBuf>,
    /// Kinds of numbers, separated by commas: bf16,f16,tf32,f32,i8,f8.
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    /// Only shapes whose text (`4096x4096x4096 x64 rcr`) contains this.
    #[arg(long)]
    filter: Option<String>,
    /// How long the two arms alternate, per shape.
    #[arg(long, default_value_t = 0.6)]
    seconds_per_shape: f64,
    /// How many of the planner's candidates are timed; the best is kept. 1 takes the planner's word.
    #[arg(long, default_value_t = 1)]
    candidates: usize,
    /// Also times the schedules of tuning records, where there is one, and compares them with the planner's.
    #[arg(long)]
    tuned: bool,
    /// With --tuned: a folder of records, which come before those of the program.
    #[arg(long, value_name = "DIR", requires = "tuned")]
    tuning: Option<PathBuf>,
    /// Folder for the record.
    #[arg(long, default_value = "records")]
    out: PathBuf,
    /// Write no record.
    #[arg(long)]
    no_record: bool,
    /// Folder of compiled kernels; nothing is cached without.
    #[arg(long)]
    cache: Option<PathBuf>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: u32,
}

/// Candidates that are there in case earlier ones fail.
const SPARE_CANDIDATES: usize = 4;

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

/// What every shape needs.
struct Bench<'a> {
    stream: &'a Stream,
    support: &'a Support,
    loader: &'a Loader,
    peer: Option<&'a CublasLt>,
    workspace: &'a Buffer,
    budget: Duration,
    candidates: usize,
    /// Records of tuned schedules, if they are to be timed.
    tuning: Option<Records>,
    target: tilewright_target::Gpu,
}

/// Samples of the planner's and the tuned schedule, in turns.
const TUNED_ROUNDS: usize = 25;

fn run(options: &Options) -> Result<bool> {
    let cases = cases(options)?;
    let gpu = Gpu::open(options.gpu)?;
    let nvrtc = Nvrtc::open(options.cache.as_deref())?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let peer = CublasLt::open(&gpu);
    if let Err(error) = &peer {
        eprintln!("measuring without cuBLASLt: {error}");
    }
    let peer = peer.ok();
    let mut head = Map::new();
    head.insert("date".into(), json!(record::now()));
    head.insert("commit".into(), json!(record::commit()));
    // A script that starts this says how it was started itself: its folders are of no interest.
    let command =
        std::env::var("TILEWRIGHT_COMMAND").unwrap_or_else(|_| record::command(std::env::args()));
    head.insert("command".into(), json!(command));
    head.insert("machine".into(), record::machine(&gpu, &nvrtc, peer.as_ref()));
    head.insert("clocks_before".into(), json!(record::clocks()));
    head.insert(
        "protocol".into(),
        json!({
            "cold_caches": "each product uses the next of several sets of matrices, together over 5 times the L2",
            "launches": "recorded graphs",
            "inputs": "normal(0, 1), integers from their whole range, Philox4x32-10 on the device",
            "samples": "alternating A B, B A; quartiles of each, and of the ratios of neighbours",
            "cublaslt": format!("the fastest of up to {PEER_ALGORITHMS} proposed algorithms, {PEER_WORKSPACE_BYTES} bytes of workspace"),
            "candidates_timed": options.candidates,
            "endings": "behind cuBLASLt's product a kernel of its own, one of ours; a pair is one product of twice the columns there",
            "tuned": options.tuned,
            "seconds_per_shape": options.seconds_per_shape,
        }),
    );
    let loader = Loader::new(gpu.clone(), nvrtc);
    let plans = plans(&loader, &cases, options.candidates)?;
    let workspace = stream.alloc(PEER_WORKSPACE_BYTES)?;
    let bench = Bench {
        stream: &stream,
        support: &support,
        loader: &loader,
        peer: peer.as_ref(),
        workspace: &workspace,
        budget: Duration::from_secs_f64(options.seconds_per_shape.clamp(0.0, 3600.0)),
        candidates: options.candidates.max(1),
        tuning: options.tuned.then(|| {
            let shipped = Records::shipped().clone();
            options.tuning.clone().map_or(shipped.clone(), |folder| shipped.with_folder(folder))
        }),
        target: planner_gpu(loader.gpu()),
    };
    let begin = Instant::now();
    let mut rows = Vec::new();
    for (index, (case, candidates)) in cases.iter().zip(plans).enumerate() {
        let row = bench.shape(case, candidates);
        eprint!(
            "[{:>3}/{}, {:>4.0} s] {}",
            index + 1,
            cases.len(),
            begin.elapsed().as_secs_f64(),
            progress(&row)
        );
        rows.push(row);
        // A fault of a kernel ends everything: the device is of no use to this process any more.
        if stream.synchronize().is_err() {
            eprintln!("the device failed: the remaining shapes are not measured");
            break;
        }
    }
    head.insert("clocks_after".into(), json!(record::clocks()));
    head.insert("seconds".into(), json!(begin.elapsed().as_secs_f64().round()));
    println!("{}", record::table(&rows));
    let not_measured = rows.iter().filter(|r| r.outcome.is_err()).count();
    let wrong = rows.iter().filter(|r| r.problem().is_some()).count();
    let fell_back = rows.iter().filter(|r| !r.failures.is_empty()).count();
    println!(
        "{} shapes, {not_measured} not measured, {wrong} wrong, {fell_back} after a failed candidate",
        rows.len()
    );
    if !options.no_record {
        let endings = cases.iter().any(|c| c.ending != Ending::Plain);
        let name = if endings { "gpu-endings" } else { "gpu-gemm" };
        record::write(&options.out, name, &record::record(head, &rows))?;
    }
    Ok(wrong == 0 && rows.len() == cases.len())
}

fn cases(options: &Options) -> Result<Vec<Case>> {
    let (name, text) = match &options.shapes {
        None => (
            "bench/gemm_shapes.txt".into(),
            include_str!("../../../../bench/gemm_shapes.txt").to_owned(),
        ),
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let name = path.display().to_string();
            let text = text.map_err(|e| Error::user(format!("{name} cannot be read: {e}")))?;
            (name, text)
        }
    };
    let mut cases = read_list(&name, &text, &options.types)?;
    if let Some(part) = &options.filter {
        cases.retain(|c| format!("{} {}", c.title(), c.orders_text()).contains(part));
    }
    if cases.is_empty() {
        return Err(Error::user("no shape is left to measure"));
    }
    Ok(cases)
}

/// Plans every case, and compiles what the first candidates need, all at once.
fn plans(loader: &Loader, cases: &[Case], wanted: usize) -> Result<Vec<Result<Vec<Candidate>>>> {
    let target = planner_gpu(loader.gpu());
    let begin = Instant::now();
    let plans: Vec<Result<Vec<Candidate>>> = cases
        .iter()
        .map(|c| plan_untuned(&c.problem(), &target, wanted.max(1) + SPARE_CANDIDATES))
        .collect();
    let mut all = Vec::new();
    for candidates in plans.iter().flatten() {
        for candidate in candidates.iter().take(wanted.max(1)) {
            // What cannot be lowered shows when its turn comes.
            all.extend(programs(candidate).unwrap_or_default());
        }
    }
    let planned = begin.elapsed();
    let loaded = loader.load_all(&all);
    let fresh = loaded.iter().flatten().filter(|k| !k.compiled().from_cache).count();
    eprintln!(
        "{} shapes planned in {:.1} s; {} kernels, {fresh} of them compiled, in {:.1} s",
        cases.len(),
        planned.as_secs_f64(),
        all.len(),
        (begin.elapsed() - planned).as_secs_f64()
    );
    Ok(plans)
}

fn progress(row: &Row) -> String {
    let table = record::table(std::slice::from_ref(row));
    table.lines().nth(1).map(|line| format!("{line}\n")).unwrap_or_default()
}

impl Bench<'_> {
    fn shape(&self, case: &Case, candidates: Result<Vec<Candidate>>) -> Row {
        let mut row = Row {
            case: *case,
            plan: String::new(),
            candidate: 0,
            failures: Vec::new(),
            outcome: Err(String::new()),
            peer_missing: None,
            tuned: None,
        };
        row.outcome = candidates
            .and_then(|candidates| self.measure(case, &candidates, &mut row))
            .map_err(|e| format!("{e}"));
        row
    }

    fn measure(&self, case: &Case, candidates: &[Candidate], row: &mut Row) -> Result<Measured> {
        let sets = Sets::new(self.stream, self.support, case)?;
        let peer = match self.peer {
            Some(peer) => match Peer::new(peer, self.loader, case, self.workspace) {
                Ok(peer) => Some(peer),
                Err(error) => {
                    row.peer_missing = Some(error.message().to_owned());
                    None
                }
            },
            None => None,
        };
        let order = self.ranked(&sets, candidates, row);
        let taken = first_that_works(order, |index| {
            let ours = Ours::load(self.loader, self.stream, &candidates[index])?;
            let measured =
                measure(self.stream, self.support, &sets, &ours, peer.as_ref(), self.budget)?;
            Ok((index, measured))
        })?;
        row.failures.extend(taken.failures.iter().map(|e| format!("{e}")));
        let (index, measured) = taken.value;
        row.candidate = index;
        row.plan = describe(&candidates[index]);
        if let Some(records) = &self.tuning {
            row.tuned = self.tuned(&sets, &candidates[index], records, peer.as_ref())?;
        }
        Ok(measured)
    }

    /// The schedule of a record, measured as the planner's, and in turns with it.
    fn tuned(
        &self,
        sets: &Sets,
        picked: &Candidate,
        records: &Records,
        peer: Option<&Peer<'_>>,
    ) -> Result<Option<Tuned>> {
        let planned = plan_with(&sets.case().problem(), &self.target, 1, records)?;
        planned.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
        let (Source::Record(_), Some(tuned)) = (planned.source, planned.candidates.first()) else {
            return Ok(None);
        };
        let ours = Ours::load(self.loader, self.stream, tuned)?;
        let measured = measure(self.stream, self.support, sets, &ours, peer, self.budget)?;
        let picked = Ours::load(self.loader, self.stream, picked)?;
        let times = compare_ours(self.stream, sets, &[&picked, &ours], TUNED_ROUNDS)?;
        let us = [times[0][1], times[1][1]];
        Ok(Some(Tuned { plan: describe(tuned), us, measured }))
    }

    /// The order in which candidates are taken: the planner's, or with several to time, by their times.
    fn ranked(&self, sets: &Sets, candidates: &[Candidate], row: &mut Row) -> Vec<usize> {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        if self.candidates <= 1 {
            return order;
        }
        let mut times = vec![f64::INFINITY; candidates.len()];
        for index in 0..self.candidates.min(candidates.len()) {
            let time = Ours::load(self.loader, self.stream, &candidates[index])
                .and_then(|ours| time_ours(self.stream, sets, &ours, f64::INFINITY));
            match time {
                Ok(us) => times[index] = us,
                Err(error) => row.failures.push(format!("{error}")),
            }
        }
        order.sort_by(|a, b| times[*a].total_cmp(&times[*b]).then(a.cmp(b)));
        order
    }
}
