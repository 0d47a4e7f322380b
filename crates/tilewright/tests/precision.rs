//! `bf16` and 8-bit products of whole graphs, compiled, against the interpreter of the same plan: its
//! tile programs say where operands are rounded. Once with this machine's matrix units, once without
//! any (the same rounding, multiplied in `f32`).

use std::path::Path;
use tilewright::{Compiled, Compiler, Precision, host_cpu};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{FuncBuilder, Op as E};
use tilewright_graph::{AttentionAttrs, ConvAttrs, Graph, GraphBuilder, Op, TensorType};
use tilewright_interp::Mode;
use tilewright_layout::{Dim, Env, Range};

/// Numbers that look random and repeat, in -1..1.
fn tensor(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
        })
        .collect();
    Tensor::from_f64s(DType::F32, shape, &values).unwrap()
}

fn bytes(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let values: Vec<i64> =
        tensor(shape, seed).to_f64s().iter().map(|v| (v * 128.0) as i64).collect();
    Tensor::from_i64s(dtype, shape, &values).unwrap()
}

fn ty(dtype: DType, shape: &[usize]) -> TensorType {
    TensorType::new(dtype, shape.iter().map(|&d| Dim::from(d)).collect::<Vec<_>>())
}

fn compilers() -> Vec<Compiler> {
    let Ok(cpu) = host_cpu(2, None) else { return vec![] };
    let mut plain = cpu.clone();
    plain.features.retain(|f| !f.starts_with("amx") && f != "avx512bf16" && f != "avx512vnni");
    let mut narrow = plain.clone();
    narrow.vector_bits = 256;
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    [cpu, plain, narrow]
        .into_iter()
        .map(|cpu| {
            let mut compiler = Compiler::for_cpu(cpu, Some(cache.clone()));
            compiler.precision = Precision::Bf16;
            compiler
        })
        .collect()
}

/// `tolerance` is absolute and relative.
fn check(graph: &Graph, inputs: &[Tensor], tolerance: f64) -> Option<Compiled> {
    let mut first = None;
    for compiler in compilers() {
        let compiled = compiler.compile_observed(graph.clone(), &mut |_| {}).unwrap();
        let run = || compiled.session().unwrap().run(inputs).unwrap();
        let (got, again) = (run(), run());
        let want = tilewright_interp::plan::run(compiled.plan(), inputs, &Env::new(), Mode::Exact)
            .unwrap();
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.bytes(), again[i].bytes(), "{}: not the same twice", graph.name);
            for at in 0..want.len() {
                let (g, w) = (got.get_f64(at), want.get_f64(at));
                let near = (g - w).abs() <= tolerance * (1.0 + w.abs());
                let bits = compiler.cpu.vector_bits;
                assert!(near, "{} ({bits} bits) output {i}[{at}]: {g}, not {w}", graph.name);
            }
        }
        first.get_or_insert(compiled);
    }
    first
}

/// Text of all products in the plan's tile programs.
fn tile_text(compiled: &Compiled) -> String {
    compiled.plan().kernels.iter().map(|(_, k)| format!("{}\n{}\n", k.kernel, k.schedule)).collect()
}

#[test]
fn matrix_products() {
    for (spec, a, b, constant) in [
        ("mk,kn->mn", vec![37, 41], vec![41, 50], true),
        ("mk,kn->mn", vec![1, 300], vec![300, 70], true),
        ("mk,nk->mn", vec![19, 64], vec![96, 64], true),
        ("bmk,bkn->bmn", vec![3, 9, 17], vec![3, 17, 33], false),
        ("bmk,bnk->bmn", vec![2, 40, 32], vec![2, 21, 32], false),
        ("bmk,kho->bmho", vec![2, 5, 24], vec![24, 3, 32], true),
        ("bmho,hok->bmk", vec![2, 5, 3, 8], vec![3, 8, 40], true),
    ] {
        let mut g = GraphBuilder::new(format!("{spec} {a:?} {b:?}"));
        let x = g.input("x", ty(DType::F32, &a));
        let mut inputs = vec![tensor(&a, 1)];
        let w = if constant {
            g.constant("w", tensor(&b, 2))
        } else {
            inputs.push(tensor(&b, 2));
            g.input("w", ty(DType::F32, &b))
        };
        let y = g.contract(spec, x, w).unwrap();
        let y = g.unary(E::Abs, y).unwrap();
        g.output("y", y);
        let Some(compiled) = check(&g.finish(), &inputs, 2e-5) else { return };
        let text = tile_text(&compiled);
        assert!(text.contains("bf16(a") && text.contains("mma"), "{text}");
    }
}

/// A sum over nothing is no product: operands stay as they are.
#[test]
fn outer_products_stay_exact() {
    let mut g = GraphBuilder::new("outer");
    let x = g.input("x", ty(DType::F32, &[7, 1]));
    let w = g.constant("w", tensor(&[1, 40], 3));
    let y = g.contract("mk,kn->mn", x, w).unwrap();
    g.output("y", y);
    let Some(compiled) = check(&g.finish(), &[tensor(&[7, 1], 4)], 1e-7) else { return };
    assert!(!tile_text(&compiled).contains("bf16"), "{}", tile_text(&compiled));
}

#[test]
fn convolutions() {
    for (x, w, stride, pad, groups) in [
        (vec![2, 20, 5, 6], vec![24, 20, 1, 1], 1, 0, 1),
        (vec![1, 16, 7, 6], vec![9, 16, 1, 1], 2, 0, 1),
        (vec![2, 3, 11, 12], vec![20, 3, 3, 3], 2, 1, 1),
        (vec![1, 24, 9, 10], vec![40, 24, 3, 3], 1, 1, 1),
        (vec![1, 17, 30], vec![5, 17, 4], 3, 2, 1),
        (vec![1, 9, 4, 5, 6], vec![5, 9, 2, 2, 2], 1, 1, 1),
        (vec![2, 30, 6, 6], vec![34, 15, 3, 3], 1, 1, 2),
    ] {
        let spatial = x.len() - 2;
        let mut g = GraphBuilder::new(format!("conv {x:?} {w:?}"));
        let data = g.input("x", ty(DType::F32, &x));
        let weights = g.constant("w", tensor(&w, 2));
        let attrs = ConvAttrs {
            strides: vec![stride; spatial],
            pads_lo: vec![pad; spatial],
            pads_hi: vec![pad; spatial],
            dilations: vec![1; spatial],
            groups,
        };
        let y = g.op(Op::Conv(attrs), &[data, weights]).unwrap();
        g.output("y", y);
        let Some(compiled) = check(&g.finish(), &[tensor(&x, 1)], 2e-5) else { return };
        assert!(tile_text(&compiled).contains("bf16"), "{}", tile_text(&compiled));
    }
}

/// The weights of a row are rounded after `exp`, whose last bits differ between the two: one step of
/// `bf16` on a weight is the tolerance.
#[test]
fn attention_over_symbolic_lengths() {
    let mut g = GraphBuilder::new("attention");
    let s = g.symbol("S", Range { min: 1, max: 512 });
    let shape = vec![Dim::new(2), Dim::new(3), s, Dim::new(17)];
    let x = g.input("x", TensorType::new(DType::F32, shape));
    let mut f = FuncBuilder::new();
    let (dot, scale) = (f.param("dot", DType::F32), f.constant(0.25, DType::F32));
    let scaled = f.op(E::Mul, &[dot, scale]);
    let attrs = AttentionAttrs { score: f.finish(scaled), causal: true, zeros: false };
    let y = g.op(Op::Attention(attrs), &[x, x, x]).unwrap();
    g.output("y", y);
    let graph = g.finish();
    for rows in [1, 5, 64, 131] {
        let input = tensor(&[2, 3, rows, 17], rows as u64);
        let Some(compiled) = check(&graph, &[input], 1.0 / 256.0) else { return };
        assert_eq!(tile_text(&compiled).matches("bf16(").count(), 4, "{}", tile_text(&compiled));
    }
}

#[test]
fn byte_products_are_exact() {
    for left in [DType::U8, DType::I8] {
        for (m, n, k) in [(1, 5, 3), (33, 70, 101), (64, 96, 128)] {
            let mut g = GraphBuilder::new(format!("{left} {m} {n} {k}"));
            let x = g.input("x", ty(left, &[2, m, k]));
            let w = g.constant("w", bytes(DType::I8, &[k, n], 2));
            let op = Op::Contract {
                lhs: "bmk".into(),
                rhs: "kn".into(),
                out: "bmn".into(),
                acc: DType::I32,
                dtype: DType::I32,
            };
            let y = g.op(op, &[x, w]).unwrap();
            g.output("y", y);
            check(&g.finish(), &[bytes(left, &[2, m, k], 1)], 0.0);
        }
    }
}
