//! Warp-specialised Hopper kernels: a producer warp keeps a ring of operand tiles filled with the copy
//! engine, consumer warpgroups multiply with `wgmma` and store.
//!
//! The ring has two barriers a stage. `full` completes when the announced bytes came; `empty` when
//! every consumer that reads the stage, in every block of the cluster that wrote it, has let go. A
//! consumer keeps one group of `wgmma` in flight, so it lets go of the stage before the one it issued.

use crate::computed_left::computed_left;
use crate::epilogue;
use crate::raster::raster;
use crate::schedule::{GpuSchedule, Mode};
use crate::streams::{Pipeline, Step, Stream, Value, definitions, extents, pipeline};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_device::{
    Barrier, BarrierRef, CLUSTER, CLUSTERS, CTA, CachePolicy, Cond, Extent, Frag, FragId, FragRef,
    MapId, Phase, Program, Reach, Ring, RingId, Role, Slot, Smem, SmemId, SmemTile, Spread, Stmt,
    Streams, TensorMap, WgmmaA,
};
use tilewright_expr::Op;
use tilewright_layout::Dim;
use tilewright_tile::{Compare, For, Kernel, TileId, TileOp};

/// Name of a consumer's index.
pub(crate) const CONSUMER: &str = "consumer";
/// Named barriers: one per consumer from here on.
pub(crate) const STORE_BARRIER: i64 = 1;
pub(crate) const TURN_BARRIER: i64 = 8;

/// A program under construction.
pub(crate) struct Builder<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) schedule: &'a GpuSchedule,
    pub(crate) maps: IdVec<MapId, TensorMap>,
    pub(crate) smem: IdVec<SmemId, Smem>,
    pub(crate) rings: IdVec<RingId, Ring>,
    pub(crate) frags: IdVec<FragId, Frag>,
    /// Rows of the tile that one instance of the multiplying role holds.
    pub(crate) rows: u32,
    /// How accumulators are spread over an instance.
    pub(crate) spread: Spread,
    /// First column of a tile that shares its fragment with another.
    pub(crate) first_column: BTreeMap<TileId, u32>,
    /// A tile of the epilogue that the copy engine brings.
    pub(crate) streamed: Option<epilogue::Streamed>,
    /// Vectors along the columns that come with the tiles of a stream, and where they lie.
    pub(crate) riders: Vec<(TileId, SmemTile)>,
}

impl Builder<'_> {
    /// First row of this consumer within the tile.
    pub(crate) fn row0(&self) -> Dim {
        match self.schedule.mode {
            _ if self.spread != Spread::Wgmma => Dim::new(0),
            Mode::Cooperative => Dim::sym(CONSUMER) * &Dim::new(i64::from(self.rows)),
            Mode::PingPong => Dim::new(0),
        }
    }

    /// First row of this consumer within the staging tiles for results.
    pub(crate) fn staging_row0(&self) -> Dim {
        Dim::sym(CONSUMER) * &Dim::new(i64::from(self.rows))
    }

    /// A new fragment in the accumulators' spread.
    pub(crate) fn frag(&mut self, name: &str, dtype: DType, cols: u32, extent: Extent) -> FragId {
        let taken = self
            .frags
            .iter()
            .filter(|(_, f)| f.name.trim_end_matches(char::is_numeric) == name)
            .count();
        let name = if taken == 0 { name.to_owned() } else { format!("{name}{taken}") };
        self.frags.push(Frag { name, dtype, rows: self.rows, cols, spread: self.spread, extent })
    }
}

/// The loop over products, and what stands before and after it.
pub(crate) fn main_loop(
    kernel: &Kernel,
) -> Result<(&[tilewright_tile::Stmt], &For, &[tilewright_tile::Stmt])> {
    let stmts = &kernel.body.stmts;
    let loops: Vec<usize> = stmts
        .iter()
        .enumerate()
        .filter(|(_, s)| matches!(s, tilewright_tile::Stmt::For(_)))
        .map(|(i, _)| i)
        .collect();
    let [at] = loops[..] else {
        return Err(Error::unsupported(format!("a product kernel with {} loops", loops.len())));
    };
    let tilewright_tile::Stmt::For(body) = &stmts[at] else { unreachable!() };
    Ok((&stmts[..at], body, &stmts[at + 1..]))
}

/// Schedules a kernel with one loop over products.
pub(crate) fn lower(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    let (before, body, after) = main_loop(kernel)?;
    let pipeline = pipeline(kernel, before, body, schedule.product)?;
    let rows_of = |step: &Step| match step {
        Step::Product { a, .. } => Some(pipeline.streams[*a].rows),
        Step::Map { .. } => None,
    };
    let tile_rows = pipeline.steps.iter().find_map(rows_of).unwrap_or(0);
    if pipeline.steps.iter().filter_map(rows_of).any(|r| r != tile_rows) {
        return Err(Error::unsupported("products of different heights in one loop"));
    }
    let consumers = schedule.consumers;
    let rows = match schedule.mode {
        Mode::Cooperative => tile_rows / consumers.max(1),
        Mode::PingPong => tile_rows,
    };
    if rows == 0
        || !rows.is_multiple_of(64)
        || (schedule.mode == Mode::Cooperative && rows * consumers != tile_rows)
    {
        return Err(Error::unsupported(format!(
            "{tile_rows} rows over {consumers} consumers: each needs a multiple of 64"
        )));
    }
    if schedule.serpentine {
        return Err(Error::unsupported("serpentine order of plain products"));
    }
    if schedule.mode == Mode::PingPong && (consumers != 2 || !schedule.persistent) {
        return Err(Error::unsupported("ping-pong needs two consumers and a persistent grid"));
    }
    let mut b = Builder {
        kernel,
        schedule,
        maps: IdVec::new(),
        smem: IdVec::new(),
        rings: IdVec::new(),
        frags: IdVec::new(),
        rows,
        spread: Spread::Wgmma,
        first_column: BTreeMap::new(),
        streamed: None,
        riders: Vec::new(),
    };
    // Shared memory and tensor maps of the streams.
    let sharing = Sharing::of(kernel, schedule);
    let joined = joined_products(&pipeline, body);
    let mut stages: Vec<Stage> = Vec::new();
    for (i, stream) in pipeline.streams.iter().enumerate() {
        let shared = sharing.reach(&stream.view.index);
        let beside = joined.as_ref().filter(|j| j.right.1 == i).map(|j| stages[j.right.0].smem);
        stages.push(match beside {
            None => stage(&mut b, stream, shared, schedule.stages)?,
            Some(smem) => stage_beside(&mut b, stream, shared, smem)?,
        });
    }
    if let [left, right] = &mut stages[..] {
        [left.cache, right.cache] = schedule.cache;
    }
    let released = sharing.released(&stages);
    let ring = b.rings.push(Ring { name: "ring".into(), stages: schedule.stages });
    let mut barriers = IdVec::new();
    let full = barriers.push(Barrier { name: "full".into(), slots: schedule.stages, arrivals: 1 });
    let readers = if schedule.mode == Mode::PingPong { 1 } else { consumers };
    let empty = barriers.push(Barrier {
        name: "empty".into(),
        slots: schedule.stages,
        arrivals: readers * released.blocks(schedule.cluster),
    });
    let buffers: BTreeSet<SmemId> = stages.iter().map(|s| s.smem).collect();
    let bytes: u32 = buffers.iter().map(|s| b.smem[*s].slot_bytes()).sum();

    // The producer.
    let item = Dim::sym("item");
    let (items, decode) = raster(kernel, schedule, &item);
    let at = |barrier| BarrierRef { barrier, slot: Slot::Ring(ring) };
    let mut fill = vec![
        Stmt::Wait { barrier: at(empty), phase: Phase::Before(ring) },
        Stmt::ExpectBytes { barrier: at(full), bytes },
    ];
    for (stream, stage) in pipeline.streams.iter().zip(&stages) {
        fill.extend(loads(&b, stream, stage, ring, at(full)));
    }
    fill.push(Stmt::Advance { ring, by: Dim::new(1) });
    let fill_loop = Stmt::For {
        var: body.var.clone(),
        lo: body.lo.clone(),
        hi: body.hi.clone(),
        step: Dim::new(1),
        body: fill,
    };
    let mut produce = decode.clone();
    produce.push(fill_loop);
    let producer_body =
        over_items(schedule, &items, Dim::sym(CLUSTER), Dim::sym(CLUSTERS), produce);

    // Consumers.
    let tiles = RegisterTiles::new(&mut b, &pipeline, body, joined.is_some())?;
    let depth = body.hi.clone() - &body.lo;
    let start = initial_values(before, &pipeline, body, &tiles, true)?;
    let left = computed_left(&mut b, &pipeline, &stages, before, body, ring)?;
    let products = match left {
        Some(left) => {
            left.multiply(&pipeline, &stages, &tiles, body, ring, (full, empty), &released)
        }
        None => multiply(
            &b,
            &pipeline,
            &stages,
            &tiles,
            body,
            ring,
            full,
            empty,
            &released,
            joined.is_some(),
        ),
    };
    let results = tiles.results(body);
    let tile_cols = results.iter().find(|(_, f)| b.frags[*f].extent == Extent::Tile);
    if let Some(cols) = tile_cols.map(|(_, f)| b.frags[*f].cols) {
        b.streamed = epilogue::stream_residual(&mut b, after, cols, &mut barriers)?;
    }
    let finish = epilogue::store_results(&mut b, before, after, &results)?;
    let other = Dim::new(1) - &Dim::sym(CONSUMER);
    let turn = |of: Dim| of + &Dim::new(TURN_BARRIER);
    let mut consume = decode;
    consume.extend(b.streamed.as_ref().map(|s| s.start(&b)));
    if schedule.mode == Mode::PingPong {
        consume.push(Stmt::NamedSync { id: turn(Dim::sym(CONSUMER)), threads: 256 });
    }
    consume.extend(start);
    consume.extend(products.issue);
    if schedule.mode == Mode::PingPong {
        consume.push(Stmt::NamedArrive { id: turn(other), threads: 256 });
    }
    consume.extend(products.drain);
    if schedule.mode == Mode::PingPong {
        // The other consumer's tile is not ours to read.
        consume.push(Stmt::Advance { ring, by: depth.clone() });
    }
    consume.extend(finish.stmts);
    let mut consumer_body = Vec::new();
    let (start, step) = match schedule.mode {
        Mode::Cooperative => (Dim::sym(CLUSTER), Dim::sym(CLUSTERS)),
        Mode::PingPong => {
            let second = Cond { lhs: Dim::sym(CONSUMER), compare: Compare::Eq, rhs: Dim::new(1) };
            consumer_body.push(Stmt::If {
                cond: second,
                then: vec![
                    Stmt::Advance { ring, by: depth },
                    Stmt::NamedArrive { id: Dim::new(TURN_BARRIER), threads: 256 },
                ],
                otherwise: Vec::new(),
            });
            (
                Dim::sym(CLUSTER) + &(Dim::sym(CONSUMER) * &Dim::sym(CLUSTERS)),
                Dim::sym(CLUSTERS) * &Dim::new(2),
            )
        }
    };
    consumer_body.extend(over_items(schedule, &items, start, step, consume));
    consumer_body.extend(finish.last);

    let threads = 128 * (1 + consumers);
    let registers = match (schedule.blocks_per_sm, consumers) {
        (1, 2) => Some((40, 232)),
        (1, 3) => Some((32, 160)),
        _ => None,
    };
    let mut setup = vec![Stmt::BarrierInit, Stmt::FenceBarrierInit, Stmt::SyncCluster];
    if schedule.dependent {
        setup.extend([Stmt::GridRelease, Stmt::GridWait]);
    }
    // Nobody leaves while another block may still arrive at its barriers.
    let teardown = if schedule.cluster > 1 { vec![Stmt::SyncCluster] } else { Vec::new() };
    Ok(Program {
        name: kernel.name.clone(),
        arch: schedule.arch,
        params: kernel.params.clone(),
        symbols: kernel.symbols.clone(),
        maps: b.maps,
        cluster: schedule.cluster,
        threads,
        items,
        persistent: schedule.persistent,
        blocks_per_sm: schedule.blocks_per_sm,
        streams: Streams::Cached,
        ragged: false,
        smem: b.smem,
        barriers,
        rings: b.rings,
        frags: b.frags,
        shelves: IdVec::new(),
        setup,
        roles: vec![
            Role {
                name: "producer".into(),
                first_warp: 0,
                warps: 4,
                instances: 1,
                instance: "producer".into(),
                single_thread: true,
                registers: registers.map(|r| r.0),
                body: producer_body,
            },
            Role {
                name: "consumer".into(),
                first_warp: 4,
                warps: 4,
                instances: consumers,
                instance: CONSUMER.into(),
                single_thread: false,
                registers: registers.map(|r| r.1),
                body: consumer_body,
            },
        ],
        teardown,
    })
}

/// Which tiles the blocks of a cluster have in common.
struct Sharing {
    /// The grid indices that differ between the rows and between the columns of a cluster's tiles.
    rows: Option<Arc<str>>,
    cols: Option<Arc<str>>,
    /// Columns of a cluster's tiles.
    width: u32,
}

impl Sharing {
    fn of(kernel: &Kernel, schedule: &GpuSchedule) -> Sharing {
        let rank = kernel.grid.len();
        let (high, wide) = schedule.cluster_tiles();
        if rank < 2 {
            let rows = kernel.grid.first().filter(|_| schedule.cluster > 1).map(|a| a.name.clone());
            return Sharing { rows, cols: None, width: 1 };
        }
        let name = |axis: usize, tiles: u32| (tiles > 1).then(|| kernel.grid[axis].name.clone());
        Sharing { rows: name(rank - 2, high), cols: name(rank - 1, wide), width: wide }
    }

    /// The blocks that read the tile at this index with this one.
    fn reach(&self, index: &[Dim]) -> Reach {
        let common = |symbol: &Option<Arc<str>>| {
            symbol.as_ref().map(|s| !index.iter().any(|d| mentions(d, s)))
        };
        match (common(&self.rows), common(&self.cols)) {
            (None | Some(true), Some(true)) | (Some(true), None) => Reach::All,
            (Some(true), Some(false)) => Reach::Column(self.width),
            (Some(false), Some(true)) => Reach::Row(self.width),
            _ => Reach::Own,
        }
    }

    /// The blocks that must know when this one has read its tiles: those that fill them.
    fn released(&self, stages: &[Stage]) -> Reach {
        let mut all = Reach::Own;
        for stage in stages {
            all = match (all, stage.shared.clone()) {
                (Reach::Own, other) | (other, Reach::Own) => other,
                (a, b) if a == b => a,
                (Reach::All, _) | (_, Reach::All) => Reach::All,
                _ => Reach::Cross(self.width),
            };
        }
        all
    }
}

fn mentions(dim: &Dim, symbol: &Arc<str>) -> bool {
    let mut found = false;
    dim.for_each_symbol(&mut |s| found |= s == symbol);
    found
}

pub(crate) fn over_items(
    schedule: &GpuSchedule,
    items: &Dim,
    start: Dim,
    step: Dim,
    body: Vec<Stmt>,
) -> Vec<Stmt> {
    let item: Arc<str> = "item".into();
    if schedule.persistent && schedule.serpentine {
        // Round r takes r*step + start, and in odd rounds from the other end.
        let name: Arc<str> = "items".into();
        let round = Dim::sym("round");
        let back = (step.clone() - &Dim::new(1) - &start - &start) * &round.modulo(&Dim::new(2));
        let value = round * &step + &start + &back;
        let rounds = Dim::sym(name.clone()).ceil_div(&step);
        let cond =
            Cond { lhs: Dim::sym(item.clone()), compare: Compare::Lt, rhs: Dim::sym(name.clone()) };
        vec![
            Stmt::Let { name, value: items.clone() },
            Stmt::For {
                var: "round".into(),
                lo: Dim::new(0),
                hi: rounds,
                step: Dim::new(1),
                body: vec![
                    Stmt::Let { name: item, value },
                    Stmt::If { cond, then: body, otherwise: Vec::new() },
                ],
            },
        ]
    } else if schedule.persistent {
        let name: Arc<str> = "items".into();
        vec![
            Stmt::Let { name: name.clone(), value: items.clone() },
            Stmt::For { var: item, lo: start, hi: Dim::sym(name), step, body },
        ]
    } else {
        let mut out = vec![Stmt::Let { name: item, value: start }];
        out.extend(body);
        out
    }
}

/// Where a stream's tiles go.
pub(crate) struct Stage {
    pub(crate) smem: SmemId,
    map: MapId,
    /// Blocks of the cluster that read the same tile: each loads a share of its lines for all of them.
    shared: Reach,
    /// Lines and contiguous elements of one box.
    box_lines: u32,
    box_along: u32,
    /// Of the stream's tile in the buffer, which two streams may share.
    first_column: u32,
    /// Of its copies.
    cache: CachePolicy,
}

/// Shared memory and the tensor map of a stream, `slots` tiles.
pub(crate) fn stage(
    b: &mut Builder<'_>,
    stream: &Stream,
    shared: Reach,
    slots: u32,
) -> Result<Stage> {
    let param = &b.kernel.params[stream.view.param];
    let smem = Smem {
        name: format!("s{}", named(b, &param.name)),
        dtype: param.dtype,
        rows: stream.rows,
        cols: stream.cols,
        contiguous: stream.contiguous,
        swizzle: stream.swizzle,
        slots,
    };
    let (map, box_lines, box_along) = tensor_map(b, stream, &shared)?;
    let smem = b.smem.push(smem);
    let cache = CachePolicy::Normal;
    Ok(Stage { smem, map, shared, box_lines, box_along, first_column: 0, cache })
}

/// The same for a stream whose tiles lie to the right of those that are in a buffer already, in tiles of the same form.
fn stage_beside(
    b: &mut Builder<'_>,
    stream: &Stream,
    shared: Reach,
    smem: SmemId,
) -> Result<Stage> {
    let (map, box_lines, box_along) = tensor_map(b, stream, &shared)?;
    let first_column = b.smem[smem].cols;
    b.smem[smem].cols += stream.cols;
    let cache = CachePolicy::Normal;
    Ok(Stage { smem, map, shared, box_lines, box_along, first_column, cache })
}

/// A tensor's name, numbered when there is one of that name in shared memory already.
fn named(b: &Builder<'_>, name: &str) -> String {
    let same = b.smem.iter().filter(|(_, s)| s.name.trim_start_matches('s') == name).count();
    if same == 0 { name.to_owned() } else { format!("{name}_{same}") }
}

/// The tensor map of a stream, with the lines and the contiguous elements of its box.
fn tensor_map(b: &mut Builder<'_>, stream: &Stream, shared: &Reach) -> Result<(MapId, u32, u32)> {
    let param = &b.kernel.params[stream.view.param];
    let share = shared.blocks(b.schedule.cluster);
    let span = stream.swizzle.span_bytes() * 8 / param.dtype.bits();
    let box_lines = (stream.lines() / share).min(256);
    if !stream.lines().is_multiple_of(box_lines * share) || !box_lines.is_multiple_of(8) {
        return Err(Error::unsupported(format!(
            "{} lines of {} shared by {share} blocks",
            stream.lines(),
            param.name
        )));
    }
    let mut box_shape = vec![1; param.layout.rank()];
    let (line_axis, along_axis) = if stream.contiguous == 1 {
        (stream.view.axes[0], stream.view.axes[1])
    } else {
        (stream.view.axes[1], stream.view.axes[0])
    };
    box_shape[line_axis] = box_lines;
    box_shape[along_axis] = span;
    let map = b.maps.push(TensorMap {
        name: named(b, &param.name),
        param: stream.view.param,
        box_shape,
        contiguous: along_axis,
        swizzle: stream.swizzle,
        tf32: stream.tf32,
        windows: stream.view.windows.as_ref().map(|w| w.windows.clone()),
    });
    Ok((map, box_lines, span))
}

/// The copies that fill one stage: panel by panel, and a share of the lines when the tile is shared.
pub(crate) fn loads(
    b: &Builder<'_>,
    stream: &Stream,
    stage: &Stage,
    ring: RingId,
    barrier: BarrierRef,
) -> Vec<Stmt> {
    let share = stage.shared.blocks(b.schedule.cluster);
    let lines_each = stream.lines() / share;
    // Which of them this block is.
    let own = match stage.shared {
        Reach::Row(width) => Dim::sym(CTA).modulo(&Dim::new(i64::from(width))),
        Reach::Column(width) => Dim::sym(CTA).floor_div(&Dim::new(i64::from(width))),
        _ => Dim::sym(CTA),
    };
    let mut out = Vec::new();
    for panel in 0..stream.along() / stage.box_along {
        for part in 0..lines_each / stage.box_lines {
            let along = Dim::new(i64::from(panel * stage.box_along));
            let mut line = Dim::new(i64::from(part * stage.box_lines));
            if share > 1 {
                line = line + &(own.clone() * &Dim::new(i64::from(lines_each)));
            }
            let (row, col) = if stream.contiguous == 1 { (line, along) } else { (along, line) };
            let (rows, cols) = if stream.contiguous == 1 {
                (stage.box_lines, stage.box_along)
            } else {
                (stage.box_along, stage.box_lines)
            };
            let mut at = stream.view.index.clone();
            at[stream.view.axes[0]] = at[stream.view.axes[0]].clone() + &row;
            at[stream.view.axes[1]] = at[stream.view.axes[1]].clone() + &col;
            let col = col + &Dim::new(i64::from(stage.first_column));
            at.extend(stream.view.windows.iter().flat_map(|w| w.tap.clone()));
            out.push(Stmt::TmaLoad {
                map: stage.map,
                at,
                to: SmemTile { smem: stage.smem, slot: Slot::Ring(ring), row, col, rows, cols },
                barrier: barrier.clone(),
                reach: stage.shared.clone(),
                cache: stage.cache,
            });
        }
    }
    out
}

pub(crate) struct Products {
    /// Issues all products of a tile; the last group may still be in flight.
    pub(crate) issue: Vec<Stmt>,
    /// Waits for the last group and lets go of its stage.
    pub(crate) drain: Vec<Stmt>,
}

/// Two products of one left operand that are issued as one, on right operands side by side: the tensor cores read the
/// left operand once.
struct Joined {
    /// Streams of the right operands.
    right: (usize, usize),
}

/// The most columns of an instruction.
const WGMMA_COLUMNS: u32 = 256;

/// Whether the loop is two products of one left operand, with right operands that lie alike, and nothing else.
fn joined_products(pipeline: &Pipeline, body: &For) -> Option<Joined> {
    let [Step::Product { acc: Value::Carried(0), a, b, starts: true }, second] =
        &pipeline.steps[..]
    else {
        return None;
    };
    let Step::Product { acc: Value::Carried(1), a: again, b: other, starts: true } = second else {
        return None;
    };
    let (first, next) = (&pipeline.streams[*b], &pipeline.streams[*other]);
    let form = |s: &Stream| (s.rows, s.cols, s.contiguous, s.swizzle, s.tf32);
    let fits = a == again
        && b < other
        && body.carry.len() == 2
        && form(first) == form(next)
        && first.cols.is_multiple_of(8)
        && 2 * first.cols <= WGMMA_COLUMNS;
    fits.then_some(Joined { right: (*b, *other) })
}

/// The fragments of a loop's register tiles.
pub(crate) struct RegisterTiles {
    carried: Vec<FragRef>,
    scratch: Vec<FragRef>,
}

impl RegisterTiles {
    /// A fragment for every register tile of the loop; one for both carried tiles when they are `joined`.
    pub(crate) fn new(
        b: &mut Builder<'_>,
        pipeline: &Pipeline,
        body: &For,
        joined: bool,
    ) -> Result<RegisterTiles> {
        let whole = |frag: FragId| FragRef { frag, col: Dim::new(0), cols: None };
        let mut carried: Vec<FragRef> = Vec::new();
        for (i, (tile, _)) in body.carry.iter().enumerate() {
            let Some(first) = carried.first().filter(|_| joined).map(|f| f.frag) else {
                carried.push(whole(tile_frag(b, "acc", *tile)?));
                continue;
            };
            let (col, cols) = (b.frags[first].cols, extents(b.kernel, *tile)?[1]);
            b.frags[first].cols += cols;
            b.first_column.insert(body.results[i], col);
            let col = Dim::new(i64::from(col));
            carried.push(FragRef { frag: first, col, cols: Some(cols) });
        }
        let scratch = pipeline
            .scratch
            .iter()
            .map(|tile| tile_frag(b, "turn_sum", *tile).map(whole))
            .collect::<Result<_>>()?;
        Ok(RegisterTiles { carried, scratch })
    }

    /// What the loop leaves behind.
    pub(crate) fn results(&self, body: &For) -> Vec<(TileId, FragId)> {
        body.results.iter().copied().zip(self.carried.iter().map(|f| f.frag)).collect()
    }

    pub(crate) fn of(&self, value: Value) -> FragRef {
        match value {
            Value::Carried(i) => self.carried[i].clone(),
            Value::Scratch(i) => self.scratch[i].clone(),
        }
    }
}

fn tile_frag(b: &mut Builder<'_>, name: &str, tile: TileId) -> Result<FragId> {
    let dtype = b.kernel.ty(tile).dtype;
    let cols = extents(b.kernel, tile)?[1];
    Ok(b.frag(name, dtype, cols, Extent::Tile))
}

/// Fills carried tiles, unless the first product `starts_itself` from zero.
pub(crate) fn initial_values(
    before: &[tilewright_tile::Stmt],
    pipeline: &Pipeline,
    body: &For,
    tiles: &RegisterTiles,
    starts_itself: bool,
) -> Result<Vec<Stmt>> {
    let defs = definitions(before);
    let mut out = Vec::new();
    for (i, (_, init)) in body.carry.iter().enumerate() {
        let carried = Value::Carried(i);
        let first = pipeline.steps.iter().find(|step| match step {
            Step::Product { acc, .. } => *acc == carried,
            Step::Map { args, .. } => args.contains(&carried),
        });
        if starts_itself && matches!(first, Some(Step::Product { starts: true, .. })) {
            continue;
        }
        let Some(TileOp::Full(value)) = defs.get(init) else {
            return Err(Error::unsupported(
                "a loop that carries a tile that is not a constant at first",
            ));
        };
        out.push(Stmt::Fill { dst: tiles.of(carried), value: *value });
    }
    Ok(out)
}

/// Depth of TF32 sums that the tensor cores form at most, where a loop adds the sums of its turns itself: with every
/// instruction (8 deep) they drop what lies below the last digit of the sum so far, always towards zero.
const TF32_SUM_DEPTH: u32 = 16;

/// Slices of a turn's depth whose products are formed and added apart. A loop that takes the product of a turn from
/// zero and adds it to what it carries asks for short sums; it may be shortened further.
fn slices(pipeline: &Pipeline) -> u32 {
    let [products @ .., Step::Map { dst: Value::Carried(to), func, args }] = &pipeline.steps[..]
    else {
        return 1;
    };
    let adds = func.as_single_op() == Some(Op::Add)
        && matches!(args[..], [Value::Carried(i), Value::Scratch(_)] if i == *to);
    let mut depth = None;
    for (i, step) in products.iter().enumerate() {
        let Step::Product { acc, a, starts, .. } = step else { return 1 };
        let stream = &pipeline.streams[*a];
        if *acc != args[1] || *starts != (i == 0) || !stream.tf32 {
            return 1;
        }
        depth = Some(stream.cols);
    }
    match depth {
        Some(depth) if adds && depth.is_multiple_of(TF32_SUM_DEPTH) => depth / TF32_SUM_DEPTH,
        _ => 1,
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of one loop, named")]
fn multiply(
    b: &Builder<'_>,
    pipeline: &Pipeline,
    stages: &[Stage],
    tiles: &RegisterTiles,
    body: &For,
    ring: RingId,
    full: tilewright_device::BarrierId,
    empty: tilewright_device::BarrierId,
    reach: &Reach,
    joined: bool,
) -> Products {
    let release = |slot: Slot| Stmt::Arrive {
        barrier: BarrierRef { barrier: empty, slot },
        reach: reach.clone(),
    };
    let var = Dim::sym(body.var.clone());
    let slices = slices(pipeline);
    let product = |acc: Value, a: usize, bb: usize, slice: u32, zero_if: Option<Cond>| {
        let depth = pipeline.streams[a].cols / slices;
        // The first of two joined products stands for both.
        let operands = if joined { 2 } else { 1 };
        let acc = if joined { FragRef { cols: None, ..tiles.of(acc) } } else { tiles.of(acc) };
        Stmt::Wgmma {
            acc,
            a: WgmmaA::Smem(SmemTile {
                smem: stages[a].smem,
                slot: Slot::Ring(ring),
                row: b.row0(),
                col: Dim::new(i64::from(slice * depth)),
                rows: b.rows,
                cols: depth,
            }),
            b: SmemTile {
                smem: stages[bb].smem,
                slot: Slot::Ring(ring),
                row: Dim::new(i64::from(slice * depth)),
                col: Dim::new(0),
                rows: depth,
                cols: pipeline.streams[bb].cols * operands,
            },
            turned: false,
            zero_if,
        }
    };
    let mut step = vec![
        Stmt::Wait {
            barrier: BarrierRef { barrier: full, slot: Slot::Ring(ring) },
            phase: Phase::Of(ring),
        },
        Stmt::WgmmaFence,
    ];
    let first_turn = Cond { lhs: var.clone(), compare: Compare::Eq, rhs: body.lo.clone() };
    let always = Cond { lhs: Dim::new(0), compare: Compare::Eq, rhs: Dim::new(0) };
    // Products that run together are one group; elementwise steps wait for it.
    let last_product =
        pipeline.steps.iter().rposition(|s| matches!(s, Step::Product { .. })).unwrap_or(0);
    let maps_follow = pipeline.steps.iter().any(|s| matches!(s, Step::Map { .. }));
    let mut open = false;
    let count = pipeline.steps.len();
    let turns =
        (0..slices).flat_map(|slice| pipeline.steps.iter().enumerate().map(move |s| (slice, s)));
    for (slice, (i, s)) in turns {
        match s {
            Step::Product { .. } if joined && i > 0 => {}
            Step::Product { acc, a, b: bb, starts } => {
                if !open && (i > 0 || slice > 0) {
                    step.push(Stmt::WgmmaFence);
                }
                open = true;
                let zero_if = match (starts, acc) {
                    (false, _) => None,
                    (true, Value::Carried(_)) => Some(first_turn.clone()),
                    (true, Value::Scratch(_)) => Some(always.clone()),
                };
                step.push(product(*acc, *a, *bb, slice, zero_if));
                if i == last_product && maps_follow && i + 1 < count {
                    step.extend([Stmt::WgmmaCommit, Stmt::WgmmaWait { pending: 0 }]);
                    if slice + 1 == slices {
                        step.push(release(Slot::Ring(ring)));
                    }
                    open = false;
                }
            }
            Step::Map { dst, func, args } => {
                if open {
                    step.extend([Stmt::WgmmaCommit, Stmt::WgmmaWait { pending: 0 }]);
                    open = false;
                }
                step.push(Stmt::Map {
                    dst: tiles.of(*dst),
                    func: func.clone(),
                    args: args.iter().map(|a| tiles.of(*a)).collect(),
                });
            }
        }
    }
    let mut drain = Vec::new();
    if open {
        // The last group stays in flight through the next wait, so its stage is let go one turn later.
        step.push(Stmt::WgmmaCommit);
        step.push(Stmt::WgmmaWait { pending: 1 });
        step.push(Stmt::If {
            cond: Cond { lhs: body.lo.clone(), compare: Compare::Lt, rhs: var },
            then: vec![release(Slot::Before(ring))],
            otherwise: Vec::new(),
        });
        drain = vec![Stmt::WgmmaWait { pending: 0 }, release(Slot::Before(ring))];
    }
    step.push(Stmt::Advance { ring, by: Dim::new(1) });
    Products {
        issue: vec![Stmt::For {
            var: body.var.clone(),
            lo: body.lo.clone(),
            hi: body.hi.clone(),
            step: Dim::new(1),
            body: step,
        }],
        drain,
    }
}
