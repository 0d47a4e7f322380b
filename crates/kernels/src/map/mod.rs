//! Elementwise kernels on matrices, copies among them: `Y[M, N] = func(operands...)`.
//!
//! To add one: a constructor of [`MapSpec`] with its scalar function. What stores several results has a file of its own
//! ([`AdamWSpec`]).

mod adamw;
mod dropout;

pub use adamw::{ADAMW_NUMBERS, AdamWSpec, AdamWTableSpec};
pub use dropout::DropoutSpec;

use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand};

/// Along which axes an operand varies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Varies {
    /// A matrix `[M, N]`.
    Both,
    /// A vector `[N]`.
    Cols,
    /// A vector `[M]`.
    Rows,
}

/// An elementwise kernel for all sizes.
///
/// Size symbols: `M`, `N`, and for every matrix operand `i` the distance `ld{i}` between its rows, for
/// the result `ldy`. Operands are `X0`, `X1` and so on, the result is `Y`. Without `bounds` every
/// matrix has the shape `[M, N]`; with it, operand matrices have the shape `[P, Q]` (two more sizes)
/// and count as zero outside, and the result is cut or padded to `[M, N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// From the operands to the result.
    pub func: Func,
    /// Where each operand varies; types are the function's.
    pub operands: Vec<Varies>,
    /// Operand matrices have a shape of their own.
    pub bounds: bool,
    /// Operand matrices are read transposed: `X[n, m]`.
    pub transposed: bool,
}

fn function(
    params: &[DType],
    to: DType,
    f: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
) -> Func {
    let mut b = FuncBuilder::new();
    let ids: Vec<ExprId> = params
        .iter()
        .enumerate()
        .map(|(i, t)| {
            let p = b.param(&format!("x{i}"), *t);
            b.cast(p, DType::F32)
        })
        .collect();
    let y = f(&mut b, &ids);
    let y = b.cast(y, to);
    b.finish(y)
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`
fn gelu(f: &mut FuncBuilder, x: ExprId) -> ExprId {
    let root = f.constant(std::f64::consts::FRAC_1_SQRT_2, DType::F32);
    let half = f.constant(0.5, DType::F32);
    let one = f.constant(1.0, DType::F32);
    let scaled = f.op(Op::Mul, &[x, root]);
    let e = f.op(Op::Erf, &[scaled]);
    let e = f.op(Op::Add, &[e, one]);
    let h = f.op(Op::Mul, &[x, half]);
    f.op(Op::Mul, &[h, e])
}

/// Elements that are a little work.
const LITTLE: i64 = 1 << 19;

impl MapSpec {
    fn plain(func: Func, operands: &[Varies]) -> MapSpec {
        MapSpec { func, operands: operands.to_vec(), bounds: false, transposed: false }
    }

    /// `Y = X0`, converted.
    pub fn copy(from: DType, to: DType) -> MapSpec {
        let func = if from == to { Func::identity(from) } else { Func::cast(from, to) };
        MapSpec::plain(func, &[Varies::Both])
    }

    /// `Y = X0` cut or padded with zeros, converted: brings an operand into a shape and alignment.
    pub fn pad(from: DType, to: DType) -> MapSpec {
        MapSpec { bounds: true, ..MapSpec::copy(from, to) }
    }

    /// `Y = gelu(X0 + bias)`, `bias` being `X1 [N]`.
    pub fn bias_gelu(dtype: DType) -> MapSpec {
        let func = function(&[dtype, dtype], dtype, |f, a| {
            let x = f.op(Op::Add, &[a[0], a[1]]);
            gelu(f, x)
        });
        MapSpec::plain(func, &[Varies::Both, Varies::Cols])
    }

    /// `Y = X0 * sigmoid(X0) * X1`
    pub fn swiglu(dtype: DType) -> MapSpec {
        let func = function(&[dtype, dtype], dtype, |f, a| {
            let s = f.op(Op::Sigmoid, &[a[0]]);
            let x = f.op(Op::Mul, &[a[0], s]);
            f.op(Op::Mul, &[x, a[1]])
        });
        MapSpec::plain(func, &[Varies::Both, Varies::Both])
    }

    /// `Y = relu(X0 * scale + shift) + X1`, the vectors being `X2 [N]` and `X3 [N]`.
    pub fn scale_shift_relu_add(dtype: DType) -> MapSpec {
        let func = function(&[dtype; 4], dtype, |f, a| {
            let x = f.op(Op::Mul, &[a[0], a[2]]);
            let x = f.op(Op::Add, &[x, a[3]]);
            let zero = f.constant(0.0, DType::F32);
            let x = f.op(Op::Max, &[x, zero]);
            f.op(Op::Add, &[x, a[1]])
        });
        MapSpec::plain(func, &[Varies::Both, Varies::Both, Varies::Cols, Varies::Cols])
    }

    /// The tile program, with tile sizes `BM`, `BN`.
    pub fn program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        let matrices = self.operands.iter().enumerate().filter(|(_, v)| **v == Varies::Both);
        let leading: Vec<String> = matrices.map(|(i, _)| format!("ld{i}")).collect();
        let mut names = vec!["M", "N"];
        if self.bounds {
            names.extend(["P", "Q"]);
        }
        names.extend(leading.iter().map(String::as_str));
        names.push("ldy");
        for name in names {
            let range = Range { min: 1, max: i32::MAX.into() };
            k.symbol(Symbol { name: name.into(), range });
        }
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let (rows, cols) = if self.bounds { ("P", "Q") } else { ("M", "N") };
        let axis =
            |extent: &str, stride: Dim| Axis { extent: Dim::sym(extent), stride, block: None };
        let one = || Dim::new(1);
        let params: Vec<_> = self
            .operands
            .iter()
            .zip(self.func.params())
            .enumerate()
            .map(|(i, (varies, p))| {
                let ld = Dim::sym(format!("ld{i}"));
                let axes = match (varies, self.transposed) {
                    (Varies::Both, false) => vec![axis(rows, ld), axis(cols, one())],
                    (Varies::Both, true) => vec![axis(rows, one()), axis(cols, ld)],
                    (Varies::Cols, _) => vec![axis("N", one())],
                    (Varies::Rows, _) => vec![axis("M", one())],
                };
                let layout = Layout { axes, offset: Dim::new(0) };
                k.param(&format!("X{i}"), p.dtype, layout, Access::In)
            })
            .collect();
        let axes = vec![axis("M", Dim::sym("ldy")), axis("N", one())];
        let y = k.param("Y", self.func.dtype(), Layout { axes, offset: Dim::new(0) }, Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&bm));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bn));
        let (row0, col0) = (pm * &bm, pn * &bn);
        let args: Vec<Operand> = self
            .operands
            .iter()
            .zip(params)
            .map(|(varies, p)| match varies {
                Varies::Both => {
                    let at = vec![row0.clone(), col0.clone()];
                    let t = k.load(p, at, vec![bm.clone(), bn.clone()]);
                    k.plain(t)
                }
                Varies::Cols => {
                    let t = k.load(p, vec![col0.clone()], vec![bn.clone()]);
                    Operand { tile: t, along: vec![1] }
                }
                Varies::Rows => {
                    let t = k.load(p, vec![row0.clone()], vec![bm.clone()]);
                    Operand { tile: t, along: vec![0] }
                }
            })
            .collect();
        let out = k.map(self.func.clone(), args, vec![bm, bn]);
        k.store(y, vec![row0, col0], out);
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
        let mut schedule = GpuSchedule::lines_for(&kernel, arch, size)?
            .ok_or_else(|| Error::bug("an elementwise kernel has a schedule"))?;
        // A little work is done before a division by a size is: these are numbers then.
        let [m, n] = ["M", "N"].map(|name| size(name).unwrap_or(i64::MAX));
        if m.saturating_mul(n) <= LITTLE {
            let sizes = kernel.symbols.iter().filter(|s| &*s.name != "M");
            schedule.sizes = sizes.filter_map(|s| Some((s.name.clone(), size(&s.name)?))).collect();
        }
        Ok((kernel, schedule))
    }
}
