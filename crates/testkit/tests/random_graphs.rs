//! The generator, the text form, the interpreter, the budgets and the minimiser against each other.

use tilewright_base::DType;
use tilewright_expr::{Node, Op as ExprOp};
use tilewright_graph::{Constants, Graph, Op, verify};
use tilewright_interp::graph::{Mode, Options, Outcome, run_with};
use tilewright_layout::Env;
use tilewright_testkit::compare::{Comparison, compare};
use tilewright_testkit::generate::{self, graph};
use tilewright_testkit::{budget, data, shrink};

fn run(g: &Graph, seed: u64, mode: Mode) -> tilewright_base::Result<Outcome> {
    let mut rng = data::Rng::new(seed);
    let env: Env = data::random_env(g, &mut rng);
    let inputs = data::random_inputs(g, &env, &mut rng);
    run_with(g, &inputs, &Options { env, ..Options::new(mode) })
}

#[test]
fn random_graphs_are_well_formed_and_round_trip_as_text() {
    for seed in 0..400 {
        let g = graph(seed, &generate::Options { nodes: 20, ..Default::default() });
        verify(&g).unwrap_or_else(|e| panic!("seed {seed}: {e:?}\n{g}"));
        let (text, table) = g.text_with_data();
        let back = Graph::parse_with("text", &text, Constants::Table(&table))
            .unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        verify(&back).unwrap();
        assert_eq!(back.to_string(), text);
        assert_eq!(g.symbols, back.symbols);
        assert_eq!(g.order.len(), back.order.len());
        for ((_, a), (_, b)) in g.live().zip(back.live()) {
            assert_eq!((&a.op, &a.origin), (&b.op, &b.origin), "seed {seed}");
            assert!(a.outputs.iter().zip(&b.outputs).all(|(&x, &y)| g.ty(x) == back.ty(y)));
            assert!(
                a.inputs.iter().zip(&b.inputs).all(|(&x, &y)| g.as_const(x) == back.as_const(y))
            );
        }
    }
}

/// Every operator that the generator knows does occur.
#[test]
fn random_graphs_have_variety() {
    let mut seen = std::collections::BTreeSet::new();
    let (mut symbolic, mut zero) = (0, 0);
    for seed in 0..300 {
        let g = graph(seed, &generate::Options::default());
        seen.extend(g.live().map(|(_, n)| n.op.name()));
        symbolic += usize::from(!g.symbols.is_empty());
        zero += usize::from(g.values.iter().any(|(_, v)| v.ty.shape.iter().any(|d| d.is(0))));
    }
    for name in [
        "map",
        "reduce",
        "contract",
        "conv",
        "attention",
        "window",
        "gather",
        "scan",
        "top_k",
        "reshape",
        "permute",
        "expand",
        "slice",
        "pad",
        "concat",
        "softmax",
        "layer_norm",
        "rms_norm",
    ] {
        assert!(seen.contains(name), "no {name} in {seen:?}");
    }
    assert!(symbolic > 50 && zero > 10, "{symbolic} symbolic, {zero} with empty axes");
}

fn worst(g: &Graph, seed: u64) -> Result<Vec<Comparison>, String> {
    let (got, want) = (run(g, seed, Mode::Exact), run(g, seed, Mode::F64));
    let (got, want) = match (got, want) {
        (Ok(got), Ok(want)) => (got.outputs, want.outputs),
        (Err(e), _) | (_, Err(e)) => return Err(format!("{e:?}")),
    };
    let budgets = budget::of_outputs(g);
    Ok(got.iter().zip(&want).zip(&budgets).map(|((g, w), b)| compare(g, w, b)).collect())
}

/// Exact arithmetic stays inside the budgets, and budgets are not so wide that they say nothing.
#[test]
fn exact_runs_stay_in_their_budgets() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let mut ratios = Vec::new();
        for seed in 0..250 {
            let g = graph(seed, &generate::Options { dtype, ..Default::default() });
            let comparisons = worst(&g, seed).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{g}"));
            for c in comparisons {
                assert!(c.passed(), "{dtype} seed {seed}: {c}\n{g}");
                if c.count > 0 {
                    ratios.push(c.max_ratio());
                }
            }
        }
        let largest = ratios.iter().copied().fold(0.0, f64::max);
        eprintln!("{dtype}: {} outputs, largest ratio {largest:.3}", ratios.len());
    }
}

/// A pretended bug in `tanh` shrinks to a graph of one node.
#[test]
fn failures_shrink_to_their_core() {
    let uses_tanh = |g: &Graph| {
        g.live().any(|(_, n)| match &n.op {
            Op::Map(f) => f.nodes().any(|(_, n, _)| matches!(n, Node::Op(ExprOp::Tanh, _))),
            _ => false,
        })
    };
    let mut shrunk = 0;
    for seed in 0..60 {
        let g = graph(seed, &generate::Options { nodes: 20, ..Default::default() });
        if !uses_tanh(&g) {
            continue;
        }
        shrunk += 1;
        let fails = |g: &Graph| uses_tanh(g) && run(g, 3, Mode::Exact).is_ok();
        let small = shrink::shrink(&g, fails);
        verify(&small).unwrap();
        assert!(uses_tanh(&small));
        assert_eq!(small.order.len(), 1, "seed {seed}: {small}");
        assert!(small.symbols.is_empty(), "seed {seed}: {small}");
        assert!(
            small.values.iter().all(|(_, v)| v.ty.shape.iter().all(|d| d.is(1) || d.is(0))),
            "seed {seed}: {small}"
        );
    }
    assert!(shrunk > 10, "{shrunk}");
}
