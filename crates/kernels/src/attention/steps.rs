//! What plans of attention and of its gradient have in common: launches, their sizes and memory, and the choice among
//! schedules, of which the lowering has the last word.

use crate::attention::problem::{Problem, Strides};
use tilewright_base::{Kind, Result};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_tile::Kernel;

/// Shared memory that a block may use on Hopper, less what barriers take.
pub(crate) const SMEM_BYTES: i64 = (227 << 10) - 512;

/// One launch, whose tensors are named by `P`.
#[derive(Clone, Debug)]
pub struct Launch<P> {
    /// What one block computes.
    pub kernel: Kernel,
    /// How.
    pub schedule: GpuSchedule,
    /// The kernel's size symbols.
    pub sizes: Env,
    /// The kernel's parameters, in order.
    pub operands: Vec<P>,
}

impl<P> Launch<P> {
    /// Of all sizes those that the kernel has.
    pub(crate) fn new(
        kernel: Kernel,
        schedule: GpuSchedule,
        sizes: &Env,
        operands: Vec<P>,
    ) -> Launch<P> {
        let named = kernel.symbols.iter();
        let sizes = named.filter_map(|s| Some((s.name.clone(), *sizes.get(&s.name)?))).collect();
        Launch { kernel, schedule, sizes, operands }
    }

    /// Whether the lowering takes it.
    pub(crate) fn lowers(&self) -> Result<()> {
        lower(&self.kernel, &self.schedule).map(drop)
    }
}

/// The first `most` of some choices that can be built: what the lowering does not support is passed over.
///
/// # Errors
/// Other errors of building.
pub(crate) fn first_built<C, T>(
    choices: impl IntoIterator<Item = C>,
    most: usize,
    mut build: impl FnMut(C) -> Result<T>,
) -> Result<Vec<T>> {
    let mut out = Vec::new();
    for choice in choices {
        if out.len() >= most {
            break;
        }
        match build(choice) {
            Ok(built) => out.push(built),
            Err(e) if e.kind() == Kind::Unsupported => {}
            Err(e) => return Err(e),
        }
    }
    Ok(out)
}

/// Regions of f32 in a workspace, each from a multiple of 256 bytes on.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Bytes so far.
    pub(crate) bytes: u64,
}

impl Workspace {
    /// First byte and length of a region of so many elements.
    pub(crate) fn take(&mut self, elements: i64) -> (u64, u64) {
        let (offset, bytes) = (self.bytes, elements.unsigned_abs() * 4);
        self.bytes = (offset + bytes).next_multiple_of(256);
        (offset, bytes)
    }
}

/// A tile size of a schedule.
pub(crate) fn tile(s: &GpuSchedule, name: &str) -> i64 {
    s.tiles.get(name).copied().unwrap_or(1)
}

/// `a / b`, up.
pub(crate) fn ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b.max(1)
}

/// Whether the copy engine can address tensors of `size` bytes an element: 16-byte addresses, lines and ends of lines.
pub(crate) fn addressable(strides: &[&Strides], size: i64, ends: &[i64], align: &[i64]) -> bool {
    let lines = strides.iter().flat_map(|s| s.all());
    lines.chain(ends.iter().copied()).all(|n| n * size % 16 == 0)
        && align.iter().all(|a| a % 16 == 0)
}

/// Size symbols of a problem: extents, strides of its tensors and of its mask. Programs name some of them.
pub(crate) fn sizes(p: &Problem) -> Env {
    let mut env = Env::new();
    let extents = [
        ("B", p.batch),
        ("H", p.heads),
        ("G", p.kv_heads),
        ("R", p.heads / p.kv_heads.max(1)),
        ("S", p.q_len),
        ("T", p.kv_len),
        ("ahead", p.causal.unwrap_or(0)),
    ];
    env.extend(extents.map(|(name, value)| (name.into(), value)));
    put_strides(&mut env, &[('q', &p.q), ('k', &p.k), ('v', &p.v), ('o', &p.o)]);
    if let Some(mask) = &p.mask {
        put_strides(&mut env, &[('m', &mask.strides)]);
    }
    env
}

/// Strides of tensors as size symbols: a letter, and `b`, `h` or `s`.
pub(crate) fn put_strides(env: &mut Env, tensors: &[(char, &Strides)]) {
    for (name, strides) in tensors {
        for (axis, stride) in ["b", "h", "s"].iter().zip(strides.all()) {
            env.insert(format!("{name}{axis}").into(), stride);
        }
    }
}
