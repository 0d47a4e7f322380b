//! Right operands of 4-bit integers in the micro-kernel of multiply-adds: unpacked in registers.
//!
//! Two neighbouring columns share a byte, the even one in its low half. A vector of bytes gives two vectors of numbers,
//! the even and the odd columns, and the sums stay so until the end of the micro-kernel: [`apart`] takes pairs of
//! result vectors to that order, [`together`] brings them back. With 512-bit vectors a number is looked up in a
//! register of sixteen by its last four bits, so that it costs one instruction and each second one a shift.

use crate::ops::{Code, constant, splat_lit, vector};
use tilewright_base::DType;
use tilewright_expr::Value;

/// Loads `vectors` vectors of `lanes` columns from `p` and widens them: even and odd columns of each pair.
pub(crate) fn load(
    c: &mut Code,
    dtype: DType,
    acc: DType,
    [lanes, vectors]: [u32; 2],
    p: &str,
) -> Vec<String> {
    let (bytes, words) = (vector("i8", lanes), vector("i32", lanes));
    let signed = dtype == DType::I4;
    let looked_up = c.vector_bits >= 512 && lanes == 16 && acc == DType::F32;
    let mut out = Vec::new();
    for pair in 0..vectors / 2 {
        let at = pair * lanes;
        let p = c.t.ins(format_args!("getelementptr inbounds i8, ptr {p}, i64 {at}"));
        let x = c.t.ins(format_args!("load {bytes}, ptr {p}, align 1"));
        let low = c.t.ins(format_args!("zext {bytes} {x} to {words}"));
        for odd in [false, true] {
            let lit = |v: &str| splat_lit("i32", v, lanes);
            if looked_up {
                let at =
                    if odd { c.bin("lshr", "i32", lanes, &low, &lit("4")) } else { low.clone() };
                let floats = vector("float", lanes);
                let name = "llvm.x86.avx512.permvar.sf.512";
                let table = table(signed);
                out.push(c.t.intrinsic(&floats, name, &[(&floats, &table), (&words, &at)]));
                continue;
            }
            // To the upper end, and down again with the sign.
            let up = c.bin("shl", "i32", lanes, &low, &lit(if odd { "24" } else { "28" }));
            let down = if signed { "ashr" } else { "lshr" };
            let x = c.bin(down, "i32", lanes, &up, &lit("28"));
            out.push(c.cast(DType::I32, acc, lanes, &x));
        }
    }
    out
}

/// The sixteen numbers, in the order of their bits.
pub(crate) fn table(signed: bool) -> String {
    let numbers: Vec<String> = (0..16)
        .map(|bits: i64| if signed && bits > 7 { bits - 16 } else { bits })
        .map(|v| format!("float {}", constant(DType::F32, Value::Int(v), 1)))
        .collect();
    format!("<{}>", numbers.join(", "))
}

/// Pairs of vectors of neighbouring columns become their even and their odd columns.
pub(crate) fn apart(c: &mut Code, elem: &str, lanes: u32, slots: &[String]) {
    let order = |i: u32| (0..lanes).map(move |l| 2 * l + i).collect();
    shuffle(c, elem, lanes, slots, [order(0), order(1)]);
}

/// Undoes [`apart`].
pub(crate) fn together(c: &mut Code, elem: &str, lanes: u32, slots: &[String]) {
    let order = |i: u32| (0..lanes).map(move |l| (i * lanes + l) / 2 + l % 2 * lanes).collect();
    shuffle(c, elem, lanes, slots, [order(0), order(1)]);
}

fn shuffle(c: &mut Code, elem: &str, lanes: u32, slots: &[String], orders: [Vec<u32>; 2]) {
    let v = vector(elem, lanes);
    for pair in slots.chunks_exact(2) {
        let [a, b] = [0, 1].map(|i| c.t.ins(format_args!("load {v}, ptr {}", pair[i])));
        for (slot, order) in pair.iter().zip(&orders) {
            let order: Vec<String> = order.iter().map(|i| format!("i32 {i}")).collect();
            let mask = format!("<{lanes} x i32> <{}>", order.join(", "));
            let x = c.t.ins(format_args!("shufflevector {v} {a}, {v} {b}, {mask}"));
            c.t.stmt(format_args!("store {v} {x}, ptr {slot}"));
        }
    }
}

#[cfg(test)]
mod tests {
    /// Post-condition: what [`super::apart`] moves, [`super::together`] moves back.
    #[test]
    fn orders_are_inverse() {
        for lanes in [4u32, 8, 16] {
            let apart: Vec<u32> = (0..2).flat_map(|i| (0..lanes).map(move |l| 2 * l + i)).collect();
            let together: Vec<u32> = (0..2)
                .flat_map(|i| (0..lanes).map(move |l| (i * lanes + l) / 2 + l % 2 * lanes))
                .collect();
            let back: Vec<u32> = together.iter().map(|&i| apart[i as usize]).collect();
            assert_eq!(back, (0..2 * lanes).collect::<Vec<_>>());
        }
    }
}
