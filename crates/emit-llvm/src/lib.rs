//! Prints LLVM IR for tile kernels and scalar functions. Text only: no LLVM is linked here.
//!
//! [`emit_kernel`] decides nothing: sizes and shapes of loops come from the [`Schedule`]. A
//! compiled kernel is
//!
//! ```text
//! void NAME(ptr ptrs, ptr sizes, i64 first, i64 last, ptr scratch)
//! ```
//!
//! and runs blocks `first..last` of the linearised grid (last axis fastest). `ptrs` is an array with
//! the base address of each parameter's buffer, `sizes` holds an `i64` for each of the kernel's
//! symbols, `scratch` is private to the thread, aligned to 64 bytes. The module refers to nothing
//! outside itself.
//!
//! | file | holds |
//! |---|---|
//! | `analyze.rs` | binding tile sizes; what part of a tile is needed; what is kept |
//! | `emitter.rs` | state, integer expressions, memory access, loop nests |
//! | `access.rs` | where the operands of products lie |
//! | `alias.rs` | what LLVM is told about which memory is which |
//! | `eval.rs` | elements of virtual tiles |
//! | `inside.rs` | loops whose reads may lie outside: most iterations without guards |
//! | `lanes.rs` | masks of stores that are narrower than their values |
//! | `stmts.rs` | stores, loops, branches, which stores fuse into a product |
//! | `mma.rs` | products: micro-kernels and the loops around them |
//! | `amx.rs` | the micro-kernel of AMX |
//! | `codes.rs` | products with integers of four bits, eight together |
//! | `dots.rs` | steps of micro-kernels of dot products |
//! | `heights.rs` | rows of a product in groups |
//! | `groups.rs` | operands of products whose instruction takes several steps of the depth at once |
//! | `turn.rs` | copies across: squares turned in registers |
//! | `reduce.rs` | reductions and scans |
//! | `ops.rs`, `math.rs` | scalar operations on vectors, elementary functions |
//! | `array.rs` | a scalar function over arrays |
//! | `text.rs` | the text of a function |

mod access;
mod alias;
mod amx;
mod analyze;
mod array;
mod codes;
mod dots;
mod emitter;
mod erf;
mod eval;
mod groups;
mod heights;
mod inside;
mod lanes;
#[allow(
    clippy::approx_constant,
    reason = "parts of split constants stand as their source prints them"
)]
mod math;
mod mma;
mod nibbles;
mod ops;
mod reduce;
mod side;
mod stmts;
mod text;
mod turn;

pub use array::emit_func_array;
use emitter::Emitter;
use std::fmt::Write;
use tilewright_base::{Error, Result};
use tilewright_layout::{Range, uppers};
use tilewright_tile::{Kernel, Schedule};

/// LLVM IR of one kernel.
#[derive(Clone, Debug)]
pub struct Emitted {
    /// Name of its function.
    pub name: String,
    /// A whole module.
    pub llvm_ir: String,
    /// Scratch memory that a thread needs.
    pub scratch_bytes: usize,
}

/// Which printer this is: another one where a text may differ for the same kernel and schedule. A digest of the sources
/// that decide about texts (`build.rs`).
pub const PRINTER: &str = env!("TILEWRIGHT_PRINTER");

/// Function attributes for code of a vector width.
fn attributes(vector_bits: u32) -> String {
    let common = format!(
        "nounwind \"prefer-vector-width\"=\"{vector_bits}\" \"min-legal-vector-width\"=\"{vector_bits}\""
    );
    format!(
        "attributes #0 = {{ {common} }}\nattributes #1 = {{ noinline {common} }}\nattributes #2 = {{ alwaysinline {common} }}\n"
    )
}

/// Prints a kernel under a schedule.
pub fn emit_kernel(kernel: &Kernel, schedule: &Schedule) -> Result<Emitted> {
    let bound = analyze::bind_tiles(kernel, schedule)?;
    emit_bound(&bound, schedule).map_err(|e| e.with_context(format!("kernel @{}", kernel.name)))
}

fn emit_bound(k: &Kernel, schedule: &Schedule) -> Result<Emitted> {
    let mut e = Emitter::new(k, schedule.cpu.clone());
    e.c.t = text::Text::new();
    let uses = analyze::uses(k);
    e.materialise = analyze::materialised(k, &uses);
    e.need = analyze::Needs::of(k, &e.facts)?.need;
    for (id, param) in k.params.iter() {
        let i = id.0;
        let slot = e.c.t.ins(format_args!("getelementptr inbounds ptr, ptr %ptrs, i64 {i}"));
        e.c.t.stmt(format_args!("%p{i} = load ptr, ptr {slot}, align 8 ; {}", param.name));
    }
    for (i, symbol) in k.symbols.iter().enumerate() {
        let slot = e.c.t.ins(format_args!("getelementptr inbounds i64, ptr %sizes, i64 {i}"));
        let value = e.c.t.ins(format_args!("load i64, ptr {slot}, align 8"));
        e.bind(&symbol.name, &value);
    }
    let mut extents = Vec::new();
    for axis in &k.grid {
        extents.push(e.dim(&axis.extent));
    }
    let blocks = e.c.t.begin_loop("%first", "%last", "1");
    let mut rest = blocks.iv.clone();
    for (n, axis) in k.grid.iter().enumerate().rev() {
        let max = e.facts.bounds(&axis.extent).max.saturating_sub(1).max(0);
        e.facts.declare(&axis.name, Range { min: 0, max }, uppers(&axis.extent));
        let at = if n == 0 {
            rest.clone()
        } else {
            let at = e.c.t.ins(format_args!("urem i64 {rest}, {}", extents[n]));
            rest = e.c.t.ins(format_args!("udiv i64 {rest}, {}", extents[n]));
            at
        };
        e.bind(&axis.name, &at);
    }
    e.push_scope();
    e.block(&k.body.stmts, &[])?;
    e.pop_scope();
    e.c.t.end_loop(blocks);
    if e.streamed {
        e.c.t.intrinsic("void", "llvm.x86.sse.sfence", &[]);
    }
    if e.tiles {
        // One configuration for all whole tiles, once per call; a thread that waits has no tile state to save.
        let call = format!("  call void @llvm.x86.ldtilecfg(ptr @{}.tiles)\n", k.name);
        e.c.t.allocas.push_str(&call);
        e.c.t.declares.insert("declare void @llvm.x86.ldtilecfg(ptr)".into());
        e.functions.push(amx::configuration(&k.name));
        e.c.t.intrinsic("void", "llvm.x86.tilerelease", &[]);
    }
    e.c.t.stmt("ret void");

    let scratch = usize::try_from(e.scratch_max).map_err(|_| Error::unsupported("scratch"))? + 4096;
    let name = k.name.clone();
    let mut out = String::new();
    let _ = writeln!(out, "; kernel @{name}");
    let _ = writeln!(
        out,
        "define void @{name}(ptr noalias readonly %ptrs, ptr noalias readonly %sizes, i64 %first, i64 %last, ptr noalias align 64 %scratch) #0 {{\nstart:"
    );
    out.push_str(&e.c.t.allocas);
    out.push_str(&e.c.t.body);
    out.push_str("}\n\n");
    for f in &e.functions {
        out.push_str(f);
        out.push('\n');
    }
    for h in e.c.helpers.values() {
        out.push_str(h);
        out.push('\n');
    }
    for d in &e.c.t.declares {
        out.push_str(d);
        out.push('\n');
    }
    out.push_str(&attributes(schedule.cpu.vector_bits));
    if e.streamed {
        out.push_str("!0 = !{i32 1}\n");
    }
    out.push_str(&e.alias_nodes());
    Ok(Emitted { name, llvm_ir: out, scratch_bytes: scratch })
}
