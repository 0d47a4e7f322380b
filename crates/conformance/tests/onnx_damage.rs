//! Damaged models: every backend case truncated and with flipped bytes must give a model or an
//! error, never a panic, within a bounded time (`TILEWRIGHT_FUZZ_SECONDS`, default 1).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};
use tilewright_conformance::onnx_backend::cases;
use tilewright_graph::verify;
use tilewright_import::onnx::{ImportOptions, Imported, import_bytes};

/// A small generator of reproducible numbers (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below.max(1) as u64) as usize
    }
}

#[test]
fn damaged_models_give_errors() {
    let folder = std::env::var("ONNX_BACKEND_CASES").map_or_else(
        |_| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/onnx_backend"),
        Into::into,
    );
    let Ok(list) = cases(&folder) else {
        println!("SKIPPED: no cases in {}", folder.display());
        return;
    };
    let seconds = std::env::var("TILEWRIGHT_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    let seed = std::env::var("TILEWRIGHT_FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(1));
    let mut numbers = Numbers(seed.unwrap_or(1));
    let models: Vec<(String, Vec<u8>)> = list
        .iter()
        .filter_map(|p| Some((p.display().to_string(), std::fs::read(p.join("model.onnx")).ok()?)))
        .filter(|(_, bytes)| bytes.len() < 20_000)
        .collect();
    let (mut runs, mut failures) = (0, 0);
    while Instant::now() < end && !models.is_empty() {
        let (name, bytes) = &models[numbers.next(models.len())];
        let mut damaged = bytes.clone();
        if numbers.next(8) == 0 {
            damaged.truncate(numbers.next(bytes.len()));
        }
        for _ in 0..1 + numbers.next(3) {
            if damaged.is_empty() {
                break;
            }
            let at = numbers.next(damaged.len());
            match numbers.next(3) {
                0 => damaged[at] ^= 1 << numbers.next(8),
                1 => damaged[at] = [0, 1, 2, 7, 0x7f, 0x80, 0xff][numbers.next(7)],
                _ => {
                    let from = numbers.next(damaged.len());
                    damaged[at] = damaged[from];
                }
            }
        }
        let slow = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if let Ok(Imported::Graph(graph)) =
                import_bytes(&damaged, None, &ImportOptions::default())
            {
                verify(&graph).unwrap_or_else(|e| panic!("an ill-formed graph: {e:?}"));
            }
        }));
        runs += 1;
        let failed = outcome.is_err() || slow.elapsed() > Duration::from_secs(20);
        if failed {
            let file = std::env::temp_dir().join(format!("damaged-{runs}.onnx"));
            let _ = std::fs::write(&file, &damaged);
            println!("{name}, damaged as in {}, took {:?}", file.display(), slow.elapsed());
            failures += 1;
        }
    }
    println!("{runs} damaged models");
    assert_eq!(failures, 0, "of {runs} damaged models");
}
