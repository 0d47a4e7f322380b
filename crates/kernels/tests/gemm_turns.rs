//! Products that turn the heads of their result: every way to run them gives the same in the device interpreter.

use std::collections::BTreeMap;
use std::path::Path;
use tilewright_base::DType;
use tilewright_cuda::{Arch, CompileRequest, Nvrtc};
use tilewright_emit_cuda::{COMPILER_OPTIONS, emit, headers};
use tilewright_expr::{Func, FuncBuilder, Op};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, run};
use tilewright_kernels::gemm::{
    Candidate, Epilogue, Order, Pair, Place, Precision, Problem, RowSums, Statistics, Turned,
    choices, plan_untuned,
};
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

/// `x * c - y * s`, or `y * c + x * s`, of elements of the result and of tables.
fn half(of: DType, table: DType, second: bool) -> Func {
    let mut f = FuncBuilder::new();
    let [x, y] = ["x", "y"].map(|name| f.param(name, of));
    let [c, s] = ["c", "s"].map(|name| f.param(name, table));
    let [x, y, c, s] = [x, y, c, s].map(|v| f.cast(v, DType::F32));
    let (keep, mix, op) = if second { (y, x, Op::Add) } else { (x, y, Op::Sub) };
    let (keep, mix) = (f.op(Op::Mul, &[keep, c]), f.op(Op::Mul, &[mix, s]));
    let z = f.op(op, &[keep, mix]);
    let z = f.cast(z, of);
    f.finish(z)
}

/// Small whole numbers: sums are exact in every order.
fn value(i: usize, salt: usize) -> f64 {
    ((i * 7 + salt * 5 + i / 11) % 3) as f64 - 1.0
}

fn fill(dtype: DType, elements: usize, salt: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; elements * dtype.size()];
    (0..elements).for_each(|i| tilewright_data::from_f64(dtype, &mut bytes, i, value(i, salt)));
    bytes
}

/// A product whose first `heads` of lines of `all` heads turn, by tables of `rows` lines.
fn problem(
    m: i64,
    k: i64,
    operand: DType,
    (width, heads, all, rows): (i64, i64, i64, i64),
) -> Problem {
    let precision = if operand == DType::F32 { Precision::Tf32 } else { Precision::F32 };
    let (table, n) = (operand, all * width);
    let halves = [false, true].map(|second| half(operand, table, second));
    let turns = Some(Turned { width, heads, halves, tables: vec![table; 2], rows });
    let p = Problem::dense(m, n, k, operand, operand).ordered(Order::Row, Order::Col, Order::Row);
    Problem { precision, statistics: Statistics { turns, ..Statistics::default() }, ..p }
}

fn with_bias(p: Problem) -> Problem {
    Problem { epilogue: Epilogue::bias(None, p.result, p.result), ..p }
}

/// As behind a norm: `sum * row`, with the row of sums in parts.
fn behind_norm(p: Problem, parts: i64) -> Problem {
    let mut f = FuncBuilder::new();
    let (sum, r) = (f.param("sum", DType::F32), f.param("r", DType::F32));
    let x = f.op(Op::Mul, &[sum, r]);
    let x = f.cast(x, p.result);
    let (func, row_vector) = (f.finish(x), Some(DType::F32));
    let epilogue =
        Epilogue { func, col_vector: None, row_vector, residual: None, pair: Pair::None };
    let reads = Some(RowSums { parts, func: Func::identity(DType::F32) });
    let statistics = Statistics { reads, ..p.statistics.clone() };
    Problem { epilogue, statistics, ..p }
}

/// Runs a candidate's steps in the interpreter; returns what is in `C`.
fn execute(p: &Problem, candidate: &Candidate) -> Vec<f64> {
    let mut places: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let (m, n, k) = (p.m as usize, p.n as usize, p.k as usize);
    let turned = p.statistics.turns.as_ref().unwrap();
    let read = p.statistics.reads.as_ref().map_or(1, |r| r.parts as usize);
    let table = (turned.rows * turned.width / 2) as usize;
    let elements = [
        ("A", p.operand, m * k, 1),
        ("B", p.operand, k * n, 2),
        ("Cols", p.result, n, 3),
        ("Rows", DType::F32, m * read, 4),
        ("Table(0)", turned.tables[0], table, 5),
        ("Table(1)", turned.tables[1], table, 6),
    ];
    for (name, dtype, elements, salt) in elements {
        places.insert(name.into(), fill(dtype, elements, salt));
    }
    places.insert("C".into(), vec![0xff; m * n * p.result.size()]);
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
    let c = &places["C"];
    (0..m * n).map(|i| tilewright_data::read_f64(p.result, c, i)).collect()
}

/// What a problem gives.
fn expected(p: &Problem) -> Vec<f64> {
    let (m, n, k) = (p.m as usize, p.n as usize, p.k as usize);
    let turned = p.statistics.turns.as_ref().unwrap();
    let (width, rows) = (turned.width as usize, turned.rows as usize);
    let read = p.statistics.reads.as_ref().map_or(1, |r| r.parts as usize);
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        let sum: f64 = (0..read).map(|j| value(i * read + j, 4)).sum();
        let line: Vec<f64> = (0..n)
            .map(|j| {
                let product = (0..k).map(|x| value(i * k + x, 1) * value(j * k + x, 2)).sum();
                let mut args: Vec<f64> = vec![product];
                args.extend(p.epilogue.col_vector.map(|_| value(j, 3)));
                args.extend(p.epilogue.row_vector.map(|_| sum));
                p.epilogue.func.eval_f64(&args)
            })
            .collect();
        for j in 0..n {
            let (head, within) = (j / width, j % width);
            let (second, at) = (within / (width / 2), within % (width / 2));
            let table = |salt: usize| value((i % rows) * (width / 2) + at, salt);
            let low = head * width + at;
            let args = [line[low], line[low + width / 2], table(5), table(6)];
            let turns = (head as i64) < turned.heads;
            out[i * n + j] = if turns { turned.halves[second].eval_f64(&args) } else { line[j] };
        }
    }
    out
}

/// Checks the first ways, and the first that is one kernel, if there is to be one.
fn check(name: &str, gpu: &Gpu, p: &Problem, inside: bool) {
    let wanted = expected(p);
    let mut ways = plan_untuned(p, gpu, 2).unwrap_or_else(|e| panic!("{name}: {e}"));
    let all = choices(p, gpu).unwrap();
    let one = all.iter().find_map(|c| tilewright_kernels::gemm::candidate(p, c).unwrap());
    assert_eq!(one.is_some(), inside, "{name}");
    ways.extend(one);
    for way in &ways {
        let schedules: Vec<String> =
            way.steps.iter().map(|s| format!("{} {}", s.kernel.name, s.schedule)).collect();
        assert_eq!(execute(p, way), wanted, "{name}: {schedules:?}");
    }
}

#[test]
fn products_turn_the_heads_of_their_result() {
    let gpu = Gpu::h200();
    let (bf16, f16) = (DType::BF16, DType::F16);
    check("heads of 64", &gpu, &problem(70, 72, bf16, (64, 3, 4, 70)), true);
    check("heads of 128", &gpu, &problem(70, 64, f16, (128, 2, 3, 70)), false);
    check("all turn", &gpu, &problem(130, 32, bf16, (32, 6, 6, 130)), true);
    check("tf32", &gpu, &problem(70, 32, DType::F32, (32, 1, 2, 70)), true);
    check("bias", &gpu, &with_bias(problem(70, 64, bf16, (64, 2, 3, 70))), true);
    check("norm", &gpu, &behind_norm(problem(70, 64, bf16, (64, 2, 3, 70)), 5), true);
    check("two sequences", &gpu, &problem(256, 64, bf16, (64, 2, 3, 128)), true);
    check("odd sequences", &gpu, &problem(74, 64, bf16, (64, 2, 3, 37)), false);
    check("an empty sum", &gpu, &problem(40, 0, bf16, (64, 2, 3, 40)), false);
    check("older", &Gpu::a100(), &problem(74, 64, bf16, (64, 2, 3, 37)), false);
}

/// Every kind of schedule whose tiles are whole heads.
#[test]
fn turned_heads_do_not_depend_on_the_schedule() {
    let gpu = Gpu::h200();
    for (operand, width) in [(DType::BF16, 64), (DType::BF16, 32), (DType::F32, 32)] {
        let p = problem(130, 64, operand, (width, 2, 3, 130));
        let wanted = expected(&p);
        let mut kinds = BTreeMap::new();
        for choice in choices(&p, &gpu).unwrap() {
            let tile = |name: &str| choice.schedule.tiles.get(name).copied().unwrap_or(1);
            let s = &choice.schedule;
            let kind = (tile("BM"), tile("BN"), format!("{:?} {}", s.mode, s.store_slots > 2));
            if tile("BN") % width != 0 || choice.swapped || kinds.contains_key(&kind) {
                continue;
            }
            if let Some(way) = tilewright_kernels::gemm::candidate(&p, &choice).unwrap() {
                assert_eq!(execute(&p, &way), wanted, "{}", choice.schedule);
                kinds.insert(kind, ());
            }
        }
        assert!(kinds.len() >= 6, "{kinds:?}");
    }
}

/// The kernels of Llamas' sizes are one launch and compile without spilling. Without NVRTC the second half says so and passes, unless
/// `TILEWRIGHT_REQUIRE_NVRTC=1`.
#[test]
fn kernels_compile_without_spilling() {
    let sizes = [
        behind_norm(problem(2048, 2048, DType::BF16, (64, 40, 48, 2048)), 32),
        with_bias(problem(1024, 896, DType::F16, (64, 16, 18, 512))),
        problem(2048, 2048, DType::F32, (32, 40, 48, 2048)),
    ];
    let mut kernels = BTreeMap::new();
    for p in &sizes {
        let ways = plan_untuned(p, &Gpu::h200(), 3).unwrap();
        assert_eq!(ways[0].steps.len(), 1, "{p:?}");
        for step in ways.iter().filter(|w| w.steps.len() == 1).flat_map(|w| &w.steps) {
            let source = emit(&lower(&step.kernel, &step.schedule).unwrap()).unwrap();
            kernels.insert(source.text.clone(), (source, step.schedule.to_string()));
        }
    }
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
    let requests: Vec<CompileRequest> = kernels
        .values()
        .map(|(source, _)| {
            let request = CompileRequest::new(&source.entry, source.text.clone(), Arch::SM_90A);
            let request = COMPILER_OPTIONS.iter().fold(request, |r, option| r.option(*option));
            headers().iter().fold(request, |r, (name, text)| r.header(*name, *text))
        })
        .collect();
    let compiled = nvrtc.compile_all(&requests, 2);
    let mut spilled = Vec::new();
    for ((source, schedule), compiled) in kernels.values().zip(compiled) {
        let compiled = compiled.unwrap_or_else(|e| panic!("{schedule}: {e:?}"));
        let used = compiled.resources(&source.entry).expect("it has figures");
        let outside = used.spill_store_bytes + used.spill_load_bytes + used.stack_bytes;
        if outside != 0 {
            spilled.push(format!("{schedule}: {used:?}"));
        }
        let warnings: Vec<&str> = compiled.warnings.iter().map(|w| w.text.as_str()).collect();
        assert!(warnings.is_empty(), "{schedule}: {warnings:?}");
    }
    assert!(spilled.is_empty(), "{spilled:#?}");
}
