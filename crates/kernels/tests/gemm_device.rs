//! Matrix products after scheduling: the rules, the checker under all orders, and values against the
//! tile program's own interpreter.

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_expr::{FuncBuilder, Op};
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, orders, run};
use tilewright_kernels::gemm::{Epilogue, GemmSpec, Math, Order, Pair};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, Mode as Sharing, ProductKind, StoreKind, lower};
use tilewright_tile::Schedule;

/// A small product and its schedule.
struct Case {
    name: &'static str,
    spec: GemmSpec,
    schedule: GpuSchedule,
    /// M, N, K.
    sizes: (i64, i64, i64),
}

fn tiles(bm: i64, bn: i64, bk: i64) -> GpuSchedule {
    let mut s = GpuSchedule::hopper(&[("BM", bm), ("BN", bn), ("BK", bk)]);
    s.stages = 3;
    s.raster = 2;
    s
}

fn spec(dtype: DType, orders: (Order, Order, Order)) -> GemmSpec {
    let sum = if dtype.is_float() { DType::F32 } else { DType::I32 };
    let result = if dtype == DType::I8 { DType::I32 } else { dtype };
    let mut s = GemmSpec::plain(dtype, sum, result);
    (s.a, s.b, s.c) = orders;
    s
}

fn cases() -> Vec<Case> {
    use Order::{Col, Row};
    let rrr = (Row, Row, Row);
    let mut out = Vec::new();
    let mut add = |name, spec, schedule, sizes| out.push(Case { name, spec, schedule, sizes });
    add("plain", spec(DType::BF16, rrr), tiles(128, 32, 64), (200, 72, 200));
    let mut s = tiles(128, 32, 64);
    (s.cluster, s.cluster_axis) = (2, 0);
    add("cluster along rows", spec(DType::F16, rrr), s, (300, 72, 200));
    let mut s = tiles(128, 64, 64);
    (s.cluster, s.cluster_axis, s.dependent) = (2, 1, true);
    add("cluster along columns", spec(DType::BF16, (Col, Col, Col)), s, (130, 200, 136));
    let mut s = tiles(128, 32, 64);
    (s.cluster, s.cluster_axis) = (4, 2);
    add("cluster along both", spec(DType::BF16, (Row, Col, Row)), s, (300, 72, 200));
    let mut s = tiles(64, 64, 64);
    (s.cluster, s.cluster_axis, s.consumers, s.dependent) = (8, 2, 1, true);
    add("cluster of eight along both", spec(DType::BF16, (Col, Row, Row)), s, (72, 136, 200));
    let mut s = tiles(64, 32, 64);
    s.mode = Sharing::PingPong;
    add("ping-pong", spec(DType::BF16, (Row, Col, Row)), s, (300, 40, 72));
    let mut s = tiles(64, 32, 64);
    (s.consumers, s.store, s.vector, s.persistent) = (1, StoreKind::Direct, 1, false);
    add("direct store", spec(DType::BF16, rrr), s, (70, 33, 200));
    let staged = |s: GpuSchedule, vector| GpuSchedule { store: StoreKind::Staged, vector, ..s };
    add(
        "rows that start anywhere",
        spec(DType::BF16, rrr),
        staged(tiles(128, 64, 64), 1),
        (130, 67, 72),
    );
    let mut s = staged(tiles(64, 32, 64), 2);
    s.mode = Sharing::PingPong;
    add("even rows, ping-pong", spec(DType::F16, (Row, Col, Row)), s, (300, 38, 72));
    let mut tf32 = spec(DType::F32, (Row, Col, Row));
    tf32.math = Math::Tf32;
    add("tf32, odd rows", tf32.clone(), staged(tiles(128, 96, 32), 1), (130, 99, 72));
    add("tf32", tf32.clone(), tiles(128, 32, 32), (130, 40, 72));
    tf32.math = Math::Tf32x3;
    add("three-part tf32, two sums a turn", tf32.clone(), tiles(128, 32, 32), (130, 40, 72));
    add("three-part tf32, one sum a turn", tf32, tiles(64, 32, 16).with_consumers(1), (70, 40, 72));
    let mut eight = spec(DType::F8E4M3, (Row, Col, Row));
    (eight.result, eight.epilogue) = (DType::BF16, Epilogue::cast(DType::F32, DType::BF16));
    add("f8", eight.clone(), tiles(128, 32, 128), (130, 40, 272));
    let mut bytes = eight.clone();
    (bytes.c, bytes.result) = (Col, DType::F8E4M3);
    bytes.epilogue = Epilogue::cast(DType::F32, DType::F8E4M3);
    add("f8 in columns, 64 rows a consumer", bytes.clone(), tiles(128, 32, 128), (144, 40, 272));
    add("f8 in columns, 192 rows", bytes, tiles(192, 32, 128).with_consumers(1), (208, 40, 272));
    eight.math = Math::Promoted;
    add("f8 promoted", eight, tiles(128, 32, 128), (130, 40, 272));
    add("i8", spec(DType::I8, (Row, Col, Row)), tiles(128, 32, 128), (130, 36, 272));
    let mut bias = spec(DType::BF16, rrr);
    bias.epilogue = Epilogue::bias(None, DType::F32, DType::BF16);
    add("bias", bias, tiles(128, 64, 64), (130, 136, 72));
    let mut residual = spec(DType::BF16, rrr);
    let mut f = FuncBuilder::new();
    let (sum, r) = (f.param("sum", DType::F32), f.param("r", DType::BF16));
    let r = f.cast(r, DType::F32);
    let x = f.op(Op::Add, &[sum, r]);
    let x = f.cast(x, DType::BF16);
    residual.epilogue.func = f.finish(x);
    residual.epilogue.residual = Some(DType::BF16);
    add("residual beside many sums", residual, tiles(128, 256, 64), (100, 264, 72));
    let mut s = tiles(192, 32, 64);
    (s.consumers, s.store_slots) = (3, 1);
    add("three consumers", spec(DType::BF16, rrr), s, (200, 40, 72));
    let mut s = tiles(128, 96, 64);
    s.store_slots = 3;
    add("room for a whole tile", spec(DType::BF16, rrr), s.clone(), (300, 200, 136));
    (s.cluster, s.cluster_axis, s.stages) = (2, 0, 2);
    let mut bias = spec(DType::BF16, (Row, Col, Col));
    bias.epilogue = Epilogue::bias(None, DType::F32, DType::BF16);
    add("room for a whole tile, in columns", bias, s, (260, 104, 72));
    let mut batched = spec(DType::BF16, rrr);
    batched.batched = true;
    add("batched", batched, tiles(64, 32, 64).with_consumers(1), (70, 40, 72));
    pipelined_cases(&mut add);
    pair_cases(&mut add);
    out
}

/// `max(sum, 0) * (second sum + column)` and its like: whole numbers stay whole.
fn gated(spec: GemmSpec, with_cols: bool) -> GemmSpec {
    let mut f = FuncBuilder::new();
    let [gate, up] = ["gate", "up"].map(|name| f.param(name, spec.sum));
    let cols = with_cols.then(|| ["c", "c2"].map(|name| f.param(name, spec.sum)));
    let zero = f.constant(0.0, DType::F32);
    let [gate, mut up] = [gate, up].map(|x| f.cast(x, DType::F32));
    let mut gate = f.op(Op::Max, &[gate, zero]);
    if let Some([c, c2]) = cols {
        gate = f.op(Op::Add, &[gate, c]);
        up = f.op(Op::Sub, &[up, c2]);
    }
    let x = f.op(Op::Mul, &[gate, up]);
    let x = f.cast(x, spec.result);
    let col_vector = with_cols.then_some(spec.sum);
    let (func, row_vector, residual) = (f.finish(x), None, None);
    let epilogue = Epilogue { func, col_vector, row_vector, residual, pair: Pair::Right };
    GemmSpec { epilogue, ..spec }
}

/// Two products of one left operand, and of one right operand: joined into one instruction, side by side, promoted,
/// and without the copy engine.
fn pair_cases(add: &mut dyn FnMut(&'static str, GemmSpec, GpuSchedule, (i64, i64, i64))) {
    use Order::{Col, Row};
    let rrr = (Row, Row, Row);
    let rcr = (Row, Col, Row);
    let f32s = |mut s: GemmSpec| {
        s.result = DType::F32;
        s
    };
    let left = |s: GemmSpec| GemmSpec { epilogue: s.epilogue.transposed(), ..s };
    let bf16 = |orders| f32s(spec(DType::BF16, orders));
    add("pair", gated(bf16(rrr), false), tiles(128, 64, 64), (130, 72, 200));
    add("pair along the depth", gated(bf16(rcr), true), tiles(128, 32, 64), (130, 72, 200));
    let wide = tiles(64, 192, 64).with_consumers(1);
    add("wide pair, two instructions", gated(bf16(rcr), false), wide, (70, 200, 72));
    let mut s = tiles(128, 64, 64);
    (s.cluster, s.cluster_axis) = (2, 0);
    add("pair, shared right operands", gated(bf16(rrr), false), s.clone(), (300, 72, 136));
    s.cluster_axis = 1;
    add("pair, shared left operand", gated(bf16(rcr), false), s, (130, 136, 136));
    let mut s = tiles(64, 32, 64);
    s.mode = Sharing::PingPong;
    add("pair, ping-pong", gated(bf16((Row, Col, Col)), false), s, (300, 40, 72));
    let swapped = left(gated(bf16((Row, Col, Col)), true));
    add("left pair", swapped, tiles(128, 32, 64), (130, 40, 136));
    let mut batched = gated(bf16(rcr), true);
    batched.batched = true;
    add("pair, batched", batched, tiles(64, 32, 64).with_consumers(1), (70, 40, 72));
    let eight = gated(f32s(spec(DType::F8E4M3, rcr)), false);
    add("pair, f8", eight.clone(), tiles(128, 32, 128), (130, 40, 272));
    let promoted = GemmSpec { math: Math::Promoted, ..eight };
    add("pair, f8 promoted", promoted, tiles(128, 32, 128), (130, 40, 272));
    let bytes = gated(f32s(spec(DType::I8, rcr)), false);
    add("pair, i8", bytes, tiles(128, 32, 128), (130, 36, 272));
    let tf32 = GemmSpec { math: Math::Tf32, ..gated(spec(DType::F32, rcr), true) };
    add("pair, tf32", tf32, tiles(128, 32, 32), (130, 40, 72));
    let parts = GemmSpec { math: Math::Tf32x3, ..gated(spec(DType::F32, rcr), true) };
    add("pair, three-part tf32", parts.clone(), tiles(128, 32, 16), (130, 40, 40));
    add(
        "left pair, three-part tf32",
        left(parts),
        tiles(64, 32, 16).with_consumers(1),
        (70, 40, 40),
    );
    let mma = [("BM", 64), ("BN", 32), ("BK", 32)];
    let mma = GpuSchedule::pipelined(Arch::Sm80, ProductKind::MmaSync, (2, 2), &mma);
    let mma = GpuSchedule { vector: 4, copies: 4, ..mma };
    add("pair, mma", gated(bf16(rrr), true), mma.clone(), (70, 72, 72));
    add("left pair, mma", left(gated(bf16(rcr), false)), mma, (70, 40, 72));
    let fma = [("BM", 64), ("BN", 64), ("BK", 16)];
    let fma = GpuSchedule::pipelined(Arch::Sm80, ProductKind::Fma, (2, 2), &fma);
    let fma = GpuSchedule { vector: 4, ..fma };
    add("pair, fma", gated(spec(DType::F32, rrr), true), fma, (70, 72, 40));
}

/// Without the copy engine: `mma.sync` and plain multiply-adds.
fn pipelined_cases(add: &mut dyn FnMut(&'static str, GemmSpec, GpuSchedule, (i64, i64, i64))) {
    use Order::{Col, Row};
    let rrr = (Row, Row, Row);
    let pipelined = |arch, product, warps, (bm, bn, bk), vector| {
        let tiles = [("BM", bm), ("BN", bn), ("BK", bk)];
        GpuSchedule { vector, ..GpuSchedule::pipelined(arch, product, warps, &tiles) }
    };
    // Lines of operands may end within a copy.
    let mma = |arch, warps, tile, vector| GpuSchedule {
        copies: vector,
        ..pipelined(arch, ProductKind::MmaSync, warps, tile, vector)
    };
    let fma = |warps, tile, vector| pipelined(Arch::Sm80, ProductKind::Fma, warps, tile, vector);
    let s = mma(Arch::Sm80, (2, 2), (64, 64, 32), 8);
    add("mma bf16", spec(DType::BF16, rrr), s.clone(), (130, 72, 200));
    add("mma bf16, few steps", spec(DType::BF16, (Col, Col, Col)), s.clone(), (65, 72, 24));
    let staged = GpuSchedule { stages: 5, store: StoreKind::Staged, persistent: true, ..s.clone() };
    add("mma staged", spec(DType::F16, (Row, Col, Row)), staged, (130, 136, 200));
    add("mma odd", spec(DType::BF16, rrr), GpuSchedule { vector: 1, copies: 1, ..s }, (67, 33, 45));
    let mut bias = spec(DType::BF16, rrr);
    bias.epilogue = Epilogue::bias(None, DType::F32, DType::BF16);
    let s = mma(Arch::Sm80, (1, 4), (32, 128, 32), 4);
    add("mma bias", bias, GpuSchedule { store: StoreKind::Staged, ..s }, (40, 136, 72));
    let s = mma(Arch::Sm80, (2, 1), (32, 32, 64), 16);
    add("mma i8", spec(DType::I8, (Row, Col, Row)), s, (40, 36, 144));
    let mut eight = spec(DType::F8E4M3, (Row, Col, Row));
    (eight.result, eight.epilogue) = (DType::BF16, Epilogue::cast(DType::F32, DType::BF16));
    eight.math = Math::Promoted;
    add("mma f8 promoted", eight, mma(Arch::Sm89, (2, 2), (64, 64, 64), 16), (70, 40, 144));
    let mut tf32 = spec(DType::F32, rrr);
    tf32.math = Math::Tf32;
    add("mma tf32", tf32, mma(Arch::Sm90a, (2, 2), (64, 64, 16), 4), (70, 40, 72));
    let two = fma((1, 2), (64, 128, 16), 4);
    add("fma, two warps", spec(DType::F32, (Row, Col, Row)), two, (70, 132, 40));
    let s = GpuSchedule { arch: Arch::Sm90a, ..fma((2, 2), (128, 64, 16), 4) };
    add("fma, engine and registers", spec(DType::F32, rrr), s.clone(), (200, 72, 72));
    add("fma, engine", spec(DType::F32, (Col, Row, Row)), s.clone(), (200, 72, 72));
    add("fma, registers and threads", spec(DType::F32, (Row, Col, Row)), s, (200, 72, 72));
    let s = fma((2, 2), (64, 64, 16), 4);
    add("fma", spec(DType::F32, rrr), s.clone(), (70, 72, 40));
    add("fma, both along the depth", spec(DType::F32, (Row, Col, Row)), s.clone(), (70, 72, 40));
    add("fma, neither", spec(DType::F32, (Col, Row, Col)), s.clone(), (72, 72, 44));
    add("fma odd", spec(DType::F32, rrr), GpuSchedule { vector: 1, ..s.clone() }, (67, 33, 45));
    let mut batched = spec(DType::F32, rrr);
    batched.batched = true;
    let staged = GpuSchedule { store: StoreKind::Staged, persistent: true, stages: 2, ..s };
    add("fma staged", batched, staged, (70, 72, 40));
}

trait WithConsumers {
    fn with_consumers(self, consumers: u32) -> Self;
}

impl WithConsumers for GpuSchedule {
    fn with_consumers(mut self, consumers: u32) -> Self {
        self.consumers = consumers;
        self
    }
}

fn sizes(case: &Case) -> Env {
    let (m, n, k) = case.sizes;
    let line = |order, rows: i64, cols: i64| {
        let line = if order == Order::Row { cols } else { rows };
        (line + 15) / 16 * 16
    };
    let mut env = Env::new();
    let mut put = |name: &str, v: i64| {
        env.insert(Arc::from(name), v);
    };
    put("M", m);
    put("N", n);
    put("K", k);
    let (a, b, c) = (line(case.spec.a, m, k), line(case.spec.b, k, n), line(case.spec.c, m, n));
    put("lda", a);
    put("ldb", b);
    put("ldc", c);
    if case.spec.batched {
        put("L", 2);
        put("sa", a * m.max(k));
        put("sb", b * n.max(k));
        put("sc", c * m.max(n));
    }
    env
}

/// Bytes for each parameter: small whole numbers, so that sums are exact in f32 and any order.
fn buffers(kernel: &tilewright_tile::Kernel, env: &Env) -> Vec<Vec<u8>> {
    kernel
        .params
        .iter()
        .enumerate()
        .map(|(p, (_, param))| {
            let elements = param.layout.alloc_elements().eval(env).unwrap() as usize;
            let mut bytes = vec![0u8; elements * param.dtype.bits() as usize / 8];
            for i in 0..elements {
                let value = ((i * 7 + p * 5 + i / 11) % 5) as i64 - 2;
                if param.dtype.is_float() {
                    tilewright_data::from_f64(param.dtype, &mut bytes, i, value as f64);
                } else {
                    tilewright_data::from_i64(param.dtype, &mut bytes, i, value);
                }
            }
            bytes
        })
        .collect()
}

#[test]
fn scheduled_products_keep_the_rules() {
    for case in cases() {
        let kernel = case.spec.program("gemm");
        let program =
            lower(&kernel, &case.schedule).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        if let Err(e) = tilewright_device::verify(&program) {
            panic!("{}: {e}\n{:#?}\n{program}", case.name, e.notes());
        }
        let env = sizes(&case);
        if let Err(e) = check(&program, &[env], &[1, 2]) {
            panic!("{}: {e}\n{:#?}", case.name, e.notes());
        }
    }
}

#[test]
fn scheduled_products_compute_what_the_tile_program_says() {
    for case in cases() {
        let kernel = case.spec.program("gemm");
        let program = lower(&kernel, &case.schedule).unwrap();
        let env = sizes(&case);
        let mut expected = buffers(&kernel, &env);
        let schedule = Schedule {
            tiles: case.schedule.tiles.clone().into_iter().collect::<BTreeMap<_, _>>(),
            ..Schedule::default()
        };
        tilewright_interp::tile::run(&kernel, &schedule, &env, &mut expected, Mode::Exact).unwrap();
        for order in orders().into_iter().step_by(7) {
            let mut got = buffers(&kernel, &env);
            let options = Options { clusters: 2, order, mode: Mode::Exact, ..Options::default() };
            run(&program, &env, &mut got, &options)
                .unwrap_or_else(|e| panic!("{}: {e}", case.name));
            let out = kernel.params.iter().count() - 1;
            assert!(got[out] == expected[out], "{}: other values ({order})", case.name);
        }
    }
}
