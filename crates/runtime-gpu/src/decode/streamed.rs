//! [`Streamed`]: a step up to its logits as one launch, whose text is written by hand (`streamed.cu`).
//!
//! The launches of a [`super::DecodePlan`] wait for each other, and while they do memory rests: a layer of a model of 1B has six
//! of them in 40 us. Here the blocks of one launch meet instead, and weights go on arriving meanwhile. Which decoders it takes
//! says [`Streamed::of`]; all others, and the device interpreter, keep to the launches, which compute the same.

use super::Region;
use super::plan::Layer;
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{
    Arch, Args, Buffer, CompileRequest, Function, LaunchShape, PreparedLaunch, Stream,
};
use tilewright_launch::Loader;
use tilewright_plan::Decoder;
use tilewright_target::Gpu;

/// Sequences that such a step takes at least and at most. With one the launches are faster: on an H200 a step of 1B took 786 us and
/// not 870; with two it took 900 us and not 1129.
const FROM: i64 = 2;
pub(super) const MOST: i64 = 16;
/// Threads of a block that multiply, and all.
const THREADS: i64 = 256;
const ALL_THREADS: u32 = 384;
/// Columns of a slot. Depths are multiples of it.
const COLS: i64 = 256;
/// Slots of a block, and bytes of one: 8 pairs of lines of 2048 columns, with 64 bytes of padding each.
const SLOTS: i64 = 3;
const SLOT: i64 = 8 * (4 * WARPS * COLS + 64);
/// Shared memory that a block may have, in bytes.
const MOST_SMEM: i64 = 232_448;
/// More positions than that are better read once for all heads that share them.
const MOST_POSITIONS: i64 = 8192;
/// Parts of a head at most.
const MOST_PARTS: i64 = 16;
/// From so many sequences on products are cut along the depth: a block reads few of their vectors then.
const SPLIT_FROM: i64 = 8;
/// From so many sequences on a block attends for several heads, of this width.
const TOGETHER_FROM: i64 = 9;
const TOGETHER_WIDTH: i64 = 64;
/// Pieces of the depth that the warps of a block have at a time.
const WARPS: i64 = 8;
/// Blocks that attention should have at least, if parts of heads make as many.
const ENOUGH: i64 = 100;

/// What stands in for the launches of a step up to its logits.
#[derive(Debug)]
pub struct Streamed {
    /// Numbers of the model, by their names in the text.
    definitions: Vec<(&'static str, String)>,
    products: Vec<Product>,
    layers: Vec<Places>,
    /// Regions in the order of the text's `Step`, from the table on.
    pointers: Vec<usize>,
    /// Regions that are zero between launches.
    zeros: [usize; 3],
    /// Shared memory of a block, in bytes.
    smem: u32,
    /// Launches of the plan that it stands in for.
    pub(super) instead_of: usize,
}

/// A product of the step. Planes are regions, and lines of `depth` from their beginning.
#[derive(Debug)]
struct Product {
    planes: [(usize, i64); 2],
    depth: i64,
    /// Parts of the depth, each a unit of a group of 16 lines.
    parts: i64,
    groups: i64,
    per: i64,
    jump: i64,
    kind: i32,
    layer: usize,
}

/// What a layer has besides matrices.
#[derive(Debug)]
struct Places {
    /// Keys, values, the gains of the norm behind attention and of the one behind the layer: regions.
    regions: [usize; 4],
    /// Of queries, keys and values: a region.
    bias: Option<usize>,
    /// Positions that a token sees, its own included.
    window: i64,
}

/// Regions that a plan has anyway.
pub(super) struct Known<'a> {
    pub(super) layers: &'a [Layer],
    pub(super) table: usize,
    pub(super) head: usize,
    pub(super) norm: usize,
    pub(super) tables: [usize; 2],
    pub(super) at: usize,
    pub(super) tokens: usize,
    pub(super) x: usize,
    pub(super) q: usize,
    pub(super) logits: usize,
}

/// Memory: name, elements, type.
pub(super) type Memory<'a> = dyn FnMut(&str, i64, DType) -> Result<usize> + 'a;

/// Parts of a depth, each of as many pieces as a block has warps, or nearly.
fn cut(depth: i64, batch: i64) -> i64 {
    let pieces = depth / COLS;
    if batch < SPLIT_FROM || pieces <= WARPS {
        return 1;
    }
    (WARPS - 1..=WARPS).rev().find(|n| pieces % n == 0).map_or(1, |n| pieces / n)
}

impl Streamed {
    /// Whether it takes the decoder: weights of 16 bits in bfloat16, RMS norms, gates with SiLU, no biases but those of queries, keys and values, no norms of heads, sizes
    /// that its units divide, and a GPU on which it was measured.
    fn takes(
        d: &Decoder,
        gpu: &Gpu,
        (batch, positions): (i64, i64),
        (stored, gain): (DType, DType),
    ) -> bool {
        let plain = d.layers.iter().all(|l| {
            let biases = [&l.o_bias, &l.gate_bias, &l.up_bias, &l.down_bias];
            l.gate.is_some()
                && l.head_norms.is_empty()
                && biases.iter().all(|b| b.is_none())
                && Some(l.scale) == d.layers.first().map(|l| l.scale)
        });
        let depths = [d.hidden, d.inner, d.heads * d.width];
        gpu.capability == 90
            && plain
            && !d.layers.is_empty()
            && !d.centred
            && !d.turned
            && d.positions.is_none()
            && d.act == "{ x -> silu(x) }"
            && stored == DType::BF16
            && matches!(gain, DType::BF16 | DType::F32)
            && (FROM..=MOST).contains(&batch)
            && positions <= MOST_POSITIONS
            && matches!(d.width, 64 | 128)
            && depths.iter().all(|depth| depth % COLS == 0)
            && d.vocabulary % 16 == 0
            && d.kv_heads > 0
            && d.heads % d.kv_heads == 0
            // Offsets of vectors are 32-bit numbers there.
            && [d.hidden, d.inner, d.heads * d.width, d.vocabulary].iter().all(|n| n * MOST < 1 << 31)
    }

    /// The launch for a decoder, or none; `memory` adds a region, `instead_of` are the launches up to the logits.
    ///
    /// # Errors
    /// The user's about memory.
    pub(super) fn of(
        d: &Decoder,
        gpu: &Gpu,
        (batch, positions): (i64, i64),
        types: (DType, DType),
        known: &Known<'_>,
        memory: &mut Memory<'_>,
    ) -> Result<Option<Streamed>> {
        if !Streamed::takes(d, gpu, (batch, positions), types) {
            return Ok(None);
        }
        let mut parts = 1;
        // Heads that share keys and values, and read them together where there are enough of them.
        let shared = d.heads / d.kv_heads;
        let many = batch >= TOGETHER_FROM && d.width == TOGETHER_WIDTH;
        let divisors = [4, 3, 2].into_iter().filter(|n| many && shared % n == 0);
        let together = divisors.max().unwrap_or(1);
        while batch * d.heads / together * parts < ENOUGH && parts < MOST_PARTS {
            parts *= 2;
        }
        let (mut products, mut layers) = (Vec::new(), Vec::new());
        let half = d.width / 2;
        for (i, l) in known.layers.iter().enumerate() {
            let (Some(gate), Some(&post)) = (l.gate, l.post_norm.first()) else { return Ok(None) };
            let next = known.layers.get(i + 1).map_or(Some(&known.norm), |l| l.input_norm.first());
            let Some(&next) = next else { return Ok(None) };
            layers.push(Places {
                regions: [l.keys, l.values, post, next],
                bias: l.qkv_bias,
                window: d.layers.get(i).and_then(|l| l.window).unwrap_or(i64::from(i32::MAX)),
            });
            let heads = d.heads + 2 * d.kv_heads;
            let mut add = |planes, depth, groups, per, jump, kind| {
                let parts = cut(depth, batch);
                products.push(Product { planes, depth, parts, groups, per, jump, kind, layer: i });
            };
            // The two halves of a head side by side, then whole lines, then gates beside what they multiply.
            let qkv = [(l.qkv, 0), (l.qkv, half)];
            add(qkv, d.hidden, heads * d.width / 16, d.width / 16, d.width, 0);
            add([(l.o, 0), (l.o, 8)], d.heads * d.width, d.hidden / 16, 1, 16, 1);
            add([(gate, 0), (l.up, 0)], d.hidden, d.inner / 8, 1, 8, 2);
            add([(l.down, 0), (l.down, 8)], d.inner, d.hidden / 16, 1, 16, 3);
        }
        products.push(Product {
            planes: [(known.head, 0), (known.head, 8)],
            depth: d.hidden,
            parts: cut(d.hidden, batch),
            groups: d.vocabulary / 16,
            per: 1,
            jump: 16,
            kind: 4,
            layer: 0,
        });
        let (f32s, narrow, count) = (DType::F32, DType::BF16, d.layers.len() as i64);
        let mut pair = |name: &str, extent: i64| -> Result<[usize; 2]> {
            let high = memory(&format!("{name}, high"), batch * extent, narrow)?;
            Ok([high, memory(&format!("{name}, low"), batch * extent, narrow)?])
        };
        let vectors = pair("vectors", d.hidden)?;
        let inner = pair("inner vectors", d.inner)?;
        let mixed = pair("mixed vectors", d.heads * d.width)?;
        let all = batch * d.heads * parts;
        let tiles = (batch + 7) / 8;
        let split = products.iter().any(|p| p.parts > 1);
        let groups = products.iter().filter(|p| p.parts > 1).map(|p| p.groups).max().unwrap_or(1);
        let units = products.iter().filter(|p| p.parts > 1).map(|p| p.groups * p.parts).max();
        let partial = units.unwrap_or(1) * tiles * 32 * 4;
        let own = [
            memory("parts of a head", all * d.width, f32s)?,
            memory("their maxima", all, f32s)?,
            memory("their sums", all, f32s)?,
            memory("squares", batch * d.hidden / 16, f32s)?,
        ];
        let partial = memory("sums of parts of the depth", partial, f32s)?;
        let zeros = [
            memory("parts that are there", batch * d.heads, DType::I32)?,
            memory("parts of the depth that are there", groups, DType::I32)?,
            memory("meetings", 32 * (5 * count + 2), DType::I32)?,
        ];
        let first = known.layers.first().and_then(|l| l.input_norm.first()).copied();
        let Some(first) = first else { return Ok(None) };
        let [cos, sin] = known.tables;
        let pointers = [
            &[known.table, first, cos, sin, known.at, known.tokens, known.x][..],
            &vectors,
            &inner,
            &mixed,
            &[known.q],
            &own,
            &[known.logits, partial],
            &zeros,
        ]
        .concat();
        let scale = d.layers.first().map_or(1.0, |l| l.scale) * std::f64::consts::LOG2_E;
        let float = |x: f64| format!("{:?}f", x as f32);
        let number = |n: i64| n.to_string();
        let definitions = vec![
            ("TW_ROWS", number(batch)),
            ("TW_POSITIONS", number(positions)),
            ("TW_HIDDEN", number(d.hidden)),
            ("TW_INNER", number(d.inner)),
            ("TW_LAYERS", number(count)),
            ("TW_HEADS", number(d.heads)),
            ("TW_KV_HEADS", number(d.kv_heads)),
            ("TW_WIDTH", number(d.width)),
            ("TW_VOCABULARY", number(d.vocabulary)),
            ("TW_PARTS", number(parts)),
            ("TW_TOGETHER", number(together)),
            ("TW_EPS", float(d.eps)),
            ("TW_SCALE", float(scale)),
            ("TW_GAIN_F32", number(i64::from(types.1 == f32s))),
            ("TW_SPLIT", number(i64::from(split))),
        ];
        // As the text lays it out: slots, sums or parts of attention, both tables, two barriers a slot, roots twice, a flag.
        let merged = together * WARPS * (d.width + 2);
        let scratch = 4 * (2 * THREADS * 4 * tiles).max(merged);
        let tables = 48 * (products.len() as i64 + count);
        let smem = SLOTS * SLOT + scratch + tables + 16 * SLOTS + 64 * tiles + 16;
        if smem > MOST_SMEM {
            return Ok(None);
        }
        let smem = u32::try_from(smem).map_err(|_| Error::bug("shared memory of a step"))?;
        let instead_of = 0;
        Ok(Some(Streamed { definitions, products, layers, pointers, zeros, smem, instead_of }))
    }

    /// What the compiler is asked for, with as many blocks as there are multiprocessors.
    pub fn request(&self, arch: Arch, blocks: u32) -> CompileRequest {
        let request = CompileRequest::new("decode_streamed", include_str!("streamed.cu"), arch);
        let request = request.option("-std=c++17").option(format!("-DTW_BLOCKS={blocks}"));
        self.definitions
            .iter()
            .fold(request, |request, (name, value)| request.option(format!("-D{name}={value}")))
    }

    /// For people.
    pub(super) fn schedule(&self) -> String {
        format!(
            "one launch, slots of 16 x {}, {} KiB of shared memory",
            WARPS * COLS,
            self.smem / 1024
        )
    }

    /// Regions that must be zero before the first launch. Launches keep what they need of them.
    pub(super) fn zeros(&self) -> [usize; 3] {
        self.zeros
    }

    /// The launch, on a device where region `r` is at `address(r)`.
    ///
    /// # Errors
    /// Unsupported where not all blocks run at once; the compiler's and the driver's.
    pub(super) fn prepare(
        &self,
        loader: &Loader,
        stream: &Stream,
        regions: &[Region],
        address: &dyn Fn(usize) -> u64,
    ) -> Result<Launch> {
        let gpu = loader.gpu();
        let blocks = gpu.properties().sm_count;
        let compiled = loader.nvrtc().compile(&self.request(loader.target(), blocks))?;
        let function: Function = gpu.load(&compiled)?.function("decode_streamed")?;
        let mut tables = Vec::new();
        let mut first = 0;
        for p in &self.products {
            for (region, line) in p.planes {
                let size = regions[region].dtype.size() as u64;
                let place = address(region) + (line * p.depth).unsigned_abs() * size;
                tables.extend(place.to_le_bytes());
            }
            let units = p.groups * p.parts;
            let numbers = [p.depth, units, p.per, p.jump, first, i64::from(p.kind)];
            for n in numbers.into_iter().chain([p.layer as i64, p.parts]) {
                let n = i32::try_from(n).map_err(|_| Error::unsupported("a size above 2^31"))?;
                tables.extend(n.to_le_bytes());
            }
            // Lines go around the blocks, across products.
            first = (first + units) % i64::from(blocks);
        }
        let layers_at = tables.len() as u64;
        for layer in &self.layers {
            for region in layer.regions {
                tables.extend(address(region).to_le_bytes());
            }
            tables.extend(layer.bias.map_or(0, address).to_le_bytes());
            tables.extend(layer.window.to_le_bytes());
        }
        let tables = stream.upload(&tables)?;
        let mut bytes = Vec::new();
        for place in [tables.address(), tables.address() + layers_at] {
            bytes.extend(place.to_le_bytes());
        }
        for region in &self.pointers {
            bytes.extend(address(*region).to_le_bytes());
        }
        let shape = LaunchShape {
            grid: [blocks, 1, 1],
            block: [ALL_THREADS, 1, 1],
            smem_bytes: self.smem,
            cooperative: true,
            ..LaunchShape::default()
        };
        let launch = function.prepare(&shape, &Args::new().bytes(&bytes))?;
        if function.max_blocks_per_sm(ALL_THREADS, self.smem)? == 0 {
            return Err(Error::unsupported("a block does not fit a multiprocessor"));
        }
        Ok(Launch { launch, _tables: tables })
    }
}

/// The launch on a device.
pub(super) struct Launch {
    launch: PreparedLaunch,
    /// The kernel reads it.
    _tables: Buffer,
}

impl Launch {
    /// What is launched. It asks that the memory of all regions is alive until the stream is done, that nobody else uses it
    /// meanwhile, and that the regions of [`Streamed::zeros`] were zero before the first launch.
    pub(super) fn prepared(&self) -> &PreparedLaunch {
        &self.launch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_data::Tensor;
    use tilewright_plan::{DecoderLayer, DecoderNorm};

    fn decoder() -> Decoder {
        let matrix = |lines: usize, depth: usize| {
            Tensor::from_f64s(DType::BF16, &[lines, depth], &vec![0.5; lines * depth]).unwrap()
        };
        let gain = Tensor::from_f64s(DType::BF16, &[256], &[1.0; 256]).unwrap();
        let norm = DecoderNorm { gain, shift: None };
        let layer = DecoderLayer {
            input_norm: norm.clone(),
            qkv: vec![matrix(256, 256), matrix(128, 256), matrix(128, 256)],
            qkv_bias: Vec::new(),
            head_norms: Vec::new(),
            window: None,
            scale: 0.125,
            o: matrix(256, 256),
            o_bias: None,
            post_norm: norm.clone(),
            gate: Some(matrix(512, 256)),
            up: matrix(512, 256),
            gate_bias: None,
            up_bias: None,
            down: matrix(256, 512),
            down_bias: None,
        };
        Decoder {
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            width: 64,
            inner: 512,
            vocabulary: 48,
            eps: 1e-5,
            centred: false,
            act: "{ x -> silu(x) }".into(),
            turned: false,
            most_tokens: 4096,
            frequencies: vec![0.25; 32],
            positions: None,
            table: matrix(48, 256),
            layers: vec![layer.clone(), layer],
            norm,
            head: None,
        }
    }

    fn plan(d: &Decoder, batch: i64, positions: i64) -> Result<super::super::DecodePlan> {
        let options = super::super::DecodeOptions { batch, positions, stored: None, draw: None };
        super::super::DecodePlan::new(d, &Gpu::h200(), &options)
    }

    #[test]
    fn products_read_every_line_of_every_matrix_once() {
        let plan = plan(&decoder(), 8, 64).unwrap();
        let streamed = plan.streamed.as_ref().unwrap();
        let mut read: std::collections::BTreeMap<usize, Vec<i64>> = Default::default();
        for p in &streamed.products {
            assert_eq!(p.depth % (p.parts * COLS), 0);
            for group in 0..p.groups {
                let first = group / p.per * p.jump + group % p.per * 8;
                for (region, line) in p.planes {
                    read.entry(region).or_default().extend((0..8).map(|r| line + first + r));
                }
            }
        }
        // The table is the head, too.
        assert_eq!(read.len(), 2 * 5 + 1);
        for (region, mut lines) in read {
            let name = &plan.regions[region].name;
            let all: usize = plan.regions[region].data.iter().map(|t| t.shape()[0]).sum();
            lines.sort_unstable();
            assert_eq!(lines, (0..all as i64).collect::<Vec<_>>(), "{name}");
        }
        // What stands behind it begins with the logits.
        assert_eq!(plan.token[streamed.instead_of].label, "pieces");
    }

    #[test]
    fn depths_are_cut_for_several_sequences() {
        let cuts = |batch| [256, 2048, 4096, 8192, 14336, 11008, 5376].map(|d| cut(d, batch));
        assert_eq!(cuts(7), [1; 7]);
        assert_eq!(cuts(8), [1, 1, 2, 4, 7, 1, 3]);
    }

    #[test]
    fn halves_of_a_head_are_side_by_side() {
        let plan = plan(&decoder(), 2, 64).unwrap();
        let qkv = &plan.streamed.as_ref().unwrap().products[0];
        assert_eq!((qkv.planes[0].1, qkv.planes[1].1), (0, 32));
        // Group 5: the second eight pairs of the second head.
        assert_eq!(5 / qkv.per * qkv.jump + 5 % qkv.per * 8, 64 + 8);
    }

    #[test]
    fn attention_by_hand_stands_in_for_two_steps_behind_a_first_one_that_waits_for_all() {
        let plan = plan(&decoder(), 1, 64).unwrap();
        let waits = |i: usize| {
            let mut all = plan.token[i].program.roles.iter().flat_map(|r| &r.body);
            all.any(|s| matches!(s, tilewright_device::Stmt::GridWait))
        };
        // Attention reads what earlier steps wrote before its turn.
        assert!(!waits(0) && waits(1));
        let labels: Vec<&str> = plan.token.iter().map(|s| &*s.label).collect();
        let by_hand = |i: &usize| plan.token[*i].written.is_some();
        let by_hand: Vec<usize> = (0..labels.len()).filter(by_hand).collect();
        assert_eq!(by_hand.len(), 2);
        for i in by_hand {
            assert_eq!(labels[i..i + 2], ["attention", "combine"]);
            let launch = plan.token[i].written.as_ref().unwrap();
            assert_eq!(launch.stands_for, 2);
            let mixed = plan.token[i + 1].operands[3];
            assert_eq!(launch.arguments[3], super::super::written::Argument::Region(mixed));
        }
        assert!(plan.chunk.iter().all(|s| s.written.is_none()));
    }

    #[test]
    fn other_decoders_keep_to_launches() {
        let takes = |change: &dyn Fn(&mut Decoder), batch, positions| {
            let mut d = decoder();
            change(&mut d);
            plan(&d, batch, positions).unwrap().streamed.is_some()
        };
        assert!(takes(&|_| {}, 8, 4096) && takes(&|_| {}, 16, 64));
        assert!(!takes(&|_| {}, 1, 64));
        assert!(takes(&|d| d.layers[0].window = Some(63), 2, 64));
        let gains = || Tensor::from_f64s(DType::BF16, &[64], &[1.0; 64]).unwrap();
        let norms = |d: &mut Decoder| {
            d.layers.iter_mut().for_each(|l| l.head_norms = vec![gains(), gains()]);
        };
        assert!(!takes(&norms, 2, 64));
        assert!(!takes(&|d| d.act = "{ x -> gelu(x) }".into(), 2, 64));
        assert!(!takes(&|d| d.layers[1].scale = 0.5, 2, 64));
        let bias = || Some(Tensor::from_f64s(DType::BF16, &[256], &[0.0; 256]).unwrap());
        assert!(!takes(&|d| d.layers[1].o_bias = bias(), 2, 64));
        assert!(plan(&decoder(), 17, 64).is_err());
        let mut other = decoder();
        other.act = "{ x -> gelu(x) }".into();
        assert!(plan(&other, 9, 64).is_err());
        let mut many = plan(&decoder(), 9, 64).unwrap();
        assert!(many.in_launches().is_err());
    }
}
