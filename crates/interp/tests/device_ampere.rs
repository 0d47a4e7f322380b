//! Device programs without Hopper's engines: a matrix product with `cp.async` and `mma.sync`, and a softmax of
//! rows by plain threads; their values, and that the checker misses no synchronising step.

use std::sync::Arc;
use tilewright_base::{DType, IdVec};
use tilewright_device::*;
use tilewright_expr::{Func, Value};
use tilewright_interp::device::{Options, check, run};
use tilewright_layout::{Dim, Env, Layout, Range, Symbol};
use tilewright_tile::{Access, Param, ParamId, ReduceKind};

fn sym(name: &str) -> Dim {
    Dim::sym(name)
}

fn num(value: i64) -> Dim {
    Dim::new(value)
}

fn whole(frag: FragId) -> FragRef {
    FragRef { frag, col: num(0), cols: None }
}

fn param(name: &str, rows: &str, cols: &str, access: Access) -> Param {
    let layout = Layout::row_major(&[sym(rows), sym(cols)]);
    Param { name: Arc::from(name), dtype: DType::F32, layout, access }
}

/// A program of one role over all of its warps, one block per item.
fn program(name: &str, warps: u32, symbols: &[&str], items: Dim, body: Vec<Stmt>) -> Program {
    let symbol = |s: &&str| Symbol { name: (*s).into(), range: Range { min: 1, max: 1 << 20 } };
    Program {
        name: name.to_string(),
        arch: Arch::Sm80,
        params: IdVec::new(),
        symbols: symbols.iter().map(symbol).collect(),
        maps: IdVec::new(),
        cluster: 1,
        threads: warps * 32,
        items,
        persistent: false,
        blocks_per_sm: 2,
        streams: Streams::Cached,
        ragged: false,
        smem: IdVec::new(),
        barriers: IdVec::new(),
        rings: IdVec::new(),
        frags: IdVec::new(),
        shelves: IdVec::new(),
        setup: vec![],
        roles: vec![Role {
            name: "all".to_string(),
            first_warp: 0,
            warps,
            instances: 1,
            instance: "one".into(),
            single_thread: false,
            registers: None,
            body,
        }],
        teardown: vec![],
    }
}

/// `C[M,N] = A[M,K] * B[K,N]` in tiles of 32 x 32, two stages of depth 16.
fn gemm() -> Program {
    let [a, b, c] = [0, 1, 2].map(ParamId);
    let [sa, sb] = [0, 1].map(SmemId);
    let (acc, stage) = (FragId(0), RingId(0));
    let tiles_n = sym("N").ceil_div(&num(32));
    let (row, col) = (sym("pm") * 32, sym("pn") * 32);
    let tile =
        |smem, rows, cols, slot| SmemTile { smem, slot, row: num(0), col: num(0), rows, cols };
    // The copy of step `k` into the stage of the ring.
    let copy = |k: Dim| {
        let slot = || Slot::Ring(stage);
        vec![
            Stmt::CopyIn {
                param: a,
                at: vec![row.clone(), &k * 16],
                axes: (0, 1),
                to: tile(sa, 32, 16, slot()),
                vector: 4,
                ends: false,
            },
            Stmt::CopyIn {
                param: b,
                at: vec![k * 16, col.clone()],
                axes: (0, 1),
                to: tile(sb, 16, 32, slot()),
                vector: 4,
                ends: false,
            },
            Stmt::CopyCommit,
            Stmt::Advance { ring: stage, by: num(1) },
        ]
    };
    let before = || Slot::Before(stage);
    let mut turn = copy(sym("k") + 1);
    // The ring stands behind the stage that was just filled, which is one after the one to use.
    turn.extend([
        Stmt::CopyWait { pending: 1 },
        Stmt::SyncBlock,
        Stmt::Mma {
            acc: whole(acc),
            a: WgmmaA::Smem(tile(sa, 32, 16, Slot::Ring(stage))),
            b: tile(sb, 16, 32, Slot::Ring(stage)),
            split: false,
        },
        Stmt::SyncBlock,
    ]);
    let mut body = vec![
        Stmt::Let { name: "pm".into(), value: sym(CLUSTER).floor_div(&tiles_n) },
        Stmt::Let { name: "pn".into(), value: sym(CLUSTER).modulo(&tiles_n) },
        Stmt::Fill { dst: whole(acc), value: Value::Float(0.0) },
    ];
    body.extend(copy(num(0)));
    body.extend([
        Stmt::For {
            var: "k".into(),
            lo: num(0),
            hi: sym("K").ceil_div(&num(16)) - 1,
            step: num(1),
            body: turn,
        },
        Stmt::CopyWait { pending: 0 },
        Stmt::SyncBlock,
        Stmt::Mma {
            acc: whole(acc),
            a: WgmmaA::Smem(tile(sa, 32, 16, before())),
            b: tile(sb, 16, 32, before()),
            split: false,
        },
        Stmt::Store {
            param: c,
            at: vec![row.clone(), col.clone()],
            axes: (Some(0), Some(1)),
            src: whole(acc),
            vector: 2,
        },
    ]);
    let items = sym("M").ceil_div(&num(32)) * &tiles_n;
    let mut p = program("gemm", 4, &["M", "N", "K"], items, body);
    p.params.push(param("A", "M", "K", Access::In));
    p.params.push(param("B", "K", "N", Access::In));
    p.params.push(param("C", "M", "N", Access::Out));
    for (name, rows, cols, swizzle) in [("a", 32, 16, Swizzle::B64), ("b", 16, 32, Swizzle::B128)] {
        let (name, dtype, slots) = (name.to_string(), DType::F32, 2);
        p.smem.push(Smem { name, dtype, rows, cols, contiguous: 1, swizzle, slots });
    }
    p.rings.push(Ring { name: "stage".to_string(), stages: 2 });
    p.frags.push(Frag {
        name: "acc".to_string(),
        dtype: DType::F32,
        rows: 32,
        cols: 32,
        spread: Spread::MmaSync { warps_m: 2, warps_n: 2 },
        extent: Extent::Tile,
    });
    p
}

/// `Y[R,C] = softmax of the rows of X`, 8 rows of at most 64 columns per block; through shared
/// memory and back, to have something to order.
fn softmax() -> Program {
    let [x, peak, sum] = [0, 1, 2].map(FragId);
    let at = || vec![sym(CLUSTER) * 8, num(0)];
    let both = DType::F32;
    let map = |dst, text: &str, args: Vec<FragRef>| {
        let func = Func::parse(text, &vec![both; args.len()]).unwrap_or_else(|e| panic!("{e:?}"));
        Stmt::Map { dst, func, args }
    };
    let half = |h: &str| FragRef { frag: x, col: sym(h) * 32, cols: Some(32) };
    let staged = |h: &str| SmemTile {
        smem: SmemId(0),
        slot: Slot::At(num(0)),
        row: num(0),
        col: sym(h) * 32,
        rows: 8,
        cols: 32,
    };
    let axes = (Some(0), Some(1));
    let outside = Value::Float(f64::NEG_INFINITY);
    let halves = |step: Stmt| Stmt::Unroll { var: "h".into(), count: 2, body: vec![step] };
    let body = vec![
        Stmt::Load { dst: whole(x), param: ParamId(0), at: at(), axes, fill: outside, vector: 4 },
        Stmt::Reduce { dst: whole(peak), kind: ReduceKind::Max, src: whole(x), accumulate: false },
        map(whole(x), "{ x, m -> exp(x - m) }", vec![whole(x), whole(peak)]),
        Stmt::Reduce { dst: whole(sum), kind: ReduceKind::Sum, src: whole(x), accumulate: false },
        map(whole(x), "{ x, s -> x / s }", vec![whole(x), whole(sum)]),
        halves(Stmt::ToSmem { to: staged("h"), src: half("h") }),
        Stmt::NamedSync { id: num(1), threads: 64 },
        halves(Stmt::FromSmem { dst: half("h"), from: staged("h") }),
        Stmt::Store { param: ParamId(1), at: at(), axes, src: whole(x), vector: 4 },
    ];
    let mut p = program("softmax", 2, &["R", "C"], sym("R").ceil_div(&num(8)), body);
    p.params.push(param("X", "R", "C", Access::In));
    p.params.push(param("Y", "R", "C", Access::Out));
    let (name, dtype, swizzle) = ("y".to_string(), DType::F32, Swizzle::None);
    p.smem.push(Smem { name, dtype, rows: 8, cols: 64, contiguous: 1, swizzle, slots: 1 });
    let lines = Spread::Lines { lanes: 8, vector: 4, threads: 64 };
    for (name, extent) in [("x", Extent::Tile), ("peak", Extent::PerRow), ("sum", Extent::PerRow)] {
        let name = name.to_string();
        p.frags.push(Frag { name, dtype, rows: 8, cols: 64, spread: lines, extent });
    }
    p
}

fn env(sizes: &[(&str, usize)]) -> Env {
    sizes.iter().map(|(s, v)| (Arc::from(*s), *v as i64)).collect()
}

fn numbers(n: usize, seed: f64) -> Vec<f32> {
    (0..n).map(|i| ((i as f64 + 1.0) * seed).sin() as f32).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

fn right(program: &Program, sizes: &Env) {
    verify(program).unwrap_or_else(|e| panic!("{e:?}"));
    check(program, std::slice::from_ref(sizes), &[1]).unwrap_or_else(|e| panic!("{e:?}"));
}

#[test]
fn a_matrix_product_with_plain_copies() {
    let (m, n, k) = (50, 44, 56);
    let (a, b) = (numbers(m * k, 0.7), numbers(k * n, 1.3));
    let (program, sizes) = (gemm(), env(&[("M", m), ("N", n), ("K", k)]));
    right(&program, &sizes);
    let mut buffers = vec![bytes(&a), bytes(&b), bytes(&vec![f32::NAN; m * n])];
    run(&program, &sizes, &mut buffers, &Options::default()).unwrap_or_else(|e| panic!("{e:?}"));
    let got = floats(&buffers[2]);
    for i in 0..m {
        for j in 0..n {
            let want: f64 = (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[x * n + j])).sum();
            assert_eq!(got[i * n + j], want as f32, "at {i},{j}");
        }
    }
}

#[test]
fn a_softmax_by_plain_threads() {
    let (rows, cols) = (13, 50);
    let x = numbers(rows * cols, 1.7);
    let (program, sizes) = (softmax(), env(&[("R", rows), ("C", cols)]));
    right(&program, &sizes);
    let mut buffers = vec![bytes(&x), bytes(&vec![f32::NAN; rows * cols])];
    run(&program, &sizes, &mut buffers, &Options::default()).unwrap_or_else(|e| panic!("{e:?}"));
    let got = floats(&buffers[1]);
    for (row, got) in x.chunks(cols).zip(got.chunks(cols)) {
        let peak = row.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
        let exps: Vec<f64> = row.iter().map(|&v| (f64::from(v) - peak).exp()).collect();
        let sum: f64 = exps.iter().sum();
        for (g, e) in got.iter().zip(exps) {
            assert!((f64::from(*g) - e / sum).abs() <= 1e-7 * (e / sum), "{g} for {}", e / sum);
        }
    }
}

/// All programs with one synchronising step less.
fn without(block: &[Stmt]) -> Vec<(Stmt, Vec<Stmt>)> {
    let mut out = Vec::new();
    for (i, stmt) in block.iter().enumerate() {
        let mut less = block.to_vec();
        match stmt {
            Stmt::SyncBlock
            | Stmt::NamedSync { .. }
            | Stmt::CopyCommit
            | Stmt::CopyWait { .. }
            | Stmt::Advance { .. } => {
                less.remove(i);
                out.push((stmt.clone(), less));
            }
            Stmt::For { body, .. } => {
                for (gone, inside) in without(body) {
                    let mut less = block.to_vec();
                    if let Stmt::For { body, .. } = &mut less[i] {
                        *body = inside;
                    }
                    out.push((gone, less));
                }
            }
            _ => {}
        }
    }
    out
}

#[test]
fn a_step_less_is_caught() {
    let sizes = [
        (gemm(), env(&[("M", 50), ("N", 44), ("K", 80)])),
        (softmax(), env(&[("R", 9), ("C", 50)])),
    ];
    let mut count = 0;
    for (program, sizes) in sizes {
        // Nothing else may be what is caught.
        right(&program, &sizes);
        for (gone, body) in without(&program.roles[0].body) {
            let mut mutant = program.clone();
            mutant.roles[0].body = body;
            let caught = verify(&mutant).is_err()
                || check(&mutant, std::slice::from_ref(&sizes), &[1]).is_err();
            assert!(caught, "{} without `{}`", program.name, program.step_text(&gone));
            count += 1;
        }
    }
    assert_eq!(count, 10);
}
