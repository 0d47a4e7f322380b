//! Sums over rows that a product leaves beside its result, and that the next product uses: the statistics of a norm.
//!
//! ```text
//! P[m,j] = sum of f(C[m,n]) over the columns n of part j           left beside C: `Statistics::leaves`
//! r[m]   = g(P[m,0] + P[m,1] + ...)                                the vector along rows: `Statistics::reads`
//! ```
//!
//! A part is [`PART`] columns, whatever the tiles: a schedule with tiles of whole parts leaves them from its epilogue, and any product may read
//! them, so neither needs to know how the other is run. Every part has one block that writes it, and parts are added in order: the same
//! input gives the same bytes.
//!
//! Products that are run another way (transposed, in parts of the depth, without tensor cores) are surrounded by small kernels: one
//! that makes the vector, one that reads the result again.

use crate::gemm::plan::{
    Candidate, Choice, EXTRA_LAUNCH_US, Extent, Place, Step, aligned_elements, candidate, lines,
    ranked, sizes,
};
use crate::gemm::problem::Problem;
use crate::gemm::program::{GemmSpec, Order, matrix};
use crate::gemm::record;
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_expr::Func;
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_lower_gpu::{GpuSchedule, ProductKind};
use tilewright_target::Gpu;
use tilewright_tile::{Access, Kernel, KernelBuilder, ParamId, ReduceKind, TileId};

/// Columns of a part.
pub const PART: i64 = tilewright_lower_gpu::PART_COLUMNS as i64;

/// Tile size of a program that leaves sums: parts in a tile.
pub(super) const TILE_PARTS: &str = "BP";

/// What a product has to do with sums over rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Statistics {
    /// The vector along rows is made of such sums.
    pub reads: Option<RowSums>,
    /// Of an element of the result, what is summed (in f32).
    pub leaves: Option<Func>,
}

/// Sums over rows in parts, `[M, parts]` in f32, dense.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowSums {
    /// How many a row has.
    pub parts: i64,
    /// From the whole sum to an element of the vector along rows.
    pub func: Func,
}

impl Statistics {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.reads.is_none() && self.leaves.is_none()
    }

    /// Text for keys of records.
    pub(super) fn text(&self) -> String {
        let reads = self.reads.as_ref().map(|r| format!(" of {} sums {}", r.parts, r.func));
        let leaves = self.leaves.as_ref().map(|f| format!(" leaves {f}"));
        format!("{}{}", reads.unwrap_or_default(), leaves.unwrap_or_default())
    }
}

/// How many parts lines of `n` elements have.
pub(super) fn parts_of(n: &Dim) -> Dim {
    n.ceil_div(&Dim::new(PART))
}

/// The layout of sums in `parts` for `rows` rows.
pub(super) fn sums_layout(rows: Dim, parts: Dim) -> Layout {
    Layout::row_major(&[rows, parts])
}

/// The vector along rows of a tile of `rows` from `row0` on, made of the sums in `param`, of which the tile has room for
/// `columns`.
pub(super) fn row_vector(
    k: &mut KernelBuilder,
    param: ParamId,
    sums: &RowSums,
    (row0, rows): (&Dim, &Dim),
    columns: i64,
) -> TileId {
    let at = vec![row0.clone(), Dim::new(0)];
    let t = k.load(param, at, vec![rows.clone(), Dim::new(columns)]);
    let sum = k.reduce(ReduceKind::Sum, t, 1, None);
    let arg = k.plain(sum);
    k.map(sums.func.clone(), vec![arg], vec![rows.clone()])
}

/// Stores the sums of a tile of the result, of `tile_parts` parts, that lies at `row0` and `col0`.
pub(super) fn leave(
    k: &mut KernelBuilder,
    param: ParamId,
    func: &Func,
    result: TileId,
    (row0, col0): (Dim, Dim),
    (rows, tile_parts): (&Dim, &Dim),
) {
    let args = vec![k.plain(result)];
    let shape = k.ty(result).shape.clone();
    let t = k.map(func.clone(), args, shape);
    let t = k.reshape(t, vec![rows.clone(), tile_parts.clone(), Dim::new(PART)]);
    let sums = k.reduce(ReduceKind::Sum, t, 2, None);
    k.store(param, vec![row0, col0], sums);
}

/// Whether a choice does all that its problem's statistics ask for in the product's own kernel.
pub(super) fn inside(problem: &Problem, choice: &Choice) -> bool {
    let stats = &problem.statistics;
    let bn = choice.schedule.tiles.get("BN").copied().unwrap_or(1);
    stats.is_empty()
        || !choice.swapped
            && choice.splits == 1
            && choice.schedule.product == ProductKind::Wgmma
            && (stats.leaves.is_none() || bn % PART == 0)
}

/// Gives a schedule the tile size that programs with sums have.
pub(super) fn with_parts(spec: &GemmSpec, mut schedule: GpuSchedule) -> GpuSchedule {
    if spec.statistics.leaves.is_some() {
        let bn = schedule.tiles.get("BN").copied().unwrap_or(PART);
        schedule.tiles.insert(TILE_PARTS.into(), bn / PART);
    }
    schedule
}

/// Makes the vector along rows of the sums, tile size `BR`.
pub(super) fn finish_program(sums: &RowSums) -> Kernel {
    let mut k = KernelBuilder::new("row_sums");
    k.symbol(Symbol { name: "M".into(), range: Range { min: 1, max: i32::MAX.into() } });
    let br = k.tile("BR");
    let rows = Dim::sym("M");
    let layout = sums_layout(rows.clone(), Dim::new(sums.parts));
    let p = k.param("P", DType::F32, layout, Access::In);
    let r = k.param(
        "R",
        sums.func.dtype(),
        Layout::row_major(std::slice::from_ref(&rows)),
        Access::Out,
    );
    let row0 = k.grid("pm", rows.ceil_div(&br)) * &br;
    // Threads share a row in powers of two; what lies outside is zero.
    let columns = sums.parts.unsigned_abs().next_power_of_two() as i64;
    let vector = row_vector(&mut k, p, sums, (&row0, &br), columns);
    k.store(r, vec![row0], vector);
    k.finish()
}

/// Sums a result that another kernel stored, tile size `BR`.
pub(super) fn sums_program(func: &Func, result: DType, order: Order) -> Kernel {
    let mut k = KernelBuilder::new("part_sums");
    for size in ["M", "N", "ldc"] {
        k.symbol(Symbol { name: size.into(), range: Range { min: 1, max: i32::MAX.into() } });
    }
    let br = k.tile("BR");
    let (rows, parts) = (Dim::sym("M"), parts_of(&Dim::sym("N")));
    let c = k.param("C", result, matrix("M", "N", order, "ldc", None), Access::In);
    let p = k.param("P", DType::F32, sums_layout(rows.clone(), parts.clone()), Access::Out);
    let row0 = k.grid("pm", rows.ceil_div(&br)) * &br;
    let part = k.grid("pp", parts);
    let at = vec![row0.clone(), part.clone() * PART];
    let t = k.load(c, at, vec![br.clone(), Dim::new(PART)]);
    let args = vec![k.plain(t)];
    let t = k.map(func.clone(), args, vec![br.clone(), Dim::new(PART)]);
    let sum = k.reduce(ReduceKind::Sum, t, 1, None);
    let sum = k.reshape(sum, vec![br, Dim::new(1)]);
    k.store(p, vec![row0, part], sum);
    k.finish()
}

/// Ways to compute a problem with statistics, best first by the time model.
///
/// # Errors
/// Unsupported for batches, whose sums nobody asked for yet; else as for products.
pub(super) fn plan(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    if problem.batch != 1 || problem.images.is_some() {
        return Err(Error::unsupported("sums over rows of batches or windows"));
    }
    let mut out = Vec::new();
    if problem.k > 0 && Arch::of_capability(gpu.capability) >= Arch::Sm90a {
        for choice in ranked(problem, gpu, Extent::Picker)? {
            if out.len() >= most {
                break;
            }
            if inside(problem, &choice) {
                out.extend(candidate(problem, &choice)?);
            }
        }
    }
    out.extend(around(problem, gpu, most)?);
    out.sort_by(|a, b| a.estimate_us.total_cmp(&b.estimate_us));
    out.truncate(most);
    Ok(out)
}

/// The product without statistics, between kernels for these.
fn around(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    let Statistics { reads, leaves } = &problem.statistics;
    let arch = Arch::of_capability(gpu.capability);
    let plain = Problem { statistics: Statistics::default(), ..problem.clone() };
    let mut out = record::plan(&plain, gpu, most)?;
    let us = |bytes: i64| bytes as f64 / gpu.copy_bytes_per_s * 1e6 + EXTRA_LAUNCH_US;
    for c in &mut out {
        if let Some(sums) = reads {
            let offset = c.workspace_bytes.next_multiple_of(256);
            let bytes = problem.m.unsigned_abs() * sums.func.dtype().size() as u64;
            let vector = Place::Workspace { offset, bytes };
            c.workspace_bytes = (offset + bytes).next_multiple_of(256);
            for place in c.steps.iter_mut().flat_map(|s| &mut s.operands) {
                if *place == Place::Rows {
                    *place = vector;
                }
            }
            let kernel = finish_program(sums);
            let operands = vec![Place::Rows, vector];
            let step = lines(arch, kernel, sizes(&[("M", problem.m)]), operands, 4)?;
            c.steps.insert(0, step);
            c.estimate_us += us(problem.m * sums.parts * 4);
        }
        if let Some(func) = leaves {
            c.steps.push(sums_step(problem, arch, func)?);
            c.estimate_us += us(problem.m * problem.n * problem.result_bytes());
        }
    }
    Ok(out)
}

fn sums_step(problem: &Problem, arch: Arch, func: &Func) -> Result<Step> {
    let kernel = sums_program(func, problem.result, problem.order.2);
    let values = sizes(&[("M", problem.m), ("N", problem.n), ("ldc", problem.leading.2)]);
    let aligned = aligned_elements(problem.align.2, problem.result_bytes());
    lines(arch, kernel, values, vec![Place::C, Place::Parts], aligned)
}
