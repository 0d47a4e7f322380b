//! One step of AdamW, in place: on one tensor, or on a table of tensors in one launch.

use crate::rows::{func, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op};
use tilewright_layout::{Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, ParamId, TileId};

/// The numbers that a step reads from `H`, in this order: all in f32, and in device memory, so that a recorded
/// step serves every iteration.
///
/// `clip` is a factor of the gradient (1 without clipping to a norm), `c1` and `c2` are the bias corrections
/// `1 / (1 - beta1^t)` and `1 / (1 - beta2^t)`.
pub const ADAMW_NUMBERS: [&str; 8] = ["rate", "beta1", "beta2", "eps", "decay", "clip", "c1", "c2"];

/// For every element, in f32:
///
/// ```text
/// g = G * clip
/// M = beta1 * M + (1 - beta1) * g
/// V = beta2 * V + (1 - beta2) * g * g
/// W = W - rate * (M * c1 / (sqrt(V * c2) + eps) + decay * W)
/// P = W rounded                                            (only with a copy)
/// ```
///
/// `W`, `M`, `V` have `N` elements of f32; `G` is of type `gradient`. With `copy`, the weights that the model
/// reads are stored as `P` in that type. One size symbol, `N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdamWSpec {
    /// Type of the gradient.
    pub gradient: DType,
    /// Type of the rounded copy of the weights.
    pub copy: Option<DType>,
}

impl AdamWSpec {
    /// The tile program, with the tile size `BN`.
    pub fn program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["N"]);
        let bn = k.tile("BN");
        let vector = || Layout::row_major(&[Dim::sym("N")]);
        let g = k.param("G", self.gradient, vector(), Access::In);
        let numbers = Layout::row_major(&[Dim::from(ADAMW_NUMBERS.len())]);
        let h = k.param("H", DType::F32, numbers, Access::In);
        let state = ["W", "M", "V"].map(|name| k.param(name, DType::F32, vector(), Access::InOut));
        let copy = self.copy.map(|dtype| k.param("P", dtype, vector(), Access::Out));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bn));
        let at = vec![pn * &bn];
        let shape = vec![bn];
        let loads = [g, state[0], state[1], state[2]].map(|p| k.load(p, at.clone(), shape.clone()));
        let scalars: Vec<TileId> = (0..ADAMW_NUMBERS.len())
            .map(|i| {
                let one = k.load(h, vec![Dim::from(i)], vec![Dim::new(1)]);
                k.reshape(one, vec![])
            })
            .collect();
        let operand = |tile| Operand { tile, along: vec![] };
        step(&mut k, loads, &scalars, (&operand, None), (state, copy, self.copy), &at, &shape);
        k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A size without a value.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        let kernel = self.program(name);
        let schedule = GpuSchedule::lines_for(&kernel, arch, size)?
            .ok_or_else(|| Error::bug("an elementwise kernel has a schedule"))?;
        Ok((kernel, schedule))
    }
}

/// The same step for many tensors at once, in one launch.
///
/// The tensors of each kind lie in one allocation, and each starts at a multiple of `B` elements (the rest of its last
/// chunk is padding): `R` chunks in all, so `G`, `W`, `M`, `V` and `P` are `[R, B]`. The table is `T[R]` (`i32`): to
/// which group of parameters a chunk belongs. `H[K, 8]` has the numbers of each group as
/// [`ADAMW_NUMBERS`] names them, and `S[1]` is one more factor of all gradients: [`ClipSpec`](crate::reduce::ClipSpec)
/// writes it. Size symbols: `R`, `B`, `K`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdamWTableSpec {
    /// Types, as for one tensor.
    pub one: AdamWSpec,
}

impl AdamWTableSpec {
    /// The tile program, with tile sizes `BM` (chunks) and `BN`.
    pub fn program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["R", "B", "K"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let chunks = || Layout::row_major(&[Dim::sym("R"), Dim::sym("B")]);
        let g = k.param("G", self.one.gradient, chunks(), Access::In);
        let table = k.param("T", DType::I32, Layout::row_major(&[Dim::sym("R")]), Access::In);
        let numbers = Layout::row_major(&[Dim::sym("K"), Dim::from(ADAMW_NUMBERS.len())]);
        let h = k.param("H", DType::F32, numbers, Access::In);
        let s = k.param("S", DType::F32, Layout::row_major(&[Dim::new(1)]), Access::In);
        let state = ["W", "M", "V"].map(|name| k.param(name, DType::F32, chunks(), Access::InOut));
        let copy = self.one.copy.map(|dtype| k.param("P", dtype, chunks(), Access::Out));
        let pm = k.grid("pm", Dim::sym("R").ceil_div(&bm));
        let pn = k.grid("pn", Dim::sym("B").ceil_div(&bn));
        let row0 = pm * &bm;
        let at = vec![row0.clone(), pn * &bn];
        let (one, zero) = (Dim::new(1), Dim::new(0));
        let group = k.load(table, vec![row0], vec![bm.clone()]);
        let numbers: Vec<TileId> = (0..ADAMW_NUMBERS.len())
            .map(|i| {
                let at = vec![zero.clone(), Dim::from(i)];
                let column = k.gather(h, 0, group, at, vec![bm.clone(), one.clone()]);
                k.reshape(column, vec![bm.clone()])
            })
            .collect();
        let s = k.load(s, vec![zero], vec![one]);
        let s = k.reshape(s, vec![]);
        let shape = vec![bm, bn];
        let operand = |tile| Operand { tile, along: vec![0] };
        let tiles = [g, state[0], state[1], state[2]];
        let tiles = tiles.map(|p| k.load(p, at.clone(), shape.clone()));
        let all = Operand { tile: s, along: vec![] };
        step(
            &mut k,
            tiles,
            &numbers,
            (&operand, Some(all)),
            (state, copy, self.one.copy),
            &at,
            &shape,
        );
        k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A size without a value.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        let kernel = self.program(name);
        let schedule = GpuSchedule::lines_for(&kernel, arch, size)?
            .ok_or_else(|| Error::bug("an elementwise kernel has a schedule"))?;
        Ok((kernel, schedule))
    }
}

/// The tiles of a step: what is loaded is gradient, weights and both moments; `numbers` are [`ADAMW_NUMBERS`], operands
/// by `operand`, and `factor` is one more of the gradient.
fn step(
    k: &mut KernelBuilder,
    loads: [TileId; 4],
    scalars: &[TileId],
    (operand, factor): (&dyn Fn(TileId) -> Operand, Option<Operand>),
    (state, copy, rounded): ([ParamId; 3], Option<ParamId>, Option<DType>),
    at: &[Dim],
    shape: &[Dim],
) {
    // A map of full tiles, and of numbers.
    let map = |k: &mut KernelBuilder,
               tiles: &[TileId],
               numbers: &[usize],
               f: &dyn Fn(&mut FuncBuilder, &[ExprId]) -> ExprId| {
        let types: Vec<DType> = tiles.iter().map(|t| k.ty(*t).dtype).collect();
        let all = [types, vec![DType::F32; numbers.len()]].concat();
        let mut args: Vec<Operand> = tiles.iter().map(|t| k.plain(*t)).collect();
        args.extend(numbers.iter().map(|n| operand(scalars[*n])));
        k.map(func(&all, |b, a| f(b, a)), args, shape.to_vec())
    };
    let [g, w, m, v] = loads;
    let g = map(k, &[g], &[5], &|f, a| {
        let g = f.cast(a[0], DType::F32);
        f.op(Op::Mul, &[g, a[1]])
    });
    let g = match factor {
        None => g,
        Some(factor) => {
            let args = vec![k.plain(g), factor];
            k.map(Func::binary(Op::Mul, DType::F32), args, shape.to_vec())
        }
    };
    // beta * old + (1 - beta) * new, as new + beta * (old - new).
    let m = map(k, &[m, g], &[1], &|f, a| {
        let d = f.op(Op::Sub, &[a[0], a[1]]);
        f.op(Op::Fma, &[a[2], d, a[1]])
    });
    let v = map(k, &[v, g], &[2], &|f, a| {
        let square = f.op(Op::Mul, &[a[1], a[1]]);
        let d = f.op(Op::Sub, &[a[0], square]);
        f.op(Op::Fma, &[a[2], d, square])
    });
    let w = map(k, &[w, m, v], &[0, 3, 4, 6, 7], &|f, a| {
        let [rate, eps, decay, c1, c2] = [a[3], a[4], a[5], a[6], a[7]];
        let size = f.op(Op::Mul, &[a[2], c2]);
        let root = f.op(Op::Sqrt, &[size]);
        let under = f.op(Op::Add, &[root, eps]);
        let over = f.op(Op::Mul, &[a[1], c1]);
        let step = f.op(Op::Div, &[over, under]);
        let step = f.op(Op::Fma, &[decay, a[0], step]);
        let step = f.op(Op::Mul, &[rate, step]);
        f.op(Op::Sub, &[a[0], step])
    });
    for (param, tile) in state.into_iter().zip([w, m, v]) {
        k.store(param, at.to_vec(), tile);
    }
    if let (Some(param), Some(dtype)) = (copy, rounded) {
        let rounded = map(k, &[w], &[], &|f, a| f.cast(a[0], dtype));
        k.store(param, at.to_vec(), rounded);
    }
}
