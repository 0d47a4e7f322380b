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

/// Steps that only the interpreter's operators do: RoBERTa counts its positions from the tokens.
fn host_steps_expected(name: &str) -> usize {
    usize::from(name.contains("roberta"))
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
        for precision in [Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16] {
            let mut compiler = GpuCompiler::new(Gpu::h200());
            compiler.precision = precision;
            let planned = compiler.plan(graph.clone()).expect("it plans");
            let run = match planned.interpret(&inputs) {
                Ok(run) => run,
                Err(e) => panic!("{name} {precision}: {e} {:?}", e.notes()),
            };
            let host = run.bound.host_steps(planned.plan());
            assert_eq!(host.len(), host_steps_expected(&name), "{name} {precision}: {host:?}");
            let report =
                planned.verify_outputs(&graph, &inputs, &run.outputs).expect("it verifies");
            let steps = planned.plan().steps.len();
            for d in &report.outputs {
                println!("{name} {precision}: {steps} steps; {} {:.3} of {:.1e}", d.name, d.ratio, d.budget);
                assert!(d.ratio <= 1.0, "{name} {precision}: {d:?}");
            }
        }
    }
}
