//! Bounded fuzzing of anything that reads bytes from outside: parsers, file headers.
//!
//! [`fuzz`] mutates a corpus with a fixed random sequence for a bounded time and calls the target, which
//! must return, whatever the bytes: an error is a fine answer, a panic or a long silence is a failure. The
//! input that failed is shrunk and printed as a Rust literal, ready to become a regression test.
//!
//! It is not coverage-guided: good corpus entries and dictionary words do the guiding. The time is that of
//! the environment variable `TILEWRIGHT_FUZZ_SECONDS` (see [`seconds`]).
//!
//! To add a target: a test named `fuzz_*` in `crates/testkit/tests/`, with a corpus of small valid inputs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// One input may take this long; parsers of small inputs need microseconds.
const SLOWEST: Duration = Duration::from_secs(5);
/// Mutants do not grow beyond this.
const MAX_BYTES: usize = 4096;

/// How long each target runs: `TILEWRIGHT_FUZZ_SECONDS`, or half a second.
pub fn seconds() -> Duration {
    let given = std::env::var("TILEWRIGHT_FUZZ_SECONDS").ok();
    let seconds = given.and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.5);
    Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0))
}

/// A small deterministic generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..n`; 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.next_u64() % n as u64) as usize }
    }
}

/// What a failing target did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The smallest input found that still fails.
    pub input: Vec<u8>,
    /// The panic's message, or that it was slow.
    pub message: String,
}

/// Runs `target` on mutants of `corpus` for [`seconds`] and panics with a report when one fails.
///
/// `words` are inserted whole: keywords, magic numbers, extreme values.
pub fn fuzz(name: &str, corpus: &[&[u8]], words: &[&[u8]], target: impl Fn(&[u8])) {
    let (n_runs, failure) = search(name, corpus, words, seconds(), &target);
    if let Some(Failure { input, message }) = failure {
        let literal: String =
            input.iter().map(|b| std::ascii::escape_default(*b).to_string()).collect();
        panic!("{name}: {message}\n  input ({} bytes): b\"{literal}\"", input.len());
    }
    println!("{name}: {n_runs} inputs");
}

/// As [`fuzz`] for targets that read text: bytes that are not UTF-8 are replaced first.
pub fn fuzz_text(name: &str, corpus: &[&str], words: &[&str], target: impl Fn(&str)) {
    let corpus: Vec<&[u8]> = corpus.iter().map(|text| text.as_bytes()).collect();
    let words: Vec<&[u8]> = words.iter().map(|text| text.as_bytes()).collect();
    fuzz(name, &corpus, &words, |bytes| target(&String::from_utf8_lossy(bytes)));
}

/// The search itself: how many inputs ran, and the first failure, shrunk.
fn search(
    name: &str,
    corpus: &[&[u8]],
    words: &[&[u8]],
    time: Duration,
    target: &dyn Fn(&[u8]),
) -> (usize, Option<Failure>) {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut random = Random::new(seed);
    let end = Instant::now() + time;
    let mut n_runs = 0;
    // The corpus itself first, whatever the time.
    for input in corpus {
        n_runs += 1;
        if let Some(message) = failure_of(target, input) {
            return (n_runs, Some(shrink(input, message, target)));
        }
    }
    while Instant::now() < end {
        let mut input = corpus.get(random.below(corpus.len())).map_or(Vec::new(), |c| c.to_vec());
        for _ in 0..=random.below(6) {
            mutate(&mut input, corpus, words, &mut random);
        }
        input.truncate(MAX_BYTES);
        n_runs += 1;
        if let Some(message) = failure_of(target, &input) {
            return (n_runs, Some(shrink(&input, message, target)));
        }
    }
    (n_runs, None)
}

/// How the target fails on this input, if it does.
fn failure_of(target: &dyn Fn(&[u8]), input: &[u8]) -> Option<String> {
    let start = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| target(input)));
    match result {
        Ok(()) if start.elapsed() > SLOWEST => Some(format!("took {:?}", start.elapsed())),
        Ok(()) => None,
        Err(payload) => {
            let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
            Some(format!("panicked: {}", text.unwrap_or_else(|| "(no message)".to_owned())))
        }
    }
}

fn mutate(input: &mut Vec<u8>, corpus: &[&[u8]], words: &[&[u8]], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = at + random.below(input.len() - at + 1).min(32);
    match random.below(8) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'(', b')'][random.below(9)];
            }
        }
        2 => drop(input.drain(at..end)),
        3 => {
            let part = input[at..end].to_vec();
            let n_copies = 1 + random.below(4);
            drop(input.splice(at..at, part.repeat(n_copies)));
        }
        4 => input.truncate(at),
        5 | 6 => {
            if let Some(word) = words.get(random.below(words.len())) {
                drop(input.splice(at..at, word.iter().copied()));
            }
        }
        _ => {
            // The tail of another entry.
            if let Some(other) = corpus.get(random.below(corpus.len())) {
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
}

/// Removes ever smaller parts while the input still fails. A slow input is not shrunk: each try is slow.
fn shrink(input: &[u8], message: String, target: &dyn Fn(&[u8])) -> Failure {
    let mut best = Failure { input: input.to_vec(), message };
    if !best.message.starts_with("panicked") {
        return best;
    }
    let mut part = best.input.len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < best.input.len() {
            let mut shorter = best.input.clone();
            drop(shorter.drain(at..(at + part).min(best.input.len())));
            match failure_of(target, &shorter) {
                Some(message) => best = Failure { input: shorter, message },
                None => at += part,
            }
        }
        part = if part == 1 { 0 } else { part.div_ceil(2) };
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(target: &dyn Fn(&[u8])) -> (usize, Option<Failure>) {
        search("test", &[b"let x = 1"], &[b"boom"], Duration::from_secs(20), target)
    }

    #[test]
    fn a_panic_is_found_and_shrunk_to_what_causes_it() {
        let (_, failure) = find(&|bytes| {
            assert!(!bytes.windows(4).any(|w| w == b"boom"), "reads `boom`");
        });
        let failure = failure.expect("a dictionary word must be reached");
        assert_eq!(failure.input, b"boom");
        assert_eq!(failure.message, "panicked: reads `boom`");
    }

    #[test]
    fn the_same_name_gives_the_same_inputs() {
        let seen = |limit: usize| {
            let inputs = std::cell::RefCell::new(Vec::new());
            let target = |bytes: &[u8]| {
                inputs.borrow_mut().push(bytes.to_vec());
                assert!(inputs.borrow().len() < limit, "enough");
            };
            search("same", &[b"abc", b"(1+2)"], &[b"x"], Duration::from_secs(20), &target);
            let mut inputs = inputs.into_inner();
            inputs.truncate(limit);
            inputs
        };
        assert_eq!(seen(500), seen(500));
    }

    #[test]
    fn no_time_still_runs_the_corpus() {
        let (n_runs, failure) = search("none", &[b"a", b"b"], &[], Duration::ZERO, &|_| {});
        assert_eq!((n_runs, failure), (2, None));
    }
}
