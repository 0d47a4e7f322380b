//! The steps of micro-kernels whose instruction sums two or four neighbours of the depth: `vdpbf16ps`, `vpdpbusd`.

use crate::mma::{Micro, MicroKind};
use crate::ops::{Code, mem_elem, splat_lit, vector};

/// Four bytes of 128: added to signed bytes without carry, it makes them unsigned.
pub(crate) const SHIFT: &str = "-2139062144";

/// One step of a micro-kernel over groups: each 32-bit element holds the group of one row or column.
pub(crate) fn dot_step(
    c: &mut Code,
    micro: &Micro,
    [pa, pb]: [&str; 2],
    row_offsets: &[String],
    accs: &[String],
    shares: &[String],
) {
    let g = micro.geometry;
    let (ae, be) = (mem_elem(micro.a), mem_elem(micro.b));
    let words = vector("i32", g.lanes);
    let dot = |c: &mut Code, slot: &str, a: &str, b: &str| {
        let (acc, narrow, name) = match micro.kind {
            MicroKind::Bf16Dot => {
                ("float", vector("bfloat", g.lanes * 2), "llvm.x86.avx512bf16.dpbf16ps.512")
            }
            _ => ("i32", vector("i8", g.lanes * 4), "llvm.x86.avx512.vpdpbusd.512"),
        };
        let acc = vector(acc, g.lanes);
        let old = c.t.ins(format_args!("load {acc}, ptr {slot}"));
        let a = c.t.ins(format_args!("bitcast {words} {a} to {narrow}"));
        let b = c.t.ins(format_args!("bitcast {words} {b} to {narrow}"));
        let new = c.t.intrinsic(&acc, name, &[(&acc, &old), (&narrow, &a), (&narrow, &b)]);
        c.t.stmt(format_args!("store {acc} {new}, ptr {slot}"));
    };
    let mut bs = Vec::new();
    for j in 0..g.vectors {
        let off = i64::from(j * g.lanes) * micro.kind.group();
        let p = c.t.ins(format_args!("getelementptr inbounds {be}, ptr {pb}, i64 {off}"));
        bs.push(c.t.ins(format_args!("load {words}, ptr {p}, align {}", micro.b.size())));
    }
    for (share, b) in shares.iter().zip(&bs) {
        dot(c, share, &splat_lit("i32", SHIFT, g.lanes), b);
    }
    for (r, offset) in row_offsets.iter().enumerate() {
        let p = c.t.ins(format_args!("getelementptr inbounds {ae}, ptr {pa}, i64 {offset}"));
        let mut x = c.t.ins(format_args!("load i32, ptr {p}, align {}", micro.a.size()));
        if matches!(micro.kind, MicroKind::I8Dot { shifted: true, moved: false }) {
            x = c.bin("xor", "i32", 1, &x, SHIFT);
        }
        let x = c.splat("i32", &x, g.lanes);
        for (j, b) in bs.iter().enumerate() {
            dot(c, &accs[r * bs.len() + j], &x, b);
        }
    }
}
