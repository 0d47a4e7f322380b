//! Models on GPUs.
//!
//! ```no_run
//! use tilewright::Model;
//! use tilewright::gpu::{GpuCompiler, GpuDevice};
//! # fn main() -> tilewright::Result<()> {
//! let model = Model::open("model.onnx".as_ref())?;
//! let device = GpuDevice::open(0, None)?;
//! let planned = GpuCompiler::new(device.machine().clone()).plan(model.graph.clone())?;
//! let compiled = device.load(planned)?;
//! let inputs = tilewright::inputs::random(&model.graph, &Default::default(), 0)?;
//! let outputs = compiled.session()?.run(&inputs)?;
//! # Ok(()) }
//! ```
//!
//! [`GpuCompiler::plan`] needs no GPU: the passes, fusion and lowering of the CPU, with the forms and layouts
//! that GPUs take. [`GpuPlan::interpret`] runs the device programs of such a plan in the interpreter.

use crate::explain::{KernelReport, Limits, bytes_text, env_of, time_text};
use crate::host::host_call;
use crate::stage::{Stage, StageTime};
use crate::verify::{Observed, Ran, Report, compare};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Nvrtc;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, NodeId, ValueId};
use tilewright_launch::Loader;
use tilewright_lower::{Choice, CpuTarget, Device, FoldedNorm, FusionPlan, Layouts};
use tilewright_passes::PassContext;
use tilewright_plan::{Attention, Form, Plan, Step};
use tilewright_runtime_gpu::{Chooser, Executable, Interpreted, interpret};
use tilewright_target::{Gpu as Machine, Precision};

pub use tilewright_cuda::{Gpu, Stream};
pub use tilewright_runtime_gpu::{
    Direct, Fitted, Kept, KeptFolder, MemoryReport, Room, RunReport, Session,
};

/// How models are planned for a GPU.
#[derive(Clone, Debug)]
pub struct GpuCompiler {
    /// The GPU as data.
    pub machine: Machine,
    /// Arithmetic that is allowed for `f32` models.
    pub precision: Precision,
    /// Which operators become one kernel.
    pub fusion: Choice,
    /// Convolutions read their windows through the copy engine where it can, instead of copying them.
    pub windows: bool,
    /// RMS norms that products alone read are folded into them.
    pub fold: bool,
    /// Products of 16-bit operands compute left operands that only they read, where that is estimated to pay. Off: no model that was
    /// measured gained.
    pub fold_operands: bool,
}

/// A model planned for a GPU.
#[derive(Clone, Debug)]
pub struct GpuPlan {
    graph: Graph,
    /// Before attention and products were taken apart.
    unfused: Graph,
    plan: Plan,
    fusion: FusionPlan,
    stages: Vec<StageTime>,
    machine: Machine,
    precision: Precision,
}

/// A device with its compiler.
#[derive(Debug)]
pub struct GpuDevice {
    loader: Arc<Loader>,
    machine: Machine,
}

/// A planned model on a device.
pub struct GpuModel {
    planned: GpuPlan,
    exe: Arc<Executable>,
}

impl GpuCompiler {
    /// For an H200, in `f32`, whatever this machine has.
    pub fn h200() -> GpuCompiler {
        GpuCompiler::new(Machine::h200())
    }

    /// For this GPU, in `f32`.
    pub fn new(machine: Machine) -> GpuCompiler {
        let (precision, fusion) = (Precision::F32, Choice::Fastest);
        let fold_operands = false;
        GpuCompiler { machine, precision, fusion, windows: true, fold: true, fold_operands }
    }

    /// Plans a graph.
    ///
    /// # Errors
    /// What passes and lowering say of it.
    pub fn plan(&self, graph: Graph) -> Result<GpuPlan> {
        self.plan_observed(graph, &mut |_| {})
    }

    /// Plans a graph and shows every stage.
    ///
    /// # Errors
    /// As [`GpuCompiler::plan`].
    pub fn plan_observed(
        &self,
        graph: Graph,
        observe: &mut dyn FnMut(Stage<'_>),
    ) -> Result<GpuPlan> {
        observe(Stage::Graph("import", &graph));
        let first = self.plan_keeping(graph.clone(), &tilewright_lower::attention_fits, observe)?;
        // Where the library has no kernel for some attention, products and a softmax do it.
        if first.has_attention(&|_| true) && !first.attention_runs()? {
            return self.plan_keeping(graph, &|_, _| false, observe);
        }
        // Of 32 bits its products run at a part of the rate of products alone: the sooner of both, where sizes are known.
        let wide = first.has_attention(&|a| a.q.dtype == DType::F32);
        if wide && graph.symbols.is_empty() {
            let parts = self.plan_keeping(graph.clone(), &|_, _| false, &mut |_| {})?;
            if parts.estimate_us()? < first.estimate_us()? {
                return self.plan_keeping(graph, &|_, _| false, observe);
            }
        }
        Ok(first)
    }

    fn plan_keeping(
        &self,
        mut graph: Graph,
        keep: &dyn Fn(&Graph, NodeId) -> bool,
        observe: &mut dyn FnMut(Stage<'_>),
    ) -> Result<GpuPlan> {
        let mut stages = Vec::new();
        tilewright_graph::verify(&graph)?;
        let context = PassContext::default();
        let report = tilewright_passes::run_observed(
            &mut graph,
            &context,
            tilewright_passes::PIPELINE,
            &mut |name, graph| observe(Stage::Graph(name, graph)),
        )?;
        for stage in &report.stages {
            let (name, time) = (stage.name.to_string(), stage.time + stage.verify_time);
            stages.push(StageTime { name, time });
        }
        let start = Instant::now();
        if tilewright_passes::widen_constants(&mut graph)? {
            tilewright_graph::verify(&graph)?;
            tilewright_passes::run(&mut graph, &context)?;
        }
        observe(Stage::Graph("widen-constants", &graph));
        stages.push(StageTime { name: "widen-constants".into(), time: start.elapsed() });
        let unfused = graph.clone();
        let start = Instant::now();
        if tilewright_passes::join_products(&mut graph)? {
            tilewright_graph::verify(&graph)?;
            tilewright_passes::run(&mut graph, &context)?;
        }
        observe(Stage::Graph("join-products", &graph));
        stages.push(StageTime { name: "join-products".into(), time: start.elapsed() });
        let start = Instant::now();
        if tilewright_passes::join_maps(&mut graph)? {
            tilewright_graph::verify(&graph)?;
            tilewright_passes::run(&mut graph, &context)?;
        }
        observe(Stage::Graph("join-maps", &graph));
        stages.push(StageTime { name: "join-maps".into(), time: start.elapsed() });
        let start = Instant::now();
        let fold = self.fold && self.fusion != Choice::Apart;
        let target = CpuTarget::of_gpu(&self.machine, self.precision);
        let narrow = matches!(self.precision, Precision::F16 | Precision::Bf16);
        let bytes = if narrow { 2 } else { 4 };
        // The epilogues that do so are those of Hopper's tensor cores.
        let statistics = fold && self.precision != Precision::F32 && self.machine.capability >= 90;
        let mut norms = Vec::new();
        let mut wanted = |graph: &Graph, norm: NodeId, products: &[NodeId]| {
            let folded = FoldedNorm { norm, products, bytes, statistics };
            let times = tilewright_lower::norm_times(graph, &target, &folded);
            let (v, name) = (graph.nodes[norm].outputs[0], &graph.nodes[norm].origin);
            let how = if times.folds() { "folded" } else { "not folded" };
            norms.push(format!("{how}: norm {v} ({name}) into the products that read it: {times}"));
            times.folds()
        };
        if fold && tilewright_passes::fold_norms(&mut graph, &mut wanted)? {
            tilewright_graph::verify(&graph)?;
            tilewright_passes::run(&mut graph, &context)?;
        }
        observe(Stage::Graph("fold-norms", &graph));
        stages.push(StageTime { name: "fold-norms".into(), time: start.elapsed() });
        let start = Instant::now();
        if tilewright_passes::decompose_products(&mut graph, keep)? {
            tilewright_graph::verify(&graph)?;
            tilewright_passes::run(&mut graph, &context)?;
        }
        observe(Stage::Graph("decompose-products", &graph));
        stages.push(StageTime { name: "decompose-products".into(), time: start.elapsed() });
        let start = Instant::now();
        if tilewright_passes::round_late(&mut graph)? {
            tilewright_graph::verify(&graph)?;
        }
        observe(Stage::Graph("round-late", &graph));
        stages.push(StageTime { name: "round-late".into(), time: start.elapsed() });
        let start = Instant::now();
        if tilewright_passes::lift_reshapes(&mut graph)? {
            tilewright_graph::verify(&graph)?;
        }
        observe(Stage::Graph("lift-reshapes", &graph));
        stages.push(StageTime { name: "lift-reshapes".into(), time: start.elapsed() });
        let start = Instant::now();
        let options = tilewright_lower::Options {
            windows: self.windows,
            statistics,
            fold: self.fold_operands,
            fusion: self.fusion,
            states: None,
            precision: self.precision,
            device: Device::Gpu,
        };
        let layouts = Layouts::new();
        let (plan, mut fusion) =
            tilewright_lower::lower_with(&graph, &target, &layouts, &host_call, &options)?;
        fusion.views.extend(norms);
        observe(Stage::Fusion(&fusion));
        observe(Stage::Plan(&plan));
        tilewright_lower::verify_plan(&plan)?;
        stages.push(StageTime { name: "lower".into(), time: start.elapsed() });
        let (machine, precision) = (self.machine.clone(), self.precision);
        Ok(GpuPlan { graph, unfused, plan, fusion, stages, machine, precision })
    }
}

impl GpuPlan {
    /// The graph after the passes.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The fusion groups.
    pub fn fusion(&self) -> &FusionPlan {
        &self.fusion
    }

    fn has_attention(&self, such: &dyn Fn(&Attention) -> bool) -> bool {
        let is_it = |f: &Form| matches!(f, Form::Attention(a) if such(a));
        self.plan.kernels.iter().any(|(_, k)| k.forms.iter().any(is_it))
    }

    /// Microseconds of a run by the models of the kernel library, and by bytes where it has none. All sizes are known.
    fn estimate_us(&self) -> Result<f64> {
        let mut chooser = Chooser::new(self.machine.clone());
        let mut total = 0.0;
        for step in &self.plan.steps {
            let Step::Launch { kernel, sizes, note, .. } = step else { continue };
            let none = |_: &str| None;
            let values: Option<Vec<i64>> = sizes.iter().map(|d| d.eval_with(&none)).collect();
            let values = values.ok_or_else(|| Error::bug("a size that is not known"))?;
            let choice = chooser.choose(&self.plan, *kernel, &values)?;
            let bytes = note.bytes.eval_with(&none).unwrap_or(0) as f64;
            let least = bytes / self.machine.copy_bytes_per_s * 1e6 + self.machine.model.launch_us;
            total += choice.ways.first().map_or(least, |w| w.estimate_us.max(least));
        }
        Ok(total)
    }

    /// Whether the kernel library serves every attention, asked with sizes of 32 or what the ranges allow.
    fn attention_runs(&self) -> Result<bool> {
        let mut chooser = Chooser::new(self.machine.clone());
        for (id, kernel) in self.plan.kernels.iter() {
            if kernel.forms.iter().any(|f| matches!(f, Form::Attention(_))) {
                let symbols = kernel.kernel.symbols.iter();
                let sizes: Vec<i64> = symbols.map(|s| 32.clamp(s.range.min, s.range.max)).collect();
                if chooser.choose(&self.plan, id, &sizes)?.ways.is_empty() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What the device's ceilings allow each step at least, in seconds, and which ceiling it is; tensor cores count for products of
    /// operands of 16 bits.
    pub fn least_times(&self, env: &tilewright_layout::Env) -> Vec<(f64, &'static str)> {
        let machine = &self.machine;
        crate::explain::least(&self.plan, env, &|k| {
            let narrow = k.products.iter().any(|p| p.starts_with("bf16") || p.starts_with("f16"));
            let precision = if narrow { Precision::Bf16 } else { self.precision };
            Limits {
                flops_per_s: flops_per_s(machine, precision, k),
                bytes_per_s: machine.copy_bytes_per_s,
                launch_s: machine.model.launch_us * 1e-6,
            }
        })
    }

    /// What a framework without a compiler would call in place of each step, for these sizes.
    pub fn library_calls(&self, env: &tilewright_layout::Env) -> Vec<String> {
        self.plan.steps.iter().map(|step| library(&self.plan, step, env)).collect()
    }

    /// How long each stage took.
    pub fn stages(&self) -> &[StageTime] {
        &self.stages
    }

    /// Runs the device programs in the interpreter: no GPU needed, for small sizes.
    ///
    /// # Errors
    /// The user's about the inputs; bugs that the interpreter finds.
    pub fn interpret(&self, inputs: &[Tensor]) -> Result<Interpreted> {
        interpret(&self.plan, inputs, &mut Chooser::new(self.machine.clone()))
    }

    /// Compares outputs of this plan on these inputs with the float64 oracle.
    ///
    /// # Errors
    /// Outputs that are not those of the model.
    pub fn verify_outputs(
        &self,
        original: &Graph,
        inputs: &[Tensor],
        outputs: &[Tensor],
    ) -> Result<Report> {
        let ran = Ran { plan: &self.plan, outputs, observed: &Observed::new() };
        compare(original, &self.graph, self.precision, inputs, &ran)
    }
}

impl GpuDevice {
    /// Opens device `ordinal`, with compiled kernels in a folder below `cache`.
    ///
    /// # Errors
    /// Unsupported, with what to do, where there is no driver, no such device or no NVRTC.
    pub fn open(ordinal: u32, cache: Option<&Path>) -> Result<GpuDevice> {
        GpuDevice::open_as(ordinal, cache, None)
    }

    /// The same with kernels for another architecture (`sm_80`), which the device must run or translate: for trying out
    /// what another device would get.
    ///
    /// # Errors
    /// As [`GpuDevice::open`]; the user's for a name that is none, or an architecture that the device does not run.
    pub fn open_as(ordinal: u32, cache: Option<&Path>, target: Option<&str>) -> Result<GpuDevice> {
        let gpu = Gpu::open(ordinal)?;
        let nvrtc = Nvrtc::open(cache.map(|c| c.join("cuda")).as_deref())?;
        let mut loader = Loader::new(gpu, nvrtc);
        if let Some(name) = target {
            let target = name.parse().map_err(|e: String| Error::user(e))?;
            loader = loader.for_target(target)?;
        }
        let (properties, target) = (loader.gpu().properties(), loader.target());
        // The constants of the time model are those of a known machine, the counts the driver's.
        let machine = Machine {
            name: properties.name.clone(),
            sms: properties.sm_count,
            l2_bytes: properties.l2_bytes,
            ..Machine::of_capability(target.major() * 10 + target.minor())
        };
        Ok(GpuDevice { loader: Arc::new(loader), machine })
    }

    /// The device as data.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        self.loader.gpu()
    }

    /// Its kernels, for those who load programs of their own.
    pub(crate) fn loader(&self) -> &Arc<Loader> {
        &self.loader
    }

    /// Copies the weights of a planned model to the device. Models of one device share their kernels.
    ///
    /// # Errors
    /// When its memory does not suffice.
    pub fn load(&self, planned: GpuPlan) -> Result<GpuModel> {
        let (plan, loader) = (planned.plan.clone(), self.loader.clone());
        let exe = Arc::new(Executable::on(plan, loader, self.machine.clone())?);
        Ok(GpuModel { planned, exe })
    }

    /// A planned model for runs in memory and streams of another library.
    ///
    /// # Errors
    /// When its memory does not suffice for the weights.
    pub fn direct(&self, planned: &GpuPlan) -> Result<Direct> {
        Direct::new(planned.plan.clone(), self.loader.clone(), self.machine.clone())
    }

    /// A planned model as another process kept it ([`Direct::keep`]); none where the bytes are not whole.
    ///
    /// # Errors
    /// When its memory does not suffice for the weights.
    pub fn restore(&self, bytes: &[u8]) -> Result<Option<Kept>> {
        Kept::restore(bytes, &self.loader)
    }

    /// The name under which [`KeptFolder`] has a run that depends on these texts, on this device and with this compiler.
    pub fn name_of_run(&self, texts: &[&str]) -> String {
        let (major, minor) = self.loader.nvrtc().version();
        let device = format!("{:?} {} NVRTC {major}.{minor}", self.machine, self.loader.target());
        KeptFolder::name(&[&[device.as_str()], texts].concat())
    }

    /// Scratch memory for runs of `fitted`.
    ///
    /// # Errors
    /// When its memory does not suffice.
    pub fn room(&self, fitted: &Fitted) -> Result<Room> {
        Room::new(fitted, &self.loader)
    }
}

/// One step of a plan on a GPU.
#[derive(Clone, Debug, Serialize)]
pub struct GpuStep {
    /// What it does, costs and reaches.
    #[serde(flatten)]
    pub report: KernelReport,
    /// Its device programs with their schedules.
    pub schedules: Vec<String>,
    /// What a framework would call for the same.
    pub library: String,
    /// Why it runs on the host.
    pub host: Option<String>,
}

/// Everything that `tw explain --device cuda` shows.
#[derive(Clone, Debug, Serialize)]
pub struct GpuExplanation {
    /// Name of the model.
    pub model: String,
    /// The device.
    pub gpu: String,
    /// Arithmetic.
    pub precision: String,
    /// Sizes that were chosen.
    pub sizes: Vec<(String, i64)>,
    /// The steps of a run in order.
    pub steps: Vec<GpuStep>,
    /// How many more were done when the model was loaded: they depend on weights alone.
    pub once: usize,
    /// Sum of the steps' times, in seconds.
    pub seconds: f64,
    /// Median time of a whole run on the device, in seconds.
    pub run_seconds: f64,
    /// Kernels launched per run.
    pub launches: usize,
    /// Recorded graphs per run.
    pub graphs: usize,
    /// Bytes of weights, of the arena, of the workspace; of the arena with one allocation per buffer, and with no result
    /// in the memory of an operand.
    pub memory_bytes: [usize; 5],
    /// What a framework takes at least that runs the graph operator by operator and frees each tensor after its last use:
    /// a model of PyTorch's eager mode, whose measured peaks are in the record of `gpu/models.py`.
    pub framework_bytes: usize,
    /// Ceilings: of products, and of plain multiply-adds.
    pub flops_per_s: [f64; 2],
    /// Copy bandwidth.
    pub bytes_per_s: f64,
    /// Planning stages with seconds.
    pub stages: Vec<(String, f64)>,
    /// What did not go as planned.
    pub warnings: Vec<String>,
}

impl GpuModel {
    /// What was planned.
    pub fn planned(&self) -> &GpuPlan {
        &self.planned
    }

    /// The device as data.
    pub fn machine(&self) -> &Machine {
        &self.planned.machine
    }

    /// Means to run it.
    ///
    /// # Errors
    /// The driver's.
    pub fn session(&self) -> Result<Session> {
        Session::new(self.exe.clone())
    }

    /// Runs the model and the oracle on the same inputs, and compares outputs and kernels.
    ///
    /// # Errors
    /// Those of the run.
    pub fn verify(&self, original: &Graph, inputs: &[Tensor]) -> Result<Report> {
        let plan = self.exe.plan();
        let mut observed = Observed::new();
        let outputs = self.session()?.run_observed(inputs, &mut |step, buffer, tensor| {
            if let Some(value) = plan.buffers[buffer].value {
                observed.insert(ValueId(value), (step, tensor));
            }
        })?;
        let ran = Ran { plan, outputs: &outputs, observed: &observed };
        compare(original, &self.planned.graph, self.planned.precision, inputs, &ran)
    }

    /// Times each step `runs` times on these inputs and compares it with the device's ceilings.
    ///
    /// # Errors
    /// Those of the run.
    pub fn explain(&self, inputs: &[Tensor], runs: usize) -> Result<GpuExplanation> {
        let plan = self.exe.plan();
        let mut session = self.session()?;
        session.run(inputs)?;
        let mut all: Vec<Vec<Duration>> = vec![Vec::new(); plan.steps.len()];
        for _ in 0..runs.max(1) {
            let mut times = Vec::new();
            session.run_timed(inputs, &mut times)?;
            times.iter().for_each(|t| all[t.step].push(t.time));
        }
        let median = |runs: Vec<Duration>| crate::bench::Times { runs }.median().as_secs_f64();
        let seconds: Vec<f64> = all.into_iter().map(median).collect();
        let whole = session.times_us(inputs, 2, runs.max(3))?;
        let run_seconds =
            median(whole.into_iter().map(|t| Duration::from_secs_f64(t * 1e-6)).collect());
        let env = env_of(&self.planned.graph, inputs);
        let machine = &self.planned.machine;
        let narrow = matches!(self.planned.precision, Precision::F16 | Precision::Bf16);
        let kernels = crate::explain::steps(plan, &env, &seconds, &|k| Limits {
            flops_per_s: flops_per_s(machine, self.planned.precision, k),
            // Notes count the model's own types.
            bytes_per_s: machine.copy_bytes_per_s * if narrow { 2.0 } else { 1.0 },
            launch_s: machine.model.launch_us * 1e-6,
        });
        let run = session.report(inputs)?;
        let memory = session.memory(inputs)?;
        let steps = kernels
            .into_iter()
            .zip(&run.schedules)
            .filter(|(report, _)| !run.once.contains(&report.step))
            .map(|(mut report, schedules)| {
                if narrow {
                    report.bytes /= 2.0;
                    report.bytes_saved /= 2.0;
                }
                let number = report.step;
                let host = run.host_steps.iter().find(|h| h.0 == number).map(|h| h.1.clone());
                let library = library(plan, &plan.steps[number], &env);
                GpuStep { report, schedules: schedules.clone(), library, host }
            })
            .collect();
        Ok(GpuExplanation {
            model: plan.name.clone(),
            gpu: machine.name.clone(),
            precision: self.planned.precision.to_string(),
            sizes: env.iter().map(|(n, v)| (n.to_string(), *v)).collect(),
            steps,
            once: run.once.len(),
            seconds: seconds.iter().sum(),
            run_seconds,
            launches: run.launches,
            graphs: run.graphs,
            memory_bytes: [
                memory.constant_bytes,
                memory.arena_bytes,
                memory.workspace_bytes,
                memory.naive_bytes,
                memory.apart_bytes,
            ],
            framework_bytes: framework_bytes(&self.planned, &env),
            flops_per_s: [true, false]
                .map(|products| peak(machine, self.planned.precision, products)),
            bytes_per_s: machine.copy_bytes_per_s,
            stages: self
                .planned
                .stages
                .iter()
                .map(|s| (s.name.clone(), s.time.as_secs_f64()))
                .collect(),
            warnings: run.warnings,
        })
    }
}

/// The rate of what does most of a kernel's work: the tensor cores for products of narrow operands.
fn flops_per_s(machine: &Machine, precision: Precision, kernel: &KernelReport) -> f64 {
    peak(machine, precision, !kernel.products.is_empty())
}

fn peak(machine: &Machine, precision: Precision, products: bool) -> f64 {
    let per_clock = match (products, precision) {
        (false, _) | (_, Precision::F32) => machine.f32_flops_per_clock,
        (_, Precision::Tf32) => machine.tensor_flops_per_clock / 2.0,
        (_, Precision::F16 | Precision::Bf16) => machine.tensor_flops_per_clock,
    };
    f64::from(machine.sms) * machine.model.clock_ghz * 1e9 * per_clock
}

/// Weights and, at the worst moment, the tensors between operators: each from where it is computed to its last use, views in
/// the memory of their operand, attention and other composites as one operator each, nothing over an operand.
fn framework_bytes(planned: &GpuPlan, env: &tilewright_layout::Env) -> usize {
    let (graph, narrow) = (&planned.unfused, planned.precision);
    let size = |v: ValueId| {
        let elements: i64 = graph.shape(v).iter().map(|d| d.eval(env).unwrap_or(0)).product();
        let dtype = graph.dtype(v);
        let bytes = match narrow {
            Precision::F16 | Precision::Bf16 if dtype == tilewright_base::DType::F32 => 2,
            _ => dtype.size(),
        };
        usize::try_from(elements).unwrap_or(0) * bytes
    };
    let mut root: Vec<ValueId> = graph.values.ids().collect();
    let mut last: Vec<Option<usize>> = vec![None; root.len()];
    for (at, (_, node)) in graph.live().enumerate() {
        for &v in &node.inputs {
            last[root[v.index()].index()] = Some(at);
        }
        if tilewright_lower::is_view(&node.op)
            && let (Some(&out), Some(&from)) = (node.outputs.first(), node.inputs.first())
        {
            root[out.index()] = root[from.index()];
        }
    }
    for (_, v) in &graph.outputs {
        last[root[v.index()].index()] = Some(usize::MAX);
    }
    let own = |v: ValueId| root[v.index()] == v;
    let given = graph.values.iter().filter(|(_, value)| {
        matches!(value.def, tilewright_graph::Def::Const(_) | tilewright_graph::Def::Input(_))
    });
    let given: usize = given.map(|(v, _)| size(v)).sum();
    let (mut now, mut most) = (given, given);
    for (at, (_, node)) in graph.live().enumerate() {
        let made = node.outputs.iter().filter(|&&v| own(v));
        now += made.clone().map(|&v| size(v)).sum::<usize>();
        most = most.max(now);
        let mut read: Vec<ValueId> = node.inputs.iter().map(|v| root[v.index()]).collect();
        read.sort_unstable();
        read.dedup();
        let made_here =
            |v: &ValueId| matches!(graph.values[*v].def, tilewright_graph::Def::Node(..));
        let freed = read.iter().filter(|v| made_here(v) && last[v.index()] == Some(at));
        now -= freed.map(|&v| size(v)).sum::<usize>();
        let unread = made.filter(|v| last[v.index()].is_none());
        now -= unread.map(|&v| size(v)).sum::<usize>();
    }
    most
}

/// What a framework without a compiler would call for the same work as a step: a library's product, convolution or
/// attention, operators of PyTorch by name, and elementwise kernels by number.
fn library(plan: &Plan, step: &Step, env: &tilewright_layout::Env) -> String {
    let (product, note) = match step {
        Step::Launch { kernel, note, .. } => {
            let forms = &plan.kernels[*kernel].forms;
            let product = forms.iter().find_map(|f| match f {
                Form::Product(p) => Some(p),
                Form::Program { .. } | Form::Attention(_) => None,
            });
            (product, note)
        }
        Step::Library { call, .. } => return call.name().to_string(),
        Step::Host { note, .. } => return host_call_name(&note.label),
    };
    let number = |d: &tilewright_layout::Dim| d.eval(env).unwrap_or(0);
    let mut calls: Vec<String> = Vec::new();
    let mut elementwise = 0;
    if let Some(p) = product.filter(|p| p.windows.is_none() && note.anchor != "conv") {
        let batch: i64 = p.repeat.iter().map(|r| number(&r.extent)).product();
        let (m, n, k) = (number(&p.m), number(&p.n), number(&p.k));
        let batch = if batch == 1 { String::new() } else { format!(" x{batch}") };
        let twice = if p.second.is_some() { "2 times " } else { "" };
        calls.push(format!("{twice}cublasLtMatmul {} {m}x{n}x{k}{batch}", p.a.dtype));
    }
    for part in note.label.split('+').map(str::trim) {
        match part {
            // Said above; without a form as a product it is one all the same.
            "contract" if product.is_some() => {}
            "contract" => calls.push("cublasLtMatmul".to_string()),
            // Of two operands, unless rows are reduced.
            "max" | "min" if note.anchor != "rows" => elementwise += 1,
            _ => match OPERATORS.iter().find(|(label, _)| *label == part) {
                Some((_, "")) => {}
                Some((_, call)) => calls.push((*call).to_string()),
                None => elementwise += 1,
            },
        }
    }
    if elementwise > 0 {
        calls.push(format!("{elementwise} elementwise"));
    }
    match calls.is_empty() {
        true => "none: sizes only".to_string(),
        false => calls.join(" + "),
    }
}

fn host_call_name(label: &str) -> String {
    let known = OPERATORS.iter().find(|(name, _)| *name == label).map(|(_, call)| *call);
    known.filter(|c| !c.is_empty()).map_or_else(|| format!("operator {label}"), str::to_string)
}

/// Labels of the fusion planner and what PyTorch calls for them on a GPU; nothing for what takes no call.
const OPERATORS: &[(&str, &str)] = &[
    ("conv", "cudnnConvolutionForward"),
    ("attention", "aten::scaled_dot_product_attention"),
    ("pool", "cudnnPoolingForward"),
    ("softmax", "aten::_softmax"),
    ("logsoftmax", "aten::_log_softmax"),
    ("layernorm", "aten::native_layer_norm"),
    ("rmsnorm", "aten::rms_norm"),
    ("sum", "aten::sum"),
    ("prod", "aten::prod"),
    ("max", "aten::amax"),
    ("min", "aten::amin"),
    ("argmax", "aten::argmax"),
    ("argmin", "aten::argmin"),
    ("scansum", "aten::cumsum"),
    ("scanprod", "aten::cumprod"),
    ("scanmax", "aten::cummax"),
    ("scanmin", "aten::cummin"),
    ("topk", "aten::topk"),
    ("gather", "aten::index_select"),
    ("gatherelements", "aten::gather"),
    ("gathernd", "aten::index"),
    ("scatterelements", "aten::scatter_reduce"),
    ("scatternd", "aten::index_put_"),
    ("pad", "aten::pad"),
    ("concat", "aten::cat"),
    ("copy", "aten::copy_"),
    ("iota", "aten::arange"),
    ("random", "aten::rand"),
    ("dims", ""),
];

impl GpuExplanation {
    /// The summary and a table of the `most` costliest steps (all when 0).
    pub fn text(&self, most: usize) -> String {
        let mut out = String::new();
        let hosts = self.steps.iter().filter(|s| s.host.is_some()).count();
        let once = match self.once {
            0 => String::new(),
            n => format!(" ({n} more at loading)"),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{} on {} in {}: {} steps{}, {} launches in {} graphs, {hosts} steps on the host; a run takes {}, its steps one by one {}",
            self.model,
            self.gpu,
            self.precision,
            self.steps.len(),
            once,
            self.launches,
            self.graphs,
            time_text(self.run_seconds),
            time_text(self.seconds),
        );
        let saved: f64 = self.steps.iter().map(|k| k.report.bytes_saved).sum();
        let flops: f64 = self.steps.iter().map(|k| k.report.flops).sum();
        let [weights, arena, workspace, naive, apart] =
            self.memory_bytes.map(|b| bytes_text(b as f64));
        let all: usize = self.memory_bytes[..3].iter().sum();
        let _ = writeln!(
            out,
            "fusion keeps {} out of memory; {:.2} GFLOP at {:.2} TFLOP/s\nmemory: {} (operator by operator, as PyTorch's eager mode, at least {}): weights {weights}, arena {arena} ({apart} if nothing lay over an operand, {naive} with one allocation per buffer), workspace {workspace}",
            bytes_text(saved),
            flops * 1e-9,
            flops * 1e-12 / self.run_seconds.max(1e-12),
            bytes_text(all as f64),
            bytes_text(self.framework_bytes as f64),
        );
        let _ = writeln!(
            out,
            "{:>5} {:<9} {:<40} {:>10} {:>9} {:>10} {:>6} {:>8} {:>5}  {:<9} instead of",
            "step", "anchor", "kernel", "MFLOP", "bytes", "time", "share", "roof", "of it", "saved"
        );
        let mut order: Vec<&GpuStep> = self.steps.iter().collect();
        if most > 0 && order.len() > most {
            order.sort_by(|a, b| {
                let (a, b) = (&a.report, &b.report);
                b.seconds.total_cmp(&a.seconds).then(a.step.cmp(&b.step))
            });
            order.truncate(most);
        }
        for step in order {
            let k = &step.report;
            let label: String = k.label.chars().take(40).collect();
            let _ = writeln!(
                out,
                "{:>5} {:<9} {:<40} {:>10.2} {:>9} {:>10} {:>5.1}% {:>8} {:>4.0}%  {:<9} {}",
                k.step,
                k.anchor,
                label,
                k.flops * 1e-6,
                bytes_text(k.bytes),
                time_text(k.seconds),
                k.share * 100.0,
                k.roof.name(),
                k.fraction * 100.0,
                bytes_text(k.bytes_saved),
                step.library,
            );
            if let Some(reason) = &step.host {
                let _ = writeln!(out, "      on the host: {reason}");
            }
        }
        for warning in &self.warnings {
            let _ = writeln!(out, "warning: {warning}");
        }
        out
    }
}

/// Parses `cuda` or `cuda:N`.
///
/// # Errors
/// The user's for anything else.
pub fn ordinal(device: &str) -> Result<u32> {
    let number = match device.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
        None => None,
    };
    number.ok_or_else(|| {
        Error::user(format!("`{device}` is no device")).with_hint("devices are: cpu, cuda, cuda:1")
    })
}
