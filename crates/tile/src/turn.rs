//! Heads that turn: the halves of each are mixed with each other and with tables, as rotary positions are.
//!
//! ```text
//! t: [rows, heads * width], tables: [rows, width / 2]
//! x = t[r, head * width + i]    y = t[r, head * width + width / 2 + i]      head < 0 turns, counted from `first`
//! x' = f(x, y, tables[r, i])    y' = g(x, y, tables[r, i])
//! ```
//!
//! Tile programs have no operator for it: [`Turn::build`] writes it with those that there are, each half as a sum over both with the other one as
//! zeros. [`Turn::read`] knows what it wrote, so a back end that holds a row's halves in the same registers turns them there.

use crate::ir::{Kernel, Operand, ReduceKind, TileId, TileOp, TileType};
use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Op};
use tilewright_layout::Dim;

/// Heads side by side along the lines of a tile: see the head of this file.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// `[rows, heads * width]`
    pub tile: TileId,
    /// Columns of a head; even.
    pub width: i64,
    /// The number of the tile's first head, less that of the first one that stays as it is: heads below 0 turn.
    pub first: Dim,
    /// From both halves, and an element of each table, to the new first and second half.
    pub halves: [Func; 2],
    /// `[rows, width / 2]`
    pub tables: Vec<TileId>,
}

/// An element of one half, and zeros in place of the other.
fn half_of(dtype: DType, second: bool) -> Func {
    let mut f = FuncBuilder::new();
    let (x, side) = (f.param("x", dtype), f.param("side", DType::I64));
    let which = f.constant_int(i64::from(second), DType::I64);
    let (here, zero) = (f.op(Op::Eq, &[side, which]), f.constant_int(0, DType::I64));
    let zero = f.cast(zero, dtype);
    let y = f.op(Op::Select, &[here, x, zero]);
    f.finish(y)
}

/// An element of the result: of a head that turns, its half; else as it was.
fn chosen(dtype: DType) -> Func {
    let mut f = FuncBuilder::new();
    let [x, low, high] = ["x", "low", "high"].map(|name| f.param(name, dtype));
    let [head, side] = ["head", "side"].map(|name| f.param(name, DType::I64));
    let zero = f.constant_int(0, DType::I64);
    let (turns, lower) = (f.op(Op::Lt, &[head, zero]), f.op(Op::Eq, &[side, zero]));
    let y = f.op(Op::Select, &[lower, low, high]);
    let y = f.op(Op::Select, &[turns, y, x]);
    f.finish(y)
}

fn along(tile: TileId, axes: &[usize]) -> Operand {
    Operand { tile, along: axes.to_vec() }
}

impl Turn {
    /// Writes the steps, each through `emit`, for a tile of so many rows and heads of elements of `dtype`. The result is of the tile's shape.
    pub fn build(
        &self,
        (rows, heads): (&Dim, &Dim),
        dtype: DType,
        emit: &mut dyn FnMut(TileOp, TileType) -> TileId,
    ) -> TileId {
        let (two, half) = (Dim::new(2), Dim::new(self.width / 2));
        let four = TileType::new(dtype, [rows.clone(), heads.clone(), two.clone(), half.clone()]);
        let three = TileType::new(dtype, [rows.clone(), heads.clone(), half]);
        let apart = emit(TileOp::Reshape(self.tile), four.clone());
        let count = |start: &Dim| TileOp::Iota { axis: 0, start: start.clone() };
        let side = emit(count(&Dim::new(0)), TileType::new(DType::I64, [two]));
        let head = emit(count(&self.first), TileType::new(DType::I64, [heads.clone()]));
        let mut args = Vec::new();
        for second in [false, true] {
            let of = vec![along(apart, &[0, 1, 2, 3]), along(side, &[2])];
            let x = emit(TileOp::Map { func: half_of(dtype, second), args: of }, four.clone());
            let sum = TileOp::Reduce { kind: ReduceKind::Sum, x, axis: 2, limit: None };
            args.push(along(emit(sum, three.clone()), &[0, 1, 2]));
        }
        args.extend(self.tables.iter().map(|t| along(*t, &[0, 2])));
        let mut new = vec![along(apart, &[0, 1, 2, 3])];
        for func in &self.halves {
            let map = TileOp::Map { func: func.clone(), args: args.clone() };
            new.push(along(emit(map, three.clone()), &[0, 1, 3]));
        }
        new.extend([along(head, &[1]), along(side, &[2])]);
        let turned = emit(TileOp::Map { func: chosen(dtype), args: new }, four);
        let whole = TileType::new(dtype, [rows.clone(), heads.clone() * self.width]);
        emit(TileOp::Reshape(turned), whole)
    }

    /// What [`Turn::build`] wrote, if `tile` is its result; `def` gives the step that makes a tile.
    pub fn read<'k>(
        kernel: &Kernel,
        def: &dyn Fn(TileId) -> Option<&'k TileOp>,
        tile: TileId,
    ) -> Option<Turn> {
        let TileOp::Reshape(turned) = def(tile)? else { return None };
        let TileOp::Map { func, args } = def(*turned)? else { return None };
        let dtype = kernel.ty(tile).dtype;
        let [apart, low, high, head, side] = &args[..] else { return None };
        let TileOp::Reshape(from) = def(apart.tile)? else { return None };
        let (TileOp::Map { func: f, args: given }, TileOp::Map { func: g, args: same }) =
            (def(low.tile)?, def(high.tile)?)
        else {
            return None;
        };
        let TileOp::Iota { axis: 0, start } = def(head.tile)? else { return None };
        let TileOp::Iota { axis: 0, start: zero } = def(side.tile)? else { return None };
        let (halves, tables) = given.split_at_checked(2)?;
        for (second, half) in [false, true].into_iter().zip(halves) {
            let TileOp::Reduce { kind: ReduceKind::Sum, x, axis: 2, limit: None } = def(half.tile)?
            else {
                return None;
            };
            let TileOp::Map { func, args } = def(*x)? else { return None };
            let wanted = vec![along(apart.tile, &[0, 1, 2, 3]), along(side.tile, &[2])];
            if *func != half_of(dtype, second) || *args != wanted || half.along != [0, 1, 2] {
                return None;
            }
        }
        let [rows, heads, two, half] = &kernel.ty(apart.tile).shape[..] else { return None };
        let half = half.as_const().filter(|n| *n > 0)?;
        let whole = [rows.clone(), heads.clone() * (2 * half)];
        let axes = [&apart.along, &low.along, &high.along, &head.along, &side.along];
        let wanted: [&[usize]; 5] = [&[0, 1, 2, 3], &[0, 1, 3], &[0, 1, 3], &[1], &[2]];
        let fits = *func == chosen(dtype)
            && given == same
            && zero.is(0)
            && two.is(2)
            && axes.into_iter().zip(wanted).all(|(a, b)| a == b)
            && [*from, tile].iter().all(|t| kernel.ty(*t).shape[..] == whole)
            && tables.iter().all(|t| {
                t.along == [0, 2] && kernel.ty(t.tile).shape[..] == [rows.clone(), Dim::new(half)]
            });
        fits.then(|| Turn {
            tile: *from,
            width: 2 * half,
            first: start.clone(),
            halves: [f.clone(), g.clone()],
            tables: tables.iter().map(|t| t.tile).collect(),
        })
    }
}
