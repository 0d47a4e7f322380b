//! Generation step by step: a [`Decoder`] as a list of launches over fixed memory.
//!
//! ```text
//! Decoder + batch, positions --DecodePlan--> regions of memory, launches of one step
//!          --Decoding<DeviceDecoder>--> on a device, one recorded graph for every step; most of a step is one launch where
//!                                       [`Streamed`] takes the model
//!          --Decoding<HostDecoder>----> in the device interpreter: the test that needs no GPU
//! ```
//!
//! Everything a step changes stays on the device: the position, the cache, the token that the next step begins with.
//! The host only starts steps, and now and then reads which tokens came out. Nothing depends on the position but what
//! kernels read from memory, so one plan and one graph serve all positions up to the declared number.

mod attend;
mod device;
mod host;
mod plan;
mod prompt;
mod streamed;
mod written;

pub use device::{DeviceDecoder, TimedLaunch};
pub use host::HostDecoder;
pub use plan::{DecodeOptions, DecodePlan, DecodeStep, Region};
pub use prompt::PromptPlan;
pub use streamed::Streamed;
pub use written::Written;

use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Bytes, Tensor};

/// Which launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// One token of every sequence, and the next one.
    Token,
    /// Several tokens of one prompt, nothing comes out.
    Chunk,
}

/// Where a plan runs.
pub trait DecodeMachine {
    /// Replaces the first bytes of a region.
    ///
    /// # Errors
    /// The device's.
    fn write(&mut self, region: usize, bytes: &[u8]) -> Result<()>;
    /// The bytes of a region, after all earlier steps.
    ///
    /// # Errors
    /// The device's.
    fn read(&mut self, region: usize) -> Result<Vec<u8>>;
    /// Starts a step. It need not be done on return.
    ///
    /// # Errors
    /// The device's.
    fn run(&mut self, which: Which) -> Result<()>;
    /// Puts keys and values of these tokens into the cache, one prompt per sequence, from position 0 on. Says whether it did:
    /// a plan need not have a way to do it at once.
    ///
    /// # Errors
    /// The device's.
    fn prompt(&mut self, prompts: &[Vec<i64>]) -> Result<bool>;
}

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Above 0; logits are divided by it.
    pub temperature: f64,
    /// How many of the likeliest tokens count.
    pub top_k: Option<i64>,
    /// The likeliest tokens count whose probabilities reach this together.
    pub top_p: Option<f64>,
}

/// A generation under way.
pub struct Decoding<M> {
    plan: Arc<DecodePlan>,
    machine: M,
    position: i64,
}

/// Steps after which the host looks at the tokens, to see whether all sequences have ended.
const LOOK_EVERY: usize = 16;

impl<M: DecodeMachine> Decoding<M> {
    /// On a machine that has the plan's regions.
    pub fn new(plan: Arc<DecodePlan>, machine: M) -> Decoding<M> {
        Decoding { plan, machine, position: 0 }
    }

    /// The plan.
    pub fn plan(&self) -> &DecodePlan {
        &self.plan
    }

    /// The machine.
    pub fn machine(&mut self) -> &mut M {
        &mut self.machine
    }

    /// Positions in the cache.
    pub fn position(&self) -> i64 {
        self.position
    }

    /// Forgets everything; `random` are numbers in [0, 1), one per position and sequence, used when tokens are drawn.
    ///
    /// # Errors
    /// The user's when the plan was made for another kind of choice; the device's.
    pub fn start(&mut self, sampling: Option<&Sampling>, random: &[f32]) -> Result<()> {
        self.move_to(0)?;
        let Some(s) = sampling else { return Ok(()) };
        let sharp = 1.0 / s.temperature;
        if !(s.temperature > 0.0 && sharp.is_finite()) {
            return Err(Error::user(format!("temperature {} is not above 0", s.temperature)));
        }
        let numbers =
            [sharp, s.top_k.unwrap_or(0) as f64, s.top_p.unwrap_or(1.0), 0.0].map(|v| v as f32);
        self.machine.write(self.plan.knobs, bytes_of(&numbers)?.bytes())?;
        let wanted = (self.plan.positions + 1) * self.plan.batch;
        if random.len() as i64 != wanted {
            return Err(Error::bug(format!("{} random numbers, not {wanted}", random.len())));
        }
        self.machine.write(self.plan.random, bytes_of(random)?.bytes())
    }

    /// Puts the position where the cache is valid up to: what comes next overwrites what was behind it.
    ///
    /// # Errors
    /// The user's for a position that the plan has no memory for; the device's.
    pub fn move_to(&mut self, position: i64) -> Result<()> {
        self.room(position, 0)?;
        self.position = position;
        self.machine.write(self.plan.at, ints(&[position])?.bytes())
    }

    fn room(&self, from: i64, more: i64) -> Result<()> {
        let most = self.plan.positions;
        if from < 0 || more < 0 || from + more > most {
            return Err(Error::user(format!(
                "{} tokens, and memory was made for sequences of up to {most}",
                from + more
            ))
            .with_hint("a larger --max-length makes room, up to what the model knows"));
        }
        Ok(())
    }

    fn known(&self, tokens: &[i64]) -> Result<()> {
        match tokens.iter().find(|&&t| t < 0 || t >= self.plan.vocabulary) {
            None => Ok(()),
            Some(t) => Err(Error::user(format!(
                "token {t} is not one of the {} that the model knows",
                self.plan.vocabulary
            ))),
        }
    }

    /// Takes prompts of equal length, one per sequence; the last step chooses the first new tokens.
    ///
    /// # Errors
    /// The user's about the prompts; the device's.
    pub fn prompt(&mut self, prompts: &[Vec<i64>]) -> Result<()> {
        let length = prompts.first().map_or(0, Vec::len);
        if prompts.len() as i64 != self.plan.batch || length == 0 {
            return Err(Error::user(format!(
                "{} prompts of {length} tokens for {} sequences",
                prompts.len(),
                self.plan.batch
            )));
        }
        if prompts.iter().any(|p| p.len() != length) {
            return Err(Error::unsupported("prompts of different lengths in one batch"));
        }
        self.room(self.position, length as i64)?;
        prompts.iter().try_for_each(|p| self.known(p))?;
        let mut at = 0;
        if self.position == 0 && length as i64 > prompt::FROM {
            let but_last: Vec<Vec<i64>> =
                prompts.iter().map(|p| p[..length - 1].to_vec()).collect();
            if self.machine.prompt(&but_last)? {
                at = length - 1;
                self.move_to(at as i64)?;
            }
        }
        let chunk = self.plan.chunk_rows as usize;
        while chunk > 0 && at + chunk < length {
            let tokens = ints(&prompts[0][at..at + chunk])?;
            self.machine.write(self.plan.chunk_tokens, tokens.bytes())?;
            self.machine.run(Which::Chunk)?;
            self.position += chunk as i64;
            at += chunk;
        }
        for at in at..length {
            let tokens: Vec<i64> = prompts.iter().map(|p| p[at]).collect();
            self.machine.write(self.plan.tokens, ints(&tokens)?.bytes())?;
            self.steps(1)?;
        }
        Ok(())
    }

    /// Starts steps, each with the tokens that the one before chose.
    ///
    /// # Errors
    /// The user's when the sequences become too long; the device's.
    pub fn steps(&mut self, count: usize) -> Result<()> {
        self.room(self.position, count as i64)?;
        for _ in 0..count {
            self.machine.run(Which::Token)?;
            self.position += 1;
        }
        Ok(())
    }

    /// The tokens chosen for the positions `from..=position`, per sequence.
    ///
    /// # Errors
    /// The device's.
    pub fn chosen(&mut self, from: i64) -> Result<Vec<Vec<i64>>> {
        let bytes = self.machine.read(self.plan.history)?;
        let tensor = Tensor::new(DType::I32, vec![bytes.len() / 4], Bytes::copy_from(&bytes))?;
        let all = tensor.to_i64s();
        let batch = self.plan.batch;
        let one = |b: i64| {
            (from..=self.position).map(|p| all[(p * batch + b) as usize]).collect::<Vec<_>>()
        };
        Ok((0..batch).map(one).collect())
    }

    /// After the prompts: up to `count` new tokens per sequence, fewer when all have met one of `ends` (which is the last
    /// one then).
    ///
    /// # Errors
    /// The user's when the sequences become too long; the device's.
    pub fn generate(&mut self, count: usize, ends: &[i64]) -> Result<Vec<Vec<i64>>> {
        let from = self.position;
        if count == 0 {
            return Ok(vec![Vec::new(); self.plan.batch as usize]);
        }
        self.room(from, count as i64 - 1)?;
        let mut done = 1;
        while done < count {
            let some = LOOK_EVERY.min(count - done);
            self.steps(some)?;
            done += some;
            if !ends.is_empty() && done < count {
                let ended = |s: &Vec<i64>| s.iter().any(|t| ends.contains(t));
                if self.chosen(from)?.iter().all(ended) {
                    break;
                }
            }
        }
        let mut all = self.chosen(from)?;
        for tokens in &mut all {
            if let Some(end) = tokens.iter().position(|t| ends.contains(t)) {
                tokens.truncate(end + 1);
            }
        }
        Ok(all)
    }

    /// The logits of the last step, `[batch, vocabulary]`.
    ///
    /// # Errors
    /// The device's.
    pub fn logits(&mut self) -> Result<Tensor> {
        let bytes = self.machine.read(self.plan.logits)?;
        let shape = vec![self.plan.batch as usize, self.plan.vocabulary as usize];
        Tensor::new(DType::F32, shape, Bytes::copy_from(&bytes))
    }
}

fn ints(values: &[i64]) -> Result<Tensor> {
    Tensor::from_i64s(DType::I32, &[values.len()], values)
}

fn bytes_of(values: &[f32]) -> Result<Tensor> {
    Tensor::from_slice(&[values.len()], values)
}
