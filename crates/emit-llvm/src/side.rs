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
//!
//! Elementary functions are long chains of operations that wait for each other. Those of all neighbours are written as one
//! call on a vector as wide as all of them, which LLVM takes apart operation by operation, so that a core has as many chains
//! to work on as there are neighbours: written one behind the other, the chains are longer than what it looks ahead.

use crate::emitter::{Emitter, Loc};
use crate::ops::{Code, constant, vector};
use tilewright_base::{DType, Result};
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

/// Functions of `f32` that are written for vectors of any width, in many steps.
fn is_chain(op: Op) -> bool {
    matches!(op, Op::Exp | Op::Exp2 | Op::Sigmoid | Op::Tanh | Op::Erf)
}

impl Code {
    /// An elementary function of several vectors of `f32`, each of `lanes`, in one call.
    fn together(&mut self, name: &str, lanes: u32, x: &[String]) -> Vec<String> {
        let parts: Vec<(u32, String)> = x.iter().map(|x| (lanes, x.clone())).collect();
        let width = lanes * x.len() as u32;
        let all = self.side_by_side(parts);
        let y = self.math(name, DType::F32, width, &[&all]);
        if width == lanes {
            return vec![y];
        }
        let parts =
            (0..width / lanes).map(|i| self.shuffled(width, [&y, "poison"], i * lanes, lanes));
        parts.collect()
    }

    /// Vectors of `f32` joined to one; each comes with its lanes.
    pub(crate) fn side_by_side(&mut self, mut parts: Vec<(u32, String)>) -> String {
        while parts.len() > 1 {
            // Pairs of one width; what has no partner waits for the next round.
            let mut joined = Vec::new();
            for pair in parts.chunks(2) {
                joined.push(match pair {
                    [(a, x), (b, y)] if a == b => (2 * a, self.shuffled(*a, [x, y], 0, 2 * a)),
                    [(a, x), (b, y)] => {
                        let y = self.shuffled(*b, [y, "poison"], 0, *a);
                        let both = self.shuffled(*a, [x, &y], 0, a + b);
                        (a + b, both)
                    }
                    one => one[0].clone(),
                });
            }
            parts = joined;
        }
        parts.pop().map_or_else(|| "poison".to_owned(), |(_, x)| x)
    }

    /// `count` lanes from `first` on of two vectors of `f32` side by side, each of `lanes`.
    pub(crate) fn shuffled(
        &mut self,
        lanes: u32,
        [x, y]: [&str; 2],
        first: u32,
        count: u32,
    ) -> String {
        let v = vector("float", lanes);
        let order: Vec<String> =
            (first..first + count).map(|i| format!("i32 {}", i.min(2 * lanes - 1))).collect();
        let order = order.join(", ");
        self.t.ins(format_args!("shufflevector {v} {x}, {v} {y}, <{count} x i32> <{order}>"))
    }
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
                    Known::Values(match (op, read.as_slice()) {
                        (op, [x]) if is_chain(*op) && from == DType::F32 && lanes > 1 => {
                            self.c.together(op.name(), lanes, x)
                        }
                        (op, read) => (0..coords.len())
                            .map(|i| {
                                let x: Vec<&str> = read.iter().map(|r| r[i].as_str()).collect();
                                match op {
                                    Op::Cast => self.c.cast(from, dtype, lanes, x[0]),
                                    op => self.c.op(*op, from, lanes, &x),
                                }
                            })
                            .collect(),
                    })
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

    /// The iterations `from..to` of a loop over `0..count`, as many at once as the knobs say; of the rest half as many, and
    /// so on.
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
        let mut at_once = i64::from(self.knobs.jam);
        let mut first = from.to_owned();
        while at_once > 1 {
            if most < at_once {
                at_once /= 2;
                continue;
            }
            let len = self.c.bin("sub", "i64", 1, to, &first);
            let turns = self.c.bin("sdiv", "i64", 1, &len, &at_once.to_string());
            let whole = self.c.bin("mul", "i64", 1, &turns, &at_once.to_string());
            let end = self.c.bin("add", "i64", 1, &first, &whole);
            self.turns(Some((axis, at_once)), [&first, &end], count, assumed, body)?;
            first = end;
            at_once /= 2;
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
