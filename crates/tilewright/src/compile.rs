//! [`Compiler`]: a graph becomes an executable plan.

use crate::host::host_call;
use crate::machine::{cache_dir, host_cpu};
use crate::model::Model;
use crate::stage::{Stage, StageTime};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tilewright_base::{Error, Result, ResultExt};
use tilewright_emit_llvm::emit_kernel;
use tilewright_graph::Graph;
use tilewright_jit::{Found, Jit, Origin, Part, Source};
use tilewright_lower::{Choice, CpuTarget, FusionPlan};
use tilewright_passes::PassContext;
use tilewright_plan::{Plan, PlanKernel};
use tilewright_runtime::{Code, Executable, Pool, Session};
use tilewright_target::{Cpu, Precision};
use tilewright_tile::{Kernel, MatrixUnit, Schedule};

/// How models are compiled.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// The machine to compile for: this one.
    pub cpu: Cpu,
    /// Arithmetic that is allowed for contractions of `f32` models.
    pub precision: Precision,
    /// Folder for compiled kernels; `None` compiles anew every time.
    pub cache: Option<PathBuf>,
    /// Which operators become one kernel; [`Choice::Apart`] for finding what a fusion breaks.
    pub fusion: Choice,
    /// Let kernels write results over operands that nobody reads again; off for finding what that
    /// breaks.
    pub in_place: bool,
    /// The symbol that says for how many positions there is memory in what sessions keep between runs; see
    /// [`tilewright_lower::Options::states`].
    pub states: Option<Arc<str>>,
    /// Schedules that a search found on this machine; see [`crate::tune`]. `None` takes the planner's.
    pub records: Option<crate::tune::Records>,
    pool: Arc<Pool>,
}

/// A compiled model.
pub struct Compiled {
    graph: Graph,
    fusion: FusionPlan,
    exe: Arc<Executable>,
    stages: Vec<StageTime>,
    cpu: Cpu,
    precision: Precision,
    /// Kernels that came out of the cache, and kernels in all.
    cache_hits: (usize, usize),
    warnings: Vec<String>,
}

/// What code generation gives.
struct Generated {
    code: Vec<Code>,
    cache_hits: (usize, usize),
    warnings: Vec<String>,
}

/// A kernel on its way to machine code.
enum Made {
    Known(Found),
    Printed { source: Source, scratch_bytes: usize, origin: Origin },
}

impl Made {
    /// Scratch memory that a thread needs.
    fn scratch_bytes(&self) -> Result<usize> {
        match self {
            Made::Printed { scratch_bytes, .. } => Ok(*scratch_bytes),
            Made::Known(found) => {
                usize::try_from(found.note).map_err(|_| Error::bug("scratch of a known kernel"))
            }
        }
    }
}

/// The code of a kernel, if it is known and no text is wanted, or else its text.
fn made_from(jit: &Jit, planned: &PlanKernel, text: bool) -> Result<Made> {
    let PlanKernel { kernel, schedule, .. } = planned;
    let origin = jit.origin(&(tilewright_emit_llvm::PRINTER, &**kernel, schedule));
    if !text && let Some(found) = jit.find(&origin) {
        return Ok(Made::Known(found));
    }
    let emitted = emit_kernel(kernel, schedule)
        .context(|| format!("generating code for kernel {}", kernel.name))?;
    let source = Source { symbol: emitted.name, text: emitted.llvm_ir };
    Ok(Made::Printed { source, scratch_bytes: emitted.scratch_bytes, origin })
}

impl Compiler {
    /// For this machine, with all its threads, `f32`, and the usual cache folder.
    pub fn new() -> Result<Compiler> {
        let cache = cache_dir();
        Ok(Compiler::for_cpu(host_cpu(0, cache.as_deref())?, cache))
    }

    /// For this machine as described by `cpu`, on `cpu.threads` threads.
    pub fn for_cpu(mut cpu: Cpu, cache: Option<PathBuf>) -> Compiler {
        // Without the system's permission the first tile instruction would end the process.
        if cpu.has("amx-tile") && !tilewright_runtime::request_tiles() {
            cpu.features.retain(|f| !f.starts_with("amx"));
        }
        let pool = Arc::new(Pool::new(cpu.threads));
        Compiler {
            cpu,
            precision: Precision::F32,
            records: cache.as_deref().map(crate::tune::Records::at),
            cache,
            fusion: Choice::Fastest,
            in_place: true,
            states: None,
            pool,
        }
    }

    /// The same compiler, on the same threads, with another folder for compiled kernels.
    pub fn with_cache(&self, cache: Option<PathBuf>) -> Compiler {
        Compiler { cache, ..self.clone() }
    }

    /// Compiles a model.
    pub fn compile(&self, model: &Model) -> Result<Compiled> {
        self.compile_graph(model.graph.clone())
    }

    /// Compiles a graph.
    pub fn compile_graph(&self, graph: Graph) -> Result<Compiled> {
        self.compile_watched(graph, None)
    }

    /// Compiles a graph and shows every stage. Kernels are printed for that even where their code is known.
    pub fn compile_observed(
        &self,
        graph: Graph,
        observe: &mut dyn FnMut(Stage<'_>),
    ) -> Result<Compiled> {
        self.compile_watched(graph, Some(observe))
    }

    fn compile_watched(
        &self,
        mut graph: Graph,
        watch: Option<&mut dyn FnMut(Stage<'_>)>,
    ) -> Result<Compiled> {
        let watched = watch.is_some();
        let mut nobody = |_: Stage<'_>| {};
        let observe = watch.unwrap_or(&mut nobody);
        if matches!(self.precision, Precision::Tf32 | Precision::F16) {
            let message = format!("--precision {} on a CPU", self.precision);
            return Err(Error::unsupported(message).with_hint(
                "CPUs compute in f32 or bf16; with `--device cuda` there are tf32 and f16",
            ));
        }
        let mut stages = Vec::new();
        let mut clock = Instant::now();
        let mut lap = |stages: &mut Vec<StageTime>, name: &str| {
            stages.push(StageTime { name: name.to_string(), time: clock.elapsed() });
            clock = Instant::now();
        };
        observe(Stage::Graph("import", &graph));
        tilewright_graph::verify(&graph)?;
        lap(&mut stages, "verify-import");

        let lanes = self.cpu.f32_lanes() as i64;
        let context =
            PassContext { vector_lanes: lanes, panel_width: 2 * lanes, ..PassContext::default() };
        let report = tilewright_passes::run_observed(
            &mut graph,
            &context,
            tilewright_passes::PIPELINE,
            &mut |name, graph| observe(Stage::Graph(name, graph)),
        )?;
        for stage in &report.stages {
            stages.push(StageTime {
                name: stage.name.to_string(),
                time: stage.time + stage.verify_time,
            });
        }
        lap(&mut stages, "passes (all)");

        if tilewright_passes::split_reductions(&mut graph)? {
            tilewright_graph::verify(&graph)?;
        }
        let layouts = tilewright_passes::choose_layouts(&graph, &context);
        lap(&mut stages, "layout");
        let options = tilewright_lower::Options {
            windows: false,
            fold: false,
            fusion: self.fusion,
            precision: self.precision,
            states: self.states.clone(),
            ..Default::default()
        };
        let (mut plan, fusion) =
            tilewright_lower::lower_with(&graph, &self.target(), &layouts, &host_call, &options)?;
        let records = self.records.as_ref().map(|r| r.apply(&mut plan, &self.cpu));
        observe(Stage::Fusion(&fusion));
        observe(Stage::Plan(&plan));
        lap(&mut stages, "lower");
        // After the stage was shown, so that what is wrong can be looked at.
        tilewright_lower::verify_plan(&plan)?;
        lap(&mut stages, "verify-tile");

        let Generated { code, cache_hits, mut warnings } =
            self.generate(&plan, watched.then_some(observe), &mut stages)?;
        warnings.extend(records.into_iter().flatten());
        if self.precision == Precision::Bf16 && self.target().bf16_unit == MatrixUnit::Fma {
            warnings.push(
                "this processor has no bf16 instructions that are used here (AVX512-BF16, AMX): \
                 operands are rounded to bf16 and multiplied in f32, which is no faster than f32"
                    .into(),
            );
        }
        lap(&mut stages, "codegen (all)");
        let exe =
            Arc::new(Executable::new(plan, code, self.pool.clone())?.with_in_place(self.in_place));
        lap(&mut stages, "pack-weights");
        let (cpu, precision) = (self.cpu.clone(), self.precision);
        Ok(Compiled { graph, fusion, exe, stages, cpu, precision, cache_hits, warnings })
    }

    /// Machine code for each kernel of the plan, and how many came out of the cache. Without somebody who wants to see
    /// them, kernels whose code is known are not printed.
    fn generate(
        &self,
        plan: &Plan,
        observe: Option<&mut dyn FnMut(Stage<'_>)>,
        stages: &mut Vec<StageTime>,
    ) -> Result<Generated> {
        let start = Instant::now();
        let jit = Jit::new(tilewright_jit::Options {
            cache: self.cache.clone(),
            threads: self.pool.threads(),
            ..Default::default()
        })?;
        // Each on some thread, in the plan's order afterwards.
        let kernels: Vec<_> = plan.kernels.iter().map(|(_, planned)| planned).collect();
        let made: Vec<Mutex<Option<Result<Made>>>> =
            kernels.iter().map(|_| Mutex::new(None)).collect();
        let watched = observe.is_some();
        self.pool.run(kernels.len() as i64, &|first, last, _| {
            for i in first..last {
                let kernel = made_from(&jit, kernels[i as usize], watched);
                *made[i as usize].lock().unwrap_or_else(PoisonError::into_inner) = Some(kernel);
            }
        });
        let made = made.into_iter().map(|kernel| {
            let kernel = kernel.into_inner().unwrap_or_else(PoisonError::into_inner);
            kernel.ok_or_else(|| Error::bug("a kernel without a text"))?
        });
        let made = made.collect::<Result<Vec<Made>>>()?;
        if let Some(observe) = observe {
            for kernel in &made {
                if let Made::Printed { source, .. } = kernel {
                    observe(Stage::Llvm(&source.symbol, &source.text));
                }
            }
        }
        stages.push(StageTime { name: "emit-llvm".into(), time: start.elapsed() });
        let start = Instant::now();
        let parts = made.iter().map(|kernel| match kernel {
            Made::Known(found) => Part::Found(found),
            Made::Printed { source, .. } => Part::Source(source),
        });
        let build = jit.build_parts(&parts.collect::<Vec<_>>())?;
        for kernel in &made {
            if let Made::Printed { source, scratch_bytes, origin } = kernel {
                jit.remember(origin, source, *scratch_bytes as u64);
            }
        }
        stages.push(StageTime { name: "llvm".into(), time: start.elapsed() });
        // Weights are packed next, and results take memory: the compiler is not needed any more.
        tilewright_jit::let_go_of_compiler();
        let library = Arc::new(build.library);
        let code = made
            .iter()
            .enumerate()
            .map(|(i, kernel)| Code::from_library(&library, i, kernel.scratch_bytes()?))
            .collect::<Result<Vec<_>>>()?;
        let cache_hits = (build.cache_hits, made.len());
        Ok(Generated { code, cache_hits, warnings: build.warnings })
    }

    /// Code for kernels under schedules; `None` where the emitter refuses the schedule.
    pub(crate) fn code_for(
        &self,
        kernels: &[(Arc<Kernel>, Schedule)],
    ) -> Result<Vec<Option<Code>>> {
        let emitted: Vec<_> =
            kernels.iter().map(|(kernel, schedule)| emit_kernel(kernel, schedule).ok()).collect();
        let sources: Vec<Source> = emitted
            .iter()
            .flatten()
            .map(|e| Source { symbol: e.name.clone(), text: e.llvm_ir.clone() })
            .collect();
        let jit = Jit::new(tilewright_jit::Options {
            cache: self.cache.clone(),
            threads: self.pool.threads(),
            ..Default::default()
        })?;
        let library = Arc::new(jit.build(&sources)?.library);
        let mut number = 0;
        emitted
            .iter()
            .map(|e| {
                let Some(e) = e else { return Ok(None) };
                number += 1;
                Code::from_library(&library, number - 1, e.scratch_bytes).map(Some)
            })
            .collect()
    }

    /// The numbers that lowering reads.
    fn target(&self) -> CpuTarget {
        let units = tilewright_lower::matrix_units(self.cpu.vector_bits, |f| self.cpu.has(f));
        let threads = self.pool.threads();
        CpuTarget {
            bf16_unit: units.0,
            int8_unit: units.1,
            lanes: self.cpu.f32_lanes() as i64,
            l1_bytes: self.cpu.l1_bytes as i64,
            l2_bytes: self.cpu.l2_bytes as i64,
            l3_bytes: self.cpu.l3_bytes as i64,
            threads: threads as i64,
            flops_per_second: self.cpu.ceilings.f32_flops_per_s,
            product_speedup: 1.0,
            bytes_per_second: self.cpu.ceilings.memory_read_bytes_per_s,
            l2_bytes_per_second: self.cpu.ceilings.l2_read_bytes_per_s * threads as f64,
            launch_ns: self.cpu.ceilings.launch_s * 1e9,
        }
    }
}

impl Compiled {
    /// The graph after the passes.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        self.exe.plan()
    }

    /// The fusion groups.
    pub fn fusion(&self) -> &FusionPlan {
        &self.fusion
    }

    /// The machine it is compiled for.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The arithmetic of its contractions.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// How long each stage of compilation took.
    pub fn stages(&self) -> &[StageTime] {
        &self.stages
    }

    /// Kernels that came out of the cache, and distinct kernels in all.
    pub fn cache_hits(&self) -> (usize, usize) {
        self.cache_hits
    }

    /// What went wrong beside the point: a cache that could not be written.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Means to run it. Several sessions may run at the same time.
    pub fn session(&self) -> Result<Session> {
        Session::new(self.exe.clone())
    }

    /// The plan with its code.
    pub(crate) fn executable(&self) -> &Arc<Executable> {
        &self.exe
    }
}
