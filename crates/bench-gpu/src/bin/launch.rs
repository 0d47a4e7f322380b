//! `tw-gpu-launch`: what a launch costs the host: ours against the bare driver call, and a graph's replay
//! per kernel. Writes a record.
//!
//! Both arms call the same function pointer with the same arguments; they take turns in batches that
//! fit the driver's queue, so that no launch waits for the device, and the first of each pair
//! alternates. The figures are medians over batches, and the 10th and 90th percentile. The exit code is 1
//! when ours adds half a microsecond or more to a bare call.

use clap::Parser;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::record;
use tilewright_cuda::{
    Args, CompileRequest, Gpu, GraphExec, LaunchShape, Nvrtc, PreparedLaunch, Stream,
};

const TEXT: &str = include_str!("../launch.cu");

/// Launches per batch: well below the driver's queue of about a thousand.
const BATCH: usize = 200;
const ROUNDS: usize = 300;
const NODES: usize = 100;

/// Nanoseconds per launch: median, 10th and 90th percentile.
struct Spread {
    median: f64,
    p10: f64,
    p90: f64,
}

impl Spread {
    fn of(mut samples: Vec<f64>) -> Spread {
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| samples[((samples.len() - 1) as f64 * share).round() as usize];
        Spread { median: at(0.5), p10: at(0.1), p90: at(0.9) }
    }

    fn json(&self) -> Value {
        let Spread { median, p10, p90 } = self;
        json!({ "median_ns": median, "p10_ns": p10, "p90_ns": p90 })
    }
}

/// One row of the table.
struct Row {
    name: &'static str,
    spread: Spread,
}

/// The cost of a launch on the host.
#[derive(Parser, Debug)]
#[command(version)]
struct Options {
    /// Folder for the record.
    #[arg(long, default_value = "records")]
    out: PathBuf,
    /// Write no record.
    #[arg(long)]
    no_record: bool,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: u32,
}

/// What ours may add to a bare call, in nanoseconds.
const ADDED_MAX_NS: f64 = 500.0;

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

fn run(options: &Options) -> Result<bool> {
    let gpu = Gpu::open(options.gpu)?;
    let nvrtc = Nvrtc::open(None)?;
    let module = gpu.load(&nvrtc.compile(&CompileRequest::new("overhead", TEXT, gpu.arch()))?)?;
    let stream = gpu.stream()?;
    let buffer = stream.alloc(1024)?;
    let mut args = Args::new();
    for _ in 0..4 {
        args = args.buffer(&buffer);
    }
    let args = args.value(1i32).value(2i32).value(3i32).value(4f32);
    let shape = LaunchShape { block: [32, 1, 1], ..LaunchShape::default() };
    let pdl = LaunchShape { programmatic: true, ..shape };
    let nothing = module.function("nothing")?.prepare(&shape, &Args::new())?;
    let eight = module.function("eight")?.prepare(&shape, &args)?;
    let dependent = module.function("eight")?.prepare(&pdl, &args)?;

    let mut rows = Vec::new();
    let mut added_ns = Map::new();
    let cases = [
        ("no arguments, bare call", "no arguments, ours", &nothing),
        ("8 arguments, bare call", "8 arguments, ours", &eight),
        ("8 arguments, dependent, bare call", "8 arguments, dependent, ours", &dependent),
    ];
    for (bare_name, ours_name, launch) in cases {
        if launch.function().gpu().properties().major < 9 && ours_name.contains("dependent") {
            continue;
        }
        let (bare, ours) = compare(launch, &stream)?;
        let case = ours_name.trim_end_matches(", ours");
        added_ns.insert(case.into(), json!(ours.median - bare.median));
        rows.push(Row { name: bare_name, spread: bare });
        rows.push(Row { name: ours_name, spread: ours });
    }
    let (host, device) = replay(&eight, &stream)?;
    rows.push(Row { name: "graph of 100 kernels, host time per kernel", spread: host });
    rows.push(Row { name: "graph of 100 kernels, device time per kernel", spread: device });

    println!("{}: nanoseconds per launch, of {ROUNDS} batches", gpu.properties().name);
    println!("{:<46} {:>9} {:>9} {:>9}", "", "median", "p10", "p90");
    for Row { name, spread: Spread { median, p10, p90 } } in &rows {
        println!("{name:<46} {median:>9.1} {p10:>9.1} {p90:>9.1}");
    }
    let within = added_ns.values().filter_map(Value::as_f64).all(|ns| ns < ADDED_MAX_NS);
    if !options.no_record {
        let rows: Map<String, Value> =
            rows.iter().map(|row| (row.name.to_owned(), row.spread.json())).collect();
        let command = std::env::var("TILEWRIGHT_COMMAND")
            .unwrap_or_else(|_| record::command(std::env::args()));
        let record = json!({
            "kind": "gpu-launch",
            "date": record::now(),
            "commit": record::commit(),
            "command": command,
            "machine": record::machine(&gpu, &nvrtc, None),
            "protocol": { "launches_per_batch": BATCH, "batches": ROUNDS, "graph_nodes": NODES },
            "added_ns": added_ns,
            "rows": rows,
        });
        record::write(&options.out, "gpu-launch", &record)?;
    }
    Ok(within)
}

/// The bare call and ours, taking turns.
fn compare(launch: &PreparedLaunch, stream: &Stream) -> Result<(Spread, Spread)> {
    let raw = launch.raw(stream);
    let bare_batch = || -> Result<f64> {
        let start = Instant::now();
        let mut codes = 0;
        for _ in 0..BATCH {
            // SAFETY: the kernel writes nothing; stream and buffers are alive, and the stream was
            // used on this thread just before.
            codes |= unsafe { raw.call() };
        }
        let ns = start.elapsed().as_nanos() as f64 / BATCH as f64;
        if codes != 0 {
            return Err(Error::bug(format!("the bare call failed: {codes}")));
        }
        Ok(ns)
    };
    let our_batch = || -> Result<f64> {
        let start = Instant::now();
        for _ in 0..BATCH {
            // SAFETY: as above.
            unsafe { launch.launch(stream)? };
        }
        Ok(start.elapsed().as_nanos() as f64 / BATCH as f64)
    };
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    stream.synchronize()?;
    for round in 0..ROUNDS + 10 {
        let bare_first = round % 2 == 0;
        let first = if bare_first { bare_batch()? } else { our_batch()? };
        stream.synchronize()?;
        let second = if bare_first { our_batch()? } else { bare_batch()? };
        stream.synchronize()?;
        // The first rounds warm up.
        if round >= 10 {
            bare.push(if bare_first { first } else { second });
            ours.push(if bare_first { second } else { first });
        }
    }
    Ok((Spread::of(bare), Spread::of(ours)))
}

/// A graph of kernels in a row: time of the call, and time on the device, per kernel.
fn replay(launch: &PreparedLaunch, stream: &Stream) -> Result<(Spread, Spread)> {
    // SAFETY: the kernel writes nothing; buffers and module are alive to the end.
    let graph =
        stream.capture(|stream| (0..NODES).try_for_each(|_| unsafe { launch.launch(stream) }))?;
    let exec: GraphExec = graph.instantiate()?;
    let (mut host, mut device) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS + 10 {
        let mut host_ns = 0.0;
        let us = stream.time_us(|stream| {
            let start = Instant::now();
            // SAFETY: as above.
            unsafe { exec.launch(stream)? };
            host_ns = start.elapsed().as_nanos() as f64 / NODES as f64;
            Ok(())
        })?;
        if round >= 10 {
            host.push(host_ns);
            device.push(us * 1e3 / NODES as f64);
        }
    }
    Ok((Spread::of(host), Spread::of(device)))
}
