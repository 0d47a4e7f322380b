//! Schedules of one product under the device's power limit: `power LIST [--cache DIR] [--seconds S] [--compile|--once]`.
//!
//! ```text
//! = bf16 8192 8192 8192                   a product, as in a list of shapes
//! n 128x256x64 c2 2@0 r8 st4 sl2          as it is, tile, cooperative with 2 consumers, clusters of 2 along rows,
//! s 128x192x64 p2 1@0 r16 st4 sl1 -+      raster, stages, staging tiles, cache policies; or transposed, ping-pong
//! ```
//!
//! Each schedule runs for S seconds in turns with cuBLASLt's best, then for S seconds alone; the lines that are printed say
//! from when to when (seconds since 1970), so that samples of clocks and power that another program takes can be put beside
//! them. `--compile` only fills the cache, `--once` launches each once, for a profiler.

use std::time::{Duration, Instant, SystemTime};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{Ours, PEER_WORKSPACE_BYTES, Pass, Peer, planner_gpu, programs};
use tilewright_bench_gpu::case::{Case, read_list};
use tilewright_bench_gpu::measure::{Sets, check_ours, quartiles};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Event, Gpu, Nvrtc, Stream};
use tilewright_device::CachePolicy;
use tilewright_kernels::gemm::{Candidate, Choice, candidate, picked};
use tilewright_launch::Loader;
use tilewright_lower_gpu::{GpuSchedule, Mode};

fn user(message: String) -> Error {
    Error::user(message)
}

/// A schedule of the list.
fn choice(line: &str) -> Result<Choice> {
    let bad = || user(format!("`{line}` is no schedule"));
    let number = |text: &str| text.parse::<i64>().map_err(|_| bad());
    let words: Vec<&str> = line.split_whitespace().collect();
    let [orientation, tile, mode, cluster, raster, stages, slots, rest @ ..] = &words[..] else {
        return Err(bad());
    };
    let sides: Vec<i64> = tile.split('x').map(number).collect::<Result<_>>()?;
    let [bm, bn, bk] = sides[..] else { return Err(bad()) };
    let mut s = GpuSchedule::hopper(&[("BM", bm), ("BN", bn), ("BK", bk)]);
    s.mode = if mode.starts_with('p') { Mode::PingPong } else { Mode::Cooperative };
    s.consumers = number(&mode[1..])? as u32;
    let (blocks, axis) = cluster.split_once('@').ok_or_else(bad)?;
    (s.cluster, s.cluster_axis) = (number(blocks)? as u32, number(axis)? as usize);
    s.raster = number(raster.trim_start_matches('r'))? as u32;
    s.stages = number(stages.trim_start_matches("st"))? as u32;
    s.store_slots = number(slots.trim_start_matches("sl"))? as u32;
    (s.vector, s.dependent) = (2, true);
    for (policy, c) in s.cache.iter_mut().zip(rest.first().map_or("", |r| *r).chars()) {
        *policy = match c {
            '+' => CachePolicy::EvictLast,
            '-' => CachePolicy::EvictFirst,
            _ => CachePolicy::Normal,
        };
    }
    Ok(Choice { estimate_us: 0.0, swapped: *orientation == "s", splits: 1, schedule: s })
}

fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// An arm: a pass over the sets.
struct Arm<'a> {
    pass: Pass<'a>,
    products: usize,
}

impl Arm<'_> {
    fn sample(&self, stream: &Stream, events: &[Event; 2]) -> Result<f64> {
        events[0].record(stream)?;
        self.pass.launch(stream)?;
        events[1].record(stream)?;
        events[1].synchronize()?;
        Ok(events[1].since_us(&events[0])? / self.products as f64)
    }

    /// Alone for a while: the median, and from when to when.
    fn alone(&self, stream: &Stream, events: &[Event; 2], budget: Duration) -> Result<String> {
        let (from, begin, mut us) = (now(), Instant::now(), Vec::new());
        while begin.elapsed() < budget {
            us.push(self.sample(stream, events)?);
        }
        Ok(format!("{:9.2} {from:.3} {:.3}", quartiles(&us)[1], now()))
    }
}

fn main() {
    if let Err(error) = run() {
        eprintln!("{error:?}");
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut list, mut cache, mut seconds, mut mode) = (None, None, 0.3, String::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--cache" => cache = arguments.next(),
            "--seconds" => {
                seconds = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(seconds);
            }
            "--compile" | "--once" => mode = argument,
            _ => list = Some(argument),
        }
    }
    let list = list.ok_or_else(|| user("power LIST".into()))?;
    let text = std::fs::read_to_string(&list).map_err(|e| user(format!("{list}: {e}")))?;
    let mut groups: Vec<(Case, Vec<String>)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(shape) = line.strip_prefix('=') {
            let case = read_list("list", shape, &[])?;
            groups.extend(case.into_iter().map(|c| (c, Vec::new())));
        } else if let Some(group) = groups.last_mut() {
            group.1.push(line.to_owned());
        }
    }
    let gpu = Gpu::open(0)?;
    let nvrtc = Nvrtc::open(cache.as_deref().map(std::path::Path::new))?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let peer = CublasLt::open(&gpu)?;
    let loader = Loader::new(gpu.clone(), nvrtc);
    let target = planner_gpu(loader.gpu());
    let workspace = stream.alloc(PEER_WORKSPACE_BYTES)?;
    // Everything is compiled at once.
    let mut plans: Vec<Vec<(String, Candidate)>> = Vec::new();
    for (case, lines) in &groups {
        let problem = case.problem();
        let mut all = Vec::new();
        let pick = picked(&problem, &target)?.into_iter().map(|c| ("pick".to_owned(), Ok(c)));
        for (line, choice) in pick.chain(lines.iter().map(|l| (l.clone(), choice(l)))) {
            match candidate(&problem, &choice?) {
                Ok(Some(made)) => all.push((line, made)),
                Ok(None) => println!("{line}: refused"),
                Err(e) => println!("{line}: {}", e.message()),
            }
        }
        plans.push(all);
    }
    let every: Vec<_> =
        plans.iter().flatten().filter_map(|(_, c)| programs(c).ok()).flatten().collect();
    let begin = Instant::now();
    let failed = loader.load_all(&every).iter().filter(|l| l.is_err()).count();
    println!("{} kernels, {failed} failed, {:.1} s", every.len(), begin.elapsed().as_secs_f64());
    if mode == "--compile" {
        return Ok(());
    }
    let budget = Duration::from_secs_f64(seconds);
    let events = [Event::new(&gpu)?, Event::new(&gpu)?];
    for ((case, _), plans) in groups.iter().zip(&plans) {
        let sets = Sets::new(&stream, &support, case)?;
        let count = sets.matrices().len();
        let blas = Peer::new(&peer, &loader, case, &workspace)?;
        println!("= {} {} {}", case.numbers.name, case.shape_text(), case.orders_text());
        let mut best = (f64::INFINITY, 0);
        for algorithm in 0..blas.algorithms() {
            let run = |i: usize| blas.launch(algorithm, &stream, case, &sets.matrices()[i]);
            run(0)?;
            let arm = Arm { pass: Pass::record(&stream, 1, run)?, products: 1 };
            arm.sample(&stream, &events)?;
            best = if let us @ 0.0.. =
                arm.sample(&stream, &events)?.min(arm.sample(&stream, &events)?)
                && us < best.0
            {
                (us, algorithm)
            } else {
                best
            };
        }
        let run = |i: usize| blas.launch(best.1, &stream, case, &sets.matrices()[i]);
        let their = Arm { pass: Pass::record(&stream, count, run)?, products: count };
        if mode == "--once" {
            run(0)?;
            for (line, made) in plans {
                let Ok(ours) = Ours::load(&loader, &stream, made) else { continue };
                ours.bind(case, &sets.matrices()[0])?.launch(&stream)?;
                println!("launched {line}");
            }
            stream.synchronize()?;
            continue;
        }
        println!(
            "{:9} {:9} {:5.3} | {} | cublaslt {}",
            0,
            0,
            1.0,
            their.alone(&stream, &events, budget)?,
            best.1
        );
        for (line, made) in plans {
            let ours = match Ours::load(&loader, &stream, made) {
                Ok(ours) => ours,
                Err(e) => {
                    println!("{line}: {}", e.message().lines().next().unwrap_or(""));
                    continue;
                }
            };
            let (error, unwritten) = check_ours(&stream, &support, &sets, &ours, 8)?;
            let bound: Vec<_> =
                sets.matrices().iter().map(|set| ours.bind(case, set)).collect::<Result<_>>()?;
            let run = |i: usize| bound[i].launch(&stream);
            let arm = Arm { pass: Pass::record(&stream, count, run)?, products: count };
            arm.sample(&stream, &events)?;
            let (mut us, mut peer_us, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            let begin = Instant::now();
            while begin.elapsed() < budget {
                let first = us.len().is_multiple_of(2);
                let (x, y) = if first { (&arm, &their) } else { (&their, &arm) };
                let (x, y) = (x.sample(&stream, &events)?, y.sample(&stream, &events)?);
                let (ours, theirs) = if first { (x, y) } else { (y, x) };
                us.push(ours);
                peer_us.push(theirs);
                ratios.push(ours / theirs);
            }
            let alone = arm.alone(&stream, &events, budget)?;
            let name = if line == "pick" {
                format!("pick {}", made.steps[0].schedule)
            } else {
                line.clone()
            };
            println!(
                "{:9.2} {:9.2} {:5.3} | {alone} | {name}{}",
                quartiles(&us)[1],
                quartiles(&peer_us)[1],
                quartiles(&ratios)[1],
                if unwritten > 0 || error > 0.01 {
                    format!(" WRONG {error:.2e} {unwritten}")
                } else {
                    String::new()
                }
            );
        }
    }
    Ok(())
}
