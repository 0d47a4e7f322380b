//! Runs the ONNX backend node tests and holds them against `tests/onnx_backend/passing.txt`.
//!
//!     python tests/onnx_backend/dump.py target/onnx_backend
//!     cargo test -p tilewright-conformance --test onnx_backend -- [--bless] [--verbose] [--oracle]
//!         [FILTER]
//!
//! Each case is compiled to machine code and run, as `tw run` does; `--oracle` runs the graph
//! interpreter instead, to tell a wrong import from a wrong kernel. Compiled kernels are kept in
//! `target/onnx_backend_kernels`, so that a second run compiles nothing.
//!
//! A listed case that does not pass is a failure. A case that passes and is not listed is
//! announced; `--bless` rewrites the list. With a filter only matching cases run, and the list is
//! not touched.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tilewright::{Compiler, Cpu, Tensor};
use tilewright_conformance::onnx_backend::{Verdict, cases, run_case};
use tilewright_graph::Graph;
use tilewright_interp::{Mode, run};

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (bless, verbose) =
        (args.iter().any(|a| a == "--bless"), args.iter().any(|a| a == "--verbose"));
    let filter = args.iter().find(|a| !a.starts_with('-'));
    let folder = std::env::var("ONNX_BACKEND_CASES")
        .map_or_else(|_| root.join("target/onnx_backend"), Into::into);
    let list_path = root.join("tests/onnx_backend/passing.txt");
    // A fresh clone has no cases yet: the package that holds them is in the repository's environment.
    let python = root.join(".venv/bin/python");
    if !folder.is_dir() && python.is_file() {
        let dump = root.join("tests/onnx_backend/dump.py");
        let status = std::process::Command::new(python).arg(dump).arg(&folder).status();
        if !status.is_ok_and(|s| s.success()) {
            println!("tests/onnx_backend/dump.py failed");
            return ExitCode::FAILURE;
        }
    }
    let mut list = match cases(&folder) {
        Ok(list) if !list.is_empty() => list,
        _ => {
            println!(
                "SKIPPED: no cases in {} (python tests/onnx_backend/dump.py writes them)",
                folder.display()
            );
            return ExitCode::SUCCESS;
        }
    };
    if let Some(filter) = filter {
        list.retain(|p| p.to_string_lossy().contains(filter.as_str()));
    }
    let listed: BTreeSet<String> = std::fs::read_to_string(&list_path)
        .unwrap_or_default()
        .lines()
        .filter(|l| !l.starts_with('#') && !l.is_empty())
        .map(str::to_string)
        .collect();

    let compiler = match Cpu::detect(1) {
        Ok(cpu) => Compiler::for_cpu(cpu, Some(root.join("target/onnx_backend_kernels"))),
        Err(e) => {
            println!("SKIPPED: {e}");
            return ExitCode::SUCCESS;
        }
    };
    let oracle = args.iter().any(|a| a == "--oracle");
    let runner = |graph: &Graph, inputs: &[Tensor]| {
        if oracle {
            return run(graph, inputs, Mode::Exact);
        }
        compiler.compile_observed(graph.clone(), &mut |_| {})?.session()?.run(inputs)
    };

    std::panic::set_hook(Box::new(|_| {}));
    let next = AtomicUsize::new(0);
    let results: Mutex<BTreeMap<String, Verdict>> = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(case) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let name = case.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    let verdict = catch_unwind(AssertUnwindSafe(|| run_case(case, &runner)))
                        .unwrap_or_else(|panic| {
                            let text = panic.downcast_ref::<String>().cloned();
                            let text = text.or(panic.downcast_ref::<&str>().map(|s| s.to_string()));
                            Verdict::Fail(format!("PANIC: {}", text.unwrap_or_default()))
                        });
                    results
                        .lock()
                        .expect("no thread panics while it holds the lock")
                        .insert(name, verdict);
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let results = results.into_inner().expect("all threads ended well");

    let mut families: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let (mut passed, mut unsupported, mut panics) = (0, 0, 0);
    for (name, verdict) in &results {
        let family = name.trim_start_matches("test_").split('_').next().unwrap_or_default();
        let row = families.entry(family).or_default();
        row.1 += 1;
        match verdict {
            Verdict::Pass => {
                passed += 1;
                row.0 += 1;
            }
            Verdict::Unsupported(why) => {
                unsupported += 1;
                if verbose {
                    println!("unsupported {name}: {why}");
                }
            }
            Verdict::Fail(why) => {
                panics += usize::from(why.starts_with("PANIC"));
                if verbose || listed.contains(name) {
                    println!("FAILED {name}: {why}");
                }
            }
        }
    }
    if verbose {
        for (family, (good, all)) in families.iter().filter(|(_, (good, all))| good < all) {
            println!("{family}: {good} of {all}");
        }
    }
    println!(
        "onnx backend: {passed} passed, {} failed, {unsupported} unsupported of {} ({:.1} %)",
        results.len() - passed - unsupported,
        results.len(),
        100.0 * passed as f64 / results.len().max(1) as f64
    );

    let good: BTreeSet<String> =
        results.iter().filter(|(_, v)| **v == Verdict::Pass).map(|(n, _)| n.clone()).collect();
    let lost: Vec<&String> =
        listed.iter().filter(|n| results.contains_key(*n) && !good.contains(*n)).collect();
    let gone: Vec<&String> =
        listed.iter().filter(|n| filter.is_none() && !results.contains_key(*n)).collect();
    let new: Vec<&String> = good.iter().filter(|n| !listed.contains(*n)).collect();
    if bless && filter.is_none() {
        if !lost.is_empty() {
            println!("dropping {} cases that passed before: {lost:?}", lost.len());
        }
        let mut text = String::from(
            "# ONNX backend node tests that pass. The list may only grow; --bless rewrites it.\n",
        );
        for name in &good {
            text += name;
            text.push('\n');
        }
        if let Err(e) = std::fs::write(&list_path, text) {
            println!("cannot write {}: {e}", list_path.display());
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    if !new.is_empty() && filter.is_none() {
        println!("{} more cases pass now: add them with --bless", new.len());
    }
    for name in &lost {
        println!("LOST {name}: it passed before");
    }
    for name in &gone {
        println!("note: {name} is listed and not among the cases (another version of onnx?)");
    }
    if lost.is_empty() && panics == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
