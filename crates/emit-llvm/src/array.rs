//! A scalar function over arrays: what `tw expr` runs.

use crate::Emitted;
use crate::emitter::Emitter;
use crate::ops::{Code, mem_elem, splat_lit, suffix, vector};
use std::fmt::Write;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Func;

/// Prints `void NAME(ptr args, ptr out, i64 n)`: `out[i] = func(args[0][i], args[1][i], ...)` for
/// `i < n`, in vectors of `vector_bits`. `args` is an array of pointers. Four-bit types have no
/// address of their own and are refused.
pub fn emit_func_array(func: &Func, name: &str, vector_bits: u32) -> Result<Emitted> {
    let types: Vec<DType> = func.params().iter().map(|p| p.dtype).collect();
    if types.iter().chain([&func.dtype()]).any(|d| d.bits() < 8) {
        return Err(Error::unsupported("four-bit arrays of a scalar function"));
    }
    let widest = types.iter().chain([&func.dtype()]).map(|d| d.bits()).max().unwrap_or(32).max(32);
    let lanes = (vector_bits / widest).max(1);
    let mut c = Code { vector_bits, ..Code::default() };
    c.t = crate::text::Text::new();
    let mut bases = Vec::new();
    for i in 0..types.len() {
        let slot = c.t.ins(format_args!("getelementptr inbounds ptr, ptr %args, i64 {i}"));
        bases.push(c.t.ins(format_args!("load ptr, ptr {slot}, align 8")));
    }
    let whole = c.t.ins(format_args!("sdiv i64 %n, {lanes}"));
    let whole = c.t.ins(format_args!("mul nsw i64 {whole}, {lanes}"));
    let open = c.t.begin_loop("0", &whole, &lanes.to_string());
    step(&mut c, func, &types, &bases, &open.iv.clone(), lanes, None);
    c.t.end_loop(open);
    let left = c.t.ins(format_args!("sub nsw i64 %n, {whole}"));
    let some = c.t.ins(format_args!("icmp sgt i64 {left}, 0"));
    c.t.br_if(&some, "tail", "end");
    c.t.place("tail");
    let numbers = Emitter::numbers(lanes);
    let limit = c.splat("i64", &left, lanes);
    let mask = c.cmp("ult", "i64", lanes, &numbers, &limit);
    step(&mut c, func, &types, &bases, &whole, lanes, Some(&mask));
    c.t.br("end");
    c.t.place("end");
    c.t.stmt("ret void");
    let mut out = format!(
        "; function {name}\ndefine void @{name}(ptr noalias %args, ptr %out, i64 %n) #0 {{\nstart:\n"
    );
    out.push_str(&c.t.allocas);
    out.push_str(&c.t.body);
    out.push_str("}\n\n");
    for h in c.helpers.values() {
        let _ = writeln!(out, "{h}");
    }
    for d in &c.t.declares {
        let _ = writeln!(out, "{d}");
    }
    out.push_str(&crate::attributes(vector_bits));
    Ok(Emitted { name: name.to_owned(), llvm_ir: out, scratch_bytes: 0 })
}

fn step(
    c: &mut Code,
    func: &Func,
    types: &[DType],
    bases: &[String],
    at: &str,
    lanes: u32,
    mask: Option<&str>,
) {
    let m = vector("i1", lanes);
    let mut values = Vec::new();
    for (d, base) in types.iter().zip(bases) {
        let (e, align) = (mem_elem(*d), d.size());
        let v = vector(e, lanes);
        let p = c.t.ins(format_args!("getelementptr inbounds {e}, ptr {base}, i64 {at}"));
        let x = match mask {
            Some(mask) if lanes > 1 => {
                let name = format!("llvm.masked.load.{}.p0", suffix(e, lanes));
                let ptr = format!("ptr align {align}");
                let args = [(ptr.as_str(), p.as_str()), (&m, mask), (&v, "zeroinitializer")];
                c.t.intrinsic(&v, &name, &args)
            }
            _ => c.t.ins(format_args!("load {v}, ptr {p}, align {align}")),
        };
        values.push(c.widen(*d, lanes, &x));
    }
    let y = c.func(func, &values, lanes);
    let d = func.dtype();
    let y = c.narrow(d, lanes, &y);
    // A literal in every lane is spelled as one.
    let (e, align) = (mem_elem(d), d.size());
    let y = if y.starts_with('%') || y.starts_with("splat") { y } else { splat_lit(e, &y, lanes) };
    let v = vector(e, lanes);
    let p = c.t.ins(format_args!("getelementptr inbounds {e}, ptr %out, i64 {at}"));
    match mask {
        Some(mask) if lanes > 1 => {
            let name = format!("llvm.masked.store.{}.p0", suffix(e, lanes));
            let ptr = format!("ptr align {align}");
            let args = [(v.as_str(), y.as_str()), (&ptr, &p), (&m, mask)];
            c.t.intrinsic("void", &name, &args);
        }
        _ => c.t.stmt(format_args!("store {v} {y}, ptr {p}, align {align}")),
    }
}
