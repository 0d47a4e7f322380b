//! The strategy on a synthetic device: it finds the optimum of a space that the model misjudges, keeps its budget,
//! goes on where it stopped, and never takes what computes wrong results.

use std::collections::BTreeSet;
use tilewright_base::{Error, Result};
use tilewright_tune::search::{Arm, Measure, Options, Point, Space, Stop, search};

/// A space of 6480 points in five knobs, and two cost functions on it that disagree: the model knows neither that
/// the fourth knob matters nor where the third has its optimum.
fn levels() -> impl Iterator<Item = Vec<u32>> {
    let five = (0..2).flat_map(|a| (0..5).flat_map(move |b| (0..24).map(move |c| (a, b, c))));
    five.flat_map(|(a, b, c)| (0..3).flat_map(move |d| (0..9).map(move |e| vec![a, b, c, d, e])))
}

fn model(l: &[u32]) -> f64 {
    let (b, c, e) = (f64::from(l[1]), f64::from(l[2]), f64::from(l[4]));
    100.0
        + 20.0 * f64::from(l[0])
        + 4.0 * (b - 2.0).powi(2)
        + 0.3 * (c - 14.0).powi(2)
        + 1.5 * (e - 3.0).powi(2)
}

fn truth(l: &[u32]) -> f64 {
    let (b, c, d, e) = (f64::from(l[1]), f64::from(l[2]), f64::from(l[3]), f64::from(l[4]));
    let jitter = f64::from((l[0] * 7 + l[1] * 13 + l[2] * 29 + l[3] * 5 + l[4] * 3) % 11) * 0.05;
    90.0 + 18.0 * f64::from(l[0])
        + 4.0 * (b - 3.0).powi(2)
        + 0.3 * (c - 19.0).powi(2)
        + 6.0 * (d - 2.0).abs()
        + 1.5 * (e - 3.0).powi(2)
        + jitter
}

fn space() -> Space {
    let mut points: Vec<Point> =
        levels().map(|levels| Point { estimate: model(&levels), levels }).collect();
    points.sort_by(|a, b| a.estimate.total_cmp(&b.estimate).then(a.levels.cmp(&b.levels)));
    Space::new(points).unwrap()
}

/// Enough to find the optimum, 2% of the space.
const TRIALS: usize = 128;

/// A device: what it was asked, and how it misbehaves.
struct Synthetic<'a> {
    space: &'a Space,
    timed: Vec<usize>,
    announced: BTreeSet<usize>,
    seconds_per_trial: f64,
    fails: fn(&[u32]) -> bool,
    wrong: fn(&[u32]) -> bool,
    breaks_after: usize,
}

impl<'a> Synthetic<'a> {
    fn new(space: &'a Space) -> Synthetic<'a> {
        Synthetic {
            space,
            timed: Vec::new(),
            announced: BTreeSet::new(),
            seconds_per_trial: 0.0,
            fails: |_| false,
            wrong: |_| false,
            breaks_after: usize::MAX,
        }
    }

    fn levels(&self, arm: Arm) -> &[u32] {
        match arm {
            Arm::Baseline => &self.space.point(0).levels,
            Arm::Point(p) => &self.space.point(p).levels,
        }
    }
}

impl Measure for Synthetic<'_> {
    fn announce(&mut self, points: &[usize]) {
        self.announced.extend(points);
    }

    fn time(&mut self, arm: Arm, _: f64) -> Result<std::result::Result<f64, String>> {
        if let Arm::Point(point) = arm {
            assert!(self.announced.contains(&point), "{point} was not announced");
            self.timed.push(point);
        }
        if self.timed.len() > self.breaks_after {
            return Err(Error::unsupported("the device is gone"));
        }
        if (self.fails)(self.levels(arm)) {
            return Ok(Err("does not compile".into()));
        }
        Ok(Ok(truth(self.levels(arm))))
    }

    fn check(&mut self, arm: Arm) -> Result<std::result::Result<f64, String>> {
        let wrong = (self.wrong)(self.levels(arm));
        Ok(if wrong { Err("error 1e3".into()) } else { Ok(1e-3) })
    }

    fn compare(&mut self, arms: &[Arm], rounds: usize) -> Result<Vec<f64>> {
        assert!(rounds > 0);
        Ok(arms.iter().map(|a| truth(self.levels(*a))).collect())
    }

    fn elapsed_s(&self) -> f64 {
        self.timed.len() as f64 * self.seconds_per_trial
    }
}

fn options(trials: usize, seed: u64) -> Options {
    Options { trials, seconds: 1e9, patience: 100, seed, ..Options::default() }
}

/// The fastest of all points that `fails` and `wrong` leave.
fn optimum(space: &Space, left: impl Fn(&[u32]) -> bool) -> f64 {
    let all = (0..space.len()).map(|p| &space.point(p).levels[..]).filter(|l| left(l));
    all.map(truth).fold(f64::INFINITY, f64::min)
}

#[test]
fn the_optimum_of_a_space_that_the_model_misjudges_is_found() {
    let space = space();
    let best = optimum(&space, |_| true);
    let picked = truth(&space.point(0).levels);
    assert!(picked > best * 1.2, "the model is too good: {picked} and {best}");
    for seed in 0..6 {
        let mut device = Synthetic::new(&space);
        let found = search(&space, Some(0), &[], &mut device, &options(TRIALS, seed)).unwrap();
        let (arm, us, error) = found.best.unwrap();
        assert!(us <= best * 1.01, "seed {seed}: {us}, and {best} is there");
        assert_eq!((found.baseline_us, error), (Some(picked), 1e-3));
        assert_eq!(us, truth(device.levels(arm)));
    }
}

#[test]
fn as_many_points_without_a_search_do_not_find_it() {
    let space = space();
    let best = optimum(&space, |_| true);
    let least = |points: &mut dyn Iterator<Item = usize>| {
        points.map(|p| truth(&space.point(p).levels)).fold(f64::INFINITY, f64::min)
    };
    let of_model = least(&mut (0..TRIALS));
    let spread = least(&mut (0..TRIALS).map(|i| i * space.len() / TRIALS));
    assert!(of_model > best * 1.02 && spread > best * 1.02, "{of_model}, {spread} and {best}");
}

#[test]
fn the_budget_is_kept() {
    let space = space();
    for trials in [0, 1, 17, 64] {
        let mut device = Synthetic::new(&space);
        let found = search(&space, Some(0), &[], &mut device, &options(trials, 0)).unwrap();
        assert_eq!((device.timed.len(), found.timed), (trials, trials));
        assert_eq!(found.stop, Stop::Trials);
        assert!(found.best.is_some());
    }
    let mut device = Synthetic::new(&space);
    device.seconds_per_trial = 0.1;
    let short = Options { seconds: 5.0, ..options(10_000, 0) };
    let found = search(&space, Some(0), &[], &mut device, &short).unwrap();
    assert!((39..=41).contains(&found.timed) && found.stop == Stop::Seconds, "{found:?}");
    // Nothing to gain any more.
    let patient = Options { patience: 3, ..options(10_000, 0) };
    let found = search(&space, Some(0), &[], &mut Synthetic::new(&space), &patient).unwrap();
    assert!(found.stop == Stop::NoGain && found.timed < 1000, "{:?} {}", found.stop, found.timed);
}

#[test]
fn no_point_is_timed_twice_and_a_small_space_is_timed_whole() {
    let points = (0..40).map(|i| Point { estimate: f64::from(i), levels: vec![i, 0, 0, 0, 0] });
    let small = Space::new(points.collect()).unwrap();
    let mut device = Synthetic::new(&small);
    let found = search(&small, None, &[], &mut device, &options(100, 0)).unwrap();
    let once: BTreeSet<usize> = device.timed.iter().copied().collect();
    assert_eq!((once.len(), device.timed.len()), (40, 40));
    assert_eq!(found.stop, Stop::WholeSpace);
}

#[test]
fn the_same_seed_proposes_the_same_and_another_one_does_not() {
    let space = space();
    let proposed = |seed| {
        let mut device = Synthetic::new(&space);
        search(&space, Some(0), &[], &mut device, &options(100, seed)).unwrap();
        device.timed
    };
    assert_eq!(proposed(3), proposed(3));
    assert_ne!(proposed(3), proposed(4));
}

#[test]
fn a_search_goes_on_where_another_one_stopped() {
    let space = space();
    let mut device = Synthetic::new(&space);
    let first = search(&space, Some(0), &[], &mut device, &options(60, 0)).unwrap();
    let mut device = Synthetic::new(&space);
    let second = search(&space, Some(0), &first.trials, &mut device, &options(180, 0)).unwrap();
    let known: BTreeSet<usize> = first.trials.iter().map(|(p, _)| *p).collect();
    assert!(device.timed.iter().all(|p| !known.contains(p)), "something was timed again");
    assert_eq!((second.timed, second.trials.len()), (180, first.trials.len() + 180));
    let us = |found: &tilewright_tune::search::Found| found.best.unwrap().1;
    assert!(us(&second) <= us(&first) && us(&second) <= optimum(&space, |_| true) * 1.01);
    // With no trials of its own it still finds what was known.
    let mut device = Synthetic::new(&space);
    let again = search(&space, Some(0), &second.trials, &mut device, &options(0, 0)).unwrap();
    assert_eq!((us(&again), device.timed.len()), (us(&second), 0));
}

#[test]
fn failures_are_survived_and_wrong_results_never_taken() {
    let space = space();
    let fails = |l: &[u32]| l[2].is_multiple_of(2);
    let wrong = |l: &[u32]| l[1] == 3;
    let mut device = Synthetic::new(&space);
    (device.fails, device.wrong) = (fails, wrong);
    let found = search(&space, Some(0), &[], &mut device, &options(240, 0)).unwrap();
    let Some((Arm::Point(point), us, _)) = found.best else { panic!("{found:?}") };
    let levels = &space.point(point).levels;
    assert!(!fails(levels) && !wrong(levels), "{levels:?}");
    assert!(!found.wrong.is_empty() && us < truth(&space.point(0).levels));
    // When all that is fast is wrong, nothing is taken.
    let mut device = Synthetic::new(&space);
    device.wrong = |_| true;
    let found = search(&space, Some(0), &[], &mut device, &options(40, 0)).unwrap();
    assert_eq!((found.best, found.baseline_us), (None, None));
    assert!(found.wrong.iter().any(|(arm, _)| *arm == Arm::Baseline));
    // A device that is lost ends the search.
    let mut device = Synthetic::new(&space);
    device.breaks_after = 20;
    assert!(search(&space, Some(0), &[], &mut device, &options(40, 0)).is_err());
}

#[test]
fn the_baseline_stays_when_nothing_is_faster() {
    let points: Vec<Point> =
        levels().map(|levels| Point { estimate: truth(&levels), levels }).collect();
    let mut points = points;
    points.sort_by(|a, b| a.estimate.total_cmp(&b.estimate).then(a.levels.cmp(&b.levels)));
    let space = Space::new(points).unwrap();
    let found = search(&space, Some(0), &[], &mut Synthetic::new(&space), &options(64, 0)).unwrap();
    assert_eq!(found.best.map(|b| b.0), Some(Arm::Baseline));
}
