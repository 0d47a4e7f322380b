//! Prints device programs as CUDA C++ that calls the device library; decides nothing.
//!
//! ```text
//! Program --> Source { text, entry, arguments }     + headers() --> NVRTC or nvcc
//! ```
//!
//! The text names one kernel. Its arguments come in the order of [`Source::arguments`]: tensor maps
//! by value, pointers, sizes as `int`. What a program may contain is checked by
//! `tilewright_device::verify` before; what the printer cannot say is an error that names it.
//!
//! To add a step: its arm in `stmts.rs` (`memory.rs` has those that move tiles), and what it calls in `device-lib/`.

mod dims;
mod fingerprint;
mod funcs;
mod hits;
mod line_steps;
mod lines;
mod memory;
mod products;
mod reduce;
mod stmts;
mod tensor_cores;
mod walk;

pub use fingerprint::fingerprint;

use std::fmt::Write;
use tilewright_base::{DType, Result};
use tilewright_device::{Extent, LineStep, MapId, Program, Spread, Stmt, Streams};
use tilewright_tile::ParamId;

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A tensor map, 128 bytes, by value.
    Map(MapId),
    /// The address of a tensor's first element.
    Pointer(ParamId),
    /// A size symbol, as a 32-bit integer.
    Size(String),
    /// The address of a size symbol that is read when the kernel starts, a 32-bit integer.
    Live(String),
}

/// CUDA C++ of one kernel.
#[derive(Clone, Debug)]
pub struct Source {
    /// The text; it includes the files of [`headers`].
    pub text: String,
    /// Name of the kernel.
    pub entry: String,
    /// What a launch passes, in order.
    pub arguments: Vec<Argument>,
    /// Dynamic shared memory of a launch, in bytes.
    pub smem_bytes: u32,
    /// Threads per block.
    pub threads: u32,
    /// Blocks per cluster.
    pub cluster: u32,
}

/// What the compiler is asked for, besides the architecture. Scalar functions are printed for arithmetic without
/// contraction: splitting a number into parts (TF32) and the numerics contract depend on it. Products are
/// written as fma.
pub const COMPILER_OPTIONS: [&str; 3] = ["-std=c++17", "-default-device", "-fmad=false"];

/// The device library: names as programs include them, and text.
pub fn headers() -> &'static [(&'static str, &'static str)] {
    &[
        ("tw/base.cuh", include_str!("../../../device-lib/base.cuh")),
        ("tw/sync.cuh", include_str!("../../../device-lib/sync.cuh")),
        ("tw/tma.cuh", include_str!("../../../device-lib/tma.cuh")),
        ("tw/wgmma.cuh", include_str!("../../../device-lib/wgmma.cuh")),
        ("tw/frag.cuh", include_str!("../../../device-lib/frag.cuh")),
        ("tw/lines.cuh", include_str!("../../../device-lib/lines.cuh")),
        ("tw/top_k.cuh", include_str!("../../../device-lib/top_k.cuh")),
        ("tw/copy.cuh", include_str!("../../../device-lib/copy.cuh")),
        ("tw/mma.cuh", include_str!("../../../device-lib/mma.cuh")),
        ("tw/fma.cuh", include_str!("../../../device-lib/fma.cuh")),
    ]
}

/// An element type as it lies in memory, in C++.
pub(crate) fn memory_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 => "float",
        DType::F16 => "tw::f16",
        DType::BF16 => "tw::bf16",
        DType::F8E4M3 => "tw::f8e4m3",
        DType::F8E5M2 => "tw::f8e5m2",
        DType::I64 => "long long",
        DType::I32 => "int",
        DType::I16 => "short",
        DType::I8 | DType::I4 => "signed char",
        DType::U64 => "unsigned long long",
        DType::U32 => "unsigned int",
        DType::U16 => "unsigned short",
        DType::U8 | DType::U4 => "unsigned char",
        DType::Bool => "bool",
    }
}

/// Whether columns of threads in lines are worked out without a sign: where rows are reduced or tiles turned, that saves up to a fifth
/// of all instructions. Other kernels then keep an address for every element that is read by itself.
fn numbers_threads_without_sign(program: &Program) -> bool {
    let mut found = false;
    for role in &program.roles {
        walk::visit(&role.body, &mut |stmt| {
            found |= match stmt {
                Stmt::Reduce { dst, src, .. } => {
                    let lines = matches!(program.frags[src.frag].spread, Spread::Lines { .. });
                    lines && program.frags[dst.frag].extent == Extent::PerRow
                }
                Stmt::Line(LineStep::Turn { .. }) => true,
                _ => false,
            };
        });
    }
    found
}

/// Prints a verified program.
///
/// # Errors
/// A step that has no CUDA form for the program's architecture.
pub fn emit(program: &Program) -> Result<Source> {
    let mut printer = stmts::Printer::new(program);
    let body = printer.kernel_body()?;
    let arguments = printer.arguments();
    // Operators are called like C's functions, whose names a kernel cannot have.
    let entry = format!("tw_{}", program.name);
    let mut text = String::new();
    let _ = writeln!(
        text,
        "// {}: printed from a device program for {}.",
        program.name,
        program.arch.name()
    );
    if program.streams == Streams::Past {
        let _ = writeln!(text, "#define TW_LOAD_CACHE \".L1::no_allocate\"");
    }
    if numbers_threads_without_sign(program) {
        let _ = writeln!(text, "#define TW_THREAD unsigned");
    }
    for (name, _) in headers() {
        let _ = writeln!(text, "#include \"{name}\"");
    }
    text.push_str(&printer.definitions());
    let parameters: Vec<String> = arguments
        .iter()
        .map(|a| match a {
            Argument::Map(m) => {
                format!("const __grid_constant__ tw::TensorMap map_{}", program.maps[*m].name)
            }
            Argument::Pointer(p) => {
                let param = &program.params[*p];
                let constant =
                    if param.access == tilewright_tile::Access::In { "const " } else { "" };
                format!("{constant}{}* __restrict__ p_{}", memory_type(param.dtype), param.name)
            }
            Argument::Size(s) => format!("const int {s}"),
            Argument::Live(s) => format!("const int* __restrict__ {s}_at"),
        })
        .collect();
    let live: String = arguments
        .iter()
        .filter_map(|a| match a {
            Argument::Live(s) => Some(format!("  const int {s} = *{s}_at;\n")),
            _ => None,
        })
        .collect();
    let _ = write!(
        text,
        "\nextern \"C\" __global__ void __launch_bounds__({}, {})\n{}(\n    {}) {{\n{live}{body}}}\n",
        program.threads,
        program.blocks_per_sm,
        entry,
        parameters.join(",\n    ")
    );
    Ok(Source {
        text,
        entry,
        arguments,
        smem_bytes: program.smem_bytes(),
        threads: program.threads,
        cluster: program.cluster,
    })
}
