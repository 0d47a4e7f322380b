//! Attention of few queries over a cache, cut into parts so that one sequence fills the machine.
//!
//! A block has one head of keys and values and [`AttentionParts::part`] positions: it reads them once for one or all heads of
//! queries that share them, and leaves for each its maximum `M`, its sum `L` of exponentials, and its weighted values `P`.
//! Blocks behind the position do nothing. The second kernel combines the parts of a head in their order, so that results
//! do not depend on who was first.

use super::heads::cache_layout;
use super::{Rows, Scheduled, along, power_of_two, scalar, schedule, text};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Access, KernelBuilder, ReduceKind, TileType};

/// Attention over a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParts {
    /// Rows, and positions of the cache.
    pub rows: Rows,
    /// Heads of the queries.
    pub heads: i64,
    /// Heads of keys and values.
    pub kv_heads: i64,
    /// Width of a head.
    pub width: i64,
    /// Type of the cache.
    pub cache: DType,
    /// Factor of the scores.
    pub scale: f64,
    /// Positions of a part.
    pub part: i64,
    /// Positions that a token sees, its own included; all when it is none.
    pub window: Option<i64>,
}

fn shape(extents: &[i64]) -> Layout {
    Layout::row_major(&extents.iter().map(|&n| Dim::new(n)).collect::<Vec<_>>())
}

impl AttentionParts {
    /// Parts of the whole cache.
    pub fn parts(&self) -> i64 {
        (self.rows.positions + self.part - 1) / self.part
    }

    /// Heads of queries that a block serves: one after another, so that few are sooner done; all that share keys where these
    /// are so many that reading them again costs more.
    fn together(&self) -> i64 {
        if self.rows.positions <= 8192 { 1 } else { self.heads / self.kv_heads }
    }

    /// Positions that a row sees.
    fn seen(&self, position: &Dim) -> Dim {
        position.clone() + 1
    }

    /// The first position that is seen where `seen` are, and the part that it lies in.
    fn first(&self, seen: &Dim) -> Option<(Dim, Dim)> {
        let first = (seen.clone() - self.window?).max_with(&Dim::new(0));
        Some((first.clone(), first.floor_div(&Dim::new(self.part))))
    }

    /// The kernel of a part: `Q [rows, heads, width]`, keys, values, `P [rows, heads, parts, width]`, `M` and `L`
    /// `[rows, heads, parts]`.
    ///
    /// # Errors
    /// Our bug.
    pub fn partial(&self, arch: Arch) -> Result<Scheduled> {
        use Access::{In, InOut};
        let d = Dim::new;
        let (count, parts, each) = (self.rows.count(), self.parts(), self.together());
        let mut k = KernelBuilder::new("decode_attention");
        let (bt, bd) = (k.tile("BT"), k.tile("BD"));
        self.rows.declare(&mut k);
        let q = k.param("Q", DType::F32, shape(&[count, self.heads, self.width]), In);
        let cache = || cache_layout(&self.rows, self.kv_heads, self.width);
        let keys = k.param("keys", self.cache, cache(), In);
        let values = k.param("values", self.cache, cache(), In);
        let flat = [count, self.heads, parts];
        let p = k.param("P", DType::F32, shape(&[&flat[..], &[self.width]].concat()), InOut);
        let m = k.param("M", DType::F32, shape(&flat), InOut);
        let l = k.param("L", DType::F32, shape(&flat), InOut);
        let row = k.grid("row", d(count));
        let first = k.grid("heads", d(self.heads / each)) * each;
        let group = first.floor_div(&d(self.heads / self.kv_heads));
        let part = k.grid("part", d(parts));
        let (sequence, position) = self.rows.place(&row);
        let seen = self.seen(&position);
        // Once, or not at all behind the position and before the window.
        let end = (part.clone() + 1).min_with(&seen.ceil_div(&bt));
        let first_seen = self.first(&seen);
        let begin = match &first_seen {
            Some((_, begin)) => part.max_with(begin),
            None => part,
        };
        let (part, _) = k.begin_for("here", begin, end, &[]);
        let start = part.clone() * &bt;
        let limit = seen - &start;
        let plane = vec![bt.clone(), bd.clone()];
        let [keys, values] = [keys, values].map(|c| {
            let at = vec![sequence.clone(), group.clone(), start.clone(), d(0)];
            let t = k.load(c, at, vec![d(1), d(1), bt.clone(), bd.clone()]);
            k.reshape(t, plane.clone())
        });
        let factor = self.scale * std::f64::consts::LOG2_E;
        for e in 0..each {
            let head = first.clone() + e;
            let at = vec![row.clone(), head.clone(), d(0)];
            let query = k.load(q, at, vec![d(1), d(1), bd.clone()]);
            let query = k.reshape(query, vec![bd.clone()]);
            let f = format!("{{ k, q -> f32(k) * (q * f32({factor:?})) }}");
            let f = text(&f, &[self.cache, DType::F32])?;
            let products = k.map(f, vec![k.plain(keys), along(query, 1)], plane.clone());
            let mut scores = k.reduce(ReduceKind::Sum, products, 1, None);
            if let Some((first_seen, _)) = &first_seen {
                let places = k.iota(DType::I32, 0, start.clone() - first_seen, vec![bt.clone()]);
                let f = text("{ s, i -> where(i >= 0, s, -f32(inf)) }", &[DType::F32, DType::I32])?;
                scores = k.map(f, vec![along(scores, 0), along(places, 0)], vec![bt.clone()]);
            }
            let most = k.reduce(ReduceKind::Max, scores, 0, Some(limit.clone()));
            let f = text("{ s, m -> exp2(s - m) }", &[DType::F32; 2])?;
            let weights = k.map(f, vec![along(scores, 0), scalar(most)], vec![bt.clone()]);
            let sum = k.reduce(ReduceKind::Sum, weights, 0, Some(limit.clone()));
            let f = text("{ v, w -> f32(v) * w }", &[self.cache, DType::F32])?;
            let weighted = k.map(f, vec![k.plain(values), along(weights, 0)], plane.clone());
            let mixed = k.reduce(ReduceKind::Sum, weighted, 0, Some(limit.clone()));
            let at = vec![row.clone(), head, part.clone()];
            let one = vec![d(1); 3];
            let most = k.reshape(most, one.clone());
            k.store(m, at.clone(), most);
            let sum = k.reshape(sum, one);
            k.store(l, at.clone(), sum);
            let mixed = k.reshape(mixed, vec![d(1), d(1), d(1), bd.clone()]);
            k.store(p, [at, vec![d(0)]].concat(), mixed);
        }
        k.end_for(&[]);
        let wide = power_of_two(self.width);
        let mut vector = (128 / i64::from(self.cache.bits())).min(wide);
        // A warp at least has something to do.
        while vector > 1 && wide / vector * self.part < 32 {
            vector /= 2;
        }
        let lanes = wide / vector;
        // Four positions a thread.
        let threads = power_of_two(self.part * lanes / 4).clamp(lanes.max(32), 256);
        let tiles = [("BT", self.part), ("BD", wide)];
        let schedule = schedule(arch, &tiles, (threads, lanes, vector), self.width, true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }

    /// The kernel that combines parts: `P`, `M`, `L`, `O [rows, heads * width]`.
    ///
    /// # Errors
    /// Our bug.
    pub fn combine(&self, arch: Arch) -> Result<Scheduled> {
        use Access::{In, Out};
        let d = Dim::new;
        let (count, parts) = (self.rows.count(), self.parts());
        let mut k = KernelBuilder::new("decode_combine");
        let (bs, bd) = (k.tile("BS"), k.tile("BD"));
        self.rows.declare(&mut k);
        let flat = [count, self.heads, parts];
        let p = k.param("P", DType::F32, shape(&[&flat[..], &[self.width]].concat()), In);
        let m = k.param("M", DType::F32, shape(&flat), In);
        let l = k.param("L", DType::F32, shape(&flat), In);
        let o = k.param("O", DType::F32, shape(&[count, self.heads, self.width]), Out);
        let row = k.grid("row", d(count));
        let head = k.grid("head", d(self.heads));
        let (_, position) = self.rows.place(&row);
        let seen = self.seen(&position);
        let known = seen.ceil_div(&d(self.part));
        // Parts before the window were not written.
        let begin = self.first(&seen).map_or(d(0), |(_, begin)| begin);
        let pieces = (known.clone() - &begin).ceil_div(&bs);
        let f32s = |s: Vec<Dim>| TileType::new(DType::F32, s);
        let one = vec![d(1), d(1), bs.clone()];
        let low = k.full(Value::Float(f64::NEG_INFINITY), f32s(vec![]));
        let (var, most) = k.begin_for("look", d(0), pieces.clone(), &[low]);
        let at = begin.clone() + &(var * &bs);
        let some = k.load(m, vec![row.clone(), head.clone(), at.clone()], one.clone());
        let some = k.reshape(some, vec![bs.clone()]);
        let here = k.reduce(ReduceKind::Max, some, 0, Some(known.clone() - &at));
        let f = Func::binary(Op::Max, DType::F32);
        let next = k.map(f, vec![scalar(most[0]), scalar(here)], vec![]);
        let most = k.end_for(&[next])[0];
        let none = k.full(Value::Float(0.0), f32s(vec![]));
        let nothing = k.full(Value::Float(0.0), f32s(vec![bd.clone()]));
        let (var, sums) = k.begin_for("piece", d(0), pieces, &[none, nothing]);
        let at = begin + &(var * &bs);
        let limit = known - &at;
        let [some, weight] = [m, l].map(|t| {
            let t = k.load(t, vec![row.clone(), head.clone(), at.clone()], one.clone());
            k.reshape(t, vec![bs.clone()])
        });
        let f = text("{ s, m -> exp2(s - m) }", &[DType::F32; 2])?;
        let factor = k.map(f, vec![along(some, 0), scalar(most)], vec![bs.clone()]);
        let mul = Func::binary(Op::Mul, DType::F32);
        let weights =
            k.map(mul.clone(), vec![along(weight, 0), along(factor, 0)], vec![bs.clone()]);
        let sum = k.reduce(ReduceKind::Sum, weights, 0, Some(limit.clone()));
        let plane = vec![bs.clone(), bd.clone()];
        let index = vec![row.clone(), head.clone(), at.clone(), d(0)];
        let values = k.load(p, index, vec![d(1), d(1), bs.clone(), bd.clone()]);
        let values = k.reshape(values, plane.clone());
        let weighted = k.map(mul, vec![k.plain(values), along(factor, 0)], plane);
        let mixed = k.reduce(ReduceKind::Sum, weighted, 0, Some(limit));
        let add = Func::binary(Op::Add, DType::F32);
        let next = [
            k.map(add.clone(), vec![scalar(sums[0]), scalar(sum)], vec![]),
            k.map(add, vec![along(sums[1], 0), along(mixed, 0)], vec![bd.clone()]),
        ];
        let sums = k.end_for(&next);
        let f = text("{ o, l -> o / l }", &[DType::F32; 2])?;
        let out = k.map(f, vec![along(sums[1], 0), scalar(sums[0])], vec![bd.clone()]);
        let out = k.reshape(out, vec![d(1), d(1), bd.clone()]);
        k.store(o, vec![row, head, d(0)], out);
        let wide = power_of_two(self.width);
        let vector = 4.min(wide);
        let lanes = wide / vector;
        let threads = (lanes * 8).clamp(64, 256);
        let bs = threads / lanes * power_of_two(parts * lanes / threads).clamp(1, 4);
        let tiles = [("BS", bs), ("BD", wide)];
        let schedule = schedule(arch, &tiles, (threads, lanes, vector), self.width, true);
        Ok(Scheduled { kernel: k.finish(), schedule })
    }
}
