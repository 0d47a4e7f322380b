//! Kernels written as text, run by the interpreter, against plain loops in `f64`.

use std::sync::Arc;
use tilewright_interp::{Mode, tile};
use tilewright_layout::Env;
use tilewright_tile::{Kernel, Schedule, verify, verify_schedule};

/// Numbers between -1 and 1 that repeat for nobody.
fn numbers(n: usize, seed: f64) -> Vec<f32> {
    (0..n).map(|i| ((i as f64 + 1.0) * seed).sin() as f32).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Runs the kernel of a text with a schedule and sizes; gives its last parameter, of `n` elements.
fn run(
    text: &str,
    schedule: &str,
    sizes: &[(&str, usize)],
    inputs: &[&[f32]],
    n: usize,
) -> Vec<f32> {
    let show = |e: tilewright_base::Error| -> ! { panic!("{e:?}") };
    let kernel = Kernel::parse("<test>", text).unwrap_or_else(|e| show(e));
    verify(&kernel).unwrap_or_else(|e| show(e));
    let schedule = Schedule::parse("<test>", schedule).unwrap_or_else(|e| show(e));
    verify_schedule(&kernel, &schedule).unwrap_or_else(|e| show(e));
    let sizes: Env = sizes.iter().map(|(s, v)| (Arc::from(*s), *v as i64)).collect();
    let mut buffers: Vec<Vec<u8>> = inputs.iter().map(|x| bytes(x)).collect();
    // What is not written shows.
    buffers.push(bytes(&vec![f32::NAN; n]));
    tile::run(&kernel, &schedule, &sizes, &mut buffers, Mode::F64).unwrap_or_else(|e| show(e));
    let mut again = buffers.clone();
    let printed = Kernel::parse("<printed>", &kernel.to_string()).unwrap_or_else(|e| show(e));
    tile::run(&printed, &schedule, &sizes, &mut again, Mode::F64).unwrap_or_else(|e| show(e));
    assert_eq!(again, buffers, "the printed kernel computes something else");
    let out = buffers.pop().unwrap_or_default();
    out.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

/// Equal to the last bits of `f64` sums in another order, after rounding to `f32`.
fn close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(g) - w).abs();
        assert!(off <= 1e-7 * (w.abs() + 1e-3), "element {i}: {g} instead of {w}");
    }
}

#[test]
fn a_matrix_product_with_epilogue() {
    let (m, n, k) = (5, 7, 6);
    let (a, b, bias) = (numbers(m * k, 1.1), numbers(k * n, 0.7), numbers(n, 0.3));
    let mut want = Vec::new();
    for i in 0..m {
        for j in 0..n {
            let sum: f64 = (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[x * n + j])).sum();
            let x = sum + f64::from(bias[j]);
            want.push(x.tanh());
        }
    }
    let text = include_str!("../../tile/tests/kernels/gemm.tile");
    for schedule in ["BM=2 BN=4 BK=4", "BM=5 BN=7 BK=6", "BM=8 BN=8 BK=1"] {
        let sizes = [("M", m), ("N", n), ("K", k)];
        close(&run(text, schedule, &sizes, &[&a, &b, &bias], m * n), &want);
    }
}

#[test]
fn a_softmax_of_rows() {
    let (rows, cols) = (5, 11);
    let x: Vec<f32> = numbers(rows * cols, 1.3).iter().map(|v| v * 20.0).collect();
    let mut want = Vec::new();
    for row in x.chunks(cols) {
        let max = row.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
        let exps: Vec<f64> = row.iter().map(|&v| (f64::from(v) - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        want.extend(exps.iter().map(|e| e / sum));
    }
    let text = include_str!("../../tile/tests/kernels/softmax.tile");
    for schedule in ["BR=2 BC=4", "BR=5 BC=16", "BR=3 BC=1"] {
        close(&run(text, schedule, &[("R", rows), ("C", cols)], &[&x], x.len()), &want);
    }
}

#[test]
fn causal_attention() {
    let (heads, len, d) = (2, 9, 8);
    let size = heads * len * d;
    let (q, k, v) = (numbers(size, 1.1), numbers(size, 0.7), numbers(size, 0.37));
    let at = |x: &[f32], h: usize, i: usize, c: usize| f64::from(x[(h * len + i) * d + c]);
    let mut want = Vec::new();
    for h in 0..heads {
        for i in 0..len {
            let scores: Vec<f64> = (0..=i)
                .map(|j| (0..d).map(|c| at(&q, h, i, c) * at(&k, h, j, c)).sum::<f64>() * 0.5)
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            want.extend((0..d).map(|c| {
                let parts = scores.iter().enumerate();
                parts.map(|(j, s)| (s - max).exp() / sum * at(&v, h, j, c)).sum::<f64>()
            }));
        }
    }
    let text = include_str!("../../tile/tests/kernels/attention.tile");
    for schedule in ["BQ=4 BK=4", "BQ=2 BK=5", "BQ=16 BK=16"] {
        close(&run(text, schedule, &[("H", heads), ("S", len)], &[&q, &k, &v], size), &want);
    }
}

#[test]
fn a_convolution_with_weights_in_panels() {
    let (n, c, h, w, o) = (2usize, 3usize, 6usize, 7usize, 6usize);
    let (x, f) = (numbers(n * c * h * w, 1.1), numbers(o * c * 9, 0.7));
    // Four output channels lie together, at each channel, row and column of the filter.
    let mut packed = vec![0.0; o.div_ceil(4) * 4 * c * 9];
    for i in 0..o {
        for rest in 0..c * 9 {
            packed[i / 4 * 36 * c + rest * 4 + i % 4] = f[i * c * 9 + rest];
        }
    }
    let (oh, ow) = (h.div_ceil(2), w.div_ceil(2));
    let mut want = Vec::new();
    for (b, i) in (0..n).flat_map(|b| (0..o).map(move |i| (b, i))) {
        for (y, xo) in (0..oh).flat_map(|y| (0..ow).map(move |x| (y, x))) {
            let mut sum = 0.0;
            for (ch, tap) in (0..c).flat_map(|ch| (0..9).map(move |tap| (ch, tap))) {
                let (iy, ix) = (2 * y + tap / 3, 2 * xo + tap % 3);
                if (1..=h).contains(&iy) && (1..=w).contains(&ix) {
                    let at = ((b * c + ch) * h + iy - 1) * w + ix - 1;
                    sum += f64::from(x[at]) * f64::from(f[(i * c + ch) * 9 + tap]);
                }
            }
            want.push(sum);
        }
    }
    let text = include_str!("../../tile/tests/kernels/conv.tile");
    let sizes = [("N", n), ("C", c), ("H", h), ("W", w), ("O", o)];
    for schedule in ["BO=4 BX=2 BC=2", "BO=1 BX=4 BC=3", "BO=8 BX=3 BC=1"] {
        close(&run(text, schedule, &sizes, &[&x, &packed], want.len()), &want);
    }
}
