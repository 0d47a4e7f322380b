//! The command on wrong and extreme input: exit codes, messages, and what is left on disk.
//!
//! Each test runs the binary as a user would. [`Said::fails`] is the contract: the right exit code, the
//! words that help, no panic. Models are written by [`onnx`], a few lines of protobuf.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A folder of its own, gone at the end.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Temp {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tilewright-cli-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Temp(path)
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_string()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the command said.
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Said {
    /// Ended with this code, and its errors contain all these words.
    #[track_caller]
    fn fails(&self, code: i32, words: &[&str]) {
        self.is_calm();
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is missing in:\n{}", self.stderr);
        }
    }

    #[track_caller]
    fn succeeds(&self) {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
    }

    /// Neither crashed nor owned up to a bug.
    #[track_caller]
    fn is_calm(&self) {
        assert!(matches!(self.code, Some(0 | 2 | 3)), "{:?}\n{}", self.code, self.stderr);
        for word in ["panicked", "internal error", "RUST_BACKTRACE", "bug of Tilewright"] {
            assert!(!self.stderr.contains(word), "{}", self.stderr);
        }
    }
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tw"));
    // One cache for all tests, beside the build: the next run compiles only what has changed.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    command.env("TILEWRIGHT_CACHE", cache).env("NO_COLOR", "1");
    command
}

fn said(command: &mut Command) -> Said {
    let out = command.stdin(Stdio::null()).output().unwrap();
    Said {
        code: out.status.code(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

fn tw(args: &[&str]) -> Said {
    said(command().args(args))
}

fn digits() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../demo/digits/digits.onnx").to_string()
}

/// ONNX files by hand: protobuf fields by number.
mod onnx {
    fn varint(mut v: u64) -> Vec<u8> {
        let mut out = Vec::new();
        loop {
            let byte = (v & 0x7f) as u8;
            v >>= 7;
            out.push(if v == 0 { byte } else { byte | 0x80 });
            if v == 0 {
                return out;
            }
        }
    }

    fn number(field: u64, v: u64) -> Vec<u8> {
        [varint(field << 3), varint(v)].concat()
    }

    fn bytes(field: u64, data: impl AsRef<[u8]>) -> Vec<u8> {
        let data = data.as_ref();
        [varint(field << 3 | 2), varint(data.len() as u64), data.to_vec()].concat()
    }

    /// A size: a number or a name.
    pub(super) enum Size {
        Is(u64),
        Named(&'static str),
    }

    pub(super) fn node(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
        let list = |field, names: &[&str]| {
            names.iter().map(|n| bytes(field, n)).collect::<Vec<_>>().concat()
        };
        let node = [list(1, inputs), list(2, outputs), bytes(3, name), bytes(4, op)].concat();
        bytes(1, node)
    }

    fn tensor_head(name: &str, shape: &[u64]) -> Vec<u8> {
        let dims: Vec<Vec<u8>> = shape.iter().map(|d| number(1, *d)).collect();
        [dims.concat(), number(2, 1), bytes(8, name)].concat()
    }

    pub(super) fn weight(name: &str, shape: &[u64], values: &[f32]) -> Vec<u8> {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        bytes(5, [tensor_head(name, shape), bytes(9, raw)].concat())
    }

    pub(super) fn integers(name: &str, values: &[i64]) -> Vec<u8> {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let head = [number(1, values.len() as u64), number(2, 7), bytes(8, name)].concat();
        bytes(5, [head, bytes(9, raw)].concat())
    }

    pub(super) fn outside_weight(name: &str, shape: &[u64], file: &str) -> Vec<u8> {
        let entry = [bytes(1, "location"), bytes(2, file)].concat();
        bytes(5, [tensor_head(name, shape), bytes(13, entry), number(14, 1)].concat())
    }

    fn value(field: u64, name: &str, shape: &[Size]) -> Vec<u8> {
        let dims: Vec<Vec<u8>> = shape
            .iter()
            .map(|s| match s {
                Size::Is(n) => bytes(1, number(1, *n)),
                Size::Named(name) => bytes(1, bytes(2, name)),
            })
            .collect();
        let tensor = [number(1, 1), bytes(2, dims.concat())].concat();
        bytes(field, [bytes(1, name), bytes(2, bytes(1, tensor))].concat())
    }

    pub(super) fn input(name: &str, shape: &[Size]) -> Vec<u8> {
        value(11, name, shape)
    }

    pub(super) fn output(name: &str, shape: &[Size]) -> Vec<u8> {
        value(12, name, shape)
    }

    pub(super) fn model(parts: &[Vec<u8>]) -> Vec<u8> {
        let graph = [bytes(2, "small"), parts.concat()].concat();
        [number(1, 8), bytes(7, graph), bytes(8, number(2, 17))].concat()
    }
}

use onnx::Size::{Is, Named};

/// `y = x + w` for `x` of shape `[N, 4]`.
fn add_model(weights: &[f32; 4]) -> Vec<u8> {
    onnx::model(&[
        onnx::node("Add", "sum", &["x", "w"], &["y"]),
        onnx::weight("w", &[4], weights),
        onnx::input("x", &[Named("N"), Is(4)]),
        onnx::output("y", &[Named("N"), Is(4)]),
    ])
}

/// A NumPy file of this header and data.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

#[test]
fn files_that_are_no_models() {
    let temp = Temp::new();
    tw(&["run", "/nowhere/model.onnx"]).fails(2, &["/nowhere/model.onnx"]);
    for (name, bytes) in [
        ("empty.onnx", &b""[..]),
        ("text.onnx", b"hello, this is no model\n"),
        ("picture.onnx", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
        ("zeros.onnx", &[0; 1000]),
        ("ones.onnx", &[0xff; 1000]),
        ("binary.tw", &[0xff, 0xfe, 0, 1]),
        ("text.tw", b"graph {{{"),
    ] {
        tw(&["run", &temp.file(name, bytes)]).fails(2, &[name]);
    }
    tw(&["run", temp.0.to_str().unwrap()]).fails(2, &[]);
    temp.file("config.json", "{\"model_type\": ");
    tw(&["run", temp.0.to_str().unwrap()]).fails(2, &["config.json"]);
}

#[test]
fn damaged_models_are_refused_or_run() {
    let temp = Temp::new();
    let whole = std::fs::read(digits()).unwrap();
    for i in 0..24 {
        let cut = whole.len() * i / 24;
        let said = tw(&["run", &temp.file("cut.onnx", &whole[..cut])]);
        said.is_calm();
        assert_ne!(said.code, Some(0), "cut at {cut} of {}", whole.len());
    }
    // Flips in the weights change numbers only; elsewhere they must be noticed or harmless.
    let mut state = 12345u32;
    for _ in 0..40 {
        let mut bytes = whole.clone();
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        // Half of them in the first part, where the structure is.
        let range = if state & 1 == 0 { whole.len().min(2000) } else { whole.len() };
        let at = (state >> 8) as usize % range;
        bytes[at] ^= 1 << (state >> 4 & 7);
        tw(&["run", &temp.file("flipped.onnx", bytes)]).is_calm();
    }
}

#[test]
fn external_data_that_is_missing_or_short() {
    let temp = Temp::new();
    let model = onnx::model(&[
        onnx::node("Add", "sum", &["x", "w"], &["y"]),
        onnx::outside_weight("w", &[4], "weights.bin"),
        onnx::input("x", &[Is(2), Is(4)]),
        onnx::output("y", &[Is(2), Is(4)]),
    ]);
    let path = temp.file("model.onnx", model);
    tw(&["run", &path]).fails(2, &["weights.bin"]);
    temp.file("weights.bin", [0; 7]);
    tw(&["run", &path]).fails(2, &["weights.bin"]);
    temp.file("weights.bin", [0; 16]);
    tw(&["run", &path]).succeeds();
}

#[test]
fn all_unknown_operators_are_listed_at_once() {
    let temp = Temp::new();
    let model = onnx::model(&[
        onnx::node("Frobnicate", "first", &["x"], &["a"]),
        onnx::node("Relu", "between", &["a"], &["b"]),
        onnx::node("Wobble", "second", &["b"], &["c"]),
        onnx::node("Frobnicate", "third", &["c"], &["y"]),
        onnx::input("x", &[Is(2), Is(4)]),
        onnx::output("y", &[Is(2), Is(4)]),
    ]);
    let path = temp.file("model.onnx", model);
    tw(&["run", &path]).fails(3, &["Frobnicate", "Wobble", "first"]);
    let said = tw(&["verify", &path, "--json"]);
    said.fails(3, &[]);
    let text = &said.stdout;
    assert!(text.contains("\"kind\":\"unsupported\"") && text.contains("Wobble"), "{text}");
}

#[test]
fn inputs_that_do_not_fit() {
    let temp = Temp::new();
    let model = temp.file("model.onnx", add_model(&[1.0; 4]));
    let file = |descr, shape, bytes: usize| temp.file("x.npy", npy(descr, shape, &vec![0; bytes]));
    let run = |path: &str| tw(&["run", &model, "--input", &format!("x={path}")]);
    run(&file("<f4", "(3, 4)", 48)).succeeds();
    run(&file("<f8", "(3, 4)", 96)).fails(2, &["`x`", "f64", "f32"]);
    run(&file("<f4", "(3, 5)", 60)).fails(2, &["`x`", "5", "4"]);
    run(&file("<f4", "(12,)", 48)).fails(2, &["`x`"]);
    run(&file("<f4", "(3, 4)", 40)).fails(2, &["x.npy"]);
    run(&file("<f4", "(1099511627776, 1099511627776)", 40)).fails(2, &["x.npy"]);
    run(&file("<c8", "(3, 4)", 96)).fails(3, &["x.npy"]);
    run(&temp.file("x.npy", "no array")).fails(2, &["x.npy"]);
    run("/nowhere.npy").fails(2, &["/nowhere.npy"]);
    let x = file("<f4", "(3, 4)", 48);
    tw(&["run", &model, "--input", &format!("z={x}")]).fails(2, &["`z`", "x"]);
    tw(&["run", &model, "--input", &x]).fails(2, &["NAME=VALUE"]);
}

#[test]
fn sizes_outside_their_range() {
    let temp = Temp::new();
    let model = temp.file("model.onnx", add_model(&[1.0; 4]));
    let run = |dim: &str| tw(&["run", &model, "--dim", dim]);
    run("N=5").succeeds();
    run("N=-1").fails(2, &["N"]);
    run("M=5").fails(2, &["`M`", "N"]);
    run("N=many").fails(2, &["many"]);
    run("N=99999999999999999999").fails(2, &["99999999999999999999"]);
    run("N").fails(2, &["NAME=VALUE"]);
    // 2^33 elements and more: memory is asked for first.
    run("N=2147483648").fails(2, &["N"]);
    run("N=4611686018427387904").fails(2, &["N"]);
    tw(&["bench", &digits(), "--dim", "N=134217728"]).fails(2, &["N"]);
}

/// Rows of three of `N` elements are there for some `N` only.
#[test]
fn sizes_that_a_reshape_does_not_divide() {
    let dir = Temp::new();
    let shape = onnx::integers("shape", &[3, -1]);
    let model = onnx::model(&[
        onnx::node("Reshape", "rows", &["x", "shape"], &["y"]),
        shape,
        onnx::input("x", &[Named("N")]),
        onnx::output("y", &[Is(3), Named("M")]),
    ]);
    let path = dir.file("rows.onnx", model);
    tw(&["run", &path, "--dim", "N=6"]).succeeds();
    for command in ["run", "verify", "bench"] {
        let said = tw(&[command, &path, "--dim", "N=7"]);
        said.fails(2, &["rows", "[7] has 7 elements", "[3,2] has 6"]);
    }
}

#[test]
fn more_threads_than_there_can_be() {
    tw(&["run", &digits(), "--threads", "1000000"]).fails(2, &["1000000 threads"]);
}

#[test]
fn counts_and_times_that_are_none() {
    let model = digits();
    for value in ["nan", "-1", "soon"] {
        let flag = format!("--seconds={value}");
        tw(&["bench", &model, &flag]).fails(2, &["--seconds", "not a number of seconds"]);
        tw(&["tune", "model", &model, &flag]).fails(2, &["--seconds", "not a number of seconds"]);
    }
    tw(&["bench", &model, "--seconds", "inf", "--runs", "1"]).succeeds();
    for args in [
        &["bench", &model, "--runs", "0"][..],
        &["explain", &model, "--runs", "0"],
        &["expr", "x + 1", "--bench", "0"],
    ] {
        tw(args).fails(2, &["at least 1"]);
    }
}

#[test]
fn random_weights_that_no_memory_holds() {
    let temp = Temp::new();
    let bert = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/hf/bert/config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(bert).unwrap()).unwrap();
    config["hidden_size"] = 16_777_216.into();
    temp.file("config.json", config.to_string());
    let said = tw(&["run", temp.0.to_str().unwrap(), "--random-weights", "1"]);
    said.fails(2, &["out of memory", "has no room"]);
}

#[test]
fn kernels_that_a_model_does_not_have() {
    for what in [&["--stage", "tile"][..], &["--stage", "asm"], &["--emit", "triton"]] {
        let said = tw(&[&["inspect", &digits(), "--kernel", "frob"], what].concat());
        said.fails(2, &["`frob`", "softmax"]);
    }
    tw(&["inspect", &digits(), "--kernel", "softmax", "--stage", "asm"]).succeeds();
    tw(&["edges", "--device", "cpu"]).fails(2, &["runs on a GPU"]);
}

/// A pipe or a device that is named as an output is written to, not replaced by a file.
#[test]
fn outputs_that_are_no_files_stay_what_they_are() {
    let temp = Temp::new();
    let said = tw(&["explain", &digits(), "--runs", "1", "--html", "/dev/stdout"]);
    said.succeeds();
    assert!(said.stdout.contains("</html>"), "{}", said.stdout);
    let pipe = temp.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    tw(&["explain", &digits(), "--runs", "1", "--html", &pipe]).succeeds();
    assert!(String::from_utf8(reader.join().unwrap()).unwrap().contains("</html>"));
    let kind = std::fs::metadata(&pipe).unwrap().file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_fifo(&kind));
}

#[test]
fn empty_tensors() {
    let temp = Temp::new();
    let model = temp.file("model.onnx", add_model(&[1.0; 4]));
    let said = tw(&["run", &model, "--dim", "N=0"]);
    said.is_calm();
    let fixed = onnx::model(&[
        onnx::node("Relu", "r", &["x"], &["y"]),
        onnx::input("x", &[Is(0), Is(4)]),
        onnx::output("y", &[Is(0), Is(4)]),
    ]);
    let fixed = temp.file("fixed.onnx", fixed);
    for command in ["run", "verify", "bench", "explain"] {
        let said = tw(&[command, &fixed]);
        said.succeeds();
    }
}

#[test]
fn weights_that_are_no_numbers_pass_through() {
    let temp = Temp::new();
    let weights = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0];
    let model = temp.file("model.onnx", add_model(&weights));
    let out = temp.path("out");
    tw(&["run", &model, "--output", &out]).succeeds();
    let bytes = std::fs::read(Path::new(&out).join("y.npy")).unwrap();
    let values: Vec<f32> = bytes[bytes.len() - 16..]
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert!(values[0].is_nan() && values[1] == f32::INFINITY && values[2] == f32::NEG_INFINITY);
    assert!(values[3].is_finite());
    tw(&["verify", &model]).succeeds();
}

#[test]
fn caches_that_cannot_be_used_are_a_warning() {
    let temp = Temp::new();
    let file = temp.file("cache", "a file where the folder should be");
    for cache in [file.as_str(), "/dev/full", "/proc/nowhere"] {
        let said = tw(&["run", &digits(), "--cache", cache]);
        said.succeeds();
        assert!(said.stderr.contains("cannot be written"), "{}", said.stderr);
    }
    // Half an entry is no entry.
    let cache = temp.path("good");
    let run = || tw(&["run", &digits(), "--cache", &cache, "--json"]);
    run().succeeds();
    let mut objects = 0;
    let mut folders = vec![PathBuf::from(&cache)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "o") {
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
                objects += 1;
            }
        }
    }
    assert!(objects > 0);
    let again = run();
    again.succeeds();
    assert!(again.stdout.contains("\"cache_hits\":0"), "{}", again.stdout);
}

#[test]
fn output_files_appear_whole_or_not_at_all() {
    let temp = Temp::new();
    let file = temp.file("file", "in the way");
    tw(&["run", &digits(), "--output", &file]).fails(2, &[&file]);
    tw(&["run", &digits(), "--output", &format!("{file}/below")]).fails(2, &[&file]);
    tw(&["explain", &digits(), "--html", "/nowhere/page.html"]).fails(2, &["/nowhere/page.html"]);
    tw(&["explain", &digits(), "--html", temp.0.to_str().unwrap()]).fails(2, &[]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "in the way");
    let names: Vec<_> =
        std::fs::read_dir(&temp.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["file"], "nothing half-written is left");
    let page = temp.path("page.html");
    tw(&["explain", &digits(), "--html", &page]).succeeds();
    let text = std::fs::read_to_string(&page).unwrap();
    assert!(text.starts_with("<!DOCTYPE html>") && text.ends_with("</html>"));
}

#[test]
fn nobody_reads_the_output() {
    let mut child = command()
        .args(["inspect", &digits(), "--stage", "llvm"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    // A full disk under the output is an error.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let out =
        command().args(["expr", "1 + 1"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("cannot write the result"));
}

#[test]
fn errors_as_json_have_one_shape() {
    for (args, code, kind) in [
        (&["run", "/nowhere.onnx", "--json"][..], 2, "user"),
        (&["expr", "1 +", "--json"], 2, "user"),
        (&["run", "--json"], 2, "user"),
        (&["frobnicate", "--json"], 2, "user"),
        (&["expr", "1", "--dtype", "f7", "--json"], 2, "user"),
    ] {
        let said = tw(args);
        said.fails(code, &[]);
        let value: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        let error = &value["error"];
        assert_eq!(error["kind"], kind, "{args:?}");
        assert_eq!(error["exit_code"], code, "{args:?}");
        assert!(!error["message"].as_str().unwrap().is_empty(), "{args:?}");
        for key in ["notes", "hint", "span"] {
            assert!(error.get(key).is_some(), "{args:?} {key}");
        }
    }
    let said = tw(&["expr", "1 + * 2", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(value["error"]["span"]["start"], 4);
}

#[test]
fn formulas_and_their_values() {
    let value = |args: &[&str]| {
        let said = tw(&[&["expr"], args].concat());
        said.succeeds();
        said.stdout.trim().to_string()
    };
    assert_eq!(value(&["x * 2 + y / 3", "x=4", "y=9"]), "11");
    assert_eq!(value(&["x * 2 + y", "x=1,2,3", "y=0.5", "--dtype", "f32"]), "[2.5, 4.5, 6.5]");
    assert_eq!(value(&["x / 2 + 7", "x:i32=9"]), "11");
    assert_eq!(value(&["x + 1", "x=255", "--dtype", "u8"]), "0");
    assert_eq!(
        value(&["x + 1", "x=18446744073709551614", "--dtype", "u64"]),
        "18446744073709551615"
    );
    assert_eq!(value(&["x < y", "x=1", "y=2"]), "true");
    assert_eq!(value(&["x + 1", "x=7", "--dtype", "i4"]), "-8");
    assert_eq!(value(&["1 / x", "x=0", "--json"]), r#"{"dtype":"f64","value":"inf"}"#);
    assert_eq!(value(&["x * x", "--emit", "derivative"]), "d/dx = { x -> x + x }");
    for stage in ["tokens", "ast", "func", "llvm", "asm", "cuda", "triton"] {
        assert!(!value(&["gelu(x) * y", "--emit", stage]).is_empty(), "{stage}");
    }
    assert!(value(&["x * 2 + y", "--bench", "10000"]).contains("compiled, 1 thread"));
    for (args, words) in [
        (&["x + 1", "x=256", "--dtype", "u8"][..], &["u8 reaches from 0 to 255"][..]),
        (&["x + 1", "y=2"], &["no variable `y`"]),
        (&["x + 1"], &["no value for x", "x=1"]),
        (&["x + y", "x=1,2", "y=1,2,3"], &["2", "3"]),
        (&["x", "x=one"], &["not a number"]),
        (&["x", "x"], &["NAME=VALUE"]),
        (&["x + 1", "--bench", "8589934592000"], &["out of memory"]),
    ] {
        tw(&[&["expr"], args].concat()).fails(2, words);
    }
}
