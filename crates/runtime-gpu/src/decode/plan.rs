//! [`DecodePlan`]: regions of memory and the launches of a step.

use super::attend::attend;
use super::streamed::{self, Known, Streamed};
use super::written::Written;
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_device::{Arch, Program};
use tilewright_kernels::decode::{
    AT, AttentionParts, Draw, DrawPlace, DrawStep, Ending, MOST_ROWS, Norm, Rows, Scheduled,
    VectorProduct, activation, advance, embed, head_norms, keep, pick, pieces,
};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;
use tilewright_plan::{Decoder, DecoderLayer, DecoderNorm};
use tilewright_target::Gpu;

/// How a decoder is run.
#[derive(Clone, Copy, Debug)]
pub struct DecodeOptions {
    /// Sequences, 1 to 8, or 16 where a step is one launch.
    pub batch: i64,
    /// The longest sequence that there is memory for.
    pub positions: i64,
    /// The type in which matrices and the cache are stored; that of the files when it is none.
    pub stored: Option<DType>,
    /// Tokens are drawn: whether only the `k` likeliest count, and whether only those up to a probability. Otherwise the
    /// likeliest token is taken.
    pub draw: Option<(bool, bool)>,
}

/// A piece of memory.
#[derive(Clone, Debug)]
pub struct Region {
    /// For people.
    pub name: String,
    /// Length.
    pub bytes: usize,
    /// Weights: tensors one after another, in this type. Empty: memory that steps change.
    pub data: Vec<Tensor>,
    /// Type of the data.
    pub dtype: DType,
    /// The tensors are matrices, whose columns lie here one after another instead of their rows.
    pub turned: bool,
}

impl Region {
    /// The bytes of one of its tensors as they lie here.
    pub(super) fn stored(&self, tensor: &Tensor) -> Result<Tensor> {
        let rounded = tensor.rounded(self.dtype)?;
        match (self.turned, rounded.shape()) {
            (true, &[rows, cols]) => turned(&rounded, rows, cols),
            _ => Ok(rounded),
        }
    }
}

/// A matrix with its columns as rows.
fn turned(matrix: &Tensor, rows: usize, cols: usize) -> Result<Tensor> {
    // In squares, so that neither side of the copy jumps through memory line by line.
    const SQUARE: usize = 64;
    let (from, size) = (matrix.bytes(), matrix.dtype().size());
    let mut to = vec![0; from.len()];
    for (r0, c0) in
        (0..rows).step_by(SQUARE).flat_map(|r| (0..cols).step_by(SQUARE).map(move |c| (r, c)))
    {
        for c in c0..cols.min(c0 + SQUARE) {
            for r in r0..rows.min(r0 + SQUARE) {
                let (at, here) = ((c * rows + r) * size, (r * cols + c) * size);
                to[at..at + size].copy_from_slice(&from[here..here + size]);
            }
        }
    }
    Tensor::new(matrix.dtype(), vec![cols, rows], tilewright_data::Bytes::copy_from(&to))
}

/// One launch.
#[derive(Clone, Debug)]
pub struct DecodeStep {
    /// What it does: `qkv`.
    pub label: String,
    /// The program.
    pub program: Arc<Program>,
    /// Sizes for checking: the largest position.
    pub sizes: Env,
    /// A region for each parameter, and then one for each size that is read from memory.
    pub operands: Vec<usize>,
    /// Bytes of weights that it reads.
    pub weight_bytes: u64,
    /// Bytes of the cache that it reads for each position.
    pub cache_bytes: u64,
    /// Its schedule, for people.
    pub schedule: String,
    /// What devices launch instead, perhaps instead of the next step, too.
    pub written: Option<Written>,
}

/// Memory and launches of a step.
#[derive(Debug)]
pub struct DecodePlan {
    /// Sequences.
    pub batch: i64,
    /// Positions that there is memory for.
    pub positions: i64,
    /// Words.
    pub vocabulary: i64,
    /// Tokens of a prompt that a chunk takes; 0: there are none.
    pub chunk_rows: i64,
    /// Memory.
    pub regions: Vec<Region>,
    /// A step with the next token.
    pub token: Vec<DecodeStep>,
    /// A chunk of a prompt.
    pub chunk: Vec<DecodeStep>,
    /// A whole prompt, if the model has a plan for that.
    pub prompt: Option<super::PromptPlan>,
    /// What devices launch instead of the first steps of `token`, if it takes the model.
    pub streamed: Option<Streamed>,
    /// Keys and values of each layer.
    pub(super) caches: Vec<[usize; 2]>,
    /// Puts keys or values of a prompt into the cache.
    pub(super) keep: Program,
    pub(super) at: usize,
    pub(super) tokens: usize,
    pub(super) chunk_tokens: usize,
    pub(super) history: usize,
    pub(super) logits: usize,
    pub(super) knobs: usize,
    pub(super) random: usize,
}

/// Regions of one layer. Norms are a gain and perhaps a shift.
pub(super) struct Layer {
    pub(super) input_norm: Vec<usize>,
    pub(super) qkv: usize,
    pub(super) qkv_bias: Option<usize>,
    head_norms: Option<usize>,
    /// Which of the kinds of attention.
    attention: usize,
    pub(super) o: usize,
    o_bias: Option<usize>,
    pub(super) post_norm: Vec<usize>,
    pub(super) gate: Option<usize>,
    pub(super) up: usize,
    gate_bias: Option<usize>,
    up_bias: Option<usize>,
    pub(super) down: usize,
    down_bias: Option<usize>,
    pub(super) keys: usize,
    pub(super) values: usize,
}

/// The window and the factor of a layer's attention. A window as long as the memory leaves nothing out.
fn attention_kind(layer: &DecoderLayer, positions: i64) -> (Option<i64>, f64) {
    (layer.window.filter(|w| *w < positions), layer.scale)
}

fn too_many(batch: i64) -> Error {
    Error::unsupported(format!(
        "{batch} sequences at a time: a step takes 1 to {MOST_ROWS}, or {} where it is one launch",
        streamed::MOST
    ))
}

/// What steps work on.
struct Work {
    x: [usize; 2],
    /// Heads before their norms.
    raw: usize,
    q: usize,
    parts: [usize; 3],
    mixed: usize,
    inner: usize,
}

struct Builder<'a> {
    decoder: &'a Decoder,
    options: DecodeOptions,
    stored: DType,
    regions: Vec<Region>,
}

impl Builder<'_> {
    fn weights(&mut self, name: String, data: Vec<Tensor>, dtype: DType) -> Result<usize> {
        let mut bytes = 0;
        for t in &data {
            bytes +=
                dtype.bytes_for(t.len()).ok_or_else(|| Error::user("a weight is too large"))?;
        }
        self.regions.push(Region { name, bytes, data, dtype, turned: false });
        Ok(self.regions.len() - 1)
    }

    /// Matrices of layers, as rows along the depth.
    fn matrix(&mut self, name: String, data: Vec<Tensor>) -> Result<usize> {
        let region = self.weights(name, data, self.stored)?;
        self.regions[region].turned = self.decoder.turned;
        Ok(region)
    }

    fn norm(&mut self, name: String, norm: &DecoderNorm) -> Result<Vec<usize>> {
        let dtype = norm.gain.dtype();
        let mut parts = vec![self.weights(name.clone(), vec![norm.gain.clone()], dtype)?];
        if let Some(shift) = &norm.shift {
            parts.push(self.weights(format!("{name} shift"), vec![shift.clone()], dtype)?);
        }
        Ok(parts)
    }

    fn memory(&mut self, name: impl Into<String>, extents: &[i64], dtype: DType) -> Result<usize> {
        let name = name.into();
        let count = extents.iter().try_fold(1i64, |a, b| a.checked_mul(*b));
        let bytes = count
            .and_then(|n| usize::try_from(n).ok())
            .and_then(|n| dtype.bytes_for(n))
            .ok_or_else(|| Error::user(format!("{name} of {extents:?} is too large")))?;
        self.regions.push(Region { name, bytes, data: Vec::new(), dtype, turned: false });
        Ok(self.regions.len() - 1)
    }

    fn layers(&mut self, kinds: &[(Option<i64>, f64)]) -> Result<Vec<Layer>> {
        let d = self.decoder;
        let cache = [self.options.batch, d.kv_heads, self.options.positions, d.width];
        let mut all = Vec::new();
        let positions = self.options.positions;
        for (i, l) in d.layers.iter().enumerate() {
            let kind = attention_kind(l, positions);
            let stored = self.stored;
            let name = |what: &str| format!("layer {i} {what}");
            let one = |t: &Tensor| vec![t.clone()];
            let input_norm = self.norm(name("input norm"), &l.input_norm)?;
            let post_norm = self.norm(name("post norm"), &l.post_norm)?;
            let qkv = self.matrix(name("qkv"), l.qkv.clone())?;
            let mut optional = |what: &str, list: Vec<Tensor>, dtype: DType| {
                (!list.is_empty()).then(|| self.weights(name(what), list, dtype)).transpose()
            };
            let bias = |t: &Option<Tensor>| t.iter().cloned().collect::<Vec<_>>();
            let qkv_bias = optional("qkv bias", l.qkv_bias.clone(), stored)?;
            let norm_type = l.head_norms.first().map_or(stored, Tensor::dtype);
            let head_norms = optional("head norms", l.head_norms.clone(), norm_type)?;
            let o_bias = optional("o bias", bias(&l.o_bias), stored)?;
            let down_bias = optional("down bias", bias(&l.down_bias), stored)?;
            let gate_bias = optional("gate bias", bias(&l.gate_bias), stored)?;
            let up_bias = optional("up bias", bias(&l.up_bias), stored)?;
            all.push(Layer {
                input_norm,
                qkv,
                qkv_bias,
                head_norms,
                attention: kinds.iter().position(|k| *k == kind).unwrap_or(0),
                o: self.matrix(name("o"), one(&l.o))?,
                o_bias,
                post_norm,
                gate: l.gate.as_ref().map(|t| self.matrix(name("gate"), one(t))).transpose()?,
                up: self.matrix(name("up"), one(&l.up))?,
                gate_bias,
                up_bias,
                down: self.matrix(name("down"), one(&l.down))?,
                down_bias,
                keys: self.memory(name("keys"), &cache, stored)?,
                values: self.memory(name("values"), &cache, stored)?,
            });
        }
        Ok(all)
    }

    /// Cosines and sines `[2, positions, width/2]`: of what turns, and of what does not.
    fn tables(&mut self) -> Result<[usize; 2]> {
        let (rows, f) = (self.options.positions, self.decoder.frequencies.clone());
        let shape = [2, rows as usize, f.len()];
        let mut table = |name: &str, of: fn(f64) -> f64, still: f64| {
            let turning = (0..rows).flat_map(|p| f.iter().map(move |f| p as f64 * f)).map(of);
            let mut values: Vec<f64> = turning.collect();
            values.resize(2 * values.len(), still);
            let tensor = Tensor::from_f64s(DType::F32, &shape, &values)?;
            self.weights(name.into(), vec![tensor], DType::F32)
        };
        Ok([table("cosines", f64::cos, 1.0)?, table("sines", f64::sin, 0.0)?])
    }
}

/// Launches under construction.
struct Steps<'a> {
    regions: &'a [Region],
    at: usize,
    positions: i64,
    known: BTreeMap<String, (Arc<Program>, String)>,
    out: Vec<DecodeStep>,
}

impl Steps<'_> {
    /// Adds a launch; kernels of one label are the same.
    fn launch(
        &mut self,
        label: &str,
        make: &dyn Fn() -> Result<Scheduled>,
        operands: Vec<usize>,
        cache_bytes: i64,
    ) -> Result<()> {
        let (program, schedule) = match self.known.get(label) {
            Some(known) => known.clone(),
            None => {
                let Scheduled { kernel, schedule } = make()?;
                let made = (Arc::new(lower(&kernel, &schedule)?), schedule.to_string());
                self.known.insert(label.into(), made.clone());
                made
            }
        };
        let mut operands = operands;
        let mut sizes = Env::new();
        for symbol in &program.symbols {
            if &*symbol.name != AT {
                return Err(Error::bug(format!("{label} has a size {}", symbol.name)));
            }
            sizes.insert(symbol.name.clone(), self.positions);
            operands.push(self.at);
        }
        let weights = operands.iter().map(|&r| &self.regions[r]).filter(|r| !r.data.is_empty());
        // Of tables only single rows are read.
        let tables = ["cosines", "sines", "positions"];
        let read = weights.filter(|r| !tables.contains(&&*r.name));
        let weight_bytes = match label {
            "embed" => 0,
            _ => read.map(|r| r.bytes as u64).sum(),
        };
        self.out.push(DecodeStep {
            label: label.into(),
            program,
            sizes,
            operands,
            weight_bytes,
            cache_bytes: cache_bytes.unsigned_abs(),
            schedule,
            written: None,
        });
        Ok(())
    }
}

impl DecodePlan {
    /// Plans the steps of a decoder.
    ///
    /// # Errors
    /// The user's for sizes that the model or the machine does not have; our bugs.
    pub fn new(decoder: &Decoder, gpu: &Gpu, options: &DecodeOptions) -> Result<DecodePlan> {
        let (batch, positions) = (options.batch, options.positions);
        if !(1..=streamed::MOST).contains(&batch) {
            return Err(too_many(batch));
        }
        if !(1..=decoder.most_tokens).contains(&positions) {
            return Err(Error::user(format!(
                "sequences of {positions} tokens: the model knows up to {}",
                decoder.most_tokens
            )));
        }
        if decoder.width > 256 || decoder.width % 2 != 0 {
            return Err(Error::unsupported(format!("heads of width {}", decoder.width)));
        }
        let stored = options.stored.unwrap_or(decoder.table.dtype());
        if !matches!(stored, DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::unsupported(format!("a decoder with weights in {stored}")));
        }
        let arch = Arch::of_capability(gpu.capability);
        let sms = i64::from(gpu.sms);
        let mut b = Builder { decoder, options: *options, stored, regions: Vec::new() };
        let chunk_rows = if batch == 1 { MOST_ROWS } else { 0 };
        let most_rows = batch.max(chunk_rows);
        let table = b.weights("embedding".into(), vec![decoder.table.clone()], stored)?;
        let [cos, sin] = b.tables()?;
        let places = decoder.positions.as_ref().map(|t| {
            let rows = t.shape().first().copied().unwrap_or(0);
            b.weights("positions".into(), vec![t.clone()], stored).map(|r| (r, rows as i64))
        });
        let places = places.transpose()?;
        // Kinds of attention: each has a kernel of its own.
        let mut kinds: Vec<(Option<i64>, f64)> = Vec::new();
        for l in &decoder.layers {
            let kind = attention_kind(l, positions);
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        let layers = b.layers(&kinds)?;
        let norm_type = decoder.norm.gain.dtype();
        let norm = b.norm("norm".into(), &decoder.norm)?;
        let head = match &decoder.head {
            None => table,
            Some(head) => b.weights("head".into(), vec![head.clone()], stored)?,
        };
        // One kernel serves all layers.
        let same = |n: &DecoderNorm| {
            let shifted = n.shift.as_ref().map(Tensor::dtype);
            n.gain.dtype() == norm_type && shifted == decoder.centred.then_some(norm_type)
        };
        let heads_type =
            |l: &DecoderLayer| l.head_norms.iter().map(Tensor::dtype).collect::<Vec<_>>();
        let first = decoder.layers.first().map(heads_type).unwrap_or_default();
        let alike = first.windows(2).all(|w| w[0] == w[1]);
        let all_alike = decoder
            .layers
            .iter()
            .all(|l| same(&l.input_norm) && same(&l.post_norm) && heads_type(l) == first);
        if !(same(&decoder.norm) && alike && all_alike) {
            return Err(Error::unsupported("norms of several types in one decoder"));
        }
        let (hidden, heads, kv_heads) = (decoder.hidden, decoder.heads, decoder.kv_heads);
        let (width, inner, vocabulary) = (decoder.width, decoder.inner, decoder.vocabulary);
        let at = b.memory("position", &[1], DType::I32)?;
        let tokens = b.memory("tokens", &[batch], DType::I32)?;
        let chunk_tokens = b.memory("chunk tokens", &[MOST_ROWS], DType::I32)?;
        let history = b.memory("history", &[positions + 1, batch], DType::I32)?;
        let f32s = DType::F32;
        let logits = b.memory("logits", &[batch, vocabulary], f32s)?;
        let knobs = b.memory("knobs", &[4], f32s)?;
        let random = b.memory("random", &[positions + 1, batch], f32s)?;
        let count = (vocabulary + 1023) / 1024;
        let best = b.memory("best", &[batch, count], f32s)?;
        let which = b.memory("which", &[batch, count], DType::I32)?;
        let mut drawing = Vec::new();
        if let Some((top_k, top_p)) = options.draw {
            let draw = Draw { rows: Rows { batch, new: 1, positions }, vocabulary, top_k, top_p };
            for (name, extents) in draw.memory() {
                drawing.push(b.memory(name, &extents, f32s)?);
            }
        }
        let attention = |rows: Rows, kind: usize| AttentionParts {
            rows,
            heads,
            kv_heads,
            width,
            cache: stored,
            scale: kinds[kind].1,
            // Blocks behind the position cost something, too.
            part: if positions <= 2048 { 32 } else { 64 },
            window: kinds[kind].0,
        };
        let parts = attention(Rows { batch: 1, new: 1, positions }, 0).parts();
        let flat = [most_rows, heads, parts];
        let all_lines = (heads + 2 * kv_heads) * width;
        let raw_lines = if first.is_empty() { 1 } else { all_lines };
        let work = Work {
            x: [
                b.memory("x", &[most_rows, hidden], f32s)?,
                b.memory("x2", &[most_rows, hidden], f32s)?,
            ],
            raw: b.memory("heads", &[most_rows, raw_lines], f32s)?,
            q: b.memory("q", &[most_rows, heads, width], f32s)?,
            parts: [
                b.memory("parts", &[most_rows, heads, parts, width], f32s)?,
                b.memory("maxima", &flat, f32s)?,
                b.memory("sums", &flat, f32s)?,
            ],
            mixed: b.memory("mixed", &[most_rows, heads, width], f32s)?,
            inner: b.memory("inner", &[most_rows, inner], f32s)?,
        };
        let mut streamed = match norm.first() {
            None => None,
            Some(&gain) => {
                let known = Known {
                    layers: &layers,
                    table,
                    head,
                    norm: gain,
                    tables: [cos, sin],
                    at,
                    tokens,
                    x: work.x[0],
                    q: work.q,
                    logits,
                };
                let mut memory =
                    |name: &str, count: i64, dtype: DType| b.memory(name, &[count], dtype);
                let types = (stored, norm_type);
                Streamed::of(decoder, gpu, (batch, positions), types, &known, &mut memory)?
            }
        };
        if streamed.is_none() && batch > MOST_ROWS {
            return Err(too_many(batch));
        }
        let Builder { regions, .. } = b;

        let act = activation(&decoder.act)?;
        let eps = decoder.eps;
        let norm_kind = Norm { dtype: norm_type, eps, centred: decoder.centred };
        let body = |steps: &mut Steps<'_>, rows: Rows| -> Result<()> {
            let product =
                |name: &str, (lines, depth): (i64, i64), norm: bool, bias: bool, ending| {
                    VectorProduct {
                        name: format!("decode_{name}"),
                        rows,
                        lines,
                        depth,
                        weight: stored,
                        norm: norm.then_some(norm_kind),
                        bias,
                        ending,
                    }
                };
            for l in &layers {
                let own_norms = l.head_norms.is_some();
                let ending = match own_norms {
                    true => Ending::Plain { residual: false },
                    false => Ending::Rotary { heads, kv_heads, width },
                };
                let biased = l.qkv_bias.is_some();
                let qkv = product("qkv", (all_lines, hidden), true, biased, ending);
                let to = [cos, sin, work.q, l.keys, l.values];
                let mut operands = vec![work.x[0]];
                operands.extend(&l.input_norm);
                operands.push(l.qkv);
                operands.extend(l.qkv_bias);
                match own_norms {
                    true => operands.push(work.raw),
                    false => operands.extend(to),
                }
                steps.launch("qkv", &|| qkv.scheduled(arch, sms), operands, 0)?;
                if let (Some(gains), Some(&dtype)) = (l.head_norms, first.first()) {
                    let operands = [[work.raw, gains].as_slice(), &to].concat();
                    let sizes = (heads, kv_heads, width);
                    let make = || head_norms(rows, sizes, (dtype, eps), stored, arch);
                    steps.launch("heads", &make, operands, 0)?;
                }
                let attention = attention(rows, l.attention);
                let label = |name: &str| match l.attention {
                    0 => name.to_string(),
                    other => format!("{name}_{other}"),
                };
                let cache = 2 * batch * kv_heads * width * stored.size() as i64;
                let [p, m, s] = work.parts;
                let operands = vec![work.q, l.keys, l.values, p, m, s];
                steps.launch(&label("attention"), &|| attention.partial(arch), operands, cache)?;
                if let Some(step) = steps.out.last_mut() {
                    step.written = attend(&attention, gpu, &step.operands, work.mixed)?;
                }
                let operands = vec![p, m, s, work.mixed];
                steps.launch(&label("combine"), &|| attention.combine(arch), operands, 0)?;
                let residual = Ending::Plain { residual: true };
                let bias = l.o_bias.is_some();
                let o = product("o", (hidden, heads * width), false, bias, residual.clone());
                let mut operands = vec![work.mixed, l.o];
                operands.extend(l.o_bias);
                operands.extend([work.x[0], work.x[1]]);
                steps.launch("o", &|| o.scheduled(arch, sms), operands, 0)?;
                let (name, ending, bias) = match l.gate {
                    Some(_) => ("gate_up", Ending::Gated(act.clone()), l.gate_bias.is_some()),
                    None => ("up", Ending::Activated(act.clone()), l.up_bias.is_some()),
                };
                let inwards = product(name, (inner, hidden), true, bias, ending);
                let mut operands = vec![work.x[1]];
                operands.extend(&l.post_norm);
                operands.extend(l.gate);
                operands.push(l.up);
                operands.extend(l.gate_bias);
                operands.extend(l.up_bias);
                operands.push(work.inner);
                steps.launch(name, &|| inwards.scheduled(arch, sms), operands, 0)?;
                let bias = l.down_bias.is_some();
                let down = product("down", (hidden, inner), false, bias, residual);
                let mut operands = vec![work.inner, l.down];
                operands.extend(l.down_bias);
                operands.extend([work.x[1], work.x[0]]);
                steps.launch("down", &|| down.scheduled(arch, sms), operands, 0)?;
            }
            Ok(())
        };
        let begin =
            || Steps { regions: &regions, at, positions, known: BTreeMap::new(), out: Vec::new() };
        let embedding = |rows: Rows| {
            let places = places.map(|(_, n)| n);
            move || embed(&rows, [vocabulary, hidden], places, stored, arch)
        };
        let embedded = |from: usize| {
            let places = places.map(|(region, _)| region);
            [vec![from, table], places.into_iter().collect(), vec![work.x[0]]].concat()
        };

        let rows = Rows { batch, new: 1, positions };
        let mut steps = begin();
        steps.launch("embed", &embedding(rows), embedded(tokens), 0)?;
        body(&mut steps, rows)?;
        let last = VectorProduct {
            name: "decode_head".into(),
            rows,
            lines: vocabulary,
            depth: hidden,
            weight: stored,
            norm: Some(norm_kind),
            bias: false,
            ending: Ending::Plain { residual: false },
        };
        let operands = [vec![work.x[0]], norm, vec![head, logits]].concat();
        steps.launch("head", &|| last.scheduled(arch, sms), operands, 0)?;
        if let Some(streamed) = &mut streamed {
            streamed.instead_of = steps.out.len();
        }
        match options.draw {
            None => {
                let make = || pieces(batch, vocabulary, arch);
                steps.launch("pieces", &make, vec![logits, best, which], 0)?;
                let operands = vec![best, which, tokens, history];
                steps.launch("pick", &|| pick(&rows, vocabulary, arch), operands, 0)?;
            }
            Some((top_k, top_p)) => {
                let draw = Draw { rows, vocabulary, top_k, top_p };
                for DrawStep { label, make, operands } in draw.steps() {
                    let region = |place: DrawPlace| match place {
                        DrawPlace::Logits => logits,
                        DrawPlace::Knobs => knobs,
                        DrawPlace::Random => random,
                        DrawPlace::Tokens => tokens,
                        DrawPlace::History => history,
                        DrawPlace::Own(i) => drawing[i],
                    };
                    let operands = operands.into_iter().map(region).collect();
                    steps.launch(label, &|| make(&draw, arch), operands, 0)?;
                }
            }
        }
        steps.launch("advance", &|| advance(1, arch), vec![at], 0)?;
        let token = steps.out;

        let mut steps = begin();
        if chunk_rows > 0 {
            let rows = Rows { batch: 1, new: chunk_rows, positions };
            steps.launch("embed", &embedding(rows), embedded(chunk_tokens), 0)?;
            body(&mut steps, rows)?;
            steps.launch("advance", &|| advance(chunk_rows, arch), vec![at], 0)?;
        }
        let chunk = steps.out;
        let kept = keep(&rows, kv_heads, width, stored, arch);
        Ok(DecodePlan {
            batch,
            positions,
            vocabulary,
            chunk_rows,
            regions,
            token,
            chunk,
            prompt: None,
            streamed,
            caches: layers.iter().map(|l| [l.keys, l.values]).collect(),
            keep: lower(&kept.kernel, &kept.schedule)?,
            at,
            tokens,
            chunk_tokens,
            history,
            logits,
            knobs,
            random,
        })
    }

    /// Gives up [`Self::streamed`].
    ///
    /// # Errors
    /// Unsupported for more sequences than the other launches take.
    pub fn in_launches(&mut self) -> Result<()> {
        if self.batch > MOST_ROWS {
            return Err(Error::unsupported(format!(
                "{} sequences in such launches: they take 1 to {MOST_ROWS}",
                self.batch
            )));
        }
        self.streamed = None;
        Ok(())
    }

    /// Bytes of weights, and of the memory that steps change.
    pub fn bytes(&self) -> (usize, usize) {
        let of = |weights: bool| {
            let chosen = self.regions.iter().filter(|r| r.data.is_empty() != weights);
            chosen.map(|r| r.bytes.next_multiple_of(256)).sum()
        };
        (of(true), of(false))
    }

    /// Bytes that a step with `positions` in the cache reads at least: weights, and the valid part of the cache.
    pub fn step_bytes(&self, positions: i64) -> u64 {
        self.token.iter().map(|s| s.weight_bytes + s.cache_bytes * positions.unsigned_abs()).sum()
    }
}
