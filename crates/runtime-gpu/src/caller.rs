//! Runs in the caller's memory and in the caller's stream: no copies, no waiting.
//!
//! The kernels of a run are bound to its addresses. A caller that repeats them (a framework whose allocator
//! hands out the same blocks in each step) gets a recorded graph from the second run on; one that does not
//! pays for binding the launches each time, and nothing else.

use crate::bind::Place;
use crate::session::{ReadyStep, Session, StepTime, launch_all};
use tilewright_base::{Error, Result};
use tilewright_cuda::{Event, Stream};
use tilewright_layout::Env;
use tilewright_plan::Plan;
use tilewright_plan::bind::concrete;

/// How many sets of sizes and addresses a session remembers.
const MAX_PLACES: usize = 32;

impl Session {
    /// Puts one run into `stream`: from the inputs at these addresses on the device to the outputs at
    /// those, each contiguous and in the plan's order, with the sizes `env`.
    ///
    /// The first run with new sizes compiles kernels and may wait for the device; in a stream that is being
    /// recorded it is refused, later ones become part of the recording.
    ///
    /// # Errors
    /// Unsupported, with reasons, when a step of the plan needs the host; the device's.
    ///
    /// # Safety
    /// The addresses are aligned to 256 bytes and belong to tensors of the plan's sizes, which live and are not
    /// written by others until the run is over, in the order of `stream`; no output lies over another
    /// tensor. Recordings of the run are not replayed beside other runs of this session, nor after it is
    /// dropped.
    pub unsafe fn run_at(
        &mut self,
        env: &Env,
        inputs: &[u64],
        outputs: &[u64],
        stream: &Stream,
    ) -> Result<()> {
        let recording = stream.is_capturing()?;
        let at = self.prepare_at(env, Place::Caller { inputs, outputs }, recording)?;
        if recording {
            self.captured = true;
            return self.launch_steps(at, stream);
        }
        self.follow(stream)?;
        let ready = &mut self.ready[at];
        ready.runs += 1;
        if ready.runs == 2 {
            let mut report = std::mem::take(&mut ready.report);
            let segments = self.record(&self.ready[at].steps, &mut report)?;
            self.ready[at].segments = segments;
            self.ready[at].report = report;
        }
        self.replay_in(at, stream)?;
        self.mark(stream)
    }

    /// As [`Session::run_at`], and gives the time of each step on the device. Waits for the end.
    ///
    /// # Errors
    /// As [`Session::run_at`].
    ///
    /// # Safety
    /// As [`Session::run_at`].
    pub unsafe fn run_at_timed(
        &mut self,
        env: &Env,
        inputs: &[u64],
        outputs: &[u64],
        stream: &Stream,
    ) -> Result<Vec<StepTime>> {
        let at = self.prepare_at(env, Place::Caller { inputs, outputs }, false)?;
        self.follow(stream)?;
        // While the device is busy with this run, the host gets ahead of it.
        self.launch_steps(at, stream)?;
        let mut marks = vec![stream.record()?];
        for step in &self.ready[at].steps {
            if let ReadyStep::Device(launches) = step {
                launch_all(launches, stream)?;
            }
            marks.push(stream.record()?);
        }
        self.mark(stream)?;
        stream.synchronize()?;
        let pairs = marks.windows(2).enumerate();
        pairs
            .map(|(step, pair)| {
                let us = pair[1].since_us(&pair[0])?;
                Ok(StepTime { step, time: std::time::Duration::from_secs_f64(us * 1e-6) })
            })
            .collect()
    }

    /// Shapes of the plan's outputs for these sizes.
    ///
    /// # Errors
    /// The user's when a size is not known.
    pub fn output_shapes(plan: &Plan, env: &Env) -> Result<Vec<Vec<usize>>> {
        plan.outputs.iter().map(|(_, _, dims)| concrete(dims, env)).collect()
    }

    /// Finds or makes what such a run needs; its position in `self.ready`.
    fn prepare_at(&mut self, env: &Env, place: Place<'_>, recording: bool) -> Result<usize> {
        let key = place.key(self.exe.plan(), env);
        if let Some(at) = self.ready.iter().position(|r| r.bound.key == key) {
            return Ok(at);
        }
        let bound = self.bind(env, place)?;
        if recording && bound.total_bytes() > self.arena.len() {
            return Err(Error::unsupported(
                "the first run with new sizes, in a stream that is recorded",
            )
            .with_hint("run once before the recording begins"));
        }
        self.fit(&bound, MAX_PLACES)?;
        let at = self.push_ready(bound)?;
        let host = &self.ready[at].report.host_steps;
        if let Some((_, reason)) = host.first() {
            let message = format!("{} steps that need the host: {reason}", host.len());
            self.ready.pop();
            return Err(Error::unsupported(message));
        }
        Ok(at)
    }

    /// What comes next in `stream` waits for the last run, if that was in another one.
    fn follow(&self, stream: &Stream) -> Result<()> {
        match &self.last {
            Some((last, end)) if !last.same(stream) => stream.wait(end),
            _ => Ok(()),
        }
    }

    /// Remembers the end of a run.
    fn mark(&mut self, stream: &Stream) -> Result<()> {
        match &mut self.last {
            Some((last, end)) if last.same(stream) => end.record(stream),
            last => {
                let end = Event::new(stream.gpu())?;
                end.record(stream)?;
                *last = Some((stream.clone(), end));
                Ok(())
            }
        }
    }

    fn launch_steps(&self, at: usize, stream: &Stream) -> Result<()> {
        for step in &self.ready[at].steps {
            if let ReadyStep::Device(launches) = step {
                launch_all(launches, stream)?;
            }
        }
        Ok(())
    }
}
