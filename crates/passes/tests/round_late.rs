//! Roundings between elementwise operators: which go, which stay.

use tilewright_base::DType;
use tilewright_graph::{Constants, Graph, Op};
use tilewright_passes::round_late;

fn types(text: &str) -> (bool, Vec<DType>) {
    let parsed = Graph::parse_with("g", text, Constants::Seeded(1));
    let mut graph: Graph = parsed.unwrap_or_else(|e| panic!("{e}"));
    let changed = round_late(&mut graph).unwrap_or_else(|e| panic!("{e}"));
    tilewright_graph::verify(&graph).unwrap_or_else(|e| panic!("{e}"));
    let maps = graph.live().filter(|(_, n)| matches!(n.op, Op::Map(_)));
    (changed, maps.map(|(_, n)| graph.dtype(n.outputs[0])).collect())
}

#[test]
fn a_chain_is_rounded_once() {
    let text = r#"graph @g {
  %0 "x": bf16[4,8] = input
  %1: bf16[4,8] = map { x -> bf16(f32(x) * 0.5) } %0
  %2: bf16[4,8] = map { x -> bf16(tanh(f32(x))) } %1
  %3: bf16[4,8] = map { x, y -> bf16(f32(x) * (1.0 + f32(y))) } %1, %2
  return "y": %3
}
"#;
    assert_eq!(types(text), (true, vec![DType::F32, DType::F32, DType::BF16]));
}

#[test]
fn what_is_stored_asked_for_or_summed_stays() {
    let text = r#"graph @g {
  %0 "x": bf16[4,8] = input
  %1: bf16[4,8] = map { x -> bf16(f32(x) * 0.5) } %0
  %2: bf16[4,8] = map { x -> bf16(tanh(f32(x))) } %1
  %3: f32[4,8] = map { x -> f32(x) } %2
  %4: f32[4,1] = reduce sum axes=[1] keep %3
  return "y": %2, "s": %4
}
"#;
    // %2 is a result; %1 leads to it alone.
    assert_eq!(types(text), (true, vec![DType::F32, DType::BF16, DType::F32]));
    let text = r#"graph @g {
  %0 "x": f32[4,8] = input
  %1: bf16[4,8] = map { x -> bf16(x) } %0
  %2: f32[4,8] = map { x -> f32(x) * 2.0 } %1
  return "y": %2
}
"#;
    assert_eq!(types(text), (false, vec![DType::BF16, DType::F32]));
    let text = r#"graph @g {
  %0 "x": bf16[4,8] = input
  %1: bf16[4,8] = map { x -> bf16(f32(x) * 0.5) } %0
  %2: f32[4,8] = map { x -> f32(x) } %1
  %3: f32[4,1] = reduce sum axes=[1] keep %2
  return "s": %3
}
"#;
    assert_eq!(types(text), (false, vec![DType::BF16, DType::F32]));
}
