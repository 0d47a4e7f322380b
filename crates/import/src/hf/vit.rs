//! ViT: patches by a strided convolution, a class token, encoder layers normalised first.

use super::config::Config;
use super::layers::{Heads, Net};
use super::{LoadOptions, Summary, Task};
use tilewright_base::{DType, Result};
use tilewright_graph::{ConvAttrs, Op, TensorType};
use tilewright_layout::Dim;

pub(super) fn build(
    config: &mut Config,
    net: &mut Net,
    task: Task,
    _options: &LoadOptions,
) -> Result<Summary> {
    let hidden = config.size("hidden_size");
    let layers = config.layers("num_hidden_layers");
    let heads = config.size("num_attention_heads");
    let inner = config.size("intermediate_size");
    let image = config.size("image_size");
    let patch = config.size("patch_size");
    let channels = config.optional_size("num_channels").unwrap_or(3);
    let pooled = config.optional_size("pooler_output_size").unwrap_or(hidden);
    let pooler_act = config.activation("pooler_act", "tanh");
    let eps = config.eps("layer_norm_eps", 1e-12);
    let act = config.activation("hidden_act", "gelu");
    let bias = config.flag("qkv_bias", true);
    let width = config.head_width(hidden, heads);
    let labels = config.labels();
    if image % patch != 0 {
        config.problem(format!("an image of {image} is not made of patches of {patch}"));
    }
    config.check()?;

    let prefix = if net.weights.has_prefix("vit.") { "vit." } else { "" };
    let side = image / patch;
    let count = side * side;
    let e = format!("{prefix}embeddings");
    let dims = [net.batch.clone(), Dim::new(channels), Dim::new(image), Dim::new(image)];
    let pixels = net.b.input("pixel_values", TensorType::new(DType::F32, dims));
    let pixels = net.b.cast(pixels, net.compute)?;

    let p = format!("{e}.patch_embeddings.projection");
    let kernel = net.weight(&format!("{p}.weight"), &[hidden, channels, patch, patch])?;
    let shift = net.weight(&format!("{p}.bias"), &[hidden])?;
    net.b.set_origin(p);
    let attrs = ConvAttrs {
        strides: vec![patch; 2],
        pads_lo: vec![0; 2],
        pads_hi: vec![0; 2],
        dilations: vec![1; 2],
        groups: 1,
    };
    let y = net.b.op(Op::Conv(attrs), &[pixels, kernel])?;
    let y = net.b.reshape(y, &[net.batch.clone(), Dim::new(hidden), Dim::new(count)])?;
    let y = net.b.permute(y, &[0, 2, 1])?;
    let y = net.b.map_text("{ x, b -> x + b }", &[y, shift])?;
    let class = net.weight(&format!("{e}.cls_token"), &[1, 1, hidden])?;
    let places = net.weight(&format!("{e}.position_embeddings"), &[1, count + 1, hidden])?;
    net.b.set_origin(e);
    let class = net.b.expand(class, &[net.batch.clone(), Dim::new(1), Dim::new(hidden)])?;
    let y = net.b.op(Op::Concat(1), &[class, y])?;
    let mut x = net.add(y, places)?;

    let scale = 1.0 / (width as f64).sqrt();
    let attention = Heads { q: heads, width, scale, causal: false, window: None };
    for i in 0..layers {
        let layer = format!("{prefix}encoder.layer.{i}");
        let a = format!("{layer}.attention");
        let y = net.layer_norm(x, &format!("{layer}.layernorm_before"), hidden, eps)?;
        let mut qkv = [y; 3];
        for (part, name) in qkv.iter_mut().zip(["query", "key", "value"]) {
            let z = net.linear(y, &format!("{a}.attention.{name}"), hidden, hidden, bias)?;
            *part = net.split_heads(z, heads, width)?;
        }
        let y = net.attend(qkv, &attention, None, &a)?;
        let y = net.linear(y, &format!("{a}.output.dense"), hidden, hidden, true)?;
        x = net.add(y, x)?;
        let y = net.layer_norm(x, &format!("{layer}.layernorm_after"), hidden, eps)?;
        let y = net.linear(y, &format!("{layer}.intermediate.dense"), hidden, inner, true)?;
        let y = net.activate(act, y)?;
        let y = net.linear(y, &format!("{layer}.output.dense"), inner, hidden, true)?;
        x = net.add(y, x)?;
    }
    let x = net.layer_norm(x, &format!("{prefix}layernorm"), hidden, eps)?;

    if task == Task::ImageLabels {
        let first = net.first_token(x)?;
        let y = net.linear(first, "classifier", hidden, labels, true)?;
        net.b.output("logits", y);
    } else {
        net.b.output("last_hidden_state", x);
        let pooler = format!("{prefix}pooler.dense");
        if net.weights.has(&format!("{pooler}.weight")) {
            let first = net.first_token(x)?;
            let y = net.linear(first, &pooler, hidden, pooled, true)?;
            let y = net.activate(pooler_act, y)?;
            net.b.output("pooler_output", y);
        }
    }
    Ok(Summary { hidden, layers, heads, kv_heads: heads, ..Summary::default() })
}
