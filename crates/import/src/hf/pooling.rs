//! Sentence encoders: the layout of sentence-transformers and its pooling as a graph.

use super::config::read_json;
use super::layers::{first_token, sum};
use serde_json::Value;
use std::path::{Component, Path};
use tilewright_base::{Error, Result};
use tilewright_graph::{Graph, GraphBuilder, ReduceKind, ValueId};

/// How the positions of a sentence become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PoolingMode {
    /// Mean over the positions that the mask keeps.
    Mean,
    /// The first position.
    Cls,
    /// Largest over the positions that the mask keeps.
    Max,
}

/// What a sentence encoder does with the hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pooling {
    /// How one vector is made.
    pub mode: PoolingMode,
    /// Whether it is divided by its length afterwards.
    pub normalize: bool,
}

/// Reads modules.json and the pooling's configuration; `None` when there is no modules.json.
pub(super) fn detect(dir: &Path) -> Result<Option<Pooling>> {
    let modules = dir.join("modules.json");
    if !modules.is_file() {
        return Ok(None);
    }
    let json = read_json(&modules)?;
    let Some(rows) = json.as_array() else {
        return Err(Error::user(format!("`{}` is not a list", modules.display())));
    };
    let mut mode = None;
    let mut normalize = false;
    let mut unsupported = Vec::new();
    for row in rows {
        // `sentence_transformers.models.Pooling`; the modules' place has moved over the years.
        let class = row.get("type").and_then(Value::as_str).unwrap_or("a module without type");
        match class.rsplit('.').next().unwrap_or(class) {
            "Transformer" => {}
            "Normalize" => normalize = true,
            "Pooling" => {
                let path = row.get("path").and_then(Value::as_str).unwrap_or("1_Pooling");
                let inside =
                    Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
                if !inside {
                    let message = format!("the pooling's path `{path}` leads out of the directory");
                    return Err(Error::user(message));
                }
                mode = Some(read_mode(&dir.join(path).join("config.json"))?);
            }
            _ => unsupported.push(class.to_string()),
        }
    }
    if !unsupported.is_empty() {
        let error = Error::unsupported("the sentence encoder has modules that are not supported");
        return Err(unsupported.into_iter().fold(error, Error::with_note));
    }
    Ok(mode.map(|mode| Pooling { mode, normalize }))
}

fn read_mode(path: &Path) -> Result<PoolingMode> {
    let json = read_json(path)?;
    let mut modes: Vec<&str> = Vec::new();
    if let Some(mode) = json.get("pooling_mode").and_then(Value::as_str) {
        modes.push(mode);
    } else if let Some(map) = json.as_object() {
        let set = map.iter().filter(|(_, v)| v.as_bool() == Some(true));
        modes.extend(set.filter_map(|(k, _)| k.strip_prefix("pooling_mode_")));
    }
    match modes.as_slice() {
        ["mean_tokens" | "mean"] => Ok(PoolingMode::Mean),
        ["cls_token" | "cls"] => Ok(PoolingMode::Cls),
        ["max_tokens" | "max"] => Ok(PoolingMode::Max),
        other => Err(Error::unsupported(format!("pooling by {other:?}, in `{}`", path.display()))),
    }
}

/// The longest sentence by sentence_bert_config.json.
pub(super) fn most_tokens(dir: &Path) -> Option<i64> {
    let json = read_json(&dir.join("sentence_bert_config.json")).ok()?;
    json.get("max_seq_length").and_then(Value::as_i64).filter(|n| *n >= 1)
}

impl Pooling {
    /// The graph with `sentence_embedding` (`[B,hidden]`) as its only output, made from its
    /// output `last_hidden_state` and its input `attention_mask`.
    pub fn append(&self, graph: &Graph) -> Result<Graph> {
        let hidden = graph.outputs.iter().find(|(name, _)| name == "last_hidden_state");
        let mask = graph.inputs.iter().find(|&&v| graph.values[v].name == "attention_mask");
        let (Some(&(_, hidden)), Some(&mask)) = (hidden, mask) else {
            return Err(Error::user(
                "pooling needs an output `last_hidden_state` and an input `attention_mask`",
            ));
        };
        let mut graph = graph.clone();
        graph.outputs.clear();
        let mut b = GraphBuilder::from_graph(graph);
        b.set_origin("pooling");
        let mut y = self.pool(&mut b, hidden, mask)?;
        if self.normalize {
            b.set_origin("normalize");
            let squares = b.map_text("{ x -> x * x }", &[y])?;
            let sum = sum(&mut b, squares, 1, true)?;
            y = b.map_text("{ x, s -> x / max(sqrt(s), 1e-12) }", &[y, sum])?;
        }
        b.output("sentence_embedding", y);
        let mut graph = b.finish();
        graph.remove_dead();
        Ok(graph)
    }

    fn pool(&self, b: &mut GraphBuilder, x: ValueId, mask: ValueId) -> Result<ValueId> {
        if self.mode == PoolingMode::Cls {
            return first_token(b, x);
        }
        let mut shape = b.shape(mask);
        shape.push(tilewright_layout::Dim::new(1));
        let mask = b.reshape(mask, &shape)?;
        match self.mode {
            PoolingMode::Cls => first_token(b, x),
            PoolingMode::Max => {
                // The stand-in for hidden positions is that of sentence-transformers.
                let kept = b.map_text("{ x, m -> where(m != 0, x, -1e9) }", &[x, mask])?;
                b.reduce(ReduceKind::Max, kept, &[1], false)
            }
            PoolingMode::Mean => {
                let weight = b.cast(mask, b.dtype(x))?;
                let kept = b.map_text("{ x, m -> x * m }", &[x, weight])?;
                let total = sum(b, kept, 1, false)?;
                let count = sum(b, weight, 1, false)?;
                b.map_text("{ t, n -> t / max(n, 1e-9) }", &[total, count])
            }
        }
    }
}
