//! Models planned for a GPU, run without one: the device programs of the tiny Hugging Face models in the
//! device interpreter, within the numerics contract against the float64 oracle.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilewright::Precision;
use tilewright::gpu::GpuCompiler;
use tilewright_data::Tensor;
use tilewright_import::hf::{LoadOptions, load_model, safetensors};
use tilewright_interp::graph::order_inputs;
use tilewright_target::Gpu;

/// Directories of models, in order.
fn directories() -> Vec<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf");
    let entries = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = entries.filter(|d| d.join("config.json").is_file()).collect();
    all.sort();
    all
}

fn inputs_of(directory: &Path, graph: &tilewright_graph::Graph) -> Vec<Tensor> {
    let expected = safetensors::read(&directory.join("expected.safetensors")).unwrap().tensors;
    let named: BTreeMap<String, Tensor> = expected
        .iter()
        .filter_map(|(n, t)| Some((n.strip_prefix("in.")?.to_string(), t.clone())))
        .collect();
    order_inputs(graph, &named).expect("the inputs")
}

#[test]
fn tiny_models_in_the_device_interpreter_are_within_the_contract() {
    let only = std::env::var("ONLY").unwrap_or_default();
    for directory in directories() {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        if !name.contains(&only) {
            continue;
        }
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        let inputs = inputs_of(&directory, &graph);
        let start = std::time::Instant::now();
        let compiler = GpuCompiler::new(Gpu::h200());
        let planned = compiler.plan(graph.clone()).expect("it plans");
        let t = start.elapsed();
        let run = match planned.interpret(&inputs) {
            Ok(run) => run,
            Err(e) => {
                println!("{name}: FAILED {e} {:?}", e.notes());
                continue;
            }
        };
        println!("{name}: {} steps, planned in {t:?}, ran in {:?}", planned.plan().steps.len(), start.elapsed());
        for (step, reason) in run.bound.host_steps(planned.plan()) {
            println!("   host {step}: {reason}");
        }
        let report = planned.verify_outputs(&graph, &inputs, &run.outputs).expect("it verifies");
        for d in &report.outputs {
            println!("   {} {:.3} of budget {:.2e}", d.name, d.ratio, d.budget);
        }
    }
    let _ = Precision::F32;
}
