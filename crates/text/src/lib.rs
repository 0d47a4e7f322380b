//! Texts to the tensors that language models take.
//!
//! [`Tokenizer`] reads a model directory's `tokenizer.json` (the format of Hugging Face's
//! tokenizers, whose Rust crate does the work) and encodes batches: each text is cut to the most
//! tokens that are asked for, then all are padded to the longest. Padding and cutting that the file
//! itself prescribes are replaced: they belong to a use, not to a model.
//!
//! It knows no models and no graphs.

use std::collections::BTreeMap;
use std::path::Path;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tokenizers::{PaddingParams, PaddingStrategy, TruncationParams};

/// Vocabularies of a few hundred thousand words take some tens of megabytes.
const LARGEST_FILE: u64 = 256 << 20;

/// Splits texts into the numbered pieces that a model was trained on.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pad_id: u32,
}

/// A batch: three tensors `i64[B,S]`, named as in transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Numbers of the pieces.
    pub input_ids: Tensor,
    /// 1 for a piece, 0 for padding.
    pub attention_mask: Tensor,
    /// Which of two joined texts a piece belongs to; 0 for single texts.
    pub token_type_ids: Tensor,
}

impl Batch {
    /// The tensors by name, as inputs of a model that declares `names`.
    pub fn inputs(&self, names: &[&str]) -> BTreeMap<String, Tensor> {
        let all = [
            ("input_ids", &self.input_ids),
            ("attention_mask", &self.attention_mask),
            ("token_type_ids", &self.token_type_ids),
        ];
        all.into_iter()
            .filter(|(name, _)| names.contains(name))
            .map(|(name, tensor)| (name.to_string(), tensor.clone()))
            .collect()
    }

    /// Texts, and pieces of the longest.
    pub fn shape(&self) -> [usize; 2] {
        match self.input_ids.shape() {
            [texts, pieces] => [*texts, *pieces],
            _ => [0, 0],
        }
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory. Texts are cut to `max_tokens` pieces, special
    /// ones included.
    pub fn open(dir: &Path, max_tokens: usize) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let cannot = |e: std::io::Error| {
            Error::user(format!("cannot read `{}`: {e}", path.display())).with_hint(
                "a tokenizer is saved as tokenizer.json by AutoTokenizer.save_pretrained",
            )
        };
        let len = std::fs::metadata(&path).map_err(cannot)?.len();
        if len > LARGEST_FILE {
            let message = format!("`{}` has {len} bytes: not a tokenizer", path.display());
            return Err(Error::user(message));
        }
        let bytes = std::fs::read(&path).map_err(cannot)?;
        Tokenizer::from_bytes(&bytes, max_tokens)
            .map_err(|e| e.with_context(format!("reading `{}`", path.display())))
    }

    /// As [`Tokenizer::open`], from the bytes of the file.
    pub fn from_bytes(bytes: &[u8], max_tokens: usize) -> Result<Tokenizer> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::user(format!("not a tokenizer that can be read: {e}")))?;
        let special = inner
            .get_post_processor()
            .map_or(0, |p| tokenizers::PostProcessor::added_tokens(p, false));
        if max_tokens <= special {
            return Err(Error::user(format!(
                "{max_tokens} tokens leave no room for a text beside {special} special ones"
            )));
        }
        // Only the piece that fills is the model's own; by convention it is 0 where none is named.
        let pad = inner.get_padding().cloned();
        let pad_id = pad.map_or_else(|| pad_id(&inner), |p| p.pad_id);
        inner.with_padding(None);
        let cut = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        inner
            .with_truncation(Some(cut))
            .map_err(|e| Error::user(format!("cannot cut texts to {max_tokens} tokens: {e}")))?;
        Ok(Tokenizer { inner, pad_id })
    }

    /// Encodes single texts, padded on the right to the longest of them.
    pub fn encode(&self, texts: &[&str]) -> Result<Batch> {
        if texts.is_empty() {
            return Err(Error::user("there are no texts to encode"));
        }
        let mut encodings = self
            .inner
            .encode_batch(texts.to_vec(), true)
            .map_err(|e| Error::user(format!("cannot split the texts: {e}")))?;
        let padding = PaddingParams {
            strategy: PaddingStrategy::BatchLongest,
            pad_id: self.pad_id,
            ..PaddingParams::default()
        };
        tokenizers::pad_encodings(&mut encodings, &padding)
            .map_err(|e| Error::user(format!("cannot pad the texts: {e}")))?;
        let width = encodings.first().map_or(0, |e| e.len());
        if width == 0 {
            return Err(Error::user("the texts have no tokens"));
        }
        let tensor = |of: fn(&tokenizers::Encoding) -> &[u32]| -> Result<Tensor> {
            let values: Vec<i64> =
                encodings.iter().flat_map(|e| of(e).iter().map(|&v| i64::from(v))).collect();
            Tensor::from_i64s(DType::I64, &[texts.len(), width], &values)
        };
        Ok(Batch {
            input_ids: tensor(|e| e.get_ids())?,
            attention_mask: tensor(|e| e.get_attention_mask())?,
            token_type_ids: tensor(|e| e.get_type_ids())?,
        })
    }

    /// The number of tokens of each text, after cutting: to group texts of like length.
    pub fn lengths(&self, texts: &[&str]) -> Result<Vec<usize>> {
        let encodings = self
            .inner
            .encode_batch_fast(texts.to_vec(), true)
            .map_err(|e| Error::user(format!("cannot split the texts: {e}")))?;
        Ok(encodings.iter().map(|e| e.len()).collect())
    }

    /// Different pieces that there are.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The text of pieces, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::user(format!("cannot join tokens: {e}")))
    }
}

/// The filling piece by its usual names.
fn pad_id(tokenizer: &tokenizers::Tokenizer) -> u32 {
    ["[PAD]", "<pad>", "<|endoftext|>"]
        .iter()
        .find_map(|name| tokenizer.token_to_id(name))
        .unwrap_or(0)
}
