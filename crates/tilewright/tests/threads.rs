//! Results do not depend on the number of threads: the same bytes for one, two, three and four, each compiled for its
//! number, for convolutions, products, rows, full sums and tiny language and image models.

use std::collections::BTreeMap;
use std::path::Path;
use tilewright::{Compiler, Cpu};
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{ConvAttrs, Graph, GraphBuilder, Op, ReduceKind, TensorType, ValueId};
use tilewright_import::hf::{LoadOptions, load_model, safetensors};
use tilewright_interp::graph::order_inputs;
use tilewright_layout::Dim;
use tilewright_testkit::data;

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&d| Dim::from(d)).collect()
}

fn numbers(shape: &[usize], seed: u64) -> Tensor {
    data::tensor(DType::F32, shape, 1.0, &mut data::Rng::new(seed))
}

/// Runs the graph on each number of threads and compares bytes.
fn check(graph: &Graph, inputs: &[Tensor]) {
    let mut first: Option<Vec<Tensor>> = None;
    for threads in 1..=4 {
        let Ok(cpu) = Cpu::detect(threads) else { return };
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
        let compiler = Compiler::for_cpu(cpu, Some(cache));
        let compiled = compiler.compile_observed(graph.clone(), &mut |_| {}).unwrap();
        let got = compiled.session().unwrap().run(inputs).unwrap();
        assert!(got.iter().all(|t| !t.to_f64s().iter().all(|v| *v == 0.0)), "{}", graph.name);
        let Some(first) = &first else {
            first = Some(got);
            continue;
        };
        for (i, (one, more)) in first.iter().zip(&got).enumerate() {
            let differ =
                (0..one.len()).find(|&at| one.get_f64(at).to_bits() != more.get_f64(at).to_bits());
            let Some(at) = differ else { continue };
            let (a, b) = (one.get_f64(at), more.get_f64(at));
            panic!("{} output {i}[{at}]: {a} on one thread, {b} on {threads}", graph.name);
        }
    }
}

/// Convolutions with a bias, each with weights of its own; groups and whether `x * sigmoid(x)` follows.
fn layers() -> impl FnMut(&mut GraphBuilder, ValueId, [usize; 4], i64, bool) -> Result<ValueId> {
    let mut seed = 0;
    move |b, x, w, groups, act| {
        seed += 1;
        let scale = 1.5 / ((w[1] * w[2] * w[3]) as f64).sqrt();
        let weights = data::tensor(DType::F32, &w, scale, &mut data::Rng::new(seed));
        let weights = b.constant(format!("w{seed}"), weights);
        let pad = vec![w[2] as i64 / 2; 2];
        let y = b.op(
            Op::Conv(ConvAttrs {
                strides: vec![1; 2],
                pads_lo: pad.clone(),
                pads_hi: pad,
                dilations: vec![1; 2],
                groups,
            }),
            &[x, weights],
        )?;
        let bias = b.constant(format!("b{seed}"), numbers(&[1, w[0], 1, 1], seed + 50));
        let y = b.binary(ExprOp::Add, y, bias)?;
        if act { b.map_text("{ x -> x * sigmoid(x) }", &[y]) } else { Ok(y) }
    }
}

/// As in EfficientNet: an expansion, a depthwise convolution, squeeze and excitation, a projection to few channels with its
/// residual, then a 3x3 convolution and a classifier.
fn convolutions() -> Result<Graph> {
    let mut b = GraphBuilder::new("convolutions");
    let mut x = b.input("x", TensorType::new(DType::F32, dims(&[1, 16, 30, 30])));
    let mut layer = layers();
    for _ in 0..2 {
        let wide = layer(&mut b, x, [48, 16, 1, 1], 1, true)?;
        let wide = layer(&mut b, wide, [48, 1, 3, 3], 48, true)?;
        let mean = b.reduce(ReduceKind::Sum, wide, &[2, 3], true)?;
        let mean = b.map_text("{ x -> x * 0.00111111111 }", &[mean])?;
        let gate = layer(&mut b, mean, [8, 48, 1, 1], 1, true)?;
        let gate = layer(&mut b, gate, [48, 8, 1, 1], 1, false)?;
        let gate = b.map_text("{ x -> sigmoid(x) }", &[gate])?;
        let gated = b.binary(ExprOp::Mul, wide, gate)?;
        let narrow = layer(&mut b, gated, [16, 48, 1, 1], 1, false)?;
        x = b.binary(ExprOp::Add, x, narrow)?;
    }
    let y = layer(&mut b, x, [40, 16, 3, 3], 1, true)?;
    let y = layer(&mut b, y, [80, 40, 1, 1], 1, true)?;
    let pooled = b.reduce(ReduceKind::Sum, y, &[2, 3], false)?;
    let w = b.constant("w", numbers(&[80, 70], 99));
    let logits = b.contract("nk,ko->no", pooled, w)?;
    b.output("logits", logits);
    Ok(b.finish())
}

/// Several images through convolutions of all kinds, a 3x3 one with more transformed data than caches hold among them.
fn images(count: usize) -> Result<Graph> {
    let mut b = GraphBuilder::new("images");
    let x = b.input("x", TensorType::new(DType::F32, dims(&[count, 16, 56, 56])));
    let mut layer = layers();
    let x = layer(&mut b, x, [16, 16, 1, 1], 1, true)?;
    let wide = layer(&mut b, x, [64, 16, 1, 1], 1, true)?;
    let inner = layer(&mut b, wide, [64, 64, 3, 3], 1, true)?;
    let added = b.binary(ExprOp::Add, wide, inner)?;
    let deep = layer(&mut b, added, [64, 1, 5, 5], 64, true)?;
    let deep = layer(&mut b, deep, [40, 64, 1, 1], 1, false)?;
    let sum = b.reduce(ReduceKind::Sum, deep, &[2, 3], false)?;
    b.output("deep", deep);
    b.output("sum", sum);
    Ok(b.finish())
}

/// Products deep enough for several steps, with what follows them, rows, and a sum of everything.
fn products() -> Result<Graph> {
    let mut b = GraphBuilder::new("products");
    let x = b.input("x", TensorType::new(DType::F32, dims(&[150, 1100])));
    let (w, v) =
        (b.constant("w", numbers(&[1100, 330], 1)), b.constant("v", numbers(&[330, 77], 2)));
    let y = b.contract("ik,kj->ij", x, w)?;
    let y = b.map_text("{ x -> 0.5 * x * (1 + erf(x * 0.02)) }", &[y])?;
    let y = b.op(Op::Softmax { axis: 1, log: false }, &[y])?;
    let y = b.contract("ik,kj->ij", y, v)?;
    let scores = b.contract("ik,jk->ij", y, y)?;
    let sum = b.map_text("{ x -> exp(x * 0.1) }", &[scores])?;
    let sum = b.reduce(ReduceKind::Sum, sum, &[0, 1], false)?;
    let columns = b.reduce(ReduceKind::Sum, x, &[0], false)?;
    b.output("y", y);
    b.output("sum", sum);
    b.output("columns", columns);
    Ok(b.finish())
}

/// Steps that go image by image give what they give one after the other, and take less memory: with images left over after
/// each thread had as many, with as many images as threads and with fewer.
#[test]
fn images_one_after_the_other_are_images_at_once() {
    for count in [2, 3, 5] {
        let graph = images(count).unwrap();
        let inputs = [numbers(&[count, 16, 56, 56], 8)];
        check(&graph, &inputs);
        for threads in [1, 2, 4] {
            let Ok(cpu) = Cpu::detect(threads) else { return };
            let cpu = Cpu { l2_bytes: 1 << 20, l3_bytes: 32 << 20, ..cpu };
            let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
            let compiled = Compiler::for_cpu(cpu, Some(cache));
            let compiled = compiled.compile_observed(graph.clone(), &mut |_| {}).unwrap();
            let runs = &compiled.plan().image_runs;
            assert!(!runs.is_empty(), "{count} images on {threads} threads");
            assert!(runs.iter().all(|r| r.images == count as i64 && !r.inner.is_empty()));
            let mut session = compiled.session().unwrap();
            let together = session.run_observed(&inputs, &mut |_, _, _| {}).unwrap();
            let memory = session.memory(&inputs).unwrap();
            // Twice: the second run finds the arena full of the first one's values.
            session.run(&inputs).unwrap();
            for (a, b) in together.iter().zip(&session.run(&inputs).unwrap()) {
                assert!(a.bytes() == b.bytes(), "{count} images on {threads} threads");
            }
            let mut times = Vec::new();
            session.run_timed(&inputs, &mut times).unwrap();
            let steps: Vec<usize> = times.iter().map(|t| t.step).collect();
            assert_eq!(steps, (0..compiled.plan().steps.len()).collect::<Vec<_>>());
            if count == 5 && threads < 4 {
                // Less than both transformed tensors of all images.
                let transformed = 5 * 2 * 16 * 28 * 28 * 64 * 4;
                assert!(memory.arena_bytes < transformed, "{memory:?}");
            }
        }
    }
}

#[test]
fn convolutions_are_the_same_on_any_number_of_threads() {
    check(&convolutions().unwrap(), &[numbers(&[1, 16, 30, 30], 7)]);
}

#[test]
fn products_and_rows_are_the_same_on_any_number_of_threads() {
    check(&products().unwrap(), &[numbers(&[150, 1100], 8)]);
}

#[test]
fn models_are_the_same_on_any_number_of_threads() {
    for name in ["bert", "gpt2_model", "mistral", "vit"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(name);
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        let expected = safetensors::read(&directory.join("expected.safetensors")).unwrap().tensors;
        let named: BTreeMap<String, Tensor> = expected
            .iter()
            .filter_map(|(n, t)| Some((n.strip_prefix("in.")?.to_string(), t.clone())))
            .collect();
        check(&graph, &order_inputs(&graph, &named).expect("the inputs"));
    }
}

/// Products and convolutions count subnormal numbers as zero, other kernels keep them; the thread that calls does as before.
#[test]
fn subnormal_numbers() {
    let mut b = GraphBuilder::new("subnormal");
    let x = b.input("x", TensorType::new(DType::F32, dims(&[40, 60])));
    let image = b.input("image", TensorType::new(DType::F32, dims(&[1, 16, 8, 8])));
    let large = Tensor::from_f64s(DType::F32, &[60, 50], &[1e20; 3000]).unwrap();
    let w = b.constant("w", large);
    let product = b.contract("ik,kj->ij", x, w).unwrap();
    let taps =
        b.constant("taps", Tensor::from_f64s(DType::F32, &[16, 1, 3, 3], &[1e20; 144]).unwrap());
    let depthwise = ConvAttrs {
        strides: vec![1; 2],
        pads_lo: vec![1; 2],
        pads_hi: vec![1; 2],
        dilations: vec![1; 2],
        groups: 16,
    };
    let convolved = b.op(Op::Conv(depthwise), &[image, taps]).unwrap();
    let map = b.map_text("{ x -> x * 1e20 }", &[x]).unwrap();
    b.output("product", product);
    b.output("convolved", convolved);
    b.output("map", map);
    let graph = b.finish();
    let tiny = |shape: &[usize]| {
        let count = shape.iter().product();
        Tensor::from_f64s(DType::F32, shape, &vec![1e-40; count]).unwrap()
    };
    let inputs = [tiny(&[40, 60]), tiny(&[1, 16, 8, 8])];
    for threads in [1, 2] {
        let Ok(cpu) = Cpu::detect(threads) else { return };
        let compiled =
            Compiler::for_cpu(cpu, None).compile_observed(graph.clone(), &mut |_| {}).unwrap();
        let got = compiled.session().unwrap().run(&inputs).unwrap();
        for summed in &got[..2] {
            assert!(summed.to_f64s().iter().all(|v| *v == 0.0), "{threads} threads");
        }
        assert!(got[2].to_f64s().iter().all(|v| (v - 1e-20).abs() < 1e-24), "{threads} threads");
        let half = std::hint::black_box(f32::MIN_POSITIVE) * std::hint::black_box(0.5);
        assert!(half > 0.0, "the calling thread is left in a kernel's mode");
    }
}
