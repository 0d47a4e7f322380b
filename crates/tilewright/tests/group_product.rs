//! Products with grouped codes, compiled, against the float64 oracle: sizes that no block divides, groups that do not
//! divide the depth, zeros, scales that are NaN or infinite; and what has no kernel, which runs on the host.

use std::path::Path;
use tilewright::{Compiler, host_cpu};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, GraphBuilder, Op, TensorType};
use tilewright_interp::Mode;
use tilewright_layout::{Dim, Range};

/// Numbers that look random and repeat, in -1..1.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let values = numbers(shape.iter().product(), seed);
    if dtype.is_float() {
        return Tensor::from_f64s(dtype, shape, &values).unwrap();
    }
    let half = f64::from(1u32 << (dtype.bits() - 1));
    let low = if dtype.is_signed_int() { 0.0 } else { half };
    let codes: Vec<i64> = values.iter().map(|v| (v * half + low).floor() as i64).collect();
    Tensor::from_i64s(dtype, shape, &codes).unwrap()
}

struct Case {
    rows: usize,
    n: usize,
    k: usize,
    group: i64,
    codes: DType,
    scales: DType,
    zeros: bool,
}

/// `relu(x W + b)` with `S` rows, a symbol.
fn graph(c: &Case) -> Graph {
    let mut b = GraphBuilder::new("g");
    let s = b.symbol("S", Range { min: 1, max: 4096 });
    let x = b.input("x", TensorType::new(DType::F32, vec![s, Dim::from(c.k)]));
    let groups = c.k.div_ceil(usize::try_from(c.group).unwrap());
    let codes = b.constant("codes", tensor(c.codes, &[c.n, c.k], 1));
    let scales = b.constant("scales", tensor(c.scales, &[c.n, groups], 2));
    let mut operands = vec![x, codes, scales];
    if c.zeros {
        operands.push(b.constant("zeros", tensor(DType::F32, &[c.n, groups], 3)));
    }
    let y = b.op(Op::GroupProduct { group: c.group }, &operands).unwrap();
    let bias = b.constant("bias", tensor(DType::F32, &[c.n], 4));
    let y = b.map_text("{ y, b -> max(y + b, f32(0)) }", &[y, bias]).unwrap();
    b.output("y", y);
    b.finish()
}

fn compilers() -> Vec<Compiler> {
    let Ok(cpu) = host_cpu(2, None) else { return vec![] };
    let mut narrow = cpu.clone();
    narrow.vector_bits = 256;
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    [cpu, narrow].into_iter().map(|cpu| Compiler::for_cpu(cpu, Some(cache.clone()))).collect()
}

/// The worst error beyond `2e-6` of the largest magnitude, as a text; and whether everything ran in kernels.
fn check(graph: &Graph, rows: usize, k: usize, kernels: bool) {
    let x = tensor(DType::F32, &[rows, k], 5);
    let want = tilewright_interp::run(graph, std::slice::from_ref(&x), Mode::F64).unwrap();
    let want = want[0].to_f64s();
    let most = want.iter().filter(|v| v.is_finite()).fold(1.0f64, |m, v| m.max(v.abs()));
    for compiler in compilers() {
        let compiled = compiler.compile_observed(graph.clone(), &mut |_| {}).unwrap();
        let hosts = compiled.plan().steps.iter();
        let hosts = hosts.filter(|s| matches!(s, tilewright_plan::Step::Host { .. })).count();
        assert_eq!(hosts == 0, kernels, "{graph}");
        let mut session = compiled.session().unwrap();
        let got = session.run(std::slice::from_ref(&x)).unwrap().remove(0);
        assert_eq!(got, session.run(std::slice::from_ref(&x)).unwrap()[0]);
        for (i, (got, want)) in got.to_f64s().iter().zip(&want).enumerate() {
            // A group's sum may be infinite where one of its products is NaN.
            let same = got == want || (!got.is_finite() && !want.is_finite());
            assert!(same || (got - want).abs() <= 2e-6 * most, "{i}: {got} and {want}\n{graph}");
        }
    }
}

#[test]
fn sizes_and_groups_that_nothing_divides() {
    let case =
        |rows, n, k, group, codes, scales, zeros| Case { rows, n, k, group, codes, scales, zeros };
    use DType::{BF16, F16, F32, I4, I8, U4, U8};
    for c in [
        case(1, 64, 64, 32, I4, BF16, false),
        case(1, 200, 96, 32, I4, F16, true),
        case(3, 7, 50, 32, I4, F32, false),
        case(7, 130, 33, 16, U4, BF16, true),
        case(1, 1, 5, 7, U4, F32, false),
        case(21, 65, 257, 128, I8, BF16, false),
        case(2, 31, 40, 1, U8, F32, true),
        case(70, 66, 31, 64, I4, F32, true),
        case(6, 70, 40, 16, I4, F32, false),
        case(1, 1100, 72, 24, U4, F16, true),
        case(70, 130, 96, 32, I4, F16, true),
        case(33, 300, 64, 64, U4, F32, false),
    ] {
        check(&graph(&c), c.rows, c.k, true);
    }
}

/// Many rows are multiplied by codes that were unpacked once, few by codes in registers: the same bits.
#[test]
fn a_row_is_the_same_alone_and_among_many() {
    for (codes, group) in [(DType::I4, 32), (DType::U4, 96)] {
        let c = Case { rows: 40, n: 330, k: 192, group, codes, scales: DType::F16, zeros: true };
        let x = tensor(DType::F32, &[c.rows, c.k], 5);
        for compiler in compilers() {
            let compiled = compiler.compile_observed(graph(&c), &mut |_| {}).unwrap();
            let mut session = compiled.session().unwrap();
            let many = session.run(std::slice::from_ref(&x)).unwrap().remove(0).to_f64s();
            for row in [0, 17, 39] {
                let one = &x.to_f64s()[row * c.k..(row + 1) * c.k];
                let one = Tensor::from_f64s(DType::F32, &[1, c.k], one).unwrap();
                let alone = session.run(&[one]).unwrap().remove(0).to_f64s();
                assert_eq!(alone, many[row * c.n..(row + 1) * c.n], "row {row}");
            }
        }
    }
}

/// `x W` with codes of `x` made in the graph, or given with their scales.
fn coded_graph(c: &Case, made: bool) -> Graph {
    let mut b = GraphBuilder::new("g");
    let s = b.symbol("S", Range { min: 1, max: 4096 });
    let groups = c.k / usize::try_from(c.group).unwrap();
    let shape = vec![s.clone(), Dim::from(c.k)];
    let x = b.input("x", TensorType::new(DType::F32, shape));
    let [x, own] = match made {
        true => b.in_codes(x, c.group).unwrap(),
        // Whole numbers, for which codes are exact.
        false => {
            let codes = b.map_text("{ x -> round(x * 127) }", &[x]).unwrap();
            let codes = b.cast(codes, DType::I8).unwrap();
            let part = b.slice_axis(x, 1, Dim::new(0), Dim::from(groups)).unwrap();
            [codes, part]
        }
    };
    let codes = b.constant("codes", tensor(c.codes, &[c.n, c.k], 1));
    let scales = b.constant("scales", tensor(c.scales, &[c.n, groups], 2));
    let mut operands = vec![x, codes, scales, own];
    if c.zeros {
        operands.push(b.constant("zeros", tensor(DType::F32, &[c.n, groups], 3)));
    }
    let y = b.op(Op::GroupProduct { group: c.group }, &operands).unwrap();
    b.output("y", y);
    b.finish()
}

fn coded_cases() -> Vec<Case> {
    let case =
        |rows, n, k, group, codes, scales, zeros| Case { rows, n, k, group, codes, scales, zeros };
    use DType::{BF16, F16, F32, I4, I8, U4, U8};
    vec![
        case(1, 64, 64, 32, I4, BF16, false),
        case(1, 2100, 96, 32, I4, F16, true),
        case(3, 7, 40, 8, I4, F32, false),
        case(7, 130, 32, 16, U4, BF16, true),
        case(1, 600, 256, 128, U4, F32, true),
        case(21, 65, 256, 128, I8, BF16, false),
        case(9, 70, 24, 24, I4, F32, false),
        case(2, 31, 40, 8, U8, F32, true),
    ]
}

#[test]
fn codes_on_both_sides() {
    for c in coded_cases() {
        check(&coded_graph(&c, false), c.rows, c.k, true);
    }
}

/// Codes of activations are those of the rule, but where a quotient lies between two of them; each is a step of at most
/// the group's largest magnitude over 127.
#[test]
fn activations_are_rounded_to_codes() {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let Ok(cpu) = host_cpu(2, None) else { return };
    for c in coded_cases().into_iter().take(3) {
        let graph = coded_graph(&c, true);
        let x = tensor(DType::F32, &[c.rows, c.k], 5);
        let want = tilewright_interp::run(&graph, std::slice::from_ref(&x), Mode::F64).unwrap();
        let compiler = Compiler::for_cpu(cpu.clone(), Some(cache.clone()));
        let compiled = compiler.compile_observed(graph, &mut |_| {}).unwrap();
        let got = compiled.session().unwrap().run(std::slice::from_ref(&x)).unwrap().remove(0);
        let (want, got) = (want[0].to_f64s(), got.to_f64s());
        let most = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        // A code that is rounded the other way: a 127th of one product. There are few.
        let off = got.iter().zip(&want).filter(|(a, b)| (*a - *b).abs() > 2e-6 * most);
        assert!(off.count() * 8 <= c.rows * c.n, "{} x {} x {}", c.rows, c.n, c.k);
        let step = 8.0 * 1.0 / 127.0;
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 2.0 * step));
    }
}

#[test]
fn depths_of_no_whole_steps_run_on_the_host() {
    let c =
        Case { rows: 2, n: 5, k: 12, group: 4, codes: DType::I4, scales: DType::F32, zeros: false };
    check(&coded_graph(&c, false), c.rows, c.k, false);
}

#[test]
fn scales_that_are_not_finite_reach_their_columns_only() {
    let mut b = GraphBuilder::new("g");
    let x = b.input("x", TensorType::new(DType::F32, vec![Dim::new(2), Dim::new(6)]));
    let codes = b.constant("codes", tensor(DType::I4, &[3, 6], 1));
    let scales = [1.0, f64::NAN, 2.0, 0.5, f64::INFINITY, 1.0];
    let scales = b.constant("s", Tensor::from_f64s(DType::BF16, &[3, 2], &scales).unwrap());
    let y = b.op(Op::GroupProduct { group: 4 }, &[x, codes, scales]).unwrap();
    b.output("y", y);
    check(&b.finish(), 2, 6, true);
}

#[test]
fn codes_that_are_no_constant_run_on_the_host() {
    let mut b = GraphBuilder::new("g");
    let x = b.input("x", TensorType::new(DType::F32, vec![Dim::new(2), Dim::new(6)]));
    let codes = b.constant("codes", tensor(DType::I8, &[3, 6], 1));
    let scales = b.constant("s", tensor(DType::F32, &[3, 2], 2));
    // As many scales as there are in `s`, from the input.
    let part = b.slice_axis(x, 1, Dim::new(0), Dim::new(2)).unwrap();
    let part = b.reduce(tilewright_graph::ReduceKind::Sum, part, &[0], true).unwrap();
    let scales = b.map_text("{ s, p -> s * p }", &[scales, part]).unwrap();
    let y = b.op(Op::GroupProduct { group: 3 }, &[x, codes, scales]).unwrap();
    b.output("y", y);
    check(&b.finish(), 2, 6, false);
}

#[test]
fn types_and_shapes_that_do_not_fit_are_refused() {
    let build = |x: DType, codes: DType, scales: DType, groups: usize, group: i64| {
        let mut b = GraphBuilder::new("g");
        let x = b.input("x", TensorType::new(x, vec![Dim::new(2), Dim::new(8)]));
        let codes = b.constant("codes", Tensor::zeros(codes, [3, 8]).unwrap());
        let scales = b.constant("s", Tensor::zeros(scales, [3, groups]).unwrap());
        b.op(Op::GroupProduct { group }, &[x, codes, scales]).map(|_| ())
    };
    use DType::{F32, I4, I16, I32};
    assert!(build(F32, I4, F32, 2, 4).is_ok());
    for (x, codes, scales, groups, group, word) in [
        (F32, I16, F32, 2, 4, "codes"),
        (F32, F32, F32, 2, 4, "codes"),
        (I32, I4, F32, 2, 4, "floating-point"),
        (F32, I4, I32, 2, 4, "floating-point"),
        (F32, I4, F32, 3, 4, "scales"),
        (F32, I4, F32, 2, 0, "groups of 0"),
    ] {
        let error = build(x, codes, scales, groups, group).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
