//! A step of the library, with its sizes, as launches: attention with its log-sum-exp, and gradients.

use crate::attention::{align, at, launch, mask_at, problem, strides, ways as attention_ways};
use crate::choose::{Source, Way};
use crate::norm_backward::{NormBackward, NormGradient};
use crate::product::number;
use tilewright_base::Result;
use tilewright_kernels::attention::{self, BackwardPlace, BackwardProblem, Gradients};
use tilewright_layout::Env;
use tilewright_plan::{AttentionBackward, LayerNormBackward, Library};
use tilewright_target::Gpu;

/// The way to run a call of these sizes; one, since the library decides.
///
/// # Errors
/// Unsupported when the library has no kernel for it.
pub(crate) fn ways(call: &Library, sizes: &Env, gpu: &Gpu, most: usize) -> Result<Vec<Way>> {
    match call {
        Library::AttentionLse { attention, lse } => {
            attention_ways(attention, Some(*lse), sizes, gpu, most)
        }
        Library::AttentionBackward(call) => Ok(vec![attention_backward(call, sizes, gpu)?]),
        Library::LayerNormBackward(call) => Ok(vec![layer_norm_backward(call, sizes, gpu)?]),
    }
}

fn attention_backward(call: &AttentionBackward, sizes: &Env, gpu: &Gpu) -> Result<Way> {
    let AttentionBackward { forward: a, lse, of_result, gradients: [dq, dk, dv] } = call;
    let forward = problem(a, true, sizes)?;
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
