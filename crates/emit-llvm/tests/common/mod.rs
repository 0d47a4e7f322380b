//! Runs a kernel compiled and interpreted on the same bytes, and compares every byte of every
//! buffer: what a kernel must not touch has to stay.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::Path;
use tilewright_base::DType;
use tilewright_data::{from_f64, from_i64, read_f64, read_i64};
use tilewright_emit_llvm::emit_kernel;
use tilewright_interp::Mode;
use tilewright_jit::{Jit, Options, Source};
use tilewright_layout::Env;
use tilewright_tile::{CpuKnobs, Kernel, MatrixUnit, Schedule};

type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

/// A small generator of numbers (PCG-like), so that tests are the same everywhere.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) ^ (self.0 >> 17)
    }
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() % 2001) as f64 / 1000.0 - 1.0
    }
}

pub(crate) fn schedule(tiles: &[(&str, i64)], cpu: CpuKnobs) -> Schedule {
    Schedule { tiles: tiles.iter().map(|(n, v)| ((*n).into(), *v)).collect(), cpu }
}

/// A compiler that keeps its kernels beside the build: the next run finds those whose text, LLVM and
/// machine are the same and compiles the others.
pub(crate) fn jit() -> Jit {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    Jit::new(Options { cache: Some(cache), ..Options::default() }).unwrap()
}

/// Both vector widths that this machine can run.
pub(crate) fn knobs() -> Vec<CpuKnobs> {
    let mut all = vec![CpuKnobs::default()];
    if std::is_x86_feature_detected!("avx512dq") {
        all.push(CpuKnobs::avx512());
    }
    all
}

/// Knobs for a matrix unit, when this machine has it.
pub(crate) fn unit_knobs(unit: MatrixUnit) -> Option<CpuKnobs> {
    let here = match unit {
        MatrixUnit::Fma | MatrixUnit::Codes => true,
        MatrixUnit::Bf16Dot => std::is_x86_feature_detected!("avx512bf16"),
        MatrixUnit::I8Dot => std::is_x86_feature_detected!("avx512vnni"),
        MatrixUnit::Bf16Tile | MatrixUnit::I8Tile => false,
    };
    here.then(|| CpuKnobs { unit, ..CpuKnobs::avx512() })
}

/// Memory at a distance from a multiple of 64 bytes, with untouchable-by-contract bytes behind it.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

const CANARY: u8 = 0xA5;

impl Memory {
    fn new(from: &[u8], shift: usize) -> Memory {
        let mut bytes = vec![CANARY; from.len() + 4096 + 128];
        let start = bytes.as_ptr().align_offset(64) + shift;
        bytes[start..start + from.len()].copy_from_slice(from);
        Memory { bytes, start, len: from.len() }
    }
    fn get(&self) -> &[u8] {
        let end = self.start + self.len;
        assert!(self.bytes[end..].iter().all(|b| *b == CANARY), "wrote past the end of a buffer");
        assert!(self.bytes[..self.start].iter().all(|b| *b == CANARY), "wrote before a buffer");
        &self.bytes[self.start..end]
    }
}

/// The functions of the buffers' elements: inputs random, outputs marked.
pub(crate) fn fill(kernel: &Kernel, sizes: &Env, rng: &mut Rng) -> Vec<Vec<u8>> {
    kernel
        .params
        .iter()
        .map(|(_, p)| {
            let n = p.layout.alloc_elements().eval(sizes).unwrap().max(0) as usize;
            let mut bytes = vec![0u8; p.dtype.bytes_for(n).unwrap()];
            for i in 0..n {
                let out = p.access == tilewright_tile::Access::Out;
                if p.dtype.is_float() {
                    from_f64(p.dtype, &mut bytes, i, if out { 77.0 } else { rng.unit() });
                } else if p.dtype == DType::Bool {
                    from_i64(p.dtype, &mut bytes, i, (rng.next() % 2) as i64);
                } else {
                    from_i64(p.dtype, &mut bytes, i, (rng.next() % 11) as i64 - 3);
                }
            }
            bytes
        })
        .collect()
}

/// Runs both ways and compares; `tolerance` is absolute and relative, 0 for exact.
pub(crate) fn check(kernel: &Kernel, schedule: &Schedule, sizes: &[(&str, i64)], tolerance: f64) {
    let env: Env = sizes.iter().map(|(n, v)| ((*n).into(), *v)).collect();
    let buffers = fill(kernel, &env, &mut Rng(17));
    check_with(kernel, schedule, sizes, tolerance, buffers);
}

/// As [`check`], on given bytes. What goes past the caches is also run on buffers that start in the
/// middle of a cache line.
pub(crate) fn check_with(
    kernel: &Kernel,
    schedule: &Schedule,
    sizes: &[(&str, i64)],
    tolerance: f64,
    buffers: Vec<Vec<u8>>,
) {
    check_all(kernel, schedule, sizes, tolerance, buffers, &str::to_owned);
}

/// As [`check`], with the generated text changed before it is compiled.
pub(crate) fn check_text(
    kernel: &Kernel,
    schedule: &Schedule,
    sizes: &[(&str, i64)],
    tolerance: f64,
    change: &dyn Fn(&str) -> String,
) {
    let env: Env = sizes.iter().map(|(n, v)| ((*n).into(), *v)).collect();
    let buffers = fill(kernel, &env, &mut Rng(17));
    check_all(kernel, schedule, sizes, tolerance, buffers, change);
}

fn check_all(
    kernel: &Kernel,
    schedule: &Schedule,
    sizes: &[(&str, i64)],
    tolerance: f64,
    buffers: Vec<Vec<u8>>,
    change: &dyn Fn(&str) -> String,
) {
    if schedule.cpu.stream {
        check_at(kernel, schedule, sizes, tolerance, buffers.clone(), 8, change);
    }
    check_at(kernel, schedule, sizes, tolerance, buffers, 0, change);
}

fn check_at(
    kernel: &Kernel,
    schedule: &Schedule,
    sizes: &[(&str, i64)],
    tolerance: f64,
    buffers: Vec<Vec<u8>>,
    shift: usize,
    change: &dyn Fn(&str) -> String,
) {
    let what =
        format!("{} {:?} {sizes:?} {}", kernel.name, schedule.tiles, schedule.cpu.vector_bits);
    let env: Env = sizes.iter().map(|(n, v)| ((*n).into(), *v)).collect();
    let emitted = emit_kernel(kernel, schedule).unwrap_or_else(|e| panic!("{what}: {e}\n{kernel}"));
    assert_eq!(emitted.llvm_ir, emit_kernel(kernel, schedule).unwrap().llvm_ir, "{what}: text");
    let jit = jit();
    let source = Source { symbol: emitted.name.clone(), text: change(&emitted.llvm_ir) };
    let build = jit
        .build(std::slice::from_ref(&source))
        .unwrap_or_else(|e| panic!("{what}: {e}\n{}", source.text));
    let mut memory: Vec<Memory> = buffers.iter().map(|b| Memory::new(b, shift)).collect();
    let ptrs: Vec<*mut u8> = memory.iter_mut().map(|m| m.bytes[m.start..].as_mut_ptr()).collect();
    let values: Vec<i64> =
        kernel.symbols.iter().map(|s| env.get(&s.name).copied().unwrap()).collect();
    let blocks: i64 = kernel
        .grid
        .iter()
        .map(|g| {
            let mut all = env.clone();
            all.extend(schedule.tiles.clone());
            g.extent.eval(&all).unwrap().max(0)
        })
        .product();
    let mut scratch = vec![0xFFu8; emitted.scratch_bytes + 64];
    let shift = scratch.as_ptr().align_offset(64);
    // SAFETY: the kernel has this signature; buffers have the sizes of their layouts.
    unsafe {
        let run: KernelFn = std::mem::transmute(build.library.address(0));
        // In two parts: a block must not depend on the one before.
        let half = blocks / 2;
        run(ptrs.as_ptr(), values.as_ptr(), half, blocks, scratch[shift..].as_mut_ptr());
        run(ptrs.as_ptr(), values.as_ptr(), 0, half, scratch[shift..].as_mut_ptr());
    }
    let mut expected = buffers;
    tilewright_interp::tile::run(kernel, schedule, &env, &mut expected, Mode::Exact)
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    for ((_, p), (got, want)) in kernel.params.iter().zip(memory.iter().zip(&expected)) {
        let got = got.get();
        let n = want.len() * 8 / p.dtype.bits() as usize;
        let mut wrong = Vec::new();
        for i in 0..n {
            if p.dtype.is_float() {
                let (g, w) = (read_f64(p.dtype, got, i), read_f64(p.dtype, want, i));
                let near = (g - w).abs() <= tolerance * w.abs().max(1.0);
                if !(g == w || near || (g.is_nan() && w.is_nan())) {
                    wrong.push((i, g, w));
                }
            } else {
                let (g, w) = (read_i64(p.dtype, got, i), read_i64(p.dtype, want, i));
                if g != w {
                    wrong.push((i, g as f64, w as f64));
                }
            }
        }
        assert!(
            wrong.is_empty(),
            "{what}: {} of {n} elements of {} differ: (index, got, want) {:?}\n{}",
            wrong.len(),
            p.name,
            &wrong[..wrong.len().min(8)],
            if std::env::var("IR").is_ok() { &source.text } else { "" }
        );
    }
}
