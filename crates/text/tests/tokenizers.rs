//! Encoding against the Python package (`tests/hf/make_tokenizers.py`), and files that are wrong.

use std::path::{Path, PathBuf};
use tilewright_base::Kind;
use tilewright_text::Tokenizer;

fn stored(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hf/tokenizers").join(name)
}

fn expected(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(stored(name).join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn numbers(rows: &serde_json::Value) -> Vec<i64> {
    let rows = rows.as_array().unwrap().iter();
    rows.flat_map(|r| r.as_array().unwrap().iter().map(|v| v.as_i64().unwrap())).collect()
}

#[test]
fn batches_are_those_of_the_python_package() {
    for name in ["wordpiece", "bytes"] {
        let want = expected(name);
        let most = want["max_tokens"].as_u64().unwrap() as usize;
        let tokenizer = Tokenizer::open(&stored(name), most).unwrap();
        assert_eq!(tokenizer.vocabulary() as u64, want["vocabulary"].as_u64().unwrap());
        let texts: Vec<&str> =
            want["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        let batch = tokenizer.encode(&texts).unwrap();
        assert_eq!(batch.shape(), [4, 12], "{name}: the second text is cut");
        assert_eq!(batch.input_ids.to_i64s(), numbers(&want["input_ids"]), "{name}");
        assert_eq!(batch.attention_mask.to_i64s(), numbers(&want["attention_mask"]), "{name}");
        assert_eq!(batch.token_type_ids.to_i64s(), [0; 48], "{name}");
        let kept: Vec<usize> = (0..4)
            .map(|i| batch.attention_mask.to_i64s()[12 * i..][..12].iter().sum::<i64>() as usize)
            .collect();
        assert_eq!(tokenizer.lengths(&texts).unwrap(), kept, "{name}");
    }
}

#[test]
fn padding_is_to_the_longest_text() {
    let tokenizer = Tokenizer::open(&stored("wordpiece"), 64).unwrap();
    let short = tokenizer.encode(&["a", "The kernel runs."]).unwrap();
    let lengths = tokenizer.lengths(&["a", "The kernel runs."]).unwrap();
    assert_eq!(short.shape(), [2, lengths[1]]);
    let names: Vec<String> = short.inputs(&["attention_mask", "input_ids"]).into_keys().collect();
    assert_eq!(names, ["attention_mask", "input_ids"]);
}

#[test]
fn byte_pieces_join_to_the_text() {
    let text = "Naïve café, 東京: it's 42 don'ts  and   spaces!";
    let tokenizer = Tokenizer::open(&stored("bytes"), 1000).unwrap();
    let ids = tokenizer.encode(&[text]).unwrap().input_ids.to_i64s();
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
}

#[test]
fn what_is_wrong_is_said() {
    let user = |result: tilewright_base::Result<Tokenizer>, word: &str| {
        let error = result.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::User);
        assert!(format!("{error:?}").contains(word), "{error:?}");
    };
    user(Tokenizer::open(Path::new("no/such/place"), 8), "tokenizer.json");
    user(Tokenizer::open(&stored("wordpiece"), 2), "no room");
    user(Tokenizer::open(&stored("wordpiece"), 0), "no room");
    user(Tokenizer::from_bytes(b"", 8), "not a tokenizer");
    user(Tokenizer::from_bytes(b"{\"version\": \"1.0\"}", 8), "not a tokenizer");
    let whole = std::fs::read(stored("bytes").join("tokenizer.json")).unwrap();
    for len in (0..whole.len()).step_by(997) {
        user(Tokenizer::from_bytes(&whole[..len], 8), "not a tokenizer");
    }
    let tokenizer = Tokenizer::open(&stored("bytes"), 8).unwrap();
    assert_eq!(tokenizer.encode(&[]).unwrap_err().kind(), Kind::User);
    assert_eq!(tokenizer.encode(&["", ""]).unwrap_err().kind(), Kind::User);
}

/// The sentence encoder's own tokenizer, whose file prescribes padding to 128: `TW_MINILM_DIR`.
#[test]
fn minilm_splits_as_transformers_does() {
    let Some(dir) = std::env::var_os("TW_MINILM_DIR").map(PathBuf::from) else {
        println!("skipped: TW_MINILM_DIR does not name the directory of all-MiniLM-L6-v2");
        return;
    };
    let texts = [
        "A cat sits on the mat.",
        "Der schnelle braune Fuchs springt über den faulen Hund, naïvely!",
        "Compilers turn tensor programs into fused kernels; 東京 42 tests.",
    ];
    let batch = Tokenizer::open(&dir, 256).unwrap().encode(&texts).unwrap();
    let file = stored("../minilm/expected.safetensors");
    let want = tilewright_import::hf::safetensors::read(&file).unwrap().tensors;
    assert_eq!(batch.input_ids, want["in.input_ids"]);
    assert_eq!(batch.attention_mask, want["in.attention_mask"]);
    assert_eq!(batch.token_type_ids, want["in.token_type_ids"]);
}
