//! Tile programs that the graph compiler writes, scheduled for a GPU: which of them have a device program,
//! and whether it computes what the tile program says.
//!
//! The programs are those of random graphs, fused and not. What the lowering refuses is counted by its reason;
//! the list of reasons may only become shorter.

#[path = "common/graph.rs"]
mod graph;
#[path = "common/tile_bound.rs"]
mod tile_bound;

use graph::{Case, buffers, programs, schedule, unequal};

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tilewright_cuda::{Arch as Target, CompileRequest, Nvrtc};
use tilewright_device::Arch;
use tilewright_emit_cuda::{COMPILER_OPTIONS, headers};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options as Run, check, run};
use tilewright_lower_gpu::{GpuSchedule, lower};

/// Reasons for which a program without products has no form on a GPU.
const KNOWN_REASONS: &[&str] = &[];

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
    unequal(kernel, env, &got, &expected, 0.0)
        .map_or(Ok(()), |how| Err(format!("{how}\n{schedule}\n{program}")))
}

#[test]
fn programs_of_graphs_have_device_programs_that_compute_the_same() {
    let mut reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let (mut right, mut wrong) = (0, Vec::new());
    for case in programs() {
        match schedule(case, Arch::Sm90a) {
            Err(reason) => {
                let what = format!("{}\n{}", case.name, case.kernel);
                reasons.entry(reason).or_default().push(what);
            }
            Ok(schedule) => match differences(case, &schedule) {
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

/// Results in the kernels' own types are within the bounds, and the bounds are about as narrow as the types allow.
#[test]
fn results_in_exact_types_are_within_their_bounds() {
    let (mut compared, mut without, mut narrow) = (0, 0, 0);
    for case in programs().iter().step_by(6) {
        let before = buffers(&case.kernel, &case.env);
        let Some(bounds) = tile_bound::bounds(&case.kernel, &case.planned, &case.env, &before)
        else {
            without += 1;
            continue;
        };
        let mut got = before.clone();
        tilewright_interp::tile::run(&case.kernel, &case.planned, &case.env, &mut got, Mode::Exact)
            .unwrap();
        let wrong = tile_bound::beyond(&case.kernel, &got, &bounds);
        assert!(wrong.is_none(), "{}: {}\n{}", case.name, wrong.unwrap(), case.kernel);
        let fine = |(v, e): &tile_bound::Bounded| *e <= 0.05 * (1.0 + v.abs());
        narrow += usize::from(bounds.iter().flatten().all(fine));
        compared += 1;
    }
    println!("{compared} compared, {narrow} with narrow bounds, {without} without");
    assert!(compared > 100 && 10 * narrow > 9 * compared && 10 * without < compared);
}

#[test]
fn device_programs_of_graphs_compile_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    for (arch, target) in [(Arch::Sm80, Target::SM_80), (Arch::Sm90a, Target::SM_90A)] {
        let mut seen = BTreeSet::new();
        let (mut names, mut requests) = (Vec::new(), Vec::new());
        // Enough of them to meet every operation in several forms; all would take minutes.
        for case in programs().iter().step_by(11) {
            let Ok(schedule) = schedule(case, arch) else { continue };
            let program = lower(&case.kernel, &schedule).unwrap();
            let source = tilewright_emit_cuda::emit(&program)
                .unwrap_or_else(|e| panic!("{}: {e}\n{program}", case.name));
            if seen.insert(source.text.clone()) {
                let request = CompileRequest::new(&source.entry, source.text.clone(), target);
                let request = COMPILER_OPTIONS.iter().fold(request, |r, option| r.option(*option));
                let request = headers().iter().fold(request, |r, (n, t)| r.header(*n, *t));
                names.push((source.entry, source.text, format!("{} under {schedule}", case.name)));
                requests.push(request);
            }
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        for (compiled, (entry, text, name)) in
            nvrtc.compile_all(&requests, threads).iter().zip(names)
        {
            let compiled =
                compiled.as_ref().unwrap_or_else(|e| panic!("{name}: {e}\n{:#?}", e.notes()));
            let used = compiled.resources(&entry).unwrap_or_else(|| panic!("{name}: no figures"));
            // The functions of the circle reduce huge arguments with a small array in memory.
            let circle = ["sinf(", "cosf(", "tanf("].iter().any(|f| text.contains(f));
            let stack = if circle { 0 } else { used.stack_bytes };
            assert_eq!(
                used.spill_store_bytes + used.spill_load_bytes + stack,
                0,
                "{name} spills on {}: {used:?}",
                arch.name()
            );
        }
    }
}

/// Opens NVRTC. Without it the test says that it was skipped (`None`); with `TILEWRIGHT_REQUIRE_NVRTC=1` it
/// fails instead.
fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::open(Some(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvrtc"))) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            eprintln!("skipped: no NVRTC");
            None
        }
    }
}
