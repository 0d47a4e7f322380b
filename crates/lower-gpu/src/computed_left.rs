//! Left operands that consumers compute in registers: from a tile that the copy engine brought as it lies, and vectors along the depth.
//!
//! ```text
//! for k:  vectors from memory   wait(full)   raw from shared memory   steps ...
//!         wait for the products of the turn before, let go of their stage
//!         left = last step(raw, vectors)   left * right from shared memory
//! ```
//!
//! The tensor cores read the registers of `left` until their group is done, so the last step waits for that; what is before it runs beside the
//! products of the turn before. Other consumers multiply meanwhile.

use crate::epilogue::{Evaluator, whole};
use crate::hopper::{Builder, Products, RegisterTiles, Stage};
use crate::streams::{Pipeline, Step, definitions};
use std::collections::BTreeMap;
use tilewright_base::{Error, Result};
use tilewright_device::{
    BarrierId, BarrierRef, Cond, Extent, FragRef, Phase, Reach, RingId, Slot, SmemTile, Stmt,
    WgmmaA,
};
use tilewright_layout::Dim;
use tilewright_tile::{Compare, For};

/// The steps of a turn in front of its product.
pub(crate) struct Left {
    /// Of the first stream's product with the second.
    right: usize,
    acc: crate::streams::Value,
    starts: bool,
    /// What memory gives, and needs no tile.
    early: Vec<Stmt>,
    /// From the tile to what the last step reads.
    steps: Vec<Stmt>,
    /// Writes the operand.
    last: Stmt,
    operand: FragRef,
}

/// The steps of a left operand that is computed, if it is.
pub(crate) fn computed_left(
    b: &mut Builder<'_>,
    pipeline: &Pipeline,
    stages: &[Stage],
    before: &[tilewright_tile::Stmt],
    body: &For,
    ring: RingId,
) -> Result<Option<Left>> {
    if pipeline.streams.iter().all(|s| s.computed.is_none()) {
        return Ok(None);
    }
    let [Step::Product { acc, a, b: right, starts }] = pipeline.steps[..] else {
        return Err(Error::unsupported("several products of operands that are computed"));
    };
    let stream = &pipeline.streams[a];
    let Some(computed) = stream.computed.filter(|_| stream.contiguous == 1) else {
        return Err(Error::unsupported("a computed operand that lies across the depth"));
    };
    if pipeline.streams[right].computed.is_some() {
        return Err(Error::unsupported("a right operand that is computed"));
    }
    let dtype = b.kernel.params[stream.view.param].dtype;
    let raw = b.frag("raw", dtype, stream.cols, Extent::Tile);
    let from = SmemTile {
        smem: stages[a].smem,
        slot: Slot::Ring(ring),
        row: b.row0(),
        col: Dim::new(0),
        rows: b.rows,
        cols: stream.cols,
    };
    let mut defs = definitions(&body.body.stmts);
    defs.extend(definitions(before));
    let results = BTreeMap::from([(computed.operand, raw)]);
    let mut e = Evaluator::new(b, defs, results, stream.cols, Dim::new(0));
    let operand =
        e.operand(&tilewright_tile::Operand { tile: computed.result, along: vec![0, 1] })?;
    if !e.once.is_empty() {
        return Err(Error::unsupported("a computed operand that reads vectors along the rows"));
    }
    let (early, mut steps): (Vec<Stmt>, Vec<Stmt>) =
        e.steps.drain(..).partition(|s| matches!(s, Stmt::Load { .. }));
    let Some(last) = steps.pop() else {
        return Err(Error::bug("a computed operand without a step"));
    };
    steps.insert(0, Stmt::FromSmem { dst: whole(raw), from });
    Ok(Some(Left { right, acc, starts, early, steps, last, operand }))
}

impl Left {
    /// The loop over the depth.
    #[allow(clippy::too_many_arguments, reason = "the parts of one loop, named")]
    pub(crate) fn multiply(
        self,
        pipeline: &Pipeline,
        stages: &[Stage],
        tiles: &RegisterTiles,
        body: &For,
        ring: RingId,
        (full, empty): (BarrierId, BarrierId),
        reach: &Reach,
    ) -> Products {
        let release = |slot: Slot| Stmt::Arrive {
            barrier: BarrierRef { barrier: empty, slot },
            reach: reach.clone(),
        };
        let var = Dim::sym(body.var.clone());
        let first = Cond { lhs: var.clone(), compare: Compare::Eq, rhs: body.lo.clone() };
        let right = &pipeline.streams[self.right];
        let mut step = self.early;
        step.push(Stmt::Wait {
            barrier: BarrierRef { barrier: full, slot: Slot::Ring(ring) },
            phase: Phase::Of(ring),
        });
        step.extend(self.steps);
        step.push(Stmt::WgmmaWait { pending: 0 });
        step.push(Stmt::If {
            cond: Cond { lhs: body.lo.clone(), compare: Compare::Lt, rhs: var },
            then: vec![release(Slot::Before(ring))],
            otherwise: Vec::new(),
        });
        step.push(self.last);
        step.push(Stmt::WgmmaFence);
        step.push(Stmt::Wgmma {
            acc: tiles.of(self.acc),
            a: WgmmaA::Frag(self.operand),
            b: SmemTile {
                smem: stages[self.right].smem,
                slot: Slot::Ring(ring),
                row: Dim::new(0),
                col: Dim::new(0),
                rows: right.rows,
                cols: right.cols,
            },
            turned: false,
            zero_if: self.starts.then_some(first),
        });
        step.push(Stmt::WgmmaCommit);
        step.push(Stmt::Advance { ring, by: Dim::new(1) });
        Products {
            issue: vec![Stmt::For {
                var: body.var.clone(),
                lo: body.lo.clone(),
                hi: body.hi.clone(),
                step: Dim::new(1),
                body: step,
            }],
            drain: vec![Stmt::WgmmaWait { pending: 0 }, release(Slot::Before(ring))],
        }
    }
}
