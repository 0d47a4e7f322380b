//! Heads on their way to attention: queries and keys turned to their position, keys and values put into the cache.
//!
//! In most decoders that ends the product that makes them ([`super::Ending::Rotary`]). Where each head has a norm of its own
//! ([`head_norms`]) a kernel behind the product does it, since the blocks of a product have a part of a head each.

use super::{Rows, Scheduled, along, power_of_two, scalar, schedule, text};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::Value;
use tilewright_layout::{Axis, Dim, Layout};
use tilewright_tile::{Access, KernelBuilder, ParamId, ReduceKind, TileId};

/// Where heads go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) rows: Rows,
    /// Heads of the queries.
    pub(super) heads: i64,
    /// Heads of keys and values.
    pub(super) kv_heads: i64,
    /// Width of a head, even.
    pub(super) width: i64,
    /// Type of the cache.
    pub(super) cache: DType,
}

/// The parameters for that: `cos` and `sin` `[2, positions, width/2]` (first of what turns, then of what does not), `Q`, keys,
/// values.
pub(super) struct Places {
    cos: ParamId,
    sin: ParamId,
    q: ParamId,
    caches: [ParamId; 2],
}

fn shape(extents: &[i64]) -> Layout {
    Layout::row_major(&extents.iter().map(|&n| Dim::new(n)).collect::<Vec<_>>())
}

impl Turn {
    /// Declares them.
    pub(super) fn params(&self, k: &mut KernelBuilder) -> Places {
        use Access::{In, InOut};
        self.rows.declare(k);
        let table = shape(&[2, self.rows.positions, self.width / 2]);
        let cos = k.param("cos", DType::F32, table.clone(), In);
        let sin = k.param("sin", DType::F32, table, In);
        // Halves are an axis of their own: what is behind a half is not the next one.
        let half = self.width / 2;
        let all = shape(&[self.rows.count(), self.heads, 2, half]);
        let q = k.param("Q", DType::F32, all, InOut);
        let cache = || shape(&[self.rows.batch, self.kv_heads, self.rows.positions, 2, half]);
        let caches = ["keys", "values"].map(|name| k.param(name, self.cache, cache(), InOut));
        Places { cos, sin, q, caches }
    }

    /// Puts lines of a head where they belong: `pair` has those from `within` on of its first and of its second half.
    pub(super) fn place(
        &self,
        k: &mut KernelBuilder,
        to: &Places,
        [row, head, within]: [&Dim; 3],
        pair: [TileId; 2],
    ) -> Result<()> {
        let d = Dim::new;
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let line = k.ty(pair[0]).shape.clone();
        let bn = line[0].clone();
        let kind = head.floor_div(&d(heads + kv_heads));
        let (sequence, position) = self.rows.place(row);
        let at = vec![kind, position.clone(), within.clone()];
        let one = vec![d(1), d(1), bn.clone()];
        let [c, s] = [to.cos, to.sin].map(|t| {
            let t = k.load(t, at.clone(), one.clone());
            k.reshape(t, line.clone())
        });
        for (part, turn) in ["{ a, b, c, s -> a * c - b * s }", "{ a, b, c, s -> b * c + a * s }"]
            .iter()
            .enumerate()
        {
            let part = d(part as i64);
            let f = text(turn, &[DType::F32; 4])?;
            let args = [pair[0], pair[1], c, s].map(|t| along(t, 0)).to_vec();
            let y = k.map(f, args, line.clone());
            let one = k.reshape(y, vec![d(1), d(1), d(1), bn.clone()]);
            k.store(to.q, vec![row.clone(), head.clone(), part.clone(), within.clone()], one);
            let narrow = narrowed(k, y, self.cache)?;
            for (i, cache) in to.caches.iter().enumerate() {
                // What is not of this kind lies outside, and outside nothing is stored.
                let head = head.clone() - &d(heads + i as i64 * kv_heads);
                let at =
                    vec![sequence.clone(), head, position.clone(), part.clone(), within.clone()];
                let y = k.reshape(narrow, vec![d(1), d(1), d(1), d(1), bn.clone()]);
                k.store(*cache, at, y);
            }
        }
        Ok(())
    }
}

/// An RMS norm over each head of queries and keys, and then their turn: `X [rows, heads + 2 * kv_heads, width]` f32, the gains
/// of queries and of keys `[2, width]` of the type `gain`, and where heads go, as behind a product with
/// [`super::Ending::Rotary`].
///
/// # Errors
/// Our bug.
pub fn head_norms(
    rows: Rows,
    (heads, kv_heads, width): (i64, i64, i64),
    (gain, eps): (DType, f64),
    cache: DType,
    arch: Arch,
) -> Result<Scheduled> {
    let d = Dim::new;
    let mut k = KernelBuilder::new("decode_heads");
    let bw = k.tile("BW");
    let (turn, half) = (Turn { rows, heads, kv_heads, width, cache }, width / 2);
    let all = shape(&[rows.count(), heads + 2 * kv_heads, 2, half]);
    let x = k.param("X", DType::F32, all, Access::In);
    let gains = k.param("gains", gain, shape(&[2, 2, half]), Access::In);
    let to = turn.params(&mut k);
    let row = k.grid("row", d(rows.count()));
    let head = k.grid("head", d(heads + 2 * kv_heads));
    // Queries, keys, values: 0, 1, 2. Values lie behind the gains, and take 1.
    let kind = head.floor_div(&d(heads)).min_with(&d(1))
        + &(head.clone() - heads).floor_div(&d(kv_heads)).max_with(&d(0));
    let line = vec![bw.clone()];
    let parts = [0, 1].map(|i| {
        let at = vec![row.clone(), head.clone(), d(i), d(0)];
        let t = k.load(x, at, vec![d(1), d(1), d(1), bw.clone()]);
        k.reshape(t, line.clone())
    });
    let mut sums = Vec::new();
    for part in parts {
        let square =
            k.map(text("{ x -> x * x }", &[DType::F32])?, vec![along(part, 0)], line.clone());
        sums.push(k.reduce(ReduceKind::Sum, square, 0, None));
    }
    let values = k.iota(DType::I32, 0, head.clone() - (heads + kv_heads), vec![d(1)]);
    let values = k.reshape(values, vec![]);
    let f = format!(
        "{{ a, b, v -> where(v >= 0, f32(1), rsqrt((a + b) / f32({width}) + f32({eps:?}))) }}"
    );
    let f = text(&f, &[DType::F32, DType::F32, DType::I32])?;
    let root = k.map(f, vec![scalar(sums[0]), scalar(sums[1]), scalar(values)], vec![]);
    let mut pair = Vec::new();
    for (i, part) in parts.into_iter().enumerate() {
        let at = vec![kind.clone(), d(i as i64), d(0)];
        let one = vec![d(1), d(1), bw.clone()];
        let g = k.load_with(gains, at, vec![1; 3], Value::Float(1.0), one);
        let g = k.reshape(g, line.clone());
        let f = text("{ x, r, g -> x * r * f32(g) }", &[DType::F32, DType::F32, gain])?;
        pair.push(k.map(f, vec![along(part, 0), scalar(root), along(g, 0)], line.clone()));
    }
    turn.place(&mut k, &to, [&row, &head, &d(0)], [pair[0], pair[1]])?;
    let wide = power_of_two(half).max(32);
    let threads = wide.min(128);
    let schedule = schedule(arch, &[("BW", wide)], (threads, threads, 1), 1, true);
    Ok(Scheduled { kernel: k.finish(), schedule })
}

/// `[batch, kv_heads, positions, width]`.
pub(super) fn cache_layout(rows: &Rows, kv_heads: i64, width: i64) -> Layout {
    let extents = [rows.batch, kv_heads, rows.positions, width];
    let mut stride = 1;
    let mut axes = Vec::new();
    for extent in extents.into_iter().rev() {
        axes.insert(0, Axis { extent: Dim::new(extent), stride: Dim::new(stride), block: None });
        stride *= extent;
    }
    Layout { axes, offset: Dim::new(0) }
}

/// A line in another type.
fn narrowed(k: &mut KernelBuilder, x: TileId, dtype: DType) -> Result<TileId> {
    if dtype == DType::F32 {
        return Ok(x);
    }
    let shape = k.ty(x).shape.clone();
    let f = text(&format!("{{ x -> {dtype}(x) }}"), &[DType::F32])?;
    Ok(k.map(f, vec![along(x, 0)], shape))
}
