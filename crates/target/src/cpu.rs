//! [`Cpu`]: an x86 machine.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The arithmetic that the user allows for `f32` models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// `f32` products and sums.
    #[default]
    F32,
    /// Contractions and convolutions round their operands to TF32 (11 significant digits) and sum in
    /// `f32`. GPUs only.
    Tf32,
    /// Contractions and convolutions round their operands to `f16` and sum in `f32`; weights and
    /// intermediate results are stored in `f16`. GPUs only.
    F16,
    /// Contractions and convolutions round their operands to `bf16` and sum in `f32`. On a GPU weights
    /// and intermediate results are stored in `bf16`, too.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(Precision::F32),
            "tf32" => Ok(Precision::Tf32),
            "f16" => Ok(Precision::F16),
            "bf16" => Ok(Precision::Bf16),
            other => Err(format!("`{other}` is not a precision: f32, tf32, f16 or bf16")),
        }
    }
}

/// What the machine reached in our own measurements (or, unmeasured, a careful guess).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// True when measured on this machine, false for the guess.
    pub measured: bool,
    /// `f32` fused multiply-adds with one thread, in FLOP/s (two per multiply-add).
    pub f32_flops_per_s_1_thread: f64,
    /// The same with all `threads`.
    pub f32_flops_per_s: f64,
    /// Reading memory far larger than the caches, all threads, in bytes/s.
    pub memory_read_bytes_per_s: f64,
    /// Reading one such array and writing another, bytes read plus written per second.
    pub memory_copy_bytes_per_s: f64,
    /// Reading an array that fits the second-level cache, one thread, in bytes/s.
    pub l2_read_bytes_per_s: f64,
    /// Reading an array of half the last-level cache, all threads, in bytes/s; 0 where it was not measured. For people: plans
    /// do not depend on it.
    #[serde(default)]
    pub l3_read_bytes_per_s: f64,
    /// Starting a kernel on all threads and waiting for its end, in seconds.
    pub launch_s: f64,
    /// `bf16` products with sums in `f32` (AVX512-BF16), all threads, in FLOP/s; 0 where there are
    /// none.
    #[serde(default)]
    pub bf16_flops_per_s: f64,
    /// 8-bit products with sums in `i32` (AVX512-VNNI), all threads, in operations/s (two per
    /// multiply-add); 0 where there are none.
    #[serde(default)]
    pub int8_ops_per_s: f64,
    /// `bf16` products on AMX, all threads, in FLOP/s; 0 where there is none.
    #[serde(default)]
    pub amx_bf16_flops_per_s: f64,
    /// 8-bit products on AMX, all threads, in operations/s; 0 where there is none.
    #[serde(default)]
    pub amx_int8_ops_per_s: f64,
    /// Starting a kernel on all threads when the others have fallen asleep, in seconds.
    #[serde(default)]
    pub wake_s: f64,
}

/// An x86 machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// As the processor names itself.
    pub name: String,
    /// Threads that we use.
    pub threads: usize,
    /// Width of a vector register that we use: 256 or 512.
    pub vector_bits: u32,
    /// Instruction set extensions that matter here, by LLVM's names, sorted: `avx2`, `avx512f`.
    pub features: Vec<String>,
    /// First-level data cache of a core.
    pub l1_bytes: usize,
    /// Second-level cache of a core.
    pub l2_bytes: usize,
    /// Last-level cache.
    pub l3_bytes: usize,
    /// What was measured.
    pub ceilings: Ceilings,
}

/// More threads than any machine has processors: beyond it starting them takes memory that the process needs.
const MOST_THREADS: usize = 1024;

impl Cpu {
    /// Reads this machine: name, caches and features; ceilings are guesses. `threads` of 0 means
    /// all that the system offers. Errors when the machine lacks AVX2 and FMA, and when more than 1024
    /// threads are asked for.
    pub fn detect(threads: usize) -> tilewright_base::Result<Cpu> {
        let features = detect_features();
        let has = |f: &str| features.iter().any(|x| x == f);
        if !(has("avx2") && has("fma")) {
            return Err(tilewright_base::Error::unsupported(
                "this processor lacks AVX2 and FMA, the least that compiled kernels need",
            ));
        }
        if threads > MOST_THREADS {
            return Err(tilewright_base::Error::user(format!(
                "{threads} threads are asked for, {MOST_THREADS} are possible"
            )));
        }
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if threads == 0 { available } else { threads };
        let wide = ["avx512f", "avx512bw", "avx512dq", "avx512vl"].iter().all(|f| has(f));
        let vector_bits = if wide { 512 } else { 256 };
        // Two multiply-adds a cycle at 2 GHz: a guess until `tw machine` measures.
        let one = 2.0 * 2.0 * f64::from(vector_bits / 32) * 2.0e9;
        Ok(Cpu {
            name: cpu_name(),
            threads,
            vector_bits,
            features,
            l1_bytes: cache_bytes(0).unwrap_or(32 << 10),
            l2_bytes: cache_bytes(2).unwrap_or(1 << 20),
            l3_bytes: cache_bytes(3).unwrap_or(8 << 20),
            ceilings: Ceilings {
                measured: false,
                f32_flops_per_s_1_thread: one,
                f32_flops_per_s: one * threads as f64,
                memory_read_bytes_per_s: 12e9,
                memory_copy_bytes_per_s: 12e9,
                l2_read_bytes_per_s: 60e9,
                l3_read_bytes_per_s: 0.0,
                launch_s: 2e-6,
                bf16_flops_per_s: 0.0,
                int8_ops_per_s: 0.0,
                amx_bf16_flops_per_s: 0.0,
                amx_int8_ops_per_s: 0.0,
                wake_s: 2e-5,
            },
        })
    }

    /// Whether it has an instruction set extension, by LLVM's name.
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f == feature)
    }

    /// Whether everything that it has was measured.
    pub fn is_measured(&self) -> bool {
        let c = &self.ceilings;
        let missing = |feature: &str, rate: f64| self.has(feature) && rate == 0.0;
        let wide = self.vector_bits == 512;
        c.measured
            && !(wide && missing("avx512bf16", c.bf16_flops_per_s))
            && !(wide && missing("avx512vnni", c.int8_ops_per_s))
    }

    /// `f32` lanes of a vector register.
    pub fn f32_lanes(&self) -> usize {
        self.vector_bits as usize / 32
    }

    /// The features as LLVM's target machine wants them: `+avx2,+fma,...`.
    pub fn llvm_features(&self) -> String {
        let plus: Vec<String> = self.features.iter().map(|f| format!("+{f}")).collect();
        plus.join(",")
    }
}

/// Extensions that code generation may use, sorted by name.
fn detect_features() -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($rust:tt => $llvm:literal),* $(,)?) => {
                $(if std::arch::is_x86_feature_detected!($rust) { found.push($llvm.to_string()); })*
            };
        }
        probe!(
            "sse4.2" => "sse4.2", "popcnt" => "popcnt", "bmi1" => "bmi", "bmi2" => "bmi2",
            "lzcnt" => "lzcnt", "movbe" => "movbe", "f16c" => "f16c", "avx" => "avx",
            "avx2" => "avx2", "fma" => "fma",
            "avx512f" => "avx512f", "avx512bw" => "avx512bw", "avx512dq" => "avx512dq",
            "avx512vl" => "avx512vl", "avx512cd" => "avx512cd", "avx512vnni" => "avx512vnni",
            "avx512bf16" => "avx512bf16", "avx512fp16" => "avx512fp16",
        );
        // Stable Rust cannot ask for AMX by name: leaf 7, EDX bits 22 (bf16), 24 (tile), 25 (int8).
        let leaf7 = std::arch::x86_64::__cpuid_count(7, 0);
        for (bit, name) in [(22, "amx-bf16"), (24, "amx-tile"), (25, "amx-int8")] {
            if leaf7.edx >> bit & 1 == 1 {
                found.push(name.to_string());
            }
        }
    }
    found.sort();
    found
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|l| l.starts_with("model name"));
    let name = line.and_then(|l| l.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown x86-64 processor").to_string()
}

/// Size of a cache of the first core, by sysfs index (0: L1 data, 2: L2, 3: L3).
fn cache_bytes(index: usize) -> Option<usize> {
    let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
    let text = std::fs::read_to_string(path).ok()?;
    let text = text.trim();
    let (digits, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let scale = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detection_is_plausible_and_survives_json() {
        let Ok(cpu) = Cpu::detect(0) else { return };
        assert!(cpu.threads >= 1 && cpu.l1_bytes >= 8 << 10 && cpu.l2_bytes >= cpu.l1_bytes);
        assert!(cpu.llvm_features().contains("+avx2"));
        let text = serde_json::to_string(&cpu).unwrap();
        assert_eq!(serde_json::from_str::<Cpu>(&text).unwrap(), cpu);
    }
}
