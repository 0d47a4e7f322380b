//! Cross-entropy of rows of logits, with its gradient written over them.

use super::program::{along, func, lines, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, ReduceKind};

/// For every row `x` of `X[M, N]` and its target `t = T[i]` (`i64`), in f32:
///
/// ```text
/// L[i]    = log(sum(exp(x - max))) + max - x[t]
/// X[i, j] = (exp(x[j] - max) / sum(exp(x - max)) - (j == t)) * S[0]
/// ```
///
/// A target outside `0..N` is ignored: its loss is 0, and so is its row's gradient. Size symbols: `M`, `N`, and `ldx`,
/// the distance in elements between rows. A row is read once and written once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrossEntropySpec {
    /// Type of the logits.
    pub dtype: DType,
}

impl CrossEntropySpec {
    /// The tile program, with tile sizes `BM`, `BN`; `BN` must be at least `N`.
    pub fn program(&self, name: &str) -> Kernel {
        let dtype = self.dtype;
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ldx"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let x = k.param("X", dtype, lines("M", "N", "ldx"), Access::InOut);
        let rows = || Layout::row_major(&[Dim::sym("M")]);
        let targets = k.param("T", DType::I64, rows(), Access::In);
        let scale = k.param("S", DType::F32, Layout::row_major(&[Dim::new(1)]), Access::In);
        let loss = k.param("L", DType::F32, rows(), Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&bm));
        let row0 = pm * &bm;
        let (zero, plane) = (Dim::new(0), vec![bm.clone(), bn.clone()]);
        let (row, f32s) = (vec![bm.clone()], |n: usize| vec![DType::F32; n]);

        let t = k.load(targets, vec![row0.clone()], row.clone());
        let s = k.load(scale, vec![zero.clone()], vec![Dim::new(1)]);
        let s = k.reshape(s, vec![]);
        let at = vec![row0.clone(), zero.clone()];
        let fill = Value::Float(f64::NEG_INFINITY);
        let raw = k.load_with(x, at.clone(), vec![1, 1], fill, plane.clone());
        let args = vec![k.plain(raw)];
        let v = k.map(Func::cast(dtype, DType::F32), args, plane.clone());
        let max = k.reduce(ReduceKind::Max, v, 1, None);
        let exp = func(&f32s(2), |f, a| {
            let d = f.op(Op::Sub, &[a[0], a[1]]);
            f.op(Op::Exp, &[d])
        });
        let args = vec![k.plain(v), along(max, 0)];
        let e = k.map(exp, args, plane.clone());
        let sum = k.reduce(ReduceKind::Sum, e, 1, None);
        // The target's logit, by adding zeros to it.
        let here = k.iota(DType::I64, 0, zero, vec![bn]);
        let pick = func(&[DType::F32, DType::I64, DType::I64], |f, a| {
            let hit = f.op(Op::Eq, &[a[1], a[2]]);
            let nothing = f.constant(0.0, DType::F32);
            f.op(Op::Select, &[hit, a[0], nothing])
        });
        let args = vec![k.plain(v), along(here, 1), along(t, 0)];
        let picked = k.map(pick, args, plane.clone());
        let logit = k.reduce(ReduceKind::Sum, picked, 1, None);
        // Whether the row counts, as a factor.
        let n = k.iota(DType::I64, 0, Dim::sym("N"), vec![Dim::new(1)]);
        let n = k.reshape(n, vec![]);
        let counts = func(&[DType::I64, DType::I64], |f, a| {
            let zero = f.constant_int(0, DType::I64);
            let low = f.op(Op::Ge, &[a[0], zero]);
            let high = f.op(Op::Lt, &[a[0], a[1]]);
            let both = f.op(Op::And, &[low, high]);
            f.cast(both, DType::F32)
        });
        let scalar = |tile| Operand { tile, along: vec![] };
        let args = vec![k.plain(t), scalar(n)];
        let counts = k.map(counts, args, row.clone());
        let value = func(&f32s(4), |f, a| {
            let log = f.op(Op::Log, &[a[1]]);
            let whole = f.op(Op::Add, &[log, a[0]]);
            let loss = f.op(Op::Sub, &[whole, a[2]]);
            f.op(Op::Mul, &[loss, a[3]])
        });
        let args = [max, sum, logit, counts].iter().map(|x| k.plain(*x)).collect();
        let value = k.map(value, args, row.clone());
        k.store(loss, vec![row0], value);
        let factor = func(&f32s(2), |f, a| f.op(Op::Mul, &[a[0], a[1]]));
        let args = vec![k.plain(counts), scalar(s)];
        let factor = k.map(factor, args, row.clone());
        let share = func(&f32s(2), |f, a| f.op(Op::Div, &[a[0], a[1]]));
        let args = vec![k.plain(factor), k.plain(sum)];
        let share = k.map(share, args, row);
        let types = [DType::F32, DType::F32, DType::F32, DType::I64, DType::I64];
        let gradient = func(&types, |f, a| {
            let hit = f.op(Op::Eq, &[a[3], a[4]]);
            let nothing = f.constant(0.0, DType::F32);
            let off = f.op(Op::Select, &[hit, a[2], nothing]);
            let share = f.op(Op::Mul, &[a[0], a[1]]);
            let g = f.op(Op::Sub, &[share, off]);
            f.cast(g, dtype)
        });
        let args = vec![k.plain(e), along(share, 0), along(factor, 0), along(here, 1), along(t, 0)];
        let g = k.map(gradient, args, plane);
        k.store(x, at, g);
        k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A size without a value; unsupported when a row has more elements than the registers of a cluster hold.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        let kernel = self.program(name);
        let schedule = GpuSchedule::lines_for(&kernel, arch, size)?.ok_or_else(|| {
            Error::unsupported(format!("cross-entropy of rows this long on {}", arch.name()))
        })?;
        Ok((kernel, schedule))
    }
}
