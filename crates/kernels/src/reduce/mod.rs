//! Reductions of whole tensors and of columns, spread over the device and the same every time.
//!
//! ```text
//! parts:  block p of P combines its share of the tensor          -> P[p] or P[p, n], in f32
//! finish: one more kernel combines the parts in their order      -> Y
//! ```
//!
//! The number of parts depends on the sizes and the machine alone, so the order of every sum is fixed. Reductions of
//! rows need no second step: `parts` is then all there is (see also `rows`).

mod clip;

pub use clip::ClipSpec;

use crate::rows::{func, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Arch, identity};
use tilewright_expr::{Func, Op};
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, ReduceKind, TileId, TileType};

/// What is combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// All `N` elements of `X[N]`, to `Y[1]`.
    All,
    /// The rows of `X[M, N]` (rows `ldx` elements apart), to `Y[N]`.
    Rows,
}

/// A reduction in f32 of a tensor of one type to a result of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReduceSpec {
    /// How elements are combined.
    pub kind: ReduceKind,
    /// Which of them.
    pub over: Over,
    /// Type of the tensor.
    pub dtype: DType,
    /// Type of the result.
    pub result: DType,
    /// Elements are squared first.
    pub squares: bool,
}

/// One kernel, or two, the second after the first.
#[derive(Clone, Debug)]
pub struct ReducePlan {
    /// Parameters `X` and `P`; sizes those of the tensor, and `P`, `C` (see [`ReducePlan::parts_count`]).
    pub parts: (Kernel, GpuSchedule),
    /// Parameters `P` and `Y`; sizes `N` and `P`, or `P` alone. With a single part there is none: the first step then
    /// writes `Y` in the place of `P`.
    pub finish: Option<(Kernel, GpuSchedule)>,
    /// How many parts there are: the size `P`.
    pub parts_count: i64,
    /// Pieces of a part: the size `C`.
    pub pieces: i64,
}

/// Parts that keep every multiprocessor busy.
const PARTS: i64 = 528;

/// Strips of columns that do so without parts.
const STRIPS: i64 = 240;

fn combine(kind: ReduceKind) -> Func {
    let op = match kind {
        ReduceKind::Sum => Op::Add,
        ReduceKind::Prod => Op::Mul,
        ReduceKind::Max => Op::Max,
        ReduceKind::Min => Op::Min,
    };
    Func::binary(op, DType::F32)
}

fn up(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

fn axis(extent: &str, stride: Dim) -> Axis {
    Axis { extent: Dim::sym(extent), stride, block: None }
}

fn layout(axes: Vec<Axis>) -> Layout {
    Layout { axes, offset: Dim::new(0) }
}

impl ReduceSpec {
    /// Sums of all elements or of columns.
    pub fn sum(over: Over, dtype: DType) -> ReduceSpec {
        ReduceSpec { kind: ReduceKind::Sum, over, dtype, result: DType::F32, squares: false }
    }

    fn wide(&self, k: &mut KernelBuilder, x: TileId, shape: Vec<Dim>) -> TileId {
        let args = vec![k.plain(x)];
        let wide = func(&[self.dtype], |f, a| {
            let x = f.cast(a[0], DType::F32);
            if self.squares { f.op(Op::Mul, &[x, x]) } else { x }
        });
        k.map(wide, args, shape)
    }

    /// The first step. Tile sizes: `BN`, and `BM` for columns.
    pub fn parts(&self, name: &str) -> Kernel {
        self.step(name, "P", DType::F32)
    }

    /// The first step, its results under this name and in this type.
    fn step(&self, name: &str, to: &str, result: DType) -> Kernel {
        let mut k = KernelBuilder::new(name);
        let last = func(&[DType::F32], |f, a| f.cast(a[0], result));
        let fill = identity(self.kind, self.dtype);
        let start = identity(self.kind, DType::F32);
        let one = Dim::new(1);
        match self.over {
            Over::All => {
                sizes(&mut k, &["N", "P", "C"]);
                let bn = k.tile("BN");
                let x = k.param("X", self.dtype, layout(vec![axis("N", one.clone())]), Access::In);
                let p = k.param(to, result, layout(vec![axis("P", one)]), Access::Out);
                let part = k.grid("part", Dim::sym("P"));
                let init = k.full(start, TileType::new(DType::F32, []));
                let (piece, carried) = k.begin_for("piece", Dim::new(0), Dim::sym("C"), &[init]);
                let at = (&part * Dim::sym("C") + piece) * &bn;
                let x = k.load_with(x, vec![at], vec![1], fill, vec![bn.clone()]);
                let x = self.wide(&mut k, x, vec![bn]);
                let r = k.reduce(self.kind, x, 0, None);
                let args = vec![k.plain(carried[0]), k.plain(r)];
                let next = k.map(combine(self.kind), args, vec![]);
                let all = k.end_for(&[next])[0];
                let args = vec![k.plain(all)];
                let all = k.map(last, args, vec![]);
                let all = k.reshape(all, vec![Dim::new(1)]);
                k.store(p, vec![part], all);
            }
            Over::Rows => {
                sizes(&mut k, &["M", "N", "ldx", "P", "C"]);
                let (bm, bn) = (k.tile("BM"), k.tile("BN"));
                let axes = vec![axis("M", Dim::sym("ldx")), axis("N", one.clone())];
                let x = k.param("X", self.dtype, layout(axes), Access::In);
                let axes = vec![axis("P", Dim::sym("N")), axis("N", one.clone())];
                let p = k.param(to, result, layout(axes), Access::Out);
                let part = k.grid("part", Dim::sym("P"));
                let pn = k.grid("pn", Dim::sym("N").ceil_div(&bn));
                let col = pn * &bn;
                let init = k.full(start, TileType::new(DType::F32, [bn.clone()]));
                let (piece, carried) = k.begin_for("piece", Dim::new(0), Dim::sym("C"), &[init]);
                let row = (&part * Dim::sym("C") + piece) * &bm;
                let shape = vec![bm, bn.clone()];
                let x = k.load_with(x, vec![row, col.clone()], vec![1, 1], fill, shape.clone());
                let x = self.wide(&mut k, x, shape);
                let r = k.reduce(self.kind, x, 0, None);
                let args = vec![k.plain(carried[0]), k.plain(r)];
                let next = k.map(combine(self.kind), args, vec![bn.clone()]);
                let all = k.end_for(&[next])[0];
                let args = vec![k.plain(all)];
                let all = k.map(last, args, vec![bn.clone()]);
                let all = k.reshape(all, vec![one, bn]);
                k.store(p, vec![part, col], all);
            }
        }
        k.finish()
    }

    /// The second step: the parts of each result, in order. Tile sizes: `BP`, and `BN` for columns.
    pub fn finish(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        let fill = identity(self.kind, DType::F32);
        let last = func(&[DType::F32], |f, a| f.cast(a[0], self.result));
        let one = Dim::new(1);
        let bp = k.tile("BP");
        let pieces = Dim::sym("P").ceil_div(&bp);
        match self.over {
            Over::All => {
                sizes(&mut k, &["P"]);
                let p = k.param("P", DType::F32, layout(vec![axis("P", one.clone())]), Access::In);
                let y = k.param(
                    "Y",
                    self.result,
                    Layout::row_major(std::slice::from_ref(&one)),
                    Access::Out,
                );
                k.grid("g", one.clone());
                let init = k.full(fill, TileType::new(DType::F32, []));
                let (piece, carried) = k.begin_for("piece", Dim::new(0), pieces, &[init]);
                let x = k.load_with(p, vec![piece * &bp], vec![1], fill, vec![bp]);
                let r = k.reduce(self.kind, x, 0, None);
                let args = vec![k.plain(carried[0]), k.plain(r)];
                let next = k.map(combine(self.kind), args, vec![]);
                let all = k.end_for(&[next])[0];
                let args = vec![k.plain(all)];
                let all = k.map(last, args, vec![]);
                let all = k.reshape(all, vec![one]);
                k.store(y, vec![Dim::new(0)], all);
            }
            Over::Rows => {
                sizes(&mut k, &["N", "P"]);
                let bn = k.tile("BN");
                let axes = vec![axis("P", Dim::sym("N")), axis("N", one.clone())];
                let p = k.param("P", DType::F32, layout(axes), Access::In);
                let y = k.param("Y", self.result, Layout::row_major(&[Dim::sym("N")]), Access::Out);
                let pn = k.grid("pn", Dim::sym("N").ceil_div(&bn));
                let col = pn * &bn;
                let init = k.full(fill, TileType::new(DType::F32, [bn.clone()]));
                let (piece, carried) = k.begin_for("piece", Dim::new(0), pieces, &[init]);
                let at = vec![piece * &bp, col.clone()];
                let x = k.load_with(p, at, vec![1, 1], fill, vec![bp, bn.clone()]);
                let r = k.reduce(self.kind, x, 0, None);
                let args = vec![k.plain(carried[0]), k.plain(r)];
                let next = k.map(combine(self.kind), args, vec![bn.clone()]);
                let all = k.end_for(&[next])[0];
                let args = vec![k.plain(all)];
                let all = k.map(last, args, vec![bn]);
                k.store(y, vec![col], all);
            }
        }
        k.finish()
    }

    /// Both steps for these sizes.
    ///
    /// # Errors
    /// A size without a value.
    pub fn plan(&self, arch: Arch, size: &dyn Fn(&str) -> Option<i64>) -> Result<ReducePlan> {
        let mut plan = self.plan_with(self.finish("reduce_finish"), arch, size)?;
        if plan.parts_count == 1 {
            plan.parts.0 = self.step("reduce_parts", "Y", self.result);
            plan.finish = None;
        }
        Ok(plan)
    }

    /// The first step for these sizes, and the second as it is given.
    fn plan_with(
        &self,
        finish: Kernel,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<ReducePlan> {
        let none = |what: &str| Error::bug(format!("a reduction without {what}"));
        let need = |name: &str| size(name).ok_or_else(|| none(name));
        let n = need("N")?;
        let parts = self.parts("reduce_parts");
        // There shall be many parts: one part is no reason to share it out over a cluster.
        let many = |name: &str| match name {
            "P" => Some(PARTS),
            "C" => Some(1),
            name => size(name),
        };
        let scheduled = |kernel: &Kernel, size: &dyn Fn(&str) -> Option<i64>| {
            GpuSchedule::lines_for(kernel, arch, size)?.ok_or_else(|| none("a schedule"))
        };
        let schedule = scheduled(&parts, &many)?;
        let tile = |name: &str| schedule.tiles.get(name).copied().unwrap_or(1).max(1);
        let (all, wanted) = match self.over {
            Over::All => (up(n, tile("BN")), PARTS),
            Over::Rows => {
                let strips = up(n, tile("BN"));
                let wanted = if strips >= STRIPS { 1 } else { up(PARTS, strips) };
                (up(need("M")?, tile("BM")), wanted)
            }
        };
        let pieces = up(all, wanted.clamp(1, all.max(1)));
        let parts_count = up(all, pieces.max(1)).max(1);
        let few = |name: &str| if name == "P" { Some(parts_count) } else { size(name) };
        let last = scheduled(&finish, &few)?;
        Ok(ReducePlan {
            parts: (parts, schedule),
            finish: Some((finish, last)),
            parts_count,
            pieces,
        })
    }
}
