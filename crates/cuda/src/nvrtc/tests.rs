//! Compiling for real. Without NVRTC these tests say that they were skipped; with
//! `TILEWRIGHT_REQUIRE_NVRTC=1` (which `make test` sets) they fail instead.

use super::*;
use std::fs;

const ADD: &str = r#"
#include "scale.cuh"
extern "C" __global__ void add(float* a, const float* b, int n) {
    __shared__ float staged[64];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    staged[threadIdx.x] = b[i];
    __syncthreads();
    if (i < n) a[i] += SCALE * staged[63 - threadIdx.x];
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

/// A warpgroup product whose accumulators are touched while it runs.
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

/// `setmaxnreg` in a kernel whose number of threads the compiler does not know.
const REGISTERS: &str = r#"
extern "C" __global__ void registers(float* out) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    out[threadIdx.x] = 1;
}
"#;

fn nvrtc(cache: Option<&Path>) -> Option<Nvrtc> {
    match Nvrtc::open(cache) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            eprintln!("skipped: no NVRTC");
            None
        }
    }
}

fn add(arch: Arch) -> CompileRequest {
    CompileRequest::new("add", ADD, arch).header("scale.cuh", "#define SCALE 2.0f")
}

fn temp(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("tilewright-nvrtc-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    dir
}

#[test]
fn a_kernel_compiles_for_each_architecture() {
    let Some(nvrtc) = nvrtc(None) else { return };
    let archs = [Arch::SM_80, Arch::SM_89, Arch::SM_90A, Arch::SM_100A];
    let requests = archs.map(add);
    for (arch, result) in archs.iter().zip(nvrtc.compile_all(&requests, 2)) {
        let compiled = result.unwrap();
        assert_eq!(compiled.arch(), *arch);
        // The code's own head names the architecture, without its letter.
        let plain: Arch = arch.to_string().trim_end_matches('a').parse().unwrap();
        assert_eq!(Arch::of_cubin(compiled.cubin()), Some(plain));
        let cut = &compiled.cubin()[..compiled.cubin().len() - 1];
        assert_eq!(Arch::of_cubin(cut), None, "a cut-off file");
        assert!(compiled.ptx().contains(&format!(".target {arch}")));
        let add = compiled.resources("add").unwrap();
        assert!(add.is_kernel && add.registers > 0 && add.barriers == 1, "{add:?}");
        assert_eq!((add.static_smem_bytes, add.spill_store_bytes), (256, 0));
        assert!(compiled.warnings.is_empty() && !compiled.from_cache);
        assert!(format!("{compiled:?}").contains("Compiled"));
    }
}

#[test]
fn spills_are_counted() {
    let Some(nvrtc) = nvrtc(None) else { return };
    let compiled = nvrtc.compile(&CompileRequest::new("spill", SPILL, Arch::SM_90A)).unwrap();
    let spill = compiled.resources("spill").unwrap();
    assert_eq!(spill.registers, 64);
    assert!(spill.spill_store_bytes > 0 && spill.spill_load_bytes > 0, "{spill:?}");
    assert!(spill.stack_bytes >= spill.spill_store_bytes / 2, "{spill:?}");
}

#[test]
fn products_in_a_row_and_ignored_registers_are_recognised() {
    let Some(nvrtc) = nvrtc(None) else { return };
    let compile = |text| nvrtc.compile(&CompileRequest::new("k", text, Arch::SM_90A)).unwrap();
    let serialized = compile(SERIALIZED);
    let warning = serialized.warning(WarningKind::WgmmaSerialized).unwrap();
    assert_eq!(warning.function.as_deref(), Some("touched"));
    assert!(warning.code.as_deref().is_some_and(|code| code.starts_with("C75")), "{warning:?}");
    let registers = compile(REGISTERS);
    let warning = registers.warning(WarningKind::SetmaxnregIgnored).unwrap();
    assert!(warning.code.is_some(), "{warning:?}");
    assert!(compile(SPILL).warnings.is_empty());
}

#[test]
fn the_cache_gives_the_same_module_and_repairs_itself() {
    let dir = temp("cache");
    let Some(nvrtc) = nvrtc(Some(&dir)) else { return };
    let first = nvrtc.compile(&add(Arch::SM_90A)).unwrap();
    let second = nvrtc.compile(&add(Arch::SM_90A)).unwrap();
    assert_eq!((first.from_cache, second.from_cache), (false, true));
    assert_eq!(first.output, second.output);
    assert_eq!((&first.functions, &first.warnings), (&second.functions, &second.warnings));
    let folder = second.keep().unwrap();
    assert!(folder.starts_with(&dir));
    assert_eq!(fs::read_to_string(folder.join("kernel.cu")).unwrap(), ADD);
    assert_eq!(fs::read_to_string(folder.join("include/scale.cuh")).unwrap(), "#define SCALE 2.0f");
    fs::write(folder.join("kernel.cubin"), b"damaged").unwrap();
    let third = nvrtc.compile(&add(Arch::SM_90A)).unwrap();
    assert!(!third.from_cache);
    assert_eq!(first.output, third.output, "the same text gives the same bytes");
    assert!(nvrtc.compile(&add(Arch::SM_90A)).unwrap().from_cache);
    assert!(!nvrtc.compile(&add(Arch::SM_80)).unwrap().from_cache);
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_cache_that_cannot_be_written_is_no_failure() {
    let file = temp("file");
    fs::write(&file, "a file where the folder should be").unwrap();
    let Some(nvrtc) = nvrtc(Some(&file)) else { return };
    let compiled = nvrtc.compile(&add(Arch::SM_80)).unwrap();
    assert!(compiled.cache_failure.as_deref().is_some_and(|e| e.contains("cannot be written")));
    // Its files can be had all the same.
    assert!(compiled.keep().unwrap().join("kernel.cubin").exists());
    fs::remove_file(file).unwrap();
}

#[test]
fn a_text_that_does_not_compile_keeps_its_log_and_its_place() {
    let Some(nvrtc) = nvrtc(None) else { return };
    let requests = [
        CompileRequest::new("bad", "__global__ void k() { x = 1; }", Arch::SM_80),
        add(Arch::SM_80),
        CompileRequest::new(
            "bad",
            "extern \"C\" __global__ void k() { asm(\"bogus.op;\"); }",
            Arch::SM_80,
        ),
        add(Arch::SM_80).option("--no-such-option"),
        CompileRequest::new("bad", "zero \0 byte", Arch::SM_80),
        add("sm_21".parse().unwrap()),
    ];
    let results = nvrtc.compile_all(&requests, 3);
    let words = ["\"x\" is undefined", "", "bogus", "no-such-option", "zero byte", "sm_21"];
    for (i, (result, words)) in results.iter().zip(words).enumerate() {
        if words.is_empty() {
            assert!(result.is_ok(), "{i}");
        } else {
            let text = format!("{:?}", result.as_ref().unwrap_err());
            assert!(text.contains(words), "{i}: {text}");
        }
    }
    let text = format!("{:?}", results[0].as_ref().unwrap_err());
    let folder = text.split("the text is in ").nth(1).unwrap().lines().next().unwrap();
    let kept = fs::read_to_string(Path::new(folder).join("kernel.cu")).unwrap();
    assert_eq!(kept, requests[0].source);
}
