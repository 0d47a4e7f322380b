//! Times of one shape, ours and the peer's.
//!
//! A *pass* runs a product once on each of several sets of matrices, as one recorded graph, so that the
//! host's launches are not measured. The sets together are more than five times the second-level cache:
//! whenever a set's turn comes its data are gone from the cache. A *sample* is the device's time between
//! the start and the end of a pass (or of several in a row, for short ones), divided by the products.
//! Samples alternate A B, B A, ...; neighbours make a ratio.

use crate::arms::{BoundOurs, Matrices, Ours, Pass, Peer};
use crate::case::Case;
use crate::check::ended;
use crate::ending::Ending;
use crate::support::{Support, relative_error, spread_samples};
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_cuda::{Event, Stream};

/// Rows of a result that are compared with float64.
const SAMPLES: u64 = 8;
/// The sets together are this many times the second-level cache.
const CACHES: usize = 5;
/// At most this many sets, for tiny products.
const SETS_MAX: usize = 512;
/// A sample is at least this long.
const SAMPLE_US: f64 = 100.0;
/// Pairs of samples at least, whatever the time.
const PAIRS_MIN: usize = 5;
/// Pairs of samples at most.
const PAIRS_MAX: usize = 300;

/// Seeds of what comes after the operands begin here.
const SECOND_SEEDS: u64 = 1 << 32;

/// Lower quartile, median, upper quartile.
pub type Quartiles = [f64; 3];

/// Quartiles of a list (linear between neighbours); zeros of an empty one.
pub fn quartiles(values: &[f64]) -> Quartiles {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = share * sorted.len().saturating_sub(1) as f64;
        let (low, high) = (place.floor() as usize, place.ceil() as usize);
        match (sorted.get(low), sorted.get(high)) {
            (Some(a), Some(b)) => a + (b - a) * place.fract(),
            _ => 0.0,
        }
    };
    [at(0.25), at(0.5), at(0.75)]
}

/// How exact an arm's results are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Before and after timing, relative to float64.
    pub errors: [f64; 2],
    /// Elements of a floating-point result that nothing was written to, before and after.
    pub unwritten: [u64; 2],
}

/// What was measured of one arm.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Arm {
    pub us: Quartiles,
    pub accuracy: Accuracy,
}

/// What was measured of a shape.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Our times.
    pub ours: Arm,
    /// The peer's, its best algorithm; none when it has no algorithm.
    pub peer: Option<PeerMeasured>,
    /// Our time over the peer's, of neighbouring samples.
    pub ratio: Option<Quartiles>,
    /// Sets of matrices.
    pub sets: usize,
    /// Bytes of all sets.
    pub rotation_bytes: usize,
    /// Passes per sample, ours.
    pub passes: usize,
    /// Pairs of samples.
    pub pairs: usize,
}

/// What was measured of the peer.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct PeerMeasured {
    pub arm: Arm,
    /// How many algorithms were timed, and which was the best (0 is cuBLASLt's favourite).
    pub algorithms: usize,
    pub chosen: usize,
    pub workspace_bytes: usize,
    /// Time of the favourite in the choice.
    pub favourite_us: f64,
}

/// The matrices of a shape, several sets of them.
#[derive(Debug)]
pub struct Sets {
    case: Case,
    sets: Vec<Matrices>,
}

impl Sets {
    /// Allocates and fills enough sets to keep the cache cold.
    pub fn new(stream: &Stream, support: &Support, case: &Case) -> Result<Sets> {
        let l2 = stream.gpu().properties().l2_bytes as usize;
        let wanted = (CACHES * l2).div_ceil(case.bytes().max(1)).clamp(2, SETS_MAX);
        // Half of the memory that is there, should the shape be that large.
        let fits = (stream.gpu().memory()?.free_bytes / 2) as usize / case.bytes().max(1);
        let count = wanted.min(fits.max(1));
        let sets = (0..count).map(|_| Matrices::new(stream, case)).collect::<Result<Vec<_>>>()?;
        for (index, set) in sets.iter().enumerate() {
            support.fill(stream, &set.a, &case.a, 2 * index as u64 + 1)?;
            support.fill(stream, &set.b, &case.b, 2 * index as u64 + 2)?;
            if case.ending.is_pair() {
                let seed = 2 * index as u64 + 2 + SECOND_SEEDS;
                support.fill(stream, &set.b, &case.second(), seed)?;
            }
            for (i, (buffer, place)) in set.extras.iter().zip(case.extras()).enumerate() {
                if let (Some(buffer), Some(place)) = (buffer, place) {
                    support.fill(stream, buffer, &place, (i as u64 + 2) * SECOND_SEEDS)?;
                }
            }
            set.c.poison(stream)?;
        }
        stream.synchronize()?;
        Ok(Sets { case: *case, sets })
    }

    /// What they are multiplied for.
    pub fn case(&self) -> &Case {
        &self.case
    }

    /// The matrices of each set.
    pub fn matrices(&self) -> &[Matrices] {
        &self.sets
    }

    /// Bytes of all sets.
    pub fn bytes(&self) -> usize {
        self.sets.len() * self.case.bytes()
    }
}

/// An arm ready to be timed.
struct Ready<'a> {
    pass: Pass<'a>,
    products: usize,
    passes: usize,
}

impl Ready<'_> {
    /// Microseconds per product.
    fn sample(&self, stream: &Stream, events: &[Event; 2]) -> Result<f64> {
        events[0].record(stream)?;
        for _ in 0..self.passes {
            self.pass.launch(stream)?;
        }
        events[1].record(stream)?;
        events[1].synchronize()?;
        Ok(events[1].since_us(&events[0])? / (self.passes * self.products) as f64)
    }

    /// As many passes that a sample is long enough.
    fn fit(&mut self, us_per_product: f64) {
        let pass = (us_per_product * self.products as f64).max(0.1);
        self.passes = (SAMPLE_US / pass).ceil().clamp(1.0, 1000.0) as usize;
    }
}

/// Checks an arm: poisons a set's result, runs, compares sampled rows with float64.
fn check(
    stream: &Stream,
    support: &Support,
    sets: &Sets,
    index: usize,
    rows: u64,
    run: impl FnOnce() -> Result<()>,
) -> Result<(f64, u64)> {
    let (case, set) = (&sets.case, &sets.sets[index]);
    let samples = spread_samples(case, rows);
    let mut want = support.reference(stream, case, [&set.a, &set.b], &samples)?;
    if case.ending != Ending::Plain {
        want = ended(stream, support, case, set, &samples, &want)?.swap_remove(0);
    }
    set.c.poison(stream)?;
    run()?;
    let got = support.gather(stream, case, &set.c, &samples)?;
    let untouched = support.digest(stream, &case.c, &set.c)?.all_ones;
    // An integer may have only ones for bits.
    let untouched = if case.c.dtype.is_float() { untouched } else { 0 };
    Ok((relative_error(&got, &want), untouched))
}

/// Times `ours` against `peer` for about `budget`.
pub fn measure(
    stream: &Stream,
    support: &Support,
    sets: &Sets,
    ours: &Ours,
    peer: Option<&Peer<'_>>,
    budget: Duration,
) -> Result<Measured> {
    let case = &sets.case;
    let count = sets.sets.len();
    let events = [Event::new(stream.gpu())?, Event::new(stream.gpu())?];
    let bound: Vec<BoundOurs<'_>> =
        sets.sets.iter().map(|set| ours.bind(case, set)).collect::<Result<_>>()?;
    let run_ours = |i: usize| bound[i % count].launch(stream);
    let last = count - 1;
    let before = check(stream, support, sets, 0, SAMPLES, || run_ours(0))?;

    let mut our_pass =
        Ready { pass: Pass::record(stream, count, run_ours)?, products: count, passes: 1 };
    our_pass.sample(stream, &events)?;
    let first = our_pass.sample(stream, &events)?;
    our_pass.fit(first);

    let mut their = match peer {
        Some(peer) => Some(choose(stream, support, sets, peer, &events)?),
        None => None,
    };
    let (mut our_us, mut their_us, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let begin = Instant::now();
    while our_us.len() < PAIRS_MIN || (our_us.len() < PAIRS_MAX && begin.elapsed() < budget) {
        match &mut their {
            None => our_us.push(our_pass.sample(stream, &events)?),
            Some(their) => {
                let we_first = our_us.len().is_multiple_of(2);
                let a = if we_first { &our_pass } else { &their.ready };
                let b = if we_first { &their.ready } else { &our_pass };
                let (a, b) = (a.sample(stream, &events)?, b.sample(stream, &events)?);
                let (us, peer_us) = if we_first { (a, b) } else { (b, a) };
                our_us.push(us);
                their_us.push(peer_us);
                ratios.push(us / peer_us);
            }
        }
    }
    let pass = &our_pass.pass;
    let after = check(stream, support, sets, last, SAMPLES, || pass.launch(stream))?;
    let accuracy = |before: (f64, u64), after: (f64, u64)| Accuracy {
        errors: [before.0, after.0],
        unwritten: [before.1, after.1],
    };
    let peer_measured = match (their, peer) {
        (Some(their), Some(peer)) => {
            let pass = &their.ready.pass;
            let after = check(stream, support, sets, last, SAMPLES, || pass.launch(stream))?;
            Some(PeerMeasured {
                arm: Arm { us: quartiles(&their_us), accuracy: accuracy(their.before, after) },
                algorithms: peer.algorithms(),
                chosen: their.chosen,
                workspace_bytes: peer.workspace_bytes(their.chosen),
                favourite_us: their.favourite_us,
            })
        }
        _ => None,
    };
    Ok(Measured {
        ours: Arm { us: quartiles(&our_us), accuracy: accuracy(before, after) },
        ratio: peer_measured.as_ref().map(|_| quartiles(&ratios)),
        peer: peer_measured,
        sets: count,
        rotation_bytes: sets.bytes(),
        passes: our_pass.passes,
        pairs: our_us.len(),
    })
}

/// Time of our plan alone, per product: what a choice among plans needs. One slower than `give_up_us` is timed only
/// roughly.
pub fn time_ours(stream: &Stream, sets: &Sets, ours: &Ours, give_up_us: f64) -> Result<f64> {
    let count = sets.sets.len();
    let bound = bind_all(sets, ours)?;
    let run = |i: usize| bound[i % count].launch(stream);
    let events = [Event::new(stream.gpu())?, Event::new(stream.gpu())?];
    brief(stream, count, run, &events, give_up_us)
}

fn bind_all<'a>(sets: &'a Sets, ours: &Ours) -> Result<Vec<BoundOurs<'a>>> {
    sets.sets.iter().map(|set| ours.bind(&sets.case, set)).collect()
}

/// Times of several plans, per product: `rounds` samples of each, taken in turns, first in one order, then in the other.
pub fn compare_ours(
    stream: &Stream,
    sets: &Sets,
    plans: &[&Ours],
    rounds: usize,
) -> Result<Vec<Quartiles>> {
    let count = sets.sets.len();
    let bound: Vec<Vec<BoundOurs<'_>>> =
        plans.iter().map(|ours| bind_all(sets, ours)).collect::<Result<_>>()?;
    let events = [Event::new(stream.gpu())?, Event::new(stream.gpu())?];
    let mut ready = Vec::new();
    for bound in &bound {
        let run = |i: usize| bound[i % count].launch(stream);
        let pass = Pass::record(stream, count, run)?;
        let mut arm = Ready { pass, products: count, passes: 1 };
        arm.sample(stream, &events)?;
        let rough = arm.sample(stream, &events)?;
        arm.fit(rough);
        ready.push(arm);
    }
    let mut times = vec![Vec::new(); plans.len()];
    for round in 0..rounds.max(1) {
        for at in 0..plans.len() {
            let arm = if round.is_multiple_of(2) { at } else { plans.len() - 1 - at };
            times[arm].push(ready[arm].sample(stream, &events)?);
        }
    }
    Ok(times.iter().map(|list| quartiles(list)).collect())
}

/// How exact a plan is on up to `rows` rows: its error relative to float64, and how many elements of the whole result
/// were not written.
pub fn check_ours(
    stream: &Stream,
    support: &Support,
    sets: &Sets,
    ours: &Ours,
    rows: u64,
) -> Result<(f64, u64)> {
    let bound = ours.bind(&sets.case, &sets.sets[0])?;
    check(stream, support, sets, 0, rows, || bound.launch(stream))
}

/// The error of cuBLASLt's favourite, as [`check_ours`].
pub fn check_peer(
    stream: &Stream,
    support: &Support,
    sets: &Sets,
    peer: &Peer<'_>,
    rows: u64,
) -> Result<f64> {
    let run = || peer.launch(0, stream, &sets.case, &sets.sets[0]);
    check(stream, support, sets, 0, rows, run).map(|(error, _)| error)
}

/// The peer's best algorithm, ready.
struct Chosen<'a> {
    ready: Ready<'a>,
    chosen: usize,
    favourite_us: f64,
    before: (f64, u64),
}

/// Times every algorithm that the peer proposes and keeps the best.
fn choose<'a>(
    stream: &'a Stream,
    support: &Support,
    sets: &'a Sets,
    peer: &'a Peer<'_>,
    events: &[Event; 2],
) -> Result<Chosen<'a>> {
    let count = sets.sets.len();
    let mut times = Vec::new();
    let mut failure = None;
    for algorithm in 0..peer.algorithms() {
        let run = |i: usize| peer.launch(algorithm, stream, &sets.case, &sets.sets[i % count]);
        // A first run outside a recording: kernels are loaded when they are first used.
        match run(0)
            .and_then(|()| stream.synchronize())
            .and_then(|()| brief(stream, count, run, events, f64::INFINITY))
        {
            Ok(us) => times.push((us, algorithm)),
            Err(error) => failure = Some(error),
        }
    }
    let Some(&(best_us, chosen)) = times.iter().min_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Err(failure.unwrap_or_else(|| Error::bug("no algorithm of cuBLASLt ran")));
    };
    let run = move |i: usize| peer.launch(chosen, stream, &sets.case, &sets.sets[i % count]);
    let before = check(stream, support, sets, 0, SAMPLES, || run(0))?;
    let mut ready = Ready { pass: Pass::record(stream, count, run)?, products: count, passes: 1 };
    ready.fit(best_us);
    ready.sample(stream, events)?;
    let favourite_us = times.iter().find(|(_, a)| *a == 0).map_or(f64::NAN, |(us, _)| *us);
    Ok(Chosen { ready, chosen, favourite_us, before })
}

/// A short measurement, for choosing: the best of three samples over at most 2 ms of products.
fn brief(
    stream: &Stream,
    sets: usize,
    run: impl Fn(usize) -> Result<()>,
    events: &[Event; 2],
    give_up_us: f64,
) -> Result<f64> {
    let mut ready =
        Ready { pass: Pass::record(stream, sets.min(2), &run)?, products: sets.min(2), passes: 1 };
    ready.sample(stream, events)?;
    let rough = ready.sample(stream, events)?;
    // Of short products the rough time holds more of the start than of the product.
    if rough > give_up_us && rough * sets.min(2) as f64 > SAMPLE_US {
        return Ok(rough);
    }
    let products = ((2000.0 / rough.max(0.1)) as usize).clamp(1, sets);
    ready = Ready { pass: Pass::record(stream, products, &run)?, products, passes: 1 };
    ready.fit(rough);
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        best = best.min(ready.sample(stream, events)?);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_neighbours() {
        assert_eq!(quartiles(&[4.0, 1.0, 3.0, 2.0, 5.0]), [2.0, 3.0, 4.0]);
        assert_eq!(quartiles(&[1.0, 2.0]), [1.25, 1.5, 1.75]);
        assert_eq!(quartiles(&[7.0]), [7.0; 3]);
        assert_eq!(quartiles(&[]), [0.0; 3]);
    }
}
