//! The fusion planner chooses by estimated time: other machines, other groupings; each of them
//! right, none estimated slower than the greedy one, and the same every time.

mod support;

use support::{check_with, dims, f32s, host, numbers, steps, tensor};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{Func, FuncBuilder, Op as ExprOp};
use tilewright_graph::{ConvAttrs, Graph, GraphBuilder, Op, ReduceKind, TensorType, ValueId};
use tilewright_lower::{Choice, CpuTarget, FusionPlan, Layouts, Options, lower_with};
use tilewright_passes::{PassContext, choose_layouts};

/// A machine whose memory is slow at every level.
fn slow_memory() -> CpuTarget {
    let target = CpuTarget::avx2();
    CpuTarget { bytes_per_second: 1e8, l2_bytes_per_second: 1e8, launch_ns: 10.0, ..target }
}

/// A machine whose arithmetic is slow.
fn slow_arithmetic() -> CpuTarget {
    CpuTarget { flops_per_second: 1e8, launch_ns: 10.0, ..CpuTarget::avx2() }
}

/// A machine whose memory is slow but for its caches, which hold next to nothing.
fn far_memory() -> CpuTarget {
    let (l2_bytes, l3_bytes) = (16 << 10, 16 << 10);
    let target = CpuTarget { l2_bytes, l3_bytes, ..CpuTarget::avx2() };
    CpuTarget { bytes_per_second: 1e8, l2_bytes_per_second: 1e11, ..target }
}

/// Lowers for a machine, checks the values against the oracle and what holds of every choice.
fn plan(graph: &Graph, inputs: &[Tensor], target: &CpuTarget) -> (Vec<String>, FusionPlan) {
    let options = Options::default();
    let plan = check_with(graph, inputs, &Layouts::new(), target, &options);
    let lowered = || lower_with(graph, target, &Layouts::new(), &host, &options).unwrap().1;
    let (fusion, again) = (lowered(), lowered());
    assert_eq!(fusion.to_string(), again.to_string(), "the same every time");
    assert!(fusion.estimate_ns <= fusion.greedy_ns, "{fusion}");
    let greedy = Options { fusion: Choice::Greedy, ..Options::default() };
    let greedy = lower_with(graph, target, &Layouts::new(), &host, &greedy).unwrap().1;
    assert_eq!(greedy.estimate_ns, fusion.greedy_ns);
    (steps(&plan), fusion)
}

/// How many groups compute a node of this operator.
fn computed(graph: &Graph, fusion: &FusionPlan, wanted: ExprOp) -> usize {
    let here = |op: &Op| matches!(op, Op::Map(f) if f.as_single_op() == Some(wanted));
    let groups = fusion.groups.iter().filter(|g| !g.outputs.is_empty());
    groups.filter(|g| g.nodes.iter().any(|&n| here(&graph.nodes[n].op))).count()
}

fn sum(b: &mut GraphBuilder, x: ValueId, axis: usize) -> ValueId {
    b.node(Op::Reduce { kind: ReduceKind::Sum, axes: vec![axis], keep: false }, &[x]).unwrap()[0]
}

/// `exp(a + b)` of a column and a row, summed over rows and over columns: the table is large, what
/// it is made of is small.
fn table() -> (Graph, Vec<Tensor>) {
    let mut b = GraphBuilder::new("table");
    let column = b.input("a", f32s(&[96, 1]));
    let row = b.input("b", f32s(&[1, 128]));
    let added = b.node(Op::Map(Func::binary(ExprOp::Add, DType::F32)), &[column, row]).unwrap()[0];
    let table = b.node(Op::Map(Func::unary(ExprOp::Exp, DType::F32)), &[added]).unwrap()[0];
    let over_rows = sum(&mut b, table, 0);
    let over_columns = sum(&mut b, table, 1);
    b.output("over_rows", over_rows);
    b.output("over_columns", over_columns);
    (b.finish(), vec![tensor(DType::F32, &[96, 1], 1), tensor(DType::F32, &[1, 128], 2)])
}

#[test]
fn a_table_is_stored_or_computed_twice_as_the_machine_says() {
    let (graph, inputs) = table();
    let (_, recomputed) = plan(&graph, &inputs, &slow_memory());
    assert_eq!(computed(&graph, &recomputed, ExprOp::Exp), 2, "{recomputed}");
    let (_, stored) = plan(&graph, &inputs, &slow_arithmetic());
    assert_eq!(computed(&graph, &stored, ExprOp::Exp), 1, "{stored}");
}

#[test]
fn what_long_rows_walk_over_is_stored_first_when_arithmetic_is_dear() {
    // Rows that no tile holds are walked three times.
    let mut b = GraphBuilder::new("long");
    let x = b.input("x", f32s(&[2, 40_000]));
    let y = b.node(Op::Map(Func::unary(ExprOp::Erf, DType::F32)), &[x]).unwrap()[0];
    let z = b.node(Op::Softmax { axis: 1, log: false }, &[y]).unwrap()[0];
    b.output("z", z);
    let graph = b.finish();
    let inputs = [tensor(DType::F32, &[2, 40_000], 3)];
    assert_eq!(plan(&graph, &inputs, &slow_memory()).0, ["erf_softmax"]);
    assert_eq!(plan(&graph, &inputs, &slow_arithmetic()).0, ["erf", "softmax"]);
}

#[test]
fn an_epilogue_becomes_a_prologue_where_less_is_stored() {
    // A product in bf16, widened for a normalisation: the narrow values are half the bytes.
    let bf16 = |shape: &[i64]| TensorType::new(DType::BF16, dims(shape));
    let mut b = GraphBuilder::new("widen");
    let (x, w) = (b.input("x", bf16(&[64, 16])), b.input("w", bf16(&[16, 48])));
    let product = Op::Contract {
        lhs: "mk".into(),
        rhs: "kn".into(),
        out: "mn".into(),
        acc: DType::F32,
        dtype: DType::BF16,
    };
    let y = b.node(product, &[x, w]).unwrap()[0];
    let mut f = FuncBuilder::new();
    let narrow = f.param("x", DType::BF16);
    let wide = f.cast(narrow, DType::F32);
    let y = b.node(Op::Map(f.finish(wide)), &[y]).unwrap()[0];
    let z = b.node(Op::Softmax { axis: 1, log: false }, &[y]).unwrap()[0];
    b.output("z", z);
    let graph = b.finish();
    // Small whole numbers: the products are exact in bf16.
    let whole = |shape: &[usize], seed: u64| {
        let values: Vec<f64> =
            numbers(shape.iter().product(), seed).iter().map(|v| v.round()).collect();
        Tensor::from_f64s(DType::BF16, shape, &values).unwrap()
    };
    let inputs = [whole(&[64, 16], 4), whole(&[16, 48], 5)];
    assert_eq!(plan(&graph, &inputs, &slow_memory()).0, ["contract", "cast_softmax"]);
    let greedy = Options { fusion: Choice::Greedy, ..Options::default() };
    let greedy = check_with(&graph, &inputs, &Layouts::new(), &slow_memory(), &greedy);
    assert_eq!(steps(&greedy), ["contract_cast", "softmax"]);
}

#[test]
fn the_text_says_what_was_considered() {
    let (graph, inputs) = table();
    let (_, fusion) = plan(&graph, &inputs, &slow_memory());
    let text = fusion.to_string();
    let first = text.lines().next().unwrap();
    assert!(first.contains("greedy: ") && first.contains(" alternatives, "), "{text}");
    assert!(text.contains("taken: ") && text.contains(" instead of "), "{text}");
    assert_eq!(text.matches("taken: ").count(), fusion.decisions.len(), "{text}");
    let (_, fusion) = plan(&graph, &inputs, &slow_arithmetic());
    assert!(fusion.to_string().contains("not: compute exp"), "{fusion}");
}

#[test]
fn an_operand_is_computed_in_its_product_where_that_is_sooner() {
    // A gate along the depth, and a product of few or many blocks of columns: each of them gates the rows again.
    let graph = |columns: i64| {
        let mut b = GraphBuilder::new("gated");
        let (x, gate) = (b.input("x", f32s(&[96, 64])), b.input("gate", f32s(&[64])));
        let w = b.input("w", f32s(&[64, columns]));
        let y = b.node(Op::Map(Func::binary(ExprOp::Mul, DType::F32)), &[x, gate]).unwrap()[0];
        let z = b.contract("mk,kn->mn", y, w).unwrap();
        b.output("z", z);
        b.finish()
    };
    let inputs = |columns: usize| {
        [(&[96, 64][..], 1), (&[64], 2), (&[64, columns], 3)]
            .map(|(shape, seed)| tensor(DType::F32, shape, seed))
    };
    let (one, fusion) = plan(&graph(16), &inputs(16), &far_memory());
    assert_eq!(one, ["mul_contract"], "{fusion}");
    assert!(fusion.to_string().contains("prologue: mul computes operand 0"), "{fusion}");
    let (many, fusion) = plan(&graph(512), &inputs(512), &slow_arithmetic());
    assert_eq!(many, ["mul", "contract"], "{fusion}");
    assert!(fusion.to_string().contains("not: move mul into its only reader"), "{fusion}");
}

#[test]
fn gates_before_pointwise_convolutions_are_computed_in_them() {
    // As after squeeze and excitation, with a gate that is itself made here, row-major and in blocks of channels.
    let mut b = GraphBuilder::new("excited");
    let x = b.input("x", f32s(&[2, 24, 12, 10]));
    let squeezed = b.input("squeezed", f32s(&[2, 24, 1, 1]));
    let w = b.constant("w", tensor(DType::F32, &[16, 24, 1, 1], 3));
    let gate = b.node(Op::Map(Func::unary(ExprOp::Sigmoid, DType::F32)), &[squeezed]).unwrap()[0];
    let y = b.node(Op::Map(Func::binary(ExprOp::Mul, DType::F32)), &[x, gate]).unwrap()[0];
    let attrs = ConvAttrs {
        strides: vec![1; 2],
        pads_lo: vec![0; 2],
        pads_hi: vec![0; 2],
        dilations: vec![1; 2],
        groups: 1,
    };
    let z = b.node(Op::Conv(attrs), &[y, w]).unwrap()[0];
    b.output("z", z);
    let graph = b.finish();
    let inputs = [tensor(DType::F32, &[2, 24, 12, 10], 1), tensor(DType::F32, &[2, 24, 1, 1], 2)];
    let context = PassContext { vector_lanes: 4, panel_width: 8, ..PassContext::default() };
    for layouts in [Layouts::new(), choose_layouts(&graph, &context)] {
        let plan = check_with(&graph, &inputs, &layouts, &far_memory(), &Options::default());
        let steps = steps(&plan);
        assert!(steps.last().is_some_and(|s| s.ends_with("mul_conv")), "{steps:?}");
        assert!(steps.iter().all(|s| s != "mul"), "{steps:?}");
    }
}

#[test]
fn a_transposed_right_operand_is_copied_when_many_blocks_would_gather_it() {
    // `x y^T` with rows in `y`: how many blocks of rows read it decides.
    let graph = |rows: i64| {
        let mut b = GraphBuilder::new("transposed");
        let (x, y) = (b.input("x", f32s(&[rows, 64])), b.input("y", f32s(&[48, 64])));
        let z = b.contract("mk,nk->mn", x, y).unwrap();
        b.output("z", z);
        b.finish()
    };
    let launch_free = CpuTarget { launch_ns: 10.0, ..CpuTarget::avx2() };
    let inputs =
        |rows: usize| [tensor(DType::F32, &[rows, 64], 1), tensor(DType::F32, &[48, 64], 2)];
    let (few, fusion) = plan(&graph(3), &inputs(3), &launch_free);
    assert_eq!(few, ["contract"], "{fusion}");
    assert!(fusion.to_string().contains("not: copy y transposed"), "{fusion}");
    let (many, fusion) = plan(&graph(300), &inputs(300), &launch_free);
    assert_eq!(many, ["copy", "contract"], "{fusion}");
    assert!(fusion.to_string().contains("taken: copy y transposed"), "{fusion}");
    // A copy through slow memory costs more than gathering again.
    assert_eq!(plan(&graph(300), &inputs(300), &slow_memory()).0, ["contract"]);
}
