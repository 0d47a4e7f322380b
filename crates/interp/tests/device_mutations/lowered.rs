//! The same for device programs that `lower-gpu` makes: one small product for each form of kernel.
//!
//! A program is small, but large enough that each ring is gone round at least twice and each cluster
//! has several items of work. To add a form: a case in [`cases`].

use crate::mutants::mutants;
use std::sync::Arc;
use tilewright_base::DType;
use tilewright_device::{Arch, Program, verify};
use tilewright_expr::Func;
use tilewright_interp::device::check;
use tilewright_kernels::gemm::{Epilogue, GemmSpec, Math, Order};
use tilewright_kernels::rows::{NormBackwardSpec, RowOp, RowSpec};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, LinesKnobs, Mode, ProductKind, StoreKind, lower};

use tilewright_tile::Kernel;

/// A form of kernel.
struct Case {
    name: &'static str,
    program: Program,
    sizes: Env,
    equivalent: &'static [&'static [Equivalent]],
}

/// Operands along their depth, as linear layers have them.
fn spec(operand: DType, result: DType) -> GemmSpec {
    GemmSpec { b: Order::Col, ..GemmSpec::plain(operand, DType::F32, result) }
}

fn hopper(consumers: u32, bm: i64, bn: i64, bk: i64) -> GpuSchedule {
    let plain = GpuSchedule::hopper(&[("BM", bm), ("BN", bn), ("BK", bk)]);
    GpuSchedule { consumers, stages: 2, raster: 2, ..plain }
}

fn sizes(m: i64, n: i64, k: i64) -> Env {
    let pairs = [("M", m), ("N", n), ("K", k), ("lda", k), ("ldb", k), ("ldc", n)];
    pairs.map(|(name, value)| (Arc::from(name), value)).into()
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add =
        |name, spec: &GemmSpec, split: bool, schedule: &GpuSchedule, sizes: Env, equivalent| {
            let kernel = if split { spec.part_program("gemm") } else { spec.program("gemm") };
            let program = lower(&kernel, schedule).unwrap_or_else(|e| panic!("{name}: {e}"));
            out.push(Case { name, program, sizes, equivalent });
        };
    let bf16 = spec(DType::BF16, DType::BF16);
    add("cooperative", &bf16, false, &hopper(2, 128, 16, 64), sizes(128, 64, 320), &[FED, STORED]);
    let overlapped = hopper(1, 64, 48, 64);
    add("several chunks", &bf16, false, &overlapped, sizes(64, 96, 192), &[FED, STORED]);
    let turns = GpuSchedule { mode: Mode::PingPong, ..hopper(2, 64, 16, 64) };
    add("ping-pong", &bf16, false, &turns, sizes(64, 128, 192), &[FED, STORED, TURNS]);
    let cluster = |axis| GpuSchedule {
        cluster: 2,
        cluster_axis: axis,
        dependent: true,
        ..hopper(1, 64, 16, 64)
    };
    add(
        "cluster along rows",
        &bf16,
        false,
        &cluster(0),
        sizes(128, 64, 256),
        &[FED, STORED, DEPENDENT],
    );
    add(
        "cluster along columns",
        &bf16,
        false,
        &cluster(1),
        sizes(64, 128, 256),
        &[FED, STORED, DEPENDENT],
    );
    let mut parts = sizes(64, 32, 384);
    parts.extend([("S", 2), ("part", 3), ("sp", 64 * 32)].map(|(s, v)| (Arc::from(s), v)));
    let sums = spec(DType::BF16, DType::F32);
    add("split depth", &sums, true, &hopper(1, 64, 16, 64), parts, &[FED, STORED_PARTS]);
    let mut promoted = spec(DType::F8E4M3, DType::BF16);
    promoted.math = Math::Promoted;
    promoted.epilogue = Epilogue::cast(DType::F32, DType::BF16);
    let deep = hopper(1, 64, 16, 128);
    add("promoted sums", &promoted, false, &deep, sizes(64, 64, 512), &[FED, STORED, ADDED]);
    let mut three = spec(DType::F32, DType::F32);
    three.math = Math::Tf32x3;
    add(
        "three-part tf32",
        &three,
        false,
        &hopper(1, 64, 16, 32),
        sizes(64, 64, 128),
        &[FED, STORED_F32, ADDED],
    );
    let mut pair = spec(DType::BF16, DType::BF16);
    pair.epilogue = Epilogue::gated(&Func::identity(DType::F32), DType::BF16);
    add("pair", &pair, false, &hopper(1, 64, 16, 64), sizes(64, 64, 256), &[FED, STORED_PAIR]);
    let left = GemmSpec { epilogue: pair.epilogue.transposed(), ..pair };
    add("left pair", &left, false, &hopper(1, 64, 16, 64), sizes(64, 64, 256), &[FED, STORED_LEFT]);
    let direct =
        GpuSchedule { store: StoreKind::Direct, persistent: false, ..hopper(2, 128, 16, 64) };
    add("direct store", &bf16, false, &direct, sizes(120, 16, 320), &[FED, ONE_ITEM]);
    let both = GpuSchedule { cluster: 2, ..turns.clone() };
    add("ping-pong in clusters", &bf16, false, &both, sizes(128, 128, 192), &[FED, STORED, TURNS]);
    let pipelined = |bn, store, persistent| {
        let tiles = [("BM", 32), ("BN", bn), ("BK", 32)];
        let plain = GpuSchedule::pipelined(Arch::Sm80, ProductKind::MmaSync, (2, 1), &tiles);
        GpuSchedule { store, persistent, vector: 8, ..plain }
    };
    let direct = pipelined(32, StoreKind::Direct, true);
    add("plain copies, persistent", &bf16, false, &direct, sizes(32, 96, 160), &[COPIED]);
    let staged = pipelined(96, StoreKind::Staged, false);
    add("plain copies, staged", &bf16, false, &staged, sizes(32, 96, 224), &[COPIED_STAGED]);
    // Rows: pieces that loops share, items and turns of a loop that are fetched ahead.
    let mut rows = |name, kernel: Kernel, knobs: LinesKnobs, persistent, sizes: &[(&str, i64)]| {
        let tiles = [("BM", 1), ("BN", if persistent { 320 } else { 128 })];
        let plain = GpuSchedule::hopper(&tiles);
        let schedule = GpuSchedule { persistent, vector: 4, lines: knobs, ..plain };
        let program = lower(&kernel, &schedule).unwrap_or_else(|e| panic!("{name}: {e}"));
        let sizes = sizes.iter().map(|(s, v)| (Arc::from(*s), *v)).collect();
        out.push(Case { name, program, sizes, equivalent: &[FETCHED] });
    };
    let threads = LinesKnobs { threads: 32, lanes: 32, vector: 4, ..LinesKnobs::default() };
    let softmax = RowSpec { op: RowOp::Softmax, dtype: DType::F32, residual: false };
    let long = [("M", 2), ("N", 320), ("ldx", 320), ("ldy", 320)];
    let kept = LinesKnobs { kept: 2, ..threads };
    rows("kept pieces", softmax.program("rows", false), kept, false, &long);
    let ahead = LinesKnobs { fetched: 3, ..threads };
    let many = [("M", 9), ("N", 320), ("ldx", 320), ("ldy", 320)];
    let wide = LinesKnobs { vector: 2, lanes: 32, ..ahead };
    rows("items ahead", softmax.program("rows", true), wide, true, &many);
    let gradient =
        NormBackwardSpec { op: RowOp::RmsNorm { eps: 1e-6 }, dtype: DType::F32, added: false };
    let gradient = gradient.program("rows").unwrap();
    let turns = [("M", 9), ("N", 100), ("ld", 100), ("P", 2), ("C", 5)];
    rows("turns ahead", gradient, ahead, false, &turns);
    out
}

/// A change after which a program is still right, and why.
type Equivalent = (&'static str, &'static str);

/// Of every kernel that is fed by the copy engine.
const FED: &[Equivalent] = &[
    (
        "producer `wait empty[ring] phase before ring` after `advance ring by 1`",
        "it then waits for the next stage right before the next turn of the loop; the first turn, \
         which waits no more, finds every stage empty",
    ),
    (
        "consumer `wait full[ring] phase of ring` after `wgmma fence`",
        "that fence orders registers, which the copies do not touch",
    ),
];

/// Of every kernel that stores with the copy engine.
const STORED: &[Equivalent] = &[
    (
        "consumer `once tma wait 1 read` after `once`",
        "it waits right after the store instead of before the next use of the buffer, behind the same \
         barrier of threads: slower, and as safe",
    ),
    (
        "consumer `once tma wait 1 read` after `advance out_C by 1`",
        "as above: moving a ring is no access",
    ),
    (
        "consumer `advance out_C by 1` before `sC[out_C][64*consumer +64, 0 +16] <- t`",
        "the write and the store of a chunk still agree on the slot, and take turns",
    ),
    ("consumer `advance out_C by 1` before `sync named consumer + 1 threads 128`", "as above"),
    ("consumer `advance out_C by 1` before `once`", "as above"),
    (
        "consumer `advance out_C by 1` before `t = map(acc[:, 16*chunk +16]) { x -> bf16(x) }`",
        "as above",
    ),
];

/// The same where sums are stored as they are.
const STORED_F32: &[Equivalent] = &[
    STORED[0],
    STORED[1],
    STORED[2],
    STORED[3],
    STORED[4],
    (
        "consumer `advance out_C by 1` before `t = map(acc[:, 16*chunk +16]) { x -> x }`",
        STORED[2].1,
    ),
];

/// The same where parts of the sums are stored.
const STORED_PARTS: &[Equivalent] = &[
    STORED[0],
    ("consumer `once tma wait 1 read` after `advance out_P by 1`", STORED[1].1),
    (
        "consumer `advance out_P by 1` before `sP[out_P][64*consumer +64, 0 +16] <- acc[:, 16*chunk +16]`",
        STORED[2].1,
    ),
    ("consumer `advance out_P by 1` before `sync named consumer + 1 threads 128`", STORED[2].1),
    ("consumer `advance out_P by 1` before `once`", STORED[2].1),
];

/// The same of a pair, whose sums lie side by side.
const STORED_PAIR: &[Equivalent] = &[
    STORED[0],
    STORED[1],
    STORED[2],
    STORED[3],
    STORED[4],
    (
        "consumer `advance out_C by 1` before `t = map(acc[:, 16*chunk +16], acc[:, 16*chunk + 16 +16]) { gate, up -> bf16(gate * up) }`",
        STORED[2].1,
    ),
];

/// The same of a pair of left operands, whose sums lie apart.
const STORED_LEFT: &[Equivalent] = &[
    STORED[0],
    STORED[1],
    STORED[2],
    STORED[3],
    STORED[4],
    (
        "consumer `advance out_C by 1` before `t = map(acc[:, 16*chunk +16], acc1[:, 16*chunk +16]) { gate, up -> bf16(gate * up) }`",
        STORED[2].1,
    ),
];

/// Of kernels with one item of work.
const ONE_ITEM: &[Equivalent] = &[
    (
        "consumer `wgmma wait 0` after `arrive empty[before ring]`",
        "the last stages that are let go of are filled no more: nobody waits for this arrival",
    ),
    ("consumer without `arrive empty[before ring]`", "as above"),
    ("consumer `arrive empty[before ring]`: other barrier slot", "as above"),
    ("consumer `arrive empty[before ring]` before `wgmma wait 0`", "as above"),
];

/// Of kernels whose consumers take turns.
const TURNS: &[Equivalent] = &[
    (
        "consumer `advance ring by ceil(K/64)` after `arrive named 8 threads 256`",
        "the barrier is of threads; where each stands in the ring is its own affair",
    ),
    ("consumer `arrive named 8 threads 256` before `advance ring by ceil(K/64)`", "as above"),
    (
        "consumer `arrive named 8 threads 256`: waits, too",
        "the first consumer comes to this barrier first of all, so that the second one waits a moment",
    ),
    (
        "consumer `advance ring by ceil(K/64)` after `unroll chunk in 0 .. 1`",
        "what follows the products does not use the ring",
    ),
];

/// Of kernels that start beside the one before.
const DEPENDENT: &[Equivalent] = &[
    (
        "setup `sync cluster` after `grid release`",
        "what other kernels do has nothing to do with the barriers that are made ready here",
    ),
    ("setup `sync cluster` after `grid wait`", "as above"),
    (
        "setup without `grid wait`",
        "a kernel that does not wait is started when the one before has ended (`launch` looks for the step)",
    ),
];

/// Of kernels that add up in registers apart from the tensor cores.
const ADDED: &[Equivalent] = &[(
    "consumer `advance ring by 1` before `acc = map(acc, turn_sum) { a, b -> a + b }`",
    "registers only: the stage was let go of before",
)];

/// Of kernels with plain copies.
const COPIED: &[Equivalent] = &[
    (
        "all `copy commit` before `copy wait 1`",
        "a step's copies are then in the group that is closed right before the next wait, and as many \
         younger groups are open: empty ones at first",
    ),
    ("all `copy wait 0` after `unroll chunk in 0 .. 1`", "only empty groups are open there"),
];

/// The same with results that go through shared memory.
const COPIED_STAGED: &[Equivalent] = &[
    COPIED[0],
    ("all `copy wait 0` after `unroll chunk in 0 .. 3`", COPIED[1].1),
    ("all `sync block` before `t = map(acc[:, 32*chunk +32]) { x -> bf16(x) }`", "registers only"),
    (
        "all `sync block` after `line_C = sC[0][0 +32, 0 +32]`",
        "one chunk is read before the barrier that was the next one's first",
    ),
    (
        "all `sync block` after `store %C[32*pm, 32*chunk + 96*pn] axes (0,1), line_C vector 8`",
        "as above",
    ),
];

/// Of rows that are fetched to shelves. A star stands for any rest.
const FETCHED: &[Equivalent] = &[
    (
        "lines `copy wait 0` after *",
        "no fetch is open there, or only registers are touched before the next recall",
    ),
    ("lines `copy wait 2` after `let *", "integers only"),
];

#[test]
fn every_weaker_lowered_program_is_caught() {
    for case in cases() {
        let (sizes, clusters) = (std::slice::from_ref(&case.sizes), [1]);
        let right = verify(&case.program).and_then(|()| check(&case.program, sizes, &clusters));
        right.unwrap_or_else(|e| panic!("{}: {e:?}", case.name));
        let (mut by_rules, mut by_checker) = (0, 0);
        let mut survivors = Vec::new();
        for mutant in mutants(&case.program) {
            if verify(&mutant.program).is_err() {
                by_rules += 1;
            } else if check(&mutant.program, sizes, &clusters).is_err() {
                by_checker += 1;
            } else {
                survivors.push(mutant.name);
            }
        }
        println!(
            "{}: {by_rules} mutants rejected by the rules, {by_checker} by the checker, {} equivalent",
            case.name,
            survivors.len()
        );
        let equivalent = case.equivalent.iter().copied().flatten();
        let mut expected: Vec<&str> = equivalent.map(|e| e.0).collect();
        survivors.retain(|s| {
            let known = |e: &&str| e.strip_suffix('*').is_some_and(|start| s.starts_with(start));
            !expected.iter().any(known)
        });
        expected.retain(|e| !e.ends_with('*'));
        expected.sort_unstable();
        survivors.sort_unstable();
        assert_eq!(survivors, expected, "{}", case.name);
    }
}
