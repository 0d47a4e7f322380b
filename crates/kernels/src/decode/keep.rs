//! Keys and values of a prompt, put where steps look for them.

use super::heads::cache_layout;
use super::{Rows, Scheduled, power_of_two, schedule};
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, KernelBuilder};

/// The kernel: `X [batch, kv_heads, S, width]` of the cache's type into the first `S` positions of a cache.
pub fn keep(rows: &Rows, kv_heads: i64, width: i64, dtype: DType, arch: Arch) -> Scheduled {
    let d = Dim::new;
    let mut k = KernelBuilder::new("decode_keep");
    let (bt, bd) = (k.tile("BT"), k.tile("BD"));
    k.symbol(Symbol { name: "S".into(), range: Range { min: 1, max: rows.positions } });
    let length = Dim::sym("S");
    let from = Layout::row_major(&[d(rows.batch), d(kv_heads), length.clone(), d(width)]);
    let x = k.param("X", dtype, from, Access::In);
    let cache = k.param("cache", dtype, cache_layout(rows, kv_heads, width), Access::InOut);
    let sequence = k.grid("sequence", d(rows.batch));
    let head = k.grid("head", d(kv_heads));
    let at = k.grid("pt", length.ceil_div(&bt)) * &bt;
    let index = vec![sequence, head, at, d(0)];
    let shape = vec![d(1), d(1), bt, bd];
    let part = k.load(x, index.clone(), shape);
    k.store(cache, index, part);
    let wide = power_of_two(width);
    let vector = (128 / i64::from(dtype.bits())).min(wide);
    let lanes = (wide / vector).min(128);
    let tiles = [("BT", 4 * 128 / lanes), ("BD", wide)];
    let schedule = schedule(arch, &tiles, (128, lanes, vector), width, false);
    Scheduled { kernel: k.finish(), schedule }
}
