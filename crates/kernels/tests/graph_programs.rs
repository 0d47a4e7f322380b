//! Tile programs that the graph compiler writes, scheduled for a GPU: which of them have a device program,
//! and whether it computes what the tile program says.
//!
//! The programs are those of random graphs, fused and not. What the lowering refuses is counted by its reason;
//! the list of reasons may only become shorter.

mod common;
#[path = "common/graph.rs"]
mod graph;

use graph::{Case, buffers, programs, schedule, unequal};

use std::collections::{BTreeMap, BTreeSet};
use tilewright_device::Arch;
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
