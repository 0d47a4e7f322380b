//! The kernels of a decoding step after scheduling: the rules, the checker, and values in the device interpreter against
//! plain loops in float64.

use std::sync::Arc;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_device::Arch;
use tilewright_expr::Func;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check_with, run};
use tilewright_kernels::decode::{
    AT, AttentionParts, Draw, DrawPlace, Ending, Form, Norm, Rows, Scheduled, VectorProduct,
    advance, embed, head_norms, pick, pieces,
};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;

/// Small numbers that are exact in bf16, different for every seed and place.
fn numbers(seed: u64, count: usize) -> Vec<f64> {
    let mix = |i: u64| {
        let x = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ (seed << 17));
        (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 58
    };
    (0..count as u64).map(|i| mix(i) as f64 / 32.0 - 1.0).collect()
}

fn bytes(dtype: DType, values: &[f64]) -> Vec<u8> {
    Tensor::from_f64s(dtype, &[values.len()], values).unwrap().bytes().to_vec()
}

fn ints(values: &[i64]) -> Vec<u8> {
    Tensor::from_i64s(DType::I32, &[values.len()], values).unwrap().bytes().to_vec()
}

fn back(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let count = bytes.len() / dtype.size();
    let bytes = tilewright_data::Bytes::copy_from(bytes);
    Tensor::new(dtype, vec![count], bytes).unwrap().to_f64s()
}

/// Lowers, checks and runs a kernel at a position.
fn on_device(scheduled: &Scheduled, at: i64, buffers: &mut [Vec<u8>]) {
    let Scheduled { kernel, schedule } = scheduled;
    let name = &kernel.name;
    tilewright_tile::verify(kernel).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let program = lower(kernel, schedule).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    tilewright_device::verify(&program).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let mut env = Env::new();
    if program.symbols.iter().any(|s| &*s.name == AT) {
        env.insert(Arc::from(AT), at);
    }
    // Weights may be read before the kernel's turn.
    let weights = program.params.iter().filter(|(_, p)| matches!(&*p.name, "W" | "U"));
    let constants: Vec<_> = weights.map(|(id, _)| id).collect();
    check_with(&program, &[env.clone()], &[1], &constants)
        .unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let options = Options { mode: Mode::Exact, constants, ..Options::default() };
    run(&program, &env, buffers, &options).unwrap_or_else(|e| panic!("{name}: {e:?}"));
}

fn close(name: &str, got: &[f64], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{name}");
    for (i, (g, w)) in got.iter().zip(wanted).enumerate() {
        assert!((g - w).abs() <= tolerance * (1.0 + w.abs()), "{name} at {i}: {g}, not {w}");
    }
}

/// `x W^T` with an RMS norm in front.
fn product(x: &[f64], gain: Option<(&[f64], f64)>, w: &[f64], depth: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(depth) {
        let rms = gain.map_or(1.0, |(_, eps)| {
            (x.iter().map(|v| v * v).sum::<f64>() / depth as f64 + eps).sqrt()
        });
        for line in w.chunks(depth) {
            let sum = (0..depth).map(|k| x[k] * gain.map_or(1.0, |(g, _)| g[k]) * line[k]);
            out.push(sum.sum::<f64>() / rms);
        }
    }
    out
}

#[test]
fn products_of_few_rows_are_those_of_float64() {
    let (eps, dtype) = (1e-5, DType::BF16);
    let in_form = |spec: &VectorProduct, fetched| {
        spec.in_form(Arch::Sm90a, &Form { fetched, ..spec.form(132) }).unwrap()
    };
    let cases =
        [(1, 136, 40, 0), (3, 264, 24, 0), (8, 33, 17, 0), (1, 1096, 24, 3), (2, 520, 9, 2)];
    for (batch, depth, lines, fetched) in cases {
        let rows = Rows { batch, new: 1, positions: 8 };
        let (m, k, n) = (batch as usize, depth as usize, lines as usize);
        let (x, w) = (numbers(1, m * k), numbers(2, n * k));
        let (gain, bias, r) = (numbers(3, k), numbers(4, n), numbers(5, m * n));
        let spec = VectorProduct {
            name: "plain".into(),
            rows,
            lines,
            depth,
            weight: dtype,
            norm: None,
            bias: true,
            ending: Ending::Plain { residual: true },
        };
        let mut buffers = vec![
            bytes(DType::F32, &x),
            bytes(dtype, &w),
            bytes(dtype, &bias),
            bytes(DType::F32, &r),
            vec![0xFF; m * n * 4],
        ];
        on_device(&in_form(&spec, fetched), 0, &mut buffers);
        let mut wanted = product(&x, None, &w, k);
        wanted.iter_mut().enumerate().for_each(|(i, v)| *v += r[i] + bias[i % n]);
        close("plain", &back(DType::F32, &buffers[4]), &wanted, 1e-5);

        let u = numbers(6, n * k);
        let act = Func::parse("{ x -> silu(x) }", &[DType::F32]).unwrap();
        let gated = VectorProduct {
            name: "gated".into(),
            norm: Some(Norm { dtype, eps, centred: false }),
            bias: false,
            ending: Ending::Gated(act),
            ..spec
        };
        let mut buffers = vec![
            bytes(DType::F32, &x),
            bytes(dtype, &gain),
            bytes(dtype, &w),
            bytes(dtype, &u),
            vec![0xFF; m * n * 4],
        ];
        on_device(&in_form(&gated, fetched), 0, &mut buffers);
        let gates = product(&x, Some((&gain, eps)), &w, k);
        let ups = product(&x, Some((&gain, eps)), &u, k);
        let wanted: Vec<f64> =
            gates.iter().zip(&ups).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        close("gated", &back(DType::F32, &buffers[4]), &wanted, 2e-5);
    }
}

#[test]
fn a_layer_norm_in_front_is_that_of_float64_beside_a_large_mean() {
    let (eps, dtype) = (1e-5, DType::F32);
    for (batch, depth, lines) in [(1, 136, 40), (3, 513, 9), (2, 768, 12)] {
        let rows = Rows { batch, new: 1, positions: 8 };
        let (m, k, n) = (batch as usize, depth as usize, lines as usize);
        let x: Vec<f64> = numbers(1, m * k).iter().map(|v| v + 1000.0).collect();
        let (w, gain) = (numbers(2, n * k), numbers(3, k));
        let (shift, bias) = (numbers(4, k), numbers(5, n));
        let spec = VectorProduct {
            name: "activated".into(),
            rows,
            lines,
            depth,
            weight: dtype,
            norm: Some(Norm { dtype, eps, centred: true }),
            bias: true,
            ending: Ending::Activated(Func::parse("{ x -> tanh(x) }", &[DType::F32]).unwrap()),
        };
        let mut buffers = [&x, &gain, &shift, &w, &bias].map(|v| bytes(dtype, v)).to_vec();
        buffers.push(vec![0xFF; m * n * 4]);
        on_device(&spec.scheduled(Arch::Sm90a, 132).unwrap(), 0, &mut buffers);
        let mut wanted = Vec::new();
        for x in x.chunks(k) {
            let mean = x.iter().sum::<f64>() / k as f64;
            let square = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / k as f64;
            let y: Vec<f64> = (0..k)
                .map(|i| (x[i] - mean) / (square + eps).sqrt() * gain[i] + shift[i])
                .collect();
            for (line, b) in w.chunks(k).zip(&bias) {
                let sum: f64 = line.iter().zip(&y).map(|(w, y)| w * y).sum();
                wanted.push((sum + b).tanh());
            }
        }
        // The mean has 24 digits, and what is left of x beside it 14.
        close("activated", &back(DType::F32, &buffers[5]), &wanted, 3e-3);
    }
}

#[test]
fn norms_over_heads_come_before_their_turn() {
    let (heads, kv_heads, positions, at) = (4, 2, 6, 3);
    for (batch, new, width) in [(1, 1, 8), (2, 1, 6), (1, 3, 34)] {
        let rows = Rows { batch, new, positions };
        let (m, w, half) = (rows.count() as usize, width as usize, width as usize / 2);
        let dtype = DType::BF16;
        let all = (heads + 2 * kv_heads) as usize;
        let (x, gains) = (numbers(1, m * all * w), numbers(2, 2 * w));
        let angle = |p: usize, i: usize| p as f64 * 0.5f64.powi(i as i32);
        let places = positions as usize * half;
        let mut cos: Vec<f64> = (0..places).map(|i| angle(i / half, i % half).cos()).collect();
        let mut sin: Vec<f64> = (0..places).map(|i| angle(i / half, i % half).sin()).collect();
        cos.extend(vec![1.0; places]);
        sin.extend(vec![0.0; places]);
        let cache = (batch * kv_heads * positions) as usize * w;
        let mut buffers = vec![
            bytes(DType::F32, &x),
            bytes(dtype, &gains),
            bytes(DType::F32, &cos),
            bytes(DType::F32, &sin),
            vec![0xFF; m * heads as usize * w * 4],
            bytes(dtype, &vec![7.0; cache]),
            bytes(dtype, &vec![9.0; cache]),
        ];
        let sizes = (heads, kv_heads, width);
        let kernel = head_norms(rows, sizes, (dtype, 1e-6), dtype, Arch::Sm90a).unwrap();
        on_device(&kernel, at, &mut buffers);
        let mut queries = Vec::new();
        let mut caches = [vec![7.0; cache], vec![9.0; cache]];
        for (row, y) in x.chunks(all * w).enumerate() {
            let (sequence, position) = (row as i64 / new, at + row as i64 % new);
            for (h, x) in y.chunks(w).enumerate() {
                let (h, kind) = (h as i64, [heads, heads + kv_heads]);
                let kind = kind.iter().filter(|&&from| h >= from).count();
                let root = (x.iter().map(|v| v * v).sum::<f64>() / w as f64 + 1e-6).sqrt();
                let y: Vec<f64> = match kind {
                    2 => x.to_vec(),
                    _ => (0..w).map(|i| x[i] / root * gains[kind * w + i]).collect(),
                };
                let turn = |i: usize| {
                    let a = angle(position as usize, i % half);
                    let (c, s) = (a.cos(), a.sin());
                    if i < half { y[i] * c - y[i + half] * s } else { y[i] * c + y[i - half] * s }
                };
                if kind == 0 {
                    queries.extend((0..w).map(turn));
                    continue;
                }
                let g = h - heads - if kind == 2 { kv_heads } else { 0 };
                let start = ((sequence * kv_heads + g) * positions + position) as usize * w;
                for i in 0..w {
                    caches[kind - 1][start + i] = if kind == 2 { y[i] } else { turn(i) };
                }
            }
        }
        close("queries", &back(DType::F32, &buffers[4]), &queries, 2e-5);
        close("keys", &back(dtype, &buffers[5]), &caches[0], 5e-3);
        close("values", &back(dtype, &buffers[6]), &caches[1], 5e-3);
    }
}

#[test]
fn queries_and_keys_turn_and_the_cache_is_written_at_the_position_in_memory() {
    let (heads, kv_heads, width, depth, positions) = (4, 2, 8, 40, 6);
    let dtype = DType::BF16;
    for (batch, new, at) in [(1, 1, 0), (2, 1, 5), (1, 3, 2), (2, 2, 4)] {
        let rows = Rows { batch, new, positions };
        let m = rows.count() as usize;
        let lines = (heads + 2 * kv_heads) * width;
        let (n, k) = (lines as usize, depth as usize);
        let (x, w) = (numbers(1, m * k), numbers(2, n * k));
        let (gain, bias) = (numbers(3, k), numbers(4, n));
        let half = (width / 2) as usize;
        let angle = |p: usize, i: usize| p as f64 * 0.5f64.powi(i as i32);
        let places = positions as usize * half;
        let mut cos: Vec<f64> = (0..places).map(|i| angle(i / half, i % half).cos()).collect();
        let mut sin: Vec<f64> = (0..places).map(|i| angle(i / half, i % half).sin()).collect();
        cos.extend(vec![1.0; places]);
        sin.extend(vec![0.0; places]);
        let spec = VectorProduct {
            name: "qkv".into(),
            rows,
            lines,
            depth,
            weight: dtype,
            norm: Some(Norm { dtype: DType::F32, eps: 1e-6, centred: false }),
            bias: true,
            ending: Ending::Rotary { heads, kv_heads, width },
        };
        let cache = (batch * kv_heads * positions * width) as usize;
        let mut buffers = vec![
            bytes(DType::F32, &x),
            bytes(DType::F32, &gain),
            bytes(dtype, &w),
            bytes(dtype, &bias),
            bytes(DType::F32, &cos),
            bytes(DType::F32, &sin),
            vec![0xFF; m * (heads * width) as usize * 4],
            bytes(dtype, &vec![7.0; cache]),
            bytes(dtype, &vec![9.0; cache]),
        ];
        on_device(&spec.scheduled(Arch::Sm90a, 132).unwrap(), at, &mut buffers);
        let mut plain = product(&x, Some((&gain, 1e-6)), &w, k);
        plain.iter_mut().enumerate().for_each(|(i, v)| *v += bias[i % n]);
        let (w_, half) = (width as usize, half);
        let mut queries = Vec::new();
        let mut caches = [vec![7.0; cache], vec![9.0; cache]];
        for (row, y) in plain.chunks(n).enumerate() {
            let (sequence, position) = (row as i64 / new, at + row as i64 % new);
            for (head, y) in y.chunks(w_).enumerate() {
                let turn = |i: usize| {
                    let a = angle(position as usize, i % half);
                    let (c, s) = (a.cos(), a.sin());
                    if i < half { y[i] * c - y[i + half] * s } else { y[i] * c + y[i - half] * s }
                };
                let h = head as i64;
                if h < heads {
                    queries.extend((0..w_).map(turn));
                    continue;
                }
                let values = h >= heads + kv_heads;
                let g = h - heads - if values { kv_heads } else { 0 };
                let start = ((sequence * kv_heads + g) * positions + position) as usize * w_;
                for i in 0..w_ {
                    let y = if values { y[i] } else { turn(i) };
                    caches[usize::from(values)][start + i] = y;
                }
            }
        }
        close("queries", &back(DType::F32, &buffers[6]), &queries, 2e-5);
        close("keys", &back(dtype, &buffers[7]), &caches[0], 5e-3);
        close("values", &back(dtype, &buffers[8]), &caches[1], 5e-3);
    }
}

#[test]
fn attention_in_parts_is_attention_over_what_is_valid() {
    let (heads, kv_heads) = (4, 2);
    for (batch, new, at, width, part, positions, window) in [
        (1, 1, 0, 8, 16, 40, None),
        (2, 1, 36, 16, 16, 40, None),
        (1, 4, 13, 12, 8, 80, None),
        (1, 1, 299, 8, 32, 300, None),
        (1, 1, 3, 8, 16, 40, Some(9)),
        (2, 1, 36, 8, 16, 40, Some(5)),
        (1, 4, 63, 6, 8, 80, Some(33)),
        (1, 1, 299, 8, 32, 300, Some(1)),
    ] {
        let rows = Rows { batch, new, positions };
        let m = rows.count() as usize;
        let dtype = DType::BF16;
        let spec =
            AttentionParts { rows, heads, kv_heads, width, cache: dtype, scale: 0.3, part, window };
        let (w, t) = (width as usize, positions as usize);
        let q = numbers(1, m * heads as usize * w);
        let count = batch as usize * kv_heads as usize * t * w;
        let (mut keys, mut values) = (numbers(2, count), numbers(3, count));
        // What no position has written is no number.
        let valid = (at + new) as usize;
        for cache in [&mut keys, &mut values] {
            for (i, v) in cache.iter_mut().enumerate() {
                if i / w % t >= valid {
                    *v = f64::NAN;
                }
            }
        }
        let parts = spec.parts() as usize * m * heads as usize;
        let mut buffers = vec![
            bytes(DType::F32, &q),
            bytes(dtype, &keys),
            bytes(dtype, &values),
            vec![0xFF; parts * w * 4],
            vec![0xFF; parts * 4],
            vec![0xFF; parts * 4],
        ];
        on_device(&spec.partial(Arch::Sm90a).unwrap(), at, &mut buffers);
        let mut second = buffers[3..].to_vec();
        second.push(vec![0xFF; m * heads as usize * w * 4]);
        on_device(&spec.combine(Arch::Sm90a).unwrap(), at, &mut second);
        let mut wanted = Vec::new();
        for row in 0..m {
            let (sequence, last) = (row / new as usize, at as usize + row % new as usize);
            for h in 0..heads as usize {
                let g = h / (heads / kv_heads) as usize;
                let line = |c: &[f64], p: usize| {
                    let start = ((sequence * kv_heads as usize + g) * t + p) * w;
                    c[start..start + w].to_vec()
                };
                let q = &q[(row * heads as usize + h) * w..][..w];
                let dot = |k: Vec<f64>| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
                let first = window.map_or(0, |w| (last + 1).saturating_sub(w as usize));
                let weight = |p| match p < first {
                    true => 0.0,
                    false => (0.3f64 * dot(line(&keys, p))).exp(),
                };
                let weights: Vec<f64> = (0..=last).map(weight).collect();
                let all: f64 = weights.iter().sum();
                for i in 0..w {
                    let mixed: f64 = weights
                        .iter()
                        .enumerate()
                        .map(|(p, weight)| weight * line(&values, p)[i])
                        .sum();
                    wanted.push(mixed / all);
                }
            }
        }
        close("attention", &back(DType::F32, &second[3]), &wanted, 2e-5);
    }
}

#[test]
fn tokens_go_in_and_out() {
    let (rows, vocabulary, hidden) = (Rows { batch: 2, new: 1, positions: 4 }, 2500, 40);
    let table = numbers(1, vocabulary * hidden);
    let mut buffers =
        vec![ints(&[2499, 3]), bytes(DType::BF16, &table), vec![0xFF; 2 * hidden * 4]];
    let kernel = embed(
        &Rows { batch: 2, new: 1, positions: 4 },
        [vocabulary as i64, hidden as i64],
        None,
        DType::BF16,
        Arch::Sm90a,
    )
    .unwrap();
    on_device(&kernel, 0, &mut buffers);
    let wanted = [&table[2499 * hidden..], &table[3 * hidden..4 * hidden]].concat();
    close("embed", &back(DType::F32, &buffers[2]), &wanted, 0.0);

    let mut logits = numbers(2, 2 * vocabulary);
    (logits[2047], logits[vocabulary + 2499]) = (3.0, 2.5);
    let count = vocabulary.div_ceil(1024);
    let mut first =
        vec![bytes(DType::F32, &logits), vec![0xFF; 2 * count * 4], vec![0xFF; 2 * count * 4]];
    on_device(&pieces(2, vocabulary as i64, Arch::Sm90a).unwrap(), 0, &mut first);
    let mut second = first[1..].to_vec();
    second.extend([ints(&[0, 0]), ints(&[-1; 10])]);
    on_device(&pick(&rows, vocabulary as i64, Arch::Sm90a).unwrap(), 2, &mut second);
    assert_eq!(second[2], ints(&[2047, 2499]));
    assert_eq!(second[3], ints(&[-1, -1, -1, -1, -1, -1, 2047, 2499, -1, -1]));

    let mut at = vec![ints(&[41])];
    on_device(&advance(3, Arch::Sm90a).unwrap(), 0, &mut at);
    assert_eq!(at[0], ints(&[44]));
}

#[test]
fn drawn_tokens_are_those_of_the_running_sum() {
    let (rows, vocabulary) = (Rows { batch: 2, new: 1, positions: 3 }, 5000);
    let logits: Vec<f64> = numbers(9, 2 * vocabulary).iter().map(|v| 4.0 * v).collect();
    // Ties are all kept, so each logit is made different.
    let logits: Vec<f64> =
        logits.iter().enumerate().map(|(i, v)| v + (i * 7 % 5003) as f64 * 1e-5).collect();
    let logits = back(DType::F32, &bytes(DType::F32, &logits));
    for (top_k, top_p, u) in [
        (None, None, [0.0, 0.999_9]),
        (Some(5), None, [0.3, 0.9]),
        (None, Some(0.4), [0.5, 0.1]),
        (Some(60), Some(0.7), [0.25, 0.8]),
        (Some(1), None, [0.99, 0.01]),
    ] {
        let sharp = 1.25;
        let knobs = [sharp, top_k.unwrap_or(0) as f64, top_p.unwrap_or(1.0), 0.0];
        let random = [9.0, 9.0, 9.0, 9.0, u[0], u[1], 9.0, 9.0];
        let draw = Draw {
            rows,
            vocabulary: vocabulary as i64,
            top_k: top_k.is_some(),
            top_p: top_p.is_some(),
        };
        let mut memory = vec![
            bytes(DType::F32, &logits),
            bytes(DType::F32, &knobs),
            bytes(DType::F32, &random),
            ints(&[0, 0]),
            ints(&[-1; 8]),
        ];
        for (_, extents) in draw.memory() {
            memory.push(vec![0xFF; 4 * extents.iter().product::<i64>() as usize]);
        }
        let place = |p: &DrawPlace| match p {
            DrawPlace::Logits => 0,
            DrawPlace::Knobs => 1,
            DrawPlace::Random => 2,
            DrawPlace::Tokens => 3,
            DrawPlace::History => 4,
            DrawPlace::Own(i) => 5 + i,
        };
        for step in draw.steps() {
            let scheduled = (step.make)(&draw, Arch::Sm90a).unwrap();
            let mut buffers: Vec<Vec<u8>> =
                step.operands.iter().map(|p| memory[place(p)].clone()).collect();
            on_device(&scheduled, 1, &mut buffers);
            for (p, bytes) in step.operands.iter().zip(buffers) {
                memory[place(p)] = bytes;
            }
        }
        let mut wanted = Vec::new();
        for (logits, u) in logits.chunks(vocabulary).zip(u) {
            let weight = |v: f64| (v * sharp).exp();
            let mut order: Vec<usize> = (0..vocabulary).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            order.truncate(top_k.unwrap_or(vocabulary));
            let all: f64 = order.iter().map(|&i| weight(logits[i])).sum();
            let mut sum = 0.0;
            let keep = order.iter().take_while(|&&i| {
                let more = sum < top_p.unwrap_or(2.0) * all;
                sum += weight(logits[i]);
                more
            });
            let mut kept: Vec<usize> = keep.copied().collect();
            kept.sort_unstable();
            let all: f64 = kept.iter().map(|&i| weight(logits[i])).sum();
            let mut sum = 0.0;
            let token = kept.iter().find(|&&i| {
                sum += weight(logits[i]);
                sum > u * all
            });
            wanted.push(*token.unwrap() as i64);
        }
        assert_eq!(memory[3], ints(&wanted), "{top_k:?} {top_p:?}: {wanted:?}");
    }
}
