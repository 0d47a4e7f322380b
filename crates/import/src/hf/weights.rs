//! [`Weights`]: the tensors of a model directory, from one file or from shards.

use super::config::read_json;
use super::random::RandomWeights;
use super::safetensors::{self, Contents};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;

/// Named tensors, and which of them were asked for.
#[derive(Debug, Default)]
pub(crate) struct Weights {
    contents: Contents,
    used: BTreeSet<String>,
    random: Option<RandomWeights>,
}

impl Weights {
    /// The tensors of one safetensors file in memory.
    pub(crate) fn of_bytes(file: &[u8]) -> Result<Weights> {
        Ok(Weights { contents: safetensors::read_bytes(file)?, ..Weights::default() })
    }

    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub(crate) fn open(dir: &Path) -> Result<Weights> {
        let single = dir.join("model.safetensors");
        if single.is_file() {
            let contents = safetensors::read(&single)?;
            return Ok(Weights { contents, ..Weights::default() });
        }
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            return Weights::open_shards(dir, &index);
        }
        let error = Error::user(format!("`{}` has no model.safetensors", dir.display()));
        Err(match dir.join("pytorch_model.bin").is_file() {
            true => error.with_hint(
                "it has pytorch_model.bin: load it with transformers and save it again with \
                 save_pretrained(..., safe_serialization=True)",
            ),
            false => error.with_hint("weights must be stored as safetensors"),
        })
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<Weights> {
        let bad = |what: String| {
            Err(Error::user(what).with_context(format!("reading `{}`", index.display())))
        };
        let json = read_json(index)?;
        let Some(Value::Object(map)) = json.get("weight_map") else {
            return bad("there is no `weight_map`".into());
        };
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            let Some(file) = file.as_str() else {
                return bad(format!("the file of tensor `{tensor}` is not a text"));
            };
            // A file beside the index: nothing that leads out of the directory.
            let mut parts = Path::new(file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return bad(format!("`{file}` is not the name of a file beside the index"));
            }
            shards.entry(file).or_default().push(tensor);
        }
        let mut all = Contents::default();
        let mut missing = Vec::new();
        for (file, tensors) in shards {
            let mut shard = safetensors::read(&dir.join(file))?;
            for tensor in tensors {
                if let Some(data) = shard.tensors.remove(tensor) {
                    all.tensors.insert(tensor.into(), data);
                } else if let Some(dtype) = shard.foreign.remove(tensor) {
                    all.foreign.insert(tensor.into(), dtype);
                } else {
                    missing.push(format!("tensor `{tensor}` is not in `{file}`"));
                }
            }
        }
        if missing.is_empty() {
            return Ok(Weights { contents: all, ..Weights::default() });
        }
        let error = Error::user("the index lists tensors that the files lack")
            .with_context(format!("reading `{}`", index.display()));
        Err(missing.into_iter().take(100).fold(error, Error::with_note))
    }

    /// No files: every tensor that is asked for is there, with random numbers of this type.
    pub(crate) fn random(seed: u64, dtype: DType) -> Weights {
        Weights { random: Some(RandomWeights::new(seed, dtype)), ..Weights::default() }
    }

    /// Whether they are made, so that what is not there had no memory.
    pub(crate) fn are_random(&self) -> bool {
        self.random.is_some()
    }

    /// The tensor of this name and shape.
    ///
    /// # Errors
    /// The user's when it is missing or has another shape.
    pub(crate) fn shaped(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let Some(tensor) = self.get(name, shape) else {
            return Err(Error::user(format!("tensor `{name}` of shape {shape:?} is missing")));
        };
        let is = tensor.shape();
        let fits = is.len() == shape.len()
            && is.iter().zip(shape).all(|(&a, &b)| usize::try_from(b) == Ok(a));
        if !fits {
            return Err(Error::user(format!("tensor `{name}` has shape {is:?}, not {shape:?}")));
        }
        Ok(tensor.clone())
    }

    /// The tensor of this name; `shape` is what a random one gets.
    pub(crate) fn get(&mut self, name: &str, shape: &[i64]) -> Option<&Tensor> {
        if let Some(random) = &mut self.random
            && !self.contents.tensors.contains_key(name)
        {
            let tensor = random.tensor(name, shape)?;
            self.contents.tensors.insert(name.into(), tensor);
        }
        let tensor = self.contents.tensors.get(name)?;
        if !self.used.contains(name) {
            self.used.insert(name.to_string());
        }
        Some(tensor)
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.contents.tensors.contains_key(name) || self.contents.foreign.contains_key(name)
    }

    /// Whether some tensor's name begins so.
    pub(crate) fn has_prefix(&self, prefix: &str) -> bool {
        if self.random.is_some() {
            return true;
        }
        let from = self.contents.tensors.range(prefix.to_string()..).next();
        from.is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// The file's name of the element type when it is one that we do not have.
    pub(crate) fn foreign(&self, name: &str) -> Option<&str> {
        self.contents.foreign.get(name).map(String::as_str)
    }

    /// Tensors that were never asked for.
    pub(crate) fn unused(&self) -> Vec<String> {
        let names = self.contents.tensors.keys().chain(self.contents.foreign.keys());
        let mut unused: Vec<String> = names.filter(|n| !self.used.contains(*n)).cloned().collect();
        unused.sort_unstable();
        unused
    }

    /// The tensors that were asked for.
    pub(crate) fn used(&self) -> impl Iterator<Item = &Tensor> {
        self.used.iter().filter_map(|name| self.contents.tensors.get(name))
    }
}
