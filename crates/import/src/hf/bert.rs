//! BERT: encoder layers normalised after each residual sum; heads for words, sequences and tokens.

use super::config::Config;
use super::layers::{Heads, Net};
use super::{LoadOptions, Summary, Task};
use tilewright_base::Result;
use tilewright_graph::ValueId;

/// The numbers of the layers, which RoBERTa shares.
#[derive(Clone, Copy)]
pub(super) struct Encoder {
    pub(super) hidden: i64,
    layers: i64,
    heads: i64,
    inner: i64,
    width: i64,
    pub(super) eps: f64,
    pub(super) act: &'static str,
}

impl Encoder {
    /// Reads them.
    pub(super) fn read(config: &mut Config) -> Encoder {
        let hidden = config.size("hidden_size");
        let layers = config.layers("num_hidden_layers");
        let heads = config.size("num_attention_heads");
        let inner = config.size("intermediate_size");
        let eps = config.eps("layer_norm_eps", 1e-12);
        let act = config.activation("hidden_act", "gelu");
        let width = config.head_width(hidden, heads);
        if config.text("position_embedding_type").is_some_and(|t| t != "absolute") {
            config.unsupported("relative positions (`position_embedding_type`)");
        }
        if config.flag("is_decoder", false) || config.flag("add_cross_attention", false) {
            config.unsupported("an encoder as a decoder (`is_decoder`, `add_cross_attention`)");
        }
        Encoder { hidden, layers, heads, inner, width, eps, act }
    }

    /// All layers over embeddings `x`, named as under `prefix`.
    pub(super) fn layers(
        &self,
        net: &mut Net,
        mut x: ValueId,
        mask: ValueId,
        prefix: &str,
    ) -> Result<ValueId> {
        let &Encoder { hidden, layers, heads, inner, width, eps, act } = self;
        let scale = 1.0 / (width as f64).sqrt();
        let attention = Heads { q: heads, width, scale, causal: false, window: None };
        for i in 0..layers {
            let layer = format!("{prefix}encoder.layer.{i}");
            let a = format!("{layer}.attention.self");
            let mut qkv = [x; 3];
            for (part, name) in qkv.iter_mut().zip(["query", "key", "value"]) {
                let y = net.linear(x, &format!("{a}.{name}"), hidden, hidden, true)?;
                *part = net.split_heads(y, heads, width)?;
            }
            let y = net.attend(qkv, &attention, Some(mask), &a)?;
            let y =
                net.linear(y, &format!("{layer}.attention.output.dense"), hidden, hidden, true)?;
            let y = net.add(y, x)?;
            x = net.layer_norm(y, &format!("{layer}.attention.output.LayerNorm"), hidden, eps)?;
            let y = net.linear(x, &format!("{layer}.intermediate.dense"), hidden, inner, true)?;
            let y = net.activate(act, y)?;
            let y = net.linear(y, &format!("{layer}.output.dense"), inner, hidden, true)?;
            let y = net.add(y, x)?;
            x = net.layer_norm(y, &format!("{layer}.output.LayerNorm"), hidden, eps)?;
        }
        Ok(x)
    }

    /// What people want to know.
    pub(super) fn summary(&self, vocabulary: i64) -> Summary {
        let &Encoder { hidden, layers, heads, .. } = self;
        Summary { hidden, layers, heads, kv_heads: heads, vocabulary, ..Summary::default() }
    }
}

pub(super) fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    options: &LoadOptions,
) -> Result<Summary> {
    let encoder = Encoder::read(config);
    let Encoder { hidden, eps, act, .. } = encoder;
    let vocabulary = config.size("vocab_size");
    let types = config.size("type_vocab_size");
    let positions = config.size("max_position_embeddings");
    let labels = config.labels();
    config.check()?;

    let prefix = if net.weights.has_prefix("bert.") { "bert." } else { "" };
    net.declare_tokens(positions.min(options.max_tokens));
    let ids = net.token_input("input_ids");
    let mask = net.token_input("attention_mask");
    let type_ids = net.token_input("token_type_ids");
    let mask = net.additive_mask(mask)?;

    let e = format!("{prefix}embeddings");
    let words = net.embedding(ids, &format!("{e}.word_embeddings.weight"), vocabulary, hidden)?;
    let types =
        net.embedding(type_ids, &format!("{e}.token_type_embeddings.weight"), types, hidden)?;
    let places = net.positions(&format!("{e}.position_embeddings.weight"), positions, hidden)?;
    let x = net.add(words, types)?;
    let x = net.add(x, places)?;
    let mut x = net.layer_norm(x, &format!("{e}.LayerNorm"), hidden, eps)?;

    x = encoder.layers(net, x, mask, prefix)?;

    match task {
        Task::MaskedLanguage => {
            let h = "cls.predictions";
            let y = net.linear(x, &format!("{h}.transform.dense"), hidden, hidden, true)?;
            let y = net.activate(act, y)?;
            let y = net.layer_norm(y, &format!("{h}.transform.LayerNorm"), hidden, eps)?;
            // The output matrix is the word table, unless the checkpoint stores its own.
            let own = format!("{h}.decoder.weight");
            let tied = format!("{e}.word_embeddings.weight");
            let table = if net.weights.has(&own) { own } else { tied };
            let table = net.matrix(&table, [vocabulary, hidden], "oi")?;
            let bias = net.weight(&format!("{h}.bias"), &[vocabulary])?;
            let y = net.project(y, table, Some(bias), h)?;
            net.b.output("logits", y);
        }
        Task::SequenceLabels => {
            let y = pooler(net, x, prefix, hidden)?;
            let y = net.linear(y, "classifier", hidden, labels, true)?;
            net.b.output("logits", y);
        }
        Task::TokenLabels => {
            let y = net.linear(x, "classifier", hidden, labels, true)?;
            net.b.output("logits", y);
        }
        _ => {
            net.b.output("last_hidden_state", x);
            if net.weights.has(&format!("{prefix}pooler.dense.weight")) {
                let y = pooler(net, x, prefix, hidden)?;
                net.b.output("pooler_output", y);
            }
        }
    }
    Ok(encoder.summary(vocabulary))
}

/// The first position through a dense layer and tanh.
pub(super) fn pooler(net: &mut Net, x: ValueId, prefix: &str, hidden: i64) -> Result<ValueId> {
    let first = net.first_token(x)?;
    let y = net.linear(first, &format!("{prefix}pooler.dense"), hidden, hidden, true)?;
    net.activate("{ x -> tanh(x) }", y)
}
