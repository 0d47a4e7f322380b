//! What the assembler says: resources of each function, and warnings that cost speed.
//!
//! ```text
//! ptxas info    : Compiling entry function 'gemm' for 'sm_90a'
//! ptxas info    : Function properties for gemm
//! ptxas         .     1032 bytes stack frame, 1248 bytes spill stores, 1248 bytes spill loads
//! ptxas info    : Used 64 registers, used 1 barriers, 256 bytes smem
//! ```
//!
//! To recognise a warning: a row in [`KNOWN`], with the words that stay the same between versions
//! (the numbers `C7510`, `C7511`, … tell reasons of one thing apart).

use serde::{Deserialize, Serialize};

/// What a function of the module takes, as the assembler counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionResources {
    /// The name in the module (mangled, unless it is `extern "C"`).
    pub name: String,
    /// A kernel, or a function that was not inlined into one.
    pub is_kernel: bool,
    /// Registers per thread; 0 for a function that is not a kernel.
    pub registers: u32,
    /// Bytes written when registers did not suffice, per thread.
    pub spill_store_bytes: u32,
    /// Bytes read back.
    pub spill_load_bytes: u32,
    /// Stack frame per thread.
    pub stack_bytes: u32,
    /// Shared memory that the text declares, per block.
    pub static_smem_bytes: u32,
    /// Barriers (`bar.sync`) in use.
    pub barriers: u32,
}

/// What a warning is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WarningKind {
    /// Warpgroup products run one after another: most of the tensor cores' speed is lost.
    WgmmaSerialized,
    /// The compiler put waits or fences of its own between warpgroup products.
    WgmmaSyncInjected,
    /// `setmaxnreg` has no effect: the warps keep the registers that they started with.
    SetmaxnregIgnored,
    /// Any other remark on lost speed.
    PerformanceLoss,
    /// A warning of the C++ front end.
    Source,
}

/// A warning of the compiler or the assembler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// What it is about.
    pub kind: WarningKind,
    /// The number the assembler gives it: `C7510`.
    pub code: Option<String>,
    /// The function it is about, when the text names one.
    pub function: Option<String>,
    /// The line of the log.
    pub text: String,
}

/// Words of a line, and what they mean; the first row that fits counts.
#[rustfmt::skip]
const KNOWN: &[(&str, WarningKind)] = &[
    ("wgmma.mma_async instructions are serialized", WarningKind::WgmmaSerialized),
    ("warpgroup.wait is injected",                  WarningKind::WgmmaSyncInjected),
    ("warpgroup.arrive is injected",                WarningKind::WgmmaSyncInjected),
    ("'setmaxnreg' ignored",                        WarningKind::SetmaxnregIgnored),
    ("Potential Performance Loss",                  WarningKind::PerformanceLoss),
    (": warning",                                   WarningKind::Source),
];

/// The log without what differs from run to run: how long the assembler took.
pub(super) fn without_times(log: &str) -> String {
    let kept = log.lines().filter(|line| !line.contains("Compile time ="));
    kept.flat_map(|line| [line, "\n"]).collect::<String>().trim_end().to_owned()
}

/// Resources in the order of the log.
pub(super) fn resources(log: &str) -> Vec<FunctionResources> {
    let mut found: Vec<FunctionResources> = Vec::new();
    let mut current: Option<usize> = None;
    // The offline compiler prints the second kind of line without its name in front.
    let of_ptxas = |line: &&str| line.starts_with("ptxas") || line.contains("bytes stack frame");
    for line in log.lines().filter(of_ptxas) {
        if let Some(name) = between(line, "Compiling entry function '", "'") {
            let row = index_of(&mut found, name);
            found[row].is_kernel = true;
            current = Some(row);
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            current = Some(index_of(&mut found, name.trim()));
        } else if let Some(row) = current.map(|row| &mut found[row]) {
            for part in line.rsplit(" : ").next().unwrap_or(line).split(',') {
                read(
                    part.trim_start_matches("ptxas").trim_matches(|c: char| c == '.' || c == ' '),
                    row,
                );
            }
        }
    }
    found
}

/// One part of a line: `64 registers` after `Used`, `1032 bytes stack frame`.
fn read(part: &str, row: &mut FunctionResources) {
    let words = part.strip_prefix("Used ").or_else(|| part.strip_prefix("used ")).unwrap_or(part);
    let Some((number, unit)) = words.split_once(' ') else { return };
    let Ok(number) = number.parse() else { return };
    match unit {
        "registers" => row.registers = number,
        "barriers" => row.barriers = number,
        "bytes smem" => row.static_smem_bytes = number,
        "bytes stack frame" => row.stack_bytes = number,
        "bytes spill stores" => row.spill_store_bytes = number,
        "bytes spill loads" => row.spill_load_bytes = number,
        _ => {}
    }
}

fn index_of(found: &mut Vec<FunctionResources>, name: &str) -> usize {
    found.iter().position(|row| row.name == name).unwrap_or_else(|| {
        found.push(FunctionResources { name: name.to_owned(), ..FunctionResources::default() });
        found.len() - 1
    })
}

/// Warnings in the order of the log.
pub(super) fn warnings(log: &str) -> Vec<Warning> {
    let mut found = Vec::new();
    for line in log.lines() {
        let Some((_, kind)) = KNOWN.iter().find(|(words, _)| line.contains(words)) else {
            continue;
        };
        let code = between(line, "(C", ")").filter(|c| c.bytes().all(|b| b.is_ascii_digit()));
        found.push(Warning {
            kind: *kind,
            code: code.map(|digits| format!("C{digits}")),
            function: between(line, "function '", "'").map(str::to_owned),
            text: line.trim().to_owned(),
        });
    }
    found
}

fn between<'a>(line: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(before)?;
    Some(rest.split_once(after)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded from NVRTC 13.0, except for the line C7510, which is another
    /// reason that its assembler knows for the same loss.
    const LOG: &str = "\
kernel.cu(1): warning #177-D: variable \"unused\" was declared but never referenced
ptxas info    : (C7519) warpgroup.arrive is injected in around line 44 by compiler to allow use of registers in GMMA in function 'bad'
ptxas info    : (C7517) warpgroup.wait is injected in around line 42 by compiler to allow use of registers defined by GMMA in function 'bad'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function 'bad'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to the presence of Extern calls in the function 'other'
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'bad' for 'sm_90a'
ptxas info    : Function properties for bad
ptxas         .     1032 bytes stack frame, 1248 bytes spill stores, 1244 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1032 bytes cumulative stack size, 256 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 63.885 ms
ptxas info    : Function properties for helper
ptxas         .     16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

    #[test]
    fn resources_of_kernels_and_helpers() {
        let found = resources(LOG);
        let bad = FunctionResources {
            name: "bad".into(),
            is_kernel: true,
            registers: 64,
            spill_store_bytes: 1248,
            spill_load_bytes: 1244,
            stack_bytes: 1032,
            static_smem_bytes: 256,
            barriers: 1,
        };
        let helper =
            FunctionResources { name: "helper".into(), stack_bytes: 16, ..Default::default() };
        assert_eq!(found, [bad, helper]);
    }

    #[test]
    fn warnings_are_told_apart() {
        let found = warnings(LOG);
        let rows: Vec<_> =
            found.iter().map(|w| (w.kind, w.code.as_deref(), w.function.as_deref())).collect();
        use WarningKind::*;
        assert_eq!(
            rows,
            [
                (Source, None, None),
                (WgmmaSyncInjected, Some("C7519"), Some("bad")),
                (WgmmaSyncInjected, Some("C7517"), Some("bad")),
                (WgmmaSerialized, Some("C7511"), Some("bad")),
                (WgmmaSerialized, Some("C7510"), Some("other")),
                (SetmaxnregIgnored, Some("C7508"), None),
            ]
        );
    }

    #[test]
    fn the_format_of_nvcc_and_nonsense() {
        let nvcc = "ptxas info    : Compiling entry function 'k' for 'sm_80'\nptxas info    : Function properties for k\n    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 255 registers";
        assert_eq!((resources(nvcc)[0].registers, resources(nvcc)[0].stack_bytes), (255, 8));
        assert!(resources("").is_empty() && warnings("").is_empty());
        assert!(resources("ptxas info : Used x registers\nptxas").is_empty());
        assert!(!without_times(LOG).contains("63.885"));
    }
}
