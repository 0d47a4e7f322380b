//! Products with integers of four bits on the right, eight neighbours of the depth of one column in a word, the first in
//! its lowest bits.
//!
//! With signed bytes on the left, sums are of `i32`: `vpdpbusd`
//! takes four unsigned bytes from it at a time, the low halves of its bytes (the even neighbours) and then the high
//! ones, and four signed bytes of a row. Signed codes are moved up by 8 on the way; eight times the sum of a row is
//! taken off at the end.
//!
//! With floats on the left each code becomes a float. The first five are put into the fraction of a power of two, which is
//! taken off (two instructions that run everywhere); the others are moved to the lower end, and looked up in a register
//! of sixteen by the last four bits (two that run on few ports). Both are exact. Where a block has many rows, a panel is
//! unpacked into scratch memory once ([`unpacking`]), and multiplied as any panel of floats; the sums are the same.

use crate::mma::{Micro, MicroKind, Stride};
use crate::nibbles;
use crate::ops::{Code, splat_lit, vector};
use std::fmt::Write;

/// Masks of the low halves of a word's bytes, and 8 in each.
const LOW: &str = "252645135";
const EIGHTS: &str = "134744072";

/// Memory for each row's share, zeros.
pub(crate) fn shares(c: &mut Code, rows: usize) -> Vec<String> {
    let slots: Vec<String> = (0..rows).map(|_| c.t.alloca("<4 x i32>")).collect();
    for slot in &slots {
        c.t.stmt(format_args!("store <4 x i32> zeroinitializer, ptr {slot}"));
    }
    slots
}

/// A row's share in every lane. Only the first two of its partial sums are not zero.
pub(crate) fn share(c: &mut Code, lanes: u32, slot: &str) -> String {
    let sums = c.t.ins(format_args!("load <4 x i32>, ptr {slot}"));
    let [a, b] = [0, 1].map(|i| c.t.ins(format_args!("extractelement <4 x i32> {sums}, i32 {i}")));
    let sum = c.bin("add", "i32", 1, &a, &b);
    c.splat("i32", &sum, lanes)
}

/// One step: eight neighbours of the depth for every row and `vectors` vectors of columns. `accs` are the slots of the
/// sums by rows; `shares` those of the rows' shares, none for unsigned codes.
pub(crate) fn step(
    c: &mut Code,
    [lanes, vectors]: [u32; 2],
    [pa, pb]: [&str; 2],
    row_offsets: &[String],
    [accs, shares]: [&[String]; 2],
) {
    let (words, bytes) = (vector("i32", lanes), vector("i8", lanes * 4));
    let dot = |c: &mut Code, slot: &str, codes: &str, x: &str| {
        let old = c.t.ins(format_args!("load {words}, ptr {slot}"));
        let name = "llvm.x86.avx512.vpdpbusd.512";
        let new = c.t.intrinsic(&words, name, &[(&words, &old), (&bytes, codes), (&bytes, x)]);
        c.t.stmt(format_args!("store {words} {new}, ptr {slot}"));
    };
    let lit = |v: &str| splat_lit("i32", v, lanes);
    let mut codes = Vec::new();
    for j in 0..vectors {
        let at = j * lanes * 4;
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {pb}, i64 {at}"));
        let both = c.t.ins(format_args!("load {words}, ptr {p}, align 1"));
        let high = c.bin("lshr", "i32", lanes, &both, &lit("4"));
        let halves = [both, high].map(|x| {
            let mut x = c.bin("and", "i32", lanes, &x, &lit(LOW));
            if !shares.is_empty() {
                x = c.bin("xor", "i32", lanes, &x, &lit(EIGHTS));
            }
            c.t.ins(format_args!("bitcast {words} {x} to {bytes}"))
        });
        codes.push(halves);
    }
    for (r, offset) in row_offsets.iter().enumerate() {
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {pa}, i64 {offset}"));
        let row = c.t.ins(format_args!("load i64, ptr {p}, align 1"));
        if let Some(slot) = shares.get(r) {
            let pair =
                c.t.ins(format_args!("insertelement <2 x i64> zeroinitializer, i64 {row}, i32 0"));
            let pair = c.t.ins(format_args!("bitcast <2 x i64> {pair} to <16 x i8>"));
            let old = c.t.ins(format_args!("load <4 x i32>, ptr {slot}"));
            let eights = splat_lit("i8", "8", 16);
            let args = [("<4 x i32>", &old), ("<16 x i8>", &eights), ("<16 x i8>", &pair)];
            let args = args.map(|(ty, v)| (ty, v.as_str()));
            let new = c.t.intrinsic("<4 x i32>", "llvm.x86.avx512.vpdpbusd.128", &args);
            c.t.stmt(format_args!("store <4 x i32> {new}, ptr {slot}"));
        }
        let quads = vector("i64", lanes / 2);
        let row = c.splat("i64", &row, lanes / 2);
        let row = c.t.ins(format_args!("bitcast {quads} {row} to {bytes}"));
        let turned = [0, 1].map(|odd| {
            let order: Vec<String> =
                (0..lanes * 4).map(|i| format!("i32 {}", i / 8 * 8 + i % 4 * 2 + odd)).collect();
            let mask = format!("<{} x i32> <{}>", lanes * 4, order.join(", "));
            c.t.ins(format_args!("shufflevector {bytes} {row}, {bytes} poison, {mask}"))
        });
        for (j, halves) in codes.iter().enumerate() {
            let slot = &accs[r * vectors as usize + j];
            for (half, x) in halves.iter().zip(&turned) {
                dot(c, slot, half, x);
            }
        }
    }
}

/// Codes of a word that go into a fraction: the rest lies beyond its 23 bits.
const IN_FRACTION: u32 = 5;

/// As [`step`], with floats on the left and in the sums.
pub(crate) fn float_step(
    c: &mut Code,
    [lanes, vectors]: [u32; 2],
    [pa, pb]: [&str; 2],
    row_offsets: &[String],
    accs: &[String],
    signed: bool,
) {
    let (words, floats) = (vector("i32", lanes), vector("float", lanes));
    let mut loaded = Vec::new();
    for j in 0..vectors {
        let at = j * lanes * 4;
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {pb}, i64 {at}"));
        loaded.push(c.t.ins(format_args!("load {words}, ptr {p}, align 1")));
    }
    for i in 0..8u32 {
        let codes: Vec<String> = loaded.iter().map(|x| number(c, lanes, x, i, signed)).collect();
        for (r, offset) in row_offsets.iter().enumerate() {
            let p = c.t.ins(format_args!("getelementptr inbounds float, ptr {pa}, i64 {offset}"));
            let p = c.t.ins(format_args!("getelementptr inbounds float, ptr {p}, i64 {i}"));
            let x = c.t.ins(format_args!("load float, ptr {p}, align 4"));
            let x = c.splat("float", &x, lanes);
            for (j, code) in codes.iter().enumerate() {
                let slot = &accs[r * vectors as usize + j];
                let old = c.t.ins(format_args!("load {floats}, ptr {slot}"));
                let new = c.call("fma", "float", lanes, &[&x, code, &old]);
                c.t.stmt(format_args!("store {floats} {new}, ptr {slot}"));
            }
        }
    }
}

/// The text of a function that unpacks a panel, `%depth` words of each column, to floats, row-major. `names` are arguments
/// that micro-kernels have.
pub(crate) fn unpacking(
    micro: &Micro,
    name: &str,
    names: &[String],
    vector_bits: u32,
) -> (String, Code) {
    let (lanes, width) = (micro.geometry.lanes, micro.geometry.width);
    let (words, floats) = (vector("i32", lanes), vector("float", lanes));
    let signed = micro.kind == MicroKind::CodesFma { signed: true };
    let stride = match &micro.b_depth {
        Stride::Known(s) => s.to_string(),
        Stride::Given(s) => s.clone(),
    };
    let mut c = Code { vector_bits, ..Code::default() };
    c.t = crate::text::Text::new();
    let open = c.t.begin_loop("0", "%depth", "1");
    let k = open.iv.clone();
    let at = c.t.ins(format_args!("mul nsw i64 {k}, {stride}"));
    let from = c.t.ins(format_args!("getelementptr inbounds i8, ptr %b, i64 {at}"));
    let at = c.t.ins(format_args!("mul nsw i64 {k}, {}", 8 * width));
    let to = c.t.ins(format_args!("getelementptr inbounds float, ptr %to, i64 {at}"));
    for j in 0..i64::from(micro.geometry.vectors) {
        let column = j * i64::from(lanes);
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {from}, i64 {}", column * 4));
        let codes = c.t.ins(format_args!("load {words}, ptr {p}, align 1"));
        for i in 0..8u32 {
            let x = number(&mut c, lanes, &codes, i, signed);
            let at = i64::from(i) * width + column;
            let p = c.t.ins(format_args!("getelementptr inbounds float, ptr {to}, i64 {at}"));
            c.t.stmt(format_args!("store {floats} {x}, ptr {p}, align 4"));
        }
    }
    c.t.end_loop(open);
    c.t.stmt("ret void");
    let mut params = "ptr noalias %b, ptr noalias %to, i64 %depth".to_owned();
    for n in names {
        let _ = write!(params, ", i64 %{n}");
    }
    let mut out = format!("define internal void @{name}({params}) #1 {{\nstart:\n");
    out.push_str(&c.t.allocas);
    out.push_str(&c.t.body);
    out.push_str("}\n");
    (out, c)
}

/// Code `i` of each word as a float.
fn number(c: &mut Code, lanes: u32, words: &str, i: u32, signed: bool) -> String {
    let (ints, floats) = (vector("i32", lanes), vector("float", lanes));
    let lit = |v: u32| splat_lit("i32", &v.to_string(), lanes);
    let bit = 4 * i;
    if i >= IN_FRACTION {
        let at = c.bin("lshr", "i32", lanes, words, &lit(bit));
        let name = "llvm.x86.avx512.permvar.sf.512";
        let table = nibbles::table(signed);
        return c.t.intrinsic(&floats, name, &[(&floats, &table), (&ints, &at)]);
    }
    // A float of 2^(23 - bit) counts in its fraction from this bit on. Signed codes are moved up by eight.
    let up = if signed { 8u32 } else { 0 };
    let power = (127 + 23 - bit) << 23;
    let code = c.bin("and", "i32", lanes, words, &lit(15 << bit));
    let bits = c.bin("xor", "i32", lanes, &code, &lit(power | up << bit));
    let float = c.t.ins(format_args!("bitcast {ints} {bits} to {floats}"));
    let base = f64::from(1u32 << (23 - bit)) + f64::from(up);
    let base = splat_lit("float", &format!("0x{:016X}", base.to_bits()), lanes);
    c.bin("fsub", "float", lanes, &float, &base)
}

#[cfg(test)]
mod tests {
    /// The arithmetic of `number` on one word.
    #[test]
    fn codes_in_fractions_are_exact() {
        for (signed, up) in [(false, 0u32), (true, 8)] {
            for i in 0..super::IN_FRACTION {
                let bit = 4 * i;
                for code in 0..16u32 {
                    let word = (code << bit) | (!(15 << bit) & 0xA5C3_7E19);
                    let bits = (word & 15 << bit) ^ ((150 - bit) << 23 | up << bit);
                    let base = (1u32 << (23 - bit)) as f32 + up as f32;
                    let want = code as i32 - if signed && code > 7 { 16 } else { 0 };
                    assert_eq!(f32::from_bits(bits) - base, want as f32, "{code} at {bit}");
                }
            }
        }
    }
}
