//! Kernels whose text is written by hand (`device/*.cu`): what the graph language does not say, such as a table of addresses.
//!
//! A text is compiled for a device and a set of definitions when these are first met, then only looked up.

use crate::plans::cuda;
use std::collections::HashMap;
use std::sync::{OnceLock, PoisonError, RwLock};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Args, CompileRequest, Function, LaunchShape, Stream};
use tilewright_torch_abi::Abi;

/// A text with kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Text {
    Optimizers,
    Dropout,
    Bags,
    Scale,
    Rotary,
    Losses,
}

const BASE: &str = include_str!("../../../device-lib/base.cuh");
const ELEMENT: &str = include_str!("device/element.cuh");

impl Text {
    fn name(self) -> &'static str {
        match self {
            Text::Optimizers => "optimizers",
            Text::Dropout => "dropout",
            Text::Bags => "bags",
            Text::Scale => "scale",
            Text::Rotary => "rotary",
            Text::Losses => "losses",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Text::Optimizers => include_str!("device/optimizers.cu"),
            Text::Dropout => include_str!("device/dropout.cu"),
            Text::Bags => include_str!("device/bags.cu"),
            Text::Scale => include_str!("device/scale.cu"),
            Text::Rotary => include_str!("device/rotary.cu"),
            Text::Losses => include_str!("device/losses.cu"),
        }
    }

    pub(crate) fn request(self, arch: tilewright_cuda::Arch, set: &Set) -> CompileRequest {
        let mut request = CompileRequest::new(self.name(), self.text(), arch)
            .header("tw/base.cuh", BASE)
            .header("tw/element.cuh", ELEMENT)
            .option("-std=c++17")
            .option("-default-device");
        for (name, value) in set.iter().filter(|(name, _)| !name.is_empty()) {
            request = request.option(format!("-D{name}={value}"));
        }
        request
    }
}

/// Definitions of a text; those with an empty name are not there.
pub(crate) type Set = [(&'static str, u64); 4];

/// How `TW_ELEMENT` names a type.
///
/// # Errors
/// Our bug for types that are no floats of PyTorch's.
pub(crate) fn element(dtype: DType) -> Result<(&'static str, u64)> {
    let number = match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
        DType::F64 => 3,
        other => return Err(Error::bug(format!("a kernel for {other}"))),
    };
    Ok(("TW_ELEMENT", number))
}

fn function(device: u32, text: Text, entry: &'static str, set: &Set) -> Result<Function> {
    type Known = RwLock<HashMap<(u32, Text, &'static str, Set), Function>>;
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let known = KNOWN.get_or_init(Known::default);
    let key = (device, text, entry, *set);
    if let Some(found) = known.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return Ok(found.clone());
    }
    let cuda = cuda(device)?;
    let gpu = cuda.loader.gpu();
    let compiled = cuda.loader.nvrtc().compile(&text.request(gpu.arch(), set))?;
    let made = gpu.load(&compiled)?.function(entry)?;
    let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
    Ok(known.entry(key).or_insert(made).clone())
}

/// Launches a kernel in PyTorch's current stream of a device. The arguments are those that the kernel's text takes; the
/// tensors behind their addresses are alive, on this device, and as long as the text reads and writes for these numbers.
pub(crate) fn launch(
    abi: &'static Abi,
    device: u32,
    (text, entry, set): (Text, &'static str, &Set),
    blocks: u64,
    threads: u32,
    args: &Args,
) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    let cuda = cuda(device)?;
    let _guard = if cuda.alone { None } else { Some(abi.cuda_guard(device)?) };
    let blocks = u32::try_from(blocks).ok().filter(|b| i32::try_from(*b).is_ok());
    let blocks =
        blocks.ok_or_else(|| Error::unsupported("a launch of more blocks than a grid has"))?;
    let shape = LaunchShape {
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        // All begin with `begin_behind_others`.
        programmatic: cuda.machine().capability >= 90,
        ..LaunchShape::default()
    };
    let prepared = function(device, text, entry, set)?.prepare(&shape, args)?;
    let stream = abi.cuda_stream(device)?;
    // SAFETY: PyTorch's current stream of this device, which belongs to the primary context and outlives the call.
    let stream = unsafe { Stream::from_raw(cuda.loader.gpu(), stream) };
    // SAFETY: this function's contract, which each operator keeps by checking its tensors. PyTorch's allocator gives memory that is
    // freed while kernels are in flight only to later work of the same stream.
    unsafe { prepared.launch(&stream) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_cuda::{Arch, Nvrtc};

    #[test]
    fn every_kernel_waits_for_the_one_before() {
        let texts =
            [Text::Optimizers, Text::Dropout, Text::Bags, Text::Scale, Text::Rotary, Text::Losses];
        for text in texts {
            let kernels: Vec<&str> = text.text().split("extern \"C\" __global__").skip(1).collect();
            assert!(!kernels.is_empty(), "{text:?}");
            for kernel in kernels {
                let (_, body) = kernel.split_once('{').expect("a body");
                assert!(
                    body.trim_start().starts_with("begin_behind_others();"),
                    "{text:?}: {kernel}"
                );
            }
        }
    }

    #[test]
    fn the_texts_compile_for_all_types() {
        let nvrtc = match Nvrtc::open(None) {
            Ok(nvrtc) => nvrtc,
            Err(error) => {
                let required = std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
                assert!(!required, "{error:?}");
                println!("skipped: no NVRTC");
                return;
            }
        };
        let table = crate::ops::table_definitions(509);
        let none = ("", 0);
        let mut requests = Vec::new();
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let t = element(dtype).expect("a float");
            let wide = dtype == DType::BF16;
            requests.push((Text::Optimizers, [t, table[0], table[1], ("TW_MASTER", wide.into())]));
            requests.push((Text::Dropout, [t, none, none, none]));
            requests.push((Text::Scale, [t, none, none, none]));
            requests.push((Text::Losses, [t, none, none, none]));
            for back in 0..2 {
                let table = ("TW_TABLE", if dtype == DType::F64 { 3 } else { back });
                for heads in 1..3 {
                    let heads = ("TW_HEADS", heads);
                    requests.push((Text::Rotary, [t, table, ("TW_BACK", back), heads]));
                }
            }
            let mode = ("TW_MODE", u64::from(wide) * 2);
            requests.push((Text::Bags, [t, mode, none, none]));
            requests.push((Text::Bags, [t, mode, ("TW_SHORT", 1), none]));
        }
        for (text, set) in requests {
            let compiled = nvrtc.compile(&text.request(Arch::SM_90A, &set));
            let compiled = compiled.unwrap_or_else(|e| panic!("{text:?} {set:?}: {e:?}"));
            let spills =
                compiled.log().contains("spill") && !compiled.log().contains(" 0 bytes spill");
            assert!(!spills, "{text:?} {set:?}: {}", compiled.log());
        }
    }
}
