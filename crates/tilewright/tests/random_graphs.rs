//! Random graphs, compiled to machine code and run, against the float64 oracle: with all passes and
//! the fastest fusion, with some other legal one, and with one kernel per operator. A failure is shrunk before it is shown.
//!
//! `TW_SEED` and `TW_CASES` choose the range.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tilewright::{Choice, Compiler, Cpu};
use tilewright_base::DType;
use tilewright_graph::Graph;
use tilewright_interp::{Mode, Options as Run};
use tilewright_testkit as kit;

/// What is wrong with the compiled form of this graph, if anything.
fn wrong(graph: &Graph, seed: u64, compiler: &Compiler) -> Option<String> {
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
    let got = catch_unwind(AssertUnwindSafe(|| {
        compiler.compile_observed(graph.clone(), &mut |_| {})?.session()?.run(&inputs)
    }));
    let got = match got {
        Ok(Ok(got)) => got,
        Ok(Err(e)) => return Some(format!("{e:?}")),
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
fn compiled_random_graphs_match_the_oracle() {
    let Ok(cpu) = Cpu::detect(2) else { return };
    let mut narrow = cpu.clone();
    narrow.vector_bits = 256;
    let number =
        |name: &str, usual| std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(usual);
    // Kept beside the build: what is compiled already, from the same text, is not compiled again.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let first: u64 = number("TW_SEED", 1);
    for seed in first..first + number("TW_CASES", 60) {
        let dtype = if seed % 5 == 0 { DType::BF16 } else { DType::F32 };
        let nodes = 4 + (seed % 16) as usize;
        let options = kit::generate::Options { nodes, dtype, ..kit::generate::Options::default() };
        let graph = kit::generate::graph(seed, &options);
        let machine = if seed % 3 == 0 { &narrow } else { &cpu };
        let mut compiler = Compiler::for_cpu(machine.clone(), Some(cache.clone()));
        compiler.fusion = match seed % 4 {
            0 => Choice::Apart,
            1 => Choice::Any(seed),
            _ => Choice::Fastest,
        };
        let Some(problem) = wrong(&graph, seed, &compiler) else { continue };
        let small = kit::shrink::shrink(&graph, |g| wrong(g, seed, &compiler).is_some());
        let now = wrong(&small, seed, &compiler);
        panic!("seed {seed}: {problem}\nsmallest: {now:?}\n{small}");
    }
}
