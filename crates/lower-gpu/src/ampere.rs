//! Software-pipelined kernels for every architecture: all warps copy operand tiles into a ring with plain
//! asynchronous copies, and multiply what came `stages - 1` steps ago.
//!
//! ```text
//! copy steps 0 .. stages-2
//! for k:  wait until step k came; meet     (everyone has also left step k-1)
//!         copy step k + stages-1 into the slot of step k-1
//!         multiply step k
//! ```
//!
//! One group of copies is closed per step, empty or not, so that the number of open groups tells which
//! step came. The products are `mma.sync` or plain multiply-adds, by the spread of the accumulators.
//!
//! A left operand of plain multiply-adds that lies along the depth is turned on its way: threads load blocks of 4 x 4
//! before the product and store their columns behind it, four elements at a time both ways. Asynchronous copies would
//! take an instruction, and several passes of shared memory, for every element. What needs no turning the copy engine
//! brings, where there is one: an asynchronous copy takes about twelve cycles from the multiply-adds of its warp.

use crate::epilogue::{self, access_elements};
use crate::hopper::{
    Builder, RegisterTiles, Stage, initial_values, loads, main_loop, over_items, stage,
};
use crate::raster::raster;
use crate::schedule::{GpuSchedule, ProductKind, StoreKind};
use crate::streams::{Step, Stream, Value, pipeline};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_device::{
    Arch, Barrier, BarrierRef, CLUSTER, CLUSTERS, Cond, Extent, Frag, FragId, FragRef, Phase,
    Program, Reach, Ring, RingId, Role, Slot, Smem, SmemId, SmemTile, Spread, Stmt, Streams,
    WgmmaA,
};
use tilewright_expr::Value as Constant;
use tilewright_layout::Dim;
use tilewright_tile::{Compare, Kernel, ParamId};

/// Schedules a kernel with one loop over products.
pub(crate) fn lower(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    let (before, body, after) = main_loop(kernel)?;
    let pipeline = pipeline(kernel, before, body, schedule.product)?;
    let (warps_m, warps_n) = schedule.warps;
    let warps = warps_m * warps_n;
    if !(1..=32).contains(&warps) || !(2..=16).contains(&schedule.stages) {
        return Err(Error::unsupported(format!("{warps} warps, {} stages", schedule.stages)));
    }
    if schedule.cluster != 1 || schedule.store == StoreKind::Tma {
        return Err(Error::unsupported("clusters and copy-engine stores of a pipelined kernel"));
    }
    if schedule.dependent && schedule.arch < Arch::Sm90a {
        return Err(Error::unsupported("dependent launches before sm_90"));
    }
    let products = || {
        pipeline.steps.iter().filter_map(|step| match step {
            Step::Product { a, b, .. } => Some((&pipeline.streams[*a], &pipeline.streams[*b])),
            Step::Map { .. } => None,
        })
    };
    let Some((first_a, _)) = products().next() else {
        return Err(Error::unsupported("a loop without products"));
    };
    let rows = first_a.rows;
    let spread = spread(schedule)?;
    for (a, b) in products() {
        let bits = kernel.params[a.view.param].dtype.bits();
        check_shape(a, b, bits, rows, schedule, spread)?;
    }
    let mut b = Builder {
        kernel,
        schedule,
        maps: IdVec::new(),
        smem: IdVec::new(),
        rings: IdVec::new(),
        frags: IdVec::new(),
        rows,
        spread,
        first_column: BTreeMap::new(),
        streamed: None,
        riders: Vec::new(),
    };
    let ways: Vec<Way> =
        pipeline.streams.iter().map(|stream| way(&mut b, stream)).collect::<Result<_>>()?;
    let through_registers = ways.iter().any(|w| matches!(w, Way::Registers { .. }));
    let by_engine = ways.iter().any(|w| matches!(w, Way::Engine(_)));
    let by_threads = ways.iter().any(|w| matches!(w, Way::Threads(_)));
    let mut barriers = IdVec::new();
    let full = by_engine.then(|| {
        barriers.push(Barrier { name: "full".into(), slots: schedule.stages, arrivals: 1 })
    });
    // Two positions in the same ring: where the next step is read, and where the next one is written.
    let ring = b.rings.push(Ring { name: "ring".into(), stages: schedule.stages });
    let ahead = b.rings.push(Ring { name: "ahead".into(), stages: schedule.stages });

    let tiles = RegisterTiles::new(&mut b, &pipeline, body, false)?;
    let mut item = initial_values(before, &pipeline, body, &tiles, false)?;

    // The loop, with copies `stages - 1` steps early.
    let early = i64::from(schedule.stages) - 1;
    let warm_up: Arc<str> = "first".into();
    let before_end = |step: &Dim, then: Vec<Stmt>| {
        let cond = Cond { lhs: step.clone(), compare: Compare::Lt, rhs: body.hi.clone() };
        Stmt::If { cond, then, otherwise: Vec::new() }
    };
    let full_at = |ring| full.map(|barrier| BarrierRef { barrier, slot: Slot::Ring(ring) });
    let starts = |step: &Dim| -> Vec<Stmt> {
        let lookup = |name: &str| (name == &*body.var).then(|| step.clone());
        let (mut by_engine, mut bytes, mut out) = (Vec::new(), 0, Vec::new());
        for (stream, way) in pipeline.streams.iter().zip(&ways) {
            match (way, full_at(ahead)) {
                (Way::Engine(stage), Some(full)) => {
                    bytes += b.smem[stage.smem].slot_bytes();
                    let mut loads = loads(&b, stream, stage, ahead, full);
                    for load in &mut loads {
                        let Stmt::TmaLoad { at, .. } = load else { continue };
                        at.iter_mut().for_each(|d| *d = d.substitute(&lookup));
                    }
                    by_engine.extend(loads);
                }
                (Way::Registers { frag, vector, .. }, _) => out.push(Stmt::Load {
                    dst: FragRef { frag: *frag, col: Dim::new(0), cols: None },
                    param: stream.view.param,
                    at: stream.view.index.iter().map(|d| d.substitute(&lookup)).collect(),
                    axes: (Some(stream.view.axes[0]), Some(stream.view.axes[1])),
                    fill: Constant::Float(0.0),
                    vector: *vector,
                }),
                _ => out.push(copy(&b, stream, way.smem(), ahead, &body.var, step)),
            }
        }
        if let Some(barrier) = full_at(ahead) {
            by_engine.insert(0, Stmt::ExpectBytes { barrier, bytes });
            out.insert(0, Stmt::Once(by_engine));
        }
        out
    };
    let ends = || -> Vec<Stmt> {
        let store = |(stream, way): (&Stream, &Way)| match way {
            Way::Registers { smem, frag, .. } => Some(Stmt::ToSmem {
                to: operand(stream, *smem, ahead),
                src: FragRef { frag: *frag, col: Dim::new(0), cols: None },
            }),
            _ => None,
        };
        let advance = Stmt::Advance { ring: ahead, by: Dim::new(1) };
        pipeline.streams.iter().zip(&ways).filter_map(store).chain([advance]).collect()
    };
    let closed = || by_threads.then_some(Stmt::CopyCommit);
    let first = Dim::sym(warm_up.clone());
    let both = starts(&first).into_iter().chain(ends()).collect();
    item.push(Stmt::For {
        var: warm_up,
        lo: body.lo.clone(),
        hi: body.lo.clone() + &Dim::new(early),
        step: Dim::new(1),
        body: [before_end(&first, both)].into_iter().chain(closed()).collect(),
    });
    let later = Dim::sym(body.var.clone()) + &Dim::new(early);
    let mut step = Vec::new();
    step.extend(full_at(ring).map(|barrier| Stmt::Wait { barrier, phase: Phase::Of(ring) }));
    step.extend(by_threads.then_some(Stmt::CopyWait { pending: schedule.stages - 2 }));
    // The copy engine writes where everyone has read.
    step.extend(by_engine.then_some(Stmt::FenceAsync));
    step.push(Stmt::SyncBlock);
    // What is loaded into registers is stored behind the product.
    let mut now = starts(&later);
    if !through_registers {
        now.extend(ends());
    }
    step.push(before_end(&later, now));
    step.extend(closed());
    let operand = |stream: usize| operand(&pipeline.streams[stream], ways[stream].smem(), ring);
    for s in &pipeline.steps {
        match s {
            Step::Product { acc, a: left, b: right, starts } => {
                if let (Value::Scratch(_), true) = (acc, starts) {
                    let dst = tiles.of(*acc);
                    let is_float = b.frags[dst.frag].dtype.is_float();
                    let value = if is_float { Constant::Float(0.0) } else { Constant::Int(0) };
                    step.push(Stmt::Fill { dst, value });
                }
                step.push(Stmt::Mma {
                    acc: tiles.of(*acc),
                    a: WgmmaA::Smem(operand(*left)),
                    b: operand(*right),
                    split: schedule.product == ProductKind::MmaSplit,
                });
            }
            Step::Map { dst, func, args } => step.push(Stmt::Map {
                dst: tiles.of(*dst),
                func: func.clone(),
                args: args.iter().map(|a| tiles.of(*a)).collect(),
            }),
        }
    }
    if through_registers {
        step.push(before_end(&later, ends()));
    }
    step.push(Stmt::Advance { ring, by: Dim::new(1) });
    item.push(Stmt::For {
        var: body.var.clone(),
        lo: body.lo.clone(),
        hi: body.hi.clone(),
        step: Dim::new(1),
        body: step,
    });
    // Only empty groups are left open.
    item.extend(by_threads.then_some(Stmt::CopyWait { pending: 0 }));
    let results = tiles.results(body);
    let finish = epilogue::store_results(&mut b, before, after, &results)?;
    // Nobody has to meet before the next item: its first copies go to the slots that the last step does not
    // read, and everyone met before that step.
    item.extend(finish.stmts);

    let index = Dim::sym("item");
    let (items, mut each) = raster(kernel, schedule, &index);
    each.extend(item);
    let mut role = over_items(schedule, &items, Dim::sym(CLUSTER), Dim::sym(CLUSTERS), each);
    role.extend(finish.last);
    let mut setup = Vec::new();
    if by_engine {
        setup.extend([Stmt::BarrierInit, Stmt::FenceBarrierInit, Stmt::SyncBlock]);
    }
    if schedule.dependent {
        setup.extend([Stmt::GridRelease, Stmt::GridWait]);
    }
    let program = Program {
        name: kernel.name.clone(),
        arch: schedule.arch,
        params: kernel.params.clone(),
        symbols: kernel.symbols.clone(),
        maps: b.maps,
        cluster: 1,
        threads: warps * 32,
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
        roles: vec![Role {
            name: "all".into(),
            first_warp: 0,
            warps,
            instances: 1,
            instance: "all".into(),
            single_thread: false,
            registers: None,
            body: role,
        }],
        teardown: Vec::new(),
    };
    let (needs, has) = (program.smem_bytes(), schedule.arch.smem_bytes());
    if needs > has {
        return Err(Error::unsupported(format!(
            "{needs} bytes of shared memory where a block has {has}"
        )));
    }
    Ok(program)
}

/// Registers of a thread in which a tile is turned, at most: the sums leave no more.
const TURNED_ELEMENTS: u32 = 16;

/// How the tiles of a stream reach shared memory.
enum Way {
    /// Asynchronous copies of all threads.
    Threads(SmemId),
    /// The copy engine.
    Engine(Stage),
    /// Through registers, where they are turned.
    Registers {
        /// Where to.
        smem: SmemId,
        /// Blocks of 4 rows and 4 steps of the depth.
        frag: FragId,
        /// Neighbours along the depth that one access takes.
        vector: u32,
    },
}

impl Way {
    fn smem(&self) -> SmemId {
        match self {
            Way::Threads(smem) | Way::Registers { smem, .. } => *smem,
            Way::Engine(stage) => stage.smem,
        }
    }
}

/// The best way for a stream: those of plain multiply-adds whose lines are whole units of 16 bytes have a choice.
fn way(b: &mut Builder<'_>, stream: &Stream) -> Result<Way> {
    let (schedule, stages) = (b.schedule, b.schedule.stages);
    let param = &b.kernel.params[stream.view.param];
    let unit = |axis: usize| param.layout.axes[stream.view.axes[axis]].stride.is(1);
    let plain = schedule.product == ProductKind::Fma && param.dtype == DType::F32;
    if !plain || schedule.vector < 4 {
        return Ok(Way::Threads(buffer(b, stream, stages)));
    }
    if unit(stream.contiguous) && schedule.arch >= Arch::Sm90a && stream.lines().is_multiple_of(8) {
        return Ok(Way::Engine(stage(b, stream, Reach::Own, stages)?));
    }
    let spread = turned_spread(schedule, stream).filter(|_| unit(1) && !unit(0));
    let Some(spread) = spread else {
        return Ok(Way::Threads(buffer(b, stream, stages)));
    };
    let frag = Frag {
        name: format!("r{}", param.name),
        dtype: param.dtype,
        rows: stream.rows,
        cols: stream.cols,
        spread,
        extent: Extent::Tile,
    };
    let frag = b.frags.push(frag);
    let vector = access_elements(b, stream.view.param, stream.view.axes[1]);
    Ok(Way::Registers { smem: buffer(b, stream, stages), frag, vector })
}

/// Blocks of a left operand whose lines run across the depth in shared memory, if a few registers hold the tile.
fn turned_spread(schedule: &GpuSchedule, stream: &Stream) -> Option<Spread> {
    let threads = schedule.warps.0 * schedule.warps.1 * 32;
    let threads_n = stream.cols / 4;
    if stream.contiguous != 0
        || !stream.cols.is_multiple_of(16)
        || !threads.is_multiple_of(threads_n)
    {
        return None;
    }
    let threads_m = threads / threads_n;
    let few = stream.rows * stream.cols / threads <= TURNED_ELEMENTS;
    let fits = threads_m.is_multiple_of(8) && stream.rows.is_multiple_of(threads_m * 4) && few;
    fits.then_some(Spread::Outer { threads_m, threads_n, block_m: 4, block_n: 4 })
}

/// Plain multiply-adds: blocks of 4 along both axes, whose neighbours are neighbours in shared memory, so that one
/// load takes a block.
pub(crate) fn spread(schedule: &GpuSchedule) -> Result<Spread> {
    let (warps_m, warps_n) = schedule.warps;
    match schedule.product {
        ProductKind::MmaSync | ProductKind::MmaSplit => Ok(Spread::MmaSync { warps_m, warps_n }),
        ProductKind::Fma => Ok(Spread::Outer {
            threads_m: warps_m * 8,
            threads_n: warps_n * 4,
            block_m: 4,
            block_n: 4,
        }),
        ProductKind::Wgmma => Err(Error::bug("wgmma in a pipelined kernel")),
    }
}

/// Whether whole instructions cover a product.
pub(crate) fn check_shape(
    a: &Stream,
    b: &Stream,
    bits: u32,
    rows: u32,
    schedule: &GpuSchedule,
    spread: Spread,
) -> Result<()> {
    let (unit_m, unit_n) = match spread {
        Spread::Outer { threads_m, threads_n, block_m, block_n } => {
            (threads_m * block_m, threads_n * block_n)
        }
        _ => (16 * schedule.warps.0, 16 * schedule.warps.1),
    };
    // Instructions of the tensor cores take 32 bytes of depth, plain sums are unrolled by 8.
    let unit_k = match spread {
        Spread::Outer { .. } => 8,
        _ => 256 / bits,
    };
    // What a thread of plain multiply-adds holds: sums, and operands for 2 steps.
    if let Spread::Outer { threads_m, threads_n, .. } = spread {
        let (m, n) = (rows / threads_m, b.cols / threads_n);
        let registers = m * n + 2 * (m + n);
        if registers > 210 {
            return Err(Error::unsupported(format!("{registers} numbers per thread of a product")));
        }
    }
    let fits = a.rows == rows
        && rows.is_multiple_of(unit_m)
        && b.cols.is_multiple_of(unit_n)
        && a.cols == b.rows
        && a.cols.is_multiple_of(unit_k);
    if fits {
        Ok(())
    } else {
        Err(Error::unsupported(format!(
            "products of {}x{}x{} over {}x{} warps",
            a.rows, b.cols, a.cols, schedule.warps.0, schedule.warps.1
        )))
    }
}

/// The ring's tiles of one stream.
pub(crate) fn buffer(b: &mut Builder<'_>, stream: &Stream, slots: u32) -> SmemId {
    let param = &b.kernel.params[stream.view.param];
    let same =
        b.smem.iter().filter(|(_, s)| s.name.trim_start_matches('s') == &*param.name).count();
    let suffix = if same == 0 { String::new() } else { format!("_{same}") };
    let smem = Smem {
        name: format!("s{}{suffix}", param.name),
        dtype: param.dtype,
        rows: stream.rows,
        cols: stream.cols,
        contiguous: stream.contiguous,
        swizzle: stream.swizzle,
        slots,
    };
    b.smem.push(smem)
}

/// Starts copying a stream's tile of one step.
pub(crate) fn copy(
    b: &Builder<'_>,
    stream: &Stream,
    smem: SmemId,
    ring: RingId,
    var: &Arc<str>,
    step: &Dim,
) -> Stmt {
    let axes = (stream.view.axes[0], stream.view.axes[1]);
    let along = if stream.contiguous == 1 { axes.1 } else { axes.0 };
    let lookup = |name: &str| (name == &**var).then(|| step.clone());
    Stmt::CopyIn {
        param: stream.view.param,
        at: stream.view.index.iter().map(|d| d.substitute(&lookup)).collect(),
        axes,
        to: operand(stream, smem, ring),
        vector: copy_elements(b, stream.view.param, along),
        ends: b.schedule.copies > 1,
    }
}

/// Elements of at most 16 bytes that one copy along an axis of an operand may take.
fn copy_elements(b: &Builder<'_>, param: ParamId, axis: usize) -> u32 {
    let p = &b.kernel.params[param];
    let most = (128 / p.dtype.bits()).max(1);
    match b.schedule.copies {
        0 => access_elements(b, param, axis),
        n if p.layout.axes[axis].stride.is(1) => n.clamp(1, most),
        _ => 1,
    }
}

pub(crate) fn operand(stream: &Stream, smem: SmemId, ring: RingId) -> SmemTile {
    SmemTile {
        smem,
        slot: Slot::Ring(ring),
        row: Dim::new(0),
        col: Dim::new(0),
        rows: stream.rows,
        cols: stream.cols,
    }
}
