//! Products on matrix units (`unit=` in the schedule) against the interpreter of the same program.

mod common;

use common::{Rng, check, check_with, fill, schedule, unit_knobs};
use tilewright_base::DType;
use tilewright_expr::{Func, Value};
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, CpuKnobs, Kernel, KernelBuilder, MatrixUnit, TileId, TileType};

const WIDTH: i64 = 32;

fn d(v: i64) -> Dim {
    Dim::new(v)
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Row,
    Transposed,
    Panels,
    Grouped(i64),
}

fn placed(rows: &Dim, cols: &Dim, place: Place) -> Layout {
    let shape = [rows.clone(), cols.clone()];
    match place {
        Place::Row => Layout::row_major(&shape),
        Place::Transposed => Layout::row_major(&[cols.clone(), rows.clone()]).permute(&[1, 0]),
        Place::Panels => Layout::panels(&shape, 1, WIDTH),
        Place::Grouped(group) => Layout::grouped_panels(&shape, 1, WIDTH, 0, group),
    }
}

/// What the operands are in memory and in the product, and the sum's type.
struct Types {
    memory: [DType; 2],
    product: [DType; 2],
    acc: DType,
}

const BF16: Types = Types {
    memory: [DType::F32, DType::BF16],
    product: [DType::BF16, DType::BF16],
    acc: DType::F32,
};

/// `C = A B` over several tiles of the depth.
fn gemm(dims: [Dim; 3], symbols: &[&str], places: [Place; 2], types: &Types) -> Kernel {
    let mut b = KernelBuilder::new("gemm");
    for s in symbols {
        b.symbol(Symbol { name: (*s).into(), range: Range { min: 1, max: 4096 } });
    }
    let (bm, bn, bk) = (b.tile("BM"), b.tile("BN"), b.tile("BK"));
    let [m, n, k] = dims;
    let pm = b.grid("pm", m.ceil_div(&bm));
    let pn = b.grid("pn", n.ceil_div(&bn));
    let a = b.param("A", types.memory[0], placed(&m, &k, places[0]), Access::In);
    let w = b.param("B", types.memory[1], placed(&k, &n, places[1]), Access::In);
    let c = b.param("C", types.acc, Layout::row_major(&[m, n]), Access::Out);
    let float = types.acc.is_float();
    let zero = if float { Value::Float(0.0) } else { Value::Int(0) };
    let zero = b.full(zero, TileType::new(types.acc, vec![bm.clone(), bn.clone()]));
    let (i, carried) = b.begin_for("k", d(0), k.ceil_div(&bk), &[zero]);
    let operand =
        |b: &mut KernelBuilder, p, index: Vec<Dim>, shape: Vec<Dim>, to: DType| -> TileId {
            let tile = b.load(p, index, shape.clone());
            let from = b.param_info(p).dtype;
            if from == to {
                return tile;
            }
            let args = vec![b.plain(tile)];
            b.map(Func::cast(from, to), args, shape)
        };
    let at = [&pm * &bm, &i * &bk, &pn * &bn];
    let index = vec![at[0].clone(), at[1].clone()];
    let ta = operand(&mut b, a, index, vec![bm.clone(), bk.clone()], types.product[0]);
    let index = vec![at[1].clone(), at[2].clone()];
    let tb = operand(&mut b, w, index, vec![bk.clone(), bn], types.product[1]);
    let x = b.mma(carried[0], ta, tb, Some(&k - &at[1]));
    let out = b.end_for(&[x])[0];
    b.store(c, vec![at[0].clone(), at[2].clone()], out);
    b.finish()
}

fn every_shape(knobs: &CpuKnobs, types: &Types, tolerance: f64) {
    let group = knobs.unit.depth_group();
    let places = [
        [Place::Row, Place::Grouped(group)],
        [Place::Row, Place::Row],
        [Place::Transposed, Place::Transposed],
        [Place::Row, Place::Panels],
    ];
    for (m, n, k) in [(1, 1, 1), (5, 7, 3), (16, 32, 16), (37, 50, 41), (64, 96, 128), (30, 33, 65)]
    {
        for (bm, bn, bk) in [(16, 32, 16), (28, 64, 64)] {
            let s = schedule(&[("BM", bm), ("BN", bn), ("BK", bk)], knobs.clone());
            for places in places {
                check(&gemm([d(m), d(n), d(k)], &[], places, types), &s, &[], tolerance);
            }
        }
    }
    let s = schedule(&[("BM", 32), ("BN", 64), ("BK", 32)], knobs.clone());
    let symbolic = || [Dim::sym("M"), Dim::sym("N"), Dim::sym("K")];
    for places in places {
        let kernel = gemm(symbolic(), &["M", "N", "K"], places, types);
        for (m, n, k) in [(1, 1, 1), (37, 50, 41), (64, 128, 96), (33, 65, 70), (15, 31, 39)] {
            check(&kernel, &s, &[("M", m), ("N", n), ("K", k)], tolerance);
        }
    }
}

/// The fallback has the same rounding of the operands: the same program, the same tolerance.
#[test]
fn bf16_products_of_every_shape() {
    for unit in [MatrixUnit::Bf16Dot, MatrixUnit::Fma] {
        let Some(knobs) = unit_knobs(unit) else { continue };
        every_shape(&knobs, &BF16, 2e-5);
        let both = Types { memory: [DType::BF16, DType::F32], ..BF16 };
        every_shape(&knobs, &both, 2e-5);
        let stored = Types { memory: [DType::BF16; 2], ..BF16 };
        every_shape(&knobs, &stored, 2e-5);
    }
    every_shape(&CpuKnobs::default(), &BF16, 2e-5);
}

/// Bytes of every kind: exact, also where four products of the largest magnitudes meet.
#[test]
fn byte_products_are_exact() {
    let Some(knobs) = unit_knobs(MatrixUnit::I8Dot) else { return };
    for left in [DType::U8, DType::I8] {
        let types =
            Types { memory: [left, DType::I8], product: [left, DType::I8], acc: DType::I32 };
        every_shape(&knobs, &types, 0.0);
        let kernel = gemm([d(33), d(70), d(101)], &[], [Place::Row, Place::Grouped(4)], &types);
        let s = schedule(&[("BM", 28), ("BN", 64), ("BK", 64)], knobs.clone());
        let bytes = |p: usize, n: usize| -> Vec<u8> {
            let mut rng = Rng(p as u64 + 5);
            let extremes = [0u8, 1, 127, 128, 255];
            (0..n).map(|_| extremes[(rng.next() % 5) as usize]).collect()
        };
        let mut buffers = fill(&kernel, &Default::default(), &mut Rng(3));
        for (i, b) in buffers.iter_mut().enumerate().take(2) {
            *b = bytes(i, b.len());
        }
        check_with(&kernel, &s, &[], 0.0, buffers);
    }
}
