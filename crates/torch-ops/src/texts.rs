//! The operators' graphs, held against the oracle: planned for a GPU and run in the device interpreter.
//!
//! The same graphs on the processor are tested from Python (`tests/python/test_torch_ops.py`).

use crate::ops::samples;
use crate::plans::planned;
use std::collections::BTreeMap;
use tilewright_graph::Graph;
use tilewright_target::Gpu;

#[test]
fn every_operator_runs_on_a_gpu_within_the_contract() {
    let mut wrong = Vec::new();
    for (name, text) in samples() {
        let graph = Graph::parse(&text).unwrap_or_else(|e| panic!("{name}: {e:?}\n{text}"));
        let chosen: BTreeMap<String, i64> =
            graph.symbols.iter().map(|s| (s.name.to_string(), 5)).collect();
        let inputs = tilewright::inputs::random(&graph, &chosen, 7).expect("inputs");
        let planned = match planned(&Gpu::h200(), &graph) {
            Ok(planned) => planned,
            Err(e) => {
                wrong.push(format!("{name}: {e:?}"));
                continue;
            }
        };
        let run = match planned.interpret(&inputs) {
            Ok(run) => run,
            Err(e) => {
                wrong.push(format!("{name}: {e:?}"));
                continue;
            }
        };
        let host = run.bound.host_steps(planned.plan());
        if !host.is_empty() {
            wrong.push(format!("{name} runs on the host: {host:?}"));
        }
        let report = planned.verify_outputs(&graph, &inputs, &run.outputs).expect("a report");
        if !report.passed() {
            wrong.push(format!("{name}: {:?}", report.outputs));
        }
        // What is one pass is one kernel; a rotation's halves are two, and so are the sums for two vectors and
        // a product whose sums are a result, too.
        let steps = planned.plan().steps.len();
        let most = match &*name {
            n if n.starts_with("layer") && n.ends_with("parts") => 2,
            n if n.starts_with("rotary") => 2,
            // What a product's ending reads again is stored first.
            "linear with its sums" => 2,
            _ => 1,
        };
        if steps > most {
            wrong.push(format!("{name} is {steps} kernels"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_operator_is_triton_too() {
    let mut wrong = Vec::new();
    for (name, text) in samples() {
        let graph = Graph::parse(&text).unwrap_or_else(|e| panic!("{name}: {e:?}\n{text}"));
        for about in [128, 16384] {
            match crate::triton::modules(&text, &vec![about; graph.symbols.len()]) {
                Ok(modules) if modules.iter().all(|m| m.1.contains("def launch(")) => {}
                Ok(_) => wrong.push(format!("{name}: a module without a launcher")),
                Err(e) => wrong.push(format!("{name}: {e:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
