//! Every synchronising step of a device program, taken away, weakened and moved (`mutants.rs`): each such program must be
//! rejected, by the rules or by the checker, or be on the list of those that are as right as the original. Here that is done to
//! a program written by hand, in `lowered.rs` to those that `lower-gpu` makes.

#[path = "../common/mod.rs"]
mod common;
mod lowered;
mod mutants;

use mutants::mutants;
use std::sync::Arc;
use tilewright_device::*;
use tilewright_interp::device::check;
use tilewright_layout::Env;

/// Changes after which the program is still right, and why.
const EQUIVALENT: &[(&str, &str)] = &[
    (
        "producer `wait empty[stage] phase before stage` after `advance stage by 1`",
        "it then waits for the next stage right before the next turn of the loop; the first turn, \
         which waits no more, finds every stage empty",
    ),
    (
        "consumer `wait full[stage] phase of stage` after `wgmma fence`",
        "that fence orders registers, which the copies do not touch",
    ),
    (
        "consumer `once tma wait 0 read` after `once`",
        "it waits right after the store instead of before the next use of the buffer, behind the same \
         barrier of threads: slower, and as safe",
    ),
    (
        "consumer `sync named w + 1 threads 128` after `out = map(acc) { x -> bf16(x) }`",
        "the map touches registers only; the barrier still stands before the write to the buffer",
    ),
];

fn sizes(m: i64, n: i64, k: i64) -> Env {
    [("M", m), ("N", n), ("K", k)].map(|(s, v)| (Arc::from(s), v)).into()
}

#[test]
fn every_weaker_program_is_caught() {
    for stages in [2, 3] {
        let original = common::gemm(stages);
        verify(&original).unwrap_or_else(|e| panic!("{e:?}"));
        let sizes = [sizes(512, 48, 192), sizes(256, 80, 320)];
        let clusters = [1, 2];
        check(&original, &sizes, &clusters).unwrap_or_else(|e| panic!("{e:?}"));
        let mutants = mutants(&original);
        let mut by_rules = 0;
        let mut survivors = Vec::new();
        for mutant in &mutants {
            if verify(&mutant.program).is_err() {
                by_rules += 1;
            } else if check(&mutant.program, &sizes, &clusters).is_ok() {
                survivors.push(mutant.name.as_str());
            }
        }
        println!(
            "{stages} stages: {} mutants, {by_rules} rejected by the rules, {} by the checker, {} \
             equivalent",
            mutants.len(),
            mutants.len() - by_rules - survivors.len(),
            survivors.len()
        );
        let expected: Vec<&str> = EQUIVALENT.iter().map(|e| e.0).collect();
        assert_eq!(survivors, expected, "{stages} stages");
    }
}
