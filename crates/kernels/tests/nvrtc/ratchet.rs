//! What compiled kernels take of a multiprocessor, against what is written down.
//!
//! A file beside the tests has a line for each kernel:
//!
//! ```text
//! sm_90a   168 registers    214016 bytes shared   1 blocks   gemm(A bf16 row, ...): BM=128 ...
//! ```
//!
//! Registers are per thread, shared memory per block, and the last number is how many blocks fit on one
//! multiprocessor. None of them may get worse, and the file names exactly the kernels that there are.
//! What spills, needs a stack, or makes the compiler warn (products one after another, ignored registers) fails whatever the
//! file says. With `TW_BLESS=1` the file is written anew: look at the diff.
//!
//! Compiled kernels are kept below `target/tmp`, found again by their content (the device library's text is part of it).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use tilewright_cuda::{Arch, CompileRequest, Compiled, Nvrtc};
use tilewright_device::{self as device, Program, Spread};
use tilewright_emit_cuda::{COMPILER_OPTIONS, Source, headers};
use tilewright_lower_gpu::GpuSchedule;

/// A kernel under the name that it has in the file.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) arch: device::Arch,
    pub(crate) source: Source,
}

impl Entry {
    /// Emits a program, which keeps the rules.
    pub(crate) fn new(name: String, program: &Program) -> Entry {
        if let Err(e) = device::verify(program) {
            panic!("{name}: {e}\n{:#?}\n{program}", e.notes());
        }
        let source = tilewright_emit_cuda::emit(program).unwrap_or_else(|e| panic!("{name}: {e}"));
        Entry { name, arch: program.arch, source }
    }
}

/// A schedule as far as it matters to a program.
pub(crate) fn schedule_of(program: &Program, schedule: &GpuSchedule) -> String {
    let has_products = program.frags.iter().any(|(_, f)| !matches!(f.spread, Spread::Lines { .. }));
    let text = schedule.to_string();
    if has_products {
        return text;
    }
    // The rest is about products.
    let kept = text.split(' ').filter(|word| {
        let name = word.split_once('=').map_or("", |w| w.0);
        schedule.tiles.contains_key(name)
            || ["lines", "blocks"].contains(&name)
            || *word == "streams"
    });
    kept.collect::<Vec<_>>().join(" ")
}

/// One line of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    registers: u32,
    smem_bytes: u32,
    blocks: u32,
}

/// Architecture and name to figures, in the order of the file.
type Rows = BTreeMap<(String, String), Row>;

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

/// What a multiprocessor has: bytes of shared memory, threads, blocks (CUDA C++ Programming Guide, table of
/// technical specifications per compute capability).
fn limits(arch: device::Arch) -> (u32, u32, u32) {
    match arch {
        device::Arch::Sm80 => (164 << 10, 2048, 32),
        device::Arch::Sm89 => (100 << 10, 1536, 24),
        device::Arch::Sm90a => (228 << 10, 2048, 32),
    }
}

/// Blocks that fit on one multiprocessor. Registers are given to warps in portions of 256, to 4 warps at a
/// time; each block takes 1 KiB of shared memory for the system (CUDA Occupancy Calculator).
fn blocks_at_once(arch: device::Arch, threads: u32, registers: u32, smem_bytes: u32) -> u32 {
    let (smem, most_threads, most_blocks) = limits(arch);
    let warps = threads.div_ceil(32);
    let warps_at_once = 65536 / (registers.max(1) * 32).next_multiple_of(256) / 4 * 4;
    let by_smem = smem / (smem_bytes + 1024).next_multiple_of(128);
    most_blocks.min(most_threads / 32 / warps).min(warps_at_once / warps).min(by_smem)
}

fn row(entry: &Entry, compiled: &Compiled) -> Row {
    let name = &entry.name;
    let used =
        compiled.resources(&entry.source.entry).unwrap_or_else(|| panic!("{name}: no figures"));
    let smem_bytes = used.static_smem_bytes + entry.source.smem_bytes;
    let blocks = blocks_at_once(entry.arch, entry.source.threads, used.registers, smem_bytes);
    Row { registers: used.registers, smem_bytes, blocks }
}

/// What no kernel may have.
fn faults(entry: &str, compiled: &Compiled) -> Vec<String> {
    let mut out: Vec<String> = compiled.warnings.iter().map(|w| w.text.clone()).collect();
    let used = compiled.resources(entry);
    if used.is_none_or(|u| u.spill_store_bytes + u.spill_load_bytes + u.stack_bytes != 0) {
        out.push(format!("spills or needs a stack: {used:?}"));
    }
    // What is not inlined is called, through a stack.
    out.extend(
        compiled.functions.iter().filter(|f| !f.is_kernel).map(|f| format!("calls {}", f.name)),
    );
    out
}

/// Compiles on all processors; the figures, or what is wrong.
fn measure(nvrtc: &Nvrtc, entries: &[Entry]) -> (Rows, Vec<String>) {
    let requests: Vec<CompileRequest> = entries.iter().map(request).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut rows, mut wrong) = (Rows::new(), Vec::new());
    for (entry, compiled) in entries.iter().zip(nvrtc.compile_all(&requests, threads)) {
        let (arch, name) = (entry.arch.name().to_owned(), entry.name.clone());
        match compiled {
            Err(error) => wrong.push(format!("{arch} {name}: {error}\n{:#?}", error.notes())),
            Ok(compiled) => {
                let found = faults(&entry.source.entry, &compiled);
                wrong.extend(found.iter().map(|fault| format!("{arch} {name}: {fault}")));
                let before = rows.insert((arch, name), row(entry, &compiled));
                assert_eq!(before, None, "two kernels are called {}", entry.name);
            }
        }
    }
    (rows, wrong)
}

fn request(entry: &Entry) -> CompileRequest {
    let source = &entry.source;
    let arch = match entry.arch {
        device::Arch::Sm80 => Arch::SM_80,
        device::Arch::Sm89 => Arch::SM_89,
        device::Arch::Sm90a => Arch::SM_90A,
    };
    let request = CompileRequest::new(&source.entry, source.text.clone(), arch);
    let request = COMPILER_OPTIONS.iter().fold(request, |r, option| r.option(*option));
    headers().iter().fold(request, |r, (name, text)| r.header(*name, *text))
}

fn print(version: &str, rows: &Rows) -> String {
    let mut text = format!("# Resources of kernels, by NVRTC {version}. Written by TW_BLESS=1.\n");
    for ((arch, name), row) in rows {
        let Row { registers, smem_bytes, blocks } = row;
        let _ = writeln!(
            text,
            "{arch:<6} {registers:>4} registers {smem_bytes:>8} bytes shared {blocks:>3} blocks   {name}"
        );
    }
    text
}

/// The version and the rows of a file.
fn parse(text: &str) -> Option<(&str, Rows)> {
    let mut lines = text.lines();
    let version = lines.next()?.split_once("NVRTC ")?.1.split_once(". ")?.0;
    let mut rows = Rows::new();
    for line in lines {
        let (figures, name) = line.split_once(" blocks   ")?;
        let words: Vec<&str> = figures.split_whitespace().collect();
        let [arch, registers, _, smem_bytes, _, _, blocks] = words[..] else { return None };
        let [registers, smem_bytes, blocks] = [registers, smem_bytes, blocks].map(str::parse);
        let (Ok(registers), Ok(smem_bytes), Ok(blocks)) = (registers, smem_bytes, blocks) else {
            return None;
        };
        let row = Row { registers, smem_bytes, blocks };
        rows.insert((arch.to_owned(), name.to_owned()), row);
    }
    Some((version, rows))
}

/// What got worse, came or went.
fn compare(written: &Rows, measured: &Rows) -> Vec<String> {
    let mut out = Vec::new();
    for ((arch, name), now) in measured {
        match written.get(&(arch.clone(), name.clone())) {
            None => out.push(format!("{arch} {name}: a kernel that is not written down")),
            Some(then) => {
                let worse = now.registers > then.registers
                    || now.smem_bytes > then.smem_bytes
                    || now.blocks < then.blocks;
                if worse {
                    out.push(format!("{arch} {name}: {now:?}, where {then:?} is written down"));
                }
            }
        }
    }
    let gone = written.keys().filter(|key| !measured.contains_key(*key));
    out.extend(gone.map(|(arch, name)| format!("{arch} {name}: written down, and no kernel")));
    out
}

/// Compiles the kernels and compares them with the file `NAME.txt`.
pub(crate) fn keep_to(name: &str, entries: &[Entry]) {
    let Some(nvrtc) = nvrtc() else { return };
    let (rows, wrong) = measure(&nvrtc, entries);
    let (count, total) = (wrong.len(), entries.len());
    assert!(wrong.is_empty(), "{count} faults of {total} kernels:\n{}", wrong.join("\n"));
    let (major, minor) = nvrtc.version();
    let version = format!("{major}.{minor}");
    let path: PathBuf =
        [env!("CARGO_MANIFEST_DIR"), "tests", "nvrtc", &format!("{name}.txt")].iter().collect();
    if std::env::var_os("TW_BLESS").is_some_and(|v| v == "1") {
        std::fs::write(&path, print(&version, &rows)).unwrap_or_else(|e| panic!("{e}"));
        return;
    }
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let Some((by, written)) = parse(&text) else { panic!("{} is damaged", path.display()) };
    if by != version && std::env::var_os("TILEWRIGHT_REQUIRE_NVRTC").is_none() {
        eprintln!("figures not compared: they are of NVRTC {by}, this is {version}");
        return;
    }
    let found = compare(&written, &rows);
    assert!(
        found.is_empty(),
        "{} of {total} kernels against {} (NVRTC {by}, here {version}):\n{}\nif it must be, run \
         again with TW_BLESS=1 and look at the diff",
        found.len(),
        path.display(),
        found.join("\n")
    );
}

/// A warpgroup product whose accumulators are touched while it runs: the products run one after another.
const SERIALIZED: &str = r#"
extern "C" __global__ void __launch_bounds__(128)
touched(float* out, unsigned long long a, unsigned long long b) {
    float d[4] = {0, 0, 0, 0};
    asm volatile("wgmma.fence.sync.aligned;");
    for (int i = 0; i < 4; i++) {
        asm volatile("{ wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0; }"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
        d[0] += out[i];
    }
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}
"#;

/// More values alive at once than 64 registers hold.
const SPILL: &str = r#"
extern "C" __global__ void __launch_bounds__(1024) spill(float* c) {
    float v[200];
    #pragma unroll
    for (int i = 0; i < 200; i++) v[i] = c[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 200; i++) c[(199 - i) * 1024 + threadIdx.x] = v[i] * v[(i * 7) % 200];
}
"#;

#[test]
fn what_costs_speed_is_a_fault() {
    let Some(nvrtc) = nvrtc() else { return };
    let faults_of = |entry: &str, text: &str| {
        let compiled = nvrtc.compile(&CompileRequest::new(entry, text, Arch::SM_90A)).unwrap();
        faults(entry, &compiled)
    };
    let serialized = faults_of("touched", SERIALIZED);
    let words = "wgmma.mma_async instructions are serialized";
    assert!(serialized.iter().any(|fault| fault.contains(words)), "{serialized:?}");
    let spill = faults_of("spill", SPILL);
    assert!(spill.len() == 1 && spill[0].contains("spills"), "{spill:?}");
    let plain = "extern \"C\" __global__ void plain(float* c) { c[threadIdx.x] = 1; }";
    assert!(faults_of("plain", plain).is_empty());
}

#[test]
fn figures_may_only_get_better() {
    let row = Row { registers: 100, smem_bytes: 2000, blocks: 2 };
    let one = |row: Row| Rows::from([(("sm_80".to_owned(), "a: b   c".to_owned()), row)]);
    let written = one(row);
    assert_eq!(parse(&print("13.0", &written)), Some(("13.0", written.clone())));
    assert_eq!(parse("nonsense"), None);
    for (now, found) in [
        (row, 0),
        (Row { registers: 99, smem_bytes: 1999, blocks: 3 }, 0),
        (Row { registers: 101, ..row }, 1),
        (Row { smem_bytes: 2001, ..row }, 1),
        (Row { blocks: 1, ..row }, 1),
    ] {
        assert_eq!(compare(&written, &one(now)).len(), found, "{now:?}");
    }
    assert_eq!(compare(&Rows::new(), &written).len(), 1);
    assert_eq!(compare(&written, &Rows::new()).len(), 1);
}

/// Rows of NVIDIA's occupancy calculator.
#[test]
fn blocks_at_once_are_those_of_the_calculator() {
    use device::Arch::{Sm80, Sm89, Sm90a};
    for (arch, threads, registers, smem_bytes, blocks) in [
        (Sm80, 256, 32, 0, 8),
        (Sm80, 256, 33, 0, 6),
        (Sm80, 128, 255, 0, 2),
        (Sm89, 256, 32, 0, 6),
        (Sm89, 128, 64, 48 << 10, 2),
        (Sm90a, 384, 168, 200 << 10, 1),
        (Sm90a, 32, 16, 0, 32),
        (Sm90a, 1024, 64, 0, 1),
    ] {
        let got = blocks_at_once(arch, threads, registers, smem_bytes);
        assert_eq!(got, blocks, "{threads} threads, {registers} registers, {smem_bytes} bytes");
    }
}
