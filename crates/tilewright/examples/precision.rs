//! Matrix products in `f32` and in `bf16`, in turns in one process:
//! `cargo run --release -p tilewright --example precision -- THREADS`.

use std::time::Instant;
use tilewright::{Compiler, Precision, host_cpu};
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_graph::{Graph, GraphBuilder, TensorType};
use tilewright_layout::Dim;

fn tensor(rows: usize, cols: usize) -> Result<Tensor> {
    let values: Vec<f64> =
        (0..rows * cols).map(|i| (i * 2654435761 % 1000) as f64 / 500.0 - 1.0).collect();
    Tensor::from_f64s(DType::F32, &[rows, cols], &values)
}

fn product(m: usize, n: usize, k: usize) -> Result<Graph> {
    let mut b = GraphBuilder::new("product");
    let x = b.input("x", TensorType::new(DType::F32, vec![Dim::from(m), Dim::from(k)]));
    let w = b.constant("w", tensor(k, n)?);
    let y = b.contract("mk,kn->mn", x, w)?;
    b.output("y", y);
    Ok(b.finish())
}

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(1);
    for (m, n, k) in [(128, 768, 768), (128, 3072, 768), (1024, 1024, 1024)] {
        let mut sessions = Vec::new();
        for precision in [Precision::F32, Precision::Bf16] {
            let mut compiler = Compiler::for_cpu(host_cpu(threads, None)?, None);
            compiler.precision = precision;
            let compiled = compiler.compile_observed(product(m, n, k)?, &mut |_| {})?;
            sessions.push(compiled.session()?);
        }
        let inputs = [tensor(m, k)?];
        let mut times: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
        let rounds = (20_000_000_000 / (2 * m * n * k)).clamp(20, 200);
        for round in 0..rounds + 3 {
            for (session, times) in sessions.iter_mut().zip(&mut times) {
                let start = Instant::now();
                session.run(&inputs)?;
                if round >= 3 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        let median = |t: &mut Vec<f64>| {
            t.sort_by(f64::total_cmp);
            (t[t.len() / 2], t[0], t[t.len() * 9 / 10])
        };
        let [f32s, bf16s] = times.each_mut().map(median);
        let rate = |t: f64| (2 * m * n * k) as f64 / t * 1e-9;
        println!(
            "{m}x{n}x{k}, {threads} threads: f32 {:.0} us ({:.0} GFLOP/s, fastest {:.0}, 90% {:.0}), bf16 {:.0} us ({:.0} GFLOP/s, fastest {:.0}, 90% {:.0}): {:.2} times",
            f32s.0 * 1e6,
            rate(f32s.0),
            f32s.1 * 1e6,
            f32s.2 * 1e6,
            bf16s.0 * 1e6,
            rate(bf16s.0),
            bf16s.1 * 1e6,
            bf16s.2 * 1e6,
            f32s.0 / bf16s.0,
        );
    }
    Ok(())
}
