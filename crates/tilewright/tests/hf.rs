//! The tiny Hugging Face models of `tests/hf`, compiled: within the numerics contract against the
//! float64 oracle, output by output and kernel by kernel, and near what transformers computed.
//!
//! That the graphs themselves compute what transformers computes is tested in the crate `import`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilewright::verify::verify;
use tilewright::{Compiler, Cpu};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_import::hf::{LoadOptions, load_model, safetensors};
use tilewright_interp::graph::order_inputs;

/// Difference to transformers' float32 outputs, relative to the largest value: both sides
/// round to float32 (6e-8) in some tens of operations one after another.
const TOLERANCE: f64 = 5e-6;

/// Directories of models, in order.
fn directories() -> Vec<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf");
    let entries = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = entries.filter(|d| d.join("config.json").is_file()).collect();
    all.sort();
    all
}

fn tensors(expected: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let named = expected.iter();
    named.filter_map(|(n, t)| Some((n.strip_prefix(prefix)?.to_string(), t.clone()))).collect()
}

#[test]
fn every_family_compiled_is_within_the_contract() {
    let Ok(cpu) = Cpu::detect(2) else { return };
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let compiler = Compiler::for_cpu(cpu, Some(cache));
    let directories = directories();
    for directory in &directories {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let graph = load_model(directory, &LoadOptions::default()).expect("it loads").graph;
        let expected = safetensors::read(&directory.join("expected.safetensors")).unwrap().tensors;
        let inputs = order_inputs(&graph, &tensors(&expected, "in.")).expect("the inputs");
        let compiled = compiler.compile_observed(graph.clone(), &mut |_| {}).expect("it compiles");

        let report = verify(&compiled, &graph, &inputs).expect("it runs");
        assert!(!report.kernels.is_empty(), "{name}");
        let mut worst = 0.0f64;
        for deviation in report.outputs.iter().chain(&report.kernels) {
            assert!(deviation.ratio <= 1.0, "{name}: {deviation:?}");
            worst = worst.max(deviation.ratio);
        }

        let got = compiled.session().unwrap().run(&inputs).unwrap();
        let wanted = tensors(&expected, "out.");
        assert_eq!(got.len(), wanted.len(), "{name}");
        let mut difference = 0.0f64;
        for ((output, _), got) in graph.outputs.iter().zip(&got) {
            let want = &wanted[output];
            assert_eq!(got.shape(), want.shape(), "{name} {output}");
            let want = want.to_f64s();
            let scale = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for (i, (a, b)) in got.to_f64s().iter().zip(&want).enumerate() {
                let error = (a - b).abs() / scale;
                assert!(error <= TOLERANCE, "{name} {output}[{i}] is {a}, transformers has {b}");
                difference = difference.max(error);
            }
        }
        println!("{name:24} {worst:.2} of the budget, {difference:.1e} from transformers");
    }
    assert_eq!(directories.len(), 23, "one directory per model under test");
}

/// Activations in the 16-bit types: the contract judges them by what such a type can hold, and the
/// float32 outputs of transformers are not further away than some roundings of it.
#[test]
fn half_precision_activations_compiled_are_within_the_contract() {
    let Ok(cpu) = Cpu::detect(2) else { return };
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let compiler = Compiler::for_cpu(cpu, Some(cache));
    for (compute, rounding) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let of_family = |name: &str| {
            directories().into_iter().find(|d| d.ends_with(name)).expect("a directory of tests/hf")
        };
        for name in ["bert", "bert_float16", "gpt2", "llama", "roberta", "vit_classifier"] {
            let directory = of_family(name);
            let options = LoadOptions { compute, ..LoadOptions::default() };
            let graph = load_model(&directory, &options).expect("it loads").graph;
            let expected = directory.join("expected.safetensors");
            let expected = safetensors::read(&expected).unwrap().tensors;
            let inputs = order_inputs(&graph, &tensors(&expected, "in.")).expect("the inputs");
            let compiled = compiler.compile_observed(graph.clone(), &mut |_| {}).expect("compiles");
            let report = verify(&compiled, &graph, &inputs).expect("it runs");
            let worst = report.outputs.iter().chain(&report.kernels);
            let worst = worst.inspect(|d| assert!(d.ratio <= 1.0, "{name} in {compute}: {d:?}"));
            let worst = worst.fold(0.0f64, |m, d| m.max(d.ratio));

            let got = compiled.session().unwrap().run(&inputs).unwrap();
            let wanted = tensors(&expected, "out.");
            let mut difference = 0.0f64;
            for ((output, _), got) in graph.outputs.iter().zip(&got) {
                assert_eq!(got.dtype(), compute, "{name} {output}");
                let want = wanted[output].to_f64s();
                let scale = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                for (a, b) in got.to_f64s().iter().zip(&want) {
                    difference = difference.max((a - b).abs() / scale / rounding);
                }
            }
            println!("{name:16} in {compute}: {worst:.2} of the budget, {difference:.1} roundings");
            assert!(difference <= 16.0, "{name} in {compute}: {difference} roundings");
        }
    }
}
