//! Llama and its kin: RMS norms, rotary positions, grouped key/value heads, gated feed-forward.
//!
//! Mistral, Qwen2 and Qwen3 differ in where biases stand, in norms on each head, and in sliding
//! windows; [`Variant`] says how.

use super::config::Config;
use super::layers::{Heads, Net};
use super::rotary::{Rotary, rotate};
use super::weights::Weights;
use super::{LoadOptions, Summary, Task};
use tilewright_base::{Error, Result};
use tilewright_plan::{Decoder, DecoderLayer, DecoderNorm};

/// What the relatives differ in.
struct Variant {
    /// Biases on q, k and v; on the attention's output.
    qkv_bias: bool,
    output_bias: bool,
    /// Biases of the feed-forward part.
    mlp_bias: bool,
    /// RMS norm over each head of q and k.
    head_norms: bool,
    /// Positions that a position sees, itself included, by layer; all where it is none.
    windows: Vec<Option<i64>>,
    /// Transformers' default when the configuration is silent.
    default_eps: f64,
}

fn llama(config: &mut Config) -> Variant {
    let bias = config.flag("attention_bias", false);
    let mlp_bias = config.flag("mlp_bias", false);
    Variant {
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias,
        head_norms: false,
        windows: Vec::new(),
        default_eps: 1e-6,
    }
}

fn mistral(config: &mut Config) -> Variant {
    // Absent means the default of the first Mistral; null means none.
    let absent = config.is_absent("sliding_window").then_some(4096);
    let window = config.optional_size("sliding_window").or(absent);
    let layers = config.layers("num_hidden_layers");
    Variant {
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        head_norms: false,
        windows: vec![window; usize::try_from(layers).unwrap_or(0)],
        default_eps: 1e-6,
    }
}

fn qwen2(config: &mut Config) -> Variant {
    Variant {
        qkv_bias: true,
        output_bias: false,
        mlp_bias: false,
        head_norms: false,
        windows: qwen_windows(config),
        default_eps: 1e-6,
    }
}

fn qwen3(config: &mut Config) -> Variant {
    let bias = config.flag("attention_bias", false);
    Variant {
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: false,
        head_norms: true,
        windows: qwen_windows(config),
        default_eps: 1e-6,
    }
}

/// Builds the graph of a family.
macro_rules! builder {
    ($name:ident, $variant:ident) => {
        pub(super) fn $name(
            config: &mut Config,
            net: &mut Net,
            task: Task,
            options: &LoadOptions,
        ) -> Result<Summary> {
            let variant = $variant(config);
            build(config, net, task, options, &variant)
        }
    };
}

builder!(build_llama, llama);
builder!(build_mistral, mistral);
builder!(build_qwen2, qwen2);
builder!(build_qwen3, qwen3);

/// Qwen switches its window on by a flag, and for some layers only.
fn qwen_windows(config: &mut Config) -> Vec<Option<i64>> {
    if !config.flag("use_sliding_window", false) {
        return Vec::new();
    }
    let window = config.optional_size("sliding_window").unwrap_or(4096);
    let layers = config.layers("num_hidden_layers");
    let first = config.get("max_window_layers").and_then(|v| v.as_i64()).unwrap_or(28);
    let Some(types) = config.get("layer_types").and_then(|t| t.as_array()).cloned() else {
        return (0..layers).map(|i| (i >= first).then_some(window)).collect();
    };
    if i64::try_from(types.len()) != Ok(layers) {
        config.problem(format!("`layer_types` has {} entries for {layers} layers", types.len()));
    }
    let kind = |t: &serde_json::Value| match t.as_str() {
        Some("sliding_attention") => Some(Some(window)),
        Some("full_attention") => Some(None),
        _ => None,
    };
    if let Some(other) = types.iter().find(|t| kind(t).is_none()) {
        config.unsupported(format!("layers of the type {other}"));
    }
    types.iter().map(|t| kind(t).flatten()).collect()
}

/// What the configuration says.
struct Sizes {
    hidden: i64,
    layers: i64,
    heads: i64,
    kv_heads: i64,
    width: i64,
    inner: i64,
    vocabulary: i64,
    eps: f64,
    act: &'static str,
    tied: bool,
    rotary: Rotary,
    most_tokens: i64,
    /// By layer.
    windows: Vec<Option<i64>>,
}

fn read(config: &mut Config, options: &LoadOptions, variant: &Variant) -> Result<Sizes> {
    let hidden = config.size("hidden_size");
    let layers = config.layers("num_hidden_layers");
    let heads = config.size("num_attention_heads");
    let kv_heads = config.optional_size("num_key_value_heads").unwrap_or(heads);
    let inner = config.size("intermediate_size");
    let vocabulary = config.size("vocab_size");
    let positions = config.length("max_position_embeddings");
    let eps = config.eps("rms_norm_eps", variant.default_eps);
    let act = config.activation("hidden_act", "silu");
    let tied = config.flag("tie_word_embeddings", false);
    let width = match config.optional_size("head_dim") {
        Some(width) => width,
        None => config.head_width(hidden, heads),
    };
    if heads % kv_heads != 0 {
        config.problem(format!("{heads} heads cannot share {kv_heads} key/value heads evenly"));
    }
    let rotary = Rotary::read(config, width);
    let most_tokens = positions.min(options.max_tokens);
    // A window as long as the sequence leaves nothing out.
    let window = |i: usize| variant.windows.get(i).copied().flatten().filter(|w| *w < most_tokens);
    let windows = (0..usize::try_from(layers).unwrap_or(0)).map(window).collect();
    config.check()?;
    Ok(Sizes {
        hidden,
        layers,
        heads,
        kv_heads,
        width,
        inner,
        vocabulary,
        eps,
        act,
        tied,
        rotary,
        most_tokens,
        windows,
    })
}

fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    options: &LoadOptions,
    variant: &Variant,
) -> Result<Summary> {
    let sizes = read(config, options, variant)?;
    let Sizes { hidden, layers, heads, kv_heads, width, inner, vocabulary, eps, act, .. } = sizes;
    let Sizes { tied, rotary, most_tokens, windows, .. } = sizes;

    let prefix = if net.weights.has_prefix("model.") { "model." } else { "" };
    net.declare_tokens(most_tokens);
    let ids = net.token_input("input_ids");
    let mask = net.padding_mask()?;

    let table = format!("{prefix}embed_tokens.weight");
    let mut x = net.embedding(ids, &table, vocabulary, hidden)?;
    // The first layer's queries show that the head width is real before tables take memory for it.
    let probe = format!("{prefix}layers.0.self_attn.q_proj.weight");
    net.stored(&probe, &[heads * width, hidden])?;
    net.check()?;
    let tables = rotary.tables(net)?;

    let scale = 1.0 / (width as f64).sqrt();
    for (i, window) in (0..layers).zip(windows) {
        let attention = Heads { q: heads, width, scale, causal: true, window };
        let layer = format!("{prefix}layers.{i}");
        let a = format!("{layer}.self_attn");
        let y = net.rms_norm(x, &format!("{layer}.input_layernorm"), hidden, eps)?;
        let mut qkv = [y; 3];
        for (part, (name, n)) in
            qkv.iter_mut().zip([("q", heads), ("k", kv_heads), ("v", kv_heads)])
        {
            let p =
                net.linear(y, &format!("{a}.{name}_proj"), hidden, n * width, variant.qkv_bias)?;
            let mut p = net.split_heads(p, n, width)?;
            if name != "v" {
                if variant.head_norms {
                    p = net.rms_norm(p, &format!("{a}.{name}_norm"), width, eps)?;
                }
                net.b.set_origin(format!("{a}.{name}_rotary"));
                p = rotate(net, p, tables)?;
            }
            *part = p;
        }
        net.remember(&mut qkv, i, kv_heads, width)?;
        let y = net.attend(qkv, &attention, mask, &a)?;
        let y =
            net.linear(y, &format!("{a}.o_proj"), heads * width, hidden, variant.output_bias)?;
        x = net.add(y, x)?;
        let y = net.rms_norm(x, &format!("{layer}.post_attention_layernorm"), hidden, eps)?;
        let m = format!("{layer}.mlp");
        let gate = net.linear(y, &format!("{m}.gate_proj"), hidden, inner, variant.mlp_bias)?;
        let up = net.linear(y, &format!("{m}.up_proj"), hidden, inner, variant.mlp_bias)?;
        let gate = net.activate(act, gate)?;
        let y = net.b.map_text("{ g, u -> g * u }", &[gate, up])?;
        let y = net.linear(y, &format!("{m}.down_proj"), inner, hidden, variant.mlp_bias)?;
        x = net.add(y, x)?;
    }
    let x = net.rms_norm(x, &format!("{prefix}norm"), hidden, eps)?;

    if task == Task::CausalLanguage {
        let own = "lm_head.weight".to_string();
        let head = if tied && !net.weights.has(&own) { table } else { own };
        let head = net.matrix(&head, [vocabulary, hidden], "oi")?;
        let x = net.asked_for(x)?;
        let y = net.project(x, head, None, "lm_head")?;
        net.outputs_with_cache("logits", y);
    } else {
        net.outputs_with_cache("last_hidden_state", x);
    }
    Ok(Summary { hidden, layers, heads, kv_heads, vocabulary, ..Summary::default() })
}

/// The weights of a decoder as they are stored, with what a step needs to know.
pub(super) fn decoder(
    config: &mut Config,
    weights: &mut Weights,
    options: &LoadOptions,
    model_type: &str,
) -> Result<Decoder> {
    let variant = match model_type {
        "llama" => llama(config),
        "mistral" => mistral(config),
        "qwen2" => qwen2(config),
        "qwen3" => qwen3(config),
        other => {
            return Err(Error::unsupported(format!("decoding of `{other}` step by step on a GPU"))
                .with_hint("gpt2, llama, mistral, qwen2 and qwen3 are supported there"));
        }
    };
    let sizes = read(config, options, &variant)?;
    let Sizes { hidden, layers, heads, kv_heads, width, inner, vocabulary, .. } = sizes;
    let prefix = if weights.has_prefix("model.") { "model." } else { "" };
    let mut get = |name: String, shape: &[i64]| weights.shaped(&name, shape);
    let (q, kv) = (heads * width, kv_heads * width);
    let table = get(format!("{prefix}embed_tokens.weight"), &[vocabulary, hidden])?;
    let mut all = Vec::new();
    for (i, window) in (0..layers).zip(sizes.windows) {
        let a = format!("{prefix}layers.{i}.self_attn");
        let m = format!("{prefix}layers.{i}.mlp");
        let parts = [("q", q), ("k", kv), ("v", kv)];
        let mut qkv = Vec::new();
        let mut qkv_bias = Vec::new();
        for (name, lines) in parts {
            qkv.push(get(format!("{a}.{name}_proj.weight"), &[lines, hidden])?);
            if variant.qkv_bias {
                qkv_bias.push(get(format!("{a}.{name}_proj.bias"), &[lines])?);
            }
        }
        let mut head_norms = Vec::new();
        for name in ["q", "k"].iter().filter(|_| variant.head_norms) {
            head_norms.push(get(format!("{a}.{name}_norm.weight"), &[width])?);
        }
        let mut bias = |there: bool, name: String, lines: i64| {
            there.then(|| get(format!("{name}.bias"), &[lines])).transpose()
        };
        let o_bias = bias(variant.output_bias, format!("{a}.o_proj"), hidden)?;
        let gate_bias = bias(variant.mlp_bias, format!("{m}.gate_proj"), inner)?;
        let up_bias = bias(variant.mlp_bias, format!("{m}.up_proj"), inner)?;
        let down_bias = bias(variant.mlp_bias, format!("{m}.down_proj"), hidden)?;
        let layer = format!("{prefix}layers.{i}");
        let mut norm = |name: &str| {
            let gain = get(format!("{layer}.{name}.weight"), &[hidden])?;
            Ok::<_, Error>(DecoderNorm { gain, shift: None })
        };
        let input_norm = norm("input_layernorm")?;
        let post_norm = norm("post_attention_layernorm")?;
        all.push(DecoderLayer {
            input_norm,
            qkv,
            qkv_bias,
            head_norms,
            window,
            scale: 1.0 / (width as f64).sqrt(),
            o: get(format!("{a}.o_proj.weight"), &[hidden, q])?,
            o_bias,
            post_norm,
            gate: Some(get(format!("{m}.gate_proj.weight"), &[inner, hidden])?),
            up: get(format!("{m}.up_proj.weight"), &[inner, hidden])?,
            gate_bias,
            up_bias,
            down: get(format!("{m}.down_proj.weight"), &[hidden, inner])?,
            down_bias,
        });
    }
    let norm = DecoderNorm { gain: get(format!("{prefix}norm.weight"), &[hidden])?, shift: None };
    let own = "lm_head.weight".to_string();
    let head = match sizes.tied {
        true => None,
        false => Some(get(own, &[vocabulary, hidden])?),
    };
    Ok(Decoder {
        hidden,
        heads,
        kv_heads,
        width,
        inner,
        vocabulary,
        eps: sizes.eps,
        centred: false,
        act: sizes.act.to_string(),
        turned: false,
        most_tokens: sizes.most_tokens,
        frequencies: sizes.rotary.frequencies().to_vec(),
        positions: None,
        table,
        layers: all,
        norm,
        head,
    })
}
