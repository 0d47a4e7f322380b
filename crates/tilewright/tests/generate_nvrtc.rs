//! The device programs of a decoding step compile for Hopper, without spilling: heads of 64 and 128, one row, two and eight, launch
//! by launch and as one launch.
//!
//! Compiled kernels are kept below `target`. Without NVRTC the test says so and passes, unless
//! `TILEWRIGHT_REQUIRE_NVRTC=1`.

use std::collections::BTreeMap;
use std::path::Path;
use tilewright::generate::{GpuGeneratorOptions, GpuGeneratorPlan, Sampling};
use tilewright_cuda::{Arch, Nvrtc};
use tilewright_emit_cuda::emit;
use tilewright_launch::request;
use tilewright_target::Gpu;

/// A directory with the configuration of a Llama of few layers and words.
fn directory(name: &str, hidden: i64, inner: i64, width: i64) -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "hidden_size": {hidden}, "intermediate_size": {inner}, "num_hidden_layers": 1,
        "num_attention_heads": {}, "num_key_value_heads": 4, "head_dim": {width},
        "vocab_size": 2000, "tie_word_embeddings": true}}"#,
        hidden / width
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    folder
}

#[test]
fn every_program_of_a_step_compiles() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cubins");
    let nvrtc = match Nvrtc::open(Some(&folder)) {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            println!("skipped: no NVRTC");
            return;
        }
    };
    let mut sources = BTreeMap::new();
    let mut streamed = Vec::new();
    let all = Sampling { temperature: 1.0, top_k: Some(5), top_p: Some(0.5) };
    for (name, hidden, inner, width) in
        [("decoder_64", 1024, 2816, 64), ("decoder_128", 2048, 5632, 128)]
    {
        let folder = directory(name, hidden, inner, width);
        for (batch, sampling) in [(1, None), (2, None), (8, Some(all))] {
            let options = GpuGeneratorOptions {
                batch,
                max_length: 4096,
                stored: None,
                sampling,
                random_weights: Some(1),
            };
            let plan = GpuGeneratorPlan::open(&folder, Gpu::h200(), &options).unwrap();
            assert_eq!(plan.plan().streamed.is_some(), batch > 1);
            if let Some(step) = &plan.plan().streamed {
                let label = format!("{name} {batch}: one launch");
                streamed.push((label, "decode_streamed", step.request(Arch::SM_90A, 132)));
            }
            let written =
                plan.plan().token.iter().filter_map(|s| Some((&s.label, s.written.as_ref()?)));
            for (label, launch) in written {
                let label = format!("{name} {batch}: {label} by hand");
                streamed.push((label, launch.entry(), launch.request(Arch::SM_90A)));
            }
            for step in plan.plan().token.iter().chain(&plan.plan().chunk) {
                let source = emit(&step.program).unwrap();
                let label = format!("{name} {batch}: {}", step.label);
                sources.entry(source.text.clone()).or_insert((label, step.program.clone(), source));
            }
        }
    }
    let requests: Vec<_> =
        sources.values().map(|(_, p, source)| request(p, source, Arch::SM_90A)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut failed = Vec::new();
    for (result, (label, _, source)) in
        nvrtc.compile_all(&requests, threads).into_iter().zip(sources.values())
    {
        match result {
            Err(error) => failed.push(format!("{label}: {error} {:?}", error.notes())),
            Ok(compiled) => {
                let found = compiled.resources(&source.entry).expect("its resources");
                println!("{label}: {} registers, {}", found.registers, found.stack_bytes);
                if found.spill_store_bytes > 0 {
                    failed.push(format!("{label} spills {} bytes", found.spill_store_bytes));
                }
            }
        }
    }
    let requests_of = streamed.iter().map(|(_, _, r)| r.clone()).collect::<Vec<_>>();
    for (result, (label, entry, _)) in
        nvrtc.compile_all(&requests_of, threads).into_iter().zip(&streamed)
    {
        match result {
            Err(error) => failed.push(format!("{label}: {error} {:?}", error.notes())),
            Ok(compiled) => {
                let found = compiled.resources(entry).expect("its resources");
                println!("{label}: {} registers, {}", found.registers, found.stack_bytes);
                // Of the one launch the warps that finish a unit have few registers, and may lack one or two.
                let most = if *entry == "decode_streamed" { 64 } else { 0 };
                if found.spill_store_bytes > most {
                    failed.push(format!("{label} spills {} bytes", found.spill_store_bytes));
                }
            }
        }
    }
    println!("{} programs", requests.len() + requests_of.len());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
