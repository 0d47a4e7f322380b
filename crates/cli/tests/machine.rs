//! `tw machine`: what is measured, and that it is kept.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn machine(cache: &Path) -> Value {
    let out = Command::new(env!("CARGO_BIN_EXE_tw"))
        .args(["--json", "machine", "--threads", "1"])
        .env("TILEWRIGHT_CACHE", cache)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn ceilings_are_measured_once_and_kept() {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("machine-cache");
    let _ = std::fs::remove_dir_all(&cache);
    let first = machine(&cache);
    let ceilings = first["ceilings"].as_object().unwrap();
    assert_eq!(ceilings["measured"], true);
    for name in [
        "f32_flops_per_s_1_thread",
        "f32_flops_per_s",
        "memory_read_bytes_per_s",
        "memory_copy_bytes_per_s",
        "l2_read_bytes_per_s",
        "l3_read_bytes_per_s",
        "launch_s",
        "wake_s",
    ] {
        assert!(ceilings[name].as_f64().is_some_and(|v| v > 0.0), "{name}: {first}");
    }
    assert_eq!(machine(&cache), first);
}
