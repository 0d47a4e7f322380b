//! Operators without a kernel run in the interpreter, with every size that the run knows: their
//! attributes may name sizes that no operand of theirs has.

use tilewright::{Compiler, Cpu, Tensor};
use tilewright_base::DType;
use tilewright_graph::{Graph, GraphBuilder, HostOp, Op, PadMode, TensorType};
use tilewright_interp::{Mode, run};
use tilewright_layout::{Dim, Range};

/// Runs a graph compiled and in the interpreter; all operators here copy numbers, so both agree
/// exactly.
fn agrees(graph: &Graph, inputs: &[Tensor]) {
    let Ok(cpu) = Cpu::detect(2) else { return };
    tilewright_graph::verify(graph).expect("a valid graph");
    let compiler = Compiler::for_cpu(cpu, None);
    let compiled = compiler.compile_observed(graph.clone(), &mut |_| {}).expect("it compiles");
    let host_steps = compiled.plan().steps.iter();
    let host_steps = host_steps.filter(|s| matches!(s, tilewright_plan::Step::Host { .. })).count();
    assert!(host_steps > 0, "nothing runs on the host:\n{graph}");
    let mut session = compiled.session().unwrap();
    let want = run(graph, inputs, Mode::Exact).expect("the interpreter runs it");
    // Twice: the second run finds its sizes bound.
    for _ in 0..2 {
        let got = session.run(inputs).unwrap_or_else(|e| panic!("{e:?}\n{graph}"));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert_eq!((got.shape(), got.bytes()), (want.shape(), want.bytes()), "{graph}");
        }
    }
}

fn numbers(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count).map(|i| ((i * 7919) % 101) as f64 - 50.0).collect();
    Tensor::from_f64s(DType::F32, shape, &values).unwrap()
}

#[test]
fn topk_of_a_count_that_another_input_has() {
    let mut b = GraphBuilder::new("topk");
    let n = b.symbol("N", Range { min: 1, max: 64 });
    let k = b.symbol("K", Range { min: 1, max: 8 });
    let x = b.input("x", TensorType::new(DType::F32, [n, Dim::new(16)]));
    let like = b.input("like", TensorType::new(DType::F32, [k.clone()]));
    let top =
        b.node(Op::TopK { axis: 1, k: k.clone() + Dim::new(1), largest: true }, &[x]).unwrap();
    let doubled = b.map_text("{ x -> 2 * x }", &[like]).unwrap();
    b.output("values", top[0]);
    b.output("doubled", doubled);
    agrees(&b.finish(), &[numbers(&[5, 16]), numbers(&[3])]);
}

#[test]
fn reflecting_borders_as_wide_as_another_input() {
    let mut b = GraphBuilder::new("pad");
    let n = b.symbol("N", Range { min: 8, max: 64 });
    let w = b.symbol("W", Range { min: 1, max: 7 });
    let x = b.input("x", TensorType::new(DType::F32, [n]));
    let like = b.input("like", TensorType::new(DType::F32, [w.clone()]));
    let pad = Op::Pad { lo: vec![w.clone()], hi: vec![Dim::new(1)], mode: PadMode::Reflect };
    let y = b.op(pad, &[x]).unwrap();
    let z = b.map_text("{ x -> x + 1 }", &[y]).unwrap();
    b.output("y", z);
    b.output("like", like);
    agrees(&b.finish(), &[numbers(&[9]), numbers(&[4])]);
}

#[test]
fn topk_of_a_count_that_is_found_while_running() {
    let mut b = GraphBuilder::new("found");
    let found = b.symbol("found", Range { min: 0, max: 8 });
    let x = b.input("x", TensorType::new(DType::F32, [Dim::new(16)]));
    let flags = b.input("flags", TensorType::new(DType::F32, [Dim::new(8)]));
    let types = vec![TensorType::new(DType::I64, [Dim::new(1), found.clone()])];
    let host = HostOp { name: "nonzero".into(), attrs: vec![], types };
    let places = b.op(Op::Host(host), &[flags]).unwrap();
    let top = b.node(Op::TopK { axis: 0, k: found, largest: true }, &[x]).unwrap();
    b.output("places", places);
    b.output("values", top[0]);
    let flags = Tensor::from_f64s(DType::F32, &[8], &[0., 1., 0., 2., 3., 0., 0., 1.]).unwrap();
    agrees(&b.finish(), &[numbers(&[16]), flags]);
}
