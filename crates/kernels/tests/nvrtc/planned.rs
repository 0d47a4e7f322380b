//! Every kernel of the first choice for a list of problems: squares, layers of transformers, single tokens, batches and
//! ragged sizes, in the types, orders and alignments that the library offers. Kernels are for all sizes, so problems share
//! them; each is compiled once.
//!
//! To cover more problems: a row in one of the tables.

use crate::ratchet::{self, Entry, schedule_of};
use std::collections::BTreeSet;
use tilewright_base::DType::{self, BF16, F8E4M3, F8E5M2, F16, F32, I8, I32};
use tilewright_expr::{FuncBuilder, Op};
use tilewright_kernels::gemm::{
    Epilogue,
    Order::{self, Col, Row},
    Pair, Precision, Problem, Step, plan,
};
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;
use tilewright_tile::Access;

type Orders = (Order, Order, Order);

/// Name, operand, result, whether for all sizes, and what else is asked for.
type Kind = (&'static str, DType, DType, bool, fn(&mut Problem));

#[rustfmt::skip] // One row per kind.
const KINDS: &[Kind] = &[
    ("",          BF16,   BF16, true,  |_| {}),
    ("",          F16,    F16,  false, |_| {}),
    ("",          BF16,   F32,  false, |_| {}),
    ("",          F8E4M3, BF16, true,  |_| {}),
    (" promoted", F8E4M3, BF16, true,  |p| p.promoted = true),
    ("",          F8E5M2, F16,  false, |_| {}),
    ("",          I8,     I32,  true,  |_| {}),
    ("",          F32,    F32,  true,  |_| {}),
    (" tf32",     F32,    F32,  true,  |p| p.precision = Precision::Tf32),
    (" tf32 x 3", F32,    F32,  true,  |p| p.precision = Precision::Tf32x3),
];

/// Linear layers, plain products, both gradients of a linear layer.
const ORDERS: &[Orders] = &[(Row, Col, Row), (Row, Row, Row), (Col, Row, Row)];
const OTHER_ORDERS: &[Orders] =
    &[(Col, Col, Row), (Row, Row, Col), (Row, Col, Col), (Col, Row, Col), (Col, Col, Col)];

/// Rows, columns, depth, batch. The first two orders.
#[rustfmt::skip]
const SIZES: &[(i64, i64, i64, i64)] = &[
    (64, 64, 64, 1), (128, 128, 128, 1), (256, 256, 256, 1), (512, 512, 512, 1), (1024, 1024, 1024, 1),
    (2048, 2048, 2048, 1), (4096, 4096, 4096, 1), (8192, 8192, 8192, 1), (16384, 16384, 16384, 1),
    // Transformers: tokens by width by depth.
    (128, 4096, 4096, 1), (512, 6144, 4096, 1), (2048, 28672, 4096, 1), (8192, 4096, 14336, 1), (512, 128256, 4096, 1),
    (384, 768, 768, 1), (384, 3072, 768, 1), (384, 768, 3072, 1),
    // Few tokens.
    (1, 4096, 4096, 1), (4, 6144, 4096, 1), (8, 4096, 14336, 1), (16, 4096, 4096, 1), (32, 28672, 4096, 1), (64, 4096, 4096, 1),
    // Batches: attention as products.
    (128, 128, 64, 96), (2048, 2048, 128, 32), (2048, 128, 2048, 32), (197, 197, 64, 144), (1, 2048, 128, 32),
    // Ragged, deep, flat.
    (1, 1, 1, 1), (3, 5, 7, 1), (33, 65, 129, 1), (127, 127, 127, 1), (1000, 1000, 1000, 1), (4095, 4095, 4095, 1),
    (256, 256, 65536, 1), (64, 64, 65536, 1), (512, 512, 0, 1), (64, 64, 0, 3), (8, 8192, 8192, 1), (8192, 8, 8192, 1), (8192, 8192, 8, 1),
];

/// Sizes for all orders, alignments and epilogues.
const FEW_SIZES: &[(i64, i64, i64, i64)] =
    &[(256, 256, 256, 1), (1000, 1000, 1000, 1), (4096, 4096, 4096, 1), (16, 4096, 4096, 1)];

/// One more than what a test of alignment takes: addresses and lines of one element.
fn unaligned(p: &mut Problem) {
    let a = i64::from(p.operand.bits()) / 8;
    let c = i64::from(p.result.bits()) / 8;
    p.align = (a, a, c);
    p.leading = (p.leading.0 + 1, p.leading.1 + 1, p.leading.2 + 1);
}

fn silu_bias(to: DType) -> Epilogue {
    let mut b = FuncBuilder::new();
    let x = b.param("x", F32);
    let y = b.op(Op::Sigmoid, &[x]);
    let y = b.op(Op::Mul, &[x, y]);
    let silu = b.finish(y);
    Epilogue::bias(Some(&silu), to, to)
}

fn scaled(to: DType) -> Epilogue {
    let mut b = FuncBuilder::new();
    let [sum, cols, rows] = ["sum", "cols", "rows"].map(|name| b.param(name, F32));
    let x = b.op(Op::Mul, &[sum, cols]);
    let x = b.op(Op::Mul, &[x, rows]);
    let x = b.cast(x, to);
    Epilogue {
        func: b.finish(x),
        col_vector: Some(F32),
        row_vector: Some(F32),
        residual: None,
        pair: Pair::None,
    }
}

/// `silu(gate) * up`
fn swiglu(sum: DType, to: DType) -> Epilogue {
    let mut b = FuncBuilder::new();
    let [gate, up] = ["gate", "up"].map(|name| b.param(name, sum));
    let [gate, up] = [gate, up].map(|x| b.cast(x, F32));
    let y = b.op(Op::Sigmoid, &[gate]);
    let y = b.op(Op::Mul, &[gate, y]);
    let y = b.op(Op::Mul, &[y, up]);
    let y = b.cast(y, to);
    let (func, pair) = (b.finish(y), Pair::Right);
    Epilogue { func, col_vector: None, row_vector: None, residual: None, pair }
}

fn residual(to: DType) -> Epilogue {
    let mut b = FuncBuilder::new();
    let (sum, r) = (b.param("sum", F32), b.param("r", to));
    let r = b.cast(r, F32);
    let x = b.op(Op::Add, &[sum, r]);
    let x = b.cast(x, to);
    Epilogue {
        func: b.finish(x),
        col_vector: None,
        row_vector: None,
        residual: Some(to),
        pair: Pair::None,
    }
}

fn problems() -> Vec<(String, Problem)> {
    let mut out = Vec::new();
    let make = |&(name, operand, result, _, change): &Kind,
                &(m, n, k, batch): &(i64, i64, i64, i64),
                orders: &Orders| {
        let mut p = Problem::dense(m, n, k, operand, result).ordered(orders.0, orders.1, orders.2);
        p.batch = batch;
        change(&mut p);
        (name.to_owned(), p)
    };
    for kind in KINDS {
        for sizes in if kind.3 { SIZES } else { FEW_SIZES } {
            for orders in &ORDERS[..2] {
                out.push(make(kind, sizes, orders));
            }
        }
        for sizes in FEW_SIZES {
            for orders in [&ORDERS[2]].into_iter().chain(OTHER_ORDERS) {
                out.push(make(kind, sizes, orders));
            }
            for orders in ORDERS {
                let (name, mut p) = make(kind, sizes, orders);
                unaligned(&mut p);
                out.push((name, p));
            }
        }
    }
    for kind in &KINDS[..4] {
        for sizes in FEW_SIZES {
            for (what, epilogue) in [
                (" bias, silu", silu_bias as fn(DType) -> Epilogue),
                (" scales", scaled),
                (" residual", residual),
            ] {
                let (_, mut p) = make(kind, sizes, &ORDERS[0]);
                p.epilogue = epilogue(p.result);
                out.push((what.to_owned(), p));
            }
        }
    }
    // Gated pairs, in both orders of weights: also of few tokens.
    for kind in KINDS {
        for sizes in FEW_SIZES.iter().chain(&[(1, 14336, 4096, 1), (4, 14336, 4096, 1)]) {
            for orders in &ORDERS[..2] {
                let (name, mut p) = make(kind, sizes, orders);
                p.epilogue = swiglu(p.sum, p.result);
                out.push((format!("{name} swiglu"), p));
            }
        }
    }
    out
}

/// `gemm(A bf16 row, B bf16 col, C out bf16 row)`.
fn signature(step: &Step) -> String {
    let params: Vec<String> = step
        .kernel
        .params
        .iter()
        .map(|(_, p)| {
            let axes = &p.layout.axes;
            let unit = |back: usize| axes.len() >= back && axes[axes.len() - back].stride.is(1);
            let order = match (unit(1), unit(2)) {
                (true, _) if axes.len() < 2 => "",
                (true, _) => " row",
                (_, true) => " col",
                _ => " strided",
            };
            let many = if axes.len() > 2 { "s" } else { "" };
            let out = if p.access == Access::In { "" } else { "out " };
            format!("{}{many} {out}{}{order}", p.name, p.dtype)
        })
        .collect();
    format!("{}({})", step.kernel.name, params.join(", "))
}

/// The kernels of the first choice for each problem that the machine's tensor cores multiply.
fn entries_of(gpu: &Gpu, problems: &[(String, Problem)]) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (what, p) in problems {
        let best = match plan(p, gpu, 1) {
            Ok(best) => best,
            // 8-bit floats came with Ada.
            Err(e) if gpu.capability < 89 && e.message().contains("no instructions for f8") => {
                continue;
            }
            Err(e) => panic!("{p:?}: {e}"),
        };
        for step in &best[0].steps {
            let program =
                lower(&step.kernel, &step.schedule).unwrap_or_else(|e| panic!("{p:?}: {e}"));
            let schedule = schedule_of(&program, &step.schedule);
            entries.push(Entry::new(format!("{}{what}: {schedule}", signature(step)), &program));
        }
    }
    entries
}

/// The same, each different text once, planned on all processors.
fn different(gpu: &Gpu, problems: &[(String, Problem)]) -> Vec<Entry> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = problems.chunks(problems.len().div_ceil(threads));
    let all = std::thread::scope(|scope| {
        let planners: Vec<_> = parts.map(|part| scope.spawn(|| entries_of(gpu, part))).collect();
        planners.into_iter().flat_map(|p| p.join().expect("a plan")).collect::<Vec<_>>()
    });
    let mut seen = BTreeSet::new();
    all.into_iter().filter(|e| seen.insert(e.source.text.clone())).collect()
}

#[test]
fn kernels_of_plans_keep_to_their_resources() {
    let different = different(&Gpu::h200(), &problems());
    assert!(different.len() > 400, "{} different kernels", different.len());
    ratchet::keep_to("planned", &different);
}

/// Every fifth of the problems on Ampere, and every fifteenth on Ada: in step with none of the lists.
#[test]
fn kernels_of_plans_for_older_devices_keep_to_their_resources() {
    let some = |every: usize| problems().into_iter().step_by(every).collect::<Vec<_>>();
    let mut all = different(&Gpu::a100(), &some(5));
    all.extend(different(&Gpu::rtx4090(), &some(15)));
    assert!(all.len() > 100, "{} different kernels", all.len());
    ratchet::keep_to("planned_older", &all);
}
