//! The search: which points of a space are timed, and which one is taken. It knows no device ([`Measure`] does) and
//! no kernels: a point is its estimated time and its levels.
//!
//! ```text
//! batch 0      the best by the model, few that are alike
//! batch 1..    the best by the corrected model; neighbours of the fastest; some at random
//! finalists    the fastest by their short timings, and the baseline: checked, then timed in turns, halved each round
//! ```
//!
//! The correction of a point is the mean of ln(measured / estimated) over what was timed, near points counting most;
//! where nothing near was timed, a point gets a small bonus. A batch is chosen before the one before it is timed, so
//! that it can be compiled meanwhile. With the same times, the same seed and a budget in trials the same points are timed.

use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{Error, Result};

/// A point of a space.
#[derive(Clone, Debug)]
pub struct Point {
    /// Time by the model, in any unit.
    pub estimate: f64,
    /// One level per knob; near levels of a knob are alike.
    pub levels: Vec<u32>,
}

/// Points in the order of their estimates.
#[derive(Clone, Debug)]
pub struct Space {
    points: Vec<Point>,
    at: BTreeMap<Vec<u32>, usize>,
    highest: Vec<u32>,
}

impl Space {
    /// A space of points that differ in their levels.
    ///
    /// # Errors
    /// A bug: two points with the same levels, unequal numbers of knobs, or points that are not in order.
    pub fn new(points: Vec<Point>) -> Result<Space> {
        let knobs = points.first().map_or(0, |p| p.levels.len());
        let mut at = BTreeMap::new();
        let mut highest = vec![0; knobs];
        for (index, point) in points.iter().enumerate() {
            if point.levels.len() != knobs {
                return Err(Error::bug(format!("{} knobs and {knobs}", point.levels.len())));
            }
            if at.insert(point.levels.clone(), index).is_some() {
                return Err(Error::bug(format!("two points at {:?}", point.levels)));
            }
            for (high, level) in highest.iter_mut().zip(&point.levels) {
                *high = (*high).max(*level);
            }
        }
        if points.windows(2).any(|w| w[0].estimate > w[1].estimate) {
            return Err(Error::bug("points that are not in the order of their estimates"));
        }
        Ok(Space { points, at, highest })
    }

    /// How many points there are.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// A point.
    pub fn point(&self, index: usize) -> &Point {
        &self.points[index]
    }

    /// Points that differ in one knob: by any level of a short one, to the next points of a long one.
    pub fn neighbours(&self, index: usize) -> Vec<usize> {
        let from = &self.points[index].levels;
        let mut out = Vec::new();
        for (knob, &high) in self.highest.iter().enumerate() {
            let at = |level: u32| {
                let mut levels = from.clone();
                levels[knob] = level;
                self.at.get(&levels).copied()
            };
            let here = from[knob];
            if high < SHORT_KNOB {
                out.extend((0..=high).filter(|&l| l != here).filter_map(at));
                continue;
            }
            out.extend((here + 1..=high).filter_map(at).take(REACH));
            out.extend((0..here).rev().filter_map(at).take(REACH));
        }
        out
    }

    /// How unlike two points are: about the number of knobs in which they differ.
    fn distance(&self, a: usize, b: usize) -> f64 {
        let pairs = self.points[a].levels.iter().zip(&self.points[b].levels).zip(&self.highest);
        pairs
            .map(|((x, y), high)| match x.abs_diff(*y) {
                0 => 0.0,
                _ if *high < SHORT_KNOB => 1.0,
                apart => 0.3 + 0.7 * (f64::from(apart) / 6.0).min(1.0),
            })
            .sum()
    }
}

/// A knob with at most this many levels has no order.
const SHORT_KNOB: u32 = 6;
/// Points to each side of a long knob that are neighbours.
const REACH: usize = 2;
/// Points, best by the model, among which batches are chosen (and the neighbours of the fastest).
const POOL: usize = 4000;
/// The fastest points whose neighbours are proposed.
const PARENTS: usize = 5;
/// What counts as a gain, relatively.
const GAIN: f64 = 0.003;
/// A point must be this much faster than the baseline to replace it.
const MARGIN: f64 = 0.005;
/// Time that is kept for the finalists, as a share of the budget.
const FINAL_SHARE: f64 = 0.2;

/// What is timed: what would be taken without a search, or a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// What would be taken without a search.
    Baseline,
    /// A point by its index.
    Point(usize),
}

/// What a search asks of a device. Outer errors end the search; inner ones are the arm's.
pub trait Measure {
    /// These will be timed soon: whatever must be compiled may be.
    fn announce(&mut self, points: &[usize]);

    /// A short timing in microseconds. What is slower than `give_up_us` may be timed less exactly.
    ///
    /// # Errors
    /// When the device is of no use any more.
    fn time(&mut self, arm: Arm, give_up_us: f64) -> Result<std::result::Result<f64, String>>;

    /// Whether results are right: their error, or what is wrong.
    ///
    /// # Errors
    /// When the device is of no use any more.
    fn check(&mut self, arm: Arm) -> Result<std::result::Result<f64, String>>;

    /// Medians of `rounds` samples of each arm, taken in turns.
    ///
    /// # Errors
    /// When the device is of no use any more.
    fn compare(&mut self, arms: &[Arm], rounds: usize) -> Result<Vec<f64>>;

    /// Seconds since the search began.
    fn elapsed_s(&self) -> f64;
}

/// How long and how widely to search.
#[derive(Clone, Debug)]
pub struct Options {
    /// Points that are timed at most.
    pub trials: usize,
    /// Seconds, about.
    pub seconds: f64,
    /// Points per batch.
    pub batch: usize,
    /// The search ends when so many batches in a row gain nothing.
    pub patience: usize,
    /// Points that are compared in the end.
    pub finalists: usize,
    /// Samples of each in the first comparison; twice as many in each further one.
    pub rounds: usize,
    /// Of the random choices.
    pub seed: u64,
    /// Points that are timed first.
    pub seeds: Vec<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            trials: 400,
            seconds: 20.0,
            batch: 16,
            patience: 4,
            finalists: 8,
            rounds: 5,
            seed: 0,
            seeds: Vec::new(),
        }
    }
}

/// What came of a point: its time, or why there is none.
pub type Timed = std::result::Result<f64, String>;

/// Why a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Stop {
    Trials,
    Seconds,
    NoGain,
    WholeSpace,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The fastest arm with right results, its median time and its error; none when nothing was right.
    pub best: Option<(Arm, f64, f64)>,
    /// Median time of the baseline, compared in turns with the best; none when it fails or is wrong.
    pub baseline_us: Option<f64>,
    /// Every point that was timed, those that were known before first.
    pub trials: Vec<(usize, Timed)>,
    /// How many of them this search timed.
    pub timed: usize,
    /// Arms with wrong results, and what is wrong.
    pub wrong: Vec<(Arm, String)>,
    /// Why it ended.
    pub stop: Stop,
}

/// Random numbers (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }
}

/// What is known while searching.
struct State<'a> {
    space: &'a Space,
    random: Random,
    /// Also those that are announced and not timed yet.
    taken: BTreeSet<usize>,
    trials: Vec<(usize, Timed)>,
}

/// What a failure counts as: this many times the estimate, as a logarithm.
const FAILURE: f64 = 1.0;

impl State<'_> {
    /// Points that worked, fastest first.
    fn fastest(&self) -> Vec<(f64, usize)> {
        let mut list: Vec<(f64, usize)> =
            self.trials.iter().filter_map(|(p, t)| t.as_ref().ok().map(|us| (*us, *p))).collect();
        list.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        list
    }

    /// ln(measured / estimated) of what was timed, and its median.
    fn errors(&self) -> (Vec<(usize, f64)>, f64) {
        let error = |us: f64, p: usize| (us / self.space.points[p].estimate).ln();
        let mut sorted: Vec<f64> = self.fastest().into_iter().map(|(us, p)| error(us, p)).collect();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        let all = self.trials.iter().map(|(p, t)| match t {
            Ok(us) => (*p, error(*us, *p)),
            Err(_) => (*p, median + FAILURE),
        });
        (all.collect(), median)
    }

    /// The corrected estimate of a point, as a logarithm: the lower the sooner it is timed.
    fn score(&self, point: usize, errors: &[(usize, f64)], median: f64) -> f64 {
        let (mut weight, mut sum) = (0.0, 0.0);
        for (other, error) in errors {
            let w = (-1.5 * self.space.distance(point, *other)).exp();
            weight += w;
            sum += w * (error - median);
        }
        let prior = 0.2;
        let unknown = prior / (weight + prior);
        self.space.points[point].estimate.ln() + sum / (weight + prior) - 0.04 * unknown
    }

    /// The next points to time, at most `count`.
    fn propose(&mut self, count: usize) -> Vec<usize> {
        let (errors, median) = self.errors();
        let pool = self.space.len().min(POOL);
        let mut near = BTreeSet::new();
        for (_, parent) in self.fastest().into_iter().take(PARENTS) {
            near.extend(self.space.neighbours(parent));
        }
        near.retain(|p| !self.taken.contains(p));
        let scored = |points: &mut dyn Iterator<Item = usize>| {
            let mut list: Vec<(f64, usize)> = points
                .filter(|p| !self.taken.contains(p))
                .map(|p| (self.score(p, &errors, median), p))
                .collect();
            list.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            list
        };
        let by_score = scored(&mut (0..pool));
        let by_nearness = scored(&mut near.into_iter());
        let mut batch = Vec::new();
        let first = self.trials.is_empty();
        let of_near = if first { 0 } else { count * 3 / 8 };
        self.choose(&by_nearness, of_near, &mut batch);
        // At random, from what the corrected model thinks good.
        let good = by_score.len().min(by_score.len() / 8 + count);
        for _ in 0..count / 8 {
            let pick = by_score.get(self.random.below(good)).map(|(_, p)| *p);
            batch.extend(pick.filter(|p| !batch.contains(p)));
        }
        self.choose(&by_score, count.saturating_sub(batch.len()), &mut batch);
        self.taken.extend(&batch);
        batch
    }

    /// Adds `count` points of a list, good ones first, few that are alike.
    fn choose(&self, list: &[(f64, usize)], count: usize, batch: &mut Vec<usize>) {
        let end = list.len().min(count * 40 + 100);
        for _ in 0..count {
            let free = list[..end].iter().filter(|(_, p)| !batch.contains(p));
            let cost = |(score, p): &(f64, usize)| {
                let alike = batch.iter().filter(|b| self.space.distance(*p, **b) <= 1.0).count();
                score + 0.02 * alike as f64
            };
            let best = free.min_by(|a, b| cost(a).total_cmp(&cost(b)).then(a.1.cmp(&b.1)));
            let Some((_, point)) = best else { return };
            batch.push(*point);
        }
    }
}

/// The first batch: the seeds, and what the model likes.
fn first_batch(state: &mut State<'_>, options: &Options) -> Vec<usize> {
    let mut batch = Vec::new();
    for seed in options.seeds.iter().filter(|p| **p < state.space.len()) {
        if batch.len() < options.batch.min(options.trials) && state.taken.insert(*seed) {
            batch.push(*seed);
        }
    }
    let more = options.batch.min(options.trials) - batch.len();
    batch.extend(state.propose(more));
    batch
}

/// The points that [`search`] times first, whatever the times are: the first two batches. They can be compiled before.
pub fn first_points(space: &Space, baseline: Option<usize>, options: &Options) -> Vec<usize> {
    let known = baseline.map(|p| (p, Ok(space.point(p).estimate)));
    let mut state = State {
        space,
        random: Random(options.seed),
        taken: baseline.into_iter().collect(),
        trials: known.into_iter().collect(),
    };
    let mut points = first_batch(&mut state, options);
    let left = options.trials.saturating_sub(points.len());
    points.extend(state.propose(options.batch.min(left)));
    points
}

/// Searches for the fastest point. `baseline` says which point the baseline is, if it is one; `known` are earlier
/// timings, which are not repeated.
///
/// # Errors
/// When the device is of no use any more.
pub fn search(
    space: &Space,
    baseline: Option<usize>,
    known: &[(usize, Timed)],
    measure: &mut dyn Measure,
    options: &Options,
) -> Result<Found> {
    let mut state = State {
        space,
        random: Random(options.seed),
        taken: known.iter().map(|(p, _)| *p).chain(baseline).collect(),
        trials: known.to_vec(),
    };
    let baseline_us = measure.time(Arm::Baseline, f64::INFINITY)?;
    if let (Some(point), Ok(us)) = (baseline, &baseline_us)
        && !state.trials.iter().any(|(p, _)| *p == point)
    {
        state.trials.push((point, Ok(*us)));
    }
    let seconds = options.seconds * (1.0 - FINAL_SHARE);
    let mut best_us = state.fastest().first().map_or(f64::INFINITY, |(us, _)| *us);
    let mut timed = 0;
    let mut without_gain = 0;
    let mut next = first_batch(&mut state, options);
    measure.announce(&next);
    let stop = 'batches: loop {
        if next.is_empty() {
            break if timed >= options.trials { Stop::Trials } else { Stop::WholeSpace };
        }
        let batch = next;
        let left = options.trials.saturating_sub(timed + batch.len());
        next = state.propose(options.batch.min(left));
        measure.announce(&next);
        let before = best_us;
        for point in batch {
            if measure.elapsed_s() > seconds {
                break 'batches Stop::Seconds;
            }
            let outcome = measure.time(Arm::Point(point), best_us * 1.3)?;
            best_us = outcome.as_ref().map_or(best_us, |us| best_us.min(*us));
            state.trials.push((point, outcome));
            timed += 1;
        }
        without_gain = if best_us < before * (1.0 - GAIN) { 0 } else { without_gain + 1 };
        if without_gain > options.patience {
            break Stop::NoGain;
        }
    };
    let fastest = state.fastest().into_iter().map(|(_, p)| p).filter(|p| Some(*p) != baseline);
    let finalists: Vec<usize> = fastest.take(options.finalists).collect();
    let mut found = Found {
        best: None,
        baseline_us: None,
        trials: state.trials,
        timed,
        wrong: Vec::new(),
        stop,
    };
    finals(&finalists, baseline_us.is_ok(), measure, options, &mut found)?;
    Ok(found)
}

/// Checks the finalists, and compares those with right results, fewer in each round.
fn finals(
    finalists: &[usize],
    with_baseline: bool,
    measure: &mut dyn Measure,
    options: &Options,
    found: &mut Found,
) -> Result<()> {
    let mut errors = BTreeMap::new();
    let arms = with_baseline.then_some(Arm::Baseline).into_iter();
    for arm in arms.chain(finalists.iter().map(|p| Arm::Point(*p))) {
        match measure.check(arm)? {
            Ok(error) => drop(errors.insert(arm, error)),
            Err(what) => found.wrong.push((arm, what)),
        }
    }
    let baseline = errors.contains_key(&Arm::Baseline);
    let mut left: Vec<Arm> = errors.keys().copied().filter(|a| *a != Arm::Baseline).collect();
    let mut rounds = options.rounds.max(1);
    loop {
        let mut arms = left.clone();
        arms.extend(baseline.then_some(Arm::Baseline));
        if arms.is_empty() {
            return Ok(());
        }
        let times = measure.compare(&arms, rounds)?;
        let mut ranked: Vec<(f64, Arm)> = times.into_iter().zip(arms).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        found.baseline_us = ranked.iter().find(|(_, a)| *a == Arm::Baseline).map(|(us, _)| *us);
        let points: Vec<(f64, Arm)> =
            ranked.iter().copied().filter(|(_, a)| *a != Arm::Baseline).collect();
        if points.len() > 2 {
            left = points.iter().take(points.len().div_ceil(2)).map(|(_, a)| *a).collect();
            rounds *= 2;
            continue;
        }
        // Of those that are as good as equal the model's favourite: another run takes the same one.
        let limit = points.first().map_or(0.0, |(us, _)| us * (1.0 + GAIN));
        let best = points.iter().filter(|(us, _)| *us <= limit).min_by_key(|(_, arm)| *arm);
        let best = match (best, found.baseline_us) {
            (Some((us, arm)), Some(base)) if *us < base * (1.0 - MARGIN) => Some((*us, *arm)),
            (_, Some(base)) => Some((base, Arm::Baseline)),
            (other, None) => other.copied(),
        };
        found.best = best.map(|(us, arm)| (arm, us, errors[&arm]));
        return Ok(());
    }
}
