//! Rotary positions of queries and keys behind the product that makes them: plans for a GPU, run in the device interpreter.

use std::path::PathBuf;
use tilewright::Precision;
use tilewright::gpu::{GpuCompiler, GpuPlan};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_import::hf::{LoadOptions, load_model};
use tilewright_interp::Mode;
use tilewright_layout::Env;
use tilewright_plan::Form;
use tilewright_target::Gpu;

/// A small decoder of two layers with random weights: its family, the width of its heads, and what else is in its configuration.
fn decoder(family: &str, width: i64, more: &str) -> Graph {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{family}-{width}"));
    std::fs::create_dir_all(&folder).unwrap();
    let class = match family {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    let config = format!(
        r#"{{"architectures": ["{class}"], "model_type": "{family}", "dtype": "bfloat16", "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
        "head_dim": {width}, "vocab_size": 64, "tie_word_embeddings": true{more}}}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    let options = LoadOptions { random_weights: Some(1), ..LoadOptions::default() };
    load_model(&folder, &options).expect("it loads").graph
}

fn plan(graph: &Graph, precision: Precision, fold: bool) -> GpuPlan {
    let mut compiler = GpuCompiler::new(Gpu::h200());
    (compiler.precision, compiler.fold) = (precision, fold);
    compiler.plan(graph.clone()).expect("it plans")
}

/// How many kinds of kernels turn heads.
fn turning(planned: &GpuPlan) -> usize {
    let turns = |f: &Form| matches!(f, Form::Product(p) if p.turns.is_some());
    let steps = planned.plan().steps.iter().filter(|s| match s {
        tilewright_plan::Step::Launch { kernel, .. } => {
            planned.plan().kernels[*kernel].forms.iter().any(turns)
        }
        _ => false,
    });
    steps.count()
}

fn tokens(batch: usize, length: usize) -> Tensor {
    let ids: Vec<f64> = (0..batch * length).map(|i| (i * 37 % 61) as f64).collect();
    Tensor::from_f64s(DType::I64, &[batch, length], &ids).unwrap()
}

/// One kernel less for each layer, and the same numbers within the contract, on the device and in the plan's own programs.
#[test]
fn products_turn_queries_and_keys() {
    for (family, width, more) in [("llama", 64, ""), ("qwen2", 32, "")] {
        let graph = decoder(family, width, more);
        for precision in [Precision::Bf16, Precision::F16, Precision::Tf32] {
            let planned = plan(&graph, precision, true);
            // Heads of 64 numbers of 32 bits go across the chunks in which tiles leave.
            let turned = precision != Precision::Tf32 || width == 32;
            let name = format!("{family} {width} {precision}");
            assert_eq!(turning(&planned), if turned { 2 } else { 0 }, "{name}");
            for (batch, length) in [(1, 37), (2, 23), (2, 64)] {
                let mask =
                    Tensor::from_f64s(DType::I64, &[batch, length], &vec![1.0; batch * length]);
                let inputs = [tokens(batch, length), mask.unwrap()];
                let run = planned
                    .interpret(&inputs)
                    .unwrap_or_else(|e| panic!("{name}: {e} {:?}", e.notes()));
                let own =
                    tilewright_interp::plan::run(planned.plan(), &inputs, &Env::new(), Mode::Exact)
                        .unwrap_or_else(|e| panic!("{name}: {e} {:?}", e.notes()));
                for outputs in [run.outputs, own] {
                    let report =
                        planned.verify_outputs(&graph, &inputs, &outputs).expect("it verifies");
                    assert!(
                        report.outputs.iter().all(|d| d.ratio <= 1.0),
                        "{name} {batch} {length}: {report:?}"
                    );
                }
            }
        }
    }
}

/// What has no such product stays as it was: heads with a norm in between, plain multiply-adds, heads across chunks, older machines.
#[test]
fn other_heads_turn_in_a_kernel_of_their_own() {
    let llama = decoder("llama", 64, "");
    let mut older = GpuCompiler::new(Gpu::a100());
    older.precision = Precision::Bf16;
    let older = older.plan(llama.clone()).expect("it plans");
    let others = [
        plan(&decoder("qwen3", 64, ""), Precision::Bf16, true),
        plan(&llama, Precision::F32, true),
        plan(&decoder("llama", 128, ""), Precision::Bf16, true),
        plan(&decoder("llama", 16, ""), Precision::Bf16, true),
        older,
    ];
    let steps = plan(&llama, Precision::Bf16, true).plan().steps.len();
    for (i, planned) in others.iter().enumerate() {
        assert_eq!(turning(planned), 0, "{i}");
        assert!(planned.plan().steps.len() >= steps + 2, "{i}");
    }
}
