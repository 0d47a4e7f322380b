//! Turns of a loop whose products run in the order of the program: several of them take left operands that were made
//! in registers, or one tile is read as it is and as its transpose. Gradients of attention are such loops.
//!
//! ```text
//! turn t:  wait for what S reads;  S = A B_t          a group of its own
//!          wait for what U reads;  U = D E_t
//!          wait for S;  P = f(S)                      beside U
//!          C += P E_t'
//!          wait for U;  W = g(P, U)                   beside C
//!          G += W B_t'
//! ```
//!
//! Every product is a group. A step waits for the youngest group whose sums it reads or writes, or whose left operand it
//! overwrites, and groups complete in order. The last product of a turn runs on while the next one starts; its tiles are
//! let go when the next turn has waited for it.
//!
//! Vectors along the columns (one value for each query, where scores lie transposed) ride in shared memory with the tiles
//! of the stream that is let go last. Vectors along the rows that no turn changes are loaded once per item.

use crate::chain::{Chain, Left, Step};
use crate::epilogue::Evaluator;
use crate::hopper::{Builder, CONSUMER, STORE_BARRIER};
use crate::hopper_chain::{Feed, Form, Turns, frag_of, release, step_stmts, wait_full};
use crate::streams::{Defs, extents};
use std::collections::BTreeSet;
use tilewright_base::{Error, Result};
use tilewright_device::{
    BarrierRef, CachePolicy, Cond, Extent, FragId, Reach, RingId, Slot, Smem, SmemTile, Stmt,
    Swizzle, TensorMap,
};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::{Compare, For, TileId, TileOp};

/// Copies of vectors that come with the tiles of a stream.
#[derive(Default)]
pub(crate) struct Riders {
    /// The ring of that stream.
    pub(crate) host: Option<RingId>,
    /// Per turn.
    pub(crate) loads: Vec<Stmt>,
}

/// Makes room for the loop's vectors beside the tiles of its last product's right operand.
pub(crate) fn riders(
    b: &mut Builder<'_>,
    chain: &Chain,
    feeds: &mut [Feed],
    body: &For,
) -> Result<Riders> {
    let mut out = Riders::default();
    let last = chain.steps.iter().rev().find_map(|s| match s {
        Step::Product { b, .. } => Some(*b),
        _ => None,
    });
    let Some(host) = last.filter(|host| chain.in_order && !chain.invariant[*host]) else {
        return Ok(out);
    };
    let streamed: BTreeSet<TileId> = chain.streams.iter().map(|s| s.view.load).collect();
    for stmt in &body.body.stmts {
        let tilewright_tile::Stmt::Let(tile, TileOp::Load { param, index, steps, fill }) = stmt
        else {
            continue;
        };
        let shape = extents(b.kernel, *tile)?;
        let p = &b.kernel.params[*param];
        let along = shape.len() - 1;
        let zero = matches!(fill, Value::Float(v) if v.to_bits() == 0);
        let vector = shape.iter().rev().skip(1).all(|e| *e == 1) && shape[along] <= 256;
        let unit = p.layout.axes[along].stride.is(1) && p.layout.axes[along].block.is_none();
        let fits = vector && unit && zero && p.dtype.bits() == 32;
        if streamed.contains(tile) || !fits || steps.iter().any(|s| *s != 1) {
            continue;
        }
        let (name, dtype, cols) = (p.name.to_string(), p.dtype, shape[along]);
        let feed = &mut feeds[host];
        let smem = b.smem.push(Smem {
            name: format!("s{name}"),
            dtype,
            rows: 1,
            cols,
            contiguous: 1,
            swizzle: Swizzle::None,
            slots: b.rings[feed.ring].stages,
        });
        let map = b.maps.push(TensorMap {
            name,
            param: *param,
            box_shape: shape,
            contiguous: along,
            swizzle: Swizzle::None,
            tf32: false,
            windows: None,
        });
        feed.bytes += b.smem[smem].slot_bytes();
        let (row, col) = (Dim::new(0), Dim::new(0));
        let to = SmemTile { smem, slot: Slot::Ring(feed.ring), row, col, rows: 1, cols };
        b.riders.push((*tile, to.clone()));
        out.host = Some(feed.ring);
        out.loads.push(Stmt::TmaLoad {
            map,
            at: index.clone(),
            to,
            barrier: feed.full(),
            reach: Reach::Own,
            cache: CachePolicy::Normal,
        });
    }
    Ok(out)
}

/// Loads, once per item, the vectors along rows that steps of the loop take from before it.
pub(crate) fn rows_once(
    b: &mut Builder<'_>,
    chain: &mut Chain,
    defs: &Defs<'_>,
    outer: &Defs<'_>,
) -> Result<Vec<Stmt>> {
    let mut out = Vec::new();
    let wanted: BTreeSet<TileId> = chain
        .steps
        .iter()
        .filter_map(|s| match s {
            Step::Map { args, .. } => Some(args),
            _ => None,
        })
        .flatten()
        .filter(|a| a.along == [0] && outer.contains_key(&a.tile))
        .map(|a| a.tile)
        .collect();
    for tile in wanted {
        // One number for all rows is no vector.
        if chain.frags.contains_key(&tile) || !matches!(extents(b.kernel, tile)?[..], [n] if n > 1)
        {
            continue;
        }
        let column = Dim::new(0);
        let mut e = Evaluator::new(b, defs.clone(), chain.frags.clone(), 16, column);
        let frag = e.vector(tile, Some(0), Extent::PerRow)?.frag;
        out.append(&mut e.once);
        chain.frags.insert(tile, frag);
    }
    Ok(out)
}

/// A product that may still run.
#[derive(Clone, Debug)]
struct Flight {
    sums: FragId,
    left: Option<FragId>,
    /// Streams that it is the last of its turn to read.
    ends: Vec<usize>,
    /// Of the turn before.
    before: bool,
}

impl Turns<'_, '_> {
    /// All turns of the loop.
    pub(crate) fn loop_in_order(&mut self, body: &For) -> Result<Vec<Stmt>> {
        let mut out: Vec<Stmt> = Vec::new();
        for (feed, once) in self.feeds.iter().zip(&self.chain.invariant) {
            if *once {
                out.push(wait_full(feed));
            }
        }
        // What a turn leaves open depends on its steps alone.
        let (_, open) = self.turn_in_order(body, Form::Any, Vec::new())?;
        if open.iter().any(|f| !f.ends.is_empty()) && self.b.schedule.stages < 2 {
            return Err(Error::unsupported("turns that overlap in a ring of one stage"));
        }
        let before: Vec<Flight> =
            open.iter().map(|f| Flight { before: true, ..f.clone() }).collect();
        let chain = self.chain;
        let mut over = |lo: Dim, hi: Dim, form: Form| -> Result<Stmt> {
            let (turn, left) = self.turn_in_order(body, form, before.clone())?;
            if left.len() != open.len() {
                return Err(Error::bug("turns that leave different products open"));
            }
            Ok(Stmt::For { var: body.var.clone(), lo, hi, step: Dim::new(1), body: turn })
        };
        let mut turns = Vec::new();
        match &chain.cut {
            Some(cut) => {
                let name: std::sync::Arc<str> = "cut".into();
                let value = cut.min_with(&body.hi).max_with(&body.lo);
                turns.push(Stmt::Let { name: name.clone(), value });
                turns.push(over(body.lo.clone(), Dim::sym(name.clone()), Form::Early)?);
                turns.push(over(Dim::sym(name), body.hi.clone(), Form::Any)?);
            }
            None => turns.push(over(body.lo.clone(), body.hi.clone(), Form::Any)?),
        }
        turns.push(Stmt::WgmmaWait { pending: 0 });
        for stream in open.iter().flat_map(|f| &f.ends) {
            turns.push(self.release_before(*stream));
        }
        let cond = Cond { lhs: body.lo.clone(), compare: Compare::Lt, rhs: body.hi.clone() };
        out.push(Stmt::If { cond, then: turns, otherwise: Vec::new() });
        for (feed, once) in self.feeds.iter().zip(&self.chain.invariant) {
            if *once {
                out.extend(release(feed));
            }
        }
        Ok(out)
    }

    /// One turn, with the products of the turn before that are open, and those that it leaves open.
    fn turn_in_order(
        &mut self,
        body: &For,
        form: Form,
        mut open: Vec<Flight>,
    ) -> Result<(Vec<Stmt>, Vec<Flight>)> {
        let mut out = Vec::new();
        let steps = &self.chain.steps;
        let mut seen: BTreeSet<usize> = BTreeSet::new();
        for (i, step) in steps.iter().enumerate() {
            let Step::Product { result, a, b, .. } = step else {
                let made = frag_of(self.chain, step.result())?.frag;
                let mut touched = BTreeSet::from([made]);
                touched.extend(step.uses().iter().filter_map(|t| self.chain.frags.get(t)));
                let blocks =
                    |f: &Flight| touched.contains(&f.sums) || f.left.is_some_and(|l| l == made);
                if let Some(last) = open.iter().rposition(blocks) {
                    let pending = (open.len() - 1 - last) as u32;
                    out.push(Stmt::WgmmaWait { pending });
                    let done: Vec<Flight> = open.drain(..=last).collect();
                    out.extend(self.let_go(body, &done));
                }
                out.extend(step_stmts(self.b, self.defs, self.chain, step, form)?);
                continue;
            };
            let reads = |step: &Step| -> Vec<usize> {
                let Step::Product { a, b, .. } = step else { return Vec::new() };
                let left = match a {
                    Left::Stream(a) => Some(*a),
                    Left::Registers(_) => None,
                };
                left.into_iter().chain([*b]).filter(|s| !self.chain.invariant[*s]).collect()
            };
            let later: Vec<usize> = steps[i + 1..].iter().flat_map(reads).collect();
            let mut ends = reads(step);
            ends.retain(|s| !later.contains(s));
            ends.dedup();
            let host = Slot::Ring(self.feeds[*b].ring);
            if ends.contains(b) && self.b.riders.iter().any(|(_, at)| at.slot == host) {
                if i + 1 != steps.len() {
                    return Err(Error::unsupported("vectors that are read after their stream"));
                }
                // One thread will let go of what all of them have read; the copy engine writes there.
                let id = Dim::sym(CONSUMER) + &Dim::new(STORE_BARRIER);
                out.extend([Stmt::FenceAsync, Stmt::NamedSync { id, threads: 128 }]);
            }
            for stream in reads(step) {
                if seen.insert(stream) {
                    out.push(wait_full(&self.feeds[stream]));
                }
            }
            out.extend([Stmt::WgmmaFence, self.product(step)?, Stmt::WgmmaCommit]);
            let left = match a {
                Left::Registers(tile) => Some(frag_of(self.chain, *tile)?.frag),
                Left::Stream(_) => None,
            };
            let sums = frag_of(self.chain, *result)?.frag;
            open.push(Flight { sums, left, ends, before: false });
        }
        // One product runs on beside the first of the next turn: more would hold the registers of their left operands.
        if open.len() > 1 {
            out.push(Stmt::WgmmaWait { pending: 1 });
            let last = open.pop();
            out.extend(self.let_go(body, &open));
            open = last.into_iter().collect();
        }
        for stream in open.iter().filter(|f| !f.before).flat_map(|f| &f.ends) {
            out.push(Stmt::Advance { ring: self.feeds[*stream].ring, by: Dim::new(1) });
        }
        if let Some((from, to)) = self.chain.copies.first() {
            let names = (&self.b.frags[*from].name, &self.b.frags[*to].name);
            return Err(Error::unsupported(format!("a loop that copies {names:?} at each end")));
        }
        if open.iter().any(|f| f.before) {
            return Err(Error::unsupported("turns that wait for none of their products"));
        }
        Ok((out, open))
    }

    /// Lets go of the tiles that complete products were the last to read.
    fn let_go(&self, body: &For, done: &[Flight]) -> Vec<Stmt> {
        let mut out = Vec::new();
        let ends = |before: bool| {
            done.iter().filter(move |f| f.before == before).flat_map(|f| f.ends.iter().copied())
        };
        let old: Vec<Stmt> = ends(true).map(|s| self.release_before(s)).collect();
        if !old.is_empty() {
            let var = Dim::sym(body.var.clone());
            let cond = Cond { lhs: body.lo.clone(), compare: Compare::Lt, rhs: var };
            out.push(Stmt::If { cond, then: old, otherwise: Vec::new() });
        }
        out.extend(ends(false).flat_map(|s| release(&self.feeds[s])));
        out
    }

    fn release_before(&self, stream: usize) -> Stmt {
        let feed = &self.feeds[stream];
        let barrier = BarrierRef { barrier: feed.empty, slot: Slot::Before(feed.ring) };
        Stmt::Arrive { barrier, reach: Reach::Own }
    }
}
