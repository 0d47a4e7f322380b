//! Text generation: tokens in, tokens out, one at a time, with a cache of keys and values.
//!
//! On a CPU the model's graph makes keys and values of earlier tokens longer, in memory that the session keeps; tokens are
//! chosen on the host. On a GPU everything stays on the device ([`GpuGenerator`]). Both choose tokens by the
//! same rule from the same random numbers ([`choose`], [`random_numbers`]).

use crate::gpu::{GpuCompiler, GpuDevice};
use crate::verify::{Report, deviation};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_import::hf::{self, LoadOptions};
use tilewright_interp::{Mode, Options, philox4x32_10, run_with};
#[cfg(feature = "cpu")]
use tilewright_layout::{Env, Range, Symbol};
use tilewright_plan::Decoder;
use tilewright_runtime_gpu::decode::{
    DecodeMachine, DecodeOptions, DecodePlan, Decoding, DeviceDecoder, HostDecoder, PromptPlan,
};
use tilewright_target::Gpu as Machine;

pub use tilewright_import::hf::MatrixForm;
pub use tilewright_runtime_gpu::decode::Sampling;

/// What is to be generated.
#[derive(Clone, Debug)]
pub struct Request {
    /// Tokens to continue, one list per sequence, all of one length.
    pub prompts: Vec<Vec<i64>>,
    /// New tokens per sequence at most.
    pub count: usize,
    /// How tokens are drawn; the likeliest is taken when it is none.
    pub sampling: Option<Sampling>,
    /// Seed of the random numbers.
    pub seed: u64,
    /// A sequence is complete with one of these.
    pub ends: Vec<i64>,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generated {
    /// New tokens of each sequence, the one that completes it among them.
    pub tokens: Vec<Vec<i64>>,
    /// Time until the first new token.
    pub prompt: Duration,
    /// Time of all others.
    pub rest: Duration,
    /// Steps in that time.
    pub steps: usize,
}

/// Uniform numbers in [0, 1): Philox4x32-10 with this key, number `i` from counter `i`.
pub fn random_numbers(seed: u64, count: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let number = |i: u64| {
        let bits = philox4x32_10([i as u32, (i >> 32) as u32, 0, 0], key)[0];
        (bits >> 8) as f32 / (1u32 << 24) as f32
    };
    (0..count as u64).map(number).collect()
}

/// The token that a random number in [0, 1) means: `top_k` and then `top_p` leave the likeliest tokens (and those that are
/// as likely as the last of them); among what is left, in the order of the vocabulary, the first at which the running sum
/// of probabilities exceeds the number.
pub fn choose(logits: &[f64], sampling: Option<&Sampling>, random: f64) -> usize {
    let best = |a: usize, b: usize| if logits[b] > logits[a] { b } else { a };
    let most = (0..logits.len()).reduce(best).unwrap_or(0);
    let Some(s) = sampling else { return most };
    let weight = |i: usize| ((logits[i] - logits[most]) / s.temperature).exp();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if let Some(k) = s.top_k {
        let last = usize::try_from(k).unwrap_or(1).clamp(1, order.len().max(1)) - 1;
        let least = logits[order[last]];
        order.retain(|&i| logits[i] >= least);
    }
    if let Some(p) = s.top_p {
        let all: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut sum = 0.0;
        let mut least = f64::NEG_INFINITY;
        for &i in &order {
            sum += weight(i);
            least = logits[i];
            if sum >= p * all {
                break;
            }
        }
        order.retain(|&i| logits[i] >= least);
    }
    order.sort_unstable();
    let all: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut sum = 0.0;
    for &i in &order {
        sum += weight(i);
        if sum > random * all {
            return i;
        }
    }
    most
}

/// The tokens that end a sequence, as `generation_config.json` or `config.json` have them.
pub fn end_tokens(dir: &Path) -> Vec<i64> {
    for name in ["generation_config.json", "config.json"] {
        let Ok(text) = std::fs::read_to_string(dir.join(name)) else { continue };
        let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else { continue };
        match json.get("eos_token_id") {
            Some(serde_json::Value::Array(all)) => {
                return all.iter().filter_map(serde_json::Value::as_i64).collect();
            }
            Some(one) if one.as_i64().is_some() => return one.as_i64().into_iter().collect(),
            _ => {}
        }
    }
    Vec::new()
}

/// Generation on a CPU: one plan for every length, whose session keeps keys and values in memory for the longest.
#[cfg(feature = "cpu")]
pub struct CpuGenerator {
    session: tilewright_runtime::Session,
    max_tokens: usize,
    vocabulary: usize,
    /// Bytes of weights that a step reads.
    weight_bytes: f64,
    /// What a second's reading gives, and whether that was measured.
    bytes_per_s: (f64, bool),
}

/// The symbol for the number of positions that there is memory for.
#[cfg(feature = "cpu")]
const CAPACITY: &str = "capacity";

#[cfg(feature = "cpu")]
impl CpuGenerator {
    /// Compiles a step of the model in a directory. Sequences have up to `max_length` tokens; `matrices` says in which
    /// form weights are kept.
    ///
    /// # Errors
    /// The importer's and the compiler's.
    pub fn open(
        dir: &Path,
        compiler: &crate::Compiler,
        max_length: i64,
        matrices: MatrixForm,
        random_weights: Option<u64>,
    ) -> Result<CpuGenerator> {
        let options = LoadOptions {
            cache: true,
            matrices,
            random_weights,
            max_tokens: max_length,
            ..LoadOptions::default()
        };
        let model = hf::load_model(dir, &options)?;
        if model.task != hf::Task::CausalLanguage {
            return Err(Error::unsupported("generation with a model that gives no logits"));
        }
        let (max_tokens, vocabulary) = (model.max_tokens, model.summary.vocabulary);
        let mut graph = model.graph;
        let range = Range { min: 1, max: max_tokens };
        graph.symbols.push(Symbol { name: CAPACITY.into(), range });
        let mut compiler = compiler.clone();
        compiler.states = Some(CAPACITY.into());
        let compiled = compiler.compile_graph(graph)?;
        if compiled.plan().inputs.len() != 1 || compiled.plan().outputs.len() != 1 {
            return Err(Error::bug(
                "a step that takes more than tokens, or gives more than logits",
            ));
        }
        let ceilings = &compiled.cpu().ceilings;
        Ok(CpuGenerator {
            weight_bytes: weight_bytes(compiled.plan()),
            bytes_per_s: (ceilings.memory_read_bytes_per_s, ceilings.measured),
            session: compiled.session()?,
            max_tokens: usize::try_from(max_tokens).unwrap_or(0),
            vocabulary: usize::try_from(vocabulary).unwrap_or(0),
        })
    }

    /// What a step with one more token for each of `batch` sequences must read: the weights, and keys and values of
    /// `position` tokens. Bytes; and the bytes that this machine reads in a second, measured or guessed.
    pub fn step_bytes(&self, batch: usize, position: usize) -> StepBytes {
        let env = self.sizes(batch, 1, position.saturating_sub(1));
        let states = &self.session.executable().plan().states;
        let kept = states.iter().map(|s| {
            let elements = tilewright_layout::numel(&s.valid).eval(&env).unwrap_or(0);
            elements as f64 * s.dtype.size() as f64
        });
        let (bytes_per_s, measured) = self.bytes_per_s;
        StepBytes { bytes: self.weight_bytes + kept.sum::<f64>(), bytes_per_s, measured }
    }

    fn sizes(&self, batch: usize, width: usize, past: usize) -> Env {
        let sizes = [("B", batch), ("S", width), ("P", past), (CAPACITY, self.max_tokens)];
        sizes.into_iter().map(|(n, v)| (n.into(), i64::try_from(v).unwrap_or(i64::MAX))).collect()
    }

    /// Forgets everything, and makes memory for so many sequences.
    fn start(&mut self, batch: usize) -> Result<()> {
        let sizes = self.sizes(batch, 1, 0);
        self.session.make_states(&sizes)
    }

    /// The logits `[batch, 1, vocabulary]` behind these tokens `[batch, width]`, of which `past` came before.
    fn step(&mut self, tokens: &[i64], batch: usize, past: usize) -> Result<Tensor> {
        let width = tokens.len() / batch.max(1);
        let ids = Tensor::from_i64s(DType::I64, &[batch, width], tokens)?;
        let mut logits = [Tensor::zeros(DType::F32, [batch, 1, self.vocabulary])?];
        let sizes = self.sizes(batch, width, past);
        self.session.run_sized(&sizes, &[ids], &mut logits, None)?;
        let [logits] = logits;
        Ok(logits)
    }

    /// Checks that there are tokens, all known, and not too many.
    fn check(&self, prompts: &[Vec<i64>], count: usize) -> Result<usize> {
        let length = prompts.first().map_or(0, Vec::len);
        if length == 0 || prompts.iter().any(|p| p.len() != length) {
            return Err(Error::unsupported("empty prompts, or prompts of different lengths"));
        }
        let most = length + count.saturating_sub(1);
        if most > self.max_tokens {
            let all = self.max_tokens;
            let message = format!("{most} tokens, and sequences may have up to {all}");
            return Err(Error::user(message).with_hint("--max-length sets it"));
        }
        let unknown = |t: &i64| usize::try_from(*t).map_or(true, |t| t >= self.vocabulary);
        if let Some(t) = prompts.iter().flatten().find(|t| unknown(t)) {
            let all = self.vocabulary;
            return Err(Error::user(format!("token {t} is not one of the {all} of the model")));
        }
        Ok(length)
    }

    /// Generates.
    ///
    /// # Errors
    /// The user's about the prompts.
    pub fn generate(&mut self, request: &Request) -> Result<Generated> {
        let batch = request.prompts.len();
        let length = self.check(&request.prompts, request.count)?;
        let random = random_numbers(request.seed, (self.max_tokens + 1) * batch);
        let mut new: Vec<i64> = request.prompts.concat();
        let mut tokens: Vec<Vec<i64>> = vec![Vec::new(); batch];
        self.start(batch)?;
        let (begin, mut prompt, mut steps) = (Instant::now(), Duration::ZERO, 0);
        let (mut position, mut past) = (length, 0);
        while tokens[0].len() < request.count {
            let logits = self.step(&new, batch, past)?.to_f64s();
            past = position;
            new = logits
                .chunks(self.vocabulary)
                .enumerate()
                .map(|(b, logits)| {
                    let u = f64::from(random[position * batch + b]);
                    choose(logits, request.sampling.as_ref(), u) as i64
                })
                .collect();
            tokens.iter_mut().zip(&new).for_each(|(all, t)| all.push(*t));
            if steps == 0 {
                prompt = begin.elapsed();
            }
            (position, steps) = (position + 1, steps + 1);
            let ended = |s: &Vec<i64>| s.iter().any(|t| request.ends.contains(t));
            if tokens.iter().all(ended) {
                break;
            }
        }
        for tokens in &mut tokens {
            if let Some(end) = tokens.iter().position(|t| request.ends.contains(t)) {
                tokens.truncate(end + 1);
            }
        }
        let rest = begin.elapsed() - prompt;
        Ok(Generated { tokens, prompt, rest, steps: steps.max(1) - 1 })
    }

    /// Compares the logits of every position of these sequences, taken token by token with the cache, with those of the
    /// whole model in float64 without one, whose matrices have the same form: rounding them to few bits is not counted.
    ///
    /// # Errors
    /// The user's about the sequences.
    pub fn verify(
        &mut self,
        sequences: &[Vec<i64>],
        dir: &Path,
        matrices: MatrixForm,
        random_weights: Option<u64>,
    ) -> Result<Report> {
        let length = self.check(sequences, 1)?;
        let options = LoadOptions { matrices, random_weights, ..LoadOptions::default() };
        let graph = hf::load_model(dir, &options)?.graph;
        let batch = sequences.len();
        let inputs = [
            Tensor::from_i64s(DType::I64, &[batch, length], &sequences.concat())?,
            Tensor::from_i64s(DType::I64, &[batch, length], &vec![1; batch * length])?,
        ];
        let wide = run_with(&graph, &inputs, &Options::new(Mode::F64))?;
        let plain = run_with(&graph, &inputs, &Options::new(Mode::Exact))?;
        let mut report = Report { outputs: Vec::new(), kernels: Vec::new() };
        self.start(batch)?;
        for at in 0..length {
            let tokens: Vec<i64> = sequences.iter().map(|s| s[at]).collect();
            let got = self.step(&tokens, batch, at)?.reshaped(vec![batch, self.vocabulary])?;
            let [wide, plain] = [&wide, &plain].map(|run| position(&run.outputs[0], at));
            let name = format!("logits of position {at}");
            report.outputs.push(deviation(name, &got, &wide?, &plain?, 0.0)?);
        }
        Ok(report)
    }
}

/// What a step must read, and how fast this machine reads.
#[derive(Clone, Copy, Debug)]
pub struct StepBytes {
    /// Bytes.
    pub bytes: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Whether that was measured (`tw machine`), or is a guess.
    pub measured: bool,
}

/// Bytes of the constants that a plan's kernels read whole: tables of which rows are picked do not count.
#[cfg(feature = "cpu")]
fn weight_bytes(plan: &tilewright_plan::Plan) -> f64 {
    use std::collections::BTreeSet;
    use tilewright_plan::{Step, Storage};
    let mut read = BTreeSet::new();
    for step in &plan.steps {
        let Step::Launch { kernel, args, .. } = step else { continue };
        let kernel = &plan.kernels[*kernel].kernel;
        let mut loaded = BTreeSet::new();
        loads(&kernel.body, &mut loaded);
        let ids = kernel.params.ids().zip(args).filter(|(p, _)| loaded.contains(p));
        read.extend(ids.map(|(_, b)| *b));
    }
    let bytes = |b: &tilewright_plan::BufferId| {
        let buffer = &plan.buffers[*b];
        let constant = matches!(buffer.storage, Storage::Const(_));
        let elements = buffer.layout.alloc_elements().as_const().filter(|_| constant);
        elements.unwrap_or(0) as f64 * f64::from(buffer.dtype.bits()) / 8.0
    };
    read.iter().map(bytes).sum()
}

/// The parameters that a block loads, other than by picking rows.
#[cfg(feature = "cpu")]
fn loads(
    block: &tilewright_tile::Block,
    found: &mut std::collections::BTreeSet<tilewright_tile::ParamId>,
) {
    use tilewright_tile::{Stmt, TileOp};
    for stmt in &block.stmts {
        match stmt {
            Stmt::Let(_, TileOp::Load { param, .. }) => _ = found.insert(*param),
            Stmt::For(f) => loads(&f.body, found),
            Stmt::If(i) => [&i.then, &i.otherwise].into_iter().for_each(|b| loads(b, found)),
            _ => {}
        }
    }
}

/// How a decoder is made ready for a GPU.
#[derive(Clone, Copy, Debug)]
pub struct GpuGeneratorOptions {
    /// Sequences, 1 to 8.
    pub batch: i64,
    /// The longest sequence.
    pub max_length: i64,
    /// The type in which matrices and cache are stored; that of the files when it is none.
    pub stored: Option<DType>,
    /// Whether tokens are drawn, and with which limits.
    pub sampling: Option<Sampling>,
    /// Random weights instead of files.
    pub random_weights: Option<u64>,
}

/// A decoder planned for a GPU; no GPU is needed for that.
pub struct GpuGeneratorPlan {
    plan: Arc<DecodePlan>,
    machine: Machine,
}

impl GpuGeneratorPlan {
    /// Plans the model in a directory.
    ///
    /// # Errors
    /// The importer's; unsupported for what is no decoder of the kinds of GPT-2 and Llama.
    pub fn open(dir: &Path, machine: Machine, options: &GpuGeneratorOptions) -> Result<Self> {
        let load = LoadOptions {
            max_tokens: i64::from(i32::MAX / 2),
            random_weights: options.random_weights,
            ..LoadOptions::default()
        };
        let (decoder, prompt): (Decoder, _) =
            hf::load_decoder_and_prompt(dir, &load, options.max_length)?;
        let limits = |s: Sampling| (s.top_k.is_some(), s.top_p.is_some());
        let options = DecodeOptions {
            batch: options.batch,
            positions: options.max_length.min(decoder.most_tokens),
            stored: options.stored,
            draw: options.sampling.map(limits),
        };
        let mut plan = DecodePlan::new(&decoder, &machine, &options)?;
        let same = options.stored.is_none_or(|t| t == decoder.table.dtype());
        if let Some(graph) = prompt.filter(|_| same) {
            let compiler = GpuCompiler::new(machine.clone());
            let planned = compiler.plan(graph)?.plan().clone();
            plan.prompt = Some(PromptPlan { plan: planned, machine: machine.clone() });
        }
        let plan = Arc::new(plan);
        Ok(GpuGeneratorPlan { plan, machine })
    }

    /// The same with a launch for every part of a step, where one could do most of it.
    ///
    /// # Errors
    /// Unsupported for more sequences than such launches take.
    pub fn in_launches(mut self) -> Result<Self> {
        if let Some(plan) = Arc::get_mut(&mut self.plan) {
            plan.in_launches()?;
        }
        Ok(self)
    }

    /// The plan.
    pub fn plan(&self) -> &DecodePlan {
        &self.plan
    }

    /// In the device interpreter.
    ///
    /// # Errors
    /// When weights cannot be rounded.
    pub fn interpreted(&self) -> Result<GpuGenerator<HostDecoder>> {
        let machine = HostDecoder::new(self.plan.clone())?;
        let decoding = Decoding::new(self.plan.clone(), machine);
        Ok(GpuGenerator { decoding, machine: self.machine.clone() })
    }

    /// On a device.
    ///
    /// # Errors
    /// When its memory does not suffice; the compiler's and the driver's.
    pub fn load(&self, device: &GpuDevice, graphs: bool) -> Result<GpuGenerator<DeviceDecoder>> {
        let loader = device.loader().clone();
        let machine = DeviceDecoder::new(self.plan.clone(), loader, graphs)?;
        let decoding = Decoding::new(self.plan.clone(), machine);
        Ok(GpuGenerator { decoding, machine: self.machine.clone() })
    }
}

/// Generation with device programs.
pub struct GpuGenerator<M> {
    decoding: Decoding<M>,
    machine: Machine,
}

impl<M: DecodeMachine> GpuGenerator<M> {
    /// The generation under way.
    pub fn decoding(&mut self) -> &mut Decoding<M> {
        &mut self.decoding
    }

    /// The device as data.
    pub fn device(&self) -> &Machine {
        &self.machine
    }

    /// Generates.
    ///
    /// # Errors
    /// The user's about the prompts; the device's.
    pub fn generate(&mut self, request: &Request) -> Result<Generated> {
        let plan = self.decoding.plan();
        let numbers = (plan.positions + 1) * plan.batch;
        let random = match request.sampling {
            Some(_) => random_numbers(request.seed, usize::try_from(numbers).unwrap_or(0)),
            None => Vec::new(),
        };
        let begin = Instant::now();
        self.decoding.start(request.sampling.as_ref(), &random)?;
        self.decoding.prompt(&request.prompts)?;
        let at = self.decoding.position();
        // Reading waits for the device.
        self.decoding.chosen(at)?;
        let prompt = begin.elapsed();
        let tokens = self.decoding.generate(request.count, &request.ends)?;
        let rest = begin.elapsed() - prompt;
        let steps = usize::try_from(self.decoding.position() - at).unwrap_or(0);
        Ok(Generated { tokens, prompt, rest, steps })
    }

    /// Compares the logits of every position of these sequences, taken token by token with the cache, with those of the
    /// whole model without one, whose own error in the type of the weights is the measure; and those behind the whole
    /// sequences, taken as prompts are, in chunks and (where they are long enough) at once.
    ///
    /// # Errors
    /// The user's about the sequences; the device's.
    pub fn verify(
        &mut self,
        sequences: &[Vec<i64>],
        dir: &Path,
        random_weights: Option<u64>,
    ) -> Result<Report> {
        let length = sequences.first().map_or(0, Vec::len);
        let stored = self.decoding.plan().regions.first().map_or(DType::F32, |r| r.dtype);
        let load = |compute| {
            let options = LoadOptions { compute, random_weights, ..LoadOptions::default() };
            hf::load_model(dir, &options).map(|m| m.graph)
        };
        let shape = [sequences.len(), length];
        let inputs = [
            Tensor::from_i64s(DType::I64, &shape, &sequences.concat())?,
            Tensor::from_i64s(DType::I64, &shape, &vec![1; sequences.len() * length])?,
        ];
        let wide = run_with(&load(DType::F32)?, &inputs, &Options::new(Mode::F64))?;
        let plain = run_with(&load(stored)?, &inputs, &Options::new(Mode::Exact))?;
        let mut report = Report { outputs: Vec::new(), kernels: Vec::new() };
        self.decoding.start(None, &[])?;
        for at in 0..length {
            let tokens: Vec<Vec<i64>> = sequences.iter().map(|s| vec![s[at]]).collect();
            self.decoding.prompt(&tokens)?;
            let got = self.decoding.logits()?;
            let [wide, plain] = [&wide, &plain].map(|run| position(&run.outputs[0], at));
            let name = format!("logits of position {at}");
            report.outputs.push(deviation(name, &got, &wide?, &plain?, 0.0)?);
        }
        if length > 1 {
            let [wide, plain] = [&wide, &plain].map(|run| position(&run.outputs[0], length - 1));
            let (wide, plain) = (wide?, plain?);
            // Short ones never go at once.
            let short = length.min(32);
            for (name, parts) in
                [("in chunks", [0..short, short..length]), ("at once", [0..0, 0..length])]
            {
                self.decoding.start(None, &[])?;
                for part in parts.into_iter().filter(|p| !p.is_empty()) {
                    let tokens: Vec<Vec<i64>> =
                        sequences.iter().map(|s| s[part.clone()].to_vec()).collect();
                    self.decoding.prompt(&tokens)?;
                }
                let got = self.decoding.logits()?;
                let name = format!("logits behind the prompt {name}");
                report.outputs.push(deviation(name, &got, &wide, &plain, 0.0)?);
            }
        }
        Ok(report)
    }
}

/// `[batch, vocabulary]` of `[batch, positions, vocabulary]`.
fn position(logits: &Tensor, at: usize) -> Result<Tensor> {
    let [batch, length, words] = *logits.shape() else {
        return Err(Error::bug("logits have three axes"));
    };
    let all = logits.to_f64s();
    let values: Vec<f64> = (0..batch)
        .flat_map(|b| all[(b * length + at) * words..][..words].iter().copied())
        .collect();
    Tensor::from_f64s(DType::F64, &[batch, words], &values)
}

/// The launches of one label in a step.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LaunchReport {
    /// What they do.
    pub label: String,
    /// How many there are.
    pub count: usize,
    /// Time of all of them, launched one after another, in microseconds.
    pub time_us: f64,
    /// Bytes that they must read: weights, and the valid part of the cache.
    pub bytes: f64,
    /// Their schedule.
    pub schedule: String,
}

/// What a step with the next token costs.
#[derive(Clone, Debug, serde::Serialize)]
pub struct StepReport {
    /// The device.
    pub gpu: String,
    /// Positions in the cache.
    pub position: i64,
    /// Sequences.
    pub batch: i64,
    /// Launches, by label in the order of their first.
    pub launches: Vec<LaunchReport>,
    /// Median time of a step, in microseconds.
    pub step_us: f64,
    /// Bytes that a step must read.
    pub bytes: f64,
    /// Time in which the device reads as many, in microseconds: at the rate of a copy.
    pub floor_us: f64,
    /// Bytes of weights and of the rest on the device.
    pub memory_bytes: [usize; 2],
}

impl GpuGenerator<DeviceDecoder> {
    /// Takes the prompts and times steps after them.
    ///
    /// # Errors
    /// The user's about the prompts; the device's.
    pub fn explain(&mut self, prompts: &[Vec<i64>], runs: usize) -> Result<StepReport> {
        let plan = self.decoding.plan();
        let numbers = usize::try_from((plan.positions + 1) * plan.batch).unwrap_or(0);
        let drawn = plan.token.iter().any(|s| s.label == "draw");
        let sampling = Sampling { temperature: 1.0, top_k: Some(50), top_p: Some(0.9) };
        let random = if drawn { random_numbers(0, numbers) } else { Vec::new() };
        self.decoding.start(drawn.then_some(&sampling), &random)?;
        self.decoding.prompt(prompts)?;
        let position = self.decoding.position();
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied().unwrap_or(0.0)
        };
        let room = self.decoding.plan().positions - position;
        let in_a_row = usize::try_from(room.min(8)).unwrap_or(1).max(1);
        // Every run begins at the same position.
        let (mut whole, mut each) = (Vec::new(), Vec::new());
        for _ in 0..runs.max(3) {
            self.decoding.move_to(position)?;
            self.decoding.steps(1)?;
            self.decoding.move_to(position)?;
            // Several in a row, as in generation: the start of the first does not count for all.
            let begin = self.decoding.machine().stream().record()?;
            self.decoding.steps(in_a_row)?;
            let end = self.decoding.machine().stream().record()?;
            end.synchronize()?;
            whole.push(end.since_us(&begin)? / in_a_row as f64);
            // Two steps: one that keeps the device busy, and the one that is timed.
            self.decoding.move_to((position - 1).max(0))?;
            each.push(self.decoding.machine().launch_times_us()?);
        }
        self.decoding.move_to(position)?;
        let (weights, state) = self.decoding.machine().bytes();
        let steps = self.decoding.machine().launches();
        let plan = self.decoding.plan();
        let mut launches: Vec<LaunchReport> = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            let time_us = median(each.iter().map(|t| t[i]).collect());
            let bytes = (step.weight_bytes + step.cache_bytes * position.unsigned_abs()) as f64;
            match launches.iter_mut().find(|l| l.label == step.label) {
                Some(known) => {
                    known.count += 1;
                    known.time_us += time_us;
                    known.bytes += bytes;
                }
                None => launches.push(LaunchReport {
                    label: step.label.clone(),
                    count: 1,
                    time_us,
                    bytes,
                    schedule: step.schedule.clone(),
                }),
            }
        }
        let bytes = plan.step_bytes(position) as f64;
        Ok(StepReport {
            gpu: self.machine.name.clone(),
            position,
            batch: plan.batch,
            launches,
            step_us: median(whole),
            bytes,
            floor_us: bytes / self.machine.copy_bytes_per_s * 1e6,
            memory_bytes: [weights, state],
        })
    }
}

impl StepReport {
    /// A table.
    pub fn text(&self) -> String {
        use crate::explain::bytes_text;
        use std::fmt::Write as _;
        let mut out = String::new();
        let [weights, state] = self.memory_bytes.map(|b| bytes_text(b as f64));
        let launches: usize = self.launches.iter().map(|l| l.count).sum();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{} sequences at position {} on {}: a step takes {:.1} us, {launches} launches\nit must read {}, which takes {:.1} us at the rate of a copy: {:.1}% of it reached\nmemory: weights {weights}, cache and the rest {state}",
            self.batch,
            self.position,
            self.gpu,
            self.step_us,
            bytes_text(self.bytes),
            self.floor_us,
            100.0 * self.floor_us / self.step_us.max(1e-9),
        );
        let _ = writeln!(
            out,
            "{:<10} {:>6} {:>10} {:>10} {:>9} {:>10}  schedule",
            "launch", "count", "us", "us each", "bytes", "GB/s"
        );
        for l in &self.launches {
            let _ = writeln!(
                out,
                "{:<10} {:>6} {:>10.1} {:>10.2} {:>9} {:>10.0}  {}",
                l.label,
                l.count,
                l.time_us,
                l.time_us / l.count.max(1) as f64,
                bytes_text(l.bytes),
                l.bytes / l.time_us.max(1e-9) * 1e-3,
                l.schedule,
            );
        }
        out
    }
}
