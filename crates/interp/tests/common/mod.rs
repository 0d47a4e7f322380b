//! A device program written by hand: a Hopper matrix product with everything that can go wrong.
//!
//! `C[M,N] = A[M,K] * B[K,N]`, B with its columns contiguous along K. Clusters of two blocks, one above the other,
//! take tiles of 2 x 128 rows and 16 columns and loop over them. In each block a producer thread keeps
//! a ring of stages full: its own rows of A, and half of the columns of B, sent to both blocks. Two
//! warpgroups take 64 rows each, release a stage one step late (to both blocks, whose copies fill
//! it), and write their part through shared memory with a copy that runs on into the next tile.

use std::sync::Arc;
use tilewright_base::{DType, IdVec};
use tilewright_device::*;
use tilewright_expr::Func;
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, Compare, Param};

/// Rows of a block's tile.
pub(crate) const BM: i64 = 128;
/// Columns of a tile.
pub(crate) const BN: i64 = 16;
/// Depth of a stage.
pub(crate) const BK: i64 = 64;

fn sym(name: &str) -> Dim {
    Dim::sym(name)
}

fn num(value: i64) -> Dim {
    Dim::new(value)
}

fn row_major(rows: &str, cols: &str) -> Layout {
    Layout::row_major(&[sym(rows), sym(cols)])
}

fn param(name: &str, layout: Layout, access: Access) -> Param {
    Param { name: Arc::from(name), dtype: DType::BF16, layout, access }
}

fn whole(frag: FragId) -> FragRef {
    FragRef { frag, col: num(0), cols: None }
}

/// The program, with a ring of `stages` (at least 2).
pub(crate) fn gemm(stages: u32) -> Program {
    let mut params = IdVec::new();
    let pa = params.push(param("A", row_major("M", "K"), Access::In));
    let columns = Layout {
        axes: vec![
            Axis { extent: sym("K"), stride: num(1), block: None },
            Axis { extent: sym("N"), stride: sym("K"), block: None },
        ],
        offset: num(0),
    };
    let pb = params.push(param("B", columns, Access::In));
    let pc = params.push(param("C", row_major("M", "N"), Access::Out));

    let mut maps = IdVec::new();
    let map = |name: &str, param, box_shape: [u32; 2], contiguous, swizzle| TensorMap {
        windows: None,
        name: name.to_string(),
        param,
        box_shape: box_shape.to_vec(),
        contiguous,
        swizzle,
        tf32: false,
    };
    let map_a = maps.push(map("map_a", pa, [128, 64], 1, Swizzle::B128));
    let map_b = maps.push(map("map_b", pb, [64, 8], 0, Swizzle::B128));
    let map_c = maps.push(map("map_c", pc, [64, 16], 1, Swizzle::B32));

    let mut smem = IdVec::new();
    let buffer = |name: &str, rows, cols, contiguous, swizzle, slots| Smem {
        name: name.to_string(),
        dtype: DType::BF16,
        rows,
        cols,
        contiguous,
        swizzle,
        slots,
    };
    let sa = smem.push(buffer("a", 128, 64, 1, Swizzle::B128, stages));
    let sb = smem.push(buffer("b", 64, 16, 0, Swizzle::B128, stages));
    let sc = smem.push(buffer("c", 64, 16, 1, Swizzle::B32, 2));

    let mut barriers = IdVec::new();
    let full = barriers.push(Barrier { name: "full".to_string(), slots: stages, arrivals: 1 });
    // Two warpgroups in each of two blocks.
    let empty = barriers.push(Barrier { name: "empty".to_string(), slots: stages, arrivals: 4 });
    let mut rings = IdVec::new();
    let stage = rings.push(Ring { name: "stage".to_string(), stages });
    let mut frags = IdVec::new();
    let frag = |name: &str, dtype| Frag {
        name: name.to_string(),
        dtype,
        rows: 64,
        cols: 16,
        spread: Spread::Wgmma,
        extent: Extent::Tile,
    };
    let acc = frags.push(frag("acc", DType::F32));
    let out = frags.push(frag("out", DType::BF16));

    let at_stage = |barrier| BarrierRef { barrier, slot: Slot::Ring(stage) };
    let tile =
        |smem, slot, row: Dim, col: Dim, rows, cols| SmemTile { smem, slot, row, col, rows, cols };
    let ring_slot = || Slot::Ring(stage);
    let tiles_n = sym("N").ceil_div(&num(BN));
    let items = sym("M").ceil_div(&num(2 * BM)) * &tiles_n;
    let row0 = (sym("pm") * 2 + sym(CTA)) * BM;
    let col0 = sym("pn") * BN;
    let over_tiles = |body: Vec<Stmt>| {
        let mut all = vec![
            Stmt::Let { name: "pm".into(), value: sym("t").floor_div(&tiles_n) },
            Stmt::Let { name: "pn".into(), value: sym("t").modulo(&tiles_n) },
        ];
        all.extend(body);
        Stmt::For {
            var: "t".into(),
            lo: sym(CLUSTER),
            hi: items.clone(),
            step: sym(CLUSTERS),
            body: all,
        }
    };
    let over_depth = |body: Vec<Stmt>| Stmt::For {
        var: "k".into(),
        lo: num(0),
        hi: sym("K").ceil_div(&num(BK)),
        step: num(1),
        body,
    };
    let advance = || Stmt::Advance { ring: stage, by: num(1) };

    let produce = vec![
        Stmt::Wait { barrier: at_stage(empty), phase: Phase::Before(stage) },
        Stmt::ExpectBytes { barrier: at_stage(full), bytes: (128 * 64 + 64 * 16) * 2 },
        Stmt::TmaLoad {
            map: map_a,
            at: vec![row0.clone(), sym("k") * BK],
            to: tile(sa, ring_slot(), num(0), num(0), 128, 64),
            barrier: at_stage(full),
            reach: Reach::Own,
            cache: CachePolicy::EvictFirst,
        },
        Stmt::TmaLoad {
            map: map_b,
            at: vec![sym("k") * BK, &col0 + sym(CTA) * 8],
            to: tile(sb, ring_slot(), num(0), sym(CTA) * 8, 64, 8),
            barrier: at_stage(full),
            reach: Reach::All,
            cache: CachePolicy::Normal,
        },
        advance(),
    ];
    let release = || Stmt::Arrive {
        barrier: BarrierRef { barrier: empty, slot: Slot::Before(stage) },
        reach: Reach::All,
    };
    let compare = |lhs, compare, rhs| Cond { lhs, compare, rhs };
    let consume = vec![
        Stmt::Wait { barrier: at_stage(full), phase: Phase::Of(stage) },
        Stmt::WgmmaFence,
        Stmt::Wgmma {
            acc: whole(acc),
            a: WgmmaA::Smem(tile(sa, ring_slot(), sym("w") * 64, num(0), 64, 64)),
            b: tile(sb, ring_slot(), num(0), num(0), 64, 16),
            turned: false,
            zero_if: Some(compare(sym("k"), Compare::Eq, num(0))),
        },
        Stmt::WgmmaCommit,
        Stmt::WgmmaWait { pending: 1 },
        Stmt::If {
            cond: compare(num(1), Compare::Le, sym("k")),
            then: vec![release()],
            otherwise: vec![],
        },
        advance(),
    ];
    let own_threads = || Stmt::NamedSync { id: sym("w") + 1, threads: 128 };
    let staged = || tile(sc, Slot::At(sym("w")), num(0), num(0), 64, 16);
    let narrow = Func::cast(DType::F32, DType::BF16);
    let consumer = vec![
        over_tiles(vec![
            over_depth(consume),
            Stmt::WgmmaWait { pending: 0 },
            release(),
            Stmt::Once(vec![Stmt::TmaWait { pending: 0, reads_only: true }]),
            own_threads(),
            Stmt::Map { dst: whole(out), func: narrow, args: vec![whole(acc)] },
            Stmt::ToSmem { to: staged(), src: whole(out) },
            Stmt::FenceAsync,
            own_threads(),
            Stmt::Once(vec![
                Stmt::TmaStore {
                    map: map_c,
                    at: vec![&row0 + sym("w") * 64, col0.clone()],
                    from: staged(),
                    add: false,
                },
                Stmt::TmaCommit,
            ]),
        ]),
        Stmt::Once(vec![Stmt::TmaWait { pending: 0, reads_only: true }]),
    ];
    let symbol = |name: &str, min| Symbol { name: name.into(), range: Range { min, max: 1 << 20 } };
    let role = |name: &str, first_warp, instances, instance: &str, single, registers, body| Role {
        name: name.to_string(),
        first_warp,
        warps: 4,
        instances,
        instance: instance.into(),
        single_thread: single,
        registers: Some(registers),
        body,
    };
    Program {
        name: "gemm".to_string(),
        arch: Arch::Sm90a,
        params,
        symbols: vec![symbol("M", 0), symbol("N", 0), symbol("K", 1)],
        maps,
        cluster: 2,
        threads: 384,
        items: items.clone(),
        persistent: true,
        blocks_per_sm: 1,
        streams: Streams::Cached,
        ragged: false,
        smem,
        barriers,
        rings,
        frags,
        shelves: tilewright_base::IdVec::new(),
        setup: vec![Stmt::Once(vec![Stmt::BarrierInit, Stmt::FenceBarrierInit]), Stmt::SyncCluster],
        roles: vec![
            role("producer", 0, 1, "p", true, 40, vec![over_tiles(vec![over_depth(produce)])]),
            role("consumer", 4, 2, "w", false, 232, consumer),
        ],
        teardown: vec![Stmt::SyncCluster],
    }
}
