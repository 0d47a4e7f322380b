//! [`HostDecoder`]: a plan in the device interpreter.

use super::{DecodeMachine, DecodePlan, Which};
use std::sync::Arc;
use tilewright_base::{Error, Result, ResultExt};
use tilewright_data::Tensor;
use tilewright_interp::{Mode, device};
use tilewright_kernels::decode::AT;
use tilewright_tile::Access;

/// Memory in host vectors; what nobody has written is 0xFF (NaN in every float type).
pub struct HostDecoder {
    plan: Arc<DecodePlan>,
    memory: Vec<Vec<u8>>,
}

impl HostDecoder {
    /// With the plan's weights.
    ///
    /// # Errors
    /// When a weight cannot be rounded to its type.
    pub fn new(plan: Arc<DecodePlan>) -> Result<HostDecoder> {
        let mut memory = Vec::new();
        for region in &plan.regions {
            let mut bytes = Vec::with_capacity(region.bytes);
            for tensor in &region.data {
                bytes.extend_from_slice(region.stored(tensor)?.bytes());
            }
            bytes.resize(region.bytes, 0xFF);
            memory.push(bytes);
        }
        Ok(HostDecoder { plan, memory })
    }
}

impl DecodeMachine for HostDecoder {
    fn write(&mut self, region: usize, bytes: &[u8]) -> Result<()> {
        let to = self.memory[region].get_mut(..bytes.len());
        to.ok_or_else(|| Error::bug("more bytes than a region has"))?.copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, region: usize) -> Result<Vec<u8>> {
        Ok(self.memory[region].clone())
    }

    fn prompt(&mut self, prompts: &[Vec<i64>]) -> Result<bool> {
        let plan = self.plan.clone();
        let Some(prompt) = &plan.prompt else { return Ok(false) };
        super::prompt::interpreted(&plan, prompt, prompts, &mut self.memory)?;
        Ok(true)
    }

    fn run(&mut self, which: Which) -> Result<()> {
        let plan = self.plan.clone();
        let steps = if which == Which::Token { &plan.token } else { &plan.chunk };
        // Weights, which no step writes, may be read before the kernel in front has ended.
        let written = |region: usize| {
            steps.iter().any(|step| {
                let params = step.program.params.iter().zip(&step.operands);
                params.into_iter().any(|((_, p), &r)| r == region && p.access != Access::In)
            })
        };
        let weights: Vec<bool> = (plan.regions.iter().enumerate())
            .map(|(number, region)| !region.data.is_empty() && !written(number))
            .collect();
        for step in steps {
            let count = step.program.params.len();
            let params = step.program.params.iter().zip(&step.operands);
            let constants = params.filter(|(_, r)| weights[**r]).map(|((id, _), _)| id).collect();
            let options = device::Options {
                mode: Mode::Exact,
                clusters: 2,
                constants,
                ..device::Options::default()
            };
            let mut sizes = step.sizes.clone();
            if let Some(&at) = step.operands.get(count) {
                let bytes = tilewright_data::Bytes::copy_from(&self.memory[at]);
                let position = Tensor::new(tilewright_base::DType::I32, vec![1], bytes)?.get_i64(0);
                sizes.insert(AT.into(), position);
            }
            let mut buffers: Vec<Vec<u8>> =
                step.operands[..count].iter().map(|&r| self.memory[r].clone()).collect();
            device::run(&step.program, &sizes, &mut buffers, &options)
                .context(|| format!("step {}", step.label))?;
            for ((bytes, &r), (_, param)) in
                buffers.into_iter().zip(&step.operands).zip(step.program.params.iter())
            {
                if param.access != Access::In {
                    self.memory[r] = bytes;
                }
            }
        }
        Ok(())
    }
}
