//! An attention of a plan, with its sizes, as a problem of the kernel library and as launches.

use crate::choose::{Launch, Source, Way};
use crate::product::{alignment, number};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_kernels::attention::{self, Mask, MaskKind, Place, Problem, Strides};
use tilewright_kernels::gemm::Precision;
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_plan::{Attention, Heads};
use tilewright_target::Gpu;
use tilewright_tile::Kernel;

/// Distances in elements between neighbours.
pub(crate) fn strides(heads: &Heads, sizes: &Env) -> Result<Strides> {
    let [batch, head, row] = &heads.strides;
    Ok(Strides {
        batch: number(batch, sizes)?,
        head: number(head, sizes)?,
        row: number(row, sizes)?,
    })
}

/// First byte.
fn start(heads: &Heads, sizes: &Env) -> Result<i64> {
    Ok(number(&heads.offset, sizes)? * heads.dtype.size() as i64)
}

/// Alignment of the first byte.
pub(crate) fn align(heads: &Heads, sizes: &Env) -> Result<i64> {
    Ok(alignment([start(heads, sizes)?]))
}

/// Where a tensor lies, as an operand of a launch.
pub(crate) fn at(heads: &Heads, sizes: &Env) -> Result<Source> {
    Ok(Source::Param { param: heads.param, offset: start(heads, sizes)?.unsigned_abs() })
}

/// Where the mask lies, for a kernel that reads one.
pub(crate) fn mask_at(a: &Attention, sizes: &Env) -> Result<Source> {
    let mask = a.mask.as_ref().ok_or_else(|| Error::bug("a mask that is not there"))?;
    at(mask, sizes)
}

/// An attention of these sizes; `lse` says whether its log-sum-exp is a result, too.
///
/// # Errors
/// Unsupported when its matrices have several types.
pub(crate) fn problem(a: &Attention, lse: bool, sizes: &Env) -> Result<Problem> {
    let dtype = a.q.dtype;
    if a.k.dtype != dtype || a.v.dtype != dtype {
        return Err(Error::unsupported("queries, keys and values of several types"));
    }
    let (queries, keys) = (number(&a.queries, sizes)?, number(&a.keys, sizes)?);
    let mask = match &a.mask {
        None => None,
        Some(m) => Some(Mask {
            dtype: m.dtype,
            kind: if m.dtype == DType::Bool { MaskKind::Keep } else { MaskKind::Add },
            strides: strides(m, sizes)?,
            align: align(m, sizes)?,
        }),
    };
    Ok(Problem {
        batch: number(&a.batch, sizes)?,
        heads: number(&a.heads, sizes)?,
        kv_heads: number(&a.kv_heads, sizes)?,
        q_len: queries,
        kv_len: keys,
        depth: a.depth,
        width: a.width,
        dtype,
        result: a.o.dtype,
        precision: if a.tf32 { Precision::Tf32 } else { Precision::F32 },
        scale: a.scale,
        causal: a.causal.then_some(keys - queries),
        mask,
        lse,
        zeros: a.zeros,
        q: strides(&a.q, sizes)?,
        k: strides(&a.k, sizes)?,
        v: strides(&a.v, sizes)?,
        o: strides(&a.o, sizes)?,
        align: [align(&a.q, sizes)?, align(&a.k, sizes)?, align(&a.v, sizes)?, align(&a.o, sizes)?],
    })
}

/// One launch of a way.
pub(crate) fn launch(
    kernel: &Kernel,
    schedule: &GpuSchedule,
    sizes: &Env,
    operands: Vec<Source>,
) -> Result<Launch> {
    let program = Arc::new(lower(kernel, schedule)?);
    Ok(Launch { program, sizes: sizes.clone(), operands, schedule: schedule.to_string() })
}

/// Ways to compute an attention of these sizes, best first, at most `most`. Its log-sum-exp goes to the parameter `lse`, if that
/// is asked for.
///
/// # Errors
/// Unsupported when the library has no kernel for it.
pub(crate) fn ways(
    a: &Attention,
    lse: Option<usize>,
    sizes: &Env,
    gpu: &Gpu,
    most: usize,
) -> Result<Vec<Way>> {
    let mut out = Vec::new();
    for candidate in attention::plan(&problem(a, lse.is_some(), sizes)?, gpu, most)? {
        let mut way = Way {
            workspace_bytes: candidate.workspace_bytes,
            estimate_us: candidate.estimate_us,
            ..Way::default()
        };
        for step in &candidate.steps {
            let operand = |place: &Place| match place {
                Place::Q => at(&a.q, sizes),
                Place::K => at(&a.k, sizes),
                Place::V => at(&a.v, sizes),
                Place::O => at(&a.o, sizes),
                Place::Mask => mask_at(a, sizes),
                Place::Lse => match lse {
                    Some(param) => Ok(Source::Param { param, offset: 0 }),
                    None => Err(Error::bug("nobody asked for the log-sum-exp")),
                },
                Place::Workspace { offset, bytes } => {
                    Ok(Source::Workspace { offset: *offset, bytes: *bytes })
                }
            };
            let operands = step.operands.iter().map(operand).collect::<Result<_>>()?;
            way.launches.push(launch(&step.kernel, &step.schedule, &step.sizes, operands)?);
        }
        out.push(way);
    }
    Ok(out)
}
