//! The tuner of CPU schedules: a model's kernels are timed under other schedules, and what is faster is kept.
//!
//! A search runs the whole model. In each round every kernel has its next candidate, so that a round tries as many
//! schedules as there are kernels, each with the caches as its neighbours leave them; the planner's own schedules are
//! timed again beside each round. At the end the winners and the planner's schedules run in turns, a kernel that did
//! not stay ahead goes back, and if the whole is not faster either, nothing is kept: a record never makes a model
//! slower than it was measured to be without.
//!
//! Records lie in `tuning/cpu/` of the cache, a file each, named by the hash of what they are for: the kernel's text, the
//! planner's schedule, the processor, its features, the number of threads, and this version. [`crate::Compiler`] takes
//! them when it compiles ([`Records::apply`]).
//!
//! Candidates change tile sizes and what the emitter does with registers. Sums may then be cut elsewhere: a round whose
//! results differ from the planner's by more than [`MOST_APART`] is dropped and told. Under `--precision bf16` two
//! schedules round other sums to bf16, so results are compared with the model's in f32 ([`Wanted`]).

use crate::compile::Compiler;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_plan::{Plan, Step};
use tilewright_runtime::{Code, Executable, Session};
use tilewright_target::{Cpu, Precision};
use tilewright_tile::{Kernel, Schedule};

/// Relative to an output's largest magnitude, what a candidate's results may differ from the planner's.
pub const MOST_APART: f64 = 1e-3;

/// As in the numerics contract: room on what rounding costs by itself.
const ROOM: f64 = 4.0;

/// A kernel must be faster by this part to keep another schedule.
const MARGIN: f64 = 0.02;

/// Runs of a candidate, of which the fastest counts.
const RUNS: usize = 3;

/// Turns at the end.
const TURNS: usize = 7;

/// Where records are kept.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

/// A schedule that was found to be faster than the planner's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    kernel: String,
    planned: String,
    schedule: String,
    planned_us: f64,
    tuned_us: f64,
    processor: String,
    threads: usize,
}

/// What a record is for.
fn key(kernel: &str, planned: &str, cpu: &Cpu) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let features = cpu.features.join(" ");
    let threads = cpu.threads.to_string();
    let parts = [version, kernel, planned, cpu.name.as_str(), &*features, &*threads];
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

impl Records {
    /// The records of a cache folder.
    pub fn at(cache: &Path) -> Records {
        Records { folder: cache.join("tuning").join("cpu") }
    }

    fn read(&self, key: &str) -> std::result::Result<Option<Record>, String> {
        let path = self.folder.join(format!("{key}.json"));
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
        let bad = |e: &dyn std::fmt::Display| format!("`{}` is ignored: {e}", path.display());
        serde_json::from_str(&text).map(Some).map_err(|e| bad(&e))
    }

    fn write(&self, key: &str, record: &Record) -> Result<()> {
        let path = self.folder.join(format!("{key}.json"));
        let text = serde_json::to_string_pretty(record).map_err(|e| Error::bug(e.to_string()))?;
        // Written beside and renamed, so that nobody reads half a file.
        let temp = path.with_extension(format!("tmp{}", std::process::id()));
        std::fs::create_dir_all(&self.folder)
            .and_then(|()| std::fs::write(&temp, text))
            .and_then(|()| std::fs::rename(&temp, &path))
            .inspect_err(|_| drop(std::fs::remove_file(&temp)))
            .map_err(|e| Error::user(format!("`{}` cannot be written: {e}", path.display())))
    }

    /// Gives the kernels of a plan the schedules that records have for them, and warnings about records that cannot be
    /// used: those are ignored.
    pub(crate) fn apply(&self, plan: &mut Plan, cpu: &Cpu) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.folder.is_dir() {
            return warnings;
        }
        let ids: Vec<_> = plan.kernels.ids().collect();
        for id in ids {
            let planned = &mut plan.kernels[id];
            let (text, schedule) = (planned.kernel.to_string(), planned.schedule.to_string());
            let key = key(&text, &schedule, cpu);
            let found = match self.read(&key) {
                Ok(found) => found,
                Err(warning) => {
                    warnings.push(warning);
                    continue;
                }
            };
            let Some(record) = found else { continue };
            let legal = Schedule::parse("record", &record.schedule)
                .and_then(|s| tilewright_tile::verify_schedule(&planned.kernel, &s).map(|()| s))
                .and_then(|s| tilewright_emit_llvm::emit_kernel(&planned.kernel, &s).map(|_| s));
            match legal {
                Ok(schedule) => planned.schedule = schedule,
                Err(e) => warnings.push(format!("the record {key} is ignored: {e}")),
            }
        }
        warnings
    }
}

/// What a search may cost.
#[derive(Clone, Copy, Debug)]
pub struct TuneOptions {
    /// Time after which no round begins.
    pub limit: Duration,
    /// Rounds at most: candidates of a kernel.
    pub rounds: usize,
}

/// What became of a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct TunedKernel {
    /// Its name.
    pub name: String,
    /// Steps of the plan that launch it.
    pub steps: usize,
    /// Candidates that ran and were right.
    pub tried: usize,
    /// Time of all its steps in a run under the planner's schedule, in microseconds: median of the turns.
    pub planned_us: f64,
    /// The same under the schedule that is kept.
    pub tuned_us: f64,
    /// The schedule, when it is not the planner's.
    pub schedule: Option<String>,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct TuneReport {
    /// Kernels, in the order of the plan.
    pub kernels: Vec<TunedKernel>,
    /// A run under the planner's schedules, in microseconds: median of the turns.
    pub planned_us: f64,
    /// A run under those that are kept.
    pub tuned_us: f64,
    /// Rounds that ran.
    pub rounds: usize,
    /// Rounds whose results were wrong.
    pub dropped: Vec<String>,
    /// Whether records were written.
    pub kept: bool,
}

/// Other schedules for a kernel, near the planner's first.
fn candidates(planned: &Schedule) -> Vec<Schedule> {
    let mut found: Vec<Schedule> = Vec::new();
    let mut add = |s: Schedule| {
        if s != *planned && !found.contains(&s) {
            found.push(s);
        }
    };
    let knobs = &planned.cpu;
    let lanes = i64::from(knobs.vector_bits / 32);
    let (rows, panel) = (i64::from(knobs.mma_rows), lanes * i64::from(knobs.mma_vectors));
    let product = ["BM", "BN", "BK"].iter().all(|t| planned.tiles.contains_key(*t));
    let with = |name: &str, value: i64| {
        let mut s = planned.clone();
        if let Some(v) = s.tiles.get_mut(name) {
            *v = value.max(1);
        }
        s
    };
    for (name, &size) in &planned.tiles {
        let sizes: Vec<i64> = match &**name {
            "BM" if product && size > rows => {
                vec![size - rows, size + rows, size / 2 / rows * rows, size * 2]
            }
            "BN" if product && size >= panel => {
                vec![size + panel, size - panel, size * 2, size / 2]
            }
            // A step of the depth that divides it still does in equal parts, of whole steps of the instruction.
            "BK" if product => {
                let least = if knobs.unit.is_tile() { 64 } else { 16 };
                let parts = [2, 3, 4, 6, 8].into_iter().filter(|p| size % (p * least) == 0);
                parts.map(|p| size / p).filter(|s| *s >= 64).collect()
            }
            "BM" | "BN" if product => vec![],
            _ => vec![size * 2, size / 2, size * 4, size / 4],
        };
        let unit = if product && &**name == "BN" { panel } else { 1 };
        sizes.into_iter().filter(|s| *s >= 1 && s % unit == 0).for_each(|s| add(with(name, s)));
    }
    let mut change = |f: &dyn Fn(&mut Schedule)| {
        let mut s = planned.clone();
        f(&mut s);
        add(s);
    };
    for unroll in [1, 2, 4] {
        change(&|s| s.cpu.unroll_k = unroll);
    }
    if product && !knobs.unit.is_tile() {
        for rows in [6, 8, 12, 13] {
            change(&|s| s.cpu.mma_rows = rows);
        }
    }
    if !product {
        change(&|s| s.cpu.stream = !s.cpu.stream);
        change(&|s| s.cpu.ahead = !s.cpu.ahead);
        for chains in [2, 4, 8] {
            change(&|s| s.cpu.reduce_chains = chains);
        }
    }
    found
}

/// The largest difference of each output of two runs, relative to its largest magnitude; infinite where one is finite and
/// the other is not.
fn apart(a: &[Tensor], b: &[Tensor]) -> Vec<f64> {
    let of = |(a, b): (&Tensor, &Tensor)| {
        let mut worst: f64 = 0.0;
        let (a, b) = (a.to_f64s(), b.to_f64s());
        let most = b.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs()));
        for (a, b) in a.iter().zip(&b) {
            let same = a == b || (a.is_nan() && b.is_nan());
            let difference = if same { 0.0 } else { (a - b).abs() / most.max(f64::MIN_POSITIVE) };
            worst = worst.max(if difference.is_nan() { f64::INFINITY } else { difference });
        }
        worst
    };
    a.iter().zip(b).map(of).collect()
}

/// What a candidate's results are compared with, and how far each output may be from it.
///
/// In f32 that is a run under the planner's schedules, and [`MOST_APART`]. In bf16 it is a run in f32, and the budget of
/// the numerics contract with that run in the oracle's place: `4 * |planned - f32| + 4u`, of the output's largest
/// magnitude, `u` = 2^-8.
struct Wanted {
    outputs: Vec<Tensor>,
    limits: Vec<f64>,
}

impl Wanted {
    /// `planned` is what the planner's schedules give, `wide` the same in f32 where products round to bf16.
    fn new(planned: Vec<Tensor>, wide: Option<Vec<Tensor>>) -> Wanted {
        match wide {
            None => Wanted { limits: vec![MOST_APART; planned.len()], outputs: planned },
            Some(wide) => {
                let own = apart(&planned, &wide);
                let limits = own.iter().map(|own| ROOM * own + 4.0 / 256.0).collect();
                Wanted { outputs: wide, limits }
            }
        }
    }

    /// How far results are off, when that is too far.
    fn broken(&self, outputs: &[Tensor]) -> Option<f64> {
        let all = apart(outputs, &self.outputs).into_iter().zip(&self.limits);
        all.filter(|(d, limit)| d > limit).map(|(d, _)| d).max_by(f64::total_cmp)
    }
}

/// One arm: a session and what its kernels took.
struct Arm {
    session: Session,
}

impl Arm {
    fn new(exe: Executable) -> Result<Arm> {
        Ok(Arm { session: Session::new(Arc::new(exe))? })
    }

    /// One run: the time of each kernel's steps together, of all, and the outputs.
    fn run(&mut self, inputs: &[Tensor]) -> Result<(Vec<f64>, f64, Vec<Tensor>)> {
        let mut times = Vec::new();
        let outputs = self.session.run_timed(inputs, &mut times)?;
        let plan = self.session.executable().plan();
        let mut each = vec![0.0; plan.kernels.len()];
        let mut all = 0.0;
        for t in &times {
            let us = t.time.as_secs_f64() * 1e6;
            all += us;
            if let Step::Launch { kernel, .. } = &plan.steps[t.step] {
                each[kernel.index()] += us;
            }
        }
        Ok((each, all, outputs))
    }

    /// The fastest of a few runs, kernel by kernel.
    fn fastest(&mut self, inputs: &[Tensor]) -> Result<(Vec<f64>, Vec<Tensor>)> {
        // The first finds cold caches and memory that was never touched.
        let (_, _, outputs) = self.run(inputs)?;
        let mut best = vec![f64::INFINITY; self.session.executable().plan().kernels.len()];
        for _ in 0..RUNS {
            let (each, ..) = self.run(inputs)?;
            best.iter_mut().zip(each).for_each(|(b, t)| *b = b.min(t));
        }
        Ok((best, outputs))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// The planner's and the chosen schedules in turns: medians of each kernel and of the whole, planned first.
fn turns(arms: &mut [Arm; 2], inputs: &[Tensor]) -> Result<[(Vec<f64>, f64); 2]> {
    let mut seen: [Vec<(Vec<f64>, f64)>; 2] = [Vec::new(), Vec::new()];
    for turn in 0..TURNS + 1 {
        // A B, B A, A B: drift meets both alike.
        let order = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
        for i in order {
            let (each, all, _) = arms[i].run(inputs)?;
            if turn > 0 {
                seen[i].push((each, all));
            }
        }
    }
    Ok(seen.map(|runs| {
        let kernels = runs.first().map_or(0, |r| r.0.len());
        let each = (0..kernels).map(|k| median(runs.iter().map(|r| r.0[k]).collect())).collect();
        (each, median(runs.iter().map(|r| r.1).collect()))
    }))
}

impl Compiler {
    /// Searches schedules for the kernels of a model, run on these inputs, and keeps those that make it faster.
    ///
    /// # Errors
    /// The compiler's; the user's when there is no cache folder, or records cannot be written.
    pub fn tune(
        &self,
        graph: &Graph,
        inputs: &[Tensor],
        options: &TuneOptions,
        observe: &mut dyn FnMut(&str),
    ) -> Result<TuneReport> {
        let records = match (&self.records, &self.cache) {
            (Some(records), _) => records.clone(),
            (None, Some(cache)) => Records::at(cache),
            (None, None) => return Err(Error::user("there is no folder to keep records in")),
        };
        let begin = Instant::now();
        let mut untuned = self.clone();
        untuned.records = None;
        let compiled = untuned.compile_graph(graph.clone())?;
        let base = compiled.executable().clone();
        let plan = base.plan().clone();
        let kernels: Vec<(Arc<Kernel>, Schedule)> =
            plan.kernels.iter().map(|(_, k)| (k.kernel.clone(), k.schedule.clone())).collect();
        let planned: Vec<Schedule> = kernels.iter().map(|k| k.1.clone()).collect();
        let own: Vec<Code> = base.code().to_vec();
        let executable = |schedules: &[Schedule], code: Vec<Code>| {
            base.rescheduled(schedules.to_vec(), code).and_then(Arm::new)
        };
        let mut reference = executable(&planned, own.clone())?;
        let (mut base_us, planned_outputs) = reference.fastest(inputs)?;
        let wide = match self.precision {
            Precision::Bf16 => {
                let mut wide = untuned.clone();
                wide.precision = Precision::F32;
                let compiled = wide.compile_graph(graph.clone())?;
                Some(compiled.session()?.run(inputs)?)
            }
            _ => None,
        };
        let wanted = Wanted::new(planned_outputs, wide);
        let legal = |kernel: &Kernel| {
            let kernel = kernel.clone();
            move |s: &Schedule| tilewright_tile::verify_schedule(&kernel, s).is_ok()
        };
        let lists: Vec<Vec<Schedule>> = kernels
            .iter()
            .map(|(kernel, planned)| {
                candidates(planned).into_iter().filter(legal(kernel)).collect()
            })
            .collect();
        let most = lists.iter().map(Vec::len).max().unwrap_or(0).min(options.rounds);
        // Of each kernel: how many ran, and the best so far with its code and its time over the planner's beside it.
        let mut tried = vec![0; kernels.len()];
        let mut best: BTreeMap<usize, (Schedule, Code, f64)> = BTreeMap::new();
        let (mut rounds, mut dropped) = (0, Vec::new());
        for round in 0..most {
            if begin.elapsed() > options.limit {
                break;
            }
            let ours: Vec<usize> = (0..kernels.len()).filter(|&k| round < lists[k].len()).collect();
            let asked: Vec<_> =
                ours.iter().map(|&k| (kernels[k].0.clone(), lists[k][round].clone())).collect();
            let made = self.code_for(&asked)?;
            let (mut schedules, mut code) = (planned.clone(), own.clone());
            let mut changed = Vec::new();
            for ((k, (_, schedule)), new) in ours.into_iter().zip(asked).zip(made) {
                if let Some(new) = new {
                    schedules[k] = schedule;
                    code[k] = new;
                    changed.push(k);
                }
            }
            if changed.is_empty() {
                continue;
            }
            let (times, outputs) = executable(&schedules, code.clone())?.fastest(inputs)?;
            rounds += 1;
            if let Some(difference) = wanted.broken(&outputs) {
                dropped.push(format!("round {round}: results differ by {difference:.1e}"));
                continue;
            }
            let (beside, _) = reference.fastest(inputs)?;
            for k in changed {
                tried[k] += 1;
                base_us[k] = base_us[k].min(beside[k]);
                let share = times[k] / beside[k].max(1e-9);
                if share < 1.0 - MARGIN && best.get(&k).is_none_or(|b| share < b.2) {
                    best.insert(k, (schedules[k].clone(), code[k].clone(), share));
                }
            }
            observe(&format!("round {}: {} kernels have a faster schedule", round + 1, best.len()));
        }
        // In turns, until those that are left are all ahead.
        let mut outcome = turns(&mut [reference, executable(&planned, own.clone())?], inputs)?;
        while !best.is_empty() {
            let (mut schedules, mut code) = (planned.clone(), own.clone());
            for (&k, (schedule, new, _)) in &best {
                (schedules[k], code[k]) = (schedule.clone(), new.clone());
            }
            let mut arms = [executable(&planned, own.clone())?, executable(&schedules, code)?];
            outcome = turns(&mut arms, inputs)?;
            let before = best.len();
            best.retain(|&k, _| outcome[1].0[k] < outcome[0].0[k] * (1.0 - MARGIN));
            if best.len() == before {
                if outcome[1].1 >= outcome[0].1 {
                    best.clear();
                }
                break;
            }
        }
        for (&k, (schedule, ..)) in &best {
            let (text, old) = (kernels[k].0.to_string(), planned[k].to_string());
            let record = Record {
                kernel: kernels[k].0.name.clone(),
                planned: old.clone(),
                schedule: schedule.to_string(),
                planned_us: outcome[0].0[k],
                tuned_us: outcome[1].0[k],
                processor: self.cpu.name.clone(),
                threads: self.cpu.threads,
            };
            records.write(&key(&text, &old, &self.cpu), &record)?;
        }
        let steps_of = |k: usize| {
            let is = |s: &&Step| matches!(s, Step::Launch { kernel, .. } if kernel.index() == k);
            plan.steps.iter().filter(is).count()
        };
        let report = |k: usize| {
            let kept = best.get(&k);
            let tuned = if kept.is_some() { outcome[1].0[k] } else { outcome[0].0[k] };
            TunedKernel {
                name: kernels[k].0.name.clone(),
                steps: steps_of(k),
                tried: tried[k],
                planned_us: outcome[0].0[k],
                tuned_us: tuned,
                schedule: kept.map(|b| b.0.to_string()),
            }
        };
        Ok(TuneReport {
            kernels: (0..kernels.len()).map(report).collect(),
            planned_us: outcome[0].1,
            tuned_us: if best.is_empty() { outcome[0].1 } else { outcome[1].1 },
            rounds,
            dropped,
            kept: !best.is_empty(),
        })
    }
}

impl TuneReport {
    /// A table.
    pub fn text(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{:<32} {:>5} {:>5} {:>10} {:>10}  schedule",
            "kernel", "steps", "tried", "us", "tuned"
        );
        for k in &self.kernels {
            let schedule = k.schedule.as_deref().unwrap_or("the planner's");
            let name: String = k.name.chars().take(32).collect();
            let _ = writeln!(
                out,
                "{name:<32} {:>5} {:>5} {:>10.1} {:>10.1}  {schedule}",
                k.steps, k.tried, k.planned_us, k.tuned_us
            );
        }
        for line in &self.dropped {
            let _ = writeln!(out, "dropped: {line}");
        }
        let _ = writeln!(
            out,
            "{} rounds: {:.1} us with the planner's schedules, {:.1} us tuned ({:.3}); {}",
            self.rounds,
            self.planned_us,
            self.tuned_us,
            self.tuned_us / self.planned_us.max(1e-9),
            if self.kept { "records were written" } else { "nothing is kept" },
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_cpu;
    use tilewright_base::DType;
    use tilewright_graph::{AttentionAttrs, ConvAttrs, GraphBuilder, Op, TensorType, ValueId};
    use tilewright_layout::Dim;

    fn model() -> (Graph, Tensor) {
        let mut b = GraphBuilder::new("g");
        let shape = [64usize, 48];
        let x = b.input("x", TensorType::new(DType::F32, shape.map(Dim::from).to_vec()));
        let values: Vec<f64> = (0..48 * 40).map(|i| f64::from(i % 17) / 17.0 - 0.5).collect();
        let w = b.constant("w", Tensor::from_f64s(DType::F32, &[48, 40], &values).unwrap());
        let y = b.contract("mk,kn->mn", x, w).unwrap();
        let y = b.op(Op::Softmax { axis: 1, log: false }, &[y]).unwrap();
        b.output("y", y);
        let input = Tensor::from_f64s(DType::F32, &shape, &vec![0.25; 64 * 48]).unwrap();
        (b.finish(), input)
    }

    /// A compiler with an empty cache of its own; none where this is no processor that we compile for.
    fn compiler(name: &str) -> Option<Compiler> {
        let folder = std::env::temp_dir().join(format!("tilewright-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        Some(Compiler::for_cpu(host_cpu(1, None).ok()?, Some(folder)))
    }

    #[test]
    fn a_small_budget_finds_nothing_slower_and_what_it_keeps_is_taken() {
        let Some(compiler) = compiler("tune") else { return };
        let (graph, x) = model();
        let options = TuneOptions { limit: Duration::from_secs(2), rounds: 3 };
        let mut lines = 0;
        let inputs = std::slice::from_ref(&x);
        let report = compiler.tune(&graph, inputs, &options, &mut |_| lines += 1).unwrap();
        assert!(
            report.rounds <= 3 && report.dropped.is_empty() && lines == report.rounds,
            "{report:?}"
        );
        assert!(report.tuned_us <= report.planned_us, "{report:?}");
        assert!(report.kernels.iter().any(|k| k.tried > 0), "{report:?}");
        let kept: Vec<_> = report.kernels.iter().filter(|k| k.schedule.is_some()).collect();
        assert_eq!(report.kept, !kept.is_empty());
        let compiled = compiler.compile_graph(graph.clone()).unwrap();
        for kernel in kept {
            let found = compiled.plan().kernels.iter().find(|(_, k)| k.kernel.name == kernel.name);
            assert_eq!(found.map(|(_, k)| k.schedule.to_string()), kernel.schedule);
        }
        assert!(report.text().contains("rounds"));
        let _ = std::fs::remove_dir_all(compiler.cache.unwrap());
    }

    /// Graphs whose kernels sum over rows, groups, keys and channels, each with inputs.
    fn summing() -> Vec<(Graph, Vec<Tensor>)> {
        let values = |n: usize, seed: usize| -> Vec<f64> {
            (0..n).map(|i| ((i * 7 + seed * 3) % 31) as f64 / 31.0 - 0.45).collect()
        };
        let given = |shape: &[usize], seed| {
            Tensor::from_f64s(DType::F32, shape, &values(shape.iter().product(), seed)).unwrap()
        };
        let make = |shapes: &[&[usize]], op: &dyn Fn(&mut GraphBuilder, &[ValueId]) -> ValueId| {
            let mut b = GraphBuilder::new("g");
            let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| given(s, i)).collect();
            let ids: Vec<ValueId> = shapes
                .iter()
                .enumerate()
                .map(|(i, s)| {
                    let dims: Vec<Dim> = s.iter().map(|&d| Dim::from(d)).collect();
                    b.input(format!("x{i}"), TensorType::new(DType::F32, dims))
                })
                .collect();
            let y = op(&mut b, &ids);
            b.output("y", y);
            (b.finish(), inputs)
        };
        let score = tilewright_expr::Func::identity(DType::F32);
        let attention = AttentionAttrs { score, causal: true, zeros: false };
        let conv = ConvAttrs {
            strides: vec![1; 2],
            pads_lo: vec![1; 2],
            pads_hi: vec![1; 2],
            dilations: vec![1; 2],
            groups: 2,
        };
        vec![
            make(&[&[37, 96], &[96], &[96]], &|b, x| {
                b.op(Op::LayerNorm { axis: 1, eps: 0.01f64.to_bits() }, x).unwrap()
            }),
            make(&[&[9, 130]], &|b, x| b.op(Op::Softmax { axis: 1, log: false }, x).unwrap()),
            make(&[&[9, 128]], &|b, x| {
                let codes: Vec<i64> = (0..70 * 128).map(|i| i * 5 % 16 - 8).collect();
                let codes = Tensor::from_i64s(DType::I4, &[70, 128], &codes).unwrap();
                let codes = b.constant("codes", codes);
                let scales = b.constant("scales", given(&[70, 4], 5));
                b.op(Op::GroupProduct { group: 32 }, &[x[0], codes, scales]).unwrap()
            }),
            make(&[&[1, 2, 33, 16], &[1, 2, 64, 16], &[1, 2, 64, 16]], &|b, x| {
                b.op(Op::Attention(attention.clone()), x).unwrap()
            }),
            make(&[&[1, 32, 9, 11], &[32, 16, 3, 3]], &|b, x| {
                b.op(Op::Conv(conv.clone()), x).unwrap()
            }),
        ]
    }

    /// Every candidate that is legal gives the planner's results but for the order of sums. `TW_CASES` says how many of
    /// each kernel are compiled.
    #[test]
    fn legal_candidates_compute_the_same() {
        let Some(compiler) = compiler("candidates") else { return };
        let most = std::env::var("TW_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(3);
        let mut ran = 0;
        for (graph, inputs) in summing() {
            let compiled = compiler.compile_graph(graph.clone()).unwrap();
            let wanted = compiled.session().unwrap().run(&inputs).unwrap();
            let base = compiled.executable();
            let plan = base.plan();
            let planned: Vec<Schedule> =
                plan.kernels.iter().map(|(_, k)| k.schedule.clone()).collect();
            for (id, kernel) in plan.kernels.iter() {
                let legal =
                    |s: &Schedule| tilewright_tile::verify_schedule(&kernel.kernel, s).is_ok();
                // Tile sizes first.
                let mut all = candidates(&kernel.schedule);
                all.retain(legal);
                all.sort_by_key(|s| s.tiles == kernel.schedule.tiles);
                all.truncate(most);
                let asked: Vec<_> =
                    all.iter().map(|s| (kernel.kernel.clone(), s.clone())).collect();
                for (schedule, code) in all.iter().zip(compiler.code_for(&asked).unwrap()) {
                    let Some(new) = code else { continue };
                    let (mut schedules, mut code) = (planned.clone(), base.code().to_vec());
                    schedules[id.index()] = schedule.clone();
                    code[id.index()] = new;
                    let mut arm = Arm::new(base.rescheduled(schedules, code).unwrap()).unwrap();
                    let (.., got) = arm.run(&inputs).unwrap();
                    let off = apart(&got, &wanted)[0];
                    assert!(
                        off < 1e-5,
                        "{off:e}: {schedule} instead of {}\n{graph}",
                        planned[id.index()]
                    );
                    ran += 1;
                }
            }
        }
        assert!(ran >= 10, "{ran} candidates ran");
        let _ = std::fs::remove_dir_all(compiler.cache.unwrap());
    }

    #[test]
    fn records_are_taken_when_they_are_legal_and_warned_of_when_not() {
        let Some(compiler) = compiler("records") else { return };
        let (graph, x) = model();
        let mut untuned = compiler.clone();
        untuned.records = None;
        let plain = untuned.compile_graph(graph.clone()).unwrap();
        let wanted = plain.session().unwrap().run(std::slice::from_ref(&x)).unwrap();
        let (_, planned) = plain.plan().kernels.iter().next().unwrap();
        let (text, old) = (planned.kernel.to_string(), planned.schedule.to_string());
        let key = key(&text, &old, &compiler.cpu);
        let other = candidates(&planned.schedule).swap_remove(0);
        let record = |schedule: &str| Record {
            kernel: planned.kernel.name.clone(),
            planned: old.clone(),
            schedule: schedule.into(),
            planned_us: 2.0,
            tuned_us: 1.0,
            processor: compiler.cpu.name.clone(),
            threads: 1,
        };
        let records = compiler.records.clone().unwrap();
        let taken = || {
            let compiled = compiler.compile_graph(graph.clone()).unwrap();
            let got = compiled.session().unwrap().run(std::slice::from_ref(&x)).unwrap();
            assert!(apart(&got, &wanted)[0] < 1e-6);
            let (_, kernel) = compiled.plan().kernels.iter().next().unwrap();
            (kernel.schedule.to_string(), compiled.warnings().to_vec())
        };
        records.write(&key, &record(&other.to_string())).unwrap();
        assert_eq!(taken(), (other.to_string(), vec![]));
        // A tile size that is missing, registers that there are not, and no record at all.
        for bad in ["vector=512 mma=14x2 unroll=1 chains=4", "nonsense"] {
            records.write(&key, &record(bad)).unwrap();
            let (schedule, warnings) = taken();
            assert_eq!(schedule, old);
            assert!(warnings[0].contains("is ignored"), "{warnings:?}");
        }
        std::fs::write(records.folder.join(format!("{key}.json")), "{").unwrap();
        let (schedule, warnings) = taken();
        assert_eq!((schedule, warnings.len()), (old, 1));
        let _ = std::fs::remove_dir_all(compiler.cache.unwrap());
    }

    #[test]
    fn results_that_are_not_finite_alike_are_apart() {
        let t = |v: f64| [Tensor::from_f64s(DType::F64, &[2], &[1.0, v]).unwrap()];
        assert_eq!(apart(&t(f64::NAN), &t(f64::NAN)), [0.0]);
        assert_eq!(apart(&t(f64::NAN), &t(0.5)), [f64::INFINITY]);
        assert_eq!(apart(&t(f64::INFINITY), &t(0.5)), [f64::INFINITY]);
        assert_eq!(apart(&t(0.25), &t(0.5)), [0.25]);
        // In f32 a part in a thousand; in bf16 what rounding costs, with room, and roundings where it costs nothing.
        let plain = Wanted::new(t(0.5).to_vec(), None);
        assert_eq!(plain.broken(&t(0.5005)), None);
        assert!(plain.broken(&t(0.503)).is_some());
        let rounded = Wanted::new(t(0.51).to_vec(), Some(t(0.5).to_vec()));
        assert_eq!(rounded.broken(&t(0.55)), None);
        assert!(rounded.broken(&t(0.56)).is_some());
        assert!(rounded.broken(&t(f64::NAN)).is_some());
    }
}
