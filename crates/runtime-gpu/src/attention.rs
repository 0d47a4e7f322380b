//! An attention of a plan, with its sizes, as a problem of the kernel library.

use crate::choose::{Launch, Source, Way};
use crate::product::{alignment, number};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_kernels::attention::{self, Mask, MaskKind, Place, Problem, Strides};
use tilewright_kernels::gemm::Precision;
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;
use tilewright_plan::{Attention, Heads};
use tilewright_target::Gpu;

fn strides(heads: &Heads, sizes: &Env) -> Result<Strides> {
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

/// Ways to compute an attention of these sizes, best first, at most `most`.
///
/// # Errors
/// Unsupported when the library has no kernel for it.
pub(crate) fn ways(a: &Attention, sizes: &Env, gpu: &Gpu, most: usize) -> Result<Vec<Way>> {
    let dtype = a.q.dtype;
    if a.k.dtype != dtype || a.v.dtype != dtype {
        return Err(Error::unsupported("queries, keys and values of several types"));
    }
    let (queries, keys) = (number(&a.queries, sizes)?, number(&a.keys, sizes)?);
    let align = |heads: &Heads| Ok::<_, Error>(alignment([start(heads, sizes)?]));
    let mask = match &a.mask {
        None => None,
        Some(m) => Some(Mask {
            dtype: m.dtype,
            kind: if m.dtype == DType::Bool { MaskKind::Keep } else { MaskKind::Add },
            strides: strides(m, sizes)?,
            align: align(m)?,
        }),
    };
    let problem = Problem {
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
        lse: false,
        zeros: a.zeros,
        q: strides(&a.q, sizes)?,
        k: strides(&a.k, sizes)?,
        v: strides(&a.v, sizes)?,
        o: strides(&a.o, sizes)?,
        align: [align(&a.q)?, align(&a.k)?, align(&a.v)?, align(&a.o)?],
    };
    let mut out = Vec::new();
    for candidate in attention::plan(&problem, gpu, most)? {
        let mut way = Way {
            workspace_bytes: candidate.workspace_bytes,
            estimate_us: candidate.estimate_us,
            ..Way::default()
        };
        for step in &candidate.steps {
            let program = Arc::new(lower(&step.kernel, &step.schedule)?);
            let of = |heads: &Heads| {
                let offset = start(heads, sizes)? as u64;
                Ok(Source::Param { param: heads.param, offset })
            };
            let operands = step
                .operands
                .iter()
                .map(|place| match place {
                    Place::Q => of(&a.q),
                    Place::K => of(&a.k),
                    Place::V => of(&a.v),
                    Place::O => of(&a.o),
                    Place::Mask => match &a.mask {
                        Some(mask) => of(mask),
                        None => Err(Error::bug("a mask that is not there")),
                    },
                    Place::Lse => Err(Error::bug("nobody asked for the log-sum-exp")),
                    Place::Workspace { offset, bytes } => {
                        Ok(Source::Workspace { offset: *offset, bytes: *bytes })
                    }
                })
                .collect::<Result<_>>()?;
            let (sizes, schedule) = (step.sizes.clone(), step.schedule.to_string());
            way.launches.push(Launch { program, sizes, operands, schedule });
        }
        out.push(way);
    }
    Ok(out)
}
