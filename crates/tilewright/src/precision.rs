//! What rounding may cost: the budget of `--precision tf32`, `f16` and `bf16`.
//!
//! The measure is the same as for `f32`: what a plain evaluation in the types that are used loses against
//! float64, with room. For a narrow precision that evaluation is the graph in `f32` with roundings put in
//! ([`Rounded::of`]): the operands of products, and what the plan stores in fewer bits. Kernels round the
//! same values, in another order of sums; fused ones round fewer.
//!
//! ```text
//! budget = 4 * largest |rounded - f64|  +  4 u * largest |f64|        u: unit roundoff, 2^-8 for bf16
//! ```
//!
//! The second part stands for what the first may miss where few elements are compared: two evaluations with
//! different roundings then differ by luck.

use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Op as ExprOp};
use tilewright_graph::{Graph, Op, ValueId};
use tilewright_plan::Plan;
use tilewright_target::Precision;

/// A graph with roundings put in.
pub(crate) struct Rounded {
    /// The graph.
    pub(crate) graph: Graph,
    /// For each value that is stored rounded, its rounded copy.
    stored: BTreeMap<ValueId, ValueId>,
    /// Values that depend on something rounded.
    touched: BTreeSet<ValueId>,
    unit: f64,
}

/// To fewer digits and back.
fn rounding(precision: Precision) -> Option<(Func, f64)> {
    let mut f = FuncBuilder::new();
    let x = f.param("x", DType::F32);
    let through = |f: &mut FuncBuilder, dtype: DType| {
        let narrow = f.cast(x, dtype);
        f.cast(narrow, DType::F32)
    };
    let (y, unit) = match precision {
        Precision::F32 => return None,
        Precision::Tf32 => {
            // Veltkamp's splitting: the 11 leading digits.
            let factor = f.constant(8193.0, DType::F32);
            let scaled = f.op(ExprOp::Mul, &[factor, x]);
            let low = f.op(ExprOp::Sub, &[scaled, x]);
            (f.op(ExprOp::Sub, &[scaled, low]), 1.0 / 2048.0)
        }
        Precision::F16 => (through(&mut f, DType::F16), 1.0 / 2048.0),
        Precision::Bf16 => (through(&mut f, DType::BF16), 1.0 / 256.0),
    };
    Some((f.finish(y), unit))
}

impl Rounded {
    /// The graph of a plan with its roundings; `None` where nothing is rounded.
    pub(crate) fn of(precision: Precision, original: &Graph, plan: &Plan) -> Option<Rounded> {
        let (round, unit) = rounding(precision)?;
        let narrow: BTreeSet<ValueId> = plan
            .buffers
            .iter()
            .filter_map(|(_, b)| Some((ValueId(b.value?), b.dtype)))
            .filter(|(v, dtype)| dtype.is_float() && dtype.bits() < original.dtype(*v).bits())
            .map(|(v, _)| v)
            .collect();
        let mut graph = original.clone();
        let mut out = Rounded {
            graph: Graph::default(),
            stored: BTreeMap::new(),
            touched: BTreeSet::new(),
            unit,
        };
        let mut order = Vec::new();
        let copy = |graph: &mut Graph, order: &mut Vec<_>, v: ValueId| {
            let ty = graph.ty(v).clone();
            let node = graph.add_node(Op::Map(round.clone()), vec![v], vec![ty], "rounded");
            order.push(node);
            graph.nodes[node].outputs[0]
        };
        for &v in narrow.iter().filter(|v| original.as_const(**v).is_some()) {
            out.stored.insert(v, copy(&mut graph, &mut order, v));
        }
        for &id in &original.order {
            let operands = match &original.nodes[id].op {
                Op::Contract { .. } | Op::Conv(_) => 2,
                Op::Attention(_) => 3,
                _ => 0,
            };
            let inputs = original.nodes[id].inputs.clone();
            let mut touched = false;
            for (i, v) in inputs.into_iter().enumerate() {
                let mut now = out.stored.get(&v).copied().unwrap_or(v);
                if now == v && i < operands && original.dtype(v) == DType::F32 {
                    now = copy(&mut graph, &mut order, v);
                    touched = true;
                }
                touched |= now != v || out.touched.contains(&v);
                graph.nodes[id].inputs[i] = now;
            }
            order.push(id);
            for v in original.nodes[id].outputs.clone() {
                if narrow.contains(&v) {
                    out.stored.insert(v, copy(&mut graph, &mut order, v));
                    touched = true;
                }
                if touched {
                    out.touched.insert(v);
                }
            }
        }
        graph.order = order;
        for (_, v) in &mut graph.outputs {
            *v = out.stored.get(v).copied().unwrap_or(*v);
        }
        out.graph = graph;
        Some(out)
    }

    /// The value that stands for a value of the original graph.
    pub(crate) fn value(&self, v: ValueId) -> ValueId {
        self.stored.get(&v).copied().unwrap_or(v)
    }

    /// What rounding may cost a value beyond the evaluation's own error, relative to its largest magnitude.
    pub(crate) fn share(&self, v: ValueId) -> f64 {
        if self.touched.contains(&v) { 4.0 * self.unit } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_data::Tensor;
    use tilewright_graph::{GraphBuilder, TensorType};
    use tilewright_interp::{Mode, run};
    use tilewright_layout::Dim;

    /// 1 + 2^-9 has ten digits: `bf16` drops the last, `f16` and TF32 keep it. A sum is not rounded.
    #[test]
    fn operands_of_products_are_rounded_and_sums_are_not() {
        let mut b = GraphBuilder::new("g");
        let d = |n: i64| Dim::new(n);
        let x = b.input("x", TensorType::new(DType::F32, vec![d(1), d(1)]));
        let w = b.constant("w", Tensor::from_f64s(DType::F32, &[1, 1], &[1.0]).unwrap());
        let y = b.contract("mk,kn->mn", x, w).unwrap();
        let z = b.binary(ExprOp::Add, y, x).unwrap();
        b.output("z", z);
        let graph = b.finish();
        let fine = 1.0 + 1.0 / 512.0;
        let input = Tensor::from_f64s(DType::F32, &[1, 1], &[fine]).unwrap();
        for (precision, want) in [
            (Precision::Bf16, 1.0 + fine),
            (Precision::F16, 2.0 * fine),
            (Precision::Tf32, 2.0 * fine),
        ] {
            let rounded = Rounded::of(precision, &graph, &Plan::default()).unwrap();
            tilewright_graph::verify(&rounded.graph).unwrap();
            let got = run(&rounded.graph, std::slice::from_ref(&input), Mode::Exact).unwrap();
            assert_eq!(got[0].get_f64(0), want, "{precision}");
            assert!(rounded.share(z) > 0.0 && rounded.value(z) == z);
        }
        assert!(Rounded::of(Precision::F32, &graph, &Plan::default()).is_none());
    }
}
