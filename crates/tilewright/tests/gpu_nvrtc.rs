//! Every device program of the tiny Hugging Face models compiles for Hopper, in every precision.
//!
//! Compiled kernels are kept below `target`. Without NVRTC the test says so and passes, unless
//! `TILEWRIGHT_REQUIRE_NVRTC=1`.

#[allow(dead_code, reason = "another test uses the rest")]
mod nets;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tilewright::Precision;
use tilewright::gpu::GpuCompiler;
use tilewright_cuda::{Arch, Nvrtc};
use tilewright_device::Program;
use tilewright_emit_cuda::emit;
use tilewright_import::hf::{LoadOptions, load_model};
use tilewright_launch::request;
use tilewright_layout::Env;
use tilewright_runtime_gpu::{BoundStep, Chooser, bind};
use tilewright_target::Gpu;

#[test]
fn every_program_of_the_tiny_models_compiles() {
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
    // By text, so that the order is the same in every run.
    let mut programs: BTreeMap<String, Arc<Program>> = BTreeMap::new();
    let load = |model| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(model);
        load_model(&folder, &LoadOptions::default()).expect("it loads").graph
    };
    let mut graphs: Vec<_> =
        ["bert", "gpt2", "llama", "qwen3", "vit", "distilbert"].into_iter().map(load).collect();
    graphs.push(nets::residual_network());
    graphs.push(nets::squeeze_network(32));
    for graph in graphs {
        for precision in [Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16] {
            let mut compiler = GpuCompiler::new(Gpu::h200());
            compiler.precision = precision;
            compiler.fold_operands = true;
            let planned = compiler.plan(graph.clone()).expect("it plans");
            let sizes: Env =
                graph.symbols.iter().map(|s| (s.name.clone(), 9.min(s.range.max))).collect();
            let bound = bind(planned.plan(), &sizes, &mut Chooser::new(Gpu::h200())).unwrap();
            for step in &bound.steps {
                let BoundStep::Device { choice, .. } = step else { continue };
                for launch in &choice.ways[0].launches {
                    programs.insert(launch.program.to_string(), launch.program.clone());
                }
            }
        }
    }
    let requests: Vec<_> = programs
        .values()
        .map(|program| request(program, &emit(program).expect("it prints"), Arch::SM_90A))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut failed = Vec::new();
    for (result, program) in
        nvrtc.compile_all(&requests, threads).into_iter().zip(programs.values())
    {
        if let Err(error) = result {
            failed.push(format!("{}: {error} {:?}", program.name, error.notes()));
        }
    }
    println!("{} programs", requests.len());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
