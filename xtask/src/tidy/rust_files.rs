//! Rules for every `.rs` file: a head that says what it is, a length one can read, foreign functions
//! and `unsafe` in their places.

use super::{Problem, Repo};

/// A longer file usually holds a second room.
const MAX_LINES: usize = 1000;

/// Files that may be longer because they are tables (one row per thing), with the reason.
const TABLES: &[(&str, &str)] =
    &[("crates/emit-llvm/src/math.rs", "one elementary function after another, with coefficients")];

/// Crates that may declare foreign functions.
const FFI_CRATES: &[&str] =
    &["crates/cuda/", "crates/jit/", "crates/runtime/", "crates/torch-abi/", "crates/xla-ffi/"];

/// Where `unsafe` may stand, and why it must. Everything else asks one of these through a safe function.
#[rustfmt::skip] // One row per place.
const UNSAFE_PLACES: &[(&str, &str)] = &[
    ("crates/jit/src/",                "LLVM's C interface, and the memory of its code"),
    ("crates/runtime/src/",            "calls of compiled kernels, aligned memory that threads share"),
    ("crates/cuda/",                   "the interfaces of the GPU's driver and compiler; its launches are unsafe"),
    ("crates/launch/",                 "launches of programs: their operands are the caller's promise"),
    ("crates/runtime-gpu/src/session.rs", "launches over its own arena and constants"),
    ("crates/xla-ffi/src/",            "XLA's C interface, and runs in its memory"),
    ("crates/runtime-gpu/src/constants.rs", "launches over its own constants, when they are loaded"),
    ("crates/runtime-gpu/src/direct.rs", "launches over a caller's memory: its promise is passed on"),
    ("crates/runtime-gpu/src/attention_training.rs", "launches over a caller's memory: its promise is passed on"),
    ("crates/runtime-gpu/src/losses.rs", "launches over a caller's memory: its promise is passed on"),
    ("crates/runtime-gpu/src/norm_backward.rs", "launches over a caller's memory: its promise is passed on"),
    ("crates/torch-abi/src/",          "PyTorch's C interface"),
    ("crates/torch-ops/src/plans.rs",  "kernels on the memory of PyTorch's tensors, whose shapes were checked"),
    ("crates/torch-ops/src/plain.rs",  "memory that another frontend lends as slices; it promises sizes and types"),
    ("crates/torch-ops/src/written.rs", "launches of written kernels on the memory of PyTorch's tensors, which were checked"),
    ("crates/torch-ops/src/host.rs",   "the memory of PyTorch's tensors as slices, after checks; wider vectors where they are found"),
    ("crates/runtime-gpu/src/decode/device.rs", "launches over its own weights and state"),
    ("crates/runtime-gpu/src/decode/prompt.rs", "launches over the decoder's weights and cache"),
    ("crates/runtime-gpu/examples/decode_forms.rs", "launches over its own memory, to time them"),
    ("crates/bench-gpu/src/bin/launch.rs", "launches of empty kernels, to time the call"),
    ("crates/bench-gpu/src/attention.rs", "launches of attention on tensors that it owns"),
    ("crates/bench-gpu/src/arms.rs",   "launches of our kernels and cuBLASLt's on matrices that it borrows"),
    ("crates/bench-gpu/src/rows.rs",   "launches of row kernels on tensors that it borrows"),
    ("crates/bench-gpu/src/support.rs", "launches of its own kernels on checked buffers"),
    ("crates/data/src/mapped.rs",      "memory-mapped files"),
    ("crates/data/src/lent.rs",        "memory that a caller lends for results"),
    ("crates/python/src/memory.rs",    "arrays and tensors that Python owns: their addresses are given"),
    ("crates/python/src/direct.rs",    "tensors of Python as PyTorch's interface takes and gives them: addresses of objects"),
    ("crates/emit-llvm/tests/",        "kernels called on guarded memory, to see what they touch"),
    ("crates/emit-llvm/examples/",     "a kernel called without the runtime, to time it alone"),
];

/// Every file opens with `//!`: what it is, the convention it follows, how to add to it.
pub(super) fn heads(repo: &Repo) -> Vec<Problem> {
    repo.with_suffix(".rs")
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(path, _)| Problem::new(path, 1, "the file must open with a `//!` head"))
        .collect()
}

/// No file is longer than [`MAX_LINES`] unless [`TABLES`] says why; no entry there is out of date.
pub(super) fn lengths(repo: &Repo) -> Vec<Problem> {
    lengths_except(repo, TABLES)
}

fn lengths_except(repo: &Repo, tables: &[(&str, &str)]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in repo.with_suffix(".rs") {
        let n_lines = text.lines().count();
        if n_lines > MAX_LINES && !tables.iter().any(|(listed, _)| *listed == path) {
            let message = format!("{n_lines} lines (at most {MAX_LINES}): is there a second room?");
            problems.push(Problem::new(path, n_lines, message));
        }
    }
    for (path, _) in tables {
        let n_lines = repo.text(path).map_or(0, |text| text.lines().count());
        if n_lines <= MAX_LINES {
            problems.push(Problem::new(path, 0, "listed as a long table, but it is not long"));
        }
    }
    problems
}

/// `extern "C"` appears only in the crates that own the FFI.
pub(super) fn ffi_stays_in_its_crates(repo: &Repo) -> Vec<Problem> {
    let marker = concat!("extern ", "\"C\"");
    repo.with_suffix(".rs")
        .filter(|(path, _)| !FFI_CRATES.iter().any(|owner| path.starts_with(owner)))
        // Tests and examples call compiled kernels directly.
        .filter(|(path, _)| !path.contains("/tests/") && !path.contains("/examples/"))
        .flat_map(|(path, text)| {
            text.lines()
                .enumerate()
                .filter(|(_, line)| !line.trim_start().starts_with("//") && line.contains(marker))
                .map(|(index, _)| {
                    Problem::new(
                        path,
                        index + 1,
                        "foreign functions belong in `cuda`, `jit`, `runtime` or `torch-abi`",
                    )
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

/// `unsafe` appears only in [`UNSAFE_PLACES`], and every place that exists needs its row.
pub(super) fn unsafe_stays_in_its_places(repo: &Repo) -> Vec<Problem> {
    unsafe_except(repo, UNSAFE_PLACES)
}

fn unsafe_except(repo: &Repo, places: &[(&str, &str)]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut used = vec![(false, false); places.len()];
    for (path, text) in repo.with_suffix(".rs") {
        let place = places.iter().position(|(place, _)| path.starts_with(place));
        let lines: Vec<usize> = unsafe_lines(text).collect();
        match place {
            Some(place) => {
                used[place].0 = true;
                used[place].1 |= !lines.is_empty();
            }
            None => problems.extend(lines.into_iter().map(|line| {
                let message = "`unsafe` outside its places: use a safe function of `runtime`, `jit` \
                               or `data`, or add a place with its reason";
                Problem::new(path, line, message)
            })),
        }
    }
    for ((place, _), (exists, has_unsafe)) in places.iter().zip(used) {
        if exists && !has_unsafe {
            let message = "listed as a place of `unsafe`, but there is none";
            problems.push(Problem::new(place, 0, message));
        }
    }
    problems
}

/// Numbers of the lines with the keyword `unsafe`, comments and one-line strings aside.
fn unsafe_lines(text: &str) -> impl Iterator<Item = usize> {
    text.lines().enumerate().filter_map(|(index, line)| {
        // A `//` inside a string hides what follows on its line; the even parts between quotes are code.
        let code: String = line.split("//").next()?.split('"').step_by(2).collect();
        let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
        words.any(|word| word == concat!("un", "safe")).then_some(index + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_head_is_found() {
        let repo = Repo::of(&[("a.rs", "//! What it is.\n"), ("b.rs", "// What it is.\n")]);
        let problems = heads(&repo);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].path, "b.rs");
    }

    #[test]
    fn long_files_need_an_entry_and_entries_need_a_long_file() {
        let long = "//! x\n".repeat(MAX_LINES + 1);
        let repo = Repo::of(&[("long.rs", &long), ("short.rs", "//! x\n")]);
        assert_eq!(lengths_except(&repo, &[]).len(), 1);
        assert_eq!(lengths_except(&repo, &[("long.rs", "one row per operation")]), []);
        assert_eq!(
            lengths_except(&repo, &[("long.rs", "rows"), ("short.rs", "rows")])[0].path,
            "short.rs"
        );
    }

    #[test]
    fn unsafe_outside_its_places_and_places_without_any_are_found() {
        let text = "//! unsafe\nfn f() { g(\"unsafe\") } // unsafe\n    unsafe { h() }\n";
        let places = [("crates/jit/src/", "x"), ("crates/data/", "x"), ("crates/later/", "x")];
        let repo = Repo::of(&[
            ("crates/graph/src/a.rs", text),
            ("crates/jit/src/a.rs", text),
            ("crates/data/src/a.rs", "//! unsafe_op\n"),
        ]);
        let problems = unsafe_except(&repo, &places);
        let found: Vec<(&str, usize)> =
            problems.iter().map(|p| (p.path.as_str(), p.line)).collect();
        assert_eq!(found, [("crates/graph/src/a.rs", 3), ("crates/data/", 0)]);
    }

    #[test]
    fn foreign_functions_outside_their_crates_are_found() {
        let text = concat!("//! x\nunsafe extern ", "\"C\" {}\n");
        let repo = Repo::of(&[("crates/graph/src/a.rs", text), ("crates/jit/src/a.rs", text)]);
        let problems = ffi_stays_in_its_crates(&repo);
        assert_eq!(
            problems,
            [Problem::new("crates/graph/src/a.rs", 2, problems[0].message.clone())]
        );
    }
}
