//! Loops whose reads may lie outside their tensors: windows at the border of an image.
//!
//! Every such read has guards. Where a loop's reads are guarded, most of its iterations are inside
//! all the same, and these run in a loop of their own, without guards:
//!
//! ```text
//! i = 0
//! while i < n:
//!     if i == a and a < b:  for k in a..b: body, all inside;  i = b
//!     else:                 body with guards;                 i = i + 1
//! ```
//!
//! `a..b` is computed from the guards when the loop begins. A guard `0 <= s*i + r < e` bounds `i`
//! from both sides; one that the loop does not move empties the range when it fails. Guards that
//! differ from lane to lane stay where they are.

use crate::emitter::{Emitter, Loc};
use tilewright_base::Result;
use tilewright_layout::{Dim, Range, linear_in, mentions, uppers};
use tilewright_tile::{TileId, TileOp};

/// Most tiles that are looked at for guards.
const MOST_TILES: u32 = 256;

/// Guards of one form, `0 <= step*i + rest + c < extent` for all `c` in `from..=to`.
struct Guard {
    step: i64,
    rest: Dim,
    from: i64,
    to: i64,
    extent: Dim,
}

impl Emitter<'_> {
    /// Adds the guards of all reads that the element at `coords` depends on.
    fn guards_of(
        &self,
        tile: TileId,
        coords: &[Dim],
        out: &mut Vec<(Dim, Dim)>,
        tiles: &mut u32,
    ) -> Result<()> {
        *tiles += 1;
        let (Loc::Virtual, Some(op)) = (&self.loc[tile.index()], self.defs[tile.index()]) else {
            return Ok(());
        };
        if *tiles > MOST_TILES {
            return Ok(());
        }
        match op {
            TileOp::Load { param, index, steps, .. } => {
                let global = crate::eval::global_coords(index, steps, coords);
                out.extend(self.param_place(*param, &global).guards);
            }
            TileOp::Map { args, .. } => {
                for arg in args {
                    let at = self.operand_coords(arg, coords)?;
                    self.guards_of(arg.tile, &at, out, tiles)?;
                }
            }
            TileOp::Permute { x, perm } => {
                let mut at = vec![Dim::new(0); perm.len()];
                for (i, &p) in perm.iter().enumerate() {
                    at[p] = coords[i].clone();
                }
                self.guards_of(*x, &at, out, tiles)?;
            }
            TileOp::Reshape(x) => {
                let at = self.reshape_coords(&self.extents(*x)?, &self.extents(tile)?, coords);
                self.guards_of(*x, &at, out, tiles)?;
            }
            TileOp::Broadcast(operand) => {
                let at = self.operand_coords(operand, coords)?;
                self.guards_of(operand.tile, &at, out, tiles)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The guards of `tile` at `coords` that are the same for all lanes.
    fn common_guards(&self, tile: TileId, coords: &[Dim]) -> Result<Vec<(Dim, Dim)>> {
        let (mut guards, mut tiles) = (Vec::new(), 0);
        let coords: Vec<Dim> = coords.iter().map(|c| self.facts.simplify(c)).collect();
        self.guards_of(tile, &coords, &mut guards, &mut tiles)?;
        guards.retain(|(x, extent)| {
            let x = self.settle(x);
            !mentions(&x, PROBE) && !self.varies(&x) && !self.varies(extent)
        });
        Ok(guards)
    }

    /// The guards in one form each; `None` when one depends on the loop in another way.
    fn joined_guards(&self, guards: &[(Dim, Dim)], symbol: &str) -> Option<Vec<Guard>> {
        let mut joined: Vec<Guard> = Vec::new();
        for (x, extent) in guards {
            let (step, rest) = linear_in(&self.settle(x), symbol)?;
            let step = step.as_const().filter(|s| *s >= 0)?;
            if mentions(&rest, symbol) || mentions(&self.settle(extent), symbol) {
                return None;
            }
            let constant = rest.terms().iter().filter(|(mono, _)| mono.is_empty());
            let constant: i64 = constant.map(|(_, c)| *c).sum();
            let rest = rest - constant;
            let same = |g: &&mut Guard| g.step == step && g.rest == rest && g.extent == *extent;
            match joined.iter_mut().find(same) {
                Some(g) => (g.from, g.to) = (g.from.min(constant), g.to.max(constant)),
                None => joined.push(Guard {
                    step,
                    rest,
                    from: constant,
                    to: constant,
                    extent: extent.clone(),
                }),
            }
        }
        Some(joined)
    }

    /// First and end of the iterations below `count` in which all guards hold.
    fn range_inside(&mut self, guards: &[Guard], count: &str) -> [String; 2] {
        let (mut a, mut b) = ("0".to_owned(), count.to_owned());
        let mut all = None::<String>;
        for g in guards {
            if g.step == 0 {
                for c in if g.from == g.to { vec![g.from] } else { vec![g.from, g.to] } {
                    let (x, e) = (self.dim(&(&g.rest + c)), self.dim(&g.extent));
                    let inside = self.c.cmp("ult", "i64", 1, &x, &e);
                    all = Some(match all {
                        None => inside,
                        Some(all) => self.c.bin("and", "i1", 1, &all, &inside),
                    });
                }
                continue;
            }
            // Smallest i with step*i >= x, for x at least 0.
            let reach = |e: &mut Self, x: Dim| {
                let x = e.dim(&x);
                let x = e.c.call("smax", "i64", 1, &[&x, "0"]);
                if g.step == 1 {
                    return x;
                }
                let x = e.c.bin("add", "i64", 1, &x, &(g.step - 1).to_string());
                e.c.bin("udiv", "i64", 1, &x, &g.step.to_string())
            };
            let from = reach(self, (&g.rest + g.from) * -1);
            let to = reach(self, &g.extent - &g.rest - g.to);
            a = self.c.call("smax", "i64", 1, &[&a, &from]);
            b = self.c.call("smin", "i64", 1, &[&b, &to]);
        }
        if let Some(all) = all {
            b = self.c.t.ins(format_args!("select i1 {all}, i64 {b}, i64 0"));
        }
        [a, b]
    }

    /// As [`Emitter::counted`], along an axis of a nest. `coords` gives the coordinates of `tile` in an iteration, with
    /// [`PROBE`] for what else moves inside it; iterations whose reads are inside go without guards.
    pub(crate) fn counted_inside(
        &mut self,
        count: &Dim,
        axis: usize,
        tile: TileId,
        coords: &dyn Fn(&Dim) -> Vec<Dim>,
        body: &mut dyn FnMut(&mut Self, Dim) -> Result<()>,
    ) -> Result<()> {
        let count = self.facts.simplify(count);
        let most = self.facts.bounds(&count).max;
        if most <= 2 || !self.assumed.is_empty() {
            return self.counted(&count, body);
        }
        let range = Range { min: 0, max: most - 1 };
        let slow = self.symbol();
        self.facts.declare(&slow, range, uppers(&count));
        let guards = self.common_guards(tile, &coords(&Dim::sym(slow.clone())))?;
        let joined = self.joined_guards(&guards, &slow).filter(|g| !g.is_empty());
        let Some(joined) = joined else {
            if self.knobs.jam <= 1 || !guards.is_empty() {
                return self.counted(&count, body);
            }
            let n = self.dim(&count);
            return self.side_by_side(axis, ["0", &n], &count, &|_, _| Vec::new(), body);
        };
        let n = self.dim(&count);
        let [a, b] = self.range_inside(&joined, &n);
        let some = self.c.cmp("slt", "i64", 1, &a, &b);
        let slot = self.c.t.alloca("i64");
        self.c.t.stmt(format_args!("store i64 0, ptr {slot}"));
        let [head, check, inside, outside, end] = [(); 5].map(|()| self.c.t.label());
        self.c.t.br(&head);
        self.c.t.place(&head);
        let i = self.c.t.ins(format_args!("load i64, ptr {slot}"));
        let more = self.c.cmp("slt", "i64", 1, &i, &n);
        self.c.t.br_if(&more, &check, &end);
        self.c.t.place(&check);
        let here = self.c.cmp("eq", "i64", 1, &i, &a);
        let here = self.c.bin("and", "i1", 1, &here, &some);
        self.c.t.br_if(&here, &inside, &outside);

        self.c.t.place(&inside);
        let holds = |e: &Self, x: &Dim| -> Vec<(Dim, Dim)> {
            let here = |s: &str| (s == &*slow).then(|| x.clone());
            let moved =
                |(x, extent): &(Dim, Dim)| (e.facts.simplify(&x.substitute(&here)), extent.clone());
            guards.iter().map(moved).collect()
        };
        self.side_by_side(axis, [&a, &b], &count, &holds, body)?;
        self.c.t.stmt(format_args!("store i64 {b}, ptr {slot}"));
        self.c.t.br(&head);

        self.c.t.place(&outside);
        self.push_scope();
        self.bind(&slow, &i);
        body(self, Dim::sym(slow))?;
        let next = self.c.t.ins(format_args!("add nsw i64 {i}, 1"));
        self.c.t.stmt(format_args!("store i64 {next}, ptr {slot}"));
        self.pop_scope();
        self.c.t.br(&head);
        self.c.t.place(&end);
        Ok(())
    }

    /// Coordinates for [`Emitter::counted_inside`]: `axis` at the loop's position, the lanes anywhere.
    pub(crate) fn probe(
        &mut self,
        base: &[Dim],
        coords: &[Dim],
        axis: usize,
        lane_axis: Option<usize>,
        most: i64,
    ) -> impl Fn(&Dim) -> Vec<Dim> + use<> {
        self.facts.declare(PROBE, Range { min: 0, max: most.saturating_sub(1).max(0) }, vec![]);
        let (base, coords) = (base.to_vec(), coords.to_vec());
        move |x| {
            let mut at = coords.clone();
            at[axis] = &base[axis] + x;
            if let Some(lane) = lane_axis {
                at[lane] = &base[lane] + Dim::sym(PROBE);
            }
            at
        }
    }
}

/// Stands for the position along the lanes.
const PROBE: &str = "$inside";
