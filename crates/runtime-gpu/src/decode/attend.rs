//! [`Attend`]: attention of a step as one launch, whose text is written by hand (`attend.cu`).
//!
//! In a [`super::DecodePlan`] two launches do it: parts of the positions, and what combines them. Here the blocks that have the parts
//! of a head are a cluster, and combine them in shared memory; and what earlier steps left in the cache is read while the product
//! before still runs. Which decoders it takes says [`Attend::of`]; all others, and the device interpreter, keep to the two.

use super::DecodeStep;
use super::plan::AttentionOf;
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Arch, Args, CompileRequest, Function, LaunchShape, PreparedLaunch};
use tilewright_launch::Loader;
use tilewright_plan::Decoder;
use tilewright_target::Gpu;

/// Blocks of a cluster.
const PARTS: i64 = 8;
/// More positions than that are better read once for all heads that share them.
const MOST_POSITIONS: i64 = 8192;
/// Heads of a block at most.
const MOST_TOGETHER: i64 = 4;

/// What stands in for the launches of attention of a step.
#[derive(Debug)]
pub struct Attend {
    /// Numbers of the model, by their names in the text.
    definitions: Vec<(&'static str, i64)>,
    blocks: u32,
    threads: u32,
}

impl Attend {
    /// For a decoder with a cache of this type: 16-bit floats, heads of 32 to 256 numbers, at most 8192 positions, on a GPU with
    /// clusters.
    pub(super) fn of(
        d: &Decoder,
        gpu: &Gpu,
        (batch, positions): (i64, i64),
        cache: DType,
    ) -> Option<Attend> {
        let fits = gpu.capability >= 90
            && matches!(cache, DType::BF16 | DType::F16)
            && matches!(d.width, 32 | 64 | 128 | 256)
            && positions <= MOST_POSITIONS
            && d.kv_heads > 0
            && d.heads % d.kv_heads == 0;
        if !fits {
            return None;
        }
        // Keys are read once for some heads, but rather again than by few blocks.
        let mut together = 1;
        let shared = d.heads / d.kv_heads;
        let blocks = |together: i64| batch * d.heads / together * PARTS;
        while together < MOST_TOGETHER
            && shared % (2 * together) == 0
            && blocks(together) > i64::from(gpu.sms)
        {
            together *= 2;
        }
        let threads = if d.width > 64 { 512 } else { 256 };
        let definitions = vec![
            ("TW_POSITIONS", positions),
            ("TW_HEADS", d.heads),
            ("TW_KV_HEADS", d.kv_heads),
            ("TW_WIDTH", d.width),
            ("TW_PARTS", PARTS),
            ("TW_TOGETHER", together),
            ("TW_THREADS", threads),
            ("TW_HALF", i64::from(cache == DType::F16)),
        ];
        let blocks = u32::try_from(blocks(together)).ok()?;
        Some(Attend { definitions, blocks, threads: threads as u32 })
    }

    /// What the compiler is asked for.
    pub fn request(&self, arch: Arch) -> CompileRequest {
        let request = CompileRequest::new("decode_attend", include_str!("attend.cu"), arch);
        self.definitions.iter().fold(request.option("-std=c++17"), |request, (name, value)| {
            request.option(format!("-D{name}={value}"))
        })
    }

    /// For people.
    pub(super) fn schedule(&self) -> String {
        format!("one launch, {} clusters of {PARTS} blocks", i64::from(self.blocks) / PARTS)
    }

    /// The kernel.
    ///
    /// # Errors
    /// The compiler's and the driver's.
    pub(super) fn function(&self, loader: &Loader) -> Result<Function> {
        let compiled = loader.nvrtc().compile(&self.request(loader.target()))?;
        loader.gpu().load(&compiled)?.function("decode_attend")
    }

    /// The launch that stands in for `step` and the one behind it, on a device where region `r` is at `address(r)`.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn prepare(
        &self,
        function: &Function,
        (step, of): (&DecodeStep, &AttentionOf),
        address: &dyn Fn(usize) -> u64,
    ) -> Result<PreparedLaunch> {
        let [q, keys, values, _, _, _, at] = *step.operands.as_slice() else {
            return Err(Error::bug(format!("operands of {}: {:?}", step.label, step.operands)));
        };
        let mut bytes = Vec::new();
        for region in [q, keys, values, of.mixed, at] {
            bytes.extend(address(region).to_le_bytes());
        }
        bytes.extend(of.window.unwrap_or(i64::from(i32::MAX)).to_le_bytes());
        bytes.extend(((of.scale * std::f64::consts::LOG2_E) as f32).to_le_bytes());
        // As long as the text's structure, whose alignment is that of a pointer.
        bytes.extend([0; 4]);
        let shape = LaunchShape {
            grid: [self.blocks, 1, 1],
            block: [self.threads, 1, 1],
            cluster: [PARTS as u32, 1, 1],
            programmatic: true,
            ..LaunchShape::default()
        };
        function.prepare(&shape, &Args::new().bytes(&bytes))
    }
}
