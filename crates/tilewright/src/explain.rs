//! What each kernel does, costs and reaches, and how memory is used.

#[cfg(feature = "cpu")]
use crate::compile::Compiled;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
#[cfg(feature = "cpu")]
use tilewright_base::Result;
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_layout::{Dim, Env};
use tilewright_plan::{BufferId, Note, Plan, Step};
#[cfg(feature = "cpu")]
use tilewright_target::Ceilings;
use tilewright_tile::{Access, Block, Kernel, MatrixUnit, Stmt, TileOp};

/// Which ceiling of the machine limits a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Roof {
    /// Multiply-adds per second.
    Compute,
    /// Memory bandwidth.
    Memory,
    /// Starting the kernel.
    Launch,
}

impl Roof {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Roof::Compute => "compute",
            Roof::Memory => "memory",
            Roof::Launch => "launch",
        }
    }
}

/// One step of the plan.
#[derive(Clone, Debug, Serialize)]
pub struct KernelReport {
    /// Number of the step.
    pub step: usize,
    /// Short label, e.g. `contract+bias+gelu`.
    pub label: String,
    /// Name of its kernel (several steps may share one), or `host`.
    pub kernel: String,
    /// What the group is built around.
    pub anchor: String,
    /// Its products: types of the operands and of the sum, and the matrix unit; empty without any.
    pub products: Vec<String>,
    /// Graph nodes fused here.
    pub nodes: Vec<String>,
    /// Buffers read, by name.
    pub reads: Vec<String>,
    /// Buffers written, by name.
    pub writes: Vec<String>,
    /// Earlier steps whose results are read here.
    pub after: Vec<usize>,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes that must move at least.
    pub bytes: f64,
    /// Bytes that fusion keeps out of memory.
    pub bytes_saved: f64,
    /// Median time in seconds.
    pub seconds: f64,
    /// Part of the whole.
    pub share: f64,
    /// The ceiling that limits it.
    pub roof: Roof,
    /// Time that the ceiling allows, divided by the time taken. Memory ceilings count traffic to
    /// main memory: data that stays in the caches can exceed 1.
    pub fraction: f64,
    /// What the fusion planner expected, in seconds.
    pub estimate_seconds: f64,
}

/// Memory of the plan.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryReport {
    /// The one block that holds all intermediates.
    pub arena_bytes: usize,
    /// What it would take if no kernel wrote its result over an operand.
    pub apart_bytes: usize,
    /// What one allocation per intermediate would take.
    pub naive_bytes: usize,
    /// Weights used in place.
    pub shared_constant_bytes: usize,
    /// Weights copied into another layout.
    pub packed_constant_bytes: usize,
    /// Scratch of all threads.
    pub scratch_bytes: usize,
}

/// Everything that `tw explain` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// Name of the model.
    pub model: String,
    /// The machine.
    pub cpu: tilewright_target::Cpu,
    /// Sizes that were chosen.
    pub sizes: Vec<(String, i64)>,
    /// The steps in order.
    pub kernels: Vec<KernelReport>,
    /// Sum of the steps' times, in seconds.
    pub seconds: f64,
    /// Operators of the graph as imported.
    pub operators_before: usize,
    /// Operators after the passes.
    pub operators_after: usize,
    /// Distinct kernels.
    pub distinct_kernels: usize,
    /// Memory.
    pub memory: MemoryReport,
    /// Compilation stages with seconds.
    pub stages: Vec<(String, f64)>,
}

/// Times each kernel `runs` times on these inputs and compares it with the machine's ceilings.
#[cfg(feature = "cpu")]
pub fn explain(
    compiled: &Compiled,
    original: &Graph,
    inputs: &[Tensor],
    runs: usize,
) -> Result<Explanation> {
    let plan = compiled.plan();
    let times = crate::bench::step_medians(compiled, inputs, runs)?;
    let seconds: Vec<f64> = times.iter().map(|t| t.as_secs_f64()).collect();
    let env = env_of(compiled.graph(), inputs);
    let ceilings = &compiled.cpu().ceilings;
    let kernels = steps(plan, &env, &seconds, &|k| Limits {
        flops_per_s: compute_ceiling(ceilings, &k.products),
        bytes_per_s: ceilings.memory_read_bytes_per_s,
        launch_s: ceilings.launch_s,
    });
    let memory = compiled.session()?.memory(inputs)?;
    Ok(Explanation {
        model: plan.name.clone(),
        cpu: compiled.cpu().clone(),
        sizes: env.iter().map(|(n, v)| (n.to_string(), *v)).collect(),
        kernels,
        seconds: seconds.iter().sum(),
        operators_before: original.order.len(),
        operators_after: compiled.graph().order.len(),
        distinct_kernels: plan.kernels.len(),
        memory: MemoryReport {
            arena_bytes: memory.arena_bytes,
            apart_bytes: memory.apart_bytes,
            naive_bytes: memory.naive_bytes,
            shared_constant_bytes: memory.shared_constant_bytes,
            packed_constant_bytes: memory.packed_constant_bytes,
            scratch_bytes: memory.scratch_bytes,
        },
        stages: compiled.stages().iter().map(|s| (s.name.clone(), s.time.as_secs_f64())).collect(),
    })
}

/// Rates that bound a kernel.
pub(crate) struct Limits {
    pub(crate) flops_per_s: f64,
    pub(crate) bytes_per_s: f64,
    pub(crate) launch_s: f64,
}

/// A report per step of a plan, from the time that each took.
pub(crate) fn steps(
    plan: &Plan,
    env: &Env,
    seconds: &[f64],
    limits: &dyn Fn(&KernelReport) -> Limits,
) -> Vec<KernelReport> {
    let number = |d: &Dim| d.eval(env).map_or(0.0, |v| v as f64);
    let total: f64 = seconds.iter().sum();
    let mut kernels = Vec::with_capacity(plan.steps.len());
    // Steps that write a buffer, so far.
    let mut writer: BTreeMap<BufferId, Vec<usize>> = BTreeMap::new();
    for (i, (step, &seconds)) in plan.steps.iter().zip(seconds).enumerate() {
        let mut products = Vec::new();
        let (note, kernel, reads, writes): (&Note, String, Vec<BufferId>, Vec<BufferId>) =
            match step {
                Step::Launch { kernel, args, note, .. } => {
                    let planned = &plan.kernels[*kernel];
                    products = products_of(&planned.kernel, planned.schedule.cpu.unit);
                    let side = |wanted: bool| {
                        let params = planned.kernel.params.as_slice().iter().zip(args);
                        let side = params.filter(|(p, _)| (p.access == Access::In) == wanted);
                        side.map(|(_, b)| *b).collect()
                    };
                    (note, planned.kernel.name.clone(), side(true), side(false))
                }
                Step::Library { call, inputs, outputs, note } => {
                    (note, call.name().to_string(), inputs.clone(), outputs.clone())
                }
                Step::Host { inputs, outputs, note, .. } => {
                    (note, "host".to_string(), inputs.clone(), outputs.clone())
                }
            };
        let mut after: Vec<usize> =
            reads.iter().filter_map(|b| writer.get(b)).flatten().copied().collect();
        after.sort_unstable();
        after.dedup();
        for b in &writes {
            writer.entry(*b).or_default().push(i);
        }
        let names =
            |list: &[BufferId]| list.iter().map(|b| plan.buffers[*b].name.clone()).collect();
        let (reads, writes) = (names(&reads), names(&writes));
        let mut report = KernelReport {
            step: i,
            label: note.label.clone(),
            kernel,
            anchor: note.anchor.clone(),
            products,
            nodes: note.nodes.clone(),
            reads,
            writes,
            after,
            flops: number(&note.flops),
            bytes: number(&note.bytes),
            bytes_saved: number(&note.bytes_saved),
            seconds,
            share: if total > 0.0 { seconds / total } else { 0.0 },
            roof: Roof::Launch,
            fraction: 0.0,
            estimate_seconds: note.estimate_ns * 1e-9,
        };
        let rates = limits(&report);
        let limits = [
            (Roof::Compute, report.flops / rates.flops_per_s),
            (Roof::Memory, report.bytes / rates.bytes_per_s),
            (Roof::Launch, rates.launch_s),
        ];
        let (roof, least) =
            limits.into_iter().fold((Roof::Launch, 0.0), |a, b| if b.1 > a.1 { b } else { a });
        report.roof = roof;
        report.fraction = if seconds > 0.0 { least / seconds } else { 0.0 };
        kernels.push(report);
    }
    kernels
}

/// What the machine's ceilings allow each step of a plan at least, in seconds, and which ceiling it is.
#[cfg(feature = "cpu")]
pub fn least_times(compiled: &Compiled, env: &Env) -> Vec<(f64, &'static str)> {
    let ceilings = &compiled.cpu().ceilings;
    least(compiled.plan(), env, &|k| Limits {
        flops_per_s: compute_ceiling(ceilings, &k.products),
        bytes_per_s: ceilings.memory_read_bytes_per_s,
        launch_s: ceilings.launch_s,
    })
}

/// See [`least_times`].
pub(crate) fn least(
    plan: &Plan,
    env: &Env,
    limits: &dyn Fn(&KernelReport) -> Limits,
) -> Vec<(f64, &'static str)> {
    // Of one second for each step, the fraction is the time in seconds.
    let seconds = vec![1.0; plan.steps.len()];
    let reports = steps(plan, env, &seconds, limits);
    reports.iter().map(|r| (r.fraction, r.roof.name())).collect()
}

/// What a step stands for.
pub fn note_of(step: &Step) -> &Note {
    step.note()
}

/// Symbols that the inputs' shapes determine.
pub fn env_of(graph: &Graph, inputs: &[Tensor]) -> Env {
    let mut env = Env::new();
    for (&v, tensor) in graph.inputs.iter().zip(inputs) {
        for (dim, &extent) in graph.shape(v).iter().zip(tensor.shape()) {
            if let Some(symbol) = dim.as_symbol() {
                env.entry(symbol.clone()).or_insert(extent as i64);
            }
        }
    }
    env
}

/// Human-readable bytes.
pub fn bytes_text(bytes: f64) -> String {
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b * 1e-9),
        b if b >= 1e6 => format!("{:.1} MB", b * 1e-6),
        b if b >= 1e3 => format!("{:.1} kB", b * 1e-3),
        b => format!("{b:.0} B"),
    }
}

/// Human-readable seconds.
pub fn time_text(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

impl Explanation {
    /// The summary and a table of the `most` costliest kernels (all when 0).
    pub fn text(&self, most: usize) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{}: {} operators -> {} after the passes -> {} kernels ({} distinct), {} in all",
            self.model,
            self.operators_before,
            self.operators_after,
            self.kernels.len(),
            self.distinct_kernels,
            time_text(self.seconds),
        );
        let saved: f64 = self.kernels.iter().map(|k| k.bytes_saved).sum();
        let flops: f64 = self.kernels.iter().map(|k| k.flops).sum();
        let _ = writeln!(
            out,
            "fusion keeps {} out of memory; {:.2} GFLOP at {:.1} GFLOP/s; the machine's ceilings{}: {:.0} GFLOP/s, {:.1} GB/s",
            bytes_text(saved),
            flops * 1e-9,
            flops * 1e-9 / self.seconds.max(1e-12),
            if self.cpu.ceilings.measured { "" } else { " (guessed; run `tw machine --measure`)" },
            self.cpu.ceilings.f32_flops_per_s * 1e-9,
            self.cpu.ceilings.memory_read_bytes_per_s * 1e-9,
        );
        let m = &self.memory;
        let _ = writeln!(
            out,
            "memory: arena {} ({} without writing over operands, {} with one allocation per intermediate), weights {} in place and {} packed, scratch {}",
            bytes_text(m.arena_bytes as f64),
            bytes_text(m.apart_bytes as f64),
            bytes_text(m.naive_bytes as f64),
            bytes_text(m.shared_constant_bytes as f64),
            bytes_text(m.packed_constant_bytes as f64),
            bytes_text(m.scratch_bytes as f64),
        );
        let _ = writeln!(
            out,
            "{:>5} {:<10} {:<5} {:<44} {:>9} {:>9} {:>10} {:>6} {:>8} {:>5}",
            "step", "anchor", "in", "kernel", "MFLOP", "bytes", "time", "share", "roof", "of it"
        );
        let mut order: Vec<&KernelReport> = self.kernels.iter().collect();
        if most > 0 && order.len() > most {
            order.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then(a.step.cmp(&b.step)));
            order.truncate(most);
        }
        for k in order {
            let label: String = k.label.chars().take(44).collect();
            let _ = writeln!(
                out,
                "{:>5} {:<10} {:<5} {:<44} {:>9.2} {:>9} {:>10} {:>5.1}% {:>8} {:>4.0}%",
                k.step,
                k.anchor,
                k.products.first().and_then(|p| p.split(' ').next()).unwrap_or("-"),
                label,
                k.flops * 1e-6,
                bytes_text(k.bytes),
                time_text(k.seconds),
                k.share * 100.0,
                k.roof.name(),
                k.fraction * 100.0,
            );
        }
        out
    }
}

#[cfg(feature = "cpu")]
/// Operations per second of the unit that most of a kernel's work is for: its first product's.
fn compute_ceiling(ceilings: &Ceilings, products: &[String]) -> f64 {
    let uses = |unit: MatrixUnit| products.first().is_some_and(|p| p.contains(unit.name()));
    if uses(MatrixUnit::Bf16Dot) && ceilings.bf16_flops_per_s > 0.0 {
        ceilings.bf16_flops_per_s
    } else if uses(MatrixUnit::I8Dot) && ceilings.int8_ops_per_s > 0.0 {
        ceilings.int8_ops_per_s
    } else if uses(MatrixUnit::Bf16Tile) && ceilings.amx_bf16_flops_per_s > 0.0 {
        ceilings.amx_bf16_flops_per_s
    } else if uses(MatrixUnit::I8Tile) && ceilings.amx_int8_ops_per_s > 0.0 {
        ceilings.amx_int8_ops_per_s
    } else {
        ceilings.f32_flops_per_s
    }
}

/// The products of a kernel: `bf16 x bf16 -> f32 (bf16dot)`, each kind once.
fn products_of(kernel: &Kernel, unit: MatrixUnit) -> Vec<String> {
    fn walk(kernel: &Kernel, unit: MatrixUnit, block: &Block, found: &mut Vec<String>) {
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(_, TileOp::Mma { acc, a, b, .. }) => {
                    let [acc, a, b] = [acc, a, b].map(|t| kernel.ty(*t).dtype);
                    let unit = if unit.takes(a, b, acc) { unit } else { MatrixUnit::Fma };
                    let text = format!("{a} x {b} -> {acc} ({})", unit.name());
                    if !found.contains(&text) {
                        found.push(text);
                    }
                }
                Stmt::For(f) => walk(kernel, unit, &f.body, found),
                Stmt::If(i) => {
                    walk(kernel, unit, &i.then, found);
                    walk(kernel, unit, &i.otherwise, found);
                }
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(kernel, unit, &kernel.body, &mut found);
    found
}
