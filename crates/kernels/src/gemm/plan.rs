//! From a problem to steps.

use crate::gemm::model::{Shape, estimate};
use crate::gemm::problem::Problem;
use crate::gemm::program::{GemmSpec, Math, Order};
use crate::gemm::space::space;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, StoreKind};
use tilewright_target::Gpu;
use tilewright_tile::Kernel;

/// Which tensor of the problem a parameter of a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Left operand.
    A,
    /// Right operand.
    B,
    /// Vector along the columns of the result.
    Cols,
    /// Vector along the rows of the result.
    Rows,
    /// Matrix that the epilogue reads.
    Residual,
    /// Result.
    C,
    /// Part of the workspace.
    Workspace {
        /// First byte, a multiple of 256.
        offset: u64,
        /// Length.
        bytes: u64,
    },
}

/// One launch.
#[derive(Clone, Debug)]
pub struct Step {
    /// What one block computes.
    pub kernel: Kernel,
    /// How.
    pub schedule: GpuSchedule,
    /// The kernel's size symbols.
    pub sizes: Env,
    /// The kernel's parameters, in order.
    pub operands: Vec<Place>,
}

/// A way to compute a problem.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Launches in order.
    pub steps: Vec<Step>,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Estimated time.
    pub estimate_us: f64,
}

/// A problem in one orientation, as the tensor-core kernels see it.
struct Oriented {
    spec: GemmSpec,
    m: i64,
    n: i64,
    leading: (i64, i64, i64),
    stride: (i64, i64, i64),
    align: (i64, i64, i64),
    swapped: bool,
}

fn flip(order: Order) -> Order {
    if order == Order::Row { Order::Col } else { Order::Row }
}

fn orient(p: &Problem, swapped: bool) -> Oriented {
    let mut spec = p.spec();
    let (l, s, a) = (p.leading, p.stride, p.align);
    if !swapped {
        return Oriented { spec, m: p.m, n: p.n, leading: l, stride: s, align: a, swapped };
    }
    // C^T = B^T A^T.
    (spec.a, spec.b, spec.c) = (flip(p.order.1), flip(p.order.0), flip(p.order.2));
    spec.epilogue = spec.epilogue.transposed();
    Oriented {
        spec,
        m: p.n,
        n: p.m,
        leading: (l.1, l.0, l.2),
        stride: (s.1, s.0, s.2),
        align: (a.1, a.0, a.2),
        swapped,
    }
}

/// Whether the copy engine can address a matrix: 16-byte addresses and lines.
fn addressable(p: &Problem, size: i64, leading: i64, stride: i64, align: i64) -> bool {
    align % 16 == 0 && leading * size % 16 == 0 && (p.batch == 1 || stride * size % 16 == 0)
}

/// Elements of the result that one plain store may take: 1 or 2.
fn result_vector(p: &Problem, o: &Oriented) -> u32 {
    let bytes = p.result_bytes();
    let even = o.leading.2 % 2 == 0 && (p.batch == 1 || o.stride.2 % 2 == 0);
    u32::from(even && o.align.2 % (2 * bytes) == 0) + 1
}

/// Ways to compute `problem`, best first by the time model, at most `most` of them.
///
/// # Errors
/// The user's for impossible sizes; unsupported when no kernel of the library fits.
pub fn plan(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    problem.check()?;
    if problem.m == 0 || problem.n == 0 || problem.batch == 0 {
        return Ok(vec![Candidate { steps: Vec::new(), workspace_bytes: 0, estimate_us: 0.0 }]);
    }
    if problem.k == 0 {
        return Err(Error::unsupported("a product over an empty sum (k = 0)"));
    }
    let size = problem.operand_bytes();
    let mut ranked: Vec<(f64, usize, i64, GpuSchedule)> = Vec::new();
    let orientations = [orient(problem, false), orient(problem, true)];
    for (index, o) in orientations.iter().enumerate() {
        let both_k_major = o.spec.a == Order::Row && o.spec.b == Order::Col;
        let direct = addressable(problem, size, o.leading.0, o.stride.0, o.align.0)
            && addressable(problem, size, o.leading.1, o.stride.1, o.align.1)
            && (problem.operand.bits() == 16 || both_k_major)
            && o.spec.math != Math::Tf32x3
            && !(problem.operand == DType::F32 && o.spec.math == Math::Exact);
        if !direct {
            continue;
        }
        let tma = addressable(problem, problem.result_bytes(), o.leading.2, o.stride.2, o.align.2);
        let store = if tma { StoreKind::Tma } else { StoreKind::Direct };
        let vector = result_vector(problem, o);
        let shape = Shape {
            m: o.m,
            n: o.n,
            k: problem.k,
            batch: problem.batch,
            splits: 1,
            products: 1,
            operand_bytes: size,
            result_bytes: problem.result_bytes(),
        };
        for schedule in space(&o.spec, store, vector) {
            // The widest ring is always at least as good here; other rasters are for the tuner.
            if schedule.raster != 8 {
                continue;
            }
            ranked.push((estimate(gpu, &schedule, &shape), index, 1, schedule));
        }
    }
    if ranked.is_empty() {
        return Err(Error::unsupported(format!(
            "{} product with these orders and alignments",
            problem.operand
        )));
    }
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)).then_with(|| a.3.cmp(&b.3)));
    ranked
        .into_iter()
        .take(most)
        .map(|(estimate_us, index, _, schedule)| {
            let o = &orientations[index];
            Ok(Candidate {
                steps: vec![single(problem, o, schedule)],
                workspace_bytes: 0,
                estimate_us,
            })
        })
        .collect()
}

/// The product in one launch.
fn single(p: &Problem, o: &Oriented, schedule: GpuSchedule) -> Step {
    let kernel = o.spec.program("gemm");
    let mut operands = if o.swapped { vec![Place::B, Place::A] } else { vec![Place::A, Place::B] };
    let e = &o.spec.epilogue;
    let (cols, rows) = if o.swapped { (Place::Rows, Place::Cols) } else { (Place::Cols, Place::Rows) };
    if e.col_vector.is_some() {
        operands.push(cols);
    }
    if e.row_vector.is_some() {
        operands.push(rows);
    }
    if e.residual.is_some() {
        operands.push(Place::Residual);
    }
    operands.push(Place::C);
    let mut sizes: Env = Env::new();
    let mut put = |name: &str, value: i64| {
        sizes.insert(Arc::from(name), value);
    };
    put("M", o.m);
    put("N", o.n);
    put("K", p.k);
    put("lda", o.leading.0);
    put("ldb", o.leading.1);
    put("ldc", o.leading.2);
    if p.batch != 1 {
        put("L", p.batch);
        put("sa", o.stride.0);
        put("sb", o.stride.1);
        put("sc", o.stride.2);
    }
    Step { kernel, schedule, sizes, operands }
}
