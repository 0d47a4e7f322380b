//! Writing results over operands that nobody reads again changes no byte of any output.
//!
//! The graphs are chains on square matrices of one size, so that almost every result has the layout of
//! an operand that dies, and the proof alone (`tilewright_tile::may_overwrite`) decides: elementwise
//! work and rows beside products, turned and mirrored operands, running sums and sums over columns.

use std::collections::BTreeSet;
use std::path::Path;
use tilewright::gpu::GpuCompiler;
use tilewright::{Choice, Compiler, Cpu, Precision};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, GraphBuilder, Op, ReduceKind, TensorType};
use tilewright_import::hf::{LoadOptions, load_model};
use tilewright_layout::Dim;
use tilewright_plan::{Step, Storage};
use tilewright_runtime_gpu::{Chooser, bind};
use tilewright_target::Gpu;
use tilewright_testkit::data;

/// A matrix is several tiles high and wide, and no whole number of them.
const SIDE: i64 = 137;

fn chain(rng: &mut data::Rng, steps: usize) -> Result<Graph> {
    let mut b = GraphBuilder::new("chain");
    let shape = vec![Dim::new(SIDE), Dim::new(SIDE)];
    let ty = TensorType::new(DType::F32, shape.clone());
    let mut values = vec![b.input("x", ty.clone()), b.input("y", ty)];
    for _ in 0..steps {
        let x = values[values.len() - 1];
        let other = values[rng.below(values.len())];
        let next = match rng.below(12) {
            0 => b.map_text("{ x -> tanh(x) * 1.5 }", &[x])?,
            1 => b.binary(ExprOp::Add, x, other)?,
            2 => {
                let turned = b.permute(x, &[1, 0])?;
                b.map_text("{ x, y -> x - 0.5 * y }", &[x, turned])?
            }
            3 => b.permute(x, &[1, 0])?,
            4 => {
                let axis = rng.below(2);
                let (mut starts, mut steps) = (vec![Dim::new(0); 2], vec![1; 2]);
                (starts[axis], steps[axis]) = (Dim::new(SIDE - 1), -1);
                let mirrored = b.op(Op::Slice { starts, lens: shape.clone(), steps }, &[x])?;
                b.map_text("{ x, y -> 0.25 * x + y }", &[x, mirrored])?
            }
            5 => b.op(Op::Softmax { axis: rng.below(2), log: false }, &[x])?,
            6 => {
                let top = b.reduce(ReduceKind::Max, x, &[rng.below(2)], true)?;
                b.binary(ExprOp::Sub, x, top)?
            }
            7 => {
                // Everything of one column or row.
                let first = b.slice_axis(x, rng.below(2), Dim::new(SIDE / 2), Dim::new(1))?;
                b.map_text("{ x, y -> x - 0.5 * y }", &[x, first])?
            }
            8 => {
                let (exclusive, reverse) = (rng.below(2) == 0, rng.below(2) == 0);
                let scan =
                    Op::Scan { kind: ReduceKind::Max, axis: rng.below(2), exclusive, reverse };
                let scan = b.op(scan, &[x])?;
                b.map_text("{ x, y -> y - max(x, -9.0) }", &[scan, x])?
            }
            9 => {
                let product = b.contract("ik,kj->ij", x, other)?;
                b.map_text("{ p, x -> tanh(p * 0.01) + x }", &[product, x])?
            }
            10 => {
                let product = b.contract("ik,jk->ij", other, other)?;
                b.map_text("{ p, x -> tanh(p * 0.01) + x }", &[product, x])?
            }
            _ => {
                let total = b.reduce(ReduceKind::Sum, x, &[0, 1], true)?;
                b.map_text("{ x, t -> x + tanh(t) }", &[x, total])?
            }
        };
        values.push(next);
    }
    b.output("result", values[values.len() - 1]);
    Ok(b.finish())
}

#[test]
fn results_over_operands_change_nothing() {
    let Ok(cpu) = Cpu::detect(2) else { return };
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let (mut smaller, mut steps) = (0, 0);
    for seed in 0..40 {
        let mut rng = data::Rng::new(seed);
        let steps_wanted = 6 + rng.below(12);
        let graph = chain(&mut rng, steps_wanted).unwrap();
        let env = data::random_env(&graph, &mut rng);
        let inputs = data::random_inputs(&graph, &env, &mut rng);
        let run = |in_place: bool| {
            let mut compiler = Compiler::for_cpu(cpu.clone(), Some(cache.clone()));
            // Apart, operators have more intermediates to share.
            compiler.fusion = if seed % 2 == 0 { Choice::Fastest } else { Choice::Apart };
            compiler.in_place = in_place;
            let compiled = compiler.compile_observed(graph.clone(), &mut |_| {})?;
            let mut session = compiled.session()?;
            let memory = session.memory(&inputs)?;
            // Twice: the second run finds the arena full of the first one's values.
            session.run(&inputs)?;
            Ok::<_, Error>((session.run(&inputs)?, memory, compiled.plan().steps.len()))
        };
        let ((apart, ..), (shared, memory, n)) = (run(false).unwrap(), run(true).unwrap());
        assert!(apart[0].bytes() == shared[0].bytes(), "seed {seed}: {memory:?}\n{graph}");
        assert!(memory.arena_bytes <= memory.apart_bytes, "seed {seed}: {memory:?}");
        smaller += usize::from(memory.arena_bytes < memory.apart_bytes);
        steps += n;
    }
    assert!(smaller >= 5, "{smaller} of 40 arenas are smaller, over {steps} steps");
    println!("{smaller} of 40 arenas are smaller, over {steps} steps");
}

/// Of a pair of products one result stays in registers: no step names its buffer, and it takes no place in the arena.
#[test]
fn what_no_step_touches_takes_no_memory() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf/qwen2");
    let graph = load_model(&model, &LoadOptions::default()).unwrap().graph;
    let mut compiler = GpuCompiler::h200();
    compiler.precision = Precision::Bf16;
    let planned = compiler.plan(graph).unwrap();
    let plan = planned.plan();
    let env = plan.symbols.iter().map(|s| (s.name.clone(), 7i64)).collect();
    let bound = bind(plan, &env, &mut Chooser::new(Gpu::h200())).unwrap();
    let named: BTreeSet<_> = plan
        .steps
        .iter()
        .flat_map(|step| match step {
            Step::Launch { args, .. } => args.clone(),
            Step::Library { inputs, outputs, .. } | Step::Host { inputs, outputs, .. } => {
                [inputs.clone(), outputs.clone()].concat()
            }
        })
        .collect();
    let (mut idle, mut used) = (0, 0);
    for (id, buffer) in plan.buffers.iter() {
        let bytes = bound.bytes[id.index()];
        match buffer.storage {
            Storage::Const(_) => {}
            Storage::Arena if !named.contains(&id) => idle += bytes,
            _ => used += bytes.next_multiple_of(256),
        }
    }
    assert!(idle > 0, "every result has a reader");
    assert_eq!(bound.naive_bytes, used);
}
