//! How exact three-part TF32 is, in the device interpreter: it rounds operands and cuts sums as tensor cores do.

use std::sync::Arc;
use tilewright_base::DType;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, run};
use tilewright_kernels::gemm::{GemmSpec, Math, Order};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};

/// About normal numbers: sums of 12 uniform ones.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Rounded to TF32, ties away from zero.
fn tf32(x: f32) -> f32 {
    f32::from_bits(x.to_bits().wrapping_add(0x1000) & !0x1FFF)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Relative to the exact product, in the Euclidean norm.
fn error(got: &[f32], exact: &[f64]) -> f64 {
    let off: f64 = got.iter().zip(exact).map(|(g, e)| (f64::from(*g) - e).powi(2)).sum();
    (off / exact.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

#[test]
fn three_part_tf32_is_within_twice_the_error_of_a_chain_of_multiply_adds() {
    let (m, n) = (64, 32);
    for k in [8, 24, 64, 200] {
        let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
        let dot = |i: usize, j: usize| (0..k).map(move |x| (i * k + x, j * k + x));
        let each = || (0..m).flat_map(|i| (0..n).map(move |j| (i, j)));
        let exact: Vec<f64> = each()
            .map(|(i, j)| dot(i, j).map(|(x, y)| f64::from(a[x]) * f64::from(b[y])).sum())
            .collect();
        let chain: Vec<f32> = each()
            .map(|(i, j)| dot(i, j).fold(0.0, |sum, (x, y)| a[x].mul_add(b[y], sum)))
            .collect();

        let mut spec = GemmSpec::plain(DType::F32, DType::F32, DType::F32);
        (spec.b, spec.math) = (Order::Col, Math::Tf32x3);
        let mut s = GpuSchedule::hopper(&[("BM", 64), ("BN", 32), ("BK", 32)]);
        (s.consumers, s.stages) = (1, 3);
        let program = lower(&spec.program("gemm"), &s).unwrap();
        let parts = |x: &[f32]| {
            let high: Vec<f32> = x.iter().map(|v| tf32(*v)).collect();
            let low: Vec<f32> = x.iter().zip(&high).map(|(v, h)| tf32(v - h)).collect();
            (bytes(&high), bytes(&low))
        };
        let ((a_high, a_low), (b_high, b_low)) = (parts(&a), parts(&b));
        let mut buffers = vec![a_high, b_high, a_low, b_low, vec![0; m * n * 4]];
        let sizes = [("M", m), ("N", n), ("K", k), ("lda", k), ("ldb", k), ("ldc", n)];
        let env: Env = sizes.into_iter().map(|(name, v)| (Arc::from(name), v as i64)).collect();
        let options = Options { mode: Mode::Exact, ..Options::default() };
        run(&program, &env, &mut buffers, &options).unwrap();
        let got: Vec<f32> =
            buffers[4].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
        let (ours, theirs) = (error(&got, &exact), error(&chain, &exact));
        println!("k = {k}: {ours:.2e}, a chain {theirs:.2e}");
        assert!(ours <= 2.0 * theirs, "k = {k}: {ours:.2e}, a chain {theirs:.2e}");
    }
}
