//! One step of AdamW on one tensor, in place.

use crate::rows::{func, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{ExprId, FuncBuilder, Op};
use tilewright_layout::{Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, TileId};

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
        // A map of full tiles, and of numbers.
        let map = |k: &mut KernelBuilder,
                   tiles: &[TileId],
                   numbers: &[usize],
                   f: &dyn Fn(&mut FuncBuilder, &[ExprId]) -> ExprId| {
            let types: Vec<DType> = tiles.iter().map(|t| k.ty(*t).dtype).collect();
            let all = [types, vec![DType::F32; numbers.len()]].concat();
            let mut args: Vec<Operand> = tiles.iter().map(|t| k.plain(*t)).collect();
            args.extend(numbers.iter().map(|n| Operand { tile: scalars[*n], along: vec![] }));
            k.map(func(&all, |b, a| f(b, a)), args, shape.clone())
        };
        let [g, w, m, v] = loads;
        let g = map(&mut k, &[g], &[5], &|f, a| {
            let g = f.cast(a[0], DType::F32);
            f.op(Op::Mul, &[g, a[1]])
        });
        // beta * old + (1 - beta) * new, as new + beta * (old - new).
        let m = map(&mut k, &[m, g], &[1], &|f, a| {
            let d = f.op(Op::Sub, &[a[0], a[1]]);
            f.op(Op::Fma, &[a[2], d, a[1]])
        });
        let v = map(&mut k, &[v, g], &[2], &|f, a| {
            let square = f.op(Op::Mul, &[a[1], a[1]]);
            let d = f.op(Op::Sub, &[a[0], square]);
            f.op(Op::Fma, &[a[2], d, square])
        });
        let w = map(&mut k, &[w, m, v], &[0, 3, 4, 6, 7], &|f, a| {
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
            k.store(param, at.clone(), tile);
        }
        if let (Some(param), Some(dtype)) = (copy, self.copy) {
            let rounded = map(&mut k, &[w], &[], &|f, a| f.cast(a[0], dtype));
            k.store(param, at, rounded);
        }
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
