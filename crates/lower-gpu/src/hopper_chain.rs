//! Warp-specialised Hopper kernels whose products feed each other (`chain.rs`): a producer warp keeps rings of
//! operand tiles filled, one ring per operand; consumer warpgroups multiply, reduce and map in registers.
//!
//! ```text
//! turn t:  wait for B_t;  S = A B_t  |  C += P D_(t-1)     both in flight
//!          wait for S; maps and reductions on S            beside the second product
//!          wait for C; rescale C, P = 16 bits of f(S)
//! ```
//!
//! With `turns`, consumers start their products one after another, so that one's maps run beside the other's
//! products (FlashAttention-3, Shah et al. 2024, sections 3.1 and 3.2).

use crate::chain::{Chain, Left, Step, chain};
use crate::epilogue::{self, Evaluator, whole};
use crate::hopper::{Builder, CONSUMER, Stage, TURN_BARRIER, loads, main_loop, over_items, stage};
use crate::in_order;
use crate::raster::raster;
use crate::schedule::{GpuSchedule, Mode, StoreKind};
use crate::streams::{Defs, definitions, extents};
use tilewright_base::{Error, IdVec, Result};
use tilewright_device::{
    Barrier, BarrierId, BarrierRef, CLUSTER, CLUSTERS, Cond, Extent, FragId, FragRef, Phase,
    Program, Reach, Ring, RingId, Role, Slot, SmemTile, Spread, Stmt, Streams, WgmmaA,
};
use tilewright_expr::Func;
use tilewright_layout::Dim;
use tilewright_tile::{Compare, For, Kernel, Operand, TileId, TileOp};

/// A stream's ring and its barriers.
pub(crate) struct Feed {
    pub(crate) stage: Stage,
    pub(crate) ring: RingId,
    full: BarrierId,
    pub(crate) empty: BarrierId,
    pub(crate) bytes: u32,
}

impl Feed {
    /// The barrier of the tile at the ring's position.
    pub(crate) fn full(&self) -> BarrierRef {
        BarrierRef { barrier: self.full, slot: Slot::Ring(self.ring) }
    }
}

/// Schedules a kernel with one loop over products that feed each other. Where there is room, what is loaded once per
/// item has two slots: the next item's comes while this one is computed, and so do the tiles of its first turns.
pub(crate) fn lower(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    // Blocks that share a multiprocessor share its memory, of which each has 1 KiB that programs do not see.
    let blocks = schedule.blocks_per_sm.max(1);
    let has = (schedule.arch.smem_bytes() - (blocks - 1) * 1024) / blocks;
    if schedule.persistent && registers(kernel, schedule)? <= AHEAD_REGISTERS_MAX {
        let ahead = lower_with(kernel, schedule, 2)?;
        if ahead.smem_bytes() <= has {
            return Ok(ahead);
        }
    }
    let program = lower_with(kernel, schedule, 1)?;
    let needs = program.smem_bytes();
    if needs > has {
        return Err(Error::unsupported(format!(
            "{needs} bytes of shared memory where a block has {has}"
        )));
    }
    Ok(program)
}

/// Up to so many registers of a thread, addresses of a second slot find room beside the tiles.
const AHEAD_REGISTERS_MAX: u32 = 220;

/// Registers of a thread for the tiles that live at once: the loop's sums and its scores, 16-bit copies of those, a tile that is loaded
/// beside them (a mask), and 40 for the rest.
fn registers(kernel: &Kernel, schedule: &GpuSchedule) -> Result<u32> {
    let (_, body, _) = main_loop(kernel)?;
    let blocks = rows_each(kernel, body, schedule)? / 64;
    let (mut sums, mut scores, mut loads) = (0, 0, 0);
    for stmt in &body.body.stmts {
        let tilewright_tile::Stmt::Let(id, op) = stmt else { continue };
        match op {
            TileOp::Mma { .. } if body.yields.contains(id) => sums += extents(kernel, *id)?[1],
            TileOp::Mma { .. } => scores += extents(kernel, *id)?[1],
            TileOp::Load { .. } => loads += 1,
            _ => {}
        }
    }
    // Keys and values go through shared memory.
    let masked = if loads > 2 { scores / 4 } else { 0 };
    Ok(blocks * (sums / 2 + scores / 2 + scores / 4 + masked) + 40)
}

/// With so many slots for what is loaded once per item.
fn lower_with(kernel: &Kernel, schedule: &GpuSchedule, once_slots: u32) -> Result<Program> {
    let (before, body, after) = main_loop(kernel)?;
    let consumers = schedule.consumers;
    check(schedule)?;
    let mut b = Builder {
        kernel,
        schedule,
        maps: IdVec::new(),
        smem: IdVec::new(),
        rings: IdVec::new(),
        frags: IdVec::new(),
        rows: rows_each(kernel, body, schedule)?,
        spread: Spread::Wgmma,
        first_column: std::collections::BTreeMap::new(),
        streamed: None,
        riders: Vec::new(),
    };
    let mut chain = chain(&mut b, before, body, schedule.product)?;

    // Rings of the streams; what is the same on every turn is loaded once per item.
    let mut barriers = IdVec::new();
    let mut feeds = Vec::new();
    for (stream, once) in chain.streams.iter().zip(&chain.invariant) {
        let slots = if *once { once_slots } else { schedule.stages };
        let name = kernel.params[stream.view.param].name.clone();
        let stage = stage(&mut b, stream, Reach::Own, slots)?;
        let ring = b.rings.push(Ring { name: format!("ring_{name}"), stages: slots });
        let mut barrier = |kind: &str, arrivals| {
            barriers.push(Barrier { name: format!("{kind}_{name}"), slots, arrivals })
        };
        let (full, empty) = (barrier("full", 1), barrier("empty", consumers));
        let bytes = b.smem[stage.smem].slot_bytes();
        feeds.push(Feed { stage, ring, full, empty, bytes });
    }

    let mut defs = definitions(&body.body.stmts);
    defs.extend(definitions(before));
    let copies = in_order::riders(&mut b, &chain, &mut feeds, body)?;
    let item = Dim::sym("item");
    let (items, decode) = raster(kernel, schedule, &item);
    let fill = |once: bool| -> Vec<Stmt> {
        let mut out = Vec::new();
        for ((stream, feed), invariant) in chain.streams.iter().zip(&feeds).zip(&chain.invariant) {
            if *invariant != once {
                continue;
            }
            let at = |barrier| BarrierRef { barrier, slot: Slot::Ring(feed.ring) };
            out.push(Stmt::Wait { barrier: at(feed.empty), phase: Phase::Before(feed.ring) });
            out.push(Stmt::ExpectBytes { barrier: at(feed.full), bytes: feed.bytes });
            out.extend(loads(&b, stream, &feed.stage, feed.ring, at(feed.full)));
            if copies.host == Some(feed.ring) {
                out.extend(copies.loads.clone());
            }
            out.push(Stmt::Advance { ring: feed.ring, by: Dim::new(1) });
        }
        out
    };
    let mut produce = decode.clone();
    produce.extend(fill(true));
    produce.push(Stmt::For {
        var: body.var.clone(),
        lo: body.lo.clone(),
        hi: body.hi.clone(),
        step: Dim::new(1),
        body: fill(false),
    });
    let producer_body =
        over_items(schedule, &items, Dim::sym(CLUSTER), Dim::sym(CLUSTERS), produce);

    let mut consume = decode;
    consume.extend(initial_values(&defs, body, &chain)?);
    if chain.in_order {
        consume.extend(in_order::rows_once(&mut b, &mut chain, &defs, &definitions(before))?);
    }
    let mut turns = Turns { b: &mut b, chain: &chain, feeds: &feeds, defs: &defs };
    consume.extend(turns.whole_loop(body)?);
    let results: Vec<(TileId, FragId)> =
        body.results.iter().copied().zip(chain.carried.iter().copied()).collect();
    let finish = epilogue::store_results(&mut b, before, after, &results)?;
    consume.extend(finish.stmts);
    let mut consumer_body = Vec::new();
    if schedule.turns {
        // The last consumer gives the first its turn.
        let last = Dim::new(i64::from(consumers) - 1);
        consumer_body.push(Stmt::If {
            cond: Cond { lhs: Dim::sym(CONSUMER), compare: Compare::Eq, rhs: last },
            then: vec![Stmt::NamedArrive { id: Dim::new(TURN_BARRIER), threads: 256 }],
            otherwise: Vec::new(),
        });
    }
    consumer_body.extend(over_items(
        schedule,
        &items,
        Dim::sym(CLUSTER),
        Dim::sym(CLUSTERS),
        consume,
    ));
    consumer_body.extend(finish.last);

    let registers = match (schedule.blocks_per_sm, consumers) {
        (1, 2) => Some((24, 240)),
        (1, 3) => Some((32, 160)),
        (2, 1) => Some((24, 232)),
        _ => None,
    };
    let mut setup = vec![Stmt::BarrierInit, Stmt::FenceBarrierInit, Stmt::SyncCluster];
    if schedule.dependent {
        setup.extend([Stmt::GridRelease, Stmt::GridWait]);
    }
    let role = |name: &str, first_warp, instances, single_thread, registers, body| Role {
        name: name.into(),
        first_warp,
        warps: 4,
        instances,
        instance: name.into(),
        single_thread,
        registers,
        body,
    };
    let program = Program {
        name: kernel.name.clone(),
        arch: schedule.arch,
        params: kernel.params.clone(),
        symbols: kernel.symbols.clone(),
        maps: b.maps,
        cluster: 1,
        threads: 128 * (1 + consumers),
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
            role("producer", 0, 1, true, registers.map(|r| r.0), producer_body),
            role(CONSUMER, 4, consumers, false, registers.map(|r| r.1), consumer_body),
        ],
        teardown: Vec::new(),
    };
    Ok(program)
}

fn check(schedule: &GpuSchedule) -> Result<()> {
    let refuse = |what: &str| Err(Error::unsupported(format!("{what} of chained products")));
    if schedule.cluster != 1 {
        return refuse("clusters");
    }
    if schedule.mode != Mode::Cooperative {
        return refuse("ping-pong over tiles");
    }
    if schedule.store == StoreKind::Staged {
        return refuse("staged stores without the copy engine");
    }
    if schedule.turns && !(2..=3).contains(&schedule.consumers) {
        return refuse("turns of a single consumer");
    }
    Ok(())
}

/// Rows of each consumer, from the first product of the loop.
fn rows_each(kernel: &Kernel, body: &For, schedule: &GpuSchedule) -> Result<u32> {
    let product = body.body.stmts.iter().find_map(|s| match s {
        tilewright_tile::Stmt::Let(id, TileOp::Mma { .. }) => Some(*id),
        _ => None,
    });
    let Some(product) = product else { return Err(Error::unsupported("a loop without products")) };
    let rows = extents(kernel, product)?[0];
    let each = rows / schedule.consumers.max(1);
    if each == 0 || !each.is_multiple_of(64) || each * schedule.consumers != rows {
        return Err(Error::unsupported(format!(
            "{rows} rows over {} consumers: each needs a multiple of 64",
            schedule.consumers
        )));
    }
    Ok(each)
}

/// Fills the carried tiles.
pub(crate) fn initial_values(defs: &Defs<'_>, body: &For, chain: &Chain) -> Result<Vec<Stmt>> {
    body.carry
        .iter()
        .zip(&chain.carried)
        .map(|((_, init), frag)| match defs.get(init) {
            Some(TileOp::Full(value)) => Ok(Stmt::Fill { dst: whole(*frag), value: *value }),
            _ => Err(Error::unsupported(
                "a loop that carries a tile that is not a constant at first",
            )),
        })
        .collect()
}

/// Which form of the steps a turn runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Before the cut.
    Early,
    /// On every turn.
    Any,
}

/// Prints turns of the loop.
pub(crate) struct Turns<'a, 'k> {
    pub(crate) b: &'a mut Builder<'k>,
    pub(crate) chain: &'a Chain,
    pub(crate) feeds: &'a [Feed],
    pub(crate) defs: &'a Defs<'a>,
}

impl Turns<'_, '_> {
    fn whole_loop(&mut self, body: &For) -> Result<Vec<Stmt>> {
        if self.chain.in_order {
            return self.loop_in_order(body);
        }
        let mut out = Vec::new();
        // What is loaded once per item.
        for (feed, once) in self.feeds.iter().zip(&self.chain.invariant) {
            if *once {
                out.push(wait_full(feed));
            }
        }
        let lo = body.lo.clone();
        let first = lo.clone() + &Dim::new(1);
        let mut turns = Vec::new();
        let start = if self.chain.deferred.is_some() {
            turns.push(Stmt::Let { name: body.var.clone(), value: lo.clone() });
            turns.extend(self.turn(Form::Any, true)?);
            first
        } else {
            lo.clone()
        };
        let chain = self.chain;
        let mut over = |lo: Dim, hi: Dim, form: Form| -> Result<Stmt> {
            let body_of = self.turn(form, false)?;
            Ok(Stmt::For { var: body.var.clone(), lo, hi, step: Dim::new(1), body: body_of })
        };
        match &chain.cut {
            Some(cut) => {
                let name: std::sync::Arc<str> = "cut".into();
                let value = cut.min_with(&body.hi).max_with(&start);
                turns.push(Stmt::Let { name: name.clone(), value });
                turns.push(over(start, Dim::sym(name.clone()), Form::Early)?);
                turns.push(over(Dim::sym(name), body.hi.clone(), Form::Any)?);
            }
            None => turns.push(over(start, body.hi.clone(), Form::Any)?),
        }
        if let Some(deferred) = &chain.deferred {
            let Step::Product { b, .. } = deferred else {
                return Err(Error::bug("a deferred step that is no product"));
            };
            turns.push(wait_full(&self.feeds[*b]));
            turns.push(Stmt::WgmmaFence);
            turns.push(self.product(deferred)?);
            turns.extend([Stmt::WgmmaCommit, Stmt::WgmmaWait { pending: 0 }]);
            turns.extend(release(&self.feeds[*b]));
        }
        out.push(Stmt::If {
            cond: Cond { lhs: lo, compare: Compare::Lt, rhs: body.hi.clone() },
            then: turns,
            otherwise: Vec::new(),
        });
        for (feed, once) in self.feeds.iter().zip(&self.chain.invariant) {
            if *once {
                out.extend(release(feed));
            }
        }
        Ok(out)
    }

    /// One turn; the deferred product of the turn before runs beside its first products unless it is the first.
    fn turn(&mut self, form: Form, first: bool) -> Result<Vec<Stmt>> {
        let mut out = Vec::new();
        let steps = &self.chain.steps;
        let mut waiting = self.chain.deferred.as_ref().filter(|_| !first);
        let mut in_flight = None;
        let mut groups = 0;
        let mut i = 0;
        while i < steps.len() {
            if !matches!(steps[i], Step::Product { .. }) {
                out.extend(step_stmts(self.b, self.defs, self.chain, &steps[i], form)?);
                i += 1;
                continue;
            }
            let end = steps[i..]
                .iter()
                .position(|s| !matches!(s, Step::Product { .. }))
                .map_or(steps.len(), |n| i + n);
            let turns = self.b.schedule.turns && groups == 0;
            let own = Dim::sym(CONSUMER);
            if turns {
                let id = own.clone() + &Dim::new(TURN_BARRIER);
                out.push(Stmt::NamedSync { id, threads: 256 });
            }
            for stream in self.fresh_streams(i, end) {
                out.push(wait_full(&self.feeds[stream]));
            }
            out.push(Stmt::WgmmaFence);
            for step in &steps[i..end] {
                out.push(self.product(step)?);
            }
            out.push(Stmt::WgmmaCommit);
            let mut pending = 0;
            if let Some(Step::Product { b, .. }) = waiting {
                out.push(wait_full(&self.feeds[*b]));
                out.push(Stmt::WgmmaFence);
                if let Some(step) = waiting.take() {
                    out.push(self.product(step)?);
                }
                out.push(Stmt::WgmmaCommit);
                in_flight = Some(*b);
                pending = 1;
            }
            if turns {
                let n = Dim::new(i64::from(self.b.schedule.consumers));
                let next = (own + &Dim::new(1)).modulo(&n) + &Dim::new(TURN_BARRIER);
                out.push(Stmt::NamedArrive { id: next, threads: 256 });
            }
            out.push(Stmt::WgmmaWait { pending });
            if pending == 0
                && let Some(stream) = in_flight.take()
            {
                out.extend(release(&self.feeds[stream]));
            }
            for stream in self.last_streams(i, end) {
                out.extend(release(&self.feeds[stream]));
            }
            groups += 1;
            i = end;
        }
        if let Some(stream) = in_flight {
            out.push(Stmt::WgmmaWait { pending: 0 });
            out.extend(release(&self.feeds[stream]));
        }
        for step in &self.chain.late {
            out.extend(step_stmts(self.b, self.defs, self.chain, step, form)?);
        }
        for (from, to) in &self.chain.copies {
            let dtype = self.b.frags[*to].dtype;
            out.push(Stmt::Map {
                dst: whole(*to),
                func: Func::identity(dtype),
                args: vec![whole(*from)],
            });
        }
        Ok(out)
    }

    /// Streams of a turn that steps `i..end` read.
    fn streams(&self, i: usize, end: usize) -> Vec<usize> {
        let mut out = Vec::new();
        for step in &self.chain.steps[i..end] {
            let Step::Product { a, b, .. } = step else { continue };
            let left = match a {
                Left::Stream(a) => Some(*a),
                Left::Registers(_) => None,
            };
            for stream in left.into_iter().chain([*b]) {
                if !self.chain.invariant[stream] && !out.contains(&stream) {
                    out.push(stream);
                }
            }
        }
        out
    }

    /// Of these, those that no step before reads.
    fn fresh_streams(&self, i: usize, end: usize) -> Vec<usize> {
        let before = self.streams(0, i);
        self.streams(i, end).into_iter().filter(|s| !before.contains(s)).collect()
    }

    /// Of these, those that no step after reads.
    fn last_streams(&self, i: usize, end: usize) -> Vec<usize> {
        let after = self.streams(end, self.chain.steps.len());
        self.streams(i, end).into_iter().filter(|s| !after.contains(s)).collect()
    }

    pub(crate) fn product(&self, step: &Step) -> Result<Stmt> {
        let Step::Product { result, acc, a, b, turned } = step else {
            return Err(Error::bug("a step that is no product"));
        };
        let (stream, feed) = (&self.chain.streams[*b], &self.feeds[*b]);
        let a = match a {
            Left::Registers(tile) => WgmmaA::Frag(frag_of(self.chain, *tile)?),
            Left::Stream(a) => WgmmaA::Smem(SmemTile {
                smem: self.feeds[*a].stage.smem,
                slot: Slot::Ring(self.feeds[*a].ring),
                row: self.b.row0(),
                col: Dim::new(0),
                rows: self.b.rows,
                cols: self.chain.streams[*a].cols,
            }),
        };
        let always = Cond { lhs: Dim::new(0), compare: Compare::Eq, rhs: Dim::new(0) };
        Ok(Stmt::Wgmma {
            acc: frag_of(self.chain, *result)?,
            a,
            b: SmemTile {
                smem: feed.stage.smem,
                slot: Slot::Ring(feed.ring),
                row: Dim::new(0),
                col: Dim::new(0),
                rows: stream.rows,
                cols: stream.cols,
            },
            turned: *turned,
            zero_if: acc.is_none().then_some(always),
        })
    }
}

pub(crate) fn wait_full(feed: &Feed) -> Stmt {
    Stmt::Wait {
        barrier: BarrierRef { barrier: feed.full, slot: Slot::Ring(feed.ring) },
        phase: Phase::Of(feed.ring),
    }
}

/// Lets go of the tile that was read, and looks at the next one.
pub(crate) fn release(feed: &Feed) -> Vec<Stmt> {
    vec![
        Stmt::Arrive {
            barrier: BarrierRef { barrier: feed.empty, slot: Slot::Ring(feed.ring) },
            reach: Reach::Own,
        },
        Stmt::Advance { ring: feed.ring, by: Dim::new(1) },
    ]
}

pub(crate) fn frag_of(chain: &Chain, tile: TileId) -> Result<FragRef> {
    match chain.frags.get(&tile) {
        Some(frag) => Ok(whole(*frag)),
        None => Err(Error::bug("a register tile without a fragment")),
    }
}

/// A map or a reduction on register tiles.
pub(crate) fn step_stmts(
    b: &mut Builder<'_>,
    defs: &Defs<'_>,
    chain: &Chain,
    step: &Step,
    form: Form,
) -> Result<Vec<Stmt>> {
    match step {
        Step::Product { .. } => Err(Error::bug("a product among elementwise steps")),
        Step::Reduce { result, kind, x } => Ok(vec![Stmt::Reduce {
            dst: frag_of(chain, *result)?,
            kind: *kind,
            src: frag_of(chain, *x)?,
            accumulate: false,
        }]),
        Step::Map { result, func, args, early } => {
            let (func, args) = match early {
                Some((func, args)) if form == Form::Early => (func, args),
                _ => (func, args),
            };
            map_stmts(b, defs, chain, *result, func, args)
        }
    }
}

fn map_stmts(
    b: &mut Builder<'_>,
    defs: &Defs<'_>,
    chain: &Chain,
    result: TileId,
    func: &Func,
    args: &[Operand],
) -> Result<Vec<Stmt>> {
    let dst = frag_of(chain, result)?;
    if let [arg] = args
        && func.is_identity()
        && chain.frags.get(&arg.tile) == Some(&dst.frag)
    {
        return Ok(Vec::new());
    }
    let (extent, cols) = (b.frags[dst.frag].extent, b.frags[dst.frag].cols);
    if extent == Extent::PerRow {
        let mut e = Evaluator::new(b, defs.clone(), chain.frags.clone(), cols, Dim::new(0));
        let mut operands = Vec::new();
        for arg in args {
            let axis = arg.along.iter().position(|a| *a == 0);
            operands.push(e.vector(arg.tile, axis, Extent::PerRow)?);
        }
        let mut out = std::mem::take(&mut e.once);
        out.append(&mut e.steps);
        out.push(Stmt::Map { dst, func: func.clone(), args: operands });
        return Ok(out);
    }
    // What is loaded on the way passes through registers a few columns at a time.
    let loads = args.iter().any(|a| !chain.frags.contains_key(&a.tile) && loaded(defs, a.tile));
    let chunk = match loads {
        true => [32, 16, 8].into_iter().find(|c| cols.is_multiple_of(*c)).unwrap_or(cols),
        false => cols,
    };
    let column = match chunk == cols {
        true => Dim::new(0),
        false => Dim::sym("piece") * &Dim::new(i64::from(chunk)),
    };
    let mut e = Evaluator::new(b, defs.clone(), chain.frags.clone(), chunk, column.clone());
    let mut operands = Vec::new();
    for arg in args {
        operands.push(e.operand(arg)?);
    }
    let mut out = std::mem::take(&mut e.once);
    let mut steps = std::mem::take(&mut e.steps);
    let dst = FragRef { frag: dst.frag, col: column, cols: Some(chunk) };
    steps.push(Stmt::Map { dst, func: func.clone(), args: operands });
    match chunk == cols {
        true => out.append(&mut steps),
        false => out.push(Stmt::Unroll { var: "piece".into(), count: cols / chunk, body: steps }),
    }
    Ok(out)
}

/// Whether a tile that no step makes comes from global memory.
fn loaded(defs: &Defs<'_>, tile: TileId) -> bool {
    match defs.get(&tile) {
        Some(TileOp::Load { .. } | TileOp::Gather { .. }) => true,
        Some(TileOp::Map { args, .. }) => args.iter().any(|a| loaded(defs, a.tile)),
        Some(TileOp::Reshape(x) | TileOp::Permute { x, .. }) => loaded(defs, *x),
        Some(TileOp::Broadcast(arg)) => loaded(defs, arg.tile),
        _ => false,
    }
}
