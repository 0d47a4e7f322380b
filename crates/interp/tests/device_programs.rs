//! Device programs on the CPU: values against plain sums, and the checker on right programs.

mod common;

use half_bits::{from_bf16, to_bf16};
use std::sync::Arc;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, orders, run};
use tilewright_layout::Env;

/// bf16 by hand, so that the test depends on nothing it tests.
mod half_bits {
    pub(crate) fn to_bf16(value: f64) -> [u8; 2] {
        let bits = (value as f32).to_bits();
        let rounded = bits + 0x7FFF + ((bits >> 16) & 1);
        ((rounded >> 16) as u16).to_le_bytes()
    }

    pub(crate) fn from_bf16(bytes: &[u8]) -> f64 {
        let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16;
        f64::from(f32::from_bits(bits))
    }
}

fn sizes(m: i64, n: i64, k: i64) -> Env {
    [("M", m), ("N", n), ("K", k)].map(|(s, v)| (Arc::from(s), v)).into()
}

#[test]
fn a_hopper_matrix_product_gives_plain_sums() {
    // Partial tiles on every side.
    let (m, n, k) = (300usize, 44usize, 200usize);
    let numbers = |n: usize, f: f64| -> Vec<u8> {
        (0..n).flat_map(|i| to_bf16(((i as f64 + 1.0) * f).sin())).collect()
    };
    let (a, b) = (numbers(m * k, 0.7), numbers(k * n, 1.3));
    let at = |x: &[u8], i: usize| from_bf16(&x[2 * i..]);
    for (stages, order) in [2, 3].into_iter().zip([orders()[0], orders()[17]]) {
        let program = common::gemm(stages);
        let mut buffers = vec![a.clone(), b.clone(), vec![0xFF; m * n * 2]];
        let options = Options { mode: Mode::F64, clusters: 2, order, constants: vec![] };
        let env = sizes(m as i64, n as i64, k as i64);
        run(&program, &env, &mut buffers, &options).unwrap_or_else(|e| panic!("{e:?}"));
        for i in 0..m {
            for j in 0..n {
                // B's columns are contiguous.
                let sum: f64 = (0..k).map(|x| at(&a, i * k + x) * at(&b, j * k + x)).sum();
                let got = &buffers[2][2 * (i * n + j)..][..2];
                assert_eq!(got, to_bf16(sum), "at {i},{j}: {sum}");
            }
        }
    }
}

#[test]
fn a_hopper_matrix_product_is_ordered() {
    for stages in [2, 3] {
        let sizes = [sizes(512, 48, 192), sizes(300, 40, 64), sizes(512, 32, 320)];
        let report = check(&common::gemm(stages), &sizes, &[1, 2, 3]);
        let report = report.unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(report.runs, 3 * 3 * orders().len() as u64);
    }
}
