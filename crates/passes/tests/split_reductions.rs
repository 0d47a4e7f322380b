//! Reductions to one element in two steps: where they are split, and that they stay what they are.

mod common;
use common::*;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, GraphBuilder, Op, ReduceKind};
use tilewright_interp::Mode;
use tilewright_passes::split_reductions;

fn reduction(kind: ReduceKind, shape: &[i64], axes: &[usize], mapped: bool) -> Graph {
    let mut b = GraphBuilder::new("t");
    let x = input(&mut b, "x", shape);
    let x = if mapped { text(&mut b, "{ x -> x * 0.5 }", &[x]) } else { x };
    let y = b.reduce(kind, x, axes, true).unwrap();
    b.output("y", y);
    b.finish()
}

fn count(graph: &Graph) -> usize {
    graph.live().filter(|(_, n)| matches!(n.op, Op::Reduce { .. })).count()
}

#[test]
fn large_ones_to_one_element() {
    for (kind, shape, axes, mapped, want) in [
        (ReduceKind::Sum, &[64, 4, 1024][..], &[0, 1, 2][..], true, 2),
        (ReduceKind::Max, &[1, 512, 512], &[1, 2], false, 2),
        (ReduceKind::Sum, &[1 << 18], &[0], false, 2),
        // Small, of rows, of odd sizes behind a map.
        (ReduceKind::Sum, &[64, 64], &[0, 1], false, 1),
        (ReduceKind::Sum, &[64, 4096], &[1], false, 1),
        (ReduceKind::Sum, &[1 << 18], &[0], true, 1),
    ] {
        let before = reduction(kind, shape, axes, mapped);
        let mut after = before.clone();
        assert_eq!(split_reductions(&mut after).unwrap(), want == 2, "{shape:?}");
        tilewright_graph::verify(&after).unwrap();
        assert_eq!(count(&after), want, "{shape:?}");
        assert!(!split_reductions(&mut after).unwrap(), "once is enough: {shape:?}");
        let sizes: Vec<usize> = shape.iter().map(|&d| d as usize).collect();
        let values: Vec<f64> =
            (0..sizes.iter().product()).map(|i| f64::from((i * 37 % 101) as u32) / 64.0).collect();
        let x = [Tensor::from_f64s(DType::F32, &sizes, &values).unwrap()];
        let [a, b] = [&before, &after].map(|g| tilewright_interp::run(g, &x, Mode::F64).unwrap());
        assert_eq!(a[0].shape(), b[0].shape());
        let (a, b) = (a[0].get_f64(0), b[0].get_f64(0));
        assert!((a - b).abs() <= 1e-9 * a.abs(), "{shape:?}: {a} {b}");
    }
}
