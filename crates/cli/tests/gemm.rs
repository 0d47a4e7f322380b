//! `tw inspect gemm`, `tw tune gemm`, `tw bench gemm`: what can be said without a GPU, and how mistakes end.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// The command, with no GPU, compiler or cache but those given.
fn tw(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tw"));
    command.args(args).env("NO_COLOR", "1").env("CUDA_VISIBLE_DEVICES", "");
    command.env("TILEWRIGHT_CACHE", scratch("empty"));
    command.envs(environment.iter().copied());
    command.output().unwrap()
}

fn scratch(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("gemm-{}-{name}", std::process::id()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn printed(args: &[&str]) -> String {
    let out = tw(args, &[]);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

#[track_caller]
fn fails(args: &[&str], environment: &[(&str, &str)], code: i32, says: &str) {
    let out = tw(args, environment);
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {error}");
    assert!(error.contains(says), "{args:?}: {error}");
    assert!(!error.contains("panicked") && !error.contains("internal error"), "{error}");
}

#[test]
fn every_stage_that_needs_no_gpu_is_printed() {
    let stage =
        |name| printed(&["inspect", "gemm", "704", "520", "304", "--emit", name, "--untuned"]);
    assert!(stage("tile").starts_with("kernel @gemm(%A: bf16[M,K]"));
    let device = stage("device");
    assert!(device.starts_with("device @gemm(") && device.contains("smem sA"), "{device}");
    let cuda = stage("cuda");
    assert!(cuda.contains("#include \"tw/wgmma.cuh\"") && cuda.contains("__global__"), "{cuda}");
    let schedule = stage("schedule");
    assert!(schedule.contains("bf16 704x520x304 rrr on NVIDIA H200: picked by the time model"));
    assert_eq!(schedule.lines().filter(|l| l.contains("us estimated")).count(), 5, "{schedule}");
    assert_eq!(printed(&["inspect", "gemm", "704", "520", "304", "--untuned"]), schedule);
}

#[test]
fn kinds_orders_batches_and_json_are_understood() {
    let args =
        ["inspect", "gemm", "64", "96", "128", "--type", "f16,e4m3,f32x3,i8", "--batch", "3"];
    let rest = ["--order", "rcr", "--top", "2", "--untuned", "--json"];
    let out = printed(&[&args[..], &rest[..]].concat());
    let value: Value = serde_json::from_str(&out).unwrap();
    let names: Vec<&str> =
        value.as_array().unwrap().iter().map(|v| v["product"].as_str().unwrap()).collect();
    let expected = ["f16", "f8", "f32x3", "i8"].map(|name| format!("{name} 64x96x128 x3 rcr"));
    assert_eq!(names, expected);
    for product in value.as_array().unwrap() {
        assert_eq!(product["candidates"].as_array().unwrap().len(), 2);
        assert!(product["candidates"][0]["estimate_us"].as_f64().unwrap() > 0.0);
        assert!(product["record"].is_null());
    }
}

#[test]
fn mistakes_are_the_users_and_what_is_missing_is_unsupported() {
    fails(&["inspect", "gemm", "64", "64"], &[], 2, "which product is missing");
    fails(&["inspect", "gemm", "0", "64", "64"], &[], 2, "M = 0 is not a size");
    fails(&["inspect", "gemm", "64", "99999999999", "64"], &[], 2, "N = 99999999999");
    fails(&["inspect", "gemm", "-4", "64", "64"], &[], 2, "-4");
    fails(&["inspect", "gemm", "x", "64", "64"], &[], 2, "invalid value 'x'");
    fails(&["inspect", "gemm", "64", "64", "64", "--type", "bf17"], &[], 2, "bf17");
    fails(&["inspect", "gemm", "64", "64", "64", "--order", "rx"], &[], 2, "`rx` are no orders");
    fails(&["inspect", "gemm", "64", "64", "64", "--emit", "wasm"], &[], 2, "wasm");
    fails(&["inspect", "gemm", "--shapes", "/nowhere/list"], &[], 2, "cannot be read");
    fails(&["tune", "gemm", "64", "64", "64", "--seconds", "-1"], &[], 2, "-1");
    fails(&["tune", "gemm", "64", "64", "64", "--seconds", "nan"], &[], 2, "number of seconds");
    fails(&["bench", "gemm", "64", "64", "64", "--seconds", "1e9"], &[], 2, "number of seconds");
    fails(&["bench"], &[], 2, "no model was given");
    let list = scratch("list");
    std::fs::write(&list, "bf16 64 64 64\nbf16 64 y 64\n").unwrap();
    let name = list.to_str().unwrap();
    fails(&["tune", "gemm", "--shapes", name], &[], 2, "`y` is not a size");
    std::fs::remove_file(&list).unwrap();
    // No device is visible here, whether there is a driver or not.
    fails(&["tune", "gemm", "64", "64", "64"], &[], 3, "GPU");
    fails(&["bench", "gemm", "64", "64", "64"], &[], 3, "GPU");
    // No compiler where the user says it is.
    let nowhere = [("TILEWRIGHT_NVRTC", "/nowhere/libnvrtc.so")];
    for stage in ["ptx", "sass"] {
        let args = ["inspect", "gemm", "64", "64", "64", "--emit", stage];
        fails(&args, &nowhere, 2, "/nowhere/libnvrtc.so");
    }
}

#[test]
fn a_damaged_record_is_a_warning_and_the_model_picks() {
    use tilewright_kernels::gemm::{Device, Key, Problem, Record};
    let folder = scratch("records");
    let problem =
        Problem::dense(640, 640, 640, tilewright_base::DType::BF16, tilewright_base::DType::BF16);
    let device = Device::of(&tilewright_target::Gpu::h200());
    let path = Record::path(&folder, &device, &Key::of(&problem));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "{\"format\": 1").unwrap();
    let at = folder.to_str().unwrap();
    let args = ["inspect", "gemm", "640", "640", "640", "--records", at];
    let out = tw(&args, &[]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("is not used: no record"), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("picked by the time model"), "{}", text(&out.stdout));
    let silent = tw(&[&args[..], &["--untuned"]].concat(), &[]);
    assert_eq!(text(&silent.stderr), "");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn machine_code_is_printed_where_the_compiler_is() {
    if tilewright_cuda::Nvrtc::open(None).is_err() {
        assert!(std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_err());
        println!("skipped: no NVRTC");
        return;
    }
    let stage = |name| ["inspect", "gemm", "640", "640", "640", "--untuned", "--emit", name];
    assert!(printed(&stage("ptx")).contains("wgmma.mma_async"));
    let out = tw(&stage("sass"), &[]);
    match out.status.code() {
        Some(0) => assert!(text(&out.stdout).contains("HGMMA"), "{}", text(&out.stdout)),
        code => {
            assert!(code == Some(3) && text(&out.stderr).contains("nvdisasm was not found"));
        }
    }
    fails(&stage("sass"), &[("TILEWRIGHT_NVDISASM", "/nowhere/nvdisasm")], 2, "/nowhere/nvdisasm");
}
