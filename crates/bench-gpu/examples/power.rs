//! Schedules of one product under the device's power limit: `power LIST [--cache DIR] [--seconds S] [--rounds R]
//! [--compile|--once|--dry]`.
//!
//! ```text
//! = bf16 8192 8192 8192                   a product, as in a list of shapes
//! n 128x256x64 c2 2@0 r8 st4 sl2          as it is, tile, cooperative with 2 consumers, clusters of 2 along rows,
//! s 128x192x64 p2 1@0 r16 st4 sl1 -+      raster, stages, staging tiles, cache policies; or transposed, ping-pong
//! ```
//!
//! Each schedule runs for S seconds in turns with cuBLASLt's best; then, with `--rounds R`, R times for S seconds alone. The
//! lines that are printed say from when to when (seconds since 1970), so that samples of clocks and power that another program
//! takes can be put beside them. `--compile` only fills the cache, `--once` launches each once, for a profiler. `--dry` needs
//! no device: it prints the model's time and what the compiler makes of each.

use std::time::{Duration, Instant, SystemTime};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{Ours, PEER_WORKSPACE_BYTES, Pass, Peer, planner_gpu, programs};
use tilewright_bench_gpu::case::{Case, read_list};
use tilewright_bench_gpu::measure::{Sets, check_ours, quartiles};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Arch, Event, Gpu, Nvrtc, Stream};
use tilewright_device::CachePolicy;
use tilewright_emit_cuda::emit;
use tilewright_kernels::gemm::{Candidate, Choice, candidate, estimate_choice, picked};
use tilewright_launch::{Loader, request};
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
    name: String,
    pass: Pass<'a>,
    products: usize,
}

/// Until the power limit's clocks have settled.
const SETTLE: Duration = Duration::from_millis(150);

impl Arm<'_> {
    fn sample(&self, stream: &Stream, events: &[Event; 2]) -> Result<f64> {
        events[0].record(stream)?;
        self.pass.launch(stream)?;
        events[1].record(stream)?;
        events[1].synchronize()?;
        Ok(events[1].since_us(&events[0])? / self.products as f64)
    }

    /// Alone for a while: the mean, and from when to when.
    fn alone(
        &self,
        stream: &Stream,
        events: &[Event; 2],
        budget: Duration,
    ) -> Result<(f64, f64, f64)> {
        let begin = Instant::now();
        while begin.elapsed() < SETTLE {
            self.sample(stream, events)?;
        }
        let (from, mut us) = (now(), Vec::new());
        while begin.elapsed() < SETTLE + budget {
            us.push(self.sample(stream, events)?);
        }
        Ok((us.iter().sum::<f64>() / us.len().max(1) as f64, from, now()))
    }
}

fn main() {
    if let Err(error) = run() {
        eprintln!("{error:?}");
    }
}

/// The products of a list, with their schedules' lines.
fn groups(list: &str) -> Result<Vec<(Case, Vec<String>)>> {
    let text = std::fs::read_to_string(list).map_err(|e| user(format!("{list}: {e}")))?;
    let mut groups: Vec<(Case, Vec<String>)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(shape) = line.strip_prefix('=') {
            let case = read_list("list", shape, &[])?;
            groups.extend(case.into_iter().map(|c| (c, Vec::new())));
        } else if let Some(group) = groups.last_mut() {
            group.1.push(line.to_owned());
        }
    }
    Ok(groups)
}

/// What will run: the model's pick first.
fn plans(
    case: &Case,
    lines: &[String],
    target: &tilewright_target::Gpu,
) -> Result<Vec<(String, Candidate)>> {
    let problem = case.problem();
    let mut all = Vec::new();
    let pick = picked(&problem, target)?.into_iter().map(|c| ("pick".to_owned(), Ok(c)));
    for (line, choice) in pick.chain(lines.iter().map(|l| (l.clone(), choice(l)))) {
        let choice = choice?;
        let estimate = estimate_choice(&problem, target, &choice);
        match candidate(&problem, &choice) {
            Ok(Some(made)) => all.push((line, Candidate { estimate_us: estimate, ..made })),
            Ok(None) => println!("{line}: refused"),
            Err(e) => println!("{line}: {}", e.message()),
        }
    }
    Ok(all)
}

fn named(line: &str, made: &Candidate) -> String {
    if line == "pick" { format!("pick {}", made.steps[0].schedule) } else { line.to_owned() }
}

/// What needs no device.
fn dry(groups: &[(Case, Vec<String>)], nvrtc: &Nvrtc, texts: Option<&str>) -> Result<()> {
    for (case, lines) in groups {
        println!("= {} {} {}", case.numbers.name, case.shape_text(), case.orders_text());
        for (line, made) in plans(case, lines, &tilewright_target::Gpu::h200())? {
            let mut said = String::new();
            if let Some(folder) = texts {
                for program in programs(&made)? {
                    let source = emit(&program)?;
                    let path = format!("{folder}/{}.cu", line.replace([' ', '@'], "_"));
                    std::fs::write(&path, &source.text)
                        .map_err(|e| user(format!("{path}: {e}")))?;
                    said += &match nvrtc.compile(&request(&program, &source, Arch::SM_90A)) {
                        Ok(c) => format!(" {:?}", c.functions),
                        Err(e) => format!(" {e:?}"),
                    };
                }
            }
            println!("{:10.2} {}{said}", made.estimate_us, named(&line, &made));
        }
    }
    Ok(())
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut list, mut cache, mut texts) = (None, None, None);
    let (mut seconds, mut rounds, mut mode) = (0.3, 0, String::new());
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|s| s.parse::<f64>().ok());
        match argument.as_str() {
            "--seconds" => seconds = number().unwrap_or(seconds),
            "--rounds" => rounds = number().unwrap_or(0.0) as usize,
            "--cache" => cache = arguments.next(),
            "--texts" => texts = arguments.next(),
            "--compile" | "--once" | "--dry" => mode = argument,
            _ => list = Some(argument),
        }
    }
    let groups = groups(&list.ok_or_else(|| user("power LIST".into()))?)?;
    let nvrtc = Nvrtc::open(cache.as_deref().map(std::path::Path::new))?;
    if mode == "--dry" {
        return dry(&groups, &nvrtc, texts.as_deref());
    }
    let gpu = Gpu::open(0)?;
    let stream = gpu.stream()?;
    let support = Support::new(&gpu, &nvrtc)?;
    let peer = CublasLt::open(&gpu)?;
    let loader = Loader::new(gpu.clone(), nvrtc);
    let target = planner_gpu(loader.gpu());
    let workspace = stream.alloc(PEER_WORKSPACE_BYTES)?;
    // Everything is compiled at once.
    let all: Vec<Vec<(String, Candidate)>> =
        groups.iter().map(|(case, lines)| plans(case, lines, &target)).collect::<Result<_>>()?;
    let every: Vec<_> =
        all.iter().flatten().filter_map(|(_, c)| programs(c).ok()).flatten().collect();
    let begin = Instant::now();
    let failed = loader.load_all(&every).iter().filter(|l| l.is_err()).count();
    println!("{} kernels, {failed} failed, {:.1} s", every.len(), begin.elapsed().as_secs_f64());
    if mode == "--compile" {
        return Ok(());
    }
    let budget = Duration::from_secs_f64(seconds);
    let events = [Event::new(&gpu)?, Event::new(&gpu)?];
    for ((case, _), plans) in groups.iter().zip(&all) {
        let sets = Sets::new(&stream, &support, case)?;
        // Large products find the cache cold on one set, too.
        let large = case.bytes() > 5 * gpu.properties().l2_bytes as usize;
        let count = if large { 1 } else { sets.matrices().len() };
        let blas = Peer::new(&peer, &loader, case, &workspace)?;
        println!("= {} {} {}", case.numbers.name, case.shape_text(), case.orders_text());
        let mut best = (f64::INFINITY, 0);
        for algorithm in 0..blas.algorithms() {
            let run = |i: usize| blas.launch(algorithm, &stream, case, &sets.matrices()[i]);
            run(0)?;
            let pass = Pass::record(&stream, 1, run)?;
            let arm = Arm { name: String::new(), pass, products: 1 };
            let mut us = f64::INFINITY;
            for _ in 0..4 {
                us = us.min(arm.sample(&stream, &events)?);
            }
            if us < best.0 {
                best = (us, algorithm);
            }
        }
        let run = |i: usize| blas.launch(best.1, &stream, case, &sets.matrices()[i]);
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
        let name = format!("cublaslt {}", best.1);
        let their = Arm { name, pass: Pass::record(&stream, count, run)?, products: count };
        // What was loaded stays as long as its passes.
        let mut loaded = Vec::new();
        for (line, made) in plans {
            match Ours::load(&loader, &stream, made) {
                Ok(ours) => {
                    let (error, unwritten) = check_ours(&stream, &support, &sets, &ours, 8)?;
                    let right = unwritten == 0 && error < 0.01;
                    let wrong = if right { String::new() } else { format!(" WRONG {error:.2e}") };
                    let estimate = made.estimate_us;
                    loaded.push((format!("{} [{estimate:.1}]{wrong}", named(line, made)), ours));
                }
                Err(e) => println!("{line}: {}", e.message().lines().next().unwrap_or("")),
            }
        }
        let bound: Vec<Vec<_>> = loaded
            .iter()
            .map(|(_, ours)| sets.matrices().iter().map(|set| ours.bind(case, set)).collect())
            .collect::<Result<_>>()?;
        let mut arms = Vec::new();
        for ((name, _), bound) in loaded.iter().zip(&bound) {
            let pass = Pass::record(&stream, count, |i: usize| bound[i].launch(&stream))?;
            arms.push(Arm { name: name.clone(), pass, products: count });
        }
        for arm in &arms {
            arm.sample(&stream, &events)?;
            let (mut us, mut peer_us, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            let (begin, from) = (Instant::now(), now());
            while begin.elapsed() < budget {
                let first = us.len().is_multiple_of(2);
                let (x, y) = if first { (arm, &their) } else { (&their, arm) };
                let (x, y) = (x.sample(&stream, &events)?, y.sample(&stream, &events)?);
                let (ours, theirs) = if first { (x, y) } else { (y, x) };
                us.push(ours);
                peer_us.push(theirs);
                ratios.push(ours / theirs);
            }
            let [low, ratio, high] = quartiles(&ratios);
            println!(
                "{:9.2} {:9.2} {ratio:6.4} ({low:.3} {high:.3}) | {:9.2} {from:.3} {:.3} | {}",
                quartiles(&us)[1],
                quartiles(&peer_us)[1],
                quartiles(&us)[1],
                now(),
                arm.name
            );
        }
        arms.push(their);
        let mut times = vec![Vec::new(); arms.len()];
        for _ in 0..rounds {
            for (arm, times) in arms.iter().zip(&mut times) {
                let (us, from, to) = arm.alone(&stream, &events, budget)?;
                times.push(us);
                println!("alone | {us:9.2} {from:.3} {to:.3} | {}", arm.name);
            }
        }
        for (arm, times) in arms.iter().zip(&times).filter(|(_, t)| !t.is_empty()) {
            let mean = times.iter().sum::<f64>() / times.len() as f64;
            println!("alone, mean of {} {mean:9.2} {}", times.len(), arm.name);
        }
    }
    Ok(())
}
