//! One product, checked: every element against float64 and against cuBLASLt's error, what lies around
//! the result, and that every element is written.
//!
//! An error is relative to the exact product, in the Euclidean norm over the compared rows. It may be
//! [`ERROR_RATIO_MAX`] times cuBLASLt's, or what rounding to the result's type alone may cost, whichever
//! is more; integers are exact. cuBLASLt gets the same values in a layout of its liking: sizes rounded up
//! to 16 with zeros, operands contiguous along the depth. Where it has no algorithm, and for promoted sums,
//! 8-bit floats are measured by the error of sums that keep what tensor cores keep (`cut_sums` in `support.cu`),
//! computed for the same values.

use crate::arms::{BoundOurs, Matrices, Ours, Peer, describe, planner_for};
use crate::case::{Case, Place};
use crate::ending::{Ending, unit};
use crate::record::ERROR_RATIO_MAX;
use crate::support::{Digest, Sample, Support, relative_error, spread_samples};
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Kind, Result};
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Buffer, Stream};
use tilewright_kernels::gemm::{Candidate, Order, plan};
use tilewright_launch::{Loader, first_that_works};

/// Rows that are compared at most; all of smaller results.
const SAMPLES: u64 = 4096;
/// The same for results that are too large to be copied to the host.
const LARGE_SAMPLES: u64 = 64;
/// Bytes behind the result that must stay as they are.
const GUARD_BYTES: usize = 256;
/// Depth after which promoted sums are added in f32, at most: that of the deepest tile.
const PROMOTED_DEPTH: u64 = 256;

/// Of the second right operand of a pair.
const SECOND_SEED: u64 = 9;
/// By how much sums are nudged to see what their errors do.
const NUDGE: f64 = 1e-3;

/// What came of a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Right; with the candidate that ran, and the failures of those before it.
    Passed(Vec<String>),
    /// No kernel for it, and why.
    Unsupported(String),
    /// Wrong, and how.
    Failed(String),
}

/// Which product: kind of numbers, sizes, and which operand is the same for the whole batch.
type Key = (&'static str, [u64; 4], bool, bool);

/// What is known of a product in any layout.
struct Known {
    exact: Vec<f64>,
    /// Error of cuBLASLt, if it has an algorithm.
    peer_error: Option<f64>,
    /// Error of 8-bit floats as tensor cores sum them, where that is what counts.
    cut_error: Option<f64>,
}

impl Known {
    /// The error that sums of a case may have.
    fn allowed(&self, case: &Case) -> f64 {
        let numbers = case.numbers;
        match (self.cut_error, self.peer_error) {
            _ if !numbers.result.is_float() => 0.0,
            (Some(error), _) | (None, Some(error)) => {
                (ERROR_RATIO_MAX * error).max(numbers.result_unit())
            }
            (None, None) => numbers.lone_error_max(),
        }
    }

    fn in_words(&self) -> String {
        match (self.cut_error, self.peer_error) {
            (Some(e), _) => format!("sums cut to 13 places {e:.2e}"),
            (None, Some(e)) => format!("cuBLASLt {e:.2e}"),
            (None, None) => "cuBLASLt none".into(),
        }
    }
}

/// Everything that checking needs.
pub struct Checker<'a> {
    /// Where all work goes.
    pub stream: &'a Stream,
    /// Inputs and references.
    pub support: &'a Support,
    /// Our kernels.
    pub loader: &'a Loader,
    /// cuBLASLt, if it is there.
    pub peer: Option<&'a CublasLt>,
    /// Its workspace.
    pub workspace: &'a Buffer,
    known: BTreeMap<Key, Known>,
}

/// Matrices with a guard behind the result, filled; gaps and results have only ones for bits.
fn filled(stream: &Stream, support: &Support, case: &Case) -> Result<Matrices> {
    let matrices = Matrices {
        a: stream.alloc(case.a.bytes())?,
        b: stream.alloc(case.right_bytes())?,
        c: stream.alloc(case.c.bytes() + GUARD_BYTES)?,
        extras: Matrices::extras(stream, case)?,
        sums: None,
    };
    for buffer in [&matrices.a, &matrices.b, &matrices.c] {
        buffer.poison(stream)?;
    }
    for (i, (buffer, place)) in matrices.extras.iter().zip(case.extras()).enumerate() {
        if let (Some(buffer), Some(place)) = (buffer, place) {
            buffer.poison(stream)?;
            support.fill(stream, buffer, &place, 3 + i as u64)?;
        }
    }
    support.fill(stream, &matrices.a, &once(&case.a), 1)?;
    support.fill(stream, &matrices.b, &once(&case.b), 2)?;
    if case.ending.is_pair() {
        support.fill(stream, &matrices.b, &once(&case.second()), SECOND_SEED)?;
    }
    Ok(matrices)
}

/// A matrix that stands for the whole batch is filled once.
fn once(place: &Place) -> Place {
    if place.stride == 0 && place.batch > 1 { Place { batch: 1, ..*place } } else { *place }
}

impl<'a> Checker<'a> {
    /// A checker that knows nothing yet.
    pub fn new(
        stream: &'a Stream,
        support: &'a Support,
        loader: &'a Loader,
        peer: Option<&'a CublasLt>,
        workspace: &'a Buffer,
    ) -> Checker<'a> {
        Checker { stream, support, loader, peer, workspace, known: BTreeMap::new() }
    }

    /// Candidates of a case: the planner's pick, and others in case it fails.
    pub fn plan(&self, case: &Case) -> Result<Vec<Candidate>> {
        plan(&case.problem(), &planner_for(self.loader), 3)
    }

    /// Runs and checks one case.
    pub fn check(&mut self, case: &Case, candidates: Result<Vec<Candidate>>) -> Outcome {
        let candidates = match candidates {
            Ok(candidates) => candidates,
            Err(error) if error.kind() == Kind::Unsupported => {
                return Outcome::Unsupported(error.message().to_owned());
            }
            Err(error) => return Outcome::Failed(format!("{error}")),
        };
        match self.compare(case, &candidates) {
            Ok(Ok(failures)) => Outcome::Passed(failures),
            Ok(Err(wrong)) => Outcome::Failed(wrong),
            Err(error) => Outcome::Failed(format!("{error:?}")),
        }
    }

    /// The first candidate that loads and binds.
    fn bind<'m>(
        &self,
        case: &Case,
        matrices: &'m Matrices,
        candidates: &[Candidate],
    ) -> Result<(Ours, BoundOurs<'m>, Vec<String>)> {
        let taken = first_that_works(candidates, |candidate| {
            let ours = Ours::load(self.loader, self.stream, candidate)?;
            let bound = ours.bind(case, matrices)?;
            Ok((ours, bound))
        })?;
        let (ours, bound) = taken.value;
        Ok((ours, bound, taken.failures.iter().map(|e| format!("{e}")).collect()))
    }

    fn compare(
        &mut self,
        case: &Case,
        candidates: &[Candidate],
    ) -> Result<std::result::Result<Vec<String>, String>> {
        let stream = self.stream;
        let matrices = filled(stream, self.support, case)?;
        let (ours, bound, failures) = self.bind(case, &matrices, candidates)?;
        let how = describe(ours.candidate());
        bound.launch(stream)?;
        let first = matrices.c.to_vec(stream)?;
        if let Some(wrong) = outside(case, &first, 0xff) {
            return Ok(Err(format!("{wrong}; {how}")));
        }
        let samples = spread_samples(case, SAMPLES);
        if case.c.elements() > 0 {
            let exact = self.known(case, &matrices, SAMPLES)?;
            let got = self.support.gather(stream, case, &matrices.c, &samples)?;
            let known = &self.known[&exact];
            let wrong = if case.ending == Ending::Plain {
                too_wrong(case, &got, known)
            } else {
                let ended = ended(stream, self.support, case, &matrices, &samples, &known.exact)?;
                ending_too_wrong(case, &got, known, &ended)
            };
            if let Some(wrong) = wrong {
                return Ok(Err(format!("{wrong}; {how}")));
            }
        }
        // Once more over other contents: what is not written, or added to what was there, differs.
        matrices.c.zero(stream)?;
        bound.launch(stream)?;
        let second = matrices.c.to_vec(stream)?;
        if let Some(wrong) = outside(case, &second, 0) {
            return Ok(Err(format!("{wrong}; {how}")));
        }
        if let Some(at) = differs(case, &first, &second) {
            return Ok(Err(format!(
                "element {at:?} depends on what was in the result before; {how}"
            )));
        }
        Ok(Ok(failures))
    }

    /// The exact product and the errors of others, computed once for all layouts.
    fn known(&mut self, case: &Case, matrices: &Matrices, rows: u64) -> Result<Key> {
        let repeats = |p: &Place| p.stride == 0 && p.batch > 1;
        let sizes = [case.m, case.n, case.k, case.batch];
        let key = (case.numbers.name, sizes, repeats(&case.a), repeats(&case.b));
        if !self.known.contains_key(&key) {
            // Cases of one product follow each other.
            self.known.clear();
            let samples = spread_samples(case, rows);
            let exact =
                self.support.reference(self.stream, case, [&matrices.a, &matrices.b], &samples)?;
            let peer_error = self.peer_error(case, &exact, rows)?;
            let cut_error = self.cut_error(case, matrices, &samples, &exact, peer_error)?;
            self.known.insert(key, Known { exact, peer_error, cut_error });
        }
        Ok(key)
    }

    /// The error of 8-bit floats summed as tensor cores do, where cuBLASLt has no algorithm or sums are promoted.
    fn cut_error(
        &self,
        case: &Case,
        matrices: &Matrices,
        samples: &[Sample],
        exact: &[f64],
        peer_error: Option<f64>,
    ) -> Result<Option<f64>> {
        let numbers = case.numbers;
        if !numbers.operand.is_float()
            || numbers.operand.bits() != 8
            || (peer_error.is_some() && !numbers.promoted)
        {
            return Ok(None);
        }
        let apart = if numbers.promoted { PROMOTED_DEPTH } else { 0 };
        let operands = [&matrices.a, &matrices.b];
        let cut = self.support.cut_sums(self.stream, case, operands, samples, apart)?;
        Ok(Some(relative_error(&cut, exact)))
    }

    fn peer_error(&self, case: &Case, exact: &[f64], rows: u64) -> Result<Option<f64>> {
        let Some(peer) = self.peer else { return Ok(None) };
        if case.k == 0 {
            return Ok(None);
        }
        let even = |size: u64| size.next_multiple_of(16);
        let [m, n, k] = [even(case.m), even(case.n), even(case.k)];
        let orders = [Order::Row, Order::Col, Order::Row];
        let whole = Case::dense(case.numbers, [m, n, k, case.batch], orders);
        let keep = |from: &Place, place: Place| {
            if from.stride == 0 && from.batch > 1 { Place { stride: 0, ..place } } else { place }
        };
        let whole = Case { a: keep(&case.a, whole.a), b: keep(&case.b, whole.b), ..whole };
        let part = Case {
            a: Place { shape: (case.m, case.k), ..whole.a },
            b: Place { shape: (case.k, case.n), ..whole.b },
            c: Place { shape: (case.m, case.n), ..whole.c },
            ending: Ending::Plain,
            ..*case
        };
        let matrices = Matrices::new(self.stream, &whole)?;
        for buffer in [&matrices.a, &matrices.b] {
            buffer.zero(self.stream)?;
        }
        self.support.fill(self.stream, &matrices.a, &once(&part.a), 1)?;
        self.support.fill(self.stream, &matrices.b, &once(&part.b), 2)?;
        matrices.c.poison(self.stream)?;
        let arm = match Peer::new(peer, self.loader, &whole, self.workspace) {
            Ok(arm) => arm,
            Err(error) if error.kind() == Kind::Unsupported => return Ok(None),
            Err(error) => return Err(error),
        };
        arm.launch(0, self.stream, &whole, &matrices)?;
        let samples = spread_samples(case, rows);
        let got = self.support.gather(self.stream, &part, &matrices.c, &samples)?;
        Ok(Some(relative_error(&got, exact)))
    }

    /// Runs a case `times` times: the digest of every run must be that of the first.
    pub fn repeat(&mut self, case: &Case, times: usize) -> Outcome {
        let candidates = match self.plan(case) {
            Ok(candidates) => candidates,
            Err(error) if error.kind() == Kind::Unsupported => {
                return Outcome::Unsupported(error.message().to_owned());
            }
            Err(error) => return Outcome::Failed(format!("{error}")),
        };
        let run = || -> Result<Outcome> {
            let matrices = filled(self.stream, self.support, case)?;
            let (ours, bound, failures) = self.bind(case, &matrices, &candidates)?;
            let mut digest: Option<Digest> = None;
            for time in 0..times {
                matrices.c.poison(self.stream)?;
                bound.launch(self.stream)?;
                let next = self.support.digest(self.stream, &case.c, &matrices.c)?;
                if digest.is_some_and(|first| first != next) {
                    let how = describe(ours.candidate());
                    return Ok(Outcome::Failed(format!(
                        "run {time} differs from the first; {how}"
                    )));
                }
                digest = Some(next);
            }
            Ok(Outcome::Passed(failures))
        };
        run().unwrap_or_else(|error| Outcome::Failed(format!("{error:?}")))
    }

    /// Checks a case that is too large to be copied to the host: sampled rows, and that everything
    /// was written.
    pub fn check_large(&mut self, case: &Case) -> Outcome {
        let candidates = match self.plan(case) {
            Ok(candidates) => candidates,
            Err(error) if error.kind() == Kind::Unsupported => {
                return Outcome::Unsupported(error.message().to_owned());
            }
            Err(error) => return Outcome::Failed(format!("{error}")),
        };
        let mut run = || -> Result<Outcome> {
            let matrices = filled(self.stream, self.support, case)?;
            let (ours, bound, failures) = self.bind(case, &matrices, &candidates)?;
            let how = describe(ours.candidate());
            bound.launch(self.stream)?;
            let key = self.known(case, &matrices, LARGE_SAMPLES)?;
            let samples = spread_samples(case, LARGE_SAMPLES);
            let got = self.support.gather(self.stream, case, &matrices.c, &samples)?;
            let known = &self.known[&key];
            if let Some(wrong) = too_wrong(case, &got, known) {
                return Ok(Outcome::Failed(format!("{wrong}; {how}")));
            }
            let error = relative_error(&got, &known.exact);
            println!(
                "  {} {}: error {error:.2e}, {:.2e} allowed ({})",
                case.numbers.name,
                case.shape_text(),
                known.allowed(case),
                known.in_words()
            );
            let first = self.support.digest(self.stream, &case.c, &matrices.c)?;
            matrices.c.zero(self.stream)?;
            bound.launch(self.stream)?;
            let second = self.support.digest(self.stream, &case.c, &matrices.c)?;
            Ok(if first == second {
                Outcome::Passed(failures)
            } else {
                Outcome::Failed(format!("elements depend on what was in the result before; {how}"))
            })
        };
        run().unwrap_or_else(|error| Outcome::Failed(format!("{error:?}")))
    }
}

/// What the ending makes of the exact sums of some rows, and of each sum a little larger than it is.
pub(crate) fn ended(
    stream: &Stream,
    support: &Support,
    case: &Case,
    matrices: &Matrices,
    samples: &[Sample],
    exact: &[f64],
) -> Result<Vec<Vec<f64>>> {
    let places = case.extras();
    let whole = |i: usize| -> Result<Option<Vec<f64>>> {
        let (Some(buffer), Some(place)) = (&matrices.extras[i], places[i]) else {
            return Ok(None);
        };
        let bytes = tilewright_data::Bytes::copy_from(&buffer.to_vec(stream)?);
        let count = place.elements() as usize;
        Ok(Some(tilewright_data::Tensor::new(place.dtype, [count], bytes)?.to_f64s()))
    };
    let (cols, rows, residual) = (whole(0)?, whole(1)?, whole(2)?);
    let second_cols = whole(3)?;
    let second = match case.ending.is_pair() {
        true => {
            let other = Case { b: case.second(), ..*case };
            Some(support.reference(stream, &other, [&matrices.a, &matrices.b], samples)?)
        }
        false => None,
    };
    let func = case.ending.epilogue(case.numbers).func;
    let [sl, sr, sc] = case.c.strides();
    let of = |factors: [f64; 2]| {
        let mut out = Vec::with_capacity(exact.len());
        for (s, (l, row)) in samples.iter().enumerate() {
            for col in 0..case.n {
                let at = (case.c.offset + l * sl + row * sr + col * sc) as usize;
                let place = s * case.n as usize + col as usize;
                let mut args = vec![exact[place] * factors[0]];
                args.extend(second.as_ref().map(|v| v[place] * factors[1]));
                args.extend(cols.as_ref().map(|v| v[col as usize]));
                args.extend(second_cols.as_ref().map(|v| v[col as usize]));
                args.extend(rows.as_ref().map(|v| v[*row as usize]));
                args.extend(residual.as_ref().map(|v| v[at]));
                out.push(func.eval_f64(&args));
            }
        }
        out
    };
    let mut out = vec![of([1.0, 1.0]), of([1.0 + NUDGE, 1.0])];
    out.extend(second.is_some().then(|| of([1.0, 1.0 + NUDGE])));
    Ok(out)
}

/// What is wrong with the values, if anything.
fn too_wrong(case: &Case, got: &[f64], known: &Known) -> Option<String> {
    let allowed = known.allowed(case);
    let error = relative_error(got, &known.exact);
    if error <= allowed {
        return None;
    }
    let scale = known.exact.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let bad = |(g, w): (&f64, &f64)| (g - w).is_nan() || (g - w).abs() > 4.0 * allowed * scale;
    let at = got.iter().zip(&known.exact).position(bad).unwrap_or(0);
    let count = got.iter().zip(&known.exact).filter(|pair| bad(*pair)).count();
    let (value, want) = (got.get(at)?, known.exact.get(at)?);
    let n = case.n.max(1) as usize;
    Some(format!(
        "error {error:.2e}, {allowed:.2e} allowed ({}); {count} elements far off, the first in compared row {}, column {}: {value}, not {want}",
        known.in_words(),
        at / n,
        at % n
    ))
}

/// What is wrong with the values of an ending: sums may be as wrong as without one, and what that does to the results
/// follows from what a nudge of the sums does; results are rounded once. 8-bit integers may be the neighbour, one of
/// a hundred of them.
fn ending_too_wrong(case: &Case, got: &[f64], known: &Known, ended: &[Vec<f64>]) -> Option<String> {
    let (want, nudged) = ended.split_first()?;
    let name = case.ending.name();
    if case.c.dtype == DType::I8 {
        let off = got.iter().zip(want).filter(|(g, w)| g != w).count();
        let far = got.iter().zip(want).filter(|(g, w)| (**g - **w).abs() > 1.0).count();
        let wrong = far > 0 || off * 100 > got.len().max(1000);
        return wrong
            .then(|| format!("{name}: {off} of {} differ, {far} by more than 1", got.len()));
    }
    let norm = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    let apart =
        |x: &[f64], y: &[f64]| norm(&x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<_>>());
    // Integer sums are exact, their scaling is not.
    let exact = !case.numbers.operand.is_float();
    let sums = if exact { 2f64.powi(-22) } else { known.allowed(case) };
    let least = unit(case.c.dtype).max(2f64.powi(-21));
    let moved: f64 = nudged.iter().map(|n| apart(n, want)).sum();
    let allowed = sums * moved / NUDGE + least * norm(want);
    let error = apart(got, want);
    let fine = error <= allowed && got.len() == want.len();
    (!fine)
        .then(|| format!("{name}: error {error:.2e}, {allowed:.2e} allowed of {:.2e}", norm(want)))
}

/// Elements' places in the result's buffer, with their coordinates.
fn places(case: &Case) -> impl Iterator<Item = ([u64; 3], usize)> {
    let place = case.c;
    let [sl, sr, sc] = place.strides();
    let (rows, cols) = place.shape;
    (0..place.batch).flat_map(move |l| {
        (0..rows).flat_map(move |r| {
            (0..cols).map(move |c| ([l, r, c], (place.offset + l * sl + r * sr + c * sc) as usize))
        })
    })
}

/// A byte that changed outside the result.
fn outside(case: &Case, bytes: &[u8], filling: u8) -> Option<String> {
    let size = case.c.dtype.size();
    let mut inside = vec![false; bytes.len() / size];
    for (_, at) in places(case) {
        inside[at] = true;
    }
    let bad = (0..bytes.len())
        .find(|i| bytes[*i] != filling && !inside.get(i / size).copied().unwrap_or(false))?;
    Some(format!("byte {bad} of {} was written, which is outside the result", bytes.len()))
}

/// The first element in which two results differ.
fn differs(case: &Case, first: &[u8], second: &[u8]) -> Option<[u64; 3]> {
    let size = case.c.dtype.size();
    let of = |bytes: &[u8], at: usize| bytes[at * size..][..size].to_vec();
    places(case).find(|(_, at)| of(first, *at) != of(second, *at)).map(|(index, _)| index)
}

/// Checks the checkers: inputs against Philox on the host, the float64 reference against the host's
/// product, the digest against a changed element.
pub fn self_check(stream: &Stream, support: &Support) -> Result<()> {
    use tilewright_data::Tensor;
    let wrong = |what: String| Err(Error::bug(what).with_context("checking the checkers"));
    let values = |dtype: DType, place: &Place, seed: u64| -> Result<Tensor> {
        let buffer = stream.alloc(place.bytes())?;
        buffer.zero(stream)?;
        support.fill(stream, &buffer, place, seed)?;
        let bytes = buffer.to_vec(stream)?;
        Tensor::new(dtype, [place.elements() as usize], tilewright_data::Bytes::copy_from(&bytes))
    };
    let (rows, cols) = (37, 53);
    let dense = |dtype, order| Place::dense(dtype, order, rows, cols, 1);
    let floats = values(DType::F32, &dense(DType::F32, Order::Row), 9)?.to_f64s();
    for (i, got) in floats.iter().enumerate() {
        let want = host::normal(i as u64, 9);
        if (got - want).abs() > 1e-5 * want.abs().max(1.0) {
            return wrong(format!("normal number {i} is {got}, not {want}"));
        }
    }
    let bytes = values(DType::I8, &dense(DType::I8, Order::Row), 9)?.to_i64s();
    if let Some(i) = (0..bytes.len()).find(|i| bytes[*i] != host::byte(*i as u64, 9)) {
        return wrong(format!("byte {i} is {}", bytes[i]));
    }
    for dtype in [DType::BF16, DType::F16, DType::F8E4M3] {
        let narrow = values(dtype, &dense(dtype, Order::Row), 9)?;
        let want = Tensor::from_f64s(dtype, &[floats.len()], &floats)?;
        if narrow.bytes() != want.bytes() {
            return wrong(format!("{dtype} inputs are not the rounded f32 inputs"));
        }
        // The same values in column-major order.
        let turned = values(dtype, &dense(dtype, Order::Col), 9)?;
        let same = (0..rows as usize).all(|r| {
            (0..cols as usize).all(|c| {
                turned.get_f64(r + c * rows as usize) == narrow.get_f64(r * cols as usize + c)
            })
        });
        if !same {
            return wrong(format!("{dtype} inputs depend on the layout"));
        }
    }
    let Some(numbers) = crate::case::Numbers::named("bf16") else {
        return wrong("no bf16".into());
    };
    for orders in ["rrr", "rcr", "crc", "ccr"] {
        let Some(list) = crate::case::orders(orders) else { return wrong(orders.into()) };
        let case = Case::dense(numbers, [9, 41, 300, 2], list);
        let matrices = filled(stream, support, &case)?;
        let samples = spread_samples(&case, 18);
        let got = support.reference(stream, &case, [&matrices.a, &matrices.b], &samples)?;
        let [a, b] =
            [(&case.a, 1), (&case.b, 2)].map(|(place, seed)| values(DType::BF16, place, seed));
        let (a, b) = (a?.to_f64s(), b?.to_f64s());
        let at = |p: &Place, l: u64, r: u64, c: u64| {
            let [sl, sr, sc] = p.strides();
            (l * sl + r * sr + c * sc) as usize
        };
        for (s, (l, row)) in samples.iter().enumerate() {
            for j in 0..case.n {
                let want: f64 = (0..case.k)
                    .map(|p| a[at(&case.a, *l, *row, p)] * b[at(&case.b, *l, p, j)])
                    .sum();
                let value = got[s * case.n as usize + j as usize];
                if (value - want).abs() > 1e-9 {
                    return wrong(format!(
                        "{orders} reference ({l}, {row}, {j}) is {value}, not {want}"
                    ));
                }
            }
        }
        let before = support.digest(stream, &case.c, &matrices.c)?;
        if before.all_ones != case.c.elements() {
            return wrong("a poisoned result does not look like one".into());
        }
        let mut bytes = matrices.c.to_vec(stream)?;
        bytes[100] = 0;
        matrices.c.write(stream, &bytes)?;
        let after = support.digest(stream, &case.c, &matrices.c)?;
        if after.sum == before.sum || after.all_ones + 1 != before.all_ones {
            return wrong("the digest overlooks a changed element".into());
        }
    }
    Ok(())
}

/// What `support.cu` computes, on the host.
mod host {
    /// Philox4x32-10 with a 64-bit counter.
    pub(super) fn philox(counter: u64, seed: u64) -> [u32; 4] {
        let mut c = [counter as u32, (counter >> 32) as u32, 0, 0];
        let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
        for _ in 0..10 {
            let p0 = 0xD251_1F53_u64 * u64::from(c[0]);
            let p1 = 0xCD9E_8D57_u64 * u64::from(c[2]);
            let high = |p: u64| (p >> 32) as u32;
            c = [high(p1) ^ c[1] ^ k0, p1 as u32, high(p0) ^ c[3] ^ k1, p0 as u32];
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        c
    }

    /// A normal number by Box and Muller.
    pub(super) fn normal(index: u64, seed: u64) -> f64 {
        let r = philox(index >> 1, seed);
        let scale = 2f64.powi(-24);
        let (u, v) = ((f64::from(r[0] >> 8) + 1.0) * scale, f64::from(r[1] >> 8) * scale);
        let angle = 2.0 * std::f64::consts::PI * v;
        (-2.0 * u.ln()).sqrt() * if index & 1 == 1 { angle.sin() } else { angle.cos() }
    }

    /// An integer of 8 bits.
    pub(super) fn byte(index: u64, seed: u64) -> i64 {
        i64::from((philox(index, seed)[0] >> 24) as u8 as i8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Numbers, orders};

    #[test]
    fn philox_gives_its_published_vectors() {
        // "kat_vectors" of the Random123 library: philox4x32 10, counter and key all zero.
        assert_eq!(host::philox(0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }

    fn case() -> Case {
        let numbers = Numbers::named("bf16").unwrap();
        let case = Case::dense(numbers, [2, 3, 4, 1], orders("rrr").unwrap());
        Case { c: case.c.padded(1), ..case }
    }

    #[test]
    fn a_write_into_a_gap_and_a_missing_write_are_seen() {
        let case = case();
        // Lines of 4 elements, the last of each outside, and a guard.
        let mut bytes = vec![0xff; 16 + 8];
        for (_, at) in places(&case) {
            bytes[2 * at..2 * at + 2].fill(1);
        }
        assert_eq!(outside(&case, &bytes, 0xff), None);
        let mut gap = bytes.clone();
        gap[7] = 0;
        assert!(outside(&case, &gap, 0xff).unwrap().contains("byte 7"));
        let mut behind = bytes.clone();
        behind[23] = 0;
        assert!(outside(&case, &behind, 0xff).is_some());
        assert_eq!(differs(&case, &bytes, &bytes), None);
        let mut missing = bytes.clone();
        missing[8 + 3] = 0xff;
        assert_eq!(differs(&case, &bytes, &missing), Some([0, 1, 1]));
    }

    #[test]
    fn errors_are_measured_by_the_peer_s() {
        let case = case();
        let exact = vec![1.0; 6];
        let off = |by: f64| vec![1.0 + by; 6];
        let known = |peer_error| Known { exact: exact.clone(), peer_error, cut_error: None };
        assert_eq!(too_wrong(&case, &off(0.019), &known(Some(0.01))), None);
        assert!(too_wrong(&case, &off(0.021), &known(Some(0.01))).is_some());
        // Rounding to bf16 alone costs up to 2^-8: behind 1 comes 1 + 2^-7.
        assert_eq!(too_wrong(&case, &off(0.0039), &known(Some(0.0))), None);
        assert!(too_wrong(&case, &off(0.004), &known(Some(0.0))).is_some());
        let mut nan = exact.clone();
        nan[4] = f64::NAN;
        let text = too_wrong(&case, &nan, &known(Some(0.01))).unwrap();
        assert!(
            text.contains("1 elements far off, the first in compared row 1, column 1"),
            "{text}"
        );
        let numbers = Numbers::named("i8").unwrap();
        let whole = Case { numbers, ..case };
        assert!(too_wrong(&whole, &off(1e-9), &known(Some(1.0))).is_some());
    }
}
