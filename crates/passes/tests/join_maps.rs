//! What does the same to neighbouring slices is done once, and the same is computed.

mod common;
use common::*;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, GraphBuilder, Op, ValueId};
use tilewright_layout::{Dim, Env};
use tilewright_passes::join_maps;

fn maps(graph: &Graph) -> usize {
    graph.live().filter(|(_, n)| matches!(n.op, Op::Map(_))).count()
}

/// `heads` heads of four from column `at` on, turned by tables: `x * c - y * s` and `y * c + x * s` of their halves.
fn turned(
    b: &mut GraphBuilder,
    y: ValueId,
    [at, heads]: [i64; 2],
    tables: [ValueId; 2],
) -> ValueId {
    let x = b.slice_axis(y, 2, Dim::new(at), Dim::new(heads * 4)).unwrap();
    let shape = b.shape(x).to_vec();
    let x =
        b.reshape(x, &[shape[0].clone(), shape[1].clone(), Dim::new(heads), Dim::new(4)]).unwrap();
    let x = b.permute(x, &[0, 2, 1, 3]).unwrap();
    let first = b.slice_axis(x, 3, Dim::new(0), Dim::new(2)).unwrap();
    let second = b.slice_axis(x, 3, Dim::new(2), Dim::new(2)).unwrap();
    let args = [first, second, tables[0], tables[1]];
    let low = b.map_text("{ x, y, c, s -> x * c - y * s }", &args).unwrap();
    let high = b.map_text("{ x, y, c, s -> y * c + x * s }", &args).unwrap();
    b.op(Op::Concat(3), &[low, high]).unwrap()
}

#[test]
fn heads_of_queries_and_keys_turn_together() {
    let mut b = GraphBuilder::new("rotary");
    let y = input(&mut b, "y", &[2, 5, 28]);
    let tables = ["c", "s"].map(|name| input(&mut b, name, &[5, 2]));
    // Queries, keys and values of 3, 2 and 2 heads.
    let q = turned(&mut b, y, [0, 3], tables);
    let k = turned(&mut b, y, [12, 2], tables);
    let v = b.slice_axis(y, 2, Dim::new(20), Dim::new(8)).unwrap();
    for (name, value) in [("q", q), ("k", k), ("v", v)] {
        b.output(name, value);
    }
    let before = b.finish();
    let mut after = before.clone();
    assert_eq!(maps(&before), 4);
    assert!(join_maps(&mut after).unwrap());
    tilewright_graph::verify(&after).unwrap();
    assert_eq!(maps(&after), 2);
    same_within(&before, &after, &Env::new(), 0.0);
    assert!(!join_maps(&mut after).unwrap());
}

#[test]
fn what_differs_stays() {
    // Other operators; slices with a gap; tables that vary along the heads; nothing elementwise.
    for case in 0..4 {
        let mut b = GraphBuilder::new("stays");
        let y = input(&mut b, "y", &[2, 9]);
        let t = input(&mut b, "t", &[4]);
        let x = b.slice_axis(y, 1, Dim::new(0), Dim::new(4)).unwrap();
        let at = if case == 1 { 5 } else { 4 };
        let z = b.slice_axis(y, 1, Dim::new(at), Dim::new(4)).unwrap();
        let [x, z] = match case {
            0 => [b.unary(ExprOp::Tanh, x).unwrap(), b.unary(ExprOp::Exp, z).unwrap()],
            1 => [x, z].map(|v| b.unary(ExprOp::Tanh, v).unwrap()),
            2 => [x, z].map(|v| b.map_text("{ x, t -> x * t }", &[v, t]).unwrap()),
            _ => [x, z].map(|v| b.permute(v, &[1, 0]).unwrap()),
        };
        b.output("x", x);
        b.output("z", z);
        let mut graph = b.finish();
        assert!(!join_maps(&mut graph).unwrap(), "case {case}");
    }
}
