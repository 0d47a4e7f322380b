//! Dropout of a tensor, with a residual.

use crate::rows::{func, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::Op;
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder};

/// For every element `i`, in f32: `Y[i] = X[i] / (1 - drop)` where `u(i) >= drop`, else zero; plus `R[i]` with
/// `residual`.
///
/// `u(i)` is the uniform number in [0, 1) of Philox4x32-10 under the key `seed` at counter `4 O + i`, so no mask is
/// stored: the gradient of `X` is the same kernel on the gradient of `Y`, without residual. Tensors have `N` elements;
/// the size `O` says where the numbers of this call begin, in blocks of four: a step that draws `N` moves it by `N / 4`,
/// rounded up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropoutSpec {
    /// Type of all tensors.
    pub dtype: DType,
    /// Adds `R`.
    pub residual: bool,
    /// Which share is dropped: at least 0, below 1.
    pub drop: f64,
    /// The key.
    pub seed: u64,
}

impl DropoutSpec {
    /// The tile program, with the tile size `BN`.
    pub fn program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["N"]);
        k.symbol(Symbol { name: "O".into(), range: Range { min: 0, max: i32::MAX.into() } });
        let bn = k.tile("BN");
        let vector = || Layout::row_major(&[Dim::sym("N")]);
        let x = k.param("X", self.dtype, vector(), Access::In);
        let r = self.residual.then(|| k.param("R", self.dtype, vector(), Access::In));
        let y = k.param("Y", self.dtype, vector(), Access::Out);
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bn));
        let (at, shape) = (pn * &bn, vec![bn]);
        let u = k.random(DType::F32, self.seed, &at + Dim::sym("O") * 4, shape.clone());
        let mut args = vec![k.plain(u)];
        for p in [Some(x), r].into_iter().flatten() {
            let tile = k.load(p, vec![at.clone()], shape.clone());
            args.push(k.plain(tile));
        }
        let types: Vec<DType> = args.iter().map(|a| k.ty(a.tile).dtype).collect();
        let f = func(&types, |f, a| {
            let drop = f.constant(self.drop, DType::F32);
            let keep = f.op(Op::Ge, &[a[0], drop]);
            let scale = f.constant(1.0 / (1.0 - self.drop), DType::F32);
            let x = f.cast(a[1], DType::F32);
            let x = f.op(Op::Mul, &[x, scale]);
            let zero = f.constant(0.0, DType::F32);
            let mut y = f.op(Op::Select, &[keep, x, zero]);
            if let Some(r) = a.get(2) {
                let r = f.cast(*r, DType::F32);
                y = f.op(Op::Add, &[y, r]);
            }
            f.cast(y, self.dtype)
        });
        let value = k.map(f, args, shape);
        k.store(y, vec![at], value);
        k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A share that is no share; a size without a value.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        if !(0.0..1.0).contains(&self.drop) {
            return Err(Error::user(format!("a share of {} cannot be dropped", self.drop)));
        }
        let kernel = self.program(name);
        let schedule = GpuSchedule::lines_for(&kernel, arch, size)?
            .ok_or_else(|| Error::bug("an elementwise kernel has a schedule"))?;
        Ok((kernel, schedule))
    }
}
