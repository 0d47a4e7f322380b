//! Times a compiled model: medians over many runs.

#[cfg(feature = "cpu")]
use crate::compile::Compiled;
use std::time::Duration;
#[cfg(feature = "cpu")]
use {std::time::Instant, tilewright_base::Result, tilewright_data::Tensor};

/// Times of repeated runs.
#[derive(Clone, Debug)]
pub struct Times {
    /// Each run, in order.
    pub runs: Vec<Duration>,
}

impl Times {
    /// The run at this fraction of the sorted list: 0.5 is the median.
    pub fn quantile(&self, fraction: f64) -> Duration {
        let mut sorted = self.runs.clone();
        sorted.sort_unstable();
        let at =
            (fraction.clamp(0.0, 1.0) * (sorted.len().saturating_sub(1)) as f64).round() as usize;
        sorted.get(at).copied().unwrap_or_default()
    }

    /// The median.
    pub fn median(&self) -> Duration {
        self.quantile(0.5)
    }
}

#[cfg(feature = "cpu")]
/// Runs the model `warmup` times, then until `runs` runs or `limit` are over (at least 3 runs).
pub fn time(
    compiled: &Compiled,
    inputs: &[Tensor],
    warmup: usize,
    runs: usize,
    limit: Duration,
) -> Result<Times> {
    let mut session = compiled.session()?;
    let mut outputs = session.run(inputs)?;
    for _ in 1..warmup {
        session.run_into(inputs, &mut outputs)?;
    }
    let begin = Instant::now();
    let mut times = Times { runs: Vec::with_capacity(runs) };
    while times.runs.len() < runs && (times.runs.len() < 3 || begin.elapsed() < limit) {
        let start = Instant::now();
        session.run_into(inputs, &mut outputs)?;
        times.runs.push(start.elapsed());
    }
    Ok(times)
}

#[cfg(feature = "cpu")]
/// Median time of each step of the plan, in the plan's order.
pub fn step_medians(compiled: &Compiled, inputs: &[Tensor], runs: usize) -> Result<Vec<Duration>> {
    let mut session = compiled.session()?;
    session.run(inputs)?;
    let steps = compiled.plan().steps.len();
    let mut all: Vec<Vec<Duration>> = vec![Vec::with_capacity(runs); steps];
    for _ in 0..runs.max(1) {
        let mut times = Vec::with_capacity(steps);
        session.run_timed(inputs, &mut times)?;
        for t in times {
            all[t.step].push(t.time);
        }
    }
    Ok(all.into_iter().map(|runs| Times { runs }.median()).collect())
}
