//! The next legal way when one fails.

use tilewright_base::{Error, Result};

/// What worked, and what failed before it.
#[derive(Clone, Debug)]
pub struct Taken<T> {
    /// Position of the candidate that worked.
    pub index: usize,
    /// What it gave.
    pub value: T,
    /// The failures of those before it, in order.
    pub failures: Vec<Error>,
}

/// Tries candidates in order and gives the first that works. Nothing is hidden: the failures of those
/// before it come along, to be reported.
///
/// A kernel that faults while it runs (an access outside its memory) cannot be followed by another:
/// the process can use the device no more.
///
/// # Errors
/// When none works: the first one's error, with the others' as notes; or a bug when there are none.
pub fn first_that_works<C, T>(
    candidates: impl IntoIterator<Item = C>,
    mut attempt: impl FnMut(C) -> Result<T>,
) -> Result<Taken<T>> {
    let mut failures = Vec::new();
    for (index, candidate) in candidates.into_iter().enumerate() {
        match attempt(candidate) {
            Ok(value) => return Ok(Taken { index, value, failures }),
            Err(error) => failures.push(error),
        }
    }
    let mut failures = failures.into_iter();
    let first = failures.next().unwrap_or_else(|| Error::bug("there is no schedule to try"));
    Err(failures.enumerate().fold(first, |error, (i, next)| {
        error.with_note(format!("alternative {} failed, too: {next}", i + 1))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_works_is_taken_and_the_failures_are_kept() {
        let even = |n: u32| {
            if n.is_multiple_of(2) { Ok(n) } else { Err(Error::bug(format!("{n} is odd"))) }
        };
        let taken = first_that_works([3, 5, 6, 7], even).unwrap();
        assert_eq!((taken.index, taken.value), (2, 6));
        let messages: Vec<_> = taken.failures.iter().map(Error::message).collect();
        assert_eq!(messages, ["3 is odd", "5 is odd"]);
        let error = first_that_works([3, 5], even).unwrap_err();
        assert_eq!(error.message(), "3 is odd");
        assert!(error.notes()[0].contains("alternative 1 failed, too: 5 is odd"));
        let none: [u32; 0] = [];
        assert!(first_that_works(none, even).unwrap_err().message().contains("no schedule"));
    }
}
