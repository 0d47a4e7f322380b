//! Any schedule that is legal for a kernel computes what the planner's does: tile sizes are drawn, and what
//! [`verify_schedule`] takes is run through the tile interpreter and compared with the oracle.
//!
//! Graphs are those below and random ones; `TW_SEED` and `TW_CASES` choose the range of the latter.

mod support;

use support::{f32s, host, tensor};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::{AttentionAttrs, ConvAttrs, Graph, GraphBuilder, Op, ReduceKind, ValueId};
use tilewright_interp::Mode;
use tilewright_layout::Dim;
use tilewright_lower::{Choice, CpuTarget, Layouts, Options, lower_with};
use tilewright_passes::{PassContext, choose_layouts};
use tilewright_plan::Plan;
use tilewright_testkit as kit;
use tilewright_tile::{Kernel, Schedule, verify_schedule};

/// How often schedules were drawn that differ from the planner's, and how many of them were legal.
#[derive(Debug, Default)]
struct Drawn {
    all: usize,
    legal: usize,
}

/// The planner's schedule with other tile sizes, if that is legal.
fn redraw(kernel: &Kernel, planned: &Schedule, rng: &mut kit::data::Rng) -> Option<Schedule> {
    let mut schedule = planned.clone();
    for size in schedule.tiles.values_mut() {
        *size = match rng.below(8) {
            0 => *size / 2,
            1 => *size * 2,
            2 => *size + 1,
            3 => *size - 1,
            4 => rng.between(1, 2 * *size),
            5 => 1,
            _ => *size,
        };
    }
    verify_schedule(kernel, &schedule).is_ok().then_some(schedule)
}

/// Draws other schedules for the kernels of a plan; says which they are.
fn redraw_all(plan: &mut Plan, rng: &mut kit::data::Rng, drawn: &mut Drawn) -> String {
    let mut text = String::new();
    let ids: Vec<_> = plan.kernels.ids().collect();
    for id in ids {
        let planned = &mut plan.kernels[id];
        drawn.all += 1;
        if let Some(schedule) = redraw(&planned.kernel, &planned.schedule, rng)
            && schedule != planned.schedule
        {
            drawn.legal += 1;
            text += &format!("{schedule} instead of {}\n{}\n", planned.schedule, planned.kernel);
            planned.schedule = schedule;
        }
    }
    text
}

/// Runs a graph's plan under a few legal schedules and compares with the oracle.
fn check(graph: &Graph, inputs: &[Tensor], seed: u64, times: usize, drawn: &mut Drawn) {
    let mut rng = kit::data::Rng::new(seed);
    let env = tilewright_layout::Env::new();
    let Ok(want) = kit::bound::run(graph, inputs, &env) else { return };
    let options = Options { fusion: Choice::Fastest, ..Options::default() };
    let target = if seed.is_multiple_of(2) { CpuTarget::avx2() } else { CpuTarget::avx512() };
    let context = PassContext { vector_lanes: 4, panel_width: 8, ..PassContext::default() };
    let layouts =
        if seed.is_multiple_of(3) { choose_layouts(graph, &context) } else { Layouts::new() };
    let (plan, _) = lower_with(graph, &target, &layouts, &host, &options).unwrap();
    for _ in 0..times {
        let mut plan = plan.clone();
        let schedules = redraw_all(&mut plan, &mut rng, drawn);
        let got = tilewright_interp::plan::run(&plan, inputs, &env, Mode::Exact)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{graph}\n{schedules}"));
        for (i, (got, want)) in got.iter().zip(want.outputs.iter().zip(&want.errors)).enumerate() {
            let comparison = kit::bound::check(got, want.0, want.1);
            assert!(
                comparison.passed(),
                "seed {seed}, output {i}: {comparison}\n{graph}\n{schedules}"
            );
        }
    }
}

/// A graph of one operator over inputs of these shapes, and its inputs.
fn single(
    name: &str,
    shapes: &[&[usize]],
    make: impl FnOnce(&mut GraphBuilder, &[ValueId]) -> ValueId,
) -> (Graph, Vec<Tensor>) {
    let mut b = GraphBuilder::new(name);
    let mut inputs = Vec::new();
    let mut values = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        let extents: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        values.push(b.input(format!("x{i}"), f32s(&extents)));
        inputs.push(tensor(DType::F32, shape, 1 + i as u64));
    }
    let y = make(&mut b, &values);
    b.output("y", y);
    (b.finish(), inputs)
}

/// A product of `rows` rows with codes in groups of `group`; activations in codes as well, or not.
fn grouped(rows: usize, n: usize, k: usize, group: i64, coded: bool) -> (Graph, Vec<Tensor>) {
    single(&format!("grouped {rows} {n} {k} {group} {coded}"), &[&[rows, k]], |b, x| {
        let groups = k.div_ceil(group as usize);
        let codes = b.constant("codes", tensor(DType::I4, &[n, k], 7));
        let scales = b.constant("scales", tensor(DType::F32, &[n, groups], 8));
        let zeros = b.constant("zeros", tensor(DType::F32, &[n, groups], 9));
        let operands = match coded {
            false => vec![x[0], codes, scales, zeros],
            true => {
                let own = b.slice_axis(x[0], 1, Dim::new(0), Dim::from(groups)).unwrap();
                let x = b.map_text("{ x -> round(x * 30) }", &[x[0]]).unwrap();
                let x = b.cast(x, DType::I8).unwrap();
                vec![x, codes, scales, own, zeros]
            }
        };
        b.op(Op::GroupProduct { group }, &operands).unwrap()
    })
}

/// Products, rows, scans, attention and convolutions whose sums one tile or several hold.
fn graphs() -> Vec<(Graph, Vec<Tensor>)> {
    let norm = Op::LayerNorm { axis: 1, eps: 0.1f64.to_bits() };
    let softmax = |axis| {
        move |b: &mut GraphBuilder, x: &[ValueId]| {
            b.op(Op::Softmax { axis, log: false }, &[x[0]]).unwrap()
        }
    };
    let scan = |kind, exclusive, reverse| {
        single("scan", &[&[3, 21]], move |b, x| {
            b.op(Op::Scan { kind, axis: 1, exclusive, reverse }, &[x[0]]).unwrap()
        })
    };
    let attention = |keys: usize, causal| {
        single("attention", &[&[1, 2, 9, 6], &[1, 2, keys, 6], &[1, 2, keys, 6]], move |b, x| {
            let score = tilewright_expr::Func::identity(DType::F32);
            let attrs = AttentionAttrs { score, causal, zeros: false };
            b.op(Op::Attention(attrs), x).unwrap()
        })
    };
    let conv = |c: usize, w: [usize; 4], groups| {
        single("conv", &[&[1, c, 6, 7], &w], move |b, x| {
            let attrs = ConvAttrs {
                strides: vec![1, 1],
                pads_lo: vec![1, 1],
                pads_hi: vec![1, 1],
                dilations: vec![1, 1],
                groups,
            };
            b.op(Op::Conv(attrs), x).unwrap()
        })
    };
    vec![
        single("layer norm", &[&[5, 48], &[48], &[48]], move |b, x| b.op(norm, x).unwrap()),
        single("softmax of rows", &[&[7, 33]], softmax(1)),
        single("softmax of columns", &[&[33, 20]], softmax(0)),
        single("sums", &[&[4, 50]], |b, x| b.reduce(ReduceKind::Sum, x[0], &[1], false).unwrap()),
        scan(ReduceKind::Sum, false, false),
        scan(ReduceKind::Prod, true, true),
        single("product", &[&[9, 24], &[24, 20]], |b, x| {
            b.contract("mk,kn->mn", x[0], x[1]).unwrap()
        }),
        // Beyond its depth the left operand would be infinite, and zero times that is no number.
        single("computed operand", &[&[9, 24], &[24, 20]], |b, x| {
            let x0 = b.map_text("{ x -> 1 / (x * x) }", &[x[0]]).unwrap();
            b.contract("mk,kn->mn", x0, x[1]).unwrap()
        }),
        grouped(3, 40, 64, 16, false),
        grouped(2, 17, 20, 8, false),
        grouped(3, 40, 64, 16, true),
        attention(32, false),
        attention(21, true),
        conv(8, [6, 8, 3, 3], 1),
        conv(32, [32, 16, 1, 1], 2),
        conv(24, [36, 8, 3, 3], 3),
    ]
}

#[test]
fn legal_schedules_compute_the_same() {
    let mut drawn = Drawn::default();
    for (graph, inputs) in graphs() {
        for seed in [0, 1] {
            check(&graph, &inputs, seed, 12, &mut drawn);
        }
    }
    // Neither everything is refused nor everything taken.
    assert!(drawn.legal > drawn.all / 4, "{drawn:?}");
    assert!(drawn.legal < drawn.all * 9 / 10, "{drawn:?}");
}

#[test]
fn legal_schedules_of_random_graphs_compute_the_same() {
    let number =
        |name: &str, usual| std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(usual);
    let (first, mut drawn) = (number("TW_SEED", 1), Drawn::default());
    for seed in first..first + number("TW_CASES", 40) {
        let nodes = 3 + (seed % 9) as usize;
        let options = kit::generate::Options { nodes, ..kit::generate::Options::default() };
        let graph = kit::generate::graph(seed, &options);
        let mut rng = kit::data::Rng::new(seed);
        let env = kit::data::random_env(&graph, &mut rng);
        let inputs = kit::data::random_inputs(&graph, &env, &mut rng);
        check(&graph, &inputs, seed, 3, &mut drawn);
    }
    assert!(drawn.legal > drawn.all / 4, "{drawn:?}");
}
