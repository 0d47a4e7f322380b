//! Masks of stores that are narrower than their values.
//!
//! LLVM 22 makes a masked store of a truncation whose mask is known to have a single lane into a store of that lane as it was before
//! the truncation: four bytes of a 16-bit float, the last two behind its row, where another thread may have written
//! (`vpmovdw` under masks in AVX-512). A mask that holds what only a run knows is not folded so.

use crate::emitter::{Emitter, Place};

/// Names a condition that holds in every run, which LLVM cannot know: blocks are counted from zero.
const RUNS: &str = "%runs";

impl Emitter<'_> {
    /// The mask of a store of `elem`: lanes in use, and inside. `None` when all are.
    pub(crate) fn store_mask(&mut self, place: &Place, elem: &str) -> Option<String> {
        let mask = self.access_mask(place, false)?;
        if !matches!(elem, "i8" | "i16" | "i32") {
            return Some(mask);
        }
        if !self.c.t.allocas.contains(RUNS) {
            self.c.t.allocas.push_str(&format!("  {RUNS} = icmp sgt i64 %first, -1\n"));
        }
        let lanes = self.lanes;
        let runs = self.c.splat("i1", RUNS, lanes);
        Some(self.c.bin("and", "i1", lanes, &mask, &runs))
    }
}
