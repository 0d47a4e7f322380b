//! Pipelined products compile for every architecture, keep their tiles in registers, and use no
//! instruction that is newer than their architecture.

use crate::ratchet::{self, Entry};
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_kernels::gemm::{GemmSpec, Math, Order};
use tilewright_lower_gpu::{GpuSchedule, ProductKind, StoreKind, lower};

/// Operand, arithmetic, warps, tile, elements of an access.
type Row = (DType, Math, ProductKind, (u32, u32), [i64; 3], u32);

#[rustfmt::skip] // One row per schedule.
const SCHEDULES: &[Row] = &[
    (DType::BF16,   Math::Exact, ProductKind::MmaSync, (2, 2), [128, 128, 32],  8),
    (DType::BF16,   Math::Exact, ProductKind::MmaSync, (2, 4), [128, 256, 32],  8),
    (DType::BF16,   Math::Exact, ProductKind::MmaSync, (1, 4), [ 16, 128, 64],  8),
    (DType::BF16,   Math::Exact, ProductKind::MmaSync, (2, 2), [ 64,  64, 32],  1),
    (DType::F16,    Math::Exact, ProductKind::MmaSync, (4, 1), [128,  64, 64],  8),
    (DType::F32,    Math::Tf32,  ProductKind::MmaSync, (2, 2), [128,  64, 32],  4),
    (DType::F32,    Math::Tf32,  ProductKind::MmaSync, (2, 2), [ 64,  64, 16],  1),
    (DType::I8,     Math::Exact, ProductKind::MmaSync, (2, 2), [128, 128, 64], 16),
    (DType::F8E4M3, Math::Exact, ProductKind::MmaSync, (2, 2), [ 64,  64, 64], 16),
    (DType::F32,    Math::Exact, ProductKind::Fma,     (2, 4), [128, 128, 16],  4),
    (DType::F32,    Math::Exact, ProductKind::Fma,     (2, 4), [128, 256, 16],  4),
    (DType::F32,    Math::Exact, ProductKind::Fma,     (4, 2), [256, 128,  8],  4),
    (DType::F32,    Math::Exact, ProductKind::Fma,     (2, 2), [ 64,  64,  8],  1),
    (DType::F32,    Math::Exact, ProductKind::Fma,     (1, 2), [ 64, 128, 32],  4),
];

fn entries(arch: Arch) -> Vec<Entry> {
    let mut out = Vec::new();
    for &(dtype, math, product, warps, [bm, bn, bk], vector) in SCHEDULES {
        if dtype.is_float() && dtype.bits() == 8 && arch < Arch::Sm89 {
            continue;
        }
        for (a, b) in [(Order::Row, Order::Row), (Order::Row, Order::Col), (Order::Col, Order::Row)]
        {
            for store in [StoreKind::Direct, StoreKind::Staged] {
                let sum = if dtype.is_float() { DType::F32 } else { DType::I32 };
                let result = if dtype.bits() == 8 { sum } else { dtype };
                let spec = GemmSpec { a, b, math, ..GemmSpec::plain(dtype, sum, result) };
                let tiles = [("BM", bm), ("BN", bn), ("BK", bk)];
                let stages = if arch == Arch::Sm89 { 2 } else { 3 };
                let plain = GpuSchedule::pipelined(arch, product, warps, &tiles);
                let schedule = GpuSchedule { store, vector, stages, ..plain };
                let name = format!("{dtype} {a:?} {b:?}: {schedule}");
                let program = lower(&spec.program("gemm"), &schedule)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
                out.push(Entry::new(name, &program));
            }
        }
    }
    out
}

#[test]
fn pipelined_products_keep_to_their_resources() {
    let all: Vec<Entry> =
        [Arch::Sm80, Arch::Sm89, Arch::Sm90a].into_iter().flat_map(entries).collect();
    ratchet::keep_to("gemm", &all);
}

/// The device library hides what sm_80 lacks; the kernel's own text must not ask for it.
#[test]
fn ampere_text_calls_nothing_of_hopper() {
    for Entry { name, source, .. } in entries(Arch::Sm80) {
        for call in
            ["mbarrier", "tma_", "wgmma", "cluster_", "grid_wait", "grid_release", "registers_"]
        {
            assert!(!source.text.contains(&format!("tw::{call}")), "{name}: {call}");
        }
        assert!(source.text.contains("tw::copy_tile"), "{name}");
    }
}

/// FP8 came with sm_89, and plain multiply-adds do not round to TF32.
#[test]
fn what_an_architecture_lacks_is_refused() {
    let tiles = [("BM", 64), ("BN", 64), ("BK", 64)];
    let try_it = |spec: GemmSpec, product| {
        let schedule = GpuSchedule::pipelined(Arch::Sm80, product, (2, 2), &tiles);
        lower(&spec.program("gemm"), &schedule)
            .and_then(|p| tilewright_emit_cuda::emit(&p))
            .map(|_| ())
    };
    let f8 = GemmSpec::plain(DType::F8E4M3, DType::F32, DType::F32);
    assert!(try_it(f8, ProductKind::MmaSync).is_err());
    let exact = GemmSpec::plain(DType::F32, DType::F32, DType::F32);
    let tf32 = GemmSpec { math: Math::Tf32, ..exact.clone() };
    assert!(try_it(exact.clone(), ProductKind::MmaSync).is_err());
    assert!(try_it(tf32.clone(), ProductKind::Fma).is_err());
    assert!(try_it(tf32, ProductKind::MmaSync).is_ok());
    assert!(try_it(exact, ProductKind::Fma).is_ok());
}
