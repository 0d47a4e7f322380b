//! Runs of steps for one image after the other ([`ImageRun`]): where their memory is, and how threads share them.
//!
//! A thread takes whole images and does all steps of the run for each, without waiting for others in between. What lies
//! between the steps has memory for one image a thread; addresses move so that every image lies there. Images that are
//! left when each thread has had equally many are shared block by block, step by step. With more threads than images the
//! steps run one after the other, as if there were no run.

use crate::clock::Watch;
use crate::memory::AlignedBuffer;
use crate::session::{Bound, BoundStep, Executable, call, launch};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tilewright_plan::arena::{ArenaPlan, Live, plan_arena};
use tilewright_plan::{BufferId, ImageRun, Plan};

/// A run with places for what lies between its steps.
pub(crate) struct BoundRun {
    pub(crate) steps: std::ops::Range<usize>,
    images: i64,
    /// Bytes between images of each argument of each step, one after the other; 0 for those that have memory for all images.
    distances: Vec<isize>,
    /// Arguments of a step, at most.
    most: usize,
    /// Bytes of what lies between the steps, for one image.
    part: usize,
}

/// Which runs to follow with so many threads, and for each buffer the one whose inside it is.
pub(crate) struct Inside<'p> {
    runs: Vec<&'p ImageRun>,
    of: Vec<Option<(usize, i64)>>,
    threads: usize,
}

impl<'p> Inside<'p> {
    pub(crate) fn new(plan: &'p Plan, threads: usize, by_image: bool) -> Inside<'p> {
        let enough = |run: &&ImageRun| by_image && run.images >= threads.max(1) as i64;
        let runs: Vec<&ImageRun> = plan.image_runs.iter().filter(enough).collect();
        let mut of = vec![None; plan.buffers.len()];
        for (number, run) in runs.iter().enumerate() {
            for &(buffer, distance) in &run.inner {
                of[buffer.index()] = Some((number, distance));
            }
        }
        Inside { runs, of, threads: threads.max(1) }
    }

    /// Elements that a buffer takes for one image, if it lies inside a run.
    pub(crate) fn elements(&self, buffer: BufferId) -> Option<i64> {
        self.of[buffer.index()].map(|(_, distance)| distance)
    }

    /// Whether two buffers lie inside the same run, or neither inside any.
    pub(crate) fn together(&self, [a, b]: [BufferId; 2]) -> bool {
        let run = |b: BufferId| self.of[b.index()].map(|(run, _)| run);
        run(a) == run(b)
    }

    /// From first to last step, with whole runs where the life of a buffer that lies in none meets one: its images are
    /// read and written until the run ends.
    pub(crate) fn widened(&self, buffer: BufferId, live: Live) -> Live {
        let inside = self.of[buffer.index()].is_some();
        let meets = |step: usize| self.runs.iter().find(|r| !inside && r.steps.contains(&step));
        let first = meets(live.first).map_or(live.first, |r| r.steps.start);
        let last = meets(live.last).map_or(live.last, |r| r.steps.end - 1);
        Live { first, last, ..live }
    }

    /// Places for all lives. Those inside a run lie together, once for each thread.
    pub(crate) fn places(
        &self,
        lives: &[Live],
        live_of: &[Option<usize>],
    ) -> (ArenaPlan, Vec<usize>) {
        let mut run_of = vec![None; lives.len()];
        for (live, run) in live_of.iter().zip(&self.of) {
            if let (Some(live), Some((run, _))) = (live, run) {
                run_of[*live] = Some(*run);
            }
        }
        let of_run = |run: Option<usize>| -> Vec<usize> {
            (0..lives.len()).filter(|&l| run_of[l] == run).collect()
        };
        let pick = |which: &[usize]| -> Vec<Live> { which.iter().map(|&l| lives[l]).collect() };
        let outside = of_run(None);
        let mut all = pick(&outside);
        let mut parts = Vec::new();
        for (number, run) in self.runs.iter().enumerate() {
            let which = of_run(Some(number));
            let part = plan_arena(&pick(&which));
            let (first, last) = (run.steps.start, run.steps.end - 1);
            all.push(Live { bytes: part.bytes.saturating_mul(self.threads), first, last });
            parts.push((which, part));
        }
        let arena = plan_arena(&all);
        let mut offsets = vec![0; lives.len()];
        for (&live, &offset) in outside.iter().zip(&arena.offsets) {
            offsets[live] = offset;
        }
        for ((which, part), start) in parts.iter().zip(&arena.offsets[outside.len()..]) {
            for (&live, offset) in which.iter().zip(&part.offsets) {
                offsets[live] = start + offset;
            }
        }
        let bytes_of_parts = parts.iter().map(|(_, part)| part.bytes).collect();
        (ArenaPlan { offsets, ..arena }, bytes_of_parts)
    }

    /// The runs with their steps' arguments.
    pub(crate) fn bound(&self, plan: &Plan, steps: &[BoundStep], parts: &[usize]) -> Vec<BoundRun> {
        let bytes = |b: &BufferId| -> isize {
            let size = plan.buffers[*b].dtype.size() as i64;
            self.of[b.index()].map_or(0, |(_, distance)| (distance * size) as isize)
        };
        let runs = self.runs.iter().zip(parts);
        runs.map(|(run, &part)| {
            let args = |step: &BoundStep| match step {
                BoundStep::Launch { args, .. } => args.clone(),
                BoundStep::Host { .. } => Vec::new(),
            };
            let all: Vec<Vec<BufferId>> = steps[run.steps.clone()].iter().map(args).collect();
            BoundRun {
                steps: run.steps.clone(),
                images: run.images,
                distances: all.iter().flatten().map(bytes).collect(),
                most: all.iter().map(Vec::len).max().unwrap_or(0),
                part,
            }
        })
        .collect()
    }
}

/// Runs the steps of a run, whose arguments lie at `pointers`, one step's after the other, for the first image and thread. Gives
/// the time of each step, over the threads, if that is asked for.
pub(crate) fn run_images(
    exe: &Executable,
    bound: &Bound,
    run: &BoundRun,
    pointers: &mut Vec<*mut u8>,
    scratch: &[AlignedBuffer],
    [alone, timed]: [bool; 2],
) -> Vec<Duration> {
    /// Raw addresses that worker threads may use.
    struct Addresses(*mut *mut u8);
    // SAFETY: the table outlives the parallel region. Threads read the arguments in it, and each writes a part of its own.
    unsafe impl Sync for Addresses {}
    let threads = if alone { 1 } else { exe.pool().threads() };
    let given = pointers.len();
    pointers.resize(given + threads * run.most, std::ptr::null_mut());
    let addresses = Addresses(pointers.as_mut_ptr());
    let addresses = &addresses;
    let steps = &bound.steps[run.steps.clone()];
    let spent: Vec<AtomicU64> = steps.iter().filter(|_| timed).map(|_| AtomicU64::new(0)).collect();
    // The arguments of a step for an image, in the part of the table that belongs to the thread.
    let moved = |at: usize, count: usize, image: i64, worker: usize| -> &[*mut u8] {
        // SAFETY: `at + count` is at most `given`, and workers are below `threads`, so all is inside the table; nobody
        // else uses this worker's part.
        let (from, to) = unsafe {
            let own = addresses.0.add(given + worker * run.most);
            let from = std::slice::from_raw_parts(addresses.0.add(at), count);
            (from, std::slice::from_raw_parts_mut(own, count))
        };
        for ((to, from), &distance) in to.iter_mut().zip(from).zip(&run.distances[at..]) {
            let home = if distance == 0 { 0 } else { (worker * run.part) as isize };
            *to = from.wrapping_offset(home.wrapping_sub(distance.wrapping_mul(image as isize)));
        }
        to
    };
    let add = |number: usize, watch: &Watch| {
        let nanoseconds = u64::try_from(watch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        spent[number].fetch_add(nanoseconds, Ordering::Relaxed);
    };
    let whole = run.images - run.images % threads as i64;
    let share = |first: i64, last: i64, worker: usize| {
        for image in first..last {
            let mut at = 0;
            for (number, step) in steps.iter().enumerate() {
                let BoundStep::Launch { kernel, args, sizes, blocks } = step else { continue };
                let own = moved(at, args.len(), image, worker);
                at += args.len();
                let each = blocks / run.images;
                let watch = timed.then(|| Watch::start(threads));
                call(
                    exe.code_of(*kernel),
                    own,
                    sizes,
                    image * each..(image + 1) * each,
                    &scratch[worker],
                );
                watch.iter().for_each(|w| add(number, w));
            }
        }
    };
    match alone {
        true => share(0, whole, 0),
        false => exe.pool().run(whole, &share),
    }
    for image in whole..run.images {
        let mut at = 0;
        for (number, step) in steps.iter().enumerate() {
            let BoundStep::Launch { kernel, args, sizes, blocks } = step else { continue };
            let own = moved(at, args.len(), image, 0);
            at += args.len();
            let each = blocks / run.images;
            let watch = timed.then(|| Watch::start(threads));
            let pool = if alone { None } else { Some(&**exe.pool()) };
            launch(
                exe.code_of(*kernel),
                own,
                sizes,
                image * each..(image + 1) * each,
                scratch,
                pool,
            );
            // As long on each of the threads.
            for _ in 0..threads {
                watch.iter().for_each(|w| add(number, w));
            }
        }
    }
    pointers.truncate(given);
    let per_thread =
        |t: &AtomicU64| Duration::from_nanos(t.load(Ordering::Relaxed) / threads as u64);
    spent.iter().map(per_thread).collect()
}
