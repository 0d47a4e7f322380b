//! From a problem to steps.

use crate::attention::problem::{Problem, Strides};
use crate::attention::space::space;
use tilewright_base::{Error, Kind, Result};
use tilewright_device::Arch;
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, ProductKind, lower};
use tilewright_target::Gpu;
use tilewright_tile::Kernel;

/// Which tensor of the problem a parameter of a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Mask.
    Mask,
    /// Result.
    O,
    /// Log-sum-exp of each row.
    Lse,
    /// Part of the workspace.
    Workspace {
        /// First byte, a multiple of 256.
        offset: u64,
        /// Length.
        bytes: u64,
    },
}

/// One launch.
#[derive(Clone, Debug)]
pub struct Step {
    /// What one block computes.
    pub kernel: Kernel,
    /// How.
    pub schedule: GpuSchedule,
    /// The kernel's size symbols.
    pub sizes: Env,
    /// The kernel's parameters, in order.
    pub operands: Vec<Place>,
}

/// A way to compute a problem.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Launches in order.
    pub steps: Vec<Step>,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Estimated time.
    pub estimate_us: f64,
}

/// What the device is compiled for.
fn arch(gpu: &Gpu) -> Arch {
    match gpu.capability {
        90.. => Arch::Sm90a,
        89 => Arch::Sm89,
        _ => Arch::Sm80,
    }
}

/// Ways to compute `problem`, best first by the time model, at most `most` of them.
///
/// # Errors
/// The user's for impossible sizes; unsupported when no kernel of the library fits.
pub fn plan(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    problem.check()?;
    if problem.batch == 0 || problem.heads == 0 || problem.q_len == 0 {
        return Ok(vec![Candidate { steps: Vec::new(), workspace_bytes: 0, estimate_us: 0.0 }]);
    }
    let spec = problem.spec()?;
    let kernel = spec.program("attention");
    let mut ranked: Vec<(f64, GpuSchedule)> =
        space(&spec, arch(gpu), addressable(problem), vector(problem))
            .into_iter()
            .map(|s| (estimate_us(problem, gpu, &s), s))
            .collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    let mut out = Vec::new();
    for (estimate_us, schedule) in ranked {
        if out.len() >= most {
            break;
        }
        // The space is a list of what should be legal; the lowering has the last word.
        match lower(&kernel, &schedule) {
            Ok(_) => {
                let step = Step {
                    kernel: kernel.clone(),
                    schedule,
                    sizes: sizes(problem),
                    operands: operands(problem),
                };
                out.push(Candidate { steps: vec![step], workspace_bytes: 0, estimate_us });
            }
            Err(e) if e.kind() == Kind::Unsupported => {}
            Err(e) => return Err(e),
        }
    }
    if out.is_empty() {
        let (dtype, depth) = (problem.dtype, problem.depth);
        return Err(Error::unsupported(format!("attention of {dtype} with depth {depth}")));
    }
    Ok(out)
}

/// Whether the copy engine can address all tensors: 16-byte addresses, lines and ends of lines.
fn addressable(p: &Problem) -> bool {
    let (size, result) = (p.operand_bytes(), i64::from(p.result.bits()) / 8);
    let lines = |s: &Strides, size: i64| {
        [s.batch, s.head, s.row].iter().all(|stride| stride * size % 16 == 0)
    };
    let operands = [&p.q, &p.k, &p.v].into_iter().all(|s| lines(s, size));
    operands
        && lines(&p.o, result)
        && p.width * result % 16 == 0
        && p.kv_len > 0
        && p.align.iter().all(|a| a % 16 == 0)
}

/// Elements of one plain access that every tensor allows.
fn vector(p: &Problem) -> u32 {
    let fits = |n: &i64| {
        let lines = [(&p.q, p.depth), (&p.k, p.depth), (&p.v, p.width), (&p.o, p.width)];
        let sizes = [p.dtype, p.dtype, p.dtype, p.result].map(|t| i64::from(t.bits()) / 8);
        lines.iter().zip(p.align).zip(sizes).all(|(((s, extent), align), size)| {
            [s.batch, s.head, s.row, *extent].iter().all(|x| x % n == 0) && align % (n * size) == 0
        })
    };
    let most = 16 / p.operand_bytes();
    [8, 4, 2].into_iter().filter(|n| *n <= most).find(fits).map_or(1, |n| n as u32)
}

/// Microseconds under a schedule: blocks of queries in whole waves, each at the pace of the products, and what
/// a block exposes.
fn estimate_us(p: &Problem, gpu: &Gpu, s: &GpuSchedule) -> f64 {
    let tile = |name: &str| s.tiles.get(name).copied().unwrap_or(1);
    let ceil = |a: i64, b: i64| (a + b - 1) / b.max(1);
    let (bq, bt) = (tile("BQ"), tile("BT"));
    let items = (p.batch * p.heads * ceil(p.q_len, bq)) as f64;
    let share = if p.causal.is_some() && p.q_len > 1 { 0.5 } else { 1.0 };
    let steps = (ceil(p.kv_len, bt) as f64 * share).max(1.0);
    let flops = (2 * bq * bt * (p.depth + p.width)) as f64;
    let (rate, exposed) = match s.product {
        ProductKind::Wgmma => (gpu.tensor_flops_per_clock, 300.0),
        ProductKind::MmaSync => (gpu.tensor_flops_per_clock * 0.5, 400.0),
        ProductKind::Fma => (gpu.f32_flops_per_clock * 0.5, 600.0),
    };
    // What one consumer does between its products, the others hide.
    let softmax = (bq * bt) as f64 / 10.0 / f64::from(s.consumers.min(2));
    let step = flops / rate + softmax / if s.turns { 2.0 } else { 1.5 } + exposed;
    let waves = (items / f64::from(gpu.sms)).ceil();
    waves * (steps * step + 2000.0) / gpu.model.clock_ghz / 1e3 + gpu.model.launch_us
}

fn sizes(p: &Problem) -> Env {
    let mut env = Env::new();
    let mut put = |name: &str, value: i64| {
        env.insert(name.into(), value);
    };
    put("B", p.batch);
    put("H", p.heads);
    put("G", p.kv_heads);
    put("R", p.heads / p.kv_heads);
    put("S", p.q_len);
    put("T", p.kv_len);
    if let Some(offset) = p.causal
        && offset != p.kv_len - p.q_len
    {
        put("ahead", offset);
    }
    for (name, strides) in [('q', &p.q), ('k', &p.k), ('v', &p.v), ('o', &p.o)] {
        put(&format!("{name}b"), strides.batch);
        put(&format!("{name}h"), strides.head);
        put(&format!("{name}s"), strides.row);
    }
    if let Some(mask) = &p.mask {
        put("mb", mask.strides.batch);
        put("mh", mask.strides.head);
        put("ms", mask.strides.row);
    }
    env
}

fn operands(p: &Problem) -> Vec<Place> {
    let mut out = vec![Place::Q, Place::K, Place::V];
    out.extend(p.mask.map(|_| Place::Mask));
    out.push(Place::O);
    out.extend(p.lse.then_some(Place::Lse));
    out
}
