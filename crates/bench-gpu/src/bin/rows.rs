//! `tw-gpu-rows`: kernels along rows, elementwise kernels and reductions on this machine's GPU, as shares of the
//! bandwidth of a device-to-device copy in the same run; writes a record.
//!
//! `docs/src/measuring.md` says how it measures. The exit code is 1 when a result was wrong.

use clap::Parser;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::measure::{Quartiles, quartiles};
use tilewright_bench_gpu::record;
use tilewright_bench_gpu::rows::{Recorded, RowCase, Sets, error, read_list};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::{Event, Gpu, Nvrtc, Stream};
use tilewright_launch::Loader;

/// Row, elementwise and reduction kernels against the copy bandwidth.
#[derive(Parser, Debug)]
#[command(version)]
struct Options {
    /// List of shapes; the one of the repository without.
    #[arg(long)]
    shapes: Option<PathBuf>,
    /// Only lines that contain this.
    #[arg(long)]
    filter: Option<String>,
    /// How long each case is sampled.
    #[arg(long, default_value_t = 0.2)]
    seconds_per_shape: f64,
    /// How long the whole run may take, in seconds: cases are sampled shorter, and those left when the time is over are
    /// named and not measured. No limit without.
    #[arg(long)]
    seconds: Option<f64>,
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

/// A sample is at least this long.
const SAMPLE_US: f64 = 200.0;
/// Samples at least and at most.
const SAMPLES: (usize, usize) = (7, 200);
/// Bytes of the copy that gives the bandwidth.
const COPY_BYTES: usize = 512 << 20;

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

/// What was measured of a case.
struct Row {
    us: Quartiles,
    errors: [f64; 2],
    sets: usize,
}

/// Bytes per second, read and written, of a device-to-device copy: the median of several.
fn copy_bandwidth(stream: &Stream) -> Result<f64> {
    let (from, to) = (stream.alloc(COPY_BYTES)?, stream.alloc(COPY_BYTES)?);
    from.zero(stream)?;
    let times = (0..9)
        .map(|_| stream.time_us(|stream| (0..4).try_for_each(|_| to.copy_from(stream, &from))))
        .collect::<Result<Vec<_>>>()?;
    Ok(8.0 * COPY_BYTES as f64 / (quartiles(&times)[1] / 1e6))
}

fn measure(
    stream: &Stream,
    support: &Support,
    loader: &Loader,
    case: &RowCase,
    budget: Duration,
) -> Result<Row> {
    let sets = Sets::new(stream, support, case)?;
    let recorded = Recorded::new(stream, loader, case, &sets)?;
    let events = [Event::new(stream.gpu())?, Event::new(stream.gpu())?];
    let sample = |passes: usize| -> Result<f64> {
        events[0].record(stream)?;
        (0..passes).try_for_each(|_| recorded.launch(stream))?;
        events[1].record(stream)?;
        events[1].synchronize()?;
        Ok(events[1].since_us(&events[0])? / passes as f64)
    };
    let before = error(stream, case, &sets, 0)?;
    sample(1)?;
    let passes = (SAMPLE_US / sample(1)?.max(0.1)).ceil().clamp(1.0, 1000.0) as usize;
    let mut times = Vec::new();
    let begin = Instant::now();
    while times.len() < SAMPLES.0 || (times.len() < SAMPLES.1 && begin.elapsed() < budget) {
        times.push(sample(passes)? / sets.count() as f64);
    }
    let after = error(stream, case, &sets, sets.count() - 1)?;
    Ok(Row { us: quartiles(&times), errors: [before, after], sets: sets.count() })
}

/// The time that a run has, shared out evenly over the cases that are left.
struct Allowance {
    begin: Instant,
    whole: Option<Duration>,
    each: Duration,
}

impl Allowance {
    /// How long the next case may be sampled with `left` cases to go; none when the time is over. Half of a case's
    /// share is for its tensors and its check.
    fn next(&self, left: usize) -> Option<Duration> {
        let Some(whole) = self.whole else { return Some(self.each) };
        let rest = whole.checked_sub(self.begin.elapsed()).filter(|rest| !rest.is_zero())?;
        Some(self.each.min(rest / (2 * left.max(1) as u32)))
    }
}

fn run(options: &Options) -> Result<bool> {
    let begin = Instant::now();
    let (name, text) = match &options.shapes {
        None => (
            "bench/rows_shapes.txt".to_owned(),
            include_str!("../../../../bench/rows_shapes.txt").to_owned(),
        ),
        Some(path) => {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::user(format!("{name} cannot be read: {e}")))?;
            (name, text)
        }
    };
    let mut cases = read_list(&name, &text)?;
    if let Some(part) = &options.filter {
        cases.retain(|c| head(c).contains(part));
    }
    let gpu = Gpu::open(options.gpu)?;
    let nvrtc = Nvrtc::open(options.cache.as_deref())?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let mut record_head = Map::new();
    record_head.insert("kind".into(), json!("gpu-rows"));
    record_head.insert("date".into(), json!(record::now()));
    record_head.insert("commit".into(), json!(record::commit()));
    let command =
        std::env::var("TILEWRIGHT_COMMAND").unwrap_or_else(|_| record::command(std::env::args()));
    record_head.insert("command".into(), json!(command));
    record_head.insert("machine".into(), record::machine(&gpu, &nvrtc, None));
    record_head.insert("clocks_before".into(), json!(record::clocks()));
    let copy = copy_bandwidth(&stream)?;
    record_head.insert("copy_bytes_per_second".into(), json!(copy));
    record_head.insert(
        "protocol".into(),
        json!({
            "cold_caches": "each launch uses the next of several sets of tensors, together over 5 times the L2",
            "launches": "recorded graphs",
            "inputs": "normal(0, 1), Philox4x32-10 on the device",
            "bandwidth": "bytes of all tensors, each once, per second; the copy's are read and written",
            "errors": "sampled rows against float64, relative in the Euclidean norm; sums relative to the sum of magnitudes",
            "seconds_per_shape": options.seconds_per_shape,
            "seconds": options.seconds,
        }),
    );
    let loader = Loader::new(gpu.clone(), nvrtc);
    // On all processors, before anything is timed; what fails says so when its turn comes.
    let programs: Vec<_> = cases.iter().flat_map(RowCase::programs).collect();
    loader.load_all(&programs);
    println!("device-to-device copy of {} MiB: {:.2} TB/s", COPY_BYTES >> 20, copy / 1e12);
    println!("{:<28} {:>9} {:>7} {:>8}  error", "", "us", "TB/s", "of copy");
    let seconds = |s: f64| Duration::from_secs_f64(s.clamp(0.0, 86400.0));
    let allowance = Allowance {
        begin,
        whole: options.seconds.map(seconds),
        each: seconds(options.seconds_per_shape),
    };
    let (mut rows, mut wrong, mut left_out) = (Vec::new(), 0, Vec::new());
    for (at, case) in cases.iter().enumerate() {
        let Some(budget) = allowance.next(cases.len() - at) else {
            left_out.extend(cases[at..].iter().map(head));
            break;
        };
        let mut row = Map::new();
        row.insert("operation".into(), json!(case.name));
        row.insert("type".into(), json!(case.dtype.to_string()));
        row.insert("rows".into(), json!(case.shape.0));
        row.insert("columns".into(), json!(case.shape.1));
        row.insert("plan".into(), json!(case.plan()));
        match measure(&stream, &support, &loader, case, budget) {
            Ok(measured) => {
                let rate = case.bytes() as f64 / (measured.us[1] / 1e6);
                let worst = measured.errors[0].max(measured.errors[1]);
                let right = worst <= case.error_max();
                println!(
                    "{:<28} {:>9.2} {:>7.2} {:>7.1}%  {worst:.1e}{}  {}",
                    head(case),
                    measured.us[1],
                    rate / 1e12,
                    rate / copy * 100.0,
                    if right { "" } else { " WRONG" },
                    case.plan(),
                );
                wrong += usize::from(!right);
                row.insert("us".into(), json!(measured.us));
                row.insert("bytes".into(), json!(case.bytes()));
                row.insert("of_copy".into(), json!(rate / copy));
                row.insert("errors".into(), json!(measured.errors));
                row.insert("error_max".into(), json!(case.error_max()));
                row.insert("sets".into(), json!(measured.sets));
            }
            Err(error) => {
                println!("{:<28} {error}", head(case));
                row.insert("error".into(), json!(error.to_string()));
                wrong += 1;
            }
        }
        rows.push(Value::Object(row));
        // A fault of a kernel ends everything: the device is of no use to this process any more.
        if stream.synchronize().is_err() {
            eprintln!("the device failed: the remaining cases are not measured");
            break;
        }
    }
    record_head.insert("clocks_after".into(), json!(record::clocks()));
    record_head.insert("rows".into(), Value::Array(rows));
    record_head.insert("left_out".into(), json!(left_out));
    if !options.no_record {
        write(options, &Value::Object(record_head))?;
    }
    for head in &left_out {
        println!("{head:<28} left out: the time is over");
    }
    let measured = cases.len() - left_out.len();
    println!("{measured} of {} cases, {wrong} of them wrong or failed", cases.len());
    Ok(wrong == 0)
}

fn head(case: &RowCase) -> String {
    format!("{} {} {} x {}", case.name, case.dtype, case.shape.0, case.shape.1)
}

fn write(options: &Options, record: &Value) -> Result<()> {
    let date = record["date"].as_str().unwrap_or_default().get(..10).unwrap_or("undated");
    let commit = record["commit"].as_str().unwrap_or_default();
    let path = options.out.join(format!("gpu-rows-{date}-{commit}.json"));
    let text = serde_json::to_string_pretty(record).map_err(|e| Error::bug(e.to_string()))?;
    std::fs::create_dir_all(&options.out)
        .and_then(|()| std::fs::write(&path, text + "\n"))
        .map_err(|e| Error::user(format!("{} cannot be written: {e}", path.display())))?;
    println!("record: {}", path.display());
    Ok(())
}
