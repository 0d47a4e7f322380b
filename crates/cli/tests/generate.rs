//! `tw generate` from the command line, on the tiny Llama: tokens, random weights, and what it refuses.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn llama() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/hf/llama").to_string()
}

/// Runs the command with a cache of its own: the exit code and what it said.
fn tw(arguments: &[&str]) -> (Option<i32>, String) {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generate-cache");
    let out = Command::new(env!("CARGO_BIN_EXE_tw"))
        .args(["generate", "--json"])
        .args(arguments)
        .env("TILEWRIGHT_CACHE", cache)
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code(), text)
}

fn tokens(arguments: &[&str]) -> Vec<Vec<i64>> {
    let (code, text) = tw(arguments);
    assert_eq!(code, Some(0), "{arguments:?}\n{text}");
    // What is said of the times follows on the other stream.
    let line = text.lines().next().unwrap_or_default();
    let json: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(json["tokens_per_s"].as_f64().is_some_and(|t| t > 0.0), "{text}");
    serde_json::from_value(json["tokens"].clone()).unwrap()
}

#[test]
fn tokens_are_continued_as_transformers_continues_them() {
    let known = std::fs::read_to_string(format!("{}/generated.json", llama())).unwrap();
    let known: Value = serde_json::from_str(&known).unwrap();
    let expected: Vec<i64> = serde_json::from_value(known["tokens"][0].clone()).unwrap();
    let all = ["--tokens", "5,9,1,17", "--max-tokens", "10", "--ignore-eos", "--batch", "2"];
    let got = tokens(&[&[llama().as_str()], &all[..]].concat());
    assert_eq!(got, [expected.clone(), expected]);
    // Without files of weights, and drawn: the seeds decide.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("random-llama");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(format!("{}/config.json", llama()), folder.join("config.json")).unwrap();
    let folder = folder.to_str().unwrap().to_string();
    let drawn = |weights: &str, seed: &str| {
        tokens(&[
            &folder,
            "--random-weights",
            weights,
            "--tokens",
            "3,4",
            "--max-tokens",
            "12",
            "--temperature",
            "1.5",
            "--seed",
            seed,
            "--ignore-eos",
        ])
    };
    assert_eq!(drawn("1", "1"), drawn("1", "1"));
    assert_ne!(drawn("1", "1"), drawn("1", "2"));
}

#[test]
fn what_cannot_be_generated_is_said_in_words() {
    let fails = |code: i32, word: &str, arguments: &[&str]| {
        let (got, text) = tw(arguments);
        assert_eq!(got, Some(code), "{arguments:?}\n{text}");
        assert!(text.contains(word), "`{word}` is missing in {text}");
    };
    let (llama, bert) = (llama(), llama().replace("llama", "bert"));
    fails(2, "nothing to continue", &[&llama]);
    fails(2, "at least 1", &[&llama, "--tokens", "1", "--batch", "0"]);
    fails(2, "--batch 9000000000000", &[&llama, "--tokens", "1", "--batch", "9000000000000"]);
    fails(2, "--max-length", &[&llama, "--tokens", "1", "--max-tokens", "18446744073709551615"]);
    fails(2, "not the number of a token", &[&llama, "--tokens", "1,x"]);
    fails(2, "token 24", &[&llama, "--tokens", "1,24", "--max-tokens", "4"]);
    fails(2, "--temperature", &[&llama, "--tokens", "1", "--top-k", "3"]);
    fails(2, "--top-p", &[&llama, "--tokens", "1", "--temperature", "1", "--top-p", "1.5"]);
    let long = ["--tokens", "1,2,3", "--max-tokens", "9", "--max-length", "8"];
    fails(2, "11 tokens", &[&[llama.as_str()], &long[..]].concat());
    // The model itself knows 32 positions.
    fails(2, "40 tokens", &[&llama, "--tokens", "1", "--max-tokens", "40"]);
    fails(3, "generates no text", &[&bert, "--tokens", "1"]);
}

#[test]
fn positions_are_compared_with_the_interpreter() {
    let (code, text) = tw(&[&llama(), "--tokens", "5,9,1", "--verify"]);
    assert_eq!(code, Some(0), "{text}");
    let line = text.lines().next().unwrap_or_default();
    let json: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(json["positions"].as_u64().is_some_and(|n| n >= 3), "{text}");
    assert!(json["worst"].as_f64().is_some_and(|w| w < 1.0), "{text}");
}
