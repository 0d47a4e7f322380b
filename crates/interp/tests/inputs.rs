//! What users get wrong about inputs is said in their words.

use std::collections::BTreeMap;
use tilewright_base::{DType, Kind};
use tilewright_data::Tensor;
use tilewright_expr::Op as ExprOp;
use tilewright_graph::{Graph, GraphBuilder, Op, TensorType};
use tilewright_interp::graph::{Mode, Options, order_inputs, run, run_with};
use tilewright_layout::{Dim, Range};

/// `y = a + b` on `f32[N, 2]` with N in 1..4.
fn add() -> Graph {
    let mut b = GraphBuilder::new("add");
    let n = b.symbol("N", Range { min: 1, max: 4 });
    let ty = TensorType::new(DType::F32, [n, Dim::new(2)]);
    let (x, y) = (b.input("a", ty.clone()), b.input("b", ty));
    let z = b.binary(ExprOp::Add, x, y).unwrap();
    b.output("z", z);
    b.finish()
}

fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
    Tensor::zeros(dtype, shape).unwrap()
}

#[test]
fn wrong_inputs_are_user_errors() {
    let f = DType::F32;
    let cases: [(&[Tensor], &str); 6] = [
        (&[zeros(f, &[1, 2])], "1 inputs are given, the model takes 2"),
        (&[zeros(f, &[1, 2]), zeros(DType::I64, &[1, 2])], "input `b` is i64"),
        (&[zeros(f, &[1, 2]), zeros(f, &[2, 2])], "N is 1 elsewhere, 2 here"),
        (&[zeros(f, &[1, 2]), zeros(f, &[1, 3])], "input `b`: shape [1, 3] is not [N, 2]"),
        (&[zeros(f, &[2]), zeros(f, &[1, 2])], "has 1 axes, [N, 2] has 2"),
        (&[zeros(f, &[5, 2]), zeros(f, &[5, 2])], "N is 5, outside its range 1..4"),
    ];
    for (inputs, message) in cases {
        let error = run(&add(), inputs, Mode::Exact).unwrap_err();
        assert_eq!(error.kind(), Kind::User);
        assert!(error.to_string().contains(message), "{error} lacks {message}");
    }
    let named =
        BTreeMap::from([("a".to_string(), zeros(f, &[1, 2])), ("c".into(), zeros(f, &[1]))]);
    let error = order_inputs(&add(), &named).unwrap_err();
    assert_eq!(error.notes(), ["input `b` is missing", "there is no input `c`"]);
}

#[test]
fn trace_holds_every_value() {
    let g = add();
    let x = Tensor::from_slice(&[1, 2], &[1f32, 2.]).unwrap();
    let options = Options { trace: true, ..Options::new(Mode::F64) };
    let outcome = run_with(&g, &[x.clone(), x], &options).unwrap();
    assert_eq!(outcome.trace.len(), 3);
    assert_eq!(outcome.trace[&g.outputs[0].1], outcome.outputs[0]);
    assert_eq!(outcome.env["N"], 1);
}

#[test]
fn given_symbols_and_huge_requests() {
    let mut b = GraphBuilder::new("given");
    let n = b.symbol("N", Range { min: 1, max: i64::MAX });
    let ty = TensorType::new(DType::F32, [n]);
    let x = b.op(Op::Iota { ty, axis: 0 }, &[]).unwrap();
    b.output("x", x);
    let g = b.finish();
    let error = run(&g, &[], Mode::Exact).unwrap_err();
    assert!(error.to_string().contains("needs N, which nothing determines"), "{error}");
    let mut options = Options::new(Mode::Exact);
    options.env.insert("N".into(), 3);
    assert_eq!(run_with(&g, &[], &options).unwrap().outputs[0].to_f64s(), [0., 1., 2.]);
    options.env.insert("N".into(), 1 << 33);
    let error = run_with(&g, &[], &options).unwrap_err();
    assert_eq!(error.kind(), Kind::User);
    assert!(error.to_string().contains("8589934592 elements"), "{error}");
}
