//! Compiles many kernels with NVRTC, on all processors, and asks that none of them spills. What was
//! compiled is kept below `target/tmp`, found again by its content: a second run compiles what changed.

use std::path::Path;
use tilewright_cuda::{Arch, CompileRequest, Nvrtc};
use tilewright_emit_cuda::Source;

/// Opens NVRTC. Without it the test says that it was skipped (`None`); with
/// `TILEWRIGHT_REQUIRE_NVRTC=1` it fails instead.
pub(crate) fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::open(Some(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvrtc"))) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            eprintln!("skipped: no NVRTC");
            None
        }
    }
}

/// Each source, with the name that failures give it, compiles and keeps its tiles in registers.
pub(crate) fn compile_without_spills(nvrtc: &Nvrtc, arch: Arch, sources: &[(String, Source)]) {
    let requests: Vec<CompileRequest> = sources
        .iter()
        .map(|(_, source)| {
            let mut request = CompileRequest::new(&source.entry, source.text.clone(), arch);
            for (header, text) in tilewright_emit_cuda::headers() {
                request = request.header(*header, *text);
            }
            request.option("-std=c++17").option("-default-device")
        })
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let compiled = nvrtc.compile_all(&requests, threads);
    let mut failures = Vec::new();
    for ((name, source), compiled) in sources.iter().zip(compiled) {
        let compiled = match compiled {
            Ok(compiled) => compiled,
            Err(error) => {
                failures.push(format!("{name}: {error}\n{:#?}", error.notes()));
                continue;
            }
        };
        let used =
            compiled.resources(&source.entry).unwrap_or_else(|| panic!("{name}: no figures"));
        let spilled = used.spill_store_bytes + used.spill_load_bytes + used.stack_bytes;
        if spilled != 0 {
            failures.push(format!("{name} for {arch} spills: {used:?}"));
        }
        // Products that the compiler lets wait for each other.
        if let Some(line) = compiled.log().lines().find(|l| l.contains("serialized")) {
            failures.push(format!("{name} for {arch}: {line}"));
        }
        if std::env::var("TILEWRIGHT_SHOW_RESOURCES").is_ok_and(|v| v == "1") {
            let injected = compiled.log().lines().filter(|l| l.contains("injected")).count();
            println!("{name}: {used:?}, {injected} injected waits");
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {} kernels:\n{}",
        failures.len(),
        sources.len(),
        failures.join("\n")
    );
}
