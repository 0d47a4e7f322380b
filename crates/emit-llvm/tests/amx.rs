//! The micro-kernel of AMX without AMX: that LLVM makes the instructions of it, and that the text
//! means the product when the seven instructions are replaced by a software model of them.
//!
//! The model is written here from the instructions' descriptions in Intel's manual: eight tiles of 16
//! rows of 64 bytes, a configuration of rows and bytes per row, loads that clear what the
//! configuration leaves out. It says nothing about speed, and is no proof for real hardware.

mod common;

use common::{check_text, schedule};
use tilewright_base::DType;
use tilewright_expr::{Func, Value};
use tilewright_jit::{Jit, Options, Source};
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, CpuKnobs, Kernel, KernelBuilder, TileType};

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;

fn gemm(dims: [Dim; 3], symbols: &[&str], grouped: bool) -> Kernel {
    let mut b = KernelBuilder::new("gemm");
    for s in symbols {
        b.symbol(Symbol { name: (*s).into(), range: Range { min: 1, max: 4096 } });
    }
    let (bm, bn, bk) = (b.tile("BM"), b.tile("BN"), b.tile("BK"));
    let [m, n, k] = dims;
    let pm = b.grid("pm", m.ceil_div(&bm));
    let pn = b.grid("pn", n.ceil_div(&bn));
    let shape = [k.clone(), n.clone()];
    let weights = match grouped {
        true => Layout::grouped_panels(&shape, 1, 32, 0, 2),
        false => Layout::row_major(&shape),
    };
    let a = b.param("A", F32, Layout::row_major(&[m.clone(), k.clone()]), Access::In);
    let w = b.param("B", BF16, weights, Access::In);
    let c = b.param("C", F32, Layout::row_major(&[m, n]), Access::Out);
    let zero = b.full(Value::Float(0.0), TileType::new(F32, vec![bm.clone(), bn.clone()]));
    let (i, carried) = b.begin_for("k", Dim::new(0), k.ceil_div(&bk), &[zero]);
    let ta = b.load(a, vec![&pm * &bm, &i * &bk], vec![bm.clone(), bk.clone()]);
    let args = vec![b.plain(ta)];
    let ta = b.map(Func::cast(F32, BF16), args, vec![bm.clone(), bk.clone()]);
    let tb = b.load(w, vec![&i * &bk, &pn * &bn], vec![bk.clone(), bn.clone()]);
    let x = b.mma(carried[0], ta, tb, Some(&k - &i * &bk));
    let out = b.end_for(&[x])[0];
    b.store(c, vec![&pm * &bm, &pn * &bn], out);
    b.finish()
}

/// The same with 8-bit operands, `signed` or not on the left.
fn gemm_bytes(dims: [i64; 3], signed: bool, grouped: bool) -> Kernel {
    let mut b = KernelBuilder::new("gemm");
    let (bm, bn, bk) = (b.tile("BM"), b.tile("BN"), b.tile("BK"));
    let [m, n, k] = dims.map(Dim::new);
    let pm = b.grid("pm", m.ceil_div(&bm));
    let pn = b.grid("pn", n.ceil_div(&bn));
    let shape = [k.clone(), n.clone()];
    let weights = match grouped {
        true => Layout::grouped_panels(&shape, 1, 32, 0, 4),
        false => Layout::row_major(&shape),
    };
    let left = if signed { DType::I8 } else { DType::U8 };
    let a = b.param("A", left, Layout::row_major(&[m.clone(), k.clone()]), Access::In);
    let w = b.param("B", DType::I8, weights, Access::In);
    let c = b.param("C", DType::I32, Layout::row_major(&[m, n]), Access::Out);
    let zero = b.full(Value::Int(0), TileType::new(DType::I32, vec![bm.clone(), bn.clone()]));
    let (i, carried) = b.begin_for("k", Dim::new(0), k.ceil_div(&bk), &[zero]);
    let ta = b.load(a, vec![&pm * &bm, &i * &bk], vec![bm.clone(), bk.clone()]);
    let tb = b.load(w, vec![&i * &bk, &pn * &bn], vec![bk.clone(), bn.clone()]);
    let x = b.mma(carried[0], ta, tb, Some(&k - &i * &bk));
    let out = b.end_for(&[x])[0];
    b.store(c, vec![&pm * &bm, &pn * &bn], out);
    b.finish()
}

#[test]
fn bytes_mean_the_product_under_a_software_model() {
    for (signed, grouped) in [(true, true), (false, true), (true, false)] {
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (32, 32, 64), (37, 50, 41), (70, 96, 260)] {
            let s = schedule(&[("BM", 64), ("BN", 64), ("BK", 128)], CpuKnobs::amx_bytes());
            check_text(&gemm_bytes([m, n, k], signed, grouped), &s, &[], 0.0, &soften);
        }
    }
}

#[test]
fn whole_tiles_are_configured_once_a_call() {
    let s = schedule(&[("BM", 64), ("BN", 64), ("BK", 128)], CpuKnobs::amx_bytes());
    let emitted = tilewright_emit_llvm::emit_kernel(&gemm_bytes([128, 128, 256], true, true), &s);
    let text = emitted.unwrap().llvm_ir;
    // At the start, and around the rest of the depth, which may be there for all that the micro-kernel knows.
    let at = text.find("call void @llvm.x86.ldtilecfg(ptr @gemm.tiles)").unwrap();
    assert!(at < text.find("br label").unwrap(), "{text}");
    assert_eq!(text.matches("call void @llvm.x86.tilerelease").count(), 1, "{text}");
    let jit = Jit::new(Options::default()).unwrap();
    let source = Source { symbol: "gemm".into(), text };
    let text = jit.assembly_with(&source, "+amx-tile,+amx-int8").unwrap();
    assert!(text.contains("tdpbssd"), "{text}");
}

#[test]
fn llvm_makes_the_instructions_of_it() {
    let d = Dim::new;
    let kernel = gemm([d(64), d(64), d(100)], &[], true);
    let s = schedule(&[("BM", 32), ("BN", 64), ("BK", 128)], CpuKnobs::amx());
    let emitted = tilewright_emit_llvm::emit_kernel(&kernel, &s).unwrap();
    let jit = Jit::new(Options::default()).unwrap();
    let source = Source { symbol: "gemm".into(), text: emitted.llvm_ir };
    let text = jit.assembly_with(&source, "+amx-tile,+amx-bf16").unwrap();
    for instruction in
        ["ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"]
    {
        assert!(text.contains(instruction), "no {instruction} in:\n{text}");
    }
    // Four products for each step of the depth that LLVM writes out, and for what is left of it.
    assert_eq!(text.matches("tdpbf16ps").count() % 4, 0, "{text}");
}

#[test]
fn the_text_means_the_product_under_a_software_model() {
    let d = Dim::new;
    for grouped in [true, false] {
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (32, 32, 64), (37, 50, 41), (70, 96, 130)] {
            for (bm, bn, bk) in [(32, 32, 32), (64, 64, 64)] {
                let s = schedule(&[("BM", bm), ("BN", bn), ("BK", bk)], CpuKnobs::amx());
                let kernel = gemm([d(m), d(n), d(k)], &[], grouped);
                check_text(&kernel, &s, &[], 2e-5, &soften);
            }
        }
        let s = schedule(&[("BM", 64), ("BN", 64), ("BK", 64)], CpuKnobs::amx());
        let symbolic = [Dim::sym("M"), Dim::sym("N"), Dim::sym("K")];
        let kernel = gemm(symbolic, &["M", "N", "K"], grouped);
        for (m, n, k) in [(1, 1, 1), (37, 50, 41), (64, 128, 96), (63, 65, 70)] {
            check_text(&kernel, &s, &[("M", m), ("N", n), ("K", k)], 2e-5, &soften);
        }
    }
}

/// The instructions' names replaced by those of the model.
fn soften(text: &str) -> String {
    let mut out = String::new();
    for line in text
        .lines()
        .filter(|l| !l.starts_with("declare void @llvm.x86.t"))
        .filter(|l| !l.starts_with("declare void @llvm.x86.ldtilecfg"))
    {
        let mut line = line.to_string();
        for name in [
            "ldtilecfg",
            "tilezero",
            "tileloadd64",
            "tilestored64",
            "tdpbf16ps",
            "tdpbssd",
            "tdpbusd",
            "tilerelease",
        ] {
            line = line.replace(&format!("@llvm.x86.{name}("), &format!("@soft_{name}("));
        }
        out.push_str(&line);
        out.push('\n');
    }
    assert!(!out.contains("@llvm.x86.t"), "an instruction that the model lacks");
    let bytes = |name: &str, left: &str| {
        BYTES.replace("@soft_bytes_product", &format!("@soft_{name}")).replace("LEFT", left)
    };
    out + MODEL + &bytes("tdpbssd", "sext") + &bytes("tdpbusd", "zext")
}

/// `tdpbssd` and `tdpbusd`: the left operand is extended by `LEFT`.
const BYTES: &str = r"
define internal void @soft_bytes_product(i8 %dst, i8 %a, i8 %b) noinline {
start:
  %pd = call ptr @soft_tile(i8 %dst)
  %pa = call ptr @soft_tile(i8 %a)
  %pb = call ptr @soft_tile(i8 %b)
  %rows = call i64 @soft_rows(i8 %dst)
  %bytes = call i64 @soft_bytes(i8 %dst)
  %depth = call i64 @soft_bytes(i8 %a)
  %cols = udiv i64 %bytes, 4
  br label %go
go:
  %i = phi i64 [ 0, %start ], [ %n, %next ]
  %m = udiv i64 %i, 1024
  %rest = urem i64 %i, 1024
  %k = udiv i64 %rest, 16
  %j = urem i64 %rest, 16
  %in_rows = icmp ult i64 %m, %rows
  %in_cols = icmp ult i64 %j, %cols
  %in_depth = icmp ult i64 %k, %depth
  %some = and i1 %in_rows, %in_cols
  %inside = and i1 %some, %in_depth
  br i1 %inside, label %add, label %next
add:
  %a_line = mul i64 %m, 64
  %a_at = add i64 %a_line, %k
  %a_p = getelementptr i8, ptr %pa, i64 %a_at
  %a_x = load i8, ptr %a_p
  %a_w = LEFT i8 %a_x to i32
  %four = udiv i64 %k, 4
  %in_four = urem i64 %k, 4
  %b_line = mul i64 %four, 64
  %b_col = mul i64 %j, 4
  %b_at0 = add i64 %b_line, %b_col
  %b_at = add i64 %b_at0, %in_four
  %b_p = getelementptr i8, ptr %pb, i64 %b_at
  %b_x = load i8, ptr %b_p
  %b_w = sext i8 %b_x to i32
  %d_line = mul i64 %m, 16
  %d_at = add i64 %d_line, %j
  %d_p = getelementptr i32, ptr %pd, i64 %d_at
  %d = load i32, ptr %d_p
  %x = mul i32 %a_w, %b_w
  %s = add i32 %d, %x
  store i32 %s, ptr %d_p
  br label %next
next:
  %n = add i64 %i, 1
  %more = icmp ult i64 %n, 16384
  br i1 %more, label %go, label %end
end:
  ret void
}
";

const MODEL: &str = r"
@soft_tiles = internal global [8 x [1024 x i8]] zeroinitializer, align 64
@soft_config = internal global [64 x i8] zeroinitializer, align 64
@soft_nothing = internal global [8 x i8] zeroinitializer, align 64

define internal i64 @soft_rows(i8 %t) {
  %i = zext i8 %t to i64
  %at = add i64 %i, 48
  %p = getelementptr i8, ptr @soft_config, i64 %at
  %x = load i8, ptr %p
  %y = zext i8 %x to i64
  ret i64 %y
}
define internal i64 @soft_bytes(i8 %t) {
  %i = zext i8 %t to i64
  %two = mul i64 %i, 2
  %at = add i64 %two, 16
  %p = getelementptr i8, ptr @soft_config, i64 %at
  %x = load i16, ptr %p
  %y = zext i16 %x to i64
  ret i64 %y
}
define internal ptr @soft_tile(i8 %t) {
  %i = zext i8 %t to i64
  %at = mul i64 %i, 1024
  %p = getelementptr i8, ptr @soft_tiles, i64 %at
  ret ptr %p
}
define internal void @soft_tilezero(i8 %t) noinline {
  %p = call ptr @soft_tile(i8 %t)
  store [128 x i64] zeroinitializer, ptr %p
  ret void
}
define internal void @soft_tilerelease() noinline {
  store [8 x i64] zeroinitializer, ptr @soft_config
  ret void
}
define internal void @soft_ldtilecfg(ptr %p) noinline {
  %x = load [8 x i64], ptr %p
  store [8 x i64] %x, ptr @soft_config
  call void @soft_tilezero(i8 0)
  call void @soft_tilezero(i8 1)
  call void @soft_tilezero(i8 2)
  call void @soft_tilezero(i8 3)
  call void @soft_tilezero(i8 4)
  call void @soft_tilezero(i8 5)
  call void @soft_tilezero(i8 6)
  call void @soft_tilezero(i8 7)
  ret void
}
define internal void @soft_tileloadd64(i8 %t, ptr %from, i64 %stride) noinline {
start:
  %tile = call ptr @soft_tile(i8 %t)
  %rows = call i64 @soft_rows(i8 %t)
  %bytes = call i64 @soft_bytes(i8 %t)
  br label %go
go:
  %i = phi i64 [ 0, %start ], [ %n, %go ]
  %r = udiv i64 %i, 64
  %b = urem i64 %i, 64
  %in_rows = icmp ult i64 %r, %rows
  %in_row = icmp ult i64 %b, %bytes
  %inside = and i1 %in_rows, %in_row
  %line = mul i64 %r, %stride
  %at = add i64 %line, %b
  %source = getelementptr i8, ptr %from, i64 %at
  %safe = select i1 %inside, ptr %source, ptr @soft_nothing
  %x = load i8, ptr %safe
  %to = getelementptr i8, ptr %tile, i64 %i
  store i8 %x, ptr %to
  %n = add i64 %i, 1
  %more = icmp ult i64 %n, 1024
  br i1 %more, label %go, label %end
end:
  ret void
}
define internal void @soft_tilestored64(i8 %t, ptr %into, i64 %stride) noinline {
start:
  %tile = call ptr @soft_tile(i8 %t)
  %rows = call i64 @soft_rows(i8 %t)
  %bytes = call i64 @soft_bytes(i8 %t)
  br label %go
go:
  %i = phi i64 [ 0, %start ], [ %n, %next ]
  %r = udiv i64 %i, 64
  %b = urem i64 %i, 64
  %in_rows = icmp ult i64 %r, %rows
  %in_row = icmp ult i64 %b, %bytes
  %inside = and i1 %in_rows, %in_row
  br i1 %inside, label %write, label %next
write:
  %line = mul i64 %r, %stride
  %at = add i64 %line, %b
  %target = getelementptr i8, ptr %into, i64 %at
  %from = getelementptr i8, ptr %tile, i64 %i
  %x = load i8, ptr %from
  store i8 %x, ptr %target
  br label %next
next:
  %n = add i64 %i, 1
  %more = icmp ult i64 %n, 1024
  br i1 %more, label %go, label %end
end:
  ret void
}
define internal float @soft_bf16(ptr %tile, i64 %at) {
  %p = getelementptr i16, ptr %tile, i64 %at
  %x = load i16, ptr %p
  %y = zext i16 %x to i32
  %z = shl i32 %y, 16
  %f = bitcast i32 %z to float
  ret float %f
}
define internal void @soft_tdpbf16ps(i8 %dst, i8 %a, i8 %b) noinline {
start:
  %pd = call ptr @soft_tile(i8 %dst)
  %pa = call ptr @soft_tile(i8 %a)
  %pb = call ptr @soft_tile(i8 %b)
  %rows = call i64 @soft_rows(i8 %dst)
  %bytes = call i64 @soft_bytes(i8 %dst)
  %pairs4 = call i64 @soft_bytes(i8 %a)
  %cols = udiv i64 %bytes, 4
  %pairs = udiv i64 %pairs4, 4
  br label %go
go:
  %i = phi i64 [ 0, %start ], [ %n, %next ]
  %m = udiv i64 %i, 256
  %rest = urem i64 %i, 256
  %k = udiv i64 %rest, 16
  %j = urem i64 %rest, 16
  %in_rows = icmp ult i64 %m, %rows
  %in_cols = icmp ult i64 %j, %cols
  %in_pairs = icmp ult i64 %k, %pairs
  %some = and i1 %in_rows, %in_cols
  %inside = and i1 %some, %in_pairs
  br i1 %inside, label %add, label %next
add:
  %a_line = mul i64 %m, 32
  %two_k = mul i64 %k, 2
  %a0_at = add i64 %a_line, %two_k
  %a1_at = add i64 %a0_at, 1
  %b_line = mul i64 %k, 32
  %two_j = mul i64 %j, 2
  %b0_at = add i64 %b_line, %two_j
  %b1_at = add i64 %b0_at, 1
  %a0 = call float @soft_bf16(ptr %pa, i64 %a0_at)
  %a1 = call float @soft_bf16(ptr %pa, i64 %a1_at)
  %b0 = call float @soft_bf16(ptr %pb, i64 %b0_at)
  %b1 = call float @soft_bf16(ptr %pb, i64 %b1_at)
  %d_line = mul i64 %m, 16
  %d_at = add i64 %d_line, %j
  %d_p = getelementptr float, ptr %pd, i64 %d_at
  %d = load float, ptr %d_p
  %x0 = fmul float %a0, %b0
  %s0 = fadd float %d, %x0
  %x1 = fmul float %a1, %b1
  %s1 = fadd float %s0, %x1
  store float %s1, ptr %d_p
  br label %next
next:
  %n = add i64 %i, 1
  %more = icmp ult i64 %n, 4096
  br i1 %more, label %go, label %end
end:
  ret void
}
";
