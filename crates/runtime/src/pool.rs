//! [`Pool`]: a fixed set of threads that share the blocks of one kernel at a time.
//!
//! The caller is worker 0 and takes part. Work is a range of block numbers. Each worker has an equal, contiguous share
//! of it, always in the same place: what it wrote in one kernel is mostly what it reads in the next, out of its own
//! caches, and a share of a matrix's columns is read by one worker alone. A worker takes its share from the front, in
//! chunks, then what others have left from the back, so threads that are late or slow do less. Which thread runs a
//! block never changes what the block computes. A worker enters a job while there is something left of it, and the caller waits for
//! those that did: one that sleeps, or that the system has taken its core from, costs nothing. Workers spin for a moment after a kernel (the next one usually
//! follows within microseconds), then sleep.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(200);

/// Runs blocks `first..last` as worker number `.2`.
type Task<'a> = &'a (dyn Fn(i64, i64, usize) + Sync + 'a);

/// The part of [`Shared::gate`] that counts workers inside.
const INSIDE: u64 = 0xffff;
/// The part of [`Shared::gate`] that says that workers may enter.
const OPEN: u64 = 1 << 16;
/// Where the number of the job begins in [`Shared::gate`].
const EPOCH: u32 = 32;

/// Chunks that nobody has taken: the first in the low half, one past the last in the high half. In cache lines of its own.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, first: u64, end: u64) {
        self.0.store(end << 32 | first, Ordering::Relaxed);
    }

    /// Takes a chunk, the owner the first, others the last.
    fn take(&self, owner: bool) -> Option<i64> {
        let mut left = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = (left & 0xffff_ffff, left >> 32);
            if first >= end {
                return None;
            }
            let (chunk, rest) = match owner {
                true => (first, end << 32 | (first + 1)),
                false => (end - 1, (end - 1) << 32 | first),
            };
            match self.0.compare_exchange_weak(left, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return i64::try_from(chunk).ok(),
                Err(now) => left = now,
            }
        }
    }
}

struct Shared {
    /// Number of the current job, for whose change workers wait; whether they may enter it; how many are inside. All in one
    /// word, so that nobody enters a job that is closed.
    gate: AtomicU64,
    /// The current job. Written by the caller while the gate is closed and nobody is inside.
    job: UnsafeCell<Option<Task<'static>>>,
    /// What is left of each worker's share.
    shares: Box<[Share]>,
    total: AtomicI64,
    chunk: AtomicI64,
    stop: AtomicBool,
    /// Set when a task panicked on a worker.
    poisoned: AtomicBool,
    /// Workers that sleep, or are about to.
    asleep: AtomicUsize,
    sleepers: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only field without its own synchronisation. The caller writes it only while
// the gate is closed and no worker is inside, and publishes it with a release store that opens the gate;
// workers read it only after they entered, with an acquire exchange that found the gate open.
unsafe impl Sync for Shared {}

/// A fixed set of threads; see the module's head.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    /// One job at a time: sessions that run concurrently take turns, kernel by kernel.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

impl Pool {
    /// A pool of `threads` workers, the caller included (at least 1). Threads that cannot be
    /// started are done without.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            shares: (0..threads.max(1)).map(|_| Share(AtomicU64::new(0))).collect(),
            total: AtomicI64::new(0),
            chunk: AtomicI64::new(1),
            stop: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            sleepers: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut handles = Vec::new();
        for worker in 1..threads.max(1) {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("tilewright-{worker}"));
            match thread.spawn(move || work(&shared, worker)) {
                Ok(handle) => handles.push(handle),
                Err(_) => break,
            }
        }
        Pool { shared, handles, turn: Mutex::new(()) }
    }

    /// Number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `task(first, last, worker)` on disjoint ranges that cover `0..blocks`, and returns
    /// when all are done. `worker` is below [`Pool::threads`], and each worker runs one range at a
    /// time.
    ///
    /// # Panics
    /// When the task panicked on some thread.
    pub fn run(&self, blocks: i64, task: &(dyn Fn(i64, i64, usize) + Sync)) {
        let workers = self.handles.len();
        if blocks <= 0 {
            return;
        }
        if workers == 0 || blocks == 1 {
            return task(0, blocks, 0);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // Enough chunks that the last ones even out, few enough that taking them costs nothing.
        let all = workers as i64 + 1;
        let chunk = (blocks / (8 * all)).max(1);
        // SAFETY: the lifetime is only erased while this function runs: it returns after the gate was
        // closed and the last worker has left, when none will call the task any more.
        let erased = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: the gate is closed and nobody inside (the last job ended before its `run` returned,
        // and `turn` keeps other callers out), so no worker reads `job` now.
        unsafe { *shared.job.get() = Some(erased) };
        shared.poisoned.store(false, Ordering::Relaxed);
        // At most two chunks for each of the parts above.
        let chunks = ((blocks - 1) / chunk + 1) as u64;
        for (worker, share) in (0..=workers as u64).zip(&shared.shares) {
            share.set(chunks * worker / all as u64, chunks * (worker + 1) / all as u64);
        }
        shared.total.store(blocks, Ordering::Relaxed);
        shared.chunk.store(chunk, Ordering::Relaxed);
        let epoch = (shared.gate.load(Ordering::Relaxed) >> EPOCH).wrapping_add(1);
        shared.gate.store(epoch << EPOCH | OPEN, Ordering::SeqCst);
        // A worker says that it goes to sleep before it looks at the epoch for the last time: either it
        // sees the new one, or it is seen here. Mostly all spin, and nobody asks the system.
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            // Taking the lock orders this wake-up after a worker's last look at the epoch.
            let _guard = shared.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let wait = WaitForWorkers(shared);
        drain(shared, task, 0);
        drop(wait);
        assert!(!shared.poisoned.load(Ordering::Relaxed), "a task panicked on a worker");
    }
}

/// Closes the gate and waits on drop, so that a panic of the caller's share still waits for the others.
struct WaitForWorkers<'a>(&'a Shared);

impl Drop for WaitForWorkers<'_> {
    fn drop(&mut self) {
        let mut spins = 0u32;
        self.0.gate.fetch_and(!OPEN, Ordering::AcqRel);
        while self.0.gate.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins < 20_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.gate.fetch_add(1 << EPOCH, Ordering::SeqCst);
        {
            let _guard = self.shared.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for handle in self.handles.drain(..) {
            // A worker that panicked has already been reported by `run`.
            let _ = handle.join();
        }
    }
}

/// Runs a worker's share, then what others have left of theirs.
fn drain(shared: &Shared, task: Task<'_>, worker: usize) {
    let total = shared.total.load(Ordering::Relaxed);
    let size = shared.chunk.load(Ordering::Relaxed);
    let (before, from) = shared.shares.split_at(worker);
    for (distance, share) in from.iter().chain(before).enumerate() {
        while let Some(chunk) = share.take(distance == 0) {
            let first = chunk * size;
            task(first, (first + size).min(total), worker);
        }
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        seen = wait_for_job(shared, seen);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        if !enter(shared) {
            continue;
        }
        // SAFETY: the gate was opened after the caller wrote `job`, and the caller does not write
        // again before this worker has left.
        let task = unsafe { *shared.job.get() };
        if let Some(task) = task {
            let run = std::panic::AssertUnwindSafe(|| drain(shared, task, worker));
            if std::panic::catch_unwind(run).is_err() {
                shared.poisoned.store(true, Ordering::Relaxed);
            }
        }
        shared.gate.fetch_sub(1, Ordering::Release);
    }
}

/// Enters the job that is open, if one is.
fn enter(shared: &Shared) -> bool {
    let one_more = |gate: u64| (gate & OPEN != 0).then_some(gate + 1);
    shared.gate.fetch_update(Ordering::Acquire, Ordering::Relaxed, one_more).is_ok()
}

/// Waits until the epoch differs from `seen`, and returns it.
fn wait_for_job(shared: &Shared, seen: u64) -> u64 {
    let start = Instant::now();
    loop {
        for _ in 0..200 {
            let epoch = shared.gate.load(Ordering::Acquire) >> EPOCH;
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            break;
        }
    }
    let mut guard = shared.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
    shared.asleep.fetch_add(1, Ordering::SeqCst);
    loop {
        let epoch = shared.gate.load(Ordering::SeqCst) >> EPOCH;
        if epoch != seen {
            shared.asleep.fetch_sub(1, Ordering::SeqCst);
            return epoch;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_runs_once() {
        let pool = Pool::new(4);
        for blocks in [0, 1, 2, 3, 7, 64, 1000] {
            let counts: Vec<AtomicUsize> = (0..blocks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(blocks, &|first, last, worker| {
                assert!(worker < 4);
                for i in first..last {
                    counts[i as usize].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn many_small_jobs_and_sleep_between() {
        let pool = Pool::new(2);
        let sum = AtomicI64::new(0);
        for round in 0..2000 {
            if round % 500 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            pool.run(3, &|first, last, _| {
                sum.fetch_add(last - first, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.load(Ordering::Relaxed), 6000);
    }

    #[test]
    fn a_panic_on_a_worker_reaches_the_caller_and_the_pool_lives() {
        let pool = Pool::new(2);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(100, &|first, _, _| assert!(first < 50, "boom"));
        }));
        assert!(result.is_err());
        pool.run(100, &|_, _, _| {});
    }
}
