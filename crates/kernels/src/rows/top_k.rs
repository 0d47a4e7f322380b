//! The largest elements of rows.

use super::program::{lines, sizes};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_layout::{Dim, Layout};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_tile::{Access, Kernel, KernelBuilder, TopK};

/// The `count` largest (or smallest) elements of every row of `X[M, N]`, in their order: values `V[M, count]` and
/// positions `I[M, count]` (`i64`). Among equals the first position comes first; NaN counts as largest.
///
/// On a device a row is gone over once, whatever its length. A row has at least `count` elements. Size symbols: `M`, `N`,
/// `ldx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopKSpec {
    /// Type of the elements.
    pub dtype: DType,
    /// How many are found.
    pub count: u32,
    /// The largest, not the smallest.
    pub largest: bool,
}

impl TopKSpec {
    /// The tile program, with tile sizes `BM`, `BN`; `BN` must be at least `N`.
    pub fn program(&self, name: &str) -> Kernel {
        let mut k = KernelBuilder::new(name);
        sizes(&mut k, &["M", "N", "ldx"]);
        let (bm, bn) = (k.tile("BM"), k.tile("BN"));
        let x = k.param("X", self.dtype, lines("M", "N", "ldx"), Access::In);
        let count = Dim::from(self.count as usize);
        let results = || Layout::row_major(&[Dim::sym("M"), count.clone()]);
        let values = k.param("V", self.dtype, results(), Access::Out);
        let places = k.param("I", DType::I64, results(), Access::Out);
        let row0 = k.grid("pm", Dim::sym("M").ceil_div(&bm)) * &bm;
        let top = TopK { x, values, places, count, largest: self.largest };
        top.write(&mut k, "turn", (&bm, &bn, &row0));
        k.finish()
    }

    /// The program and schedule for these sizes.
    ///
    /// # Errors
    /// A size without a value; unsupported when rows have fewer elements than are to be found.
    pub fn kernel(
        &self,
        name: &str,
        arch: Arch,
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<(Kernel, GpuSchedule)> {
        if size("N").is_some_and(|n| n < i64::from(self.count)) {
            return Err(Error::unsupported(format!(
                "the {} largest elements of rows of {}",
                self.count,
                size("N").unwrap_or(0)
            )));
        }
        let kernel = self.program(name);
        let schedule = GpuSchedule::lines_for(&kernel, arch, size)?
            .ok_or_else(|| Error::unsupported("the largest elements of rows this long on a GPU"))?;
        Ok((kernel, schedule))
    }
}
