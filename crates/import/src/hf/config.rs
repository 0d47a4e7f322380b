//! [`Config`]: reads `config.json`, collecting everything that is wrong with it.
//!
//! A getter answers a harmless stand-in when a value is missing or absurd and notes the problem;
//! a family reads all it needs, then calls [`Config::check`] once. Ranges are part of reading: no
//! number from the file reaches an allocation or a loop unchecked.

use serde_json::{Map, Value};
use std::path::Path;
use tilewright_base::{Error, Result};

/// Configuration files are a few kilobytes; what is larger is something else.
const LARGEST_JSON: u64 = 64 << 20;
/// Largest width, vocabulary, or number of heads that a model may state.
const LARGEST_SIZE: i64 = 1 << 24;
/// More layers than this is a damaged file.
const MOST_LAYERS: i64 = 4096;

/// Reads a JSON file that holds an object.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let cannot = |e| Error::user(format!("cannot read `{}`: {e}", path.display()));
    let len = std::fs::metadata(path).map_err(cannot)?.len();
    if len > LARGEST_JSON {
        let message = format!("`{}` has {len} bytes: not a configuration", path.display());
        return Err(Error::user(message));
    }
    let bytes = std::fs::read(path).map_err(cannot)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::user(format!("`{}` is not JSON: {e}", path.display())))
}

/// The values of `config.json` and what was found wrong with them.
#[derive(Debug)]
pub(crate) struct Config {
    json: Map<String, Value>,
    problems: Vec<String>,
    unsupported: Vec<String>,
}

impl Config {
    /// Reads the file of a model directory.
    pub(crate) fn open(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        Config::of(read_json(&path)?, &path.display().to_string())
    }

    /// Reads the text of a configuration.
    pub(crate) fn parse(text: &[u8]) -> Result<Config> {
        let json = serde_json::from_slice(text);
        Config::of(json.map_err(|e| Error::user(format!("not JSON: {e}")))?, "the configuration")
    }

    fn of(json: Value, name: &str) -> Result<Config> {
        match json {
            Value::Object(json) => {
                Ok(Config { json, problems: Vec::new(), unsupported: Vec::new() })
            }
            _ => Err(Error::user(format!("`{name}` does not hold an object"))),
        }
    }

    /// The value of a key that is present and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// Whether a key does not occur at all; `null` occurs.
    pub(crate) fn is_absent(&self, key: &str) -> bool {
        !self.json.contains_key(key)
    }

    /// A text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// Notes a mistake of the file.
    pub(crate) fn problem(&mut self, what: impl Into<String>) {
        self.problems.push(what.into());
    }

    /// Notes something right that we cannot do.
    pub(crate) fn unsupported(&mut self, what: impl Into<String>) {
        self.unsupported.push(what.into());
    }

    fn whole(&mut self, key: &str, most: i64) -> Option<i64> {
        let value = self.get(key)?.clone();
        match value.as_i64() {
            Some(v) if (1..=most).contains(&v) => Some(v),
            _ => {
                self.problem(format!("`{key}` is {value}, not a whole number in 1..={most}"));
                Some(1)
            }
        }
    }

    fn required(&mut self, key: &str, value: Option<i64>) -> i64 {
        value.unwrap_or_else(|| {
            self.problem(format!("`{key}` is missing"));
            1
        })
    }

    /// A width, vocabulary size or head count that must be there.
    pub(crate) fn size(&mut self, key: &str) -> i64 {
        let value = self.whole(key, LARGEST_SIZE);
        self.required(key, value)
    }

    /// As [`Config::size`], when present.
    pub(crate) fn optional_size(&mut self, key: &str) -> Option<i64> {
        self.whole(key, LARGEST_SIZE)
    }

    /// The number of layers.
    pub(crate) fn layers(&mut self, key: &str) -> i64 {
        let value = self.whole(key, MOST_LAYERS);
        self.required(key, value)
    }

    /// A length in tokens; may be astronomic ("no limit"), never becomes a size by itself.
    pub(crate) fn length(&mut self, key: &str) -> i64 {
        let value = self.whole(key, i64::MAX);
        self.required(key, value)
    }

    /// The number of a token, `default` when absent.
    pub(crate) fn token(&mut self, key: &str, default: i64) -> i64 {
        let Some(value) = self.get(key).cloned() else { return default };
        value.as_i64().filter(|v| (0..LARGEST_SIZE).contains(v)).unwrap_or_else(|| {
            self.problem(format!("`{key}` is {value}, not the number of a token"));
            default
        })
    }

    /// A finite number, `default` when absent.
    pub(crate) fn number(&mut self, key: &str, default: f64) -> f64 {
        let Some(value) = self.get(key).cloned() else { return default };
        value.as_f64().filter(|v| v.is_finite()).unwrap_or_else(|| {
            self.problem(format!("`{key}` is {value}, not a number"));
            default
        })
    }

    /// The small positive number of a normalisation.
    pub(crate) fn eps(&mut self, key: &str, default: f64) -> f64 {
        let eps = self.number(key, default);
        if (0.0..1.0).contains(&eps) {
            return eps;
        }
        self.problem(format!("`{key}` is {eps}, not in 0..1"));
        default
    }

    /// A truth value, `default` when absent.
    pub(crate) fn flag(&mut self, key: &str, default: bool) -> bool {
        let Some(value) = self.get(key).cloned() else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.problem(format!("`{key}` is {value}, not true or false"));
            default
        })
    }

    /// An activation function as text of the expression language.
    pub(crate) fn activation(&mut self, key: &str, default: &str) -> &'static str {
        let name = match self.get(key) {
            None => default.to_string(),
            Some(Value::String(name)) => name.clone(),
            Some(other) => other.to_string(),
        };
        ACTIVATIONS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text).unwrap_or_else(|| {
            self.unsupported(format!("activation `{name}` (`{key}`)"));
            "{ x -> x }"
        })
    }

    /// `width / heads`, which must divide.
    pub(crate) fn head_width(&mut self, width: i64, heads: i64) -> i64 {
        if width % heads != 0 {
            self.problem(format!("a width of {width} is not divisible among {heads} heads"));
        }
        (width / heads).max(1)
    }

    /// Number of labels of a classifier: transformers stores `id2label`, rarely `num_labels`.
    pub(crate) fn labels(&mut self) -> i64 {
        match self.get("id2label") {
            Some(Value::Object(labels)) if !labels.is_empty() => labels.len() as i64,
            // The default of transformers, which then leaves both keys out.
            _ => self.whole("num_labels", LARGEST_SIZE).unwrap_or(2),
        }
    }

    /// An error with everything noted so far, if anything was.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.unsupported.is_empty() {
            let error = Error::unsupported("config.json asks for what is not supported");
            let all = self.unsupported.iter().chain(&self.problems).cloned();
            return Err(all.fold(error, Error::with_note));
        }
        if !self.problems.is_empty() {
            let error = Error::user("config.json is not usable");
            return Err(self.problems.iter().cloned().fold(error, Error::with_note));
        }
        Ok(())
    }
}

/// Activation functions by their name in transformers.
#[rustfmt::skip] // One row per function.
const ACTIVATIONS: &[(&str, &str)] = &[
    ("gelu",              "{ x -> gelu(x) }"),
    ("gelu_python",       "{ x -> gelu(x) }"),
    ("gelu_new",          "{ x -> gelu_tanh(x) }"),
    ("gelu_fast",         "{ x -> gelu_tanh(x) }"),
    ("gelu_accurate",     "{ x -> gelu_tanh(x) }"),
    ("gelu_pytorch_tanh", "{ x -> gelu_tanh(x) }"),
    ("quick_gelu",        "{ x -> quick_gelu(x) }"),
    ("relu",              "{ x -> max(x, 0) }"),
    ("relu2",             "{ x -> sqr(max(x, 0)) }"),
    ("relu6",             "{ x -> clamp(x, 0, 6) }"),
    ("silu",              "{ x -> silu(x) }"),
    ("swish",             "{ x -> silu(x) }"),
    ("sigmoid",           "{ x -> sigmoid(x) }"),
    ("tanh",              "{ x -> tanh(x) }"),
    ("mish",              "{ x -> mish(x) }"),
    ("hardswish",         "{ x -> hardswish(x) }"),
    ("linear",            "{ x -> x }"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_base::DType;
    use tilewright_expr::Func;

    #[test]
    fn every_activation_parses() {
        for (name, text) in ACTIVATIONS {
            let func = Func::parse(text, &[DType::F32]);
            assert!(func.is_ok(), "{name}: {func:?}");
        }
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let json = r#"{"a": 0, "b": "x", "c": 1e300, "act": "magic", "eps": -1}"#;
        let Ok(Value::Object(json)) = serde_json::from_str(json) else { panic!("an object") };
        let mut config = Config { json, problems: Vec::new(), unsupported: Vec::new() };
        config.size("a");
        config.layers("b");
        config.length("c");
        config.size("absent");
        config.eps("eps", 1e-5);
        assert_eq!(config.problems.len(), 5, "{:?}", config.problems);
        assert_eq!(config.check().unwrap_err().exit_code(), 2);
        config.activation("act", "gelu");
        assert_eq!(config.check().unwrap_err().exit_code(), 3);
    }
}
