//! Sums over rows that products leave, and that products read: every way to run them gives the same in the device interpreter.

use std::collections::BTreeMap;
use std::path::Path;
use tilewright_base::DType;
use tilewright_cuda::{Arch, CompileRequest, Nvrtc};
use tilewright_emit_cuda::{COMPILER_OPTIONS, emit, headers};
use tilewright_expr::{Func, FuncBuilder, Op};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, run};
use tilewright_kernels::gemm::{
    Candidate, Epilogue, Order, PART, Pair, Place, Precision, Problem, RowSums, Statistics,
    choices, plan_untuned,
};
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

/// `x * x`, summed in f32.
fn square(from: DType) -> Func {
    let mut f = FuncBuilder::new();
    let x = f.param("x", from);
    let x = f.cast(x, DType::F32);
    let y = f.op(Op::Mul, &[x, x]);
    f.finish(y)
}

/// `sum / 4 + 1`: whole quarters stay exact.
fn quarter() -> Func {
    let mut f = FuncBuilder::new();
    let sum = f.param("sum", DType::F32);
    let (four, one) = (f.constant(4.0, DType::F32), f.constant(1.0, DType::F32));
    let x = f.op(Op::Div, &[sum, four]);
    let x = f.op(Op::Add, &[x, one]);
    f.finish(x)
}

/// `sum + residual`.
fn added(to: DType) -> Epilogue {
    let mut f = FuncBuilder::new();
    let (sum, r) = (f.param("sum", DType::F32), f.param("r", to));
    let r = f.cast(r, DType::F32);
    let x = f.op(Op::Add, &[sum, r]);
    let x = f.cast(x, to);
    Epilogue {
        func: f.finish(x),
        col_vector: None,
        row_vector: None,
        residual: Some(to),
        pair: Pair::None,
    }
}

/// `sum * row`, of a pair `(sum + second sum) * row`.
fn scaled(to: DType, pair: Pair) -> Epilogue {
    let mut f = FuncBuilder::new();
    let mut sum = f.param("sum", DType::F32);
    if pair == Pair::Right {
        let second = f.param("sum2", DType::F32);
        sum = f.op(Op::Add, &[sum, second]);
    }
    let r = f.param("r", DType::F32);
    let x = f.op(Op::Mul, &[sum, r]);
    let x = f.cast(x, to);
    let (func, row_vector) = (f.finish(x), Some(DType::F32));
    Epilogue { func, col_vector: None, row_vector, residual: None, pair }
}

fn parts(n: i64) -> i64 {
    (n + PART - 1) / PART
}

/// The products' numbers are small and whole: sums are exact in every order.
fn value(i: usize, salt: usize) -> f64 {
    ((i * 7 + salt * 5 + i / 11) % 3) as f64 - 1.0
}

fn fill(dtype: DType, elements: usize, salt: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; elements * dtype.size()];
    (0..elements).for_each(|i| tilewright_data::from_f64(dtype, &mut bytes, i, value(i, salt)));
    bytes
}

fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    (0..bytes.len() / dtype.size()).map(|i| tilewright_data::read_f64(dtype, bytes, i)).collect()
}

/// Runs a candidate's steps in the interpreter; returns what is in `C` and in the sums that are left.
fn execute(p: &Problem, candidate: &Candidate) -> [Vec<f64>; 2] {
    let mut places: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let (m, n, k) = (p.m as usize, p.n as usize, p.k as usize);
    let read = p.statistics.reads.as_ref().map_or(1, |r| r.parts as usize);
    let elements = [
        ("A", p.operand, m * k, 1),
        ("B", p.operand, k * n, 2),
        ("B2", p.operand, k * n, 6),
        ("Rows", DType::F32, m * read, 4),
        ("Residual", p.result, m * n, 5),
    ];
    for (name, dtype, elements, salt) in elements {
        places.insert(name.into(), fill(dtype, elements, salt));
    }
    places.insert("C".into(), vec![0xff; m * n * p.result.size()]);
    places.insert("Parts".into(), vec![0xff; m * parts(p.n) as usize * 4]);
    for step in &candidate.steps {
        let program = lower(&step.kernel, &step.schedule)
            .unwrap_or_else(|e| panic!("{}: {e}", step.schedule));
        if let Err(e) = tilewright_device::verify(&program) {
            panic!("{e}\n{:#?}\n{program}", e.notes());
        }
        let key = |place: &Place| match place {
            Place::Workspace { offset, .. } => format!("W{offset}"),
            other => format!("{other:?}"),
        };
        let mut buffers = Vec::new();
        for place in &step.operands {
            if let Place::Workspace { bytes, .. } = place {
                places.entry(key(place)).or_insert_with(|| vec![0xff; *bytes as usize]);
            }
            buffers.push(places[&key(place)].clone());
        }
        let options = Options { clusters: 3, mode: Mode::F64, ..Options::default() };
        run(&program, &step.sizes, &mut buffers, &options)
            .unwrap_or_else(|e| panic!("{}: {e}\n{:#?}", step.schedule, e.notes()));
        for (place, bytes) in step.operands.iter().zip(buffers) {
            places.insert(key(place), bytes);
        }
    }
    [numbers(p.result, &places["C"]), numbers(DType::F32, &places["Parts"])]
}

/// What a problem gives.
fn expected(p: &Problem) -> [Vec<f64>; 2] {
    let (m, n, k) = (p.m as usize, p.n as usize, p.k as usize);
    let right = |i: usize, j: usize, salt: usize| {
        value(if p.order.1 == Order::Row { i * n + j } else { j * k + i }, salt)
    };
    let read = p.statistics.reads.as_ref().map_or(1, |r| r.parts as usize);
    let mut c = vec![0.0; m * n];
    let mut left = vec![0.0; m * parts(p.n) as usize];
    for i in 0..m {
        let sum: f64 = (0..read).map(|j| value(i * read + j, 4)).sum();
        for j in 0..n {
            let product = |salt: usize| -> f64 {
                (0..k).map(|x| value(i * k + x, 1) * right(x, j, salt)).sum()
            };
            let mut args = vec![product(2)];
            if p.epilogue.pair == Pair::Right {
                args.push(product(6));
            }
            if let Some(sums) = &p.statistics.reads {
                args.push(sums.func.eval_f64(&[sum]));
            }
            args.extend(p.epilogue.residual.map(|_| value(i * n + j, 5)));
            let y = p.epilogue.func.eval_f64(&args);
            c[i * n + j] = y;
            left[i * parts(p.n) as usize + j / PART as usize] += y * y;
        }
    }
    [c, left]
}

/// Checks the first ways.
fn check(name: &str, gpu: &Gpu, p: &Problem) {
    let wanted = expected(p);
    let ways = plan_untuned(p, gpu, 3).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(!ways.is_empty(), "{name}");
    for way in &ways {
        let got = execute(p, way);
        let schedules: Vec<String> =
            way.steps.iter().map(|s| format!("{} {}", s.kernel.name, s.schedule)).collect();
        assert_eq!(got[0], wanted[0], "{name}: result of {schedules:?}");
        if p.statistics.leaves.is_some() {
            assert_eq!(got[1], wanted[1], "{name}: sums of {schedules:?}");
        }
    }
}

fn problem(m: i64, n: i64, k: i64, operand: DType) -> Problem {
    let precision = if operand == DType::F32 { Precision::Tf32 } else { Precision::F32 };
    let p = Problem::dense(m, n, k, operand, operand).ordered(Order::Row, Order::Col, Order::Row);
    Problem { precision, ..p }
}

fn leaving(p: Problem) -> Problem {
    let leaves = Some(square(p.result));
    let epilogue = added(p.result);
    Problem { epilogue, statistics: Statistics { leaves, reads: None }, ..p }
}

fn reading(p: Problem, parts: i64, pair: Pair) -> Problem {
    let reads = Some(RowSums { parts, func: quarter() });
    // Quarters of larger numbers are exact in f32.
    let (epilogue, result) = (scaled(DType::F32, pair), DType::F32);
    Problem { epilogue, result, statistics: Statistics { reads, leaves: None }, ..p }
}

#[test]
fn products_leave_sums_over_their_rows() {
    let gpu = Gpu::h200();
    check("whole parts", &gpu, &leaving(problem(130, 128, 72, DType::BF16)));
    check("a part of eight columns", &gpu, &leaving(problem(70, 200, 64, DType::F16)));
    check("tf32", &gpu, &leaving(problem(70, 72, 32, DType::F32)));
    check("a row", &gpu, &leaving(problem(1, 72, 256, DType::BF16)));
    check("odd lines", &gpu, &leaving(problem(70, 33, 77, DType::BF16)));
    check("an empty sum", &gpu, &leaving(problem(40, 72, 0, DType::BF16)));
    check("without the copy engine", &Gpu::a100(), &leaving(problem(70, 72, 64, DType::BF16)));
}

#[test]
fn products_read_sums_over_their_rows() {
    let gpu = Gpu::h200();
    let p = problem(130, 72, 64, DType::BF16);
    check("one part", &gpu, &reading(p.clone(), 1, Pair::None));
    check("parts of a chunk and a half", &gpu, &reading(p.clone(), 12, Pair::None));
    check("many parts", &gpu, &reading(p.clone(), 40, Pair::None));
    check("a pair", &gpu, &reading(p.clone(), 3, Pair::Right));
    check("tf32", &gpu, &reading(problem(70, 40, 32, DType::F32), 5, Pair::None));
    check("a row", &gpu, &reading(problem(1, 72, 256, DType::BF16), 4, Pair::None));
    check("without the copy engine", &Gpu::a100(), &reading(p.clone(), 4, Pair::None));
    let mut both = reading(p, 4, Pair::None);
    both.statistics.leaves = Some(square(DType::F32));
    // Columns behind the last one are not zero times a row: whole parts only.
    (both.n, both.leading) = (128, (both.leading.0, both.leading.1, 128));
    check("read and left", &gpu, &both);
}

/// Large products do it without a launch more.
#[test]
fn large_products_need_no_other_kernel() {
    let p = problem(2048, 2048, 2048, DType::BF16);
    for p in [leaving(p.clone()), reading(p, 32, Pair::None)] {
        assert_eq!(plan_untuned(&p, &Gpu::h200(), 1).unwrap()[0].steps.len(), 1);
    }
}

/// Every kind of schedule: chunks narrower than a part, and parts across chunks.
#[test]
fn sums_do_not_depend_on_the_schedule() {
    let gpu = Gpu::h200();
    for operand in [DType::BF16, DType::F32] {
        let p = leaving(problem(130, 192, 64, operand));
        let wanted = expected(&p);
        let all = choices(&p, &gpu).unwrap();
        let mut kinds = BTreeMap::new();
        for choice in all {
            let tile = |name: &str| choice.schedule.tiles.get(name).copied().unwrap_or(1);
            let kind = (tile("BM"), tile("BN"), format!("{:?}", choice.schedule.mode));
            if tile("BN") % PART != 0 || kinds.contains_key(&kind) {
                continue;
            }
            if let Some(way) = tilewright_kernels::gemm::candidate(&p, &choice).unwrap() {
                let got = execute(&p, &way);
                assert_eq!(got, wanted, "{}", choice.schedule);
                kinds.insert(kind, ());
            }
        }
        assert!(kinds.len() >= 6, "{kinds:?}");
    }
}

/// The kernels of a Llama's sizes compile without spilling. Without NVRTC the test says so and passes, unless
/// `TILEWRIGHT_REQUIRE_NVRTC=1`.
#[test]
fn kernels_compile_without_spilling() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvrtc");
    let nvrtc = match Nvrtc::open(Some(&folder)) {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            eprintln!("skipped: no NVRTC");
            return;
        }
    };
    let sizes = |m, n, k| problem(m, n, k, DType::BF16);
    // Results of the type that models store.
    let narrow = |p: Problem| {
        let epilogue = scaled(DType::BF16, p.epilogue.pair);
        Problem { result: DType::BF16, epilogue, ..p }
    };
    let problems = [
        leaving(sizes(2048, 2048, 2048)),
        leaving(sizes(2048, 2048, 8192)),
        narrow(reading(sizes(2048, 3072, 2048), 32, Pair::None)),
        narrow(reading(sizes(2048, 6144, 4096), 64, Pair::None)),
        narrow(reading(sizes(2048, 8192, 2048), 32, Pair::Right)),
    ];
    let mut kernels = BTreeMap::new();
    for p in &problems {
        for step in &plan_untuned(p, &Gpu::h200(), 1).unwrap()[0].steps {
            let source = emit(&lower(&step.kernel, &step.schedule).unwrap()).unwrap();
            kernels.insert(source.text.clone(), (source, step.schedule.to_string()));
        }
    }
    let requests: Vec<CompileRequest> = kernels
        .values()
        .map(|(source, _)| {
            let request = CompileRequest::new(&source.entry, source.text.clone(), Arch::SM_90A);
            let request = COMPILER_OPTIONS.iter().fold(request, |r, option| r.option(*option));
            headers().iter().fold(request, |r, (name, text)| r.header(*name, *text))
        })
        .collect();
    let compiled = nvrtc.compile_all(&requests, 2);
    for ((source, schedule), compiled) in kernels.values().zip(compiled) {
        let compiled = compiled.unwrap_or_else(|e| panic!("{schedule}: {e:?}"));
        let used = compiled.resources(&source.entry).expect("it has figures");
        let outside = used.spill_store_bytes + used.spill_load_bytes + used.stack_bytes;
        assert_eq!(outside, 0, "{schedule}: {used:?}");
        let warnings: Vec<&str> = compiled.warnings.iter().map(|w| w.text.as_str()).collect();
        assert!(warnings.is_empty(), "{schedule}: {warnings:?}");
    }
}
