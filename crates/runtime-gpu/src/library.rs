//! A step of the library, with its sizes, as launches: attention with its log-sum-exp, and gradients.

use crate::choose::{Launch, Source, Way};
use crate::norm_backward::{NormBackward, NormGradient};
use crate::product::{alignment, number};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_device::Program;
use tilewright_kernels::attention::{
    self, BackwardPlace, BackwardProblem, Gradients, Mask, MaskKind, Place, Problem, Strides,
};
use tilewright_kernels::gemm::Precision;
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_plan::{Attention, AttentionBackward, Heads, LayerNormBackward, Library};
use tilewright_target::Gpu;
use tilewright_tile::Kernel;

/// The way to run a call of these sizes; one, since the library decides.
///
/// # Errors
/// Unsupported when the library has no kernel for it.
pub(crate) fn ways(call: &Library, sizes: &Env, gpu: &Gpu, most: usize) -> Result<Vec<Way>> {
    match call {
        Library::AttentionLse { attention, lse } => with_lse(attention, *lse, sizes, gpu, most),
        Library::AttentionBackward(call) => Ok(vec![attention_backward(call, sizes, gpu)?]),
        Library::LayerNormBackward(call) => Ok(vec![layer_norm_backward(call, sizes, gpu)?]),
    }
}

fn strides(heads: &Heads, sizes: &Env) -> Result<Strides> {
    let [batch, head, row] = &heads.strides;
    Ok(Strides {
        batch: number(batch, sizes)?,
        head: number(head, sizes)?,
        row: number(row, sizes)?,
    })
}

fn start(heads: &Heads, sizes: &Env) -> Result<i64> {
    Ok(number(&heads.offset, sizes)? * heads.dtype.size() as i64)
}

fn align(heads: &Heads, sizes: &Env) -> Result<i64> {
    // Memory of the caller may start at any multiple of 16.
    Ok(alignment([start(heads, sizes)?]).min(16))
}

fn problem(a: &Attention, sizes: &Env) -> Result<Problem> {
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
        dtype: a.q.dtype,
        result: a.o.dtype,
        precision: Precision::F32,
        scale: a.scale,
        causal: a.causal.then_some(keys - queries),
        mask,
        lse: true,
        zeros: a.zeros,
        q: strides(&a.q, sizes)?,
        k: strides(&a.k, sizes)?,
        v: strides(&a.v, sizes)?,
        o: strides(&a.o, sizes)?,
        align: [align(&a.q, sizes)?, align(&a.k, sizes)?, align(&a.v, sizes)?, align(&a.o, sizes)?],
    })
}

fn at(heads: &Heads, sizes: &Env) -> Result<Source> {
    Ok(Source::Param { param: heads.param, offset: start(heads, sizes)?.unsigned_abs() })
}

fn mask_at(a: &Attention, sizes: &Env) -> Result<Source> {
    let mask = a.mask.as_ref().ok_or_else(|| Error::bug("a mask that is not there"))?;
    at(mask, sizes)
}

fn launch(
    kernel: &Kernel,
    schedule: &GpuSchedule,
    sizes: &Env,
    operands: Vec<Source>,
) -> Result<Launch> {
    let program: Arc<Program> = Arc::new(lower(kernel, schedule)?);
    Ok(Launch { program, sizes: sizes.clone(), operands, schedule: schedule.to_string() })
}

fn with_lse(a: &Attention, lse: usize, sizes: &Env, gpu: &Gpu, most: usize) -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    for candidate in attention::plan(&problem(a, sizes)?, gpu, most)? {
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
                Place::Lse => Ok(Source::Param { param: lse, offset: 0 }),
                Place::Workspace { offset, bytes } => {
                    Ok(Source::Workspace { offset: *offset, bytes: *bytes })
                }
            };
            let operands = step.operands.iter().map(operand).collect::<Result<_>>()?;
            way.launches.push(launch(&step.kernel, &step.schedule, &step.sizes, operands)?);
        }
        ways.push(way);
    }
    Ok(ways)
}

fn attention_backward(call: &AttentionBackward, sizes: &Env, gpu: &Gpu) -> Result<Way> {
    let AttentionBackward { forward: a, lse, of_result, gradients: [dq, dk, dv] } = call;
    let forward = problem(a, sizes)?;
    let gradients = Gradients {
        o: strides(of_result, sizes)?,
        q: strides(dq, sizes)?,
        k: strides(dk, sizes)?,
        v: strides(dv, sizes)?,
        align: [align(of_result, sizes)?, align(dq, sizes)?, align(dk, sizes)?, align(dv, sizes)?],
    };
    let found = attention::backward_plan(&BackwardProblem { forward, gradients }, gpu)?;
    let mut way = Way { workspace_bytes: found.workspace_bytes, ..Way::default() };
    for step in &found.steps {
        let operand = |place: &BackwardPlace| match place {
            BackwardPlace::Q => at(&a.q, sizes),
            BackwardPlace::K => at(&a.k, sizes),
            BackwardPlace::V => at(&a.v, sizes),
            BackwardPlace::O => at(&a.o, sizes),
            BackwardPlace::DO => at(of_result, sizes),
            BackwardPlace::DQ => at(dq, sizes),
            BackwardPlace::DK => at(dk, sizes),
            BackwardPlace::DV => at(dv, sizes),
            BackwardPlace::Lse => Ok(Source::Param { param: *lse, offset: 0 }),
            BackwardPlace::Mask => mask_at(a, sizes),
            BackwardPlace::Workspace { offset, bytes } => {
                Ok(Source::Workspace { offset: *offset, bytes: *bytes })
            }
        };
        let operands = step.operands.iter().map(operand).collect::<Result<_>>()?;
        way.launches.push(launch(&step.kernel, &step.schedule, &step.sizes, operands)?);
    }
    Ok(way)
}

fn layer_norm_backward(call: &LayerNormBackward, sizes: &Env, gpu: &Gpu) -> Result<Way> {
    let LayerNormBackward { eps, dtype, x, dy, scale, other, dx, vectors, .. } = *call;
    let what = NormGradient {
        centred: true,
        eps,
        dtype,
        added: other.is_some(),
        rows: number(&call.rows, sizes)?,
        columns: number(&call.columns, sizes)?,
    };
    let (plan, scratch_bytes) = NormBackward::plan(gpu, &what)?;
    let env = NormBackward::sizes(&what, &plan);
    let param = |param: usize| Source::Param { param, offset: 0 };
    let bytes = scratch_bytes / 2;
    let parts = [0, bytes].map(|offset| Source::Workspace { offset, bytes });
    let mut first = vec![param(x), param(dy), param(scale)];
    first.extend(other.map(param));
    first.push(param(dx));
    first.extend(parts);
    let mut way = Way { workspace_bytes: scratch_bytes, ..Way::default() };
    let (kernel, schedule) = &plan.parts;
    way.launches.push(launch(kernel, schedule, &env, first)?);
    let (kernel, schedule) = &plan.finish;
    let sums = parts.into_iter().zip(vectors).flat_map(|(part, vector)| [part, param(vector)]);
    way.launches.push(launch(kernel, schedule, &env, sums.collect())?);
    Ok(way)
}
