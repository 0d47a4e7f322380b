//! The largest or smallest elements of rows as a kernel of a GPU.
//!
//! The row stays in registers, and each of the `k` elements is found in a pass of its own over it: meant for few of
//! rows that a block holds. What is more is the host's.

use crate::block::KernelParts;
use crate::lowering::Lowering;
use crate::rows::{func, identity};
use tilewright_base::{DType, Result};
use tilewright_expr::{ExprId, FuncBuilder, Op as ExprOp, Value};
use tilewright_graph::{NodeId, Op};
use tilewright_layout::{Dim, Layout, numel};
use tilewright_plan::{BufferId, Note};
use tilewright_tile::{KernelBuilder, Operand, ReduceKind, TileId, TileType};

/// The longest rows, and the most elements of each.
const LONGEST: i64 = 16384;
const MOST: i64 = 64;

/// Rows and columns, and how many are wanted.
struct Sizes {
    rows: Dim,
    cols: Dim,
    count: Dim,
    largest: bool,
}

impl Lowering<'_> {
    fn top_k_sizes(&self, id: NodeId) -> Option<Sizes> {
        let node = &self.graph.nodes[id];
        let Op::TopK { axis, k, largest } = &node.op else { return None };
        let x = node.inputs[0];
        let shape = self.graph.shape(x);
        let float = matches!(self.graph.dtype(x), DType::F32 | DType::F16 | DType::BF16);
        let within = |d: &Dim, most: i64| d.as_const().is_some_and(|v| (1..=most).contains(&v));
        let fits = float
            && within(k, MOST)
            && within(&shape[*axis], LONGEST)
            && shape[axis + 1..].iter().all(|d| d.is(1));
        fits.then(|| Sizes {
            rows: numel(&shape[..*axis]),
            cols: shape[*axis].clone(),
            count: k.clone(),
            largest: *largest,
        })
    }

    /// A kernel that finds the largest (or smallest) elements of rows in row-major buffers: values and positions, in their
    /// order. False: it is the host's.
    pub(crate) fn top_k(
        &mut self,
        id: NodeId,
        (inputs, outputs): (&[BufferId], &[BufferId]),
        note: &Note,
    ) -> Result<bool> {
        let ([x], [values, places]) = (inputs, outputs) else { return Ok(false) };
        let sizes = if self.on_gpu() { self.top_k_sizes(id) } else { None };
        let Some(sizes) = sizes else { return Ok(false) };
        let dtype = self.graph.dtype(self.graph.nodes[id].inputs[0]);
        let mut k = KernelParts::new(format!("top_k_{id}"), &self.graph.symbols);
        let plane = |cols: &Dim| Layout::row_major(&[sizes.rows.clone(), cols.clone()]);
        let x = k.input(*x, dtype, plane(&sizes.cols));
        let values = k.output(*values, dtype, plane(&sizes.count));
        let places = k.output(*places, DType::I64, plane(&sizes.count));
        let ((bm, bm_name), (bn, bn_name)) = (k.tile("BM"), k.tile("BN"));
        let row0 = k.grid("p", sizes.rows.ceil_div(&bm)) * &bm;
        let turn = k.fresh("turn");
        write(&mut k.b, (&sizes, dtype, &turn), [x, values, places], (&bm, &bn, &row0));
        let tiles = vec![(bm_name, 1), (bn_name, sizes.cols.as_const().unwrap_or(1))];
        let knobs = self.knobs();
        self.launch_forms(k, tiles, knobs, Vec::new(), note.clone())?;
        Ok(true)
    }
}

fn along(tile: TileId, axis: usize) -> Operand {
    Operand { tile, along: vec![axis] }
}

fn map(
    k: &mut KernelBuilder,
    shape: &[Dim],
    args: Vec<Operand>,
    f: impl Fn(&mut FuncBuilder, &[ExprId]) -> ExprId,
) -> TileId {
    let types: Vec<DType> = args.iter().map(|a| k.ty(a.tile).dtype).collect();
    k.map(func(&types, |b, a| f(b, a)), args, shape.to_vec())
}

fn write(
    k: &mut KernelBuilder,
    (sizes, dtype, turn): (&Sizes, DType, &str),
    [x, values, places]: [tilewright_tile::ParamId; 3],
    (bm, bn, row0): (&Dim, &Dim, &Dim),
) {
    let kind = if sizes.largest { ReduceKind::Max } else { ReduceKind::Min };
    let last = identity(kind, DType::F32);
    let (plane, row) = (vec![bm.clone(), bn.clone()], vec![bm.clone()]);
    let (zero, n) = (Dim::new(0), sizes.cols.clone());
    let at = vec![row0.clone(), zero.clone()];
    let raw = k.load_with(x, at, vec![1, 1], last, plane.clone());
    let args = vec![k.plain(raw)];
    let x = map(k, &plane, args, |f, a| f.cast(a[0], DType::F32));
    let cols = k.iota(DType::I32, 0, zero.clone(), vec![bn.clone()]);
    let nothing = k.full(Value::Int(0), TileType::new(DType::I32, plane.clone()));
    let (turn, carried) = k.begin_for(turn, zero, sizes.count.clone(), &[nothing]);
    let taken = carried[0];
    let free = |f: &mut FuncBuilder, taken: ExprId| {
        let zero = f.constant_int(0, DType::I32);
        f.op(ExprOp::Eq, &[taken, zero])
    };
    // For the smallest, NaN comes last: as if it were the last of the numbers, behind those.
    let args = vec![k.plain(x), k.plain(taken)];
    let largest = sizes.largest;
    let rest = map(k, &plane, args, |f, a| {
        let mut free = free(f, a[1]);
        if !largest {
            let number = f.op(ExprOp::Eq, &[a[0], a[0]]);
            free = f.op(ExprOp::And, &[free, number]);
        }
        let last = f.value(last, DType::F32);
        f.op(ExprOp::Select, &[free, a[0], last])
    });
    let best = k.reduce(kind, rest, 1, Some(n.clone()));
    // The first place where the best stands; where all that is left is as nothing, the first such, numbers before NaN.
    let args = vec![k.plain(x), k.plain(taken), along(best, 0), along(cols, 1)];
    let far = i64::from(i32::MAX);
    let stands = map(k, &plane, args, |f, a| {
        let free = free(f, a[1]);
        let same = f.op(ExprOp::Eq, &[a[0], a[2]]);
        let (nan, best_nan) = (f.op(ExprOp::IsNan, &[a[0]]), f.op(ExprOp::IsNan, &[a[2]]));
        let both = f.op(ExprOp::And, &[nan, best_nan]);
        let hit = f.op(ExprOp::Or, &[same, both]);
        let hit = f.op(ExprOp::And, &[free, hit]);
        let far = f.constant_int(far, DType::I32);
        f.op(ExprOp::Select, &[hit, a[3], far])
    });
    let first = k.reduce(ReduceKind::Min, stands, 1, Some(n.clone()));
    let args = vec![k.plain(taken), along(cols, 1)];
    let left = map(k, &plane, args, |f, a| {
        let free = free(f, a[0]);
        let far = f.constant_int(far, DType::I32);
        f.op(ExprOp::Select, &[free, a[1], far])
    });
    let any = k.reduce(ReduceKind::Min, left, 1, Some(n));
    let args = vec![k.plain(first), k.plain(any)];
    let place = map(k, &row, args, |f, a| {
        let far = f.constant_int(far, DType::I32);
        let none = f.op(ExprOp::Eq, &[a[0], far]);
        f.op(ExprOp::Select, &[none, a[1], a[0]])
    });
    // What stands there: the best, or NaN where only that is left.
    let args = vec![k.plain(best), k.plain(first)];
    let value = map(k, &row, args, |f, a| {
        let far = f.constant_int(far, DType::I32);
        let none = f.op(ExprOp::Eq, &[a[1], far]);
        let nan = f.constant(f64::NAN, DType::F32);
        let value = f.op(ExprOp::Select, &[none, nan, a[0]]);
        f.cast(value, dtype)
    });
    let args = vec![k.plain(place)];
    let place_out = map(k, &row, args, |f, a| f.cast(a[0], DType::I64));
    let args = vec![along(cols, 1), along(place, 0), k.plain(taken)];
    let next = map(k, &plane, args, |f, a| {
        let hit = f.op(ExprOp::Eq, &[a[0], a[1]]);
        let one = f.constant_int(1, DType::I32);
        f.op(ExprOp::Select, &[hit, one, a[2]])
    });
    for (param, tile) in [(values, value), (places, place_out)] {
        let line = k.reshape(tile, vec![bm.clone(), Dim::new(1)]);
        k.store(param, vec![row0.clone(), turn.clone()], line);
    }
    k.end_for(&[next]);
}
