//! Pipelined kernels whose products feed each other (`chain.rs`), for every architecture: all warps copy
//! operand tiles ahead, multiply with `mma.sync` or plain multiply-adds, and work on the sums in registers.
//!
//! ```text
//! copy what is the same on every turn; copy turns 0 .. stages-2
//! for t:  wait until turn t came; meet
//!         copy turn t + stages-1 into the slot of turn t-1
//!         products, maps, row reductions
//! ```
//!
//! Tensor cores take a left operand that was made in registers from there. For plain multiply-adds it goes through
//! shared memory.
//!
//! A row belongs to the threads of one warp (warps stand along rows only), so that reductions need no
//! shared memory.

use crate::ampere::{buffer, check_shape, copy, operand, spread};
use crate::chain::{Chain, Left, Step, chain};
use crate::epilogue::{self, whole};
use crate::hopper::{Builder, main_loop, over_items};
use crate::hopper_chain::{Form, frag_of, initial_values, step_stmts};
use crate::raster::raster;
use crate::schedule::{GpuSchedule, ProductKind, StoreKind};
use crate::streams::{Defs, Stream, definitions, extents};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_device::{
    Arch, CLUSTER, CLUSTERS, Cond, FragId, Program, Ring, RingId, Role, Slot, Smem, SmemId,
    SmemTile, Spread, Stmt, Streams, Swizzle, WgmmaA,
};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{Compare, For, Kernel, TileId, TileOp};

/// Schedules a kernel with one loop over products that feed each other.
pub(crate) fn lower(kernel: &Kernel, schedule: &GpuSchedule) -> Result<Program> {
    let (before, body, after) = main_loop(kernel)?;
    let (warps, along_columns) = schedule.warps;
    if along_columns != 1 || !(1..=32).contains(&warps) || !(2..=16).contains(&schedule.stages) {
        return Err(Error::unsupported(format!(
            "chained products over {warps}x{along_columns} warps, {} stages",
            schedule.stages
        )));
    }
    if schedule.cluster != 1 || schedule.store == StoreKind::Tma {
        return Err(Error::unsupported("clusters and copy-engine stores of a pipelined kernel"));
    }
    if schedule.dependent && schedule.arch < Arch::Sm90a {
        return Err(Error::unsupported("dependent launches before sm_90"));
    }
    let (rows, spread) = first_product(kernel, body, schedule)?;
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
    let chain = chain(&mut b, before, body, schedule.product)?;
    let turns = Turns::new(&mut b, &chain)?;
    let mut defs = definitions(&body.body.stmts);
    defs.extend(definitions(before));
    let mut item = initial_values(&defs, body, &chain)?;
    item.extend(turns.whole_loop(&mut b, &defs, body)?);
    let results: Vec<(TileId, FragId)> =
        body.results.iter().copied().zip(chain.carried.iter().copied()).collect();
    let finish = epilogue::store_results(&mut b, before, after, &results)?;
    item.extend(finish.stmts);
    if schedule.persistent {
        // The next item's copies go where the slowest warp may still be reading.
        item.push(Stmt::SyncBlock);
    }

    let (items, mut each) = raster(kernel, schedule, &Dim::sym("item"));
    each.extend(item);
    let mut role = over_items(schedule, &items, Dim::sym(CLUSTER), Dim::sym(CLUSTERS), each);
    role.extend(finish.last);
    let setup =
        if schedule.dependent { vec![Stmt::GridRelease, Stmt::GridWait] } else { Vec::new() };
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
        barriers: IdVec::new(),
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

/// Rows of the tiles and the spread of all fragments, by the first product of the loop.
fn first_product(kernel: &Kernel, body: &For, schedule: &GpuSchedule) -> Result<(u32, Spread)> {
    for stmt in &body.body.stmts {
        if let tilewright_tile::Stmt::Let(id, TileOp::Mma { .. }) = stmt {
            let rows = extents(kernel, *id)?[0];
            let spread = match spread(schedule)? {
                // Few rows a warp: single ones, so that all of its threads have some.
                Spread::Outer { threads_m, threads_n, block_m, block_n } => Spread::Outer {
                    threads_m,
                    threads_n,
                    block_m: if rows.is_multiple_of(threads_m * block_m) { block_m } else { 1 },
                    block_n,
                },
                spread => spread,
            };
            return Ok((rows, spread));
        }
    }
    Err(Error::unsupported("a loop without products"))
}

/// Buffers and rings of a loop.
struct Turns<'a> {
    chain: &'a Chain,
    buffers: Vec<SmemId>,
    /// Where the next turn is read, and where the next one is written.
    ring: RingId,
    ahead: RingId,
    /// For what is the same on every turn.
    once: RingId,
    /// A buffer for each left operand that is made in registers and cannot be taken from there.
    lefts: Vec<(TileId, SmemId)>,
}

impl<'a> Turns<'a> {
    fn new(b: &mut Builder<'_>, chain: &'a Chain) -> Result<Turns<'a>> {
        let stages = b.schedule.stages;
        let mut buffers = Vec::new();
        for (stream, once) in chain.streams.iter().zip(&chain.invariant) {
            buffers.push(buffer(b, stream, if *once { 1 } else { stages }));
        }
        let mut ring = |name: &str, stages| b.rings.push(Ring { name: name.into(), stages });
        let (ring, ahead, once) = (ring("ring", stages), ring("ahead", stages), ring("once", 1));
        let mut lefts = Vec::new();
        for step in &chain.steps {
            let Step::Product { a, b: right, .. } = step else { continue };
            let right = &chain.streams[*right];
            match a {
                Left::Stream(a) => {
                    let a = &chain.streams[*a];
                    let bits = b.kernel.params[a.view.param].dtype.bits();
                    check_shape(a, right, bits, b.rows, b.schedule, b.spread)?;
                }
                Left::Registers(tile) => {
                    let dtype = b.kernel.ty(*tile).dtype;
                    let like =
                        Stream { rows: b.rows, cols: right.rows, contiguous: 1, ..right.clone() };
                    check_shape(&like, right, dtype.bits(), b.rows, b.schedule, b.spread)?;
                    if let Spread::Outer { .. } = b.spread {
                        lefts.push((*tile, left_buffer(b, dtype, right.rows)?));
                    }
                }
            }
        }
        Ok(Turns { chain, buffers, ring, ahead, once, lefts })
    }

    /// Copies of the streams that are (not) the same on every turn.
    fn copies(&self, b: &Builder<'_>, once: bool, var: &Arc<str>, step: &Dim) -> Vec<Stmt> {
        let ring = if once { self.once } else { self.ahead };
        let all = self.chain.streams.iter().zip(&self.buffers).zip(&self.chain.invariant);
        all.filter(|(_, invariant)| **invariant == once)
            .map(|((stream, smem), _)| copy(b, stream, *smem, ring, var, step))
            .collect()
    }

    fn whole_loop(&self, b: &mut Builder<'_>, defs: &Defs<'_>, body: &For) -> Result<Vec<Stmt>> {
        let early = i64::from(b.schedule.stages) - 1;
        let mut out = self.copies(b, true, &body.var, &body.lo);
        out.push(Stmt::CopyCommit);
        let at_step = |b: &Builder<'_>, step: Dim| -> Vec<Stmt> {
            let mut copies = self.copies(b, false, &body.var, &step);
            copies.push(Stmt::Advance { ring: self.ahead, by: Dim::new(1) });
            let cond = Cond { lhs: step, compare: Compare::Lt, rhs: body.hi.clone() };
            vec![Stmt::If { cond, then: copies, otherwise: Vec::new() }, Stmt::CopyCommit]
        };
        let warm_up: Arc<str> = "first".into();
        out.push(Stmt::For {
            var: warm_up.clone(),
            lo: body.lo.clone(),
            hi: body.lo.clone() + &Dim::new(early),
            step: Dim::new(1),
            body: at_step(b, Dim::sym(warm_up)),
        });
        let over = |b: &mut Builder<'_>, lo: Dim, hi: Dim, form: Form| -> Result<Stmt> {
            let mut step = vec![Stmt::CopyWait { pending: b.schedule.stages - 2 }, Stmt::SyncBlock];
            step.extend(at_step(b, Dim::sym(body.var.clone()) + &Dim::new(early)));
            step.extend(self.turn(b, defs, form)?);
            Ok(Stmt::For { var: body.var.clone(), lo, hi, step: Dim::new(1), body: step })
        };
        match &self.chain.cut {
            Some(cut) => {
                let name: Arc<str> = "cut".into();
                let value = cut.min_with(&body.hi).max_with(&body.lo);
                out.push(Stmt::Let { name: name.clone(), value });
                out.push(over(b, body.lo.clone(), Dim::sym(name.clone()), Form::Early)?);
                out.push(over(b, Dim::sym(name), body.hi.clone(), Form::Any)?);
            }
            None => out.push(over(b, body.lo.clone(), body.hi.clone(), Form::Any)?),
        }
        // Only empty groups are left open, and what no turn waited for.
        out.push(Stmt::CopyWait { pending: 0 });
        Ok(out)
    }

    fn turn(&self, b: &mut Builder<'_>, defs: &Defs<'_>, form: Form) -> Result<Vec<Stmt>> {
        let mut out = Vec::new();
        let chain = self.chain;
        let split = b.schedule.product == ProductKind::MmaSplit;
        let tile = |stream: usize| {
            let ring = if chain.invariant[stream] { self.once } else { self.ring };
            operand(&chain.streams[stream], self.buffers[stream], ring)
        };
        for step in &chain.steps {
            let Step::Product { result, acc, a, b: right, .. } = step else {
                out.extend(step_stmts(b, defs, chain, step, form)?);
                continue;
            };
            let dst = frag_of(chain, *result)?;
            if acc.is_none() {
                let is_float = b.frags[dst.frag].dtype.is_float();
                let value = if is_float { Value::Float(0.0) } else { Value::Int(0) };
                out.push(Stmt::Fill { dst: dst.clone(), value });
            }
            let a = match a {
                Left::Stream(a) => WgmmaA::Smem(tile(*a)),
                Left::Registers(made) => {
                    let smem = self.lefts.iter().find(|(t, _)| t == made).map(|(_, s)| *s);
                    let Some(smem) = smem else {
                        let a = WgmmaA::Frag(frag_of(chain, *made)?);
                        out.push(Stmt::Mma { acc: dst, a, b: tile(*right), split });
                        continue;
                    };
                    let to = SmemTile {
                        smem,
                        slot: Slot::At(Dim::new(0)),
                        row: Dim::new(0),
                        col: Dim::new(0),
                        rows: b.rows,
                        cols: chain.streams[*right].rows,
                    };
                    out.push(Stmt::ToSmem { to: to.clone(), src: frag_of(chain, *made)? });
                    out.push(Stmt::SyncBlock);
                    WgmmaA::Smem(to)
                }
            };
            out.push(Stmt::Mma { acc: dst, a, b: tile(*right), split });
        }
        for (from, to) in &chain.copies {
            let func = tilewright_expr::Func::identity(b.frags[*to].dtype);
            out.push(Stmt::Map { dst: whole(*to), func, args: vec![whole(*from)] });
        }
        out.push(Stmt::Advance { ring: self.ring, by: Dim::new(1) });
        Ok(out)
    }
}

/// Shared memory for a left operand of `cols` columns of plain multiply-adds: lines across the depth.
fn left_buffer(b: &mut Builder<'_>, dtype: DType, cols: u32) -> Result<SmemId> {
    let bytes = b.rows * dtype.bits() / 8;
    let swizzle = [Swizzle::B128, Swizzle::B64, Swizzle::B32]
        .into_iter()
        .find(|s| bytes.is_multiple_of(s.span_bytes()));
    let Some(swizzle) = swizzle else {
        return Err(Error::unsupported(format!("left operands of {bytes} bytes a line")));
    };
    Ok(b.smem.push(Smem {
        name: format!("left{}", b.smem.len()),
        dtype,
        rows: b.rows,
        cols,
        contiguous: 0,
        swizzle,
        slots: 1,
    }))
}
