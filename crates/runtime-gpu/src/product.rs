//! A matrix product of a plan, with its sizes, as problems of the kernel library.
//!
//! The library repeats a product along one axis. Further axes of the plan's product are joined with it where
//! one stride serves both, and are separate problems otherwise.

use crate::choose::{Launch, Source, Way};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_kernels::gemm::{
    self, Computed, Epilogue, Images, Order, Pair, Place, Precision, Problem, RowSums, Statistics,
};
use tilewright_layout::{Dim, Env};
use tilewright_lower_gpu::lower;
use tilewright_plan::{Matrix, Product};
use tilewright_target::Gpu;

/// Starts of device memory are multiples of this.
pub(crate) const ALIGNED: i64 = 256;

/// An axis along which the product is repeated, with its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    extent: i64,
    strides: [i64; 3],
}

pub(crate) fn number(dim: &Dim, sizes: &Env) -> Result<i64> {
    dim.eval(sizes).ok_or_else(|| Error::bug(format!("size {dim} of a product has no value")))
}

/// The axes of repetition, neighbours joined where one stride serves both.
fn repeats(product: &Product, sizes: &Env) -> Result<Vec<Axis>> {
    let mut axes: Vec<Axis> = Vec::new();
    for repeat in &product.repeat {
        let extent = number(&repeat.extent, sizes)?;
        let mut strides = [0; 3];
        for (to, stride) in strides.iter_mut().zip(&repeat.strides) {
            *to = number(stride, sizes)?;
        }
        if extent == 1 {
            continue;
        }
        let joins = |outer: &Axis| (0..3).all(|i| outer.strides[i] == strides[i] * extent);
        match axes.last_mut() {
            Some(outer) if joins(outer) => {
                *outer = Axis { extent: outer.extent * extent, strides };
            }
            _ => axes.push(Axis { extent, strides }),
        }
    }
    Ok(axes)
}

/// Order and leading dimension of a matrix.
fn lines(m: &Matrix, rows: i64, cols: i64, sizes: &Env) -> Result<(Order, i64)> {
    let (row, col) = (number(&m.row, sizes)?, number(&m.col, sizes)?);
    // What has one line may have any distance between lines.
    if col == 1 || cols == 1 {
        return Ok((Order::Row, if rows == 1 || cols == 1 && row == 0 { cols } else { row }));
    }
    if row == 1 || rows == 1 {
        return Ok((Order::Col, if cols == 1 { rows } else { col }));
    }
    Err(Error::unsupported(format!("a matrix with strides {row} and {col}")))
}

/// The largest power of two, up to [`ALIGNED`], that divides all these byte offsets.
pub(crate) fn alignment(offsets: impl IntoIterator<Item = i64>) -> i64 {
    offsets.into_iter().fold(ALIGNED, |a, b| 1 << (a | b).trailing_zeros())
}

// The library's parts are the plan's.
const _: () = assert!(gemm::PART == tilewright_plan::PART_COLUMNS);

/// What a product has to do with sums over rows.
fn statistics(product: &Product) -> Statistics {
    let sums = |s: &tilewright_plan::RowSums| RowSums { parts: s.parts, func: s.func.clone() };
    Statistics {
        reads: product.row_sums.as_ref().map(sums),
        leaves: product.leaves.as_ref().map(|l| l.func.clone()),
    }
}

/// Ways to compute a product of these sizes, best first, at most `most`.
///
/// # Errors
/// Unsupported when the library has no kernel for it.
pub(crate) fn ways(product: &Product, sizes: &Env, gpu: &Gpu, most: usize) -> Result<Vec<Way>> {
    let (m, n, k) =
        (number(&product.m, sizes)?, number(&product.n, sizes)?, number(&product.k, sizes)?);
    let axes = repeats(product, sizes)?;
    if m == 0 || n == 0 || axes.iter().any(|a| a.extent == 0) {
        return Ok(vec![Way::default()]);
    }
    // The longest axis is the batch of one problem; the others are loops around it.
    let inner = (0..axes.len()).max_by_key(|&i| axes[i].extent);
    let batch = inner.map_or(Axis { extent: 1, strides: [0; 3] }, |i| axes[i]);
    let mut starts: Vec<[i64; 3]> = vec![[0; 3]];
    for (i, axis) in axes.iter().enumerate() {
        if Some(i) != inner {
            let at = |s: &[i64; 3], x: i64| [0, 1, 2].map(|j| s[j] + x * axis.strides[j]);
            starts = starts.iter().flat_map(|s| (0..axis.extent).map(move |x| at(s, x))).collect();
        }
    }
    let matrices = [(&product.a, m, k), (&product.b, k, n), (&product.c, m, n)];
    let mut orders = [Order::Row; 3];
    let (mut leading, mut offsets, mut align) = ([0; 3], [0; 3], [0; 3]);
    for (i, (matrix, rows, cols)) in matrices.into_iter().enumerate() {
        (orders[i], leading[i]) = lines(matrix, rows, cols, sizes)?;
        offsets[i] = number(&matrix.offset, sizes)?;
        let size = matrix.dtype.size() as i64;
        align[i] = alignment(starts.iter().map(|s| (s[i] + offsets[i]) * size));
    }
    // The second right operand of a pair: where it is.
    let mut second = 0;
    if let Some(pair) = &product.second {
        second = number(&pair.b.offset, sizes)?;
        let size = pair.b.dtype.size() as i64;
        align[1] = align[1].min(alignment(starts.iter().map(|s| (s[1] + second) * size)));
    }
    // Vectors and the residual count as aligned as the result.
    let mut extras = Vec::new();
    let second_cols = product.second.as_ref().map_or(&None, |s| &s.cols);
    for vector in [&product.cols, &product.rows, &product.residual, second_cols] {
        let offset = match vector {
            Some(v) => {
                let offset = number(&v.offset, sizes)?;
                align[2] = align[2].min(alignment([offset * v.dtype.size() as i64]));
                offset
            }
            None => 0,
        };
        extras.push(offset);
    }
    let mut images = None;
    if let Some(w) = &product.windows {
        let two = |d: &[Dim; 2]| Ok::<_, Error>([number(&d[0], sizes)?, number(&d[1], sizes)?]);
        images = Some(Images {
            windows: gemm::Windows {
                taps: w.taps,
                steps: w.steps,
                before: w.before,
                dilations: w.dilations,
            },
            count: number(&w.images, sizes)?,
            size: two(&w.size)?,
            outputs: two(&w.outputs)?,
        });
        (orders[0], leading[0]) = (Order::Row, number(&product.a.row, sizes)?);
        (orders[1], leading[1]) = (Order::Col, number(&product.b.col, sizes)?);
    }
    let operand = product.prologue.as_ref().map_or(product.a.dtype, |p| p.operand);
    let tf32 = product.tf32 && operand == DType::F32;
    let dtype = |v: &Option<tilewright_plan::Vector>| v.as_ref().map(|v| v.dtype);
    let problem = Problem {
        m,
        n,
        k,
        batch: batch.extent,
        operand,
        sum: product.sum,
        result: product.c.dtype,
        precision: if tf32 { Precision::Tf32 } else { Precision::F32 },
        promoted: false,
        order: (orders[0], orders[1], orders[2]),
        leading: (leading[0], leading[1], leading[2]),
        stride: (batch.strides[0], batch.strides[1], batch.strides[2]),
        align: (align[0], align[1], align[2]),
        epilogue: Epilogue {
            func: product.epilogue.clone(),
            col_vector: dtype(&product.cols),
            row_vector: dtype(&product.rows),
            residual: dtype(&product.residual),
            pair: if product.second.is_some() { Pair::Right } else { Pair::None },
        },
        images,
        statistics: statistics(product),
    };
    if !problem.statistics.is_empty() && (starts.len() > 1 || product.prologue.is_some()) {
        return Err(Error::unsupported("sums over rows of repeated products"));
    }
    // Vectors along the depth: where they are, and how far apart for the batches.
    let depths = product.prologue.iter().flat_map(|p| &p.vectors);
    let mut vectors = Vec::new();
    let mut computed = product.prologue.as_ref().map(|p| Computed {
        prologue: gemm::Prologue {
            func: p.func.clone(),
            stored: product.a.dtype,
            vectors: p.vectors.iter().map(|d| d.vector.dtype).collect(),
        },
        strides: Vec::new(),
        align: ALIGNED,
    });
    for depth in depths {
        // Lowering leaves one axis of repetition at most.
        let stride = match &depth.strides[..] {
            [] => 0,
            [stride] => number(stride, sizes)?,
            _ => return Err(Error::bug("a computed operand along several axes of repetition")),
        };
        let size = depth.vector.dtype.size() as i64;
        let offset = number(&depth.vector.offset, sizes)? * size;
        vectors.push(Source::Param { param: depth.vector.param, offset: offset as u64 });
        if let Some(c) = &mut computed {
            c.strides.push(stride);
            c.align = c.align.min(alignment([offset]));
        }
    }
    let candidates = match &computed {
        None => gemm::plan(&problem, gpu, most)?,
        Some(c) => gemm::plan_computed(&problem, c, gpu, most)?,
    };
    let mut out = Vec::new();
    for candidate in candidates {
        let mut way = Way {
            workspace_bytes: candidate.workspace_bytes,
            estimate_us: candidate.estimate_us * starts.len() as f64,
            ..Way::default()
        };
        let mut programs = Vec::new();
        for step in &candidate.steps {
            programs.push(Arc::new(lower(&step.kernel, &step.schedule)?));
        }
        for start in &starts {
            for (step, program) in candidate.steps.iter().zip(&programs) {
                let at = |i: usize, matrix: &Matrix| Source::Param {
                    param: matrix.param,
                    offset: ((start[i] + offsets[i]) * matrix.dtype.size() as i64) as u64,
                };
                let vector = |v: &Option<tilewright_plan::Vector>, i: usize, along: i64| {
                    let v = v.as_ref().ok_or_else(|| Error::bug("an operand that is not there"))?;
                    let offset = ((extras[i] + along) * v.dtype.size() as i64) as u64;
                    Ok(Source::Param { param: v.param, offset })
                };
                let operands = step
                    .operands
                    .iter()
                    .map(|place| match place {
                        Place::A => Ok(at(0, &product.a)),
                        Place::B => Ok(at(1, &product.b)),
                        Place::C => Ok(at(2, &product.c)),
                        Place::B2 => {
                            let pair = product.second.as_ref();
                            let pair = pair.ok_or_else(|| Error::bug("a pair of one product"))?;
                            let offset = (start[1] + second) * pair.b.dtype.size() as i64;
                            Ok(Source::Param { param: pair.b.param, offset: offset as u64 })
                        }
                        Place::Cols2 => vector(second_cols, 3, 0),
                        Place::Cols => vector(&product.cols, 0, 0),
                        Place::Rows => vector(&product.rows, 1, 0),
                        Place::Parts => {
                            let left = product.leaves.as_ref();
                            let left =
                                left.ok_or_else(|| Error::bug("sums that nobody asked for"))?;
                            Ok(Source::Param { param: left.param, offset: 0 })
                        }
                        Place::Residual => vector(&product.residual, 2, start[2]),
                        Place::Depth(i) => vectors
                            .get(*i)
                            .cloned()
                            .ok_or_else(|| Error::bug("a vector that is not there")),
                        Place::Workspace { offset, bytes } => {
                            Ok(Source::Workspace { offset: *offset, bytes: *bytes })
                        }
                    })
                    .collect::<Result<_>>()?;
                let (sizes, schedule) = (step.sizes.clone(), step.schedule.to_string());
                way.launches.push(Launch { program: program.clone(), sizes, operands, schedule });
            }
        }
        out.push(way);
    }
    Ok(out)
}
