//! Hugging Face model directories (`config.json` and safetensors) to graphs.
//!
//! ```text
//! config.json  --Config-->  family (one file each: bert, gpt2, llama, ...)  --Net-->  Graph
//! *.safetensors --Weights--/        asks for weights by name and shape
//! ```
//!
//! Inputs and outputs are named as in transformers: `input_ids`, `attention_mask` and
//! `token_type_ids` are `i64[B,S]`, `pixel_values` is `f32[B,C,H,W]`; outputs are
//! `last_hidden_state`, `pooler_output` or `logits`. Weights stay mapped in their files.
//!
//! Adding a family: a file with a `build` function, a row in `FAMILIES`, a tiny model in
//! `tests/hf/make_models.py`.

mod bert;
mod config;
mod distilbert;
mod gpt2;
mod layers;
mod llama;
mod pooling;
mod quantise;
mod random;
mod roberta;
mod rotary;
pub mod safetensors;
mod vit;
mod weights;

pub use pooling::{Pooling, PoolingMode};

use config::Config;
use layers::Net;
use std::path::Path;
use tilewright_base::{DType, Error, Result, ResultExt};
use tilewright_graph::Graph;
use tilewright_plan::Decoder;
use weights::Weights;

pub use quantise::quantise;

/// How matrices that activations are multiplied with are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatrixForm {
    /// In the type of activations.
    #[default]
    Compute,
    /// As in the files, where that is a float of 16 bits: products widen it.
    Stored,
    /// As integers of this type (`I4` or `I8`), with a bf16 scale for each `group` of the depth.
    Codes {
        /// The type.
        dtype: DType,
        /// Neighbours that share a scale, at least 1.
        group: i64,
        /// Activations are rounded to 8 bits before each product, with a scale for each group, too.
        both: bool,
    },
}

/// How a directory is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The type of activations. Weights stored otherwise are cast in the graph.
    pub compute: DType,
    /// The largest batch, the upper end of `B`.
    pub max_batch: i64,
    /// The longest sequence: `S` ends here or at what the model knows, whichever is less.
    pub max_tokens: i64,
    /// A step of generation: keys and values of `P` earlier tokens come in as `past_key_values.0.key` and so on, all
    /// `[B,heads,P,width]`; those of all tokens go out as `present.0.key`, and `logits` are those of the last position.
    pub cache: bool,
    /// With `cache`: the first step. Nothing comes in beside tokens, and nothing but `present.0.key` and so on goes out.
    pub prompt: bool,
    /// The form of matrices.
    pub matrices: MatrixForm,
    /// No files of weights: random ones of this seed, in the type that the configuration states (or bf16).
    pub random_weights: Option<u64>,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions {
            compute: DType::F32,
            max_batch: 1024,
            max_tokens: 32768,
            cache: false,
            prompt: false,
            matrices: MatrixForm::Compute,
            random_weights: None,
        }
    }
}

/// What a model computes after its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// Hidden states.
    Hidden,
    /// Logits over the vocabulary for each position, both sides seen.
    MaskedLanguage,
    /// Logits over the vocabulary for the next token.
    CausalLanguage,
    /// Logits over labels for a sequence.
    SequenceLabels,
    /// Logits over labels for each token.
    TokenLabels,
    /// Logits over labels for an image.
    ImageLabels,
}

/// The numbers that describe a model, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Width of the hidden states.
    pub hidden: i64,
    /// Layers.
    pub layers: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Words, or 0 for a model of images.
    pub vocabulary: i64,
    /// Number of weights that the model reads.
    pub parameters: u64,
    /// Bytes that they take in their files.
    pub weight_bytes: u64,
}

/// A loaded model.
#[derive(Clone, Debug)]
pub struct HfModel {
    /// The tensor program.
    pub graph: Graph,
    /// `model_type` of the configuration: `bert`.
    pub family: &'static str,
    /// The class in transformers: `BertForMaskedLM`.
    pub architecture: String,
    /// What is computed.
    pub task: Task,
    /// Its size.
    pub summary: Summary,
    /// The most tokens of one sequence: what the model, a sentence encoder's configuration and
    /// the options allow. 0 for a model of images.
    pub max_tokens: i64,
    /// Tensors in the files that the model does not read.
    pub unused: Vec<String>,
    pooling: Result<Option<Pooling>>,
}

impl HfModel {
    /// How a sentence encoder makes one vector of its hidden states; `None` when the directory is
    /// not that of a sentence encoder. An error when it is one of a kind that is not supported.
    pub fn pooling(&self) -> Result<Option<Pooling>> {
        self.pooling.clone()
    }

    /// The model as a sentence encoder: its only output is `sentence_embedding`, `[B,hidden]`.
    pub fn sentence_encoder(&self) -> Result<Graph> {
        let Some(pooling) = self.pooling()? else {
            return Err(Error::user("the directory is not that of a sentence encoder")
                .with_hint("one has modules.json and a pooling configuration"));
        };
        pooling.append(&self.graph)
    }
}

/// A family of models: `model_type`, the classes it is known by, and who builds it.
struct Family {
    model_type: &'static str,
    classes: &'static [(&'static str, Task)],
    build: fn(&mut Config, &mut Net, Task, &LoadOptions) -> Result<Summary>,
}

/// Every family. The first class of each is what a configuration without `architectures` means.
const FAMILIES: &[Family] = &[
    Family {
        model_type: "bert",
        classes: &[
            ("BertModel", Task::Hidden),
            ("BertForMaskedLM", Task::MaskedLanguage),
            ("BertForSequenceClassification", Task::SequenceLabels),
            ("BertForTokenClassification", Task::TokenLabels),
        ],
        build: bert::build,
    },
    Family {
        model_type: "distilbert",
        classes: &[
            ("DistilBertModel", Task::Hidden),
            ("DistilBertForMaskedLM", Task::MaskedLanguage),
            ("DistilBertForSequenceClassification", Task::SequenceLabels),
            ("DistilBertForTokenClassification", Task::TokenLabels),
        ],
        build: distilbert::build,
    },
    Family {
        model_type: "gpt2",
        classes: &[("GPT2Model", Task::Hidden), ("GPT2LMHeadModel", Task::CausalLanguage)],
        build: gpt2::build,
    },
    Family {
        model_type: "llama",
        classes: &[("LlamaModel", Task::Hidden), ("LlamaForCausalLM", Task::CausalLanguage)],
        build: llama::build_llama,
    },
    Family {
        model_type: "mistral",
        classes: &[("MistralModel", Task::Hidden), ("MistralForCausalLM", Task::CausalLanguage)],
        build: llama::build_mistral,
    },
    Family {
        model_type: "qwen2",
        classes: &[("Qwen2Model", Task::Hidden), ("Qwen2ForCausalLM", Task::CausalLanguage)],
        build: llama::build_qwen2,
    },
    Family {
        model_type: "qwen3",
        classes: &[("Qwen3Model", Task::Hidden), ("Qwen3ForCausalLM", Task::CausalLanguage)],
        build: llama::build_qwen3,
    },
    Family {
        model_type: "roberta",
        classes: &[
            ("RobertaModel", Task::Hidden),
            ("RobertaForMaskedLM", Task::MaskedLanguage),
            ("RobertaForSequenceClassification", Task::SequenceLabels),
            ("RobertaForTokenClassification", Task::TokenLabels),
        ],
        build: roberta::build,
    },
    Family {
        model_type: "xlm-roberta",
        classes: &[
            ("XLMRobertaModel", Task::Hidden),
            ("XLMRobertaForMaskedLM", Task::MaskedLanguage),
            ("XLMRobertaForSequenceClassification", Task::SequenceLabels),
            ("XLMRobertaForTokenClassification", Task::TokenLabels),
        ],
        build: roberta::build,
    },
    Family {
        model_type: "vit",
        classes: &[("ViTModel", Task::Hidden), ("ViTForImageClassification", Task::ImageLabels)],
        build: vit::build,
    },
];

/// Loads the graph of a model directory with default options.
pub fn load(dir: &Path) -> Result<Graph> {
    Ok(load_model(dir, &LoadOptions::default())?.graph)
}

/// Loads a model directory.
pub fn load_model(dir: &Path, options: &LoadOptions) -> Result<HfModel> {
    load_dir(dir, options).context(|| format!("loading the model in `{}`", dir.display()))
}

fn load_dir(dir: &Path, options: &LoadOptions) -> Result<HfModel> {
    if !dir.is_dir() {
        return Err(Error::user("it is not a directory")
            .with_hint("a model directory holds config.json and model.safetensors"));
    }
    let config = Config::open(dir)?;
    let encoder_tokens = pooling::most_tokens(dir).unwrap_or(i64::MAX);
    let random = options.random_weights.map(|seed| Weights::random(seed, stated_type(&config)));
    let model = build(config, || random.map_or_else(|| Weights::open(dir), Ok), options)?;
    Ok(HfModel {
        max_tokens: model.max_tokens.min(encoder_tokens),
        pooling: pooling::detect(dir),
        ..model
    })
}

/// The type of the weights that a configuration states.
fn stated_type(config: &Config) -> DType {
    match config.text("dtype").or(config.text("torch_dtype")) {
        Some("float32") => DType::F32,
        Some("float16") => DType::F16,
        _ => DType::BF16,
    }
}

/// Loads a decoder taken apart.
///
/// # Errors
/// The user's about the files; unsupported for what is no decoder of the kinds of GPT-2 and Llama.
pub fn load_decoder(dir: &Path, options: &LoadOptions) -> Result<Decoder> {
    load_parts(dir, options, |_| None).map(|(decoder, _)| decoder)
}

/// The same with the graph of its first step ([`LoadOptions::prompt`]) of up to `most_tokens`, over the same weights and in
/// their type, where that has 16 bits.
///
/// # Errors
/// As [`load_decoder`].
pub fn load_decoder_and_prompt(
    dir: &Path,
    options: &LoadOptions,
    most_tokens: i64,
) -> Result<(Decoder, Option<Graph>)> {
    load_parts(dir, options, |decoder| {
        let compute = decoder.table.dtype();
        // The step has matrices turned, which the graph could not share.
        let small = compute.is_float() && compute.bits() == 16 && !decoder.turned;
        small.then(|| LoadOptions { compute, max_tokens: most_tokens, ..options.clone() })
    })
}

fn load_parts(
    dir: &Path,
    options: &LoadOptions,
    graph_options: impl Fn(&Decoder) -> Option<LoadOptions>,
) -> Result<(Decoder, Option<Graph>)> {
    let load = || {
        let mut config = Config::open(dir)?;
        let (family, _, task) = recognise(&config)?;
        if task != Task::CausalLanguage {
            return Err(Error::unsupported("generation with a model that gives no logits"));
        }
        let mut weights = match options.random_weights {
            Some(seed) => Weights::random(seed, stated_type(&config)),
            None => Weights::open(dir)?,
        };
        let decoder = match family.model_type {
            "gpt2" => gpt2::decoder(&mut config, &mut weights, options)?,
            other => llama::decoder(&mut config, &mut weights, options, other)?,
        };
        let Some(options) = graph_options(&decoder) else { return Ok((decoder, None)) };
        let options = LoadOptions { cache: true, prompt: true, ..options };
        let model = build(Config::open(dir)?, || Ok(weights), &options)?;
        Ok((decoder, Some(model.graph)))
    };
    load().context(|| format!("loading the model in `{}`", dir.display()))
}

/// Loads a model from memory: the text of `config.json` and the bytes of one `model.safetensors`.
/// Such a model is no sentence encoder.
pub fn load_bytes(config: &[u8], weights: &[u8], options: &LoadOptions) -> Result<HfModel> {
    build(Config::parse(config)?, || Weights::of_bytes(weights), options)
}

fn build(
    mut config: Config,
    weights: impl FnOnce() -> Result<Weights>,
    options: &LoadOptions,
) -> Result<HfModel> {
    let limits_ok = options.compute.is_float() && options.max_batch >= 1 && options.max_tokens >= 1;
    if !limits_ok {
        return Err(Error::user(format!(
            "cannot compute in {} with batches up to {} of up to {} tokens",
            options.compute, options.max_batch, options.max_tokens
        )));
    }
    let (family, architecture, task) = recognise(&config)?;
    let mut net = Net::new(&architecture, weights()?, options.compute, options.max_batch);
    net.matrices = options.matrices;
    if options.cache {
        net.with_cache(options.prompt);
    }
    let mut summary = (family.build)(&mut config, &mut net, task, options)?;
    net.check()?;
    if options.cache && !net.remembers() {
        return Err(Error::unsupported(format!(
            "{architecture} generates no text: it keeps no keys and values"
        )));
    }
    let parameters = net.weights.used().map(|t| t.len() as u64).sum();
    let weight_bytes = net.weights.used().map(|t| t.bytes().len() as u64).sum();
    summary = Summary { parameters, weight_bytes, ..summary };
    let own_tokens = if summary.vocabulary > 0 { net.most_tokens() } else { 0 };
    Ok(HfModel {
        family: family.model_type,
        architecture,
        task,
        summary,
        max_tokens: own_tokens,
        unused: net.weights.unused(),
        pooling: Ok(None),
        graph: net.b.finish(),
    })
}

/// Finds the family by the class in `architectures`, or by `model_type`.
fn recognise(config: &Config) -> Result<(&'static Family, String, Task)> {
    let class = config.get("architectures").and_then(|a| a.get(0)).and_then(|a| a.as_str());
    let model_type = config.text("model_type");
    if let Some(class) = class {
        for family in FAMILIES {
            if let Some((_, task)) = family.classes.iter().find(|(name, _)| *name == class) {
                return Ok((family, class.to_string(), *task));
            }
        }
    } else if let Some(model_type) = model_type
        && let Some(family) = FAMILIES.iter().find(|f| f.model_type == model_type)
        && let Some((class, task)) = family.classes.first()
    {
        return Ok((family, (*class).to_string(), *task));
    }
    let known: Vec<&str> =
        FAMILIES.iter().flat_map(|f| f.classes.iter().map(|(name, _)| *name)).collect();
    let hint = format!("supported are {}", known.join(", "));
    Err(match class.or(model_type) {
        Some(name) => Error::unsupported(format!("the architecture `{name}` is not supported")),
        None => Error::user("config.json has neither `architectures` nor `model_type`"),
    }
    .with_hint(hint))
}
