//! The lists of products that `tw-gpu-test` tries, by group.

use crate::case::{Case, Numbers, Place, orders};
use crate::ending::{ENDINGS, Ending};
use tilewright_kernels::gemm::Order;

/// A group of cases.
pub struct Group {
    /// What it is about, as `--groups` takes it.
    pub name: &'static str,
    /// Its cases for a kind of numbers.
    pub cases: fn(&'static Numbers) -> Vec<Case>,
}

/// Every group whose cases are run once and compared.
pub const GROUPS: &[Group] = &[
    Group { name: "sizes", cases: sizes },
    Group { name: "orders", cases: orders_and_sizes },
    Group { name: "strides", cases: strides },
    Group { name: "batches", cases: batches },
    Group { name: "empty", cases: empty },
    Group { name: "deep", cases: deep },
    Group { name: "endings", cases: endings },
];

/// Elements that one step of the depth takes: 128 bytes of them, a swizzle's span.
fn step(numbers: &Numbers) -> u64 {
    128 / numbers.operand.size() as u64
}

fn own_orders(numbers: &Numbers) -> [Order; 3] {
    orders(numbers.orders).unwrap_or([Order::Row; 3])
}

fn product(a: &[u64], b: &[u64], c: &[u64]) -> Vec<[u64; 3]> {
    let pairs = a.iter().flat_map(|x| b.iter().map(move |y| (*x, *y)));
    pairs.flat_map(|(x, y)| c.iter().map(move |z| [x, y, *z])).collect()
}

/// One, a prime, and around the sizes of tiles, in all three directions; no gaps between lines.
fn sizes(numbers: &'static Numbers) -> Vec<Case> {
    let sides = [1, 13, 127, 128, 129, 255, 256, 257];
    let step = step(numbers);
    let depths = [1, 13, step - 1, step, step + 1, 3 * step + 7];
    let own = own_orders(numbers);
    product(&sides, &sides, &depths)
        .into_iter()
        .map(|[m, n, k]| Case::dense(numbers, [m, n, k, 1], own))
        .collect()
}

/// Every combination of orders, without gaps and with lines that start at multiples of 16 elements.
fn orders_and_sizes(numbers: &'static Numbers) -> Vec<Case> {
    let sides = [1, 97, 128];
    let mut out = Vec::new();
    for text in ["rrr", "rrc", "rcr", "rcc", "crr", "crc", "ccr", "ccc"] {
        let Some(list) = orders(text) else { continue };
        for [m, n, k] in product(&sides, &sides, &sides) {
            let dense = Case::dense(numbers, [m, n, k, 1], list);
            let aligned = |p: Place| p.padded(p.leading.next_multiple_of(16) - p.leading);
            out.push(dense);
            out.push(Case {
                a: aligned(dense.a),
                b: aligned(dense.b),
                c: aligned(dense.c),
                ..dense
            });
        }
    }
    out
}

/// Gaps between lines, and first elements at odd places.
fn strides(numbers: &'static Numbers) -> Vec<Case> {
    let own = own_orders(numbers);
    let mut out = Vec::new();
    for sizes in [[130, 97, 100, 1], [256, 128, 192, 1]] {
        let dense = Case::dense(numbers, sizes, own);
        for [a, b, c] in product(&[0, 1, 8, 24], &[0, 1, 8, 24], &[0, 1, 8, 24]) {
            let [a, b, c] = [dense.a.padded(a), dense.b.padded(b), dense.c.padded(c)];
            out.push(Case { a, b, c, ..dense });
        }
        for [a, b, c] in product(&[0, 1, 2, 8], &[0, 1, 2, 8], &[0, 1, 2, 8]) {
            let at = |place: Place, offset| Place { offset, ..place };
            let [a, b, c] = [at(dense.a, a), at(dense.b, b), at(dense.c, c)];
            out.push(Case { a, b, c, ..dense });
        }
    }
    out
}

/// Several products: packed, with gaps, and with one operand for all.
fn batches(numbers: &'static Numbers) -> Vec<Case> {
    let own = own_orders(numbers);
    let mut out = Vec::new();
    for batch in [2, 3, 65] {
        for [m, n, k] in [[64, 64, 64], [33, 129, 70], [256, 128, 128], [1, 64, 256]] {
            let dense = Case::dense(numbers, [m, n, k, batch], own);
            let apart = |p: Place| {
                let p = p.padded(16);
                Place { stride: p.stride + 48, ..p }
            };
            out.push(dense);
            out.push(Case { a: apart(dense.a), b: apart(dense.b), c: apart(dense.c), ..dense });
            out.push(Case { a: Place { stride: 0, ..dense.a }, ..dense });
            out.push(Case { b: Place { stride: 0, ..dense.b }, ..dense });
        }
    }
    out
}

/// Nothing to compute, and sums of nothing.
fn empty(numbers: &'static Numbers) -> Vec<Case> {
    let own = own_orders(numbers);
    let sizes = [
        [0, 64, 64, 1],
        [64, 0, 64, 1],
        [64, 64, 64, 0],
        [0, 0, 0, 1],
        [64, 64, 0, 1],
        [65, 33, 0, 3],
    ];
    let plain = sizes.into_iter().map(|sizes| Case::dense(numbers, sizes, own));
    // The ending of zeros, for each.
    let ended = [Order::Row, Order::Col].into_iter().flat_map(|c| {
        let case = Case::dense(numbers, [40, 48, 0, 1], [own[0], own[1], c]);
        ENDINGS.iter().map(move |e| case.ending(*e))
    });
    plain.chain(ended).collect()
}

/// Long sums over few results, and few rows against large weights.
fn deep(numbers: &'static Numbers) -> Vec<Case> {
    let own = own_orders(numbers);
    let few = [1, 2, 3, 5, 8, 16, 17].map(|m| [m, 4096, 4096, 1]);
    let long = [[64, 64, 65536, 1], [256, 256, 16384, 1], [1, 1, 100_000, 1], [130, 70, 20001, 1]];
    few.into_iter().chain(long).map(|sizes| Case::dense(numbers, sizes, own)).collect()
}

/// Every ending, in both orders of the result: odd sizes, sizes of whole tiles, few rows, sums in parts, batches.
fn endings(numbers: &'static Numbers) -> Vec<Case> {
    let [a, b, _] = own_orders(numbers);
    let sizes = [
        [97, 130, 75, 1],
        [256, 128, 192, 1],
        [1, 300, 256, 1],
        [200, 3, 100, 1],
        [64, 64, 8192, 1],
        [33, 48, 80, 3],
    ];
    let mut out = Vec::new();
    for sizes in sizes {
        for c in [Order::Row, Order::Col] {
            let case = Case::dense(numbers, sizes, [a, b, c]);
            out.extend(ENDINGS.iter().map(|e| case.ending(*e)));
        }
    }
    out
}

/// Products that are run a hundred times, bit for bit the same each time.
pub fn repeated(numbers: &'static Numbers) -> Vec<Case> {
    let own = own_orders(numbers);
    [
        [1024, 1024, 1024, 1],
        [257, 129, 1000, 1],
        [64, 64, 65536, 1],
        [1, 4096, 4096, 1],
        [100, 60, 200, 7],
    ]
    .into_iter()
    .map(|sizes| Case::dense(numbers, sizes, own))
    .chain([Case::dense(numbers, [300, 520, 1000, 1], own).ending(Ending::SwiGlu)])
    .collect()
}

/// More than 2^31 elements: in the result, and in an operand.
pub fn large(numbers: &'static Numbers) -> Vec<Case> {
    let own = own_orders(numbers);
    [[66_000, 33_024, 64, 1], [70_000, 64, 33_024, 1]]
        .into_iter()
        .map(|sizes| Case::dense(numbers, sizes, own))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::NUMBERS;

    #[test]
    fn every_group_has_cases_and_the_large_ones_are_large() {
        for numbers in NUMBERS {
            for group in GROUPS {
                assert!(!(group.cases)(numbers).is_empty(), "{}", group.name);
            }
            let large = large(numbers);
            assert!(large[0].c.elements() > 1 << 31 && large[1].a.elements() > 1 << 31);
        }
    }

    #[test]
    fn what_is_planned_for_the_benchmark_can_be_emitted() {
        use crate::{arms, case};
        let gpu = tilewright_target::Gpu::h200();
        let text = include_str!("../../../bench/gemm_shapes.txt");
        let cases = case::read_list("bench", text, &[]).unwrap();
        let mut planned = 0;
        for case in &cases {
            let what = format!("{} {}", case.numbers.name, case.shape_text());
            match tilewright_kernels::gemm::plan(&case.problem(), &gpu, 5) {
                Ok(candidates) => {
                    let emit = |candidate| -> tilewright_base::Result<()> {
                        let programs = arms::programs(candidate)?;
                        programs.iter().try_for_each(|p| tilewright_emit_cuda::emit(p).map(|_| ()))
                    };
                    let taken = tilewright_launch::first_that_works(&candidates, emit)
                        .unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    for (failure, candidate) in taken.failures.iter().zip(&candidates) {
                        println!("{what} gave way: {failure}; {}", arms::describe(candidate));
                    }
                    planned += 1;
                }
                Err(error) => {
                    assert_eq!(
                        error.kind(),
                        tilewright_base::Kind::Unsupported,
                        "{what}: {error:?}"
                    );
                    println!("{what} {}: {}", case.orders_text(), error.message());
                }
            }
        }
        println!("{planned} of {} planned", cases.len());
        assert!(planned * 2 > cases.len(), "{planned} of {} planned", cases.len());
    }

    #[test]
    fn the_planner_takes_every_case_or_says_why_not() {
        let gpu = tilewright_target::Gpu::h200();
        for name in ["bf16", "i8"] {
            let Some(numbers) = Numbers::named(name) else { continue };
            for group in GROUPS {
                for case in (group.cases)(numbers).iter().step_by(7) {
                    if let Err(error) = tilewright_kernels::gemm::plan(&case.problem(), &gpu, 1) {
                        let kind = error.kind();
                        assert_eq!(kind, tilewright_base::Kind::Unsupported, "{case:?}: {error:?}");
                    }
                }
            }
        }
    }
}
