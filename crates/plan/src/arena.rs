//! The arena planner: places buffers of known lifetimes in one block of memory.
//!
//! Largest first, each at the lowest offset that no buffer alive at the same time occupies
//! ("greedy by size", Pisarchyk and Lee, arXiv:2001.03288). The plan is a function of sizes and
//! lifetimes only, so equal inputs give equal offsets.

/// A buffer to place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Size; offsets are multiples of 64 bytes.
    pub bytes: usize,
    /// First step that touches it.
    pub first: usize,
    /// Last step that touches it.
    pub last: usize,
}

/// Where each buffer lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaPlan {
    /// Offset of each buffer, in the order given.
    pub offsets: Vec<usize>,
    /// Size of the arena.
    pub bytes: usize,
    /// What one allocation per buffer would take.
    pub naive_bytes: usize,
}

fn round_up(bytes: usize) -> usize {
    bytes.div_ceil(64).saturating_mul(64)
}

/// Places the buffers. Buffers whose lifetimes overlap never overlap in memory.
pub fn plan_arena(buffers: &[Live]) -> ArenaPlan {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), i));
    let mut plan = ArenaPlan { offsets: vec![0; buffers.len()], ..ArenaPlan::default() };
    let mut placed: Vec<usize> = Vec::new();
    for i in order {
        let size = round_up(buffers[i].bytes);
        // Occupied ranges during this buffer's life, by offset.
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| {
                buffers[j].first <= buffers[i].last && buffers[i].first <= buffers[j].last
            })
            .map(|&j| (plan.offsets[j], plan.offsets[j] + round_up(buffers[j].bytes)))
            .collect();
        busy.sort_unstable();
        let mut at = 0;
        for (start, end) in busy {
            if at + size <= start {
                break;
            }
            at = at.max(end);
        }
        plan.offsets[i] = at;
        plan.bytes = plan.bytes.max(at + size);
        plan.naive_bytes += size;
        placed.push(i);
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_needs_two_buffers() {
        let live = |first| Live { bytes: 100, first, last: first + 1 };
        let plan = plan_arena(&[live(0), live(1), live(2), live(3)]);
        assert_eq!(plan.bytes, 256);
        assert_eq!(plan.naive_bytes, 512);
    }

    /// Post-condition over pseudo-random lifetimes: alive together means apart in memory.
    #[test]
    fn overlapping_lifetimes_never_share_bytes() {
        let mut state = 1u64;
        let mut next = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for _ in 0..50 {
            let buffers: Vec<Live> = (0..40)
                .map(|_| {
                    let first = next(30);
                    Live { bytes: next(5000), first, last: first + next(8) }
                })
                .collect();
            let plan = plan_arena(&buffers);
            for (i, a) in buffers.iter().enumerate() {
                assert!(
                    plan.offsets[i] + a.bytes <= plan.bytes && plan.offsets[i].is_multiple_of(64)
                );
                for (j, b) in buffers.iter().enumerate().skip(i + 1) {
                    let together = a.first <= b.last && b.first <= a.last;
                    let (x, y) = (plan.offsets[i], plan.offsets[j]);
                    assert!(
                        !together || x + a.bytes <= y || y + b.bytes <= x || a.bytes * b.bytes == 0
                    );
                }
            }
        }
    }
}
