//! GPT-2: decoder layers normalised before each part; one merged projection to q, k and v.

use super::config::Config;
use super::layers::{Heads, Net};
use super::{LoadOptions, Summary, Task};
use tilewright_base::Result;
use tilewright_layout::Dim;

pub(super) fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    options: &LoadOptions,
) -> Result<Summary> {
    let hidden = config.size("n_embd");
    let layers = config.layers("n_layer");
    let heads = config.size("n_head");
    let inner = config.optional_size("n_inner").unwrap_or(4 * hidden);
    let vocabulary = config.size("vocab_size");
    let positions = config.size("n_positions");
    let eps = config.eps("layer_norm_epsilon", 1e-5);
    let act = config.activation("activation_function", "gelu_new");
    let width = config.head_width(hidden, heads);
    let scaled = config.flag("scale_attn_weights", true);
    let by_layer = config.flag("scale_attn_by_inverse_layer_idx", false);
    if config.flag("add_cross_attention", false) {
        config.unsupported("attention to an encoder (`add_cross_attention`)");
    }
    config.check()?;

    let prefix = if net.weights.has_prefix("transformer.") { "transformer." } else { "" };
    net.declare_tokens(positions.min(options.max_tokens));
    let ids = net.token_input("input_ids");
    let mask = net.padding_mask()?;

    let table = format!("{prefix}wte.weight");
    let words = net.embedding(ids, &table, vocabulary, hidden)?;
    let places = net.positions(&format!("{prefix}wpe.weight"), positions, hidden)?;
    let mut x = net.add(words, places)?;
    for i in 0..layers {
        let layer = format!("{prefix}h.{i}");
        let y = net.layer_norm(x, &format!("{layer}.ln_1"), hidden, eps)?;
        let merged = net.conv1d(y, &format!("{layer}.attn.c_attn"), hidden, 3 * hidden)?;
        let mut qkv = [merged; 3];
        for (part, start) in qkv.iter_mut().zip([0, hidden, 2 * hidden]) {
            let y = net.b.slice_axis(merged, 2, Dim::new(start), Dim::new(hidden))?;
            *part = net.split_heads(y, heads, width)?;
        }
        let root = if scaled { 1.0 / (width as f64).sqrt() } else { 1.0 };
        let scale = if by_layer { root / (i + 1) as f64 } else { root };
        let attention = Heads { q: heads, width, scale, causal: true };
        net.remember(&mut qkv, i, heads, width)?;
        let y = net.attend(qkv, &attention, mask, &format!("{layer}.attn"))?;
        let y = net.conv1d(y, &format!("{layer}.attn.c_proj"), hidden, hidden)?;
        x = net.add(y, x)?;
        let y = net.layer_norm(x, &format!("{layer}.ln_2"), hidden, eps)?;
        let y = net.conv1d(y, &format!("{layer}.mlp.c_fc"), hidden, inner)?;
        let y = net.activate(act, y)?;
        let y = net.conv1d(y, &format!("{layer}.mlp.c_proj"), inner, hidden)?;
        x = net.add(y, x)?;
    }
    let x = net.layer_norm(x, &format!("{prefix}ln_f"), hidden, eps)?;

    if task == Task::CausalLanguage {
        let own = "lm_head.weight".to_string();
        let head = if net.weights.has(&own) { own } else { table };
        let head = net.matrix(&head, [vocabulary, hidden], "oi")?;
        let x = net.asked_for(x)?;
        let y = net.project(x, head, None, "lm_head")?;
        net.outputs_with_cache("logits", y);
    } else {
        net.outputs_with_cache("last_hidden_state", x);
    }
    Ok(Summary { hidden, layers, heads, kv_heads: heads, vocabulary, ..Summary::default() })
}
