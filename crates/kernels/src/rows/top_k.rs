//! The largest elements of rows.

use super::program::{along, func, lines, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{ExprId, FuncBuilder, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, ReduceKind, TileType};

/// The `count` largest elements of every row of `X[M, N]`, largest first: values `V[M, count]` and positions
/// `I[M, count]` (`i64`). Among equals the first position comes first; NaN counts as largest.
///
/// Each is found in a pass of its own over the row, which stays in registers: meant for small counts. With fewer than
/// `count` elements the rest is minus infinity, at positions that mean nothing. Size symbols: `M`, `N`, `ldx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopKSpec {
    /// Type of the elements.
    pub dtype: DType,
    /// How many are found.
    pub count: u32,
}

impl TopKSpec {
    /// The tile program, with tile sizes `BM`, `BN`; `BN` must be at least `N`.
    pub fn program(&self, name: &str) -> Kernel {
        let dtype = self.dtype;
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ldx"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let x = k.param("X", dtype, lines("M", "N", "ldx"), Access::In);
        let count = Dim::from(self.count as usize);
        let results = || Layout::row_major(&[Dim::sym("M"), count.clone()]);
        let v = k.param("V", dtype, results(), Access::Out);
        let i = k.param("I", DType::I64, results(), Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&bm));
        let row0 = pm * &bm;
        let (zero, one, n) = (Dim::new(0), Dim::new(1), Dim::sym("N"));
        let (plane, row) = (vec![bm.clone(), bn.clone()], vec![bm.clone()]);
        let map = |k: &mut KernelBuilder,
                   shape: &[Dim],
                   args: Vec<Operand>,
                   f: &dyn Fn(&mut FuncBuilder, &[ExprId]) -> ExprId| {
            let types: Vec<DType> = args.iter().map(|a| k.ty(a.tile).dtype).collect();
            k.map(func(&types, |b, a| f(b, a)), args, shape.to_vec())
        };
        let fill = Value::Float(f64::NEG_INFINITY);
        let at = vec![row0.clone(), zero.clone()];
        let raw = k.load_with(x, at, vec![1, 1], fill, plane.clone());
        let args = vec![k.plain(raw)];
        let x = map(&mut k, &plane, args, &|f, a| f.cast(a[0], DType::F32));
        let cols = k.iota(DType::I32, 0, zero, vec![bn]);
        let nothing = k.full(Value::Int(0), TileType::new(DType::I32, plane.clone()));
        let (turn, carried) = k.begin_for("turn", Dim::new(0), count.clone(), &[nothing]);
        let taken = carried[0];
        let args = vec![k.plain(x), k.plain(taken)];
        let rest = map(&mut k, &plane, args, &|f, a| {
            let zero = f.constant_int(0, DType::I32);
            let free = f.op(Op::Eq, &[a[1], zero]);
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            f.op(Op::Select, &[free, a[0], low])
        });
        let most = k.reduce(ReduceKind::Max, rest, 1, Some(n.clone()));
        let place = k.arg_reduce(ReduceKind::Max, rest, 1, Some(n.clone()), false);
        // Where all that is left is minus infinity, the first that is left.
        let args = vec![along(cols, 1), k.plain(taken)];
        let left = map(&mut k, &plane, args, &|f, a| {
            let zero = f.constant_int(0, DType::I32);
            let free = f.op(Op::Eq, &[a[1], zero]);
            let far = f.constant_int(i32::MAX.into(), DType::I32);
            f.op(Op::Select, &[free, a[0], far])
        });
        let first = k.reduce(ReduceKind::Min, left, 1, Some(n));
        let args = vec![k.plain(most), k.plain(place), k.plain(first)];
        let place = map(&mut k, &row, args, &|f, a| {
            let low = f.constant(f64::NEG_INFINITY, DType::F32);
            let none = f.op(Op::Eq, &[a[0], low]);
            let place = f.cast(a[1], DType::I32);
            f.op(Op::Select, &[none, a[2], place])
        });
        let args = vec![along(cols, 1), along(place, 0), k.plain(taken)];
        let next = map(&mut k, &plane, args, &|f, a| {
            let hit = f.op(Op::Eq, &[a[0], a[1]]);
            let one = f.constant_int(1, DType::I32);
            f.op(Op::Select, &[hit, one, a[2]])
        });
        let args = vec![k.plain(most)];
        let value = map(&mut k, &row, args, &|f, a| f.cast(a[0], dtype));
        let args = vec![k.plain(place)];
        let place = map(&mut k, &row, args, &|f, a| f.cast(a[0], DType::I64));
        for (param, tile) in [(v, value), (i, place)] {
            let line = k.reshape(tile, vec![bm.clone(), one.clone()]);
            k.store(param, vec![row0.clone(), turn.clone()], line);
        }
        k.end_for(&[next]);
        k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A size without a value; unsupported when a row has more elements than the registers of a block hold.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        let kernel = self.program(name);
        let schedule = GpuSchedule::lines_for(&kernel, arch, size)?
            .ok_or_else(|| Error::unsupported("the largest elements of rows this long on a GPU"))?;
        Ok((kernel, schedule))
    }
}
