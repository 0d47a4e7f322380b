//! Neighbours side by side: several elements (or vectors) of a tile along one axis, computed together.
//!
//! Windows of neighbouring outputs overlap, and all of them are multiplied by the same weights. Computed one
//! after the other, each output loads all of its window and all weights. With `jam` neighbours in one turn of the
//! loop, step by step of the expression for all of them, what they share is loaded once:
//!
//! ```text
//! for i in steps of 4:  for each tap:  w = weight[tap];  sum0 += x[i + tap] * w; ... sum3 += x[i + 3 + tap] * w
//! ```
//!
//! Loads of one address are made one by LLVM; here only their order says that they are wanted together.

use crate::emitter::{Emitter, Loc};
use crate::ops::constant;
use tilewright_base::Result;
use tilewright_expr::{Node, Op};
use tilewright_layout::{Dim, Range, uppers};
use tilewright_tile::{Operand, TileId, TileOp};

/// What a node of a function is, while it is written out for all neighbours.
enum Known {
    /// An operand that nobody has asked for yet, by its number.
    Operand(usize),
    /// One register for each neighbour.
    Values(Vec<String>),
}

impl Emitter<'_> {
    /// The coordinates of all elements that one turn of the loops computes.
    fn neighbours(&self, coords: &[Dim]) -> Vec<Vec<Dim>> {
        let Some((axis, count)) = self.side_by_side else { return vec![coords.to_vec()] };
        let at = |i: i64| {
            let mut at = coords.to_vec();
            at[axis] = &at[axis] + i;
            at
        };
        (0..count).map(at).collect()
    }

    /// Evaluates a tile at `coords`, and at the neighbours that belong to this turn, and hands each to `store`.
    #[allow(clippy::type_complexity, reason = "what is done with one element")]
    pub(crate) fn each_neighbour(
        &mut self,
        tile: TileId,
        coords: &[Dim],
        store: &mut dyn FnMut(&mut Self, &[Dim], &str) -> Result<()>,
    ) -> Result<()> {
        let all = self.neighbours(coords);
        let values = self.eval_all(tile, &all)?;
        for (at, value) in all.iter().zip(&values) {
            store(self, at, value)?;
        }
        Ok(())
    }

    /// The elements at each of `coords`, as [`Emitter::eval`] gives them one by one.
    fn eval_all(&mut self, tile: TileId, coords: &[Vec<Dim>]) -> Result<Vec<String>> {
        let varies = coords.iter().flatten().any(|c| self.varies(c));
        let one_by_one = coords.len() == 1
            || !matches!(self.loc[tile.index()], Loc::Virtual)
            || (self.lanes > 1 && !varies);
        let op = self.defs[tile.index()].filter(|_| !one_by_one).cloned();
        match op {
            Some(TileOp::Map { func, args }) => self.map_all(&func, &args, coords),
            Some(TileOp::Permute { x, perm }) => {
                let moved = coords.iter().map(|at| {
                    let mut from = vec![Dim::new(0); perm.len()];
                    perm.iter().enumerate().for_each(|(i, &p)| from[p] = at[i].clone());
                    from
                });
                let moved: Vec<Vec<Dim>> = moved.collect();
                self.eval_all(x, &moved)
            }
            Some(TileOp::Reshape(x)) => {
                let (from, to) = (self.extents(x)?, self.extents(tile)?);
                let seen = coords.iter().map(|at| self.reshape_coords(&from, &to, at)).collect();
                let seen: Vec<Vec<Dim>> = seen;
                self.eval_all(x, &seen)
            }
            _ => coords.iter().map(|at| self.eval(tile, at)).collect(),
        }
    }

    /// A map for all neighbours, operation by operation; operands are evaluated when they are first used.
    fn map_all(
        &mut self,
        func: &tilewright_expr::Func,
        args: &[Operand],
        coords: &[Vec<Dim>],
    ) -> Result<Vec<String>> {
        let lanes = self.lanes;
        let mut known: Vec<Known> = Vec::new();
        for (_, node, dtype) in func.nodes() {
            let values = match node {
                Node::Param(p) => Known::Operand(*p as usize),
                Node::Const(v) => Known::Values(vec![constant(dtype, *v, lanes); coords.len()]),
                Node::Op(op, operands) => {
                    let mut read = Vec::with_capacity(operands.len());
                    for operand in operands {
                        read.push(self.known_all(&mut known, operand.index(), args, coords)?);
                    }
                    let from = func.dtype_of(operands[operands.len() - 1]);
                    let values = (0..coords.len()).map(|i| {
                        let x: Vec<&str> = read.iter().map(|r| r[i].as_str()).collect();
                        match op {
                            Op::Cast => self.c.cast(from, dtype, lanes, x[0]),
                            op => self.c.op(*op, from, lanes, &x),
                        }
                    });
                    Known::Values(values.collect())
                }
            };
            known.push(values);
        }
        self.known_all(&mut known, func.result().index(), args, coords)
    }

    /// The values of one node of a map.
    fn known_all(
        &mut self,
        known: &mut [Known],
        node: usize,
        args: &[Operand],
        coords: &[Vec<Dim>],
    ) -> Result<Vec<String>> {
        let number = match &known[node] {
            Known::Values(values) => return Ok(values.clone()),
            Known::Operand(number) => *number,
        };
        let arg = &args[number];
        let at = coords.iter().map(|at| self.operand_coords(arg, at));
        let at = at.collect::<Result<Vec<Vec<Dim>>>>()?;
        let values = match at.windows(2).all(|w| w[0] == w[1]) {
            true => vec![self.eval(arg.tile, &at[0])?; at.len()],
            false => self.eval_all(arg.tile, &at)?,
        };
        known[node] = Known::Values(values.clone());
        Ok(values)
    }

    /// The iterations `from..to` of a loop over `0..count`, as many at once as the knobs say, the rest one by one.
    /// `assumed` gives what holds in the iteration that it is given.
    #[allow(clippy::type_complexity, reason = "facts as the emitter keeps them")]
    pub(crate) fn side_by_side(
        &mut self,
        axis: usize,
        [from, to]: [&str; 2],
        count: &Dim,
        assumed: &dyn Fn(&Self, &Dim) -> Vec<(Dim, Dim)>,
        body: &mut dyn FnMut(&mut Self, Dim) -> Result<()>,
    ) -> Result<()> {
        let most = self.facts.bounds(count).max;
        let at_once = i64::from(self.knobs.jam);
        let mut first = from.to_owned();
        if at_once > 1 && most >= at_once {
            let len = self.c.bin("sub", "i64", 1, to, from);
            let turns = self.c.bin("sdiv", "i64", 1, &len, &at_once.to_string());
            let whole = self.c.bin("mul", "i64", 1, &turns, &at_once.to_string());
            let end = self.c.bin("add", "i64", 1, from, &whole);
            self.turns(Some((axis, at_once)), [from, &end], count, assumed, body)?;
            first = end;
        }
        self.turns(None, [&first, to], count, assumed, body)
    }

    /// A loop over `from..to` with so many iterations in each turn.
    #[allow(clippy::type_complexity, reason = "facts as the emitter keeps them")]
    fn turns(
        &mut self,
        together: Option<(usize, i64)>,
        [from, to]: [&str; 2],
        count: &Dim,
        assumed: &dyn Fn(&Self, &Dim) -> Vec<(Dim, Dim)>,
        body: &mut dyn FnMut(&mut Self, Dim) -> Result<()>,
    ) -> Result<()> {
        let step = together.map_or(1, |(_, n)| n);
        let name = self.symbol();
        let max = self.facts.bounds(count).max - step;
        self.facts.declare(&name, Range { min: 0, max }, uppers(&(count - (step - 1))));
        self.push_scope();
        let open = self.c.t.begin_loop(from, to, &step.to_string());
        self.bind(&name, &open.iv);
        let here = Dim::sym(name);
        self.assumed = (0..step).flat_map(|i| assumed(self, &(&here + i))).collect();
        self.side_by_side = together;
        self.push_scope();
        let written = body(self, here);
        self.pop_scope();
        self.side_by_side = None;
        self.assumed.clear();
        written?;
        self.c.t.end_loop(open);
        self.pop_scope();
        Ok(())
    }
}
