//! Clipping of gradients to a norm, on the device.

use super::{Over, ReducePlan, ReduceSpec, combine};
use crate::rows::{func, sizes};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_tile::{Access, Kernel, KernelBuilder, ReduceKind, TileType};

/// The Euclidean norm of all `N` elements of `X`, and by what they are to be multiplied so that it is at most `most`:
///
/// ```text
/// Y[0] = sqrt(sum(X * X)),  S[0] = min(1, most / (Y[0] + 1e-6))
/// ```
///
/// In f32, and every sum in one order. The gradients of a model are one allocation, padding of zeros included (see
/// [`AdamWTableSpec`](crate::map::AdamWTableSpec)). A norm that is not finite gives factors 0 or NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipSpec {
    /// Type of the gradients.
    pub dtype: DType,
    /// The largest norm.
    pub most: f64,
}

impl ClipSpec {
    fn squares(&self) -> ReduceSpec {
        ReduceSpec { squares: true, ..ReduceSpec::sum(Over::All, self.dtype) }
    }

    /// The second step: parameters `P`, `Y`, `S`; tile size `BP`.
    pub fn finish(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        let bp = k.tile("BP");
        sizes(&mut k, &["P"]);
        let one = Dim::new(1);
        let axis = Axis { extent: Dim::sym("P"), stride: one.clone(), block: None };
        let parts = Layout { axes: vec![axis], offset: Dim::new(0) };
        let p = k.param("P", DType::F32, parts, Access::In);
        let number = || Layout::row_major(std::slice::from_ref(&one));
        let y = k.param("Y", DType::F32, number(), Access::Out);
        let s = k.param("S", DType::F32, number(), Access::Out);
        k.grid("g", one.clone());
        let init = k.full(Value::Float(0.0), TileType::new(DType::F32, []));
        let pieces = Dim::sym("P").ceil_div(&bp);
        let (piece, carried) = k.begin_for("piece", Dim::new(0), pieces, &[init]);
        let x = k.load(p, vec![piece * &bp], vec![bp]);
        let r = k.reduce(ReduceKind::Sum, x, 0, None);
        let args = vec![k.plain(carried[0]), k.plain(r)];
        let next = k.map(combine(ReduceKind::Sum), args, vec![]);
        let all = k.end_for(&[next])[0];
        let args = vec![k.plain(all)];
        let norm = k.map(Func::unary(Op::Sqrt, DType::F32), args, vec![]);
        let args = vec![k.plain(norm)];
        let clip = func(&[DType::F32], |f, a| {
            let little = f.constant(1e-6, DType::F32);
            let under = f.op(Op::Add, &[a[0], little]);
            let most = f.constant(self.most, DType::F32);
            let factor = f.op(Op::Div, &[most, under]);
            let one = f.constant(1.0, DType::F32);
            f.op(Op::Min, &[factor, one])
        });
        let factor = k.map(clip, args, vec![]);
        for (param, tile) in [(y, norm), (s, factor)] {
            let line = k.reshape(tile, vec![one.clone()]);
            k.store(param, vec![Dim::new(0)], line);
        }
        k.finish()
    }

    /// Both steps for these sizes: parameters `X`, `P`, then `P`, `Y`, `S`.
    ///
    /// # Errors
    /// A size without a value.
    pub fn plan(&self, arch: Arch, size: &dyn Fn(&str) -> Option<i64>) -> Result<ReducePlan> {
        self.squares().plan_with(self.finish("clip_finish"), arch, size)
    }
}
