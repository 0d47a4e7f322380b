//! Device programs on the CPU: values against plain sums, and the checker on right programs.

mod common;

use half_bits::{from_bf16, to_bf16};
use std::sync::Arc;
use tilewright_device::*;
use tilewright_expr::Value;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, orders, run};
use tilewright_layout::{Dim, Env};
use tilewright_tile::ParamId;

/// bf16 by hand, so that the test depends on nothing it tests.
mod half_bits {
    pub(crate) fn to_bf16(value: f64) -> [u8; 2] {
        let bits = (value as f32).to_bits();
        let rounded = bits + 0x7FFF + ((bits >> 16) & 1);
        ((rounded >> 16) as u16).to_le_bytes()
    }

    pub(crate) fn from_bf16(bytes: &[u8]) -> f64 {
        let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16;
        f64::from(f32::from_bits(bits))
    }
}

fn sizes(m: i64, n: i64, k: i64) -> Env {
    [("M", m), ("N", n), ("K", k)].map(|(s, v)| (Arc::from(s), v)).into()
}

#[test]
fn a_hopper_matrix_product_gives_plain_sums() {
    // Partial tiles on every side.
    let (m, n, k) = (300usize, 44usize, 200usize);
    let numbers = |n: usize, f: f64| -> Vec<u8> {
        (0..n).flat_map(|i| to_bf16(((i as f64 + 1.0) * f).sin())).collect()
    };
    let (a, b) = (numbers(m * k, 0.7), numbers(k * n, 1.3));
    let at = |x: &[u8], i: usize| from_bf16(&x[2 * i..]);
    for (stages, order) in [2, 3].into_iter().zip([orders()[0], orders()[17]]) {
        let program = common::gemm(stages);
        let mut buffers = vec![a.clone(), b.clone(), vec![0xFF; m * n * 2]];
        let options = Options { mode: Mode::F64, clusters: 2, order, constants: vec![] };
        let env = sizes(m as i64, n as i64, k as i64);
        run(&program, &env, &mut buffers, &options).unwrap_or_else(|e| panic!("{e:?}"));
        for i in 0..m {
            for j in 0..n {
                // B's columns are contiguous.
                let sum: f64 = (0..k).map(|x| at(&a, i * k + x) * at(&b, j * k + x)).sum();
                let got = &buffers[2][2 * (i * n + j)..][..2];
                assert_eq!(got, to_bf16(sum), "at {i},{j}: {sum}");
            }
        }
    }
}

#[test]
fn a_hopper_matrix_product_is_ordered() {
    for stages in [2, 3] {
        let sizes = [sizes(512, 48, 192), sizes(300, 40, 64), sizes(512, 32, 320)];
        let report = check(&common::gemm(stages), &sizes, &[1, 2, 3]);
        let report = report.unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(report.runs, 3 * 3 * orders().len() as u64);
    }
}

/// The report of a program that the checker rejects.
fn report(program: &Program) -> String {
    let sizes = [sizes(512, 48, 192)];
    format!("{:?}", check(program, &sizes, &[2]).expect_err("a mistake"))
}

/// The steps of the consumer's loop over tiles.
fn tile_loop(program: &mut Program) -> &mut Vec<Stmt> {
    match &mut program.roles[1].body[0] {
        Stmt::For { body, .. } => body,
        _ => panic!("the consumer loops over tiles"),
    }
}

/// The steps of the consumer's loop over the depth.
fn depth_loop(program: &mut Program) -> &mut Vec<Stmt> {
    let is_loop = |s: &&mut Stmt| matches!(s, Stmt::For { .. });
    match tile_loop(program).iter_mut().find(is_loop) {
        Some(Stmt::For { body, .. }) => body,
        _ => panic!("the consumer loops over the depth"),
    }
}

fn right(program: &Program) {
    check(program, &[sizes(512, 48, 192)], &[2]).unwrap_or_else(|e| panic!("{e:?}"));
}

/// All warps of a consumer meet.
fn own_threads() -> Stmt {
    Stmt::NamedSync { id: Dim::sym("w") + 1, threads: 128 }
}

fn found(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
}

#[test]
fn a_deadlock_says_who_waits_for_what() {
    let mut program = common::gemm(2);
    tile_loop(&mut program).retain(|s| !matches!(s, Stmt::Arrive { .. }));
    let text = report(&program);
    found(
        &text,
        &["deadlock", "block 0 producer 0 waits at `wait empty[stage] phase before stage` (slot 0"],
    );
    found(&text, &["lacks 4 arrivals", "before: block", "checking gemm with K=192 M=512 N=48"]);
}

#[test]
fn races_and_missing_fences_name_both_sides() {
    let mut program = common::gemm(2);
    tile_loop(&mut program).retain(|s| !matches!(s, Stmt::FenceAsync));
    let store = "`tma store map_c[128*cta + 256*pm + 64*w, 16*pn] <- c[w][0 +64, 0 +16]`";
    found(
        &report(&program),
        &[store, "does not see the write by block", "<- out`: no fence by its thread"],
    );
    let mut program = common::gemm(2);
    tile_loop(&mut program).retain(|s| !matches!(s, Stmt::NamedSync { .. }));
    found(&report(&program), &["is not ordered after the", "c[0]"]);
}

#[test]
fn clusters_that_write_the_same_elements_race() {
    let mut program = common::gemm(2);
    // Every cluster takes every tile.
    for role in &mut program.roles {
        if let Stmt::For { lo, step, .. } = &mut role.body[0] {
            (*lo, *step) = (Dim::new(0), Dim::new(1));
        }
    }
    found(&report(&program), &["element", "of C is not ordered after the write"]);
    // Adding indivisibly, they may.
    if let Some(Stmt::Once(body)) = tile_loop(&mut program).last_mut()
        && let Stmt::TmaStore { add, .. } = &mut body[0]
    {
        *add = true;
    }
    right(&program);
}

#[test]
fn tensors_are_used_after_the_grid_wait() {
    let mut program = common::gemm(2);
    // The consumers wait, the producer does not.
    program.roles[1].body.insert(0, Stmt::GridWait);
    found(&report(&program), &["producer 0", "uses a tensor before the grid wait"]);
    program.roles[0].body.insert(0, Stmt::GridWait);
    right(&program);
}

#[test]
fn a_slot_or_tile_outside_is_an_error() {
    let mut program = common::gemm(2);
    for stmt in tile_loop(&mut program) {
        if let Stmt::ToSmem { to, .. } = stmt {
            to.slot = Slot::At(Dim::sym("w") + 2);
        }
    }
    found(&report(&program), &["uses slot 2 of 2"]);
    let mut program = common::gemm(2);
    for stmt in tile_loop(&mut program) {
        if let Stmt::ToSmem { to, .. } = stmt {
            to.row = Dim::sym("w") * 8;
        }
    }
    found(&report(&program), &["uses [8 +64, 0 +16], which c has not"]);
}

#[test]
fn too_many_arrivals_are_an_error() {
    let mut program = common::gemm(2);
    let full = program.barriers.ids().next().expect("a barrier");
    // One more arrival than a phase takes, while its bytes are under way.
    if let Stmt::For { body, .. } = &mut program.roles[0].body[0]
        && let Some(Stmt::For { body, .. }) = body.last_mut()
        && let Some(Stmt::TmaLoad { barrier: BarrierRef { slot, .. }, reach, .. }) = body.get(2)
    {
        let barrier = BarrierRef { barrier: full, slot: slot.clone() };
        let arrive = Stmt::Arrive { barrier, reach: reach.clone() };
        body.insert(2, arrive);
    }
    found(&report(&program), &["arrives at slot 0", "had its 1 arrivals and lacks 18432 bytes"]);
}

/// The product with stages that consumers also read as plain memory, 16 of the columns of `from`, before they let
/// go of them.
fn with_plain_reads(from: u32, fence: bool) -> Program {
    let mut program = common::gemm(2);
    let row = if from == 0 { Dim::sym("w") * 64 } else { Dim::new(0) };
    let stage = Slot::Ring(RingId(0));
    let from = SmemTile {
        smem: SmemId(from),
        slot: stage.clone(),
        row,
        col: Dim::new(0),
        rows: 64,
        cols: 16,
    };
    let dst = FragRef { frag: FragId(1), col: Dim::new(0), cols: None };
    let barrier = BarrierRef { barrier: BarrierId(1), slot: stage };
    let body = depth_loop(&mut program);
    // From the wait for the products on.
    let advance = body.pop().expect("a step");
    body.truncate(4);
    body.extend([Stmt::WgmmaWait { pending: 0 }, Stmt::FromSmem { dst, from }]);
    if fence {
        body.push(Stmt::FenceAsync);
    }
    body.extend([own_threads(), Stmt::Arrive { barrier, reach: Reach::All }, advance]);
    tile_loop(&mut program).retain(|s| !matches!(s, Stmt::Arrive { .. }));
    program
}

#[test]
fn plain_reads_need_a_fence_before_the_next_copy() {
    right(&with_plain_reads(0, true));
    let parts = ["tma load a[stage]", "does not see the read by block", "no fence by its thread"];
    found(&report(&with_plain_reads(0, false)), &parts);
}

/// The other block fills the right operand's stage, too, and only hears of plain reads by an arrival that releases
/// within a block.
#[test]
fn an_arrival_in_another_block_orders_no_plain_accesses() {
    let parts =
        ["tma load b[stage]", "of block 1 is not ordered after the read by block 1 consumer"];
    found(&report(&with_plain_reads(1, true)), &parts);
}

#[test]
fn the_copy_engine_is_not_ordered_after_plain_stores_to_global_memory() {
    let mut program = common::gemm(2);
    let body = tile_loop(&mut program);
    let fence = body.iter().position(|s| matches!(s, Stmt::FenceAsync)).expect("a fence");
    let Some(Stmt::Once(stores)) = body.last() else { panic!("a store") };
    let Stmt::TmaStore { at, .. } = &stores[0] else { panic!("a store") };
    let store = Stmt::Store {
        param: ParamId(2),
        at: at.clone(),
        axes: (Some(0), Some(1)),
        src: FragRef { frag: FragId(1), col: Dim::new(0), cols: None },
        vector: 1,
    };
    body.insert(fence, store);
    found(&report(&program), &["tma store", "of C does not see the write", "no work of the copy"]);
}

#[test]
fn products_of_two_shapes_need_a_fence_between() {
    let two_shapes = |fence: bool| {
        let mut program = common::gemm(2);
        let body = depth_loop(&mut program);
        let mut half = body[2].clone();
        if let Stmt::Wgmma { acc, b, zero_if, .. } = &mut half {
            (acc.cols, b.cols, *zero_if) = (Some(8), 8, None);
        }
        body.insert(3, half);
        if fence {
            body.insert(3, Stmt::WgmmaFence);
        }
        program
    };
    right(&two_shapes(true));
    let parts = ["follows products of another shape on its accumulators without a fence"];
    found(&report(&two_shapes(false)), &parts);
}

/// A warp that is slow to look at a barrier must not meet a later phase of the same parity: here the first
/// warp lets go of a stage while the others may not have seen that it was full.
#[test]
fn a_stage_is_let_go_when_all_warps_have_seen_it() {
    let unread = |meet: bool| {
        let mut program = common::gemm(2);
        let body = depth_loop(&mut program);
        let advance = body.pop().expect("a step");
        body.truncate(1);
        if meet {
            body.push(own_threads());
        }
        let barrier = BarrierRef { barrier: BarrierId(1), slot: Slot::Ring(RingId(0)) };
        body.extend([Stmt::Arrive { barrier, reach: Reach::All }, advance]);
        let tile = tile_loop(&mut program);
        tile.retain(|s| !matches!(s, Stmt::Arrive { .. } | Stmt::WgmmaWait { .. }));
        let dst = FragRef { frag: FragId(0), col: Dim::new(0), cols: None };
        tile.insert(0, Stmt::Fill { dst, value: Value::Float(0.0) });
        program
    };
    right(&unread(true));
    let parts = ["completes phase 1 of slot 0", "may still look for the phase before"];
    found(&report(&unread(false)), &parts);
}
