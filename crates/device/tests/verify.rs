//! Every rule with a program that breaks it, and how programs print.

#[path = "../../interp/tests/common/mod.rs"]
mod common;

use tilewright_base::{DType, IdVec};
use tilewright_device::*;
use tilewright_expr::{Func, Value};
use tilewright_layout::Dim;
use tilewright_tile::{Access, ParamId, ReduceKind};

type Change = fn(&mut Program);

fn edit<I, T>(list: &mut IdVec<I, T>, index: usize, change: impl Fn(&mut T))
where
    I: From<usize> + Into<usize> + Copy,
{
    for (id, item) in list.iter_mut() {
        if id.into() == index {
            change(item);
        }
    }
}

/// Changes every step of the roles.
fn each(p: &mut Program, change: fn(&mut Stmt)) {
    fn walk(block: &mut [Stmt], change: fn(&mut Stmt)) {
        for stmt in block {
            change(stmt);
            match stmt {
                Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                    walk(body, change);
                }
                Stmt::If { then, otherwise, .. } => {
                    walk(then, change);
                    walk(otherwise, change);
                }
                _ => {}
            }
        }
    }
    p.roles.iter_mut().for_each(|role| walk(&mut role.body, change));
}

fn frag(index: u32) -> FragRef {
    FragRef { frag: FragId(index), col: Dim::new(0), cols: None }
}

fn tile(smem: u32, rows: u32, cols: u32) -> SmemTile {
    let zero = || Dim::new(0);
    SmemTile { smem: SmemId(smem), slot: Slot::At(zero()), row: zero(), col: zero(), rows, cols }
}

/// Adds a step to the consumer.
fn consumer(p: &mut Program, stmt: Stmt) {
    p.roles[1].body.push(stmt);
}

fn first_barrier(p: &mut Program, change: fn(&mut Barrier)) {
    edit(&mut p.barriers, 0, change);
}

#[rustfmt::skip] // One row per broken rule.
const BROKEN: &[(&str, Change)] = &[
    ("`Q` is not bound", |p| p.setup.push(Stmt::Let { name: "x".into(), value: Dim::sym("Q") })),
    ("`thread` is not bound", |p| consumer(p, Stmt::Let { name: "x".into(), value: Dim::sym(THREAD) })),
    ("items: `t` is not bound", |p| p.items = Dim::sym("t")),
    ("the buffer does not exist", |p| consumer(p, Stmt::ToSmem { to: tile(9, 64, 16), src: frag(1) })),
    ("the fragment does not exist", |p| consumer(p, Stmt::Fill { dst: frag(9), value: Value::Float(0.0) })),
    ("the ring does not exist", |p| consumer(p, Stmt::Advance { ring: RingId(4), by: Dim::new(1) })),
    ("the step is not positive", |p| each(p, |s| if let Stmt::For { step, .. } = s { *step = Dim::new(0) })),
    // The block.
    ("a block of 400 threads", |p| p.threads = 400),
    ("a cluster of 17 blocks", |p| p.cluster = 17),
    ("no block per multiprocessor", |p| p.blocks_per_sm = 0),
    ("bytes of shared memory; sm_90a has 232448", |p| edit(&mut p.smem, 0, |s| s.slots = 20)),
    ("role consumer is not inside of the block's 12 warps", |p| p.roles[1].instances = 3),
    ("role consumer shares warps with another", |p| p.roles[1].first_warp = 0),
    ("registers are not 24 to 256 in steps of 8", |p| p.roles[0].registers = Some(20)),
    ("role producer sets registers but is not whole warpgroups", |p| p.roles[0].warps = 1),
    ("roles set 65536 registers, the launch gives 64512", |p| p.roles[0].registers = Some(48)),
    // Maps and buffers.
    ("box [512, 64] is not 1 to 256 each", |p| edit(&mut p.maps, 0, |m| m.box_shape[0] = 512)),
    ("a box over 2 axes", |p| edit(&mut p.maps, 0, |m| m.box_shape.push(1))),
    ("256 bytes are more than a span of swizzle 128", |p| edit(&mut p.maps, 0, |m| m.box_shape[1] = 128)),
    ("24 bytes of a box are not a multiple of 16", |p| edit(&mut p.maps, 2, |m| m.box_shape[1] = 12)),
    ("axis 0 of the tensor is not contiguous", |p| edit(&mut p.maps, 0, |m| m.contiguous = 0)),
    ("map map_a: bf16 is not rounded to tf32", |p| edit(&mut p.maps, 0, |m| m.tf32 = true)),
    ("is packed", |p| edit(&mut p.params, 0, |p| p.dtype = DType::U4)),
    ("has no whole panels", |p| edit(&mut p.smem, 0, |s| s.cols = 48)),
    ("has no whole groups of 8 lines", |p| edit(&mut p.smem, 0, |s| s.rows = 130)),
    ("has no elements or no such axis", |p| edit(&mut p.smem, 0, |s| s.contiguous = 2)),
    ("the tile is not one box of the map", |p| edit(&mut p.maps, 0, |m| m.box_shape[0] = 64)),
    ("the swizzles differ", |p| edit(&mut p.maps, 2, |m| m.swizzle = Swizzle::B64)),
    ("the element types differ", |p| edit(&mut p.smem, 2, |s| s.dtype = DType::F16)),
    ("the tile does not start at a whole panel", |p| each(p, |s| if let Stmt::TmaStore { from, .. } = s { from.col = Dim::sym("w") * 8 })),
    ("the tile does not start at a whole group of 8 lines", |p| each(p, |s| if let Stmt::TmaLoad { to, .. } = s { to.col = Dim::sym(CTA) * 4 })),
    ("one coordinate per axis of the tensor", |p| each(p, |s| if let Stmt::TmaLoad { at, .. } = s { at.pop(); })),
    ("the tile is not inside of its buffer", |p| each(p, |s| if let Stmt::ToSmem { to, .. } = s { to.row = Dim::new(8) })),
    ("the slot does not exist", |p| each(p, |s| if let Stmt::ToSmem { to, .. } = s { to.slot = Slot::At(Dim::new(2)) })),
    ("the ring has more stages than there are slots", |p| edit(&mut p.rings, 0, |r| r.stages = 4)),
    ("the tensor is only read", |p| edit(&mut p.params, 2, |p| p.access = Access::In)),
    // wgmma.
    ("the role is not an aligned warpgroup", |p| { p.roles[1].first_warp = 2; }),
    ("no instruction multiplies bf16 by bf16 into f16", |p| edit(&mut p.frags, 0, |f| f.dtype = DType::F16)),
    ("no instruction multiplies f16 by bf16 into f32", |p| edit(&mut p.smem, 0, |s| s.dtype = DType::F16)),
    ("no instruction has 264 columns", |p| { edit(&mut p.frags, 0, |f| f.cols = 264); edit(&mut p.smem, 1, |s| s.cols = 264); each(p, |s| if let Stmt::Wgmma { b, .. } = s { b.cols = 264 }) }),
    ("the depth 56 is not a multiple of 16", |p| each(p, |s| if let Stmt::Wgmma { a: WgmmaA::Smem(a), b, .. } = s { a.cols = 56; b.rows = 56 })),
    ("the operands differ in depth", |p| each(p, |s| if let Stmt::Wgmma { b, .. } = s { b.rows = 32 })),
    ("left operand and accumulators differ in rows", |p| each(p, |s| if let Stmt::Wgmma { a: WgmmaA::Smem(a), .. } = s { a.rows = 32 })),
    ("right operand and accumulators differ in columns", |p| each(p, |s| if let Stmt::Wgmma { b, .. } = s { b.cols = 8 })),
    ("only 16-bit operands may lie across their depth", |p| { edit(&mut p.smem, 1, |s| { s.dtype = DType::F32; s.contiguous = 1 }) }),
    ("an operand's buffer is not swizzled", |p| edit(&mut p.smem, 0, |s| s.swizzle = Swizzle::None)),
    ("an operand does not start at a whole panel and group", |p| each(p, |s| if let Stmt::Wgmma { a: WgmmaA::Smem(a), .. } = s { a.row = Dim::sym("w") * 4 })),
    ("accumulators are not spread as wgmma's", |p| edit(&mut p.frags, 0, |f| f.extent = Extent::PerCol)),
    ("a left operand in registers has 16 bits", |p| each(p, |s| if let Stmt::Wgmma { a, .. } = s { *a = WgmmaA::Frag(frag(0)) })),
    // Fragments.
    ("does not fit its spread", |p| edit(&mut p.frags, 1, |f| f.rows = 65)),
    ("is not spread over the threads of the role", |p| edit(&mut p.frags, 1, |f| f.spread = Spread::Lines { lanes: 2, vector: 8, threads: 64 })),
    ("the first column is not a number once loops are unrolled", |p| consumer(p, Stmt::Fill { dst: FragRef { col: Dim::sym("w"), ..frag(0) }, value: Value::Float(0.0) })),
    ("the columns are not inside of the fragment", |p| { let dst = FragRef { col: Dim::sym("u") * 8, cols: Some(8), ..frag(0) }; let fill = Stmt::Fill { dst, value: Value::Float(0.0) }; consumer(p, Stmt::Unroll { var: "u".into(), count: 3, body: vec![fill] }) }),
    ("the constant is not of the element type", |p| consumer(p, Stmt::Fill { dst: frag(0), value: Value::Int(0) })),
    ("the result is not of the element type", |p| each(p, |s| if let Stmt::Map { func, .. } = s { *func = Func::identity(DType::F32) })),
    ("one operand per parameter", |p| each(p, |s| if let Stmt::Map { args, .. } = s { args.clear() })),
    ("an operand's element type differs", |p| each(p, |s| if let Stmt::Map { func, .. } = s { *func = Func::cast(DType::F16, DType::BF16) })),
    ("an operand's spread differs", |p| edit(&mut p.frags, 1, |f| f.spread = Spread::Lines { lanes: 2, vector: 8, threads: 128 })),
    ("an operand's extents differ", |p| each(p, |s| if let Stmt::Map { args, .. } = s { args[0].cols = Some(8) })),
    ("an axis is 0 or 1", |p| consumer(p, Stmt::Iota { dst: frag(0), axis: 2, start: Dim::new(0) })),
    ("the result is not one value per row or column", |p| consumer(p, Stmt::Reduce { dst: frag(0), kind: ReduceKind::Sum, src: frag(0), accumulate: false })),
    ("rows and columns run along two axes of the tensor", |p| consumer(p, Stmt::Store { param: ParamId(2), at: vec![Dim::new(0), Dim::new(0)], axes: (Some(0), Some(2)), src: frag(1), vector: 1 })),
    ("the extents differ", |p| each(p, |s| if let Stmt::ToSmem { to, .. } = s { to.cols = 8 })),
    ("accumulators are not spread for mma.sync or plain sums", |p| consumer(p, Stmt::Mma { acc: frag(0), a: WgmmaA::Smem(tile(0, 64, 64)), b: tile(1, 64, 16), split: false })),
    ("the operands' extents do not agree", |p| consumer(p, Stmt::Mma { acc: frag(0), a: WgmmaA::Smem(tile(0, 64, 32)), b: tile(1, 64, 16), split: false })),
    ("only tensor cores take f32 in two parts", |p| consumer(p, Stmt::Mma { acc: frag(0), a: WgmmaA::Smem(tile(0, 64, 64)), b: tile(1, 64, 16), split: true })),
    ("a left operand in registers has 16 or 32 bits and warps along rows", |p| consumer(p, Stmt::Mma { acc: frag(0), a: WgmmaA::Frag(frag(0)), b: tile(1, 64, 16), split: false })),
    ("rows and columns are two axes of the tensor", |p| consumer(p, Stmt::CopyIn { param: ParamId(0), at: vec![Dim::new(0), Dim::new(0)], axes: (1, 1), to: tile(0, 64, 64), vector: 1, ends: false })),
    // Barriers and threads.
    ("takes 0 arrivals", |p| first_barrier(p, |b| b.arrivals = 0)),
    ("the copies of this phase bring 18432 bytes", |p| each(p, |s| if let Stmt::ExpectBytes { bytes, .. } = s { *bytes -= 16 })),
    ("a phase takes 1 to 2^20 - 1 bytes", |p| each(p, |s| if let Stmt::ExpectBytes { bytes, .. } = s { *bytes = 1 << 20 })),
    ("barrier full is waited for, and nothing arrives at it", |p| each(p, |s| if let Stmt::ExpectBytes { barrier, .. } = s { barrier.barrier = BarrierId(1) })),
    ("barriers are never initialised", |p| p.setup.clear()),
    ("the phase is not that of the barrier's slot", |p| each(p, |s| if let Stmt::Wait { barrier, .. } = s { barrier.slot = Slot::Before(RingId(0)) })),
    ("the barrier does not exist", |p| each(p, |s| if let Stmt::Wait { barrier, .. } = s { barrier.barrier = BarrierId(7) })),
    ("the cluster has no such block", |p| each(p, |s| if let Stmt::Arrive { reach, .. } = s { *reach = Reach::Cta(Dim::new(2)) })),
    ("a copy reaches its own block, a row, a column or all", |p| each(p, |s| if let Stmt::TmaLoad { reach, .. } = s { *reach = Reach::Cta(Dim::new(1)) })),
    ("hardware barriers are 1 to 15", |p| each(p, |s| if let Stmt::NamedSync { id, .. } = s { *id = Dim::new(0) })),
    ("not whole warps of the block", |p| each(p, |s| if let Stmt::NamedSync { threads, .. } = s { *threads = 100 })),
    ("`tma commit`: belongs to one thread", |p| consumer(p, Stmt::TmaCommit)),
    ("`wgmma commit`: belongs to all threads of the instance", |p| p.roles[0].body.push(Stmt::WgmmaCommit)),
    ("moves the ring of some threads only", |p| consumer(p, Stmt::Once(vec![Stmt::Advance { ring: RingId(0), by: Dim::new(1) }]))),
    ("fragments belong to roles", |p| p.setup.push(Stmt::Fill { dst: frag(0), value: Value::Float(0.0) })),
    // Architectures.
    ("sm_80 has no tensor maps", |p| p.arch = Arch::Sm80),
    ("sm_89 has no clusters", |p| p.arch = Arch::Sm89),
    ("`wgmma fence`: sm_80 has no such instruction", |p| p.arch = Arch::Sm80),
];

#[test]
fn each_broken_rule_is_reported() {
    let original = common::gemm(3);
    verify(&original).unwrap_or_else(|e| panic!("{e:?}"));
    for (message, change) in BROKEN {
        let mut program = original.clone();
        change(&mut program);
        let report = verify(&program).expect_err(message);
        let notes = report.notes();
        assert!(notes.iter().any(|n| n.contains(message)), "{message}\n{report:?}");
    }
}

#[test]
fn all_violations_are_reported_at_once() {
    let mut program = common::gemm(3);
    program.cluster = 17;
    program.threads = 400;
    consumer(&mut program, Stmt::TmaCommit);
    let report = verify(&program).expect_err("three mistakes");
    assert!(report.notes().len() >= 3, "{report:?}");
}

#[test]
fn a_program_prints_as_it_is_read() {
    let got = common::gemm(3).to_string();
    let expected = include_str!("gemm.txt");
    if std::env::var_os("TW_BLESS").is_some_and(|v| v == "1") {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gemm.txt");
        std::fs::write(path, format!("{got}\n")).unwrap();
        return;
    }
    assert_eq!(got, expected.trim_end(), "run again with TW_BLESS=1 to accept");
}
