//! Attention of a step as one launch (`attend.cu`).
//!
//! In a [`super::DecodePlan`] two launches do it: parts of the positions, and what combines them. Here the blocks that have the parts
//! of a head are a cluster, and combine them in shared memory; and what earlier steps left in the cache is read while the product
//! before still runs. That is sound because the first launch of a step (`embed`) never starts early: all of the step before is done then.

use super::written::{Argument, Written, counts, number};
use tilewright_base::{DType, Error, Result};
use tilewright_kernels::decode::AttentionParts;
use tilewright_target::Gpu;

/// Blocks of a cluster.
const PARTS: i64 = 8;
/// More positions than that are better read once for all heads that share them.
const MOST_POSITIONS: i64 = 8192;
/// Threads of a block. With twice as many the products behind it have less room to ask for weights.
const THREADS: i64 = 256;
/// Heads of a block at most.
const MOST_TOGETHER: i64 = 4;

/// The launch that stands in for [`AttentionParts::partial`], with these operands, and [`AttentionParts::combine`], which writes to
/// `mixed`; none where it takes them not: caches of 16-bit floats, heads of 32 to 256 numbers, at most 8192 positions, one token of each
/// sequence, a GPU with clusters.
///
/// # Errors
/// Our bug.
pub(super) fn attend(
    of: &AttentionParts,
    gpu: &Gpu,
    operands: &[usize],
    mixed: usize,
) -> Result<Option<Written>> {
    let fits = gpu.capability >= 90
        && of.rows.new == 1
        && matches!(of.cache, DType::BF16 | DType::F16)
        && matches!(of.width, 32 | 64 | 128 | 256)
        && of.rows.positions <= MOST_POSITIONS
        && of.kv_heads > 0
        && of.heads % of.kv_heads == 0;
    if !fits {
        return Ok(None);
    }
    let [q, keys, values, _, _, _, at] = *operands else {
        return Err(Error::bug(format!("operands of attention: {operands:?}")));
    };
    // Keys are read once for some heads, but rather again than by few blocks.
    let (mut together, shared) = (1, of.heads / of.kv_heads);
    let blocks = |together: i64| of.rows.batch * of.heads / together * PARTS;
    while together < MOST_TOGETHER
        && shared % (2 * together) == 0
        && blocks(together) > i64::from(gpu.sms)
    {
        together *= 2;
    }
    let definitions = [
        ("TW_POSITIONS", of.rows.positions),
        ("TW_HEADS", of.heads),
        ("TW_KV_HEADS", of.kv_heads),
        ("TW_WIDTH", of.width),
        ("TW_PARTS", PARTS),
        ("TW_TOGETHER", together),
        ("TW_THREADS", THREADS),
        ("TW_HALF", i64::from(of.cache == DType::F16)),
    ];
    let (blocks, threads) = counts(blocks(together), THREADS)?;
    let mut arguments = [q, keys, values, mixed, at].map(Argument::Region).to_vec();
    arguments.push(Argument::Count(of.window.unwrap_or(i64::from(i32::MAX))));
    arguments.push(Argument::Factor((of.scale * std::f64::consts::LOG2_E) as f32));
    Ok(Some(Written {
        name: "decode_attend",
        text: include_str!("attend.cu"),
        definitions: definitions.map(|(name, n)| (name, number(n))).to_vec(),
        blocks,
        threads,
        cluster: PARTS as u32,
        arguments,
        stands_for: 2,
        schedule: format!("{} clusters of {PARTS} blocks", i64::from(blocks) / PARTS),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_kernels::decode::Rows;

    fn parts() -> AttentionParts {
        AttentionParts {
            rows: Rows { batch: 1, new: 1, positions: 1024 },
            heads: 32,
            kv_heads: 8,
            width: 64,
            cache: DType::BF16,
            scale: 0.125,
            part: 32,
            window: None,
        }
    }

    fn of(parts: &AttentionParts) -> Option<Written> {
        attend(parts, &Gpu::h200(), &[0, 1, 2, 3, 4, 5, 6], 7).unwrap()
    }

    #[test]
    fn it_stands_in_for_parts_and_what_combines_them() {
        let launch = of(&parts()).unwrap();
        let regions = [0, 1, 2, 7, 6].map(Argument::Region);
        assert_eq!((&launch.arguments[..5], launch.stands_for), (&regions[..], 2));
        let window = AttentionParts { window: Some(33), ..parts() };
        assert_eq!(of(&window).unwrap().arguments[5], Argument::Count(33));
        assert!(of(&window).unwrap().same_kernel(&launch));
        assert!(attend(&parts(), &Gpu::h200(), &[0, 1, 2], 7).is_err());
    }

    #[test]
    fn heads_that_share_keys_go_together_where_there_are_many_blocks() {
        let shape = |parts: &AttentionParts| {
            let launch = of(parts).unwrap();
            let together = launch.definitions.iter().find(|d| d.0 == "TW_TOGETHER").unwrap();
            (launch.blocks, together.1.clone())
        };
        assert_eq!(shape(&parts()), (128, "2".into()));
        let eight = Rows { batch: 8, new: 1, positions: 1024 };
        assert_eq!(shape(&AttentionParts { rows: eight, ..parts() }), (512, "4".into()));
        // Every head has keys of its own, or three share some.
        assert_eq!(shape(&AttentionParts { kv_heads: 32, ..parts() }), (256, "1".into()));
        assert_eq!(shape(&AttentionParts { heads: 24, ..parts() }), (192, "1".into()));
    }

    #[test]
    fn other_attention_keeps_to_two_launches() {
        let rows = parts().rows;
        let chunk = Rows { new: 8, ..rows };
        let long = Rows { positions: 8193, ..rows };
        assert!(of(&AttentionParts { rows: chunk, ..parts() }).is_none());
        assert!(of(&AttentionParts { rows: long, ..parts() }).is_none());
        assert!(of(&AttentionParts { cache: DType::F32, ..parts() }).is_none());
        assert!(of(&AttentionParts { width: 80, ..parts() }).is_none());
        let older = Gpu { capability: 80, ..Gpu::h200() };
        assert!(attend(&parts(), &older, &[0, 1, 2, 3, 4, 5, 6], 7).unwrap().is_none());
    }
}
