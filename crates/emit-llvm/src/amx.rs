//! The micro-kernel of AMX: up to 2x2 tiles of 16x16 results, over operands in groups of four bytes: pairs of `bf16`,
//! or four 8-bit integers.
//!
//! Tiles 0 to 3 hold the results, 4 and 5 the rows of the left operand (16 rows of 16 groups), 6 and 7
//! the columns of the right one (16 groups deep, 16 columns wide, the group of a column together), which
//! is how `groups.rs` lays them out. One `tdpbf16ps` adds 16 pairs of the depth to 16x16 results, one `tdpbssd` or
//! `tdpbusd` 16 fours.
//!
//! Whole tiles are configured once per call of a kernel ([`configuration`]), which is once for all the blocks that a thread
//! takes at a time. A micro-kernel of fewer rows configures its own, shorter tiles, and so does what is left of the depth
//! after whole tiles; both bring the whole ones back. At the end of a call the tiles are released, so that a thread that
//! waits has no tile state to save.
//!
//! The text is compiled and its meaning tested against a software model of the instructions (`tests/amx.rs`).

use crate::mma::{Micro, MicroKind, Stride};
use crate::ops::{Code, mem_elem};
use std::fmt::Write;

/// Rows, columns and groups of a tile.
const SIDE: i64 = 16;
/// First tile of the left and of the right operand.
const LEFT: i64 = 4;
const RIGHT: i64 = 6;

/// Palette 1, bytes per row from byte 16 on, rows from byte 48: eight whole tiles.
fn whole_tiles() -> [u8; 64] {
    let mut config = [0u8; 64];
    config[0] = 1;
    for tile in 0..8 {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = SIDE as u8;
    }
    config
}

fn words(config: [u8; 64]) -> Vec<i64> {
    let word = |w: &[u8]| w.iter().rev().fold(0i64, |all, b| all << 8 | i64::from(*b));
    config.chunks_exact(8).map(word).collect()
}

/// The text of a kernel's configuration of whole tiles.
pub(crate) fn configuration(kernel: &str) -> String {
    let words: Vec<String> = words(whole_tiles()).into_iter().map(|w| format!("i64 {w}")).collect();
    format!(
        "@{kernel}.tiles = private unnamed_addr constant [8 x i64] [{}], align 64\n",
        words.join(", ")
    )
}

/// As `mma::micro_kernel`: `c[r][..] (+)= a[r][..] * b[..][..]`; `config` is the kernel's configuration.
pub(crate) fn micro_kernel(
    micro: &Micro,
    rows: i64,
    [name, config]: [&str; 2],
    names: &[String],
    vector_bits: u32,
) -> (String, Code) {
    let mut c = Code { vector_bits, ..Code::default() };
    c.t = crate::text::Text::new();
    let heights: Vec<i64> = (0..rows).step_by(16).map(|r| (rows - r).min(SIDE)).collect();
    let wide = i64::from(micro.geometry.vectors);
    let group = micro.kind.group();
    let multiply = match micro.kind {
        MicroKind::I8Tile { signed: true } => "llvm.x86.tdpbssd",
        MicroKind::I8Tile { signed: false } => "llvm.x86.tdpbusd",
        _ => "llvm.x86.tdpbf16ps",
    };
    let results = |r: usize, j: i64| r as i64 * 2 + j;
    // Tiles of its own: for few rows at once, for the rest of the depth when there is one.
    let whole = heights.iter().all(|&h| h == SIDE);
    let own = c.t.alloca("[64 x i8], align 64");
    let mut shapes = whole_tiles();
    for (r, &height) in heights.iter().enumerate() {
        (0..wide).for_each(|j| shapes[48 + results(r, j) as usize] = height as u8);
        shapes[48 + LEFT as usize + r] = height as u8;
    }
    let configure = |c: &mut Code| {
        for (at, value) in words(shapes).into_iter().enumerate() {
            let p = c.t.ins(format_args!("getelementptr inbounds i64, ptr {own}, i64 {at}"));
            c.t.stmt(format_args!("store i64 {value}, ptr {p}, align 8"));
        }
    };
    let load_config = |c: &mut Code, from: &str| {
        c.t.intrinsic("void", "llvm.x86.ldtilecfg", &[("ptr", from)]);
    };
    if !whole {
        configure(&mut c);
        load_config(&mut c, &own);
    }
    let (a_elem, b_elem) = (mem_elem(micro.a), mem_elem(micro.b));
    let scaled = |c: &mut Code, stride: &Stride, by: i64| match stride {
        Stride::Known(s) => (s * by).to_string(),
        Stride::Given(s) => c.t.ins(format_args!("mul nsw i64 {s}, {by}")),
    };
    let scaled_by = |c: &mut Code, stride: &Stride, by: &str| match stride {
        Stride::Known(s) => c.t.ins(format_args!("mul nsw i64 {by}, {s}")),
        Stride::Given(s) => c.t.ins(format_args!("mul nsw i64 {by}, {s}")),
    };
    // Distances of rows in bytes.
    let a_bytes = scaled(&mut c, &micro.a_row, micro.a.size() as i64);
    let b_bytes = scaled(&mut c, &micro.b_depth, micro.b.size() as i64);
    let c_bytes = (micro.geometry.width * 4).to_string();
    let each_result = |c: &mut Code, what: &str| {
        for r in 0..heights.len() {
            for j in 0..wide {
                let tile = results(r, j).to_string();
                let at = r as i64 * SIDE * micro.geometry.width + j * SIDE;
                let p = c.t.ins(format_args!("getelementptr inbounds i32, ptr %c, i64 {at}"));
                let args = [("i8", tile.as_str()), ("ptr", &p), ("i64", &c_bytes)];
                c.t.intrinsic("void", what, &args);
            }
        }
    };
    c.t.br_if("%zero", "fresh", "old");
    c.t.place("fresh");
    for r in 0..heights.len() {
        for j in 0..wide {
            c.t.intrinsic("void", "llvm.x86.tilezero", &[("i8", &results(r, j).to_string())]);
        }
    }
    c.t.br("go");
    c.t.place("old");
    each_result(&mut c, "llvm.x86.tileloadd64");
    c.t.br("go");
    c.t.place("go");
    // Sixteen groups from group `k` on. Loads stand between products, and so do requests for the rows that the next call
    // reads: they come from the second level.
    let step = |c: &mut Code, k: &str| {
        let along = c.t.ins(format_args!("mul nsw i64 {k}, {group}"));
        let left = |c: &mut Code, row: i64| {
            let row = scaled(c, &micro.a_row, row);
            let at = c.t.ins(format_args!("add nsw i64 {row}, {along}"));
            c.t.ins(format_args!("getelementptr {a_elem}, ptr %a, i64 {at}"))
        };
        let depth = scaled_by(c, &micro.b_depth, k);
        for j in 0..wide {
            let at = c.t.ins(format_args!("add nsw i64 {depth}, {}", j * SIDE * group));
            let p = c.t.ins(format_args!("getelementptr inbounds {b_elem}, ptr %b, i64 {at}"));
            let tile = (RIGHT + j).to_string();
            let args = [("i8", tile.as_str()), ("ptr", &p), ("i64", &b_bytes)];
            c.t.intrinsic("void", "llvm.x86.tileloadd64", &args);
        }
        for r in 0..heights.len() {
            let p = left(c, r as i64 * SIDE);
            let tile = (LEFT + r as i64).to_string();
            let args = [("i8", tile.as_str()), ("ptr", &p), ("i64", &a_bytes)];
            c.t.intrinsic("void", "llvm.x86.tileloadd64", &args);
            for j in 0..wide {
                let tiles = [results(r, j), LEFT + r as i64, RIGHT + j].map(|t| t.to_string());
                let args = tiles.each_ref().map(|t| ("i8", t.as_str()));
                c.t.intrinsic("void", multiply, &args);
                let part = SIDE / wide;
                for row in 0..part {
                    let p = left(c, rows + r as i64 * SIDE + j * part + row);
                    // To read, into the first level, as data. Beyond the last row this asks for nothing.
                    let args = [("ptr", p.as_str()), ("i32", "0"), ("i32", "3"), ("i32", "1")];
                    c.t.intrinsic("void", "llvm.prefetch.p0", &args);
                }
            }
        }
    };
    let rest = c.t.ins("urem i64 %depth, 16");
    let full = c.t.ins(format_args!("sub nsw i64 %depth, {rest}"));
    let open = c.t.begin_loop("0", &full, "16");
    let k = open.iv.clone();
    step(&mut c, &k);
    c.t.end_loop(open);
    each_result(&mut c, "llvm.x86.tilestored64");
    let some = c.t.ins(format_args!("icmp ne i64 {rest}, 0"));
    c.t.br_if(&some, "rest", "done");
    c.t.place("rest");
    // Shorter tiles: configuring clears them all, so the results come back from memory.
    if whole {
        configure(&mut c);
    }
    let row_bytes = c.t.ins(format_args!("mul nsw i64 {rest}, 4"));
    let row_bytes = c.t.ins(format_args!("trunc i64 {row_bytes} to i16"));
    let rest_rows = c.t.ins(format_args!("trunc i64 {rest} to i8"));
    for r in 0..heights.len() as i64 {
        let at = 16 + 2 * (LEFT + r);
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {own}, i64 {at}"));
        c.t.stmt(format_args!("store i16 {row_bytes}, ptr {p}, align 2"));
    }
    for j in 0..wide {
        let at = 48 + RIGHT + j;
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {own}, i64 {at}"));
        c.t.stmt(format_args!("store i8 {rest_rows}, ptr {p}, align 1"));
    }
    load_config(&mut c, &own);
    each_result(&mut c, "llvm.x86.tileloadd64");
    step(&mut c, &full);
    each_result(&mut c, "llvm.x86.tilestored64");
    if whole {
        load_config(&mut c, config);
    }
    c.t.br("done");
    c.t.place("done");
    if !whole {
        load_config(&mut c, config);
    }
    c.t.stmt("ret void");
    let mut params =
        "ptr noalias %a, ptr noalias %b, ptr noalias %c, i64 %depth, i1 %zero".to_owned();
    for n in names {
        let _ = write!(params, ", i64 %{n}");
    }
    let mut out = format!("define internal void @{name}({params}) #1 {{\nstart:\n");
    out.push_str(&c.t.allocas);
    out.push_str(&c.t.body);
    out.push_str("}\n");
    (out, c)
}
