//! Tile programs that the graph compiler writes, scheduled for a GPU: which of them have a device program,
//! and whether it computes what the tile program says.
//!
//! The programs are those of random graphs, fused and not. What the lowering refuses is counted by its reason;
//! the list of reasons may only become shorter.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_graph::{Graph, NodeId};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options as Run, check, run};
use tilewright_layout::Env;
use tilewright_lower::{CpuTarget, Layouts, Options, lower_with};
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_plan::{HostCall, Step};
use tilewright_testkit as kit;
use tilewright_tile::{Access, Block, Kernel, Param, Schedule, Stmt, TileOp};

/// Random graphs.
const SEEDS: u64 = 120;

/// Reasons for which a program without products has no form on a GPU.
const KNOWN_REASONS: &[&str] = &[];

fn host(_: &Graph, _: NodeId) -> HostCall {
    HostCall { name: "host".into(), run: std::sync::Arc::new(|_, _| Ok(Vec::new())) }
}

fn has_product(block: &Block) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(_, op) => matches!(op, TileOp::Mma { .. }),
        Stmt::For(f) => has_product(&f.body),
        Stmt::If(f) => has_product(&f.then) || has_product(&f.otherwise),
        _ => false,
    })
}

/// A kernel of a plan, with sizes.
struct Case {
    name: String,
    kernel: Kernel,
    /// As the plan runs it.
    planned: Schedule,
    env: Env,
}

/// Kernels without products of the random graphs, each once.
fn programs() -> Vec<Case> {
    let mut out = Vec::new();
    let mut seen = BTreeSet::new();
    for seed in 1..=SEEDS {
        let dtype = if seed % 5 == 0 { DType::BF16 } else { DType::F32 };
        let extent_max = if seed % 3 == 0 { 40 } else { 7 };
        let nodes = 4 + (seed % 20) as usize;
        let options = kit::generate::Options {
            nodes,
            dtype,
            extent_max,
            ..kit::generate::Options::default()
        };
        let graph = kit::generate::graph(seed, &options);
        let env = kit::data::random_env(&graph, &mut kit::data::Rng::new(seed));
        for fusion in [true, false] {
            let options = Options { fusion, ..Options::default() };
            let (plan, _) =
                lower_with(&graph, &CpuTarget::avx2(), &Layouts::new(), &host, &options)
                    .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            for step in &plan.steps {
                let Step::Launch { kernel, sizes, .. } = step else { continue };
                let planned = plan.kernels[*kernel].schedule.clone();
                let kernel = &plan.kernels[*kernel].kernel;
                if has_product(&kernel.body) {
                    continue;
                }
                let values: Option<Env> = kernel
                    .symbols
                    .iter()
                    .zip(sizes)
                    .map(|(symbol, size)| Some((symbol.name.clone(), size.eval(&env)?)))
                    .collect();
                let Some(values) = values else { continue };
                let text = format!("{kernel} {values:?}");
                if seen.insert(text) {
                    let name = format!("seed {seed}, fusion {fusion}, {}", kernel.name);
                    out.push(Case { name, kernel: (**kernel).clone(), planned, env: values });
                }
            }
        }
    }
    out
}

/// Elements from the start of the buffer to the last one that the layout names.
fn elements(param: &Param, env: &Env) -> usize {
    let value = |d: &tilewright_layout::Dim| d.eval(env).unwrap();
    let mut last = value(&param.layout.offset);
    for axis in &param.layout.axes {
        last += (value(&axis.extent) - 1).max(0) * value(&axis.stride).max(0);
    }
    last as usize + 1
}

/// Bytes for each parameter: numbers of both signs for what is read, a poison for the rest.
fn buffers(kernel: &Kernel, env: &Env) -> Vec<Vec<u8>> {
    let fill = |(p, param): (usize, &Param)| {
        let elements = elements(param, env);
        let mut bytes = vec![0u8; param.dtype.bytes_for(elements).unwrap()];
        for i in 0..elements {
            let mixed = (i * 2_654_435_761 + p * 97 + i / 7) % 1009;
            let read = param.access != Access::Out;
            match param.dtype {
                d if d.is_float() => {
                    let value = if read { mixed as f64 / 250.0 - 2.0 } else { -99.0 };
                    tilewright_data::from_f64(d, &mut bytes, i, value);
                }
                DType::Bool => {
                    tilewright_data::from_i64(DType::Bool, &mut bytes, i, mixed as i64 % 2)
                }
                d => {
                    let value = if read { mixed as i64 % 7 - 1 } else { 99 };
                    let value = if d.is_signed_int() { value } else { value.abs() };
                    tilewright_data::from_i64(d, &mut bytes, i, value);
                }
            }
        }
        bytes
    };
    kernel.params.iter().map(|(_, p)| p).enumerate().map(fill).collect()
}

/// What is wrong with the device program's results.
fn differences(case: &Case, schedule: &GpuSchedule) -> Result<(), String> {
    let Case { kernel, planned, env, .. } = case;
    let program = lower(kernel, schedule).map_err(|e| e.to_string())?;
    tilewright_device::verify(&program).map_err(|e| format!("{e}\n{:#?}\n{program}", e.notes()))?;
    check(&program, std::slice::from_ref(env), &[1])
        .map_err(|e| format!("{e}\n{:#?}\n{program}", e.notes()))?;
    let mut expected = buffers(kernel, env);
    tilewright_interp::tile::run(kernel, planned, env, &mut expected, Mode::F64)
        .map_err(|e| format!("tile program: {e}"))?;
    let mut got = buffers(kernel, env);
    run(&program, env, &mut got, &Run::default()).map_err(|e| format!("{e}\n{program}"))?;
    for (p, (_, param)) in kernel.params.iter().enumerate() {
        let step = match param.dtype {
            DType::F64 => 1e-12,
            DType::F32 => 2f64.powi(-23),
            DType::F16 => 2f64.powi(-10),
            _ => 2f64.powi(-7),
        };
        let elements = elements(param, env);
        for i in 0..elements {
            let (a, b) = match param.dtype.is_float() {
                true => (
                    tilewright_data::read_f64(param.dtype, &got[p], i),
                    tilewright_data::read_f64(param.dtype, &expected[p], i),
                ),
                false => (
                    tilewright_data::read_i64(param.dtype, &got[p], i) as f64,
                    tilewright_data::read_i64(param.dtype, &expected[p], i) as f64,
                ),
            };
            let near =
                a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= step * b.abs() + 1e-9;
            if !near {
                return Err(format!(
                    "{} at {i} is {a}, not {b}\n{schedule}\n{program}",
                    param.name
                ));
            }
        }
    }
    Ok(())
}

/// A schedule from the sizes, or why there is none.
fn schedule(case: &Case, arch: Arch) -> Result<GpuSchedule, String> {
    let size = |s: &str| case.env.get(s).copied();
    GpuSchedule::lines_for(&case.kernel, arch, &size)
        .map_err(|e| e.to_string())
        .and_then(|s| s.ok_or_else(|| "a row longer than registers hold".to_owned()))
        .and_then(|s| lower(&case.kernel, &s).map_err(|e| e.to_string()).map(|_| s))
}

#[test]
fn programs_of_graphs_have_device_programs_that_compute_the_same() {
    let mut reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let (mut right, mut wrong) = (0, Vec::new());
    for case in programs() {
        match schedule(&case, Arch::Sm90a) {
            Err(reason) => {
                let what = format!("{}\n{}", case.name, case.kernel);
                reasons.entry(reason).or_default().push(what);
            }
            Ok(schedule) => match differences(&case, &schedule) {
                Ok(()) => right += 1,
                Err(how) => {
                    wrong.push(format!("{}: {how}\n{}\n{:?}", case.name, case.kernel, case.env));
                }
            },
        }
    }
    println!("{right} right, {} wrong", wrong.len());
    for (reason, names) in &reasons {
        println!("{} times: {reason}", names.len());
        println!("{}", names[0]);
    }
    assert!(wrong.is_empty(), "{} wrong, the first:\n{}", wrong.len(), wrong[0]);
    let new: Vec<&String> =
        reasons.keys().filter(|r| !KNOWN_REASONS.iter().any(|k| r.contains(k))).collect();
    assert!(new.is_empty(), "new reasons: {new:?}");
    assert!(right >= 1000, "{right} programs");
}

#[test]
fn device_programs_of_graphs_compile_without_spills() {
    let Some(nvrtc) = common::nvrtc() else { return };
    for (arch, major, minor) in [(Arch::Sm80, 8, 0), (Arch::Sm90a, 9, 0)] {
        let mut seen = BTreeSet::new();
        let mut sources = Vec::new();
        // Enough of them to meet every operation in several forms; all would take minutes.
        for case in programs().iter().step_by(11) {
            let Ok(schedule) = schedule(case, arch) else { continue };
            let program = lower(&case.kernel, &schedule).unwrap();
            let source = tilewright_emit_cuda::emit(&program)
                .unwrap_or_else(|e| panic!("{}: {e}\n{program}", case.name));
            if seen.insert(source.text.clone()) {
                sources.push((format!("{} under {schedule}\n{}", case.name, case.kernel), source));
            }
        }
        let target = tilewright_cuda::Arch::of_device(major, minor);
        common::compile_without_spills(&nvrtc, target, &sources);
    }
}
