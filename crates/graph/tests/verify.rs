//! The verifier finds each kind of violation, and all of them at once.

use tilewright_base::{DType, Kind};
use tilewright_data::Tensor;
use tilewright_graph::{Def, Graph, NodeId, Op, ValueId, verify};
use tilewright_layout::{Dim, Range, Symbol};

/// `y = softmax(a + c)` and `z = a . w`.
fn good() -> Graph {
    Graph::parse(
        "graph @g(N in 1..8) {\n  %0 \"a\": f32[N,2] = input\n  %1: f32[2] = const [1.0, 2.0]\n  \
         %2: f32[N,2] = map { x, c -> x + c } %0, %1\n  %3: f32[N,2] = softmax axis=1 %2\n  \
         %4: f32[N] = contract \"nk,k->n\" acc=f32 %0, %1\n  return \"y\": %3, \"z\": %4\n}",
    )
    .unwrap()
}

/// Breaks the good graph and expects these words among the violations.
fn broken(words: &str, damage: impl Fn(&mut Graph)) {
    let mut g = good();
    damage(&mut g);
    let error = verify(&g).expect_err(words);
    assert_eq!(error.kind(), Kind::Bug);
    assert!(error.notes().iter().any(|n| n.contains(words)), "{words}: {error:?}");
    // What is broken still prints.
    assert!(!g.to_string().is_empty());
}

#[test]
fn each_violation_is_found() {
    verify(&good()).unwrap();
    broken("before n0 makes it", |g| g.order.swap(0, 1));
    broken("in the order twice", |g| g.order.push(NodeId(0)));
    broken("n9, which does not exist", |g| g.order.push(NodeId(9)));
    broken("reads v77, which does not exist", |g| g.nodes[NodeId(1)].inputs[0] = ValueId(77));
    broken("before n0 makes it", |g| g.order.retain(|&n| n != NodeId(0)));
    broken("not f32[N,2]", |g| g.values[ValueId(3)].ty.dtype = DType::F64);
    broken("which says it is a constant", |g| {
        let out = g.nodes[NodeId(0)].outputs[0];
        g.values[out].def = Def::Const(Tensor::scalar(DType::F32, 1.0));
    });
    broken("constant v1 is f32[3], its data f32[2]", |g| {
        g.values[ValueId(1)].ty.shape = vec![Dim::new(3)];
    });
    broken("says it is input 1", |g| g.values[ValueId(0)].def = Def::Input(1));
    broken("symbol N is not declared", |g| g.symbols.clear());
    broken("declared twice", |g| g.symbols.push(g.symbols[0].clone()));
    broken("is not an identifier", |g| {
        let range = Range { min: 0, max: 1 };
        g.symbols.push(Symbol { name: "a b".into(), range });
    });
    broken("empty range", |g| g.symbols[0].range = Range { min: 2, max: 1 });
    broken("two outputs are called `y`", |g| g.outputs[1].0 = "y".into());
    broken("there is no output", |g| g.outputs.clear());
    broken("axis 5 is outside", |g| {
        g.nodes[NodeId(1)].op = Op::Softmax { axis: 5, log: false };
    });
    broken("accumulated in i32", |g| {
        if let Op::Contract { acc, .. } = &mut g.nodes[NodeId(2)].op {
            *acc = DType::I32;
        }
    });
}

#[test]
fn all_violations_are_reported_at_once() {
    let mut g = good();
    g.symbols.clear();
    g.order.swap(0, 1);
    g.outputs.push(("y".into(), ValueId(99)));
    let error = verify(&g).unwrap_err();
    assert!(error.notes().len() >= 4, "{error:?}");
}

#[test]
fn a_size_found_while_running_is_not_used_before() {
    let text = "graph @g(K in 0..4) {\n  %0 \"x\": f32[4] = input\n  \
         %1: i64[1,K] = host \"nonzero\" %0\n  %2: i64[1] = dims [K]\n  return \"n\": %2, \"i\": %1\n}";
    let mut g = Graph::parse(text).unwrap();
    verify(&g).unwrap();
    g.order.swap(0, 1);
    let error = verify(&g).unwrap_err();
    assert!(error.notes()[0].contains("K is used before"), "{error:?}");
}
