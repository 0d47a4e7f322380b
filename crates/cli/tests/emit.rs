//! `tw inspect --emit triton`: what it prints, and what it says when it cannot.

use std::path::PathBuf;
use std::process::{Command, Output};

fn tw(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tw")).args(args).env("NO_COLOR", "1").output().unwrap()
}

fn repository(path: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path).display().to_string()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_tile_program_becomes_its_module() {
    let tile = repository("gpu/triton/softmax_f32.tile");
    let sizes = ["--set", "BR=4", "--set", "BC=1024"];
    let out = tw(&[&["inspect", "--tile", &tile, "--emit", "triton"], &sizes[..]].concat());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let expected = std::fs::read_to_string(repository("gpu/triton/softmax_f32.py")).unwrap();
    assert_eq!(text(&out.stdout).trim_end(), expected.trim_end());
}

#[test]
fn a_model_becomes_one_file_per_kernel() {
    let folder = std::env::temp_dir().join(format!("tilewright-emit-{}", std::process::id()));
    let at = folder.display().to_string();
    let digits = repository("demo/digits/digits.onnx");
    let args = ["inspect", &digits, "--emit", "triton", "--no-cache", "--kernel", "softmax"];
    let out = tw(&[&args[..], &["--out", &at]].concat());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let module = std::fs::read_to_string(folder.join("softmax.py")).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(module.contains("@triton.jit\ndef softmax(\n"), "{module}");
    assert!(module.contains("\ndef launch("), "{module}");
}

#[test]
fn mistakes_are_the_users_and_gaps_are_unsupported() {
    let tile = repository("gpu/triton/softmax_f32.tile");
    for (args, code, says) in [
        (vec!["inspect", "--emit", "triton"], 2, "neither a model nor a tile program"),
        (vec!["inspect"], 2, "no model was given"),
        (vec!["inspect", "--tile", &tile, "--emit", "triton"], 2, "tile size BR has no value"),
        (
            vec!["inspect", "--tile", &tile, "--emit", "triton", "--set", "BR=x"],
            2,
            "not a positive number",
        ),
        (
            vec![
                "inspect", "--tile", &tile, "--emit", "triton", "--set", "BR=2048", "--set",
                "BC=1024",
            ],
            3,
            "a Triton tile has at most",
        ),
    ] {
        let out = tw(&args);
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr}");
    }
}
