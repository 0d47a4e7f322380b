//! ONNX files to graph IR.
//!
//! ```no_run
//! let graph = tilewright_import::onnx::load("model.onnx".as_ref())?;
//! # Ok::<(), tilewright_base::Error>(())
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `proto.rs` | the protobuf messages |
//! | `tensor.rs` | tensor data: typed fields, raw bytes, external files |
//! | `model.rs` | walks a model: inputs, nodes, functions, branches |
//! | `cx.rs`, `known.rs` | the graph under construction, constants and symbolic shape arithmetic |
//! | `node.rs` | one node as converters see it |
//! | `ops/` | one converter per operator, one file per family, and the table of all |
//!
//! Adding an operator: a converter in its family's file, a row in `ops/mod.rs`, and the cases of
//! `tests/onnx_backend/passing.txt` that now pass.
//!
//! A model may compute shapes, axes or sizes from its inputs. Where these must be known at import,
//! [`import`] answers [`Imported::Needs`]; the caller binds those inputs in
//! [`ImportOptions::specialise`] and tries again.

mod cx;
mod known;
mod model;
mod node;
mod ops;
mod proto;
mod scalar;
mod tensor;
#[cfg(test)]
mod tests;

use prost::Message;
use prost::bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tilewright_base::{Error, Result, ResultExt};
use tilewright_data::{MappedFile, Tensor};
use tilewright_graph::Graph;
use tilewright_layout::Range;

/// How to import.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// Inputs that become constants, by name.
    pub specialise: BTreeMap<String, Tensor>,
    /// The range of a symbolic dimension that the model does not bound.
    pub symbol_range: Range,
}

impl Default for ImportOptions {
    fn default() -> Self {
        ImportOptions { specialise: BTreeMap::new(), symbol_range: Range { min: 1, max: 65536 } }
    }
}

/// What an import gives.
#[derive(Clone, Debug)]
pub enum Imported {
    /// The whole model.
    Graph(Box<Graph>),
    /// Nothing yet: the values of these inputs decide shapes and must be bound first.
    Needs(Vec<String>),
}

/// Loads a model file; its external data lies beside it.
pub fn load(path: &Path) -> Result<Graph> {
    load_with(path, &ImportOptions::default())
}

/// As [`load`], with options.
pub fn load_with(path: &Path, options: &ImportOptions) -> Result<Graph> {
    complete(import(path, options)?).context(|| path.display().to_string())
}

/// Loads a model from memory. External data, if any, is looked up under `base_dir`.
pub fn load_bytes(bytes: &[u8], base_dir: Option<&Path>) -> Result<Graph> {
    load_bytes_with(bytes, base_dir, &ImportOptions::default())
}

/// As [`load_bytes`], with options.
pub fn load_bytes_with(
    bytes: &[u8],
    base_dir: Option<&Path>,
    options: &ImportOptions,
) -> Result<Graph> {
    complete(import_bytes(bytes, base_dir, options)?)
}

fn complete(imported: Imported) -> Result<Graph> {
    match imported {
        Imported::Graph(graph) => Ok(*graph),
        Imported::Needs(names) => {
            let list: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
            Err(Error::unsupported(format!(
                "the model computes shapes from the values of {}",
                list.join(", ")
            ))
            .with_hint("give these inputs as fixed values"))
        }
    }
}

/// Keeps the mapped file alive as the owner of decoded byte strings.
struct Mapped(Arc<MappedFile>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Loads a model file, or says which inputs must be bound first.
pub fn import(path: &Path, options: &ImportOptions) -> Result<Imported> {
    let run = || {
        let map = MappedFile::open(path)?;
        let bytes = Bytes::from_owner(Mapped(map.clone()));
        let base = path.parent().map(|p| match p.as_os_str().is_empty() {
            true => Path::new(".").to_path_buf(),
            false => p.to_path_buf(),
        });
        let source = tensor::Source { map: Some(map), base_dir: base, ..Default::default() };
        decode(bytes, source, options)
    };
    run().context(|| path.display().to_string())
}

/// Loads a model from memory, or says which inputs must be bound first.
pub fn import_bytes(
    bytes: &[u8],
    base_dir: Option<&Path>,
    options: &ImportOptions,
) -> Result<Imported> {
    let source = tensor::Source { base_dir: base_dir.map(Path::to_path_buf), ..Default::default() };
    decode(Bytes::copy_from_slice(bytes), source, options)
}

fn decode(bytes: Bytes, source: tensor::Source, options: &ImportOptions) -> Result<Imported> {
    if bytes.is_empty() {
        return Err(Error::user("the file is empty, not an ONNX model"));
    }
    let model = proto::ModelProto::decode(bytes).map_err(|e| {
        Error::user(format!("not an ONNX model, or a damaged one: {e}"))
            .with_hint("an interrupted download often looks like this")
    })?;
    if model.ir_version <= 0 {
        // Most bytes are some protobuf message; every model says this.
        return Err(Error::user(
            "not an ONNX model, or a damaged one: it has no version of the format",
        ));
    }
    model::convert(&model, source, options)
}

/// Reads one `TensorProto` file, as the official tests store their inputs and outputs.
pub fn read_tensor(bytes: &[u8]) -> Result<Tensor> {
    let proto = proto::TensorProto::decode(Bytes::copy_from_slice(bytes))
        .map_err(|e| Error::user(format!("not a tensor file, or a damaged one: {e}")))?;
    tensor::Source::default().tensor(&proto)
}

/// The names of a model's inputs in the order of the file, those with default values included.
pub fn input_names(bytes: &[u8]) -> Result<Vec<String>> {
    let model = proto::ModelProto::decode(Bytes::copy_from_slice(bytes))
        .map_err(|e| Error::user(format!("not an ONNX model, or a damaged one: {e}")))?;
    let inputs = model.graph.map(|g| g.input).unwrap_or_default();
    Ok(inputs.into_iter().map(|i| i.name).collect())
}
