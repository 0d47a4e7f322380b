//! Random graphs: the lowered plan against the oracle, fused and not, with the layouts that the
//! passes choose. A failure is shrunk before it is shown.

mod support;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::host;
use tilewright_base::DType;
use tilewright_graph::Graph;
use tilewright_interp::{Mode, Options as Run};
use tilewright_lower::{Choice, CpuTarget, Layouts, Options, lower_with};
use tilewright_passes::{PassContext, choose_layouts};
use tilewright_testkit as kit;

/// What plans had.
#[derive(Default)]
struct Seen {
    moves: Cell<usize>,
    prologues: Cell<usize>,
}

/// What is wrong with the plan of this graph, if anything.
fn wrong(graph: &Graph, seed: u64, fusion: Choice, blocked: bool, seen: &Seen) -> Option<String> {
    let mut rng = kit::data::Rng::new(seed);
    let env = kit::data::random_env(graph, &mut rng);
    let inputs = kit::data::random_inputs(graph, &env, &mut rng);
    // What the oracle itself refuses is no case.
    let options = Run { env: env.clone(), ..Run::new(Mode::F64) };
    tilewright_interp::run_with(graph, &inputs, &options).ok()?;
    let want = match kit::bound::run(graph, &inputs, &env) {
        Ok(want) => want,
        Err(e) => return Some(format!("no bounds: {e:?}")),
    };
    let context = PassContext { vector_lanes: 4, panel_width: 8, ..PassContext::default() };
    let layouts = if blocked { choose_layouts(graph, &context) } else { Layouts::new() };
    let mut target = CpuTarget::avx2();
    if seed % 2 == 1 {
        // A small machine: every loop runs more than once.
        (target.lanes, target.l1_bytes, target.l2_bytes) = (4, 256, 1024);
    }
    // Machines that differ in what is dear, so that the planner takes all kinds of moves.
    match seed % 4 {
        0 => (target.launch_ns, target.l2_bytes_per_second) = (1.0, 1e8),
        1 => (target.launch_ns, target.flops_per_second) = (1.0, 1e8),
        2 => target.launch_ns = 1.0,
        _ => {}
    }
    let got = catch_unwind(AssertUnwindSafe(|| {
        let (plan, fused) =
            lower_with(graph, &target, &layouts, &host, &Options { fusion, ..Options::default() })
                .map_err(|e| e.to_string())?;
        tilewright_lower::verify_plan(&plan).map_err(|e| format!("{e}\n{fused}"))?;
        let moves = match fusion {
            Choice::Any(_) => fused.considered,
            _ => fused.decisions.len(),
        };
        seen.moves.set(seen.moves.get() + moves);
        let prologues = fused.to_string().matches("prologue: ").count();
        seen.prologues.set(seen.prologues.get() + prologues);
        if fusion == Choice::Fastest && fused.estimate_ns > fused.greedy_ns {
            return Err(format!("slower than the greedy grouping\n{fused}"));
        }
        tilewright_interp::plan::run(&plan, &inputs, &env, Mode::Exact)
            .map_err(|e| format!("{e}\n{fused}"))
    }));
    let got = match got {
        Ok(Ok(got)) => got,
        Ok(Err(e)) => return Some(e),
        Err(_) => return Some("panic".to_string()),
    };
    for (i, (got, want)) in got.iter().zip(want.outputs.iter().zip(&want.errors)).enumerate() {
        let comparison = kit::bound::check(got, want.0, want.1);
        if !comparison.passed() {
            return Some(format!("output {i}: {comparison}"));
        }
    }
    None
}

#[test]
fn plans_of_random_graphs_match_the_oracle() {
    let first: u64 = std::env::var("TW_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let count: u64 = std::env::var("TW_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(150);
    let seen = Seen::default();
    for seed in first..first + count {
        let dtype = if seed % 5 == 0 { DType::BF16 } else { DType::F32 };
        let nodes = 4 + (seed % 20) as usize;
        let options = kit::generate::Options { nodes, dtype, ..kit::generate::Options::default() };
        let graph = kit::generate::graph(seed, &options);
        let any = [Choice::Any(seed), Choice::Any(seed + 1000)];
        for (fusion, blocked) in
            [(Choice::Fastest, true), (Choice::Apart, false), (any[0], false), (any[1], true)]
        {
            let Some(problem) = wrong(&graph, seed, fusion, blocked, &seen) else { continue };
            let again = |g: &Graph| wrong(g, seed, fusion, blocked, &seen);
            let small = kit::shrink::shrink(&graph, |g| again(g).is_some());
            let now = again(&small);
            panic!("seed {seed}, fusion {fusion:?}: {problem}\nsmallest: {now:?}\n{small}");
        }
    }
    // The plans are not the greedy ones only.
    let (moves, prologues) = (seen.moves.get() as u64, seen.prologues.get() as u64);
    assert!(moves >= 4 * count, "{moves} moves taken in {count} graphs");
    assert!(prologues >= count / 10, "{prologues} prologues in {count} graphs");
    println!("{moves} moves, {prologues} prologues");
}
