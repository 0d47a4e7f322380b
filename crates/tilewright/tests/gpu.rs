//! Models planned for a GPU, run without one: the device programs of the tiny Hugging Face models in the
//! device interpreter, within the numerics contract against the float64 oracle.

mod nets;

use nets::{conv, numbers};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilewright::Precision;
use tilewright::gpu::{GpuCompiler, GpuPlan};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{Func, Op as ExprOp};
use tilewright_graph::{
    Graph, GraphBuilder, Op, ReduceKind, TensorType, ValueId, WindowAttrs, WindowKind,
};
use tilewright_import::hf::{LoadOptions, load_model, safetensors};
use tilewright_interp::Mode;
use tilewright_interp::graph::order_inputs;
use tilewright_layout::{Dim, Env, Range};
use tilewright_plan::{Form, Step, Storage};
use tilewright_runtime_gpu::{BoundStep, Once};
use tilewright_target::Gpu;

/// Directories of models, in order.
fn directories() -> Vec<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf");
    let entries = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = entries.filter(|d| d.join("config.json").is_file()).collect();
    all.sort();
    all
}

fn inputs_of(directory: &Path, graph: &Graph) -> Vec<Tensor> {
    let expected = safetensors::read(&directory.join("expected.safetensors")).unwrap().tensors;
    let named: BTreeMap<String, Tensor> = expected
        .iter()
        .filter_map(|(n, t)| Some((n.strip_prefix("in.")?.to_string(), t.clone())))
        .collect();
    order_inputs(graph, &named).expect("the inputs")
}

const PRECISIONS: [Precision; 4] =
    [Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16];

fn plan(graph: &Graph, precision: Precision) -> GpuPlan {
    plan_with(graph, precision, true)
}

fn plan_with(graph: &Graph, precision: Precision, windows: bool) -> GpuPlan {
    let mut compiler = GpuCompiler::new(Gpu::h200());
    compiler.precision = precision;
    compiler.windows = windows;
    compiler.plan(graph.clone()).unwrap_or_else(|e| panic!("{} {precision}: {e}", graph.name))
}

/// Runs the device programs of a plan, holds the outputs against the oracle, and counts the host's steps.
fn holds(name: &str, graph: &Graph, planned: &GpuPlan, inputs: &[Tensor], host_steps: usize) {
    let run = match planned.interpret(inputs) {
        Ok(run) => run,
        Err(e) => panic!("{name}: {e} {:?}", e.notes()),
    };
    let host = run.bound.host_steps(planned.plan());
    assert_eq!(host.len(), host_steps, "{name}: {host:?}");
    let report = planned.verify_outputs(graph, inputs, &run.outputs).expect("it verifies");
    for d in &report.outputs {
        assert!(d.ratio <= 1.0, "{name}: {d:?}");
    }
}

#[test]
fn tiny_models_in_the_device_interpreter_are_within_the_contract() {
    for directory in directories() {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        let inputs = inputs_of(&directory, &graph);
        for precision in PRECISIONS {
            let planned = plan(&graph, precision);
            let name = format!("{name} {precision}");
            holds(&name, &graph, &planned, &inputs, 0);
        }
    }
}

/// The same graph with its matrices stored in 16 bits, and cast where they are read.
fn stored_in(graph: &Graph, narrow: DType) -> Graph {
    let mut out = graph.clone();
    let mut order = Vec::new();
    let mut cast: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (v, value) in graph.values.iter() {
        let Some(tensor) = graph.as_const(v) else { continue };
        if tensor.dtype() != DType::F32 || tensor.shape().len() < 2 {
            continue;
        }
        let stored = out.add_const("stored", tensor.rounded(narrow).unwrap());
        let op = Op::Map(Func::cast(narrow, DType::F32));
        let node = out.add_node(op, vec![stored], vec![value.ty.clone()], "cast");
        order.push(node);
        cast.insert(v, out.nodes[node].outputs[0]);
    }
    for &id in &graph.order {
        for v in &mut out.nodes[id].inputs {
            *v = cast.get(v).copied().unwrap_or(*v);
        }
        order.push(id);
    }
    out.order = order;
    tilewright_graph::verify(&out).expect("the graph is right");
    out
}

/// Steps that depend on constants alone.
fn once(planned: &GpuPlan) -> Vec<usize> {
    Once::of(planned.plan(), &mut |_| true).steps().collect()
}

/// The passes leave nothing to compute that depends on weights alone, but for copies of those that plain multiply-adds read
/// turned.
#[test]
fn no_plan_of_the_tiny_models_has_kernels_of_weights_alone() {
    let check = |name: &str, planned: &GpuPlan, precision: Precision| {
        for step in once(planned) {
            let Step::Launch { note, .. } = &planned.plan().steps[step] else { panic!("{name}") };
            assert_eq!((precision, note.label.as_str()), (Precision::F32, "copy"), "{name}");
        }
    };
    for directory in directories() {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        for precision in PRECISIONS {
            check(&format!("{name} {precision}"), &plan(&graph, precision), precision);
        }
        for (narrow, precision) in [
            (DType::BF16, Precision::Bf16),
            (DType::BF16, Precision::F16),
            (DType::F16, Precision::F32),
        ] {
            let graph = stored_in(&graph, narrow);
            let planned = plan(&graph, precision);
            let name = format!("{name} in {narrow}, {precision}");
            check(&name, &planned, precision);
            if name.starts_with("llama") && precision != Precision::F16 {
                holds(&name, &graph, &planned, &inputs_of(&directory, &graph), 0);
            }
        }
    }
}

/// Weights stored in 16 bits, too large to be folded, are constants of the plan as they are stored, without a cast in a run.
#[test]
fn weights_of_16_bits_go_to_the_device_as_they_are_stored() {
    let (k, n) = (512usize, 640usize);
    let mut b = GraphBuilder::new("stored");
    let rows = b.symbol("M", Range { min: 1, max: 8 });
    let x = b.input("x", TensorType::new(DType::F32, vec![rows, Dim::from(k)]));
    let values: Vec<f64> = (0..k * n).map(|i| (i * 37 % 255) as f64 / 256.0 - 0.5).collect();
    let stored = Tensor::from_f64s(DType::BF16, &[n, k], &values).unwrap();
    let weights = b.constant("weights", stored.clone());
    let wide = b.cast(weights, DType::F32).unwrap();
    let y = b.contract("mk,nk->mn", x, wide).unwrap();
    b.output("y", y);
    let graph = b.finish();
    let values: Vec<f64> = (0..2 * k).map(|i| (i * 29 % 64) as f64 / 64.0 - 0.5).collect();
    let input = Tensor::from_f64s(DType::F32, &[2, k], &values).unwrap();
    for precision in PRECISIONS {
        let planned = plan(&graph, precision);
        let of_stored = planned.plan().buffers.iter().filter(|(_, buffer)| match &buffer.storage {
            Storage::Const(t) => {
                t.narrow().is_some_and(|t| t.bytes().as_ptr() == stored.bytes().as_ptr())
            }
            _ => false,
        });
        assert!(of_stored.count() > 0, "{precision}");
        let in_runs = planned.plan().steps.len() - once(&planned).len();
        // The product, and a rounding of what it multiplies.
        assert!(in_runs <= 2, "{precision}: {in_runs} steps");
        holds(&format!("stored {precision}"), &graph, &planned, std::slice::from_ref(&input), 0);
    }
}

/// A loss over classes of an odd number: its logits are read as they lie, whatever shape they have there, and their gradient is
/// copied into aligned rows once for the two products that read it.
#[test]
fn odd_rows_are_copied_once_for_all_products_and_logits_are_read_in_place() {
    let (rows, classes, depth) = (1024usize, 257usize, 8usize);
    let ty = |shape: &[usize]| {
        TensorType::new(DType::BF16, shape.iter().map(|&d| Dim::from(d)).collect::<Vec<_>>())
    };
    let mut b = GraphBuilder::new("odd");
    let gradient = b.input("gradient", ty(&[2, rows / 2, classes]));
    let x = b.input("x", ty(&[rows, depth]));
    let w = b.input("w", ty(&[classes, depth]));
    let flat = b.reshape(gradient, &[Dim::from(rows), Dim::from(classes)]).unwrap();
    let turned = b.permute(flat, &[1, 0]).unwrap();
    let of_weights = b.contract("mk,kn->mn", turned, x).unwrap();
    let of_rows = b.contract("mk,kn->mn", flat, w).unwrap();
    b.output("of_weights", of_weights);
    b.output("of_rows", of_rows);
    let graph = b.finish();
    let given = |shape: &[usize], seed: u64| numbers(shape, seed).rounded(DType::BF16).unwrap();
    let planned = plan(&graph, Precision::F32);
    let labels = |planned: &GpuPlan| -> Vec<String> {
        let label = |step: &Step| match step {
            Step::Launch { note, .. } => note.label.clone(),
            _ => "other".to_string(),
        };
        planned.plan().steps.iter().map(label).collect()
    };
    assert_eq!(labels(&planned), ["copy", "contract", "contract"]);
    let products = planned.plan().kernels.iter().flat_map(|(_, k)| &k.forms);
    let read = products.filter_map(|f| match f {
        Form::Product(p) => Some([&p.a, &p.b].map(|m| (m.row.clone(), m.col.clone()))),
        _ => None,
    });
    let line = Dim::from(320usize);
    assert_eq!(read.flatten().filter(|(row, col)| *row == line || *col == line).count(), 2);
    let inputs =
        [given(&[2, rows / 2, classes], 1), given(&[rows, depth], 2), given(&[classes, depth], 3)];
    holds("odd", &graph, &planned, &inputs, 0);

    let mut b = GraphBuilder::new("loss");
    let logits = b.input("logits", ty(&[2, 6, 33]));
    let wide = b.cast(logits, DType::F32).unwrap();
    let flat = b.reshape(wide, &[Dim::from(12usize), Dim::from(33usize)]).unwrap();
    let most = b.reduce(ReduceKind::Max, flat, &[1], true).unwrap();
    let power = b.map_text("{ x, m -> exp(x - m) }", &[flat, most]).unwrap();
    let sum = b.reduce(ReduceKind::Sum, power, &[1], true).unwrap();
    b.output("sum", sum);
    let graph = b.finish();
    let planned = plan(&graph, Precision::F32);
    assert_eq!(labels(&planned).len(), 1, "{:?}", labels(&planned));
    holds("loss", &graph, &planned, &[given(&[2, 6, 33], 4)], 0);
}

/// A matrix of bytes with a scale for each column is too large to be folded: it is computed when the plan is loaded, in
/// memory that the run only reads.
#[test]
fn what_depends_on_weights_alone_is_computed_at_loading() {
    let (k, n) = (512usize, 640usize);
    let mut b = GraphBuilder::new("bytes");
    let rows = b.symbol("M", Range { min: 1, max: 8 });
    let x = b.input("x", TensorType::new(DType::F32, vec![rows, Dim::from(k)]));
    let codes: Vec<i64> = (0..k * n).map(|i| (i * 37 % 255) as i64 - 127).collect();
    let codes = b.constant("codes", Tensor::from_i64s(DType::I8, &[k, n], &codes).unwrap());
    let scales: Vec<f64> = (0..n).map(|i| (1 + i % 7) as f64 / 256.0).collect();
    let scales = b.constant("scales", Tensor::from_f64s(DType::F32, &[n], &scales).unwrap());
    let wide = b.cast(codes, DType::F32).unwrap();
    let weights = b.binary(ExprOp::Mul, wide, scales).unwrap();
    let y = b.contract("mk,kn->mn", x, weights).unwrap();
    b.output("y", y);
    let graph = b.finish();
    let values: Vec<f64> = (0..2 * k).map(|i| (i * 29 % 64) as f64 / 64.0 - 0.5).collect();
    let input = Tensor::from_f64s(DType::F32, &[2, k], &values).unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let planned = plan(&graph, precision);
        assert!(!once(&planned).is_empty(), "{precision}");
        let run = planned.interpret(std::slice::from_ref(&input)).unwrap();
        let before = run.bound.steps.iter().filter(|s| matches!(s, BoundStep::Once)).count();
        assert_eq!(before, once(&planned).len());
        assert!(run.bound.arena_bytes < k * n, "{} bytes", run.bound.arena_bytes);
        holds(&format!("bytes {precision}"), &graph, &planned, std::slice::from_ref(&input), 0);
    }
}

/// The tile programs of such a plan, which say what its forms compute, give the same.
#[test]
fn tile_programs_beside_the_forms_are_within_the_contract() {
    for model in ["bert", "llama", "vit"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(model);
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        let inputs = inputs_of(&directory, &graph);
        for precision in [Precision::F32, Precision::Bf16] {
            let planned = plan(&graph, precision);
            let outputs =
                tilewright_interp::plan::run(planned.plan(), &inputs, &Env::new(), Mode::Exact)
                    .unwrap_or_else(|e| panic!("{model} {precision}: {e}"));
            let report = planned.verify_outputs(&graph, &inputs, &outputs).expect("it verifies");
            for d in &report.outputs {
                assert!(d.ratio <= 1.0, "{model} {precision}: {d:?}");
            }
        }
    }
}

/// Convolutions with padding and strides, in groups, depthwise and pointwise; pooling; a classifier.
#[test]
fn a_small_convolutional_network_is_within_the_contract() {
    let mut b = GraphBuilder::new("cnn");
    let n = b.symbol("N", Range { min: 1, max: 8 });
    let dims = |d: &[i64]| d.iter().map(|&d| Dim::new(d)).collect::<Vec<_>>();
    let mut shape = vec![n];
    shape.extend(dims(&[3, 13, 11]));
    let mut x = b.input("x", TensorType::new(DType::F32, shape));
    for (i, (weights, op)) in [
        ([8, 3, 3, 3], conv(2, 1, 1)),
        ([8, 1, 3, 3], conv(1, 1, 8)),
        ([12, 4, 2, 2], conv(1, 0, 2)),
        ([16, 12, 1, 1], conv(1, 0, 1)),
    ]
    .into_iter()
    .enumerate()
    {
        let w = b.constant(format!("w{i}"), numbers(&weights, i as u64));
        let y = b.op(op, &[x, w]).unwrap();
        x = b.unary(ExprOp::Tanh, y).unwrap();
    }
    let pool = WindowAttrs {
        kind: WindowKind::Max,
        kernel: vec![3; 2],
        strides: vec![2; 2],
        pads_lo: vec![1; 2],
        pads_hi: vec![1; 2],
        dilations: vec![1; 2],
    };
    let x = b.op(Op::Window(pool), &[x]).unwrap();
    let sum = Op::Reduce { kind: tilewright_graph::ReduceKind::Sum, axes: vec![2, 3], keep: false };
    let x = b.op(sum, &[x]).unwrap();
    let w = b.constant("classes", numbers(&[16, 5], 9));
    let y = b.contract("nc,ck->nk", x, w).unwrap();
    b.output("y", y);
    let graph = b.finish();
    for precision in PRECISIONS {
        let planned = plan(&graph, precision);
        let products = planned
            .plan()
            .kernels
            .iter()
            .filter(|(_, k)| k.forms.iter().any(|f| matches!(f, Form::Product(_))));
        assert_eq!(products.count(), 4, "{precision}: all but the depthwise one are products");
        holds(&format!("cnn {precision}"), &graph, &planned, &[numbers(&[2, 3, 13, 11], 5)], 0);
    }
}

/// Groups of four channels: joined to parts of 64 where windows are copied (in `f32`, and with long steps), and to one where
/// tensor cores read them.
#[test]
fn convolutions_in_many_groups_are_within_the_contract() {
    let mut b = GraphBuilder::new("groups");
    let n = b.symbol("N", Range { min: 1, max: 8 });
    let mut shape = vec![n];
    shape.extend([128, 4, 5].map(Dim::new));
    let mut x = b.input("x", TensorType::new(DType::F32, shape));
    for (i, op) in [conv(1, 1, 32), conv(9, 1, 32)].into_iter().enumerate() {
        let w = b.constant(format!("w{i}"), numbers(&[128, 4, 3, 3], i as u64));
        let y = b.op(op, &[x, w]).unwrap();
        x = b.unary(ExprOp::Tanh, y).unwrap();
    }
    let sum = Op::Reduce { kind: tilewright_graph::ReduceKind::Sum, axes: vec![2, 3], keep: false };
    let y = b.op(sum, &[x]).unwrap();
    b.output("y", y);
    let graph = b.finish();
    for precision in PRECISIONS {
        let planned = plan(&graph, precision);
        let products = planned.plan().kernels.iter().flat_map(|(_, k)| &k.forms);
        let repeats: Vec<usize> = products
            .filter_map(|f| match f {
                Form::Product(p) => Some(p.repeat.iter().filter(|r| r.extent.is(2)).count()),
                _ => None,
            })
            .collect();
        let parts = if precision == Precision::F32 { 2 } else { 1 };
        assert_eq!(repeats.iter().sum::<usize>(), parts, "{precision}: {repeats:?}");
        holds(&format!("groups {precision}"), &graph, &planned, &[numbers(&[1, 128, 4, 5], 5)], 0);
    }
}

/// One plan serves every batch and every length.
#[test]
fn one_plan_serves_several_batches_and_lengths() {
    for model in ["bert", "llama", "gpt2", "vit"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(model);
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        let planned = plan(&graph, Precision::Bf16);
        for (seed, (batch, length)) in [(1, 1), (3, 5), (2, 11)].into_iter().enumerate() {
            let lead = |name: &str| {
                let first = |v: &tilewright_graph::ValueId| graph.shape(*v).first().cloned();
                graph
                    .inputs
                    .iter()
                    .filter_map(first)
                    .any(|d| d.as_symbol().is_some_and(|s| &**s == name))
            };
            let size = |s: &tilewright_layout::Symbol| if lead(&s.name) { batch } else { length };
            let sizes = graph.symbols.iter().map(|s| (s.name.to_string(), size(s))).collect();
            let inputs = tilewright::inputs::random(&graph, &sizes, seed as u64).expect("inputs");
            holds(&format!("{model} {batch} x {length}"), &graph, &planned, &inputs, 0);
        }
    }
}

/// Every step names the calls that a framework would make in its place.
#[test]
fn steps_name_the_library_calls_that_they_replace() {
    let mut named = std::collections::BTreeSet::new();
    for model in ["bert", "llama", "gpt2", "vit"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(model);
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        let planned = plan(&graph, Precision::Bf16);
        let env: Env = graph.symbols.iter().map(|s| (s.name.clone(), 4)).collect();
        let calls = planned.library_calls(&env);
        assert_eq!(calls.len(), planned.plan().steps.len());
        for call in calls {
            assert!(!call.is_empty() && !call.contains("none"), "{model}: {call}");
            named.extend(call.split(" + ").map(|c| c.split(' ').next().unwrap().to_string()));
        }
    }
    for call in ["cublasLtMatmul", "aten::scaled_dot_product_attention", "aten::native_layer_norm"]
    {
        assert!(named.contains(call), "{call}: {named:?}");
    }
}

/// How many steps are products with two right operands.
fn pairs(planned: &GpuPlan) -> usize {
    let plan = planned.plan();
    let paired = |step: &&Step| {
        let Step::Launch { kernel, .. } = step else { return false };
        let forms = &plan.kernels[*kernel].forms;
        forms.iter().any(|f| matches!(f, Form::Product(p) if p.second.is_some()))
    };
    plan.steps.iter().filter(paired).count()
}

#[test]
fn gated_units_are_one_product() {
    for model in ["llama", "mistral", "qwen2", "qwen3"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf").join(model);
        let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let layers = config["num_hidden_layers"].as_u64().unwrap() as usize;
        let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
        for precision in PRECISIONS {
            assert_eq!(pairs(&plan(&graph, precision)), layers, "{model} {precision}");
        }
    }
    // With a bias each, the gate on either side; and what must stay two products: another reader of the gate.
    for (name, swapped, read_again, count) in [
        ("gate first", false, false, 1),
        ("up first", true, false, 1),
        ("gate twice", false, true, 0),
    ] {
        let mut b = GraphBuilder::new("gated");
        let m = b.symbol("M", Range { min: 1, max: 64 });
        let x = b.input("x", TensorType::new(DType::F32, vec![m, Dim::new(24)]));
        let mut sums = Vec::new();
        for i in 0..2 {
            let w = b.constant(format!("w{i}"), numbers(&[24, 40], i));
            let bias = b.constant(format!("b{i}"), numbers(&[40], 7 + i));
            let y = b.contract("mk,kn->mn", x, w).unwrap();
            sums.push(b.binary(ExprOp::Add, y, bias).unwrap());
        }
        let gate = b.unary(ExprOp::Tanh, sums[0]).unwrap();
        let args = if swapped { (sums[1], gate) } else { (gate, sums[1]) };
        let y = b.binary(ExprOp::Mul, args.0, args.1).unwrap();
        b.output("y", y);
        if read_again {
            let z = b.unary(ExprOp::Neg, gate).unwrap();
            b.output("z", z);
        }
        let graph = b.finish();
        for precision in PRECISIONS {
            let planned = plan(&graph, precision);
            let name = format!("{name} {precision}");
            assert_eq!(pairs(&planned), count, "{name}");
            holds(&name, &graph, &planned, &[numbers(&[33, 24], 3)], 0);
        }
    }
}

/// Images of three channels: lines of the window as pieces of memory, windows that do not overlap, and steps that the copy
/// engine does not take.
#[test]
fn convolutions_of_few_channels_are_within_the_contract() {
    for (name, weights, op, size) in [
        ("stem", [8, 3, 7, 7], conv(2, 3, 1), [13, 18]),
        ("odd", [8, 5, 3, 4], conv(3, 1, 1), [10, 12]),
        ("patches", [8, 3, 4, 4], conv(4, 0, 1), [13, 16]),
        ("long", [8, 3, 9, 9], conv(9, 0, 1), [19, 27]),
    ] {
        let mut b = GraphBuilder::new(name);
        let n = b.symbol("N", Range { min: 1, max: 8 });
        let shape = [weights[1] as i64, size[0], size[1]].map(Dim::new);
        let shape: Vec<Dim> = [n].into_iter().chain(shape).collect();
        let x = b.input("x", TensorType::new(DType::F32, shape));
        let w = b.constant("w", numbers(&weights, 4));
        let y = b.op(op, &[x, w]).unwrap();
        let y = b.unary(ExprOp::Tanh, y).unwrap();
        b.output("y", y);
        let graph = b.finish();
        for precision in PRECISIONS {
            let input = numbers(&[2, weights[1], size[0] as usize, size[1] as usize], 8);
            holds(&format!("{name} {precision}"), &graph, &plan(&graph, precision), &[input], 0);
        }
    }
}

/// Launches of every step that runs on the device, and their schedules.
fn launches(planned: &GpuPlan, inputs: &[Tensor]) -> Vec<Vec<String>> {
    let run = planned.interpret(inputs).unwrap_or_else(|e| panic!("{e} {:?}", e.notes()));
    let of_step = |step: &BoundStep| match step {
        BoundStep::Device { choice, .. } => {
            choice.ways[0].launches.iter().map(|l| l.schedule.clone()).collect()
        }
        _ => vec![],
    };
    run.bound.steps.iter().map(of_step).collect()
}

/// Few results of much data: parts of every reduction, and one more kernel, in the order of the parts.
#[test]
fn reductions_of_few_results_are_two_kernels() {
    let mut b = GraphBuilder::new("reductions");
    let m = b.symbol("M", Range { min: 1, max: 1 << 20 });
    let x = b.input("x", TensorType::new(DType::F32, vec![m, Dim::new(72)]));
    let square = b.binary(ExprOp::Mul, x, x).unwrap();
    let reduce = |kind, axes: Vec<usize>| Op::Reduce { kind, axes, keep: false };
    let sum = b.node(reduce(ReduceKind::Sum, vec![0, 1]), &[square]).unwrap()[0];
    let root = b.unary(ExprOp::Sqrt, sum).unwrap();
    let most = b.node(reduce(ReduceKind::Max, vec![0]), &[x]).unwrap()[0];
    let sums = b.node(reduce(ReduceKind::Sum, vec![0]), &[x]).unwrap()[0];
    let spread = b.binary(ExprOp::Sub, most, sums).unwrap();
    b.output("norm", root);
    b.output("spread", spread);
    let graph = b.finish();
    let planned = plan(&graph, Precision::F32);
    // Parts of several pieces, the last of fewer; and so little that one kernel does.
    for (rows, two) in [(4001, true), (3, false)] {
        let inputs = [numbers(&[rows, 72], 5)];
        holds(&format!("{rows} rows"), &graph, &planned, &inputs, 0);
        let reductions = launches(&planned, &inputs);
        assert_eq!(reductions.iter().any(|l| l.len() == 2), two, "{reductions:?}");
        assert!(!two || reductions.iter().all(|l| l.len() == 2), "{reductions:?}");
    }
}

/// Rows that no registers hold stay in shared memory between the passes over them.
#[test]
fn long_rows_of_models_stay_on_the_multiprocessor() {
    let mut b = GraphBuilder::new("long");
    let x = b.input("x", TensorType::new(DType::F32, vec![Dim::new(2), Dim::new(40_000)]));
    let y = b.node(Op::Softmax { axis: 1, log: false }, &[x]).unwrap()[0];
    b.output("y", y);
    let graph = b.finish();
    let planned = plan(&graph, Precision::F32);
    let inputs = [numbers(&[2, 40_000], 8)];
    holds("a long row", &graph, &planned, &inputs, 0);
    let schedules = launches(&planned, &inputs).concat();
    assert!(schedules.iter().any(|s| s.contains("kept=")), "{schedules:?}");
}

/// The few largest or smallest elements of rows: ties, infinities and NaN as in the reference.
#[test]
fn few_largest_elements_are_found_on_the_device() {
    let inf = f64::INFINITY;
    for (largest, k) in [(true, 3), (false, 6)] {
        let mut b = GraphBuilder::new("top");
        let m = b.symbol("M", Range { min: 1, max: 64 });
        let x = b.input("x", TensorType::new(DType::F32, vec![m, Dim::new(6)]));
        let top = b.node(Op::TopK { axis: 1, k: Dim::new(k), largest }, &[x]).unwrap();
        b.output("values", top[0]);
        b.output("places", top[1]);
        let graph = b.finish();
        let rows = [
            [1.0, 3.0, 3.0, -2.0, 3.0, 0.0],
            [-inf, -inf, 5.0, -inf, inf, -inf],
            [f64::NAN, 1.0, inf, f64::NAN, -inf, 2.0],
            [-inf; 6],
            [f64::NAN; 6],
        ];
        let x = Tensor::from_f64s(DType::F32, &[5, 6], &rows.concat()).unwrap();
        holds("top", &graph, &plan(&graph, Precision::F32), &[x], 0);
    }
}

/// Where the copy engine can read windows, no convolution copies them.
#[test]
fn convolutions_read_their_windows_within_the_contract() {
    let graph = nets::residual_network();
    let inputs = [numbers(&[3, 3, 13, 10], 7)];
    for precision in PRECISIONS {
        let planned = plan_with(&graph, precision, true);
        let reads = |f: &Form| matches!(f, Form::Product(p) if p.windows.is_some());
        let kernels = || planned.plan().kernels.iter();
        let windows = kernels().filter(|(_, k)| k.forms.iter().any(reads)).count();
        // Multiply-adds of f32 do not go through the copy engine.
        assert_eq!(windows, if precision == Precision::F32 { 0 } else { 6 }, "{precision}");
        holds(&format!("residual {precision}"), &graph, &planned, &inputs, 0);
        let outputs =
            tilewright_interp::plan::run(planned.plan(), &inputs, &Env::new(), Mode::Exact)
                .unwrap();
        let report = planned.verify_outputs(&graph, &inputs, &outputs).expect("it verifies");
        assert!(report.outputs.iter().all(|d| d.ratio <= 1.0), "{precision}: {report:?}");
    }
}

/// A product whose rounded result is an output and read by what follows goes to memory once, in 16 bits.
#[test]
fn a_product_with_two_results_is_stored_as_it_is_rounded() {
    let mut b = GraphBuilder::new("pair");
    let ty = |shape: [i64; 2]| TensorType::new(DType::BF16, shape.map(Dim::new).to_vec());
    let x = b.input("x", ty([128, 96]));
    let w = b.input("w", ty([96, 256]));
    let contract = Op::Contract {
        lhs: "mk".into(),
        rhs: "kn".into(),
        out: "mn".into(),
        acc: DType::F32,
        dtype: DType::BF16,
    };
    let y = b.op(contract, &[x, w]).unwrap();
    let cast = tilewright_expr::Func::cast(DType::BF16, DType::F32);
    let wide = b.op(Op::Map(cast), &[y]).unwrap();
    let square = b.binary(ExprOp::Mul, wide, wide).unwrap();
    b.output("y", y);
    b.output("square", square);
    let graph = b.finish();
    let inputs = [[128, 96], [96, 256]].map(|s| numbers(&s, 3).rounded(DType::BF16).unwrap());
    let planned = plan(&graph, Precision::F32);
    holds("pair", &graph, &planned, &inputs, 0);
    let wide = planned.plan().buffers.iter().filter(|(_, b)| b.dtype == DType::F32).count();
    assert_eq!(wide, 1, "only the second output is f32");
}

/// The scale of channels is computed in the registers of the product that reads it, where the tensor cores take operands from there; else
/// by a kernel before it.
#[test]
fn products_compute_their_left_operand() {
    for (channels, inside) in [(32, true), (33, false)] {
        let graph = nets::squeeze_network(channels);
        let inputs = [numbers(&[3, 16, 6, 5], 4)];
        for precision in PRECISIONS {
            let mut compiler = GpuCompiler::new(Gpu::h200());
            (compiler.precision, compiler.fold_operands) = (precision, true);
            let planned = compiler.plan(graph.clone()).expect("it plans");
            let narrow = matches!(precision, Precision::F16 | Precision::Bf16);
            let computed = planned.plan().kernels.iter().filter(|(_, k)| {
                k.forms.iter().any(|f| matches!(f, Form::Product(p) if p.prologue.is_some()))
            });
            assert_eq!(computed.count(), usize::from(narrow), "{channels} {precision}");
            let name = format!("squeeze {channels} {precision}");
            holds(&name, &graph, &planned, &inputs, 0);
            let run = planned.interpret(&inputs).expect("it runs");
            let mut names = Vec::new();
            for step in &run.bound.steps {
                let BoundStep::Device { choice, .. } = step else { continue };
                names.extend(choice.ways[0].launches.iter().map(|l| l.program.name.clone()));
            }
            let count = |name: &str| names.iter().filter(|n| **n == name).count();
            assert_eq!(count("gemm_of_computed"), usize::from(narrow && inside), "{names:?}");
            assert_eq!(count("gemm_prologue"), usize::from(narrow && !inside), "{names:?}");
        }
    }
}

/// Norms that products alone read are folded into these: none is left in the tiny Llama with its head.
#[test]
fn norms_are_folded_into_products() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf/llama");
    let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
    let norms = |g: &Graph| g.live().filter(|(_, n)| matches!(n.op, Op::RmsNorm { .. })).count();
    let planned = plan(&graph, Precision::Bf16);
    assert!(norms(&graph) > 1);
    assert_eq!(norms(planned.graph()), 0);
    let said = planned.fusion().views.iter().filter(|line| line.starts_with("folded: norm"));
    assert_eq!(said.count(), norms(&graph));
    let mut compiler = GpuCompiler::new(Gpu::h200());
    compiler.fold = false;
    let apart = compiler.plan(graph.clone()).expect("it plans");
    assert_eq!(norms(apart.graph()), norms(&graph));
    // Where plain arithmetic is slow, what products multiply behind the tensor cores costs more than a kernel that writes rows.
    let mut slow = Gpu::h200();
    slow.f32_flops_per_clock = 0.01;
    let mut compiler = GpuCompiler::new(slow);
    compiler.precision = Precision::Bf16;
    let apart = compiler.plan(graph.clone()).expect("it plans");
    assert_eq!(norms(apart.graph()), norms(&graph));
    let said = apart.fusion().views.iter().filter(|line| line.starts_with("not folded: norm"));
    assert_eq!(said.count(), norms(&graph));
}

/// Products leave the sums that norms behind them need, and no kernel sums rows but those of the first layer's, which no product makes.
#[test]
fn products_leave_statistics_of_norms() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf/llama");
    let graph = load_model(&directory, &LoadOptions::default()).expect("it loads").graph;
    for (precision, on) in
        [(Precision::Bf16, true), (Precision::Tf32, true), (Precision::F32, false)]
    {
        let planned = plan(&graph, precision);
        let products =
            planned.plan().kernels.iter().flat_map(|(_, k)| &k.forms).filter_map(|f| match f {
                Form::Product(p) => Some(p),
                _ => None,
            });
        let (leave, read): (Vec<bool>, Vec<bool>) =
            products.map(|p| (p.leaves.is_some(), p.row_sums.is_some())).unzip();
        assert_eq!((leave.contains(&true), read.contains(&true)), (on, on), "{precision}");
        let summed = planned.plan().steps.iter().filter(|s| s.note().label.contains("sum"));
        let norms = graph.live().filter(|(_, n)| matches!(n.op, Op::RmsNorm { .. })).count();
        assert_eq!(summed.count(), if on { 1 } else { norms }, "{precision}");
    }
}
