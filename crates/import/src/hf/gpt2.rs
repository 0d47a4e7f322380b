//! GPT-2: decoder layers normalised before each part; one merged projection to q, k and v.

use super::config::Config;
use super::layers::{Heads, Net};
use super::weights::Weights;
use super::{LoadOptions, Summary, Task};
use tilewright_base::{Error, Result};
use tilewright_layout::Dim;
use tilewright_plan::{Decoder, DecoderLayer, DecoderNorm};

/// What the configuration says.
struct Sizes {
    hidden: i64,
    layers: i64,
    heads: i64,
    inner: i64,
    vocabulary: i64,
    positions: i64,
    eps: f64,
    act: &'static str,
    width: i64,
    scaled: bool,
    by_layer: bool,
}

impl Sizes {
    /// Factor of the scores in a layer.
    fn scale(&self, layer: i64) -> f64 {
        let root = if self.scaled { 1.0 / (self.width as f64).sqrt() } else { 1.0 };
        if self.by_layer { root / (layer + 1) as f64 } else { root }
    }
}

fn read(config: &mut Config) -> Result<Sizes> {
    let hidden = config.size("n_embd");
    let heads = config.size("n_head");
    let sizes = Sizes {
        hidden,
        layers: config.layers("n_layer"),
        heads,
        inner: config.optional_size("n_inner").unwrap_or(4 * hidden),
        vocabulary: config.size("vocab_size"),
        positions: config.size("n_positions"),
        eps: config.eps("layer_norm_epsilon", 1e-5),
        act: config.activation("activation_function", "gelu_new"),
        width: config.head_width(hidden, heads),
        scaled: config.flag("scale_attn_weights", true),
        by_layer: config.flag("scale_attn_by_inverse_layer_idx", false),
    };
    if config.flag("add_cross_attention", false) {
        config.unsupported("attention to an encoder (`add_cross_attention`)");
    }
    config.check()?;
    Ok(sizes)
}

pub(super) fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    options: &LoadOptions,
) -> Result<Summary> {
    let sizes = read(config)?;
    let Sizes { hidden, layers, heads, inner, vocabulary, positions, eps, act, width, .. } = sizes;

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
        let attention =
            Heads { q: heads, width, scale: sizes.scale(i), causal: true, window: None };
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

/// The weights of a decoder as they are stored, with what a step needs to know. Matrices lie from-to.
pub(super) fn decoder(
    config: &mut Config,
    weights: &mut Weights,
    options: &LoadOptions,
) -> Result<Decoder> {
    let sizes = read(config)?;
    let Sizes { hidden, layers, heads, inner, vocabulary, positions, width, .. } = sizes;
    if width % 2 != 0 {
        return Err(Error::unsupported(format!("heads of width {width}, step by step on a GPU")));
    }
    let prefix = if weights.has_prefix("transformer.") { "transformer." } else { "" };
    let mut get = |name: String, shape: &[i64]| weights.shaped(&name, shape);
    let table = get(format!("{prefix}wte.weight"), &[vocabulary, hidden])?;
    let places = get(format!("{prefix}wpe.weight"), &[positions, hidden])?;
    let mut all = Vec::new();
    for i in 0..layers {
        let layer = format!("{prefix}h.{i}");
        let mut linear = |name: &str, from: i64, to: i64| {
            let weight = get(format!("{layer}.{name}.weight"), &[from, to])?;
            Ok::<_, Error>((weight, get(format!("{layer}.{name}.bias"), &[to])?))
        };
        let (qkv, qkv_bias) = linear("attn.c_attn", hidden, 3 * hidden)?;
        let (o, o_bias) = linear("attn.c_proj", hidden, hidden)?;
        let (up, up_bias) = linear("mlp.c_fc", hidden, inner)?;
        let (down, down_bias) = linear("mlp.c_proj", inner, hidden)?;
        let mut norm = |name: &str| {
            let gain = get(format!("{layer}.{name}.weight"), &[hidden])?;
            let shift = get(format!("{layer}.{name}.bias"), &[hidden])?;
            Ok::<_, Error>(DecoderNorm { gain, shift: Some(shift) })
        };
        all.push(DecoderLayer {
            input_norm: norm("ln_1")?,
            qkv: vec![qkv],
            qkv_bias: vec![qkv_bias],
            head_norms: Vec::new(),
            window: None,
            scale: sizes.scale(i),
            o,
            o_bias: Some(o_bias),
            post_norm: norm("ln_2")?,
            gate: None,
            up,
            gate_bias: None,
            up_bias: Some(up_bias),
            down,
            down_bias: Some(down_bias),
        });
    }
    let norm = DecoderNorm {
        gain: get(format!("{prefix}ln_f.weight"), &[hidden])?,
        shift: Some(get(format!("{prefix}ln_f.bias"), &[hidden])?),
    };
    let own = "lm_head.weight".to_string();
    let head =
        weights.has(&own).then(|| weights.shaped(&own, &[vocabulary, hidden])).transpose()?;
    Ok(Decoder {
        hidden,
        heads,
        kv_heads: heads,
        width,
        inner,
        vocabulary,
        eps: sizes.eps,
        centred: true,
        act: sizes.act.to_string(),
        turned: true,
        most_tokens: positions.min(options.max_tokens),
        // Nothing turns.
        frequencies: vec![0.0; usize::try_from(width / 2).unwrap_or(0)],
        positions: Some(places),
        table,
        layers: all,
        norm,
        head,
    })
}
