//! Norms go into the products that read them, and the same is computed.

mod common;
use common::*;
use tilewright_graph::{Graph, GraphBuilder, Op, ValueId};
use tilewright_layout::Env;
use tilewright_passes::fold_norms;

fn norm(b: &mut GraphBuilder, rng: &mut Rng, x: ValueId, width: usize) -> ValueId {
    let scale = weight(b, rng, &[width]);
    b.op(Op::RmsNorm { axis: 2, eps: 1e-5f64.to_bits() }, &[x, scale]).unwrap()
}

fn norms(graph: &Graph) -> usize {
    graph.live().filter(|(_, n)| matches!(n.op, Op::RmsNorm { .. })).count()
}

#[test]
fn products_take_in_the_norm_that_they_read() {
    for (letters, shape) in [("bsk,kn->bsn", [8, 6]), ("bsk,nk->bsn", [6, 8])] {
        let mut rng = Rng(3);
        let mut b = GraphBuilder::new("fold");
        let x = input(&mut b, "x", &[2, 3, 8]);
        let y = norm(&mut b, &mut rng, x, 8);
        for name in ["p", "q"] {
            let w = weight(&mut b, &mut rng, &shape);
            let z = b.contract(letters, y, w).unwrap();
            b.output(name, z);
        }
        let before = b.finish();
        let mut after = before.clone();
        assert!(fold_norms(&mut after, &mut |_, _, _| true).unwrap());
        tilewright_graph::verify(&after).unwrap();
        assert_eq!(norms(&after), 0);
        // Both read one sum of squares.
        let sums = after.live().filter(|(_, n)| matches!(n.op, Op::Reduce { .. })).count();
        assert_eq!(sums, 1);
        same_within(&before, &after, &Env::new(), ROUNDED_CONSTANTS);
        assert!(!fold_norms(&mut after, &mut |_, _, _| true).unwrap());
    }
}

#[test]
fn what_others_read_stays() {
    // An output; a reader that is no product; a right operand; weights that are no constant; a sum over another axis.
    for case in 0..5 {
        let mut rng = Rng(5);
        let mut b = GraphBuilder::new("stays");
        let x = input(&mut b, "x", &[2, 8, 8]);
        let y = norm(&mut b, &mut rng, x, 8);
        let w =
            if case == 3 { input(&mut b, "w", &[8, 8]) } else { weight(&mut b, &mut rng, &[8, 8]) };
        let z = match case {
            2 => b.contract("nk,bsk->bsn", w, y).unwrap(),
            4 => b.contract("bsk,sn->bkn", y, w).unwrap(),
            _ => b.contract("bsk,nk->bsn", y, w).unwrap(),
        };
        b.output("z", z);
        match case {
            0 => b.output("y", y),
            1 => {
                let t = b.unary(tilewright_expr::Op::Tanh, y).unwrap();
                b.output("t", t);
            }
            _ => {}
        }
        let mut graph = b.finish();
        assert!(!fold_norms(&mut graph, &mut |_, _, _| true).unwrap(), "case {case}");
        assert_eq!(norms(&graph), 1);
    }
}
