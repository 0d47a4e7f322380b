//! `--precision bf16` from the command line, on a small model.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn digits() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../demo/digits/digits.onnx").to_string()
}

/// Runs the command; its exit code must be 0 and its output JSON.
fn tw(cache: &Path, args: &[&str]) -> Value {
    let out = Command::new(env!("CARGO_BIN_EXE_tw"))
        .args(args)
        .arg("--json")
        .env("TILEWRIGHT_CACHE", cache)
        .output()
        .unwrap();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.status.code(), Some(0), "{args:?}\n{stdout}\n{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"))
}

fn folder(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("tilewright-precision-{name}-{}", std::process::id()))
}

/// Inside the budget of `bf16`, and outside what `f32` would have reached: the operands are rounded.
#[test]
fn verify_holds_the_wider_budget_and_f32_its_own() {
    let (cache, model) = (folder("verify"), digits());
    let error = |precision: &str| {
        let report = tw(&cache, &["verify", &model, "--precision", precision]);
        assert_eq!(report["passed"], true, "{report}");
        let output = &report["outputs"][0];
        (output["max_error"].as_f64().unwrap(), output["budget"].as_f64().unwrap())
    };
    let ((f32_error, f32_budget), (bf16_error, bf16_budget)) = (error("f32"), error("bf16"));
    assert!(bf16_error > f32_error && bf16_error > f32_budget, "{bf16_error} {f32_budget}");
    assert!(bf16_budget > f32_budget);
    std::fs::remove_dir_all(cache).unwrap();
}

/// Kernels say in what they multiply, and one precision's code is never taken for the other's.
#[test]
fn explain_names_the_precision_and_the_cache_tells_them_apart() {
    let (cache, model) = (folder("explain"), digits());
    let first_products = |precision: &str| -> Vec<String> {
        let report = tw(&cache, &["explain", &model, "--precision", precision]);
        let kernels = report["kernels"].as_array().unwrap().clone();
        let products = kernels.iter().flat_map(|k| k["products"].as_array().unwrap().clone());
        products.map(|p| p.as_str().unwrap().to_string()).collect()
    };
    // The second compiles beside the first's cache; the third comes out of it.
    for (precision, start) in [("f32", "f32 x f32"), ("bf16", "bf16 x bf16"), ("f32", "f32 x f32")]
    {
        let products = first_products(precision);
        assert!(!products.is_empty());
        assert!(products.iter().all(|p| p.starts_with(start)), "{precision}: {products:?}");
    }
    std::fs::remove_dir_all(cache).unwrap();
}
