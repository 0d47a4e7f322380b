//! [`OnDevice`]: a product's choices timed, checked and compared on a GPU, while threads compile those that come next.
//!
//! A kernel that never ends cannot be stopped from here: [`Watch`] notices, and calls what it was given.

use crate::products::Products;
use crate::search::{Arm, Measure, Timed};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{Ours, programs};
use tilewright_bench_gpu::measure::{Sets, check_ours, compare_ours, time_ours};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::Stream;
use tilewright_kernels::gemm::{Candidate, Problem, candidate};
use tilewright_launch::Loader;

/// Choices in the order in which they are wanted, and what came of compiling them.
pub(crate) struct Ahead<'a> {
    problem: &'a Problem,
    products: &'a Products,
    loader: &'a Loader,
    jobs: Mutex<Jobs>,
    changed: Condvar,
}

#[derive(Default)]
struct Jobs {
    queue: VecDeque<usize>,
    /// None while a thread is at it.
    made: BTreeMap<usize, Option<std::result::Result<Candidate, String>>>,
    closed: bool,
}

impl<'a> Ahead<'a> {
    pub(crate) fn new(
        problem: &'a Problem,
        products: &'a Products,
        loader: &'a Loader,
    ) -> Ahead<'a> {
        let (jobs, changed) = (Mutex::default(), Condvar::new());
        Ahead { problem, products, loader, jobs, changed }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a compiling thread does, until [`Ahead::close`].
    pub(crate) fn work(&self) {
        loop {
            let point = {
                let mut jobs = self.lock();
                loop {
                    if jobs.closed {
                        return;
                    }
                    if let Some(point) = jobs.queue.pop_front() {
                        jobs.made.insert(point, None);
                        break point;
                    }
                    jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let made = self.make(point);
            self.lock().made.insert(point, Some(made));
            self.changed.notify_all();
        }
    }

    /// Makes what was announced, on as many threads as there are processors, until `deadline`; how many were made.
    pub(crate) fn make_all(&self, deadline: Instant) -> usize {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while Instant::now() < deadline {
                        let Some(point) = self.lock().queue.pop_front() else { return };
                        let made = self.make(point);
                        self.lock().made.insert(point, Some(made));
                    }
                });
            }
        });
        self.lock().made.values().filter(|m| matches!(m, Some(Ok(_)))).count()
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn make(&self, point: usize) -> std::result::Result<Candidate, String> {
        let said = |e: Error| e.message().to_owned();
        let made = candidate(self.problem, &self.products.choices[point]).map_err(said)?;
        let made = made.ok_or("the lowering refuses it")?;
        for program in programs(&made).map_err(said)? {
            self.loader.compile(&program).map_err(said)?;
        }
        Ok(made)
    }

    pub(crate) fn announce(&self, points: &[usize]) {
        let mut jobs = self.lock();
        let fresh = points.iter().filter(|p| !jobs.made.contains_key(p)).copied();
        let fresh: Vec<usize> = fresh.collect();
        jobs.queue.extend(fresh);
        drop(jobs);
        self.changed.notify_all();
    }

    /// The candidate of a point, compiled.
    fn take(&self, point: usize) -> std::result::Result<Candidate, String> {
        let mut jobs = self.lock();
        loop {
            match jobs.made.get(&point) {
                Some(Some(made)) => return made.clone(),
                Some(None) => {
                    jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                }
                // Nobody has begun: it is made here.
                None => {
                    jobs.queue.retain(|p| *p != point);
                    jobs.made.insert(point, None);
                    drop(jobs);
                    let made = self.make(point);
                    jobs = self.lock();
                    jobs.made.insert(point, Some(made));
                }
            }
        }
    }
}

/// Closes the queue whatever happens, so that its threads end.
pub(crate) struct Closing<'a>(pub(crate) &'a Ahead<'a>, pub(crate) &'a Watch);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
        self.1.close();
    }
}

/// How long the device may be silent.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the device is at, and since when.
#[derive(Default)]
pub(crate) struct Watch {
    at: Mutex<(Option<(Instant, String)>, bool)>,
    changed: Condvar,
}

impl Watch {
    fn set(&self, what: Option<String>) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        at.0 = what.map(|what| (Instant::now(), what));
    }

    fn close(&self) {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_all();
    }

    /// What the watching thread does, until the end.
    pub(crate) fn work(&self, on_hang: fn(&str)) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        while !at.1 {
            if let (Some((since, what)), _) = &*at
                && since.elapsed() > PATIENCE
            {
                let what = what.clone();
                drop(at);
                return on_hang(&what);
            }
            let step = Duration::from_millis(500);
            let waited = self.changed.wait_timeout(at, step);
            at = waited.map_or_else(|e| e.into_inner().0, |(at, _)| at);
        }
    }
}

/// A product on a device.
pub(crate) struct OnDevice<'a> {
    pub(crate) stream: &'a Stream,
    pub(crate) support: &'a Support,
    pub(crate) loader: &'a Loader,
    pub(crate) sets: &'a Sets,
    pub(crate) products: &'a Products,
    pub(crate) baseline: &'a Candidate,
    pub(crate) ahead: &'a Ahead<'a>,
    pub(crate) watch: &'a Watch,
    /// Rows that are checked.
    pub(crate) rows: u64,
    /// The greatest error that counts as right.
    pub(crate) allowed: f64,
    pub(crate) began: Instant,
}

impl OnDevice<'_> {
    fn name(&self, arm: Arm) -> String {
        match arm {
            Arm::Baseline => "the model's pick".into(),
            Arm::Point(p) => self.products.knobs[p].to_string(),
        }
    }

    fn load(&self, arm: Arm) -> std::result::Result<Ours, String> {
        let made;
        let candidate = match arm {
            Arm::Baseline => self.baseline,
            Arm::Point(p) => {
                made = self.ahead.take(p)?;
                &made
            }
        };
        Ours::load(self.loader, self.stream, candidate).map_err(|e| e.message().to_owned())
    }

    /// Does something with an arm; a failure is the arm's as long as the device still answers.
    fn with<T>(
        &self,
        arm: Arm,
        f: impl FnOnce(&Ours) -> Result<T>,
    ) -> Result<std::result::Result<T, String>> {
        let loaded = self.load(arm);
        self.watch.set(Some(self.name(arm)));
        let outcome = match &loaded {
            Ok(ours) => f(ours).map_err(|e| e.message().to_owned()),
            Err(e) => Err(e.clone()),
        };
        if outcome.is_err() {
            let context = || format!("after {}", self.name(arm));
            self.stream.synchronize().map_err(|e| e.with_context(context()))?;
        }
        self.watch.set(None);
        Ok(outcome)
    }
}

impl Measure for OnDevice<'_> {
    fn announce(&mut self, points: &[usize]) {
        self.ahead.announce(points);
    }

    fn time(&mut self, arm: Arm, give_up_us: f64) -> Result<Timed> {
        self.with(arm, |ours| time_ours(self.stream, self.sets, ours, give_up_us))
    }

    fn check(&mut self, arm: Arm) -> Result<Timed> {
        let checked = self
            .with(arm, |ours| check_ours(self.stream, self.support, self.sets, ours, self.rows))?;
        Ok(checked.and_then(|(error, unwritten)| match unwritten {
            0 if error <= self.allowed => Ok(error),
            0 => Err(format!("error {error:.2e}, and {:.2e} is allowed", self.allowed)),
            n => Err(format!("{n} elements were not written")),
        }))
    }

    fn compare(&mut self, arms: &[Arm], rounds: usize) -> Result<Vec<f64>> {
        let all: std::result::Result<Vec<Ours>, String> =
            arms.iter().map(|arm| self.load(*arm)).collect();
        let all = all.map_err(Error::bug)?;
        self.watch.set(Some("the finalists".into()));
        let times = compare_ours(self.stream, self.sets, &all.iter().collect::<Vec<_>>(), rounds)?;
        self.watch.set(None);
        Ok(times.into_iter().map(|[_, median, _]| median).collect())
    }

    fn elapsed_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}
