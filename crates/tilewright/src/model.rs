//! [`Model`]: a file becomes a graph.

use std::path::{Path, PathBuf};
use tilewright_base::{Error, Result, ResultExt};
use tilewright_graph::{Constants, Graph};
use tilewright_import::{hf, onnx};

/// What kind of file a model came from.
#[derive(Clone, Debug)]
pub enum Source {
    /// An ONNX file.
    Onnx,
    /// A Hugging Face directory: config.json and safetensors.
    HuggingFace {
        /// The class in transformers: `BertModel`.
        architecture: String,
    },
    /// Our graph text.
    Text,
}

/// An imported model.
#[derive(Clone, Debug)]
pub struct Model {
    /// Where it came from.
    pub path: PathBuf,
    /// What kind of file that was.
    pub source: Source,
    /// The program as imported.
    pub graph: Graph,
}

impl Model {
    /// As [`Model::open`] for a Hugging Face directory of which only `config.json` is needed: weights are random.
    ///
    /// # Errors
    /// The user's when it is no such directory.
    pub fn open_random(path: &Path, seed: u64) -> Result<Model> {
        let options = hf::LoadOptions { random_weights: Some(seed), ..Default::default() };
        let model = hf::load_model(path, &options)?;
        let source = Source::HuggingFace { architecture: model.architecture };
        Ok(Model { path: path.to_path_buf(), source, graph: model.graph })
    }

    /// Reads a model: a directory with `config.json`, a `.onnx` file, or a `.tw` graph text.
    pub fn open(path: &Path) -> Result<Model> {
        let name = path.display();
        let (source, graph) = if path.is_dir() {
            let model = hf::load_model(path, &hf::LoadOptions::default())?;
            (Source::HuggingFace { architecture: model.architecture }, model.graph)
        } else if path.extension().is_some_and(|e| e == "tw") {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::user(format!("cannot read {name}: {e}")))?;
            (Source::Text, Graph::parse_with(&name.to_string(), &text, Constants::None)?)
        } else {
            (Source::Onnx, onnx::load(path).context(|| "reading the model".to_owned())?)
        };
        Ok(Model { path: path.to_path_buf(), source, graph })
    }
}
