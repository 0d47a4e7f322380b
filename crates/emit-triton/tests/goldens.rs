//! Tile programs and the Triton modules printed from them, side by side in `golden/*.txt`.
//!
//! The command of a case is the schedule. `TW_BLESS=1 cargo test -p tilewright-emit-triton` rewrites
//! what is expected: look at the difference. `tests/python/test_triton.py` compiles every module with
//! Triton and runs it in Triton's interpreter.
//!
//! `gpu/triton/*.tile` and the modules beside them, which `gpu/test_triton.py` runs on a GPU, are
//! kept in step here, too; their first line holds the schedule.

use std::path::Path;
use tilewright_base::{Error, Result};
use tilewright_emit_triton::{Knobs, emit_kernel};
use tilewright_testkit::golden;
use tilewright_tile::{Kernel, Schedule, verify};

fn emit(text: &str, schedule: &str, knobs: Knobs) -> Result<String> {
    let kernel = Kernel::parse("<golden>", text)?;
    verify(&kernel)?;
    let schedule = Schedule::parse("<schedule>", schedule)?;
    Ok(emit_kernel(&kernel, &schedule, knobs)?.python)
}

#[test]
fn modules_are_as_expected() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    golden::check(&directory, "txt", |case| emit(&case.input, &case.command, Knobs::default()));
}

#[test]
fn modules_for_the_gpu_are_current() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../gpu/triton");
    let bless = std::env::var_os("TW_BLESS").is_some_and(|v| v == "1");
    let mut n_files = 0;
    let mut stale = Vec::new();
    for entry in std::fs::read_dir(&directory).expect("gpu/triton") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|e| e != "tile") {
            continue;
        }
        n_files += 1;
        let text = std::fs::read_to_string(&path).expect("a text");
        let python = module_of(&text).unwrap_or_else(|e| panic!("{}: {e:?}", path.display()));
        let beside = path.with_extension("py");
        if std::fs::read_to_string(&beside).unwrap_or_default() == python {
            continue;
        }
        match bless {
            true => std::fs::write(&beside, python).expect("written"),
            false => stale.push(beside.display().to_string()),
        }
    }
    assert!(n_files >= 4, "{n_files} files in {}", directory.display());
    assert!(stale.is_empty(), "stale: {stale:?}; run again with TW_BLESS=1");
}

/// The first line is `# schedule: BM=128 num_warps=8`.
fn module_of(text: &str) -> Result<String> {
    let first = text.lines().next().unwrap_or_default();
    let line = first.strip_prefix("# schedule:").ok_or_else(|| Error::user("no schedule"))?;
    let mut knobs = Knobs::default();
    let mut tiles = String::new();
    for word in line.split_whitespace() {
        match word.split_once('=') {
            Some(("num_warps", n)) => knobs.num_warps = n.parse().map_err(|_| Error::user(word))?,
            Some(("num_stages", n)) => {
                knobs.num_stages = n.parse().map_err(|_| Error::user(word))?
            }
            _ => tiles += &format!("{word} "),
        }
    }
    emit(text, &tiles, knobs)
}
