//! Times the forms of the products of a decoding step on a GPU, each over copies of its weights that no cache holds, in one
//! recorded graph: `decode_forms [--compile] [HIDDEN,INNER,HEADS,KV_HEADS,WIDTH,VOCABULARY ...]`.
//!
//! `--compile` only fills the cache of compiled kernels. This is where `VectorProduct::form` comes from.

use std::path::PathBuf;
use std::sync::Arc;
use tilewright_base::{DType, Result};
use tilewright_cuda::{Gpu, Nvrtc};
use tilewright_device::{Arch, Program};
use tilewright_kernels::decode::{AT, Ending, Form, Norm, Rows, VectorProduct, activation};
use tilewright_launch::{BoundKernel, Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;

/// Weights of this many bytes are read before one is read again.
const ROUND_BYTES: u64 = 400 << 20;

fn products(sizes: &[i64]) -> Result<Vec<VectorProduct>> {
    let [hidden, inner, heads, kv_heads, width, vocabulary] = *sizes else {
        panic!("six sizes make a model, not {sizes:?}");
    };
    let product = |name: &str, lines: i64, depth: i64, norm: bool, ending: Ending| VectorProduct {
        name: name.into(),
        rows: Rows { batch: 1, new: 1, positions: 1024 },
        lines,
        depth,
        weight: DType::BF16,
        norm: norm.then_some(Norm { dtype: DType::BF16, eps: 1e-5, centred: false }),
        bias: false,
        ending,
    };
    let rotary = Ending::Rotary { heads, kv_heads, width };
    let plain = |residual| Ending::Plain { residual };
    Ok(vec![
        product("qkv", (heads + 2 * kv_heads) * width, hidden, true, rotary),
        product("o", hidden, heads * width, false, plain(true)),
        product("gate_up", inner, hidden, true, Ending::Gated(activation("{ x -> silu(x) }")?)),
        product("down", hidden, inner, false, plain(true)),
        product("head", vocabulary, hidden, true, plain(false)),
    ])
}

fn forms(spec: &VectorProduct, sms: i64) -> Vec<Form> {
    let picked = spec.form(sms);
    let mut out = vec![picked, Form { ahead: false, ..picked }];
    for threads in [128, 256] {
        for (each, runs) in [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
        {
            for blocks in [1, 768 / threads, 1024 / threads] {
                let form = Form { threads, lanes: 32, each, runs, blocks, ahead: true, fetched: 0 };
                if !out.contains(&form) {
                    out.push(form);
                }
            }
        }
    }
    out
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let only_compile = arguments.iter().any(|a| a == "--compile");
    arguments.retain(|a| a != "--compile");
    if arguments.is_empty() {
        // The sizes of Llama 3.2 1B and 3.1 8B.
        arguments.push("2048,8192,32,8,64,128256".into());
        arguments.push("4096,14336,32,8,128,128256".into());
    }
    let gpu = Gpu::open(0)?;
    let sms = i64::from(gpu.properties().sm_count);
    let cache = std::env::var_os("TILEWRIGHT_CACHE").map(PathBuf::from);
    let loader = Loader::new(gpu.clone(), Nvrtc::open(cache.as_deref())?);
    let mut cases: Vec<(VectorProduct, Form, Arc<Program>)> = Vec::new();
    for text in &arguments {
        let sizes: Vec<i64> = text.split(',').map(|n| n.parse().expect("a number")).collect();
        for spec in products(&sizes)? {
            for form in forms(&spec, sms) {
                let scheduled = spec.in_form(Arch::Sm90a, &form)?;
                let program = Arc::new(lower(&scheduled.kernel, &scheduled.schedule)?);
                cases.push((spec.clone(), form, program));
            }
        }
    }
    let programs: Vec<Program> = cases.iter().map(|c| (*c.2).clone()).collect();
    let loaded = loader.load_all(&programs);
    if only_compile {
        return Ok(());
    }
    let stream = gpu.stream()?;
    let pool = stream.alloc((ROUND_BYTES as usize) * 6)?;
    let mut block = vec![0u8; 1 << 20];
    // Numbers around 0.01 of changing sign.
    for (i, b) in block.iter_mut().enumerate() {
        *b = if i % 2 == 1 { 0x3c | ((i >> 3) as u8 & 0x80) } else { (i / 2 * 37) as u8 };
    }
    for at in (0..pool.len()).step_by(block.len()) {
        pool.write_at(&stream, at, &block)?;
    }
    let small = stream.alloc(128 << 20)?;
    small.zero(&stream)?;
    let mut last = String::new();
    for ((spec, form, program), kernel) in cases.iter().zip(loaded) {
        let kernel = match kernel {
            Ok(kernel) => kernel,
            Err(error) => {
                println!("{:<8} {form:?}: {error}", spec.name);
                continue;
            }
        };
        let env = Env::from([(Arc::from(AT), 512)]);
        let planes = program.params.iter().filter(|(_, p)| matches!(&*p.name, "W" | "U"));
        let weight_bytes = (spec.lines * spec.depth * 2) as u64;
        let bytes = weight_bytes * planes.count() as u64;
        let copies = (ROUND_BYTES / bytes).clamp(2, 64);
        let mut bound: Vec<BoundKernel> = Vec::new();
        let mut at = pool.address();
        for copy in 0..copies {
            let mut scratch = small.address() + (copy % 2) * (64 << 20);
            let mut operands = Vec::new();
            for (_, p) in program.params.iter() {
                if matches!(&*p.name, "W" | "U") {
                    operands.push(Operand { address: at, bytes: weight_bytes });
                    at += weight_bytes;
                } else {
                    operands.push(Operand { address: scratch, bytes: 5 << 20 });
                    scratch += 5 << 20;
                }
            }
            if program.symbols.iter().any(|s| &*s.name == AT) {
                operands.push(Operand { address: scratch, bytes: 4 });
            }
            bound.push(kernel.bind(&env, &operands)?);
        }
        let graph = stream.capture(|stream| {
            for kernel in &bound {
                // SAFETY: the memory lives until the end of the program, and this stream alone uses it.
                unsafe { kernel.launch(stream)? };
            }
            Ok(())
        })?;
        let graph = graph.instantiate()?;
        let mut times = Vec::new();
        for run in 0..9 {
            let time = stream.time_us(|stream| {
                // SAFETY: as above.
                unsafe { graph.launch(stream) }
            })?;
            if run >= 2 {
                times.push(time / copies as f64);
            }
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        if last != spec.name {
            println!("{} {} x {} ({} MB)", spec.name, spec.lines, spec.depth, bytes / 1_000_000);
            last.clone_from(&spec.name);
        }
        println!(
            "  {:>7.2} us {:>5.0} GB/s  threads {} each {} runs {} blocks {} ahead {} regs {:?}",
            median,
            bytes as f64 / median * 1e-3,
            form.threads,
            form.each,
            form.runs,
            form.blocks,
            form.ahead,
            kernel.compiled().resources(&kernel.source().entry).map(|r| r.registers),
        );
    }
    Ok(())
}
