//! RoBERTa and XLM-RoBERTa: BERT's layers with other positions and heads.
//!
//! Positions count the tokens that are no padding, beginning after the padding's own number: with
//! `pad_token_id` 1 the first token stands at position 2, and padding at 1. Token types exist only as
//! one row that is added everywhere; there is no input for them.

use super::bert::{Encoder, pooler};
use super::config::Config;
use super::layers::Net;
use super::{LoadOptions, Summary, Task};
use tilewright_base::Result;
use tilewright_graph::{Op, ReduceKind, ValueId};
use tilewright_layout::Dim;

pub(super) fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    options: &LoadOptions,
) -> Result<Summary> {
    let encoder = Encoder::read(config);
    let Encoder { hidden, eps, .. } = encoder;
    let vocabulary = config.size("vocab_size");
    let types = config.size("type_vocab_size");
    let positions = config.size("max_position_embeddings");
    let labels = config.labels();
    // transformers' default is 1, and 0 is a token like others.
    let padding = config.token("pad_token_id", 1);
    let most_tokens = positions - 1 - padding;
    if most_tokens < 1 {
        config.problem(format!(
            "`max_position_embeddings` is {positions}, and positions begin at {}",
            padding + 1
        ));
    }
    config.check()?;

    let prefix = if net.weights.has_prefix("roberta.") { "roberta." } else { "" };
    net.declare_tokens(most_tokens.min(options.max_tokens));
    let ids = net.token_input("input_ids");
    let mask = net.token_input("attention_mask");
    let mask = net.additive_mask(mask)?;

    let e = format!("{prefix}embeddings");
    let words = net.embedding(ids, &format!("{e}.word_embeddings.weight"), vocabulary, hidden)?;
    let types = net.weight(&format!("{e}.token_type_embeddings.weight"), &[types, hidden])?;
    let first_type = net.b.slice_axis(types, 0, Dim::new(0), Dim::new(1))?;
    let first_type = net.b.reshape(first_type, &[Dim::new(hidden)])?;
    let places = counted_positions(net, ids, padding)?;
    let places =
        net.embedding(places, &format!("{e}.position_embeddings.weight"), positions, hidden)?;
    let x = net.add(words, first_type)?;
    let x = net.add(x, places)?;
    let x = net.layer_norm(x, &format!("{e}.LayerNorm"), hidden, eps)?;
    let x = encoder.layers(net, x, mask, prefix)?;

    match task {
        Task::MaskedLanguage => {
            let y = net.linear(x, "lm_head.dense", hidden, hidden, true)?;
            // Whatever the layers use, the head uses this one.
            let y = net.activate("{ x -> gelu(x) }", y)?;
            let y = net.layer_norm(y, "lm_head.layer_norm", hidden, eps)?;
            // The output matrix is the word table, unless the checkpoint stores its own.
            let own = "lm_head.decoder.weight".to_string();
            let tied = format!("{e}.word_embeddings.weight");
            let table = if net.weights.has(&own) { own } else { tied };
            let table = net.matrix(&table, [vocabulary, hidden], "oi")?;
            let bias = net.weight("lm_head.bias", &[vocabulary])?;
            let y = net.project(y, table, Some(bias), "lm_head")?;
            net.b.output("logits", y);
        }
        Task::SequenceLabels => {
            let first = net.first_token(x)?;
            let y = net.linear(first, "classifier.dense", hidden, hidden, true)?;
            let y = net.activate("{ x -> tanh(x) }", y)?;
            let y = net.linear(y, "classifier.out_proj", hidden, labels, true)?;
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

/// Positions `i64[B,S]`: the count of tokens up to each that are no padding, plus `padding`; and
/// `padding` itself for padding.
fn counted_positions(net: &mut Net, ids: ValueId, padding: i64) -> Result<ValueId> {
    net.b.set_origin("position_ids");
    let is_token = net.b.map_text(&format!("{{ i -> i64(i != {padding}) }}"), &[ids])?;
    let scan = Op::Scan { kind: ReduceKind::Sum, axis: 1, exclusive: false, reverse: false };
    let count = net.b.op(scan, &[is_token])?;
    net.b.map_text(&format!("{{ c, t -> c * t + {padding} }}"), &[count, is_token])
}
