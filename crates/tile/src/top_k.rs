//! [`TopK`]: programs that find the largest or smallest elements of rows, written in one way, so that lowerings know them.
//!
//! The program says what is meant, in the steps of the language: each element is found in a pass of its own over the
//! row. A lowering that knows a better way asks [`TopK::of`] and takes that instead.

use crate::builder::KernelBuilder;
use crate::ir::{Access, Kernel, Operand, ParamId, ReduceKind, Stmt, TileId, TileType};
use tilewright_base::DType;
use tilewright_expr::{ExprId, FuncBuilder, Op, Value};
use tilewright_layout::Dim;

/// The `count` largest (or smallest) elements of every row of `x`, in their order: values, and positions (`i64`).
///
/// Among equals the first comes first; both zeros are equal, and NaN is the largest of numbers. A row has at least
/// `count` elements. All three tensors have rows and columns, `values` and `places` `count` of the latter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopK {
    /// The rows: `f32`, `f16` or `bf16`.
    pub x: ParamId,
    /// Values, of the type of `x`.
    pub values: ParamId,
    /// Positions.
    pub places: ParamId,
    /// How many are found.
    pub count: Dim,
    /// The largest, not the smallest.
    pub largest: bool,
}

fn along(tile: TileId, axis: usize) -> Operand {
    Operand { tile, along: vec![axis] }
}

fn map(
    k: &mut KernelBuilder,
    shape: &[Dim],
    args: Vec<Operand>,
    f: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
) -> TileId {
    let mut func = FuncBuilder::new();
    let params: Vec<ExprId> = args
        .iter()
        .enumerate()
        .map(|(i, a)| func.param(&format!("a{i}"), k.ty(a.tile).dtype))
        .collect();
    let result = f(&mut func, &params);
    k.map(func.finish(result), args, shape.to_vec())
}

/// Not taken yet.
fn free(f: &mut FuncBuilder, taken: ExprId) -> ExprId {
    let zero = f.constant_int(0, DType::I32);
    f.op(Op::Eq, &[taken, zero])
}

impl TopK {
    /// Writes the program of the rows from `row0` on: tiles of `bm` rows and `bn` columns, at least as many as `x` has.
    /// The builder has no tiles yet; `turn` names the loop.
    pub fn write(&self, k: &mut KernelBuilder, turn: &str, (bm, bn, row0): (&Dim, &Dim, &Dim)) {
        let kind = if self.largest { ReduceKind::Max } else { ReduceKind::Min };
        let worst = if self.largest { f64::NEG_INFINITY } else { f64::INFINITY };
        let (dtype, n) = {
            let x = k.param_info(self.x);
            (x.dtype, x.layout.axes[1].extent.clone())
        };
        let far = i64::from(i32::MAX);
        let (plane, row) = (vec![bm.clone(), bn.clone()], vec![bm.clone()]);
        let zero = Dim::new(0);
        let at = vec![row0.clone(), zero.clone()];
        let raw = k.load_with(self.x, at, vec![1, 1], Value::Float(worst), plane.clone());
        let args = vec![k.plain(raw)];
        let x = map(k, &plane, args, |f, a| f.cast(a[0], DType::F32));
        let cols = k.iota(DType::I32, 0, zero.clone(), vec![bn.clone()]);
        let nothing = k.full(Value::Int(0), TileType::new(DType::I32, plane.clone()));
        let (turn, carried) = k.begin_for(turn, zero, self.count.clone(), &[nothing]);
        let taken = carried[0];
        // For the smallest, NaN comes last: as if it were the last of the numbers, behind those.
        let args = vec![k.plain(x), k.plain(taken)];
        let largest = self.largest;
        let rest = map(k, &plane, args, |f, a| {
            let mut free = free(f, a[1]);
            if !largest {
                let number = f.op(Op::Eq, &[a[0], a[0]]);
                free = f.op(Op::And, &[free, number]);
            }
            let worst = f.constant(worst, DType::F32);
            f.op(Op::Select, &[free, a[0], worst])
        });
        let best = k.reduce(kind, rest, 1, Some(n.clone()));
        // The first place where the best stands; where all that is left is as nothing, the first such, numbers before NaN.
        let args = vec![k.plain(x), k.plain(taken), along(best, 0), along(cols, 1)];
        let stands = map(k, &plane, args, |f, a| {
            let free = free(f, a[1]);
            let same = f.op(Op::Eq, &[a[0], a[2]]);
            let (nan, best_nan) = (f.op(Op::IsNan, &[a[0]]), f.op(Op::IsNan, &[a[2]]));
            let both = f.op(Op::And, &[nan, best_nan]);
            let hit = f.op(Op::Or, &[same, both]);
            let hit = f.op(Op::And, &[free, hit]);
            let far = f.constant_int(far, DType::I32);
            f.op(Op::Select, &[hit, a[3], far])
        });
        let first = k.reduce(ReduceKind::Min, stands, 1, Some(n.clone()));
        let args = vec![k.plain(taken), along(cols, 1)];
        let left = map(k, &plane, args, |f, a| {
            let free = free(f, a[0]);
            let far = f.constant_int(far, DType::I32);
            f.op(Op::Select, &[free, a[1], far])
        });
        let any = k.reduce(ReduceKind::Min, left, 1, Some(n));
        let args = vec![k.plain(first), k.plain(any)];
        let place = map(k, &row, args, |f, a| {
            let far = f.constant_int(far, DType::I32);
            let none = f.op(Op::Eq, &[a[0], far]);
            f.op(Op::Select, &[none, a[1], a[0]])
        });
        // What stands there: the best, or NaN where only that is left.
        let args = vec![k.plain(best), k.plain(first)];
        let value = map(k, &row, args, |f, a| {
            let far = f.constant_int(far, DType::I32);
            let none = f.op(Op::Eq, &[a[1], far]);
            let nan = f.constant(f64::NAN, DType::F32);
            let value = f.op(Op::Select, &[none, nan, a[0]]);
            f.cast(value, dtype)
        });
        let args = vec![k.plain(place)];
        let position = map(k, &row, args, |f, a| f.cast(a[0], DType::I64));
        let args = vec![along(cols, 1), along(place, 0), k.plain(taken)];
        let next = map(k, &plane, args, |f, a| {
            let hit = f.op(Op::Eq, &[a[0], a[1]]);
            let one = f.constant_int(1, DType::I32);
            f.op(Op::Select, &[hit, one, a[2]])
        });
        for (param, tile) in [(self.values, value), (self.places, position)] {
            let line = k.reshape(tile, vec![bm.clone(), Dim::new(1)]);
            k.store(param, vec![row0.clone(), turn.clone()], line);
        }
        k.end_for(&[next]);
    }

    /// What a kernel finds, when it is such a program and nothing else, with one axis of the grid for its rows.
    pub fn of(kernel: &Kernel) -> Option<TopK> {
        let [(x, from), (values, _), (places, _)] = kernel.params.iter().collect::<Vec<_>>()[..]
        else {
            return None;
        };
        let ([axis], [bm, bn]) = (kernel.grid.as_slice(), kernel.tiles.as_slice()) else {
            return None;
        };
        let fits = matches!(from.dtype, DType::F32 | DType::F16 | DType::BF16)
            && from.access == Access::In
            && kernel.params.iter().all(|(_, p)| p.layout.rank() == 2);
        let the_loop = kernel.body.stmts.iter().find_map(|s| match s {
            Stmt::For(f) => Some(f),
            _ => None,
        })?;
        if !fits {
            return None;
        }
        [true, false].into_iter().find_map(|largest| {
            let top = TopK { x, values, places, count: the_loop.hi.clone(), largest };
            let mut k = KernelBuilder::new(&kernel.name);
            let (bm, bn) = (k.tile(bm), k.tile(bn));
            for (_, p) in kernel.params.iter() {
                k.param(&p.name, p.dtype, p.layout.clone(), p.access);
            }
            let row0 = k.grid(&axis.name, axis.extent.clone()) * &bm;
            top.write(&mut k, &the_loop.var, (&bm, &bn, &row0));
            (k.finish().body == kernel.body).then_some(top)
        })
    }
}
