//! DistilBERT: BERT without token types, with its own names.

use super::config::Config;
use super::layers::{Heads, Net};
use super::{LoadOptions, Summary, Task};
use tilewright_base::Result;

/// Not in the configuration: transformers has it as a constant.
const EPS: f64 = 1e-12;

pub(super) fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    options: &LoadOptions,
) -> Result<Summary> {
    let hidden = config.size("dim");
    let layers = config.layers("n_layers");
    let heads = config.size("n_heads");
    let inner = config.size("hidden_dim");
    let vocabulary = config.size("vocab_size");
    let positions = config.size("max_position_embeddings");
    let act = config.activation("activation", "gelu");
    let width = config.head_width(hidden, heads);
    let labels = config.labels();
    config.check()?;

    let prefix = if net.weights.has_prefix("distilbert.") { "distilbert." } else { "" };
    net.declare_tokens(positions.min(options.max_tokens));
    let ids = net.token_input("input_ids");
    let mask = net.token_input("attention_mask");
    let mask = net.additive_mask(mask)?;

    let e = format!("{prefix}embeddings");
    let words = net.embedding(ids, &format!("{e}.word_embeddings.weight"), vocabulary, hidden)?;
    // Sinusoidal positions, too, are stored as a table.
    let places = net.positions(&format!("{e}.position_embeddings.weight"), positions, hidden)?;
    let x = net.add(words, places)?;
    let mut x = net.layer_norm(x, &format!("{e}.LayerNorm"), hidden, EPS)?;

    let scale = 1.0 / (width as f64).sqrt();
    let attention = Heads { q: heads, width, scale, causal: false, window: None };
    for i in 0..layers {
        let layer = format!("{prefix}transformer.layer.{i}");
        let a = format!("{layer}.attention");
        let mut qkv = [x; 3];
        for (part, name) in qkv.iter_mut().zip(["q_lin", "k_lin", "v_lin"]) {
            let y = net.linear(x, &format!("{a}.{name}"), hidden, hidden, true)?;
            *part = net.split_heads(y, heads, width)?;
        }
        let y = net.attend(qkv, &attention, Some(mask), &a)?;
        let y = net.linear(y, &format!("{a}.out_lin"), hidden, hidden, true)?;
        let y = net.add(y, x)?;
        x = net.layer_norm(y, &format!("{layer}.sa_layer_norm"), hidden, EPS)?;
        let y = net.linear(x, &format!("{layer}.ffn.lin1"), hidden, inner, true)?;
        let y = net.activate(act, y)?;
        let y = net.linear(y, &format!("{layer}.ffn.lin2"), inner, hidden, true)?;
        let y = net.add(y, x)?;
        x = net.layer_norm(y, &format!("{layer}.output_layer_norm"), hidden, EPS)?;
    }

    match task {
        Task::MaskedLanguage => {
            let y = net.linear(x, "vocab_transform", hidden, hidden, true)?;
            let y = net.activate(act, y)?;
            let y = net.layer_norm(y, "vocab_layer_norm", hidden, EPS)?;
            let own = "vocab_projector.weight".to_string();
            let tied = format!("{e}.word_embeddings.weight");
            let table = if net.weights.has(&own) { own } else { tied };
            let table = net.matrix(&table, [vocabulary, hidden], "oi")?;
            let bias = net.weight("vocab_projector.bias", &[vocabulary])?;
            let y = net.project(y, table, Some(bias), "vocab_projector")?;
            net.b.output("logits", y);
        }
        Task::SequenceLabels => {
            let first = net.first_token(x)?;
            let y = net.linear(first, "pre_classifier", hidden, hidden, true)?;
            let y = net.activate("{ x -> max(x, 0) }", y)?;
            let y = net.linear(y, "classifier", hidden, labels, true)?;
            net.b.output("logits", y);
        }
        Task::TokenLabels => {
            let y = net.linear(x, "classifier", hidden, labels, true)?;
            net.b.output("logits", y);
        }
        _ => net.b.output("last_hidden_state", x),
    }
    Ok(Summary { hidden, layers, heads, kv_heads: heads, vocabulary, ..Summary::default() })
}
