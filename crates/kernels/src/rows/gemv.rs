//! Products of a matrix with few vectors: `Y[m, n] = sum over k of W[n, k] * X[m, k]`.
//!
//! The matrix is read once and sets the pace; the vectors come from the cache. Sums are kept per
//! register while a row of `W` goes by, and combined over threads at its end.

use super::program::{along, func, lines, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::Dim;
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, ReduceKind, TileType};

/// A product with `vectors` vectors for all sizes. Size symbols: `N`, `K`, and `ldw`, `ldx`, `ldy`, the
/// distances between rows of `W [N, K]`, `X [vectors, K]` and `Y [vectors, N]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemvSpec {
    /// Type of all tensors; sums are f32.
    pub dtype: DType,
    /// How many vectors, 1 to 4: each has its own sums in registers.
    pub vectors: u32,
}

impl GemvSpec {
    /// The tile program, with tile sizes `BM` (rows of `W`) and `BN` (a piece of `K`).
    pub fn program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["N", "K", "ldw", "ldx", "ldy"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let w = k.param("W", self.dtype, lines("N", "K", "ldw"), Access::In);
        let vectors = i64::from(self.vectors);
        let matrix = |cols: &str, leading: &str| {
            let mut layout = lines("N", cols, leading);
            layout.axes[0].extent = Dim::new(vectors);
            layout
        };
        let x = k.param("X", self.dtype, matrix("K", "ldx"), Access::In);
        let y = k.param("Y", self.dtype, matrix("N", "ldy"), Access::Out);
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bm));
        let row0 = pn * &bm;
        let ty = TileType::new(DType::F32, [bm.clone()]);
        let init: Vec<_> = (0..vectors).map(|_| k.full(Value::Float(0.0), ty.clone())).collect();
        let pieces = Dim::sym("K").ceil_div(&bn);
        let (var, sums) = k.begin_for("piece", Dim::new(0), pieces, &init);
        let col = var * &bn;
        let tile = k.load(w, vec![row0.clone(), col.clone()], vec![bm.clone(), bn.clone()]);
        let product = func(&[self.dtype, self.dtype], |f, a| {
            let (w, x) = (f.cast(a[0], DType::F32), f.cast(a[1], DType::F32));
            f.op(Op::Mul, &[w, x])
        });
        let mut next = Vec::new();
        for (i, sum) in sums.iter().enumerate() {
            let at = vec![Dim::new(i as i64), col.clone()];
            let v = k.load(x, at, vec![Dim::new(1), bn.clone()]);
            let v = k.reshape(v, vec![bn.clone()]);
            let args = vec![k.plain(tile), along(v, 1)];
            let p = k.map(product.clone(), args, vec![bm.clone(), bn.clone()]);
            let part = k.reduce(ReduceKind::Sum, p, 1, None);
            let args = vec![k.plain(*sum), k.plain(part)];
            next.push(k.map(Func::binary(Op::Add, DType::F32), args, vec![bm.clone()]));
        }
        let sums = k.end_for(&next);
        for (i, sum) in sums.into_iter().enumerate() {
            let args = vec![k.plain(sum)];
            let out = k.map(Func::cast(DType::F32, self.dtype), args, vec![bm.clone()]);
            let out = k.reshape(out, vec![Dim::new(1), bm.clone()]);
            k.store(y, vec![Dim::new(i as i64), row0.clone()], out);
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
            .ok_or_else(|| Error::bug("a row in pieces has a schedule"))?;
        Ok((kernel, schedule))
    }
}
