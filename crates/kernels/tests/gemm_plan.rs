//! Plans of whole problems: every step of every first choice schedules, keeps the rules, and together
//! they compute the product.

use std::collections::BTreeMap;
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_expr::{FuncBuilder, Op};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, run};
use tilewright_kernels::gemm::{Candidate, Epilogue, Order, Pair, Place, Precision, Problem, plan};
use tilewright_lower_gpu::{Mode as Roles, lower};
use tilewright_target::Gpu;

fn problems() -> Vec<(&'static str, Problem)> {
    use Order::{Col, Row};
    let bf16 = |m, n, k| Problem::dense(m, n, k, DType::BF16, DType::BF16);
    let mut out = vec![
        ("square", bf16(256, 256, 256)),
        ("few rows", bf16(3, 512, 512)),
        ("one row, deep", bf16(1, 64, 2048)),
        ("deep", bf16(64, 64, 4096)),
        ("odd lines", bf16(70, 33, 77)),
        ("transposed", bf16(130, 72, 200).ordered(Col, Row, Col)),
        ("linear layer", bf16(130, 72, 200).ordered(Row, Col, Row)),
    ];
    let mut bias = bf16(20, 136, 1024);
    bias.epilogue = Epilogue::bias(None, DType::F32, DType::BF16);
    out.push(("deep with bias", bias));
    let f8 = Problem::dense(40, 48, 272, DType::F8E4M3, DType::BF16);
    out.push(("f8, row-major right operand", f8));
    let i8 = Problem::dense(40, 48, 272, DType::I8, DType::I32).ordered(Row, Col, Row);
    out.push(("i8", i8));
    let mut tf32 = Problem::dense(70, 40, 72, DType::F32, DType::F32);
    tf32.precision = Precision::Tf32;
    out.push(("tf32, row-major right operand", tf32.clone()));
    tf32.precision = Precision::Tf32x3;
    out.push(("three-part tf32", tf32));
    let mut batched = bf16(70, 40, 72);
    batched.batch = 3;
    out.push(("batched", batched.clone()));
    // Empty sums: the epilogue of zeros.
    out.push(("empty sum", bf16(70, 33, 0)));
    let bias = |mut p: Problem| {
        p.epilogue = Epilogue::bias(None, DType::F32, DType::BF16);
        p
    };
    out.push(("empty sum with bias", bias(bf16(40, 136, 0))));
    out.push(("empty sum, transposed, with bias", bias(bf16(40, 72, 0).ordered(Col, Row, Col))));
    batched.k = 0;
    out.push(("batched empty sum with bias", bias(batched.clone().ordered(Row, Row, Row))));
    out.push(("batched empty sum, transposed", batched.ordered(Row, Row, Col)));
    out.push(("empty sum in i8", Problem::dense(40, 48, 0, DType::I8, DType::I32)));
    out.push(("empty sum in f32", Problem::dense(7, 9, 0, DType::F32, DType::F32)));
    out
}

fn bytes_of(dtype: DType, elements: usize) -> usize {
    elements * dtype.bits() as usize / 8
}

fn fill(dtype: DType, elements: usize, salt: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; bytes_of(dtype, elements)];
    for i in 0..elements {
        let value = ((i * 7 + salt * 5 + i / 11) % 5) as i64 - 2;
        if dtype.is_float() {
            tilewright_data::from_f64(dtype, &mut bytes, i, value as f64);
        } else {
            tilewright_data::from_i64(dtype, &mut bytes, i, value);
        }
    }
    bytes
}

fn read(dtype: DType, bytes: &[u8], i: usize) -> f64 {
    if dtype.is_float() {
        tilewright_data::read_f64(dtype, bytes, i)
    } else {
        tilewright_data::read_i64(dtype, bytes, i) as f64
    }
}

/// Runs a candidate's steps in the interpreter and returns `C`.
fn execute(name: &str, p: &Problem, candidate: &Candidate) -> Vec<u8> {
    let span = |order: Order, rows: i64, cols: i64, leading: i64, stride: i64| {
        let lines = if order == Order::Row { rows } else { cols };
        ((lines * leading).max(stride) * p.batch) as usize
    };
    let a = span(p.order.0, p.m, p.k, p.leading.0, p.stride.0);
    let b = span(p.order.1, p.k, p.n, p.leading.1, p.stride.1);
    let c = span(p.order.2, p.m, p.n, p.leading.2, p.stride.2);
    let cols = p.epilogue.col_vector.unwrap_or(DType::F32);
    let mut places: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    places.insert("A".into(), fill(p.operand, a, 1));
    places.insert("B".into(), fill(p.operand, b, 2));
    places.insert("C".into(), vec![0xff; bytes_of(p.result, c)]);
    places.insert("B2".into(), fill(p.operand, b, 6));
    places.insert("Cols2".into(), fill(cols, p.n as usize, 7));
    places.insert("Cols".into(), fill(cols, p.n as usize, 3));
    let rows = p.epilogue.row_vector.unwrap_or(DType::F32);
    places.insert("Rows".into(), fill(rows, p.m as usize, 4));
    let residual = p.epilogue.residual.unwrap_or(DType::F32);
    places.insert("Residual".into(), fill(residual, c, 5));
    for step in &candidate.steps {
        let program = lower(&step.kernel, &step.schedule)
            .unwrap_or_else(|e| panic!("{name}, {}: {e}", step.schedule));
        if let Err(e) = tilewright_device::verify(&program) {
            panic!("{name}: {e}\n{:#?}\n{program}", e.notes());
        }
        let key = |place: &Place| match place {
            Place::Workspace { offset, .. } => format!("W{offset}"),
            other => format!("{other:?}"),
        };
        let mut buffers: Vec<Vec<u8>> = step
            .operands
            .iter()
            .map(|place| {
                if let Place::Workspace { bytes, .. } = place {
                    places.entry(key(place)).or_insert_with(|| vec![0xff; *bytes as usize]);
                }
                places[&key(place)].clone()
            })
            .collect();
        let options = Options { clusters: 3, mode: Mode::F64, ..Options::default() };
        run(&program, &step.sizes, &mut buffers, &options)
            .unwrap_or_else(|e| panic!("{name}: {e}\n{:#?}", e.notes()));
        for (place, bytes) in step.operands.iter().zip(buffers) {
            places.insert(key(place), bytes);
        }
    }
    places.remove("C").unwrap()
}

/// Runs every other candidate and compares with the product.
fn check(gpu: &Gpu, name: &str, p: &Problem) {
    let candidates = plan(p, gpu, 3).unwrap_or_else(|e| panic!("{name}: {e}"));
    candidates.iter().step_by(2).for_each(|candidate| check_candidate(name, p, candidate));
}

fn check_candidate(name: &str, p: &Problem, candidate: &Candidate) {
    let c = execute(name, p, candidate);
    let at = |order: Order, row: i64, col: i64, leading: i64| {
        (if order == Order::Row { row * leading + col } else { col * leading + row }) as usize
    };
    let all = |rows: i64, cols: i64, leading: i64| {
        (rows.max(cols) * leading.max(1) * p.batch) as usize + 8
    };
    let a = fill(p.operand, all(p.m, p.k, p.leading.0), 1);
    let b = fill(p.operand, all(p.n, p.k, p.leading.1), 2);
    let b2 = fill(p.operand, all(p.n, p.k, p.leading.1), 6);
    let pair = p.epilogue.pair == Pair::Right;
    let vector =
        |dtype: Option<DType>, n: i64, salt: usize| dtype.map(|t| (t, fill(t, n as usize, salt)));
    let e = &p.epilogue;
    let (cols, rows) = (vector(e.col_vector, p.n, 3), vector(e.row_vector, p.m, 4));
    let cols2 = vector(e.col_vector.filter(|_| pair), p.n, 7);
    let residual = vector(e.residual, all(p.m, p.n, p.leading.2) as i64, 5);
    let value = |from: &Option<(DType, Vec<u8>)>, i: usize| {
        from.as_ref().map(|(t, bytes)| read(*t, bytes, i))
    };
    for batch in 0..p.batch {
        for row in (0..p.m).step_by(7) {
            for col in 0..p.n {
                let sum_of = |b: &[u8]| -> f64 {
                    (0..p.k)
                        .map(|k| {
                            let x =
                                (batch * p.stride.0) as usize + at(p.order.0, row, k, p.leading.0);
                            let y =
                                (batch * p.stride.1) as usize + at(p.order.1, k, col, p.leading.1);
                            read(p.operand, &a, x) * read(p.operand, b, y)
                        })
                        .sum()
                };
                let sum = sum_of(&b);
                let z = (batch * p.stride.2) as usize + at(p.order.2, row, col, p.leading.2);
                let mut args = vec![sum];
                args.extend(pair.then(|| sum_of(&b2)));
                args.extend(value(&cols, col as usize));
                args.extend(value(&cols2, col as usize));
                args.extend(value(&rows, row as usize));
                args.extend(value(&residual, z));
                let exact = p.result == DType::I32;
                let want = if exact { sum } else { p.epilogue.func.eval_f64(&args) };
                let got = read(p.result, &c, z);
                let near =
                    if p.result.bits() == 16 { want.abs() / 128.0 } else { 1e-6 * want.abs() };
                assert!(
                    (got - want).abs() <= near,
                    "{name} at ({batch},{row},{col}): {got}, not {want}; {} steps, {}",
                    candidate.steps.len(),
                    candidate.steps.last().unwrap().schedule
                );
            }
        }
    }
}

#[test]
fn plans_compute_the_product() {
    let gpu = Gpu::h200();
    for (name, p) in problems() {
        check(&gpu, name, &p);
    }
}

/// Without the copy engine: Ampere and Ada, and what is newer than Hopper.
#[test]
fn plans_for_other_devices_compute_the_product() {
    use Order::{Col, Row};
    for (i, gpu) in [Gpu::a100(), Gpu::rtx4090(), Gpu::of_capability(86)].iter().enumerate() {
        for (j, (name, p)) in problems().into_iter().enumerate() {
            let f8 = p.operand.is_float() && p.operand.bits() == 8;
            if f8 && gpu.capability < 89 {
                let error = plan(&p, gpu, 1).unwrap_err();
                assert!(error.message().contains("no instructions for f8"), "{error}");
                continue;
            }
            if i > 0 && (i + j) % 8 != 0 && !f8 {
                continue;
            }
            check(gpu, &format!("{name} on {}", gpu.capability), &p);
            for candidate in plan(&p, gpu, 3).unwrap() {
                for step in &candidate.steps {
                    let s = &step.schedule;
                    assert_eq!(s.arch, Arch::of_capability(gpu.capability), "{name}: {s}");
                    assert!(!s.dependent && s.cluster == 1, "{name}: {s}");
                }
            }
        }
        // In parts of the depth, with an ending, and as a pair.
        let bf16 = |m, n, k| Problem::dense(m, n, k, DType::BF16, DType::BF16);
        let mut p = bf16(70, 40, 4_104).ordered(Row, Col, Row);
        p.epilogue = Epilogue::bias(None, DType::F32, DType::BF16);
        check(gpu, "parts", &p);
        let steps = plan(&p, gpu, 1).unwrap().remove(0).steps;
        assert_eq!(steps.len(), 2, "in parts: {}", steps[0].schedule);
        let mut p = bf16(70, 72, 136).ordered(Row, Row, Col);
        p.epilogue = gated(p.sum, p.result);
        check(gpu, "pair", &p);
    }
    assert_eq!(Arch::of_capability(120), Arch::Sm89);
}

/// `(sum * rows + cols) / 2 + R`
fn scaled(to: DType) -> Epilogue {
    let mut f = FuncBuilder::new();
    let [sum, cols, rows, r] = ["sum", "cols", "rows", "r"].map(|name| f.param(name, DType::F32));
    let x = f.op(Op::Mul, &[sum, rows]);
    let x = f.op(Op::Add, &[x, cols]);
    let half = f.constant(0.5, DType::F32);
    let x = f.op(Op::Mul, &[x, half]);
    let x = f.op(Op::Add, &[x, r]);
    let x = f.cast(x, to);
    let t = Some(DType::F32);
    Epilogue { func: f.finish(x), col_vector: t, row_vector: t, residual: t, pair: Pair::None }
}

#[test]
fn few_rows_or_columns_in_every_order() {
    use Order::{Col, Row};
    let gpu = Gpu::h200();
    let order = |bit: usize| if bit == 0 { Row } else { Col };
    for i in 0..8 {
        let (a, b, c) = (order(i & 1), order(i & 2), order(i & 4));
        for (j, (m, n)) in
            [(1, 40), (40, 1), (1, 1), (3, 64), (66, 5), (8, 72)].into_iter().enumerate()
        {
            for (l, k) in [1, 37, 260].into_iter().enumerate() {
                let (operand, result) = [
                    (DType::F32, DType::F32),
                    (DType::BF16, DType::BF16),
                    (DType::I8, DType::I32),
                    (DType::F8E4M3, DType::F32),
                ][(i + j + l) % 4];
                let mut p = Problem::dense(m, n, k, operand, result).ordered(a, b, c);
                if (i + j) % 3 == 0 && operand.is_float() {
                    p.epilogue = scaled(result);
                }
                if (j + l) % 2 == 0 {
                    p.batch = 3;
                }
                check(&gpu, &format!("{operand} {m}x{n}x{k} {a:?} {b:?} {c:?}"), &p);
            }
        }
    }
    // Bytes along the depth are multiplied by fours.
    for (k, fours) in [(256, true), (260, true), (258, false)] {
        let p = Problem::dense(1, 64, k, DType::I8, DType::I32).ordered(Row, Col, Row);
        let best = plan(&p, &gpu, 1).unwrap().remove(0);
        let text = lower(&best.steps[0].kernel, &best.steps[0].schedule).unwrap().to_string();
        assert_eq!(text.contains("by fours"), fours, "{k}: {text}");
        check(&gpu, "bytes by fours", &p);
    }
    // Enough depth for parts, and one that is rounded up; the sums are right although nothing is rounded to TF32.
    for (m, n) in [(1, 96), (7, 40), (24, 2)] {
        let mut p = Problem::dense(m, n, 6_011, DType::F32, DType::F32).ordered(Row, Col, Row);
        p.precision = Precision::Tf32x3;
        p.epilogue = scaled(DType::F32);
        let candidates = plan(&p, &gpu, 200).unwrap();
        let split = candidates.iter().find(|c| c.steps.len() == 2);
        let split = split.unwrap_or_else(|| panic!("{m}x{n}: nothing in parts"));
        check_candidate(&format!("{m}x{n} in parts"), &p, split);
    }
}

/// `max(gate + a, 0) * (up - b)`
fn gated(sum: DType, to: DType) -> Epilogue {
    let mut f = FuncBuilder::new();
    let [gate, up] = ["gate", "up"].map(|name| f.param(name, sum));
    let [a, b] = ["a", "b"].map(|name| f.param(name, DType::F32));
    let [gate, up] = [gate, up].map(|x| f.cast(x, DType::F32));
    let gate = f.op(Op::Add, &[gate, a]);
    let zero = f.constant(0.0, DType::F32);
    let gate = f.op(Op::Max, &[gate, zero]);
    let up = f.op(Op::Sub, &[up, b]);
    let x = f.op(Op::Mul, &[gate, up]);
    let x = f.cast(x, to);
    let (func, col_vector) = (f.finish(x), Some(DType::F32));
    Epilogue { func, col_vector, row_vector: None, residual: None, pair: Pair::Right }
}

/// In either orientation, of every kind, with operands that are copied first, ragged, batched and over empty sums.
#[test]
fn pairs_are_two_products_and_what_follows() {
    use Order::{Col, Row};
    let gpu = Gpu::h200();
    let bf16 = |m, n, k| Problem::dense(m, n, k, DType::BF16, DType::F32);
    let mut problems = vec![
        ("whole tiles", bf16(128, 256, 128)),
        ("few rows", bf16(3, 200, 136).ordered(Row, Col, Row)),
        ("one row", bf16(1, 96, 264).ordered(Row, Col, Row)),
        ("copied operands", bf16(70, 33, 77)),
        ("columns", bf16(70, 40, 72).ordered(Col, Row, Col)),
        ("empty sum", bf16(40, 24, 0)),
        ("f8", Problem::dense(40, 48, 272, DType::F8E4M3, DType::BF16).ordered(Row, Col, Row)),
        ("i8", Problem::dense(40, 48, 144, DType::I8, DType::F32).ordered(Row, Col, Row)),
        ("f32", Problem::dense(40, 48, 72, DType::F32, DType::F32)),
    ];
    problems.push(("tf32", Problem { precision: Precision::Tf32, ..problems[8].1.clone() }));
    problems.push(("tf32x3", Problem { precision: Precision::Tf32x3, ..problems[8].1.clone() }));
    problems.push(("batched", Problem { batch: 3, ..bf16(70, 40, 72).ordered(Row, Col, Row) }));
    for (name, mut p) in problems {
        p.epilogue = gated(p.sum, p.result);
        check(&gpu, name, &p);
        for candidate in plan(&p, &gpu, 3).unwrap() {
            let last = candidate.steps.last().unwrap();
            assert!(last.operands.contains(&Place::Cols2), "{name}");
        }
    }
    // In parts of the depth: on tensor cores (either orientation), by plain multiply-adds, and with few rows or columns.
    let f32s = |m, n, k| Problem::dense(m, n, k, DType::F32, DType::F32).ordered(Row, Col, Row);
    for (name, mut p) in [
        ("bf16 in parts", bf16(64, 40, 4_100).ordered(Row, Col, Row)),
        ("bf16 columns in parts", bf16(40, 64, 4_104).ordered(Row, Col, Col)),
        ("f32 in parts", f32s(33, 40, 1_100)),
        ("one row in parts", bf16(1, 96, 6_011).ordered(Row, Col, Row)),
        ("five columns in parts", f32s(64, 5, 6_011)),
    ] {
        p.epilogue = gated(p.sum, p.result);
        let candidates = plan(&p, &gpu, 40).unwrap();
        let in_parts = |c: &&Candidate| {
            c.steps.iter().any(|s| s.operands.iter().any(|o| matches!(o, Place::Workspace { .. })))
        };
        let split = candidates.iter().find(in_parts);
        let split = split.unwrap_or_else(|| panic!("{name}: nothing in parts"));
        check_candidate(name, &p, split);
    }
    // Few rows and few columns by the kernels of few vectors, in every order.
    for i in 0..8 {
        let order = |bit: usize| if i & bit == 0 { Row } else { Col };
        let (a, b, c) = (order(1), order(2), order(4));
        for (m, n, k) in [(1, 40, 37), (3, 64, 260), (66, 2, 100)] {
            let (operand, result) =
                [(DType::F32, DType::F32), (DType::BF16, DType::BF16), (DType::I8, DType::F32)]
                    [(i + m as usize) % 3];
            let mut p = Problem::dense(m, n, k, operand, result).ordered(a, b, c);
            p.batch = 1 + i as i64 % 2;
            p.epilogue = gated(p.sum, p.result);
            let candidates = plan(&p, &gpu, 40).unwrap();
            let vectors =
                candidates.iter().find(|c| &*c.steps.last().unwrap().kernel.name == "gemv");
            let name = format!("{operand} {m}x{n}x{k} {a:?} {b:?} {c:?}");
            let vectors = vectors.unwrap_or_else(|| panic!("{name}: no kernel for vectors"));
            check_candidate(&name, &p, vectors);
        }
    }
    // Every other line of one matrix: both operands have its lines' distance twice.
    let mut p = bf16(70, 40, 72).ordered(Row, Col, Row);
    (p.leading.1, p.stride.1) = (2 * 72, 0);
    p.epilogue = gated(p.sum, p.result);
    check(&gpu, "interleaved", &p);
    let wrong = Problem { epilogue: p.epilogue.transposed(), ..p };
    assert_eq!(plan(&wrong, &gpu, 1).unwrap_err().exit_code(), 2);
}

#[test]
fn impossible_problems_are_the_users_mistake() {
    let gpu = Gpu::h200();
    let mut p = Problem::dense(8, 8, 8, DType::BF16, DType::BF16);
    p.leading.0 = 4;
    assert_eq!(plan(&p, &gpu, 1).unwrap_err().exit_code(), 2);
    let p = Problem::dense(-1, 8, 8, DType::BF16, DType::BF16);
    assert_eq!(plan(&p, &gpu, 1).unwrap_err().exit_code(), 2);
}

#[test]
fn an_empty_result_needs_no_launch() {
    for (m, n, k, batch) in [(0, 8, 8, 1), (8, 0, 8, 1), (8, 8, 8, 0), (0, 8, 0, 1), (8, 0, 0, 3)] {
        let mut p = Problem::dense(m, n, k, DType::BF16, DType::BF16);
        p.batch = batch;
        let candidates = plan(&p, &Gpu::h200(), 3).unwrap();
        assert!(candidates.len() == 1 && candidates[0].steps.is_empty(), "{m} {n} {k} {batch}");
    }
}

/// What every element costs after its sum hides behind the products of another consumer, when there is enough of it.
#[test]
fn dear_epilogues_run_beside_products() {
    let gelu = || {
        let mut f = FuncBuilder::new();
        let (sum, bias) = (f.param("sum", DType::F32), f.param("bias", DType::F32));
        let x = f.op(Op::Add, &[sum, bias]);
        let e = f.op(Op::Erf, &[x]);
        let y = f.op(Op::Mul, &[x, e]);
        let y = f.cast(y, DType::BF16);
        f.finish(y)
    };
    let mut p = Problem::dense(4096, 3072, 768, DType::BF16, DType::BF16);
    let first = |p: &Problem| plan(p, &Gpu::h200(), 1).unwrap().remove(0);
    let cheap = first(&p);
    p.epilogue = Epilogue {
        func: gelu(),
        col_vector: Some(DType::F32),
        row_vector: None,
        residual: None,
        pair: Pair::None,
    };
    let dear = first(&p);
    assert_eq!(dear.steps[0].schedule.mode, Roles::PingPong, "{}", dear.steps[0].schedule);
    assert!(dear.estimate_us > cheap.estimate_us);
}
