//! Generation with a cache: on the CPU against what transformers generates, and the device programs of a step in the
//! device interpreter against the whole model without a cache in float64.

use std::path::{Path, PathBuf};
use tilewright::Compiler;
use tilewright::generate::{
    CpuGenerator, Generated, GpuGeneratorOptions, GpuGeneratorPlan, MatrixForm, Request, Sampling,
    choose, end_tokens, random_numbers,
};
use tilewright_base::DType;
use tilewright_runtime_gpu::decode::HostDecoder;
use tilewright_target::Gpu;

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(name)
}

/// Prompts and their continuations, as transformers has them.
fn expected(name: &str) -> [Vec<Vec<i64>>; 2] {
    let text = std::fs::read_to_string(directory(name).join("generated.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    ["prompts", "tokens"].map(|key| serde_json::from_value(json[key].clone()).unwrap())
}

fn request(prompts: Vec<Vec<i64>>, count: usize, sampling: Option<Sampling>) -> Request {
    Request { prompts, count, sampling, seed: 7, ends: Vec::new() }
}

fn on_cpu(name: &str, request: &Request) -> Generated {
    let compiler = Compiler::new().unwrap();
    CpuGenerator::open(&directory(name), &compiler, 16, MatrixForm::Stored, None)
        .and_then(|mut g| g.generate(request))
        .unwrap_or_else(|e| panic!("{name}: {e} {:?}", e.notes()))
}

#[test]
fn greedy_generation_is_that_of_transformers() {
    for name in ["gpt2", "llama", "mistral_window", "qwen2_window", "qwen3"] {
        let [prompts, tokens] = expected(name);
        let got = on_cpu(name, &request(prompts, 10, None));
        assert_eq!(got.tokens, tokens, "{name}");
    }
}

#[test]
fn every_form_of_matrices_keeps_to_float64_position_by_position() {
    let codes = |dtype, group| MatrixForm::Codes { dtype, group, both: false };
    let sequence = |seed: i64| (0..9).map(|i| (i * i * 7 + seed) % 24).collect::<Vec<i64>>();
    let sequences = [sequence(1), sequence(5)];
    let compiler = Compiler::new().unwrap();
    for (name, form) in [
        ("llama", MatrixForm::Stored),
        ("llama", codes(DType::I4, 32)),
        ("gpt2", codes(DType::I8, 5)),
        ("qwen3", codes(DType::I4, 7)),
    ] {
        let dir = directory(name);
        let mut generator = CpuGenerator::open(&dir, &compiler, 12, form, None).unwrap();
        let report = generator.verify(&sequences, &dir, form, None).unwrap();
        assert_eq!(report.outputs.len(), 9, "{name} {form:?}");
        for d in &report.outputs {
            assert!(d.ratio <= 1.0, "{name} {form:?}: {d:?}");
        }
        // What an earlier generation left in the memory of keys and values does not count.
        let long = request(vec![sequence(2)], 3, None);
        let short = request(vec![vec![3, 4]; 2], 5, None);
        let first = generator.generate(&long).unwrap().tokens;
        let other = generator.generate(&short).unwrap().tokens;
        assert_eq!(other[0], other[1]);
        assert_eq!(generator.generate(&long).unwrap().tokens, first);
        let step = generator.step_bytes(1, 4);
        assert!(step.bytes > 0.0 && step.bytes < generator.step_bytes(2, 4).bytes);
    }
}

fn options(batch: i64, max_length: i64, sampling: Option<Sampling>) -> GpuGeneratorOptions {
    GpuGeneratorOptions { batch, max_length, stored: None, sampling, random_weights: None }
}

fn planned(name: &str, options: &GpuGeneratorOptions) -> GpuGeneratorPlan {
    GpuGeneratorPlan::open(&directory(name), Gpu::h200(), options)
        .unwrap_or_else(|e| panic!("{name}: {e} {:?}", e.notes()))
}

#[test]
fn device_programs_generate_what_transformers_does() {
    for name in ["gpt2", "llama", "mistral", "mistral_window", "qwen2", "qwen2_window", "qwen3"] {
        let [prompts, tokens] = expected(name);
        let plan = planned(name, &options(2, 16, None));
        let mut generator = plan.interpreted().unwrap();
        let got = generator.generate(&request(prompts, 10, None)).unwrap();
        assert_eq!(got.tokens, tokens, "{name}");
    }
}

#[test]
fn every_position_with_the_cache_is_that_of_the_whole_model_in_float64() {
    let sequence = |seed: i64| (0..11).map(|i| (i * i * 7 + seed) % 24).collect::<Vec<i64>>();
    for (name, batch) in
        [("llama", 1), ("mistral", 3), ("qwen3", 2), ("gpt2", 1), ("qwen2_window", 1)]
    {
        let mut generator = planned(name, &options(batch, 12, None)).interpreted().unwrap();
        let sequences: Vec<Vec<i64>> = (0..batch).map(sequence).collect();
        let report = generator.verify(&sequences, &directory(name), None).unwrap();
        assert_eq!(report.outputs.len(), 13, "{name}");
        for d in &report.outputs {
            assert!(d.ratio <= 1.0 && d.max_error > 0.0, "{name}: {d:?}");
        }
    }
}

#[test]
fn prompts_in_chunks_give_what_single_tokens_give() {
    let prompt: Vec<i64> = (0..13).map(|i| (i * 5 + 3) % 24).collect();
    for name in ["llama", "gpt2", "qwen3", "mistral_window"] {
        let plan = planned(name, &options(1, 16, None));
        assert_eq!(plan.plan().chunk_rows, 8);
        let mut chunks = plan.interpreted().unwrap();
        let got = chunks.generate(&request(vec![prompt.clone()], 3, None)).unwrap();
        let mut single = plan.interpreted().unwrap();
        single.decoding().start(None, &[]).unwrap();
        for token in &prompt {
            single.decoding().prompt(&[vec![*token]]).unwrap();
        }
        assert_eq!(single.decoding().generate(3, &[]).unwrap(), got.tokens, "{name}");
    }
}

#[test]
fn a_long_prompt_at_once_gives_what_chunks_give() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prompt_decoder");
    std::fs::create_dir_all(&folder).unwrap();
    let config = r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 50, "sliding_window": null, "tie_word_embeddings": true}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    let options = GpuGeneratorOptions { random_weights: Some(3), ..options(1, 80, None) };
    let plan = GpuGeneratorPlan::open(&folder, Gpu::h200(), &options).unwrap();
    assert!(plan.plan().prompt.is_some());
    let prompt: Vec<i64> = (0..66).map(|i| (i * i * 7 + 1) % 50).collect();
    let mut whole = plan.interpreted().unwrap();
    let logits = |g: &mut tilewright::generate::GpuGenerator<HostDecoder>| {
        g.decoding().logits().unwrap().to_f64s()
    };
    whole.decoding().start(None, &[]).unwrap();
    whole.decoding().prompt(std::slice::from_ref(&prompt)).unwrap();
    assert_eq!(whole.decoding().position(), 66);
    // Short prompts go in chunks of eight.
    let mut single = plan.interpreted().unwrap();
    single.decoding().start(None, &[]).unwrap();
    for part in [&prompt[..49], &prompt[49..]] {
        single.decoding().prompt(&[part.to_vec()]).unwrap();
    }
    let (got, wanted) = (logits(&mut whole), logits(&mut single));
    let most = wanted.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    for (g, w) in got.iter().zip(&wanted) {
        // Activations of the one are rounded to bf16, of the other they are f32.
        assert!((g - w).abs() <= 0.03 * most, "{g}, not {w}");
    }
}

#[test]
fn drawn_tokens_follow_the_seed_and_end_where_they_should() {
    let sampling = Sampling { temperature: 0.8, top_k: Some(9), top_p: Some(0.9) };
    let [prompts, _] = expected("qwen2");
    let drawn = request(prompts.clone(), 5, Some(sampling));
    let wanted = on_cpu("qwen2", &drawn).tokens;
    let plan = planned("qwen2", &options(2, 16, Some(sampling)));
    let mut generator = plan.interpreted().unwrap();
    // The same random numbers: f32 sums on the device, f64 on the host.
    assert_eq!(generator.generate(&drawn).unwrap().tokens, wanted);
    let other = Request { seed: 8, ..drawn.clone() };
    assert_ne!(generator.generate(&other).unwrap().tokens, wanted);
    let ends = Request { ends: vec![wanted[0][2]], ..drawn };
    let short = generator.generate(&ends).unwrap().tokens;
    assert_eq!(short[0].last(), Some(&wanted[0][2]));
    assert!(short[0].len() <= 3, "{short:?}");
    assert_eq!(end_tokens(&directory("qwen2")), [2]);
}

#[test]
fn the_rule_of_choice() {
    let logits = [1.0, 3.0, 2.0, 3.0, f64::NEG_INFINITY];
    assert_eq!(choose(&logits, None, 0.5), 1);
    let all = Sampling { temperature: 1.0, top_k: None, top_p: None };
    assert_eq!(choose(&logits, Some(&all), 0.0), 0);
    assert_eq!(choose(&logits, Some(&all), 0.999), 3);
    let two = Sampling { top_k: Some(2), ..all };
    assert_eq!([0.0, 0.49, 0.51].map(|u| choose(&logits, Some(&two), u)), [1, 1, 3]);
    let cold = Sampling { temperature: 1e-3, ..all };
    assert_eq!(choose(&logits, Some(&cold), 0.75), 3);
    let numbers = random_numbers(3, 1000);
    assert!(numbers.iter().all(|u| (0.0..1.0).contains(u)));
    let mean = numbers.iter().sum::<f32>() / 1000.0;
    assert!((mean - 0.5).abs() < 0.05, "{mean}");
}

#[test]
fn too_long_sequences_and_unknown_tokens_are_errors_in_words() {
    let plan = planned("llama", &options(1, 8, None));
    let mut g: tilewright::generate::GpuGenerator<HostDecoder> = plan.interpreted().unwrap();
    let long = g.generate(&request(vec![vec![1; 6]], 4, None)).unwrap_err();
    assert!(long.message().contains("9 tokens") && long.exit_code() == 2, "{long}");
    let foreign = g.generate(&request(vec![vec![24]], 1, None)).unwrap_err();
    assert!(foreign.message().contains("token 24"), "{foreign}");
    let many = GpuGeneratorPlan::open(&directory("llama"), Gpu::h200(), &options(9, 8, None));
    assert!(many.is_err_and(|e| e.exit_code() == 3));
    let bert = GpuGeneratorPlan::open(&directory("bert"), Gpu::h200(), &options(1, 8, None));
    assert!(bert.is_err_and(|e| e.message().contains("no logits") && e.exit_code() == 3));
    // What is asked for beyond the model's own length is cut to it.
    assert_eq!(planned("llama", &options(1, 99, None)).plan().positions, 32);
}
