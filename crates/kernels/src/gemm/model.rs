//! Estimated time of a product under a schedule.
//!
//! A block's time is that of its tiles one after another; a tile's, that of its steps along the depth
//! and its epilogue. A step takes the longest of: the tensor cores, shared memory that feeds them, the
//! second-level cache that fills the stage, and the load latency spread over the stages in flight. With
//! ping-pong, one consumer's epilogue hides behind the other's products. Device memory bounds the whole.

use crate::gemm::space::staged_columns;
use tilewright_expr::{Func, Node, Op};
use tilewright_lower_gpu::{GpuSchedule, Mode, StoreKind};
use tilewright_target::Gpu;

/// Sizes of a product as the model sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) m: i64,
    pub(crate) n: i64,
    pub(crate) k: i64,
    pub(crate) batch: i64,
    /// Parts of the depth that are summed apart.
    pub(crate) splits: i64,
    /// How often the depth runs over the left operand's memory: taps of windows.
    pub(crate) taps: i64,
    /// Products per step: 3 for three-part TF32.
    pub(crate) products: i64,
    /// Left and right operands: two of one for a pair.
    pub(crate) operands: [i64; 2],
    pub(crate) operand_bytes: i64,
    pub(crate) result_bytes: i64,
    /// Whether every line of `A`, of `B` begins at a cache line.
    pub(crate) lines_aligned: (bool, bool),
    /// Whether lines of `A`, of `B` run along the depth.
    pub(crate) along_depth: (bool, bool),
    /// Neighbours in memory are in one column of the result, not in one row.
    pub(crate) column_major: bool,
    /// Bytes of an element of the matrix that the epilogue reads; 0 without.
    pub(crate) residual_bytes: i64,
    /// Instructions of the epilogue per element, conversions and the first operation aside.
    pub(crate) epilogue_instructions: i64,
}

/// Instructions of a thread per element, beyond the one or two that hide behind the store. Weights of elementary functions
/// are rough counts of what `emit-cuda` prints for them.
pub(crate) fn instructions(func: &Func) -> i64 {
    let weight = |op: &Op| match op {
        Op::Cast => 0,
        Op::Div | Op::Sqrt | Op::Rsqrt | Op::Exp | Op::Exp2 => 8,
        Op::Sigmoid | Op::Tanh | Op::Log | Op::Log2 => 16,
        Op::Erf => 24,
        Op::Pow | Op::Sin | Op::Cos => 40,
        _ => 1,
    };
    let all = func.nodes().map(|(_, node, _)| match node {
        Node::Op(op, _) => weight(op),
        _ => 0,
    });
    (all.sum::<i64>() - 2).max(0)
}

/// Lanes of a multiprocessor that the few warps of an epilogue keep busy.
const EPILOGUE_LANES: f64 = 48.0;

/// Share of the wait for loads that is left in long loops.
const LONG_LOOPS: f64 = 0.15;
/// Bytes of operands beyond which blocks drift apart and read them from memory again, so that loops wait as short ones do:
/// TF32 of 16384^3 (2.1 GB) took 1.2 times cuBLASLt's time without this, bf16 of that size (1.1 GB) gained.
const DRIFTING_BYTES: f64 = 1.5e9;
/// Steps of a block up to which loops are short.
const COLD_STEPS: f64 = 128.0;
/// Bytes per clock that one multiprocessor takes from the caches: its port.
const ARRIVING_BYTES_PER_CLOCK: f64 = 64.0;
/// Bytes per second that one multiprocessor gets from device memory at most: 64 of them took 117 MB in 30.6 us.
const STREAM_OF_ONE: f64 = 6.0e10;
/// Time of products whose right operand lies in panels of 64 bytes, over that with panels of 128.
const NARROW_PANELS: f64 = 1.03;

/// Clocks for each line of a box, where lines of neither operand run along the depth and those of the right one lie in
/// panels of 64 bytes: 3072 x 768 x 4096 in tiles of 128 x 160 took 1040 clocks a step for 448 lines, 768 x 2304 x 4096 in
/// tiles of 64 x 224 1310 for 512. Shared by four blocks the first took 790. Why is not known; it is not so where the left
/// operand's lines run along the depth (4096 x 2304 x 768 in tiles of 128 x 144).
const NARROW_LINE_CLOCKS: f64 = 2.3;

/// Clocks of a warp's store of lines, and of each sector that it touches: of bf16 4096 x 50257 x 768 and x 50258, measured.
const LINE_STORE: (f64, f64) = (12.0, 3.5);

/// Clocks that a consumer waits for its threads around a chunk of lines.
const LINE_CHUNK: f64 = 300.0;

/// Time of storing results in spans of 32 bytes, over that with wider ones.
const NARROW_SPANS: f64 = 2.0;
/// How many times faster results leave that have room for a whole tile.
const WHOLE_TILE_RATE: f64 = 3.0;

pub(super) fn ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b.max(1)
}

/// Microseconds of `m x n x k` under a schedule, operands cold.
pub fn estimate_us(
    gpu: &Gpu,
    schedule: &GpuSchedule,
    sizes: (i64, i64, i64),
    operand_bytes: i64,
    result_bytes: i64,
) -> f64 {
    let (m, n, k) = sizes;
    let shape = Shape {
        m,
        n,
        k,
        batch: 1,
        splits: 1,
        taps: 1,
        products: 1,
        operands: [1, 1],
        operand_bytes,
        result_bytes,
        lines_aligned: (true, true),
        along_depth: (true, true),
        column_major: false,
        residual_bytes: 0,
        epilogue_instructions: 0,
    };
    estimate(gpu, schedule, &shape)
}

pub(crate) fn estimate(gpu: &Gpu, s: &GpuSchedule, shape: &Shape) -> f64 {
    let p = &gpu.model;
    let tile = |name: &str| s.tiles.get(name).copied().unwrap_or(1);
    let (bm, bn, bk) = (tile("BM"), tile("BN"), tile("BK"));
    let size = shape.operand_bytes as f64;
    let rate = gpu.tensor_flops_per_clock * 2.0 / size;
    let cluster = i64::from(s.cluster);
    let (high, wide) = s.cluster_tiles();
    let (high, wide) = (i64::from(high), i64::from(wide));
    let (tiles_m, tiles_n) = (ceil(ceil(shape.m, bm), high), ceil(ceil(shape.n, bn), wide));
    let items = tiles_m * tiles_n * shape.batch * shape.splits;
    let at_once = match cluster {
        1 => p.clusters_at_once[0],
        2 => p.clusters_at_once[1],
        4 => p.clusters_at_once[2],
        // Two of four, where their processors are neighbours.
        _ => p.clusters_at_once[2] / 2,
    };
    let slots = i64::from(at_once).max(1);
    let per_block = ceil(items, slots) as f64;
    let active = (items.min(slots) * cluster) as f64;
    let steps = ceil(ceil(shape.k, bk), shape.splits) as f64;
    let products = shape.products as f64;
    let [lefts, rights] = shape.operands;
    let (a_elements, b_elements) = ((lefts * bm * bk) as f64, (rights * bn * bk) as f64);
    let tensors = if shape.products > 1 { 2.0 } else { 1.0 };
    let tensor = (lefts * rights * bm * bn * bk) as f64 * 2.0 / rate * products;
    // Every warpgroup's instruction reads its 64 rows of A and all of B; the copy engine writes both.
    let read = (a_elements + (bm as f64 / 64.0) * b_elements) * size * products;
    let written = (a_elements + b_elements) * size * tensors;
    let shared = (read + p.shared_write_share * written) / 128.0;
    // Columns that are contiguous in memory lie in panels; narrow ones are slow to read.
    let panels = !shape.along_depth.1 && (bn as f64 * size) % 128.0 != 0.0;
    let tensor = if panels { tensor * NARROW_PANELS } else { tensor };
    let compute = (tensor * p.tensor_factor).max(shared * p.shared_factor)
        + p.step_clocks
        + if s.consumers == 1 { p.lone_consumer_clocks } else { 0.0 };
    let (mut bytes_a, mut bytes_b) = (a_elements * size * tensors, b_elements * size * tensors);
    let saved = |blocks: i64| match blocks {
        1 => 1.0,
        _ => blocks as f64 * p.multicast_saving + (1.0 - p.multicast_saving),
    };
    bytes_a /= saved(wide);
    bytes_b /= saved(high);
    // Rows of a box that begin inside a cache line touch one more.
    if !shape.lines_aligned.0 {
        bytes_a *= p.unaligned_factor;
    }
    if !shape.lines_aligned.1 {
        bytes_b *= p.unaligned_factor;
    }
    let fill = (bytes_a + bytes_b) / p.l2_bytes_per_clock * (active / f64::from(gpu.sms)).max(1.0);
    let fill = if panels && !shape.along_depth.0 {
        let lines = |extent: i64, rows: bool, span: i64| match rows {
            true => extent * ceil(bk * shape.operand_bytes, 128),
            false => bk * ceil(extent * shape.operand_bytes, span),
        };
        let left = lefts * ceil(lines(bm, shape.along_depth.0, 128), wide);
        let right = rights * ceil(lines(bn, false, 64), high);
        fill.max((left + right) as f64 * NARROW_LINE_CLOCKS)
    } else {
        fill
    };
    // While one stage is read, the others are on their way. Short loops wait for their first loads; in long ones the ring is
    // full, and most of what is read lies in the cache.
    let elements = (lefts * shape.m + rights * shape.n) * shape.k * shape.batch;
    let long = if elements as f64 * size < DRIFTING_BYTES { per_block * steps } else { 1.0 };
    let cold = LONG_LOOPS + (1.0 - LONG_LOOPS) * (COLD_STEPS / long).min(1.0);
    let latency = p.load_latency_clocks * cold / f64::from((s.stages - 1).max(1));
    // Shared by a cluster or not, every byte of a stage arrives at the multiprocessor.
    let arriving = (a_elements + b_elements) * size * tensors / ARRIVING_BYTES_PER_CLOCK;
    let arriving = if per_block * steps > COLD_STEPS { arriving } else { 0.0 };
    let step =
        compute.max(fill).max(arriving).max(latency) + p.load_share * (fill * cold + latency);
    let loop_clocks = steps * step;
    let result = if shape.splits > 1 { 4.0 } else { shape.result_bytes as f64 };
    let stored = match s.store {
        // With room for the whole tile nothing waits for the stores before.
        StoreKind::Tma => {
            let rate = if s.store_slots > 2 { WHOLE_TILE_RATE } else { 1.0 };
            let spans = bn as f64 * result % 64.0 != 0.0 && !shape.column_major;
            let narrow = if spans { NARROW_SPANS } else { 1.0 };
            (bm * bn) as f64 * result * narrow / (rate * p.epilogue_bytes_per_clock)
        }
        // A warp writes pieces of lines that start anywhere: each touches a sector of 32 bytes more than it fills.
        StoreKind::Staged => {
            let width = 32.0 * f64::from(s.vector);
            let columns = staged_columns(bn, result as i64) as f64;
            let sectors = width * result / 32.0 + (width / columns).max(1.0);
            let stores = (bm * bn) as f64 / width * (LINE_STORE.0 + LINE_STORE.1 * sectors);
            stores + bn as f64 / columns * LINE_CHUNK
        }
        // A warp's store touches a sector per row (of 8) or per column (of 4) of its fragment.
        _ => {
            let elements = if shape.column_major { 8.0 } else { 4.0 * f64::from(s.vector) };
            (bm * bn) as f64 / elements * p.direct_sector_clocks
        }
    };
    // With parts of the depth, the step that adds them up has the epilogue.
    let instructions = if shape.splits > 1 { 0 } else { shape.epilogue_instructions };
    let computed = (bm * bn * instructions) as f64 / EPILOGUE_LANES;
    // The copy engine brings a residual while the tile is multiplied; else registers load it as they would store it.
    let whole = shape.splits == 1 && shape.residual_bytes > 0;
    let loaded = match s.store {
        StoreKind::Tma if !shape.column_major && s.mode == Mode::Cooperative => 0.0,
        _ if whole => (bm * bn) as f64 / 8.0 * p.direct_sector_clocks,
        _ => 0.0,
    };
    let epilogue = p.epilogue_clocks + stored + loaded + computed;
    let clocks = match s.mode {
        Mode::Cooperative => per_block * (loop_clocks + epilogue),
        Mode::PingPong => per_block * loop_clocks.max((loop_clocks + epilogue) / 2.0) + epilogue,
    };
    let launch = p.launch_us * if s.dependent { p.dependent_share } else { 1.0 };
    let busy = clocks / p.clock_ghz / 1e3 + launch + if cluster > 1 { p.cluster_us } else { 0.0 };
    let left = (lefts * shape.m) as f64 / shape.taps.max(1) as f64;
    let operands = (left + (rights * shape.n) as f64) * shape.k as f64 * size * tensors;
    let residual = if whole { shape.residual_bytes as f64 } else { 0.0 };
    let results = (shape.m * shape.n) as f64 * (result * shape.splits as f64 + residual);
    let bytes = (operands + results) * shape.batch as f64;
    // Device memory streams at full rate only while enough of it is asked for.
    let useful = |tile: i64, extent: i64| tile.min(extent) as f64;
    let in_flight = active
        * f64::from(s.stages).min(steps)
        * (lefts as f64 * useful(bm, shape.m) + rights as f64 * useful(bn, shape.n))
        * bk as f64
        * size;
    let slow = (p.stream_bytes_in_flight / in_flight.max(1.0)).max(1.0);
    let waiting = if cluster > 1 { p.cluster_memory_factor } else { 1.0 };
    // Operands are read again by every tile that needs them: from the second-level cache, but not for nothing.
    let useful = |tile: i64, extent: i64| tile.min(extent) as f64 / tile as f64;
    let loaded = (bytes_a * useful(bm, shape.m) + bytes_b * useful(bn, shape.n))
        * steps
        * (items * cluster) as f64;
    let again = (loaded - operands * shape.batch as f64).max(0.0);
    let rate = p.stream_bytes_per_s.min(active * STREAM_OF_ONE);
    let stream = (bytes * waiting + p.reread_share * again) / rate * 1e6;
    let memory = (stream + p.launch_us + p.stream_start_us) * slow;
    // What the blocks that run at once read together: as many columns of one raster as there are blocks, and further
    // rasters when there are fewer columns.
    let together = items.min(slots);
    let rows = tiles_m.min(i64::from(s.raster)).max(1);
    let cols = ceil(together, rows).min(tiles_n).max(1);
    let rows = ceil(together, cols).min(tiles_m).max(1);
    let (along_m, along_n) = (high as f64, wide as f64);
    let read =
        rows as f64 * along_m * (lefts * bm) as f64 + cols as f64 * along_n * (rights * bn) as f64;
    let walked = read * shape.k as f64 * size * per_block / p.stream_bytes_per_s * 1e6;
    // The shorter of the two counts a little: they overlap, but not wholly. The walk only contends with the rest.
    let tie = 1e-6 * (f64::from(s.raster) - 8.0).abs();
    busy.max(memory) + p.overlap_share * busy.min(memory) + p.walk_share * walked + tie
}

/// Clocks of a multiprocessor that one copy of a warp takes from its multiply-adds, and how much more with each copy of
/// a single element that the warp has in a step.
const COPY_CLOCKS: f64 = 1.6;
const NARROW_COPY_CLOCKS: f64 = 0.04;
/// Clocks for each 512 bytes that the copy engine brings, and that registers turn.
const ENGINE_CLOCKS: f64 = 4.0;
const TURNED_CLOCKS: f64 = 8.0;
/// Time of plain multiply-adds with two stages over that with more.
const TWO_STAGES: f64 = 1.01;
/// Clocks between the steps of a block, which other blocks of the multiprocessor hide in part.
const STEP_CLOCKS: f64 = 550.0;
/// Clocks of a tile before its first and behind its last step.
const TILE_CLOCKS: f64 = 5000.0;
/// Clocks more for each element of a result whose neighbours lie along the columns.
const COLUMN_CLOCKS: f64 = 0.6;

/// Microseconds of plain multiply-adds: the arithmetic units at full rate but for what each step of the depth
/// exposes, in whole waves of blocks.
pub(crate) fn estimate_multiply_add(gpu: &Gpu, s: &GpuSchedule, shape: &Shape) -> f64 {
    let p = &gpu.model;
    let tile = |name: &str| s.tiles.get(name).copied().unwrap_or(1);
    let (bm, bn, bk) = (tile("BM"), tile("BN"), tile("BK"));
    let threads = f64::from(s.warps.0 * s.warps.1 * 32);
    let [lefts, rights] = shape.operands;
    let sums = (lefts * rights * bm * bn) as f64 / threads;
    // Blocks that registers and shared memory let live on one multiprocessor.
    let stage = ((lefts * bm + rights * bn) * bk * shape.operand_bytes) as f64;
    let room = (f64::from(227 << 10) / (stage * f64::from(s.stages))).floor();
    let together = (65536.0 / threads / (sums + 90.0).min(255.0)).floor().min(room).clamp(1.0, 8.0);
    let tiles = ceil(shape.m, bm) * ceil(shape.n, bn) * shape.batch * shape.splits;
    let per_sm = ceil(tiles, i64::from(gpu.sms)) as f64;
    let steps = ceil(ceil(shape.k, bk), shape.splits) as f64;
    let flops = (lefts * rights * bm * bn * bk) as f64 * 2.0;
    // Small register tiles read shared memory more often than they multiply.
    let side = sums.sqrt();
    let issue = flops / gpu.f32_flops_per_clock * (0.97 + 1.2 / side);
    let warps = threads / 32.0;
    let wide = s.vector == 4;
    let copy = |extent: i64, turned: bool, left: bool| {
        let elements = (extent * bk) as f64;
        if wide && !turned {
            ENGINE_CLOCKS * elements / 128.0
        } else if wide && left && bk % 16 == 0 && elements <= 16.0 * threads {
            TURNED_CLOCKS * elements / 128.0
        } else {
            // Copies of single elements wait for each other.
            let each = if turned { 1 } else { i64::from(s.vector.max(1)) };
            let copies = elements / each as f64 / 32.0;
            let narrow = if each > 2 { 0.0 } else { copies };
            let clocks = COPY_CLOCKS * copies + NARROW_COPY_CLOCKS * narrow * narrow / warps;
            // All warps of a block copy at once: only another block multiplies meanwhile.
            if each <= 2 && together < 2.0 { clocks * 2.0 } else { clocks }
        }
    };
    let copying =
        copy(lefts * bm, shape.along_depth.0, true) + copy(rights * bn, shape.along_depth.1, false);
    let stages = if s.stages == 2 { TWO_STAGES } else { 1.0 };
    // What a block exposes, other blocks of the multiprocessor hide in part.
    let beside = together.min(per_sm).max(1.0);
    let step = issue * stages + copying + STEP_CLOCKS / beside;
    let stored = if shape.column_major { COLUMN_CLOCKS * (bm * bn) as f64 } else { 0.0 };
    let clocks = per_sm * (steps * step + TILE_CLOCKS / beside + stored);
    let bytes = ((lefts * shape.m + rights * shape.n) * shape.k * shape.operand_bytes
        + shape.m * shape.n * shape.result_bytes) as f64
        * shape.batch as f64;
    let memory = bytes / p.stream_bytes_per_s * 1e6;
    (clocks / 1.9e3).max(memory) + p.launch_us + p.stream_start_us
}
