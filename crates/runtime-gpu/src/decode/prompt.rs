//! A whole prompt at once: the model's graph as a plan like all others, with tensor cores, over the weights of the step.
//!
//! The plan takes tokens and gives keys and values of every layer (`present.N.key`), which one kernel each puts into the
//! cache. Lengths are rounded up, so that few sizes are ever compiled: what lies behind the prompt changes nothing before it,
//! and is overwritten by the steps that follow. The last token of a prompt is left to a step, which gives the logits.

use super::DecodePlan;
use crate::choose::Chooser;
use crate::direct::Direct;
use crate::interpret::interpret;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Stream;
use tilewright_data::Tensor;
use tilewright_launch::{Loader, Operand};
use tilewright_layout::Env;
use tilewright_plan::Plan;
use tilewright_target::Gpu;

/// Prompts from this length on are taken at once: shorter ones are sooner done in chunks.
pub(super) const FROM: i64 = 64;

/// The plan of a prompt.
#[derive(Debug)]
pub struct PromptPlan {
    /// Tokens `[B, S]` in, keys and values `[B, heads, S, width]` of each layer out.
    pub plan: Plan,
    /// For this GPU.
    pub machine: Gpu,
}

/// A length, rounded up to an eighth of a power of two.
pub(super) fn padded(length: i64, most: i64) -> i64 {
    let step = ((length.max(1) as u64).next_power_of_two() as i64 / 8).max(FROM);
    ((length + step - 1) / step * step).min(most)
}

/// Tokens `[batch, length]`, each row padded with token 0.
fn tokens(prompts: &[Vec<i64>], length: i64) -> Result<Tensor> {
    let length = usize::try_from(length).map_err(|_| Error::bug("a prompt's length"))?;
    let mut all = Vec::new();
    for prompt in prompts {
        all.extend_from_slice(prompt);
        all.resize(all.len() + length - prompt.len(), 0);
    }
    Tensor::from_i64s(DType::I64, &[prompts.len(), length], &all)
}

impl DecodePlan {
    /// The region of the cache that each output of the prompt's plan belongs to.
    fn prompt_regions(&self, plan: &Plan) -> Result<Vec<usize>> {
        let region = |(i, (name, ..)): (usize, &(String, DType, Vec<_>))| {
            let (layer, which) = (i / 2, i % 2);
            let wanted = format!("present.{layer}.{}", ["key", "value"][which]);
            let cache = self.caches.get(layer).filter(|_| *name == wanted);
            cache.map(|c| c[which]).ok_or_else(|| Error::bug(format!("output {name} of a prompt")))
        };
        plan.outputs.iter().enumerate().map(region).collect()
    }
}

/// The prompt's plan on a device.
pub(super) struct Prompt {
    direct: Direct,
}

impl Prompt {
    /// Copies what the step has no copy of; `address` is where a region is.
    pub(super) fn new(
        decode: &DecodePlan,
        prompt: &PromptPlan,
        loader: Arc<Loader>,
        address: &dyn Fn(usize) -> u64,
    ) -> Result<Prompt> {
        let known = |constant: &Tensor| {
            let bytes = constant.bytes();
            let same = |region: &super::Region| {
                let mut rest = bytes;
                region.dtype == constant.dtype()
                    && region.bytes == bytes.len()
                    && region.data.iter().all(|part| {
                        let here = part.bytes();
                        let (first, behind) = rest.split_at(here.len().min(rest.len()));
                        rest = behind;
                        part.dtype() == region.dtype && (std::ptr::eq(first, here) || first == here)
                    })
            };
            let found = decode.regions.iter().position(|r| !r.data.is_empty() && same(r));
            found.map(address)
        };
        let machine = prompt.machine.clone();
        Ok(Prompt { direct: Direct::with_known(prompt.plan.clone(), loader, machine, &known)? })
    }

    /// Puts a prompt into the cache, from position 0 on. Waits for the end.
    pub(super) fn run(
        &self,
        decode: &DecodePlan,
        prompts: &[Vec<i64>],
        (loader, stream): (&Loader, &Stream),
        operand: &dyn Fn(usize) -> Operand,
    ) -> Result<()> {
        let plan = self.direct.plan();
        let length = prompts.first().map_or(0, Vec::len) as i64;
        let length = padded(length, decode.positions);
        let size = |name: &str| match name {
            "B" => Ok(decode.batch),
            "S" => Ok(length),
            _ => Err(Error::bug(format!("size {name} of a prompt"))),
        };
        let sizes: Vec<i64> = plan.symbols.iter().map(|s| size(&s.name)).collect::<Result<_>>()?;
        let fitted = self.direct.fit(&sizes)?;
        let ids = tokens(prompts, length)?;
        if fitted.input_bytes() != [ids.bytes().len()] {
            return Err(Error::bug("inputs of a prompt beside its tokens"));
        }
        let input = stream.alloc(ids.bytes().len())?;
        input.write_at(stream, 0, ids.bytes())?;
        let mut total = 0;
        let starts: Vec<usize> = fitted
            .output_bytes()
            .iter()
            .map(|bytes| {
                let start = total;
                total += bytes.next_multiple_of(256);
                start
            })
            .collect();
        let results = stream.alloc(total)?;
        let scratch = stream.alloc(fitted.scratch_bytes().max(256))?;
        let outputs: Vec<u64> = starts.iter().map(|s| results.address() + *s as u64).collect();
        // SAFETY: the memory is as long as `fitted` says, lies apart, and stays until the stream is synchronised below;
        // the stream orders its uses.
        unsafe { fitted.launch(&[input.address()], &outputs, scratch.address(), stream)? };
        let keep = loader.load(&decode.keep)?;
        let env = Env::from([(Arc::from("S"), length)]);
        for ((region, address), bytes) in
            decode.prompt_regions(plan)?.into_iter().zip(outputs).zip(fitted.output_bytes())
        {
            let from = Operand { address, bytes: *bytes as u64 };
            let kernel = keep.bind(&env, &[from, operand(region)])?;
            // SAFETY: as above; the cache lives as long as the decoder, which waits before it drops it.
            unsafe { kernel.launch(stream)? };
        }
        stream.synchronize()
    }
}

/// The keys and values of a prompt, by the device interpreter: the bytes of each region of the cache with the first positions
/// replaced.
pub(super) fn interpreted(
    decode: &DecodePlan,
    prompt: &PromptPlan,
    prompts: &[Vec<i64>],
    memory: &mut [Vec<u8>],
) -> Result<()> {
    let length = prompts.first().map_or(0, Vec::len) as i64;
    let ids = tokens(prompts, padded(length, decode.positions))?;
    let ran = interpret(&prompt.plan, &[ids], &mut Chooser::new(prompt.machine.clone()))?;
    for (region, tensor) in decode.prompt_regions(&prompt.plan)?.into_iter().zip(&ran.outputs) {
        let [batch, heads, length, width] = *tensor.shape() else {
            return Err(Error::bug("keys of a prompt without four axes"));
        };
        let positions = usize::try_from(decode.positions).unwrap_or(0);
        let line = width * tensor.dtype().size();
        let (from, to) = (tensor.bytes(), &mut memory[region]);
        for head in 0..batch * heads {
            let part = &from[head * length * line..][..length * line];
            to[head * positions * line..][..part.len()].copy_from_slice(part);
        }
    }
    Ok(())
}
