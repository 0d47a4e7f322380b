//! Products of one operand become one, and compute the same.

mod common;
use common::*;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, GraphBuilder, Op, ValueId};
use tilewright_layout::Env;
use tilewright_passes::join_products;

/// `x` times a weight of so many columns, perhaps with a bias. `deep_first` puts the depth in front.
fn linear(
    b: &mut GraphBuilder,
    rng: &mut Rng,
    x: ValueId,
    columns: usize,
    (deep_first, bias): (bool, bool),
) -> ValueId {
    let (letters, shape) =
        if deep_first { ("bsk,kn->bsn", [8, columns]) } else { ("bsk,nk->bsn", [columns, 8]) };
    let w = weight(b, rng, &shape);
    let y = b.contract(letters, x, w).unwrap();
    if !bias {
        return y;
    }
    let v = weight(b, rng, &[columns]);
    b.binary(ExprOp::Add, y, v).unwrap()
}

fn products(graph: &Graph) -> usize {
    graph.live().filter(|(_, n)| matches!(n.op, Op::Contract { .. })).count()
}

/// Joins, and runs both on the same inputs.
fn joined(before: &Graph) -> Graph {
    let mut after = before.clone();
    join_products(&mut after).unwrap();
    tilewright_graph::verify(&after).unwrap();
    same_on(before, &after, &Env::new());
    after
}

#[test]
fn queries_keys_and_values_are_one_product() {
    for form in [(false, false), (false, true), (true, false), (true, true)] {
        let mut rng = Rng(3);
        let mut b = GraphBuilder::new("qkv");
        let x = input(&mut b, "x", &[2, 3, 8]);
        // Fewer keys than queries, as with shared heads.
        for (name, columns) in [("q", 12), ("k", 4), ("v", 4)] {
            let y = linear(&mut b, &mut rng, x, columns, form);
            let y = b.unary(ExprOp::Tanh, y).unwrap();
            b.output(name, y);
        }
        let after = joined(&b.finish());
        assert_eq!(products(&after), 1, "{form:?}");
        // The second time nothing is left to do.
        assert!(!join_products(&mut after.clone()).unwrap(), "{form:?}");
    }
}

#[test]
fn what_is_no_group_stays() {
    let mut rng = Rng(5);
    let mut b = GraphBuilder::new("apart");
    let x = input(&mut b, "x", &[2, 3, 8]);
    let z = input(&mut b, "z", &[2, 3, 8]);
    // A gated unit, another operand, another form, and one with a bias whose product is read twice.
    let gate = linear(&mut b, &mut rng, x, 6, (false, false));
    let gate = b.unary(ExprOp::Tanh, gate).unwrap();
    let up = linear(&mut b, &mut rng, x, 6, (false, false));
    let y = b.binary(ExprOp::Mul, gate, up).unwrap();
    b.output("gated", y);
    let y = linear(&mut b, &mut rng, z, 6, (false, false));
    b.output("other", y);
    let y = linear(&mut b, &mut rng, x, 6, (true, false));
    b.output("form", y);
    let w = weight(&mut b, &mut rng, &[5, 8]);
    let y = b.contract("bsk,nk->bsn", z, w).unwrap();
    let bias = weight(&mut b, &mut rng, &[5]);
    let sum = b.binary(ExprOp::Add, y, bias).unwrap();
    b.output("sum", sum);
    b.output("product", y);
    let graph = b.finish();
    let before = products(&graph);
    let after = joined(&graph);
    // `other` and `product` read the same operand and weights of one form: they are a group.
    assert_eq!((before, products(&after)), (5, 4));
}
