//! Compiled kernels against the interpreter: shapes with tails, layouts, data types.

mod common;

use common::{Rng, check, check_with, fill, knobs, schedule};
use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Op, Value};
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, ReduceKind, TileType};

const F32: DType = DType::F32;

fn size(b: &mut KernelBuilder, name: &str) -> Dim {
    b.symbol(Symbol { name: name.into(), range: Range { min: 1, max: 4096 } });
    Dim::sym(name)
}

fn d(v: i64) -> Dim {
    Dim::new(v)
}

fn gelu_bias() -> Func {
    let mut f = FuncBuilder::new();
    let (x, b) = (f.param("x", F32), f.param("b", F32));
    let s = f.op(Op::Add, &[x, b]);
    let c = f.constant(std::f64::consts::FRAC_1_SQRT_2, F32);
    let t = f.op(Op::Mul, &[s, c]);
    let e = f.op(Op::Erf, &[t]);
    let one = f.constant(1.0, F32);
    let e = f.op(Op::Add, &[e, one]);
    let half = f.constant(0.5, F32);
    let h = f.op(Op::Mul, &[s, half]);
    let y = f.op(Op::Mul, &[h, e]);
    f.finish(y)
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Row,
    Transposed,
    Panels(i64),
    Blocked(i64),
}

fn placed(rows: &Dim, cols: &Dim, place: Place, axis: usize) -> Layout {
    let shape = [rows.clone(), cols.clone()];
    match place {
        Place::Row => Layout::row_major(&shape),
        Place::Transposed => Layout::row_major(&[cols.clone(), rows.clone()]).permute(&[1, 0]),
        Place::Panels(n) => Layout::panels(&shape, axis, n),
        Place::Blocked(n) => Layout::blocked(&shape, axis, n),
    }
}

/// `C = A B`, with or without `gelu(x + bias)`, over several depth tiles.
fn gemm(
    dims: [Dim; 3],
    symbols: &[&str],
    a_place: Place,
    b_place: Place,
    types: [DType; 3],
    epilogue: bool,
) -> Kernel {
    let mut b = KernelBuilder::new("gemm");
    for s in symbols {
        size(&mut b, s);
    }
    let (bm, bn, bk) = (b.tile("BM"), b.tile("BN"), b.tile("BK"));
    let [m, n, k] = dims;
    let pm = b.grid("pm", m.ceil_div(&bm));
    let pn = b.grid("pn", n.ceil_div(&bn));
    let a = b.param("A", types[0], placed(&m, &k, a_place, 1), Access::In);
    let w = b.param("B", types[1], placed(&k, &n, b_place, 1), Access::In);
    let bias = b.param("bias", F32, Layout::row_major(std::slice::from_ref(&n)), Access::In);
    let c = b.param("C", types[2], Layout::row_major(&[m, n]), Access::Out);
    let acc = if types[2].is_float() { F32 } else { DType::I32 };
    let zero = b.full(
        if acc == F32 { Value::Float(0.0) } else { Value::Int(0) },
        TileType::new(acc, vec![bm.clone(), bn.clone()]),
    );
    let (i, carried) = b.begin_for("k", d(0), k.ceil_div(&bk), &[zero]);
    let ta = b.load(a, vec![&pm * &bm, &i * &bk], vec![bm.clone(), bk.clone()]);
    let tb = b.load(w, vec![&i * &bk, &pn * &bn], vec![bk.clone(), bn.clone()]);
    let x = b.mma(carried[0], ta, tb, Some(&k - &i * &bk));
    let mut out = b.end_for(&[x])[0];
    if epilogue {
        let v = b.load(bias, vec![&pn * &bn], vec![bn.clone()]);
        let args = vec![b.plain(out), Operand { tile: v, along: vec![1] }];
        out = b.map(gelu_bias(), args, vec![bm.clone(), bn.clone()]);
    }
    if acc != types[2] {
        let args = vec![b.plain(out)];
        out = b.map(Func::cast(acc, types[2]), args, vec![bm.clone(), bn.clone()]);
    }
    b.store(c, vec![&pm * &bm, &pn * &bn], out);
    b.finish()
}

#[test]
fn products_of_every_shape() {
    let f = [F32, F32, F32];
    for knobs in knobs() {
        let width = i64::from(knobs.vector_bits / 32 * knobs.mma_vectors);
        for (m, n, k) in
            [(1, 1, 1), (5, 7, 3), (16, 32, 16), (37, 50, 41), (64, 96, 128), (30, 33, 65)]
        {
            for (bm, bn, bk) in [(16, 32, 16), (32, 64, 64)] {
                let s = schedule(&[("BM", bm), ("BN", bn), ("BK", bk)], knobs.clone());
                let dims = [d(m), d(n), d(k)];
                check(&gemm(dims, &[], Place::Row, Place::Panels(width), f, true), &s, &[], 2e-5);
            }
        }
        let s = schedule(&[("BM", 32), ("BN", 64), ("BK", 32)], knobs.clone());
        let symbolic = || [Dim::sym("M"), Dim::sym("N"), Dim::sym("K")];
        for b_place in [Place::Row, Place::Transposed, Place::Panels(width)] {
            for a_place in [Place::Row, Place::Transposed, Place::Blocked(16)] {
                let kernel = gemm(symbolic(), &["M", "N", "K"], a_place, b_place, f, true);
                for (m, n, k) in [(1, 1, 1), (37, 50, 41), (64, 128, 96), (33, 65, 70)] {
                    check(&kernel, &s, &[("M", m), ("N", n), ("K", k)], 2e-5);
                }
            }
        }
    }
}

#[test]
fn products_of_other_types() {
    for knobs in knobs() {
        let s = schedule(&[("BM", 16), ("BN", 32), ("BK", 32)], knobs.clone());
        for (types, tolerance) in [
            ([DType::BF16, DType::BF16, F32], 2e-5),
            ([DType::F16, DType::F16, DType::F16], 2e-3),
            ([DType::BF16, DType::BF16, DType::BF16], 1e-2),
            ([DType::I8, DType::I8, DType::I32], 0.0),
            ([DType::U8, DType::I8, DType::I32], 0.0),
        ] {
            let kernel = gemm([d(19), d(45), d(50)], &[], Place::Row, Place::Row, types, false);
            if types[0].is_float() {
                check(&kernel, &s, &[], tolerance);
            }
        }
    }
}

/// One map: `out[perm] = f(a, row b)`, any layouts.
fn map2(op: Op, dtype: DType, in_place: Layout, out_place: Layout, row: bool) -> Kernel {
    let mut b = KernelBuilder::new("map2");
    let (bm, bn) = (b.tile("BM"), b.tile("BN"));
    let shape = out_place.shape();
    let pm = b.grid("pm", shape[0].ceil_div(&bm));
    let pn = b.grid("pn", shape[1].ceil_div(&bn));
    let x = b.param("x", dtype, in_place, Access::In);
    let y = b.param("y", dtype, Layout::row_major(&[shape[usize::from(row)].clone()]), Access::In);
    let out = b.param("out", Func::binary(op, dtype).dtype(), out_place, Access::Out);
    let tile = vec![bm.clone(), bn.clone()];
    let tx = b.load(x, vec![&pm * &bm, &pn * &bn], tile.clone());
    let (at, extent, along) =
        if row { (&pn * &bn, bn.clone(), 1) } else { (&pm * &bm, bm.clone(), 0) };
    let ty = b.load(y, vec![at], vec![extent]);
    let args = vec![b.plain(tx), Operand { tile: ty, along: vec![along] }];
    let r = b.map(Func::binary(op, dtype), args, tile);
    b.store(out, vec![&pm * &bm, &pn * &bn], r);
    b.finish()
}

#[test]
fn maps_over_layouts_and_types() {
    let types = [
        F32,
        DType::F64,
        DType::F16,
        DType::BF16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::I64,
        DType::I32,
        DType::I16,
        DType::I8,
        DType::U8,
        DType::U64,
        DType::I4,
        DType::U4,
    ];
    for knobs in knobs() {
        let s = schedule(&[("BM", 8), ("BN", 64)], knobs.clone());
        for (m, n) in [(1, 1), (3, 100), (17, 37)] {
            let row = Layout::row_major(&[d(m), d(n)]);
            let turned = Layout::row_major(&[d(n), d(m)]).permute(&[1, 0]);
            let blocked = Layout::blocked(&[d(m), d(n)], 1, 16);
            for (i, o) in
                [(&row, &row), (&turned, &row), (&row, &turned), (&blocked, &row), (&row, &blocked)]
            {
                check(&map2(Op::Add, F32, i.clone(), o.clone(), true), &s, &[], 0.0);
                check(&map2(Op::Lt, F32, i.clone(), o.clone(), false), &s, &[], 0.0);
            }
        }
        for t in types {
            // Blocks of 4-bit elements must not share a byte: whole rows of even length.
            let row = Layout::row_major(&[d(9), d(64)]);
            check(&map2(Op::Mul, t, row.clone(), row.clone(), true), &s, &[], 0.0);
            check(&map2(Op::Max, t, row.clone(), row.clone(), false), &s, &[], 0.0);
            // One element behind whole vectors: what it takes in a register is wider than in memory.
            for n in [9, 17, 33, 65].into_iter().filter(|_| t.bits() >= 8) {
                let row = Layout::row_major(&[d(3), d(n)]);
                check(&map2(Op::Mul, t, row.clone(), row, true), &s, &[], 0.0);
            }
        }
    }
}

#[test]
fn views_with_offset_and_zero_sizes() {
    for knobs in knobs() {
        let s = schedule(&[("BM", 4), ("BN", 32)], knobs.clone());
        let mut view = Layout::row_major(&[d(10), d(60)]).slice(1, &d(5), &d(41), 1).unwrap();
        view = view.slice(0, &d(2), &d(4), 2).unwrap();
        check(&map2(Op::Sub, F32, view, Layout::row_major(&[d(4), d(41)]), true), &s, &[], 0.0);
        let empty = Layout::row_major(&[d(0), d(41)]);
        check(&map2(Op::Sub, F32, empty.clone(), empty, true), &s, &[], 0.0);
    }
}

/// A copy from one layout to another.
fn copy(mut b: KernelBuilder, dtype: DType, from: Layout, to: Layout) -> Kernel {
    let (bm, bn) = (b.tile("BM"), b.tile("BN"));
    let shape = to.shape();
    let pm = b.grid("pm", shape[0].ceil_div(&bm));
    let pn = b.grid("pn", shape[1].ceil_div(&bn));
    let x = b.param("x", dtype, from, Access::In);
    let out = b.param("out", dtype, to, Access::Out);
    let tile = b.load(x, vec![&pm * &bm, &pn * &bn], vec![bm.clone(), bn.clone()]);
    b.store(out, vec![&pm * &bm, &pn * &bn], tile);
    b.finish()
}

#[test]
fn copies_across() {
    for knobs in knobs() {
        let s = schedule(&[("BM", 32), ("BN", 64)], knobs.clone());
        let turned = |m: &Dim, n: &Dim| Layout::row_major(&[n.clone(), m.clone()]).permute(&[1, 0]);
        for (m, n, t) in [
            (16, 16, F32),
            (32, 64, F32),
            (37, 50, F32),
            (37, 50, DType::I32),
            (33, 17, DType::BF16),
            (37, 50, DType::U8),
            (33, 17, DType::I8),
        ] {
            let (m, n) = (d(m), d(n));
            let row = Layout::row_major(&[m.clone(), n.clone()]);
            let kernel = copy(KernelBuilder::new("copy"), t, turned(&m, &n), row.clone());
            check(&kernel, &s, &[], 0.0);
            let kernel = copy(KernelBuilder::new("copy"), t, row, turned(&m, &n));
            check(&kernel, &s, &[], 0.0);
        }
        for sizes in [[16, 16], [45, 70], [15, 3]] {
            let mut b = KernelBuilder::new("copy");
            let (m, n) = (size(&mut b, "M"), size(&mut b, "N"));
            let row = Layout::row_major(&[m.clone(), n.clone()]);
            let kernel = copy(b, F32, turned(&m, &n), row);
            check(&kernel, &s, &[("M", sizes[0]), ("N", sizes[1])], 0.0);
        }
    }
}

/// A copy across into a larger tensor: what lies around the data is read outside of it.
#[test]
fn copies_across_with_a_border() {
    for knobs in knobs() {
        let s = schedule(&[("BM", 32), ("BN", 64)], knobs.clone());
        for (m, n, t) in [(35, 48, DType::U8), (16, 61, DType::I8), (50, 33, F32)] {
            let mut b = KernelBuilder::new("pad");
            let (bm, bn) = (b.tile("BM"), b.tile("BN"));
            let pm = b.grid("pm", d(m + 3).ceil_div(&bm));
            let pn = b.grid("pn", d(n + 2).ceil_div(&bn));
            let turned = Layout::row_major(&[d(n), d(m)]).permute(&[1, 0]);
            let x = b.param("x", t, turned, Access::In);
            let out = b.param("out", t, Layout::row_major(&[d(m + 3), d(n + 2)]), Access::Out);
            let fill = if t == F32 { Value::Float(7.5) } else { Value::Int(7) };
            let index = vec![&pm * &bm - 1, &pn * &bn - 1];
            let tile = b.load_with(x, index, vec![1, 1], fill, vec![bm.clone(), bn.clone()]);
            b.store(out, vec![&pm * &bm, &pn * &bn], tile);
            check(&b.finish(), &s, &[], 0.0);
        }
    }
}

/// Softmax of rows in one block, `BN` at least the row.
fn softmax() -> Kernel {
    let mut b = KernelBuilder::new("softmax");
    let (m, n) = (size(&mut b, "M"), size(&mut b, "N"));
    softmax_over(b, m, n)
}

fn softmax_over(mut b: KernelBuilder, m: Dim, n: Dim) -> Kernel {
    let (bm, bn) = (b.tile("BM"), b.tile("BN"));
    let pm = b.grid("pm", m.ceil_div(&bm));
    let x = b.param("x", F32, Layout::row_major(&[m.clone(), n.clone()]), Access::In);
    let y = b.param("y", F32, Layout::row_major(&[m, n.clone()]), Access::Out);
    let shape = vec![bm.clone(), bn.clone()];
    let t = b.load(x, vec![&pm * &bm, d(0)], shape.clone());
    let top = b.reduce(ReduceKind::Max, t, 1, Some(n.clone()));
    let mut f = FuncBuilder::new();
    let (a, c) = (f.param("a", F32), f.param("c", F32));
    let s = f.op(Op::Sub, &[a, c]);
    let e = f.op(Op::Exp, &[s]);
    let f = f.finish(e);
    let args = vec![b.plain(t), Operand { tile: top, along: vec![0] }];
    let e = b.map(f, args, shape.clone());
    let sum = b.reduce(ReduceKind::Sum, e, 1, Some(n));
    let args = vec![b.plain(e), Operand { tile: sum, along: vec![0] }];
    let r = b.map(Func::binary(Op::Div, F32), args, shape);
    b.store(y, vec![&pm * &bm, d(0)], r);
    b.finish()
}

#[test]
fn softmax_of_rows() {
    for knobs in knobs() {
        let s = schedule(&[("BM", 4), ("BN", 512)], knobs.clone());
        for (m, n) in [(1, 1), (5, 37), (4, 512), (9, 300)] {
            check(&softmax(), &s, &[("M", m), ("N", n)], 1e-6);
        }
    }
}

/// Stores past the caches and asking for the next block's rows change no result, wherever the buffers
/// start; rows that are no whole vectors are stored as ever.
#[test]
fn softmax_past_the_caches() {
    for mut knobs in knobs() {
        (knobs.stream, knobs.ahead) = (true, true);
        for n in [64, 72, 512] {
            let kernel = softmax_over(KernelBuilder::new("softmax"), d(9), d(n));
            let s = schedule(&[("BM", 2), ("BN", 512)], knobs.clone());
            let ir = tilewright_emit_llvm::emit_kernel(&kernel, &s).unwrap().llvm_ir;
            let lanes = i64::from(knobs.vector_bits / 32);
            assert_eq!(ir.contains("!nontemporal"), n % lanes == 0, "{n}");
            assert!(ir.contains("@llvm.prefetch"), "{n}");
            check(&kernel, &s, &[], 1e-6);
        }
    }
}

/// Every kind of reduction, scan and position along each axis of a `[2, 3, n]`-ish tile.
#[test]
fn reductions_and_scans() {
    for knobs in knobs() {
        for dtype in [F32, DType::F64, DType::BF16, DType::I32, DType::I64, DType::U8, DType::Bool]
        {
            for axis in 0..2 {
                let mut b = KernelBuilder::new("reduce");
                let (m, n) = (size(&mut b, "M"), size(&mut b, "N"));
                let (bm, bn) = (b.tile("BM"), b.tile("BN"));
                let x = b.param("x", dtype, Layout::row_major(&[m.clone(), n.clone()]), Access::In);
                let rest = if axis == 0 { n.clone() } else { m.clone() };
                let limit = if axis == 0 { m.clone() } else { n.clone() };
                let shape = vec![bm, bn];
                let t = b.load(x, vec![d(0), d(0)], shape);
                let one = Layout::row_major(&[rest]);
                for (i, kind) in
                    [ReduceKind::Sum, ReduceKind::Prod, ReduceKind::Max, ReduceKind::Min]
                        .into_iter()
                        .enumerate()
                {
                    if dtype == DType::Bool && i < 2 {
                        continue;
                    }
                    let o = b.param(&format!("r{i}"), dtype, one.clone(), Access::Out);
                    let r = b.reduce(kind, t, axis, Some(limit.clone()));
                    b.store(o, vec![d(0)], r);
                    if i >= 2 {
                        for last in [false, true] {
                            let o = b.param(
                                &format!("a{i}{last}"),
                                DType::I64,
                                one.clone(),
                                Access::Out,
                            );
                            let r = b.arg_reduce(kind, t, axis, Some(limit.clone()), last);
                            b.store(o, vec![d(0)], r);
                        }
                    }
                }
                for (i, (exclusive, reverse)) in
                    [(false, false), (true, false), (false, true)].into_iter().enumerate()
                {
                    // The interpreter rounds a running sum at each step, compiled code carries it in f32.
                    if dtype == DType::Bool || dtype == DType::BF16 {
                        continue;
                    }
                    let all = Layout::row_major(&[m.clone(), n.clone()]);
                    let o = b.param(&format!("s{i}"), dtype, all, Access::Out);
                    let r = b.scan(ReduceKind::Sum, t, axis, exclusive, reverse);
                    b.store(o, vec![d(0), d(0)], r);
                }
                let kernel = b.finish();
                let s = schedule(&[("BM", 8), ("BN", 128)], knobs.clone());
                let tolerance = match dtype {
                    DType::BF16 => 0.05,
                    DType::F64 => 1e-13,
                    _ => 1e-5,
                };
                for (m, n) in [(1, 1), (3, 100), (8, 128), (5, 19)] {
                    check(&kernel, &s, &[("M", m), ("N", n)], tolerance);
                }
            }
        }
    }
}

#[test]
fn gather_iota_random_branches_atomics() {
    for knobs in knobs() {
        let mut b = KernelBuilder::new("mixed");
        let n = size(&mut b, "N");
        let (bn, bc) = (b.tile("BN"), b.tile("BC"));
        let p = b.grid("p", n.ceil_div(&bn));
        let table = b.param("table", F32, Layout::row_major(&[d(7), d(37)]), Access::In);
        let ids =
            b.param("ids", DType::I64, Layout::row_major(std::slice::from_ref(&n)), Access::In);
        let out = b.param("out", F32, Layout::row_major(&[n.clone(), d(37)]), Access::Out);
        let io = b.param("iota", DType::I32, Layout::row_major(&[n.clone(), d(37)]), Access::Out);
        let ra = b.param("random", F32, Layout::row_major(&[n.clone(), d(37)]), Access::Out);
        let sum = b.param("sum", F32, Layout::row_major(&[d(37)]), Access::InOut);
        let rows = b.load(ids, vec![&p * &bn], vec![bn.clone()]);
        let g = b.gather(table, 0, rows, vec![d(0), d(0)], vec![bn.clone(), bc.clone()]);
        b.store(out, vec![&p * &bn, d(0)], g);
        let i = b.iota(DType::I32, 0, &p * &bn + 5, vec![bn.clone(), bc.clone()]);
        b.store(io, vec![&p * &bn, d(0)], i);
        let r = b.random(F32, 0x1234_5678_9abc_def0, &p * &bn * &bc, vec![bn.clone(), bc.clone()]);
        b.store(ra, vec![&p * &bn, d(0)], r);
        let one = b.full(Value::Float(0.25), TileType::new(F32, vec![bc.clone()]));
        b.atomic_add(sum, vec![d(0)], one);
        let kernel = b.finish();
        let s = schedule(&[("BN", 4), ("BC", 64)], knobs.clone());
        for n in [1, 4, 11] {
            check(&kernel, &s, &[("N", n)], 0.0);
        }
    }
}

/// Flash-style attention over one head: online softmax with three carried tiles.
fn attention(head: i64) -> Kernel {
    let mut b = KernelBuilder::new("attention");
    let (sq, sk) = (size(&mut b, "Q"), size(&mut b, "S"));
    let (bq, bk) = (b.tile("BQ"), b.tile("BK"));
    let p = b.grid("p", sq.ceil_div(&bq));
    let lay = |n: &Dim| Layout::row_major(&[n.clone(), d(head)]);
    let q = b.param("q", F32, lay(&sq), Access::In);
    let k = b.param("k", F32, lay(&sk), Access::In);
    let v = b.param("v", F32, lay(&sk), Access::In);
    let o = b.param("o", F32, lay(&sq), Access::Out);
    let tq = b.load(q, vec![&p * &bq, d(0)], vec![bq.clone(), d(head)]);
    let m0 = b.full(Value::Float(f64::NEG_INFINITY), TileType::new(F32, vec![bq.clone()]));
    let l0 = b.full(Value::Float(0.0), TileType::new(F32, vec![bq.clone()]));
    let a0 = b.full(Value::Float(0.0), TileType::new(F32, vec![bq.clone(), d(head)]));
    let (j, c) = b.begin_for("j", d(0), sk.ceil_div(&bk), &[m0, l0, a0]);
    let tk = b.load(k, vec![&j * &bk, d(0)], vec![bk.clone(), d(head)]);
    let kt = b.permute(tk, &[1, 0]);
    let s0 = b.full(Value::Float(0.0), TileType::new(F32, vec![bq.clone(), bk.clone()]));
    let s = b.mma(s0, tq, kt, None);
    let limit = &sk - &j * &bk;
    let top = b.reduce(ReduceKind::Max, s, 1, Some(limit.clone()));
    let args = vec![b.plain(c[0]), b.plain(top)];
    let m1 = b.map(Func::binary(Op::Max, F32), args, vec![bq.clone()]);
    let mut f = FuncBuilder::new();
    let (x, y) = (f.param("x", F32), f.param("y", F32));
    let z = f.op(Op::Sub, &[x, y]);
    let z = f.op(Op::Exp, &[z]);
    let f = f.finish(z);
    let args = vec![b.plain(s), Operand { tile: m1, along: vec![0] }];
    let pr = b.map(f.clone(), args, vec![bq.clone(), bk.clone()]);
    let args = vec![b.plain(c[0]), b.plain(m1)];
    let alpha = b.map(f, args, vec![bq.clone()]);
    let ps = b.reduce(ReduceKind::Sum, pr, 1, Some(limit.clone()));
    let mut f = FuncBuilder::new();
    let (l, a, q) = (f.param("l", F32), f.param("a", F32), f.param("q", F32));
    let z = f.op(Op::Mul, &[l, a]);
    let z = f.op(Op::Add, &[z, q]);
    let f = f.finish(z);
    let args = vec![b.plain(c[1]), b.plain(alpha), b.plain(ps)];
    let l1 = b.map(f, args, vec![bq.clone()]);
    let args = vec![b.plain(c[2]), Operand { tile: alpha, along: vec![0] }];
    let scaled = b.map(Func::binary(Op::Mul, F32), args, vec![bq.clone(), d(head)]);
    let tv = b.load(v, vec![&j * &bk, d(0)], vec![bk.clone(), d(head)]);
    let a1 = b.mma(scaled, pr, tv, Some(limit));
    let r = b.end_for(&[m1, l1, a1]);
    let args = vec![b.plain(r[2]), Operand { tile: r[1], along: vec![0] }];
    let out = b.map(Func::binary(Op::Div, F32), args, vec![bq.clone(), d(head)]);
    b.store(o, vec![&p * &bq, d(0)], out);
    b.finish()
}

#[test]
fn attention_with_online_softmax() {
    for knobs in knobs() {
        for head in [8, 32, 40] {
            let s = schedule(&[("BQ", 32), ("BK", 48)], knobs.clone());
            for (q, k) in [(1, 1), (17, 48), (40, 100), (64, 96)] {
                check(&attention(head), &s, &[("Q", q), ("S", k)], 2e-5);
            }
        }
    }
}

/// Convolution by taps with padding: input rows read outside are zero.
fn conv(stride: i64, channels_last_block: Option<i64>) -> Kernel {
    let (c, oc, h, w) = (d(20), d(40), d(9), d(11));
    let mut b = KernelBuilder::new("conv");
    let (bw, bc, bo) = (b.tile("BW"), b.tile("BC"), b.tile("BO"));
    let (oh, ow) = (d((9 - 1) / stride + 1), d((11 - 1) / stride + 1));
    let y = b.grid("y", oh.clone());
    let px = b.grid("px", ow.ceil_div(&bw));
    let po = b.grid("po", oc.ceil_div(&bo));
    let shape = [c.clone(), h, w];
    let x_layout = match channels_last_block {
        Some(n) => Layout::blocked(&shape, 0, n),
        None => Layout::row_major(&shape),
    };
    let x = b.param("x", F32, x_layout, Access::In);
    let wt = b.param("w", F32, Layout::row_major(&[d(3), d(3), c.clone(), oc.clone()]), Access::In);
    let out_shape = [oc.clone(), oh, ow];
    let out_layout = match channels_last_block {
        Some(n) => Layout::blocked(&out_shape, 0, n),
        None => Layout::row_major(&out_shape),
    };
    let o = b.param("o", F32, out_layout, Access::Out);
    let zero = b.full(Value::Float(0.0), TileType::new(F32, vec![bw.clone(), bo.clone()]));
    let (kh, c0) = b.begin_for("kh", d(0), d(3), &[zero]);
    let (kw, c1) = b.begin_for("kw", d(0), d(3), &[c0[0]]);
    let (kc, c2) = b.begin_for("kc", d(0), c.ceil_div(&bc), &[c1[0]]);
    let index = vec![&kc * &bc, &y * stride + &kh - 1, &px * &bw * stride + &kw - 1];
    let t = b.load_with(
        x,
        index,
        vec![1, 1, stride],
        Value::Float(0.0),
        vec![bc.clone(), d(1), bw.clone()],
    );
    let t = b.permute(t, &[1, 2, 0]);
    let t = b.reshape(t, vec![bw.clone(), bc.clone()]);
    let tw =
        b.load(wt, vec![kh, kw, &kc * &bc, &po * &bo], vec![d(1), d(1), bc.clone(), bo.clone()]);
    let tw = b.reshape(tw, vec![bc.clone(), bo.clone()]);
    let m = b.mma(c2[0], t, tw, Some(&c - &kc * &bc));
    let r = b.end_for(&[m]);
    let r = b.end_for(&[r[0]]);
    let r = b.end_for(&[r[0]]);
    let args = vec![b.plain(r[0]), b.plain(r[0])];
    let r = b.map(Func::binary(Op::Max, F32), args, vec![bw.clone(), bo.clone()]);
    let r = b.permute(r, &[1, 0]);
    let r = b.reshape(r, vec![bo.clone(), d(1), bw.clone()]);
    b.store(o, vec![&po * &bo, y, &px * &bw], r);
    b.finish()
}

#[test]
fn convolution_by_taps() {
    for knobs in knobs() {
        for stride in [1, 2] {
            for block in [None, Some(8), Some(16)] {
                let s = schedule(&[("BW", 8), ("BC", 16), ("BO", 32)], knobs.clone());
                check(&conv(stride, block), &s, &[], 2e-5);
            }
        }
    }
}

/// `out[w, c] = sum over t of x[c, w * stride + t - 2] * weight[t, c]`: windows that overlap and leave the data.
fn windows(stride: i64, taps: i64) -> Kernel {
    let mut b = KernelBuilder::new("windows");
    let (bw, bc) = (b.tile("BW"), b.tile("BC"));
    let (c, w) = (size(&mut b, "C"), size(&mut b, "W"));
    let outputs = w.ceil_div(&d(stride));
    let pc = b.grid("pc", c.ceil_div(&bc));
    let pw = b.grid("pw", outputs.ceil_div(&bw));
    let data = Layout::blocked(&[c.clone(), w], 0, 16);
    let x = b.param("x", F32, data, Access::In);
    let wt = b.param("w", F32, Layout::row_major(&[d(taps), c.clone()]), Access::In);
    let o = b.param("o", F32, Layout::row_major(&[outputs, c]), Access::Out);
    let mut f = FuncBuilder::new();
    let (mut args, mut sum) = (Vec::new(), None);
    for t in 0..taps {
        let index = vec![&pc * &bc, &pw * &bw * stride + (t - 2)];
        let shape = vec![bc.clone(), bw.clone()];
        let seen = b.load_with(x, index, vec![1, stride], Value::Float(0.0), shape);
        let seen = b.permute(seen, &[1, 0]);
        let weight = b.load(wt, vec![d(t), &pc * &bc], vec![d(1), bc.clone()]);
        let weight = b.reshape(weight, vec![bc.clone()]);
        args.push(b.plain(seen));
        args.push(Operand { tile: weight, along: vec![1] });
        let (p, q) = (f.param(&format!("x{t}"), F32), f.param(&format!("w{t}"), F32));
        sum = Some(match sum {
            None => f.op(Op::Mul, &[p, q]),
            Some(sum) => f.op(Op::Fma, &[p, q, sum]),
        });
    }
    let f = f.finish(sum.unwrap());
    let r = b.map(f, args, vec![bw.clone(), bc.clone()]);
    b.store(o, vec![&pw * &bw, &pc * &bc], r);
    b.finish()
}

/// Neighbours that are computed together are what they are one by one: more of them than there are, with a
/// rest, at borders, and with channels that fill no vector.
#[test]
fn neighbours_side_by_side() {
    for mut knobs in knobs() {
        for (jam, stride, taps) in [(2, 2, 5), (4, 1, 5), (3, 1, 1)] {
            knobs.jam = jam;
            let s = schedule(&[("BW", 14), ("BC", 16)], knobs.clone());
            for (c, w) in [(16, 40), (24, 17), (5, 3)] {
                check(&windows(stride, taps), &s, &[("C", c), ("W", w)], 1e-5);
            }
        }
    }
}

#[test]
fn loops_carry_tiles_as_if_at_once() {
    // (a, b) <- (b, a + b), five times: each next value reads the other's old one.
    for knobs in knobs() {
        let mut b = KernelBuilder::new("swap");
        let n = b.tile("BN");
        let x = b.param("x", F32, Layout::row_major(&[d(40)]), Access::In);
        let y = b.param("y", F32, Layout::row_major(&[d(40)]), Access::Out);
        let t = b.load(x, vec![d(0)], vec![n.clone()]);
        let one = b.full(Value::Float(1.0), TileType::new(F32, vec![n.clone()]));
        let (_, c) = b.begin_for("i", d(0), d(5), &[t, one]);
        let args = vec![b.plain(c[0]), b.plain(c[1])];
        let s = b.map(Func::binary(Op::Add, F32), args, vec![n.clone()]);
        let r = b.end_for(&[c[1], s]);
        let args = vec![b.plain(r[0]), b.plain(r[1])];
        let out = b.map(Func::binary(Op::Sub, F32), args, vec![n]);
        b.store(y, vec![d(0)], out);
        check(&b.finish(), &schedule(&[("BN", 48)], knobs), &[], 1e-6);
    }
}

/// Every operation on every type, over edge values, against the scalar evaluator.
#[test]
fn operations_on_all_types() {
    for knobs in knobs() {
        let mut failures = Vec::new();
        for (dtype, ..) in DType::TABLE {
            for op in Op::all() {
                if op == Op::Cast || op == Op::Select || !op.accepts(dtype.class()) {
                    continue;
                }
                // Functions with an error bound are the other test's; here the exact ones.
                let bounded = matches!(
                    op,
                    Op::Exp
                        | Op::Exp2
                        | Op::Expm1
                        | Op::Log
                        | Op::Log2
                        | Op::Log1p
                        | Op::Sin
                        | Op::Cos
                        | Op::Tan
                        | Op::Asin
                        | Op::Acos
                        | Op::Atan
                        | Op::Sinh
                        | Op::Cosh
                        | Op::Tanh
                        | Op::Asinh
                        | Op::Acosh
                        | Op::Atanh
                        | Op::Erf
                        | Op::Sigmoid
                        | Op::Atan2
                        | Op::Rsqrt
                );
                // The evaluator rounds a narrow fma twice, through f32.
                let twice = op == Op::Fma && dtype.is_float() && dtype.bits() <= 16;
                if bounded || twice || (op == Op::Pow && dtype.is_float()) {
                    continue;
                }
                let mut f = FuncBuilder::new();
                let args: Vec<_> =
                    (0..op.arity()).map(|i| f.param(["a", "b", "c"][i], dtype)).collect();
                let y = f.op(op, &args);
                failures.extend(array_differs(&f.finish(y), knobs.vector_bits));
            }
            for (to, ..) in DType::TABLE {
                failures.extend(array_differs(&Func::cast(dtype, to), knobs.vector_bits));
            }
        }
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    }
}

fn array_differs(func: &Func, bits: u32) -> Option<String> {
    type ArrayFn = unsafe extern "C" fn(*const *const u8, *mut u8, i64);
    let all: Vec<DType> = func.params().iter().map(|p| p.dtype).chain([func.dtype()]).collect();
    if all.iter().any(|t| t.bits() < 8) {
        return None;
    }
    const EDGES: [f64; 30] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        2.0,
        -2.0,
        0.5,
        -0.5,
        3.0,
        7.0,
        -7.0,
        8.0,
        31.0,
        63.0,
        64.0,
        127.0,
        -128.0,
        255.0,
        1.5,
        2.5,
        -2.5,
        0.1,
        1e-3,
        1e10,
        -1e10,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        9.3e18,
        448.0,
    ];
    let mut rng = Rng(5);
    let n = 1003;
    let mut columns: Vec<Vec<u8>> = Vec::new();
    for p in func.params() {
        let mut bytes = vec![0u8; n * p.dtype.size()];
        for i in 0..n {
            let v = EDGES[rng.next() as usize % EDGES.len()];
            if p.dtype.is_float() {
                tilewright_data::from_f64(p.dtype, &mut bytes, i, v);
            } else if p.dtype == DType::Bool {
                tilewright_data::from_i64(p.dtype, &mut bytes, i, (rng.next() % 2) as i64);
            } else {
                let v =
                    if rng.next().is_multiple_of(4) { 1i64 << (rng.next() % 64) } else { v as i64 };
                tilewright_data::from_i64(p.dtype, &mut bytes, i, v);
            }
        }
        columns.push(bytes);
    }
    let emitted = tilewright_emit_llvm::emit_func_array(func, "f", bits).unwrap();
    let jit = common::jit();
    let source = tilewright_jit::Source { symbol: "f".into(), text: emitted.llvm_ir };
    let build = match jit.build(std::slice::from_ref(&source)) {
        Ok(b) => b,
        Err(e) => return Some(format!("{func:?}: {e}")),
    };
    let mut out = vec![0u8; n * func.dtype().size()];
    // SAFETY: written with this signature for arrays of `n` elements.
    unsafe {
        let call: ArrayFn = std::mem::transmute(build.library.address(0));
        let ptrs: Vec<*const u8> = columns.iter().map(|c| c.as_ptr()).collect();
        call(ptrs.as_ptr(), out.as_mut_ptr(), n as i64);
    }
    for i in 0..n {
        let args: Vec<Value> = func
            .params()
            .iter()
            .zip(&columns)
            .map(|(p, c)| {
                if p.dtype.is_float() {
                    Value::Float(tilewright_data::read_f64(p.dtype, c, i))
                } else {
                    Value::Int(tilewright_data::read_i64(p.dtype, c, i))
                }
            })
            .collect();
        let want = func.eval(&args);
        let same = match want {
            Value::Float(w) => {
                let g = tilewright_data::read_f64(func.dtype(), &out, i);
                g == w || (g.is_nan() && w.is_nan())
            }
            Value::Int(w) => tilewright_data::read_i64(func.dtype(), &out, i) == w,
        };
        if !same {
            let got = if func.dtype().is_float() {
                tilewright_data::read_f64(func.dtype(), &out, i).to_string()
            } else {
                tilewright_data::read_i64(func.dtype(), &out, i).to_string()
            };
            let types: Vec<String> = all.iter().map(DType::to_string).collect();
            return Some(format!(
                "{:?} {types:?} {bits}: {args:?} got {got} want {want:?}",
                func.as_single_op()
            ));
        }
    }
    None
}

#[test]
fn nan_wins_and_infinities_survive_in_softmax_inputs() {
    for knobs in knobs() {
        let kernel = softmax();
        let env = [("M".into(), 3), ("N".into(), 40)].into();
        let mut buffers = fill(&kernel, &env, &mut Rng(3));
        tilewright_data::from_f64(F32, &mut buffers[0], 5, f64::NAN);
        tilewright_data::from_f64(F32, &mut buffers[0], 50, f64::NEG_INFINITY);
        let s = schedule(&[("BM", 2), ("BN", 64)], knobs);
        check_with(&kernel, &s, &[("M", 3), ("N", 40)], 1e-6, buffers);
    }
}
